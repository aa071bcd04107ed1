/* run_type.c - Leader and Follower: one run of the core as Python objects.
 *
 * api.py's loop and the hosts' adapters drive them.  The GIL is released around every exchange, wait
 * and pass over memory.  A leader opens its links itself and hands out the follower ends, one a
 * thread; tensors that go out are fresh, so nobody holds memory that the core will overwrite.
 */
#include <unistd.h>

#include "binding.h"

#include "parastep_backend.h"
#include "parastep_transport.h"

typedef struct spec { /* what a latent of this run is, as the host sees it */
  int ndim;
  int64_t shape[PSB_DIMS_MAX];
  size_t count;
  ps_layout layout;
} spec;

typedef struct leader_object {
  PyObject_HEAD
  ps_leader *leader;
  spec spec;
  PyObject *like;          /* the first latent: points are tensors of its kind */
  int ranks;
  ps_link **follower_ends; /* (ranks - 1) not yet handed out, or NULL */
  pid_t process;
  int busy;                /* a thread is inside; changed atomically */
} leader_object;

typedef struct follower_object {
  PyObject_HEAD
  ps_follower *follower;
  spec spec;
  PyObject *like;
  ps_work work;
  int rank;
  pid_t process;
  int busy;
} follower_object;

/* ---- one thread at a time, in the process that made the run ---------------------------------- */

static int enter(psb_state *st, const char *what, pid_t process, int *busy)
{
  if (process != getpid()) {
    psb_raise(st, PS_STATE, "%s: the run was made in another process (a fork carried it here); "
              "create a new one", what);
    return -1;
  }
  if (__atomic_exchange_n(busy, 1, __ATOMIC_ACQUIRE) != 0) {
    psb_raise(st, PS_STATE, "%s: another thread is inside; one thread at a time", what);
    return -1;
  }
  return 0;
}

static void leave(int *busy)
{
  __atomic_store_n(busy, 0, __ATOMIC_RELEASE);
}

/* Between the slices of a wait: lets Ctrl-C through.  The exception it sets is what the call raises. */
static int check_signals(void *unused)
{
  (void)unused;
  PyGILState_STATE gil = PyGILState_Ensure();
  int stop = PyErr_CheckSignals();
  PyGILState_Release(gil);
  return stop;
}

/* ---- tensors of the run ---------------------------------------------------------------------- */

static int spec_from(psb_state *st, PyObject *x, spec *out)
{
  psb_view view;
  if (psb_view_from(st, x, "x", PSB_READ, &view) < 0) {
    return -1;
  }
  /* The first dimension is the batch where there are others: drift is taken per item. */
  size_t items = view.ndim >= 2 ? (size_t)view.shape[0] : 1;
  *out = (spec){.ndim = view.ndim, .count = view.count};
  memcpy(out->shape, view.shape, sizeof out->shape);
  out->layout = (ps_layout){.items = items, .size = items > 0 ? view.count / items : 0,
                            .x = view.dtype, .m = PS_NONE};
  psb_view_release(&view);
  return 0;
}

static PyObject *shape_text(int ndim, const int64_t *shape)
{
  PyObject *tuple = PyTuple_New(ndim);
  for (int k = 0; tuple != NULL && k < ndim; ++k) {
    PyObject *size = PyLong_FromLongLong(shape[k]);
    if (size == NULL) {
      Py_CLEAR(tuple);
    } else {
      PyTuple_SET_ITEM(tuple, k, size);
    }
  }
  return tuple;
}

static int raise_shape(psb_state *st, const char *name, const psb_view *view, const spec *wanted)
{
  PyObject *given = shape_text(view->ndim, view->shape);
  PyObject *needed = shape_text(wanted->ndim, wanted->shape);
  if (given != NULL && needed != NULL) {
    psb_raise(st, PS_SHAPE, "%s: shape %R where the latents are %R", name, given, needed);
  }
  Py_XDECREF(given);
  Py_XDECREF(needed);
  return -1;
}

