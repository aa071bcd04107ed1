/* internal.h - what the core's files share and nobody else sees.
 *
 * A leader is one struct with one arena, and its parts are files: pace.c what answers cost and how
 * far apart a round's steps lie, plan.c who evaluates which, guess.c at which latent, links.c the
 * wire, between.c the answers between them, accept.c how far off each is, slope.c along which slope
 * it is rebased.  leader.c drives them:
 * ask measures and answers, or begins a round (pace, plan, guess, post); submit gathers.
 */
#ifndef PS_INTERNAL_H
#define PS_INTERNAL_H

#include "core/base.h"
#include "parastep_backend.h"
#include "parastep_transport.h"

/* ---- program.c ------------------------------------------------------------------------------- */

struct ps_program {
  int references; /* changed atomically: a leader's thread may release the last one */
  int steps, history;
  double *a, *b;     /* (steps, history) */
  double *c, *s, *g; /* (steps) */
  double *alpha;     /* (steps) */
  bool draws;        /* some c is not 0 */
};

/* ---- nodes: the evaluations of a round ------------------------------------------------------- */

typedef enum ps__node_state {
  PS__VOID,    /* no output, and none will come */
  PS__PENDING, /* being evaluated */
  PS__READY,   /* output holds f(point, t_step) */
} ps__node_state;

/* The host's own evaluation at x_j has neither point nor output: it is not a guess. */
typedef struct ps__node {
  int step, rank, slot;
  ps__node_state state;
  int record;   /* index in the timeline, -1 before the evaluation is back */
  void *point;  /* (items, size) x dtype; the rank's end of the link owns it */
  void *output; /* (items, size) m dtype; likewise */
  bool kept;    /* of the round before, in one that the host evaluates alone */
} ps__node;

/* A node that was evaluated or accepted: (step, m_step), what later guesses and answers between
 * nodes are made from. */
typedef struct ps__anchor {
  int step;
  void *m;
} ps__anchor;

/* The last evaluation of a step that a round evaluates again: copies, since its own overwrite it.
 */
typedef struct ps__pair {
  int step;
  void *x, *m;
} ps__pair;

enum {
  PS__DEGREE = 3,               /* of the interpolation between nodes */
  PS__ANCHORS = PS__DEGREE + 3, /* anchors that a round begins with at most */
  PS__SPAN_MAX = 1024,          /* steps from the first node of a round to its last */
};

/* ---- pace: what answers cost, how far apart nodes lie ---------------------------------------- */

typedef struct ps__pace {
  bool strided;                      /* nodes may lie further apart than one step */
  double *clock;                     /* (steps + 1), ascending */
  double *drift_cost;                /* (steps) tolerance spent by a drift of 1, in units of s */
  double *gap_cost;                  /* (steps) tolerance spent by a gap of 1, see ps__afford */
  bool insist;                       /* the host evaluates the first step of the next round */
  int tried;                         /* step that was guessed and not evaluated, -1 = none */
  double tried_cost;                 /* tolerance that an answer from there would have spent */
  double stride;                     /* of the round at hand, in the clock's units */
  int newest;                        /* step of the newest anchor, -1 = none */
  int first;                         /* frontier where the round at hand began */
  int between;                       /* steps that it has answered between nodes */
  double drifted, gaps;              /* tolerance that it has spent on drift, on gaps */
  double closed, hole, hole_squares; /* of gaps, squares up to the newest node; sums after it */
  double led;                        /* the part of drifted up to the first node */
  double missed; /* gaps, with the step measured last whether it was accepted or not */
} ps__pace;

/* ---- leader ---------------------------------------------------------------------------------- */

