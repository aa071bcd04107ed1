/* libnccl.c - a stand-in for NCCL: communicators of two ranks that are threads of one process.
 *
 * Built as libnccl.so.2, on top of the stand-in driver: a send and a receive are work of their
 * streams that is done when both are first in theirs, as kernels that spin.  What would hang on a
 * GPU, counts that differ between ranks for one, is a complaint here; a peer that is gone is
 * silent, as it is on NVLink.  Calls return before they are done, as with communicators that do not
 * block.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "transport/nccl_api.h"

#define API __attribute__((visibility("default")))

enum { INVALID_ARGUMENT = 4, INVALID_USAGE = 5, PAIRS = 4096, MEETINGS = 65536 };

/* The k-th send of one rank and the k-th receive of the other. */
typedef struct meeting {
  void *end[2]; /* of the sender, of the receiver; NULL before it was called */
  size_t bytes[2];
  bool first[2]; /* of its stream */
  bool over;     /* done, or given up */
} meeting;

typedef struct pair {
  struct ncclComm *comm[2];
  meeting *way[2]; /* (MEETINGS) from rank 0, from rank 1 */
} pair;

struct ncclComm {
  pair *of;
  int rank, device;
  int calls[2];   /* sends, receives */
  uint32_t later; /* looks at it until the last call is done */
  bool aborted;
};

static pair pairs[PAIRS];
static int made, live;
static char failing[64];
static int fail_at, fail_result, broken;

void fake_nccl_fail(const char *function, int n, int result)
{
  fake_lock();
  snprintf(failing, sizeof failing, "%s", function);
  fail_at = n;
  fail_result = result;
  broken = 0;
  fake_unlock();
}

int fake_nccl_live(void)
{
  fake_lock();
  int count = live;
  fake_unlock();
  return count;
}

/* Takes the lock; what the call gives whatever its arguments are. */
static int enter(const char *function)
{
  fake_lock();
  if (fail_at > 0 && strcmp(failing, function) == 0) {
    --fail_at;
    if (fail_at == 0) {
      return fail_result;
    }
  }
  return PS__NCCL_OK;
}

static int leave(int result)
{
  fake_unlock();
  return result;
}

API int ncclGetVersion(int *version)
{
  *version = 22907;
  return PS__NCCL_OK;
}

static void name_pair(ncclUniqueId *id, int number)
{
  snprintf(id->internal, sizeof id->internal, "pair %d", number);
}

API int ncclGetUniqueId(ncclUniqueId *id)
{
  int result = enter("ncclGetUniqueId");
  memset(id, 0, sizeof *id);
  if (result == PS__NCCL_OK && made < PAIRS) {
    name_pair(id, made++);
  }
  return leave(result);
}

API int ncclGroupEnd(void)
{
  return PS__NCCL_OK;
}

/* ---- communicators --------------------------------------------------------------------------- */

static int find_pair(const ncclUniqueId *id)
{
  for (int k = 0; k < made; ++k) {
    ncclUniqueId its;
    name_pair(&its, k);
    if (strcmp(id->internal, its.internal) == 0) {
      return k;
    }
  }
  return -1;
}

static int check_init(int ranks, const ncclUniqueId *id, int rank, const ncclConfig_t *config,
                      int *number)
{
  *number = find_pair(id);
  if (*number < 0) {
    return fake_complain(INVALID_ARGUMENT, "an id that nobody made");
  }
  if (ranks != 2 || rank < 0 || rank > 1 || config->blocking != 0 ||
      config->magic != (unsigned)PS__NCCL_MAGIC || config->size < sizeof *config) {
    return fake_complain(INVALID_ARGUMENT, "rank %d of %d, or its configuration", rank, ranks);
  }
  if (pairs[*number].comm[rank] != NULL) {
    return fake_complain(INVALID_USAGE, "rank %d joins a pair twice", rank);
  }
  return PS__NCCL_OK;
}

API int ncclCommInitRankConfig(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank,
                               ncclConfig_t *config)
{
  int number, result = enter("ncclCommInitRankConfig");
  if (result == PS__NCCL_OK) {
    result = check_init(ranks, &id, rank, config, &number);
  }
  if (result != PS__NCCL_OK) {
    return leave(result);
  }
  pair *of = &pairs[number];
  *comm = calloc(1, sizeof **comm);
  **comm = (struct ncclComm){.of = of, .rank = rank};
  of->comm[rank] = *comm;
  if (of->way[0] == NULL) {
    of->way[0] = calloc(MEETINGS, sizeof(meeting));
    of->way[1] = calloc(MEETINGS, sizeof(meeting));
  }
  ++live;
  return leave(PS__NCCL_IN_PROGRESS);
}

