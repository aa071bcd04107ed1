/* fake.h - how tests steer the stand-in driver, and what it says of the calls it was given.
 *
 * tests/gpu/fake/libcuda.c is built as libcuda.so.1: loaded before anyone asks for the driver, it
 * is the copy that platform/dl.c finds.  Devices are host memory behind addresses that the host
 * cannot read, work of a stream is done one piece at a time, in any order that streams and events
 * allow, whenever somebody asks whether it is done.  A call that a real driver would answer with
 * undefined behaviour, a race or a hang is a complaint here.
 */
#ifndef FAKE_H
#define FAKE_H

#include <stddef.h>
#include <stdint.h>

typedef struct fake_setting {
  int devices;   /* 1 to 8 */
  int pools;     /* memory pools are there */
  int peers;     /* devices reach each other */
  uint64_t seed; /* of the order in which work is done */
} fake_setting;

typedef struct fake_counts { /* what is there now */
  int64_t bytes, blocks;     /* of device memory */
  int64_t pinned, streams, events;
  int64_t kernels, copies; /* done so far */
} fake_counts;

/* Functions of the library, to be looked up in it. */
#define FAKE_MAP(X)                                                                                \
  /* Everything as at the start, but for what calls before hold. */                                \
  X(void, fake_set, (const fake_setting *setting))                                                 \
  /* The n-th call of a function from now on gives this error; n 0: never. */                      \
  X(void, fake_fail, (const char *function, int n, int error))                                     \
  /* The n-th piece of work from now on, once done, breaks its device: every later call fails. */  \
  X(void, fake_break, (int n, int error))                                                          \
  /* No work is done on this device any more; -1: on all again. */                                 \
  X(void, fake_hang, (int device))                                                                 \
  /* The host captures a graph on this stream, in the mode that minds what others do. */           \
  X(void, fake_capture, (void *stream, int on))                                                    \
  X(fake_counts, fake_count, (void))                                                               \
  /* The first rule that was broken, or NULL. */                                                   \
  X(const char *, fake_complaint, (void))                                                          \
  /* Copies between host and device outside of all streams, once all work is done. */              \
  X(int, fake_read, (void *to, const void *device, size_t bytes))                                  \
  X(int, fake_write, (void *device, const void *from, size_t bytes))                               \
  /* Memory, a stream and a wait as another library would have them. */                            \
  X(void *, fake_alloc, (int device, size_t bytes))                                                \
  X(void, fake_free, (void *device))                                                               \
  X(void, fake_free_on, (void *stream, void *device)) /* in order of a stream */                   \
  X(void *, fake_stream, (int device))                                                             \
  X(void, fake_drain, (void))

/* A field that points to the function; no part of a declaration can stand in parentheses. */
#define FAKE_POINTER(result, name, arguments)                                                      \
  result(*name) arguments; // NOLINT(bugprone-macro-parentheses)

typedef struct fake_api {
  FAKE_MAP(FAKE_POINTER)
} fake_api;

/* Functions of the stand-in for cuBLAS, libcublas.so.13. */
#define FAKE_BLAS_MAP(X)                                                                           \
  /* The n-th call of a function from now on gives this result. */                                 \
  X(void, fake_blas_fail, (const char *function, int n, int result))                               \
  X(int, fake_blas_calls, (void)) /* products and scaled sums so far */                            \
  X(int, fake_blas_handles, (void))

typedef struct fake_blas_api {
  FAKE_BLAS_MAP(FAKE_POINTER)
} fake_blas_api;

/* Functions of the stand-in for NCCL, libnccl.so.2. */
#define FAKE_NCCL_MAP(X)                                                                           \
  /* The n-th call of a function from now on gives this result, ncclCommGetAsyncError for ever. */ \
  X(void, fake_nccl_fail, (const char *function, int n, int result))                               \
  /* The n-th message that arrives from now on is not quite what was sent; 0: none. */             \
  X(void, fake_nccl_spoil, (int n))                                                                \
  /* Milliseconds that aborting takes. */                                                          \
  X(void, fake_nccl_abort_takes, (int ms))                                                         \
  X(int, fake_nccl_live, (void)) /* communicators that were not aborted */

typedef struct fake_nccl_api {
  FAKE_NCCL_MAP(FAKE_POINTER)
} fake_nccl_api;

#endif
