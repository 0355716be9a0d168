"""How several inputs become one: the steps of `Merge`.

Whoever runs a step asks `wants` before it takes an item of an input, so that no more than one item of each waits here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dsline.dataflow import items
from dsline.dataflow.descriptions import fail
from dsline.dataflow.items import COLUMNS, RECORDS
from dsline.dataflow.operator import Context, Emit, MergeStep

if TYPE_CHECKING:
    from dsline.dataflow.operators import Merge

__all__ = ["ArrivalStep", "OrderStep", "SequenceStep", "ZipStep", "start"]

Array: TypeAlias = np.ndarray[Any, Any]


def start(operator: Merge, context: Context) -> MergeStep:
    """Make the step of a `Merge`."""
    if operator.order == "arrival":
        return ArrivalStep()
    if operator.order == "zip":
        return ZipStep(operator.inputs, context)
    if operator.order == "sequence":
        return SequenceStep(operator.inputs)
    return OrderStep(operator, context)


class ArrivalStep(MergeStep):
    """Every item as it comes."""

    def process_from(self, index: int, item: Any, emit: Emit) -> None:
        emit(item)


class _HoldingStep(MergeStep):
    """Items that wait for those of other inputs, first come first out for each input."""

    def __init__(self, inputs: int) -> None:
        self._waiting: list[deque[Any]] = [deque() for _ in range(inputs)]
        self._ended = [False] * inputs

    @property
    def holding(self) -> bool:
        return any(self._waiting)

    def wants(self, index: int) -> bool:
        return not self._waiting[index]

    def state_dict(self) -> Any:
        if not self.holding:
            return None
        return [[items.own(item) for item in waiting] for waiting in self._waiting]

    def load_state_dict(self, state: Any) -> None:
        if state is not None:
            self._waiting = [deque(waiting) for waiting in state]


class ZipStep(_HoldingStep):
    """One item of each input, as a tuple. Ends with the shortest input; what others have beyond is counted as "surplus"."""

    def __init__(self, inputs: int, context: Context) -> None:
        super().__init__(inputs)
        self._context = context
        self._is_over = False

    def wants(self, index: int) -> bool:
        return self._is_over or super().wants(index)  # the others must not be kept waiting

    def process_from(self, index: int, item: Any, emit: Emit) -> None:
        if self._is_over:
            self._context.count("surplus", 1)
            return
        self._waiting[index].append(item)
        while all(self._waiting):
            group = tuple(waiting.popleft() for waiting in self._waiting)
            self._end_with_the_shortest()
            emit(group)

    def end_of(self, index: int, emit: Emit) -> None:
        self._ended[index] = True
        self._end_with_the_shortest()

    def _end_with_the_shortest(self) -> None:
        if (
            any(ended and not waiting for ended, waiting in zip(self._ended, self._waiting, strict=True))
            and not self._is_over
        ):
            self._is_over = True
            surplus = sum(map(len, self._waiting))
            for waiting in self._waiting:
                waiting.clear()
            if surplus:
                self._context.count("surplus", surplus)


class SequenceStep(_HoldingStep):
    """All items of the first input, then all of the second, and so on."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self._current = 0

    def wants(self, index: int) -> bool:
        return index == self._current

    def process_from(self, index: int, item: Any, emit: Emit) -> None:
        if index == self._current:
            emit(item)
        else:
            self._waiting[index].append(item)

    def end_of(self, index: int, emit: Emit) -> None:
        self._ended[index] = True
        while self._current < len(self._ended) - 1 and self._ended[self._current]:
            self._current += 1
            waiting = self._waiting[self._current]
            while waiting:
                emit(waiting.popleft())

    def state_dict(self) -> Any:
        return {"current": self._current, "waiting": super().state_dict()}

    def load_state_dict(self, state: Any) -> None:
        if state is not None:
            self._current = state["current"]
            super().load_state_dict(state["waiting"])


class _Piece:
    """An item of which rows wait: those from `at` on."""

    __slots__ = ("at", "item", "keys")

    def __init__(self, item: Any, keys: Any) -> None:
        self.item = item
        self.keys = keys
        self.at = 0


