/* registry.c - which transports this build has.  Called by whoever reports what was found. */
#include "parastep_transport.h"

const char *ps_transports(void)
{
  return "threads, host, nccl";
}
