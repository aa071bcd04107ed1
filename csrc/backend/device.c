/* device.c - CUDA devices: the driver's table, contexts, kernels, memory in order of streams.
 *
 * Called by cuda.c and cuda_mirror.c.  Nothing here waits for a device but ps__device_wait, which
 * is sliced, and the alloc and free of drivers without memory pools.
 */
#include <pthread.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "backend/device.h"

ps__cuda_api ps__cuda;

PS__DL_DESCRIBE(driver, "the CUDA driver", ps__cuda_api, PS__CUDA_MAP, &ps__cuda, "libcuda.so.1",
                "libcuda.so");

/* Taken when devices are opened or introduced to each other, never in a round. */
static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static ps__device devices[PS__DEVICES_MAX];
static pid_t process; /* that has opened any; the driver does not survive a fork */

/* ---- errors ---------------------------------------------------------------------------------- */

ps_status ps__cuda_check(const ps__device *device, CUresult result, const char *what)
{
  const char *name = NULL;
  if (result == PS__CUDA_OK) {
    return PS_OK;
  }
  ps__cuda.error_name(result, &name);
  return ps__fail(result == PS__CUDA_NO_MEMORY ? PS_NO_MEMORY : PS_DEVICE,
                  "cuda:%d: %s: %s (error %d of the driver)", device != NULL ? device->ordinal : 0,
                  what, name != NULL ? name : "unknown", (int)result);
}

/* ---- scopes ---------------------------------------------------------------------------------- */

ps_status ps__device_enter(const ps__device *device, ps__scope *scope)
{
  ps_status status =
      ps__cuda_check(device, ps__cuda.context_push(device->context), "entering its context");
  scope->mode = PS__CUDA_RELAXED;
  if (status == PS_OK) {
    ps__cuda.exchange_capture_mode(&scope->mode);
  }
  return status;
}

void ps__device_leave(ps__scope *scope)
{
  CUcontext ours;
  ps__cuda.exchange_capture_mode(&scope->mode);
  ps__cuda.context_pop(&ours);
}

/* ---- opening --------------------------------------------------------------------------------- */

/* Under the lock. */
static ps_status start_driver(int *count)
{
  ps_status status = ps__dl_load(&driver);
  *count = 0;
  if (status == PS_OK && process != 0 && process != getpid()) {
    status = ps__fail(PS_STATE, "CUDA was used before this process was forked, and does not work "
                                "in it; start processes with \"spawn\"");
  }
  if (status == PS_OK) {
    CUresult result = ps__cuda.init(0);
    if (result == PS__CUDA_NO_DEVICE) {
      return PS_OK;
    }
    status = ps__cuda_check(NULL, result, "starting the driver");
  }
  if (status == PS_OK) {
    status = ps__cuda_check(NULL, ps__cuda.device_count(count), "counting devices");
  }
  return status;
}

ps_status ps__device_count(int *count)
{
  pthread_mutex_lock(&opening);
  ps_status status = start_driver(count);
  pthread_mutex_unlock(&opening);
  return status;
}

/* An image without code that this device runs is as good as none: cuda.c has other means. */
static void load_kernels(ps__device *device)
{
  static const char *const names[] = {
#define X(name, kind, outputs) #name,
      PS__KERNEL_MAP(X)
#undef X
  };
  CUmodule module;
  const unsigned char *image = ps__kernel_image();
  if (image == NULL || ps__cuda.module_load(&module, image) != PS__CUDA_OK) {
    return;
  }
  for (int k = 0; k < PS__KERNELS; ++k) {
    if (ps__cuda.module_function(&device->kernel[k], module, names[k]) != PS__CUDA_OK) {
      ps__cuda.module_unload(module);
      return;
    }
    /* A kernel that is loaded at its first launch may wait for the whole device then. */
    if (ps__cuda.function_load != NULL) {
      ps__cuda.function_load(device->kernel[k]);
    }
  }
  device->compiled = true;
}

/* Some devices (shares of one) make pools and allocate nothing from them.  Where it is full just
 * now, the pool is as good as any. */
static bool gives_memory(const ps__device *device)
{
  CUdeviceptr p = 0;
  CUresult result = ps__cuda.pool_alloc(&p, 64, device->pool, device->taking);
  if (result == PS__CUDA_OK) {
    result = ps__cuda.pool_free(p, device->taking);
  }
  return result == PS__CUDA_OK || result == PS__CUDA_NO_MEMORY;
}

/* A pool of our own: the host's keeps its limits and its peers.  Memory that one stream has given
 * back is never handed to another on condition, which would let a device that hangs hold up a new
 * run. */
