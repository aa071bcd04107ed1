/* cuda.h - a rank's backend on a CUDA device, for the files that make it up: cuda_rank.c at the
 * bottom, cuda_mirror.c, for passes cuda_kernels.c, cuda_cublas.c and cuda_plain.c, and cuda.c
 * above them all. */
#ifndef PS_CUDA_H
#define PS_CUDA_H

#include "backend/device.h"
#include "parastep_backend.h"

typedef struct ps__blas ps__blas; /* cublas.h */

typedef struct ps__cuda_rank {
  ps_backend base;
  ps__mortal mortal;
  int references; /* changed atomically */
  ps__device *device;
  CUstream stream; /* the host's current one; all work goes there */
  CUevent done;    /* behind all work so far, on whatever stream that was put */

  /* What sweeps write on the way, one after the other. */
  ps__part *part;           /* (PS__PARTS_MAX), on the device, the ticket behind it */
  ps__sweep_result *result; /* pinned */

  /* Outputs of a lincomb that reads what it would overwrite; grows when first needed. */
  CUdeviceptr scratch;
  size_t scratch_bytes;

  ps__blas *blas; /* where there are no kernels; NULL: there is no cuBLAS either */

  /* Operands on the host, where there are no kernels; pinned, grows when needed. */
  unsigned char *staged;
  size_t staged_bytes;
} ps__cuda_rank;

static inline ps__cuda_rank *ps__cuda_rank_of(const ps_backend *backend)
{
  return (ps__cuda_rank *)backend; /* none of them is constant: const keeps callers from writing */
}

static inline CUdeviceptr ps__address(const void *p)
{
  return (CUdeviceptr)(uintptr_t)p;
}

/* cuda_rank.c */

/* Puts the done event behind what was given to the stream; inside of enter. */
ps_status ps__cuda_mark(ps__cuda_rank *rank);

/* On the device and the rank's stream; inside of enter. */
ps_status ps__cuda_copy(ps__cuda_rank *rank, CUdeviceptr to, CUdeviceptr from, size_t bytes);

/* At least bytes of scratch. */
ps_status ps__cuda_scratch(ps__cuda_rank *rank, size_t bytes);

/* At least bytes of staged memory; waits for the work so far where it has to grow. */
ps_status ps__cuda_staged(ps__cuda_rank *rank, size_t bytes);

/* cuda_mirror.c */
ps_status ps__cuda_mirror(const ps_backend *near, const ps_backend *far, size_t bytes,
                          ps_mirror **mirror);

/* cuda_kernels.c: passes by kernels of this build.  Arguments of these and the following have been
 * checked; in_place: an output is an input too. */
ps_status ps__kernel_lincomb(ps__cuda_rank *rank, size_t n, int outs, int terms,
                             const double *weight, const ps_term *in, void *const *out,
                             ps_dtype out_dtype, bool in_place);
ps_status ps__kernel_sweep(ps__cuda_rank *rank, const ps_sweep *sweep, const ps_wait *wait,
                           ps_swept *swept);

/* cublas.c: a rank's handle, where there is a cuBLAS. */
int ps__blas_version(void);                 /* as 1301 for 13.1; 0: there is none */
ps__blas *ps__blas_new(ps__device *device); /* or NULL */
void ps__blas_free(ps__device *device, ps__blas *gone);

/* cuda_cublas.c: passes by it. */
ps_status ps__blas_lincomb(ps__cuda_rank *rank, size_t n, int outs, int terms, const double *weight,
                           const ps_term *in, void *const *out, ps_dtype out_dtype);
ps_status ps__blas_sweep(ps__cuda_rank *rank, const ps_sweep *sweep, const ps_wait *wait,
                         ps_swept *swept);

/* cuda_plain.c: the same through the host. */
ps_status ps__plain_lincomb(ps__cuda_rank *rank, size_t n, int outs, int terms,
                            const double *weight, const ps_term *in, void *const *out,
                            ps_dtype out_dtype);
ps_status ps__plain_sweep(ps__cuda_rank *rank, const ps_sweep *sweep, const ps_wait *wait,
                          ps_swept *swept);

#endif
