/* block.h - arithmetic on short blocks, for one accumulator type and one instruction set.
 *
 * cpu.c includes this file once for each pair of them and calls what it defines through a table. It
 * expects REAL (float or double) and REAL_DTYPE, TARGET (a function attribute, or nothing) and its
 * VECTOR_BYTES, and NAME(verb).  Loops are elementwise, or a tree of fixed shape, and nothing is
 * contracted: every instruction set gives the same bits.
 */

enum {
  NAME(LANES) = TILE_BYTES / VECTOR_BYTES,                 /* vectors of a tile */
  NAME(WIDTH) = VECTOR_BYTES / sizeof(REAL),               /* elements of a vector */
  NAME(QUARTER) = BLOCK / 4 * sizeof(REAL) / VECTOR_BYTES, /* vectors of a quarter of a block */
};
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

/* A half is made from a float, which a double is rounded to first. */
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
  } else if (dtype == PS_F32) {
    for (size_t i = 0; i < n; i++) {
      ((float *)to)[i] = (float)value[i];
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

/* Sum over BLOCK places as a tree: its halves are added up, again and again.  place holds what two
 * such additions have left, a quarter of the places. */
TARGET static double NAME(fold)(NAME(vector) place[])
{
  REAL lane[NAME(WIDTH)];
  UNROLL
  for (size_t half = NAME(QUARTER) / 2; half > 0; half /= 2) {
    UNROLL
    for (size_t i = 0; i < half; i++) {
      place[i] += place[half + i];
    }
  }
  memcpy(lane, place, sizeof(lane));
  for (size_t half = NAME(WIDTH) / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; i++) {
      lane[i] += lane[half + i];
    }
  }
  return (double)lane[0];
}

/* Sum of v[i]^2 over n <= BLOCK elements; places beyond them are 0. */
TARGET static double NAME(sum_squares)(const void *v, size_t n)
{
  REAL padded[BLOCK];
  NAME(vector) place[NAME(QUARTER)];
  if (n < BLOCK) {
    memcpy(padded, v, n * sizeof(REAL));
    memset(padded + n, 0, (BLOCK - n) * sizeof(REAL));
    v = padded;
  }
  const NAME(vector) *a = v, *b = a + NAME(QUARTER), *c = b + NAME(QUARTER);
  const NAME(vector) *d = c + NAME(QUARTER);
  UNROLL
  for (size_t i = 0; i < NAME(QUARTER); i++) {
    place[i] = (a[i] * a[i] + c[i] * c[i]) + (b[i] * b[i] + d[i] * d[i]);
  }
  return NAME(fold)(place);
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

/* A block of a sweep that leaves nothing out and converts nothing: what measure_block and
 * answer_block do, but what lies between them stays in registers. */
TARGET static void NAME(sweep)(const ps_sweep *s, size_t at, item_sums *sums)
{
  const NAME(vector) *x = (const void *)((const REAL *)s->x + at);
  const NAME(vector) *guess = (const void *)((const REAL *)s->guess + at);
  const NAME(vector) *m = (const void *)((const REAL *)s->m + at);
  NAME(vector) *out = (void *)((REAL *)s->out + at);
  NAME(vector) *keep_x = (void *)((REAL *)s->keep_x + at);
  NAME(vector) *keep_m = (void *)((REAL *)s->keep_m + at);
  NAME(vector) distance[NAME(QUARTER)], reference[NAME(QUARTER)];
  REAL slope = (REAL)s->slope;

  sums->not_finite += NAME(count_not_finite)(m, BLOCK);
  for (size_t i = 0; i < NAME(QUARTER); i++) {
    NAME(vector) there[4], moved[4];
    UNROLL
    for (size_t quarter = 0; quarter < 4; quarter++) {
      size_t k = i + quarter * NAME(QUARTER);
      there[quarter] = x[k];
      moved[quarter] = x[k] - guess[k];
      NAME(vector) answer = m[k] + slope * moved[quarter];
      out[k] = answer;
      keep_m[k] = answer;
      keep_x[k] = there[quarter];
      there[quarter] *= there[quarter];
      moved[quarter] *= moved[quarter];
    }
    distance[i] = (moved[0] + moved[2]) + (moved[1] + moved[3]);
    reference[i] = (there[0] + there[2]) + (there[1] + there[3]);
  }
  sums->distance += NAME(fold)(distance);
  sums->reference += NAME(fold)(reference);
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
    .sweep = NAME(sweep),
};

#undef REAL
#undef REAL_DTYPE
#undef TARGET
#undef VECTOR_BYTES
#undef NAME
