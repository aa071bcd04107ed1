/* left.c - descriptors and threads of this process; see left.h. */
#include "left.h"

#include <dirent.h>
#include <limits.h>
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

/* The fewest threads of some looks, a millisecond apart, until there are no more than `enough`: one
 * that has been joined stays in the kernel's list for a moment, one that aborts a communicator is
 * joined by nobody. */
static int fewest_threads(int looks, int enough)
{
  const struct timespec pause = {0, 1000000};
  int fewest = INT_MAX;
  for (int k = 0; k < looks && fewest > enough; ++k) {
    nanosleep(&pause, NULL);
    int count = entries("/proc/self/task");
    fewest = count < fewest ? count : fewest;
  }
  return fewest;
}

left left_now(void)
{
  return (left){entries("/proc/self/fd"), fewest_threads(50, 0)};
}

void left_check(const left *before)
{
  CHECK_EQ(entries("/proc/self/fd"), before->descriptors);
  CHECK(fewest_threads(10000, before->threads) <= before->threads);
}
