/* device.c - what the programs of tests/gpu share: a device, and a way for vectors there and back.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/device.h"
#include "device.h"

const ps_backend *gpu, *cpu;
static ps_mirror *way; /* between the device and the host */

void need(ps_status status, const char *what)
{
  if (status != PS_OK) {
    fprintf(stderr, "%s: %s\n", what, ps_last_error());
    exit(1);
  }
}

void open_device(int ordinal)
{
  cpu = ps_backend_find("cpu");
  need(ps_cuda_open(ordinal, &gpu), "open");
  need(gpu->mirror(gpu, cpu, DEVICE_ROOM, &way), "mirror");
}

void need_kernels(void)
{
  enum { SKIPPED = 77 };
  if (ps__kernel_image() == NULL) {
    fprintf(stderr, "built without nvcc: there are no kernels\n");
    exit(SKIPPED);
  }
  need(ps__device_lacks_kernels() ? ps__fail(PS_UNSUPPORTED, "no kernels of this build run here")
                                  : PS_OK,
       "open");
}

void close_device(void)
{
  way->ops->close(way, PS_NEAR);
  way->ops->close(way, PS_FAR);
  gpu->release(gpu);
}

void *new_vector(size_t bytes)
{
  void *p = gpu->alloc(gpu, bytes);
  need(p != NULL ? PS_OK : PS_NO_MEMORY, "memory");
  return p;
}

void to_device(void *to, const void *from, size_t bytes)
{
  memcpy(way->memory[PS_FAR], from, bytes);
  need(way->ops->send(way, PS_FAR, 0, bytes), "send");
  need(way->ops->receive(way, PS_NEAR), "receive");
  need(gpu->copy(gpu, to, way->memory[PS_NEAR], bytes), "copy");
  need(gpu->settle(gpu, NULL), "settle");
}

void to_host(void *to, const void *from, size_t bytes)
{
  need(gpu->copy(gpu, way->memory[PS_NEAR], from, bytes), "copy");
  need(way->ops->send(way, PS_NEAR, 0, bytes), "send");
  need(way->ops->settle(way, PS_NEAR, NULL), "settle");
  memcpy(to, way->memory[PS_FAR], bytes);
}
