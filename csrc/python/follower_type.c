/* follower_type.c - Follower: a follower's end of a run as a Python object.
 *
 * Leader.follower makes it for the thread that serves the rank: sample's own, or a replica's.  It
 * may be lost at any moment; the run does not need it.
 */
#include "ends.h"

typedef struct follower_object {
  PyObject_HEAD psb_guard guard;
  ps_follower *follower;
  psb_spec spec;
  psb_place place;
  PyObject *like; /* points are tensors of its kind */
  ps_work work;   /* what was taken; count is 0 once it is answered */
  int rank;
} follower_object;

/* Enters a follower that has not left yet; after 0 psb__leave follows. */
static int enter_run(psb_state *st, follower_object *self, const char *what)
{
  if (psb__enter(st, &self->guard, what) < 0) {
    return -1;
  }
  if (self->follower == NULL) {
    psb_raise(st, PS_STATE, "%s: this follower has left the run", what);
    psb__leave(&self->guard);
    return -1;
  }
  return 0;
}

static const ps_wait interruptible = {0, psb__check_signals, NULL};

/* ---- life ------------------------------------------------------------------------------------ */

PyObject *psb__follower_new(psb_state *st, PyObject *like, psb_place *place, const psb_spec *spec,
                            ps_link *link, int rank)
{
  psb_place own = *place;
  place->backend = NULL;
  PyTypeObject *type = st->follower_type;
  follower_object *self = (follower_object *)type->tp_alloc(type, 0);
  ps_follower *follower;
  ps_status status = ps_follower_create(&spec->layout, link, &follower);
  if (self == NULL) {
    ps_follower_destroy(follower);
    psb__place_close(&own);
    return NULL;
  }
  self->place = own;
  self->guard = psb__guard_new();
  self->follower = follower;
  self->spec = *spec;
  self->like = Py_NewRef(like);
  self->rank = rank;
  if (psb__judge(st, status) < 0) {
    Py_CLEAR(self);
  }
  return (PyObject *)self;
}

static int follower_traverse(PyObject *obj, visitproc visit, void *arg)
{
  Py_VISIT(Py_TYPE(obj));
  Py_VISIT(((follower_object *)obj)->like);
  return 0;
}

static int follower_clear(PyObject *obj)
{
  Py_CLEAR(((follower_object *)obj)->like);
  return 0;
}

/* A forked child leaks, as in leader_life.c. */
static void follower_dealloc(PyObject *obj)
{
  follower_object *self = (follower_object *)obj;
  PyTypeObject *type = Py_TYPE(obj);
  PyObject_GC_UnTrack(obj);
  if (psb__at_home(&self->guard)) {
    ps_follower_destroy(self->follower);
    psb__place_close(&self->place);
  }
  follower_clear(obj);
  type->tp_free(obj);
  Py_DECREF(type);
}

/* ---- the turn -------------------------------------------------------------------------------- */

/* Work that is still to be answered stays where the core refuses to give more. */
static ps_status take_work(follower_object *self)
{
  ps_work work;
  ps_status status = ps_follower_next(self->follower, &interruptible, &work);
  if (status == PS_OK) {
    self->work = work;
  }
  return status;
}

static PyObject *follower_next(PyObject *obj, PyObject *unused)
{
  follower_object *self = (follower_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  PyObject *result = NULL;
  ps_status status;
  (void)unused;
  if (enter_run(st, self, "next") < 0) {
    return NULL;
  }
  if (psb__place_enter(st, &self->place, self->like) < 0) {
    goto out;
  }
  Py_BEGIN_ALLOW_THREADS;
  status = take_work(self);
  Py_END_ALLOW_THREADS;
  if (psb__judge(st, status) == 0) {
    result = self->work.count > 0
                 ? psb__work_out(st, self->like, &self->place, &self->spec, &self->work)
                 : Py_NewRef(Py_None);
  }
out:
  psb__leave(&self->guard);
  return result;
}

/* Outputs, and points where they were moved, to where the link keeps them. */
static int fill_work(psb_state *st, follower_object *self, PyObject *outputs, PyObject *points,
                     ps_dtype *dtype)
{
  const ps_work *work = &self->work;
  psb_room output = {"the denoiser's output", PS_NONE, work->count, work->output_bytes,
                     work->output};
  psb_room point = {"points", self->spec.layout.x, work->count, work->point_bytes, work->point};
  ps_dtype point_dtype;
  if (work->count == 0) {
    psb_raise(st, PS_STATE, "submit: no work was taken; call next first");
    return -1;
  }
  if (psb__place_enter(st, &self->place, self->like) < 0 ||
      psb__sequence_in(st, outputs, &self->place, &self->spec, &output, dtype) < 0) {
    return -1;
  }
  return points != NULL
             ? psb__sequence_in(st, points, &self->place, &self->spec, &point, &point_dtype)
             : 0;
}

static PyObject *follower_submit(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"outputs", "points", "began_ns", NULL};
  follower_object *self = (follower_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  PyObject *outputs, *points = NULL;
  ps_dtype dtype = PS_NONE;
  long long began_ns = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OL:submit", keywords, &outputs, &points,
                                   &began_ns) ||
      enter_run(st, self, "submit") < 0) {
    return NULL;
  }
  points = points != Py_None ? points : NULL;
  int failed = fill_work(st, self, outputs, points, &dtype);
  if (failed == 0) {
    ps_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = ps_follower_submit(self->follower, dtype, points != NULL, began_ns);
    Py_END_ALLOW_THREADS;
    self->work.count = 0; /* answered, whatever came of it */
    failed = psb__judge(st, status);
  }
  psb__leave(&self->guard);
  return failed ? NULL : Py_NewRef(Py_None);
}

