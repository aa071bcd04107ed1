/* test_host.c - the transport that the host carries: what each end may say when, what arrives and
 * does not fit, who frees what; and whole runs over it.
 */
#include <stdlib.h>
#include <string.h>

#include "runner.h"
#include "stage.h"

static const ps_layout layout = {1, 4, PS_F32, PS_F64};
static const ps_wait at_once = {1, NULL, NULL}; /* a deadline long past */
static const ps_header hello = {.magic = PS_MAGIC,
                                .version = PS_WIRE_VERSION,
                                .kind = PS_MSG_WORK,
                                .count = 1,
                                .round = 7,
                                .dtype = PS_F32,
                                .bytes = 4 * sizeof(float)};
static const ps_header output = {.magic = PS_MAGIC,
                                 .version = PS_WIRE_VERSION,
                                 .kind = PS_MSG_OUTPUT,
                                 .count = 1,
                                 .round = 7,
                                 .dtype = PS_F64,
                                 .bytes = 4 * sizeof(double)};

/* ---- messages -------------------------------------------------------------------------------- */

TEST(a_message_and_its_reply)
{
  ps_link *here, *there;
  ps_header message, reply = output;
  CHECK_OK(stage_host_open(&layout, 2, &here, &there));
  CHECK_STR(here->ops->transport, "host");
  CHECK_EQ(here->slots, 2);
  CHECK_STATUS(there->ops->take(there, &at_once, &message), PS_DEADLINE);
  CHECK_STATUS(there->ops->reply(there, &reply), PS_STATE);
  memset(here->ops->point(here, 0), 3, 4 * sizeof(float));
  CHECK_OK(here->ops->post(here, &hello));
  CHECK_STATUS(here->ops->post(here, &hello), PS_STATE);
  CHECK_STATUS(here->ops->collect(here, &at_once, &message), PS_DEADLINE);
  CHECK_OK(there->ops->take(there, &at_once, &message));
  CHECK_EQ(message.round, 7);
  CHECK_EQ(*(unsigned char *)there->ops->point(there, 0), 3);
  memset(there->ops->output(there, 0), 5, 4 * sizeof(double));
  memset(there->ops->point(there, 0), 6, 4 * sizeof(float));
  reply.flags = PS_FLAG_MOVED;
  CHECK_OK(there->ops->reply(there, &reply));
  CHECK_STATUS(there->ops->reply(there, &reply), PS_STATE);
  CHECK_OK(here->ops->collect(here, &at_once, &message));
  CHECK_EQ(message.kind, PS_MSG_OUTPUT);
  CHECK_EQ(((unsigned char *)here->ops->output(here, 0))[31], 5);
  CHECK_EQ(((unsigned char *)here->ops->point(here, 0))[15], 6);
  CHECK_OK(here->ops->post(here, &hello));
  here->ops->close(here);
  there->ops->close(there);
}

/* Each end has memory of its own: what one writes the other sees when it is sent. */
TEST(points_stay_apart_until_they_are_sent)
{
  ps_link *here, *there;
  CHECK_OK(stage_host_open(&layout, 1, &here, &there));
  memset(here->ops->point(here, 0), 9, 4 * sizeof(float));
  CHECK_EQ(*(unsigned char *)there->ops->point(there, 0), 0);
  here->ops->close(here);
  there->ops->close(there);
}

/* ---- the end --------------------------------------------------------------------------------- */

TEST(the_leader_learns_that_a_follower_left)
{
  ps_link *here, *there;
  ps_header reply;
  CHECK_OK(stage_host_open(&layout, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &hello));
  there->ops->close(there);
  CHECK_STATUS(here->ops->collect(here, &at_once, &reply), PS_LOST);
  CHECK_STATUS(here->ops->post(here, &hello), PS_LOST);
  here->ops->close(here);
}

TEST(a_last_reply_is_collected)
{
  ps_link *here, *there;
  ps_header message;
  CHECK_OK(stage_host_open(&layout, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &hello));
  CHECK_OK(there->ops->take(there, &at_once, &message));
  CHECK_OK(there->ops->reply(there, &output));
  there->ops->close(there);
  CHECK_OK(here->ops->collect(here, &at_once, &message));
  CHECK_EQ(message.kind, PS_MSG_OUTPUT);
  CHECK_STATUS(here->ops->collect(here, &at_once, &message), PS_LOST);
  here->ops->close(here);
}

TEST(the_follower_learns_that_the_leader_left)
{
  ps_link *here, *there;
  ps_header message;
  CHECK_OK(stage_host_open(&layout, 1, &here, &there));
  CHECK_OK(here->ops->post(here, &hello));
  CHECK_OK(there->ops->take(there, &at_once, &message));
  here->ops->close(here);
  CHECK_STATUS(there->ops->reply(there, &output), PS_ABANDONED);
  CHECK_OK(there->ops->take(there, &at_once, &message));
  CHECK_EQ(message.kind, PS_MSG_DONE);
  there->ops->close(there);
}

