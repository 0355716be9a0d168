# Counters of one stage in one worker, in memory that others read, for dataflow/counters.py. Part of _core.pyx.
#
# One writer per page, so that a change is a load and a store; both are of whole words, so that a reader sees each word as it
# was at some moment, also after the writer has died in the middle. Of the words that say what the writer is doing, the
# time is stored before the sequence and the sequence is taken away before the time: whoever reads sequence, time and
# the same sequence again has the time of that item, or a later one.

cdef extern from *:
    """
    #include <bit>
    #include <cstdint>
    namespace {
    inline std::uint64_t counter_load(const std::uint64_t* at) noexcept { return __atomic_load_n(at, __ATOMIC_RELAXED); }
    inline void counter_store(std::uint64_t* at, std::uint64_t value) noexcept {
      __atomic_store_n(at, value, __ATOMIC_RELEASE);
    }
    inline void counter_add(std::uint64_t* at, std::uint64_t value) noexcept {
      __atomic_store_n(at, __atomic_load_n(at, __ATOMIC_RELAXED) + value, __ATOMIC_RELAXED);
    }
    inline void counter_load_all(const std::uint64_t* from, std::uint64_t* to, std::ptrdiff_t count) noexcept {
      for (std::ptrdiff_t i = 0; i < count; ++i) to[i] = __atomic_load_n(from + i, __ATOMIC_ACQUIRE);
    }
    // Two buckets for each power of two from 32 ns on; the first and the last take what is beyond.
    inline unsigned latency_bucket(std::uint64_t ns) noexcept {
      if (ns < 32) return 0;
      const unsigned power = static_cast<unsigned>(std::bit_width(ns)) - 1;
      const unsigned bucket = 2 * (power - 5) + static_cast<unsigned>((ns >> (power - 1)) & 1);
      return bucket < 64 ? bucket : 63;
    }
    }  // namespace
    """
    uint64_t counter_load(const uint64_t* at) noexcept
    void counter_store(uint64_t* at, uint64_t value) noexcept
    void counter_add(uint64_t* at, uint64_t value) noexcept
    void counter_load_all(const uint64_t* source, uint64_t* to, ptrdiff_t count) noexcept
    unsigned latency_bucket(uint64_t ns) noexcept

# Words of a page. Counted in 128-byte lines (16 words): what changes with every item lies in the first two and in one
# bucket.
cdef enum:
    COUNTER_INCARNATIONS = 0  # writers so far, each after the end of the one before
    COUNTER_PID = 1
    COUNTER_CURRENT = 2  # sequence of the current item plus 1; 0: none
    COUNTER_STARTED = 3  # when the current item began, later by the time it was blocked
    COUNTER_SINCE = 4  # of what is going on now, later by what has been accounted elsewhere meanwhile
    COUNTER_BLOCKED_SINCE = 5  # 0: not blocked
    COUNTER_MAX = 6  # longest item
    COUNTER_BEGAN = 7  # when the current item began, whatever happened since
    COUNTER_FIRST = 16  # the fixed counters, in the order of COUNTER_NAMES
    COUNTER_IN = 16
    COUNTER_OUT = 17
    COUNTER_ROWS_IN = 18
    COUNTER_ROWS_OUT = 19
    COUNTER_BYTES_IN = 20
    COUNTER_BYTES_OUT = 21
    COUNTER_BUSY = 22
    COUNTER_STARVED = 23
    COUNTER_BLOCKED = 24
    COUNTER_HISTOGRAM = 64
    COUNTER_OWN = 128  # counters with names of the user's
    COUNTER_OWN_STRIDE = 5  # four words of name, then the number
    COUNTER_OWN_NUMBER = 24
    COUNTER_WORDS = 256

COUNTER_NAMES = (
    "in", "out", "rows_in", "rows_out", "bytes_in", "bytes_out", "busy_ns", "starved_ns", "blocked_ns", "errors", "skipped",
    "retried", "dead_letters", "dropped", "duplicates", "lost", "late",
)
COUNTER_PAGE_BYTES = COUNTER_WORDS * 8
COUNTER_PLACES = {
    "incarnations": COUNTER_INCARNATIONS, "pid": COUNTER_PID, "current": COUNTER_CURRENT, "started": COUNTER_STARTED,
    "since": COUNTER_SINCE, "blocked_since": COUNTER_BLOCKED_SINCE, "max": COUNTER_MAX, "began": COUNTER_BEGAN,
    "first": COUNTER_FIRST,
    "histogram": COUNTER_HISTOGRAM, "own": COUNTER_OWN, "own_stride": COUNTER_OWN_STRIDE, "own_number": COUNTER_OWN_NUMBER,
}
cdef dict counter_places = {name: COUNTER_FIRST + place for place, name in enumerate(COUNTER_NAMES)}


