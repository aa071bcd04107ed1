/* pace.c - what an answer may cost, and how far apart the nodes of a round lie.
 *
 * A round answers several steps from evaluations at guesses, so that errors add up: what they come
 * to in the latent that the run ends with is estimated, and held under the tolerance round by
 * round.  Errors from drift point the same way from step to step and are summed; those from
 * interpolation, which the roughness of the outputs makes, do so in part between two nodes, and
 * from one pair of nodes to the next they are summed in squares.  The stride follows the
 * interpolation error alone; drift ends the round, and never changes the stride.  Called by life.c
 * once, by leader.c when a round begins and at every guess that was measured.
 */
#include <math.h>

#include "core/internal.h"

/* Chosen on trained models of three modalities; docs/quality.md has the figures and what they were
 * held against.  Signal and noise are parts of the latent's own scale, signal^2 + noise^2 = 1. */
static const double SCALE = 0.19;   /* error of the last latent a round may add, at tolerance 1 */
static const double CARE = 0.03;    /* an error at a step has grown by */
static const double SETTLED = 2.0;  /* 1 / (CARE + signal (1 + SETTLED signal^2)) */
static const double SLOPE = 5.0;    /* of the clean sample, that counts for a drift: */
static const double SPREAD = 0.015; /* SLOPE / (SPREAD + signal^2) */
static const double KEEP = 5.0;     /* tolerances that what leads a round may come to */
static const double KEPT = 10.0;    /* the same of what was evaluated before the host came closer */
static const double TRIED = 4.0;    /* that a guess would have come to before the first is made */
static const double LED = 0.25;  /* of the drift up to a round's first node, for the next stride */
static const double GAP = 0.6;   /* of a gap, as roughness would make it */
static const double ALIKE = 0.5; /* how far gaps between the same two nodes point the same way */
static const double CLOCK_OFFSET = 0.1;  /* of log s: the clock slows down where noise ends */
static const double FIRST_STRIDE = 0.01; /* of all steps, one at least */
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
  double alpha = program->alpha[step], s = program->s[step], scale = sqrt(alpha * alpha + s * s);
  return (level){alpha / scale, s / scale, scale};
}

