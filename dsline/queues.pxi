# The hot paths of dsline/queues.py, a part of _core.pyx: what put() and get() of the queues do between the Python object
# and the slot. Policy (sizes, limits, threads, pickling of the queues themselves) is in dsline/queues.py.

from libcpp.memory cimport shared_ptr

from dsline._cpp.channel cimport BackpressureBlock, OutcomeFull
from dsline._cpp.tally cimport CppTally

import copyreg as _copyreg
import pickle as _pickle
import queue as _queue
import time as _time
import traceback as _traceback
from multiprocessing.reduction import ForkingPickler as _ForkingPickler

cdef object QueueFull = _queue.Full
cdef object QueueEmpty = _queue.Empty
cdef object Pickler = _pickle.Pickler
cdef object PickleBuffer = _pickle.PickleBuffer
cdef object array_from_pickled_buffer = np.zeros(1, np.uint8).__reduce_ex__(5)[0]  # where it lives depends on NumPy's version
cdef dict copyreg_table = _copyreg.dispatch_table

# What a message of a queue is, in the place of the schema hash.
cdef enum:
    FORM_BYTES = 0  # the object is `bytes`, and these are they
    FORM_PICKLE = 1  # a pickle
    FORM_BUFFERS = 2  # {n, bytes of the pickle, n times {offset, size}} as uint64, the pickle, the buffers

# Alignment in bytes; what the feeding thread takes at a time; how often it asks for memory, 50 ms apart.
cdef enum:
    BUFFER_ALIGNMENT = 64
    FEED_BATCH_BYTES = 8388608
    FEED_TRIES = 100

cdef int64_t kQueueSliceNs = 50000000


@cython.final
@cython.internal
cdef class ArrayBytes:
    """The bytes of a contiguous array. Says that they may be written, so that the array that is made of the copy may."""

    cdef cnp.ndarray _array

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, cnp.PyArray_DATA(self._array), cnp.PyArray_NBYTES(self._array), 0, flags)


cdef object reduce_array(object obj):
    """How an array is pickled: its bytes go out of band, whatever its dtype is called and whether it may be written."""
    cdef cnp.ndarray array = obj
    cdef ArrayBytes exported
    cdef object dtype = array.dtype
    if dtype.hasobject or dtype.char == "T" or cnp.PyArray_SIZE(array) == 0:
        return array.__reduce_ex__(4)
    order = "C"
    if not cnp.PyArray_IS_C_CONTIGUOUS(array):
        if cnp.PyArray_IS_F_CONTIGUOUS(array):
            order = "F"
        else:
            array = array.copy(order="C")
    if cnp.PyArray_DescrFromType(dtype.num) is dtype:
        dtype = dtype.char  # the singleton of its kind has nothing else to tell
    exported = ArrayBytes.__new__(ArrayBytes)
    exported._array = array
    return array_from_pickled_buffer, (PickleBuffer(exported), dtype, obj.shape, order)


@cython.final
@cython.internal
cdef class Reducers:
    """The dispatch table of the pickler: what ForkingPickler knows now, without copying its table for every object."""

    def __getitem__(self, kind):
        extra = _ForkingPickler._extra_reducers
        found = (<dict> extra).get(kind)
        if kind is cnp.ndarray and (found is None or getattr(found, "__module__", "").startswith("dsline")):
            return reduce_array
        if found is None:
            found = copyreg_table.get(kind)
        if found is None:
            found = (<dict> _objects.extra_reducers()).get(kind)
        if found is None:
            raise KeyError(kind)
        return found


@cython.final
@cython.internal
cdef class Sink:
    """What one pickling writes."""

    cdef list chunks
    cdef list buffers

    def write(self, data):
        self.chunks.append(data)

    def take(self, buffer):
        """Whether the buffer goes into the pickle."""
        try:
            raw = buffer.raw()
        except BufferError:
            return True
        if len(raw) < OUT_OF_BAND_BYTES:
            return True
        self.buffers.append(raw)
        return False


cdef inline uint64_t aligned(uint64_t offset) noexcept nogil:
    return (offset + BUFFER_ALIGNMENT - 1) & ~<uint64_t> (BUFFER_ALIGNMENT - 1)


