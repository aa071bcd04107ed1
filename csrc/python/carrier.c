/* carrier.c - links to another process: a callable as a carrier, and Inbox; or a Pair.
 *
 * leader_life.c opens the leader's ends of ranks in other processes with it; there `join` opens the
 * follower's end.  Whatever moves the bytes of a callable (a pipe, torch.distributed, MPI) is
 * Python's business.
 */
#include "ends.h"

typedef struct inbox_object {
  PyObject_HEAD psb_guard guard;
  ps_inbox *inbox;
} inbox_object;

/* ---- sending --------------------------------------------------------------------------------- */

static PyObject *join_parts(const ps_part *parts, int count)
{
  Py_ssize_t total = 0;
  for (int k = 0; k < count; ++k) {
    total += (Py_ssize_t)parts[k].bytes;
  }
  PyObject *message = PyBytes_FromStringAndSize(NULL, total);
  char *to = message != NULL ? PyBytes_AS_STRING(message) : NULL;
  for (int k = 0; to != NULL && k < count; ++k) {
    memcpy(to, parts[k].data, parts[k].bytes);
    to += parts[k].bytes;
  }
  return message;
}

/* Called by the core, mostly without the GIL.  An exception that is on its way (a check of a wait
 * raised KeyboardInterrupt) stays; one that send raises is what makes the message lost. */
static ps_status carry(void *ctx, const ps_part *parts, int count)
{
  PyObject *type, *value, *traceback;
  PyGILState_STATE gil = PyGILState_Ensure();
  PyErr_Fetch(&type, &value, &traceback);
  PyObject *message = join_parts(parts, count);
  PyObject *done = message != NULL ? PyObject_CallOneArg(ctx, message) : NULL;
  ps_status status = done != NULL ? PS_OK : PS_LOST;
  Py_XDECREF(message);
  Py_XDECREF(done);
  if (type == NULL && PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) {
    status = PS_INTERRUPTED; /* stays set: what the call raises */
  } else {
    PyErr_Clear();
    PyErr_Restore(type, value, traceback);
  }
  PyGILState_Release(gil);
  return status;
}

static void let_go(void *ctx)
{
  PyGILState_STATE gil = PyGILState_Ensure();
  Py_DECREF((PyObject *)ctx);
  PyGILState_Release(gil);
}

/* ---- Inbox ----------------------------------------------------------------------------------- */

static PyObject *host_open(psb_state *st, const psb_place *place, const psb_spec *spec, int slots,
                           ps_role role, PyObject *send, int same_clock, ps_link **end)
{
  inbox_object *self = (inbox_object *)st->inbox_type->tp_alloc(st->inbox_type, 0);
  if (self == NULL) {
    return NULL;
  }
  self->guard = psb__guard_new();
  ps_carrier calls = {carry, let_go, Py_NewRef(send)};
  ps_status status = ps_host_open(&spec->layout, slots, role, same_clock, place->backend, &calls,
                                  end, &self->inbox);
  if (psb__judge(st, status) < 0) {
    Py_CLEAR(self);
  }
  return (PyObject *)self;
}

static void inbox_dealloc(PyObject *obj)
{
  inbox_object *self = (inbox_object *)obj;
  PyTypeObject *type = Py_TYPE(obj);
  if (psb__at_home(&self->guard)) {
    ps_inbox_release(self->inbox);
  }
  type->tp_free(obj);
  Py_DECREF(type);
}

static PyObject *inbox_deliver(PyObject *obj, PyObject *arg)
{
  inbox_object *self = (inbox_object *)obj;
  Py_buffer message;
  if (PyObject_GetBuffer(arg, &message, PyBUF_SIMPLE) < 0) {
    return NULL;
  }
  ps_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ps_inbox_deliver(self->inbox, message.buf, (size_t)message.len);
  Py_END_ALLOW_THREADS;
  PyBuffer_Release(&message);
  return psb__judge(psb_state_of(Py_TYPE(obj)), status) == 0 ? Py_NewRef(Py_None) : NULL;
}

