/* dlpack_in.c - tensors that arrive as DLPack: capsules, __dlpack__, the C exchange API.
 *
 * convert.c calls it for objects of a type it does not know.  A managed tensor belongs to the view
 * from the moment it is taken out of its capsule, before anything about it is judged; so every way
 * out, also a refusal, runs its deleter exactly once.
 */
#include <stdio.h>
#include <string.h>

#include "intake.h"

/* ---- what a DLTensor says -------------------------------------------------------------------- */

/* All take_ functions return 1 when the view is filled, -1 when the tensor was refused. */

static ps_dtype read_dtype(dl_dtype type)
{
  ps_dtype dtype = PS_NONE;

  if (type.lanes != 1)
    dtype = PS_NONE;
  else if (type.code == DL_BFLOAT && type.bits == 16)
    dtype = PS_BF16;
  else if (type.code == DL_FLOAT && type.bits == 16)
    dtype = PS_F16;
  else if (type.code == DL_FLOAT && type.bits == 32)
    dtype = PS_F32;
  else if (type.code == DL_FLOAT && type.bits == 64)
    dtype = PS_F64;
  return dtype;
}

static int refuse_dtype(const psb_intake *in, dl_dtype type)
{
  static const char *const stem[] = {"int", "uint", "float", "handle", "bfloat", "complex"};
  char name[48];

  if (type.code == DL_BOOL)
    snprintf(name, sizeof name, "bool");
  else if (type.code < DL_BOOL)
    snprintf(name, sizeof name, "%s%d", stem[type.code], type.bits);
  else if (type.code <= DL_FLOAT8_LAST)
    snprintf(name, sizeof name, "float8");
  else
    snprintf(name, sizeof name, "(DLPack code %d, %d bits)", type.code, type.bits);
  if (type.lanes == 1)
    psb_raise(in->st, PS_DTYPE, "%s has dtype %s; give float32, float16, bfloat16 or float64",
              in->name, name);
  else
    psb_raise(in->st, PS_DTYPE, "%s has vectors of %d x %s as elements; give plain numbers",
              in->name, type.lanes, name);
  return -1;
}

/* Shape and strides are copied, so that nothing but data outlives the DLTensor. */
static int take_shape(psb_intake *in, const dl_tensor *tensor)
{
  psb_view *view = in->view;
  int64_t element = (int64_t)ps_dtype_size(view->dtype);
  int rc = -1;

  if (psb__take_ndim(in, tensor->ndim) < 0)
    goto out;
  if (view->ndim > 0 && !tensor->shape) {
    psb_raise(in->st, PS_SHAPE, "%s has %d dimensions but no shape", in->name, view->ndim);
    goto out;
  }
  in->strided = tensor->strides != NULL;
  for (int d = 0; d < view->ndim; d++) {
    view->shape[d] = tensor->shape[d];
    if (in->strided && tensor->shape[d] > 1 &&
        __builtin_mul_overflow(tensor->strides[d], element, &in->stride[d]))
      in->stride[d] = INT64_MIN; /* settle refuses it where the stride matters */
  }
  rc = 0;
out:
  return rc;
}

static int take_tensor(psb_intake *in, const dl_tensor *tensor, bool readonly)
{
  psb_view *view = in->view;
  int rc = -1;

  view->device_type = tensor->device.type;
  view->device_id = tensor->device.id;
  if (psb__check_device(in) < 0)
    goto out;
  view->dtype = read_dtype(tensor->dtype);
  if (view->dtype == PS_NONE) {
    rc = refuse_dtype(in, tensor->dtype);
    goto out;
  }
  if (take_shape(in, tensor) < 0)
    goto out;
  view->data = tensor->data ? (char *)tensor->data + tensor->byte_offset : NULL;
  view->readonly = readonly;
  rc = 1;
out:
  return rc;
}

/* ---- managed tensors and their capsules ------------------------------------------------------ */

static void delete_old(void *managed)
{
  dl_managed *old = managed;

  if (old->deleter)
    old->deleter(old);
}

static void delete_versioned(void *managed)
{
  dl_versioned *versioned = managed;

  if (versioned->deleter)
    versioned->deleter(versioned);
}

