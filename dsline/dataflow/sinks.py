"""Sinks: where the items of a pipeline go, described by a URI, a path or a Python object."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np

from dsline.broadcast import Broadcast
from dsline.channel import ShmChannel, _Channel
from dsline.dataflow import media
from dsline.dataflow.callables import close as close_function
from dsline.dataflow.callables import function_name, instantiate, reference, resolve
from dsline.dataflow.items import (
    RECORDS,
    Batch,
    item_text,
    kind_of,
    schema_from_json,
    schema_text,
    schema_to_json,
)
from dsline.dataflow.npy_files import NpyAppender, open_npz, sync_folder, zip_parts
from dsline.dataflow.operator import Context, Schema, Sink, SinkStep
from dsline.dataflow.sources import (
    END_KIND,
    SHUT_DOWN_AT_END,
    channel_name,
    channel_target,
    file_target,
    item_schema,
    options_for,
    split_channel_options,
    split_uri,
)
from dsline.errors import (
    BufferFullError,
    ChannelExistsError,
    ChannelNotFoundError,
    PipelineBuildError,
    PipelineRuntimeError,
)
from dsline.groups import Subscriber
from dsline.options import Backpressure
from dsline.specs import ArraySpec

__all__ = [
    "FULL",
    "CallableSink",
    "ChannelSink",
    "CollectSink",
    "ImagesSink",
    "LogSink",
    "NpySink",
    "NpzSink",
    "SinkOptions",
    "VideoSink",
    "collect",
    "own",
    "parse_sink",
    "send_item",
    "send_to",
    "sink_from_json",
]

Array: TypeAlias = np.ndarray[Any, Any]

# What may happen where there is no room, as a channel does it; "latest" is a channel with one slot as well.
FULL: Final = {
    "block": Backpressure.BLOCK,
    "drop_oldest": Backpressure.DROP_OLDEST,
    "drop_newest": Backpressure.DROP_NEWEST,
    "latest": Backpressure.DROP_OLDEST,
    "error": Backpressure.RAISE,
}
_SLICE_SECONDS: Final = 0.2  # a sink that waits for room looks this often whether it has been stopped
_END_SECONDS: Final = 10.0  # for room for an END, in a channel whose policy is not to wait
_ON_END: Final = ("keep", "end", "shutdown")


class SinkOptions:
    """A sink with stage options of its own, for `Pipeline.broadcast`: ``dsline.Sink``.

    Parameters
    ----------
    target : object
        As for `Pipeline.sink`.
    full : str
        What happens to an item while there is no room for it: "block", "drop_oldest", "drop_newest", "latest" or "error".
    queue : int, optional
        Items that wait for this sink at most.
    name : str, optional
        Name of the stage.
    **options
        Of the sink, and stage options.

    Raises
    ------
    PipelineBuildError
        A value that these options cannot have; the others are checked by the pipeline.
    """

    __slots__ = ("options", "target")

    def __init__(
        self,
        target: Any,
        *,
        full: str = "block",
        queue: int | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        given = {"full": _check_full(full), "queue": queue, "name": name}
        self.target = target
        self.options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        self.options.update(options)

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"Sink({self.target!r}{options})"


def _check_full(full: str) -> str:
    if full not in tuple(FULL):
        raise PipelineBuildError(f"full is {full!r}, must be one of {', '.join(map(repr, FULL))}")
    return full


# --- channels -----------------------------------------------------------------------------------------------------------


def send_item(channel: Any, item: Any, timeout: Any = None) -> bool:
    """Send one item: an array as an array message, anything else by `send_object`. Returns what `send` returns."""
    if isinstance(item, np.ndarray) and not item.dtype.hasobject:
        return bool(channel.send(item, timeout=timeout))
    if channel.spec is not None:
        # A typed channel takes what fits it: a record is a mapping of names to values.
        return bool(channel.send(dict(item) if isinstance(item, Batch) else item, timeout=timeout))
    return bool(channel.send_object(item, timeout=timeout))


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelSink(Sink):
    """Sends items into a channel.

    Attributes
    ----------
    name : str or None
        Of the channel; None for one that is given as an object.
    broadcast : bool
        Whether it is a `dsline.Broadcast`.
    full : str
        What happens while the channel has no room; "latest" makes a channel of one slot.
    timeout : float or None
        Seconds to wait for room with "block"; None for ever.
    on_end : str or None
        What the end of the pipeline is to receivers: "shutdown" is the end of the channel, which all of them see behind the
        last item; "end" is an END message, which one receiver of each group gets; "keep" is nothing. None: "shutdown" for a
        channel that the sink made, "keep" for another.
    create : mapping
        Options of `ShmChannel`, for a channel that is not there.
    channel : channel, optional
        The handle itself, which stays open at the end.

    Notes
    -----
    Arrays are copied into a slot; anything else goes by `send_object`. "shutdown" of a channel that nobody else has open
    leaves the items in it with an END, at which the first receiver shuts it down.
    """

    kind: ClassVar[str] = "channel"
    name: str | None
    broadcast: bool = False
    full: str = "block"
    timeout: float | None = None
    on_end: str | None = None
    create: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    channel: Any = None
    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", channel_target(self.name, self.broadcast, self.channel))

    def start(self, context: Context) -> SinkStep:
        return _ChannelStep(self)

    def check(self, schema: Schema) -> None:
        spec = item_schema(self.create.get("spec") if self.channel is None else self.channel.spec)
        if spec is None or schema is None:
            return
        if isinstance(spec, ArraySpec) and isinstance(schema, ArraySpec):
            dims = zip(spec.shape, schema.shape, strict=False)
            fits = spec.ndim == schema.ndim and all(None in pair or pair[0] == pair[1] for pair in dims)
            if fits and spec.dtype == schema.dtype:
                return
        raise PipelineBuildError(
            f"{self.describe()} carries {schema_text(spec)}, and {schema_text(schema)} comes"
        )

    def describe(self) -> str:
        place = self.name if self.name is not None else repr(self.channel)
        return f"{'bus' if self.broadcast else 'shm'}://{place}"

    def open(self) -> tuple[Any, bool]:
        """Return the channel, and whether it was made by this call. The caller closes it unless it is `self.channel`.

        Raises
        ------
        ChannelError
            As for opening and creating a channel.
        """
        if self.channel is not None:
            return self.channel, False
        assert self.name is not None
        cls = Broadcast if self.broadcast else ShmChannel
        options = {**self.create, "backpressure": FULL[self.full], "timeout": self.timeout}
        if self.full == "latest":
            options.setdefault("capacity", 1)
        while True:
            try:
                return cls.create(self.name, **options), True
            except ChannelExistsError:
                pass
            try:
                # By the class, so that another geometry than the one asked for is an error.
                options.pop("on_stale", None)
                known = {
                    key: value for key, value in options.items() if key in ("backpressure", "timeout", "spec")
                }
                return (cls(self.name, **options) if self.create else cls.open(self.name, **known)), False
            except ChannelNotFoundError:
                continue  # it went between the two calls

    def to_json(self) -> dict[str, Any]:
        if self.name is None:
            raise PipelineBuildError(
                "a channel that is given as an object cannot be written as text; give its name, as shm://name"
            )
        create = {
            key: schema_to_json(value) if key == "spec" else getattr(value, "value", value)
            for key, value in self.create.items()
        }
        return {
            "sink": "bus" if self.broadcast else "shm",
            "name": self.name,
            "full": self.full,
            "timeout": self.timeout,
            "on_end": self.on_end,
            **create,
        }


class _ChannelStep(SinkStep):
    def __init__(self, sink: ChannelSink) -> None:
        self._sink = sink
        self._channel, made = sink.open()
        self._on_end = sink.on_end or ("shutdown" if made else "keep")
        self._stopped = False

    def write(self, item: Any) -> None:
        self._sent(lambda timeout: send_item(self._channel, item, timeout))

    def _sent(self, send: Callable[[float], bool]) -> bool:
        """Call `send` with a short timeout until it has had room, so that `stop` is heard."""
        timeout = self._sink.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = (
                _SLICE_SECONDS
                if deadline is None
                else min(_SLICE_SECONDS, max(0, deadline - time.monotonic()))
            )
            try:
                return send(left)
            except BufferFullError:
                if self._channel.backpressure is Backpressure.RAISE or (
                    deadline is not None and time.monotonic() >= deadline
                ):
                    raise
                if self._stopped:
                    raise PipelineRuntimeError(
                        f"{self._sink.describe()} has no room, and the sink was told to stop"
                    ) from None

    def stop(self) -> None:
        """Wait for room no more. May be called from another thread."""
        self._stopped = True

    def finish(self) -> None:
        if self._on_end == "keep":
            return
        if self._on_end == "shutdown" and self._others():
            self._channel.shutdown()
            return
        payload = SHUT_DOWN_AT_END if self._on_end == "shutdown" else b""
        # Not as an item: a policy that drops or raises must not lose the end.
        deadline = time.monotonic() + _END_SECONDS
        while not self._end_entered(payload):
            waits = self._channel.backpressure is Backpressure.BLOCK
            if self._stopped or (not waits and time.monotonic() >= deadline):
                raise PipelineRuntimeError(
                    f"{self._sink.describe()} has no room for the end, and nobody receives; on_end='keep' sends none"
                )
            time.sleep(0.005)

    def _end_entered(self, payload: bytes) -> bool:
        try:
            return bool(self._channel._core_send_control(END_KIND, payload, _SLICE_SECONDS))
        except BufferFullError:
            return False

    def _others(self) -> bool:
        """Whether somebody else has the channel open: the last one to close a channel that is shut down removes it with
        all that is in it."""
        return bool(self._channel.inspect().alive > 1)

    def close(self) -> None:
        if self._channel is not self._sink.channel:
            self._channel.close()


def send_to(iterable: Iterable[Any], channel: Any, *, timeout: float | None = None) -> int:
    """Send every item of an iterable into a channel, and an END behind the last.

    Parameters
    ----------
    iterable : iterable
        Arrays are sent as arrays, anything else as objects.
    channel : channel or str
        A handle, or "shm://name" or "bus://name": then the channel is made where it is not there, and left open for a
        receiver that comes later.
    timeout : float or None
        Seconds to wait for room; None for ever.

    Returns
    -------
    int
        How many items entered the channel; those that a drop policy discarded do not count.

    Raises
    ------
    BufferFullError
        There was no room in time.
    """
    if isinstance(channel, str):
        sink = parse_sink(channel)
        if not isinstance(sink, ChannelSink):
            raise PipelineBuildError(
                f"{channel!r} is no channel; send_to takes a handle, shm://name or bus://name"
            )
        opened, _ = sink.open()
        with opened:
            return send_to(iterable, opened, timeout=timeout)
    sent = 0
    for item in iterable:
        sent += send_item(channel, item, timeout)
    channel._core_send_control(END_KIND, b"", timeout)
    return sent


# --- Python's own -------------------------------------------------------------------------------------------------------


def own(item: Any) -> Any:
    """Return the item, or a copy of it where it is a view of something else: what is kept must not hold a slot."""
    if isinstance(item, np.ndarray):
        return item if item.flags.owndata else item.copy(order="K")
    if isinstance(item, Batch):
        return item if all(column.flags.owndata for column in item.values()) else item.copy()
    if isinstance(item, memoryview):
        return bytes(item)
    if type(item) in (list, tuple):
        return type(item)(map(own, item))
    if type(item) is dict:
        return {key: own(value) for key, value in item.items()}
    return item


def collect(iterable: Iterable[Any]) -> list[Any]:
    """Return the items of an iterable as a list; arrays that are views, of slots for instance, are copied."""
    return [own(item) for item in iterable]


@dataclasses.dataclass(frozen=True, eq=False)
class CallableSink(Sink):
    """Calls a function with every item.

    Notes
    -----
    A class is constructed once, where the sink runs. Its methods ``flush()``, ``position()``, ``restore(position)``,
    ``finish()`` and ``close()`` are called as those of `SinkStep`, where it has them.
    """

    kind: ClassVar[str] = "callable"
    function: Callable[[Any], object]

    def start(self, context: Context) -> SinkStep:
        return _CallableStep(instantiate(self.function))

    def describe(self) -> str:
        return f"{function_name(self.function)}()"

    def to_json(self) -> dict[str, Any]:
        return {"sink": "callable", "function": reference(self.function)}


class _CallableStep(SinkStep):
    def __init__(self, function: Any) -> None:
        self._function = function

    def write(self, item: Any) -> None:
        self._function(item)

    def _call(self, name: str, *arguments: Any) -> Any:
        method = getattr(self._function, name, None)
        return method(*arguments) if callable(method) else None

    def flush(self) -> None:
        self._call("flush")

    def position(self) -> Any:
        return self._call("position") if hasattr(self._function, "restore") else None

    def restore(self, position: Any) -> None:
        self._call("restore", position)

    def finish(self) -> None:
        self._call("finish")

    def close(self) -> None:
        close_function(self._function)


@dataclasses.dataclass(frozen=True, eq=False)
class CollectSink(Sink):
    """Keeps the items in a list of the caller's process; arrays that are views are copied.

    Attributes
    ----------
    items : list or None
        The list to append to; None: the step has one of its own, `items` of it.
    """

    kind: ClassVar[str] = "collect"
    items: list[Any] | None = None

    def start(self, context: Context) -> SinkStep:
        return CollectStep([] if self.items is None else self.items)

    def to_json(self) -> dict[str, Any]:
        if self.items is not None:
            raise PipelineBuildError(
                "a list cannot be written as text; use a file, or a function of a module"
            )
        return {"sink": "collect"}


class CollectStep(SinkStep):
    """The running `CollectSink`; `items` is the list."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def write(self, item: Any) -> None:
        self.items.append(own(item))


