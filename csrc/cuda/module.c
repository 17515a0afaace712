/* lola._cuda: holds the CUDA backend and hands its table to lola._lola in a capsule. Importing it touches no driver. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "lola/cuda.h"

static int module_exec(PyObject *module) {
  PyObject *capsule = PyCapsule_New((void *)lola_cuda_table(), LOLA_CUDA_CAPSULE, NULL);
  if (!capsule) return -1;
  int failed = PyModule_AddObjectRef(module, "_api", capsule);
  Py_DECREF(capsule);
  return failed;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lola._cuda",
    .m_doc = "The CUDA backend of lola; lola._lola finds it when a device is first used.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__cuda(void) { return PyModuleDef_Init(&module_definition); }
