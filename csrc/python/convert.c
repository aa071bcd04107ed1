/* convert.c - a tensor of the caller becomes a psb_view: plain, aligned, contiguous memory of the
 * host or of a run's device.
 *
 * The types of program and runs call psb_view_from for every tensor argument and psb_view_release
 * when they are done with it.  Each kind of object fills in what it says of itself (NumPy arrays,
 * our Tensor and buffers here, DLPack in dlpack_in.c); settle then judges all of them alike and
 * makes the temporary copy where one is needed.
 */
#include <stdlib.h>
#include <string.h>

#include "intake.h"

/* Copies above this size let other threads run meanwhile. */
enum { LARGE_COPY = 64 * 1024 };

/* ---- memory as the caller laid it out -------------------------------------------------------- */

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

bool psb__count(int ndim, const int64_t *shape, size_t element, size_t *count)
{
  int64_t product = 1;
  bool empty = false, fits = true;

  for (int d = 0; d < ndim; d++) {
    fits = fits && shape[d] >= 0;
    empty = empty || shape[d] == 0;
  }
  for (int d = 0; d < ndim && fits && !empty; d++)
    fits = !__builtin_mul_overflow(product, shape[d], &product);
  fits = fits && (empty || product <= PTRDIFF_MAX / (int64_t)element);
  *count = empty ? 0 : (size_t)product;
  return fits;
}

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
static void gather(const psb_intake *in, char *to)
{
  const psb_view *view = in->view;
  const char *from = view->data;
  size_t element = ps_dtype_size(view->dtype);
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

  if (in->strided)
    gather(in, to);
  else
    memcpy(to, view->data, view->bytes);
  if (in->swapped)
    swap_bytes(to, view->count, ps_dtype_size(view->dtype));
}

/* ---- judging what was filled in -------------------------------------------------------------- */

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

static int settle(psb_intake *in)
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
    psb_raise(in->st, PS_INVALID,
              "%s is not contiguous in the memory of cuda:%d; give %s.contiguous()", in->name,
              view->device_id, in->name);
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

/* ---- NumPy arrays ---------------------------------------------------------------------------- */

/* NumPy has no bfloat16 of its own; ml_dtypes registers one, known by its scalar type's name. */
static bool is_bfloat16(PyArray_Descr *descr)
{
  const char *name = descr->typeobj->tp_name, *dot = strrchr(name, '.');

  return PyTypeNum_ISUSERDEF(descr->type_num) && PyDataType_ELSIZE(descr) == 2 &&
         strcmp(dot ? dot + 1 : name, "bfloat16") == 0;
}

ps_dtype psb__numpy_dtype(PyArray_Descr *descr)
{
  ps_dtype dtype = PS_NONE;

  switch (descr->type_num) {
  case NPY_FLOAT: dtype = PS_F32; break;
  case NPY_HALF: dtype = PS_F16; break;
  case NPY_DOUBLE: dtype = PS_F64; break;
  default: dtype = is_bfloat16(descr) ? PS_BF16 : PS_NONE; break;
  }
  return dtype;
}

static int take_numpy(psb_intake *in, PyArrayObject *array)
{
  psb_view *view = in->view;
  int rc = -1;

  view->dtype = psb__numpy_dtype(PyArray_DESCR(array));
  if (view->dtype == PS_NONE) {
    psb_raise(in->st, PS_DTYPE,
              "%s has dtype %S; give float32, float16, float64 or ml_dtypes.bfloat16", in->name,
              PyArray_DESCR(array));
    goto out;
  }
  if (psb__take_ndim(in, PyArray_NDIM(array)) < 0)
    goto out;
  for (int d = 0; d < view->ndim; d++) {
    view->shape[d] = PyArray_DIM(array, d);
    in->stride[d] = PyArray_STRIDE(array, d);
  }
  in->strided = true;
  in->swapped = PyArray_ISBYTESWAPPED(array);
  view->data = PyArray_DATA(array);
  view->readonly = !PyArray_ISWRITEABLE(array);
  view->device_type = DL_CPU;
  view->owner = Py_NewRef((PyObject *)array);
  rc = 1;
out:
  return rc;
}

/* ---- our Tensor ------------------------------------------------------------------------------ */

static int take_own(psb_intake *in, PyObject *tensor)
{
  psb__tensor_describe(tensor, in->view);
  in->view->owner = Py_NewRef(tensor);
  return psb__check_device(in) == 0 ? 1 : -1;
}

