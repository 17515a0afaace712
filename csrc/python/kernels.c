/* lola.kernels: the five steps on plain arrays. */
#include "binding.h"

#include <math.h>
#include <string.h>

/* The arrays of one call. `get` opens an argument; everything is closed together. */
enum { MOST_ARRAYS = 8 };

typedef struct step {
  binding_state *state;
  view views[MOST_ARRAYS];
  int opened;
  PyArrayObject *count, *gate, *dense[MOST_ARRAYS];
  int dense_count;
  result results[2];
} step;

static PyObject *step_close(step *step, PyObject *made) {
  for (int i = 0; i < step->opened; i++) view_close(&step->views[i]);
  for (int i = 0; i < step->dense_count; i++) Py_DECREF(step->dense[i]);
  Py_XDECREF(step->count);
  Py_XDECREF(step->gate);
  result_close(&step->results[0]);
  result_close(&step->results[1]);
  return made;
}

static view *get(step *step, PyObject *object, const char *name) {
  view *array = &step->views[step->opened];
  if (view_open(step->state, object, name, array)) return NULL;
  step->opened++;
  return array;
}

/* An argument of the given shape and of any float dtype, or of one; NULL with an exception. */
static view *get_floats(step *step, PyObject *object, const char *name, const char *symbols, int ndim,
                        const int64_t *want, lola_array *raw) {
  view *array = get(step, object, name);
  if (!array || view_expect_shape(array, symbols, ndim, want) || view_expect_float(array) ||
      (raw && view_to_array(array, 0, raw)))
    return NULL;
  return array;
}

static int is_dense(const view *array) {
  int64_t dense = array->item_size;
  int same = (uintptr_t)array->data % (unsigned)array->item_size == 0;
  for (int i = array->ndim; i-- > 0;) {
    if (!array->shape[i]) return 1;
    if (array->shape[i] > 1 && array->strides[i] != dense) same = 0;
    dense *= array->shape[i];
  }
  return same;
}

/* A float32 argument that the core takes as a bare pointer: what is not dense is copied, if it is only read. */
static view *get_dense(step *step, PyObject *object, const char *name, const char *symbols, int ndim,
                       const int64_t *want, int in_place, const float **data) {
  view *array = get(step, object, name);
  if (!array || view_expect_shape(array, symbols, ndim, want) || view_expect_dtype(array, LOLA_FLOAT32, ""))
    return NULL;
  if (in_place && view_expect_output(array)) return NULL;
  static float nothing;
  *data = array->data ? (const float *)(const void *)array->data : &nothing;
  if (is_dense(array)) return array;
  if (in_place) {
    PyErr_Format(PyExc_ValueError, "%s must be C-contiguous, as it is written in place", name);
    return NULL;
  }
  PyArrayObject *copy = floats_from(step->state, object, name, symbols, ndim, want);
  if (!copy) return NULL;
  step->dense[step->dense_count++] = copy;
  *data = PyArray_DATA(copy);
  return array;
}

/* count= (B, Hs), each from 0 to S; NULL data where it is None. */
static int get_count(step *step, PyObject *object, int64_t B, int64_t Hs, int64_t S, const int64_t **data) {
  *data = NULL;
  if (object == Py_None) return 0;
  const int64_t want[2] = {B, Hs};
  step->count = integers_from(step->state, object, "count", "(B, Hs)", 2, want);
  if (!step->count) return -1;
  *data = PyArray_DATA(step->count);
  for (int64_t i = 0; i < B * Hs; i++)
    if ((*data)[i] < 0 || (*data)[i] > S) {
      PyErr_Format(PyExc_ValueError, "count must be from 0 to S (%lld), got %lld", (long long)S, (long long)(*data)[i]);
      return -1;
    }
  return 0;
}

/* Query heads come in groups of one size, one group per head of the other array. */
static int expect_multiple(int64_t heads, int64_t of, const char *name, const char *other) {
  if (of > 0 && heads > 0 && heads % of == 0) return 0;
  PyErr_Format(PyExc_ValueError, "%s must be a multiple of the heads of %s (%lld), got %lld", name, other,
               (long long)of, (long long)heads);
  return -1;
}

