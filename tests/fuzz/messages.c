/* messages.c - fuzzes what parses the messages of other processes: the host transport's inbox, and
 * the core behind it.
 *
 *     messages [SECONDS [SEED]]
 *
 * Each round makes a message from a good one by a few random changes.  A leader gets replies: its
 * picture must come out, at tolerance 0 to the bit, whatever they hold.  A follower gets work: it
 * may refuse, and must never be handed more than its link holds.  `make fuzz` runs this under ASan
 * and UBSan; messages lie in blocks of their exact size, so that a byte read too far shows.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "parastep.h"
#include "parastep_backend.h"
#include "parastep_transport.h"

enum { STEPS = 5, SLOTS = 3, SIZE = 6 };

static const ps_layout layout = {1, SIZE, PS_F32, PS_F32};
static uint64_t state = 1;

static uint32_t draw(uint32_t below)
{
  state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return (uint32_t)(state >> 33) % below;
}

static void fail(const char *what)
{
  fprintf(stderr, "messages: %s; state %" PRIu64 "\n", what, state);
  abort();
}

/* ---- making messages ------------------------------------------------------------------------- */

typedef struct message {
  unsigned char *bytes; /* a block of exactly size bytes */
  size_t size;
} message;

static const uint64_t odd_values[] = {
    0,    1,          2,          3,          4,          0x7f,      0x80,
    0xff, 0x7fffffff, 0x80000000, 0xffffffff, UINT64_MAX, INT64_MAX, UINT64_C(1) << 63};

static uint64_t odd_value(void)
{
  uint32_t k = draw(sizeof odd_values / sizeof *odd_values + 2);
  return k < sizeof odd_values / sizeof *odd_values ? odd_values[k] : draw(1 << 20);
}

/* One field of the header, by offset and width: what a byte-wise change would rarely hit. */
static void change_field(ps_header *header)
{
  switch (draw(11)) {
  case 0: header->magic = (uint32_t)odd_value(); break;
  case 1: header->version = (uint32_t)odd_value(); break;
  case 2: header->run = odd_value(); break;
  case 3: header->kind = draw(7); break;
  case 4: header->flags = (uint32_t)odd_value(); break;
  case 5: header->round = (int32_t)odd_value(); break;
  case 6: header->count = (int32_t)odd_value(); break;
  case 7: header->dtype = draw(7); break;
  case 8: header->began_ns = (int64_t)odd_value(); break;
  case 9: header->ended_ns = (int64_t)odd_value(); break;
  default: header->bytes = odd_value(); break;
  }
}

static size_t change_size(size_t size)
{
  switch (draw(4)) {
  case 0: return draw((uint32_t)size + 1);
  case 1: return size + draw(64);
  case 2: return sizeof(ps_header);
  default: return 0;
  }
}

/* payload bytes of noise after a header, then up to three changes. */
static message spoilt(ps_header header, size_t payload)
{
  size_t size = sizeof header + payload, wanted = size;
  unsigned char *noise = malloc(size + 64);
  for (uint32_t k = draw(3); k > 0; --k) {
    change_field(&header);
  }
  memcpy(noise, &header, sizeof header);
  for (size_t k = sizeof header; k < size + 64; ++k) {
    noise[k] = (unsigned char)draw(256);
  }
  if (draw(4) == 0) {
    noise[draw((uint32_t)size)] = (unsigned char)draw(256);
  }
  if (draw(4) == 0) {
    wanted = change_size(size);
  }
  message made = {malloc(wanted + (wanted == 0)), wanted};
  memcpy(made.bytes, noise, wanted);
  free(noise);
  return made;
}

static void deliver(ps_inbox *inbox, message it)
{
  ps_inbox_deliver(inbox, it.bytes, it.size);
  free(it.bytes);
}

/* ---- replies to a leader --------------------------------------------------------------------- */

typedef struct peer {
  ps_inbox *inbox; /* the leader's */
} peer;

/* As a follower would, but for what spoilt does to it; sometimes twice, sometimes not at all. */
static ps_status answer(void *ctx, const ps_part *parts, int count)
{
  ps_header work;
  if (count == 0) {
    return PS_OK;
  }
  memcpy(&work, parts[0].data, sizeof work);
  if (work.kind != PS_MSG_WORK) {
    return PS_OK;
  }
  work.kind = draw(8) == 0 ? PS_MSG_FAILED : PS_MSG_OUTPUT;
  work.flags = draw(4) == 0 ? PS_FLAG_MOVED : 0;
  work.bytes = SIZE * sizeof(float);
  size_t slots = work.flags & PS_FLAG_MOVED ? 2 : 1;
  size_t payload = work.kind == PS_MSG_OUTPUT ? slots * (size_t)work.count * work.bytes : 0;
  for (uint32_t k = draw(8) == 0 ? draw(3) : 1; k > 0; --k) {
    deliver(((peer *)ctx)->inbox, spoilt(work, payload));
  }
  return draw(64) == 0 ? PS_LOST : PS_OK;
}

static int denoise(void *ctx, int rank, int step, const void *x, void *m)
{
  (void)ctx;
  (void)rank;
  for (int i = 0; i < SIZE; ++i) {
    ((float *)m)[i] = tanhf(((const float *)x)[i]) / (float)(step + 1);
  }
  return 0;
}