class OrderStep(_HoldingStep):
    """Rows in the order of a key, for inputs that are in that order themselves; equal keys by the number of their input.

    A row is out as soon as no input can give one that belongs before it: every other one has ended, is idle, or has shown a key
    behind it. What comes too late after all, behind an idle time or from an input that is not in order, goes out at once and
    is counted as "late".
    """

    def __init__(
        self, operator: Merge, context: Context, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(operator.inputs)
        self._order = operator.order
        self._idle = operator.idle
        self._context = context
        self._clock = clock
        self._last: list[Any] = [None] * operator.inputs  # the largest key of each that has come
        self._seen = [clock()] * operator.inputs  # when
        self._out: Any = None  # the largest key that is out

    def process_from(self, index: int, item: Any, emit: Emit) -> None:
        keys = self._keys(item)
        if len(keys):
            if len(keys) > 1 and (keys[1:] < keys[:-1]).any():  # only arrays have more than one
                order = keys.argsort(kind="stable")
                keys, item = keys[order], items.take(item, order)
            if self._out is not None and keys[0] < self._out:
                late = sum(key < self._out for key in keys)
                if late:
                    self._context.count("late", int(late))
            self._waiting[index].append(_Piece(item, keys))
            last = self._last[index]
            self._last[index] = keys[-1] if last is None else max(last, keys[-1])
        self._seen[index] = self._clock()
        self._release(emit)

    def _keys(self, item: Any) -> Any:
        """The keys of the rows: an array, or a list of the one Python number of an item of one row."""
        if callable(self._order):
            given = self._order(item)
        else:
            try:
                given = item[self._order]
            except (KeyError, IndexError, TypeError, ValueError):
                fail(self._context, f"{items.item_text(item)} has no column {self._order!r} to order by")
        if type(given) in (int, float) and given == given and items.rows_of(item) == 1:
            return [given]
        keys = np.atleast_1d(np.asarray(given))
        if keys.shape != (items.rows_of(item),) or keys.dtype.kind not in "iufM":
            fail(
                self._context,
                f"the order of {items.item_text(item)} is {items.item_text(keys)}: it must be one number or time for each row",
            )
        missing = np.isnat if keys.dtype.kind == "M" else np.isnan
        if missing(keys).any():
            fail(self._context, f"a key to order by is missing (NaN or NaT) in {items.item_text(item)}")
        return keys

    def end_of(self, index: int, emit: Emit) -> None:
        self._ended[index] = True
        self._release(emit)

    def finish(self, emit: Emit) -> None:
        self._ended = [True] * len(self._ended)
        self._release(emit)

    def deadline(self) -> float | None:
        """When the next input that others wait for counts as idle."""
        if self._idle is None or not self.holding:
            return None
        now = self._clock()
        due = [
            seen + self._idle
            for index, seen in enumerate(self._seen)
            if not self._ended[index] and not self._waiting[index] and now < seen + self._idle
        ]
        return min(due) if due else now

    def tick(self, emit: Emit) -> None:
        self._release(emit)

    def _holds_back(self, index: int, now: float) -> bool:
        """Whether the input may still give rows that belong before those that wait."""
        if self._ended[index]:
            return False
        return self._idle is None or bool(self._waiting[index]) or now < self._seen[index] + self._idle

    def _release(self, emit: Emit) -> None:
        now = self._clock() if self._idle is not None else 0.0
        holders = [index for index in range(len(self._ended)) if self._holds_back(index, now)]
        ready: list[tuple[Any, Any]] = []
        for index, waiting in enumerate(self._waiting):
            while waiting:
                piece = waiting[0]
                stop = self._out_by(index, piece.keys, holders)
                if stop <= piece.at:
                    break
                whole = piece.at == 0 and stop == len(piece.keys)
                rows = piece.item if whole else items.take_rows(piece.item, piece.at, stop)
                ready.append((rows, piece.keys[piece.at : stop]))
                piece.at = stop
                if stop < len(piece.keys):
                    break
                waiting.popleft()
                self._seen[index] = now  # it was not asked before
        if ready:
            latest = max(keys[-1] for _, keys in ready)
            self._out = latest if self._out is None else max(self._out, latest)
            self._emit(ready, emit)

    def _out_by(self, index: int, keys: Any, holders: list[int]) -> int:
        """How many of the keys are before whatever the other inputs can still give."""
        stop = len(keys)
        for other in holders:
            if other == index:
                continue
            last = self._last[other]
            if last is None:
                return 0
            if stop == 1:
                stop = int(keys[0] < last or (keys[0] == last and index < other))
            else:
                stop = min(stop, int(np.searchsorted(keys, last, "right" if index < other else "left")))
            if not stop:
                return 0
        return stop

    def _emit(self, ready: list[tuple[Any, Any]], emit: Emit) -> None:
        if len(ready) == 1:
            emit(ready[0][0])
            return
        if not any(items.kind_of(rows) in (RECORDS, COLUMNS) for rows, _ in ready):
            for rows, _ in sorted(ready, key=lambda each: each[1][0]):  # stable: equal ones by their input
                emit(rows)
            return
        order = np.concatenate([keys for _, keys in ready]).argsort(kind="stable")
        try:
            rows = items.concatenate([rows for rows, _ in ready])
        except ValueError as error:
            fail(self._context, f"rows in one order must be alike: {error}")
        emit(items.take(rows, order))

    def state_dict(self) -> Any:
        return {
            "waiting": [
                [items.own(items.take_rows(piece.item, piece.at, len(piece.keys))) for piece in waiting]
                for waiting in self._waiting
            ],
            "last": list(self._last),
            "out": self._out,
        }

    def load_state_dict(self, state: Any) -> None:
        if state is not None:
            self._waiting = [
                deque(_Piece(item, self._keys(item)) for item in each) for each in state["waiting"]
            ]
            self._last, self._out = list(state["last"]), state["out"]
