/* The CPU backend against plain loops, bit for bit, and against long sums in double within
 * rounding.
 *
 * The file under test comes in a second time, built without its wide instruction sets: both must
 * give the same bits.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"

/* 0 plain, 1 AVX2, 2 AVX-512: as far as the machine has them. */
static int widest;

static int may_use(const char *feature)
{
  return widest >= (strcmp(feature, "avx512f") == 0 ? 2 : 1);
}

#define PS__CPU_SUPPORTS(feature) (may_use(feature) && __builtin_cpu_supports(feature))
#define ps__cpu                   narrow_cpu
#include "backend/cpu.c" // NOLINT(bugprone-suspicious-include)
#undef ps__cpu

enum { DTYPES = 4, LONGEST = 1100, TERMS = 80, OUTS = 66 };

static const ps_dtype dtypes[DTYPES] = {PS_F32, PS_F16, PS_BF16, PS_F64};

/* ---- values ---------------------------------------------------------------------------------- */

static uint64_t random_state = 1;

static uint32_t random_bits(void)
{
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(random_state >> 32);
}

/* Of either sign and of magnitudes from 2^-20 to 4. */
static double random_value(void)
{
  double mantissa = (double)random_bits() / 4294967296.0 - 0.5;
  return ldexp(mantissa, 3 - (int)(random_bits() % 20));
}

/* The format's own definition, without bit tricks: sign, exponent of e bits, mantissa of f bits. */
static double decode(uint32_t bits, int e, int f)
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

static double get(const void *data, ps_dtype dtype, size_t i)
{
  switch (dtype) {
  case PS_F16: return decode(((const uint16_t *)data)[i], 5, 10);
  case PS_BF16: return decode(((const uint16_t *)data)[i], 8, 7);
  case PS_F32: return (double)((const float *)data)[i];
  default: return ((const double *)data)[i];
  }
}

/* Rounds an accumulator's value (a float but for PS_F64) to storage. */
static void put(void *data, ps_dtype dtype, size_t i, double value)
{
  switch (dtype) {
  case PS_F16: ((uint16_t *)data)[i] = ps__float_to_f16((float)value); break;
  case PS_BF16: ((uint16_t *)data)[i] = ps__float_to_bf16((float)value); break;
  case PS_F32: ((float *)data)[i] = (float)value; break;
  default: ((double *)data)[i] = value; break;
  }
}

/* Relative error of one rounding to dtype. */
static double unit(ps_dtype dtype)
{
  return dtype == PS_F16    ? 0x1p-11
         : dtype == PS_BF16 ? 0x1p-8
         : dtype == PS_F32  ? 0x1p-24
                            : 0x1p-53;
}

/* A buffer of n elements off any alignment but their own, with guards on both sides. */
typedef struct buffer {
  _Alignas(64) unsigned char bytes[(LONGEST + 2) * sizeof(double)];
  size_t n;
  ps_dtype dtype;
} buffer;

static unsigned char *data_of(buffer *b)
{
  return b->bytes + ps_dtype_size(b->dtype);
}

static void reset(buffer *b, ps_dtype dtype, size_t n)
{
  memset(b->bytes, 0xa5, sizeof(b->bytes));
  b->dtype = dtype;
  b->n = n;
}

static void fill(buffer *b, ps_dtype dtype, size_t n)
{
  reset(b, dtype, n);
  for (size_t i = 0; i < n; i++) {
    put(data_of(b), dtype, i, random_value());
  }
}

static int guards_hold(const buffer *b)
{
  size_t size = ps_dtype_size(b->dtype), used = (b->n + 1) * size;
  for (size_t i = 0; i < sizeof(b->bytes); i++) {
    if ((i < size || i >= used) && b->bytes[i] != 0xa5) {
      return 0;
    }
  }
  return 1;
}

static const ps_backend *cpu(void)
{
  const ps_backend *backend = ps_backend_find("cpu");
  CHECK(backend != NULL);
  return backend;
}

/* ---- half.h ---------------------------------------------------------------------------------- */

TEST(f16_to_float_is_the_format)
{
  for (uint32_t h = 0; h < 0x10000; h++) {
    double expected = decode(h, 5, 10);
    float got = ps__f16_to_float((uint16_t)h);
    CHECK(isnan(expected) ? isnan(got) : (double)got == expected);
    CHECK_EQ(!!signbit(got), h >> 15);
  }
}

