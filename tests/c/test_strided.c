/* test_strided.c - rounds whose nodes lie apart: answers between them, lanes, budgets, limits. */
#include <math.h>
#include <stdlib.h>

#include "runner.h"
#include "stage.h"

enum { STEPS = 60, SIZE = 9 };

/* Smooth along the trajectory, as a denoiser's output is: the clean sample moves a little. */
static double smooth_f(const stage_rank *self, int step, double x, size_t i)
{
  double s = ps_program_table(self->on->program, 's')[step];
  double clean = tanh(x / (1.0 + s)) + 0.1 * (double)(i % 3);
  return (x - clean) / s;
}

/* As unlike from step to step as can be. */
static double rough_f(const stage_rank *self, int step, double x, size_t i)
{
  (void)self;
  return sin(12.9898 * step + 78.233 * (double)i) + 0.1 * x;
}

static void fill(double *x)
{
  for (int i = 0; i < SIZE; ++i) {
    x[i] = 10.0 * cos(1.7 * i + 0.3);
  }
}

static void open_run(stage *on, ps_program *program, int ranks, bool lane, double tolerance)
{
  stage_set(on, program, ranks, 1, SIZE, PS_F64, PS_F64);
  on->options.max_stride = 0;
  on->options.tolerance = tolerance;
  on->lane = lane;
  on->f = smooth_f;
}

/* Runs to the end; the largest difference to the host alone. */
static double run_to_end(stage *on, ps_report *report)
{
  double x[SIZE], wanted[SIZE], worst = 0.0;
  stage alone = *on;
  fill(x);
  fill(wanted);
  stage_plain(&alone, wanted);
  *report = stage_whole(on, x);
  for (int i = 0; i < SIZE; ++i) {
    worst = fmax(worst, fabs(x[i] - wanted[i]));
  }
  return worst;
}

TEST(fewer_rounds_than_steps_over_ranks)
{
  ps_program *program = stage_euler(STEPS);
  for (int ranks = 1; ranks <= 8; ranks *= 2) {
    for (int lane = 0; lane <= 1; ++lane) {
      stage on;
      ps_report report;
      open_run(&on, program, ranks, lane != 0, 0.02);
      double worst = run_to_end(&on, &report);
      CHECK_LT(worst, 0.1);
      CHECK_LT(2 * report.rounds, STEPS);
      CHECK(report.interpolated > STEPS / 4);
      CHECK_EQ(report.answered + on.verdicts[PS_EVALUATE], STEPS);
      CHECK(lane ? on.verdicts[PS_AHEAD] == 0 : on.verdicts[PS_AHEAD] > 0);
      int taken = 0;
      for (int k = 0; k < report.counted; ++k) {
        taken += report.accepted[k];
      }
      CHECK_EQ(taken, STEPS);
      stage_close(&on);
    }
  }
  ps_program_release(program);
}

/* Where the nodes are evaluated decides no value. */
TEST(a_lane_does_what_the_host_would)
{
  ps_program *program = stage_multistep(STEPS);
  double last[2][SIZE];
  int rounds[2];
  for (int lane = 0; lane <= 1; ++lane) {
    stage on;
    open_run(&on, program, 3, lane != 0, 0.02);
    fill(last[lane]);
    rounds[lane] =
        stage_whole(&on, last[lane]).rounds - lane; /* its check at step 0 counts as one */
    stage_close(&on);
  }
  CHECK_EQ(rounds[0], rounds[1]);
  CHECK_BYTES(last[0], last[1], sizeof last[0]);
  ps_program_release(program);
}

TEST(tolerance_0_is_exact_without_a_limit_on_strides)
{
  ps_program *program = stage_euler(STEPS);
  for (int lane = 0; lane <= 1; ++lane) {
    stage on;
    ps_report report;
    open_run(&on, program, 3, lane != 0, 0.0);
    CHECK_EQ(run_to_end(&on, &report), 0.0);
    CHECK_EQ(report.interpolated, 0);
    CHECK_EQ(report.answered, 0);
    stage_close(&on);
  }
  ps_program_release(program);
}

