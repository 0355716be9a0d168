"""wait: several channels at once, with sockets and connections among them."""

from __future__ import annotations

import select
import time
from collections.abc import Iterable
from typing import Any

from dsline import _core
from dsline.endpoint import Endpoint
from dsline.errors import InvalidArgumentError

__all__ = ["wait"]


def wait(objects: Iterable[Any], timeout: float | None = None, *, for_send: bool = False) -> list[Any]:
    """Wait until one of several channels has a message, as `multiprocessing.connection.wait` does for connections.

    Parameters
    ----------
    objects : iterable
        Channels and subscribers; also sockets, connections, other objects with a ``fileno()``, and file numbers.
    timeout : float or None
        Seconds to wait: None for ever, 0 not at all.
    for_send : bool
        Wait until one of them has room to send instead (a file is writable).

    Returns
    -------
    list
        Those that are ready, in the order given; empty when the time is up, or nothing was given. A channel counts as
        ready, too, when it is closed or shut down (and drained): the next call on it raises ChannelClosedError at once.

    Raises
    ------
    FeatureUnavailableError
        One of them is a Broadcast, which only its subscribers receive from.
    TypeError
        One of them is neither a channel nor has a ``fileno()``.

    Notes
    -----
    Takes nothing: another receiver may take the message meanwhile, so receive by ``recv_nowait()`` or with a timeout.
    Copies nothing, and releases the GIL while it waits. Looks after the dead as `recv` does. Signal handlers run within 50 ms.

    Examples
    --------
    >>> import dsline
    >>> with dsline.ShmChannel(capacity=4, slot_size=64) as a, dsline.ShmChannel(capacity=4, slot_size=64) as b:
    ...     _ = b.send(b"here")
    ...     dsline.wait([a, b]) == [b]
    True
    """
    given = list(objects)
    check_timeout(timeout)
    if not given:
        return []
    if all(isinstance(each, Endpoint) for each in given):
        found = _core.wait_any(given, for_send, timeout)
        if found is not None:
            return [given[position] for position in found]
    return _wait_by_poll(given, timeout, for_send)


def check_timeout(timeout: float | None) -> None:
    """Raise unless it is a number of seconds, 0 or more, or None."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout is a {type(timeout).__name__}, must be a number of seconds or None")
    if not timeout >= 0:
        raise InvalidArgumentError(
            f"timeout is {timeout!r}, must be 0 or more seconds, or None to wait for ever"
        )


def _file_number(thing: Any) -> int:
    number = thing
    if not isinstance(thing, int):
        try:
            number = thing.fileno()
        except AttributeError:
            raise TypeError(
                f"cannot wait for a {type(thing).__name__}: it is no channel and has no fileno()"
            ) from None
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"fileno() gave a {type(number).__name__}, must be an int")
    if number < 0:
        raise InvalidArgumentError(f"the file number is {number}, must be 0 or more: is it closed?")
    return number


def _wait_by_poll(given: list[Any], timeout: float | None, for_send: bool) -> list[Any]:
    """As `wait`, by descriptors: for a mix of things, more than the kernel's limit, and kernels that are too old."""
    deadline = None if timeout is None else time.monotonic() + timeout
    channels = [each for each in given if isinstance(each, Endpoint)]
    poll = select.poll()
    files: dict[int, int] = {}  # position in `given`: file number
    for position, each in enumerate(given):
        if not isinstance(each, Endpoint):
            files[position] = _file_number(each)
            poll.register(files[position], select.POLLOUT if for_send else select.POLLIN | select.POLLPRI)
    # What a handle has for its fileno() stays with it, and calling that arms it; for room there is none.
    watches = [_core.Watch(each, True) for each in channels] if for_send else []
    for each in watches or channels:
        poll.register(each.fileno(), select.POLLIN)
    while True:
        for watch in watches:
            watch.arm()
        if not watches:
            for each in channels:
                each.fileno()
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = dict(poll.poll(None if left is None else left * 1000))
        for number, events in ready.items():
            if events & select.POLLNVAL:
                raise InvalidArgumentError(f"file number {number} is not open")
        # Where the kernel can only be asked about all at once a channel may have been drained again meanwhile.
        found = _core.wait_any(channels, for_send, 0) if channels else []
        having = {id(channels[position]) for position in found or ()}
        result = [
            each
            for position, each in enumerate(given)
            if (files[position] in ready if position in files else id(each) in having)
        ]
        if result or left == 0:
            return result
