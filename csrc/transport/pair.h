/* pair.h - a communicator of two ranks, between pair.c, which makes it, and nccl.c, which sends a
 * run's messages over it.
 */
#ifndef PS_PAIR_H
#define PS_PAIR_H

#include "backend/cuda.h"
#include "parastep_transport.h"
#include "transport/nccl_api.h"

struct ps_pair {
  int references; /* the caller's, and that of a link; changed atomically */
  ps_role role;
  ps__cuda_rank *rank; /* retained */
  CUstream stream;
  ncclComm_t comm;   /* NULL once it is aborted */
  bool pending;      /* a send is on its way into the stream, where nothing else may go meanwhile */
  bool linked;       /* changed atomically */
  int64_t closed_ns; /* when its owner let go of it, or 0; changed atomically */
  int lost;          /* changed atomically; how and why are written before it */
  ps_status how;     /* PS_LOST, or PS_FAILED where the other end said so itself */
  char why[160];
};

void ps__pair_retain(ps_pair *pair);
void ps__pair_release(ps_pair *pair);
/* What is still under way a while after its owner let go of the pair is taken by nobody: ends it.
 */
void ps__pair_expire(ps_pair *pair);

bool ps__pair_is_lost(const ps_pair *pair);
/* Gives the communicator up; PS_LOST or PS_FAILED, with the first reason there was. */
ps_status ps__pair_lose(ps_pair *pair, const char *why);

/* Before anything else goes into the pair's stream: its last send has. */
ps_status ps__pair_ready(ps_pair *pair);
/* A message into the pair's stream; never waits for the other end, nor, where it is sent, for
 * NCCL's own threads: those of several pairs work at a time. */
ps_status ps__pair_transfer(ps_pair *pair, bool send, void *p, size_t bytes);
/* Puts the event behind all work of the pair. */
ps_status ps__pair_mark(ps_pair *pair, CUevent event);
/* Until the event, the pair's loss, or what the caller's wait (or NULL) says. */
ps_status ps__pair_wait(ps_pair *pair, CUevent event, const ps_wait *wait);

#endif
