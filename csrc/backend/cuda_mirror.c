/* cuda_mirror.c - bytes that two ranks share, where at least one is on a CUDA device.
 *
 * Transports open it through ps_backend.mirror.  Ranks of one device share a block.  Ranks of two
 * have a block each, and copies go directly where the devices reach each other, else through pinned
 * host memory; a rank on a device and the host have a block each as well.  Copies run on streams of
 * the mirror's own, so that the leader's forward runs beside them.
 *
 * Order of events, for what a side sends: everything its backend was given (done), then the copy on
 * its stream, then sent; the other side's backend waits for sent.  A block is freed behind the done
 * and the sent events of both sides, and each side has its own wait put in place when it closes,
 * while its stream is still known to live.
 */
#include "backend/cuda.h"

typedef struct side {
  ps__cuda_rank *rank; /* retained; NULL: the host */
  CUdeviceptr block;   /* 0: that of the other side, or the host's */
  CUstream stream;     /* for what this side sends; NULL where nothing is copied by it */
  CUevent ready;       /* staged: this side's bytes are in the pinned block */
  CUevent sent;
} side;

typedef struct cuda_mirror {
  ps_mirror base;
  ps__mortal mortal;
  size_t bytes;
  int sides;    /* that have not let go; changed atomically */
  void *pinned; /* between two devices out of reach, or the host's own block */
  side side[2];
} cuda_mirror;

static cuda_mirror *mirror_of(ps_mirror *mirror)
{
  return (cuda_mirror *)mirror;
}

static ps_side other(ps_side which)
{
  return which == PS_NEAR ? PS_FAR : PS_NEAR;
}

/* The device whose stream carries what a side sends: its own, or the only one there is. */
static ps__device *carrier_of(const cuda_mirror *m, ps_side which)
{
  const side *own = &m->side[which];
  return own->rank != NULL ? own->rank->device : m->side[other(which)].rank->device;
}

static bool is_shared(const cuda_mirror *m)
{
  return m->base.memory[PS_NEAR] == m->base.memory[PS_FAR];
}

static bool is_staged(const cuda_mirror *m)
{
  return m->pinned != NULL && m->side[PS_NEAR].rank != NULL && m->side[PS_FAR].rank != NULL;
}

/* The device on which a side's sent event is recorded: staged bytes arrive by the other's stream.
 */
static ps__device *sender_of(const cuda_mirror *m, ps_side which)
{
  return is_staged(m) ? m->side[other(which)].rank->device : carrier_of(m, which);
}

/* ---- the copies ------------------------------------------------------------------------------ */

/* Out of this side's block into the pinned one; finish_staged, on the other device, brings it on.
 */
static CUresult copy_staged(cuda_mirror *m, ps_side from, size_t offset, size_t bytes)
{
  side *own = &m->side[from];
  char *middle = (char *)m->pinned + offset;
  CUresult result = ps__cuda.copy_to_host(middle, own->block + offset, bytes, own->stream);
  return result == PS__CUDA_OK ? ps__cuda.event_record(own->ready, own->stream) : result;
}

static ps_status finish_staged(cuda_mirror *m, ps_side from, size_t offset, size_t bytes)
{
  side *own = &m->side[from], *peer = &m->side[other(from)];
  const ps__device *there = peer->rank->device;
  ps__scope scope;
  ps_status status = ps__device_enter(there, &scope);
  if (status != PS_OK) {
    return status;
  }
  CUresult result = ps__cuda.stream_wait(peer->stream, own->ready, 0);
  if (result == PS__CUDA_OK) {
    result = ps__cuda.copy_from_host(peer->block + offset, (char *)m->pinned + offset, bytes,
                                     peer->stream);
  }
  if (result == PS__CUDA_OK) {
    result = ps__cuda.event_record(own->sent, peer->stream);
  }
  ps__device_leave(&scope);
  return ps__cuda_check(there, result, "copying from the host to another rank's device");
}

