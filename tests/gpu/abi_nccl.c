/* abi_nccl.c - nccl_api.h held against the real nccl.h: compiles, or names what differs.
 *
 * `make check-abi` compiles it with an nccl.h where one is found.  Versions after 2.18 append
 * fields to the configuration, which says its own size: those up to ours must be where we have
 * them.
 */
#include <stddef.h>

#ifdef PS__REAL_NCCL_H
#include <nccl.h>
#endif

#include "transport/nccl_api.h"

_Static_assert(sizeof(ncclUniqueId) == 128, "ids");

#ifdef PS__REAL_NCCL_H

#define X(field, symbol, optional, arguments)                                                      \
  _Static_assert(                                                                                  \
      __builtin_types_compatible_p(__typeof__(&symbol), __typeof__(((ps__nccl_api *)0)->field)),   \
      #symbol " is declared otherwise in nccl.h");
PS__NCCL_MAP(X)
#undef X

#define SAME_FIELD(field)                                                                          \
  _Static_assert(offsetof(ps__nccl_config, field) == offsetof(ncclConfig_t, field) &&              \
                     sizeof(((ps__nccl_config *)0)->field) == sizeof(((ncclConfig_t *)0)->field),  \
                 #field " lies elsewhere in nccl.h")
SAME_FIELD(size);
SAME_FIELD(magic);
SAME_FIELD(version);
SAME_FIELD(blocking);
SAME_FIELD(cgaClusterSize);
SAME_FIELD(minCTAs);
SAME_FIELD(maxCTAs);
SAME_FIELD(netName);
SAME_FIELD(splitShare);
_Static_assert(sizeof(ps__nccl_config) <= sizeof(ncclConfig_t), "fields that nccl.h has not");

#define SAME(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #theirs)
SAME(PS__NCCL_OK, ncclSuccess);
SAME(PS__NCCL_IN_PROGRESS, ncclInProgress);
SAME(PS__NCCL_BYTES, ncclUint8);
SAME(PS__NCCL_UNDEFINED, NCCL_CONFIG_UNDEF_INT);
_Static_assert(NCCL_VERSION_CODE >= PS__NCCL_OLDEST, "an nccl.h before 2.18");

/* The mark of an initialised configuration has no name of its own. */
static const ncclConfig_t fresh = NCCL_CONFIG_INITIALIZER;
int abi_nccl_mark(void);
int abi_nccl_mark(void)
{
  return fresh.magic == (unsigned)PS__NCCL_MAGIC;
}
#endif
