/* parastep_backend.h - how vectors are combined: what the core asks of a backend.
 *
 * The core does scalar algebra in double and hands every pass over memory to one of these.  The CPU
 * backend (csrc/backend/cpu.c) is the specification: fixed order, float accumulation (double where
 * the storage is), no fused multiply-add, so that the bits are the same on every CPU.
 */
#ifndef PARASTEP_BACKEND_H
#define PARASTEP_BACKEND_H

#include "parastep.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One input of a linear combination; (n) elements. */
typedef struct ps_term {
  const void *data;
  ps_dtype dtype;
} ps_term;

/* One ask, in one pass: how far is x from the point where m was evaluated, and m rebased to x.
 * Shapes are (items, size).  x and guess share x_dtype; m, out and keep_m share m_dtype. */
typedef struct ps_sweep {
  size_t items, size;
  ps_dtype x_dtype, m_dtype;
  const void *x;
  const void *guess; /* NULL: nothing is measured, out and keep_m are copies of m */
  const void *m;     /* NULL: measure alone */
  double slope;      /* g_j; out may be m, and keep_x guess, at the same address */
  double floor;      /* rounding of x in units of its rms: 2^-k, or 0 */
  void *out;         /* m + slope (x - guess), or NULL.  A slope of 0 copies m bit for bit */
  void *keep_x;      /* copy of x, or NULL */
  void *keep_m;      /* copy of out, or NULL */
} ps_sweep;

typedef struct ps_swept {
  double excess;     /* max over items of mean((x - guess)^2) - floor^2 mean(x^2), at least 0 */
  double distance;   /* max over items of mean((x - guess)^2) */
  double reference;  /* mean(x^2) of the item with the largest distance */
  size_t not_finite; /* elements of m that are NaN or Inf */
} ps_swept;          /* a NaN among x or guess makes excess and distance NaN */

struct ps_backend {
  const char *name;

  /* out[k] = sum_{j<terms} weight[k * terms + j] in[j] for k < outs, over n elements, in one pass.
   * Terms are added to +0 in the order given, in double where out_dtype is PS_F64, else in float;
   * one with weight 0 is not added to that output, and one whose weights are all 0 may have NULL
   * data.  An output may be one of the inputs (same address, 64 outputs at most then), never
   * overlap one otherwise.  outs, terms >= 1. */
  ps_status (*lincomb)(size_t n, int outs, int terms, const double *weight, const ps_term *in,
                       void *const *out, ps_dtype out_dtype);

  ps_status (*sweep)(const ps_sweep *sweep, ps_swept *swept);

  ps_status (*copy)(void *to, const void *from, size_t bytes);
};

/* "cpu"; NULL where this build or machine has no such backend. */
PS_API const ps_backend *ps_backend_find(const char *name);

#ifdef __cplusplus
}
#endif
#endif
