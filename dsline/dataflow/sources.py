"""Sources: where the items of a pipeline come from, described by a URI, a path or a Python object."""

from __future__ import annotations

import dataclasses
import glob as _glob
import inspect
import itertools
import os
import random
import re
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

import numpy as np

from dsline.broadcast import Broadcast
from dsline.channel import SharedMemoryChannel, ShmChannel, _Channel
from dsline.dataflow import media
from dsline.dataflow.callables import function_name, reference, resolve
from dsline.dataflow.items import Batch, schema_from_json, schema_of, schema_to_json
from dsline.dataflow.npy_files import open_npy, open_npz
from dsline.dataflow.operator import Context, Schema, Source, SourceStep
from dsline.endpoint import Endpoint
from dsline.errors import (
    ChannelClosedError,
    ChannelNotFoundError,
    DslineError,
    PipelineBuildError,
    PipelineRuntimeError,
)
from dsline.groups import Subscriber
from dsline.options import Start
from dsline.report import ChannelReport
from dsline.specs import ArraySpec, record_dtype
from dsline.status import inspect as channel_report

__all__ = [
    "END_KIND",
    "SHUT_DOWN_AT_END",
    "ArraySource",
    "CallableSource",
    "ChannelSource",
    "FilesSource",
    "ImagesSource",
    "IterableSource",
    "LogSource",
    "ReplayableSource",
    "VideoSource",
    "end_came",
    "files",
    "parse_source",
    "receive_from",
    "source_from_json",
]

Array: TypeAlias = np.ndarray[Any, Any]
S = TypeVar("S")

END_KIND: Final = 16  # kind of the frame that ends a stream
SHUT_DOWN_AT_END: Final = b"shutdown"  # payload of an END after which its receiver shuts the channel down

_NAME: Final = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,100}")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_SLICE_SECONDS: Final = 0.1  # a blocked source looks this often whether it has been stopped
_ROWS: Final = 4096  # per item of one-dimensional arrays, unless said otherwise
_CHANNEL_OPTIONS: Final = frozenset(
    (
        "capacity",
        "slot_size",
        "max_message_size",
        "checksum",
        "mode",
        "on_stale",
        "max_handles",
        "max_groups",
        "history",
        "max_deliveries",
        "dead_letters",
        "spec",
    )
)


# --- channels -----------------------------------------------------------------------------------------------------------


def end_came(receiver: Any, message: Any) -> bool:
    """Whether a received message is an END; then it is released, and the channel shut down if the END says so."""
    if message._core_kind != END_KIND:
        return False
    shut_down = bytes(message.payload) == SHUT_DOWN_AT_END
    message.release()
    if shut_down:
        # The others who receive for the same group see that end, and only that.
        receiver.shutdown()
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelSource(Source):
    """Messages of a channel: of its default group, or of a named group.

    Attributes
    ----------
    name : str or None
        Of the channel; None for one that is given as an object.
    broadcast : bool
        Whether it is a `dsline.Broadcast`.
    group : str or None
        Group to receive for. None: the default group, or for a broadcast a group of its own, `own_group`.
    start_at : str
        Where a group begins that is made: "next", "oldest" or "latest".
    durable : bool
        Whether a group stays that is made.
    wait : float or None
        Seconds to wait for a channel that is not there yet; None for ever.
    create : mapping
        Options of `ShmChannel`; where there are any, a channel that is not there is created.
    channel : channel or Subscriber, optional
        The handle itself, which stays open at the end.

    Notes
    -----
    Ends at an END or when the channel is shut down and drained. A message is done when the next one is asked for and nothing
    refers to the item any more; until then the death of the process gives it to the next receiver. Items are read-only views
    on the slot.
    """

    kind: ClassVar[str] = "channel"
    name: str | None
    broadcast: bool = False
    group: str | None = None
    start_at: str = "next"
    durable: bool = False
    wait: float | None = 10.0
    create: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    channel: Any = None
    schema: Schema = None
    own_group: str = dataclasses.field(default_factory=lambda: f"{os.getpid()}-{secrets.token_hex(6)}")
    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", channel_target(self.name, self.broadcast, self.channel))

    @property
    def is_open_channel(self) -> bool:
        """Whether it was given as an open handle, which stays open at the end."""
        return self.channel is not None

    def open(self, stopped: threading.Event | None = None) -> Any:
        """Return a channel or Subscriber to receive from; the caller closes it unless it is `self.channel`.

        All that are opened of one description, in any process, share the messages: they are members of one group.

        Blocks up to `wait` for a channel that is not there. None when `stopped` was set meanwhile.

        Raises
        ------
        ChannelNotFoundError
            There is none in time.
        ChannelError
            As for opening a channel.
        """
        channel = self.channel
        if channel is None:
            channel = self._open_named(stopped)
            if channel is None:
                return None
        elif isinstance(channel, Subscriber) or (self.group is None and not isinstance(channel, Broadcast)):
            return channel
        if self.group is None and not self.broadcast:
            return channel
        try:
            group = self.own_group if self.group is None else self.group
            return channel.subscribe(group, start=self.start_at, durable=self.durable)
        finally:
            if channel is not self.channel:
                channel.close()

    def _open_named(self, stopped: threading.Event | None) -> SharedMemoryChannel | None:
        assert self.name is not None
        cls = Broadcast if self.broadcast else ShmChannel
        if self.create:
            return cls(self.name, **self.create)
        deadline = None if self.wait is None else time.monotonic() + self.wait
        pause = 0.002
        while True:
            try:
                return cls.open(self.name)
            except ChannelNotFoundError:
                if stopped is not None and stopped.is_set():
                    return None
                if deadline is not None and time.monotonic() >= deadline:
                    raise ChannelNotFoundError(
                        2,
                        f"there is no channel {self.name!r}, and nobody made one within {self.wait:g} s; start its "
                        "sender, or give capacity= or slot_size= and the source creates it",
                    ) from None
            time.sleep(pause)
            pause = min(0.05, pause * 2)

    def start(self, context: Context) -> SourceStep:
        return _ChannelStep(self)

    def describe(self) -> str:
        place = self.name if self.name is not None else repr(self.channel)
        group = f", group {self.group!r}" if self.group is not None else ""
        return f"{'bus' if self.broadcast else 'shm'}://{place}{group}"

    def to_json(self) -> dict[str, Any]:
        if self.name is None:
            raise PipelineBuildError(
                "a channel that is given as an object cannot be written as text; give its name, as shm://name"
            )
        create = {key: _plain_option(value) for key, value in self.create.items()}
        return {
            "source": "bus" if self.broadcast else "shm",
            "name": self.name,
            "group": self.group,
            "start": self.start_at,
            "durable": self.durable,
            "wait": self.wait,
            "schema": schema_to_json(self.schema),
            **create,
        }


