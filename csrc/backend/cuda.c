/* cuda.c - the backend of a rank on a CUDA device: every pass is one launch on the host's stream.
 *
 * The core calls it through ps_backend, the binding opens it and says which stream is the host's.
 * Work is in order of that stream; an event behind the newest work orders a change of stream, the
 * mirrors' own streams and the freeing of memory behind it.  No call waits for the device but sweep
 * and settle, and none takes memory but the one that is named so.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "backend/check.h"
#include "backend/cuda.h"

_Static_assert(sizeof(ps__lincomb_args) <= 4096 && sizeof(ps__sweep_args) <= 4096,
               "arguments of a kernel have 4096 bytes");

static size_t smaller(size_t a, size_t b)
{
  return a < b ? a : b;
}

ps_status ps__cuda_mark(ps__cuda_rank *rank)
{
  return ps__cuda_check(rank->device, ps__cuda.event_record(rank->done, rank->stream),
                        "an event behind its work");
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

static ps_status copy_inside(ps__cuda_rank *rank, void *to, const void *from, size_t bytes)
{
  return ps__cuda_check(rank->device,
                        ps__cuda.copy(ps__address(to), ps__address(from), bytes, rank->stream),
                        "copying");
}

/* An output that is an input of a later launch is written once all have read. */
static ps_status combine_aside(ps__cuda_rank *rank, const combination *c, int outs,
                               void *const *out)
{
  size_t bytes = c->n * ps_dtype_size(c->out_dtype), apart = (bytes + 63) / 64 * 64;
  void *aside[PS__OUTS_IN_PLACE];
  for (int k = 0; k < outs; ++k) {
    aside[k] = (void *)(uintptr_t)(rank->scratch + (size_t)k * apart);
  }
  ps_status status = combine_all(rank, c, outs, aside);
  for (int k = 0; k < outs && status == PS_OK; ++k) {
    status = copy_inside(rank, out[k], aside[k], bytes);
  }
  return status;
}

ps_status ps__cuda_scratch(ps__cuda_rank *rank, size_t bytes)
{
  ps_status status = PS_OK;
  if (rank->scratch_bytes < bytes) {
    ps__device_free_after(rank->device, rank->done);
    ps__device_free(rank->device, rank->scratch);
    rank->scratch_bytes = 0;
    status = ps__device_alloc(rank->device, bytes, &rank->scratch);
    rank->scratch_bytes = status == PS_OK ? bytes : 0;
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

static ps_status lincomb(const ps_backend *backend, size_t n, int outs, int terms,
                         const double *weight, const ps_term *in, void *const *out,
                         ps_dtype out_dtype)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  bool in_place;
  ps_status status = ps__check_lincomb(n, outs, terms, weight, in, out, out_dtype, &in_place);
  if (status != PS_OK) {
    return status;
  }
  if (!rank->device->compiled) {
    return (rank->blas != NULL ? ps__blas_lincomb : ps__plain_lincomb)(rank, n, outs, terms, weight,
                                                                       in, out, out_dtype);
  }
  combination c = {n, terms, weight, in, out_dtype, kind_of(out_dtype)};
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

static ps_status sweep(const ps_backend *backend, const ps_sweep *s, const ps_wait *wait,
                       ps_swept *swept)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  ps_status status = ps__check_sweep(s);
  *swept = (ps_swept){0, 0, 0, 0};
  if (status == PS_OK && !rank->device->compiled) {
    return (rank->blas != NULL ? ps__blas_sweep : ps__plain_sweep)(rank, s, wait, swept);
  }
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

/* ---- copies, waits, memory ------------------------------------------------------------------- */

static ps_status copy(const ps_backend *backend, void *to, const void *from, size_t bytes)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  ps__scope scope;
  ps_status status = ps__check_copy(to, from, bytes);
  if (status != PS_OK || bytes == 0 || to == from) {
    return status;
  }
  status = ps__device_enter(rank->device, &scope);
  if (status == PS_OK) {
    status = copy_inside(rank, to, from, bytes);
    status = status == PS_OK ? ps__cuda_mark(rank) : status;
    ps__device_leave(&scope);
  }
  return status;
}

static ps_status settle(const ps_backend *backend, const ps_wait *wait)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  return ps__device_wait(rank->device, rank->done, wait);
}

static void *alloc(const ps_backend *backend, size_t bytes)
{
  CUdeviceptr p;
  return ps__device_alloc(ps__cuda_rank_of(backend)->device, bytes, &p) == PS_OK
             ? (void *)(uintptr_t)p
             : NULL;
}

static void release_memory(const ps_backend *backend, void *p)
{
  const ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  ps__device_free_after(rank->device, rank->done);
  ps__device_free(rank->device, ps__address(p));
}

/* ---- life ------------------------------------------------------------------------------------ */

static void retain(const ps_backend *backend)
{
  __atomic_add_fetch(&ps__cuda_rank_of(backend)->references, 1, __ATOMIC_RELAXED);
}

static ps__cuda_rank *dead_rank(const ps__mortal *mortal)
{
  return (ps__cuda_rank *)((char *)mortal - offsetof(ps__cuda_rank, mortal));
}

static bool has_ended(const ps__mortal *mortal)
{
  const ps__cuda_rank *rank = dead_rank(mortal);
  return ps__event_reached(rank->device, rank->done);
}

