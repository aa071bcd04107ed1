/* left.h - what this process holds beside memory, looked at before and after. */
#ifndef PARASTEP_LEFT_H
#define PARASTEP_LEFT_H

typedef struct left {
  int descriptors, threads;
} left;

left left_now(void);
/* Fails where there are more of either than there were. */
void left_check(const left *before);

#endif