def channel_target(name: str | None, broadcast: bool, channel: Any) -> str | None:
    """The URI of a channel; None of one without a name."""
    found = name if channel is None else channel.path and os.path.basename(channel.path)
    return f"{'bus' if broadcast else 'shm'}://{found}" if found else None


def file_target(path: str | None) -> str | None:
    """The URI of a file or folder."""
    return None if path is None else f"file://{os.path.abspath(path)}"


def _plain_option(value: Any) -> Any:
    if isinstance(value, Mapping) or hasattr(value, "shape"):
        return schema_to_json(value)
    return getattr(value, "value", value)  # of an enum


class _Step(SourceStep):
    """What most sources share: a flag that stops them."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()


class _ChannelStep(_Step):
    def __init__(self, source: ChannelSource) -> None:
        super().__init__()
        self._source = source
        self._receiver: Any = None

    def __iter__(self) -> Iterator[Any]:
        receiver = self._receiver = self._source.open(self._stopped)
        if receiver is None:
            return
        for message in _messages(receiver, self._stopped):
            yield message.object()
            del message

    def close(self) -> None:
        if self._receiver is not None and self._receiver is not self._source.channel:
            self._receiver.close()


def _messages(receiver: Any, stopped: threading.Event | None = None) -> Iterator[Any]:
    """Yield messages until an END, the end of the channel, or `stopped`."""
    timeout = None if stopped is None else _SLICE_SECONDS
    while stopped is None or not stopped.is_set():
        try:
            message = receiver.recv_message(timeout=timeout)
        except TimeoutError:
            continue
        except ChannelClosedError:
            return
        if end_came(receiver, message):
            return
        yield message
        del message  # while this waits, nothing may hold it


def receive_from(channel: Any, *, timeout: float | None = None) -> Iterator[Any]:
    """Yield what comes through a channel, until its sender says END or the channel is shut down.

    Parameters
    ----------
    channel : channel, Subscriber or str
        A handle, or "shm://name" or "bus://name".
    timeout : float or None
        Seconds to wait for each item; None for ever.

    Yields
    ------
    object
        Arrays as read-only views on the slot, anything else as `recv_object` gives it. The message is done when the next one
        is asked for and nothing refers to the item any more.

    Raises
    ------
    BufferEmptyError
        Nothing came in time.
    """
    source = _channel_source(channel, {}) if not isinstance(channel, str) else parse_source(channel)
    if not isinstance(source, ChannelSource):
        raise PipelineBuildError(
            f"{channel!r} is no channel; receive_from takes a handle, shm://name or bus://name"
        )
    receiver = source.open()
    try:
        while True:
            try:
                message = receiver.recv_message(timeout=timeout)
            except ChannelClosedError:
                return
            if end_came(receiver, message):
                return
            yield message.object()
            del message
    finally:
        if receiver is not source.channel:
            receiver.close()


# --- Python's own -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class IterableSource(Source):
    """The items of any iterable or iterator.

    Notes
    -----
    A sequence (list, tuple, range …) is resumed at an index, an iterator with ``state_dict()`` and ``load_state_dict()`` by
    these, any other iterable by passing over the items that were taken before, and an iterator that cannot begin anew not
    at all.
    """

    kind: ClassVar[str] = "iterable"
    iterable: Iterable[Any]
    schema: Schema = None

    def start(self, context: Context) -> SourceStep:
        if isinstance(self.iterable, Sequence):
            return _SequenceStep(self.iterable)
        return _IterableStep(self.iterable)

    def describe(self) -> str:
        return f"iterable {type(self.iterable).__name__}"

    def to_json(self) -> dict[str, Any]:
        raise PipelineBuildError(
            f"a {type(self.iterable).__name__} cannot be written as text; use a file, or a function of a module that returns it"
        )


class ReplayableSource(IterableSource):
    """An iterable that can say where it is, and go back there: a sequence, or one with a ``state_dict()``."""

    replayable: ClassVar[bool] = True


class _SequenceStep(_Step):
    def __init__(self, sequence: Sequence[Any]) -> None:
        super().__init__()
        self._sequence = sequence
        self._next = 0

    def __iter__(self) -> Iterator[Any]:
        while self._next < len(self._sequence) and not self._stopped.is_set():
            item = self._sequence[self._next]
            self._next += 1
            yield item

    def position(self) -> int:
        return self._next

    def seek(self, position: Any) -> None:
        self._next = _index(position, len(self._sequence), "the sequence")


class _IterableStep(_Step):
    def __init__(self, iterable: Iterable[Any]) -> None:
        super().__init__()
        self._iterable = iterable
        self._iterator: Iterator[Any] | None = None
        self._taken = 0

    def __iter__(self) -> Iterator[Any]:
        iterator = self._begun()
        while not self._stopped.is_set():
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._taken += 1
            yield item
            del item

    def _begun(self) -> Iterator[Any]:
        if self._iterator is None:
            self._iterator = iter(self._iterable)
        return self._iterator

    def position(self) -> Any:
        iterator = self._begun()
        for owner in (iterator, self._iterable):
            state = getattr(owner, "state_dict", None)
            if callable(state) and hasattr(owner, "load_state_dict"):
                return {"state": state()}
        return None if iterator is self._iterable else {"taken": self._taken}

    def seek(self, position: Any) -> None:
        if "state" in position:
            owner: Any = self._begun()
            if not hasattr(owner, "load_state_dict"):
                owner = self._iterable
            owner.load_state_dict(position["state"])
            self._iterator = None if owner is self._iterable else owner
            return
        self._iterator = None
        for _ in itertools.islice(self._begun(), position["taken"]):
            pass
        self._taken = position["taken"]

    def close(self) -> None:
        close = getattr(self._iterator, "close", None)
        if callable(close) and inspect.isgenerator(self._iterator):
            close()


@dataclasses.dataclass(frozen=True, eq=False)
class CallableSource(Source):
    """The items of what a function returns: a generator function, or any function without arguments that returns an iterable.

    Notes
    -----
    Called once, where the source runs. Resumed by calling it again and passing over the items that were taken before: the
    function has to give the same ones again.
    """

    kind: ClassVar[str] = "callable"
    replayable: ClassVar[bool] = True
    function: Callable[[], Iterable[Any]]
    schema: Schema = None

    def start(self, context: Context) -> SourceStep:
        return _CallableStep(self.function)

    def describe(self) -> str:
        return f"{function_name(self.function)}()"

    def to_json(self) -> dict[str, Any]:
        return {
            "source": "callable",
            "function": reference(self.function),
            "schema": schema_to_json(self.schema),
        }


class _CallableStep(_IterableStep):
    def __init__(self, function: Callable[[], Iterable[Any]]) -> None:
        super().__init__(())
        self._function = function

    def _begun(self) -> Iterator[Any]:
        if self._iterator is None:
            returned: Any = self._function()
            try:
                self._iterator = iter(returned)
            except TypeError:
                raise PipelineRuntimeError(
                    f"source {function_name(self._function)}() returned a {type(returned).__name__}, must return an iterable; "
                    "for a function that returns one item at each call give iter(function, last_value)"
                ) from None
        return self._iterator


def _index(position: Any, most: int, what: str) -> int:
    if not isinstance(position, int) or not 0 <= position <= most:
        raise PipelineRuntimeError(
            f"position {position!r} of the checkpoint is not in {what}, which has {most} items"
        )
    return position


# --- arrays and their files ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """An array, or a .npy or .npz file, piece by piece.

    Attributes
    ----------
    path : str or None
        The file; None for an array that is given as an object.
    rows : int or None
        Rows of the first axis per item. None: one frame at a time (``a[i]``) from an array of two or more dimensions, 4096
        rows at a time from others and from columns.
    array : ndarray, optional

    Notes
    -----
    Files are mapped, not read: items are read-only views of the file, which must not be cut short meanwhile. The arrays of a
    .npz file are columns of equal length; compressed ones are read at the start.
    """

    kind: ClassVar[str] = "array"
    replayable: ClassVar[bool] = True
    path: str | None
    rows: int | None = None
    array: Array | None = None
    schema: Schema = None

    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", file_target(self.path))

    def start(self, context: Context) -> SourceStep:
        data = self.array if self.path is None else _load_array(self.path)
        return _RowsStep(data, self.rows, self.path or "the array")

    def describe(self) -> str:
        return self.path or "array"

    def to_json(self) -> dict[str, Any]:
        if self.path is None:
            raise PipelineBuildError("an array cannot be written as text; save it to a .npy file")
        return {
            "source": "array",
            "path": self.path,
            "rows": self.rows,
            "schema": schema_to_json(self.schema),
        }


def _load_array(path: str) -> Any:
    """An array of a .npy file, or the columns of a .npz file."""
    if not path.endswith(".npz"):
        return open_npy(path)
    arrays = open_npz(path)
    lengths = {len(each) if each.ndim else -1 for each in arrays.values()}
    if not arrays or len(lengths) != 1 or -1 in lengths:
        shapes = ", ".join(f"{name}: {each.shape}" for name, each in arrays.items()) or "none"
        raise PipelineBuildError(
            f"the arrays of {path!r} are no columns, which are of equal length ({shapes}); use dsline.files({path!r}), "
            "which gives all of a file as one item"
        )
    return arrays


def _row_count(data: Any) -> int:
    first = next(iter(data.values())) if isinstance(data, Mapping) else data
    return len(first) if first.ndim else 1


def _rows_item(data: Any, start: int, rows: int | None) -> Any:
    """The item that begins with row `start`; see `ArraySource.rows`."""
    if isinstance(data, Mapping):
        return columns_item({name: each[start : start + (rows or _ROWS)] for name, each in data.items()})
    if data.ndim == 0:
        return data
    if rows is None and data.ndim >= 2:
        return data[start]
    return data[start : start + (rows or _ROWS)]


def columns_item(columns: Mapping[str, Array]) -> Any:
    """A Batch where the arrays are columns of one dimension and one length; else the dict as it is."""
    if (
        all(each.ndim == 1 for each in columns.values())
        and len({len(each) for each in columns.values()}) == 1
    ):
        return Batch(columns)
    return dict(columns)


class _RowsStep(_Step):
    def __init__(self, data: Any, rows: int | None, what: str) -> None:
        super().__init__()
        self._data, self._rows, self._what = data, rows, what
        self._count = _row_count(data)
        one = rows is None and not isinstance(data, Mapping) and data.ndim != 1
        self._stride = 1 if one else rows or _ROWS
        self._next = 0

    def __iter__(self) -> Iterator[Any]:
        while self._next < self._count and not self._stopped.is_set():
            item = _rows_item(self._data, self._next, self._rows)
            self._next = min(self._count, self._next + self._stride)
            yield item
            del item

    def position(self) -> int:
        return self._next

    def seek(self, position: Any) -> None:
        self._next = _index(position, self._count, self._what)


# --- files and folders --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class FilesSource(Source):
    """Files, one after the other: see `files`."""

    kind: ClassVar[str] = "files"
    replayable: ClassVar[bool] = True
    patterns: tuple[str, ...]
    shuffle: int | None = None
    repeat: int | None = 1
    rows: int | None = None
    load: Callable[[Path], Any] | None = None
    schema: Schema = None

    def paths(self) -> list[str]:
        """The files, sorted, each once.

        Raises
        ------
        PipelineBuildError
            No file fits.
        """
        found = {path for pattern in self.patterns for path in _matching(pattern)}
        if not found:
            raise PipelineBuildError(f"no file fits {' or '.join(map(repr, self.patterns))}")
        return sorted(found)

    def start(self, context: Context) -> SourceStep:
        return _FilesStep(self, self.paths())

    def describe(self) -> str:
        return f"files {', '.join(self.patterns)}"

    def to_json(self) -> dict[str, Any]:
        return {
            "source": "files",
            "patterns": list(self.patterns),
            "shuffle": self.shuffle,
            "repeat": self.repeat,
            "rows": self.rows,
            "load": None if self.load is None else reference(self.load),
            "schema": schema_to_json(self.schema),
        }


def files(
    patterns: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    shuffle: int | None = None,
    repeat: int | None = 1,
    rows: int | None = None,
    load: Callable[[Path], Any] | None = None,
    schema: Schema = None,
) -> FilesSource:
    """Describe a source that gives files one after the other.

    Parameters
    ----------
    patterns : str, path or iterable of them
        Files, folders (all files in them), or patterns with ``*``, ``?``, ``[…]`` and ``**``.
    shuffle : int, optional
        Seed of the order: another one in each pass, and the same in every run. None: sorted by path.
    repeat : int or None
        Passes over the files; None without end.
    rows : int, optional
        Rows of .npy and .npz files per item. None: all of a file is one item.
    load : callable, optional
        ``load(path)`` makes an item of a `pathlib.Path`. By default .npy files are mapped arrays, .npz files a `Batch` of
        columns or a dict of arrays, pictures are arrays (extra "images"), and of any other file the item is its path.
    schema : Schema, optional
        What the items are, where it is known.

    Returns
    -------
    FilesSource
        For `Pipeline.source`. Resumed at the file (and row) where a checkpoint was made, if the files are the same.

    Raises
    ------
    PipelineBuildError
        No file fits.
    """
    given = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
    if isinstance(shuffle, bool | float | str):
        raise PipelineBuildError(f"shuffle is {shuffle!r}, must be the seed of the order, an int, or None")
    if repeat is not None:
        repeat = _at_least_one("repeat", repeat)
    if rows is not None:
        rows = _at_least_one("rows", rows)
    source = FilesSource(tuple(os.fspath(each) for each in given), shuffle, repeat, rows, load, schema)
    source.paths()
    return source


def _at_least_one(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PipelineBuildError(f"{name} is {value!r}, must be an int of 1 or more")
    return value


def _matching(pattern: str) -> Iterator[str]:
    if os.path.isdir(pattern):
        with os.scandir(pattern) as entries:
            yield from (entry.path for entry in entries if entry.is_file() and not entry.name.startswith("."))
    elif os.path.isfile(pattern):
        yield pattern
    else:
        yield from (path for path in _glob.iglob(pattern, recursive=True) if os.path.isfile(path))


def _load_file(path: str) -> Any:
    """A whole file as one item."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".npy":
        return open_npy(path)
    if suffix == ".npz":
        return columns_item(open_npz(path))
    if suffix in media.IMAGE_SUFFIXES:
        return media.read_image(path)
    return Path(path)


