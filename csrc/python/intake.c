/* intake.c - what a tensor of the caller says of its memory is judged, and the memory made plain.
 *
 * convert.c and dlpack_in.c call it while they fill in a view, each for its kinds of objects, and
 * psb__settle at the end, which makes the temporary copy where one is needed.  Views are given back
 * here, whoever filled them in.
 */
#include <stdlib.h>
#include <string.h>

#include "intake.h"

/* Copies above this size let other threads run meanwhile. */
enum { LARGE_COPY = 64 * 1024 };

/* ---- dimensions, and where it lies ----------------------------------------------------------- */

int psb__take_ndim(psb_intake *in, int64_t ndim)
{
  int rc = 0;

  if (ndim < 0 || ndim > PSB_DIMS_MAX) {
    psb_raise(in->st, PS_SHAPE, "%s has %lld dimensions; from 0 to %d are supported", in->name,
              (long long)ndim, PSB_DIMS_MAX);
    rc = -1;
  } else {
    in->view->ndim = (int)ndim;
  }
  return rc;
}

/* Pinned memory is host memory; managed memory is not, as a kernel may be writing it right now. */
static bool is_host(dl_device device)
{
  return device.type == DL_CPU || device.type == DL_CUDA_HOST || device.type == DL_ROCM_HOST;
}

static int refuse_place(const psb_intake *in, dl_device device)
{
  psb_raise(in->st, PS_DEVICE, "%s lies on cuda:%d, but the run is on cuda:%d; move it there",
            in->name, (int)device.id, in->place->device);
  return -1;
}

static int refuse_device(const psb_intake *in, dl_device device)
{
  const char *name = "an unknown device";

  switch (device.type) {
  case DL_CUDA: name = "a CUDA device"; break;
  case DL_CUDA_MANAGED: name = "CUDA managed memory"; break;
  case DL_ROCM: name = "a ROCm device"; break;
  case DL_METAL: name = "a Metal device"; break;
  case DL_ONEAPI: name = "a oneAPI device"; break;
  case DL_OPENCL: name = "an OpenCL device"; break;
  case DL_VULKAN: name = "a Vulkan device"; break;
  default: break;
  }
  psb_raise(in->st, PS_DEVICE,
            "%s lies on %s (DLPack type %d, id %d); move it to the CPU, with torch %s.cpu()",
            in->name, name, (int)device.type, (int)device.id, in->name);
  return -1;
}

int psb__check_device(const psb_intake *in)
{
  dl_device device = {in->view->device_type, in->view->device_id};
  int wanted = psb__wanted_device(in->place);

  if (device.type == DL_CUDA && wanted >= 0)
    return device.id == wanted ? 0 : refuse_place(in, device);
  return is_host(device) ? 0 : refuse_device(in, device);
}

/* ---- memory as the caller laid it out -------------------------------------------------------- */

/* Whether the elements follow each other in C order.  Strides of sizes below 2 say nothing. */
static bool is_contiguous(const psb_intake *in)
{
  const psb_view *view = in->view;
  int64_t expected = (int64_t)ps_dtype_size(view->dtype);
  bool contiguous = true;

  for (int d = view->ndim - 1; d >= 0 && in->strided; d--) {
    contiguous = contiguous && (view->shape[d] < 2 || in->stride[d] == expected);
    expected *= view->shape[d];
  }
  return contiguous;
}

static bool is_aligned(const psb_view *view)
{
  return (uintptr_t)view->data % ps_dtype_size(view->dtype) == 0;
}

/* Strides come from outside: their reach must fit an offset before one is computed. */
static bool strides_fit(const psb_intake *in)
{
  int64_t reach = 0, step;
  bool fit = true;

  for (int d = 0; d < in->view->ndim && in->strided; d++) {
    fit = fit && in->stride[d] != INT64_MIN &&
          !__builtin_mul_overflow(llabs(in->stride[d]), in->view->shape[d] - 1, &step) &&
          !__builtin_add_overflow(reach, step, &reach);
  }
  return fit;
}

static void gather_row(char *to, const char *from, int64_t n, int64_t stride, size_t element)
{
  if (stride == (int64_t)element) {
    memcpy(to, from, (size_t)n * element);
  } else if (element == 2) {
    for (int64_t i = 0; i < n; i++)
      memcpy(to + 2 * i, from + i * stride, 2);
  } else if (element == 4) {
    for (int64_t i = 0; i < n; i++)
      memcpy(to + 4 * i, from + i * stride, 4);
  } else {
    for (int64_t i = 0; i < n; i++)
      memcpy(to + 8 * i, from + i * stride, 8);
  }
}

