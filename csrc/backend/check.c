/* check.c - what every backend refuses: operands that are missing or of no known dtype.
 *
 * Called at the beginning of lincomb, sweep and copy.
 */
#include "backend/check.h"
#include "core/base.h"

static ps_status check_dtype(ps_dtype dtype, const char *what)
{
  if (ps_dtype_size(dtype) == 0) {
    return ps__fail(PS_DTYPE, "%s has the unknown dtype %d", what, (int)dtype);
  }
  return PS_OK;
}

static ps_status check_output(int terms, const double *weight, const ps_term *in, const void *out,
                              int k)
{
  if (!out) {
    return ps__fail(PS_INVALID, "output %d of a lincomb is NULL", k);
  }
  for (int j = 0; j < terms; j++) {
    if (weight[j] != 0 && !in[j].data) {
      return ps__fail(PS_INVALID, "input %d of a lincomb has a weight, but is NULL", j);
    }
  }
  return PS_OK;
}

static bool is_input(const void *out, int terms, const ps_term *in)
{
  bool found = false;
  for (int j = 0; j < terms; j++) {
    found = found || out == in[j].data;
  }
  return found;
}

ps_status ps__check_lincomb(size_t n, int outs, int terms, const double *weight, const ps_term *in,
                            void *const *out, ps_dtype out_dtype, bool *in_place)
{
  *in_place = false;
  if (n < 1 || outs < 1 || terms < 1 || !weight || !in || !out) {
    return ps__fail(PS_INVALID, "lincomb of %zu elements, %d outputs, %d inputs", n, outs, terms);
  }
  ps_status status = check_dtype(out_dtype, "the output of a lincomb");
  for (int k = 0; k < outs && status == PS_OK; k++) {
    status = check_output(terms, weight + (size_t)k * (size_t)terms, in, out[k], k);
    *in_place = *in_place || is_input(out[k], terms, in);
  }
  for (int j = 0; j < terms && status == PS_OK; j++) {
    status = in[j].data ? check_dtype(in[j].dtype, "an input of a lincomb") : PS_OK;
  }
  if (status == PS_OK && *in_place && outs > PS__OUTS_IN_PLACE) {
    status = ps__fail(PS_UNSUPPORTED, "lincomb in place of %d outputs, more than %d", outs,
                      (int)PS__OUTS_IN_PLACE);
  }
  return status;
}

ps_status ps__check_sweep(const ps_sweep *s)
{
  if (s->items < 1 || s->size < 1) {
    return ps__fail(PS_INVALID, "sweep over %zu items of %zu elements", s->items, s->size);
  }
  if (!s->x && (s->guess || s->keep_x)) {
    return ps__fail(PS_INVALID, "sweep without x, but with %s", s->guess ? "guess" : "keep_x");
  }
  if (!s->m && (s->out || s->keep_m)) {
    return ps__fail(PS_INVALID, "sweep without m, but with %s", s->out ? "out" : "keep_m");
  }
  ps_status status = s->x ? check_dtype(s->x_dtype, "x of a sweep") : PS_OK;
  return status == PS_OK && s->m ? check_dtype(s->m_dtype, "m of a sweep") : status;
}

ps_status ps__check_copy(const void *to, const void *from, size_t bytes)
{
  if (bytes > 0 && (!to || !from)) {
    return ps__fail(PS_INVALID, "copy of %zu bytes %s NULL", bytes, to ? "from" : "to");
  }
  return PS_OK;
}
