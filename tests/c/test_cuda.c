/* test_cuda.c - a CUDA rank's streams, memory and mirrors on the stand-in driver: in order, nothing
 * left behind, every failure told.
 */
#include <stdlib.h>
#include <string.h>

#include "parastep_backend.h"
#include "parastep_transport.h"
#include "runner.h"
#include "twins.h"

static const fake_setting plain = {2, 1, 1, 7};

/* ---- streams --------------------------------------------------------------------------------- */

/* Work on one stream, more of it on another: it waits, or the stand-in complains of a race. */
TEST(work_follows_the_host_from_stream_to_stream)
{
  const fake_api *fake = fakes_begin(&plain, 1);
  const ps_backend *cuda = open_rank(0);
  twin a = twin_new(fake, PS_F32, 1000, 1, 0), b = twin_new(fake, PS_F32, 1000, 2, 0);
  for (int k = 0; k < 20; ++k) {
    CHECK_OK(ps_cuda_use_stream(cuda, k % 3 == 0 ? NULL : fake->fake_stream(0)));
    CHECK_OK(cuda->copy(cuda, k % 2 ? a.device : b.device, k % 2 ? b.device : a.device, a.bytes));
  }
  CHECK_OK(cuda->settle(cuda, NULL));
  memcpy(b.host, a.host, a.bytes);
  check_same(fake, &b, 0);
  twin_free(fake, &a);
  twin_free(fake, &b);
  cuda->release(cuda);
  fake->fake_drain();
  CHECK(fake->fake_complaint() == NULL);
}

TEST(a_capture_of_the_host_is_not_disturbed)
{
  const fake_api *fake = fakes_begin(&plain, 1);
  const ps_backend *cuda = open_rank(0);
  void *stream = fake->fake_stream(0), *other = fake->fake_stream(0);
  twin a = twin_new(fake, PS_F32, 100, 1, 0);
  fake->fake_capture(stream, 1);
  CHECK_STATUS(ps_cuda_use_stream(cuda, stream), PS_STATE);
  CHECK_OK(ps_cuda_use_stream(cuda, other));
  CHECK_OK(cuda->copy(cuda, a.device, a.device + 200, 100));
  CHECK_OK(cuda->settle(cuda, NULL));
  void *block = cuda->alloc(cuda, 64);
  CHECK(block != NULL);
  cuda->free(cuda, block);
  fake->fake_capture(stream, 0);
  twin_free(fake, &a);
  cuda->release(cuda);
  CHECK(fake->fake_complaint() == NULL);
}

/* ---- mirrors --------------------------------------------------------------------------------- */

static void check_mirror(const fake_setting *setting, int near, int far)
{
  enum { BYTES = 4096, TURNS = 10 };
  const fake_api *fake = fakes_begin(setting, 1);
  const ps_backend *here = open_rank(near);
  const ps_backend *there = far >= 0 ? open_rank(far) : ps_backend_find("cpu");
  unsigned char got[BYTES], sent[BYTES];
  ps_mirror *mirror;
  CHECK_OK(here->mirror(here, there, BYTES, &mirror));
  unsigned char *x = mirror->memory[PS_NEAR], *y = mirror->memory[PS_FAR];
  CHECK_EQ(x == y, far == near);
  unsigned char *source = fake->fake_alloc(near, BYTES), *sink = fake->fake_alloc(near, BYTES);
  for (int turn = 0; turn < TURNS; ++turn) {
    memset(sent, turn + 1, BYTES);
    fake->fake_write(source, sent, BYTES);
    CHECK_OK(here->copy(here, x, source, BYTES / 2));
    CHECK_OK(mirror->ops->send(mirror, PS_NEAR, 0, BYTES / 2));
    if (far < 0) {
      CHECK_OK(mirror->ops->settle(mirror, PS_NEAR, NULL));
    }
    CHECK_OK(mirror->ops->receive(mirror, PS_FAR));
    if (far < 0) {
      memcpy(y + BYTES / 2, y, BYTES / 2);
    } else {
      CHECK_OK(there->copy(there, y + BYTES / 2, y, BYTES / 2));
    }
    CHECK_OK(mirror->ops->send(mirror, PS_FAR, BYTES / 2, BYTES / 2));
    CHECK_OK(mirror->ops->settle(mirror, PS_FAR, NULL));
    CHECK_OK(mirror->ops->receive(mirror, PS_NEAR));
    CHECK_OK(here->copy(here, sink, x + BYTES / 2, BYTES / 2));
    CHECK_OK(here->settle(here, NULL));
    fake->fake_read(got, sink, BYTES / 2);
    CHECK(memcmp(got, sent, BYTES / 2) == 0);
  }
  fake->fake_free(source);
  fake->fake_free(sink);
  mirror->ops->close(mirror, PS_NEAR);
  there->release(there);
  here->release(here);
  mirror->ops->close(mirror, PS_FAR);
  fakes_end(fake);
}

