/* parastep.h - the public C API: programs, leaders, followers, reports.
 *
 * A diffusion sampler calls its denoiser N times, one step after another.  parastep evaluates
 * several of these steps at once, one on each rank (reuse-then-predict, arXiv 2505.14741), and
 * checks every guess against the true trajectory before its output is used.
 *
 * Notation, here and in all files: call j of the host's loop asks for m_j = f(x_j, t_j), the guided
 * output at the true latent x_j.  A follower evaluates m^_j = f(x^_j, t_j) at a guess x^_j.  s_j is
 * the noise scale of step j, g_j the rebase slope, p the number of ranks, N the number of steps.
 *
 * Ownership: a pointer is borrowed for the call unless its comment says more.  Objects belong to
 * the caller that created them and are released by their own destroy function.  An object may be
 * used by one thread at a time; leader and followers of one run may live in different threads.
 */
#ifndef PARASTEP_H
#define PARASTEP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define PS_API
#else
#define PS_API __attribute__((visibility("default")))
#endif

/* ---- status ---------------------------------------------------------------------------------- */

/* Every fallible function returns 0 or one of these; ps_last_error() has the words. */
#define PS_STATUS_MAP(X)                                                                           \
  X(OK, 0, "ok")                                                                                   \
  X(NO_MEMORY, -1, "out of memory")                                                                \
  X(INVALID, -2, "invalid argument")                                                               \
  X(SHAPE, -3, "wrong shape")                                                                      \
  X(DTYPE, -4, "wrong dtype")                                                                      \
  X(DEVICE, -5, "wrong device")                                                                    \
  X(STATE, -6, "call out of order")                                                                \
  X(DEADLINE, -7, "deadline passed")                                                               \
  X(ABANDONED, -8, "the leader went on without this follower")                                     \
  X(LOST, -9, "the other end is gone")                                                             \
  X(FAILED, -10, "the follower's denoiser failed")                                                 \
  X(INTERRUPTED, -11, "interrupted")                                                               \
  X(PROTOCOL, -12, "a message that does not fit")                                                  \
  X(DIFFERS, -13, "the follower does not compute the leader's function")                           \
  X(NOT_FINITE, -14, "NaN or Inf")                                                                 \
  X(UNSUPPORTED, -15, "not supported")

typedef enum ps_status {
#define X(name, value, text) PS_##name = (value),
  PS_STATUS_MAP(X)
#undef X
} ps_status;

/* Short name ("DEADLINE") and fixed text of a status; never NULL. */
PS_API const char *ps_status_name(ps_status status);
PS_API const char *ps_status_text(ps_status status);

/* What went wrong last in this thread: what, value, rank.  Borrowed until this thread's next call.
 */
PS_API const char *ps_last_error(void);

PS_API const char *ps_version(void);

/* ---- memory ---------------------------------------------------------------------------------- */

/* All memory of the library comes from here.  Replace it before the first object is created; tests
 * use it to fail the n-th call. */
typedef struct ps_allocator {
  void *(*alloc)(void *ctx, size_t bytes); /* 64-byte aligned, or NULL */
  void (*free)(void *ctx, void *p);        /* p may be NULL */
  void *ctx;
} ps_allocator;

PS_API void ps_set_allocator(const ps_allocator *allocator); /* copied; NULL = the default */

/* ---- dtypes and layout ----------------------------------------------------------------------- */

typedef enum ps_dtype {
  PS_NONE = 0, /* as m's dtype: that of the leader's first output, at most 4 bytes or x's size */
  PS_F32 = 1,
  PS_F16 = 2,
  PS_BF16 = 3,
  PS_F64 = 4, /* accumulated in double, the others in float */
} ps_dtype;

PS_API size_t ps_dtype_size(ps_dtype dtype); /* bytes; 0 for PS_NONE or an unknown value */
PS_API const char *ps_dtype_name(ps_dtype dtype);

/* A latent is (items, size): drift is taken per item of the batch, its maximum decides. */
typedef struct ps_layout {
  size_t items; /* batch items, at least 1 */
  size_t size;  /* elements of one item, at least 1 */
  ps_dtype x;   /* how the host stores latents; guesses travel so */
  ps_dtype m;   /* how the denoiser's outputs are stored; they travel so */
} ps_layout;

/* ---- sampling program ------------------------------------------------------------------------ */

