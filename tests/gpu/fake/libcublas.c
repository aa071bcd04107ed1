/* libcublas.c - a stand-in for cuBLAS: the functions of cublas_api.h on host memory.
 *
 * Built as libcublas.so.13, on top of the stand-in driver.  Calls are work of the handle's stream;
 * each checks what the documentation asks of its caller: a handle, a stream of the present
 * context, leading dimensions, types that go together, and operands that lie whole in live memory
 * of the device.  Products are summed in the precision of the computation, in an order of its own.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cublas_api.h"
#include "backend/half.h"
#include "engine.h"

#define API __attribute__((visibility("default")))

enum { NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15, HANDLES = 256 };

struct cublasContext {
  bool live;
  int device;
  fake_stream_state *stream;
  void *workspace;
  size_t workspace_bytes;
};

static struct cublasContext *handles[HANDLES];
static int made, live, calls;
static char failing[64];
static int fail_at, fail_result;

void fake_blas_fail(const char *function, int n, int result)
{
  fake_lock();
  snprintf(failing, sizeof failing, "%s", function);
  fail_at = n;
  fail_result = result;
  fake_unlock();
}

int fake_blas_calls(void)
{
  fake_lock();
  int count = calls;
  fake_unlock();
  return count;
}

int fake_blas_handles(void)
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
  return fake_current() < 0 ? fake_complain(NOT_INITIALIZED, "%s without a context", function)
                            : PS__BLAS_OK;
}

static int leave(int result)
{
  fake_unlock();
  return result;
}

static int enter_with(const char *function, cublasHandle_t handle)
{
  int result = enter(function);
  if (result == PS__BLAS_OK &&
      (handle == NULL || !handle->live || handle->device != fake_current())) {
    result = fake_complain(NOT_INITIALIZED, "%s: no handle of this context", function);
  }
  return result;
}

API cublasStatus_t cublasGetProperty(libraryPropertyType type, int *value)
{
  *value = type == PS__BLAS_MAJOR ? 13 : type == PS__BLAS_MINOR ? 1 : 0;
  return PS__BLAS_OK;
}

API cublasStatus_t cublasCreate_v2(cublasHandle_t *handle)
{
  int result = enter("cublasCreate");
  *handle = NULL;
  if (result == PS__BLAS_OK && made < HANDLES) {
    handles[made] = calloc(1, sizeof **handles);
    *handles[made] = (struct cublasContext){.live = true, .device = fake_current()};
    *handle = handles[made++];
    ++live;
  }
  return leave(result);
}

API cublasStatus_t cublasDestroy_v2(cublasHandle_t handle)
{
  int result = enter_with("cublasDestroy", handle);
  if (result == PS__BLAS_OK) {
    fake_work_all(); /* the device stands still */
    handle->live = false;
    --live;
  }
  return leave(result);
}

API cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream)
{
  int result = enter_with("cublasSetStream", handle);
  if (result != PS__BLAS_OK) {
    return leave(result);
  }
  fake_stream_state *state = stream == NULL || stream == PS__CUDA_DEFAULT_STREAM
                                 ? fake_default_stream(fake_current())
                                 : (fake_stream_state *)stream;
  if (!state->live || state->device != handle->device) {
    return leave(fake_complain(INVALID_VALUE, "cublasSetStream: a stream of device %d%s",
                               state->device, state->live ? "" : ", destroyed"));
  }
  handle->stream = state;
  handle->workspace = NULL; /* back to the library's own */
  return leave(PS__BLAS_OK);
}

API cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t bytes)
{
  int result = enter_with("cublasSetWorkspace", handle);
  if (result == PS__BLAS_OK &&
      ((uintptr_t)workspace % 256 != 0 || fake_device_of(workspace) != handle->device)) {
    result = fake_complain(INVALID_VALUE, "a workspace elsewhere, or not in multiples of 256");
  }
  if (result == PS__BLAS_OK) {
    handle->workspace = workspace;
    handle->workspace_bytes = bytes;
  }
  return leave(result);
}

/* ---- numbers --------------------------------------------------------------------------------- */

static size_t size_of(cudaDataType type)
{
  return type == PS__BLAS_F64 ? 8 : type == PS__BLAS_F32 ? 4 : 2;
}

static double load(const void *from, cudaDataType type, size_t at)
{
  switch (type) {
  case PS__BLAS_F64: return ((const double *)from)[at];
  case PS__BLAS_F32: return ((const float *)from)[at];
  case PS__BLAS_F16: return ps__f16_to_float(((const uint16_t *)from)[at]);
  default: return ps__bf16_to_float(((const uint16_t *)from)[at]);
  }
}

