/* test_nccl.c - the nccl transport on the stand-in libraries: runs over pairs, pairs kept from run
 * to run, ranks that never arrive, fail or fall silent, every call of NCCL failing once.
 */
#include <math.h>
#include <pthread.h>

#include "pairs.h"
#include "runner.h"

/* ---- runs ------------------------------------------------------------------------------------ */

/* The leader's end of a pair, and the follower at the other one. */
typedef struct joined {
  unsigned char id[PS_NCCL_ID_BYTES];
  const ps_backend *backend;
  ps_pair *pair;
  other follower;
} joined;

static void join_ranks(joined *both, conduct does, int at, int runs, int patience_ms)
{
  ps_wait wait = pairs_within(20000);
  pairs_begin();
  CHECK_OK(ps_nccl_id(both->id));
  other_start(&both->follower, both->id, does, at, runs, patience_ms);
  CHECK_OK(ps_cuda_open(0, &both->backend));
  CHECK_OK(ps_nccl_connect(both->id, PS_LEADS, both->backend, &wait, &both->pair));
}

/* When the follower has been waited for. */
static void part_ranks(joined *both)
{
  ps_nccl_close(both->pair);
  both->backend->release(both->backend);
  pairs_end();
}

static void lead_alone(const ps_backend *backend, float *x)
{
  ps_leader *leader;
  ps_report report;
  CHECK_OK(pairs_lead(&(leading){.backend = backend}, x, &report, &leader));
  ps_leader_destroy(leader);
}

TEST(runs_over_one_pair)
{
  enum { RUNS = 3 };
  ps_leader *leader;
  ps_report report;
  float x[PAIR_SIZE], alone[PAIR_SIZE];
  joined both;
  join_ranks(&both, HONEST, -1, RUNS, 20000);
  lead_alone(both.backend, alone);
  for (int run = 0; run < RUNS; ++run) {
    ps_link *link, *second;
    CHECK_OK(ps_nccl_open(both.pair, both.backend, &pairs_layout, 2, &link));
    CHECK_STR(link->ops->transport, "nccl");
    CHECK_STATUS(ps_nccl_open(both.pair, both.backend, &pairs_layout, 2, &second), PS_STATE);
    /* Of a follower that could not begin its starter would tell; here only the deadline does. */
    CHECK_OK(pairs_lead(&(leading){.backend = both.backend,
                                   .link = link,
                                   .tolerance = run == 1 ? INFINITY : 0.0,
                                   .deadline_ns = 10 * INT64_C(1000000000)},
                        x, &report, &leader));
    CHECK_EQ(report.failed, 0);
    CHECK(report.evaluations[1] > 0);
    CHECK(run == 1 ? report.rounds < PAIR_STEPS : report.rounds == PAIR_STEPS);
    if (run != 1) {
      CHECK_BYTES(x, alone, sizeof x);
    }
    ps_leader_destroy(leader);
  }
  other_finish(&both.follower);
  CHECK_OK(both.follower.status);
  part_ranks(&both);
}

static void check_loss(conduct does, int at, ps_status expected)
{
  ps_link *link;
  ps_leader *leader;
  ps_report report;
  float x[PAIR_SIZE], alone[PAIR_SIZE];
  joined both;
  join_ranks(&both, does, at, 1, 2000);
  lead_alone(both.backend, alone);
  CHECK_OK(ps_nccl_open(both.pair, both.backend, &pairs_layout, 2, &link));
  CHECK_OK(pairs_lead(
      &(leading){.backend = both.backend, .link = link, .deadline_ns = 300 * INT64_C(1000000)}, x,
      &report, &leader));
  CHECK_EQ(report.failed, 1);
  CHECK_EQ(report.failures[0].status, expected);
  CHECK_BYTES(x, alone, sizeof x);
  ps_leader_destroy(leader);
  if (expected == PS_DEADLINE) { /* something was on its way: the pair is gone with the run */
    CHECK(!ps_nccl_alive(both.pair));
    CHECK_OK(ps_nccl_open(both.pair, both.backend, &pairs_layout, 2, &link));
    CHECK_OK(pairs_lead(&(leading){.backend = both.backend, .link = link}, x, &report, &leader));
    CHECK_EQ(report.failures[0].status, PS_LOST);
    CHECK_BYTES(x, alone, sizeof x);
    ps_leader_destroy(leader);
  }
  other_finish(&both.follower);
  part_ranks(&both);
}