class _FilesStep(_Step):
    def __init__(self, source: FilesSource, paths: list[str]) -> None:
        super().__init__()
        self._source, self._paths = source, paths
        self._pass, self._file, self._row = 0, 0, 0
        self._fingerprint = zlib.crc32("\0".join(paths).encode("utf-8", "surrogateescape"))

    def __iter__(self) -> Iterator[Any]:
        while self._source.repeat is None or self._pass < self._source.repeat:
            order = self._order()
            while self._file < len(order):
                if self._stopped.is_set():
                    return
                yield from self._items(order[self._file])
                if self._row:
                    return  # stopped within a file
            self._pass, self._file = self._pass + 1, 0

    def _order(self) -> list[str]:
        order = list(self._paths)
        if self._source.shuffle is not None:
            random.Random(f"{self._source.shuffle}:{self._pass}").shuffle(order)
        return order

    def _items(self, path: str) -> Iterator[Any]:
        rows = self._source.rows
        if rows is None or self._source.load is not None or not path.endswith((".npy", ".npz")):
            load = self._source.load
            item = _load_file(path) if load is None else load(Path(path))
            self._file += 1
            yield item
            return
        data = _load_array(path)
        count = _row_count(data)
        while not self._stopped.is_set():
            item = _rows_item(data, self._row, rows)
            self._row += rows
            if self._row >= count:
                self._row = 0
                self._file += 1
            yield item
            del item
            if not self._row:
                return

    def position(self) -> dict[str, int]:
        return {"pass": self._pass, "file": self._file, "row": self._row, "files": self._fingerprint}

    def seek(self, position: Any) -> None:
        if position["files"] != self._fingerprint:
            raise PipelineRuntimeError(
                f"the files that fit {', '.join(self._source.patterns)} are not those of the checkpoint: some were added or "
                "removed; restore them, or start anew without resume"
            )
        self._pass, self._file, self._row = position["pass"], position["file"], position["row"]


