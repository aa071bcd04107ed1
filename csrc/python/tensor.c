/* tensor.c - tensors that the binding hands out: our own Tensor, or one of the caller's kind.
 *
 * The types of program and runs call psb_tensor_new and psb_tensor_like for every result and for
 * what a denoiser is given.  Memory sits in a block that counts its users, so that a consumer on
 * any thread lets go of it without the GIL, also when Python is gone.
 */
#define PSB_IMPORT_NUMPY
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "intake.h"

/* ---- memory ---------------------------------------------------------------------------------- */

enum { ALIGNMENT = 64 }; /* a cache line; JAX copies what is aligned to less */

typedef struct block {
  atomic_size_t users;
  void *data; /* aligned, behind this header */
} block;

static block *block_new(size_t bytes, const void *data)
{
  block *made = NULL;
  uintptr_t address;

  if (bytes <= PTRDIFF_MAX - sizeof *made - ALIGNMENT)
    made = malloc(sizeof *made + ALIGNMENT + bytes);
  if (made) {
    address = (uintptr_t)(made + 1) + ALIGNMENT - 1;
    made->data = (void *)(address - address % ALIGNMENT);
    atomic_init(&made->users, 1);
    if (data)
      memcpy(made->data, data, bytes);
  } else {
    PyErr_NoMemory();
  }
  return made;
}

static block *block_retain(block *shared)
{
  atomic_fetch_add_explicit(&shared->users, 1, memory_order_relaxed);
  return shared;
}

/* The last user frees: it must see what the others wrote before they let go. */
static void block_release(block *shared)
{
  if (atomic_fetch_sub_explicit(&shared->users, 1, memory_order_acq_rel) == 1)
    free(shared);
}

/* ---- the Tensor type ------------------------------------------------------------------------- */

/* Nothing in it changes after creation and it refers to no object but its type, so it needs neither
 * a lock nor the garbage collector. */
typedef struct tensor {
  PyObject head;
  block *block;
  ps_dtype dtype;
  int ndim;
  size_t count;
  Py_ssize_t shape[PSB_DIMS_MAX];
  Py_ssize_t strides[PSB_DIMS_MAX]; /* bytes */
} tensor;

const char *psb_dtype_name(ps_dtype dtype)
{
  const char *name = "none";

  switch (dtype) {
  case PS_NONE: break;
  case PS_F32: name = "float32"; break;
  case PS_F16: name = "float16"; break;
  case PS_BF16: name = "bfloat16"; break;
  case PS_F64: name = "float64"; break;
  }
  return name;
}

/* Elements of a shape that the binding itself computed; an error is raised all the same. */
static int check_shape(psb_state *st, ps_dtype dtype, int ndim, const int64_t *shape, size_t *count)
{
  int rc = -1;

  if (ps_dtype_size(dtype) == 0)
    psb_raise(st, PS_DTYPE, "a tensor needs a dtype");
  else if (ndim < 0 || ndim > PSB_DIMS_MAX)
    psb_raise(st, PS_SHAPE, "a tensor has from 0 to %d dimensions, not %d", PSB_DIMS_MAX, ndim);
  else if (!psb__count(ndim, shape, ps_dtype_size(dtype), count))
    psb_raise(st, PS_SHAPE, "a tensor of this shape does not fit in memory");
  else
    rc = 0;
  return rc;
}

PyObject *psb_tensor_new(psb_state *st, ps_dtype dtype, int ndim, const int64_t *shape,
                         const void *data)
{
  tensor *self = NULL;
  block *memory = NULL;
  size_t count;
  Py_ssize_t stride = (Py_ssize_t)ps_dtype_size(dtype);

  if (check_shape(st, dtype, ndim, shape, &count) < 0)
    goto out;
  memory = block_new(count * ps_dtype_size(dtype), data);
  if (!memory)
    goto out;
  self = PyObject_New(tensor, st->tensor_type);
  if (!self) {
    block_release(memory);
    goto out;
  }
  self->block = memory;
  self->dtype = dtype;
  self->ndim = ndim;
  self->count = count;
  for (int d = ndim - 1; d >= 0; d--) {
    self->shape[d] = (Py_ssize_t)shape[d];
    self->strides[d] = stride;
    stride *= shape[d] > 1 ? (Py_ssize_t)shape[d] : 1;
  }
out:
  return (PyObject *)self;
}

static void tensor_dealloc(PyObject *obj)
{
  PyTypeObject *type = Py_TYPE(obj);

  block_release(((tensor *)obj)->block);
  type->tp_free(obj);
  Py_DECREF(type);
}

