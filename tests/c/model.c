/* model.c - the method once more, in plain vectors; see model.h. */
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"

enum { MODEL_STEPS = 64 };

/* One evaluation of a round: k-th node, step i + k. */
typedef struct thought {
  double *point, *output; /* NULL: not known */
} thought;

typedef struct model {
  const stage *on;
  size_t n;
  int steps, window;
  double *x[MODEL_STEPS + 1], *m[MODEL_STEPS]; /* the true trajectory */
  int begun, nodes;                            /* the last round: nodes steps from begun on */
  double spent;                                /* of the tolerance, by its answers */
  thought node[MODEL_STEPS];
  double *own[STAGE_SEEN]; /* the published rule: the last output of the k-th of a window's ranks */
  int rounds, answered, accepted[MODEL_STEPS];
  double drift[MODEL_STEPS], slope[MODEL_STEPS];
  int evaluations;
  int rank[STAGE_SEEN], step[STAGE_SEEN];
  double *point[STAGE_SEEN];
} model;

static double *new_vector(const model *is)
{
  double *v = calloc(is->n, sizeof *v);
  CHECK(v != NULL);
  return v;
}

static double coefficient(const model *is, char table, int step, int column)
{
  int history = ps_program_history(is->on->program);
  return ps_program_table(is->on->program, table)[step * history + column];
}

/* to = row j applied to the latents and outputs given; an input that is missing counts as 0. */
static void apply_row(const model *is, int j, double *const *x, double *const *m, bool noise,
                      double *to)
{
  memset(to, 0, is->n * sizeof *to);
  for (int k = 0; k < ps_program_history(is->on->program) && k <= j; ++k) {
    for (size_t i = 0; i < is->n; ++i) {
      to[i] += coefficient(is, 'a', j, k) * x[j - k][i] + coefficient(is, 'b', j, k) * m[j - k][i];
    }
  }
  const double *z = is->on->noise;
  for (size_t i = 0; noise && z != NULL && i < is->n; ++i) {
    to[i] += ps_program_table(is->on->program, 'c')[j] * z[(size_t)j * is->n + i];
  }
}

static double *evaluated(const model *is, int rank, int step, const double *x)
{
  double *m = new_vector(is);
  stage_rank self = {.on = (stage *)is->on, .rank = rank};
  for (size_t i = 0; i < is->n; ++i) {
    m[i] = is->on->f(&self, step, x[i], i);
  }
  return m;
}

/* The output that the last round has for a step not answered yet, moved to x; NULL if it has none.
 */
static double *carried(const model *is, int j, const double *x)
{
  int k = j - is->begun;
  if (is->on->options.policy == PS_PAPER || k < 1 || k >= is->nodes || is->node[k].output == NULL) {
    return NULL;
  }
  double *m = new_vector(is);
  for (size_t i = 0; i < is->n; ++i) {
    m[i] = is->node[k].output[i] + is->slope[j] * (x[i] - is->node[k].point[i]);
  }
  return m;
}

/* A guess of m_j: along the slope, damped, of the two newest outputs that are known. */
static double *extrapolated(const model *is, int j, double *const *m, const bool *known)
{
  double *guess = new_vector(is);
  int newest = j - 1;
  while (!known[newest]) {
    --newest;
  }
  int before = newest - 1;
  while (before >= 0 && !known[before]) {
    --before;
  }
  double ahead = is->on->options.order > 0 && before >= 0
                     ? 0.75 * (j - newest) / (double)(newest - before)
                     : 0.0;
  for (size_t i = 0; i < is->n; ++i) {
    guess[i] = m[newest][i] + (ahead != 0.0 ? ahead * (m[newest][i] - m[before][i]) : 0.0);
  }
  return guess;
}

/* Steps on from the true x_i to the point of step i + count. */
static double *roll(const model *is, int i, int count, const double *reused)
{
  double *x[MODEL_STEPS + 1], *m[MODEL_STEPS], *last = new_vector(is);
  bool known[MODEL_STEPS];
  memcpy(x, is->x, sizeof x);
  memcpy(m, is->m, sizeof m);
  for (int j = 0; j < i; ++j) {
    known[j] = true;
  }
  for (int j = i; j < i + count; ++j) {
    if (reused != NULL) {
      m[j] = memcpy(new_vector(is), reused, is->n * sizeof(double));
    } else {
      m[j] = carried(is, j, x[j]);
      known[j] = m[j] != NULL;
      m[j] = known[j] ? m[j] : extrapolated(is, j, m, known);
    }
    x[j + 1] = new_vector(is);
    apply_row(is, j, x, m, !is->on->keeps_noise_to_self, x[j + 1]);
  }
  memcpy(last, x[i + count], is->n * sizeof(double));
  for (int j = i; j < i + count; ++j) {
    free(m[j]);
    free(x[j + 1]);
  }
  return last;
}

