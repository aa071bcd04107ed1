/* life.c - how a leader comes to be and ends: checks, the arena, followers told to leave.
 *
 * Called once a run by its caller.  Everything a run needs is cut here from two blocks, the
 * backend's for vectors and one of host memory for the rest; after that
 * leader.c, guess.c and links.c work in what they were given and allocate nothing.
 */
#include "core/internal.h"

/* ---- checks ---------------------------------------------------------------------------------- */

void ps_options_init(ps_options *options)
{
  *options = (ps_options){.policy = PS_VERIFIED, .tolerance = 0.04, .order = 1, .warmup = 5};
}

ps_status ps_options_check(const ps_options *options)
{
  if (options->policy != PS_VERIFIED && options->policy != PS_PAPER) {
    return ps__fail(PS_INVALID, "policy %d: must be verified or paper", (int)options->policy);
  }
  if (!(options->tolerance >= 0.0)) {
    return ps__fail(PS_INVALID,
                    "tolerance %g: must be 0 (exact) or above, in units of the noise "
                    "scale; infinity accepts everything",
                    options->tolerance);
  }
  if (options->order != 0 && options->order != 1) {
    return ps__fail(PS_INVALID, "order %d: must be 0 or 1", options->order);
  }
  if (options->warmup < 1) {
    return ps__fail(PS_INVALID, "warmup %d: must be 1 or above", options->warmup);
  }
  if (options->max_stride < 0) {
    return ps__fail(PS_INVALID, "max_stride %d: must be 1 or above, or 0 for no limit",
                    options->max_stride);
  }
  if (options->deadline_ns < 0) {
    return ps__fail(PS_INVALID, "a deadline of %lld ns: must be above 0, or 0 for the default rule",
                    (long long)options->deadline_ns);
  }
  return PS_OK;
}

static ps_status check_ranks(int ranks, ps_link *const *links, const int *slots)
{
  if (ranks < 1 || ranks > PS_RANKS_MAX) {
    return ps__fail(PS_INVALID, "%d ranks: must be 1 to %d", ranks, PS_RANKS_MAX);
  }
  for (int rank = 0; slots != NULL && rank < ranks; ++rank) {
    int room = links[rank] == NULL ? PS_SLOTS_MAX : links[rank]->slots;
    if (slots[rank] < 1 || slots[rank] > room) {
      return ps__fail(PS_INVALID, "rank %d: %d slots: must be 1 to %d", rank, slots[rank], room);
    }
  }
  return PS_OK;
}

/* ---- the arena ---------------------------------------------------------------------------------
 */

static void **carve_buffers(ps__arena *arena, size_t count, size_t bytes)
{
  void **buffers = ps__carve(arena, count, sizeof(void *));
  for (size_t k = 0; k < count; ++k) {
    void *buffer = ps__carve_vector(arena, bytes);
    if (buffers != NULL) {
      buffers[k] = buffer;
    }
  }
  return buffers;
}

/* Followers' points and outputs, and a lane's, live at their link's end; a leader without a lane
 * has its own in the arena. */
static void carve_rank(ps_leader *leader, ps__arena *arena, int rank, int slots, ps_link *link)
{
  void **point = ps__carve(arena, (size_t)slots, sizeof(void *));
  void **output = ps__carve(arena, (size_t)slots, sizeof(void *));
  for (int slot = 0; slot < slots; ++slot) {
    void *p = link == NULL ? ps__carve_vector(arena, ps__x_bytes(&leader->layout))
                           : link->ops->point(link, slot);
    void *m = link == NULL ? ps__carve_vector(arena, ps__m_bytes(&leader->layout))
                           : link->ops->output(link, slot);
    if (point != NULL) {
      point[slot] = p;
      output[slot] = m;
    }
  }
  if (leader->rank != NULL) {
    leader->rank[rank] = (ps__rank){.link = link, .slots = slots, .point = point, .output = output};
  }
}

/* Outputs at nodes, which the trajectory forgets; at stride 1 it still holds those that matter. */
static void carve_anchors(ps_leader *leader, ps__arena *arena)
{
  size_t count = (size_t)leader->anchors_max, m = ps__m_bytes(&leader->layout);
  leader->anchor = ps__carve(arena, count, sizeof(ps__anchor));
  for (size_t k = 0; leader->pace.strided && k < count; ++k) {
    void *room = ps__carve_vector(arena, m);
    if (leader->anchor != NULL) {
      leader->anchor[k].m = room;
    }
  }
  if (leader->pace.strided) {
    leader->between_x = ps__carve_vector(arena, ps__x_bytes(&leader->layout));
    leader->between_m[0] = ps__carve_vector(arena, m);
    leader->between_m[1] = ps__carve_vector(arena, m);
  }
}

static void carve_slopes(ps_leader *leader, ps__arena *arena)
{
  size_t window = (size_t)leader->window_max;
  leader->slope = ps__carve(arena, (size_t)leader->program->steps, sizeof(double));
  leader->seen = ps__carve(arena, (size_t)leader->program->steps, sizeof(bool));
  leader->pair = ps__carve(arena, window, sizeof(ps__pair));
  for (size_t k = 0; ps__slope_learns(leader) && k < window; ++k) {
    ps__pair pair = {.x = ps__carve_vector(arena, ps__x_bytes(&leader->layout)),
                     .m = ps__carve_vector(arena, ps__m_bytes(&leader->layout))};
    if (leader->pair != NULL) {
      leader->pair[k] = pair;
    }
  }
}

