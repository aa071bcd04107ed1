/* libcuda.c - a stand-in for the CUDA driver: the functions of cuda_api.h on host memory.
 *
 * Built as libcuda.so.1 and found by platform/dl.c when a test has loaded it before.  Each function
 * checks what the driver's documentation asks of its caller; engine.c does the work.  work.c has
 * copies and kernels.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"

/* ---- faults and contexts --------------------------------------------------------------------- */

enum { STACK = 16, RELAXED = 2 };

static char failing[64];
static int fail_at, fail_error;
static _Thread_local int stack[STACK], depth;
static _Thread_local int capture_mode; /* 0, the mode that minds what others do */
static const void *capturing;
static int initialized, contexts[FAKE_DEVICES];

void fake_fail(const char *function, int n, int error)
{
  fake_lock();
  snprintf(failing, sizeof failing, "%s", function);
  fail_at = n;
  fail_error = error;
  fake_unlock();
}

void fake_capture(void *stream, int on)
{
  fake_lock();
  capturing = on ? stream : NULL;
  fake_unlock();
}

int fake_current(void)
{
  return depth > 0 ? stack[depth - 1] : -1;
}

/* Takes the lock; what the call gives at once, whatever its arguments are. */
static int enter(const char *function)
{
  fake_lock();
  if (fail_at > 0 && strcmp(failing, function) == 0) {
    --fail_at;
    if (fail_at == 0) {
      return fail_error;
    }
  }
  if (!initialized && strcmp(function, "cuInit") != 0) {
    return fake_complain(3, "%s before cuInit", function);
  }
  return fake_current() >= 0 ? fake_broken[fake_current()] : FAKE_OK;
}

int fake_leave(int error)
{
  fake_unlock();
  return error;
}

/* What needs a context, and has to do with its device alone. */
int fake_enter_context(const char *function)
{
  int error = enter(function);
  return error == FAKE_OK && fake_current() < 0
             ? fake_complain(FAKE_INVALID_CONTEXT, "%s without a context", function)
             : error;
}

/* Some calls are not allowed while anybody captures, but to threads that say they know. */
static int check_capture(const char *function)
{
  return capturing != NULL && capture_mode != RELAXED
             ? fake_complain(FAKE_CAPTURE_UNSUPPORTED, "%s breaks another thread's capture",
                             function)
             : FAKE_OK;
}

int fake_stream_of(CUstream handle, const char *function, fake_stream_state **stream)
{
  *stream = handle == NULL || handle == PS__CUDA_DEFAULT_STREAM
                ? fake_default_stream(fake_current())
                : (fake_stream_state *)handle;
  if (!(*stream)->live || (*stream)->device != fake_current()) {
    return fake_complain(FAKE_INVALID_HANDLE, "%s: a stream of device %d%s in a context of %d",
                         function, (*stream)->device, (*stream)->live ? "" : ", destroyed",
                         fake_current());
  }
  return capturing == handle && capturing != NULL
             ? fake_complain(FAKE_CAPTURE_UNSUPPORTED, "%s on a stream that captures", function)
             : FAKE_OK;
}

/* ---- the driver and its devices -------------------------------------------------------------- */

API CUresult cuInit(unsigned flags)
{
  int error = enter("cuInit");
  initialized = 1;
  return fake_leave(error != FAKE_OK || flags == 0 ? error : FAKE_INVALID_VALUE);
}

API CUresult cuDriverGetVersion(int *version)
{
  *version = 13000;
  return FAKE_OK;
}

API CUresult cuGetErrorName(CUresult error, const char **name)
{
  *name = error == FAKE_OUT_OF_MEMORY     ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == FAKE_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                                          : "CUDA_ERROR_OF_THE_FAKE";
  return FAKE_OK;
}

API CUresult cuDeviceGetCount(int *count)
{
  int error = enter("cuDeviceGetCount");
  *count = fake_now.devices;
  return fake_leave(error);
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
  int error = enter("cuDeviceGet");
  *device = ordinal;
  return fake_leave(error != FAKE_OK || ordinal < fake_now.devices ? error : FAKE_INVALID_DEVICE);
}

API CUresult cuDeviceGetName(char *name, int room, CUdevice device)
{
  snprintf(name, (size_t)room, "stand-in %d", device);
  return FAKE_OK;
}

API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
  int error = enter("cuDeviceGetAttribute");
  (void)device;
  *value = attribute == PS__CUDA_PROCESSORS ? 2 : attribute == PS__CUDA_POOLS ? fake_now.pools : 9;
  return fake_leave(error);
}

API CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer)
{
  int error = enter("cuDeviceCanAccessPeer");
  *can = fake_now.peers && device != peer;
  return fake_leave(error);
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
  int error = enter("cuDevicePrimaryCtxRetain");
  ++contexts[device];
  *context = (CUcontext)&contexts[device];
  return fake_leave(error);
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
  int error = enter("cuDevicePrimaryCtxRelease");
  --contexts[device];
  return fake_leave(error);
}

