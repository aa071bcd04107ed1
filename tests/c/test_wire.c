/* test_wire.c - messages that do not fit, from either side: they cost a follower its place, and the
 * picture nothing.
 */
#include <stdlib.h>
#include <string.h>

#include "runner.h"
#include "stage.h"

enum { STEPS = 6, RANKS = 4 };

/* ---- rubbish on the wire --------------------------------------------------------------------- */

typedef enum rubbish {
  HONEST,
  WRONG_MAGIC,
  WRONG_VERSION,
  FUTURE_ROUND,
  KIND_OF_LEADER,
  KIND_UNKNOWN,
  COUNT_0,
  COUNT_HIGH,
  COUNT_NEGATIVE,
  OTHER_STEP,
  OTHER_DTYPE,
  DTYPE_UNKNOWN,
  BYTES_SHORT,
  BYTES_LONG,
  BYTES_0,
  ENDLESS_TEXT, /* a failure whose text has no end */
  POST_FAILS,
  COLLECT_FAILS,
  STALE_FIRST, /* replies of an older round and of another run come before the right one */
  OTHER_RUN,   /* and after them nothing */
  STALE_FOREVER,
  RUBBISH,
} rubbish;

/* A link with no follower behind it: the reply is made up when it is collected. */
typedef struct fake {
  ps_link base;
  const stage *on;
  rubbish what;
  int round; /* of the rank's work, at which the rubbish comes */
  int posts, dones, collects, closed;
  ps_header work;
  float *point, *output; /* freed by close, so that a later use shows */
} fake;

static fake *fake_of(ps_link *link)
{
  return (fake *)link;
}

static void *fake_point(ps_link *link, int slot)
{
  (void)slot;
  return fake_of(link)->point;
}

static void *fake_output(ps_link *link, int slot)
{
  (void)slot;
  return fake_of(link)->output;
}

static ps_status fake_post(ps_link *link, const ps_header *message)
{
  fake *it = fake_of(link);
  CHECK_EQ(it->closed, 0);
  if (message->kind == PS_MSG_WORK) {
    it->work = *message;
    it->collects = 0;
    ++it->posts;
  }
  it->dones += message->kind == PS_MSG_DONE;
  return it->what == POST_FAILS && it->posts > it->round ? PS_LOST : PS_OK;
}

static void spoil(const fake *it, ps_header *reply)
{
  switch (it->what) {
  case WRONG_MAGIC: reply->magic ^= 1; break;
  case WRONG_VERSION: ++reply->version; break;
  case FUTURE_ROUND: ++reply->round; break;
  case KIND_OF_LEADER: reply->kind = PS_MSG_WORK; break;
  case KIND_UNKNOWN: reply->kind = 99; break;
  case COUNT_0: reply->count = 0; break;
  case COUNT_HIGH: reply->count = 1 << 20; break;
  case COUNT_NEGATIVE: reply->count = -1; break;
  case OTHER_STEP: ++reply->step[0]; break;
  case OTHER_DTYPE: reply->dtype = PS_F16; break;
  case DTYPE_UNKNOWN: reply->dtype = 0xffffffff; break;
  case BYTES_SHORT: reply->bytes -= 4; break;
  case BYTES_LONG: reply->bytes = UINT64_MAX; break;
  case BYTES_0: reply->bytes = 0; break;
  case ENDLESS_TEXT:
    reply->kind = PS_MSG_FAILED;
    memset(reply->text, 'x', sizeof reply->text);
    break;
  case STALE_FIRST:
    reply->round -= it->collects == 1;
    reply->run -= it->collects == 2;
    break;
  case OTHER_RUN:
  case STALE_FOREVER: ++reply->run; break;
  default: break;
  }
}

static ps_status fake_collect(ps_link *link, const ps_wait *wait, ps_header *reply)
{
  fake *it = fake_of(link);
  bool now = it->posts == it->round + 1;
  (void)wait;
  CHECK_EQ(it->closed, 0);
  ++it->collects;
  if (now && (it->what == COLLECT_FAILS || (it->what == OTHER_RUN && it->collects > 1))) {
    return PS_DEADLINE;
  }
  stage_rank self = {.on = (stage *)it->on};
  for (size_t i = 0; i < stage_elements(it->on); ++i) {
    it->output[i] = (float)stage_f(&self, it->work.step[0], it->point[i], i);
  }
  *reply = it->work;
  reply->kind = PS_MSG_OUTPUT;
  reply->dtype = PS_F32;
  if (now) {
    spoil(it, reply);
  }
  return PS_OK;
}

static void fake_close(ps_link *link)
{
  fake *it = fake_of(link);
  ++it->closed;
  free(it->point);
  free(it->output);
}

static const ps_link_ops fake_ops = {.transport = "fake",
                                     .point = fake_point,
                                     .output = fake_output,
                                     .post = fake_post,
                                     .collect = fake_collect,
                                     .close = fake_close};

/* on->ctx is an array of fakes, one a rank. */
static ps_link *fake_open(stage *on, int rank)
{
  fake *it = (fake *)on->ctx + rank;
  it->base = (ps_link){.ops = &fake_ops, .slots = 1};
  it->on = on;
  it->point = malloc(stage_x_bytes(on));
  it->output = malloc(stage_m_bytes(on));
  CHECK(it->point != NULL && it->output != NULL);
  return &it->base;
}

