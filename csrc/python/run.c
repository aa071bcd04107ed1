/* run.c - what Leader and Follower share: who is inside, the latents of a run, work out and in.
 *
 * leader_type.c and follower_type.c call it at the beginning and at the end of every method.
 */
#include <string.h>
#include <unistd.h>

#include "run.h"

/* ---- who is inside --------------------------------------------------------------------------- */

psb_guard psb__guard_new(void)
{
  return (psb_guard){.process = getpid(), .busy = 0};
}

bool psb__at_home(const psb_guard *guard)
{
  return guard->process == getpid();
}

int psb__enter(psb_state *st, psb_guard *guard, const char *what)
{
  if (!psb__at_home(guard)) {
    psb_raise(st, PS_STATE,
              "%s: the run was made in another process (a fork carried it here); create a new one",
              what);
    return -1;
  }
  if (__atomic_exchange_n(&guard->busy, 1, __ATOMIC_ACQUIRE) != 0) {
    psb_raise(st, PS_STATE, "%s: another call is inside; one thread at a time", what);
    return -1;
  }
  return 0;
}

void psb__leave(psb_guard *guard)
{
  __atomic_store_n(&guard->busy, 0, __ATOMIC_RELEASE);
}

/* ---- lists ----------------------------------------------------------------------------------- */

PyObject *psb__list(int count, psb_item item, const void *context)
{
  PyObject *list = PyList_New(count);
  for (int k = 0; list != NULL && k < count; ++k) {
    PyObject *made = item(context, k);
    if (made != NULL) {
      PyList_SET_ITEM(list, k, made);
    } else {
      Py_CLEAR(list);
    }
  }
  return list;
}

PyObject *psb__items(PyObject *obj, const char *name, const char *what)
{
  PyObject *items = PySequence_Tuple(obj);
  if (items == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Format(PyExc_TypeError, "%s: a sequence of %s is needed", name, what);
  }
  return items;
}

/* ---- latents of the run ---------------------------------------------------------------------- */

int psb__spec_from(psb_state *st, PyObject *x, const psb_place *place, psb_spec *spec)
{
  psb_view view;
  if (psb_view_from(st, x, "x", PSB_READ, place, &view) < 0) {
    return -1;
  }
  /* The first dimension is the batch where there are others: drift is taken per item. */
  size_t items = view.ndim >= 2 ? (size_t)view.shape[0] : 1;
  *spec = (psb_spec){.ndim = view.ndim};
  memcpy(spec->shape, view.shape, sizeof spec->shape);
  spec->layout = (ps_layout){
      .items = items,
      .size = items > 0 ? view.count / items : 0,
      .x = view.dtype,
      .m = PS_NONE,
  };
  psb_view_release(&view);
  return 0;
}

static PyObject *size_item(const void *shape, int k)
{
  return PyLong_FromLongLong(((const int64_t *)shape)[k]);
}

/* A shape as Python shows it. */
static PyObject *shape_out(int ndim, const int64_t *shape)
{
  PyObject *list = psb__list(ndim, size_item, shape);
  PyObject *tuple = list != NULL ? PyList_AsTuple(list) : NULL;
  Py_XDECREF(list);
  return tuple;
}

static void raise_shape(psb_state *st, const char *name, const psb_view *view, const psb_spec *spec)
{
  PyObject *given = shape_out(view->ndim, view->shape);
  PyObject *needed = given != NULL ? shape_out(spec->ndim, spec->shape) : NULL;
  if (needed != NULL) {
    psb_raise(st, PS_SHAPE, "%s: shape %R where the latents are %R", name, given, needed);
  }
  Py_XDECREF(given);
  Py_XDECREF(needed);
}

static int check_tensor(psb_state *st, const char *name, const psb_view *view, const psb_spec *spec,
                        ps_dtype dtype)
{
  size_t bytes = (size_t)view->ndim * sizeof *view->shape;
  if (view->ndim != spec->ndim || memcmp(view->shape, spec->shape, bytes) != 0) {
    raise_shape(st, name, view, spec);
    return -1;
  }
  if (dtype != PS_NONE && view->dtype != dtype) {
    psb_raise(st, PS_DTYPE, "%s: dtype %s where %s is needed; convert it first", name,
              ps_dtype_name(view->dtype), ps_dtype_name(dtype));
    return -1;
  }
  return 0;
}

