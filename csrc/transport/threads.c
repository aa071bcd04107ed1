/* threads.c - the transport for ranks that are threads of one process.
 *
 * leader.c and follower.c use it through ps_link_ops.  Both ends share one channel: a message is a
 * change of state under its monitor, points and outputs lie in a mirror of the two backends.  Where
 * the ranks share memory they stay where they are; else they are on their way before the message is
 * seen, and every side's further work is in order behind them.  Channel and mirror live until both
 * ends have let go, so that a follower that was given up, still inside its denoiser, holds memory
 * that is its own.
 */
#include <stdio.h>
#include <string.h>

#include "platform/sync.h"
#include "transport/tray.h"

typedef enum channel_state {
  EMPTY,   /* nothing said yet, or the last reply was collected */
  POSTED,  /* a message waits for the follower */
  TAKEN,   /* the follower is at work */
  REPLIED, /* a reply waits for the leader */
} channel_state;

typedef struct channel {
  ps__monitor monitor;
  channel_state state;
  bool leader_gone, follower_gone;
  ps_header message, reply;
  ps__tray tray; /* near is the leader's side */
} channel;

typedef struct end {
  ps_link base;
  channel *channel;
  ps_side side;
} end;

static channel *channel_of(ps_link *link)
{
  return ((end *)link)->channel;
}

/* ---- memory ---------------------------------------------------------------------------------- */

static void *link_point(ps_link *link, int slot)
{
  return ps__tray_point(&channel_of(link)->tray, ((end *)link)->side, slot);
}

static void *link_output(ps_link *link, int slot)
{
  return ps__tray_output(&channel_of(link)->tray, ((end *)link)->side, slot);
}

static ps_status channel_new(const ps_layout *layout, int slots, const ps_backend *leader,
                             const ps_backend *follower, channel **made)
{
  channel *shared = ps__alloc(sizeof *shared);
  if (shared == NULL) {
    return PS_NO_MEMORY;
  }
  ps_status status = ps__tray_open(layout, slots, leader, follower, &shared->tray);
  if (status != PS_OK) {
    goto fail;
  }
  status = ps__monitor_init(&shared->monitor);
  if (status != PS_OK) {
    goto fail_tray;
  }
  *made = shared;
  return PS_OK;

fail_tray:
  ps__tray_close(&shared->tray, PS_NEAR);
  ps__tray_close(&shared->tray, PS_FAR);
fail:
  ps__free(shared);
  return status;
}

static void channel_free(channel *shared)
{
  ps__monitor_destroy(&shared->monitor);
  ps__free(shared);
}

/* ---- leader ---------------------------------------------------------------------------------- */

/* Whether a message may be posted.  Only the leader posts, so that a yes stays one. */
static ps_status may_post(channel *shared)
{
  ps_status status = PS_OK;
  ps__monitor_enter(&shared->monitor);
  if (shared->follower_gone) {
    status = ps__fail(PS_LOST, "the follower has left");
  } else if (shared->state != EMPTY) {
    status = ps__fail(PS_STATE, "a message before the reply to the last one");
  }
  ps__monitor_leave(&shared->monitor);
  return status;
}

static ps_status leader_post(ps_link *link, const ps_header *message)
{
  channel *shared = channel_of(link);
  ps_status status = may_post(shared);
  if (status == PS_OK) {
    status = ps__tray_send(&shared->tray, PS_NEAR, message);
  }
  if (status == PS_OK) {
    ps__monitor_enter(&shared->monitor);
    shared->message = *message;
    shared->state = POSTED;
    ps__monitor_notify(&shared->monitor);
    ps__monitor_leave(&shared->monitor);
  }
  return status;
}

static ps_status leader_collect(ps_link *link, const ps_wait *wait, ps_header *reply)
{
  channel *shared = channel_of(link);
  ps_status status = PS_OK;
  int64_t slice = 0;
  ps__monitor_enter(&shared->monitor);
  while (status == PS_OK && shared->state != REPLIED && !shared->follower_gone) {
    status = ps__monitor_wait(&shared->monitor, wait, &slice);
  }
  if (shared->state == REPLIED) {
    *reply = shared->reply;
    shared->state = EMPTY;
    status = PS_OK;
  } else if (status == PS_OK) {
    status = ps__fail(PS_LOST, "the follower has left");
  }
  ps__monitor_leave(&shared->monitor);
  return status == PS_OK ? ps__tray_receive(&shared->tray, PS_NEAR) : status;
}

/* ---- follower -------------------------------------------------------------------------------- */

static ps_status follower_take(ps_link *link, const ps_wait *wait, ps_header *message)
{
  channel *shared = channel_of(link);
  ps_status status = PS_OK;
  int64_t slice = 0;
  ps__monitor_enter(&shared->monitor);
  while (status == PS_OK && shared->state != POSTED && !shared->leader_gone) {
    status = ps__monitor_wait(&shared->monitor, wait, &slice);
  }
  if (shared->leader_gone) {
    *message = ps__done_message();
    status = PS_OK;
  } else if (shared->state == POSTED) {
    *message = shared->message;
    shared->state = TAKEN;
    status = PS_OK;
  }
  ps__monitor_leave(&shared->monitor);
  return status == PS_OK && message->kind == PS_MSG_WORK ? ps__tray_receive(&shared->tray, PS_FAR)
                                                         : status;
}

