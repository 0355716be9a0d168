"""What runs a segment: receives items, pushes them through the operators, sends the results, and commits.

One `SegmentLoop` belongs to one thread: of the caller's process, or the only one of a worker process. Delivery, in short
(docs/design/stage-commit.md has the argument):

- A worker keeps its input message until the outputs are in the output channels. If it dies, the channel gives the input to
  another worker.
- Outputs of input n are published when n is next (its turn), so one worker at a time publishes to an output channel, and an
  intent written before each message tells a successor how many outputs of n are out already.
"""

from __future__ import annotations

import heapq
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dsline._core import CounterPage
from dsline.dataflow.chain import Chain, started
from dsline.dataflow.control import (
    END,
    GAP,
    LAST_DELIVERY,
    MARKER,
    NAP,
    OVER,
    SHORT,
    SLICE,
    WHOLE,
    Control,
    Job,
    StageFailed,
    Stopped,
    failures_of,
    operator_error,
    shown,
)
from dsline.dataflow.counters import WorkerCounters
from dsline.dataflow.edges import Output, acknowledge, item_of
from dsline.dataflow.items import Batch, nbytes_of, rows_of
from dsline.dataflow.operator import Context, Operator, Router, Source
from dsline.dataflow.plan import MAX_HELD, Stage
from dsline.dataflow.policies import DeadLetterPolicy, Retry, Skip, parse_policy
from dsline.dataflow.sources import SHUT_DOWN_AT_END
from dsline.dataflow.turns import Finished, TurnTaking
from dsline.errors import BufferEmptyError, ChannelClosedError, PipelineRuntimeError
from dsline.waiting import wait

