/* round_c.c - what one round costs without a model, in the C API.
 *
 *     make bench-c
 *
 * 4 ranks on 4 threads, latents of 64 KB (16384 float), no limit on drift, and a denoiser that
 * keeps whatever its output holds.  A round is timed from the ask that begins it to submit's
 * return, and with the three answers that follow.  Beside it, in turns with it and by the same four
 * threads: a bare fan-out and fan-in with a mutex and a condition for each thread, the least that
 * any exchange between threads that sleep can cost.  Medians and the 90th percentile, over all
 * rounds.
 */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "parastep.h"
#include "parastep_backend.h"
#include "parastep_transport.h"

enum { RANKS = 4, SIZE = 16384, ROUNDS = 200, TURNS = 40, STEPS = RANKS * ROUNDS };

static const ps_layout layout = {1, SIZE, PS_F32, PS_F32};

static void need(ps_status status)
{
  if (status != PS_OK) {
    fprintf(stderr, "round_c: %s: %s\n", ps_status_name(status), ps_last_error());
    exit(1);
  }
}

/* ---- the bare exchange ----------------------------------------------------------------------- */

/* A baton goes to the follower and comes back. */
typedef struct baton {
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  int there;
} baton;

static void baton_pass(baton *it, int there)
{
  pthread_mutex_lock(&it->mutex);
  it->there = there;
  pthread_cond_signal(&it->changed);
  pthread_mutex_unlock(&it->mutex);
}

static void baton_wait(baton *it, int there)
{
  pthread_mutex_lock(&it->mutex);
  while (it->there != there) {
    pthread_cond_wait(&it->changed, &it->mutex);
  }
  pthread_mutex_unlock(&it->mutex);
}

/* ---- ranks ----------------------------------------------------------------------------------- */

typedef struct rank {
  int number;
  pthread_t thread;
  baton baton;
  ps_follower *follower; /* of the present turn; handed over with the baton */
} rank;

static int keep(void *ctx, int number, int step, const void *x, void *m)
{
  (void)ctx, (void)number, (void)step, (void)x, (void)m;
  return 0;
}

/* In every turn: rounds with batons, then one run. */
static void *follow(void *arg)
{
  rank *self = arg;
  for (int turn = 0; turn < TURNS; ++turn) {
    for (int round = 0; round <= ROUNDS; ++round) {
      baton_wait(&self->baton, 1);
      baton_pass(&self->baton, 0);
    }
    need(ps_serve(self->follower, self->number, keep, NULL, NULL, PS_F32));
    ps_follower_destroy(self->follower);
  }
  return NULL;
}

static double now_us(void)
{
  return (double)ps_now_ns() * 1e-3;
}

static double pass_batons(rank *ranks)
{
  double begin = now_us();
  for (int k = 1; k < RANKS; ++k) {
    baton_pass(&ranks[k].baton, 1);
  }
  for (int k = 1; k < RANKS; ++k) {
    baton_wait(&ranks[k].baton, 0);
  }
  return now_us() - begin;
}

/* Steps 4k + 1 begin rounds, the three after each are answered. */
static int run_turn(ps_leader *leader, const float *x, float *m, double *exchange, double *whole)
{
  int rounds = 0;
  double begin = 0.0;
  for (int step = 0; step < STEPS - RANKS; ++step) {
    ps_verdict verdict;
    begin = step % RANKS == 1 ? now_us() : begin;
    need(ps_leader_ask(leader, step, x, m, &verdict));
    if ((verdict == PS_EVALUATE) != (step == 0 || step % RANKS == 1)) {
      fprintf(stderr, "round_c: step %d was not what it should be\n", step);
      exit(1);
    }
    if (verdict == PS_EVALUATE) {
      need(ps_leader_submit(leader, m, PS_F32, 0));
      exchange[rounds] = now_us() - begin;
    }
    if (step > 0 && step % RANKS == 0) {
      whole[rounds++] = now_us() - begin;
    }
  }
  return rounds;
}

/* ---- figures --------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b)
{
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double print_times(const char *what, double *times, int n)
{
  qsort(times, (size_t)n, sizeof *times, ascending);
  printf("%-36s median %6.1f us   10%% %6.1f   90%% %6.1f   (%d)\n", what, times[n / 2],
         times[n / 10], times[n * 9 / 10], n);
  return times[n / 2];
}

int main(void)
{
  static rank ranks[RANKS];
  static float x[SIZE], m[SIZE];
  static double bare[TURNS * ROUNDS], exchange[TURNS * ROUNDS], whole[TURNS * ROUNDS];
  double sigma[STEPS + 1];
  int bares = 0, rounds = 0;
  ps_program *program;
  ps_options options;
  ps_options_init(&options);
  options.max_stride = 1;
  options.tolerance = INFINITY;
  for (int j = 0; j <= STEPS; ++j) {
    sigma[j] = 10.0 * (STEPS - j) / STEPS;
  }
  need(ps_program_euler(STEPS, sigma, &program));
  for (int k = 1; k < RANKS; ++k) {
    ranks[k].number = k;
    pthread_mutex_init(&ranks[k].baton.mutex, NULL);
    pthread_cond_init(&ranks[k].baton.changed, NULL);
    pthread_create(&ranks[k].thread, NULL, follow, &ranks[k]);
  }
  for (int turn = 0; turn < TURNS; ++turn) {
    ps_link *links[RANKS] = {NULL};
    ps_leader *leader;
    for (int round = 0; round < ROUNDS; ++round) {
      bare[bares++] = pass_batons(ranks);
    }
    for (int k = 1; k < RANKS; ++k) {
      ps_link *end;
      need(ps_threads_open(&layout, 1, &links[k], &end));
      need(ps_follower_create(&layout, end, &ranks[k].follower));
    }
    pass_batons(ranks);
    need(ps_leader_create(program, &layout, &options, ps_backend_find("cpu"), links, RANKS, NULL,
                          &leader));
    rounds += run_turn(leader, x, m, exchange + rounds, whole + rounds);
    ps_leader_destroy(leader);
  }
  for (int k = 1; k < RANKS; ++k) {
    pthread_join(ranks[k].thread, NULL);
  }
  ps_program_release(program);
  double least = print_times("bare fan-out and fan-in", bare, bares);
  double to_submit = print_times("ask to submit's return", exchange, rounds);
  double all = print_times("with the round's three answers", whole, rounds);
  printf("to the bare exchange: %.2f and %.2f\n", to_submit / least, all / least);
  return 0;
}