@dataclasses.dataclass(frozen=True, eq=False)
class ImagesSource(Source):
    """The pictures of a folder or pattern, sorted by name, as arrays. Needs the extra "images"."""

    kind: ClassVar[str] = "images"
    replayable: ClassVar[bool] = True
    pattern: str
    schema: Schema = None

    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", file_target(self.pattern))

    def start(self, context: Context) -> SourceStep:
        media.needs("PIL.Image", "images", "reading pictures")
        return _FilesStep(FilesSource((self.pattern,), load=media.read_image), self.paths())

    def paths(self) -> list[str]:
        """The pictures, sorted; PipelineBuildError where there are none."""
        found = sorted(path for path in _matching(self.pattern) if _suffix(path) in media.IMAGE_SUFFIXES)
        if not found:
            known = ", ".join(media.IMAGE_SUFFIXES)
            raise PipelineBuildError(f"no picture fits {self.pattern!r}; known are {known}")
        return found

    def describe(self) -> str:
        return f"images {self.pattern}"

    def to_json(self) -> dict[str, Any]:
        return {"source": "images", "pattern": self.pattern, "schema": schema_to_json(self.schema)}


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


@dataclasses.dataclass(frozen=True, eq=False)
class VideoSource(Source):
    """The frames of a film as (h, w, 3) arrays of uint8, red first. Needs the extra "video"."""

    kind: ClassVar[str] = "video"
    replayable: ClassVar[bool] = True
    path: str
    schema: Schema = None

    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", file_target(self.path))

    def start(self, context: Context) -> SourceStep:
        return _VideoStep(self.path)

    def describe(self) -> str:
        return f"video {self.path}"

    def to_json(self) -> dict[str, Any]:
        return {"source": "video", "path": self.path, "schema": schema_to_json(self.schema)}


