/* test_cuda.c - the CUDA backend on the stand-in driver: the same results as the CPU's, in order,
 * nothing left behind, every failure told.
 */
#include <math.h>
#include <pthread.h>
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

/* What has pinned memory may outlast its users; whoever comes next buries it. */
static void bury_all(const fake_api *fake)
{
  fake->fake_hang(-1);
  for (int k = 0; k < 2; ++k) { /* a mirror's end may be that of a rank */
    fake->fake_drain();
    const ps_backend *cuda = open_rank(0);
    cuda->release(cuda);
  }
  fake->fake_drain();
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
  fake->fake_break(0, 0);
  cuda->free(cuda, block);
  cuda->release(cuda);
  fakes_end(fake);
}

/* ---- whole runs ------------------------------------------------------------------------------ */

enum { RUN_RANKS = 4, RUN_STEPS = 10, RUN_SIZE = 96 };

typedef struct run_on {
  const ps_backend *backend[RUN_RANKS];
} run_on;

/* m = 0.3 x, made on the rank's own device: what it is given is in order there. */
static int evaluate_there(void *ctx, int rank, int step, const void *x, void *m)
{
  const ps_backend *backend = ((run_on *)ctx)->backend[rank];
  const double weight = 0.3 + 0.01 * step;
  const ps_term in = {x, PS_F32};
  return backend->lincomb(backend, RUN_SIZE, 1, 1, &weight, &in, &m, PS_F32) != PS_OK;
}

typedef struct server {
  run_on *on;
  ps_follower *follower;
  int rank;
  pthread_t thread;
} server;

static void *serve_there(void *ctx)
{
  server *self = ctx;
  CHECK_OK(ps_serve(self->follower, self->rank, evaluate_there, self->on, NULL, PS_F32));
  ps_follower_destroy(self->follower);
  return NULL;
}

/* Runs from x in place, which is where the leader's backend has its memory. */
static void run_there(run_on *on, void *x, int ranks, ps_report *report)
{
  const ps_layout layout = {2, RUN_SIZE / 2, PS_F32, PS_F32};
  ps_program *program = stage_euler(RUN_STEPS);
  ps_link *links[RUN_RANKS] = {NULL};
  server servers[RUN_RANKS];
  ps_options options;
  ps_leader *leader;
  ps_options_init(&options);
  options.max_stride = 1;
  for (int rank = 1; rank < ranks; ++rank) {
    ps_link *end;
    CHECK_OK(ps_threads_open_on(&layout, 1, on->backend[0], on->backend[rank], &links[rank], &end));
    servers[rank] = (server){.on = on, .rank = rank};
    CHECK_OK(ps_follower_create(&layout, end, &servers[rank].follower));
    CHECK_EQ(pthread_create(&servers[rank].thread, NULL, serve_there, &servers[rank]), 0);
  }
  CHECK_OK(
      ps_leader_create(program, &layout, &options, on->backend[0], links, ranks, NULL, &leader));
  CHECK_OK(ps_sample(leader, evaluate_there, on, NULL, x));
  CHECK_OK(on->backend[0]->settle(on->backend[0], NULL));
  for (int rank = 1; rank < ranks; ++rank) {
    CHECK_EQ(pthread_join(servers[rank].thread, NULL), 0);
  }
  CHECK_OK(ps_leader_report(leader, report));
  CHECK_EQ(report->failed, 0);
  ps_leader_destroy(leader);
  ps_program_release(program);
}

/* kernels 0: by cuBLAS, which has the CPU's results to rounding. */
static void check_run(const fake_setting *setting, int devices, int kernels)
{
  const fake_api *fake = fakes_begin(setting, kernels);
  const fake_blas_api *blas = kernels ? NULL : fakes_blas();
  const ps_backend *cpu = ps_backend_find("cpu");
  run_on here = {{cpu, cpu, cpu, cpu}}, there;
  twin x = twin_new(fake, PS_F32, RUN_SIZE, 3, 0);
  ps_report on_host, on_device;
  for (int rank = 0; rank < RUN_RANKS; ++rank) {
    there.backend[rank] = open_rank(rank % devices);
    CHECK_OK(ps_cuda_use_stream(there.backend[rank], fake->fake_stream(rank % devices)));
  }
  run_there(&there, x.device, RUN_RANKS, &on_device);
  run_there(&here, x.host, RUN_RANKS, &on_host);
  CHECK_EQ(on_device.rounds, on_host.rounds);
  CHECK_LT(on_device.rounds, RUN_STEPS);
  check_same(fake, &x, kernels ? 0 : 1e-5);
  CHECK((blas != NULL && blas->fake_blas_calls() > 0) == !kernels);
  twin_free(fake, &x);
  for (int rank = 0; rank < RUN_RANKS; ++rank) {
    there.backend[rank]->release(there.backend[rank]);
  }
  bury_all(fake);
  CHECK(fake->fake_complaint() == NULL);
  CHECK_EQ(fake->fake_count().blocks, 0);
}

TEST(ranks_on_one_device_have_the_run_of_the_cpu)
{
  check_run(&plain, 1, 1);
}

TEST(ranks_on_two_devices_have_the_run_of_the_cpu)
{
  check_run(&plain, 2, 1);
}

TEST(ranks_out_of_reach_have_the_run_of_the_cpu)
{
  check_run(&(fake_setting){2, 1, 0, 9}, 2, 1);
}

TEST(ranks_without_kernels_have_the_run_of_the_cpu)
{
  check_run(&plain, 2, 0);
}