TEST(bf16_to_float_is_the_format)
{
  for (uint32_t h = 0; h < 0x10000; h++) {
    double expected = decode(h, 8, 7);
    float got = ps__bf16_to_float((uint16_t)h);
    CHECK(isnan(expected) ? isnan(got) : (double)got == expected);
    CHECK_EQ(!!signbit(got), h >> 15);
  }
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

/* ---- lincomb --------------------------------------------------------------------------------- */

typedef struct problem {
  size_t n;
  int outs, terms;
  ps_dtype out_dtype;
  double weight[OUTS * TERMS];
  buffer in[TERMS], out[OUTS];
  ps_term term[TERMS];
  void *target[OUTS];
} problem;

static problem *new_problem(size_t n, int outs, int terms, ps_dtype in_dtype, ps_dtype out_dtype)
{
  problem *p = aligned_alloc(64, sizeof(*p));
  CHECK(p != NULL);
  p->n = n;
  p->outs = outs;
  p->terms = terms;
  p->out_dtype = out_dtype;
  for (int i = 0; i < outs * terms; i++) {
    p->weight[i] = random_bits() % 8 == 0 ? 0 : random_value();
  }
  for (int j = 0; j < terms; j++) {
    /* PS_NONE stands for all dtypes in turn. */
    fill(&p->in[j], in_dtype ? in_dtype : dtypes[j % DTYPES], n);
    p->term[j] = (ps_term){data_of(&p->in[j]), p->in[j].dtype};
  }
  for (int k = 0; k < outs; k++) {
    reset(&p->out[k], out_dtype, n);
    p->target[k] = data_of(&p->out[k]);
  }
  return p;
}

static ps_status solve(problem *p, const ps_backend *backend)
{
  return backend->lincomb(backend, p->n, p->outs, p->terms, p->weight, p->term, p->target,
                          p->out_dtype);
}

/* The specification, element by element: what out[k][i] must be, and the sum of magnitudes. */
static double expected(const problem *p, int k, size_t i, double *exact, double *magnitude)
{
  float narrow = 0;
  double wide = 0;
  *exact = *magnitude = 0;
  for (int j = 0; j < p->terms; j++) {
    double w = p->weight[k * p->terms + j];
    if (w != 0) {
      double x = get(p->term[j].data, p->term[j].dtype, i);
      narrow = narrow + (float)w * (float)x;
      wide = wide + w * x;
      *exact += w * x;
      *magnitude += fabs(w * x);
    }
  }
  return p->out_dtype == PS_F64 ? wide : (double)narrow;
}

static void check_solution(problem *p)
{
  double accumulated = (p->terms + 3) * unit(p->out_dtype == PS_F64 ? PS_F64 : PS_F32);
  for (int k = 0; k < p->outs; k++) {
    for (size_t i = 0; i < p->n; i++) {
      double exact, magnitude, bits = 0;
      put(&bits, p->out_dtype, 0, expected(p, k, i, &exact, &magnitude));
      size_t size = ps_dtype_size(p->out_dtype);
      CHECK(memcmp(&bits, (char *)p->target[k] + i * size, size) == 0);
      double tolerance = accumulated * magnitude + unit(p->out_dtype) * fabs(exact) + 0x1p-24;
      CHECK_NEAR(get(p->target[k], p->out_dtype, i), exact, tolerance);
    }
    CHECK(guards_hold(&p->out[k]));
  }
}

static void check_lincomb(size_t n, int outs, int terms, ps_dtype in_dtype, ps_dtype out_dtype)
{
  problem *p = new_problem(n, outs, terms, in_dtype, out_dtype);
  CHECK_OK(solve(p, cpu()));
  check_solution(p);
  for (widest = 0; widest <= 2; widest++) {
    for (int k = 0; k < outs; k++) {
      reset(&p->out[k], out_dtype, n);
    }
    CHECK_OK(solve(p, &narrow_cpu));
    check_solution(p);
  }
  free(p);
}

TEST(lincomb_of_every_dtype_to_every_dtype)
{
  const size_t sizes[] = {1, 2, 31, 32, 33, 63, 64, 65, 130, 259};
  for (int from = 0; from < DTYPES; from++) {
    for (int to = 0; to < DTYPES; to++) {
      for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
        check_lincomb(sizes[s], 1 + (int)s % 3, 5, dtypes[from], dtypes[to]);
      }
    }
  }
}

