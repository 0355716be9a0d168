"""The figures of a pipeline: per stage, per queue and as a whole, and the table that is made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["EdgeStats", "PipelineStats", "StageStats", "duration"]


@dataclasses.dataclass(frozen=True)
class StageStats:
    """What one stage has done, all its workers and those before them together.

    Attributes
    ----------
    name, kind : str
        Of the stage.
    segment : int
        Stages of the same segment run in the same place.
    workers, alive : int
        Worker processes that it has, 0 when it runs in the caller's process, and those that are there now.
    restarts : int
        Workers that were started in the place of another.
    items_in, items_out, rows_in, rows_out, bytes_in, bytes_out : int
        Items that were processed and their results.
    rate_in, rate_out : float
        Items per second since the earlier look.
    busy, starved, blocked : float
        Shares of that time, 0 to 1 and a mean per worker: working, waiting for input, waiting for room in the output. Of
        several stages in one segment the first is the one that is starved.
    p50_ns, p90_ns, p99_ns, max_ns : int
        Time per item since the start. Percentiles are at most 23 % off.
    errors, skipped, retried, dead_letters : int
        Exceptions of its function, and what became of their items.
    dropped, duplicates, lost, late : int
        Items that it discarded, that came again although they had been done, that never came, and that came too late.
    busy_ns, starved_ns, blocked_ns : int
        Since the start.
    counters : dict
        Counters with names of their own.
    """

    name: str
    kind: str = ""
    segment: int = 0
    workers: int = 0
    alive: int = 0
    restarts: int = 0
    items_in: int = 0
    items_out: int = 0
    rows_in: int = 0
    rows_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    rate_in: float = 0.0
    rate_out: float = 0.0
    busy: float = 0.0
    starved: float = 0.0
    blocked: float = 0.0
    p50_ns: int = 0
    p90_ns: int = 0
    p99_ns: int = 0
    max_ns: int = 0
    errors: int = 0
    skipped: int = 0
    retried: int = 0
    dead_letters: int = 0
    dropped: int = 0
    duplicates: int = 0
    lost: int = 0
    late: int = 0
    busy_ns: int = 0
    starved_ns: int = 0
    blocked_ns: int = 0
    counters: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def troubles(self) -> dict[str, int]:
        """Counters that are 0 in a run without trouble, where they are not."""
        named = (
            "restarts",
            "errors",
            "skipped",
            "retried",
            "dead_letters",
            "dropped",
            "duplicates",
            "lost",
            "late",
        )
        return {name: number for name in named if (number := getattr(self, name))}


@dataclasses.dataclass(frozen=True)
class EdgeStats:
    """The queue between two segments.

    Attributes
    ----------
    source, target : str
        Stages at its ends.
    depth, capacity : int
        Items that wait in it, and that it has room for.
    sent : int
        Items that have entered it.
    dropped : int
        Items that its policy discarded.
    policy : str
        What happens when it is full.
    reserved_bytes : int
        Memory that it takes.
    """

    source: str
    target: str
    depth: int = 0
    capacity: int = 0
    sent: int = 0
    dropped: int = 0
    policy: str = "block"
    reserved_bytes: int = 0

    @classmethod
    def of(cls, channel: Any, source: str, target: str, policy: str = "block") -> EdgeStats:
        """Read the counters of a channel, without stopping anybody."""
        now = channel.stats()
        return cls(
            source,
            target,
            now.depth,
            now.capacity,
            now.next_sequence,
            now.dropped_oldest + now.dropped_newest,
            policy,
            now.reserved_bytes,
        )

    @property
    def fill(self) -> float:
        """Share of the queue that is full."""
        return min(1.0, self.depth / self.capacity) if self.capacity else 0.0


@dataclasses.dataclass(frozen=True)
class PipelineStats:
    """A pipeline at one moment. `str` makes a table of it.

    Attributes
    ----------
    name : str
        Of the pipeline.
    state : str
        "running", "draining", "finished", "stopped", "aborted" or "failed".
    seconds, interval : float
        Since the start, and since the earlier look that rates and shares speak of.
    stages : tuple of StageStats
    edges : tuple of EdgeStats
    total : int or None
        Items that the sources will give in all, where that is known.
    taken_ns : int
        When this was read, on time.monotonic_ns().
    """

    name: str
    state: str
    seconds: float
    interval: float
    stages: tuple[StageStats, ...]
    edges: tuple[EdgeStats, ...] = ()
    total: int | None = None
    taken_ns: int = 0

    @property
    def slowest(self) -> StageStats | None:
        """The stage that holds up the others: the one with the highest share of time at work per worker; None while all
        of them rest."""
        best = max(self.stages, key=lambda stage: stage.busy, default=None)
        return best if best is not None and best.busy > 0 else None

    @property
    def items_in(self) -> int:
        """Items that the sources have given."""
        return sum(stage.items_out for stage in self.stages if stage.kind == "source")

    @property
    def items_out(self) -> int:
        """Items that the sinks have taken."""
        return sum(stage.items_in for stage in self.stages if stage.kind == "sink")

    @property
    def errors(self) -> int:
        """Exceptions of user functions, all stages together."""
        return sum(stage.errors for stage in self.stages)

    @property
    def dropped(self) -> int:
        """Items that edges and stages discarded."""
        return sum(edge.dropped for edge in self.edges) + sum(stage.dropped for stage in self.stages)

    def __getitem__(self, name: str) -> StageStats:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(
            f"there is no stage {name!r}; there are {', '.join(stage.name for stage in self.stages)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as dicts, lists and plain values, for `json.dumps`."""
        result = dataclasses.asdict(self)
        slowest = self.slowest
        result["slowest"] = None if slowest is None else slowest.name
        result["stages"] = list(result["stages"])
        result["edges"] = list(result["edges"])
        return result

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(stats: PipelineStats) -> Iterator[str]:
    slowest = stats.slowest
    slow = "" if slowest is None else f"; slowest: {slowest.name}, busy {slowest.busy:.0%} of the time"
    yield f"pipeline {stats.name!r}: {stats.state}, {stats.seconds:.1f} s{slow}"
    heads = "STAGE WORKERS IN OUT OUT/S BUSY STARVED BLOCKED P50 P90 P99 MAX"
    rows: list[tuple[str, ...]] = [(*heads.split(), "")]
    for stage in stats.stages:
        timed = stage.max_ns > 0
        times = (stage.p50_ns, stage.p90_ns, stage.p99_ns, stage.max_ns)
        notes = {**stage.troubles, **stage.counters}
        rows.append(
            (
                stage.name,
                f"{stage.alive} of {stage.workers}" if stage.workers else "-",
                f"{stage.items_in:,}",
                f"{stage.items_out:,}",
                f"{stage.rate_out:,.4g}" if stage.rate_out < 1000 else f"{stage.rate_out:,.0f}",
                *(f"{share:.0%}" for share in (stage.busy, stage.starved, stage.blocked)),
                *(duration(ns) if timed else "-" for ns in times),
                ", ".join(f"{what.replace('_', ' ')} {number:,}" for what, number in notes.items()),
            )
        )
    yield from _table(rows, right=range(2, 12))
    if stats.edges:
        yield ""
        lines: list[tuple[str, ...]] = [("QUEUE", "WAITING", "SENT", "DROPPED", "WHEN FULL")]
        for edge in stats.edges:
            lines.append(
                (
                    f"{edge.source} -> {edge.target}",
                    f"{edge.depth} of {edge.capacity}",
                    f"{edge.sent:,}",
                    f"{edge.dropped:,}",
                    edge.policy,
                )
            )
        yield from _table(lines, right=range(1, 4))


def _table(rows: Sequence[tuple[str, ...]], right: Iterable[int]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = set(right)
    for row in rows:
        cells = zip(row, widths, range(len(row)), strict=True)
        yield "  ".join(
            cell.rjust(width) if place in numbers else cell.ljust(width) for cell, width, place in cells
        ).rstrip()


def duration(ns: float) -> str:
    """Write a time span with three digits and its unit."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.0f} ns"