__all__ = ["SegmentLoop"]


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
        self.failures = failures_of(job.worker)
        self.counters = counters
        self.control = control
        self.inputs = inputs
        self.words = words
        last = job.stages[-1].name if job.stages else job.name
        self.outputs = [
            Output(number, edge, channel, words, counters, control, last, max(1, job.workers))
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
        self.results: list[tuple[int, Any]] | None = None  # of the item at work, where they have to wait
        self._item: int | None = None  # sequence of the input that is being processed
        self._behind = 0  # sequence behind the last input that was processed
        self._emitted = [0] * len(outputs)  # results of that item so far, per output
        self.skip = [0] * len(outputs)  # of them: those that were published before a death
        self.attempt = self._last_attempt = 1
        self._early: list[tuple[int, Any]] = []  # a heap of (sequence, message): they came before their turn
        self._retained: deque[tuple[int, Any]] = deque()  # (sequence, message) of inputs that a holder keeps
        allocate = self._allocate if len(outputs) == 1 else None
        self.chain = Chain(job, self, lambda item: self.publish(0, item), allocate)
        self.waiting: list[Finished] = []  # processed, but not their turn: a heap, by turn
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
        output, array = self.outputs[0], None
        if output.edge.full != "block":
            pass  # a full queue has to be seen when the result is sent
        elif self._parallel:
            array = output.allocate_ahead(shape, dtype, self._waits)
        elif not self.skip[0]:  # else its result is out already
            array = output.allocate(shape, dtype)
        return np.empty(shape, dtype) if array is None else array

    def _waits(self, array: Any) -> bool:
        """Whether an array is a result that waits for its turn."""
        results = [each.results for each in self.waiting]
        return any(item is array for found in (*results, self.results or ()) for _, item in found)

    def publish(self, output: int, item: Any) -> None:
        """Send a result, or keep it until its turn."""
        if self.results is not None:
            self.results.append((output, item))
            self._count(item)
            return
        self._count(item)
        if not self.outputs:
            if self.collected is not None:
                self.collected.append(item)
            return
        if self.words is None:
            self.outputs[output].send(item)
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
            if self.skip[output]:
                self.skip[output] -= 1
                self._emitted[output] += 1
                self.counters.add("duplicates", 1)
                return
            offset = self._emitted[output] + 1
        else:
            offset = 0 if self._item is None else holder.offset
        self.outputs[output].send(item, offset, self._sequence)
        self._emitted[output] += 1

    @property
    def _sequence(self) -> int:
        """Number of the item at work; between two of them, of the next one."""
        return self._behind if self._item is None else self._item

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
            time.sleep(min(left, NAP))
            if self.control.aborting:
                raise Stopped

    def failed(self, stage: Stage, item: Any, error: BaseException, again: Callable[[Any], None]) -> None:
        """A stage raised: do what its policy says."""
        policy: Any = stage.options.policy
        self.page(stage).add("errors", 1)
        if self.job.asks_on_error:
            answer = self.control.ask(
                "on_error",
                stage=stage.name,
                error=shown(error),
                attempt=self.attempt,
                sequence=self._sequence,
            )
            if answer is not None:
                policy = parse_policy(answer)
        else:
            self.control.event("error", stage=stage.name, error=shown(error), sequence=self._sequence)
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
        if not self._leaves_out(stage, policy, error, lambda: item):
            raise StageFailed(operator_error(stage.name, error, f"{_what(stage)} failed")) from error

    def _leaves_out(self, stage: Stage, policy: Any, error: BaseException, item: Callable[[], Any]) -> bool:
        """Skip or bury the item at work, where the policy says so."""
        if isinstance(policy, DeadLetterPolicy):
            self._bury(stage, item(), error, policy)
        elif isinstance(policy, Skip):
            self.page(stage).add("skipped", 1)
        else:
            return False
        return True

    def _bury(self, stage: Stage, item: Any, error: BaseException, policy: DeadLetterPolicy) -> None:
        from dsline.dataflow.dead_letters import write_dead_letter  # only where there are any

        try:
            write_dead_letter(
                policy.uri,
                stage=stage.name,
                worker=self.job.worker,
                sequence=self._sequence,
                deliveries=self.attempt,
                error=error,
                item=item,
            )
        except Exception as why:
            raise StageFailed(
                operator_error(stage.name, why, "its dead letter could not be written")
            ) from error
        self.page(stage).add("dead_letters", 1)
        self.control.event("dead_letter", stage=stage.name, sequence=self._sequence, error=shown(error))

    # --- running ---

    def steps(self) -> Iterator[None]:
        """Run; yields after every piece of work, so that the caller may do something between."""
        self.control.event("stage_start", segment=self.job.number, worker=self.job.worker)
        if self.job.stages and isinstance(self.job.stages[0].part, Source) and not self.inputs:
            yield from self._from_source()
        elif self._parallel:
            yield from TurnTaking(self).steps()
        else:
            yield from self._from_inputs()

    def run(self) -> None:
        for _ in self.steps():
            pass

    def _end(self) -> None:
        """The input has ended: results that are left, then the end for those behind."""
        self._emitted = [0] * len(self.outputs)
        self.chain.finish()
        if self.chain.sink is not None:
            self.chain.end_sink(self.job.stages[-1])
        for number in range(len(self.outputs)):
            self.send_control(number, END, b"", self._behind)
        self.sent_end = True
        if self.words is not None:
            self.words.commit(0, OVER)
        self._release_all()

    def send_control(self, output: int, kind: int, payload: bytes, done: int) -> None:
        if self.skip[output] < WHOLE:
            self.outputs[output].control(kind, payload, done)
        self.skip[output] = 0

    # --- a source ---

    def _from_source(self) -> Iterator[None]:
        stage = self.job.stages[0]
        part = stage.part
        assert isinstance(part, Source)
        step = started(stage, self.context(stage))
        self.source = step
        try:
            sequence, passed = self._resume_source(stage, step)
            if sequence >= OVER:
                self.sent_end = True
                return
            if self.control.aborting:
                raise Stopped
            items = iter(step)
            if self.job.first_marker is not None and self.job.incarnation == 0:
                self.mark(self.job.first_marker, {"source": step.position()}, sequence)
            while not self.control.stopping:
                number = self.control.marker()
                if number is not None:
                    self.mark(number, {"source": step.position()}, sequence)
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
                    raise StageFailed(operator_error(stage.name, error, "the source failed")) from error
                if passed > 0:
                    passed -= 1
                    continue
                self.work(sequence, item)
                del item
                sequence += 1
                if self.words is not None and self.chain.holder is None:
                    self.words.commit(0, sequence)
                self._tick()
                yield
            self._behind = sequence
            number = self.control.marker(last=True)
            if number is not None:
                self.mark(number, {"source": step.position()}, sequence)
            if hasattr(part, "commit"):  # it keeps the place of a group
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
        if self.words is None or self.job.incarnation == 0:
            return 0, 0
        done = self._recover()
        return done, done if stage.part.replayable else 0  # type: ignore[union-attr]

    # --- one or several inputs, one instance ---

    def _from_inputs(self) -> Iterator[None]:
        if self.words is not None:
            self._behind = self._recover()
            if self._behind >= OVER:
                self.sent_end = True
                return
        # A channel from outside begins somewhere; one of the pipeline's own at 0.
        expected: list[int | None] = [
            None if edge.external is not None else self._behind for edge in self.job.inputs
        ]
        ended = [False] * len(self.inputs)
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
                    acknowledge(message)
                elif kind == END:
                    ended[index] = True
                    self.end_for_all(index, message)
                    self._ended(index)
                    if not all(ended):
                        acknowledge(message)
                    else:
                        self._last = message
                elif kind == MARKER:
                    marked[index] = int(bytes(message.payload))
                    self._mark_if_all(marked, ended, sequence)
                    self._emitted = [0] * len(self.outputs)
                    self._finished_with(message, index)
                elif kind == GAP:
                    self.counters.add("lost", int(bytes(message.payload)))
                    self._finished_with(message, index)
                else:
                    self._one(index, message)
                del message
            self._mark_if_all(marked, ended, self._behind)
            self._tick()
            yield
        self._end()
        if self._last is not None:
            acknowledge(self._last)

    _last: Any = None

    def _mark_if_all(self, marked: dict[int, int], ended: list[bool], done: int) -> None:
        """Every input is at the marker, or has ended: what came before it is in, what comes after is not."""
        if marked and len(marked) + sum(ended) >= len(self.inputs):
            self.mark(next(iter(marked.values())), {}, done)
            marked.clear()

    def _is_out(self, sequence: int) -> bool:
        """Whether a redelivered input is committed. One from before the stage's time is not: another receiver gave it back."""
        return self.words is not None and bool(self.job.begin_at <= sequence < self.words.done(0))

    def end_for_all(self, index: int, message: Any) -> None:
        """The end of a channel from outside may be one that all its receivers shall see."""
        if self.job.inputs[index].external is not None and bytes(message.payload) == SHUT_DOWN_AT_END:
            self.inputs[index].shutdown()

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
        timeout = SLICE if moment is None else min(SLICE, max(0.0, moment - time.monotonic()))
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
            time.sleep(min(timeout, SHORT))
            return -1, None
        ready = wait([self.inputs[n] for n in wanted], timeout)
        if not ready:
            return -1, None
        first = min(ready, key=lambda channel: self._order(channel))
        return self._receive_from(self.inputs.index(first), 0)

    def _wait_for_limits(self) -> bool:
        """Wait until the next deadline where a step can take nothing before it."""
        timed = self.chain.timed
        if not timed or not any(step.is_full for _, step, _ in timed):
            return False
        moment = self.chain.deadline()
        self.pause(NAP if moment is None else min(SLICE, max(0.0, moment - time.monotonic())))
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
        channel = self.inputs[index]
        if self._turn_of is not None:
            self._clock += 1
            self._turn_of[id(channel)] = self._clock
        try:
            if self.words is None or self.job.inputs[index].external is not None:
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
                time.sleep(SHORT)
                if self.control.aborting:
                    raise Stopped
        return heapq.heappop(early)[1]

    def _one(self, index: int, message: Any) -> None:
        if self.words is not None and message.redelivered and self.is_poison(message):
            self._finished_with(message, index)
            return
        self.attempt = message.attempt
        item = item_of(message)
        merge = self.chain.merge
        try:
            if merge is not None:
                emit = self.chain.emits[0]
                self.work(
                    message.sequence,
                    item,
                    lambda value: merge.process_from(index, value, emit),
                    self.chain.steps[0][0],
                )
            else:
                self.work(message.sequence, item)
        except BaseException as error:
            # Not done: in a channel of the caller's it stays for the next one.
            message.__exit__(type(error), error, None)
            raise
        del item
        self._finished_with(message, index)

    def work(
        self,
        sequence: int,
        item: Any,
        process: Callable[[Any], None] | None = None,
        stage: Stage | None = None,
    ) -> None:
        """Push one item through the chain."""
        self._item = sequence
        if self.outputs:
            self._emitted = [0] * len(self.outputs)
        if self.attempt != self._last_attempt:
            self._last_attempt = self.attempt
            for context in self.chain.contexts:
                context.attempt = self.attempt - 1
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
        if self.words is not None:
            for output, left in enumerate(self.skip):
                if left < WHOLE:
                    self.skip[output] = 0

    def _finished_with(self, message: Any, index: int) -> None:
        """Commit an input, or keep it for as long as an operator holds rows of it."""
        if self.words is None:
            acknowledge(message)
            return
        sequence = message.sequence
        self._behind = max(self._behind, sequence + 1)
        holder = self.chain.holder
        if holder is None or not holder.holding:
            self.words.commit(0, sequence + 1)
            self._release_all()
            acknowledge(message)
            return
        if any(self._emitted):
            self.words.commit(0, sequence)
            self._release_all()
        self._emitted = [0] * len(self.outputs)  # a gap, or an item that is left out, emits nothing
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
            acknowledge(message)

    def _tick(self) -> None:
        moment = self.chain.deadline()
        if moment is None or moment > time.monotonic():
            return
        self._emitted = [0] * len(self.outputs)
        self.chain.tick()
        holder = self.chain.holder
        if self.words is not None and holder is not None and any(self._emitted) and not holder.holding:
            self.words.commit(0, self._behind)
            self._release_all()

    # --- after a death ---

    def _recover(self) -> int:
        """What the predecessor of this process had published: sets `done`, and how many results to pass over."""
        words = self.words
        found = []
        for out in self.outputs:
            found.append(out.published_last())
            if found[-1][1] >= 0:
                words.commit(0, found[-1][1])
        for output, (offset, done) in enumerate(found):
            if done != words.done(0):
                continue
            if offset >= WHOLE or not (self.chain.stateful or self.chain.holder):
                self.skip[output] = offset
            elif self.chain.holder is not None and offset:
                self.chain.holder.resume(offset)
        if self.job.incarnation and self.chain.stateful and self.job.state is None:
            self.control.event("state_lost", segment=self.job.number, stage=self.job.name)
            for _, step in self.chain.steps:
                step.state_lost()
        return int(words.done(0))

    def is_poison(self, message: Any) -> bool:
        """Whether an item has cost as many workers as it may; it is an error then."""
        stage = self.job.stages[0]
        crashes = self.control.ask("crashes", segment=self.job.number, sequence=message.sequence)
        if crashes and stage.options.on_crash == "skip":
            self.counters.add("skipped", 1)
            return True
        # The channel buries, and nobody hears of it, what comes once more after its last delivery: that one is an error here.
        if message.attempt < LAST_DELIVERY and (not crashes or crashes[0] < stage.options.max_deliveries):
            return False
        crashes = crashes or (message.attempt - 1, "before it was processed")
        error = PipelineRuntimeError(f"the item ended {crashes[0]} worker processes: {crashes[1]}")
        self._item = message.sequence
        self.attempt = crashes[0]
        self.counters.add("errors", 1)
        policy = stage.options.policy
        if isinstance(policy, Retry):
            policy = policy.then_policy
        if not self._leaves_out(stage, policy, error, lambda: item_of(message)):
            raise StageFailed(
                PipelineRuntimeError(
                    f"stage {stage.name!r}: item {message.sequence} ended {crashes[0]} worker processes ({crashes[1]}); "
                    "use on_error=dead_letter(...) or 'skip' to go on without such items"
                )
            )
        self._item = None
        return True

    # --- checkpoints ---

    def mark(self, number: int, extra: dict[str, Any], done: int) -> None:
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
                operator_error(name, error, "its state cannot be pickled for a checkpoint")
            ) from error
        self.control.report_state(number, self.job.number, saved)
        if self.chain.sink is not None and number == self.job.first_marker:
            # Nothing is written before there is a checkpoint to go back to.
            while not self.control.ask("first_saved"):
                self.pause(SHORT)
        for output in range(len(self.outputs)):
            self.send_control(output, MARKER, str(number).encode(), done)

    def restore_sink(self) -> None:
        """Forget what the sink got after the checkpoint."""
        if self.chain.sink is not None and self._state.get("sink") is not None:
            stage = self.job.stages[-1]
            self.chain.call(
                stage,
                "the sink cannot go back to the checkpoint",
                lambda: self.chain.sink.restore(self._state["sink"]),
            )


def _measure(item: Any) -> tuple[int, int]:
    """Rows and bytes of an item; Python objects that are no arrays are not measured."""
    if type(item) is np.ndarray:
        return (item.size if item.dtype.names else 1), item.nbytes
    if isinstance(item, Batch):
        return rows_of(item), nbytes_of(item)
    return 1, 0


def _what(stage: Stage) -> str:
    function = getattr(stage.part, "function", None)
    name = getattr(function, "__qualname__", None)
    return f"{name}()" if isinstance(name, str) else stage.part.kind
