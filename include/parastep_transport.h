/* parastep_transport.h - how the leader and one follower exchange: what the core asks of a link.
 *
 * A link joins the leader and one follower, point to point; losing it loses that follower alone.
 * Each end holds room for the points and outputs of its slots, so that guesses are written where
 * they are sent from and outputs are read where they arrive.  The protocol is strict: the leader
 * posts one message, the follower sends exactly one reply, then the next message may come.
 */
#ifndef PARASTEP_TRANSPORT_H
#define PARASTEP_TRANSPORT_H

#include "parastep.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PS_MAGIC = 0x50535431, PS_WIRE_VERSION = 1 };

typedef enum ps_kind {
  PS_MSG_WORK = 1,   /* leader: evaluate count steps at the points */
  PS_MSG_DONE = 2,   /* leader: the run is over */
  PS_MSG_OUTPUT = 3, /* follower: outputs of all steps of the work */
  PS_MSG_FAILED = 4, /* follower: text says why it cannot */
} ps_kind;

enum {
  PS_FLAG_MOVED = 1, /* reply: points were edited, they come back beside the outputs */
  PS_FLAG_EXACT = 2, /* work: the host evaluates x_j itself meanwhile */
};

/* The same size for every message of a run, followed on the wire by the payload. */
typedef struct ps_header {
  uint32_t magic, version;
  uint64_t run; /* one number a run: messages of an aborted run are told apart */
  uint32_t kind, flags;
  int32_t round, count;
  int32_t step[PS_SLOTS_MAX];
  uint32_t dtype;     /* of the payload: layout.x in WORK, the outputs' own in OUTPUT */
  uint32_t followers; /* WORK: how many the leader sends one to in this round */
  uint64_t bytes;     /* payload bytes of one slot */
  int64_t began_ns;   /* OUTPUT: when the evaluation began, on the follower's clock */
  int64_t ended_ns;   /* OUTPUT: when it ended, on the same clock */
  char text[160];     /* FAILED */
} ps_header;

typedef struct ps_link_ops {
  const char *transport;

  /* Memory of slot on this end; constant for the link's life, owned by it. */
  void *(*point)(ps_link *link, int slot);
  void *(*output)(ps_link *link, int slot);

  /* Leader.  post never waits for the follower.  collect waits for the reply: PS_DEADLINE or
   * PS_INTERRUPTED where none came.  Both: PS_LOST where the follower is known to be gone,
   * PS_FAILED where it has said why. */
  ps_status (*post)(ps_link *link, const ps_header *message);
  ps_status (*collect)(ps_link *link, const ps_wait *wait, ps_header *reply);

  /* Follower.  take waits for the next message; reply gives PS_ABANDONED where the leader went on.
   */
  ps_status (*take)(ps_link *link, const ps_wait *wait, ps_header *message);
  ps_status (*reply)(ps_link *link, const ps_header *reply);

  /* This end lets go; the other learns of it.  Memory lives until both have. */
  void (*close)(ps_link *link);
} ps_link_ops;

struct ps_link { /* transports put this first in their own struct */
  const ps_link_ops *ops;
  int slots;
  int same_clock; /* both ends read one monotonic clock: began_ns and ended_ns are comparable */
};

/* Ranks are threads of one process, each with a backend; those of one device share its memory and
 * copy nothing.  Writes the leader end and the follower end of a link with room for slots
 * evaluations of layout.  The backends are retained. */
PS_API ps_status ps_threads_open_on(const ps_layout *layout, int slots, const ps_backend *leader,
                                    const ps_backend *follower, ps_link **leader_end,
                                    ps_link **follower_end);

/* The same for ranks on the CPU. */
PS_API ps_status ps_threads_open(const ps_layout *layout, int slots, ps_link **leader_end,
                                 ps_link **follower_end);

/* ---- messages carried by the host ------------------------------------------------------------ */