/* A tensor of the run's shape; dtype PS_NONE leaves its dtype open. */
static int tensor_in(psb_state *st, PyObject *obj, const char *name, int flags, const spec *wanted,
                     ps_dtype dtype, psb_view *view)
{
  int failed = psb_view_from(st, obj, name, flags, view);
  if (failed == 0 &&
      (view->ndim != wanted->ndim ||
       memcmp(view->shape, wanted->shape, (size_t)view->ndim * sizeof *view->shape) != 0)) {
    failed = raise_shape(st, name, view, wanted);
  }
  if (failed == 0 && dtype != PS_NONE && view->dtype != dtype) {
    psb_raise(st, PS_DTYPE, "%s: dtype %s where the latents are %s; convert it first", name,
              ps_dtype_name(view->dtype), ps_dtype_name(dtype));
    failed = -1;
  }
  if (failed != 0) {
    psb_view_release(view);
  }
  return failed;
}

/* ---- Leader: making -------------------------------------------------------------------------- */

static int policy_in(psb_state *st, const char *text, ps_policy *policy)
{
  if (strcmp(text, "verified") == 0 || strcmp(text, "paper") == 0) {
    *policy = text[0] == 'v' ? PS_VERIFIED : PS_PAPER;
    return 0;
  }
  psb_raise(st, PS_INVALID, "policy: '%s': must be 'verified' or 'paper'", text);
  return -1;
}

static int loss_in(psb_state *st, const char *text, int *raise_on_loss)
{
  if (strcmp(text, "continue") == 0 || strcmp(text, "raise") == 0) {
    *raise_on_loss = text[0] == 'r';
    return 0;
  }
  psb_raise(st, PS_INVALID, "on_failure: '%s': must be 'continue' or 'raise'", text);
  return -1;
}

static int deadline_in(psb_state *st, PyObject *obj, int64_t *deadline_ns)
{
  *deadline_ns = 0;
  if (obj == NULL || obj == Py_None) {
    return 0;
  }
  double seconds = PyFloat_AsDouble(obj);
  if (seconds == -1.0 && PyErr_Occurred()) {
    return -1;
  }
  if (!(seconds > 0.0) || seconds > 1e9) {
    psb_raise(st, PS_INVALID, "deadline: %R: must be seconds above 0, or None for the default rule "
              "(60 s or ten times the longest forward)", obj);
    return -1;
  }
  *deadline_ns = (int64_t)(seconds * 1e9);
  return 0;
}

/* slots: None, or a sequence with a number for every rank. */
static int slots_in(psb_state *st, PyObject *obj, int ranks, int *slots)
{
  for (int rank = 0; rank < ranks; ++rank) {
    slots[rank] = 1;
  }
  if (obj == NULL || obj == Py_None) {
    return 0;
  }
  PyObject *fast = PySequence_Fast(obj, "slots: a sequence of integers, one a rank, is needed");
  if (fast == NULL) {
    return -1;
  }
  int failed = 0;
  if (PySequence_Fast_GET_SIZE(fast) != ranks) {
    psb_raise(st, PS_INVALID, "slots: %zd numbers for %d ranks", PySequence_Fast_GET_SIZE(fast),
              ranks);
    failed = -1;
  }
  for (int rank = 0; failed == 0 && rank < ranks; ++rank) {
    long value = PyLong_AsLong(PySequence_Fast_GET_ITEM(fast, rank));
    failed = value == -1 && PyErr_Occurred() ? -1 : 0;
    if (failed == 0 && (value < 1 || value > PS_SLOTS_MAX)) {
      psb_raise(st, PS_INVALID, "slots: %ld: must be 1 to %d", value, PS_SLOTS_MAX);
      failed = -1;
    }
    slots[rank] = (int)value;
  }
  Py_DECREF(fast);
  return failed;
}

static void close_ends(ps_link **ends, int count)
{
  for (int k = 0; ends != NULL && k < count; ++k) {
    if (ends[k] != NULL) {
      /* A follower that is made and destroyed at once is the polite way to close an unclaimed end. */
      ends[k]->ops->close(ends[k]);
      ends[k] = NULL;
    }
  }
}

static ps_status open_run(leader_object *self, ps_program *program, const ps_options *options,
                          const int *slots)
{
  ps_link *leader_ends[PS_RANKS_MAX];
  ps_status status = PS_OK;
  int opened = 0;
  while (status == PS_OK && opened < self->ranks - 1) {
    status = ps_threads_open(&self->spec.layout, slots[opened + 1], &leader_ends[opened],
                             &self->follower_ends[opened]);
    opened += status == PS_OK;
  }
  if (status != PS_OK) {
    close_ends(leader_ends, opened);
    return status;
  }
  return ps_leader_create(program, &self->spec.layout, options, ps_backend_find("cpu"), leader_ends,
                          self->ranks - 1, slots, &self->leader);
}

