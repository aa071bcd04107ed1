/* test_chaos_nccl.c - faults drawn at random for ranks over the nccl transport, as test_chaos.c has
 * them for the other two: `make chaos`; a hundred otherwise.
 *
 * Each is one of a follower, of NCCL, of memory, of the wire, of its process or of the host, at a
 * moment drawn at random, in one of two runs over one pair; then comes a run over a new pair, which
 * has to be fine.  Whatever happens the leader has its picture to the bit, or the error that is the
 * fault's own, and nothing is left: no memory, thread, descriptor or communicator.
 */
#include <math.h>
#include <stdlib.h>

#include "left.h"
#include "pairs.h"
#include "runner.h"
#include "stage.h"

static const char *const calls[] = {"ncclCommInitRankConfig", "ncclSend", "ncclRecv",
                                    "ncclCommGetAsyncError"};
static const char *const memory[] = {"cuMemAllocFromPoolAsync", "cuMemHostAlloc"};

enum { CALLS = sizeof calls / sizeof *calls, MEMORY = sizeof memory / sizeof *memory };

typedef enum fault {
  BY_FOLLOWER,                      /* this and the next ones: its conduct */
  FAILS = CONDUCTS,                 /* one of the calls, at either end */
  OUT_OF_MEMORY = FAILS + CALLS,    /* likewise */
  RUBBISH = OUT_OF_MEMORY + MEMORY, /* a message, of either end */
  LOST,                             /* whoever started its process knows that it is gone */
  NOBODY,                           /* there was never one, and Ctrl-C ends the wait */
  INTERRUPTED,                      /* Ctrl-C while the leader waits for one that is silent */
  STOPPED,                          /* Ctrl-C in the leader's own forward */
  FAULTS,
} fault;

typedef struct chaos {
  fault what;
  int when;
  const float *alone; /* (PAIR_SIZE) */
  const ps_backend *backend;
  ps_pair *pair;
  other follower;
} chaos;

static int draw(uint64_t *random, int below)
{
  return (int)(fabs(stage_random(random)) * below) % below;
}

static int interrupt(void *ctx)
{
  (void)ctx;
  return 1;
}

static void *lose_soon(void *ctx)
{
  pairs_sleep_ms(30);
  ps_nccl_lost(ctx, "killed by signal 9");
  return NULL;
}

static void arm(const chaos *all)
{
  int n = 1 + 2 * all->when;
  if (all->what >= FAILS && all->what < OUT_OF_MEMORY) {
    pairs_nccl->fake_nccl_fail(calls[all->what - FAILS], n, 6);
  } else if (all->what >= OUT_OF_MEMORY && all->what < RUBBISH) {
    pairs_fake->fake_fail(memory[all->what - OUT_OF_MEMORY], n, 2);
  } else if (all->what == RUBBISH) {
    pairs_nccl->fake_nccl_spoil(n);
  }
}

static void disarm(void)
{
  pairs_nccl->fake_nccl_fail("", 0, 0);
  pairs_nccl->fake_nccl_spoil(0);
  pairs_fake->fake_fail("", 0, 0);
}

/* What the leader's run may come to, besides its picture. */
static bool may_end_with(fault what, ps_status status)
{
  return status == PS_OK || (status == PS_INTERRUPTED && what == INTERRUPTED) ||
         (status == PS_NO_MEMORY && what >= OUT_OF_MEMORY && what < RUBBISH);
}

static void run(chaos *all)
{
  ps_link *link;
  ps_leader *leader;
  ps_report report;
  float x[PAIR_SIZE];
  bool interrupted = all->what == INTERRUPTED;
  ps_status status = ps_nccl_open(all->pair, all->backend, &pairs_layout, 2, &link);
  if (status == PS_OK) {
    leading how = {.backend = all->backend,
                   .link = link,
                   .deadline_ns = (interrupted ? 5000 : 60) * INT64_C(1000000),
                   .check = interrupted ? interrupt : NULL,
                   .stops = all->what == STOPPED,
                   .at = all->when};
    status = pairs_lead(&how, x, &report, &leader);
    if (status == PS_OK && !how.stops) {
      CHECK_BYTES(x, all->alone, sizeof x);
    }
    ps_leader_destroy(leader);
  }
  CHECK(may_end_with(all->what, status));
}

/* The leader's end of a pair, or NULL: with nobody at the other until Ctrl-C, or with the fault. */
static void connect(chaos *all, const unsigned char *id)
{
  ps_wait wait = pairs_within(300);
  all->pair = NULL;
  if (all->what == NOBODY) {
    ps_wait ended = {0, interrupt, NULL};
    CHECK_STATUS(ps_nccl_connect(id, PS_LEADS, all->backend, &ended, &all->pair), PS_INTERRUPTED);
    return;
  }
  conduct does = all->what < FAILS          ? (conduct)all->what
                 : all->what == INTERRUPTED ? FALLS_SILENT
                                            : HONEST;
  other_start(&all->follower, id, does, all->when, 2, 300);
  ps_nccl_connect(id, PS_LEADS, all->backend, &wait, &all->pair);
}

static void survive(chaos *all)
{
  unsigned char id[PS_NCCL_ID_BYTES];
  pthread_t thread;
  CHECK_OK(ps_nccl_id(id));
  arm(all);
  connect(all, id);
  bool loses = all->what == LOST && all->pair != NULL &&
               pthread_create(&thread, NULL, lose_soon, all->pair) == 0;
  for (int k = 0; all->pair != NULL && k < 2; ++k) {
    run(all);
  }
  if (loses) {
    CHECK_EQ(pthread_join(thread, NULL), 0);
  }
  disarm();
  ps_nccl_close(all->pair);
  if (all->what != NOBODY) {
    other_finish(&all->follower);
  }
}

/* A machine with much other work may keep even this follower beyond its deadline, and no more. */
static void check_next_run(const chaos *all)
{
  chaos next = {.what = BY_FOLLOWER, .when = -1, .alone = all->alone, .backend = all->backend};
  survive(&next);
}

TEST_WITHIN(nccl, 1200)
{
  ps_leader *leader;
  ps_report report;
  float alone[PAIR_SIZE];
  uint64_t random = 1234;
  pairs_begin();
  chaos all = {.alone = alone};
  CHECK_OK(ps_cuda_open(0, &all.backend));
  CHECK_OK(pairs_lead(&(leading){.backend = all.backend}, alone, &report, &leader));
  ps_leader_destroy(leader);
  check_next_run(&all); /* a sanitizer starts a thread of its own with the first one */
  pairs_settle();
  left before = left_now();
  for (int k = runner_faults() / 3; k > 0; --k) {
    all.what = (fault)draw(&random, FAULTS);
    all.when = draw(&random, PAIR_STEPS);
    survive(&all);
    check_next_run(&all);
  }
  pairs_settle();
  left_check(&before);
  all.backend->release(all.backend);
  pairs_end();
}
