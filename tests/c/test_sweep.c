/* test_sweep.c - the CPU backend's sweep: answers against plain loops, bit for bit, and what it
 * measures against long sums in double within rounding.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"
#include "vectors.h"

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

/* out is m + slope (x - guess), every operation in double where x or m is, else in float: bits. */
static void check_answer(stroke *s)
{
  const ps_sweep *w = &s->sweep;
  for (size_t i = 0; i < w->items * w->size; i++) {
    double x = get(w->x, w->x_dtype, i), guess = get(w->guess, w->x_dtype, i);
    double m = get(w->m, w->m_dtype, i), bits = 0;
    float moved = (float)x - (float)guess;
    if (w->x_dtype == PS_F64 || w->m_dtype == PS_F64) {
      double answer = m + w->slope * (x - guess);
      put(&bits, w->m_dtype, 0, w->m_dtype == PS_F64 ? answer : (double)(float)answer);
    } else {
      put(&bits, w->m_dtype, 0, (double)((float)m + (float)w->slope * moved));
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

TEST(of_every_dtype_with_every_dtype)
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

TEST(without_slope_or_guess_copies_bits)
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

TEST(measures_alone)
{
  stroke *s = new_stroke(300, PS_BF16, PS_F32);
  s->sweep.m = s->sweep.out = s->sweep.keep_x = s->sweep.keep_m = NULL;
  s->sweep.m_dtype = PS_NONE;
  CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
  check_measure(s);
  free(s);
}

/* What is left out changes nothing of the rest: bits. */
TEST(keeps_without_an_answer)
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

TEST(in_place)
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

TEST(counts_what_is_not_finite)
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

TEST(passes_a_nan_on)
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
TEST(takes_the_floor_off_each_item)
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

TEST(of_the_point_itself_is_0)
{
  stroke *s = new_stroke(300, PS_F16, PS_BF16);
  s->sweep.guess = s->sweep.x;
  s->sweep.keep_m = NULL;
  CHECK_OK(cpu()->sweep(cpu(), &s->sweep, NULL, &s->swept));
  CHECK(s->swept.distance == 0 && s->swept.excess == 0 && s->swept.reference > 0);
  CHECK(equal(&s->out, &s->m));
  free(s);
}

TEST(refuses_nonsense)
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
