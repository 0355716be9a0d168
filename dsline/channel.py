"""ShmChannel and FileChannel: opening, creating and passing on channels. The calls that move messages are in `_core`."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.context
import multiprocessing.reduction
import multiprocessing.util
import os
import pathlib
import threading
from typing import Any, NoReturn

from dsline import _core
from dsline.errors import ChannelNotFoundError, FeatureUnavailableError, InvalidArgumentError
from dsline.options import (
    BACKPRESSURE_CODES,
    CHECKSUM_CODES,
    ON_STALE_CODES,
    Backpressure,
    Checksum,
    OnStale,
    Storage,
    parse_enum,
)

__all__ = ["FileChannel", "ShmChannel", "Stats"]

_OPEN_OR_CREATE, _CREATE, _OPEN = range(3)
_MAX_SIZE = 1 << 44


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counters of a channel and of this handle, read one after the other without stopping anybody.

    Attributes
    ----------
    depth : int
        Messages that wait to be received.
    capacity, free_slots, pinned_slots, corrupted_slots : int
        Slots in all, free, held by receivers, and out of use after a damaged message.
    next_sequence, head_sequence : int
        Sequence of the next message to be sent, and of the next to be received.
    sent, received, bytes_sent, bytes_received : int
        By this handle.
    pinned_views : int
        Received messages that views of this handle still hold.
    send_waits, recv_waits : int
        How often this handle had to wait.
    dropped_newest, dropped_oldest, redelivered, corrupted : int
        Of the channel, since it was created.
    reserved_bytes : int
        Memory that the channel takes.
    participants : int
        Open handles.
    """

    depth: int
    capacity: int
    next_sequence: int
    head_sequence: int
    sent: int
    received: int
    dropped_newest: int
    dropped_oldest: int
    redelivered: int
    send_waits: int
    recv_waits: int
    pinned_views: int
    pinned_slots: int
    free_slots: int
    corrupted_slots: int
    bytes_sent: int
    bytes_received: int
    corrupted: int
    reserved_bytes: int
    participants: int

    def asdict(self) -> dict[str, int]:
        """Return the counters as a dict."""
        return dataclasses.asdict(self)


def get_include() -> str:
    """Return the folder of the C++ headers, for the include path of extensions that cimport dsline."""
    return str(pathlib.Path(__file__).parent / "include")


# --- the end of the process ---------------------------------------------------------------------------------------------


def _leave_child() -> None:
    # The threads of a child are joined only after its finalizers: they may still send.
    for thread in threading.enumerate():
        if (
            not thread.daemon
            and thread is not threading.current_thread()
            and thread is not threading.main_thread()
        ):
            thread.join()
    _core.leave_all()


def _leave_at_exit_of_child(_: object) -> None:
    # Children of multiprocessing end by os._exit; what ends by exit() needs no help.
    multiprocessing.util.Finalize(None, _leave_child, exitpriority=-100)


class _Anchor:
    """register_after_fork() keeps only a weak reference to its object."""


_anchor = _Anchor()
multiprocessing.util.register_after_fork(_anchor, _leave_at_exit_of_child)
if multiprocessing.parent_process() is not None:
    _leave_at_exit_of_child(None)


def _size(name: str, value: Any, most: int = _MAX_SIZE) -> int | None:
    """Check an optional size or count."""
    if value is None:
        return None
    try:
        number = value.__index__()
    except (AttributeError, TypeError):
        raise TypeError(f"{name} is a {type(value).__name__}, must be an int") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} is a bool, must be an int")
    if not 1 <= number <= most:
        raise InvalidArgumentError(f"{name} is {number}, must be 1 to {most}")
    return int(number)


