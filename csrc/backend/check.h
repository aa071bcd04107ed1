/* check.h - what every backend refuses, in the same words. */
#ifndef PS_CHECK_H
#define PS_CHECK_H

#include <stdbool.h>

#include "parastep_backend.h"

enum { PS__OUTS_IN_PLACE = 64 }; /* outputs of a lincomb, where one of them is an input */

/* *in_place: an output is an input too. */
ps_status ps__check_lincomb(size_t n, int outs, int terms, const double *weight, const ps_term *in,
                            void *const *out, ps_dtype out_dtype, bool *in_place);
ps_status ps__check_sweep(const ps_sweep *sweep);
ps_status ps__check_copy(const void *to, const void *from, size_t bytes);

#endif
