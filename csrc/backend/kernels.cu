/* kernels.cu - the passes over device memory: lincomb and sweep.
 *
 * nvcc compiles it for every architecture when the package is built, and cuda_kernels.c launches
 * what comes of it; tests compile the same source with a C compiler, behind tests/gpu/fake/shim.h.
 * The order of additions is that of the CPU backend and nothing is contracted (-fmad=false), so
 * that a lincomb and a rebased answer have the CPU's bits; sums over elements are formed in another
 * order, but in the same one every time.
 *
 * Bytes that a pass must move, for n elements: a lincomb n x (those of every input with a weight
 * and of every output, once); a sweep n x (x, guess, m, and out, keep_x, keep_m where they are
 * wanted). At 4 TB/s (most of what an H200 has) the guesses of a round of 8 ranks, 20 inputs and 7
 * outputs of 2 MB, are 54 MB or 14 us, an ask is 12 MB or 3 us.  What is in the second cache goes
 * faster; what is computed beside, some 170 instructions on 8 elements of an input at 7 outputs,
 * about as fast.
 */
#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KERNEL extern "C" __global__ void __launch_bounds__(PS__THREADS)
#define DEVICE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")

DEVICE float half_to_float(unsigned short bits)
{
  return __half2float(__ushort_as_half(bits));
}

DEVICE unsigned short float_to_half(float value)
{
  return __half_as_ushort(__float2half_rn(value));
}

DEVICE unsigned short float_to_bfloat(float value)
{
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
#endif

/* ps_dtype, which parastep.h declares with more than nvcc is to see. */
enum { F32 = 1, F16 = 2, BF16 = 3, F64 = 4 };

typedef unsigned long long count_t;

/* What a thread reads or writes of one operand: up to 16 bytes, in registers. */
typedef struct pack {
  unsigned w[4];
} pack;

typedef struct __align__(16) words4
{
  unsigned w[4];
}
words4;

typedef struct __align__(8) words2
{
  unsigned w[2];
}
words2;

DEVICE int size_of(int dtype)
{
  return dtype == F64 ? 8 : dtype == F32 ? 4 : 2;
}

/* bytes at from, of the room for a whole thread's elements that `whole` says; vector only where
 * they are all there. */
DEVICE pack fetch(const char *from, int whole, int bytes, int vector)
{
  pack p = {{0, 0, 0, 0}};
  if (vector && whole == 16) {
    words4 words = *(const words4 *)from;
    UNROLL
    for (int i = 0; i < 4; i++) {
      p.w[i] = words.w[i];
    }
  } else if (vector && whole == 8) {
    words2 words = *(const words2 *)from;
    p.w[0] = words.w[0];
    p.w[1] = words.w[1];
  } else if (vector) {
    p.w[0] = *(const unsigned *)from;
  } else {
    UNROLL
    for (int i = 0; i < 8; i++) {
      if (2 * i < bytes) {
        p.w[i / 2] |= (unsigned)((const unsigned short *)from)[i] << (16 * (i % 2));
      }
    }
  }
  return p;
}

DEVICE void put(char *to, pack p, int whole, int bytes, int vector)
{
  if (vector && whole == 16) {
    words4 words = {{p.w[0], p.w[1], p.w[2], p.w[3]}};
    *(words4 *)to = words;
  } else if (vector && whole == 8) {
    words2 words = {{p.w[0], p.w[1]}};
    *(words2 *)to = words;
  } else if (vector) {
    *(unsigned *)to = p.w[0];
  } else {
    UNROLL
    for (int i = 0; i < 8; i++) {
      if (2 * i < bytes) {
        ((unsigned short *)to)[i] = (unsigned short)(p.w[i / 2] >> (16 * (i % 2)));
      }
    }
  }
}

/* Element i of a pack of halves. */
DEVICE float half_at(pack p, int dtype, int i)
{
  unsigned short bits = (unsigned short)(p.w[i / 2] >> (16 * (i % 2)));
  return dtype == BF16 ? __uint_as_float((unsigned)bits << 16) : half_to_float(bits);
}

DEVICE void set_half(pack *p, int dtype, int i, float value)
{
  unsigned bits = dtype == BF16 ? float_to_bfloat(value) : float_to_half(value);
  p->w[i / 2] |= bits << (16 * (i % 2));
}

/* ---- sums over a block ----------------------------------------------------------------------- */

/* Sums over all threads of the block, in thread 0, added up as a tree of fixed shape. */
DEVICE ps__part add_up(ps__part mine)
{
  __shared__ ps__part part[PS__THREADS];
  part[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      part[threadIdx.x].distance += part[threadIdx.x + half].distance;
      part[threadIdx.x].reference += part[threadIdx.x + half].reference;
      part[threadIdx.x].not_finite += part[threadIdx.x + half].not_finite;
    }
    __syncthreads();
  }
  ps__part sum = part[0];
  __syncthreads(); /* the next call may write */
  return sum;
}

/* One more item in the result of a sweep.  A NaN, once there, stays: nothing is larger. */
DEVICE void judge_item(const ps__sweep_args *s, count_t item, ps__part sum,
                       ps__sweep_result *so_far)
{
  double distance = sum.distance / (double)s->size, reference = sum.reference / (double)s->size;
  double excess = distance - s->floor_squared * reference;
  if (item == 0 || distance != distance || distance > so_far->distance) {
    so_far->distance = distance;
    so_far->reference = reference;
  }
  if (excess != excess || excess > so_far->excess) {
    so_far->excess = excess;
  }
  so_far->not_finite += sum.not_finite;
}

/* Whether this block is the last one to come here: it then sees what all others have written. */
DEVICE int is_last(unsigned *ticket)
{
  __shared__ int last;
  if (threadIdx.x == 0) {
    unsigned blocks = gridDim.x * gridDim.y;
    __threadfence();
    last = atomicAdd(ticket, 1u) == blocks - 1;
    if (last) {
      *ticket = 0;
    }
    __threadfence();
  }
  __syncthreads();
  return last;
}

/* The last block adds up the parts of every item, in order. */
DEVICE void finish_sweep(const ps__sweep_args *s)
{
  ps__sweep_result result = {0, 0, 0, 0};
  for (count_t item = 0; item < s->items; item++) {
    ps__part sum = {0, 0, 0};
    for (unsigned k = threadIdx.x; k < gridDim.x; k += blockDim.x) {
      const volatile ps__part *part = &s->part[item * gridDim.x + k];
      sum.distance += part->distance;
      sum.reference += part->reference;
      sum.not_finite += part->not_finite;
    }
    judge_item(s, item, add_up(sum), &result);
  }
  if (threadIdx.x == 0) {
    *s->result = result;
    __threadfence_system();
  }
}

/* ---- the kernels, for each kind -------------------------------------------------------------- */

#define KIND(name) name##_halves
#define REAL       float
#define WIDTH      8
#define WEIGHTS    weight.single
#include "kernel_body.h"

#define KIND(name) name##_singles
#define REAL       float
#define WIDTH      4
#define WEIGHTS    weight.single
#include "kernel_body.h"

#define KIND(name) name##_doubles
#define REAL       double
#define WIDTH      2
#define WEIGHTS    weight.twice
#include "kernel_body.h"
