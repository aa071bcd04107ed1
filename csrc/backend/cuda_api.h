/* cuda_api.h - what is used of the CUDA driver: its types, and the table of its functions.
 *
 * A build needs no CUDA: libcuda is opened at run time (platform/dl.h).  Names with their versions,
 * layouts and constants are those of the driver API from CUDA 11.2 on, which keeps them for good;
 * `make check-abi` holds them against the real cuda.h.
 */
#ifndef PS_CUDA_API_H
#define PS_CUDA_API_H

#include <stddef.h>
#include <stdint.h>

#include "platform/dl.h"

/* cuda.h itself where declarations are compared; the same names otherwise. */
#ifndef PS__REAL_CUDA_H
typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmemPoolHandle_st *CUmemoryPool;

typedef struct CUmemLocation {
  int type;
  int id;
} CUmemLocation;

typedef struct CUmemAccessDesc {
  CUmemLocation location;
  int flags;
} CUmemAccessDesc;

typedef struct CUmemPoolProps {
  int allocType;
  int handleTypes;
  CUmemLocation location;
  void *win32SecurityAttributes;
  size_t maxSize;
  unsigned short usage;
  unsigned char reserved[54];
} CUmemPoolProps;

typedef int CUdevice_attribute;
typedef int CUmemPool_attribute;
typedef int CUstreamCaptureMode;
typedef int CUstreamCaptureStatus;
typedef int CUpointer_attribute;
#endif

/* Values of the driver's enumerations, under names of our own. */
enum {
  PS__CUDA_OK = 0,
  PS__CUDA_NO_MEMORY = 2,
  PS__CUDA_NO_DEVICE = 100,
  PS__CUDA_NOT_READY = 600,
  PS__CUDA_PROCESSORS = 16,     /* CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT */
  PS__CUDA_MAJOR = 75,          /* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR */
  PS__CUDA_MINOR = 76,          /* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR */
  PS__CUDA_POOLS = 115,         /* CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED */
  PS__CUDA_POINTER_DEVICE = 9,  /* CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL */
  PS__CUDA_NON_BLOCKING = 1,    /* CU_STREAM_NON_BLOCKING */
  PS__CUDA_UNTIMED = 2,         /* CU_EVENT_DISABLE_TIMING */
  PS__CUDA_RELAXED = 2,         /* CU_STREAM_CAPTURE_MODE_RELAXED */
  PS__CUDA_PORTABLE = 1,        /* CU_MEMHOSTALLOC_PORTABLE */
  PS__CUDA_MAPPED = 2,          /* CU_MEMHOSTALLOC_DEVICEMAP */
  PS__CUDA_PINNED = 1,          /* CU_MEM_ALLOCATION_TYPE_PINNED */
  PS__CUDA_LOCATION_DEVICE = 1, /* CU_MEM_LOCATION_TYPE_DEVICE */
  PS__CUDA_READ_WRITE = 3,      /* CU_MEM_ACCESS_FLAGS_PROT_READWRITE */
  PS__CUDA_REUSE_WAITING = 3,   /* CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES */
};

/* The legacy default stream by its own name; a handle of 0 may be compiled to mean another. */
#define PS__CUDA_DEFAULT_STREAM ((CUstream)0x1)

