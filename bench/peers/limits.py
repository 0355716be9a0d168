"""Bounds in one process: copying into warm shared memory, and calling a method that does nothing."""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import time

import numpy as np
from peers.message import ARRAYS_FROM, payloads
from peers.peer import SIZES, Limit, Spec


def memcpy(slots: int, spec: Spec) -> float:
    """Copy the message into `slots` slots of a shared mapping in turn; every page is present beforehand."""
    stride = -(-spec.size // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = os.memfd_create("dsline-bench")
    try:
        os.ftruncate(descriptor, stride * slots)
        mapping = mmap.mmap(descriptor, stride * slots)
    finally:
        os.close(descriptor)
    room = np.frombuffer(mapping, np.uint8)
    cells = [room[index * stride : index * stride + spec.size] for index in range(slots)]
    source = payloads(spec.size, copied_at_send=True).make(0)
    copy = np.copyto
    for cell in itertools.islice(itertools.cycle(cells), 2 * slots + 14):
        copy(cell, source)
    start = time.monotonic_ns()
    for cell in itertools.islice(itertools.cycle(cells), spec.count):
        copy(cell, source)
    seconds = (time.monotonic_ns() - start) / 1e9
    if not all(np.array_equal(cell, source) for cell in cells):
        raise RuntimeError("memcpy: the copy differs")
    return seconds


def empty_call(spec: Spec) -> float:
    """Call a method written in C that does nothing: list.clear of an empty list."""
    call = [].clear  # type: ignore[var-annotated]
    start = time.monotonic_ns()
    for _ in itertools.repeat(None, spec.count):
        call()
    return (time.monotonic_ns() - start) / 1e9


_COPIED = tuple(size for size in SIZES if size >= ARRAYS_FROM)
LIMITS = [
    Limit(
        "memcpy, 1 warm slot",
        "limit: numpy.copyto into a shared mapping",
        functools.partial(memcpy, 1),
        _COPIED,
    ),
    Limit(
        "memcpy, 2 warm slots",
        "limit: numpy.copyto into a shared mapping",
        functools.partial(memcpy, 2),
        _COPIED,
    ),
    Limit("empty method call", "limit: list.clear of an empty list", empty_call, (8,)),
]