/* Row by row over the last dimension; the others count up like an odometer.  count is above 0. */
static void gather(const psb_intake *in, char *to, size_t element)
{
  const psb_view *view = in->view;
  const char *from = view->data;
  int last = view->ndim - 1, d;
  int64_t row = last < 0 ? 1 : view->shape[last];
  int64_t stride = last < 0 ? 0 : in->stride[last];
  int64_t index[PSB_DIMS_MAX] = {0}, offset = 0;

  do {
    gather_row(to, from + offset, row, stride, element);
    to += (size_t)row * element;
    for (d = last - 1; d >= 0 && index[d] == view->shape[d] - 1; d--) {
      offset -= index[d] * in->stride[d];
      index[d] = 0;
    }
    if (d >= 0) {
      offset += in->stride[d];
      index[d]++;
    }
  } while (d >= 0);
}

static void swap_bytes(char *data, size_t count, size_t element)
{
  for (size_t i = 0; i < count; i++, data += element) {
    for (size_t k = 0; k < element / 2; k++) {
      char byte = data[k];
      data[k] = data[element - 1 - k];
      data[element - 1 - k] = byte;
    }
  }
}

static void copy_elements(const psb_intake *in, char *to)
{
  const psb_view *view = in->view;
  size_t element = ps_dtype_size(view->dtype);

  if (in->strided)
    gather(in, to, element);
  else
    memcpy(to, view->data, view->bytes);
  if (in->swapped)
    swap_bytes(to, view->count, element);
}

/* ---- giving back ----------------------------------------------------------------------------- */

/* Gives the source back but keeps what the view says; the temporary copy has taken its place. */
static void release_source(psb_view *view)
{
  PyObject *type, *value, *traceback;

  PyErr_Fetch(&type, &value, &traceback);
  if (view->managed)
    view->delete_managed(view->managed);
  view->managed = NULL;
  PyBuffer_Release(&view->buffer);
  Py_CLEAR(view->owner);
  PyErr_Restore(type, value, traceback);
}

void psb_view_release(psb_view *view)
{
  release_source(view);
  free(view->temporary);
  memset(view, 0, sizeof *view);
}

/* ---- judging what was filled in -------------------------------------------------------------- */

static int copy_aside(psb_intake *in)
{
  psb_view *view = in->view;
  int rc = -1;

  if (!strides_fit(in)) {
    psb_raise(in->st, PS_SHAPE, "%s has strides that no memory can have", in->name);
    goto out;
  }
  view->temporary = malloc(view->bytes);
  if (!view->temporary) {
    PyErr_NoMemory();
    goto out;
  }
  if (view->bytes > LARGE_COPY) {
    Py_BEGIN_ALLOW_THREADS;
    copy_elements(in, view->temporary);
    Py_END_ALLOW_THREADS;
  } else {
    copy_elements(in, view->temporary);
  }
  release_source(view);
  view->data = view->temporary;
  view->device_type = DL_CPU;
  view->device_id = 0;
  view->copied = view->readonly = true;
  rc = 0;
out:
  return rc;
}

int psb__settle(psb_intake *in)
{
  psb_view *view = in->view;
  size_t element = ps_dtype_size(view->dtype);
  bool writable = in->flags & PSB_WRITABLE;
  int rc = -1;

  if (!psb__count(view->ndim, view->shape, element, &view->count)) {
    psb_raise(in->st, PS_SHAPE, "%s has a negative size or more elements than fit in memory",
              in->name);
    goto out;
  }
  view->bytes = view->count * element;
  if (!view->data && view->count > 0) {
    psb_raise(in->st, PS_INVALID,
              "%s has no memory behind it; give a materialized tensor, not a fake or meta one",
              in->name);
  } else if (writable && view->readonly) {
    psb_raise(in->st, PS_INVALID, "%s is to be written but is read-only; give a copy of it",
              in->name);
  } else if (view->count == 0 || (is_contiguous(in) && is_aligned(view) && !in->swapped)) {
    rc = 0;
  } else if (view->device_type == DL_CUDA && !writable) {
    rc = 1;
  } else if (writable) {
    psb_raise(in->st, PS_INVALID,
              "%s is written in place and so must be C-contiguous, aligned and in native byte "
              "order; give "
              "a contiguous tensor and copy it back afterwards",
              in->name);
  } else {
    rc = copy_aside(in);
  }
out:
  return rc;
}
