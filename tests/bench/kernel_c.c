/* kernel_c.c - times the CPU backend beside memcpy.  kernel.py builds it as a shared library
 * together with the backend, calls it through ctypes and judges the figures.
 *
 * Times are the thread's own CPU time, so that a busy machine distorts them less, and every timed
 * call is paired with a memcpy right before it: figures of one pair compare, whatever the
 * neighbours do to the memory at that moment.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "parastep_backend.h"

enum { MOST = 64 };

extern const ps_backend ps__cpu;

static double seconds(void)
{
  struct timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Vectors lie one after another, as in the arena of a run. */
static size_t padded(size_t bytes)
{
  return (bytes + 63) / 64 * 64;
}

static void fill(unsigned char *data, size_t n, ps_dtype dtype)
{
  /* 1.0 in each format: subnormals and NaNs have speeds of their own. */
  for (size_t i = 0; i < n; i++) {
    if (dtype == PS_F32) {
      ((float *)(void *)data)[i] = 1;
    } else {
      ((uint16_t *)(void *)data)[i] = dtype == PS_F16 ? 0x3c00 : 0x3f80;
    }
  }
}

/* Times lincomb of n elements, each after a memcpy of copied bytes.  gap: bytes left between two
 * vectors.  times: (repeats, 2) seconds, memcpy and lincomb.  Returns 0, or -1 where memory or
 * arguments were wrong. */
PS_API int bench_lincomb(size_t n, int outs, int terms, int dtype, size_t gap, size_t copied,
                         int repeats, double *times)
{
  size_t bytes = padded(n * ps_dtype_size((ps_dtype)dtype)) + padded(gap), half = padded(copied);
  unsigned char *vectors = NULL, *copies = NULL;
  double weight[MOST * MOST];
  ps_term in[MOST];
  void *out[MOST];
  int status = -1;
  if (outs > MOST || terms > MOST || n == 0 || half == 0) {
    goto out;
  }
  vectors = aligned_alloc(64, bytes * (size_t)(outs + terms));
  copies = aligned_alloc(64, 2 * half);
  if (!vectors || !copies) {
    goto out;
  }
  memset(vectors, 0, bytes * (size_t)(outs + terms));
  memset(copies, 1, 2 * half);
  for (int i = 0; i < outs * terms; i++) {
    weight[i] = 0.1 + 0.01 * i;
  }
  for (int j = 0; j < terms; j++) {
    fill(vectors + (size_t)j * bytes, n, (ps_dtype)dtype);
    in[j] = (ps_term){vectors + (size_t)j * bytes, (ps_dtype)dtype};
  }
  for (int k = 0; k < outs; k++) {
    out[k] = vectors + (size_t)(terms + k) * bytes;
  }
  for (int r = 0; r < repeats; r++) {
    double began = seconds();
    memcpy(copies + half, copies, copied);
    double between = seconds();
    if (ps__cpu.lincomb(&ps__cpu, n, outs, terms, weight, in, out, (ps_dtype)dtype) != PS_OK) {
      goto out;
    }
    times[2 * r] = between - began;
    times[2 * r + 1] = seconds() - between;
  }
  status = 0;
out:
  free(copies);
  free(vectors);
  return status;
}

/* Times one ask: x and guess measured, m rebased to out, both kept; (1, n) of dtype. */
PS_API int bench_sweep(size_t n, int dtype, size_t gap, int repeats, double *times)
{
  size_t bytes = padded(n * ps_dtype_size((ps_dtype)dtype)) + padded(gap);
  unsigned char *v = aligned_alloc(64, 6 * bytes);
  if (!v) {
    return -1;
  }
  memset(v, 0, 6 * bytes);
  for (int i = 0; i < 3; i++) {
    fill(v + (size_t)i * bytes, n, (ps_dtype)dtype);
  }
  const ps_sweep sweep = {.items = 1,
                          .size = n,
                          .x_dtype = (ps_dtype)dtype,
                          .m_dtype = (ps_dtype)dtype,
                          .x = v,
                          .guess = v + bytes,
                          .m = v + 2 * bytes,
                          .slope = 0.5,
                          .out = v + 3 * bytes,
                          .keep_x = v + 4 * bytes,
                          .keep_m = v + 5 * bytes};
  ps_swept swept;
  ps_status status = PS_OK;
  for (int r = 0; r < repeats && status == PS_OK; r++) {
    double began = seconds();
    status = ps__cpu.sweep(&ps__cpu, &sweep, NULL, &swept);
    times[r] = seconds() - began;
  }
  free(v);
  return status == PS_OK ? 0 : -1;
}
