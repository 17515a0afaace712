/* lola.kernels: the five steps on plain arrays. */
#include "staging.h"

#include <math.h>
#include <string.h>

/* The arrays of one call. `get` opens an argument; everything is closed together. */
enum { MOST_ARRAYS = 8 };

/* Device memory that stands for an array on the host. */
typedef struct stand_in {
  void *memory;
  char *host; /* where to bring it back, or NULL */
  int64_t bytes;
  int fresh; /* nobody has written there yet */
} stand_in;

typedef struct step {
  binding_state *state;
  view views[MOST_ARRAYS];
  int opened;
  PyArrayObject *count, *gate, *dense[MOST_ARRAYS];
  int dense_count;
  result results[2];
  int said;       /* what device= said */
  device *device; /* NULL: the step runs on the host */
  void *stream;
  int staged; /* arrays on the host, work on the device */
  stand_in stand_ins[MOST_ARRAYS + 4];
  int stand_in_count;
} step;

static PyObject *step_close(step *step, PyObject *made) {
  for (int i = 0; i < step->stand_in_count; i++)
    step->device->api->release(step->device->number, step->stand_ins[i].memory, step->stream);
  for (int i = 0; i < step->opened; i++) view_close(&step->views[i]);
  for (int i = 0; i < step->dense_count; i++) Py_DECREF(step->dense[i]);
  Py_XDECREF(step->count);
  Py_XDECREF(step->gate);
  result_close(&step->results[0]);
  result_close(&step->results[1]);
  return made;
}

/* --- where it runs -------------------------------------------------------------------------- */

/* device=, before any array is opened. */
static int step_open(step *step, PyObject *module, PyObject *where) {
  *step = (struct step){.state = binding_state_of(module)};
  return device_from(step->state, where, &step->said);
}

/* Device memory of so many bytes, holding what is at `source` on the host unless that is NULL. */
static void *stand_in_for(step *step, const void *source, int64_t bytes, char *host) {
  const lola_cuda_api *api = step->device->api;
  lola_message message;
  stand_in *made = &step->stand_ins[step->stand_in_count];
  *made = (stand_in){.host = host, .bytes = bytes, .fresh = !source};
  lola_status status = api->allocate(step->device->number, bytes, step->stream, &made->memory, &message);
  if (!status) step->stand_in_count++;
  if (!status && source && bytes) {
    Py_BEGIN_ALLOW_THREADS status = stage_in(step->device, step->stream, made->memory, source, bytes, &message);
    Py_END_ALLOW_THREADS
  }
  if (status) raise_status(status, &message);
  return status ? NULL : made->memory;
}

/* A NumPy array where the step runs on a device: its numbers there, dense. */
static int bring(step *step, view *array, int in_place) {
  PyArrayObject *source = (PyArrayObject *)array->object;
  if (!PyArray_Check(array->object)) {
    PyErr_Format(PyExc_ValueError, "%s must lie on %s as device says (only NumPy arrays are copied to a device)",
                 array->name, name_of_device(step->device->number).text);
    return -1;
  }
  PyArrayObject *dense = PyArray_GETCONTIGUOUS(source);
  if (!dense) return -1;
  char *host = in_place ? PyArray_BYTES(source) : NULL;
  char *memory = stand_in_for(step, PyArray_DATA(dense), PyArray_NBYTES(dense), host);
  Py_DECREF(dense);
  if (!memory) return -1;
  array->data = memory;
  array->device = step->device->number;
  int64_t stride = array->item_size;
  for (int i = array->ndim; i-- > 0;) {
    array->strides[i] = stride;
    stride *= array->shape[i];
  }
  return 0;
}

static int refuse_place(const view *array, const char *place, const char *what) {
  PyErr_Format(PyExc_ValueError, "%s must lie on %s as %s, got one on %s", array->name, place, what,
               name_of_device(array->device).text);
  return -1;
}

/* The first array and device= say where the step runs. */
static int choose_place(step *step, const view *first) {
  int said = step->said, number = first->device;
  if (number >= 0 && said != DEVICE_UNSAID && said != DEVICE_ANY && said != number)
    return refuse_place(first, name_of_device(said).text, "device says");
  if (number < 0 && (said == DEVICE_UNSAID || said == ON_HOST)) return 0;
  step->staged = number < 0;
  if (step->staged) {
    PyObject *where = PyUnicode_FromString(said == DEVICE_ANY ? "cuda" : name_of_device(said).text);
    int failed = !where || device_chosen(step->state, where, &number);
    Py_XDECREF(where);
    if (failed) return -1;
  }
  step->device = device_of(step->state, number);
  step->stream = first->stream;
  return 0;
}

