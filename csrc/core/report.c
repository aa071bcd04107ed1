/* report.c - what a run remembers of itself: counters, drift, the timeline, failures.
 *
 * leader.c and links.c write it as they go; ps_leader_report shows it.
 */
#include <math.h>

#include "core/internal.h"

/* Each round has one record a node; rounds are at most N, and few hosts ask beyond N. */
size_t ps__report_carve(ps_leader *leader, ps__arena *arena)
{
  size_t steps = (size_t)leader->program->steps, ranks = (size_t)leader->ranks;
  size_t records = steps * (size_t)leader->window_max + ranks;
  leader->evaluations = ps__carve(arena, ranks, sizeof(int));
  leader->accepted = ps__carve(arena, steps, sizeof(int));
  leader->drift = ps__carve(arena, steps, sizeof(double));
  leader->timeline = ps__carve(arena, records, sizeof(ps_record));
  leader->failure = ps__carve(arena, ranks, sizeof(ps_failure));
  leader->records_max = (int)records;
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
      .rounds = leader->round,
      .answered = leader->answered,
      .not_finite = leader->not_finite,
      .seconds_ns = now - leader->began_ns,
      .bytes_sent = leader->bytes_sent,
      .evaluations = leader->evaluations,
      .accepted = leader->accepted,
      .drift = leader->drift,
      .timeline = leader->timeline,
      .records = leader->records,
      .failures = leader->failure,
      .failed = leader->failures,
      .fallback = leader->fallback[0] != '\0' ? leader->fallback : NULL,
  };
  return PS_OK;
}
