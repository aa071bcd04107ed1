/* kernel_body.h - the kernels for one kind: elements a thread takes at once, and accumulator.
 *
 * kernels.cu includes this file once for each kind.  It expects KIND(name), REAL, WIDTH (elements)
 * and WEIGHTS (the member of ps__lincomb_args).  REAL and WIDTH also say which dtypes there can be.
 */

/* A whole thread's elements of an operand are in a pack. */
DEVICE REAL KIND(element)(pack p, int dtype, int i)
{
#if WIDTH == 2
  if (dtype == F64) {
    return __hiloint2double((int)p.w[2 * i + 1], (int)p.w[2 * i]);
  }
#endif
#if WIDTH < 8
  if (dtype == F32) {
    return __uint_as_float(p.w[i]);
  }
#endif
  return half_at(p, dtype, i);
}

typedef struct KIND(decoded) {
  REAL at[WIDTH];
} KIND(decoded);

DEVICE KIND(decoded) KIND(decode)(pack p, int dtype)
{
  KIND(decoded) v;
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    v.at[i] = KIND(element)(p, dtype, i);
  }
  return v;
}

DEVICE pack KIND(encode)(const REAL *value, int dtype)
{
  pack p = {{0, 0, 0, 0}};
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
#if WIDTH == 2
    if (dtype == F64) {
      p.w[2 * i] = (unsigned)__double2loint(value[i]);
      p.w[2 * i + 1] = (unsigned)__double2hiint(value[i]);
      continue;
    }
#endif
#if WIDTH < 8
    if (dtype == F32) {
      p.w[i] = __float_as_uint((float)value[i]);
      continue;
    }
#endif
    set_half(&p, dtype, i, (float)value[i]);
  }
  return p;
}

/* Bytes of an element, without a look at the dtype where one of the kind tells it. */
DEVICE int KIND(size)(int dtype)
{
  return WIDTH == 8 ? 2 : WIDTH == 4 ? (dtype == F32 ? 4 : 2) : size_of(dtype);
}

/* Elements at to at + left of an operand; fewer than WIDTH at the end of an item alone. */
DEVICE pack KIND(load)(const void *from, int dtype, count_t at, int left, int vector)
{
  int size = KIND(size)(dtype);
  return fetch((const char *)from + at * size, WIDTH * size, left * size, vector && left == WIDTH);
}

DEVICE void KIND(store)(void *to, pack p, int dtype, count_t at, int left, int vector)
{
  int size = KIND(size)(dtype);
  put((char *)to + at * size, p, WIDTH * size, left * size, vector && left == WIDTH);
}

/* ---- lincomb --------------------------------------------------------------------------------- */

/* Four inputs are on their way at once; an input is read before any output is written, and nobody
 * else reads its elements, so that outputs may be inputs. */
