/* lola._lola: the module, its state and the functions about the machine. */
#define BINDING_IMPORTS_NUMPY
#include "device.h"

static struct PyModuleDef module_def;

binding_state *binding_state_of(PyObject *module) { return PyModule_GetState(module); }

binding_state *binding_state_of_type(PyTypeObject *type) {
  PyObject *module = PyType_GetModuleByDef(type, &module_def);
  return module ? binding_state_of(module) : NULL;
}

/* --- the machine ----------------------------------------------------------------------------- */

static PyObject *py_isa(PyObject *module, PyObject *unused) {
  (void)module;
  (void)unused;
  return PyUnicode_FromString(lola_cpu_isa());
}

static PyObject *py_available_isas(PyObject *module, PyObject *unused) {
  (void)module;
  (void)unused;
  int count = lola_cpu_isa_count();
  PyObject *names = PyTuple_New(count);
  for (int i = 0; names && i < count; i++) {
    PyObject *name = PyUnicode_FromString(lola_cpu_isa_name(i));
    if (!name)
      Py_CLEAR(names);
    else
      PyTuple_SET_ITEM(names, i, name);
  }
  return names;
}

static PyObject *py_set_isa(PyObject *module, PyObject *object) {
  (void)module;
  const char *name = NULL;
  lola_message message;
  if (object != Py_None && string_from(object, "name", &name)) return NULL;
  lola_status status = lola_cpu_set_isa(name, &message);
  if (status) raise_status(status, &message);
  return status ? NULL : Py_NewRef(Py_None);
}

static PyObject *py_num_threads(PyObject *module, PyObject *unused) {
  (void)module;
  (void)unused;
  return PyLong_FromLong(lola_cpu_threads());
}

static PyObject *py_set_num_threads(PyObject *module, PyObject *object) {
  (void)module;
  int64_t threads;
  lola_message message;
  if (int64_from(object, "threads", &threads)) return NULL;
  if (threads < 1 || threads > INT_MAX) { /* 0 stands for all in the core, but is no number that one asks for */
    PyErr_Format(PyExc_ValueError, "threads must be at least 1, got %R", object);
    return NULL;
  }
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status = lola_cpu_set_threads((int)threads, &message);
  Py_END_ALLOW_THREADS if (status) raise_status(status, &message);
  return status ? NULL : Py_NewRef(Py_None);
}

static PyObject *py_scratch_peak(PyObject *module, PyObject *unused) {
  (void)module;
  (void)unused;
  return PyLong_FromLongLong(lola_cpu_scratch_peak());
}

static PyObject *py_cuda_unavailable_reason(PyObject *module, PyObject *unused) {
  (void)unused;
  char text[sizeof(lola_message)];
  if (cuda_is_available(binding_state_of(module), text, sizeof text)) Py_RETURN_NONE;
  return PyUnicode_FromString(text);
}

static PyObject *py_device(PyObject *module, PyObject *object) {
  int number;
  if (device_chosen(binding_state_of(module), object, &number)) return NULL;
  return PyUnicode_FromString(name_of_device(number).text);
}

/* --- the module ------------------------------------------------------------------------------ */

#define FAST(function) (PyCFunction)(void (*)(void))(fast_function)(function), METH_FASTCALL

