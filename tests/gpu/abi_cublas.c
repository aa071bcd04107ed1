/* abi_cublas.c - cublas_api.h held against the real cublas_v2.h: compiles, or names what differs.
 *
 * `make check-abi` compiles it where there is one, beside nvcc or in a wheel; cuda.h is needed too.
 */
#ifdef PS__REAL_CUBLAS_H
#include <cuda.h>

#include <cublas_v2.h>
#endif

#include "backend/cublas_api.h"

#ifdef PS__REAL_CUBLAS_H
#define X(field, symbol, optional, arguments)                                                      \
  _Static_assert(                                                                                  \
      __builtin_types_compatible_p(__typeof__(&symbol), __typeof__(((ps__blas_api *)0)->field)),   \
      #symbol " is declared otherwise in cublas_v2.h");
PS__BLAS_MAP(X)
#undef X

#define SAME(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #theirs)
SAME(PS__BLAS_OK, CUBLAS_STATUS_SUCCESS);
SAME(PS__BLAS_NO_MEMORY, CUBLAS_STATUS_ALLOC_FAILED);
SAME(PS__BLAS_AS_IS, CUBLAS_OP_N);
SAME(PS__BLAS_TURNED, CUBLAS_OP_T);
SAME(PS__BLAS_F32, CUDA_R_32F);
SAME(PS__BLAS_F64, CUDA_R_64F);
SAME(PS__BLAS_F16, CUDA_R_16F);
SAME(PS__BLAS_BF16, CUDA_R_16BF);
SAME(PS__BLAS_IN_F32, CUBLAS_COMPUTE_32F);
SAME(PS__BLAS_ALL_F32, CUBLAS_COMPUTE_32F_PEDANTIC);
SAME(PS__BLAS_IN_F64, CUBLAS_COMPUTE_64F);
SAME(PS__BLAS_ANY_WAY, CUBLAS_GEMM_DEFAULT);
SAME(PS__BLAS_MAJOR, MAJOR_VERSION);
SAME(PS__BLAS_MINOR, MINOR_VERSION);
#endif
