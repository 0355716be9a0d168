# DLPack: messages as tensors of other packages, without a copy. Included by _core.pyx.
#
# What keeps what alive: the consumer's tensor → the managed tensor → its owner (an ArrayHold on the lease, or an ndarray).

from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from cpython.ref cimport Py_DECREF, PyObject

cdef extern from *:
    """
    // The structures of DLPack 1.0 (https://dmlc.github.io/dlpack), both of its ways to hand a tensor over, and the room
    // for shape and strides, in one block.
    namespace {
    struct DlDevice { int32_t type; int32_t id; };
    struct DlType { uint8_t code; uint8_t bits; uint16_t lanes; };
    struct DlTensor {
        void* data;
        DlDevice device;
        int32_t ndim;
        DlType dtype;
        int64_t* shape;
        int64_t* strides;
        uint64_t byte_offset;
    };
    struct DlManaged {
        DlTensor tensor;
        void* owner;
        void (*deleter)(DlManaged*);
    };
    struct DlManagedVersioned {
        uint32_t major, minor;
        void* owner;
        void (*deleter)(DlManagedVersioned*);
        uint64_t flags;
        DlTensor tensor;
    };
    template <class Managed>
    struct DlBlock {
        Managed managed;
        int64_t shape[64];
        int64_t strides[64];
    };

    // Called by the consumer, from any thread, with or without the GIL, and maybe when there is no interpreter any more: then
    // the memory stays, as it does anyway.
    template <class Managed>
    void dl_delete(Managed* managed) {
        if (!Py_IsInitialized()) return;
        PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF(static_cast<PyObject*>(managed->owner));
        PyMem_RawFree(managed);
        PyGILState_Release(state);
    }

    template <class Managed>
    DlTensor* dl_make(PyObject* owner, Managed** out) {
        auto* block = static_cast<DlBlock<Managed>*>(PyMem_RawMalloc(sizeof(DlBlock<Managed>)));
        if (block == nullptr) return nullptr;
        block->managed = Managed{};
        Py_INCREF(owner);
        block->managed.owner = owner;
        block->managed.deleter = dl_delete<Managed>;
        block->managed.tensor.shape = block->shape;
        block->managed.tensor.strides = block->strides;
        *out = &block->managed;
        return &block->managed.tensor;
    }

    // A capsule that nobody took is still called what it was called, and its tensor is its own.
    template <class Managed>
    void dl_drop(PyObject* capsule, const char* name) {
        if (!PyCapsule_IsValid(capsule, name)) return;
        auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
        managed->deleter(managed);
    }
    void dl_drop_old(PyObject* capsule) { dl_drop<DlManaged>(capsule, "dltensor"); }
    void dl_drop_versioned(PyObject* capsule) { dl_drop<DlManagedVersioned>(capsule, "dltensor_versioned"); }

    PyObject* dl_capsule(PyObject* owner, void* data, int ndim, const Py_ssize_t* shape, const Py_ssize_t* strides,
                         Py_ssize_t itemsize, int code, bool versioned, uint64_t flags) {
        DlTensor* tensor = nullptr;
        DlManaged* old = nullptr;
        DlManagedVersioned* current = nullptr;
        if (versioned) {
            tensor = dl_make(owner, &current);
        } else {
            tensor = dl_make(owner, &old);
        }
        if (tensor == nullptr) return PyErr_NoMemory();
        tensor->data = data;
        tensor->device = DlDevice{1, 0};
        tensor->ndim = ndim;
        tensor->dtype = DlType{static_cast<uint8_t>(code), static_cast<uint8_t>(itemsize * 8), 1};
        for (int i = 0; i < ndim; ++i) {
            tensor->shape[i] = shape[i];
            tensor->strides[i] = strides[i] / itemsize;
        }
        PyObject* capsule = nullptr;
        if (versioned) {
            current->major = 1;
            current->minor = 0;
            current->flags = flags;
            capsule = PyCapsule_New(current, "dltensor_versioned", dl_drop_versioned);
            if (capsule == nullptr) current->deleter(current);
        } else {
            capsule = PyCapsule_New(old, "dltensor", dl_drop_old);
            if (capsule == nullptr) old->deleter(old);
        }
        return capsule;
    }
    }  // namespace
    """
    object dl_capsule(object owner, void* data, int ndim, const Py_ssize_t* shape, const Py_ssize_t* strides,
                      Py_ssize_t itemsize, int code, bint versioned, uint64_t flags)

cdef enum:
    DL_CPU = 1
    DL_READ_ONLY = 1  # flags
    DL_IS_COPIED = 2

cdef dict _dl_codes = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}


cdef object dlpack_of(Lease lease, object stream, object max_version, object dl_device, object copy):
    """The capsule that `__dlpack__` of the array API standard gives."""
    cdef ArrayLayout layout = lease._layout
    cdef object owner
    cdef void* data
    cdef uint64_t flags
    cdef bint versioned
    if layout is None:
        raise BufferError(f"the message holds {what_it_holds(lease)}, not an array; {how_to_receive(lease)}")
    dtype = layout.dtype
    code = _dl_codes.get(dtype.kind)
    if code is None or not dtype.isnative or dtype.itemsize > (16 if dtype.kind == "c" else 8):
        raise BufferError(f"DLPack has no type for {_specs.dtype_text(dtype)}; use array(), and convert it")
    if stream is not None and stream != -1:
        raise BufferError(f"stream is {stream!r}, must be None: the message is in the memory of the host")
    if dl_device is not None:
        try:
            kind, number = dl_device
        except (TypeError, ValueError):
            raise BufferError(f"dl_device is {dl_device!r}, must be None or (1, 0), the host") from None
        if int(kind) != DL_CPU or int(number) != 0:
            raise BufferError(
                f"dl_device is {dl_device!r}, and the message is in the memory of the host, (1, 0); copy it there first, then "
                "to the device")
    versioned = max_version is not None and max_version[0] >= 1
    if copy is not None and copy:
        owner = layout.array_at(<void*> lease._payload, ArrayHold(lease), False).copy(order="K")
        data = cnp.PyArray_DATA(owner)
        flags = DL_IS_COPIED
    elif not versioned:
        raise BufferError(
            "a received message is read-only, which DLPack can say from version 1.0 on, and the consumer asked for an older "
            "one (max_version); use copy=True, or array(copy=True)")
    else:
        owner = ArrayHold(lease)
        data = <void*> lease._payload
        flags = DL_READ_ONLY
    return dl_capsule(owner, data, layout.ndim, layout.shape, layout.strides, layout.itemsize, code, versioned, flags)


@cython.final
cdef class Window:
    """The payload of a slot that is being written, as a writable buffer for as long as that lasts."""

    cdef void* _at
    cdef Py_ssize_t _size
    cdef int64_t _exports

    def __getbuffer__(self, Py_buffer* view, int flags):
        if self._at == NULL:
            view.obj = None
            raise BufferError("the message has been sent, or given up")
        PyBuffer_FillInfo(view, self, self._at, self._size, 0, flags)
        self._exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self._exports -= 1
