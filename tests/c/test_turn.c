/* test_turn.c - the leader's and the follower's calls one by one: what each answers, and refuses.
 */
#include <math.h>
#include <stdlib.h>

#include "runner.h"
#include "stage.h"

static void call(stage *on, int step, void *x, void *m_out, ps_verdict expected)
{
  CHECK_EQ(stage_call(on, step, x, m_out), expected);
}

/* Calls at steps `from` to below `to`, all with one verdict, each with the library's step after it.
 */
static void go_on(stage *on, int from, int to, void *x, void *m_out, ps_verdict expected)
{
  for (int j = from; j < to; ++j) {
    call(on, j, x, m_out, expected);
    CHECK_OK(ps_leader_advance(on->leader, NULL, x));
  }
}

/* A run of 3 ranks in double. */
static double *open_run(stage *on, ps_program *program, double tolerance)
{
  stage_set(on, program, 3, 1, 8, PS_F64, PS_F64);
  on->options.tolerance = tolerance;
  stage_open(on);
  return stage_latent(on, 9);
}

/* On 12 steps, without limit; the host has been at steps 0 and 1. */
static double *begin(stage *on)
{
  double *x = open_run(on, stage_euler(12), INFINITY), m[8];
  go_on(on, 0, 2, x, m, PS_EVALUATE);
  return x;
}

static void leave(stage *on, double *x)
{
  stage_end(on);
  stage_close(on);
  free(x);
  ps_program_release(on->program);
}

/* ---- ask and answer -------------------------------------------------------------------------- */

TEST(an_edited_latent_begins_a_round)
{
  stage on;
  double *x = open_run(&on, stage_euler(12), 0.5), m[8];
  call(&on, 0, x, m, PS_EVALUATE);
  x[0] += 1e3;
  call(&on, 1, x, m, PS_EVALUATE);
  /* Step 2 has a guess, far from where the host now is. */
  ps_verdict verdict;
  x[1] -= 1e3;
  CHECK_OK(ps_leader_ask(on.leader, 2, x, m, &verdict));
  CHECK_EQ(verdict, PS_EVALUATE);
  CHECK_GT(stage_report(&on).drift[2], 0.5);
  leave(&on, x);
}

TEST(asks_beyond_the_program_are_the_hosts_own)
{
  stage on;
  double *x = open_run(&on, stage_euler(5), 0.0), m[8];
  stage_run(&on, x);
  int seen = on.rank[1].seen + on.rank[2].seen;
  for (int j = 5; j < 9; ++j) {
    call(&on, j, x, m, PS_EVALUATE);
    CHECK_STATUS(ps_leader_advance(on.leader, NULL, x), PS_STATE);
    CHECK_EQ(ps_leader_horizon(on.leader), 5);
  }
  stage_end(&on);
  CHECK_EQ(on.rank[1].seen + on.rank[2].seen, seen);
  ps_report report = stage_report(&on);
  CHECK_EQ(report.rounds, 9);
  CHECK_EQ(report.steps, 5);
  CHECK_EQ(report.evaluations[0], 9);
  leave(&on, x);
}

/* ---- amend ----------------------------------------------------------------------------------- */

TEST(amended_answers_are_rebased_again)
{
  stage on;
  double *x = begin(&on), m[8], spent;
  call(&on, 2, x, m, PS_ANSWER);
  const double *guess = stage_guess(&on, 2);
  double g = ps_program_table(on.program, 'g')[2], sum = 0.0;
  for (int i = 0; i < 8; ++i) {
    x[i] += 0.25 * i;
    sum += (x[i] - guess[i]) * (x[i] - guess[i]) / 8.0;
  }
  CHECK_OK(ps_leader_amend(on.leader, x, m, &spent));
  ps_report report = stage_report(&on);
  CHECK_NEAR(report.drift[2], sqrt(sum) / ps_program_table(on.program, 's')[2], 1e-12);
  CHECK_EQ(spent, report.cost[2] * report.drift[2]);
  for (int i = 0; i < 8; ++i) {
    double expected = stage_f(&on.rank[0], 2, guess[i], (size_t)i) + g * (x[i] - guess[i]);
    CHECK_NEAR(m[i], expected, 1e-12);
  }
  /* The trajectory goes on from what the host really had. */
  double next[8], b = ps_program_table(on.program, 'b')[2];
  CHECK_OK(ps_leader_advance(on.leader, NULL, next));
  for (int i = 0; i < 8; ++i) {
    CHECK_NEAR(next[i], x[i] + b * m[i], 1e-12);
  }
  /* Twice is fine, an output to write is needed, and so is an answer. */
  CHECK_OK(ps_leader_amend(on.leader, x, m, &spent));
  CHECK_STATUS(ps_leader_amend(on.leader, x, NULL, &spent), PS_STATE);
  leave(&on, x);
}