def _options(
    capacity: int | None,
    slot_size: int | None,
    max_message_size: int | None,
    max_handles: int | None,
    checksum: Checksum | str | None,
    mode: int,
    on_stale: OnStale | str,
) -> dict[str, Any]:
    """Check what a creator may choose, in the form that `_core` takes."""
    if type(mode) is not int or not 0o600 <= mode <= 0o666 or mode & 0o111:
        raise InvalidArgumentError(f"mode is {mode!r}, must be permission bits from 0o600 to 0o666")
    return {
        "capacity": _size("capacity", capacity, 1 << 20),
        "slot_size": _size("slot_size", slot_size),
        "max_message_size": _size("max_message_size", max_message_size),
        "max_handles": _size("max_handles", max_handles, 256),
        "checksum": -1 if checksum is None else CHECKSUM_CODES[parse_enum(Checksum, checksum, "checksum")],
        "mode": mode,
        "on_stale": ON_STALE_CODES[parse_enum(OnStale, on_stale, "on_stale")],
    }


class _Channel(_core.Channel):
    """What both kinds of channels share."""

    _name: str | None
    _backpressure: Backpressure
    _default_timeout: float | None

    def _start(
        self, kind: str, target: Any, options: dict[str, Any], mode: int, policy: Any, timeout: Any
    ) -> None:
        self._backpressure = parse_enum(Backpressure, policy, "backpressure")
        self._open(kind, target, options, mode, BACKPRESSURE_CODES[self._backpressure], timeout)
        self._default_timeout = timeout

    @property
    def name(self) -> str | None:
        """Name of the channel; None for an anonymous one."""
        return self._name

    @property
    def path(self) -> str | None:
        """Path of the file that carries the channel; None for an anonymous one."""
        return self._core_path() or None

    @property
    def storage(self) -> str:
        """Where its memory lives: "shm", "memfd", "heap" or "file"."""
        return self._core_storage()

    @property
    def backpressure(self) -> Backpressure:
        """What `send` of this handle does when no slot is free."""
        return self._backpressure

    @property
    def checksum(self) -> Checksum:
        """What the CRC32C of a message covers."""
        return list(CHECKSUM_CODES)[self._core_checksum()]

    @property
    def timeout(self) -> float | None:
        """Seconds that calls of this handle wait unless they say otherwise; None for ever."""
        return self._default_timeout

    def stats(self) -> Stats:
        """Return the counters of the channel and of this handle."""
        return Stats(**self._core_stats())

    def alloc(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not built yet: raises FeatureUnavailableError."""
        raise FeatureUnavailableError(
            "alloc/publish (true zero-copy) is not part of this version; send() copies once"
        )

    def publish(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not built yet: raises FeatureUnavailableError."""
        self.alloc()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._core_handle() is None:
            return f"<dsline.{type(self).__name__}: never opened>"
        what = self._name or self.storage
        state = "closed" if self.closed else f"{len(self)} of {self.capacity} queued"
        return f"<dsline.{type(self).__name__} {what!r}: {state}>"


class ShmChannel(_Channel):
    """A channel in shared memory: any number of senders, any number of competing receivers, one handle for both.

    Opens the live channel of that name, or creates it. What processes that are all gone have left under the name is
    taken over with its messages (see `on_stale`).

    Parameters
    ----------
    name : str or None
        1 to 100 of ``A-Z a-z 0-9 . _ -``, no leading dot. None makes an anonymous channel, which reaches other
        processes as an argument of theirs (multiprocessing) and leaves nothing behind.
    capacity : int, optional
        Number of slots: messages queued or held at a time. 64 when created.
    slot_size : int, optional
        Bytes of payload reserved per slot. 65536 when created. Larger messages just work, see `max_message_size`.
    max_message_size : int, optional
        Bytes of payload at most; costs address space only. By default 1 GiB, less for very many slots.
    backpressure : Backpressure or str
        What `send` of this handle does when no slot is free: "block", "raise", "drop_newest" or "drop_oldest".
    timeout : float or None
        Seconds that calls of this handle wait unless they say otherwise; None for ever.
    checksum : Checksum or str, optional
        "header" (when created), "full" or "none".
    storage : Storage or str
        "shm", "memfd" (anonymous) or "heap" (threads of this process).
    mode : int
        Permission bits of a named channel.
    on_stale : OnStale or str
        What to do with a channel whose processes are all gone: "recover", "reset" or "raise".
    max_handles : int, optional
        Open handles at most, 64 when created, up to 256.

    Raises
    ------
    ChannelMismatchError
        The channel exists with another geometry than the one given.
    SharedMemoryFullError
        The memory cannot be reserved.
    ChannelLayoutError, ChannelPermissionError
        The name is taken by something that is not a channel, or by somebody else.

    Notes
    -----
    Handles may be shared between threads, passed to processes started by fork, spawn or forkserver, and pickled by name.

    Examples
    --------
    >>> import dsline
    >>> with dsline.ShmChannel(capacity=4, slot_size=64) as ch:
    ...     ch.send(b"hello")
    ...     bytes(ch.recv())
    True
    b'hello'
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        capacity: int | None = None,
        slot_size: int | None = None,
        max_message_size: int | None = None,
        backpressure: Backpressure | str = Backpressure.BLOCK,
        timeout: float | None = None,
        checksum: Checksum | str | None = None,
        storage: Storage | str = Storage.SHM,
        mode: int = 0o600,
        on_stale: OnStale | str = OnStale.RECOVER,
        max_handles: int | None = None,
    ) -> None:
        options = _options(capacity, slot_size, max_message_size, max_handles, checksum, mode, on_stale)
        self._begin(name, options, _OPEN_OR_CREATE, backpressure, timeout, storage)

    def _begin(
        self, name: Any, options: dict[str, Any], mode: int, policy: Any, timeout: Any, storage: Storage | str
    ) -> None:
        where = parse_enum(Storage, storage, "storage")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name is a {type(name).__name__}, must be str or None")
        if name is not None and where is not Storage.SHM:
            raise InvalidArgumentError(
                f"storage={where.value!r} has no name that others could open, but name={name!r} was given; "
                "use storage='shm' with a name, or name=None"
            )
        self._name = name
        if where is Storage.HEAP:
            self._start("heap", None, options, mode, policy, timeout)
        elif name is None:
            self._start("anonymous", None, options, mode, policy, timeout)
            _teach_multiprocessing(type(self))
        else:
            self._start("named", name.encode(), options, mode, policy, timeout)

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        capacity: int | None = None,
        slot_size: int | None = None,
        max_message_size: int | None = None,
        backpressure: Backpressure | str = Backpressure.BLOCK,
        timeout: float | None = None,
        checksum: Checksum | str | None = None,
        storage: Storage | str = Storage.SHM,
        mode: int = 0o600,
        on_stale: OnStale | str = OnStale.RECOVER,
        max_handles: int | None = None,
    ) -> ShmChannel:
        """Create a channel; ChannelExistsError when one of that name is in use. Parameters as for the class."""
        options = _options(capacity, slot_size, max_message_size, max_handles, checksum, mode, on_stale)
        channel = cls.__new__(cls)
        channel._begin(name, options, _CREATE, backpressure, timeout, storage)
        return channel

    @classmethod
    def open(
        cls,
        name: str,
        *,
        backpressure: Backpressure | str = Backpressure.BLOCK,
        timeout: float | None = None,
    ) -> ShmChannel:
        """Open the channel of that name, whatever its geometry; ChannelNotFoundError when there is none."""
        channel = cls.__new__(cls)
        if name is None:
            raise TypeError(
                "name is None, but an anonymous channel cannot be opened: pass its handle to the process"
            )
        options = _options(None, None, None, None, None, 0o600, OnStale.RECOVER)
        channel._begin(name, options, _OPEN, backpressure, timeout, Storage.SHM)
        return channel

    def __reduce__(self) -> Any:
        if self._name is not None:
            recipe = (type(self), self._name, self._core_uuid(), self._backpressure, self._default_timeout)
            return _open_again, recipe
        return _reduce_anonymous(self)


class FileChannel(_Channel):
    """A channel in a file: what is queued when its processes close it, or are killed, is there after the next open.

    Made by `FileChannel.create` and `FileChannel.open`. The file survives processes, not a loss of power.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("FileChannel is made by FileChannel.create(path, ...) or FileChannel.open(path)")

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        capacity: int | None = None,
        slot_size: int | None = None,
        max_message_size: int | None = None,
        backpressure: Backpressure | str = Backpressure.BLOCK,
        timeout: float | None = None,
        checksum: Checksum | str | None = None,
        mode: int = 0o600,
        on_stale: OnStale | str = OnStale.RECOVER,
        max_handles: int | None = None,
    ) -> FileChannel:
        """Create the file; ChannelExistsError when it exists (on_stale="reset" replaces a channel that nobody uses).

        Parameters as for `ShmChannel`, with a path for the name. The disk space of all slots is reserved.
        """
        options = _options(capacity, slot_size, max_message_size, max_handles, checksum, mode, on_stale)
        return cls._at(path, options, _CREATE, backpressure, timeout)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        backpressure: Backpressure | str = Backpressure.BLOCK,
        timeout: float | None = None,
    ) -> FileChannel:
        """Open the channel in a file; ChannelNotFoundError when there is none."""
        options = _options(None, None, None, None, None, 0o600, OnStale.RECOVER)
        return cls._at(path, options, _OPEN, backpressure, timeout)

    @classmethod
    def _at(cls, path: Any, options: dict[str, Any], mode: int, policy: Any, timeout: Any) -> FileChannel:
        channel = cls.__new__(cls)
        absolute = os.path.abspath(os.fsdecode(path))
        if "\0" in absolute:
            raise InvalidArgumentError(f"path {absolute!r} holds a null character, which no file name can")
        channel._name = os.path.basename(absolute)
        channel._start("file", os.fsencode(absolute), options, mode, policy, timeout)
        return channel

    def __reduce__(self) -> Any:
        return _open_again, (
            type(self),
            self.path,
            self._core_uuid(),
            self._backpressure,
            self._default_timeout,
        )