TEST(a_mirror_on_one_device)
{
  check_mirror(&plain, 1, 1);
}

TEST(a_mirror_between_devices_that_reach_each_other)
{
  check_mirror(&plain, 0, 1);
}

TEST(a_mirror_through_the_host)
{
  check_mirror(&(fake_setting){2, 1, 0, 3}, 0, 1);
}

TEST(a_mirror_without_memory_pools)
{
  check_mirror(&(fake_setting){2, 0, 1, 3}, 0, 1);
}

TEST(a_mirror_with_the_host)
{
  check_mirror(&plain, 0, -1);
}

TEST(the_host_and_a_device_do_not_mix_in_threads)
{
  const fake_api *fake = fakes_begin(&plain, 1);
  const ps_backend *cuda = open_rank(0), *cpu = ps_backend_find("cpu");
  const ps_layout layout = {1, 4, PS_F32, PS_F32};
  ps_link *here, *there;
  ps_mirror *mirror;
  CHECK_STATUS(ps_threads_open_on(&layout, 1, cuda, cpu, &here, &there), PS_DEVICE);
  CHECK_STATUS(ps_threads_open_on(&layout, 1, cpu, cuda, &here, &there), PS_DEVICE);
  CHECK_STATUS(cpu->mirror(cpu, cuda, 64, &mirror), PS_DEVICE);
  cuda->release(cuda);
  fakes_end(fake);
}

/* ---- the end, with work under way ------------------------------------------------------------ */

TEST(memory_is_freed_behind_the_work_on_it)
{
  const fake_api *fake = fakes_begin(&plain, 1);
  const ps_backend *cuda = open_rank(0);
  twin a = twin_new(fake, PS_F32, 1000, 1, 0);
  for (int k = 0; k < 10; ++k) {
    void *block = cuda->alloc(cuda, a.bytes);
    CHECK_OK(ps_cuda_use_stream(cuda, fake->fake_stream(0)));
    CHECK_OK(cuda->copy(cuda, block, a.device, a.bytes));
    CHECK_OK(cuda->copy(cuda, a.device, block, a.bytes));
    cuda->free(cuda, block);
  }
  CHECK_OK(cuda->settle(cuda, NULL));
  check_same(fake, &a, 0);
  twin_free(fake, &a);
  cuda->release(cuda);
  bury_all(fake);
  CHECK(fake->fake_complaint() == NULL);
  CHECK_EQ(fake->fake_count().blocks, 0);
}

/* Whoever closes first, and however little of the work is done by then. */
static void check_sudden_close(const fake_setting *setting, int far, ps_side first)
{
  enum { BYTES = 1 << 12 };
  const fake_api *fake = fakes_begin(setting, 1);
  for (int k = 0; k < 10; ++k) {
    const ps_backend *here = open_rank(0), *there = open_rank(far);
    ps_mirror *mirror;
    CHECK_OK(here->mirror(here, there, BYTES, &mirror));
    CHECK_OK(here->copy(here, mirror->memory[PS_NEAR], mirror->memory[PS_NEAR] + 64, 64));
    CHECK_OK(mirror->ops->send(mirror, PS_NEAR, 0, BYTES));
    CHECK_OK(mirror->ops->receive(mirror, PS_FAR));
    CHECK_OK(there->copy(there, mirror->memory[PS_FAR] + 64, mirror->memory[PS_FAR], 64));
    CHECK_OK(mirror->ops->send(mirror, PS_FAR, 64, 64));
    mirror->ops->close(mirror, first);
    (first == PS_NEAR ? here : there)->release(first == PS_NEAR ? here : there);
    CHECK_OK((first == PS_NEAR ? there : here)->settle(first == PS_NEAR ? there : here, NULL));
    mirror->ops->close(mirror, first == PS_NEAR ? PS_FAR : PS_NEAR);
    (first == PS_NEAR ? there : here)->release(first == PS_NEAR ? there : here);
  }
  bury_all(fake);
  fakes_end(fake);
}

