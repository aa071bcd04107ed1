/* test_program.c - sampling programs: what the makers refuse, and the builders against formulas of
 * their own.
 *
 * The row of a one-step solver is tried on a point whose clean sample and noise are known: whatever
 * the denoiser predicts, the next point must be made of the same two.
 */
#include <math.h>
#include <string.h>

#include "runner.h"
#include "stage.h"

enum { STEPS = 20 };

/* ---- making one from arrays ------------------------------------------------------------------ */

static void check_table(const ps_program *program, char which, const double *expected, int n)
{
  for (int k = 0; k < n; ++k) {
    CHECK_EQ(ps_program_table(program, which)[k], expected[k]);
  }
}

TEST(tables_are_copied)
{
  double a[4] = {1, 0, 2, 3}, b[4] = {4, 0, 5, 6}, c[2] = {7, 8}, s[2] = {9, 10}, g[2] = {11, -12};
  const double kept[4] = {1, 0, 2, 3};
  ps_program *program;
  CHECK_OK(ps_program_create(2, 2, a, b, c, s, g, NULL, &program));
  memset(a, 0, sizeof a);
  CHECK_EQ(ps_program_steps(program), 2);
  CHECK_EQ(ps_program_history(program), 2);
  check_table(program, 'a', kept, 4);
  check_table(program, 'b', b, 4);
  check_table(program, 'c', c, 2);
  check_table(program, 's', s, 2);
  check_table(program, 'g', g, 2);
  CHECK(ps_program_table(program, 'd') == NULL);
  ps_program_release(program);
}

TEST(tables_left_out_have_defaults)
{
  const double a[3] = {1, 1, 1}, b[3] = {-1, -1, -1};
  ps_program *program;
  CHECK_OK(ps_program_create(3, 1, a, b, NULL, NULL, NULL, NULL, &program));
  for (int j = 0; j < 3; ++j) {
    CHECK_EQ(ps_program_table(program, 'c')[j], 0);
    CHECK_EQ(ps_program_table(program, 's')[j], 1);
    CHECK_EQ(ps_program_table(program, 'g')[j], 0);
  }
  ps_program_release(program);
}

TEST(the_last_reference_frees)
{
  int64_t before = runner_live();
  ps_program *program = stage_euler(3);
  CHECK(ps_program_retain(program) == program);
  ps_program_release(program);
  CHECK_EQ(ps_program_steps(program), 3);
  ps_program_release(program);
  ps_program_release(NULL);
  CHECK_EQ(runner_live(), before);
}

/* ---- refusals -------------------------------------------------------------------------------- */

/* A program of 3 steps and 2 columns with one number of it replaced must be refused, by name. */
static void refuse(char table, int at, double value, const char *named)
{
  double a[6] = {1, 0, 1, 1, 1, 1}, b[6] = {1, 0, 1, 1, 1, 1}, c[3] = {0}, s[3] = {1, 1, 1},
         g[3] = {0};
  double *tables[] = {['a'] = a, ['b'] = b, ['c'] = c, ['s'] = s, ['g'] = g};
  ps_program *program = (ps_program *)&program;
  tables[(unsigned char)table][at] = value;
  CHECK_STATUS(ps_program_create(3, 2, a, b, c, s, g, NULL, &program), PS_INVALID);
  CHECK(program == NULL);
  if (strstr(ps_last_error(), named) == NULL) {
    runner_fail(__FILE__, __LINE__, "\"%s\" does not name %s", ps_last_error(), named);
  }
}

TEST(numbers_that_are_not_finite_are_refused)
{
  refuse('a', 4, NAN, "a[2, 0]");
  refuse('a', 5, INFINITY, "a[2, 1]");
  refuse('b', 2, -INFINITY, "b[1, 0]");
  refuse('c', 1, NAN, "c[1]");
  refuse('g', 0, INFINITY, "g[0]");
  refuse('s', 2, NAN, "s[2]");
  refuse('s', 2, INFINITY, "s[2]");
}

TEST(noise_scales_must_be_above_0)
{
  refuse('s', 0, 0.0, "s[0]");
  refuse('s', 2, -1.0, "s[2]");
}

TEST(rows_must_not_reach_before_step_0)
{
  refuse('a', 1, 0.5, "row 0");
  refuse('b', 1, -1e-300, "row 0");
}

