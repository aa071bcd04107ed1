/* shim.h - what kernels.cu needs to be compiled by a C compiler, in front of an include of it.
 *
 * A thread of a block is a thread of the host, or all of them are one: SHIM_SHARED says how memory
 * of a block is declared, and SHIM_BARRIER what its threads do at a barrier.  The fake driver
 * (work.c) runs blocks of one thread, one after the other; tests/c/test_kernels.c runs whole
 * blocks on threads, so that TSan sees what a missing barrier does.
 */
#ifndef SHIM_H
#define SHIM_H

#include <string.h>

#include "backend/half.h"

#ifndef SHIM_SHARED
#define SHIM_SHARED static _Thread_local
#endif
#ifndef SHIM_BARRIER
#define SHIM_BARRIER ((void)0)
#endif

typedef struct shim_index {
  unsigned x, y;
} shim_index;

static _Thread_local shim_index threadIdx, blockIdx, blockDim, gridDim;

#define KERNEL                  __attribute__((unused)) static void
#define DEVICE                  static inline
#define UNROLL                  _Pragma("GCC unroll 16")
#define __shared__              SHIM_SHARED
#define __align__(bytes)        __attribute__((aligned(bytes), may_alias))
#define __syncthreads()         SHIM_BARRIER
#define __threadfence()         ((void)0) /* blocks come one after the other */
#define __threadfence_system()  ((void)0)
#define atomicAdd(place, value) __atomic_fetch_add((place), (value), __ATOMIC_ACQ_REL)

static inline float half_to_float(unsigned short bits)
{
  return ps__f16_to_float(bits);
}

static inline unsigned short float_to_half(float value)
{
  return ps__float_to_f16(value);
}

static inline unsigned short float_to_bfloat(float value)
{
  return ps__float_to_bf16(value);
}

static inline float __uint_as_float(unsigned bits)
{
  return ps__bits_float(bits);
}

static inline unsigned __float_as_uint(float value)
{
  return ps__float_bits(value);
}

static inline unsigned long long shim_double_bits(double value)
{
  unsigned long long bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline double __hiloint2double(int high, int low)
{
  unsigned long long bits = (unsigned long long)(unsigned)high << 32 | (unsigned)low;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline int __double2loint(double value)
{
  return (int)(unsigned)shim_double_bits(value);
}

static inline int __double2hiint(double value)
{
  return (int)(unsigned)(shim_double_bits(value) >> 32);
}

#endif
