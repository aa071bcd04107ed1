/* pair.c - Pair: a communicator of NCCL with the rank of another process, as a Python object.
 *
 * Python agrees on the id with the other process and keeps the pair from run to run; carrier.c
 * opens the ends of links over it.
 */
#include "ends.h"

typedef struct pair_object {
  PyObject_HEAD psb_guard guard;
  ps_pair *pair;
} pair_object;

/* ---- finding NCCL ---------------------------------------------------------------------------- */

PyObject *psb_nccl_version(PyObject *module, PyObject *unused)
{
  int version;
  (void)unused;
  Py_BEGIN_ALLOW_THREADS;
  version = ps_nccl_version();
  Py_END_ALLOW_THREADS;
  return version > 0 ? PyLong_FromLong(version)
                     : psb_raise_last(PyModule_GetState(module), PS_UNSUPPORTED);
}

PyObject *psb_nccl_id(PyObject *module, PyObject *unused)
{
  unsigned char id[PS_NCCL_ID_BYTES];
  ps_status status;
  (void)unused;
  Py_BEGIN_ALLOW_THREADS;
  status = ps_nccl_id(id);
  Py_END_ALLOW_THREADS;
  return status == PS_OK ? PyBytes_FromStringAndSize((const char *)id, sizeof id)
                         : psb_raise_last(PyModule_GetState(module), status);
}

/* ---- life ------------------------------------------------------------------------------------ */

/* What the caller's check raises ends the wait, as Ctrl-C does. */
static int check_caller(void *check)
{
  int stop = psb__check_signals(NULL);
  if (!stop && check != Py_None) {
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *answer = PyObject_CallNoArgs(check);
    stop = answer == NULL;
    Py_XDECREF(answer);
    PyGILState_Release(gil);
  }
  return stop;
}

static ps_status connect_pair(const unsigned char *id, ps_role role, int device, double seconds,
                              PyObject *check, ps_pair **pair)
{
  const ps_backend *backend;
  ps_wait wait = {ps_now_ns() + (int64_t)(seconds * 1e9), check_caller, check};
  ps_status status = ps_cuda_open(device, &backend);
  if (status == PS_OK) {
    status = ps_nccl_connect(id, role, backend, &wait, pair);
    backend->release(backend);
  }
  return status;
}

static PyObject *pair_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"id", "leads", "device", "seconds", "check", NULL};
  PyObject *check = Py_None;
  psb_state *st = psb_state_of(type);
  const char *id;
  Py_ssize_t length;
  int leads, device;
  double seconds;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y#pid|O:Pair", keywords, &id, &length, &leads,
                                   &device, &seconds, &check)) {
    return NULL;
  }
  if (length != PS_NCCL_ID_BYTES || !(seconds > 0.0 && seconds < 1e9)) {
    return psb_raise(st, PS_INVALID, "Pair: an id of %zd bytes, or seconds that are not above 0",
                     length);
  }
  pair_object *self = (pair_object *)type->tp_alloc(type, 0);
  if (self == NULL) {
    return NULL;
  }
  self->guard = psb__guard_new();
  ps_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = connect_pair((const unsigned char *)id, leads ? PS_LEADS : PS_FOLLOWS, device, seconds,
                        check, &self->pair);
  Py_END_ALLOW_THREADS;
  if (psb__judge(st, status) < 0) {
    Py_CLEAR(self);
  }
  return (PyObject *)self;
}

static void let_go(pair_object *self)
{
  ps_pair *pair = self->pair;
  self->pair = NULL;
  if (psb__at_home(&self->guard)) {
    Py_BEGIN_ALLOW_THREADS;
    ps_nccl_close(pair);
    Py_END_ALLOW_THREADS;
  }
}

static void pair_dealloc(PyObject *obj)
{
  PyTypeObject *type = Py_TYPE(obj);
  let_go((pair_object *)obj);
  type->tp_free(obj);
  Py_DECREF(type);
}

/* ---- use ------------------------------------------------------------------------------------- */

ps_pair *psb__pair_of(psb_state *st, PyObject *obj)
{
  ps_pair *pair = ((pair_object *)obj)->pair;
  if (pair == NULL) {
    psb_raise(st, PS_INVALID, "the pair is closed");
  }
  return pair;
}

static PyObject *end_pair(PyObject *obj, PyObject *reason, void (*end)(ps_pair *, const char *))
{
  const char *why = PyUnicode_AsUTF8(reason);
  const pair_object *self = (pair_object *)obj;
  if (why == NULL) {
    return NULL;
  }
  if (self->pair != NULL) {
    end(self->pair, why);
  }
  return Py_NewRef(Py_None);
}

static PyObject *pair_lost(PyObject *obj, PyObject *reason)
{
  return end_pair(obj, reason, ps_nccl_lost);
}

static PyObject *pair_failed(PyObject *obj, PyObject *reason)
{
  return end_pair(obj, reason, ps_nccl_failed);
}

/* Not left to the last reference: what a lost run has put into its stream occupies the device. */
static PyObject *pair_close(PyObject *obj, PyObject *unused)
{
  (void)unused;
  let_go((pair_object *)obj);
  return Py_NewRef(Py_None);
}

static PyObject *get_alive(PyObject *obj, void *unused)
{
  const pair_object *self = (pair_object *)obj;
  (void)unused;
  return PyBool_FromLong(self->pair != NULL && ps_nccl_alive(self->pair));
}

/* ---- the type -------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"lost", pair_lost, METH_O,
     "lost($self, reason, /)\n--\n\n"
     "The other process is gone, or the pair has no use any more; any thread may say so."},
    {"failed", pair_failed, METH_O,
     "failed($self, reason, /)\n--\n\n"
     "The other process has said, beside the run, why it cannot go on; any thread may say so."},
    {"close", pair_close, METH_NOARGS,
     "close($self)\n--\n\nGives the communicator back, with the last run that uses it; twice is "
     "fine."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"alive", get_alive, NULL, "Whether it can carry another run.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(pair_doc, "Pair(id, leads, device, seconds, check=None)\n--\n\n"
                       "Waits until the process with the other end of this id has come, seconds "
                       "at most.  device: the\nCUDA device of this end.  check is called now and "
                       "then: what it raises ends the wait.\nDeadlineError, LostError, "
                       "UnsupportedError: there is no pair.");

static PyType_Slot type_slots[] = {
    {Py_tp_doc, (void *)pair_doc}, {Py_tp_new, pair_new},   {Py_tp_dealloc, pair_dealloc},
    {Py_tp_methods, methods},      {Py_tp_getset, getters}, {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "parastep._core.Pair",
    .basicsize = sizeof(pair_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = type_slots,
};

int psb_pair_add_type(PyObject *module, psb_state *st)
{
  st->pair_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &type_spec, NULL);
  return st->pair_type != NULL ? PyModule_AddType(module, st->pair_type) : -1;
}
