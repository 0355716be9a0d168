"""The ends of an edge: `Output` sends items into it, `item_of` and `acknowledge` take them out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dsline.dataflow.control import (
    ANNOUNCED,
    END,
    GAP,
    NOTHING,
    SHORT,
    SLICE,
    WHOLE,
    Control,
    StageFailed,
    Stopped,
    operator_error,
)
from dsline.dataflow.counters import WorkerCounters
from dsline.dataflow.plan import Edge
from dsline.errors import BufferFullError, ChannelClosedError, DslineError, PipelineRuntimeError

__all__ = ["Output", "acknowledge", "item_of"]


class Output:
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
            if isinstance(item, np.ndarray) and not item.dtype.hasobject
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
                    return self._checked(call, SLICE)
                except BufferFullError:
                    if self._control.aborting:
                        raise Stopped from None
        finally:
            self._counters.unblocked()

    def _tell_full(self) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + SLICE
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
            raise StageFailed(operator_error(self._stage, error, "its result cannot be sent")) from error

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
                self._told()
        except (BufferFullError, ChannelClosedError):
            pass

    def control(self, kind: int, payload: bytes, done: int = 0) -> None:
        """Send the control frame that input `done` is; one is never dropped."""
        if kind == END and self._words is not None and self.edge.full == "drop_newest":
            # What workers have dropped that died, or have not sent anything since.
            self._dropped = self._control.ask("untold")
        if self._dropped:
            self._send_surely(GAP, str(self._dropped).encode(), *self._intent)
            self._told()
        self._send_surely(kind, payload, WHOLE, done)

    def _told(self) -> None:
        self._counters.add(ANNOUNCED, self._dropped)
        self._dropped = 0

    def _send_surely(self, kind: int, payload: bytes, offset: int, done: int) -> None:
        self._intend(offset, done)
        began = time.monotonic_ns()
        while True:
            try:
                if self.channel._core_send_control(kind, payload, SLICE):
                    break
                time.sleep(SHORT)
            except BufferFullError:
                pass
            except ChannelClosedError:
                raise Stopped from None
            if self._control.aborting:
                raise Stopped
        waited = time.monotonic_ns() - began
        if waited > NOTHING:
            self._counters.blocked(waited)


def acknowledge(message: Any) -> None:
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
