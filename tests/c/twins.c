/* twins.c - vectors on a stand-in device and on the host, and passes held against the CPU's. */
#include "twins.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"
#include "stage.h"

const ps_backend *open_rank(int device)
{
  const ps_backend *backend;
  CHECK_OK(ps_cuda_open(device, &backend));
  CHECK_STR(backend->name, "cuda");
  CHECK_EQ(backend->device, device);
  return backend;
}

void bury_all(const fake_api *fake)
{
  fake->fake_hang(-1);
  for (int k = 0; k < 2; ++k) { /* a mirror's end may be that of a rank */
    fake->fake_drain();
    const ps_backend *cuda = open_rank(0);
    cuda->release(cuda);
  }
  fake->fake_drain();
}

/* ---- a vector on both sides ------------------------------------------------------------------ */

twin twin_new(const fake_api *fake, ps_dtype dtype, size_t n, uint64_t seed, size_t shift)
{
  size_t size = ps_dtype_size(dtype);
  twin t = {dtype, n, n * size, malloc(n * size), NULL, NULL};
  for (size_t i = 0; i < n; ++i) {
    stage_store(t.host, dtype, i, 2 * stage_random(&seed));
  }
  t.block = fake->fake_alloc(0, t.bytes + 16);
  t.device = t.block + shift * size;
  CHECK_EQ(fake->fake_write(t.device, t.host, t.bytes), 0);
  return t;
}

void check_same(const fake_api *fake, const twin *t, double relative)
{
  unsigned char *got = malloc(t->bytes);
  CHECK_EQ(fake->fake_read(got, t->device, t->bytes), 0);
  for (size_t i = 0; i < t->n && relative > 0; ++i) {
    double expected = stage_load(t->host, t->dtype, i);
    CHECK_NEAR(stage_load(got, t->dtype, i), expected, relative * (1 + fabs(expected)));
  }
  if (relative == 0) {
    CHECK(memcmp(got, t->host, t->bytes) == 0);
  }
  free(got);
}

void twin_free(const fake_api *fake, twin *t)
{
  fake->fake_free(t->block);
  free(t->host);
}

/* ---- lincomb --------------------------------------------------------------------------------- */

void check_mix(const fake_api *fake, const ps_backend *cuda, const mix *c, double relative)
{
  static twin in[TERMS], out[OUTS];
  static ps_term here[TERMS], there[TERMS];
  static double weight[TERMS * OUTS];
  void *here_out[OUTS], *there_out[OUTS];
  uint64_t seed = 5;
  const ps_backend *cpu = ps_backend_find("cpu");
  for (int j = 0; j < c->terms; ++j) {
    in[j] =
        twin_new(fake, c->in_place && j < c->outs ? c->out : c->in[j % 2], c->n, 100 + j, c->shift);
    here[j] = (ps_term){in[j].host, in[j].dtype};
    there[j] = (ps_term){in[j].device, in[j].dtype};
  }
  for (int k = 0; k < c->outs; ++k) {
    out[k] = c->in_place ? in[k] : twin_new(fake, c->out, c->n, 500 + k, c->shift);
    here_out[k] = out[k].host;
    there_out[k] = out[k].device;
  }
  for (int w = 0; w < c->terms * c->outs; ++w) {
    weight[w] = w % 7 == 3 ? 0 : stage_random(&seed);
  }
  CHECK_OK(cuda->lincomb(cuda, c->n, c->outs, c->terms, weight, there, there_out, c->out));
  memset(there_out, 0, sizeof there_out); /* what was passed is the caller's again */
  CHECK_OK(cpu->lincomb(cpu, c->n, c->outs, c->terms, weight, here, here_out, c->out));
  CHECK_OK(cuda->settle(cuda, NULL));
  for (int k = 0; k < c->outs; ++k) {
    check_same(fake, &out[k], relative);
  }
  for (int j = 0; j < c->terms; ++j) {
    twin_free(fake, &in[j]);
  }
  for (int k = 0; k < c->outs && !c->in_place; ++k) {
    twin_free(fake, &out[k]);
  }
}

/* ---- sweep --------------------------------------------------------------------------------------
 */

static void check_swept(const ps_swept *got, const ps_swept *expected, double relative)
{
  CHECK_NEAR(got->distance, expected->distance, relative * expected->distance);
  CHECK_NEAR(got->reference, expected->reference, relative * expected->reference);
  CHECK_NEAR(got->excess, expected->excess, relative * expected->distance);
  CHECK_EQ(got->not_finite, expected->not_finite);
}

void check_sweep(const fake_api *fake, const ps_backend *cuda, const case_of_sweep *c,
                 double relative)
{
  const ps_backend *cpu = ps_backend_find("cpu");
  size_t n = c->items * c->size;
  twin x = twin_new(fake, c->x, n, 1, c->shift), guess = twin_new(fake, c->x, n, 2, c->shift);
  twin m = twin_new(fake, c->m, n, 3, c->shift), out = twin_new(fake, c->m, n, 4, c->shift);
  twin keep_x = twin_new(fake, c->x, n, 5, c->shift), keep_m = twin_new(fake, c->m, n, 6, c->shift);
  ps_sweep here = {c->items, c->size, c->x, c->m, .slope = c->slope, .floor = 0.25};
  ps_sweep there = here;
  ps_swept expected, swept;
  here.x = x.host;
  there.x = x.device;
#define PART(bit, field, of)                                                                       \
  here.field = c->parts & (bit) ? (of).host : NULL;                                                \
  there.field = c->parts & (bit) ? (of).device : NULL
  PART(1, guess, guess);
  PART(2, m, m);
  PART(c->parts & 2 ? 4 : 0, out, out);
  PART(8, keep_x, keep_x);
  PART(c->parts & 2 ? 16 : 0, keep_m, keep_m);
#undef PART
  CHECK_OK(cpu->sweep(cpu, &here, NULL, &expected));
  CHECK_OK(cuda->sweep(cuda, &there, NULL, &swept));
  check_swept(&swept, &expected, fmax(relative, 1e-5));
  CHECK_OK(cuda->settle(cuda, NULL));
  twin *all[] = {&x, &guess, &m, &out, &keep_x, &keep_m};
  for (int k = 0; k < 6; ++k) {
    check_same(fake, all[k], relative);
    twin_free(fake, all[k]);
  }
}
