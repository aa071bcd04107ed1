/* test_nccl.c - the nccl transport on the stand-in libraries: runs over pairs, pairs kept from run
 * to run, ranks that never arrive, fail or fall silent, every call of NCCL failing once, and faults
 * drawn at random (`make chaos`).
 */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "fakes.h"
#include "parastep_backend.h"
#include "runner.h"
#include "stage.h"

enum { STEPS = 6, SIZE = 40 };

static const fake_setting plain = {2, 1, 1, 3};
static const fake_api *fake;
static const fake_nccl_api *fake_nccl;
static const ps_layout layout = {1, SIZE, PS_F32, PS_F32};

static ps_wait within(int ms)
{
  return (ps_wait){ps_now_ns() + ms * INT64_C(1000000), NULL, NULL};
}

static void sleep_ms(int ms)
{
  const struct timespec pause = {ms / 1000, (ms % 1000) * 1000000L};
  nanosleep(&pause, NULL);
}

static int draw(uint64_t *random, int below)
{
  return (int)(fabs(stage_random(random)) * below) % below;
}

static void begin(void)
{
  fake = fakes_begin(&plain, 1);
  fake_nccl = fakes_nccl();
  CHECK(ps_nccl_version() > 21800);
}

/* Whatever has ended is destroyed when something new is opened. */
static void bury(void)
{
  const ps_backend *backend;
  ps_mirror *mirror;
  CHECK_OK(ps_cuda_open(0, &backend));
  CHECK_OK(backend->mirror(backend, backend, 64, &mirror));
  mirror->ops->close(mirror, PS_NEAR);
  mirror->ops->close(mirror, PS_FAR);
  backend->release(backend);
  fake->fake_drain();
}

/* Aborting is done in threads that nobody waits for. */
static void end(void)
{
  for (int k = 0; k < 3000 && fake_nccl->fake_nccl_live() > 0; ++k) {
    bury();
    sleep_ms(1);
  }
  CHECK_EQ(fake_nccl->fake_nccl_live(), 0);
  fake->fake_drain();
  bury();
  bury();
  fakes_end(fake);
}

/* ---- two ranks ------------------------------------------------------------------------------- */

static void evaluate(int step, const void *point, void *output)
{
  float x[SIZE];
  CHECK_EQ(fake->fake_read(x, point, sizeof x), 0);
  for (int i = 0; i < SIZE; ++i) {
    x[i] = tanhf(x[i]) / (float)(step + 1);
  }
  CHECK_EQ(fake->fake_write(output, x, sizeof x), 0);
}

typedef enum conduct { HONEST, RAISES, FALLS_SILENT, LEAVES, NOT_A_NUMBER, CONDUCTS } conduct;

/* The follower's process: a thread with a device of its own. */
typedef struct other {
  const unsigned char *id;
  conduct does;
  int at;                /* its work at which it does so */
  int runs, patience_ms; /* to connect */
  ps_pair *pair;
  pthread_t thread;
  ps_status connected, status;
  bool stop; /* changed atomically: who is silent may leave */
} other;

static void serve(other *self, ps_pair *pair, const ps_backend *backend)
{
  ps_link *link;
  ps_follower *follower;
  ps_work work = {.count = 1};
  ps_wait wait = within(self->patience_ms);
  self->status = ps_nccl_open(pair, backend, &layout, 2, &link);
  self->status =
      self->status == PS_OK ? ps_follower_create(&layout, link, &follower) : self->status;
  if (self->status != PS_OK) {
    return;
  }
  for (int round = 0; self->status == PS_OK && work.count > 0; ++round) {
    self->status = ps_follower_next(follower, &wait, &work);
    for (int slot = 0; self->status == PS_OK && slot < work.count; ++slot) {
      evaluate(work.step[slot], work.point[slot], work.output[slot]);
    }
    bool now = round == self->at;
    if (now && self->does == FALLS_SILENT) {
      while (!__atomic_load_n(&self->stop, __ATOMIC_ACQUIRE)) {
        sleep_ms(1);
      }
    }
    if (now && self->does == LEAVES) {
      break;
    }
    if (now && self->does == NOT_A_NUMBER && self->status == PS_OK && work.count > 0) {
      const float nan = NAN;
      CHECK_EQ(fake->fake_write(work.output[0], &nan, sizeof nan), 0);
    }
    if (self->status == PS_OK && work.count > 0) {
      self->status = now && self->does == RAISES
                         ? ps_follower_fail(follower, "the model fell over")
                         : ps_follower_submit(follower, PS_F32, round == 2, 0);
    }
  }
  ps_follower_destroy(follower);
}

