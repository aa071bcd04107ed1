/* ends.h - the ends of a run's links as Python objects: Follower, and to other processes Inbox and
 * Pair; follower_type.c, carrier.c and pair.c. */
#ifndef PSB_ENDS_H
#define PSB_ENDS_H

#include "parastep_transport.h"
#include "run.h"

int psb_follower_add_type(PyObject *module, psb_state *st);
int psb_inbox_add_type(PyObject *module, psb_state *st);
int psb_pair_add_type(PyObject *module, psb_state *st);

/* A Follower that owns link and place from now on, also when NULL is returned. */
PyObject *psb__follower_new(psb_state *st, PyObject *like, psb_place *place, const psb_spec *spec,
                            ps_link *link, int rank);

/* One end of a link to another process, and what is to be told where that is lost: an Inbox, or the
 * Pair.  carrier is a tuple (send, same_clock) or (Pair, same_clock).  The caller closes the end,
 * but not where NULL is returned. */
PyObject *psb__far_open(psb_state *st, const psb_place *place, const psb_spec *spec, int slots,
                        ps_role role, PyObject *carrier, ps_link **end);

/* The pair of a Pair, borrowed; NULL with an exception where that is closed. */
ps_pair *psb__pair_of(psb_state *st, PyObject *obj);

/* join(x, rank, slots, carrier), nccl_version() and nccl_id() of the module. */
PyObject *psb_join(PyObject *module, PyObject *args);
PyObject *psb_nccl_version(PyObject *module, PyObject *unused);
PyObject *psb_nccl_id(PyObject *module, PyObject *unused);

#endif
