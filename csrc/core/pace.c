/* pace.c - how far apart the nodes of a round lie, and what an answer may cost.
 *
 * A strided round answers several steps from each evaluation, so that errors add up: the estimated
 * error of the latent is summed over the round and held under the tolerance.  The stride follows
 * the interpolation error alone; drift ends the round, and never changes the stride.  Called by
 * life.c once, by leader.c when a round begins and at every guess that was measured.
 */
#include <math.h>

#include "core/internal.h"

/* Chosen on trained models of three modalities by tests/bench/fidelity.py; README has the figures.
 */
static const double SCALE = 0.25;        /* error of x a round may add, at tolerance 1 */
static const double EARLY = 10.0;        /* an error counts 1 + EARLY times as much at pure noise */
static const double SLOPE = 4.0;         /* of the clean sample left after the rebase, at most, */
static const double SPREAD = 100.0;      /* and the signal's variance at which that levels off */
static const double CLOCK_OFFSET = 0.1;  /* of log s: the clock slows down where noise ends */
static const double FIRST_STRIDE = 0.02; /* of all steps */
static const double SAFETY = 0.6, GROW = 2.0, SHRINK = 0.5;
static const double REACH = 2.0; /* windows beyond what the last one came to, where it was cut */

/* ---- levels ---------------------------------------------------------------------------------- */

/* Signal and noise of a step, as parts of the latent's own scale; after the last, signal alone. */
typedef struct level {
  double signal, noise, scale;
} level;

static level level_of(const ps_program *program, int step)
{
  if (step == program->steps) {
    return (level){1.0, 0.0, 1.0};
  }
  double alpha = program->alpha[step], s = program->s[step], scale = hypot(alpha, s);
  return (level){alpha / scale, s / scale, scale};
}

/* ---- clock ----------------------------------------------------------------------------------- */

/* Half step index, half -log of the noise level, both from 0 to N; the index alone at stride 1. */
static void set_clock(ps_leader *leader)
{
  const ps_program *program = leader->program;
  int steps = program->steps;
  double *clock = leader->pace.clock;
  for (int j = 0; j < steps; ++j) {
    clock[j] = -log(level_of(program, j).noise + CLOCK_OFFSET);
  }
  clock[steps] = steps > 1 ? 2.0 * clock[steps - 1] - clock[steps - 2] : clock[0] + 1.0;
  double begin = clock[0], range = clock[steps] - begin;
  for (int j = 0; j <= steps; ++j) {
    bool half = leader->pace.strided && range > 0.0;
    clock[j] = half ? 0.5 * (j + steps * (clock[j] - begin) / range) : j;
  }
}

/* ---- what an error costs --------------------------------------------------------------------- */

/* An error of the output at a step, as an error of the next latent in units of its scale. */
static double reach_of(const ps_program *program, int step)
{
  double sum = 0.0;
  for (int k = 0; k < program->history; ++k) {
    sum += program->b[step * program->history + k];
  }
  return fabs(sum) / level_of(program, step + 1).scale;
}

/* The same of a drift: what is left of it after the rebase moves the predicted clean sample, and
 * the next latent takes its part of that. */
static double pull_of(const ps_program *program, int step)
{
  level at = level_of(program, step), to = level_of(program, step + 1);
  double taken = fabs(to.signal - to.noise * at.signal / at.noise);
  double left = SLOPE * SPREAD * at.signal / (at.noise * at.noise + SPREAD * at.signal * at.signal);
  return taken * left / at.scale;
}

/* Errors made early grow, where a sample's content is still to be decided. */
static double care_of(const ps_program *program, int step)
{
  double noise = level_of(program, step).noise;
  return 1.0 + EARLY * noise * noise * noise * noise;
}

void ps__pace_begin(ps_leader *leader)
{
  const ps_program *program = leader->program;
  ps__pace *pace = &leader->pace;
  set_clock(leader);
  for (int j = 0; j < program->steps; ++j) {
    /* Drift comes in units of s. */
    pace->drift_cost[j] = care_of(program, j) * pull_of(program, j) * program->s[j] / SCALE;
    pace->gap_cost[j] = care_of(program, j) * reach_of(program, j) / SCALE;
  }
  pace->newest = -1;
  pace->stride = 1.0;
  if (pace->strided && FIRST_STRIDE * program->steps > 1.0) {
    pace->stride = FIRST_STRIDE * program->steps;
  }
}

/* ---- budget ---------------------------------------------------------------------------------- */

bool ps__afford(ps_leader *leader, double drift, double gap)
{
  ps__pace *pace = &leader->pace;
  int step = leader->step;
  if (leader->options.policy == PS_PAPER) {
    return true;
  }
  if (!pace->strided) {
    return drift < leader->options.tolerance;
  }
  double drifted = pace->drifted + pace->drift_cost[step] * drift;
  pace->missed = pace->gaps + pace->gap_cost[step] * gap;
  if (!(drifted + pace->missed < leader->options.tolerance)) {
    return false;
  }
  pace->drifted = drifted;
  pace->gaps = pace->missed;
  return true;
}

/* ---- stride ---------------------------------------------------------------------------------- */

/* How large the gaps of the round that has ended were, or would have been: where no step lay
 * between its nodes, the newest anchor but one is interpolated from those around it. */
static ps_status estimate_gaps(ps_leader *leader, double *gaps, double *safety)
{
  ps__pace *pace = &leader->pace;
  double gap;
  ps_status status = PS_OK;
  *safety = SAFETY;
  *gaps = pace->newest >= pace->first ? pace->gaps : pace->missed;
  if (pace->between == 0 && leader->anchors >= PS__DEGREE + 2) {
    int step;
    status = ps__leave_one_out(leader, &step, &gap);
    *gaps = leader->nodes * pace->gap_cost[step] * gap;
    *safety = 2.0 * SAFETY;
  }
  return status;
}

/* A gap grows with the power DEGREE + 1 of the stride, their sum with one more. */
static ps_status choose_stride(ps_leader *leader)
{
  ps__pace *pace = &leader->pace;
  const ps__node *last = &leader->node[leader->nodes - 1];
  double gaps, safety, least = 1.0;
  ps_status status = estimate_gaps(leader, &gaps, &safety);
  double factor =
      safety * pow(fmax(gaps, 1e-9) / leader->options.tolerance, -1.0 / (PS__DEGREE + 2));
  double stride = pace->stride * fmin(GROW, fmax(SHRINK, factor));
  if (leader->step <= last->step) {
    double taken = pace->clock[leader->step] - pace->clock[pace->first];
    stride = fmin(stride, REACH * taken / leader->nodes);
  }
  if (pace->newest >= 0) {
    least = pace->clock[pace->newest + 1] - pace->clock[pace->newest];
  }
  pace->stride = fmax(least, stride);
  return status;
}

ps_status ps__pace_round(ps_leader *leader, bool *exact)
{
  ps__pace *pace = &leader->pace;
  ps_status status = PS_OK;
  if (pace->strided && leader->round > 1 && leader->step < leader->program->steps) {
    status = choose_stride(leader);
  }
  /* A round that answers nothing is one too many: where they add up, the host evaluates. */
  *exact = (pace->strided && pace->first == leader->step) ||
           leader->round > leader->step + 1 + leader->program->steps / 32;
  pace->first = leader->step;
  pace->drifted = pace->gaps = pace->missed = 0.0;
  pace->between = 0;
  return status;
}
