/* tray.c - the points and outputs of a link's slots, as the transports keep them. */
#include "transport/tray.h"

ps_status ps__slots_of(const ps_layout *layout, int count, ps__slots *slots)
{
  const size_t room = SIZE_MAX / PS_SLOTS_MAX / 4; /* a block holds both, some twice, and headers */
  ps_status status = ps__layout_check(layout);
  *slots = (ps__slots){.count = count};
  if (status != PS_OK) {
    return status;
  }
  if (count < 1 || count > PS_SLOTS_MAX) {
    return ps__fail(PS_INVALID, "%d slots: must be 1 to %d", count, PS_SLOTS_MAX);
  }
  slots->point = ps__vector_bytes(ps__x_bytes(layout));
  slots->output = ps__vector_bytes(ps__m_bytes(layout));
  if (slots->point > room || slots->output > room) {
    return ps__fail(PS_NO_MEMORY, "latents of %zu bytes do not fit in memory", ps__x_bytes(layout));
  }
  return PS_OK;
}

ps_status ps__tray_open(const ps_layout *layout, int slots, const ps_backend *near,
                        const ps_backend *far, ps__tray *tray)
{
  ps_status status = ps__slots_of(layout, slots, &tray->slots);
  if (status == PS_OK) {
    size_t bytes = ps__points_bytes(&tray->slots) + ps__outputs_bytes(&tray->slots);
    status = near->mirror(near, far, bytes, &tray->mirror);
  }
  return status;
}

void ps__tray_close(const ps__tray *tray, ps_side side)
{
  tray->mirror->ops->close(tray->mirror, side);
}

void *ps__tray_point(const ps__tray *tray, ps_side side, int slot)
{
  return tray->mirror->memory[side] + (size_t)slot * tray->slots.point;
}

void *ps__tray_output(const ps__tray *tray, ps_side side, int slot)
{
  return tray->mirror->memory[side] + ps__points_bytes(&tray->slots) +
         (size_t)slot * tray->slots.output;
}

ps_status ps__tray_send(const ps__tray *tray, ps_side from, const ps_header *message)
{
  const ps__slots *slots = &tray->slots;
  size_t count = (size_t)message->count;
  ps_status status = PS_OK;
  if (ps__has_points(message)) {
    status = tray->mirror->ops->send(tray->mirror, from, 0, count * slots->point);
  }
  if (status == PS_OK && ps__has_outputs(message)) {
    status =
        tray->mirror->ops->send(tray->mirror, from, ps__points_bytes(slots), count * slots->output);
  }
  return status;
}

ps_status ps__tray_settle(const ps__tray *tray, ps_side from, const ps_wait *wait)
{
  return tray->mirror->ops->settle(tray->mirror, from, wait);
}

ps_status ps__tray_receive(const ps__tray *tray, ps_side to)
{
  return tray->mirror->ops->receive(tray->mirror, to);
}
