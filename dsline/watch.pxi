# Waiting for many things at once: part of _core.pyx.

@cython.final
cdef class Watch:
    """A descriptor that becomes readable when a handle has a message, or room; see cpp/include/dsline/watch.hpp.

    Keeps the handle's memory. None of its calls waits for others.
    """

    def __cinit__(self, Receiver receiver not None, bint for_room):
        require_open(receiver)
        if not for_room and not receiver._receives:
            receiver._refuse_receiving()
        self._cpp.reset(new CppWatch(receiver._handle._channel, SideRoom if for_room else SideMessage))

    def __dealloc__(self):
        with nogil:
            self._cpp.reset()

    def fileno(self):
        """The descriptor; valid as long as this object."""
        return self._cpp.get().descriptor()

    def arm(self):
        """Make it unreadable and watch; True when it is readable again at once."""
        return self._cpp.get().arm()

    def clear(self):
        """Make it unreadable."""
        self._cpp.get().clear()


def wait_any(list receivers not None, bint for_room, timeout):
    """Positions of the handles that have a message (or room), or have ended, after waiting for the first of them.

    Empty when the time is up; None where so many cannot be waited for, and none has anything now.
    """
    cdef vector[CppWaited] waited
    cdef CppWaited one
    cdef Receiver receiver
    cdef Outcome outcome
    cdef size_t i
    cdef bint spin = True
    cdef int64_t deadline = deadline_of(timeout)
    one.side = SideRoom if for_room else SideMessage
    for receiver in receivers:
        require_open(receiver)
        if not for_room and not receiver._receives:
            receiver._refuse_receiving()
        one.channel = receiver._cpp
        waited.push_back(one)
    cdef bint at_once = deadline != kForever and deadline <= monotonic_ns()
    cdef bint too_many = waited.size() > most_waited()
    while True:
        with nogil:
            outcome = wait_for_any(waited.data(), waited.size(), 0 if at_once or too_many else deadline, spin)
        if outcome == OutcomeOk:
            return [i for i in range(waited.size()) if waited[i].is_ready]
        if too_many and not at_once:
            return None
        spin = False
        PyErr_CheckSignals()
        for receiver in receivers:
            receiver._between_slices()
        if outcome == OutcomeTimedOut:
            return []


def pretend_no_futex_waitv(bint pretend):
    """For tests: do without the system call, as on kernels before Linux 5.16."""
    pretend_old_kernel(pretend)
