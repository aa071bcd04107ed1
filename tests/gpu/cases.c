/* cases.c - the kernels on random cases, bit for bit beside the CPU backend.
 *
 *     cases DEVICE COUNT [SEED]
 *
 * Every count of elements, outputs and terms, dtypes mixed, bases that are aligned to an element
 * alone, outputs in place, several items, and among the values zeros of both signs, denormals, the
 * largest, NaN and Inf. `make gpu` runs it on real devices, `make check-ptx` on what nvcc made of
 * the kernels. It prints one JSON object, and the cases that are wrong.
 */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/half.h"
#include "device.h"

enum {
  TERMS = 130,
  OUTS = 20,
  ONE_LAUNCH = 96, /* terms; the sums of more are rounded to the output's dtype in between */
  SLACK = 64,      /* bytes around a vector, for bases that are off */
  LARGEST = 3000000,
};

static const ps_dtype kinds[] = {PS_F32, PS_F16, PS_BF16, PS_F64};
static uint64_t state;
static int wrong;

static unsigned draw(unsigned below)
{
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (unsigned)(state >> 33) % below;
}

/* ---- vectors --------------------------------------------------------------------------------- */

/* The same elements on the host and on the device, some elements behind the start of their block.
 */
typedef struct vector {
  ps_dtype dtype;
  size_t n, offset; /* bytes */
  char *host, *device;
} vector;

static void *here(const vector *v)
{
  return v->host + v->offset;
}

static void *there(const vector *v)
{
  return v->device + v->offset;
}

static size_t bytes_of(const vector *v)
{
  return v->n * ps_dtype_size(v->dtype);
}

static double get(const void *p, ps_dtype dtype, size_t i)
{
  switch (dtype) {
  case PS_F16: return (double)ps__f16_to_float(((const uint16_t *)p)[i]);
  case PS_BF16: return (double)ps__bf16_to_float(((const uint16_t *)p)[i]);
  case PS_F32: return (double)((const float *)p)[i];
  default: return ((const double *)p)[i];
  }
}

static void set(void *p, ps_dtype dtype, size_t i, double value)
{
  switch (dtype) {
  case PS_F16: ((uint16_t *)p)[i] = ps__float_to_f16((float)value); break;
  case PS_BF16: ((uint16_t *)p)[i] = ps__float_to_bf16((float)value); break;
  case PS_F32: ((float *)p)[i] = (float)value; break;
  default: ((double *)p)[i] = value; break;
  }
}

/* What is odd comes now and then: none of it (0), what is finite (1), or NaN and Inf too (2). */
static double draw_value(int odd)
{
  static const double special[] = {-0.0, 0.0,   1e-41,       6e-8,     65519.9,
                                   3e38, -3e38, (double)NAN, INFINITY, -(double)INFINITY};
  double value = ((double)draw(1 << 20) - (1 << 19)) / (1 << 17);
  unsigned which = draw(400);
  if (odd > 0 && which < (odd > 1 ? 10u : 7u)) {
    value = special[which];
  } else if (odd > 0 && which < 50) {
    value *= 1e-5;
  }
  return value;
}

static vector draw_vector(ps_dtype dtype, size_t n, int odd)
{
  size_t size = ps_dtype_size(dtype), room = n * size + SLACK;
  vector v = {dtype, n, draw(2) ? 0 : (1 + draw(SLACK / 8 - 1)) * size, NULL, NULL};
  v.host = calloc(1, room);
  v.device = new_vector(room);
  for (size_t i = 0; i < n; ++i) {
    set(here(&v), dtype, i, draw_value(odd));
  }
  to_device(v.device, v.host, room);
  return v;
}

static void drop(vector *v)
{
  gpu->free(gpu, v->device);
  free(v->host);
}

/* Elements that are not the host's, bits and NaNs alike; `slack`, where there is one, is how far
 * each may be off. */