/* Makes sure that an array, just opened, lies where the others do. */
static int take_place(step *step, const view *array) {
  if (step->opened == 1) return choose_place(step, array);
  int number = step->device && !step->staged ? step->device->number : ON_HOST;
  if (array->device != number) return refuse_place(array, name_of_device(number).text, "the other arrays do");
  return number < 0 ? 0 : device_follow(step->device, step->stream, array->stream);
}

static view *get(step *step, PyObject *object, const char *name) {
  view *array = &step->views[step->opened];
  if (view_open(step->state, object, name, array)) return NULL;
  step->opened++;
  return take_place(step, array) ? NULL : array;
}

/* The same for small things that may also come from the host, which then gives NULL without an exception. */
static view *get_from_device(step *step, PyObject *object, const char *name) {
  if (!step->device || step->staged || PyArray_Check(object) || PyList_Check(object) || PyTuple_Check(object))
    return NULL;
  view *array = &step->views[step->opened];
  if (view_open(step->state, object, name, array)) return NULL;
  if (array->device < 0) {
    view_close(array);
    return NULL;
  }
  step->opened++;
  return take_place(step, array) ? NULL : array;
}

/* Where a result's numbers are to be written. */
static void *result_data(step *step, int index) {
  view *opened = &step->results[index].opened;
  if (!step->staged) return opened->data;
  return stand_in_for(step, NULL, view_size(opened) * opened->item_size, opened->data);
}

/* After the launch: what was written stands on the host where it belongs there. */
static lola_status bring_back(step *step, lola_message *message) {
  lola_status status = LOLA_OK;
  for (int i = 0; i < step->stand_in_count && !status; i++) {
    const stand_in *made = &step->stand_ins[i];
    if (made->host && made->bytes)
      status = stage_out(step->device, step->stream, made->host, made->memory, made->bytes, made->fresh, message);
  }
  return status;
}

/* The exception, or the one or two results; None without any. */
static PyObject *finish(step *step, lola_status status, const lola_message *message, int results) {
  PyObject *made = NULL;
  if (status)
    raise_status(status, message);
  else if (results == 0)
    made = Py_NewRef(Py_None);
  else if (results == 1)
    made = result_take(step->state, &step->results[0]);
  else
    made =
        Py_BuildValue("(NN)", result_take(step->state, &step->results[0]), result_take(step->state, &step->results[1]));
  return step_close(step, made);
}

/* --- arguments ------------------------------------------------------------------------------ */

/* An argument of the given shape and of any float dtype, or of one; NULL with an exception. */
static view *get_floats(step *step, PyObject *object, const char *name, const char *symbols, int ndim,
                        const int64_t *want, lola_array *raw) {
  view *array = get(step, object, name);
  if (!array || view_expect_shape(array, symbols, ndim, want) || view_expect_float(array) ||
      (step->staged && bring(step, array, 0)) || (raw && view_to_array(array, 0, raw)))
    return NULL;
  return array;
}

/* A float32 argument that the core takes as a bare pointer: what is not dense is copied, if it is only read. */
static view *get_dense(step *step, PyObject *object, const char *name, const char *symbols, int ndim,
                       const int64_t *want, int in_place, const float **data) {
  view *array = get(step, object, name);
  if (!array || view_expect_shape(array, symbols, ndim, want) || view_expect_dtype(array, LOLA_FLOAT32, ""))
    return NULL;
  if (in_place && view_expect_output(array)) return NULL;
  static float nothing;
  int dense = view_is_dense(array);
  if (!dense && (in_place || (step->device && !step->staged))) {
    PyErr_Format(PyExc_ValueError, "%s must be C-contiguous%s", name,
                 in_place ? ", as it is written in place" : " on a device");
    return NULL;
  }
  if (step->staged && bring(step, array, in_place)) return NULL;
  *data = array->data ? (const float *)(const void *)array->data : &nothing;
  if (dense || step->staged) return array;
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
  const view *array = get_from_device(step, object, "count"); /* clamped where it is read */
  if (!array && PyErr_Occurred()) return -1;
  if (array) {
    if (view_expect_shape(array, "(B, Hs)", 2, want)) return -1;
    *data = (const int64_t *)(const void *)array->data;
    if (array->type_num == NPY_INT64 && view_is_dense(array)) return 0;
    PyErr_Format(PyExc_TypeError, "count must be int64 and contiguous on a device, got %s", array->dtype);
    return -1;
  }
  step->count = integers_from(step->state, object, "count", "(B, Hs)", 2, want);
  if (!step->count) return -1;
  *data = PyArray_DATA(step->count);
  for (int64_t i = 0; i < B * Hs; i++)
    if ((*data)[i] < 0 || (*data)[i] > S) {
      PyErr_Format(PyExc_ValueError, "count must be from 0 to S (%lld), got %lld", (long long)S, (long long)(*data)[i]);
      return -1;
    }
  if (step->device) *data = stand_in_for(step, *data, PyArray_NBYTES(step->count), NULL);
  return *data ? 0 : -1;
}

