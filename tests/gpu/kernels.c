/* kernels.c - the CUDA backend on a real device: checked against the CPU's, then timed.
 *
 *     kernels DEVICE [--check]
 *
 * tests/gpu/run.py runs it on every device, and with --check alone under compute-sanitizer.  It
 * prints one JSON object a line.  On the stand-in driver it runs too; its times mean nothing there.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

enum { TERMS = 24, OUTS = 8, MB = 1 << 20, REPEATS = 50 };

/* Small integers over 64 are exact in every dtype; sums of them are not, which is what is tested.
 */
static void fill(void *p, ps_dtype dtype, size_t n, unsigned seed)
{
  const ps_term one = {NULL, PS_F32};
  float *values = malloc(n * sizeof *values);
  const double weight = 1;
  ps_term in = one;
  for (size_t i = 0; i < n; ++i) {
    seed = seed * 1664525 + 1013904223;
    values[i] = ((float)(seed >> 24) - 127.5f) / 64;
  }
  in.data = values;
  need(cpu->lincomb(cpu, n, 1, 1, &weight, &in, &p, dtype), "fill");
  free(values);
}

/* Whether a result is not the CPU's: bit for bit, or to rounding where PLAIN says that passes are
 * made by cuBLAS. */
#ifndef PLAIN
#define PLAIN 0
#endif

static int is_near(const void *got, const void *expected, ps_dtype dtype, size_t n)
{
  const double one = 1, relative = dtype == PS_F32 ? 1e-5 : dtype == PS_F16 ? 0x1p-9 : 0x1p-6;
  const ps_term in[2] = {{got, dtype}, {expected, dtype}};
  float *values[2];
  int near = 1;
  for (int k = 0; k < 2; ++k) {
    values[k] = malloc(n * sizeof *values[k]);
    need(cpu->lincomb(cpu, n, 1, 1, &one, &in[k], (void *const *)&values[k], PS_F32), "widen");
  }
  for (size_t i = 0; i < n && near; ++i) {
    near = fabsf(values[0][i] - values[1][i]) <= relative * (1 + fabsf(values[1][i]));
  }
  free(values[0]);
  free(values[1]);
  return near;
}

static int differs(const void *got, const void *expected, ps_dtype dtype, size_t n)
{
  return PLAIN ? !is_near(got, expected, dtype, n)
               : memcmp(got, expected, n * ps_dtype_size(dtype)) != 0;
}

/* ---- checks ---------------------------------------------------------------------------------- */

static int check_lincomb(size_t n, int outs, int terms, ps_dtype in, ps_dtype out)
{
  ps_term here[TERMS], there[TERMS];
  void *here_out[OUTS], *there_out[OUTS];
  double weight[TERMS * OUTS];
  size_t in_bytes = n * ps_dtype_size(in), out_bytes = n * ps_dtype_size(out);
  int wrong = 0;
  for (int j = 0; j < terms; ++j) {
    void *host = malloc(in_bytes), *device = new_vector(in_bytes);
    fill(host, in, n, (unsigned)j);
    to_device(device, host, in_bytes);
    here[j] = (ps_term){host, in};
    there[j] = (ps_term){device, in};
  }
  for (int w = 0; w < outs * terms; ++w) {
    weight[w] = sin(w + 1.0);
  }
  for (int k = 0; k < outs; ++k) {
    here_out[k] = malloc(out_bytes);
    there_out[k] = new_vector(out_bytes);
  }
  need(gpu->lincomb(gpu, n, outs, terms, weight, there, there_out, out), "lincomb");
  need(cpu->lincomb(cpu, n, outs, terms, weight, here, here_out, out), "lincomb");
  void *got = malloc(out_bytes);
  for (int k = 0; k < outs; ++k) {
    to_host(got, there_out[k], out_bytes);
    wrong += differs(got, here_out[k], out, n);
    gpu->free(gpu, there_out[k]);
    free(here_out[k]);
  }
  free(got);
  for (int j = 0; j < terms; ++j) {
    gpu->free(gpu, (void *)there[j].data);
    free((void *)here[j].data);
  }
  return wrong;
}