# --- files --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LogSink(Sink):
    """Appends items to a log: see `dsline.dataflow.log.LogWriter`, whose options these are."""

    kind: ClassVar[str] = "log"
    path: str
    sync: str | float | None = None
    segment_bytes: int = 256 << 20

    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", file_target(self.path))

    def start(self, context: Context) -> SinkStep:
        return _LogStep(self)

    def describe(self) -> str:
        return f"file://{self.path}"

    def to_json(self) -> dict[str, Any]:
        return {"sink": "log", "path": self.path, "sync": self.sync, "segment_bytes": self.segment_bytes}


class _LogStep(SinkStep):
    def __init__(self, sink: LogSink) -> None:
        from dsline.dataflow.log import LogWriter

        self._writer = LogWriter(sink.path, sync=sink.sync, segment_bytes=sink.segment_bytes)

    def write(self, item: Any) -> None:
        self._writer.append(item)

    def flush(self) -> None:
        self._writer.flush()

    def position(self) -> Any:
        return self._writer.position()

    def restore(self, position: Any) -> None:
        self._writer.restore(position)

    def finish(self) -> None:
        self._writer.end()

    def close(self) -> None:
        self._writer.close()


@dataclasses.dataclass(frozen=True, eq=False)
class NpySink(Sink):
    """One array in a .npy file, which grows along its first axis.

    Attributes
    ----------
    path : str
        Replaced, unless the run resumes a checkpoint.
    append : str or None
        "rows": the rows of each item are appended; "items": each item is one row. None: "rows" for records (structured
        arrays of one dimension), "items" for any other array and for numbers.
    """

    kind: ClassVar[str] = "npy"
    path: str
    append: str | None = None

    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", file_target(self.path))

    def start(self, context: Context) -> SinkStep:
        return _NpyStep(self)

    def check(self, schema: Schema) -> None:
        if isinstance(schema, Mapping):
            raise PipelineBuildError(
                f"columns cannot go into {self.path!r}; use a .npz file, a log (file://), or records (Batch.to_records)"
            )

    def describe(self) -> str:
        return self.path

    def to_json(self) -> dict[str, Any]:
        return {"sink": "npy", "path": self.path, "append": self.append}


