/* nccl.c - the transport for ranks on CUDA devices of two processes: a run's messages over a pair.
 *
 * leader.c and follower.c use an end through ps_link_ops.  All work is on the pair's own stream, in
 * order with the backend's by events, and messages of a run have one size each way: header, then
 * points, or outputs and points, in one block of the device.  A receive occupies part of the device
 * until its message is there, so none is put into the stream before somebody waits for it.
 */
#include <string.h>

#include "transport/pair.h"
#include "transport/tray.h"

typedef enum end_state {
  IDLE,    /* nothing is on its way */
  OWED,    /* leader: work is out, its reply is to come */
  AWAITED, /* the receive of a message is in the stream */
  TAKEN,   /* follower: it is at work */
} end_state;

/* The block: work (header, points), then reply (header, outputs, points).  Headers go through the
 * host: sent is what this end says, got what it hears. */
typedef struct end {
  ps_link base;
  ps__mortal mortal;
  ps_pair *pair;
  ps__cuda_rank *rank; /* retained: whose work the messages are in order with */
  end_state state;
  bool done;   /* DONE was said, or heard */
  size_t head; /* bytes of a header, and room to the first slot */
  ps__slots slots;
  CUdeviceptr block;
  ps_header *sent, *got; /* pinned */
  CUevent arrived;       /* got is filled */
  CUevent last;          /* behind all work of this end */
} end;

static end *end_of(ps_link *link)
{
  return (end *)link;
}

static size_t work_bytes(const end *own)
{
  return own->head + ps__points_bytes(&own->slots);
}

static size_t reply_bytes(const end *own)
{
  return own->head + ps__outputs_bytes(&own->slots) + ps__points_bytes(&own->slots);
}

static CUdeviceptr points_of(const end *own)
{
  return own->block + own->head;
}

static CUdeviceptr reply_of(const end *own)
{
  return own->block + work_bytes(own);
}

static CUdeviceptr outputs_of(const end *own)
{
  return reply_of(own) + own->head;
}

/* The points of a reply that says MOVED. */
static CUdeviceptr moved_of(const end *own)
{
  return outputs_of(own) + ps__outputs_bytes(&own->slots);
}

static void *link_point(ps_link *link, int slot)
{
  const end *own = end_of(link);
  return (void *)(uintptr_t)(points_of(own) + (size_t)slot * own->slots.point);
}

static void *link_output(ps_link *link, int slot)
{
  const end *own = end_of(link);
  return (void *)(uintptr_t)(outputs_of(own) + (size_t)slot * own->slots.output);
}

static bool is_moved(const ps_header *message)
{
  return ps__has_outputs(message) && ps__has_points(message);
}

/* Behind all work of the backend: the points if moved, and the header. */
static ps_status prepare(end *own, CUdeviceptr to, const ps_header *message)
{
  const ps__cuda_rank *rank = own->rank;
  CUstream stream = own->pair->stream;
  ps__scope scope;
  ps_status status = ps__pair_ready(own->pair);
  if (status == PS_OK) {
    status = ps__device_enter(rank->device, &scope);
  }
  if (status != PS_OK) {
    return status;
  }
  *own->sent = *message;
  CUresult result = ps__cuda.stream_wait(stream, rank->done, 0);
  if (result == PS__CUDA_OK && is_moved(message)) {
    result = ps__cuda.copy(moved_of(own), points_of(own), ps__points_bytes(&own->slots), stream);
  }
  if (result == PS__CUDA_OK) {
    result = ps__cuda.copy_from_host(to, own->sent, sizeof *own->sent, stream);
  }
  ps__device_leave(&scope);
  return ps__cuda_check(rank->device, result, "preparing a message");
}

static ps_status say(end *own, CUdeviceptr at, size_t bytes, const ps_header *message)
{
  if (ps__pair_is_lost(own->pair)) {
    return ps__pair_lose(own->pair, own->pair->why);
  }
  ps_status status = prepare(own, at, message);
  return status == PS_OK ? ps__pair_transfer(own->pair, true, (void *)(uintptr_t)at, bytes)
                         : status;
}

