/* module.c - parastep._core: multi-phase init, exceptions, what was found.
 *
 * Python imports it through parastep/__init__.py.  Import starts no thread and takes no lock; all
 * state is the module's own, so that sub-interpreters and free-threaded builds work.
 */
#include "run.h"

#include "parastep_backend.h"

/* ---- exceptions ------------------------------------------------------------------------------ */

typedef struct exception_spec {
  ps_status status;
  const char *name, *doc;
  PyObject **also; /* the built-in that fits */
} exception_spec;

static const exception_spec specs[] = {
    {PS_NO_MEMORY, "OutOfMemoryError", "No memory for a run.", &PyExc_MemoryError},
    {PS_INVALID, "InvalidError", "An argument has a value that cannot be.", &PyExc_ValueError},
    {PS_SHAPE, "ShapeError", "A tensor has another shape than the run.", &PyExc_ValueError},
    {PS_DTYPE, "DtypeError", "A tensor has a dtype that does not fit.", &PyExc_TypeError},
    {PS_DEVICE, "DeviceError", "A tensor is on a device that cannot be used.", &PyExc_ValueError},
    {PS_STATE, "StateError", "A call out of order, or on a run that is over.", &PyExc_RuntimeError},
    {PS_DEADLINE, "DeadlineError", "A rank did not answer in time.", &PyExc_TimeoutError},
    {PS_ABANDONED, "AbandonedError", "The leader went on without this follower.",
     &PyExc_RuntimeError},
    {PS_LOST, "LostError", "A follower was lost and on_failure is 'raise'.",
     &PyExc_ConnectionError},
    {PS_FAILED, "DenoiserError", "A denoiser failed or gave what it must not.",
     &PyExc_RuntimeError},
    {PS_INTERRUPTED, "InterruptedRunError", "A wait was interrupted.", &PyExc_InterruptedError},
    {PS_PROTOCOL, "ProtocolError", "A message that does not fit the run.", &PyExc_RuntimeError},
    {PS_DIFFERS, "DiffersError", "A follower computes another function than the leader.",
     &PyExc_RuntimeError},
    {PS_NOT_FINITE, "NotFiniteError", "NaN or Inf where a number is needed.",
     &PyExc_ArithmeticError},
    {PS_UNSUPPORTED, "UnsupportedError", "Something this build or machine cannot do.",
     &PyExc_NotImplementedError},
};

static PyObject *new_exception(PyObject *module, const char *name, const char *doc, PyObject *bases)
{
  char full[64];
  PyOS_snprintf(full, sizeof full, "parastep.%s", name);
  PyObject *type = PyErr_NewExceptionWithDoc(full, doc, bases, NULL);
  if (type != NULL && PyModule_AddObjectRef(module, name, type) < 0) {
    Py_CLEAR(type);
  }
  return type;
}

static int add_exceptions(PyObject *module, psb_state *st)
{
  st->error = new_exception(module, "Error", "Base of all errors of parastep.", PyExc_Exception);
  for (size_t k = 0; st->error != NULL && k < sizeof specs / sizeof *specs; ++k) {
    PyObject *bases = PyTuple_Pack(2, st->error, *specs[k].also);
    if (bases == NULL) {
      return -1;
    }
    PyObject *type = new_exception(module, specs[k].name, specs[k].doc, bases);
    Py_DECREF(bases);
    if (type == NULL) {
      return -1;
    }
    st->errors[-specs[k].status] = type;
  }
  return st->error != NULL ? 0 : -1;
}

static PyObject *exception_of(const psb_state *st, ps_status status)
{
  int index = -(int)status;
  return index > 0 && index < PSB_STATUS_COUNT && st->errors[index] != NULL ? st->errors[index]
                                                                            : st->error;
}

PyObject *psb_raise(psb_state *st, ps_status status, const char *format, ...)
{
  va_list arguments;
  va_start(arguments, format);
  PyErr_FormatV(exception_of(st, status), format, arguments);
  va_end(arguments);
  return NULL;
}

PyObject *psb_raise_last(psb_state *st, ps_status status)
{
  /* An exception that a check raised while waiting (KeyboardInterrupt) is the cause, not the
   * status. */
  if (!PyErr_Occurred()) {
    PyObject *text = psb_text(ps_last_error());
    if (text != NULL) {
      PyErr_SetObject(exception_of(st, status), text);
      Py_DECREF(text);
    }
  }
  return NULL;
}

void psb_explain(psb_state *st, ps_status status, const char *format, ...)
{
  PyObject *type, *cause, *traceback, *ours_type, *ours, *ours_traceback;
  va_list arguments;
  if (!PyErr_ExceptionMatches(PyExc_Exception)) {
    return;
  }
  PyErr_Fetch(&type, &cause, &traceback);
  PyErr_NormalizeException(&type, &cause, &traceback);
  if (traceback != NULL) {
    PyException_SetTraceback(cause, traceback);
  }
  va_start(arguments, format);
  PyObject *words = PyUnicode_FromFormatV(format, arguments);
  va_end(arguments);
  if (words != NULL) {
    psb_raise(st, status, "%U: %S", words, cause);
    Py_DECREF(words);
  }
  PyErr_Fetch(&ours_type, &ours, &ours_traceback);
  PyErr_NormalizeException(&ours_type, &ours, &ours_traceback);
  PyException_SetContext(ours, Py_NewRef(cause));
  PyException_SetCause(ours, cause);
  PyErr_Restore(ours_type, ours, ours_traceback);
  Py_DECREF(type);
  Py_XDECREF(traceback);
}