void *psb_tensor_data(PyObject *obj)
{
  return ((tensor *)obj)->block->data;
}

void psb__tensor_describe(PyObject *obj, psb_view *view)
{
  tensor *self = (tensor *)obj;

  view->data = self->block->data;
  view->dtype = self->dtype;
  view->ndim = self->ndim;
  for (int d = 0; d < self->ndim; d++)
    view->shape[d] = self->shape[d];
}

static PyObject *tensor_get_shape(PyObject *obj, void *Py_UNUSED(closure))
{
  tensor *self = (tensor *)obj;
  PyObject *shape = PyTuple_New(self->ndim);

  for (int d = 0; d < self->ndim && shape; d++) {
    PyObject *size = PyLong_FromSsize_t(self->shape[d]);
    if (size)
      PyTuple_SET_ITEM(shape, d, size);
    else
      Py_CLEAR(shape);
  }
  return shape;
}

static PyObject *tensor_get_dtype(PyObject *obj, void *Py_UNUSED(closure))
{
  return PyUnicode_FromString(psb_dtype_name(((tensor *)obj)->dtype));
}

static PyObject *tensor_get_ndim(PyObject *obj, void *Py_UNUSED(closure))
{
  return PyLong_FromLong(((tensor *)obj)->ndim);
}

static size_t tensor_bytes(const tensor *self)
{
  return self->count * ps_dtype_size(self->dtype);
}

static PyObject *tensor_get_nbytes(PyObject *obj, void *Py_UNUSED(closure))
{
  return PyLong_FromSize_t(tensor_bytes((tensor *)obj));
}

static PyObject *tensor_repr(PyObject *obj)
{
  PyObject *shape = tensor_get_shape(obj, NULL), *text = NULL;

  if (shape)
    text = PyUnicode_FromFormat("parastep.Tensor(shape=%R, dtype='%s')", shape,
                                psb_dtype_name(((tensor *)obj)->dtype));
  Py_XDECREF(shape);
  return text;
}

/* ---- buffer protocol ------------------------------------------------------------------------- */

static char *buffer_format(ps_dtype dtype)
{
  char *format = NULL;

  switch (dtype) {
  case PS_F32: format = "f"; break;
  case PS_F16: format = "e"; break;
  case PS_F64: format = "d"; break;
  default: break;
  }
  return format;
}

/* Fortran order is also C order where at most one dimension is longer than 1. */
static bool is_fortran(const tensor *self)
{
  int longer = 0;

  for (int d = 0; d < self->ndim; d++)
    longer += self->shape[d] > 1;
  return longer < 2 || self->count == 0;
}