TEST(max_stride_limits_the_distance_of_nodes)
{
  ps_program *program = stage_euler(STEPS);
  for (int most = 1; most <= 4; ++most) {
    stage on;
    ps_report report;
    open_run(&on, program, 3, false, 0.3);
    on.options.max_stride = most;
    run_to_end(&on, &report);
    for (int k = 1; k < report.records; ++k) {
      const ps_record *a = &report.timeline[k - 1], *b = &report.timeline[k];
      CHECK(a->round != b->round || b->step - a->step <= most);
    }
    CHECK((report.interpolated == 0) == (most == 1));
    stage_close(&on);
  }
  ps_program_release(program);
}

TEST(rounds_do_not_add_up_beyond_the_steps)
{
  ps_program *program = stage_euler(STEPS);
  for (int ranks = 1; ranks <= 4; ++ranks) {
    stage on;
    ps_report report;
    open_run(&on, program, ranks, false, 1e-12);
    on.f = rough_f;
    CHECK_LT(run_to_end(&on, &report), 1e-9);
    CHECK(report.rounds <= STEPS + 1);
    stage_close(&on);
  }
  ps_program_release(program);
}

/* What lies ahead may be left alone: the host evaluates its own step, and goes on. */
TEST(a_host_that_never_looks_ahead)
{
  ps_program *program = stage_euler(STEPS);
  double x[SIZE], wanted[SIZE];
  stage on, alone;
  open_run(&on, program, 1, false, 0.02);
  fill(x);
  fill(wanted);
  alone = on;
  stage_plain(&alone, wanted);
  stage_open(&on);
  for (int j = 0; j < STEPS; ++j) {
    double m[SIZE];
    stage_call(&on, j, x, m);
    CHECK_OK(ps_leader_advance(on.leader, NULL, x));
  }
  stage_end(&on);
  CHECK_EQ(stage_report(&on).answered, 0);
  for (int i = 0; i < SIZE; ++i) {
    CHECK_NEAR(x[i], wanted[i], 1e-9);
  }
  stage_close(&on);
  ps_program_release(program);
}

TEST(submits_that_do_not_fit)
{
  ps_program *program = stage_euler(STEPS);
  double x[SIZE], m[SIZE];
  ps_verdict verdict;
  stage on;
  open_run(&on, program, 1, false, 0.02);
  fill(x);
  stage_open(&on);
  CHECK_OK(ps_leader_ask(on.leader, 0, x, m, &verdict));
  CHECK_EQ(verdict, PS_EVALUATE);
  CHECK_STATUS(ps_leader_submit(on.leader, NULL, PS_F64, 0), PS_STATE);
  stage_evaluate(&on.rank[0], 0, x, m);
  CHECK_OK(ps_leader_submit(on.leader, m, PS_F64, 0));
  stage_end(&on);
  stage_close(&on);
  ps_program_release(program);
}

static ps_status serve_a_few(stage_rank *self)
{
  ps_work work;
  ps_status status = PS_OK;
  for (int k = 0; k < 4 && status == PS_OK; ++k) {
    status = ps_follower_next(self->follower, NULL, &work);
    if (status == PS_OK && work.count > 0) {
      stage_evaluate(self, work.step[0], work.point[0], work.output[0]);
      status = ps_follower_submit(self->follower, PS_F64, 0, 0);
    }
  }
  return status;
}

/* One after another they leave; the host goes on by itself in the end. */
TEST(lanes_and_followers_that_leave)
{
  ps_program *program = stage_euler(STEPS);
  for (int ranks = 1; ranks <= 3; ++ranks) {
    stage on;
    ps_report report;
    open_run(&on, program, ranks, true, 0.02);
    on.serve = serve_a_few;
    CHECK_LT(run_to_end(&on, &report), 0.1);
    CHECK_EQ(report.failed, ranks);
    stage_close(&on);
  }
  ps_program_release(program);
}

