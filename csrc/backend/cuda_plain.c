/* cuda_plain.c - the passes of a rank whose device has neither kernels nor cuBLAS: this build had
 * no nvcc, or has no code for the device.
 *
 * cuda.c and cuda_cublas.c call it in place of a launch.  Operands go to the host, through the CPU
 * backend and back, so that results are the specification's own; a call waits for its operands.
 */
#include "backend/cuda.h"

static size_t apart(size_t bytes)
{
  return (bytes + 63) / 64 * 64;
}

/* Puts one operand after the others; inside of enter. */
static ps_status fetch(ps__cuda_rank *rank, const void *from, size_t bytes, size_t *at, void **here)
{
  *here = NULL;
  if (from == NULL) {
    return PS_OK;
  }
  *here = rank->staged + *at;
  *at += apart(bytes);
  return ps__cuda_check(rank->device,
                        ps__cuda.copy_to_host(*here, ps__address(from), bytes, rank->stream),
                        "copying to the host");
}

static ps_status give_back(ps__cuda_rank *rank, void *to, const void *here, size_t bytes)
{
  if (to == NULL) {
    return PS_OK;
  }
  return ps__cuda_check(rank->device,
                        ps__cuda.copy_from_host(ps__address(to), here, bytes, rank->stream),
                        "copying from the host");
}

/* Waits until the operands are here. */
static ps_status arrive(ps__cuda_rank *rank, const ps_wait *wait)
{
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status == PS_OK) {
    status = ps__cuda_mark(rank);
    ps__device_leave(&scope);
  }
  return status == PS_OK ? ps__device_wait(rank->device, rank->done, wait) : status;
}

/* ---- lincomb --------------------------------------------------------------------------------- */

static ps_status fetch_terms(ps__cuda_rank *rank, size_t n, int terms, const ps_term *in,
                             ps_term *here, size_t *at)
{
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  for (int j = 0; j < terms && status == PS_OK; ++j) {
    void *copy;
    status = fetch(rank, in[j].data, n * ps_dtype_size(in[j].dtype), at, &copy);
    here[j] = (ps_term){copy, in[j].dtype};
  }
  ps__device_leave(&scope);
  return status;
}

static ps_status give_outs(ps__cuda_rank *rank, size_t bytes, int outs, void *const *out,
                           void *const *here)
{
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  for (int k = 0; k < outs && status == PS_OK; ++k) {
    status = give_back(rank, out[k], here[k], bytes);
  }
  ps_status marked = ps__cuda_mark(rank);
  ps__device_leave(&scope);
  return status == PS_OK ? marked : status;
}

ps_status ps__plain_lincomb(ps__cuda_rank *rank, size_t n, int outs, int terms,
                            const double *weight, const ps_term *in, void *const *out,
                            ps_dtype out_dtype)
{
  const ps_backend *cpu = ps_backend_find("cpu");
  size_t bytes = n * ps_dtype_size(out_dtype), at = 0, room = (size_t)outs * apart(bytes);
  for (int j = 0; j < terms; ++j) {
    room += in[j].data != NULL ? apart(n * ps_dtype_size(in[j].dtype)) : 0;
  }
  ps_term *here = ps__alloc((size_t)terms * sizeof *here);
  void **made = ps__alloc((size_t)outs * sizeof *made);
  ps_status status = here != NULL && made != NULL ? ps__cuda_staged(rank, room) : PS_NO_MEMORY;
  if (status == PS_OK) {
    status = fetch_terms(rank, n, terms, in, here, &at);
  }
  for (int k = 0; k < outs && status == PS_OK; ++k) {
    made[k] = rank->staged + at + (size_t)k * apart(bytes);
  }
  if (status == PS_OK) {
    status = arrive(rank, NULL);
  }
  if (status == PS_OK) {
    status = cpu->lincomb(cpu, n, outs, terms, weight, here, made, out_dtype);
  }
  if (status == PS_OK) {
    status = give_outs(rank, bytes, outs, out, made);
  }
  ps__free(made);
  ps__free(here);
  return status;
}

/* ---- sweep ----------------------------------------------------------------------------------- */

static ps_status fetch_operands(ps__cuda_rank *rank, const ps_sweep *s, size_t x, size_t m,
                                ps_sweep *here)
{
  size_t at = 0;
  void *copies[3];
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  status = fetch(rank, s->x, x, &at, &copies[0]);
  if (status == PS_OK) {
    status = fetch(rank, s->guess, x, &at, &copies[1]);
  }
  if (status == PS_OK) {
    status = fetch(rank, s->m, m, &at, &copies[2]);
  }
  ps__device_leave(&scope);
  if (status == PS_OK) {
    here->x = copies[0];
    here->guess = copies[1];
    here->m = copies[2];
    here->out = copies[2]; /* the answer takes m's place */
    here->keep_x = here->keep_m = NULL;
  }
  return status;
}

static ps_status give_answer(ps__cuda_rank *rank, const ps_sweep *s, const ps_sweep *here, size_t x,
                             size_t m)
{
  ps__scope scope;
  ps_status status = ps__device_enter(rank->device, &scope);
  if (status != PS_OK) {
    return status;
  }
  status = give_back(rank, s->out, here->out, m);
  if (status == PS_OK) {
    status = give_back(rank, s->keep_m, here->out, m);
  }
  if (status == PS_OK) {
    status = give_back(rank, s->keep_x, here->x, x);
  }
  ps_status marked = ps__cuda_mark(rank);
  ps__device_leave(&scope);
  return status == PS_OK ? marked : status;
}

ps_status ps__plain_sweep(ps__cuda_rank *rank, const ps_sweep *s, const ps_wait *wait,
                          ps_swept *swept)
{
  const ps_backend *cpu = ps_backend_find("cpu");
  size_t n = s->items * s->size;
  size_t x = n * ps_dtype_size(s->x_dtype), m = n * ps_dtype_size(s->m_dtype);
  ps_sweep here = *s;
  ps_status status = ps__cuda_staged(rank, 2 * apart(x) + apart(m));
  if (status == PS_OK) {
    status = fetch_operands(rank, s, x, m, &here);
  }
  if (status == PS_OK) {
    status = arrive(rank, wait);
  }
  if (status == PS_OK) {
    status = cpu->sweep(cpu, &here, wait, swept);
  }
  return status == PS_OK ? give_answer(rank, s, &here, x, m) : status;
}
