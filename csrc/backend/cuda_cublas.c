/* cuda_cublas.c - the passes of a rank whose device has no kernels of this build, by cuBLAS.
 *
 * cuda.c calls it in place of a launch; what it cannot do goes through the host (cuda_plain.c):
 * operands of several dtypes, and a sweep that meets a number that is not finite.
 *
 * Rounding.  A lincomb is a product of matrices: inputs side by side, times weights.  It is summed
 * in float (double for double) in cuBLAS's own order and rounded once; weights must be stored as
 * the inputs are, so that those of fp16 are sums of two halves, those of bf16 of three, within
 * 2^-22 of the largest one.  A sweep rounds x - guess to its dtype, sums squares over blocks of
 * 4096 in float, and adds these up in double; the answer is rounded once more than a kernel's.
 */
#include <limits.h>
#include <math.h>

#include "backend/cublas.h"
#include "backend/half.h"

enum { ROOM = 64 << 20, BLOCK = 4096, ITEMS_MAX = 64 };

/* ---- numbers --------------------------------------------------------------------------------- */

static cudaDataType type_of(ps_dtype dtype)
{
  return dtype == PS_F64   ? PS__BLAS_F64
         : dtype == PS_F32 ? PS__BLAS_F32
         : dtype == PS_F16 ? PS__BLAS_F16
                           : PS__BLAS_BF16;
}

static cublasComputeType_t compute_of(ps_dtype dtype)
{
  return dtype == PS_F64 ? PS__BLAS_IN_F64 : dtype == PS_F32 ? PS__BLAS_ALL_F32 : PS__BLAS_IN_F32;
}

/* A factor as cuBLAS reads it: in the precision of the sums. */
typedef union factor {
  float single;
  double twice;
} factor;

static factor factor_of(double value, ps_dtype dtype)
{
  factor f;
  if (dtype == PS_F64) {
    f.twice = value;
  } else {
    f.single = (float)value;
  }
  return f;
}

/* Numbers whose sum is one weight. */
static int parts_of(ps_dtype dtype)
{
  return dtype == PS_F16 ? 2 : dtype == PS_BF16 ? 3 : 1;
}

/* Stores what dtype holds of a value, and returns it. */
static double store(void *to, ps_dtype dtype, size_t at, double value)
{
  switch (dtype) {
  case PS_F64: return ((double *)to)[at] = value;
  case PS_F16: return ps__f16_to_float(((uint16_t *)to)[at] = ps__float_to_f16((float)value));
  case PS_BF16: return ps__bf16_to_float(((uint16_t *)to)[at] = ps__float_to_bf16((float)value));
  default: return ((float *)to)[at] = (float)value;
  }
}

static CUdeviceptr moved(CUdeviceptr p, size_t elements, ps_dtype dtype)
{
  return p + elements * ps_dtype_size(dtype);
}

static size_t apart(size_t bytes)
{
  return (bytes + 255) / 256 * 256;
}

/* ---- lincomb --------------------------------------------------------------------------------- */

/* A call: blocks of rows go through scratch, which holds weights, inputs and outputs. */
typedef struct product {
  int outs, terms;
  const double *weight; /* (outs, terms) */
  const ps_term *in;
  ps_dtype dtype;
  size_t rows; /* at most, of a block */
  CUdeviceptr weights, inputs, outputs;
} product;

static bool uses(const product *p, int k, int j)
{
  return p->weight[(size_t)k * (size_t)p->terms + (size_t)j] != 0;
}

static int used_by(const product *p, int k)
{
  int count = 0;
  for (int j = 0; j < p->terms; ++j) {
    count += uses(p, k, j);
  }
  return count;
}

/* Outputs from first on that use the very inputs that it uses: a weight of 0 in a product would let
 * a NaN through. */
static int alike(const product *p, int first)
{
  int end = first + 1;
  for (bool same = true; same && end < p->outs; end += same) {
    for (int j = 0; j < p->terms && same; ++j) {
      same = uses(p, first, j) == uses(p, end, j);
    }
  }
  return end;
}