static int differs(const vector *v, const double *slack, size_t *where)
{
  char *got = malloc(bytes_of(v) + 1);
  size_t size = ps_dtype_size(v->dtype);
  int found = 0;
  to_host(got, there(v), bytes_of(v));
  for (size_t i = 0; i < v->n && !found; ++i) {
    double a = get(got, v->dtype, i), b = get(here(v), v->dtype, i);
    int same = memcmp(got + i * size, (char *)here(v) + i * size, size) == 0;
    found = !same && !(isnan(a) && isnan(b)) && !(slack != NULL && fabs(a - b) <= slack[i]);
    *where = i;
  }
  free(got);
  return found;
}

/* ---- lincomb --------------------------------------------------------------------------------- */

typedef struct combination {
  int outs, terms;
  ps_dtype dtype;
  vector in[TERMS], out[OUTS];
  int target[OUTS]; /* the input that an output lies in, or -1 */
  double weight[TERMS * OUTS];
} combination;

static combination draw_combination(void)
{
  combination c = {.dtype = kinds[draw(4)]};
  size_t n = draw(3) == 0 ? 1 + draw(40) : 1 + draw(9000);
  bool alike = draw(2), in_place = draw(4) == 0;
  int odd = (int)draw(3);
  c.outs = 1 + (int)draw(draw(4) ? 8 : OUTS);
  c.terms = 1 + (int)draw(draw(4) ? 24 : TERMS);
  n = (size_t)c.outs * (size_t)c.terms * n > LARGEST ? 1 + n / 20 : n;
  odd = c.terms > ONE_LAUNCH ? 0 : odd;
  for (int j = 0; j < c.terms; ++j) {
    c.in[j] = draw_vector(alike ? c.dtype : kinds[draw(4)], n, odd);
  }
  for (int k = 0; k < c.outs; ++k) {
    bool taken = in_place && k < c.terms && c.in[k].dtype == c.dtype && draw(2);
    c.target[k] = taken ? k : -1;
    c.out[k] = taken ? c.in[k] : draw_vector(c.dtype, n, 0);
  }
  for (int w = 0; w < c.outs * c.terms; ++w) {
    c.weight[w] = draw(5) == 0 ? 0 : ((double)draw(2000) - 1000) / 700;
  }
  return c;
}

/* Of output k, whose sums are rounded twice: two units of the sum of all magnitudes. */
static double *slack_of(const combination *c, int k)
{
  const double unit = c->dtype == PS_F32 ? 0x1p-22 : c->dtype == PS_F16 ? 0x1p-9 : 0x1p-6;
  double *slack = calloc(c->in[0].n, sizeof *slack);
  for (int j = 0; j < c->terms; ++j) {
    double weight = fabs(c->weight[k * c->terms + j]);
    for (size_t i = 0; i < c->in[j].n; ++i) {
      slack[i] += unit * weight * fabs(get(here(&c->in[j]), c->in[j].dtype, i));
    }
  }
  return slack;
}

static void check_combination(void)
{
  combination c = draw_combination();
  ps_term on_host[TERMS], on_device[TERMS];
  void *host_out[OUTS], *device_out[OUTS];
  double *slack[OUTS] = {NULL};
  for (int j = 0; j < c.terms; ++j) {
    on_host[j] = (ps_term){here(&c.in[j]), c.in[j].dtype};
    on_device[j] = (ps_term){there(&c.in[j]), c.in[j].dtype};
  }
  for (int k = 0; k < c.outs; ++k) {
    host_out[k] = here(&c.out[k]);
    device_out[k] = there(&c.out[k]);
    slack[k] = c.terms > ONE_LAUNCH ? slack_of(&c, k) : NULL;
  }
  size_t n = c.in[0].n, where = 0;
  need(cpu->lincomb(cpu, n, c.outs, c.terms, c.weight, on_host, host_out, c.dtype), "lincomb");
  need(gpu->lincomb(gpu, n, c.outs, c.terms, c.weight, on_device, device_out, c.dtype), "lincomb");
  int bad = 0;
  for (int k = 0; k < c.outs && !bad; ++k) {
    bad = differs(&c.out[k], slack[k], &where);
  }
  if (bad) {
    fprintf(stderr, "lincomb of %zu elements, %d terms, %d outputs of %s: wrong at %zu\n", n,
            c.terms, c.outs, ps_dtype_name(c.dtype), where);
  }
  wrong += bad;
  for (int k = 0; k < c.outs; ++k) {
    free(slack[k]);
    if (c.target[k] < 0) {
      drop(&c.out[k]);
    }
  }
  for (int j = 0; j < c.terms; ++j) {
    drop(&c.in[j]);
  }
}