static void latent(float *x)
{
  for (int i = 0; i < SIZE; ++i) {
    x[i] = (float)(i + 1) / 3;
  }
}

static ps_leader *leader_of(ps_program *program, ps_link *link, double tolerance)
{
  static const int slots[2] = {1, SLOTS};
  ps_leader *leader;
  ps_options options;
  ps_options_init(&options);
  options.tolerance = tolerance;
  options.deadline_ns = 1; /* a reply has come by now, or never will */
  ps_link *links[2] = {NULL, link};
  options.max_stride = draw(2) == 0 ? 1 : 4;
  if (ps_leader_create(program, &layout, &options, ps_backend_find("cpu"), links,
                       link != NULL ? 2 : 1, slots, &leader) != PS_OK) {
    fail(ps_last_error());
  }
  return leader;
}

static void try_leader(ps_program *program)
{
  float x[SIZE], plain[SIZE];
  double tolerance = draw(2) == 0 ? 0.0 : 0.5;
  peer other = {NULL};
  ps_carrier carrier = {answer, NULL, &other};
  ps_link *link;
  if (ps_host_open(&layout, SLOTS, PS_LEADS, (int)draw(2), ps_backend_find("cpu"), &carrier, &link,
                   &other.inbox) != PS_OK) {
    fail("no link");
  }
  ps_leader *alone = leader_of(program, NULL, 0.0), *leader = leader_of(program, link, tolerance);
  latent(x);
  latent(plain);
  if (ps_sample(alone, denoise, NULL, NULL, plain) != PS_OK ||
      ps_sample(leader, denoise, NULL, NULL, x) != PS_OK) {
    fail(ps_last_error());
  }
  const void *got = x, *expected = plain; /* to the bit, so not as values */
  if (tolerance == 0.0 && memcmp(got, expected, sizeof x) != 0) {
    fail("another picture at tolerance 0");
  }
  for (int i = 0; i < SIZE; ++i) {
    if (!isfinite(x[i])) {
      fail("a picture that is not finite");
    }
  }
  ps_leader_destroy(leader);
  ps_leader_destroy(alone);
  ps_inbox_release(other.inbox);
}

/* ---- work for a follower --------------------------------------------------------------------- */

static ps_status swallow(void *ctx, const ps_part *parts, int count)
{
  volatile unsigned char seen = 0;
  (void)ctx;
  for (int k = 0; k < count; ++k) {
    for (size_t b = 0; b < parts[k].bytes; ++b) {
      seen ^= ((const unsigned char *)parts[k].data)[b];
    }
  }
  return PS_OK;
}

static void check_work(const ps_work *work)
{
  if (work->count < 0 || work->count > SLOTS) {
    fail("more work than slots");
  }
  for (int k = 0; k < work->count; ++k) {
    memset(work->point[k], 1, work->point_bytes);
    memset(work->output[k], 2, work->output_bytes);
  }
}

static void try_follower(void)
{
  static const ps_wait at_once = {1, NULL, NULL};
  ps_carrier carrier = {swallow, NULL, NULL};
  ps_link *link;
  ps_inbox *inbox;
  ps_follower *follower;
  if (ps_host_open(&layout, SLOTS, PS_FOLLOWS, 0, ps_backend_find("cpu"), &carrier, &link,
                   &inbox) != PS_OK ||
      ps_follower_create(&layout, link, &follower) != PS_OK) {
    fail("no follower");
  }
  for (uint32_t turn = 1 + draw(3); turn > 0; --turn) {
    ps_work work;
    int slots = 1 + (int)draw(SLOTS);
    ps_header header = {.magic = PS_MAGIC,
                        .version = PS_WIRE_VERSION,
                        .run = 7,
                        .kind = PS_MSG_WORK,
                        .count = slots,
                        .dtype = PS_F32,
                        .bytes = SIZE * sizeof(float)};
    deliver(inbox, spoilt(header, (size_t)slots * SIZE * sizeof(float)));
    if (ps_follower_next(follower, &at_once, &work) == PS_OK && work.count > 0) {
      check_work(&work);
      ps_follower_submit(follower, PS_F32, draw(2) == 0, 0);
    }
  }
  ps_follower_destroy(follower);
  ps_inbox_release(inbox);
}

int main(int argc, char **argv)
{
  double alpha[STEPS + 1], s[STEPS + 1];
  double seconds = argc > 1 ? strtod(argv[1], NULL) : 5;
  ps_program *program;
  long rounds = 0;
  state = argc > 2 ? strtoull(argv[2], NULL, 10) : (uint64_t)ps_now_ns();
  for (int j = 0; j <= STEPS; ++j) {
    s[j] = 0.98 * (1.0 - (double)j / STEPS);
    alpha[j] = sqrt(1 - s[j] * s[j]);
  }
  if (ps_program_ddim(STEPS, alpha, s, PS_PREDICT_NOISE, &program) != PS_OK) {
    fail(ps_last_error());
  }
  printf("messages: seed %" PRIu64 "\n", state);
  for (int64_t end = ps_now_ns() + (int64_t)(seconds * 1e9); ps_now_ns() < end; ++rounds) {
    try_leader(program);
    try_follower();
  }
  ps_program_release(program);
  printf("messages: %ld rounds of a leader and a follower\n", rounds);
  return 0;
}
