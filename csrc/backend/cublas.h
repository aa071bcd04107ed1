/* cublas.h - what cublas.c has of cuBLAS for cuda_cublas.c. */
#ifndef PS_CUBLAS_H
#define PS_CUBLAS_H

#include "backend/cublas_api.h"
#include "backend/cuda.h"

struct ps__blas {
  cublasHandle_t handle;
  CUdeviceptr workspace; /* of our own: cuBLAS would take one at a standstill of the device */
};

extern ps__blas_api ps__cublas; /* complete where a rank has a ps__blas */

ps_status ps__blas_check(const ps__cuda_rank *rank, cublasStatus_t result, const char *what);

/* Work goes to the rank's stream from now on; inside of enter.  Naming a stream takes the workspace
 * away. */
ps_status ps__blas_aim(ps__cuda_rank *rank);

#endif
