/* program.h - the sampling program as a Python object; program_type.c. */
#ifndef PSB_PROGRAM_H
#define PSB_PROGRAM_H

#include "errors.h"

int psb_program_add_type(PyObject *module, psb_state *st);

/* The core's program of a Program object, borrowed; NULL with TypeError for anything else. */
ps_program *psb_program_of(psb_state *st, PyObject *obj);

#endif
