/* host.c - the transport whose messages the host carries from process to process.
 *
 * leader.c and follower.c use an end through ps_link_ops; the binding, or a C host, sends what the
 * end gives to its carrier and hands in what arrives at its inbox.  End and inbox share a desk,
 * which lives until both are released.  Bytes that arrive are checked here before any of them is
 * written to memory that the core reads; what they mean is checked by the core.
 */
#include <stdio.h>
#include <string.h>

#include "platform/sync.h"
#include "transport/tray.h"

typedef enum desk_state {
  IDLE,    /* leader: nothing was sent.  Follower: nothing arrived */
  AWAITED, /* leader: a message is out, its reply is to come */
  ARRIVED, /* a message waits for this end */
  TAKEN,   /* follower: it is at work */
} desk_state;

struct ps_inbox {
  ps__monitor monitor;
  desk_state state;
  ps_role role;
  ps_layout layout;
  bool end_gone, inbox_gone; /* released on this side */
  bool other_gone;           /* the other end has let go; what arrived before it still counts */
  ps_status lost;            /* PS_OK where it is not, else what became of the other end */
  char why[160];             /* of lost */
  ps_header message;
  ps__tray tray; /* near is the core's side, far the carrier's */
};

typedef ps_inbox desk;

typedef struct end {
  ps_link base;
  desk *desk;
  ps_carrier carrier;
} end;

static desk *desk_of(ps_link *link)
{
  return ((end *)link)->desk;
}

static void close_tray(desk *shared)
{
  ps__tray_close(&shared->tray, PS_NEAR);
  ps__tray_close(&shared->tray, PS_FAR);
}

/* ---- memory ---------------------------------------------------------------------------------- */

static void *link_point(ps_link *link, int slot)
{
  return ps__tray_point(&desk_of(link)->tray, PS_NEAR, slot);
}

static void *link_output(ps_link *link, int slot)
{
  return ps__tray_output(&desk_of(link)->tray, PS_NEAR, slot);
}

static ps_status desk_new(const ps_layout *layout, int slots, ps_role role,
                          const ps_backend *backend, desk **out)
{
  desk *made = ps__alloc(sizeof *made);
  if (made == NULL) {
    return PS_NO_MEMORY;
  }
  made->layout = *layout;
  made->role = role;
  ps_status status = ps__tray_open(layout, slots, backend, ps_backend_find("cpu"), &made->tray);
  if (status != PS_OK) {
    goto fail;
  }
  status = ps__monitor_init(&made->monitor);
  if (status != PS_OK) {
    goto fail_tray;
  }
  *out = made;
  return PS_OK;

fail_tray:
  close_tray(made);
fail:
  ps__free(made);
  return status;
}

/* Marks one of the two as released and frees the desk with the other. */
static void leave_desk(desk *shared, bool *mine)
{
  ps__monitor_enter(&shared->monitor);
  *mine = true;
  bool last = shared->end_gone && shared->inbox_gone;
  ps__monitor_leave(&shared->monitor);
  if (last) {
    close_tray(shared);
    ps__monitor_destroy(&shared->monitor);
    ps__free(shared);
  }
}

/* ---- sending --------------------------------------------------------------------------------- */

enum { PARTS_MAX = 1 + 2 * PS_SLOTS_MAX };

/* The carrier may take Python's lock: no monitor is held here. */
static ps_status send_parts(const end *from, const ps_part *parts, int count)
{
  return from->carrier.send(from->carrier.ctx, parts, count) == PS_OK
             ? PS_OK
             : ps__fail(PS_LOST, "the message could not be sent");
}

/* Brings what the message carries over to where the carrier reads it. */
static ps_status bring_over(const ps__tray *tray, const ps_header *header)
{
  ps_status status = ps__tray_send(tray, PS_NEAR, header);
  if (status == PS_OK) {
    status = ps__tray_settle(tray, PS_NEAR, NULL);
  }
  return status == PS_OK ? ps__tray_receive(tray, PS_FAR) : status;
}

