/* driver.h - what the files of the stand-in driver share: how each of its functions begins and
 * ends. */
#ifndef FAKE_DRIVER_H
#define FAKE_DRIVER_H

#include "backend/cuda_api.h"
#include "engine.h"

#define API __attribute__((visibility("default")))

/* Takes the lock; what a function that needs a context gives at once, whatever its arguments are.
 */
int fake_enter_context(const char *function);
int fake_leave(int error);

/* The stream behind a handle, in the current context. */
int fake_stream_of(CUstream handle, const char *function, fake_stream_state **stream);

static inline void *fake_pointer(CUdeviceptr p)
{
  return (void *)(uintptr_t)p;
}

#endif
