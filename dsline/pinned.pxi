# What views look at when a message may not stay in its slot for as long as they live.

# Where the payload of a slot begins is a multiple of this too.
cdef enum:
    COPY_ALIGNMENT = 64


cdef Lease private_copy(Lease lease):
    """A lease over memory of its own, with the same contents and layout. Copies without the GIL from 64 KiB on."""
    cdef Lease copy = Lease.__new__(Lease)
    cdef Py_ssize_t size = lease._nbytes
    cdef cnp.npy_intp room = size + COPY_ALIGNMENT
    cdef object memory = cnp.PyArray_EMPTY(1, &room, cnp.NPY_UINT8, 0)  # NumPy asks for huge pages where they pay
    cdef char* start = <char*> cnp.PyArray_DATA(memory)
    cdef char* target = start + (-<size_t> start) % COPY_ALIGNMENT
    copy_bytes(target, lease._payload, size)
    copy._memory = memory
    copy._payload = target
    copy._nbytes = size
    copy._layout = lease._layout
    copy._kind = lease._kind
    copy._sequence = lease._sequence
    copy._held = True
    return copy


cdef inline int64_t kept_by_views(Receiver receiver) noexcept:
    """Messages that only views of the handle keep, less the one that was just leased. A `Message` that is alive is not
    one of them: whoever has it says when he is done."""
    return receiver._handle.views - receiver._handle.claims - 1


cdef inline bint shows_slot(Lease lease) noexcept:
    """Whether what object_of() makes of a message can look at the slot."""
    cdef uint64_t buffers
    if lease._layout is not None:
        return True
    if lease._kind != kObjectMessage or lease._nbytes < 16:
        return False
    memcpy(&buffers, lease._payload, 8)
    return buffers != 0


cdef inline bint must_copy(Receiver receiver) noexcept:
    """Whether the message that was just leased may not stay in its slot for as long as its views live."""
    cdef int64_t others = kept_by_views(receiver)
    if receiver._budget >= 0:
        return others >= receiver._budget
    return others >= receiver._auto_budget or receiver._cpp.is_last_to_circulate()


cdef inline void note_site(Receiver receiver):
    """Remembers who received the message by which more are held than ever before."""
    cdef int64_t kept = kept_by_views(receiver) + 1
    if kept > receiver._handle.peak:
        receiver._handle.peak = kept
        try:
            receiver._handle.site = _pinned.site(_sys._getframe(0))
        except Exception:
            receiver._handle.site = None  # the message matters more


cdef inline Lease shown(Receiver receiver, Lease lease, CppReceived& message):
    """What the user gets to see of a message: the slot, or a copy for which the slot is given up."""
    if must_copy(receiver):
        return detached(receiver, lease, message, True)
    note_site(receiver)
    return lease


cdef Lease detached(Receiver receiver, Lease lease, CppReceived& message, bint may_warn):
    cdef Lease copy = copied(receiver, lease, message, may_warn)
    lease._nack = False
    lease._release()
    return copy


cdef Lease copied(Receiver receiver, Lease lease, CppReceived& message, bint may_warn):
    """A private copy of what `lease` holds. Puts the message back when it raises."""
    cdef int64_t others = kept_by_views(receiver)
    cdef bint auto = receiver._budget < 0
    cdef int64_t budget = receiver._auto_budget if auto else receiver._budget
    cdef Lease copy
    try:
        if may_warn and not receiver._warned and others > 0 and (others >= budget or others >= 2):
            receiver._warned = True
            _pinned.warn(receiver._label(), others, budget, auto, receiver._handle.site, _sys._getframe(0))
        copy = private_copy(lease)
    except:
        receiver._untake(lease, message)
        raise
    receiver._handle.forced_copies += 1
    return copy
