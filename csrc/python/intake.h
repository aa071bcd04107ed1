/* intake.h - a tensor of the caller while it becomes a view: intake.c judges it, dlpack_in.c and
 * convert.c fill it in. */
#ifndef PSB_INTAKE_H
#define PSB_INTAKE_H

#include "lookup.h"
#include "view.h"

typedef struct psb_intake {
  psb_state *st;
  const char *name;       /* of the argument, for errors */
  int flags;              /* psb_view_flags */
  const psb_place *place; /* NULL: the host */
  psb_view *view; /* what is known so far; released by psb_view_from where the intake fails */
  bool strided;   /* stride is filled in; otherwise the producer says C-contiguous */
  bool swapped;   /* elements have the other byte order */
  int64_t stride[PSB_DIMS_MAX]; /* bytes */
} psb_intake;

/* Refuses a number of dimensions that a view cannot hold, then sets it. */
int psb__take_ndim(psb_intake *in, int64_t ndim);

/* Refuses a view that is filled in but not where the run is. */
int psb__check_device(const psb_intake *in);

/* Judges a view that is filled in, and copies what is not plain memory; -1 where it is refused, 1
 * where it lies on a device and is not plain there: its library is to copy it. */
int psb__settle(psb_intake *in);

/* The DLPack part, dlpack_in.c.  Both fill the view without judging strides; 1 filled, -1 refused,
 * and 0 from psb__take_producer where obj does not speak DLPack. */
int psb__take_capsule(psb_intake *in, PyObject *capsule);
int psb__take_producer(psb_intake *in, PyObject *obj);

#endif
