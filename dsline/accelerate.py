"""Importing this module makes multiprocessing move large arrays through shared memory.

Code that uses multiprocessing's Queue, SimpleQueue, Pipe and Pool, or concurrent.futures' ProcessPoolExecutor, stays as it is:
a NumPy array of `threshold` bytes or more is copied once into a slot of a store that the processes of one tree share, what
goes through the pipe is a token, and whoever loads the token gets an array of its own and frees the slot. Smaller arrays,
arrays of objects and subclasses of ndarray go as before, and so does everything where there is no room.

Import it first in the process that starts the others. See docs/guide/accelerate.md and docs/design/accelerate.md.
"""

from __future__ import annotations

import copyreg
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pickle
import struct
import sys
import threading
import time
import warnings
from multiprocessing import reduction
from typing import Any

import numpy as np

from dsline import _core
from dsline.errors import DslineError, InvalidArgumentError, SerializationError, TooManyHandlesError

__all__ = ["AccelerateStats", "disable", "enable", "is_enabled", "reclaim", "stats", "trim"]

_THRESHOLD = 64 * 1024
_SLOTS = 256
_HANDLES = 256
_LEAST_LIMIT = 16 << 20
_MOST_LIMIT = 1 << 30
_SWAPPED = ">" if sys.byteorder == "little" else "<"  # NumPy unpickles it into the machine's own order
_VARIABLE = "DSLINE_ACCELERATE_STORE"  # tells children that are started anew where the store of the tree is
_HOLDER = struct.Struct("<II")  # a process that has the store, and its descriptor there
_PATIENCE = 10.0  # seconds that a loader waits for a free handle
_PAUSE = 1.0  # seconds without another try after the store could not be used

_Holder = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class AccelerateStats:
    """What `dsline.accelerate` did in this process, and how the store of the tree stands.

    Attributes
    ----------
    enabled : bool
        Whether large arrays of this process go through the store.
    attached : bool
        Whether this process has a store: False in a child whose parents have not imported `dsline.accelerate`.
    threshold : int
        Bytes from which on an array goes through the store.
    sent, sent_bytes, loaded, loaded_bytes : int
        Arrays that this process put into a store, and took out of one.
    plain : int
        Arrays of `threshold` bytes and more that were pickled as before, since the store had no room or was not there.
    waiting, waiting_bytes : int
        Arrays in the store that nobody has loaded yet, of all processes, and the memory of their slots.
    idle_bytes : int
        Memory that free slots keep for the next arrays; `trim` gives it back.
    limit : int
        Bytes of arrays that the store holds at most.
    """

    enabled: bool
    attached: bool
    threshold: int
    sent: int
    sent_bytes: int
    loaded: int
    loaded_bytes: int
    plain: int
    waiting: int
    waiting_bytes: int
    idle_bytes: int
    limit: int


class _Own:
    """The store that this process sends through, and who has it."""

    def __init__(self, store: _core.ArrayStore, holders: tuple[_Holder, ...]) -> None:
        self.store = store
        self.uuid = bytes.fromhex(store.uuid)
        self.holders = holders  # others: the root of the tree first
        self._pid = 0
        self._address = b""

    def address(self) -> bytes:
        """Return where the store is: its uuid, and processes that have it."""
        pid = os.getpid()
        if self._pid != pid:
            me = (pid, self.store.descriptor)
            others = [each for each in self.holders if each[0] != pid]
            # The root lives longest; a parent may be all that is left where the root is gone.
            kept = [*others[:1], *others[1:][-1:], me]
            self._address = self.uuid + b"".join(_HOLDER.pack(*each) for each in kept)
            self._pid = pid
        return self._address

    def inherited(self) -> _Own:
        """Return the same for a forked child, which has the descriptors of its parent."""
        # Where the parent ends first, as under a daemon, the child is the one to ask.
        parent = _holders_in(self._address)
        return _Own(self.store, tuple(dict.fromkeys((*self.holders, *parent))))