static void note_evaluation(model *is, int rank, int step, const double *point)
{
  CHECK_LT(is->evaluations, STAGE_SEEN);
  is->rank[is->evaluations] = rank;
  is->step[is->evaluations] = step;
  is->point[is->evaluations++] = stage_copy(point, is->n * sizeof(double));
}

/* First slots of all ranks, then second ones, ... */
static int rank_of_node(const stage *on, int k)
{
  for (int slot = 0;; ++slot) {
    for (int rank = 0; rank < on->ranks; ++rank) {
      if (slot < on->slots[rank] && k-- == 0) {
        return rank;
      }
    }
  }
}

static void forget_round(model *is)
{
  for (int k = 0; k < is->nodes; ++k) {
    free(is->node[k].point);
    free(is->node[k].output);
    is->node[k] = (thought){NULL, NULL};
  }
  is->nodes = 0;
}

/* What two outputs of step j show of how it changes with the latent; see slope.c. */
static void learn_slope(model *is, int j, const thought *now)
{
  int k = j - is->begun;
  double along = 0.0, square = 0.0, changed = 0.0;
  if (is->on->options.policy == PS_PAPER || is->on->options.tolerance == 0.0 || k < 1 ||
      k >= is->nodes) {
    return;
  }
  for (size_t i = 0; i < is->n; ++i) {
    double moved = now->point[i] - is->node[k].point[i];
    double change = now->output[i] - is->node[k].output[i];
    along += moved * change;
    changed += change * change;
    square += moved * moved;
  }
  if (square > 0.0 && changed > 0.0) {
    int exponent;
    double own = ps_program_table(is->on->program, 'g')[j];
    double weight = along * along / (square * changed);
    double part = frexp(own + weight * (along / square - own), &exponent);
    is->slope[j] = ldexp(floor(part * 1024.0 + 0.5) / 1024.0, exponent);
  }
}

static void think_ahead(model *is, int i, int window)
{
  thought fresh[MODEL_STEPS] = {{NULL, NULL}};
  bool paper = is->on->options.policy == PS_PAPER;
  for (int k = 1; k < window; ++k) {
    const double *reused = is->own[k] != NULL ? is->own[k] : is->m[i - 1];
    fresh[k].point = roll(is, i, k, paper ? reused : NULL);
  }
  for (int k = 1; k < window; ++k) {
    int rank = rank_of_node(is->on, k);
    fresh[k].output = evaluated(is, rank, i + k, fresh[k].point);
    note_evaluation(is, rank, i + k, fresh[k].point);
    free(is->own[k]);
    is->own[k] = stage_copy(fresh[k].output, is->n * sizeof(double));
    learn_slope(is, i + k, &fresh[k]);
  }
  forget_round(is);
  memcpy(is->node, fresh, sizeof fresh);
}

static void begin_model_round(model *is, int i)
{
  const ps_options *options = &is->on->options;
  int left = is->steps - i, window = left < is->window ? left : is->window;
  bool warm = options->policy == PS_PAPER && i < options->warmup;
  is->accepted[is->rounds++] = 1;
  note_evaluation(is, 0, i, is->x[i]);
  for (int rank = 1; i == 0 && is->steps > 1 && rank < is->on->ranks; ++rank) {
    note_evaluation(is, rank, 0, is->x[0]);
  }
  window = warm || i == 0 ? 1 : window;
  think_ahead(is, i, window);
  is->begun = i;
  is->spent = 0.0;
  is->nodes = window;
  is->m[i] = evaluated(is, 0, i, is->x[i]);
}

/* Of the worst item, in units of the noise scale. */
static double distance(const model *is, int j, const double *point)
{
  size_t size = is->on->layout.size;
  double worst = 0.0;
  for (size_t item = 0; item < is->on->layout.items; ++item) {
    double sum = 0.0;
    for (size_t i = item * size; i < (item + 1) * size; ++i) {
      sum += (is->x[j][i] - point[i]) * (is->x[j][i] - point[i]);
    }
    worst = fmax(worst, sqrt(sum / (double)size));
  }
  return worst / ps_program_table(is->on->program, 's')[j];
}

/* Noise over signal of a step, 0 after the last. */
static double level_at(const model *is, int j)
{
  const ps_program *program = is->on->program;
  return j < is->steps ? ps_program_table(program, 's')[j] / ps_program_table(program, 'l')[j]
                       : 0.0;
}

/* What a drift of 1 spends of the tolerance at a step; see pace.c. */
static double cost_of(const model *is, int j)
{
  const ps_program *program = is->on->program;
  int first = j, next = j + 1;
  while (first > 0 && level_at(is, first - 1) == level_at(is, j)) {
    --first;
  }
  while (next < is->steps && level_at(is, next) >= level_at(is, j)) {
    ++next;
  }
  double from = level_at(is, j), to = level_at(is, next), added = 0.0;
  if (next < is->steps) {
    added = ps_program_table(program, 'c')[next - 1] / ps_program_table(program, 'l')[next];
  }
  double signal = 1.0 / sqrt(1.0 + from * from), to_signal = 1.0 / sqrt(1.0 + to * to);
  to = sqrt(fmax(to * to - added * added, 0.0));
  double moved = fabs(to_signal - to * to_signal / from) * from * signal / (next - first);
  double left = 5.0 / (0.015 + signal * signal),
         grown = 1.0 / (0.03 + signal * (1.0 + 2.0 * signal * signal));
  return moved * left * grown / 0.19;
}