class _VideoStep(_Step):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._reader = media.VideoReader(path)
        self._taken = 0
        self._time: int | None = None  # presentation time of the last frame

    def __iter__(self) -> Iterator[Any]:
        frames = self._reader.frames(self._time)
        if self._time is None and self._taken:  # a film without times
            for _ in itertools.islice(frames, self._taken):
                pass
        for moment, frame in frames:
            if self._stopped.is_set():
                return
            self._taken += 1
            self._time = moment
            yield frame
            del frame

    def position(self) -> dict[str, int | None]:
        return {"taken": self._taken, "time": self._time}

    def seek(self, position: Any) -> None:
        self._taken, self._time = position["taken"], position["time"]

    def close(self) -> None:
        self._reader.close()


# --- the log ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LogSource(Source):
    """The records of a log: see `dsline.dataflow.log.LogReader`, whose options these are."""

    kind: ClassVar[str] = "log"
    replayable: ClassVar[bool] = True
    path: str
    start_at: str | int = "earliest"
    group: str | None = None
    follow: bool = False
    replay_rate: float | str = "max"
    objects: bool = False
    schema: Schema = None

    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", file_target(self.path))

    def start(self, context: Context) -> SourceStep:
        return _LogStep(self)

    def commit(self, position: Any) -> None:
        """Let the group begin at a position of the step the next time: all before it is done. Nothing without a group."""
        from dsline.dataflow.log import commit_group

        if self.group is not None:
            commit_group(self.path, self.group, position)

    def describe(self) -> str:
        group = f", group {self.group!r}" if self.group is not None else ""
        return f"file://{self.path}{group}{', followed' if self.follow else ''}"

    def to_json(self) -> dict[str, Any]:
        return {
            "source": "log",
            "path": self.path,
            "start": self.start_at,
            "group": self.group,
            "follow": self.follow,
            "replay_rate": self.replay_rate,
            "objects": self.objects,
            "schema": schema_to_json(self.schema),
        }


