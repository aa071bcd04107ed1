/* driver.c - a synchronous stand-in for libcuda.so.1 that runs translated PTX on host memory.
 *
 * Blocks run whole, in an order drawn anew for each launch, and so do their threads, which take
 * turns between barriers that all of them have to come to.  Every access must lie in memory that
 * was allocated, be aligned, and every block's memory begins as rubbish.  What breaks a rule ends
 * the program.  It has one device, with as many multiprocessors as PTX_PROCESSORS says.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "ptx.h"

#define API __attribute__((visibility("default")))

typedef unsigned long long CUdeviceptr;

enum { BLOCKS_MAX = 1 << 16, THREADS_MAX = 1024, STACK = 1 << 16, ALIGNED = 256, NOT_FOUND = 500 };

__attribute__((format(printf, 1, 2), noreturn)) static void end_with(const char *format, ...)
{
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  abort();
}

static uint32_t draw(uint32_t below)
{
  static uint32_t state = 12345;
  state = state * 1664525u + 1013904223u;
  return (state >> 8) % below;
}

static void shuffle(uint32_t *order, uint32_t count)
{
  for (uint32_t k = count; k > 1; --k) {
    uint32_t other = draw(k), kept = order[k - 1];
    order[k - 1] = order[other];
    order[other] = kept;
  }
}

static void number(uint32_t *order, uint32_t count)
{
  for (uint32_t k = 0; k < count; ++k) {
    order[k] = k;
  }
}

/* ---- memory ---------------------------------------------------------------------------------- */

typedef struct span {
  uint64_t at;
  size_t bytes;
} span;

static span block[BLOCKS_MAX];
static int blocks;
static span parameter, shared; /* of the launch at hand */
static const ptx_kernel *running;

static bool is_within(const span *s, uint64_t address, size_t bytes)
{
  return address >= s->at && address + bytes <= s->at + s->bytes;
}

void ptx_check(uint64_t address, size_t bytes)
{
  static int last;
  if (address % bytes != 0) {
    end_with("%s: an access of %zu bytes that is not aligned\n", running->name, bytes);
  }
  if (is_within(&parameter, address, bytes) || is_within(&shared, address, bytes) ||
      (last < blocks && is_within(&block[last], address, bytes))) {
    return;
  }
  for (last = 0; last < blocks; ++last) {
    if (is_within(&block[last], address, bytes)) {
      return;
    }
  }
  end_with("%s: an access of %zu bytes outside of all memory\n", running->name, bytes);
}

void ptx_vector(uint64_t address, size_t bytes)
{
  if (address % bytes != 0) {
    end_with("%s: a vector of %zu bytes that is not aligned\n", running->name, bytes);
  }
}

/* Rubbish, for who takes it to be zero. */
static void *take(size_t bytes)
{
  size_t room = (bytes + ALIGNED) / ALIGNED * ALIGNED;
  void *p = aligned_alloc(ALIGNED, room);
  if (p == NULL || blocks == BLOCKS_MAX) {
    end_with("no memory for %zu bytes\n", bytes);
  }
  memset(p, 0xff, room);
  block[blocks++] = (span){(uint64_t)(uintptr_t)p, bytes};
  return p;
}

static void give_back(CUdeviceptr p)
{
  for (int k = 0; k < blocks; ++k) {
    if (block[k].at == p) {
      block[k] = block[--blocks];
      free((void *)(uintptr_t)p);
      return;
    }
  }
  end_with("memory is freed that nobody has\n");
}

/* ---- launches -------------------------------------------------------------------------------- */

static ucontext_t launcher;
static ptx_thread thread[THREADS_MAX];
static unsigned char *stacks;

void ptx_barrier(ptx_thread *t)
{
  t->waits = true;
  swapcontext(&t->here, &launcher);
}

static void run_thread(unsigned low, unsigned high)
{
  ptx_thread *t = (ptx_thread *)((uintptr_t)high << 32 | low);
  running->run(t, (const unsigned char *)(uintptr_t)parameter.at);
  t->done = true;
  swapcontext(&t->here, &launcher);
}

