/* leader.c - the leader of a run: a small state machine that answers a host's model calls.
 *
 * The host's loop calls ask at every step and submit where it was told to evaluate; ps_sample in
 * loop.c and the hosts' hooks are such loops.  One turn: ask measures the guess for this step
 * (accept.c) and answers, or begins a round: plan.c says who evaluates what, guess.c writes the
 * points, links.c sends them; submit takes the leader's own output and gathers the others'.
 */
#include <math.h>
#include <stdio.h>

#include "core/internal.h"

/* ---- ask ------------------------------------------------------------------------------------- */

static ps_status check_phase(const ps_leader *leader, ps__phase wanted, const char *call)
{
  if (leader->phase == wanted) {
    return PS_OK;
  }
  if (leader->phase == PS__FINISHED || leader->phase == PS__BROKEN) {
    return ps__fail(PS_STATE, "%s: the run is over; create a new one", call);
  }
  return ps__fail(PS_STATE, "%s: the run waits for %s of step %d", call,
                  leader->phase == PS__EVALUATING ? "the output" : "the ask",
                  leader->phase == PS__EVALUATING ? leader->step : leader->step + 1);
}

static void *x_at(const ps_leader *leader, int step)
{
  return leader->x[step % leader->depth];
}

static void *m_at(const ps_leader *leader, int step)
{
  return leader->m[step % leader->depth];
}

static ps__node *ready_node(ps_leader *leader, int step)
{
  for (int k = 0; k < leader->nodes; ++k) {
    ps__node *node = &leader->node[k];
    if (node->step == step && node->state == PS__READY) {
      return node;
    }
  }
  return NULL;
}

static bool is_accepted(const ps_leader *leader, double drift)
{
  return leader->options.policy == PS_PAPER || drift < leader->options.tolerance;
}

/* Whether the guess for this step answers the host.  x and, if it does, m_j enter the trajectory.
 */
static ps_status try_answer(ps_leader *leader, const void *x, void *m_out, bool *answered)
{
  int step = leader->step;
  /* Once speculation has ended, what followers evaluated may no longer be the host's function. */
  ps__node *node = leader->fallback[0] == '\0' ? ready_node(leader, step) : NULL;
  *answered = false;
  if (node == NULL) {
    return leader->backend->copy(leader->backend, x_at(leader, step), x,
                                 ps__x_bytes(&leader->layout));
  }
  bool finite = false;
  void *keep_m = m_out != NULL ? m_at(leader, step) : NULL;
  ps_status status = ps__measure(leader, node, x, m_out, x_at(leader, step), keep_m,
                                 &leader->drift[step], &finite);
  if (status == PS_OK && !finite) {
    node->state = PS__VOID;
    /* Where the guess itself was not finite, no follower could have done better. */
    if (node->rank != 0 && isfinite(leader->drift[step])) {
      status = ps__leave_out(leader, node->rank, PS_NOT_FINITE, "its output holds NaN or Inf");
    }
  } else if (status == PS_OK && m_out != NULL && is_accepted(leader, leader->drift[step])) {
    *answered = true;
    if (node->record >= 0) {
      leader->timeline[node->record].accepted = 1;
    }
  }
  return status;
}

/* The leader's own node, and beside it what speculation allows: step 0 on every rank in the first
 * round, later the planner's window. */
static int plan_round(ps_leader *leader, bool alone)
{
  int step = leader->step, steps = leader->program->steps;
  ps__node *nodes = leader->fresh;
  bool warm = leader->options.policy == PS_PAPER && step < leader->options.warmup;
  alone = alone || leader->fallback[0] != '\0' || step >= steps || steps == 1;
  nodes[0] = (ps__node){.step = step, .state = PS__PENDING, .record = -1};
  if (alone || (warm && step > 0)) {
    return 1;
  }
  if (step > 0) {
    return ps__plan(leader, step, nodes);
  }
  int count = 1;
  for (int rank = 1; rank < leader->ranks; ++rank) {
    const ps__rank *holder = &leader->rank[rank];
    if (holder->link != NULL) {
      nodes[count++] = (ps__node){.rank = rank,
                                  .state = PS__PENDING,
                                  .record = -1,
                                  .point = holder->point[0],
                                  .output = holder->output[0]};
    }
  }
  return count;
}

static ps_status write_points(ps_leader *leader, int count)
{
  ps_status status = PS_OK;
  if (count > 1 && leader->step > 0) {
    return ps__guess(leader, leader->fresh, count);
  }
  for (int k = 1; k < count && status == PS_OK; ++k) {
    status = leader->backend->copy(leader->backend, leader->fresh[k].point,
                                   x_at(leader, leader->step), ps__x_bytes(&leader->layout));
  }
  return status;
}