/* X(field, exported name, may be missing, arguments) */
#define PS__CUDA_MAP(X)                                                                            \
  X(init, cuInit, 0, (unsigned flags))                                                             \
  X(driver_version, cuDriverGetVersion, 0, (int *version))                                         \
  X(error_name, cuGetErrorName, 0, (CUresult error, const char **name))                            \
  X(device_count, cuDeviceGetCount, 0, (int *count))                                               \
  X(device_get, cuDeviceGet, 0, (CUdevice * device, int ordinal))                                  \
  X(device_name, cuDeviceGetName, 0, (char *name, int room, CUdevice device))                      \
  X(device_attribute, cuDeviceGetAttribute, 0,                                                     \
    (int *value, CUdevice_attribute attribute, CUdevice device))                                   \
  X(can_access_peer, cuDeviceCanAccessPeer, 0, (int *can, CUdevice device, CUdevice peer))         \
  X(context_retain, cuDevicePrimaryCtxRetain, 0, (CUcontext * context, CUdevice device))           \
  X(context_release, cuDevicePrimaryCtxRelease_v2, 0, (CUdevice device))                           \
  X(context_push, cuCtxPushCurrent_v2, 0, (CUcontext context))                                     \
  X(context_pop, cuCtxPopCurrent_v2, 0, (CUcontext * context))                                     \
  X(exchange_capture_mode, cuThreadExchangeStreamCaptureMode, 0, (CUstreamCaptureMode * mode))     \
  X(stream_create, cuStreamCreate, 0, (CUstream * stream, unsigned flags))                         \
  X(stream_destroy, cuStreamDestroy_v2, 0, (CUstream stream))                                      \
  X(stream_wait, cuStreamWaitEvent, 0, (CUstream stream, CUevent event, unsigned flags))           \
  X(stream_is_capturing, cuStreamIsCapturing, 0,                                                   \
    (CUstream stream, CUstreamCaptureStatus * status))                                             \
  X(event_create, cuEventCreate, 0, (CUevent * event, unsigned flags))                             \
  X(event_destroy, cuEventDestroy_v2, 0, (CUevent event))                                          \
  X(event_record, cuEventRecord, 0, (CUevent event, CUstream stream))                              \
  X(event_query, cuEventQuery, 0, (CUevent event))                                                 \
  X(pointer_attribute, cuPointerGetAttribute, 0,                                                   \
    (void *value, CUpointer_attribute attribute, CUdeviceptr p))                                   \
  X(alloc, cuMemAlloc_v2, 0, (CUdeviceptr * p, size_t bytes))                                      \
  X(free, cuMemFree_v2, 0, (CUdeviceptr p))                                                        \
  X(host_alloc, cuMemHostAlloc, 0, (void **p, size_t bytes, unsigned flags))                       \
  X(host_pointer, cuMemHostGetDevicePointer_v2, 0, (CUdeviceptr * p, void *host, unsigned flags))  \
  X(copy, cuMemcpyAsync, 0, (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream))     \
  X(copy_to_host, cuMemcpyDtoHAsync_v2, 0,                                                         \
    (void *to, CUdeviceptr from, size_t bytes, CUstream stream))                                   \
  X(copy_from_host, cuMemcpyHtoDAsync_v2, 0,                                                       \
    (CUdeviceptr to, const void *from, size_t bytes, CUstream stream))                             \
  X(set, cuMemsetD8Async, 0, (CUdeviceptr p, unsigned char value, size_t bytes, CUstream stream))  \
  X(module_load, cuModuleLoadData, 0, (CUmodule * module, const void *image))                      \
  X(module_unload, cuModuleUnload, 0, (CUmodule module))                                           \
  X(module_function, cuModuleGetFunction, 0,                                                       \
    (CUfunction * function, CUmodule module, const char *name))                                    \
  X(launch, cuLaunchKernel, 0,                                                                     \
    (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,     \
     unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void **arguments, \
     void **extra))                                                                                \
  X(function_load, cuFuncLoad, 1, (CUfunction function))                                           \
  X(pool_create, cuMemPoolCreate, 1, (CUmemoryPool * pool, const CUmemPoolProps *properties))      \
  X(pool_destroy, cuMemPoolDestroy, 1, (CUmemoryPool pool))                                        \
  X(pool_attribute, cuMemPoolSetAttribute, 1,                                                      \
    (CUmemoryPool pool, CUmemPool_attribute attribute, void *value))                               \
  X(pool_access, cuMemPoolSetAccess, 1,                                                            \
    (CUmemoryPool pool, const CUmemAccessDesc *access, size_t count))                              \
  X(pool_alloc, cuMemAllocFromPoolAsync, 1,                                                        \
    (CUdeviceptr * p, size_t bytes, CUmemoryPool pool, CUstream stream))                           \
  X(pool_free, cuMemFreeAsync, 1, (CUdeviceptr p, CUstream stream))

typedef struct ps__cuda_api {
#define X(field, symbol, optional, arguments) CUresult(*field) arguments;
  PS__CUDA_MAP(X)
#undef X
} ps__cuda_api;

/* device.c; complete once a device is open. */
extern ps__cuda_api ps__cuda;

#endif
