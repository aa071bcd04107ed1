/* stage.h - a run to test with: a host's loop in this thread, followers in threads of their own.
 *
 * A test sets the fields of a stage, opens it, lets the host run and looks at what came of it.  The
 * host shares nothing with the library: it samples by the program's rows in its own arithmetic, so
 * that what it computes alone is the picture every run is held to.
 */
#ifndef PARASTEP_STAGE_H
#define PARASTEP_STAGE_H

#include <pthread.h>
#include <stdbool.h>

#include "parastep.h"
#include "parastep_backend.h"
#include "parastep_transport.h"

enum { STAGE_RANKS = 8, STAGE_SEEN = 512 };

typedef struct stage stage;

/* One rank of the run; a follower's thread owns its own, the host's thread that of rank 0. */
typedef struct stage_rank {
  stage *on;
  int rank;
  pthread_t thread;
  ps_follower *follower; /* NULL for rank 0 */
  ps_status status;      /* what serve returned; read after stage_end */
  int seen;              /* evaluations so far */
  int step[STAGE_SEEN];
  void *point[STAGE_SEEN]; /* (items, size) of layout.x, copies of what was evaluated */
} stage_rank;

struct stage {
  /* The setting: to be filled in before stage_open; zero is a sensible value but for the program.
   */
  ps_program *program; /* borrowed */
  ps_layout layout;
  ps_options options;
  int ranks;
  int slots[STAGE_RANKS];   /* 0 = 1 */
  bool lane;                /* rank 0 has a follower too */
  const void *noise;        /* (steps, items, size) of layout.x, or NULL */
  bool keeps_noise_to_self; /* the host draws noise that it tells the library nothing of */
  /* m at element i of x, at a step; NULL = stage_f. */
  double (*f)(const stage_rank *self, int step, double x, size_t i);
  /* An evaluation of a follower, and whether it moved the point; NULL = stage_evaluate. */
  bool (*evaluate)(stage_rank *self, int step, void *x, void *m);
  /* What a follower does; NULL = stage_serve. */
  ps_status (*serve)(stage_rank *self);
  /* The leader's end of a link of the test's own, with nobody behind it; NULL = see below. */
  ps_link *(*link)(stage *on, int rank);
  bool by_host; /* followers at the other end of a link that the host carries; else threads */
  /* With by_host: delivers a follower's message to the leader; NULL = as it is. */
  ps_status (*wire)(stage_rank *self, ps_inbox *to, unsigned char *message, size_t bytes);
  /* Called by the host before it asks for a step, and with the answer or output before it is used.
   */
  void (*before)(stage *on, int step, void *x);
  void (*after)(stage *on, int step, const void *x, void *m, ps_verdict verdict);
  void *ctx; /* of the test */

  /* The run. */
  ps_leader *leader;
  stage_rank rank[STAGE_RANKS];
  stage_rank lane_rank; /* rank 0's follower */
  ps_status failure;    /* the leader's first status other than PS_OK; the host stops there */
  bool ended;
  int verdicts[3]; /* how often it was told to evaluate, answered, and told to evaluate ahead */
};

/* Sets a stage for a run of items x size elements of x and m. */
void stage_set(stage *on, ps_program *program, int ranks, size_t items, size_t size, ps_dtype x,
               ps_dtype m);
/* Creates links, followers with their threads, and the leader, and checks that all goes well. */
void stage_open(stage *on);
/* The host's loop over all steps, from x in place: with the leader, or alone and in sequence. */
void stage_run(stage *on, void *x);
void stage_plain(stage *on, void *x);
/* Finishes the run and waits for all threads; the report can be read until stage_close. */
void stage_end(stage *on);
void stage_close(stage *on);
ps_report stage_report(const stage *on);

/* All from stage_open to stage_end, the leader without a failure; x NULL: of a latent that nobody
 * looks at afterwards. */
ps_report stage_whole(stage *on, void *x);
/* The same, and x is what the host alone makes of it, bit for bit. */
ps_report stage_exact(stage *on, uint64_t seed);
/* One call of a host that evaluates its own step unless it is answered; m NULL: it has no room for
 * an answer. */
ps_verdict stage_call(stage *on, int step, void *x, void *m);

/* A follower's life, one evaluation of it, and the function that all ranks evaluate. */
ps_status stage_serve(stage_rank *self);
void stage_evaluate(stage_rank *self, int step, const void *x, void *m);
double stage_f(const stage_rank *self, int step, double x, size_t i);

/* Both ends of a link whose carriers deliver at once, as ps_threads_open does. */
ps_status stage_host_open(const ps_layout *layout, int slots, ps_link **leader_end,
                          ps_link **follower_end);

/* A layout for tests of links, and a message of one slot each way. */
extern const ps_layout stage_small;
extern const ps_header stage_hello, stage_output;

size_t stage_elements(const stage *on);
size_t stage_x_bytes(const stage *on);
size_t stage_m_bytes(const stage *on);
void *stage_latent(const stage *on, uint64_t seed); /* to be freed; normal enough numbers */
void *stage_copy(const void *from, size_t bytes);   /* to be freed */
double *stage_noise(const stage *on);               /* to be freed; for all steps, in double */
/* The last point that a follower evaluated at a step, or NULL; no evaluation may be under way. */
const void *stage_guess(const stage *on, int step);

/* Elements of any dtype as double; storing rounds to nearest even. */
double stage_load(const void *p, ps_dtype dtype, size_t i);
void stage_store(void *p, ps_dtype dtype, size_t i, double value);
double stage_random(uint64_t *state); /* uniform in (-1, 1) */

/* Programs, to be released. */
ps_program *stage_euler(int steps);          /* sigma 10 to 0, evenly spaced in its logarithm */
ps_program *stage_multistep(int steps);      /* Adams-Bashforth of order 3 on the same levels */
ps_program *stage_ancestral(int steps);      /* Euler with noise drawn at every step */
void stage_levels(int steps, double *sigma); /* (steps + 1) the levels of these */

#endif