static int take_old(psb_intake *in, dl_managed *managed)
{
  in->view->managed = managed;
  in->view->delete_managed = delete_old;
  return take_tensor(in, &managed->tensor, false);
}

static int take_versioned(psb_intake *in, dl_versioned *managed)
{
  int rc = -1;

  in->view->managed = managed;
  in->view->delete_managed = delete_versioned;
  if (managed->version.major == DL_MAJOR)
    rc = take_tensor(in, &managed->tensor, managed->flags & DL_READ_ONLY);
  else
    psb_raise(in->st, PS_UNSUPPORTED, "%s comes as DLPack %u.%u; this build reads version %d.x",
              in->name, (unsigned)managed->version.major, (unsigned)managed->version.minor,
              DL_MAJOR);
  return rc;
}

/* Takes the managed tensor out of its capsule.  The name is read and changed under the capsule's
 * lock, so that of two threads only one gets it.  NULL with an exception where it cannot be had. */
static void *claim_capsule(const psb_intake *in, PyObject *capsule, bool *versioned)
{
  const char *name, *used;
  void *managed = NULL;

  PSB_BEGIN_LOCKED(capsule);
  name = PyCapsule_GetName(capsule);
  *versioned = name && strcmp(name, "dltensor_versioned") == 0;
  used = *versioned ? "used_dltensor_versioned" : "used_dltensor";
  if (name && (*versioned || strcmp(name, "dltensor") == 0)) {
    managed = PyCapsule_GetPointer(capsule, name);
    if (managed && PyCapsule_SetName(capsule, used) < 0)
      managed = NULL;
  } else if (name && strncmp(name, "used_dltensor", strlen("used_dltensor")) == 0) {
    psb_raise(in->st, PS_INVALID,
              "%s is a DLPack capsule that was used already; each one can be taken in once",
              in->name);
  } else if (!PyErr_Occurred()) {
    psb_raise(in->st, PS_DTYPE, "%s is a capsule named '%s', not one of DLPack", in->name,
              name ? name : "");
  }
  PSB_END_LOCKED();
  return managed;
}

int psb__take_capsule(psb_intake *in, PyObject *capsule)
{
  bool versioned;
  void *managed = claim_capsule(in, capsule, &versioned);
  int rc = -1;

  if (managed)
    rc = versioned ? take_versioned(in, managed) : take_old(in, managed);
  return rc;
}

/* ---- the C exchange API ---------------------------------------------------------------------- */

/* Without a managed tensor a read costs no allocation; only that one can tell read-only memory.
 * 1 taken, -1 refused, 0 where the producer failed: its __dlpack__ may know better, or say why. */
static int take_exchanged(psb_intake *in, const dl_exchange *api, PyObject *obj)
{
  bool borrow = api->tensor_from_object && !(in->flags & PSB_WRITABLE);
  dl_versioned *managed = NULL;
  dl_tensor tensor = {0};
  int rc;

  if (borrow)
    rc = api->tensor_from_object(obj, &tensor);
  else
    rc = api->managed_from_object(obj, &managed);
  if (rc < 0 || (!borrow && !managed)) {
    rc = !PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_Exception) ? 0 : -1;
    if (rc == 0)
      PyErr_Clear();
  } else if (borrow) {
    in->view->owner = Py_NewRef(obj);
    rc = take_tensor(in, &tensor, false);
  } else {
    rc = take_versioned(in, managed);
  }
  return rc;
}

/* ---- __dlpack__ ------------------------------------------------------------------------------ */

/* What a producer on a device is to put in order: our stream waits for its work.  1 stands for the
 * legacy default stream.  NULL where the host is the place, whose producers have no streams. */
static PyObject *stream_for(const psb_intake *in, PyObject *obj)
{
  if (psb__wanted_device(in->place) < 0 || psb__device_of(in->st, obj) < 0)
    return NULL;
  return in->place->stream ? PyLong_FromVoidPtr(in->place->stream) : PyLong_FromLong(1);
}

