/* libnccl.c - a stand-in for NCCL: communicators of two ranks, in one process or in two.
 *
 * Built as libnccl.so.2, on top of the stand-in driver: a send and a receive are work of their
 * streams that is done when both are first in theirs, as kernels that spin.  Between them is a
 * socket: who receives says so once it is its turn, and for how many bytes, then these come.  What
 * would hang on a GPU, counts that differ between ranks for one, is a complaint here; a peer that
 * is gone is silent, as it is on NVLink.  Calls return before they are done, as with communicators
 * that do not block.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "transport/nccl_api.h"

#define API __attribute__((visibility("default")))

enum { INVALID_ARGUMENT = 4, INVALID_USAGE = 5 };

struct ncclComm {
  struct ncclComm *next; /* all that were ever made: work may still know them */
  struct sockaddr_un address;
  int rank;
  int listening, connected; /* sockets; -1: none */
  uint32_t later;           /* looks at it until the last call is done */
  int error;                /* that the two ranks have made between them */
  bool aborted;
  fake_stream_state *stream; /* of the call in progress, which is the communicator's alone */
};

static struct ncclComm *comms;
static int made, live;
static char failing[64];
static int fail_at, fail_result, broken, spoil_at;
static int aborting;
static int abort_ms;

void fake_nccl_fail(const char *function, int n, int result)
{
  fake_lock();
  snprintf(failing, sizeof failing, "%s", function);
  fail_at = n;
  fail_result = result;
  broken = 0;
  fake_unlock();
}

void fake_nccl_abort_takes(int ms)
{
  abort_ms = ms;
}

/* On a GPU that is a crash, some of the time. */
__attribute__((destructor)) static void end_library(void)
{
  if (__atomic_load_n(&aborting, __ATOMIC_SEQ_CST) > 0) {
    static const char words[] = "the libraries end while a communicator is being aborted\n";
    (void)!write(STDERR_FILENO, words, sizeof words - 1);
    _exit(3);
  }
}

