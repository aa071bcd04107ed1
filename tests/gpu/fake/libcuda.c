/* libcuda.c - a stand-in for the CUDA driver: the functions of cuda_api.h on host memory.
 *
 * Built as libcuda.so.1 and found by platform/dl.c when a test has loaded it before.  Each function
 * checks what the driver's documentation asks of its caller; engine.c does the work.  Kernels are
 * those of kernels.cu, compiled for the host.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda_api.h"
#include "shim.h"

#include "backend/kernels.cu" // NOLINT(bugprone-suspicious-include)
#include "engine.h"

#define API __attribute__((visibility("default")))

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

static int leave(int error)
{
  fake_unlock();
  return error;
}

/* What needs a context, and has to do with its device alone. */
static int enter_context(const char *function)
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

static int stream_of(CUstream handle, const char *function, fake_stream_state **stream)
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

static void *memory_at(CUdeviceptr p)
{
  return (void *)(uintptr_t)p;
}

/* ---- the driver and its devices -------------------------------------------------------------- */

API CUresult cuInit(unsigned flags)
{
  int error = enter("cuInit");
  initialized = 1;
  return leave(error != FAKE_OK || flags == 0 ? error : FAKE_INVALID_VALUE);
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
  return leave(error);
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
  int error = enter("cuDeviceGet");
  *device = ordinal;
  return leave(error != FAKE_OK || ordinal < fake_now.devices ? error : FAKE_INVALID_DEVICE);
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
  return leave(error);
}

API CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer)
{
  int error = enter("cuDeviceCanAccessPeer");
  *can = fake_now.peers && device != peer;
  return leave(error);
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
  int error = enter("cuDevicePrimaryCtxRetain");
  ++contexts[device];
  *context = (CUcontext)&contexts[device];
  return leave(error);
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
  int error = enter("cuDevicePrimaryCtxRelease");
  --contexts[device];
  return leave(error);
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
  return leave(error);
}

API CUresult cuCtxPopCurrent_v2(CUcontext *context)
{
  fake_lock();
  if (depth < 1) {
    return leave(fake_complain(FAKE_INVALID_CONTEXT, "more contexts popped than pushed"));
  }
  *context = (CUcontext)&contexts[stack[--depth]];
  return leave(FAKE_OK);
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
  int error = enter_context("cuStreamCreate");
  if (error == FAKE_OK && flags != PS__CUDA_NON_BLOCKING) {
    error = fake_complain(FAKE_INVALID_VALUE, "a stream that waits for the legacy default stream");
  }
  fake_stream_state *made = error == FAKE_OK ? fake_stream_new(fake_current()) : NULL;
  *stream = (CUstream)made;
  return leave(error == FAKE_OK && made == NULL ? FAKE_OUT_OF_MEMORY : error);
}

API CUresult cuStreamDestroy_v2(CUstream stream)
{
  fake_stream_state *state;
  int error = enter_context("cuStreamDestroy");
  if (error == FAKE_OK) {
    error = stream_of(stream, "cuStreamDestroy", &state);
  }
  if (error == FAKE_OK) {
    fake_stream_delete(state);
  }
  return leave(error);
}

API CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
  fake_stream_state *state;
  int error = enter_context("cuStreamWaitEvent");
  (void)flags;
  if (error == FAKE_OK) {
    error = stream_of(stream, "cuStreamWaitEvent", &state);
  }
  return leave(error == FAKE_OK ? fake_wait(state, (fake_event_state *)event) : error);
}

API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
  int error = enter_context("cuStreamIsCapturing");
  *status = capturing != NULL && capturing == stream;
  return leave(error);
}

API CUresult cuEventCreate(CUevent *event, unsigned flags)
{
  int error = enter_context("cuEventCreate");
  (void)flags;
  *event = error == FAKE_OK ? (CUevent)fake_event_new(fake_current()) : NULL;
  return leave(error);
}

API CUresult cuEventDestroy_v2(CUevent event)
{
  fake_event_state *state = (fake_event_state *)event;
  int error = enter_context("cuEventDestroy");
  if (error == FAKE_OK && !state->live) {
    error = fake_complain(FAKE_INVALID_HANDLE, "an event destroyed twice");
  }
  if (error == FAKE_OK) {
    state->live = false; /* its memory stays, for the work that knows it */
    --fake_totals.events;
  }
  return leave(error);
}