class _LogStep(_Step):
    def __init__(self, source: LogSource) -> None:
        from dsline.dataflow.log import LogReader

        super().__init__()
        self._reader = LogReader(
            source.path,
            start=source.start_at,
            group=source.group,
            follow=source.follow,
            replay_rate=source.replay_rate,
            objects=source.objects,
            stopped=self._stopped,
        )

    def __iter__(self) -> Iterator[Any]:
        for record in self._reader:
            yield record.item()
            del record

    def position(self) -> Any:
        return self._reader.position()

    def seek(self, position: Any) -> None:
        self._reader.seek(position)

    def close(self) -> None:
        self._reader.close()


# --- parsing ------------------------------------------------------------------------------------------------------------


def options_for(cls: type[S], given: Mapping[str, Any], what: str, **fixed: Any) -> S:
    """Make a description of options, which are its fields; "start" is the field start_at.

    Raises
    ------
    PipelineBuildError
        An option that it does not have, or a value that it cannot have.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    names = {
        ("start" if name == "start_at" else name): name
        for name in fields
        if name not in fixed and name not in ("own_group", "target")
    }
    values = dict(fixed)
    for option, value in given.items():
        if option not in names:
            raise PipelineBuildError(
                f"{what} has no option {option!r}; it has {', '.join(sorted(names)) or 'none'}"
            )
        values[names[option]] = value
    return cls(**values)


def parse_source(thing: Any, **options: Any) -> Source:
    """Return the description of a source.

    Parameters
    ----------
    thing : object
        A `Source`; "shm://name", "bus://name", "file://path", "images://folder or pattern"; the path of a .npy or .npz file,
        a film or pictures; a channel or Subscriber; an array; a function that returns an iterable; any iterable.
    **options
        Of the source; `schema` for all of them.

    Returns
    -------
    Source

    Raises
    ------
    PipelineBuildError
        It is none of these, an option is not known, or a file is not there.
    FeatureUnavailableError
        A package is missing; names the extra.
    """
    if isinstance(thing, Source):
        return _with_options(thing, options)
    if isinstance(thing, str | os.PathLike):
        return _source_of_text(os.fspath(thing), isinstance(thing, str), options)
    if isinstance(thing, _Channel | Subscriber):
        return _channel_source(thing, options)
    if isinstance(thing, np.ndarray):
        return _array_source(None, thing, options)
    if isinstance(thing, Mapping | bytes | bytearray | memoryview | np.generic):
        raise PipelineBuildError(
            f"a {type(thing).__name__} is one item, not a source of items; put it into a list"
        )
    if isinstance(thing, Endpoint):
        raise PipelineBuildError(f"{thing!r} cannot be received from; give a channel or a Subscriber")
    if hasattr(thing, "__iter__") and not isinstance(thing, type):
        stateful = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
        cls = ReplayableSource if stateful or isinstance(thing, Sequence) else IterableSource
        return options_for(cls, options, "an iterable source", iterable=thing)
    if callable(thing):
        return options_for(CallableSource, options, "a callable source", function=thing)
    raise PipelineBuildError(
        f"a {type(thing).__name__} is no source; give a URI, a path, a channel, an iterable or a function that returns one"
    )


def _with_options(source: Source, options: Mapping[str, Any]) -> Source:
    if not options:
        return source
    names = {field.name for field in dataclasses.fields(source) if field.init}  # type: ignore[arg-type]
    renamed = {"start_at" if name == "start" else name: value for name, value in options.items()}
    if unknown := renamed.keys() - names:
        raise PipelineBuildError(f"{source.describe()} has no option {', '.join(map(repr, sorted(unknown)))}")
    return dataclasses.replace(source, **renamed)  # type: ignore[type-var]


def _source_of_text(text: str, is_text: bool, options: Mapping[str, Any]) -> Source:
    scheme, place = split_uri(text) if is_text else (None, text)
    if scheme in ("shm", "bus"):
        return _named_channel_source(place, scheme == "bus", options)
    if scheme == "file":
        return _log_source(place, options)
    if scheme == "images":
        return _image_source(place, options)
    if scheme is not None:
        raise PipelineBuildError(
            f"{text!r} has the unknown scheme {scheme}://; known are shm://, bus://, file:// and images://"
        )
    suffix = _suffix(text)
    if suffix in (".npy", ".npz"):
        return _array_source(text, None, options)
    if suffix in media.VIDEO_SUFFIXES:
        return _video_source(text, options)
    if suffix in media.IMAGE_SUFFIXES or os.path.isdir(text):
        return _image_source(text, options)
    raise PipelineBuildError(
        f"{text!r} is no source: give shm://, bus://, file:// (a log) or images://, or the path of a .npy or .npz file, a film "
        f"({', '.join(media.VIDEO_SUFFIXES)}) or pictures; for other files use dsline.files({text!r}, load=...)"
    )


def split_uri(text: str) -> tuple[str | None, str]:
    """Return scheme and the rest; None where the text has no scheme. PipelineBuildError where nothing follows it."""
    match = _SCHEME.fullmatch(text)
    if match is None:
        return None, text
    if not match[2]:
        raise PipelineBuildError(f"{text!r} names nothing behind {match[1]}://")
    return match[1].lower(), match[2]


def channel_name(name: str, scheme: str) -> str:
    """Check the name of a channel."""
    if _NAME.fullmatch(name) is None:
        raise PipelineBuildError(
            f"{scheme}://{name} is no channel: a name has 1 to 100 of A-Z a-z 0-9 . _ - and no leading dot"
        )
    return name


def split_channel_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell what a channel is created with from the rest; None is not given."""
    given = {name: value for name, value in options.items() if name in _CHANNEL_OPTIONS and value is not None}
    return given, {name: value for name, value in options.items() if name not in _CHANNEL_OPTIONS}