@cython.final
@cython.internal
cdef class Parcel:
    """A pickle of several pieces, or with buffers, on the way into a slot. Holds its parts until it is gone."""

    cdef vector[Py_buffer] _pieces
    cdef vector[uint64_t] _offsets
    cdef vector[uint64_t] _head
    cdef uint64_t size
    cdef int form

    @staticmethod
    cdef Parcel make(list chunks, list buffers):
        cdef Parcel self = Parcel.__new__(Parcel)
        cdef uint64_t at, start
        self.form = FORM_BUFFERS if buffers else FORM_PICKLE
        at = start = 8 * (2 + 2 * len(buffers)) if buffers else 0
        for chunk in chunks:
            at = self._add(chunk, at)
        if buffers:
            self._head.push_back(len(buffers))
            self._head.push_back(at - start)
            for buffer in buffers:
                at = aligned(at)
                self._head.push_back(at)
                start = at
                at = self._add(buffer, at)
                self._head.push_back(at - start)
        self.size = at
        return self

    cdef uint64_t _add(self, object piece, uint64_t at) except? 0:
        cdef Py_buffer view
        PyObject_GetBuffer(piece, &view, PyBUF_C_CONTIGUOUS)
        self._pieces.push_back(view)
        self._offsets.push_back(at)
        return at + view.len

    cdef void fill(self, char* to) noexcept nogil:
        cdef size_t i
        if not self._head.empty():
            memcpy(to, self._head.data(), 8 * self._head.size())
        for i in range(self._pieces.size()):
            memcpy(to + self._offsets[i], self._pieces[i].buf, self._pieces[i].len)

    cdef bytes flat(self):
        """The whole in memory of its own."""
        cdef bytes copy = PyBytes_FromStringAndSize(NULL, self.size)
        cdef char* to = PyBytes_AS_STRING(copy)
        with nogil:
            self.fill(to)
        return copy

    def __dealloc__(self):
        cdef size_t i
        for i in range(self._pieces.size()):
            PyBuffer_Release(&self._pieces[i])