PyObject *py_features(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  step step = {.state = binding_state_of(module)};
  lola_array x;
  const char *side;
  int64_t heads;
  const int64_t any[4] = {-1, -1, -1, -1};
  if (expect_argument_count("features", count, 4) || feature_map_expect(step.state, arguments[1]) ||
      string_from(arguments[2], "side", &side) || int64_from(arguments[3], "heads", &heads))
    return NULL;
  if (strcmp(side, "q") && strcmp(side, "k")) {
    PyErr_Format(PyExc_ValueError, "side must be 'q' or 'k', got '%s'", side);
    return NULL;
  }
  const feature_map_object *map = (const feature_map_object *)arguments[1];
  view *opened = get_floats(&step, arguments[0], "x", "(B, T, Hx, D)", 4, any, &x);
  if (!opened || expect_multiple(heads, opened->shape[2], "heads", "x")) return step_close(&step, NULL);
  int64_t F = feature_map_dim(map, heads, opened->shape[3]);
  const int64_t shape[4] = {opened->shape[0], opened->shape[1], heads, F};
  if (F < 0 || result_new(step.state, opened, "out", 4, shape, ELEMENT_FLOAT32, &step.results[0]))
    return step_close(&step, NULL);
  lola_feature_map raw = feature_map_raw(map);
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status =
      lola_cpu_features(&x, shape[0], shape[1], opened->shape[2], opened->shape[3], heads, F, &raw, *side == 'k',
                        (float *)(void *)step.results[0].opened.data, &message);
  Py_END_ALLOW_THREADS if (status) raise_status(status, &message);
  return step_close(&step, status ? NULL : result_take(step.state, &step.results[0]));
}

/* fk, v, H, s, which score and fold take. */
typedef struct state_arguments {
  view *opened_fk, *opened_v, *opened_H, *opened_s;
  lola_array fk, v;
  const float *H, *s;
  int64_t B, S, Hq, Hs, F, Dv;
} state_arguments;

static int get_state_arguments(step *step, PyObject *const *arguments, int in_place, state_arguments *taken) {
  const int64_t any[4] = {-1, -1, -1, -1};
  taken->opened_fk = get_floats(step, arguments[0], "fk", "(B, S, Hq, F)", 4, any, &taken->fk);
  if (!taken->opened_fk || view_expect_dtype(taken->opened_fk, LOLA_FLOAT32, "")) return -1;
  const int64_t *fk = taken->opened_fk->shape;
  const int64_t want_v[4] = {fk[0], fk[1], -1, -1};
  taken->opened_v = get_floats(step, arguments[1], "v", "(B, S, Hs, Dv)", 4, want_v, &taken->v);
  if (!taken->opened_v) return -1;
  const int64_t *v = taken->opened_v->shape;
  const int64_t want_H[4] = {fk[0], fk[2], fk[3], v[3]}, want_s[3] = {fk[0], fk[2], fk[3]};
  taken->opened_H = get_dense(step, arguments[2], "H", "(B, Hq, F, Dv)", 4, want_H, in_place, &taken->H);
  if (!taken->opened_H) return -1;
  taken->opened_s = get_dense(step, arguments[3], "s", "(B, Hq, F)", 3, want_s, in_place, &taken->s);
  if (!taken->opened_s) return -1;
  taken->B = fk[0], taken->S = fk[1], taken->Hq = fk[2], taken->F = fk[3], taken->Hs = v[2], taken->Dv = v[3];
  return expect_multiple(taken->Hq, taken->Hs, "the heads of fk", "v");
}