def _check_start(value: Any) -> str:
    try:
        return Start(value.value if isinstance(value, Start) else value).value
    except ValueError:
        raise PipelineBuildError(
            f"start is {value!r}, must be 'next', 'oldest' or 'latest' for a channel"
        ) from None


def _named_channel_source(place: str, broadcast: bool, options: Mapping[str, Any]) -> ChannelSource:
    scheme = "bus" if broadcast else "shm"
    name = channel_name(place, scheme)
    create, rest = split_channel_options(options)
    source = options_for(
        ChannelSource, rest, f"{scheme}://", name=name, broadcast=broadcast, create=create, channel=None
    )
    schema = source.schema or item_schema(create.get("spec") or living_spec(name))
    return dataclasses.replace(source, start_at=_check_start(source.start_at), schema=schema)


def _channel_source(channel: Any, options: Mapping[str, Any]) -> ChannelSource:
    if not isinstance(channel, _Channel | Subscriber):
        raise PipelineBuildError(f"a {type(channel).__name__} is no channel")
    if channel.closed:
        raise PipelineBuildError(f"{channel!r} is closed")
    broadcast = isinstance(channel, Broadcast)
    fixed: dict[str, Any] = {"name": None, "broadcast": broadcast, "create": {}, "channel": channel}
    source = options_for(ChannelSource, options, "a channel", **fixed)
    if isinstance(channel, Subscriber) and source.group is not None:
        raise PipelineBuildError(f"{channel!r} receives for its own group; leave group={source.group!r} out")
    schema: Schema = source.schema or item_schema(channel.spec)
    return dataclasses.replace(source, start_at=_check_start(source.start_at), schema=schema)


