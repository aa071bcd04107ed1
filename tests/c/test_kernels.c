/* test_kernels.c - the kernels themselves, on whole blocks: every thread of a block is a thread.
 *
 * The stand-in driver runs blocks of one thread; here barriers, sums over a block and the last
 * block's own sum are at work, and TSan sees what a missing barrier would do.
 */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "parastep_backend.h"
#include "runner.h"
#include "stage.h"

static pthread_barrier_t barrier;

#define SHIM_SHARED  static
#define SHIM_BARRIER ((void)pthread_barrier_wait(&barrier))
#include "../gpu/fake/shim.h"

#include "backend/kernels.cu" // NOLINT(bugprone-suspicious-include)

enum { THREADS = 8 };

typedef struct thread {
  unsigned index;
  shim_index grid;
  const ps__sweep_args *sweep;
  const ps__lincomb_args *lincomb;
} thread;

static void *run_thread(void *ctx)
{
  const thread *self = ctx;
  threadIdx = (shim_index){self->index, 0};
  blockDim = (shim_index){THREADS, 1};
  gridDim = self->grid;
  for (unsigned block = 0; block < gridDim.x * gridDim.y; ++block) {
    blockIdx = (shim_index){block % gridDim.x, block / gridDim.x};
    if (self->sweep != NULL) {
      ps_sweep_singles(*self->sweep);
    } else {
      ps_lincomb_3_halves(*self->lincomb);
    }
    SHIM_BARRIER; /* the next block's memory is the same */
  }
  return NULL;
}

static void launch(shim_index grid, const ps__sweep_args *sweep, const ps__lincomb_args *lincomb)
{
  pthread_t threads[THREADS];
  thread self[THREADS];
  CHECK_EQ(pthread_barrier_init(&barrier, NULL, THREADS), 0);
  for (unsigned k = 0; k < THREADS; ++k) {
    self[k] = (thread){k, grid, sweep, lincomb};
    CHECK_EQ(pthread_create(&threads[k], NULL, run_thread, &self[k]), 0);
  }
  for (unsigned k = 0; k < THREADS; ++k) {
    CHECK_EQ(pthread_join(threads[k], NULL), 0);
  }
  pthread_barrier_destroy(&barrier);
}

static float *numbers(size_t n, uint64_t seed)
{
  float *made = malloc(n * sizeof *made);
  for (size_t i = 0; i < n; ++i) {
    made[i] = (float)stage_random(&seed);
  }
  return made;
}

/* Parts of an item go to several blocks, items to several rows, or a row takes several items. */
static void check_sweep(size_t items, size_t size, shim_index grid)
{
  enum { PARTS = 64 };
  size_t n = items * size;
  const ps_backend *cpu = ps_backend_find("cpu");
  float *x = numbers(n, 1), *guess = numbers(n, 2), *m = numbers(n, 3);
  float *out = malloc(n * sizeof *out), *expected_out = malloc(n * sizeof *out);
  static ps__part part[PARTS];
  unsigned ticket = 0;
  ps__sweep_result result;
  ps__sweep_args args = {.items = items,
                         .size = size,
                         .x = x,
                         .guess = guess,
                         .m = m,
                         .out = out,
                         .x_dtype = F32,
                         .m_dtype = F32,
                         .vector = size % 4 == 0,
                         .rebase = 1,
                         .slope = .25,
                         .floor_squared = .01,
                         .part = part,
                         .ticket = &ticket,
                         .result = &result};
  ps_sweep sweep = {items, size, PS_F32, PS_F32, x, guess, m, .25, .1, expected_out, NULL, NULL};
  ps_swept swept;
  CHECK(items * grid.x <= PARTS);
  for (int again = 0; again < 2; ++again) { /* the ticket is as it was */
    launch(grid, &args, NULL);
    CHECK_OK(cpu->sweep(cpu, &sweep, NULL, &swept));
    CHECK_EQ(ticket, 0);
    CHECK_NEAR(result.distance, swept.distance, 1e-6 * swept.distance);
    CHECK_NEAR(result.reference, swept.reference, 1e-6 * swept.reference);
    CHECK_NEAR(result.excess, swept.excess, 1e-6 * swept.distance);
    CHECK_EQ(result.not_finite, 0);
    CHECK(memcmp(out, expected_out, n * sizeof *out) == 0);
  }
  free(x);
  free(guess);
  free(m);
  free(out);
  free(expected_out);
}

TEST(a_sweep_on_whole_blocks)
{
  check_sweep(1, 500, (shim_index){3, 1});
  check_sweep(1, 5, (shim_index){1, 1});
  check_sweep(5, 128, (shim_index){2, 5});
  check_sweep(6, 33, (shim_index){2, 4});
}

TEST(a_lincomb_on_whole_blocks)
{
  enum { N = 333, OUTS = 3, TERMS = 6 };
  const ps_backend *cpu = ps_backend_find("cpu");
  static _Alignas(16) uint16_t in[TERMS][N + 3], out[OUTS][N + 3], expected[OUTS][N + 3];
  ps_term term[TERMS];
  double weight[OUTS * TERMS];
  void *to[OUTS];
  uint64_t seed = 9;
  ps__lincomb_args args = {.n = N, .outs = OUTS, .terms = TERMS, .vector = 1, .out_dtype = F16};
  for (int j = 0; j < TERMS; ++j) {
    for (int i = 0; i < N; ++i) {
      stage_store(in[j], PS_F16, (size_t)i, stage_random(&seed));
    }
    term[j] = (ps_term){in[j], PS_F16};
    args.in[j] = in[j];
    args.dtype[j] = F16;
  }
  for (int k = 0; k < OUTS; ++k) {
    args.out[k] = out[k];
    to[k] = expected[k];
    for (int j = 0; j < TERMS; ++j) {
      weight[k * TERMS + j] = stage_random(&seed);
      args.weight.single[j * OUTS + k] = (float)weight[k * TERMS + j];
    }
  }
  launch((shim_index){2, 1}, NULL, &args);
  CHECK_OK(cpu->lincomb(cpu, N, OUTS, TERMS, weight, term, to, PS_F16));
  CHECK(memcmp(out, expected, sizeof out) == 0);
}
