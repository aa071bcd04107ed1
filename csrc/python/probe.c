/* probe.c - private functions of the module through which tests reach views and tensors. */
#include <string.h>

#include "backend/device.h"
#include "like.h"
#include "tensor.h"
#include "view.h"

static int read_dtype(psb_state *st, const char *name, ps_dtype *dtype)
{
  *dtype = PS_NONE;
  for (ps_dtype known = PS_F32; known <= PS_F64; known++)
    if (strcmp(name, ps_dtype_name(known)) == 0)
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
      psb_view_from(st, obj, name, writable ? PSB_WRITABLE : PSB_READ, NULL, &view) < 0)
    goto out;
  result = psb_tensor_new(st, NULL, view.dtype, view.ndim, view.shape, view.data);
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
      psb_view_from(st, obj, "x", PSB_READ, NULL, &view) < 0)
    goto out;
  dtype = view.dtype;
  if (name && read_dtype(st, name, &dtype) < 0)
    goto out;
  /* Another dtype comes out as zeros, written after the tensor was made. */
  result = psb_tensor_like(st, obj, NULL, dtype, view.ndim, view.shape,
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
      psb_view_from(st, obj, "x", writable ? PSB_WRITABLE : PSB_READ, NULL, &view) < 0)
    goto out;
  address = PyLong_FromVoidPtr(view.data);
  if (address)
    result = Py_BuildValue("(OsniOO)", address, ps_dtype_name(view.dtype), (Py_ssize_t)view.count,
                           view.ndim, view.readonly ? Py_True : Py_False,
                           view.copied ? Py_True : Py_False);
out:
  Py_XDECREF(address);
  psb_view_release(&view);
  return result;
}

static PyObject *probe_pinned_idle(PyObject *module, PyObject *unused)
{
  (void)module;
  (void)unused;
  return PyLong_FromLong(ps__pinned_idle());
}

PyMethodDef psb_probe_methods[] = {
    {"_roundtrip", PSB_KEYWORDS(probe_roundtrip), METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("_roundtrip($module, tensor, /, writable=False, name='x')\n--\n\n"
               "A Tensor with a copy of the elements.  With writable the tensor itself is zeroed "
               "afterwards.  For tests.")},
    {"_like", PSB_KEYWORDS(probe_like), METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("_like($module, tensor, /, dtype=None)\n--\n\n"
               "A copy of the same kind; zeros where another dtype is named.  For tests.")},
    {"_view", PSB_KEYWORDS(probe_view), METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("_view($module, tensor, /, writable=False)\n--\n\n"
               "(address, dtype, count, ndim, readonly, copied) of what the core would read.  For "
               "tests.")},
    {"_pinned_idle", probe_pinned_idle, METH_NOARGS,
     PyDoc_STR("_pinned_idle($module)\n--\n\n"
               "Blocks of pinned host memory that no run uses, kept for the next one.  For "
               "tests.")},
    {NULL, NULL, 0, NULL},
};
