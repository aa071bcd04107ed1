/* pair.c - communicators of two ranks: NCCL's library, connecting, sending, waiting, giving up.
 *
 * Whoever starts processes connects pairs and keeps them from run to run; nccl.c sends a run's
 * messages over them.  Nothing waits for the other end but connect and ps__pair_wait, which poll; a
 * wait that nobody ends is ended by aborting the communicator, which costs that follower alone.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "transport/pair.h"

/* ---- the library ----------------------------------------------------------------------------- */

static ps__nccl_api nccl;

PS__DL_DESCRIBE(library, "NCCL", ps__nccl_api, PS__NCCL_MAP, &nccl, "libnccl.so.2", "libnccl.so");

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

bool ps__pair_is_lost(const ps_pair *pair)
{
  return __atomic_load_n(&pair->lost, __ATOMIC_ACQUIRE) == 2;
}

static void lose(ps_pair *pair, ps_status how, const char *why)
{
  int none = 0;
  if (__atomic_compare_exchange_n(&pair->lost, &none, 1, false, __ATOMIC_ACQ_REL,
                                  __ATOMIC_ACQUIRE)) {
    pair->how = how;
    snprintf(pair->why, sizeof pair->why, "%s", why);
    __atomic_store_n(&pair->lost, 2, __ATOMIC_RELEASE);
  }
}

void ps_nccl_lost(ps_pair *pair, const char *why)
{
  lose(pair, PS_LOST, why);
}

void ps_nccl_failed(ps_pair *pair, const char *why)
{
  lose(pair, PS_FAILED, why);
}

/* How many communicators are being aborted by threads that nobody joins. */
static struct {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  pthread_once_t registered;
  pid_t process; /* whose threads they are: a forked child has none of them */
  int count;
} aborts = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_ONCE_INIT, 0, 0};

/* At the process's exit, ahead of the libraries' own: NCCL at work while those of CUDA are torn
 * down would crash what has done its work.  One that hangs is not waited for longer than that. */
static void await_aborts(void)
{
  struct timespec until;
  int error = 0;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 2;
  pthread_mutex_lock(&aborts.lock);
  while (aborts.process == getpid() && aborts.count > 0 && error == 0) {
    error = pthread_cond_timedwait(&aborts.changed, &aborts.lock, &until);
  }
  pthread_mutex_unlock(&aborts.lock);
}

/* Those registered last are called first, and the libraries were loaded before this. */
static void await_aborts_at_exit(void)
{
  atexit(await_aborts);
}

static void count_aborts(int more)
{
  pthread_mutex_lock(&aborts.lock);
  aborts.count = more + (aborts.process == getpid() ? aborts.count : 0);
  aborts.process = getpid();
  pthread_cond_broadcast(&aborts.changed);
  pthread_mutex_unlock(&aborts.lock);
}

typedef struct doomed {
  ncclComm_t comm;
  const ps__device *device;
} doomed;

static void *abort_comm(void *ctx)
{
  doomed it = *(const doomed *)ctx;
  ps__scope scope;
  ps__free(ctx); /* ahead of what may not return */
  if (ps__device_enter(it.device, &scope) == PS_OK) {
    nccl.abort(it.comm);
    ps__device_leave(&scope);
  }
  count_aborts(-1);
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
  pthread_once(&aborts.registered, await_aborts_at_exit);
  count_aborts(1);
  if (pthread_create(&thread, NULL, abort_comm, it) == 0) {
    pthread_detach(thread);
  } else {
    count_aborts(-1);
    ps__free(it);
  }
}

ps_status ps__pair_lose(ps_pair *pair, const char *why)
{
  ps_nccl_lost(pair, why);
  abort_apart(pair);
  return ps__pair_is_lost(pair) ? ps__fail(pair->how, "%s", pair->why)
                                : ps__fail(PS_LOST, "%s", why);
}

void ps__pair_release(ps_pair *pair)
{
  if (__atomic_sub_fetch(&pair->references, 1, __ATOMIC_ACQ_REL) == 0) {
    abort_apart(pair);
    ps__stream_free(pair->rank->device, pair->stream);
    pair->rank->base.release(&pair->rank->base);
    ps__free(pair);
  }
}

void ps__pair_retain(ps_pair *pair)
{
  __atomic_add_fetch(&pair->references, 1, __ATOMIC_ACQ_REL);
}

int ps_nccl_alive(const ps_pair *pair)
{
  return __atomic_load_n(&pair->lost, __ATOMIC_ACQUIRE) == 0;
}

/* What a run has left in the stream of a pair that is lost ends with the communicator alone. */
void ps_nccl_close(ps_pair *pair)
{
  if (pair != NULL) {
    if (ps__pair_is_lost(pair) && !__atomic_load_n(&pair->linked, __ATOMIC_ACQUIRE)) {
      abort_apart(pair);
    }
    __atomic_store_n(&pair->closed_ns, ps_now_ns(), __ATOMIC_RELEASE);
    ps__bury(NULL); /* the last run's end holds the pair too, until it is looked at again */
    ps__pair_release(pair);
  }
}

/* A leader's last word, where its follower has left without it.  Called under the lock of what is
 * to be destroyed, when nobody else uses the pair any more. */
