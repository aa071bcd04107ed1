/* test_guess.c - guesses, carry, rebase and acceptance, against the model. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"
#include "runner.h"
#include "stage.h"

static int ceil_div(int a, int b)
{
  return (a + b - 1) / b;
}

/* ---- rounds ---------------------------------------------------------------------------------- */

static void check_rounds(int steps, int ranks)
{
  ps_program *program = stage_euler(steps);
  stage on;
  stage_set(&on, program, ranks, 1, 6, PS_F64, PS_F64);
  on.options.tolerance = INFINITY;
  CHECK_EQ(model_check(&on), 1 + ceil_div(steps - 1, ranks));
  ps_program_release(program);
}

TEST(rounds_without_limit)
{
  for (int steps = 1; steps <= 13; ++steps) {
    for (int ranks = 1; ranks <= 5; ++ranks) {
      check_rounds(steps, ranks);
    }
  }
  check_rounds(50, 8);
}

TEST(more_ranks_than_steps)
{
  check_rounds(1, 8);
  check_rounds(2, 8);
  check_rounds(5, 8);
}

/* ---- guesses, carry and rebase, against the model -------------------------------------------- */

static void check_policies(ps_program *program, const double *noise, bool secret)
{
  const double tolerances[] = {0.0, 0.003, 0.03, 0.3, INFINITY};
  for (int ranks = 2; ranks <= 5; ++ranks) {
    for (int order = 0; order <= 1; ++order) {
      int last = 1 << 20;
      for (int k = 0; k < 5; ++k) {
        stage on;
        stage_set(&on, program, ranks, 2, 9, PS_F64, PS_F64);
        on.options.tolerance = tolerances[k];
        on.options.order = order;
        on.noise = noise;
        on.keeps_noise_to_self = secret;
        int rounds = model_check(&on);
        CHECK(rounds <= last || secret);
        last = rounds;
      }
    }
  }
}

TEST(guesses_carry_and_rebase_of_euler)
{
  ps_program *program = stage_euler(20);
  check_policies(program, NULL, false);
  ps_program_release(program);
}

TEST(guesses_carry_and_rebase_of_a_multistep_solver)
{
  ps_program *program = stage_multistep(20);
  check_policies(program, NULL, false);
  ps_program_release(program);
}

TEST(noise_given_ahead_is_part_of_the_guess)
{
  ps_program *program = stage_ancestral(16);
  stage like;
  stage_set(&like, program, 2, 2, 9, PS_F64, PS_F64);
  double *noise = stage_noise(&like);
  check_policies(program, noise, false);
  check_policies(program, noise, true); /* never told: right all the same, and slow */
  free(noise);
  ps_program_release(program);
}

/* A program whose latents matter to two steps: rows that reach back for x as well as for m. */
TEST(rows_with_old_latents)
{
  enum { STEPS = 15, COLUMNS = 4 };
  double a[STEPS * COLUMNS] = {0}, b[STEPS * COLUMNS] = {0}, s[STEPS], g[STEPS];
  uint64_t seed = 4;
  ps_program *program;
  for (int j = 0; j < STEPS; ++j) {
    a[j * COLUMNS] = 1.0;
    for (int k = 0; k < COLUMNS && k <= j; ++k) {
      double share = 0.1 * stage_random(&seed);
      a[j * COLUMNS + k] += share;
      a[j * COLUMNS] -= share;
      b[j * COLUMNS + k] = 0.2 * stage_random(&seed);
    }
    s[j] = 1.0 + 0.5 * stage_random(&seed);
    g[j] = stage_random(&seed);
  }
  CHECK_OK(ps_program_create(STEPS, COLUMNS, a, b, NULL, s, g, NULL, &program));
  check_policies(program, NULL, false);
  ps_program_release(program);
}

