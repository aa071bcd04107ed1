/* alloc.c - the one door to memory, and the arena that a run is cut from.
 *
 * A run takes one block at its creation and nothing after it, so that no round can fail for lack of
 * memory.  The door can be replaced, which is how tests fail the n-th call.
 */
#include <stdlib.h>
#include <string.h>

#include "core/base.h"

enum { ALIGNMENT = 64 };

static size_t round_up(size_t bytes)
{
  return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static void *default_alloc(void *ctx, size_t bytes)
{
  (void)ctx;
  return aligned_alloc(ALIGNMENT, bytes);
}

static void default_free(void *ctx, void *p)
{
  (void)ctx;
  free(p);
}

/* The only mutable global of the library; set before the first object, never on a run's path. */
static ps_allocator allocator = {default_alloc, default_free, NULL};

void ps_set_allocator(const ps_allocator *replacement)
{
  static const ps_allocator standard = {default_alloc, default_free, NULL};
  allocator = replacement != NULL ? *replacement : standard;
}

void *ps__alloc(size_t bytes)
{
  size_t rounded = round_up(bytes > 0 ? bytes : 1);
  void *p = rounded >= bytes ? allocator.alloc(allocator.ctx, rounded) : NULL;
  if (p == NULL) {
    ps__fail(PS_NO_MEMORY, "out of memory: %zu bytes were asked for", bytes);
    return NULL;
  }
  return memset(p, 0, rounded);
}

void ps__free(void *p)
{
  if (p != NULL) {
    allocator.free(allocator.ctx, p);
  }
}

/* Cuts from one of the blocks.  A sum that does not fit stays at SIZE_MAX, which no allocator has.
 */
static void *cut(unsigned char *base, size_t *used, size_t count, size_t size)
{
  void *p = base != NULL ? base + *used : NULL;
  size_t room = SIZE_MAX - ALIGNMENT - *used;
  if (*used > SIZE_MAX - ALIGNMENT || (size > 0 && count > room / size)) {
    *used = SIZE_MAX;
  } else {
    *used += round_up(count * size);
  }
  return p;
}

void *ps__carve(ps__arena *arena, size_t count, size_t size)
{
  return cut(arena->base, &arena->used, count, size);
}

/* Latents have sizes of 2^k bytes more often than not.  A pass reads a dozen at once, and if they
 * lay end to end all of them would compete for the same sets of the cache. */
void *ps__carve_vector(ps__arena *arena, size_t bytes)
{
  enum { APART = 5 * ALIGNMENT };
  return cut(arena->vectors, &arena->vectors_used, 1, bytes + APART);
}

size_t ps__vector_bytes(size_t bytes)
{
  ps__arena arena = {0};
  ps__carve_vector(&arena, bytes);
  return arena.vectors_used;
}
