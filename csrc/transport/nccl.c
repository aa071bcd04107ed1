/* nccl.c - the transport for ranks on CUDA devices of two processes: ncclSend and ncclRecv.
 *
 * leader.c and follower.c use an end through ps_link_ops; whoever starts processes connects pairs.
 * All work is on a stream of the pair's own, in order with the backend's by events, and messages of
 * a run have one size each way: header, then points, or outputs and points, in one block of the
 * device.  No call waits for the other end but connect, collect and take, which poll; a wait that
 * nobody ends is ended by aborting the communicator, which costs that follower alone.
 */
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "backend/cuda.h"
#include "core/internal.h"
#include "transport/nccl_api.h"

/* ---- the library ----------------------------------------------------------------------------- */

static ps__nccl_api nccl;

static const char *const sonames[] = {"libnccl.so.2", "libnccl.so", NULL};

static const ps__dl_entry entries[] = {
#define X(field, symbol, optional, arguments) {#symbol, offsetof(ps__nccl_api, field), optional},
    PS__NCCL_MAP(X)
#undef X
};

static ps__dl_library library = {
    .what = "NCCL",
    .sonames = sonames,
    .entries = entries,
    .count = sizeof entries / sizeof *entries,
    .table = &nccl,
};

static ps_status load(int *version)
{
  ps_status status = ps__dl_load(&library);
  *version = 0;
  if (status == PS_OK && nccl.version(version) != PS__NCCL_OK) {
    status = ps__fail(PS_UNSUPPORTED, "NCCL does not tell its version");
  }
  if (status == PS_OK && *version < PS__NCCL_OLDEST) {
    status = ps__fail(PS_UNSUPPORTED, "NCCL %d.%d is too old: 2.18 or later is needed",
                      *version / 10000, *version / 100 % 100);
  }
  return status;
}

int ps_nccl_version(void)
{
  int version;
  return load(&version) == PS_OK ? version : 0;
}

ps_status ps_nccl_id(unsigned char *id)
{
  ncclUniqueId made;
  int version;
  ps_status status = load(&version);
  if (status == PS_OK && nccl.unique_id(&made) != PS__NCCL_OK) {
    status = ps__fail(PS_UNSUPPORTED, "NCCL makes no id for a pair; is a network interface up?");
  }
  if (status == PS_OK) {
    memcpy(id, &made, sizeof made);
  }
  return status;
}

/* ---- pairs ----------------------------------------------------------------------------------- */

struct ps_pair {
  int references; /* the caller's, and that of a link; changed atomically */
  ps_role role;
  ps__cuda_rank *rank; /* retained */
  CUstream stream;
  ncclComm_t comm; /* NULL once it is aborted */
  bool linked;
  int lost; /* changed atomically; why is written before it */
  char why[160];
};

static bool is_lost(const ps_pair *pair)
{
  return __atomic_load_n(&pair->lost, __ATOMIC_ACQUIRE) == 2;
}

void ps_nccl_lost(ps_pair *pair, const char *why)
{
  int none = 0;
  if (__atomic_compare_exchange_n(&pair->lost, &none, 1, false, __ATOMIC_ACQ_REL,
                                  __ATOMIC_ACQUIRE)) {
    snprintf(pair->why, sizeof pair->why, "%s", why);
    __atomic_store_n(&pair->lost, 2, __ATOMIC_RELEASE);
  }
}

typedef struct doomed {
  ncclComm_t comm;
  const ps__device *device;
} doomed;

static void *abort_comm(void *ctx)
{
  doomed *it = ctx;
  ps__scope scope;
  if (ps__device_enter(it->device, &scope) == PS_OK) {
    nccl.abort(it->comm);
    ps__device_leave(&scope);
  }
  ps__free(it);
  return NULL;
}

/* Aborting may take its time, or for ever where the driver hangs: a thread of its own waits for it.
 * Where there is none to be had, the communicator is left behind. */
