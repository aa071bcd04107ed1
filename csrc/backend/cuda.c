/* cuda.c - the backend of a rank on a CUDA device: its stream, memory and life, and who makes its
 * passes.
 *
 * The core calls it through ps_backend, the binding opens it and says which stream is the host's.
 * Work is in order of that stream; an event behind the newest work orders a change of stream, the
 * mirrors' own streams and the freeing of memory behind it.  No call waits for the device but sweep
 * and settle, and none takes memory but the one that is named so.
 */
#include <stdio.h>

#include "backend/check.h"
#include "backend/cuda.h"

/* ---- passes ---------------------------------------------------------------------------------- */

static ps_status lincomb(const ps_backend *backend, size_t n, int outs, int terms,
                         const double *weight, const ps_term *in, void *const *out,
                         ps_dtype out_dtype)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  bool in_place;
  ps_status status = ps__check_lincomb(n, outs, terms, weight, in, out, out_dtype, &in_place);
  if (status != PS_OK) {
    return status;
  }
  if (rank->device->compiled) {
    return ps__kernel_lincomb(rank, n, outs, terms, weight, in, out, out_dtype, in_place);
  }
  return (rank->blas != NULL ? ps__blas_lincomb : ps__plain_lincomb)(rank, n, outs, terms, weight,
                                                                     in, out, out_dtype);
}

static ps_status sweep(const ps_backend *backend, const ps_sweep *s, const ps_wait *wait,
                       ps_swept *swept)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  ps_status status = ps__check_sweep(s);
  *swept = (ps_swept){0, 0, 0, 0};
  if (status != PS_OK) {
    return status;
  }
  return (rank->device->compiled ? ps__kernel_sweep
          : rank->blas != NULL   ? ps__blas_sweep
                                 : ps__plain_sweep)(rank, s, wait, swept);
}

/* ---- copies, waits, memory ------------------------------------------------------------------- */

static ps_status copy(const ps_backend *backend, void *to, const void *from, size_t bytes)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  ps__scope scope;
  ps_status status = ps__check_copy(to, from, bytes);
  if (status != PS_OK || bytes == 0 || to == from) {
    return status;
  }
  status = ps__device_enter(rank->device, &scope);
  if (status == PS_OK) {
    status = ps__cuda_copy(rank, ps__address(to), ps__address(from), bytes);
    status = status == PS_OK ? ps__cuda_mark(rank) : status;
    ps__device_leave(&scope);
  }
  return status;
}

static ps_status settle(const ps_backend *backend, const ps_wait *wait)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  return ps__device_wait(rank->device, rank->done, wait);
}

static void *alloc(const ps_backend *backend, size_t bytes)
{
  CUdeviceptr p;
  return ps__device_alloc(ps__cuda_rank_of(backend)->device, bytes, &p) == PS_OK
             ? (void *)(uintptr_t)p
             : NULL;
}

static void release_memory(const ps_backend *backend, void *p)
{
  const ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  ps__device_free_after(rank->device, rank->done);
  ps__device_free(rank->device, ps__address(p));
}

/* ---- life ------------------------------------------------------------------------------------ */

static void retain(const ps_backend *backend)
{
  __atomic_add_fetch(&ps__cuda_rank_of(backend)->references, 1, __ATOMIC_RELAXED);
}

static ps__cuda_rank *dead_rank(const ps__mortal *mortal)
{
  return (ps__cuda_rank *)((char *)mortal - offsetof(ps__cuda_rank, mortal));
}

static bool has_ended(const ps__mortal *mortal)
{
  const ps__cuda_rank *rank = dead_rank(mortal);
  return ps__event_reached(rank->device, rank->done);
}

/* The event is given back last: what is freed here waits for it. */
static void destroy(ps__mortal *mortal)
{
  ps__cuda_rank *rank = dead_rank(mortal);
  if (rank->done != NULL) {
    ps__device_free_after(rank->device, rank->done);
  }
  ps__device_free(rank->device, ps__address(rank->part));
  ps__device_free(rank->device, rank->scratch);
  ps__blas_free(rank->device, rank->blas);
  ps__pinned_free(rank->device, rank->result, sizeof *rank->result);
  ps__pinned_free(rank->device, rank->staged, rank->staged_bytes);
  ps__event_free(rank->device, rank->done);
  ps__free(rank);
}

static void release(const ps_backend *backend)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  if (__atomic_sub_fetch(&rank->references, 1, __ATOMIC_ACQ_REL) == 0) {
    ps__bury(&rank->mortal); /* an interrupted sweep may be about to write its result */
  }
}

static const ps_backend cuda_backend = {
    .name = "cuda",
    .retain = retain,
    .release = release,
    .alloc = alloc,
    .free = release_memory,
    .mirror = ps__cuda_mirror,
    .lincomb = lincomb,
    .sweep = sweep,
    .copy = copy,
    .settle = settle,
};