/* Query heads come in groups of one size, one group per head of the other array. */
static int expect_multiple(int64_t heads, int64_t of, const char *name, const char *other) {
  if (of > 0 && heads > 0 && heads % of == 0) return 0;
  PyErr_Format(PyExc_ValueError, "%s must be a multiple of the heads of %s (%lld), got %lld", name, other,
               (long long)of, (long long)heads);
  return -1;
}

PyObject *py_features(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  step step;
  lola_array x;
  const char *side;
  int64_t heads;
  const int64_t any[4] = {-1, -1, -1, -1};
  if (expect_argument_count("features", count, 5) || step_open(&step, module, arguments[4]) ||
      feature_map_expect(step.state, arguments[1]) || string_from(arguments[2], "side", &side) ||
      int64_from(arguments[3], "heads", &heads))
    return NULL;
  if (strcmp(side, "q") && strcmp(side, "k")) {
    PyErr_Format(PyExc_ValueError, "side must be 'q' or 'k', got '%s'", side);
    return NULL;
  }
  feature_map_object *map = (feature_map_object *)arguments[1];
  view *opened = get_floats(&step, arguments[0], "x", "(B, T, Hx, D)", 4, any, &x);
  if (!opened || expect_multiple(heads, opened->shape[2], "heads", "x")) return step_close(&step, NULL);
  int64_t F = feature_map_dim(map, heads, opened->shape[3]);
  const int64_t shape[4] = {opened->shape[0], opened->shape[1], heads, F};
  if (F < 0 || result_new(step.state, opened, "out", 4, shape, ELEMENT_FLOAT32, step.stream, &step.results[0]))
    return step_close(&step, NULL);
  lola_feature_map raw = feature_map_raw(map);
  float *out = result_data(&step, 0);
  if (!out && PyErr_Occurred()) return step_close(&step, NULL);
  if (step.device && feature_map_on(map, step.device, &raw)) return step_close(&step, NULL);
  int64_t B = shape[0], T = shape[1], Hx = opened->shape[2], D = opened->shape[3];
  int key = *side == 'k';
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status = step.device ? step.device->api->features(&x, B, T, Hx, D, heads, F, &raw, key, out,
                                                                           step.device->number, step.stream, &message)
                                              : lola_cpu_features(&x, B, T, Hx, D, heads, F, &raw, key, out, &message);
  if (step.device) device_keep_for(step.device, step.stream); /* the map's weights */
  if (!status) status = bring_back(&step, &message);
  Py_END_ALLOW_THREADS return finish(&step, status, &message, 1);
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

/* What is written in place may be none of the inputs. Arrays that were brought to a device are asked about as they
 * were, since H or s would overwrite the caller's other arrays all the same. */
static int fold_apart(step *step, const state_arguments *a) {
  const view *written[] = {a->opened_H, a->opened_s}, *read[] = {a->opened_s, a->opened_fk, a->opened_v};
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 3; j++) {
      if (written[i] == read[j]) continue;
      view one = *written[i], two = *read[j];
      if (step->staged && (view_open(step->state, written[i]->object, written[i]->name, &one) ||
                           view_open(step->state, read[j]->object, read[j]->name, &two)))
        return -1;
      if (view_expect_apart(step->state, &one, &two)) return -1;
    }
  return 0;
}

PyObject *py_score(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  step step;
  state_arguments a;
  if (expect_argument_count("score", count, 5) || step_open(&step, module, arguments[4])) return NULL;
  if (get_state_arguments(&step, arguments, 0, &a)) return step_close(&step, NULL);
  const int64_t shape[3] = {a.B, a.S, a.Hq};
  if (result_new(step.state, a.opened_fk, "out", 3, shape, ELEMENT_FLOAT32, step.stream, &step.results[0]))
    return step_close(&step, NULL);
  float *out = result_data(&step, 0);
  if (!out && PyErr_Occurred()) return step_close(&step, NULL);
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status =
      step.device ? step.device->api->score(&a.fk, &a.v, a.H, a.s, a.B, a.S, a.Hq, a.Hs, a.F, a.Dv, out,
                                            step.device->number, step.stream, &message)
                  : lola_cpu_score(&a.fk, &a.v, a.H, a.s, a.B, a.S, a.Hq, a.Hs, a.F, a.Dv, out, &message);
  if (!status) status = bring_back(&step, &message);
  Py_END_ALLOW_THREADS return finish(&step, status, &message, 1);
}

