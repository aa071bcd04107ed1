/* cpu.c - the CPU backend: linear combinations and sweeps, blockwise, each in one pass over memory.
 *
 * It is the specification that other backends are held to.  The core calls it through the
 * ps_backend that registry.c hands out.  Every input element is read and converted to the
 * accumulator's type once.  The accumulator is double where an operand is PS_F64, else float.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "backend/check.h"
#include "backend/half.h"
#include "core/base.h"
#include "parastep_backend.h"

_Static_assert(FLT_EVAL_METHOD == 0, "every float operation must round to float");

enum {
  TILE_BYTES = 256,                 /* of an output, held in registers by lincomb */
  TERMS_AT_ONCE = 64,               /* inputs converted before they are combined */
  OUTS_AT_ONCE = PS__OUTS_IN_PLACE, /* outputs combined in one pass over memory */
  BLOCK = 256,                      /* elements that a sweep handles at a time; a power of 2 */
};

typedef union tile {
  _Alignas(64) float f32[TILE_BYTES / sizeof(float)];
  double f64[TILE_BYTES / sizeof(double)];
} tile;

typedef union block {
  _Alignas(64) float f32[BLOCK];
  double f64[BLOCK];
} block;

/* What a sweep finds out about an item. */
typedef struct item_sums {
  double distance, reference; /* of (x - guess)^2 and of x^2 */
  size_t not_finite;
} item_sums;

/* What block.h defines, once for each accumulator type and instruction set. */
typedef struct arithmetic {
  ps_dtype dtype;
  size_t size;  /* bytes of an element */
  size_t width; /* elements of a tile */
  void (*combine)(void *to, const void *from, size_t terms, const double *weight,
                  const void *const *v);
  const void *(*load)(void *scratch, const void *from, ps_dtype dtype, size_t n);
  void (*store)(void *to, ps_dtype dtype, const void *from, size_t n);
  void (*shift)(void *to, const void *a, const void *b, double w, size_t n);
  double (*sum_squares)(const void *v, size_t n);
  size_t (*count_not_finite)(const void *v, size_t n);
  void (*sweep)(const ps_sweep *s, size_t at, item_sums *sums);
} arithmetic;

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define REAL       float
#define REAL_DTYPE PS_F32
#define TARGET
#define VECTOR_BYTES 16
#define NAME(verb)   verb##_float
#include "backend/block.h"

#define REAL       double
#define REAL_DTYPE PS_F64
#define TARGET
#define VECTOR_BYTES 16
#define NAME(verb)   verb##_double
#include "backend/block.h"

#if defined(__x86_64__)
#define REAL         float
#define REAL_DTYPE   PS_F32
#define TARGET       __attribute__((target("avx2")))
#define VECTOR_BYTES 32
#define NAME(verb)   verb##_float_avx2
#include "backend/block.h"

#define REAL         double
#define REAL_DTYPE   PS_F64
#define TARGET       __attribute__((target("avx2")))
#define VECTOR_BYTES 32
#define NAME(verb)   verb##_double_avx2
#include "backend/block.h"

#define REAL         float
#define REAL_DTYPE   PS_F32
#define TARGET       __attribute__((target("avx512f")))
#define VECTOR_BYTES 64
#define NAME(verb)   verb##_float_avx512
#include "backend/block.h"

#define REAL         double
#define REAL_DTYPE   PS_F64
#define TARGET       __attribute__((target("avx512f")))
#define VECTOR_BYTES 64
#define NAME(verb)   verb##_double_avx512
#include "backend/block.h"
#endif

/* Tests put something in its place, to compare the bits of all instruction sets. */
#ifndef PS__CPU_SUPPORTS
#define PS__CPU_SUPPORTS(feature) __builtin_cpu_supports(feature)
#endif

static const arithmetic *find_arithmetic(bool wide)
{
#if defined(__x86_64__)
  if (PS__CPU_SUPPORTS("avx512f")) {
    return wide ? &arithmetic_double_avx512 : &arithmetic_float_avx512;
  }
  if (PS__CPU_SUPPORTS("avx2")) {
    return wide ? &arithmetic_double_avx2 : &arithmetic_float_avx2;
  }
#endif
  return wide ? &arithmetic_double : &arithmetic_float;
}