TEST(answers_can_be_amended_after_a_stop)
{
  stage on;
  double *x = begin(&on), m[8], spent;
  call(&on, 2, x, m, PS_ANSWER);
  CHECK_OK(ps_leader_stop(on.leader, "the guidance changed"));
  x[3] += 0.5;
  CHECK_OK(ps_leader_amend(on.leader, x, m, &spent));
  CHECK_GT(spent, 0.0);
  CHECK_OK(ps_leader_advance(on.leader, NULL, x));
  call(&on, 3, x, m, PS_EVALUATE);
  leave(&on, x);
}

TEST(amended_evaluations_take_the_new_latent)
{
  stage on;
  double *x = begin(&on), m[8], spent, next[8];
  ps_verdict verdict;
  go_on(&on, 2, 4, x, m, PS_ANSWER);
  CHECK_OK(ps_leader_ask(on.leader, 4, x, m, &verdict));
  CHECK_EQ(verdict, PS_EVALUATE);
  x[0] += 7.0;
  CHECK_OK(ps_leader_amend(on.leader, x, NULL, &spent));
  CHECK(isnan(spent));
  stage_evaluate(&on.rank[0], 4, x, m);
  CHECK_OK(ps_leader_submit(on.leader, m, PS_F64, 0));
  CHECK_STATUS(ps_leader_amend(on.leader, x, m, &spent), PS_STATE); /* nothing was answered */
  CHECK_OK(ps_leader_advance(on.leader, NULL, next));
  CHECK_NEAR(next[0], x[0] + ps_program_table(on.program, 'b')[4] * m[0], 1e-12);
  leave(&on, x);
}

/* ---- stop, leave out, evaluate alone --------------------------------------------------------- */

TEST(a_host_without_room_for_answers_evaluates)
{
  stage on;
  double *x = begin(&on), m[8];
  int seen = on.rank[1].seen + on.rank[2].seen;
  go_on(&on, 2, 5, x, NULL, PS_EVALUATE);
  CHECK_EQ(on.rank[1].seen + on.rank[2].seen, seen);
  go_on(&on, 5, 6, x, m, PS_EVALUATE); /* no guesses were out */
  call(&on, 6, x, m, PS_ANSWER);
  /* A guess that is there is measured, for the report, and not used. */
  CHECK_OK(ps_leader_advance(on.leader, NULL, x));
  call(&on, 7, x, NULL, PS_EVALUATE);
  CHECK(!isnan(stage_report(&on).drift[7]));
  CHECK_EQ(stage_report(&on).answered, 1);
  leave(&on, x);
}

TEST(followers_are_verified_even_where_no_answer_is_wanted)
{
  stage on;
  double *x = open_run(&on, stage_euler(4), INFINITY);
  call(&on, 0, x, NULL, PS_EVALUATE);
  CHECK_EQ(on.rank[1].seen, 1);
  CHECK_EQ(on.rank[2].seen, 1);
  leave(&on, x);
}

