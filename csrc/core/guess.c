/* guess.c - where nodes are evaluated: a roll-out of the program.
 *
 * Called by leader.c at the start of a round.  Every latent and output on the way is a linear
 * combination of vectors on hand, the basis: true latents and outputs, anchors, carried points and
 * outputs, noise.  So the roll-out is scalar algebra on coefficients, and the points are written by
 * one pass of the backend over memory.  Guesses of steps between nodes are formed when the host
 * gets there, for between.c; what they read is kept until the round is over.
 */
#include <string.h>

#include "core/internal.h"

/* A step whose output is known: an anchor behind the frontier, or a carried node ahead of it. */
typedef struct known {
  int step;
  int m;     /* column of the output */
  int point; /* column of the point where a carried one was evaluated, -1 for an anchor */
} known;

typedef struct ps__guesser {
  int capacity;     /* columns the basis may have, those that foresight adds to it included */
  int columns;      /* basis vectors in use */
  int guesses;      /* those of them that guesses read; foresight's come after them */
  ps_term *basis;   /* (capacity) */
  void **kept;      /* (columns of guesses) room for the basis of guesses between nodes, or NULL */
  int oldest, last; /* steps the roll-out spans: x[oldest .. last], m[oldest .. last] */
  double *x;        /* (span, capacity) x_j in the basis; true ones are unit rows */
  double *m;        /* (span, capacity) m_j likewise */
  double *host_x;   /* (span, capacity) where the host will be, see ps__foresee_from */
  double *host_m;   /* (span, capacity) and what it will be answered */
  double *own;      /* (capacity) the published rule's reused output */
  known *known;     /* (PS__ANCHORS + window) ascending */
  int knowns;
  int *noise;     /* (span) column of z_j, -1 where it is not known */
  double *weight; /* (window, capacity) what the backend is given, unused columns left out */
  ps_term *term;  /* (capacity) */
  void **out;     /* (window) */
} ps__guesser;

static int span_of(const ps_leader *leader)
{
  int ahead = leader->window_max;
  if (leader->pace.strided) {
    ahead = leader->program->steps < PS__SPAN_MAX ? leader->program->steps : PS__SPAN_MAX;
  }
  return leader->depth + ahead;
}

static void **carve_kept(const ps_leader *leader, ps__arena *arena, size_t columns)
{
  size_t x = ps__x_bytes(&leader->layout), m = ps__m_bytes(&leader->layout);
  void **kept = ps__carve(arena, columns, sizeof(void *));
  for (size_t column = 0; leader->pace.strided && column < columns; ++column) {
    void *room = ps__carve_vector(arena, x > m ? x : m);
    if (kept != NULL) {
      kept[column] = room;
    }
  }
  return kept;
}

