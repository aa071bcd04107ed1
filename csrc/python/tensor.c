/* tensor.c - our own Tensor: its Python type and its buffer.
 *
 * like.c makes one for the caller's library to take over, or for a caller whose library cannot;
 * probe.c makes them for tests.
 */
#include "block.h"

/* ---- the Tensor type ------------------------------------------------------------------------- */

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

/* Elements of a shape that the binding itself computed; an error is raised all the same. */
int psb__check_shape(psb_state *st, ps_dtype dtype, int ndim, const int64_t *shape, size_t *count)
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

PyObject *psb_tensor_new(psb_state *st, const psb_place *place, ps_dtype dtype, int ndim,
                         const int64_t *shape, const void *data)
{
  tensor *self = NULL;
  block *memory = NULL;
  size_t count;
  Py_ssize_t stride = (Py_ssize_t)ps_dtype_size(dtype);

  if (psb__check_shape(st, dtype, ndim, shape, &count) < 0)
    goto out;
  memory = psb__wanted_device(place) >= 0
               ? psb__block_at(st, place, count * ps_dtype_size(dtype), data)
               : psb__block_new(count * ps_dtype_size(dtype), data);
  if (!memory)
    goto out;
  self = PyObject_New(tensor, st->tensor_type);
  if (!self) {
    psb__block_release(memory);
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

  psb__block_release(((tensor *)obj)->block);
  type->tp_free(obj);
  Py_DECREF(type);
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
  return PyUnicode_FromString(ps_dtype_name(((tensor *)obj)->dtype));
}

static PyObject *tensor_get_ndim(PyObject *obj, void *Py_UNUSED(closure))
{
  return PyLong_FromLong(((tensor *)obj)->ndim);
}

static PyObject *tensor_get_nbytes(PyObject *obj, void *Py_UNUSED(closure))
{
  return PyLong_FromSize_t(psb__tensor_bytes((tensor *)obj));
}

static PyObject *tensor_repr(PyObject *obj)
{
  PyObject *shape = tensor_get_shape(obj, NULL), *text = NULL;

  if (shape && psb__block_device(((tensor *)obj)->block) >= 0)
    text = PyUnicode_FromFormat("parastep.Tensor(shape=%R, dtype='%s', device='cuda:%d')", shape,
                                ps_dtype_name(((tensor *)obj)->dtype),
                                psb__block_device(((tensor *)obj)->block));
  else if (shape)
    text = PyUnicode_FromFormat("parastep.Tensor(shape=%R, dtype='%s')", shape,
                                ps_dtype_name(((tensor *)obj)->dtype));
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
  if (psb__block_device(self->block) >= 0) {
    PyErr_SetString(PyExc_BufferError,
                    "the tensor is in the memory of a device; take it in through "
                    "DLPack, with torch.from_dlpack(tensor)");
    goto out;
  }
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
  buffer->len = (Py_ssize_t)psb__tensor_bytes(self);
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

/* ---- making the type ------------------------------------------------------------------------- */

static PyMethodDef tensor_methods[] = {
    {"__dlpack__", PSB_KEYWORDS(psb__tensor_dlpack), METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n"
               "--\n\nA DLPack capsule on the tensor's memory, or on a copy of it.")},
    {"__dlpack_device__", psb__tensor_dlpack_device, METH_NOARGS,
     PyDoc_STR("__dlpack_device__($self, /)\n--\n\n(1, 0), the CPU, or (2, n), a CUDA device.")},
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
    {Py_tp_doc, (void *)PyDoc_STR("A C-contiguous tensor.  torch.from_dlpack and, on the CPU, "
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

int psb_tensor_add_type(PyObject *module, psb_state *st)
{
  st->tensor_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &tensor_spec, NULL);
  return st->tensor_type != NULL ? PyModule_AddType(module, st->tensor_type) : -1;
}