TEST(after_a_stop_the_host_is_alone)
{
  stage on;
  double *x = begin(&on), m[8];
  int seen = on.rank[1].seen + on.rank[2].seen;
  CHECK_OK(ps_leader_stop(on.leader, "the guidance scale changed"));
  CHECK_OK(ps_leader_stop(on.leader, "and another thing"));
  go_on(&on, 2, 12, x, m, PS_EVALUATE);
  CHECK_EQ(on.rank[1].seen + on.rank[2].seen, seen);
  CHECK_STR(stage_report(&on).fallback, "the guidance scale changed");
  CHECK_EQ(stage_report(&on).rounds, 12);
  CHECK_EQ(stage_report(&on).failed, 0);
  leave(&on, x);
}

TEST(a_stop_without_a_reason_is_one_too)
{
  stage on;
  double *x = begin(&on), m[8];
  CHECK_OK(ps_leader_stop(on.leader, ""));
  call(&on, 2, x, m, PS_EVALUATE);
  CHECK(stage_report(&on).fallback != NULL);
  leave(&on, x);
}

TEST(a_stop_in_the_middle_of_a_round)
{
  stage on;
  double *x = begin(&on), m[8];
  ps_verdict verdict;
  go_on(&on, 2, 4, x, m, PS_ANSWER);
  CHECK_OK(ps_leader_ask(on.leader, 4, x, m, &verdict));
  CHECK_OK(ps_leader_stop(on.leader, "in the middle"));
  stage_evaluate(&on.rank[0], 4, x, m);
  CHECK_OK(ps_leader_submit(on.leader, m, PS_F64, 0));
  CHECK_OK(ps_leader_advance(on.leader, NULL, x));
  call(&on, 5, x, m, PS_EVALUATE);
  leave(&on, x);
}

TEST(a_rank_left_out_by_the_caller)
{
  stage on;
  double *x = begin(&on), m[8];
  CHECK_STATUS(ps_leader_leave_out(on.leader, 0, "?"), PS_INVALID);
  CHECK_STATUS(ps_leader_leave_out(on.leader, 3, "?"), PS_INVALID);
  CHECK_OK(ps_leader_leave_out(on.leader, 1, "its weights changed"));
  CHECK_OK(ps_leader_leave_out(on.leader, 1, "again"));
  go_on(&on, 2, 3, x, m, PS_EVALUATE); /* its output of step 2 is not used any more */
  go_on(&on, 3, 4, x, m, PS_ANSWER);   /* rank 2 holds the second place now */
  CHECK_OK(ps_leader_leave_out(on.leader, 2, "its weights changed too"));
  go_on(&on, 4, 12, x, m, PS_EVALUATE);
  ps_report report = stage_report(&on);
  CHECK_EQ(report.failed, 2);
  CHECK_EQ(report.failures[0].rank, 1);
  CHECK_EQ(report.failures[0].status, PS_FAILED);
  CHECK_STR(report.failures[0].text, "its weights changed");
  leave(&on, x);
  CHECK_EQ(on.rank[1].status, PS_OK); /* it was told to leave */
}

/* ---- calls out of order ---------------------------------------------------------------------- */

