/* tensor.h - tensors out: our own Tensor (tensor.c), and ones of the caller's kind (like.c). */
#ifndef PSB_TENSOR_H
#define PSB_TENSOR_H

#include "view.h"

/* Makes the Tensor type and adds it to the module. */
int psb_tensor_add_type(PyObject *module, psb_state *st);

/* A fresh Tensor that owns its memory at the place (NULL: the host), (shape) of dtype, filled from
 * data there unless that is NULL.  Up to PSB_DIMS_MAX dimensions. */
PyObject *psb_tensor_new(psb_state *st, const psb_place *place, ps_dtype dtype, int ndim,
                         const int64_t *shape, const void *data);

/* As psb_tensor_new, but of the kind of `like`: a NumPy array for a NumPy array, a tensor of like's
 * own library where that takes DLPack in, else our Tensor.  writable, unless NULL, receives the
 * memory of the new tensor, borrowed while the tensor lives; write to it only before Python code
 * has seen the tensor or where both sides expect it. */
PyObject *psb_tensor_like(psb_state *st, PyObject *like, const psb_place *place, ps_dtype dtype,
                          int ndim, const int64_t *shape, const void *data, void **writable);

/* Fills data, dtype and shape from obj, a Tensor of ours. */
void psb__tensor_describe(PyObject *obj, psb_view *view);

/* _roundtrip, _like and _view: private functions through which tests reach the above.  Part of the
 * module's method table, ends with a zeroed entry. */
extern PyMethodDef psb_tensor_methods[];

#endif
