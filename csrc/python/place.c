/* place.c - where a rank's tensors are: the host, or a CUDA device and the host's stream there.
 *
 * Leader and Follower have a place each and enter it at the beginning of every method, so that work
 * goes to whatever stream the host's library works on in this thread just now.
 */
#include "place.h"
#include "lookup.h"

int psb__place_open(psb_state *st, int device, psb_place *place)
{
  ps_status status = PS_OK;
  *place = (psb_place){.device = device};
  if (device < 0) {
    place->backend = ps_backend_find("cpu");
    return 0;
  }
  Py_BEGIN_ALLOW_THREADS;
  status = ps_cuda_open(device, &place->backend);
  Py_END_ALLOW_THREADS;
  return psb__judge(st, status);
}

void psb__place_close(psb_place *place)
{
  const ps_backend *backend = place->backend;
  place->backend = NULL;
  if (backend != NULL) {
    Py_BEGIN_ALLOW_THREADS;
    backend->release(backend);
    Py_END_ALLOW_THREADS;
  }
}

/* ---- the stream ------------------------------------------------------------------------------ */

/* torch before it had an exchange table. */
static int ask_torch(int device, void **stream)
{
  PyObject *name = PyUnicode_FromString("torch");
  PyObject *module = name ? PyImport_GetModule(name) : NULL;
  PyObject *cuda = module ? PyObject_GetAttrString(module, "cuda") : NULL;
  PyObject *found = cuda ? PyObject_CallMethod(cuda, "current_stream", "i", device) : NULL;
  PyObject *handle = found ? PyObject_GetAttrString(found, "cuda_stream") : NULL;
  int rc = -1;

  if (handle) {
    *stream = PyLong_AsVoidPtr(handle);
    rc = PyErr_Occurred() ? -1 : 0;
  }
  Py_XDECREF(handle);
  Py_XDECREF(found);
  Py_XDECREF(cuda);
  Py_XDECREF(module);
  Py_XDECREF(name);
  return rc;
}

static bool is_of_torch(psb_state *st, PyObject *like)
{
  PyObject *path = NULL;
  bool yes = psb__lookup((PyObject *)Py_TYPE(like), st->names.module, &path) > 0 &&
             PyUnicode_Check(path) && PyUnicode_CompareWithASCIIString(path, "torch") == 0;

  Py_XDECREF(path);
  return yes;
}

/* Tensors of a library that does not say are taken to be in order of the legacy default stream. */
static int current_stream(psb_state *st, PyObject *like, int device, void **stream)
{
  const dl_exchange *api = psb__exchange(st, like);

  *stream = NULL;
  if (api)
    return api->current_stream(DL_CUDA, device, stream);
  return is_of_torch(st, like) ? ask_torch(device, stream) : 0;
}

int psb__place_enter(psb_state *st, psb_place *place, PyObject *like)
{
  ps_status status;
  if (place->device < 0) {
    return 0;
  }
  if (current_stream(st, like, place->device, &place->stream) < 0) {
    return -1;
  }
  Py_BEGIN_ALLOW_THREADS;
  status = ps_cuda_use_stream(place->backend, place->stream);
  Py_END_ALLOW_THREADS;
  return psb__judge(st, status);
}

ps_status psb__place_settle(const psb_place *place)
{
  static const ps_wait interruptible = {0, psb__check_signals, NULL};
  return place->backend->settle(place->backend, &interruptible);
}

/* ---- where a tensor is ----------------------------------------------------------------------- */

static int read_device(dl_device device)
{
  return device.type == DL_CUDA ? device.id : -1;
}

/* A capsule's tensor may be looked at without being taken. */
static int device_of_capsule(PyObject *capsule)
{
  int device = -1;

  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    const dl_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    device = managed->version.major == DL_MAJOR ? read_device(managed->tensor.device) : -1;
  } else if (PyCapsule_IsValid(capsule, "dltensor")) {
    const dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
    device = read_device(managed->tensor.device);
  }
  return device;
}

static int device_of_producer(PyObject *obj)
{
  PyObject *pair = PyObject_CallMethod(obj, "__dlpack_device__", NULL);
  long type = 0, id = -1;

  if (pair && PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2) {
    type = PyLong_AsLong(PyTuple_GET_ITEM(pair, 0));
    id = PyLong_AsLong(PyTuple_GET_ITEM(pair, 1));
  }
  Py_XDECREF(pair);
  PyErr_Clear(); /* what is wrong with it is said when it is taken in */
  return type == DL_CUDA && id >= 0 ? (int)id : -1;
}

static int device_of_exchanged(const dl_exchange *api, PyObject *obj)
{
  dl_versioned *managed = NULL;
  dl_tensor tensor = {0};
  int device = -1;

  if (api->tensor_from_object) {
    device = api->tensor_from_object(obj, &tensor) == 0 ? read_device(tensor.device) : -1;
  } else if (api->managed_from_object(obj, &managed) == 0 && managed) {
    device = managed->version.major == DL_MAJOR ? read_device(managed->tensor.device) : -1;
    if (managed->deleter)
      managed->deleter(managed);
  }
  PyErr_Clear();
  return device;
}

int psb__device_of(psb_state *st, PyObject *obj)
{
  const dl_exchange *api = NULL;

  if (PyArray_Check(obj) || PyType_Check(obj))
    return -1;
  if (PyCapsule_CheckExact(obj))
    return device_of_capsule(obj);
  api = psb__exchange(st, obj);
  return api ? device_of_exchanged(api, obj) : device_of_producer(obj);
}