def load_counters(memory, Py_ssize_t first, Py_ssize_t count):
    """`count` words from byte `first` of a buffer on, each read whole, as an array of its own."""
    cdef const uint64_t[::1] words = np.frombuffer(memory, np.uint64, count, first)
    cdef cnp.ndarray out = np.empty(count, np.uint64)
    counter_load_all(&words[0], <uint64_t*> cnp.PyArray_DATA(out), count)
    return out


def bucket_of_latency(uint64_t ns):
    """Number of the bucket that counts an item of `ns` nanoseconds."""
    return latency_bucket(ns)


cdef class CounterPage:
    """The writer of a page. One thread at a time calls it.

    A page that is not the first of its worker has an `outer`: the stage whose item is being processed when this one's
    begins. The time of the inner item is not the outer's.
    """

    cdef uint64_t[::1] _memory
    cdef uint64_t* _words
    cdef CounterPage _outer
    cdef CounterPage _root
    cdef uint64_t* _active  # of a root: the innermost page with an item, or its own
    cdef uint64_t* _blocked_at  # of a root: the page that is blocked
    cdef dict _places
    cdef uint64_t _rows
    cdef uint64_t _bytes

    def __init__(self, memory, Py_ssize_t first, CounterPage outer=None):
        self._memory = np.frombuffer(memory, np.uint64, COUNTER_WORDS, first)
        self._words = &self._memory[0]
        self._outer = outer
        self._root = self if outer is None else outer._root
        self._active = self._words
        self._places = dict(counter_places)
        cdef Py_ssize_t i
        cdef char* name
        for i in range(COUNTER_OWN_NUMBER):
            name = <char*> &self._words[COUNTER_OWN + i * COUNTER_OWN_STRIDE]
            if name[0]:
                self._places[name[:31].split(b"\0")[0].decode()] = COUNTER_OWN + i * COUNTER_OWN_STRIDE + 4
        # What a dead writer was about is over.
        counter_store(&self._words[COUNTER_CURRENT], 0)
        counter_store(&self._words[COUNTER_BLOCKED_SINCE], 0)
        counter_store(&self._words[COUNTER_SINCE], <uint64_t> monotonic_ns())
        counter_store(&self._words[COUNTER_PID], <uint64_t> _os.getpid())
        counter_add(&self._words[COUNTER_INCARNATIONS], 1)

    cdef int _ready(self) except -1:
        if self._words == NULL:
            raise ValueError("the page of counters was never opened")
        return 0

    def begin(self, int64_t sequence, uint64_t rows=0, uint64_t nbytes=0):
        """An item begins; the time since the last end was spent waiting for it."""
        self._ready()
        cdef uint64_t* words = self._words
        cdef int64_t now = monotonic_ns()
        cdef int64_t idle = now - <int64_t> words[COUNTER_SINCE]
        self._rows = rows
        self._bytes = nbytes
        if self._outer is None and idle > 0:
            counter_add(&words[COUNTER_STARVED], <uint64_t> idle)
        counter_store(&words[COUNTER_STARTED], <uint64_t> now)
        counter_store(&words[COUNTER_SINCE], <uint64_t> now)
        counter_store(&words[COUNTER_BEGAN], <uint64_t> now)
        counter_store(&words[COUNTER_CURRENT], <uint64_t> sequence + 1)
        self._root._active = words

    def end(self, uint64_t out=1, uint64_t rows=0, uint64_t nbytes=0):
        """The item has been processed and gave `out` results of `rows` rows and `nbytes` bytes in all."""
        self._ready()
        cdef uint64_t* words = self._words
        if words[COUNTER_CURRENT] == 0:
            raise ValueError("end() without begin(): no item is being counted")
        cdef int64_t now = monotonic_ns()
        cdef int64_t busy = now - <int64_t> words[COUNTER_SINCE]
        if busy < 0:
            busy = 0
        counter_store(&words[COUNTER_CURRENT], 0)
        counter_store(&words[COUNTER_SINCE], <uint64_t> now)
        counter_add(&words[COUNTER_BUSY], <uint64_t> busy)
        counter_add(&words[COUNTER_HISTOGRAM + latency_bucket(<uint64_t> busy)], 1)
        if <uint64_t> busy > words[COUNTER_MAX]:
            counter_store(&words[COUNTER_MAX], <uint64_t> busy)
        counter_add(&words[COUNTER_IN], 1)
        counter_add(&words[COUNTER_OUT], out)
        if self._rows:
            counter_add(&words[COUNTER_ROWS_IN], self._rows)
        if self._bytes:
            counter_add(&words[COUNTER_BYTES_IN], self._bytes)
        if rows:
            counter_add(&words[COUNTER_ROWS_OUT], rows)
        if nbytes:
            counter_add(&words[COUNTER_BYTES_OUT], nbytes)
        self._leave(now)

    def abandon(self):
        """The item ends without being counted: it will come again, or it was none. Its time counts as busy."""
        self._ready()
        cdef uint64_t* words = self._words
        if words[COUNTER_CURRENT] == 0:
            return
        cdef int64_t now = monotonic_ns()
        cdef int64_t busy = now - <int64_t> words[COUNTER_SINCE]
        counter_store(&words[COUNTER_CURRENT], 0)
        counter_store(&words[COUNTER_SINCE], <uint64_t> now)
        if busy > 0:
            counter_add(&words[COUNTER_BUSY], <uint64_t> busy)
        self._leave(now)

    cdef void _leave(self, int64_t now) noexcept:
        if self._outer is None:
            self._active = self._words
            return
        counter_add(&self._outer._words[COUNTER_SINCE], <uint64_t> now - self._words[COUNTER_BEGAN])
        self._root._active = self._outer._words

    def starved(self, uint64_t ns):
        """`ns` of the time that has just gone by were spent waiting for input, whatever was going on.

        They belong to the innermost stage that has an item; so do those of `blocked`.
        """
        self._ready()
        self._waited(self._root._active, COUNTER_STARVED, ns)

    def blocked(self, uint64_t ns):
        """`ns` of the time that has just gone by were spent waiting for room in the output, whatever was going on."""
        self._ready()
        self._waited(self._root._active, COUNTER_BLOCKED, ns)

    cdef void _waited(self, uint64_t* words, Py_ssize_t what, uint64_t ns) noexcept:
        cdef uint64_t* root = self._root._words
        counter_add(&words[what], ns)
        counter_add(&words[COUNTER_SINCE], ns)
        # Whoever looks for hanging items must not find one that waits for others.
        if root[COUNTER_CURRENT]:
            counter_add(&root[COUNTER_STARTED], ns)

    def blocking(self):
        """The writer begins to wait for room: readers see it from now on. Ends with `unblocked`."""
        self._ready()
        if self._root._blocked_at == NULL:
            self._root._blocked_at = self._root._active
            counter_store(&self._root._blocked_at[COUNTER_BLOCKED_SINCE], <uint64_t> monotonic_ns())

    def unblocked(self):
        """There is room again."""
        self._ready()
        cdef uint64_t* words = self._root._blocked_at
        if words == NULL:
            return
        self._root._blocked_at = NULL
        # The time of the item first: a reader in between must not see an item that hangs.
        self._waited(words, COUNTER_BLOCKED, <uint64_t> monotonic_ns() - words[COUNTER_BLOCKED_SINCE])
        counter_store(&words[COUNTER_BLOCKED_SINCE], 0)

    def passed(self, uint64_t items=1, uint64_t out=1, uint64_t rows_in=0, uint64_t rows_out=0):
        """Count items of a stage whose time nobody takes."""
        self._ready()
        counter_add(&self._words[COUNTER_IN], items)
        counter_add(&self._words[COUNTER_OUT], out)
        counter_add(&self._words[COUNTER_ROWS_IN], rows_in)
        counter_add(&self._words[COUNTER_ROWS_OUT], rows_out)

    def add(self, str name not None, uint64_t number=1):
        """Add to a counter of COUNTER_NAMES, or to one with a name of its own, which is made at its first use.

        A page has room for 24 of those, with names of up to 31 bytes; what does not fit is counted under "other".
        """
        self._ready()
        place = self._places.get(name)
        if place is None:
            place = self._new_place(name)
        counter_add(&self._words[<Py_ssize_t> place], number)

    def get(self, str name not None):
        """What a counter stands at; 0 where there is none of that name."""
        self._ready()
        place = self._places.get(name)
        return 0 if place is None else counter_load(&self._words[<Py_ssize_t> place])

    cdef object _new_place(self, str name):
        cdef bytes text = name.encode("utf-8", "replace")
        cdef bytes padded
        cdef uint64_t head
        cdef Py_ssize_t i
        cdef char* at
        if not text or len(text) > 31 or b"\0" in text:
            text = b"other"
        for i in range(COUNTER_OWN_NUMBER):
            at = <char*> &self._words[COUNTER_OWN + i * COUNTER_OWN_STRIDE]
            if i == COUNTER_OWN_NUMBER - 1:
                text = b"other"
            if at[0] == 0:
                # The first word last: a name whose first byte is there is whole.
                padded = text.ljust(32, b"\0")
                memcpy(at + 8, PyBytes_AS_STRING(padded) + 8, 24)
                memcpy(&head, PyBytes_AS_STRING(padded), 8)
                counter_store(<uint64_t*> at, head)
            elif at[:31].split(b"\0")[0] != text:
                continue
            place = COUNTER_OWN + i * COUNTER_OWN_STRIDE + 4
            self._places[name] = place
            return place