static PyObject *leader_alloc(psb_state *st, PyTypeObject *type, PyObject *like, ps_program *program,
                              const ps_options *options, int ranks, PyObject *slots_obj)
{
  int slots[PS_RANKS_MAX];
  if (slots_in(st, slots_obj, ranks, slots) < 0) {
    return NULL;
  }
  leader_object *self = (leader_object *)type->tp_alloc(type, 0);
  if (self == NULL) {
    return NULL;
  }
  self->ranks = ranks;
  self->process = getpid();
  self->like = Py_NewRef(like);
  self->follower_ends = PyMem_Calloc((size_t)ranks, sizeof *self->follower_ends);
  if (self->follower_ends == NULL) {
    PyErr_NoMemory();
    goto fail;
  }
  if (spec_from(st, like, &self->spec) < 0) {
    goto fail;
  }
  ps_status status = open_run(self, program, options, slots);
  if (status != PS_OK) {
    psb_raise_last(st, status);
    goto fail;
  }
  return (PyObject *)self;

fail:
  Py_DECREF(self);
  return NULL;
}

static PyObject *leader_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"program", "x",      "ranks",    "slots",      "tolerance", "policy",
                             "order",   "warmup", "deadline", "on_failure", NULL};
  PyObject *program_obj, *x, *slots = NULL, *deadline = NULL;
  const char *policy = "verified", *on_failure = "continue";
  int ranks = 1;
  ps_options options;
  ps_options_init(&options);
  psb_state *st = psb_state_of(type);
  if (st == NULL ||
      !PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$iOdsiiOs:Leader", keywords, &program_obj, &x,
                                   &ranks, &slots, &options.tolerance, &policy, &options.order,
                                   &options.warmup, &deadline, &on_failure) ||
      policy_in(st, policy, &options.policy) < 0 ||
      loss_in(st, on_failure, &options.raise_on_loss) < 0 ||
      deadline_in(st, deadline, &options.deadline_ns) < 0) {
    return NULL;
  }
  ps_program *program = psb_program_of(st, program_obj);
  if (program == NULL) {
    return NULL;
  }
  if (ranks < 1 || ranks > PS_RANKS_MAX) {
    return psb_raise(st, PS_INVALID, "ranks: %d: must be 1 to %d", ranks, PS_RANKS_MAX);
  }
  options.check = check_signals;
  return leader_alloc(st, type, x, program, &options, ranks, slots);
}

static int leader_traverse(PyObject *obj, visitproc visit, void *arg)
{
  Py_VISIT(Py_TYPE(obj));
  Py_VISIT(((leader_object *)obj)->like);
  return 0;
}

static int leader_clear(PyObject *obj)
{
  Py_CLEAR(((leader_object *)obj)->like);
  return 0;
}

/* A forked child must not touch mutexes that a thread of the parent may have held: it leaks instead. */
static void leader_dealloc(PyObject *obj)
{
  leader_object *self = (leader_object *)obj;
  PyTypeObject *type = Py_TYPE(obj);
  PyObject_GC_UnTrack(obj);
  if (self->process == getpid()) {
    close_ends(self->follower_ends, self->ranks - 1);
    ps_leader_destroy(self->leader);
  }
  PyMem_Free(self->follower_ends);
  leader_clear(obj);
  type->tp_free(obj);
  Py_DECREF(type);
}

/* ---- Leader: the turn ------------------------------------------------------------------------ */