void ps__pair_expire(ps_pair *pair)
{
  const int64_t patience_ns = INT64_C(1000000000);
  int64_t closed_ns = __atomic_load_n(&pair->closed_ns, __ATOMIC_ACQUIRE);
  if (closed_ns != 0 && ps_now_ns() - closed_ns > patience_ns) {
    abort_apart(pair);
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
  if (ps__pair_is_lost(w->pair) || w->pair->comm == NULL) {
    return 1;
  }
  w->failed = nccl.async_error(w->pair->comm, &result) != PS__NCCL_OK ||
              (result != PS__NCCL_OK && result != PS__NCCL_IN_PROGRESS);
  return w->failed || (w->wait != NULL && w->wait->check != NULL && w->wait->check(w->wait->ctx));
}

static ps_status judge(const watch *w, ps_status status)
{
  if (status == PS_INTERRUPTED && w->failed) {
    return ps__pair_lose(w->pair, "NCCL reports an error of the connection");
  }
  return status == PS_INTERRUPTED && ps__pair_is_lost(w->pair)
             ? ps__pair_lose(w->pair, w->pair->why)
             : status;
}

ps_status ps__pair_wait(ps_pair *pair, CUevent event, const ps_wait *wait)
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
  enum { AT_ONCE = 16 };
  const int64_t slice_ns = 50 * 1000 * 1000;
  int64_t slice_end = ps_now_ns() + slice_ns;
  int looks = 0;
  while (result == PS__NCCL_IN_PROGRESS) {
    int64_t now = ps_now_ns();
    if (ps__pair_is_lost(pair)) {
      return ps__pair_lose(pair, pair->why);
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
    if (++looks > AT_ONCE) { /* it may be over already */
      nap();
    }
    if (nccl.async_error(pair->comm, &result) != PS__NCCL_OK) {
      break;
    }
  }
  if (result != PS__NCCL_OK) {
    char words[96];
    snprintf(words, sizeof words, "NCCL fails with %d while %s", result, what);
    return ps__pair_lose(pair, words);
  }
  return PS_OK;
}

/* Gives NCCL the call and returns what it says of it. */
static ps_status start(ps_pair *pair, bool send, void *p, size_t bytes, int *result)
{
  int peer = pair->role == PS_LEADS ? 1 : 0;
  ps__scope scope;
  *result = PS__NCCL_OK;
  if (pair->comm == NULL) {
    return ps__pair_lose(pair, "the connection was given up");
  }
  ps_status status = ps__device_enter(pair->rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  *result = send ? nccl.send(p, bytes, PS__NCCL_BYTES, peer, pair->comm, pair->stream)
                 : nccl.recv(p, bytes, PS__NCCL_BYTES, peer, pair->comm, pair->stream);
  ps__device_leave(&scope);
  return PS_OK;
}

/* May wait for this process's own threads. */
static ps_status finish(ps_pair *pair, bool send, int result, const ps_wait *wait)
{
  ps_status status = finish_call(pair, result, wait, send ? "sending" : "receiving");
  return status == PS_DEADLINE ? ps__pair_lose(pair, ps_last_error()) : status;
}

static ps_status transfer(ps_pair *pair, bool send, void *p, size_t bytes, const ps_wait *wait)
{
  int result;
  ps_status status = start(pair, send, p, bytes, &result);
  return status == PS_OK ? finish(pair, send, result, wait) : status;
}

static ps_wait soon(void)
{
  const int64_t patience_ns = INT64_C(10) * 1000000000;
  return (ps_wait){ps_now_ns() + patience_ns, NULL, NULL};
}

ps_status ps__pair_ready(ps_pair *pair)
{
  const ps_wait wait = soon();
  if (pair->comm == NULL) {
    return ps__pair_lose(pair, "the connection was given up");
  }
  if (!pair->pending) {
    return PS_OK;
  }
  pair->pending = false;
  return finish(pair, true, PS__NCCL_IN_PROGRESS, &wait);
}

ps_status ps__pair_transfer(ps_pair *pair, bool send, void *p, size_t bytes)
{
  const ps_wait wait = soon();
  int result;
  ps_status status = ps__pair_ready(pair);
  if (status == PS_OK) {
    status = start(pair, send, p, bytes, &result);
  }
  if (status == PS_OK && send && result == PS__NCCL_IN_PROGRESS) {
    pair->pending = true;
    return PS_OK;
  }
  return status == PS_OK ? finish(pair, send, result, &wait) : status;
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

/* Whatever came of a send: what is freed behind the event must not be so earlier. */
ps_status ps__pair_mark(ps_pair *pair, CUevent event)
{
  const ps__device *device = pair->rank->device;
  ps__scope scope;
  ps_status ready = ps__pair_ready(pair);
  ps_status status = ps__device_enter(device, &scope);
  if (status == PS_OK) {
    status = ps__cuda_check(device, ps__cuda.event_record(event, pair->stream), "an event");
    ps__device_leave(&scope);
  }
  return ready == PS_OK ? status : ready;
}

/* The first messages connect for good and load NCCL's code, which a round should not wait for. */
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
    status = transfer(pair, leads, (void *)(uintptr_t)block, BYTES, wait);
    status =
        status == PS_OK ? transfer(pair, !leads, (void *)(uintptr_t)block, BYTES, wait) : status;
    ps_status marked =
        ps__pair_mark(pair, done); /* the block is freed behind it, whatever came of these */
    status = status == PS_OK ? marked : status;
    status = status == PS_OK ? ps__pair_wait(pair, done, wait) : status;
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
    ps__pair_release(pair);
    return status;
  }
  *out = pair;
  return PS_OK;
}
