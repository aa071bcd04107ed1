/* dl.c - libraries that are opened at run time, each as a table of functions.
 *
 * Called by the CUDA backend and the nccl transport when one is first asked for; importing or
 * linking parastep opens nothing.
 */
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <string.h>

#include "core/base.h"
#include "platform/dl.h"

/* Guards the handles and tables of all libraries; taken when a run is created, never in a round. */
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;

/* A second copy of such a library would have caches, locks and contexts of its own beside torch's:
 * what is loaded already comes first, under any of the names. */
static void *open_any(const ps__dl_library *library)
{
  void *handle = NULL;
  for (const char *const *name = library->sonames; handle == NULL && *name != NULL; ++name) {
    handle = dlopen(*name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  }
  for (const char *const *name = library->sonames; handle == NULL && *name != NULL; ++name) {
    handle = dlopen(*name, RTLD_NOW | RTLD_LOCAL);
  }
  return handle;
}

static ps_status fail_open(const ps__dl_library *library)
{
  const char *why = dlerror();
  return ps__fail(PS_UNSUPPORTED, "%s was not found: %s", library->what,
                  why != NULL ? why : library->sonames[0]);
}

/* ISO C keeps pointers to functions and to objects apart; POSIX says that their bytes agree. */
static ps_status fill_table(const ps__dl_library *library, void *handle)
{
  for (size_t k = 0; k < library->count; ++k) {
    const ps__dl_entry *entry = &library->entries[k];
    void *function = dlsym(handle, entry->symbol);
    if (function == NULL && !entry->optional) {
      return ps__fail(PS_UNSUPPORTED, "%s is too old: it has no %s", library->what, entry->symbol);
    }
    memcpy((unsigned char *)library->table + entry->offset, &function, sizeof function);
  }
  return PS_OK;
}

ps_status ps__dl_load(ps__dl_library *library)
{
  ps_status status = PS_OK;
  pthread_mutex_lock(&loading);
  if (library->handle == NULL) {
    void *handle = open_any(library);
    status = handle != NULL ? fill_table(library, handle) : fail_open(library);
    if (status == PS_OK) {
      library->handle = handle;
    } else if (handle != NULL) {
      dlclose(handle); /* gives back our count of it, nothing more where others use it */
    }
  }
  pthread_mutex_unlock(&loading);
  return status;
}

const char *ps__dl_path(const ps__dl_library *library)
{
  struct link_map *map = NULL;
  if (library->handle == NULL || dlinfo(library->handle, RTLD_DI_LINKMAP, &map) != 0) {
    return "";
  }
  return map->l_name;
}