PyObject *py_score(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  step step = {.state = binding_state_of(module)};
  state_arguments a;
  if (expect_argument_count("score", count, 4)) return NULL;
  if (get_state_arguments(&step, arguments, 0, &a)) return step_close(&step, NULL);
  const int64_t shape[3] = {a.B, a.S, a.Hq};
  if (result_new(step.state, a.opened_fk, "out", 3, shape, ELEMENT_FLOAT32, &step.results[0]))
    return step_close(&step, NULL);
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status = lola_cpu_score(&a.fk, &a.v, a.H, a.s, a.B, a.S, a.Hq, a.Hs, a.F, a.Dv,
                                                 (float *)(void *)step.results[0].opened.data, &message);
  Py_END_ALLOW_THREADS if (status) raise_status(status, &message);
  return step_close(&step, status ? NULL : result_take(step.state, &step.results[0]));
}

PyObject *py_select(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  step step = {.state = binding_state_of(module)};
  const int64_t any[3] = {-1, -1, -1}, *valid;
  const float *scores;
  int64_t keep;
  if (expect_argument_count("select", count, 3) || int64_from(arguments[1], "keep", &keep)) return NULL;
  if (keep < 0) {
    PyErr_Format(PyExc_ValueError, "keep must be at least 0, got %lld", (long long)keep);
    return NULL;
  }
  view *opened = get_dense(&step, arguments[0], "scores", "(B, S, Hs)", 3, any, 0, &scores);
  if (!opened) return step_close(&step, NULL);
  int64_t B = opened->shape[0], S = opened->shape[1], Hs = opened->shape[2], most = keep < S ? keep : S;
  const int64_t kept[3] = {B, Hs, most}, dropped[3] = {B, Hs, S - most};
  if (get_count(&step, arguments[2], B, Hs, S, &valid) ||
      result_new(step.state, opened, "kept", 3, kept, ELEMENT_INT, &step.results[0]) ||
      result_new(step.state, opened, "dropped", 3, dropped, ELEMENT_INT, &step.results[1]))
    return step_close(&step, NULL);
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status =
      lola_cpu_select(scores, valid, B, S, Hs, keep, (int64_t *)(void *)step.results[0].opened.data,
                      (int64_t *)(void *)step.results[1].opened.data, &message);
  Py_END_ALLOW_THREADS PyObject *pair = NULL;
  if (status)
    raise_status(status, &message);
  else
    pair = Py_BuildValue("(NN)", result_take(step.state, &step.results[0]), result_take(step.state, &step.results[1]));
  return step_close(&step, pair);
}

PyObject *py_fold(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  step step = {.state = binding_state_of(module)};
  state_arguments a;
  const int64_t *valid;
  if (expect_argument_count("fold", count, 5)) return NULL;
  if (get_state_arguments(&step, arguments, 1, &a) || get_count(&step, arguments[4], a.B, a.Hs, a.S, &valid) ||
      view_expect_apart(step.state, a.opened_H, a.opened_s) || view_expect_apart(step.state, a.opened_H, a.opened_fk) ||
      view_expect_apart(step.state, a.opened_H, a.opened_v) || view_expect_apart(step.state, a.opened_s, a.opened_fk) ||
      view_expect_apart(step.state, a.opened_s, a.opened_v))
    return step_close(&step, NULL);
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status =
      lola_cpu_fold(&a.fk, &a.v, (float *)(void *)a.opened_H->data, (float *)(void *)a.opened_s->data, valid, a.B, a.S,
                    a.Hq, a.Hs, a.F, a.Dv, &message);
  Py_END_ALLOW_THREADS if (status) raise_status(status, &message);
  return step_close(&step, status ? NULL : Py_NewRef(Py_None));
}

/* fq, H and s of attend, which are given together or not at all. */
static int get_linear(step *step, PyObject *const *arguments, lola_attend_call *raw) {
  int linear = (arguments[0] != Py_None) + (arguments[1] != Py_None) + (arguments[2] != Py_None);
  if (!linear) return 0;
  if (linear < 3) {
    PyErr_SetString(PyExc_ValueError, "fq, H and s must be given together, got some of them");
    return -1;
  }
  const int64_t want_fq[4] = {raw->B, raw->T, raw->Hq, -1};
  view *fq = get_floats(step, arguments[0], "fq", "(B, T, Hq, F)", 4, want_fq, &raw->q_features);
  if (!fq || view_expect_dtype(fq, LOLA_FLOAT32, "")) return -1;
  raw->F = fq->shape[3];
  const int64_t want_H[4] = {raw->B, raw->Hq, raw->F, raw->Dv}, want_s[3] = {raw->B, raw->Hq, raw->F};
  return get_dense(step, arguments[1], "H", "(B, Hq, F, Dv)", 4, want_H, 0, &raw->hidden) &&
                 get_dense(step, arguments[2], "s", "(B, Hq, F)", 3, want_s, 0, &raw->normalizer)
             ? 0
             : -1;
}

