# How a pickled object lies in a message, and how it is read. Part of _core.pyx.
#
#   | buffers (8) | stream bytes (8) | offset, bytes of each buffer (16 each) | stream | buffers, each at a multiple of 64 |
#
# All numbers are little-endian. A reader believes none of them before it has compared them with the payload's length.

cdef uint64_t OUT_OF_BAND_BYTES = _objects.OUT_OF_BAND_BYTES
cdef tuple FOREIGN = _objects.MODULES
cdef dict loaded_modules = _sys.modules
cdef object pickle_dumps = _objects.dumps
cdef object pickle_loads = _objects.loads
# A stream up to this length is copied out before it is read, which costs less than two memoryviews.
cdef enum:
    SHORT_STREAM_BYTES = 8192


cdef struct BufferPlace:
    uint64_t offset
    uint64_t nbytes


@cython.final
@cython.freelist(8)
cdef class OutOfBand:
    """The callback of a pickler: keeps large contiguous buffers, and leaves the others to the stream."""

    cdef list _buffers

    def __call__(self, buffer):
        """True: it goes into the stream."""
        cdef Py_buffer view
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_ANY_CONTIGUOUS)
        except BufferError:
            return True
        cdef uint64_t size = view.len
        PyBuffer_Release(&view)
        if size < OUT_OF_BAND_BYTES:
            return True
        if self._buffers is None:
            self._buffers = []
        self._buffers.append(buffer)
        return False


def pickle_object(obj, pickler=None):
    """Pickle an object, protocol 5: (stream, buffers that are not in it or None).

    `pickler` is a subclass of `pickle.Pickler` to use. Raises whatever pickling raises. The buffers (`pickle.PickleBuffer`)
    keep the memory of `obj` alive.
    """
    cdef OutOfBand keep = OutOfBand.__new__(OutOfBand)
    if pickler is None:
        for name in FOREIGN:
            if name in loaded_modules:
                break
        else:
            return pickle_dumps(obj, 5, buffer_callback=keep), keep._buffers
    stream = _objects.write_pickle(obj, keep, pickler)
    return stream, keep._buffers


@cython.final
@cython.freelist(8)
cdef class PickledParts:
    """A pickle and its out-of-band buffers, to be written into a slot. Holds their memory."""

    cdef const unsigned char[::1] _stream
    cdef list _views
    cdef readonly uint64_t nbytes

    def __init__(self, stream, list buffers):
        self._stream = stream
        cdef uint64_t at = 16 + <uint64_t> self._stream.shape[0]
        self._views = None
        if buffers:
            at += 16 * <uint64_t> len(buffers)
            self._views = [buffer.raw() for buffer in buffers]
            for view in self._views:
                at = ((at + 63) & ~<uint64_t> 63) + <uint64_t> view.nbytes
        self.nbytes = at

    cdef void write(self, void* target) noexcept:
        """Copies all of it. The views are held and contiguous, and the room was measured."""
        cdef char* to = <char*> target
        cdef uint64_t numbers[2]
        cdef uint64_t at
        cdef Py_buffer* view
        cdef BufferPlace place
        cdef Py_ssize_t i = 0
        cdef uint64_t count = 0 if self._views is None else len(self._views)
        numbers[0] = count
        numbers[1] = self._stream.shape[0]
        memcpy(to, numbers, 16)
        at = 16 + 16 * count
        if self._stream.shape[0] != 0:
            copy_bytes(to + at, &self._stream[0], self._stream.shape[0])
        at += self._stream.shape[0]
        if self._views is None:
            return
        for one in self._views:
            view = PyMemoryView_GET_BUFFER(one)
            place.offset = (at + 63) & ~<uint64_t> 63
            place.nbytes = view.len
            memcpy(to + 16 + 16 * i, &place, 16)
            copy_bytes(to + place.offset, view.buf, view.len)
            at = place.offset + place.nbytes
            i += 1


cdef void copy_bytes(void* to, const void* source, uint64_t size) noexcept:
    if size < NOGIL_COPY_BYTES:
        memcpy(to, source, size)
    else:
        with nogil:
            memcpy(to, source, size)


cdef object object_of(Lease lease, bint copy):
    """What a held message carries. The lease is released when nothing looks at it any more."""
    cdef ArrayLayout layout = lease._layout
    if layout is not None:
        array = array_over(lease, ArrayHold(lease))
        return array.copy(order="K") if copy else array
    if lease._kind != kObjectMessage:
        return PyBytes_FromStringAndSize(<const char*> lease._payload, lease._nbytes)
    cdef const char* payload = <const char*> lease._payload
    cdef uint64_t size = lease._nbytes, count, stream_bytes, start
    cdef uint64_t numbers[2]
    cdef BufferPlace place
    cdef uint64_t i
    cdef list buffers = None
    if size < 16:
        raise malformed_object("it is shorter than its header")
    memcpy(numbers, payload, 16)
    count, stream_bytes = numbers[0], numbers[1]
    if count > (size - 16) // 16 or stream_bytes > size - 16 - 16 * count:
        raise malformed_object(f"{count} buffers and a stream of {stream_bytes} bytes do not fit into its {size} bytes")
    start = 16 + 16 * count
    view = stream = None
    if count != 0 or stream_bytes > SHORT_STREAM_BYTES:
        view = PyMemoryView_FromObject(lease)
        stream = view[start:start + stream_bytes]
    else:
        stream = PyBytes_FromStringAndSize(payload + start, stream_bytes)
    if count != 0:
        buffers = []
        for i in range(count):
            memcpy(&place, payload + 16 + 16 * i, 16)
            if place.offset > size or place.nbytes > size - place.offset:
                raise malformed_object(f"buffer {i} lies outside of its {size} bytes")
            if copy:
                memory = np.empty(place.nbytes, np.uint8)
                copy_bytes(cnp.PyArray_DATA(memory), payload + place.offset, place.nbytes)
                buffers.append(memory)
            else:
                buffers.append(view[place.offset:place.offset + place.nbytes])
    try:
        return pickle_loads(stream) if buffers is None else pickle_loads(stream, buffers=buffers)
    except Exception as error:
        raise SerializationError(
            f"message {lease._sequence} cannot be unpickled: {type(error).__name__}: {error}; it is given back, and "
            "recv_message().payload gives it raw") from error


cdef object malformed_object(str why):
    return SerializationError(
        f"the message is no pickled object ({why}); it is given back, and recv_message().payload gives it raw")