static bool is_joined(const struct ncclComm *comm)
{
  return comm->of->comm[0] != NULL && comm->of->comm[1] != NULL;
}

API int ncclCommGetAsyncError(ncclComm_t comm, int *state)
{
  int result = enter("ncclCommGetAsyncError");
  if (result != PS__NCCL_OK) {
    broken = result;
  }
  if (comm == NULL || comm->aborted) {
    return leave(fake_complain(INVALID_ARGUMENT, "asking a communicator that was aborted"));
  }
  comm->later -= comm->later > 0;
  *state = broken != 0                           ? broken
           : is_joined(comm) && comm->later == 0 ? PS__NCCL_OK
                                                 : PS__NCCL_IN_PROGRESS;
  return leave(PS__NCCL_OK);
}

/* What waits for the other end is over; memory of the pair stays, for work that still knows it. */
API int ncclCommAbort(ncclComm_t comm)
{
  enter("ncclCommAbort");
  if (comm->aborted) {
    return leave(fake_complain(INVALID_USAGE, "aborting a communicator twice"));
  }
  comm->aborted = true;
  --live;
  return leave(PS__NCCL_OK);
}

/* ---- send and receive ------------------------------------------------------------------------ */

typedef struct half {
  struct ncclComm *comm;
  meeting *at;
  int which; /* 0 sends, 1 receives */
} half;

static bool is_ready(void *data)
{
  const half *own = data;
  const struct ncclComm *peer = own->comm->of->comm[1 - own->comm->rank];
  own->at->first[own->which] = true;
  return own->at->over || own->comm->aborted || (own->at->first[1 - own->which] && !peer->aborted);
}

static void meet(void *data)
{
  const half *own = data;
  meeting *at = own->at;
  if (!at->over && !own->comm->aborted) {
    memcpy(fake_translate(at->end[1], at->bytes[1]), fake_translate(at->end[0], at->bytes[0]),
           at->bytes[1]);
    at->over = true;
  }
}

static int check_call(const struct ncclComm *comm, size_t count, int type, int peer,
                      const fake_stream_state *stream)
{
  if (comm == NULL || comm->aborted || !is_joined(comm) || comm->later > 0) {
    return fake_complain(INVALID_USAGE, "a communicator that is not ready for a call");
  }
  if (type != PS__NCCL_BYTES || count == 0 || peer != 1 - comm->rank || !stream->live) {
    return fake_complain(INVALID_ARGUMENT, "a send or receive of %zu to rank %d", count, peer);
  }
  return PS__NCCL_OK;
}

static int give(struct ncclComm *comm, int which, void *p, size_t count, int type, int peer,
                CUstream handle)
{
  fake_stream_state *stream = (fake_stream_state *)handle;
  int result = check_call(comm, count, type, peer, stream);
  if (result != PS__NCCL_OK) {
    return result;
  }
  int way = which == 0 ? comm->rank : peer;
  meeting *at = &comm->of->way[way][comm->calls[which]++ % MEETINGS];
  half *own = malloc(sizeof *own);
  *own = (half){comm, at, which};
  at->end[which] = p;
  at->bytes[which] = count;
  if (at->end[1 - which] != NULL && at->bytes[0] != at->bytes[1]) {
    result = fake_complain(INVALID_USAGE, "%zu bytes sent where %zu are received", at->bytes[0],
                           at->bytes[1]);
  }
  fake_range range = {p, count, which == 1};
  int error =
      fake_give_when(stream, which == 0 ? "sending" : "receiving", &range, 1, is_ready, meet, own);
  comm->later = fake_random(3);
  return result != PS__NCCL_OK ? result
         : error != FAKE_OK    ? INVALID_USAGE
         : comm->later > 0     ? PS__NCCL_IN_PROGRESS
                               : PS__NCCL_OK;
}

API int ncclSend(const void *from, size_t count, int type, int peer, ncclComm_t comm,
                 CUstream stream)
{
  int result = enter("ncclSend");
  return leave(result != PS__NCCL_OK ? result
                                     : give(comm, 0, (void *)from, count, type, peer, stream));
}

API int ncclRecv(void *to, size_t count, int type, int peer, ncclComm_t comm, CUstream stream)
{
  int result = enter("ncclRecv");
  return leave(result != PS__NCCL_OK ? result : give(comm, 1, to, count, type, peer, stream));
}