/* Work that nobody took before the leader left is not done any more. */
TEST(work_of_a_leader_who_left)
{
  ps_link *here, *there;
  ps_header message;
  CHECK_OK(stage_host_open(&layout, 1, &here, &there));
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
    CHECK_OK(stage_host_open(&layout, 1, &here, &there));
    CHECK_EQ(pthread_create(&thread, NULL, close_there, there), 0);
    here->ops->close(here);
    CHECK_EQ(pthread_join(thread, NULL), 0);
  }
}

static int releases;

static void count_release(void *ctx)
{
  (void)ctx;
  ++releases;
}

static ps_status send_fails(void *ctx, const ps_part *parts, int count)
{
  (void)ctx;
  (void)parts;
  (void)count;
  return PS_LOST;
}

static const ps_carrier broken = {send_fails, count_release, NULL};

TEST(a_carrier_that_cannot_send)
{
  ps_link *end;
  ps_inbox *inbox;
  CHECK_OK(ps_host_open(&layout, 1, PS_LEADS, 0, ps_backend_find("cpu"), &broken, &end, &inbox));
  CHECK_STATUS(end->ops->post(end, &hello), PS_LOST);
  ps_inbox_release(inbox);
  end->ops->close(end);
  CHECK_EQ(releases, 1);
}

TEST(opening_refuses_what_cannot_be)
{
  ps_link *end;
  ps_inbox *inbox;
  const ps_layout empty = {0, 4, PS_F32, PS_F32};
  CHECK_STATUS(ps_host_open(&empty, 1, PS_LEADS, 0, ps_backend_find("cpu"), &broken, &end, &inbox),
               PS_SHAPE);
  CHECK_STATUS(ps_host_open(&layout, 0, PS_LEADS, 0, ps_backend_find("cpu"), &broken, &end, &inbox),
               PS_INVALID);
  CHECK_STATUS(ps_host_open(&layout, PS_SLOTS_MAX + 1, PS_LEADS, 0, ps_backend_find("cpu"), &broken,
                            &end, &inbox),
               PS_INVALID);
  CHECK_STATUS(
      ps_host_open(&layout, 1, (ps_role)3, 0, ps_backend_find("cpu"), &broken, &end, &inbox),
      PS_INVALID);
  CHECK_EQ(releases, 4);
  CHECK(end == NULL && inbox == NULL);
  ps_inbox_release(NULL);
}

static ps_status open_and_close(void *ctx)
{
  ps_link *here, *there;
  ps_status status = stage_host_open(&layout, 2, &here, &there);
  (void)ctx;
  if (status == PS_OK) {
    here->ops->close(here);
    there->ops->close(there);
  }
  return status;
}

TEST(opening_without_memory)
{
  runner_sweep(open_and_close, NULL);
}

/* ---- what does not fit ----------------------------------------------------------------------- */

static ps_status swallow(void *ctx, const ps_part *parts, int count)
{
  (void)ctx;
  (void)parts;
  (void)count;
  return PS_OK;
}

static const ps_carrier sink = {swallow, NULL, NULL};

enum { ROOM = sizeof(ps_header) + 256 };

/* A leader's end that waits for a reply is handed these bytes. */
static void leader_gets(const ps_header *header, size_t bytes, ps_status delivered,
                        ps_status collected)
{
  unsigned char message[ROOM] = {0};
  ps_link *end;
  ps_inbox *inbox;
  ps_header reply;
  memcpy(message, header, sizeof *header);
  CHECK_OK(ps_host_open(&layout, 1, PS_LEADS, 0, ps_backend_find("cpu"), &sink, &end, &inbox));
  CHECK_OK(end->ops->post(end, &hello));
  CHECK_STATUS(ps_inbox_deliver(inbox, message, bytes), delivered);
  CHECK_STATUS(end->ops->collect(end, &at_once, &reply), collected);
  ps_inbox_release(inbox);
  end->ops->close(end);
}

static void is_refused(ps_header header, size_t bytes)
{
  leader_gets(&header, bytes, PS_PROTOCOL, PS_LOST);
}

