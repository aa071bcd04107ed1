/* runner.c - runs the tests that the other files of this directory register.
 *
 *     tests [--list] [--sweep] [--limit SECONDS] [--faults N] [PATTERN...]
 *
 * runs those whose name contains one of the patterns, each in a process of its own (this program
 * again, with --one), so that a crash, a hang or a global left in disorder ends one test alone.
 *
 * With --sweep each test is repeated with one allocation failing, then a later one: its checks may
 * then fail, but it must not crash, hang or, where it goes through, leak.  --faults is for tests
 * that draw faults at random.
 */
#include "runner.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
  EXIT_FAILED = 70,    /* a check failed */
  EXIT_LEAKED = 71,    /* the test returned with blocks allocated */
  EXIT_SURVIVED = 72,  /* in a sweep: the allocation failed, and all that came of it is in order */
  EXIT_NO_TEST = 73,   /* --one with a name that no test has */
  EXIT_SKIPPED = 77,   /* as Automake has it */
  EXIT_SANITIZER = 99, /* a sanitizer's report */
  DEFAULT_LIMIT_S = 60,
  SWEEP_DENSE = 32, /* of a test's allocations, this many first ones fail each in its turn */
};

/* Sanitizers ask the program for its options; the environment can still override them. */
__attribute__((visibility("default"), used)) const char *__asan_default_options(void);
__attribute__((visibility("default"), used)) const char *__tsan_default_options(void);
__attribute__((visibility("default"), used)) const char *__ubsan_default_options(void);

const char *__asan_default_options(void)
{
  return "exitcode=99:detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1";
}

const char *__tsan_default_options(void)
{
  return "exitcode=99:halt_on_error=1:second_deadlock_stack=1";
}

const char *__ubsan_default_options(void)
{
  return "exitcode=99:print_stacktrace=1";
}

/* ---- registration ---------------------------------------------------------------------------- */

static runner_test *first_test;
static runner_test **last_link = &first_test;

void runner_register(runner_test *test)
{
  *last_link = test;
  last_link = &test->next;
}

/* "plan.window_is_cut" for the test window_is_cut of tests/c/test_plan.c. */
static void full_name(const runner_test *test, char *name, size_t room)
{
  const char *file = strrchr(test->file, '/');
  file = file ? file + 1 : test->file;
  if (strncmp(file, "test_", 5) == 0) {
    file += 5;
  }
  snprintf(name, room, "%.*s.%s", (int)strcspn(file, "."), file, test->name);
}

/* ---- checks ---------------------------------------------------------------------------------- */

static int sweeping; /* this process runs one test with one allocation failing */

/* _exit, because other threads may be at work on what exit handlers would take away. */
_Noreturn static void leave(int code)
{
  fflush(stdout);
  _exit(code);
}

void runner_fail(const char *file, int line, const char *format, ...)
{
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "%s:%d: ", file, line);
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  /* A check may well fail once an allocation has; before that it fails in its own right. */
  leave(sweeping && runner_allocation_failed() ? EXIT_SURVIVED : EXIT_FAILED);
}

void runner_skip(const char *format, ...)
{
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  leave(EXIT_SKIPPED);
}

void runner_check_status(const char *file, int line, const char *call, ps_status got,
                         ps_status expected)
{
  if (got != expected) {
    runner_fail(file, line, "%s is PS_%s, not PS_%s; last error: %s", call, ps_status_name(got),
                ps_status_name(expected), ps_last_error());
  }
}

void runner_check_near(const char *file, int line, const char *text, double got, double expected,
                       double tolerance)
{
  const int near = got == expected || fabs(got - expected) <= tolerance; /* equal infinities too */
  if (!near) {
    runner_fail(file, line, "%s is %.17g, not %.17g within %g", text, got, expected, tolerance);
  }
}

