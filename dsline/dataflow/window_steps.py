"""Windows that run: entries of accumulated numbers per pane and key, merged when windows close.

Rows are grouped by (pane, key), where a pane is the longest piece of time that lies wholly inside or outside of every window,
and each group becomes one *entry* of accumulated numbers in a log. Entries of the same pane and key are merged when the log
has doubled, and when windows close. All of that is done by NumPy for whole batches; no Python code runs per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, cast

import numpy as np

from dsline.dataflow import aggregates as agg
from dsline.dataflow.aggregates import ROW_COUNT, Accumulator, Aggregate, Bound, Groups, Rows, Values
from dsline.dataflow.grouping import counts_of, extremes, group, is_sorted, pick, starts_of
from dsline.dataflow.operator import Context, Emit, Schema, Step
from dsline.dataflow.policies import DeadLetterPolicy
from dsline.dataflow.window_specs import HIGHEST, INT64, LOWEST, Clock, WindowSpec
from dsline.errors import OperatorError, PipelineBuildError
from dsline.expressions import Expression
from dsline.specs import ArraySpec

if TYPE_CHECKING:
    from dsline.dataflow.windows import Window

__all__ = ["CountStep", "Layout", "SessionStep", "TimeStep", "WindowStep", "dtypes_of_schema", "text_of"]

Array: TypeAlias = np.ndarray[Any, Any]
DType: TypeAlias = np.dtype[Any]

_MOST_EXPANDED: Final = 1 << 21  # panes times windows that are merged at a time
_FEWEST_COMPACTED: Final = 1024


def text_of(item: Any) -> str:
    if isinstance(item, np.ndarray):
        return f"an array of {item.dtype} with shape {item.shape}"
    if isinstance(item, Mapping):
        return f"a {type(item).__name__} with {', '.join(map(str, item)) or 'nothing in it'}"
    return f"a {type(item).__name__}"


class Layout:
    """A window on columns of known dtypes."""

    def __init__(self, window: Window, form: str, make: Any, dtypes: Mapping[str, DType]) -> None:
        spec = window.spec
        self.form = form  # "records", "columns" or "row"
        self.make = make  # of columns: makes the output from a dict
        self.expressions: dict[str, Expression] = {}
        self.dtypes: dict[str, DType] = {}  # of the columns that are read
        known = dict(dtypes)
        self.clock = None
        if spec.time is not None:
            self.clock = Clock(spec.time, self._need(spec.time, known, "time column"), spec.unit)
        for name in window.key:
            kind = self._need(name, known, "key column").kind
            if kind not in "biufmMSU":
                raise PipelineBuildError(
                    f"key column {name!r} is {known[name]}, must be numbers, times or texts"
                )
        self.size, self.every, self.lateness, self.keep = self._lengths(spec)
        self.bounds = {name: self._bind(aggregate, known) for name, aggregate in window.aggregates.items()}
        self.accumulators: list[Accumulator] = list(
            dict.fromkeys([ROW_COUNT, *(need for bound in self.bounds.values() for need in bound.needs)])
        )
        self.kept = list(
            dict.fromkeys(
                text for bound in self.bounds.values() if bound.keeps for text in bound.aggregate.columns
            )
        )
        edge = self.clock.out if self.clock is not None else INT64
        self.fields: dict[str, DType] = {"window_start": edge, "window_end": edge}
        self.fields |= {name: self.dtypes[name].newbyteorder("=") for name in window.key}
        self.fields |= {name: bound.result for name, bound in self.bounds.items()}
        if spec.late == "update":
            self.fields["revision"] = INT64
        if window.flag_partial:
            self.fields["partial"] = np.dtype(bool)

    def _lengths(self, spec: WindowSpec) -> tuple[int, int, int, int]:
        if self.clock is None:
            assert isinstance(spec.size, int) and isinstance(spec.every, int)
            return spec.size, spec.every, 0, 0
        length = self.clock.length
        size, every = length(f"{spec.kind}: size", spec.size), length(f"{spec.kind}: every", spec.every)
        keep = 0
        if spec.late == "update":
            keep = size if spec.keep is None else length(f"{spec.kind}: keep", spec.keep)
        if every > size:
            raise PipelineBuildError(
                f"{spec.kind}: every {spec.every!r} is longer than size {spec.size!r}: rows between would be in no window; "
                "drop them by a filter before"
            )
        return size, every, length(f"{spec.kind}: lateness", spec.lateness), keep

    def _need(self, name: str, known: Mapping[str, DType], what: str) -> DType:
        if name not in known:
            raise PipelineBuildError(f"there is no {what} {name!r}; there are: {', '.join(known) or 'none'}")
        self.dtypes[name] = known[name]
        return known[name]

    def _bind(self, aggregate: Aggregate, known: Mapping[str, DType]) -> Bound:
        dtypes = []
        for text in aggregate.columns:
            if text in known:
                dtypes.append(self._need(text, known, "column"))
                continue
            numbers = {
                name: dtype for name, dtype in known.items() if dtype.kind in "biuf" and name.isidentifier()
            }
            expression = Expression(text, numbers)
            for name in expression.names:
                self._need(name, known, "column")
            expression = Expression(text, {name: known[name] for name in expression.names})
            self.expressions[text] = expression
            dtypes.append(expression.dtype)
        return Bound(aggregate, tuple(dtypes))

    def values(self, columns: Mapping[str, Array], text: str) -> Array:
        expression = self.expressions.get(text)
        return columns[text] if expression is None else cast(Array, expression(columns))


def dtypes_of_schema(schema: Schema) -> tuple[str, dict[str, DType]]:
    if isinstance(schema, ArraySpec):
        dtype = schema.dtype
        if dtype.names is None or dtype.fields is None or schema.ndim != 1:
            raise PipelineBuildError(
                f"a window takes records (structured arrays), columns or dicts of numbers, and the input is {schema}"
            )
        return "records", {name: dtype.fields[name][0] for name in dtype.names}
    assert schema is not None
    for name, spec in schema.items():
        if spec.ndim != 1:
            raise PipelineBuildError(f"column {name!r} is {spec}, must have one dimension")
    return "columns", {name: spec.dtype for name, spec in schema.items()}


class _Log:
    """Rows of several arrays, which are appended to in chunks."""

    def __init__(self) -> None:
        self.rows = 0
        self._chunks: list[list[Array]] = []

    def append(self, arrays: list[Array]) -> None:
        self._chunks.append(arrays)
        self.rows += len(arrays[0])

    def arrays(self) -> list[Array]:
        if len(self._chunks) > 1:
            self._chunks = [[np.concatenate(column) for column in zip(*self._chunks, strict=True)]]
        return self._chunks[0] if self._chunks else []

    def replace(self, arrays: list[Array]) -> None:
        self.rows = len(arrays[0]) if arrays else 0
        self._chunks = [arrays] if self.rows else []

    def keep(self, mask: Array) -> None:
        found = np.flatnonzero(mask)
        if len(found) < self.rows:
            self.replace([array.take(found) for array in self.arrays()])


@dataclasses.dataclass
class _Batch:
    """Rows of an item that have not been aggregated yet."""

    item: Any
    columns: Mapping[str, Array]
    ticks: Array
    index: Array | None = None  # rows of the item; None: all

    def take(self, rows: Any) -> _Batch:
        """Some of the rows: a slice or indices."""
        index = np.arange(len(self.ticks)) if self.index is None else self.index
        columns = {name: column[rows] for name, column in self.columns.items()}
        return _Batch(self.item, columns, self.ticks[rows], index[rows])


class WindowStep(Step):
    """A running window.

    Attributes
    ----------
    on_late : callable or None
        Gets late rows as an item of the input's kind.
    """

    def __init__(self, window: Window, context: Context) -> None:
        self._window = window
        self._context = context
        self._layout: Layout | None = None
        self._entries = _Log()  # place (pane, or start and last row), keys, accumulated numbers
        self._kept = _Log()  # pane, keys, time, values
        self._compact_at = _FEWEST_COMPACTED
        self._lost: bool | int = False  # or: windows that start up to this tick may lack rows
        # An item whose rows are in the state, but for which a function failed, and the windows that did not come out.
        self._taken: Any = None
        self._failed: list[tuple[Any, ...]] = []
        self._error: Exception | None = None
        late = window.spec.late
        self.on_late: Callable[[Any], None] | None = late if callable(late) else None
        if isinstance(late, DeadLetterPolicy):
            self.on_late = self._bury

    # --- what the runtime calls ---

    def process(self, item: Any, emit: Emit) -> None:
        if self._taken is not None and self._go_on(item, emit):
            return
        columns, rows = self._columns_of(item)
        if rows == 0:
            return
        layout = self._layout
        assert layout is not None
        for name in self._window.key:
            column = columns[name]
            if column.dtype.kind in "fmM" and agg.missing_in(column) is not None:
                raise OperatorError(
                    f"an item has missing values in key column {name!r}; filter such rows before the window"
                )
        if self._entries.rows + rows > self._window.max_open:
            self._add_carefully(item, columns, rows, emit)
        else:
            self._add(item, columns, rows, emit)
        if self._entries.rows > self._compact_at:
            self._compact()
        self._raise_error(item)

    def _add_carefully(self, item: Any, columns: dict[str, Array], rows: int, emit: Emit) -> None:
        """Add rows that may be too many: with an error, nothing has been changed or emitted."""
        before, out = self.state_dict(), list[Any]()
        self._add(item, columns, rows, out.append)
        if self._entries.rows > self._window.max_open:
            self._compact()
            try:
                self._check_open(self._entries.rows)
            except OperatorError:
                self.load_state_dict(before)
                self._failed.clear()
                self._error = None
                raise
        for result in out:
            emit(result)

    def _go_on(self, item: Any, emit: Emit) -> bool:
        """After an error: compute the windows of the item again if it is tried again, or give them up. Whether it is."""
        again = item is self._taken
        failed, self._failed, self._taken = self._failed, [], None
        if again:
            for start, end, keys, parts, values, more in failed:
                self._give(emit, start, end, keys, parts, values, **more)
            self._raise_error(item)
        elif failed:
            self._context.count("windows_lost", sum(len(start) for start, *_ in failed))
        return again

    def _raise_error(self, item: Any) -> None:
        """Raise what a function raised, now that the state is in order."""
        if self._error is not None:
            error, self._error = self._error, None
            self._taken = item
            raise error

    def finish(self, emit: Emit) -> None:
        if self._taken is not None:
            self._go_on(None, emit)
        if self._layout is not None:
            self._finish(emit)
        self._entries.replace([])
        self._kept.replace([])
        self._raise_error(None)

    def _finish(self, emit: Emit) -> None:
        raise NotImplementedError

    def state_lost(self) -> None:
        """Say that rows which were processed before are not in the state: marks what comes of it `partial`."""
        self._lost = True

    def state_dict(self) -> Any:
        state = {name: getattr(self, name) for name in self._scalars}
        layout = self._layout
        if layout is not None:
            state["layout"] = (layout.form, layout.make, layout.dtypes)
        return {
            **{name: value.copy() if isinstance(value, dict) else value for name, value in state.items()},
            "of": self._signature(),
            "compact_at": self._compact_at,
            "lost": self._lost,
            "entries": self._entries.arrays(),
            "kept": self._kept.arrays(),
        }

    def load_state_dict(self, state: Any) -> None:
        if state["of"] != self._signature():
            raise OperatorError(f"the state is of {state['of']}, and this is {self._signature()}")
        for name in self._scalars:
            value = state[name]
            setattr(self, name, value.copy() if isinstance(value, dict) else value)
        self._compact_at, self._lost = state["compact_at"], state["lost"]
        self._layout = Layout(self._window, *state["layout"]) if "layout" in state else None
        self._entries.replace(list(state["entries"]))
        self._kept.replace(list(state["kept"]))

    _scalars: ClassVar[tuple[str, ...]] = ()

    def _signature(self) -> str:
        spec = self._window.spec
        unit = f", unit {spec.unit}" if spec.unit is not None else ""
        update = f", updated for {spec.keep or spec.size}" if spec.late == "update" else ""
        return f"{self._window.describe()}{unit}{update}"

    # --- the input ---

    def _columns_of(self, item: Any) -> tuple[dict[str, Array], int]:
        """Return the columns that are read, and the number of rows."""
        if isinstance(item, np.ndarray) and item.dtype.names is not None and item.ndim == 1:
            if self._layout is None:
                fields = item.dtype.fields
                assert fields is not None
                self._set_layout("records", None, {name: fields[name][0] for name in item.dtype.names})
            return self._checked(item, len(item))
        if isinstance(item, Mapping):
            first = next(iter(item.values()), None)
            if first is not None and np.ndim(first) == 0:
                item = {name: np.asarray([value]) for name, value in item.items()}
                form, rows = "row", 1
            else:
                form, rows = "columns", -1 if first is None else len(first)
            if rows >= 0:
                if self._layout is None:
                    self._set_layout(
                        form,
                        type(item),
                        {name: column.dtype for name, column in item.items() if np.ndim(column) == 1},
                    )
                return self._checked(item, rows)
        raise OperatorError(
            f"a window takes records (structured arrays), columns or dicts of numbers, not {text_of(item)}"
        )

    def _set_layout(self, form: str, make: Any, dtypes: Mapping[str, DType]) -> None:
        try:
            self._layout = Layout(self._window, form, make, dtypes)
        except PipelineBuildError as error:
            raise OperatorError(str(error)) from error

    def _checked(self, item: Any, rows: int) -> tuple[dict[str, Array], int]:
        layout = self._layout
        assert layout is not None
        columns = {}
        for name, dtype in layout.dtypes.items():
            try:
                column = item[name]
            except (KeyError, ValueError):
                raise OperatorError(
                    f"there is no column {name!r} in {text_of(item)}, and the first item had it"
                ) from None
            if not isinstance(column, np.ndarray) or column.ndim != 1 or len(column) != rows:
                raise OperatorError(
                    f"column {name!r} is {text_of(column)}, must be an array of one dimension and {rows} rows"
                )
            if column.dtype != dtype and not (column.dtype.kind in "SU" and column.dtype.kind == dtype.kind):
                column = self._as_before(name, column, dtype, layout.form)
            columns[name] = column
        return columns, rows

    @staticmethod
    def _as_before(name: str, column: Array, dtype: DType, form: str) -> Array:
        # Python's numbers have no dtype: 20 may follow 20.5.
        if form == "row" and column.dtype.kind in "iu" and dtype.kind == "f":
            return column.astype(dtype)
        way = "; give floats from the first row on" if form == "row" and dtype.kind in "iu" else ""
        raise OperatorError(f"column {name!r} is {column.dtype}, and was {dtype} in the first item{way}")

    def _add(self, item: Any, columns: dict[str, Array], rows: int, emit: Emit) -> None:
        raise NotImplementedError

    def _bury(self, item: Any) -> None:
        """Write late rows to the dead letters."""
        from dsline.dataflow.dead_letters import write_dead_letter  # only where there are any

        late = self._window.spec.late
        write_dead_letter(
            late.uri,
            stage=self._context.stage,
            worker=self._context.worker,
            sequence=None,
            deliveries=self._context.attempt + 1,
            error=OperatorError("rows came after their windows had closed"),
            item=item,
        )

    def _late(self, batch: _Batch, rows: Array) -> None:
        """Count rows that are in no window any more, and pass them on."""
        self._context.count("late", len(rows))
        if self.on_late is None:
            return
        index = rows if batch.index is None else batch.index[rows]
        item = batch.item
        if isinstance(item, np.ndarray):
            self.on_late(item.take(index))
        elif self._layout is not None and self._layout.form == "row":
            self.on_late(dict(item))
        else:
            self.on_late(type(item)({name: column.take(index, axis=0) for name, column in item.items()}))

    # --- entries ---

    def _aggregate(
        self,
        batch: _Batch,
        lead: list[Array],
        order: Array | None,
        starts: Array,
        in_order: bool,
        place: Array | None = None,
    ) -> None:
        """Make one entry of each group of rows, and keep the values that are needed. `lead` says where the groups are, `place`
        where each row is (of kept rows only)."""
        layout = self._layout
        assert layout is not None
        columns = batch.columns
        rows = Rows(
            starts,
            len(batch.ticks),
            lambda text: pick(layout.values(columns, text), order),
            lambda: pick(batch.ticks, order),
            in_order,
        )
        heads = starts if order is None else order[starts]
        keys = [columns[name] for name in self._window.key]
        parts = [part for accumulator in layout.accumulators for part in accumulator.reduce(rows)]
        # Copies: the input may be views of a slot. Nothing is kept before all of it has been computed.
        kept = [layout.values(columns, text).copy() for text in layout.kept]
        self._entries.append([*lead, *(key[heads] for key in keys), *parts])
        if layout.kept:
            assert place is not None
            self._kept.append([place.copy(), *(key.copy() for key in keys), batch.ticks.copy(), *kept])

    @property
    def _leading(self) -> int:
        """Arrays of an entry before what was accumulated."""
        return 1 + len(self._window.key)

    def _merge(self, parts: list[Array], groups: Groups) -> list[Array]:
        """Merge neighbouring entries."""
        if len(groups.starts) == groups.size:
            return parts
        layout = self._layout
        assert layout is not None
        merged: list[Array] = []
        for accumulator, mine in self._by_accumulator(parts):
            merged += accumulator.merge(mine, groups)
        return merged

    def _by_accumulator(self, parts: list[Array]) -> Iterable[tuple[Accumulator, tuple[Array, ...]]]:
        layout = self._layout
        assert layout is not None
        at = 0
        for accumulator in layout.accumulators:
            width = _WIDTHS.get(type(accumulator), 1)
            yield accumulator, tuple(parts[at : at + width])
            at += width

    def _compact(self) -> None:
        """Merge the entries of the same place and key."""
        if self._entries.rows == 0:
            return
        arrays = self._entries.arrays()
        order, starts = group(arrays[: self._leading])
        if len(starts) < self._entries.rows:
            arrays = [pick(array, order) for array in arrays]
            groups = Groups(starts, len(arrays[0]))
            lead = [array[starts] for array in arrays[: self._leading]]
            self._entries.replace([*lead, *self._merge(arrays[self._leading :], groups)])
        self._compact_at = max(_FEWEST_COMPACTED, 2 * self._entries.rows)

    def _check_open(self, number: int) -> None:
        if number > self._window.max_open:
            raise OperatorError(
                f"{number} windows are open at the same time, and max_open is {self._window.max_open}; use larger or fewer "
                "windows, fewer keys, a shorter lateness, or a larger max_open"
            )

    # --- the output ---

    def _give(
        self,
        emit: Emit,
        start: Array,
        end: Array,
        keys: list[Array],
        parts: list[Array],
        values: Values | None,
        **more: Array,
    ) -> None:
        """Emit windows. `start` and `end` in ticks."""
        layout = self._layout
        assert layout is not None
        if len(start) == 0:
            return
        clock = layout.clock
        times = clock.times if clock is not None else lambda ticks: ticks
        found: dict[str, Array] = {"window_start": times(start), "window_end": times(end)}
        found |= dict(zip(self._window.key, keys, strict=True))
        accumulated = dict(self._by_accumulator(parts))
        try:
            for name, bound in layout.bounds.items():
                found[name] = bound.finish(accumulated, values)
        except OperatorError as error:
            self._failed.append((start, end, keys, parts, values, more))
            self._error = self._error or error
            return
        found |= more
        if self._window.flag_partial:
            until = -1 if self._lost is False else self._lost
            found["partial"] = start <= until if self._lost is not False else np.zeros(len(start), bool)
        if layout.form == "records":
            records = np.empty(
                len(start),
                [
                    (name, found[name].dtype if name in self._window.key else dtype)
                    for name, dtype in layout.fields.items()
                ],
            )
            for name, column in found.items():
                records[name] = column
            emit(records)
        elif layout.form == "columns":
            emit(found if layout.make is dict else layout.make(found))
        else:
            for number in range(len(start)):
                emit({name: _scalar(column[number]) for name, column in found.items()})


_WIDTHS: Final[dict[type[Accumulator], int]] = {agg.End: 3, agg.Moments: 3}


def _scalar(value: Any) -> Any:
    return value if value.dtype.kind in "mM" else value.item()


class PaneStep(WindowStep):
    """Tumbling and sliding windows: window number j covers the panes j * e to j * e + m - 1."""

    def _set_layout(self, form: str, make: Any, dtypes: Mapping[str, DType]) -> None:
        super()._set_layout(form, make, dtypes)
        self._measure()

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        if self._layout is not None:
            self._measure()

    def _measure(self) -> None:
        layout = self._layout
        assert layout is not None
        self._size, self._every = layout.size, layout.every
        self._pane = int(np.gcd(layout.size, layout.every))
        self._panes = layout.size // self._pane
        self._step = layout.every // self._pane

    def _expand(self, panes: Array, after: Any, until: Any) -> tuple[Array, Array, int]:
        """Return the windows after < number <= until that each pane is in: (index of pane, number), and how many. Where that
        is too much at a time, only how many."""
        if self._panes == 1:
            found = np.flatnonzero((panes > after) & (panes <= until))
            return found, panes[found], len(found)
        first, last = self._numbers(panes, after, until)
        each = np.where(last >= first, last - first + 1, 0)
        total = int(each.sum())
        if total > _MOST_EXPANDED:
            return panes[:0], panes[:0], total
        index = np.repeat(np.arange(len(panes)), each)
        before = np.cumsum(each) - each
        return index, (first - before)[index] + np.arange(total), total

    def _numbers(self, panes: Array, after: Any, until: Any) -> tuple[Array, Array]:
        first = np.maximum((panes - self._panes) // self._step + 1, after + 1)
        return first, np.minimum(panes // self._step, until)

    def _give_windows(
        self,
        emit: Emit,
        after: Any,
        until: Any,
        kept_after: Any = None,
        kept_until: Any = None,
        only: Any = None,
    ) -> None:
        """Emit the windows after < number <= until: numbers, or one per entry (and per kept row)."""
        if self._entries.rows == 0:
            return
        arrays = self._entries.arrays()
        index, numbers, total = self._expand(arrays[0], after, until)
        if kept_after is None:
            kept_after, kept_until = after, until
        kept_index, kept_numbers, kept_total = index, numbers, 0
        if self._kept.rows:
            kept_index, kept_numbers, kept_total = self._expand(
                self._kept.arrays()[0], kept_after, kept_until
            )
        if max(total, kept_total) > _MOST_EXPANDED and self._panes > 1:
            first, last = self._numbers(arrays[0], after, until)
            some = first <= last
            low, high = int(first[some].min()), int(last[some].max())
            if low < high:
                middle = (low + high) // 2
                cut = np.minimum(until, middle), np.maximum(after, middle)
                kept_cut = np.minimum(kept_until, middle), np.maximum(kept_after, middle)
                self._give_windows(emit, after, cut[0], kept_after, kept_cut[0], only)
                self._give_windows(emit, cut[1], until, kept_cut[1], kept_until, only)
                return
            index, numbers = self._all_of(arrays[0], after, until)
            if self._kept.rows:
                kept_index, kept_numbers = self._all_of(self._kept.arrays()[0], kept_after, kept_until)
        if total == 0:
            return
        lead = len(self._window.key)
        columns = [numbers, *(array.take(index) for array in arrays[1 : 1 + lead])]
        permutation, starts = group(columns)
        order = pick(index, permutation)
        groups = Groups(starts, len(order))
        parts = self._merge([array.take(order) for array in arrays[1 + lead :]], groups)
        heads = order[starts]
        number = pick(numbers, permutation)[starts]
        keys = [array.take(heads) for array in arrays[1 : 1 + lead]]
        values = self._values(kept_index, kept_numbers) if self._kept.rows else None
        self._give_numbered(emit, number, keys, parts, values, only)

    def _all_of(self, panes: Array, after: Any, until: Any) -> tuple[Array, Array]:
        """Of one window only, however many panes it has."""
        first, last = self._numbers(panes, after, until)
        index = np.flatnonzero(first <= last)
        return index, first[index]

    def _values(self, index: Array, numbers: Array) -> Values:
        """Gather the kept rows of windows."""
        layout = self._layout
        assert layout is not None
        arrays = self._kept.arrays()
        lead = len(self._window.key)
        order, starts = group([numbers, *(array.take(index) for array in arrays[1 : 1 + lead])])
        order = index if order is None else index[order]
        times = arrays[1 + lead].take(order)
        groups = Groups(starts, len(order))
        if not is_sorted(times):
            order = order[np.lexsort((times, groups.ids))]
        columns = {
            text: array.take(order) for text, array in zip(layout.kept, arrays[2 + lead :], strict=True)
        }
        return Values(starts, len(order), columns)

    def _give_numbered(
        self,
        emit: Emit,
        number: Array,
        keys: list[Array],
        parts: list[Array],
        values: Values | None,
        only: Any,
    ) -> None:
        start = number * self._every
        self._give(emit, start, start + self._size, keys, parts, values)


class TimeStep(PaneStep):
    """Windows over time. Numbers of windows: those up to `_closed` have been emitted, those up to `_dead` are forgotten."""

    _scalars = ("_top", "_closed", "_dead", "_revisions")

    def __init__(self, window: Window, context: Context) -> None:
        super().__init__(window, context)
        self._top: int | None = None  # newest time
        self._closed = LOWEST
        self._dead = LOWEST
        self._revisions: dict[
            tuple[Any, ...], int
        ] = {}  # how often windows that are not dead were emitted; for updates

    def _closing(self, top: Any, keep: int = 0) -> Any:
        """Number of the last window that is closed (and not to be updated any more) when `top` is the newest time."""
        layout = self._layout
        assert layout is not None
        return (top - (layout.lateness + keep + self._size)) // self._every

    def _add(self, item: Any, columns: dict[str, Array], rows: int, emit: Emit) -> None:
        layout = self._layout
        assert layout is not None and layout.clock is not None and self._window.spec.time is not None
        ticks = layout.clock.ticks(columns[self._window.spec.time])
        in_order = is_sorted(ticks)
        lowest, highest = (int(ticks[0]), int(ticks[-1])) if in_order else extremes(ticks)
        room = 2 * self._size + layout.lateness + layout.keep
        if lowest < LOWEST + room or highest > HIGHEST - room:
            raise OperatorError(
                f"the times {lowest} to {highest} of column {self._window.spec.time!r} leave no room for a window of "
                f"{self._size} in 64 bits"
            )
        if self._lost is True:
            self._lost = int(ticks[0]) + layout.lateness
        batch = _Batch(item, columns, ticks)
        top = highest if self._top is None else max(self._top, highest)
        earliest = (lowest - self._size) // self._every + 1  # number of the first window that a row is in
        if earliest > (self._dead if in_order else self._closing(top, layout.keep)):
            self._take(batch, in_order, emit)
        else:
            self._take_late(batch, emit)
        self._top = top
        self._close(top, emit)

    def _take_late(self, batch: _Batch, emit: Emit) -> None:
        """Take rows of which some may have missed windows, as if they came one by one."""
        layout = self._layout
        assert layout is not None
        ticks = batch.ticks
        newest = np.empty_like(ticks)  # before each row
        newest[0] = ticks[0] if self._top is None else self._top
        np.maximum.accumulate(ticks[:-1], out=newest[1:])
        np.maximum(newest, newest[0], out=newest)
        dead = np.maximum(self._closing(newest, layout.keep), self._dead)
        late = ticks // self._every <= dead
        missed = ((ticks - self._size) // self._every + 1 <= dead) & ~late
        if late.any():
            self._late(batch, np.flatnonzero(late))
        some = int(np.count_nonzero(missed))
        if some:
            self._context.count("late_partly", some)
        done = 0
        # A row must not get into windows that the rows before it have closed: close those first.
        for row in np.flatnonzero(missed).tolist():
            if dead[row] > self._dead:
                self._take_rows(batch, np.flatnonzero(~late[done:row]) + done, emit)
                self._close(int(newest[row]), emit)
                done = row
        self._take_rows(batch, np.flatnonzero(~late[done:]) + done, emit)

    def _take_rows(self, batch: _Batch, rows: Array, emit: Emit) -> None:
        if len(rows):
            part = batch.take(rows)
            self._take(part, is_sorted(part.ticks), emit)

    def _take(self, batch: _Batch, in_order: bool, emit: Emit) -> None:
        """Aggregate rows into panes; emit again what was emitted before (of updates only)."""
        ticks = batch.ticks
        keys = [batch.columns[name] for name in self._window.key]
        if in_order and not keys and self._window.spec.late != "update" and self._cut(batch):
            return
        panes = ticks // self._pane
        order, starts = group([panes, *keys], by_value=False)
        heads = starts if order is None else order[starts]
        self._aggregate(batch, [panes[heads]], order, starts, in_order, panes)
        if self._window.spec.late == "update":
            self._update(panes[heads], [key[heads] for key in keys], emit)

    def _cut(self, batch: _Batch) -> bool:
        """Aggregate sorted rows. Where there are few panes, they are found by bisection instead of division."""
        ticks = batch.ticks
        first, last = int(ticks[0]) // self._pane, int(ticks[-1]) // self._pane
        if (last - first) * 16 > len(ticks):
            return False
        if first == last:
            same: Array = np.broadcast_to(np.int64(first), len(ticks))
            self._aggregate(batch, [same[:1]], None, np.zeros(1, np.int64), True, same)
            return True
        panes = np.arange(first, last + 1, dtype=np.int64)
        starts = np.searchsorted(ticks, panes * self._pane)
        counts = counts_of(starts, len(ticks))
        layout = self._layout
        assert layout is not None
        place = np.repeat(panes, counts) if layout.kept else None
        some = counts > 0
        self._aggregate(batch, [panes[some]], None, starts[some], True, place)
        return True

    def _update(self, panes: Array, keys: list[Array], emit: Emit) -> None:
        """Emit the windows again that were closed before these rows came."""
        index, numbers, _ = self._expand(panes, self._dead, self._closed)
        if len(index) == 0:
            return
        touched = set(zip(numbers.tolist(), *(key[index].tolist() for key in keys), strict=True))
        self._give_windows(emit, int(numbers.min()) - 1, int(numbers.max()), only=touched)

    def _close(self, top: int, emit: Emit) -> None:
        layout = self._layout
        assert layout is not None
        closed = max(int(self._closing(top)), self._closed)
        if closed > self._closed:
            self._give_windows(emit, self._closed, closed)
            self._closed = closed
            self._forget(max(int(self._closing(top, layout.keep)), self._dead))

    def _forget(self, dead: int) -> None:
        if dead <= self._dead:
            return
        self._dead = dead
        for log in (self._entries, self._kept):
            if log.rows:
                log.keep(log.arrays()[0] // self._step > dead)
        if self._revisions:
            self._revisions = {place: number for place, number in self._revisions.items() if place[0] > dead}

    def _give_numbered(
        self,
        emit: Emit,
        number: Array,
        keys: list[Array],
        parts: list[Array],
        values: Values | None,
        only: Any,
    ) -> None:
        start = number * self._every
        if self._window.spec.late != "update":
            self._give(emit, start, start + self._size, keys, parts, values)
            return
        places = list(zip(number.tolist(), *(key.tolist() for key in keys), strict=True))
        if only is not None:
            wanted = [row for row, place in enumerate(places) if place in only]
            if values is not None:
                values = _some_values(values, wanted)
            places = [places[row] for row in wanted]
            start, keys, parts = (
                start[wanted],
                [key[wanted] for key in keys],
                [part[wanted] for part in parts],
            )
        revisions = [self._revisions.get(place, 0) for place in places]
        if only is not None:
            self._context.count("updated", sum(revision > 0 for revision in revisions))
        self._revisions.update(
            (place, revision + 1) for place, revision in zip(places, revisions, strict=True)
        )
        self._give(
            emit, start, start + self._size, keys, parts, values, revision=np.array(revisions, np.int64)
        )

    def _finish(self, emit: Emit) -> None:
        self._give_windows(emit, self._closed, HIGHEST)


def _some_values(values: Values, wanted: list[int]) -> Values:
    """The kept rows of some of the groups."""
    counts = values.counts[wanted]
    starts = np.cumsum(counts) - counts
    index = np.repeat(values.starts[wanted] - starts, counts) + np.arange(int(counts.sum()))
    return Values(starts, len(index), {text: column[index] for text, column in values.columns.items()})


class CountStep(PaneStep):
    """Windows of rows. The time of a row is its number among those of its key."""

    _scalars = ("_seen",)

    def __init__(self, window: Window, context: Context) -> None:
        super().__init__(window, context)
        self._seen: dict[tuple[Any, ...], int] = {}  # rows of each key

    def state_lost(self) -> None:
        self._lost = 0  # the first window of each key

    def _add(self, item: Any, columns: dict[str, Array], rows: int, emit: Emit) -> None:
        keys = [columns[name] for name in self._window.key]
        order, starts = group(keys, by_value=False) if keys else (None, np.zeros(1, np.int64))
        groups = Groups(starts, rows)
        heads = starts if order is None else order[starts]
        places = _places(keys, heads)
        before = np.array([self._seen.get(place, 0) for place in places], np.int64)
        after = before + groups.counts
        self._check_open(len(self._seen) + sum(place not in self._seen for place in places))
        self._seen.update(zip(places, after.tolist(), strict=True))
        numbers = np.arange(rows) + np.repeat(before - starts, groups.counts)
        panes = numbers // self._pane
        starts = starts_of(groups.ids, panes)
        lead = [panes[starts]]
        ticks = numbers
        if order is not None:  # back into the order of the rows
            ticks, place = np.empty_like(numbers), np.empty_like(panes)
            ticks[order], place[order] = numbers, panes
        else:
            place = panes
        self._aggregate(_Batch(item, columns, ticks), lead, order, starts, True, place)
        closed, closing = self._closed_by(before), self._closed_by(after)
        if (closing > closed).any():
            self._close([key[heads] for key in keys], closed, closing, emit)

    def _closed_by(self, seen: Array) -> Array:
        """Number of the last window that is full after so many rows."""
        return cast(Array, np.maximum((seen - self._size) // self._every, -1))

    def _close(self, keys: list[Array], closed: Array, closing: Array, emit: Emit) -> None:
        """Emit the windows closed < number <= closing of some keys."""
        lead = len(keys)
        limits = [
            _limits(keys, (closed, closing), log.arrays()[1 : 1 + lead], log.rows)
            for log in (self._entries, self._kept)
        ]
        (after, until), (kept_after, kept_until) = limits
        self._give_windows(emit, after, until, kept_after, kept_until)
        for log, (_, gone) in zip((self._entries, self._kept), limits, strict=True):
            if log.rows:
                log.keep(log.arrays()[0] // self._step > gone)

    def _finish(self, emit: Emit) -> None:
        if self._entries.rows == 0 or self._window.spec.drop_last:
            return
        keys = self._entries.arrays()[1 : self._leading]
        order, starts = group(keys, by_value=False) if keys else (None, np.zeros(1, np.int64))
        heads = starts if order is None else order[starts]
        seen = np.array([self._seen[place] for place in _places(keys, heads)], np.int64)
        self._close([key[heads] for key in keys], self._closed_by(seen), np.full(len(seen), HIGHEST), emit)


def _places(keys: list[Array], rows: Array) -> list[tuple[Any, ...]]:
    """The keys of rows as tuples."""
    return list(zip(*(key[rows].tolist() for key in keys), strict=True)) if keys else [()]


def _limits(
    keys: list[Array], limits: tuple[Array, Array], all_keys: list[Array], rows: int
) -> tuple[Any, Any]:
    """For each of `all_keys` the limits of that key, where it is among `keys`: (LOWEST, LOWEST) otherwise."""
    if not keys:
        return int(limits[0][0]), int(limits[1][0])
    if rows == 0:
        return LOWEST, LOWEST
    order, starts = group([np.concatenate(both) for both in zip(keys, all_keys, strict=True)], by_value=False)
    some = len(keys[0])
    groups = Groups(starts, some + rows)
    ids = groups.ids
    if order is not None:
        ids = np.empty_like(groups.ids)
        ids[order] = groups.ids
    found = []
    for limit in limits:
        table = np.full(len(starts), LOWEST)
        table[ids[:some]] = limit
        found.append(table[ids[some:]])
    return found[0], found[1]


class SessionStep(WindowStep):
    """Sessions. An entry has the times of its first and last row; entries that overlap are one session."""

    _scalars = ("_top", "_earliest")

    def __init__(self, window: Window, context: Context) -> None:
        super().__init__(window, context)
        self._top: int | None = None  # newest time
        self._earliest = HIGHEST  # no open session ends before

    @property
    def _leading(self) -> int:
        return 2 + len(self._window.key)

    def _add(self, item: Any, columns: dict[str, Array], rows: int, emit: Emit) -> None:
        layout = self._layout
        assert layout is not None and layout.clock is not None and self._window.spec.time is not None
        ticks = layout.clock.ticks(columns[self._window.spec.time])
        lowest, highest = extremes(ticks)
        if max(-lowest, highest) >= 1 << 62:
            raise OperatorError(
                f"the times {lowest} to {highest} of column {self._window.spec.time!r} are more than 62 bits hold"
            )
        if self._lost is True:
            self._lost = int(ticks[0]) + layout.lateness + layout.size
        newest = np.empty_like(ticks)  # before each row
        newest[0] = ticks[0] if self._top is None else self._top
        np.maximum.accumulate(ticks[:-1], out=newest[1:])
        np.maximum(newest, newest[0], out=newest)
        batch = _Batch(item, columns, ticks)
        late: list[int] = []
        # Rows from `done` on are not taken yet; those from there to `looked` begin no session that ends before `ends`.
        done, looked, ends = 0, 0, HIGHEST
        # A row older than the watermark may meet sessions that the rows before it have closed: close those first.
        for row in np.flatnonzero(ticks < newest - layout.lateness).tolist():
            mark, time = int(newest[row]) - layout.lateness, int(ticks[row])
            if row > looked:
                ends = min(ends, int(np.minimum.reduce(ticks[looked:row])) + layout.size)
                looked = row
            is_old = time + layout.size <= mark
            if not is_old and mark < min(ends, self._earliest):
                continue
            if row > done:
                self._take(batch.take(slice(done, row)))
            self._close(int(newest[row]), emit)
            done, ends = row, HIGHEST
            if is_old and not self._joins(batch.take(slice(row, row + 1))):
                late.append(row)
                done = looked = row + 1
        if done < rows:
            self._take(batch.take(slice(done, rows)) if done else batch)
        self._top = max(highest, int(newest[0]))
        self._close(self._top, emit)
        if late:
            try:
                self._late(batch, np.array(late))
            except Exception as error:
                self._error = self._error or error

    def _joins(self, one: _Batch) -> bool:
        """Whether a row overlaps an open session."""
        layout = self._layout
        assert layout is not None
        if self._entries.rows == 0:
            return False
        start, last, *rest = self._entries.arrays()
        found = (start < one.ticks[0] + layout.size) & (one.ticks[0] < last + layout.size)
        for name, keys in zip(self._window.key, rest, strict=False):
            found &= keys == one.columns[name][0]
        return bool(found.any())

    def _take(self, batch: _Batch) -> None:
        layout = self._layout
        assert layout is not None
        ticks = batch.ticks
        keys = [batch.columns[name] for name in self._window.key]
        order, ids = _by_key_and(ticks, keys)
        ordered = pick(ticks, order)
        is_new = np.ones(len(ticks), bool)
        is_new[1:] = ordered[1:] - ordered[:-1] >= layout.size
        if keys:
            is_new[1:] |= ids[1:] != ids[:-1]
        starts = np.flatnonzero(is_new)
        lasts = ordered[np.append(starts[1:], len(ticks)) - 1]
        self._aggregate(batch, [ordered[starts], lasts], order, starts, True, ticks)
        self._earliest = min(self._earliest, int(lasts.min()) + layout.size)

    def _compact(self) -> None:
        layout = self._layout
        if self._entries.rows < 2 or layout is None:
            return
        arrays = self._entries.arrays()
        order, ids = _by_key_and(arrays[0], arrays[2 : self._leading])
        start, last = pick(arrays[0], order), pick(arrays[1], order)
        # The latest row so far of the key, by ranks, which are larger for each following key.
        by_last = np.lexsort((last, ids))
        rank = np.empty(len(ids), np.int64)
        rank[by_last] = np.arange(len(ids))
        latest = last[by_last][np.maximum.accumulate(rank)]
        is_new = np.ones(len(ids), bool)
        is_new[1:] = (ids[1:] != ids[:-1]) | (start[1:] - latest[:-1] >= layout.size)
        starts = np.flatnonzero(is_new)
        if len(starts) < len(ids):
            groups = Groups(starts, len(ids))
            arrival = np.arange(len(ids)) if order is None else order
            order = arrival[np.lexsort((arrival, groups.ids))]
            keys = [array[arrival[starts]] for array in arrays[2 : self._leading]]
            parts = self._merge([array[order] for array in arrays[self._leading :]], groups)
            self._entries.replace([start[starts], np.maximum.reduceat(last, starts), *keys, *parts])
        self._compact_at = max(_FEWEST_COMPACTED, 2 * self._entries.rows)

    def _close(self, top: int, emit: Emit) -> None:
        layout = self._layout
        assert layout is not None
        if top - layout.lateness >= self._earliest:
            self._close_until(top - layout.lateness, emit)

    def _close_until(self, until: int, emit: Emit) -> None:
        """Emit the sessions that end up to then."""
        layout = self._layout
        assert layout is not None
        self._compact()
        if self._entries.rows == 0:
            return
        arrays = self._entries.arrays()
        end = arrays[1] + layout.size
        closes = end <= until
        index = np.flatnonzero(closes)
        if len(index):
            keys = [array[index] for array in arrays[2 : self._leading]]
            order, _ = group([end[index], *keys])
            index = pick(index, order)
            values = self._values(index, len(end)) if self._kept.rows else None
            chosen = [array[index] for array in arrays]
            self._entries.keep(~closes)
            self._give(
                *(emit, chosen[0], end[index], chosen[2 : self._leading], chosen[self._leading :], values)
            )
        self._earliest = int(end[~closes].min()) if len(index) < len(end) else HIGHEST

    def _values(self, closing: Array, sessions: int) -> Values:
        """Take the kept rows of closing sessions out."""
        layout = self._layout
        assert layout is not None
        kept, entries = self._kept.arrays(), self._entries.arrays()
        lead = len(self._window.key)
        # Sessions of a key do not overlap: each row belongs to the last one that starts before it or with it.
        times = np.concatenate([entries[0], kept[0]])
        keys = [np.concatenate(both) for both in zip(entries[2 : 2 + lead], kept[1 : 1 + lead], strict=True)]
        order, _ = _by_key_and(times, keys)
        order = np.arange(len(times)) if order is None else order
        is_session = order < sessions
        session = order[is_session][np.cumsum(is_session) - 1][~is_session]
        rows = order[~is_session] - sessions
        place = np.full(sessions, len(closing))
        place[closing] = np.arange(len(closing))
        by_place = np.argsort(place[session], kind="stable")
        counts = np.bincount(place[session], minlength=len(closing) + 1)[:-1]
        out = rows[by_place][: int(counts.sum())]
        columns = {text: array[out] for text, array in zip(layout.kept, kept[2 + lead :], strict=True)}
        stays = np.ones(self._kept.rows, bool)
        stays[out] = False
        self._kept.keep(stays)
        return Values(np.cumsum(counts) - counts, len(out), columns)

    def _finish(self, emit: Emit) -> None:
        self._close_until(HIGHEST, emit)


def _by_key_and(ticks: Array, keys: list[Array]) -> tuple[Array | None, Array]:
    """Sort by key, then time, then place: (order or None, number of the key of each in that order)."""
    by_time = None if is_sorted(ticks) else np.argsort(ticks, kind="stable")
    if not keys:
        return by_time, np.zeros(len(ticks), np.int64)
    by_key, starts = group([pick(key, by_time) for key in keys], by_value=False)
    ids = Groups(starts, len(ticks)).ids
    if by_key is None or by_time is None:
        return by_time if by_key is None else by_key, ids
    return by_time[by_key], ids