TEST(replies_that_do_not_fit)
{
  const size_t right = sizeof output + output.bytes;
  ps_header bad = output;
  leader_gets(&output, right, PS_OK, PS_OK);
  leader_gets(&output, 0, PS_OK, PS_LOST);
  is_refused(output, right - 1);
  is_refused(output, right + 1);
  is_refused(output, sizeof output);
  is_refused(output, sizeof output - 1);
  is_refused(output, 1);
  is_refused(hello, sizeof hello + hello.bytes); /* only a leader says that */
  bad.magic ^= 1;
  is_refused(bad, right);
  bad = output;
  ++bad.version;
  is_refused(bad, right);
  bad = output;
  bad.kind = 99;
  is_refused(bad, right);
  bad = output;
  bad.count = 2; /* of one slot */
  is_refused(bad, sizeof output + 2 * output.bytes);
  bad.count = 0;
  is_refused(bad, sizeof output);
  bad.count = -1;
  is_refused(bad, right);
  bad = output;
  bad.flags = PS_FLAG_MOVED; /* without the points */
  is_refused(bad, right);
  bad = output;
  bad.bytes = UINT64_MAX;
  is_refused(bad, right);
  bad.bytes = output.bytes + 8; /* more than there is room for */
  is_refused(bad, right + 8);
}

TEST(work_that_does_not_fit)
{
  unsigned char message[ROOM] = {0};
  ps_link *end;
  ps_inbox *inbox;
  ps_header taken, bad = hello;
  bad.bytes -= 4;
  memcpy(message, &bad, sizeof bad);
  CHECK_OK(ps_host_open(&layout, 1, PS_FOLLOWS, 0, ps_backend_find("cpu"), &sink, &end, &inbox));
  CHECK_STATUS(ps_inbox_deliver(inbox, message, sizeof bad + bad.bytes), PS_PROTOCOL);
  CHECK_STATUS(end->ops->take(end, &at_once, &taken), PS_LOST);
  CHECK_OK(ps_inbox_deliver(inbox, message, 3)); /* it is lost: the rest is dropped */
  end->ops->close(end);
  CHECK_OK(ps_inbox_deliver(inbox, message, 3));
  ps_inbox_release(inbox);
}

TEST(messages_out_of_turn)
{
  unsigned char message[ROOM] = {0};
  ps_link *end;
  ps_inbox *inbox;
  ps_header taken;
  memcpy(message, &hello, sizeof hello);
  CHECK_OK(ps_host_open(&layout, 1, PS_FOLLOWS, 0, ps_backend_find("cpu"), &sink, &end, &inbox));
  CHECK_OK(ps_inbox_deliver(inbox, message, sizeof hello + hello.bytes));
  CHECK_OK(end->ops->take(end, &at_once, &taken));
  memset(message + sizeof hello, 7, hello.bytes);
  CHECK_STATUS(ps_inbox_deliver(inbox, message, sizeof hello + hello.bytes), PS_PROTOCOL);
  CHECK_EQ(*(unsigned char *)end->ops->point(end, 0), 0); /* what is evaluated stays as it is */
  CHECK_STATUS(end->ops->reply(end, &output), PS_ABANDONED);
  ps_inbox_release(inbox);
  end->ops->close(end);
}

TEST(a_process_that_is_gone)
{
  ps_link *end;
  ps_inbox *inbox;
  ps_header reply;
  CHECK_OK(ps_host_open(&layout, 1, PS_LEADS, 0, ps_backend_find("cpu"), &sink, &end, &inbox));
  CHECK_OK(end->ops->post(end, &hello));
  ps_inbox_lost(inbox, "killed by signal 9");
  CHECK_STATUS(end->ops->collect(end, &at_once, &reply), PS_LOST);
  CHECK_STR(ps_last_error(), "killed by signal 9");
  CHECK_STATUS(end->ops->post(end, &hello), PS_LOST);
  ps_inbox_release(inbox);
  end->ops->close(end);
}

/* ---- runs ------------------------------------------------------------------------------------ */

enum { STEPS = 12, RANKS = 4, ELEMENTS = 33 };

static float *run(ps_program *program, bool by_host, double tolerance, ps_report *report)
{
  stage on;
  stage_set(&on, program, RANKS, 1, ELEMENTS, PS_F32, PS_F32);
  on.by_host = by_host;
  on.options.tolerance = tolerance;
  on.slots[2] = 3;
  float *x = stage_latent(&on, 5);
  stage_open(&on);
  stage_run(&on, x);
  stage_end(&on);
  CHECK_STATUS(on.failure, PS_OK);
  *report = stage_report(&on);
  CHECK_EQ(report->failed, 0);
  stage_close(&on);
  return x;
}

/* The transport decides no value: bits, rounds and bytes are those of threads. */
TEST(a_run_is_that_of_threads)
{
  ps_program *program = stage_multistep(STEPS);
  for (int k = 0; k < 2; ++k) {
    ps_report by_threads, by_host;
    double tolerance = k == 0 ? 0.0 : 0.3;
    float *expected = run(program, false, tolerance, &by_threads);
    float *x = run(program, true, tolerance, &by_host);
    CHECK_BYTES(x, expected, ELEMENTS * sizeof *x);
    CHECK_EQ(by_host.rounds, by_threads.rounds);
    CHECK_EQ(by_host.bytes_sent, by_threads.bytes_sent);
    free(x);
    free(expected);
  }
  ps_program_release(program);
}
