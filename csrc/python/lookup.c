/* lookup.c - what the binding looks up in other libraries: NumPy's functions, attributes by names
 * that are made once, and the C exchange API of DLPack that a tensor's type may offer.
 *
 * module.c loads it; place.c, dlpack_in.c and like.c ask it what the caller's tensors can do.
 */
#define PSB_IMPORT_NUMPY
#include "lookup.h"

/* ---- NumPy's table, names -------------------------------------------------------------------- */

static int make_names(struct psb_names *names)
{
  names->dlpack = PyUnicode_InternFromString("__dlpack__");
  names->exchange_api = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  names->exchange_api_old = PyUnicode_InternFromString("__c_dlpack_exchange_api__");
  names->is_neg = PyUnicode_InternFromString("is_neg");
  names->requires_grad = PyUnicode_InternFromString("requires_grad");
  names->detach = PyUnicode_InternFromString("detach");
  names->contiguous = PyUnicode_InternFromString("contiguous");
  names->ascontiguousarray = PyUnicode_InternFromString("ascontiguousarray");
  names->array_namespace = PyUnicode_InternFromString("__array_namespace__");
  names->module = PyUnicode_InternFromString("__module__");
  names->from_dlpack = PyUnicode_InternFromString("from_dlpack");
  names->max_version = Py_BuildValue("(s)", "max_version");
  names->stream = Py_BuildValue("(s)", "stream");
  names->max_version_and_stream = Py_BuildValue("(ss)", "max_version", "stream");
  names->version = Py_BuildValue("(ii)", DL_MAJOR, DL_MINOR);
  return PyErr_Occurred() ? -1 : 0;
}

int psb_lookup_load(psb_state *st)
{
  return PyArray_ImportNumPyAPI() < 0 ? -1 : make_names(&st->names);
}

/* Strings and tuples of them: in no cycle, so that only clear needs to know them. */
void psb_lookup_clear(psb_state *st)
{
  struct psb_names *names = &st->names;

  Py_CLEAR(names->dlpack);
  Py_CLEAR(names->exchange_api);
  Py_CLEAR(names->exchange_api_old);
  Py_CLEAR(names->is_neg);
  Py_CLEAR(names->requires_grad);
  Py_CLEAR(names->detach);
  Py_CLEAR(names->contiguous);
  Py_CLEAR(names->ascontiguousarray);
  Py_CLEAR(names->array_namespace);
  Py_CLEAR(names->module);
  Py_CLEAR(names->from_dlpack);
  Py_CLEAR(names->max_version);
  Py_CLEAR(names->stream);
  Py_CLEAR(names->max_version_and_stream);
  Py_CLEAR(names->version);
}

/* ---- attributes ------------------------------------------------------------------------------ */

int psb__lookup(PyObject *obj, PyObject *name, PyObject **value)
{
  int rc;

#if PY_VERSION_HEX >= 0x030D0000
  rc = PyObject_GetOptionalAttr(obj, name, value);
#else
  *value = PyObject_GetAttr(obj, name);
  if (*value) {
    rc = 1;
  } else if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
    PyErr_Clear();
    rc = 0;
  } else {
    rc = -1;
  }
#endif
  return rc;
}

/* ---- the C exchange API ---------------------------------------------------------------------- */

/* The table behind one attribute of a type.  Early producers stored a bare address there: an
 * integer is no proof of anything, so it is passed over and __dlpack__ serves them. */
static const dl_exchange *exchange_at(PyObject *type, PyObject *name)
{
  const dl_exchange_header *header = NULL;
  PyObject *capsule;

  if (psb__lookup(type, name, &capsule) <= 0)
    goto out;
  if (PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
    header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  while (header && header->version.major != DL_MAJOR)
    header = header->previous;
  Py_DECREF(capsule);
out:
  PyErr_Clear();
  return (const dl_exchange *)header;
}

const dl_exchange *psb__exchange(psb_state *st, PyObject *obj)
{
  PyObject *type = (PyObject *)Py_TYPE(obj);
  const dl_exchange *api = exchange_at(type, st->names.exchange_api);

  return api ? api : exchange_at(type, st->names.exchange_api_old);
}