static bool is_harmless(rubbish what)
{
  return what == HONEST || what == STALE_FIRST;
}

static ps_status status_for(rubbish what)
{
  switch (what) {
  case OTHER_DTYPE:
  case DTYPE_UNKNOWN:
  case BYTES_SHORT:
  case BYTES_LONG:
  case BYTES_0: return PS_DTYPE;
  case ENDLESS_TEXT: return PS_FAILED;
  case POST_FAILS: return PS_LOST;
  case COLLECT_FAILS:
  case OTHER_RUN: return PS_DEADLINE;
  default: return PS_PROTOCOL;
  }
}

static void check_rubbish(ps_program *program, rubbish what, int rank, int round)
{
  fake links[RANKS] = {0};
  stage on;
  stage_set(&on, program, RANKS, 2, 5, PS_F32, PS_F32);
  on.options.tolerance = 0.0;
  links[rank].what = what;
  links[rank].round = round;
  on.ctx = links;
  on.link = fake_open;
  ps_report report = stage_exact(&on, 5);
  bool happens = round + rank < STEPS && !is_harmless(what);
  CHECK_EQ(report.failed, happens);
  if (happens) {
    CHECK_EQ(report.failures[0].rank, rank);
    CHECK_EQ(report.failures[0].step, round > 0 ? round + rank : 0);
    CHECK_EQ(report.failures[0].status, status_for(what));
    CHECK_LT(strlen(report.failures[0].text), sizeof report.failures[0].text);
    CHECK_EQ(links[rank].posts, round + 1); /* it is not spoken to again */
  }
  CHECK(what != STALE_FIRST || round + 1 + rank >= STEPS || links[rank].posts > round + 1);
  for (int k = 1; k < RANKS; ++k) {
    CHECK_EQ(links[k].closed, 1);
    CHECK_EQ(links[k].dones, !(happens && k == rank)); /* who is left is told to leave */
  }
  stage_close(&on);
}

TEST(rubbish_from_a_follower)
{
  ps_program *program = stage_euler(STEPS);
  for (rubbish what = HONEST; what < RUBBISH; ++what) {
    for (int rank = 1; rank < RANKS; ++rank) {
      for (int round = 0; round < STEPS; ++round) {
        check_rubbish(program, what, rank, round);
      }
    }
  }
  ps_program_release(program);
}

/* The follower's end of a link whose leader talks rubbish. */
typedef struct fake_end {
  ps_link base;
  ps_header message;
  int replies, closed;
  float point[2][4], output[2][4];
} fake_end;

static void *end_point(ps_link *link, int slot)
{
  return ((fake_end *)link)->point[slot];
}

static void *end_output(ps_link *link, int slot)
{
  return ((fake_end *)link)->output[slot];
}

static ps_status end_take(ps_link *link, const ps_wait *wait, ps_header *message)
{
  (void)wait;
  *message = ((fake_end *)link)->message;
  return PS_OK;
}

static ps_status end_reply(ps_link *link, const ps_header *reply)
{
  (void)reply;
  ++((fake_end *)link)->replies;
  return PS_OK;
}

static void end_close(ps_link *link)
{
  ++((fake_end *)link)->closed;
}

static const ps_link_ops end_ops = {.transport = "fake",
                                    .point = end_point,
                                    .output = end_output,
                                    .take = end_take,
                                    .reply = end_reply,
                                    .close = end_close};

static void check_message(const ps_header *message, ps_status expected)
{
  const ps_layout layout = {1, 4, PS_F32, PS_F32};
  fake_end end = {.base = {.ops = &end_ops, .slots = 2}, .message = *message};
  ps_follower *follower;
  ps_work work;
  CHECK_OK(ps_follower_create(&layout, &end.base, &follower));
  CHECK_STATUS(ps_follower_next(follower, NULL, &work), expected);
  CHECK_EQ(work.count, expected == PS_OK ? message->count : 0);
  CHECK_STATUS(ps_follower_submit(follower, PS_F32, 0, 0), expected == PS_OK ? PS_OK : PS_STATE);
  CHECK_EQ(end.replies, expected == PS_OK);
  ps_follower_destroy(follower);
  CHECK_EQ(end.closed, 1);
}

TEST(rubbish_from_a_leader)
{
  const ps_header good = {.magic = PS_MAGIC,
                          .version = PS_WIRE_VERSION,
                          .run = 1,
                          .kind = PS_MSG_WORK,
                          .round = 1,
                          .count = 2,
                          .dtype = PS_F32,
                          .bytes = 16};
  ps_header bad[10];
  for (int k = 0; k < 10; ++k) {
    bad[k] = good;
  }
  bad[0].magic = 0;
  ++bad[1].version;
  bad[2].kind = PS_MSG_OUTPUT;
  bad[3].kind = 77;
  bad[4].count = 0;
  bad[5].count = 3;
  bad[6].count = -1;
  bad[7].dtype = PS_F64;
  bad[8].bytes = 15;
  bad[9].bytes = UINT64_MAX;
  check_message(&good, PS_OK);
  for (int k = 0; k < 10; ++k) {
    check_message(&bad[k], PS_PROTOCOL);
  }
}
