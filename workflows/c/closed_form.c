/* closed_form.c - parastep from plain C: 4 ranks on threads, and a denoiser known in closed form.
 *
 *     make build/c/programs/closed_form && build/c/programs/closed_form [TOLERANCE]
 *
 * The data are a mixture of Gaussians, for which the best noise prediction is a formula, so that
 * the program needs no network, no GPU and no file.  Each evaluation also sleeps as long as a small
 * model would take; that is what the ranks overlap.  The program samples once in sequence and once
 * with parastep, and prints rounds, times, how far the results are apart, and who evaluated which
 * step.
 */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "parastep.h"
#include "parastep_backend.h"
#include "parastep_transport.h"

enum { STEPS = 50, RANKS = 4, MODES = 5, SIZE = 256, FORWARD_US = 2000 };

/* Mode k is a Gaussian around mean[k] with this variance in every direction. */
static const double variance = 0.01;

typedef struct mixture {
  double alpha[STEPS + 1], s[STEPS + 1]; /* x = alpha x0 + s eps at each step */
  double mean[MODES][SIZE];
} mixture;

/* ---- the model ------------------------------------------------------------------------------- */

static double uniform(void)
{
  return (double)rand() / RAND_MAX;
}

static double normal(void)
{
  return sqrt(-2.0 * log(uniform() + 1e-12)) * cos(6.283185307179586 * uniform());
}

static void mixture_init(mixture *data)
{
  for (int j = 0; j <= STEPS; ++j) {
    data->s[j] = cos(1.5607963 * j / STEPS); /* ends a little above 0 */
    data->alpha[j] = sqrt(1.0 - data->s[j] * data->s[j]) + 0.01;
  }
  for (int k = 0; k < MODES; ++k) {
    for (int i = 0; i < SIZE; ++i) {
      data->mean[k][i] = normal();
    }
  }
}

/* How likely each mode is at x. */
static void weigh_modes(const mixture *data, int step, const float *x, double *weight)
{
  double alpha = data->alpha[step], s = data->s[step], sum = 0.0, most = -INFINITY;
  for (int k = 0; k < MODES; ++k) {
    double square = 0.0;
    for (int i = 0; i < SIZE; ++i) {
      square += (x[i] - alpha * data->mean[k][i]) * (x[i] - alpha * data->mean[k][i]);
    }
    weight[k] = -0.5 * square / (alpha * alpha * variance + s * s);
    most = weight[k] > most ? weight[k] : most;
  }
  for (int k = 0; k < MODES; ++k) {
    weight[k] = exp(weight[k] - most);
    sum += weight[k];
  }
  for (int k = 0; k < MODES; ++k) {
    weight[k] /= sum;
  }
}

/* The ps_denoiser: m = (x - alpha E[x0 | x]) / s.  The same on every rank, as it has to be. */
static int denoise(void *ctx, int rank, int step, const void *point, void *output)
{
  const mixture *data = ctx;
  const struct timespec forward = {0, FORWARD_US * 1000L};
  const float *x = point;
  float *m = output;
  double weight[MODES], alpha = data->alpha[step], s = data->s[step];
  double gain = alpha * variance / (alpha * alpha * variance + s * s);
  (void)rank;
  weigh_modes(data, step, x, weight);
  for (int i = 0; i < SIZE; ++i) {
    double clean = 0.0;
    for (int k = 0; k < MODES; ++k) {
      clean += weight[k] * (data->mean[k][i] + gain * (x[i] - alpha * data->mean[k][i]));
    }
    m[i] = (float)((x[i] - alpha * clean) / s);
  }
  nanosleep(&forward, NULL);
  return 0;
}

/* ---- a run ----------------------------------------------------------------------------------- */

typedef struct rank {
  int number;
  ps_follower *follower;
  mixture *data;
  pthread_t thread;
} rank;

static void *serve(void *arg)
{
  rank *self = arg;
  ps_serve(self->follower, self->number, denoise, self->data, NULL, PS_F32);
  ps_follower_destroy(self->follower);
  return NULL;
}

