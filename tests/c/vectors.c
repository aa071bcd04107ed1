/* vectors.c - numbers of every dtype, and the CPU backend a second time, as narrow as a test wants.
 */
#include "vectors.h"

#include <math.h>
#include <string.h>

#include "runner.h"

int widest;

static int may_use(const char *feature)
{
  return widest >= (strcmp(feature, "avx512f") == 0 ? 2 : 1);
}

#define PS__CPU_SUPPORTS(feature) (may_use(feature) && __builtin_cpu_supports(feature))
#define ps__cpu                   narrow_cpu
#include "backend/cpu.c" // NOLINT(bugprone-suspicious-include)
#undef ps__cpu

const ps_dtype dtypes[DTYPES] = {PS_F32, PS_F16, PS_BF16, PS_F64};

static uint64_t random_state = 1;

uint32_t random_bits(void)
{
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(random_state >> 32);
}

double random_value(void)
{
  double mantissa = (double)random_bits() / 4294967296.0 - 0.5;
  return ldexp(mantissa, 3 - (int)(random_bits() % 20));
}

double decode(uint32_t bits, int e, int f)
{
  int exponent = (int)(bits >> f) & ((1 << e) - 1);
  int bias = (1 << (e - 1)) - 1;
  double mantissa = (double)(bits & ((1u << f) - 1)) / (double)(1u << f);
  double magnitude;
  if (exponent == (1 << e) - 1) {
    magnitude = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = ldexp(mantissa, 1 - bias);
  } else {
    magnitude = ldexp(1 + mantissa, exponent - bias);
  }
  return bits >> (e + f) & 1 ? -magnitude : magnitude;
}

double get(const void *data, ps_dtype dtype, size_t i)
{
  switch (dtype) {
  case PS_F16: return decode(((const uint16_t *)data)[i], 5, 10);
  case PS_BF16: return decode(((const uint16_t *)data)[i], 8, 7);
  case PS_F32: return (double)((const float *)data)[i];
  default: return ((const double *)data)[i];
  }
}

void put(void *data, ps_dtype dtype, size_t i, double value)
{
  switch (dtype) {
  case PS_F16: ((uint16_t *)data)[i] = ps__float_to_f16((float)value); break;
  case PS_BF16: ((uint16_t *)data)[i] = ps__float_to_bf16((float)value); break;
  case PS_F32: ((float *)data)[i] = (float)value; break;
  default: ((double *)data)[i] = value; break;
  }
}

double unit(ps_dtype dtype)
{
  return dtype == PS_F16    ? 0x1p-11
         : dtype == PS_BF16 ? 0x1p-8
         : dtype == PS_F32  ? 0x1p-24
                            : 0x1p-53;
}

unsigned char *data_of(buffer *b)
{
  return b->bytes + ps_dtype_size(b->dtype);
}

void reset(buffer *b, ps_dtype dtype, size_t n)
{
  memset(b->bytes, 0xa5, sizeof(b->bytes));
  b->dtype = dtype;
  b->n = n;
}

void fill(buffer *b, ps_dtype dtype, size_t n)
{
  reset(b, dtype, n);
  for (size_t i = 0; i < n; i++) {
    put(data_of(b), dtype, i, random_value());
  }
}

int guards_hold(const buffer *b)
{
  size_t size = ps_dtype_size(b->dtype), used = (b->n + 1) * size;
  for (size_t i = 0; i < sizeof(b->bytes); i++) {
    if ((i < size || i >= used) && b->bytes[i] != 0xa5) {
      return 0;
    }
  }
  return 1;
}

const ps_backend *cpu(void)
{
  const ps_backend *backend = ps_backend_find("cpu");
  CHECK(backend != NULL);
  return backend;
}