/* Runs twice: on a leader on the stack to count, on the one in the arena to hand out. */
static void carve_leader(ps_leader *leader, ps__arena *arena, ps_link *const *links,
                         const int *slots)
{
  size_t window = (size_t)leader->window_max, depth = (size_t)leader->depth;
  size_t row = 2 * (size_t)leader->program->history + 1;
  leader->rank = ps__carve(arena, (size_t)leader->ranks, sizeof(ps__rank));
  for (int rank = 0; rank < leader->ranks; ++rank) {
    carve_rank(leader, arena, rank, slots != NULL ? slots[rank] : 1, links[rank]);
  }
  leader->x = carve_buffers(arena, depth, ps__x_bytes(&leader->layout));
  leader->m = carve_buffers(arena, depth, ps__m_bytes(&leader->layout));
  leader->node = ps__carve(arena, window + 1, sizeof(ps__node));
  leader->fresh = ps__carve(arena, window + 1, sizeof(ps__node));
  leader->pace.clock = ps__carve(arena, (size_t)leader->program->steps + 1, sizeof(double));
  leader->pace.drift_cost = ps__carve(arena, (size_t)leader->program->steps, sizeof(double));
  leader->pace.gap_cost = ps__carve(arena, (size_t)leader->program->steps, sizeof(double));
  carve_anchors(leader, arena);
  carve_slopes(leader, arena);
  leader->row_term = ps__carve(arena, row, sizeof(ps_term));
  leader->row_weight = ps__carve(arena, row, sizeof(double));
  if (leader->program->draws) {
    leader->noise = carve_buffers(arena, window, ps__x_bytes(&leader->layout));
    leader->noise_step = ps__carve(arena, window, sizeof(int));
  }
  for (size_t k = 0; leader->noise_step != NULL && k < window; ++k) {
    leader->noise_step[k] = -1;
  }
  ps__guesser_carve(leader, arena);
  ps__report_carve(leader, arena);
}

static int window_of(int ranks, const int *slots)
{
  int window = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    window += slots != NULL ? slots[rank] : 1;
  }
  return window;
}

/* Tolerance 0 is the host's result bit for bit: every answer is a rank's own output. */
static bool is_strided(const ps_program *program, const ps_options *options)
{
  return options->policy == PS_VERIFIED && options->tolerance > 0.0 && options->max_stride != 1 &&
         ps_program_strides(program);
}

static ps_leader *leader_new(const ps_leader *like, ps_link *const *links, const int *slots)
{
  ps_leader plan = *like;
  ps__arena arena = {0};
  ps__carve(&arena, 1, sizeof plan);
  carve_leader(&plan, &arena, links, slots);
  arena.base = ps__alloc(arena.used);
  arena.vectors =
      arena.base != NULL ? like->backend->alloc(like->backend, arena.vectors_used) : NULL;
  arena.used = arena.vectors_used = 0;
  if (arena.vectors == NULL) {
    ps__free(arena.base);
    return NULL;
  }
  ps_leader *leader = ps__carve(&arena, 1, sizeof plan);
  *leader = *like;
  leader->vectors = arena.vectors;
  carve_leader(leader, &arena, links, slots);
  ps__pace_begin(leader);
  ps__slope_begin(leader);
  return leader;
}

/* ---- life ------------------------------------------------------------------------------------ */

ps_status ps_leader_create(ps_program *program, const ps_layout *layout, const ps_options *options,
                           const ps_backend *backend, ps_link *const *links, int ranks,
                           const int *slots, ps_leader **out)
{
  *out = NULL;
  ps_status status = ps__layout_check(layout);
  if (status == PS_OK) {
    status = ps_options_check(options);
  }
  if (status == PS_OK) {
    status = check_ranks(ranks, links, slots);
  }
  if (status != PS_OK) {
    goto fail;
  }
  int64_t now = ps_now_ns();
  int window = window_of(ranks, slots);
  ps_leader like = {
      .program = program,
      .layout = *layout,
      .options = *options,
      .backend = backend,
      .run = (uint64_t)now,
      .step = -1,
      .window_max = window,
      .ranks = ranks,
      .lane = links[0] != NULL,
      .anchors_max = PS__ANCHORS + window + 1,
      .pace.strided = is_strided(program, options),
      .depth = (program->history > 2 ? program->history : 2) + 1,
      .began_ns = now,
  };
  *out = leader_new(&like, links, slots);
  if (*out == NULL) {
    status = PS_NO_MEMORY;
    goto fail;
  }
  ps_program_retain(program);
  backend->retain(backend);
  return PS_OK;

fail:
  for (int rank = 0; rank < ranks; ++rank) {
    if (links[rank] != NULL) {
      links[rank]->ops->close(links[rank]);
    }
  }
  return status;
}

ps_status ps_leader_finish(ps_leader *leader)
{
  if (leader->phase != PS__FINISHED) {
    ps__close_links(leader);
    leader->finished_ns = ps_now_ns();
    leader->phase = PS__FINISHED;
  }
  return PS_OK;
}

void ps_leader_destroy(ps_leader *leader)
{
  if (leader != NULL) {
    const ps_backend *backend = leader->backend;
    ps_leader_finish(leader);
    ps_program_release(leader->program);
    backend->free(backend, leader->vectors);
    ps__free(leader);
    backend->release(backend);
  }
}