TEST(a_follower_raises)
{
  check_loss(RAISES, 1, PS_FAILED);
}

TEST(a_follower_falls_silent)
{
  check_loss(FALLS_SILENT, 1, PS_DEADLINE);
}

TEST(a_follower_leaves)
{
  check_loss(LEAVES, 2, PS_DEADLINE);
}

/* Its send would wait in the device for ever, and the pair with it. */
TEST(a_last_message_that_nobody_takes)
{
  ps_link *link;
  ps_leader *leader;
  ps_report report;
  float x[PAIR_SIZE];
  joined both;
  join_ranks(&both, HONEST, -1, 0, 20000);
  other_finish(&both.follower);
  CHECK_OK(ps_nccl_open(both.pair, both.backend, &pairs_layout, 2, &link));
  CHECK_OK(pairs_lead(&(leading){.backend = both.backend, .link = link, .stops = true}, x, &report,
                      &leader));
  ps_leader_destroy(leader);
  part_ranks(&both);
}

/* As another run in this process does, again and again. */
static void *open_and_close(void *ctx)
{
  const bool *over = ctx;
  const ps_backend *backend;
  while (!__atomic_load_n(over, __ATOMIC_ACQUIRE)) {
    CHECK_OK(ps_cuda_open(0, &backend));
    backend->release(backend);
    pairs_sleep_ms(1);
  }
  return NULL;
}

/* The driver would free it once the leader has heard from a follower that is at work. */
TEST(pinned_memory_is_kept_while_a_receive_waits)
{
  enum { AT_MOST = 12 };
  ps_link *link;
  ps_leader *leader;
  ps_report report;
  pthread_t thread;
  float x[PAIR_SIZE];
  bool over = false;
  joined both;
  join_ranks(&both, FALLS_SILENT, 1, 1, 2000);
  CHECK_OK(ps_nccl_open(both.pair, both.backend, &pairs_layout, 2, &link));
  CHECK_EQ(pthread_create(&thread, NULL, open_and_close, &over), 0);
  CHECK_OK(pairs_lead(
      &(leading){.backend = both.backend, .link = link, .deadline_ns = 300 * INT64_C(1000000)}, x,
      &report, &leader));
  __atomic_store_n(&over, true, __ATOMIC_RELEASE);
  CHECK_EQ(pthread_join(thread, NULL), 0);
  CHECK(pairs_fake->fake_complaint() == NULL);
  CHECK(pairs_fake->fake_count().pinned <= AT_MOST);
  ps_leader_destroy(leader);
  other_finish(&both.follower);
  part_ranks(&both);
}

/* ---- connecting ------------------------------------------------------------------------------ */

TEST(a_rank_that_never_arrives)
{
  unsigned char id[PS_NCCL_ID_BYTES];
  const ps_backend *backend;
  ps_pair *pair;
  ps_wait wait = pairs_within(50);
  pairs_begin();
  CHECK_OK(ps_nccl_id(id));
  CHECK_OK(ps_cuda_open(0, &backend));
  CHECK_STATUS(ps_nccl_connect(id, PS_LEADS, backend, &wait, &pair), PS_DEADLINE);
  CHECK(pair == NULL);
  CHECK_STATUS(ps_nccl_connect(id, PS_LEADS, ps_backend_find("cpu"), &wait, &pair), PS_DEVICE);
  ps_nccl_close(NULL);
  backend->release(backend);
  pairs_end();
}