static CUresult copy_whole(cuda_mirror *m, ps_side from, size_t offset, size_t bytes)
{
  side *own = &m->side[from], *peer = &m->side[other(from)];
  void *host = (char *)m->pinned + offset;
  CUresult result;
  if (own->rank == NULL) {
    result = ps__cuda.copy_from_host(peer->block + offset, host, bytes, own->stream);
  } else if (peer->rank == NULL) {
    result = ps__cuda.copy_to_host(host, own->block + offset, bytes, own->stream);
  } else {
    result = ps__cuda.copy(peer->block + offset, own->block + offset, bytes, own->stream);
  }
  return result == PS__CUDA_OK ? ps__cuda.event_record(own->sent, own->stream) : result;
}

/* ---- the operations -------------------------------------------------------------------------- */

static CUresult start(cuda_mirror *m, ps_side from, size_t offset, size_t bytes)
{
  side *own = &m->side[from];
  CUresult result = PS__CUDA_OK;
  if (is_shared(m)) {
    return ps__cuda.event_record(own->sent, own->rank->stream);
  }
  if (own->rank != NULL) {
    result = ps__cuda.stream_wait(own->stream, own->rank->done, 0);
  }
  if (result != PS__CUDA_OK) {
    return result;
  }
  return is_staged(m) ? copy_staged(m, from, offset, bytes) : copy_whole(m, from, offset, bytes);
}

static ps_status mirror_send(ps_mirror *mirror, ps_side from, size_t offset, size_t bytes)
{
  cuda_mirror *m = mirror_of(mirror);
  const ps__device *device = carrier_of(m, from);
  ps__scope scope;
  ps_status status = ps__device_enter(device, &scope);
  if (status == PS_OK) {
    status = ps__cuda_check(device, start(m, from, offset, bytes), "copying to another rank");
    ps__device_leave(&scope);
  }
  return status == PS_OK && is_staged(m) ? finish_staged(m, from, offset, bytes) : status;
}

/* The host's own reads and writes are not in any stream: it waits with settle. */
static ps_status mirror_receive(ps_mirror *mirror, ps_side to)
{
  cuda_mirror *m = mirror_of(mirror);
  ps__cuda_rank *rank = m->side[to].rank;
  ps__scope scope;
  ps_status status = rank != NULL ? ps__device_enter(rank->device, &scope) : PS_OK;
  if (status == PS_OK && rank != NULL) {
    status =
        ps__cuda_check(rank->device, ps__cuda.stream_wait(rank->stream, m->side[other(to)].sent, 0),
                       "waiting for another rank's copy");
    ps__device_leave(&scope);
  }
  return status;
}

static ps_status mirror_settle(ps_mirror *mirror, ps_side from, const ps_wait *wait)
{
  cuda_mirror *m = mirror_of(mirror);
  return ps__device_wait(sender_of(m, from), m->side[from].sent, wait);
}

/* ---- life ------------------------------------------------------------------------------------ */

/* What ends a block's use on this side is put before its freeing, on whichever devices hold one. */
static void free_behind(cuda_mirror *m, ps_side which)
{
  const side *own = &m->side[which];
  for (int k = 0; k < 2; ++k) {
    if (m->side[k].block != 0) {
      const ps__device *device = m->side[k].rank->device;
      ps__device_free_after(device, own->rank != NULL ? own->rank->done : NULL);
      ps__device_free_after(device, own->sent);
    }
  }
}

static cuda_mirror *dead_mirror(const ps__mortal *mortal)
{
  return (cuda_mirror *)((char *)mortal - offsetof(cuda_mirror, mortal));
}

static void destroy(ps__mortal *mortal)
{
  cuda_mirror *m = dead_mirror(mortal);
  ps__pinned_free(carrier_of(m, PS_NEAR), m->pinned, m->bytes);
  for (int k = 0; k < 2; ++k) {
    side *own = &m->side[k];
    if (own->block != 0) {
      ps__device_free(own->rank->device, own->block);
    }
    ps__stream_free(carrier_of(m, (ps_side)k), own->stream);
    ps__event_free(carrier_of(m, (ps_side)k), own->ready);
    ps__event_free(sender_of(m, (ps_side)k), own->sent);
  }
  for (int k = 0; k < 2; ++k) {
    if (m->side[k].rank != NULL) {
      m->side[k].rank->base.release(&m->side[k].rank->base);
    }
  }
  ps__free(m);
}