TEST(lincomb_of_any_number_of_mixed_inputs)
{
  for (int outs = 1; outs <= 8; outs++) {
    for (int terms = 1; terms <= 40; terms++) {
      size_t n = 1 + (size_t)(outs * 41 + terms * 7) % 150;
      check_lincomb(n, outs, terms, PS_NONE, dtypes[(outs + terms) % DTYPES]);
    }
  }
}

TEST(lincomb_of_more_than_fits_at_once)
{
  check_lincomb(70, 2, TERMS, PS_F32, PS_F32);
  check_lincomb(70, 2, TERMS, PS_F16, PS_BF16);
  check_lincomb(70, OUTS, 3, PS_F32, PS_F32);
  check_lincomb(70, OUTS, TERMS, PS_NONE, PS_F16);
}

TEST(lincomb_in_place)
{
  for (int d = 0; d < DTYPES; d++) {
    problem *p = new_problem(135, 5, TERMS, dtypes[d], dtypes[d]);
    problem *q = aligned_alloc(64, sizeof(*q));
    CHECK(q != NULL);
    CHECK_OK(solve(p, cpu()));
    *q = *p;
    for (int j = 0; j < TERMS; j++) {
      q->term[j].data = data_of(&q->in[j]);
    }
    /* Not the same order, and both within and beyond the inputs taken in first. */
    for (int k = 0; k < 5; k++) {
      q->target[k] = data_of(&q->in[(k * 17 + 3) % TERMS]);
    }
    CHECK_OK(solve(q, cpu()));
    for (int k = 0; k < 5; k++) {
      CHECK(memcmp(q->target[k], p->target[k], 135 * ps_dtype_size(dtypes[d])) == 0);
      CHECK(guards_hold(&q->in[(k * 17 + 3) % TERMS]));
    }
    free(p);
    free(q);
  }
}

TEST(lincomb_in_place_of_too_many_is_refused)
{
  problem *p = new_problem(4, OUTS, 2, PS_F32, PS_F32);
  p->target[OUTS - 1] = data_of(&p->in[1]);
  CHECK_STATUS(solve(p, cpu()), PS_UNSUPPORTED);
  free(p);
}

TEST(lincomb_is_the_same_in_pieces)
{
  for (int d = 0; d < DTYPES; d++) {
    problem *p = new_problem(LONGEST, 2, 9, PS_NONE, dtypes[d]);
    size_t size = ps_dtype_size(dtypes[d]);
    CHECK_OK(solve(p, cpu()));
    unsigned char whole[2][LONGEST * sizeof(double)];
    for (int k = 0; k < 2; k++) {
      memcpy(whole[k], p->target[k], LONGEST * size);
      reset(&p->out[k], dtypes[d], LONGEST);
    }
    for (size_t at = 0, n = 1; at < LONGEST; at += n, n = smaller(2 * n + 1, LONGEST - at)) {
      ps_term term[9];
      void *out[2];
      for (int j = 0; j < 9; j++) {
        term[j] = p->term[j];
        term[j].data = (const char *)term[j].data + at * ps_dtype_size(term[j].dtype);
      }
      for (int k = 0; k < 2; k++) {
        out[k] = (char *)p->target[k] + at * size;
      }
      CHECK_OK(cpu()->lincomb(cpu(), n, 2, 9, p->weight, term, out, dtypes[d]));
    }
    for (int k = 0; k < 2; k++) {
      CHECK(memcmp(whole[k], p->target[k], LONGEST * size) == 0);
    }
    free(p);
  }
}

TEST(lincomb_does_not_read_terms_of_weight_0)
{
  for (int d = 0; d < DTYPES; d++) {
    problem *p = new_problem(70, 2, 6, dtypes[d], dtypes[d]);
    for (int j = 0; j < 6; j++) {
      p->weight[j] = j == 1 || j == 4 ? 0 : 0.5;
      p->weight[6 + j] = j == 4 ? -0.0 : 0.25;
    }
    for (size_t i = 0; i < 70; i++) {
      put(data_of(&p->in[1]), dtypes[d], i, i % 2 ? (double)NAN : (double)INFINITY);
    }
    p->term[4] = (ps_term){NULL, PS_NONE};
    CHECK_OK(solve(p, cpu()));
    for (size_t i = 0; i < 70; i++) {
      CHECK(isfinite(get(p->target[0], dtypes[d], i)));
      CHECK(!isfinite(get(p->target[1], dtypes[d], i)));
    }
    free(p);
  }
}

