/* half.h - fp16 and bf16 to float and back, one element at a time.
 *
 * Plain operations without branches, so that the compiler vectorises the loops around them
 * (block.h) and the bits are the same on every CPU: F16C and its like differ in what they make of a
 * NaN. Rounding is to nearest, ties to even; a NaN stays a NaN of the same sign.
 */
#ifndef PS_BACKEND_HALF_H
#define PS_BACKEND_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t ps__float_bits(float value)
{
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float ps__bits_float(uint32_t bits)
{
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

/* One of two, without a branch: gcc would move a sum that only one of them needs into it, since a
 * sum might trap, and then not vectorise the loop around it. */
static inline uint32_t ps__select(int condition, uint32_t yes, uint32_t no)
{
  uint32_t mask = 0u - (uint32_t)condition;
  return (yes & mask) | (no & ~mask);
}

static inline float ps__bf16_to_float(uint16_t half)
{
  return ps__bits_float((uint32_t)half << 16);
}

static inline uint16_t ps__float_to_bf16(float value)
{
  uint32_t bits = ps__float_bits(value);
  /* Half a unit of the last place kept, less one where that place is even: ties go to even. */
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  /* Rounding would carry a NaN's payload into its sign, or cut it down to an infinity. */
  uint32_t nan = bits >> 16 | 0x40;
  return (uint16_t)ps__select((bits & 0x7fffffff) > 0x7f800000, nan, rounded);
}

static inline float ps__f16_to_float(uint16_t half)
{
  uint32_t sign = (uint32_t)(half & 0x8000) << 16;
  uint32_t magnitude = half & 0x7fff;
  /* The exponent's bias grows from 15 to 127; that of NaN and infinity from 31 to 255. */
  uint32_t normal = (magnitude << 13) + ps__select(magnitude < 0x7c00, 112u << 23, 224u << 23);
  /* A subnormal counts units of 2^-24, which is the last place of 0.5. */
  uint32_t subnormal = ps__float_bits(ps__bits_float(0x3f000000 | magnitude) - 0.5f);
  return ps__bits_float(sign | ps__select(magnitude < 0x400, subnormal, normal));
}

static inline uint16_t ps__float_to_f16(float value)
{
  uint32_t sign = ps__float_bits(value) >> 16 & 0x8000;
  uint32_t magnitude = ps__float_bits(value) & 0x7fffffff;
  uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  /* Below 2^-14 the sum with 0.5 rounds to units of 2^-24 and has their number in its mantissa. */
  uint32_t subnormal = ps__float_bits(ps__bits_float(magnitude) + 0.5f) - 0x3f000000;
  uint32_t nan = 0x7e00 | (magnitude >> 13 & 0x1ff);
  uint32_t rounded = ps__select(magnitude < 0x38800000, subnormal, normal);
  rounded = ps__select(magnitude < 0x47800000, rounded, 0x7c00);
  return (uint16_t)(sign | ps__select(magnitude > 0x7f800000, nan, rounded));
}

#endif
