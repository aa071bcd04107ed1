/* base.h - errors, layouts and memory: what all of the library below the binding stands on.
 *
 * status.c and alloc.c have it and call nobody.  Backends, transports and the platform see no more
 * of the core than this.
 */
#ifndef PS_BASE_H
#define PS_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "parastep.h"

/* ---- status.c -------------------------------------------------------------------------------- */

/* Sets this thread's last error and returns status. */
ps_status ps__fail(ps_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

ps_status ps__layout_check(const ps_layout *layout);

static inline size_t ps__x_bytes(const ps_layout *layout)
{
  return layout->items * layout->size * ps_dtype_size(layout->x);
}

/* Room for one output: m's own size, or where m is still unknown 4 bytes an element, x's at least.
 */
static inline size_t ps__m_bytes(const ps_layout *layout)
{
  size_t element = ps_dtype_size(layout->m);
  if (element == 0) {
    element = ps_dtype_size(layout->x) > 4 ? ps_dtype_size(layout->x) : 4;
  }
  return layout->items * layout->size * element;
}

/* ---- alloc.c --------------------------------------------------------------------------------- */

void *ps__alloc(size_t bytes); /* zeroed, 64-byte aligned; NULL with the last error set */
void ps__free(void *p);

/* One block of host memory, and one of the backend's for vectors, cut in two passes by the same
 * code: base NULL counts, base set hands out. */
typedef struct ps__arena {
  unsigned char *base;
  size_t used;
  unsigned char *vectors;
  size_t vectors_used;
} ps__arena;

void *ps__carve(ps__arena *arena, size_t count, size_t size); /* NULL while counting */
void *ps__carve_vector(ps__arena *arena, size_t bytes);       /* likewise, the backend's memory */
size_t ps__vector_bytes(size_t bytes); /* how far apart that cuts vectors of bytes */

#endif