TEST(lincomb_without_weights_is_0)
{
  problem *p = new_problem(70, 2, 3, PS_F32, PS_F16);
  memset(p->weight, 0, sizeof(p->weight));
  CHECK_OK(solve(p, cpu()));
  check_solution(p);
  free(p);
}

/* fl(w x) - w x is 0 when rounded twice; one fused operation would leave the product's error. */
TEST(lincomb_is_not_contracted)
{
  float x[64], minus[64], zero[64];
  double weight[2] = {1, (double)0x1.234566p0f};
  for (int i = 0; i < 64; i++) {
    x[i] = 1 + (float)i * 0x1.8p-20f;
    volatile float product = (float)weight[1] * x[i];
    minus[i] = -product;
  }
  const ps_term in[] = {{minus, PS_F32}, {x, PS_F32}};
  void *out = zero;
  CHECK_OK(cpu()->lincomb(cpu(), 64, 1, 2, weight, in, &out, PS_F32));
  for (int i = 0; i < 64; i++) {
    CHECK_EQ(zero[i], 0);
  }
}

/* The accumulator is chosen by the output: 1 + 2^-40 is lost in float, and kept in double. */
TEST(lincomb_accumulates_in_the_output_s_type)
{
  const double x[] = {1 + 0x1p-40}, one[] = {1}, weight[] = {1, -1};
  const ps_term in[] = {{x, PS_F64}, {one, PS_F64}};
  double wide;
  float narrow;
  void *out = &wide;
  CHECK_OK(cpu()->lincomb(cpu(), 1, 1, 2, weight, in, &out, PS_F64));
  CHECK_EQ(wide, 0x1p-40);
  out = &narrow;
  CHECK_OK(cpu()->lincomb(cpu(), 1, 1, 2, weight, in, &out, PS_F32));
  CHECK_EQ(narrow, 0);
}

TEST(lincomb_refuses_nonsense)
{
  float x = 1, y;
  double weight[] = {1};
  ps_term in = {&x, PS_F32};
  void *out = &y, *none = NULL;
  const ps_backend *b = cpu();
  CHECK_STATUS(b->lincomb(b, 0, 1, 1, weight, &in, &out, PS_F32), PS_INVALID);
  CHECK_STATUS(b->lincomb(b, 1, 0, 1, weight, &in, &out, PS_F32), PS_INVALID);
  CHECK_STATUS(b->lincomb(b, 1, 1, -1, weight, &in, &out, PS_F32), PS_INVALID);
  CHECK_STATUS(b->lincomb(b, 1, 1, 1, NULL, &in, &out, PS_F32), PS_INVALID);
  CHECK_STATUS(b->lincomb(b, 1, 1, 1, weight, NULL, &out, PS_F32), PS_INVALID);
  CHECK_STATUS(b->lincomb(b, 1, 1, 1, weight, &in, NULL, PS_F32), PS_INVALID);
  CHECK_STATUS(b->lincomb(b, 1, 1, 1, weight, &in, &none, PS_F32), PS_INVALID);
  CHECK_STATUS(b->lincomb(b, 1, 1, 1, weight, &in, &out, PS_NONE), PS_DTYPE);
  CHECK_STATUS(b->lincomb(b, 1, 1, 1, weight, &in, &out, (ps_dtype)9), PS_DTYPE);
  in.dtype = (ps_dtype)9;
  CHECK_STATUS(b->lincomb(b, 1, 1, 1, weight, &in, &out, PS_F32), PS_DTYPE);
  in = (ps_term){NULL, PS_F32};
  CHECK_STATUS(b->lincomb(b, 1, 1, 1, weight, &in, &out, PS_F32), PS_INVALID);
}

/* ---- sweep ----------------------------------------------------------------------------------- */

enum { ITEMS = 3 };

