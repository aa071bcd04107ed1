/* view.h - tensors in: one of the caller's as memory that the core reads or writes; convert.c. */
#ifndef PSB_VIEW_H
#define PSB_VIEW_H

#include "place.h"
#include "tensor.h"

enum psb_view_flags {
  PSB_READ = 0,
  /* The caller's own memory is written: read-only or non-contiguous tensors are an error, never a
   * copy. */
  PSB_WRITABLE = 1,
};

/* A caller's tensor at a place, C-contiguous and aligned to its element.  All pointers are
 * borrowed until psb_view_release; the memory stays valid while the GIL is released. */
typedef struct psb_view {
  void *data; /* (count) of dtype; may be NULL where count is 0 */
  ps_dtype dtype;
  int ndim;
  int64_t shape[PSB_DIMS_MAX];
  size_t count;    /* elements; 1 for a tensor without dimensions, 0 for an empty one */
  size_t bytes;    /* count times the size of an element */
  int device_type; /* of DLPack: 1 CPU, 3 or 11 pinned by CUDA or ROCm, 2 CUDA where that is the
                      place; anything else is refused */
  int device_id;
  bool readonly; /* the caller does not want its memory written; also true of a temporary copy */
  bool copied; /* data is a temporary copy: the input had strides, swapped bytes or odd alignment */

  /* What release gives back; at most one of managed and buffer is in use. */
  PyObject *owner; /* strong reference that keeps data alive, or NULL */
  void *managed;   /* managed tensor whose deleter is called once, or NULL */
  void (*delete_managed)(void *managed);
  Py_buffer buffer; /* buffer.obj is NULL when there is none */
  void *temporary;  /* memory of the copy, or NULL */
} psb_view;

/* place NULL is the host.  Takes in NumPy arrays, our Tensor, DLPack capsules, producers of DLPack
 * (C exchange API or __dlpack__) and buffers of format f, d, e.  name is what errors call the
 * argument ("x", "m_out").  An empty tensor is taken in with count 0; shapes are the caller's to
 * check.  On failure the view is zeroed and nothing is held. */
int psb_view_from(psb_state *st, PyObject *obj, const char *name, int flags, const psb_place *place,
                  psb_view *view);

/* Gives back what the view holds and zeroes it; a zeroed view is fine.  An exception that is set
 * stays set. */
void psb_view_release(psb_view *view);

/* PS_NONE for a NumPy dtype that the core does not compute with. */
ps_dtype psb__numpy_dtype(PyArray_Descr *descr);

#endif
