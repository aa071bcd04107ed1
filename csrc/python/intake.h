/* intake.h - what convert.c and dlpack_in.c share while a tensor of the caller becomes a view. */
#ifndef PSB_INTAKE_H
#define PSB_INTAKE_H

#include "errors.h"
#include "lookup.h"

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

/* Elements of a shape.  False where a size is negative or the bytes do not fit an address. */
bool psb__count(int ndim, const int64_t *shape, size_t element, size_t *count);

/* The DLPack part, dlpack_in.c.  Both fill the view without judging strides; 1 filled, -1 refused,
 * and 0 from psb__take_producer where obj does not speak DLPack. */
int psb__take_capsule(psb_intake *in, PyObject *capsule);
int psb__take_producer(psb_intake *in, PyObject *obj);

/* Refuses a view that is filled in but not where the run is. */
int psb__check_device(const psb_intake *in);

/* PS_NONE for a NumPy dtype that the core does not compute with. */
ps_dtype psb__numpy_dtype(PyArray_Descr *descr);

/* Fills data, dtype and shape from obj, a Tensor of ours, tensor.c. */
void psb__tensor_describe(PyObject *obj, psb_view *view);

/* Whether a tensor must be on a device, and which. */
static inline int psb__wanted_device(const psb_place *place)
{
  return place != NULL ? place->device : -1;
}

#endif
