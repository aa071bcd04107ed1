/* plan.c - who evaluates which step of a round.
 *
 * Called by leader.c at the start of a round.  The k-th node goes to the k-th rank alive; ranks
 * with several slots get their further nodes only when every rank has its first, so that a short
 * window near the end leaves no rank with a batch while another idles.
 */
#include "core/internal.h"

static bool is_alive(const ps_leader *leader, int rank)
{
  return rank == 0 || leader->rank[rank].link != NULL;
}

int ps__plan(const ps_leader *leader, int first, ps__node *nodes)
{
  int left = leader->program->steps - first;
  int count = 0;
  for (int slot = 0; slot < PS_SLOTS_MAX && count < left; ++slot) {
    for (int rank = 0; rank < leader->ranks && count < left; ++rank) {
      const ps__rank *holder = &leader->rank[rank];
      if (!is_alive(leader, rank) || slot >= holder->slots) {
        continue;
      }
      nodes[count] = (ps__node){
          .step = first + count,
          .rank = rank,
          .slot = slot,
          .state = PS__PENDING,
          .record = -1,
          .point = holder->point[slot],
          .output = holder->output[slot],
      };
      ++count;
    }
  }
  return count;
}
