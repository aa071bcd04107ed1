/* vectors.h - numbers of every dtype for tests of the CPU backend, and that backend a second time.
 *
 * The file under test is built once more with a say in which of its wide instruction sets it uses:
 * all must give the same bits.
 */
#ifndef PARASTEP_VECTORS_H
#define PARASTEP_VECTORS_H

#include <stddef.h>
#include <stdint.h>

#include "parastep_backend.h"

enum { DTYPES = 4, LONGEST = 1100 };

extern const ps_dtype dtypes[DTYPES];

extern const ps_backend narrow_cpu;
extern int widest; /* that narrow_cpu uses: 0 plain, 1 AVX2, 2 AVX-512, as the machine has them */

const ps_backend *cpu(void); /* the library's own */

uint32_t random_bits(void);
double random_value(void); /* of either sign and of magnitudes from 2^-20 to 4 */

/* The format's own definition, without bit tricks: sign, exponent of e bits, mantissa of f bits. */
double decode(uint32_t bits, int e, int f);

double get(const void *data, ps_dtype dtype, size_t i);
/* Rounds an accumulator's value (a float but for PS_F64) to storage. */
void put(void *data, ps_dtype dtype, size_t i, double value);
double unit(ps_dtype dtype); /* relative error of one rounding */

/* A buffer of n elements off any alignment but their own, with guards on both sides. */
typedef struct buffer {
  _Alignas(64) unsigned char bytes[(LONGEST + 2) * sizeof(double)];
  size_t n;
  ps_dtype dtype;
} buffer;

unsigned char *data_of(buffer *b);
void reset(buffer *b, ps_dtype dtype, size_t n);
void fill(buffer *b, ps_dtype dtype, size_t n); /* with random values */
int guards_hold(const buffer *b);

#endif