void runner_check_str(const char *file, int line, const char *text, const char *got,
                      const char *expected)
{
  if (!got || strcmp(got, expected) != 0) {
    runner_fail(file, line, "%s is \"%s\", not \"%s\"", text, got ? got : "(null)", expected);
  }
}

void runner_check_bytes(const char *file, int line, const char *text, const void *got,
                        const void *expected, size_t bytes)
{
  const unsigned char *a = got, *b = expected;
  for (size_t k = 0; k < bytes; ++k) {
    if (a[k] != b[k]) {
      runner_fail(file, line, "%s differs in byte %zu of %zu: 0x%02x, not 0x%02x", text, k, bytes,
                  a[k], b[k]);
    }
  }
}

/* ---- memory ---------------------------------------------------------------------------------- */

static atomic_uint_fast64_t allocations;
static atomic_int_fast64_t live;
static atomic_uint_fast64_t fail_at; /* value of allocations to fail at; 0 = never */
static atomic_int failed;
static int live_allowed;

static void *count_alloc(void *ctx, size_t bytes)
{
  (void)ctx;
  void *p = NULL;
  if (atomic_fetch_add(&allocations, 1) + 1 == atomic_load(&fail_at)) {
    atomic_store(&failed, 1);
    return NULL;
  }
  /* Zero bytes would give a pointer that must not be read, and may be NULL: neither is a failure.
   */
  if (posix_memalign(&p, 64, bytes ? bytes : 1) != 0) {
    return NULL;
  }
  atomic_fetch_add(&live, 1);
  return p;
}

static void count_free(void *ctx, void *p)
{
  (void)ctx;
  if (p) {
    atomic_fetch_sub(&live, 1);
    free(p);
  }
}

uint64_t runner_allocations(void)
{
  return atomic_load(&allocations);
}

int64_t runner_live(void)
{
  return atomic_load(&live);
}

static void arm(uint64_t n)
{
  atomic_store(&failed, 0);
  atomic_store(&fail_at, n ? atomic_load(&allocations) + n : 0);
}

/* A test that makes allocations fail by itself is swept no further than to this point. */
void runner_fail_allocation(uint64_t n)
{
  sweeping = 0;
  arm(n);
}

int runner_allocation_failed(void)
{
  return atomic_load(&failed);
}

void runner_allow_live(void)
{
  live_allowed = 1;
}

void runner_sweep(ps_status (*body)(void *ctx), void *ctx)
{
  const int64_t live_before = runner_live();
  int again = 1;
  for (uint64_t n = 1; again; n++) {
    runner_fail_allocation(n);
    const ps_status status = body(ctx);
    again = runner_allocation_failed();
    runner_fail_allocation(0);
    const ps_status expected = again ? PS_NO_MEMORY : PS_OK;
    if (status != expected || runner_live() != live_before) {
      runner_fail(__FILE__, __LINE__, "allocation %llu %s: PS_%s (%s), %lld blocks left",
                  (unsigned long long)n, again ? "failed" : "did not come", ps_status_name(status),
                  ps_last_error(), (long long)(runner_live() - live_before));
    }
  }
}

/* ---- one test, in the process of its own ----------------------------------------------------- */

static int faults = 100;

int runner_faults(void)
{
  return faults;
}

static int run_one(const char *name, uint64_t failing)
{
  const ps_allocator counting = {count_alloc, count_free, NULL};
  const runner_test *test = first_test;
  char candidate[256] = "";
  while (test) {
    full_name(test, candidate, sizeof candidate);
    if (strcmp(candidate, name) == 0) {
      break;
    }
    test = test->next;
  }
  if (!test) {
    return EXIT_NO_TEST;
  }
  ps_set_allocator(&counting);
  arm(failing);
  sweeping = failing != 0;
  test->run();
  if (runner_live() != 0 && !live_allowed) {
    fprintf(stderr, "%lld blocks still allocated\n", (long long)runner_live());
    return EXIT_LEAKED;
  }
  return sweeping && runner_allocation_failed() ? EXIT_SURVIVED : 0;
}

