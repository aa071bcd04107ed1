/* threads.c - the transport for ranks that are threads of one process.
 *
 * leader.c and follower.c use it through ps_link_ops.  Both ends share one channel: points and
 * outputs stay where they are, a message is a change of state under the channel's monitor.  The
 * channel lives until both ends have let go, so that a follower that was given up, still inside its
 * denoiser, holds memory that is its own.
 */
#include <string.h>

#include "core/internal.h"
#include "platform/sync.h"

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
  int slots;
  ps_header message, reply;
  void *point[PS_SLOTS_MAX], *output[PS_SLOTS_MAX];
} channel;

typedef struct end {
  ps_link base;
  channel *channel;
} end;

static channel *channel_of(ps_link *link)
{
  return ((end *)link)->channel;
}

/* ---- memory ---------------------------------------------------------------------------------- */

static void *link_point(ps_link *link, int slot)
{
  return channel_of(link)->point[slot];
}

static void *link_output(ps_link *link, int slot)
{
  return channel_of(link)->output[slot];
}

static channel *carve_channel(const ps_layout *layout, int slots, ps__arena *arena)
{
  channel *shared = ps__carve(arena, 1, sizeof *shared);
  for (int slot = 0; slot < slots; ++slot) {
    void *point = ps__carve_vector(arena, ps__x_bytes(layout));
    void *output = ps__carve_vector(arena, ps__m_bytes(layout));
    if (shared != NULL) {
      shared->point[slot] = point;
      shared->output[slot] = output;
    }
  }
  return shared;
}

static channel *channel_new(const ps_layout *layout, int slots)
{
  ps__arena arena = {NULL, 0};
  carve_channel(layout, slots, &arena);
  arena.base = ps__alloc(arena.used);
  arena.used = 0;
  if (arena.base == NULL) {
    return NULL;
  }
  channel *shared = carve_channel(layout, slots, &arena);
  shared->slots = slots;
  if (ps__monitor_init(&shared->monitor) != PS_OK) {
    ps__free(shared);
    return NULL;
  }
  return shared;
}

static void channel_free(channel *shared)
{
  ps__monitor_destroy(&shared->monitor);
  ps__free(shared);
}

/* ---- leader ---------------------------------------------------------------------------------- */

static ps_status leader_post(ps_link *link, const ps_header *message)
{
  channel *shared = channel_of(link);
  ps_status status = PS_OK;
  ps__monitor_enter(&shared->monitor);
  if (shared->follower_gone) {
    status = ps__fail(PS_LOST, "the follower has left");
  } else if (shared->state != EMPTY) {
    status = ps__fail(PS_STATE, "a message before the reply to the last one");
  } else {
    shared->message = *message;
    shared->state = POSTED;
    ps__monitor_notify(&shared->monitor);
  }
  ps__monitor_leave(&shared->monitor);
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
  return status;
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
    memset(message, 0, sizeof *message);
    message->magic = PS_MAGIC;
    message->version = PS_WIRE_VERSION;
    message->kind = PS_MSG_DONE;
    status = PS_OK;
  } else if (shared->state == POSTED) {
    *message = shared->message;
    shared->state = TAKEN;
    status = PS_OK;
  }
  ps__monitor_leave(&shared->monitor);
  return status;
}

static ps_status follower_reply(ps_link *link, const ps_header *reply)
{
  channel *shared = channel_of(link);
  ps_status status = PS_OK;
  ps__monitor_enter(&shared->monitor);
  if (shared->leader_gone) {
    status = ps__fail(PS_ABANDONED, "the leader went on without this follower");
  } else if (shared->state != TAKEN) {
    status = ps__fail(PS_STATE, "a reply to no message");
  } else {
    shared->reply = *reply;
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

static end *end_new(const ps_link_ops *ops, channel *shared, int slots)
{
  end *made = ps__alloc(sizeof *made);
  if (made != NULL) {
    *made = (end){.base = {.ops = ops, .slots = slots, .same_clock = 1}, .channel = shared};
  }
  return made;
}

ps_status ps_threads_open(const ps_layout *layout, int slots, ps_link **leader_end,
                          ps_link **follower_end)
{
  *leader_end = *follower_end = NULL;
  ps_status status = ps__layout_check(layout);
  if (status != PS_OK) {
    return status;
  }
  if (slots < 1 || slots > PS_SLOTS_MAX) {
    return ps__fail(PS_INVALID, "%d slots: must be 1 to %d", slots, PS_SLOTS_MAX);
  }
  channel *shared = channel_new(layout, slots);
  if (shared == NULL) {
    goto fail;
  }
  end *leader = end_new(&leader_ops, shared, slots);
  if (leader == NULL) {
    goto fail_channel;
  }
  end *follower = end_new(&follower_ops, shared, slots);
  if (follower == NULL) {
    goto fail_leader;
  }
  *leader_end = &leader->base;
  *follower_end = &follower->base;
  return PS_OK;

fail_leader:
  ps__free(leader);
fail_channel:
  channel_free(shared);
fail:
  return PS_NO_MEMORY;
}
