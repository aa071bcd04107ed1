/* engine.c - streams and events of the stand-in devices, and their work; see engine.h. */
#include "engine.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum work_kind { TASK, RECORD, WAIT, FREE } work_kind;

struct fake_work {
  fake_work *next;
  work_kind kind;
  fake_ready ready; /* NULL: always */
  fake_task task;
  void *data;
  fake_event_state *event;
  uint64_t version;
  fake_block *freed;
};

fake_setting fake_now = {2, 1, 1, 1};
fake_counts fake_totals;
int fake_broken[FAKE_DEVICES];

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static fake_stream_state *streams[FAKE_STREAMS];
static int stream_count;
static fake_clock host;
static char complaint[512];
static uint64_t random_state = 1;
static int hanging = -1;
static int break_after, break_error;

void fake_lock(void)
{
  pthread_mutex_lock(&mutex);
}

void fake_unlock(void)
{
  pthread_mutex_unlock(&mutex);
}

int fake_complain(int error, const char *format, ...)
{
  if (complaint[0] == '\0') {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(complaint, sizeof complaint, format, arguments);
    va_end(arguments);
  }
  return error;
}

const char *fake_complaint(void)
{
  return complaint[0] != '\0' ? complaint : NULL;
}

uint32_t fake_random(uint32_t below)
{
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(random_state >> 33) % below;
}

/* ---- clocks ---------------------------------------------------------------------------------- */

static void learn(fake_clock *clock, const fake_clock *from)
{
  for (int k = 0; k < stream_count; ++k) {
    clock->of[k] = from->of[k] > clock->of[k] ? from->of[k] : clock->of[k];
  }
}

/* ---- streams --------------------------------------------------------------------------------- */

fake_stream_state *fake_stream_new(int device)
{
  fake_stream_state *made = NULL;
  for (int k = 0; k < stream_count && made == NULL; ++k) {
    if (!streams[k]->live && streams[k]->first == NULL) {
      made = streams[k]; /* its counter goes on */
    }
  }
  if (made == NULL && stream_count < FAKE_STREAMS) {
    made = calloc(1, sizeof *made);
    made->index = stream_count;
    streams[stream_count++] = made;
  }
  if (made != NULL) {
    made->live = true;
    made->device = device;
    made->last = &made->first;
    memset(&made->clock, 0, sizeof made->clock);
    made->clock.of[made->index] = made->given;
    ++fake_totals.streams;
  }
  return made;
}

void fake_stream_delete(fake_stream_state *stream)
{
  stream->live = false;
  --fake_totals.streams;
}

fake_stream_state *fake_default_stream(int device)
{
  static fake_stream_state *defaults[FAKE_DEVICES];
  if (defaults[device] == NULL) {
    defaults[device] = fake_stream_new(device);
    --fake_totals.streams; /* nobody made it */
  }
  return defaults[device];
}

static fake_work *append(fake_stream_state *stream, work_kind kind)
{
  fake_work *made = calloc(1, sizeof *made);
  made->kind = kind;
  *stream->last = made;
  stream->last = &made->next;
  return made;
}

int fake_give(fake_stream_state *stream, const char *what, const fake_range *ranges, int count,
              fake_task task, void *data)
{
  return fake_give_when(stream, what, ranges, count, NULL, task, data);
}

int fake_give_when(fake_stream_state *stream, const char *what, const fake_range *ranges, int count,
                   fake_ready ready, fake_task task, void *data)
{
  int error = FAKE_OK;
  if (stream->claimed) { /* events alone may be recorded meanwhile */
    error = fake_complain(FAKE_INVALID_VALUE, "%s: a call of NCCL is in progress there", what);
  }
  learn(&stream->clock, &host);
  stream->clock.of[stream->index] = ++stream->given;
  for (int k = 0; k < count && error == FAKE_OK; ++k) {
    error = fake_touch(stream, &ranges[k], what);
  }
  fake_work *made = append(stream, TASK);
  made->ready = ready;
  made->task = error == FAKE_OK ? task : NULL;
  made->data = data;
  fake_work_some(fake_random(2));
  return error;
}

int fake_record(fake_event_state *event, fake_stream_state *stream)
{
  if (!event->live || event->device != stream->device) {
    return fake_complain(FAKE_INVALID_HANDLE, "an event of device %d recorded on device %d%s",
                         event->device, stream->device, event->live ? "" : ", destroyed");
  }
  learn(&stream->clock, &host);
  fake_work *made = append(stream, RECORD);
  made->event = event;
  made->version = ++event->recorded;
  event->clock = stream->clock;
  return FAKE_OK;
}

