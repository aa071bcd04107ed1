/* tray.h - the points and outputs of a link's slots: how far apart they lie, and one block of them
 * that both sides reach.
 *
 * Used by all transports.  What a message carries besides its header is decided here: points where
 * it is work, outputs where it is a reply, and points again where that says MOVED.
 */
#ifndef PS_TRAY_H
#define PS_TRAY_H

#include "core/base.h"
#include "parastep_backend.h"
#include "parastep_transport.h"

/* Bytes from one slot's to the next one's. */
typedef struct ps__slots {
  int count;
  size_t point, output;
} ps__slots;

/* PS_INVALID and PS_NO_MEMORY for what cannot be. */
ps_status ps__slots_of(const ps_layout *layout, int count, ps__slots *slots);

static inline size_t ps__points_bytes(const ps__slots *slots)
{
  return (size_t)slots->count * slots->point;
}

static inline size_t ps__outputs_bytes(const ps__slots *slots)
{
  return (size_t)slots->count * slots->output;
}

static inline bool ps__has_outputs(const ps_header *message)
{
  return message->kind == PS_MSG_OUTPUT;
}

static inline bool ps__has_points(const ps_header *message)
{
  return message->kind == PS_MSG_WORK ||
         (message->kind == PS_MSG_OUTPUT && message->flags & PS_FLAG_MOVED);
}

/* What a follower hears where the leader has let go without a word. */
static inline ps_header ps__done_message(void)
{
  return (ps_header){.magic = PS_MAGIC, .version = PS_WIRE_VERSION, .kind = PS_MSG_DONE};
}

/* Points of all slots, then their outputs, in memory of two backends. */
typedef struct ps__tray {
  ps__slots slots;
  ps_mirror *mirror;
} ps__tray;

ps_status ps__tray_open(const ps_layout *layout, int slots, const ps_backend *near,
                        const ps_backend *far, ps__tray *tray);
void ps__tray_close(const ps__tray *tray, ps_side side); /* once for each side */

void *ps__tray_point(const ps__tray *tray, ps_side side, int slot);
void *ps__tray_output(const ps__tray *tray, ps_side side, int slot);

/* What the message carries goes over to the other side; as ps_mirror_ops.send. */
ps_status ps__tray_send(const ps__tray *tray, ps_side from, const ps_header *message);
ps_status ps__tray_settle(const ps__tray *tray, ps_side from, const ps_wait *wait);
ps_status ps__tray_receive(const ps__tray *tray, ps_side to);

#endif
