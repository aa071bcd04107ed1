/* sync.h - clock, and a mutex with one condition whose waits have deadlines and are sliced.
 *
 * Used by transports; the core uses the clock alone.
 */
#ifndef PS_SYNC_H
#define PS_SYNC_H

#include <pthread.h>

#include "parastep.h"

typedef struct ps__monitor {
  pthread_mutex_t mutex;
  pthread_cond_t changed;
} ps__monitor;

ps_status ps__monitor_init(ps__monitor *monitor);
void ps__monitor_destroy(ps__monitor *monitor);
void ps__monitor_enter(ps__monitor *monitor);
void ps__monitor_leave(ps__monitor *monitor);
void ps__monitor_notify(ps__monitor *monitor); /* all waiters */

/* One slice of a wait, inside the monitor: returns when notified or after 50 ms at most.  Between
 * slices the monitor is left while check runs, since check may take Python's lock.  PS_OK: look at
 * the state again; PS_DEADLINE, PS_INTERRUPTED: give up.  *slice_end is 0 before the first call. */
ps_status ps__monitor_wait(ps__monitor *monitor, const ps_wait *wait, int64_t *slice_end);

#endif
