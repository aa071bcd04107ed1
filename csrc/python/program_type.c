/* program_type.c - parastep.Program: the sampling program as a Python object.
 *
 * Made from NumPy arrays by parastep.trace or by the user, or by one of the core's builders;
 * options_in.c hands it to a leader.  Immutable, so it may be shared by threads and runs.
 */
#include "program.h"

typedef struct program_object {
  PyObject_HEAD ps_program *program;
} program_object;

ps_program *psb_program_of(psb_state *st, PyObject *obj)
{
  if (!PyObject_TypeCheck(obj, st->program_type)) {
    PyErr_Format(PyExc_TypeError,
                 "program: a parastep.Program is needed, not %s (parastep.trace "
                 "makes one from a scheduler)",
                 Py_TYPE(obj)->tp_name);
    return NULL;
  }
  return ((program_object *)obj)->program;
}

static PyObject *wrap_program(PyTypeObject *type, ps_program *program)
{
  program_object *self = (program_object *)type->tp_alloc(type, 0);
  if (self == NULL) {
    ps_program_release(program);
    return NULL;
  }
  self->program = program;
  return (PyObject *)self;
}

/* ---- arrays in and out ----------------------------------------------------------------------- */

/* obj as a contiguous float64 array of ndim dimensions; None gives NULL without an exception. */
static int array_in(psb_state *st, PyObject *obj, const char *name, int ndim, PyArrayObject **array)
{
  *array = NULL;
  if (obj == NULL || obj == Py_None) {
    return 0;
  }
  PyObject *made = PyArray_FROM_OTF(obj, NPY_DOUBLE, NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED);
  if (made == NULL) {
    psb_explain(st, PS_INVALID, "%s: cannot be read as float64 numbers", name);
    return -1;
  }
  *array = (PyArrayObject *)made;
  if (PyArray_NDIM(*array) != ndim) {
    psb_raise(st, PS_SHAPE, "%s: %d dimensions where %s is needed", name, PyArray_NDIM(*array),
              ndim == 2 ? "(N, H)" : "one value a step, (N,),");
    return -1;
  }
  return 0;
}

static const double *data_of(PyArrayObject *array)
{
  return array != NULL ? PyArray_DATA(array) : NULL;
}

static int check_length(psb_state *st, PyArrayObject *array, const char *name, npy_intp steps)
{
  if (array != NULL && PyArray_DIM(array, 0) != steps) {
    psb_raise(st, PS_SHAPE, "%s: %zd values where %zd are needed", name,
              (Py_ssize_t)PyArray_DIM(array, 0), (Py_ssize_t)steps);
    return -1;
  }
  return 0;
}

static PyObject *table_out(const ps_program *program, char which)
{
  npy_intp shape[2] = {ps_program_steps(program), ps_program_history(program)};
  PyObject *array = PyArray_SimpleNew(which == 'a' || which == 'b' ? 2 : 1, shape, NPY_DOUBLE);
  if (array != NULL) {
    memcpy(PyArray_DATA((PyArrayObject *)array), ps_program_table(program, which),
           (size_t)PyArray_NBYTES((PyArrayObject *)array));
  }
  return array;
}

/* ---- making ---------------------------------------------------------------------------------- */

enum { TABLES = 6 }; /* a, b, c, s, g, alpha */

static PyObject *program_from(psb_state *st, PyTypeObject *type, PyArrayObject *const *tables)
{
  static const char *const names[] = {"a", "b", "c", "s", "g", "alpha"};
  npy_intp steps = PyArray_DIM(tables[0], 0), history = PyArray_DIM(tables[0], 1);
  if (PyArray_DIM(tables[1], 1) != history) {
    return psb_raise(st, PS_SHAPE, "b: %zd columns where a has %zd",
                     (Py_ssize_t)PyArray_DIM(tables[1], 1), (Py_ssize_t)history);
  }
  for (int k = 1; k < TABLES; ++k) {
    if (check_length(st, tables[k], names[k], steps) < 0) {
      return NULL;
    }
  }
  if (steps > INT_MAX || history > INT_MAX) {
    return psb_raise(st, PS_INVALID, "program: too many steps or columns");
  }
  ps_program *program;
  ps_status status = ps_program_create((int)steps, (int)history, data_of(tables[0]),
                                       data_of(tables[1]), data_of(tables[2]), data_of(tables[3]),
                                       data_of(tables[4]), data_of(tables[5]), &program);
  return status == PS_OK ? wrap_program(type, program) : psb_raise_last(st, status);
}

