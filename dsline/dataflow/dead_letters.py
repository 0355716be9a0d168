"""Dead letters: items whose stage failed, with the error, in a log that any number of processes append to.

The dead letters of a channel (messages whose receivers died or gave them back too often) are looked at by the same calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import traceback as _traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from dsline._core import DeadLetter
from dsline.broadcast import Broadcast
from dsline.channel import ShmChannel
from dsline.dataflow.descriptions import error_text
from dsline.dataflow.items import Batch, item_text
from dsline.dataflow.log import LogReader, LogWriter
from dsline.dataflow.records import pack, unpack
from dsline.dataflow.sinks import ChannelSink, LogSink, parse_sink, send_item
from dsline.dataflow.sources import split_uri
from dsline.errors import PipelineBuildError, PipelineRuntimeError, SerializationError
from dsline.status import inspect as channel_report

__all__ = ["FailedItem", "Replayed", "failed_items", "replay", "write_dead_letter"]

_LONGEST_TEXT: Final = 100_000  # characters of a traceback
_LONGEST_DESCRIPTION: Final = 300
_SEGMENT_BYTES: Final = 4 << 20


@dataclasses.dataclass(frozen=True)
class FailedItem:
    """A dead letter.

    Attributes
    ----------
    number : int
        By which `replay` chooses it.
    stage : str
        Where it failed; of a channel, the group that it was for.
    worker : int
        Number of the worker process; -1 in the caller's process, or not known.
    sequence : int or None
        Of the item in its stage's input, or of the message in its channel.
    timestamp_ns : int
        When it failed, as `time.time_ns()`; of a channel, when it was sent.
    deliveries : int
        How often it was tried.
    error_type, error, traceback : str
        What was raised; of a channel, why it is a dead letter.
    description : str
        What the item is.
    replayed : str or None
        Where it was sent by `replay`.
    """

    number: int
    stage: str
    worker: int
    sequence: int | None
    timestamp_ns: int
    deliveries: int
    error_type: str
    error: str
    traceback: str
    description: str
    replayed: str | None
    _load: Callable[[bool], Any] = dataclasses.field(repr=False, compare=False)

    def item(self, *, objects: bool = False) -> Any:
        """Return the item that failed.

        Parameters
        ----------
        objects : bool
            Whether it may be an object of any class: unpickling it runs code that the log chooses. False: arrays and plain
            data only.

        Raises
        ------
        SerializationError
            It needs ``objects=True``, cannot be unpickled here, or could not be pickled when it failed.
        """
        return self._load(objects)

    def asdict(self) -> dict[str, Any]:
        """Return the fields without the item, as plain values."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.name.startswith("_")
        }


# --- writing ------------------------------------------------------------------------------------------------------------


def write_dead_letter(
    uri: str,
    *,
    stage: str,
    worker: int,
    sequence: int | None,
    deliveries: int,
    error: BaseException,
    item: Any,
) -> None:
    """Append a dead letter to the log at `uri`. Copies the item; waits for other processes that append.

    An item that cannot be pickled is described in words only.

    Raises
    ------
    LogError
        The log cannot be written.
    """
    text = "".join(_traceback.format_exception(error))
    record = {
        "stage": stage,
        "worker": worker,
        "sequence": sequence,
        "timestamp_ns": time.time_ns(),
        "deliveries": deliveries,
        "error_type": f"{type(error).__module__}.{type(error).__qualname__}",
        "error": _cut(error_text(error), _LONGEST_TEXT),
        # The end of a traceback says where; the beginning of a long one is of least interest.
        "traceback": text if len(text) <= _LONGEST_TEXT else f"...{text[-_LONGEST_TEXT:]}",
        "description": _describe(item),
        "pid": os.getpid(),
        **_packed(item),
    }
    _append(_log_path(uri), record)


def _packed(item: Any) -> dict[str, Any]:
    """The item in a form that lists can be made of without unpickling it."""
    if isinstance(item, Batch) or (type(item) is np.ndarray and not item.dtype.hasobject):
        return {"item": item}
    try:
        return {"pickle": pack(item)}
    except SerializationError as error:
        return {"lost": str(error)}


def _describe(item: Any) -> str:
    text = item_text(item)
    if not isinstance(item, Batch | np.ndarray):
        with contextlib.suppress(Exception):  # a repr is the user's code
            text = f"{text}: {item!r}"
    return _cut(text, _LONGEST_DESCRIPTION)


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 3]}..."


