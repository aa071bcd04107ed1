/* test_lincomb.c - the CPU backend's lincomb against plain loops, bit for bit, and against sums in
 * double within rounding.
 */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"
#include "vectors.h"

enum { TERMS = 80, OUTS = 66 };

static size_t smaller(size_t a, size_t b)
{
  return a < b ? a : b;
}

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

static bool is_wide(const problem *p)
{
  bool wide = p->out_dtype == PS_F64;
  for (int j = 0; j < p->terms; j++) {
    wide = wide || (p->term[j].data && p->term[j].dtype == PS_F64);
  }
  return wide;
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
  return is_wide(p) ? wide : (double)narrow;
}

static void check_solution(problem *p)
{
  double accumulated = (p->terms + 3) * unit(is_wide(p) ? PS_F64 : PS_F32);
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

TEST(of_every_dtype_to_every_dtype)
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

TEST(of_any_number_of_mixed_inputs)
{
  for (int outs = 1; outs <= 8; outs++) {
    for (int terms = 1; terms <= 40; terms++) {
      size_t n = 1 + (size_t)(outs * 41 + terms * 7) % 150;
      check_lincomb(n, outs, terms, PS_NONE, dtypes[(outs + terms) % DTYPES]);
    }
  }
}

TEST(of_more_than_fits_at_once)
{
  check_lincomb(70, 2, TERMS, PS_F32, PS_F32);
  check_lincomb(70, 2, TERMS, PS_F16, PS_BF16);
  check_lincomb(70, OUTS, 3, PS_F32, PS_F32);
  check_lincomb(70, OUTS, TERMS, PS_NONE, PS_F16);
}

TEST(in_place)
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

TEST(in_place_of_too_many_is_refused)
{
  problem *p = new_problem(4, OUTS, 2, PS_F32, PS_F32);
  p->target[OUTS - 1] = data_of(&p->in[1]);
  CHECK_STATUS(solve(p, cpu()), PS_UNSUPPORTED);
  free(p);
}

TEST(is_the_same_in_pieces)
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

TEST(does_not_read_terms_of_weight_0)
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

TEST(without_weights_is_0)
{
  problem *p = new_problem(70, 2, 3, PS_F32, PS_F16);
  memset(p->weight, 0, sizeof(p->weight));
  CHECK_OK(solve(p, cpu()));
  check_solution(p);
  free(p);
}

/* fl(w x) - w x is 0 when rounded twice; one fused operation would leave the product's error. */
TEST(is_not_contracted)
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

/* The accumulator is chosen by the widest: 1 + 2^-40 is lost in float, and kept in double. */
TEST(accumulates_in_the_widest_type)
{
  const double x[] = {1 + 0x1p-40}, one[] = {1}, weight[] = {1, -1};
  const ps_term in[] = {{x, PS_F64}, {one, PS_F64}};
  const float big[] = {0x1p24f}, small[] = {1}, minus[] = {-0x1p24f};
  const double sum[] = {1, 1, 1};
  const ps_term floats[] = {{big, PS_F32}, {small, PS_F32}, {minus, PS_F32}};
  double wide;
  float narrow;
  void *out = &wide;
  CHECK_OK(cpu()->lincomb(cpu(), 1, 1, 2, weight, in, &out, PS_F64));
  CHECK_EQ(wide, 0x1p-40);
  out = &narrow;
  CHECK_OK(cpu()->lincomb(cpu(), 1, 1, 2, weight, in, &out, PS_F32));
  CHECK_EQ(narrow, 0x1p-40f);
  CHECK_OK(cpu()->lincomb(cpu(), 1, 1, 3, sum, floats, &out, PS_F32));
  CHECK_EQ(narrow, 0);
  out = &wide;
  CHECK_OK(cpu()->lincomb(cpu(), 1, 1, 3, sum, floats, &out, PS_F64));
  CHECK_EQ(wide, 1);
}

TEST(refuses_nonsense)
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
