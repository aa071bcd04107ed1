/* run.h - what the objects of a run share: who is inside, its latents, work out and in; run.c. */
#ifndef PSB_RUN_H
#define PSB_RUN_H

#include <sys/types.h>

#include "like.h"
#include "view.h"

/* ---- who is inside --------------------------------------------------------------------------- */

/* An object of a run is used by one thread at a time, in the process that made the run. */
typedef struct psb_guard {
  pid_t process;
  int busy; /* a thread is inside; changed atomically */
} psb_guard;

psb_guard psb__guard_new(void);

/* what names the method in errors.  After 0 psb__leave follows, whatever happens between. */
int psb__enter(psb_state *st, psb_guard *guard, const char *what);
void psb__leave(psb_guard *guard);

/* Whether this is still the process that made the run; a forked child must leave its locks alone.
 */
bool psb__at_home(const psb_guard *guard);

/* ---- latents of the run ---------------------------------------------------------------------- */

/* What a latent of this run is, as the host sees it. */
typedef struct psb_spec {
  int ndim;
  int64_t shape[PSB_DIMS_MAX];
  ps_layout layout;
} psb_spec;

/* The shape and dtype of x become those of the run. */
int psb__spec_from(psb_state *st, PyObject *x, const psb_place *place, psb_spec *spec);

/* As psb_view_from, for a tensor of the run's shape; dtype PS_NONE leaves its dtype open. */
int psb__tensor_in(psb_state *st, PyObject *obj, const char *name, int flags,
                   const psb_place *place, const psb_spec *spec, ps_dtype dtype, psb_view *view);

/* As psb_tensor_like, for a tensor of the run's shape. */
PyObject *psb__tensor_out(psb_state *st, PyObject *like, const psb_place *place,
                          const psb_spec *spec, ps_dtype dtype, const void *data, void **writable);

/* ---- work ------------------------------------------------------------------------------------ */

/* [(step, point), ...] with fresh tensors: nobody holds memory that the core will overwrite. */
PyObject *psb__work_out(psb_state *st, PyObject *like, const psb_place *place, const psb_spec *spec,
                        const ps_work *work);

/* (round, followers, exact) of some work. */
PyObject *psb__company_of(const ps_work *work);

/* Where a sequence of tensors, one for each step of some work, is copied to. */
typedef struct psb_room {
  const char *name; /* what errors call the sequence */
  ps_dtype dtype;   /* PS_NONE: whatever the first tensor has, the others the same */
  int count;
  size_t bytes;    /* at each place */
  void *const *to; /* (count) places of bytes */
} psb_room;

/* *found is the dtype of the tensors.  On failure some of the places may have been written. */
int psb__sequence_in(psb_state *st, PyObject *obj, const psb_place *place, const psb_spec *spec,
                     const psb_room *room, ps_dtype *found);

/* ---- lists ----------------------------------------------------------------------------------- */

/* The k-th item of what context describes, a new reference; NULL with an exception. */
typedef PyObject *(*psb_item)(const void *context, int k);

PyObject *psb__list(int count, psb_item item, const void *context);

/* The items of a sequence as a tuple, which no code that is called meanwhile, and no other thread,
 * can change.  Errors say that name needs a sequence of what. */
PyObject *psb__items(PyObject *obj, const char *name, const char *what);

#endif
