from libc.stddef cimport size_t
from libc.stdint cimport uint32_t


cdef extern from "dsline/crc32c.hpp" namespace "dsline" nogil:
    uint32_t crc32c(const void*, size_t, uint32_t) noexcept
