/* block.h - arithmetic on short blocks, for one accumulator type and one instruction set.
 *
 * cpu.c includes this file once for each pair of them and calls what it defines through a table. It
 * expects REAL (float or double) and REAL_DTYPE, TARGET (a function attribute, or nothing) and its
 * VECTOR_BYTES, and NAME(verb).  Loops are elementwise, or a tree of fixed shape, and nothing is
 * contracted: every instruction set gives the same bits.
 */

enum { NAME(LANES) = TILE_BYTES / VECTOR_BYTES };
typedef REAL NAME(vector)
    __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

/* to = from (NULL: 0) + sum_j weight[j] v[j], over a tile, which stays in registers all along.  A
 * term of weight 0 is not read. */
TARGET static void NAME(combine)(void *to, const void *from, size_t terms, const double *weight,
                                 const void *const *v)
{
  NAME(vector) sum[NAME(LANES)];
  UNROLL
  for (int l = 0; l < NAME(LANES); l++) {
    sum[l] = from ? ((const NAME(vector) *)from)[l] : (NAME(vector)){0};
  }
  for (size_t j = 0; j < terms; j++) {
    const NAME(vector) *term = v[j];
    REAL w = (REAL)weight[j];
    if (weight[j] == 0) {
      continue;
    }
    UNROLL
    for (int l = 0; l < NAME(LANES); l++) {
      sum[l] += w * term[l];
    }
  }
  UNROLL
  for (int l = 0; l < NAME(LANES); l++) {
    ((NAME(vector) *)to)[l] = sum[l];
  }
}

/* The n elements at from as REAL: where they are if stored so, else in scratch. */
TARGET static const void *NAME(load)(void *scratch, const void *from, ps_dtype dtype, size_t n)
{
  REAL *to = scratch;
  const uint16_t *half = from;
  if (dtype == REAL_DTYPE) {
    return from;
  }
  if (dtype == PS_F16) {
    for (size_t i = 0; i < n; i++) {
      to[i] = (REAL)ps__f16_to_float(half[i]);
    }
  } else if (dtype == PS_BF16) {
    for (size_t i = 0; i < n; i++) {
      to[i] = (REAL)ps__bf16_to_float(half[i]);
    }
  } else if (dtype == PS_F32) {
    for (size_t i = 0; i < n; i++) {
      to[i] = (REAL)((const float *)from)[i];
    }
  } else {
    for (size_t i = 0; i < n; i++) {
      to[i] = (REAL)((const double *)from)[i];
    }
  }
  return scratch;
}

/* Rounds once: REAL is double for PS_F64 alone, so no half is ever made from a double. */
TARGET static void NAME(store)(void *to, ps_dtype dtype, const void *from, size_t n)
{
  const REAL *value = from;
  uint16_t *half = to;
  if (dtype == REAL_DTYPE) {
    memcpy(to, from, n * sizeof(REAL));
  } else if (dtype == PS_F16) {
    for (size_t i = 0; i < n; i++) {
      half[i] = ps__float_to_f16((float)value[i]);
    }
  } else {
    for (size_t i = 0; i < n; i++) {
      half[i] = ps__float_to_bf16((float)value[i]);
    }
  }
}

/* to = a + w b */
TARGET static void NAME(shift)(void *to, const void *a, const void *b, double w, size_t n)
{
  REAL *sum = to;
  const REAL *left = a, *right = b;
  REAL weight = (REAL)w;
  for (size_t i = 0; i < n; i++) {
    sum[i] = left[i] + weight * right[i];
  }
}

/* Sum of v[i]^2 over n <= BLOCK elements, as a tree over BLOCK places. */
TARGET static double NAME(sum_squares)(const void *v, size_t n)
{
  const REAL *value = v;
  REAL square[BLOCK];
  for (size_t i = 0; i < n; i++) {
    square[i] = value[i] * value[i];
  }
  memset(square + n, 0, (BLOCK - n) * sizeof(REAL));
  for (size_t half = BLOCK / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; i++) {
      square[i] += square[half + i];
    }
  }
  return (double)square[0];
}

/* A NaN or an infinity is what differs from itself by other than 0. */
TARGET static size_t NAME(count_not_finite)(const void *v, size_t n)
{
  const REAL *value = v;
  unsigned count = 0;
  for (size_t i = 0; i < n; i++) {
    count += value[i] - value[i] != 0;
  }
  return count;
}

static const arithmetic NAME(arithmetic) = {
    .dtype = REAL_DTYPE,
    .size = sizeof(REAL),
    .width = TILE_BYTES / sizeof(REAL),
    .combine = NAME(combine),
    .load = NAME(load),
    .store = NAME(store),
    .shift = NAME(shift),
    .sum_squares = NAME(sum_squares),
    .count_not_finite = NAME(count_not_finite),
};

#undef REAL
#undef REAL_DTYPE
#undef TARGET
#undef VECTOR_BYTES
#undef NAME