TEST(mirrors_are_closed_under_way)
{
  check_sudden_close(&plain, 0, PS_NEAR);
  check_sudden_close(&plain, 0, PS_FAR);
}

TEST(mirrors_between_devices_are_closed_under_way)
{
  check_sudden_close(&plain, 1, PS_NEAR);
  check_sudden_close(&plain, 1, PS_FAR);
}

TEST(mirrors_through_the_host_are_closed_under_way)
{
  check_sudden_close(&(fake_setting){2, 1, 0, 5}, 1, PS_NEAR);
  check_sudden_close(&(fake_setting){2, 1, 0, 5}, 1, PS_FAR);
}

/* ---- waits and faults ------------------------------------------------------------------------ */

static int stop_at_once(void *ctx)
{
  ++*(int *)ctx;
  return 1;
}

TEST(waits_for_a_device_that_hangs_end)
{
  const fake_api *fake = fakes_begin(&plain, 1);
  const ps_backend *cuda = open_rank(1);
  unsigned char *block = cuda->alloc(cuda, 128);
  int checks = 0;
  ps_swept swept;
  ps_sweep sweep = {1, 8, PS_F32, PS_F32, .m = block};
  fake->fake_hang(1);
  CHECK_OK(cuda->copy(cuda, block, block + 64, 64));
  CHECK_STATUS(cuda->settle(cuda, &(ps_wait){1, NULL, NULL}), PS_DEADLINE);
  CHECK_STATUS(cuda->settle(cuda, &(ps_wait){0, stop_at_once, &checks}), PS_INTERRUPTED);
  CHECK_STATUS(cuda->sweep(cuda, &sweep, &(ps_wait){0, stop_at_once, &checks}, &swept),
               PS_INTERRUPTED);
  CHECK_EQ(checks, 2);
  cuda->free(cuda, block);
  cuda->release(cuda); /* none of this waits */
  bury_all(fake);
  fakes_end(fake);
}

static ps_status use_everything(const fake_api *fake)
{
  const ps_backend *here = NULL, *there = NULL;
  unsigned char *block = NULL;
  ps_mirror *mirror = NULL;
  ps_swept swept;
  (void)fake;
  ps_status status = ps_cuda_open(0, &here);
  status = status == PS_OK ? ps_cuda_open(1, &there) : status;
  if (status == PS_OK) {
    block = here->alloc(here, 1024);
    status = block != NULL ? PS_OK : PS_NO_MEMORY;
  }
  status = status == PS_OK ? here->mirror(here, there, 1024, &mirror) : status;
  if (status == PS_OK) {
    const double weight[2] = {1, 2};
    ps_term in[2] = {{block, PS_F32}, {block + 64, PS_F32}};
    void *out = mirror->memory[PS_NEAR];
    status = here->lincomb(here, 16, 1, 2, weight, in, &out, PS_F32);
  }
  if (status == PS_OK) {
    ps_sweep sweep = {1, 16, PS_F32, PS_F32, .m = block, .keep_m = block + 512};
    status = here->sweep(here, &sweep, NULL, &swept);
  }
  status = status == PS_OK ? mirror->ops->send(mirror, PS_NEAR, 0, 1024) : status;
  status = status == PS_OK ? mirror->ops->receive(mirror, PS_FAR) : status;
  status = status == PS_OK ? mirror->ops->send(mirror, PS_FAR, 0, 64) : status;
  status = status == PS_OK ? mirror->ops->settle(mirror, PS_FAR, NULL) : status;
  if (mirror != NULL) {
    mirror->ops->close(mirror, PS_NEAR);
    mirror->ops->close(mirror, PS_FAR);
  }
  if (here != NULL) {
    here->free(here, block);
    here->release(here);
  }
  if (there != NULL) {
    there->release(there);
  }
  return status;
}

