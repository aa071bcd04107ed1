/* leader_type.c - Leader: the core's leader of a run as a Python object.
 *
 * The loop of parastep.sample and the hosts' adapters drive it.  The GIL is released around every
 * exchange, wait and pass over memory.  A leader hands out the other ends of its links, which
 * leader_life.c opens: a Follower for a thread, an Inbox or a Pair for a rank in another process.
 */
#include "ends.h"
#include "leader.h"
#include "options.h"

/* ---- one call of the core -------------------------------------------------------------------- */

/* What a method is given, and what the core says. */
typedef struct turn {
  const char *method;
  const char *input; /* what errors call the tensor that is read */
  PyObject *in_obj;  /* the tensor that is read, or NULL */
  PyObject *out_obj; /* the tensor that is written, m_out; NULL or None where there is none */
  bool any_dtype;    /* of the tensor that is read: the core judges it */
  psb_view in, out;  /* while the core is called; data is NULL where there is none */
  int number;        /* a step or a rank */
  const char *reason;
  void *result; /* memory of a fresh tensor */
  long long began_ns;
  ps_verdict verdict;
  double spent;
} turn;

typedef ps_status (*core_call)(leader_object *self, turn *t);

static int take_tensors(psb_state *st, const leader_object *self, turn *t)
{
  const psb_spec *spec = &self->spec;
  ps_dtype dtype = t->any_dtype ? PS_NONE : spec->layout.x;
  if (t->in_obj != NULL &&
      psb__tensor_in(st, t->in_obj, t->input, PSB_READ, &self->place, spec, dtype, &t->in) < 0) {
    return -1;
  }
  if (t->out_obj == NULL || t->out_obj == Py_None) {
    return 0;
  }
  return psb__tensor_in(st, t->out_obj, "m_out", PSB_WRITABLE, &self->place, spec, spec->layout.m,
                        &t->out);
}

static int enter_stream(psb_state *st, leader_object *self, const turn *t)
{
  bool tensors = t->in_obj != NULL || t->out_obj != NULL || t->result != NULL;
  return tensors ? psb__place_enter(st, &self->place, self->like) : 0;
}

/* Enters, takes the tensors in, calls the core without the GIL, and undoes all but the call. */
static int take_turn(PyObject *obj, turn *t, core_call call)
{
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  int failed = -1;
  if (psb__enter(st, &self->guard, t->method) < 0) {
    return -1;
  }
  if (enter_stream(st, self, t) == 0 && take_tensors(st, self, t) == 0) {
    ps_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = call(self, t);
    if (status == PS_OK && (t->in.data != NULL || t->result != NULL)) {
      /* What was read is the caller's again, and what was written may be seen on any stream. */
      status = psb__place_settle(&self->place);
    }
    Py_END_ALLOW_THREADS;
    failed = psb__judge(st, status);
  }
  psb_view_release(&t->in);
  psb_view_release(&t->out);
  psb__leave(&self->guard);
  return failed;
}

static PyObject *none_or_error(int failed)
{
  return failed ? NULL : Py_NewRef(Py_None);
}

/* ---- the turn -------------------------------------------------------------------------------- */

static ps_status call_ask(leader_object *self, turn *t)
{
  ps_status status = ps_leader_ask(self->leader, t->number, t->in.data, t->out.data, &t->verdict);
  if (status == PS_OK) {
    self->step = t->number;
  }
  return status;
}

static PyObject *leader_ask(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"step", "x", "m_out", NULL};
  turn t = {.method = "ask", .input = "x"};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iO|O:ask", keywords, &t.number, &t.in_obj,
                                   &t.out_obj) ||
      take_turn(obj, &t, call_ask) < 0) {
    return NULL;
  }
  return t.verdict == PS_AHEAD ? Py_NewRef(Py_None) : PyBool_FromLong(t.verdict == PS_ANSWER);
}

static ps_status call_amend(leader_object *self, turn *t)
{
  return ps_leader_amend(self->leader, t->in.data, t->out.data, &t->spent);
}