static ps_status send_message(const end *from, const ps_header *header)
{
  desk *own = from->desk;
  ps_part parts[PARTS_MAX] = {{header, sizeof *header}};
  int count = 1;
  ps_status status = bring_over(&own->tray, header);
  for (int slot = 0; ps__has_outputs(header) && slot < header->count; ++slot) {
    parts[count++] = (ps_part){ps__tray_output(&own->tray, PS_FAR, slot), header->bytes};
  }
  for (int slot = 0; ps__has_points(header) && slot < header->count; ++slot) {
    parts[count++] = (ps_part){ps__tray_point(&own->tray, PS_FAR, slot), ps__x_bytes(&own->layout)};
  }
  return status == PS_OK ? send_parts(from, parts, count) : status;
}

static ps_status gone(const desk *own)
{
  if (own->lost != PS_OK) {
    return ps__fail(own->lost, "%s", own->why);
  }
  return ps__fail(PS_LOST, "the %s has left", own->role == PS_LEADS ? "follower" : "leader");
}

/* Moves from one state to another, unless the other end is gone. */
static ps_status shift(desk *own, desk_state from, desk_state to, const char *otherwise)
{
  ps_status status = PS_OK;
  ps__monitor_enter(&own->monitor);
  if (own->lost != PS_OK || own->other_gone) {
    status = gone(own);
  } else if (own->state != from) {
    status = ps__fail(PS_STATE, "%s", otherwise);
  } else {
    own->state = to;
  }
  ps__monitor_leave(&own->monitor);
  return status;
}

/* What arrived goes over to where the core reads it. */
static ps_status take_over(const ps__tray *tray, const ps_header *header)
{
  ps_status status = ps__tray_send(tray, PS_FAR, header);
  return status == PS_OK ? ps__tray_receive(tray, PS_NEAR) : status;
}

/* ---- leader ---------------------------------------------------------------------------------- */

/* The state changes before the message is out: its reply may be quicker than this thread. */
static ps_status leader_post(ps_link *link, const ps_header *message)
{
  ps_status status = PS_OK;
  if (message->kind == PS_MSG_WORK) {
    status = shift(desk_of(link), IDLE, AWAITED, "a message before the reply to the last one");
  }
  return status == PS_OK ? send_message((end *)link, message) : status;
}

static bool waits(const desk *own)
{
  return own->state != ARRIVED && own->lost == PS_OK && !own->other_gone;
}

static ps_status leader_collect(ps_link *link, const ps_wait *wait, ps_header *reply)
{
  desk *own = desk_of(link);
  ps_status status = PS_OK;
  int64_t slice = 0;
  ps__monitor_enter(&own->monitor);
  while (status == PS_OK && waits(own)) {
    status = ps__monitor_wait(&own->monitor, wait, &slice);
  }
  if (own->state == ARRIVED) {
    *reply = own->message;
    own->state = IDLE;
    status = PS_OK;
  } else if (own->lost != PS_OK || own->other_gone) {
    status = gone(own);
  }
  ps__monitor_leave(&own->monitor);
  return status == PS_OK && ps__has_outputs(reply) ? take_over(&own->tray, reply) : status;
}

/* ---- follower -------------------------------------------------------------------------------- */

static ps_status follower_take(ps_link *link, const ps_wait *wait, ps_header *message)
{
  desk *own = desk_of(link);
  ps_status status = PS_OK;
  int64_t slice = 0;
  ps__monitor_enter(&own->monitor);
  while (status == PS_OK && waits(own)) {
    status = ps__monitor_wait(&own->monitor, wait, &slice);
  }
  if (own->lost != PS_OK) {
    status = gone(own);
  } else if (own->state == ARRIVED && !own->other_gone) {
    *message = own->message;
    own->state = message->kind == PS_MSG_WORK ? TAKEN : IDLE;
    status = PS_OK;
  } else if (own->other_gone) {
    *message = ps__done_message();
    status = PS_OK;
  }
  ps__monitor_leave(&own->monitor);
  return status == PS_OK && message->kind == PS_MSG_WORK ? take_over(&own->tray, message) : status;
}

