/* status.c - names and texts of ps_status, the per-thread last error, dtypes.
 *
 * Called from everywhere; knows nothing of the rest.
 */
#include <stdarg.h>
#include <stdio.h>

#include "core/base.h"

#ifndef PARASTEP_VERSION
#define PARASTEP_VERSION "0.0.0+unversioned"
#endif

static _Thread_local char last_error[512];

const char *ps_version(void)
{
  return PARASTEP_VERSION;
}

const char *ps_last_error(void)
{
  return last_error;
}

const char *ps_status_name(ps_status status)
{
  switch (status) {
#define X(name, value, text)                                                                       \
  case PS_##name: return #name;
    PS_STATUS_MAP(X)
#undef X
  }
  return "UNKNOWN";
}

const char *ps_status_text(ps_status status)
{
  switch (status) {
#define X(name, value, text)                                                                       \
  case PS_##name: return text;
    PS_STATUS_MAP(X)
#undef X
  }
  return "unknown status";
}

ps_status ps__fail(ps_status status, const char *format, ...)
{
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

size_t ps_dtype_size(ps_dtype dtype)
{
  switch (dtype) {
  case PS_F64: return 8;
  case PS_F32: return 4;
  case PS_F16:
  case PS_BF16: return 2;
  case PS_NONE: break;
  }
  return 0;
}

const char *ps_dtype_name(ps_dtype dtype)
{
  switch (dtype) {
  case PS_F64: return "float64";
  case PS_F32: return "float32";
  case PS_F16: return "float16";
  case PS_BF16: return "bfloat16";
  case PS_NONE: break;
  }
  return "unknown";
}

ps_status ps__layout_check(const ps_layout *layout)
{
  if (layout->items < 1 || layout->size < 1) {
    return ps__fail(PS_SHAPE, "an empty latent (%zu items of %zu elements): nothing to sample",
                    layout->items, layout->size);
  }
  if (layout->size > SIZE_MAX / 8 / layout->items) {
    return ps__fail(PS_SHAPE, "a latent of %zu items of %zu elements does not fit in memory",
                    layout->items, layout->size);
  }
  if (ps_dtype_size(layout->x) == 0) {
    return ps__fail(PS_DTYPE, "latents of dtype %d are not supported", (int)layout->x);
  }
  if (layout->m != PS_NONE && ps_dtype_size(layout->m) == 0) {
    return ps__fail(PS_DTYPE, "outputs of dtype %d are not supported", (int)layout->m);
  }
  return PS_OK;
}