def _open_again(
    cls: type[ShmChannel] | type[FileChannel],
    place: str,
    uuid: str,
    policy: Backpressure,
    timeout: float | None,
) -> ShmChannel | FileChannel:
    """Unpickle a handle of a channel that has a name."""
    channel = cls.open(place, backpressure=policy, timeout=timeout)
    if channel._core_uuid() != uuid:
        channel.close()
        raise ChannelNotFoundError(
            2,
            f"channel {place!r} is not the one that was pickled: that one is gone and another took its name",
        )
    return channel


# --- anonymous channels travel as descriptors ---------------------------------------------------------------------------


def _reduce_anonymous(channel: ShmChannel) -> Any:
    if channel.storage == "heap":
        raise FeatureUnavailableError(
            "a heap channel cannot go to another process: its memory is this process's own; use a named or anonymous "
            "channel"
        )
    if multiprocessing.context.get_spawning_popen() is None:
        raise FeatureUnavailableError(
            "an anonymous channel can be pickled only while a process is being started, or over a connection of "
            "multiprocessing; give it a name to pickle it anywhere"
        )
    return _reduce_by_descriptor(channel)


def _reduce_by_descriptor(channel: ShmChannel) -> Any:
    if channel._name is not None or channel.storage == "heap":
        return channel.__reduce__()
    descriptor = multiprocessing.reduction.DupFd(channel.fileno_shared())
    return _adopt, (type(channel), descriptor, channel._backpressure, channel._default_timeout)


def _adopt(cls: type[ShmChannel], descriptor: Any, policy: Backpressure, timeout: float | None) -> ShmChannel:
    channel = cls.__new__(cls)
    channel._name = None
    channel._start("adopt", descriptor.detach(), {}, _OPEN, policy, timeout)
    _teach_multiprocessing(cls)
    return channel


def _teach_multiprocessing(cls: type[ShmChannel]) -> None:
    """Let connections of multiprocessing carry anonymous channels; plain pickle does not."""
    multiprocessing.reduction.ForkingPickler.register(cls, _reduce_by_descriptor)