static int check_sweep(size_t items, size_t size, ps_dtype dtype)
{
  size_t n = items * size, bytes = n * ps_dtype_size(dtype);
  void *host[4], *device[4], *got = malloc(bytes);
  ps_swept expected, swept;
  for (int k = 0; k < 4; ++k) {
    host[k] = malloc(bytes);
    device[k] = new_vector(bytes);
    fill(host[k], dtype, n, 50 + (unsigned)k);
    to_device(device[k], host[k], bytes);
  }
  ps_sweep here = {items,   size, dtype, dtype,   host[0], host[1],
                   host[2], .3,   .01,   host[3], NULL,    NULL};
  ps_sweep there = {items,     size, dtype, dtype,     device[0], device[1],
                    device[2], .3,   .01,   device[3], NULL,      NULL};
  need(cpu->sweep(cpu, &here, NULL, &expected), "sweep");
  need(gpu->sweep(gpu, &there, NULL, &swept), "sweep");
  to_host(got, device[3], bytes);
  double relative = PLAIN ? 1e-2 : 1e-5;
  int wrong = differs(got, host[3], dtype, n) ||
              !(fabs(swept.excess - expected.excess) <= relative * expected.distance) ||
              swept.not_finite != expected.not_finite;
  for (int k = 0; k < 4; ++k) {
    gpu->free(gpu, device[k]);
    free(host[k]);
  }
  free(got);
  return wrong;
}

static int check_all(void)
{
  static const ps_dtype dtypes[] = {PS_F32, PS_F16, PS_BF16};
  static const size_t sizes[] = {1, 1000, 65537};
  int wrong = 0, checks = 0;
  for (int a = 0; a < 3; ++a) {
    for (int b = 0; b < 3; ++b) {
      for (int s = 0; s < 3; ++s, ++checks) {
        wrong += check_lincomb(sizes[s], 1 + 3 * s, 5 + 9 * s, dtypes[a], dtypes[b]);
      }
    }
    wrong += check_sweep(1, 65537, dtypes[a]) + check_sweep(3, 4096, dtypes[a]);
    checks += 2;
  }
  printf("{\"part\": \"check\", \"checks\": %d, \"wrong\": %d}\n", checks, wrong);
  return wrong;
}

/* ---- times ----------------------------------------------------------------------------------- */

/* Seconds a pass, of many in a row on the device. */
static double time_lincomb(size_t n, int outs, int terms, const double *weight, const ps_term *in,
                           void *const *out, ps_dtype dtype)
{
  int64_t began = 0;
  for (int k = -5; k < REPEATS; ++k) {
    if (k == 0) {
      need(gpu->settle(gpu, NULL), "settle");
      began = ps_now_ns();
    }
    need(terms > 0 ? gpu->lincomb(gpu, n, outs, terms, weight, in, out, dtype)
                   : gpu->copy(gpu, out[0], in[0].data, n * ps_dtype_size(dtype)),
         "a pass");
  }
  need(gpu->settle(gpu, NULL), "settle");
  return (double)(ps_now_ns() - began) / 1e9 / REPEATS;
}

static void bench_lincomb(ps_dtype dtype, size_t bytes, int outs, int terms)
{
  double weight[TERMS * OUTS];
  ps_term in[TERMS];
  void *out[OUTS];
  size_t n = bytes / ps_dtype_size(dtype);
  for (int j = 0; j < terms; ++j) {
    in[j] = (ps_term){new_vector(bytes), dtype};
  }
  for (int k = 0; k < outs; ++k) {
    out[k] = new_vector(bytes);
  }
  for (int w = 0; w < outs * terms; ++w) {
    weight[w] = .5;
  }
  /* A copy of one vector may stay in the device's cache where a lincomb's many do not: beside it, a
   * copy that moves as many bytes. */
  size_t half = (size_t)(outs + terms) * bytes / 2;
  ps_term from = {new_vector(half), dtype};
  void *to = new_vector(half);
  double copy = time_lincomb(n, 1, 0, NULL, in, out, dtype);
  double like = time_lincomb(half / ps_dtype_size(dtype), 1, 0, NULL, &from, &to, dtype);
  double pass = time_lincomb(n, outs, terms, weight, in, out, dtype);
  double copied = 2.0 * (double)bytes / copy, moved = 2.0 * (double)half / pass;
  printf("{\"part\": \"lincomb\", \"dtype\": \"%s\", \"MB\": %zu, \"inputs\": %d, \"outputs\": %d, "
         "\"us\": %.2f, \"GB_s\": %.1f, \"of_copy\": %.3f, \"of_copy_of_as_many_bytes\": %.3f}\n",
         ps_dtype_name(dtype), bytes / MB, terms, outs, pass * 1e6, moved / 1e9, moved / copied,
         like / pass);
  gpu->free(gpu, (void *)from.data);
  gpu->free(gpu, to);
  for (int j = 0; j < terms; ++j) {
    gpu->free(gpu, (void *)in[j].data);
  }
  for (int k = 0; k < outs; ++k) {
    gpu->free(gpu, out[k]);
  }
}

