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

/* In a table of methods, a function that takes keywords. */
#define PSB_KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))

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
