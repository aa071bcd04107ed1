/* test_faults.c - followers that fail in every way, at every step: the picture comes out all the
 * same.
 *
 * Unless a test says otherwise, runs are at tolerance 0, where the host's picture must come out bit
 * for bit whatever a follower does, and after each run another one with healthy followers must be
 * fine.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runner.h"
#include "stage.h"

enum { STEPS = 6, RANKS = 4 };

/* ---- accidents of real followers ------------------------------------------------------------- */

typedef enum mishap {
  NOTHING,
  RAISES,
  NOT_A_NUMBER,
  INFINITE,
  DIES_AT_WORK,    /* lets its end go instead of an output */
  DIES_WHILE_IDLE, /* lets its end go instead of taking the work */
  HANGS,           /* and comes back once the test says so */
  MISHAPS,
} mishap;

typedef struct accidents {
  mishap what[RANKS];
  int round[RANKS]; /* the work of the rank, counted from 0, at which it happens */
  bool early;       /* who hangs comes back during the run, not after it */
  bool released;    /* changed atomically: who hangs may go */
} accidents;

static void hang(accidents *plan)
{
  while (!__atomic_load_n(&plan->released, __ATOMIC_ACQUIRE)) {
    usleep(1000);
  }
}

static void release(accidents *plan)
{
  __atomic_store_n(&plan->released, true, __ATOMIC_RELEASE);
}

/* Called by the host before every ask. */
static void release_early(stage *on, int step, void *x)
{
  accidents *plan = on->ctx;
  (void)step, (void)x;
  if (plan->early && on->leader != NULL && stage_report(on).failed > 0) {
    release(plan);
  }
}

static void die(stage_rank *self)
{
  ps_follower_destroy(self->follower);
  self->follower = NULL;
}

static ps_status hand_in(stage_rank *self, const ps_work *work, mishap what)
{
  for (int slot = 0; slot < work->count; ++slot) {
    stage_evaluate(self, work->step[slot], work->point[slot], work->output[slot]);
    if (what == NOT_A_NUMBER || what == INFINITE) {
      stage_store(work->output[slot], self->on->layout.m, stage_elements(self->on) - 1,
                  what == INFINITE ? -INFINITY : NAN);
    }
  }
  return what == RAISES ? ps_follower_fail(self->follower, "the model fell over")
                        : ps_follower_submit(self->follower, self->on->layout.m, 0, 0);
}

static ps_status serve_badly(stage_rank *self)
{
  accidents *plan = self->on->ctx;
  ps_work work = {.count = 1};
  ps_status status = PS_OK;
  for (int round = 0; status == PS_OK && work.count > 0; ++round) {
    mishap what = round == plan->round[self->rank] ? plan->what[self->rank] : NOTHING;
    if (what == DIES_WHILE_IDLE) {
      die(self);
      return PS_OK;
    }
    status = ps_follower_next(self->follower, NULL, &work);
    if (status == PS_OK && work.count > 0 && what == DIES_AT_WORK) {
      die(self);
      return PS_OK;
    }
    if (status == PS_OK && work.count > 0) {
      if (what == HANGS) {
        hang(plan);
      }
      status = hand_in(self, &work, what);
    }
  }
  return status;
}

static void setting(stage *on, ps_program *program, double tolerance)
{
  stage_set(on, program, RANKS, 2, 5, PS_F32, PS_F32);
  on->options.tolerance = tolerance;
}

/* Nothing is left behind that the next run in this process could stumble over. */
static void check_next_run(ps_program *program)
{
  stage on;
  setting(&on, program, 0.0);
  CHECK_EQ(stage_exact(&on, 6).failed, 0);
  stage_close(&on);
}

/* The host's loop with accidents, to its end or to the leader's first failure. */
static void run_badly(stage *on, accidents *plan, void *x)
{
  on->ctx = plan;
  on->serve = serve_badly;
  on->before = release_early;
  stage_open(on);
  stage_run(on, x);
}

/* A run that comes out in spite of accidents; it stays open for its report. */
static void run_with(stage *on, accidents *plan)
{
  void *x = stage_latent(on, 5), *alone = stage_copy(x, stage_x_bytes(on));
  stage_plain(on, alone);
  run_badly(on, plan, x);
  release(plan);
  stage_end(on);
  CHECK_OK(on->failure);
  if (on->options.tolerance == 0.0) {
    CHECK_BYTES(x, alone, stage_x_bytes(on));
  }
  for (size_t i = 0; i < stage_elements(on); ++i) {
    CHECK(isfinite(stage_load(x, PS_F32, i)));
  }
  free(alone);
  free(x);
}

static const ps_failure *failure_of(const ps_report *report, int rank)
{
  for (int k = 0; k < report->failed; ++k) {
    if (report->failures[k].rank == rank) {
      return &report->failures[k];
    }
  }
  return NULL;
}

