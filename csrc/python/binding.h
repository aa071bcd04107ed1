/* binding.h - what the files of the CPython binding share: module state, tensors, types.
 *
 * csrc/python turns Python calls into calls of the C API and back; it holds no maths.  module.c
 * makes the module, errors.c its exceptions, program_type.c, leader_type.c and follower_type.c wrap
 * the core's objects, convert.c takes the caller's tensors in, tensor.c hands ours out.  Every
 * function here is called under the GIL unless its comment says more, and reports failure as
 * CPython does: NULL or -1 with an exception set.
 */
#ifndef PSB_BINDING_H
#define PSB_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "parastep.h"
#include "parastep_backend.h"

/* NumPy's function table is the one global of the binding.  lookup.c defines PSB_IMPORT_NUMPY and
 * fills it in psb_lookup_load; every other file only refers to it. */
#define NPY_NO_DEPRECATED_API  NPY_1_22_API_VERSION
#define NPY_TARGET_VERSION     NPY_1_22_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL psb_numpy_table
#ifndef PSB_IMPORT_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#if PY_VERSION_HEX >= 0x030D0000
#define PSB_BEGIN_LOCKED(object) Py_BEGIN_CRITICAL_SECTION(object)
#define PSB_END_LOCKED()         Py_END_CRITICAL_SECTION()
#else /* before 3.13 the GIL is the lock */
#define PSB_BEGIN_LOCKED(object) {
#define PSB_END_LOCKED()         }
#endif

/* ---- module state ---------------------------------------------------------------------------- */

enum { PSB_STATUS_COUNT = 16 }; /* PS_OK and the errors; -status indexes psb_state.errors */

typedef struct psb_state {
  /* exceptions, errors.c */
  PyObject *error;                    /* parastep.Error */
  PyObject *errors[PSB_STATUS_COUNT]; /* its subclass for a status; NULL at PS_OK */

  /* types of ours */
  PyTypeObject *tensor_type;   /* tensor.c */
  PyTypeObject *program_type;  /* program_type.c */
  PyTypeObject *leader_type;   /* leader_type.c */
  PyTypeObject *follower_type; /* follower_type.c */
  PyTypeObject *inbox_type;    /* carrier.c */
  PyTypeObject *pair_type;     /* pair.c */

  /* names that are looked up, made once by psb_lookup_load */
  struct psb_names {
    PyObject *dlpack;                 /* "__dlpack__" */
    PyObject *exchange_api;           /* "__dlpack_c_exchange_api__" */
    PyObject *exchange_api_old;       /* "__c_dlpack_exchange_api__", torch-c-dlpack-ext */
    PyObject *is_neg;                 /* "is_neg" */
    PyObject *requires_grad;          /* "requires_grad" */
    PyObject *detach;                 /* "detach" */
    PyObject *array_namespace;        /* "__array_namespace__" */
    PyObject *module;                 /* "__module__" */
    PyObject *from_dlpack;            /* "from_dlpack" */
    PyObject *max_version;            /* ("max_version",), keyword names of a vectorcall */
    PyObject *stream;                 /* ("stream",) likewise */
    PyObject *max_version_and_stream; /* both */
    PyObject *version;                /* (1, 3), the newest DLPack version that dlpack_in.c reads */
  } names;
} psb_state;

/* The state of the module that made one of our types; NULL with an exception for a foreign type. */
static inline psb_state *psb_state_of(PyTypeObject *type)
{
  return PyType_GetModuleState(type);
}

/* ---- places (place.c) ------------------------------------------------------------------------ */

/* Where a rank's tensors are: the host, or a CUDA device with a backend of the rank's own. */
typedef struct psb_place {
  const ps_backend *backend; /* retained */
  int device;                /* of CUDA, or -1: the host */
  void *stream;              /* the host library's current one there, at the last enter */
} psb_place;

int psb__place_open(psb_state *st, int device, psb_place *place);
void psb__place_close(psb_place *place); /* twice is fine */

/* Work of the place's backend goes to the stream on which the library of `like` works in this
 * thread; called at the beginning of every method of a run. */
int psb__place_enter(psb_state *st, psb_place *place, PyObject *like);

/* Waits until the work of the place is done; without the GIL. */
ps_status psb__place_settle(const psb_place *place);

/* The CUDA device of a tensor, -1 for everything else; no exception. */
int psb__device_of(psb_state *st, PyObject *obj);

/* ---- tensors in (convert.c) ------------------------------------------------------------------ */

enum { PSB_DIMS_MAX = 8 };

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
 * (C exchange API or
 * __dlpack__) and buffers of format f, d, e.  name is what errors call the argument ("x", "m_out").
 * An empty tensor is taken in with count 0; shapes are the caller's to check.  On failure the view
 * is zeroed and nothing is held. */
int psb_view_from(psb_state *st, PyObject *obj, const char *name, int flags, const psb_place *place,
                  psb_view *view);

/* Gives back what the view holds and zeroes it; a zeroed view is fine.  An exception that is set
 * stays set. */
void psb_view_release(psb_view *view);

/* ---- tensors out (tensor.c) ------------------------------------------------------------------ */

/* Makes the Tensor type and adds it to the module. */
int psb_tensor_add_type(PyObject *module, psb_state *st);
/* "float32", "float16", "bfloat16", "float64"; "none" for anything else. */
const char *psb_dtype_name(ps_dtype dtype);

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

/* The memory of a Tensor of ours, borrowed while it lives; obj must be one. */
void *psb_tensor_data(PyObject *obj);

/* _roundtrip, _like and _view: private functions through which tests reach the above.  Part of the
 * module's method table, ends with a zeroed entry. */
extern PyMethodDef psb_tensor_methods[];

/* ---- programs (program_type.c) --------------------------------------------------------------- */

int psb_program_add_type(PyObject *module, psb_state *st);

/* The core's program of a Program object, borrowed; NULL with TypeError for anything else. */
ps_program *psb_program_of(psb_state *st, PyObject *obj);

/* ---- runs (leader_type.c, follower_type.c, carrier.c, pair.c) -------------------------------- */

int psb_leader_add_type(PyObject *module, psb_state *st);
int psb_follower_add_type(PyObject *module, psb_state *st);
int psb_inbox_add_type(PyObject *module, psb_state *st);
int psb_pair_add_type(PyObject *module, psb_state *st);

#endif
