/* like.h - tensors out: ones of the caller's own kind; like.c. */
#ifndef PSB_LIKE_H
#define PSB_LIKE_H

#include "place.h"

/* As psb_tensor_new, but of the kind of `like`: a NumPy array for a NumPy array, a tensor of like's
 * own library where that takes DLPack in, else our Tensor.  writable, unless NULL, receives the
 * memory of the new tensor, borrowed while the tensor lives; write to it only before Python code
 * has seen the tensor or where both sides expect it. */
PyObject *psb_tensor_like(psb_state *st, PyObject *like, const psb_place *place, ps_dtype dtype,
                          int ndim, const int64_t *shape, const void *data, void **writable);

/* _roundtrip, _like and _view: private functions through which tests reach tensors; probe.c.  Part
 * of the module's method table, ends with a zeroed entry. */
extern PyMethodDef psb_probe_methods[];

#endif
