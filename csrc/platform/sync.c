/* sync.c - the monotonic clock, and waits that end: at a notice, a deadline or an interrupt.
 *
 * Called by transports; the slices let Ctrl-C through while a rank waits for another.
 */
#include <errno.h>
#include <time.h>

#include "core/base.h"
#include "platform/sync.h"

enum { SLICE_NS = 50 * 1000 * 1000 };

static const int64_t second_ns = 1000000000;

int64_t ps_now_ns(void)
{
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * second_ns + now.tv_nsec;
}

ps_status ps__monitor_init(ps__monitor *monitor)
{
  pthread_condattr_t attributes;
  if (pthread_mutex_init(&monitor->mutex, NULL) != 0) {
    goto fail;
  }
  if (pthread_condattr_init(&attributes) != 0) {
    goto fail_mutex;
  }
  /* Deadlines are on the monotonic clock, so that a change of the wall clock cannot stretch them.
   */
  if (pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC) != 0 ||
      pthread_cond_init(&monitor->changed, &attributes) != 0) {
    goto fail_attributes;
  }
  pthread_condattr_destroy(&attributes);
  return PS_OK;

fail_attributes:
  pthread_condattr_destroy(&attributes);
fail_mutex:
  pthread_mutex_destroy(&monitor->mutex);
fail:
  return ps__fail(PS_NO_MEMORY, "the system has no room for another mutex or condition");
}

void ps__monitor_destroy(ps__monitor *monitor)
{
  pthread_cond_destroy(&monitor->changed);
  pthread_mutex_destroy(&monitor->mutex);
}

void ps__monitor_enter(ps__monitor *monitor)
{
  pthread_mutex_lock(&monitor->mutex);
}

void ps__monitor_leave(ps__monitor *monitor)
{
  pthread_mutex_unlock(&monitor->mutex);
}

void ps__monitor_notify(ps__monitor *monitor)
{
  pthread_cond_broadcast(&monitor->changed);
}

static void sleep_until(ps__monitor *monitor, int64_t until_ns)
{
  struct timespec until = {.tv_sec = (time_t)(until_ns / second_ns),
                           .tv_nsec = (long)(until_ns % second_ns)};
  pthread_cond_timedwait(&monitor->changed, &monitor->mutex, &until);
}

static ps_status run_check(ps__monitor *monitor, const ps_wait *wait)
{
  if (wait->check == NULL) {
    return PS_OK;
  }
  ps__monitor_leave(monitor);
  int stop = wait->check(wait->ctx);
  ps__monitor_enter(monitor);
  return stop ? ps__fail(PS_INTERRUPTED, "interrupted while waiting for another rank") : PS_OK;
}

ps_status ps__monitor_wait(ps__monitor *monitor, const ps_wait *wait, int64_t *slice_end)
{
  int64_t now = ps_now_ns();
  if (wait->deadline_ns != 0 && now >= wait->deadline_ns) {
    return ps__fail(PS_DEADLINE, "the deadline passed while waiting for another rank");
  }
  if (*slice_end == 0) {
    *slice_end = now + SLICE_NS;
  } else if (now >= *slice_end) {
    /* The state may have changed while the monitor was left: the caller looks before it sleeps. */
    *slice_end = now + SLICE_NS;
    return run_check(monitor, wait);
  }
  int64_t until = *slice_end;
  if (wait->deadline_ns != 0 && wait->deadline_ns < until) {
    until = wait->deadline_ns;
  }
  sleep_until(monitor, until);
  return PS_OK;
}