static void *live(void *ctx)
{
  other *self = ctx;
  const ps_backend *backend;
  ps_pair *pair;
  ps_wait wait = within(self->patience_ms);
  CHECK_OK(ps_cuda_open(1, &backend));
  self->connected = ps_nccl_connect(self->id, PS_FOLLOWS, backend, &wait, &pair);
  for (int run = 0; self->connected == PS_OK && run < self->runs; ++run) {
    serve(self, pair, backend);
  }
  if (self->connected == PS_OK) {
    ps_nccl_close(pair);
  }
  backend->release(backend);
  return NULL;
}

static void start(other *self, const unsigned char *id, conduct does, int at, int runs,
                  int patience_ms)
{
  *self = (other){.id = id, .does = does, .at = at, .runs = runs, .patience_ms = patience_ms};
  CHECK_EQ(pthread_create(&self->thread, NULL, live, self), 0);
}

static void finish(other *self)
{
  __atomic_store_n(&self->stop, true, __ATOMIC_RELEASE);
  CHECK_EQ(pthread_join(self->thread, NULL), 0);
}

/* The leader's run on device 0, over the link or alone; x at its end. */
static ps_status lead(const ps_backend *backend, ps_link *link, double tolerance,
                      int64_t deadline_ns, float *x, ps_report *report, ps_leader **kept)
{
  static const int slots[2] = {1, 2};
  ps_program *program = stage_euler(STEPS);
  ps_link *links[2] = {NULL, link};
  ps_options options;
  ps_leader *leader;
  void *x_there = fake->fake_alloc(0, sizeof(float) * SIZE);
  void *m_there = fake->fake_alloc(0, sizeof(float) * SIZE);
  ps_options_init(&options);
  options.tolerance = tolerance;
  options.max_stride = 1;
  options.deadline_ns = deadline_ns;
  for (int i = 0; i < SIZE; ++i) {
    x[i] = (float)(i + 1) / 7;
  }
  CHECK_EQ(fake->fake_write(x_there, x, sizeof(float) * SIZE), 0);
  ps_status status = ps_leader_create(program, &layout, &options, backend, links,
                                      link != NULL ? 2 : 1, slots, &leader);
  CHECK_OK(status);
  for (int step = 0; status == PS_OK && step < STEPS; ++step) {
    ps_verdict verdict;
    status = ps_leader_ask(leader, step, x_there, m_there, &verdict);
    if (status == PS_OK && verdict == PS_EVALUATE) {
      evaluate(step, x_there, m_there);
      status = ps_leader_submit(leader, m_there, PS_F32, 0);
    }
    status = status == PS_OK ? ps_leader_advance(leader, NULL, x_there) : status;
  }
  CHECK_EQ(fake->fake_read(x, x_there, sizeof(float) * SIZE), 0);
  ps_leader_finish(leader);
  CHECK_OK(ps_leader_report(leader, report));
  fake->fake_free(x_there);
  fake->fake_free(m_there);
  *kept = leader; /* the report is its own */
  ps_program_release(program);
  return status;
}

/* ---- runs ------------------------------------------------------------------------------------ */

TEST(runs_over_one_pair)
{
  enum { RUNS = 3 };
  unsigned char id[PS_NCCL_ID_BYTES];
  const ps_backend *backend;
  ps_pair *pair;
  ps_leader *leader;
  ps_report report;
  ps_wait wait = within(20000);
  float x[SIZE], alone[SIZE];
  other follower;
  begin();
  CHECK_OK(ps_nccl_id(id));
  start(&follower, id, HONEST, -1, RUNS, 20000);
  CHECK_OK(ps_cuda_open(0, &backend));
  CHECK_OK(ps_nccl_connect(id, PS_LEADS, backend, &wait, &pair));
  CHECK_OK(lead(backend, NULL, 0, 0, alone, &report, &leader));
  ps_leader_destroy(leader);
  for (int run = 0; run < RUNS; ++run) {
    ps_link *link, *second;
    CHECK_OK(ps_nccl_open(pair, backend, &layout, 2, &link));
    CHECK_STR(link->ops->transport, "nccl");
    CHECK_STATUS(ps_nccl_open(pair, backend, &layout, 2, &second), PS_STATE);
    CHECK_OK(lead(backend, link, run == 1 ? INFINITY : 0.0, 0, x, &report, &leader));
    CHECK_EQ(report.failed, 0);
    CHECK(report.evaluations[1] > 0);
    CHECK(run == 1 ? report.rounds < STEPS : report.rounds == STEPS);
    if (run != 1) {
      CHECK_BYTES(x, alone, sizeof x);
    }
    ps_leader_destroy(leader);
  }
  finish(&follower);
  CHECK_OK(follower.status);
  ps_nccl_close(pair);
  backend->release(backend);
  end();
}

