"""What runs a segment: receives items, pushes them through the operators, sends the results, and commits.

One `SegmentLoop` belongs to one thread: of the caller's process, or the only one of a worker process. Delivery, in short
(docs/design/stage-commit.md has the argument):

- A worker keeps its input message until the outputs are in the output channels. If it dies, the channel gives the input to
  another worker.
- Outputs of input n are published when n is next (its turn), so one worker at a time publishes to an output channel, and an
  intent written before each message tells a successor how many outputs of n are out already.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import numpy as np

from dsline._core import CounterPage
from dsline.dataflow.counters import WorkerCounters
from dsline.dataflow.descriptions import error_text
from dsline.dataflow.items import Batch, nbytes_of, rows_of
from dsline.dataflow.operator import Context, Emit, MergeStep, Operator, Router, Sink, Source, Step
from dsline.dataflow.plan import AHEAD, MAX_HELD, Edge, Stage
from dsline.dataflow.policies import DeadLetterPolicy, Retry, Skip, parse_policy
from dsline.dataflow.sinks import CollectSink
from dsline.dataflow.sources import SHUT_DOWN_AT_END
from dsline.errors import (
    BufferEmptyError,
    BufferFullError,
    ChannelClosedError,
    DslineError,
    OperatorError,
    PipelineRuntimeError,
)
from dsline.waiting import wait

__all__ = ["Control", "Job", "SegmentLoop", "StageFailed", "Stopped"]

END: Final = 16
MARKER: Final = 17
GAP: Final = 19
_SLICE: Final = 1.0  # seconds; a shut down channel wakes whoever waits for it
_TURN: Final = 0.05  # seconds to wait for a turn before looking why it does not come
_NAP: Final = 0.05  # seconds that a pause lasts between looks at whether the pipeline is being aborted
_SHORT: Final = 0.002  # seconds between looks at two things that cannot be waited for together
_NOTHING: Final = 50_000  # ns that sending a control frame may take without having waited
_WHOLE: Final = 1 << 40  # offset of an input whose results are all out, and its control frame
_LAST_DELIVERY: Final = 15  # max_deliveries of the channels of a pipeline
_OVER: Final = (
    1 << 62
)  # `done` of a segment whose end is out: a worker that is started again has nothing to do


class Stopped(BaseException):
    """The pipeline is being aborted, or a channel is gone with it. Not an Exception, so that no operator takes it for one."""


class StageFailed(BaseException):
    """A stage failed and its policy is to fail the pipeline. Not an Exception, so that no stage before it handles it."""

    def __init__(self, error: DslineError) -> None:
        super().__init__(str(error))
        self.error = error


class Control(Protocol):
    """What a segment asks of the supervisor."""

    def event(self, kind: str, **data: Any) -> None: ...
    def ask(self, kind: str, **data: Any) -> Any: ...
    def marker(self, last: bool = False) -> int | None:
        """Number of a checkpoint that a source shall begin now; `last`: it is at its end."""

    def report_state(self, number: int, segment: int, state: bytes) -> None: ...
    @property
    def aborting(self) -> bool: ...
    @property
    def stopping(self) -> bool:
        """Whether sources shall give nothing more."""

    @property
    def ended(self) -> bool:
        """Whether another worker of the segment has found the end of the input."""


@dataclasses.dataclass
class Job:
    """What a segment needs to run; travels to a worker by cloudpickle, without its channels."""

    number: int  # of the segment
    name: str
    stages: tuple[Stage, ...]
    workers: int
    ordered: bool
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    worker: int = -1
    incarnation: int = 0
    begin_at: int = 0  # first sequence of its input
    state: bytes | None = None  # of a checkpoint
    asks_on_error: bool = False  # there is a hook that decides


class _Output:
    """The sending side of an edge."""

    def __init__(
        self,
        number: int,
        edge: Edge,
        channel: Any,
        words: Any,
        counters: WorkerCounters,
        control: Control,
        stage: str,
        workers: int,
    ) -> None:
        self.edge = edge
        self.channel = channel
        self._number = number
        self._words = words
        self._intent = (0, 0)  # (offset, input) of what was published last
        self._counters = counters
        self._control = control
        self._stage = stage
        self._dropped = 0  # since the last gap frame
        self._loans: dict[int, Any] = {}
        self._blocks = edge.full == "block"
        self._lends = True
        self._allocated = 0
        self._look_every = max(2, edge.slots // (4 * workers))

    def allocate(self, shape: Any, dtype: Any) -> Any:
        """Return a writable array in a slot of the channel, or None; `send` of that very array publishes it."""
        for loan in self._loans.values():
            loan.abort()  # its array was not emitted: a function failed, or gave something else
        self._loans.clear()
        if not self._may_lend():
            return None
        loan = self._wait_for_room(lambda timeout: self.channel.alloc(shape, dtype, timeout=timeout))
        array = loan.array
        self._loans[id(array)] = loan
        return array

    def _may_lend(self) -> bool:
        """Not where a function keeps the arrays that it wrote to, and with them the slots, until nobody finds one."""
        self._allocated += 1
        if self._lends and self._allocated % self._look_every == 0:
            self._lends = self.channel.stats().kept_slots <= self.edge.slots // 4
        return self._lends

    def allocate_ahead(self, shape: Any, dtype: Any, waits: Callable[[Any], bool]) -> Any:
        """Like `allocate`, for a result that may have to wait for its turn: None where that could keep a slot from whoever has
        the turn, or there is none now."""
        for key, loan in list(self._loans.items()):
            if not waits(loan.array):
                loan.abort()  # as above
                del self._loans[key]
        if len(self._loans) >= self.edge.ahead or not self._may_lend():
            return None
        try:
            loan = self._checked(lambda timeout: self.channel.alloc(shape, dtype, timeout=timeout), 0)
        except BufferFullError:
            return None
        array = loan.array
        self._loans[id(array)] = loan
        return array

    def send(self, item: Any, offset: int = 0, done: int = 0) -> None:
        """Publish an item as the `offset`-th result of input `done`."""
        if self._dropped:
            self._send_gap()
        self._intend(offset, done)
        if self._loans and id(item) in self._loans:
            loan = self._loans.pop(id(item))
            try:
                loan.publish()
                return
            except ChannelClosedError:
                raise Stopped from None
            except BufferError:
                # The function kept a reference that could write later: what is sent is a copy.
                item = item.copy()
                loan.abort()
        send = (
            self.channel.send
            if isinstance(item, np.ndarray) and item.dtype.kind != "O"
            else self.channel.send_object
        )
        if not self._blocks:
            self._send_or_drop(send, item)
            return
        self._wait_for_room(lambda timeout: send(item, timeout=timeout))

    def _intend(self, offset: int, done: int) -> None:
        # What a successor reads if this process dies between the publication and the commit.
        if self._words is not None:
            self._intent = (offset, done)
            self._words.begin(self._number, self.channel, offset, done)

    def published_last(self) -> tuple[int, int]:
        """(offset, input) of the last message, by whoever published it; (0, -1) where there is none.

        Waits until what a dead worker had published is in the order. Requires: nobody else publishes.
        """
        try:
            found = self._words.settle(self._number, self.channel)
        except ChannelClosedError:
            raise Stopped from None
        if found is None:
            return 0, -1
        offset, done = found
        self._intent = (offset, done[0])
        return self._intent

    def _wait_for_room(self, call: Callable[[float], Any]) -> Any:
        try:
            return self._checked(call, 0)
        except BufferFullError:
            pass
        self._tell_full()
        self._counters.blocking()
        try:
            while True:
                try:
                    return self._checked(call, _SLICE)
                except BufferFullError:
                    if self._control.aborting:
                        raise Stopped from None
        finally:
            self._counters.unblocked()

    def _tell_full(self) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _SLICE
            self._control.event("backpressure", edge=self.edge.name)

    _quiet_until = 0.0

    def _checked(self, call: Callable[[float], Any], timeout: float) -> Any:
        try:
            return call(timeout)
        except BufferFullError:
            raise
        except ChannelClosedError:
            raise Stopped from None
        except (DslineError, TypeError, ValueError) as error:
            raise StageFailed(_operator_error(self._stage, error, "its result cannot be sent")) from error

    def _send_or_drop(self, send: Callable[..., Any], item: Any) -> None:
        try:
            entered = self._checked(lambda timeout: send(item, timeout=timeout), 0)
        except BufferFullError as error:
            raise StageFailed(
                PipelineRuntimeError(
                    f"stage {self._stage!r}: the queue of edge {self.edge.name!r} is full ({self.edge.queue} items) and full='error'; "
                    "use a longer queue=, more workers=, or full='block'"
                )
            ) from error
        if not entered:
            self._dropped += 1
            self._counters.add("dropped", 1)
            self._tell_full()

    def _send_gap(self) -> None:
        self._intend(*self._intent)
        try:
            if self.channel._core_send_control(GAP, str(self._dropped).encode(), 0):
                self._dropped = 0
        except (BufferFullError, ChannelClosedError):
            pass

    def control(self, kind: int, payload: bytes, done: int = 0) -> None:
        """Send the control frame that input `done` is; one is never dropped."""
        if self._dropped:
            self._send_surely(GAP, str(self._dropped).encode(), *self._intent)
            self._dropped = 0
        self._send_surely(kind, payload, _WHOLE, done)

    def _send_surely(self, kind: int, payload: bytes, offset: int, done: int) -> None:
        self._intend(offset, done)
        began = time.monotonic_ns()
        while True:
            try:
                if self.channel._core_send_control(kind, payload, _SLICE):
                    break
                time.sleep(_SHORT)
            except BufferFullError:
                pass
            except ChannelClosedError:
                raise Stopped from None
            if self._control.aborting:
                raise Stopped
        waited = time.monotonic_ns() - began
        if waited > _NOTHING:
            self._counters.blocked(waited)


# What a user's function may raise. Not KeyboardInterrupt in the caller's process: there it may be Ctrl-C. SystemExit would
# otherwise end a worker, or a thread of the caller, in good order.
_FAILURES: Final = (Exception, SystemExit, GeneratorExit)
_FAILURES_OF_WORKERS: Final = (*_FAILURES, KeyboardInterrupt)


def _failures(worker: int) -> tuple[type[BaseException], ...]:
    return _FAILURES if worker < 0 else _FAILURES_OF_WORKERS


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error_text(error)}".rstrip(": ")


def _shown(error: BaseException) -> str:
    """The repr of an error, whatever its own methods do."""
    try:
        return repr(error)
    except Exception:
        return _said(error)


def _operator_error(stage: str, error: BaseException, what: str) -> OperatorError:
    made = OperatorError(f"stage {stage!r}: {what}: {_said(error)}")
    made.stage = stage
    made.traceback = "".join(traceback.format_exception(error))
    return made


class _Chain:
    """The operators of a segment, each calling the next."""

    def __init__(
        self, job: Job, loop: SegmentLoop, emit: Callable[[Any], None], allocate: Callable[..., Any] | None
    ) -> None:
        self._loop = loop
        self.steps: list[tuple[Stage, Step]] = []
        self.contexts: list[Context] = []
        self.merge: MergeStep | None = None
        self.sink: Any = None
        operators = [
            stage
            for stage in job.stages
            if isinstance(stage.part, Operator) and not isinstance(stage.part, Router)
        ]
        for stage in operators:
            context = loop.context(stage)
            if stage is operators[-1] and stage is job.stages[-1]:
                context.allocate = allocate
            self.contexts.append(context)
            self.steps.append((stage, _started(stage, context)))
        last = job.stages[-1] if job.stages else None
        if last is not None and isinstance(last.part, Sink) and not _goes_to_caller(last.part):
            self.contexts.append(loop.context(last))
            self.sink = _started(last, self.contexts[-1])
            emit = self._guard(last, self.sink.write, None)
        elif last is not None and isinstance(last.part, Router):
            emit = self._routing(last, _started(last, loop.context(last)), loop)
        self.emits: list[Callable[[Any], None]] = []
        self.counts: list[_Counted] = []
        for stage, step in reversed(self.steps):
            counts = _Counted(emit)
            self.emits.insert(0, counts.emit)
            self.counts.insert(0, counts)
            if isinstance(step, MergeStep):
                self.merge = step
            emit = self._step(stage, step, counts)
        self.process: Callable[[Any], None] = emit
        self.timed = [
            (stage, step, counts)
            for (stage, step), counts in zip(self.steps, self.counts, strict=True)
            if type(step).deadline is not Step.deadline
        ]
        self.holder = next((step for stage, step in self.steps if stage.part.holds), None)  # type: ignore[union-attr]
        self.stateful = any(stage.part.stateful for stage, _ in self.steps)  # type: ignore[union-attr]

    def _routing(self, stage: Stage, route: Callable[[Any], Any], loop: SegmentLoop) -> Callable[[Any], None]:
        def emit(item: Any) -> None:
            for output, part in route(item):
                loop.publish(output, part)

        return self._guard(stage, emit, None)

    def _step(self, stage: Stage, step: Step, counts: _Counted) -> Callable[[Any], None]:
        emit = counts.emit
        if isinstance(stage.options.policy, Skip | Retry | DeadLetterPolicy) and not stage.part.holds:  # type: ignore[union-attr]
            return self._guard(stage, lambda item: self._whole(step, item, emit), counts)
        process = step.process
        return self._guard(stage, lambda item: process(item, emit), counts)

    def _whole(self, step: Step, item: Any, emit: Callable[[Any], None]) -> None:
        """All results of an item, or none: one that failed half-way may be tried again."""
        results: list[Any] = []
        step.process(item, results.append)
        for result in results:
            emit(result)

    def _guard(
        self, stage: Stage, call: Callable[[Any], None], counts: _Counted | None
    ) -> Callable[[Any], None]:
        """Errors of a stage are handled where they happen; those of the stages after it pass, as they are no Exception."""
        loop = self._loop
        place = loop.job.stages.index(stage)
        failures = loop.failures

        def guarded(item: Any) -> None:
            try:
                call(item)
            except failures as error:
                loop.failed(stage, item, error, call)

        if place == 0:
            return guarded
        page = loop.counters.stages[place]
        begin, end = page.begin, page.end

        def counted(item: Any) -> None:
            begin(0)
            if counts is not None:
                counts.number = 0
            try:
                call(item)
            except failures as error:
                loop.failed(stage, item, error, call)
            finally:
                end(1 if counts is None else counts.number)

        return counted

    def call(self, stage: Stage, what: str, function: Callable[[], Any]) -> Any:
        """Call something of a stage that belongs to no item."""
        try:
            return function()
        except self._loop.failures as error:
            raise StageFailed(_operator_error(stage.name, error, what)) from error

    def deadline(self) -> float | None:
        if not self.timed:
            return None
        found = [moment for _, step, _ in self.timed if (moment := step.deadline()) is not None]
        return min(found, default=None)

    def tick(self) -> None:
        now = time.monotonic()
        for stage, step, counts in self.timed:
            moment = step.deadline()
            if moment is not None and moment <= now:
                self._late_results(stage, counts, "it failed at a deadline", step.tick)

    def finish(self) -> None:
        for (stage, step), counts in zip(self.steps, self.counts, strict=True):
            self._late_results(stage, counts, "it failed at the end of its input", step.finish)

    def _late_results(self, stage: Stage, counts: _Counted, what: str, give: Callable[[Emit], None]) -> None:
        """Results that belong to no item."""
        counts.number = 0
        self.call(stage, what, lambda: give(counts.emit))
        self._loop.page(stage).add("out", counts.number)

    def end_sink(self, stage: Stage) -> None:
        self.call(stage, "the sink failed at the end", self.sink.finish)

    def state(self) -> dict[str, Any]:
        return {
            stage.name: self.call(stage, "state_dict failed", step.state_dict) for stage, step in self.steps
        }

    def load(self, state: dict[str, Any]) -> None:
        for stage, step in self.steps:
            saved = state.get(stage.name)
            if saved is not None:
                self.call(stage, "load_state_dict failed", functools.partial(step.load_state_dict, saved))

    def close(self) -> None:
        for _, step in self.steps:
            try:
                step.close()
            except self._loop.failures as error:
                self._loop.control.event("warning", text=f"close() failed: {_said(error)}")
        if self.sink is not None:
            try:
                self.sink.close()
            except self._loop.failures as error:
                self._loop.control.event("warning", text=f"closing the sink failed: {_said(error)}")


def _goes_to_caller(sink: Sink) -> bool:
    return isinstance(sink, CollectSink) and sink.items is None


class _Counted:
    """Counts the results of a step on their way."""

    __slots__ = ("emit", "number")

    def __init__(self, emit: Callable[[Any], None]) -> None:
        self.number = 0

        # A function, not a method that is looked up: calling it makes no other reference to an array of a slot.
        def counted(item: Any) -> None:
            self.number += 1
            emit(item)

        self.emit = counted


def _started(stage: Stage, context: Context) -> Any:
    """Return the running step, source or sink of a stage; of a router its function."""
    try:
        return stage.part.route(context) if isinstance(stage.part, Router) else stage.part.start(context)
    except _failures(context.worker) as error:
        raise StageFailed(_operator_error(stage.name, error, "it could not be started")) from error


@dataclasses.dataclass(order=True)
class _Finished:
    """Results of an input that wait for their turn."""

    turn: int
    sequence: int = dataclasses.field(compare=False)
    message: Any = dataclasses.field(compare=False)
    results: list[tuple[int, Any]] = dataclasses.field(compare=False)
    kind: int = dataclasses.field(compare=False, default=0)
    payload: bytes = dataclasses.field(compare=False, default=b"")


class SegmentLoop:
    """Runs one segment, in the thread that calls `steps`.

    Parameters
    ----------
    job : Job
        What to run.
    inputs, outputs : list
        Channels of the edges.
    words : _core.StageWords or None
        Shared by the workers of the segment and their successors; None in the caller's process, whose death ends the run.
    counters : WorkerCounters
        Page of this worker.
    control : Control
        The supervisor.
    """

    def __init__(
        self,
        job: Job,
        inputs: list[Any],
        outputs: list[Any],
        words: Any,
        counters: WorkerCounters,
        control: Control,
    ) -> None:
        self.job = job
        self.failures = _failures(job.worker)
        self.counters = counters
        self.control = control
        self._inputs = inputs
        self._words = words
        last = job.stages[-1].name if job.stages else job.name
        self._outputs = [
            _Output(number, edge, channel, words, counters, control, last, max(1, job.workers))
            for number, (edge, channel) in enumerate(zip(job.outputs, outputs, strict=True))
        ]
        self._parallel = job.workers > 1
        self._is_operator = (
            bool(job.stages)
            and isinstance(job.stages[0].part, Operator)
            and not isinstance(job.stages[0].part, Router)
        )
        self._out_rows = self._out_bytes = 0  # of the results of the item at work
        self._alone = len(job.stages) == 1
        self._results: list[tuple[int, Any]] | None = None  # of the item at work, where they have to wait
        self._item: tuple[int, int] | None = None  # (input, sequence) that is being processed
        self._emitted = [0] * len(outputs)  # results of that item so far, per output
        self._skip = [0] * len(outputs)  # of them: those that were published before a death
        self._attempt = self._last_attempt = 1
        self._early: list[tuple[int, Any]] = []  # a heap of (sequence, message): they came before their turn
        self._retained: deque[tuple[int, Any]] = deque()  # (sequence, message) of inputs that a holder keeps
        self._passed: list[int] = []
        allocate = self._allocate if len(outputs) == 1 else None
        self.chain = _Chain(job, self, lambda item: self.publish(0, item), allocate)
        self.waiting: list[_Finished] = []  # processed, but not their turn: a heap, by turn
        self.collected: deque[Any] | None = None
        if job.state is not None:
            self._state = pickle.loads(job.state)
            self.chain.load(self._state["steps"])
        else:
            self._state = {}

    sent_end = False  # whether those behind have been told that nothing comes any more
    source: Any = None  # the running source, where there is one

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.chain.close()

    _closed = False

    # --- results ---

    def _allocate(self, shape: Any, dtype: Any) -> Any:
        output, array = self._outputs[0], None
        if output.edge.full != "block":
            pass  # a full queue has to be seen when the result is sent
        elif self._parallel:
            array = output.allocate_ahead(shape, dtype, self._waits)
        elif not self._skip[0]:  # else its result is out already
            array = output.allocate(shape, dtype)
        return np.empty(shape, dtype) if array is None else array

    def _waits(self, array: Any) -> bool:
        """Whether an array is a result that waits for its turn."""
        results = [each.results for each in self.waiting]
        return any(item is array for found in (*results, self._results or ()) for _, item in found)

    def publish(self, output: int, item: Any) -> None:
        """Send a result, or keep it until its turn."""
        if self._results is not None:
            self._results.append((output, item))
            self._count(item)
            return
        self._count(item)
        if not self._outputs:
            if self.collected is not None:
                self.collected.append(item)
            return
        if self._words is None:
            self._outputs[output].send(item)
            return
        self._publish_once(output, item)

    def _count(self, item: Any) -> None:
        rows, size = _measure(item)
        self._out_rows += rows
        self._out_bytes += size

    def _publish_once(self, output: int, item: Any) -> None:
        """Send a result of a worker with an intent before it."""
        holder = self.chain.holder
        if holder is None:
            if self._skip[output]:
                self._skip[output] -= 1
                self._emitted[output] += 1
                self.counters.add("duplicates", 1)
                return
            done, offset = self._at(), self._emitted[output] + 1
        elif self._item is None:
            done, offset = self._next, 0
        else:
            done, offset = self._item[1], holder.offset
        self._outputs[output].send(item, offset, done)
        self._emitted[output] += 1

    @property
    def sequence(self) -> int:
        """Number of the item at work."""
        return self._at()

    def _at(self) -> int:
        return self._next if self._item is None else self._item[1]

    @property
    def _next(self) -> int:
        """Sequence behind the last input that was processed."""
        return self._behind

    _behind = 0

    # --- errors ---

    def page(self, stage: Stage) -> CounterPage:
        """Where the counters of a stage are."""
        return self.counters.stages[self.job.stages.index(stage)]

    def context(self, stage: Stage) -> Context:
        """What a step of a stage may know."""
        job = self.job
        return Context(stage.name, job.worker, job.workers, count=self.page(stage).add, pause=self.pause)

    def pause(self, seconds: float) -> None:
        """Sleep; raises Stopped when the pipeline is being aborted meanwhile."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _NAP))
            if self.control.aborting:
                raise Stopped

    def failed(self, stage: Stage, item: Any, error: BaseException, again: Callable[[Any], None]) -> None:
        """A stage raised: do what its policy says."""
        policy: Any = stage.options.policy
        self.page(stage).add("errors", 1)
        if self.job.asks_on_error:
            answer = self.control.ask(
                "on_error", stage=stage.name, error=_shown(error), attempt=self._attempt, sequence=self._at()
            )
            if answer is not None:
                policy = parse_policy(answer)
        else:
            self.control.event("error", stage=stage.name, error=_shown(error), sequence=self._at())
        if isinstance(policy, Retry):
            for pause in policy.pauses():
                self.pause(pause)
                self.page(stage).add("retried", 1)
                try:
                    again(item)
                    return
                except self.failures as next_error:
                    error = next_error
            policy = policy.then_policy
        if isinstance(policy, DeadLetterPolicy):
            self._bury(stage, item, error, policy)
        elif isinstance(policy, Skip):
            self.page(stage).add("skipped", 1)
        else:
            raise StageFailed(_operator_error(stage.name, error, f"{_what(stage)} failed")) from error

    def _bury(self, stage: Stage, item: Any, error: BaseException, policy: DeadLetterPolicy) -> None:
        from dsline.dataflow.dead_letters import write_dead_letter  # only where there are any

        try:
            write_dead_letter(
                policy.uri,
                stage=stage.name,
                worker=self.job.worker,
                sequence=self._at(),
                deliveries=self._attempt,
                error=error,
                item=item,
            )
        except Exception as why:
            raise StageFailed(
                _operator_error(stage.name, why, "its dead letter could not be written")
            ) from error
        self.page(stage).add("dead_letters", 1)
        self.control.event("dead_letter", stage=stage.name, sequence=self._at(), error=_shown(error))

    # --- running ---

    def steps(self) -> Iterator[None]:
        """Run; yields after every piece of work, so that the caller may do something between."""
        self.control.event("stage_start", segment=self.job.number, worker=self.job.worker)
        if self.job.stages and isinstance(self.job.stages[0].part, Source) and not self._inputs:
            yield from self._from_source()
        elif self._parallel:
            yield from _TurnTaking(self).steps()
        else:
            yield from self._from_inputs()

    def run(self) -> None:
        for _ in self.steps():
            pass

    def _end(self) -> None:
        """The input has ended: results that are left, then the end for those behind."""
        self._emitted = [0] * len(self._outputs)
        self.chain.finish()
        if self.chain.sink is not None:
            self.chain.end_sink(self.job.stages[-1])
        for number in range(len(self._outputs)):
            self._control(number, END, b"", self._behind)
        self.sent_end = True
        if self._words is not None:
            self._words.commit(0, _OVER)
        self._release_all()

    def _control(self, output: int, kind: int, payload: bytes, done: int) -> None:
        if self._skip[output] < _WHOLE:
            self._outputs[output].control(kind, payload, done)
        self._skip[output] = 0

    # --- a source ---

    def _from_source(self) -> Iterator[None]:
        stage = self.job.stages[0]
        part = stage.part
        assert isinstance(part, Source)
        step = _started(stage, self.context(stage))
        self.source = step
        try:
            sequence, passed = self._resume_source(stage, step)
            if sequence >= _OVER:
                self.sent_end = True
                return
            if self.control.aborting:
                raise Stopped
            items = iter(step)
            while not self.control.stopping:
                number = self.control.marker()
                if number is not None:
                    self._mark(number, {"source": step.position()}, sequence)
                if self._wait_for_limits():
                    yield
                    continue
                try:
                    item = next(items)
                except StopIteration:
                    break
                except ChannelClosedError:
                    break
                except self.failures as error:
                    raise StageFailed(_operator_error(stage.name, error, "the source failed")) from error
                if passed > 0:
                    passed -= 1
                    continue
                self._work(0, sequence, item)
                del item
                sequence += 1
                if self._words is not None and self.chain.holder is None:
                    self._words.commit(0, sequence)
                self._tick()
                yield
            self._behind = sequence
            number = self.control.marker(last=True)
            if number is not None:
                self._mark(number, {"source": step.position()}, sequence)
            self.control.event("source_end", segment=self.job.number, position=step.position())
            self._end()
        finally:
            step.close()

    def _resume_source(self, stage: Stage, step: Any) -> tuple[int, int]:
        """Go on where a checkpoint or a dead process left off: (sequence, items to pass over)."""
        if self._state.get("source") is not None:
            self.chain.call(
                stage, "the source cannot go on from the checkpoint", lambda: step.seek(self._state["source"])
            )
        if self._words is None or self.job.incarnation == 0:
            return 0, 0
        done = self._recover()
        return done, done if stage.part.replayable else 0  # type: ignore[union-attr]

    # --- one or several inputs, one instance ---

    def _from_inputs(self) -> Iterator[None]:
        if self._words is not None:
            self._behind = self._recover()
            if self._behind >= _OVER:
                self.sent_end = True
                return
        # A channel from outside begins somewhere; one of the pipeline's own at 0.
        expected: list[int | None] = [
            None if edge.external is not None else self._behind for edge in self.job.inputs
        ]
        ended = [False] * len(self._inputs)
        marked: dict[int, int] = {}  # input -> number of the checkpoint whose marker it is at
        while not all(ended) and not self._stopped:
            index, message = self._receive(
                [n for n, over in enumerate(ended) if not over and n not in marked]
            )
            if index < 0:
                self._tick()
                yield
                continue
            if message is None:
                ended[index] = True
                self._ended(index)
            else:
                sequence = message.sequence
                next_one = expected[index]
                if next_one is not None and sequence > next_one:
                    self.counters.add("lost", sequence - next_one)
                if next_one is None or sequence >= next_one:
                    expected[index] = sequence + 1
                kind = message._core_kind
                if kind != END and message.redelivered and self._is_out(sequence):
                    self.counters.add("duplicates", 1)
                    _done(message)
                elif kind == END:
                    ended[index] = True
                    self._end_for_all(index, message)
                    self._ended(index)
                    if not all(ended):
                        _done(message)
                    else:
                        self._last = message
                elif kind == MARKER:
                    marked[index] = int(bytes(message.payload))
                    if len(marked) + sum(ended) >= len(self._inputs):
                        self._mark(marked[index], {}, sequence)
                        marked.clear()
                    self._emitted = [0] * len(self._outputs)
                    self._finished_with(message, index)
                elif kind == GAP:
                    self.counters.add("lost", int(bytes(message.payload)))
                    self._finished_with(message, index)
                else:
                    self._one(index, message)
                del message
            if marked and len(marked) + sum(ended) >= len(self._inputs):
                self._mark(next(iter(marked.values())), {}, 0)
                marked.clear()
            self._tick()
            yield
        self._end()
        if self._last is not None:
            _done(self._last)

    _last: Any = None

    def _is_out(self, sequence: int) -> bool:
        """Whether a redelivered input is committed. One from before the stage's time is not: another receiver gave it back."""
        return self._words is not None and bool(self.job.begin_at <= sequence < self._words.done(0))

    def _end_for_all(self, index: int, message: Any) -> None:
        """The end of a channel from outside may be one that all its receivers shall see."""
        if self.job.inputs[index].external is not None and bytes(message.payload) == SHUT_DOWN_AT_END:
            self._inputs[index].shutdown()

    def _ended(self, index: int) -> None:
        if self.chain.merge is not None:
            stage, step = self.chain.steps[0]
            emit = self.chain.emits[0]
            self.chain.call(stage, "it failed at the end of an input", lambda: step.end_of(index, emit))  # type: ignore[attr-defined]

    def _receive(self, open_inputs: list[int]) -> tuple[int, Any]:
        """Wait for a message: (input, message); (input, None) where it has ended; (-1, None) when it is time to tick."""
        merge = self.chain.merge
        wanted = open_inputs if merge is None else [n for n in open_inputs if merge.wants(n)]
        moment = self.chain.deadline()
        timeout = _SLICE if moment is None else min(_SLICE, max(0.0, moment - time.monotonic()))
        if self.control.aborting:  # not behind the receiving: a message that nobody has would be acknowledged
            raise Stopped
        if self.control.stopping and self.job.inputs[wanted[0] if wanted else 0].external is not None:
            self._stopped = True
            return -1, None
        if self._wait_for_limits():
            return -1, None
        if len(wanted) == 1:
            return self._receive_from(wanted[0], timeout)
        if not wanted:
            time.sleep(min(timeout, _SHORT))
            return -1, None
        ready = wait([self._inputs[n] for n in wanted], timeout)
        if not ready:
            return -1, None
        first = min(ready, key=lambda channel: self._order(channel))
        return self._receive_from(self._inputs.index(first), 0)

    def _wait_for_limits(self) -> bool:
        """Wait until the next deadline where a step can take nothing before it."""
        timed = self.chain.timed
        if not timed or not any(step.is_full for _, step, _ in timed):
            return False
        moment = self.chain.deadline()
        self.pause(_NAP if moment is None else min(_SLICE, max(0.0, moment - time.monotonic())))
        self._tick()
        return True

    _stopped = False
    _turn_of: dict[int, int] | None = None
    _clock = 0

    def _order(self, channel: Any) -> int:
        """Least recently served first."""
        if self._turn_of is None:
            self._turn_of = {}
        return self._turn_of.get(id(channel), 0)

    def _receive_from(self, index: int, timeout: float) -> tuple[int, Any]:
        channel = self._inputs[index]
        if self._turn_of is not None:
            self._clock += 1
            self._turn_of[id(channel)] = self._clock
        try:
            if self._words is None or self.job.inputs[index].external is not None:
                return index, channel.recv_message(timeout=timeout)
            return index, self._receive_in_order(channel, timeout)
        except BufferEmptyError:
            return -1, None
        except ChannelClosedError:
            if self.job.inputs[index].external is None:
                raise Stopped from None
            return index, None

    def _receive_in_order(self, channel: Any, timeout: float) -> Any:
        """After a death an item may come before earlier ones, which are given back a moment later: they are waited for."""
        early = self._early
        if not early:
            message = channel.recv_message(timeout=timeout)
            if message.sequence <= self._behind:
                return message
            heapq.heappush(early, (message.sequence, message))
            del message
        while early[0][0] > self._behind:
            first = early[0][0]
            earlier = channel._core_take_between(self._behind, first)
            if earlier is not None:
                heapq.heappush(early, (earlier.sequence, earlier))
            elif not channel._core_anything_before(first):
                self._behind = first  # what is missing was dropped, or buried by the channel
            elif not channel._core_is_outstanding(self._behind):
                self._behind += 1
            else:
                channel.check_peers()
                time.sleep(_SHORT)
                if self.control.aborting:
                    raise Stopped
        return heapq.heappop(early)[1]

    def _one(self, index: int, message: Any) -> None:
        if self._words is not None and message.redelivered and self._is_poison(message):
            self._finished_with(message, index)
            return
        self._attempt = message.attempt
        item = item_of(message)
        merge = self.chain.merge
        try:
            if merge is not None:
                emit = self.chain.emits[0]
                self._work(
                    index,
                    message.sequence,
                    item,
                    lambda value: merge.process_from(index, value, emit),
                    self.chain.steps[0][0],
                )
            else:
                self._work(index, message.sequence, item)
        except BaseException as error:
            # Not done: in a channel of the caller's it stays for the next one.
            message.__exit__(type(error), error, None)
            raise
        del item
        self._finished_with(message, index)

    def _work(
        self,
        index: int,
        sequence: int,
        item: Any,
        process: Callable[[Any], None] | None = None,
        stage: Stage | None = None,
    ) -> None:
        """Push one item through the chain."""
        self._item = (index, sequence)
        if self._outputs:
            self._emitted = [0] * len(self._outputs)
        if self._attempt != self._last_attempt:
            self._last_attempt = self._attempt
            for context in self.chain.contexts:
                context.attempt = self._attempt - 1
        self._out_rows = self._out_bytes = 0
        self.counters.begin(sequence, *_measure(item))
        first = self.chain.counts[0] if self._is_operator else None
        if first is not None:
            first.number = 0
        try:
            if process is None:
                self.chain.process(item)
            else:
                try:
                    process(item)
                except self.failures as error:
                    assert stage is not None
                    self.failed(stage, item, error, process)
        finally:
            number = 1 if first is None else first.number
            if self._alone:
                self.counters.end(number, self._out_rows, self._out_bytes)
            else:
                self.counters.end(number)
        self._item = None
        self._behind = sequence + 1
        if self._words is not None:
            for output, left in enumerate(self._skip):
                if left < _WHOLE:
                    self._skip[output] = 0

    def _finished_with(self, message: Any, index: int) -> None:
        """Commit an input, or keep it for as long as an operator holds rows of it."""
        if self._words is None:
            _done(message)
            return
        sequence = message.sequence
        self._behind = max(self._behind, sequence + 1)
        holder = self.chain.holder
        if holder is None or not holder.holding:
            self._words.commit(0, sequence + 1)
            self._release_all()
            _done(message)
            return
        if any(self._emitted):
            self._words.commit(0, sequence)
            self._release_all()
        self._emitted = [0] * len(self._outputs)  # a gap, or an item that is left out, emits nothing
        self._retained.append((sequence, message))
        if len(self._retained) > MAX_HELD * self.job.inputs[index].slots:
            raise StageFailed(
                PipelineRuntimeError(
                    f"stage {self.job.name!r}: it keeps {len(self._retained)} items for one result, and its queue has "
                    f"{self.job.inputs[index].slots} slots; give it queue={2 * len(self._retained)} or more, or a smaller batch"
                )
            )

    def _release_all(self) -> None:
        while self._retained:
            _, message = self._retained.popleft()
            _done(message)

    def _tick(self) -> None:
        moment = self.chain.deadline()
        if moment is None or moment > time.monotonic():
            return
        self._emitted = [0] * len(self._outputs)
        self.chain.tick()
        holder = self.chain.holder
        if self._words is not None and holder is not None and any(self._emitted) and not holder.holding:
            self._words.commit(0, self._behind)
            self._release_all()

    # --- after a death ---

    def _recover(self) -> int:
        """What the predecessor of this process had published: sets `done`, and how many results to pass over."""
        words = self._words
        found = []
        for out in self._outputs:
            found.append(out.published_last())
            if found[-1][1] >= 0:
                words.commit(0, found[-1][1])
        for output, (offset, done) in enumerate(found):
            if done != words.done(0):
                continue
            if offset >= _WHOLE or not (self.chain.stateful or self.chain.holder):
                self._skip[output] = offset
            elif self.chain.holder is not None and offset:
                self.chain.holder.resume(offset)
        if self.job.incarnation and self.chain.stateful and self.job.state is None:
            self.control.event("state_lost", segment=self.job.number, stage=self.job.name)
            for _, step in self.chain.steps:
                step.state_lost()
        return int(words.done(0))

    def _is_poison(self, message: Any) -> bool:
        """Whether an item has cost as many workers as it may; it is an error then."""
        stage = self.job.stages[0]
        crashes = self.control.ask("crashes", segment=self.job.number, sequence=message.sequence)
        if crashes and stage.options.on_crash == "skip":
            self.counters.add("skipped", 1)
            return True
        # The channel buries, and nobody hears of it, what comes once more after its last delivery: that one is an error here.
        if message.attempt < _LAST_DELIVERY and (not crashes or crashes[0] < stage.options.max_deliveries):
            return False
        crashes = crashes or (message.attempt - 1, "before it was processed")
        error = PipelineRuntimeError(f"the item ended {crashes[0]} worker processes: {crashes[1]}")
        self._item = (0, message.sequence)
        self._attempt = crashes[0]
        self.counters.add("errors", 1)
        policy = stage.options.policy
        if isinstance(policy, Retry):
            policy = policy.then_policy
        if isinstance(policy, DeadLetterPolicy):
            self._bury(stage, item_of(message), error, policy)
        elif isinstance(policy, Skip):
            self.counters.add("skipped", 1)
        else:
            raise StageFailed(
                PipelineRuntimeError(
                    f"stage {stage.name!r}: item {message.sequence} ended {crashes[0]} worker processes ({crashes[1]}); "
                    "use on_error=dead_letter(...) or 'skip' to go on without such items"
                )
            )
        self._item = None
        return True

    # --- checkpoints ---

    def _mark(self, number: int, extra: dict[str, Any], done: int) -> None:
        """Save the state as it is between what came before a marker and what comes after, and hand the marker on."""
        state: dict[str, Any] = {"steps": self.chain.state(), **extra}
        if self.chain.sink is not None:
            stage = self.job.stages[-1]
            self.chain.call(stage, "the sink could not be flushed", self.chain.sink.flush)
            state["sink"] = self.chain.call(stage, "the sink has no position", self.chain.sink.position)
        name = self.job.stages[-1].name if self.job.stages else self.job.name
        try:
            saved = pickle.dumps(state)
        except Exception as error:
            raise StageFailed(
                _operator_error(name, error, "its state cannot be pickled for a checkpoint")
            ) from error
        self.control.report_state(number, self.job.number, saved)
        for output in range(len(self._outputs)):
            self._control(output, MARKER, str(number).encode(), done)

    def restore_sink(self) -> None:
        """Forget what the sink got after the checkpoint."""
        if self.chain.sink is not None and self._state.get("sink") is not None:
            stage = self.job.stages[-1]
            self.chain.call(
                stage,
                "the sink cannot go back to the checkpoint",
                lambda: self.chain.sink.restore(self._state["sink"]),
            )


