/* test_cublas.c - passes by cuBLAS, on the stand-in libraries: the CPU's results to rounding (which
 * are the kernels' own, see test_cuda_passes.c), and the host's where cuBLAS cannot give them.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"
#include "stage.h"
#include "twins.h"

static const ps_dtype dtypes[DTYPES] = {PS_F32, PS_F16, PS_BF16, PS_F64};
static const double rounding[DTYPES] = {0x1p-20, 0x1p-9, 0x1p-6, 0x1p-48};
static const fake_setting plain = {2, 1, 1, 7};

static const fake_blas_api *blas;

static const fake_api *begin(const ps_backend **cuda)
{
  const fake_api *fake = fakes_begin(&plain, 0);
  blas = fakes_blas();
  *cuda = open_rank(0);
  return fake;
}

static void end(const fake_api *fake, const ps_backend *cuda)
{
  cuda->release(cuda);
  fakes_end(fake);
}

/* ---- lincomb --------------------------------------------------------------------------------- */

TEST(lincombs_to_rounding)
{
  static const size_t sizes[] = {1, 7, 64, 1000, LONGEST};
  const ps_backend *cuda;
  const fake_api *fake = begin(&cuda);
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; ++s) {
    for (int d = 0; d < DTYPES; ++d) {
      int before = blas->fake_blas_calls();
      mix c = {sizes[s], s % 2, 1 + (int)s * 3, 6, {dtypes[d], dtypes[d]}, dtypes[d], 0};
      check_mix(fake, cuda, &c, rounding[d]);
      CHECK_LT(before, blas->fake_blas_calls());
      c.in_place = c.outs <= c.terms;
      check_mix(fake, cuda, &c, rounding[d]);
    }
  }
  check_mix(fake, cuda, &(mix){300, 0, OUTS, TERMS, {PS_F32, PS_F32}, PS_F32, 1}, 0x1p-18);
  check_mix(fake, cuda, &(mix){300, 0, 7, 40, {PS_F16, PS_F16}, PS_F16, 1}, 0x1p-9);
  end(fake, cuda);
}

/* One whose inputs would not all fit in scratch at once goes through it in blocks of rows. */
TEST(a_lincomb_in_blocks)
{
  const ps_backend *cuda;
  const fake_api *fake = begin(&cuda);
  check_mix(fake, cuda, &(mix){200001, 0, 2, 44, {PS_F64, PS_F64}, PS_F64, 1}, 0x1p-46);
  end(fake, cuda);
}

TEST(a_lincomb_of_several_dtypes_goes_through_the_host)
{
  const ps_backend *cuda;
  const fake_api *fake = begin(&cuda);
  check_mix(fake, cuda, &(mix){100, 0, 3, 5, {PS_F32, PS_F16}, PS_F32, 0}, 0);
  check_mix(fake, cuda, &(mix){100, 0, 3, 5, {PS_F32, PS_F32}, PS_F16, 0}, 0);
  CHECK_EQ(blas->fake_blas_calls(), 0);
  end(fake, cuda);
}

/* A weight of half precision alone would be off by 2^-11. */
TEST(weights_are_more_precise_than_what_they_weigh)
{
  const ps_backend *cuda;
  const fake_api *fake = begin(&cuda);
  twin x = twin_new(fake, PS_F16, 8, 1, 0), y = twin_new(fake, PS_F16, 8, 2, 0);
  const double weight[2] = {1 + 0x1p-13, -1};
  const ps_term in[2] = {{x.device, PS_F16}, {y.device, PS_F16}};
  void *out = y.device;
  for (size_t i = 0; i < 8; ++i) {
    stage_store(x.host, PS_F16, i, 512);
    stage_store(y.host, PS_F16, i, 512);
  }
  fake->fake_write(x.device, x.host, x.bytes);
  fake->fake_write(y.device, y.host, y.bytes);
  CHECK_OK(cuda->lincomb(cuda, 8, 1, 2, weight, in, &out, PS_F16));
  for (size_t i = 0; i < 8; ++i) {
    stage_store(y.host, PS_F16, i, 512 * 0x1p-13);
  }
  check_same(fake, &y, 0);
  twin_free(fake, &x);
  twin_free(fake, &y);
  end(fake, cuda);
}

