/* report.c - what a run remembers of itself: counters, drift, the timeline, failures.
 *
 * leader.c and links.c write it as they go; ps_leader_report shows it.
 */
#include <math.h>

#include "core/internal.h"

/* Each round has one record a node; pace.c keeps rounds from going far beyond N. */
size_t ps__report_carve(ps_leader *leader, ps__arena *arena)
{
  size_t steps = (size_t)leader->program->steps, ranks = (size_t)leader->ranks;
  size_t rounds = steps + 16; /* more only for hosts that ask beyond N */
  size_t records = rounds * (size_t)leader->window_max + ranks;
  leader->evaluations = ps__carve(arena, ranks, sizeof(int));
  leader->accepted = ps__carve(arena, rounds, sizeof(int));
  leader->drift = ps__carve(arena, steps, sizeof(double));
  leader->timeline = ps__carve(arena, records, sizeof(ps_record));
  leader->failure = ps__carve(arena, ranks, sizeof(ps_failure));
  leader->records_max = (int)records;
  leader->rounds_max = (int)rounds;
  for (size_t j = 0; leader->drift != NULL && j < steps; ++j) {
    leader->drift[j] = NAN;
  }
  return arena->used;
}

int ps__report_record(ps_leader *leader, const ps__node *node, int64_t begin_ns, int64_t end_ns)
{
  ++leader->evaluations[node->rank];
  if (leader->records == leader->records_max) {
    return -1;
  }
  leader->timeline[leader->records] = (ps_record){
      .rank = node->rank,
      .step = node->step,
      .round = leader->round - 1,
      .begin_ns = begin_ns - leader->began_ns,
      .end_ns = end_ns - leader->began_ns,
  };
  return leader->records++;
}

ps_status ps_leader_report(const ps_leader *leader, ps_report *report)
{
  int64_t now = leader->finished_ns != 0 ? leader->finished_ns : ps_now_ns();
  *report = (ps_report){
      .steps = leader->program->steps,
      .ranks = leader->ranks,
      /* The leader's device evaluates step 0 twice where it has a lane to verify. */
      .rounds = leader->round + (leader->lane && leader->round > 0 ? 1 : 0),
      .answered = leader->answered,
      .interpolated = leader->interpolated,
      .not_finite = leader->not_finite,
      .seconds_ns = now - leader->began_ns,
      .bytes_sent = leader->bytes_sent,
      .evaluations = leader->evaluations,
      .accepted = leader->accepted,
      .counted = leader->counted,
      .drift = leader->drift,
      .cost = leader->pace.drift_cost,
      .timeline = leader->timeline,
      .records = leader->records,
      .failures = leader->failure,
      .failed = leader->failures,
      .fallback = leader->fallback[0] != '\0' ? leader->fallback : NULL,
  };
  return PS_OK;
}
