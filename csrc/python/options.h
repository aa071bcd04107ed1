/* options.h - what a Leader is made with, options_in.c, and what it reports, report_out.c. */
#ifndef PSB_OPTIONS_H
#define PSB_OPTIONS_H

#include "errors.h"

/* What a Leader is made with; the objects are borrowed from the call's arguments. */
typedef struct psb_order {
  ps_program *program;
  PyObject *x;
  int ranks;
  int slots[PS_RANKS_MAX];   /* (ranks) */
  PyObject *carriers;        /* {rank: carrier} of ranks in other processes, or NULL */
  int lane;                  /* rank 0 has a follower too */
  int devices[PS_RANKS_MAX]; /* (ranks) of CUDA; -1: the host */
  ps_options options;
} psb_order;

int psb__order_in(psb_state *st, PyObject *args, PyObject *kwargs, psb_order *order);

/* check_options(*, tolerance, ...) of the module. */
PyObject *psb_check_options(PyObject *module, PyObject *args, PyObject *kwargs);

/* The report as a dict of plain Python objects. */
PyObject *psb__report_out(const ps_report *report);

#endif
