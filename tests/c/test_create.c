/* test_create.c - runs that make no sense are refused, and leave nothing and nobody behind. */
#include <math.h>
#include <string.h>

#include "runner.h"
#include "stage.h"

static void refuse_leader(ps_program *program, const ps_layout *layout, const ps_options *options,
                          const int *slots, ps_status expected)
{
  const ps_layout good = {1, 4, PS_F32, PS_F32};
  ps_link *here, *there, *links[2] = {NULL, NULL};
  ps_leader *leader;
  ps_follower *follower;
  ps_work work;
  CHECK_OK(ps_threads_open(&good, 2, &here, &there));
  links[1] = here;
  CHECK_OK(ps_follower_create(&good, there, &follower));
  CHECK_STATUS(
      ps_leader_create(program, layout, options, ps_backend_find("cpu"), links, 2, slots, &leader),
      expected);
  CHECK(leader == NULL);
  /* The link was taken all the same: its follower learns that there is no run. */
  CHECK_OK(ps_follower_next(follower, NULL, &work));
  CHECK_EQ(work.count, 0);
  ps_follower_destroy(follower);
}

TEST(leaders_that_make_no_sense_are_refused)
{
  const ps_layout good = {1, 4, PS_F32, PS_F32};
  const ps_layout empty = {0, 4, PS_F32, PS_F32}, sizeless = {1, 0, PS_F32, PS_F32};
  const ps_layout untyped = {1, 4, PS_NONE, PS_F32};
  const ps_layout huge = {SIZE_MAX / 2, SIZE_MAX / 2, PS_F32, PS_F32};
  const ps_layout large = {1, SIZE_MAX / 16, PS_F32, PS_F32};
  /* The last of three latents and three outputs is what does not fit any more. */
  const ps_layout brink = {1, SIZE_MAX / 22, PS_F32, PS_F32};
  const int none[2] = {1, 0}, many[2] = {1, 3}, crowd[2] = {PS_SLOTS_MAX + 1, 1};
  const int unknown = 77; /* of an enum: what a caller in another language may pass */
  ps_layout odd = {1, 4, PS_F32, PS_F32};
  ps_program *program = stage_euler(4);
  ps_options options;
  ps_options_init(&options);
  memcpy(&odd.m, &unknown, sizeof odd.m);
  refuse_leader(program, &empty, &options, NULL, PS_SHAPE);
  refuse_leader(program, &sizeless, &options, NULL, PS_SHAPE);
  refuse_leader(program, &huge, &options, NULL, PS_SHAPE);
  refuse_leader(program, &large, &options, NULL, PS_NO_MEMORY);
  refuse_leader(program, &brink, &options, NULL, PS_NO_MEMORY);
  refuse_leader(program, &untyped, &options, NULL, PS_DTYPE);
  refuse_leader(program, &odd, &options, NULL, PS_DTYPE);
  refuse_leader(program, &good, &options, none, PS_INVALID);
  refuse_leader(program, &good, &options, many, PS_INVALID);
  refuse_leader(program, &good, &options, crowd, PS_INVALID);
  ps_options bad[6] = {options, options, options, options, options, options};
  bad[0].tolerance = NAN;
  bad[1].tolerance = -0.1;
  bad[2].order = 2;
  bad[3].warmup = 0;
  bad[4].deadline_ns = -1;
  memcpy(&bad[5].policy, &unknown, sizeof unknown);
  for (int k = 0; k < 6; ++k) {
    CHECK_STATUS(ps_options_check(&bad[k]), PS_INVALID);
    refuse_leader(program, &good, &bad[k], NULL, PS_INVALID);
  }
  CHECK_OK(ps_options_check(&options));
  ps_program_release(program);
}

TEST(links_that_make_no_sense_are_refused)
{
  const ps_layout good = {1, 4, PS_F32, PS_F32}, empty = {0, 4, PS_F32, PS_F32};
  const ps_layout large = {1, SIZE_MAX / 16, PS_F32, PS_F32};
  ps_link *here, *there;
  ps_follower *follower;
  CHECK_STATUS(ps_threads_open(&empty, 1, &here, &there), PS_SHAPE);
  CHECK_STATUS(ps_threads_open(&large, 16, &here, &there), PS_NO_MEMORY);
  CHECK_STATUS(ps_threads_open(&good, 0, &here, &there), PS_INVALID);
  CHECK_STATUS(ps_threads_open(&good, PS_SLOTS_MAX + 1, &here, &there), PS_INVALID);
  CHECK(here == NULL && there == NULL);
  CHECK_OK(ps_threads_open(&good, 1, &here, &there));
  CHECK_STATUS(ps_follower_create(&empty, there, &follower), PS_SHAPE);
  CHECK(follower == NULL);
  here->ops->close(here);
}
