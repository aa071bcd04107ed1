/* engine.c - memory, streams and events of the stand-in devices; see engine.h. */
#include "engine.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct access {
  size_t begin, end;
  int stream;
  uint32_t at; /* of the stream's work */
  bool write;
} access;

typedef struct block {
  struct block *next;
  unsigned char *address; /* what the API hands out; of a device: unreadable */
  unsigned char *memory;
  size_t bytes;
  int device; /* -1: pinned host memory */
  fake_pool_state *pool;
  bool freed; /* given to a stream to be freed */
  access *accesses;
  int count, room;
} block;

typedef enum work_kind { TASK, RECORD, WAIT, FREE } work_kind;

struct fake_work {
  fake_work *next;
  work_kind kind;
  fake_ready ready; /* NULL: always */
  fake_task task;
  void *data;
  fake_event_state *event;
  uint64_t version;
  block *freed;
};

fake_setting fake_now = {2, 1, 1, 1};
fake_counts fake_totals;
int fake_broken[FAKE_DEVICES];

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static block *blocks;
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

/* ---- memory ---------------------------------------------------------------------------------- */

static block *block_at(const void *p, size_t bytes)
{
  const unsigned char *at = p;
  for (block *b = blocks; b != NULL; b = b->next) {
    if (at >= b->address && at < b->address + b->bytes &&
        bytes <= (size_t)(b->address + b->bytes - at)) {
      return b;
    }
  }
  return NULL;
}

static block *add_block(size_t bytes, int device, fake_pool_state *pool)
{
  block *made = calloc(1, sizeof *made);
  made->bytes = bytes;
  made->device = device;
  made->pool = pool;
  made->next = blocks;
  blocks = made;
  return made;
}

int fake_block_new(size_t bytes, int device, fake_pool_state *pool, void **address)
{
  if (bytes == 0) {
    return fake_complain(FAKE_INVALID_VALUE, "an allocation of no bytes");
  }
  if (bytes > SIZE_MAX / 4) {
    return FAKE_OUT_OF_MEMORY;
  }
  void *range = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  unsigned char *memory = range != MAP_FAILED ? aligned_alloc(64, (bytes + 63) / 64 * 64) : NULL;
  if (memory == NULL) {
    return FAKE_OUT_OF_MEMORY;
  }
  block *made = add_block(bytes, device, pool);
  made->address = range;
  made->memory = memset(memory, 0xc7, bytes); /* as little zero as on a real device */
  fake_totals.bytes += (int64_t)bytes;
  ++fake_totals.blocks;
  *address = made->address;
  return FAKE_OK;
}

int fake_pinned_new(size_t bytes, void **address)
{
  unsigned char *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == NULL) {
    return FAKE_OUT_OF_MEMORY;
  }
  block *made = add_block(bytes, -1, NULL);
  made->address = made->memory = memset(memory, 0xc7, bytes);
  ++fake_totals.pinned;
  *address = memory;
  return FAKE_OK;
}

static void delete_block(block *gone)
{
  block **at = &blocks;
  while (*at != gone) {
    at = &(*at)->next;
  }
  *at = gone->next;
  if (gone->device >= 0) {
    munmap(gone->address, gone->bytes);
    fake_totals.bytes -= (int64_t)gone->bytes;
    --fake_totals.blocks;
  } else {
    --fake_totals.pinned;
  }
  free(gone->memory);
  free(gone->accesses);
  free(gone);
}

/* Work that has not been done would touch what is freed here. */
static bool is_touched(const block *b)
{
  for (int k = 0; k < b->count; ++k) {
    const access *a = &b->accesses[k];
    const fake_stream_state *stream = streams[a->stream];
    uint32_t done = stream->given;
    for (const fake_work *work = stream->first; work != NULL; work = work->next) {
      done -= work->kind == TASK;
    }
    if (a->at > done) {
      return true;
    }
  }
  return false;
}

int fake_pinned_delete(void *address)
{
  block *found = block_at(address, 1);
  if (found == NULL || found->device >= 0 || found->address != address) {
    return fake_complain(FAKE_INVALID_VALUE, "cuMemFreeHost of what is no pinned memory");
  }
  if (is_touched(found)) {
    return fake_complain(FAKE_INVALID_VALUE, "pinned memory freed under work that uses it");
  }
  delete_block(found);
  return FAKE_OK;
}

int fake_device_of(const void *p)
{
  const block *found = block_at(p, 1);
  return found != NULL ? found->device : -2;
}

void *fake_translate(const void *p, size_t bytes)
{
  const block *found = block_at(p, bytes);
  if (found == NULL) {
    fake_complain(0, "work on %zu bytes at %p, which are not in one block", bytes, p);
    return NULL;
  }
  return found->memory + ((const unsigned char *)p - found->address);
}