static PyObject *leader_amend(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"x", "m_out", NULL};
  turn t = {.method = "amend", .input = "x"};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:amend", keywords, &t.in_obj, &t.out_obj) ||
      take_turn(obj, &t, call_amend) < 0) {
    return NULL;
  }
  return PyFloat_FromDouble(t.spent);
}

static ps_status call_submit(leader_object *self, turn *t)
{
  ps_dtype dtype = t->in.data != NULL ? t->in.dtype : self->spec.layout.m;
  ps_status status = ps_leader_submit(self->leader, t->in.data, dtype, t->began_ns);
  if (status == PS_OK) {
    self->spec.layout.m = dtype; /* settled by the first output, the same ever after */
  }
  return status;
}

static PyObject *leader_submit(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"m", "began_ns", NULL};
  char name[48];
  turn t = {.method = "submit", .input = name, .any_dtype = true};
  PyOS_snprintf(name, sizeof name, "the denoiser's output at step %d",
                ((leader_object *)obj)->step);
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|L:submit", keywords, &t.in_obj, &t.began_ns)) {
    return NULL;
  }
  t.in_obj = t.in_obj != Py_None ? t.in_obj : NULL;
  return none_or_error(take_turn(obj, &t, call_submit));
}

static ps_status call_noise(leader_object *self, turn *t)
{
  return ps_leader_noise(self->leader, t->number, t->in.data);
}

static PyObject *leader_noise(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"step", "z", NULL};
  turn t = {.method = "noise", .input = "noise"};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iO:noise", keywords, &t.number, &t.in_obj)) {
    return NULL;
  }
  return none_or_error(take_turn(obj, &t, call_noise));
}

static ps_status call_advance(leader_object *self, turn *t)
{
  return ps_leader_advance(self->leader, t->in.data, t->result);
}

static PyObject *leader_advance(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"z", NULL};
  const leader_object *self = (leader_object *)obj;
  turn t = {.method = "advance", .input = "noise"};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:advance", keywords, &t.in_obj)) {
    return NULL;
  }
  t.in_obj = t.in_obj != Py_None ? t.in_obj : NULL;
  PyObject *next = psb__tensor_out(psb_state_of(Py_TYPE(obj)), self->like, &self->place,
                                   &self->spec, self->spec.layout.x, NULL, &t.result);
  if (next != NULL && take_turn(obj, &t, call_advance) < 0) {
    Py_CLEAR(next);
  }
  return next;
}

static PyObject *leader_output(PyObject *obj, PyObject *unused)
{
  const leader_object *self = (leader_object *)obj;
  ps_dtype dtype = self->spec.layout.m != PS_NONE ? self->spec.layout.m : self->spec.layout.x;
  (void)unused;
  return psb__tensor_out(psb_state_of(Py_TYPE(obj)), self->like, &self->place, &self->spec, dtype,
                         NULL, NULL);
}

/* ---- the leader's further slots -------------------------------------------------------------- */

/* Enters and asks the core for the work; after 0 psb__leave follows. */
static int enter_work(psb_state *st, leader_object *self, const char *method, ps_work *work)
{
  if (psb__enter(st, &self->guard, method) < 0) {
    return -1;
  }
  int failed = psb__judge(st, ps_leader_work(self->leader, work));
  if (failed) {
    psb__leave(&self->guard);
  }
  return failed;
}

static PyObject *leader_work(PyObject *obj, PyObject *unused)
{
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  ps_work work;
  (void)unused;
  if (enter_work(st, self, "work", &work) < 0) {
    return NULL;
  }
  PyObject *list = psb__work_out(st, self->like, &self->place, &self->spec, &work);
  psb__leave(&self->guard);
  return list;
}

/* Outputs are the core's from here on, which cannot be told of what dtype they are before the first
 * submit; by then there is but one slot. */
static PyObject *leader_fill(PyObject *obj, PyObject *outputs)
{
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  ps_work work;
  ps_dtype found;
  if (enter_work(st, self, "fill", &work) < 0) {
    return NULL;
  }
  psb_room room = {"outputs", self->spec.layout.m, work.count, work.output_bytes, work.output};
  int failed = psb__sequence_in(st, outputs, &self->place, &self->spec, &room, &found);
  psb__leave(&self->guard);
  return none_or_error(failed);
}

