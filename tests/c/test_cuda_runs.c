/* test_cuda_runs.c - whole runs with ranks on stand-in devices: those of the CPU. */
#include <pthread.h>

#include "parastep_backend.h"
#include "runner.h"
#include "stage.h"
#include "twins.h"

static const fake_setting plain = {2, 1, 1, 7};

enum { RUN_RANKS = 4, RUN_STEPS = 10, RUN_SIZE = 96 };

typedef struct run_on {
  const ps_backend *backend[RUN_RANKS];
  const fake_api *starves; /* no memory is to be had after the first rounds; NULL: there is */
} run_on;

/* m = 0.3 x, made on the rank's own device: what it is given is in order there. */
static int evaluate_there(void *ctx, int rank, int step, const void *x, void *m)
{
  const run_on *on = ctx;
  const ps_backend *backend = on->backend[rank];
  const double weight = 0.3 + 0.01 * step;
  const ps_term in = {x, PS_F32};
  if (on->starves != NULL && rank == 0 && step == 2) {
    on->starves->fake_fail("cuMemAllocFromPoolAsync", 1, 2);
  }
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

/* kernels 0: by cuBLAS, which has the CPU's results to rounding.  With kernels rounds take no
 * memory of the device. */
static void check_run(const fake_setting *setting, int devices, int kernels)
{
  const fake_api *fake = fakes_begin(setting, kernels);
  const fake_blas_api *blas = kernels ? NULL : fakes_blas();
  const ps_backend *cpu = ps_backend_find("cpu");
  run_on here = {{cpu, cpu, cpu, cpu}, NULL}, there = {.starves = kernels ? fake : NULL};
  twin x = twin_new(fake, PS_F32, RUN_SIZE, 3, 0);
  ps_report on_host, on_device;
  for (int rank = 0; rank < RUN_RANKS; ++rank) {
    there.backend[rank] = open_rank(rank % devices);
    CHECK_OK(ps_cuda_use_stream(there.backend[rank], fake->fake_stream(rank % devices)));
  }
  run_there(&there, x.device, RUN_RANKS, &on_device);
  fake->fake_fail("", 0, 0);
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
