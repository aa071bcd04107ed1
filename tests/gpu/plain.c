/* plain.c - kernels.c in a build without kernels: passes are made by cuBLAS. */
#include <stddef.h>

#define PLAIN 1
#include "kernels.c" // NOLINT(bugprone-suspicious-include)

const unsigned char *ps__kernel_image(void);

/* In place of image.c's own, which is weak. */
const unsigned char *ps__kernel_image(void)
{
  return NULL;
}