static PyObject *program_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"a", "b", "c", "s", "g", "alpha", NULL};
  PyObject *given[TABLES] = {NULL}, *result = NULL;
  PyArrayObject *tables[TABLES] = {NULL};
  psb_state *st = psb_state_of(type);
  if (st == NULL ||
      !PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OOOO:Program", keywords, &given[0], &given[1],
                                   &given[2], &given[3], &given[4], &given[5])) {
    return NULL;
  }
  for (int k = 0; k < TABLES; ++k) {
    if (array_in(st, given[k], keywords[k], k < 2 ? 2 : 1, &tables[k]) < 0) {
      goto out;
    }
  }
  if (tables[0] == NULL || tables[1] == NULL) {
    PyErr_SetString(PyExc_TypeError, "Program: a and b are needed, (N, H) float64 each");
    goto out;
  }
  result = program_from(st, type, tables);
out:
  for (int k = 0; k < TABLES; ++k) {
    Py_XDECREF(tables[k]);
  }
  return result;
}

static void program_dealloc(PyObject *self)
{
  PyTypeObject *type = Py_TYPE(self);
  ps_program_release(((program_object *)self)->program);
  type->tp_free(self);
  Py_DECREF(type);
}

/* ---- builders -------------------------------------------------------------------------------- */

static int prediction_in(psb_state *st, const char *text, ps_prediction *prediction)
{
  static const char *const names[] = {"noise", "flow", "velocity", "sample"};
  for (int k = 0; k < 4; ++k) {
    if (strcmp(text, names[k]) == 0) {
      *prediction = (ps_prediction)k;
      return 0;
    }
  }
  psb_raise(st, PS_INVALID, "prediction: '%s': must be 'noise', 'flow', 'velocity' or 'sample'",
            text);
  return -1;
}

typedef ps_status (*scales_builder)(int, const double *, const double *, ps_prediction,
                                    ps_program **);

/* ddim and dpmpp_2m: signal and noise scales, (N + 1) each. */
static PyObject *build_scales(PyObject *cls, PyObject *args, PyObject *kwargs,
                              scales_builder builder)
{
  static char *keywords[] = {"alpha", "s", "prediction", NULL};
  PyObject *alpha, *s, *result = NULL;
  PyArrayObject *alphas = NULL, *scales = NULL;
  const char *text = "noise";
  ps_prediction prediction;
  ps_program *program;
  PyTypeObject *type = (PyTypeObject *)cls;
  psb_state *st = psb_state_of(type);
  if (st == NULL ||
      !PyArg_ParseTupleAndKeywords(args, kwargs, "OO|s", keywords, &alpha, &s, &text) ||
      prediction_in(st, text, &prediction) < 0) {
    return NULL;
  }
  if (array_in(st, alpha, "alpha", 1, &alphas) < 0 || array_in(st, s, "s", 1, &scales) < 0 ||
      alphas == NULL || scales == NULL ||
      check_length(st, scales, "s", PyArray_DIM(alphas, 0)) < 0) {
    goto out;
  }
  ps_status status = builder((int)PyArray_DIM(alphas, 0) - 1, data_of(alphas), data_of(scales),
                             prediction, &program);
  result = status == PS_OK ? wrap_program(type, program) : psb_raise_last(st, status);
out:
  if (result == NULL && !PyErr_Occurred()) {
    PyErr_SetString(PyExc_TypeError, "alpha and s are needed, (N + 1,) float64 each");
  }
  Py_XDECREF(alphas);
  Py_XDECREF(scales);
  return result;
}

static PyObject *program_ddim(PyObject *cls, PyObject *args, PyObject *kwargs)
{
  return build_scales(cls, args, kwargs, ps_program_ddim);
}