static PyMethodDef module_functions[] = {
    {"attention", FAST(py_attention),
     "attention($module, q, k, v, cache, config, feature_map, q_features, k_features, gate, scores, starts, stops, "
     "cu_seqlens, device, stream, check, out, with_share, /)\n--\n\nSee lola.attention and lola.stats.linear_share."},
    {"features", FAST(py_features),
     "features($module, x, feature_map, side, heads, device, /)\n--\n\nSee lola.kernels.features."},
    {"score", FAST(py_score), "score($module, fk, v, H, s, device, /)\n--\n\nSee lola.kernels.score."},
    {"select", FAST(py_select), "select($module, scores, keep, count, device, /)\n--\n\nSee lola.kernels.select."},
    {"fold", FAST(py_fold), "fold($module, fk, v, H, s, count, device, /)\n--\n\nSee lola.kernels.fold."},
    {"attend", FAST(py_attend),
     "attend($module, q, k, v, fq, H, s, gate, mixing, scale, causal, count, device, /)\n--\n\nSee "
     "lola.kernels.attend."},
    {"isa", py_isa, METH_NOARGS, "isa($module, /)\n--\n\nThe instruction set in use."},
    {"available_isas", py_available_isas, METH_NOARGS,
     "available_isas($module, /)\n--\n\nThe instruction sets that are compiled in and that this machine has, best "
     "first."},
    {"set_isa", py_set_isa, METH_O,
     "set_isa($module, name, /)\n--\n\nUses one of available_isas(); None: the best. ValueError if it is not there."},
    {"num_threads", py_num_threads, METH_NOARGS, "num_threads($module, /)\n--\n\nThreads that a call may use."},
    {"set_num_threads", py_set_num_threads, METH_O,
     "set_num_threads($module, threads, /)\n--\n\nSets how many threads a call may use, at least 1."},
    {"scratch_peak", py_scratch_peak, METH_NOARGS,
     "scratch_peak($module, /)\n--\n\nScratch bytes that this thread's last call used."},
    {"device", py_device, METH_O,
     "device($module, device, /)\n--\n\nThe full name of a device that can be used: \"cpu\" or \"cuda:0\" and so on."},
    {"cuda_unavailable_reason", py_cuda_unavailable_reason, METH_NOARGS,
     "cuda_unavailable_reason($module, /)\n--\n\nWhy CUDA devices cannot be used, None if they can."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec) {
  PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
  if (type && PyModule_AddType(module, type)) Py_CLEAR(type);
  return type;
}

static int module_exec(PyObject *module) {
  import_array1(-1);
  binding_state *state = binding_state_of(module);
  static const char *const names[NAME_COUNT] = {
      [NAME_REQUIRES_GRAD] = "requires_grad",
      [NAME_EXCHANGE] = "__dlpack_c_exchange_api__",
      [NAME_DLPACK] = "__dlpack__",
      [NAME_MAX_VERSION] = "max_version",
      [NAME_NEW_EMPTY] = "new_empty",
      [NAME_DTYPE] = "dtype",
      [NAME_FINGERPRINT] = "fingerprint",
      [NAME_NAMESPACE] = "__array_namespace__",
      [NAME_STREAM] = "stream",
      [NAME_DLPACK_DEVICE] = "__dlpack_device__",
      [NAME_CUDA_INTERFACE] = "__cuda_array_interface__",
  };
  for (int i = 0; i < NAME_COUNT; i++)
    if (!(state->names[i] = PyUnicode_InternFromString(names[i]))) return -1;
  state->devices_lock = PyThread_allocate_lock();
  if (!state->devices_lock) {
    PyErr_NoMemory();
    return -1;
  }
  state->dlpack_version = Py_BuildValue("(ii)", DL_MAJOR, 0);
  state->cache_type = add_type(module, &cache_spec);
  state->map_type = add_type(module, &feature_map_spec);
  state->export_type = add_type(module, &export_spec);
  return state->dlpack_version && state->cache_type && state->map_type && state->export_type ? 0 : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
  binding_state *state = binding_state_of(module);
  Py_VISIT(state->cache_type);
  Py_VISIT(state->map_type);
  Py_VISIT(state->export_type);
  return 0;
}

static int module_clear(PyObject *module) {
  binding_state *state = binding_state_of(module);
  Py_CLEAR(state->cache_type);
  Py_CLEAR(state->map_type);
  Py_CLEAR(state->export_type);
  Py_CLEAR(state->dlpack_version);
  for (int i = 0; i < NAME_COUNT; i++) Py_CLEAR(state->names[i]);
  return 0;
}

static void module_free(void *module) {
  binding_state *state = binding_state_of(module);
  module_clear(module);
  if (state->devices_lock) PyThread_free_lock(state->devices_lock);
  state->devices_lock = NULL; /* the devices stay: memory on them may outlive the module */
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, (void *)module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lola._lola",
    .m_doc = "The compiled part of lola: LoLA attention (arXiv 2505.23666), its cache and its steps.",
    .m_size = sizeof(binding_state),
    .m_methods = module_functions,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__lola(void) { return PyModuleDef_Init(&module_def); }
