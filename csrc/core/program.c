/* program.c - the sampling program: a sampler written down as numbers.
 *
 * Callers make one from arrays (traced from a host's scheduler) or by a builder; guess.c and
 * leader.c read its rows, accept.c and pace.c its levels.  The builders are the usual solvers in
 * closed form, so that the core is useful without Python and traces have something to be checked
 * against.
 */
#include <math.h>
#include <string.h>

#include "core/internal.h"

/* ---- life ------------------------------------------------------------------------------------ */

static ps_program *program_new(int steps, int history)
{
  size_t rows = (size_t)steps, cells = rows * (size_t)history;
  ps__arena arena = {0};
  ps__carve(&arena, 1, sizeof(ps_program));
  size_t head = arena.used;
  ps_program *program = ps__alloc(head + (2 * cells + 4 * rows) * sizeof(double));
  if (program == NULL) {
    return NULL;
  }
  program->references = 1;
  program->steps = steps;
  program->history = history;
  program->a = (double *)((unsigned char *)program + head);
  program->b = program->a + cells;
  program->c = program->b + cells;
  program->s = program->c + rows;
  program->g = program->s + rows;
  program->alpha = program->g + rows;
  for (size_t j = 0; j < rows; ++j) {
    program->s[j] = program->alpha[j] = 1.0;
  }
  return program;
}

ps_program *ps_program_retain(ps_program *program)
{
  __atomic_add_fetch(&program->references, 1, __ATOMIC_RELAXED);
  return program;
}

void ps_program_release(ps_program *program)
{
  if (program != NULL && __atomic_sub_fetch(&program->references, 1, __ATOMIC_ACQ_REL) == 0) {
    ps__free(program);
  }
}

/* ---- checks ---------------------------------------------------------------------------------- */

static ps_status check_row(const ps_program *program, int j)
{
  for (int k = 0; k < program->history; ++k) {
    double a = program->a[j * program->history + k], b = program->b[j * program->history + k];
    if (!isfinite(a) || !isfinite(b)) {
      return ps__fail(PS_INVALID, "program: a[%d, %d] = %g, b[%d, %d] = %g: must be finite", j, k,
                      a, j, k, b);
    }
    if (k > j && (a != 0.0 || b != 0.0)) {
      return ps__fail(PS_INVALID,
                      "program: row %d reaches back %d steps, before step 0: column %d must be 0",
                      j, k, k);
    }
  }
  return PS_OK;
}

static ps_status check_scales(const ps_program *program, int j)
{
  if (!isfinite(program->c[j]) || !isfinite(program->g[j])) {
    return ps__fail(PS_INVALID, "program: c[%d] = %g, g[%d] = %g: must be finite", j, program->c[j],
                    j, program->g[j]);
  }
  if (!(program->s[j] > 0.0) || !isfinite(program->s[j])) {
    return ps__fail(PS_INVALID, "program: s[%d] = %g: a noise scale must be finite and above 0", j,
                    program->s[j]);
  }
  return PS_OK;
}

/* The last act of every maker: a program is either whole and checked or not there at all. */
static ps_status program_seal(ps_program *program, ps_program **out)
{
  ps_status status = PS_OK;
  for (int j = 0; j < program->steps && status == PS_OK; ++j) {
    status = check_row(program, j);
    if (status == PS_OK) {
      status = check_scales(program, j);
    }
    program->draws = program->draws || program->c[j] != 0.0;
  }
  if (status != PS_OK) {
    ps_program_release(program);
    program = NULL;
  }
  *out = program;
  return status;
}

static ps_status check_size(int steps, int history)
{
  enum { STEPS_MAX = 1 << 20, CELLS_MAX = 1 << 26 };
  if (steps < 1 || steps > STEPS_MAX) {
    return ps__fail(PS_INVALID, "program: %d steps: must be 1 to %d", steps, STEPS_MAX);
  }
  if (history < 1 || history > CELLS_MAX / steps) {
    return ps__fail(PS_INVALID, "program: a history of %d columns for %d steps: must be 1 to %d",
                    history, steps, CELLS_MAX / steps);
  }
  return PS_OK;
}