/* ---- ranges and races ------------------------------------------------------------------------ */

static void note(block *b, access made)
{
  for (int k = 0; k < b->count; ++k) {
    access *a = &b->accesses[k];
    if (a->stream == made.stream && a->write == made.write && a->begin == made.begin &&
        a->end == made.end) {
      a->at = made.at;
      return;
    }
  }
  if (b->count == b->room) {
    b->room = b->room > 0 ? 2 * b->room : 16;
    access *grown = realloc(b->accesses, (size_t)b->room * sizeof *grown);
    if (grown == NULL) {
      abort(); /* a race that went unnoticed would be worse */
    }
    b->accesses = grown;
  }
  b->accesses[b->count++] = made;
}

static int check_race(const fake_stream_state *stream, const block *b, access made,
                      const char *what)
{
  for (int k = 0; k < b->count; ++k) {
    const access *a = &b->accesses[k];
    if (a->begin < made.end && made.begin < a->end && (a->write || made.write) &&
        a->at > stream->clock.of[a->stream]) {
      return fake_complain(FAKE_OK,
                           "%s on stream %d of device %d: it %s what stream %d %s, and nothing "
                           "says that that is done",
                           what, stream->index, stream->device, made.write ? "writes" : "reads",
                           a->stream, a->write ? "writes" : "reads");
    }
  }
  return FAKE_OK;
}

static int touch(const fake_stream_state *stream, const fake_range *range, const char *what)
{
  block *b = block_at(range->p, range->bytes);
  if (b == NULL) {
    return fake_complain(FAKE_INVALID_VALUE, "%s: %zu bytes at %p are not in one block", what,
                         range->bytes, range->p);
  }
  if (b->freed) {
    return fake_complain(FAKE_INVALID_VALUE, "%s: memory that was freed", what);
  }
  if (b->device >= 0 && b->device != stream->device &&
      !(b->pool != NULL && b->pool->access[stream->device])) {
    return fake_complain(FAKE_ILLEGAL_ADDRESS, "%s: device %d does not reach memory of device %d",
                         what, stream->device, b->device);
  }
  size_t begin = (size_t)((const unsigned char *)range->p - b->address);
  access made = {begin, begin + range->bytes, stream->index, stream->given, range->write};
  check_race(stream, b, made, what);
  note(b, made);
  return FAKE_OK;
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
  learn(&stream->clock, &host);
  stream->clock.of[stream->index] = ++stream->given;
  for (int k = 0; k < count && error == FAKE_OK; ++k) {
    error = touch(stream, &ranges[k], what);
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
  learn(&stream->clock, &event->clock);
  fake_work *made = append(stream, WAIT);
  made->event = (fake_event_state *)event;
  made->version = event->recorded;
  return FAKE_OK;
}

int fake_give_free(fake_stream_state *stream, void *address)
{
  block *found = block_at(address, 1);
  if (found == NULL || found->address != address || found->freed || found->device < 0) {
    return fake_complain(FAKE_INVALID_VALUE, "freeing what is no allocation, or was freed before");
  }
  learn(&stream->clock, &host);
  stream->clock.of[stream->index] = ++stream->given;
  access all = {0, found->bytes, stream->index, stream->given, true};
  check_race(stream, found, all, "freeing");
  found->freed = true;
  fake_work *made = append(stream, TASK);
  made->kind = FREE;
  made->freed = found;
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
    delete_block(work->freed);
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

int fake_read(void *to, const void *device, size_t bytes)
{
  fake_lock();
  fake_work_all();
  const void *from = fake_translate(device, bytes);
  if (from != NULL) {
    memcpy(to, from, bytes);
  }
  fake_unlock();
  return from != NULL ? FAKE_OK : FAKE_INVALID_VALUE;
}

int fake_write(void *device, const void *from, size_t bytes)
{
  fake_lock();
  fake_work_all();
  void *to = fake_translate(device, bytes);
  if (to != NULL) {
    memcpy(to, from, bytes);
  }
  fake_unlock();
  return to != NULL ? FAKE_OK : FAKE_INVALID_VALUE;
}

void *fake_alloc(int device, size_t bytes)
{
  void *address = NULL;
  fake_lock();
  fake_block_new(bytes, device, NULL, &address);
  fake_unlock();
  return address;
}

/* As a caching allocator does: at once, whatever is still under way. */
void fake_free(void *device)
{
  fake_lock();
  block *found = block_at(device, 1);
  if (found == NULL || found->freed) {
    fake_complain(0, "a test frees what is no allocation");
  } else if (is_touched(found)) {
    fake_complain(0, "the caller's memory was given back before the work on it was done");
    fake_work_all();
  }
  if (found != NULL && !found->freed) {
    delete_block(found);
  }
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