/* The event is given back last: what is freed here waits for it. */
static void destroy(ps__mortal *mortal)
{
  ps__cuda_rank *rank = dead_rank(mortal);
  if (rank->done != NULL) {
    ps__device_free_after(rank->device, rank->done);
  }
  ps__device_free(rank->device, ps__address(rank->part));
  ps__device_free(rank->device, rank->scratch);
  ps__blas_free(rank->device, rank->blas);
  ps__pinned_free(rank->device, rank->result);
  ps__pinned_free(rank->device, rank->staged);
  ps__event_free(rank->device, rank->done);
  ps__free(rank);
}

static void release(const ps_backend *backend)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  if (__atomic_sub_fetch(&rank->references, 1, __ATOMIC_ACQ_REL) == 0) {
    ps__bury(&rank->mortal); /* an interrupted sweep may be about to write its result */
  }
}

static const ps_backend cuda_backend = {
    .name = "cuda",
    .retain = retain,
    .release = release,
    .alloc = alloc,
    .free = release_memory,
    .mirror = ps__cuda_mirror,
    .lincomb = lincomb,
    .sweep = sweep,
    .copy = copy,
    .settle = settle,
};

static ps_status furnish(ps__cuda_rank *rank)
{
  CUdeviceptr part = 0;
  void *result = NULL;
  ps_status status = ps__event_new(rank->device, &rank->done);
  if (status == PS_OK) {
    status = ps__device_alloc(rank->device, (PS__PARTS_MAX + 1) * sizeof(ps__part), &part);
    rank->part = (ps__part *)(uintptr_t)part;
  }
  if (status == PS_OK) {
    status = ps__pinned_alloc(rank->device, sizeof(ps__sweep_result), &result);
    rank->result = result;
  }
  if (status == PS_OK && !rank->device->compiled) {
    rank->blas = ps__blas_new(rank->device);
  }
  return status;
}

ps_status ps_cuda_open(int ordinal, const ps_backend **backend)
{
  ps__device *device;
  ps__cuda_rank *rank = NULL;
  ps_status status = ps__device_open(ordinal, &device);
  *backend = NULL;
  if (status == PS_OK) {
    ps__bury(NULL);
    rank = ps__alloc(sizeof *rank);
    status = rank != NULL ? PS_OK : PS_NO_MEMORY;
  }
  if (status != PS_OK) {
    return status;
  }
  rank->base = cuda_backend;
  rank->base.device = ordinal;
  rank->mortal = (ps__mortal){.has_ended = has_ended, .destroy = destroy};
  rank->references = 1;
  rank->device = device;
  rank->stream = PS__CUDA_DEFAULT_STREAM;
  status = furnish(rank);
  if (status != PS_OK) {
    destroy(&rank->mortal);
    return status;
  }
  *backend = &rank->base;
  return PS_OK;
}

/* A capture would record our events and waits into the host's graph, or fail for them. */
static ps_status check_capture(const ps__cuda_rank *rank, CUstream stream)
{
  CUstreamCaptureStatus capturing = 0;
  ps_status status = ps__cuda_check(rank->device, ps__cuda.stream_is_capturing(stream, &capturing),
                                    "looking at the host's stream");
  if (status == PS_OK && capturing != 0) {
    status = ps__fail(PS_STATE,
                      "cuda:%d: a CUDA graph is being captured on the current stream; "
                      "capture the model's forward alone",
                      rank->device->ordinal);
  }
  return status;
}

ps_status ps_cuda_use_stream(const ps_backend *backend, void *stream)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  CUstream given = stream != NULL ? stream : PS__CUDA_DEFAULT_STREAM;
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  status = check_capture(rank, given);
  if (status == PS_OK && given != rank->stream) {
    status = ps__cuda_check(rank->device, ps__cuda.stream_wait(given, rank->done, 0),
                            "changing to another stream");
    rank->stream = status == PS_OK ? given : rank->stream;
  }
  ps__device_leave(&scope);
  return status;
}

void ps_cuda_give_back(const ps_backend *backend, void *p, void *stream)
{
  const ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  CUevent event = NULL;
  ps__scope scope;
  if (ps__event_new(rank->device, &event) == PS_OK &&
      ps__device_enter(rank->device, &scope) == PS_OK) {
    ps__cuda.event_record(event, stream != NULL ? stream : PS__CUDA_DEFAULT_STREAM);
    ps__device_leave(&scope);
  }
  ps__device_free_after(rank->device, event);
  release_memory(backend, p);
  ps__event_free(rank->device, event);
}

/* ---- what there is --------------------------------------------------------------------------- */

ps_status ps_cuda_count(int *count)
{
  return ps__device_count(count);
}

/* How passes are made: on the devices that are open, or as this build is made. */
static void describe_passes(char *text, size_t room)
{
  int version = ps__blas_version();
  const char *kernels = ps__kernel_image() == NULL   ? "built without kernels: "
                        : ps__device_lacks_kernels() ? "no kernels of this build fit: "
                                                     : "kernels of this build";
  if (ps__kernel_image() != NULL && !ps__device_lacks_kernels()) {
    snprintf(text, room, "%s", kernels);
  } else if (version > 0) {
    snprintf(text, room, "%scuBLAS %d.%d", kernels, version / 100, version % 100);
  } else {
    snprintf(text, room, "%spasses go through the host, as there is no cuBLAS", kernels);
  }
}

void ps_cuda_describe(char *text, size_t room)
{
  int count;
  char passes[128];
  if (ps__device_count(&count) != PS_OK) {
    snprintf(text, room, "not found: %s", ps_last_error());
  } else if (count == 0) {
    snprintf(text, room, "a driver, but no device");
  } else {
    describe_passes(passes, sizeof passes);
    snprintf(text, room, "%d device%s, %s", count, count == 1 ? "" : "s", passes);
  }
}
