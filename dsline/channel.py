"""ShmChannel and FileChannel: opening, creating and passing on channels. The calls that move messages are in `_core`."""

from __future__ import annotations

import os
import pathlib
from typing import Any, Literal, Self

from dsline import _core, interop, pinned
from dsline.endpoint import Endpoint, Stats, descriptor_for_child, teach_multiprocessing
from dsline.errors import ChannelNotFoundError, InvalidArgumentError, SchemaMismatchError
from dsline.groups import Subscriber
from dsline.options import (
    BACKPRESSURE_CODES,
    CHECKSUM_CODES,
    ON_STALE_CODES,
    SYNC_CODES,
    Backpressure,
    Checksum,
    OnDeath,
    OnStale,
    Start,
    Storage,
    Sync,
    parse_enum,
)
from dsline.specs import ArraySpec, Spec, spec_text

__all__ = ["FileChannel", "ShmChannel", "Stats"]

_OPEN_OR_CREATE, _CREATE, _OPEN = range(3)
_MAX_SIZE = 1 << 44
_MAX_GROUPS = 22


def get_include() -> str:
    """Return the folder of the C++ headers, for the include path of extensions that cimport dsline."""
    return str(pathlib.Path(__file__).parent / "include")


def _size(name: str, value: Any, most: int = _MAX_SIZE, least: int = 1) -> int | None:
    """Check an optional size or count."""
    if value is None:
        return None
    try:
        number = value.__index__()
    except (AttributeError, TypeError):
        raise TypeError(f"{name} is a {type(value).__name__}, must be an int") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} is a bool, must be an int")
    if not least <= number <= most:
        raise InvalidArgumentError(f"{name} is {number}, must be {least} to {most}")
    return int(number)


def _options(
    *,
    capacity: int | None = None,
    slot_size: int | None = None,
    max_message_size: int | None = None,
    checksum: Checksum | str | None = None,
    mode: int = 0o600,
    on_stale: OnStale | str = OnStale.RECOVER,
    max_handles: int | None = None,
    max_groups: int | None = None,
    history: int | None = None,
    max_deliveries: int | None = None,
    dead_letters: int | None = None,
    sync: Sync | str | None = None,
    spec: Spec | None = None,
) -> dict[str, Any]:
    """Check what a creator may choose, in the form that `_core` takes."""
    if type(mode) is not int or not 0o600 <= mode <= 0o666 or mode & 0o111:
        raise InvalidArgumentError(f"mode is {mode!r}, must be permission bits from 0o600 to 0o666")
    kept = _size("history", history, 1 << 20, least=0)
    letters = _size("dead_letters", dead_letters, 1 << 20, least=0)
    schema = None if spec is None else _core.make_schema(spec)
    most = _size("max_message_size", max_message_size)
    if schema is not None and schema.fixed and most is not None and most < schema.layout.nbytes:
        raise InvalidArgumentError(
            f"max_message_size is {most}, and every message of {spec_text(schema.spec)} has {schema.layout.nbytes} bytes"
        )
    return {
        "capacity": _size("capacity", capacity, 1 << 20),
        "slot_size": _size("slot_size", slot_size),
        "max_message_size": most,
        "max_handles": _size("max_handles", max_handles, 256),
        "checksum": -1 if checksum is None else CHECKSUM_CODES[parse_enum(Checksum, checksum, "checksum")],
        "mode": mode,
        "on_stale": ON_STALE_CODES[parse_enum(OnStale, on_stale, "on_stale")],
        "max_groups": _size("max_groups", max_groups, _MAX_GROUPS),
        "history": -1 if kept is None else kept,
        "max_deliveries": _size("max_deliveries", max_deliveries, 15),
        "dead_letters": -1 if letters is None else letters,
        "sync": -1 if sync is None else SYNC_CODES[parse_enum(Sync, sync, "sync")],
        "schema": schema,
    }


def _zero_copy_level(zero_copy: Any) -> int:
    if zero_copy is False or zero_copy is True:
        return int(zero_copy)
    if zero_copy == "strict":
        return 2
    raise InvalidArgumentError(f"zero_copy is {zero_copy!r}, must be False, True or 'strict'")