API CUresult cuCtxPushCurrent_v2(CUcontext context)
{
  int device = (int)((int *)context - contexts);
  int error = enter("cuCtxPushCurrent");
  if (error == FAKE_OK && (depth == STACK || contexts[device] < 1)) {
    error = fake_complain(FAKE_INVALID_CONTEXT, "a context that is not retained, or too many");
  }
  if (error == FAKE_OK) {
    stack[depth++] = device;
  }
  return fake_leave(error);
}

API CUresult cuCtxPopCurrent_v2(CUcontext *context)
{
  fake_lock();
  if (depth < 1) {
    return fake_leave(fake_complain(FAKE_INVALID_CONTEXT, "more contexts popped than pushed"));
  }
  *context = (CUcontext)&contexts[stack[--depth]];
  return fake_leave(FAKE_OK);
}

API CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode)
{
  int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return FAKE_OK;
}

/* ---- streams and events ---------------------------------------------------------------------- */

API CUresult cuStreamCreate(CUstream *stream, unsigned flags)
{
  int error = fake_enter_context("cuStreamCreate");
  if (error == FAKE_OK && flags != PS__CUDA_NON_BLOCKING) {
    error = fake_complain(FAKE_INVALID_VALUE, "a stream that waits for the legacy default stream");
  }
  fake_stream_state *made = error == FAKE_OK ? fake_stream_new(fake_current()) : NULL;
  *stream = (CUstream)made;
  return fake_leave(error == FAKE_OK && made == NULL ? FAKE_OUT_OF_MEMORY : error);
}

API CUresult cuStreamDestroy_v2(CUstream stream)
{
  fake_stream_state *state;
  int error = fake_enter_context("cuStreamDestroy");
  if (error == FAKE_OK) {
    error = fake_stream_of(stream, "cuStreamDestroy", &state);
  }
  if (error == FAKE_OK) {
    fake_stream_delete(state);
  }
  return fake_leave(error);
}

API CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
  fake_stream_state *state;
  int error = fake_enter_context("cuStreamWaitEvent");
  (void)flags;
  if (error == FAKE_OK) {
    error = fake_stream_of(stream, "cuStreamWaitEvent", &state);
  }
  return fake_leave(error == FAKE_OK ? fake_wait(state, (fake_event_state *)event) : error);
}

API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
  int error = fake_enter_context("cuStreamIsCapturing");
  *status = capturing != NULL && capturing == stream;
  return fake_leave(error);
}

API CUresult cuEventCreate(CUevent *event, unsigned flags)
{
  int error = fake_enter_context("cuEventCreate");
  (void)flags;
  *event = error == FAKE_OK ? (CUevent)fake_event_new(fake_current()) : NULL;
  return fake_leave(error);
}

API CUresult cuEventDestroy_v2(CUevent event)
{
  fake_event_state *state = (fake_event_state *)event;
  int error = fake_enter_context("cuEventDestroy");
  if (error == FAKE_OK && !state->live) {
    error = fake_complain(FAKE_INVALID_HANDLE, "an event destroyed twice");
  }
  if (error == FAKE_OK) {
    state->live = false; /* its memory stays, for the work that knows it */
    --fake_totals.events;
  }
  return fake_leave(error);
}

API CUresult cuEventRecord(CUevent event, CUstream stream)
{
  fake_stream_state *state;
  int error = fake_enter_context("cuEventRecord");
  if (error == FAKE_OK) {
    error = fake_stream_of(stream, "cuEventRecord", &state);
  }
  return fake_leave(error == FAKE_OK ? fake_record((fake_event_state *)event, state) : error);
}

API CUresult cuEventQuery(CUevent event)
{
  fake_event_state *state = (fake_event_state *)event;
  int error = enter("cuEventQuery");
  if (error == FAKE_OK) {
    error = check_capture("cuEventQuery");
  }
  if (error == FAKE_OK && !state->live) {
    error = fake_complain(FAKE_INVALID_HANDLE, "cuEventQuery of an event that was destroyed");
  }
  if (error == FAKE_OK) {
    error = fake_reached(state) ? FAKE_OK : FAKE_NOT_READY;
  }
  /* What has gone wrong on the way is told by whatever is asked next. */
  if (error == FAKE_OK || error == FAKE_NOT_READY) {
    error = fake_broken[state->device] != 0 ? fake_broken[state->device] : error;
  }
  return fake_leave(error);
}

/* ---- memory ---------------------------------------------------------------------------------- */

API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr p)
{
  int error = enter("cuPointerGetAttribute");
  int device = fake_device_of(fake_pointer(p));
  if (error == FAKE_OK && (attribute != PS__CUDA_POINTER_DEVICE || device == -2)) {
    error = FAKE_INVALID_VALUE;
  }
  *(int *)value = device;
  return fake_leave(error);
}

API CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t bytes)
{
  void *address = NULL;
  int error = fake_enter_context("cuMemAlloc");
  if (error == FAKE_OK) {
    error = check_capture("cuMemAlloc");
  }
  if (error == FAKE_OK) {
    error = fake_block_new(bytes, fake_current(), NULL, &address);
  }
  *p = (CUdeviceptr)(uintptr_t)address;
  return fake_leave(error);
}

API CUresult cuMemFree_v2(CUdeviceptr p)
{
  int error = fake_enter_context("cuMemFree");
  if (error == FAKE_OK) {
    fake_work_all(); /* the device stands still */
    error = fake_is_idle(fake_current())
                ? fake_give_free(fake_default_stream(fake_current()), fake_pointer(p))
                : fake_complain(FAKE_INVALID_VALUE, "cuMemFree waits for a device that hangs");
    fake_work_all();
  }
  return fake_leave(error);
}

API CUresult cuMemHostAlloc(void **p, size_t bytes, unsigned flags)
{
  int error = fake_enter_context("cuMemHostAlloc");
  if (error == FAKE_OK) {
    error = check_capture("cuMemHostAlloc");
  }
  if (error == FAKE_OK && flags != (PS__CUDA_PORTABLE | PS__CUDA_MAPPED)) {
    error = fake_complain(FAKE_INVALID_VALUE, "pinned memory that not all devices reach");
  }
  return fake_leave(error == FAKE_OK ? fake_pinned_new(bytes, p) : error);
}

API CUresult cuMemFreeHost(void *p)
{
  int error = fake_enter_context("cuMemFreeHost");
  if (error == FAKE_OK && fake_is_spinning()) { /* all devices stand still */
    error = fake_complain(FAKE_INVALID_VALUE, "cuMemFreeHost waits for another process");
  }
  return fake_leave(error == FAKE_OK ? fake_pinned_delete(p) : error);
}

API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *p, void *host, unsigned flags)
{
  (void)flags;
  *p = (CUdeviceptr)(uintptr_t)host;
  return FAKE_OK;
}

/* ---- pools ----------------------------------------------------------------------------------- */

API CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *properties)
{
  int error = enter("cuMemPoolCreate");
  if (error == FAKE_OK && (!fake_now.pools || properties->allocType != PS__CUDA_PINNED ||
                           properties->location.type != PS__CUDA_LOCATION_DEVICE)) {
    error = fake_complain(FAKE_INVALID_VALUE, "a pool that cannot be made");
  }
  fake_pool_state *made = error == FAKE_OK ? calloc(1, sizeof *made) : NULL;
  if (made != NULL) {
    made->device = properties->location.id;
  }
  *pool = (CUmemoryPool)made;
  return fake_leave(error);
}

API CUresult cuMemPoolDestroy(CUmemoryPool pool)
{
  static CUmemoryPool gone[FAKE_DEVICES] __attribute__((used)); /* its blocks may still know it */
  gone[((fake_pool_state *)pool)->device] = pool;
  return FAKE_OK;
}

API CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value)
{
  int error = enter("cuMemPoolSetAttribute");
  (void)pool;
  (void)attribute;
  (void)value;
  return fake_leave(error);
}

API CUresult cuMemPoolSetAccess(CUmemoryPool pool, const CUmemAccessDesc *access, size_t count)
{
  fake_pool_state *state = (fake_pool_state *)pool;
  int error = enter("cuMemPoolSetAccess");
  for (size_t k = 0; k < count && error == FAKE_OK; ++k) {
    error = fake_now.peers ? FAKE_OK : fake_complain(FAKE_INVALID_DEVICE, "peers out of reach");
    state->access[access[k].location.id] = access[k].flags == PS__CUDA_READ_WRITE;
  }
  return fake_leave(error);
}

/* The new block is its stream's: it counts as written there. */
API CUresult cuMemAllocFromPoolAsync(CUdeviceptr *p, size_t bytes, CUmemoryPool pool,
                                     CUstream stream)
{
  fake_stream_state *state;
  void *address = NULL;
  int error = fake_enter_context("cuMemAllocFromPoolAsync");
  if (error == FAKE_OK) {
    error = fake_stream_of(stream, "cuMemAllocFromPoolAsync", &state);
  }
  if (error == FAKE_OK) {
    error = fake_block_new(bytes, fake_current(), (fake_pool_state *)pool, &address);
  }
  if (error == FAKE_OK) {
    fake_range all = {address, bytes, true};
    error = fake_give(state, "an allocation", &all, 1, NULL, NULL);
  }
  *p = (CUdeviceptr)(uintptr_t)address;
  return fake_leave(error);
}

API CUresult cuMemFreeAsync(CUdeviceptr p, CUstream stream)
{
  fake_stream_state *state;
  int error = fake_enter_context("cuMemFreeAsync");
  if (error == FAKE_OK) {
    error = fake_stream_of(stream, "cuMemFreeAsync", &state);
  }
  return fake_leave(error == FAKE_OK ? fake_give_free(state, fake_pointer(p)) : error);
}
