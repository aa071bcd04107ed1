/* guess.c - where the followers evaluate: a roll-out of the program.
 *
 * Called by leader.c at the start of a round.  Every latent and output on the way is a linear
 * combination of vectors on hand, the basis: true latents and outputs, carried points and outputs,
 * noise.  So the roll-out is scalar algebra on coefficients, and the points are written by one pass
 * of the backend over memory.
 */
#include <string.h>

#include "core/internal.h"

typedef struct ps__guesser {
  int capacity;             /* columns the basis may have */
  int columns;              /* basis vectors in use */
  ps_term *basis;           /* (capacity) */
  int oldest, last;         /* steps the roll-out spans: x[oldest .. last], m[oldest .. last] */
  double *x;                /* (span, capacity) x_j in the basis; true ones are unit rows */
  double *m;                /* (span, capacity) m_j likewise */
  double *own;              /* (capacity) the published rule's reused output */
  const ps__node **carried; /* (span) node whose output a step carries, or NULL */
  int *noise;               /* (span) column of z_j, -1 where it is not known */
  double *weight; /* (window, capacity) what the backend is given, unused columns left out */
  ps_term *term;  /* (capacity) */
  void **out;     /* (window) */
} ps__guesser;

static int span_of(const ps_leader *leader)
{
  return leader->depth + leader->window_max;
}

size_t ps__guesser_carve(ps_leader *leader, ps__arena *arena)
{
  size_t window = (size_t)leader->window_max, span = (size_t)span_of(leader);
  size_t capacity = 2 * (size_t)leader->depth + 3 * window;
  ps__guesser *guesser = ps__carve(arena, 1, sizeof *guesser);
  ps__guesser parts = {
      .capacity = (int)capacity,
      .basis = ps__carve(arena, capacity, sizeof(ps_term)),
      .x = ps__carve(arena, span * capacity, sizeof(double)),
      .m = ps__carve(arena, span * capacity, sizeof(double)),
      .own = ps__carve(arena, capacity, sizeof(double)),
      .carried = ps__carve(arena, span, sizeof(ps__node *)),
      .noise = ps__carve(arena, span, sizeof(int)),
      .weight = ps__carve(arena, window * capacity, sizeof(double)),
      .term = ps__carve(arena, capacity, sizeof(ps_term)),
      .out = ps__carve(arena, window, sizeof(void *)),
  };
  if (guesser != NULL) {
    *guesser = parts;
  }
  leader->guesser = guesser;
  return arena->used;
}

/* ---- rows of coefficients -------------------------------------------------------------------- */

static double *x_row(const ps__guesser *guesser, int step)
{
  return guesser->x + (size_t)(step - guesser->oldest) * (size_t)guesser->capacity;
}

static double *m_row(const ps__guesser *guesser, int step)
{
  return guesser->m + (size_t)(step - guesser->oldest) * (size_t)guesser->capacity;
}

static void add_row(const ps__guesser *guesser, double *to, double factor, const double *from)
{
  for (int column = 0; factor != 0.0 && column < guesser->columns; ++column) {
    to[column] += factor * from[column];
  }
}

static void clear_row(const ps__guesser *guesser, double *row)
{
  memset(row, 0, (size_t)guesser->capacity * sizeof(double));
}

static int add_basis(ps__guesser *guesser, const void *data, ps_dtype dtype)
{
  guesser->basis[guesser->columns] = (ps_term){data, dtype};
  return guesser->columns++;
}

/* ---- the basis ------------------------------------------------------------------------------- */

/* x_oldest .. x_i and m_oldest .. m_{i-1} are true: unit rows. */
static void take_history(const ps_leader *leader, ps__guesser *guesser, int i)
{
  for (int j = guesser->oldest; j <= i; ++j) {
    int column = add_basis(guesser, leader->x[j % leader->depth], leader->layout.x);
    clear_row(guesser, x_row(guesser, j));
    x_row(guesser, j)[column] = 1.0;
  }
  for (int j = guesser->oldest; j < i; ++j) {
    int column = add_basis(guesser, leader->m[j % leader->depth], leader->layout.m);
    clear_row(guesser, m_row(guesser, j));
    m_row(guesser, j)[column] = 1.0;
  }
}