static double largest(const product *p, int first, int end)
{
  double found = 0;
  for (size_t w = (size_t)first * (size_t)p->terms; w < (size_t)end * (size_t)p->terms; ++w) {
    found = fabs(p->weight[w]) > found ? fabs(p->weight[w]) : found;
  }
  return found;
}

/* What the weights of these outputs are stored as multiples of; 1 where they are stored whole. */
static double scale_of(const product *p, int first, int end)
{
  return parts_of(p->dtype) > 1 ? largest(p, first, end) : 1;
}

/* Weights of all outputs: of each group a matrix (parts x inputs used, outputs), columns first. */
static void write_weights(const product *p, void *to)
{
  size_t at = 0;
  for (int first = 0, end; first < p->outs; first = end) {
    size_t used = (size_t)used_by(p, first);
    end = alike(p, first);
    double scale = scale_of(p, first, end);
    for (int k = first; k < end; ++k, at += used * (size_t)parts_of(p->dtype)) {
      size_t place = at;
      for (int j = 0; j < p->terms; ++j) {
        if (uses(p, k, j)) {
          double rest = p->weight[(size_t)k * (size_t)p->terms + (size_t)j] / scale;
          for (int part = 0; part < parts_of(p->dtype); ++part) {
            rest -= store(to, p->dtype, place + (size_t)part * used, rest);
          }
          ++place;
        }
      }
    }
  }
}

/* Rows at to at + rows of the inputs that output k uses, side by side, once for each part. */
static ps_status gather(ps__cuda_rank *rank, const product *p, int k, size_t at, size_t rows)
{
  size_t bytes = rows * ps_dtype_size(p->dtype), used = 0;
  ps_status status = PS_OK;
  for (int j = 0; j < p->terms && status == PS_OK; ++j) {
    if (uses(p, k, j)) {
      status = ps__cuda_copy(rank, p->inputs + used++ * bytes,
                             moved(ps__address(p->in[j].data), at, p->dtype), bytes);
    }
  }
  for (int part = 1; part < parts_of(p->dtype) && status == PS_OK; ++part) {
    status = ps__cuda_copy(rank, p->inputs + (size_t)part * used * bytes, p->inputs, used * bytes);
  }
  return status;
}

/* These outputs of a block of rows; *at elements into the weights. */
static ps_status multiply(ps__cuda_rank *rank, const product *p, int first, int end, size_t rows,
                          size_t *at)
{
  factor alpha = factor_of(scale_of(p, first, end), p->dtype), beta = factor_of(0, p->dtype);
  int inner = used_by(p, first) * parts_of(p->dtype), count = end - first;
  CUdeviceptr to = moved(p->outputs, (size_t)first * rows, p->dtype);
  cudaDataType type = type_of(p->dtype);
  if (inner == 0) {
    size_t bytes = (size_t)count * rows * ps_dtype_size(p->dtype);
    return ps__cuda_check(rank->device, ps__cuda.set(to, 0, bytes, rank->stream), "clearing");
  }
  cublasStatus_t result = ps__cublas.gemm(
      rank->blas->handle, PS__BLAS_AS_IS, PS__BLAS_AS_IS, (int)rows, count, inner, &alpha,
      (void *)(uintptr_t)p->inputs, type, (int)rows, 0,
      (void *)(uintptr_t)moved(p->weights, *at, p->dtype), type, inner, 0, &beta,
      (void *)(uintptr_t)to, type, (int)rows, 0, 1, compute_of(p->dtype), PS__BLAS_ANY_WAY);
  *at += (size_t)inner * (size_t)count;
  return ps__blas_check(rank, result, "a lincomb");
}

