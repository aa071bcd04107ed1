/* test_halves.c - half.h: float to fp16 and bf16 and back, against the formats themselves. */
#include <float.h>
#include <math.h>

#include "backend/half.h"
#include "runner.h"
#include "vectors.h"

static void check_widening(float (*widen)(uint16_t), int exponent_bits, int mantissa_bits)
{
  for (uint32_t h = 0; h < 0x10000; h++) {
    double expected = decode(h, exponent_bits, mantissa_bits);
    float got = widen((uint16_t)h);
    CHECK(isnan(expected) ? isnan(got) : (double)got == expected);
    CHECK_EQ(!!signbit(got), h >> 15);
  }
}

TEST(f16_to_float_is_the_format)
{
  check_widening(ps__f16_to_float, 5, 10);
}

TEST(bf16_to_float_is_the_format)
{
  check_widening(ps__bf16_to_float, 8, 7);
}

TEST(halves_come_back_as_they_were)
{
  for (uint32_t h = 0; h < 0x10000; h++) {
    uint16_t f16 = ps__float_to_f16(ps__f16_to_float((uint16_t)h));
    uint16_t bf16 = ps__float_to_bf16(ps__bf16_to_float((uint16_t)h));
    if ((h & 0x7fff) <= 0x7c00) {
      CHECK_EQ(f16, h);
    } else {
      CHECK_GT(f16 & 0x7fff, 0x7c00);
      CHECK_EQ(f16 >> 15, h >> 15);
    }
    if ((h & 0x7fff) <= 0x7f80) {
      CHECK_EQ(bf16, h);
    } else {
      CHECK_GT(bf16 & 0x7fff, 0x7f80);
      CHECK_EQ(bf16 >> 15, h >> 15);
    }
  }
}

/* Between neighbours h and h + 1 (the last one infinity) lies a tie, and floats on both sides. */
static void check_rounding(uint16_t (*round)(float), float (*widen)(uint16_t), uint16_t infinity,
                           float past_largest)
{
  for (uint16_t h = 0; h < infinity; h++) {
    double above = h + 1 == infinity ? (double)past_largest : (double)widen((uint16_t)(h + 1));
    float tie = (float)(0.5 * ((double)widen(h) + above));
    uint16_t even = (uint16_t)(h + (h & 1));
    for (int negative = 0; negative < 2; negative++) {
      float sign = negative ? -1.0f : 1.0f;
      uint16_t bit = negative ? 0x8000 : 0;
      CHECK_EQ(round(sign * tie), even | bit);
      CHECK_EQ(round(sign * nextafterf(tie, 0)), h | bit);
      CHECK_EQ(round(sign * nextafterf(tie, INFINITY)), (h + 1) | bit);
    }
  }
}

TEST(f16_rounds_to_nearest_even)
{
  check_rounding(ps__float_to_f16, ps__f16_to_float, 0x7c00, 0x1p16f);
  CHECK_EQ(ps__float_to_f16(FLT_MAX), 0x7c00);
  CHECK_EQ(ps__float_to_f16(-INFINITY), 0xfc00);
  CHECK_EQ(ps__float_to_f16(-0x1p-149f), 0x8000);
}

/* The middle of the largest bf16 and 2^128 is a float; 2^128 itself is not. */
TEST(bf16_rounds_to_nearest_even)
{
  check_rounding(ps__float_to_bf16, ps__bf16_to_float, 0x7f7f, 0x1.fep127f);
  CHECK_EQ(ps__float_to_bf16(0x1.fefffep127f), 0x7f7f);
  CHECK_EQ(ps__float_to_bf16(0x1.ffp127f), 0x7f80);
  CHECK_EQ(ps__float_to_bf16(FLT_MAX), 0x7f80);
  CHECK_EQ(ps__float_to_bf16(-INFINITY), 0xff80);
  CHECK_EQ(ps__float_to_bf16(-0x1p-149f), 0x8000);
}

TEST(nan_stays_nan_in_halves)
{
  const uint32_t nans[] = {0x7f800001, 0x7fbfffff, 0x7fc00000, 0x7fffffff, 0xff800001, 0xffffffff};
  for (size_t i = 0; i < sizeof(nans) / sizeof(nans[0]); i++) {
    float nan = ps__bits_float(nans[i]);
    CHECK_GT(ps__float_to_f16(nan) & 0x7fff, 0x7c00);
    CHECK_GT(ps__float_to_bf16(nan) & 0x7fff, 0x7f80);
    CHECK_EQ(ps__float_to_f16(nan) >> 15, nans[i] >> 31);
    CHECK_EQ(ps__float_to_bf16(nan) >> 15, nans[i] >> 31);
  }
}

/* The loops of the backend may be vectorised: they must agree with the functions called one by one.
 */
TEST(halves_in_bulk_are_the_same)
{
  static uint16_t halves[0x10000], back[0x10000];
  static float floats[0x10000];
  for (uint32_t h = 0; h < 0x10000; h++) {
    halves[h] = (uint16_t)h;
  }
  for (int i = 0; i < 2; i++) {
    ps_dtype dtype = i ? PS_BF16 : PS_F16;
    const double one = 1;
    const ps_term widen = {halves, dtype}, narrow = {floats, PS_F32};
    void *wide = floats, *narrowed = back;
    CHECK_OK(cpu()->lincomb(cpu(), 0x10000, 1, 1, &one, &widen, &wide, PS_F32));
    for (uint32_t h = 0; h < 0x10000; h++) {
      float expected = i ? ps__bf16_to_float((uint16_t)h) : ps__f16_to_float((uint16_t)h);
      CHECK(isnan(expected) ? isnan(floats[h]) : floats[h] == expected);
      /* A tie or its neighbours, or any bits at all. */
      floats[h] = h % 4 == 3 ? ps__bits_float(random_bits())
                             : ps__bits_float(ps__float_bits(expected) + 0xfff * (h % 4) + h % 3);
    }
    CHECK_OK(cpu()->lincomb(cpu(), 0x10000, 1, 1, &one, &narrow, &narrowed, dtype));
    for (uint32_t h = 0; h < 0x10000; h++) {
      float value = 0.0f + 1.0f * floats[h];
      CHECK_EQ(back[h], i ? ps__float_to_bf16(value) : ps__float_to_f16(value));
    }
  }
}