static size_t smaller(size_t a, size_t b)
{
  return a < b ? a : b;
}

/* ---- lincomb --------------------------------------------------------------------------------- */

typedef struct combination {
  size_t outs, terms;
  const double *weight; /* (outs, terms) */
  const ps_term *in;    /* (terms) */
  void *const *out;     /* (outs) */
  ps_dtype out_dtype;
  const arithmetic *real;
  bool direct; /* sums are formed in the outputs themselves: stored alike, and none is an input */
} combination;

/* Asks for what will be read next; past the end of memory that does nothing.  No nearer than the
 * second cache: the first one's few outstanding loads are for what is read now.  By itself,
 * hardware keeps up with about ten inputs. */
static void prefetch(uintptr_t address)
{
  for (size_t i = 0; i < TILE_BYTES; i += 64) {
    __builtin_prefetch((const void *)(address + i), 0, 1);
  }
}

/* Elements at to at + n of a term, as a whole tile.  One without data has only weights of 0. */
static const void *load_term(const combination *c, const ps_term *term, size_t at, size_t n,
                             tile *scratch)
{
  const arithmetic *real = c->real;
  const char *data = term->data;
  if (data && term->dtype == real->dtype && n == real->width) {
    prefetch((uintptr_t)data + (at + n) * real->size);
    return data + at * real->size;
  }
  if (!data) {
    return NULL;
  }
  data += at * ps_dtype_size(term->dtype);
  prefetch((uintptr_t)data + n * ps_dtype_size(term->dtype));
  if (n < real->width) {
    memset(scratch, 0, sizeof(*scratch));
  }
  const void *loaded = real->load(scratch, data, term->dtype, n);
  if (loaded != scratch) {
    memcpy(scratch, loaded, n * real->size);
  }
  return scratch;
}

/* Elements at to at + n of all outputs, a tile at most.  Only after the last term of the last
 * output may an output be written that is an input too. */
static void combine_tile(const combination *c, size_t at, size_t n)
{
  tile terms[TERMS_AT_ONCE], sums[OUTS_AT_ONCE];
  const void *v[TERMS_AT_ONCE];
  size_t offset = at * ps_dtype_size(c->out_dtype);
  bool direct = c->direct && n == c->real->width;

  for (size_t j = 0; j < c->terms; j += TERMS_AT_ONCE) {
    size_t count = smaller(TERMS_AT_ONCE, c->terms - j);
    for (size_t t = 0; t < count; t++) {
      v[t] = load_term(c, &c->in[j + t], at, n, &terms[t]);
    }
    for (size_t k = 0; k < c->outs; k++) {
      if (direct) {
        prefetch((uintptr_t)c->out[k] + offset + n * c->real->size);
      }
      void *to = direct ? (char *)c->out[k] + offset : (void *)&sums[k];
      c->real->combine(to, j > 0 ? to : NULL, count, c->weight + k * c->terms + j, v);
    }
  }
  for (size_t k = 0; k < c->outs && !direct; k++) {
    c->real->store((char *)c->out[k] + offset, c->out_dtype, &sums[k], n);
  }
}

static ps_status lincomb(const ps_backend *backend, size_t n, int outs, int terms,
                         const double *weight, const ps_term *in, void *const *out,
                         ps_dtype out_dtype)
{
  (void)backend;
  bool in_place;
  ps_status status = ps__check_lincomb(n, outs, terms, weight, in, out, out_dtype, &in_place);
  if (status != PS_OK) {
    return status;
  }
  combination all = {(size_t)outs, (size_t)terms, weight, in, out, out_dtype, NULL, false};
  bool wide = out_dtype == PS_F64;
  for (int j = 0; j < terms; j++) {
    wide = wide || (in[j].data && in[j].dtype == PS_F64);
  }
  all.real = find_arithmetic(wide);
  all.direct = !in_place && all.real->dtype == out_dtype;
  for (size_t k = 0; k < (size_t)outs; k += OUTS_AT_ONCE) {
    combination some = all;
    some.outs = smaller(OUTS_AT_ONCE, all.outs - k);
    some.weight += k * all.terms;
    some.out += k;
    for (size_t at = 0; at < n; at += all.real->width) {
      combine_tile(&some, at, smaller(all.real->width, n - at));
    }
  }
  return PS_OK;
}

