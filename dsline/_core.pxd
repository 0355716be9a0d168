from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp.memory cimport shared_ptr, unique_ptr

from dsline._cpp.channel cimport CppBackpressure, CppChannel, CppLoan, CppReceived
from dsline._cpp.watch cimport CppWatch


cdef class Handle:
    cdef shared_ptr[CppChannel] _channel
    cdef object __weakref__
    cdef readonly uint64_t sent
    cdef readonly uint64_t received
    cdef readonly uint64_t bytes_sent
    cdef readonly uint64_t bytes_received
    cdef readonly int64_t views
    cdef readonly uint64_t forced_copies
    cdef uint32_t process
    cdef int64_t claims
    cdef int64_t peak
    cdef str site
    cdef readonly int64_t loans
    cdef readonly int64_t kept


cdef class ArrayLayout:
    cdef readonly object dtype
    cdef readonly object names
    cdef readonly bytes metadata
    cdef readonly bytes format
    cdef readonly int ndim
    cdef readonly bint fortran
    cdef readonly bint masked
    cdef readonly Py_ssize_t itemsize
    cdef readonly Py_ssize_t nbytes
    cdef tuple fields
    cdef uint64_t hash
    cdef Py_ssize_t shape[64]
    cdef Py_ssize_t strides[64]

    @staticmethod
    cdef ArrayLayout make(object dtype, int ndim, const int64_t* shape, bint fortran, bytes metadata)
    cdef object array_at(self, void* data, object base, bint writable)
    cdef object new_array(self)


cdef class Schema:
    cdef readonly bytes encoded
    cdef readonly object spec
    cdef readonly object dtype
    cdef readonly bint record
    cdef readonly bint fixed
    cdef readonly ArrayLayout layout
    cdef bint _fortran
    cdef int _ndim
    cdef int64_t _shape[64]

    @staticmethod
    cdef Schema of_spec(object spec)
    @staticmethod
    cdef Schema decode(bytes encoded)
    cdef ArrayLayout _layout(self, const int64_t* shape)
    cdef ArrayLayout layout_for(self, object array)
    cdef bint fits(self, ArrayLayout layout) except -1


cdef class Lease:
    cdef Handle _handle
    cdef ArrayLayout _layout
    cdef const void* _payload
    cdef Py_ssize_t _nbytes
    cdef uint32_t _slot
    cdef uint32_t _process
    cdef uint32_t _group
    cdef int64_t _exports
    cdef int _kind
    cdef bint _held
    cdef bint _nack
    cdef bint _claimed
    cdef uint32_t _attempts
    cdef uint64_t _sequence
    cdef object _memory
    cdef void _release(self) noexcept
    cdef void _unclaim(self) noexcept


cdef class Message:
    cdef Lease _lease
    cdef Lease _copy
    cdef bytes _metadata
    cdef dict _meta
    cdef readonly uint64_t sequence
    cdef readonly int64_t timestamp_ns
    cdef readonly int attempt

    cdef Lease _open(self)
    cdef Lease _shown(self)
    cdef Lease _unviewed(self)


cdef class Watch:
    cdef unique_ptr[CppWatch] _cpp


cdef class Receiver:
    cdef Handle _handle
    cdef Watch _watch
    cdef CppChannel* _cpp
    cdef bint _receives
    cdef bint _synced
    cdef object _timeout
    cdef object _deferred
    cdef object _kept_rows
    cdef list _callbacks
    cdef uint64_t _deaths_told
    cdef ArrayLayout _received_layout
    cdef int64_t _budget
    cdef int64_t _auto_budget
    cdef bint _warned
    cdef ArrayLayout _checked_layout
    cdef Schema _schema

    cdef int _take_over(self, Handle handle, object timeout) except -1
    cdef int _receive(self, CppReceived& message, object timeout) except -1
    cdef int _receive_any(self, CppReceived& message, object timeout) except -1
    cdef Message _message(self, CppReceived& message)
    cdef int _receive_raw(self, CppReceived& message, object timeout) except -1
    cdef int _check_schema(self, ArrayLayout layout, CppReceived& message) except -1
    cdef int _refuse_receiving(self) except -1
    cdef int _between_slices(self) except -1
    cdef int _fill(self, Message out, CppReceived& message) except -1
    cdef Lease _lease(self, CppReceived& message)
    cdef ArrayLayout _layout_of(self, CppReceived& message)
    cdef int _undo(self, Lease lease, CppReceived& message) except -1
    cdef int _untake(self, Lease lease, CppReceived& message) noexcept
    cdef int _copy_to(self, object array, Lease lease, CppReceived& message) except -1
    cdef object _copy_of(self, CppReceived& message)
    cdef int _tell_of_deaths(self) except -1
    cdef object _corrupted_error(self, CppReceived& message)
    cdef object _malformed_error(self, CppReceived& message, str why)


cdef class Channel(Receiver):
    cdef CppBackpressure _policy
    cdef ArrayLayout _sent_layout
    cdef int _zero_copy
    cdef ArrayLayout _loan_layout
    cdef object _loan_dtype
    cdef object _loan_key
    cdef bytes _loan_metadata
    cdef ArrayLayout _masked_layout

    cdef int send_nogil(self, const void* data, size_t size, long long timeout_ns) except -1 nogil
    cpdef bint _send_pickled(self, object stream, list buffers, object timeout=*, object meta=*) except -1
    cdef bint _send(self, object data, object timeout, object meta) except -1
    cdef bint _send_typed(self, object data, object timeout, object meta) except -1
    cdef bint _send_record(self, object data, object timeout, object meta) except -1
    cdef bint _send_masked(self, object array, object timeout, object meta) except -1
    cdef bint _send_fields(self, ArrayLayout layout, list values, bytes metadata, object timeout) except -1
    cdef object _mismatch(self, str given, str way)
    cdef bint _send_frame(self, const void* payload, uint64_t size, int kind, bytes metadata, uint64_t schema,
                          object timeout) except -1
    cdef bint _send_gathered(self, Py_buffer* view, bytes metadata, object timeout) except -1
    cdef bint _send_array(self, object array, object timeout, object meta) except -1
    cdef bint _alloc(self, CppLoan& loan, uint64_t size, bytes metadata, object timeout) except -1
    cdef bint _alloc_room(self, CppLoan& loan, uint64_t size, uint32_t meta_bytes, object timeout, bint for_copy) except -1
    cdef bint _publish(self, CppLoan& loan, int kind, uint64_t schema) except -1
    cdef int _wait_for_space(self, object timeout, int64_t* deadline, bint* spin) except -1
    cdef ArrayLayout _layout_for(self, object array)
