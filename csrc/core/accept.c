/* accept.c - what becomes of an output: drift, rounding floor, the canary.
 *
 * Called by leader.c at every ask (how far is the guess from the true latent?  Whether that is near
 * enough, pace.c says) and by links.c at the end of the first round (does the follower compute the
 * same function?).
 */
#include <math.h>
#include <stdio.h>

#include "core/internal.h"

/* Half a unit in the last place of a value stored as dtype, about: the host's own rounding of x
 * puts this much, times rms(x), under every drift. */
double ps__rounding(ps_dtype dtype)
{
  switch (dtype) {
  case PS_F64: return 0x1p-54;
  case PS_F32: return 0x1p-25;
  case PS_F16: return 0x1p-12;
  case PS_BF16: return 0x1p-9;
  case PS_NONE: break;
  }
  return 0.0;
}

/* How far two ranks may differ at the same point, relative to the output's rms, and still compute
 * one function: other kernels and other summation orders do, other weights do not. */
static double rounding_between_ranks(ps_dtype dtype)
{
  switch (dtype) {
  case PS_F64: return 0x1p-20;
  case PS_F32: return 0x1p-12;
  case PS_F16: return 0x1p-7;
  case PS_BF16: return 0x1p-5;
  case PS_NONE: break;
  }
  return 0.0;
}

ps_status ps__measure(const ps_leader *leader, int step, const void *point, const void *m,
                      const void *x, void *out, void *keep_x, void *keep_m, ps__measured *found)
{
  const ps_program *program = leader->program;
  bool rebase = leader->options.policy == PS_VERIFIED;
  ps_sweep sweep = {
      .items = leader->layout.items,
      .size = leader->layout.size,
      .x_dtype = leader->layout.x,
      .m_dtype = leader->layout.m,
      .x = x,
      .guess = point,
      .m = m,
      .slope = rebase ? leader->slope[step] : 0.0,
      .floor = ps__rounding(leader->layout.x),
      .out = out,
      .keep_x = keep_x,
      .keep_m = keep_m,
  };
  ps_swept swept;
  ps_status status = ps__sweep(leader, &sweep, &swept);
  if (status == PS_OK) {
    found->drift = sqrt(swept.excess) / program->s[step];
    found->finite = swept.not_finite == 0;
  }
  return status;
}

/* The distance of a point from itself is 0, or NaN where it holds NaN or Inf. */
bool ps__finite(const ps_leader *leader, const void *point, const void *m)
{
  ps_sweep sweep = {
      .items = leader->layout.items,
      .size = leader->layout.size,
      .x_dtype = leader->layout.x,
      .m_dtype = leader->layout.m,
      .x = point,
      .guess = point,
      .m = m,
  };
  ps_swept swept;
  return ps__sweep(leader, &sweep, &swept) == PS_OK && swept.not_finite == 0 &&
         swept.distance == 0.0;
}

/* Relative distance of theirs from ours above the rounding that ranks may differ by, 0 if within;
 * NaN where either holds one. */
static ps_status compare(const ps_leader *leader, ps_dtype dtype, const void *ours,
                         const void *theirs, double *relative)
{
  ps_sweep sweep = {
      .items = leader->layout.items,
      .size = leader->layout.size,
      .x_dtype = dtype,
      .m_dtype = dtype,
      .x = ours,
      .guess = theirs,
      .floor = rounding_between_ranks(dtype),
  };
  ps_swept swept;
  ps_status status = ps__sweep(leader, &sweep, &swept);
  if (status == PS_OK) {
    *relative = swept.excess == 0.0 ? 0.0 : sqrt(swept.distance / swept.reference);
  }
  return status;
}

ps_status ps__canary(const ps_leader *leader, const ps__node *node, char *why, size_t room)
{
  int depth = leader->depth;
  double relative = 0.0;
  const char *what = "starts from another latent";
  /* Hosts on both sides may have edited the latent since the ask: alike, or not. */
  ps_status status =
      compare(leader, leader->layout.x, leader->x[node->step % depth], node->point, &relative);
  if (status == PS_OK && relative == 0.0) {
    what = "its output differs at the leader's own latent (other weights, other conditioning, "
           "or a state that it keeps)";
    status =
        compare(leader, leader->layout.m, leader->m[node->step % depth], node->output, &relative);
  }
  if (status == PS_OK && relative != 0.0) {
    snprintf(why, room, "%s: relative distance %.3g at step %d", what, relative, node->step);
    status = PS_DIFFERS;
  }
  return status;
}
