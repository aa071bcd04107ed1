/* convert.c - a tensor of the caller becomes a psb_view: plain, aligned, contiguous memory of the
 * host or of a run's device.
 *
 * Runs call psb_view_from for every tensor argument and psb_view_release when they are done with
 * it. Each kind of object fills in what it says of itself (NumPy arrays, our Tensor and buffers
 * here, DLPack in dlpack_in.c); intake.c then judges all of them alike.
 */
#include <string.h>

#include "block.h"
#include "intake.h"

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

static int take_own(psb_intake *in, PyObject *obj)
{
  const tensor *own = (tensor *)obj;
  psb_view *view = in->view;
  int device = psb__block_device(own->block);

  view->data = own->block->data;
  view->device_type = device >= 0 ? DL_CUDA : DL_CPU;
  view->device_id = device >= 0 ? device : 0;
  view->dtype = own->dtype;
  view->ndim = own->ndim;
  for (int d = 0; d < own->ndim; d++)
    view->shape[d] = own->shape[d];
  view->owner = Py_NewRef(obj);
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

/* A contiguous copy by the library that the tensor is of, on its own stream: torch and others have
 * a method, and array namespaces a function.  NULL without an exception where there is neither. */
static PyObject *contiguous_copy(const psb_intake *in, PyObject *obj)
{
  PyObject *method = NULL, *space = NULL, *copy = NULL;
  int rc = psb__lookup(obj, in->st->names.contiguous, &method);

  if (rc > 0) {
    copy = PyObject_CallNoArgs(method);
  } else if (rc == 0 && psb__lookup(obj, in->st->names.array_namespace, &method) > 0) {
    space = PyObject_CallNoArgs(method);
    if (space)
      copy = PyObject_CallMethodOneArg(space, in->st->names.ascontiguousarray, obj);
    if (!copy && PyErr_ExceptionMatches(PyExc_AttributeError))
      PyErr_Clear();
  }
  Py_XDECREF(space);
  Py_XDECREF(method);
  return copy;
}

/* Takes such a copy in where obj lies scattered in a device's memory, which nothing here reads; the
 * view holds the copy until it is released. */
static int take_contiguous(psb_intake *in, PyObject *obj)
{
  int device = in->view->device_id, rc = -1;
  PyObject *copy = contiguous_copy(in, obj);

  if (copy) {
    psb_view_release(in->view);
    in->strided = false;
    rc = take(in, copy) > 0 ? psb__settle(in) : -1;
    Py_DECREF(copy);
  }
  if (rc != 0 && !PyErr_Occurred())
    psb_raise(in->st, PS_INVALID,
              "%s is not contiguous in the memory of cuda:%d; give %s.contiguous()", in->name,
              device, in->name);
  return rc == 0 ? 0 : -1;
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
  else if (taken > 0 && (rc = psb__settle(&in)) > 0)
    rc = take_contiguous(&in, obj);
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
