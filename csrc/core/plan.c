/* plan.c - which steps a round evaluates, and who evaluates which.
 *
 * Called by leader.c at the start of a round.  Nodes lie a stride apart by the clock of pace.c, one
 * step at stride 1.  The k-th node goes to the k-th rank alive; ranks with several slots get their
 * further nodes only when every rank has its first, so that a short window near the end leaves no
 * rank with a batch while another idles.
 */
#include <math.h>

#include "core/internal.h"

/* The leader itself is always alive; a lane that was lost takes no more nodes. */
static bool takes_nodes(const ps_leader *leader, int rank)
{
  return leader->rank[rank].link != NULL || (rank == 0 && !leader->lane);
}

static int room_ahead(const ps_leader *leader)
{
  int room = 0;
  for (int rank = 0; rank < leader->ranks; ++rank) {
    room += takes_nodes(leader, rank) ? leader->rank[rank].slots : 0;
  }
  return room;
}

/* ---- steps ----------------------------------------------------------------------------------- */

typedef struct ruler {
  int base;  /* the step that strides are counted from */
  int marks; /* strides laid so far */
} ruler;

/* Strides are counted from the last accepted node, or from the frontier where it is evaluated;
 * never so long that ranks idle near the end. */
static ruler lay_ruler(ps_leader *leader, bool exact)
{
  const double *clock = leader->pace.clock;
  int last = leader->program->steps - 1, room = room_ahead(leader) - (exact ? 1 : 0);
  ruler along = {exact ? leader->step : leader->pace.newest, 0};
  double left = (clock[last] - clock[along.base]) / (room > 0 ? room : 1);
  if (along.base < last && left < leader->pace.stride) {
    leader->pace.stride = left;
  }
  return along;
}

/* Noise may fall to this part of itself from node to node.  Where it ends outputs turn rough, a
 * clean sample's error over s, and what was seen of them before tells nothing of that. */
static const double FALL = 0.45;

/* The farthest of the steps from `from` to `step` whose noise has not fallen too far. */
static int within_fall(const ps_leader *leader, int from, int step, int before)
{
  const ps_program *program = leader->program;
  int base = before >= 0 ? before : leader->pace.newest;
  double least = base >= 0 ? FALL * ps__noise_of(program, base) : 0.0;
  while (step > from && ps__noise_of(program, step) < least) {
    --step;
  }
  return step;
}

/* The step nearest to the next mark, after the one before it and not behind the frontier; -1 beyond
 * the end. */
static int next_step(const ps_leader *leader, ruler *along, int before)
{
  enum { SPAN_MAX = PS__SPAN_MAX };
  const double *clock = leader->pace.clock;
  int steps = leader->program->steps, most = leader->options.max_stride;
  double mark = clock[along->base] + ++along->marks * leader->pace.stride;
  int from = before >= leader->step ? before + 1 : leader->step, step = from;
  while (step + 1 < steps && fabs(clock[step + 1] - mark) < fabs(clock[step] - mark)) {
    ++step;
  }
  if (leader->pace.strided && step < steps) {
    step = within_fall(leader, from, step, before);
  }
  if (most > 0 && step >= from + most) {
    step = from + most - 1;
  }
  return step < steps && step - leader->step < SPAN_MAX ? step : -1;
}

/* ---- ranks ----------------------------------------------------------------------------------- */

static ps__node node_for(const ps_leader *leader, int step, int rank, int slot)
{
  return (ps__node){
      .step = step,
      .rank = rank,
      .slot = slot,
      .state = PS__PENDING,
      .record = -1,
      .point = leader->rank[rank].point[slot],
      .output = leader->rank[rank].output[slot],
  };
}

/* Hands a node to every slot from the first one after `taken` on. */
static int hand_out(const ps_leader *leader, ruler *along, int step, int taken, ps__node *nodes)
{
  int count = taken, before = taken > 0 ? nodes[0].step : -1;
  for (int slot = 0; slot < PS_SLOTS_MAX; ++slot) {
    for (int rank = 0; rank < leader->ranks; ++rank) {
      bool own = rank == 0 && slot == 0 && taken > 0;
      if (own || !takes_nodes(leader, rank) || slot >= leader->rank[rank].slots ||
          (taken > 0 && rank == 0 && leader->lane)) {
        continue;
      }
      step = step >= 0 ? step : next_step(leader, along, before);
      if (step < 0) {
        return count;
      }
      nodes[count++] = node_for(leader, step, rank, slot);
      before = step;
      step = -1;
    }
  }
  return count;
}

int ps__plan(ps_leader *leader, bool exact, ps__node *nodes)
{
  exact = exact || room_ahead(leader) == 0 || (leader->lane && leader->rank[0].link == NULL);
  ruler along = lay_ruler(leader, exact);
  int first = exact ? leader->step : next_step(leader, &along, -1);
  if (first == leader->step) {
    /* The first node is the frontier itself: the host evaluates it, exactly. */
    nodes[0] = (ps__node){.step = first, .state = PS__PENDING, .record = -1};
    return hand_out(leader, &along, -1, 1, nodes);
  }
  return hand_out(leader, &along, first, 0, nodes);
}
