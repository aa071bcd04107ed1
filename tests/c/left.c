/* left.c - descriptors and threads of this process; see left.h. */
#include "left.h"

#include <dirent.h>
#include <time.h>

#include "runner.h"

static int entries(const char *folder)
{
  int count = 0;
  DIR *open = opendir(folder);
  CHECK(open != NULL);
  while (readdir(open) != NULL) {
    ++count;
  }
  closedir(open);
  return count;
}

left left_now(void)
{
  return (left){entries("/proc/self/fd"), entries("/proc/self/task")};
}

/* Threads that are joined may still be on their way out of the kernel's list. */
void left_check(const left *before)
{
  const struct timespec pause = {0, 1000000};
  CHECK_EQ(entries("/proc/self/fd"), before->descriptors);
  for (int k = 0; k < 2000 && entries("/proc/self/task") > before->threads; ++k) {
    nanosleep(&pause, NULL);
  }
  CHECK_EQ(entries("/proc/self/task"), before->threads);
}
