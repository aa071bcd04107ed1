/* test_backend.c - what is left of the CPU backend beside its passes: copies, and the registry. */
#include <string.h>

#include "runner.h"
#include "vectors.h"

TEST(copy_copies)
{
  unsigned char from[300], to[300] = {0};
  for (int i = 0; i < 300; i++) {
    from[i] = (unsigned char)i;
  }
  CHECK_OK(cpu()->copy(cpu(), to, from, 299));
  CHECK(memcmp(to, from, 299) == 0 && to[299] == 0);
  CHECK_OK(cpu()->copy(cpu(), NULL, NULL, 0));
  CHECK_STATUS(cpu()->copy(cpu(), to, NULL, 1), PS_INVALID);
  CHECK_STATUS(cpu()->copy(cpu(), NULL, from, 1), PS_INVALID);
}

TEST(registry_knows_the_cpu)
{
  CHECK_STR(cpu()->name, "cpu");
  CHECK(ps_backend_find("abacus") == NULL);
  CHECK(ps_backend_find(NULL) == NULL);
}
