"""Measure what a stage of a pipeline costs on this machine, and what a second worker brings.

``dsline.dataflow.bench.pipeline()`` is what ``dsline bench pipeline`` runs. The cost of an empty stage is the difference
between pipelines with one and with several of them. Starting processes, and all before the first item has reached the sink,
is outside the timed parts, as is that before the second worker works::

    in process      source -> stage (-> stage ...) -> sink               all in the calling process
    across          source -> [channel] -> stage -> [channel] -> sink    the stage in a worker process
    scaling         the same, with one and with two workers that work on each item
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dsline.bench import environment
from dsline.dataflow.items import Batch
from dsline.dataflow.pipeline import Pipeline
from dsline.errors import InvalidArgumentError

__all__ = ["PipelineBenchResult", "pipeline"]

_MORE = 8  # stages that the longer pipeline has more
_SETTLED = 0.4  # share of the items of the scaling part by which both workers are there

MAX_COUNT = 10**8
MAX_BATCH = 10**6


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineBenchResult:
    """Figures of one run of `pipeline`. Every time is the best of `repeats` runs, the least disturbed one.

    Attributes
    ----------
    count, batch : int
        Items of each run, and rows of a batch.
    pipeline_ns_per_item : float
        Processor time of source, one empty stage and sink in one process.
    stage_ns_per_item, stage_ns_per_batch : float
        What one more empty stage costs there, in processor time.
    process_ns_per_item, process_ns_per_batch : float
        Source, an empty stage in a worker process, and sink: two channels.
    work_us : float
        Time that the function of the scaling part takes for an item.
    items_per_second : dict of int to float
        Of the scaling part, by the number of workers.
    scaling : float
        Items per second with two workers by those with one.
    check : str
        What was checked.
    environment : dict
    """

    count: int
    batch: int
    pipeline_ns_per_item: float
    stage_ns_per_item: float
    stage_ns_per_batch: float
    process_ns_per_item: float
    process_ns_per_batch: float
    work_us: float
    items_per_second: dict[int, float]
    scaling: float
    check: str
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain dicts, lists and numbers, ready for `json.dumps`."""
        return dataclasses.asdict(self)


def pipeline(
    count: int = 50_000,
    *,
    batch: int = 256,
    work_us: float = 200.0,
    repeats: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> PipelineBenchResult:
    """Measure empty stages in one process and across processes, and two workers against one.

    Parameters
    ----------
    count : int
        Items of each run; of batches, and across processes, a fifth of it.
    batch : int
        Rows of a batch, of 24 bytes each.
    work_us : float
        Microseconds that the function of the scaling part works on an item.
    repeats : int
        Runs of each kind.
    progress : callable, optional
        Called with (runs done, runs in all).

    Raises
    ------
    InvalidArgumentError
        An argument is out of its range.
    RuntimeError
        An item got lost or came out of order.
    PipelineRuntimeError
        A worker could not be started.
    """
    for name, value, most in (
        ("count", count, MAX_COUNT),
        ("batch", batch, MAX_BATCH),
        ("work_us", work_us, 1e6),
        ("repeats", repeats, 1000),
    ):
        if not 1 <= value <= most:
            raise InvalidArgumentError(f"{name} is {value!r}; it must be from 1 to {most:,.0f}")
    few = max(10, count // 5)
    rows = np.zeros(batch, [("time", "i8"), ("temperature", "f8"), ("humidity", "f8")])
    columns = Batch({name: rows[name].copy() for name in rows.dtype.names or ()})
    short = np.zeros(8)
    enough = max(50, min(20_000, int(1e6 / work_us)))  # a second of work for one
    rounds = _calibrate(work_us)
    runs: dict[str, Callable[[], float]] = {
        "one item": lambda: _seconds(range(count), count, _fused(1), time.process_time),
        "many item": lambda: _seconds(range(count), count, _fused(1 + _MORE), time.process_time),
        "one batch": lambda: _seconds([columns] * few, few, _fused(1), time.process_time),
        "many batch": lambda: _seconds([columns] * few, few, _fused(1 + _MORE), time.process_time),
        "process item": lambda: _seconds([short] * few, few, _worker, time.perf_counter),
        "process batch": lambda: _seconds([rows] * few, few, _worker, time.perf_counter),
        "1": lambda: _seconds([short] * enough, enough, _working(rounds, 1), time.perf_counter, _SETTLED),
        "2": lambda: _seconds([short] * enough, enough, _working(rounds, 2), time.perf_counter, _SETTLED),
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):  # one after the other, so that a disturbance does not meet one alone
        for done, (name, run) in enumerate(runs.items()):
            samples[name].append(run())
            if progress is not None:
                progress(repeat * len(runs) + done + 1, repeats * len(runs))
    ns = {name: 1e9 * min(found) for name, found in samples.items()}
    rates = {workers: 1e9 / ns[str(workers)] for workers in (1, 2)}
    return PipelineBenchResult(
        count=count,
        batch=batch,
        pipeline_ns_per_item=ns["one item"],
        stage_ns_per_item=(ns["many item"] - ns["one item"]) / _MORE,
        stage_ns_per_batch=(ns["many batch"] - ns["one batch"]) / _MORE,
        process_ns_per_item=ns["process item"],
        process_ns_per_batch=ns["process batch"],
        work_us=work_us,
        items_per_second=rates,
        scaling=rates[2] / rates[1],
        check="the number of items of every run, and their order where they are numbers",
        environment=environment(),
    )


def _same(item: Any) -> Any:
    return item


class _Work:
    """Works for a while in interpreted code, as a function of a user's does."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def __call__(self, item: Any) -> Any:
        _spin(self.rounds)
        return item


def _spin(rounds: int) -> None:
    for _ in range(rounds):
        pass


def _calibrate(work_us: float) -> int:
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        _spin(20_000)
        best = min(best, time.perf_counter() - began)
    return max(1, round(20_000 * work_us / (1e6 * best)))


def _fused(stages: int) -> Callable[[Pipeline], Pipeline]:
    def add(made: Pipeline) -> Pipeline:
        for _ in range(stages):
            made = made.map(_same)
        return made

    return add


def _worker(made: Pipeline) -> Pipeline:
    return made.map(_same, workers=1)


def _working(rounds: int, workers: int) -> Callable[[Pipeline], Pipeline]:
    return lambda made: made.map(_Work(rounds), workers=workers)


class _Clocked:
    """A sink that notes when an item and the last one came, and whether they came in order."""

    def __init__(self, clock: Callable[[], float], from_item: int) -> None:
        self.clock = clock
        self.from_item = from_item
        self.first = self.last = 0.0
        self.count = 0
        self.ordered = True

    def __call__(self, item: Any) -> None:
        now = self.clock()
        if self.count == self.from_item:
            self.first = now
        self.last = now
        if type(item) is int and item != self.count:
            self.ordered = False
        self.count += 1


def _seconds(
    items: Iterable[Any],
    count: int,
    stages: Callable[[Pipeline], Pipeline],
    clock: Callable[[], float],
    settled: float = 0.0,
) -> float:
    """Seconds per item at the sink, from the first item behind that share of them to the last."""
    end = _Clocked(clock, int(settled * count))
    stages(Pipeline("bench").source(items)).sink(end).run()
    if end.count != count or not end.ordered:
        order = "" if end.ordered else ", not in order"
        raise RuntimeError(f"{end.count} of {count} items came{order}")
    return (end.last - end.first) / (count - 1 - end.from_item)