/* Outputs of the last round that were not reached or not accepted serve as guesses of m (carry). */
static void take_carried(const ps_leader *leader, ps__guesser *guesser, int i)
{
  memset(guesser->carried, 0, (size_t)span_of(leader) * sizeof *guesser->carried);
  for (int k = 0; leader->options.policy == PS_VERIFIED && k < leader->nodes; ++k) {
    const ps__node *node = &leader->node[k];
    if (node->state == PS__READY && node->step >= i && node->step <= guesser->last &&
        ps__finite(leader, node)) {
      guesser->carried[node->step - guesser->oldest] = node;
    }
  }
}

/* Noise that the host has drawn ahead, for the rows the roll-out applies. */
static void take_noise(const ps_leader *leader, ps__guesser *guesser, int i)
{
  for (int j = i; j < guesser->last; ++j) {
    int place = j % leader->window_max;
    bool known = leader->noise != NULL && leader->noise_step[place] == j;
    guesser->noise[j - guesser->oldest] =
        known ? add_basis(guesser, leader->noise[place], leader->layout.x) : -1;
  }
}

/* ---- outputs on the way ---------------------------------------------------------------------- */

/* The newest step before j (and before `before`) whose output is known: true, or carried. */
static int newest_known(const ps__guesser *guesser, int i, int before)
{
  for (int j = before - 1; j >= i; --j) {
    if (guesser->carried[j - guesser->oldest] != NULL) {
      return j;
    }
  }
  return before < i ? before - 1 : i - 1;
}

/* m_j = o_j + g_j (x_j - x^_j): a carried output, rebased to where this roll-out passes. */
static void carry_output(const ps_leader *leader, ps__guesser *guesser, int j)
{
  const ps__node *node = guesser->carried[j - guesser->oldest];
  double slope = leader->program->g[j];
  double *row = m_row(guesser, j);
  clear_row(guesser, row);
  row[add_basis(guesser, node->output, leader->layout.m)] = 1.0;
  if (slope != 0.0) {
    row[add_basis(guesser, node->point, leader->layout.x)] = -slope;
    add_row(guesser, row, slope, x_row(guesser, j));
  }
}

/* Order 0 reuses the newest output, order 1 goes on along the slope of the two newest, damped. */
static void extrapolate_output(const ps_leader *leader, ps__guesser *guesser, int i, int j)
{
  const double damping = 0.5;
  double *row = m_row(guesser, j);
  int newest = newest_known(guesser, i, j), before = newest_known(guesser, i, newest);
  double factor = 0.0;
  clear_row(guesser, row);
  if (leader->options.order > 0 && before >= guesser->oldest) {
    factor = damping * (j - newest) / (double)(newest - before);
    add_row(guesser, row, -factor, m_row(guesser, before));
  }
  add_row(guesser, row, 1.0 + factor, m_row(guesser, newest));
}

static void guess_output(const ps_leader *leader, ps__guesser *guesser, int i, int j)
{
  if (guesser->carried[j - guesser->oldest] != NULL) {
    carry_output(leader, guesser, j);
  } else {
    extrapolate_output(leader, guesser, i, j);
  }
}

/* The published rule: every step before a rank's own reuses that rank's last output. */
static void reuse_output(ps__guesser *guesser, int j)
{
  memcpy(m_row(guesser, j), guesser->own, (size_t)guesser->capacity * sizeof(double));
}

/* ---- the roll-out ---------------------------------------------------------------------------- */

/* x_{j+1} by row j of the program. */
static void roll_step(const ps_leader *leader, ps__guesser *guesser, int j)
{
  const ps_program *program = leader->program;
  double *next = x_row(guesser, j + 1);
  clear_row(guesser, next);
  for (int k = 0; k < program->history && j - k >= guesser->oldest; ++k) {
    add_row(guesser, next, program->a[j * program->history + k], x_row(guesser, j - k));
    add_row(guesser, next, program->b[j * program->history + k], m_row(guesser, j - k));
  }
  int noise = guesser->noise[j - guesser->oldest];
  if (noise >= 0) {
    next[noise] = program->c[j];
  }
}