/* Whether every row that is not one of the first keeps the latent as it is and moves it along m. */
static bool only_moves(const ps_program *program)
{
  for (int j = program->history; j < program->steps; ++j) {
    double kept = 0.0;
    for (int k = 0; k < program->history; ++k) {
      kept += program->a[j * program->history + k];
    }
    if (fabs(kept - 1.0) > 1e-4) {
      return false;
    }
  }
  return true;
}

/* Signal scales that nobody gave.  Noise that begins above 1 is added to samples that stay as they
 * are, alpha = 1.  Where it never exceeds 1 the latent is a mixture: of a flow, 1 - s, where rows
 * only move it, and else with its variance preserved. */
static void infer_alpha(ps_program *program)
{
  double most = 0.0;
  for (int j = 0; j < program->steps; ++j) {
    most = fmax(most, program->s[j]);
  }
  bool mixed = most <= 1.0 + 1e-6, flows = only_moves(program);
  for (int j = 0; mixed && j < program->steps; ++j) {
    double s = fmin(program->s[j], 1.0);
    program->alpha[j] = flows ? 1.0 - s : sqrt(1.0 - s * s);
  }
}

ps_status ps_program_create(int steps, int history, const double *a, const double *b,
                            const double *c, const double *s, const double *g, const double *alpha,
                            ps_program **out)
{
  *out = NULL;
  ps_status status = check_size(steps, history);
  if (status != PS_OK) {
    return status;
  }
  ps_program *program = program_new(steps, history);
  if (program == NULL) {
    return PS_NO_MEMORY;
  }
  size_t rows = (size_t)steps * sizeof(double), cells = rows * (size_t)history;
  memcpy(program->a, a, cells);
  memcpy(program->b, b, cells);
  if (c != NULL) {
    memcpy(program->c, c, rows);
  }
  if (s != NULL) {
    memcpy(program->s, s, rows);
  }
  if (g != NULL) {
    memcpy(program->g, g, rows);
  }
  if (alpha != NULL) {
    memcpy(program->alpha, alpha, rows);
  } else if (s != NULL) {
    infer_alpha(program);
  }
  return program_seal(program, out);
}

/* ---- reading --------------------------------------------------------------------------------- */

int ps_program_steps(const ps_program *program)
{
  return program->steps;
}

int ps_program_history(const ps_program *program)
{
  return program->history;
}

const double *ps_program_table(const ps_program *program, char which)
{
  switch (which) {
  case 'a': return program->a;
  case 'b': return program->b;
  case 'c': return program->c;
  case 's': return program->s;
  case 'g': return program->g;
  case 'l': return program->alpha;
  default: return NULL;
  }
}

/* Outputs are interpolated along the trajectory, one evaluation a level: a solver that goes back to
 * a level (Heun), or on from an earlier latent (DPM2's midpoint), leaves it between. */
int ps_program_strides(const ps_program *program)
{
  for (int j = 0; j < program->steps; ++j) {
    bool falls =
        j == 0 || program->s[j] * program->alpha[j - 1] < program->s[j - 1] * program->alpha[j];
    if (program->draws || !falls || program->a[j * program->history] == 0.0) {
      return 0;
    }
  }
  return 1;
}

/* ---- builders -------------------------------------------------------------------------------- */

/* The clean sample is x0 = cx x + cm m. */
typedef struct clean {
  double cx, cm;
} clean;

static clean clean_of(ps_prediction prediction, double alpha, double s)
{
  switch (prediction) {
  case PS_PREDICT_FLOW: return (clean){1.0 / (alpha + s), -s / (alpha + s)};
  case PS_PREDICT_VELOCITY: return (clean){alpha, -s};
  case PS_PREDICT_SAMPLE: return (clean){0.0, 1.0};
  case PS_PREDICT_NOISE: break;
  }
  return (clean){1.0 / alpha, -s / alpha};
}