static void make_pool(ps__device *device)
{
  int supported = 0, never = 0;
  CUmemPoolProps properties = {0};
  properties.allocType = PS__CUDA_PINNED;
  properties.location.type = PS__CUDA_LOCATION_DEVICE;
  properties.location.id = device->ordinal;
  if (ps__cuda.pool_create == NULL || ps__cuda.pool_alloc == NULL || ps__cuda.pool_free == NULL ||
      ps__cuda.pool_attribute == NULL || ps__cuda.pool_access == NULL ||
      ps__cuda.device_attribute(&supported, PS__CUDA_POOLS, device->handle) != PS__CUDA_OK ||
      !supported || ps__cuda.pool_create(&device->pool, &properties) != PS__CUDA_OK) {
    device->pool = NULL;
    return;
  }
  ps__cuda.pool_attribute(device->pool, PS__CUDA_REUSE_WAITING, &never);
  if (!gives_memory(device)) {
    if (ps__cuda.pool_destroy != NULL) {
      ps__cuda.pool_destroy(device->pool);
    }
    device->pool = NULL;
  }
}

/* With the context current. */
static ps_status furnish(ps__device *device)
{
  ps_status status = ps__cuda_check(
      device, ps__cuda.device_attribute(&device->processors, PS__CUDA_PROCESSORS, device->handle),
      "open");
  if (status == PS_OK) {
    status = ps__stream_new(device, &device->taking);
  }
  if (status == PS_OK) {
    status = ps__stream_new(device, &device->giving);
  }
  if (status == PS_OK) {
    make_pool(device);
    load_kernels(device);
  } else {
    ps__stream_free(device, device->taking);
  }
  return status;
}

/* Under the lock. */
static ps_status open_device(ps__device *device, int ordinal)
{
  ps__scope scope;
  *device = (ps__device){.ordinal = ordinal};
  ps_status status = ps__cuda_check(device, ps__cuda.device_get(&device->handle, ordinal), "open");
  if (status == PS_OK) {
    status = ps__cuda_check(device, ps__cuda.context_retain(&device->context, device->handle),
                            "making its context");
  }
  if (status != PS_OK) {
    return status;
  }
  status = ps__device_enter(device, &scope);
  if (status == PS_OK) {
    status = furnish(device);
    ps__device_leave(&scope);
  }
  if (status == PS_OK) {
    process = getpid();
    device->open = true;
  } else {
    ps__cuda.context_release(device->handle);
  }
  return status;
}

ps_status ps__device_open(int ordinal, ps__device **device)
{
  int count;
  pthread_mutex_lock(&opening);
  ps_status status = start_driver(&count);
  if (status == PS_OK && (ordinal < 0 || ordinal >= count || ordinal >= PS__DEVICES_MAX)) {
    status = ps__fail(PS_DEVICE, "cuda:%d: this process sees %d CUDA device%s", ordinal, count,
                      count == 1 ? "" : "s");
  }
  if (status == PS_OK && !devices[ordinal].open) {
    status = open_device(&devices[ordinal], ordinal);
  }
  *device = status == PS_OK ? &devices[ordinal] : NULL;
  pthread_mutex_unlock(&opening);
  return status;
}

bool ps__device_lacks_kernels(void)
{
  bool lacks = false;
  pthread_mutex_lock(&opening);
  for (int k = 0; k < PS__DEVICES_MAX; ++k) {
    lacks = lacks || (devices[k].open && !devices[k].compiled);
  }
  pthread_mutex_unlock(&opening);
  return lacks;
}

/* ---- streams and events ---------------------------------------------------------------------- */

ps_status ps__stream_new(const ps__device *device, CUstream *stream)
{
  ps__scope scope;
  ps_status status = ps__device_enter(device, &scope);
  *stream = NULL;
  if (status == PS_OK) {
    status = ps__cuda_check(device, ps__cuda.stream_create(stream, PS__CUDA_NON_BLOCKING),
                            "making a stream");
    ps__device_leave(&scope);
  }
  return status;
}

ps_status ps__event_new(const ps__device *device, CUevent *event)
{
  ps__scope scope;
  ps_status status = ps__device_enter(device, &scope);
  *event = NULL;
  if (status == PS_OK) {
    status =
        ps__cuda_check(device, ps__cuda.event_create(event, PS__CUDA_UNTIMED), "making an event");
    ps__device_leave(&scope);
  }
  return status;
}

/* The driver lets go of both once the work on them is done. */
void ps__stream_free(const ps__device *device, CUstream stream)
{
  ps__scope scope;
  if (stream != NULL && ps__device_enter(device, &scope) == PS_OK) {
    ps__cuda.stream_destroy(stream);
    ps__device_leave(&scope);
  }
}