/* ---- beside the turn ------------------------------------------------------------------------- */

static ps_status call_stop(leader_object *self, turn *t)
{
  return ps_leader_stop(self->leader, t->reason);
}

static PyObject *leader_stop(PyObject *obj, PyObject *reason)
{
  turn t = {.method = "stop", .reason = PyUnicode_AsUTF8(reason)};
  return t.reason != NULL ? none_or_error(take_turn(obj, &t, call_stop)) : NULL;
}

static ps_status call_leave_out(leader_object *self, turn *t)
{
  return ps_leader_leave_out(self->leader, t->number, t->reason);
}

static PyObject *leader_leave_out(PyObject *obj, PyObject *args)
{
  turn t = {.method = "leave_out"};
  if (!PyArg_ParseTuple(args, "is:leave_out", &t.number, &t.reason)) {
    return NULL;
  }
  return none_or_error(take_turn(obj, &t, call_leave_out));
}

static ps_status call_finish(leader_object *self, turn *t)
{
  (void)t;
  psb__leader_close_ends(self);
  return ps_leader_finish(self->leader);
}

static PyObject *leader_finish(PyObject *obj, PyObject *unused)
{
  turn t = {.method = "finish"};
  (void)unused;
  return none_or_error(take_turn(obj, &t, call_finish));
}

static PyObject *leader_report(PyObject *obj, PyObject *unused)
{
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  ps_report report;
  PyObject *dict = NULL;
  (void)unused;
  if (psb__enter(st, &self->guard, "report") < 0) {
    return NULL;
  }
  if (psb__judge(st, ps_leader_report(self->leader, &report)) == 0) {
    dict = psb__report_out(&report);
  }
  psb__leave(&self->guard);
  return dict;
}

static PyObject *get_horizon(PyObject *obj, void *unused)
{
  leader_object *self = (leader_object *)obj;
  (void)unused;
  if (psb__enter(psb_state_of(Py_TYPE(obj)), &self->guard, "horizon") < 0) {
    return NULL;
  }
  int horizon = ps_leader_horizon(self->leader);
  psb__leave(&self->guard);
  return PyLong_FromLong(horizon);
}

static PyObject *get_company(PyObject *obj, void *unused)
{
  leader_object *self = (leader_object *)obj;
  ps_work work;
  (void)unused;
  if (enter_work(psb_state_of(Py_TYPE(obj)), self, "company", &work) < 0) {
    return NULL;
  }
  psb__leave(&self->guard);
  return psb__company_of(&work);
}

static ps_link *take_end(leader_object *self, long rank)
{
  ps_link *end = NULL;
  if (rank >= 0 && rank < self->ranks) {
    end = self->follower_ends[rank];
    self->follower_ends[rank] = NULL;
  }
  return end;
}

static PyObject *leader_follower(PyObject *obj, PyObject *arg)
{
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  PyObject *follower = NULL;
  long rank = PyLong_AsLong(arg);
  if ((rank == -1 && PyErr_Occurred()) || psb__enter(st, &self->guard, "follower") < 0) {
    return NULL;
  }
  ps_link *end = take_end(self, rank);
  if (end != NULL) {
    follower = psb__follower_new(st, self->like, &self->places[rank], &self->spec, end, (int)rank);
  } else {
    psb_raise(st, PS_INVALID, "follower: rank %ld: must be %d to %d, each taken once", rank,
              self->lane ? 0 : 1, self->ranks - 1);
  }
  psb__leave(&self->guard);
  return follower;
}

static PyObject *leader_inbox(PyObject *obj, PyObject *arg)
{
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  long rank = PyLong_AsLong(arg);
  if (rank == -1 && PyErr_Occurred()) {
    return NULL;
  }
  if (rank < 1 || rank >= self->ranks || self->inboxes[rank] == NULL) {
    return psb_raise(st, PS_INVALID, "inbox: rank %ld has no carrier", rank);
  }
  return Py_NewRef(self->inboxes[rank]);
}