static PyObject *leader_ask(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"step", "x", "m_out", NULL};
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  PyObject *x_obj, *m_obj = NULL, *result = NULL;
  psb_view x = {0}, m = {0};
  int step;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iO|O:ask", keywords, &step, &x_obj, &m_obj) ||
      enter(st, "ask", self->process, &self->busy) < 0) {
    return NULL;
  }
  if (tensor_in(st, x_obj, "x", PSB_READ, &self->spec, self->spec.layout.x, &x) < 0 ||
      (m_obj != NULL && m_obj != Py_None &&
       tensor_in(st, m_obj, "m_out", PSB_WRITABLE, &self->spec, self->spec.layout.m, &m) < 0)) {
    goto out;
  }
  ps_verdict verdict;
  ps_status status;
  Py_BEGIN_ALLOW_THREADS
  status = ps_leader_ask(self->leader, step, x.data, m.data, &verdict);
  Py_END_ALLOW_THREADS
  result = status == PS_OK ? PyBool_FromLong(verdict == PS_ANSWER) : psb_raise_last(st, status);
out:
  psb_view_release(&x);
  psb_view_release(&m);
  leave(&self->busy);
  return result;
}

static PyObject *leader_amend(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"x", "m_out", NULL};
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  PyObject *x_obj, *m_obj = NULL, *result = NULL;
  psb_view x = {0}, m = {0};
  double drift;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:amend", keywords, &x_obj, &m_obj) ||
      enter(st, "amend", self->process, &self->busy) < 0) {
    return NULL;
  }
  if (tensor_in(st, x_obj, "x", PSB_READ, &self->spec, self->spec.layout.x, &x) < 0 ||
      (m_obj != NULL && m_obj != Py_None &&
       tensor_in(st, m_obj, "m_out", PSB_WRITABLE, &self->spec, self->spec.layout.m, &m) < 0)) {
    goto out;
  }
  ps_status status;
  Py_BEGIN_ALLOW_THREADS
  status = ps_leader_amend(self->leader, x.data, m.data, &drift);
  Py_END_ALLOW_THREADS
  result = status == PS_OK ? PyFloat_FromDouble(drift) : psb_raise_last(st, status);
out:
  psb_view_release(&x);
  psb_view_release(&m);
  leave(&self->busy);
  return result;
}

static PyObject *leader_submit(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"m", "began_ns", NULL};
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  PyObject *m_obj, *result = NULL;
  psb_view m = {0};
  long long began_ns = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|L:submit", keywords, &m_obj, &began_ns) ||
      enter(st, "submit", self->process, &self->busy) < 0) {
    return NULL;
  }
  if (tensor_in(st, m_obj, "the denoiser's output", PSB_READ, &self->spec, PS_NONE, &m) < 0) {
    goto out;
  }
  ps_status status;
  Py_BEGIN_ALLOW_THREADS
  status = ps_leader_submit(self->leader, m.data, m.dtype, began_ns);
  Py_END_ALLOW_THREADS
  if (status == PS_OK) {
    self->spec.layout.m = m.dtype; /* settled by the first output, the same ever after */
    result = Py_NewRef(Py_None);
  } else {
    psb_raise_last(st, status);
  }
out:
  psb_view_release(&m);
  leave(&self->busy);
  return result;
}

static PyObject *leader_noise(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"step", "z", NULL};
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  PyObject *z_obj, *result = NULL;
  psb_view z = {0};
  int step;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iO:noise", keywords, &step, &z_obj) ||
      enter(st, "noise", self->process, &self->busy) < 0) {
    return NULL;
  }
  if (tensor_in(st, z_obj, "z", PSB_READ, &self->spec, self->spec.layout.x, &z) == 0) {
    ps_status status = ps_leader_noise(self->leader, step, z.data);
    result = status == PS_OK ? Py_NewRef(Py_None) : psb_raise_last(st, status);
  }
  psb_view_release(&z);
  leave(&self->busy);
  return result;
}

static PyObject *leader_advance(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"z", NULL};
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  PyObject *z_obj = NULL, *result = NULL;
  psb_view z = {0};
  void *next;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:advance", keywords, &z_obj) ||
      enter(st, "advance", self->process, &self->busy) < 0) {
    return NULL;
  }
  if (z_obj != NULL && z_obj != Py_None &&
      tensor_in(st, z_obj, "noise", PSB_READ, &self->spec, self->spec.layout.x, &z) < 0) {
    goto out;
  }
  result = psb_tensor_like(st, self->like, self->spec.layout.x, self->spec.ndim, self->spec.shape,
                           NULL, &next);
  if (result == NULL) {
    goto out;
  }
  ps_status status;
  Py_BEGIN_ALLOW_THREADS
  status = ps_leader_advance(self->leader, z.data, next);
  Py_END_ALLOW_THREADS
  if (status != PS_OK) {
    Py_CLEAR(result);
    psb_raise_last(st, status);
  }
