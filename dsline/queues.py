"""Queue, JoinableQueue and SimpleQueue: multiprocessing's queues over shared memory, to be put in their place.

The calls that move objects are in `_core` (queues.pxi). Here is what the queues are made of, and how they travel to other
processes and end with this one.
"""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.queues
import multiprocessing.reduction
import multiprocessing.util
import os
import queue
import threading
import time
import types
import weakref
from queue import Empty, Full
from typing import Any

from dsline import _core
from dsline.channel import ShmChannel
from dsline.errors import InvalidArgumentError, SharedMemoryFullError

__all__ = ["Empty", "Full", "JoinableQueue", "Queue", "ShutDown", "SimpleQueue"]

if hasattr(queue, "ShutDown"):
    ShutDown: type[Exception] = queue.ShutDown
else:

    class ShutDown(Exception):  # type: ignore[no-redef]
        """put or get of a queue that has been shut down; `queue.ShutDown` where Python has it (3.13)."""


_SLOTS = 256
"""Objects in shared memory at a time, where the number of objects is not limited, or the limit is a large one."""

_MOST_SLOTS = 1024
"""Up to this limit every object of a bounded queue has a slot of its own. Also the slots of a SimpleQueue."""

_SLOT_BYTES = 2560
"""The most that leaves a slot within one page."""

_MAX_MESSAGE_SIZE = 1 << 30
_SMALL_MAX_MESSAGE_SIZE = 64 << 20
"""Where there is not enough address space for the first."""

_HANDLES = 256


def _make_channel(slots: int, max_message_size: int | None) -> ShmChannel:
    options: dict[str, Any] = {
        "capacity": slots,
        "slot_size": _SLOT_BYTES if max_message_size is None else min(_SLOT_BYTES, max_message_size),
        "max_handles": _HANDLES,
        "max_groups": 1,
        # An object whose receivers die again and again is given up, and takes no slot any more.
        "max_deliveries": 15,
        "dead_letters": 0,
    }
    if max_message_size is not None:
        return ShmChannel(max_message_size=max_message_size, **options)
    try:
        return ShmChannel(max_message_size=_MAX_MESSAGE_SIZE, **options)
    except SharedMemoryFullError:
        return ShmChannel(max_message_size=_SMALL_MAX_MESSAGE_SIZE, **options)


# --- the thread that feeds ----------------------------------------------------------------------------------------------


class _Feeder:
    """Makes the thread of a queue that sends what waits in this process for room; the process waits for it at its end."""

    def __init__(self) -> None:
        self.waits_at_exit = True
        self._finalizer: multiprocessing.util.Finalize | None = None

    def __call__(self, link: _core.QueueLink) -> threading.Thread:
        thread = threading.Thread(target=link.feed, name="QueueFeederThread", daemon=True)
        if self.waits_at_exit:
            # As multiprocessing does: a process ends when what it has put is on its way.
            self._finalizer = multiprocessing.util.Finalize(
                thread, _join, [weakref.ref(thread)], exitpriority=-5
            )
        return thread

    def cancel(self) -> None:
        self.waits_at_exit = False
        if self._finalizer is not None:
            self._finalizer.cancel()
            self._finalizer = None

    def after_fork(self) -> None:
        self.waits_at_exit = True
        self._finalizer = None


def _join(reference: weakref.ref[threading.Thread]) -> None:
    thread = reference()
    if thread is not None and thread.ident is not None:
        thread.join()


# --- the queues of this process -----------------------------------------------------------------------------------------

