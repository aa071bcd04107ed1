/* links.c - the leader's side of the wire: work out, replies in, ranks left out.
 *
 * Called by leader.c after the guesses are made (post) and after the leader's own output (gather).
 * What a reply says is checked here and nowhere else; whatever does not fit costs the rank its
 * place, never the picture.
 */
#include <math.h>
#include <stdio.h>

#include "core/internal.h"

/* ---- leaving out ----------------------------------------------------------------------------- */

static void void_nodes(ps_leader *leader, int rank)
{
  for (int k = 0; k < leader->nodes; ++k) {
    if (leader->node[k].rank == rank) {
      leader->node[k].state = PS__VOID;
    }
  }
}

static int step_of(const ps_leader *leader, int rank)
{
  for (int k = 0; k < leader->nodes; ++k) {
    if (leader->node[k].rank == rank) {
      return leader->node[k].step;
    }
  }
  return leader->step;
}

ps_status ps__leave_out(ps_leader *leader, int rank, ps_status why, const char *text)
{
  ps__rank *lost = &leader->rank[rank];
  ps_failure *line = &leader->failure[leader->failures++];
  line->rank = rank;
  line->step = step_of(leader, rank);
  line->status = why;
  snprintf(line->text, sizeof line->text, "%s", text);
  void_nodes(leader, rank);
  lost->link->ops->close(lost->link);
  lost->link = NULL;
  if (leader->options.raise_on_loss) {
    leader->phase = PS__BROKEN;
    return ps__fail(PS_LOST, "rank %d was lost at step %d: %s", rank, line->step, line->text);
  }
  return PS_OK;
}

/* ---- work out -------------------------------------------------------------------------------- */

static ps_header header_of(const ps_leader *leader, ps_kind kind)
{
  return (ps_header){
      .magic = PS_MAGIC,
      .version = PS_WIRE_VERSION,
      .run = leader->run,
      .kind = kind,
      .round = leader->round,
      .dtype = leader->layout.x,
      .bytes = ps__x_bytes(&leader->layout),
  };
}

static bool is_sent(const ps__node *node, int rank)
{
  return node->rank == rank && node->state == PS__PENDING && node->point != NULL;
}

void ps__tell_company(const ps_leader *leader, ps_work *work)
{
  work->round = leader->round;
  work->exact = leader->nodes > 0 && leader->node[0].point == NULL;
  work->followers = 0;
  for (int k = 0; k < leader->nodes; ++k) {
    const ps__node *node = &leader->node[k];
    bool sent = is_sent(node, node->rank) && leader->rank[node->rank].link != NULL;
    work->followers += sent && node->slot == 0;
  }
}

/* One message holds all slots of a rank, in order of slot. */
static ps_header work_of(const ps_leader *leader, int rank)
{
  ps_header work = header_of(leader, PS_MSG_WORK);
  ps_work company;
  ps__tell_company(leader, &company);
  work.followers = (uint32_t)company.followers;
  work.flags = company.exact ? PS_FLAG_EXACT : 0;
  for (int k = 0; k < leader->nodes; ++k) {
    const ps__node *node = &leader->node[k];
    if (is_sent(node, rank)) {
      work.step[work.count++] = node->step;
    }
  }
  return work;
}

ps_status ps__post_round(ps_leader *leader)
{
  ps_status status = PS_OK;
  for (int rank = 0; rank < leader->ranks && status == PS_OK; ++rank) {
    ps__rank *to = &leader->rank[rank];
    ps_header work = work_of(leader, rank);
    to->posted_ns = 0;
    if (to->link == NULL || work.count == 0) {
      continue;
    }
    ps_status sent = to->link->ops->post(to->link, &work);
    if (sent != PS_OK) {
      status = ps__leave_out(leader, rank, sent, ps_last_error());
      continue;
    }
    to->posted_ns = ps_now_ns();
    leader->bytes_sent += (uint64_t)work.count * work.bytes;
  }
  return status;
}

/* ---- replies in ------------------------------------------------------------------------------ */

/* max(60 s, 10 x the leader's longest forward), from the leader's own submit; the first round has
 * no limit unless one was given, since first compiles are slow. */
static int64_t deadline_of(const ps_leader *leader)
{
  const int64_t least = INT64_C(60) * 1000000000;
  int64_t limit = leader->options.deadline_ns;
  if (limit == 0 && leader->round == 1) {
    return 0;
  }
  if (limit == 0) {
    limit = 10 * leader->longest_ns > least ? 10 * leader->longest_ns : least;
  }
  return limit > INT64_MAX - leader->submitted_ns ? 0 : leader->submitted_ns + limit;
}

static bool is_stale(const ps_leader *leader, const ps_header *reply)
{
  return reply->magic == PS_MAGIC && reply->version == PS_WIRE_VERSION &&
         (reply->run != leader->run || reply->round < leader->round);
}

/* Waits for this round's reply; those of an aborted run or an older round are drained.  An aborted
 * run leaves one behind, so that what does not end is no remainder. */
static ps_status collect(const ps_leader *leader, ps_link *link, ps_header *reply)
{
  enum { STALE_MOST = 64 };
  ps_wait wait = {deadline_of(leader), leader->options.check, leader->options.check_ctx};
  for (int stale = 0; stale < STALE_MOST; ++stale) {
    ps_status status = link->ops->collect(link, &wait, reply);
    if (status != PS_OK || !is_stale(leader, reply)) {
      return status;
    }
  }
  return ps__fail(PS_PROTOCOL, "replies of other runs or older rounds without end");
}

