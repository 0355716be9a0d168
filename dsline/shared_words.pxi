# 64-bit words that processes share, for shared_batch.py. Part of _core.pyx.

cdef extern from *:
    """
    #include <cstdint>
    namespace {
    // Sequentially consistent: whoever sets the last of several words sees the others set.
    inline std::uint64_t word_load(const std::uint64_t* at) noexcept { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
    inline bool word_exchange(std::uint64_t* at, std::uint64_t expected, std::uint64_t wanted) noexcept {
      return __atomic_compare_exchange_n(at, &expected, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    }  // namespace
    """
    uint64_t word_load(const uint64_t* at) noexcept
    bint word_exchange(uint64_t* at, uint64_t expected, uint64_t wanted) noexcept


@cython.final
cdef class SharedWords:
    """Words in a writable buffer, read and changed atomically. Keeps the buffer alive."""

    cdef uint64_t[::1] _words

    def __init__(self, memory, Py_ssize_t first, Py_ssize_t count):
        """`first` is an offset in bytes, a multiple of 8."""
        self._words = np.frombuffer(memory, np.uint64, count, first)

    cdef uint64_t* _at(self, Py_ssize_t index) except NULL:
        if not 0 <= index < self._words.shape[0]:
            raise IndexError(f"word {index} of {self._words.shape[0]}")
        return &self._words[index]

    def load(self, Py_ssize_t index):
        return word_load(self._at(index))

    def exchange(self, Py_ssize_t index, uint64_t expected, uint64_t wanted):
        """Stores `wanted` where `expected` stands; whether it stood there."""
        return word_exchange(self._at(index), expected, wanted)

    def all_match(self, Py_ssize_t first, Py_ssize_t count, Py_ssize_t start, uint64_t mask, uint64_t value):
        """Whether all `count` words from `first` on have `value` in `mask`; looks at the `start`-th of them first."""
        cdef Py_ssize_t i
        self._at(first + count - 1)
        cdef uint64_t* words = self._at(first)
        for i in range(start, count):
            if (word_load(&words[i]) & mask) != value:
                return False
        for i in range(start):
            if (word_load(&words[i]) & mask) != value:
                return False
        return True

    def replace_where(self, Py_ssize_t first, Py_ssize_t count, uint64_t mask, uint64_t value, uint64_t wanted):
        """Stores `wanted` in those of `count` words from `first` on that have `value` in `mask`."""
        cdef Py_ssize_t i
        cdef uint64_t seen
        self._at(first + count - 1)
        cdef uint64_t* words = self._at(first)
        for i in range(count):
            seen = word_load(&words[i])
            while (seen & mask) == value and not word_exchange(&words[i], seen, wanted):
                seen = word_load(&words[i])