/* One rank has one mishap, in every round in which it may.  The first round is step 0 for all; in
 * round k the rank is to evaluate step k + rank, until there is none. */
static void check_one(ps_program *program, mishap what, int rank, int round, double tolerance)
{
  static const ps_status expected[MISHAPS] = {
      [RAISES] = PS_FAILED,     [NOT_A_NUMBER] = PS_NOT_FINITE, [INFINITE] = PS_NOT_FINITE,
      [DIES_AT_WORK] = PS_LOST, [DIES_WHILE_IDLE] = PS_LOST,    [HANGS] = PS_DEADLINE};
  accidents plan = {0};
  stage on;
  plan.what[rank] = what;
  plan.round[rank] = round;
  plan.early = round % 2 == 1;
  setting(&on, program, tolerance);
  on.options.deadline_ns = what == HANGS ? 100 * 1000000 : 0;
  run_with(&on, &plan);
  ps_report report = stage_report(&on);
  const ps_failure *line = failure_of(&report, rank);
  bool numbers = what == NOT_A_NUMBER || what == INFINITE;
  bool happens = tolerance > 0.0 || round + rank < STEPS; /* without limit all have work twice */
  /* At tolerance 0 the outputs of ranks above 1 are guesses' fodder alone: refused, not noticed. */
  if (happens && !(numbers && tolerance == 0.0 && rank > 1 && round > 0)) {
    CHECK(line != NULL);
    CHECK_EQ(line->status, numbers && round == 0 ? PS_DIFFERS : expected[what]);
    CHECK(tolerance > 0.0 || line->step == (round > 0 ? round + rank : 0));
    CHECK(line->text[0] != '\0');
  }
  CHECK(happens || line == NULL);
  /* A busy machine may keep a healthy thread beyond the short deadline too, and nothing else. */
  for (int k = 0; k < report.failed; ++k) {
    CHECK(report.failures[k].rank == rank ||
          (what == HANGS && report.failures[k].status == PS_DEADLINE));
  }
  if (what == HANGS && happens) {
    CHECK_EQ(on.rank[rank].status, PS_ABANDONED);
  }
  stage_close(&on);
}

static void check_everywhere(mishap what, double tolerance)
{
  ps_program *program = stage_euler(STEPS);
  for (int rank = 1; rank < RANKS; ++rank) {
    for (int round = 0; round < (tolerance == 0.0 ? STEPS : 2); ++round) {
      check_one(program, what, rank, round, tolerance);
      check_next_run(program);
    }
  }
  ps_program_release(program);
}

TEST(a_follower_raises)
{
  check_everywhere(RAISES, 0.0);
  check_everywhere(RAISES, INFINITY);
}

TEST(a_follower_returns_nan)
{
  check_everywhere(NOT_A_NUMBER, 0.0);
  check_everywhere(NOT_A_NUMBER, INFINITY);
}

TEST(a_follower_returns_infinity)
{
  check_everywhere(INFINITE, 0.0);
  check_everywhere(INFINITE, INFINITY);
}

TEST(a_follower_dies_at_its_work)
{
  check_everywhere(DIES_AT_WORK, 0.0);
  check_everywhere(DIES_AT_WORK, INFINITY);
}

TEST(a_follower_dies_while_idle)
{
  check_everywhere(DIES_WHILE_IDLE, 0.0);
  check_everywhere(DIES_WHILE_IDLE, INFINITY);
}

TEST(a_follower_hangs_and_comes_back)
{
  check_everywhere(HANGS, 0.0);
}

TEST(all_followers_fail_at_once)
{
  ps_program *program = stage_euler(STEPS);
  for (mishap what = RAISES; what < HANGS; ++what) {
    for (int round = 0; round < 2; ++round) {
      accidents plan = {0};
      stage on;
      for (int rank = 1; rank < RANKS; ++rank) {
        plan.what[rank] = what;
        plan.round[rank] = round;
      }
      setting(&on, program, 0.0);
      run_with(&on, &plan);
      stage_close(&on);
    }
  }
  check_next_run(program);
  ps_program_release(program);
}

TEST(followers_fail_in_all_ways_at_random)
{
  ps_program *program = stage_multistep(12);
  uint64_t seed = 99;
  for (int trial = 0; trial < 60; ++trial) {
    accidents plan = {0};
    stage on;
    for (int rank = 1; rank < RANKS; ++rank) {
      plan.what[rank] = (mishap)(fabs(stage_random(&seed)) * HANGS); /* without hanging */
      plan.round[rank] = (int)(fabs(stage_random(&seed)) * 8.0);
    }
    setting(&on, program, trial % 2 == 0 ? 0.0 : 0.05);
    run_with(&on, &plan);
    stage_close(&on);
  }
  check_next_run(program);
  ps_program_release(program);
}

