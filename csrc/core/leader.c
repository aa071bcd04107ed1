/* leader.c - the leader of a run: a small state machine that answers a host's model calls.
 *
 * The host's loop calls ask at every step and submit where it was told to evaluate; ps_sample in
 * loop.c and the hosts' hooks are such loops.  One turn: ask measures the guess for this step
 * (accept.c; between.c makes the output of a step that nobody evaluated), answers where pace.c
 * affords it, or begins a round: pace.c sets the stride, plan.c says who evaluates what, guess.c
 * writes the points, links.c sends them; submit takes the leader's own output and gathers the
 * others'.  alone.c is for a device that nobody evaluates beside.
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

/* x_{j+1} by row j of the program, from the host's own trajectory. */
static ps_status roll_step(ps_leader *leader, int j, const void *z, void *x_next)
{
  const ps_program *program = leader->program;
  int terms = 0;
  for (int k = 0; k < program->history && k <= j; ++k) {
    leader->row_weight[terms] = program->a[j * program->history + k];
    leader->row_term[terms++] = (ps_term){x_at(leader, j - k), leader->layout.x};
    leader->row_weight[terms] = program->b[j * program->history + k];
    leader->row_term[terms++] = (ps_term){m_at(leader, j - k), leader->layout.m};
  }
  if (z != NULL) {
    leader->row_weight[terms] = program->c[j];
    leader->row_term[terms++] = (ps_term){z, leader->layout.x};
  }
  return leader->backend->lincomb(leader->backend, leader->layout.items * leader->layout.size, 1,
                                  terms, leader->row_weight, leader->row_term, &x_next,
                                  leader->layout.x);
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

/* What answers later guesses are made from: m_step, evaluated or accepted at a node. */
static ps_status make_anchor(ps_leader *leader, int step)
{
  ps__anchor *anchor = &leader->anchor[leader->anchors++ % leader->anchors_max];
  anchor->step = leader->pace.newest = step;
  if (!leader->pace.strided) {
    anchor->m = m_at(leader, step);
    return PS_OK;
  }
  return leader->backend->copy(leader->backend, anchor->m, m_at(leader, step),
                               ps__m_bytes(&leader->layout));
}

/* Measures the guess for this step and rebases its output to x; m_out and keep_m as in ps_sweep.
 * *gap is written where node is NULL. */
static ps_status measure(ps_leader *leader, const ps__node *node, const void *x, void *m_out,
                         double *gap, ps__measured *found)
{
  int step = leader->step;
  const void *point = leader->between_x, *m = leader->between_m[0];
  ps_status status = PS_OK;
  if (node != NULL) {
    point = node->point;
    m = node->output;
  } else {
    status = ps__interpolate(leader, step, gap);
  }
  if (status == PS_OK) {
    status = ps__measure(leader, step, point, m, x, m_out, x_at(leader, step),
                         m_out != NULL ? m_at(leader, step) : NULL, found);
    leader->drift[step] = found->drift;
  }
  return status;
}

/* An output with NaN or Inf costs its rank the place; where the guess itself was not finite, no
 * follower could have done better. */
static ps_status reject_output(ps_leader *leader, ps__node *node)
{
  node->state = PS__VOID;
  if (leader->rank[node->rank].link == NULL || !ps__finite(leader, node->point, NULL)) {
    return PS_OK;
  }
  return ps__leave_out(leader, node->rank, PS_NOT_FINITE, "its output holds NaN or Inf");
}

/* An answer between nodes is what one of them makes of it. */
static ps_status reject_outputs(ps_leader *leader)
{
  ps_status status = PS_OK;
  for (int k = 0; k < leader->nodes && status == PS_OK; ++k) {
    ps__node *node = &leader->node[k];
    if (node->state == PS__READY && !ps__finite(leader, node->point, node->output)) {
      status = reject_output(leader, node);
    }
  }
  return status;
}

/* One more step that the round at hand has taken; those beyond N are not the program's. */
static void count_step(ps_leader *leader)
{
  if (leader->step < leader->program->steps && leader->counted == leader->round) {
    ++leader->accepted[leader->round - 1];
  }
}

static ps_status take_answer(ps_leader *leader, const ps__node *node)
{
  ++leader->answered;
  count_step(leader);
  if (node == NULL) {
    ++leader->interpolated;
    ++leader->pace.between;
    return PS_OK;
  }
  if (node->record >= 0) {
    leader->timeline[node->record].accepted = 1;
  }
  return make_anchor(leader, leader->step);
}

/* ---- what a round must answer ---------------------------------------------------------------- */

static const ps__node *next_ready(const ps_leader *leader, int step)
{
  for (int k = 0; k < leader->nodes; ++k) {
    if (leader->node[k].state == PS__READY && leader->node[k].step >= step) {
      return &leader->node[k];
    }
  }
  return NULL;
}

/* Whether the step is not behind the first node of a round whose nodes all lie ahead.  Its point is
 * where the host itself comes by what it knows: to evaluate there again would gain little. */
static bool leads(const ps_leader *leader, int step)
{
  const ps__node *first = next_ready(leader, 0);
  return leader->pace.strided && first != NULL && (leader->node[0].point != NULL || first->kept) &&
         step <= first->step;
}

/* How far the host has moved x since its last step.  Where the program's rows are not quite the
 * host's, that shows as an edit too. */
static ps_status measure_edit(ps_leader *leader, const void *x, double *drift)
{
  ps__measured found = {.drift = NAN};
  ps_status status = roll_step(leader, leader->step - 1, NULL, leader->between_x);
  if (status == PS_OK) {
    status =
        ps__measure(leader, leader->step, leader->between_x, NULL, x, NULL, NULL, NULL, &found);
  }
  *drift = found.drift;
  return status;
}

/* Whether an edit is what the guess missed: then that is no matter of outputs. */
static ps_status find_edit(ps_leader *leader, const void *x, double drift, bool *edited)
{
  double moved;
  ps_status status = measure_edit(leader, x, &moved);
  *edited = !(moved < 0.5 * drift);
  return status;
}

/* Once for every node: how far off it will be, told before the steps until there are answered. */
static ps_status look_ahead(ps_leader *leader, const void *x, bool *worth)
{
  const ps__node *next = next_ready(leader, leader->step);
  ps__measured found = {.drift = NAN};
  *worth = true;
  if (next == NULL || next->step == leader->foreseen) {
    return PS_OK;
  }
  leader->foreseen = next->step;
  ps_status status = ps__foresee(leader, x, next->step, leader->between_x);
  if (status == PS_OK) {
    status = ps__measure(leader, next->step, next->point, next->output, leader->between_x, NULL,
                         NULL, NULL, &found);
  }
  /* Further nodes are speculative: what lies before them is good for as long as it can be afforded.
   */
  bool led = leads(leader, next->step);
  *worth = !led || !found.finite || ps__may_come_to(leader, next->step, found.drift, true);
  return status;
}

/* Charges what was measured, if it can be answered. */
static ps_status judge(ps_leader *leader, const ps__node *node, const void *x,
                       const ps__measured *found, const double *gap, bool *answered)
{
  bool led = leads(leader, leader->step), edited = false;
  ps_status status = PS_OK;
  if (led && !ps__may_come_to(leader, leader->step, found->drift, false)) {
    status = find_edit(leader, x, found->drift, &edited);
  }
  *answered = status == PS_OK && !edited &&
              ps__afford(leader, found->drift, node == NULL ? gap : NULL, led);
  leader->pace.insist = led && !*answered;
  return *answered ? take_answer(leader, node) : status;
}

/* Whether the guess for this step answers the host.  x and, if it does, m_j enter the trajectory.
 */
static ps_status try_answer(ps_leader *leader, const void *x, void *m_out, bool *answered)
{
  int step = leader->step;
  double gap;
  bool worth = true;
  ps__measured found = {.drift = NAN};
  /* Once speculation has ended, what followers evaluated may no longer be the host's function. */
  bool ended = leader->fallback[0] != '\0';
  ps__node *node = !ended ? ready_node(leader, step) : NULL;
  *answered = false;
  if (node == NULL && (ended || m_out == NULL || !ps__is_between(leader, step))) {
    return leader->backend->copy(leader->backend, x_at(leader, step), x,
                                 ps__x_bytes(&leader->layout));
  }
  ps_status status = node == NULL ? look_ahead(leader, x, &worth) : PS_OK;
  leader->pace.insist = !worth;
  if (status == PS_OK) {
    status = measure(leader, node, x, m_out, &gap, &found);
  }
  if (status == PS_OK && !found.finite) {
    status = node != NULL ? reject_output(leader, node) : reject_outputs(leader);
  } else if (status == PS_OK && m_out != NULL && worth) {
    status = judge(leader, node, x, &found, &gap, answered);
  }
  return status;
}

/* What the host evaluates at x_j, alone. */
static int plan_alone(ps_leader *leader)
{
  leader->fresh[0] = (ps__node){.step = leader->step, .state = PS__PENDING, .record = -1};
  return 1;
}

/* In the first round everybody evaluates step 0: it verifies the followers. */
static int plan_first(ps_leader *leader)
{
  int count = plan_alone(leader);
  for (int rank = 0; rank < leader->ranks; ++rank) {
    const ps__rank *holder = &leader->rank[rank];
    if (holder->link != NULL) {
      leader->fresh[count++] = (ps__node){.rank = rank,
                                          .state = PS__PENDING,
                                          .record = -1,
                                          .point = holder->point[0],
                                          .output = holder->output[0]};
    }
  }
  return count;
}

static ps_status plan_round(ps_leader *leader, bool alone, int *count)
{
  int step = leader->step, steps = leader->program->steps;
  bool warm = leader->options.policy == PS_PAPER && step < leader->options.warmup;
  bool exact;
  ps_status status = ps__pace_round(leader, &exact);
  if (status == PS_OK && leader->pace.strided && !exact && step > 0 && step < steps) {
    /* Guesses begin at x itself and would not show an edit, but outputs before it answer too. */
    double moved;
    status = measure_edit(leader, x_at(leader, step), &moved);
    exact = ps__is_far(leader, step, moved);
  }
  if (alone || leader->fallback[0] != '\0' || step >= steps || steps == 1 || (warm && step > 0)) {
    *count = plan_alone(leader);
  } else {
    *count = step > 0 ? ps__plan(leader, exact, leader->fresh) : plan_first(leader);
  }
  return status;
}

static ps_status write_points(ps_leader *leader, int count)
{
  ps_status status = PS_OK;
  if (leader->step > 0 && leader->fresh[count - 1].point != NULL) {
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
  int count;
  ps_status status = plan_round(leader, alone, &count);
  if (status == PS_OK) {
    status = ps__slope_keep(leader, leader->fresh, count);
  }
  if (status == PS_OK) {
    status = write_points(leader, count);
  }
  if (status != PS_OK) {
    return status;
  }
  count = ps__keep_ahead(leader, count);
  status = ps__try_ahead(leader, count);
  if (status != PS_OK) {
    return status;
  }
  ps__node *carried = leader->node;
  leader->node = leader->fresh;
  leader->fresh = carried;
  leader->nodes = count;
  leader->old_anchors = leader->anchors;
  if (leader->step < leader->program->steps && leader->counted < leader->rounds_max) {
    leader->accepted[leader->counted++] = 0;
  }
  ++leader->round;
  leader->foreseen = -1;
  leader->phase = PS__EVALUATING;
  return ps__post_round(leader);
}

/* ---- whose turn it is ------------------------------------------------------------------------ */

static bool is_exact(const ps__node *node)
{
  return node->point == NULL;
}

/* A guess that the host itself is to evaluate. */
static bool is_hosts(const ps_leader *leader, const ps__node *node)
{
  return node->rank == 0 && !leader->lane && !is_exact(node) && node->state == PS__PENDING;
}

static ps_verdict verdict_of(const ps_leader *leader)
{
  return is_exact(&leader->node[0]) ? PS_EVALUATE : PS_AHEAD;
}

/* The round's outputs are there, and what they tell. */
static ps_status gather(ps_leader *leader)
{
  ps_status status = ps__gather_round(leader);
  return status == PS_OK ? ps__slope_learn(leader) : status;
}

/* Everything at hand lies ahead, and a lane or the followers evaluate it: nothing for the host. */
static ps_status gather_ahead(ps_leader *leader)
{
  leader->submitted_ns = ps_now_ns();
  leader->phase = PS__ASKING;
  return gather(leader);
}

static ps_status take_turn(ps_leader *leader, const void *x, void *m_out, ps_verdict *verdict)
{
  bool answered = false;
  ps_status status = ps__see_tried(leader, x);
  if (status == PS_OK) {
    status = try_answer(leader, x, m_out, &answered);
  }
  while (status == PS_OK && !answered) {
    /* Step 0 needs the followers in any case: it verifies them. */
    status = begin_round(leader, m_out == NULL && leader->step > 0);
    *verdict = verdict_of(leader);
    if (status != PS_OK || *verdict == PS_EVALUATE || is_hosts(leader, &leader->node[0])) {
      return status;
    }
    status = gather_ahead(leader);
    if (status == PS_OK) {
      status = try_answer(leader, x, m_out, &answered);
    }
  }
  *verdict = PS_ANSWER;
  return status;
}

ps_status ps_leader_ask(ps_leader *leader, int step, const void *x, void *m_out,
                        ps_verdict *verdict)
{
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
  status = take_turn(leader, x, m_out, verdict);
  if (status != PS_OK) {
    leader->phase = PS__BROKEN;
  }
  return status;
}

ps_status ps_leader_amend(ps_leader *leader, const void *x, void *m_out, double *spent)
{
  int step = leader->step;
  *spent = NAN;
  if (leader->phase == PS__EVALUATING) {
    return leader->backend->copy(leader->backend, x_at(leader, step), x,
                                 ps__x_bytes(&leader->layout));
  }
  ps_status status = check_phase(leader, PS__ASKING, "amend");
  const ps__node *node = status == PS_OK && step >= 0 ? ready_node(leader, step) : NULL;
  bool between = status == PS_OK && step >= 0 && node == NULL && ps__is_between(leader, step);
  if (status == PS_OK && ((node == NULL && !between) || m_out == NULL)) {
    status = ps__fail(PS_STATE, "amend: step %d was not answered, or no output was given", step);
  }
  if (status == PS_OK) {
    double gap;
    ps__measured found = {.drift = NAN};
    status = measure(leader, node, x, m_out, &gap, &found);
    *spent = leader->pace.drift_cost[step] * found.drift;
  }
  return status;
}

/* ---- submit ---------------------------------------------------------------------------------- */

ps_status ps_leader_work(ps_leader *leader, ps_work *work)
{
  ps_status status = check_phase(leader, PS__EVALUATING, "work");
  *work = (ps_work){.point_bytes = ps__x_bytes(&leader->layout),
                    .output_bytes = ps__m_bytes(&leader->layout)};
  ps__tell_company(leader, work);
  for (int k = 0; status == PS_OK && k < leader->nodes; ++k) {
    const ps__node *node = &leader->node[k];
    if (is_hosts(leader, node)) {
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

static void record_own(ps_leader *leader, const void *m, int64_t began_ns)
{
  int64_t begin = began_ns != 0 ? began_ns : leader->asked_ns;
  bool ahead = !is_exact(&leader->node[0]);
  leader->submitted_ns = ps_now_ns();
  if (leader->submitted_ns - begin > leader->longest_ns) {
    leader->longest_ns = leader->submitted_ns - begin;
  }
  for (int k = 0; k < leader->nodes; ++k) {
    ps__node *node = &leader->node[k];
    if (is_exact(node)) {
      node->record = ps__report_record(leader, node, begin, leader->submitted_ns);
      node->state = PS__VOID; /* it is in the trajectory, and answered by itself */
    } else if (is_hosts(leader, node)) {
      bool evaluated = !ahead || m == NULL;
      node->state = evaluated ? PS__READY : PS__VOID;
      node->record = evaluated ? ps__report_record(leader, node, begin, leader->submitted_ns) : -1;
      leader->rank[0].spoken = evaluated ? node->slot + 1 : leader->rank[0].spoken;
    }
  }
}

/* The host's output is only on its way where it works on a device: what counts is when it is there,
 * for the followers' deadline and for the report. */
static ps_status await_output(ps_leader *leader, const void *m)
{
  const ps_wait wait = {0, leader->options.check, leader->options.check_ctx};
  return m != NULL ? keep_output(leader, m) : leader->backend->settle(leader->backend, &wait);
}

/* The host's own output at x_j, be it asked for or given in place of what lay ahead. */
static ps_status take_exact(ps_leader *leader)
{
  if (leader->node[0].record >= 0 && is_exact(&leader->node[0])) {
    leader->timeline[leader->node[0].record].accepted = 1;
  }
  count_step(leader);
  ps_status status = make_anchor(leader, leader->step);
  leader->old_anchors = leader->anchors; /* its nodes lie ahead, so that this comes before them */
  return status;
}

ps_status ps_leader_submit(ps_leader *leader, const void *m, ps_dtype m_dtype, int64_t began_ns)
{
  ps_status status = check_phase(leader, PS__EVALUATING, "submit");
  if (status == PS_OK && m == NULL && is_exact(&leader->node[0])) {
    status = ps__fail(PS_STATE, "submit: the output at step %d is needed", leader->step);
  }
  if (status == PS_OK) {
    status = settle_dtype(leader, m_dtype);
  }
  if (status == PS_OK) {
    status = await_output(leader, m);
  }
  if (status != PS_OK) {
    return status;
  }
  record_own(leader, m, began_ns);
  if (m != NULL) {
    status = take_exact(leader);
  } else {
    --leader->step; /* the host asks for it again */
  }
  if (status != PS_OK) {
    return status;
  }
  leader->phase = PS__ASKING;
  return gather(leader);
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
  int j = leader->step;
  ps_status status = check_phase(leader, PS__ASKING, "advance");
  if (status == PS_OK && (j < 0 || j >= leader->program->steps)) {
    status = ps__fail(PS_STATE, "advance: no step of the program has been answered");
  }
  return status == PS_OK ? roll_step(leader, j, z, x_next) : status;
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
  if (rank < (leader->lane ? 0 : 1) || rank >= leader->ranks) {
    return ps__fail(PS_INVALID, "rank %d: must be %d to %d", rank, leader->lane ? 0 : 1,
                    leader->ranks - 1);
  }
  return leader->rank[rank].link != NULL ? ps__leave_out(leader, rank, PS_FAILED, reason) : PS_OK;
}