class _Channel(Endpoint, _core.Channel):
    """What all kinds of channels share."""

    _default_group = True  # what is sent waits for a receiver
    _backpressure: Backpressure
    _zero_copy: bool | Literal["strict"] = False

    def _start(
        self,
        kind: str,
        target: Any,
        options: dict[str, Any],
        mode: int,
        policy: Any,
        timeout: Any,
        zero_copy: Any = False,
        max_pinned: Any = None,
    ) -> None:
        self._backpressure = parse_enum(Backpressure, policy, "backpressure")
        level = _zero_copy_level(zero_copy)
        budget = pinned.parse(max_pinned)
        options = {**options, "default_group": int(self._default_group)}
        try:
            self._open(kind, target, options, mode, BACKPRESSURE_CODES[self._backpressure], timeout)
        except SchemaMismatchError as error:
            raise self._other_spec(error, options["schema"].spec) from None
        self._default_timeout = timeout
        self._set_max_pinned(max_pinned, budget)
        self._zero_copy = (False, True, "strict")[level]
        try:
            self._core_zero_copy(level)
        except BaseException:
            self.close()
            raise

    def _other_spec(self, error: SchemaMismatchError, asked: Spec) -> SchemaMismatchError:
        """Name both specs."""
        has: Spec | None = None
        if error._schema:
            try:
                has = _core.read_schema(error._schema).spec
            except (TypeError, ValueError) as why:
                return SchemaMismatchError(f"channel {self._name!r} has a spec that cannot be read: {why}")
        hint = ""
        if isinstance(has, dict) and not isinstance(asked, ArraySpec) and has == dict(asked):
            hint = " (the same fields in another order)"
        return SchemaMismatchError(
            f"channel {self._name!r} carries {spec_text(has)}, and {spec_text(asked)} was asked for{hint}; open it without "
            "a spec to take the channel's, or choose another name"
        )

    @property
    def backpressure(self) -> Backpressure:
        """What `send` of this handle does when no slot is free."""
        return self._backpressure

    def subscribe(
        self,
        group: str | None = None,
        *,
        start: Start | str = Start.NEXT,
        on_death: OnDeath | str = OnDeath.REDELIVER,
        durable: bool = False,
        timeout: Any = _core.DEFAULT_TIMEOUT,
        max_pinned: int | str | None = None,
    ) -> Subscriber:
        """Become a member of a named group: every group gets every message, the members of one group share them.

        Parameters
        ----------
        group : str or None
            1 to 100 bytes. The group is made when it is not there. None makes one of its own, under a new name.
        start : Start or str
            Where a group begins that is made: with the "next" message that is sent, or with the "oldest" or the "latest"
            that is still in the channel (see `history`).
        on_death : OnDeath or str
            What becomes of messages whose receiver dies: "redeliver" or "drop". Members must agree.
        durable : bool
            Whether the group stays, and collects messages, while it has no members. Members must agree.
        timeout : float or None, optional
            Seconds that calls of the subscriber wait unless they say otherwise. This handle's by default.
        max_pinned : int, str or None
            As for `ShmChannel`, for the subscriber. None: as this handle.

        Returns
        -------
        Subscriber
            A handle of its own, to be closed by itself.

        Raises
        ------
        TooManyGroupsError
            The channel has `max_groups` of them.
        TooManyHandlesError
            The channel has `max_handles` open handles.
        ChannelMismatchError
            The group exists with another `on_death` or `durable`.
        """
        if timeout is _core.DEFAULT_TIMEOUT:
            timeout = self._default_timeout
        if max_pinned is None:
            max_pinned = self._max_pinned
        return Subscriber._of(self, group, start, on_death, durable, timeout, max_pinned)

    @property
    def zero_copy(self) -> bool | Literal["strict"]:
        """Whether `alloc` and `publish` may be used: False, True or "strict"."""
        return self._zero_copy

    def send_arrow(
        self,
        data: Any,
        *,
        timeout: float | None = _core.DEFAULT_TIMEOUT,
        meta: dict[str, Any] | None = None,
    ) -> bool:
        """Send a table or record batch as an Arrow IPC stream, written straight into the slot.

        Parameters
        ----------
        data : object with ``__arrow_c_stream__`` or ``__arrow_c_array__``
            A pyarrow Table or RecordBatch, a polars or pandas DataFrame, and the like.
        timeout, meta : optional
            As for `send`. The message is marked by ``meta["encoding"] == "arrow"``, which cannot be given.

        Returns
        -------
        bool
            As for `send`.

        Raises
        ------
        FeatureUnavailableError
            Neither pyarrow nor polars is installed.
        SerializationError
            Arrow cannot write it.
        TypeError
            `data` is no table.
        Other errors as for `send`.

        Notes
        -----
        Copies once. pyarrow writes where it is installed, else polars, which encodes the frame twice: once to learn its size.
        """
        if meta is not None and "encoding" in meta:
            raise InvalidArgumentError("meta has an 'encoding', which send_arrow sets itself; leave it out")
        size, fill = interop.arrow_writer(data)
        return self._core_send_filled(size, fill, {**(meta or {}), "encoding": interop.ARROW}, timeout)

    def __repr__(self) -> str:
        if self._core_handle() is None:
            return f"<dsline.{type(self).__name__}: never opened>"
        what = self._name or self.storage
        state = "closed" if self.closed else f"{len(self)} of {self.capacity} queued"
        return f"<dsline.{type(self).__name__} {what!r}: {state}>"

    # --- pickling ---

    def __reduce__(self) -> Any:
        return self._recipe(self._place_of(self))

    def _recipe(self, place: Any) -> Any:
        return _open_again, (
            type(self),
            place,
            self._core_uuid(),
            self._backpressure,
            self._default_timeout,
            self._zero_copy,
            self._max_pinned,
        )

    @classmethod
    def _place_of(cls, endpoint: Endpoint) -> Any:
        """Where other processes find the channel of a handle."""
        raise NotImplementedError

    @classmethod
    def _at_place(
        cls,
        place: Any,
        policy: Backpressure | str,
        timeout: float | None,
        zero_copy: bool | Literal["strict"] = False,
        max_pinned: int | str | None = None,
    ) -> Self:
        raise NotImplementedError

    @classmethod
    def _again(
        cls,
        place: Any,
        uuid: str,
        policy: Backpressure | str = Backpressure.BLOCK,
        timeout: float | None = None,
        zero_copy: bool | Literal["strict"] = False,
        max_pinned: int | str | None = None,
    ) -> Self:
        """Open the channel that was pickled."""
        channel = cls._at_place(place, policy, timeout, zero_copy, max_pinned)
        if channel._core_uuid() != uuid:
            channel.close()
            raise ChannelNotFoundError(
                2,
                f"channel {place!r} is not the one that was pickled: that one is gone and another took its name",
            )
        return channel