TEST(leader_calls_out_of_order)
{
  stage on;
  stage_set(&on, stage_euler(4), 2, 1, 8, PS_F64, PS_F64);
  stage_open(&on);
  double *x = stage_latent(&on, 1), m[8] = {0}, spent;
  ps_verdict verdict;
  ps_work work;
  CHECK_STATUS(ps_leader_submit(on.leader, m, PS_F64, 0), PS_STATE);
  CHECK_STATUS(ps_leader_work(on.leader, &work), PS_STATE);
  CHECK_EQ(work.count, 0);
  CHECK_STATUS(ps_leader_advance(on.leader, NULL, x), PS_STATE);
  CHECK_STATUS(ps_leader_amend(on.leader, x, m, &spent), PS_STATE);
  CHECK_STATUS(ps_leader_ask(on.leader, 1, x, m, &verdict), PS_INVALID);
  CHECK_STATUS(ps_leader_ask(on.leader, -1, x, m, &verdict), PS_INVALID);
  CHECK_OK(ps_leader_ask(on.leader, 0, x, m, &verdict));
  CHECK_STATUS(ps_leader_ask(on.leader, 0, x, m, &verdict), PS_STATE);
  CHECK_STATUS(ps_leader_ask(on.leader, 1, x, m, &verdict), PS_STATE);
  CHECK_STATUS(ps_leader_advance(on.leader, NULL, x), PS_STATE);
  CHECK_OK(ps_leader_work(on.leader, &work));
  CHECK_EQ(work.round, 1); /* its follower and the host evaluate */
  CHECK_EQ(work.followers, 1);
  CHECK_EQ(work.exact, 1);
  CHECK_STATUS(ps_leader_submit(on.leader, m, PS_F32, 0), PS_DTYPE);
  CHECK_STATUS(ps_leader_submit(on.leader, m, PS_NONE, 0), PS_DTYPE);
  /* None of these did harm: the run goes on. */
  stage_evaluate(&on.rank[0], 0, x, m);
  CHECK_OK(ps_leader_submit(on.leader, m, PS_F64, 0));
  CHECK_STATUS(ps_leader_submit(on.leader, m, PS_F64, 0), PS_STATE);
  CHECK_STATUS(ps_leader_ask(on.leader, 0, x, m, &verdict), PS_INVALID);
  CHECK_OK(ps_leader_advance(on.leader, NULL, x));
  call(&on, 1, x, m, PS_EVALUATE);
  CHECK_OK(ps_leader_finish(on.leader));
  CHECK_OK(ps_leader_finish(on.leader));
  CHECK_STATUS(ps_leader_ask(on.leader, 2, x, m, &verdict), PS_STATE);
  CHECK_STATUS(ps_leader_submit(on.leader, m, PS_F64, 0), PS_STATE);
  CHECK_EQ(stage_report(&on).failed, 0);
  leave(&on, x);
  ps_leader_destroy(NULL);
}

TEST(noise_is_taken_for_the_next_window_alone)
{
  stage on;
  double *x = open_run(&on, stage_ancestral(6), 0.0), m[8], z[8] = {0};
  CHECK_EQ(ps_leader_horizon(on.leader), 2);
  CHECK_STATUS(ps_leader_noise(on.leader, -1, z), PS_INVALID);
  CHECK_OK(ps_leader_noise(on.leader, 0, z));
  CHECK_OK(ps_leader_noise(on.leader, 1, z));
  CHECK_STATUS(ps_leader_noise(on.leader, 2, z), PS_INVALID);
  call(&on, 0, x, m, PS_EVALUATE);
  CHECK_EQ(ps_leader_horizon(on.leader), 3);
  CHECK_STATUS(ps_leader_noise(on.leader, 0, z), PS_INVALID);
  CHECK_OK(ps_leader_noise(on.leader, 2, z));
  for (int j = 1; j < 6; ++j) {
    call(&on, j, x, m, PS_EVALUATE);
  }
  CHECK_EQ(ps_leader_horizon(on.leader), 6);
  CHECK_STATUS(ps_leader_noise(on.leader, 6, z), PS_INVALID);
  leave(&on, x);
}

/* A leader of 4 floats and its one follower, of so many. */
static void open_both(size_t floats, ps_leader **leader, ps_follower **follower)
{
  const ps_layout layout = {1, 4, PS_F32, PS_F32}, other = {1, floats, PS_F32, PS_F32};
  ps_program *program = stage_euler(4);
  ps_link *here, *there;
  ps_options options;
  ps_options_init(&options);
  options.max_stride = 1;
  CHECK_OK(ps_threads_open(&layout, 1, &here, &there));
  CHECK_OK(ps_follower_create(&other, there, follower));
  CHECK_OK(ps_leader_create(program, &layout, &options, ps_backend_find("cpu"),
                            (ps_link *[]){NULL, here}, 2, NULL, leader));
  ps_program_release(program);
}