/* An output that is an input is written once all have been read. */
static ps_status combine_rows(ps__cuda_rank *rank, const product *p, void *const *out, size_t at,
                              size_t rows)
{
  size_t bytes = rows * ps_dtype_size(p->dtype), weight = 0;
  ps_status status = PS_OK;
  for (int first = 0, end; first < p->outs && status == PS_OK; first = end) {
    end = alike(p, first);
    status = gather(rank, p, first, at, rows);
    status = status == PS_OK ? multiply(rank, p, first, end, rows, &weight) : status;
  }
  for (int k = 0; k < p->outs && status == PS_OK; ++k) {
    status = ps__cuda_copy(rank, moved(ps__address(out[k]), at, p->dtype),
                           p->outputs + (size_t)k * bytes, bytes);
  }
  return status;
}

/* Inside of enter; the weights are in pinned memory, which the next call writes to only once all of
 * this is done. */
static ps_status combine(ps__cuda_rank *rank, const product *p, void *const *out, size_t n,
                         size_t weight_bytes)
{
  ps_status status = ps__blas_aim(rank);
  if (status == PS_OK) {
    status = ps__cuda_check(
        rank->device, ps__cuda.copy_from_host(p->weights, rank->staged, weight_bytes, rank->stream),
        "copying weights");
  }
  for (size_t at = 0; at < n && status == PS_OK; at += p->rows) {
    status = combine_rows(rank, p, out, at, n - at < p->rows ? n - at : p->rows);
  }
  return status;
}

static bool is_uniform(int terms, const ps_term *in, ps_dtype dtype)
{
  bool same = true;
  for (int j = 0; j < terms; ++j) {
    same = same && (in[j].data == NULL || in[j].dtype == dtype);
  }
  return same;
}

ps_status ps__blas_lincomb(ps__cuda_rank *rank, size_t n, int outs, int terms, const double *weight,
                           const ps_term *in, void *const *out, ps_dtype out_dtype)
{
  product p = {outs, terms, weight, in, out_dtype, n, 0, 0, 0};
  size_t columns = (size_t)terms * (size_t)parts_of(out_dtype), size = ps_dtype_size(out_dtype);
  size_t most = ROOM / ((columns + (size_t)outs) * size) / 64 * 64;
  size_t weight_bytes = columns * (size_t)outs * size;
  ps__scope scope;
  if (!is_uniform(terms, in, out_dtype) || most == 0) {
    return ps__plain_lincomb(rank, n, outs, terms, weight, in, out, out_dtype);
  }
  p.rows = n < most ? n : most;
  size_t input_bytes = apart(columns * p.rows * size);
  ps_status status =
      ps__cuda_scratch(rank, apart(weight_bytes) + input_bytes + (size_t)outs * p.rows * size);
  status = status == PS_OK ? ps__cuda_staged(rank, weight_bytes) : status;
  status = status == PS_OK ? ps__device_wait(rank->device, rank->done, NULL) : status;
  status = status == PS_OK ? ps__device_enter(rank->device, &scope) : status;
  if (status != PS_OK) {
    return status;
  }
  p.weights = rank->scratch;
  p.inputs = p.weights + apart(weight_bytes);
  p.outputs = p.inputs + input_bytes;
  write_weights(&p, rank->staged);
  status = combine(rank, &p, out, n, weight_bytes);
  ps_status marked = ps__cuda_mark(rank);
  ps__device_leave(&scope);
  return status == PS_OK ? marked : status;
}

/* ---- sweep ----------------------------------------------------------------------------------- */

/* Columns of items x size elements, in scratch: x and x - guess, or none of the two; then m, or
 * not.  Of every block of an item the products of all columns with each other. */
typedef struct squares {
  const ps_sweep *s;
  ps_dtype dtype;
  size_t n, blocks; /* of an item, the last one may be shorter */
  int columns;
  size_t size; /* of a sum: double for double, else float */
  CUdeviceptr column, sum;
} squares;

