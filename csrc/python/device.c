#include "device.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* --- the table ------------------------------------------------------------------------------ */

static const char not_built[] = "this build of lola has no CUDA part: build it where the CUDA Toolkit's nvcc is found "
                                "(LOLA_CUDA=1 pip install, from "
                                "the source)";

/* The table, without asking the driver; NULL with the reason in `text`. */
static const lola_cuda_api *find_table(binding_state *state, char *text, size_t size) {
  PyObject *module = PyImport_ImportModule("lola._cuda");
  PyObject *capsule = module ? PyObject_GetAttrString(module, "_api") : NULL;
  const lola_cuda_api *api = capsule ? PyCapsule_GetPointer(capsule, LOLA_CUDA_CAPSULE) : NULL;
  Py_XDECREF(capsule);
  Py_XDECREF(module); /* the table outlives it: modules in C stay loaded */
  if (api && api->version == LOLA_CUDA_API_VERSION) {
    atomic_store(&state->api, api);
    return api;
  }
  if (api) {
    snprintf(text, size, "lola._cuda and lola._lola are of different builds: install lola anew");
    return NULL;
  }
  if (!module && PyErr_ExceptionMatches(PyExc_ModuleNotFoundError)) {
    PyErr_Clear();
    snprintf(text, size, "%s", not_built);
    return NULL;
  }
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyObject *said = value ? PyObject_Str(value) : NULL;
  const char *utf8 = said ? PyUnicode_AsUTF8(said) : NULL;
  snprintf(text, size, "the CUDA part of lola could not be loaded: %s", utf8 ? utf8 : "of no known reason");
  PyErr_Clear();
  Py_XDECREF(said);
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(traceback);
  return NULL;
}

/* The table and how many devices it can use, at least one; NULL with the reason in `text`. */
static const lola_cuda_api *find_devices(binding_state *state, int *count, char *text, size_t size) {
  const lola_cuda_api *api = find_table(state, text, size);
  lola_message message = {{0}};
  *count = 0;
  if (!api) return NULL;
  if (!api->device_count(count, &message) && *count > 0) return api;
  snprintf(text, size, "%s", message.text[0] ? message.text : "there is no CUDA device");
  return NULL;
}

int cuda_is_available(binding_state *state, char *text, size_t size) {
  int count;
  return find_devices(state, &count, text, size) != NULL;
}

/* --- devices -------------------------------------------------------------------------------- */

device_name name_of_device(int number) {
  device_name name = {"cpu"};
  if (number >= 0) snprintf(name.text, sizeof name.text, "cuda:%d", number);
  return name;
}

device *device_of(binding_state *state, int number) {
  const lola_cuda_api *api = atomic_load(&state->api); /* tests bring one of their own */
  device *found = atomic_load(&state->devices);
  while (found && (found->number != number || found->api != api)) found = found->next;
  return found;
}

static device *device_make(const lola_cuda_api *api, int number) {
  lola_message message;
  device *made = PyMem_RawCalloc(1, sizeof *made);
  if (!made) return (device *)PyErr_NoMemory();
  made->api = api;
  made->number = number;
  made->lock = PyThread_allocate_lock();
  made->staging_lock = PyThread_allocate_lock();
  lola_status status = LOLA_OK;
  if (!made->lock || !made->staging_lock)
    PyErr_NoMemory();
  else
    status = api->stream_create(number, &made->keeper, &message);
  if (made->keeper && !status) status = api->stream_create(number, &made->waiter, &message);
  if (status) raise_status(status, &message);
  if (made->waiter) return made;
  if (made->keeper) api->stream_destroy(number, made->keeper);
  if (made->lock) PyThread_free_lock(made->lock);
  if (made->staging_lock) PyThread_free_lock(made->staging_lock);
  PyMem_RawFree(made);
  return NULL;
}

device *device_open(binding_state *state, int number) {
  device *found = device_of(state, number);
  if (found) return found;
  char text[sizeof(lola_message)];
  int count;
  const lola_cuda_api *api = find_devices(state, &count, text, sizeof text);
  if (!api) {
    PyErr_Format(PyExc_RuntimeError, "device '%s' is not available: %s", name_of_device(number).text, text);
    return NULL;
  }
  if (number >= count) {
    PyErr_Format(PyExc_ValueError, "device must be from 'cuda:0' to 'cuda:%d' on this machine, got 'cuda:%d'",
                 count - 1, number);
    return NULL;
  }
  PyThread_acquire_lock(state->devices_lock, WAIT_LOCK);
  found = device_of(state, number);
  if (!found && (found = device_make(api, number))) {
    found->next = atomic_load(&state->devices);
    atomic_store(&state->devices, found);
  }
  PyThread_release_lock(state->devices_lock);
  return found;
}