TEST(sizes_are_checked)
{
  const double one[2] = {1, 1};
  ps_program *program;
  CHECK_STATUS(ps_program_create(0, 1, one, one, NULL, NULL, NULL, NULL, &program), PS_INVALID);
  CHECK_STATUS(ps_program_create(-3, 1, one, one, NULL, NULL, NULL, NULL, &program), PS_INVALID);
  CHECK_STATUS(ps_program_create(1, 0, one, one, NULL, NULL, NULL, NULL, &program), PS_INVALID);
  CHECK_STATUS(ps_program_create(1 << 30, 1, one, one, NULL, NULL, NULL, NULL, &program),
               PS_INVALID);
  CHECK_STATUS(ps_program_create(1, 1 << 30, one, one, NULL, NULL, NULL, NULL, &program),
               PS_INVALID);
  CHECK(program == NULL);
  CHECK_STATUS(ps_program_euler(0, one, &program), PS_INVALID);
  CHECK_STATUS(ps_program_flow_euler(0, one, &program), PS_INVALID);
  CHECK_STATUS(ps_program_adams_bashforth(0, one, 2, &program), PS_INVALID);
  CHECK_STATUS(ps_program_ddim(-1, one, one, PS_PREDICT_NOISE, &program), PS_INVALID);
  CHECK_STATUS(ps_program_dpmpp_2m(0, one, one, PS_PREDICT_NOISE, &program), PS_INVALID);
  CHECK(program == NULL);
}

TEST(builders_check_their_levels)
{
  const double zero_inside[3] = {1, 0, 0}, negative_end[3] = {1, .5, -.1},
               nan_end[3] = {1, .5, NAN};
  const double infinite[3] = {INFINITY, 1, 0}, rising[3] = {1, 2, 0}, above_1[3] = {1.5, .5, 0};
  const double good[3] = {1, .5, 0}, none[3] = {0, 0, 0}, negative[3] = {1, -1, 1};
  const double *bad[] = {zero_inside, negative_end, nan_end, infinite};
  ps_program *program;
  for (int k = 0; k < 4; ++k) {
    CHECK_STATUS(ps_program_euler(2, bad[k], &program), PS_INVALID);
    CHECK_STATUS(ps_program_flow_euler(2, bad[k], &program), PS_INVALID);
    CHECK_STATUS(ps_program_ddim(2, good, bad[k], PS_PREDICT_NOISE, &program), PS_INVALID);
    CHECK_STATUS(ps_program_dpmpp_2m(2, good, bad[k], PS_PREDICT_FLOW, &program), PS_INVALID);
    CHECK_STATUS(ps_program_adams_bashforth(2, bad[k], 2, &program), PS_INVALID);
    CHECK(program == NULL);
  }
  CHECK_STATUS(ps_program_flow_euler(2, above_1, &program), PS_INVALID);
  CHECK_STATUS(ps_program_adams_bashforth(2, rising, 2, &program), PS_INVALID);
  CHECK_STATUS(ps_program_adams_bashforth(2, good, 0, &program), PS_INVALID);
  CHECK_STATUS(ps_program_adams_bashforth(2, good, 5, &program), PS_INVALID);
  CHECK_STATUS(ps_program_ddim(2, negative, good, PS_PREDICT_NOISE, &program), PS_INVALID);
  CHECK_STATUS(ps_program_ddim(2, nan_end, good, PS_PREDICT_NOISE, &program), PS_INVALID);
  /* Without any signal a noise prediction says nothing of the clean sample; the others do. */
  CHECK_STATUS(ps_program_ddim(2, none, good, PS_PREDICT_NOISE, &program), PS_INVALID);
  CHECK(program == NULL);
}

/* ---- one-step solvers ------------------------------------------------------------------------ */

typedef struct levels {
  double alpha[STEPS + 1], s[STEPS + 1];
} levels;

static levels preserving(void) /* alpha^2 + s^2 = 1 */
{
  levels of;
  for (int j = 0; j <= STEPS; ++j) {
    of.s[j] = cos(1.5 * j / STEPS) * 0.99;
    of.alpha[j] = sqrt(1.0 - of.s[j] * of.s[j]);
  }
  return of;
}

static levels rectified(void) /* alpha + s = 1 */
{
  levels of;
  for (int j = 0; j <= STEPS; ++j) {
    of.s[j] = pow(1.0 - (double)j / STEPS, 1.3);
    of.alpha[j] = 1.0 - of.s[j];
  }
  return of;
}

static levels exploding(void) /* alpha = 1 */
{
  levels of;
  stage_levels(STEPS, of.s);
  for (int j = 0; j <= STEPS; ++j) {
    of.alpha[j] = 1.0;
  }
  return of;
}

static double predict(ps_prediction prediction, double alpha, double s, double clean, double noise)
{
  switch (prediction) {
  case PS_PREDICT_NOISE: return noise;
  case PS_PREDICT_FLOW: return noise - clean;
  case PS_PREDICT_VELOCITY: return alpha * noise - s * clean;
  case PS_PREDICT_SAMPLE: return clean;
  }
  return NAN;
}

