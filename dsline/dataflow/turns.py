"""Turns: how several workers that share an input put their results out in order."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dsline.dataflow.control import END, GAP, MARKER, OVER, SHORT, SLICE, TURN, StageFailed, Stopped
from dsline.dataflow.edges import acknowledge, item_of
from dsline.dataflow.plan import AHEAD
from dsline.errors import BufferEmptyError, ChannelClosedError, PipelineRuntimeError

if TYPE_CHECKING:
    from dsline.dataflow.runtime import SegmentLoop

__all__ = ["Finished", "TurnTaking"]


@dataclasses.dataclass(order=True)
class Finished:
    """Results of an input that wait for their turn."""

    turn: int
    sequence: int = dataclasses.field(compare=False)
    message: Any = dataclasses.field(compare=False)
    results: list[tuple[int, Any]] = dataclasses.field(compare=False)
    kind: int = dataclasses.field(compare=False, default=0)
    payload: bytes = dataclasses.field(compare=False, default=b"")


class TurnTaking:
    """One of several workers that share an input. Each processes what it gets at once; results leave in turn."""

    def __init__(self, loop: SegmentLoop) -> None:
        self._loop = loop
        self._words = loop.words
        self._channel = loop.inputs[0]
        self._waiting = loop.waiting
        self._lossy = loop.job.inputs[0].full in ("drop_oldest", "latest")
        self._ended = False

    def steps(self) -> Iterator[None]:
        loop = self._loop
        while True:
            self._publish_ready()
            if not self._waiting and (self._ended or self._words.done(0) >= OVER):
                loop.sent_end = loop.sent_end or self._words.done(0) >= OVER
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
                return self._channel.recv_message(timeout=SLICE)
            elif len(waiting) <= AHEAD:
                try:
                    return self._channel.recv_message(timeout=0)
                except BufferEmptyError:
                    self._wait_turn(SHORT)
                    return None
            if self._wait_turn(TURN):
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
            if done >= OVER:
                return
            sequence = done if self._loop.job.ordered else self._words.sequence_of(done)
            if sequence is None or self._channel._core_is_outstanding(sequence):
                return
            # Gone, and not committed: unless a worker died after it had published all of it.
            outputs = [out.published_last() for out in self._loop.outputs]
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
            acknowledge(message)
            return
        finished = Finished(sequence, sequence, message, [], kind)
        if kind in (END, MARKER, GAP):
            finished.payload = bytes(message.payload)
            if kind == GAP:
                loop.counters.add("lost", int(finished.payload))
        elif not (message.redelivered and loop.is_poison(message)):
            loop.attempt = message.attempt
            loop.results = finished.results
            item = item_of(message, copy=not ordered)
            try:
                loop.work(sequence, item)
            finally:
                loop.results = None
                del item
        if not ordered:
            self._draw(finished, message.redelivered)
            if finished.turn < self._words.done(0):  # a predecessor had committed it
                loop.counters.add("duplicates", 1)
                self._finish(finished)
                return
        heapq.heappush(self._waiting, finished)

    def _draw(self, finished: Finished, redelivered: bool) -> None:
        """Take the next place in the order of completion; the end comes when nothing before it is left."""
        words, is_control = self._words, finished.kind in (END, MARKER)
        found = words.find_ticket(finished.sequence) if redelivered else None
        while found is None:
            pause = SHORT if self._waiting else TURN
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

    def _publish(self, finished: Finished) -> None:
        loop, turn = self._loop, finished.turn
        if finished.message.redelivered:
            loop.skip = self._already_out(turn)
        if finished.kind == MARKER:
            loop.mark(int(finished.payload), {}, turn)
        elif finished.kind == END:
            for output in range(len(loop.outputs)):
                loop.send_control(output, END, b"", turn)
        sent = [0] * len(loop.outputs)
        for output, item in finished.results:
            sent[output] += 1
            if sent[output] <= loop.skip[output]:
                loop.counters.add("duplicates", 1)
                continue
            loop.outputs[output].send(item, sent[output], turn)
        loop.skip = [0] * len(loop.outputs)
        self._words.commit(0, OVER if finished.kind == END else turn + 1)
        if finished.kind == END:
            self._ended = True
            loop.sent_end = True
            if loop.job.inputs[0].external is None:
                self._channel.shutdown()  # wakes the others: nothing comes any more
            else:
                loop.end_for_all(0, finished.message)
                loop.control.event("ended", segment=loop.job.number)

    def _already_out(self, turn: int) -> list[int]:
        """How many results of a redelivered input its last holder had published, per output."""
        found = []
        for out in self._loop.outputs:
            offset, done = out.published_last()
            found.append(offset if done == turn else 0)
        return found

    def _finish(self, finished: Finished) -> None:
        finished.results.clear()
        acknowledge(finished.message)
        if not self._loop.job.ordered:
            self._words.acknowledged()