static PyObject *program_dpmpp_2m(PyObject *cls, PyObject *args, PyObject *kwargs)
{
  return build_scales(cls, args, kwargs, ps_program_dpmpp_2m);
}

static ps_status build_euler(int steps, const double *sigma, int order, ps_program **program)
{
  (void)order;
  return ps_program_euler(steps, sigma, program);
}

static ps_status build_flow_euler(int steps, const double *sigma, int order, ps_program **program)
{
  (void)order;
  return ps_program_flow_euler(steps, sigma, program);
}

typedef ps_status (*sigmas_builder)(int, const double *, int, ps_program **);

/* The solvers on noise levels: sigmas, (N + 1). */
static PyObject *build_sigmas(PyObject *cls, PyObject *sigmas, int order, sigmas_builder builder)
{
  PyObject *result = NULL;
  PyArrayObject *levels = NULL;
  ps_program *program;
  PyTypeObject *type = (PyTypeObject *)cls;
  psb_state *st = psb_state_of(type);
  if (st == NULL || array_in(st, sigmas, "sigmas", 1, &levels) < 0) {
    goto out;
  }
  if (levels == NULL) {
    PyErr_SetString(PyExc_TypeError, "sigmas are needed, (N + 1,) float64");
    goto out;
  }
  ps_status status = builder((int)PyArray_DIM(levels, 0) - 1, data_of(levels), order, &program);
  result = status == PS_OK ? wrap_program(type, program) : psb_raise_last(st, status);
out:
  Py_XDECREF(levels);
  return result;
}

static PyObject *program_euler(PyObject *cls, PyObject *sigmas)
{
  return build_sigmas(cls, sigmas, 1, build_euler);
}

static PyObject *program_flow_euler(PyObject *cls, PyObject *sigmas)
{
  return build_sigmas(cls, sigmas, 1, build_flow_euler);
}

static PyObject *program_adams_bashforth(PyObject *cls, PyObject *args, PyObject *kwargs)
{
  static char *keywords[] = {"sigmas", "order", NULL};
  PyObject *sigmas;
  int order = 2;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|i", keywords, &sigmas, &order)) {
    return NULL;
  }
  return build_sigmas(cls, sigmas, order, ps_program_adams_bashforth);
}

/* ---- reading --------------------------------------------------------------------------------- */

static PyObject *get_table(PyObject *self, void *which)
{
  return table_out(((program_object *)self)->program, *(const char *)which);
}

static PyObject *get_steps(PyObject *self, void *unused)
{
  (void)unused;
  return PyLong_FromLong(ps_program_steps(((program_object *)self)->program));
}

static PyObject *get_history(PyObject *self, void *unused)
{
  (void)unused;
  return PyLong_FromLong(ps_program_history(((program_object *)self)->program));
}

static PyObject *get_strides(PyObject *self, void *unused)
{
  (void)unused;
  return PyBool_FromLong(ps_program_strides(((program_object *)self)->program));
}

static Py_ssize_t program_length(PyObject *self)
{
  return ps_program_steps(((program_object *)self)->program);
}

static PyObject *program_repr(PyObject *self)
{
  const ps_program *program = ((program_object *)self)->program;
  return PyUnicode_FromFormat("<parastep.Program: %d steps, memory %d>", ps_program_steps(program),
                              ps_program_history(program) - 1);
}

static PyObject *program_reduce(PyObject *self, PyObject *unused)
{
  const ps_program *program = ((program_object *)self)->program;
  (void)unused;
  return Py_BuildValue("O(NNNNNN)", Py_TYPE(self), table_out(program, 'a'), table_out(program, 'b'),
                       table_out(program, 'c'), table_out(program, 's'), table_out(program, 'g'),
                       table_out(program, 'l'));
}