/* ---- the buffer protocol --------------------------------------------------------------------- */

/* One element of the struct module's notation; NULL stands for bytes. */
static ps_dtype buffer_dtype(const char *format, bool *swapped)
{
  const char *letter = format ? format : "B";
  const char other = PY_LITTLE_ENDIAN ? '>' : '<';
  ps_dtype dtype = PS_NONE;

  *swapped = *letter == other || (*letter == '!' && PY_LITTLE_ENDIAN);
  if (*letter && strchr("@=<>!", *letter))
    letter++;
  switch (*letter) {
  case 'f': dtype = PS_F32; break;
  case 'e': dtype = PS_F16; break;
  case 'd': dtype = PS_F64; break;
  default: break;
  }
  return dtype != PS_NONE && letter[1] == '\0' ? dtype : PS_NONE;
}

static int take_buffer(psb_intake *in, PyObject *obj)
{
  psb_view *view = in->view;
  Py_buffer *buffer = &view->buffer;
  int rc = -1;

  /* Read-only is asked for even where we write, so that the refusal can name the argument. */
  if (PyObject_GetBuffer(obj, buffer, PyBUF_RECORDS_RO) < 0)
    goto out;
  view->dtype = buffer_dtype(buffer->format, &in->swapped);
  if (view->dtype == PS_NONE || buffer->itemsize != (Py_ssize_t)ps_dtype_size(view->dtype)) {
    psb_raise(in->st, PS_DTYPE,
              "%s is a buffer of format '%s'; give one of floats, 'f', 'e' or 'd'", in->name,
              buffer->format ? buffer->format : "B");
    goto out;
  }
  if (psb__take_ndim(in, buffer->ndim) < 0)
    goto out;
  /* ctypes leaves strides out even where they are asked for, which means C-contiguous. */
  in->strided = buffer->strides != NULL;
  for (int d = 0; d < view->ndim; d++) {
    view->shape[d] = buffer->shape[d];
    in->stride[d] = in->strided ? buffer->strides[d] : 0;
  }
  view->data = buffer->buf;
  view->readonly = buffer->readonly;
  view->device_type = DL_CPU;
  rc = 1;
out:
  return rc;
}

/* ---- entry points ---------------------------------------------------------------------------- */

/* The kind of object decides how it is asked; what knows its own type is asked before what any type
 * may offer.  1 taken, 0 not a tensor, -1 refused.  A class has the methods of its instances, but
 * no memory. */
static int take(psb_intake *in, PyObject *obj)
{
  int rc;

  if (PyArray_Check(obj))
    rc = take_numpy(in, (PyArrayObject *)obj);
  else if (Py_IS_TYPE(obj, in->st->tensor_type))
    rc = take_own(in, obj);
  else if (PyCapsule_CheckExact(obj))
    rc = psb__take_capsule(in, obj);
  else if (PyType_Check(obj))
    rc = 0;
  else
    rc = psb__take_producer(in, obj);
  if (rc == 0 && PyObject_CheckBuffer(obj))
    rc = take_buffer(in, obj);
  return rc;
}

int psb_view_from(psb_state *st, PyObject *obj, const char *name, int flags, const psb_place *place,
                  psb_view *view)
{
  psb_intake in = {.st = st, .name = name, .flags = flags, .place = place, .view = view};
  int rc = -1, taken;

  memset(view, 0, sizeof *view);
  taken = take(&in, obj);
  if (taken > 0 && view->device_type != DL_CUDA && psb__wanted_device(place) >= 0)
    psb_raise(st, PS_DEVICE, "%s lies on the host, but the run is on cuda:%d; move it there", name,
              place->device);
  else if (taken > 0)
    rc = settle(&in);
  else if (taken == 0)
    psb_raise(
        st, PS_DTYPE,
        "%s is %s %s, not a tensor; give a NumPy array, a torch tensor or another object with "
        "__dlpack__",
        name, PyType_Check(obj) ? "the class" : "of type",
        PyType_Check(obj) ? ((PyTypeObject *)obj)->tp_name : Py_TYPE(obj)->tp_name);
  if (rc < 0)
    psb_view_release(view);
  return rc;
}

void psb_view_release(psb_view *view)
{
  release_source(view);
  free(view->temporary);
  memset(view, 0, sizeof *view);
}