API CUresult cuEventRecord(CUevent event, CUstream stream)
{
  fake_stream_state *state;
  int error = enter_context("cuEventRecord");
  if (error == FAKE_OK) {
    error = stream_of(stream, "cuEventRecord", &state);
  }
  return leave(error == FAKE_OK ? fake_record((fake_event_state *)event, state) : error);
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
  return leave(error);
}

/* ---- memory ---------------------------------------------------------------------------------- */

API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr p)
{
  int error = enter("cuPointerGetAttribute");
  int device = fake_device_of(memory_at(p));
  if (error == FAKE_OK && (attribute != PS__CUDA_POINTER_DEVICE || device == -2)) {
    error = FAKE_INVALID_VALUE;
  }
  *(int *)value = device;
  return leave(error);
}

API CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t bytes)
{
  void *address = NULL;
  int error = enter_context("cuMemAlloc");
  if (error == FAKE_OK) {
    error = check_capture("cuMemAlloc");
  }
  if (error == FAKE_OK) {
    error = fake_block_new(bytes, fake_current(), NULL, &address);
  }
  *p = (CUdeviceptr)(uintptr_t)address;
  return leave(error);
}

API CUresult cuMemFree_v2(CUdeviceptr p)
{
  int error = enter_context("cuMemFree");
  if (error == FAKE_OK) {
    fake_work_all(); /* the device stands still */
    error = fake_is_idle(fake_current())
                ? fake_give_free(fake_default_stream(fake_current()), memory_at(p))
                : fake_complain(FAKE_INVALID_VALUE, "cuMemFree waits for a device that hangs");
    fake_work_all();
  }
  return leave(error);
}

API CUresult cuMemHostAlloc(void **p, size_t bytes, unsigned flags)
{
  int error = enter_context("cuMemHostAlloc");
  if (error == FAKE_OK) {
    error = check_capture("cuMemHostAlloc");
  }
  if (error == FAKE_OK && flags != (PS__CUDA_PORTABLE | PS__CUDA_MAPPED)) {
    error = fake_complain(FAKE_INVALID_VALUE, "pinned memory that not all devices reach");
  }
  return leave(error == FAKE_OK ? fake_pinned_new(bytes, p) : error);
}

API CUresult cuMemFreeHost(void *p)
{
  int error = enter_context("cuMemFreeHost");
  return leave(error == FAKE_OK ? fake_pinned_delete(p) : error);
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
  return leave(error);
}

API CUresult cuMemPoolDestroy(CUmemoryPool pool)
{
  (void)pool; /* its blocks may still know it */
  return FAKE_OK;
}

API CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value)
{
  int error = enter("cuMemPoolSetAttribute");
  (void)pool;
  (void)attribute;
  (void)value;
  return leave(error);
}

API CUresult cuMemPoolSetAccess(CUmemoryPool pool, const CUmemAccessDesc *access, size_t count)
{
  fake_pool_state *state = (fake_pool_state *)pool;
  int error = enter("cuMemPoolSetAccess");
  for (size_t k = 0; k < count && error == FAKE_OK; ++k) {
    error = fake_now.peers ? FAKE_OK : fake_complain(FAKE_INVALID_DEVICE, "peers out of reach");
    state->access[access[k].location.id] = access[k].flags == PS__CUDA_READ_WRITE;
  }
  return leave(error);
}

/* The new block is its stream's: it counts as written there. */
API CUresult cuMemAllocFromPoolAsync(CUdeviceptr *p, size_t bytes, CUmemoryPool pool,
                                     CUstream stream)
{
  fake_stream_state *state;
  void *address = NULL;
  int error = enter_context("cuMemAllocFromPoolAsync");
  if (error == FAKE_OK) {
    error = stream_of(stream, "cuMemAllocFromPoolAsync", &state);
  }
  if (error == FAKE_OK) {
    error = fake_block_new(bytes, fake_current(), (fake_pool_state *)pool, &address);
  }
  if (error == FAKE_OK) {
    fake_range all = {address, bytes, true};
    error = fake_give(state, "an allocation", &all, 1, NULL, NULL);
  }
  *p = (CUdeviceptr)(uintptr_t)address;
  return leave(error);
}

API CUresult cuMemFreeAsync(CUdeviceptr p, CUstream stream)
{
  fake_stream_state *state;
  int error = enter_context("cuMemFreeAsync");
  if (error == FAKE_OK) {
    error = stream_of(stream, "cuMemFreeAsync", &state);
  }
  return leave(error == FAKE_OK ? fake_give_free(state, memory_at(p)) : error);
}

/* ---- copies ---------------------------------------------------------------------------------- */