class _State:
    """What this process knows. Its counters may lose updates of threads that race."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.local = threading.local()
        self.enabled = False
        self.threshold = _THRESHOLD
        self.stores: dict[bytes, _core.ArrayStore] = {}  # by uuid, as long as this process lives
        self.own: _Own | None = None
        self.pause_until = 0.0
        self.previous: Any = None  # the reducer of arrays before
        self.reset_counters()

    def reset_counters(self) -> None:
        self.sent = self.sent_bytes = self.loaded = self.loaded_bytes = self.plain = 0


_state = _State()


# --- where a store is ---------------------------------------------------------------------------------------------------


def _holders_in(address: bytes) -> tuple[_Holder, ...]:
    return tuple((pid, fd) for pid, fd in _HOLDER.iter_unpack(address[16:]))


def _open(address: bytes) -> _core.ArrayStore:
    """Join the store at an address, from the descriptor of any process that still has it."""
    uuid = address[:16]
    reasons = []
    for pid, fd in _holders_in(address):
        path = f"/proc/{pid}/fd/{fd}"
        try:
            # Nothing else is opened: that could wait, or do something.
            if not os.readlink(path).startswith("/memfd:dsline"):
                reasons.append(f"process {pid} has something else there")
                continue
            own = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            reasons.append(f"process {pid}: {error.strerror}")
            continue
        try:
            store = _adopt(own)
        except TooManyHandlesError:
            raise
        except DslineError as error:
            reasons.append(f"process {pid}: {error}")
            continue
        if bytes.fromhex(store.uuid) == uuid:
            return store
        store.close()
        reasons.append(f"process {pid} has another store there")
    raise SerializationError(
        "an array of dsline.accelerate lies in shared memory that cannot be opened from here ("
        + "; ".join(reasons)
        + "): it can be loaded while a process of the tree that sent it lives, by the same user and in the same "
        "container; import dsline.accelerate in the main process first, or call dsline.accelerate.disable() there"
    )


def _adopt(fd: int) -> _core.ArrayStore:
    deadline = time.monotonic() + _PATIENCE
    try:
        while True:
            try:
                return _core.ArrayStore.adopt(os.dup(fd))
            except TooManyHandlesError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
    finally:
        os.close(fd)


def _store_at(address: bytes) -> _core.ArrayStore:
    uuid = address[:16]
    store = _state.stores.get(uuid)
    if store is None:
        with _state.lock:
            store = _state.stores.get(uuid)
            if store is None:
                store = _open(address)
                _state.stores[uuid] = store
            if _state.own is None:
                _state.own = _Own(store, _holders_in(address))
                _tell_children()
    return store


def _tell_children() -> None:
    if _state.own is not None and _state.enabled:
        os.environ[_VARIABLE] = _state.own.address().hex()


# --- arrays ------------------------------------------------------------------------------------------------------------


def _reduce_array(array: Any) -> Any:
    """Reducer of multiprocessing's pickler for arrays, which are exactly ndarrays."""
    if array.nbytes >= _state.threshold and not array.dtype.hasobject and array.dtype.byteorder != _SWAPPED:
        reduced = _put(array)
        if reduced is not None:
            return reduced
    if _state.previous is not None:
        return _state.previous(array)
    reducer = copyreg.dispatch_table.get(np.ndarray)
    return array.__reduce_ex__(pickle.DEFAULT_PROTOCOL) if reducer is None else reducer(array)


def _put(array: Any) -> Any:
    own = _state.own  # with its address: another thread may exchange it
    if getattr(_state.local, "stays_plain", False):
        return None
    if own is not None and (_state.pause_until == 0 or time.monotonic() >= _state.pause_until):
        try:
            place = own.store.put(array)
            _state.pause_until = 0.0
        except (DslineError, MemoryError):  # pickling as before needs nothing of it
            _state.pause_until = time.monotonic() + _PAUSE
            place = None
        if place is not None:
            _state.sent += 1
            _state.sent_bytes += array.nbytes
            flags = array.flags
            fortran = flags.f_contiguous and not flags.c_contiguous
            return _load_array, (own.address(), *place, array.dtype, array.shape, fortran)
    _state.plain += 1
    return None


