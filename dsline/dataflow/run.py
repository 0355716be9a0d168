"""Run: a pipeline at work. Starts what a plan describes, supervises it, and ends it."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sized
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Final, Self

from dsline import _core
from dsline.channel import ShmChannel
from dsline.dataflow import callables, worker
from dsline.dataflow.control import ANNOUNCED, END, LAST_DELIVERY, Job, StageFailed, Stopped
from dsline.dataflow.counters import EdgeStats, PipelineCounters, PipelineStats, SegmentPages
from dsline.dataflow.operator import Sink, Source
from dsline.dataflow.plan import Edge, Plan, Segment
from dsline.dataflow.policies import ErrorBudget, parse_policy
from dsline.dataflow.processes import WorkerProcess, choose_cpus
from dsline.dataflow.progress import Progress
from dsline.dataflow.restart import RestartBudget
from dsline.dataflow.runtime import SegmentLoop
from dsline.dataflow.sinks import CollectSink
from dsline.errors import (
    BufferFullError,
    ChannelClosedError,
    DslineError,
    InvalidArgumentError,
    PipelineBuildError,
    PipelineRuntimeError,
)

__all__ = ["Event", "Report", "Run"]

HOOKS: Final = ("on_error", "on_backpressure", "on_stage_start", "on_stage_stop", "on_restart", "on_event")
_POLICY: Final = {
    "block": "block", "error": "raise", "drop_newest": "drop_newest", "drop_oldest": "drop_oldest", "latest": "drop_oldest"
}  # fmt: skip
_TICK: Final = 0.25  # seconds between looks at what nothing wakes the supervisor for
_MOMENT: Final = 0.02  # seconds from a worker's last lock to its end
_GRACE: Final = 2.0  # seconds that workers and threads have to notice an abort
_MOST_EVENTS: Final = 10_000


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to a run.

    Attributes
    ----------
    kind : str
        "stage_start", "stage_stop", "crashed", "restarted", "error", "dead_letter", "backpressure", "state_lost",
        "checkpoint", "rolled_back", "warning", "draining", "aborting".
    seconds : float
        Since the start.
    data : dict
        Depends on the kind: "stage", "worker", "sequence", "error", "edge", …
    """

    kind: str
    seconds: float
    data: dict[str, Any]

    @property
    def stage(self) -> str | None:
        """Name of the stage, where it is about one."""
        return self.data.get("stage")


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a run.

    Attributes
    ----------
    name : str
    state : str
        "finished", "stopped" (drained before its sources were at their end), "aborted" or "failed".
    seconds : float
    stats : PipelineStats
        The last figures.
    events : tuple of Event
        The last 10,000.
    undrained : dict of str to int
        Items that were left in each edge.
    """

    name: str
    state: str
    seconds: float
    stats: PipelineStats
    events: tuple[Event, ...]
    undrained: dict[str, int]

    def __str__(self) -> str:
        left = "".join(f"; {count} items left in {edge}" for edge, count in self.undrained.items())
        return f"{self.name}: {self.state} after {self.seconds:.2f} s{left}\n{self.stats}"


@dataclasses.dataclass
class _Worker:
    """A worker process and its successors."""

    segment: int
    index: int
    budget: RestartBudget
    process: WorkerProcess | None = None
    incarnation: int = -1
    start_at: float | None = 0.0  # on time.monotonic(); None: it runs, or is done
    finished: bool = False
    sent_end: bool = False


class _ThreadControl:
    """The supervisor, as a segment in a thread of the caller sees it."""

    def __init__(self, execution: _Execution, segment: int) -> None:
        self._execution = execution
        self._segment = segment
        self.markers: deque[int] = deque()

    @property
    def aborting(self) -> bool:
        return self._execution.aborting

    @property
    def stopping(self) -> bool:
        return self._execution.stopping

    ended = False

    def event(self, kind: str, **data: Any) -> None:
        self._execution.on_event(kind, data)

    def ask(self, kind: str, **data: Any) -> Any:
        return self._execution.answer(kind, data)

    def marker(self, last: bool = False) -> int | None:
        if self.markers:
            return self.markers.popleft()
        return self._execution.last_marker(self._segment) if last else None

    def report_state(self, number: int, segment: int, state: bytes) -> None:
        self._execution.on_state(number, segment, state)


class _Execution:
    """One incarnation of a run: channels, workers, threads, and the thread that supervises them.

    Threads: the supervisor thread, one thread per segment of the caller's, and the callers of `Run`. `_lock` guards what
    they share; hooks are called without it.
    """

    def __init__(self, run: Run, resume: bool) -> None:
        self.run = run
        self.plan: Plan = run.plan
        self.aborting = False
        self.stopping = False
        self.error: BaseException | None = None
        self.rollback = False
        self.undrained: dict[str, int] = {}
        self.over = threading.Event()
        self._lock = threading.RLock()
        self._wake_read, self._wake = _pipe()
        self._supervisor = threading.Thread(target=self._supervise, name="dsline-supervisor", daemon=True)
        self._loops: dict[int, SegmentLoop] = {}
        self._controls: dict[int, _ThreadControl] = {}
        self._threads: list[threading.Thread] = []
        self._done_segments: set[int] = set()
        self._ends: list[tuple[int, int]] = []  # (segment, edge) whose end nobody has sent yet
        self._crashes: dict[tuple[int, int], list[str]] = defaultdict(list)
        self._errors: dict[str, int] = defaultdict(int)
        self._states: dict[int, dict[int, bytes]] = {}
        self._next_marker = 1
        self._first_marker: int | None = None
        self._first_saved = False
        self._next_checkpoint = time.monotonic()
        self._store: Any = None
        self._manifest: Any = None
        self._ended_sources: set[int] = set()
        self._source_ends: dict[int, Any] = {}  # positions
        self._begins: dict[int, int] = {}  # first sequence of segments that read a channel from outside
        self._ended_segments: set[int] = set()
        self._open_checkpoints(resume)
        self.counters = PipelineCounters(
            [
                SegmentPages(
                    tuple(self.plan.stages[n].name for n in segment.stages) or (segment.name,),
                    tuple(_kind(self.plan.stages[n].part) for n in segment.stages) or ("merge",),
                    segment.workers,
                )
                for segment in self.plan.segments
            ],
            self.plan.name,
        )
        self.channels: list[Any] = []
        self._workers: list[_Worker] = []
        try:
            for edge in self.plan.edges:
                self.channels.append(self._open(edge))
            self._words = {
                n: self._make_words(segment)
                for n, segment in enumerate(self.plan.segments)
                if segment.workers
            }
            self._make_workers()
            self._make_threads()
        except BaseException:
            self._close()
            raise
        self._supervisor.start()

    # --- making ---

    def _open(self, edge: Edge) -> Any:
        if edge.external is not None:
            try:
                return edge.external.open()
            except DslineError as error:
                name, _, _ = edge.name.partition(" → ")
                raise PipelineBuildError(f"stage {name!r}: {error}") from error
        producers = sum(
            max(1, s.workers) for s in self.plan.segments if self.plan.edges.index(edge) in s.outputs
        )
        consumers = max(1, self.plan.segments[edge.target].workers)
        return ShmChannel(
            None,
            capacity=edge.slots,
            slot_size=edge.slot_size,
            max_message_size=edge.max_message_size,
            backpressure=_POLICY[edge.full],
            max_handles=min(256, 2 * (producers + consumers) + 16),
            max_deliveries=LAST_DELIVERY,
            zero_copy=True,
        )

    def _make_words(self, segment: Segment) -> Any:
        slots = max((self.plan.edges[edge].slots for edge in segment.inputs), default=1)
        tickets = 0 if segment.ordered or segment.workers < 2 else 8 * slots
        words = _core.StageWords.create(1, max(1, len(segment.outputs)), tickets=tickets)
        for edge in segment.inputs:
            if self.plan.edges[edge].external is not None and segment.ordered:
                self.channels[edge].check_peers()  # what dead receivers held is there again
                first = self.channels[edge]._core_first_available()
                self._begins[self.plan.segments.index(segment)] = first
                words.set_done(0, first)
        return words

    def _job(self, number: int, index: int, incarnation: int) -> Job:
        segment = self.plan.segments[number]
        return Job(
            number=number,
            name=segment.name,
            stages=tuple(self.plan.stages[n] for n in segment.stages),
            workers=segment.workers,
            ordered=segment.ordered,
            inputs=tuple(self.plan.edges[n] for n in segment.inputs),
            outputs=tuple(self.plan.edges[n] for n in segment.outputs),
            worker=index,
            incarnation=incarnation,
            begin_at=self._begins.get(number, 0),
            first_marker=self._first_marker,
            state=None if self._manifest is None else self._manifest.states.get(str(number)),
            asks_on_error="on_error" in self.run.hooks,
        )

    def _make_workers(self) -> None:
        for number, segment in enumerate(self.plan.segments):
            if not segment.workers:
                continue
            options = self._options(number)
            # Of the stage's workers together, and of all that come after going back to a checkpoint.
            budget = self.run._budgets.setdefault(number, RestartBudget(options.restart))
            for index in range(segment.workers):
                self._check_job(self._job(number, index, 0))
                self._workers.append(_Worker(number, index, budget))

    def _check_job(self, job: Job) -> None:
        """Raise PipelineBuildError where it cannot be brought to a worker process."""
        try:
            callables.pack(job)
            return
        except PipelineBuildError as error:
            name, why = job.name, error
        for stage in job.stages:  # a function by itself gives the better message
            try:
                callables.pack(getattr(stage.part, "function", None))
            except PipelineBuildError as error:
                name, why = stage.name, error
        raise PipelineBuildError(f"stage {name!r}: {why}") from why

    def _options(self, number: int) -> Any:
        segment = self.plan.segments[number]
        stages = [self.plan.stages[n] for n in segment.stages]
        return next((stage.options for stage in stages if stage.options.workers), stages[0].options)

    def _make_threads(self) -> None:
        for number, segment in enumerate(self.plan.segments):
            if segment.workers:
                continue
            control = _ThreadControl(self, number)
            self._controls[number] = control
            try:
                loop = SegmentLoop(
                    self._job(number, -1, 0),
                    [self.channels[n] for n in segment.inputs],
                    [self.channels[n] for n in segment.outputs],
                    None,
                    self.counters.ticket(number).open(),
                    control,
                )
            except StageFailed as failure:
                raise failure.error from failure.__cause__
            self._loops[number] = loop
            if self._manifest is not None:
                loop.restore_sink()
            if self.run.collects and self._collects(segment):
                loop.collected = deque()
                self.collector = number, loop
                continue
            self._threads.append(
                threading.Thread(
                    target=self._run_loop, args=(number, loop), name=f"dsline-{segment.name}", daemon=True
                )
            )
        for thread in self._threads:
            thread.start()

    collector: tuple[int, SegmentLoop] | None = None  # what `Run.items` runs

    def _collects(self, segment: Segment) -> bool:
        return bool(segment.stages) and isinstance(self.plan.stages[segment.stages[-1]].part, CollectSink)

    def _run_loop(self, number: int, loop: SegmentLoop) -> None:
        for _ in self.steps(number, loop):
            pass

    def steps(self, number: int, loop: SegmentLoop) -> Iterator[None]:
        """Run a segment in this thread; its errors become the run's."""
        try:
            yield from loop.steps()
        except StageFailed as failure:
            failure.error.__cause__ = failure.error.__cause__ or failure.__cause__
            self.fail(failure.error)
        except Stopped:
            pass
        except GeneratorExit:
            raise
        except BaseException as error:
            self.fail(error)
        finally:
            loop.close()
            with self._lock:
                self._done_segments.add(number)
            self.on_event("stage_stop", {"segment": number, "worker": -1})
            self.wake()

    def refuse_own_threads(self, call: str) -> None:
        """Nobody may wait for the end of what he is a part of."""
        if threading.current_thread() in (self._supervisor, *self._threads):
            raise PipelineRuntimeError(
                f"{call} in a hook, a function or a sink of the running pipeline would wait for itself; use abort(), or call it "
                "from another thread"
            )

    # --- the supervisor ---

    def wake(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._wake.send_bytes(b"")

    def _supervise(self) -> None:
        try:
            while not self._is_over():
                self._start_due()
                self._watch(self._pause())
                self._send_ends()
                self._look_after_time()
        except BaseException as error:
            self.fail(error)
        finally:
            self._finish()

    def _is_over(self) -> bool:
        with self._lock:
            if self.aborting:
                return True
            workers = all(each.finished for each in self._workers)
            return workers and len(self._done_segments) == len(self._loops) and not self._ends

    def _pause(self) -> float:
        now = time.monotonic()
        due = [each.start_at - now for each in self._workers if each.start_at is not None]
        if self._ends:
            due.append(0.01)
        if self.plan.checkpoint is not None:
            due.append(self._next_checkpoint - now)
        return max(0.0, min([_TICK, *due]))

    def _start_due(self) -> None:
        for each in self._workers:
            if each.start_at is not None and each.start_at <= time.monotonic() and not self.aborting:
                self._start(each)

    def _start(self, each: _Worker) -> None:
        segment = self.plan.segments[each.segment]
        options = self._options(each.segment)
        each.start_at = None
        each.incarnation += 1
        cpus = None if options.cpus is None else choose_cpus(options.cpus, each.index)
        try:
            each.process = WorkerProcess(
                worker.main,
                (
                    callables.pack(self._job(each.segment, each.index, each.incarnation)),
                    [self.channels[n] for n in segment.inputs],
                    [self.channels[n] for n in segment.outputs],
                    self._words[each.segment],
                    self.counters.ticket(each.segment, each.index),
                ),
                name=f"dsline-{segment.name}-{each.index}",
                start_method=options.start_method,
                cpus=cpus,
                threads=options.threads,
            )
        except DslineError as error:
            self.fail(type(error)(f"stage {segment.name!r}: {error}"))
            return
        # What the others were told before this one could be told. `process` is there: who sets a flag from now on tells it.
        if self.stopping:
            self._tell(each, "stop")
        if each.segment in self._ended_segments:
            self._tell(each, "ended")

    def _watch(self, pause: float) -> None:
        running = [each for each in self._workers if each.process is not None]
        things: list[Any] = [self._wake_read]
        for each in running:
            assert each.process is not None
            things += [each.process.sentinel, each.process.connection]
        ready = set(wait(things, pause))
        while self._wake_read.poll():
            self._wake_read.recv_bytes()
        for each in running:
            process = each.process
            if process is None:
                continue  # a question of another worker has found it dead
            if process.connection in ready or process.sentinel in ready:
                self._read(each, process)
            if each.process is process and process.sentinel in ready:
                self._ended(each, process)

    def _read(self, each: _Worker, process: WorkerProcess) -> None:
        """Take what a worker has said."""
        while True:
            try:
                if not process.connection.poll():
                    return
                what, kind, data = process.connection.recv()
            except (EOFError, OSError):
                return
            if what == "event":
                self._worker_event(each, kind, data)
            elif what == "ask":
                answer = self._answer_worker(each, kind, data)
                with contextlib.suppress(OSError):
                    process.connection.send(("answer", answer))
            elif what == "state":
                self.on_state(kind, *data)
            elif what == "finished":
                each.finished, each.sent_end = True, data
            elif what == "failed":
                self.fail(worker.error_from_plain(data))

    def _worker_event(self, each: _Worker, kind: str, data: dict[str, Any]) -> None:
        if kind == "ended":
            self._ended_segments.add(each.segment)
            for other in self._workers:
                if other.segment == each.segment and other.process is not None:
                    self._tell(other, "ended")
        else:
            self.on_event(kind, {"worker": each.index, **data})

    def _answer_worker(self, each: _Worker, kind: str, data: dict[str, Any]) -> Any:
        if kind == "crashes":
            self._note_the_dead(data["segment"], data["sequence"])
        if kind == "untold":
            stages = [stage for stage in self.stats().stages if stage.segment == each.segment]
            return sum(stage.dropped - stage.counters.get(ANNOUNCED, 0) for stage in stages)
        if kind == "last_marker":
            return self.last_marker(each.segment)
        return self.answer(kind, {"worker": each.index, **data})

    def _note_the_dead(self, segment: int, sequence: int) -> None:
        """Deaths that have not been looked at yet count, too, for a worker that asks about an item."""
        if (segment, sequence) not in self._crashes:
            # The item is there again once the kernel has dropped the locks of the dead, a moment before that is its end.
            mates = [
                each.process.sentinel for each in self._workers if each.segment == segment and each.process
            ]
            wait(mates, _MOMENT)
        for each in self._workers:
            if each.process is not None and not each.process.alive:
                self._ended(each, each.process)

    def _tell(self, each: _Worker, kind: str, value: Any = None) -> None:
        if each.process is not None:
            with contextlib.suppress(OSError, ValueError):
                each.process.connection.send((kind, value))

    def _ended(self, each: _Worker, process: WorkerProcess) -> None:
        self._read(each, process)
        if each.process is not process:
            return  # a question in what it had said led here before
        each.process = None
        cause = process.cause_of_death or "it ended"
        current = self.counters.current(each.segment, each.index)
        sequence = current.sequence if current.pid == process.pid else None
        tail = process.stderr_tail
        failure = process.failure
        started = process.started
        start_error = (
            None if started or process.exitcode is None or process.exitcode < 0 else process.start_error()
        )
        process.close()
        if each.finished:
            self._segment_may_be_done(each.segment)
            return
        if self.aborting or self.error is not None:
            return
        name = self.plan.segments[each.segment].name
        options = self._options(each.segment)
        if start_error is not None:
            self.fail(PipelineRuntimeError(f"stage {name!r}: {start_error}"))
            return
        if sequence is not None:
            self._crashes[each.segment, sequence].append(cause)
        self.on_event("crashed", {"stage": name, "worker": each.index, "cause": cause, "sequence": sequence})
        details = (failure or tail).rstrip()
        if options.on_crash == "stop":
            self.fail(
                PipelineRuntimeError(
                    f"stage {name!r}: worker {each.index} died ({cause}) and on_crash='stop'\n{details}"
                )
            )
            return
        delay = each.budget.died()
        if delay is None:
            self.fail(
                PipelineRuntimeError(
                    f"stage {name!r}: worker {each.index} died ({cause}), and that is too often: {each.budget.describe()}\n{details}"
                )
            )
            return
        if self._store is not None and self._keeps_state(each.segment):
            self.rollback = True
            self.abort()
            return
        each.start_at = time.monotonic() + delay
        self.on_event("restarted", {"stage": name, "worker": each.index, "cause": cause, "delay": delay})

    def _keeps_state(self, number: int) -> bool:
        return any(
            isinstance(part := self.plan.stages[n].part, Source | Sink) or part.stateful
            for n in self.plan.segments[number].stages
        )

    def _segment_may_be_done(self, number: int) -> None:
        mates = [each for each in self._workers if each.segment == number]
        if all(each.finished for each in mates) and not any(each.sent_end for each in mates):
            self._ends += [(number, edge) for edge in self.plan.segments[number].outputs]

    def _send_ends(self) -> None:
        """The end of a segment whose input was a channel from outside that was shut down."""
        left = []
        for number, edge in self._ends:
            try:
                if not self.channels[edge]._core_send_control(END, b"", 0):
                    left.append((number, edge))
            except BufferFullError:
                left.append((number, edge))
            except ChannelClosedError:
                pass
        self._ends = left

    def _look_after_time(self) -> None:
        now = time.monotonic()
        for each in self._workers:
            limit = self._options(each.segment).timeout
            if limit is None or each.process is None:
                continue
            current = self.counters.current(each.segment, each.index)
            # The page may still show what a predecessor was about.
            if current.pid == each.process.pid and current.busy_seconds() > limit:
                self.on_event(
                    "hung",
                    {"stage": self.plan.segments[each.segment].name, "worker": each.index, "seconds": limit},
                )
                each.process.terminate(0.5)
        if self.plan.checkpoint is not None and now >= self._next_checkpoint:
            self._next_checkpoint = now + self.plan.checkpoint.every
            if not self._ended_sources and not self._states:
                self._begin_checkpoint()

    # --- events, errors, questions ---

    def on_event(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "source_end":
            self._source_ends[data["segment"]] = data["position"]
            return
        if "stage" not in data and "segment" in data:
            data = {"stage": self.plan.segments[data["segment"]].name, **data}
        try:
            self.run._note(kind, data)
        except Exception as error:
            self.fail(
                PipelineRuntimeError(f"stage {data.get('stage')!r}: the hook for {kind!r} raised {error!r}")
            )
        if kind == "error":
            self._count_error(data["stage"])

    def _count_error(self, name: str) -> None:
        with self._lock:
            self._errors[name] += 1
            count = self._errors[name]
        stage = next(stage for stage in self.plan.stages if stage.name == name)
        limit = stage.options.max_errors
        if limit is None:
            return
        items = sum(each.items_in for each in self.stats().stages if each.name == name)
        if ErrorBudget(limit).is_exceeded(count, items):
            self.fail(PipelineRuntimeError(f"stage {name!r}: {count} errors, and max_errors={limit}"))

    def answer(self, kind: str, data: dict[str, Any]) -> Any:
        if kind == "first_saved":
            return self._first_saved
        if kind == "crashes":
            causes = self._crashes.get((data["segment"], data["sequence"]))
            return None if not causes else (len(causes), causes[-1])
        if kind == "on_error":
            self.on_event("error", data)
            try:
                action = self.run.hooks["on_error"](Event("error", self.run.seconds, data))
                return None if action is None else parse_policy(action)
            except Exception as error:
                self.fail(
                    PipelineRuntimeError(f"stage {data['stage']!r}: the hook on_error raised {error!r}")
                )
                return None
        raise AssertionError(kind)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if self.error is None:
                self.error = error
        self.abort()

    # --- checkpoints ---

    def _open_checkpoints(self, resume: bool) -> None:
        options = self.plan.checkpoint
        if options is None:
            if resume:
                raise PipelineBuildError("resume=True needs .checkpoint(directory) in the pipeline")
            return
        from dsline.dataflow.checkpoints import Store

        self._store = Store(options.directory)
        if resume:
            self._manifest = self._store.newest(self.plan.fingerprint)
            if self._manifest is not None:
                self._next_marker = self._manifest.number + 1
        else:
            self._store.clear()
        if self._manifest is None:
            self._first_marker = self._next_marker
            self._states[self._next_marker] = {}
            self._next_marker += 1
        self._next_checkpoint += options.every

    def _begin_checkpoint(self) -> int:
        with self._lock:
            number = self._next_marker
            self._next_marker += 1
            self._states[number] = {}
        for segment, control in self._controls.items():
            if self._is_source(segment) and segment not in self._ended_sources:
                control.markers.append(number)
        for each in self._workers:
            if self._is_source(each.segment):
                self._tell(each, "marker", number)
        return number

    def _is_source(self, number: int) -> bool:
        segment = self.plan.segments[number]
        return bool(segment.stages) and isinstance(self.plan.stages[segment.stages[0]].part, Source)

    def last_marker(self, segment: int) -> int | None:
        """A source is at its end: the number of a checkpoint that it shall still take part in."""
        if self._store is None:
            return None
        with self._lock:
            if self._ended_sources:
                self._ended_sources.add(segment)
                return None
            self._ended_sources.add(segment)
            return self._begin_checkpoint()

    def on_state(self, number: int, segment: int, state: bytes) -> None:
        with self._lock:
            states = self._states.get(number)
            if states is None:
                return
            states[segment] = state
            if len(states) < len(self.plan.segments):
                return
            del self._states[number]
            for older in [each for each in self._states if each < number]:
                del self._states[older]
        assert self._store is not None
        self._store.save(number, self.plan.fingerprint, {str(each): blob for each, blob in states.items()})
        self._first_saved = True
        for each in states:
            if self._is_source(each):
                self._commit_source(each, pickle.loads(states[each]).get("source"))
        self.on_event("checkpoint", {"number": number})

    def _commit_source(self, number: int, position: Any) -> None:
        """A source that keeps a group's place goes on from here the next time: all before it has reached the sinks."""
        commit = getattr(self.plan.stages[self.plan.segments[number].stages[0]].part, "commit", None)
        if commit is not None and position is not None:
            commit(position)

    # --- ending ---

    def stop_sources(self) -> None:
        self.stopping = True
        for loop in self._loops.values():
            source = getattr(loop, "source", None)
            if source is not None:
                source.stop()
        for each in self._workers:
            self._tell(each, "stop")
        self.wake()

    def abort(self) -> None:
        with self._lock:
            if not self.aborting:
                self.undrained = self._left()
            self.aborting = True
        for edge, channel in zip(self.plan.edges, self.channels, strict=False):
            if edge.external is None:
                with contextlib.suppress(DslineError):
                    channel.shutdown(immediate=True)
        for loop in list(self._loops.values()):
            source = getattr(loop, "source", None)
            for end in (source, getattr(loop.chain.sink, "stop", None) and loop.chain.sink):
                if end is not None:
                    with contextlib.suppress(Exception):
                        end.stop()
        self.wake()

    def _finish(self) -> None:
        """All is done, or it has to end now."""
        try:
            self.run._edge_stats = self._edge_stats()
            for each in self._workers:
                self._tell(each, "abort")
            deadline = time.monotonic() + _GRACE
            for each in self._workers:
                if each.process is not None:
                    each.process.join(max(0.0, deadline - time.monotonic()))
                    self._read(each, each.process)
                    each.process.close(patience=0)
            for thread in self._threads:
                # Before it begins again from a checkpoint, nobody writes any more.
                thread.join(
                    None if self.rollback and self.error is None else max(0.1, deadline - time.monotonic())
                )
            if self.error is None and not self.aborting:
                for number, position in self._source_ends.items():
                    self._commit_source(number, position)
        except Exception as error:
            self.error = self.error or error
        finally:
            self._close()
            self.over.set()
            self.run._execution_is_over(self)

    def _left(self) -> dict[str, int]:
        left = {}
        for edge, channel in zip(self.plan.edges, self.channels, strict=False):
            with contextlib.suppress(DslineError):
                if edge.external is None and len(channel):
                    left[edge.name] = len(channel)
        return left

    def _close(self) -> None:
        for edge, channel in zip(self.plan.edges, self.channels, strict=False):
            if edge.external is None or not getattr(edge.external, "is_open_channel", False):
                with contextlib.suppress(DslineError):
                    channel.close()
        for loop in self._loops.values():
            loop.close()
        # A pipeline that is kept keeps no memory and no descriptor.
        self._words, self.channels = {}, []
        self._loops.clear()
        self._threads.clear()
        self.counters.close()
        self._wake.close()
        self._wake_read.close()

    # --- seeing ---

    def _edge_stats(self) -> list[EdgeStats]:
        found = []
        for edge, channel in zip(self.plan.edges, self.channels, strict=False):
            source, _, target = edge.name.partition(" → ")
            with contextlib.suppress(DslineError):
                found.append(EdgeStats.of(channel, source, target, edge.full))
        return found

    def stats(self, since: PipelineStats | None = None) -> PipelineStats:
        edges = self.run._edge_stats if self.over.is_set() else self._edge_stats()
        alive = [
            sum(1 for each in self._workers if each.segment == n and each.process is not None)
            for n in range(len(self.plan.segments))
        ]
        return self.counters.look(since, edges=edges, alive=alive, state=self.run.state, total=self.run.total)


def _pipe() -> Any:
    import multiprocessing

    return multiprocessing.Pipe(duplex=False)


class Run:
    """A pipeline at work; `Pipeline.start` makes it. As a context manager it drains and ends with the block.

    Parameters
    ----------
    plan : Plan
        What runs.
    resume : bool
        Go on from the newest checkpoint; from the beginning where there is none.
    **hooks : callable
        ``on_error(event)`` may return a policy for the item; ``on_backpressure``, ``on_stage_start``, ``on_stage_stop`` and
        ``on_restart`` get an `Event` of that kind, ``on_event`` all. They are called in threads of this process and must not
        block.

    Raises
    ------
    PipelineBuildError
        A stage cannot be started: a function that cannot be pickled, a source that is not there.

    Notes
    -----
    Workers end within a second when this process dies, however it dies.
    """

    def __init__(
        self, plan: Plan, *, resume: bool = False, collect: bool = False, **hooks: Callable[[Event], Any]
    ) -> None:
        unknown = sorted(set(hooks) - set(HOOKS))
        if unknown:
            raise PipelineBuildError(
                f"unknown option {unknown[0]!r}; there are resume and the hooks {', '.join(HOOKS)}"
            )
        self.plan = plan
        self.hooks = dict(hooks)
        self.collects = collect
        self.total = _total(plan)
        self._began = time.monotonic()
        self._ended: float | None = None
        self._events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self._edge_stats: list[EdgeStats] = []
        self._state = "running"
        self._rollbacks = 0
        self._budgets: dict[int, RestartBudget] = {}  # by segment
        self._lock = threading.RLock()
        self._wish: str | None = None  # "drain" or "abort", once somebody has asked for it
        self._over = threading.Event()
        self._execution = _Execution(self, resume)

    # --- looking ---

    @property
    def state(self) -> str:
        """ "running", "draining", "finished", "stopped", "aborted" or "failed"."""
        return self._state

    @property
    def seconds(self) -> float:
        """Since the start, to now or to the end."""
        return (self._ended or time.monotonic()) - self._began

    def stats(self, since: PipelineStats | None = None) -> PipelineStats:
        """Return the figures of every stage and edge. Stops nobody.

        Parameters
        ----------
        since : PipelineStats, optional
            Earlier figures that rates and shares are from; by default the start.
        """
        return self._execution.stats(since)

    def events(self) -> tuple[Event, ...]:
        """Return what has happened so far: the last 10,000 events."""
        return tuple(self._events)

    def pids(self) -> dict[str, list[int]]:
        """Return the process numbers of the workers of each stage."""
        found: dict[str, list[int]] = {}
        for each in self._execution._workers:
            process = each.process
            if process is not None:
                found.setdefault(self.plan.segments[each.segment].name, []).append(process.pid)
        return found

    def _note(self, kind: str, data: dict[str, Any]) -> None:
        event = Event(kind, self.seconds, data)
        self._events.append(event)
        hook = {
            "backpressure": "on_backpressure",
            "stage_start": "on_stage_start",
            "stage_stop": "on_stage_stop",
            "restarted": "on_restart",
        }.get(kind)
        for name in (hook, "on_event"):
            if name is not None and name in self.hooks:
                self.hooks[name](event)

    # --- ending ---

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False when the time is up.

        Raises
        ------
        OperatorError, PipelineRuntimeError
            What ended the pipeline.
        """
        self._execution.refuse_own_threads("wait()")
        if not self._over.wait(timeout):
            return False
        error = self._execution.error
        if error is not None:
            raise error
        return True

    def _execution_is_over(self, execution: _Execution) -> None:
        """Called by its supervisor, as the last thing: the run has ended, or goes back to the last checkpoint."""
        try:
            if execution.rollback and execution.error is None and self._roll_back(execution):
                return
        except BaseException as error:
            execution.error = error
        self._settle(execution)

    def _roll_back(self, dead: _Execution) -> bool:
        """A stage with state died: begin again from the last checkpoint, now that everything has ended."""
        if dead._store.newest(self.plan.fingerprint) is None:
            raise PipelineRuntimeError(
                f"pipeline {self.plan.name!r}: a stage with state died before the first checkpoint was complete"
            )
        with self._lock:
            if self._wish == "abort":
                return False
            self._rollbacks += 1
            self._execution = _Execution(self, resume=True)
            if self._wish == "drain":
                self._execution.stop_sources()
        self._note("rolled_back", {"number": self._rollbacks})
        return True

    def _settle(self, execution: _Execution) -> None:
        self._ended = time.monotonic()
        if execution.error is not None:
            self._state = "failed"
        elif execution.aborting:
            self._state = "aborted"
        else:
            self._state = "stopped" if execution.stopping else "finished"
        self._over.set()

    def stop(self, *, drain: bool = True, timeout: float | None = 30.0) -> Report:
        """End the run.

        Parameters
        ----------
        drain : bool
            True: the sources stop, and what is under way is finished. False: as `abort`.
        timeout : float or None
            Seconds that draining may take; then the rest is aborted, and the report says what was left.

        Returns
        -------
        Report
        """
        if not drain:
            self.abort()
        else:
            self._drain()
        self._execution.refuse_own_threads("stop()")
        if not self._over.wait(timeout):
            self.abort()
            self._over.wait()
        return self.report()

    def _drain(self) -> None:
        with self._lock:
            if self._wish is not None or self._over.is_set():
                return
            self._wish = "drain"
            self._state = "draining"
            execution = self._execution
        self._note("draining", {})
        execution.stop_sources()

    def abort(self) -> None:
        """End at once: what is under way is lost, workers are killed if they do not end by themselves in 2 seconds."""
        with self._lock:
            if self._wish == "abort" or self._over.is_set():
                return
            self._wish = "abort"
            execution = self._execution
        self._note("aborting", {})
        execution.abort()

    def report(self) -> Report:
        """Return what has become of the run so far."""
        return Report(
            self.plan.name,
            self._state,
            self.seconds,
            self.stats(),
            self.events(),
            self._execution.undrained if self._over.is_set() else {},
        )

    def supervise(self, *, progress: Any = False, timeout: float | None = None) -> Report:
        """Wait for the end, and show progress. Ctrl-C once drains, twice aborts.

        Returns
        -------
        Report

        Raises
        ------
        KeyboardInterrupt
            After the second Ctrl-C.
        OperatorError, PipelineRuntimeError
            What ended the pipeline.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        interrupted = 0
        with Progress(self._progress_stats, progress):
            while True:
                try:
                    left = 0.2 if deadline is None else min(0.2, max(0.0, deadline - time.monotonic()))
                    if self.wait(left):
                        break
                    if deadline is not None and time.monotonic() >= deadline:
                        self._drain()
                        deadline = None
                except KeyboardInterrupt:
                    interrupted += 1
                    if interrupted == 1:
                        self._drain()
                    else:
                        self.stop(drain=False)
                        raise
        return self.report()

    _looked: PipelineStats | None = None

    def _progress_stats(self) -> PipelineStats:
        self._looked = self.stats(self._looked)
        return self._looked

    def items(self) -> Iterator[Any]:
        """Yield what reaches the end of a pipeline without a sink, in this thread."""
        execution = None
        while execution is not self._execution:  # another one after going back to a checkpoint
            execution = self._execution
            if execution.collector is None:
                raise InvalidArgumentError("this run has a sink; there is nothing to yield")
            number, loop = execution.collector
            collected = loop.collected
            assert collected is not None
            for _ in execution.steps(number, loop):
                while collected:
                    yield collected.popleft()
            while collected:
                yield collected.popleft()
            while execution is self._execution and not self._over.wait(0.05):
                pass
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.stop(drain=False)
        elif not self._over.is_set():
            self.stop()
        error = self._execution.error
        if kind is None and error is not None:
            raise error

    def __repr__(self) -> str:
        return f"<dsline.Run {self.plan.name!r}: {self._state}, {self.seconds:.1f} s>"


def _kind(part: Any) -> str:
    return "source" if isinstance(part, Source) else "sink" if isinstance(part, Sink) else str(part.kind)


def _total(plan: Plan) -> int | None:
    """Number of items, where the sources know it."""
    total = 0
    for stage in plan.stages:
        if isinstance(stage.part, Source):
            items = getattr(stage.part, "iterable", None)
            length = len(items) if isinstance(items, Sized) else getattr(stage.part, "length", None)
            if length is None:
                return None
            total += length
    return total
