/* options_in.c - what a Leader is made with: program, latent, and options by keyword.
 *
 * leader_life.c calls it once a run, module.c has check_options of it.  Each error names the
 * argument, what was given and what may be; what only the core can judge (the tolerance, the
 * latent's shape) is left to it.
 */
#include <limits.h>
#include <string.h>

#include "options.h"
#include "program.h"
#include "run.h"

/* ---- readers --------------------------------------------------------------------------------- */

/* All of them leave the default where the argument was not given, obj being NULL. */

static int int_in(psb_state *st, PyObject *obj, const char *name, int least, int most, int *value)
{
  if (obj == NULL) {
    return 0;
  }
  if (!PyIndex_Check(obj)) {
    PyErr_Format(PyExc_TypeError, "%s: %R: must be an integer", name, obj);
    return -1;
  }
  PyObject *number = PyNumber_Index(obj);
  if (number == NULL) {
    return -1;
  }
  int overflow;
  long found = PyLong_AsLongAndOverflow(number, &overflow);
  Py_DECREF(number);
  if (found == -1 && PyErr_Occurred()) {
    return -1;
  }
  if (overflow || found < least || found > most) {
    if (most == INT_MAX) {
      psb_raise(st, PS_INVALID, "%s: %R: must be %d or above", name, obj, least);
    } else {
      psb_raise(st, PS_INVALID, "%s: %R: must be from %d to %d", name, obj, least, most);
    }
    return -1;
  }
  *value = (int)found;
  return 0;
}

static int real_in(PyObject *obj, const char *name, double *value)
{
  if (obj == NULL) {
    return 0;
  }
  double found = PyFloat_AsDouble(obj);
  if (found == -1.0 && PyErr_Occurred()) {
    if (PyErr_ExceptionMatches(PyExc_TypeError)) {
      PyErr_Format(PyExc_TypeError, "%s: %R: must be a number", name, obj);
    }
    return -1;
  }
  *value = found;
  return 0;
}

/* The index of a string among two. */
static int choice_in(psb_state *st, PyObject *obj, const char *name, const char *const *choices,
                     int *value)
{
  for (int k = 0; obj != NULL && PyUnicode_Check(obj) && k < 2; ++k) {
    if (PyUnicode_CompareWithASCIIString(obj, choices[k]) == 0) {
      *value = k;
      return 0;
    }
  }
  if (obj == NULL) {
    return 0;
  }
  psb_raise(st, PS_INVALID, "%s: %R: must be '%s' or '%s'", name, obj, choices[0], choices[1]);
  return -1;
}

/* Seconds above 0.  What is longer than a life is as good as none, and fits the clock. */
static int deadline_in(psb_state *st, PyObject *obj, int64_t *deadline_ns)
{
  const double most = 1e9;
  double seconds = 0.0;
  *deadline_ns = 0;
  if (obj == NULL || obj == Py_None) {
    return 0;
  }
  if (real_in(obj, "deadline", &seconds) < 0) {
    return -1;
  }
  if (!(seconds > 0.0)) {
    psb_raise(st, PS_INVALID,
              "deadline: %R: must be seconds above 0, or None for the default rule (60 s or ten "
              "times the longest forward)",
              obj);
    return -1;
  }
  double ns = (seconds < most ? seconds : most) * 1e9;
  *deadline_ns = ns > 1.0 ? (int64_t)ns : 1;
  return 0;
}

/* ---- options that need no run to be judged --------------------------------------------------- */

/* Those that hosts pass on from their users; NULL where one was not given. */
typedef struct choices {
  PyObject *tolerance, *policy, *order, *max_stride, *warmup, *deadline, *on_failure;
} choices;

static int options_in(psb_state *st, const choices *given, ps_options *options)
{
  static const char *const policies[] = {"verified", "paper"};
  static const char *const reactions[] = {"continue", "raise"};
  int policy = 0;
  ps_options_init(options);
  if (real_in(given->tolerance, "tolerance", &options->tolerance) < 0 ||
      choice_in(st, given->policy, "policy", policies, &policy) < 0 ||
      int_in(st, given->order, "order", 0, 1, &options->order) < 0 ||
      int_in(st, given->max_stride != Py_None ? given->max_stride : NULL, "max_stride", 1, INT_MAX,
             &options->max_stride) < 0 ||
      int_in(st, given->warmup, "warmup", 1, INT_MAX, &options->warmup) < 0 ||
      deadline_in(st, given->deadline, &options->deadline_ns) < 0 ||
      choice_in(st, given->on_failure, "on_failure", reactions, &options->raise_on_loss) < 0) {
    return -1;
  }
  options->policy = policy == 0 ? PS_VERIFIED : PS_PAPER;
  return 0;
}