class SharedMemoryChannel(_Channel):
    """What the kinds of channels that live in shared memory have in common."""

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
        max_groups: int | None = None,
        history: int | None = None,
        max_deliveries: int | None = None,
        dead_letters: int | None = None,
        zero_copy: bool | Literal["strict"] = False,
        max_pinned: int | str | None = None,
        spec: Spec | None = None,
    ) -> None:
        options = _options(
            capacity=capacity,
            slot_size=slot_size,
            max_message_size=max_message_size,
            checksum=checksum,
            mode=mode,
            on_stale=on_stale,
            max_handles=max_handles,
            max_groups=max_groups,
            history=history,
            max_deliveries=max_deliveries,
            dead_letters=dead_letters,
            spec=spec,
        )
        self._begin(name, options, _OPEN_OR_CREATE, backpressure, timeout, storage, zero_copy, max_pinned)

    def _begin(
        self,
        name: Any,
        options: dict[str, Any],
        mode: int,
        policy: Any,
        timeout: Any,
        storage: Storage | str,
        zero_copy: Any = False,
        max_pinned: Any = None,
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
            self._start("heap", None, options, mode, policy, timeout, zero_copy, max_pinned)
        elif name is None:
            self._start("anonymous", None, options, mode, policy, timeout, zero_copy, max_pinned)
            teach_multiprocessing(type(self))
        else:
            self._start("named", name.encode(), options, mode, policy, timeout, zero_copy, max_pinned)

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
        max_groups: int | None = None,
        history: int | None = None,
        max_deliveries: int | None = None,
        dead_letters: int | None = None,
        zero_copy: bool | Literal["strict"] = False,
        max_pinned: int | str | None = None,
        spec: Spec | None = None,
    ) -> Self:
        """Create a channel; ChannelExistsError when one of that name is in use. Parameters as for the class."""
        options = _options(
            capacity=capacity,
            slot_size=slot_size,
            max_message_size=max_message_size,
            checksum=checksum,
            mode=mode,
            on_stale=on_stale,
            max_handles=max_handles,
            max_groups=max_groups,
            history=history,
            max_deliveries=max_deliveries,
            dead_letters=dead_letters,
            spec=spec,
        )
        channel = cls.__new__(cls)
        channel._begin(name, options, _CREATE, backpressure, timeout, storage, zero_copy, max_pinned)
        return channel

    @classmethod
    def open(
        cls,
        name: str,
        *,
        backpressure: Backpressure | str = Backpressure.BLOCK,
        timeout: float | None = None,
        zero_copy: bool | Literal["strict"] = False,
        max_pinned: int | str | None = None,
        spec: Spec | None = None,
    ) -> Self:
        """Open the channel of that name, whatever its geometry; ChannelNotFoundError when there is none.

        With a `spec`, SchemaMismatchError when the channel has another one, or none.
        """
        channel = cls.__new__(cls)
        if name is None:
            raise TypeError(
                "name is None, but an anonymous channel cannot be opened: pass its handle to the process"
            )
        options = _options(spec=spec)
        channel._begin(name, options, _OPEN, backpressure, timeout, Storage.SHM, zero_copy, max_pinned)
        return channel

    @classmethod
    def _place_of(cls, endpoint: Endpoint) -> Any:
        return endpoint._name if endpoint._name is not None else descriptor_for_child(endpoint)

    @classmethod
    def _at_place(
        cls,
        place: Any,
        policy: Backpressure | str,
        timeout: float | None,
        zero_copy: bool | Literal["strict"] = False,
        max_pinned: int | str | None = None,
    ) -> Self:
        if isinstance(place, str):
            return cls.open(
                place, backpressure=policy, timeout=timeout, zero_copy=zero_copy, max_pinned=max_pinned
            )
        channel = cls.__new__(cls)
        channel._name = None
        channel._start("adopt", place.detach(), {}, _OPEN, policy, timeout, zero_copy, max_pinned)
        teach_multiprocessing(cls)
        return channel