/* An input that is not finite reaches the outputs that use it, and no other. */
TEST(a_weight_of_zero_keeps_a_nan_out)
{
  const ps_backend *cuda;
  const fake_api *fake = begin(&cuda);
  twin x = twin_new(fake, PS_F32, 8, 1, 0), y = twin_new(fake, PS_F32, 8, 2, 0);
  twin a = twin_new(fake, PS_F32, 8, 3, 0), b = twin_new(fake, PS_F32, 8, 4, 0);
  const double weight[3][2] = {{1, 0}, {1, 1}, {0, 0}};
  const ps_term in[2] = {{x.device, PS_F32}, {y.device, PS_F32}};
  void *out[3] = {a.device, b.device, y.device};
  float got[8], nan[8] = {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}, zero[8] = {0};
  fake->fake_write(y.device, nan, sizeof nan);
  CHECK_OK(cuda->lincomb(cuda, 8, 3, 2, &weight[0][0], in, out, PS_F32));
  memcpy(a.host, x.host, x.bytes);
  check_same(fake, &a, 0);
  CHECK_EQ(fake->fake_read(got, b.device, sizeof got), 0);
  CHECK(isnan(got[0]) && isnan(got[7]));
  memcpy(y.host, zero, sizeof zero);
  check_same(fake, &y, 0);
  twin *all[] = {&x, &y, &a, &b};
  for (int k = 0; k < 4; ++k) {
    twin_free(fake, all[k]);
  }
  end(fake, cuda);
}

/* ---- sweep ----------------------------------------------------------------------------------- */

TEST(sweeps_to_rounding)
{
  static const size_t shapes[][2] = {{1, 1}, {1, 4096}, {3, 100}, {2, 4097}, {1, 9000}, {900, 3}};
  const ps_backend *cuda;
  const fake_api *fake = begin(&cuda);
  for (int d = 0; d < DTYPES; ++d) {
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; ++s) {
      int before = blas->fake_blas_calls();
      case_of_sweep c = {shapes[s][0], shapes[s][1], s % 2, dtypes[d], dtypes[d], .3, 31};
      check_sweep(fake, cuda, &c, rounding[d]);
      CHECK((before < blas->fake_blas_calls()) == (shapes[s][0] < 900)); /* too many items */
    }
    for (int parts = 0; parts < 32; ++parts) {
      check_sweep(fake, cuda,
                  &(case_of_sweep){2, 50, 0, dtypes[d], dtypes[d], parts % 3 ? .5 : 0, parts},
                  rounding[d]);
    }
    check_sweep(fake, cuda, &(case_of_sweep){2, 50, 0, dtypes[d], dtypes[(d + 1) % DTYPES], .5, 31},
                0x1p-7);
  }
  end(fake, cuda);
}

/* Its square overflows: the host has a look, and finds nothing wrong. */
static void check_odd(const fake_api *fake, const ps_backend *cuda, double odd, size_t not_finite)
{
  twin x = twin_new(fake, PS_F32, 300, 1, 0), guess = twin_new(fake, PS_F32, 300, 2, 0);
  twin m = twin_new(fake, PS_F32, 300, 3, 0);
  ps_swept swept;
  stage_store(m.host, PS_F32, 117, odd);
  fake->fake_write(m.device, m.host, m.bytes);
  ps_sweep s = {3, 100, PS_F32, PS_F32, x.device, guess.device, m.device, .out = m.device};
  CHECK_OK(cuda->sweep(cuda, &s, NULL, &swept));
  CHECK_EQ(swept.not_finite, not_finite);
  CHECK(swept.distance > 0 && isfinite(swept.distance));
  CHECK_OK(cuda->settle(cuda, NULL));
  check_same(fake, &m, 0);
  twin_free(fake, &x);
  twin_free(fake, &guess);
  twin_free(fake, &m);
}

TEST(what_is_not_finite_is_counted)
{
  const ps_backend *cuda;
  const fake_api *fake = begin(&cuda);
  check_odd(fake, cuda, 1e30, 0);
  check_odd(fake, cuda, INFINITY, 1);
  check_odd(fake, cuda, -1e-30, 0);
  end(fake, cuda);
}