/* "cuda" or "cuda:1" after the first four letters; -1 for any other text. */
static int device_suffix(const char *text, int *number) {
  *number = DEVICE_ANY;
  if (!*text) return 0;
  if (*text++ != ':' || !*text || strlen(text) > 4) return -1;
  for (*number = 0; *text; text++) {
    if (*text < '0' || *text > '9') return -1;
    *number = *number * 10 + *text - '0';
  }
  return 0;
}

static int refuse_device(PyObject *object) {
  PyErr_Format(PyExc_ValueError, "device must be None, 'cpu', 'cuda' or 'cuda:0' and so on, got %R", object);
  return -1;
}

/* torch.device and its like: .type, and .index or None. */
static int device_from_object(PyObject *object, int *number) {
  PyObject *type = PyObject_GetAttrString(object, "type"), *index = NULL;
  const char *name = type && PyUnicode_Check(type) ? PyUnicode_AsUTF8(type) : NULL;
  int result = -1;
  if (!name) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "device must be None, 'cpu' or 'cuda', got %.100s", Py_TYPE(object)->tp_name);
  } else if (!strcmp(name, "cpu")) {
    *number = ON_HOST;
    result = 0;
  } else if (strcmp(name, "cuda")) {
    refuse_device(object);
  } else {
    index = PyObject_GetAttrString(object, "index");
    if (!index) PyErr_Clear();
    *number = DEVICE_ANY;
    result = 0;
    if (index && index != Py_None) {
      int64_t value = -1;
      result = int64_from(index, "device.index", &value);
      if (!result && (value < 0 || value > 9999)) result = refuse_device(object);
      *number = (int)value;
    }
  }
  Py_XDECREF(type);
  Py_XDECREF(index);
  return result;
}

int device_from(binding_state *state, PyObject *object, int *number) {
  *number = DEVICE_UNSAID;
  if (object == Py_None) return 0;
  if (!PyUnicode_Check(object)) {
    if (device_from_object(object, number)) return -1;
  } else {
    const char *text = PyUnicode_AsUTF8(object);
    if (!text) return -1;
    if (!strcmp(text, "cpu"))
      *number = ON_HOST;
    else if (strncmp(text, "cuda", 4) || device_suffix(text + 4, number))
      return refuse_device(object);
  }
  if (*number >= 0) return device_open(state, *number) ? 0 : -1;
  char text[sizeof(lola_message)];
  if (*number == DEVICE_ANY && !cuda_is_available(state, text, sizeof text)) {
    PyErr_Format(PyExc_RuntimeError, "device 'cuda' is not available: %s", text);
    return -1;
  }
  return 0;
}

static int current_device(binding_state *state, int *number) {
  char text[sizeof(lola_message)];
  const lola_cuda_api *api = find_table(state, text, sizeof text);
  lola_message message;
  if (!api) {
    PyErr_Format(PyExc_RuntimeError, "device 'cuda' is not available: %s", text);
    return -1;
  }
  lola_status status = api->current_device(number, &message);
  return status ? raise_status(status, &message) : 0;
}

int device_chosen(binding_state *state, PyObject *object, int *number) {
  if (device_from(state, object, number)) return -1;
  if (*number == DEVICE_UNSAID) *number = ON_HOST;
  if (*number != DEVICE_ANY) return 0;
  return current_device(state, number) || !device_open(state, *number) ? -1 : 0;
}

/* --- streams -------------------------------------------------------------------------------- */

/* An attribute that is an address, of an object without more; 1 if it is there, -1 with an exception. */
static int address_attribute(PyObject *object, const char *name, void **stream) {
  PyObject *value = PyObject_GetAttrString(object, name);
  if (!value) {
    PyErr_Clear();
    return 0;
  }
  int found = PyLong_Check(value);
  if (found) *stream = PyLong_AsVoidPtr(value);
  Py_DECREF(value);
  return found && PyErr_Occurred() ? -1 : found;
}

int stream_from(PyObject *object, void **stream) {
  if (PyLong_Check(object) && !PyBool_Check(object)) {
    *stream = PyLong_AsVoidPtr(object);
    return PyErr_Occurred() ? -1 : 0;
  }
  PyObject *pair = PyObject_CallMethod(object, "__cuda_stream__", NULL); /* (version, address) */
  PyObject *address = pair ? PySequence_GetItem(pair, 1) : NULL;
  Py_XDECREF(pair);
  if (address) {
    *stream = PyLong_AsVoidPtr(address);
    Py_DECREF(address);
    return PyErr_Occurred() ? -1 : 0;
  }
  PyErr_Clear();
  static const char *const names[] = {"cuda_stream", "ptr", "handle"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    int found = address_attribute(object, names[i], stream);
    if (found) return found < 0 ? -1 : 0;
  }
  PyErr_Format(PyExc_TypeError, "stream must be None, a CUDA stream or its address, got %.100s",
               Py_TYPE(object)->tp_name);
  return -1;
}