static void need(ps_status status, const char *what)
{
  if (status != PS_OK) {
    fprintf(stderr, "closed_form: %s: %s (%s)\n", what, ps_last_error(), ps_status_text(status));
    exit(1);
  }
}

/* Samples from x in place on `ranks` ranks.  The caller reads the report and destroys the leader.
 */
static ps_leader *sample(mixture *data, int ranks, double tolerance, float *x)
{
  const ps_layout layout = {.items = 1, .size = SIZE, .x = PS_F32, .m = PS_F32};
  rank follower[RANKS];
  ps_link *links[RANKS] = {NULL};
  ps_program *program;
  ps_leader *leader;
  ps_options options;
  for (int k = 1; k < ranks; ++k) {
    ps_link *end;
    follower[k] = (rank){.number = k, .data = data};
    need(ps_threads_open(&layout, 1, &links[k], &end), "link");
    need(ps_follower_create(&layout, end, &follower[k].follower), "follower");
    if (pthread_create(&follower[k].thread, NULL, serve, &follower[k]) != 0) {
      need(PS_NO_MEMORY, "thread");
    }
  }
  ps_options_init(&options);
  options.tolerance = tolerance;
  need(ps_program_ddim(STEPS, data->alpha, data->s, PS_PREDICT_NOISE, &program), "program");
  need(ps_leader_create(program, &layout, &options, ps_backend_find("cpu"), links, ranks, NULL,
                        &leader),
       "leader");
  need(ps_sample(leader, denoise, data, NULL, x), "sampling");
  for (int k = 1; k < ranks; ++k) {
    pthread_join(follower[k].thread, NULL);
  }
  ps_program_release(program);
  return leader;
}

/* ---- what came of it ------------------------------------------------------------------------- */

/* A column a round, a row a rank: the step evaluated, with a dot where its output was not used.  In
 * the first round all ranks evaluate step 0, which shows that they compute the same function. */
static void print_timeline(const ps_report *report)
{
  for (int row = 0; row < report->ranks; ++row) {
    int round = 0;
    printf("rank %d ", row);
    for (int k = 0; k < report->records; ++k) {
      const ps_record *record = &report->timeline[k];
      if (record->rank == row) {
        printf("%*s", 4 * (record->round - round), "");
        printf("%3d%c", record->step, record->accepted ? ' ' : '.');
        round = record->round + 1;
      }
    }
    printf("\n");
  }
}

static double relative_distance(const float *x, const float *exact)
{
  double difference = 0.0, square = 0.0;
  for (int i = 0; i < SIZE; ++i) {
    difference += (x[i] - exact[i]) * (double)(x[i] - exact[i]);
    square += exact[i] * (double)exact[i];
  }
  return sqrt(difference / square);
}

int main(int argc, char **argv)
{
  double tolerance = argc > 1 ? strtod(argv[1], NULL) : 0.04;
  mixture *data = malloc(sizeof *data);
  float alone[SIZE], x[SIZE];
  ps_report sequential, report;
  if (data == NULL) {
    return 1;
  }
  mixture_init(data);
  for (int i = 0; i < SIZE; ++i) {
    alone[i] = x[i] = (float)normal();
  }
  ps_leader *leader = sample(data, 1, 0.0, alone);
  need(ps_leader_report(leader, &sequential), "report");
  printf("in sequence: %d forwards, %.0f ms\n", sequential.rounds,
         (double)sequential.seconds_ns * 1e-6);
  ps_leader_destroy(leader);

  leader = sample(data, RANKS, tolerance, x);
  need(ps_leader_report(leader, &report), "report");
  double distance = relative_distance(x, alone);
  printf("on %d ranks, tolerance %g: %d rounds, %.0f ms\n", report.ranks, tolerance, report.rounds,
         (double)report.seconds_ns * 1e-6);
  printf("relative distance to the sequential result: %.2g\n", distance);
  print_timeline(&report);
  ps_leader_destroy(leader);
  free(data);
  return distance <= tolerance ? 0 : 1; /* tolerance 0 is exact */
}