/* ---- sweep ----------------------------------------------------------------------------------- */

static void *element(const void *data, size_t at, ps_dtype dtype)
{
  return (char *)data + at * ps_dtype_size(dtype);
}

static void copy_elements(void *to, size_t at, const void *from, ps_dtype dtype, size_t n)
{
  if (to && to != from) {
    memcpy(element(to, at, dtype), element(from, at, dtype), n * ps_dtype_size(dtype));
  }
}

/* moved = x - guess; a factor of -1 is exact. */
static void measure_block(const ps_sweep *s, const arithmetic *real, size_t at, size_t n,
                          block *moved, item_sums *sums)
{
  block x_scratch, guess_scratch;
  const void *x = real->load(&x_scratch, element(s->x, at, s->x_dtype), s->x_dtype, n);
  const void *guess = real->load(&guess_scratch, element(s->guess, at, s->x_dtype), s->x_dtype, n);
  real->shift(moved, x, guess, -1, n);
  sums->distance += real->sum_squares(moved, n);
  sums->reference += real->sum_squares(x, n);
}

/* The answer m + slope moved; moved is NULL where it is m itself. */
static void answer_block(const ps_sweep *s, const arithmetic *real, size_t at, size_t n,
                         const block *moved, item_sums *sums)
{
  block m_scratch, answer;
  const void *m = real->load(&m_scratch, element(s->m, at, s->m_dtype), s->m_dtype, n);
  sums->not_finite += real->count_not_finite(m, n);
  if (!moved) {
    copy_elements(s->out, at, s->m, s->m_dtype, n);
    copy_elements(s->keep_m, at, s->m, s->m_dtype, n);
    return;
  }
  real->shift(&answer, m, moved, s->slope, n);
  if (s->out) {
    real->store(element(s->out, at, s->m_dtype), s->m_dtype, &answer, n);
  }
  if (s->keep_m) {
    real->store(element(s->keep_m, at, s->m_dtype), s->m_dtype, &answer, n);
  }
}

/* Whether there is something to do for every operand, and all of them are of the accumulator's
 * type: the usual answer of a run. */
static bool is_whole(const ps_sweep *s, const arithmetic *real)
{
  return s->guess && s->m && s->slope != 0 && s->out && s->keep_x && s->keep_m &&
         s->x_dtype == real->dtype && s->m_dtype == real->dtype;
}

/* Elements from at on of one item; outputs are written after the inputs they may be were read. */
static item_sums sweep_item(const ps_sweep *s, size_t item)
{
  bool wide = (s->guess && s->x_dtype == PS_F64) || (s->m && s->m_dtype == PS_F64);
  const arithmetic *real = find_arithmetic(wide);
  item_sums sums = {0, 0, 0};
  block moved;
  bool whole = is_whole(s, real);
  for (size_t i = 0; i < s->size; i += BLOCK) {
    size_t at = item * s->size + i, n = smaller(BLOCK, s->size - i);
    if (whole && n == BLOCK) {
      real->sweep(s, at, &sums);
      continue;
    }
    if (s->guess) {
      measure_block(s, real, at, n, &moved, &sums);
    }
    copy_elements(s->keep_x, at, s->x, s->x_dtype, n);
    if (s->m) {
      const block *shift = s->guess && s->slope != 0 ? &moved : NULL;
      answer_block(s, real, at, n, shift, &sums);
    }
  }
  return sums;
}

