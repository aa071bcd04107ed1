/* test_links.c - the contract of a link, for each transport whose two ends one process can open:
 * what each end may say when, what arrives, and who frees what.
 *
 * Not for nccl: its ends meet from two threads, a deadline ends the pair, and of a follower that
 * left only a deadline tells (test_nccl.c).
 */
#include <string.h>

#include "runner.h"
#include "stage.h"

typedef ps_status opener(const ps_layout *layout, int slots, ps_link **leader_end,
                         ps_link **follower_end);

/* A test for each transport, named by it; the body opens links by `open`. */
#define LINK_TEST(name)                                                                            \
  static void check_##name(opener *open);                                                          \
  TEST(threads_##name)                                                                             \
  {                                                                                                \
    check_##name(ps_threads_open);                                                                 \
  }                                                                                                \
  TEST(host_##name)                                                                                \
  {                                                                                                \
    check_##name(stage_host_open);                                                                 \
  }                                                                                                \
  static void check_##name(opener *open)

static const ps_wait at_once = {1, NULL, NULL}; /* a deadline long past */

/* ---- messages -------------------------------------------------------------------------------- */

LINK_TEST(a_message_and_its_reply)
{
  ps_link *here, *there;
  ps_header message, reply = stage_output;
  CHECK_OK(open(&stage_small, 2, &here, &there));
  CHECK_STR(here->ops->transport, open == ps_threads_open ? "threads" : "host");
  CHECK_EQ(here->slots, 2);
  CHECK_EQ(there->slots, 2);
  CHECK(here->same_clock && there->same_clock);
  CHECK_STATUS(there->ops->take(there, &at_once, &message), PS_DEADLINE);
  CHECK_STATUS(there->ops->reply(there, &reply), PS_STATE);
  memset(here->ops->point(here, 0), 3, 4 * sizeof(float));
  CHECK_OK(here->ops->post(here, &stage_hello));
  CHECK_STATUS(here->ops->post(here, &stage_hello), PS_STATE);
  CHECK_STATUS(here->ops->collect(here, &at_once, &message), PS_DEADLINE);
  CHECK_OK(there->ops->take(there, &at_once, &message));
  CHECK_EQ(message.round, 7);
  CHECK_EQ(*(unsigned char *)there->ops->point(there, 0), 3);
  CHECK_STATUS(here->ops->post(here, &stage_hello), PS_STATE);
  memset(there->ops->output(there, 0), 5, 4 * sizeof(double));
  memset(there->ops->point(there, 0), 6, 4 * sizeof(float));
  reply.flags = PS_FLAG_MOVED;
  CHECK_OK(there->ops->reply(there, &reply));
  CHECK_STATUS(there->ops->reply(there, &reply), PS_STATE);
  CHECK_STATUS(here->ops->post(here, &stage_hello), PS_STATE); /* the reply comes first */
  CHECK_OK(here->ops->collect(here, &at_once, &message));
  CHECK_EQ(message.kind, PS_MSG_OUTPUT);
  CHECK_EQ(((unsigned char *)here->ops->output(here, 0))[31], 5);
  CHECK_EQ(((unsigned char *)here->ops->point(here, 0))[15], 6);
  CHECK_OK(here->ops->post(here, &stage_hello));
  here->ops->close(here);
  there->ops->close(there);
}

/* Threads share the memory of a slot; else each end has its own, which a message takes over. */
LINK_TEST(points_and_outputs_lie_apart)
{
  enum { SLOTS = 3 };
  bool shared = open == ps_threads_open;
  ps_link *here, *there;
  CHECK_OK(open(&stage_small, SLOTS, &here, &there));
  for (int slot = 0; slot < SLOTS; ++slot) {
    CHECK_EQ(here->ops->point(here, slot) == there->ops->point(there, slot), shared);
    CHECK_EQ(here->ops->output(here, slot) == there->ops->output(there, slot), shared);
    memset(here->ops->point(here, slot), 1 + slot, 4 * sizeof(float));
    memset(here->ops->output(here, slot), 16 + slot, 4 * sizeof(double));
  }
  for (int slot = 0; slot < SLOTS; ++slot) {
    const char *point = here->ops->point(here, slot), *output = here->ops->output(here, slot);
    CHECK(point[0] == 1 + slot && point[4 * sizeof(float) - 1] == 1 + slot);
    CHECK(output[0] == 16 + slot && output[4 * sizeof(double) - 1] == 16 + slot);
    CHECK(shared || *(char *)there->ops->point(there, slot) == 0);
  }
  here->ops->close(here);
  there->ops->close(there);
}

/* ---- the end --------------------------------------------------------------------------------- */

LINK_TEST(the_leader_learns_that_a_follower_left)
{
  ps_link *here, *there;
  ps_header reply;
  CHECK_OK(open(&stage_small, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &stage_hello));
  there->ops->close(there);
  CHECK_STATUS(here->ops->collect(here, &at_once, &reply), PS_LOST);
  CHECK_STATUS(here->ops->post(here, &stage_hello), PS_LOST);
  memset(here->ops->output(here, 0), 1, 4 * sizeof(double)); /* still there */
  here->ops->close(here);
}

/* A reply that was made is not lost with who made it. */
LINK_TEST(a_last_reply_is_collected)
{
  ps_link *here, *there;
  ps_header message;
  CHECK_OK(open(&stage_small, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &stage_hello));
  CHECK_OK(there->ops->take(there, &at_once, &message));
  CHECK_OK(there->ops->reply(there, &stage_output));
  there->ops->close(there);
  CHECK_OK(here->ops->collect(here, &at_once, &message));
  CHECK_EQ(message.kind, PS_MSG_OUTPUT);
  CHECK_STATUS(here->ops->collect(here, &at_once, &message), PS_LOST);
  here->ops->close(here);
}

LINK_TEST(the_follower_learns_that_the_leader_left)
{
  ps_link *here, *there;
  ps_header message;
  CHECK_OK(open(&stage_small, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &stage_hello));
  CHECK_OK(there->ops->take(there, &at_once, &message));
  here->ops->close(here);
  memset(there->ops->output(there, 0), 1, 4 * sizeof(double)); /* still there */
  CHECK_STATUS(there->ops->reply(there, &stage_output), PS_ABANDONED);
  CHECK_OK(there->ops->take(there, &at_once, &message));
  CHECK_EQ(message.kind, PS_MSG_DONE);
  there->ops->close(there);
}

/* Work that nobody took before the leader left is not done any more. */
LINK_TEST(work_of_a_leader_who_left)
{
  ps_link *here, *there;
  ps_header message;
  CHECK_OK(open(&stage_small, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &stage_hello));
  here->ops->close(here);
  CHECK_OK(there->ops->take(there, &at_once, &message));
  CHECK_EQ(message.kind, PS_MSG_DONE);
  there->ops->close(there);
}

static void *close_there(void *there)
{
  ((ps_link *)there)->ops->close(there);
  return NULL;
}

/* Whoever comes last frees; for the sanitizers. */
LINK_TEST(both_ends_close_at_once)
{
  for (int k = 0; k < 200; ++k) {
    ps_link *here, *there;
    pthread_t thread;
    CHECK_OK(open(&stage_small, 1, &here, &there));
    CHECK_EQ(pthread_create(&thread, NULL, close_there, there), 0);
    here->ops->close(here);
    CHECK_EQ(pthread_join(thread, NULL), 0);
  }
}

static ps_status open_and_close(void *open)
{
  ps_link *here, *there;
  ps_status status = (*(opener **)open)(&stage_small, 2, &here, &there);
  if (status == PS_OK) {
    here->ops->close(here);
    there->ops->close(there);
  }
  return status;
}

LINK_TEST(opening_without_memory)
{
  runner_sweep(open_and_close, &open);
}