static bool has_ended(const ps__mortal *mortal)
{
  const cuda_mirror *m = dead_mirror(mortal);
  for (int k = 0; k < 2 && m->pinned != NULL; ++k) {
    CUevent sent = m->side[k].sent;
    if (sent != NULL && !ps__event_reached(sender_of(m, (ps_side)k), sent)) {
      return false;
    }
  }
  return true;
}

static void mirror_close(ps_mirror *mirror, ps_side which)
{
  cuda_mirror *m = mirror_of(mirror);
  free_behind(m, which);
  if (__atomic_sub_fetch(&m->sides, 1, __ATOMIC_ACQ_REL) == 0) {
    ps__bury(&m->mortal);
  }
}

/* ---- opening --------------------------------------------------------------------------------- */

static ps_status open_block(side *own, size_t bytes)
{
  return own->rank != NULL ? ps__device_alloc(own->rank->device, bytes, &own->block) : PS_OK;
}

/* Blocks, and the streams of those who send: what the kind of mirror needs. */
static ps_status furnish(cuda_mirror *m)
{
  side *near = &m->side[PS_NEAR], *far = &m->side[PS_FAR];
  bool shared = far->rank != NULL && far->rank->device == near->rank->device;
  bool direct = far->rank != NULL && !shared &&
                ps__device_reaches(near->rank->device, far->rank->device) &&
                ps__device_reaches(far->rank->device, near->rank->device);
  ps_status status = open_block(near, m->bytes);
  if (status == PS_OK && !shared) {
    status = open_block(far, m->bytes);
  }
  if (status == PS_OK && !shared && !direct) {
    status = ps__pinned_alloc(near->rank->device, m->bytes, &m->pinned);
  }
  for (int k = 0; k < 2 && status == PS_OK && !shared; ++k) {
    status = ps__stream_new(carrier_of(m, (ps_side)k), &m->side[k].stream);
  }
  for (int k = 0; k < 2 && status == PS_OK; ++k) {
    status = ps__event_new(sender_of(m, (ps_side)k), &m->side[k].sent);
    if (status == PS_OK && is_staged(m)) {
      status = ps__event_new(carrier_of(m, (ps_side)k), &m->side[k].ready);
    }
  }
  return status;
}

static void set_memory(cuda_mirror *m)
{
  for (int k = 0; k < 2; ++k) {
    const side *own = &m->side[k];
    CUdeviceptr block = own->block != 0 ? own->block : m->side[PS_NEAR].block;
    m->base.memory[k] = own->rank != NULL ? (unsigned char *)(uintptr_t)block : m->pinned;
  }
}

static side side_of(const ps_backend *backend, bool on_device)
{
  if (!on_device) {
    return (side){.rank = NULL};
  }
  backend->retain(backend);
  return (side){.rank = ps__cuda_rank_of(backend)};
}

ps_status ps__cuda_mirror(const ps_backend *near, const ps_backend *far, size_t bytes,
                          ps_mirror **mirror)
{
  static const ps_mirror_ops ops = {mirror_send, mirror_receive, mirror_settle, mirror_close};
  bool on_device = far->mirror == near->mirror;
  *mirror = NULL;
  ps__bury(NULL);
  if (!on_device && far != ps_backend_find("cpu")) {
    return ps__fail(PS_DEVICE, "a rank on cuda:%d and one on %s: they share no memory",
                    near->device, far->name);
  }
  cuda_mirror *m = ps__alloc(sizeof *m);
  if (m == NULL) {
    return PS_NO_MEMORY;
  }
  m->base.ops = &ops;
  m->mortal = (ps__mortal){.has_ended = has_ended, .destroy = destroy};
  m->bytes = bytes;
  m->sides = 2;
  m->side[PS_NEAR] = side_of(near, true);
  m->side[PS_FAR] = side_of(far, on_device);
  ps_status status = furnish(m);
  if (status != PS_OK) {
    destroy(&m->mortal);
    return status;
  }
  set_memory(m);
  *mirror = &m->base;
  return PS_OK;
}
