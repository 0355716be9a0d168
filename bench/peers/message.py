"""What every peer sends and how a receiver proves that it got it.

The messages are those of `dsline.bench.Payloads`: a pseudo-random filler with the message's number in its
first 8 bytes. Up to 512 B they are bytes objects, from 4 KiB on uint8 arrays, because that is what users
send.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsline.bench import STAMP_FROM, Payloads

ARRAYS_FROM = 4096


def payloads(size: int, *, copied_at_send: bool) -> Payloads:
    """Return the messages of a run.

    From 64 KiB on one hot buffer is numbered in place, but only for a transport that has copied it when send
    returns; the others get three messages in turn.
    """
    kind = "array" if size >= ARRAYS_FROM else "bytes"
    stamped = copied_at_send and size >= STAMP_FROM
    return Payloads(size, kind, stamped=stamped, pool=3 if size >= STAMP_FROM else 7)


def toucher(touch: str) -> Callable[[Any], Any] | None:
    """Return what a receiver does with each message: nothing, or read every byte once."""
    if touch == "none":
        return None
    return lambda message: np.add.reduce(np.frombuffer(message, np.uint64))
