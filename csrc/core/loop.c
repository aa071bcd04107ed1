/* loop.c - the loop of a host that has none: the program is the sampler, the denoiser a C callback.
 *
 * Called by C programs (workflows/c, the tests).  Ten lines on top of leader and follower each;
 * what a hook in a host's own loop does is the same.
 */
#include "core/internal.h"

static ps_status provide_noise(ps_leader *leader, const void *noise, int *given)
{
  ps_status status = PS_OK;
  size_t bytes = ps__x_bytes(&leader->layout);
  for (; status == PS_OK && *given < ps_leader_horizon(leader); ++*given) {
    status = ps_leader_noise(leader, *given, (const unsigned char *)noise + (size_t)*given * bytes);
  }
  return status;
}

/* Evaluates what ask left to the leader: the true latent, and guesses of its own; hands all in. */
static ps_status evaluate_own(ps_leader *leader, ps_denoiser denoiser, void *ctx, int step,
                              const void *x, void *m, ps_dtype dtype)
{
  ps_work work;
  ps_status status = ps_leader_work(leader, &work);
  int failed = status == PS_OK && m != NULL ? denoiser(ctx, 0, step, x, m) : 0;
  for (int k = 0; status == PS_OK && failed == 0 && k < work.count; ++k) {
    failed = denoiser(ctx, 0, work.step[k], work.point[k], work.output[k]);
  }
  if (failed) {
    status = ps__fail(PS_FAILED, "the denoiser failed on rank 0 at step %d (%d)", step, failed);
  }
  return status == PS_OK ? ps_leader_submit(leader, m, dtype, 0) : status;
}

/* m_j by an answer, or by evaluating whatever lies between the host and one. */
static ps_status take_step(ps_leader *leader, ps_denoiser denoiser, void *ctx, int step,
                           const void *x, void *m, ps_dtype dtype)
{
  ps_verdict verdict = PS_AHEAD;
  ps_status status = PS_OK;
  while (status == PS_OK && verdict == PS_AHEAD) {
    status = ps_leader_ask(leader, step, x, m, &verdict);
    if (status == PS_OK && verdict != PS_ANSWER) {
      void *own = verdict == PS_EVALUATE ? m : NULL;
      status = evaluate_own(leader, denoiser, ctx, step, x, own, dtype);
    }
  }
  return status;
}

ps_status ps_sample(ps_leader *leader, ps_denoiser denoiser, void *ctx, const void *noise, void *x)
{
  ps_dtype dtype = leader->layout.m != PS_NONE ? leader->layout.m : leader->layout.x;
  size_t stride = ps__x_bytes(&leader->layout);
  int given = 0;
  ps_status status = PS_OK;
  const ps_backend *backend = leader->backend;
  void *m = backend->alloc(backend, ps__m_bytes(&leader->layout));
  if (m == NULL) {
    return PS_NO_MEMORY;
  }
  for (int j = 0; status == PS_OK && j < leader->program->steps; ++j) {
    const void *z = noise != NULL ? (const unsigned char *)noise + (size_t)j * stride : NULL;
    if (noise != NULL) {
      given = given > j ? given : j;
      status = provide_noise(leader, noise, &given);
    }
    if (status == PS_OK) {
      status = take_step(leader, denoiser, ctx, j, x, m, dtype);
    }
    if (status == PS_OK) {
      status = ps_leader_advance(leader, z, x);
    }
  }
  backend->free(backend, m);
  ps_leader_finish(leader);
  return status;
}

ps_status ps_serve(ps_follower *follower, int rank, ps_denoiser denoiser, void *ctx,
                   const ps_wait *wait, ps_dtype dtype)
{
  ps_work work;
  ps_status status = ps_follower_next(follower, wait, &work);
  while (status == PS_OK && work.count > 0) {
    int failed = 0;
    for (int slot = 0; slot < work.count && failed == 0; ++slot) {
      failed = denoiser(ctx, rank, work.step[slot], work.point[slot], work.output[slot]);
    }
    status = failed ? ps_follower_fail(follower, "the denoiser's callback returned an error")
                    : ps_follower_submit(follower, dtype, 0, 0);
    if (status == PS_OK) {
      status = ps_follower_next(follower, wait, &work);
    }
  }
  return status == PS_ABANDONED ? PS_OK : status;
}