@cython.final
@cython.auto_pickle(False)
cdef class QueueLink:
    """One process's end of a queue: the channel, the tally, and the objects that wait here for room.

    Everything but the copying of large objects and the waiting runs under the GIL, without Python code in between where
    the order of two threads matters. The queue refers to it, and so does the thread that feeds: never the other way.
    """

    cdef Channel _channel
    cdef CppChannel* _cpp
    cdef Handle _handle
    cdef shared_ptr[CppTally] _shared
    cdef CppTally* _tally
    cdef object _pickler
    cdef Sink _sink
    cdef object _shut_down_error
    cdef object _make_feeder
    cdef uint64_t _limit  # objects at most; 0: any number
    cdef bint _by_slots  # every slot is one object of the limit: put waits for a slot
    cdef bint _blocks  # put waits for a slot where there is no limit, too
    cdef bint _counts  # task_done() and join() are in use
    cdef bint _copy
    cdef bint _closed
    cdef int _busy
    cdef object _backlog
    cdef readonly object feeder  # the last thread
    cdef readonly bint feeding  # it has not come to its end

    def __init__(self, Channel channel not None, tally, *, limit, by_slots, blocks, counts, copy, backlog, shut_down_error,
                 make_feeder):
        """`tally` is a descriptor that is taken over, or None for a new one."""
        cdef int fd
        require_open(channel)
        if tally is None:
            with nogil:
                self._shared = CppTally.create()
        else:
            fd = tally
            with nogil:
                self._shared = CppTally.adopt(fd)
        self._tally = self._shared.get()
        self._channel = channel
        self._handle = channel._handle
        self._cpp = channel._cpp
        self._limit = limit
        self._by_slots = by_slots
        self._blocks = blocks
        self._counts = counts
        self._copy = copy
        self._backlog = backlog
        self._shut_down_error = shut_down_error
        self._make_feeder = make_feeder

    def descriptor(self):
        """Of the tally; it stays the link's."""
        return self._tally.descriptor()

    @property
    def channel(self):
        return self._channel

    @property
    def closed(self):
        return self._closed

    def after_fork(self):
        """The objects of the parent's backlog are the parent's to send, and its threads are not here."""
        self._backlog.clear()
        self.feeder = None
        self.feeding = False
        self._pickler = None
        self._busy = 0

    def close(self):
        """End the handle as soon as no thread is at work on it."""
        self._closed = True
        if self._busy == 0:
            self._channel.close()

    cdef inline int _enter(self) except -1:
        if self._closed:
            raise OSError(_errno.EBADF, "the queue is closed in this process")
        self._busy += 1
        return 0

    cdef inline int _leave(self) except -1:
        self._busy -= 1
        if self._closed and self._busy == 0:
            self._channel.close()
        return 0

    # --- sending -------------------------------------------------------------------------------------------------

    cdef object _pickled(self, object obj):
        """`bytes`, or a Parcel."""
        cdef Sink sink
        cdef list chunks, buffers
        # Borrowed: pickling runs code of the objects, which may put into this very queue.
        pickler, self._pickler = self._pickler, None
        sink = self._sink
        if pickler is None:
            sink = Sink.__new__(Sink)
            pickler = Pickler(sink, 5, buffer_callback=sink.take)
            pickler.dispatch_table = Reducers()
        sink.chunks = chunks = []
        sink.buffers = buffers = []
        pickler.dump(obj)
        pickler.clear_memo()
        sink.chunks = sink.buffers = None
        # Clearing costs what the largest memo so far had, so that of a large object is not kept.
        if len(chunks) == 1 and len(chunks[0]) < NOGIL_COPY_BYTES:
            self._pickler = pickler
            self._sink = sink
        if len(chunks) == 1 and not buffers and PyBytes_CheckExact(chunks[0]):
            return chunks[0]
        return Parcel.make(chunks, buffers)

    cdef Outcome _offer(self, bytes data, Parcel parcel, int form) except *:
        """Tries once: Ok, Full or Closed."""
        cdef CppLoan loan
        cdef Outcome outcome
        cdef uint64_t size = PyBytes_GET_SIZE(data) if parcel is None else parcel.size
        cdef const char* payload = PyBytes_AS_STRING(data) if parcel is None else NULL
        if parcel is None and not self._counts:
            if size < NOGIL_COPY_BYTES:
                outcome = self._cpp.try_send(payload, size, kBytesMessage, NULL, 0, form, BackpressureBlock)
            else:
                with nogil:
                    outcome = self._cpp.try_send(payload, size, kBytesMessage, NULL, 0, form, BackpressureBlock)
        else:
            outcome = self._cpp.try_alloc(size, 0, BackpressureBlock, loan)
            if outcome == OutcomeOk:
                if parcel is None:
                    if size < NOGIL_COPY_BYTES:
                        memcpy(loan.payload, payload, size)
                    else:
                        with nogil:
                            memcpy(loan.payload, payload, size)
                elif size < NOGIL_COPY_BYTES:
                    parcel.fill(<char*> loan.payload)
                else:
                    with nogil:
                        parcel.fill(<char*> loan.payload)
                outcome = self._publish(loan, form, False)
        if outcome == OutcomeOk:
            self._handle.sent += 1
            self._handle.bytes_sent += size
        return outcome

    cdef Outcome _publish(self, CppLoan& loan, int form, bint kept) noexcept nogil:
        """Publishes; `kept` says that the object has waited here for room."""
        cdef Outcome outcome
        if self._counts and not kept:
            self._tally.begin_put()
        outcome = self._cpp.publish(loan, kBytesMessage, form)
        if self._counts:
            self._tally.put_is_over(outcome == OutcomeOk)
        elif kept:
            self._tally.let_go()
        return outcome

    cdef int put(self, object obj, bint block, object timeout, object on_error) except -1:
        cdef bytes data = None
        cdef Parcel parcel = None
        cdef int form = FORM_BYTES
        cdef Outcome outcome
        if self._tally.is_shut_down():
            raise self._shut_down_error
        if block and timeout is not None:
            check_queue_timeout(timeout)
        if self._counts:
            self._tally.take_part()
        if PyBytes_CheckExact(obj):
            data = obj
        else:
            try:
                packed = self._pickled(obj)
            except Exception as error:
                if on_error is None:
                    error.add_note("the object cannot be pickled and was not put into the queue")
                    raise
                on_error(error, obj)
                return 0
            if PyBytes_CheckExact(packed):
                data = packed
                form = FORM_PICKLE
            else:
                parcel = packed
                form = parcel.form
        self._enter()
        try:
            if self._by_slots or self._blocks:
                outcome = self._offer(data, parcel, form)
                if outcome != OutcomeOk:
                    self._offer_again(data, parcel, form, outcome, block, timeout)
                return 0
            if self._limit != 0:
                self._wait_for_limit(block, timeout)
            if self._tally.own_pending() == 0:
                outcome = self._offer(data, parcel, form)
                if outcome == OutcomeOk:
                    return 0
                if outcome == OutcomeClosed:
                    raise self._shut_down_error
            self._keep(data, parcel, form)
            return 0
        finally:
            self._leave()

    cdef int _offer_again(self, bytes data, Parcel parcel, int form, Outcome outcome, bint block, object timeout) except -1:
        """Waits for a slot."""
        cdef int64_t deadline = -1
        cdef bint spin = True, last = False
        while True:
            if outcome == OutcomeOk:
                return 0
            if outcome == OutcomeClosed:
                self._refuse()
            if not block or last:
                raise QueueFull
            if deadline == -1:
                deadline = queue_deadline(timeout)
            with nogil:
                outcome = self._cpp.wait_for_space(deadline, spin)
            spin = outcome == OutcomeOk
            last = outcome == OutcomeTimedOut
            self._check_signals()
            outcome = self._offer(data, parcel, form)

    cdef int _wait_for_limit(self, bint block, object timeout) except -1:
        """Waits until fewer objects than the limit are in the channel and in the memory of the processes."""
        cdef int64_t deadline = -1
        cdef uint32_t word
        cdef Outcome outcome
        cdef bint last = False
        while True:
            word = self._tally.room_word()
            if self.size() < self._limit:
                return 0
            if self._tally.is_shut_down():
                raise self._shut_down_error
            if not block or last:
                raise QueueFull
            if deadline == -1:
                deadline = queue_deadline(timeout)
            with nogil:
                outcome = self._tally.wait_for_room(word, deadline)
            last = outcome == OutcomeTimedOut
            self._check_signals()
            self._tally.forget_the_dead()

    cdef int _keep(self, bytes data, Parcel parcel, int form) except -1:
        """Puts it behind those that wait here for room."""
        cdef uint64_t size = PyBytes_GET_SIZE(data) if parcel is None else parcel.size
        if size > self._cpp.max_message_size():
            self._offer(data, parcel, form)  # raises
        if parcel is not None:
            data = parcel.flat()
        self._tally.keep()
        # Dekker with shutdown(): it sets the flag, then looks whether anything is pending.
        if self._tally.is_shut_down():
            self._tally.let_go()
            self._tally.sent()
            raise self._shut_down_error
        self._backlog.append((data, form))
        if not self.feeding:
            # Known before it starts: it may have come to its end before start() returns.
            thread = self._make_feeder(self)
            if not self.feeding:  # still, whatever ran meanwhile
                self.feeding = True
                self.feeder = thread
                try:
                    thread.start()
                except RuntimeError:  # no thread can be started: the interpreter is about to end
                    self.feed()
        return 0

    def feed(self):
        """Send what waits here, in order; returns when nothing does. Runs in a thread of its own."""
        cdef vector[const char*] payloads
        cdef vector[uint64_t] sizes
        cdef vector[int] forms
        cdef uint64_t total
        try:
            while self._backlog:
                taken = []
                payloads.clear()
                sizes.clear()
                forms.clear()
                total = 0
                while self._backlog and total < FEED_BATCH_BYTES:
                    entry = self._backlog.popleft()
                    taken.append(entry)
                    payloads.push_back(PyBytes_AS_STRING(<bytes> entry[0]))
                    sizes.push_back(PyBytes_GET_SIZE(<bytes> entry[0]))
                    forms.push_back(entry[1])
                    total += PyBytes_GET_SIZE(<bytes> entry[0])
                self._feed_all(payloads, sizes, forms)
                self._handle.sent += sizes.size()
                self._handle.bytes_sent += total
                del entry, taken
        finally:
            # Under the GIL since the look at the backlog: whoever puts something there now starts another thread.
            self.feeding = False
        if self._tally.is_shut_down() and self._tally.pending() == 0:
            self._cpp.shutdown(False)

    cdef int _feed_all(self, vector[const char*]& payloads, vector[uint64_t]& sizes, vector[int]& forms) except -1:
        cdef size_t at = 0
        cdef int failures = 0
        while at < payloads.size():
            try:
                with nogil:
                    self._feed(payloads, sizes, forms, &at)
            except Exception:
                # Most likely the memory is full; what others receive meanwhile makes room.
                failures += 1
                if failures < FEED_TRIES:
                    _time.sleep(0.05)
                    continue
                try:
                    _traceback.print_exc()
                except Exception:
                    pass  # nobody can be told
                self._tally.let_go()
                self._tally.sent()
                at += 1
            failures = 0
        return 0

    cdef int _feed(self, const vector[const char*]& payloads, const vector[uint64_t]& sizes,
                   const vector[int]& forms, size_t* at) except -1 nogil:
        cdef CppLoan loan
        cdef Outcome outcome
        cdef bint spin = True, gone = False
        while at[0] < payloads.size():
            outcome = OutcomeClosed
            if not gone and not self._tally.is_shut_down_at_once():
                outcome = self._cpp.try_alloc(sizes[at[0]], 0, BackpressureBlock, loan)
            if outcome == OutcomeFull:
                outcome = self._cpp.wait_for_space(monotonic_ns() + kQueueSliceNs, spin)
                spin = outcome == OutcomeOk
                continue
            if outcome == OutcomeOk:
                memcpy(loan.payload, payloads[at[0]], sizes[at[0]])
                outcome = self._publish(loan, forms[at[0]], True)
            else:
                self._tally.let_go()
            gone = outcome != OutcomeOk
            at[0] += 1
            self._tally.sent()
        return 0

    def waiting_here(self):
        """Objects that wait in this process for room."""
        return self._tally.own_pending()

    # --- receiving -----------------------------------------------------------------------------------------------

    cdef object get(self, bint block, object timeout):
        cdef CppReceived message
        cdef Outcome outcome
        self._enter()
        try:
            if self._tally.is_shut_down_at_once():
                raise self._shut_down_error
            outcome = self._cpp.try_recv(message)
            if outcome != OutcomeOk:
                self._receive(message, outcome, block, timeout)
            return self._unpack(message)
        finally:
            self._leave()

    cdef int _receive(self, CppReceived& message, Outcome outcome, bint block, object timeout) except -1:
        cdef int64_t deadline = -1
        cdef bint spin = True, last = False
        while True:
            if outcome == OutcomeOk:
                return 0
            if outcome == OutcomeClosed:
                self._refuse()
            if outcome == OutcomeCorrupted:
                raise self._channel._corrupted_error(message)
            if self._tally.is_shut_down():
                if self._tally.is_shut_down_at_once():
                    raise self._shut_down_error
                if self._tally.pending() == 0 or (self._tally.forget_the_dead() and self._tally.pending() == 0):
                    self._cpp.shutdown(False)  # and what entered before it is received
            if not block or last:
                raise QueueEmpty
            if deadline == -1:
                deadline = queue_deadline(timeout)
            with nogil:
                outcome = self._cpp.wait_for_message(deadline, spin)
            spin = outcome == OutcomeOk
            last = outcome == OutcomeTimedOut
            self._check_signals()
            if self._tally.is_shut_down_at_once():
                raise self._shut_down_error
            outcome = self._cpp.try_recv(message)

    cdef object _unpack(self, CppReceived& message):
        """The object of a message that is this process's; the slot is free again before the object is made."""
        cdef bytes data
        cdef const char* payload = <const char*> message.payload
        cdef vector[uint64_t] head  # a copy: what is checked is what is used
        cdef uint64_t size = message.payload_bytes, form = message.schema_hash
        cdef uint64_t count = 0, start = 0, length = size, i
        cdef bint pinned = False
        cdef cnp.ndarray place
        cdef object copy
        cdef char* to
        cdef list buffers = None
        cdef Lease lease
        if form == FORM_BUFFERS:
            if size < 16:
                self._malformed(message)
            memcpy(&count, payload, 8)
            if count > size // 16 or 16 + 16 * count > size:
                self._malformed(message)
            start = 16 + 16 * count
            try:
                head.resize(2 + 2 * count)
            except:
                self._cpp.put_back(message)
                raise
            memcpy(head.data(), payload, start)
            length = head[1]
            if length > size - start:
                self._malformed(message)
            for i in range(count):
                if head[2 + 2 * i] > size or head[3 + 2 * i] > size - head[2 + 2 * i]:
                    self._malformed(message)
        elif form > FORM_BUFFERS:
            self._malformed(message)
        try:
            data = PyBytes_FromStringAndSize(NULL, length)
            to = PyBytes_AS_STRING(data)
            if length < NOGIL_COPY_BYTES:
                memcpy(to, payload + start, length)
            else:
                with nogil:
                    memcpy(to, payload + start, length)
            if count != 0:
                buffers = []
                # Those who keep their views must not bring the queue to a standstill.
                pinned = not self._copy and self._handle.views < self._cpp.capacity() // 4
                if not pinned:
                    for i in range(count):
                        length = head[3 + 2 * i]
                        # NumPy asks for huge pages for its large arrays: fewer faults than a bytearray takes.
                        place = np.empty(length, np.uint8)
                        to = <char*> cnp.PyArray_DATA(place)
                        with nogil:
                            memcpy(to, payload + head[2 + 2 * i], length)
                        copy = PyMemoryView_FromObject(place)
                        buffers.append(copy if self._copy else copy.toreadonly())
        except:
            self._cpp.put_back(message)
            raise
        if pinned:
            lease = self._channel._lease(message)
            whole = PyMemoryView_FromObject(lease)
            for i in range(count):
                buffers.append(whole[head[2 + 2 * i]:head[2 + 2 * i] + head[3 + 2 * i]])
            del whole, lease
        else:
            self._cpp.release(message.slot, message.process, message.group)
            self._handle.received += 1
            self._handle.bytes_received += size
        if self._limit != 0 and not self._by_slots:
            self._tally.tell_of_room()
        if form == FORM_BYTES:
            return data
        if buffers is None:
            return pickle_loads(data)
        return pickle_loads(data, buffers=buffers)

    cdef int _malformed(self, CppReceived& message) except -1:
        error = self._channel._malformed_error(message, "it is not a message of a queue")
        if self._counts:
            self._tally.finish_one()  # nobody else will
        self._cpp.release(message.slot, message.process, message.group)
        raise error

    cdef int _check_signals(self) except -1:
        try:
            PyErr_CheckSignals()
        except:
            self._cpp.pass_on_wake()
            raise
        return 0

    cdef int _refuse(self) except -1:
        if self._tally.is_shut_down():
            raise self._shut_down_error
        raise OSError(_errno.EBADF, "the queue is closed in this process")

    # --- the rest ------------------------------------------------------------------------------------------------

    cdef uint64_t size(self) noexcept:
        # In this order an object that enters meanwhile is left out, and does not make the queue look full.
        cdef uint64_t depth = self._cpp.depth()
        return depth + self._tally.waiting()

    def shutdown(self, bint immediate):
        self._tally.shut_down(immediate)
        if immediate:
            self._cpp.shutdown(False)
            self._discard()
        elif self._tally.pending() == 0:
            self._cpp.shutdown(False)

    cdef int _discard(self) except -1:
        """Takes what is left after an immediate shutdown, and counts it as done."""
        cdef CppReceived message
        while True:
            outcome = self._cpp.try_recv(message)
            if outcome == OutcomeOk:
                self._cpp.release(message.slot, message.process, message.group)
            elif outcome != OutcomeCorrupted:
                return 0
            if self._counts:
                self._tally.finish_one()

    cdef int task_done(self) except -1:
        if not self._tally.finish_one():
            raise ValueError("task_done() called too many times")
        return 0

    cdef int join(self) except -1:
        cdef Outcome outcome
        while True:
            with nogil:
                outcome = self._tally.wait_until_finished(kForever)
            if outcome == OutcomeOk:
                return 0
            PyErr_CheckSignals()
            self._tally.forget_the_dead()
            if self._tally.is_shut_down_at_once():
                self._discard()