static PyGetSetDef getters[] = {
    {"a", get_table, NULL, "(N, H) float64: a[j, k] multiplies x_{j-k} in row j; a copy.", "a"},
    {"b", get_table, NULL, "(N, H) float64: b[j, k] multiplies m_{j-k} in row j; a copy.", "b"},
    {"c", get_table, NULL, "(N,) float64: multiplies the noise of step j; a copy.", "c"},
    {"s", get_table, NULL, "(N,) float64: noise scale of step j, above 0; a copy.", "s"},
    {"g", get_table, NULL, "(N,) float64: rebase slope of step j; a copy.", "g"},
    {"alpha", get_table, NULL, "(N,) float64: signal scale of step j, 0 or above; a copy.", "l"},
    {"strides", get_strides, NULL,
     "Whether rounds may be strided: no noise is drawn, each noise level has one evaluation.",
     NULL},
    {"steps", get_steps, NULL, "N, the number of model calls.", NULL},
    {"history", get_history, NULL, "H, how many latents and outputs a row may read.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef methods[] = {
    {"ddim", PSB_KEYWORDS(program_ddim), METH_CLASS | METH_VARARGS | METH_KEYWORDS,
     "ddim($type, alpha, s, prediction='noise')\n--\n\n"
     "DDIM without added noise (arXiv 2010.02502).  alpha, s: (N + 1,) signal and noise scales, "
     "the\n"
     "last pair where sampling ends.  prediction: 'noise', 'flow', 'velocity' or 'sample'."},
    {"dpmpp_2m", PSB_KEYWORDS(program_dpmpp_2m), METH_CLASS | METH_VARARGS | METH_KEYWORDS,
     "dpmpp_2m($type, alpha, s, prediction='noise')\n--\n\n"
     "DPM-Solver++ of second order, multistep (arXiv 2211.01095).  Arguments as for ddim."},
    {"euler", program_euler, METH_CLASS | METH_O,
     "euler($type, sigmas, /)\n--\n\nEuler on noise levels, x = x0 + sigma eps, m = eps.  sigmas: "
     "(N + 1,)."},
    {"flow_euler", program_flow_euler, METH_CLASS | METH_O,
     "flow_euler($type, sigmas, /)\n--\n\n"
     "Euler on a flow, x = (1 - sigma) x0 + sigma eps, m = eps - x0.  sigmas: (N + 1,) from 1 to "
     "0."},
    {"adams_bashforth", PSB_KEYWORDS(program_adams_bashforth),
     METH_CLASS | METH_VARARGS | METH_KEYWORDS,
     "adams_bashforth($type, sigmas, order=2)\n--\n\n"
     "Adams-Bashforth of order 1 to 4 on the uneven grid of decreasing sigmas, (N + 1,)."},
    {"__reduce__", program_reduce, METH_NOARGS, "__reduce__($self)\n--\n\nPickles as its tables."},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(
    program_doc,
    "Program(a, b, c=None, s=None, g=None, alpha=None)\n--\n\n"
    "A sampler written down as numbers, one row a model call:\n"
    "x_{j+1} = sum_k ( a[j, k] x_{j-k} + b[j, k] m_{j-k} ) + c[j] z_j.\n\n"
    "a, b: (N, H) float64; c noise coefficient, s > 0 noise scale, g rebase slope, alpha signal\n"
    "scale: (N,), by default 0, 1, 0, and for alpha what s tells: 1 where it exceeds 1 or is not\n"
    "given, else 1 - s (a flow) where rows only move x along m, sqrt(1 - s^2) where they do more.\n"
    "Raises ShapeError or InvalidError, both ValueError, "
    "for tables that\n"
    "do not fit, hold NaN or Inf, reach back before step 0, or have s <= 0.");

static PyType_Slot type_slots[] = {
    {Py_tp_doc, (void *)program_doc}, {Py_tp_new, program_new},
    {Py_tp_dealloc, program_dealloc}, {Py_tp_repr, program_repr},
    {Py_tp_methods, methods},         {Py_tp_getset, getters},
    {Py_sq_length, program_length},   {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "parastep.Program",
    .basicsize = sizeof(program_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = type_slots,
};

int psb_program_add_type(PyObject *module, psb_state *st)
{
  st->program_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &type_spec, NULL);
  return st->program_type != NULL ? PyModule_AddType(module, st->program_type) : -1;
}