/* Tries every row of a one-step program, and releases it. */
static void check_one_step(ps_program *program, const levels *of, ps_prediction prediction)
{
  const double *a = ps_program_table(program, 'a'), *b = ps_program_table(program, 'b');
  uint64_t seed = 7;
  CHECK_EQ(ps_program_steps(program), STEPS);
  CHECK_EQ(ps_program_history(program), 1);
  for (int j = 0; j < STEPS; ++j) {
    for (int trial = 0; trial < 4; ++trial) {
      double clean = stage_random(&seed), noise = stage_random(&seed);
      double x = of->alpha[j] * clean + of->s[j] * noise;
      double m = predict(prediction, of->alpha[j], of->s[j], clean, noise);
      CHECK_NEAR(a[j] * x + b[j] * m, of->alpha[j + 1] * clean + of->s[j + 1] * noise, 1e-11);
    }
    CHECK_EQ(ps_program_table(program, 'c')[j], 0);
    CHECK_EQ(ps_program_table(program, 's')[j], of->s[j]);
  }
  ps_program_release(program);
}

TEST(ddim_keeps_clean_sample_and_noise)
{
  const levels of[] = {preserving(), rectified(), exploding()};
  for (int k = 0; k < 3; ++k) {
    for (int prediction = PS_PREDICT_NOISE; prediction <= PS_PREDICT_SAMPLE; ++prediction) {
      ps_program *program;
      bool outside = (prediction == PS_PREDICT_VELOCITY && k != 0) || /* needs alpha^2 + s^2 = 1 */
                     (prediction != PS_PREDICT_FLOW && k == 1);       /* begins without signal */
      if (!outside) {
        CHECK_OK(ps_program_ddim(STEPS, of[k].alpha, of[k].s, (ps_prediction)prediction, &program));
        check_one_step(program, &of[k], (ps_prediction)prediction);
      }
    }
  }
}

TEST(euler_keeps_clean_sample_and_noise)
{
  levels of = exploding(), flow = rectified();
  ps_program *program;
  CHECK_OK(ps_program_euler(STEPS, of.s, &program));
  check_one_step(program, &of, PS_PREDICT_NOISE);
  CHECK_OK(ps_program_flow_euler(STEPS, flow.s, &program));
  check_one_step(program, &flow, PS_PREDICT_FLOW);
}

/* A quarter of dm/dx at a clean sample held fixed, by a difference quotient; a predicted clean
 * sample has none, there it is 0.25/alpha. */
TEST(slopes_are_a_quarter_of_what_holds_the_clean_sample)
{
  levels of = preserving();
  for (int prediction = PS_PREDICT_NOISE; prediction <= PS_PREDICT_VELOCITY; ++prediction) {
    ps_program *program;
    CHECK_OK(ps_program_ddim(STEPS, of.alpha, of.s, (ps_prediction)prediction, &program));
    for (int j = 0; j < STEPS; ++j) {
      double clean = 0.3, step = 1e-3 / of.s[j]; /* x moves by 1e-3 */
      double rise = predict((ps_prediction)prediction, of.alpha[j], of.s[j], clean, 0.4 + step) -
                    predict((ps_prediction)prediction, of.alpha[j], of.s[j], clean, 0.4);
      CHECK_NEAR(ps_program_table(program, 'g')[j], 0.25 * rise / 1e-3, 1e-9);
    }
    ps_program_release(program);
  }
  ps_program *program;
  CHECK_OK(ps_program_ddim(STEPS, of.alpha, of.s, PS_PREDICT_SAMPLE, &program));
  CHECK_NEAR(ps_program_table(program, 'g')[5], 0.25 / of.alpha[5], 1e-12);
  ps_program_release(program);
}

/* ---- multistep solvers ----------------------------------------------------------------------- */

/* Algorithm 2 of arXiv 2211.01095, as it is written there. */
static double dpmpp_2m(const levels *of, int steps, int j, const double *x, const double *clean)
{
  const double *alpha = of->alpha, *s = of->s;
  bool first = j == 0 || s[j + 1] == 0.0 || (j == steps - 1 && steps < 15);
  double decay = s[j + 1] == 0.0 ? -1.0 : 0.0, d = clean[j];
  if (s[j + 1] != 0.0) {
    double h = log(alpha[j + 1] / s[j + 1]) - log(alpha[j] / s[j]);
    decay = expm1(-h);
    if (!first) {
      double r = (log(alpha[j] / s[j]) - log(alpha[j - 1] / s[j - 1])) / h;
      d = (1.0 + 1.0 / (2.0 * r)) * clean[j] - 1.0 / (2.0 * r) * clean[j - 1];
    }
  }
  return s[j + 1] / s[j] * x[j] - alpha[j + 1] * decay * d;
}