typedef struct stroke {
  ps_sweep sweep;
  ps_swept swept;
  buffer x, guess, m, out, keep_x, keep_m;
} stroke;

static stroke *new_stroke(size_t size, ps_dtype x_dtype, ps_dtype m_dtype)
{
  stroke *s = aligned_alloc(64, sizeof(*s));
  CHECK(s != NULL);
  fill(&s->x, x_dtype, ITEMS * size);
  fill(&s->guess, x_dtype, ITEMS * size);
  fill(&s->m, m_dtype, ITEMS * size);
  reset(&s->out, m_dtype, ITEMS * size);
  reset(&s->keep_x, x_dtype, ITEMS * size);
  reset(&s->keep_m, m_dtype, ITEMS * size);
  s->sweep = (ps_sweep){
      ITEMS,          size, x_dtype, m_dtype,          data_of(&s->x),      data_of(&s->guess),
      data_of(&s->m), 0.3,  0.01,    data_of(&s->out), data_of(&s->keep_x), data_of(&s->keep_m)};
  return s;
}

static int same_swept(const ps_swept *a, const ps_swept *b)
{
  return a->excess == b->excess && a->distance == b->distance && a->reference == b->reference &&
         a->not_finite == b->not_finite;
}

static int equal(buffer *a, buffer *b)
{
  return memcmp(data_of(a), data_of(b), a->n * ps_dtype_size(a->dtype)) == 0;
}

/* out is m + slope (x - guess), every operation in the type of its operand that is wider: bits. */
static void check_answer(stroke *s)
{
  const ps_sweep *w = &s->sweep;
  for (size_t i = 0; i < w->items * w->size; i++) {
    double x = get(w->x, w->x_dtype, i), guess = get(w->guess, w->x_dtype, i);
    double m = get(w->m, w->m_dtype, i), bits = 0;
    double moved = w->x_dtype == PS_F64 ? x - guess : (double)((float)x - (float)guess);
    if (w->m_dtype == PS_F64) {
      put(&bits, PS_F64, 0, m + w->slope * moved);
    } else {
      put(&bits, w->m_dtype, 0, (double)((float)m + (float)w->slope * (float)moved));
    }
    size_t bytes = ps_dtype_size(w->m_dtype);
    CHECK(memcmp(&bits, (char *)w->out + i * bytes, bytes) == 0);
  }
  CHECK(equal(&s->out, &s->keep_m));
  CHECK(equal(&s->x, &s->keep_x));
  CHECK(guards_hold(&s->out) && guards_hold(&s->keep_m) && guards_hold(&s->keep_x));
}

static void check_measure(const stroke *s)
{
  const ps_sweep *w = &s->sweep;
  double excess = 0, distance = -1, reference = 0;
  for (size_t item = 0; item < w->items; item++) {
    double moved = 0, square = 0;
    for (size_t i = item * w->size; i < (item + 1) * w->size; i++) {
      double x = get(w->x, w->x_dtype, i);
      moved += pow(x - get(w->guess, w->x_dtype, i), 2) / (double)w->size;
      square += x * x / (double)w->size;
    }
    excess = fmax(excess, moved - w->floor * w->floor * square);
    if (moved > distance) {
      distance = moved;
      reference = square;
    }
  }
  double tolerance = w->x_dtype == PS_F64 ? 1e-12 : 2e-6;
  CHECK_NEAR(s->swept.distance, distance, tolerance * distance);
  CHECK_NEAR(s->swept.reference, reference, tolerance * reference);
  CHECK_NEAR(s->swept.excess, excess, tolerance * distance);
  CHECK_EQ(s->swept.not_finite, 0);
}

TEST(sweep_of_every_dtype_with_every_dtype)
{
  const size_t sizes[] = {1, 5, 255, 256, 257, 300};
  for (int from = 0; from < DTYPES; from++) {
    for (int to = 0; to < DTYPES; to++) {
      for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        stroke *s = new_stroke(sizes[i], dtypes[from], dtypes[to]);
        CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
        check_answer(s);
        check_measure(s);
        for (widest = 0; widest <= 2; widest++) {
          ps_swept swept;
          reset(&s->out, dtypes[to], s->out.n);
          CHECK_OK(narrow_cpu.sweep(&narrow_cpu, &s->sweep, NULL, &swept));
          check_answer(s);
          CHECK(same_swept(&swept, &s->swept));
        }
        free(s);
      }
    }
  }
}