static void start_thread(const ptx_thread *like, uint32_t k)
{
  ptx_thread *t = &thread[k];
  uintptr_t at = (uintptr_t)t;
  *t = *like;
  t->tid[0] = k;
  getcontext(&t->here);
  t->here.uc_stack.ss_sp = stacks + (size_t)k * STACK;
  t->here.uc_stack.ss_size = STACK;
  makecontext(&t->here, (void (*)(void))run_thread, 2, (unsigned)at, (unsigned)(at >> 32));
}

/* From one barrier to the next; how many threads are left. */
static uint32_t run_to_barrier(uint32_t *order, uint32_t count)
{
  uint32_t waiting = 0, left = 0;
  shuffle(order, count);
  for (uint32_t k = 0; k < count; ++k) {
    ptx_thread *t = &thread[order[k]];
    if (t->done) {
      continue;
    }
    t->waits = false;
    swapcontext(&launcher, &t->here);
    waiting += t->waits;
    left += !t->done;
  }
  if (waiting != 0 && waiting != count) {
    end_with("%s: %u of %u threads come to a barrier\n", running->name, waiting, count);
  }
  return left;
}

static void run_block(ptx_thread like, uint32_t count)
{
  uint32_t order[THREADS_MAX];
  number(order, count);
  memset(like.shared, 0xff, ptx_shared_bytes);
  if (running->meets) {
    for (uint32_t k = 0; k < count; ++k) {
      start_thread(&like, k);
    }
    while (run_to_barrier(order, count) > 0) {
    }
    return;
  }
  shuffle(order, count);
  for (uint32_t k = 0; k < count; ++k) {
    like.tid[0] = order[k];
    running->run(&like, (const unsigned char *)(uintptr_t)parameter.at);
  }
}

API int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                       unsigned by, unsigned bz, unsigned bytes, void *stream, void **args,
                       void **extra)
{
  static unsigned char *own;
  (void)stream;
  (void)extra;
  if (gz != 1 || by != 1 || bz != 1 || bx > THREADS_MAX || bytes != 0) {
    end_with("a launch of another form\n");
  }
  own = own != NULL ? own : malloc(ptx_shared_bytes + ALIGNED);
  stacks = stacks != NULL ? stacks : malloc((size_t)STACK * THREADS_MAX);
  running = function;
  unsigned char *param = aligned_alloc(ALIGNED, (running->bytes / ALIGNED + 1) * ALIGNED);
  memcpy(param, args[0], running->bytes);
  parameter = (span){(uint64_t)(uintptr_t)param, running->bytes};
  uintptr_t start = ((uintptr_t)own + ALIGNED - 1) / ALIGNED * ALIGNED;
  shared = (span){start, ptx_shared_bytes};
  uint32_t all = gx * gy, *order = malloc(all * sizeof *order);
  number(order, all);
  shuffle(order, all);
  for (uint32_t k = 0; k < all; ++k) {
    run_block((ptx_thread){.ntid = {bx, 1, 1},
                           .ctaid = {order[k] % gx, order[k] / gx, 0},
                           .nctaid = {gx, gy, 1},
                           .shared = (unsigned char *)start},
              bx);
  }
  free(order);
  free(param);
  parameter = shared = (span){0, 0};
  return 0;
}

/* ---- the rest of the driver: everything is done when it is asked for --------------------------
 */

#define ALWAYS_FINE(name, ...)                                                                     \
  API int name(__VA_ARGS__)                                                                        \
  {                                                                                                \
    return 0;                                                                                      \
  }
