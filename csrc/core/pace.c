/* pace.c - how far apart the nodes of a round lie, and what an answer may cost.
 *
 * A strided round answers several steps from each evaluation, so that errors add up: the estimated
 * error of the latent is summed over the round and held under the tolerance.  The stride follows
 * the interpolation error alone; drift ends the round, and never changes the stride.  Called by
 * leader.c when a round begins and at every guess that was measured.
 */
#include <math.h>

#include "core/internal.h"

static const double CLOCK_OFFSET = 0.1; /* of log s: the clock slows down where noise ends */
static const double FIRST_STRIDE = 0.02;
static const double KAPPA = 4.0, SPREAD = 10.0, LATE = 0.1;
static const double SAFETY = 0.6, GROW = 2.0, SHRINK = 0.5;

/* ---- clock ----------------------------------------------------------------------------------- */

/* Half step index, half -log of the noise scale, both from 0 to N; the index alone at stride 1. */
static void set_clock(ps_leader *leader)
{
  const ps_program *program = leader->program;
  int steps = program->steps;
  double *clock = leader->pace.clock;
  for (int j = 0; leader->pace.strided && j < steps; ++j) {
    clock[j] = -log(program->s[j] + CLOCK_OFFSET);
  }
  clock[steps] = steps > 1 ? 2.0 * clock[steps - 1] - clock[steps - 2] : 1.0;
  double begin = clock[0], range = clock[steps] - begin;
  for (int j = 0; j <= steps; ++j) {
    bool half = leader->pace.strided && range > 0.0;
    clock[j] = half ? 0.5 * (j + steps * (clock[j] - begin) / range) : j;
  }
}

void ps__pace_begin(ps_leader *leader)
{
  ps__pace *pace = &leader->pace;
  set_clock(leader);
  pace->newest = -1;
  pace->stride = 1.0;
  if (pace->strided && FIRST_STRIDE * leader->program->steps > 1.0) {
    pace->stride = FIRST_STRIDE * leader->program->steps;
  }
}

/* ---- budget ---------------------------------------------------------------------------------- */

/* What an error of the output at this step does to the next latent. */
static double reach_of(const ps_program *program, int step)
{
  double sum = 0.0;
  for (int k = 0; k < program->history; ++k) {
    sum += program->b[step * program->history + k];
  }
  return fabs(sum);
}

/* What of dm/dx is left after the rebase, about, by the level of noise alone. */
static double slope_left(const ps_program *program, int step)
{
  double s = program->s[step], alpha = program->alpha[step];
  double slope = program->g[step] != 0.0 ? 2.0 * fabs(program->g[step]) : 1.0 / s;
  double data = SPREAD * alpha * alpha / (s * s + SPREAD * alpha * alpha);
  return KAPPA * slope * data * s / (s + LATE * alpha);
}

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
  double reach = reach_of(leader->program, step);
  double drifted =
      pace->drifted + reach * slope_left(leader->program, step) * drift * leader->program->s[step];
  pace->missed = pace->gaps + reach * gap;
  if (!(drifted + pace->missed < leader->options.tolerance)) {
    return false;
  }
  pace->drifted = drifted;
  pace->gaps = pace->missed;
  return true;
}

/* ---- stride ---------------------------------------------------------------------------------- */

/* The interpolation error grows with the third power of the stride, and its sum with the fourth. */
static void choose_stride(ps_leader *leader)
{
  ps__pace *pace = &leader->pace;
  double gaps = pace->newest >= pace->first ? pace->gaps : pace->missed;
  double factor =
      SAFETY * pow(fmax(gaps, 1e-9) / leader->options.tolerance, -1.0 / (PS__DEGREE + 2));
  double least =
      pace->newest >= 0 ? pace->clock[pace->newest + 1] - pace->clock[pace->newest] : 1.0;
  pace->stride = fmax(least, pace->stride * fmin(GROW, fmax(SHRINK, factor)));
}

bool ps__pace_round(ps_leader *leader)
{
  ps__pace *pace = &leader->pace;
  bool stuck = pace->strided && pace->first == leader->step;
  if (pace->strided && leader->round > 1) {
    choose_stride(leader);
  }
  pace->first = leader->step;
  pace->drifted = pace->gaps = pace->missed = 0.0;
  /* A round that answers nothing is one too many: where they add up, the host evaluates. */
  return stuck || leader->round > leader->step + leader->program->steps / 16;
}
