/* stage.c - the host, the followers and the numbers of test runs; see stage.h. */
#include "stage.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"

/* ---- numbers --------------------------------------------------------------------------------- */

double stage_random(uint64_t *state)
{
  *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return (double)(int64_t)*state / 0x1p63;
}

/* value rounded to `bits` binary digits; below 2^lowest the last place stays what it is there. */
static double round_to(double value, int bits, int lowest)
{
  int exponent;
  frexp(value, &exponent);
  exponent = exponent - 1 < lowest ? lowest : exponent - 1;
  return ldexp(nearbyint(ldexp(value, bits - 1 - exponent)), exponent - bits + 1);
}

static double load_f16(uint16_t half)
{
  int exponent = half >> 10 & 31, mantissa = half & 1023;
  double magnitude = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) {
    magnitude = mantissa != 0 ? NAN : INFINITY;
  }
  return half & 0x8000 ? -magnitude : magnitude;
}

static uint16_t store_f16(double value)
{
  double magnitude = fabs(round_to(value, 11, -14));
  unsigned sign = signbit(value) ? 0x8000 : 0;
  int exponent;
  if (isnan(value)) {
    return 0x7e00;
  }
  if (magnitude > 65504.0) {
    return (uint16_t)(sign | 0x7c00);
  }
  if (magnitude < 0x1p-14) {
    return (uint16_t)(sign | (unsigned)ldexp(magnitude, 24));
  }
  frexp(magnitude, &exponent);
  return (uint16_t)(sign | ((unsigned)(exponent + 14) << 10) |
                    ((unsigned)ldexp(magnitude, 11 - exponent) & 1023));
}

