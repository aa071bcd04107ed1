/* holders.c - whether containers still hold what they did: the very objects, in order.
 *
 * The adapters look so at all that a model consists of, around each forward and each callback: some
 * ten thousand containers, which take Python's own loops longer than launching a layer does.
 */
#include "holders.h"

/* Where the walk is: the next of the objects that are to be found. */
typedef struct walk {
  PyObject *items; /* a list */
  Py_ssize_t at;
} walk;

static bool is_next(walk *w, PyObject *found)
{
  bool same = w->at < PyList_GET_SIZE(w->items) && PyList_GET_ITEM(w->items, w->at) == found;
  w->at += same;
  return same;
}

/* 1: it holds the next `count` objects, and nothing else. */
static int dict_holds(walk *w, PyObject *dict, Py_ssize_t count)
{
  bool same = PyDict_GET_SIZE(dict) == count;
  Py_ssize_t place = 0;
  PyObject *value;
  while (same && PyDict_Next(dict, &place, NULL, &value)) {
    same = is_next(w, value);
  }
  return same;
}

/* As dict_holds, of whatever has a length and can be iterated; -1: what that raised. */
static int other_holds(walk *w, PyObject *holder, Py_ssize_t count)
{
  Py_ssize_t size = PyObject_Size(holder);
  PyObject *values = size == count ? PyObject_GetIter(holder) : NULL;
  if (values == NULL) {
    return PyErr_Occurred() ? -1 : 0;
  }
  bool same = true;
  PyObject *value;
  while (same && (value = PyIter_Next(values)) != NULL) {
    same = is_next(w, value);
    Py_DECREF(value);
  }
  Py_DECREF(values);
  return PyErr_Occurred() ? -1 : same;
}

static int holds(walk *w, PyObject *holder, Py_ssize_t count)
{
  if (!PyDict_Check(holder)) {
    return other_holds(w, holder, count);
  }
  int same;
  PSB_BEGIN_LOCKED(holder);
  same = dict_holds(w, holder, count);
  PSB_END_LOCKED();
  return same;
}

PyObject *psb_holds(PyObject *module, PyObject *args)
{
  (void)module;
  PyObject *holders, *counts;
  walk w = {0};
  if (!PyArg_ParseTuple(args, "O!O!O!", &PyList_Type, &holders, &PyList_Type, &w.items,
                        &PyList_Type, &counts)) {
    return NULL;
  }
  int same = PyList_GET_SIZE(holders) == PyList_GET_SIZE(counts);
  for (Py_ssize_t k = 0; same > 0 && k < PyList_GET_SIZE(holders); ++k) {
    Py_ssize_t count =
        k < PyList_GET_SIZE(counts) ? PyLong_AsSsize_t(PyList_GET_ITEM(counts, k)) : 0;
    same = count == -1 && PyErr_Occurred() ? -1 : holds(&w, PyList_GET_ITEM(holders, k), count);
  }
  if (same < 0) {
    return NULL;
  }
  return PyBool_FromLong(same && w.at == PyList_GET_SIZE(w.items));
}
