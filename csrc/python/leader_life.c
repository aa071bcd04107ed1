/* leader_life.c - how the Python object of a leader comes to be, with its links, and how it goes.
 *
 * leader_type.c names these functions in the type's slots.  Here a leader opens its links: to a
 * thread, whose end waits for leader.follower, or through a carrier to another process.
 */
#include "ends.h"
#include "leader.h"
#include "options.h"

/* ---- making ---------------------------------------------------------------------------------- */

static void close_links(ps_link **links, int count)
{
  for (int k = 0; links != NULL && k < count; ++k) {
    if (links[k] != NULL) {
      links[k]->ops->close(links[k]);
      links[k] = NULL;
    }
  }
}

void psb__leader_close_ends(leader_object *self)
{
  close_links(self->follower_ends, self->ranks);
}

static PyObject *carrier_of(const psb_order *order, int rank)
{
  PyObject *key = order->carriers != NULL ? PyLong_FromLong(rank) : NULL;
  PyObject *found = key != NULL ? PyDict_GetItemWithError(order->carriers, key) : NULL;
  Py_XDECREF(key);
  return found;
}

/* The leader's end of a link: to a thread, or through a carrier to another process. */
static int open_link(psb_state *st, leader_object *self, const psb_order *order, int rank,
                     ps_link **leader_end)
{
  int slots = order->slots[rank];
  PyObject *carrier = carrier_of(order, rank);
  if (carrier == NULL) {
    psb_place *place = &self->places[rank];
    ps_status status;
    if (psb__place_open(st, order->devices[rank], place) < 0) {
      return -1;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = ps_threads_open_on(&self->spec.layout, slots, self->place.backend, place->backend,
                                leader_end, &self->follower_ends[rank]);
    Py_END_ALLOW_THREADS;
    return psb__judge(st, status);
  }
  self->inboxes[rank] =
      psb__far_open(st, &self->place, &self->spec, slots, PS_LEADS, carrier, leader_end);
  return self->inboxes[rank] != NULL ? 0 : -1;
}

static int open_run(psb_state *st, leader_object *self, const psb_order *order)
{
  ps_link *leader_ends[PS_RANKS_MAX] = {NULL};
  for (int rank = order->lane ? 0 : 1; rank < self->ranks; ++rank) {
    if (open_link(st, self, order, rank, &leader_ends[rank]) < 0) {
      close_links(leader_ends, self->ranks);
      return -1;
    }
  }
  ps_status status;
  Py_BEGIN_ALLOW_THREADS;
  status =
      ps_leader_create(order->program, &self->spec.layout, &order->options, self->place.backend,
                       leader_ends, self->ranks, order->slots, &self->leader);
  Py_END_ALLOW_THREADS;
  return psb__judge(st, status);
}

static PyObject *leader_make(psb_state *st, PyTypeObject *type, const psb_order *order)
{
  leader_object *self = (leader_object *)type->tp_alloc(type, 0);
  if (self == NULL) {
    return NULL;
  }
  self->guard = psb__guard_new();
  self->ranks = order->ranks;
  self->lane = order->lane != 0;
  self->like = Py_NewRef(order->x);
  self->follower_ends = PyMem_Calloc((size_t)order->ranks, sizeof *self->follower_ends);
  self->inboxes = PyMem_Calloc((size_t)order->ranks, sizeof *self->inboxes);
  self->places = PyMem_Calloc((size_t)order->ranks, sizeof *self->places);
  if (self->follower_ends == NULL || self->inboxes == NULL || self->places == NULL) {
    PyErr_NoMemory();
    goto fail;
  }
  if (psb__place_open(st, order->devices[0], &self->place) < 0 ||
      psb__place_enter(st, &self->place, self->like) < 0 ||
      psb__spec_from(st, order->x, &self->place, &self->spec) < 0 ||
      open_run(st, self, order) < 0) {
    goto fail;
  }
  return (PyObject *)self;

fail:
  Py_DECREF(self);
  return NULL;
}

PyObject *psb__leader_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
  psb_state *st = psb_state_of(type);
  psb_order order;
  if (st == NULL || psb__order_in(st, args, kwargs, &order) < 0) {
    return NULL;
  }
  return leader_make(st, type, &order);
}

/* ---- letting go ------------------------------------------------------------------------------ */

int psb__leader_traverse(PyObject *obj, visitproc visit, void *arg)
{
  Py_VISIT(Py_TYPE(obj));
  Py_VISIT(((leader_object *)obj)->like);
  return 0;
}

int psb__leader_clear(PyObject *obj)
{
  Py_CLEAR(((leader_object *)obj)->like);
  return 0;
}

/* A forked child must not touch locks that a thread of the parent may have held: it leaks instead.
 */
void psb__leader_dealloc(PyObject *obj)
{
  leader_object *self = (leader_object *)obj;
  PyTypeObject *type = Py_TYPE(obj);
  PyObject_GC_UnTrack(obj);
  if (psb__at_home(&self->guard)) {
    psb__leader_close_ends(self);
    ps_leader_destroy(self->leader);
    for (int k = 0; self->places != NULL && k < self->ranks; ++k) {
      psb__place_close(&self->places[k]);
    }
    psb__place_close(&self->place);
  }
  for (int k = 0; self->inboxes != NULL && k < self->ranks; ++k) {
    Py_XDECREF(self->inboxes[k]);
  }
  PyMem_Free(self->inboxes);
  PyMem_Free(self->places);
  PyMem_Free(self->follower_ends);
  psb__leader_clear(obj);
  type->tp_free(obj);
  Py_DECREF(type);
}