/* The core waits for a message to answer, if there is none, without a check: so it is taken first.
 */
static ps_status fail_work(follower_object *self, const char *reason)
{
  ps_status status = self->work.count == 0 ? take_work(self) : PS_OK;
  if (status == PS_OK && self->work.count > 0) {
    status = ps_follower_fail(self->follower, reason);
    self->work.count = 0;
  }
  return status == PS_ABANDONED ? PS_OK : status; /* the leader has said it already */
}

static PyObject *follower_fail(PyObject *obj, PyObject *reason)
{
  follower_object *self = (follower_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  const char *text = PyUnicode_AsUTF8(reason);
  ps_status status;
  if (text == NULL || enter_run(st, self, "fail") < 0) {
    return NULL;
  }
  Py_BEGIN_ALLOW_THREADS;
  status = fail_work(self, text);
  Py_END_ALLOW_THREADS;
  int failed = psb__judge(st, status);
  psb__leave(&self->guard);
  return failed ? NULL : Py_NewRef(Py_None);
}

/* Not left to the last reference: a pair has room for one run at a time. */
static PyObject *follower_close(PyObject *obj, PyObject *unused)
{
  follower_object *self = (follower_object *)obj;
  (void)unused;
  if (psb__enter(psb_state_of(Py_TYPE(obj)), &self->guard, "close") < 0) {
    return NULL;
  }
  ps_follower *follower = self->follower;
  self->follower = NULL;
  self->work.count = 0;
  Py_BEGIN_ALLOW_THREADS;
  ps_follower_destroy(follower);
  Py_END_ALLOW_THREADS;
  psb__leave(&self->guard);
  return Py_NewRef(Py_None);
}

static PyObject *get_rank(PyObject *obj, void *unused)
{
  (void)unused;
  return PyLong_FromLong(((follower_object *)obj)->rank);
}

static PyObject *get_company(PyObject *obj, void *unused)
{
  (void)unused;
  return psb__company_of(&((follower_object *)obj)->work);
}

/* ---- the type -------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"next", follower_next, METH_NOARGS,
     "next($self)\n--\n\n"
     "Waits for work: [(step, point), ...] with fresh tensors, or None when the run is over."},
    {"submit", PSB_KEYWORDS(follower_submit), METH_VARARGS | METH_KEYWORDS,
     "submit($self, outputs, points=None, began_ns=0)\n--\n\n"
     "One output a step of the work; points: where they were really evaluated, if the host moved\n"
     "them.  Raises AbandonedError where the leader went on without this rank."},
    {"fail", follower_fail, METH_O,
     "fail($self, reason, /)\n--\n\nThis rank cannot evaluate; it is left out."},
    {"close", follower_close, METH_NOARGS,
     "close($self)\n--\n\nLets go of the run; twice is fine."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"rank", get_rank, NULL, "This rank; 0 is a lane's.", NULL},
    {"company", get_company, NULL,
     "(round, followers, exact) of the work taken last: the round's number, how many followers\n"
     "evaluate in it, whether the leader evaluates its own latent too.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "A follower's end of a run; Leader.follower(rank) makes it."},
    {Py_tp_dealloc, follower_dealloc},
    {Py_tp_traverse, follower_traverse},
    {Py_tp_clear, follower_clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "parastep._core.Follower",
    .basicsize = sizeof(follower_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = type_slots,
};

int psb_follower_add_type(PyObject *module, psb_state *st)
{
  st->follower_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &type_spec, NULL);
  return st->follower_type != NULL ? PyModule_AddType(module, st->follower_type) : -1;
}