#define LINCOMB(name, ROOM)                                                                        \
  KERNEL name(const ps__lincomb_args a)                                                            \
  {                                                                                                \
    count_t stride = (count_t)gridDim.x * blockDim.x * WIDTH;                                      \
    count_t first = ((count_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;                      \
    for (count_t at = first; at < a.n; at += stride) {                                             \
      int left = a.n - at < WIDTH ? (int)(a.n - at) : WIDTH;                                       \
      REAL sum[ROOM][WIDTH] = {{0}};                                                               \
      for (int j = 0; j < a.terms; j += 4) {                                                       \
        pack p[4] = {{{0}}};                                                                       \
        UNROLL                                                                                     \
        for (int t = 0; t < 4; t++) {                                                              \
          if (j + t < a.terms) {                                                                   \
            p[t] = KIND(load)(a.in[j + t], a.dtype[j + t], at, left, a.vector);                    \
          }                                                                                        \
        }                                                                                          \
        UNROLL                                                                                     \
        for (int t = 0; t < 4; t++) {                                                              \
          if (j + t < a.terms) {                                                                   \
            KIND(decoded) v = KIND(decode)(p[t], a.dtype[j + t]);                                  \
            UNROLL                                                                                 \
            for (int k = 0; k < ROOM; k++) {                                                       \
              REAL w = a.WEIGHTS[(j + t) * ROOM + k];                                              \
              if (w != 0) {                                                                        \
                UNROLL                                                                             \
                for (int i = 0; i < WIDTH; i++) {                                                  \
                  sum[k][i] += w * v.at[i];                                                        \
                }                                                                                  \
              }                                                                                    \
            }                                                                                      \
          }                                                                                        \
        }                                                                                          \
      }                                                                                            \
      UNROLL                                                                                       \
      for (int k = 0; k < ROOM; k++) {                                                             \
        if (k < a.outs) {                                                                          \
          KIND(store)                                                                              \
          (a.out[k], KIND(encode)(sum[k], a.out_dtype), a.out_dtype, at, left, a.vector);          \
        }                                                                                          \
      }                                                                                            \
    }                                                                                              \
  }

LINCOMB(KIND(ps_lincomb_1), 1)
#if WIDTH == 2
LINCOMB(KIND(ps_lincomb_4), 4)
#else
LINCOMB(KIND(ps_lincomb_3), 3)
LINCOMB(KIND(ps_lincomb_7), 7)
#endif

/* ---- sweep ----------------------------------------------------------------------------------- */

/* x - guess of a thread's elements, and what they add to the sums; places past the end are 0. */
DEVICE void KIND(measure)(const ps__sweep_args *s, pack x, pack guess, REAL *moved, ps__part *sum)
{
  REAL distance = 0, reference = 0;
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    REAL here = KIND(element)(x, s->x_dtype, i);
    moved[i] = here - KIND(element)(guess, s->x_dtype, i);
    distance += moved[i] * moved[i];
    reference += here * here;
  }
  sum->distance += distance;
  sum->reference += reference;
}

/* m + slope moved, or m bit for bit; counts the elements of m that are NaN or Inf. */
DEVICE pack KIND(answer)(const ps__sweep_args *s, pack m, const REAL *moved, ps__part *sum)
{
  REAL value[WIDTH], slope = (REAL)s->slope;
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    REAL here = KIND(element)(m, s->m_dtype, i);
    sum->not_finite += here - here != 0;
    value[i] = here + slope * moved[i];
  }
  return s->rebase ? KIND(encode)(value, s->m_dtype) : m;
}

DEVICE void KIND(sweep_at)(const ps__sweep_args *s, count_t at, int left, ps__part *sum)
{
  REAL moved[WIDTH] = {0};
  pack x = {{0, 0, 0, 0}};
  if (s->x) {
    x = KIND(load)(s->x, s->x_dtype, at, left, s->vector);
  }
  if (s->guess) {
    KIND(measure)(s, x, KIND(load)(s->guess, s->x_dtype, at, left, s->vector), moved, sum);
  }
  if (s->m) {
    pack m = KIND(answer)(s, KIND(load)(s->m, s->m_dtype, at, left, s->vector), moved, sum);
    if (s->out) {
      KIND(store)(s->out, m, s->m_dtype, at, left, s->vector);
    }
    if (s->keep_m) {
      KIND(store)(s->keep_m, m, s->m_dtype, at, left, s->vector);
    }
  }
  if (s->keep_x) {
    KIND(store)(s->keep_x, x, s->x_dtype, at, left, s->vector);
  }
}

/* Blocks of a row share an item; a row takes every gridDim.y-th item. */
KERNEL KIND(ps_sweep)(const ps__sweep_args s)
{
  count_t stride = (count_t)gridDim.x * blockDim.x * WIDTH;
  count_t first = ((count_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
  for (count_t item = blockIdx.y; item < s.items; item += gridDim.y) {
    ps__part sum = {0, 0, 0};
    for (count_t i = first; i < s.size; i += stride) {
      KIND(sweep_at)(&s, item * s.size + i, s.size - i < WIDTH ? (int)(s.size - i) : WIDTH, &sum);
    }
    sum = add_up(sum);
    if (threadIdx.x == 0) {
      s.part[item * gridDim.x + blockIdx.x] = sum;
    }
  }
  if (is_last(s.ticket)) {
    finish_sweep(&s);
  }
}

#undef KIND
#undef REAL
#undef WIDTH
#undef WEIGHTS
#undef LINCOMB