static void store(void *to, cudaDataType type, size_t at, double value)
{
  switch (type) {
  case PS__BLAS_F64: ((double *)to)[at] = value; break;
  case PS__BLAS_F32: ((float *)to)[at] = (float)value; break;
  case PS__BLAS_F16: ((uint16_t *)to)[at] = ps__float_to_f16((float)value); break;
  default: ((uint16_t *)to)[at] = ps__float_to_bf16((float)value); break;
  }
}

static double factor(const void *from, int twice)
{
  return twice ? *(const double *)from : *(const float *)from;
}

/* ---- products -------------------------------------------------------------------------------- */

/* An operand of a product, (rows, columns) of each of count; read as it lies. */
typedef struct matrix {
  void *p;
  cudaDataType type;
  int rows, columns, lead;
  long long stride;
} matrix;

typedef struct product {
  matrix a, b, c;
  int turned, m, n, k, count, twice;
  double alpha, beta;
} product;

static size_t bytes_of(const matrix *x, int count)
{
  size_t last = (size_t)(count - 1) * (size_t)x->stride +
                (size_t)(x->columns - 1) * (size_t)x->lead + (size_t)x->rows;
  return last * size_of(x->type);
}

/* Halves of the sum apart, so that the order is another one than the CPU backend's. */
static double inner(const product *p, size_t batch, int i, int j)
{
  size_t a0 = batch * (size_t)p->a.stride, b0 = batch * (size_t)p->b.stride;
  double twice[2] = {0, 0};
  float single[2] = {0, 0};
  for (int k = 0; k < p->k; ++k) {
    size_t at = p->turned ? (size_t)i * (size_t)p->a.lead + (size_t)k
                          : (size_t)k * (size_t)p->a.lead + (size_t)i;
    double value = load(p->a.p, p->a.type, a0 + at) *
                   load(p->b.p, p->b.type, b0 + (size_t)j * (size_t)p->b.lead + (size_t)k);
    twice[k % 2] += value;
    single[k % 2] += (float)value;
  }
  return p->twice ? twice[0] + twice[1] : (double)(single[0] + single[1]);
}

static void multiply(void *data)
{
  product p = *(product *)data;
  matrix *all[3] = {&p.a, &p.b, &p.c};
  for (int k = 0; k < 3; ++k) {
    all[k]->p = fake_translate(all[k]->p, bytes_of(all[k], p.count));
    if (all[k]->p == NULL) {
      return;
    }
  }
  for (size_t batch = 0; batch < (size_t)p.count; ++batch) {
    for (int j = 0; j < p.n; ++j) {
      for (int i = 0; i < p.m; ++i) {
        size_t at = batch * (size_t)p.c.stride + (size_t)j * (size_t)p.c.lead + (size_t)i;
        double before = p.beta != 0 ? p.beta * load(p.c.p, p.c.type, at) : 0;
        store(p.c.p, p.c.type, at, p.alpha * inner(&p, batch, i, j) + before);
      }
    }
  }
  ++calls;
}

/* Which types of operands, result and sums there are together. */
static bool goes_together(const product *p, cublasComputeType_t compute)
{
  bool halves = p->a.type == PS__BLAS_F16 || p->a.type == PS__BLAS_BF16;
  if (p->a.type != p->b.type) {
    return false;
  }
  if (p->a.type == PS__BLAS_F64) {
    return p->c.type == PS__BLAS_F64 && compute == PS__BLAS_IN_F64;
  }
  if (p->a.type == PS__BLAS_F32) {
    return p->c.type == PS__BLAS_F32 && (compute == PS__BLAS_IN_F32 || compute == PS__BLAS_ALL_F32);
  }
  return halves && (p->c.type == p->a.type || p->c.type == PS__BLAS_F32) &&
         (compute == PS__BLAS_IN_F32 || compute == PS__BLAS_ALL_F32);
}

static int check_product(const product *p, cublasComputeType_t compute, int algorithm)
{
  const matrix *all[3] = {&p->a, &p->b, &p->c};
  if (p->m < 1 || p->n < 1 || p->k < 1 || p->count < 1 || algorithm != PS__BLAS_ANY_WAY) {
    return fake_complain(INVALID_VALUE, "a product of %d x %d x %d", p->m, p->n, p->k);
  }
  for (int k = 0; k < 3; ++k) {
    if (all[k]->lead < all[k]->rows || (uintptr_t)all[k]->p % size_of(all[k]->type) != 0) {
      return fake_complain(INVALID_VALUE, "operand %d of a product: %d rows, %d apart", k,
                           all[k]->rows, all[k]->lead);
    }
  }
  if (p->count > 1 && p->c.stride < (long long)p->c.lead * (p->n - 1) + p->m) {
    return fake_complain(INVALID_VALUE, "results of a batch lie over each other");
  }
  return goes_together(p, compute) ? PS__BLAS_OK
                                   : fake_complain(NOT_SUPPORTED, "types %d and %d in sums of %d",
                                                   (int)p->a.type, (int)p->c.type, (int)compute);
}