/* ---- sweep ----------------------------------------------------------------------------------- */

enum { X, GUESS, M, OUT, KEEP_X, KEEP_M, VECTORS };

/* Sums over elements are formed in another order. */
static int is_near(double a, double b, const ps_swept *swept)
{
  double scale = fabs(swept->distance) + 1e-4 * fabs(swept->reference);
  return (isnan(a) && isnan(b)) || a == b || fabs(a - b) <= 2e-5 * scale;
}

static void check_sweep(void)
{
  ps_dtype x = kinds[draw(4)], m = draw(2) ? x : kinds[draw(4)];
  size_t items = 1 + draw(draw(4) ? 4 : 40), size = draw(3) == 0 ? 1 + draw(30) : 1 + draw(6000);
  if (draw(60) == 0) { /* more items than a launch has parts */
    items = 8192 + draw(900);
    size = 1 + draw(3);
  }
  size = items * size * sizeof(double) + SLACK > DEVICE_ROOM ? 1 + size / 8 : size;
  bool measured = draw(5) > 0, answered = draw(5) > 0 || !measured;
  bool out = answered && draw(3) > 0, keep_x = draw(2), keep_m = answered && draw(2);
  int odd = (int)draw(3);
  vector v[VECTORS];
  ps_swept expected, found;
  for (int k = 0; k < VECTORS; ++k) {
    v[k] = draw_vector(k == X || k == GUESS || k == KEEP_X ? x : m, items * size, odd);
  }
  int target = draw(4) == 0 ? M : OUT; /* in place, now and then */
  double slope = draw(4) ? ((double)draw(100) - 50) / 60 : 0, floor = draw(2) ? .01 : 0;
#define SIDE(side)                                                                                 \
  (ps_sweep)                                                                                       \
  {                                                                                                \
    items, size, x, m, side(&v[X]), measured ? side(&v[GUESS]) : NULL,                             \
        answered ? side(&v[M]) : NULL, slope, floor, out ? side(&v[target]) : NULL,                \
        keep_x ? side(&v[KEEP_X]) : NULL, keep_m ? side(&v[KEEP_M]) : NULL                         \
  }
  const ps_sweep on_host = SIDE(here), on_device = SIDE(there);
#undef SIDE
  need(cpu->sweep(cpu, &on_host, NULL, &expected), "sweep");
  need(gpu->sweep(gpu, &on_device, NULL, &found), "sweep");
  size_t where = 0;
  int bad =
      (out && differs(&v[target], NULL, &where)) || (keep_x && differs(&v[KEEP_X], NULL, &where)) ||
      (keep_m && differs(&v[KEEP_M], NULL, &where)) || expected.not_finite != found.not_finite ||
      (measured && !(is_near(expected.distance, found.distance, &expected) &&
                     is_near(expected.excess, found.excess, &expected)));
  if (bad) {
    fprintf(stderr, "sweep of %zu x %zu, x %s, m %s: wrong at %zu; distance %g, not %g\n", items,
            size, ps_dtype_name(x), ps_dtype_name(m), where, found.distance, expected.distance);
  }
  wrong += bad;
  for (int k = 0; k < VECTORS; ++k) {
    drop(&v[k]);
  }
}

int main(int argc, char **argv)
{
  int count = argc > 2 ? (int)strtol(argv[2], NULL, 10) : 100, sweeps = 0;
  state = argc > 3 ? strtoull(argv[3], NULL, 10) : UINT64_C(88172645463325252);
  open_device(argc > 1 ? (int)strtol(argv[1], NULL, 10) : 0);
  need_kernels();
  for (int k = 0; k < count; ++k) {
    if (draw(2)) {
      check_combination();
    } else {
      check_sweep();
      ++sweeps;
    }
  }
  printf("{\"part\": \"cases\", \"lincombs\": %d, \"sweeps\": %d, \"wrong\": %d}\n", count - sweeps,
         sweeps, wrong);
  close_device();
  return wrong != 0;
}