#define GIVES(name, kind, handle, ...)                                                             \
  API int name(kind *made, ##__VA_ARGS__)                                                          \
  {                                                                                                \
    *made = (kind)(handle);                                                                        \
    return 0;                                                                                      \
  }
#pragma GCC diagnostic ignored "-Wunused-parameter"

typedef void *handle;

ALWAYS_FINE(cuInit, unsigned flags)
ALWAYS_FINE(cuDevicePrimaryCtxRelease_v2, int device)
ALWAYS_FINE(cuCtxPushCurrent_v2, handle context)
ALWAYS_FINE(cuCtxPopCurrent_v2, handle *context)
ALWAYS_FINE(cuThreadExchangeStreamCaptureMode, int *mode)
ALWAYS_FINE(cuStreamDestroy_v2, handle stream)
ALWAYS_FINE(cuStreamWaitEvent, handle stream, handle event, unsigned flags)
ALWAYS_FINE(cuEventDestroy_v2, handle event)
ALWAYS_FINE(cuEventRecord, handle event, handle stream)
ALWAYS_FINE(cuEventQuery, handle event)
ALWAYS_FINE(cuModuleUnload, handle module)
ALWAYS_FINE(cuFuncLoad, handle function)
ALWAYS_FINE(cuMemPoolDestroy, handle pool)
ALWAYS_FINE(cuMemPoolSetAttribute, handle pool, int attribute, void *value)
ALWAYS_FINE(cuMemPoolSetAccess, handle pool, const void *access, size_t count)
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDeviceGet, int, 0, int ordinal)
GIVES(cuDeviceCanAccessPeer, int, 0, int from, int to)
GIVES(cuDevicePrimaryCtxRetain, handle, 8, int device)
GIVES(cuStreamCreate, handle, 16, unsigned flags)
GIVES(cuEventCreate, handle, 24, unsigned flags)
GIVES(cuModuleLoadData, handle, 32, const void *image)
GIVES(cuMemPoolCreate, handle, 40, const void *properties)

API int cuGetErrorName(int error, const char **name)
{
  *name = "of translated PTX";
  return 0;
}

API int cuDeviceGetName(char *name, int room, int device)
{
  snprintf(name, (size_t)room, "translated PTX");
  return 0;
}

API int cuDeviceGetAttribute(int *value, int attribute, int device)
{
  enum { PROCESSORS = 16, POOLS = 115 };
  const char *processors = getenv("PTX_PROCESSORS");
  *value = attribute == PROCESSORS ? (processors != NULL ? (int)strtol(processors, NULL, 10) : 3)
                                   : attribute == POOLS;
  return 0;
}

API int cuStreamIsCapturing(handle stream, int *captures)
{
  *captures = 0;
  return 0;
}

API int cuPointerGetAttribute(void *value, int attribute, CUdeviceptr p)
{
  *(int *)value = 0;
  return 0;
}

API int cuModuleGetFunction(handle *function, handle module, const char *name)
{
  for (int k = 0; k < ptx_count; ++k) {
    if (strcmp(ptx_kernels[k].name, name) == 0) {
      *function = (void *)&ptx_kernels[k];
      return 0;
    }
  }
  return NOT_FOUND;
}

API int cuMemAlloc_v2(CUdeviceptr *p, size_t bytes)
{
  *p = (CUdeviceptr)(uintptr_t)take(bytes);
  return 0;
}

API int cuMemAllocFromPoolAsync(CUdeviceptr *p, size_t bytes, handle pool, handle stream)
{
  return cuMemAlloc_v2(p, bytes);
}

API int cuMemFree_v2(CUdeviceptr p)
{
  give_back(p);
  return 0;
}

API int cuMemFreeAsync(CUdeviceptr p, handle stream)
{
  return cuMemFree_v2(p);
}

API int cuMemHostAlloc(void **p, size_t bytes, unsigned flags)
{
  *p = take(bytes);
  return 0;
}

API int cuMemHostGetDevicePointer_v2(CUdeviceptr *p, void *host, unsigned flags)
{
  *p = (CUdeviceptr)(uintptr_t)host;
  return 0;
}

API int cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, handle stream)
{
  memmove((void *)(uintptr_t)to, (const void *)(uintptr_t)from, bytes);
  return 0;
}

API int cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, handle stream)
{
  return cuMemcpyAsync((CUdeviceptr)(uintptr_t)to, from, bytes, stream);
}

API int cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, handle stream)
{
  return cuMemcpyAsync(to, (CUdeviceptr)(uintptr_t)from, bytes, stream);
}

API int cuMemsetD8Async(CUdeviceptr p, unsigned char value, size_t bytes, handle stream)
{
  memset((void *)(uintptr_t)p, value, bytes);
  return 0;
}
