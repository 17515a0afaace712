/* The one place where a status of the core becomes a Python exception. */
#include "binding.h"

int raise_status(lola_status status, const lola_message *message) {
  if (PyErr_Occurred()) return -1; /* what interrupted the call */
  PyObject *type = PyExc_RuntimeError;
  switch (status) {
  case LOLA_VALUE_ERROR:
    type = PyExc_ValueError;
    break;
  case LOLA_MEMORY_ERROR:
    type = PyExc_MemoryError;
    break;
  case LOLA_OK:
  case LOLA_DEVICE_ERROR:
  case LOLA_INTERRUPTED:
    break;
  }
  PyErr_SetString(type, message->text);
  return -1;
}

int raise_from_present(PyObject *type, const char *format, ...) {
  PyObject *cause_type, *cause, *traceback;
  PyErr_Fetch(&cause_type, &cause, &traceback);
  if (cause_type) {
    PyErr_NormalizeException(&cause_type, &cause, &traceback);
    if (traceback && cause) PyException_SetTraceback(cause, traceback);
  }
  va_list arguments;
  va_start(arguments, format);
  PyErr_FormatV(type, format, arguments);
  va_end(arguments);
  if (cause) {
    PyObject *raised_type, *raised, *raised_traceback;
    PyErr_Fetch(&raised_type, &raised, &raised_traceback);
    PyErr_NormalizeException(&raised_type, &raised, &raised_traceback);
    PyException_SetCause(raised, cause); /* steals */
    PyErr_Restore(raised_type, raised, raised_traceback);
  }
  Py_XDECREF(cause_type);
  Py_XDECREF(traceback);
  return -1;
}
