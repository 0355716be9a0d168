"""Chain: the operators of a segment, each calling the next, with the errors of each stage kept apart."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsline.dataflow.control import Job, StageFailed, failures_of, operator_error, said
from dsline.dataflow.operator import Context, Emit, MergeStep, Operator, Router, Sink, Step
from dsline.dataflow.plan import Stage
from dsline.dataflow.policies import DeadLetterPolicy, Retry, Skip
from dsline.dataflow.sinks import CollectSink

if TYPE_CHECKING:
    from dsline.dataflow.runtime import SegmentLoop

__all__ = ["Chain", "started"]


class Chain:
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
            self.steps.append((stage, started(stage, context)))
        last = job.stages[-1] if job.stages else None
        if last is not None and isinstance(last.part, Sink) and not _goes_to_caller(last.part):
            self.contexts.append(loop.context(last))
            self.sink = started(last, self.contexts[-1])
            emit = self._guard(last, self.sink.write, None)
        elif last is not None and isinstance(last.part, Router):
            emit = self._routing(last, started(last, loop.context(last)), loop)
        self.emits: list[Callable[[Any], None]] = []
        self.counts: list[Counted] = []
        for stage, step in reversed(self.steps):
            counts = Counted(emit)
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

    def _step(self, stage: Stage, step: Step, counts: Counted) -> Callable[[Any], None]:
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
        self, stage: Stage, call: Callable[[Any], None], counts: Counted | None
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
            raise StageFailed(operator_error(stage.name, error, what)) from error

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

    def _late_results(self, stage: Stage, counts: Counted, what: str, give: Callable[[Emit], None]) -> None:
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
                self._loop.control.event("warning", text=f"close() failed: {said(error)}")
        if self.sink is not None:
            try:
                self.sink.close()
            except self._loop.failures as error:
                self._loop.control.event("warning", text=f"closing the sink failed: {said(error)}")


def _goes_to_caller(sink: Sink) -> bool:
    return isinstance(sink, CollectSink) and sink.items is None


class Counted:
    """Counts the results of a step on their way."""

    __slots__ = ("emit", "number")

    def __init__(self, emit: Callable[[Any], None]) -> None:
        self.number = 0

        # A function, not a method that is looked up: calling it makes no other reference to an array of a slot.
        def counted(item: Any) -> None:
            self.number += 1
            emit(item)

        self.emit = counted


def started(stage: Stage, context: Context) -> Any:
    """Return the running step, source or sink of a stage; of a router its function."""
    try:
        return stage.part.route(context) if isinstance(stage.part, Router) else stage.part.start(context)
    except failures_of(context.worker) as error:
        raise StageFailed(operator_error(stage.name, error, "it could not be started")) from error
