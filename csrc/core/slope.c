/* slope.c - how an output changes with the latent: what two evaluations of one step tell.
 *
 * An output is rebased from the guess where it was evaluated to the latent that it answers, along a
 * slope.  The program's own, g, holds for a model that knows nothing but noise.  Where a round
 * evaluates a step again that the last one evaluated too, at another guess, the two outputs show
 * the slope in the very direction in which guesses err, which is the same from round to round: on
 * trained models it is up to hundreds of times g early on, of either sign.  Called by leader.c:
 * when a round is planned, the outputs that it is about to overwrite are kept, and compared when
 * its own are there.
 */
#include <math.h>

#include "core/internal.h"

/* Changes below that many times the rounding of what changed tell nothing. */
static const double CLEAR = 4.0;

void ps__slope_begin(ps_leader *leader)
{
  for (int j = 0; j < leader->program->steps; ++j) {
    leader->slope[j] = leader->program->g[j];
  }
}

bool ps__slope_learns(const ps_leader *leader)
{
  return leader->options.policy == PS_VERIFIED && leader->options.tolerance > 0.0;
}

static const ps__node *evaluated_at(const ps_leader *leader, int step)
{
  for (int k = 0; k < leader->nodes; ++k) {
    const ps__node *node = &leader->node[k];
    if (node->step == step && node->state == PS__READY && node->point != NULL) {
      return node;
    }
  }
  return NULL;
}

ps_status ps__slope_keep(ps_leader *leader, const ps__node *fresh, int count)
{
  const ps_backend *backend = leader->backend;
  ps_status status = PS_OK;
  leader->pairs = 0;
  for (int k = 0; ps__slope_learns(leader) && k < count && status == PS_OK; ++k) {
    const ps__node *old = evaluated_at(leader, fresh[k].step);
    if (old == NULL || fresh[k].point == NULL || leader->round <= 1) {
      continue;
    }
    ps__pair *pair = &leader->pair[leader->pairs++];
    pair->step = old->step;
    status = backend->copy(backend, pair->x, old->point, ps__x_bytes(&leader->layout));
    if (status == PS_OK) {
      status = backend->copy(backend, pair->m, old->output, ps__m_bytes(&leader->layout));
    }
  }
  return status;
}

/* The mean square of b - a over all items together, NaN where it is no more than rounding. */
static ps_status distance(const ps_leader *leader, ps_dtype dtype, const void *a, const void *b,
                          double *squared)
{
  ps_sweep sweep = {
      .items = 1,
      .size = leader->layout.items * leader->layout.size,
      .x_dtype = dtype,
      .m_dtype = dtype,
      .x = b,
      .guess = a,
      .floor = CLEAR * ps__rounding(dtype),
  };
  ps_swept swept;
  ps_status status = ps__sweep(leader, &sweep, &swept);
  *squared = status == PS_OK && swept.excess > 0.0 ? swept.distance : NAN;
  return status;
}

/* m += slope (x - from), in place. */
static ps_status move(const ps_leader *leader, const ps__pair *pair, const void *x, double slope)
{
  ps_sweep sweep = {
      .items = leader->layout.items,
      .size = leader->layout.size,
      .x_dtype = leader->layout.x,
      .m_dtype = leader->layout.m,
      .x = x,
      .guess = pair->x,
      .m = pair->m,
      .slope = slope,
      .out = pair->m,
  };
  ps_swept swept;
  return ps__sweep(leader, &sweep, &swept);
}

/* To some ten bits, so that backends whose sums differ in their last bits have the same slope. */
static double rounded(double slope)
{
  enum { PARTS = 1024 };
  int exponent;
  double part = frexp(slope, &exponent);
  return ldexp(floor(part * PARTS + 0.5) / PARTS, exponent);
}

/* <dx, dm> / <dx, dx>, from lengths alone: with k = |dm| / |dx|, |dm - k dx|^2 = 2 |dm|^2 (1 -
 * cos), where cos is that between dx and dm.  Its square is the part of dm that one slope accounts
 * for, less where the items of a batch differ: by so much the slope becomes what was seen. */
static ps_status learn(ps_leader *leader, const ps__pair *pair, const ps__node *node)
{
  double dx, dm, off = 0.0;
  ps_dtype m_dtype = leader->layout.m;
  ps_status status = distance(leader, leader->layout.x, pair->x, node->point, &dx);
  if (status == PS_OK) {
    status = distance(leader, m_dtype, pair->m, node->output, &dm);
  }
  if (status != PS_OK || !(dx > 0.0 && dm > 0.0 && isfinite(dm / dx))) {
    return status; /* the same guess, or an output that did not change: nothing to be seen */
  }
  double slope = sqrt(dm / dx);
  status = move(leader, pair, node->point, slope);
  if (status == PS_OK) {
    status = distance(leader, m_dtype, pair->m, node->output, &off);
  }
  off = isnan(off) ? 0.0 : off; /* within rounding */
  leader->seen[node->step] = true;
  double along = fmax(1.0 - off / (2.0 * dm), -1.0), own = leader->program->g[node->step];
  leader->slope[node->step] = rounded(own + along * along * (slope * along - own));
  return status;
}

/* Between steps that lie a stride apart the slope changes less than it differs from g: behind a
 * node whose slope was seen, those of the round that were not evaluated before take it over.  Where
 * every step is evaluated that brought nothing. */
static void hand_on(ps_leader *leader)
{
  const ps__node *from = NULL;
  for (int k = 0; leader->pace.strided && k < leader->nodes; ++k) {
    int step = leader->node[k].step;
    if (step >= leader->program->steps) {
      return; /* a host that asks beyond the program's end */
    }
    if (leader->seen[step]) {
      from = &leader->node[k];
    } else if (from != NULL) {
      leader->slope[step] = leader->slope[from->step];
    }
  }
}

ps_status ps__slope_learn(ps_leader *leader)
{
  ps_status status = PS_OK;
  for (int k = 0; k < leader->pairs && status == PS_OK; ++k) {
    const ps__node *node = evaluated_at(leader, leader->pair[k].step);
    if (node != NULL) {
      status = learn(leader, &leader->pair[k], node);
    }
  }
  leader->pairs = 0;
  hand_on(leader);
  return status;
}
