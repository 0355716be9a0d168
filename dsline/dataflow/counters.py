"""What a pipeline is doing: counters that each worker keeps in shared memory, and the figures that are made of them.

One block of anonymous shared memory per pipeline, made by `PipelineCounters`. Each worker of a segment has a page (4 KiB or
more) of its own in it, with one part for each stage of the segment, and is the only one that writes there. Readers map the
block read-only and never stop anybody; they see each counter whole, also when its writer was killed, but not all counters
of one moment. A worker that is started again goes on in the page of the one before.

The time of an item is kept as a histogram of 64 buckets, two for each power of two from 32 ns to 137 s: a percentile is at
most 23 % off, the maximum is exact.
"""

from __future__ import annotations

import dataclasses
import fcntl
import math
import mmap
import multiprocessing.context
import multiprocessing.reduction
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsline import _core
from dsline.dataflow.stats import EdgeStats, PipelineStats, StageStats
from dsline.errors import FeatureUnavailableError, InvalidArgumentError

__all__ = [
    "COUNTERS",
    "CounterTicket",
    "Current",
    "EdgeStats",
    "PipelineCounters",
    "PipelineStats",
    "SegmentPages",
    "StageStats",
    "WorkerCounters",
]

#: Names of the counters that every stage has; `add` takes these and any other.
COUNTERS = _core.COUNTER_NAMES

_AT = _core.COUNTER_PLACES
_PAGE = _core.COUNTER_PAGE_BYTES
_WORDS = _PAGE // 8
_BUCKETS = 64
_NS = 1_000_000_000


# --- the writer ---------------------------------------------------------------------------------------------------------


class WorkerCounters(_core.CounterPage):
    """What the loop of a segment counts with, in the one thread that runs it. Made by `CounterTicket.open`.

    It is the page of the segment's first stage; `stages` has the pages of all of them, in order. For each item of the
    segment's input::

        counters.begin(sequence)
        step.process(item, emit)
        counters.end(2)  # results

    The time between `end` and the next `begin` was spent waiting for input, but for what `blocked(ns)` says. For the
    stages after the first, either their pages take `begin` and `end` inside those of the stage before (the time of the
    inner one is not the outer's), or `passed()` counts their items without a time. `begin` and `end` together cost
    about 0.15 µs.
    """

    _inner: tuple[_core.CounterPage, ...]

    def __init__(self, memory: Any, stages: int = 1) -> None:
        super().__init__(memory, 0)
        pages: list[_core.CounterPage] = [self]
        for number in range(1, stages):
            pages.append(_core.CounterPage(memory, number * _PAGE, pages[-1]))
        self._inner = tuple(pages[1:])

    @property
    def stages(self) -> tuple[_core.CounterPage, ...]:
        """The pages of all stages of the segment, this one first."""
        return (self, *self._inner)


@dataclasses.dataclass(frozen=True)
class CounterTicket:
    """The right to write one worker's page.

    Pickles only while a process is being started, or over a connection of multiprocessing.
    """

    descriptor: int
    offset: int
    stages: int

    def open(self) -> WorkerCounters:
        """Return the writer. The writer before it, if any, must be dead or done."""
        length = _aligned(self.stages * _PAGE)
        return WorkerCounters(mmap.mmap(self.descriptor, length, offset=self.offset), self.stages)

    def __reduce__(self) -> Any:
        if multiprocessing.context.get_spawning_popen() is None:
            raise FeatureUnavailableError(
                "a worker's counters can be pickled only while a process is being started, or over a connection of "
                "multiprocessing"
            )
        return _adopted_ticket, (multiprocessing.reduction.DupFd(self.descriptor), self.offset, self.stages)


class _OwnTicket(CounterTicket):
    """A ticket with a descriptor of its own, which is closed once it has been used."""

    def open(self) -> WorkerCounters:
        try:
            return super().open()
        finally:
            os.close(self.descriptor)


def _adopted_ticket(descriptor: Any, offset: int, stages: int) -> CounterTicket:
    return _OwnTicket(descriptor.detach(), offset, stages)


def _reduce_for_connection(ticket: CounterTicket) -> Any:
    return _adopted_ticket, (multiprocessing.reduction.DupFd(ticket.descriptor), ticket.offset, ticket.stages)


multiprocessing.reduction.ForkingPickler.register(CounterTicket, _reduce_for_connection)


# --- the reader ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Current:
    """What a worker is doing now.

    Attributes
    ----------
    sequence : int or None
        Item that it is processing; None: it waits for one.
    started_ns : int
        When that began, on time.monotonic_ns(), later by the time it spent waiting for others; without an item, when
        the wait began.
    blocked : bool
        It waits for room in its output.
    pid : int
        Process of the writer; 0: there was none yet.
    """

    sequence: int | None
    started_ns: int
    blocked: bool
    pid: int

    def busy_seconds(self) -> float:
        """Return how long it has been busy with the item; 0 without one, and while it is blocked."""
        if self.sequence is None or self.blocked:
            return 0.0
        return max(0, time.monotonic_ns() - self.started_ns) / _NS


