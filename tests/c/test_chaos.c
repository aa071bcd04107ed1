/* test_chaos.c - faults drawn at random, as many as asked for: `tests --faults 1000 chaos`, which
 * is `make chaos`; a hundred otherwise.
 *
 * Each run has a transport, ranks, slots, tolerance and stride of its own, and up to two faults: of
 * a follower, of the wire or of the host.  Afterwards the picture is there, at tolerance
 * 0 to the bit, unless the fault was the leader's own, which must come out as the error that it is;
 * no thread, descriptor or block of memory is left, and a run that hangs ends this process: the
 * runner's limit is the watchdog.  After each comes one without a fault.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "left.h"
#include "runner.h"
#include "stage.h"

enum { STEPS = 7, RANKS = 4, FAULTS_A_RUN = 2 };

typedef enum fault {
  RAISES,
  NOT_A_NUMBER,
  INFINITE,
  WRONG_DTYPE,
  DIES_AT_WORK,    /* lets its end go instead of an output */
  DIES_WHILE_IDLE, /* lets its end go instead of taking the work */
  HANGS,           /* until the run is over */
  LATE,            /* past the deadline, then it answers */
  OTHER_FUNCTION,
  RUBBISH, /* from here on: on the wire alone */
  CUT,
  REPEATED,
  SWALLOWED,
  REFUSED,
  INTERRUPTED, /* Ctrl-C while the leader waits for one that hangs */
  STOPPED,     /* Ctrl-C in the leader's own forward */
  FAULTS,
} fault;

typedef struct accident {
  fault what;
  int rank, round; /* of its work, counted from 0 */
} accident;

typedef struct chaos {
  accident plan[FAULTS_A_RUN];
  int faults;
  uint64_t *random;
  int sent[RANKS]; /* messages of each follower so far */
  bool over;       /* changed atomically: who hangs may go */
} chaos;

static uint32_t draw(uint64_t *random, uint32_t below)
{
  return (uint32_t)(fabs(stage_random(random)) * below) % below;
}

static bool is_due(const chaos *all, fault what, int rank, int round)
{
  for (int k = 0; k < all->faults; ++k) {
    const accident *a = &all->plan[k];
    if (a->what == what && a->rank == rank && a->round == round) {
      return true;
    }
  }
  return false;
}

static bool is_planned(const chaos *all, fault what)
{
  for (int k = 0; k < all->faults; ++k) {
    if (all->plan[k].what == what) {
      return true;
    }
  }
  return false;
}

/* ---- followers ------------------------------------------------------------------------------- */

static void sleep_ms(int ms)
{
  const struct timespec pause = {ms / 1000, (ms % 1000) * 1000000L};
  nanosleep(&pause, NULL);
}

static void spoil(stage_rank *self, const ps_work *work, double value, bool scale)
{
  ps_dtype m = self->on->layout.m;
  for (int slot = 0; slot < work->count; ++slot) {
    double was = stage_load(work->output[slot], m, 0);
    stage_store(work->output[slot], m, 0, scale ? was * value + 0.5 : value);
  }
}

static ps_status hand_in(stage_rank *self, const ps_work *work, int round)
{
  chaos *all = self->on->ctx;
  int rank = self->rank;
  for (int slot = 0; slot < work->count; ++slot) {
    stage_evaluate(self, work->step[slot], work->point[slot], work->output[slot]);
  }
  if (is_due(all, NOT_A_NUMBER, rank, round) || is_due(all, INFINITE, rank, round)) {
    spoil(self, work, is_due(all, INFINITE, rank, round) ? INFINITY : NAN, false);
  }
  if (is_due(all, OTHER_FUNCTION, rank, 0)) {
    spoil(self, work, 1.5, true);
  }
  bool hangs = is_due(all, HANGS, rank, round) || is_due(all, INTERRUPTED, rank, round);
  while (hangs && !__atomic_load_n(&all->over, __ATOMIC_ACQUIRE)) {
    sleep_ms(1);
  }
  if (is_due(all, LATE, rank, round)) {
    sleep_ms(60);
  }
  if (is_due(all, RAISES, rank, round)) {
    return ps_follower_fail(self->follower, "the model fell over");
  }
  bool wrong = is_due(all, WRONG_DTYPE, rank, round);
  return ps_follower_submit(self->follower, wrong ? PS_F16 : self->on->layout.m, 0, 0);
}

static ps_status serve_chaos(stage_rank *self)
{
  chaos *all = self->on->ctx;
  ps_work work = {.count = 1};
  ps_status status = PS_OK;
  for (int round = 0; status == PS_OK && work.count > 0; ++round) {
    bool idle = is_due(all, DIES_WHILE_IDLE, self->rank, round);
    if (!idle) {
      status = ps_follower_next(self->follower, NULL, &work);
    }
    bool working = status == PS_OK && work.count > 0;
    if (idle || (working && is_due(all, DIES_AT_WORK, self->rank, round))) {
      ps_follower_destroy(self->follower);
      self->follower = NULL;
      return PS_OK;
    }
    if (working) {
      status = hand_in(self, &work, round);
    }
  }
  return status;
}

