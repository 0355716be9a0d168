"""Measure a channel between two processes of this machine.

``dsline.bench.shm()`` is what ``dsline bench shm`` runs. The calling process is the producer; the consumer is
a second interpreter, started for the run::

    P1 ──▶ C1        throughput: from P1's first send to the return of C1's last receive
    P1 ──▶ C1 ──▶ P1 round trip: from P1's send to the return of its receive, one message under way

Both ends read the same clock (CLOCK_MONOTONIC), so start and end may be taken in different processes.
Starting the consumer, creating the channels and the warm-up messages are outside the timed parts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsline.errors import BufferEmptyError, BufferFullError

__all__ = ["BenchResult", "RoundTrip", "shm"]

#: What each receive call does with the bytes, in the words of the documentation.
DATA_PATHS = {
    "recv": "one copy: send -> slot, recv = memoryview over the slot",
    "recv_array": "one copy: send -> slot, recv_array = ndarray over the slot",
    "recv_bytes": "copy out: send -> slot, recv_bytes -> new bytes object",
    "recv_into": "copy out: send -> slot, recv_into -> the caller's buffer",
}
PAYLOADS = ("bytes", "array")

MAX_MESSAGE_SIZE = 1 << 30
MAX_COUNT = 10**9
MAX_SLOTS = 1 << 20
MAX_LATENCY_COUNT = 10**7

#: From this size on (bytes) every message carries its own number; smaller ones come from a pool made
#: beforehand, because writing a number costs as much as a tenth of such a message.
STAMP_FROM = 64 * 1024
POOL = 7

_HOT_BYTES = 8 << 20
_BLOCK = 256
_WAIT_SLICE_S = 0.25
_STALL_S = 30.0
_PROGRESS_EVERY_NS = 100_000_000
_CHILD = (
    "import json, sys; spec = json.loads(sys.stdin.readline() or sys.exit(1)); "
    "sys.path[:] = spec['sys_path']; from dsline.bench import _consumer_main; _consumer_main(spec)"
)

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class RoundTrip:
    """Distribution of the round trips of one message, in microseconds."""

    count: int
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float

    @classmethod
    def from_ns(cls, samples: Iterable[int]) -> RoundTrip:
        """Summarise samples in nanoseconds; percentiles are nearest-rank, so each is a measured value."""
        ordered = sorted(samples)
        count = len(ordered)

        def rank(share: float) -> float:
            return ordered[max(0, math.ceil(share * count) - 1)] / 1e3

        return cls(count, rank(0.5), rank(0.99), rank(0.999), ordered[-1] / 1e3)


@dataclasses.dataclass(frozen=True, slots=True)
class BenchResult:
    """Figures of one run of `shm`, with everything needed to read them.

    ``gigabytes_per_second`` counts payload only, in units of 10**9 bytes. ``round_trip`` is None when the
    second pass was left out.
    """

    path: str
    data_path: str
    payload: str
    message_size: int
    count: int
    slots: int
    pinned_cpus: tuple[int, int] | None
    seconds: float
    messages_per_second: float
    gigabytes_per_second: float
    ns_per_message: float
    round_trip: RoundTrip | None
    check: str
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain dicts, lists and numbers, ready for `json.dumps`."""
        result = dataclasses.asdict(self)
        if self.pinned_cpus is not None:
            result["pinned_cpus"] = list(self.pinned_cpus)
        return result


