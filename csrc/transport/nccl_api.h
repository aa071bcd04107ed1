/* nccl_api.h - what is used of NCCL: its types, and the table of its functions.
 *
 * A build needs no NCCL: libnccl is opened at run time (platform/dl.h).  Layouts and constants are
 * those of 2.18, which later versions keep: the configuration says its own size and version.
 */
#ifndef PS_NCCL_API_H
#define PS_NCCL_API_H

#include <limits.h>
#include <stddef.h>

#include "backend/cuda_api.h"

typedef struct ps__nccl_config {
  size_t size;
  unsigned int magic, version;
  int blocking, cgaClusterSize, minCTAs, maxCTAs;
  const char *netName;
  int splitShare;
} ps__nccl_config;

#ifndef PS__REAL_NCCL_H /* `make check-abi` has these from nccl.h */
typedef struct ncclComm *ncclComm_t;

typedef struct ncclUniqueId {
  char internal[128];
} ncclUniqueId;

typedef ps__nccl_config ncclConfig_t;
typedef int ncclResult_t, ncclDataType_t;
#endif

enum {
  PS__NCCL_OK = 0,
  PS__NCCL_IN_PROGRESS = 7,
  PS__NCCL_BYTES = 1, /* ncclUint8 */
  PS__NCCL_MAGIC = (int)0xcafebeef,
  PS__NCCL_UNDEFINED = INT_MIN,
  PS__NCCL_OLDEST = 21800,
};

/* X(field, exported name, may be missing, arguments) */
#define PS__NCCL_MAP(X)                                                                            \
  X(version, ncclGetVersion, 0, (int *version))                                                    \
  X(unique_id, ncclGetUniqueId, 0, (ncclUniqueId * id))                                            \
  X(init, ncclCommInitRankConfig, 0,                                                               \
    (ncclComm_t * comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config))               \
  X(async_error, ncclCommGetAsyncError, 0, (ncclComm_t comm, ncclResult_t * result))               \
  X(send, ncclSend, 0,                                                                             \
    (const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,               \
     CUstream stream))                                                                             \
  X(recv, ncclRecv, 0,                                                                             \
    (void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, CUstream stream))     \
  X(group_end, ncclGroupEnd, 0, (void))                                                            \
  X(abort, ncclCommAbort, 0, (ncclComm_t comm))

typedef struct ps__nccl_api {
#define X(field, symbol, optional, arguments) ncclResult_t(*field) arguments;
  PS__NCCL_MAP(X)
#undef X
} ps__nccl_api;

#endif
