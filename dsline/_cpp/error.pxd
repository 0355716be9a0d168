cdef extern from "dsline/error.hpp" namespace "dsline" nogil:
    const int kErrorCodeCount


cdef extern from *:
    """
    #include "dsline/error.hpp"

    // Turns the C++ exception in flight into the Python one that dsline/errors.py names for it. Requires: the GIL, and
    // a catch block (Cython calls it there).
    static void dsline_raise_current_error() {
        const dsline::ErrorInfo info = dsline::current_error();
        if (info.code == dsline::kOutOfMemory) {
            PyErr_NoMemory();
            return;
        }
        PyObject* errors = PyImport_ImportModule("dsline.errors");
        if (errors == nullptr) return;
        PyObject* instance = PyObject_CallMethod(errors, "from_core", "iis#y#", info.code, info.os_errno,
                                                 info.message.data(), (Py_ssize_t)info.message.size(),
                                                 info.detail.data(), (Py_ssize_t)info.detail.size());
        Py_DECREF(errors);
        if (instance == nullptr) return;
        PyErr_SetObject((PyObject*)Py_TYPE(instance), instance);
        Py_DECREF(instance);
    }
    """
    int raise_current_error "dsline_raise_current_error"() except *