out:
  psb_view_release(&z);
  leave(&self->busy);
  return result;
}

/* A fresh tensor of the latents' kind and shape, to be written by ask. */
static PyObject *leader_output(PyObject *obj, PyObject *unused)
{
  leader_object *self = (leader_object *)obj;
  (void)unused;
  ps_dtype dtype = self->spec.layout.m != PS_NONE ? self->spec.layout.m : self->spec.layout.x;
  return psb_tensor_like(psb_state_of(Py_TYPE(obj)), self->like, dtype, self->spec.ndim,
                         self->spec.shape, NULL, NULL);
}

static PyObject *work_out(psb_state *st, PyObject *like, const spec *spec, const ps_work *work)
{
  PyObject *list = PyList_New(work->count);
  for (int k = 0; list != NULL && k < work->count; ++k) {
    PyObject *point = psb_tensor_like(st, like, spec->layout.x, spec->ndim, spec->shape,
                                      work->point[k], NULL);
    PyObject *pair = point != NULL ? Py_BuildValue("iN", work->step[k], point) : NULL;
    if (pair == NULL) {
      Py_CLEAR(list);
    } else {
      PyList_SET_ITEM(list, k, pair);
    }
  }
  return list;
}

static int outputs_in(psb_state *st, PyObject *obj, const char *name, const spec *spec,
                      ps_dtype dtype, int count, size_t room, void *const *to, ps_dtype *found)
{
  PyObject *fast = PySequence_Fast(obj, "a sequence of tensors, one a step of the work, is needed");
  int failed = fast == NULL ? -1 : 0;
  if (failed == 0 && PySequence_Fast_GET_SIZE(fast) != count) {
    psb_raise(st, PS_SHAPE, "%s: %zd tensors for %d steps", name, PySequence_Fast_GET_SIZE(fast),
              count);
    failed = -1;
  }
  for (int k = 0; failed == 0 && k < count; ++k) {
    psb_view view = {0};
    failed = tensor_in(st, PySequence_Fast_GET_ITEM(fast, k), name, PSB_READ, spec, dtype, &view);
    if (failed == 0 && (view.bytes > room || (k > 0 && view.dtype != *found))) {
      psb_raise(st, PS_DTYPE, "%s: dtype %s does not fit a run of %s latents", name,
                ps_dtype_name(view.dtype), ps_dtype_name(spec->layout.x));
      failed = -1;
    }
    if (failed == 0) {
      *found = view.dtype;
      Py_BEGIN_ALLOW_THREADS
      memcpy(to[k], view.data, view.bytes);
      Py_END_ALLOW_THREADS
    }
    psb_view_release(&view);
  }
  Py_XDECREF(fast);
  return failed;
}

static PyObject *leader_work(PyObject *obj, PyObject *unused)
{
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  ps_work work;
  (void)unused;
  ps_status status = ps_leader_work(self->leader, &work);
  return status == PS_OK ? work_out(st, self->like, &self->spec, &work)
                         : psb_raise_last(st, status);
}

static PyObject *leader_fill(PyObject *obj, PyObject *outputs)
{
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  ps_work work;
  ps_dtype dtype;
  ps_status status = ps_leader_work(self->leader, &work);
  if (status != PS_OK) {
    return psb_raise_last(st, status);
  }
  if (outputs_in(st, outputs, "outputs", &self->spec, self->spec.layout.m, work.count,
                 work.output_bytes, work.output, &dtype) < 0) {
    return NULL;
  }
  Py_RETURN_NONE;
}

/* ---- Leader: beside the turn ----------------------------------------------------------------- */

static PyObject *leader_stop(PyObject *obj, PyObject *reason)
{
  const char *text = PyUnicode_AsUTF8(reason);
  if (text == NULL) {
    return NULL;
  }
  ps_leader_stop(((leader_object *)obj)->leader, text);
  Py_RETURN_NONE;
}