static int tensor_get_buffer(PyObject *obj, Py_buffer *buffer, int flags)
{
  tensor *self = (tensor *)obj;
  bool fortran = (flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS;
  bool shaped = flags & PyBUF_ND;
  int rc = -1;

  buffer->obj = NULL;
  if (!buffer_format(self->dtype)) {
    PyErr_SetString(PyExc_BufferError, "buffers have no format for bfloat16; take the tensor in "
                                       "through DLPack, with torch.from_dlpack(tensor)");
    goto out;
  }
  if (fortran && !is_fortran(self)) {
    PyErr_SetString(PyExc_BufferError, "the tensor is C-contiguous, not Fortran-contiguous");
    goto out;
  }
  buffer->buf = self->block->data;
  buffer->obj = Py_NewRef(obj);
  buffer->len = (Py_ssize_t)tensor_bytes(self);
  buffer->itemsize = (Py_ssize_t)ps_dtype_size(self->dtype);
  buffer->readonly = 0;
  buffer->ndim = shaped ? self->ndim : 1;
  buffer->format = flags & PyBUF_FORMAT ? buffer_format(self->dtype) : NULL;
  buffer->shape = shaped ? self->shape : NULL;
  buffer->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? self->strides : NULL;
  buffer->suboffsets = NULL;
  buffer->internal = NULL;
  rc = 0;
out:
  return rc;
}

/* ---- DLPack out ------------------------------------------------------------------------------ */

/* What a consumer gets: a managed tensor of either kind, with room for what it points to. */
typedef struct exported {
  union {
    dl_managed old;
    dl_versioned versioned;
  } managed; /* first, so that the address of a managed tensor is that of its exported */
  block *block;
  int64_t shape[PSB_DIMS_MAX];
  int64_t strides[PSB_DIMS_MAX]; /* elements */
} exported;

static void export_free(exported *self)
{
  block_release(self->block);
  free(self);
}

static void delete_old(dl_managed *managed)
{
  export_free((exported *)managed);
}

static void delete_versioned(dl_versioned *managed)
{
  export_free((exported *)managed);
}

static void describe(const tensor *self, exported *out, dl_tensor *described)
{
  int64_t element = (int64_t)ps_dtype_size(self->dtype);

  for (int d = 0; d < self->ndim; d++) {
    out->shape[d] = self->shape[d];
    out->strides[d] = self->strides[d] / element;
  }
  *described = (dl_tensor){
      .data = self->count > 0 ? out->block->data : NULL,
      .device = {.type = DL_CPU, .id = 0},
      .ndim = self->ndim,
      .dtype = {.code = self->dtype == PS_BF16 ? DL_BFLOAT : DL_FLOAT,
                .bits = (uint8_t)(8 * element),
                .lanes = 1},
      .shape = out->shape,
      .strides = out->strides,
  };
}

/* A managed tensor on self's memory, or on a copy of it.  The caller owns it. */
static exported *export_new(const tensor *self, bool versioned, bool copy)
{
  exported *out = calloc(1, sizeof *out);

  if (!out) {
    PyErr_NoMemory();
    goto out;
  }
  out->block = copy ? block_new(tensor_bytes(self), self->block->data) : block_retain(self->block);
  if (!out->block)
    goto fail_export;
  if (versioned) {
    out->managed.versioned.version = (dl_version){.major = DL_MAJOR, .minor = DL_MINOR};
    out->managed.versioned.deleter = delete_versioned;
    out->managed.versioned.flags = copy ? DL_IS_COPIED : 0;
    describe(self, out, &out->managed.versioned.tensor);
  } else {
    out->managed.old.deleter = delete_old;
    describe(self, out, &out->managed.old.tensor);
  }
  goto out;

fail_export:
  free(out);
  out = NULL;
out:
  return out;
}

/* A consumer renames the capsule and runs the deleter itself; otherwise it falls to us. */
static void capsule_destroy(PyObject *capsule)
{
  const char *name = PyCapsule_GetName(capsule);

  if (name && (strcmp(name, "dltensor_versioned") == 0 || strcmp(name, "dltensor") == 0))
    export_free(PyCapsule_GetPointer(capsule, name));
}

static PyObject *export_capsule(const tensor *self, bool versioned, bool copy)
{
  const char *name = versioned ? "dltensor_versioned" : "dltensor";
  exported *out = export_new(self, versioned, copy);
  PyObject *capsule = NULL;

  if (out) {
    capsule = PyCapsule_New(out, name, capsule_destroy);
    if (!capsule)
      export_free(out);
  }
  return capsule;
}

/* A pair of integers, as DLPack writes versions and devices; enumerations are integers too. */
static int read_pair(PyObject *obj, const char *name, long *first, long *second)
{
  int rc = -1;

  if (!PyTuple_Check(obj) || PyTuple_GET_SIZE(obj) != 2) {
    PyErr_Format(PyExc_TypeError, "%s must be None or a tuple of two integers", name);
    goto out;
  }
  *first = PyLong_AsLong(PyTuple_GET_ITEM(obj, 0));
  if (*first == -1 && PyErr_Occurred())
    goto out;
  *second = PyLong_AsLong(PyTuple_GET_ITEM(obj, 1));
  if (*second == -1 && PyErr_Occurred())
    goto out;
  rc = 0;
out:
  return rc;
}

/* The memory is the CPU's and no work is pending on it.  A stream of -1 says "do not wait". */
static int check_place(PyObject *stream, PyObject *device)
{
  long type = DL_CPU, id = 0;
  int rc = -1;

  if (device != Py_None && read_pair(device, "dl_device", &type, &id) < 0)
    goto out;
  if (type != DL_CPU || id != 0) {
    PyErr_SetString(PyExc_BufferError, "the tensor lies on the CPU and is exported only there");
    goto out;
  }
  if (stream != Py_None && !(PyLong_Check(stream) && PyLong_AsLong(stream) == -1)) {
    if (!PyErr_Occurred())
      PyErr_SetString(PyExc_BufferError, "stream must be None for a tensor on the CPU");
    goto out;
  }
  rc = 0;
out:
  return rc;
}

static PyObject *tensor_dlpack(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"stream", "max_version", "dl_device", "copy", NULL};
  PyObject *stream = Py_None, *max_version = Py_None, *device = Py_None, *copy = Py_None;
  PyObject *capsule = NULL;
  long major = 0, minor = 0;
  int copied;

  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", keywords, &stream,
                                   &max_version, &device, &copy))
    goto out;
  if (max_version != Py_None && read_pair(max_version, "max_version", &major, &minor) < 0)
    goto out;
  if (check_place(stream, device) < 0)
    goto out;
  copied = PyObject_IsTrue(copy); /* None and False share the memory */
  if (copied >= 0)
    capsule = export_capsule((tensor *)obj, major >= DL_MAJOR, copied);