/* A reply to the message that was taken can be made: the leader is still there. */
static ps_status may_reply(channel *shared)
{
  ps_status status = PS_OK;
  ps__monitor_enter(&shared->monitor);
  if (shared->leader_gone) {
    status = ps__fail(PS_ABANDONED, "the leader went on without this follower");
  } else if (shared->state != TAKEN) {
    status = ps__fail(PS_STATE, "a reply to no message");
  }
  ps__monitor_leave(&shared->monitor);
  return status;
}

static int leader_has_left(void *ctx)
{
  channel *shared = ctx;
  ps__monitor_enter(&shared->monitor);
  bool gone = shared->leader_gone;
  ps__monitor_leave(&shared->monitor);
  return gone;
}

/* The follower waits for its own device, so that the leader, which waits for a reply with a
 * deadline, never comes to wait for a device that hangs. */
static ps_status send_outputs(channel *shared, const ps_header *reply)
{
  ps_wait wait = {0, leader_has_left, shared};
  ps_status status = ps__tray_send(&shared->tray, PS_FAR, reply);
  if (status == PS_OK) {
    status = ps__tray_settle(&shared->tray, PS_FAR, &wait);
  }
  if (status == PS_INTERRUPTED) {
    status = ps__fail(PS_ABANDONED, "the leader went on without this follower");
  }
  return status;
}

/* Outputs that cannot be sent are a reply too: the leader learns at once, and why. */
static void make_failed(ps_header *reply)
{
  reply->kind = PS_MSG_FAILED;
  snprintf(reply->text, sizeof reply->text, "%s", ps_last_error());
}

static ps_status follower_reply(ps_link *link, const ps_header *reply)
{
  channel *shared = channel_of(link);
  ps_header made = *reply;
  ps_status status = may_reply(shared);
  if (status != PS_OK) {
    return status;
  }
  if (reply->kind == PS_MSG_OUTPUT) {
    status = send_outputs(shared, reply);
    made.ended_ns = ps_now_ns(); /* outputs are there only now */
  }
  if (status != PS_OK) {
    make_failed(&made);
  }
  ps__monitor_enter(&shared->monitor);
  if (shared->leader_gone) {
    status = ps__fail(PS_ABANDONED, "the leader went on without this follower");
  } else {
    shared->reply = made;
    shared->state = REPLIED;
    ps__monitor_notify(&shared->monitor);
  }
  ps__monitor_leave(&shared->monitor);
  return status;
}

/* ---- both ------------------------------------------------------------------------------------ */

static void close_end(ps_link *link, bool leader)
{
  channel *shared = channel_of(link);
  ps__tray_close(&shared->tray, leader ? PS_NEAR : PS_FAR);
  ps__monitor_enter(&shared->monitor);
  bool last = leader ? shared->follower_gone : shared->leader_gone;
  shared->leader_gone = shared->leader_gone || leader;
  shared->follower_gone = shared->follower_gone || !leader;
  ps__monitor_notify(&shared->monitor);
  ps__monitor_leave(&shared->monitor);
  if (last) {
    channel_free(shared);
  }
  ps__free(link);
}

static void leader_close(ps_link *link)
{
  close_end(link, true);
}

static void follower_close(ps_link *link)
{
  close_end(link, false);
}

static const ps_link_ops leader_ops = {
    .transport = "threads",
    .point = link_point,
    .output = link_output,
    .post = leader_post,
    .collect = leader_collect,
    .close = leader_close,
};

static const ps_link_ops follower_ops = {
    .transport = "threads",
    .point = link_point,
    .output = link_output,
    .take = follower_take,
    .reply = follower_reply,
    .close = follower_close,
};

static end *end_new(const ps_link_ops *ops, channel *shared, ps_side side)
{
  end *made = ps__alloc(sizeof *made);
  if (made != NULL) {
    ps_link base = {.ops = ops, .slots = shared->tray.slots.count, .same_clock = 1};
    *made = (end){.base = base, .channel = shared, .side = side};
  }
  return made;
}

ps_status ps_threads_open(const ps_layout *layout, int slots, ps_link **leader_end,
                          ps_link **follower_end)
{
  const ps_backend *cpu = ps_backend_find("cpu");
  return ps_threads_open_on(layout, slots, cpu, cpu, leader_end, follower_end);
}

ps_status ps_threads_open_on(const ps_layout *layout, int slots, const ps_backend *leader_backend,
                             const ps_backend *follower_backend, ps_link **leader_end,
                             ps_link **follower_end)
{
  *leader_end = *follower_end = NULL;
  if (strcmp(leader_backend->name, follower_backend->name) != 0) {
    return ps__fail(PS_DEVICE,
                    "a leader on %s and a follower on %s: all ranks must be on the CPU, "
                    "or all on CUDA devices",
                    leader_backend->name, follower_backend->name);
  }
  channel *shared;
  ps_status status = channel_new(layout, slots, leader_backend, follower_backend, &shared);
  if (status != PS_OK) {
    return status;
  }
  end *leader = end_new(&leader_ops, shared, PS_NEAR);
  if (leader == NULL) {
    goto fail_channel;
  }
  end *follower = end_new(&follower_ops, shared, PS_FAR);
  if (follower == NULL) {
    goto fail_leader;
  }
  *leader_end = &leader->base;
  *follower_end = &follower->base;
  return PS_OK;

fail_leader:
  ps__free(leader);
fail_channel:
  ps__tray_close(&shared->tray, PS_NEAR);
  ps__tray_close(&shared->tray, PS_FAR);
  channel_free(shared);
  return PS_NO_MEMORY;
}