static ps_status add_scaled(ps__cuda_rank *rank, ps_dtype dtype, size_t n, double scale,
                            CUdeviceptr x, CUdeviceptr y)
{
  factor alpha = factor_of(scale, dtype);
  cudaDataType type = type_of(dtype), real = dtype == PS_F64 ? PS__BLAS_F64 : PS__BLAS_F32;
  return ps__blas_check(rank,
                        ps__cublas.axpy(rank->blas->handle, (int)n, &alpha, real,
                                        (void *)(uintptr_t)x, type, 1, (void *)(uintptr_t)y, type,
                                        1, real),
                        "a scaled sum");
}

static ps_status fill_columns(ps__cuda_rank *rank, const squares *q)
{
  const ps_sweep *s = q->s;
  size_t bytes = q->n * ps_dtype_size(q->dtype);
  CUdeviceptr at = q->column;
  ps_status status = PS_OK;
  if (s->guess != NULL) {
    status = ps__cuda_copy(rank, at, ps__address(s->x), bytes);
    status = status == PS_OK ? ps__cuda_copy(rank, at + bytes, ps__address(s->x), bytes) : status;
    status = status == PS_OK
                 ? add_scaled(rank, q->dtype, q->n, -1, ps__address(s->guess), at + bytes)
                 : status;
    at += 2 * bytes;
  }
  return status == PS_OK && s->m != NULL ? ps__cuda_copy(rank, at, ps__address(s->m), bytes)
                                         : status;
}

/* Blocks of so many rows of an item, count of them from the element on. */
static ps_status square(ps__cuda_rank *rank, const squares *q, size_t element, size_t rows,
                        size_t count, size_t sum)
{
  factor one = factor_of(1, q->dtype), none = factor_of(0, q->dtype);
  void *from = (void *)(uintptr_t)moved(q->column, element, q->dtype);
  void *to = (void *)(uintptr_t)(q->sum + sum * q->size);
  cudaDataType type = type_of(q->dtype), real = q->size == 8 ? PS__BLAS_F64 : PS__BLAS_F32;
  int c = q->columns;
  if (rows == 0 || count == 0) {
    return PS_OK;
  }
  return ps__blas_check(rank,
                        ps__cublas.gemm(rank->blas->handle, PS__BLAS_TURNED, PS__BLAS_AS_IS, c, c,
                                        (int)rows, &one, from, type, (int)q->n, (long long)rows,
                                        from, type, (int)q->n, (long long)rows, &none, to, real, c,
                                        (long long)c * c, (int)count, compute_of(q->dtype),
                                        PS__BLAS_ANY_WAY),
                        "sums of squares");
}

/* Inside of enter: all sums, and their way to the host. */
static ps_status measure(ps__cuda_rank *rank, const squares *q)
{
  size_t whole = q->s->size / BLOCK, rest = q->s->size % BLOCK;
  size_t each = (size_t)q->columns * (size_t)q->columns;
  ps_status status = ps__blas_aim(rank);
  status = status == PS_OK ? fill_columns(rank, q) : status;
  for (size_t item = 0; item < q->s->items && status == PS_OK; ++item) {
    size_t begin = item * q->s->size, sum = item * q->blocks * each;
    status = square(rank, q, begin, BLOCK, whole, sum);
    if (status == PS_OK) {
      status = square(rank, q, begin + whole * BLOCK, rest, 1, sum + whole * each);
    }
  }
  if (status == PS_OK) {
    status = ps__cuda_check(rank->device,
                            ps__cuda.copy_to_host(rank->staged, q->sum,
                                                  q->s->items * q->blocks * each * q->size,
                                                  rank->stream),
                            "copying sums");
  }
  return status;
}

/* Sum of squares of a column over an item. */
static double sum_of(const ps__cuda_rank *rank, const squares *q, size_t item, int column)
{
  size_t each = (size_t)q->columns * (size_t)q->columns;
  double sum = 0;
  for (size_t b = 0; b < q->blocks; ++b) {
    size_t at = (item * q->blocks + b) * each + (size_t)column * (size_t)(q->columns + 1);
    sum += q->size == 8 ? ((const double *)(const void *)rank->staged)[at]
                        : ((const float *)(const void *)rank->staged)[at];
  }
  return sum;
}