/* The other end is in another process, reached by whatever the host has: torch.distributed, MPI, a
 * pipe.  A message is its header, the payload of every slot (points in WORK, outputs in OUTPUT)
 * and, where the reply says MOVED, the points of every slot; no bytes at all say that the sending
 * end has let go. */
typedef struct ps_part {
  const void *data;
  size_t bytes;
} ps_part;

typedef struct ps_carrier {
  /* Takes one message to the other end, whole and in order.  parts are borrowed for the call, which
   * must not wait for the other end; anything but PS_OK loses it. */
  ps_status (*send)(void *ctx, const ps_part *parts, int count);
  void (*release)(void *ctx); /* after the last send; called once, also when opening fails */
  void *ctx;
} ps_carrier;

/* Where the host hands in what arrives for one end of a link, from any thread. */
typedef struct ps_inbox ps_inbox;

typedef enum ps_role { PS_LEADS = 1, PS_FOLLOWS = 2 } ps_role;

/* One end of a link and its inbox; both are the caller's, and either may be released first.
 * same_clock: the other process reads the same monotonic clock.  backend: where the end's points
 * and outputs live; retained. */
PS_API ps_status ps_host_open(const ps_layout *layout, int slots, ps_role role, int same_clock,
                              const ps_backend *backend, const ps_carrier *carrier, ps_link **end,
                              ps_inbox **inbox);

/* A message of the other end; nothing about it is trusted.  PS_PROTOCOL: it does not fit, and the
 * link is lost.  What comes after this end has let go is dropped. */
PS_API ps_status ps_inbox_deliver(ps_inbox *inbox, const void *message, size_t bytes);

/* Nothing more will come: the other process is gone. */
PS_API void ps_inbox_lost(ps_inbox *inbox, const char *why);
/* The same, where the follower has said so itself and not by a message of the run: its failure is
 * PS_FAILED in the report, not PS_LOST. */
PS_API void ps_inbox_failed(ps_inbox *inbox, const char *why);
PS_API void ps_inbox_release(ps_inbox *inbox); /* NULL is fine */

/* ---- NCCL ------------------------------------------------------------------------------------ */

/* A communicator of two ranks on CUDA devices of two processes: the leader and one follower.  It is
 * kept from run to run; losing one loses that follower alone.  Used by one thread at a time. */
typedef struct ps_pair ps_pair;

enum { PS_NCCL_ID_BYTES = 128 };

/* What both ends need to find each other; made by one of them, which has to live until they have,
 * and taken to the other by whatever started the processes.  PS_UNSUPPORTED where there is no NCCL.
 */
PS_API ps_status ps_nccl_id(unsigned char *id);

/* Waits for the other end until the wait's deadline.  backend: of the CUDA device that the points
 * and outputs of this end's runs live on; retained. */
PS_API ps_status ps_nccl_connect(const unsigned char *id, ps_role role, const ps_backend *backend,
                                 const ps_wait *wait, ps_pair **pair);

/* One end of a link for a run; a pair has one at a time.  Of a pair that is lost, too: whatever is
 * sent over it says so.  backend: of the run, on the pair's device; retained. */
PS_API ps_status ps_nccl_open(ps_pair *pair, const ps_backend *backend, const ps_layout *layout,
                              int slots, ps_link **end);

/* The other process is gone, which NCCL itself may never notice; from any thread. */
PS_API void ps_nccl_lost(ps_pair *pair, const char *why);
/* The same, where the follower has said so itself: as `ps_inbox_failed`. */
PS_API void ps_nccl_failed(ps_pair *pair, const char *why);
/* Whether the pair can carry another run; from any thread. */
PS_API int ps_nccl_alive(const ps_pair *pair);
/* The communicator ends with the last of the pair and its links, from any thread; NULL is fine. */
PS_API void ps_nccl_close(ps_pair *pair);

/* Version of the NCCL that is found, as 22907; 0 with the reason in ps_last_error. */
PS_API int ps_nccl_version(void);

/* Comma-separated names of the transports of this build. */
PS_API const char *ps_transports(void);

#ifdef __cplusplus
}
#endif
#endif