static ps_status follower_reply(ps_link *link, const ps_header *reply)
{
  desk *own = desk_of(link);
  ps_status status = shift(own, TAKEN, IDLE, "a reply to no message");
  if (status == PS_LOST) {
    return ps__fail(PS_ABANDONED, "the leader went on without this follower");
  }
  return status == PS_OK ? send_message((end *)link, reply) : status;
}

/* ---- what arrives ---------------------------------------------------------------------------- */

/* How many bytes a message of this header must have; 0 where it cannot be told. */
static size_t message_bytes(const desk *own, const ps_header *header)
{
  bool work = header->kind == PS_MSG_WORK, output = header->kind == PS_MSG_OUTPUT;
  size_t room = work ? ps__x_bytes(&own->layout) : ps__m_bytes(&own->layout);
  if (!work && !output) {
    return sizeof *header;
  }
  if (header->count < 1 || header->count > own->tray.slots.count || header->bytes > room ||
      (work && header->bytes != room)) {
    return 0;
  }
  size_t slot = (size_t)header->bytes;
  slot += output && ps__has_points(header) ? ps__x_bytes(&own->layout) : 0;
  return sizeof *header + (size_t)header->count * slot;
}

static bool is_for(ps_role role, uint32_t kind)
{
  return role == PS_LEADS ? kind == PS_MSG_OUTPUT || kind == PS_MSG_FAILED
                          : kind == PS_MSG_WORK || kind == PS_MSG_DONE;
}

static ps_status check_message(const desk *own, const ps_header *header, size_t bytes)
{
  desk_state ready = own->role == PS_LEADS ? AWAITED : IDLE;
  if (header->magic != PS_MAGIC || header->version != PS_WIRE_VERSION) {
    return ps__fail(PS_PROTOCOL, "a message that is not parastep's, or of another version");
  }
  if (!is_for(own->role, header->kind)) {
    return ps__fail(PS_PROTOCOL, "a message of kind %u, which is not for this end", header->kind);
  }
  if (bytes != message_bytes(own, header)) {
    return ps__fail(PS_PROTOCOL, "a message of %zu bytes that says %d times %llu", bytes,
                    header->count, (unsigned long long)header->bytes);
  }
  if (own->state != ready && header->kind != PS_MSG_DONE) {
    return ps__fail(PS_PROTOCOL, "a message out of turn");
  }
  return PS_OK;
}

static void take_in(desk *own, const ps_header *header, const unsigned char *payload)
{
  size_t x_bytes = ps__x_bytes(&own->layout);
  for (int slot = 0; ps__has_outputs(header) && slot < header->count; ++slot) {
    memcpy(ps__tray_output(&own->tray, PS_FAR, slot), payload, header->bytes);
    payload += header->bytes;
  }
  for (int slot = 0; ps__has_points(header) && slot < header->count; ++slot) {
    memcpy(ps__tray_point(&own->tray, PS_FAR, slot), payload, x_bytes);
    payload += x_bytes;
  }
  if (header->kind == PS_MSG_DONE) {
    own->other_gone = true;
  } else {
    own->message = *header;
    own->state = ARRIVED;
  }
}

static void lose(desk *own, ps_status how, const char *why)
{
  if (own->lost == PS_OK) {
    own->lost = how;
    snprintf(own->why, sizeof own->why, "%s", why);
  }
}