out:
  return capsule;
}

static PyObject *tensor_dlpack_device(PyObject *Py_UNUSED(obj), PyObject *Py_UNUSED(ignored))
{
  return Py_BuildValue("(ii)", DL_CPU, 0);
}

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

  if (check_shape(st, dtype, ndim, shape, &count) < 0)
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
  exported *out = export_new(ours, true, false);
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

PyObject *psb_tensor_like(psb_state *st, PyObject *like, ps_dtype dtype, int ndim,
                          const int64_t *shape, const void *data, void **writable)
{
  const dl_exchange *api;
  PyObject *ours = NULL, *result = NULL;

  if (PyArray_Check(like)) {
    result = numpy_like(st, (PyArrayObject *)like, dtype, ndim, shape, data, writable);
    goto out;
  }
  ours = psb_tensor_new(st, dtype, ndim, shape, data);
  if (!ours)
    goto out;
  api = psb__exchange(st, like);
  if (api)
    result = through_exchange(st, api, (tensor *)ours);
  else if (Py_IS_TYPE(like, st->tensor_type))
    result = Py_NewRef(ours);
  else
    result = through_module(st, like, (tensor *)ours, writable != NULL);
  if (result && writable)
    *writable = psb_tensor_data(ours);
out:
  Py_XDECREF(ours);
  return result;
}

/* ---- private functions for tests ------------------------------------------------------------- */

static int read_dtype(psb_state *st, const char *name, ps_dtype *dtype)
{
  *dtype = PS_NONE;
  for (ps_dtype known = PS_F32; known <= PS_F64; known++)
    if (strcmp(name, psb_dtype_name(known)) == 0)
      *dtype = known;
  if (*dtype == PS_NONE)
    psb_raise(st, PS_DTYPE, "unknown dtype '%s'", name);
  return *dtype == PS_NONE ? -1 : 0;
}

static PyObject *probe_roundtrip(PyObject *module, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"", "writable", "name", NULL};
  psb_state *st = PyModule_GetState(module);
  const char *name = "x";
  PyObject *obj, *result = NULL;
  psb_view view = {0};
  int writable = 0;

  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|ps:_roundtrip", keywords, &obj, &writable,
                                   &name) ||
      psb_view_from(st, obj, name, writable ? PSB_WRITABLE : PSB_READ, &view) < 0)
    goto out;
  result = psb_tensor_new(st, view.dtype, view.ndim, view.shape, view.data);
  if (result && writable && view.count > 0)
    memset(view.data, 0, view.bytes);
out:
  psb_view_release(&view);
  return result;
}

static PyObject *probe_like(PyObject *module, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"", "dtype", NULL};
  psb_state *st = PyModule_GetState(module);
  const char *name = NULL;
  PyObject *obj, *result = NULL;
  psb_view view = {0};
  ps_dtype dtype;
  void *memory;

  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|z:_like", keywords, &obj, &name) ||
      psb_view_from(st, obj, "x", PSB_READ, &view) < 0)
    goto out;
  dtype = view.dtype;
  if (name && read_dtype(st, name, &dtype) < 0)
    goto out;
  /* Another dtype comes out as zeros, written after the tensor was made. */
  result = psb_tensor_like(st, obj, dtype, view.ndim, view.shape,
                           dtype == view.dtype ? view.data : NULL, &memory);
  if (result && dtype != view.dtype)
    memset(memory, 0, view.count * ps_dtype_size(dtype));
out:
  psb_view_release(&view);
  return result;
}

static PyObject *probe_view(PyObject *module, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"", "writable", NULL};
  psb_state *st = PyModule_GetState(module);
  PyObject *obj, *result = NULL, *address = NULL;
  psb_view view = {0};
  int writable = 0;

  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|p:_view", keywords, &obj, &writable) ||
      psb_view_from(st, obj, "x", writable ? PSB_WRITABLE : PSB_READ, &view) < 0)
    goto out;
  address = PyLong_FromVoidPtr(view.data);
  if (address)
    result = Py_BuildValue("(OsniOO)", address, psb_dtype_name(view.dtype), (Py_ssize_t)view.count,
                           view.ndim, view.readonly ? Py_True : Py_False,
                           view.copied ? Py_True : Py_False);
out:
  Py_XDECREF(address);
  psb_view_release(&view);
  return result;
}

