/* cuda_kernels.c - the passes of a rank by kernels of this build: a lincomb and a sweep are one
 * launch each, on the host's stream.
 *
 * Called by cuda.c once arguments have been checked.  No call waits for the device but a sweep, and
 * none takes memory but a lincomb in place that does not fit one launch.
 */
#include <math.h>

#include "backend/check.h"
#include "backend/cuda.h"

_Static_assert(sizeof(ps__lincomb_args) <= 4096 && sizeof(ps__sweep_args) <= 4096,
               "arguments of a kernel have 4096 bytes");

static size_t smaller(size_t a, size_t b)
{
  return a < b ? a : b;
}

/* ---- kinds of kernels ------------------------------------------------------------------------ */

static int kind_of(ps_dtype dtype)
{
  return dtype == PS_F64 ? PS__DOUBLES : dtype == PS_F32 ? PS__SINGLES : PS__HALVES;
}

static int wider(int a, int b)
{
  return a > b ? a : b;
}

static size_t width_of(int kind)
{
  return kind == PS__DOUBLES ? 2 : kind == PS__SINGLES ? 4 : 8;
}

/* Whether a thread may take its elements at once; a NULL operand does not mind. */
static bool suits(const void *p, ps_dtype dtype, int kind)
{
  return (uintptr_t)p % (width_of(kind) * ps_dtype_size(dtype)) == 0;
}

/* As many blocks as there is work for, and as the device holds at once. */
static unsigned blocks_for(const ps__cuda_rank *rank, size_t elements, int kind)
{
  enum { WAVES = 8 };
  size_t each = width_of(kind) * PS__THREADS, most = (size_t)rank->device->processors * WAVES;
  return (unsigned)smaller((elements + each - 1) / each, most > 0 ? most : 1);
}

static ps_status launch(ps__cuda_rank *rank, int kernel, unsigned parts, unsigned rows, void *args)
{
  void *arguments[1] = {args};
  return ps__cuda_check(rank->device,
                        ps__cuda.launch(rank->device->kernel[kernel], parts, rows, 1, PS__THREADS,
                                        1, 1, 0, rank->stream, arguments, NULL),
                        "launching a kernel");
}

/* ---- lincomb --------------------------------------------------------------------------------- */

typedef struct combination {
  size_t n;
  int terms;
  const double *weight; /* (outs, terms) */
  const ps_term *in;
  ps_dtype out_dtype;
  int kind;
} combination;

static int kernel_for(int kind, int outs)
{
  static const int kernels[3][3] = {
      {PS__K_ps_lincomb_1_halves, PS__K_ps_lincomb_3_halves, PS__K_ps_lincomb_7_halves},
      {PS__K_ps_lincomb_1_singles, PS__K_ps_lincomb_3_singles, PS__K_ps_lincomb_7_singles},
      {PS__K_ps_lincomb_1_doubles, PS__K_ps_lincomb_4_doubles, PS__K_ps_lincomb_4_doubles},
  };
  return kernels[kind][outs == 1 ? 0 : outs <= 3 ? 1 : 2];
}

static int room_of(int kind, int outs)
{
  return outs == 1 ? 1 : kind == PS__DOUBLES ? 4 : outs <= 3 ? 3 : PS__OUTS_MAX;
}

static int most_outs(int kind)
{
  return kind == PS__DOUBLES ? 4 : PS__OUTS_MAX;
}

static void add_term(ps__lincomb_args *args, int kind, int room, const ps_term *term)
{
  int j = args->terms++;
  args->in[j] = term->data;
  args->dtype[j] = (unsigned char)term->dtype;
  args->vector = args->vector && suits(term->data, term->dtype, kind);
  for (int k = 0; k < room; ++k) {
    if (kind == PS__DOUBLES) {
      args->weight.twice[j * room + k] = 0;
    } else {
      args->weight.single[j * room + k] = 0;
    }
  }
}

static void set_weight(ps__lincomb_args *args, int kind, int room, int k, double weight)
{
  int j = args->terms - 1;
  if (kind == PS__DOUBLES) {
    args->weight.twice[j * room + k] = weight;
  } else {
    args->weight.single[j * room + k] = (float)weight;
  }
}