typedef struct ps__rank {
  ps_link *link; /* NULL for a leader without a lane, and for ranks left out */
  int slots;
  int spoken; /* slots whose output holds their last evaluation (the published rule reuses it) */
  int64_t posted_ns; /* when its work of this round was sent; 0 = none was */
  void **point;      /* (slots); a leader without a lane has its own in its arena */
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
  bool lane;      /* rank 0 has a link: what lies ahead on the leader's device is evaluated there */
  ps__rank *rank; /* (ranks); 0 is the leader */

  /* The true trajectory, as far back as rows and extrapolation reach: step j is at [j % depth]. */
  int depth;
  void **x, **m;

  /* The round: its nodes, ascending, the host's own exact one first if there is one.  Before the
   * next round's guesses are made the same array still holds the last round's, which are then
   * carried. */
  int round;    /* rounds begun */
  int foreseen; /* step of the node that was looked ahead at last */
  int nodes;
  ps__node *node;  /* (window_max + 1) */
  ps__node *fresh; /* (window_max + 1) the next round's, while guesses still read the last one's */

  ps__pace pace;
  double *slope;      /* (steps) of rebasing: the program's g, or what was seen since */
  bool *seen;         /* (steps) which were */
  ps__pair *pair;     /* (window_max) */
  int pairs;          /* of the round at hand */
  int anchors;        /* made so far; the newest is at [(anchors - 1) % anchors_max] */
  int old_anchors;    /* those made before the round at hand */
  int anchors_max;    /* PS__ANCHORS of the past and a round's own */
  ps__anchor *anchor; /* m is a copy where rounds are strided, else in the trajectory */
  void *between_x;    /* strided: the guess of a step between nodes, and its output by  */
  void *between_m[2]; /* interpolation, of PS__DEGREE and of one degree less */

  void **noise;    /* (window_max) z of step j is at [j % window_max]; NULL where c is all 0 */
  int *noise_step; /* (window_max) which step that is, -1 none */

  struct ps__guesser *guesser;
  ps_term *row_term; /* (2 history + 1) the terms of one row, for ps_leader_advance */
  double *row_weight;

  /* Report. */
  int64_t began_ns, finished_ns, asked_ns, submitted_ns, longest_ns;
  uint64_t bytes_sent;
  int answered, interpolated, not_finite;
  int counted, rounds_max;     /* rounds in accepted, and how many it has room for */
  int *evaluations, *accepted; /* (ranks), (rounds_max) */
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

/* pace.c */
double ps__noise_of(const ps_program *program, int step); /* as a part of the latent's scale */
void ps__pace_begin(ps_leader *leader);                   /* once, when the clock has its room */
/* The stride of the round about to begin; *exact: the host has to evaluate its first step. */
ps_status ps__pace_round(ps_leader *leader, bool *exact);
/* Whether the step at hand may be answered: drift in units of s; gap, what an interpolated m misses
 * in its units, NULL at a node.  leads: the step is not behind the first node of the round, whose
 * evaluation nothing would be gained by asking for again.  If so, it is charged to the round. */
bool ps__afford(ps_leader *leader, double drift, const double *gap, bool leads);
/* Whether a drift that lies ahead may be come to; leads as above, of the node where it lies. */
bool ps__may_come_to(const ps_leader *leader, int step, double drift, bool leads);
/* Whether a drift is more than what leads a round may come to, whatever the round has spent. */
bool ps__is_far(const ps_leader *leader, int step, double drift);

/* plan.c: writes the nodes of a round that begins at the present step, and returns how many there
 * are: at most what the ranks alive can hold.  exact: the host evaluates the present step. */
int ps__plan(ps_leader *leader, bool exact, ps__node *nodes);

/* guess.c: the points of nodes from the trajectory, the anchors, the carried nodes and the program,
 * all in one pass of the backend. */
size_t ps__guesser_carve(ps_leader *leader, ps__arena *arena);
ps_status ps__guess(ps_leader *leader, const ps__node *nodes, int count);
/* The guess of a step between the nodes of the round at hand, (items, size) of layout.x. */
ps_status ps__guess_between(ps_leader *leader, int step, void *point);
/* Foresight: where a host that is at x will be.  From x on, with every step's answer told in turn,
 * outputs and weights rebased to where the host will be, up to the one before the point wanted. */
void ps__foresee_from(ps_leader *leader, const void *x);
void ps__foresee_answer(ps_leader *leader, int j, const void *const *outputs, const double *weight,
                        int count);
ps_status ps__foresee_point(ps_leader *leader, int step, void *point);

/* between.c: answers between nodes. */
bool ps__is_between(const ps_leader *leader, int step);
/* m of a step between nodes, interpolated at its guess, both left in the leader's scratch; *gap is
 * what it misses, in m's units. */
ps_status ps__interpolate(ps_leader *leader, int step, double *gap);
/* The same for the newest anchor but one, *step, from the anchors around it, the first of them at
 * *oldest; leader has DEGREE + 2. */
ps_status ps__leave_one_out(ps_leader *leader, int *step, int *oldest, double *gap);
/* Where a host that is at x will be at a step ahead, the steps until there answered between nodes;
 * (items, size) of layout.x. */
ps_status ps__foresee(ps_leader *leader, const void *x, int step, void *point);

/* slope.c */
bool ps__slope_learns(const ps_leader *leader); /* whether anything is kept at all */
void ps__slope_begin(ps_leader *leader);        /* once, when slopes have their room */
/* Before a round's points are written: keeps what it evaluates again, still in leader->node. */
ps_status ps__slope_keep(ps_leader *leader, const ps__node *fresh, int count);
/* When its outputs are there. */
ps_status ps__slope_learn(ps_leader *leader);

/* alone.c: a device that nobody evaluates beside. */

/* Where the host is to evaluate alone, adds to the round what lies ahead of it already; returns how
 * many nodes there are then. */
int ps__keep_ahead(ps_leader *leader, int count);
/* Before anything was saved: guesses where the next step would be evaluated, without evaluating. */
ps_status ps__try_ahead(ps_leader *leader, int count);
/* At the ask of that step: what the guess was off by. */
ps_status ps__see_tried(ps_leader *leader, const void *x);

/* links.c: the leader's side of the wire. */

/* Sends every rank its nodes of this round; one that cannot be reached is left out. */
ps_status ps__post_round(ps_leader *leader);
/* Who evaluates in this round. */
void ps__tell_company(const ps_leader *leader, ps_work *work);
/* Takes in the replies; followers that fail, or at step 0 compute something else, are left out. */
ps_status ps__gather_round(ps_leader *leader);
/* Closes the link, voids the rank's nodes and writes the report line. */
ps_status ps__leave_out(ps_leader *leader, int rank, ps_status why, const char *text);
void ps__close_links(ps_leader *leader);

/* report.c */
size_t ps__report_carve(ps_leader *leader, ps__arena *arena);
int ps__report_record(ps_leader *leader, const ps__node *node, int64_t begin_ns, int64_t end_ns);

/* accept.c */

/* Measures x against the point where the output m of a step was evaluated and rebases m; out and
 * the histories as in ps_sweep.  *drift is in units of s_j, NaN where it cannot be told.  *finite:
 * the output may be used. */
typedef struct ps__measured {
  double drift;
  bool finite;
} ps__measured;
ps_status ps__measure(const ps_leader *leader, int step, const void *point, const void *m,
                      const void *x, void *out, void *keep_x, void *keep_m, ps__measured *found);
/* Rounding of a value stored as dtype, relative to it. */
double ps__rounding(ps_dtype dtype);
/* Whether the follower's latent and output at step 0 are the leader's, up to rounding. */
ps_status ps__canary(const ps_leader *leader, const ps__node *node, char *why, size_t room);
/* Whether a point, and the output m evaluated there (NULL: whatever it is), are finite. */
bool ps__finite(const ps_leader *leader, const void *point, const void *m);

#endif