cdef inline int check_queue_timeout(object timeout) except -1:
    if type(timeout) not in (int, float):
        queue_deadline(timeout)
    return 0


cdef int64_t queue_deadline(object timeout) except? -1:
    """As `deadline_of`; less than no time is none, as for multiprocessing's queues."""
    if timeout is not None and type(timeout) in (int, float) and timeout < 0:
        return 0
    return deadline_of(timeout)


@cython.auto_pickle(False)
cdef class QueueEnd:
    """Base of Queue and JoinableQueue: the calls that move objects."""

    cdef QueueLink _link
    cdef readonly bint _closed
    cdef readonly bint _used
    cdef object _on_error

    def _attach(self, QueueLink link not None, on_error):
        """`on_error` gets what cannot be pickled; None raises it."""
        self._link = link
        self._on_error = on_error
        self._closed = False
        self._used = False

    def _core_link(self):
        return self._link

    cdef QueueLink _opened(self):
        if self._link is None:
            raise ValueError("the queue was never opened")
        return self._link

    def _core_close(self):
        self._closed = True

    def _core_after_fork(self):
        """As multiprocessing does it: a queue that the parent has closed is open again."""
        if self._link is not None:
            self._link.after_fork()
        self._closed = self._used = False

    cdef inline int _require_open(self) except -1:
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        if self._link is None:
            raise ValueError("the queue was never opened")
        return 0

    def put(self, obj, block=True, timeout=None):
        """Put an object into the queue.

        Parameters
        ----------
        obj : object
            Anything that multiprocessing can pickle. It is pickled before the call returns: what becomes of it afterwards
            does not reach the receiver.
        block : bool
            Whether to wait when the queue is full.
        timeout : float or None
            Seconds to wait at most; None for ever.

        Raises
        ------
        queue.Full
            The queue holds `maxsize` objects.
        ValueError
            `close()` was called in this process.
        ShutDown
            `shutdown()` was called in any process.
        MessageTooLargeError
            The pickled object is larger than `max_message_size`.
        Exception
            Whatever pickling the object raised; nothing has been put.

        Notes
        -----
        Copies once, into shared memory; into private memory where an unbounded queue has no room there. Releases the GIL
        while it waits and while it copies 64 KiB and more.
        """
        self._require_open()
        self._used = True
        self._opened().put(obj, block, timeout, self._on_error)

    def get(self, block=True, timeout=None):
        """Take an object out of the queue.

        Parameters
        ----------
        block : bool
            Whether to wait when the queue is empty.
        timeout : float or None
            Seconds to wait at most; None for ever.

        Returns
        -------
        object
            Its arrays are writable and its own; read-only views on shared memory with ``copy=False``.

        Raises
        ------
        queue.Empty
            There is none.
        ValueError
            `close()` was called in this process.
        ShutDown
            `shutdown()` was called in any process, and the queue is empty or was shut down immediately.

        Notes
        -----
        Copies once, out of shared memory. Releases the GIL while it waits and while it copies 64 KiB and more.
        """
        self._require_open()
        return self._opened().get(block, timeout)

    def put_nowait(self, obj):
        """Same as ``put(obj, False)``."""
        return self.put(obj, False)

    def get_nowait(self):
        """Same as ``get(False)``."""
        return self.get(False)

    def qsize(self):
        """Objects that have been put and not been taken, those that wait in processes for room included."""
        return self._opened().size()

    def empty(self):
        """Whether there is nothing to get. OSError when it has been closed in this process after a put."""
        if self._closed and self._used:
            raise OSError(_errno.EBADF, f"Queue {self!r} is closed")
        return self._opened()._cpp.depth() == 0

    def full(self):
        """Whether it holds `maxsize` objects."""
        return self._opened()._limit != 0 and self._link.size() >= self._link._limit

    def shutdown(self, immediate=False):
        """End the queue for all processes, as `queue.Queue.shutdown` of Python 3.13 does it for threads.

        Parameters
        ----------
        immediate : bool
            False: `put` raises ShutDown at once, and `get` when the queue is empty. True: both at once; what is in the
            queue is discarded, and counts as done.
        """
        self._opened().shutdown(immediate)

    def _core_task_done(self):
        self._opened().task_done()

    def _core_join(self):
        self._opened().join()


@cython.auto_pickle(False)
cdef class SimpleQueueEnd:
    """Base of SimpleQueue."""

    cdef QueueLink _link

    def _attach(self, QueueLink link not None):
        self._link = link

    def _core_link(self):
        return self._link

    cdef QueueLink _opened(self):
        if self._link is None:
            raise ValueError("the queue was never opened")
        return self._link

    def put(self, obj):
        """Put an object into the queue; waits while it is full. OSError when it is closed in this process."""
        self._opened().put(obj, True, None, None)

    def get(self):
        """Take an object out of the queue; waits for one. OSError when it is closed in this process."""
        return self._opened().get(True, None)

    def empty(self):
        """Whether there is nothing to get. OSError when it is closed in this process."""
        if self._opened()._closed:
            raise OSError(_errno.EBADF, "the queue is closed in this process")
        return self._opened()._cpp.depth() == 0

    def close(self):
        """End the use of the queue in this process; a second call does nothing."""
        self._opened().close()
