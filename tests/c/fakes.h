/* fakes.h - the stand-in driver for C tests. */
#ifndef PARASTEP_FAKES_H
#define PARASTEP_FAKES_H

#include "../gpu/fake/fake.h"

/* Loads fake/libcuda.so.1 from beside the test program, before the library asks for a driver, and
 * sets it up.  kernels: the library finds kernels in its build. */
const fake_api *fakes_begin(const fake_setting *setting, int kernels);

/* The same with fake/libcublas.so.13, after fakes_begin and before a rank is opened. */
const fake_blas_api *fakes_blas(void);

/* The same with fake/libnccl.so.2, after fakes_begin. */
const fake_nccl_api *fakes_nccl(void);

/* Checks that no rule was broken and that nothing is left but what the library keeps. */
void fakes_end(const fake_api *fake);

#endif