/* Puts the receive of the next message into the stream. */
static ps_status expect(end *own, CUdeviceptr at, size_t bytes)
{
  const ps__cuda_rank *rank = own->rank;
  ps__scope scope;
  ps_status status = ps__pair_ready(own->pair);
  if (status == PS_OK) {
    status = ps__device_enter(rank->device, &scope);
  }
  if (status == PS_OK) { /* what the backend still reads of the last message stays until then */
    CUresult result = ps__cuda.stream_wait(own->pair->stream, rank->done, 0);
    ps__device_leave(&scope);
    status = ps__cuda_check(rank->device, result, "waiting for the backend");
  }
  status =
      status == PS_OK ? ps__pair_transfer(own->pair, false, (void *)(uintptr_t)at, bytes) : status;
  if (status == PS_OK && (status = ps__device_enter(rank->device, &scope)) == PS_OK) {
    CUresult result = ps__cuda.copy_to_host(own->got, at, sizeof *own->got, own->pair->stream);
    ps__device_leave(&scope);
    status = ps__cuda_check(rank->device, result, "reading a header");
  }
  status = status == PS_OK ? ps__pair_mark(own->pair, own->arrived) : status;
  own->state = status == PS_OK ? AWAITED : own->state;
  return status;
}

/* What arrived is in order before further work of the backend; moved points take their place. */
static ps_status take_over(end *own, const ps_header *message)
{
  ps__cuda_rank *rank = own->rank;
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  CUresult result = ps__cuda.stream_wait(rank->stream, own->arrived, 0);
  ps__device_leave(&scope);
  status = ps__cuda_check(rank->device, result, "waiting for a message");
  if (status == PS_OK && is_moved(message)) {
    status = rank->base.copy(&rank->base, (void *)(uintptr_t)points_of(own),
                             (void *)(uintptr_t)moved_of(own), ps__points_bytes(&own->slots));
  }
  return status;
}

static ps_status hear(end *own, const ps_wait *wait, ps_header *message)
{
  ps_status status = ps__pair_wait(own->pair, own->arrived, wait);
  if (status == PS_OK) {
    *message = *own->got;
    own->state = IDLE;
    status = take_over(own, message);
  }
  return status;
}

/* ---- leader ---------------------------------------------------------------------------------- */

static ps_status leader_post(ps_link *link, const ps_header *message)
{
  end *own = end_of(link);
  if (own->state != IDLE || own->done) {
    return ps__fail(PS_STATE, "a message before the reply to the last one");
  }
  ps_status status = say(own, own->block, work_bytes(own), message);
  own->done = status == PS_OK && message->kind == PS_MSG_DONE;
  own->state = status == PS_OK && message->kind == PS_MSG_WORK ? OWED : IDLE;
  return status;
}

static ps_status leader_collect(ps_link *link, const ps_wait *wait, ps_header *reply)
{
  end *own = end_of(link);
  if (own->state != OWED) {
    return ps__fail(PS_STATE, "collecting the reply to no message");
  }
  ps_status status = expect(own, reply_of(own), reply_bytes(own));
  return status == PS_OK ? hear(own, wait, reply) : status;
}

/* ---- follower -------------------------------------------------------------------------------- */

static ps_status follower_take(ps_link *link, const ps_wait *wait, ps_header *message)
{
  end *own = end_of(link);
  ps_status status = PS_OK;
  if (own->done) {
    *message = ps__done_message();
    return PS_OK;
  }
  if (own->state == TAKEN) {
    return ps__fail(PS_STATE, "taking a message before the reply to the last one");
  }
  if (ps__pair_is_lost(own->pair)) {
    return ps__pair_lose(own->pair, own->pair->why);
  }
  if (own->state == IDLE) {
    status = expect(own, own->block, work_bytes(own));
  }
  if (status == PS_OK) {
    status = hear(own, wait, message);
  }
  if (status == PS_OK) {
    own->done = message->kind == PS_MSG_DONE;
    own->state = message->kind == PS_MSG_WORK ? TAKEN : IDLE;
  }
  return status;
}

static ps_status follower_reply(ps_link *link, const ps_header *reply)
{
  end *own = end_of(link);
  if (own->state != TAKEN) {
    return ps__fail(PS_STATE, "a reply to no message");
  }
  own->state = IDLE;
  ps_status status = say(own, reply_of(own), reply_bytes(own), reply);
  return status == PS_LOST ? ps__fail(PS_ABANDONED, "the leader went on without this follower")
                           : status;
}

/* ---- life ------------------------------------------------------------------------------------ */