/* ---- the runner ------------------------------------------------------------------------------ */

typedef struct outcome {
  int hung;
  int code;   /* exit code, or -1 */
  int signal; /* signal that ended it, or 0 */
} outcome;

static void start_child(const char *name, uint64_t failing, FILE *output)
{
  char number[32], many[32];
  snprintf(number, sizeof number, "%llu", (unsigned long long)failing);
  snprintf(many, sizeof many, "%d", faults);
  const char *const arguments[] = {"tests", "--one", name, number, many, NULL};
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  setpgid(0, 0); /* so that a hung test is killed with the processes it started */
  prctl(PR_SET_PDEATHSIG, SIGKILL); /* and an interrupted runner leaves nothing behind */
  dup2(fileno(output), STDOUT_FILENO);
  dup2(fileno(output), STDERR_FILENO);
  execv("/proc/self/exe", (char *const *)arguments);
  _exit(127);
}

/* SIGCHLD is blocked, so that it can be waited for with a limit. */
static outcome wait_child(pid_t child, int limit_s)
{
  outcome result = {0, -1, 0};
  sigset_t set;
  int status = 0;
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  const int64_t end = now.tv_sec + limit_s;
  sigemptyset(&set);
  sigaddset(&set, SIGCHLD);
  while (waitpid(child, &status, WNOHANG) == 0) {
    const struct timespec slice = {1, 0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec >= end) {
      result.hung = 1;
      kill(-child, SIGKILL);
      waitpid(child, &status, 0);
      break;
    }
    sigtimedwait(&set, NULL, &slice);
  }
  kill(-child, SIGKILL); /* whatever the test started and left running */
  if (WIFEXITED(status)) {
    result.code = WEXITSTATUS(status);
  } else if (WIFSIGNALED(status)) {
    result.signal = WTERMSIG(status);
  }
  return result;
}

static outcome run_child(const char *name, uint64_t failing, int limit_s, FILE *output)
{
  outcome result = {0, 127, 0};
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    start_child(name, failing, output);
  }
  if (child > 0) {
    setpgid(child, child); /* in both processes: whichever comes first */
    result = wait_child(child, limit_s);
  }
  return result;
}

static const char *reason_of(outcome result, int limit_s, char *room, size_t size)
{
  if (result.hung) {
    snprintf(room, size, "hang: still running after %d s", limit_s);
  } else if (result.signal) {
    snprintf(room, size, "signal %d: %s", result.signal, strsignal(result.signal));
  } else if (result.code == EXIT_FAILED) {
    snprintf(room, size, "check failed");
  } else if (result.code == EXIT_LEAKED) {
    snprintf(room, size, "memory left allocated");
  } else if (result.code == EXIT_SANITIZER) {
    snprintf(room, size, "sanitizer report");
  } else {
    snprintf(room, size, "exit code %d", result.code);
  }
  return room;
}

/* What the test printed, each line after a mark, so that no line of it reads like one of ours. */
static void show_output(FILE *output)
{
  char line[1024];
  fseek(output, 0, SEEK_SET);
  while (fgets(line, sizeof line, output)) {
    printf("  | %s%s", line, strchr(line, '\n') ? "" : "\n");
  }
}

/* With one allocation failing, then a later one, until the test has none left to fail.  A test that
 * makes many makes them in loops, so beyond the first ones only some are taken, ever further apart.
 * *n is the allocation that failed last, *runs how many have. */
static outcome sweep_test(const char *name, int limit_s, FILE *output, uint64_t *n, int *runs)
{
  outcome result = {0, EXIT_SURVIVED, 0};
  *runs = 0;
  for (*n = 1; result.code == EXIT_SURVIVED; *n += *n < SWEEP_DENSE ? 1 : *n / 8) {
    fseek(output, 0, SEEK_SET);
    if (ftruncate(fileno(output), 0) != 0) {
      result.code = 127;
      break;
    }
    result = run_child(name, *n, limit_s, output);
    if (result.hung || result.code != EXIT_SURVIVED) {
      break; /* an error, or the whole test without a failed allocation */
    }
    ++*runs;
  }
  return result;
}