typedef struct copying {
  void *to;
  const void *from; /* NULL: value */
  size_t bytes;
  unsigned char value;
} copying;

static void do_copy(void *data)
{
  const copying *c = data;
  unsigned char *to = fake_translate(c->to, c->bytes);
  const unsigned char *from = c->from != NULL ? fake_translate(c->from, c->bytes) : NULL;
  if (to != NULL && from != NULL) {
    memcpy(to, from, c->bytes);
  } else if (to != NULL && c->from == NULL) {
    memset(to, c->value, c->bytes);
  }
  ++fake_totals.copies;
}

/* Host memory must be pinned: from other memory a copy is not asynchronous. */
static CUresult copy_on(const char *function, CUstream stream, copying what, bool to_host,
                        bool from_host)
{
  fake_stream_state *state;
  int error = enter_context(function);
  if (error == FAKE_OK) {
    error = stream_of(stream, function, &state);
  }
  if (error == FAKE_OK && ((to_host && fake_device_of(what.to) != -1) ||
                           (from_host && fake_device_of(what.from) != -1))) {
    error = fake_complain(FAKE_INVALID_VALUE, "%s with host memory that is not pinned", function);
  }
  if (error != FAKE_OK) {
    return leave(error);
  }
  copying *kept = malloc(sizeof *kept);
  *kept = what;
  fake_range ranges[2] = {{what.to, what.bytes, true}, {what.from, what.bytes, false}};
  return leave(fake_give(state, function, ranges, what.from != NULL ? 2 : 1, do_copy, kept));
}

API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
  copying what = {memory_at(to), memory_at(from), bytes, 0};
  return copy_on("cuMemcpyAsync", stream, what, false, false);
}

API CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
  copying what = {to, memory_at(from), bytes, 0};
  return copy_on("cuMemcpyDtoHAsync", stream, what, true, false);
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
  copying what = {memory_at(to), from, bytes, 0};
  return copy_on("cuMemcpyHtoDAsync", stream, what, false, true);
}

API CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char value, size_t bytes, CUstream stream)
{
  copying what = {memory_at(p), NULL, bytes, value};
  return copy_on("cuMemsetD8Async", stream, what, false, false);
}

/* ---- kernels --------------------------------------------------------------------------------- */

typedef void (*any_kernel)(void);

/* The map says for each which of the two it is. */
static const struct {
  const char *name;
  int kind, outputs;
  any_kernel run;
} kernels[PS__KERNELS] = {
#define X(name, kind, outputs) {#name, kind, outputs, (any_kernel)(name)},
    PS__KERNEL_MAP(X)
#undef X
};

typedef struct launching {
  int kernel;
  shim_index grid;
  union {
    ps__lincomb_args lincomb;
    ps__sweep_args sweep;
  } args;
} launching;

static size_t element_bytes(int dtype)
{
  return dtype == F64 ? 8 : dtype == F32 ? 4 : 2;
}

static void translate(const void **p, size_t bytes)
{
  *p = *p != NULL ? fake_translate(*p, bytes) : NULL;
}

static void run_lincomb(any_kernel run, ps__lincomb_args *a)
{
  for (int j = 0; j < a->terms; ++j) {
    translate(&a->in[j], a->n * element_bytes(a->dtype[j]));
  }
  for (int k = 0; k < a->outs; ++k) {
    a->out[k] = fake_translate(a->out[k], a->n * element_bytes(a->out_dtype));
  }
  ((void (*)(const ps__lincomb_args))run)(*a);
}

static void run_sweep(any_kernel run, ps__sweep_args *a)
{
  size_t n = a->items * a->size, x = n * element_bytes(a->x_dtype),
         m = n * element_bytes(a->m_dtype);
  translate(&a->x, x);
  translate(&a->guess, x);
  translate(&a->m, m);
  translate((const void **)&a->out, m);
  translate((const void **)&a->keep_x, x);
  translate((const void **)&a->keep_m, m);
  a->part = fake_translate(a->part, a->items * gridDim.x * sizeof *a->part);
  a->ticket = fake_translate(a->ticket, sizeof *a->ticket);
  a->result = fake_translate(a->result, sizeof *a->result);
  ((void (*)(const ps__sweep_args))run)(*a);
}

/* Blocks of one thread, in turn; those of a grid may come in any order, so that the order is
 * turned round now and then. */
