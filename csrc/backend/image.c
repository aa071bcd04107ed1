/* image.c - the kernels of kernels.cu as nvcc made them, embedded by the build where there is one.
 *
 * device.c asks for them when it opens a device.
 */
#include <stddef.h>

const unsigned char *ps__kernel_image(void);

#ifdef PS_KERNEL_IMAGE /* path of the file */
__asm__(".section .rodata\n"
        ".balign 16\n"
        "ps__kernel_bytes:\n"
        ".incbin \"" PS_KERNEL_IMAGE "\"\n"
        ".balign 16\n"
        ".previous\n");
extern const unsigned char ps__kernel_bytes[] __attribute__((visibility("hidden")));
#endif

/* Weak, so that tests can take the kernels away, or have some where no nvcc is. */
__attribute__((weak)) const unsigned char *ps__kernel_image(void)
{
#ifdef PS_KERNEL_IMAGE
  return ps__kernel_bytes;
#else
  return NULL;
#endif
}
