/* errors.h - what the core refuses, as exceptions, and the check that lets Ctrl-C through;
 * errors.c.
 *
 * Every file of the binding but the module's own lies above it.
 */
#ifndef PSB_ERRORS_H
#define PSB_ERRORS_H

#include "binding.h"

/* Makes the exceptions and adds them to the module. */
int psb_errors_add_types(PyObject *module, psb_state *st);

/* Raises the exception of a status with a text that says what, value and what to do.  The format is
 * that of PyUnicode_FromFormat.  Returns NULL. */
PyObject *psb_raise(psb_state *st, ps_status status, const char *format, ...);

/* The same with the core's own words, ps_last_error(), unless an exception is set already. */
PyObject *psb_raise_last(psb_state *st, ps_status status);

/* The exception in flight, raised by code of others, becomes the cause of ours, and its words
 * follow those of the format.  KeyboardInterrupt and its like pass as they are. */
void psb_explain(psb_state *st, ps_status status, const char *format, ...);

/* A str of the core's words.  They sit in buffers of fixed size: the last character may be cut. */
PyObject *psb_text(const char *words);

/* 0 where the core succeeded and no check has raised; otherwise -1 with the exception set.  A reply
 * may come in while the check is running, and the core then knows nothing of the interrupt. */
int psb__judge(psb_state *st, ps_status status);

/* The check of every wait of a run, called without the GIL: lets Ctrl-C through.  The exception it
 * sets is what the call raises. */
int psb__check_signals(void *unused);

#endif
