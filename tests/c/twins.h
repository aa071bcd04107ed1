/* twins.h - passes of a device held against those of the CPU, on the stand-in driver. */
#ifndef PARASTEP_TWINS_H
#define PARASTEP_TWINS_H

#include <stddef.h>
#include <stdint.h>

#include "fakes.h"
#include "parastep_backend.h"

enum { DTYPES = 4, TERMS = 130, OUTS = 20, LONGEST = 5000 };

const ps_backend *open_rank(int device);
/* What has pinned memory may outlast its users; whoever comes next buries it. */
void bury_all(const fake_api *fake);

/* A vector of random numbers on both sides. */
typedef struct twin {
  ps_dtype dtype;
  size_t n, bytes;
  unsigned char *host, *device; /* device: with room of one element in front, as `shift` wants */
  unsigned char *block;
} twin;

twin twin_new(const fake_api *fake, ps_dtype dtype, size_t n, uint64_t seed, size_t shift);
void twin_free(const fake_api *fake, twin *t);

/* The device has what the host has; relative 0: bit for bit. */
void check_same(const fake_api *fake, const twin *t, double relative);

/* A lincomb, made by both. */
typedef struct mix {
  size_t n, shift;
  int outs, terms;
  ps_dtype in[2], out;
  int in_place; /* outputs are the first inputs */
} mix;

void check_mix(const fake_api *fake, const ps_backend *cuda, const mix *c, double relative);

/* A sweep, made by both. */
typedef struct case_of_sweep {
  size_t items, size, shift;
  ps_dtype x, m;
  double slope;
  int parts; /* bits: guess, m, out, keep_x, keep_m */
} case_of_sweep;

void check_sweep(const fake_api *fake, const ps_backend *cuda, const case_of_sweep *c,
                 double relative);

#endif