class ShmChannel(SharedMemoryChannel):
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
    max_groups : int, optional
        Named groups at a time, 7 when created, up to 22 (21 with a history). See `subscribe`.
    history : int, optional
        Messages that are kept for groups that join later, 0 when created. They take slots, which senders take back when no
        other is free.
    max_deliveries : int, optional
        Deliveries of a message whose receivers die or give it back, before it becomes a dead letter: 3 when created, up to 15.
    dead_letters : int, optional
        Dead letters that are kept, in slots of the channel, 16 when created; the oldest goes for a newer one.
    max_pinned : int, str or None
        How many received messages the views of this handle may keep in their slots. Past it receiving gives read-only
        copies, counted in ``stats().forced_copies``, so that views which are kept do not stop the senders. "auto" (None) is
        three quarters of the capacity, at least 2, and never the last slot that is left to send into; 0 always copies; a
        number is taken as it is; "unlimited" never copies: then senders wait for whoever drops the views.
    zero_copy : bool or "strict"
        Whether this handle may `alloc` and `publish`. "strict" makes the pages of a published message read-only in this
        process, so that not even a stray pointer can change it; slots must be a page at least.
    spec : ArraySpec or dict of str to ArraySpec, optional
        What every message is: an array of this shape, dtype and order, or a record with these fields. Kept with the channel
        and checked whenever it is opened and at every send; an opener without a spec takes the channel's. `slot_size` is
        the size of such a message then, unless given.

    Raises
    ------
    ChannelMismatchError
        The channel exists with another geometry than the one given.
    SchemaMismatchError
        The channel exists with another spec than the one given.
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