static bool is_used(const combination *c, int j, int first, int outs)
{
  bool used = false;
  for (int k = first; k < first + outs; ++k) {
    used = used || c->weight[(size_t)k * (size_t)c->terms + (size_t)j] != 0;
  }
  return used;
}

/* Inputs from *next on, as many as one launch takes; later launches go on from what the outputs
 * hold so far, rounded to their dtype. */
static void fill_terms(const combination *c, ps__lincomb_args *args, int first, int room, int *next)
{
  for (int k = 0; *next > 0 && k < args->outs; ++k) {
    ps_term so_far = {args->out[k], c->out_dtype};
    add_term(args, c->kind, room, &so_far);
    set_weight(args, c->kind, room, k, 1);
  }
  for (; *next < c->terms && args->terms < PS__TERMS_MAX; ++*next) {
    if (is_used(c, *next, first, args->outs)) {
      add_term(args, c->kind, room, &c->in[*next]);
      for (int k = 0; k < args->outs; ++k) {
        size_t row = (size_t)(first + k) * (size_t)c->terms;
        set_weight(args, c->kind, room, k, c->weight[row + (size_t)*next]);
      }
    }
  }
}

/* Outputs first to first + outs, one launch if their inputs fit in it. */
static ps_status combine_some(ps__cuda_rank *rank, const combination *c, void *const *out,
                              int first, int outs)
{
  int room = room_of(c->kind, outs), next = 0;
  ps_status status = PS_OK;
  do {
    ps__lincomb_args args;
    args.n = c->n;
    args.outs = outs;
    args.terms = 0;
    args.vector = 1;
    args.out_dtype = (int)c->out_dtype;
    for (int k = 0; k < outs; ++k) {
      args.out[k] = out[first + k];
      args.vector = args.vector && suits(out[first + k], c->out_dtype, c->kind);
    }
    fill_terms(c, &args, first, room, &next);
    status = launch(rank, kernel_for(c->kind, outs), blocks_for(rank, c->n, c->kind), 1, &args);
  } while (status == PS_OK && next < c->terms);
  return status;
}

static ps_status combine_all(ps__cuda_rank *rank, const combination *c, int outs, void *const *out)
{
  ps_status status = PS_OK;
  for (int k = 0; k < outs && status == PS_OK; k += most_outs(c->kind)) {
    int left = outs - k < most_outs(c->kind) ? outs - k : most_outs(c->kind);
    status = combine_some(rank, c, out, k, left);
  }
  return status;
}

/* An output that is an input of a later launch is written once all have read. */
static ps_status combine_aside(ps__cuda_rank *rank, const combination *c, int outs,
                               void *const *out)
{
  size_t bytes = c->n * ps_dtype_size(c->out_dtype), apart = (bytes + 63) / 64 * 64;
  void *aside[PS__OUTS_IN_PLACE] = {NULL};
  for (int k = 0; k < outs; ++k) {
    aside[k] = (void *)(uintptr_t)(rank->scratch + (size_t)k * apart);
  }
  ps_status status = combine_all(rank, c, outs, aside);
  for (int k = 0; k < outs && status == PS_OK; ++k) {
    status = ps__cuda_copy(rank, ps__address(out[k]), ps__address(aside[k]), bytes);
  }
  return status;
}

static ps_status run_lincomb(ps__cuda_rank *rank, const combination *c, int outs, void *const *out,
                             bool aside)
{
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  status = aside ? combine_aside(rank, c, outs, out) : combine_all(rank, c, outs, out);
  ps_status marked = ps__cuda_mark(rank);
  ps__device_leave(&scope);
  return status == PS_OK ? marked : status;
}

ps_status ps__kernel_lincomb(ps__cuda_rank *rank, size_t n, int outs, int terms,
                             const double *weight, const ps_term *in, void *const *out,
                             ps_dtype out_dtype, bool in_place)
{
  combination c = {n, terms, weight, in, out_dtype, kind_of(out_dtype)};
  ps_status status = PS_OK;
  for (int j = 0; j < terms; ++j) {
    c.kind = in[j].data ? wider(c.kind, kind_of(in[j].dtype)) : c.kind;
  }
  bool aside = in_place && (outs > most_outs(c.kind) || terms > PS__TERMS_MAX);
  if (aside) {
    size_t apart = (n * ps_dtype_size(out_dtype) + 63) / 64 * 64;
    status = ps__cuda_scratch(rank, (size_t)outs * apart);
  }
  return status == PS_OK ? run_lincomb(rank, &c, outs, out, aside) : status;
}

