/* holders.h - whether containers still hold what they did; holders.c. */
#ifndef PSB_HOLDERS_H
#define PSB_HOLDERS_H

#include "binding.h"

/* holds(holders, items, counts): whether the k-th of a list of containers holds the next counts[k]
 * of `items`, the very objects in the order that it is iterated in, of a dict its values. */
PyObject *psb_holds(PyObject *module, PyObject *args);

#endif