/* ---- the type -------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"ask", PSB_KEYWORDS(leader_ask), METH_VARARGS | METH_KEYWORDS,
     "ask($self, step, x, m_out=None)\n--\n\n"
     "The host is at this step with the true latent x.  True: m_out holds the answer, no model "
     "run.\n"
     "False: evaluate and submit; followers are already at work.  Without m_out always False.\n"
     "None: nothing to evaluate at x; evaluate work(), fill(), submit(None), and ask again.  Only\n"
     "with max_stride other than 1 and without a lane."},
    {"amend", PSB_KEYWORDS(leader_amend), METH_VARARGS | METH_KEYWORDS,
     "amend($self, x, m_out=None)\n--\n\n"
     "The latent of the present step turns out to be x.  After an answer m_out is rebased to it,\n"
     "and what the drift there spends of the tolerance returned; before submit x replaces the one\n"
     "asked with (NaN is returned)."},
    {"submit", PSB_KEYWORDS(leader_submit), METH_VARARGS | METH_KEYWORDS,
     "submit($self, m, began_ns=0)\n--\n\nThe leader's own output, or None where what an ask "
     "that\nreturned None wanted is filled in; gathers the followers'."},
    {"noise", PSB_KEYWORDS(leader_noise), METH_VARARGS | METH_KEYWORDS,
     "noise($self, step, z)\n--\n\nNoise of a step below horizon, for guesses that pass it; "
     "copied."},
    {"advance", PSB_KEYWORDS(leader_advance), METH_VARARGS | METH_KEYWORDS,
     "advance($self, z=None)\n--\n\nx_{j+1} by the program's row, as a fresh tensor."},
    {"output", leader_output, METH_NOARGS,
     "output($self)\n--\n\nA fresh tensor for ask to write an answer into."},
    {"work", leader_work, METH_NOARGS,
     "work($self)\n--\n\n[(step, point), ...] beside x: the guesses of the leader's further "
     "slots."},
    {"fill", leader_fill, METH_O, "fill($self, outputs, /)\n--\n\nTheir outputs, before submit."},
    {"stop", leader_stop, METH_O,
     "stop($self, reason, /)\n--\n\nFrom here on the host evaluates alone."},
    {"leave_out", leader_leave_out, METH_VARARGS,
     "leave_out($self, rank, reason, /)\n--\n\nGoes on without this rank, as if it had failed."},
    {"finish", leader_finish, METH_NOARGS,
     "finish($self)\n--\n\nTells all followers to leave; twice is fine."},
    {"report", leader_report, METH_NOARGS,
     "report($self)\n--\n\nCounters, drift, timeline and failures, as a dict."},
    {"follower", leader_follower, METH_O,
     "follower($self, rank, /)\n--\n\nThe other end, taken once."},
    {"inbox", leader_inbox, METH_O,
     "inbox($self, rank, /)\n--\n\n"
     "Where messages of a rank with a carrier are handed in; its Pair, if that is the carrier."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"horizon", get_horizon, NULL, "Guesses of the next round may pass steps below this one.",
     NULL},
    {"company", get_company, NULL, "Of the round that waits for submit: see Follower.company.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(
    leader_doc,
    "Leader(program, x, *, ranks=1, slots=None, tolerance=0.04, policy='verified', "
    "order=1, max_stride=None, warmup=5, deadline=None, on_failure='continue', "
    "lane=False, carriers=None, devices=None)\n--\n\n"
    "The leader of a run; x is a latent of the run, its shape and dtype are kept.  With a\n"
    "lane rank 0 has a follower too, which evaluates what lies ahead of the host's loop.\n"
    "carriers: {rank: (send, same_clock)} of ranks in other processes, or a Pair in place of "
    "send.");

static PyType_Slot type_slots[] = {
    {Py_tp_doc, (void *)leader_doc},
    {Py_tp_new, psb__leader_new},
    {Py_tp_dealloc, psb__leader_dealloc},
    {Py_tp_traverse, psb__leader_traverse},
    {Py_tp_clear, psb__leader_clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "parastep._core.Leader",
    .basicsize = sizeof(leader_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = type_slots,
};

int psb_leader_add_type(PyObject *module, psb_state *st)
{
  st->leader_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &type_spec, NULL);
  return st->leader_type != NULL ? PyModule_AddType(module, st->leader_type) : -1;
}