static ps_status furnish(ps__cuda_rank *rank)
{
  CUdeviceptr part = 0;
  void *result = NULL;
  ps_status status = ps__event_new(rank->device, &rank->done);
  if (status == PS_OK) {
    status = ps__device_alloc(rank->device, (PS__PARTS_MAX + 1) * sizeof(ps__part), &part);
    rank->part = (ps__part *)(uintptr_t)part;
  }
  if (status == PS_OK) {
    status = ps__pinned_alloc(rank->device, sizeof(ps__sweep_result), &result);
    rank->result = result;
  }
  if (status == PS_OK && !rank->device->compiled) {
    rank->blas = ps__blas_new(rank->device);
  }
  return status;
}

ps_status ps_cuda_open(int ordinal, const ps_backend **backend)
{
  ps__device *device;
  ps__cuda_rank *rank = NULL;
  ps_status status = ps__device_open(ordinal, &device);
  *backend = NULL;
  if (status == PS_OK) {
    ps__bury(NULL);
    rank = ps__alloc(sizeof *rank);
    status = rank != NULL ? PS_OK : PS_NO_MEMORY;
  }
  if (status != PS_OK) {
    return status;
  }
  rank->base = cuda_backend;
  rank->base.device = ordinal;
  rank->mortal = (ps__mortal){.has_ended = has_ended, .destroy = destroy};
  rank->references = 1;
  rank->device = device;
  rank->stream = PS__CUDA_DEFAULT_STREAM;
  status = furnish(rank);
  if (status != PS_OK) {
    destroy(&rank->mortal);
    return status;
  }
  *backend = &rank->base;
  return PS_OK;
}

/* A capture would record our events and waits into the host's graph, or fail for them. */
static ps_status check_capture(const ps__cuda_rank *rank, CUstream stream)
{
  CUstreamCaptureStatus capturing = 0;
  ps_status status = ps__cuda_check(rank->device, ps__cuda.stream_is_capturing(stream, &capturing),
                                    "looking at the host's stream");
  if (status == PS_OK && capturing != 0) {
    status = ps__fail(PS_STATE,
                      "cuda:%d: a CUDA graph is being captured on the current stream; "
                      "capture the model's forward alone",
                      rank->device->ordinal);
  }
  return status;
}

ps_status ps_cuda_use_stream(const ps_backend *backend, void *stream)
{
  ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  CUstream given = stream != NULL ? stream : PS__CUDA_DEFAULT_STREAM;
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  status = check_capture(rank, given);
  if (status == PS_OK && given != rank->stream) {
    status = ps__cuda_check(rank->device, ps__cuda.stream_wait(given, rank->done, 0),
                            "changing to another stream");
    rank->stream = status == PS_OK ? given : rank->stream;
  }
  ps__device_leave(&scope);
  return status;
}

void ps_cuda_give_back(const ps_backend *backend, void *p, void *stream)
{
  const ps__cuda_rank *rank = ps__cuda_rank_of(backend);
  CUevent event = NULL;
  ps__scope scope;
  if (ps__event_new(rank->device, &event) == PS_OK &&
      ps__device_enter(rank->device, &scope) == PS_OK) {
    ps__cuda.event_record(event, stream != NULL ? stream : PS__CUDA_DEFAULT_STREAM);
    ps__device_leave(&scope);
  }
  ps__device_free_after(rank->device, event);
  release_memory(backend, p);
  ps__event_free(rank->device, event);
}

/* ---- what there is --------------------------------------------------------------------------- */

ps_status ps_cuda_count(int *count)
{
  return ps__device_count(count);
}

/* How passes are made: on the devices that are open, or as this build is made. */
static void describe_passes(char *text, size_t room)
{
  int version = ps__blas_version();
  const char *kernels = ps__kernel_image() == NULL   ? "built without kernels: "
                        : ps__device_lacks_kernels() ? "no kernels of this build fit: "
                                                     : "kernels of this build";
  if (ps__kernel_image() != NULL && !ps__device_lacks_kernels()) {
    snprintf(text, room, "%s", kernels);
  } else if (version > 0) {
    snprintf(text, room, "%scuBLAS %d.%d", kernels, version / 100, version % 100);
  } else {
    snprintf(text, room, "%spasses go through the host, as there is no cuBLAS", kernels);
  }
}

void ps_cuda_describe(char *text, size_t room)
{
  int count;
  char passes[128];
  if (ps__device_count(&count) != PS_OK) {
    snprintf(text, room, "not found: %s", ps_last_error());
  } else if (count == 0) {
    snprintf(text, room, "a driver, but no device");
  } else {
    describe_passes(passes, sizeof passes);
    snprintf(text, room, "%d device%s, %s", count, count == 1 ? "" : "s", passes);
  }
}