#define WITH_KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))

PyMethodDef psb_tensor_methods[] = {
    {"_roundtrip", WITH_KEYWORDS(probe_roundtrip), METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("_roundtrip($module, tensor, /, writable=False, name='x')\n--\n\n"
               "A Tensor with a copy of the elements.  With writable the tensor itself is zeroed "
               "afterwards.  For tests.")},
    {"_like", WITH_KEYWORDS(probe_like), METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("_like($module, tensor, /, dtype=None)\n--\n\n"
               "A copy of the same kind; zeros where another dtype is named.  For tests.")},
    {"_view", WITH_KEYWORDS(probe_view), METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("_view($module, tensor, /, writable=False)\n--\n\n"
               "(address, dtype, count, ndim, readonly, copied) of what the core would read.  For "
               "tests.")},
    {NULL, NULL, 0, NULL},
};

/* ---- making the type ------------------------------------------------------------------------- */

static PyMethodDef tensor_methods[] = {
    {"__dlpack__", WITH_KEYWORDS(tensor_dlpack), METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n"
               "--\n\nA DLPack capsule on the tensor's memory, or on a copy of it.")},
    {"__dlpack_device__", tensor_dlpack_device, METH_NOARGS,
     PyDoc_STR("__dlpack_device__($self, /)\n--\n\n(1, 0), the CPU.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef tensor_getset[] = {
    {"shape", tensor_get_shape, NULL, PyDoc_STR("Sizes, a tuple of int."), NULL},
    {"dtype", tensor_get_dtype, NULL, PyDoc_STR("'float32', 'float16', 'bfloat16' or 'float64'."),
     NULL},
    {"ndim", tensor_get_ndim, NULL, PyDoc_STR("Number of dimensions."), NULL},
    {"nbytes", tensor_get_nbytes, NULL, PyDoc_STR("Bytes of all elements."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot tensor_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("A C-contiguous tensor in host memory.  torch.from_dlpack and "
                                  "numpy.asarray share its memory.")},
    {Py_tp_dealloc, tensor_dealloc},
    {Py_tp_repr, tensor_repr},
    {Py_tp_methods, tensor_methods},
    {Py_tp_getset, tensor_getset},
    {Py_bf_getbuffer, tensor_get_buffer},
    {0, NULL},
};

static PyType_Spec tensor_spec = {
    .name = "parastep.Tensor",
    .basicsize = sizeof(tensor),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = tensor_slots,
};

static int make_names(struct psb_names *names)
{
  names->dlpack = PyUnicode_InternFromString("__dlpack__");
  names->exchange_api = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  names->exchange_api_old = PyUnicode_InternFromString("__c_dlpack_exchange_api__");
  names->is_neg = PyUnicode_InternFromString("is_neg");
  names->requires_grad = PyUnicode_InternFromString("requires_grad");
  names->detach = PyUnicode_InternFromString("detach");
  names->array_namespace = PyUnicode_InternFromString("__array_namespace__");
  names->module = PyUnicode_InternFromString("__module__");
  names->from_dlpack = PyUnicode_InternFromString("from_dlpack");
  names->max_version = Py_BuildValue("(s)", "max_version");
  names->version = Py_BuildValue("(ii)", DL_MAJOR, DL_MINOR);
  return PyErr_Occurred() ? -1 : 0;
}

int psb_tensor_add_types(PyObject *module, psb_state *st)
{
  int rc = -1;

  if (PyArray_ImportNumPyAPI() < 0 || make_names(&st->names) < 0)
    goto out;
  st->tensor_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &tensor_spec, NULL);
  if (st->tensor_type)
    rc = PyModule_AddType(module, st->tensor_type);
out:
  return rc;
}

int psb_tensor_traverse(psb_state *st, visitproc visit, void *arg)
{
  Py_VISIT(st->tensor_type);
  return 0;
}

/* The names are strings and tuples of them: in no cycle, so only clear needs to know them. */
void psb_tensor_clear(psb_state *st)
{
  struct psb_names *names = &st->names;

  Py_CLEAR(st->tensor_type);
  Py_CLEAR(names->dlpack);
  Py_CLEAR(names->exchange_api);
  Py_CLEAR(names->exchange_api_old);
  Py_CLEAR(names->is_neg);
  Py_CLEAR(names->requires_grad);
  Py_CLEAR(names->detach);
  Py_CLEAR(names->array_namespace);
  Py_CLEAR(names->module);
  Py_CLEAR(names->from_dlpack);
  Py_CLEAR(names->max_version);
  Py_CLEAR(names->version);
}