typedef struct totals {
  int passed, failed, skipped;
} totals;

static void run_test(const runner_test *test, int sweep, int limit_s, totals *sum)
{
  char name[256];
  char reason[128];
  uint64_t failing = 0;
  int runs = 0;
  outcome result = {0, 127, 0};
  FILE *output = tmpfile();
  full_name(test, name, sizeof name);
  limit_s = test->limit_s ? test->limit_s : limit_s;
  if (output) {
    result = sweep ? sweep_test(name, limit_s, output, &failing, &runs)
                   : run_child(name, 0, limit_s, output);
  }
  if (result.code == 0 && sweep) {
    sum->passed++;
    printf("ok %s (%d allocations)\n", name, runs);
  } else if (result.code == 0) {
    sum->passed++;
    printf("ok %s\n", name);
  } else if (result.code == EXIT_SKIPPED) {
    sum->skipped++;
    printf("skipped %s\n", name);
    show_output(output);
  } else {
    sum->failed++;
    printf("not ok %s (%s)\n", name, reason_of(result, limit_s, reason, sizeof reason));
    if (sweep) {
      printf("  at allocation %llu\n", (unsigned long long)failing);
    }
    if (output) {
      show_output(output);
    }
  }
  fflush(stdout);
  if (output) {
    fclose(output);
  }
}

static int selected(const char *name, char **patterns, int count)
{
  for (int i = 0; i < count; i++) {
    if (strstr(name, patterns[i])) {
      return 1;
    }
  }
  return count == 0;
}

int main(int argc, char **argv)
{
  int list = 0, sweep = 0, limit_s = DEFAULT_LIMIT_S, first = 1;
  totals sum = {0, 0, 0};
  sigset_t set;
  if (argc == 5 && strcmp(argv[1], "--one") == 0) {
    faults = (int)strtol(argv[4], NULL, 10);
    return run_one(argv[2], strtoull(argv[3], NULL, 10));
  }
  for (; first < argc && strncmp(argv[first], "--", 2) == 0; first++) {
    if (strcmp(argv[first], "--list") == 0) {
      list = 1;
    } else if (strcmp(argv[first], "--sweep") == 0) {
      sweep = 1;
    } else if (strcmp(argv[first], "--limit") == 0 && first + 1 < argc) {
      limit_s = (int)strtol(argv[++first], NULL, 10);
    } else if (strcmp(argv[first], "--faults") == 0 && first + 1 < argc) {
      faults = (int)strtol(argv[++first], NULL, 10);
    } else {
      fprintf(stderr, "usage: %s [--list] [--sweep] [--limit SECONDS] [--faults N] [PATTERN...]\n",
              argv[0]);
      return 2;
    }
  }
  sigemptyset(&set);
  sigaddset(&set, SIGCHLD);
  sigprocmask(SIG_BLOCK, &set, NULL);
  for (const runner_test *test = first_test; test; test = test->next) {
    char name[256];
    full_name(test, name, sizeof name);
    if (!selected(name, argv + first, argc - first)) {
      continue;
    }
    if (list) {
      printf("%s\n", name);
    } else {
      run_test(test, sweep, limit_s, &sum);
    }
  }
  if (!list) {
    printf("%d passed, %d failed", sum.passed, sum.failed);
    if (sum.skipped) {
      printf(", %d skipped", sum.skipped);
    }
    printf("\n");
  }
  /* A pattern that selects nothing is a mistake, not a success. */
  const int ran = sum.passed + sum.failed + sum.skipped;
  return sum.failed || (!list && ran == 0) ? 1 : 0;
}