static void do_launch(void *data)
{
  launching *l = data;
  uint32_t blocks = l->grid.x * l->grid.y, first = fake_random(blocks);
  gridDim = l->grid;
  blockDim = (shim_index){1, 1};
  threadIdx = (shim_index){0, 0};
  for (uint32_t k = 0; k < blocks; ++k) {
    uint32_t block = (first + k) % blocks;
    launching again = *l;
    blockIdx = (shim_index){block % l->grid.x, block / l->grid.x};
    if (kernels[l->kernel].outputs > 0) {
      run_lincomb(kernels[l->kernel].run, &again.args.lincomb);
    } else {
      run_sweep(kernels[l->kernel].run, &again.args.sweep);
    }
  }
  ++fake_totals.kernels;
}

static int lincomb_ranges(const ps__lincomb_args *a, fake_range *ranges)
{
  int count = 0;
  for (int j = 0; j < a->terms; ++j) {
    ranges[count++] = (fake_range){a->in[j], a->n * element_bytes(a->dtype[j]), false};
  }
  for (int k = 0; k < a->outs; ++k) {
    ranges[count++] = (fake_range){a->out[k], a->n * element_bytes(a->out_dtype), true};
  }
  return count;
}

static int sweep_ranges(const ps__sweep_args *a, unsigned parts, fake_range *ranges)
{
  size_t n = a->items * a->size, x = n * element_bytes(a->x_dtype),
         m = n * element_bytes(a->m_dtype);
  const fake_range all[] = {
      {a->x, x, false},
      {a->guess, x, false},
      {a->m, m, false},
      {a->out, m, true},
      {a->keep_x, x, true},
      {a->keep_m, m, true},
      {a->part, a->items * parts * sizeof *a->part, true},
      {a->ticket, sizeof *a->ticket, true},
      {a->result, sizeof *a->result, true},
  };
  int count = 0;
  for (size_t k = 0; k < sizeof all / sizeof *all; ++k) {
    if (all[k].p != NULL) {
      ranges[count++] = all[k];
    }
  }
  return count;
}

API CUresult cuModuleLoadData(CUmodule *module, const void *image)
{
  int error = enter_context("cuModuleLoadData");
  *module = (CUmodule)&kernels;
  return leave(error == FAKE_OK && image == NULL ? FAKE_INVALID_VALUE : error);
}

API CUresult cuModuleUnload(CUmodule module)
{
  (void)module;
  return FAKE_OK;
}

API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
  int error = enter_context("cuModuleGetFunction");
  (void)module;
  *function = NULL;
  for (int k = 0; k < PS__KERNELS && error == FAKE_OK; ++k) {
    if (strcmp(kernels[k].name, name) == 0) {
      *function = (CUfunction)&kernels[k];
    }
  }
  return leave(error == FAKE_OK && *function == NULL ? FAKE_NOT_FOUND : error);
}

API CUresult cuFuncLoad(CUfunction function)
{
  (void)function;
  return FAKE_OK;
}

API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned block_x, unsigned block_y, unsigned block_z,
                            unsigned shared_bytes, CUstream stream, void **arguments, void **extra)
{
  fake_stream_state *state;
  fake_range ranges[FAKE_RANGES];
  int error = enter_context("cuLaunchKernel");
  if (error == FAKE_OK) {
    error = stream_of(stream, "cuLaunchKernel", &state);
  }
  if (error == FAKE_OK &&
      (grid_x < 1 || grid_y < 1 || grid_y > 65535 || grid_z != 1 || block_x != PS__THREADS ||
       block_y * block_z != 1 || shared_bytes != 0 || extra != NULL)) {
    error = fake_complain(FAKE_INVALID_VALUE, "a launch of (%u, %u, %u) blocks", grid_x, grid_y,
                          grid_z);
  }
  if (error != FAKE_OK) {
    return leave(error);
  }
  launching *kept = calloc(1, sizeof *kept);
  int count;
  for (kept->kernel = 0; (CUfunction)&kernels[kept->kernel] != function;) {
    ++kept->kernel;
  }
  kept->grid = (shim_index){grid_x, grid_y};
  if (kernels[kept->kernel].outputs > 0) {
    kept->args.lincomb = *(const ps__lincomb_args *)arguments[0];
    count = lincomb_ranges(&kept->args.lincomb, ranges);
  } else {
    kept->args.sweep = *(const ps__sweep_args *)arguments[0];
    count = sweep_ranges(&kept->args.sweep, grid_x, ranges);
  }
  return leave(fake_give(state, kernels[kept->kernel].name, ranges, count, do_launch, kept));
}