/* An edit after the answer is measured again, between nodes too. */
TEST(amended_answers_between_nodes)
{
  ps_program *program = stage_euler(STEPS);
  const double *g = ps_program_table(program, 'g');
  double x[SIZE], m[SIZE], again[SIZE], edited[SIZE], spent;
  int amended = 0;
  ps_verdict verdict;
  stage on;
  open_run(&on, program, 1, false, 0.05);
  fill(x);
  stage_open(&on);
  for (int j = 0; j < STEPS; ++j) {
    CHECK_OK(ps_leader_ask(on.leader, j, x, m, &verdict));
    while (verdict == PS_AHEAD) {
      ps_work work;
      CHECK_OK(ps_leader_work(on.leader, &work));
      stage_evaluate(&on.rank[0], work.step[0], work.point[0], work.output[0]);
      CHECK_OK(ps_leader_submit(on.leader, NULL, PS_F64, 0));
      CHECK_OK(ps_leader_ask(on.leader, j, x, m, &verdict));
    }
    if (verdict == PS_EVALUATE) {
      stage_evaluate(&on.rank[0], j, x, m);
      CHECK_OK(ps_leader_submit(on.leader, m, PS_F64, 0));
    } else {
      for (int i = 0; i < SIZE; ++i) {
        edited[i] = x[i] + 0.01;
      }
      CHECK_OK(ps_leader_amend(on.leader, edited, again, &spent));
      for (int i = 0; i < SIZE; ++i) {
        CHECK_NEAR(again[i], m[i] + 0.01 * g[j], 1e-9);
      }
      CHECK_OK(ps_leader_amend(on.leader, x, m, &spent));
      ++amended;
    }
    CHECK_OK(ps_leader_advance(on.leader, NULL, x));
  }
  stage_end(&on);
  CHECK(amended > STEPS / 2 && stage_report(&on).interpolated > STEPS / 4);
  stage_close(&on);
  ps_program_release(program);
}

/* ---- what a round must answer ---------------------------------------------------------------- */

/* A call of a host that evaluates what lies ahead too; returns what became of x. */
static ps_verdict take(stage *on, int step, double *x, double *m)
{
  ps_verdict verdict;
  CHECK_OK(ps_leader_ask(on->leader, step, x, m, &verdict));
  while (verdict == PS_AHEAD) {
    ps_work work;
    CHECK_OK(ps_leader_work(on->leader, &work));
    for (int k = 0; k < work.count; ++k) {
      stage_evaluate(&on->rank[0], work.step[k], work.point[k], work.output[k]);
    }
    CHECK_OK(ps_leader_submit(on->leader, NULL, PS_F64, 0));
    CHECK_OK(ps_leader_ask(on->leader, step, x, m, &verdict));
  }
  if (verdict == PS_EVALUATE) {
    stage_evaluate(&on->rank[0], step, x, m);
    CHECK_OK(ps_leader_submit(on->leader, m, PS_F64, 0));
  }
  return verdict;
}

/* One device evaluates ahead only where the host itself would come: nothing is asked for twice. */
TEST(one_device_throws_nothing_away)
{
  ps_program *program = stage_euler(STEPS);
  int thrown = 0, records = 0;
  const double tolerances[] = {0.3, 0.1, 0.03, 0.01, 0.003};
  for (int i = 0; i < 5; ++i) {
    stage on;
    ps_report report;
    open_run(&on, program, 1, false, tolerances[i]);
    run_to_end(&on, &report);
    records += report.records;
    for (int k = 0; k < report.records; ++k) {
      thrown += !report.timeline[k].accepted;
    }
    CHECK(report.rounds < STEPS);
    stage_close(&on);
  }
  CHECK(33 * thrown <= records);
  ps_program_release(program);
}

/* However much a round may keep, what the host has moved is evaluated. */
TEST(an_edited_latent_is_evaluated)
{
  ps_program *program = stage_euler(STEPS);
  const double *cost = NULL;
  for (int i = 1; i < 5; ++i) {
    const double edit = i + 0.5; /* tolerances */
    double x[SIZE], m[SIZE];
    int edited = 0;
    stage on;
    open_run(&on, program, 1, false, 0.05);
    fill(x);
    stage_open(&on);
    for (int j = 0; j < STEPS; ++j) {
      ps_report report = stage_report(&on);
      cost = report.cost;
      /* Answered before, so that this step lies inside a round. */
      bool inside = j > 0 && j < STEPS - 2 && report.answered > edited &&
                    !isnan(report.drift[j - 1]) && report.interpolated > edited;
      double moved = edit * 0.05 / cost[j] * ps_program_table(program, 's')[j];
      for (int i = 0; inside && j % 7 == 3 && i < SIZE; ++i) {
        x[i] += i % 2 ? moved : -moved;
      }
      ps_verdict verdict = take(&on, j, x, m);
      if (inside && j % 7 == 3 && stage_report(&on).drift[j] > 0.9 * edit * 0.05 / cost[j]) {
        CHECK_EQ(verdict, PS_EVALUATE);
        ++edited;
      }
      CHECK_OK(ps_leader_advance(on.leader, NULL, x));
    }
    CHECK(edited > 0);
    stage_end(&on);
    stage_close(&on);
  }
  ps_program_release(program);
}

