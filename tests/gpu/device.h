/* device.h - a real device (or a stand-in) beside the CPU backend, for the programs of tests/gpu.
 */
#ifndef GPU_DEVICE_H
#define GPU_DEVICE_H

#include "parastep_backend.h"

enum { DEVICE_ROOM = 1 << 20 }; /* bytes that go over at a time, at most */

extern const ps_backend *gpu, *cpu;

/* Ends the program where something cannot be. */
void need(ps_status status, const char *what);

void open_device(int ordinal);
/* Ends the program where this build has no kernels, which is said, or none that run here. */
void need_kernels(void);
void close_device(void);

/* Memory of the device, zeroed; gpu->free gives it back. */
void *new_vector(size_t bytes);

void to_device(void *to, const void *from, size_t bytes);
void to_host(void *to, const void *from, size_t bytes);

#endif
