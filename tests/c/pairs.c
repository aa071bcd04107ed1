/* pairs.c - two ranks over the nccl transport; see pairs.h. */
#include "pairs.h"

#include <math.h>
#include <time.h>

#include "runner.h"
#include "stage.h"

static const fake_setting plain = {2, 1, 1, 3};
const fake_api *pairs_fake;
const fake_nccl_api *pairs_nccl;
const ps_layout pairs_layout = {1, PAIR_SIZE, PS_F32, PS_F32};

ps_wait pairs_within(int ms)
{
  return (ps_wait){ps_now_ns() + ms * INT64_C(1000000), NULL, NULL};
}

void pairs_sleep_ms(int ms)
{
  const struct timespec pause = {ms / 1000, (ms % 1000) * 1000000L};
  nanosleep(&pause, NULL);
}

void pairs_begin(void)
{
  pairs_fake = fakes_begin(&plain, 1);
  pairs_nccl = fakes_nccl();
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
  pairs_fake->fake_drain();
}

/* Aborting is done in threads that nobody waits for. */
void pairs_settle(void)
{
  for (int k = 0; k < 3000 && pairs_nccl->fake_nccl_live() > 0; ++k) {
    bury();
    pairs_sleep_ms(1);
  }
  CHECK_EQ(pairs_nccl->fake_nccl_live(), 0);
}

void pairs_end(void)
{
  pairs_settle();
  pairs_fake->fake_drain();
  bury();
  bury();
  fakes_end(pairs_fake);
}

/* ---- two ranks ------------------------------------------------------------------------------- */

static void evaluate(int step, const void *point, void *output)
{
  float x[PAIR_SIZE];
  CHECK_EQ(pairs_fake->fake_read(x, point, sizeof x), 0);
  for (int i = 0; i < PAIR_SIZE; ++i) {
    x[i] = tanhf(x[i]) / (float)(step + 1);
  }
  CHECK_EQ(pairs_fake->fake_write(output, x, sizeof x), 0);
}

static void serve(other *self, ps_pair *pair, const ps_backend *backend)
{
  ps_link *link;
  ps_follower *follower;
  ps_work work = {.count = 1};
  ps_wait wait = pairs_within(self->patience_ms);
  self->status = ps_nccl_open(pair, backend, &pairs_layout, 2, &link);
  self->status =
      self->status == PS_OK ? ps_follower_create(&pairs_layout, link, &follower) : self->status;
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
        pairs_sleep_ms(1);
      }
    }
    if (now && self->does == LEAVES) {
      break;
    }
    if (now && self->does == NOT_A_NUMBER && self->status == PS_OK && work.count > 0) {
      const float nan = NAN;
      CHECK_EQ(pairs_fake->fake_write(work.output[0], &nan, sizeof nan), 0);
    }
    if (self->status == PS_OK && work.count > 0) {
      self->status =
          now && self->does == RAISES
              ? ps_follower_fail(follower, "the model fell over")
              : ps_follower_submit(follower, now && self->does == WRONG_DTYPE ? PS_F16 : PS_F32,
                                   round == 2, 0);
    }
  }
  ps_follower_destroy(follower);
}

static void *live(void *ctx)
{
  other *self = ctx;
  const ps_backend *backend;
  ps_pair *pair;
  ps_wait wait = pairs_within(self->patience_ms);
  self->connected = ps_cuda_open(1, &backend);
  if (self->connected != PS_OK) {
    return NULL;
  }
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

void other_start(other *self, const unsigned char *id, conduct does, int at, int runs,
                 int patience_ms)
{
  *self = (other){.id = id, .does = does, .at = at, .runs = runs, .patience_ms = patience_ms};
  CHECK_EQ(pthread_create(&self->thread, NULL, live, self), 0);
}

void other_finish(other *self)
{
  __atomic_store_n(&self->stop, true, __ATOMIC_RELEASE);
  CHECK_EQ(pthread_join(self->thread, NULL), 0);
}

ps_status pairs_lead(const leading *how, float *x, ps_report *report, ps_leader **leader)
{
  static const int slots[2] = {1, 2};
  ps_program *program = stage_euler(PAIR_STEPS);
  ps_link *links[2] = {NULL, how->link};
  ps_options options;
  void *x_there = pairs_fake->fake_alloc(0, sizeof(float) * PAIR_SIZE);
  void *m_there = pairs_fake->fake_alloc(0, sizeof(float) * PAIR_SIZE);
  ps_options_init(&options);
  options.tolerance = how->tolerance;
  options.max_stride = 1;
  options.deadline_ns = how->deadline_ns;
  options.check = how->check;
  options.check_ctx = how->ctx;
  for (int i = 0; i < PAIR_SIZE; ++i) {
    x[i] = (float)(i + 1) / 7;
  }
  CHECK_EQ(pairs_fake->fake_write(x_there, x, sizeof(float) * PAIR_SIZE), 0);
  ps_status status = ps_leader_create(program, &pairs_layout, &options, how->backend, links,
                                      how->link != NULL ? 2 : 1, slots, leader);
  for (int step = 0; status == PS_OK && step < PAIR_STEPS; ++step) {
    ps_verdict verdict;
    if (how->stops && step == how->at) {
      break;
    }
    status = ps_leader_ask(*leader, step, x_there, m_there, &verdict);
    if (status == PS_OK && verdict == PS_EVALUATE) {
      evaluate(step, x_there, m_there);
      status = ps_leader_submit(*leader, m_there, PS_F32, 0);
    }
    status = status == PS_OK ? ps_leader_advance(*leader, NULL, x_there) : status;
  }
  CHECK_EQ(pairs_fake->fake_read(x, x_there, sizeof(float) * PAIR_SIZE), 0);
  if (*leader != NULL) {
    ps_leader_finish(*leader);
    CHECK_OK(ps_leader_report(*leader, report));
  }
  pairs_fake->fake_free(x_there);
  pairs_fake->fake_free(m_there);
  ps_program_release(program);
  return status;
}
