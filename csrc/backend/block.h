/* block.h - arithmetic on short blocks of vectors, for one accumulator type and one instruction set.
 *
 * cpu.c includes this file once for each pair of them and calls what it defines through a table.  It
 * expects REAL (float or double) with REAL_DTYPE, TARGET (a function attribute, or nothing) with
 * VECTOR_BYTES, and NAME(verb).  Loops are elementwise, or a tree of fixed shape, and nothing is
 * contracted: every instruction set gives the same bits.
 */

typedef REAL NAME(vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

/* n elements, in turns of a few cache lines.  A turn's sum stays in registers; outputs take turns, so
 * that loads, arithmetic and stores overlap. */
TARGET static void NAME(combine)(const tile *c, size_t n)
{
  for (size_t at = 0; at < n; at += LANES * VECTOR_BYTES / sizeof(REAL))
    for (size_t k = 0; k < c->outs; k++) {
      const double *weight = c->weight + k * c->stride;
      const NAME(vector) *from = (const void *)((const REAL *)c->from[k] + at);
      NAME(vector) *to = (void *)((REAL *)c->to[k] + at), sum[LANES];
      UNROLL
      for (int l = 0; l < LANES; l++)
        sum[l] = from[l];
      for (size_t j = 0; j < c->terms; j++) {
        const NAME(vector) *term = (const void *)((const REAL *)c->v[j] + at);
        REAL w = (REAL)weight[j];
        if (weight[j] == 0)
          continue;
        UNROLL
        for (int l = 0; l < LANES; l++)
          sum[l] += w * term[l];
      }
      UNROLL
      for (int l = 0; l < LANES; l++)
        to[l] = sum[l];
    }
}

/* The n elements at from as REAL: where they are if stored so, else in scratch. */
TARGET static const void *NAME(load)(void *scratch, const void *from, ps_dtype dtype, size_t n)
{
  REAL *to = scratch;
  if (dtype == REAL_DTYPE)
    return from;
  if (dtype == PS_F16)
    EACH(n) to[i] = ps__f16_to_float(((const uint16_t *)from)[i]);
  else if (dtype == PS_BF16)
    EACH(n) to[i] = ps__bf16_to_float(((const uint16_t *)from)[i]);
  else if (dtype == PS_F32)
    EACH(n) to[i] = (REAL)((const float *)from)[i];
  else
    EACH(n) to[i] = (REAL)((const double *)from)[i];
  return scratch;
}

/* Rounds once: REAL is double for PS_F64 alone, so that a half never comes by way of float. */
TARGET static void NAME(store)(void *to, ps_dtype dtype, const void *from, size_t n)
{
  const REAL *value = from;
  if (dtype == REAL_DTYPE)
    memcpy(to, from, n * sizeof(REAL));
  else if (dtype == PS_F16)
    EACH(n) ((uint16_t *)to)[i] = ps__float_to_f16((float)value[i]);
  else
    EACH(n) ((uint16_t *)to)[i] = ps__float_to_bf16((float)value[i]);
}

/* to = a + w b */
TARGET static void NAME(shift)(void *to, const void *a, const void *b, double w, size_t n)
{
  REAL weight = (REAL)w;
  EACH(n) ((REAL *)to)[i] = ((const REAL *)a)[i] + weight * ((const REAL *)b)[i];
}

/* Sum of v[i]^2 for n <= BLOCK, as a tree over BLOCK places. */
TARGET static double NAME(sum_squares)(const void *v, size_t n)
{
  const REAL *value = v;
  REAL square[BLOCK];
  EACH(n) square[i] = value[i] * value[i];
  memset(square + n, 0, (BLOCK - n) * sizeof(REAL));
  for (size_t half = BLOCK / 2; half > 0; half /= 2)
    EACH(half) square[i] += square[i + half];
  return (double)square[0];
}

/* NaN and infinity are what differs from itself by other than 0. */
TARGET static size_t NAME(count_not_finite)(const void *v, size_t n)
{
  const REAL *value = v;
  unsigned count = 0;
  EACH(n) count += value[i] - value[i] != 0;
  return count;
}

static const arithmetic NAME(arithmetic) = {
    .dtype = REAL_DTYPE,
    .size = sizeof(REAL),
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