static void call_model(model *is, int j)
{
  const ps_options *options = &is->on->options;
  int k = j - is->begun;
  bool accepted = false;
  if (is->rounds > 0 && k > 0 && k < is->nodes) {
    is->drift[j] = distance(is, j, is->node[k].point);
    double spent = is->spent + cost_of(is, j) * is->drift[j];
    accepted = options->policy == PS_PAPER || spent < options->tolerance;
    is->spent = accepted ? spent : is->spent;
  }
  if (!accepted) {
    begin_model_round(is, j);
    return;
  }
  ++is->answered;
  ++is->accepted[is->rounds - 1];
  is->m[j] = carried(is, j, is->x[j]);
  if (options->policy == PS_PAPER) {
    is->m[j] = stage_copy(is->node[k].output, is->n * sizeof(double));
  }
}

static model *model_of(const stage *on, const double *x)
{
  model *is = calloc(1, sizeof *is);
  CHECK(is != NULL && on->layout.x == PS_F64 && on->layout.m == PS_F64);
  is->on = on;
  is->n = stage_elements(on);
  is->steps = ps_program_steps(on->program);
  for (int rank = 0; rank < on->ranks; ++rank) {
    is->window += on->slots[rank];
  }
  is->x[0] = stage_copy(x, is->n * sizeof *x);
  for (int j = 0; j < is->steps; ++j) {
    is->slope[j] = ps_program_table(on->program, 'g')[j];
  }
  for (int j = 0; j < is->steps; ++j) {
    is->drift[j] = NAN;
    call_model(is, j);
    is->x[j + 1] = new_vector(is);
    apply_row(is, j, is->x, is->m, true, is->x[j + 1]);
  }
  return is;
}

static void model_free(model *is)
{
  forget_round(is);
  for (int j = 0; j <= is->steps; ++j) {
    free(is->x[j]);
    free(j < is->steps ? is->m[j] : NULL);
  }
  for (int k = 0; k < STAGE_SEEN; ++k) {
    free(is->own[k]);
    free(is->point[k]);
  }
  free(is);
}

static void check_near(const double *got, const double *expected, size_t n)
{
  for (size_t i = 0; i < n; ++i) {
    CHECK_NEAR(got[i], expected[i], 1e-9 * (1.0 + fabs(expected[i])));
  }
}

/* Every rank evaluated what it was to, in that order, and nothing else. */
static void check_evaluations(const stage *on, const model *is)
{
  int next[STAGE_RANKS] = {0};
  for (int k = 0; k < is->evaluations; ++k) {
    const stage_rank *rank = &on->rank[is->rank[k]];
    int at = next[is->rank[k]]++;
    CHECK_LT(at, rank->seen);
    CHECK_EQ(rank->step[at], is->step[k]);
    check_near(rank->point[at], is->point[k], is->n);
  }
  for (int rank = 0; rank < on->ranks; ++rank) {
    CHECK_EQ(on->rank[rank].seen, next[rank]);
  }
}

static void check_report(const stage *on, const model *is)
{
  ps_report report = stage_report(on);
  CHECK_EQ(report.steps, is->steps);
  CHECK_EQ(report.ranks, on->ranks);
  CHECK_EQ(report.rounds, is->rounds);
  CHECK_EQ(report.answered, is->answered);
  CHECK_EQ(report.records, is->evaluations);
  CHECK_EQ(report.failed, 0);
  CHECK_EQ(report.not_finite, 0);
  CHECK(report.fallback == NULL);
  for (int round = 0; round < is->rounds; ++round) {
    CHECK_EQ(report.accepted[round], is->accepted[round]);
  }
  for (int rank = 0; rank < on->ranks; ++rank) {
    CHECK_EQ(report.evaluations[rank], on->rank[rank].seen);
  }
  for (int j = 0; j < is->steps; ++j) {
    CHECK(isnan(report.drift[j]) == isnan(is->drift[j]));
    CHECK_NEAR(isnan(is->drift[j]) ? 0.0 : report.drift[j],
               isnan(is->drift[j]) ? 0.0 : is->drift[j], 1e-8);
  }
}

int model_check(stage *on)
{
  double *x = stage_latent(on, 11);
  stage_open(on);
  model *is = model_of(on, x);
  stage_run(on, x);
  CHECK_OK(on->failure);
  stage_end(on);
  check_near(x, is->x[is->steps], is->n);
  check_evaluations(on, is);
  check_report(on, is);
  int rounds = is->rounds;
  model_free(is);
  stage_close(on);
  free(x);
  return rounds;
}
