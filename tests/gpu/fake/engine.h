/* engine.h - memory, streams and events of the stand-in devices; what libcuda.c and libcublas.c are
 * made of: memory.c and engine.c.
 *
 * One lock is held in every call of the API, and work is done by whichever thread makes the call:
 * what is a race between streams is found by clocks, not by chance.  Every stream counts its work;
 * a stream, an event and the host know how far along each stream is certain to be when they come to
 * their present point (a vector clock).  Work that touches a range without knowing of the end of
 * other work on it is a race, in whatever order it happens to be done.
 */
#ifndef FAKE_ENGINE_H
#define FAKE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fake.h"

enum { FAKE_DEVICES = 8, FAKE_STREAMS = 512 };

/* The driver's errors that are given here. */
enum {
  FAKE_OK = 0,
  FAKE_INVALID_VALUE = 1,
  FAKE_OUT_OF_MEMORY = 2,
  FAKE_NO_DEVICE = 100,
  FAKE_INVALID_DEVICE = 101,
  FAKE_INVALID_CONTEXT = 201,
  FAKE_INVALID_HANDLE = 400,
  FAKE_NOT_FOUND = 500,
  FAKE_NOT_READY = 600,
  FAKE_ILLEGAL_ADDRESS = 700,
  FAKE_CAPTURE_UNSUPPORTED = 900,
};

typedef struct fake_clock {
  uint32_t of[FAKE_STREAMS];
} fake_clock;

typedef struct fake_work fake_work;
typedef struct fake_block fake_block;

typedef struct fake_stream_state {
  bool live;
  bool claimed; /* by a call of NCCL's that is in progress */
  int device, index;
  uint32_t given; /* pieces of work */
  fake_clock clock;
  fake_work *first, **last;
} fake_stream_state;

typedef struct fake_event_state {
  struct fake_event_state *next;
  bool live;
  int device;
  uint64_t recorded, reached; /* versions */
  fake_clock clock;           /* at its record */
} fake_event_state;

typedef struct fake_pool_state {
  int device;
  bool access[FAKE_DEVICES];
} fake_pool_state;

/* One range that a piece of work touches. */
typedef struct fake_range {
  const void *p;
  size_t bytes;
  bool write;
} fake_range;

enum { FAKE_RANGES = 128 };

/* What a piece of work does when its turn comes; data is freed after it. */
typedef void (*fake_task)(void *data);
/* Whether its turn can come: asked while it is the first of its stream. */
typedef bool (*fake_ready)(void *data);

extern fake_setting fake_now;
extern fake_counts fake_totals;
extern int fake_broken[FAKE_DEVICES]; /* the error that every call on a device gives, or 0 */

/* All of these are called under the lock. */
void fake_lock(void);
void fake_unlock(void);
int fake_complain(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));
uint32_t fake_random(uint32_t below);

int fake_block_new(size_t bytes, int device, fake_pool_state *pool, void **address);
int fake_pinned_new(size_t bytes, void **address);
int fake_pinned_delete(void *address);
/* The device of the block that holds p, -1 for pinned memory, -2 where there is none. */
int fake_device_of(const void *p);
/* Where the bytes really are; NULL with a complaint where they are not all in one live block. */
void *fake_translate(const void *p, size_t bytes);

/* A piece of work that is being given to a stream touches the range. */
int fake_touch(const fake_stream_state *stream, const fake_range *range, const char *what);
/* The block at address is the stream's to delete, when its turn comes. */
int fake_block_give(fake_stream_state *stream, void *address, fake_block **given);
void fake_block_delete(fake_block *gone);

uint32_t fake_done(int stream); /* pieces of its work, by the stream's index */
fake_stream_state *fake_stream_new(int device);
void fake_stream_delete(fake_stream_state *stream);
fake_stream_state *fake_default_stream(int device);
fake_event_state *fake_event_new(int device);

/* Gives work to a stream: checks its ranges, then keeps data for the task. */
int fake_give(fake_stream_state *stream, const char *what, const fake_range *ranges, int count,
              fake_task task, void *data);
/* The same for work that waits for work of another process. */
int fake_give_when(fake_stream_state *stream, const char *what, const fake_range *ranges, int count,
                   fake_ready ready, fake_task task, void *data);
int fake_record(fake_event_state *event, fake_stream_state *stream);
int fake_wait(fake_stream_state *stream, const fake_event_state *event);
int fake_give_free(fake_stream_state *stream, void *address);
bool fake_reached(fake_event_state *event); /* does some work first, perhaps */
void fake_work_some(uint32_t pieces);
void fake_work_all(void);
bool fake_is_idle(int device);
bool fake_is_spinning(void); /* whether any stream is in work that waits for another process */

int fake_current(void); /* the device of this thread's context, or -1; libcuda.c */

#endif