def _as_rows(item: Any, append: str | None, path: str) -> Array:
    """An array whose first axis counts what is appended."""
    array = item if isinstance(item, np.ndarray) else np.asarray(item)
    if array.dtype.hasobject or isinstance(item, Mapping | np.ma.MaskedArray):
        raise PipelineRuntimeError(f"{item_text(item)} cannot go into {path!r}, which holds one array")
    by_rows = kind_of(array) == RECORDS if append is None else append == "rows"
    if by_rows and array.ndim == 0:
        raise PipelineRuntimeError(f"{item_text(item)} has no rows to append to {path!r}; use append='items'")
    return array if by_rows else array[None]


class _NpyStep(SinkStep):
    def __init__(self, sink: NpySink) -> None:
        self._sink = sink
        self._file = NpyAppender(sink.path)

    def write(self, item: Any) -> None:
        self._file.append(_as_rows(item, self._sink.append, self._sink.path))

    def flush(self) -> None:
        self._file.flush()

    def position(self) -> int:
        return self._file.rows

    def restore(self, position: Any) -> None:
        self._file.restore(position)

    def finish(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclasses.dataclass(frozen=True, eq=False)
class NpzSink(Sink):
    """The columns of Batches (or of dicts of arrays) as one array per name in a .npz file.

    Attributes
    ----------
    path : str
        Appears at the end; until then the columns grow in the folder ``PATH.parts`` beside it.

    Notes
    -----
    A dict of arrays or numbers is one row of each; arrays are one column, named "data", as in a .npy file.
    """

    kind: ClassVar[str] = "npz"
    path: str

    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", file_target(self.path))

    def start(self, context: Context) -> SinkStep:
        return _NpzStep(self.path)

    def describe(self) -> str:
        return self.path

    def to_json(self) -> dict[str, Any]:
        return {"sink": "npz", "path": self.path}


class _NpzStep(SinkStep):
    def __init__(self, path: str) -> None:
        self._path = path
        self._folder = f"{path}.parts"
        self._names: list[str] | None = None
        self._parts: list[NpyAppender] = []

    def write(self, item: Any) -> None:
        columns = item if isinstance(item, Mapping) else {"data": item}
        append = "rows" if isinstance(item, Batch) else None
        if self._names is None:
            self._open(list(columns))
        if list(columns) != self._names:
            raise PipelineRuntimeError(
                f"file {self._path!r} has the columns {self._names}, and {list(columns)} came"
            )
        for part, column in zip(self._parts, columns.values(), strict=True):
            part.append(_as_rows(column, append, self._path))

    def _part(self, number: int) -> str:
        return os.path.join(self._folder, f"{number}.npy")  # a column's name may be no file name

    def _open(self, names: list[str]) -> None:
        os.makedirs(self._folder, exist_ok=True)
        self._names = names
        self._parts = [NpyAppender(self._part(number)) for number in range(len(names))]

    def flush(self) -> None:
        for part in self._parts:
            part.flush()

    def position(self) -> dict[str, Any]:
        return {"names": self._names, "rows": [part.rows for part in self._parts]}

    def restore(self, position: Any) -> None:
        if position["names"] is None:
            return
        self._open(position["names"])
        if not os.path.isdir(self._folder) or not os.listdir(self._folder):
            self._unpack()
        for part, rows in zip(self._parts, position["rows"], strict=True):
            part.restore(rows)

    def _unpack(self) -> None:
        """Make parts of the file: the run that is resumed had finished."""
        arrays = open_npz(self._path)
        for number, name in enumerate(self._names or ()):
            part = NpyAppender(self._part(number))
            part.append(arrays[name])
            part.flush()
            part.close()

    def finish(self) -> None:
        self.flush()
        names = self._names or []
        for part in self._parts:
            part.close()
        made = {
            name: self._part(number)
            for number, name in enumerate(names)
            if os.path.exists(self._part(number))
        }
        zip_parts(self._path, made)
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        for part in self._parts:
            part.close()


@dataclasses.dataclass(frozen=True, eq=False)
class ImagesSink(Sink):
    """One picture per item in a folder: 00000000.png and so on. Needs the extra "images".

    Attributes
    ----------
    folder : str
        Made where it is not there.
    suffix : str
        Format of the pictures.
    """

    kind: ClassVar[str] = "images"
    folder: str
    suffix: str = ".png"

    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", file_target(self.folder))

    def start(self, context: Context) -> SinkStep:
        media.needs("PIL.Image", "images", "writing pictures")
        return _ImagesStep(self)

    def describe(self) -> str:
        return f"images {self.folder}"

    def to_json(self) -> dict[str, Any]:
        return {"sink": "images", "folder": self.folder, "suffix": self.suffix}


class _ImagesStep(SinkStep):
    def __init__(self, sink: ImagesSink) -> None:
        self._sink = sink
        self._written = 0
        os.makedirs(sink.folder, exist_ok=True)

    def _path(self, number: int) -> str:
        return os.path.join(self._sink.folder, f"{number:08}{self._sink.suffix}")

    def write(self, item: Any) -> None:
        media.write_image(self._path(self._written), np.asarray(item))
        self._written += 1

    def flush(self) -> None:
        sync_folder(self._sink.folder)

    def position(self) -> int:
        return self._written

    def restore(self, position: Any) -> None:
        self._written = position
        for number in range(position, position + 100_000_000):
            try:
                os.unlink(self._path(number))
            except FileNotFoundError:
                return

    def finish(self) -> None:
        self.flush()


@dataclasses.dataclass(frozen=True, eq=False)
class VideoSink(Sink):
    """A film of frames: (h, w) or (h, w, 3) arrays of uint8 with even h and w. Needs the extra "video".

    Attributes
    ----------
    path : str
        Appears at the end; what an interrupted run had encoded is given up.
    fps : float
    codec : str or None
        Of PyAV; None: H.264 where it is there, else MPEG-4.
    """

    kind: ClassVar[str] = "video"
    path: str
    fps: float = 25.0
    codec: str | None = None

    target: str | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", file_target(self.path))

    def start(self, context: Context) -> SinkStep:
        return _VideoStep(media.VideoWriter(self.path, self.fps, self.codec))

    def check(self, schema: Schema) -> None:
        if schema is None:
            return
        frame = isinstance(schema, ArraySpec) and schema.dtype == np.uint8 and schema.ndim in (2, 3)
        if not frame or (schema.ndim == 3 and schema.shape[2] not in (3, None)):  # type: ignore[union-attr]
            raise PipelineBuildError(
                f"film {self.path!r} takes uint8 frames of (h, w) or (h, w, 3), and {schema_text(schema)} comes"
            )

    def describe(self) -> str:
        return f"video {self.path}"

    def to_json(self) -> dict[str, Any]:
        return {"sink": "video", "path": self.path, "fps": self.fps, "codec": self.codec}


class _VideoStep(SinkStep):
    def __init__(self, writer: media.VideoWriter) -> None:
        self._writer = writer

    def write(self, item: Any) -> None:
        self._writer.write(np.asarray(item))

    def finish(self) -> None:
        self._writer.finish()

    def close(self) -> None:
        self._writer.close()


# --- parsing ------------------------------------------------------------------------------------------------------------


def parse_sink(thing: Any = None, **options: Any) -> Sink:
    """Return the description of a sink.

    Parameters
    ----------
    thing : object
        A `Sink`; "shm://name", "bus://name", "file://path", "images://folder"; the path of a .npy or .npz file or a film; a
        channel; a list, or a list's ``append``; a function of one argument, or a class of such; None, which collects.
    **options
        Of the sink.

    Returns
    -------
    Sink

    Raises
    ------
    PipelineBuildError
        It is none of these, an option is not known, or a folder is not there.
    FeatureUnavailableError
        A package is missing; names the extra.
    """
    if isinstance(thing, Sink):
        if options:
            fields = {field.name for field in dataclasses.fields(thing)}  # type: ignore[arg-type]
            if unknown := options.keys() - fields:
                raise PipelineBuildError(
                    f"{thing.describe()} has no option {', '.join(map(repr, sorted(unknown)))}"
                )
            return dataclasses.replace(thing, **options)  # type: ignore[type-var]
        return thing
    if isinstance(thing, str | os.PathLike):
        return _sink_of_text(os.fspath(thing), isinstance(thing, str), options)
    if isinstance(thing, _Channel):
        if thing.closed:
            raise PipelineBuildError(f"{thing!r} is closed")
        fixed: dict[str, Any] = {
            "name": None,
            "broadcast": isinstance(thing, Broadcast),
            "create": {},
            "channel": thing,
        }
        return _checked_channel(options_for(ChannelSink, options, "a channel", **fixed))
    if isinstance(thing, Subscriber):
        raise PipelineBuildError(f"{thing!r} can only receive; give its channel")
    if thing is None or isinstance(thing, list):
        return options_for(CollectSink, options, "a list", items=thing)
    owner = getattr(thing, "__self__", None)
    if isinstance(owner, list) and getattr(thing, "__name__", "") == "append":
        return options_for(CollectSink, options, "a list", items=owner)
    if callable(thing):
        return options_for(CallableSink, options, "a callable sink", function=thing)
    raise PipelineBuildError(
        f"a {type(thing).__name__} is no sink; give a URI, a path, a channel, a list or a function of one argument"
    )


def _sink_of_text(text: str, is_text: bool, options: Mapping[str, Any]) -> Sink:
    scheme, place = split_uri(text) if is_text else (None, text)
    if scheme in ("shm", "bus"):
        name = channel_name(place, scheme)
        create, rest = split_channel_options(options)
        fixed = {"name": name, "broadcast": scheme == "bus", "create": create, "channel": None}
        return _checked_channel(options_for(ChannelSink, rest, f"{scheme}://", **fixed))
    if scheme == "file":
        from dsline.dataflow.log import check_writer

        sink = options_for(LogSink, options, "file://", path=place)
        check_writer(sink.path, sink.sync, sink.segment_bytes)
        return sink
    if scheme == "images":
        return _images_sink(place, options)
    if scheme is not None:
        raise PipelineBuildError(
            f"{text!r} has the unknown scheme {scheme}://; known are shm://, bus://, file:// and images://"
        )
    suffix = os.path.splitext(text)[1].lower()
    if suffix == ".npy":
        npy = options_for(NpySink, options, "a .npy file", path=_in_folder(text))
        if npy.append not in (None, "rows", "items"):
            raise PipelineBuildError(f"append is {npy.append!r}, must be 'rows', 'items' or None")
        return npy
    if suffix == ".npz":
        return options_for(NpzSink, options, "a .npz file", path=_in_folder(text))
    if suffix in media.VIDEO_SUFFIXES:
        film = options_for(VideoSink, options, "a film", path=_in_folder(text))
        media.needs("av", "video", "writing films")
        if not 0 < film.fps < 10_000:
            raise PipelineBuildError(f"fps is {film.fps!r}, must be a number above 0")
        return film
    if text.endswith(os.sep) or os.path.isdir(text):
        return _images_sink(text, options)
    raise PipelineBuildError(
        f"{text!r} is no sink: give shm://, bus://, file:// (a log) or images://, or the path of a .npy or .npz file or a film "
        f"({', '.join(media.VIDEO_SUFFIXES)})"
    )


def _checked_channel(sink: ChannelSink) -> ChannelSink:
    _check_full(sink.full)
    if sink.on_end not in (None, *_ON_END):
        raise PipelineBuildError(f"on_end is {sink.on_end!r}, must be one of {', '.join(map(repr, _ON_END))}")
    if sink.channel is not None and sink.full != "block":
        raise PipelineBuildError(
            f"full is {sink.full!r}, but an open channel has its policy, {sink.channel.backpressure.value!r}; open it with "
            "backpressure=, or give its name"
        )
    if sink.full == "latest" and sink.create.get("capacity", 1) != 1:
        raise PipelineBuildError("full='latest' makes a channel of one slot; leave capacity out")
    return sink


def _in_folder(path: str) -> str:
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise PipelineBuildError(f"there is no folder {folder!r} for {path!r}; make it first")
    return path


def _images_sink(folder: str, options: Mapping[str, Any]) -> ImagesSink:
    sink = options_for(ImagesSink, options, "images://", folder=folder)
    media.needs("PIL.Image", "images", "writing pictures")
    if sink.suffix not in media.IMAGE_SUFFIXES:
        raise PipelineBuildError(
            f"suffix is {sink.suffix!r}, must be one of {', '.join(media.IMAGE_SUFFIXES)}"
        )
    return sink


def sink_from_json(data: Mapping[str, Any]) -> Sink:
    """Return the sink that `to_json` wrote.

    Raises
    ------
    PipelineBuildError
        The data are none, or what they name is not there.
    """
    given = dict(data)
    kind = given.pop("sink", None)
    try:
        if kind in ("shm", "bus"):
            if given.get("spec") is not None:
                given["spec"] = schema_from_json(given["spec"])
            return parse_sink(f"{kind}://{given.pop('name')}", **given)
        if kind == "log":
            return parse_sink(f"file://{given.pop('path')}", **given)
        if kind in ("npy", "npz", "video"):
            return parse_sink(Path(given.pop("path")), **given)
        if kind == "images":
            return parse_sink(f"images://{given.pop('folder')}", **given)
        if kind == "collect":
            return CollectSink()
        if kind == "callable":
            return CallableSink(resolve(given["function"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise PipelineBuildError(f"{data!r} describes no sink: {error}") from error
    raise PipelineBuildError(f"{data!r} describes no sink: unknown kind {kind!r}")