TEST(sweep_without_slope_or_guess_copies_bits)
{
  for (int d = 0; d < DTYPES; d++) {
    stroke *s = new_stroke(300, PS_F32, dtypes[d]);
    for (size_t i = 0; i < s->m.n * ps_dtype_size(dtypes[d]); i++) {
      data_of(&s->m)[i] = (unsigned char)(i % 3 ? random_bits() : 0xff); /* NaNs of all kinds */
    }
    s->sweep.slope = 0;
    CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
    CHECK(equal(&s->out, &s->m) && equal(&s->keep_m, &s->m) && equal(&s->keep_x, &s->x));
    CHECK(s->swept.distance > 0);
    reset(&s->out, dtypes[d], s->out.n);
    s->sweep.slope = 0.3;
    s->sweep.guess = NULL;
    s->sweep.keep_m = NULL;
    CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
    CHECK(equal(&s->out, &s->m));
    CHECK(s->swept.distance == 0 && s->swept.reference == 0 && s->swept.excess == 0);
    free(s);
  }
}

TEST(sweep_measures_alone)
{
  stroke *s = new_stroke(300, PS_BF16, PS_F32);
  s->sweep.m = s->sweep.out = s->sweep.keep_x = s->sweep.keep_m = NULL;
  s->sweep.m_dtype = PS_NONE;
  CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
  check_measure(s);
  free(s);
}

/* What is left out changes nothing of the rest: bits. */
TEST(sweep_keeps_without_an_answer)
{
  for (int d = 0; d < DTYPES; d++) {
    stroke *s = new_stroke(300, PS_F32, dtypes[d]), *t = new_stroke(300, PS_F32, dtypes[d]);
    t->x = s->x, t->guess = s->guess, t->m = s->m;
    t->sweep.out = NULL;
    CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
    CHECK_OK(cpu()->sweep(cpu(), &t->sweep, NULL, &t->swept));
    CHECK(equal(&s->keep_m, &t->keep_m));
    CHECK(same_swept(&t->swept, &s->swept));
    free(s);
    free(t);
  }
}

TEST(sweep_in_place)
{
  for (int d = 0; d < DTYPES; d++) {
    stroke *s = new_stroke(300, PS_F32, dtypes[d]), *t = new_stroke(300, PS_F32, dtypes[d]);
    put(data_of(&s->m), dtypes[d], 7, (double)NAN);
    t->x = s->x, t->guess = s->guess, t->m = s->m;
    t->sweep.out = data_of(&t->m);
    t->sweep.keep_x = data_of(&t->guess);
    CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
    CHECK_OK(cpu()->sweep(cpu(), &t->sweep, NULL, &t->swept));
    CHECK(equal(&t->m, &s->out) && equal(&t->guess, &s->x) && equal(&t->keep_m, &s->out));
    CHECK(same_swept(&t->swept, &s->swept));
    CHECK_EQ(s->swept.not_finite, 1);
    free(s);
    free(t);
  }
}

TEST(sweep_counts_what_is_not_finite)
{
  const double values[DTYPES] = {(double)FLT_MAX, 65504, 0x1.fep127, DBL_MAX};
  for (int d = 0; d < DTYPES; d++) {
    stroke *s = new_stroke(300, PS_F32, dtypes[d]);
    put(data_of(&s->m), dtypes[d], 0, values[d]);
    put(data_of(&s->m), dtypes[d], 299, -values[d]);
    put(data_of(&s->m), dtypes[d], 1, (double)NAN);
    put(data_of(&s->m), dtypes[d], 299 + 256, (double)INFINITY);
    put(data_of(&s->m), dtypes[d], 899, -(double)INFINITY);
    CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
    CHECK_EQ(s->swept.not_finite, 3);
    CHECK(isfinite(s->swept.excess));
    free(s);
  }
}

TEST(sweep_passes_a_nan_on)
{
  for (int d = 0; d < DTYPES; d++) {
    for (int which = 0; which < 2 * ITEMS; which++) {
      stroke *s = new_stroke(300, dtypes[d], PS_F32);
      buffer *b = which % 2 ? &s->x : &s->guess;
      put(data_of(b), dtypes[d], (size_t)which / 2 * 300 + 270, (double)NAN);
      CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
      CHECK(isnan(s->swept.excess) && isnan(s->swept.distance));
      CHECK_EQ(s->swept.not_finite, 0);
      free(s);
    }
  }
}