_queues: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for found in list(_queues):
        found._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Queue(_core.QueueEnd, multiprocessing.queues.Queue):  # type: ignore[type-arg]
    """A queue between processes, to be put in the place of `multiprocessing.Queue`.

    Objects go through shared memory: arrays and other large buffers in them are copied into it once and out of it once.
    No lock is held by anybody, so the death of a process stops nobody else.

    Parameters
    ----------
    maxsize : int
        Objects that it holds at most. 0 or less: any number, and `put` never waits.
    ctx : multiprocessing context, optional
        Taken as multiprocessing's classes take it; the queue is the same under every start method.
    copy : bool
        Whether `get` gives arrays of their own, which may be written. False gives read-only views on shared memory, without
        a copy, until a quarter of the slots is held by views.
    max_message_size : int, optional
        Bytes of a pickled object at most: 1 GiB, or 64 MiB where there is not enough address space. Costs address space only.

    Raises
    ------
    SharedMemoryFullError
        The memory of the queue, about 4 KiB for each of its slots, cannot be had.

    Notes
    -----
    Differences from `multiprocessing.Queue` are listed in docs/guide/queues.md. May be shared between threads; passed to
    processes as an argument of theirs, or inherited by fork. At most 256 processes may use it at a time.

    Examples
    --------
    >>> import dsline
    >>> q = dsline.Queue()
    >>> q.put({"step": 1})
    >>> q.get()
    {'step': 1}
    """

    _counts = False
    __class_getitem__: Any = classmethod(types.GenericAlias)

    def __init__(
        self,
        maxsize: int = 0,
        *,
        ctx: Any = None,
        copy: bool = True,
        max_message_size: int | None = None,
    ) -> None:
        try:
            limit = maxsize.__index__()
        except AttributeError:
            raise TypeError(f"maxsize is a {type(maxsize).__name__}, must be an int") from None
        if limit >= 1 << 63:
            raise InvalidArgumentError(f"maxsize is {limit}, must be less than 2**63; 0 means any number")
        by_slots = 0 < limit <= _MOST_SLOTS and copy
        channel = _make_channel(limit if by_slots else _SLOTS, max_message_size)
        self._build(channel, None, max(limit, 0), by_slots, bool(copy))

    def _build(self, channel: ShmChannel, tally: int | None, limit: int, by_slots: bool, copy: bool) -> None:
        self._feeder = _Feeder()
        self._maxsize = limit
        self._shape = (limit, by_slots, copy)
        link = _core.QueueLink(
            channel,
            tally,
            limit=limit,
            by_slots=by_slots,
            blocks=False,
            counts=self._counts,
            copy=copy,
            backlog=collections.deque(),
            shut_down_error=ShutDown,
            make_feeder=self._feeder,
        )
        # A subclass may say what becomes of an object that cannot be pickled, as it may for multiprocessing's.
        hook = type(self)._on_queue_feeder_error
        self._attach(link, None if hook is Queue._on_queue_feeder_error else self._on_queue_feeder_error)
        _queues.add(self)

    @staticmethod
    def _on_queue_feeder_error(error: Exception, obj: Any) -> None:
        """Called by `put` of a subclass that overrides it, instead of raising what pickling `obj` raised."""
        raise error

    def __getstate__(self) -> Any:
        multiprocessing.context.assert_spawning(self)
        link = self._core_link()
        return (link.channel, multiprocessing.reduction.DupFd(link.descriptor()), self._shape)

    def __setstate__(self, state: Any) -> None:
        channel, tally, shape = state
        self._build(channel, tally.detach(), *shape)

    def _after_fork(self) -> None:
        self._core_after_fork()
        self._feeder.after_fork()

    def close(self) -> None:
        """End the use of the queue in this process: its `put` and `get` raise ValueError. What it has put is still sent."""
        self._core_close()

    def join_thread(self) -> None:
        """Wait until what this process has put is in shared memory, where it needs this process no longer.

        Raises
        ------
        AssertionError
            `close` was not called.
        """
        if not self._closed:
            raise AssertionError(f"Queue {self!r} not closed")
        if self._feeder.waits_at_exit:
            link = self._core_link()
            while (thread := link.feeder) is not None:
                try:
                    thread.join()
                except RuntimeError:  # another thread is about to start it
                    time.sleep(0.001)
                else:
                    break

    def cancel_join_thread(self) -> None:
        """Let the process end without waiting for room for what it has put; that is lost then."""
        self._feeder.cancel()


class JoinableQueue(Queue, multiprocessing.queues.JoinableQueue):  # type: ignore[type-arg]
    """A `Queue` that counts the objects that are not done yet, to be put in the place of `multiprocessing.JoinableQueue`.

    Parameters and errors as for `Queue`.

    Examples
    --------
    >>> import dsline
    >>> q = dsline.JoinableQueue()
    >>> q.put("work")
    >>> q.get()
    'work'
    >>> q.task_done()
    >>> q.join()
    """

    _counts = True

    def task_done(self) -> None:
        """Say that one object that was got is done. ValueError when there were fewer objects."""
        self._core_task_done()

    def join(self) -> None:
        """Wait until `task_done` was called for every object that was put. Objects that waited for room in a process that
        died are not waited for."""
        self._core_join()


class _PipeEnd:
    """What programs find in the place of a pipe of multiprocessing's SimpleQueue: concurrent.futures waits for its
    `_reader` among other things and receives from it."""

    def __init__(self, owner: SimpleQueue) -> None:
        self._owner = owner

    @property
    def closed(self) -> bool:
        return self._owner._core_link().closed

    def fileno(self) -> int:
        return self._owner._core_link().channel.fileno()

    def poll(self, timeout: float | None = 0.0) -> bool:
        return not self._owner.empty() or bool(multiprocessing.connection.wait([self.fileno()], timeout))

    def recv(self) -> Any:
        return self._owner.get()

    def send(self, obj: Any) -> None:
        self._owner.put(obj)

    def close(self) -> None:
        self._owner.close()


class SimpleQueue(_core.SimpleQueueEnd, multiprocessing.queues.SimpleQueue):  # type: ignore[type-arg]
    """A queue of few words, to be put in the place of `multiprocessing.SimpleQueue`: put, get, empty, close.

    Parameters
    ----------
    ctx : multiprocessing context, optional
        Taken as multiprocessing's class takes it.
    copy, max_message_size
        As for `Queue`.

    Notes
    -----
    `put` waits while 1024 objects are in the queue, of whatever size; multiprocessing's waits at 64 KiB.

    Examples
    --------
    >>> import dsline
    >>> q = dsline.SimpleQueue()
    >>> q.put(1)
    >>> q.get()
    1
    """

    __class_getitem__: Any = classmethod(types.GenericAlias)

    def __init__(self, *, ctx: Any = None, copy: bool = True, max_message_size: int | None = None) -> None:
        self._build(_make_channel(_MOST_SLOTS, max_message_size), None, bool(copy))

    def _build(self, channel: ShmChannel, tally: int | None, copy: bool) -> None:
        self._copy = copy
        self._attach(
            _core.QueueLink(
                channel,
                tally,
                limit=0,
                by_slots=False,
                blocks=True,
                counts=False,
                copy=copy,
                backlog=collections.deque(),
                shut_down_error=ShutDown,
                make_feeder=None,
            )
        )
        _queues.add(self)

    def __getstate__(self) -> Any:
        multiprocessing.context.assert_spawning(self)
        link = self._core_link()
        return (link.channel, multiprocessing.reduction.DupFd(link.descriptor()), self._copy)

    def __setstate__(self, state: Any) -> None:
        channel, tally, copy = state
        self._build(channel, tally.detach(), copy)

    def _after_fork(self) -> None:
        self._core_link().after_fork()

    @property
    def _reader(self) -> _PipeEnd:
        return _PipeEnd(self)

    _writer = _reader