static PyObject *leader_leave_out(PyObject *obj, PyObject *args)
{
  int rank;
  const char *reason;
  if (!PyArg_ParseTuple(args, "is:leave_out", &rank, &reason)) {
    return NULL;
  }
  ps_status status = ps_leader_leave_out(((leader_object *)obj)->leader, rank, reason);
  return status == PS_OK ? Py_NewRef(Py_None) : psb_raise_last(psb_state_of(Py_TYPE(obj)), status);
}

static PyObject *leader_finish(PyObject *obj, PyObject *unused)
{
  leader_object *self = (leader_object *)obj;
  (void)unused;
  if (enter(psb_state_of(Py_TYPE(obj)), "finish", self->process, &self->busy) < 0) {
    return NULL;
  }
  close_ends(self->follower_ends, self->ranks - 1);
  ps_leader_finish(self->leader);
  leave(&self->busy);
  Py_RETURN_NONE;
}

static PyObject *list_of_ints(const int *values, int count)
{
  PyObject *list = PyList_New(count);
  for (int k = 0; list != NULL && k < count; ++k) {
    PyList_SET_ITEM(list, k, PyLong_FromLong(values[k]));
  }
  return list;
}

static PyObject *list_of_doubles(const double *values, int count)
{
  PyObject *list = PyList_New(count);
  for (int k = 0; list != NULL && k < count; ++k) {
    PyList_SET_ITEM(list, k, PyFloat_FromDouble(values[k]));
  }
  return list;
}

static PyObject *list_of_records(const ps_report *report)
{
  PyObject *list = PyList_New(report->records);
  for (int k = 0; list != NULL && k < report->records; ++k) {
    const ps_record *record = &report->timeline[k];
    PyObject *item = Py_BuildValue("(iiiddO)", record->rank, record->step, record->round,
                                   (double)record->begin_ns * 1e-9, (double)record->end_ns * 1e-9,
                                   record->accepted ? Py_True : Py_False);
    if (item == NULL) {
      Py_CLEAR(list);
    } else {
      PyList_SET_ITEM(list, k, item);
    }
  }
  return list;
}

static PyObject *list_of_failures(const ps_report *report)
{
  PyObject *list = PyList_New(report->failed);
  for (int k = 0; list != NULL && k < report->failed; ++k) {
    const ps_failure *failure = &report->failures[k];
    PyObject *item = Py_BuildValue("(iiss)", failure->rank, failure->step,
                                   ps_status_name(failure->status), failure->text);
    if (item == NULL) {
      Py_CLEAR(list);
    } else {
      PyList_SET_ITEM(list, k, item);
    }
  }
  return list;
}

static PyObject *leader_report(PyObject *obj, PyObject *unused)
{
  ps_report report;
  (void)unused;
  ps_leader_report(((leader_object *)obj)->leader, &report);
  int counted = report.rounds < report.steps ? report.rounds : report.steps;
  return Py_BuildValue(
      "{s:i, s:i, s:i, s:i, s:i, s:d, s:K, s:N, s:N, s:N, s:N, s:N, s:z}", "steps", report.steps,
      "ranks", report.ranks, "rounds", report.rounds, "answered", report.answered, "not_finite",
      report.not_finite, "seconds", (double)report.seconds_ns * 1e-9, "bytes_sent",
      (unsigned long long)report.bytes_sent, "evaluations",
      list_of_ints(report.evaluations, report.ranks), "accepted",
      list_of_ints(report.accepted, counted), "drift", list_of_doubles(report.drift, report.steps),
      "timeline", list_of_records(&report), "failures", list_of_failures(&report), "fallback",
      report.fallback);
}

static PyObject *get_horizon(PyObject *obj, void *unused)
{
  (void)unused;
  return PyLong_FromLong(ps_leader_horizon(((leader_object *)obj)->leader));
}

static PyObject *leader_follower(PyObject *obj, PyObject *arg)
{
  leader_object *self = (leader_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  long rank = PyLong_AsLong(arg);
  if (rank == -1 && PyErr_Occurred()) {
    return NULL;
  }
  if (rank < 1 || rank >= self->ranks || self->follower_ends[rank - 1] == NULL) {
    return psb_raise(st, PS_INVALID, "follower: rank %ld: must be 1 to %d, each taken once", rank,
                     self->ranks - 1);
  }
  follower_object *made =
      (follower_object *)st->follower_type->tp_alloc(st->follower_type, 0);
  if (made == NULL) {
    return NULL;
  }
  ps_link *end = self->follower_ends[rank - 1];
  self->follower_ends[rank - 1] = NULL;
  ps_status status = ps_follower_create(&self->spec.layout, end, &made->follower);
  made->spec = self->spec;
  made->like = Py_NewRef(self->like);
  made->rank = (int)rank;
  made->process = getpid();
  if (status != PS_OK) {
    Py_DECREF(made);
    return psb_raise_last(st, status);
  }
  return (PyObject *)made;
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void)) function

