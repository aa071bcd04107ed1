/* test_run.c - whole runs on the threads transport, against a host's plain loop.
 *
 * At tolerance 0 the host's picture must come out bit for bit; above it, answers must be what the
 * followers evaluated, rebased, in every dtype.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runner.h"
#include "stage.h"

enum { STEPS_MOST = 64 };

/* ---- exactness ------------------------------------------------------------------------------- */

/* The picture of the run is the host's own, bit for bit. */
static void check_exact(stage *on)
{
  CHECK_EQ(stage_exact(on, 3).failed, 0);
  stage_close(on);
}

TEST(tolerance_0_is_exact_in_every_dtype)
{
  const ps_dtype dtypes[][2] = {{PS_F64, PS_F64},   {PS_F32, PS_F32},  {PS_F16, PS_F16},
                                {PS_BF16, PS_BF16}, {PS_F32, PS_BF16}, {PS_BF16, PS_F32}};
  ps_program *programs[] = {stage_euler(9), stage_multistep(9)};
  for (int k = 0; k < 6; ++k) {
    for (int ranks = 1; ranks <= 4; ++ranks) {
      stage on;
      stage_set(&on, programs[ranks % 2], ranks, 2, 13, dtypes[k][0], dtypes[k][1]);
      on.options.tolerance = 0.0;
      check_exact(&on);
      CHECK_EQ(on.verdicts[PS_ANSWER], 0);
      CHECK_EQ(on.verdicts[PS_EVALUATE], 9);
    }
  }
  ps_program_release(programs[0]);
  ps_program_release(programs[1]);
}

TEST(one_rank_is_exact_at_any_tolerance)
{
  ps_program *program = stage_multistep(9);
  stage on;
  stage_set(&on, program, 1, 2, 13, PS_F32, PS_F32);
  on.options.tolerance = INFINITY;
  check_exact(&on);
  CHECK_EQ(on.verdicts[PS_ANSWER], 0);
  ps_program_release(program);
}

TEST(tolerance_0_is_exact_with_several_slots_and_noise)
{
  ps_program *program = stage_ancestral(11);
  stage on;
  stage_set(&on, program, 3, 1, 17, PS_F64, PS_F64);
  double *noise = stage_noise(&on);
  on.noise = noise;
  on.options.tolerance = 0.0;
  on.slots[0] = 2;
  on.slots[2] = 3;
  check_exact(&on);
  free(noise);
  ps_program_release(program);
}

TEST(one_step_asks_nothing_of_followers)
{
  ps_program *program = stage_euler(1);
  stage on;
  stage_set(&on, program, 3, 1, 8, PS_F32, PS_F32);
  check_exact(&on);
  CHECK_EQ(on.rank[1].status, PS_OK);
  CHECK_EQ(on.rank[2].status, PS_OK);
  ps_program_release(program);
}

/* ---- answers in every dtype ------------------------------------------------------------------ */

static double last_place(ps_dtype dtype, double value)
{
  const double unit = dtype == PS_F64   ? 0x1p-52
                      : dtype == PS_F32 ? 0x1p-23
                      : dtype == PS_F16 ? 0x1p-10
                                        : 0x1p-7;
  return unit * fmax(fabs(value), 0x1p-14);
}

static double floor_of(ps_dtype dtype)
{
  return dtype == PS_F64 ? 0.0 : dtype == PS_F32 ? 0x1p-25 : dtype == PS_F16 ? 0x1p-12 : 0x1p-9;
}

/* drift_j^2 of the worst item. */
static double expected_drift(const stage *on, int step, const void *x, const void *guess)
{
  size_t size = on->layout.size;
  double worst = 0.0, s = ps_program_table(on->program, 's')[step], k = floor_of(on->layout.x);
  for (size_t item = 0; item < on->layout.items; ++item) {
    double difference = 0.0, square = 0.0;
    for (size_t i = item * size; i < (item + 1) * size; ++i) {
      double v = stage_load(x, on->layout.x, i), at = stage_load(guess, on->layout.x, i);
      difference += (v - at) * (v - at) / (double)size;
      square += v * v / (double)size;
    }
    worst = fmax(worst, difference - k * k * square);
  }
  return sqrt(worst) / s;
}

typedef struct seen_drift {
  double drift[STEPS_MOST];
} seen_drift;

static void measure_before(stage *on, int step, void *x)
{
  const void *guess = stage_guess(on, step);
  seen_drift *seen = on->ctx;
  seen->drift[step] = guess != NULL ? expected_drift(on, step, x, guess) : NAN;
}

