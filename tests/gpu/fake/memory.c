/* memory.c - blocks of memory of the stand-in devices, and who touches them in what order; see
 * engine.h.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "engine.h"

typedef struct access {
  size_t begin, end;
  int stream;
  uint32_t at; /* of the stream's work */
  bool write;
} access;

struct fake_block {
  fake_block *next;
  unsigned char *address; /* what the API hands out; of a device: unreadable */
  unsigned char *memory;
  size_t bytes;
  int device; /* -1: pinned host memory */
  fake_pool_state *pool;
  bool freed; /* given to a stream to be freed */
  access *accesses;
  int count, room;
};

static fake_block *blocks;

static fake_block *block_at(const void *p, size_t bytes)
{
  const unsigned char *at = p;
  for (fake_block *b = blocks; b != NULL; b = b->next) {
    if (at >= b->address && at < b->address + b->bytes &&
        bytes <= (size_t)(b->address + b->bytes - at)) {
      return b;
    }
  }
  return NULL;
}

static fake_block *add_block(size_t bytes, int device, fake_pool_state *pool)
{
  fake_block *made = calloc(1, sizeof *made);
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
  fake_block *made = add_block(bytes, device, pool);
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
  fake_block *made = add_block(bytes, -1, NULL);
  made->address = made->memory = memset(memory, 0xc7, bytes);
  ++fake_totals.pinned;
  *address = memory;
  return FAKE_OK;
}

void fake_block_delete(fake_block *gone)
{
  fake_block **at = &blocks;
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
static bool is_touched(const fake_block *b)
{
  for (int k = 0; k < b->count; ++k) {
    const access *a = &b->accesses[k];
    if (a->at > fake_done(a->stream)) {
      return true;
    }
  }
  return false;
}

int fake_pinned_delete(void *address)
{
  fake_block *found = block_at(address, 1);
  if (found == NULL || found->device >= 0 || found->address != address) {
    return fake_complain(FAKE_INVALID_VALUE, "cuMemFreeHost of what is no pinned memory");
  }
  if (is_touched(found)) {
    return fake_complain(FAKE_INVALID_VALUE, "pinned memory freed under work that uses it");
  }
  fake_block_delete(found);
  return FAKE_OK;
}

int fake_device_of(const void *p)
{
  const fake_block *found = block_at(p, 1);
  return found != NULL ? found->device : -2;
}

void *fake_translate(const void *p, size_t bytes)
{
  const fake_block *found = block_at(p, bytes);
  if (found == NULL) {
    fake_complain(0, "work on %zu bytes at %p, which are not in one block", bytes, p);
    return NULL;
  }
  return found->memory + ((const unsigned char *)p - found->address);
}

/* ---- ranges and races ------------------------------------------------------------------------ */

static void note(fake_block *b, access made)
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

static int check_race(const fake_stream_state *stream, const fake_block *b, access made,
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

int fake_touch(const fake_stream_state *stream, const fake_range *range, const char *what)
{
  fake_block *b = block_at(range->p, range->bytes);
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

int fake_block_give(fake_stream_state *stream, void *address, fake_block **given)
{
  fake_block *found = block_at(address, 1);
  if (found == NULL || found->address != address || found->freed || found->device < 0) {
    return fake_complain(FAKE_INVALID_VALUE, "freeing what is no allocation, or was freed before");
  }
  access all = {0, found->bytes, stream->index, stream->given, true};
  check_race(stream, found, all, "freeing");
  found->freed = true;
  *given = found;
  return FAKE_OK;
}

/* ---- for tests ------------------------------------------------------------------------------- */

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
  fake_block *found = block_at(device, 1);
  if (found == NULL || found->freed) {
    fake_complain(0, "a test frees what is no allocation");
  } else if (is_touched(found)) {
    fake_complain(0, "the caller's memory was given back before the work on it was done");
    fake_work_all();
  }
  if (found != NULL && !found->freed) {
    fake_block_delete(found);
  }
  fake_unlock();
}
