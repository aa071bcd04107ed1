/* block.h - what a Tensor of ours is, for the files that make it up (block.c, dlpack_out.c,
 * tensor.c), take it in (convert.c) and hand it on (like.c). */
#ifndef PSB_BLOCK_H
#define PSB_BLOCK_H

#include <stdatomic.h>

#include "dlpack_abi.h"
#include "tensor.h"

/* Memory that counts its users, so that a consumer on any thread lets go of it without the GIL. */
typedef struct block {
  atomic_size_t users;
  void *data;                /* aligned, behind this header, or memory of a device */
  const ps_backend *backend; /* of that device, retained; NULL: the host */
  _Atomic(void *) stream;    /* the last one that a consumer on the device named */
} block;

static inline int psb__block_device(const block *shared)
{
  return shared->backend ? shared->backend->device : -1;
}

/* Nothing in it changes after creation and it refers to no object but its type, so it needs neither
 * a lock nor the garbage collector. */
typedef struct tensor {
  PyObject head;
  block *block;
  ps_dtype dtype;
  int ndim;
  size_t count;
  Py_ssize_t shape[PSB_DIMS_MAX];
  Py_ssize_t strides[PSB_DIMS_MAX]; /* bytes */
} tensor;

static inline size_t psb__tensor_bytes(const tensor *self)
{
  return self->count * ps_dtype_size(self->dtype);
}

/* What a consumer gets: a managed tensor of either kind, with room for what it points to. */
typedef struct exported {
  union {
    dl_managed old;
    dl_versioned versioned;
  } managed; /* first, so that the address of a managed tensor is that of its exported */
  block *block;
  int64_t shape[PSB_DIMS_MAX];
  int64_t strides[PSB_DIMS_MAX]; /* elements */
} exported;

/* block.c: with one user, on the host or on the device of a place; data may be NULL. */
block *psb__block_new(size_t bytes, const void *data);
block *psb__block_at(psb_state *st, const psb_place *place, size_t bytes, const void *data);
block *psb__block_retain(block *shared);
void psb__block_release(block *shared);

/* dlpack_out.c: a managed tensor on self's memory, or on a copy of it; the caller owns it. */
exported *psb__export_new(const tensor *self, bool versioned, bool copy);
PyObject *psb__tensor_dlpack(PyObject *obj, PyObject *args, PyObject *kwargs);
PyObject *psb__tensor_dlpack_device(PyObject *obj, PyObject *ignored);

/* tensor.c: refuses a shape that no tensor of ours can have; *count receives its elements. */
int psb__check_shape(psb_state *st, ps_dtype dtype, int ndim, const int64_t *shape, size_t *count);

#endif
