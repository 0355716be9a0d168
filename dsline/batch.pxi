# recv_batch: messages of one layout, copied into the rows of one array. Part of _core.pyx.

cdef Outcome take_until(Receiver receiver, CppReceived& message, int64_t deadline) except *:
    """Takes the next message, or says why there is none. `deadline` 0: does not wait."""
    cdef Outcome outcome, waited
    cdef bint spin = True, last = deadline == 0
    while True:
        outcome = receiver._cpp.try_recv(message)
        if outcome != OutcomeEmpty or last:
            return outcome
        with nogil:
            waited = receiver._cpp.wait_for_message(deadline, spin)
        spin = waited == OutcomeOk
        last = waited == OutcomeTimedOut
        receiver._between_slices()


cdef inline bint same_rows(ArrayLayout one, ArrayLayout other) except -1:
    return one is other or (one.ndim == other.ndim and one.dtype == other.dtype
                            and memcmp(one.shape, other.shape, one.ndim * sizeof(Py_ssize_t)) == 0)


@cython.final
cdef class BatchRows:
    """The rows of a batch: where the next message goes to."""

    cdef cnp.ndarray array  # (n, *shape)
    cdef ArrayLayout layout  # of a row; None while nothing has been received
    cdef Py_ssize_t n, filled
    cdef bint plain  # rows are C-contiguous

    cdef int begin(self, object dtype, tuple shape, object out) except -1:
        """Makes the array, or checks the caller's."""
        cdef tuple whole = (self.n, *shape)
        cdef int i
        cdef Py_ssize_t step
        if out is None:
            # The fields of a structured dtype can be renamed in place, so the array gets one of its own.
            self.array = np.empty(whole, dtype if dtype.names is None else dtype.newbyteorder("|"))
        else:
            if out.dtype != dtype or out.shape != whole:
                raise SchemaMismatchError(
                    f"out has dtype {out.dtype} and shape {out.shape}, the batch has {dtype} and {whole}; the messages stay in "
                    "the channel")
            self.array = out
        self.plain = True
        step = self.array.itemsize
        for i in range(self.array.ndim - 1, 0, -1):
            if cnp.PyArray_DIM(self.array, i) != 1 and cnp.PyArray_STRIDE(self.array, i) != step:
                self.plain = False
            step *= cnp.PyArray_DIM(self.array, i)
        return 0

    cdef int add(self, CppReceived& message, ArrayLayout layout) except -1:
        cdef char* row = <char*> cnp.PyArray_DATA(self.array) + self.filled * cnp.PyArray_STRIDE(self.array, 0)
        if self.plain and (not layout.fortran or layout.ndim < 2):
            copy_bytes(row, message.payload, layout.nbytes)
        else:
            PyArray_CopyInto(self.array[self.filled], layout.array_at(<void*> message.payload, None, False))
        self.filled += 1
        return 0

    cdef object taken(self):
        return self.array if self.filled == self.n else self.array[:self.filled]


cdef int check_out(object out, Py_ssize_t n) except -1:
    if not cnp.PyArray_Check(out):
        raise TypeError(f"out is a {type(out).__name__}, must be an ndarray")
    if cnp.PyArray_NDIM(out) == 0 or cnp.PyArray_DIM(out, 0) != n:
        raise InvalidArgumentError(f"out has shape {out.shape}, must have {n} rows, as many as were asked for")
    if not (<cnp.ndarray> out).flags.writeable:
        raise InvalidArgumentError("out is read-only")
    return 0


cdef object receive_batch(Receiver receiver, Py_ssize_t n, object timeout, object out):
    cdef CppReceived message
    cdef Outcome outcome
    cdef ArrayLayout layout
    cdef BatchRows rows = BatchRows.__new__(BatchRows)
    cdef int64_t deadline
    if n < 1:
        raise ValueError(f"recv_batch was asked for {n} messages, must be 1 or more")
    if not receiver._receives:
        receiver._refuse_receiving()
    if out is not None:
        check_out(out, n)
    if timeout is DEFAULT:
        timeout = receiver._timeout
    deadline = 0 if timeout is not None and timeout == 0 else deadline_of(timeout)
    rows.n = n
    kept = receiver._kept_rows
    if kept is not None:
        # Of a call that an exception ended after it had taken them.
        rows.begin(kept.dtype, kept.shape[1:], out)
        rows.filled = min(n, len(kept))
        rows.array[:rows.filled] = kept[:rows.filled]
        receiver._kept_rows = kept[rows.filled:] if rows.filled < len(kept) else None
    else:
        receiver._receive(message, timeout)
        add_first(receiver, message, rows, out)
    try:
        while rows.filled < n:
            if receiver._deferred is not None:
                break
            outcome = take_until(receiver, message, deadline)
            if outcome == OutcomeCorrupted:
                receiver._deferred = receiver._corrupted_error(message)
            if outcome != OutcomeOk:
                break
            if message.kind != kArrayMessage:
                receiver._cpp.put_back(message)
                break
            try:
                layout = receiver._layout_of(message)
                if receiver._schema is not None:
                    receiver._check_schema(layout, message)
            except CorruptedMessageError as error:
                receiver._deferred = error
                receiver._cpp.release(message.slot, message.process, message.group)
                break
            if not fits(rows, layout):
                receiver._cpp.put_back(message)
                break
            add_row(receiver, message, rows, layout)
    except:
        receiver._kept_rows = np.array(rows.array[:rows.filled])
        raise
    return rows.taken()


cdef bint fits(BatchRows rows, ArrayLayout layout) except -1:
    if rows.layout is not None:
        return same_rows(rows.layout, layout)
    if rows.array.dtype != layout.dtype or rows.array.ndim != layout.ndim + 1:
        return False
    cdef int i
    for i in range(layout.ndim):
        if cnp.PyArray_DIM(rows.array, i + 1) != layout.shape[i]:
            return False
    rows.layout = layout
    return True


cdef int add_first(Receiver receiver, CppReceived& message, BatchRows rows, object out) except -1:
    cdef ArrayLayout layout
    if message.kind != kArrayMessage:
        receiver._undo(receiver._lease(message), message)
    try:
        layout = receiver._layout_of(message)
        if receiver._schema is not None:
            receiver._check_schema(layout, message)
    except CorruptedMessageError:
        receiver._cpp.release(message.slot, message.process, message.group)
        raise
    try:
        rows.begin(layout.dtype, tuple([layout.shape[i] for i in range(layout.ndim)]), out)
    except:
        receiver._cpp.put_back(message)
        raise
    rows.layout = layout
    return add_row(receiver, message, rows, layout)


cdef int add_row(Receiver receiver, CppReceived& message, BatchRows rows, ArrayLayout layout) except -1:
    try:
        rows.add(message, layout)
    except:
        receiver._cpp.put_back(message)
        raise
    receiver._cpp.release(message.slot, message.process, message.group)
    receiver._handle.received += 1
    receiver._handle.bytes_received += message.payload_bytes
    return 0
