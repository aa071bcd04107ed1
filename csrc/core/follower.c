/* follower.c - a follower of a run: takes work, hands in outputs, keeps nothing.
 *
 * Used by whoever runs a replica: ps_serve in loop.c, the binding's threads.  It can be lost at any
 * moment; the run does not need it.
 */
#include <stdio.h>

#include "core/internal.h"

struct ps_follower {
  ps_layout layout;
  ps_link *link;
  ps_header work; /* what is being evaluated; count is 0 between submit and next */
  int64_t taken_ns;
};

ps_status ps_follower_create(const ps_layout *layout, ps_link *link, ps_follower **out)
{
  *out = NULL;
  ps_status status = ps__layout_check(layout);
  ps_follower *follower = status == PS_OK ? ps__alloc(sizeof *follower) : NULL;
  if (follower == NULL) {
    link->ops->close(link);
    return status != PS_OK ? status : PS_NO_MEMORY;
  }
  follower->layout = *layout;
  follower->link = link;
  *out = follower;
  return PS_OK;
}

void ps_follower_destroy(ps_follower *follower)
{
  if (follower != NULL) {
    follower->link->ops->close(follower->link);
    ps__free(follower);
  }
}

static ps_status check_work(const ps_follower *follower, const ps_header *work)
{
  if (work->magic != PS_MAGIC || work->version != PS_WIRE_VERSION) {
    return ps__fail(PS_PROTOCOL, "a message that is not parastep's, or of another version");
  }
  if (work->kind == PS_MSG_DONE) {
    return PS_OK;
  }
  if (work->kind != PS_MSG_WORK || work->count < 1 || work->count > follower->link->slots) {
    return ps__fail(PS_PROTOCOL, "a message of kind %u with %d steps for %d slots", work->kind,
                    work->count, follower->link->slots);
  }
  if (work->dtype != (uint32_t)follower->layout.x ||
      work->bytes != ps__x_bytes(&follower->layout)) {
    return ps__fail(PS_PROTOCOL, "points of %s (%llu bytes) where this rank has %s (%zu bytes)",
                    ps_dtype_name((ps_dtype)work->dtype), (unsigned long long)work->bytes,
                    ps_dtype_name(follower->layout.x), ps__x_bytes(&follower->layout));
  }
  return PS_OK;
}

ps_status ps_follower_next(ps_follower *follower, const ps_wait *wait, ps_work *work)
{
  static const ps_wait forever = {0, NULL, NULL};
  ps_link *link = follower->link;
  *work = (ps_work){.point_bytes = ps__x_bytes(&follower->layout),
                    .output_bytes = ps__m_bytes(&follower->layout)};
  if (follower->work.count != 0) {
    return ps__fail(PS_STATE, "next: the outputs of the last work were not submitted");
  }
  ps_status status = link->ops->take(link, wait != NULL ? wait : &forever, &follower->work);
  if (status == PS_OK) {
    status = check_work(follower, &follower->work);
  }
  if (status != PS_OK || follower->work.kind == PS_MSG_DONE) {
    follower->work.count = 0;
    return status;
  }
  follower->taken_ns = ps_now_ns();
  work->count = follower->work.count;
  work->round = follower->work.round;
  work->followers = (int)follower->work.followers;
  work->exact = (follower->work.flags & PS_FLAG_EXACT) != 0;
  for (int slot = 0; slot < work->count; ++slot) {
    work->step[slot] = follower->work.step[slot];
    work->point[slot] = link->ops->point(link, slot);
    work->output[slot] = link->ops->output(link, slot);
  }
  return PS_OK;
}

/* The reply repeats what it answers, so that the leader can tell it from any other. */
static ps_status send_reply(ps_follower *follower, ps_header *reply)
{
  ps_link *link = follower->link;
  reply->magic = PS_MAGIC;
  reply->version = PS_WIRE_VERSION;
  reply->run = follower->work.run;
  reply->round = follower->work.round;
  reply->count = follower->work.count;
  for (int slot = 0; slot < reply->count; ++slot) {
    reply->step[slot] = follower->work.step[slot];
  }
  follower->work.count = 0;
  return link->ops->reply(link, reply);
}

ps_status ps_follower_submit(ps_follower *follower, ps_dtype m_dtype, int moved, int64_t began_ns)
{
  size_t bytes = follower->layout.items * follower->layout.size * ps_dtype_size(m_dtype);
  if (follower->work.count == 0) {
    return ps__fail(PS_STATE, "submit: no work was taken");
  }
  if (bytes == 0 || bytes > ps__m_bytes(&follower->layout)) {
    return ps__fail(PS_DTYPE, "outputs of %s do not fit: %zu bytes where there is room for %zu",
                    ps_dtype_name(m_dtype), bytes, ps__m_bytes(&follower->layout));
  }
  ps_header reply = {
      .kind = PS_MSG_OUTPUT,
      .flags = moved ? PS_FLAG_MOVED : 0,
      .dtype = m_dtype,
      .bytes = bytes,
      .began_ns = began_ns != 0 ? began_ns : follower->taken_ns,
      .ended_ns = ps_now_ns(),
  };
  return send_reply(follower, &reply);
}

ps_status ps_follower_fail(ps_follower *follower, const char *why)
{
  ps_status status = PS_OK;
  ps_header reply = {.kind = PS_MSG_FAILED};
  snprintf(reply.text, sizeof reply.text, "%s", why);
  if (follower->work.count == 0) {
    ps_work work;
    status = ps_follower_next(follower, NULL, &work);
  }
  return status == PS_OK && follower->work.count != 0 ? send_reply(follower, &reply) : status;
}