size_t ps__guesser_carve(ps_leader *leader, ps__arena *arena)
{
  size_t window = (size_t)leader->window_max, span = (size_t)span_of(leader);
  size_t columns = 2 * (size_t)leader->depth + PS__ANCHORS + 3 * window;
  size_t capacity = columns + 2 * (size_t)leader->depth + PS__ANCHORS + window;
  size_t foreseen = leader->pace.strided ? span * capacity : 0;
  ps__guesser *guesser = ps__carve(arena, 1, sizeof *guesser);
  ps__guesser parts = {
      .capacity = (int)capacity,
      .basis = ps__carve(arena, capacity, sizeof(ps_term)),
      .kept = carve_kept(leader, arena, columns),
      .x = ps__carve(arena, span * capacity, sizeof(double)),
      .m = ps__carve(arena, span * capacity, sizeof(double)),
      .host_x = ps__carve(arena, foreseen, sizeof(double)),
      .host_m = ps__carve(arena, foreseen, sizeof(double)),
      .own = ps__carve(arena, capacity, sizeof(double)),
      .known = ps__carve(arena, PS__ANCHORS + window, sizeof(known)),
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

/* The newest anchors; those within the history are columns already. */
static void take_anchors(const ps_leader *leader, ps__guesser *guesser, int i)
{
  int held = leader->anchors < PS__ANCHORS ? leader->anchors : PS__ANCHORS;
  guesser->knowns = 0;
  for (int k = leader->anchors - held; k < leader->anchors; ++k) {
    const ps__anchor *anchor = &leader->anchor[k % leader->anchors_max];
    int columns = i - guesser->oldest + 1, column = columns + anchor->step - guesser->oldest;
    if (anchor->step < guesser->oldest) {
      if (!leader->pace.strided) {
        continue; /* its output has left the trajectory */
      }
      column = add_basis(guesser, anchor->m, leader->layout.m);
    }
    guesser->known[guesser->knowns++] = (known){anchor->step, column, -1};
  }
}

/* Outputs of the last round that were not reached or not accepted serve as guesses of m (carry). */
static void take_carried(const ps_leader *leader, ps__guesser *guesser, int i)
{
  for (int k = 0; leader->options.policy == PS_VERIFIED && k < leader->nodes; ++k) {
    const ps__node *node = &leader->node[k];
    if (node->state == PS__READY && node->step >= i && node->step <= guesser->last &&
        ps__finite(leader, node->point, node->output)) {
      int m = add_basis(guesser, node->output, leader->layout.m);
      int point = add_basis(guesser, node->point, leader->layout.x);
      guesser->known[guesser->knowns++] = (known){node->step, m, point};
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

/* Adds an output to row: rebased, m_l = o_l + g_l (x_l - x^_l), where the roll-out has passed it.
 */
static void add_known(const ps__guesser *guesser, double *row, double factor, const known *from,
                      int j)
{
  if (from->point >= 0 && from->step < j) {
    add_row(guesser, row, factor, m_row(guesser, from->step));
  } else {
    row[from->m] += factor;
  }
}

static void carry_output(const ps_leader *leader, ps__guesser *guesser, const known *from)
{
  double slope = leader->slope[from->step], *row = m_row(guesser, from->step);
  row[from->m] = 1.0;
  row[from->point] = -slope;
  add_row(guesser, row, slope, x_row(guesser, from->step));
}

/* Between two known outputs on the line through them, by the clock. */
static void join_outputs(const ps_leader *leader, ps__guesser *guesser, const known *before, int j)
{
  const known *after = before + 1;
  const double *clock = leader->pace.clock;
  double part = (clock[j] - clock[before->step]) / (clock[after->step] - clock[before->step]);
  add_known(guesser, m_row(guesser, j), 1.0 - part, before, j);
  add_known(guesser, m_row(guesser, j), part, after, j);
}

/* Beyond the newest: order 0 reuses it, order 1 goes on along the slope over one stride. */
static void extrapolate_output(const ps_leader *leader, ps__guesser *guesser, const known *newest,
                               int j)
{
  const double damping = 0.75;
  const double *clock = leader->pace.clock;
  const known *before = newest;
  double factor = 0.0;
  while (before > guesser->known &&
         clock[newest->step] - clock[before->step] < 0.9 * leader->pace.stride) {
    --before;
  }
  if (leader->options.order > 0 && before < newest) {
    factor =
        damping * (clock[j] - clock[newest->step]) / (clock[newest->step] - clock[before->step]);
    add_known(guesser, m_row(guesser, j), -factor, before, j);
  }
  add_known(guesser, m_row(guesser, j), 1.0 + factor, newest, j);
}

static void guess_output(const ps_leader *leader, ps__guesser *guesser, int j)
{
  const known *at = guesser->known + guesser->knowns - 1;
  while (at > guesser->known && at->step > j) {
    --at;
  }
  clear_row(guesser, m_row(guesser, j));
  if (at->step == j) {
    carry_output(leader, guesser, at);
  } else if (at + 1 < guesser->known + guesser->knowns) {
    join_outputs(leader, guesser, at, j);
  } else {
    extrapolate_output(leader, guesser, at, j);
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
  int i = leader->step;
  take_anchors(leader, guesser, i);
  take_carried(leader, guesser, i);
  for (int j = i, k = 0; k < count; ++j) {
    if (nodes[k].step == j) {
      collect_point(guesser, guesser->weight, k, &nodes[k]);
      ++k;
    }
    if (k < count) {
      guess_output(leader, guesser, j);
      roll_step(leader, guesser, j);
    }
  }
}

/* Each rank rolls out on its own last output; one that has none yet uses m_{i-1}, which is what
 * every rank of the published program holds after the warm-up. */
static void roll_paper(const ps_leader *leader, ps__guesser *guesser, const ps__node *nodes,
                       int count)
{
  int i = leader->step;
  for (int k = 0; k < count; ++k) {
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
    collect_point(guesser, guesser->weight, k, &nodes[k]);
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

/* What guesses between nodes read must outlive the round: points are about to be written where
 * carried ones lie, and the trajectory moves on. */
static ps_status keep_basis(const ps_leader *leader, ps__guesser *guesser)
{
  ps_status status = PS_OK;
  for (int column = 0; column < guesser->columns && status == PS_OK; ++column) {
    bool used = false;
    for (int j = leader->step; j < guesser->last && !used; ++j) {
      used = x_row(guesser, j)[column] != 0.0;
    }
    ps_term *term = &guesser->basis[column];
    if (used) {
      size_t bytes = leader->layout.items * leader->layout.size * ps_dtype_size(term->dtype);
      status = leader->backend->copy(leader->backend, guesser->kept[column], term->data, bytes);
      term->data = guesser->kept[column];
    }
  }
  return status;
}

ps_status ps__guess(ps_leader *leader, const ps__node *nodes, int count)
{
  ps__guesser *guesser = leader->guesser;
  int i = leader->step, oldest = i - leader->depth + 1;
  int exact = nodes[0].point == NULL;
  ps_status status = PS_OK;
  nodes += exact;
  count -= exact;
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
  if (leader->pace.strided) { /* a round without gaps has one where a rank is lost */
    status = keep_basis(leader, guesser);
  }
  int terms = pack_terms(guesser, count);
  return status != PS_OK
             ? status
             : leader->backend->lincomb(leader->backend, leader->layout.items * leader->layout.size,
                                        count, terms, guesser->weight, guesser->term, guesser->out,
                                        leader->layout.x);
}

ps_status ps__guess_between(ps_leader *leader, int step, void *point)
{
  ps__guesser *guesser = leader->guesser;
  guesser->out[0] = point;
  memcpy(guesser->weight, x_row(guesser, step), (size_t)guesser->capacity * sizeof(double));
  int terms = pack_terms(guesser, 1);
  return leader->backend->lincomb(leader->backend, leader->layout.items * leader->layout.size, 1,
                                  terms, guesser->weight, guesser->term, guesser->out,
                                  leader->layout.x);
}

/* ---- foresight ------------------------------------------------------------------------------- */

static double *host_row(const ps__guesser *guesser, double *rows, int step)
{
  return rows + (size_t)(step - guesser->oldest) * (size_t)guesser->capacity;
}

/* The column of an output, new ones beside those of the guesses. */
static int column_of(ps__guesser *guesser, int guesses, const void *data, ps_dtype dtype)
{
  for (int column = guesses; column < guesser->columns; ++column) {
    if (guesser->basis[column].data == data) {
      return column;
    }
  }
  return add_basis(guesser, data, dtype);
}

/* The host's own trajectory up to x: unit rows. */
static void take_host(const ps_leader *leader, ps__guesser *guesser, int oldest, const void *x)
{
  for (int j = oldest; j <= leader->step; ++j) {
    double *x_to = host_row(guesser, guesser->host_x, j);
    double *m_to = host_row(guesser, guesser->host_m, j);
    const void *at = j == leader->step ? x : leader->x[j % leader->depth];
    clear_row(guesser, x_to);
    clear_row(guesser, m_to);
    x_to[add_basis(guesser, at, leader->layout.x)] = 1.0;
    if (j < leader->step) {
      m_to[add_basis(guesser, leader->m[j % leader->depth], leader->layout.m)] = 1.0;
    }
  }
}

static void host_step(const ps_leader *leader, ps__guesser *guesser, int oldest, int j)
{
  const ps_program *program = leader->program;
  double *next = host_row(guesser, guesser->host_x, j + 1);
  clear_row(guesser, next);
  for (int k = 0; k < program->history && j - k >= oldest; ++k) {
    int at = j * program->history + k;
    add_row(guesser, next, program->a[at], host_row(guesser, guesser->host_x, j - k));
    add_row(guesser, next, program->b[at], host_row(guesser, guesser->host_m, j - k));
  }
}

static int oldest_of(const ps_leader *leader)
{
  int oldest = leader->step - leader->depth + 1;
  return oldest > leader->guesser->oldest ? oldest : leader->guesser->oldest;
}

void ps__foresee_from(ps_leader *leader, const void *x)
{
  ps__guesser *guesser = leader->guesser;
  guesser->guesses = guesser->columns;
  take_host(leader, guesser, oldest_of(leader), x);
}

void ps__foresee_answer(ps_leader *leader, int j, const void *const *outputs, const double *weight,
                        int count)
{
  ps__guesser *guesser = leader->guesser;
  double *row = host_row(guesser, guesser->host_m, j), slope = leader->slope[j];
  clear_row(guesser, row);
  for (int k = 0; k < count; ++k) {
    row[column_of(guesser, guesser->guesses, outputs[k], leader->layout.m)] += weight[k];
  }
  add_row(guesser, row, slope, host_row(guesser, guesser->host_x, j));
  add_row(guesser, row, -slope, x_row(guesser, j));
  host_step(leader, guesser, oldest_of(leader), j);
}

ps_status ps__foresee_point(ps_leader *leader, int step, void *point)
{
  ps__guesser *guesser = leader->guesser;
  guesser->out[0] = point;
  memcpy(guesser->weight, host_row(guesser, guesser->host_x, step),
         (size_t)guesser->capacity * sizeof(double));
  int terms = pack_terms(guesser, 1);
  guesser->columns = guesser->guesses;
  return leader->backend->lincomb(leader->backend, leader->layout.items * leader->layout.size, 1,
                                  terms, guesser->weight, guesser->term, guesser->out,
                                  leader->layout.x);
}
