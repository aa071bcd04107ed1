/* ptx.h - what translated PTX runs on: threads that take turns, words for registers, and loads and
 * stores that are checked.  translate.py writes what includes it, driver.c runs that.
 */
#ifndef PTX_H
#define PTX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

typedef struct ptx_thread {
  uint64_t tid[3], ntid[3], ctaid[3], nctaid[3];
  unsigned char *shared; /* of its block */
  bool waits, done;      /* at a barrier, or at its end */
  ucontext_t here;
} ptx_thread;

typedef struct ptx_kernel {
  const char *name;
  void (*run)(ptx_thread *t, const unsigned char *param);
  bool meets;   /* its threads meet at barriers */
  size_t bytes; /* of its argument */
} ptx_kernel;

extern const ptx_kernel ptx_kernels[];
extern const int ptx_count;
extern const size_t ptx_shared_bytes;

/* Ends the program where the bytes are not all the kernel's to touch, or are not aligned. */
void ptx_check(uint64_t address, size_t bytes);
void ptx_vector(uint64_t address, size_t bytes);
void ptx_barrier(ptx_thread *t);

static inline uint64_t ptx_shared(const ptx_thread *t, uint64_t offset)
{
  return (uint64_t)(uintptr_t)t->shared + (uint32_t)offset;
}

static inline uint64_t ptx_load(uint64_t address, size_t bytes)
{
  uint64_t word = 0;
  ptx_check(address, bytes);
  memcpy(&word, (const void *)(uintptr_t)address, bytes);
  return word;
}

static inline void ptx_store(uint64_t address, size_t bytes, uint64_t word)
{
  ptx_check(address, bytes);
  memcpy((void *)(uintptr_t)address, &word, bytes);
}

static inline float ptx_float(uint64_t word)
{
  uint32_t bits = (uint32_t)word;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint64_t ptx_word_of_float(float value)
{
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline double ptx_double(uint64_t word)
{
  double value;
  memcpy(&value, &word, sizeof value);
  return value;
}

static inline uint64_t ptx_word_of_double(double value)
{
  uint64_t word;
  memcpy(&word, &value, sizeof word);
  return word;
}

/* By the compiler's own halves, not by those of the CPU backend that it is compared with. */
static inline float ptx_half(uint16_t bits)
{
  _Float16 half;
  memcpy(&half, &bits, sizeof half);
  return (float)half;
}

static inline uint64_t ptx_word_of_half(float value)
{
  _Float16 half = (_Float16)value;
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  return value != value ? 0x7fff : bits;
}

static inline uint64_t ptx_word_of_bfloat(float value)
{
  uint32_t bits = (uint32_t)ptx_word_of_float(value);
  uint32_t even = bits >> 16 & 1;
  return value != value ? 0x7fff : (uint16_t)((bits + 0x7fff + even) >> 16);
}

#endif
