/* work.c - what the stand-in driver does on memory: copies, and kernels, which are those of
 * kernels.cu, compiled for the host.
 */
#include <stdlib.h>
#include <string.h>

#include "shim.h"

#include "backend/kernels.cu" // NOLINT(bugprone-suspicious-include)
#include "driver.h"

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
  int error = fake_enter_context(function);
  if (error == FAKE_OK) {
    error = fake_stream_of(stream, function, &state);
  }
  if (error == FAKE_OK && ((to_host && fake_device_of(what.to) != -1) ||
                           (from_host && fake_device_of(what.from) != -1))) {
    error = fake_complain(FAKE_INVALID_VALUE, "%s with host memory that is not pinned", function);
  }
  if (error != FAKE_OK) {
    return fake_leave(error);
  }
  copying *kept = malloc(sizeof *kept);
  *kept = what;
  fake_range ranges[2] = {{what.to, what.bytes, true}, {what.from, what.bytes, false}};
  return fake_leave(fake_give(state, function, ranges, what.from != NULL ? 2 : 1, do_copy, kept));
}

API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
  copying what = {fake_pointer(to), fake_pointer(from), bytes, 0};
  return copy_on("cuMemcpyAsync", stream, what, false, false);
}

API CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
  copying what = {to, fake_pointer(from), bytes, 0};
  return copy_on("cuMemcpyDtoHAsync", stream, what, true, false);
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
  copying what = {fake_pointer(to), from, bytes, 0};
  return copy_on("cuMemcpyHtoDAsync", stream, what, false, true);
}

API CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char value, size_t bytes, CUstream stream)
{
  copying what = {fake_pointer(p), NULL, bytes, value};
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
  int error = fake_enter_context("cuModuleLoadData");
  *module = (CUmodule)&kernels;
  return fake_leave(error == FAKE_OK && image == NULL ? FAKE_INVALID_VALUE : error);
}

API CUresult cuModuleUnload(CUmodule module)
{
  (void)module;
  return FAKE_OK;
}

API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
  int error = fake_enter_context("cuModuleGetFunction");
  (void)module;
  *function = NULL;
  for (int k = 0; k < PS__KERNELS && error == FAKE_OK; ++k) {
    if (strcmp(kernels[k].name, name) == 0) {
      *function = (CUfunction)&kernels[k];
    }
  }
  return fake_leave(error == FAKE_OK && *function == NULL ? FAKE_NOT_FOUND : error);
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
  int error = fake_enter_context("cuLaunchKernel");
  if (error == FAKE_OK) {
    error = fake_stream_of(stream, "cuLaunchKernel", &state);
  }
  if (error == FAKE_OK &&
      (grid_x < 1 || grid_y < 1 || grid_y > 65535 || grid_z != 1 || block_x != PS__THREADS ||
       block_y * block_z != 1 || shared_bytes != 0 || extra != NULL)) {
    error = fake_complain(FAKE_INVALID_VALUE, "a launch of (%u, %u, %u) blocks", grid_x, grid_y,
                          grid_z);
  }
  if (error != FAKE_OK) {
    return fake_leave(error);
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
  return fake_leave(fake_give(state, kernels[kept->kernel].name, ranges, count, do_launch, kept));
}
