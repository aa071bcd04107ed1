/* kernels.h - what cuda_kernels.c and kernels.cu agree on: names, arguments and limits of the
 * kernels.
 *
 * Arguments travel by value, 4096 bytes at most, so that a launch needs no upload and no memory.
 */
#ifndef PS_KERNELS_H
#define PS_KERNELS_H

enum {
  PS__TERMS_MAX = 96,      /* inputs of one launch of a lincomb */
  PS__OUTS_MAX = 7,        /* outputs of one launch: the guesses of a round of 8 ranks */
  PS__WEIGHT_BYTES = 3072, /* 7 x 96 of float, or 4 x 96 of double */
  PS__THREADS = 256,       /* of a block, a power of 2 */
  PS__PARTS_MAX = 8192,    /* blocks of a sweep's launch */
};

/* Kinds of a kernel: elements that a thread takes at once, and the accumulator's type. */
enum {
  PS__HALVES = 0,  /* fp16 and bf16 alone: 8 elements in 16 bytes; float */
  PS__SINGLES = 1, /* fp32 too: 4 elements in 16 or 8 bytes; float */
  PS__DOUBLES = 2, /* fp64 too: 2 elements in 16, 8 or 4 bytes; double */
};

/* A launch combines outs outputs; weight[j * room + k] is that of input j in output k, where room
 * is the kernel's own number of outputs. */
typedef struct ps__lincomb_args {
  unsigned long long n;
  int outs, terms;
  int vector; /* all addresses suit accesses of a whole thread's elements */
  int out_dtype;
  const void *in[PS__TERMS_MAX];
  void *out[PS__OUTS_MAX];
  union {
    float single[PS__WEIGHT_BYTES / 4];
    double twice[PS__WEIGHT_BYTES / 8];
  } weight;
  unsigned char dtype[PS__TERMS_MAX];
} ps__lincomb_args;

/* What a block finds out about its part of an item. */
typedef struct ps__part {
  double distance, reference; /* sums of (x - guess)^2 and of x^2 */
  unsigned long long not_finite;
} ps__part;

/* ps_swept as the device writes it, into pinned memory. */
typedef struct ps__sweep_result {
  double excess, distance, reference;
  unsigned long long not_finite;
} ps__sweep_result;

/* ps_sweep for a launch of (parts, rows) blocks; part is (items, parts). */
typedef struct ps__sweep_args {
  unsigned long long items, size;
  const void *x, *guess, *m;
  void *out, *keep_x, *keep_m;
  int x_dtype, m_dtype;
  int vector;
  int rebase; /* out is m + slope (x - guess), not m itself */
  double slope, floor_squared;
  ps__part *part;
  unsigned *ticket; /* 0 before a launch and after it */
  ps__sweep_result *result;
} ps__sweep_args;

/* X(name, kind, outputs), 0 outputs: a sweep. */
#define PS__KERNEL_MAP(X)                                                                          \
  X(ps_lincomb_1_halves, PS__HALVES, 1)                                                            \
  X(ps_lincomb_3_halves, PS__HALVES, 3)                                                            \
  X(ps_lincomb_7_halves, PS__HALVES, 7)                                                            \
  X(ps_lincomb_1_singles, PS__SINGLES, 1)                                                          \
  X(ps_lincomb_3_singles, PS__SINGLES, 3)                                                          \
  X(ps_lincomb_7_singles, PS__SINGLES, 7)                                                          \
  X(ps_lincomb_1_doubles, PS__DOUBLES, 1)                                                          \
  X(ps_lincomb_4_doubles, PS__DOUBLES, 4)                                                          \
  X(ps_sweep_halves, PS__HALVES, 0)                                                                \
  X(ps_sweep_singles, PS__SINGLES, 0)                                                              \
  X(ps_sweep_doubles, PS__DOUBLES, 0)

enum {
#define X(name, kind, outputs) PS__K_##name,
  PS__KERNEL_MAP(X)
#undef X
      PS__KERNELS
};

#endif
