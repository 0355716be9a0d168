"""The one compiled module: classes over the handles of the C++ core.

Policy (names, defaults, pickling) is in `dsline/channel.py`, the protocol in `cpp/src`. What keeps what alive:
memoryview or ndarray → Lease → Handle → C++ channel → mapping. A Lease never refers to the Python channel, so views
and channels form no cycle.
"""

cimport cython
cimport numpy as cnp
from cpython.buffer cimport (
    PyBUF_ANY_CONTIGUOUS, PyBUF_C_CONTIGUOUS, PyBUF_F_CONTIGUOUS, PyBUF_FORMAT, PyBUF_FULL_RO, PyBUF_ND,
    PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_IsContiguous, PyBuffer_Release, PyBuffer_ToContiguous,
    PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsLongLongAndOverflow
from cpython.memoryview cimport PyMemoryView_FromObject, PyMemoryView_GET_BUFFER
from cpython.ref cimport Py_INCREF, PyTypeObject
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from dsline._cpp.channel cimport (
    BackpressureRaise, CppBackpressure, CppChannel, CppChannelOptions, CppChannelStats, CppDeadLetter, CppDeath,
    AfterPublishKeep, AfterPublishLetGo, CppAfterPublish, CppLoan, CppOnDeath, CppOnStale, CppOpenMode, CppPlace,
    CppReceived, CppReport, CppStart, CppSubscribeOptions, Outcome,
    OutcomeClosed, OutcomeCorrupted, OutcomeDropped, OutcomeEmpty, OutcomeNotSynced, OutcomeOk, OutcomeTimedOut,
    channel_directory as cpp_channel_directory, kArrayMessage, kBytesMessage, kEndMessage,
    kGapMessage, kObjectMessage,
    list_channels as cpp_list_channels,
)
from dsline._cpp.crc32c cimport crc32c as cpp_crc32c
from dsline._cpp.error cimport kErrorCodeCount
from dsline._cpp.expression cimport (
    CppColumnView, CppElementType, CppExpressionOp, CppExpressionProgram, CppExpressionStep, CppRowsToKeep, byte,
    expression_backend as cpp_expression_backend,
)
from dsline._cpp.metadata cimport (
    CppMetadata, CppMetadataBuilder, CppTag, array_bytes, kPaddingEntry, parse_metadata, schema_hash,
)
from dsline._cpp.watch cimport CppWaited, CppWatch, SideMessage, SideRoom, most_waited, pretend_old_kernel, wait_for_any

import atexit as _atexit
import errno as _errno
import gc as _gc
import operator as _operator
import os as _os
import sys as _sys
import types as _types
from collections.abc import Mapping as _Mapping

import numpy as np

from dsline import dtypes as _dtypes
from dsline import interop as _interop
from dsline import objects as _objects
from dsline import pinned as _pinned
from dsline import report as _report
from dsline.errors import (
    BufferEmptyError, BufferFullError, BufferTooSmallError, ChannelClosedError, ChannelLayoutError, ChannelSystemError,
    CorruptedMessageError, DslineError, FeatureUnavailableError, InvalidArgumentError, LoanEndedError, MessageTooLargeError,
    SchemaMismatchError, SerializationError,
)

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(PyTypeObject* subtype, cnp.dtype descr, int nd, const cnp.npy_intp* dims,
                                const cnp.npy_intp* strides, void* data, int flags, object obj)
    int PyArray_SetBaseObject(cnp.ndarray arr, object obj) except -1
    int PyArray_CopyInto(cnp.ndarray dest, cnp.ndarray src) except -1
    int NPY_ARRAY_WRITEABLE
    int NPY_ARRAY_F_CONTIGUOUS

cdef int64_t kForever = INT64_MAX


cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t> now.tv_sec * 1000000000 + now.tv_nsec


cdef extern from *:
    """
    #include "dsline/build.hpp"
    """
    const char* crc32c_backend "dsline::crc32c_backend"() noexcept
    const char* DSLINE_VERSION
    const char* DSLINE_COMPILER
    const char* DSLINE_BUILDTYPE
    const char* DSLINE_OPTIMIZATION
    const char* DSLINE_SANITIZE

ERROR_CODE_COUNT = kErrorCodeCount
VERSION = DSLINE_VERSION.decode()


def build_config():
    """How the compiled module was built and what it chose at run time.

    Returns
    -------
    dict of str to str
        version, compiler, buildtype, optimization, sanitize, crc32c (sse4.2, armv8-crc or table).
    """
    return {
        "version": VERSION, "compiler": DSLINE_COMPILER.decode(), "buildtype": DSLINE_BUILDTYPE.decode(),
        "optimization": DSLINE_OPTIMIZATION.decode(), "sanitize": DSLINE_SANITIZE.decode(),
        "crc32c": crc32c_backend().decode(),
    }


cdef object DEFAULT = object()
DEFAULT_TIMEOUT = DEFAULT

# In the place of a timeout: as 0, but with WouldBlock, which costs nothing to make, in the place of the error.
cdef object TRY_ONCE = object()
TRY = TRY_ONCE


class WouldBlock(Exception):
    """There is nothing to receive, or no room, now."""


# A copy shorter than this costs less than letting go of the GIL and taking it again (60 to 90 ns).
cdef enum:
    NOGIL_COPY_BYTES = 65536

cdef object MaskedArray = np.ma.MaskedArray

# Kinds of a user tag, see dsline/metadata.hpp.
cdef enum:
    TAG_NONE = 0
    TAG_BOOL = 1
    TAG_INT = 2
    TAG_FLOAT = 3
    TAG_STR = 4
    TAG_BYTES = 5


cdef class Handle:
    """Owns one C++ channel handle; counts what this handle did. Shared by the channel object and its leases."""

    def __dealloc__(self):
        with nogil:
            self._channel.reset()

    def close(self):
        if self._channel:
            # A short send of another thread runs under the GIL, so none is between its slot and its message now.
            self._channel.get().refuse_calls()
            with nogil:
                self._channel.get().close()

    def group(self):
        """Name of the group that the handle receives for; empty for the default group."""
        return as_text(self._channel.get().group())

    def report(self):
        """The channel as it stands: a `dsline.report.ChannelReport`."""
        cdef CppReport found
        with nogil:
            found = self._channel.get().report()
        return _report.from_core(found)

    def blockers(self, bint for_room):
        """Who stands in the way of a sender (`for_room`) or a receiver of this handle now."""
        try:
            return _report.blockers(self.report(), for_room=for_room, group=self.group() or None)
        except DslineError:
            return []  # the channel cannot be looked at any more


def leave_all():
    """Close every handle of this process and release what they hold: before a process ends by os._exit in order."""
    _end_loans()
    with nogil:
        CppChannel.abandon_all()


cdef inline int check_timeout(object timeout) except -1:
    """Bad timeouts are refused also where nothing has to be waited for."""
    if timeout is DEFAULT or timeout is TRY_ONCE:
        return 0
    if timeout is not None and not (type(timeout) in (int, float) and timeout >= 0):
        deadline_of(timeout)
    return 0


cdef int64_t deadline_of(object timeout) except? -1:
    """CLOCK_MONOTONIC nanoseconds at which `timeout` (seconds, None: never) is over."""
    if timeout is None:
        return kForever
    cdef double seconds
    try:
        seconds = timeout
    except TypeError:
        raise TypeError(f"timeout is a {type(timeout).__name__}, must be a number of seconds or None") from None
    if not seconds >= 0:
        raise ValueError(f"timeout is {timeout!r}, must be 0 or more seconds, or None to wait for ever")
    if seconds > 9e9:
        return kForever
    return monotonic_ns() + <int64_t>(seconds * 1e9)


@cython.final
cdef class ArrayLayout:
    """How an array lies in a message: dtype, shape and order, with the metadata that says so. Immutable; cached."""

    @staticmethod
    cdef ArrayLayout make(object dtype, int ndim, const int64_t* shape, bint fortran, bytes metadata):
        cdef ArrayLayout self = ArrayLayout.__new__(ArrayLayout)
        cdef int i
        self.dtype = dtype
        self.names = dtype.names
        self.metadata = metadata
        self.format = _dtypes.buffer_format(dtype)
        self.ndim = ndim
        self.fortran = fortran
        self.itemsize = dtype.itemsize
        cdef Py_ssize_t step = self.itemsize
        for i in range(ndim):
            self.shape[i] = shape[i]
        for i in (range(ndim) if fortran else reversed(range(ndim))):
            self.strides[i] = step
            step *= self.shape[i]
        self.nbytes = step
        self.masked = self.names is not None and ndim == 0 and _interop.is_masked(dtype)
        return self

    cdef object array_at(self, void* data, object base, bint writable):
        """An ndarray over `data` that keeps `base` alive."""
        # The fields of a structured dtype can be renamed in place, so every array gets one of its own.
        cdef object dtype = self.dtype if self.names is None else self.dtype.newbyteorder("|")
        Py_INCREF(dtype)  # stolen by the call
        cdef object array = PyArray_NewFromDescr(
            <PyTypeObject*> cnp.ndarray, dtype, self.ndim, <const cnp.npy_intp*> self.shape, <const cnp.npy_intp*> self.strides,
            data, NPY_ARRAY_WRITEABLE if writable else 0, None)
        if base is not None:
            Py_INCREF(base)  # stolen by the call
            PyArray_SetBaseObject(array, base)
        return array

    cdef object new_array(self):
        """An ndarray of its own, with the contents left open."""
        cdef object dtype = self.dtype if self.names is None else self.dtype.newbyteorder("|")
        Py_INCREF(dtype)  # stolen by the call
        return PyArray_NewFromDescr(
            <PyTypeObject*> cnp.ndarray, dtype, self.ndim, <const cnp.npy_intp*> self.shape, NULL, NULL,
            NPY_ARRAY_F_CONTIGUOUS if self.fortran else 0, None)


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class Lease:
    """One received message. Exports its payload read-only; the slot is free again when the last export is gone.

    One without a handle exports a private copy, see pinned.pxi. In a forked child a lease of the parent stays readable and
    releases nothing.
    """

    cdef void _release(self) noexcept:
        cdef CppReceived message
        if not self._held:
            return
        self._held = False
        if self._handle is None:
            return  # a private copy
        if self._process == self._handle.process:
            self._handle.views -= 1
        if self._claimed:
            self._unclaim()
        if self._nack:
            message.slot = self._slot
            message.process = self._process
            message.attempts = self._attempts
            message.sequence = self._sequence
            message.group = self._group
            self._handle._channel.get().give_back(message)
        else:
            self._handle._channel.get().release(self._slot, self._process, self._group)

    cdef void _unclaim(self) noexcept:
        """From here on the lease is there for its views only."""
        if self._claimed and self._process == self._handle.process:
            self._handle.claims -= 1
        self._claimed = False

    def __dealloc__(self):
        self._release()

    def __getbuffer__(self, Py_buffer* view, int flags):
        if flags & PyBUF_WRITABLE:
            view.obj = None
            raise BufferError("a received message is read-only; recv_array(copy=True) or recv_bytes() give a copy")
        if not self._held:
            view.obj = None
            raise BufferError("the message has been released")
        cdef ArrayLayout layout = self._layout
        if layout is None or layout.format is None:
            PyBuffer_FillInfo(view, self, <void*> self._payload, self._nbytes, 1, flags)
        else:
            if layout.fortran and layout.ndim > 1:
                if ((flags & PyBUF_STRIDES) != PyBUF_STRIDES or (flags & PyBUF_C_CONTIGUOUS) == PyBUF_C_CONTIGUOUS):
                    view.obj = None
                    raise BufferError("the array is in Fortran order, and C order was asked for")
            elif ((flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS and layout.ndim > 1):
                view.obj = None
                raise BufferError("the array is in C order, and Fortran order was asked for")
            view.obj = self
            view.buf = <void*> self._payload
            view.len = self._nbytes
            view.readonly = 1
            view.itemsize = layout.itemsize
            view.format = PyBytes_AS_STRING(layout.format) if flags & PyBUF_FORMAT else NULL
            view.ndim = layout.ndim
            view.shape = NULL
            if flags & PyBUF_ND:
                view.shape = layout.shape
            view.strides = NULL
            if (flags & PyBUF_STRIDES) == PyBUF_STRIDES:
                view.strides = layout.strides
            view.suboffsets = NULL
            view.internal = NULL
        self._exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self._exports -= 1


@cython.final
@cython.no_gc
cdef class ArrayHold:
    """Base of an array over a lease whose exports are counted; not writable, so NumPy keeps the array read-only."""

    cdef Lease _lease

    def __cinit__(self, Lease lease):
        self._lease = lease
        lease._exports += 1

    def __dealloc__(self):
        self._lease._exports -= 1


cdef str what_it_holds(Lease lease):
    return f"a pickled object of {lease._nbytes} bytes" if lease._kind == kObjectMessage else f"{lease._nbytes} plain bytes"


cdef str how_to_receive(Lease lease):
    return "use recv_object()" if lease._kind == kObjectMessage else "use recv() or recv_bytes()"


cdef object array_over(Lease lease, object base):
    cdef ArrayLayout layout = lease._layout
    if layout is None:
        raise SchemaMismatchError(
            f"the message holds {what_it_holds(lease)}, not an array; {how_to_receive(lease)}, or send an ndarray")
    array = layout.array_at(<void*> lease._payload, base, False)
    return _interop.join_masked(array) if layout.masked else array


include "dlpack.pxi"


include "objects.pxi"
include "pinned.pxi"
include "batch.pxi"
include "shared_words.pxi"
include "counters.pxi"
include "expressions.pxi"


@cython.no_gc_clear  # for __dealloc__
cdef class Message:
    """A received message with everything that came with it.

    Attributes
    ----------
    sequence : int
        Position in the channel's order, gapless per channel.
    timestamp_ns : int
        Time of sending, nanoseconds since the epoch, as `time.time_ns()`.
    redelivered : bool
        True when an earlier holder died, or gave it back, before it was done.
    attempt : int
        Which delivery this is, from 1.

    Notes
    -----
    As a context manager it is released at the end of the block, and given back to the channel (redelivered, next
    attempt) when the block is left by an exception. Views that are still alive at the end keep the slot, unless the message
    came when the handle's `max_pinned` was used up: then they look at a copy, and the end of the message frees the slot.
    """

    def __dealloc__(self):
        if self._lease is not None:
            self._lease._unclaim()

    @property
    def redelivered(self):
        return self.attempt > 1

    cdef Lease _open(self):
        if self._lease is None or not self._lease._held:
            raise ValueError("the message has been released")
        return self._lease

    cdef Lease _shown(self):
        """What views look at: the slot, or a copy of it."""
        cdef Lease lease = self._open()
        return lease if self._copy is None else self._copy

    @property
    def meta(self):
        """The user's metadata: a dict, empty when none was sent."""
        if self._meta is None:
            self._meta = decode_meta(self._metadata)
        return self._meta

    @property
    def payload(self):
        """The payload as a read-only memoryview over the slot, without a copy."""
        return PyMemoryView_FromObject(self._shown())

    @property
    def nbytes(self):
        """Bytes of payload."""
        return self._open()._nbytes

    @property
    def _core_kind(self):
        """0 bytes, 1 array, 2 object; of a control frame 16 end, 17 marker, 18 watermark, 19 gap."""
        return self._open()._kind

    def array(self, *, copy=False):
        """Return the array that was sent.

        Parameters
        ----------
        copy : bool
            False gives a read-only view on the slot; True a writable array of its own.

        Returns
        -------
        numpy.ndarray

        Raises
        ------
        SchemaMismatchError
            Plain bytes were sent.
        ValueError
            The message has been released.
        """
        cdef Lease lease = self._shown()
        array = array_over(lease, ArrayHold(lease))
        return array.copy(order="K") if copy else array

    def __array__(self, dtype=None, copy=None):
        """The array that was sent, for `numpy.asarray`: a read-only view unless it has to be copied."""
        array = self.array()
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise ValueError(f"the message holds {_specs.dtype_text(array.dtype)}: {dtype} needs a copy")
            return array.astype(dtype)
        return array.copy(order="K") if copy else array

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """The array that was sent, as a DLPack capsule: for `torch.from_dlpack(message)` and the like.

        Parameters
        ----------
        stream : None or -1
        max_version : tuple of int, optional
            What the consumer understands. From (1, 0) on the capsule is marked read-only.
        dl_device : tuple of int, optional
            Only (1, 0), the memory of the host.
        copy : bool, optional
            True gives writable memory of the consumer's own; False and None a view on the slot.

        Raises
        ------
        BufferError
            Plain bytes were sent, DLPack has no such dtype, or the consumer asked for what cannot be.
        ValueError
            The message has been released.

        Notes
        -----
        Does not copy unless asked to. The slot is taken until the consumer's tensor is gone.
        """
        return dlpack_of(self._open(), stream, max_version, dl_device, copy)

    def __dlpack_device__(self):
        """(1, 0): the memory of the host."""
        return (DL_CPU, 0)

    def record(self):
        """Return the record that was sent: a dict with a read-only view per field, as `recv_record` does.

        Raises
        ------
        SchemaMismatchError
            Something else was sent.
        ValueError
            The message has been released.
        """
        cdef Lease lease = self._open()
        if lease._layout is None or fields_of(lease._layout) is None:
            raise SchemaMismatchError("the message holds no record; use payload or array()")
        return record_over(lease._layout, lease._payload, ArrayHold(lease))

    def object(self, *, copy=False):
        """Return what was sent: the object of `send_object`, or an array, or bytes.

        Unpickles, which runs code that the sender chose. As `recv_object` otherwise, but the message stays held.
        """
        return object_of(self._shown(), copy)

    cdef Lease _unviewed(self):
        """The lease, when it is held and nobody looks at it; None when it was released before."""
        cdef Lease lease = self._lease
        if lease is None or not lease._held:
            return None
        if lease._exports != 0:
            raise BufferError(
                f"{lease._exports} view(s) on this message are alive; drop them first, or let the last one release it")
        return lease

    def release(self):
        """Done with the message: give the slot back now; a second call does nothing.

        Raises
        ------
        BufferError
            Views on the payload are still alive.
        """
        cdef Lease lease = self._unviewed()
        if lease is not None:
            lease._nack = False
            lease._release()

    def ack(self):
        """Same as `release`."""
        self.release()

    def nack(self):
        """Not done with the message: give it back now, and it comes again with the next `attempt`, to this receiver or
        another of its group. Does nothing after a release.

        Raises
        ------
        BufferError
            Views on the payload are still alive.
        """
        cdef Lease lease = self._unviewed()
        if lease is not None:
            lease._nack = True
            lease._release()

    def __enter__(self):
        self._open()
        return self

    def __exit__(self, kind, value, traceback):
        cdef Lease lease = self._lease
        if lease is None or not lease._held:
            return
        # With views alive, the last of them does it: nobody may reuse what they show.
        lease._nack = kind is not None
        if lease._exports == 0:
            lease._release()
        lease._unclaim()
        self._lease = None

    def __repr__(self):
        return f"<dsline.{type(self).__name__} sequence={self.sequence} attempt={self.attempt}>"


cdef class DeadLetter(Message):
    """A message that was delivered as often as the channel allows and never released, taken from the dead letters.

    `release()`, `ack()` and the end of a ``with`` block end it. One that is merely let go of, given back by `nack()`, or
    whose ``with`` block is left by an exception, stays a dead letter.

    Attributes
    ----------
    group : str or None
        Group that it was for; None for the default group.
    last_pid : int
        Process that had it last; 0 where that is not known.
    reason : str
        What that process did: "died" or "given back".
    attempt : int
        How often it was delivered.
    """

    cdef readonly object group
    cdef readonly uint32_t last_pid
    cdef readonly str reason

    def revive(self):
        """Send it to its group again, with all but the first of its deliveries forgotten. Does nothing after a release.

        Raises
        ------
        BufferError
            Views on the payload are still alive.
        """
        cdef CppReceived message
        cdef Lease lease = self._unviewed()
        if lease is None:
            return
        lease._held = False
        lease._unclaim()
        if lease._process == lease._handle.process:
            lease._handle.views -= 1
        message.slot = lease._slot
        message.process = lease._process
        message.attempts = lease._attempts
        message.sequence = lease._sequence
        message.group = lease._group
        lease._handle._channel.get().revive(message)


cdef bytes encode_meta(object meta, ArrayLayout layout):
    """Metadata of a message: the layout of its array, then the user's tags."""
    cdef CppMetadataBuilder builder
    cdef vector[string] names
    if layout is not None:
        if layout.fortran:
            add_layout(builder, layout.dtype, layout.ndim, <const int64_t*> layout.shape, <const int64_t*> layout.strides)
        else:
            add_layout(builder, layout.dtype, layout.ndim, <const int64_t*> layout.shape, NULL)
    if not isinstance(meta, dict):
        raise TypeError(f"meta is a {type(meta).__name__}, must be a dict with str keys")
    for key, value in meta.items():
        if not isinstance(key, str):
            raise TypeError(f"meta has the key {key!r}, keys must be str")
        name = key.encode()
        if key == "columns":
            if isinstance(value, (str, bytes)):
                raise TypeError("meta['columns'] is a string, must be a sequence of str")
            for column in value:
                if not isinstance(column, str):
                    raise TypeError(f"meta['columns'] holds {column!r}, must be a sequence of str")
                names.push_back(column.encode())
            builder.add_columns(names)
        elif key == "encoding":
            if not isinstance(value, str):
                raise TypeError(f"meta['encoding'] is a {type(value).__name__}, must be str")
            builder.add_encoding(value.encode())
        elif value is None:
            builder.add_tag_none(name)
        elif isinstance(value, (bool, np.bool_)):
            builder.add_tag_bool(name, bool(value))
        elif isinstance(value, (int, np.integer)):
            if not -(1 << 63) <= value < 1 << 63:
                raise ValueError(f"meta[{key!r}] is {value}, must fit into a signed 64-bit integer")
            builder.add_tag_int(name, int(value))
        elif isinstance(value, (float, np.floating)):
            builder.add_tag_float(name, float(value))
        elif isinstance(value, str):
            builder.add_tag_str(name, value.encode())
        elif isinstance(value, (bytes, bytearray)):
            builder.add_tag_bytes(name, bytes(value))
        else:
            raise TypeError(
                f"meta[{key!r}] is a {type(value).__name__}, must be str, bytes, int, float, bool or None")
    return as_bytes(builder.bytes())


cdef bytes as_bytes(const string& text):
    return PyBytes_FromStringAndSize(text.data(), text.size())


cdef int add_layout(CppMetadataBuilder& builder, object dtype, int ndim, const int64_t* shape,
                    const int64_t* strides) except -1:
    builder.add_dtype(_dtypes.encode_dtype(dtype))
    builder.add_shape(shape, ndim)
    if strides != NULL:
        builder.add_strides(strides, ndim)
    return 0


cdef dict decode_meta(bytes metadata):
    cdef CppMetadata parsed
    cdef string why
    cdef CppTag tag
    if not metadata:
        return {}
    if not parse_metadata(PyBytes_AS_STRING(metadata), PyBytes_GET_SIZE(metadata), parsed, why):
        raise CorruptedMessageError(f"the metadata of the message is malformed: {why.decode()}")
    meta = {}
    if parsed.has_columns:
        meta["columns"] = [name.decode() for name in parsed.columns]
    if parsed.has_encoding:
        meta["encoding"] = parsed.encoding.decode()
    for tag in parsed.tags:
        key = tag.key.decode()
        if tag.kind == TAG_BOOL:
            meta[key] = tag.i != 0
        elif tag.kind == TAG_INT:
            meta[key] = tag.i
        elif tag.kind == TAG_FLOAT:
            meta[key] = tag.f
        elif tag.kind == TAG_STR:
            meta[key] = tag.s.decode()
        elif tag.kind == TAG_BYTES:
            meta[key] = as_bytes(tag.s)
        else:
            meta[key] = None
    return meta


include "schema.pxi"


cdef inline int require_open(Receiver receiver) except -1:
    if receiver._cpp == NULL:
        raise ChannelClosedError("the channel was never opened")
    return 0


cdef class Receiver:
    """Base of channels and subscribers: the calls that receive, wait and look."""

    cdef int _take_over(self, Handle handle, object timeout) except -1:
        """Makes this the object of an open handle."""
        self._handle = handle
        self._cpp = handle._channel.get()
        self._receives = self._cpp.can_receive()
        self._synced = self._cpp.is_synced()
        self._timeout = timeout
        self._budget = _pinned.AUTO
        # Two, since a loop holds the message before while it takes the next one.
        self._auto_budget = max(2, <int64_t> self._cpp.capacity() * 3 // 4)
        cdef bytes encoded = as_bytes(self._cpp.schema())
        if encoded:
            try:
                self._schema = Schema.decode(encoded)
            except (TypeError, ValueError) as error:
                raise ChannelLayoutError(
                    _errno.EINVAL, f"channel '{self._label()}' has a spec that cannot be read: {error}") from None
            self._received_layout = self._checked_layout = self._schema.layout
        return 0

    def _core_set_budget(self, int64_t budget):
        """How many messages views may keep in their slots; -1: the default for the capacity."""
        self._budget = budget

    def _join(self, Receiver parent, str group, int start, int on_death, bint durable, timeout):
        """Become a member of a group, by a handle of its own."""
        cdef CppSubscribeOptions given
        cdef Handle handle = Handle.__new__(Handle)
        require_open(parent)
        deadline_of(timeout)
        given.group = group.encode()
        given.start = <CppStart> start
        given.on_death = <CppOnDeath> on_death
        given.durable = durable
        with nogil:
            handle._channel = parent._cpp.subscribe(given)
        self._take_over(handle, timeout)

    # --- receiving -----------------------------------------------------------------------------------------------

    def recv(self, *, timeout=DEFAULT):
        """Receive the next message without a copy.

        Parameters
        ----------
        timeout : float or None, optional
            Seconds to wait: None for ever, 0 not at all. The handle's by default.

        Returns
        -------
        memoryview
            Read-only, over the slot. With format and shape for an array whose dtype the buffer protocol can express,
            of bytes otherwise. The slot is taken until the last view on it is gone. When views of this handle hold as many
            messages as `max_pinned` allows, over a private copy, and the slot is free at once.

        Raises
        ------
        BufferEmptyError
            No message came in time.
        ChannelClosedError
            This handle is closed, or the channel is shut down and drained.
        CorruptedMessageError
            The message failed its check; the next one can be received.

        Notes
        -----
        Does not copy, unless `max_pinned` is used up (counted in ``stats().forced_copies``, with one PinnedViewsWarning per
        handle; where that is an error, the message stays in the channel). Releases the GIL while it waits, and while it
        copies 64 KiB and more.
        """
        cdef CppReceived message
        self._receive(message, timeout)
        return PyMemoryView_FromObject(shown(self, self._lease(message), message))

    def recv_nowait(self):
        """Same as `recv` with timeout=0."""
        cdef CppReceived message
        self._receive(message, 0)
        return PyMemoryView_FromObject(shown(self, self._lease(message), message))

    def recv_array(self, *, timeout=DEFAULT, copy=False, out=None):
        """Receive the next message as the array that was sent.

        Parameters
        ----------
        timeout : float or None, optional
            As for `recv`.
        copy : bool
            False gives a read-only view on the slot (no copy; past `max_pinned` a read-only copy, as `recv`); True a writable
            array of its own (one copy).
        out : numpy.ndarray, optional
            Filled with the array (one copy) and returned; the slot is free at once. Writable, of the message's dtype and
            shape, with any strides.

        Returns
        -------
        numpy.ndarray
            With the dtype, shape and order that were sent; a masked array where one was sent; `out` where it is given. Of
            a record, the structure without dimensions: see `recv_record`.

        Raises
        ------
        SchemaMismatchError
            Plain bytes were sent, or an array of another dtype or shape than `out` has. The message stays in the channel.
        ValueError
            `out` cannot be written. Nothing was taken.

        Notes
        -----
        Releases the GIL while it waits, and while it copies 64 KiB and more into `out`.
        """
        if out is not None:
            if not cnp.PyArray_Check(out):
                raise TypeError(f"out is a {type(out).__name__}, must be a numpy.ndarray")
            if not cnp.PyArray_ISWRITEABLE(out):
                raise ValueError("out is read-only, must be an array that can be written")
        cdef CppReceived message
        self._receive(message, timeout)
        cdef Lease lease = self._lease(message)
        if lease._layout is None:
            self._undo(lease, message)
        if out is not None:
            self._copy_to(out, lease, message)
            return out
        if not copy:
            lease = shown(self, lease, message)
            return array_over(lease, lease)
        array = array_over(lease, lease)
        try:
            return array.copy(order="K")
        except:
            lease._nack = True  # the message comes again
            raise

    def recv_record(self, *, timeout=DEFAULT):
        """Receive the next message as the record that was sent.

        Parameters
        ----------
        timeout : float or None, optional
            As for `recv`.

        Returns
        -------
        dict of str to numpy.ndarray
            A read-only view per field; fields without dimensions are arrays of shape (). The slot is taken until the last
            of them is gone.

        Raises
        ------
        SchemaMismatchError
            Something else was sent. The message stays in the channel.

        Notes
        -----
        Does not copy. Releases the GIL while it waits.
        """
        cdef CppReceived message
        self._receive(message, timeout)
        cdef Lease lease = self._lease(message)
        if lease._layout is None or fields_of(lease._layout) is None:
            kind = what_it_holds(lease) if lease._layout is None else "an array that is no record"
            self._untake(lease, message)
            raise SchemaMismatchError(
                f"the message holds {kind}; it stays in the channel: use recv() or recv_array(), or send a dict on a channel "
                "whose spec is a dict")
        lease = shown(self, lease, message)
        return record_over(lease._layout, lease._payload, lease)

    def recv_object(self, *, timeout=DEFAULT, copy=False):
        """Receive the next message as the object that was sent. Unpickles it, which runs code that the sender chose.

        Parameters
        ----------
        timeout : float or None, optional
            As for `recv`.
        copy : bool
            False: arrays in the object are read-only views on the slot, which is taken until the last of them is gone (those
            of less than 1 KiB are copies; past `max_pinned` all are, read-only, as of `recv`). True: they are writable copies,
            and the slot is free at once.

        Returns
        -------
        object
            What `send_object` was given; an array or bytes where `send` was used.

        Raises
        ------
        SerializationError
            Unpickling failed. The message is given back: it comes again with the next `attempt`, and can be received raw by
            `recv_message`; after `max_deliveries` of them it is among the `dead_letters`.
        BufferEmptyError, ChannelClosedError, CorruptedMessageError
            As for `recv`.
        """
        cdef CppReceived message
        self._receive(message, timeout)
        cdef Lease lease = self._lease(message)
        cdef Lease source = lease
        try:
            if not copy and shows_slot(lease):
                if must_copy(self):
                    source = copied(self, lease, message, True)
                else:
                    note_site(self)
            received = object_of(source, copy)
            if source is not lease:
                lease._release()
            return received
        except:
            # Also when it is an interrupt: nobody has got the object. Frames of the traceback may still hold views.
            lease._nack = True
            if lease._exports == 0:
                lease._release()
            raise

    def recv_bytes(self, *, timeout=DEFAULT):
        """Receive the next message as bytes of its own (one copy). Parameters and errors as for `recv`."""
        cdef CppReceived message
        self._receive_raw(message, timeout)
        cdef bytes copy
        try:
            copy = PyBytes_FromStringAndSize(<const char*> message.payload, message.payload_bytes)
        except:
            self._cpp.put_back(message)
            raise
        self._cpp.release(message.slot, message.process, message.group)
        self._handle.received += 1
        self._handle.bytes_received += message.payload_bytes
        return copy

    def recv_into(self, buffer, *, timeout=DEFAULT):
        """Receive the next message into a buffer of the caller (one copy).

        Parameters
        ----------
        buffer : writable, C-contiguous buffer
            At least as large as the message.
        timeout : float or None, optional
            As for `recv`.

        Returns
        -------
        int
            Bytes written.

        Raises
        ------
        BufferTooSmallError
            The message is larger; it stays in the channel and comes next.
        """
        cdef CppReceived message
        cdef Py_buffer view
        cdef uint64_t room
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS)
        try:
            self._receive_raw(message, timeout)
            room = view.len
            if message.payload_bytes > room:
                self._cpp.put_back(message)
                raise BufferTooSmallError(
                    f"the message has {message.payload_bytes} bytes, the buffer {room}; the message stays in the channel: "
                    "give a larger buffer, or use recv()")
            if message.payload_bytes < NOGIL_COPY_BYTES:
                memcpy(view.buf, message.payload, message.payload_bytes)
            else:
                with nogil:
                    memcpy(view.buf, message.payload, message.payload_bytes)
            self._cpp.release(message.slot, message.process, message.group)
        finally:
            PyBuffer_Release(&view)
        self._handle.received += 1
        self._handle.bytes_received += message.payload_bytes
        return message.payload_bytes

    def recv_with_seq(self, *, timeout=DEFAULT):
        """Receive the next message with its sequence number: (int, memoryview). As `recv` otherwise."""
        cdef CppReceived message
        self._receive(message, timeout)
        return message.sequence, PyMemoryView_FromObject(shown(self, self._lease(message), message))

    def recv_message(self, *, timeout=DEFAULT):
        """Receive the next message with all that came with it: a `Message`. As `recv` otherwise.

        Notes
        -----
        This call alone also gives out the control frames that a pipeline sends, as messages whose payload is bytes. The other
        receiving calls release one that they meet and go on to the next message, with the whole `timeout` again; the frame
        that says that a stream has ended raises ChannelClosedError there, once, and so ends an iteration.
        """
        cdef CppReceived message
        self._receive_any(message, timeout)
        return self._message(message)

    cdef Message _message(self, CppReceived& message):
        cdef Message out = Message.__new__(Message)
        self._fill(out, message)
        if must_copy(self):
            # The message keeps its slot until it is released or given back; only what is looked at is a copy.
            out._copy = copied(self, out._lease, message, True)
        else:
            note_site(self)
        out._lease._claimed = True
        self._handle.claims += 1
        return out

    def recv_message_nowait(self):
        """Same as `recv_message` with timeout=0."""
        return self.recv_message(timeout=0)

    def _core_recv_kept(self, timeout):
        """`recv_message`, of a message that goes back to the channel when it is let go of without a release."""
        cdef Message out = self.recv_message(timeout=timeout)
        out._lease._nack = True
        return out

    def recv_many(self, Py_ssize_t n, *, timeout=DEFAULT):
        """Receive up to `n` messages: waits for the first, then takes what is there.

        Parameters
        ----------
        n : int
            At most so many, at least 1.
        timeout : float or None, optional
            As for `recv`, for the first one.

        Returns
        -------
        list of memoryview
            1 to `n` of them. After a damaged message the list ends, and the next receiving call raises its error. Those past
            `max_pinned` are copies, as of `recv`; views that the list itself holds are no reason for a warning.
        """
        cdef CppReceived message
        cdef Outcome outcome
        cdef Lease lease
        if n < 1:
            raise ValueError(f"recv_many was asked for {n} messages, must be 1 or more")
        views = [self.recv(timeout=timeout)]
        while len(views) < n:
            outcome = self._cpp.try_recv(message)
            if outcome == OutcomeCorrupted:
                self._deferred = self._corrupted_error(message)
            if outcome != OutcomeOk:
                break
            if message.kind >= kEndMessage:
                self._cpp.put_back(message)
                break
            try:
                lease = self._lease(message)
                if must_copy(self):
                    lease = detached(self, lease, message, False)
                views.append(PyMemoryView_FromObject(lease))
            except (CorruptedMessageError, MemoryError) as error:
                self._deferred = error
                break
        return views

    def recv_batch(self, Py_ssize_t n, *, timeout=DEFAULT, out=None):
        """Receive `n` arrays of one dtype and shape into the rows of one array.

        Parameters
        ----------
        n : int
            Rows at most, at least 1.
        timeout : float or None, optional
            Seconds for the whole batch: None waits until it is full, 0 takes what is there. The handle's by default.
        out : numpy.ndarray, optional
            A writable array of shape (n, *shape) and of the dtype to be filled instead of a new one.

        Returns
        -------
        numpy.ndarray
            Writable, of shape (k, *shape) with 1 <= k <= `n`, the first rows of `out` if that was given. Fewer than `n` when
            the time was up, the channel ended, or the next message is of another kind, dtype or shape: that one stays in the
            channel and comes next. A damaged message ends the batch, and the next receiving call raises its error.

        Raises
        ------
        BufferEmptyError, ChannelClosedError, CorruptedMessageError
            As for `recv`, when there is no first row.
        SchemaMismatchError
            The first message is no array, or does not fit `out`. It stays in the channel.

        Notes
        -----
        Copies each message once, from its slot to its row, and frees the slot at once, so `n` may exceed the capacity.
        Releases the GIL while it waits, and while it copies a message of 64 KiB and more. What a call has taken before an
        exception ends it (Ctrl-C, a callback) is what the next `recv_batch` of this handle begins with.
        """
        return receive_batch(self, n, timeout, out)

    def __iter__(self):
        """Iterate over the messages, as `recv` gives them, until the channel is closed or shut down.

        The loop variable holds the last view while the loop waits for the next message, so a channel that several
        loops share needs more slots than there are loops (or `del view` at the end of the body).
        """
        return self

    def __next__(self):
        try:
            return self.recv()
        except ChannelClosedError:
            raise StopIteration from None

    cdef int _receive(self, CppReceived& message, object timeout) except -1:
        """Takes the next message that is no control frame, or raises."""
        self._receive_any(message, timeout)
        while message.kind >= kEndMessage:
            self._cpp.release(message.slot, message.process, message.group)
            if message.kind == kEndMessage:
                raise ChannelClosedError(
                    f"the stream in channel '{self._label()}' has ended: its sender has sent its end; what others send can "
                    "still be received")
            self._receive_any(message, timeout)
        return 0

    cdef int _receive_any(self, CppReceived& message, object timeout) except -1:
        """Takes the next message, or raises."""
        cdef Outcome outcome
        cdef int64_t deadline
        cdef bint spin = True, last = False
        if not self._receives:
            self._refuse_receiving()
        check_timeout(timeout)
        if self._deferred is not None:
            error, self._deferred = self._deferred, None
            raise error
        outcome = self._cpp.try_recv(message)
        if outcome == OutcomeOk:
            return 0
        if timeout is DEFAULT:
            timeout = self._timeout
        deadline = -1
        while True:
            if outcome == OutcomeClosed:
                raise self._closed_error()
            if outcome == OutcomeCorrupted:
                raise self._corrupted_error(message)
            if deadline == -1:
                if self._watch is not None:
                    self._watch._cpp.get().arm_again()
                if timeout is TRY_ONCE:
                    self._between_slices()
                    raise WouldBlock
                deadline = deadline_of(timeout)
            if last or (timeout is not None and timeout == 0):
                raise self._empty_error(timeout)
            with nogil:
                outcome = self._cpp.wait_for_message(deadline, spin)
            spin = outcome == OutcomeOk
            last = outcome == OutcomeTimedOut
            self._between_slices()
            outcome = self._cpp.try_recv(message)
            if outcome == OutcomeOk:
                return 0

    cdef int _receive_raw(self, CppReceived& message, object timeout) except -1:
        """Takes the next message for its bytes alone."""
        self._receive(message, timeout)
        if self._schema is not None:
            try:
                self._check_schema(self._layout_of(message) if message.kind == kArrayMessage else None, message)
            except:
                self._cpp.release(message.slot, message.process, message.group)
                raise
        return 0

    cdef int _check_schema(self, ArrayLayout layout, CppReceived& message) except -1:
        """Refuses a message that is not what the channel's spec says, as only a peer that ignores it can send it."""
        if layout is not None and layout is self._checked_layout and message.schema_hash == layout.hash:
            return 0
        if not self._schema.fits(layout) or hash_of(layout) != message.schema_hash:
            raise self._malformed_error(message, f"it is not what the spec of the channel says, {self._schema.text()}")
        self._checked_layout = layout
        return 0

    cdef int _refuse_receiving(self) except -1:
        require_open(self)
        raise FeatureUnavailableError(
            f"channel '{self._label()}' is a Broadcast: it has no receivers but its subscribers; receive by "
            "subscribe(group).recv()")

    cdef int _between_slices(self) except -1:
        """Signals, and callbacks for the dead. Raises what they raise; nothing has been taken."""
        try:
            PyErr_CheckSignals()
            if self._callbacks is not None and self._cpp.deaths() != self._deaths_told:
                self._tell_of_deaths()
        except:
            self._cpp.pass_on_wake()
            raise
        return 0

    cdef int _fill(self, Message out, CppReceived& message) except -1:
        out._lease = self._lease(message)
        out._metadata = PyBytes_FromStringAndSize(<const char*> message.meta(), message.meta_bytes)
        out.sequence = message.sequence
        out.timestamp_ns = message.timestamp_ns
        out.attempt = message.attempts + 1
        return 0

    cdef Lease _lease(self, CppReceived& message):
        cdef Lease lease
        try:
            lease = Lease.__new__(Lease)
        except:
            self._cpp.put_back(message)
            raise
        lease._attempts = message.attempts
        lease._sequence = message.sequence
        lease._nack = False
        lease._handle = self._handle
        lease._payload = message.payload
        lease._nbytes = message.payload_bytes
        lease._slot = message.slot
        lease._process = message.process
        lease._group = message.group
        lease._held = True
        if message.process != self._handle.process:  # views of the parent of a forked child pin nothing here
            self._handle.process = message.process
            self._handle.views = 0
            self._handle.claims = 0
        self._handle.views += 1
        lease._kind = message.kind
        if message.kind == kArrayMessage:
            lease._layout = self._layout_of(message)
        if self._schema is not None and message.kind < kEndMessage:
            self._check_schema(lease._layout, message)
        self._handle.received += 1
        self._handle.bytes_received += message.payload_bytes
        return lease

    cdef ArrayLayout _layout_of(self, CppReceived& message):
        """The layout that a received array says it has, checked; the last one is remembered."""
        cdef ArrayLayout layout = self._received_layout
        cdef CppMetadata parsed
        cdef string why
        cdef uint64_t size = 0
        cdef bytes metadata
        if (layout is not None and PyBytes_GET_SIZE(layout.metadata) == message.meta_bytes
                and <uint64_t> layout.nbytes == message.payload_bytes
                and memcmp(PyBytes_AS_STRING(layout.metadata), message.meta(), message.meta_bytes) == 0):
            return layout
        if (not parse_metadata(message.meta(), message.meta_bytes, parsed, why) or parsed.dtype_code.empty()
                or not parsed.has_shape or not array_bytes(parsed, size) or size != message.payload_bytes):
            if why.empty():
                why = b"shape and dtype do not make up the payload"
            raise self._malformed_error(message, why.decode())
        try:
            dtype = _dtypes.decode_dtype(as_bytes(parsed.dtype_code))
        except (TypeError, ValueError) as error:
            raise self._malformed_error(message, str(error)) from None
        metadata = PyBytes_FromStringAndSize(<const char*> message.meta(), message.meta_bytes)
        layout = ArrayLayout.make(dtype, <int> parsed.shape.size(), parsed.shape.data(), parsed.fortran, metadata)
        self._received_layout = layout
        return layout

    cdef int _undo(self, Lease lease, CppReceived& message) except -1:
        """Puts a message back that is no array."""
        self._untake(lease, message)
        raise SchemaMismatchError(
            f"the message holds {what_it_holds(lease)}, not an array; it stays in the channel: {how_to_receive(lease)}, or "
            "send an ndarray")

    cdef int _untake(self, Lease lease, CppReceived& message) noexcept:
        """Puts a message back that nobody has seen; it comes next, as if it had not been taken."""
        lease._held = False
        self._handle.views -= 1
        self._handle.received -= 1
        self._handle.bytes_received -= message.payload_bytes
        self._cpp.put_back(message)
        return 0

    cdef int _copy_to(self, object array, Lease lease, CppReceived& message) except -1:
        """Fills an array of the caller with a message, and releases it."""
        cdef cnp.ndarray target = array
        cdef ArrayLayout layout = lease._layout
        cdef const void* payload = lease._payload
        cdef void* data = cnp.PyArray_DATA(target)
        cdef size_t size = layout.nbytes
        cdef object dtype = target.dtype
        if (cnp.PyArray_NDIM(target) != layout.ndim
                or memcmp(layout.shape, cnp.PyArray_DIMS(target), layout.ndim * sizeof(Py_ssize_t)) != 0
                or (dtype is not layout.dtype and dtype != layout.dtype)):
            self._untake(lease, message)
            sent = tuple([layout.shape[i] for i in range(layout.ndim)])
            raise SchemaMismatchError(
                f"the message holds {_specs.dtype_text(layout.dtype)} {sent}, out is {_specs.array_text(array)}; the message "
                "stays in the channel: give an array of its dtype and shape")
        try:
            if not cnp.PyArray_IS_F_CONTIGUOUS(target) if layout.fortran else not cnp.PyArray_IS_C_CONTIGUOUS(target):
                PyArray_CopyInto(target, array_over(lease, lease))
            elif size < NOGIL_COPY_BYTES:
                memcpy(data, payload, size)
            else:
                with nogil:
                    memcpy(data, payload, size)
        except:
            lease._nack = True  # the message comes again
            raise
        return 0

    def _core_recv_encoded(self, str encoding, timeout):
        """Receive the next message if it carries this encoding, as a `Message`; else it stays."""
        cdef CppReceived message
        cdef Message out = Message.__new__(Message)
        self._receive(message, timeout)
        self._fill(out, message)
        try:
            found = out.meta.get("encoding")
        except CorruptedMessageError:
            raise
        except:
            self._untake(out._lease, message)
            raise
        if found != encoding or message.kind != kBytesMessage:
            self._untake(out._lease, message)
            raise SchemaMismatchError(
                f"the message is not marked with encoding {encoding!r}; it stays in the channel: use recv(), recv_array() or "
                "recv_message()")
        return out

    # --- how far the channel is, see Channel in channel.hpp --------------------------------------------------------

    def _core_anyone_entering(self):
        """Whether another handle has committed a message that may have no place in the order yet."""
        require_open(self)
        return self._cpp.anyone_entering()

    def _core_end_of_order(self):
        """Sequence of the next message to be sent; exact while nobody sends."""
        require_open(self)
        return self._cpp.end_of_order()

    def _core_is_outstanding(self, uint64_t sequence):
        """Whether the group has not finished with a message, or it is not sent yet."""
        require_open(self)
        return self._cpp.is_outstanding(sequence)

    def _core_anything_before(self, uint64_t sequence):
        """Whether the group has not finished with some message before `sequence`."""
        require_open(self)
        return self._cpp.anything_outstanding_before(sequence)

    def _core_take_between(self, uint64_t first, uint64_t last):
        """Take the oldest message that nobody holds with first <= sequence < last, as a `Message`; None where there is none.

        For who waits for the turn of another message: nobody else may be free to take that one. It goes back to the channel
        when it is let go of without a release. Never waits.
        """
        cdef CppReceived message
        cdef Outcome outcome
        if not self._receives:
            self._refuse_receiving()
        outcome = self._cpp.try_take_between(first, last, message)
        if outcome == OutcomeEmpty:
            return None
        if outcome == OutcomeClosed:
            raise self._closed_error()
        if outcome == OutcomeCorrupted:
            raise self._corrupted_error(message)
        cdef Message out = self._message(message)
        out._lease._nack = True
        return out

    def _core_first_available(self):
        """Sequence of the oldest message that the group could take now; the end of the order where there is none."""
        require_open(self)
        return self._cpp.first_available()

    # --- dead letters, the newest message ------------------------------------------------------------------------

    def _core_dead_letter(self):
        """Take the oldest dead letter; None when there is none."""
        cdef CppReceived message
        cdef CppDeadLetter why
        cdef Outcome outcome
        require_open(self)
        if self._cpp.is_closed():
            raise self._closed_error()
        outcome = self._cpp.try_take_dead_letter(message, why)
        if outcome == OutcomeCorrupted:
            raise self._corrupted_error(message)
        if outcome != OutcomeOk:
            return None
        cdef DeadLetter out = DeadLetter.__new__(DeadLetter)
        self._fill(out, message)
        out._lease._nack = True  # it stays one unless somebody says that he is done with it
        out.attempt = message.attempts
        out._lease._claimed = True
        self._handle.claims += 1
        out.group = as_text(why.group) or None
        out.last_pid = why.last_pid
        out.reason = "died" if why.last_holder_died else "given back"
        return out

    def _core_latest(self, newer_than, bint with_meta):
        """(value, sequence, timestamp_ns, meta) of the newest message of the history, in memory of its own.

        None where there is none, or none behind sequence `newer_than` (None: any).
        """
        cdef CppReceived message
        cdef Outcome outcome
        cdef bint whatever = newer_than is None
        cdef uint64_t sequence = 0 if whatever else newer_than
        require_open(self)
        while True:
            if self._cpp.is_closed():
                raise self._closed_error()
            outcome = self._cpp.try_read_latest(whatever, sequence, message)
            if outcome == OutcomeCorrupted:
                raise self._corrupted_error(message)
            if outcome != OutcomeOk:
                return None
            try:
                value = self._copy_of(message)
                meta = None
                if with_meta:
                    meta = decode_meta(PyBytes_FromStringAndSize(<const char*> message.meta(), message.meta_bytes))
            except CorruptedMessageError:
                if self._cpp.is_unchanged(message):
                    raise
            else:
                if self._cpp.is_unchanged(message):
                    return value, message.sequence, message.timestamp_ns, meta
            # It was overwritten while it was read, so there is a newer one.
            PyErr_CheckSignals()

    def _core_latest_sequence(self):
        """Sequence of the newest message of the history; None where there is none."""
        cdef CppReceived message
        require_open(self)
        if self._cpp.is_closed():
            raise self._closed_error()
        return message.sequence if self._cpp.try_read_latest(True, 0, message) == OutcomeOk else None

    def _core_latest_place(self):
        """(offset in the shared bytes, length, metadata) of the newest message of the history; None where there is none."""
        cdef CppReceived message
        require_open(self)
        if self._cpp.is_closed():
            raise self._closed_error()
        if self._cpp.try_read_latest(True, 0, message) != OutcomeOk:
            return None
        meta = decode_meta(PyBytes_FromStringAndSize(<const char*> message.meta(), message.meta_bytes))
        return self._cpp.payload_offset(message), message.payload_bytes, meta

    cdef object _copy_of(self, CppReceived& message):
        cdef ArrayLayout layout
        cdef char* target
        cdef object value
        if message.kind == kArrayMessage:
            layout = self._layout_of(message)
            if self._schema is not None:
                self._check_schema(layout, message)
            if layout.nbytes == 0:
                return layout.array_at(<void*> message.payload, None, False).copy(order="K")
            value = layout.new_array()
            target = <char*> cnp.PyArray_DATA(value)
        else:
            if self._schema is not None:
                self._check_schema(None, message)
            value = PyBytes_FromStringAndSize(NULL, message.payload_bytes)
            target = PyBytes_AS_STRING(value)
        if message.payload_bytes < NOGIL_COPY_BYTES:
            memcpy(target, message.payload, message.payload_bytes)
        else:
            with nogil:
                memcpy(target, message.payload, message.payload_bytes)
        if message.kind == kArrayMessage and layout.masked:
            return _interop.join_masked(value)
        return value

    def _core_wait_newer(self, newer_than, timeout):
        """As `_core_latest`, and waits for one."""
        cdef Outcome outcome
        cdef bint spin = True, last = False
        cdef bint whatever = newer_than is None
        cdef uint64_t sequence = 0 if whatever else newer_than
        cdef int64_t deadline
        if timeout is DEFAULT:
            timeout = self._timeout
        deadline = deadline_of(timeout)
        while True:
            found = self._core_latest(newer_than, False)
            if found is not None:
                return found
            if self._cpp.is_shut_down():
                raise self._closed_error()
            if last or (timeout is not None and timeout == 0):
                raise self._empty_error(timeout)
            with nogil:
                outcome = self._cpp.wait_for_newer(whatever, sequence, deadline, spin)
            spin = outcome == OutcomeOk
            last = outcome == OutcomeTimedOut
            self._between_slices()

    # --- the dead ------------------------------------------------------------------------------------------------

    def on_peer_death(self, callback):
        """Call back when a process has died with a handle of this channel open.

        Parameters
        ----------
        callback : callable
            Gets a `PeerDeath`, once for each handle that dies from now on. Deaths of which more than 32 happen between two
            looks are left out.

        Returns
        -------
        callable
            Without arguments: ends it.

        Notes
        -----
        Called by this handle's own calls, in the thread that made them: by those that wait, between two slices of waiting
        (50 ms), and by `check_peers`. What the callback raises ends that call; no message is lost by it.
        """
        require_open(self)
        if not callable(callback):
            raise TypeError(f"callback is a {type(callback).__name__}, must be callable")
        entry = [callback, self._cpp.deaths()]
        if self._callbacks is None:
            self._deaths_told = entry[1]
        self._callbacks = [*(self._callbacks or ()), entry]

        def unregister():
            left = [other for other in self._callbacks or () if other is not entry]
            self._callbacks = left or None

        return unregister

    cdef int _tell_of_deaths(self) except -1:
        cdef CppDeath death
        for entry in self._callbacks or ():
            for death in self._cpp.deaths_since(entry[1]):
                if death.number >= entry[1]:  # else another thread has told it meanwhile
                    entry[1] = death.number + 1
                    entry[0](_report.death_from_core(death))
        if self._callbacks is not None:
            self._deaths_told = min([entry[1] for entry in self._callbacks])
        return 0

    def check_peers(self):
        """Look after the dead now, instead of at the next wait: what they held is free again, or is delivered to others.

        Returns
        -------
        int
            How many handles were found dead, by this call or by others at the same time.
        """
        cdef uint64_t before
        require_open(self)
        if self._cpp.is_closed():
            raise self._closed_error()
        before = self._cpp.deaths()
        with nogil:
            self._cpp.check_peers()
        if self._callbacks is not None:
            self._tell_of_deaths()
        return self._cpp.deaths() - before

    # --- errors --------------------------------------------------------------------------------------------------

    def _label(self):
        require_open(self)
        return self._cpp.label().decode()

    def _closed_error(self):
        if self._cpp.is_closed():
            return ChannelClosedError(f"this handle of channel '{self._label()}' is closed; open another one")
        if self._cpp.is_shut_down():
            return ChannelClosedError(f"channel '{self._label()}' is shut down; nothing more can be sent or received")
        return ChannelClosedError(
            f"the group that this handle of channel '{self._label()}' received for has been removed; subscribe again")

    def _empty_error(self, timeout):
        error = BufferEmptyError(
            f"no message in channel '{self._label()}' within {timeout or 0:g} s; timeout=None waits for ever")
        error._where = (self._handle, False)
        return error

    cdef object _corrupted_error(self, CppReceived& message):
        error = CorruptedMessageError(
            f"message {message.sequence} of channel '{self._label()}' is damaged ({message.fault.decode()}); it is dropped and "
            "counted in stats().corrupted, the next one can be received")
        error.sequence = message.sequence
        return error

    cdef object _malformed_error(self, CppReceived& message, str why):
        error = CorruptedMessageError(
            f"message {message.sequence} of channel '{self._label()}' is damaged ({why}); it is dropped, the next one can be "
            "received")
        error.sequence = message.sequence
        return error

    # --- the rest ------------------------------------------------------------------------------------------------

    def close(self):
        """End this handle; a second call does nothing.

        Views that it gave out stay valid, and their messages stay held, until they are gone. The last handle of a named
        channel removes the name if the channel is empty or shut down.
        """
        if self._handle is not None:
            self._handle.close()

    def shutdown(self, immediate=False):
        """End the channel for all its handles.

        Parameters
        ----------
        immediate : bool
            False: senders are refused at once, receivers get what is queued and then ChannelClosedError. True: what is
            queued is discarded, and receivers are refused at once.
        """
        require_open(self)
        self._cpp.shutdown(immediate)

    def unlink(self):
        """Remove the name now. Open handles go on; the next opener of the name makes a new channel."""
        require_open(self)
        with nogil:
            self._cpp.unlink()

    def fileno(self):
        """Descriptor that is readable when there may be something to receive, for selectors and event loops.

        Returns
        -------
        int
            The same at every call, the handle's own: do not read from it, or close it. It goes with this object.

        Raises
        ------
        FeatureUnavailableError
            The channel is a Broadcast, which has no receivers but its subscribers.

        Notes
        -----
        Readable when a message waits, and when receiving would raise an error at once (closed, shut down). It may be readable
        for nothing, since others may take the message. It becomes unreadable by a receiving call that finds nothing, and by
        this call: so receive until there is nothing, or call this again before each wait, as `select.select` does.
        The first call starts a thread that watches all such handles of this process. Does not block.
        """
        if self._watch is None:
            self._watch = Watch(self, False)
        self._watch._cpp.get().arm()
        return self._watch._cpp.get().descriptor()

    def fileno_shared(self):
        """Descriptor of the shared bytes, -1 for heap; it stays the channel's."""
        require_open(self)
        return self._cpp.descriptor()

    @property
    def closed(self):
        """True when this handle is closed or the channel is shut down."""
        return self._cpp == NULL or self._cpp.is_closed() or self._cpp.is_shut_down()

    @property
    def capacity(self):
        """Number of slots: messages that can be queued or held at a time."""
        require_open(self)
        return self._cpp.capacity()

    @property
    def slot_size(self):
        """Bytes of payload that are reserved per slot."""
        require_open(self)
        return self._cpp.slot_size()

    @property
    def max_message_size(self):
        """Bytes of payload at most; slots grow up to it."""
        require_open(self)
        return self._cpp.max_message_size()

    @property
    def max_handles(self):
        """Open handles at most."""
        require_open(self)
        return self._cpp.max_handles()

    @property
    def empty(self):
        """True when no message waits. A guess while others are at it."""
        return len(self) == 0

    @property
    def full(self):
        """True when no slot is free. A guess while others are at it."""
        require_open(self)
        return self._cpp.is_full()

    def __len__(self):
        require_open(self)
        return self._cpp.depth()

    def _core_path(self):
        require_open(self)
        return self._cpp.path().decode()

    def _core_uuid(self):
        require_open(self)
        return self._cpp.uuid().decode()

    def _core_storage(self):
        require_open(self)
        return self._cpp.storage().decode()

    def _core_checksum(self):
        require_open(self)
        return self._cpp.checksum()

    @property
    def spec(self):
        """What every message is: an `ArraySpec`, or a dict of them for records. None: messages of any kind."""
        return None if self._schema is None else self._schema.spec

    def _core_handle(self):
        return self._handle

    def remove_group(self, str name not None):
        """End a durable group; what waits for it is released. ChannelNotFoundError when there is none of that name."""
        cdef string group = name.encode()
        require_open(self)
        with nogil:
            self._cpp.remove_group(group)

    @property
    def history(self):
        """Messages that are kept for late joiners."""
        require_open(self)
        return self._cpp.history()

    @property
    def max_deliveries(self):
        """Deliveries of a message before it becomes a dead letter."""
        require_open(self)
        return self._cpp.max_deliveries()

    def _core_synced(self):
        require_open(self)
        return self._cpp.is_synced()

    def _core_is_shut_down(self):
        require_open(self)
        return self._cpp.is_shut_down()

    def _core_lost(self):
        require_open(self)
        return self._cpp.stats().lost

    def _core_stats(self):
        require_open(self)
        cdef CppChannelStats s = self._cpp.stats()
        return {
            "depth": s.depth, "capacity": self._cpp.capacity(), "next_sequence": s.next_sequence,
            "head_sequence": s.head_sequence, "sent": self._handle.sent, "received": self._handle.received,
            "dropped_newest": s.dropped_newest, "dropped_oldest": s.dropped_oldest, "lost": s.lost,
            "unheard": s.unheard, "redelivered": s.redelivered, "dead_letters": s.dead_letters, "buried": s.buried,
            "letters_dropped": s.letters_dropped, "deaths": s.deaths,
            "send_waits": s.send_waits, "recv_waits": s.recv_waits, "pinned_views": self._handle.views,
            "forced_copies": self._handle.forced_copies,
            "pinned_slots": s.pinned_slots, "free_slots": s.free_slots, "corrupted_slots": s.corrupted_slots,
            "bytes_sent": self._handle.bytes_sent, "bytes_received": self._handle.bytes_received,
            "corrupted": s.corrupted, "reserved_bytes": s.reserved_bytes, "participants": s.participants,
            "loans": self._handle.loans, "kept_slots": s.kept_slots,
        }

cdef class Channel(Receiver):
    """Base of ShmChannel, FileChannel and Broadcast: the calls that open and send."""

    # --- opening -------------------------------------------------------------------------------------------------

    def _open(self, str kind, target, dict options, int mode, int policy, timeout):
        """Open or create; `kind` is named, file, anonymous, adopt or heap."""
        cdef CppChannelOptions given
        cdef Handle handle = Handle.__new__(Handle)
        cdef string place
        cdef int fd = -1
        given.capacity = options.get("capacity") or 0
        given.slot_size = options.get("slot_size") or 0
        given.max_message_size = options.get("max_message_size") or 0
        given.max_handles = options.get("max_handles") or 0
        given.checksum = options.get("checksum", -1)
        given.mode = options.get("mode", 0o600)
        given.on_stale = <CppOnStale> <int> options.get("on_stale", 0)
        given.first_position = options.get("first_position", 0)
        given.max_groups = options.get("max_groups") or 0
        given.history = options.get("history", -1)
        given.max_deliveries = options.get("max_deliveries") or 0
        given.dead_letters = options.get("dead_letters", -1)
        given.default_group = options.get("default_group", -1)
        given.sync = options.get("sync", -1)
        cdef Schema schema = options.get("schema")
        if schema is not None:
            given.schema = schema.encoded
            if schema.fixed:
                given.default_slot_size = max(schema.layout.nbytes, 1)
        deadline_of(timeout)
        if kind == "named" or kind == "file":
            place = target
            if kind == "named":
                with nogil:
                    handle._channel = CppChannel.open_named(place, given, <CppOpenMode> mode)
            else:
                with nogil:
                    handle._channel = CppChannel.open_file(place, given, <CppOpenMode> mode)
        elif kind == "anonymous":
            with nogil:
                handle._channel = CppChannel.create_anonymous(given)
        elif kind == "heap":
            with nogil:
                handle._channel = CppChannel.create_heap(given)
        else:
            fd = target
            with nogil:
                handle._channel = CppChannel.adopt_anonymous(fd)
        self._take_over(handle, timeout)
        self._policy = <CppBackpressure> policy

    # --- sending -------------------------------------------------------------------------------------------------

    def send(self, data, *, timeout=DEFAULT, meta=None):
        """Copy `data` into a slot and make it visible to receivers.

        Parameters
        ----------
        data : bytes, bytearray, memoryview, numpy.ndarray or any buffer exporter
            Arrays arrive as arrays: every dtype of fixed width, every shape, C and Fortran order kept; other strides
            are gathered into C order by the one copy. Arrays of other packages are looked at by their `__dlpack__`,
            `__array_interface__` or `__array__`; masked arrays travel with mask and fill value. On a channel with a spec,
            what the spec says and nothing else; for a record, a dict with a value per field, each of which is copied once,
            straight into the slot.
        timeout : float or None, optional
            Seconds to wait for room with backpressure "block": None for ever, 0 not at all. The handle's by default.
        meta : dict, optional
            Metadata: str keys; str, bytes, int, float, bool or None values.

        Returns
        -------
        bool
            True when the message entered the channel, False when a drop policy discarded it.

        Raises
        ------
        BufferFullError
            No slot became free in time.
        ChannelClosedError
            This handle is closed or the channel is shut down.
        MessageTooLargeError
            Larger than max_message_size.
        SchemaMismatchError
            Not what the channel's spec says; nothing was sent.
        SharedMemoryFullError
            The slot must grow and the memory is not there; nothing was written.
        TypeError
            Not a buffer, or an array with Python objects in it.

        Notes
        -----
        Copies once. Blocks with "block" only. Releases the GIL while it waits and while it copies 64 KiB and more of
        contiguous memory.
        """
        return self._send(data, timeout, meta)

    def send_nowait(self, data, *, meta=None):
        """Same as `send` with timeout=0."""
        return self._send(data, 0, meta)

    def send_many(self, items, *, timeout=DEFAULT):
        """Send every item of an iterable, in order.

        Parameters
        ----------
        items : iterable
            Of what `send` takes.
        timeout : float or None, optional
            Seconds for all of them together.

        Returns
        -------
        int
            How many entered. Fewer than given when a drop policy discarded some, or when the time was up or the
            channel full after at least one had entered; of an iterator, the item after these has been drawn and not sent.

        Raises
        ------
        BufferFullError
            Not even the first one entered.
        """
        if timeout is DEFAULT:
            timeout = self._timeout
        cdef int64_t deadline = deadline_of(timeout)
        cdef Py_ssize_t entered = 0
        for item in items:
            left = None if deadline == kForever else max(0, deadline - monotonic_ns()) / 1e9
            try:
                entered += self._send(item, left, None)
            except BufferFullError:
                if entered == 0:
                    raise
                break
        return entered

    # --- zero copy -----------------------------------------------------------------------------------------------

    def alloc(self, shape, dtype, *, order="C", fill=None, timeout=DEFAULT, meta=None, meta_room=None):
        """Lend a free slot as an array to be filled in place, for a handle with ``zero_copy=True``.

        Parameters
        ----------
        shape : int or tuple of int
            Of the array; () for a single element.
        dtype : dtype
            Anything of fixed width without Python objects.
        order : str
            "C" or "F".
        fill : scalar or array_like, optional
            What is written into all of it (one pass). By default it holds whatever was in the slot before.
        timeout : float or None, optional
            Seconds to wait for a slot with backpressure "block": None for ever, 0 not at all. The handle's by default.
        meta : dict, optional
            First contents of the loan's `meta`.
        meta_room : int, optional
            Bytes to keep for metadata beside `meta`, up to 65536. By default the metadata has 256 bytes, those that
            describe the array included, or 128 more than `meta` takes.

        Returns
        -------
        Loan
            To be published by the end of a ``with`` block, `Loan.publish` or `publish`.

        Raises
        ------
        BufferFullError
            No slot became free in time; with a drop policy: no slot is free that could be had (it counts as dropped).
        ChannelClosedError
            This handle is closed or the channel is shut down.
        FeatureUnavailableError
            The handle was opened without ``zero_copy``.
        MessageTooLargeError
            Larger than max_message_size.
        SharedMemoryFullError
            The slot must grow and the memory is not there.
        TypeError
            A dtype that cannot be sent.

        Notes
        -----
        Does not copy. Blocks with "block" only, and releases the GIL while it waits.
        """
        return lend(self, shape, dtype, order, fill, timeout, meta, meta_room)

    def publish(self, loan):
        """Publish a loan of this handle: same as `Loan.publish`."""
        require_open(self)
        if not isinstance(loan, Loan):
            raise TypeError(f"publish takes a Loan, as alloc() gives it, not a {type(loan).__name__}")
        if (<Loan> loan)._channel is not self:
            raise InvalidArgumentError(f"the loan was made by another handle ({(<Loan> loan)._channel!r}), which publishes it")
        publish_loan(<Loan> loan)

    def _core_zero_copy(self, int level):
        """Allow alloc: 0 no, 1 yes, 2 with sealed pages."""
        require_open(self)
        if level == 2 and not self._cpp.can_seal():
            if self._core_storage() == "heap":
                raise FeatureUnavailableError(
                    "zero_copy='strict' is not possible with storage='heap': senders and receivers share one mapping, so "
                    "sealing it for one seals it for all; use zero_copy=True, or a memfd (name=None)")
            raise FeatureUnavailableError(
                f"zero_copy='strict' seals whole pages, and the slots of channel '{self._label()}' are packed (slot_size "
                f"{self._cpp.slot_size()}, max_message_size {self._cpp.max_message_size()}); create it with slot_size>=4096, "
                "or without a max_message_size below that")
        self._zero_copy = level

    def send_object(self, obj, *, timeout=DEFAULT, meta=None):
        """Pickle any object (protocol 5) into a slot; its large buffers are copied once, not pickled.

        Parameters
        ----------
        obj : object
            Whatever pickle takes: dicts and dataclasses of arrays, frames of pandas and polars, tensors of torch …
        timeout, meta
            As for `send`.

        Returns
        -------
        bool
            As for `send`.

        Raises
        ------
        SerializationError
            It cannot be pickled. Nothing was sent.
        BufferFullError, ChannelClosedError, MessageTooLargeError, SharedMemoryFullError
            As for `send`.

        Notes
        -----
        Pickles before it waits for room. Copies without the GIL from 64 KiB on.
        """
        require_open(self)
        check_timeout(timeout)
        try:
            stream, buffers = pickle_object(obj)
        except Exception as error:
            raise SerializationError(
                f"cannot pickle the {type(obj).__name__} to be sent: {type(error).__name__}: {error}; nothing was sent"
            ) from error
        return self._send_pickled(stream, buffers, timeout, meta)

    cpdef bint _send_pickled(self, stream, list buffers, timeout=DEFAULT, meta=None) except -1:
        """Send a pickle and its buffers, as `pickle_object` gives them."""
        cdef CppLoan loan
        cdef PickledParts parts = PickledParts(stream, buffers)
        cdef bytes metadata = None if meta is None else encode_meta(meta, None)
        require_open(self)
        check_timeout(timeout)
        if self._schema is not None:
            raise self._mismatch("a pickled object", "send an array")
        if not self._alloc(loan, parts.nbytes, metadata, timeout):
            return False
        parts.write(loan.payload)
        return self._publish(loan, kObjectMessage, 0)

    def _core_send_placed(self, stream, list buffers, timeout, meta):
        """As `_send_pickled`, with backpressure "block": the place of the message, None when nobody is there for it."""
        cdef CppLoan loan
        cdef CppPlace place
        cdef Outcome outcome
        cdef PickledParts parts = PickledParts(stream, buffers)
        require_open(self)
        check_timeout(timeout)
        self._alloc(loan, parts.nbytes, encode_meta(meta, None), timeout)
        parts.write(loan.payload)
        outcome = self._cpp.publish_placed(loan, kObjectMessage, 0, place)
        if outcome == OutcomeDropped:
            return None
        if outcome != OutcomeOk:
            raise self._closed_error()
        self._handle.sent += 1
        self._handle.bytes_sent += loan.payload_bytes
        return place.slot, place.sequence

    def _core_withdraw(self, uint32_t slot, uint64_t sequence):
        """Take a message back: True when nobody had taken it."""
        cdef CppPlace place
        require_open(self)
        place.slot = slot
        place.sequence = sequence
        return self._cpp.try_withdraw(place)

    def _core_is_there(self, uint32_t slot, uint64_t sequence):
        """False when every group has finished with the message."""
        cdef CppPlace place
        require_open(self)
        place.slot = slot
        place.sequence = sequence
        return self._cpp.is_there(place)

    cdef int send_nogil(self, const void* data, size_t size, long long timeout_ns) except -1 nogil:
        """Send bytes without the GIL: 1 when they entered, 0 when a drop policy discarded them. `timeout_ns` < 0 waits
        for ever. Requires: the caller keeps this object alive and open."""
        if self._cpp == NULL:
            with gil:
                require_open(self)
        if <void*> self._schema != <void*> None:
            with gil:
                raise self._mismatch("plain bytes", "send an array")
        cdef int64_t deadline = kForever if timeout_ns < 0 else monotonic_ns() + timeout_ns
        cdef Outcome outcome = self._cpp.send(data, size, self._policy, deadline)
        if outcome == OutcomeOk:
            return 1
        if outcome == OutcomeDropped:
            return 0
        with gil:
            if outcome == OutcomeClosed:
                raise self._closed_error()
            if outcome == OutcomeNotSynced:
                raise self._not_synced_error()
            raise self._full_error(timeout_ns / 1e9 if timeout_ns >= 0 else None)

    cdef bint _send(self, object data, object timeout, object meta) except -1:
        cdef Py_buffer view
        cdef bytes metadata
        require_open(self)
        check_timeout(timeout)
        if self._schema is not None:
            return self._send_typed(data, timeout, meta)
        if PyBytes_CheckExact(data) and meta is None:
            return self._send_frame(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), kBytesMessage, None, 0, timeout)
        if cnp.PyArray_Check(data):
            return self._send_array(data, timeout, meta)
        if not PyObject_CheckBuffer(data):
            array = _interop.as_array(data)
            if array is not None:
                return self._send_array(array, timeout, meta)
            raise TypeError(
                f"cannot send a {type(data).__name__}: send takes bytes-like objects and arrays; encode a str, turn a list "
                "into an array with numpy.asarray, or pickle other objects with send_object")
        metadata = None if meta is None else encode_meta(meta, None)
        PyObject_GetBuffer(data, &view, PyBUF_FULL_RO)
        try:
            if not (view.ndim == 1 and (view.format == NULL or view.format[0] in b"Bbc" and view.format[1] == 0)):
                array = array_from_buffer(data)
                if array is not None:
                    return self._send_array(array, timeout, meta)
            if PyBuffer_IsContiguous(&view, b"C"):
                return self._send_frame(view.buf, view.len, kBytesMessage, metadata, 0, timeout)
            return self._send_gathered(&view, metadata, timeout)
        finally:
            PyBuffer_Release(&view)

    cdef bint _send_typed(self, object data, object timeout, object meta) except -1:
        """What `send` does on a channel with a spec."""
        if cnp.PyArray_CheckExact(data):
            return self._send_array(data, timeout, meta)
        if self._schema.record and isinstance(data, (dict, _Mapping)):
            return self._send_record(data, timeout, meta)
        if not cnp.PyArray_Check(data):
            array = array_of(data)
            if array is None:
                given = f"{len(data)} plain bytes" if isinstance(data, (bytes, bytearray)) else f"a {type(data).__name__}"
                raise self._mismatch(given, "send a dict of its fields" if self._schema.record else "send an array")
            data = array
        return self._send_array(data, timeout, meta)

    cdef bint _send_masked(self, object array, object timeout, object meta) except -1:
        """Data, mask and fill value of a masked array as one structure."""
        cdef ArrayLayout layout = self._masked_layout
        if self._schema is not None:
            raise self._mismatch("a masked array", "send .filled()")
        dtype, values = _interop.split_masked(array)
        if layout is None or layout.dtype is not dtype:
            layout = ArrayLayout.make(dtype, 0, NULL, False, None)
            describe(layout)
            self._masked_layout = layout
        metadata = layout.metadata if meta is None else encode_meta(meta, layout)
        return self._send_fields(layout, values, metadata, timeout)

    cdef bint _send_record(self, object data, object timeout, object meta) except -1:
        cdef ArrayLayout layout = self._schema.layout
        cdef tuple fields = fields_of(layout)
        cdef Field field
        cdef bytes metadata
        cdef list values = []
        # Everything that can fail, and every line of Python, comes before the slot is taken.
        for field in fields:
            try:
                value = data[field.name]
            except KeyError:
                raise self._mismatch(f"a dict without {field.name!r}", "give every field a value") from None
            values.append(field_value(field, value))
        if len(data) != len(fields):
            extra = [name for name in data if name not in self._schema.spec]
            raise self._mismatch(f"a dict with {', '.join(map(repr, extra))} beside", "leave these out")
        metadata = layout.metadata if meta is None else encode_meta(meta, layout)
        return self._send_fields(layout, values, metadata, timeout)

    cdef bint _send_fields(self, ArrayLayout layout, list values, bytes metadata, object timeout) except -1:
        """Copies each value into its field, straight into the slot. Requires: dtypes and shapes are those of the fields."""
        cdef tuple fields = fields_of(layout)
        cdef CppLoan loan
        cdef Py_ssize_t i
        if not self._alloc(loan, layout.nbytes, metadata, timeout):
            return False
        try:
            for i in range(len(fields)):
                write_field(loan.payload, fields[i], values[i])
        except:
            self._cpp.abort(loan)
            raise
        return self._publish(loan, kArrayMessage, layout.hash)

    cdef object _mismatch(self, str given, str way):
        return SchemaMismatchError(
            f"channel '{self._label()}' takes {self._schema.text()}, and {given} was given; {way}, or use a channel with "
            "another spec; nothing was sent")

    cdef bint _send_frame(self, const void* payload, uint64_t size, int kind, bytes metadata, uint64_t schema,
                          object timeout) except -1:
        """One copy from contiguous memory. The caller keeps it alive."""
        cdef const char* meta = NULL
        cdef uint32_t meta_bytes = 0
        cdef Outcome outcome
        cdef int64_t deadline = -1
        cdef bint spin = True
        if metadata is not None:
            meta = PyBytes_AS_STRING(metadata)
            meta_bytes = <uint32_t> PyBytes_GET_SIZE(metadata)
        while True:
            if size < NOGIL_COPY_BYTES and not self._synced:
                outcome = self._cpp.try_send(payload, size, kind, meta, meta_bytes, schema, self._policy)
            else:
                with nogil:
                    outcome = self._cpp.try_send(payload, size, kind, meta, meta_bytes, schema, self._policy)
            if outcome == OutcomeOk:
                self._handle.sent += 1
                self._handle.bytes_sent += size
                return True
            if outcome == OutcomeDropped:
                return False
            if outcome == OutcomeClosed:
                raise self._closed_error()
            if outcome == OutcomeNotSynced:
                raise self._not_synced_error()
            self._wait_for_space(timeout, &deadline, &spin)

    cdef bint _send_gathered(self, Py_buffer* view, bytes metadata, object timeout) except -1:
        """One copy from a buffer of any strides into C order."""
        cdef CppLoan loan
        if not self._alloc(loan, view.len, metadata, timeout):
            return False
        try:
            PyBuffer_ToContiguous(loan.payload, view, view.len, b"C")
        except:
            self._cpp.abort(loan)
            raise
        return self._publish(loan, kBytesMessage, 0)

    cdef bint _send_array(self, object array, object timeout, object meta) except -1:
        if not cnp.PyArray_CheckExact(array) and isinstance(array, MaskedArray):
            return self._send_masked(array, timeout, meta)
        cdef cnp.ndarray source = array
        cdef ArrayLayout layout = self._layout_for(source)
        cdef bytes metadata = layout.metadata if meta is None else encode_meta(meta, layout)
        cdef CppLoan loan
        if cnp.PyArray_IS_F_CONTIGUOUS(source) if layout.fortran else cnp.PyArray_IS_C_CONTIGUOUS(source):
            return self._send_frame(cnp.PyArray_DATA(source), layout.nbytes, kArrayMessage, metadata, layout.hash, timeout)
        if not self._alloc(loan, layout.nbytes, metadata, timeout):
            return False
        try:
            PyArray_CopyInto(layout.array_at(loan.payload, None, True), source)
        except:
            self._cpp.abort(loan)
            raise
        return self._publish(loan, kArrayMessage, layout.hash)

    cdef bint _alloc(self, CppLoan& loan, uint64_t size, bytes metadata, object timeout) except -1:
        """A slot with its metadata written; False when a drop policy said no."""
        cdef uint32_t meta_bytes = 0 if metadata is None else <uint32_t> PyBytes_GET_SIZE(metadata)
        if not self._alloc_room(loan, size, meta_bytes, timeout, True):
            return False
        if meta_bytes != 0:
            memcpy(loan.meta, PyBytes_AS_STRING(metadata), meta_bytes)
        return True

    cdef bint _alloc_room(self, CppLoan& loan, uint64_t size, uint32_t meta_bytes, object timeout, bint for_copy) except -1:
        """A slot with room for metadata; False when a drop policy said no."""
        cdef Outcome outcome
        cdef int64_t deadline = -1
        cdef bint spin = True
        while True:
            outcome = self._cpp.try_alloc(size, meta_bytes, self._policy, loan, for_copy)
            if outcome == OutcomeOk:
                return True
            if outcome == OutcomeDropped:
                return False
            if outcome == OutcomeClosed:
                raise self._closed_error()
            self._wait_for_space(timeout, &deadline, &spin)

    cdef bint _publish(self, CppLoan& loan, int kind, uint64_t schema) except -1:
        cdef Outcome outcome
        if self._synced:
            with nogil:
                outcome = self._cpp.publish(loan, kind, schema)
        else:
            outcome = self._cpp.publish(loan, kind, schema)
        if outcome == OutcomeNotSynced:
            raise self._not_synced_error()
        if outcome != OutcomeOk:
            raise self._closed_error()
        self._handle.sent += 1
        self._handle.bytes_sent += loan.payload_bytes
        return True

    cdef int _wait_for_space(self, object timeout, int64_t* deadline, bint* spin) except -1:
        """One slice of waiting for room; raises when the time is up. `deadline` is -1 before the first call."""
        cdef Outcome outcome
        cdef int64_t until
        cdef bint spins = spin[0]
        if timeout is DEFAULT:
            timeout = self._timeout
        if self._policy == BackpressureRaise:
            raise self._full_error(0)
        if timeout is TRY_ONCE:
            self._between_slices()
            raise WouldBlock
        if deadline[0] == -1:
            deadline[0] = deadline_of(timeout)
        elif deadline[0] != kForever and monotonic_ns() >= deadline[0]:
            raise self._full_error(timeout)
        if timeout is not None and timeout == 0:
            raise self._full_error(0)
        until = deadline[0]
        with nogil:
            outcome = self._cpp.wait_for_space(until, spins)
        spin[0] = outcome == OutcomeOk
        self._between_slices()
        return 0

    def _core_send_control(self, int kind, payload, timeout):
        """Send a control frame of `Message._core_kind` 16 to 19, past the channel's spec. As `send` otherwise."""
        cdef Py_buffer view
        require_open(self)
        check_timeout(timeout)
        if not kEndMessage <= kind <= kGapMessage:
            raise InvalidArgumentError(f"the kind of a control frame is {kind}, must be {kEndMessage} to {kGapMessage}")
        PyObject_GetBuffer(payload, &view, PyBUF_C_CONTIGUOUS)
        try:
            return self._send_frame(view.buf, view.len, kind, None, 0, timeout)
        finally:
            PyBuffer_Release(&view)

    def _core_send_filled(self, uint64_t size, fill, dict meta, timeout):
        """Let `fill(window)` write a message of at most `size` bytes straight into its slot; it returns how many it wrote."""
        cdef CppLoan loan
        cdef Window window
        cdef bytes metadata = encode_meta(meta, None)
        require_open(self)
        check_timeout(timeout)
        if self._schema is not None:
            raise self._mismatch("something else", "send an array")
        if not self._alloc(loan, size, metadata, timeout):
            return False
        try:
            window = Window.__new__(Window)
            window._at = loan.payload
            window._size = size
            try:
                written = fill(window)
                if window._exports != 0:
                    raise BufferError("the message is being written to after its writer has ended")
                if not 0 <= written <= size:
                    raise ValueError(f"the writer reports {written} bytes in a room of {size}")
            finally:
                window._at = NULL
        except:
            self._cpp.abort(loan)
            raise
        loan.payload_bytes = written
        return self._publish(loan, kBytesMessage, 0)

    cdef ArrayLayout _layout_for(self, object array):
        """The layout of an array to be sent; the last one is remembered."""
        cdef cnp.ndarray source = array
        cdef ArrayLayout layout = self._sent_layout
        cdef int ndim = cnp.PyArray_NDIM(source)
        cdef bint fortran = cnp.PyArray_IS_F_CONTIGUOUS(source) and not cnp.PyArray_IS_C_CONTIGUOUS(source)
        cdef object dtype = source.dtype
        cdef int64_t shape[64]
        cdef int i
        if (layout is not None and layout.dtype is dtype and (layout.names is None or layout.names == dtype.names)
                and layout.ndim == ndim and layout.fortran == fortran
                and memcmp(layout.shape, cnp.PyArray_DIMS(source), ndim * sizeof(Py_ssize_t)) == 0):
            return layout
        if self._schema is not None:
            layout = self._schema.layout_for(source)
            if layout is None:
                raise self._mismatch(_specs.array_text(source), "convert it (astype, reshape)")
        else:
            for i in range(ndim):
                shape[i] = cnp.PyArray_DIMS(source)[i]
            layout = ArrayLayout.make(dtype, ndim, shape, fortran, None)
            describe(layout)
        self._sent_layout = layout
        return layout

    def _full_error(self, timeout):
        cdef CppChannelStats stats = self._cpp.stats()
        text = (f"channel '{self._label()}' is full: of its capacity of {self._cpp.capacity()} slots {stats.depth} wait to be "
                f"received, {stats.pinned_slots} are held by receivers ({self._handle.views} by views of this handle)")
        if stats.kept_slots:
            text += (f", {stats.kept_slots} are kept by arrays on published loans ({self._handle.kept} of this handle)")
        if stats.writing_slots:
            text += f", {stats.writing_slots} are not published yet ({self._handle.loans} of them loans of this handle)"
        way = "drop the views (or take copies: recv_array(copy=True)), " if stats.pinned_slots else ""
        if stats.kept_slots:
            way += "drop the arrays whose loans were published, "
        way += "receive faster, raise capacity, wait longer, or use a drop policy"
        if not timeout:
            error = BufferFullError(f"{text}; {way}")
            error._where = (self._handle, True)
            return error
        text += f", and none came free within {timeout:g} s"
        found = self._handle.blockers(True)
        if found:
            text += f": {_report.in_short(found)}"
        error = BufferFullError(f"{text}; {way}")
        error._blockers = found
        return error

    def _not_synced_error(self):
        return ChannelSystemError(
            _errno.EIO, f"the message entered channel '{self._label()}' but its file could not be written to the disk")


include "loan.pxi"


cdef object array_of(object data):
    """The array that an object is or offers; None where it is none: text, bytes, plain buffers, scalars, lists."""
    cdef Py_buffer view
    cdef bint plain
    if cnp.PyArray_Check(data):
        return data
    if PyObject_CheckBuffer(data):
        PyObject_GetBuffer(data, &view, PyBUF_FULL_RO)
        plain = view.ndim == 1 and (view.format == NULL or view.format[0] in b"Bbc" and view.format[1] == 0)
        PyBuffer_Release(&view)
        return None if plain else array_from_buffer(data)
    return _interop.as_array(data)


cdef object field_value(Field field, object value):
    """The array of exactly a field's dtype and shape that holds `value`."""
    cdef ArrayLayout layout = field.layout
    cdef cnp.ndarray source
    if cnp.PyArray_CheckExact(value):
        source = value
        if (source.dtype is layout.dtype and cnp.PyArray_NDIM(source) == layout.ndim
                and memcmp(layout.shape, cnp.PyArray_DIMS(source), layout.ndim * sizeof(Py_ssize_t)) == 0):
            return value
    elif layout.ndim == 0 and isinstance(value, (float, int)):
        return _specs.scalar_of_field(field.name, value, layout.dtype)
    elif not isinstance(value, (np.generic, int, float, str, bytes, complex)):
        array = array_of(value)
        value = value if array is None else array
    shape = tuple([layout.shape[i] for i in range(layout.ndim)])
    return _specs.value_of_field(field.name, value, layout.dtype, shape)


cdef object array_from_buffer(object data):
    """An array over a buffer with a format or several dimensions; None where NumPy has no dtype for it."""
    try:
        array = np.asarray(data)
    except (TypeError, ValueError, BufferError, RuntimeError):
        return None
    _dtypes.encode_dtype(array.dtype)  # refuses Python objects: their addresses mean nothing elsewhere
    return array


def channel_directory():
    """Directory of this user's named channels."""
    return cpp_channel_directory().decode()


def list_names():
    """Names in the directory of this user's named channels, sorted."""
    return [name.decode() for name in cpp_list_channels()]


def report_of(str path not None):
    """A channel as it stands, without taking part in it: a `dsline.report.ChannelReport`. Raises as opening does."""
    cdef string place = _os.fsencode(path)
    cdef CppReport found
    with nogil:
        found = CppChannel.report_of(place)
    return _report.from_core(found)


def remove_channel(str path not None, int64_t age_ns, bint even_with_messages, bint dry):
    """Remove the file of a channel that nobody has open: 0 done, 1 missing, 2 in use, 3 messages wait, 4 too young."""
    cdef string place = _os.fsencode(path)
    cdef int removal
    with nogil:
        removal = <int> CppChannel.remove_channel(place, age_ns, even_with_messages, dry)
    return removal


def crc32c(buffer, uint32_t seed=0):
    """CRC-32C (Castagnoli) of a C-contiguous buffer, continued from `seed`: ``crc32c(b, crc32c(a))`` is that of ``a + b``.

    Does not copy. Releases the GIL for 64 KiB and more.
    """
    cdef Py_buffer view
    cdef uint32_t crc
    PyObject_GetBuffer(buffer, &view, PyBUF_C_CONTIGUOUS)
    if view.len < NOGIL_COPY_BYTES:
        crc = cpp_crc32c(view.buf, view.len, seed)
    else:
        with nogil:
            crc = cpp_crc32c(view.buf, view.len, seed)
    PyBuffer_Release(&view)
    return crc


cdef str as_text(const string& text):
    """Of a name that a peer has written."""
    return text.decode("utf-8", "replace")


include "store.pxi"
include "queues.pxi"
include "stage_words.pxi"
include "watch.pxi"