class _TurnTaking:
    """One of several workers that share an input. Each processes what it gets at once; results leave in turn."""

    def __init__(self, loop: SegmentLoop) -> None:
        self._loop = loop
        self._words = loop._words
        self._channel = loop._inputs[0]
        self._waiting = loop.waiting
        self._lossy = loop.job.inputs[0].full in ("drop_oldest", "latest")
        self._ended = False

    def steps(self) -> Iterator[None]:
        loop = self._loop
        while True:
            self._publish_ready()
            if not self._waiting and (self._ended or self._words.done(0) >= _OVER):
                loop.sent_end = loop.sent_end or self._words.done(0) >= _OVER
                return
            message = self._receive()
            if message is None:
                continue
            self._process(message)
            del message
            if loop.control.aborting:
                raise Stopped
            yield

    def _receive(self) -> Any:
        """Take an input; None when there was none in time. What waits for its turn is looked after meanwhile."""
        waiting, control = self._waiting, self._loop.control
        if control.aborting:  # not behind the receiving: a message that nobody has would be acknowledged
            raise Stopped
        if control.ended or (control.stopping and self._loop.job.inputs[0].external is not None):
            self._ended = True
        try:
            if self._ended:
                if not waiting:
                    return None
                # but what it waits for may have been given back by a dead worker
            elif not waiting:
                return self._channel.recv_message(timeout=_SLICE)
            elif len(waiting) <= AHEAD:
                try:
                    return self._channel.recv_message(timeout=0)
                except BufferEmptyError:
                    self._wait_turn(_SHORT)
                    return None
            if self._wait_turn(_TURN):
                return None
            # The input whose turn it is may have been given back by a dead worker, and everybody else may be waiting.
            turn = self._words.done(0)
            if self._loop.job.ordered:
                return self._channel._core_take_between(turn, waiting[0].sequence)
            sequence = self._words.sequence_of(turn)
            return None if sequence is None else self._channel._core_take_between(sequence, sequence + 1)
        except BufferEmptyError:
            return None
        except ChannelClosedError:
            self._ended = True
            return None

    def _wait_turn(self, timeout: float) -> bool:
        turn = self._waiting[0].turn
        if self._lossy:
            self._skip_lost()
        if self._words.wait_turn(0, turn, timeout):
            return True
        self._channel.check_peers()
        self._skip_lost()
        return bool(self._words.done(0) >= turn)

    def _skip_lost(self) -> None:
        """The inputs whose turn it is may be gone: dropped while they waited, or buried by the channel."""
        while True:
            done = self._words.done(0)
            if done >= _OVER:
                return
            sequence = done if self._loop.job.ordered else self._words.sequence_of(done)
            if sequence is None or self._channel._core_is_outstanding(sequence):
                return
            # Gone, and not committed: unless a worker died after it had published all of it.
            outputs = [out.published_last() for out in self._loop._outputs]
            if any(input == done for _, input in outputs):
                self._words.commit(0, done + 1)
            elif self._words.skip_lost(0, done):
                self._loop.counters.add("lost", 1)

    def _process(self, message: Any) -> None:
        loop, sequence = self._loop, message.sequence
        kind = message._core_kind
        ordered = loop.job.ordered
        if ordered and sequence < loop.job.begin_at:
            # It would never have its turn, and must not be lost: it stays in the channel for whoever reads that next.
            raise StageFailed(
                PipelineRuntimeError(
                    f"stage {loop.job.name!r}: another receiver gave message {sequence} of the channel back, and the stage began "
                    f"with message {loop.job.begin_at}; use workers=1 or ordered=False where others take from the same group"
                )
            )
        if ordered and message.redelivered and sequence < self._words.done(0):
            loop.counters.add("duplicates", 1)
            _done(message)
            return
        finished = _Finished(sequence, sequence, message, [], kind)
        if kind in (END, MARKER, GAP):
            finished.payload = bytes(message.payload)
            if kind == GAP:
                loop.counters.add("lost", int(finished.payload))
        elif not (message.redelivered and loop._is_poison(message)):
            loop._attempt = message.attempt
            loop._results = finished.results
            item = item_of(message, copy=not ordered)
            try:
                loop._work(0, sequence, item)
            finally:
                loop._results = None
                del item
        if not ordered:
            self._draw(finished, message.redelivered)
            if finished.turn < self._words.done(0):  # a predecessor had committed it
                loop.counters.add("duplicates", 1)
                self._finish(finished)
                return
        heapq.heappush(self._waiting, finished)

    def _draw(self, finished: _Finished, redelivered: bool) -> None:
        """Take the next place in the order of completion; the end comes when nothing before it is left."""
        words, is_control = self._words, finished.kind in (END, MARKER)
        found = words.find_ticket(finished.sequence) if redelivered else None
        while found is None:
            pause = _SHORT if self._waiting else _TURN
            found = words.draw_ticket(self._channel, finished.sequence, pause, is_control)
            if found is None:
                self._publish_ready()
                self._skip_lost()
                if self._loop.control.aborting:
                    raise Stopped
                # What this one waits for may have been given back by a dead worker, and everybody else may be waiting.
                earlier = self._channel._core_take_between(0, finished.sequence)
                if earlier is not None:
                    self._process(earlier)
        finished.turn = found

    def _publish_ready(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            done = self._words.done(0)
            if first.turn > done:
                return
            heapq.heappop(self._waiting)
            if first.turn == done:
                self._publish(first)
            self._finish(first)

    def _publish(self, finished: _Finished) -> None:
        loop, turn = self._loop, finished.turn
        if finished.message.redelivered:
            loop._skip = self._already_out(turn)
        if finished.kind == MARKER:
            loop._mark(int(finished.payload), {}, turn)
        elif finished.kind == END:
            for output in range(len(loop._outputs)):
                loop._control(output, END, b"", turn)
        sent = [0] * len(loop._outputs)
        for output, item in finished.results:
            sent[output] += 1
            if sent[output] <= loop._skip[output]:
                loop.counters.add("duplicates", 1)
                continue
            loop._outputs[output].send(item, sent[output], turn)
        loop._skip = [0] * len(loop._outputs)
        self._words.commit(0, _OVER if finished.kind == END else turn + 1)
        if finished.kind == END:
            self._ended = True
            loop.sent_end = True
            if loop.job.inputs[0].external is None:
                self._channel.shutdown()  # wakes the others: nothing comes any more
            else:
                loop._end_for_all(0, finished.message)
                loop.control.event("ended", segment=loop.job.number)

    def _already_out(self, turn: int) -> list[int]:
        """How many results of a redelivered input its last holder had published, per output."""
        found = []
        for out in self._loop._outputs:
            offset, done = out.published_last()
            found.append(offset if done == turn else 0)
        return found

    def _finish(self, finished: _Finished) -> None:
        finished.results.clear()
        _done(finished.message)
        if not self._loop.job.ordered:
            self._words.acknowledged()


def _measure(item: Any) -> tuple[int, int]:
    """Rows and bytes of an item; Python objects that are no arrays are not measured."""
    if type(item) is np.ndarray:
        return (item.size if item.dtype.names else 1), item.nbytes
    if isinstance(item, Batch):
        return rows_of(item), nbytes_of(item)
    return 1, 0


def _done(message: Any) -> None:
    """Acknowledge; where views are alive, the last of them does it."""
    message.__exit__(None, None, None)


def item_of(message: Any, copy: bool = False) -> Any:
    """Return the item that a message carries, as read-only views of the slot. A record alone is records of one row.

    `copy`: in memory of its own. The tickets of an unordered stage go round, so an input must not be held for as long as
    somebody keeps a view.
    """
    item = message.object(copy=copy)
    if type(item) is np.ndarray and item.ndim == 0 and item.dtype.names:
        return item.reshape(1)
    return item


def _what(stage: Stage) -> str:
    function = getattr(stage.part, "function", None)
    name = getattr(function, "__qualname__", None)
    return f"{name}()" if isinstance(name, str) else stage.part.kind