int fake_wait(fake_stream_state *stream, const fake_event_state *event)
{
  if (!event->live) {
    return fake_complain(FAKE_INVALID_HANDLE, "a wait for an event that was destroyed");
  }
  if (stream->claimed) {
    return fake_complain(FAKE_INVALID_VALUE,
                         "a wait in a stream where a call of NCCL is in progress");
  }
  learn(&stream->clock, &event->clock);
  fake_work *made = append(stream, WAIT);
  made->event = (fake_event_state *)event;
  made->version = event->recorded;
  return FAKE_OK;
}

int fake_give_free(fake_stream_state *stream, void *address)
{
  fake_block *freed;
  learn(&stream->clock, &host);
  int error = fake_block_give(stream, address, &freed);
  if (error != FAKE_OK) {
    return error;
  }
  stream->clock.of[stream->index] = ++stream->given;
  fake_work *made = append(stream, TASK);
  made->kind = FREE;
  made->freed = freed;
  return FAKE_OK;
}

fake_event_state *fake_event_new(int device)
{
  static fake_event_state *events; /* destroyed ones too: work may still know them */
  fake_event_state *made = calloc(1, sizeof *made);
  made->next = events;
  events = made;
  made->live = true;
  made->device = device;
  ++fake_totals.events;
  return made;
}

uint32_t fake_done(int stream)
{
  uint32_t done = streams[stream]->given;
  for (const fake_work *work = streams[stream]->first; work != NULL; work = work->next) {
    done -= work->kind == TASK;
  }
  return done;
}

/* ---- doing the work -------------------------------------------------------------------------- */

static bool is_ready(const fake_stream_state *stream)
{
  const fake_work *work = stream->first;
  return work != NULL && stream->device != hanging &&
         !(work->kind == WAIT && work->event->reached < work->version) &&
         (work->ready == NULL || work->ready(work->data));
}

static void do_first(fake_stream_state *stream)
{
  fake_work *work = stream->first;
  stream->first = work->next;
  stream->last = stream->first != NULL ? stream->last : &stream->first;
  if (work->kind == TASK && work->task != NULL && fake_broken[stream->device] == 0) {
    work->task(work->data);
    if (break_after == 1) {
      fake_broken[stream->device] = break_error;
    }
    break_after -= break_after > 0;
  } else if (work->kind == RECORD && work->version > work->event->reached) {
    work->event->reached = work->version;
  } else if (work->kind == FREE) {
    fake_block_delete(work->freed);
  }
  free(work->data);
  free(work);
}

/* One piece of work of a stream taken at random from those that have some. */
static bool do_one(void)
{
  int ready = 0;
  for (int k = 0; k < stream_count; ++k) {
    ready += is_ready(streams[k]);
  }
  if (ready == 0) {
    return false;
  }
  int chosen = (int)fake_random((uint32_t)ready);
  for (int k = 0; k < stream_count; ++k) {
    if (is_ready(streams[k]) && chosen-- == 0) {
      do_first(streams[k]);
      return true;
    }
  }
  return false;
}

void fake_work_some(uint32_t pieces)
{
  while (pieces-- > 0 && do_one()) {
  }
}

void fake_work_all(void)
{
  while (do_one()) {
  }
  for (int k = 0; k < stream_count; ++k) {
    if (streams[k]->first == NULL) {
      host.of[k] = streams[k]->given;
    }
  }
}

bool fake_is_idle(int device)
{
  for (int k = 0; k < stream_count; ++k) {
    if (streams[k]->device == device && streams[k]->first != NULL) {
      return false;
    }
  }
  return true;
}

bool fake_is_spinning(void)
{
  for (int k = 0; k < stream_count; ++k) {
    if (streams[k]->first != NULL && streams[k]->first->ready != NULL) {
      return true;
    }
  }
  return false;
}

bool fake_reached(fake_event_state *event)
{
  fake_work_some(fake_random(4));
  bool reached = event->reached >= event->recorded;
  if (reached) {
    learn(&host, &event->clock);
  }
  return reached;
}

/* ---- for tests ------------------------------------------------------------------------------- */

void fake_set(const fake_setting *setting)
{
  fake_lock();
  fake_now = *setting;
  random_state = setting->seed * 2 + 1;
  complaint[0] = '\0';
  fake_unlock();
}

void fake_break(int n, int error)
{
  fake_lock();
  break_after = n;
  break_error = error;
  if (n == 0) {
    memset(fake_broken, 0, sizeof fake_broken);
  }
  fake_unlock();
}

void fake_hang(int device)
{
  fake_lock();
  hanging = device;
  fake_unlock();
}

fake_counts fake_count(void)
{
  fake_lock();
  fake_counts counts = fake_totals;
  fake_unlock();
  return counts;
}

void fake_drain(void)
{
  fake_lock();
  fake_work_all();
  fake_unlock();
}

void fake_free_on(void *stream, void *device)
{
  fake_lock();
  fake_give_free(stream, device);
  fake_unlock();
}

void *fake_stream(int device)
{
  fake_lock();
  fake_stream_state *made = fake_stream_new(device);
  fake_unlock();
  return made;
}