static void check_loss(conduct does, int at, ps_status expected)
{
  unsigned char id[PS_NCCL_ID_BYTES];
  const ps_backend *backend;
  ps_pair *pair;
  ps_link *link;
  ps_leader *leader;
  ps_report report;
  ps_wait wait = within(20000);
  float x[SIZE], alone[SIZE];
  other follower;
  begin();
  CHECK_OK(ps_nccl_id(id));
  start(&follower, id, does, at, 1, 2000);
  CHECK_OK(ps_cuda_open(0, &backend));
  CHECK_OK(ps_nccl_connect(id, PS_LEADS, backend, &wait, &pair));
  CHECK_OK(lead(backend, NULL, 0, 0, alone, &report, &leader));
  ps_leader_destroy(leader);
  CHECK_OK(ps_nccl_open(pair, backend, &layout, 2, &link));
  CHECK_OK(lead(backend, link, 0, 300 * INT64_C(1000000), x, &report, &leader));
  CHECK_EQ(report.failed, 1);
  CHECK_EQ(report.failures[0].status, expected);
  CHECK_BYTES(x, alone, sizeof x);
  ps_leader_destroy(leader);
  if (expected == PS_DEADLINE) { /* something was on its way: the pair is gone with the run */
    CHECK(!ps_nccl_alive(pair));
    CHECK_OK(ps_nccl_open(pair, backend, &layout, 2, &link));
    CHECK_OK(lead(backend, link, 0, 0, x, &report, &leader));
    CHECK_EQ(report.failures[0].status, PS_LOST);
    CHECK_BYTES(x, alone, sizeof x);
    ps_leader_destroy(leader);
  }
  finish(&follower);
  ps_nccl_close(pair);
  backend->release(backend);
  end();
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

/* ---- connecting ------------------------------------------------------------------------------ */

TEST(a_rank_that_never_arrives)
{
  unsigned char id[PS_NCCL_ID_BYTES];
  const ps_backend *backend;
  ps_pair *pair;
  ps_wait wait = within(50);
  begin();
  CHECK_OK(ps_nccl_id(id));
  CHECK_OK(ps_cuda_open(0, &backend));
  CHECK_STATUS(ps_nccl_connect(id, PS_LEADS, backend, &wait, &pair), PS_DEADLINE);
  CHECK(pair == NULL);
  CHECK_STATUS(ps_nccl_connect(id, PS_LEADS, ps_backend_find("cpu"), &wait, &pair), PS_DEVICE);
  ps_nccl_close(NULL);
  backend->release(backend);
  end();
}

static void *lose_soon(void *pair)
{
  sleep_ms(50);
  ps_nccl_lost(pair, "killed by signal 9");
  return NULL;
}

/* NCCL itself would wait for ever; whoever started the process knows. */
TEST(a_process_that_is_gone)
{
  unsigned char id[PS_NCCL_ID_BYTES];
  const ps_backend *backend;
  ps_pair *pair;
  ps_link *link;
  ps_leader *leader;
  ps_report report;
  pthread_t thread;
  ps_wait wait = within(20000);
  float x[SIZE];
  other follower;
  begin();
  CHECK_OK(ps_nccl_id(id));
  start(&follower, id, FALLS_SILENT, 1, 1, 2000);
  CHECK_OK(ps_cuda_open(0, &backend));
  CHECK_OK(ps_nccl_connect(id, PS_LEADS, backend, &wait, &pair));
  CHECK_OK(ps_nccl_open(pair, backend, &layout, 2, &link));
  CHECK_EQ(pthread_create(&thread, NULL, lose_soon, pair), 0);
  CHECK_OK(lead(backend, link, 0, 0, x, &report, &leader));
  CHECK_EQ(report.failed, 1);
  CHECK_EQ(report.failures[0].status, PS_LOST);
  CHECK_STR(report.failures[0].text, "killed by signal 9");
  ps_leader_destroy(leader);
  CHECK_EQ(pthread_join(thread, NULL), 0);
  finish(&follower);
  ps_nccl_close(pair);
  backend->release(backend);
  end();
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
  ps_wait wait = within(300);
  float x[SIZE], alone[SIZE];
  other follower;
  begin();
  CHECK_OK(ps_cuda_open(0, &backend));
  CHECK_OK(lead(backend, NULL, 0, 0, alone, &report, &leader));
  ps_leader_destroy(leader);
  CHECK_OK(ps_nccl_id(id));
  fake_nccl->fake_nccl_fail(function, n, result);
  start(&follower, id, HONEST, -1, 1, 300);
  ps_status status = ps_nccl_connect(id, PS_LEADS, backend, &wait, &pair);
  if (status == PS_OK && ps_nccl_open(pair, backend, &layout, 2, &link) == PS_OK) {
    CHECK_OK(lead(backend, link, 0, 300 * INT64_C(1000000), x, &report, &leader));
    CHECK_BYTES(x, alone, sizeof x);
    ps_leader_destroy(leader);
  }
  ps_nccl_close(pair);
  fake_nccl->fake_nccl_fail("", 0, 0);
  pthread_join(follower.thread, NULL);
  backend->release(backend);
  end();
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

/* ---- faults at random ------------------------------------------------------------------------ */

/* One accident of a follower, of NCCL or of the process, at a moment drawn at random. */
static void survive(uint64_t *random, const float *alone, const ps_backend *backend)
{
  static const char *const functions[] = {"ncclCommInitRankConfig", "ncclSend", "ncclRecv",
                                          "ncclCommGetAsyncError"};
  enum { CALLS = sizeof functions / sizeof *functions, LOST = CONDUCTS + CALLS };
  unsigned char id[PS_NCCL_ID_BYTES];
  ps_pair *pair;
  ps_link *link;
  ps_leader *leader;
  ps_report report;
  ps_wait wait = within(300);
  float x[SIZE];
  other follower;
  pthread_t thread;
  int what = draw(random, LOST + 1), when = draw(random, STEPS);
  conduct does = what < CONDUCTS ? (conduct)what : HONEST;
  bool loses = what == LOST;
  CHECK_OK(ps_nccl_id(id));
  if (what >= CONDUCTS && !loses) {
    fake_nccl->fake_nccl_fail(functions[what - CONDUCTS], 1 + 2 * when, 6);
  }
  start(&follower, id, does, when, 2, 300);
  ps_status status = ps_nccl_connect(id, PS_LEADS, backend, &wait, &pair);
  loses = loses && status == PS_OK && pthread_create(&thread, NULL, lose_soon, pair) == 0;
  for (int run = 0; status == PS_OK && run < 2; ++run) {
    CHECK_OK(ps_nccl_open(pair, backend, &layout, 2, &link));
    CHECK_OK(lead(backend, link, 0, 60 * INT64_C(1000000), x, &report, &leader));
    CHECK_BYTES(x, alone, sizeof x);
    ps_leader_destroy(leader);
  }
  if (loses) {
    CHECK_EQ(pthread_join(thread, NULL), 0);
  }
  ps_nccl_close(pair);
  finish(&follower);
  fake_nccl->fake_nccl_fail("", 0, 0);
}

TEST_WITHIN(chaos, 600)
{
  const ps_backend *backend;
  ps_leader *leader;
  ps_report report;
  float alone[SIZE];
  uint64_t random = 1234;
  begin();
  CHECK_OK(ps_cuda_open(0, &backend));
  CHECK_OK(lead(backend, NULL, 0, 0, alone, &report, &leader));
  ps_leader_destroy(leader);
  for (int left = runner_faults() / 2; left > 0; --left) {
    survive(&random, alone, backend);
  }
  backend->release(backend);
  end();
}

TEST(without_the_library)
{
  unsigned char id[PS_NCCL_ID_BYTES];
  if (ps_nccl_version() > 0) {
    runner_skip("this machine has NCCL");
  }
  CHECK_STATUS(ps_nccl_id(id), PS_UNSUPPORTED);
}