static void abort_apart(ps_pair *pair)
{
  pthread_t thread;
  doomed *it = pair->comm != NULL ? ps__alloc(sizeof *it) : NULL;
  if (it == NULL) {
    return;
  }
  *it = (doomed){pair->comm, pair->rank->device};
  pair->comm = NULL;
  if (pthread_create(&thread, NULL, abort_comm, it) == 0) {
    pthread_detach(thread);
  } else {
    ps__free(it);
  }
}

static ps_status lose(ps_pair *pair, const char *why)
{
  ps_nccl_lost(pair, why);
  abort_apart(pair);
  return ps__fail(PS_LOST, "%s", is_lost(pair) ? pair->why : why);
}

static void release(ps_pair *pair)
{
  if (__atomic_sub_fetch(&pair->references, 1, __ATOMIC_ACQ_REL) == 0) {
    abort_apart(pair);
    ps__stream_free(pair->rank->device, pair->stream);
    pair->rank->base.release(&pair->rank->base);
    ps__free(pair);
  }
}

void ps_nccl_close(ps_pair *pair)
{
  if (pair != NULL) {
    release(pair);
  }
}

/* ---- waiting --------------------------------------------------------------------------------- */

/* What a wait of the pair looks at between slices, besides what the caller wants. */
typedef struct watch {
  ps_pair *pair;
  const ps_wait *wait; /* the caller's, or NULL */
  bool failed;         /* the communicator has */
} watch;

static int look(void *ctx)
{
  watch *w = ctx;
  int result = PS__NCCL_OK;
  if (is_lost(w->pair) || w->pair->comm == NULL) {
    return 1;
  }
  w->failed = nccl.async_error(w->pair->comm, &result) != PS__NCCL_OK ||
              (result != PS__NCCL_OK && result != PS__NCCL_IN_PROGRESS);
  return w->failed || (w->wait != NULL && w->wait->check != NULL && w->wait->check(w->wait->ctx));
}

static ps_status judge(const watch *w, ps_status status)
{
  if (status == PS_INTERRUPTED && w->failed) {
    return lose(w->pair, "NCCL reports an error of the connection");
  }
  return status == PS_INTERRUPTED && is_lost(w->pair) ? lose(w->pair, w->pair->why) : status;
}

static ps_status wait_event(ps_pair *pair, CUevent event, const ps_wait *wait)
{
  watch w = {pair, wait, false};
  ps_wait ours = {wait != NULL ? wait->deadline_ns : 0, look, &w};
  return judge(&w, ps__device_wait(pair->rank->device, event, &ours));
}

static void nap(void)
{
  const struct timespec pause = {0, 50 * 1000};
  nanosleep(&pause, NULL);
}

/* A call of a communicator that does not block is over when it is no more in progress.  Outside of
 * the device's scope, since check may run code of others. */
static ps_status finish_call(ps_pair *pair, int result, const ps_wait *wait, const char *what)
{
  const int64_t slice_ns = 50 * 1000 * 1000;
  int64_t slice_end = ps_now_ns() + slice_ns;
  while (result == PS__NCCL_IN_PROGRESS) {
    int64_t now = ps_now_ns();
    if (is_lost(pair)) {
      return lose(pair, pair->why);
    }
    if (wait->deadline_ns != 0 && now >= wait->deadline_ns) {
      return ps__fail(PS_DEADLINE, "the deadline passed while %s", what);
    }
    if (now >= slice_end) {
      slice_end = now + slice_ns;
      if (wait->check != NULL && wait->check(wait->ctx)) {
        return ps__fail(PS_INTERRUPTED, "interrupted while %s", what);
      }
    }
    nap();
    if (nccl.async_error(pair->comm, &result) != PS__NCCL_OK) {
      break;
    }
  }
  if (result != PS__NCCL_OK) {
    char words[96];
    snprintf(words, sizeof words, "NCCL fails with %d while %s", result, what);
    return lose(pair, words);
  }
  return PS_OK;
}