class FileChannel(_Channel):
    """A channel in a file: what is queued when its processes close it, or are killed, is there after the next open.

    Made by `FileChannel.create` and `FileChannel.open`. The file survives processes; with ``sync="data"`` also a loss of power.
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
        max_groups: int | None = None,
        history: int | None = None,
        max_deliveries: int | None = None,
        dead_letters: int | None = None,
        sync: Sync | str | None = None,
        zero_copy: bool | Literal["strict"] = False,
        max_pinned: int | str | None = None,
        spec: Spec | None = None,
    ) -> Self:
        """Create the file; ChannelExistsError when it exists (on_stale="reset" replaces a channel that nobody uses).

        Parameters as for `ShmChannel`, with a path for the name. The disk space of all slots is reserved.

        With ``sync="data"`` a message is on the disk when its `send` returns: it survives a loss of power, unless the disk
        lies. With ``sync="none"`` (when created) it survives the death of any process. `checksum="full"` finds a page that
        was torn by a loss of power.
        """
        options = _options(
            capacity=capacity,
            slot_size=slot_size,
            max_message_size=max_message_size,
            checksum=checksum,
            mode=mode,
            on_stale=on_stale,
            max_handles=max_handles,
            max_groups=max_groups,
            history=history,
            max_deliveries=max_deliveries,
            dead_letters=dead_letters,
            sync=sync,
            spec=spec,
        )
        return cls._at(path, options, _CREATE, backpressure, timeout, zero_copy, max_pinned)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        backpressure: Backpressure | str = Backpressure.BLOCK,
        timeout: float | None = None,
        zero_copy: bool | Literal["strict"] = False,
        max_pinned: int | str | None = None,
        spec: Spec | None = None,
    ) -> Self:
        """Open the channel in a file; ChannelNotFoundError when there is none.

        With a `spec`, SchemaMismatchError when the channel has another one, or none.
        """
        options = _options(spec=spec)
        return cls._at(path, options, _OPEN, backpressure, timeout, zero_copy, max_pinned)

    @classmethod
    def _at(
        cls,
        path: Any,
        options: dict[str, Any],
        mode: int,
        policy: Any,
        timeout: Any,
        zero_copy: Any,
        max_pinned: Any,
    ) -> Self:
        channel = cls.__new__(cls)
        absolute = os.path.abspath(os.fsdecode(path))
        if "\0" in absolute:
            raise InvalidArgumentError(f"path {absolute!r} holds a null character, which no file name can")
        channel._name = os.path.basename(absolute)
        channel._start("file", os.fsencode(absolute), options, mode, policy, timeout, zero_copy, max_pinned)
        return channel

    @property
    def sync(self) -> Sync:
        """What `send` waits for: "none", or "data" for the disk."""
        return Sync.DATA if self._core_synced() else Sync.NONE

    @classmethod
    def _place_of(cls, endpoint: Endpoint) -> Any:
        return endpoint.path

    @classmethod
    def _at_place(
        cls,
        place: Any,
        policy: Backpressure | str,
        timeout: float | None,
        zero_copy: bool | Literal["strict"] = False,
        max_pinned: int | str | None = None,
    ) -> Self:
        return cls.open(
            place, backpressure=policy, timeout=timeout, zero_copy=zero_copy, max_pinned=max_pinned
        )


def _open_again(
    cls: type[_Channel],
    place: Any,
    uuid: str,
    policy: Backpressure,
    timeout: float | None,
    zero_copy: bool | Literal["strict"] = False,
    max_pinned: int | str | None = None,
) -> _Channel:
    """Unpickle a handle."""
    return cls._again(place, uuid, policy, timeout, zero_copy, max_pinned)