/* ---- raise, interrupt ------------------------------------------------------------------------ */

TEST(raise_on_loss)
{
  ps_program *program = stage_euler(STEPS);
  for (mishap what = RAISES; what < HANGS; ++what) {
    for (int round = 0; round < 3; ++round) {
      accidents plan = {0};
      stage on;
      plan.what[1] = what;
      plan.round[1] = round;
      setting(&on, program, 0.02);
      on.options.raise_on_loss = 1;
      float *x = stage_latent(&on, 5), m[10];
      ps_verdict verdict;
      run_badly(&on, &plan, x);
      CHECK_EQ(on.failure, PS_LOST);
      CHECK(strstr(ps_last_error(), "rank 1") != NULL);
      CHECK_STATUS(ps_leader_ask(on.leader, 1, x, m, &verdict), PS_STATE);
      stage_end(&on);
      CHECK_EQ(stage_report(&on).failed, 1);
      stage_close(&on);
      check_next_run(program);
      free(x);
    }
  }
  ps_program_release(program);
}

static int interrupt(void *ctx)
{
  ++*(int *)ctx;
  return *(int *)ctx == 2;
}

TEST(an_interrupt_ends_a_wait_without_deadline)
{
  ps_program *program = stage_euler(STEPS);
  for (int round = 0; round < 2; ++round) {
    accidents plan = {0};
    int checks = 0;
    stage on;
    plan.what[2] = HANGS;
    plan.round[2] = round;
    setting(&on, program, 0.0);
    on.options.check = interrupt;
    on.options.check_ctx = &checks;
    float *x = stage_latent(&on, 5), m[10];
    ps_verdict verdict;
    run_badly(&on, &plan, x);
    CHECK_EQ(on.failure, PS_INTERRUPTED);
    CHECK_EQ(checks, 2);
    CHECK_STATUS(ps_leader_ask(on.leader, round + 1, x, m, &verdict), PS_STATE);
    CHECK_OK(ps_leader_finish(on.leader));
    release(&plan);
    stage_end(&on);
    CHECK_EQ(on.rank[2].status, PS_ABANDONED);
    CHECK_EQ(on.rank[1].status, PS_OK);
    stage_close(&on);
    check_next_run(program);
    free(x);
  }
  ps_program_release(program);
}

TEST(an_interrupt_ends_a_followers_wait)
{
  const ps_layout layout = {1, 4, PS_F32, PS_F32};
  ps_link *here, *there;
  ps_follower *follower;
  ps_work work;
  int checks = 0;
  ps_wait wait = {0, interrupt, &checks};
  CHECK_OK(ps_threads_open(&layout, 1, &here, &there));
  CHECK_OK(ps_follower_create(&layout, there, &follower));
  CHECK_STATUS(ps_follower_next(follower, &wait, &work), PS_INTERRUPTED);
  CHECK_EQ(work.count, 0);
  here->ops->close(here);
  CHECK_OK(ps_follower_next(follower, &wait, &work));
  CHECK_EQ(work.count, 0);
  ps_follower_destroy(follower);
}

TEST(a_deadline_too_far_to_count_is_none)
{
  ps_program *program = stage_euler(STEPS);
  stage on;
  setting(&on, program, 0.0);
  on.options.deadline_ns = INT64_MAX;
  CHECK_EQ(stage_whole(&on, NULL).failed, 0);
  stage_close(&on);
  ps_program_release(program);
}

/* ---- the library's loops --------------------------------------------------------------------- */

static int fails_on_rank(void *ctx, int rank, int step, const void *x, void *m)
{
  stage *on = ctx;
  stage_evaluate(&on->rank[rank], step, x, m);
  return rank == *(int *)on->ctx && step >= 2;
}

static ps_status serve_by_library(stage_rank *self)
{
  return ps_serve(self->follower, self->rank, fails_on_rank, self->on, NULL, PS_F32);
}

TEST(callbacks_that_fail)
{
  ps_program *program = stage_euler(STEPS);
  for (int rank = 0; rank < RANKS; ++rank) {
    stage on;
    setting(&on, program, 0.0);
    on.serve = serve_by_library;
    on.ctx = &rank;
    void *x = stage_latent(&on, 5);
    stage_open(&on);
    CHECK_STATUS(ps_sample(on.leader, fails_on_rank, &on, NULL, x), rank == 0 ? PS_FAILED : PS_OK);
    stage_end(&on);
    ps_report report = stage_report(&on);
    CHECK_EQ(report.failed, rank > 0);
    CHECK(rank == 0 || report.failures[0].rank == rank);
    for (int k = 1; k < RANKS; ++k) {
      CHECK_EQ(on.rank[k].status, PS_OK);
    }
    stage_close(&on);
    free(x);
  }
  ps_program_release(program);
}