class Payloads:
    """The messages of a run, the same in both processes.

    Message ``i`` is a fixed pseudo-random filler whose first 8 bytes (all bytes of a shorter message) are a
    number: ``i`` itself from `STAMP_FROM` bytes on, ``i % POOL`` below.

    Parameters
    ----------
    size : int
        Bytes per message.
    kind : {"bytes", "array"}
        ``"array"`` makes one-dimensional uint8 arrays. ``"bytes"`` makes bytes objects, or one bytearray
        where every message is numbered.
    stamped : bool, optional
        Whether `stream` numbers one buffer in place. Only for transports that have copied the message when
        send returns. Default: from `STAMP_FROM` bytes on.
    pool : int
        How many messages to make beforehand where they are not numbered in place.
    """

    def __init__(
        self, size: int, kind: str = "bytes", *, stamped: bool | None = None, pool: int = POOL
    ) -> None:
        self.size = size
        self.kind = kind
        self.stamped = size >= STAMP_FROM if stamped is None else stamped
        self.pool = pool
        block = np.random.default_rng(size).integers(0, 256, min(size, 1 << 16), dtype=np.uint8)
        self._filler = np.resize(block, size)
        self.check_every = 16 if size >= STAMP_FROM else 256

    def head(self, index: int) -> bytes:
        """Return the first bytes of message `index`."""
        number = index if self.stamped else index % self.pool
        return number.to_bytes(8, sys.byteorder)[: self.size]

    def make(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return a new array with the whole of message `index`."""
        message = self._filler.copy()
        head = self.head(index)
        message[: len(head)] = np.frombuffer(head, np.uint8)
        return message

    def stream(self) -> Iterator[Any]:
        """Yield message 0, 1, 2, ... without end; a yielded object may change when the next is asked for."""
        if not self.stamped:
            arrays = [self.make(index) for index in range(self.pool)]
            return itertools.cycle(arrays if self.kind == "array" else [array.tobytes() for array in arrays])
        array = self.make(0)
        return self._numbered(array if self.kind == "array" else bytearray(array))

    @staticmethod
    def _numbered(buffer: Any) -> Iterator[Any]:
        number = memoryview(buffer)[:8].cast("Q")
        for index in itertools.count():
            number[0] = index
            yield buffer

    def has_head(self, message: Any, index: int) -> bool:
        """Tell whether length and number of a received message are those of message `index`."""
        view = memoryview(message)
        return view.nbytes == self.size and bytes(view[:8]) == self.head(index)

    def equals(self, message: Any, index: int) -> bool:
        """Tell whether every byte of a received message is that of message `index`."""
        return bool(np.array_equal(np.frombuffer(message, np.uint8), self.make(index)))

    def describe(self) -> str:
        """Say in one sentence what is checked."""
        number = "its own number" if self.stamped else f"its number modulo {self.pool}"
        return (
            f"every byte of the warm-up messages and of the last one; length and {number} of every "
            f"{self.check_every}th message and of every round trip; nothing left over"
        )


def environment() -> dict[str, Any]:
    """Describe machine and versions, for printing beside figures."""
    import dsline

    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as info:
            model = next(
                (line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), model
            )
    except OSError:
        pass
    return {
        "machine": platform.machine(),
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": np.__version__,
        "dsline": dsline.__version__,
    }


def two_cpus() -> tuple[int, int]:
    """Return the first two CPUs this process may run on.

    Raises
    ------
    ValueError
        If there is only one.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise ValueError(
            f"pinning needs 2 CPUs, this process may run on {len(cpus)} only; run without pinning"
        )
    return cpus[0], cpus[1]


def shm(
    message_size: int = 4096,
    count: int = 100_000,
    *,
    path: str = "recv",
    payload: str | None = None,
    slots: int | None = None,
    latency_count: int | None = None,
    pin: bool = False,
    progress: Progress | None = None,
) -> BenchResult:
    """Send messages to a second process and measure throughput, then round trips.

    Parameters
    ----------
    message_size : int
        Bytes per message, 1 to 2**30.
    count : int
        Messages of the throughput pass.
    path : {"recv", "recv_array", "recv_bytes", "recv_into"}
        The receiving call, which decides the data path.
    payload : {"bytes", "array"}, optional
        What is sent: a bytes object (a bytearray from 64 KiB on) or a uint8 array. Default: ``"array"`` for
        ``recv_array``, else ``"bytes"``.
    slots : int, optional
        Capacity of the channel. Default: what fits into 8 MiB, at least 4 and at most 64.
    latency_count : int, optional
        Round trips of the second pass; 0 leaves it out. Default: `count`, at most 10000.
    pin : bool
        Pin the two processes to the first two CPUs this process may run on.
    progress : callable, optional
        Called with (messages done, messages in all), at most ten times a second and at the end.

    Returns
    -------
    BenchResult

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range, named with the value.
    SharedMemoryFullError
        If the slots do not fit into shared memory.
    RuntimeError
        If the consumer process failed or died, or a message arrived damaged.

    Examples
    --------
    >>> import dsline.bench
    >>> result = dsline.bench.shm(message_size=64, count=1000, latency_count=0)
    >>> result.count, result.data_path
    (1000, 'one copy: send -> slot, recv = memoryview over the slot')
    """
    import dsline

    message_size = _in_range("message_size", message_size, 1, MAX_MESSAGE_SIZE)
    count = _in_range("count", count, 1, MAX_COUNT)
    path = _one_of("path", path, DATA_PATHS)
    payload = _one_of("payload", payload or ("array" if path == "recv_array" else "bytes"), PAYLOADS)
    if path == "recv_array" and payload != "array":
        raise ValueError("path 'recv_array' receives arrays only: leave payload out or give payload='array'")
    if slots is None:
        slots = max(4, min(64, _HOT_BYTES // message_size))
    slots = _in_range("slots", slots, 1, MAX_SLOTS)
    if latency_count is None:
        latency_count = min(count, 10_000)
    latency_count = _in_range("latency_count", latency_count, 0, MAX_LATENCY_COUNT)
    cpus = two_cpus() if pin else None

    # Twice round the slots, so that every page the timed part may touch is mapped in both processes.
    warmup = 2 * slots + 2 * POOL
    echo_warmup = min(latency_count, 200)
    report = _Throttle(progress, count + latency_count)

    base = f"bench-{os.getpid()}-{secrets.token_hex(4)}"
    options: dict[str, Any] = {"capacity": slots, "slot_size": message_size, "timeout": _WAIT_SLICE_S}
    affinity = os.sched_getaffinity(0)
    consumer: _Consumer | None = None
    channels: list[Any] = []
    try:
        there = dsline.ShmChannel.create(base, **options)
        channels.append(there)
        back = None
        if latency_count:
            back = dsline.ShmChannel.create(f"{base}-back", **{**options, "capacity": min(slots, 4)})
            channels.append(back)
        payloads = Payloads(message_size, payload)
        messages = payloads.stream()
        if cpus is not None:
            os.sched_setaffinity(0, {cpus[0]})
        consumer = _Consumer(
            {
                "sys_path": sys.path,
                "there": base,
                "back": f"{base}-back" if latency_count else None,
                "message_size": message_size,
                "payload": payload,
                "path": path,
                "warmup": warmup,
                "count": count,
                "echoes": echo_warmup + latency_count,
                "cpu": None if cpus is None else cpus[1],
            }
        )
        consumer.expect("ready")
        _send_all(there, messages, warmup, consumer, None)
        consumer.expect("warm")

        start_ns = time.monotonic_ns()
        _send_all(there, messages, count, consumer, report)
        seconds = (consumer.expect("received")["end_ns"] - start_ns) / 1e9

        round_trip = None
        if back is not None:
            take = _taker(back, path, message_size)
            first = warmup + count
            _round_trips(there, take, messages, payloads, first, echo_warmup, consumer, None)
            samples = _round_trips(
                there, take, messages, payloads, first + echo_warmup, latency_count, consumer, report
            )
            round_trip = RoundTrip.from_ns(samples)
        consumer.expect("done")
        consumer.join()
        report.finish()
    finally:
        if consumer is not None:
            consumer.stop()
        for channel in channels:
            channel.unlink()
            channel.close()
        if cpus is not None:
            os.sched_setaffinity(0, affinity)

    return BenchResult(
        path=path,
        data_path=DATA_PATHS[path],
        payload=payload,
        message_size=message_size,
        count=count,
        slots=slots,
        pinned_cpus=cpus,
        seconds=seconds,
        messages_per_second=count / seconds,
        gigabytes_per_second=count * message_size / seconds / 1e9,
        ns_per_message=seconds * 1e9 / count,
        round_trip=round_trip,
        check=payloads.describe(),
        environment=environment(),
    )


def _in_range(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}; it must be from {low} to {high}")
    return number


def _one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


class _Throttle:
    """Passes progress on at most ten times a second, so that drawing it is no part of the figures."""

    def __init__(self, callback: Progress | None, total: int) -> None:
        self._callback = callback
        self._total = total
        self._done = 0
        self._next_ns = 0

    def advance(self, messages: int) -> None:
        self._done += messages
        if self._callback is not None and (now := time.monotonic_ns()) >= self._next_ns:
            self._next_ns = now + _PROGRESS_EVERY_NS
            self._callback(self._done, self._total)

    def finish(self) -> None:
        if self._callback is not None:
            self._callback(self._total, self._total)


class _Consumer:
    """The consumer process: one line of JSON in, lines of JSON out, every wait bounded.

    Its end, by whatever means, closes the pipe, so no wait here outlasts it.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._lines: list[bytes] = []
        self._partial = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # Ctrl-C is for the producer, which ends this process
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdout = self._process.stdout
        # The pipe stays open: the child takes its end of file for the death of this process.
        self._process.stdin.write(json.dumps(spec).encode() + b"\n")

    def expect(self, event: str) -> dict[str, Any]:
        """Return the next report, which must be `event`."""
        deadline = time.monotonic() + _STALL_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while not self._lines:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(
                        f"the consumer process did not report {event!r} within {_STALL_S:.0f} s"
                    )
                chunk = os.read(self._stdout.fileno(), 65536)
                if not chunk:
                    raise RuntimeError(self._epitaph())
                *complete, self._partial = (self._partial + chunk).split(b"\n")
                self._lines += complete
        report: dict[str, Any] = json.loads(self._lines.pop(0))
        if report["event"] != event:
            raise RuntimeError(f"the consumer process failed: {report.get('message', report['event'])}")
        return report

    def check_alive(self) -> None:
        """Raise if the consumer ended or reported an error."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            readable = bool(selector.select(0))
        if readable or self._lines:
            report = self.expect("error")
            raise RuntimeError(f"the consumer process failed: {report['message']}")

    def join(self) -> None:
        """Wait for the regular end."""
        try:
            code = self._process.wait(_STALL_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError("the consumer process did not end after its last report") from None
        if code:
            raise RuntimeError(self._epitaph())

    def stop(self) -> None:
        """Leave nothing behind, whatever state the process is in."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "the consumer process closed its reports and did not end"
        if code < 0:
            return f"the consumer process was killed by {signal.Signals(-code).name}"
        return f"the consumer process ended early with exit code {code}"


def _send_all(
    channel: Any, messages: Iterator[Any], count: int, consumer: _Consumer, report: _Throttle | None
) -> None:
    send = channel.send
    left = count
    while left:
        block = min(_BLOCK, left)
        for message in itertools.islice(messages, block):
            try:
                send(message)
            except BufferFullError:
                _patiently(functools.partial(send, message), BufferFullError, consumer)
        left -= block
        if report is not None:
            report.advance(block)


def _patiently(call: Callable[[], Any], waited: type[Exception], consumer: _Consumer) -> Any:
    """Repeat a call that gave up after a wait slice, for as long as the consumer lives and moves."""
    deadline = time.monotonic() + _STALL_S
    while True:
        consumer.check_alive()
        if time.monotonic() > deadline:
            raise RuntimeError(f"the consumer process made no progress for {_STALL_S:.0f} s")
        try:
            return call()
        except waited:
            continue


def _taker(channel: Any, path: str, message_size: int) -> Callable[[], Any]:
    """Return a call without arguments that receives one message by `path`."""
    if path == "recv_into":
        buffer = bytearray(message_size)
        recv_into = channel.recv_into

        def take() -> Any:
            return memoryview(buffer)[: recv_into(buffer)]

        return take
    call: Callable[[], Any] = getattr(channel, path)
    return call


def _round_trips(
    there: Any,
    take: Callable[[], Any],
    messages: Iterator[Any],
    payloads: Payloads,
    first: int,
    count: int,
    consumer: _Consumer,
    report: _Throttle | None,
) -> list[int]:
    send = there.send
    now = time.monotonic_ns
    samples = []
    for index in range(first, first + count):
        message = next(messages)
        start = now()
        send(message)
        try:
            echo = take()
        except BufferEmptyError:
            echo = _patiently(take, BufferEmptyError, consumer)
        samples.append(now() - start)
        if not payloads.has_head(echo, index):
            raise RuntimeError(f"round trip {index} came back damaged")
        del echo
        if report is not None and index % 64 == 0:
            report.advance(64)
    return samples


def _consumer_main(spec: dict[str, Any]) -> None:
    """Run the consumer process: receive, check, report, then echo."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if spec["cpu"] is not None:
        os.sched_setaffinity(0, {spec["cpu"]})

    def tell(event: str, **fields: Any) -> None:
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()

    try:
        _consume(spec, tell)
    except Exception as error:  # every failure belongs to the producer, which is the one with a user
        tell("error", message=f"{type(error).__name__}: {error}")
        sys.exit(1)


def _exit_with_parent() -> None:
    # Not through sys.stdin: its lock must be free when the interpreter ends.
    while os.read(0, 4096):
        pass
    os._exit(1)


def _consume(spec: dict[str, Any], tell: Callable[..., None]) -> None:
    import dsline

    payloads = Payloads(spec["message_size"], spec["payload"])
    warmup, count = spec["warmup"], spec["count"]
    with dsline.ShmChannel.open(spec["there"], timeout=_STALL_S) as there:
        take = _taker(there, spec["path"], spec["message_size"])
        tell("ready")
        for index in range(warmup):
            message = take()
            if not payloads.equals(message, index):
                raise RuntimeError(f"warm-up message {index} arrived damaged")
            del message
        tell("warm")
        last = _receive_timed(there, take, spec["path"], payloads, warmup, count)
        tell("received", end_ns=time.monotonic_ns())
        if not payloads.equals(last, warmup + count - 1):
            raise RuntimeError(f"message {warmup + count - 1} arrived damaged")
        del last
        if spec["back"] is not None:
            with dsline.ShmChannel.open(spec["back"], timeout=_STALL_S) as back:
                send = back.send
                for _ in itertools.repeat(None, spec["echoes"]):
                    send(take())
        if len(there):
            raise RuntimeError(f"{len(there)} messages more than were sent")
    tell("done")


def _receive_timed(
    channel: Any, take: Callable[[], Any], path: str, payloads: Payloads, first: int, count: int
) -> Any:
    """Receive `count` messages, checking every `check_every`-th, and return the last one.

    The others are let go at once, so that the producer finds their slots free.
    """
    every = payloads.check_every
    last = first + count - 1
    buffer = bytearray(payloads.size)
    recv_into = channel.recv_into
    for index in range(first, last, every):
        message = take()
        if not payloads.has_head(message, index):
            raise RuntimeError(f"message {index} arrived damaged or out of order")
        del message
        rest = itertools.repeat(None, min(every, last - index) - 1)
        if path == "recv_into":
            for _ in rest:
                recv_into(buffer)
        else:
            for _ in rest:
                take()
    return take()