static end *dead_end(const ps__mortal *mortal)
{
  return (end *)((char *)mortal - offsetof(end, mortal));
}

static bool has_ended(const ps__mortal *mortal)
{
  const end *own = dead_end(mortal);
  ps__pair_expire(own->pair);
  return ps__event_reached(own->rank->device, own->last);
}

static void destroy(ps__mortal *mortal)
{
  end *own = dead_end(mortal);
  ps__device *device = own->rank->device;
  if (own->block != 0) {
    ps__device_free_after(device, own->rank->done);
    ps__device_free_after(device, own->last);
    ps__device_free(device, own->block);
  }
  ps__pinned_free(device, own->sent, 2 * sizeof(ps_header));
  ps__event_free(device, own->arrived);
  ps__event_free(device, own->last);
  ps__pair_release(own->pair);
  own->rank->base.release(&own->rank->base);
  ps__free(own);
}

/* Where the run did not end as it should, something may be on its way that nobody takes: only an
 * end of the communicator ends that. */
static void link_close(ps_link *link)
{
  end *own = end_of(link);
  ps__pair_ready(own->pair);
  if (own->pair->role == PS_LEADS && own->state == IDLE && !own->done) {
    const ps_header done = ps__done_message();
    own->done = leader_post(link, &done) == PS_OK;
  }
  if (!own->done || own->state != IDLE || ps__pair_is_lost(own->pair)) {
    ps__pair_lose(own->pair, "the run ended before its last message");
  }
  ps__pair_mark(own->pair, own->last);
  __atomic_store_n(&own->pair->linked, false, __ATOMIC_RELEASE);
  ps__bury(&own->mortal);
}

static const ps_link_ops leader_ops = {
    .transport = "nccl",
    .point = link_point,
    .output = link_output,
    .post = leader_post,
    .collect = leader_collect,
    .close = link_close,
};

static const ps_link_ops follower_ops = {
    .transport = "nccl",
    .point = link_point,
    .output = link_output,
    .take = follower_take,
    .reply = follower_reply,
    .close = link_close,
};

static ps_status furnish(end *own)
{
  ps__device *device = own->rank->device;
  void *headers = NULL;
  ps_status status = ps__event_new(device, &own->arrived);
  status = status == PS_OK ? ps__event_new(device, &own->last) : status;
  if (status == PS_OK) {
    status = ps__device_alloc(device, work_bytes(own) + reply_bytes(own), &own->block);
  }
  if (status == PS_OK) {
    status = ps__pinned_alloc(device, 2 * sizeof(ps_header), &headers);
  }
  own->sent = headers;
  own->got = own->sent != NULL ? own->sent + 1 : NULL;
  return status;
}

ps_status ps_nccl_open(ps_pair *pair, const ps_backend *backend, const ps_layout *layout, int slots,
                       ps_link **link)
{
  ps__slots found;
  *link = NULL;
  ps__bury(NULL);
  ps_status status = ps__slots_of(layout, slots, &found);
  if (status == PS_OK &&
      (strcmp(backend->name, "cuda") != 0 || backend->device != pair->rank->base.device)) {
    status = ps__fail(PS_DEVICE, "a pair of cuda:%d and a run on %s:%d", pair->rank->base.device,
                      backend->name, backend->device);
  }
  if (status == PS_OK && __atomic_load_n(&pair->linked, __ATOMIC_ACQUIRE)) {
    status = ps__fail(PS_STATE, "the pair has a link of another run");
  }
  end *own = status == PS_OK ? ps__alloc(sizeof *own) : NULL;
  if (own == NULL) {
    return status != PS_OK ? status : PS_NO_MEMORY;
  }
  own->base =
      (ps_link){.ops = pair->role == PS_LEADS ? &leader_ops : &follower_ops, .slots = slots};
  own->mortal = (ps__mortal){.has_ended = has_ended, .destroy = destroy};
  own->pair = pair;
  own->slots = found;
  own->head = ps__vector_bytes(sizeof(ps_header));
  own->rank = ps__cuda_rank_of(backend);
  backend->retain(backend);
  ps__pair_retain(pair);
  status = furnish(own);
  if (status != PS_OK) {
    destroy(&own->mortal);
    return status;
  }
  __atomic_store_n(&pair->linked, true, __ATOMIC_RELEASE);
  *link = &own->base;
  return PS_OK;
}