/* x_{j+1} = sum_{k<H} ( a[j][k] x_{j-k} + b[j][k] m_{j-k} ) + c[j] z_j.  Used for guesses alone,
 * except in ps_leader_advance, where it is the sampler.  Immutable once made; counted references.
 */
typedef struct ps_program ps_program;

/* a, b: (steps, history) row-major; c, s, g, alpha: (steps) or NULL for 0, 1, 0 and what s tells:
 * 1 - s where s never exceeds 1 and rows only move x along m, sqrt(1 - s^2) where they do more than
 * that, 1 where s exceeds 1 or is not given.  Copied.
 * PS_INVALID where steps or history is below 1, a coefficient is not finite, s is not above 0,
 * alpha is below 0, or a row of the first steps reaches back before step 0 with a coefficient other
 * than 0. */
PS_API ps_status ps_program_create(int steps, int history, const double *a, const double *b,
                                   const double *c, const double *s, const double *g,
                                   const double *alpha, ps_program **program);
PS_API ps_program *ps_program_retain(ps_program *program);
PS_API void ps_program_release(ps_program *program); /* NULL is fine */

PS_API int ps_program_steps(const ps_program *program);
PS_API int ps_program_history(const ps_program *program);

/* One table of the program: 'a' and 'b' are (steps, history), 'c', 's', 'g' and 'l' (alpha) are
 * (steps); NULL for any other letter.  Borrowed until release. */
PS_API const double *ps_program_table(const ps_program *program, char which);

/* Whether rounds may be strided: no noise is drawn, and every noise level has one evaluation. */
PS_API int ps_program_strides(const ps_program *program);

/* What the denoiser's output is, with x = alpha x0 + s eps. */
typedef enum ps_prediction {
  PS_PREDICT_NOISE = 0,    /* eps */
  PS_PREDICT_FLOW = 1,     /* eps - x0 */
  PS_PREDICT_VELOCITY = 2, /* alpha eps - s x0, with alpha^2 + s^2 = 1 */
  PS_PREDICT_SAMPLE = 3,   /* x0 */
} ps_prediction;

/* The usual solvers.  alpha, s: (steps + 1) signal and noise scales, the last pair where sampling
 * ends (s may be 0 there alone).  sigma: (steps + 1) noise levels, likewise. */
PS_API ps_status ps_program_ddim(int steps, const double *alpha, const double *s,
                                 ps_prediction prediction, ps_program **program);
PS_API ps_status ps_program_dpmpp_2m(int steps, const double *alpha, const double *s,
                                     ps_prediction prediction, ps_program **program);
PS_API ps_status ps_program_euler(int steps, const double *sigma, ps_program **program);
PS_API ps_status ps_program_flow_euler(int steps, const double *sigma, ps_program **program);
/* Adams-Bashforth of order 1 to 4 on the same levels as ps_program_euler, with the true weights of
 * an uneven grid; the first steps use the orders that their history allows. */
PS_API ps_status ps_program_adams_bashforth(int steps, const double *sigma, int order,
                                            ps_program **program);

/* ---- waiting --------------------------------------------------------------------------------- */

/* Every wait is cut into slices of 50 ms at most; between them check (if any) is called, and a
 * value other than 0 ends the wait with PS_INTERRUPTED. */
typedef struct ps_wait {
  int64_t deadline_ns; /* ps_now_ns() at which to give up; 0 = never */
  int (*check)(void *ctx);
  void *ctx;
} ps_wait;

PS_API int64_t ps_now_ns(void); /* monotonic clock */

/* ---- leader ---------------------------------------------------------------------------------- */

typedef struct ps_link ps_link;       /* parastep_transport.h */
typedef struct ps_backend ps_backend; /* parastep_backend.h */
typedef struct ps_leader ps_leader;

enum { PS_SLOTS_MAX = 16, PS_RANKS_MAX = 256 };

typedef enum ps_policy {
  PS_VERIFIED = 0, /* what the drift comes to decides; carry and rebase */
  PS_PAPER = 1,    /* the published rule, arXiv 2505.14741; everything accepted */
} ps_policy;