def item_schema(spec: Any) -> Schema:
    """What the items of a channel with a spec are: records arrive as structures without dimensions."""
    return ArraySpec((), record_dtype(spec)) if isinstance(spec, Mapping) else spec


def living_spec(name: str) -> Schema:
    """The spec of a channel that somebody has open; None where nobody does, or it has none."""
    try:
        # Opening one that nobody has open could be its end.
        report: ChannelReport = channel_report(name)
        if not report.alive or report.shut_down:
            return None
        with (ShmChannel if report.default_group else Broadcast).open(name) as channel:
            spec: Schema = channel.spec
            return spec
    except (DslineError, OSError):
        return None


def _array_source(path: str | None, array: Array | None, options: Mapping[str, Any]) -> ArraySource:
    source = options_for(ArraySource, options, "an array source", path=path, array=array)
    if source.rows is not None:
        _at_least_one("rows", source.rows)
    data: Any = array if path is None else _load_array(path)
    if array is not None and array.dtype.hasobject:
        raise PipelineBuildError(
            f"the array holds Python objects ({array.dtype}); use array.tolist() as the source"
        )
    if source.schema is not None or not _row_count(data):
        return source
    schema = schema_of(_rows_item(data, 0, source.rows))
    return dataclasses.replace(source, schema=_open_rows(schema, source.rows, data))


def _open_rows(schema: Schema, rows: int | None, data: Any) -> Schema:
    """The schema of all items from that of the first: the last may have fewer rows."""
    if not isinstance(schema, ArraySpec) or (rows is None and data.ndim != 1):
        return schema
    return ArraySpec((None, *schema.shape[1:]), schema.dtype)


def _image_source(pattern: str, options: Mapping[str, Any]) -> ImagesSource:
    source = options_for(ImagesSource, options, "images://", pattern=pattern)
    media.needs("PIL.Image", "images", "reading pictures")
    source.paths()
    return source


def _video_source(path: str, options: Mapping[str, Any]) -> VideoSource:
    source = options_for(VideoSource, options, "a film", path=path)
    media.needs("av", "video", "reading films")
    if not os.path.isfile(path):
        raise PipelineBuildError(f"there is no file {path!r}")
    reader = media.VideoReader(path)
    try:
        return (
            source if source.schema else dataclasses.replace(source, schema=ArraySpec(reader.shape, np.uint8))
        )
    finally:
        reader.close()


def _log_source(path: str, options: Mapping[str, Any]) -> LogSource:
    from dsline.dataflow.log import check_reader, log_schema

    source = options_for(LogSource, options, "file://", path=path)
    check_reader(source.path, source.start_at, source.group, source.follow, source.replay_rate)
    return source if source.schema else dataclasses.replace(source, schema=log_schema(path))


def source_from_json(data: Mapping[str, Any]) -> Source:
    """Return the source that `to_json` wrote.

    Raises
    ------
    PipelineBuildError
        The data are none, or what they name is not there.
    """
    given = dict(data)
    kind = given.pop("source", None)
    try:
        schema = schema_from_json(given.pop("schema", None))
        if given.get("spec") is not None:
            given["spec"] = schema_from_json(given["spec"])
        if kind in ("shm", "bus"):
            return _named_channel_source(given.pop("name"), kind == "bus", {**given, "schema": schema})
        if kind == "log":
            return _log_source(given.pop("path"), {**given, "schema": schema})
        if kind == "array":
            return _array_source(given.pop("path"), None, {**given, "schema": schema})
        if kind == "images":
            return _image_source(given.pop("pattern"), {"schema": schema})
        if kind == "video":
            return _video_source(given.pop("path"), {"schema": schema})
        if kind == "callable":
            return CallableSource(resolve(given["function"]), schema)
        if kind == "files":
            load = given.pop("load")
            return files(**given, load=None if load is None else resolve(load), schema=schema)
    except (KeyError, TypeError, AttributeError) as error:
        raise PipelineBuildError(f"{data!r} describes no source: {error}") from error
    raise PipelineBuildError(f"{data!r} describes no source: unknown kind {kind!r}")
