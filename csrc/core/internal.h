/* internal.h - what the core's files share and nobody else sees.
 *
 * A leader is one struct with one arena; plan.c, guess.c and accept.c are its parts, each a room of
 * its own: who evaluates which step, at which guess, and what becomes of the output.  leader.c
 * drives them in the order ask, guess, post, submit, gather, verify.
 */
#ifndef PS_INTERNAL_H
#define PS_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "parastep.h"
#include "parastep_backend.h"
#include "parastep_transport.h"

/* ---- status.c, alloc.c ----------------------------------------------------------------------- */

/* Sets this thread's last error and returns status. */
ps_status ps__fail(ps_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

void *ps__alloc(size_t bytes); /* zeroed, 64-byte aligned; NULL with the last error set */
void ps__free(void *p);

/* One block of host memory, and one of the backend's for vectors, cut in two passes by the same
 * code: base NULL counts, base set hands out. */
typedef struct ps__arena {
  unsigned char *base;
  size_t used;
  unsigned char *vectors;
  size_t vectors_used;
} ps__arena;

void *ps__carve(ps__arena *arena, size_t count, size_t size); /* NULL while counting */
void *ps__carve_vector(ps__arena *arena, size_t bytes);       /* likewise, the backend's memory */
size_t ps__vector_bytes(size_t bytes); /* how far apart that cuts vectors of bytes */

/* ---- layout ---------------------------------------------------------------------------------- */

static inline size_t ps__x_bytes(const ps_layout *layout)
{
  return layout->items * layout->size * ps_dtype_size(layout->x);
}

/* Room for one output: m's own size, or where m is still unknown 4 bytes an element, x's at least.
 */
static inline size_t ps__m_bytes(const ps_layout *layout)
{
  size_t element = ps_dtype_size(layout->m);
  if (element == 0) {
    element = ps_dtype_size(layout->x) > 4 ? ps_dtype_size(layout->x) : 4;
  }
  return layout->items * layout->size * element;
}

ps_status ps__layout_check(const ps_layout *layout);

/* ---- program.c ------------------------------------------------------------------------------- */

struct ps_program {
  int references; /* changed atomically: a leader's thread may release the last one */
  int steps, history;
  double *a, *b;     /* (steps, history) */
  double *c, *s, *g; /* (steps) */
  bool draws;        /* some c is not 0 */
};

/* ---- nodes: the evaluations of a round ------------------------------------------------------- */

typedef enum ps__node_state {
  PS__VOID,    /* no output, and none will come */
  PS__PENDING, /* being evaluated */
  PS__READY,   /* output holds f(point, t_step) */
} ps__node_state;

typedef struct ps__node {
  int step, rank, slot;
  ps__node_state state;
  int record;   /* index in the timeline, -1 before the evaluation is back */
  void *point;  /* (items, size) x dtype; the rank's end of the link owns it */
  void *output; /* (items, size) m dtype; likewise */
} ps__node;

/* ---- leader ---------------------------------------------------------------------------------- */

typedef struct ps__rank {
  ps_link *link; /* NULL for the leader itself and for ranks left out */
  int slots;
  int spoken; /* slots whose output holds their last evaluation (the published rule reuses it) */
  int64_t posted_ns; /* when its work of this round was sent; 0 = none was */
  void **point;      /* (slots); the leader's own are in its arena, slot 0 of it has none */
  void **output;     /* (slots) */
} ps__rank;

typedef enum ps__phase {
  PS__ASKING,     /* the next call is ask */
  PS__EVALUATING, /* the next call is submit */
  PS__BROKEN,     /* interrupted or raised: only report, finish and destroy */
  PS__FINISHED,
} ps__phase;

struct ps_leader {
  ps_program *program;
  ps_layout layout;
  ps_options options;
  const ps_backend *backend; /* retained */
  void *vectors;             /* the backend's memory that all vectors are cut from */
  uint64_t run;
  ps__phase phase;
  int step;       /* the step being asked or answered; ask takes the one after it */
  int window_max; /* slots of all ranks together */
  int ranks;
  ps__rank *rank; /* (ranks); 0 is the leader */

  /* The true trajectory, as far back as rows and extrapolation reach: step j is at [j % depth]. */
  int depth;
  void **x, **m;

  /* The round: its nodes, nodes[0] the leader's own exact one.  Before the next round's guesses are
   * made the same array still holds the last round's, which are then carried. */
  int round; /* rounds begun */
  int nodes;
  ps__node *node;  /* (window_max) */
  ps__node *fresh; /* (window_max) the next round's, while guesses still read the last one's */

  void **noise;    /* (window_max) z of step j is at [j % window_max]; NULL where c is all 0 */
  int *noise_step; /* (window_max) which step that is, -1 none */

  struct ps__guesser *guesser;
  ps_term *row_term; /* (2 history + 1) the terms of one row, for ps_leader_advance */
  double *row_weight;

  /* Report. */
  int64_t began_ns, finished_ns, asked_ns, submitted_ns, longest_ns;
  uint64_t bytes_sent;
  int answered, not_finite;
  int *evaluations, *accepted; /* (ranks), (steps) */
  double *drift;               /* (steps) */
  ps_record *timeline;
  int records, records_max;
  ps_failure *failure; /* (ranks) */
  int failures;
  char fallback[160];
};

/* A sweep of the run's backend, whose wait lets Ctrl-C through. */
static inline ps_status ps__sweep(const ps_leader *leader, const ps_sweep *sweep, ps_swept *swept)
{
  ps_wait wait = {0, leader->options.check, leader->options.check_ctx};
  return leader->backend->sweep(leader->backend, sweep, &wait, swept);
}

/* plan.c: which rank holds the k-th node of a window.  Writes rank and slot of every node of steps
 * first, first + 1, ... and returns how many there are: at most what the ranks alive can hold. */
int ps__plan(const ps_leader *leader, int first, ps__node *nodes);

/* guess.c: the points of nodes[1..count-1] from the trajectory, the carried nodes and the program,
 * all in one pass of the backend.  Nodes must have their point set. */
size_t ps__guesser_carve(ps_leader *leader, ps__arena *arena);
ps_status ps__guess(ps_leader *leader, const ps__node *nodes, int count);

/* links.c: the leader's side of the wire. */

/* Sends every rank its nodes of this round; one that cannot be reached is left out. */
ps_status ps__post_round(ps_leader *leader);
/* Takes in the replies; followers that fail, or at step 0 compute something else, are left out. */
ps_status ps__gather_round(ps_leader *leader);
/* Closes the link, voids the rank's nodes and writes the report line. */
ps_status ps__leave_out(ps_leader *leader, int rank, ps_status why, const char *text);
void ps__close_links(ps_leader *leader);

/* report.c */
size_t ps__report_carve(ps_leader *leader, ps__arena *arena);
int ps__report_record(ps_leader *leader, const ps__node *node, int64_t begin_ns, int64_t end_ns);

/* accept.c */

/* Measures x against the node's point and rebases its output; out and the histories as in ps_sweep.
 * *drift is in units of s_j, NaN where it cannot be told.  *finite: the output may be used. */
ps_status ps__measure(const ps_leader *leader, const ps__node *node, const void *x, void *out,
                      void *keep_x, void *keep_m, double *drift, bool *finite);
/* Whether the follower's latent and output at step 0 are the leader's, up to rounding. */
ps_status ps__canary(const ps_leader *leader, const ps__node *node, char *why, size_t room);
/* Whether a carried node's point and output are finite. */
bool ps__finite(const ps_leader *leader, const ps__node *node);

#endif
