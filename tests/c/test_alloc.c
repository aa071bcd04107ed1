/* test_alloc.c - memory: every allocation of a run's life failing in turn, and none during its
 * rounds. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"
#include "stage.h"

enum { RANKS = 4, ELEMENTS = 24 };

static const ps_layout layout = {2, ELEMENTS / 2, PS_F32, PS_F32};

/* ---- programs -------------------------------------------------------------------------------- */

static ps_status make_programs(void *ctx)
{
  const double alpha[4] = {.1, .5, .9, 1}, s[4] = {.9, .5, .1, 0}, row[6] = {1, 0, 1, 0, 1, 0};
  ps_program *programs[6] = {NULL};
  (void)ctx;
  ps_status status = ps_program_euler(3, s, &programs[0]);
  status = status ? status : ps_program_flow_euler(3, s, &programs[1]);
  status = status ? status : ps_program_ddim(3, alpha, s, PS_PREDICT_NOISE, &programs[2]);
  status = status ? status : ps_program_dpmpp_2m(3, alpha, s, PS_PREDICT_NOISE, &programs[3]);
  status = status ? status : ps_program_adams_bashforth(3, s, 2, &programs[4]);
  status =
      status ? status : ps_program_create(3, 2, row, row, NULL, NULL, NULL, NULL, &programs[5]);
  for (int k = 0; k < 6; ++k) {
    ps_program_release(programs[k]);
  }
  return status;
}

TEST(programs)
{
  runner_sweep(make_programs, NULL);
}

TEST(a_program_refused_leaves_nothing)
{
  const double zero[3] = {0}, nan[3] = {NAN, NAN, NAN};
  int64_t before = runner_live();
  ps_program *program;
  CHECK_STATUS(ps_program_create(3, 1, zero, zero, NULL, zero, NULL, NULL, &program), PS_INVALID);
  CHECK_STATUS(ps_program_create(3, 1, nan, zero, NULL, NULL, NULL, NULL, &program), PS_INVALID);
  CHECK_EQ(runner_live(), before);
}

/* ---- a whole run ----------------------------------------------------------------------------- */

static int denoise(void *ctx, int rank, int step, const void *x, void *m)
{
  (void)ctx, (void)rank;
  for (int i = 0; i < ELEMENTS; ++i) {
    ((float *)m)[i] = 0.5F * ((const float *)x)[i] + 0.01F * (float)step;
  }
  return 0;
}

static void *follow(void *follower)
{
  CHECK_OK(ps_serve(follower, 1, denoise, NULL, NULL, PS_F32));
  return NULL;
}

/* Links of ranks 1, 2, ... with a follower at each; those that could not be made are NULL. */
static ps_status make_followers(ps_link **links, ps_follower **followers)
{
  ps_status status = PS_OK;
  for (int k = 0; k < RANKS - 1 && status == PS_OK; ++k) {
    ps_link *there;
    status = ps_threads_open(&layout, 2, &links[k], &there);
    CHECK(status == PS_OK || (links[k] == NULL && there == NULL));
    status = status ? status : ps_follower_create(&layout, there, &followers[k]);
  }
  return status;
}

static ps_status sample(ps_leader *leader, ps_follower **followers, const float *noise)
{
  pthread_t threads[RANKS - 1];
  float x[ELEMENTS];
  for (int i = 0; i < ELEMENTS; ++i) {
    x[i] = (float)i;
  }
  for (int k = 0; k < RANKS - 1; ++k) {
    CHECK_EQ(pthread_create(&threads[k], NULL, follow, followers[k]), 0);
  }
  ps_status status = ps_sample(leader, denoise, NULL, noise, x);
  ps_leader_finish(leader); /* where sampling did not begin, the followers still wait */
  for (int k = 0; k < RANKS - 1; ++k) {
    CHECK_EQ(pthread_join(threads[k], NULL), 0);
  }
  return status;
}

/* ctx: noise for 6 steps. */
static ps_status live(void *ctx)
{
  static const double a[6] = {1, 1, 1, 1, 1, 1}, b[6] = {-.1, -.1, -.1, -.1, -.1, -.1};
  const int slots[RANKS] = {2, 1, 2, 1};
  ps_link *links[RANKS - 1] = {NULL};
  ps_follower *followers[RANKS - 1] = {NULL};
  ps_program *program = NULL;
  ps_leader *leader = NULL;
  ps_options options;
  ps_options_init(&options);
  options.max_stride = 1;
  ps_status status = make_followers(links, followers);
  status = status ? status : ps_program_create(6, 1, a, b, b, NULL, NULL, NULL, &program);
  ps_link *ends[RANKS] = {NULL, links[0], links[1], links[2]};
  if (status == PS_OK) {
    status = ps_leader_create(program, &layout, &options, ps_backend_find("cpu"), ends, RANKS,
                              slots, &leader);
    CHECK((status == PS_OK) == (leader != NULL));
  } else {
    for (int k = 0; k < RANKS - 1 && links[k] != NULL; ++k) {
      links[k]->ops->close(links[k]);
    }
  }
  if (status == PS_OK) {
    status = sample(leader, followers, ctx);
  }
  ps_leader_destroy(leader);
  for (int k = 0; k < RANKS - 1; ++k) {
    ps_follower_destroy(followers[k]);
  }
  ps_program_release(program);
  return status;
}

TEST(a_run_from_beginning_to_end)
{
  float noise[6 * ELEMENTS];
  for (int i = 0; i < 6 * ELEMENTS; ++i) {
    noise[i] = (float)(i % 5) - 2.0F;
  }
  runner_sweep(live, noise);
}

TEST(a_failure_says_how_much_was_asked_for)
{
  ps_program *program;
  const double s[2] = {1, 0};
  runner_fail_allocation(1);
  CHECK_STATUS(ps_program_euler(1, s, &program), PS_NO_MEMORY);
  CHECK(strstr(ps_last_error(), "bytes") != NULL);
}

/* ---- rounds ---------------------------------------------------------------------------------- */

static uint64_t allocated;

static void remember(stage *on, int step, void *x)
{
  (void)on, (void)x;
  if (step == 0) {
    allocated = runner_allocations();
  }
}

TEST(rounds_allocate_nothing)
{
  ps_program *program = stage_multistep(20);
  const double tolerances[] = {0.0, 0.05, INFINITY};
  for (int k = 0; k < 3; ++k) {
    stage on;
    stage_set(&on, program, RANKS, 2, 12, PS_F16, PS_F16);
    on.options.tolerance = tolerances[k];
    on.slots[0] = 2;
    on.before = remember;
    void *x = stage_latent(&on, 1);
    stage_open(&on);
    stage_run(&on, x);
    CHECK_OK(on.failure);
    CHECK_EQ(runner_allocations(), allocated);
    stage_end(&on);
    stage_close(&on);
    free(x);
  }
  ps_program_release(program);
}
