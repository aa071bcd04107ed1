/* test_host.c - what the transport that the host carries has beside the contract of test_links.c:
 * its carriers, what arrives and does not fit; and whole runs over it.
 */
#include <stdlib.h>
#include <string.h>

#include "runner.h"
#include "stage.h"

static const ps_wait at_once = {1, NULL, NULL}; /* a deadline long past */

/* ---- opening --------------------------------------------------------------------------------- */

static ps_status open_end(int slots, ps_role role, const ps_carrier *carrier, ps_link **end,
                          ps_inbox **inbox)
{
  return ps_host_open(&stage_small, slots, role, 0, ps_backend_find("cpu"), carrier, end, inbox);
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
  CHECK_OK(open_end(1, PS_LEADS, &broken, &end, &inbox));
  CHECK_STATUS(end->ops->post(end, &stage_hello), PS_LOST);
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
  CHECK_STATUS(open_end(0, PS_LEADS, &broken, &end, &inbox), PS_INVALID);
  CHECK_STATUS(open_end(PS_SLOTS_MAX + 1, PS_LEADS, &broken, &end, &inbox), PS_INVALID);
  CHECK_STATUS(open_end(1, (ps_role)3, &broken, &end, &inbox), PS_INVALID);
  CHECK_EQ(releases, 4);
  CHECK(end == NULL && inbox == NULL);
  ps_inbox_release(NULL);
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
  CHECK_OK(open_end(1, PS_LEADS, &sink, &end, &inbox));
  CHECK_OK(end->ops->post(end, &stage_hello));
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
  const size_t right = sizeof stage_output + stage_output.bytes;
  ps_header bad = stage_output;
  leader_gets(&stage_output, right, PS_OK, PS_OK);
  leader_gets(&stage_output, 0, PS_OK, PS_LOST);
  is_refused(stage_output, right - 1);
  is_refused(stage_output, right + 1);
  is_refused(stage_output, sizeof stage_output);
  is_refused(stage_output, sizeof stage_output - 1);
  is_refused(stage_output, 1);
  is_refused(stage_hello, sizeof stage_hello + stage_hello.bytes); /* only a leader says that */
  bad.magic ^= 1;
  is_refused(bad, right);
  bad = stage_output;
  ++bad.version;
  is_refused(bad, right);
  bad = stage_output;
  bad.kind = 99;
  is_refused(bad, right);
  bad = stage_output;
  bad.count = 2; /* of one slot */
  is_refused(bad, sizeof stage_output + 2 * stage_output.bytes);
  bad.count = 0;
  is_refused(bad, sizeof stage_output);
  bad.count = -1;
  is_refused(bad, right);
  bad = stage_output;
  bad.flags = PS_FLAG_MOVED; /* without the points */
  is_refused(bad, right);
  bad = stage_output;
  bad.bytes = UINT64_MAX;
  is_refused(bad, right);
  bad.bytes = stage_output.bytes + 8; /* more than there is room for */
  is_refused(bad, right + 8);
}

TEST(work_that_does_not_fit)
{
  unsigned char message[ROOM] = {0};
  ps_link *end;
  ps_inbox *inbox;
  ps_header taken, bad = stage_hello;
  bad.bytes -= 4;
  memcpy(message, &bad, sizeof bad);
  CHECK_OK(open_end(1, PS_FOLLOWS, &sink, &end, &inbox));
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
  memcpy(message, &stage_hello, sizeof stage_hello);
  CHECK_OK(open_end(1, PS_FOLLOWS, &sink, &end, &inbox));
  CHECK_OK(ps_inbox_deliver(inbox, message, sizeof stage_hello + stage_hello.bytes));
  CHECK_OK(end->ops->take(end, &at_once, &taken));
  memset(message + sizeof stage_hello, 7, stage_hello.bytes);
  CHECK_STATUS(ps_inbox_deliver(inbox, message, sizeof stage_hello + stage_hello.bytes),
               PS_PROTOCOL);
  CHECK_EQ(*(unsigned char *)end->ops->point(end, 0), 0); /* what is evaluated stays as it is */
  CHECK_STATUS(end->ops->reply(end, &stage_output), PS_ABANDONED);
  ps_inbox_release(inbox);
  end->ops->close(end);
}

TEST(a_process_that_is_gone)
{
  ps_link *end;
  ps_inbox *inbox;
  ps_header reply;
  CHECK_OK(open_end(1, PS_LEADS, &sink, &end, &inbox));
  CHECK_OK(end->ops->post(end, &stage_hello));
  ps_inbox_lost(inbox, "killed by signal 9");
  CHECK_STATUS(end->ops->collect(end, &at_once, &reply), PS_LOST);
  CHECK_STR(ps_last_error(), "killed by signal 9");
  CHECK_STATUS(end->ops->post(end, &stage_hello), PS_LOST);
  ps_inbox_release(inbox);
  end->ops->close(end);
}

/* One that said why it cannot go on, and not by a message of the run. */
TEST(a_process_that_has_failed)
{
  ps_link *end;
  ps_inbox *inbox;
  ps_header reply;
  CHECK_OK(open_end(1, PS_LEADS, &sink, &end, &inbox));
  CHECK_OK(end->ops->post(end, &stage_hello));
  ps_inbox_failed(inbox, "out of cheese");
  ps_inbox_lost(inbox, "killed by signal 9"); /* as every process that failed is in the end */
  CHECK_STATUS(end->ops->collect(end, &at_once, &reply), PS_FAILED);
  CHECK_STR(ps_last_error(), "out of cheese");
  CHECK_STATUS(end->ops->post(end, &stage_hello), PS_FAILED);
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
  *report = stage_whole(&on, x);
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