/* gate, mixing, scale, causal. */
static int get_mixing(step *step, PyObject *const *arguments, lola_attend_call *raw) {
  if (mixing_from(arguments[1], &raw->mixing) || bool_from(arguments[3], "causal", &raw->causal)) return -1;
  raw->scale = (float)(1 / sqrt((double)raw->D));
  if (arguments[2] != Py_None) {
    double scale = PyFloat_AsDouble(arguments[2]);
    if (PyErr_Occurred())
      return raise_from_present(PyExc_TypeError, "scale must be a number or None, got %.100s",
                                Py_TYPE(arguments[2])->tp_name);
    if (!isfinite(scale)) {
      PyErr_Format(PyExc_ValueError, "scale must be finite, got %R", arguments[2]);
      return -1;
    }
    raw->scale = (float)scale;
  }
  if (arguments[0] != Py_None) {
    step->gate = gate_from(step->state, arguments[0], raw->Hq);
    if (!step->gate) return -1;
    raw->gate = PyArray_DATA(step->gate);
  } else if (raw->mixing == LOLA_MIXING_GATED || raw->mixing == LOLA_MIXING_LOLCATS) {
    PyErr_Format(PyExc_ValueError, "gate must be given with mixing '%s', got None", mixing_name(raw->mixing));
    return -1;
  }
  return 0;
}

/* attend(q, k, v, fq, H, s, gate, mixing, scale, causal, count) */
PyObject *py_attend(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  step step = {.state = binding_state_of(module)};
  lola_attend_call raw = {0};
  if (expect_argument_count("attend", count, 11)) return NULL;
  const int64_t any[4] = {-1, -1, -1, -1};
  view *q = get_floats(&step, arguments[0], "q", "(B, T, Hq, D)", 4, any, &raw.q);
  if (!q) return step_close(&step, NULL);
  const int64_t want_k[4] = {q->shape[0], -1, -1, q->shape[3]};
  view *k = get_floats(&step, arguments[1], "k", "(B, S, Hs, D)", 4, want_k, &raw.k);
  if (!k) return step_close(&step, NULL);
  const int64_t want_v[4] = {q->shape[0], k->shape[1], k->shape[2], -1};
  view *v = get_floats(&step, arguments[2], "v", "(B, S, Hs, Dv)", 4, want_v, &raw.v);
  if (!v || view_expect_dtype(v, (lola_dtype)k->element, " as k is")) return step_close(&step, NULL);
  raw.B = q->shape[0], raw.T = q->shape[1], raw.Hq = q->shape[2], raw.D = q->shape[3];
  raw.S = k->shape[1], raw.Hs = k->shape[2], raw.Dv = v->shape[3];
  const int64_t shape[4] = {raw.B, raw.T, raw.Hq, raw.Dv};
  if (expect_multiple(raw.Hq, raw.Hs, "the heads of q", "k") || get_linear(&step, arguments + 3, &raw) ||
      get_mixing(&step, arguments + 6, &raw) || get_count(&step, arguments[10], raw.B, raw.Hs, raw.S, &raw.count) ||
      result_new(step.state, q, "out", 4, shape, q->element, &step.results[0]) ||
      view_to_array(&step.results[0].opened, 0, &raw.out))
    return step_close(&step, NULL);
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status = lola_cpu_attend(&raw, &message);
  Py_END_ALLOW_THREADS if (status) raise_status(status, &message);
  return step_close(&step, status ? NULL : result_take(step.state, &step.results[0]));
}