/* Producers older than DLPack 1.0 do not know max_version; a TypeError of another origin comes
 * again from the second call. */
static PyObject *call_dlpack(const psb_intake *in, PyObject *obj, PyObject *method)
{
  const struct psb_names *names = &in->st->names;
  PyObject *stream = stream_for(in, obj), *capsule;
  PyObject *arguments[2] = {names->version, stream};

  capsule = PyObject_Vectorcall(method, arguments, 0,
                                stream ? names->max_version_and_stream : names->max_version);
  if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    capsule = PyObject_Vectorcall(method, &arguments[1], 0, stream ? names->stream : NULL);
  }
  Py_XDECREF(stream);
  return capsule;
}

/* 1 taken, 0 obj has no such method, -1 error. */
static int take_exported(psb_intake *in, PyObject *obj)
{
  PyObject *method = NULL, *capsule = NULL;
  int rc = psb__lookup(obj, in->st->names.dlpack, &method);

  if (rc <= 0)
    goto out;
  rc = -1;
  capsule = call_dlpack(in, obj, method);
  if (!capsule) {
    psb_explain(in->st, PS_INVALID, "%s cannot be read: its type %s refuses to export it", in->name,
                Py_TYPE(obj)->tp_name);
  } else if (!PyCapsule_CheckExact(capsule)) {
    psb_raise(in->st, PS_DTYPE, "%s.__dlpack__() returned %s, not a capsule", in->name,
              Py_TYPE(capsule)->tp_name);
  } else {
    rc = psb__take_capsule(in, capsule);
  }
out:
  Py_XDECREF(capsule);
  Py_XDECREF(method);
  return rc;
}

/* ---- what torch keeps beside the memory ------------------------------------------------------ */

/* The truth of an attribute, called first where it is a method; false where there is none. */
static int ask_flag(PyObject *obj, PyObject *name, bool call)
{
  PyObject *value = NULL, *answer = NULL;
  int rc = psb__lookup(obj, name, &value);

  if (rc > 0) {
    answer = call ? PyObject_CallNoArgs(value) : Py_NewRef(value);
    rc = answer ? PyObject_IsTrue(answer) : -1;
  }
  Py_XDECREF(answer);
  Py_XDECREF(value);
  return rc;
}

/* A torch tensor may be a lazy negation of its memory, which no export tells; autograd would not
 * notice a write of ours.  Other libraries have neither attribute. */
static int check_bits(psb_intake *in, PyObject *obj, bool *tracked)
{
  int negated = ask_flag(obj, in->st->names.is_neg, true);
  int grad = negated < 0 ? -1 : ask_flag(obj, in->st->names.requires_grad, false);
  int rc = -1;

  *tracked = grad > 0;
  if (negated > 0)
    psb_raise(in->st, PS_INVALID, "%s is a lazily negated tensor; give %s.resolve_neg()", in->name,
              in->name);
  else if (grad > 0 && (in->flags & PSB_WRITABLE))
    psb_raise(in->st, PS_INVALID,
              "%s is to be written but requires grad, and autograd would not see it; give "
              "%s.detach()",
              in->name, in->name);
  else if (negated == 0 && grad >= 0)
    rc = 0;
  return rc;
}

int psb__take_producer(psb_intake *in, PyObject *obj)
{
  const dl_exchange *api = psb__exchange(in->st, obj);
  PyObject *method = NULL, *source = Py_NewRef(obj);
  bool tracked = false;
  int rc = api ? 1 : psb__lookup(obj, in->st->names.dlpack, &method);

  if (rc > 0)
    rc = check_bits(in, obj, &tracked);
  else
    goto out;
  if (rc == 0 && api)
    rc = take_exchanged(in, api, obj);
  if (rc == 0 && tracked) {
    /* torch's __dlpack__ refuses what requires grad; the same memory without its graph is fine. */
    Py_SETREF(source, PyObject_CallMethodNoArgs(obj, in->st->names.detach));
    rc = source ? 0 : -1;
  }
  if (rc == 0)
    rc = take_exported(in, source);
out:
  Py_XDECREF(source);
  Py_XDECREF(method);
  return rc;
}