/* module.first.second(argument), or module.first.second() without one, of a module that is imported, as an address. */
static int ask_address(const char *module, const char *first, const char *second, PyObject *argument, void **stream) {
  PyObject *name = PyUnicode_FromString(module);
  PyObject *found = name ? PyImport_GetModule(name) : NULL;
  PyObject *inner = found ? PyObject_GetAttrString(found, first) : NULL;
  PyObject *function = inner ? PyObject_GetAttrString(inner, second) : NULL;
  PyObject *answer = !function  ? NULL
                     : argument ? PyObject_CallOneArg(function, argument)
                                : PyObject_CallNoArgs(function);
  Py_XDECREF(name);
  Py_XDECREF(found);
  Py_XDECREF(inner);
  Py_XDECREF(function);
  if (answer && !PyLong_Check(answer)) {
    int failed = stream_from(answer, stream);
    Py_DECREF(answer);
    return failed;
  }
  if (!answer) {
    if (!PyErr_Occurred()) PyErr_Format(PyExc_RuntimeError, "%s was imported and is gone", module);
    return -1;
  }
  *stream = PyLong_AsVoidPtr(answer);
  Py_DECREF(answer);
  return PyErr_Occurred() ? -1 : 0;
}

static int torch_stream(int number, void **stream) {
  PyObject *index = PyLong_FromLong(number);
  if (!index) return -1;
  int failed = ask_address("torch", "_C", "_cuda_getCurrentRawStream", index, stream);
  if (failed && PyErr_ExceptionMatches(PyExc_AttributeError)) { /* the public way takes far longer */
    PyErr_Clear();
    failed = ask_address("torch", "cuda", "current_stream", index, stream);
  }
  Py_DECREF(index);
  return failed;
}

int library_stream(binding_state *state, const library *library, int number, void **stream) {
  (void)state;
  *stream = NULL;
  switch (library->kind) {
  case LIBRARY_EXCHANGE:
    if (!library->exchange->current_stream(DL_CUDA, number, stream)) return 0;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "the array's library could not tell its current stream");
    return -1;
  case LIBRARY_TORCH:
    return torch_stream(number, stream);
  case LIBRARY_CUPY:
    return ask_address("cupy", "cuda", "get_current_stream", NULL, stream);
  case LIBRARY_NONE:
    break;
  }
  return 0;
}

static lola_status follow(device *device, void *stream, void *after, lola_message *message) {
  const lola_cuda_api *api = device->api;
  void *event = NULL;
  lola_status status = api->event_create(device->number, &event, message);
  if (!status) status = api->event_record(device->number, event, after, message);
  if (!status) status = api->event_wait(device->number, event, stream, message);
  if (event) api->event_destroy(device->number, event);
  return status;
}

int device_follow(device *device, void *stream, void *after) {
  lola_message message;
  lola_status status = stream == after ? LOLA_OK : follow(device, stream, after, &message);
  return status ? raise_status(status, &message) : 0;
}

void device_keep_for(device *device, void *stream) {
  lola_message ignored;
  int capturing = 1;
  if (device->api->capturing(device->number, stream, &capturing, &ignored) || capturing) return;
  follow(device, device->keeper, stream, &ignored);
}

lola_status device_wait(device *device, void *event, lola_message *message) {
  lola_status status = device->api->event_wait(device->number, event, device->waiter, message);
  return status ? status : device->api->synchronize(device->number, device->waiter, message);
}

lola_status device_put(device *device, void *stream, void *target, const void *source, int64_t bytes,
                       lola_message *message) {
  const lola_cuda_api *api = device->api;
  int number = device->number;
  lola_status status = LOLA_OK;
  if (!bytes) return status;
  if (bytes > SLOT_BYTES) {
    status = api->copy(number, target, source, bytes, LOLA_COPY_TO_DEVICE, stream, message);
    return status ? status : api->synchronize(number, stream, message);
  }
  PyThread_acquire_lock(device->lock, WAIT_LOCK);
  slot *slot = &device->slots[device->next_slot];
  device->next_slot = (device->next_slot + 1) % SLOTS;
  if (!slot->data) status = api->allocate_host(SLOT_BYTES, (void **)&slot->data, message);
  if (!status && !slot->event) status = api->event_create(number, &slot->event, message);
  if (!status && slot->used) status = device_wait(device, slot->event, message);
  if (!status) {
    memcpy(slot->data, source, (size_t)bytes);
    status = api->copy(number, target, slot->data, bytes, LOLA_COPY_TO_DEVICE, stream, message);
  }
  if (!status) {
    status = api->event_record(number, slot->event, stream, message);
    slot->used = 1;
  }
  PyThread_release_lock(device->lock);
  return status;
}
