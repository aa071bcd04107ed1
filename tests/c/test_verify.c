/* test_verify.c - ranks that do not compute the leader's function, and numbers that are not finite.
 *
 * A follower of other weights or another first latent is found out in the first round; rounding is
 * not mistaken for that, and nobody is blamed for what the leader's own numbers did.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"
#include "stage.h"

enum { STEPS = 6, RANKS = 4 };

static void setting(stage *on, ps_program *program, double tolerance)
{
  stage_set(on, program, RANKS, 2, 5, PS_F32, PS_F32);
  on->options.tolerance = tolerance;
}

/* ---- followers that compute something else --------------------------------------------------- */

static double other_weights(const stage_rank *self, int step, double x, size_t i)
{
  return stage_f(self, step, x, i) * (self->rank == 2 ? 1.02 : 1.0);
}

static double other_kernels(const stage_rank *self, int step, double x, size_t i)
{
  double unit = self->on->layout.m == PS_F32 ? 1e-6 : self->on->layout.m == PS_F16 ? 2e-3 : 1e-2;
  return stage_f(self, step, x, i) * (self->rank == 2 ? 1.0 + unit : 1.0);
}

TEST(other_weights_are_found_out_in_the_first_round)
{
  const ps_dtype dtypes[] = {PS_F64, PS_F32, PS_F16};
  ps_program *program = stage_euler(STEPS);
  for (int k = 0; k < 3; ++k) {
    stage on;
    stage_set(&on, program, RANKS, 2, 50, PS_F32, dtypes[k]);
    on.f = other_weights;
    ps_report report = stage_whole(&on, NULL);
    CHECK_EQ(report.failed, 1);
    CHECK_EQ(report.failures[0].rank, 2);
    CHECK_EQ(report.failures[0].step, 0);
    CHECK_EQ(report.failures[0].status, PS_DIFFERS);
    CHECK(strstr(report.failures[0].text, "weights") != NULL);
    CHECK_EQ(on.rank[2].seen, 1);
    stage_close(&on);
  }
  ps_program_release(program);
}

TEST(other_rounding_is_not_other_weights)
{
  const ps_dtype dtypes[] = {PS_F32, PS_F16, PS_BF16};
  ps_program *program = stage_euler(STEPS);
  for (int k = 0; k < 3; ++k) {
    stage on;
    stage_set(&on, program, RANKS, 2, 50, PS_F32, dtypes[k]);
    on.f = other_kernels;
    CHECK_EQ(stage_whole(&on, NULL).failed, 0);
    stage_close(&on);
  }
  ps_program_release(program);
}

/* Says that its host made another latent of the one it was given: by ctx, in every element. */
static bool evaluate_elsewhere(stage_rank *self, int step, void *x, void *m)
{
  bool moved = self->rank == 1 && step == 0;
  for (size_t i = 0; moved && i < stage_elements(self->on); ++i) {
    stage_store(x, PS_F32, i, stage_load(x, PS_F32, i) * *(const double *)self->on->ctx);
  }
  stage_evaluate(self, step, x, m);
  return moved;
}

static void check_elsewhere(double factor, bool found_out)
{
  ps_program *program = stage_euler(STEPS);
  stage on;
  setting(&on, program, 0.02);
  on.ctx = &factor;
  on.evaluate = evaluate_elsewhere;
  ps_report report = stage_whole(&on, NULL);
  CHECK_EQ(report.failed, found_out);
  CHECK(!found_out || (report.failures[0].rank == 1 && report.failures[0].status == PS_DIFFERS &&
                       strstr(report.failures[0].text, "latent") != NULL));
  stage_close(&on);
  ps_program_release(program);
}

TEST(another_first_latent_is_found_out)
{
  check_elsewhere(1.01, true);
  check_elsewhere(NAN, true);
  check_elsewhere(1.0, false);
}

/* A host that edits its first latent after the ask does so on every rank, or on the leader alone.
 */