/* Rows of zeros: the guess is 0, whatever is on hand. */
TEST(rows_of_zeros)
{
  const double zero[6] = {0};
  ps_program *program;
  CHECK_OK(ps_program_create(6, 1, zero, zero, NULL, NULL, NULL, NULL, &program));
  stage on;
  stage_set(&on, program, 3, 1, 5, PS_F64, PS_F64);
  model_check(&on);
  ps_program_release(program);
}

TEST(several_slots_a_rank)
{
  const int slots[][3] = {{1, 2, 1}, {3, 1, 1}, {2, 3, 2}, {4, 1, 3}, {1, 1, 16}, {16, 1, 1}};
  ps_program *program = stage_multistep(19);
  for (int k = 0; k < 6; ++k) {
    stage on;
    stage_set(&on, program, 3, 2, 5, PS_F64, PS_F64);
    memcpy(on.slots, slots[k], sizeof slots[k]);
    on.options.tolerance = INFINITY;
    int window = slots[k][0] + slots[k][1] + slots[k][2];
    CHECK_EQ(model_check(&on), 1 + ceil_div(18, window));
    on.options.tolerance = 0.02;
    model_check(&on);
  }
  ps_program_release(program);
}

TEST(one_rank_with_several_slots)
{
  ps_program *program = stage_euler(17);
  stage on;
  stage_set(&on, program, 1, 2, 5, PS_F64, PS_F64);
  on.slots[0] = 4;
  on.options.tolerance = INFINITY;
  CHECK_EQ(model_check(&on), 5);
  ps_program_release(program);
}

/* ---- the batch ------------------------------------------------------------------------------- */

/* Item 0 is constant, so that its guesses are right; item 1 moves fast. */
static double restless_item(const stage_rank *self, int step, double x, size_t i)
{
  return i < self->on->layout.size ? 0.25 : 3.0 * sin(5.0 * x + step);
}

static double calm(const stage_rank *self, int step, double x, size_t i)
{
  (void)self, (void)step, (void)x, (void)i;
  return 0.25;
}

TEST(the_worst_item_decides)
{
  ps_program *program = stage_euler(12);
  stage on;
  stage_set(&on, program, 4, 1, 8, PS_F64, PS_F64);
  on.f = calm;
  CHECK_EQ(model_check(&on), 1 + ceil_div(11, 4));
  stage_set(&on, program, 4, 2, 8, PS_F64, PS_F64);
  on.f = restless_item;
  CHECK_GT(model_check(&on), 1 + ceil_div(11, 4));
  ps_program_release(program);
}

/* ---- the published rule ---------------------------------------------------------------------- */

TEST(the_published_rule)
{
  ps_program *programs[] = {stage_euler(23), stage_multistep(23)};
  for (int k = 0; k < 2; ++k) {
    for (int ranks = 1; ranks <= 5; ++ranks) {
      for (int warmup = 1; warmup <= 9; warmup += 4) {
        stage on;
        stage_set(&on, programs[k], ranks, 1, 7, PS_F64, PS_F64);
        on.options.policy = PS_PAPER;
        on.options.warmup = warmup;
        on.options.tolerance = 0.0; /* says nothing here */
        CHECK_EQ(model_check(&on), warmup + ceil_div(23 - warmup, ranks));
      }
    }
    ps_program_release(programs[k]);
  }
}

TEST(the_published_rule_in_one_batch)
{
  ps_program *program = stage_euler(23);
  stage on;
  stage_set(&on, program, 2, 1, 7, PS_F64, PS_F64);
  on.slots[0] = 3;
  on.slots[1] = 2;
  on.options.policy = PS_PAPER;
  CHECK_EQ(model_check(&on), 5 + ceil_div(18, 5));
  ps_program_release(program);
}

TEST(the_published_rule_within_its_warmup)
{
  ps_program *program = stage_euler(4);
  stage on;
  stage_set(&on, program, 3, 1, 7, PS_F64, PS_F64);
  on.options.policy = PS_PAPER;
  CHECK_EQ(model_check(&on), 4);
  ps_program_release(program);
}