void fake_nccl_spoil(int n)
{
  fake_lock();
  spoil_at = n;
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

/* Abstract: nothing is left of it in the file system. */
API int ncclGetUniqueId(ncclUniqueId *id)
{
  int result = enter("ncclGetUniqueId");
  memset(id, 0, sizeof *id);
  if (result == PS__NCCL_OK) {
    snprintf(id->internal, sizeof id->internal, "stand-in %d.%d", (int)getpid(), made++);
  }
  return leave(result);
}

API int ncclGroupEnd(void)
{
  return PS__NCCL_OK;
}

/* ---- communicators --------------------------------------------------------------------------- */

static int check_init(int ranks, const ncclUniqueId *id, int rank, const ncclConfig_t *config)
{
  if (strncmp(id->internal, "stand-in ", 9) != 0) {
    return fake_complain(INVALID_ARGUMENT, "an id that nobody made");
  }
  if (ranks != 2 || rank < 0 || rank > 1 || config->blocking != 0 ||
      config->magic != (unsigned)PS__NCCL_MAGIC || config->size < sizeof *config) {
    return fake_complain(INVALID_ARGUMENT, "rank %d of %d, or its configuration", rank, ranks);
  }
  return PS__NCCL_OK;
}

static int new_socket(void)
{
  return socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}

static void end_socket(int *end)
{
  if (*end >= 0) {
    close(*end);
  }
  *end = -1;
}

static int listen_there(struct ncclComm *comm)
{
  const struct sockaddr *here = (const struct sockaddr *)&comm->address;
  int end = comm->listening = new_socket();
  bool listens = end >= 0 && bind(end, here, sizeof comm->address) == 0 && listen(end, 1) == 0;
  return listens ? PS__NCCL_OK : fake_complain(INVALID_USAGE, "rank 0 joins a pair twice");
}

/* Rank 0 listens until rank 1 has come. */
static bool is_joined(struct ncclComm *comm)
{
  if (comm->connected >= 0) {
    return true;
  }
  if (comm->rank == 0) {
    comm->connected = accept4(comm->listening, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (comm->connected >= 0) {
      end_socket(&comm->listening);
    }
  } else {
    comm->connected = new_socket();
    if (comm->connected >= 0 &&
        connect(comm->connected, (struct sockaddr *)&comm->address, sizeof comm->address) != 0) {
      end_socket(&comm->connected);
    }
  }
  return comm->connected >= 0;
}

API int ncclCommInitRankConfig(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank,
                               ncclConfig_t *config)
{
  int result = enter("ncclCommInitRankConfig");
  if (result == PS__NCCL_OK) {
    result = check_init(ranks, &id, rank, config);
  }
  if (result != PS__NCCL_OK) {
    return leave(result);
  }
  struct ncclComm *joining = calloc(1, sizeof *joining);
  *joining = (struct ncclComm){.next = comms,
                               .address = {.sun_family = AF_UNIX},
                               .rank = rank,
                               .listening = -1,
                               .connected = -1};
  snprintf(joining->address.sun_path + 1, sizeof joining->address.sun_path - 1, "%.100s",
           id.internal);
  comms = *comm = joining;
  ++live;
  result = rank == 0 ? listen_there(joining) : PS__NCCL_OK;
  return leave(result == PS__NCCL_OK ? PS__NCCL_IN_PROGRESS : result);
}

static void let_go(struct ncclComm *comm)
{
  if (comm->stream != NULL) {
    comm->stream->claimed = false;
  }
  comm->stream = NULL;
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
  if (comm->later == 0) {
    let_go(comm);
  }
  *state = broken != 0                           ? broken
           : comm->error != 0                    ? comm->error
           : is_joined(comm) && comm->later == 0 ? PS__NCCL_OK
                                                 : PS__NCCL_IN_PROGRESS;
  return leave(PS__NCCL_OK);
}

/* What waits for the other end is over.  It takes its time, outside of the lock. */
API int ncclCommAbort(ncclComm_t comm)
{
  const struct timespec time = {abort_ms / 1000, abort_ms % 1000 * 1000000L};
  __atomic_add_fetch(&aborting, 1, __ATOMIC_SEQ_CST);
  nanosleep(&time, NULL);
  __atomic_sub_fetch(&aborting, 1, __ATOMIC_SEQ_CST);
  enter("ncclCommAbort");
  if (comm->aborted) {
    return leave(fake_complain(INVALID_USAGE, "aborting a communicator twice"));
  }
  comm->aborted = true;
  let_go(comm);
  end_socket(&comm->listening);
  end_socket(&comm->connected);
  --live;
  return leave(PS__NCCL_OK);
}

/* ---- send and receive ------------------------------------------------------------------------ */

typedef struct half {
  struct ncclComm *comm;
  void *p;
  size_t bytes;
  bool receives;
  uint64_t wanted;     /* by who receives: what goes ahead of the bytes, the other way */
  size_t ahead, moved; /* of wanted, of the bytes */
} half;

/* Moves what the socket takes or has; whether that was the last of it. */
static bool move(struct ncclComm *comm, bool out, void *p, size_t bytes, size_t *moved)
{
  while (*moved < bytes) {
    unsigned char *at = (unsigned char *)p + *moved;
    ssize_t some = out ? send(comm->connected, at, bytes - *moved, MSG_NOSIGNAL)
                       : recv(comm->connected, at, bytes - *moved, 0);
    if (some <= 0) {
      return false; /* not yet, or nobody is there any more */
    }
    *moved += (size_t)some;
  }
  return true;
}

/* One of the bytes that a message begins with. */
static void spoil(unsigned char *message, size_t bytes)
{
  enum { HEADER = 48 };
  if (spoil_at == 0) {
    return;
  }
  --spoil_at;
  if (spoil_at == 0) {
    message[fake_random(bytes < HEADER ? (uint32_t)bytes : HEADER)] ^= 0x55;
  }
}

static bool is_ready(void *data)
{
  half *own = data;
  struct ncclComm *comm = own->comm;
  if (comm->aborted) {
    return true;
  }
  if (comm->error != 0 ||
      !move(comm, own->receives, &own->wanted, sizeof own->wanted, &own->ahead)) {
    return false;
  }
  if (own->wanted != own->bytes) {
    comm->error = fake_complain(INVALID_USAGE, "%zu bytes sent where %zu are received", own->bytes,
                                (size_t)own->wanted);
    return false;
  }
  void *here = fake_translate(own->p, own->bytes);
  bool there = own->moved == own->bytes;
  if (here != NULL && !there && move(comm, !own->receives, here, own->bytes, &own->moved)) {
    there = true;
    if (own->receives) {
      spoil(here, own->bytes);
    }
  }
  return here == NULL || there;
}

static int check_call(struct ncclComm *comm, size_t count, int type, int peer,
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

static int give(struct ncclComm *comm, bool receives, void *p, size_t count, int type, int peer,
                CUstream handle)
{
  fake_stream_state *stream = (fake_stream_state *)handle;
  int result = check_call(comm, count, type, peer, stream);
  if (result != PS__NCCL_OK) {
    return result;
  }
  half *own = malloc(sizeof *own);
  *own = (half){comm, p, count, receives, receives ? count : 0, 0, 0};
  fake_range range = {p, count, receives};
  int error =
      fake_give_when(stream, receives ? "receiving" : "sending", &range, 1, is_ready, NULL, own);
  comm->later = fake_random(3);
  if (comm->later > 0) {
    comm->stream = stream;
    stream->claimed = true;
  }
  return error != FAKE_OK ? INVALID_USAGE : comm->later > 0 ? PS__NCCL_IN_PROGRESS : PS__NCCL_OK;
}

API int ncclSend(const void *from, size_t count, int type, int peer, ncclComm_t comm,
                 CUstream stream)
{
  int result = enter("ncclSend");
  return leave(result != PS__NCCL_OK ? result
                                     : give(comm, false, (void *)from, count, type, peer, stream));
}

API int ncclRecv(void *to, size_t count, int type, int peer, ncclComm_t comm, CUstream stream)
{
  int result = enter("ncclRecv");
  return leave(result != PS__NCCL_OK ? result : give(comm, true, to, count, type, peer, stream));
}