/* ---- sweep ----------------------------------------------------------------------------------- */

static int sweep_kernel(int kind)
{
  return kind == PS__DOUBLES   ? PS__K_ps_sweep_doubles
         : kind == PS__SINGLES ? PS__K_ps_sweep_singles
                               : PS__K_ps_sweep_halves;
}

static int sweep_kind(const ps_sweep *s)
{
  int kind = s->x ? kind_of(s->x_dtype) : PS__HALVES;
  return s->m ? wider(kind, kind_of(s->m_dtype)) : kind;
}

static void *moved(const void *data, size_t elements, ps_dtype dtype)
{
  return data != NULL ? (char *)data + elements * ps_dtype_size(dtype) : NULL;
}

/* Items first to first + count. */
static ps__sweep_args args_of(const ps__cuda_rank *rank, const ps_sweep *s, size_t first,
                              size_t count, int kind)
{
  size_t at = first * s->size;
  bool whole = s->items == 1 || s->size % width_of(kind) == 0;
  bool xs = suits(s->x, s->x_dtype, kind) && suits(s->guess, s->x_dtype, kind) &&
            suits(s->keep_x, s->x_dtype, kind);
  bool ms = suits(s->m, s->m_dtype, kind) && suits(s->out, s->m_dtype, kind) &&
            suits(s->keep_m, s->m_dtype, kind);
  return (ps__sweep_args){
      .items = count,
      .size = s->size,
      .x = moved(s->x, at, s->x_dtype),
      .guess = moved(s->guess, at, s->x_dtype),
      .m = moved(s->m, at, s->m_dtype),
      .out = moved(s->out, at, s->m_dtype),
      .keep_x = moved(s->keep_x, at, s->x_dtype),
      .keep_m = moved(s->keep_m, at, s->m_dtype),
      .x_dtype = (int)s->x_dtype,
      .m_dtype = (int)s->m_dtype,
      .vector = whole && (!s->x || xs) && (!s->m || ms),
      .rebase = s->guess && s->slope != 0,
      .slope = s->slope,
      .floor_squared = s->floor * s->floor,
      .part = rank->part,
      .ticket = (unsigned *)(rank->part + PS__PARTS_MAX),
      .result = rank->result,
  };
}

static ps_status run_sweep(ps__cuda_rank *rank, const ps_sweep *s, size_t first, size_t count)
{
  int kind = sweep_kind(s);
  ps__sweep_args args = args_of(rank, s, first, count, kind);
  size_t all = blocks_for(rank, s->size * count, kind);
  size_t parts = smaller(blocks_for(rank, s->size, kind), smaller(all, PS__PARTS_MAX) / count);
  size_t rows = smaller(count, all);
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  status = launch(rank, sweep_kernel(kind), parts > 0 ? (unsigned)parts : 1, (unsigned)rows, &args);
  ps_status marked = ps__cuda_mark(rank);
  ps__device_leave(&scope);
  return status == PS_OK ? marked : status;
}

/* As cpu.c puts items together. */
static void add_result(ps_swept *swept, const ps__sweep_result *result, bool first)
{
  if (first || isnan(result->distance) || result->distance > swept->distance) {
    swept->distance = result->distance;
    swept->reference = result->reference;
  }
  if (isnan(result->excess) || result->excess > swept->excess) {
    swept->excess = result->excess;
  }
  swept->not_finite += result->not_finite;
}

ps_status ps__kernel_sweep(ps__cuda_rank *rank, const ps_sweep *s, const ps_wait *wait,
                           ps_swept *swept)
{
  ps_status status = PS_OK;
  for (size_t item = 0; item < s->items && status == PS_OK; item += PS__PARTS_MAX) {
    status = run_sweep(rank, s, item, smaller(s->items - item, PS__PARTS_MAX));
    if (status == PS_OK) {
      status = ps__device_wait(rank->device, rank->done, wait);
    }
    if (status == PS_OK) {
      add_result(swept, rank->result, item == 0);
    }
  }
  return status;
}
