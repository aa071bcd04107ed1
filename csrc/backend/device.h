/* device.h - a CUDA device as this library sees it: context, kernels, memory, waits.
 *
 * cuda.c and cuda_mirror.c work on devices, the binding asks what there are.  A device stays open
 * from its first use to the end of the process, as torch's contexts do.
 */
#ifndef PS_DEVICE_H
#define PS_DEVICE_H

#include "backend/cuda_api.h"
#include "backend/kernels.h"
#include "core/base.h"

enum { PS__DEVICES_MAX = 64, PS__PINNED_KINDS = 48 };

typedef struct ps__device {
  bool open;
  int ordinal;
  CUdevice handle;
  CUcontext context; /* the primary one, which torch uses too */
  int processors;
  bool compiled; /* kernel is filled in; otherwise this build has none that run here */
  CUfunction kernel[PS__KERNELS];
  CUmemoryPool pool; /* NULL where the driver has none: memory is then freed at a standstill */
  CUstream taking, giving;        /* allocations are in order on the one, frees on the other */
  void *pinned[PS__PINNED_KINDS]; /* idle blocks of 2^k bytes, each with the next one's address */
  uint64_t reaches,
      barred; /* bit of every device whose memory is known to be within reach, or not */
} ps__device;

/* Devices that the driver reports.  PS_UNSUPPORTED with the reason where there is no driver. */
ps_status ps__device_count(int *count);
ps_status ps__device_open(int ordinal, ps__device **device);
/* Whether some device that is open runs none of this build's kernels. */
bool ps__device_lacks_kernels(void);

/* Between the two the device's context is this thread's, and whatever the host captures elsewhere
 * is not disturbed.  After PS_OK leave follows; no code of others runs in between. */
typedef struct ps__scope {
  CUstreamCaptureMode mode;
} ps__scope;

ps_status ps__device_enter(const ps__device *device, ps__scope *scope);
void ps__device_leave(ps__scope *scope);

/* PS_OK, or what the driver's error means here; what says what was tried. */
ps_status ps__cuda_check(const ps__device *device, CUresult result, const char *what);

/* Zeroed memory that every stream may use at once. */
ps_status ps__device_alloc(ps__device *device, size_t bytes, CUdeviceptr *p);
/* Frees p behind all work that its device's giving stream has been told to wait for. */
void ps__device_free(ps__device *device, CUdeviceptr p);
/* The giving stream waits for the event.  event may be NULL. */
void ps__device_free_after(const ps__device *device, CUevent event);

/* Zeroed host memory that all devices reach, at one address.  What is given back is kept for
 * whoever wants as much next, and never freed: the driver frees pinned memory at a standstill,
 * which under a receive that waits for another process does not come for as long as that evaluates.
 */
ps_status ps__pinned_alloc(ps__device *device, size_t bytes, void **p);
/* p may be NULL; no work on it is under way any more.  bytes: as it was asked for. */
void ps__pinned_free(ps__device *device, void *p, size_t bytes);
/* Blocks of all devices that are kept so. */
int ps__pinned_idle(void);

ps_status ps__event_new(const ps__device *device, CUevent *event);
ps_status ps__stream_new(const ps__device *device, CUstream *stream);
void ps__event_free(const ps__device *device, CUevent event);    /* NULL is fine */
void ps__stream_free(const ps__device *device, CUstream stream); /* likewise */

/* Waits until the event is reached; outside of enter, since check may run code of others. */
ps_status ps__device_wait(const ps__device *device, CUevent event, const ps_wait *wait);

bool ps__event_reached(const ps__device *device,
                       CUevent event); /* or never will be; NULL is fine */

/* Something with memory of the host in it that work of a device may still touch.  Streams give
 * back memory of the device in their order; the host's has none. */
typedef struct ps__mortal {
  struct ps__mortal *next;
  bool (*has_ended)(const struct ps__mortal *self); /* its work is done */
  void (*destroy)(struct ps__mortal *self);
} ps__mortal;

/* Takes in what nobody uses any more (or NULL) and destroys all whose work is done; the others wait
 * for the next call.  With a device that hangs that may be for ever, which is better than waiting.
 */
void ps__bury(ps__mortal *mortal);

/* Whether from may write to the other's memory itself, without the host. */
bool ps__device_reaches(ps__device *from, ps__device *to);

/* image.c: the kernels of this build for all architectures, or NULL. */
const unsigned char *ps__kernel_image(void);

#endif