static void collect_point(ps__guesser *guesser, double *weights, int row, const ps__node *node)
{
  size_t capacity = (size_t)guesser->capacity;
  memcpy(weights + (size_t)row * capacity, x_row(guesser, node->step), capacity * sizeof(double));
  guesser->out[row] = node->point;
}

/* One roll-out serves all nodes: they differ in how far it goes. */
static void roll_verified(const ps_leader *leader, ps__guesser *guesser, const ps__node *nodes,
                          int count)
{
  int i = nodes[0].step;
  take_carried(leader, guesser, i);
  for (int j = i, k = 1; k < count; ++j) {
    guess_output(leader, guesser, i, j);
    roll_step(leader, guesser, j);
    if (nodes[k].step == j + 1) {
      collect_point(guesser, guesser->weight, k - 1, &nodes[k]);
      ++k;
    }
  }
}

/* Each rank rolls out on its own last output; one that has none yet uses m_{i-1}, which is what
 * every rank of the published program holds after the warm-up. */
static void roll_paper(const ps_leader *leader, ps__guesser *guesser, const ps__node *nodes,
                       int count)
{
  int i = nodes[0].step;
  for (int k = 1; k < count; ++k) {
    const ps__rank *rank = &leader->rank[nodes[k].rank];
    clear_row(guesser, guesser->own);
    if (nodes[k].slot < rank->spoken) {
      guesser->own[add_basis(guesser, nodes[k].output, leader->layout.m)] = 1.0;
    } else {
      add_row(guesser, guesser->own, 1.0, m_row(guesser, i - 1));
    }
    for (int j = i; j < nodes[k].step; ++j) {
      reuse_output(guesser, j);
      roll_step(leader, guesser, j);
    }
    collect_point(guesser, guesser->weight, k - 1, &nodes[k]);
  }
}

/* ---- one pass over memory -------------------------------------------------------------------- */

static bool is_used(const ps__guesser *guesser, int column, int outs)
{
  for (int k = 0; k < outs; ++k) {
    if (guesser->weight[(size_t)k * (size_t)guesser->capacity + (size_t)column] != 0.0) {
      return true;
    }
  }
  return false;
}

/* Drops the columns that no point uses and packs the rest; in place, since packing moves left. */
static int pack_terms(ps__guesser *guesser, int outs)
{
  int terms = 0;
  size_t capacity = (size_t)guesser->capacity;
  for (int column = 0; column < guesser->columns; ++column) {
    if (!is_used(guesser, column, outs)) {
      continue;
    }
    guesser->term[terms] = guesser->basis[column];
    for (int k = 0; k < outs; ++k) {
      guesser->weight[(size_t)k * capacity + (size_t)terms] =
          guesser->weight[(size_t)k * capacity + (size_t)column];
    }
    ++terms;
  }
  if (terms == 0) {
    terms = 1; /* rows of zeros: column 0, with weight 0, since a backend wants one term at least */
    guesser->term[0] = guesser->basis[0];
  }
  for (int k = 1; k < outs; ++k) {
    memmove(guesser->weight + (size_t)k * (size_t)terms, guesser->weight + (size_t)k * capacity,
            (size_t)terms * sizeof(double));
  }
  return terms;
}

ps_status ps__guess(ps_leader *leader, const ps__node *nodes, int count)
{
  ps__guesser *guesser = leader->guesser;
  int i = nodes[0].step, oldest = i - leader->depth + 1;
  guesser->columns = 0;
  guesser->oldest = oldest > 0 ? oldest : 0;
  guesser->last = nodes[count - 1].step;
  take_history(leader, guesser, i);
  take_noise(leader, guesser, i);
  if (leader->options.policy == PS_PAPER) {
    roll_paper(leader, guesser, nodes, count);
  } else {
    roll_verified(leader, guesser, nodes, count);
  }
  int terms = pack_terms(guesser, count - 1);
  return leader->backend->lincomb(leader->backend, leader->layout.items * leader->layout.size,
                                  count - 1, terms, guesser->weight, guesser->term, guesser->out,
                                  leader->layout.x);
}
