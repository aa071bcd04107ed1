/* binding.h - what every file of the CPython binding begins with: Python, NumPy, module state.
 *
 * csrc/python turns Python calls into calls of the C API and back; it holds no maths.  Its headers,
 * from the bottom; a file calls those above it in this list, and those of its own line:
 *
 *   holders.h  what containers hold, seen twice: holders.c
 *   errors.h   the core's errors as exceptions, Ctrl-C: errors.c
 *   lookup.h   what other libraries offer: lookup.c
 *   place.h    where tensors are: place.c
 *   tensor.h   our own Tensor: block.c, dlpack_out.c, tensor.c, which share block.h
 *   view.h     tensors in: intake.c, dlpack_in.c, convert.c, which share intake.h
 *   like.h     tensors out, of the caller's kind: like.c; for tests probe.c
 *   program.h  Program: program_type.c
 *   run.h      what the objects of a run share: run.c
 *   options.h  what a Leader is made with and what it reports: options_in.c, report_out.c
 *   ends.h     Follower, Pair, Inbox, the ends of links: follower_type.c, pair.c, carrier.c
 *   leader.h   Leader: leader_life.c, leader_type.c
 *
 * module.c alone knows them all.  Every function is called under the GIL unless its comment says
 * more, and reports failure as CPython does: NULL or -1 with an exception set.
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
    PyObject *contiguous;             /* "contiguous" */
    PyObject *ascontiguousarray;      /* "ascontiguousarray" */
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

#endif