typedef struct ps_options {
  ps_policy policy;
  double tolerance; /* what the answers of a round may add to the last latent's error, as estimated,
                       in units of about .2 of its scale; 0 = exact, INFINITY = no limit */
  int order;        /* extrapolation of outputs in guesses: 0 reuse, 1 slope, damped */
  int warmup;       /* PS_PAPER: steps evaluated one by one first, at least 1 */
  int max_stride;   /* steps from node to node at most: 1 = some rank evaluates every step; 0 = as
                       many as the tolerance allows.  Where rounds cannot be strided it is 1 */
  int64_t
      deadline_ns; /* for a follower's reply, from the leader's own submit; 0 = the default rule */
  int raise_on_loss;       /* a lost follower ends the run with an error instead of a report line */
  int (*check)(void *ctx); /* called between the slices of the leader's waits, see ps_wait */
  void *check_ctx;
} ps_options;

PS_API void ps_options_init(
    ps_options *options); /* verified, .04, order 1, warm-up 5, default rule */

/* What ps_leader_create refuses of options, in the same words, without a run. */
PS_API ps_status ps_options_check(const ps_options *options);

/* links: (ranks) leader ends, link r to rank r; the leader owns them from now on, also when
 * creation fails.  links[0] is a lane: a follower on the leader's own device, for hosts that cannot
 * evaluate steps ahead of their loop; NULL where the host itself evaluates what PS_AHEAD asks for.
 * slots: (ranks) evaluations a round a rank can hold, or NULL for 1 each.  program is retained;
 * layout and options are copied. */
PS_API ps_status ps_leader_create(ps_program *program, const ps_layout *layout,
                                  const ps_options *options, const ps_backend *backend,
                                  ps_link *const *links, int ranks, const int *slots,
                                  ps_leader **leader);

typedef enum ps_verdict {
  PS_EVALUATE = 0, /* run the denoiser at x_j and ps_leader_submit; followers are already at work */
  PS_ANSWER = 1,   /* m_out holds m_j; no model run */
  PS_AHEAD = 2,    /* evaluate what ps_leader_work gives, submit NULL, and ask for step j again; or
                      evaluate x_j and submit that, as after PS_EVALUATE.  Never with max_stride 1 or
                      with a lane */
} ps_verdict;

/* The host's loop is at step j with the true latent x, (items, size) of layout.x.  Steps come in
 * order, each once.  m_out: (items, size) of layout.m, its contents unspecified after PS_EVALUATE;
 * NULL = the host evaluates in any case; no guesses go out, except at step 0.  Beyond N:
 * PS_EVALUATE without guesses. */
PS_API ps_status ps_leader_ask(ps_leader *leader, int step, const void *x, void *m_out,
                               ps_verdict *verdict);

/* The latent of the present step turns out to be x (the host edited it after the ask).  Answered:
 * m_out is measured and rebased again at x, *spent tells what the drift there comes to; above the
 * tolerance ask would not have answered, and the caller decides. To be evaluated: x takes the place
 * of the one asked with, m_out may be NULL. */
PS_API ps_status ps_leader_amend(ps_leader *leader, const void *x, void *m_out, double *spent);

/* What a rank evaluates in this round. */
typedef struct ps_work {
  int count;                 /* 0 = the run is done, leave */
  int step[PS_SLOTS_MAX];    /* steps, ascending */
  void *point[PS_SLOTS_MAX]; /* (items, size) of layout.x; a follower may write the point it really
                                evaluated in its place.  Borrowed until submit */
  void
      *output[PS_SLOTS_MAX]; /* (items, size), room for output_bytes, to be written before submit */
  size_t point_bytes;
  size_t output_bytes; /* room at each output */
  int round;           /* of the run; who evaluates in it may meet and do so in one batch: */
  int followers;       /* ranks that its work was sent to */
  int exact;           /* whether the host evaluates x_j itself meanwhile */
} ps_work;

/* The leader's own guesses beside x_j (count is 0 with one slot).  Valid from PS_EVALUATE or
 * PS_AHEAD to submit. */
PS_API ps_status ps_leader_work(ps_leader *leader, ps_work *work);

/* The leader's output at x_j, (items, size) of m_dtype; then gathers the followers'.  m is NULL
 * where the work of PS_AHEAD was evaluated.  began_ns: when the evaluation began, 0 = at the ask.
 * PS_LOST only with raise_on_loss. */
PS_API ps_status ps_leader_submit(ps_leader *leader, const void *m, ps_dtype m_dtype,
                                  int64_t began_ns);

/* Noise z_step, (items, size) of layout.x, for guesses that pass that step; copied.  Steps the next
 * window does not reach are refused (PS_INVALID): ask ps_leader_horizon. */