PyObject *py_select(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  step step;
  const int64_t any[3] = {-1, -1, -1}, *valid;
  const float *scores;
  int64_t keep;
  if (expect_argument_count("select", count, 4) || step_open(&step, module, arguments[3]) ||
      int64_from(arguments[1], "keep", &keep))
    return NULL;
  if (keep < 0) {
    PyErr_Format(PyExc_ValueError, "keep must be at least 0, got %lld", (long long)keep);
    return NULL;
  }
  view *opened = get_dense(&step, arguments[0], "scores", "(B, S, Hs)", 3, any, 0, &scores);
  if (!opened) return step_close(&step, NULL);
  int64_t B = opened->shape[0], S = opened->shape[1], Hs = opened->shape[2], most = keep < S ? keep : S;
  const int64_t kept[3] = {B, Hs, most}, dropped[3] = {B, Hs, S - most};
  if (get_count(&step, arguments[2], B, Hs, S, &valid) ||
      result_new(step.state, opened, "kept", 3, kept, ELEMENT_INT, step.stream, &step.results[0]) ||
      result_new(step.state, opened, "dropped", 3, dropped, ELEMENT_INT, step.stream, &step.results[1]))
    return step_close(&step, NULL);
  int64_t *kept_out = result_data(&step, 0), *dropped_out = result_data(&step, 1);
  if (PyErr_Occurred()) return step_close(&step, NULL);
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status = step.device
                                      ? step.device->api->select(scores, valid, B, S, Hs, keep, kept_out, dropped_out,
                                                                 step.device->number, step.stream, &message)
                                      : lola_cpu_select(scores, valid, B, S, Hs, keep, kept_out, dropped_out, &message);
  if (!status) status = bring_back(&step, &message);
  Py_END_ALLOW_THREADS return finish(&step, status, &message, 2);
}

PyObject *py_fold(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  step step;
  state_arguments a;
  const int64_t *valid;
  if (expect_argument_count("fold", count, 6) || step_open(&step, module, arguments[5])) return NULL;
  if (get_state_arguments(&step, arguments, 1, &a) || get_count(&step, arguments[4], a.B, a.Hs, a.S, &valid) ||
      fold_apart(&step, &a))
    return step_close(&step, NULL);
  float *H = (float *)a.H, *s = (float *)a.s;
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status =
      step.device ? step.device->api->fold(&a.fk, &a.v, H, s, valid, a.B, a.S, a.Hq, a.Hs, a.F, a.Dv,
                                           step.device->number, step.stream, &message)
                  : lola_cpu_fold(&a.fk, &a.v, H, s, valid, a.B, a.S, a.Hq, a.Hs, a.F, a.Dv, &message);
  if (!status) status = bring_back(&step, &message);
  Py_END_ALLOW_THREADS return finish(&step, status, &message, 0);
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
static int get_gate(step *step, PyObject *object, lola_attend_call *raw) {
  const view *array = get_from_device(step, object, "gate");
  if (!array && PyErr_Occurred()) return -1;
  if (array) {
    raw->gate = (const float *)(const void *)array->data;
    if (view_expect_shape(array, "(Hq,)", 1, &raw->Hq) || view_expect_dtype(array, LOLA_FLOAT32, " on a device"))
      return -1;
    if (view_is_dense(array)) return 0;
    PyErr_SetString(PyExc_ValueError, "gate must be contiguous on a device");
    return -1;
  }
  step->gate = gate_from(step->state, object, raw->Hq);
  if (!step->gate) return -1;
  raw->gate = PyArray_DATA(step->gate);
  if (step->device) raw->gate = stand_in_for(step, raw->gate, PyArray_NBYTES(step->gate), NULL);
  return raw->gate ? 0 : -1;
}

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
    return get_gate(step, arguments[0], raw);
  } else if (mixing_reads_gate(raw->mixing)) {
    PyErr_Format(PyExc_ValueError, "gate must be given with mixing '%s', got None", mixing_name(raw->mixing));
    return -1;
  }
  return 0;
}

/* attend(q, k, v, fq, H, s, gate, mixing, scale, causal, count, device) */
PyObject *py_attend(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  step step;
  lola_attend_call raw = {0};
  if (expect_argument_count("attend", count, 12) || step_open(&step, module, arguments[11])) return NULL;
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
      result_new(step.state, q, "out", 4, shape, q->element, step.stream, &step.results[0]) ||
      view_to_array(&step.results[0].opened, 0, &raw.out))
    return step_close(&step, NULL);
  void *out = result_data(&step, 0);
  if (!out && PyErr_Occurred()) return step_close(&step, NULL);
  if (step.staged) raw.out.data = out;
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status = step.device
                                      ? step.device->api->attend(&raw, step.device->number, step.stream, &message)
                                      : lola_cpu_attend(&raw, &message);
  if (!status) status = bring_back(&step, &message);
  Py_END_ALLOW_THREADS return finish(&step, status, &message, 1);
}
