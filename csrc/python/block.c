/* block.c - the memory of a Tensor of ours, which counts its users.
 *
 * A consumer on any thread lets go of it without the GIL, also when Python is gone.  tensor.c takes
 * a block for every Tensor, dlpack_out.c one more user for whoever takes it in.
 */
#include <stdlib.h>
#include <string.h>

#include "block.h"

enum { ALIGNMENT = 64 }; /* a cache line; JAX copies what is aligned to less */

block *psb__block_new(size_t bytes, const void *data)
{
  block *made = NULL;
  uintptr_t address;

  if (bytes <= PTRDIFF_MAX - sizeof *made - ALIGNMENT)
    made = malloc(sizeof *made + ALIGNMENT + bytes);
  if (made) {
    address = (uintptr_t)(made + 1) + ALIGNMENT - 1;
    made->data = (void *)(address - address % ALIGNMENT);
    made->backend = NULL;
    atomic_init(&made->users, 1);
    atomic_init(&made->stream, NULL);
    if (data)
      memcpy(made->data, data, bytes);
  } else {
    PyErr_NoMemory();
  }
  return made;
}

block *psb__block_retain(block *shared)
{
  atomic_fetch_add_explicit(&shared->users, 1, memory_order_relaxed);
  return shared;
}

/* The last user frees: it must see what the others wrote before they let go.  What a consumer gave
 * to its stream may still read the memory of a device: that is given back behind it. */
void psb__block_release(block *shared)
{
  if (atomic_fetch_sub_explicit(&shared->users, 1, memory_order_acq_rel) != 1)
    return;
  if (shared->backend) {
    ps_cuda_give_back(shared->backend, shared->data, atomic_load(&shared->stream));
    shared->backend->release(shared->backend);
  }
  free(shared);
}

/* Memory of a device, not yet written; for psb__block_at alone, which releases the GIL. */
static block *block_on(const ps_backend *backend, size_t bytes)
{
  block *made = calloc(1, sizeof *made);

  if (made) {
    made->data = backend->alloc(backend, bytes > 0 ? bytes : 1);
    if (!made->data) {
      free(made);
      return NULL;
    }
    atomic_init(&made->users, 1);
    atomic_init(&made->stream, NULL);
    backend->retain(backend);
    made->backend = backend;
  }
  return made;
}

/* Memory at a place, with its contents: written to the end before anyone sees it, so that whatever
 * stream a consumer names need not wait. */
block *psb__block_at(psb_state *st, const psb_place *place, size_t bytes, const void *data)
{
  const ps_backend *backend = place->backend;
  ps_status status = PS_OK;
  block *made;

  Py_BEGIN_ALLOW_THREADS;
  made = block_on(backend, bytes);
  status = made ? PS_OK : PS_NO_MEMORY;
  if (status == PS_OK && data && bytes > 0)
    status = backend->copy(backend, made->data, data, bytes);
  if (status == PS_OK)
    status = psb__place_settle(place);
  Py_END_ALLOW_THREADS;
  if (status != PS_OK) {
    psb_raise_last(st, status);
    if (made)
      psb__block_release(made);
    made = NULL;
  }
  return made;
}