PS_API ps_status ps_leader_noise(ps_leader *leader, int step, const void *z);
PS_API int ps_leader_horizon(const ps_leader *leader); /* guesses may pass steps below this one */

/* The step the last submit or ask answered, taken by the program: x_{j+1}.  z: noise of the step or
 * NULL.  For callers whose sampler is the program itself. */
PS_API ps_status ps_leader_advance(ps_leader *leader, const void *z, void *x_next);

/* From here on every step is evaluated by the host alone; the first reason stays in the report. */
PS_API ps_status ps_leader_stop(ps_leader *leader, const char *reason);

/* Leaves rank out from now on, as a failed follower is; the reason goes into the report. */
PS_API ps_status ps_leader_leave_out(ps_leader *leader, int rank, const char *reason);

PS_API ps_status
ps_leader_finish(ps_leader *leader);              /* tells all followers to leave; twice is fine */
PS_API void ps_leader_destroy(ps_leader *leader); /* finishes first; NULL is fine */

/* ---- follower -------------------------------------------------------------------------------- */

typedef struct ps_follower ps_follower;

/* link is owned from now on, also when creation fails. */
PS_API ps_status ps_follower_create(const ps_layout *layout, ps_link *link, ps_follower **follower);

/* Waits for the next work; work->count is 0 when the run is over. */
PS_API ps_status ps_follower_next(ps_follower *follower, const ps_wait *wait, ps_work *work);

/* Outputs are in work->output, written as m_dtype.  moved: not 0 where a point was edited.
 * began_ns: when the evaluation began, 0 = when next returned.  PS_ABANDONED where the leader went
 * on. */
PS_API ps_status ps_follower_submit(ps_follower *follower, ps_dtype m_dtype, int moved,
                                    int64_t began_ns);

/* In place of submit: this rank cannot evaluate; the leader goes on without it.  With no work at
 * hand it waits for the next message and answers that. */
PS_API ps_status ps_follower_fail(ps_follower *follower, const char *why);
PS_API void ps_follower_destroy(ps_follower *follower); /* NULL is fine */

/* ---- both, for callers with a C callback ----------------------------------------------------- */

/* Writes m_j (layout.m) for the latent x (layout.x); a value other than 0 is a failure. */
typedef int (*ps_denoiser)(void *ctx, int rank, int step, const void *x, void *m);

/* Runs the program from x (in place) to its end and finishes the run.  noise: (steps, items, size)
 * of layout.x or NULL.  Outputs are layout.m, x's dtype where that is open. */
PS_API ps_status ps_sample(ps_leader *leader, ps_denoiser denoiser, void *ctx, const void *noise,
                           void *x);
/* Serves one follower until the run is over; outputs are of dtype. */
PS_API ps_status ps_serve(ps_follower *follower, int rank, ps_denoiser denoiser, void *ctx,
                          const ps_wait *wait, ps_dtype dtype);

/* ---- report ---------------------------------------------------------------------------------- */

typedef struct ps_record { /* one evaluation */
  int rank, step, round;
  int accepted;             /* its output became an answer */
  int64_t begin_ns, end_ns; /* since the run began; where a follower's clock is not the leader's,
                               begin is when its work was sent */
} ps_record;

typedef struct ps_failure {
  int rank, step; /* rank that was left out, step it was to evaluate */
  ps_status status;
  char text[160];
} ps_failure;

typedef struct ps_report {
  int steps, ranks;
  int rounds;             /* evaluations of the leader: wall time in forwards */
  int answered;           /* steps answered without a model run of the leader at x_j */
  int interpolated;       /* those of them answered between two nodes */
  int not_finite;         /* outputs of the leader with NaN or Inf */
  int64_t seconds_ns;     /* since the run began, or until it finished */
  uint64_t bytes_sent;    /* leader to followers and back */
  const int *evaluations; /* (ranks) */
  const int *accepted;    /* (counted) steps taken in each round, as far as they are counted */
  int counted;
  const double *drift;       /* (steps) of the guess for each step; NaN where there was none */
  const double *cost;        /* (steps) of the tolerance, spent by a drift of 1 */
  const ps_record *timeline; /* (records) */
  int records;
  const ps_failure *failures; /* (failed) */
  int failed;
  const char *fallback; /* why speculation ended, or NULL */
} ps_report;

/* Pointers are borrowed until the leader's next call. */
PS_API ps_status ps_leader_report(const ps_leader *leader, ps_report *report);

#ifdef __cplusplus
}
#endif
#endif