static PyObject *end_inbox(PyObject *obj, PyObject *reason, void (*end)(ps_inbox *, const char *))
{
  const char *why = PyUnicode_AsUTF8(reason);
  if (why == NULL) {
    return NULL;
  }
  Py_BEGIN_ALLOW_THREADS;
  end(((inbox_object *)obj)->inbox, why);
  Py_END_ALLOW_THREADS;
  return Py_NewRef(Py_None);
}

static PyObject *inbox_lost(PyObject *obj, PyObject *reason)
{
  return end_inbox(obj, reason, ps_inbox_lost);
}

static PyObject *inbox_failed(PyObject *obj, PyObject *reason)
{
  return end_inbox(obj, reason, ps_inbox_failed);
}

static PyMethodDef inbox_methods[] = {
    {"deliver", inbox_deliver, METH_O,
     "deliver($self, message, /)\n--\n\n"
     "Hands in a message of the other end.  ProtocolError: it does not fit, and the rank is lost."},
    {"lost", inbox_lost, METH_O,
     "lost($self, reason, /)\n--\n\nNothing more will come: the other process is gone."},
    {"failed", inbox_failed, METH_O,
     "failed($self, reason, /)\n--\n\nNothing more will come: the other process has said why."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "Where messages of another process are handed in; any thread may."},
    {Py_tp_dealloc, inbox_dealloc},
    {Py_tp_methods, inbox_methods},
    {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "parastep._core.Inbox",
    .basicsize = sizeof(inbox_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = type_slots,
};

int psb_inbox_add_type(PyObject *module, psb_state *st)
{
  st->inbox_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &type_spec, NULL);
  return st->inbox_type != NULL ? PyModule_AddType(module, st->inbox_type) : -1;
}

/* ---- a link of either kind ------------------------------------------------------------------- */

static PyObject *pair_open(psb_state *st, const psb_place *place, const psb_spec *spec, int slots,
                           PyObject *pair, int same_clock, ps_link **end)
{
  ps_pair *found = psb__pair_of(st, pair);
  ps_status status;
  if (found == NULL) {
    return NULL;
  }
  Py_BEGIN_ALLOW_THREADS;
  status = ps_nccl_open(found, place->backend, &spec->layout, slots, end);
  Py_END_ALLOW_THREADS;
  if (psb__judge(st, status) < 0) {
    return NULL;
  }
  (*end)->same_clock = same_clock;
  return Py_NewRef(pair);
}

PyObject *psb__far_open(psb_state *st, const psb_place *place, const psb_spec *spec, int slots,
                        ps_role role, PyObject *carrier, ps_link **end)
{
  PyObject *way;
  int same_clock;
  *end = NULL;
  if (!PyTuple_Check(carrier) || !PyArg_ParseTuple(carrier, "Op", &way, &same_clock)) {
    PyErr_Format(PyExc_TypeError, "carrier: %R: must be (send, same_clock) or (Pair, same_clock)",
                 carrier);
    return NULL;
  }
  return Py_IS_TYPE(way, st->pair_type)
             ? pair_open(st, place, spec, slots, way, same_clock, end)
             : host_open(st, place, spec, slots, role, way, same_clock, end);
}

/* ---- join ------------------------------------------------------------------------------------ */

PyObject *psb_join(PyObject *module, PyObject *args)
{
  psb_state *st = PyModule_GetState(module);
  PyObject *x, *carrier;
  psb_spec spec;
  ps_link *end;
  int rank, slots;
  psb_place place;
  if (!PyArg_ParseTuple(args, "OiiO:join", &x, &rank, &slots, &carrier) ||
      psb__place_open(st, psb__device_of(st, x), &place) < 0) {
    return NULL;
  }
  if (psb__place_enter(st, &place, x) < 0 || psb__spec_from(st, x, &place, &spec) < 0) {
    psb__place_close(&place);
    return NULL;
  }
  PyObject *told = psb__far_open(st, &place, &spec, slots, PS_FOLLOWS, carrier, &end);
  PyObject *follower = told != NULL ? psb__follower_new(st, x, &place, &spec, end, rank) : NULL;
  psb__place_close(&place); /* no more than was taken over */
  if (follower == NULL) {
    Py_XDECREF(told);
    return NULL;
  }
  return Py_BuildValue("(NN)", follower, told);
}