static void check_dpmpp_2m(const levels *of, int steps, ps_prediction prediction)
{
  double x[STEPS], m[STEPS], clean[STEPS];
  uint64_t seed = 5;
  ps_program *program;
  CHECK_OK(ps_program_dpmpp_2m(steps, of->alpha, of->s, prediction, &program));
  CHECK_EQ(ps_program_history(program), 2);
  for (int j = 0; j < steps; ++j) {
    double noise = stage_random(&seed);
    clean[j] = stage_random(&seed);
    x[j] = of->alpha[j] * clean[j] + of->s[j] * noise;
    m[j] = predict(prediction, of->alpha[j], of->s[j], clean[j], noise);
  }
  for (int j = 0; j < steps; ++j) {
    const double *a = ps_program_table(program, 'a') + (size_t)2 * (size_t)j;
    const double *b = ps_program_table(program, 'b') + (size_t)2 * (size_t)j;
    double next = a[0] * x[j] + b[0] * m[j];
    next += j > 0 ? a[1] * x[j - 1] + b[1] * m[j - 1] : 0.0;
    CHECK_NEAR(next, dpmpp_2m(of, steps, j, x, clean), 1e-10);
    CHECK_EQ(ps_program_table(program, 's')[j], of->s[j]);
  }
  ps_program_release(program);
}

TEST(dpmpp_2m_is_algorithm_2)
{
  levels vp = preserving(), ve = exploding(), flow = rectified();
  check_dpmpp_2m(&vp, STEPS, PS_PREDICT_NOISE);
  check_dpmpp_2m(&vp, STEPS, PS_PREDICT_VELOCITY);
  check_dpmpp_2m(&vp, STEPS, PS_PREDICT_SAMPLE);
  check_dpmpp_2m(&vp, 10, PS_PREDICT_NOISE); /* few steps: the last one is of first order */
  check_dpmpp_2m(&ve, STEPS, PS_PREDICT_NOISE);
  /* All signal is noise at the first step of a flow: log(alpha/s) begins at minus infinity. */
  flow.alpha[0] = 0.01;
  flow.s[0] = 0.99;
  check_dpmpp_2m(&flow, STEPS, PS_PREDICT_FLOW);
}

TEST(dpmpp_2m_begins_without_signal)
{
  levels flow = rectified();
  ps_program *program;
  CHECK_OK(ps_program_dpmpp_2m(STEPS, flow.alpha, flow.s, PS_PREDICT_FLOW, &program));
  for (int k = 0; k < 2 * STEPS; ++k) {
    CHECK(isfinite(ps_program_table(program, 'a')[k]) &&
          isfinite(ps_program_table(program, 'b')[k]));
  }
  ps_program_release(program);
}

/* The weights over `nodes` points are those that integrate all powers below `nodes` exactly. */
TEST(adams_bashforth_integrates_polynomials)
{
  double sigma[STEPS + 1];
  stage_levels(STEPS, sigma);
  for (int order = 1; order <= 4; ++order) {
    ps_program *program;
    CHECK_OK(ps_program_adams_bashforth(STEPS, sigma, order, &program));
    CHECK_EQ(ps_program_history(program), order);
    for (int j = 0; j < STEPS; ++j) {
      const double *b = ps_program_table(program, 'b') + (size_t)j * (size_t)order;
      int nodes = j + 1 < order ? j + 1 : order;
      for (int power = 0; power < nodes; ++power) {
        double sum = 0.0, scale = pow(sigma[j - nodes + 1], power + 1);
        for (int k = 0; k < nodes; ++k) {
          sum += b[k] * pow(sigma[j - k], power);
        }
        double exact = (pow(sigma[j + 1], power + 1) - pow(sigma[j], power + 1)) / (power + 1);
        CHECK_NEAR(sum, exact, 1e-12 * scale);
      }
      for (int k = nodes; k < order; ++k) {
        CHECK_EQ(b[k], 0);
      }
      CHECK_EQ(ps_program_table(program, 'a')[j * order], 1);
    }
    ps_program_release(program);
  }
}

TEST(adams_bashforth_has_the_textbook_weights_on_an_even_grid)
{
  const double textbook[5][4] = {{0},
                                 {1},
                                 {3. / 2, -1. / 2},
                                 {23. / 12, -16. / 12, 5. / 12},
                                 {55. / 24, -59. / 24, 37. / 24, -9. / 24}};
  double sigma[11];
  for (int j = 0; j <= 10; ++j) {
    sigma[j] = (10 - j) * 0.5;
  }
  for (int order = 1; order <= 4; ++order) {
    ps_program *program;
    CHECK_OK(ps_program_adams_bashforth(10, sigma, order, &program));
    for (int k = 0; k < order; ++k) {
      CHECK_NEAR(ps_program_table(program, 'b')[8 * order + k], -0.5 * textbook[order][k], 1e-13);
    }
    ps_program_release(program);
  }
}