/* Of the slope that would hold the predicted clean sample.  Half of it has been seen to serve where
 * a guess is far off; as guesses became better, a quarter halved what answers miss. */
static const double HELD = 0.25;

static double slope_of(ps_prediction prediction, double alpha, double s)
{
  switch (prediction) {
  case PS_PREDICT_VELOCITY: return HELD * alpha / (s * sqrt(alpha * alpha + s * s));
  case PS_PREDICT_SAMPLE: return HELD / alpha;
  case PS_PREDICT_NOISE:
  case PS_PREDICT_FLOW: break;
  }
  return HELD / s;
}

static ps_status check_levels(const char *name, int steps, const double *alpha, const double *s)
{
  for (int j = 0; j <= steps; ++j) {
    bool inner = j < steps;
    if (!isfinite(s[j]) || s[j] < 0.0 || (inner && s[j] == 0.0)) {
      return ps__fail(PS_INVALID, "%s: noise scale %d is %g: must be above 0 (0 at the end alone)",
                      name, j, s[j]);
    }
    if (alpha != NULL && (!isfinite(alpha[j]) || alpha[j] < 0.0 || alpha[j] + s[j] == 0.0)) {
      return ps__fail(PS_INVALID, "%s: signal scale %d is %g: must be finite, 0 or above", name, j,
                      alpha[j]);
    }
  }
  return PS_OK;
}

static ps_status start_builder(const char *name, int steps, int history, const double *alpha,
                               const double *s, ps_program **program)
{
  *program = NULL;
  ps_status status = check_size(steps, history);
  if (status == PS_OK) {
    status = check_levels(name, steps, alpha, s);
  }
  if (status == PS_OK) {
    *program = program_new(steps, history);
    status = *program != NULL ? PS_OK : PS_NO_MEMORY;
  }
  return status;
}

ps_status ps_program_ddim(int steps, const double *alpha, const double *s, ps_prediction prediction,
                          ps_program **out)
{
  ps_program *program;
  ps_status status = start_builder("ddim", steps, 1, alpha, s, &program);
  *out = NULL;
  if (status != PS_OK) {
    return status;
  }
  for (int j = 0; j < steps; ++j) {
    clean x0 = clean_of(prediction, alpha[j], s[j]);
    /* x_{j+1} = alpha' x0 + s' eps with eps = (x - alpha x0) / s. */
    double ratio = s[j + 1] / s[j], weight = alpha[j + 1] - alpha[j] * ratio;
    program->a[j] = ratio + weight * x0.cx;
    program->b[j] = weight * x0.cm;
    program->s[j] = s[j];
    program->alpha[j] = alpha[j];
    program->g[j] = slope_of(prediction, alpha[j], s[j]);
  }
  return program_seal(program, out);
}

/* Weights of the two newest clean samples in the second-order step of DPM-Solver++ (arXiv
 * 2211.01095, algorithm 2): D = (1 + r) x0_j - r x0_{j-1}. */
static double second_order(const double *alpha, const double *s, int j, int steps)
{
  if (j == 0 || s[j + 1] == 0.0 || (j == steps - 1 && steps < 15)) {
    return 0.0; /* first step; last step where lambda is infinite, or where few steps need it */
  }
  double h0 = log(alpha[j] / s[j]) - log(alpha[j - 1] / s[j - 1]);
  double h = log(alpha[j + 1] / s[j + 1]) - log(alpha[j] / s[j]);
  return 0.5 * h / h0;
}

