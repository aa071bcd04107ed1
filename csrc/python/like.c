/* like.c - a fresh tensor of the caller's own kind: NumPy's, torch's, or of any library with
 * DLPack.
 *
 * Runs call psb_tensor_like for what a denoiser is given and for every result.
 */
#include <string.h>

#include "block.h"
#include "like.h"
#include "lookup.h"
#include "view.h"

/* ---- one of the caller's kind ---------------------------------------------------------------- */

/* NumPy's description of a dtype.  bfloat16 is that of `like`, or of ml_dtypes where it is
 * installed. */
static PyArray_Descr *numpy_descr(psb_state *st, PyArrayObject *like, ps_dtype dtype)
{
  PyArray_Descr *descr = NULL;
  PyObject *module = NULL, *scalar = NULL;

  if (dtype == PS_F32) {
    descr = PyArray_DescrFromType(NPY_FLOAT);
  } else if (dtype == PS_F16) {
    descr = PyArray_DescrFromType(NPY_HALF);
  } else if (dtype == PS_F64) {
    descr = PyArray_DescrFromType(NPY_DOUBLE);
  } else if (psb__numpy_dtype(PyArray_DESCR(like)) == PS_BF16) {
    descr = PyArray_DESCR(like);
    Py_INCREF(descr);
  } else {
    module = PyImport_ImportModule("ml_dtypes");
    scalar = module ? PyObject_GetAttrString(module, "bfloat16") : NULL;
    if (!scalar || PyArray_DescrConverter(scalar, &descr) == NPY_FAIL)
      psb_raise(st, PS_DTYPE, "NumPy has no bfloat16; install ml_dtypes or give torch tensors");
  }
  Py_XDECREF(scalar);
  Py_XDECREF(module);
  return descr;
}

static PyObject *numpy_like(psb_state *st, PyArrayObject *like, ps_dtype dtype, int ndim,
                            const int64_t *shape, const void *data, void **writable)
{
  PyObject *array = NULL;
  PyArray_Descr *descr = NULL;
  npy_intp sizes[PSB_DIMS_MAX];
  size_t count;

  if (psb__check_shape(st, dtype, ndim, shape, &count) < 0)
    goto out;
  for (int d = 0; d < ndim; d++)
    sizes[d] = (npy_intp)shape[d];
  descr = numpy_descr(st, like, dtype);
  if (!descr)
    goto out;
  array = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, sizes, NULL, NULL, 0, NULL); /* steals */
  if (!array)
    goto out;
  if (data)
    memcpy(PyArray_DATA((PyArrayObject *)array), data, count * ps_dtype_size(dtype));
  if (writable)
    *writable = PyArray_DATA((PyArrayObject *)array);
out:
  return array;
}

/* The table's function takes the managed tensor over, also where it fails. */
static PyObject *through_exchange(psb_state *st, const dl_exchange *api, const tensor *ours)
{
  exported *out = psb__export_new(ours, true, false);
  void *object = NULL;

  if (out && (api->managed_to_object(&out->managed.versioned, &object) < 0 || !object)) {
    object = NULL;
    if (!PyErr_Occurred())
      psb_raise(st, PS_INVALID, "the tensor's library failed to take in a result");
  }
  return object;
}

/* The from_dlpack that belongs to a tensor: of its array namespace, else of the package that
 * defines its type.  1 found, 0 none, -1 error. */
static int find_from_dlpack(psb_state *st, PyObject *like, PyObject **function)
{
  PyObject *accessor = NULL, *space = NULL, *path = NULL, *package = NULL;
  int rc = psb__lookup(like, st->names.array_namespace, &accessor);

  if (rc > 0) {
    space = PyObject_CallNoArgs(accessor);
    rc = space ? 1 : -1;
  } else if (rc == 0) {
    rc = psb__lookup((PyObject *)Py_TYPE(like), st->names.module, &path);
    if (rc > 0 && PyUnicode_Check(path)) {
      Py_ssize_t dot = PyUnicode_FindChar(path, '.', 0, PyUnicode_GET_LENGTH(path), 1);
      package = PyUnicode_Substring(path, 0, dot < 0 ? PyUnicode_GET_LENGTH(path) : dot);
      space = package ? PyImport_GetModule(package) : NULL;
      rc = space ? 1 : PyErr_Occurred() ? -1 : 0;
    }
  }
  if (rc > 0)
    rc = psb__lookup(space, st->names.from_dlpack, function);
  Py_XDECREF(package);
  Py_XDECREF(path);
  Py_XDECREF(space);
  Py_XDECREF(accessor);
  return rc;
}

/* ours as the caller's library sees it; ours itself where the library has no way in, or where it
 * copied and the caller wants to write. */
