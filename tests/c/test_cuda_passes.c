/* test_cuda_passes.c - lincomb and sweep of a CUDA device, by kernels and through the host, on the
 * stand-in driver: the CPU's bits.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "parastep_backend.h"
#include "runner.h"
#include "stage.h"
#include "twins.h"

static const ps_dtype dtypes[DTYPES] = {PS_F32, PS_F16, PS_BF16, PS_F64};
static const fake_setting plain = {2, 1, 1, 7};

static void check_lincombs(int kernels)
{
  static const size_t sizes[] = {1, 7, 8, 9, 64, 1000, LONGEST};
  const fake_api *fake = fakes_begin(&plain, kernels);
  const ps_backend *cuda = open_rank(0);
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; ++s) {
    for (int d = 0; d < DTYPES; ++d) {
      for (int shift = 0; shift < 2; ++shift) {
        mix c = {sizes[s], (size_t)shift, 1 + (int)s * 2, 6, {dtypes[d], dtypes[d]}, dtypes[d], 0};
        check_mix(fake, cuda, &c, 0);
      }
    }
  }
  for (int from = 0; from < DTYPES; ++from) {
    for (int to = 0; to < DTYPES; ++to) {
      /* Inputs of double are summed in double here, and in float there: to rounding. */
      bool mixed = dtypes[from] == PS_F64 && dtypes[to] != PS_F64;
      double relative = !mixed ? 0 : dtypes[to] == PS_BF16 ? 0x1p-7 : 0x1p-10;
      mix c = {77, 0, 3, 5, {dtypes[from], dtypes[to]}, dtypes[to], 0};
      check_mix(fake, cuda, &c, relative);
    }
  }
  cuda->release(cuda);
  fakes_end(fake);
}

TEST(lincomb_has_the_bits_of_the_cpu)
{
  check_lincombs(1);
}

TEST(lincomb_without_kernels)
{
  check_lincombs(0);
}

/* More outputs and inputs than a launch takes, apart and in place. */
TEST(lincombs_of_many)
{
  const fake_api *fake = fakes_begin(&plain, 1);
  const ps_backend *cuda = open_rank(0);
  const mix many[] = {
      {100, 0, OUTS, 40, {PS_F32, PS_F16}, PS_F32, 0},
      {100, 0, OUTS, 40, {PS_F32, PS_F16}, PS_F32, 1},
      {100, 0, 8, 40, {PS_F16, PS_F16}, PS_F16, 1},
      {100, 0, 3, TERMS, {PS_F32, PS_F32}, PS_F32, 0},
      {100, 0, 9, TERMS, {PS_F32, PS_BF16}, PS_F32, 1},
      {100, 1, 5, TERMS, {PS_F64, PS_F64}, PS_F64, 1},
  };
  for (size_t k = 0; k < sizeof many / sizeof *many; ++k) {
    check_mix(fake, cuda, &many[k], 0);
  }
  /* Between launches sums are rounded to the outputs' dtype. */
  check_mix(fake, cuda, &(mix){100, 0, 2, TERMS, {PS_F16, PS_F16}, PS_F16, 0}, 0x1p-8);
  cuda->release(cuda);
  fakes_end(fake);
}

TEST(what_makes_no_sense_is_refused_before_a_launch)
{
  const fake_api *fake = fakes_begin(&plain, 1);
  const ps_backend *cuda = open_rank(0);
  const double weight = 1;
  void *out = NULL;
  ps_swept swept;
  CHECK_STATUS(cuda->lincomb(cuda, 4, 1, 1, &weight, &(ps_term){NULL, PS_F32}, &out, PS_F32),
               PS_INVALID);
  CHECK_STATUS(cuda->sweep(cuda, &(ps_sweep){.items = 0}, NULL, &swept), PS_INVALID);
  CHECK_STATUS(cuda->copy(cuda, NULL, &out, 4), PS_INVALID);
  CHECK_OK(cuda->copy(cuda, NULL, NULL, 0));
  CHECK_EQ(fake->fake_count().kernels, 0);
  cuda->release(cuda);
  CHECK_STATUS(ps_cuda_open(2, &cuda), PS_DEVICE);
  CHECK_STATUS(ps_cuda_open(-1, &cuda), PS_DEVICE);
  CHECK(cuda == NULL);
  fakes_end(fake);
}

/* ---- sweep ----------------------------------------------------------------------------------- */

static void check_sweeps(int kernels)
{
  static const size_t shapes[][2] = {{1, 1}, {1, 4096}, {3, 100}, {2, 4097}, {9000, 3}};
  const fake_api *fake = fakes_begin(&plain, kernels);
  const ps_backend *cuda = open_rank(0);
  for (int d = 0; d < DTYPES; ++d) {
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; ++s) {
      for (int shift = 0; shift < 2; ++shift) {
        case_of_sweep c = {shapes[s][0], shapes[s][1], (size_t)shift, dtypes[d], dtypes[d], .3, 31};
        check_sweep(fake, cuda, &c, 0);
      }
    }
    for (int parts = 0; parts < 32; ++parts) {
      check_sweep(fake, cuda,
                  &(case_of_sweep){2, 50, 0, dtypes[d], dtypes[(d + 1) % DTYPES],
                                   parts % 3 ? .5 : 0, parts},
                  0x1p-7);
    }
  }
  cuda->release(cuda);
  fakes_end(fake);
}

TEST(sweeps_agree_with_the_cpu)
{
  check_sweeps(1);
}

TEST(sweeps_without_kernels)
{
  check_sweeps(0);
}

static void check_not_finite(const ps_backend *cuda, const fake_api *fake, double odd, size_t at)
{
  const ps_backend *cpu = ps_backend_find("cpu");
  twin x = twin_new(fake, PS_F16, 300, 1, 0), guess = twin_new(fake, PS_F16, 300, 2, 0);
  twin m = twin_new(fake, PS_F16, 300, 3, 0);
  ps_swept expected, swept;
  stage_store(x.host, PS_F16, at, odd);
  stage_store(m.host, PS_F16, 299 - at, odd);
  fake->fake_write(x.device, x.host, x.bytes);
  fake->fake_write(m.device, m.host, m.bytes);
  ps_sweep here = {3, 100, PS_F16, PS_F16, x.host, guess.host, m.host, .floor = .1};
  ps_sweep there = here;
  there.x = x.device;
  there.guess = guess.device;
  there.m = m.device;
  CHECK_OK(cpu->sweep(cpu, &here, NULL, &expected));
  CHECK_OK(cuda->sweep(cuda, &there, NULL, &swept));
  CHECK_EQ(swept.not_finite, 1);
  CHECK_EQ(isnan(swept.excess), isnan(expected.excess));
  CHECK_EQ(isnan(swept.distance), isnan(expected.distance));
  CHECK_EQ(isinf(swept.distance), isinf(expected.distance));
  twin_free(fake, &x);
  twin_free(fake, &guess);
  twin_free(fake, &m);
}

TEST(nan_and_infinity_are_found_in_any_item)
{
  const fake_api *fake = fakes_begin(&plain, 1);
  const ps_backend *cuda = open_rank(0);
  for (size_t at = 0; at < 300; at += 37) {
    check_not_finite(cuda, fake, NAN, at);
    check_not_finite(cuda, fake, INFINITY, at);
  }
  cuda->release(cuda);
  fakes_end(fake);
}
