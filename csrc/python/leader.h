/* leader.h - the Python object of a leader, between leader_life.c and leader_type.c. */
#ifndef PSB_LEADER_H
#define PSB_LEADER_H

#include "parastep_transport.h"
#include "run.h"

int psb_leader_add_type(PyObject *module, psb_state *st);

typedef struct leader_object {
  PyObject_HEAD psb_guard guard;
  ps_leader *leader;
  psb_spec spec;
  psb_place place;
  psb_place *places; /* (ranks) of the followers' ends not yet handed out */
  PyObject *like;    /* the first latent: points are tensors of its kind */
  int ranks;
  bool lane;               /* rank 0 has a follower too */
  int step;                /* of the last ask */
  ps_link **follower_ends; /* (ranks) not yet handed out, or NULL; 0 is a lane's */
  PyObject **inboxes;      /* (ranks) or Pairs of ranks in other processes, NULL for the rest */
} leader_object;

/* ---- leader_life.c --------------------------------------------------------------------------- */

PyObject *psb__leader_new(PyTypeObject *type, PyObject *args, PyObject *kwargs);
int psb__leader_traverse(PyObject *obj, visitproc visit, void *arg);
int psb__leader_clear(PyObject *obj);
void psb__leader_dealloc(PyObject *obj);

/* Closes the ends that nobody took; twice is fine. */
void psb__leader_close_ends(leader_object *self);

#endif
