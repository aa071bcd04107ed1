/* fakes.c - loads the stand-in driver for C tests; the library then finds it by itself. */
#include "fakes.h"

#include <dlfcn.h>
#include <libgen.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "backend/device.h"
#include "runner.h"

static int with_kernels;
static fake_counts before;
static int idle_before;

/* In place of image.c's own: the stand-in takes any image. */
const unsigned char *ps__kernel_image(void)
{
  static const unsigned char image[] = "any";
  return with_kernels ? image : NULL;
}

static void *open_library(const char *name)
{
  char program[4096], path[4608];
  ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
  CHECK(length > 0);
  program[length] = '\0';
  snprintf(path, sizeof path, "%s/fake/%s", dirname(program), name);
  void *handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (handle == NULL) {
    runner_fail(__FILE__, __LINE__, "%s", dlerror());
  }
  return handle;
}

/* One function of a map into `api`, from `handle`. */
#define LOAD(result, name, arguments)                                                              \
  function = dlsym(handle, #name);                                                                 \
  CHECK(function != NULL);                                                                         \
  memcpy(&api.name, &function, sizeof function);

const fake_api *fakes_begin(const fake_setting *setting, int kernels)
{
  static fake_api api;
  void *handle = open_library("libcuda.so.1");
  void *function;
  FAKE_MAP(LOAD)
  with_kernels = kernels;
  api.fake_set(setting);
  before = api.fake_count();
  idle_before = ps__pinned_idle();
  return &api;
}

const fake_blas_api *fakes_blas(void)
{
  static fake_blas_api api;
  void *handle = open_library("libcublas.so.13");
  void *function;
  FAKE_BLAS_MAP(LOAD)
  return &api;
}

const fake_nccl_api *fakes_nccl(void)
{
  static fake_nccl_api api;
  void *handle = open_library("libnccl.so.2");
  void *function;
  FAKE_NCCL_MAP(LOAD)
  return &api;
}

void fakes_end(const fake_api *fake)
{
  enum { STREAMS_OF_A_DEVICE = 2 };
  fake->fake_hang(-1);
  fake->fake_drain();
  fake_counts left = fake->fake_count();
  if (fake->fake_complaint() != NULL) {
    runner_fail(__FILE__, __LINE__, "%s", fake->fake_complaint());
  }
  CHECK_EQ(left.bytes, before.bytes);
  CHECK_EQ(left.blocks, before.blocks);
  CHECK_EQ(left.pinned - ps__pinned_idle(), before.pinned - idle_before);
  CHECK_EQ(left.events, before.events);
  CHECK(left.streams <= before.streams + 8 * STREAMS_OF_A_DEVICE);
}