static PyObject *through_module(psb_state *st, PyObject *like, tensor *ours, bool shared)
{
  PyObject *function = NULL, *theirs = NULL;
  int found = find_from_dlpack(st, like, &function);

  if (found > 0)
    theirs = PyObject_CallOneArg(function, (PyObject *)ours);
  else if (found == 0)
    theirs = Py_NewRef((PyObject *)ours);
  if (theirs && shared && atomic_load(&ours->block->users) < 2)
    Py_SETREF(theirs, Py_NewRef((PyObject *)ours));
  Py_XDECREF(function);
  return theirs;
}

/* ---- one of the caller's kind, on a device --------------------------------------------------- */

static void set_error(void *context, const char *kind, const char *message)
{
  psb_raise(context, PS_NO_MEMORY, "the tensor's library gave no memory: %s: %s", kind, message);
}

/* Memory of the library's own allocator, in order of the stream that it works on just now. */
static dl_versioned *allocate(psb_state *st, const dl_exchange *api, const psb_place *place,
                              ps_dtype dtype, int ndim, const int64_t *shape)
{
  int64_t sizes[PSB_DIMS_MAX] = {0}, strides[PSB_DIMS_MAX] = {0}, stride = 1;
  dl_versioned *managed = NULL;
  dl_tensor prototype = {
      .device = {.type = DL_CUDA, .id = place->device},
      .ndim = ndim,
      .dtype = {.code = dtype == PS_BF16 ? DL_BFLOAT : DL_FLOAT,
                .bits = (uint8_t)(8 * ps_dtype_size(dtype)),
                .lanes = 1},
      .shape = sizes,
      .strides = strides,
  };

  for (int d = ndim - 1; d >= 0; d--) {
    sizes[d] = shape[d];
    strides[d] = stride;
    stride *= shape[d] > 1 ? shape[d] : 1;
  }
  if (api->allocate(&prototype, &managed, st, set_error) < 0 || !managed) {
    managed = NULL;
    if (!PyErr_Occurred())
      psb_raise(st, PS_NO_MEMORY, "the tensor's library gave no memory on cuda:%d", place->device);
  }
  return managed;
}

static int copy_at(psb_state *st, const psb_place *place, void *to, const void *from, size_t bytes)
{
  ps_status status;

  Py_BEGIN_ALLOW_THREADS;
  status = place->backend->copy(place->backend, to, from, bytes);
  Py_END_ALLOW_THREADS;
  return psb__judge(st, status);
}

static PyObject *allocated_like(psb_state *st, const dl_exchange *api, const psb_place *place,
                                ps_dtype dtype, int ndim, const int64_t *shape, const void *data,
                                void **writable)
{
  dl_versioned *managed = NULL;
  void *object = NULL, *memory;
  size_t count;

  if (psb__check_shape(st, dtype, ndim, shape, &count) < 0)
    goto out;
  managed = allocate(st, api, place, dtype, ndim, shape);
  if (!managed)
    goto out;
  memory = (char *)managed->tensor.data + managed->tensor.byte_offset;
  if (data && count > 0 && copy_at(st, place, memory, data, count * ps_dtype_size(dtype)) < 0) {
    if (managed->deleter)
      managed->deleter(managed);
    goto out;
  }
  if (api->managed_to_object(managed, &object) < 0 || !object) { /* takes managed over */
    object = NULL;
    if (!PyErr_Occurred())
      psb_raise(st, PS_INVALID, "the tensor's library failed to take in a result");
  } else if (writable) {
    *writable = memory;
  }
out:
  return object;
}

PyObject *psb_tensor_like(psb_state *st, PyObject *like, const psb_place *place, ps_dtype dtype,
                          int ndim, const int64_t *shape, const void *data, void **writable)
{
  bool on_device = psb__wanted_device(place) >= 0;
  const dl_exchange *api;
  PyObject *ours = NULL, *result = NULL;

  if (PyArray_Check(like)) {
    result = numpy_like(st, (PyArrayObject *)like, dtype, ndim, shape, data, writable);
    goto out;
  }
  api = psb__exchange(st, like);
  if (api && on_device) {
    result = allocated_like(st, api, place, dtype, ndim, shape, data, writable);
    goto out;
  }
  ours = psb_tensor_new(st, place, dtype, ndim, shape, data);
  if (!ours)
    goto out;
  if (api)
    result = through_exchange(st, api, (tensor *)ours);
  else if (Py_IS_TYPE(like, st->tensor_type))
    result = Py_NewRef(ours);
  else
    result = through_module(st, like, (tensor *)ours, writable != NULL);
  if (result && writable)
    *writable = ((tensor *)ours)->block->data;
out:
  Py_XDECREF(ours);
  return result;
}