def _load_array(
    address: bytes, slot: int, sequence: int, dtype: Any, shape: tuple[int, ...], fortran: bool
) -> Any:
    """Take an array out of the store; what pickles of accelerated processes call."""
    deadline = 0.0
    while True:
        try:
            array = _store_at(address).take(slot, sequence, dtype, shape, fortran)
            break
        except TooManyHandlesError:  # a forked child registers with its first call
            now = time.monotonic()
            deadline = deadline or now + _PATIENCE
            if now > deadline:
                raise
            time.sleep(0.02)
    if array is None:
        raise SerializationError(
            "the array of this pickle is not in shared memory any more: pickles that multiprocessing makes under "
            "dsline.accelerate can be loaded once, and this one was, or reclaim() dropped it, or a process died while it "
            "loaded it; use pickle.dumps for pickles that are kept"
        )
    _state.loaded += 1
    _state.loaded_bytes += array.nbytes
    return array


# --- connections to processes that may be anywhere -----------------------------------------------------------------------


class _OutsideConnection(multiprocessing.connection.Connection):
    """A connection of a Listener or Client: the other end may be a process of another tree, or another machine."""

    def send(self, obj: Any) -> None:
        before = getattr(_state.local, "stays_plain", False)
        _state.local.stays_plain = True
        try:
            super().send(obj)
        finally:
            _state.local.stays_plain = before


def _reduce_outside(connection: _OutsideConnection) -> Any:
    descriptor = reduction.DupFd(connection.fileno())
    return _rebuild_outside, (descriptor, connection.readable, connection.writable)


def _rebuild_outside(descriptor: Any, readable: bool, writable: bool) -> _OutsideConnection:
    return _OutsideConnection(descriptor.detach(), readable, writable)


def _mark(connection: Any) -> Any:
    if type(connection) is multiprocessing.connection.Connection:
        connection.__class__ = _OutsideConnection
    return connection


_module: Any = multiprocessing.connection
_original_client = _module.SocketClient
_original_accept = _module.SocketListener.accept


def _client(address: Any) -> Any:
    return _mark(_original_client(address))


def _accept(listener: Any) -> Any:
    return _mark(_original_accept(listener))


# --- on and off ----------------------------------------------------------------------------------------------------------


def _size(name: str, value: int | None, least: int) -> int | None:
    if value is None:
        return None
    if type(value) is not int:
        raise TypeError(f"{name} is a {type(value).__name__}, must be an int")
    if value < least:
        raise InvalidArgumentError(f"{name} is {value}, must be {least} or more")
    return value


def enable(*, threshold: int | None = None, limit: int | None = None) -> None:
    """Let multiprocessing's pickler move large arrays through shared memory; importing the module does it.

    Parameters
    ----------
    threshold : int, optional
        Bytes from which on an array goes through the store. 64 KiB by default, or what was given before.
    limit : int, optional
        Bytes of arrays that the store may hold, at least 16 MiB. By default an eighth of the memory that is free, at most
        1 GiB. Given in a process that has a store already, it makes a new one; what lies in the old one can still be loaded.

    Raises
    ------
    InvalidArgumentError
        A size that is too small, or a limit in a process that multiprocessing has started.

    Notes
    -----
    Does not copy or wait. In a child of a process that has not imported this module nothing changes until the child has
    received an array of a process that has: its own store would go with it, and arrays in it would be lost.
    """
    threshold = _size("threshold", threshold, 1)
    limit = _size("limit", limit, _LEAST_LIMIT)
    if limit is not None and multiprocessing.parent_process() is not None:
        raise InvalidArgumentError(
            "limit is given in the process that starts the others, not in one of these"
        )
    with _state.lock:
        if threshold is not None:
            _state.threshold = threshold
        if not _state.enabled:
            reducers = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
            _state.previous = reducers.get(np.ndarray)
            reduction.ForkingPickler.register(np.ndarray, _reduce_array)
            reduction.ForkingPickler.register(_OutsideConnection, _reduce_outside)
            _module.SocketClient = _client
            _module.SocketListener.accept = _accept
            _state.enabled = True
        if _state.own is None and limit is None:
            _find_store()
        if (_state.own is None and multiprocessing.parent_process() is None) or limit is not None:
            _make_store(limit)
        _tell_children()


