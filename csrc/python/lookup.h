/* lookup.h - what the binding looks up in other libraries; lookup.c. */
#ifndef PSB_LOOKUP_H
#define PSB_LOOKUP_H

#include "binding.h"
#include "dlpack_abi.h"

/* NumPy's table and the names of the module's state; clear lets go of the names. */
int psb_lookup_load(psb_state *st);
void psb_lookup_clear(psb_state *st);

/* getattr without the exception for a missing attribute: 1 found, 0 missing, -1 error. */
int psb__lookup(PyObject *obj, PyObject *name, PyObject **value);

/* The exchange table that a tensor's type offers in a version we read, or NULL (no exception). */
const dl_exchange *psb__exchange(psb_state *st, PyObject *obj);

#endif