def _log_path(uri: str) -> str:
    scheme, path = split_uri(uri)
    if scheme not in (None, "file"):
        raise PipelineBuildError(f"{uri!r} is no log of dead letters; give file://path")
    return os.path.realpath(path)


def _append(path: str, record: dict[str, Any]) -> None:
    # Nothing stays open: letters are few, and the end of a small segment is soon found.
    with LogWriter(path, shared=True, segment_bytes=_SEGMENT_BYTES) as writer:
        writer.append(record)


# --- reading ------------------------------------------------------------------------------------------------------------


def failed_items(place: str) -> Iterator[FailedItem]:
    """Yield the dead letters of a log or a channel, the oldest first.

    Parameters
    ----------
    place : str
        "file://path", or "shm://name" or "bus://name" of a channel. The letters of a channel are held while they are looked
        at, one after the other, and stay in it.

    Raises
    ------
    PipelineBuildError, LogError
        There is no such log.
    ChannelNotFoundError
        There is no such channel.
    """
    name = _channel_of(place)
    if name is None:
        yield from _in_log(_log_path(place))
        return
    with _open_channel(name) as channel:
        for letter in channel.dead_letters():
            yield _of_channel(letter)
            with contextlib.suppress(ValueError):  # released or revived by the caller
                letter.nack()


def _channel_of(place: str) -> str | None:
    scheme, name = split_uri(place)
    return name if scheme in ("shm", "bus") else None


def _open_channel(name: str) -> Any:
    report = channel_report(name)
    return (ShmChannel if report.default_group else Broadcast).open(name, timeout=1)


def _of_channel(letter: DeadLetter) -> FailedItem:
    def load(objects: bool) -> Any:
        if letter._core_kind == 2 and not objects:
            raise SerializationError(
                f"dead letter {letter.sequence} is a pickled object; reading it runs code that its sender chose, so it takes "
                "objects=True"
            )
        return letter.object(copy=True)

    kind = {0: "bytes", 1: "an array", 2: "an object"}.get(letter._core_kind, "a control frame")
    if letter._core_kind == 1:
        kind = item_text(letter.array())
    return FailedItem(
        number=letter.sequence,
        stage=letter.group or "(default group)",
        worker=-1,
        sequence=letter.sequence,
        timestamp_ns=letter.timestamp_ns,
        deliveries=letter.attempt,
        error_type="",
        error=f"{letter.reason}; process {letter.last_pid} had it last",
        traceback="",
        description=f"{kind} ({letter.nbytes} bytes)",
        replayed=None,
        _load=load,
    )


def _in_log(path: str) -> Iterator[FailedItem]:
    replayed: dict[int, str] = {}
    for _, record in _records(path):
        if "replayed" in record:
            replayed[record["replayed"]] = record["to"]
    for number, record in _records(path):
        if "replayed" not in record:
            yield _of_log(number, record, replayed.get(number))


def _records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with LogReader(path, on_damage="skip") as reader:
        for record in reader:
            item = record.item()
            if not isinstance(item, dict) or not ("stage" in item or "replayed" in item):
                raise PipelineBuildError(
                    f"log {path!r} is none of dead letters: record {record.sequence} is {item_text(item)}"
                )
            yield record.sequence, item


def _of_log(number: int, record: dict[str, Any], replayed: str | None) -> FailedItem:
    def load(objects: bool) -> Any:
        if "item" in record:
            return record["item"]
        if "lost" in record:
            raise SerializationError(f"the item of dead letter {number} was not kept: {record['lost']}")
        return unpack(record["pickle"], objects)

    return FailedItem(
        number=number,
        stage=str(record["stage"]),
        worker=int(record["worker"]),
        sequence=record["sequence"],
        timestamp_ns=int(record["timestamp_ns"]),
        deliveries=int(record["deliveries"]),
        error_type=str(record["error_type"]),
        error=str(record["error"]),
        traceback=str(record["traceback"]),
        description=str(record["description"]),
        replayed=replayed,
        _load=load,
    )