/* m^ + g (x - x^), to the last place of m's dtype; float arithmetic adds a few of its own. */
static void check_answer(stage *on, int step, const void *x, void *m, ps_verdict verdict)
{
  const void *guess = stage_guess(on, step);
  double g = ps_program_table(on->program, 'g')[step];
  double own = 0.0;
  for (size_t i = 0; verdict == PS_ANSWER && i < stage_elements(on); ++i) {
    double v = stage_load(x, on->layout.x, i), at = stage_load(guess, on->layout.x, i);
    stage_store(&own, on->layout.m, 0, on->f(&on->rank[0], step, at, i));
    own = stage_load(&own, on->layout.m, 0);
    double expected = own + g * (v - at);
    double slack = last_place(on->layout.m, expected) +
                   4.0 * last_place(on->layout.m == PS_F64 ? PS_F64 : PS_F32,
                                    fabs(own) + fabs(g * v) + fabs(g * at));
    CHECK_NEAR(stage_load(m, on->layout.m, i), expected, slack);
  }
}

/* A run without limit, whose answers are checked and whose drifts are measured. */
static ps_report run_measured(stage *on, seen_drift *seen)
{
  on->options.tolerance = INFINITY;
  on->before = measure_before;
  on->after = check_answer;
  on->ctx = seen;
  return stage_whole(on, NULL);
}

TEST(answers_and_drift_in_every_dtype)
{
  const ps_dtype dtypes[][2] = {{PS_F64, PS_F64},   {PS_F32, PS_F32},  {PS_F16, PS_F16},
                                {PS_BF16, PS_BF16}, {PS_F32, PS_BF16}, {PS_F16, PS_F32}};
  ps_program *program = stage_euler(13);
  for (int k = 0; k < 6; ++k) {
    stage on;
    seen_drift seen;
    stage_set(&on, program, 3, 3, 21, dtypes[k][0], dtypes[k][1]);
    ps_report report = run_measured(&on, &seen);
    CHECK_EQ(on.verdicts[PS_EVALUATE], 5);
    for (int j = 0; j < 13; ++j) {
      double drift = report.drift[j];
      CHECK(on.verdicts[PS_ANSWER] == 8 && (drift > 0.0 || isnan(seen.drift[j]) || j < 2 || k > 1));
      CHECK(isnan(seen.drift[j]) || fabs(drift - seen.drift[j]) <= 1e-3 * seen.drift[j] + 1e-6);
    }
    stage_close(&on);
  }
  ps_program_release(program);
}

/* A guess that is right but for the rounding of x itself has no drift. */
TEST(rounding_of_the_host_is_no_drift)
{
  const double a[8] = {1, 1, 1, 1, 1, 1, 1, 1}, b[8] = {0};
  ps_program *program;
  CHECK_OK(ps_program_create(8, 1, a, b, NULL, NULL, NULL, NULL, &program));
  stage on;
  stage_set(&on, program, 4, 1, 64, PS_BF16, PS_BF16);
  uint16_t *x = stage_latent(&on, 5), m[64];
  ps_verdict verdict;
  stage_open(&on);
  for (int j = 0; j < 3; ++j) {
    verdict = stage_call(&on, j, x, m);
    x[7] ^= j == 1; /* one unit in the last place of one element */
  }
  CHECK_EQ(verdict, PS_ANSWER);
  CHECK_EQ(stage_report(&on).drift[2], 0);
  stage_end(&on);
  stage_close(&on);
  free(x);
  ps_program_release(program);
}

TEST(the_first_output_settles_an_open_dtype)
{
  ps_program *program = stage_euler(8);
  stage on;
  stage_set(&on, program, 3, 1, 9, PS_BF16, PS_NONE);
  on.options.tolerance = 0.0;
  check_exact(&on);
  stage_set(&on, program, 3, 1, 9, PS_F64, PS_NONE);
  on.options.tolerance = 0.0;
  check_exact(&on);
  ps_program_release(program);
}

/* The point a follower says it really evaluated is what drift and rebase are measured against. */
static bool evaluate_moved(stage_rank *self, int step, void *x, void *m)
{
  bool moved = step > 0;
  for (size_t i = 0; moved && i < 3; ++i) {
    ((double *)x)[i] += 0.125;
  }
  stage_evaluate(self, step, x, m);
  return moved;
}

TEST(points_moved_by_a_follower)
{
  ps_program *program = stage_euler(13);
  stage on;
  seen_drift seen;
  stage_set(&on, program, 3, 1, 21, PS_F64, PS_F64);
  on.evaluate = evaluate_moved;
  ps_report report = run_measured(&on, &seen);
  CHECK_EQ(on.verdicts[PS_ANSWER], 8);
  /* 2 points and outputs of step 0, 8 of guesses; the latter's points came back too. */
  CHECK_EQ(report.bytes_sent, (2 * 2 + 3 * 8) * stage_x_bytes(&on));
  for (int j = 0; j < 13; ++j) {
    CHECK(isnan(seen.drift[j]) || fabs(report.drift[j] - seen.drift[j]) < 1e-12);
  }
  stage_close(&on);
  ps_program_release(program);
}

