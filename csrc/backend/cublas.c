/* cublas.c - cuBLAS as a rank has it: the library, a handle and its workspace, kept from run to
 * run.
 *
 * cuda.c makes one for a rank whose device has no kernels of this build; cuda_cublas.c makes the
 * rank's passes with it.
 */
#include <pthread.h>

#include "backend/cublas.h"

enum { WORKSPACE = 4 << 20, IDLE_MAX = 16 };

ps__blas_api ps__cublas;

PS__DL_DESCRIBE(library, "cuBLAS", ps__blas_api, PS__BLAS_MAP, &ps__cublas, "libcublas.so.13",
                "libcublas.so.12", "libcublas.so.11", "libcublas.so");

ps_status ps__blas_check(const ps__cuda_rank *rank, cublasStatus_t result, const char *what)
{
  return result == PS__BLAS_OK ? PS_OK
                               : ps__fail(result == PS__BLAS_NO_MEMORY ? PS_NO_MEMORY : PS_DEVICE,
                                          "cuda:%d: %s: cuBLAS fails with %d",
                                          rank->device->ordinal, what, (int)result);
}

/* ---- life ------------------------------------------------------------------------------------ */

int ps__blas_version(void)
{
  int major = 0, minor = 0;
  if (ps__dl_load(&library) != PS_OK ||
      ps__cublas.property(PS__BLAS_MAJOR, &major) != PS__BLAS_OK ||
      ps__cublas.property(PS__BLAS_MINOR, &minor) != PS__BLAS_OK) {
    return 0;
  }
  return major * 100 + minor;
}

/* Handles that nobody uses: making one takes long, and destroying one waits for the whole device.
 */
static pthread_mutex_t idling = PTHREAD_MUTEX_INITIALIZER;
static struct {
  cublasHandle_t handle[IDLE_MAX];
  int count;
} idle[PS__DEVICES_MAX];

static cublasHandle_t take_handle(const ps__device *device)
{
  cublasHandle_t handle = NULL;
  ps__scope scope;
  pthread_mutex_lock(&idling);
  if (idle[device->ordinal].count > 0) {
    handle = idle[device->ordinal].handle[--idle[device->ordinal].count];
  }
  pthread_mutex_unlock(&idling);
  if (handle == NULL && ps__device_enter(device, &scope) == PS_OK) {
    if (ps__cublas.create(&handle) != PS__BLAS_OK) {
      handle = NULL;
    }
    ps__device_leave(&scope);
  }
  return handle;
}

static void give_handle(const ps__device *device, cublasHandle_t handle)
{
  ps__scope scope;
  pthread_mutex_lock(&idling);
  bool kept = idle[device->ordinal].count < IDLE_MAX;
  if (kept) {
    idle[device->ordinal].handle[idle[device->ordinal].count++] = handle;
  }
  pthread_mutex_unlock(&idling);
  if (!kept && ps__device_enter(device, &scope) == PS_OK) {
    ps__cublas.destroy(handle);
    ps__device_leave(&scope);
  }
}

ps__blas *ps__blas_new(ps__device *device)
{
  ps__blas *made = ps__dl_load(&library) == PS_OK ? ps__alloc(sizeof *made) : NULL;
  if (made == NULL) {
    return NULL;
  }
  *made = (ps__blas){take_handle(device), 0};
  if (made->handle == NULL || ps__device_alloc(device, WORKSPACE, &made->workspace) != PS_OK) {
    ps__blas_free(device, made);
    return NULL;
  }
  return made;
}

void ps__blas_free(ps__device *device, ps__blas *gone)
{
  if (gone == NULL) {
    return;
  }
  ps__device_free(device, gone->workspace);
  if (gone->handle != NULL) {
    give_handle(device, gone->handle);
  }
  ps__free(gone);
}

ps_status ps__blas_aim(ps__cuda_rank *rank)
{
  ps__blas *own = rank->blas;
  cublasStatus_t result = ps__cublas.set_stream(own->handle, rank->stream);
  if (result == PS__BLAS_OK) {
    result =
        ps__cublas.set_workspace(own->handle, (void *)(uintptr_t)own->workspace, (size_t)WORKSPACE);
  }
  return ps__blas_check(rank, result, "naming its stream");
}
