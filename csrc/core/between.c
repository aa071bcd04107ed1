/* between.c - answers between nodes: a denoiser's output, interpolated along the trajectory.
 *
 * Called by leader.c where the host asks for a step that no rank evaluated, and by pace.c, which
 * tries the interpolation where the output is known.  The nodes around the step were evaluated on
 * the round's guessed path, so m is interpolated there, at the guess of this step, and then
 * measured and rebased to the true latent like any other output.
 */
#include <math.h>
#include <stdlib.h>

#include "core/internal.h"

enum { POINTS = PS__DEGREE + 1 };

typedef struct known {
  int step;
  const void *m;
} known;

static bool is_ready(const ps__node *node)
{
  return node->state == PS__READY;
}

bool ps__is_between(const ps_leader *leader, int step)
{
  const ps__node *last = leader->nodes > 0 ? &leader->node[leader->nodes - 1] : NULL;
  while (last != NULL && last > leader->node && !is_ready(last)) {
    --last;
  }
  return leader->pace.strided && last != NULL && is_ready(last) && step < last->step;
}

/* The POINTS known outputs around step, half on each side where they exist; returns how many. Those
 * before the round are the newest anchors. */
static int take_support(const ps_leader *leader, int step, known *support)
{
  known below[POINTS], above[POINTS];
  int under = 0, over = 0;
  for (int k = leader->nodes - 1; k >= 0; --k) {
    const ps__node *node = &leader->node[k];
    if (is_ready(node) && node->step < step && under < POINTS) {
      below[under++] = (known){node->step, node->output};
    }
  }
  for (int k = leader->old_anchors - 1; k >= 0 && under < POINTS; --k) {
    const ps__anchor *anchor = &leader->anchor[k % leader->anchors_max];
    if (leader->old_anchors - k > POINTS) {
      break;
    }
    below[under++] = (known){anchor->step, anchor->m};
  }
  for (int k = 0; k < leader->nodes && over < POINTS; ++k) {
    const ps__node *node = &leader->node[k];
    if (is_ready(node) && node->step > step) {
      above[over++] = (known){node->step, node->output};
    }
  }
  int half = (POINTS + 1) / 2, lower = under < half ? under : half;
  if (POINTS - over > lower) {
    lower = under < POINTS - over ? under : POINTS - over;
  }
  int upper = over < POINTS - lower ? over : POINTS - lower, count = 0;
  for (int k = lower - 1; k >= 0; --k) {
    support[count++] = below[k];
  }
  for (int k = 0; k < upper; ++k) {
    support[count++] = above[k];
  }
  return count;
}

/* Weights of the polynomial through all of the support but `without`, at step. */
static void weigh(const known *support, int count, int without, int step, double *weight)
{
  for (int k = 0; k < count; ++k) {
    weight[k] = k == without ? 0.0 : 1.0;
    for (int l = 0; k != without && l < count; ++l) {
      if (l != k && l != without) {
        weight[k] *= (step - support[l].step) / (double)(support[k].step - support[l].step);
      }
    }
  }
}

static int farthest(const known *support, int count, int step)
{
  int worst = 0;
  for (int k = 1; k < count; ++k) {
    if (abs(support[k].step - step) >= abs(support[worst].step - step)) {
      worst = k;
    }
  }
  return worst;
}

/* Mean square of the difference of the two interpolations, above rounding. */
static ps_status measure_difference(const ps_leader *leader, double *squared)
{
  ps_sweep sweep = {
      .items = leader->layout.items,
      .size = leader->layout.size,
      .x_dtype = leader->layout.m,
      .m_dtype = leader->layout.m,
      .x = leader->between_m[0],
      .guess = leader->between_m[1],
      .floor = ps__rounding(leader->layout.m),
  };
  ps_swept swept;
  ps_status status = ps__sweep(leader, &sweep, &swept);
  if (status == PS_OK) {
    *squared = swept.excess;
  }
  return status;
}

/* Outputs are rough: from step to step they scatter about a smooth curve.  The difference of two
 * interpolations shows as much of that as its weights let through; the output interpolated misses
 * its own share and all of what the step itself would have had. */
static double gap_of(const double *weight, const double *less, int count, double squared)
{
  double shown = 0.0, missed = 1.0;
  for (int k = 0; k < count; ++k) {
    shown += (weight[k] - less[k]) * (weight[k] - less[k]);
    missed += weight[k] * weight[k];
  }
  return sqrt(squared / shown * missed);
}

/* m at step by the polynomial through the support, and by the one of a degree less. */
static ps_status combine(ps_leader *leader, const known *support, int count, int step, double *gap)
{
  ps_term term[POINTS] = {{NULL, PS_NONE}};
  double weight[2 * POINTS] = {0}, *less = weight + count, squared = 0.0;
  weigh(support, count, -1, step, weight);
  weigh(support, count, farthest(support, count, step), step, less);
  for (int k = 0; k < count; ++k) {
    term[k] = (ps_term){support[k].m, leader->layout.m};
  }
  ps_status status =
      leader->backend->lincomb(leader->backend, leader->layout.items * leader->layout.size, 2,
                               count, weight, term, leader->between_m, leader->layout.m);
  if (status == PS_OK) {
    status = measure_difference(leader, &squared);
  }
  *gap = gap_of(weight, less, count, squared);
  return status;
}

ps_status ps__interpolate(ps_leader *leader, int step, double *gap)
{
  known support[POINTS];
  int count = take_support(leader, step, support);
  ps_status status = ps__guess_between(leader, step, leader->between_x);
  return status == PS_OK ? combine(leader, support, count, step, gap) : status;
}

ps_status ps__leave_one_out(ps_leader *leader, int *step, int *oldest, double *gap)
{
  known support[POINTS];
  int count = 0;
  for (int back = POINTS + 1; back >= 1; --back) {
    const ps__anchor *anchor = &leader->anchor[(leader->anchors - back) % leader->anchors_max];
    if (back == 2) {
      *step = anchor->step;
    } else {
      support[count++] = (known){anchor->step, anchor->m};
    }
  }
  *oldest = support[0].step;
  return combine(leader, support, count, *step, gap);
}

ps_status ps__foresee(ps_leader *leader, const void *x, int step, void *point)
{
  ps__foresee_from(leader, x);
  for (int j = leader->step; j < step; ++j) {
    known support[POINTS];
    const void *outputs[POINTS];
    double weight[POINTS];
    int count = take_support(leader, j, support);
    weigh(support, count, -1, j, weight);
    for (int k = 0; k < count; ++k) {
      outputs[k] = support[k].m;
    }
    ps__foresee_answer(leader, j, outputs, weight, count);
  }
  return ps__foresee_point(leader, step, point);
}
