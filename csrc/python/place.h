/* place.h - where a rank's tensors are; place.c. */
#ifndef PSB_PLACE_H
#define PSB_PLACE_H

#include "errors.h"

/* Where a rank's tensors are: the host, or a CUDA device with a backend of the rank's own. */
typedef struct psb_place {
  const ps_backend *backend; /* retained */
  int device;                /* of CUDA, or -1: the host */
  void *stream;              /* the host library's current one there, at the last enter */
} psb_place;

/* Whether a tensor must be on a device, and which. */
static inline int psb__wanted_device(const psb_place *place)
{
  return place != NULL ? place->device : -1;
}

int psb__place_open(psb_state *st, int device, psb_place *place);
void psb__place_close(psb_place *place); /* twice is fine */

/* Work of the place's backend goes to the stream on which the library of `like` works in this
 * thread; called at the beginning of every method of a run. */
int psb__place_enter(psb_state *st, psb_place *place, PyObject *like);

/* Waits until the work of the place is done; without the GIL. */
ps_status psb__place_settle(const psb_place *place);

/* The CUDA device of a tensor, -1 for everything else; no exception. */
int psb__device_of(psb_state *st, PyObject *obj);

#endif