static void *lose_soon(void *pair)
{
  pairs_sleep_ms(50);
  ps_nccl_lost(pair, "killed by signal 9");
  return NULL;
}

static void *fail_soon(void *pair)
{
  pairs_sleep_ms(50);
  ps_nccl_failed(pair, "out of cheese");
  return NULL;
}

/* NCCL itself would wait for ever; whoever started the process knows. */
static void end_a_run(void *(*end)(void *pair), ps_status status, const char *text)
{
  ps_link *link;
  ps_leader *leader;
  ps_report report;
  pthread_t thread;
  float x[PAIR_SIZE];
  joined both;
  join_ranks(&both, FALLS_SILENT, 1, 1, 2000);
  CHECK_OK(ps_nccl_open(both.pair, both.backend, &pairs_layout, 2, &link));
  CHECK_EQ(pthread_create(&thread, NULL, end, both.pair), 0);
  CHECK_OK(pairs_lead(&(leading){.backend = both.backend, .link = link}, x, &report, &leader));
  CHECK_EQ(report.failed, 1);
  CHECK_EQ(report.failures[0].status, status);
  CHECK_STR(report.failures[0].text, text);
  ps_leader_destroy(leader);
  CHECK_EQ(pthread_join(thread, NULL), 0);
  other_finish(&both.follower);
  part_ranks(&both);
}

TEST(a_process_that_is_gone)
{
  end_a_run(lose_soon, PS_LOST, "killed by signal 9");
}

TEST(a_process_that_has_failed)
{
  end_a_run(fail_soon, PS_FAILED, "out of cheese");
}

/* ---- every call fails once ------------------------------------------------------------------- */

/* Whether it came to the failure at all: the leader's picture is there, or the pair is not. */
static void try_failure(const char *function, int n, int result)
{
  unsigned char id[PS_NCCL_ID_BYTES];
  const ps_backend *backend;
  ps_pair *pair;
  ps_link *link;
  ps_leader *leader;
  ps_report report;
  ps_wait wait = pairs_within(300);
  float x[PAIR_SIZE], alone[PAIR_SIZE];
  other follower;
  pairs_begin();
  CHECK_OK(ps_cuda_open(0, &backend));
  lead_alone(backend, alone);
  CHECK_OK(ps_nccl_id(id));
  pairs_nccl->fake_nccl_fail(function, n, result);
  other_start(&follower, id, HONEST, -1, 1, 300);
  ps_status status = ps_nccl_connect(id, PS_LEADS, backend, &wait, &pair);
  if (status == PS_OK && ps_nccl_open(pair, backend, &pairs_layout, 2, &link) == PS_OK) {
    CHECK_OK(pairs_lead(
        &(leading){.backend = backend, .link = link, .deadline_ns = 300 * INT64_C(1000000)}, x,
        &report, &leader));
    CHECK_BYTES(x, alone, sizeof x);
    ps_leader_destroy(leader);
  }
  ps_nccl_close(pair);
  pairs_nccl->fake_nccl_fail("", 0, 0);
  pthread_join(follower.thread, NULL);
  backend->release(backend);
  pairs_end();
}

TEST_WITHIN(every_call_fails_once, 300)
{
  static const char *const functions[] = {"ncclCommInitRankConfig", "ncclSend", "ncclRecv",
                                          "ncclCommGetAsyncError"};
  for (size_t k = 0; k < sizeof functions / sizeof *functions; ++k) {
    for (int n = 1; n <= 5; n += 2) {
      try_failure(functions[k], n, 6);
    }
  }
}

TEST(without_the_library)
{
  unsigned char id[PS_NCCL_ID_BYTES];
  if (ps_nccl_version() > 0) {
    runner_skip("this machine has NCCL");
  }
  CHECK_STATUS(ps_nccl_id(id), PS_UNSUPPORTED);
}
