/* dlpack_out.c - a Tensor of ours as a DLPack capsule or a managed tensor.
 *
 * tensor.c has its functions as __dlpack__ and __dlpack_device__; like.c hands managed tensors to
 * the caller's own library.
 */
#include <stdlib.h>
#include <string.h>

#include "block.h"

/* ---- DLPack out ------------------------------------------------------------------------------ */

static void export_free(exported *self)
{
  psb__block_release(self->block);
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

static dl_device place_of(const tensor *self)
{
  int device = psb__block_device(self->block);

  return (dl_device){.type = device >= 0 ? DL_CUDA : DL_CPU, .id = device >= 0 ? device : 0};
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
      .device = place_of(self),
      .ndim = self->ndim,
      .dtype = {.code = self->dtype == PS_BF16 ? DL_BFLOAT : DL_FLOAT,
                .bits = (uint8_t)(8 * element),
                .lanes = 1},
      .shape = out->shape,
      .strides = out->strides,
  };
}

/* A managed tensor on self's memory, or on a copy of it.  The caller owns it. */
exported *psb__export_new(const tensor *self, bool versioned, bool copy)
{
  exported *out = calloc(1, sizeof *out);

  if (!out) {
    PyErr_NoMemory();
    goto out;
  }
  out->block = copy ? psb__block_new(psb__tensor_bytes(self), self->block->data)
                    : psb__block_retain(self->block);
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
  exported *out = psb__export_new(self, versioned, copy);
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

/* No work is pending on the memory, so that no stream need wait for it; it is given back behind
 * the one that the consumer names.  1 and 2 are the default streams, -1 says "do not wait". */
static int note_stream(block *shared, PyObject *stream)
{
  long long handle = stream != Py_None ? PyLong_AsLongLong(stream) : 1;

  if (handle == -1 && PyErr_Occurred())
    return -1;
  if (handle == 0) {
    PyErr_SetString(PyExc_BufferError, "stream must not be 0: 1 is the legacy default stream");
    return -1;
  }
  atomic_store(&shared->stream, handle > 2 ? (void *)(intptr_t)handle : NULL);
  return 0;
}

/* Export to where the memory is; a stream of -1 says "do not wait". */
static int check_place(const tensor *self, PyObject *stream, PyObject *device)
{
  dl_device place = place_of(self);
  long type = place.type, id = place.id;
  int rc = -1;

  if (device != Py_None && read_pair(device, "dl_device", &type, &id) < 0)
    goto out;
  if (type != place.type || id != place.id) {
    PyErr_SetString(PyExc_BufferError, place.type == DL_CPU
                                           ? "the tensor lies on the CPU and is exported only there"
                                           : "the tensor is exported only on its own device");
    goto out;
  }
  if (place.type == DL_CUDA) {
    rc = note_stream(self->block, stream);
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

PyObject *psb__tensor_dlpack(PyObject *obj, PyObject *args, PyObject *kwargs)
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
  if (check_place((tensor *)obj, stream, device) < 0)
    goto out;
  copied = PyObject_IsTrue(copy); /* None and False share the memory */
  if (copied > 0 && psb__block_device(((tensor *)obj)->block) >= 0) {
    PyErr_SetString(PyExc_BufferError, "a tensor on a device is exported as it is; copy it there");
    goto out;
  }
  if (copied >= 0)
    capsule = export_capsule((tensor *)obj, major >= DL_MAJOR, copied);
out:
  return capsule;
}

PyObject *psb__tensor_dlpack_device(PyObject *obj, PyObject *Py_UNUSED(ignored))
{
  dl_device place = place_of((tensor *)obj);

  return Py_BuildValue("(ii)", (int)place.type, (int)place.id);
}