double ps__noise_of(const ps_program *program, int step)
{
  return level_of(program, step).noise;
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

/* The level that a step leads to, noise that its row adds set apart; *shared: how many evaluations
 * lead there, for solvers that have several at a level. */
static level next_level(const ps_program *program, int step, int *shared)
{
  level at = level_of(program, step), to = at;
  int first = step, next = step;
  while (first > 0 && level_of(program, first - 1).noise == at.noise) {
    --first;
  }
  while (next < program->steps && !(to.noise < at.noise)) {
    to = level_of(program, ++next);
  }
  *shared = next - first;
  double added = program->c[next - 1] / to.scale;
  to.noise = sqrt(fmax(to.noise * to.noise - added * added, 0.0));
  return to;
}

/* The same of a drift in units of s: what is left of it after the rebase moves the predicted clean
 * sample, and the next latent takes its part of that.  On all models that was .4 / (SPREAD +
 * signal^2) for a step; the rest of SLOPE is for rounds, whose drifts point the same way. */
static double pull_of(const ps_program *program, int step)
{
  int shared;
  level at = level_of(program, step), to = next_level(program, step, &shared);
  double taken = fabs(to.signal - to.noise * at.signal / at.noise) / shared;
  return taken * at.noise * SLOPE / (SPREAD + at.signal * at.signal);
}

/* How much an error grows until the end: most where a sample's content is still to be decided; once
 * it is, an error shrinks. */
static double growth_of(const ps_program *program, int step)
{
  double signal = level_of(program, step).signal;
  return 1.0 / (CARE + signal * (1.0 + SETTLED * signal * signal));
}

/* From the first step on nothing is known of how guesses fare: a device alone, which may lose one
 * evaluation in a run, takes a single step, and leaps as soon as it has tried.  See alone.c. */
static double first_stride(const ps_leader *leader)
{
  double step = leader->pace.clock[1] - leader->pace.clock[0];
  return leader->window_max > 1 ? fmax(step, FIRST_STRIDE * leader->program->steps) : step;
}

void ps__pace_begin(ps_leader *leader)
{
  const ps_program *program = leader->program;
  ps__pace *pace = &leader->pace;
  set_clock(leader);
  for (int j = 0; j < program->steps; ++j) {
    pace->drift_cost[j] = growth_of(program, j) * pull_of(program, j) / SCALE;
    pace->gap_cost[j] = growth_of(program, j) * reach_of(program, j) * GAP / SCALE;
  }
  pace->newest = pace->first = pace->tried = -1;
  pace->stride = pace->strided ? first_stride(leader) : 1.0;
}

/* ---- budget ---------------------------------------------------------------------------------- */

/* The gaps of the round with one more, all between the two nodes around it in `hole`. */
static double gaps_with(const ps__pace *pace, double missed)
{
  double sum = pace->hole + missed, squares = pace->hole_squares + missed * missed;
  return sqrt(pace->closed + ALIKE * sum * sum + (1.0 - ALIKE) * squares);
}

static void close_hole(ps__pace *pace)
{
  double gaps = gaps_with(pace, 0.0);
  pace->closed = gaps * gaps;
  pace->hole = pace->hole_squares = 0.0;
}

/* In a round that the host evaluates what leads is kept from the one before: see alone.c. */
static double allowance(const ps_leader *leader, bool leads)
{
  bool kept = leads && leader->node[0].point == NULL;
  return leader->options.tolerance * (kept ? KEPT : leads ? KEEP : 1.0);
}

bool ps__may_come_to(const ps_leader *leader, int step, double drift, bool leads)
{
  const ps__pace *pace = &leader->pace;
  return pace->drifted + pace->drift_cost[step] * drift < allowance(leader, leads);
}

bool ps__is_far(const ps_leader *leader, int step, double drift)
{
  return leader->pace.drift_cost[step] * drift >= KEEP * leader->options.tolerance;
}

bool ps__afford(ps_leader *leader, double drift, const double *gap, bool leads)
{
  ps__pace *pace = &leader->pace;
  int step = leader->step;
  double drifted = pace->drifted + pace->drift_cost[step] * drift, missed = 0.0;
  if (leader->options.policy == PS_PAPER) {
    return true;
  }
  if (gap == NULL) {
    close_hole(pace);
  } else {
    missed = pace->gap_cost[step] * *gap;
  }
  pace->missed = gaps_with(pace, missed);
  if (!(sqrt(drifted * drifted + pace->missed * pace->missed) < allowance(leader, leads))) {
    return false;
  }
  pace->drifted = drifted;
  pace->led = leads ? drifted : pace->led;
  pace->gaps = pace->missed;
  pace->hole += missed;
  pace->hole_squares += missed * missed;
  return true;
}

/* ---- stride ---------------------------------------------------------------------------------- */

/* The gaps that the round which has ended had, or would have had: where no step lay between its
 * nodes, the newest anchor but one is interpolated from those around it, and *stride becomes how
 * far apart these lie; before there are enough anchors *gaps is NaN. */
static ps_status estimate_gaps(ps_leader *leader, double *gaps, double *stride)
{
  ps__pace *pace = &leader->pace;
  ps_status status = PS_OK;
  *gaps = pace->newest >= pace->first ? pace->gaps : pace->missed;
  if (pace->between == 0 && leader->anchors >= PS__DEGREE + 2) {
    double gap;
    int step, oldest;
    status = ps__leave_one_out(leader, &step, &oldest, &gap);
    /* Leaving a node out makes a hole of two strides. */
    *gaps = sqrt(leader->nodes) * pace->gap_cost[step] * gap / 4.0;
    *stride = (pace->clock[pace->newest] - pace->clock[oldest]) / (PS__DEGREE + 1);
  } else if (pace->between == 0 && *gaps == 0.0) {
    *gaps = NAN;
  }
  return status;
}

static bool has_tried(const ps_leader *leader)
{
  return leader->pace.tried == leader->step;
}

/* After the first guess that was tried, a step ahead, has done: drifts grow with the square of the
 * distance.  Later ones tell too little: a longer stride's slope reaches back to outputs before
 * theirs, of which some did not do. */
enum { FIRST_TRIED = 2 };

static double first_leap(const ps_leader *leader)
{
  const ps__pace *pace = &leader->pace;
  double step = pace->clock[leader->step] - pace->clock[leader->step - 1];
  double far = step * sqrt(leader->options.tolerance / fmax(pace->tried_cost, 1e-9));
  return fmin(far, FIRST_STRIDE * leader->program->steps);
}

/* The gaps of rough outputs grow with the square root of the stride, those of smooth ones with a
 * high power of it.  The square lies between the two. */
static ps_status choose_stride(ps_leader *leader)
{
  ps__pace *pace = &leader->pace;
  const ps__node *last = &leader->node[leader->nodes - 1];
  double gaps, stride = pace->stride, least = 1.0;
  ps_status status = estimate_gaps(leader, &gaps, &stride);
  if (!isnan(gaps)) {
    double led = LED * pace->led, spent = sqrt(gaps * gaps + led * led);
    double factor = SAFETY * sqrt(leader->options.tolerance / fmax(spent, 1e-9));
    stride *= fmin(GROW, fmax(SHRINK, factor));
  }
  if (leader->step <= last->step) {
    double taken = pace->clock[leader->step] - pace->clock[pace->first];
    stride = fmin(stride, REACH * taken / leader->nodes);
  }
  if (has_tried(leader) && leader->step == FIRST_TRIED) {
    stride = fmax(stride, first_leap(leader));
  }
  if (pace->newest >= 0) {
    least = pace->clock[pace->newest + 1] - pace->clock[pace->newest];
  }
  pace->stride = fmax(least, stride);
  return status;
}

/* Where what had to be answered was not, or a round answered nothing, the host evaluates; and where
 * rounds have come to be one more than steps, until they are not: so that a run never takes more
 * than that, and is the host's own in the end where nothing can be saved. */
static bool must_evaluate(const ps_leader *leader)
{
  const ps__pace *pace = &leader->pace;
  return pace->insist || pace->first == leader->step || leader->round > leader->step ||
         (has_tried(leader) && !(pace->tried_cost < TRIED * leader->options.tolerance));
}

ps_status ps__pace_round(ps_leader *leader, bool *exact)
{
  ps__pace *pace = &leader->pace;
  ps_status status = PS_OK;
  if (pace->strided && leader->round > 1 && leader->step < leader->program->steps) {
    status = choose_stride(leader);
  }
  *exact = pace->strided && must_evaluate(leader);
  pace->first = leader->step;
  pace->insist = false;
  pace->drifted = pace->led = pace->gaps = pace->missed = 0.0;
  pace->closed = pace->hole = pace->hole_squares = 0.0;
  pace->between = 0;
  return status;
}
