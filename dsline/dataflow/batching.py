"""The operators that keep rows for a while: batches of rows, functions of batches, and rate limits."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Callable
from types import GeneratorType
from typing import Any, ClassVar, Final

import numpy as np

from dsline.dataflow import items
from dsline.dataflow.callables import function_name
from dsline.dataflow.descriptions import (
    FunctionStep,
    PlainOperator,
    call_of,
    check_function,
    check_whole,
    fail,
    is_stateful,
    parse_seconds,
    seconds_text,
)
from dsline.dataflow.items import COLUMNS, FRAME, OBJECT, RECORDS, Batch, Columns
from dsline.dataflow.operator import Context, Emit, Schema, Step
from dsline.dataflow.operators import Map, MapStep, open_rows
from dsline.errors import PipelineBuildError
from dsline.specs import ArraySpec

__all__ = ["BatchRows", "FilterBatches", "GatherStep", "MapBatches", "RateLimit", "RateLimitStep", "Unbatch"]

# --- batches ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BatchRows(PlainOperator):
    """Gather rows into items of `size` rows; see `dsline.ops.batch`."""

    kind: ClassVar[str] = "batch"
    holds: ClassVar[bool] = True
    size: int
    linger: Any = None
    drop_last: bool = False
    pad: Any = None

    def __post_init__(self) -> None:
        check_whole("size", self.size, 1)
        if self.linger is not None:
            object.__setattr__(self, "linger", parse_seconds(self.linger, "linger"))
        if self.pad is not None and self.drop_last:
            raise PipelineBuildError(
                "drop_last= and pad= say two things about the last rows; give one of them"
            )

    def start(self, context: Context) -> Step:
        return GatherStep(self, context)

    def check(self, schema: Schema) -> Schema:
        if not isinstance(schema, ArraySpec) or items.kind_of_schema(schema) == RECORDS:
            return schema if schema is None or isinstance(schema, Columns) else self._of_records(schema)
        whole = self.pad is not None or (self.drop_last and self.linger is None)
        if None in schema.shape or schema.order != "C":
            return ArraySpec((None, *schema.shape), schema.dtype)
        return ArraySpec((self.size if whole else None, *schema.shape), schema.dtype)

    @staticmethod
    def _of_records(schema: Schema) -> Schema:
        return open_rows(schema) if isinstance(schema, ArraySpec) else Columns(schema)

    def describe(self) -> str:
        linger = "" if self.linger is None else f" or {seconds_text(self.linger)}"
        rest = (
            ", last dropped" if self.drop_last else "" if self.pad is None else f", padded with {self.pad!r}"
        )
        return f"batch {self.size} rows{linger}{rest}"


class GatherStep(Step):
    """Gathers rows.

    `holding` and `offset` are already those behind an item that is emitted while it is emitted: what has to be written down
    before it is published.
    """

    def __init__(
        self, operator: BatchRows, context: Context, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._operator = operator
        self._context = context
        self._clock = clock
        self._kind: str | None = None
        self._like: Any = None  # shape and dtypes that all rows of a batch share
        self._target: Any = None  # array, dict of arrays or list
        self._filled = 0
        self._due: float | None = None
        self._skip = 0
        self._offset = 0
        self._rows = 0  # of the last item
        self._in_hand = False  # an item is being processed and has rows left

    @property
    def holding(self) -> bool:
        return self._filled > 0 or self._in_hand

    @property
    def offset(self) -> int:
        return self._offset

    def resume(self, offset: int) -> None:
        self._skip = offset

    def deadline(self) -> float | None:
        return self._due

    def tick(self, emit: Emit) -> None:
        if self._due is not None and self._clock() >= self._due:
            self._close_early(emit)

    def finish(self, emit: Emit) -> None:
        if not self._filled:
            return
        if self._operator.drop_last:
            self._context.count("dropped", self._filled)
            self._forget()
            self._offset = self._rows
        else:
            self._close_early(emit)

    def process(self, item: Any, emit: Emit) -> None:
        kind = items.kind_of(item)
        like = _row_shape(item, kind)
        self._rows = rows = items.rows_of(item)
        self._offset = at = min(self._skip, rows)
        self._skip = 0
        if self._filled and (kind != self._kind or like != self._like):
            fail(
                self._context,
                f"{items.item_text(item)} came, and the batch has begun with {self._text()}: all rows of a batch are alike",
            )
        self._kind, self._like = kind, like
        size = self._operator.size
        try:
            while at < rows:
                if not self._filled and rows - at >= size and kind in (RECORDS, COLUMNS):
                    at += size
                    self._pass(at, emit, items.take_rows(item, at - size, at))
                    continue
                count = min(size - self._filled, rows - at)
                self._gather(item, at, count)
                at += count
                if self._filled == size:
                    batch = self._whole()
                    self._pass(at, emit, batch)
                    del batch
        finally:
            self._in_hand = False

    def _pass(self, at: int, emit: Emit, batch: Any) -> None:
        self._offset = at
        self._in_hand = at < self._rows
        emit(batch)

    def _text(self) -> str:
        if self._kind == OBJECT:
            return "objects"
        return f"{self._kind} of {self._like}"

    def _gather(self, item: Any, start: int, count: int) -> None:
        if not self._filled:
            self._open(item)
        at, stop = self._filled, self._filled + count
        if self._kind == OBJECT:
            self._target.append(item)
        elif self._kind == FRAME:
            self._target[at] = item
        elif self._kind == RECORDS:
            self._target[at:stop] = item[start : start + count]
        else:
            for name, column in item._columns.items():
                self._target[name][at:stop] = column[start : start + count]
        self._filled = stop

    def _open(self, item: Any) -> None:
        size = self._operator.size
        if self._operator.linger is not None:
            self._due = self._clock() + self._operator.linger
        if self._kind == OBJECT:
            self._target = []
        elif self._kind == COLUMNS:
            self._target = {name: np.empty(size, column.dtype) for name, column in item._columns.items()}
        else:
            shape = (size, *item.shape) if self._kind == FRAME else (size,)
            allocate = self._context.allocate
            self._target = np.empty(shape, item.dtype) if allocate is None else allocate(shape, item.dtype)

    def _forget(self) -> None:
        self._target = None
        self._filled = 0
        self._due = None

    def _whole(self) -> Any:
        target = self._target
        self._forget()
        return Batch._of(target, self._operator.size) if self._kind == COLUMNS else target

    def _close_early(self, emit: Emit) -> None:
        filled, size, pad = self._filled, self._operator.size, self._operator.pad
        if pad is not None:
            self._pad(filled, size, pad)
            self._context.count("padded", size - filled)
            batch = self._whole()
        else:
            batch = self._whole()
            if isinstance(batch, np.ndarray):
                batch = batch[:filled]
            elif isinstance(batch, Batch):
                batch = items.take_rows(batch, 0, filled)
        self._offset = self._rows
        emit(batch)

    def _pad(self, filled: int, size: int, pad: Any) -> None:
        if self._kind == OBJECT:
            self._target.extend([pad] * (size - filled))
        elif self._kind == COLUMNS:
            for name, column in self._target.items():
                column[filled:] = pad[name] if isinstance(pad, dict) else pad
        else:
            self._target[filled:] = pad

    def state_dict(self) -> Any:
        if not self._filled:
            return None
        filled = self._filled
        if self._kind == OBJECT:
            return list(self._target)
        if self._kind == COLUMNS:
            return [
                Batch._of({name: column[:filled].copy() for name, column in self._target.items()}, filled)
            ]
        rows = np.array(self._target[:filled])
        return list(rows) if self._kind == FRAME else [rows]

    def load_state_dict(self, state: Any) -> None:
        self._forget()
        for item in state or ():
            self.process(item, _emits_nothing)


def _emits_nothing(item: Any) -> None:
    raise AssertionError("a saved batch is not full")


def _row_shape(item: Any, kind: str) -> Any:
    if kind == RECORDS:
        return item.dtype
    if kind == FRAME:
        return item.dtype, item.shape
    return item.dtypes if kind == COLUMNS else None


@dataclasses.dataclass(frozen=True)
class Unbatch(PlainOperator):
    """One item for each row; see `dsline.ops.unbatch`."""

    kind: ClassVar[str] = "unbatch"

    def start(self, context: Context) -> Step:
        return _UnbatchStep(context)

    def check(self, schema: Schema) -> Schema:
        if items.kind_of_schema(schema) != FRAME or not isinstance(schema, ArraySpec):
            return schema
        if not schema.shape:
            raise PipelineBuildError(f"the items are {schema}, which cannot be taken apart")
        return ArraySpec(schema.shape[1:], schema.dtype)


class _UnbatchStep(Step):
    def __init__(self, context: Context) -> None:
        self._context = context

    def process(self, item: Any, emit: Emit) -> None:
        if isinstance(item, Batch) or items.is_records(item):
            for row in range(len(item)):
                emit(items.take_rows(item, row, row + 1))
        elif isinstance(item, np.ndarray) and item.ndim:
            for row in range(len(item)):
                emit(item[row, ...])
        elif isinstance(item, list | tuple):
            for one in item:
                emit(one)
        else:
            fail(self._context, f"{items.item_text(item)} cannot be taken apart: it has no rows")


@dataclasses.dataclass(frozen=True)
class _OnBatches(PlainOperator):
    """Gathers rows, and hands batches to another operator."""

    holds: ClassVar[bool] = True
    function: Any
    batch: int | None = 256  # None: items as they come, which are batches already
    linger: Any = "10ms"

    def __post_init__(self) -> None:
        check_function(self.function, "function")
        if self.batch is not None:
            check_whole("batch", self.batch, 1)
        object.__setattr__(self, "holds", self.batch is not None)
        if self.linger is not None:
            object.__setattr__(self, "linger", parse_seconds(self.linger, "linger"))
        object.__setattr__(self, "stateful", is_stateful(self.function))

    def _inner(self, context: Context) -> Step:
        raise NotImplementedError

    def _gathered(self, schema: Schema) -> Schema:
        return schema if self.batch is None else BatchRows(self.batch, self.linger).check(schema)

    def start(self, context: Context) -> Step:
        if self.batch is None:
            return self._inner(context)
        return _OnBatchesStep(BatchRows(self.batch, self.linger), self._inner(context), context)

    def describe(self) -> str:
        if self.batch is None:
            return f"{self.kind} {function_name(self.function)}"
        linger = "" if self.linger is None else f" or {seconds_text(self.linger)}"
        return f"{self.kind} {function_name(self.function)}, {self.batch} rows{linger}"


@dataclasses.dataclass(frozen=True)
class MapBatches(_OnBatches):
    """Call a function with batches of rows; see `dsline.ops.map_batches`."""

    kind: ClassVar[str] = "map_batches"
    returns: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "returns", Map(self.function, self.returns).returns)
        if inspect.isgeneratorfunction(call_of(self.function)):
            raise PipelineBuildError(_ONE_RESULT.format(function_name(self.function)))

    def _inner(self, context: Context) -> Step:
        return _MapBatchStep(self.function, self.returns, context)

    def check(self, schema: Schema) -> Schema:
        return Map(self.function, self.returns).check(self._gathered(schema))


# A batch that gives several results could not be resumed between two of them.
_ONE_RESULT: Final = "{} is a generator, and a batch gives one result; return one and add .unbatch(), or use .batch() and .map()"


class _MapBatchStep(MapStep):
    def _several(self, results: GeneratorType[Any, Any, Any], item: Any, emit: Emit) -> None:
        fail(self.context, _ONE_RESULT.format("what the function returned"))


@dataclasses.dataclass(frozen=True)
class FilterBatches(_OnBatches):
    """Keep the rows of batches for which a function is true; see `dsline.ops.filter_py_batch`."""

    kind: ClassVar[str] = "filter_batches"

    def _inner(self, context: Context) -> Step:
        return _RowsFilterStep(self.function, context)

    def check(self, schema: Schema) -> Schema:
        return self._gathered(schema)


class _RowsFilterStep(FunctionStep):
    def process(self, item: Any, emit: Emit) -> None:
        if not isinstance(item, list | np.ndarray | Batch) or (
            isinstance(item, np.ndarray) and not item.ndim
        ):
            fail(self.context, f"{items.item_text(item)} is no batch of rows")
        if not len(item):
            return
        answer = np.asarray(self.function(item))
        if answer.shape != (len(item),) or answer.dtype != bool:
            fail(
                self.context,
                f"the function returned {items.item_text(answer)} for a batch of {len(item)} rows: it must return one truth "
                "value for each row",
            )
        kept = np.flatnonzero(answer)
        if not len(kept):
            return
        if isinstance(item, list):
            emit([item[number] for number in kept])
        elif isinstance(item, np.ndarray):
            emit(item.take(kept, axis=0))
        else:
            emit(items.take(item, kept))


class _OnBatchesStep(GatherStep):
    def __init__(self, gather: BatchRows, inner: Step, context: Context) -> None:
        # Rows are gathered in memory of this process: the slot is for the result.
        super().__init__(gather, dataclasses.replace(context, allocate=None))
        self._inner = inner

    def process(self, item: Any, emit: Emit) -> None:
        super().process(item, lambda batch: self._inner.process(batch, emit))

    def _close_early(self, emit: Emit) -> None:
        super()._close_early(lambda batch: self._inner.process(batch, emit))

    def state_dict(self) -> Any:
        rows, own = super().state_dict(), self._inner.state_dict()
        return None if rows is None and own is None else {"rows": rows, "function": own}

    def load_state_dict(self, state: Any) -> None:
        if state is not None:
            super().load_state_dict(state["rows"])
            self._inner.load_state_dict(state["function"])

    def close(self) -> None:
        self._inner.close()


# --- rate -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RateLimit(PlainOperator):
    """Let items pass at a rate; see `dsline.ops.rate_limit`."""

    kind: ClassVar[str] = "rate_limit"
    holds: ClassVar[bool] = True
    per_second: float
    burst: int = 1
    full: str = "block"

    def __post_init__(self) -> None:
        rate: Any = self.per_second
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise PipelineBuildError(f"per_second is {rate!r}, must be a number above 0")
        check_whole("burst", self.burst, 1)
        if self.full not in ("block", "drop_newest", "drop_oldest"):
            raise PipelineBuildError(
                f"full is {self.full!r}, must be 'block', 'drop_newest' or 'drop_oldest'"
            )

    def start(self, context: Context) -> Step:
        return RateLimitStep(self, context)

    def check(self, schema: Schema) -> Schema:
        return schema

    def describe(self) -> str:
        burst = "" if self.burst == 1 else f", bursts of {self.burst}"
        return f"rate_limit {self.per_second:g}/s{burst}, {self.full}"


class RateLimitStep(Step):
    """A token bucket, kept as the one number of the generic cell rate algorithm (ITU-T I.371): the time at which the bucket
    would be full again. An item conforms while that is at most `burst` - 1 intervals ahead.

    At most one item waits here. `process` blocks only where another one comes while it does; see `is_full`.
    """

    def __init__(
        self,
        operator: RateLimit,
        context: Context,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval = 1.0 / operator.per_second
        self._ahead = (operator.burst - 1) * self._interval
        self._full = operator.full
        self._context = context
        self._clock = clock
        self._full_at = -math.inf  # theoretical arrival time
        self._waiting: list[Any] = []
        self._offset = 0
        self._skips = False

    @property
    def offset(self) -> int:
        """1 while and after the last item itself is emitted, 0 while one before it is."""
        return self._offset

    def resume(self, offset: int) -> None:
        self._skips = offset > 0

    @property
    def holding(self) -> bool:
        # What a drop policy lets wait may be lost anyway, and holding it would keep those dropped before it.
        return bool(self._waiting) and self._full == "block"

    @property
    def is_full(self) -> bool:
        """Whether `process` would block until the deadline."""
        return bool(self._waiting) and self._full == "block"

    def deadline(self) -> float | None:
        return self._full_at - self._ahead if self._waiting else None

    def _take_token(self) -> bool:
        now = self._clock()
        if now < self._full_at - self._ahead:
            return False
        self._full_at = max(now, self._full_at) + self._interval
        return True

    def process(self, item: Any, emit: Emit) -> None:
        if self._skips:
            self._skips, self._offset = False, 1
            return
        self._offset = 0
        self.tick(emit)
        if self._waiting and self._full == "block":
            self._wait(emit)
        if not self._waiting and self._take_token():
            self._offset = 1
            emit(item)
        elif self._full == "drop_newest":
            self._context.count("dropped", 1)
        else:
            if self._waiting:  # drop_oldest
                self._waiting.pop()
                self._context.count("dropped", 1)
            self._waiting.append(item)

    def tick(self, emit: Emit) -> None:
        if self._waiting and self._take_token():
            emit(self._waiting.pop())

    def _wait(self, emit: Emit) -> None:
        while self._waiting:
            self.tick(emit)
            if self._waiting:
                # Rounded up, so that the clock has passed the deadline when it ends.
                self._context.pause(max(1e-6, self._full_at - self._ahead - self._clock()))

    def finish(self, emit: Emit) -> None:
        self._offset = 1
        self._wait(emit)

    def state_dict(self) -> Any:
        return [items.own(item) for item in self._waiting] or None

    def load_state_dict(self, state: Any) -> None:
        self._waiting = list(state or ())