/* Inside the monitor: the core reads the slots in the states in which nothing may arrive. */
static ps_status deliver(desk *own, const unsigned char *message, size_t bytes)
{
  ps_header header;
  if (own->end_gone || own->lost != PS_OK || own->other_gone) {
    return PS_OK;
  }
  if (bytes == 0) {
    own->other_gone = true;
    return PS_OK;
  }
  if (bytes < sizeof header) {
    return ps__fail(PS_PROTOCOL, "a message of %zu bytes is shorter than a header", bytes);
  }
  memcpy(&header, message, sizeof header);
  ps_status status = check_message(own, &header, bytes);
  if (status == PS_OK) {
    take_in(own, &header, message + sizeof header);
  }
  return status;
}

ps_status ps_inbox_deliver(ps_inbox *inbox, const void *message, size_t bytes)
{
  ps__monitor_enter(&inbox->monitor);
  ps_status status = deliver(inbox, message, bytes);
  if (status != PS_OK) {
    lose(inbox, PS_LOST, ps_last_error());
  }
  ps__monitor_notify(&inbox->monitor);
  ps__monitor_leave(&inbox->monitor);
  return status;
}

static void tell(ps_inbox *inbox, ps_status how, const char *why)
{
  ps__monitor_enter(&inbox->monitor);
  lose(inbox, how, why);
  ps__monitor_notify(&inbox->monitor);
  ps__monitor_leave(&inbox->monitor);
}

void ps_inbox_lost(ps_inbox *inbox, const char *why)
{
  tell(inbox, PS_LOST, why);
}

void ps_inbox_failed(ps_inbox *inbox, const char *why)
{
  tell(inbox, PS_FAILED, why);
}

void ps_inbox_release(ps_inbox *inbox)
{
  if (inbox != NULL) {
    leave_desk(inbox, &inbox->inbox_gone);
  }
}

/* ---- life ------------------------------------------------------------------------------------ */

/* The other end learns of it, unless it is gone or said so itself. */
static void link_close(ps_link *link)
{
  end *own = (end *)link;
  ps__monitor_enter(&own->desk->monitor);
  bool listens = own->desk->lost == PS_OK && !own->desk->other_gone;
  ps__monitor_leave(&own->desk->monitor);
  if (listens) {
    send_parts(own, NULL, 0);
  }
  if (own->carrier.release != NULL) {
    own->carrier.release(own->carrier.ctx);
  }
  leave_desk(own->desk, &own->desk->end_gone);
  ps__free(own);
}

static const ps_link_ops leader_ops = {
    .transport = "host",
    .point = link_point,
    .output = link_output,
    .post = leader_post,
    .collect = leader_collect,
    .close = link_close,
};

static const ps_link_ops follower_ops = {
    .transport = "host",
    .point = link_point,
    .output = link_output,
    .take = follower_take,
    .reply = follower_reply,
    .close = link_close,
};

ps_status ps_host_open(const ps_layout *layout, int slots, ps_role role, int same_clock,
                       const ps_backend *backend, const ps_carrier *carrier, ps_link **link,
                       ps_inbox **inbox)
{
  end *made = NULL;
  *link = NULL;
  *inbox = NULL;
  ps_status status = PS_OK;
  if (role != PS_LEADS && role != PS_FOLLOWS) {
    status = ps__fail(PS_INVALID, "role %d: must be PS_LEADS or PS_FOLLOWS", (int)role);
    goto fail;
  }
  desk *shared;
  made = ps__alloc(sizeof *made);
  status = made != NULL ? desk_new(layout, slots, role, backend, &shared) : PS_NO_MEMORY;
  if (status != PS_OK) {
    goto fail;
  }
  *made = (end){
      .base = {.ops = role == PS_LEADS ? &leader_ops : &follower_ops,
               .slots = slots,
               .same_clock = same_clock},
      .desk = shared,
      .carrier = *carrier,
  };
  *link = &made->base;
  *inbox = shared;
  return PS_OK;

fail:
  ps__free(made);
  if (carrier->release != NULL) {
    carrier->release(carrier->ctx);
  }
  return status;
}