int psb__tensor_in(psb_state *st, PyObject *obj, const char *name, int flags,
                   const psb_place *place, const psb_spec *spec, ps_dtype dtype, psb_view *view)
{
  int failed = psb_view_from(st, obj, name, flags, place, view);
  if (failed == 0) {
    failed = check_tensor(st, name, view, spec, dtype);
  }
  if (failed != 0) {
    psb_view_release(view);
  }
  return failed;
}

PyObject *psb__tensor_out(psb_state *st, PyObject *like, const psb_place *place,
                          const psb_spec *spec, ps_dtype dtype, const void *data, void **writable)
{
  return psb_tensor_like(st, like, place, dtype, spec->ndim, spec->shape, data, writable);
}

/* ---- work ------------------------------------------------------------------------------------ */

typedef struct work_context {
  psb_state *st;
  PyObject *like;
  const psb_place *place;
  const psb_spec *spec;
  const ps_work *work;
} work_context;

static PyObject *work_item(const void *context, int k)
{
  const work_context *c = context;
  PyObject *point = psb__tensor_out(c->st, c->like, c->place, c->spec, c->spec->layout.x,
                                    c->work->point[k], NULL);
  return point != NULL ? Py_BuildValue("(iN)", c->work->step[k], point) : NULL;
}

PyObject *psb__work_out(psb_state *st, PyObject *like, const psb_place *place, const psb_spec *spec,
                        const ps_work *work)
{
  work_context context = {st, like, place, spec, work};
  return psb__list(work->count, work_item, &context);
}

PyObject *psb__company_of(const ps_work *work)
{
  return Py_BuildValue("(iiO)", work->round, work->followers, work->exact ? Py_True : Py_False);
}

/* The tensor's memory is its owner's again once this returns: the copy is waited for. */
static ps_status copy_in(const psb_place *place, void *to, const void *from, size_t bytes)
{
  ps_status status = place->backend->copy(place->backend, to, from, bytes);
  return status == PS_OK ? psb__place_settle(place) : status;
}

static int take_in(psb_state *st, PyObject *obj, const psb_place *place, const psb_spec *spec,
                   const psb_room *room, int k, ps_dtype *found)
{
  psb_view view = {0};
  ps_dtype dtype = k > 0 ? *found : room->dtype;
  if (psb__tensor_in(st, obj, room->name, PSB_READ, place, spec, dtype, &view) < 0) {
    return -1;
  }
  int failed = view.bytes > room->bytes ? -1 : 0;
  if (failed) {
    psb_raise(st, PS_DTYPE, "%s: dtype %s does not fit a run of %s latents", room->name,
              ps_dtype_name(view.dtype), ps_dtype_name(spec->layout.x));
  } else {
    ps_status status;
    *found = view.dtype;
    Py_BEGIN_ALLOW_THREADS;
    status = copy_in(place, room->to[k], view.data, view.bytes);
    Py_END_ALLOW_THREADS;
    failed = psb__judge(st, status);
  }
  psb_view_release(&view);
  return failed;
}

int psb__sequence_in(psb_state *st, PyObject *obj, const psb_place *place, const psb_spec *spec,
                     const psb_room *room, ps_dtype *found)
{
  PyObject *items = psb__items(obj, room->name, "tensors, one a step of the work,");
  if (items == NULL) {
    return -1;
  }
  int failed = 0;
  if (PyTuple_GET_SIZE(items) != room->count) {
    psb_raise(st, PS_SHAPE, "%s: %zd tensors for %d steps", room->name, PyTuple_GET_SIZE(items),
              room->count);
    failed = -1;
  }
  for (int k = 0; failed == 0 && k < room->count; ++k) {
    failed = take_in(st, PyTuple_GET_ITEM(items, k), place, spec, room, k, found);
  }
  Py_DECREF(items);
  return failed;
}