/* Every call fails once, with pools and peers and without: an error, and nothing is left over. */
static void check_faults(const fake_setting *setting)
{
  static const char *const functions[] = {"cuInit",
                                          "cuDeviceGetCount",
                                          "cuDeviceGet",
                                          "cuDevicePrimaryCtxRetain",
                                          "cuCtxPushCurrent",
                                          "cuStreamCreate",
                                          "cuEventCreate",
                                          "cuMemAllocFromPoolAsync",
                                          "cuMemAlloc",
                                          "cuMemHostAlloc",
                                          "cuMemsetD8Async",
                                          "cuEventRecord",
                                          "cuEventQuery",
                                          "cuLaunchKernel",
                                          "cuMemcpyAsync",
                                          "cuStreamWaitEvent",
                                          "cuMemcpyDtoHAsync",
                                          "cuMemcpyHtoDAsync",
                                          "cuDeviceGetAttribute",
                                          "cuModuleLoadData",
                                          "cuModuleGetFunction",
                                          "cuMemPoolCreate",
                                          "cuMemPoolSetAccess"};
  const fake_api *fake = fakes_begin(setting, 1);
  for (size_t f = 0; f < sizeof functions / sizeof *functions; ++f) {
    for (int n = 1; n <= 40; ++n) {
      fake->fake_fail(functions[f], n, n % 2 ? 2 : 1);
      use_everything(fake);
      fake->fake_fail(functions[f], 0, 0);
    }
  }
  CHECK_OK(use_everything(fake)); /* whatever happened before */
}

TEST(every_call_of_the_driver_fails_once)
{
  check_faults(&(fake_setting){2, 1, 1, 11});
}

TEST(every_call_of_the_driver_fails_once_out_of_reach)
{
  check_faults(&(fake_setting){2, 1, 0, 11});
}

TEST(out_of_memory_says_so)
{
  const fake_api *fake = fakes_begin(&plain, 1);
  const ps_backend *cuda = open_rank(0);
  ps_mirror *mirror;
  fake->fake_fail("cuMemAllocFromPoolAsync", 1, 2);
  CHECK(cuda->alloc(cuda, 64) == NULL);
  CHECK(strstr(ps_last_error(), "OUT_OF_MEMORY") != NULL);
  fake->fake_fail("cuMemAllocFromPoolAsync", 1, 2);
  CHECK_STATUS(cuda->mirror(cuda, cuda, 64, &mirror), PS_NO_MEMORY);
  CHECK(mirror == NULL);
  cuda->release(cuda);
  fakes_end(fake);
}

/* As on shares of a device: a pool can be made, and gives nothing. */
TEST(a_pool_that_gives_no_memory)
{
  enum { NOT_SUPPORTED = 801 };
  const fake_api *fake = fakes_begin(&plain, 1);
  fake->fake_fail("cuMemAllocFromPoolAsync", 1, NOT_SUPPORTED);
  const ps_backend *cuda = open_rank(0);
  fake->fake_fail("cuMemAllocFromPoolAsync", 1, NOT_SUPPORTED);
  void *p = cuda->alloc(cuda, 64);
  CHECK(p != NULL);
  cuda->free(cuda, p);
  fake->fake_fail("", 0, 0);
  cuda->release(cuda);
  fakes_end(fake);
}

/* An error that comes only while work is done is told by whatever is asked next. */
TEST(an_error_that_comes_later)
{
  const fake_api *fake = fakes_begin(&plain, 1);
  const ps_backend *cuda = open_rank(0);
  unsigned char *block = cuda->alloc(cuda, 128);
  CHECK_OK(cuda->settle(cuda, NULL));
  fake->fake_break(1, 700);
  cuda->copy(cuda, block, block + 64, 64);
  CHECK_STATUS(cuda->settle(cuda, NULL), PS_DEVICE);
  CHECK(strstr(ps_last_error(), "ILLEGAL_ADDRESS") != NULL);
  CHECK_STATUS(cuda->copy(cuda, block, block + 64, 64), PS_DEVICE);
  fake->fake_break(0, 0); /* which no device comes back from */
  CHECK_OK(cuda->copy(cuda, block, block + 64, 64));
  CHECK_OK(cuda->settle(cuda, NULL));
  cuda->free(cuda, block);
  cuda->release(cuda);
  fakes_end(fake);
}
