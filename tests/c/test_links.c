/* test_threads.c - the threads transport by itself: what each end may say when, and who frees what.
 */
#include <string.h>

#include "runner.h"
#include "stage.h"

static const ps_layout layout = {1, 4, PS_F32, PS_F64};
static const ps_wait at_once = {1, NULL, NULL}; /* a deadline long past */
static const ps_header hello = {.kind = PS_MSG_WORK, .count = 1, .round = 7};

/* ---- messages -------------------------------------------------------------------------------- */

TEST(a_message_and_its_reply)
{
  ps_link *here, *there;
  ps_header message, reply = {.kind = PS_MSG_OUTPUT, .round = 7};
  CHECK_OK(ps_threads_open(&layout, 2, &here, &there));
  CHECK_EQ(here->slots, 2);
  CHECK_EQ(there->slots, 2);
  CHECK(here->same_clock && there->same_clock);
  CHECK_STATUS(there->ops->take(there, &at_once, &message), PS_DEADLINE);
  CHECK_STATUS(there->ops->reply(there, &reply), PS_STATE);
  CHECK_OK(here->ops->post(here, &hello));
  CHECK_STATUS(here->ops->post(here, &hello), PS_STATE);
  CHECK_STATUS(here->ops->collect(here, &at_once, &reply), PS_DEADLINE);
  CHECK_OK(there->ops->take(there, &at_once, &message));
  CHECK_EQ(message.round, 7);
  CHECK_STATUS(here->ops->post(here, &hello), PS_STATE);
  CHECK_OK(there->ops->reply(there, &reply));
  CHECK_STATUS(there->ops->reply(there, &reply), PS_STATE);
  CHECK_STATUS(here->ops->post(here, &hello), PS_STATE); /* the reply comes first */
  CHECK_OK(here->ops->collect(here, &at_once, &message));
  CHECK_EQ(message.kind, PS_MSG_OUTPUT);
  CHECK_OK(here->ops->post(here, &hello));
  here->ops->close(here);
  there->ops->close(there);
}

TEST(points_and_outputs_are_shared_and_apart)
{
  enum { SLOTS = 3 };
  ps_link *here, *there;
  CHECK_OK(ps_threads_open(&layout, SLOTS, &here, &there));
  for (int slot = 0; slot < SLOTS; ++slot) {
    CHECK(here->ops->point(here, slot) == there->ops->point(there, slot));
    CHECK(here->ops->output(here, slot) == there->ops->output(there, slot));
    memset(here->ops->point(here, slot), slot, 4 * sizeof(float));
    memset(here->ops->output(here, slot), 16 + slot, 4 * sizeof(double));
  }
  for (int slot = 0; slot < SLOTS; ++slot) {
    const char *point = there->ops->point(there, slot), *output = there->ops->output(there, slot);
    CHECK(point[0] == slot && point[4 * sizeof(float) - 1] == slot);
    CHECK(output[0] == 16 + slot && output[4 * sizeof(double) - 1] == 16 + slot);
  }
  here->ops->close(here);
  there->ops->close(there);
}

/* ---- the end --------------------------------------------------------------------------------- */

TEST(the_leader_learns_that_a_follower_left)
{
  ps_link *here, *there;
  ps_header reply;
  CHECK_OK(ps_threads_open(&layout, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &hello));
  there->ops->close(there);
  CHECK_STATUS(here->ops->collect(here, &at_once, &reply), PS_LOST);
  CHECK_STATUS(here->ops->post(here, &hello), PS_LOST);
  memset(here->ops->output(here, 0), 1, 4 * sizeof(double)); /* still there */
  here->ops->close(here);
}

/* A reply that was made is not lost with who made it. */
TEST(a_last_reply_is_collected)
{
  ps_link *here, *there;
  ps_header message, reply = {.kind = PS_MSG_OUTPUT};
  CHECK_OK(ps_threads_open(&layout, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &hello));
  CHECK_OK(there->ops->take(there, &at_once, &message));
  CHECK_OK(there->ops->reply(there, &reply));
  there->ops->close(there);
  CHECK_OK(here->ops->collect(here, &at_once, &message));
  CHECK_EQ(message.kind, PS_MSG_OUTPUT);
  CHECK_STATUS(here->ops->collect(here, &at_once, &message), PS_LOST);
  here->ops->close(here);
}

TEST(the_follower_learns_that_the_leader_left)
{
  ps_link *here, *there;
  ps_header message, reply = {.kind = PS_MSG_OUTPUT};
  CHECK_OK(ps_threads_open(&layout, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &hello));
  CHECK_OK(there->ops->take(there, &at_once, &message));
  here->ops->close(here);
  memset(there->ops->output(there, 0), 1, 4 * sizeof(double)); /* still there */
  CHECK_STATUS(there->ops->reply(there, &reply), PS_ABANDONED);
  CHECK_OK(there->ops->take(there, &at_once, &message));
  CHECK_EQ(message.kind, PS_MSG_DONE);
  there->ops->close(there);
}

/* Work that nobody took before the leader left is not done any more. */
TEST(work_of_a_leader_who_left)
{
  ps_link *here, *there;
  ps_header message;
  CHECK_OK(ps_threads_open(&layout, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &hello));
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
TEST(both_ends_close_at_once)
{
  for (int k = 0; k < 200; ++k) {
    ps_link *here, *there;
    pthread_t thread;
    CHECK_OK(ps_threads_open(&layout, 1, &here, &there));
    CHECK_EQ(pthread_create(&thread, NULL, close_there, there), 0);
    here->ops->close(here);
    CHECK_EQ(pthread_join(thread, NULL), 0);
  }
}
