/* dl.h - libraries that are opened at run time, each as a table of functions.
 *
 * Used for libcuda, libcublas and libnccl, none of which a build needs.  A library is described
 * once, in a static ps__dl_library; whoever calls it loads it first and reads the table after.
 */
#ifndef PS_DL_H
#define PS_DL_H

#include <stdbool.h>
#include <stddef.h>

#include "parastep.h"

/* One function: its exported name, with the version that is part of it (cuMemAlloc_v2), and where
 * its pointer goes. */
typedef struct ps__dl_entry {
  const char *symbol;
  size_t offset; /* in the table */
  bool optional; /* NULL in the table where the library has none */
} ps__dl_entry;

typedef struct ps__dl_library {
  const char *what;           /* in errors: "the CUDA driver" */
  const char *const *sonames; /* tried in this order; NULL at the end */
  const ps__dl_entry *entries;
  size_t count;
  void *table;  /* struct of function pointers, complete once ps__dl_load has succeeded */
  void *handle; /* of dlopen, for the rest of the process: drivers do not survive being unloaded */
} ps__dl_library;

/* Describes the library of a file: `described` is static, `its_table` the table, of the type `api`,
 * that `map` fills, an X-macro of (field, exported name, may be missing, arguments); the rest are
 * sonames. */
#define PS__DL_DESCRIBE(described, its_name, api, map, its_table, ...)                             \
  typedef api ps__dl_table;                                                                        \
  static const ps__dl_entry described##_entries[] = {map(PS__DL_ENTRY)};                           \
  static const char *const described##_sonames[] = {__VA_ARGS__, NULL};                            \
  static ps__dl_library described = {                                                              \
      .what = its_name,                                                                            \
      .sonames = described##_sonames,                                                              \
      .entries = described##_entries,                                                              \
      .count = sizeof described##_entries / sizeof *described##_entries,                           \
      .table = its_table,                                                                          \
  }
#define PS__DL_ENTRY(field, symbol, optional, arguments)                                           \
  {#symbol, offsetof(ps__dl_table, field), optional},

/* Opens the copy that this process has loaded already (torch's), else the first that the system
 * finds, and fills the table; twice is fine, from any thread.  PS_UNSUPPORTED with the reason where
 * there is none or where it lacks a function; the next call tries again. */
ps_status ps__dl_load(ps__dl_library *library);

/* Path of a loaded library, "" before that; borrowed. */
const char *ps__dl_path(const ps__dl_library *library);

#endif