static ps_status check_reply(const ps_leader *leader, int rank, ps_header *reply)
{
  ps_header work = work_of(leader, rank);
  if (reply->magic != PS_MAGIC || reply->version != PS_WIRE_VERSION ||
      reply->round != leader->round) {
    return ps__fail(PS_PROTOCOL, "a message that is not a reply of this round");
  }
  if (reply->kind == PS_MSG_FAILED) {
    reply->text[sizeof reply->text - 1] = '\0';
    return ps__fail(PS_FAILED, "%s", reply->text);
  }
  if (reply->kind != PS_MSG_OUTPUT || reply->count != work.count) {
    return ps__fail(PS_PROTOCOL, "a reply of kind %u with %d outputs to work of %d steps",
                    reply->kind, reply->count, work.count);
  }
  for (int slot = 0; slot < work.count; ++slot) {
    if (reply->step[slot] != work.step[slot]) {
      return ps__fail(PS_PROTOCOL, "an output of step %d where step %d was asked for",
                      reply->step[slot], work.step[slot]);
    }
  }
  if (reply->dtype != (uint32_t)leader->layout.m || reply->bytes != ps__m_bytes(&leader->layout)) {
    return ps__fail(PS_DTYPE, "outputs of %s (%llu bytes) where the leader's are %s (%zu bytes)",
                    ps_dtype_name((ps_dtype)reply->dtype), (unsigned long long)reply->bytes,
                    ps_dtype_name(leader->layout.m), ps__m_bytes(&leader->layout));
  }
  return PS_OK;
}

/* When the evaluation was, on the leader's clock: one that is not ours gives durations alone.  What
 * the other end says may be anything; nothing has happened before the clock began, or after now. */
static void take_times(const ps__rank *from, const ps_header *reply, int64_t *begin, int64_t *end)
{
  int64_t now = ps_now_ns();
  bool sound = reply->began_ns >= 0 && reply->ended_ns >= reply->began_ns;
  int64_t took = sound ? reply->ended_ns - reply->began_ns : 0;
  bool ours = from->link->same_clock && sound && reply->began_ns <= now;
  *begin = ours ? reply->began_ns : from->posted_ns;
  *end = took < now - *begin ? *begin + took : now;
}

static void take_outputs(ps_leader *leader, int rank, const ps_header *reply)
{
  ps__rank *from = &leader->rank[rank];
  int64_t begin, end;
  take_times(from, reply, &begin, &end);
  for (int k = 0; k < leader->nodes; ++k) {
    ps__node *node = &leader->node[k];
    if (is_sent(node, rank)) {
      node->state = PS__READY;
      node->record = ps__report_record(leader, node, begin, end);
    }
  }
  from->spoken = leader->round > 1 ? reply->count : 0;
  leader->bytes_sent += (uint64_t)reply->count * reply->bytes;
  if (reply->flags & PS_FLAG_MOVED) {
    leader->bytes_sent += (uint64_t)reply->count * ps__x_bytes(&leader->layout);
  }
}

/* In the first round every follower evaluates step 0 too, on the leader's own latent. */
static ps_status verify_function(ps_leader *leader, int rank)
{
  char why[sizeof leader->failure->text];
  for (int k = 0; k < leader->nodes; ++k) {
    if (leader->node[k].rank == rank && leader->node[k].point != NULL) {
      ps_status status = ps__canary(leader, &leader->node[k], why, sizeof why);
      return status == PS_OK ? PS_OK : ps__fail(status, "%s", why);
    }
  }
  return PS_OK;
}

static ps_status gather_rank(ps_leader *leader, int rank)
{
  ps_header reply;
  ps_status status = collect(leader, leader->rank[rank].link, &reply);
  if (status == PS_OK) {
    status = check_reply(leader, rank, &reply);
  }
  if (status == PS_OK) {
    take_outputs(leader, rank, &reply);
  }
  if (status == PS_OK && leader->round == 1) {
    status = verify_function(leader, rank);
  }
  if (status == PS_OK || status == PS_INTERRUPTED) {
    return status;
  }
  char why[sizeof leader->failure->text];
  snprintf(why, sizeof why, "%s", ps_last_error());
  return ps__leave_out(leader, rank, status, why);
}

ps_status ps__gather_round(ps_leader *leader)
{
  ps_status status = PS_OK;
  for (int rank = 0; rank < leader->ranks && status == PS_OK; ++rank) {
    if (leader->rank[rank].link != NULL && leader->rank[rank].posted_ns != 0) {
      status = gather_rank(leader, rank);
    }
  }
  if (status != PS_OK) {
    leader->phase = PS__BROKEN;
  }
  return status;
}

/* ---- the end --------------------------------------------------------------------------------- */

void ps__close_links(ps_leader *leader)
{
  ps_header done = header_of(leader, PS_MSG_DONE);
  for (int rank = 0; rank < leader->ranks; ++rank) {
    ps_link *link = leader->rank[rank].link;
    if (link != NULL) {
      /* A follower in the middle of its work learns from the closing; the message is for the rest.
       */
      link->ops->post(link, &done);
      link->ops->close(link);
      leader->rank[rank].link = NULL;
    }
  }
}
