/* errors.c - the core's errors as Python exceptions, and Ctrl-C as an error of the core's waits.
 *
 * Called from everywhere in the binding; calls none of it.
 */
#include <string.h>

#include "errors.h"

/* ---- the exceptions -------------------------------------------------------------------------- */

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

int psb_errors_add_types(PyObject *module, psb_state *st)
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

/* ---- raising them ---------------------------------------------------------------------------- */

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

int psb__judge(psb_state *st, ps_status status)
{
  if (status == PS_OK && !PyErr_Occurred()) {
    return 0;
  }
  psb_raise_last(st, status);
  return -1;
}

/* ---- waits ----------------------------------------------------------------------------------- */

int psb__check_signals(void *unused)
{
  (void)unused;
  PyGILState_STATE gil = PyGILState_Ensure();
  int stop = PyErr_CheckSignals();
  PyGILState_Release(gil);
  return stop;
}
