/* pairs.h - two ranks over the nccl transport, on the stand-in libraries: a leader on device 0 in
 * the test's thread, a follower on device 1 in one of its own, with every fault that it may have.
 */
#ifndef PARASTEP_PAIRS_H
#define PARASTEP_PAIRS_H

#include <pthread.h>
#include <stdbool.h>

#include "fakes.h"
#include "parastep.h"
#include "parastep_backend.h"
#include "parastep_transport.h"

enum { PAIR_STEPS = 6, PAIR_SIZE = 40 };

extern const fake_api *pairs_fake;
extern const fake_nccl_api *pairs_nccl;
extern const ps_layout pairs_layout;

void pairs_begin(void);
void pairs_settle(void); /* waits for what is aborted */
void pairs_end(void);    /* then checks that nothing is left */

ps_wait pairs_within(int ms);
void pairs_sleep_ms(int ms);

typedef enum conduct {
  HONEST,
  RAISES,
  FALLS_SILENT,
  LEAVES,
  NOT_A_NUMBER,
  WRONG_DTYPE,
  CONDUCTS
} conduct;

/* The follower's process. */
typedef struct other {
  const unsigned char *id;
  conduct does;
  int at;                /* its work at which it does so */
  int runs, patience_ms; /* to connect */
  ps_pair *pair;
  pthread_t thread;
  ps_status connected, status;
  bool stop; /* changed atomically: who is silent may leave */
} other;

void other_start(other *self, const unsigned char *id, conduct does, int at, int runs,
                 int patience_ms);
void other_finish(other *self);

/* How the leader runs; zero is a sensible value but for the backend. */
typedef struct leading {
  const ps_backend *backend;
  ps_link *link; /* NULL: alone */
  double tolerance;
  int64_t deadline_ns;
  int (*check)(void *ctx);
  void *ctx;
  bool stops; /* the host leaves its loop, at the step `at` */
  int at;
} leading;

/* x at the end; the report is the leader's own, which is NULL where there came none into being. */
ps_status pairs_lead(const leading *how, float *x, ps_report *report, ps_leader **leader);

#endif
