/* abi_cuda.c - cuda_api.h held against the real cuda.h: compiles, or names what differs.
 *
 * `make check-abi` compiles it twice: with cuda.h, where every function of the table must have the
 * very type that cuda.h declares, and without, where our own structs must have the same layout.
 */
#include <stddef.h>

#ifdef PS__REAL_CUDA_H
#include <cuda.h>
#endif

#include "backend/cuda_api.h"

_Static_assert(sizeof(CUdeviceptr) == 8, "addresses");
_Static_assert(sizeof(CUmemAccessDesc) == 12, "access to a pool");
_Static_assert(offsetof(CUmemAccessDesc, flags) == 8, "access to a pool");
_Static_assert(sizeof(CUmemPoolProps) == 88, "properties of a pool");
_Static_assert(offsetof(CUmemPoolProps, location) == 8, "properties of a pool");
_Static_assert(offsetof(CUmemPoolProps, maxSize) == 24, "properties of a pool");
_Static_assert(offsetof(CUmemPoolProps, usage) == 32, "properties of a pool");

#ifdef PS__REAL_CUDA_H
#define X(field, symbol, optional, arguments)                                                      \
  _Static_assert(                                                                                  \
      __builtin_types_compatible_p(__typeof__(&symbol), __typeof__(((ps__cuda_api *)0)->field)),   \
      #symbol " is declared otherwise in cuda.h");
PS__CUDA_MAP(X)
#undef X

#define SAME(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #theirs)
SAME(PS__CUDA_OK, CUDA_SUCCESS);
SAME(PS__CUDA_NO_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME(PS__CUDA_NO_DEVICE, CUDA_ERROR_NO_DEVICE);
SAME(PS__CUDA_NOT_READY, CUDA_ERROR_NOT_READY);
SAME(PS__CUDA_PROCESSORS, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(PS__CUDA_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(PS__CUDA_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(PS__CUDA_POOLS, CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED);
SAME(PS__CUDA_POINTER_DEVICE, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
SAME(PS__CUDA_NON_BLOCKING, CU_STREAM_NON_BLOCKING);
SAME(PS__CUDA_UNTIMED, CU_EVENT_DISABLE_TIMING);
SAME(PS__CUDA_RELAXED, CU_STREAM_CAPTURE_MODE_RELAXED);
SAME(PS__CUDA_PORTABLE, CU_MEMHOSTALLOC_PORTABLE);
SAME(PS__CUDA_MAPPED, CU_MEMHOSTALLOC_DEVICEMAP);
SAME(PS__CUDA_PINNED, CU_MEM_ALLOCATION_TYPE_PINNED);
SAME(PS__CUDA_LOCATION_DEVICE, CU_MEM_LOCATION_TYPE_DEVICE);
SAME(PS__CUDA_READ_WRITE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
SAME(PS__CUDA_REUSE_WAITING, CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES);
#endif
