/* runner.h - what a C test needs: registration, checks, and an allocator that counts and fails.
 *
 * A file tests/c/test_plan.c holds tests like
 *
 *     TEST(window_is_cut_at_the_end)
 *     {
 *       CHECK_EQ(window(4, 10, 8), 2);
 *     }
 *
 * and nothing else: the runner lists it as plan.window_is_cut_at_the_end, starts it in a process of
 * its own under a time limit, and fails it when it crashes, hangs, or returns with memory of the
 * library still allocated.  A failed check ends the whole test from whichever thread it is made in.
 */
#ifndef PARASTEP_RUNNER_H
#define PARASTEP_RUNNER_H

#include <stdint.h>

#include "parastep.h"

/* ---- registration ---------------------------------------------------------------------------- */

typedef struct runner_test {
  const char *file; /* the static string __FILE__ */
  const char *name;
  void (*run)(void);
  int limit_s; /* 0 = the runner's own limit */
  struct runner_test *next;
} runner_test;

void runner_register(runner_test *test); /* test must live as long as the program */

/* A test with a time limit other than the usual 60 seconds. */
#define TEST_WITHIN(name, seconds)                                                                 \
  static void test_##name(void);                                                                   \
  __attribute__((constructor)) static void register_##name(void)                                   \
  {                                                                                                \
    static runner_test entry = {__FILE__, #name, test_##name, (seconds), 0};                       \
    runner_register(&entry);                                                                       \
  }                                                                                                \
  static void test_##name(void)

#define TEST(name) TEST_WITHIN(name, 0)

/* ---- checks ---------------------------------------------------------------------------------- */

/* Prints "file:line: ..." and ends the test as failed, or as skipped. */
_Noreturn void runner_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
_Noreturn void runner_skip(const char *format, ...) __attribute__((format(printf, 1, 2)));

void runner_check_status(const char *file, int line, const char *call, ps_status got,
                         ps_status expected);
void runner_check_near(const char *file, int line, const char *text, double got, double expected,
                       double tolerance);
void runner_check_str(const char *file, int line, const char *text, const char *got,
                      const char *expected);
void runner_check_bytes(const char *file, int line, const char *text, const void *got,
                        const void *expected, size_t bytes);

#define CHECK(condition)                                                                           \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      runner_fail(__FILE__, __LINE__, "not true: %s", #condition);                                 \
    }                                                                                              \
  } while (0)

/* A long double holds every 64-bit integer and every double exactly, so these compare numbers of
 * any type and sign by value.  Pointers go into CHECK. */
#define RUNNER_COMPARE(a, op, b)                                                                   \
  do {                                                                                             \
    const long double runner_a = (a), runner_b = (b);                                              \
    if (!(runner_a op runner_b)) {                                                                 \
      runner_fail(__FILE__, __LINE__, "not true: %s %s %s, with %.19Lg and %.19Lg", #a, #op, #b,   \
                  runner_a, runner_b);                                                             \
    }                                                                                              \
  } while (0)

#define CHECK_EQ(a, b) RUNNER_COMPARE(a, ==, b)
#define CHECK_NE(a, b) RUNNER_COMPARE(a, !=, b)
#define CHECK_LT(a, b) RUNNER_COMPARE(a, <, b)
#define CHECK_LE(a, b) RUNNER_COMPARE(a, <=, b)
#define CHECK_GT(a, b) RUNNER_COMPARE(a, >, b)
#define CHECK_GE(a, b) RUNNER_COMPARE(a, >=, b)

/* |got - expected| <= tolerance; a NaN on either side fails. */
#define CHECK_NEAR(got, expected, tolerance)                                                       \
  runner_check_near(__FILE__, __LINE__, #got, (got), (expected), (tolerance))

#define CHECK_STR(got, expected) runner_check_str(__FILE__, __LINE__, #got, (got), (expected))

/* To the bit, so that a zero differs from its negative and a NaN equals itself. */
#define CHECK_BYTES(got, expected, bytes)                                                          \
  runner_check_bytes(__FILE__, __LINE__, #got, (got), (expected), (bytes))

/* Prints the status by name, and the library's last error. */
#define CHECK_STATUS(call, expected)                                                               \
  runner_check_status(__FILE__, __LINE__, #call, (call), (expected))
#define CHECK_OK(call) CHECK_STATUS(call, PS_OK)

/* ---- memory ---------------------------------------------------------------------------------- */

/* Every test runs with an allocator that counts.  Counters are atomic: ranks may be threads. */
uint64_t runner_allocations(void); /* calls so far, failed ones too */
int64_t runner_live(void);         /* blocks not given back */

/* The n-th allocation from now on fails, once; 0 switches this off. */
void runner_fail_allocation(uint64_t n);
int runner_allocation_failed(void); /* whether it has come to that */

/* Runs body again and again, its first allocation failing, then its second, until it gets through
 * without; every failure must come out as PS_NO_MEMORY and leave nothing allocated. */
void runner_sweep(ps_status (*body)(void *ctx), void *ctx);

int runner_faults(void); /* how many a test that draws faults at random is to inject; --faults */

/* For a test that means to leave memory behind, say with a thread that never returns. */
void runner_allow_live(void);

#endif