/* ---- life ------------------------------------------------------------------------------------ */

TEST(what_makes_the_passes_is_told)
{
  char text[256];
  const ps_backend *cuda;
  const fake_api *fake = fakes_begin(&plain, 0);
  ps_cuda_describe(text, sizeof text);
  if (strstr(text, "cuBLAS 1") == NULL) { /* which this machine may have */
    CHECK_STR(text, "2 devices, built without kernels: passes go through the host, as there is no "
                    "cuBLAS");
  }
  begin(&cuda);
  ps_cuda_describe(text, sizeof text);
  CHECK_STR(text, "2 devices, built without kernels: cuBLAS 13.1");
  end(fake, cuda);
}

TEST(handles_are_kept_from_run_to_run)
{
  const ps_backend *cuda;
  const fake_api *fake = begin(&cuda);
  end(fake, cuda);
  for (int k = 0; k < 20; ++k) {
    begin(&cuda);
    check_mix(fake, cuda, &(mix){64, 0, 3, 5, {PS_F32, PS_F32}, PS_F32, 0}, 0x1p-20);
    end(fake, cuda);
  }
  CHECK_EQ(blas->fake_blas_handles(), 1);
}

static ps_status use(const fake_api *fake)
{
  const ps_backend *cuda;
  const double weight[2] = {1, 2};
  ps_swept swept;
  ps_status status = ps_cuda_open(0, &cuda);
  if (status != PS_OK) {
    return status;
  }
  twin x = twin_new(fake, PS_F32, 64, 1, 0), y = twin_new(fake, PS_F32, 64, 2, 0);
  const ps_term in[2] = {{x.device, PS_F32}, {y.device, PS_F32}};
  void *out = x.device;
  ps_sweep sweep = {1, 64, PS_F32, PS_F32, x.device, y.device, y.device, .5, .out = y.device};
  status = cuda->lincomb(cuda, 64, 1, 2, weight, in, &out, PS_F32);
  status = status == PS_OK ? cuda->sweep(cuda, &sweep, NULL, &swept) : status;
  cuda->settle(cuda, NULL);
  fake->fake_drain();
  twin_free(fake, &x);
  twin_free(fake, &y);
  cuda->release(cuda);
  return status;
}

/* Every call fails once: an error that says so, or the host's way; the next use is fine. */
TEST(every_call_of_cublas_fails_once)
{
  static const char *const functions[] = {"cublasCreate", "cublasSetStream", "cublasSetWorkspace",
                                          "cublasGemm", "cublasAxpyEx"};
  const fake_api *fake = fakes_begin(&plain, 0);
  blas = fakes_blas();
  for (size_t f = 0; f < sizeof functions / sizeof *functions; ++f) {
    for (int n = 1; n <= 3; ++n) {
      blas->fake_blas_fail(functions[f], n, n == 2 ? 3 : 13);
      ps_status status = use(fake);
      if (status != PS_OK) {
        CHECK(strstr(ps_last_error(), "cuBLAS fails with") != NULL);
        CHECK_EQ(status, n == 2 ? PS_NO_MEMORY : PS_DEVICE);
      }
      CHECK((status == PS_OK) ==
            (f == 0 || (f < 3 && n == 3) || (f == 4 && n == 3) || (f == 3 && n == 3)));
      blas->fake_blas_fail("", 0, 0);
      CHECK_OK(use(fake));
    }
  }
  CHECK(fake->fake_complaint() == NULL);
}

/* The driver's own calls, with cuBLAS between them. */
TEST(every_call_of_the_driver_fails_once)
{
  static const char *const functions[] = {"cuMemcpyAsync", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync",
                                          "cuMemAllocFromPoolAsync", "cuMemHostAlloc"};
  const fake_api *fake = fakes_begin(&plain, 0);
  blas = fakes_blas();
  CHECK_OK(use(fake));
  for (size_t f = 0; f < sizeof functions / sizeof *functions; ++f) {
    for (int n = 1; n <= 20; ++n) {
      fake->fake_fail(functions[f], n, n % 2 ? 2 : 1);
      use(fake);
      fake->fake_fail(functions[f], 0, 0);
    }
  }
  CHECK_OK(use(fake));
  CHECK(fake->fake_complaint() == NULL);
}