def _find_store() -> None:
    """Join the store that a parent has told of."""
    try:
        address = bytes.fromhex(os.environ.get(_VARIABLE, ""))
    except ValueError:
        return
    if len(address) < 16 or (len(address) - 16) % _HOLDER.size:
        return
    try:
        _store_at(address)
    except (SerializationError, TooManyHandlesError):  # of a tree that is gone, or of another user
        return


def _make_store(limit: int | None) -> None:
    wanted = limit or min(max(_core.available_memory() // 8, _LEAST_LIMIT), _MOST_LIMIT)
    while True:
        try:
            store = _core.ArrayStore.create(wanted, _SLOTS, _HANDLES)
            break
        except (DslineError, MemoryError) as error:  # address space may be limited
            if limit is not None:
                raise
            if wanted <= _LEAST_LIMIT:
                warnings.warn(
                    f"dsline.accelerate changes nothing: no shared memory for it ({error})", stacklevel=3
                )
                return
            wanted = max(wanted // 4, _LEAST_LIMIT)
    _state.stores[bytes.fromhex(store.uuid)] = store
    _state.own = _Own(store, ())


def disable() -> None:
    """Let multiprocessing pickle arrays as it did before. Arrays that are under way can still be loaded."""
    with _state.lock:
        if not _state.enabled:
            return
        reducers = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        if reducers.get(np.ndarray) is _reduce_array:
            del reducers[np.ndarray]
            if _state.previous is not None:
                reducers[np.ndarray] = _state.previous
        if _module.SocketClient is _client:
            _module.SocketClient = _original_client
        if _module.SocketListener.accept is _accept:
            _module.SocketListener.accept = _original_accept
        os.environ.pop(_VARIABLE, None)
        _state.enabled = False


def is_enabled() -> bool:
    """Return whether multiprocessing's pickler of this process moves large arrays through shared memory."""
    return _state.enabled and _state.own is not None


def stats() -> AccelerateStats:
    """Return what this process did, and how the store of the tree stands."""
    store = None if _state.own is None else _state.own.store
    waiting, waiting_bytes, idle_bytes = (0, 0, 0) if store is None else store.use()
    return AccelerateStats(
        enabled=_state.enabled,
        attached=store is not None,
        threshold=_state.threshold,
        sent=_state.sent,
        sent_bytes=_state.sent_bytes,
        loaded=_state.loaded,
        loaded_bytes=_state.loaded_bytes,
        plain=_state.plain,
        waiting=waiting,
        waiting_bytes=waiting_bytes if waiting else 0,
        idle_bytes=idle_bytes,
        limit=0 if store is None else store.limit,
    )


def reclaim(older_than: float = 60.0) -> int:
    """Drop the arrays in the store that nobody has loaded within `older_than` seconds; how many.

    A pickle that is thrown away, in the pipe of a pool that was terminated or of a process that was killed, leaves its array
    in the store, and nothing tells it from one whose reader is slow. When they take all the room, arrays are pickled as
    before (`stats().plain`). Loading a pickle whose array was dropped raises SerializationError.

    Parameters
    ----------
    older_than : float
        Seconds; 0 drops everything that waits now.

    Returns
    -------
    int
    """
    if not older_than >= 0:
        raise InvalidArgumentError(f"older_than is {older_than!r}, must be 0 or more seconds")
    if _state.own is None:
        return 0
    return _state.own.store.discard_older(max(time.time_ns() - int(older_than * 1e9), 0))


def trim() -> None:
    """Give the memory back that free slots of the store keep for the next arrays."""
    if _state.own is not None:
        _state.own.store.trim()


def _after_fork_in_child() -> None:
    # Another thread of the parent may have held it.
    _state.lock = threading.RLock()
    _state.local = threading.local()
    _state.reset_counters()
    if _state.own is not None:
        _state.own = _state.own.inherited()
        _tell_children()


os.register_at_fork(after_in_child=_after_fork_in_child)
enable()
