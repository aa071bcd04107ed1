/* cpu.c - the CPU backend: linear combinations and sweeps, blockwise, each in one pass over memory.
 *
 * It is the specification that other backends are held to.  The core calls it through the ps_backend
 * that registry.c hands out.  Every input element is converted to the accumulator type once, combined
 * in registers and rounded once to the type of the output.  The accumulator is double where the
 * output is PS_F64, else float; a sweep measures in double where x is PS_F64, else in float.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>


#include "backend/half.h"
#include "core/internal.h"

_Static_assert(FLT_EVAL_METHOD == 0, "float expressions must be rounded to float");

enum {
  LANES = 8,         /* vectors of one output that a lincomb holds in registers */
  TILE_BYTES = 4096,
  TERMS = 32,        /* inputs converted before they are combined */
  OUTS = 32,         /* outputs combined in one pass over memory */
  BLOCK = 256,       /* elements of one block of a sweep; a power of 2 */
};

/* to[k] = from[k] + sum_j weight[k * stride + j] v[j] */
typedef struct tile {
  size_t outs, terms, stride;
  const double *weight;
  const void *v[TERMS], *from[OUTS];
  void *to[OUTS];
} tile;

/* What block.h defines, once for each accumulator type and instruction set. */
typedef struct arithmetic {
  ps_dtype dtype;
  size_t size;  /* bytes of an element */
  void (*combine)(const tile *c, size_t n);
  const void *(*load)(void *scratch, const void *from, ps_dtype dtype, size_t n);
  void (*store)(void *to, ps_dtype dtype, const void *from, size_t n);
  void (*shift)(void *to, const void *a, const void *b, double w, size_t n);
  double (*sum_squares)(const void *v, size_t n);
  size_t (*count_not_finite)(const void *v, size_t n);
} arithmetic;

/* EACH: no element depends on another one's result. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define EACH(n) _Pragma("clang loop vectorize(assume_safety)") for (size_t i = 0; i < (n); i++)
#else
#define UNROLL _Pragma("GCC unroll 8")
#define EACH(n) _Pragma("GCC ivdep") for (size_t i = 0; i < (n); i++)
#endif

#define REAL float
#define REAL_DTYPE PS_F32
#define TARGET
#define VECTOR_BYTES 16
#define NAME(verb) verb##_float
#include "backend/block.h"

#define REAL double
#define REAL_DTYPE PS_F64
#define TARGET
#define VECTOR_BYTES 16
#define NAME(verb) verb##_double
#include "backend/block.h"

/* PS__PLAIN leaves these out, for the test that compares their bits with the others'. */
#if defined(__x86_64__) && !defined(PS__PLAIN)
#define REAL float
#define REAL_DTYPE PS_F32
#define TARGET __attribute__((target("avx2")))
#define VECTOR_BYTES 32
#define NAME(verb) verb##_float_avx2
#include "backend/block.h"

#define REAL double
#define REAL_DTYPE PS_F64
#define TARGET __attribute__((target("avx2")))
#define VECTOR_BYTES 32
#define NAME(verb) verb##_double_avx2
#include "backend/block.h"
#endif

static const arithmetic *arithmetic_for(ps_dtype dtype)
{
#if defined(__x86_64__) && !defined(PS__PLAIN)
  if (__builtin_cpu_supports("avx2"))
    return dtype == PS_F64 ? &arithmetic_double_avx2 : &arithmetic_float_avx2;
#endif
  return dtype == PS_F64 ? &arithmetic_double : &arithmetic_float;
}

static size_t smaller(size_t a, size_t b)
{
  return a < b ? a : b;
}

static ps_status check_dtype(ps_dtype dtype, const char *what)
{
  if (ps_dtype_size(dtype) == 0)
    return ps__fail(PS_DTYPE, "%s has the unknown dtype %d", what, (int)dtype);
  return PS_OK;
}

/* ---- lincomb --------------------------------------------------------------------------------- */

typedef struct combination {
  size_t outs, terms;
  const double *weight; /* (outs, terms) */
  const ps_term *in;    /* (terms) */
  void *const *out;     /* (outs) */
  ps_dtype out_dtype;
  int direct; /* the accumulators may be written straight to the outputs */
} combination;

static const _Alignas(64) unsigned char zeros[TILE_BYTES];

/* Elements at to at + n of a term, as a block of full width. */
static const void *load_term(const arithmetic *real, const ps_term *term, size_t at, size_t n,
                             void *scratch)
{
  if (!term->data) /* Its weights are 0. */
    return zeros;
  const char *from = (const char *)term->data + at * ps_dtype_size(term->dtype);
  if (n * real->size == TILE_BYTES)
    return real->load(scratch, from, term->dtype, n);
  memset(scratch, 0, TILE_BYTES);
  const void *loaded = real->load(scratch, from, term->dtype, n);
  if (loaded != scratch)
    memcpy(scratch, loaded, n * real->size);
  return scratch;
}

/* Elements at to at + n of all outputs, n <= real->width. */
static void combine_block(const arithmetic *real, const combination *c, size_t at, size_t n)
{
  _Alignas(64) unsigned char scratch[TERMS][TILE_BYTES];
  _Alignas(64) unsigned char sums[OUTS][TILE_BYTES];
  size_t out_offset = at * ps_dtype_size(c->out_dtype);
  int direct = c->direct && n * real->size == TILE_BYTES;
  tile t;
  t.outs = c->outs; t.stride = c->terms;

  for (size_t j = 0; j < c->terms; j += TERMS) {
    t.terms = smaller(TERMS, c->terms - j);
    t.weight = c->weight + j;
    int last = j + t.terms == c->terms;
    for (size_t f = 0; f < t.terms; f++)
      t.v[f] = load_term(real, &c->in[j + f], at, n, scratch[f]);
    for (size_t k = 0; k < c->outs; k++) {
      t.to[k]=direct && last ? (char *)c->out[k] + out_offset : (char *)sums[k];
      t.from[k]=j == 0 ? zeros : sums[k];
    }
    real->combine(&t,n);
  }
  for (size_t k = 0; k < c->outs && !direct; k++)
    real->store((char *)c->out[k] + out_offset, c->out_dtype, sums[k], n);
}
static ps_status lincomb(size_t n, int outs, int terms, const double *weight, const ps_term *in,
                         void *const *out, ps_dtype out_dtype)
{
  combination c = {(size_t)outs, (size_t)terms, weight, in, out, out_dtype, 1};
  const arithmetic *real = arithmetic_for(out_dtype);
  size_t step = TILE_BYTES / real->size;
  for (size_t at = 0; at < n; at += step)
    combine_block(real, &c, at, smaller(step, n - at));
  return PS_OK;
}
const ps_backend ps__cpu = {"cpu", lincomb, NULL, NULL};