/* Launching never waits for the other end, but may for this process's own threads. */
static ps_status transfer(ps_pair *pair, bool send, void *p, size_t bytes)
{
  const int64_t patience_ns = INT64_C(10) * 1000000000;
  ps_wait wait = {ps_now_ns() + patience_ns, NULL, NULL};
  int peer = pair->role == PS_LEADS ? 1 : 0;
  ps__scope scope;
  if (pair->comm == NULL) {
    return lose(pair, "the connection was given up");
  }
  ps_status status = ps__device_enter(pair->rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  int result = send ? nccl.send(p, bytes, PS__NCCL_BYTES, peer, pair->comm, pair->stream)
                    : nccl.recv(p, bytes, PS__NCCL_BYTES, peer, pair->comm, pair->stream);
  ps__device_leave(&scope);
  return finish_call(pair, result, &wait, send ? "sending" : "receiving");
}

/* ---- connecting ------------------------------------------------------------------------------ */

static ps_status init(ps_pair *pair, const unsigned char *id, const ps_wait *wait)
{
  ncclUniqueId there;
  ncclConfig_t config = {
      .size = sizeof config,
      .magic = (unsigned)PS__NCCL_MAGIC,
      .version = PS__NCCL_OLDEST,
      .blocking = 0,
      .cgaClusterSize = PS__NCCL_UNDEFINED,
      .minCTAs = PS__NCCL_UNDEFINED,
      .maxCTAs = 4, /* a latent of a few MB needs no more, and the rest is the model's */
      .splitShare = PS__NCCL_UNDEFINED,
  };
  ps__scope scope;
  memcpy(&there, id, sizeof there);
  ps_status status = ps__device_enter(pair->rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  int result = nccl.init(&pair->comm, 2, there, pair->role == PS_LEADS ? 0 : 1, &config);
  if (result != PS__NCCL_OK && result != PS__NCCL_IN_PROGRESS) {
    nccl.group_end(); /* an early failure leaves the library's group open in this thread */
  }
  ps__device_leave(&scope);
  return finish_call(pair, result, wait, "connecting to the other rank");
}

/* Puts the event behind all work of the pair. */
static ps_status mark(const ps_pair *pair, CUevent event)
{
  const ps__device *device = pair->rank->device;
  ps__scope scope;
  ps_status status = ps__device_enter(device, &scope);
  if (status == PS_OK) {
    status = ps__cuda_check(device, ps__cuda.event_record(event, pair->stream), "an event");
    ps__device_leave(&scope);
  }
  return status;
}

/* The first messages connect for good, which a round should not wait for. */
static ps_status greet(ps_pair *pair, const ps_wait *wait)
{
  enum { BYTES = 64 };
  CUdeviceptr block;
  CUevent done;
  ps__device *device = pair->rank->device;
  bool leads = pair->role == PS_LEADS;
  ps_status status = ps__event_new(device, &done);
  if (status != PS_OK) {
    return status;
  }
  status = ps__device_alloc(device, BYTES, &block);
  if (status == PS_OK) {
    status = transfer(pair, leads, (void *)(uintptr_t)block, BYTES);
    status = status == PS_OK ? transfer(pair, !leads, (void *)(uintptr_t)block, BYTES) : status;
    ps_status marked = mark(pair, done); /* the block is freed behind it, whatever came of these */
    status = status == PS_OK ? marked : status;
    status = status == PS_OK ? wait_event(pair, done, wait) : status;
    ps__device_free_after(device, done);
    ps__device_free(device, block);
  }
  ps__event_free(device, done);
  return status;
}

ps_status ps_nccl_connect(const unsigned char *id, ps_role role, const ps_backend *backend,
                          const ps_wait *wait, ps_pair **out)
{
  static const ps_wait forever = {0, NULL, NULL};
  int version;
  *out = NULL;
  wait = wait != NULL ? wait : &forever;
  if (strcmp(backend->name, "cuda") != 0) {
    return ps__fail(PS_DEVICE, "NCCL joins CUDA devices, and this rank is on %s", backend->name);
  }
  ps_status status = load(&version);
  ps_pair *pair = status == PS_OK ? ps__alloc(sizeof *pair) : NULL;
  if (pair == NULL) {
    return status != PS_OK ? status : PS_NO_MEMORY;
  }
  *pair = (ps_pair){.references = 1, .role = role, .rank = ps__cuda_rank_of(backend)};
  backend->retain(backend);
  status = ps__stream_new(pair->rank->device, &pair->stream);
  status = status == PS_OK ? init(pair, id, wait) : status;
  status = status == PS_OK ? greet(pair, wait) : status;
  if (status != PS_OK) {
    release(pair);
    return status;
  }
  *out = pair;
  return PS_OK;
}

/* ---- a run's end ----------------------------------------------------------------------------- */

typedef enum end_state {
  IDLE,    /* nothing is on its way */
  AWAITED, /* a message is to arrive, its receive is in the stream */
  TAKEN,   /* follower: it is at work */
} end_state;

/* The block: work (header, points), then reply (header, outputs, points).  Headers go through the
 * host: sent is what this end says, got what it hears. */
typedef struct end {
  ps_link base;
  ps__mortal mortal;
  ps_pair *pair;
  ps_layout layout;
  end_state state;
  bool done; /* DONE was said, or heard */
  size_t head, point, output;
  CUdeviceptr block;
  ps_header *sent, *got; /* pinned */
  CUevent arrived;       /* got is filled */
  CUevent last;          /* behind all work of this end */
} end;

static end *end_of(ps_link *link)
{
  return (end *)link;
}

static CUdeviceptr reply_of(const end *own)
{
  return own->block + own->head + (size_t)own->base.slots * own->point;
}

static size_t work_bytes(const end *own)
{
  return own->head + (size_t)own->base.slots * own->point;
}

static size_t reply_bytes(const end *own)
{
  return own->head + (size_t)own->base.slots * (own->output + own->point);
}

/* The points of a reply that says MOVED. */
static CUdeviceptr moved_of(const end *own)
{
  return reply_of(own) + own->head + (size_t)own->base.slots * own->output;
}

static void *link_point(ps_link *link, int slot)
{
  const end *own = end_of(link);
  return (void *)(uintptr_t)(own->block + own->head + (size_t)slot * own->point);
}

static void *link_output(ps_link *link, int slot)
{
  const end *own = end_of(link);
  return (void *)(uintptr_t)(reply_of(own) + own->head + (size_t)slot * own->output);
}

/* Behind all work of the backend: the points if moved, and the header. */
static ps_status prepare(end *own, CUdeviceptr to, const ps_header *message)
{
  const ps__cuda_rank *rank = own->pair->rank;
  CUstream stream = own->pair->stream;
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  *own->sent = *message;
  CUresult result = ps__cuda.stream_wait(stream, rank->done, 0);
  if (result == PS__CUDA_OK && message->kind == PS_MSG_OUTPUT && message->flags & PS_FLAG_MOVED) {
    result = ps__cuda.copy(moved_of(own), own->block + own->head,
                           (size_t)own->base.slots * own->point, stream);
  }
  if (result == PS__CUDA_OK) {
    result = ps__cuda.copy_from_host(to, own->sent, sizeof *own->sent, stream);
  }
  ps__device_leave(&scope);
  return ps__cuda_check(rank->device, result, "preparing a message");
}

static ps_status say(end *own, CUdeviceptr at, size_t bytes, const ps_header *message)
{
  if (is_lost(own->pair)) {
    return lose(own->pair, own->pair->why);
  }
  ps_status status = prepare(own, at, message);
  return status == PS_OK ? transfer(own->pair, true, (void *)(uintptr_t)at, bytes) : status;
}

/* Puts the receive of the next message into the stream. */
static ps_status expect(end *own, CUdeviceptr at, size_t bytes)
{
  const ps__cuda_rank *rank = own->pair->rank;
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status == PS_OK) { /* what the backend still reads of the last message stays until then */
    CUresult result = ps__cuda.stream_wait(own->pair->stream, rank->done, 0);
    ps__device_leave(&scope);
    status = ps__cuda_check(rank->device, result, "waiting for the backend");
  }
  status = status == PS_OK ? transfer(own->pair, false, (void *)(uintptr_t)at, bytes) : status;
  if (status == PS_OK && (status = ps__device_enter(rank->device, &scope)) == PS_OK) {
    CUresult result = ps__cuda.copy_to_host(own->got, at, sizeof *own->got, own->pair->stream);
    ps__device_leave(&scope);
    status = ps__cuda_check(rank->device, result, "reading a header");
  }
  status = status == PS_OK ? mark(own->pair, own->arrived) : status;
  own->state = status == PS_OK ? AWAITED : own->state;
  return status;
}

/* What arrived is in order before further work of the backend; moved points take their place. */
static ps_status take_over(end *own, const ps_header *message)
{
  ps__cuda_rank *rank = own->pair->rank;
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  CUresult result = ps__cuda.stream_wait(rank->stream, own->arrived, 0);
  ps__device_leave(&scope);
  status = ps__cuda_check(rank->device, result, "waiting for a message");
  if (status == PS_OK && message->kind == PS_MSG_OUTPUT && message->flags & PS_FLAG_MOVED) {
    status =
        rank->base.copy(&rank->base, link_point(&own->base, 0), (void *)(uintptr_t)moved_of(own),
                        (size_t)own->base.slots * own->point);
  }
  return status;
}

static ps_status hear(end *own, const ps_wait *wait, ps_header *message)
{
  ps_status status = wait_event(own->pair, own->arrived, wait);
  if (status == PS_OK) {
    *message = *own->got;
    own->state = IDLE;
    status = take_over(own, message);
  }
  return status;
}

/* ---- leader ---------------------------------------------------------------------------------- */

static ps_status leader_post(ps_link *link, const ps_header *message)
{
  end *own = end_of(link);
  if (own->state != IDLE || own->done) {
    return ps__fail(PS_STATE, "a message before the reply to the last one");
  }
  ps_status status = say(own, own->block, work_bytes(own), message);
  own->done = status == PS_OK && message->kind == PS_MSG_DONE;
  if (status == PS_OK && message->kind == PS_MSG_WORK) {
    status = expect(own, reply_of(own), reply_bytes(own));
  }
  return status;
}

static ps_status leader_collect(ps_link *link, const ps_wait *wait, ps_header *reply)
{
  end *own = end_of(link);
  return own->state == AWAITED ? hear(own, wait, reply)
                               : ps__fail(PS_STATE, "collecting the reply to no message");
}

/* ---- follower -------------------------------------------------------------------------------- */

static ps_status follower_take(ps_link *link, const ps_wait *wait, ps_header *message)
{
  end *own = end_of(link);
  ps_status status = PS_OK;
  if (own->done) {
    *message = (ps_header){.magic = PS_MAGIC, .version = PS_WIRE_VERSION, .kind = PS_MSG_DONE};
    return PS_OK;
  }
  if (own->state == TAKEN) {
    return ps__fail(PS_STATE, "taking a message before the reply to the last one");
  }
  if (is_lost(own->pair)) {
    return lose(own->pair, own->pair->why);
  }
  if (own->state == IDLE) {
    status = expect(own, own->block, work_bytes(own));
  }
  if (status == PS_OK) {
    status = hear(own, wait, message);
  }
  if (status == PS_OK) {
    own->done = message->kind == PS_MSG_DONE;
    own->state = message->kind == PS_MSG_WORK ? TAKEN : IDLE;
  }
  return status;
}

static ps_status follower_reply(ps_link *link, const ps_header *reply)
{
  end *own = end_of(link);
  if (own->state != TAKEN) {
    return ps__fail(PS_STATE, "a reply to no message");
  }
  own->state = IDLE;
  ps_status status = say(own, reply_of(own), reply_bytes(own), reply);
  return status == PS_LOST ? ps__fail(PS_ABANDONED, "the leader went on without this follower")
                           : status;
}

/* ---- life ------------------------------------------------------------------------------------ */

static end *dead_end(const ps__mortal *mortal)
{
  return (end *)((char *)mortal - offsetof(end, mortal));
}

static bool has_ended(const ps__mortal *mortal)
{
  const end *own = dead_end(mortal);
  return ps__event_reached(own->pair->rank->device, own->last);
}

static void destroy(ps__mortal *mortal)
{
  end *own = dead_end(mortal);
  ps__device *device = own->pair->rank->device;
  if (own->block != 0) {
    ps__device_free_after(device, own->pair->rank->done);
    ps__device_free_after(device, own->last);
    ps__device_free(device, own->block);
  }
  if (own->sent != NULL) {
    ps__pinned_free(device, own->sent);
  }
  ps__event_free(device, own->arrived);
  ps__event_free(device, own->last);
  release(own->pair);
  ps__free(own);
}

/* Where the run did not end as it should, something may be on its way that nobody takes: only an
 * end of the communicator ends that. */
static void link_close(ps_link *link)
{
  static const ps_header done = {
      .magic = PS_MAGIC, .version = PS_WIRE_VERSION, .kind = PS_MSG_DONE};
  end *own = end_of(link);
  if (own->pair->role == PS_LEADS && own->state == IDLE && !own->done) {
    own->done = leader_post(link, &done) == PS_OK;
  }
  if (!own->done || own->state != IDLE) {
    lose(own->pair, "the run ended before its last message");
  }
  mark(own->pair, own->last);
  own->pair->linked = false;
  ps__bury(&own->mortal);
}

static const ps_link_ops leader_ops = {
    .transport = "nccl",
    .point = link_point,
    .output = link_output,
    .post = leader_post,
    .collect = leader_collect,
    .close = link_close,
};

static const ps_link_ops follower_ops = {
    .transport = "nccl",
    .point = link_point,
    .output = link_output,
    .take = follower_take,
    .reply = follower_reply,
    .close = link_close,
};

static ps_status furnish(end *own)
{
  ps__device *device = own->pair->rank->device;
  size_t room = SIZE_MAX / PS_SLOTS_MAX / 4;
  void *headers = NULL;
  own->head = ps__vector_bytes(sizeof(ps_header));
  own->point = ps__vector_bytes(ps__x_bytes(&own->layout));
  own->output = ps__vector_bytes(ps__m_bytes(&own->layout));
  if (own->point > room || own->output > room) {
    return ps__fail(PS_NO_MEMORY, "latents of %zu bytes do not fit in memory",
                    ps__x_bytes(&own->layout));
  }
  ps_status status = ps__event_new(device, &own->arrived);
  status = status == PS_OK ? ps__event_new(device, &own->last) : status;
  if (status == PS_OK) {
    status = ps__device_alloc(device, work_bytes(own) + reply_bytes(own), &own->block);
  }
  if (status == PS_OK) {
    status = ps__pinned_alloc(device, 2 * sizeof(ps_header), &headers);
  }
  own->sent = headers;
  own->got = own->sent != NULL ? own->sent + 1 : NULL;
  return status;
}

ps_status ps_nccl_open(ps_pair *pair, const ps_layout *layout, int slots, ps_link **link)
{
  *link = NULL;
  ps__bury(NULL);
  ps_status status = ps__layout_check(layout);
  if (status == PS_OK && (slots < 1 || slots > PS_SLOTS_MAX)) {
    status = ps__fail(PS_INVALID, "%d slots: must be 1 to %d", slots, PS_SLOTS_MAX);
  }
  if (status == PS_OK && is_lost(pair)) {
    status = lose(pair, pair->why);
  }
  if (status == PS_OK && pair->linked) {
    status = ps__fail(PS_STATE, "the pair has a link of another run");
  }
  end *own = status == PS_OK ? ps__alloc(sizeof *own) : NULL;
  if (own == NULL) {
    return status != PS_OK ? status : PS_NO_MEMORY;
  }
  own->base =
      (ps_link){.ops = pair->role == PS_LEADS ? &leader_ops : &follower_ops, .slots = slots};
  own->mortal = (ps__mortal){.has_ended = has_ended, .destroy = destroy};
  own->pair = pair;
  own->layout = *layout;
  __atomic_add_fetch(&pair->references, 1, __ATOMIC_ACQ_REL);
  status = furnish(own);
  if (status != PS_OK) {
    destroy(&own->mortal);
    return status;
  }
  pair->linked = true;
  *link = &own->base;
  return PS_OK;
}
