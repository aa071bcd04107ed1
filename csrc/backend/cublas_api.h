/* cublas_api.h - what is used of cuBLAS: its types, and the table of its functions.
 *
 * A build needs no cuBLAS: libcublas is opened at run time (platform/dl.h).  Names and constants
 * are those of version 11, which later ones keep; `make check-abi` holds them against the real
 * cublas_v2.h.
 */
#ifndef PS_CUBLAS_API_H
#define PS_CUBLAS_API_H

#include <stddef.h>

#include "backend/cuda_api.h"

/* cublas_v2.h itself where declarations are compared; the same names otherwise. */
#ifndef PS__REAL_CUBLAS_H
typedef int cublasStatus_t;
typedef int cublasOperation_t;
typedef int cublasComputeType_t;
typedef int cublasGemmAlgo_t;
typedef int cudaDataType;
typedef int libraryPropertyType;
typedef struct cublasContext *cublasHandle_t;
typedef CUstream cudaStream_t;
#endif

/* Values of the library's enumerations, under names of our own. */
enum {
  PS__BLAS_OK = 0,
  PS__BLAS_NO_MEMORY = 3, /* CUBLAS_STATUS_ALLOC_FAILED */
  PS__BLAS_AS_IS = 0,     /* CUBLAS_OP_N */
  PS__BLAS_TURNED = 1,    /* CUBLAS_OP_T */
  PS__BLAS_F32 = 0,       /* CUDA_R_32F */
  PS__BLAS_F64 = 1,       /* CUDA_R_64F */
  PS__BLAS_F16 = 2,       /* CUDA_R_16F */
  PS__BLAS_BF16 = 14,     /* CUDA_R_16BF */
  PS__BLAS_IN_F32 = 68,   /* CUBLAS_COMPUTE_32F */
  PS__BLAS_ALL_F32 = 69,  /* CUBLAS_COMPUTE_32F_PEDANTIC: operands are not cut to fewer bits */
  PS__BLAS_IN_F64 = 70,   /* CUBLAS_COMPUTE_64F */
  PS__BLAS_ANY_WAY = -1,  /* CUBLAS_GEMM_DEFAULT */
  PS__BLAS_MAJOR = 0,     /* MAJOR_VERSION */
  PS__BLAS_MINOR = 1,     /* MINOR_VERSION */
};

/* X(field, exported name, may be missing, arguments) */
#define PS__BLAS_MAP(X)                                                                            \
  X(property, cublasGetProperty, 0, (libraryPropertyType type, int *value))                        \
  X(create, cublasCreate_v2, 0, (cublasHandle_t * handle))                                         \
  X(destroy, cublasDestroy_v2, 0, (cublasHandle_t handle))                                         \
  X(set_stream, cublasSetStream_v2, 0, (cublasHandle_t handle, cudaStream_t stream))               \
  X(set_workspace, cublasSetWorkspace_v2, 0,                                                       \
    (cublasHandle_t handle, void *workspace, size_t bytes))                                        \
  X(gemm, cublasGemmStridedBatchedEx, 0,                                                           \
    (cublasHandle_t handle, cublasOperation_t turn_a, cublasOperation_t turn_b, int m, int n,      \
     int k, const void *alpha, const void *a, cudaDataType a_type, int lda, long long a_stride,    \
     const void *b, cudaDataType b_type, int ldb, long long b_stride, const void *beta, void *c,   \
     cudaDataType c_type, int ldc, long long c_stride, int count, cublasComputeType_t compute,     \
     cublasGemmAlgo_t algorithm))                                                                  \
  X(axpy, cublasAxpyEx, 0,                                                                         \
    (cublasHandle_t handle, int n, const void *alpha, cudaDataType alpha_type, const void *x,      \
     cudaDataType x_type, int x_step, void *y, cudaDataType y_type, int y_step,                    \
     cudaDataType compute))

typedef struct ps__blas_api {
#define X(field, symbol, optional, arguments) cublasStatus_t(*field) arguments;
  PS__BLAS_MAP(X)
#undef X
} ps__blas_api;

#endif