static PyMethodDef leader_methods[] = {
    {"ask", KEYWORDS(leader_ask), METH_VARARGS | METH_KEYWORDS,
     "ask(step, x, m_out=None)\n--\n\n"
     "The host is at this step with the true latent x.  True: m_out holds the answer, no model run.\n"
     "False: evaluate and submit; followers are already at work.  Without m_out always False."},
    {"amend", KEYWORDS(leader_amend), METH_VARARGS | METH_KEYWORDS,
     "amend(x, m_out=None)\n--\n\n"
     "The latent of the present step turns out to be x.  After an answer m_out is rebased to it and\n"
     "the drift there returned; before submit x replaces the one asked with (NaN is returned)."},
    {"submit", KEYWORDS(leader_submit), METH_VARARGS | METH_KEYWORDS,
     "submit(m, began_ns=0)\n--\n\nThe leader's own output; gathers the followers'."},
    {"noise", KEYWORDS(leader_noise), METH_VARARGS | METH_KEYWORDS,
     "noise(step, z)\n--\n\nNoise of a step below horizon, for guesses that pass it; copied."},
    {"advance", KEYWORDS(leader_advance), METH_VARARGS | METH_KEYWORDS,
     "advance(z=None)\n--\n\nx_{j+1} by the program's row, as a fresh tensor."},
    {"output", leader_output, METH_NOARGS, "A fresh tensor for ask to write an answer into."},
    {"work", leader_work, METH_NOARGS,
     "[(step, point), ...] beside x: the guesses of the leader's further slots."},
    {"fill", leader_fill, METH_O, "fill(outputs): their outputs, before submit."},
    {"stop", leader_stop, METH_O, "stop(reason): from here on the host evaluates alone."},
    {"leave_out", leader_leave_out, METH_VARARGS, "leave_out(rank, reason): without this rank."},
    {"finish", leader_finish, METH_NOARGS, "Tells all followers to leave; twice is fine."},
    {"report", leader_report, METH_NOARGS, "Counters, drift, timeline and failures, as a dict."},
    {"follower", leader_follower, METH_O, "follower(rank): the other end, taken once."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef leader_getters[] = {
    {"horizon", get_horizon, NULL, "Guesses of the next round may pass steps below this one.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot leader_slots[] = {
    {Py_tp_doc, "Leader(program, x, *, ranks=1, slots=None, tolerance=0.02, policy='verified', "
                "order=1, warmup=5, deadline=None, on_failure='continue')\n--\n\n"
                "The leader of a run; x is a latent of the run, its shape and dtype are kept."},
    {Py_tp_new, leader_new},
    {Py_tp_dealloc, leader_dealloc},
    {Py_tp_traverse, leader_traverse},
    {Py_tp_clear, leader_clear},
    {Py_tp_methods, leader_methods},
    {Py_tp_getset, leader_getters},
    {0, NULL},
};

static PyType_Spec leader_spec = {
    .name = "parastep._core.Leader",
    .basicsize = sizeof(leader_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = leader_slots,
};

/* ---- Follower -------------------------------------------------------------------------------- */

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

static void follower_dealloc(PyObject *obj)
{
  follower_object *self = (follower_object *)obj;
  PyTypeObject *type = Py_TYPE(obj);
  PyObject_GC_UnTrack(obj);
  if (self->process == getpid()) {
    ps_follower_destroy(self->follower);
  }
  follower_clear(obj);
  type->tp_free(obj);
  Py_DECREF(type);
}

static PyObject *follower_next(PyObject *obj, PyObject *unused)
{
  follower_object *self = (follower_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  PyObject *result = NULL;
  ps_status status;
  (void)unused;
  if (enter(st, "next", self->process, &self->busy) < 0) {
    return NULL;
  }
  Py_BEGIN_ALLOW_THREADS
  status = ps_follower_next(self->follower, NULL, &self->work);
  Py_END_ALLOW_THREADS
  if (status != PS_OK) {
    psb_raise_last(st, status);
  } else if (self->work.count == 0) {
    result = Py_NewRef(Py_None);
  } else {
    result = work_out(st, self->like, &self->spec, &self->work);
  }
  leave(&self->busy);
  return result;
}

static PyObject *follower_submit(PyObject *obj, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"outputs", "points", "began_ns", NULL};
  follower_object *self = (follower_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  PyObject *outputs, *points = NULL, *result = NULL;
  ps_dtype dtype = PS_NONE, point_dtype;
  long long began_ns = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OL:submit", keywords, &outputs, &points,
                                   &began_ns) ||
      enter(st, "submit", self->process, &self->busy) < 0) {
    return NULL;
  }
  bool moved = points != NULL && points != Py_None;
  ps_work *work = &self->work;
  if (work->count == 0) {
    psb_raise(st, PS_STATE, "submit: no work was taken");
    goto out;
  }
  if (outputs_in(st, outputs, "the denoiser's output", &self->spec, PS_NONE, work->count,
                 work->output_bytes, work->output, &dtype) < 0 ||
      (moved && outputs_in(st, points, "points", &self->spec, self->spec.layout.x, work->count,
                           work->point_bytes, work->point, &point_dtype) < 0)) {
    goto out;
  }
  ps_status status = ps_follower_submit(self->follower, dtype, moved, began_ns);
  work->count = 0;
  result = status == PS_OK ? Py_NewRef(Py_None) : psb_raise_last(st, status);
out:
  leave(&self->busy);
  return result;
}

static PyObject *follower_fail(PyObject *obj, PyObject *reason)
{
  follower_object *self = (follower_object *)obj;
  psb_state *st = psb_state_of(Py_TYPE(obj));
  const char *text = PyUnicode_AsUTF8(reason);
  ps_status status;
  if (text == NULL || enter(st, "fail", self->process, &self->busy) < 0) {
    return NULL;
  }
  Py_BEGIN_ALLOW_THREADS
  status = ps_follower_fail(self->follower, text);
  Py_END_ALLOW_THREADS
  self->work.count = 0;
  leave(&self->busy);
  return status == PS_OK || status == PS_ABANDONED ? Py_NewRef(Py_None)
                                                   : psb_raise_last(st, status);
}

static PyObject *get_rank(PyObject *obj, void *unused)
{
  (void)unused;
  return PyLong_FromLong(((follower_object *)obj)->rank);
}

static PyMethodDef follower_methods[] = {
    {"next", follower_next, METH_NOARGS,
     "Waits for work: [(step, point), ...] with fresh tensors, or None when the run is over."},
    {"submit", KEYWORDS(follower_submit), METH_VARARGS | METH_KEYWORDS,
     "submit(outputs, points=None, began_ns=0)\n--\n\n"
     "One output a step of the work; points: where they were really evaluated, if the host moved\n"
     "them.  Raises AbandonedError where the leader went on without this rank."},
    {"fail", follower_fail, METH_O, "fail(reason): this rank cannot evaluate; it is left out."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef follower_getters[] = {
    {"rank", get_rank, NULL, "This rank, 1 or above.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot follower_slots[] = {
    {Py_tp_doc, "A follower's end of a run; Leader.follower(rank) makes it."},
    {Py_tp_dealloc, follower_dealloc},
    {Py_tp_traverse, follower_traverse},
    {Py_tp_clear, follower_clear},
    {Py_tp_methods, follower_methods},
    {Py_tp_getset, follower_getters},
    {0, NULL},
};

static PyType_Spec follower_spec = {
    .name = "parastep._core.Follower",
    .basicsize = sizeof(follower_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = follower_slots,
};

int psb_run_add_types(PyObject *module, psb_state *st)
{
  st->leader_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &leader_spec, NULL);
  st->follower_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &follower_spec, NULL);
  if (st->leader_type == NULL || st->follower_type == NULL) {
    return -1;
  }
  return PyModule_AddType(module, st->leader_type);
}
