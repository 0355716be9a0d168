# The store behind dsline.accelerate: arrays that lie in slots until somebody asks for them by place.

from dsline._cpp.channel cimport (
    CppMemoryUse, OnDeathDrop, OutcomeEmpty, OutcomeFull, available_memory as cpp_available_memory,
)


def available_memory():
    """Bytes that shared memory may still take, by what the machine and the cgroups of this process leave."""
    return cpp_available_memory()


@cython.final
cdef class ArrayStore:
    """A handle of an anonymous channel whose messages are taken by their place, in any order, by whoever knows it.

    Made by `create` or `adopt`. Safe to share between threads; a forked child registers anew at its first call. All its
    messages are for one durable group that drops what a dead member held.
    """

    cdef shared_ptr[CppChannel] _channel

    def __dealloc__(self):
        with nogil:
            self._channel.reset()

    def __init__(self):
        raise TypeError("an ArrayStore is made by create() or adopt()")

    cdef int _require(self) except -1:
        if not self._channel:
            raise ValueError("the store was never opened")
        return 0

    @staticmethod
    def create(uint64_t limit, uint32_t slots, uint32_t handles):
        """A new store that holds up to `limit` bytes of arrays in up to `slots` slots."""
        cdef CppChannelOptions given
        cdef shared_ptr[CppChannel] first
        given.capacity = slots
        given.slot_size = 1
        given.max_message_size = limit
        given.max_handles = handles
        given.max_groups = 1
        given.default_group = 0
        with nogil:
            first = CppChannel.create_anonymous(given)
        return joined_store(first)

    @staticmethod
    def adopt(int fd):
        """Another handle of a store, from its descriptor, which is taken over."""
        cdef shared_ptr[CppChannel] first
        with nogil:
            first = CppChannel.adopt_anonymous(fd)
        return joined_store(first)

    def put(self, array):
        """Copy an array into a slot: (slot, sequence), or None where there is no room. Never waits for room.

        Copies once, an array of other strides than C or Fortran order twice. Releases the GIL. The array has no Python
        objects in it.
        """
        cdef cnp.ndarray source = array
        if not (cnp.PyArray_IS_C_CONTIGUOUS(source) or cnp.PyArray_IS_F_CONTIGUOUS(source)):
            source = np.ascontiguousarray(source)
        cdef const void* data = cnp.PyArray_DATA(source)
        cdef uint64_t size = source.nbytes
        cdef uint64_t limit = self._channel.get().max_message_size()
        cdef CppPlace place
        cdef Outcome outcome
        if size > limit:
            return None
        with nogil:
            outcome = self._channel.get().try_place(data, size, limit, place)
        if outcome == OutcomeOk:
            return place.slot, place.sequence
        if outcome == OutcomeFull or outcome == OutcomeDropped:
            return None
        raise ChannelClosedError("this handle of the store of arrays is closed")

    def take(self, uint32_t slot, uint64_t sequence, dtype, tuple shape not None, bint fortran):
        """The array that lies at a place, in memory of its own, and the slot is free; None when it is not there any more.

        Copies once, with the GIL released.
        """
        # Before the slot is taken: without memory the array stays where it is.
        cdef cnp.ndarray out = np.empty(shape, dtype, "F" if fortran else "C")
        cdef void* data = cnp.PyArray_DATA(out)
        cdef uint64_t size = out.nbytes
        cdef CppPlace place
        cdef Outcome outcome
        place.slot = slot
        place.sequence = sequence
        with nogil:
            outcome = self._channel.get().try_take_into(place, data, size)
        if outcome == OutcomeOk:
            return out
        if outcome == OutcomeEmpty:
            return None
        if outcome == OutcomeCorrupted:
            raise CorruptedMessageError("the array in shared memory is damaged, or not the one that the pickle speaks of")
        raise ChannelClosedError("this handle of the store of arrays is closed")

    def discard_older(self, int64_t before_ns):
        """Drop what was put before `before_ns` (nanoseconds since the epoch) and not taken; how many."""
        self._require()
        cdef uint32_t dropped
        with nogil:
            self._channel.get().check_peers()
            dropped = self._channel.get().discard_older(before_ns)
        return dropped

    def trim(self):
        """Give the memory of free slots back."""
        self._require()
        with nogil:
            self._channel.get().trim()

    def close(self):
        """End this handle; a second call does nothing."""
        self._require()
        self._channel.get().refuse_calls()
        with nogil:
            self._channel.get().close()

    def use(self):
        """(slots in use, their bytes, bytes of free slots), all handles together."""
        self._require()
        cdef CppMemoryUse use = self._channel.get().memory_use()
        return use.used_slots, use.used_bytes, use.idle_bytes

    @property
    def descriptor(self):
        """Of the shared bytes; it stays the store's."""
        self._require()
        return self._channel.get().descriptor()

    @property
    def uuid(self):
        """32 hexadecimal digits that name the store for ever."""
        self._require()
        return self._channel.get().uuid().decode()

    @property
    def limit(self):
        """Bytes of arrays that it holds at most."""
        self._require()
        return self._channel.get().max_message_size()

    @property
    def slots(self):
        """Arrays that it holds at most."""
        self._require()
        return self._channel.get().capacity()


cdef ArrayStore joined_store(shared_ptr[CppChannel] first):
    cdef ArrayStore store = ArrayStore.__new__(ArrayStore)
    cdef CppSubscribeOptions given
    given.group = b"arrays"
    given.on_death = OnDeathDrop
    given.durable = True
    with nogil:
        store._channel = first.get().subscribe(given)
        first.get().close()
        first.reset()
    return store
