/* left.c - descriptors and threads of this process; see left.h. */
#include "left.h"

#include <dirent.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"

/* Of the kernel's task flags: set from the moment a thread ends, before anybody can join it. */
enum { PF_EXITING = 4 };

typedef bool counts(const char *name);

static bool is_any(const char *name)
{
  (void)name;
  return true;
}

/* A thread that is joined may be in the list for a moment yet, and is none of ours any more. */
static bool is_alive(const char *name)
{
  char path[300], line[1024];
  snprintf(path, sizeof(path), "/proc/self/task/%s/stat", name);
  FILE *file = fopen(path, "r");
  if (file == NULL) {
    return false;
  }
  line[fread(line, 1, sizeof(line) - 1, file)] = '\0';
  fclose(file);
  const char *at = strrchr(line, ')'); /* of the thread's name, which may hold anything */
  for (int field = 0; at != NULL && field < 7; ++field) {
    at = strchr(at + 1, ' ');
  }
  return at != NULL && (strtoul(at, NULL, 10) & PF_EXITING) == 0;
}

static int entries(const char *folder, counts *is_counted)
{
  int count = 0;
  DIR *open = opendir(folder);
  CHECK(open != NULL);
  for (const struct dirent *entry; (entry = readdir(open)) != NULL;) {
    count += entry->d_name[0] != '.' && is_counted(entry->d_name);
  }
  closedir(open);
  return count;
}

left left_now(void)
{
  return (left){entries("/proc/self/fd", is_any), entries("/proc/self/task", is_alive)};
}

void left_check(const left *before)
{
  left now = left_now();
  CHECK_EQ(now.descriptors, before->descriptors);
  CHECK_EQ(now.threads, before->threads);
}