static double load_f32(uint32_t bits)
{
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint32_t store_f32(double value)
{
  float narrow = (float)value;
  uint32_t bits;
  memcpy(&bits, &narrow, sizeof bits);
  return bits;
}

/* A bf16 is the upper half of a float, so rounding to its 8 digits leaves the lower half empty. */
static uint16_t store_bf16(double value)
{
  return isnan(value) ? 0x7fc0 : (uint16_t)(store_f32(round_to(value, 8, -126)) >> 16);
}

double stage_load(const void *p, ps_dtype dtype, size_t i)
{
  switch (dtype) {
  case PS_F64: return ((const double *)p)[i];
  case PS_F32: return ((const float *)p)[i];
  case PS_F16: return load_f16(((const uint16_t *)p)[i]);
  case PS_BF16: return load_f32((uint32_t)((const uint16_t *)p)[i] << 16);
  case PS_NONE: break;
  }
  runner_fail(__FILE__, __LINE__, "an element of no dtype");
}

void stage_store(void *p, ps_dtype dtype, size_t i, double value)
{
  switch (dtype) {
  case PS_F64: ((double *)p)[i] = value; return;
  case PS_F32: ((float *)p)[i] = (float)value; return;
  case PS_F16: ((uint16_t *)p)[i] = store_f16(value); return;
  case PS_BF16: ((uint16_t *)p)[i] = store_bf16(value); return;
  case PS_NONE: break;
  }
  runner_fail(__FILE__, __LINE__, "an element of no dtype");
}

size_t stage_elements(const stage *on)
{
  return on->layout.items * on->layout.size;
}

size_t stage_x_bytes(const stage *on)
{
  return stage_elements(on) * ps_dtype_size(on->layout.x);
}

/* The dtype of outputs, x's own where the layout leaves it open. */
static ps_dtype output_dtype(const stage *on)
{
  return on->layout.m != PS_NONE ? on->layout.m : on->layout.x;
}

size_t stage_m_bytes(const stage *on)
{
  return stage_elements(on) * ps_dtype_size(output_dtype(on));
}

void *stage_copy(const void *from, size_t bytes)
{
  void *copy = malloc(bytes);
  CHECK(copy != NULL);
  return memcpy(copy, from, bytes);
}

void *stage_latent(const stage *on, uint64_t seed)
{
  void *x = calloc(1, stage_x_bytes(on));
  CHECK(x != NULL);
  for (size_t i = 0; i < stage_elements(on); ++i) {
    stage_store(x, on->layout.x, i, 3.0 * stage_random(&seed) + 2.0 * stage_random(&seed));
  }
  return x;
}

double *stage_noise(const stage *on)
{
  size_t n = stage_elements(on) * (size_t)ps_program_steps(on->program);
  double *noise = malloc(n * sizeof *noise);
  uint64_t seed = 23;
  CHECK(noise != NULL && on->layout.x == PS_F64);
  for (size_t i = 0; i < n; ++i) {
    noise[i] = stage_random(&seed) + stage_random(&seed);
  }
  return noise;
}

/* ---- programs -------------------------------------------------------------------------------- */

void stage_levels(int steps, double *sigma)
{
  for (int j = 0; j < steps; ++j) {
    sigma[j] = 10.0 * pow(0.01, steps > 1 ? (double)j / (steps - 1) : 0.0);
  }
  sigma[steps] = 0.0;
}

ps_program *stage_euler(int steps)
{
  double sigma[STAGE_SEEN];
  ps_program *program;
  stage_levels(steps, sigma);
  CHECK_OK(ps_program_euler(steps, sigma, &program));
  return program;
}

ps_program *stage_multistep(int steps)
{
  double sigma[STAGE_SEEN];
  ps_program *program;
  stage_levels(steps, sigma);
  CHECK_OK(ps_program_adams_bashforth(steps, sigma, 3, &program));
  return program;
}

ps_program *stage_ancestral(int steps)
{
  double sigma[STAGE_SEEN], a[STAGE_SEEN], b[STAGE_SEEN], c[STAGE_SEEN], g[STAGE_SEEN];
  ps_program *program;
  stage_levels(steps, sigma);
  for (int j = 0; j < steps; ++j) {
    a[j] = 1.0;
    b[j] = 0.8 * sigma[j + 1] - sigma[j];
    c[j] = 0.6 * sigma[j + 1];
    g[j] = 0.5 / sigma[j];
  }
  CHECK_OK(ps_program_create(steps, 1, a, b, c, sigma, g, NULL, &program));
  return program;
}

/* ---- evaluations ----------------------------------------------------------------------------- */

/* Smooth, not linear, other in every element and step, and of the size of a noise prediction. */
double stage_f(const stage_rank *self, int step, double x, size_t i)
{
  (void)self;
  return sin(1.1 * x + 0.07 * step + 0.3 * (double)(i % 7)) + 0.2 * x;
}

void stage_evaluate(stage_rank *self, int step, const void *x, void *m)
{
  const stage *on = self->on;
  CHECK_LT(self->seen, STAGE_SEEN);
  self->step[self->seen] = step;
  self->point[self->seen++] = stage_copy(x, stage_x_bytes(on));
  for (size_t i = 0; i < stage_elements(on); ++i) {
    stage_store(m, output_dtype(on), i, on->f(self, step, stage_load(x, on->layout.x, i), i));
  }
}

const void *stage_guess(const stage *on, int step)
{
  for (int rank = 1; rank < on->ranks; ++rank) {
    for (int k = on->rank[rank].seen - 1; k >= 0; --k) {
      if (on->rank[rank].step[k] == step) {
        return on->rank[rank].point[k];
      }
    }
  }
  return NULL;
}

static bool evaluate_in_place(stage_rank *self, int step, void *x, void *m)
{
  stage_evaluate(self, step, x, m);
  return false;
}

ps_status stage_serve(stage_rank *self)
{
  ps_work work;
  ps_status status = ps_follower_next(self->follower, NULL, &work);
  while (status == PS_OK && work.count > 0) {
    CHECK_EQ(work.point_bytes, stage_x_bytes(self->on));
    bool moved = false;
    for (int slot = 0; slot < work.count; ++slot) {
      moved |= self->on->evaluate(self, work.step[slot], work.point[slot], work.output[slot]);
    }
    status = ps_follower_submit(self->follower, output_dtype(self->on), moved, 0);
    if (status == PS_OK) {
      status = ps_follower_next(self->follower, NULL, &work);
    }
  }
  return status;
}

/* A serve that has already let its end go leaves NULL behind. */
static void *follow(void *arg)
{
  stage_rank *self = arg;
  self->status = self->on->serve(self);
  ps_follower_destroy(self->follower);
  self->follower = NULL;
  return NULL;
}

/* ---- the run --------------------------------------------------------------------------------- */

void stage_set(stage *on, ps_program *program, int ranks, size_t items, size_t size, ps_dtype x,
               ps_dtype m)
{
  memset(on, 0, sizeof *on);
  on->program = program;
  on->ranks = ranks;
  on->layout = (ps_layout){items, size, x, m};
  ps_options_init(&on->options);
  on->options.max_stride = 1; /* test_strided.c has the others */
}

/* A carrier's context: the other end's inbox, which it releases in the end. */
typedef struct wire {
  ps_inbox *to;
  stage_rank *from; /* the follower that sends; NULL where nobody minds */
} wire;

static ps_status wire_send(void *ctx, const ps_part *parts, int count)
{
  size_t bytes = 0;
  for (int k = 0; k < count; ++k) {
    bytes += parts[k].bytes;
  }
  unsigned char *message = malloc(bytes + 1);
  for (int k = 0, at = 0; k < count; at += (int)parts[k++].bytes) {
    memcpy(message + at, parts[k].data, parts[k].bytes);
  }
  const wire *own = ctx;
  ps_status status = PS_LOST;
  if (own->to != NULL && own->from != NULL && own->from->on->wire != NULL) {
    status = own->from->on->wire(own->from, own->to, message, bytes);
  } else if (own->to != NULL) {
    status = ps_inbox_deliver(own->to, message, bytes);
  }
  free(message);
  return status;
}

static void wire_release(void *ctx)
{
  ps_inbox_release(((wire *)ctx)->to);
  free(ctx);
}

static ps_status host_open(const ps_layout *layout, int slots, stage_rank *self,
                           ps_link **leader_end, ps_link **follower_end)
{
  wire *down = calloc(1, sizeof *down), *up = calloc(1, sizeof *up);
  up->from = self;
  ps_carrier leader_carrier = {wire_send, wire_release, down};
  ps_carrier follower_carrier = {wire_send, wire_release, up};
  *leader_end = *follower_end = NULL;
  ps_status status = ps_host_open(layout, slots, PS_LEADS, 1, ps_backend_find("cpu"),
                                  &leader_carrier, leader_end, &up->to);
  if (status != PS_OK) {
    free(up);
    return status;
  }
  status = ps_host_open(layout, slots, PS_FOLLOWS, 1, ps_backend_find("cpu"), &follower_carrier,
                        follower_end, &down->to);
  if (status != PS_OK) {
    (*leader_end)->ops->close(*leader_end);
    *leader_end = NULL;
  }
  return status;
}

ps_status stage_host_open(const ps_layout *layout, int slots, ps_link **leader_end,
                          ps_link **follower_end)
{
  return host_open(layout, slots, NULL, leader_end, follower_end);
}

const ps_layout stage_small = {1, 4, PS_F32, PS_F64};
const ps_header stage_hello = {.magic = PS_MAGIC,
                               .version = PS_WIRE_VERSION,
                               .kind = PS_MSG_WORK,
                               .count = 1,
                               .round = 7,
                               .dtype = PS_F32,
                               .bytes = 4 * sizeof(float)};
const ps_header stage_output = {.magic = PS_MAGIC,
                                .version = PS_WIRE_VERSION,
                                .kind = PS_MSG_OUTPUT,
                                .count = 1,
                                .round = 7,
                                .dtype = PS_F64,
                                .bytes = 4 * sizeof(double)};

/* A link to a follower in a thread of its own. */
static ps_link *start_follower(stage *on, stage_rank *self)
{
  ps_link *here, *there;
  int slots = on->slots[self->rank];
  CHECK_OK(on->by_host ? host_open(&on->layout, slots, self, &here, &there)
                       : ps_threads_open(&on->layout, slots, &here, &there));
  CHECK_OK(ps_follower_create(&on->layout, there, &self->follower));
  CHECK_EQ(pthread_create(&self->thread, NULL, follow, self), 0);
  return here;
}

void stage_open(stage *on)
{
  ps_link *links[STAGE_RANKS];
  CHECK(on->ranks <= STAGE_RANKS);
  on->f = on->f != NULL ? on->f : stage_f;
  on->evaluate = on->evaluate != NULL ? on->evaluate : evaluate_in_place;
  on->serve = on->serve != NULL ? on->serve : stage_serve;
  on->failure = PS_OK;
  on->ended = false;
  memset(on->verdicts, 0, sizeof on->verdicts);
  for (int rank = 0; rank < on->ranks; ++rank) {
    stage_rank *self = &on->rank[rank];
    *self = (stage_rank){.on = on, .rank = rank};
    on->slots[rank] = on->slots[rank] > 0 ? on->slots[rank] : 1;
    links[rank] = NULL;
    if (rank == 0 && on->lane) {
      on->lane_rank = (stage_rank){.on = on};
      links[0] = start_follower(on, &on->lane_rank);
    } else if (rank > 0) {
      links[rank] = on->link != NULL ? on->link(on, rank) : start_follower(on, self);
    }
  }
  CHECK_OK(ps_leader_create(on->program, &on->layout, &on->options, ps_backend_find("cpu"), links,
                            on->ranks, on->slots, &on->leader));
}

void stage_end(stage *on)
{
  CHECK_OK(ps_leader_finish(on->leader));
  for (int rank = 1; rank < on->ranks && on->link == NULL && !on->ended; ++rank) {
    CHECK_EQ(pthread_join(on->rank[rank].thread, NULL), 0);
  }
  if (on->lane && !on->ended) {
    CHECK_EQ(pthread_join(on->lane_rank.thread, NULL), 0);
  }
  on->ended = true;
}

static void forget_points(stage_rank *self)
{
  for (int k = 0; k < self->seen; ++k) {
    free(self->point[k]);
  }
  self->seen = 0;
}

void stage_close(stage *on)
{
  ps_leader_destroy(on->leader);
  on->leader = NULL;
  for (int rank = 0; rank < on->ranks; ++rank) {
    forget_points(&on->rank[rank]);
  }
  forget_points(&on->lane_rank);
}

ps_report stage_report(const stage *on)
{
  ps_report report;
  CHECK_OK(ps_leader_report(on->leader, &report));
  return report;
}

/* ---- the host -------------------------------------------------------------------------------- */

/* All latents and outputs so far, as the host stores them, in double. */
typedef struct host {
  double *x[STAGE_SEEN], *m[STAGE_SEEN];
} host;

static double *widen(const void *p, ps_dtype dtype, size_t n)
{
  double *wide = malloc(n * sizeof *wide);
  CHECK(wide != NULL);
  for (size_t i = 0; i < n; ++i) {
    wide[i] = stage_load(p, dtype, i);
  }
  return wide;
}

static const void *noise_of(const stage *on, int step)
{
  return (const unsigned char *)on->noise + (size_t)step * stage_x_bytes(on);
}

/* x_{j+1} by row j, rounded to how latents are stored. */
static void host_step(const stage *on, const host *past, int j, void *x)
{
  int history = ps_program_history(on->program);
  const double *a = ps_program_table(on->program, 'a') + (size_t)j * (size_t)history;
  const double *b = ps_program_table(on->program, 'b') + (size_t)j * (size_t)history;
  const double *c = ps_program_table(on->program, 'c');
  for (size_t i = 0; i < stage_elements(on); ++i) {
    double next = on->noise != NULL ? c[j] * stage_load(noise_of(on, j), on->layout.x, i) : 0.0;
    for (int k = 0; k < history && k <= j; ++k) {
      next += a[k] * past->x[j - k][i] + b[k] * past->m[j - k][i];
    }
    stage_store(x, on->layout.x, i, next);
  }
}

/* Tells the library of the noise that its next guesses pass, as soon as it may. */
static ps_status tell_noise(const stage *on, int *told)
{
  ps_status status = PS_OK;
  if (on->noise == NULL || on->keeps_noise_to_self) {
    return PS_OK;
  }
  for (; status == PS_OK && *told < ps_leader_horizon(on->leader); ++*told) {
    status = ps_leader_noise(on->leader, *told, noise_of(on, *told));
  }
  return status;
}

/* m is NULL where all that is to be evaluated lies ahead. */
static ps_status evaluate_own(stage *on, int step, const void *x, void *m)
{
  ps_work work;
  ps_status status = ps_leader_work(on->leader, &work);
  if (m != NULL) {
    stage_evaluate(&on->rank[0], step, x, m);
  }
  for (int k = 0; status == PS_OK && k < work.count; ++k) {
    stage_evaluate(&on->rank[0], work.step[k], work.point[k], work.output[k]);
  }
  return status == PS_OK ? ps_leader_submit(on->leader, m, output_dtype(on), 0) : status;
}

/* The nodes of a strided round ahead of the host's own loop, until it is told what to do here. */
static ps_status evaluate_ahead(stage *on, int step, const void *x, void *m, ps_verdict *verdict)
{
  ps_status status = PS_OK;
  while (status == PS_OK && *verdict == PS_AHEAD) {
    ++on->verdicts[PS_AHEAD];
    status = evaluate_own(on, step, x, NULL);
    status = status == PS_OK ? ps_leader_ask(on->leader, step, x, m, verdict) : status;
  }
  return status;
}

/* One model call of the host.  m holds rubbish beforehand, so that an output not written shows. */
static ps_status host_call(stage *on, int step, void *x, void *m)
{
  ps_verdict verdict = PS_EVALUATE;
  ps_status status = PS_OK;
  memset(m, 0xcd, stage_m_bytes(on));
  if (on->before != NULL) {
    on->before(on, step, x);
  }
  if (on->leader != NULL) {
    status = ps_leader_ask(on->leader, step, x, m, &verdict);
    if (status == PS_OK) {
      status = evaluate_ahead(on, step, x, m, &verdict);
    }
    if (status == PS_OK && verdict == PS_EVALUATE) {
      memset(m, 0xcd, stage_m_bytes(on));
      status = evaluate_own(on, step, x, m);
    }
    ++on->verdicts[verdict];
  } else {
    stage_evaluate(&on->rank[0], step, x, m);
  }
  if (status == PS_OK && on->after != NULL) {
    on->after(on, step, x, m, verdict);
  }
  return status;
}

void stage_run(stage *on, void *x)
{
  int steps = ps_program_steps(on->program), told = 0;
  host *past = calloc(1, sizeof *past);
  void *m = malloc(stage_m_bytes(on));
  CHECK(past != NULL && m != NULL);
  for (int j = 0; j < steps && on->failure == PS_OK; ++j) {
    told = told > j ? told : j;
    on->failure = on->leader != NULL ? tell_noise(on, &told) : PS_OK;
    on->failure = on->failure == PS_OK ? host_call(on, j, x, m) : on->failure;
    past->x[j] = widen(x, on->layout.x, stage_elements(on));
    past->m[j] = widen(m, output_dtype(on), stage_elements(on));
    if (on->failure == PS_OK) {
      host_step(on, past, j, x);
    }
  }
  for (int j = 0; j < steps; ++j) {
    free(past->x[j]);
    free(past->m[j]);
  }
  free(past);
  free(m);
}

void stage_plain(stage *on, void *x)
{
  stage *alone = calloc(1, sizeof *alone);
  CHECK(alone != NULL);
  stage_set(alone, on->program, 1, on->layout.items, on->layout.size, on->layout.x, on->layout.m);
  alone->noise = on->noise;
  alone->f = on->f != NULL ? on->f : stage_f;
  alone->before = on->before;
  alone->ctx = on->ctx;
  alone->rank[0] = (stage_rank){.on = alone};
  stage_run(alone, x);
  stage_close(alone);
  free(alone);
}

/* ---- a host's run, or a call of it, at once -------------------------------------------------- */

ps_report stage_whole(stage *on, void *x)
{
  void *own = x == NULL ? stage_latent(on, 5) : NULL;
  stage_open(on);
  stage_run(on, x != NULL ? x : own);
  CHECK_OK(on->failure);
  stage_end(on);
  free(own);
  return stage_report(on);
}

ps_report stage_exact(stage *on, uint64_t seed)
{
  void *x = stage_latent(on, seed), *alone = stage_copy(x, stage_x_bytes(on));
  stage_plain(on, alone);
  ps_report report = stage_whole(on, x);
  CHECK_BYTES(x, alone, stage_x_bytes(on));
  free(alone);
  free(x);
  return report;
}

ps_verdict stage_call(stage *on, int step, void *x, void *m)
{
  ps_verdict verdict;
  CHECK_OK(ps_leader_ask(on->leader, step, x, m, &verdict));
  if (verdict != PS_ANSWER) {
    void *own = malloc(stage_m_bytes(on));
    CHECK(own != NULL);
    stage_evaluate(&on->rank[0], step, x, own);
    CHECK_OK(ps_leader_submit(on->leader, own, output_dtype(on), 0));
    free(own);
  }
  return verdict;
}