static ps_status begin_round(ps_leader *leader, bool alone)
{
  int count = plan_round(leader, alone);
  ps_status status = write_points(leader, count);
  if (status != PS_OK) {
    return status;
  }
  ps__node *carried = leader->node;
  leader->node = leader->fresh;
  leader->fresh = carried;
  leader->nodes = count;
  if (leader->round < leader->program->steps) {
    leader->accepted[leader->round] = 1;
  }
  ++leader->round;
  leader->phase = PS__EVALUATING;
  return ps__post_round(leader);
}

ps_status ps_leader_ask(ps_leader *leader, int step, const void *x, void *m_out,
                        ps_verdict *verdict)
{
  bool answered = false;
  ps_status status = check_phase(leader, PS__ASKING, "ask");
  *verdict = PS_EVALUATE;
  if (status == PS_OK && step != leader->step + 1) {
    status = ps__fail(PS_INVALID, "ask: step %d where step %d is next", step, leader->step + 1);
  }
  if (status != PS_OK) {
    return status;
  }
  leader->step = step;
  leader->asked_ns = ps_now_ns();
  status = try_answer(leader, x, m_out, &answered);
  if (status == PS_OK && answered) {
    ++leader->answered;
    ++leader->accepted[leader->round - 1];
    *verdict = PS_ANSWER;
  } else if (status == PS_OK) {
    /* Step 0 needs the followers in any case: it verifies them. */
    status = begin_round(leader, m_out == NULL && step > 0);
  }
  if (status != PS_OK) {
    leader->phase = PS__BROKEN;
  }
  return status;
}

ps_status ps_leader_amend(ps_leader *leader, const void *x, void *m_out, double *drift)
{
  int step = leader->step;
  *drift = NAN;
  if (leader->phase == PS__EVALUATING) {
    return leader->backend->copy(leader->backend, x_at(leader, step), x,
                                 ps__x_bytes(&leader->layout));
  }
  ps_status status = check_phase(leader, PS__ASKING, "amend");
  const ps__node *node = status == PS_OK && step >= 0 ? ready_node(leader, step) : NULL;
  if (status == PS_OK && (node == NULL || m_out == NULL)) {
    status = ps__fail(PS_STATE, "amend: step %d was not answered, or no output was given", step);
  }
  if (status == PS_OK) {
    bool finite;
    status =
        ps__measure(leader, node, x, m_out, x_at(leader, step), m_at(leader, step), drift, &finite);
    leader->drift[step] = *drift;
  }
  return status;
}

/* ---- submit ---------------------------------------------------------------------------------- */

ps_status ps_leader_work(ps_leader *leader, ps_work *work)
{
  ps_status status = check_phase(leader, PS__EVALUATING, "work");
  *work = (ps_work){.point_bytes = ps__x_bytes(&leader->layout),
                    .output_bytes = ps__m_bytes(&leader->layout)};
  for (int k = 1; status == PS_OK && k < leader->nodes; ++k) {
    const ps__node *node = &leader->node[k];
    if (node->rank == 0) {
      work->step[work->count] = node->step;
      work->point[work->count] = node->point;
      work->output[work->count++] = node->output;
    }
  }
  return status;
}

/* The first output decides m's dtype where the layout left it open. */
static ps_status settle_dtype(ps_leader *leader, ps_dtype dtype)
{
  size_t bytes = leader->layout.items * leader->layout.size * ps_dtype_size(dtype);
  if (leader->layout.m == dtype && bytes > 0) {
    return PS_OK;
  }
  if (leader->layout.m != PS_NONE || bytes == 0 || bytes > ps__m_bytes(&leader->layout)) {
    ps_dtype wanted = leader->layout.m != PS_NONE ? leader->layout.m : leader->layout.x;
    return ps__fail(PS_DTYPE, "the denoiser's output at step %d is %s where %s is expected",
                    leader->step, ps_dtype_name(dtype), ps_dtype_name(wanted));
  }
  leader->layout.m = dtype;
  return PS_OK;
}

static ps_status keep_output(ps_leader *leader, const void *m)
{
  ps_sweep sweep = {
      .items = leader->layout.items,
      .size = leader->layout.size,
      .x_dtype = leader->layout.x,
      .m_dtype = leader->layout.m,
      .m = m,
      .keep_m = m_at(leader, leader->step),
  };
  ps_swept swept;
  ps_status status = ps__sweep(leader, &sweep, &swept);
  if (status == PS_OK && swept.not_finite > 0) {
    ++leader->not_finite;
  }
  return status;
}

