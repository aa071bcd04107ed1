/* module.c - parastep._core: multi-phase init, functions, what was found.
 *
 * Python imports it through parastep/__init__.py.  Import starts no thread and takes no lock; all
 * state is the module's own, so that sub-interpreters and free-threaded builds work.
 */
#include "ends.h"
#include "holders.h"
#include "leader.h"
#include "lookup.h"
#include "options.h"
#include "program.h"

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
  return psb__judge(st, status);
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
    {"check_options", PSB_KEYWORDS(psb_check_options), METH_VARARGS | METH_KEYWORDS,
     "check_options($module, /, *, tolerance=0.04, policy='verified', order=1, max_stride=None, "
     "warmup=5, deadline=None, on_failure='continue')\n--\n\n"
     "Raises what Leader raises for options that cannot be, without a program and a latent."},
    {"holds", psb_holds, METH_VARARGS,
     "holds($module, holders, items, counts, /)\n--\n\n"
     "Whether the k-th of a list of containers holds the next counts[k] of items, the very objects "
     "in\nthe order that it is iterated in, of a dict its values."},
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
  if (psb_errors_add_types(module, st) < 0 || psb_lookup_load(st) < 0 ||
      psb_tensor_add_type(module, st) < 0 || psb_program_add_type(module, st) < 0 ||
      psb_leader_add_type(module, st) < 0 || psb_follower_add_type(module, st) < 0 ||
      psb_inbox_add_type(module, st) < 0 || psb_pair_add_type(module, st) < 0) {
    return -1;
  }
  return PyModule_AddFunctions(module, psb_probe_methods);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
  psb_state *st = PyModule_GetState(module);
  Py_VISIT(st->error);
  for (int k = 0; k < PSB_STATUS_COUNT; ++k) {
    Py_VISIT(st->errors[k]);
  }
  Py_VISIT(st->tensor_type);
  Py_VISIT(st->program_type);
  Py_VISIT(st->leader_type);
  Py_VISIT(st->follower_type);
  Py_VISIT(st->inbox_type);
  Py_VISIT(st->pair_type);
  return 0;
}

static int module_clear(PyObject *module)
{
  psb_state *st = PyModule_GetState(module);
  Py_CLEAR(st->error);
  for (int k = 0; k < PSB_STATUS_COUNT; ++k) {
    Py_CLEAR(st->errors[k]);
  }
  Py_CLEAR(st->tensor_type);
  Py_CLEAR(st->program_type);
  Py_CLEAR(st->leader_type);
  Py_CLEAR(st->follower_type);
  Py_CLEAR(st->inbox_type);
  Py_CLEAR(st->pair_type);
  psb_lookup_clear(st);
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