/* Where noise vanishes no step is answered between others. */
TEST(the_last_steps_are_evaluated)
{
  for (int ranks = 1; ranks <= 4; ++ranks) {
    ps_program *program = stage_euler(STEPS);
    const double *s = ps_program_table(program, 's');
    stage on;
    ps_report report;
    bool evaluated[STEPS] = {false};
    open_run(&on, program, ranks, false, INFINITY);
    run_to_end(&on, &report);
    for (int k = 0; k < report.records; ++k) {
      evaluated[report.timeline[k].step] |= report.timeline[k].accepted != 0;
    }
    CHECK(evaluated[STEPS - 1]);
    for (int j = 1, last = 0; j < STEPS; ++j) {
      if (evaluated[j]) {
        CHECK(j == last + 1 || hypot(1.0, s[last]) * s[j] >= 0.44 * s[last] * hypot(1.0, s[j]));
        last = j;
      }
    }
    stage_close(&on);
    ps_program_release(program);
  }
}

/* A host that moves its latent again and again, as a mask does: rounds ahead come to nothing. */
TEST(a_host_that_edits_again_and_again)
{
  ps_program *program = stage_euler(STEPS);
  for (int every = 1; every <= 4; ++every) {
    double x[SIZE], m[SIZE];
    stage on;
    open_run(&on, program, 1, false, 0.02);
    fill(x);
    stage_open(&on);
    for (int j = 0; j < STEPS; ++j) {
      for (int i = 0; j >= 6 && j % every == 0 && i < SIZE; ++i) {
        x[i] += (i + j) % 2 ? 5.0 : -5.0;
      }
      take(&on, j, x, m);
      CHECK_OK(ps_leader_advance(on.leader, NULL, x));
    }
    stage_end(&on);
    CHECK(stage_report(&on).rounds <= STEPS + 1);
    stage_close(&on);
  }
  ps_program_release(program);
}

/* At the host's own latents outputs promise long strides; what lies ahead is no number. */
static double promising_f(const stage_rank *self, int step, double x, size_t i)
{
  (void)self;
  (void)x;
  return 0.01 * step + (double)i;
}

static double no_number_f(const stage_rank *self, int step, double x, size_t i)
{
  (void)self;
  (void)step;
  (void)x;
  (void)i;
  return NAN;
}

/* Every round ahead is in vain: what is left is the host's own run. */
TEST(a_run_that_saves_nothing_changes_nothing)
{
  ps_program *program = stage_euler(STEPS);
  double x[SIZE], m[SIZE], wanted[SIZE];
  stage on, alone;
  open_run(&on, program, 1, false, 0.02);
  alone = on;
  alone.f = promising_f;
  fill(x);
  fill(wanted);
  stage_plain(&alone, wanted);
  stage_open(&on);
  for (int j = 0; j < STEPS; ++j) {
    ps_verdict verdict;
    CHECK_OK(ps_leader_ask(on.leader, j, x, m, &verdict));
    while (verdict == PS_AHEAD) {
      ps_work work;
      CHECK_OK(ps_leader_work(on.leader, &work));
      on.f = no_number_f;
      stage_evaluate(&on.rank[0], work.step[0], work.point[0], work.output[0]);
      CHECK_OK(ps_leader_submit(on.leader, NULL, PS_F64, 0));
      CHECK_OK(ps_leader_ask(on.leader, j, x, m, &verdict));
    }
    CHECK_EQ(verdict, PS_EVALUATE);
    on.f = promising_f;
    stage_evaluate(&on.rank[0], j, x, m);
    CHECK_OK(ps_leader_submit(on.leader, m, PS_F64, 0));
    CHECK_OK(ps_leader_advance(on.leader, NULL, x));
  }
  stage_end(&on);
  CHECK_LT(stage_report(&on).rounds, STEPS + 2);
  CHECK_EQ(stage_report(&on).answered, 0);
  for (int i = 0; i < SIZE; ++i) {
    CHECK_NEAR(x[i], wanted[i], 1e-9);
  }
  stage_close(&on);
  ps_program_release(program);
}