TEST(follower_calls_out_of_order)
{
  ps_follower *follower;
  ps_leader *leader;
  ps_verdict verdict;
  ps_work work;
  float x[4] = {1, 2, 3, 4}, m[4];
  ps_wait soon = {0, NULL, NULL};
  open_both(4, &leader, &follower);
  CHECK_STATUS(ps_follower_submit(follower, PS_F32, 0, 0), PS_STATE);
  soon.deadline_ns = ps_now_ns() + 1000000;
  CHECK_STATUS(ps_follower_next(follower, &soon, &work), PS_DEADLINE);
  CHECK_OK(ps_leader_ask(leader, 0, x, m, &verdict));
  CHECK_OK(ps_follower_next(follower, NULL, &work));
  CHECK_EQ(work.count, 1);
  CHECK_EQ(work.step[0], 0);
  for (int i = 0; i < 4; ++i) {
    CHECK_EQ(((const float *)work.point[0])[i], x[i]);
  }
  CHECK_STATUS(ps_follower_next(follower, NULL, &work), PS_STATE);
  CHECK_STATUS(ps_follower_submit(follower, PS_F64, 0, 0), PS_DTYPE); /* there is no room for it */
  CHECK_STATUS(ps_follower_submit(follower, PS_NONE, 0, 0), PS_DTYPE);
  CHECK_OK(ps_follower_next(follower, NULL, &work) == PS_STATE ? PS_OK : PS_FAILED);
  CHECK_OK(ps_follower_submit(follower, PS_F32, 0, 0));
  CHECK_STATUS(ps_follower_submit(follower, PS_F32, 0, 0), PS_STATE);
  ps_leader_destroy(leader);
  for (int twice = 0; twice < 2; ++twice) {
    CHECK_OK(ps_follower_next(follower, NULL, &work));
    CHECK_EQ(work.count, 0);
  }
  CHECK_OK(ps_follower_fail(follower, "nobody listens"));
  ps_follower_destroy(follower);
  ps_follower_destroy(NULL);
}

TEST(a_follower_of_another_shape_does_not_touch_the_points)
{
  ps_follower *follower;
  ps_leader *leader;
  ps_verdict verdict;
  ps_work work;
  float x[4] = {1, 2, 3, 4}, m[4] = {0};
  open_both(5, &leader, &follower);
  CHECK_OK(ps_leader_ask(leader, 0, x, m, &verdict));
  CHECK_STATUS(ps_follower_next(follower, NULL, &work), PS_PROTOCOL);
  ps_follower_destroy(follower);
  CHECK_OK(ps_leader_submit(leader, m, PS_F32, 0));
  ps_leader_destroy(leader);
}

/* ---- the report ------------------------------------------------------------------------------ */

TEST(the_timeline_is_in_order)
{
  stage on;
  double *x = begin(&on), m[8];
  for (int j = 2; j < 12; ++j) {
    ps_verdict verdict = (j - 1) % 3 == 0 ? PS_EVALUATE : PS_ANSWER;
    call(&on, j, x, m, verdict);
    CHECK_OK(ps_leader_advance(on.leader, NULL, x));
  }
  stage_end(&on);
  ps_report report = stage_report(&on);
  int taken[12] = {0}, sum = 0;
  for (int k = 0; k < report.records; ++k) {
    const ps_record *record = &report.timeline[k];
    CHECK(record->begin_ns >= 0 && record->begin_ns <= record->end_ns);
    CHECK_LE(record->end_ns, report.seconds_ns);
    CHECK(record->round >= 0 && record->round < report.rounds);
    CHECK(k == 0 || record->round >= report.timeline[k - 1].round);
    taken[record->step] += record->accepted;
  }
  for (int round = 0; round < report.rounds; ++round) {
    sum += report.accepted[round];
  }
  for (int j = 0; j < 12; ++j) {
    CHECK_EQ(taken[j], 1);
  }
  CHECK_EQ(sum, 12);
  /* Followers evaluate step 0 and 7 guesses: 64 bytes each way. */
  CHECK_EQ(report.bytes_sent, (2 + 7) * 2 * 64);
  leave(&on, x);
}