/* A NaN, once there, stays: nothing is larger. */
static ps_status sweep(const ps_backend *backend, const ps_sweep *s, const ps_wait *wait,
                       ps_swept *swept)
{
  (void)backend;
  (void)wait;
  ps_status status = ps__check_sweep(s);
  *swept = (ps_swept){0, 0, 0, 0};
  for (size_t item = 0; item < s->items && status == PS_OK; item++) {
    item_sums sums = sweep_item(s, item);
    double distance = sums.distance / (double)s->size;
    double reference = sums.reference / (double)s->size;
    double excess = distance - s->floor * s->floor * reference;
    if (item == 0 || isnan(distance) || distance > swept->distance) {
      swept->distance = distance;
      swept->reference = reference;
    }
    if (isnan(excess) || excess > swept->excess) {
      swept->excess = excess;
    }
    swept->not_finite += sums.not_finite;
  }
  return status;
}

/* ---- copies and memory ----------------------------------------------------------------------- */

static ps_status copy(const ps_backend *backend, void *to, const void *from, size_t bytes)
{
  (void)backend;
  ps_status status = ps__check_copy(to, from, bytes);
  if (status == PS_OK && bytes > 0) {
    memmove(to, from, bytes);
  }
  return status;
}

static ps_status settle(const ps_backend *backend, const ps_wait *wait)
{
  (void)backend;
  (void)wait;
  return PS_OK; /* every call returns with its work done */
}

static void keep(const ps_backend *backend)
{
  (void)backend;
}

static void *alloc(const ps_backend *backend, size_t bytes)
{
  (void)backend;
  return ps__alloc(bytes);
}

static void release(const ps_backend *backend, void *p)
{
  (void)backend;
  ps__free(p);
}

/* ---- mirrors: one block, as all ranks reach it ----------------------------------------------- */

typedef struct shared_block {
  ps_mirror base;
  int sides; /* that have not let go; changed atomically */
} shared_block;

static ps_status mirror_send(ps_mirror *mirror, ps_side from, size_t offset, size_t bytes)
{
  (void)mirror;
  (void)from;
  (void)offset;
  (void)bytes;
  return PS_OK;
}

static ps_status mirror_receive(ps_mirror *mirror, ps_side to)
{
  (void)mirror;
  (void)to;
  return PS_OK;
}

static ps_status mirror_settle(ps_mirror *mirror, ps_side from, const ps_wait *wait)
{
  (void)mirror;
  (void)from;
  (void)wait;
  return PS_OK;
}

static void mirror_close(ps_mirror *mirror, ps_side side)
{
  (void)side;
  if (__atomic_sub_fetch(&((shared_block *)mirror)->sides, 1, __ATOMIC_ACQ_REL) == 0) {
    ps__free(mirror);
  }
}

static ps_status open_mirror(const ps_backend *near, const ps_backend *far, size_t bytes,
                             ps_mirror **mirror)
{
  static const ps_mirror_ops ops = {mirror_send, mirror_receive, mirror_settle, mirror_close};
  ps__arena arena = {0};
  *mirror = NULL;
  if (far != near) {
    return ps__fail(PS_DEVICE, "a rank on the CPU and one on %s: all must be of one kind",
                    far->name);
  }
  ps__carve(&arena, 1, sizeof(shared_block));
  ps__carve(&arena, 1, bytes);
  arena.base = ps__alloc(arena.used);
  arena.used = 0;
  if (arena.base == NULL) {
    return PS_NO_MEMORY;
  }
  shared_block *block = ps__carve(&arena, 1, sizeof *block);
  unsigned char *memory = ps__carve(&arena, 1, bytes);
  *block = (shared_block){.base = {.ops = &ops, .memory = {memory, memory}}, .sides = 2};
  *mirror = &block->base;
  return PS_OK;
}

const ps_backend ps__cpu = {
    .name = "cpu",
    .retain = keep,
    .release = keep,
    .alloc = alloc,
    .free = release,
    .mirror = open_mirror,
    .lincomb = lincomb,
    .sweep = sweep,
    .copy = copy,
    .settle = settle,
};
