/* parastep_backend.h - where vectors live and how they are combined: what the core asks of a
 * backend.
 *
 * The core does scalar algebra in double and hands every pass over memory to one of these.  The CPU
 * backend (csrc/backend/cpu.c) is the specification: fixed order, float accumulation (double where
 * the storage is), no fused multiply-add, so that the bits are the same on every CPU.
 *
 * A backend may work behind the caller's back: calls return when the work is in order behind what
 * was asked of it before, and only sweep and settle wait for its end.  Vectors passed to it stay
 * valid until then.  One thread at a time uses a backend; each rank has its own.
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

/* The same bytes in the memory of two backends: one block where they share it, a copy on each side
 * where not.  Each side is used by its own rank's thread; whoever hands work over has told the
 * other side by other means. */
typedef enum ps_side { PS_NEAR = 0, PS_FAR = 1 } ps_side;

typedef struct ps_mirror ps_mirror;

typedef struct ps_mirror_ops {
  /* Bytes from offset on go over to the other side, in order behind all work of this side's
   * backend.  Never waits. */
  ps_status (*send)(ps_mirror *mirror, ps_side from, size_t offset, size_t bytes);

  /* What the other side has sent so far is in order before all further work of this side's backend.
   * Never waits. */
  ps_status (*receive)(ps_mirror *mirror, ps_side to);

  /* Waits until everything that this side has sent is there. */
  ps_status (*settle)(ps_mirror *mirror, ps_side from, const ps_wait *wait);

  /* This side lets go.  Memory is freed when both have and their work on it is done. */
  void (*close)(ps_mirror *mirror, ps_side side);
} ps_mirror_ops;

struct ps_mirror { /* backends put this first in their own struct */
  const ps_mirror_ops *ops;
  unsigned char *memory[2]; /* (bytes) as each side reaches it, zeroed */
};

struct ps_backend { /* backends put this first in their own struct */
  const char *name; /* "cpu", "cuda" */
  int device;       /* which of them, from 0 on */

  void (*retain)(const ps_backend *backend);
  void (*release)(const ps_backend *backend);

  /* Memory for vectors, zeroed, 64-byte aligned; NULL with the last error set.  It is freed once
   * the backend's work on it is done. */
  void *(*alloc)(const ps_backend *backend, size_t bytes);
  void (*free)(const ps_backend *backend, void *p); /* p may be NULL */

  /* bytes that this backend, near, shares with far, of the same kind.  Both are retained. */
  ps_status (*mirror)(const ps_backend *near, const ps_backend *far, size_t bytes,
                      ps_mirror **mirror);

  /* out[k] = sum_{j<terms} weight[k * terms + j] in[j] for k < outs, over n elements, in one pass.
   * Terms are added to +0 in the order given, in double where one or out_dtype is PS_F64, else in
   * float; one with weight 0 is not added to that output, and one whose weights are all 0 may have
   * NULL data.  An output may be one of the inputs (same address, 64 outputs at most then), never
   * overlap one otherwise.  outs, terms >= 1; weight, in and out are read during the call. */
  ps_status (*lincomb)(const ps_backend *backend, size_t n, int outs, int terms,
                       const double *weight, const ps_term *in, void *const *out,
                       ps_dtype out_dtype);

  /* Waits for the result; wait may be NULL. */
  ps_status (*sweep)(const ps_backend *backend, const ps_sweep *sweep, const ps_wait *wait,
                     ps_swept *swept);

  ps_status (*copy)(const ps_backend *backend, void *to, const void *from, size_t bytes);

  /* Waits until all work so far is done; wait may be NULL. */
  ps_status (*settle)(const ps_backend *backend, const ps_wait *wait);
};

/* "cpu", the backend of host memory: always there, never freed.  NULL for any other name: those of
 * a device are opened. */
PS_API const ps_backend *ps_backend_find(const char *name);

/* How many CUDA devices this process sees; PS_UNSUPPORTED with the reason where there is no driver.
 */
PS_API ps_status ps_cuda_count(int *count);

/* A rank's backend on a device, to be released.  Its work goes to the legacy default stream until
 * another one is named. */
PS_API ps_status ps_cuda_open(int ordinal, const ps_backend **backend);

/* Writes one line on what was found: devices, and how passes are made on them; or why there are
 * none. */
PS_API void ps_cuda_describe(char *text, size_t room);

/* Frees memory of the backend behind what is in a stream of the host's (NULL: the legacy default);
 * from any thread. */
PS_API void ps_cuda_give_back(const ps_backend *backend, void *p, void *stream);

/* The host's current stream (a CUstream; NULL is the legacy default), to which work goes from now
 * on, behind all work so far.  PS_STATE where the host is capturing a graph on it. */
PS_API ps_status ps_cuda_use_stream(const ps_backend *backend, void *stream);

#ifdef __cplusplus
}
#endif
#endif
