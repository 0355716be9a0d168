# cython: language_level=3
"""Sends a run of counters from nogil code; nothing of dsline is linked, the calls go through the cimported class."""

from libc.stdint cimport uint64_t

from dsline._core cimport Channel


def send_counters(Channel channel, uint64_t count, long long timeout_ns=-1):
    """Send 0 … count-1 as 8 bytes each; returns how many entered the channel."""
    cdef uint64_t number
    cdef uint64_t entered = 0
    with nogil:
        for number in range(count):
            entered += channel.send_nogil(&number, sizeof(number), timeout_ns)
    return entered