/* Items: far from the guess but large, so that rounding explains much of it; nearer and small. */
TEST(sweep_takes_the_floor_off_each_item)
{
  const float x[] = {64, -64, 1, 1}, guess[] = {65, -65, 1.5f, 0.5f};
  ps_sweep sweep = {.items = 2, .size = 2, .x_dtype = PS_F32, .x = x, .guess = guess};
  ps_swept swept;
  CHECK_OK(cpu()->sweep(cpu(), &sweep, NULL, &swept));
  CHECK_EQ(swept.excess, 1);
  CHECK_EQ(swept.distance, 1);
  CHECK_EQ(swept.reference, 4096);
  sweep.floor = 0x1p-6;
  CHECK_OK(cpu()->sweep(cpu(), &sweep, NULL, &swept));
  CHECK_EQ(swept.excess, 0.25 - 0x1p-12);
  CHECK_EQ(swept.distance, 1);
  sweep.floor = 1;
  CHECK_OK(cpu()->sweep(cpu(), &sweep, NULL, &swept));
  CHECK_EQ(swept.excess, 0);
  CHECK_EQ(swept.distance, 1);
  CHECK_EQ(swept.reference, 4096);
}

TEST(sweep_of_the_point_itself_is_0)
{
  stroke *s = new_stroke(300, PS_F16, PS_BF16);
  s->sweep.guess = s->sweep.x;
  s->sweep.keep_m = NULL;
  CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
  CHECK(s->swept.distance == 0 && s->swept.excess == 0 && s->swept.reference > 0);
  CHECK(equal(&s->out, &s->m));
  free(s);
}

TEST(sweep_refuses_nonsense)
{
  float x = 1, out;
  ps_sweep good = {
      .items = 1, .size = 1, .x_dtype = PS_F32, .m_dtype = PS_F32, .x = &x, .guess = &x};
  good.m = &x;
  good.out = &out;
  ps_swept swept;
  CHECK_OK(cpu()->sweep(cpu(), &good, NULL, &swept));
  ps_sweep bad = good;
  bad.items = 0;
  CHECK_STATUS(cpu()->sweep(cpu(), &bad, NULL, &swept), PS_INVALID);
  bad = good;
  bad.size = 0;
  CHECK_STATUS(cpu()->sweep(cpu(), &bad, NULL, &swept), PS_INVALID);
  bad = good;
  bad.x = NULL;
  CHECK_STATUS(cpu()->sweep(cpu(), &bad, NULL, &swept), PS_INVALID);
  bad = good;
  bad.m = NULL;
  CHECK_STATUS(cpu()->sweep(cpu(), &bad, NULL, &swept), PS_INVALID);
  bad = good;
  bad.x_dtype = PS_NONE;
  CHECK_STATUS(cpu()->sweep(cpu(), &bad, NULL, &swept), PS_DTYPE);
  bad = good;
  bad.m_dtype = (ps_dtype)7;
  CHECK_STATUS(cpu()->sweep(cpu(), &bad, NULL, &swept), PS_DTYPE);
}

/* ---- copy, registry -------------------------------------------------------------------------- */

TEST(copy_copies)
{
  unsigned char from[300], to[300] = {0};
  for (int i = 0; i < 300; i++) {
    from[i] = (unsigned char)i;
  }
  CHECK_OK(cpu()->copy(cpu(), to, from, 299));
  CHECK(memcmp(to, from, 299) == 0 && to[299] == 0);
  CHECK_OK(cpu()->copy(cpu(), NULL, NULL, 0));
  CHECK_STATUS(cpu()->copy(cpu(), to, NULL, 1), PS_INVALID);
  CHECK_STATUS(cpu()->copy(cpu(), NULL, from, 1), PS_INVALID);
}

TEST(registry_knows_the_cpu)
{
  CHECK_STR(cpu()->name, "cpu");
  CHECK(ps_backend_find("abacus") == NULL);
  CHECK(ps_backend_find(NULL) == NULL);
}
