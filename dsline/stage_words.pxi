# How far a stage of a pipeline is: words that its workers share. Part of _core.pyx; the protocol is in
# cpp/include/dsline/stage_words.hpp and docs/design/stage-commit.md.

from dsline._cpp.stage_words cimport CppStageWords, kMostInputs as kMostStageInputs

import multiprocessing.context as _mp_context
import multiprocessing.reduction as _mp_reduction
import time as _stage_time

cdef enum:
    MOST_STAGE_INPUTS = 256  # kMostStageInputs

if kMostStageInputs != MOST_STAGE_INPUTS:
    raise ImportError("dsline._core and its headers disagree about the inputs of a stage")


@cython.final
cdef class StageWords:
    """Words that the workers of a stage share: made by `create` or `adopt`.

    Calls neither copy nor block unless they say so. Pickled while a process is being started, or over a connection of
    multiprocessing. Safe to share between threads and processes.

    Attributes
    ----------
    inputs, outputs : int
    tickets : int
        Size of the ring of tickets; 0 for an ordered stage.
    """

    cdef shared_ptr[CppStageWords] _shared
    cdef CppStageWords* _cpp
    cdef readonly uint32_t inputs
    cdef readonly uint32_t outputs
    cdef readonly uint32_t tickets

    def __init__(self):
        raise TypeError("StageWords are made by create() or adopt()")

    @staticmethod
    def create(uint32_t inputs, uint32_t outputs, *, uint32_t tickets=0):
        """New words, all zero. `tickets`: an unordered stage, which has one input; rounded up to a power of two."""
        cdef shared_ptr[CppStageWords] shared
        if tickets != 0 and inputs != 1:
            raise InvalidArgumentError(f"an unordered stage has {inputs} inputs, must be 1")
        with nogil:
            shared = CppStageWords.create(inputs, outputs, tickets)
        return stage_words_of(shared)

    @staticmethod
    def adopt(int fd):
        """The words behind a descriptor of another process, which is taken over."""
        cdef shared_ptr[CppStageWords] shared
        with nogil:
            shared = CppStageWords.adopt(fd)
        return stage_words_of(shared)

    def __reduce__(self):
        if _mp_context.get_spawning_popen() is None:
            raise FeatureUnavailableError(
                "the words of a stage can be pickled only while a process is being started, or over a connection of "
                "multiprocessing")
        return reduce_stage_words(self)

    @property
    def descriptor(self):
        """Of the shared bytes; it stays the object's."""
        return self._cpp.descriptor()

    cdef int _check(self, uint32_t number, uint32_t count, str what) except -1:
        if self._cpp == NULL:
            raise ValueError("the words of the stage were never opened")
        if number >= count:
            raise IndexError(f"{what} {number} of {count}")
        return 0

    cdef int _check_tickets(self) except -1:
        self._check(0, 1, "stage")
        if self.tickets == 0:
            raise InvalidArgumentError("the stage is ordered: it has no tickets; create its words with tickets=N")
        return 0

    # --- turns ---------------------------------------------------------------------------------------------------

    def done(self, uint32_t input):
        """Next sequence of the input to be committed; of an unordered stage the next ticket."""
        self._check(input, self.inputs, "input")
        return self._cpp.done(input)

    def set_done(self, uint32_t input, uint64_t value):
        """Where the stage begins, while nobody else uses the words."""
        self._check(input, self.inputs, "input")
        self._cpp.set_done(input, value)

    def commit(self, uint32_t input, uint64_t value):
        """Everything before `value` is out: the turn passes on. Never goes back."""
        self._check(input, self.inputs, "input")
        self._cpp.commit(input, value)

    def skip_lost(self, uint32_t input, uint64_t value):
        """Pass the turn of a message that is gone for ever, and count it; False when it is not the turn of `value`.

        After `settle` of all outputs, which says whether it is out after all; then `commit` is right.
        """
        self._check(input, self.inputs, "input")
        return self._cpp.skip_lost(input, value)

    def lost(self, uint32_t input):
        """How many were skipped."""
        self._check(input, self.inputs, "input")
        return self._cpp.lost(input)

    def wait_turn(self, uint32_t input, uint64_t value, timeout):
        """Whether ``done(input) >= value`` within `timeout` seconds (None: for ever).

        Releases the GIL while it waits; Ctrl-C ends it within 50 ms. Who gets False looks after the dead and whether somebody
        still works on the message whose turn it is: see docs/design/stage-commit.md.
        """
        self._check(input, self.inputs, "input")
        if self._cpp.done(input) >= value:
            return True
        cdef int64_t deadline = deadline_of(timeout)
        cdef Outcome outcome
        cdef bint spin = True
        while True:
            with nogil:
                outcome = self._cpp.wait_turn(input, value, deadline, spin)
            if outcome == OutcomeOk:
                return True
            spin = False
            PyErr_CheckSignals()
            if outcome == OutcomeTimedOut:
                return False

    def intend(self, uint32_t output, uint64_t position, uint64_t offset, *done_after):
        """Before publishing at `position`: it will mean that `offset` outputs of the message whose turn it is are out, and
        that ``done(i)`` is ``done_after[i]``. Requires: it is the caller's turn."""
        self._intend(output, position, offset, done_after)

    cdef int _intend(self, uint32_t output, uint64_t position, uint64_t offset, tuple done_after) except -1:
        cdef uint64_t after[MOST_STAGE_INPUTS]
        cdef uint32_t i
        self._check(output, self.outputs, "output")
        if <uint32_t> len(done_after) != self.inputs:
            raise ValueError(f"{len(done_after)} values of done for {self.inputs} inputs")
        for i in range(self.inputs):
            after[i] = done_after[i]
        self._cpp.intend(output, position, offset, after)
        return 0

    def begin(self, uint32_t output, Receiver outbox not None, uint64_t offset, *done_after):
        """`intend` for the next position of `outbox`, which is returned. Requires: it is the caller's turn, and it, or who
        had the turn before it, has settled the output."""
        require_open(outbox)
        cdef uint64_t position = outbox._cpp.end_of_order()
        self._intend(output, position, offset, done_after)
        return position

    def intended(self, uint32_t output, uint64_t position):
        """(offset, done_after) that was intended for a position; None when there is no such intent any more."""
        cdef uint64_t after[MOST_STAGE_INPUTS]
        cdef uint64_t offset = 0
        cdef uint32_t i
        self._check(output, self.outputs, "output")
        if not self._cpp.intended(output, position, offset, after):
            return None
        return offset, tuple([after[i] for i in range(self.inputs)])

    def settle(self, uint32_t output, Receiver outbox not None):
        """How far an output is, for who takes a turn that a dead process may have begun.

        Waits until nobody is between publication and order in `outbox`, looking after the dead meanwhile; then
        (offset, done_after) of its last message, None where there is none. Requires: the processes that published before
        are dead or have committed.
        """
        require_open(outbox)
        cdef uint64_t end
        while outbox._cpp.anyone_entering():
            if outbox._cpp.is_closed():
                raise outbox._closed_error()
            with nogil:
                outbox._cpp.check_peers()
            if outbox._cpp.anyone_entering():
                PyErr_CheckSignals()
                _stage_time.sleep(0.001)  # the kernel is still ending it, or somebody else recovers it
        end = outbox._cpp.end_of_order()
        return None if end == 0 else self.intended(output, end - 1)

    # --- tickets -------------------------------------------------------------------------------------------------

    def draw_ticket(self, Receiver inbox not None, uint64_t sequence, timeout, bint control=False):
        """Draw the next ticket for a message that this process holds, and that has none; None when it cannot be yet.

        Waits up to `timeout` seconds, releases the GIL meanwhile, and looks after the dead of `inbox`. A ticket cannot be
        drawn while a control frame before the message is not released, or, of a control frame, any message before it; or
        while the message of the ticket that many before is not released.
        """
        self._check_tickets()
        require_open(inbox)
        cdef uint64_t ticket = 0
        cdef int64_t deadline = deadline_of(timeout)
        cdef Outcome outcome
        cdef bint spin = True
        outcome = self._cpp.draw(inbox._cpp[0], sequence, control, ticket, 0, False)
        while outcome != OutcomeOk:
            with nogil:
                outcome = self._cpp.draw(inbox._cpp[0], sequence, control, ticket, deadline, spin)
            if outcome == OutcomeOk:
                break
            spin = False
            PyErr_CheckSignals()
            with nogil:
                inbox._cpp.check_peers()
            if outcome == OutcomeTimedOut:
                return None
        return ticket

    def find_ticket(self, uint64_t sequence):
        """The ticket that was drawn for a message before, None where none was. Requires: this process holds the message."""
        self._check_tickets()
        cdef uint64_t ticket = 0
        return ticket if self._cpp.find(sequence, ticket) else None

    def sequence_of(self, uint64_t ticket):
        """The message of a ticket from ``done(0)`` on; None where it is not drawn."""
        self._check_tickets()
        cdef uint64_t sequence = 0
        return sequence if self._cpp.sequence_of(ticket, sequence) else None

    def acknowledged(self):
        """After the release of a message of an unordered stage: wakes who waits for a ticket."""
        self._check(0, self.inputs, "input")
        self._cpp.acknowledged()


cdef StageWords stage_words_of(shared_ptr[CppStageWords] shared):
    cdef StageWords words = StageWords.__new__(StageWords)
    words._shared = shared
    words._cpp = shared.get()
    words.inputs = words._cpp.inputs()
    words.outputs = words._cpp.outputs()
    words.tickets = words._cpp.tickets()
    return words


def _stage_words_from(duplicate):
    return StageWords.adopt(duplicate.detach())


def reduce_stage_words(StageWords words not None):
    words._check(0, 1, "stage")
    return _stage_words_from, (_mp_reduction.DupFd(words._cpp.descriptor()),)


_mp_reduction.ForkingPickler.register(StageWords, reduce_stage_words)