# --- again --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What `replay` did.

    Attributes
    ----------
    sent : list of int
        Numbers of the letters that were sent.
    skipped : dict of int to str
        Those that were not, with the reason.
    """

    sent: list[int]
    skipped: dict[int, str]


def replay(
    place: str,
    to: str | None,
    *,
    numbers: Sequence[int] | None = None,
    again: bool = False,
    objects: bool = False,
) -> Replayed:
    """Send the items of dead letters once more.

    Parameters
    ----------
    place : str
        Where they are, as for `failed_items`.
    to : str or None
        Where they go: "shm://name", "bus://name" (made where it is not there) or "file://path". None: letters of a channel
        go back to the group that they were for.
    numbers : sequence of int, optional
        Which. None: all.
    again : bool
        Whether letters are sent that were sent before.
    objects : bool
        As for `FailedItem.item`.

    Returns
    -------
    Replayed

    Raises
    ------
    PipelineBuildError
        There is no such letter, or `to` is missing or no channel or log.
    PipelineRuntimeError
        A channel with a drop policy took an item and dropped it; its letter stays as it was.

    Notes
    -----
    A letter is marked (in a log) or removed (from a channel) after it was sent: should the process die between the two, it is
    sent twice.
    """
    from_channel = _channel_of(place)
    if to is None and from_channel is None:
        raise PipelineBuildError(
            "dead letters of a log go to a channel or a log: give to='shm://name' or 'file://path'"
        )
    if (
        to is not None
        and from_channel is None
        and split_uri(to)[0] == "file"
        and _log_path(to) == _log_path(place)
    ):
        raise PipelineBuildError(f"the letters are in {place!r}; give another log")
    with contextlib.ExitStack() as stack:
        send = None if to is None else stack.enter_context(_target(to))
        if from_channel is not None:
            return _replay_channel(from_channel, send, numbers, objects)
        assert send is not None
        assert to is not None
        return _replay_log(_log_path(place), to, send, numbers, again, objects)


@contextlib.contextmanager
def _target(to: str) -> Iterator[Callable[[Any], object]]:
    sink = parse_sink(to)
    if isinstance(sink, ChannelSink):
        channel, _ = sink.open()
        with channel:

            def send(item: Any) -> None:
                if not send_item(channel, item):
                    raise PipelineRuntimeError(
                        f"channel {to!r} dropped an item; it has no room, and drops by its policy"
                    )

            yield send
    elif isinstance(sink, LogSink):
        with LogWriter(sink.path, shared=True) as writer:
            yield writer.append
    else:
        raise PipelineBuildError(
            f"{to!r} is neither a channel nor a log; give shm://name, bus://name or file://path"
        )


def _check_all(numbers: Sequence[int] | None, there: set[int], place: str) -> None:
    missing = sorted(set(numbers or ()) - there)
    if missing:
        raise PipelineBuildError(f"{place!r} has no dead letter {', '.join(map(str, missing))}")


def _replay_log(
    path: str,
    to: str,
    send: Callable[[Any], object],
    numbers: Sequence[int] | None,
    again: bool,
    objects: bool,
) -> Replayed:
    found = [(each.number, each.replayed) for each in _in_log(path)]
    _check_all(numbers, {number for number, _ in found}, path)
    wanted = {number for number, _ in found} if numbers is None else set(numbers)
    done = Replayed([], {})
    for letter in _in_log(path):
        if letter.number not in wanted:
            continue
        if letter.replayed is not None and not again:
            done.skipped[letter.number] = f"was sent to {letter.replayed} before"
            continue
        try:
            item = letter.item(objects=objects)
        except SerializationError as error:
            done.skipped[letter.number] = str(error)
            continue
        send(item)
        _append(path, {"replayed": letter.number, "to": to, "timestamp_ns": time.time_ns()})
        done.sent.append(letter.number)
    return done


def _replay_channel(
    name: str, send: Callable[[Any], object] | None, numbers: Sequence[int] | None, objects: bool
) -> Replayed:
    done = Replayed([], {})
    there = set()
    with _open_channel(name) as channel:
        for letter in channel.dead_letters():
            number = letter.sequence
            there.add(number)
            if numbers is not None and number not in numbers:
                letter.nack()
                continue
            if send is None:
                letter.revive()
                done.sent.append(number)
                continue
            try:
                item = _of_channel(letter).item(objects=objects)
            except SerializationError as error:
                done.skipped[number] = str(error)
                letter.nack()
                continue
            send(item)
            letter.release()
            done.sent.append(number)
    _check_all(numbers, there, name)
    return done