/* ---- the wire -------------------------------------------------------------------------------- */

/* What a follower's carrier does to one of its messages. */
static ps_status on_wire(stage_rank *self, ps_inbox *to, unsigned char *message, size_t bytes)
{
  chaos *all = self->on->ctx;
  int rank = self->rank, round = bytes > 0 ? all->sent[rank]++ : -1;
  if (is_due(all, REFUSED, rank, round)) {
    return PS_LOST;
  }
  if (is_due(all, SWALLOWED, rank, round)) {
    return PS_OK;
  }
  if (is_due(all, RUBBISH, rank, round)) {
    message[(size_t)round % 48] ^= 0x55; /* magic to count */
  }
  if (is_due(all, CUT, rank, round)) {
    bytes /= 2;
  }
  ps_status status = ps_inbox_deliver(to, message, bytes);
  return is_due(all, REPEATED, rank, round) ? ps_inbox_deliver(to, message, bytes) : status;
}

/* ---- the host -------------------------------------------------------------------------------- */

static int interrupt(void *ctx)
{
  return is_planned(ctx, INTERRUPTED);
}

/* The binding finishes a run whose host does not come back from its forward. */
static void stop(stage *on, int step, const void *x, void *m, ps_verdict verdict)
{
  chaos *all = on->ctx;
  (void)x, (void)m, (void)verdict;
  for (int rank = 1; on->leader != NULL && rank < RANKS; ++rank) {
    if (is_due(all, STOPPED, rank, step)) {
      ps_leader_finish(on->leader);
    }
  }
}

static void set(stage *on, ps_program *program, chaos *all, bool by_host)
{
  uint64_t *random = all->random;
  stage_set(on, program, 2 + (int)draw(random, RANKS - 1), 2, 5, PS_F32, PS_F32);
  on->by_host = by_host;
  on->wire = by_host ? on_wire : NULL;
  on->ctx = all;
  on->serve = serve_chaos;
  on->after = stop;
  on->options.tolerance = draw(random, 2) == 0 ? 0.0 : 0.05;
  on->options.max_stride = draw(random, 2) == 0 ? 1 : 0;
  on->options.deadline_ns = (is_planned(all, INTERRUPTED) ? 5000 : 40) * INT64_C(1000000);
  on->options.check = interrupt;
  on->options.check_ctx = all;
  on->slots[1] = 1 + (int)draw(random, 3);
}

static void plan(chaos *all, uint64_t *random, int faults, bool by_host)
{
  *all = (chaos){.random = random, .faults = faults};
  for (int k = 0; k < faults; ++k) {
    fault what = (fault)draw(random, FAULTS);
    while (!by_host && what >= RUBBISH && what < INTERRUPTED) {
      what = (fault)draw(random, FAULTS);
    }
    all->plan[k] = (accident){what, 1 + (int)draw(random, RANKS - 1), (int)draw(random, 4)};
  }
}

static void let_go(chaos *all)
{
  __atomic_store_n(&all->over, true, __ATOMIC_RELEASE);
}

/* Whether the picture is there; else the leader's status is the fault's own. */
static bool came_out(const stage *on, const chaos *all)
{
  if (on->failure == PS_OK) {
    return true;
  }
  CHECK((on->failure == PS_INTERRUPTED && is_planned(all, INTERRUPTED)) ||
        (on->failure == PS_STATE && is_planned(all, STOPPED)));
  return false;
}

static void check_picture(const stage *on, const float *x, const float *alone)
{
  if (on->options.tolerance == 0.0) {
    CHECK(memcmp(x, alone, stage_x_bytes(on)) == 0);
  }
  for (size_t i = 0; i < stage_elements(on); ++i) {
    CHECK(isfinite(x[i]));
  }
}

static void run(ps_program *program, chaos *all, bool by_host)
{
  stage on;
  set(&on, program, all, by_host);
  float *x = stage_latent(&on, 5), *alone = stage_copy(x, stage_x_bytes(&on));
  stage_plain(&on, alone);
  stage_open(&on);
  stage_run(&on, x);
  let_go(all);
  stage_end(&on);
  if (came_out(&on, all)) {
    check_picture(&on, x, alone);
  }
  stage_close(&on);
  free(alone);
  free(x);
}

static void inject(bool by_host)
{
  ps_program *program = stage_multistep(STEPS);
  uint64_t random = by_host ? 4711 : 815;
  chaos none = {.random = &random};
  run(program, &none, by_host); /* a sanitizer starts a thread of its own with the first one */
  left before = left_now();
  for (int more = runner_faults() / 3; more > 0;) {
    chaos all;
    int faults = 1 + (more > 1 && draw(&random, 3) == 0);
    plan(&all, &random, faults, by_host);
    run(program, &all, by_host);
    run(program, &none, by_host);
    more -= faults;
  }
  left_check(&before);
  ps_program_release(program);
}

TEST_WITHIN(threads, 600)
{
  inject(false);
}

TEST_WITHIN(host, 600)
{
  inject(true);
}