ps_status ps_program_dpmpp_2m(int steps, const double *alpha, const double *s,
                              ps_prediction prediction, ps_program **out)
{
  ps_program *program;
  ps_status status = start_builder("dpmpp_2m", steps, 2, alpha, s, &program);
  *out = NULL;
  if (status != PS_OK) {
    return status;
  }
  for (int j = 0; j < steps; ++j) {
    double ratio = s[j + 1] / s[j], weight = alpha[j + 1] - alpha[j] * ratio;
    double r = second_order(alpha, s, j, steps);
    clean x0 = clean_of(prediction, alpha[j], s[j]);
    program->a[2 * j] = ratio + weight * (1.0 + r) * x0.cx;
    program->b[2 * j] = weight * (1.0 + r) * x0.cm;
    if (r != 0.0) {
      clean before = clean_of(prediction, alpha[j - 1], s[j - 1]);
      program->a[2 * j + 1] = -weight * r * before.cx;
      program->b[2 * j + 1] = -weight * r * before.cm;
    }
    program->s[j] = s[j];
    program->alpha[j] = alpha[j];
    program->g[j] = slope_of(prediction, alpha[j], s[j]);
  }
  return program_seal(program, out);
}

/* Integral over [from, to] of the Lagrange polynomial that is 1 at node[which] and 0 at the others:
 * Gauss-Legendre with 2 points is exact up to degree 3, all that orders to 4 need. */
static double lagrange_integral(const double *node, int nodes, int which, double from, double to)
{
  double middle = 0.5 * (from + to), half = 0.5 * (to - from), sum = 0.0;
  for (int side = -1; side <= 1; side += 2) {
    double t = middle + side * half / sqrt(3.0), value = 1.0;
    for (int k = 0; k < nodes; ++k) {
      if (k != which) {
        value *= (t - node[k]) / (node[which] - node[k]);
      }
    }
    sum += half * value;
  }
  return sum;
}

ps_status ps_program_adams_bashforth(int steps, const double *sigma, int order, ps_program **out)
{
  ps_program *program;
  *out = NULL;
  if (order < 1 || order > 4) {
    return ps__fail(PS_INVALID, "adams_bashforth: order %d: must be 1 to 4", order);
  }
  for (int j = 0; j < steps; ++j) {
    if (!(sigma[j + 1] < sigma[j])) {
      return ps__fail(PS_INVALID, "adams_bashforth: sigma[%d] = %g, sigma[%d] = %g: must decrease",
                      j, sigma[j], j + 1, sigma[j + 1]);
    }
  }
  ps_status status = start_builder("adams_bashforth", steps, order, NULL, sigma, &program);
  if (status != PS_OK) {
    return status;
  }
  for (int j = 0; j < steps; ++j) {
    int nodes = j + 1 < order ? j + 1 : order;
    double node[4];
    for (int k = 0; k < nodes; ++k) {
      node[k] = sigma[j - k];
    }
    program->a[j * order] = 1.0;
    for (int k = 0; k < nodes; ++k) {
      program->b[j * order + k] = lagrange_integral(node, nodes, k, sigma[j], sigma[j + 1]);
    }
    program->s[j] = sigma[j];
    program->g[j] = HELD / sigma[j];
  }
  return program_seal(program, out);
}

ps_status ps_program_euler(int steps, const double *sigma, ps_program **out)
{
  ps_program *program;
  ps_status status = start_builder("euler", steps, 1, NULL, sigma, &program);
  *out = NULL;
  if (status != PS_OK) {
    return status;
  }
  for (int j = 0; j < steps; ++j) {
    program->a[j] = 1.0;
    program->b[j] = sigma[j + 1] - sigma[j];
    program->s[j] = sigma[j];
    program->g[j] = HELD / sigma[j];
  }
  return program_seal(program, out);
}

/* x = (1 - sigma) x0 + sigma eps and m = eps - x0: the rows and slopes are those of Euler on eps;
 * only the range of sigma differs. */
ps_status ps_program_flow_euler(int steps, const double *sigma, ps_program **out)
{
  *out = NULL;
  for (int j = 0; steps >= 1 && j <= steps; ++j) {
    if (!(sigma[j] <= 1.0)) {
      return ps__fail(PS_INVALID, "flow_euler: sigma[%d] = %g: must be 0 to 1", j, sigma[j]);
    }
  }
  ps_status status = ps_program_euler(steps, sigma, out);
  for (int j = 0; status == PS_OK && j < steps; ++j) {
    (*out)->alpha[j] = 1.0 - sigma[j];
  }
  return status;
}