/* ---- the loops of the library ---------------------------------------------------------------- */

static int denoise(void *ctx, int rank, int step, const void *x, void *m)
{
  stage *on = ctx;
  stage_evaluate(&on->rank[rank], step, x, m);
  return 0;
}

static ps_status serve_by_library(stage_rank *self)
{
  return ps_serve(self->follower, self->rank, denoise, self->on, NULL, self->on->layout.m);
}

/* x in place by the program, with the backend's arithmetic and nothing else of the library. */
static void sample_plainly(const stage *on, const double *noise, double *x)
{
  size_t n = stage_elements(on);
  double *past[2 * STEPS_MOST] = {NULL};
  int steps = ps_program_steps(on->program), history = ps_program_history(on->program);
  stage_rank self = {.on = (stage *)on};
  for (int j = 0; j < steps; ++j) {
    double weight[2 * STEPS_MOST + 1];
    ps_term term[2 * STEPS_MOST + 1];
    int terms = 0;
    past[2 * j] = stage_copy(x, n * sizeof *x);
    past[2 * j + 1] = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; ++i) {
      past[2 * j + 1][i] = on->f(&self, j, x[i], i);
    }
    for (int k = 0; k < history && k <= j; ++k) {
      weight[terms] = ps_program_table(on->program, 'a')[j * history + k];
      term[terms++] = (ps_term){past[2 * (j - k)], PS_F64};
      weight[terms] = ps_program_table(on->program, 'b')[j * history + k];
      term[terms++] = (ps_term){past[2 * (j - k) + 1], PS_F64};
    }
    if (noise != NULL) {
      weight[terms] = ps_program_table(on->program, 'c')[j];
      term[terms++] = (ps_term){noise + (size_t)j * n, PS_F64};
    }
    CHECK_OK(
        ps_backend_find("cpu")->lincomb(NULL, n, 1, terms, weight, term, (void *[]){x}, PS_F64));
  }
  for (int k = 0; k < 2 * steps; ++k) {
    free(past[k]);
  }
}

static void check_sample(ps_program *program, bool draws, double tolerance)
{
  stage on;
  ps_work work;
  stage_set(&on, program, 4, 2, 11, PS_F64, PS_F64);
  on.serve = serve_by_library;
  on.options.tolerance = tolerance;
  on.slots[0] = 2;
  double *x = stage_latent(&on, 2), *alone = stage_copy(x, stage_x_bytes(&on));
  double *noise = draws ? stage_noise(&on) : NULL;
  stage_open(&on);
  sample_plainly(&on, noise, alone);
  CHECK_OK(ps_sample(on.leader, denoise, &on, noise, x));
  CHECK_STATUS(ps_leader_work(on.leader, &work), PS_STATE); /* finished: followers have left */
  CHECK(strstr(ps_last_error(), "over") != NULL);
  stage_end(&on);
  double worst = 0.0;
  for (size_t i = 0; i < stage_elements(&on); ++i) {
    worst = fmax(worst, fabs(x[i] - alone[i]));
  }
  CHECK_EQ(worst == 0.0, tolerance == 0.0);
  CHECK_EQ(stage_report(&on).answered > 0, tolerance > 0.0);
  CHECK_LT(worst, 0.5);
  stage_close(&on);
  free(noise);
  free(alone);
  free(x);
}

TEST(sample_and_serve)
{
  ps_program *multistep = stage_multistep(14), *ancestral = stage_ancestral(14);
  check_sample(multistep, false, 0.0);
  check_sample(multistep, false, 0.05);
  check_sample(ancestral, true, 0.0);
  check_sample(ancestral, true, 0.05);
  ps_program_release(multistep);
  ps_program_release(ancestral);
}

/* ---- time ------------------------------------------------------------------------------------ */

/* Followers take their time, each evaluation another; the test's seed says how. */
static bool evaluate_slowly(stage_rank *self, int step, void *x, void *m)
{
  uint64_t seed = *(uint64_t *)self->on->ctx + (uint64_t)self->rank + 10 * (uint64_t)step;
  usleep((useconds_t)(500.0 + 500.0 * stage_random(&seed)));
  stage_evaluate(self, step, x, m);
  return false;
}

TEST(timing_decides_no_value)
{
  ps_program *program = stage_euler(20);
  float *first = NULL;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    stage on;
    stage_set(&on, program, 4, 1, 16, PS_F32, PS_F32);
    on.evaluate = evaluate_slowly;
    on.ctx = &seed;
    on.options.tolerance = 0.1;
    float *x = stage_latent(&on, 2);
    stage_whole(&on, x);
    CHECK_GT(on.verdicts[PS_ANSWER], 0);
    CHECK(first == NULL || memcmp(first, x, stage_x_bytes(&on)) == 0);
    stage_close(&on);
    free(first);
    first = x;
  }
  free(first);
  ps_program_release(program);
}
