/* Plain arguments: numbers, names, the configuration, the gate. */
#include "binding.h"

#include <math.h>
#include <string.h>

int expect_argument_count(const char *function, Py_ssize_t given, Py_ssize_t wanted) {
  if (given == wanted) return 0;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", function, wanted, given);
  return -1;
}

int int64_from(PyObject *object, const char *name, int64_t *value) {
  PyObject *number = PyBool_Check(object) ? NULL : PyNumber_Index(object);
  if (!number) {
    PyErr_Format(PyExc_TypeError, "%s must be an integer, got %.100s", name, Py_TYPE(object)->tp_name);
    return -1;
  }
  int overflow;
  *value = PyLong_AsLongLongAndOverflow(number, &overflow);
  if (overflow) PyErr_Format(PyExc_ValueError, "%s must fit 64 bits, got %R", name, number);
  Py_DECREF(number);
  return overflow || PyErr_Occurred() ? -1 : 0;
}

int index_from(PyObject *object, const char *name, int64_t n, int64_t *value) {
  int64_t given;
  if (int64_from(object, name, &given)) return -1;
  *value = given < 0 ? given + n : given;
  if (*value >= 0 && *value < n) return 0;
  PyErr_Format(PyExc_ValueError, "%s must be from %lld to %lld, got %lld", name, (long long)-n, (long long)(n - 1),
               (long long)given);
  return -1;
}

int bool_from(PyObject *object, const char *name, int *value) {
  if (!PyBool_Check(object)) {
    PyErr_Format(PyExc_TypeError, "%s must be True or False, got %.100s", name, Py_TYPE(object)->tp_name);
    return -1;
  }
  *value = object == Py_True;
  return 0;
}

int string_from(PyObject *object, const char *name, const char **value) {
  if (!PyUnicode_Check(object)) {
    PyErr_Format(PyExc_TypeError, "%s must be a string, got %.100s", name, Py_TYPE(object)->tp_name);
    return -1;
  }
  *value = PyUnicode_AsUTF8(object);
  return *value ? 0 : -1;
}

/* --- names ---------------------------------------------------------------------------------- */

static const char *const mixing_names[] = {"paper", "gated", "lolcats", "cache_only", NULL};
static const char *const score_names[] = {"self_recall", "value_norm", "key_norm",  "recency",
                                          "random",      "external",   "attention", NULL};
static const char *const sharing_names[] = {"query_head", "kv_head", NULL};

/* The index of a string in a NULL-terminated list, or -1 with an exception that lists it. */
static int choice_from(PyObject *object, const char *name, const char *const *choices) {
  const char *text;
  if (string_from(object, name, &text)) return -1;
  for (int i = 0; choices[i]; i++)
    if (!strcmp(text, choices[i])) return i;
  PyObject *list = PyUnicode_FromFormat("'%s'", choices[0]);
  for (int i = 1; list && choices[i]; i++)
    Py_SETREF(list, PyUnicode_FromFormat(choices[i + 1] ? "%U, '%s'" : "%U or '%s'", list, choices[i]));
  if (list) PyErr_Format(PyExc_ValueError, "%s must be %U, got %R", name, list, object);
  Py_XDECREF(list);
  return -1;
}

const char *mixing_name(lola_mixing mixing) { return mixing_names[mixing]; }

int mixing_from(PyObject *object, lola_mixing *mixing) {
  int index = choice_from(object, "mixing", mixing_names);
  if (index < 0) return -1;
  *mixing = (lola_mixing)index;
  return 0;
}

static int field_int64(PyObject *config, const char *name, int64_t *value) {
  PyObject *field = PyObject_GetAttrString(config, name);
  int failed = !field || int64_from(field, name, value);
  Py_XDECREF(field);
  return failed ? -1 : 0;
}

static int field_choice(PyObject *config, const char *name, const char *const *choices) {
  PyObject *field = PyObject_GetAttrString(config, name);
  int index = field ? choice_from(field, name, choices) : -1;
  Py_XDECREF(field);
  return index;
}

int config_from(PyObject *object, lola_config *config, int *mixing, double *scale) {
  int64_t seed;
  if (field_int64(object, "window", &config->window) || field_int64(object, "chunk", &config->chunk) ||
      field_int64(object, "sparse", &config->sparse) || field_int64(object, "seed", &seed))
    return -1;
  config->seed = (uint64_t)seed;
  int score = field_choice(object, "score", score_names);
  int sharing = score < 0 ? -1 : field_choice(object, "sparse_per", sharing_names);
  if (sharing < 0) return -1;
  config->score = (lola_score)score;
  config->sparse_per = (lola_sharing)sharing;

  *mixing = -1;
  *scale = NAN;
  PyObject *mixing_field = PyObject_GetAttrString(object, "mixing");
  PyObject *scale_field = mixing_field ? PyObject_GetAttrString(object, "scale") : NULL;
  int failed = !scale_field;
  if (!failed && mixing_field != Py_None) {
    *mixing = choice_from(mixing_field, "mixing", mixing_names);
    failed = *mixing < 0;
  }
  if (!failed && scale_field != Py_None) {
    *scale = PyFloat_AsDouble(scale_field);
    failed = PyErr_Occurred() != NULL;
  }
  Py_XDECREF(mixing_field);
  Py_XDECREF(scale_field);
  return failed ? -1 : 0;
}

int mixing_reads_gate(lola_mixing mixing) { return mixing == LOLA_MIXING_GATED || mixing == LOLA_MIXING_LOLCATS; }

int gate_expect(const float *values, int64_t heads) {
  for (int64_t h = 0; h < heads; h++) {
    if (values[h] > 0 && values[h] < 1) continue;
    PyObject *value = PyFloat_FromDouble(values[h]);
    if (value)
      PyErr_Format(PyExc_ValueError,
                   "gate must lie between 0 and 1, both excluded and in float32, got %R for head %lld", value,
                   (long long)h);
    Py_XDECREF(value);
    return -1;
  }
  return 0;
}

PyArrayObject *gate_from(binding_state *state, PyObject *object, int64_t heads) {
  PyArrayObject *gate = floats_from(state, object, "gate", "(Hq,)", 1, &heads);
  if (gate && gate_expect(PyArray_DATA(gate), heads)) Py_CLEAR(gate);
  return gate;
}