/* Work of the handle's stream; the workspace is written too. */
static int give(cublasHandle_t handle, const char *what, fake_range *ranges, int count,
                fake_task task, void *data)
{
  if (handle->stream == NULL || handle->workspace == NULL) {
    free(data);
    return fake_complain(INVALID_VALUE, "%s: no stream was named, or memory was taken aside", what);
  }
  ranges[count] = (fake_range){handle->workspace, handle->workspace_bytes, true};
  return fake_give(handle->stream, what, ranges, count + 1, task, data) == FAKE_OK ? PS__BLAS_OK
                                                                                   : INVALID_VALUE;
}

API cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t handle, cublasOperation_t turn_a, cublasOperation_t turn_b, int m, int n, int k,
    const void *alpha, const void *a, cudaDataType a_type, int lda, long long a_stride,
    const void *b, cudaDataType b_type, int ldb, long long b_stride, const void *beta, void *c,
    cudaDataType c_type, int ldc, long long c_stride, int count, cublasComputeType_t compute,
    cublasGemmAlgo_t algorithm)
{
  int result = enter_with("cublasGemm", handle), turned = turn_a == PS__BLAS_TURNED;
  product p = {.a = {(void *)a, a_type, turned ? k : m, turned ? m : k, lda, a_stride},
               .b = {(void *)b, b_type, k, n, ldb, b_stride},
               .c = {c, c_type, m, n, ldc, c_stride},
               .turned = turned,
               .m = m,
               .n = n,
               .k = k,
               .count = count,
               .twice = compute == PS__BLAS_IN_F64};
  if (result == PS__BLAS_OK) {
    result = turn_b == PS__BLAS_AS_IS ? check_product(&p, compute, (int)algorithm) : INVALID_VALUE;
  }
  if (result != PS__BLAS_OK) {
    return leave(result);
  }
  p.alpha = factor(alpha, p.twice);
  p.beta = factor(beta, p.twice);
  product *kept = malloc(sizeof *kept);
  *kept = p;
  fake_range ranges[4] = {{a, bytes_of(&p.a, count), false},
                          {b, bytes_of(&p.b, count), false},
                          {c, bytes_of(&p.c, count), true}};
  return leave(give(handle, "a product", ranges, 3, multiply, kept));
}

/* ---- scaled sums ----------------------------------------------------------------------------- */

typedef struct sum {
  int n;
  double alpha;
  cudaDataType type;
  const void *x;
  void *y;
} sum;

static void add(void *data)
{
  const sum *s = data;
  size_t bytes = (size_t)s->n * size_of(s->type);
  const void *x = fake_translate(s->x, bytes);
  void *y = fake_translate(s->y, bytes);
  for (size_t i = 0; x != NULL && y != NULL && i < (size_t)s->n; ++i) {
    double value = s->type == PS__BLAS_F64
                       ? load(y, s->type, i) + s->alpha * load(x, s->type, i)
                       : (float)((float)load(y, s->type, i) +
                                 (float)((float)s->alpha * (float)load(x, s->type, i)));
    store(y, s->type, i, value);
  }
  ++calls;
}

API cublasStatus_t cublasAxpyEx(cublasHandle_t handle, int n, const void *alpha,
                                cudaDataType alpha_type, const void *x, cudaDataType x_type,
                                int x_step, void *y, cudaDataType y_type, int y_step,
                                cudaDataType compute)
{
  int result = enter_with("cublasAxpyEx", handle);
  cudaDataType real = x_type == PS__BLAS_F64 ? PS__BLAS_F64 : PS__BLAS_F32;
  if (result == PS__BLAS_OK && (n < 1 || x_step != 1 || y_step != 1 || x_type != y_type ||
                                alpha_type != real || compute != real)) {
    result = fake_complain(NOT_SUPPORTED, "a scaled sum of %d, types %d and %d", n, (int)x_type,
                           (int)y_type);
  }
  if (result != PS__BLAS_OK) {
    return leave(result);
  }
  sum *kept = malloc(sizeof *kept);
  *kept = (sum){n, factor(alpha, real == PS__BLAS_F64), x_type, x, y};
  size_t bytes = (size_t)n * size_of(x_type);
  fake_range ranges[3] = {{x, bytes, false}, {y, bytes, true}};
  return leave(give(handle, "a scaled sum", ranges, 2, add, kept));
}