PyObject *psb_check_options(PyObject *module, PyObject *args, PyObject *kwargs)
{
  static char *names[] = {"tolerance", "policy",   "order",      "max_stride",
                          "warmup",    "deadline", "on_failure", NULL};
  psb_state *st = PyModule_GetState(module);
  ps_options options;
  choices given = {0};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOOOOO:check_options", names, &given.tolerance,
                                   &given.policy, &given.order, &given.max_stride, &given.warmup,
                                   &given.deadline, &given.on_failure) ||
      options_in(st, &given, &options) < 0) {
    return NULL;
  }
  return psb__judge(st, ps_options_check(&options)) == 0 ? Py_NewRef(Py_None) : NULL;
}

/* ---- what belongs to one run ----------------------------------------------------------------- */

/* None, which changes nothing, or a sequence with a number for every rank. */
static int numbers_in(psb_state *st, PyObject *obj, const char *name, int least, int most,
                      int ranks, int *numbers)
{
  if (obj == NULL || obj == Py_None) {
    return 0;
  }
  PyObject *items = psb__items(obj, name, "integers, one a rank,");
  if (items == NULL) {
    return -1;
  }
  int failed = 0;
  if (PyTuple_GET_SIZE(items) != ranks) {
    psb_raise(st, PS_INVALID, "%s: %zd numbers for %d ranks", name, PyTuple_GET_SIZE(items), ranks);
    failed = -1;
  }
  for (int rank = 0; failed == 0 && rank < ranks; ++rank) {
    failed = int_in(st, PyTuple_GET_ITEM(items, rank), name, least, most, &numbers[rank]);
  }
  Py_DECREF(items);
  return failed;
}

/* One a rank where nothing is choices. */
static int slots_in(psb_state *st, PyObject *obj, int ranks, int *slots)
{
  for (int rank = 0; rank < ranks; ++rank) {
    slots[rank] = 1;
  }
  return numbers_in(st, obj, "slots", 1, PS_SLOTS_MAX, ranks, slots);
}

/* CUDA devices, -1 for the host; all where x is where nothing is choices. */
static int devices_in(psb_state *st, PyObject *obj, PyObject *x, int ranks, int *devices)
{
  int own = psb__device_of(st, x);
  for (int rank = 0; rank < ranks; ++rank) {
    devices[rank] = own;
  }
  int failed = numbers_in(st, obj, "devices", -1, INT_MAX, ranks, devices);
  if (failed == 0 && devices[0] != own) {
    psb_raise(st, PS_DEVICE, "devices: rank 0 is on device %d, but x on %d (-1 is the host)",
              devices[0], own);
    failed = -1;
  }
  return failed;
}

/* None, or a dict {rank: carrier}; what its values are is looked at where they are used. */
static int carriers_in(psb_state *st, PyObject *obj, int ranks, PyObject **carriers)
{
  PyObject *key, *value;
  Py_ssize_t place = 0;
  *carriers = obj != Py_None ? obj : NULL;
  if (*carriers == NULL) {
    return 0;
  }
  if (!PyDict_Check(obj)) {
    PyErr_Format(PyExc_TypeError, "carriers: %R: must be {rank: (send, same_clock)}", obj);
    return -1;
  }
  while (PyDict_Next(obj, &place, &key, &value)) {
    int rank;
    if (int_in(st, key, "carriers: rank", 1, ranks - 1, &rank) < 0) {
      return -1;
    }
  }
  return 0;
}

typedef struct keywords {
  PyObject *program, *x, *ranks, *slots, *carriers, *devices;
  choices options;
  int lane;
} keywords;

static int keywords_in(PyObject *args, PyObject *kwargs, keywords *given)
{
  static char *names[] = {"program",    "x",     "ranks",      "slots",   "tolerance",
                          "policy",     "order", "max_stride", "warmup",  "deadline",
                          "on_failure", "lane",  "carriers",   "devices", NULL};
  choices *options = &given->options;
  *given = (keywords){0};
  return PyArg_ParseTupleAndKeywords(
             args, kwargs, "OO|$OOOOOOOOOpOO:Leader", names, &given->program, &given->x,
             &given->ranks, &given->slots, &options->tolerance, &options->policy, &options->order,
             &options->max_stride, &options->warmup, &options->deadline, &options->on_failure,
             &given->lane, &given->carriers, &given->devices)
             ? 0
             : -1;
}

int psb__order_in(psb_state *st, PyObject *args, PyObject *kwargs, psb_order *order)
{
  keywords given;
  if (keywords_in(args, kwargs, &given) < 0) {
    return -1;
  }
  order->program = psb_program_of(st, given.program);
  order->x = given.x;
  order->ranks = 1;
  order->lane = given.lane;
  if (order->program == NULL ||
      int_in(st, given.ranks, "ranks", 1, PS_RANKS_MAX, &order->ranks) < 0 ||
      slots_in(st, given.slots, order->ranks, order->slots) < 0 ||
      options_in(st, &given.options, &order->options) < 0 ||
      carriers_in(st, given.carriers, order->ranks, &order->carriers) < 0 ||
      devices_in(st, given.devices, order->x, order->ranks, order->devices) < 0) {
    return -1;
  }
  order->options.check = psb__check_signals;
  return 0;
}