PyObject *psb_text(const char *words)
{
  return PyUnicode_DecodeUTF8(words, (Py_ssize_t)strlen(words), "replace");
}

/* ---- what was found -------------------------------------------------------------------------- */

static void describe_nccl(char *text, size_t room)
{
  int version = ps_nccl_version();
  if (version > 0) {
    snprintf(text, room, "%d.%d.%d", version / 10000, version / 100 % 100, version % 100);
  } else {
    snprintf(text, room, "%s", ps_last_error());
  }
}

static PyObject *core_build_info(PyObject *module, PyObject *unused)
{
  (void)module;
  (void)unused;
  char cuda[256], nccl[256];
  Py_BEGIN_ALLOW_THREADS;
  ps_cuda_describe(cuda, sizeof cuda);
  describe_nccl(nccl, sizeof nccl);
  Py_END_ALLOW_THREADS;
  return Py_BuildValue("{s:s, s:{s:s, s:s}, s:s, s:s, s:s}", "version", ps_version(), "backends",
                       "cpu", "found", "cuda", cuda, "transports", ps_transports(), "nccl", nccl,
                       "compiler", __VERSION__);
}

static PyObject *core_now_ns(PyObject *module, PyObject *unused)
{
  (void)module;
  (void)unused;
  return PyLong_FromLongLong(ps_now_ns());
}

/* The copy has read what x held before x is its caller's again. */
static int settle_copy(psb_state *st, const psb_place *place)
{
  ps_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = psb__place_settle(place);
  Py_END_ALLOW_THREADS;
  if (status != PS_OK) {
    psb_raise_last(st, status);
  }
  return status == PS_OK ? 0 : -1;
}

static PyObject *core_copy(PyObject *module, PyObject *x)
{
  psb_state *st = PyModule_GetState(module);
  psb_view view = {0};
  psb_place place;
  PyObject *made = NULL;
  if (psb__place_open(st, psb__device_of(st, x), &place) == 0 &&
      psb__place_enter(st, &place, x) == 0 &&
      psb_view_from(st, x, "x", PSB_READ, &place, &view) == 0) {
    made = psb_tensor_like(st, x, &place, view.dtype, view.ndim, view.shape, view.data, NULL);
  }
  if (made != NULL && settle_copy(st, &place) < 0) {
    Py_CLEAR(made);
  }
  psb_view_release(&view);
  psb__place_close(&place);
  return made;
}

static PyMethodDef methods[] = {
    {"copy", core_copy, METH_O,
     "copy($module, x, /)\n--\n\nA contiguous copy of a tensor, of the same kind."},
    {"build_info", core_build_info, METH_NOARGS,
     "build_info($module)\n--\n\nVersion, backends and transports of this build, as a dict."},
    {"join", psb_join, METH_VARARGS,
     "join($module, x, rank, slots, carrier, /)\n--\n\n"
     "(Follower, Inbox) of a run that is led in another process; x has its latents' shape and "
     "dtype,\n"
     "carrier is (send, same_clock): send(bytes) takes a message to the leader's Inbox; with a "
     "Pair in\nplace of send, which is then returned in place of the Inbox, messages go by NCCL."},
    {"nccl_version", psb_nccl_version, METH_NOARGS,
     "nccl_version($module)\n--\n\nOf the NCCL that is found, as 22907.  UnsupportedError: none."},
    {"nccl_id", psb_nccl_id, METH_NOARGS,
     "nccl_id($module)\n--\n\nWhat both ends of a Pair need to find each other, 128 bytes."},
    {"now_ns", core_now_ns, METH_NOARGS,
     "now_ns($module)\n--\n\nThe monotonic clock of began_ns and the timeline, in ns."},
    {NULL, NULL, 0, NULL},
};

/* ---- module ---------------------------------------------------------------------------------- */

static int module_exec(PyObject *module)
{
  psb_state *st = PyModule_GetState(module);
  if (add_exceptions(module, st) < 0 || psb_tensor_add_types(module, st) < 0 ||
      psb_program_add_types(module, st) < 0 || psb_leader_add_type(module, st) < 0 ||
      psb_follower_add_type(module, st) < 0 || psb_inbox_add_type(module, st) < 0 ||
      psb_pair_add_type(module, st) < 0) {
    return -1;
  }
  return PyModule_AddFunctions(module, psb_tensor_methods);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
  psb_state *st = PyModule_GetState(module);
  Py_VISIT(st->error);
  for (int k = 0; k < PSB_STATUS_COUNT; ++k) {
    Py_VISIT(st->errors[k]);
  }
  Py_VISIT(st->program_type);
  Py_VISIT(st->leader_type);
  Py_VISIT(st->follower_type);
  Py_VISIT(st->inbox_type);
  Py_VISIT(st->pair_type);
  return psb_tensor_traverse(st, visit, arg);
}

static int module_clear(PyObject *module)
{
  psb_state *st = PyModule_GetState(module);
  Py_CLEAR(st->error);
  for (int k = 0; k < PSB_STATUS_COUNT; ++k) {
    Py_CLEAR(st->errors[k]);
  }
  Py_CLEAR(st->program_type);
  Py_CLEAR(st->leader_type);
  Py_CLEAR(st->follower_type);
  Py_CLEAR(st->inbox_type);
  Py_CLEAR(st->pair_type);
  psb_tensor_clear(st);
  return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* NumPy's table */
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "parastep._core",
    .m_doc = "The C core of parastep: programs, leaders, followers, tensors.",
    .m_size = sizeof(psb_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__core(void)
{
  return PyModuleDef_Init(&definition);
}