void ps__event_free(const ps__device *device, CUevent event)
{
  ps__scope scope;
  if (event != NULL && ps__device_enter(device, &scope) == PS_OK) {
    ps__cuda.event_destroy(event);
    ps__device_leave(&scope);
  }
}

/* ---- waiting --------------------------------------------------------------------------------- */

static void nap(int64_t ns)
{
  struct timespec time = {0, (long)ns};
  nanosleep(&time, NULL);
}

static ps_status query(const ps__device *device, CUevent event, bool *reached)
{
  ps__scope scope;
  ps_status status = ps__device_enter(device, &scope);
  if (status == PS_OK) {
    CUresult result = ps__cuda.event_query(event);
    ps__device_leave(&scope);
    *reached = result == PS__CUDA_OK;
    if (result != PS__CUDA_NOT_READY) {
      status = ps__cuda_check(device, result, "waiting for work on it");
    }
  }
  return status;
}

/* Answers of an ask come within microseconds, forwards within milliseconds: the naps grow with the
 * wait, up to what no round would notice. */
ps_status ps__device_wait(const ps__device *device, CUevent event, const ps_wait *wait)
{
  const int64_t spin_ns = 100 * 1000, nap_ns = 200 * 1000, slice_ns = 50 * 1000 * 1000;
  int64_t began = ps_now_ns(), slice_end = began + slice_ns;
  bool reached = false;
  ps_status status = query(device, event, &reached);
  while (status == PS_OK && !reached) {
    int64_t now = ps_now_ns(), waited = now - began;
    if (wait != NULL && wait->deadline_ns != 0 && now >= wait->deadline_ns) {
      return ps__fail(PS_DEADLINE, "the deadline passed while waiting for cuda:%d",
                      device->ordinal);
    }
    if (now >= slice_end) {
      slice_end = now + slice_ns;
      if (wait != NULL && wait->check != NULL && wait->check(wait->ctx)) {
        return ps__fail(PS_INTERRUPTED, "interrupted while waiting for cuda:%d", device->ordinal);
      }
    }
    if (waited > spin_ns) {
      nap(waited / 16 < nap_ns ? waited / 16 : nap_ns);
    }
    status = query(device, event, &reached);
  }
  return status;
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* On the taking stream, where nothing else is, and which therefore is soon through. */
static ps_status fill_zero(const ps__device *device, CUdeviceptr p, size_t bytes, CUevent *event)
{
  ps_status status =
      ps__cuda_check(device, ps__cuda.set(p, 0, bytes, device->taking), "clearing memory");
  if (status == PS_OK) {
    status = ps__event_new(device, event);
  }
  if (status == PS_OK) {
    status = ps__cuda_check(device, ps__cuda.event_record(*event, device->taking), "an event");
  }
  return status;
}

ps_status ps__device_alloc(ps__device *device, size_t bytes, CUdeviceptr *p)
{
  const int64_t patience_ns = INT64_C(60) * 1000000000;
  ps_wait wait = {ps_now_ns() + patience_ns, NULL, NULL};
  CUevent event = NULL;
  ps__scope scope;
  ps_status status = ps__device_enter(device, &scope);
  *p = 0;
  if (status != PS_OK) {
    return status;
  }
  status = ps__cuda_check(device,
                          device->pool != NULL
                              ? ps__cuda.pool_alloc(p, bytes, device->pool, device->taking)
                              : ps__cuda.alloc(p, bytes),
                          "memory for a run");
  if (status == PS_OK) {
    status = fill_zero(device, *p, bytes, &event);
  }
  ps__device_leave(&scope);
  if (status == PS_OK) {
    status = ps__device_wait(device, event, &wait);
  }
  if (status != PS_OK && *p != 0) {
    ps__device_free_after(device, event);
    ps__device_free(device, *p);
    *p = 0;
  }
  ps__event_free(device, event);
  return status;
}

void ps__device_free(ps__device *device, CUdeviceptr p)
{
  ps__scope scope;
  if (p != 0 && ps__device_enter(device, &scope) == PS_OK) {
    if (device->pool != NULL) {
      ps__cuda.pool_free(p, device->giving);
    } else {
      ps__cuda.free(p);
    }
    ps__device_leave(&scope);
  }
}

void ps__device_free_after(const ps__device *device, CUevent event)
{
  ps__scope scope;
  if (event != NULL && ps__device_enter(device, &scope) == PS_OK) {
    ps__cuda.stream_wait(device->giving, event, 0);
    ps__device_leave(&scope);
  }
}

/* ---- pinned memory --------------------------------------------------------------------------- */

static pthread_mutex_t pinning = PTHREAD_MUTEX_INITIALIZER;

/* Sizes are powers of two, so that runs of many sizes share blocks. */
static int pinned_kind(size_t bytes)
{
  int kind = 8;
  while (kind < PS__PINNED_KINDS && (size_t)1 << kind < bytes) {
    ++kind;
  }
  return kind;
}

static void *take_pinned(ps__device *device, int kind)
{
  pthread_mutex_lock(&pinning);
  void *found = device->pinned[kind];
  if (found != NULL) {
    device->pinned[kind] = *(void **)found;
  }
  pthread_mutex_unlock(&pinning);
  return found;
}

static ps_status make_pinned(const ps__device *device, int kind, void **p)
{
  ps__scope scope;
  ps_status status = ps__device_enter(device, &scope);
  if (status == PS_OK) {
    status = ps__cuda_check(
        device, ps__cuda.host_alloc(p, (size_t)1 << kind, PS__CUDA_PORTABLE | PS__CUDA_MAPPED),
        "pinned host memory");
    ps__device_leave(&scope);
  }
  return status;
}

ps_status ps__pinned_alloc(ps__device *device, size_t bytes, void **p)
{
  int kind = pinned_kind(bytes);
  *p = NULL;
  if (kind == PS__PINNED_KINDS) {
    return ps__fail(PS_NO_MEMORY, "%zu bytes of pinned host memory", bytes);
  }
  *p = take_pinned(device, kind);
  ps_status status = *p != NULL ? PS_OK : make_pinned(device, kind, p);
  if (status == PS_OK) {
    memset(*p, 0, bytes);
  }
  return status;
}

void ps__pinned_free(ps__device *device, void *p, size_t bytes)
{
  int kind = pinned_kind(bytes);
  if (p != NULL) {
    pthread_mutex_lock(&pinning);
    *(void **)p = device->pinned[kind];
    device->pinned[kind] = p;
    pthread_mutex_unlock(&pinning);
  }
}

int ps__pinned_idle(void)
{
  int count = 0;
  pthread_mutex_lock(&pinning);
  for (int k = 0; k < PS__DEVICES_MAX * PS__PINNED_KINDS; ++k) {
    void *const *at = devices[k / PS__PINNED_KINDS].pinned[k % PS__PINNED_KINDS];
    for (; at != NULL; at = *at) {
      ++count;
    }
  }
  pthread_mutex_unlock(&pinning);
  return count;
}

/* ---- what dies later ------------------------------------------------------------------------- */

bool ps__event_reached(const ps__device *device, CUevent event)
{
  bool reached = false;
  return event == NULL || query(device, event, &reached) != PS_OK || reached;
}

static pthread_mutex_t burying = PTHREAD_MUTEX_INITIALIZER;
static ps__mortal *dying;

static ps__mortal *take_ended(void)
{
  ps__mortal *ended = NULL;
  for (ps__mortal **at = &dying; *at != NULL;) {
    ps__mortal *looked_at = *at;
    if (looked_at->has_ended(looked_at)) {
      *at = looked_at->next;
      looked_at->next = ended;
      ended = looked_at;
    } else {
      at = &looked_at->next;
    }
  }
  return ended;
}

void ps__bury(ps__mortal *mortal)
{
  pthread_mutex_lock(&burying);
  if (mortal != NULL) {
    mortal->next = dying;
    dying = mortal;
  }
  ps__mortal *ended = take_ended();
  pthread_mutex_unlock(&burying);
  while (ended != NULL) {
    ps__mortal *next = ended->next;
    ended->destroy(ended); /* may bury others */
    ended = next;
  }
}

/* ---- peers ----------------------------------------------------------------------------------- */

/* Under the lock.  Access to a pool's memory is the pool's to grant. */
static bool introduce(ps__device *from, ps__device *to)
{
  CUmemAccessDesc access = {{PS__CUDA_LOCATION_DEVICE, from->ordinal}, PS__CUDA_READ_WRITE};
  int can = 0;
  return from->pool != NULL && to->pool != NULL &&
         ps__cuda.can_access_peer(&can, from->handle, to->handle) == PS__CUDA_OK && can &&
         ps__cuda.pool_access(to->pool, &access, 1) == PS__CUDA_OK;
}

bool ps__device_reaches(ps__device *from, ps__device *to)
{
  uint64_t bit = UINT64_C(1) << to->ordinal;
  pthread_mutex_lock(&opening);
  if (!((from->reaches | from->barred) & bit)) {
    bool reaches = introduce(from, to);
    from->reaches |= reaches ? bit : 0;
    from->barred |= reaches ? 0 : bit;
  }
  bool reaches = from->reaches & bit;
  pthread_mutex_unlock(&opening);
  return reaches;
}
