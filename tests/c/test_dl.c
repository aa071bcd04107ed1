/* test_dl.c - libraries opened at run time: found, too old, missing, and the copy that is loaded.
 */
#include <dlfcn.h>
#include <string.h>

#include "platform/dl.h"
#include "runner.h"

typedef struct table {
  double (*cosine)(double);
  double (*missing)(double);
} table;

static table found;
static const char *const libm[] = {"libno_such_library.so.9", "libm.so.6", NULL};
static const ps__dl_entry entries[] = {
    {"cos", offsetof(table, cosine), false},
    {"no_such_function", offsetof(table, missing), true},
};

static ps__dl_library library_of(const char *const *sonames, const ps__dl_entry *wanted, size_t n)
{
  return (ps__dl_library){"the library", sonames, wanted, n, &found, NULL};
}

TEST(a_library_is_opened_under_any_of_its_names)
{
  ps__dl_library library = library_of(libm, entries, 2);
  CHECK_STR(ps__dl_path(&library), "");
  CHECK_OK(ps__dl_load(&library));
  CHECK_EQ(found.cosine(0.0), 1.0);
  CHECK(found.missing == NULL);
  CHECK(strstr(ps__dl_path(&library), "libm.so.6") != NULL);
  void *handle = library.handle;
  CHECK_OK(ps__dl_load(&library));
  CHECK(library.handle == handle);
}

TEST(what_is_missing_is_named)
{
  static const char *const none[] = {"libno_such_library.so.9", NULL};
  static const ps__dl_entry wanted[] = {{"no_such_function", 0, false}};
  ps__dl_library absent = library_of(none, entries, 2), old = library_of(libm, wanted, 1);
  CHECK_STATUS(ps__dl_load(&absent), PS_UNSUPPORTED);
  CHECK(strstr(ps_last_error(), "libno_such_library.so.9") != NULL);
  CHECK_STATUS(ps__dl_load(&old), PS_UNSUPPORTED);
  CHECK(strstr(ps_last_error(), "no_such_function") != NULL);
  CHECK(absent.handle == NULL && old.handle == NULL);
}

/* Of two names the one that is loaded wins, though it comes second; libc's is always there. */
TEST(a_loaded_copy_comes_first)
{
  static const char *const names[] = {"libutil.so.1", "libc.so.6", NULL};
  static const ps__dl_entry wanted[] = {{"getpid", 0, false}};
  ps__dl_library library = library_of(names, wanted, 1);
  if (dlopen(names[0], RTLD_NOW | RTLD_NOLOAD) != NULL) {
    runner_skip("%s is loaded already", names[0]);
  }
  CHECK_OK(ps__dl_load(&library));
  CHECK(strstr(ps__dl_path(&library), "libc.so.6") != NULL);
}
