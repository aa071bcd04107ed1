/* tensor.h - our own Tensor; tensor.c. */
#ifndef PSB_TENSOR_H
#define PSB_TENSOR_H

#include "place.h"

enum { PSB_DIMS_MAX = 8 };

/* Makes the Tensor type and adds it to the module. */
int psb_tensor_add_type(PyObject *module, psb_state *st);

/* A fresh Tensor that owns its memory at the place (NULL: the host), (shape) of dtype, filled from
 * data there unless that is NULL.  Up to PSB_DIMS_MAX dimensions. */
PyObject *psb_tensor_new(psb_state *st, const psb_place *place, ps_dtype dtype, int ndim,
                         const int64_t *shape, const void *data);

/* Elements of a shape.  False where a size is negative or the bytes do not fit an address. */
bool psb__count(int ndim, const int64_t *shape, size_t element, size_t *count);

#endif
