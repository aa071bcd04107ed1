/* cuda_rank.c - what the passes and copies of a CUDA rank are made with: the mark behind its work,
 * and room on the way that grows when first needed.
 *
 * Called by cuda.c and by the files of its passes (cuda_kernels.c, cuda_cublas.c, cuda_plain.c).
 */
#include "backend/cuda.h"

ps_status ps__cuda_mark(ps__cuda_rank *rank)
{
  return ps__cuda_check(rank->device, ps__cuda.event_record(rank->done, rank->stream),
                        "an event behind its work");
}

ps_status ps__cuda_copy(ps__cuda_rank *rank, CUdeviceptr to, CUdeviceptr from, size_t bytes)
{
  return to == from ? PS_OK
                    : ps__cuda_check(rank->device, ps__cuda.copy(to, from, bytes, rank->stream),
                                     "copying");
}

ps_status ps__cuda_scratch(ps__cuda_rank *rank, size_t bytes)
{
  ps_status status = PS_OK;
  if (rank->scratch_bytes < bytes) {
    ps__device_free_after(rank->device, rank->done);
    ps__device_free(rank->device, rank->scratch);
    rank->scratch_bytes = 0;
    status = ps__device_alloc(rank->device, bytes, &rank->scratch);
    rank->scratch_bytes = status == PS_OK ? bytes : 0;
  }
  return status;
}

ps_status ps__cuda_staged(ps__cuda_rank *rank, size_t bytes)
{
  void *p;
  if (rank->staged_bytes >= bytes) {
    return PS_OK;
  }
  ps_status status = ps__device_wait(rank->device, rank->done, NULL);
  if (status == PS_OK) {
    status = ps__pinned_alloc(rank->device, bytes, &p);
  }
  if (status == PS_OK) {
    ps__pinned_free(rank->device, rank->staged, rank->staged_bytes);
    rank->staged = p;
    rank->staged_bytes = bytes;
  }
  return status;
}