static int by_size(const void *a, const void *b)
{
  double difference = *(const double *)a - *(const double *)b;
  return difference > 0 ? 1 : difference < 0 ? -1 : 0;
}

/* Drift, rebase and read-back of one ask, from call to return. */
static void bench_ask(ps_dtype dtype, size_t bytes)
{
  void *p[6];
  double us[REPEATS];
  ps_swept swept;
  for (int k = 0; k < 6; ++k) {
    p[k] = new_vector(bytes);
  }
  ps_sweep sweep = {
      1, bytes / ps_dtype_size(dtype), dtype, dtype, p[0], p[1], p[2], .3, 0, p[3], p[4], p[5]};
  for (int k = -5; k < REPEATS; ++k) {
    int64_t began = ps_now_ns();
    need(gpu->sweep(gpu, &sweep, NULL, &swept), "sweep");
    if (k >= 0) {
      us[k] = (double)(ps_now_ns() - began) / 1e3;
    }
  }
  qsort(us, REPEATS, sizeof *us, by_size);
  printf("{\"part\": \"ask\", \"dtype\": \"%s\", \"KB\": %zu, \"us\": %.2f}\n",
         ps_dtype_name(dtype), bytes / 1024, us[REPEATS / 2]);
  for (int k = 0; k < 6; ++k) {
    gpu->free(gpu, p[k]);
  }
}

/* A message to a rank on another device, until it is there. */
static void bench_peer(int peer, size_t bytes)
{
  const ps_backend *there;
  ps_mirror *mirror;
  need(ps_cuda_open(peer, &there), "peer");
  need(gpu->mirror(gpu, there, bytes, &mirror), "mirror");
  int64_t began = 0;
  for (int k = -3; k < REPEATS; ++k) {
    began = k == 0 ? ps_now_ns() : began;
    need(mirror->ops->send(mirror, PS_NEAR, 0, bytes), "send");
    need(mirror->ops->settle(mirror, PS_NEAR, NULL), "settle");
  }
  double seconds = (double)(ps_now_ns() - began) / 1e9 / REPEATS;
  printf("{\"part\": \"peer\", \"to\": %d, \"MB\": %zu, \"us\": %.1f, \"GB_s\": %.2f}\n", peer,
         bytes / MB, seconds * 1e6, (double)bytes / seconds / 1e9);
  mirror->ops->close(mirror, PS_NEAR);
  mirror->ops->close(mirror, PS_FAR);
  there->release(there);
}

static void bench_all(int device)
{
  static const ps_dtype dtypes[] = {PS_F32, PS_F16};
  int count = 0;
  for (int d = 0; d < 2; ++d) {
    bench_lincomb(dtypes[d], 8 * (size_t)MB, 1, 8);
    bench_lincomb(dtypes[d], 8 * (size_t)MB, 7, 8);
    bench_lincomb(dtypes[d], 64 * (size_t)MB, 1, 8);
    bench_lincomb(dtypes[d], 64 * (size_t)MB, 7, 8);
    bench_lincomb(dtypes[d], 2 * (size_t)MB, 7, 20); /* a round's guesses, 8 ranks */
    bench_ask(dtypes[d], (size_t)MB / 16);
    bench_ask(dtypes[d], 2 * (size_t)MB);
    bench_ask(dtypes[d], 8 * (size_t)MB);
  }
  need(ps_cuda_count(&count), "devices");
  for (int peer = 0; peer < count; ++peer) {
    if (peer != device) {
      bench_peer(peer, 2 * (size_t)MB);
    }
  }
}

int main(int argc, char **argv)
{
  int device = argc > 1 ? (int)strtol(argv[1], NULL, 10) : 0;
  char found[256];
  ps_cuda_describe(found, sizeof found);
  printf("{\"found\": \"%s\"}\n", found);
  open_device(device);
  if (!PLAIN) {
    need_kernels();
  }
  int wrong = check_all();
  if (argc < 3) {
    bench_all(device);
  }
  close_device();
  return wrong != 0;
}