TEST(a_first_latent_that_the_leader_edits)
{
  ps_program *program = stage_euler(STEPS);
  for (int alike = 0; alike < 2; ++alike) {
    double factor = 1.25, spent;
    stage on;
    ps_verdict verdict;
    setting(&on, program, 0.02);
    on.ranks = 2;
    on.ctx = &factor;
    on.evaluate = alike ? evaluate_elsewhere : NULL;
    float *x = stage_latent(&on, 5), m[10];
    stage_open(&on);
    CHECK_OK(ps_leader_ask(on.leader, 0, x, m, &verdict));
    for (size_t i = 0; i < 10; ++i) {
      stage_store(x, PS_F32, i, stage_load(x, PS_F32, i) * factor);
    }
    CHECK_OK(ps_leader_amend(on.leader, x, NULL, &spent));
    stage_evaluate(&on.rank[0], 0, x, m);
    CHECK_OK(ps_leader_submit(on.leader, m, PS_F32, 0));
    ps_report report = stage_report(&on);
    CHECK_EQ(report.failed, !alike);
    CHECK(alike || strstr(report.failures[0].text, "latent") != NULL);
    stage_end(&on);
    stage_close(&on);
    free(x);
  }
  ps_program_release(program);
}

/* Followers answer in another dtype than the leader's first output had. */
static ps_status serve_halves(stage_rank *self)
{
  ps_work work;
  ps_status status = ps_follower_next(self->follower, NULL, &work);
  while (status == PS_OK && work.count > 0) {
    status = ps_follower_submit(self->follower, PS_F16, 0, 0);
    status = status == PS_OK ? ps_follower_next(self->follower, NULL, &work) : status;
  }
  return status;
}

TEST(outputs_of_another_dtype)
{
  ps_program *program = stage_euler(STEPS);
  for (int open = 0; open < 2; ++open) {
    stage on;
    stage_set(&on, program, 3, 2, 5, PS_F32, open ? PS_NONE : PS_F32);
    on.serve = serve_halves;
    ps_report report = stage_whole(&on, NULL);
    CHECK_EQ(report.failed, 2);
    CHECK_EQ(report.failures[0].status, PS_DTYPE);
    stage_close(&on);
  }
  ps_program_release(program);
}

/* ---- numbers that are the leader's own fault ------------------------------------------------- */

static double breaks_down(const stage_rank *self, int step, double x, size_t i)
{
  return step == 2 && self->rank == 0 && i == 3 ? INFINITY : stage_f(self, step, x, i);
}

/* The host gets what it would have had without us, and no follower is blamed for its guesses. */
TEST(the_leaders_own_infinity)
{
  ps_program *program = stage_multistep(10);
  const double tolerances[] = {0.0, 0.02, INFINITY};
  for (int k = 0; k < 3; ++k) {
    stage on;
    setting(&on, program, tolerances[k]);
    on.f = breaks_down;
    on.options.raise_on_loss = 1;
    void *x = stage_latent(&on, 5), *alone = stage_copy(x, stage_x_bytes(&on));
    stage_plain(&on, alone);
    ps_report report = stage_whole(&on, x);
    CHECK_EQ(report.failed, 0);
    if (tolerances[k] == 0.0) {
      CHECK_GT(report.not_finite, 0);
      for (size_t i = 0; i < stage_elements(&on); ++i) {
        double got = stage_load(x, PS_F32, i), expected = stage_load(alone, PS_F32, i);
        CHECK(got == expected || (isnan(got) && isnan(expected)));
      }
    }
    stage_close(&on);
    free(alone);
    free(x);
  }
  ps_program_release(program);
}

/* One follower says that it evaluated at NaN, and brings numbers all the same: the others' guesses
 * must not be made from that point. */
static bool evaluate_nowhere(stage_rank *self, int step, void *x, void *m)
{
  bool moved = self->rank == 2 && step > 0;
  stage_evaluate(self, step, x, m);
  if (moved) {
    stage_store(x, PS_F32, 4, NAN);
  }
  return moved;
}

TEST(points_that_are_not_finite_are_not_carried)
{
  ps_program *program = stage_euler(12);
  stage on;
  setting(&on, program, 1e-9);
  on.evaluate = evaluate_nowhere;
  CHECK_EQ(stage_whole(&on, NULL).failed, 0);
  for (int rank = 1; rank < RANKS; ++rank) {
    for (int k = 0; k < on.rank[rank].seen; ++k) {
      for (size_t i = 0; i < stage_elements(&on); ++i) {
        CHECK(isfinite(stage_load(on.rank[rank].point[k], PS_F32, i)));
      }
    }
  }
  stage_close(&on);
  ps_program_release(program);
}