static void record_own(ps_leader *leader, int64_t began_ns)
{
  int64_t begin = began_ns != 0 ? began_ns : leader->asked_ns;
  leader->submitted_ns = ps_now_ns();
  if (leader->submitted_ns - begin > leader->longest_ns) {
    leader->longest_ns = leader->submitted_ns - begin;
  }
  for (int k = 0; k < leader->nodes; ++k) {
    ps__node *node = &leader->node[k];
    if (node->rank == 0) {
      node->record = ps__report_record(leader, node, begin, leader->submitted_ns);
      /* The first is in the trajectory and answered by itself; the others wait for their ask. */
      node->state = k == 0 ? PS__VOID : PS__READY;
      leader->rank[0].spoken = node->slot + 1;
      if (k == 0 && node->record >= 0) {
        leader->timeline[node->record].accepted = 1;
      }
    }
  }
}

ps_status ps_leader_submit(ps_leader *leader, const void *m, ps_dtype m_dtype, int64_t began_ns)
{
  ps_status status = check_phase(leader, PS__EVALUATING, "submit");
  if (status == PS_OK) {
    status = settle_dtype(leader, m_dtype);
  }
  if (status == PS_OK) {
    status = keep_output(leader, m);
  }
  if (status != PS_OK) {
    return status;
  }
  record_own(leader, began_ns);
  leader->phase = PS__ASKING;
  return ps__gather_round(leader);
}

/* ---- beside the turn ------------------------------------------------------------------------- */

/* A round begun at the next step applies the rows up to the one before its last node. */
int ps_leader_horizon(const ps_leader *leader)
{
  int horizon = leader->step + leader->window_max;
  return horizon < leader->program->steps ? horizon : leader->program->steps;
}

ps_status ps_leader_noise(ps_leader *leader, int step, const void *z)
{
  if (step <= leader->step || step >= ps_leader_horizon(leader)) {
    return ps__fail(PS_INVALID, "noise of step %d: guesses pass steps %d to %d next", step,
                    leader->step + 1, ps_leader_horizon(leader) - 1);
  }
  if (leader->noise == NULL) {
    return PS_OK; /* every c is 0: no row would read it */
  }
  int place = step % leader->window_max;
  leader->noise_step[place] = step;
  return leader->backend->copy(leader->backend, leader->noise[place], z,
                               ps__x_bytes(&leader->layout));
}

ps_status ps_leader_advance(ps_leader *leader, const void *z, void *x_next)
{
  const ps_program *program = leader->program;
  int j = leader->step, terms = 0;
  ps_status status = check_phase(leader, PS__ASKING, "advance");
  if (status == PS_OK && (j < 0 || j >= program->steps)) {
    status = ps__fail(PS_STATE, "advance: no step of the program has been answered");
  }
  for (int k = 0; status == PS_OK && k < program->history && k <= j; ++k) {
    leader->row_weight[terms] = program->a[j * program->history + k];
    leader->row_term[terms++] = (ps_term){x_at(leader, j - k), leader->layout.x};
    leader->row_weight[terms] = program->b[j * program->history + k];
    leader->row_term[terms++] = (ps_term){m_at(leader, j - k), leader->layout.m};
  }
  if (status == PS_OK && z != NULL) {
    leader->row_weight[terms] = program->c[j];
    leader->row_term[terms++] = (ps_term){z, leader->layout.x};
  }
  if (status == PS_OK) {
    status = leader->backend->lincomb(leader->backend, leader->layout.items * leader->layout.size,
                                      1, terms, leader->row_weight, leader->row_term, &x_next,
                                      leader->layout.x);
  }
  return status;
}

ps_status ps_leader_stop(ps_leader *leader, const char *reason)
{
  if (leader->fallback[0] == '\0') {
    snprintf(leader->fallback, sizeof leader->fallback, "%s",
             reason[0] != '\0' ? reason : "stopped by the host");
  }
  return PS_OK;
}

ps_status ps_leader_leave_out(ps_leader *leader, int rank, const char *reason)
{
  if (rank < 1 || rank >= leader->ranks) {
    return ps__fail(PS_INVALID, "rank %d: must be 1 to %d", rank, leader->ranks - 1);
  }
  return leader->rank[rank].link != NULL ? ps__leave_out(leader, rank, PS_FAILED, reason) : PS_OK;
}