/* As cpu.c puts items together.  False where something is not finite, or too large to tell. */
static bool judge(const ps__cuda_rank *rank, const squares *q, ps_swept *swept)
{
  const ps_sweep *s = q->s;
  bool finite = true;
  for (size_t item = 0; item < s->items; ++item) {
    if (s->guess != NULL) {
      double reference = sum_of(rank, q, item, 0) / (double)s->size;
      double distance = sum_of(rank, q, item, 1) / (double)s->size;
      double excess = distance - s->floor * s->floor * reference;
      if (item == 0 || distance > swept->distance) {
        swept->distance = distance;
        swept->reference = reference;
      }
      swept->excess = excess > swept->excess ? excess : swept->excess;
      finite = finite && isfinite(distance) && isfinite(reference);
    }
    finite = finite && (s->m == NULL || isfinite(sum_of(rank, q, item, q->columns - 1)));
  }
  return finite;
}

/* Inside of enter: the answer and what is kept.  The difference is in scratch, and each output may
 * be the input of its own place. */
static ps_status answer(ps__cuda_rank *rank, const squares *q)
{
  const ps_sweep *s = q->s;
  size_t bytes = q->n * ps_dtype_size(q->dtype);
  void *made = s->out != NULL ? s->out : s->keep_m;
  ps_status status = PS_OK;
  if (made != NULL) {
    status = ps__cuda_copy(rank, ps__address(made), ps__address(s->m), bytes);
    if (status == PS_OK && s->guess != NULL && s->slope != 0) {
      status = add_scaled(rank, q->dtype, q->n, s->slope, q->column + bytes, ps__address(made));
    }
    if (status == PS_OK && s->keep_m != NULL) {
      status = ps__cuda_copy(rank, ps__address(s->keep_m), ps__address(made), bytes);
    }
  }
  return status == PS_OK && s->keep_x != NULL
             ? ps__cuda_copy(rank, ps__address(s->keep_x), ps__address(s->x), bytes)
             : status;
}

static ps_status inside(ps__cuda_rank *rank, const squares *q,
                        ps_status (*work)(ps__cuda_rank *rank, const squares *q))
{
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  status = work(rank, q);
  ps_status marked = ps__cuda_mark(rank);
  ps__device_leave(&scope);
  return status == PS_OK ? marked : status;
}

ps_status ps__blas_sweep(ps__cuda_rank *rank, const ps_sweep *s, const ps_wait *wait,
                         ps_swept *swept)
{
  squares q = {.s = s, .dtype = s->m != NULL ? s->m_dtype : s->x_dtype, .n = s->items * s->size};
  q.blocks = (s->size + BLOCK - 1) / BLOCK;
  q.columns = (s->guess != NULL ? 2 : 0) + (s->m != NULL ? 1 : 0);
  q.size = q.dtype == PS_F64 ? sizeof(double) : sizeof(float);
  if (s->items > ITEMS_MAX || q.n > INT_MAX || q.columns == 0 ||
      (s->x != NULL && s->x_dtype != q.dtype)) {
    return ps__plain_sweep(rank, s, wait, swept);
  }
  size_t columns = apart((size_t)q.columns * q.n * ps_dtype_size(q.dtype));
  size_t sums = s->items * q.blocks * (size_t)q.columns * (size_t)q.columns * q.size;
  ps_status status = ps__cuda_scratch(rank, columns + sums);
  status = status == PS_OK ? ps__cuda_staged(rank, sums) : status;
  q.column = rank->scratch;
  q.sum = q.column + columns;
  status = status == PS_OK ? inside(rank, &q, measure) : status;
  status = status == PS_OK ? ps__device_wait(rank->device, rank->done, wait) : status;
  if (status == PS_OK && !judge(rank, &q, swept)) {
    *swept = (ps_swept){0, 0, 0, 0};
    return ps__plain_sweep(rank, s, wait, swept);
  }
  return status == PS_OK ? inside(rank, &q, answer) : status;
}