@dataclasses.dataclass(frozen=True)
class SegmentPages:
    """What a segment needs of the block.

    Attributes
    ----------
    stages : tuple of str
        Names of its stages, in order.
    kinds : tuple of str
        Of each stage: "source", "sink", or the operator's.
    workers : int
        Worker processes; 0: a thread of the caller's process, which has one page.
    """

    stages: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    workers: int = 0


class PipelineCounters:
    """The counters of a pipeline: the block of memory, tickets for its writers, and a read-only view.

    Parameters
    ----------
    segments : sequence of SegmentPages
    name : str
        Of the pipeline.

    Raises
    ------
    OSError
        There is no memory for it.

    Notes
    -----
    Safe to share between threads. The memory goes when the last of this object, its tickets' writers and their processes
    has gone; nothing has a name.
    """

    def __init__(self, segments: Sequence[SegmentPages], name: str = "pipeline") -> None:
        for segment in segments:
            if not segment.stages or segment.workers < 0 or len(segment.kinds) > len(segment.stages):
                raise InvalidArgumentError(
                    f"{segment} is no segment: it needs a stage, and a kind for each or none"
                )
        self.name = name
        self.segments = tuple(segments)
        self.started_ns = time.monotonic_ns()
        self._places: list[tuple[int, int]] = []  # of each segment: offset and stride of its workers' pages
        size = 0
        for segment in segments:
            stride = _aligned(len(segment.stages) * _PAGE)
            self._places.append((size, stride))
            size += stride * max(1, segment.workers)
        self._descriptor = os.memfd_create("dsline-counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self._descriptor, 0, max(size, mmap.PAGESIZE))
            # A reader must never find less than it has mapped.
            fcntl.fcntl(
                self._descriptor,
                fcntl.F_ADD_SEALS,
                fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
            )
            self._memory = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = -1
            raise

    def ticket(self, segment: int, worker: int = 0) -> CounterTicket:
        """Return what a worker opens its page with: in this process, or passed to one that is being started."""
        if self._descriptor < 0:
            raise InvalidArgumentError("the counters are closed")
        return CounterTicket(
            self._descriptor, self._offset(segment, worker), len(self.segments[segment].stages)
        )

    def current(self, segment: int, worker: int = 0) -> Current:
        """Return what a worker is doing now. Costs about 6 µs."""
        place = _AT["current"]
        where = self._offset(segment, worker) + 8 * place
        # The time is that of the item when the item is the same after it was read.
        for _ in range(100):
            pages = self._load(segment, worker)
            item = int(pages[0][place])
            if int(_core.load_counters(self._memory, where, 1)[0]) == item:
                break
        time_of = "started" if item else "since"
        blocked = any(int(page[_AT["blocked_since"]]) for page in pages)
        page = pages[0]
        return Current(item - 1 if item else None, int(page[_AT[time_of]]), blocked, int(page[_AT["pid"]]))

    def look(
        self,
        since: PipelineStats | None = None,
        *,
        edges: Sequence[EdgeStats] = (),
        alive: Sequence[int] | None = None,
        state: str = "running",
        total: int | None = None,
    ) -> PipelineStats:
        """Read all counters. Stops nobody; costs about 0.1 ms per stage and worker.

        Parameters
        ----------
        since : PipelineStats, optional
            Earlier look that rates and shares start from. By default the start.
        edges : sequence of EdgeStats
        alive : sequence of int, optional
            Live workers of each segment. By default all of them.
        state : str
        total : int, optional
        """
        now = time.monotonic_ns()
        then = self.started_ns if since is None else since.taken_ns
        interval = max(1, now - then)
        before = {} if since is None else {(stage.segment, stage.name): stage for stage in since.stages}
        stages = []
        for number, segment in enumerate(self.segments):
            there = segment.workers if alive is None else alive[number]
            loaded = [self._load(number, worker) for worker in range(max(1, segment.workers))]
            running = [_accounts(pages, now) for pages in loaded]
            for place, name in enumerate(segment.stages):
                stages.append(
                    _stage(
                        name,
                        segment.kinds[place] if place < len(segment.kinds) else "",
                        number,
                        segment.workers,
                        there,
                        [pages[place] for pages in loaded],
                        np.sum([accounts[place] for accounts in running], axis=0),
                        before.get((number, name)),
                        interval,
                    )
                )
        return PipelineStats(
            self.name,
            state,
            (now - self.started_ns) / _NS,
            interval / _NS,
            tuple(stages),
            tuple(edges),
            total,
            now,
        )

    def close(self) -> None:
        """Let go of the descriptor: no more tickets. Reading goes on; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def _offset(self, segment: int, worker: int) -> int:
        if not 0 <= segment < len(self.segments):
            raise InvalidArgumentError(f"segment {segment} of {len(self.segments)}")
        workers = max(1, self.segments[segment].workers)
        if not 0 <= worker < workers:
            raise InvalidArgumentError(f"worker {worker} of {workers}")
        first, stride = self._places[segment]
        return first + stride * worker

    def _load(self, segment: int, worker: int) -> NDArray[Any]:
        """One row of words for each stage."""
        count = len(self.segments[segment].stages)
        words = _core.load_counters(self._memory, self._offset(segment, worker), count * _WORDS)
        return words.reshape(count, _WORDS)


def _aligned(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _counter(page: NDArray[Any], name: str) -> int:
    return int(page[_AT["first"] + COUNTERS.index(name)])


def _accounts(pages: NDArray[Any], now: int) -> list[tuple[int, int, int]]:
    """Busy, starved and blocked ns of each stage of one worker, with what is going on now."""
    found: list[tuple[int, int, int]] = []
    inner = 0  # ns since the item of the next stage began, inside that of this one
    for place in reversed(range(len(pages))):
        page = pages[place]
        busy, starved, blocked = (_counter(page, f"{what}_ns") for what in ("busy", "starved", "blocked"))
        since, blocked_since = int(page[_AT["since"]]), int(page[_AT["blocked_since"]])
        waiting = max(0, now - blocked_since) if blocked_since else 0
        open_ns = max(0, now - since - waiting - inner) if since else 0
        if page[_AT["current"]]:
            busy += open_ns
            inner = max(0, now - int(page[_AT["began"]]))
        elif place == 0:
            starved += open_ns
        found.append((busy, starved, blocked + waiting))
    return found[::-1]


def _stage(
    name: str,
    kind: str,
    segment: int,
    workers: int,
    alive: int,
    pages: Sequence[NDArray[Any]],
    accounts: Any,
    before: StageStats | None,
    interval: int,
) -> StageStats:
    total = {what: sum(_counter(page, what) for page in pages) for what in COUNTERS}
    own: dict[str, int] = {}
    for page in pages:
        for what, number in _own_counters(page):
            own[what] = own.get(what, 0) + number
    longest = max(int(page[_AT["max"]]) for page in pages)
    first = _AT["histogram"]
    histogram = np.sum([page[first : first + _BUCKETS] for page in pages], axis=0)
    busy, starved, blocked = (int(ns) for ns in accounts)
    earlier = before or StageStats(name)
    seconds = interval / _NS
    time_of_all = interval * len(pages)

    def share(ns: int, earlier_ns: int) -> float:
        return min(1.0, max(0, ns - earlier_ns) / time_of_all)

    return StageStats(
        name=name,
        kind=kind,
        segment=segment,
        workers=workers,
        alive=alive,
        restarts=sum(max(0, int(page[_AT["incarnations"]]) - 1) for page in pages),
        items_in=total["in"],
        items_out=total["out"],
        rate_in=max(0, total["in"] - earlier.items_in) / seconds,
        rate_out=max(0, total["out"] - earlier.items_out) / seconds,
        busy=share(busy, earlier.busy_ns),
        starved=share(starved, earlier.starved_ns),
        blocked=share(blocked, earlier.blocked_ns),
        **dict(zip(("p50_ns", "p90_ns", "p99_ns"), percentiles(histogram, longest), strict=True)),
        max_ns=longest,
        busy_ns=busy,
        starved_ns=starved,
        blocked_ns=blocked,
        counters=own,
        **{what: total[what] for what in COUNTERS if what not in _HANDLED},
    )


_HANDLED = ("in", "out", "busy_ns", "starved_ns", "blocked_ns")


def _own_counters(page: NDArray[Any]) -> Iterator[tuple[str, int]]:
    for number in range(_AT["own_number"]):
        at = _AT["own"] + number * _AT["own_stride"]
        text = page[at : at + 4].tobytes()
        if not text[0]:
            return
        yield text.split(b"\0", 1)[0].decode("utf-8", "replace"), int(page[at + 4])


def percentiles(
    histogram: NDArray[Any], longest: int, shares: Sequence[float] = (0.5, 0.9, 0.99)
) -> list[int]:
    """Nearest-rank percentiles of a histogram of the pages, in ns: the middle of the bucket, as a ratio, in which the true
    one lies."""
    sums = np.cumsum(histogram)
    count = int(sums[-1])
    if not count:
        return [0 for _ in shares]
    ranks = [max(1, math.ceil(share * count)) for share in shares]
    return [min(longest, _middle(int(np.searchsorted(sums, rank)))) for rank in ranks]


def _middle(bucket: int) -> int:
    low = (2 + bucket % 2) << (4 + bucket // 2)
    high = (3 + bucket % 2) << (4 + bucket // 2)
    return round(math.sqrt(low * high))
