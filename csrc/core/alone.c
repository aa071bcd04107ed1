/* alone.c - a device that nobody evaluates beside, and what it may lose.
 *
 * A run takes one round more than steps at most, so that one device may lose a single evaluation
 * before it has saved any: from there on the host evaluates, and nothing is gained.  So it tries
 * guesses before it evaluates at one, and keeps what it has evaluated ahead.  Called by leader.c
 * when a round begins and at every ask.
 */
#include <math.h>

#include "core/internal.h"

/* Where the host evaluates alone nobody writes over what lies ahead: it may answer yet, by what it
 * is off by then, so that an evaluation is not lost for one step before it that was. */
int ps__keep_ahead(ps_leader *leader, int count)
{
  bool alone = leader->pace.strided && count == 1 && leader->fresh[0].point == NULL;
  for (int k = 0; alone && k < leader->nodes; ++k) {
    const ps__node *node = &leader->node[k];
    bool there = leader->rank[node->rank].link != NULL || (node->rank == 0 && !leader->lane);
    if (there && node->state == PS__READY && node->point != NULL && node->step > leader->step) {
      leader->fresh[count] = *node;
      leader->fresh[count++].kept = true;
    }
  }
  return count;
}

/* A device alone may lose one evaluation in a run.  So before it makes its first one ahead it
 * guesses where that would be, and sees by how much it would have been off. */
ps_status ps__try_ahead(ps_leader *leader, int count)
{
  int next = leader->step + 1;
  ps__node node = {.step = next, .point = leader->between_x};
  leader->pace.tried = -1;
  if (!leader->pace.strided || leader->fallback[0] != '\0' || count > 1 ||
      leader->fresh[0].point != NULL || leader->round != leader->step || leader->step == 0 ||
      next >= leader->program->steps) {
    return PS_OK;
  }
  leader->pace.tried = next;
  return ps__guess(leader, &node, 1);
}

ps_status ps__see_tried(ps_leader *leader, const void *x)
{
  ps__pace *pace = &leader->pace;
  ps__measured found = {.drift = NAN};
  ps_status status = PS_OK;
  if (pace->tried == leader->step) {
    status =
        ps__measure(leader, leader->step, leader->between_x, NULL, x, NULL, NULL, NULL, &found);
    pace->tried_cost = pace->drift_cost[leader->step] * found.drift;
  }
  return status;
}
