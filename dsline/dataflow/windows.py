"""Windows over time, over rows and over sessions, and the router that splits a stream by key.

    spec = sliding("10s", every="1s", time="ts", lateness="200ms")
    Window(spec, key="sensor", mean=agg.mean("temperature"), n=agg.count())

How it works: rows are grouped by (pane, key), where a pane is the longest piece of time that lies wholly inside or outside
of every window, and each group becomes one *entry* of accumulated numbers in a log. Entries of the same pane and key are
merged when the log has doubled, and when windows close. All of that is done by NumPy for whole batches; no Python code runs
per row.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, ClassVar, Final, TypeAlias, cast

import numpy as np

from dsline.dataflow import aggregates as agg
from dsline.dataflow.aggregates import ROW_COUNT, Accumulator, Aggregate, Bound, Groups, Rows, Values
from dsline.dataflow.callables import function_name, reference, resolve
from dsline.dataflow.operator import Context, Emit, Operator, Router, Schema, Step
from dsline.errors import OperatorError, PipelineBuildError
from dsline.expressions import Expression
from dsline.specs import ArraySpec

__all__ = ["KeyBy", "Window", "WindowSpec", "hash_keys", "session", "sliding", "tumbling"]

Array: TypeAlias = np.ndarray[Any, Any]
DType: TypeAlias = np.dtype[Any]
Length: TypeAlias = int | str  # rows or units of the time column, or a duration

_LOWEST: Final = int(np.iinfo(np.int64).min)
_HIGHEST: Final = int(np.iinfo(np.int64).max)
_INT64: Final = np.dtype(np.int64)
_NS: Final = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "ms": 1_000_000,
    "s": 10**9,
    "m": 60 * 10**9,
    "min": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86_400 * 10**9,
    "w": 7 * 86_400 * 10**9,
}
# As NumPy spells them: "m" is a minute there, too, and "M" a month, which has no length.
_DATETIME_NS: Final = {**_NS, "D": _NS["d"], "W": _NS["w"]}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-zµ]+)")
_MOST_EXPANDED: Final = 1 << 21  # panes times windows that are merged at a time
_FEWEST_COMPACTED: Final = 1024


# --- specs --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """Which rows belong together. Made by `tumbling`, `sliding` and `session`.

    Attributes
    ----------
    kind : str
        "tumbling", "sliding" or "session".
    size : int or str
        Rows, units of the time column, or a duration like "10s". Of a session: the gap.
    every : int or str
        Distance of the starts of windows; the size of tumbling ones.
    time : str or None
        Column of times; None: rows are counted.
    lateness : int or str
        How much older than the newest row a row may be without being late.
    late : str or object
        "drop", "update", or where late rows go.
    keep : int, str or None
        How long closed windows can still be updated.
    unit : str or None
        Of integers and floats of the time column.
    drop_last : bool
        Whether windows of rows that are not full at the end are not given out.
    """

    kind: str
    size: Length
    every: Length
    time: str | None = None
    lateness: Length = 0
    late: Any = "drop"
    keep: Length | None = None
    unit: str | None = None
    drop_last: bool = False

    def describe(self) -> str:
        """One line for explain()."""
        parts = [f"{self.size}" if self.time is not None else f"{self.size} rows"]
        if self.kind == "sliding":
            parts.append(f"every {self.every}")
        if self.time is not None:
            parts.append(f"of {self.time}")
        if self.lateness != 0:
            parts.append(f"lateness {self.lateness}")
        return f"{self.kind}({', '.join(parts)})"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        data: dict[str, Any] = {"window": self.kind}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                data[field.name] = value
        if not isinstance(self.late, str):
            to_json = getattr(self.late, "to_json", None)
            data["late"] = to_json() if to_json is not None else {"function": reference(self.late)}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WindowSpec:
        """Return the spec that `to_json` wrote. Where late rows go, unless to a function, is given by the plan."""
        given = {name: value for name, value in data.items() if name != "window"}
        late = given.get("late")
        if isinstance(late, Mapping) and "function" in late:
            given["late"] = resolve(late["function"])
        return _spec(data.get("window"), **given)


def tumbling(
    size: Any,
    *,
    time: str | None = None,
    lateness: Any = 0,
    late: Any = "drop",
    keep: Any = None,
    unit: str | None = None,
    drop_last: bool = False,
) -> WindowSpec:
    """Windows side by side: each row is in exactly one.

    Parameters
    ----------
    size : int, str, float, numpy.timedelta64 or datetime.timedelta
        With `time`: a duration such as "10s", "200ms", "1m", "2h" (ns, us, ms, s, m, h, d, w), a float in seconds, or an int in
        the units of the column. Without: number of rows, in the order of arrival, counted for each key.
    time : str, optional
        Column with the times of the rows: datetime64, integers or floats. Windows are [start, end), and start at the multiples of
        `size` since the epoch, or since 0.
    lateness : like size
        The watermark is the newest time so far minus this. A window closes when the watermark reaches its end.
    late : "drop", "update", or a destination
        What is done with rows whose window has closed: "drop" counts them; "update" gives the corrected window out again, with the
        number of the correction in the column `revision`; a callable, or a dead-letter destination, gets them as an item of the
        input's kind. All are counted.
    keep : like size
        For "update": how long a closed window can be corrected; its size by default. Rows that come later are dropped.
    unit : str
        Of an integer ("ns" by default) or float ("s") column: ns, us, ms, s, m, h, d. Floats are taken in whole nanoseconds.
    drop_last : bool
        Of windows of rows: do not give out those that are not full when the input ends.

    Raises
    ------
    PipelineBuildError
        A size of zero or less, or none at all; options that do not fit together.
    """
    return _spec(
        "tumbling",
        size=size,
        every=size,
        time=time,
        lateness=lateness,
        late=late,
        keep=keep,
        unit=unit,
        drop_last=drop_last,
    )


def sliding(
    size: Any,
    every: Any,
    *,
    time: str | None = None,
    lateness: Any = 0,
    late: Any = "drop",
    keep: Any = None,
    unit: str | None = None,
    drop_last: bool = False,
) -> WindowSpec:
    """Windows that overlap: of `size`, one starting at every multiple of `every`.

    Parameters are those of `tumbling`; `every` is not larger than `size`. A row that is too late for some of its windows is
    still counted in the others.
    """
    return _spec(
        "sliding",
        size=size,
        every=every,
        time=time,
        lateness=lateness,
        late=late,
        keep=keep,
        unit=unit,
        drop_last=drop_last,
    )


def session(gap: Any, *, time: str, lateness: Any = 0, late: Any = "drop", unit: str | None = None) -> WindowSpec:
    """Windows without a silence of `gap` in them: [first row, last row + gap).

    A row joins the sessions that [its time, its time + gap) overlaps, and may make one of two. Parameters are those of
    `tumbling`; late rows cannot update, since they could join two sessions that are out.
    """
    return _spec("session", size=gap, every=gap, time=time, lateness=lateness, late=late, unit=unit)


def _spec(kind: Any, **given: Any) -> WindowSpec:
    if kind not in ("tumbling", "sliding", "session"):
        raise PipelineBuildError(f"there is no window {kind!r}; there are: tumbling, sliding, session")
    time, unit, late = given.get("time"), given.get("unit"), given.get("late", "drop")
    what = "gap" if kind == "session" else "size"
    if time is not None and not isinstance(time, str):
        raise PipelineBuildError(f"{kind}: time is {time!r}, must be the name of a column")
    if kind == "session" and time is None:
        raise PipelineBuildError("session: time must be the name of a column: there is no gap between rows")
    if unit is not None and (unit not in _NS or time is None):
        raise PipelineBuildError(
            f"{kind}: unit is {unit!r}, must be one of {', '.join(_NS)}, for a time column"
        )
    given["size"] = _length(kind, what, given["size"], time)
    given["every"] = _length(kind, "every", given.get("every", given["size"]), time)
    given["lateness"] = _length(kind, "lateness", given.get("lateness", 0), time, zero=True)
    if given.get("keep") is not None:
        given["keep"] = _length(kind, "keep", given["keep"], time, zero=True)
        if late != "update":
            raise PipelineBuildError(f"{kind}: keep is for late='update', and late is {late!r}")
    if time is None and (given["lateness"] != 0 or late != "drop"):
        raise PipelineBuildError(f"{kind}: rows that are counted are never late; lateness and late need time=")
    if time is not None and given.get("drop_last"):
        raise PipelineBuildError(f"{kind}: drop_last is for windows of rows, and this one is over {time!r}")
    if late == "update" and kind == "session":
        raise PipelineBuildError(
            "session: late='update' is not possible: a late row may join two sessions that are out"
        )
    if isinstance(late, str) and late not in ("drop", "update"):
        raise PipelineBuildError(f"{kind}: late is {late!r}, must be 'drop', 'update' or a destination")
    return WindowSpec(kind, **given)


def _length(kind: str, what: str, value: Any, time: str | None, zero: bool = False) -> Length:
    """Check a length and bring it into a form that JSON can hold: an int, or a text with a unit."""
    result: Length
    if isinstance(value, int | np.integer) and not isinstance(value, bool | np.timedelta64):
        result, number = int(value), int(value)
    else:
        number = _nanoseconds(f"{kind}: {what}", value)
        result = value.strip() if isinstance(value, str) else f"{number}ns"
        if time is None:
            raise PipelineBuildError(f"{kind}: {what} is {value!r}, and time= does not say which column has the times")
    if number < 0 or (number == 0 and not zero):
        raise PipelineBuildError(f"{kind}: {what} is {value!r}, must be larger than 0")
    if number > _HIGHEST // 4:
        raise PipelineBuildError(f"{kind}: {what} is {value!r}, which does not fit into the range of times")
    return result


def _nanoseconds(what: str, value: Any) -> int:
    wanted = "must be an int, a duration like '10s' or '200ms', seconds as a float, or a timedelta64"
    if isinstance(value, datetime.timedelta):
        value = np.timedelta64(value)
    if isinstance(value, np.timedelta64):
        unit, number = np.datetime_data(value.dtype)
        if np.isnat(value) or unit not in _DATETIME_NS:
            raise PipelineBuildError(f"{what} is {value!r}, {wanted} of ns to weeks")
        return int(value.astype(np.int64)) * number * _DATETIME_NS[unit]
    if isinstance(value, float | np.floating):
        if not np.isfinite(value):
            raise PipelineBuildError(f"{what} is {value!r}, {wanted}")
        exact = Fraction(repr(float(value))) * 10**9
    elif isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        scale = _NS.get(match[2]) if match else None
        if match is None or scale is None:
            raise PipelineBuildError(f"{what} is {value!r}, {wanted}; units: {', '.join(_NS)}")
        exact = Fraction(match[1]) * scale
    else:
        raise PipelineBuildError(f"{what} is {value!r}, {wanted}")
    if exact.denominator != 1:
        raise PipelineBuildError(f"{what} is {value!r}, which is no whole number of nanoseconds")
    return int(exact)


class _Clock:
    """Between a column of times and int64 ticks: its own units; nanoseconds for floats."""

    def __init__(self, name: str, dtype: DType, unit: str | None) -> None:
        self.name = name
        self.dtype = dtype
        self.kind = dtype.kind
        self._one = 1  # ticks of an int
        if dtype.kind == "M":
            letters, count = np.datetime_data(dtype)
            if unit is not None:
                raise PipelineBuildError(f"time column {name!r} is {dtype}, which has its unit; leave unit={unit!r} out")
            if letters not in _DATETIME_NS:
                raise PipelineBuildError(f"time column {name!r} is {dtype}, must have a unit from weeks to ns")
            self.tick_ns = _DATETIME_NS[letters] * count
            self.out = dtype.newbyteorder("=")
        elif dtype.kind in "iu":
            self.tick_ns = _NS[unit or "ns"]
            self.out = _INT64
        elif dtype.kind == "f":
            self.tick_ns = 1
            self._one = _NS[unit or "s"]
            self.out = np.dtype(np.float64)
        else:
            raise PipelineBuildError(f"time column {name!r} is {dtype}, must be datetime64, integers or floats")

    def length(self, what: str, value: Length) -> int:
        """Ticks of a length."""
        if isinstance(value, int):
            ticks = value * self._one
        else:
            ticks, rest = divmod(_nanoseconds(what, value), self.tick_ns)
            if rest:
                raise PipelineBuildError(
                    f"{what} is {value!r}, which is no whole number of the units of column {self.name!r} "
                    f"({self.dtype}, {self.tick_ns} ns)"
                )
        if ticks > _HIGHEST // 4:
            raise PipelineBuildError(f"{what} is {value!r}, which does not fit into the range of times")
        return ticks

    def ticks(self, column: Array) -> Array:
        """Raises OperatorError for what is no time."""
        if self.kind == "f":
            with np.errstate(all="ignore"):
                scaled = np.rint(column.astype(np.float64, copy=False) * self._one)
                good = np.abs(scaled) < 2.0**62
            if not good.all():
                self._fail(column, ~good)
            return scaled.astype(np.int64)
        if self.kind == "M":
            ticks = column.astype(self.out, copy=False).view(np.int64)
            if ticks.min() == _LOWEST:  # NaT
                self._fail(column, ticks == _LOWEST)
            return ticks
        if self.dtype.itemsize == 8 and self.kind == "u" and column.max() > _HIGHEST:
            self._fail(column, column > _HIGHEST)
        return column.astype(np.int64, copy=False)

    def _fail(self, column: Array, bad: Array) -> None:
        row = int(np.flatnonzero(bad)[0])
        raise OperatorError(
            f"row {row} of an item has the time {column[row]} in column {self.name!r}, which is in no window; filter such "
            "rows before the window"
        )

    def times(self, ticks: Array) -> Array:
        """As the column has them."""
        if self.kind == "f":
            return ticks / self._one
        return ticks.view(self.out) if self.kind == "M" else ticks


# --- grouping -----------------------------------------------------------------------------------------------------------


def _is_sorted(values: Array) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def _starts(*columns: Array) -> Array:
    """Where runs of equal elements start."""
    change = columns[0][1:] != columns[0][:-1]
    for column in columns[1:]:
        change |= column[1:] != column[:-1]
    found = np.flatnonzero(change)
    starts = np.empty(len(found) + 1, np.int64)
    starts[0] = 0
    np.add(found, 1, out=starts[1:])
    return starts


def _codes(values: Array) -> tuple[Array, int]:
    """Number values by their order: codes from 0, and how many there may be. Equal codes mean equal values."""
    if values.dtype.kind in "iub":
        if values.dtype.kind == "b":
            return values.view(np.uint8).astype(np.int64), 2
        lowest, highest = int(values.min()), int(values.max())
        if highest - lowest < max(4 * len(values), 1 << 16):
            if values.dtype == np.uint64 and highest > _HIGHEST:
                return (values - np.uint64(lowest)).astype(np.int64), highest - lowest + 1
            return values.astype(np.int64, copy=False) - lowest, highest - lowest + 1
    elif values.dtype.kind in "SU" and len(values) > 64:
        # Sorting hashes is much faster than sorting texts.
        hashes = hash_keys(values)
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        distinct = values[first]
        if (distinct[inverse] == values).all():
            rank = np.empty(len(distinct), np.int64)
            rank[np.argsort(distinct, kind="stable")] = np.arange(len(distinct))
            return rank[inverse], len(distinct)
    distinct, inverse = np.unique(values, return_inverse=True)
    return inverse.reshape(-1).astype(np.int64, copy=False), len(distinct)


def _order(codes: Array, size: int) -> Array:
    """A stable argsort; NumPy sorts 16 bits by radix."""
    if size <= 1 << 16:
        return np.argsort(codes.astype(np.uint16), kind="stable")
    if size <= 1 << 32 and len(codes) > 2048:
        order = np.argsort(codes.astype(np.uint16), kind="stable")
        return order[np.argsort((codes >> 16).astype(np.uint16)[order], kind="stable")]
    return np.argsort(codes, kind="stable")


def _group(columns: list[Array]) -> tuple[Array | None, Array]:
    """Bring equal rows together: (a stable order by the columns, or None where they are in order; starts of the groups)."""
    if len(columns) == 1 and columns[0].dtype.kind in "iu" and _is_sorted(columns[0]):
        return None, _starts(columns[0])
    codes, size = _codes(columns[0])
    for column in columns[1:]:
        more, count = _codes(column)
        if size * count > _HIGHEST:
            _, codes = np.unique(codes, return_inverse=True)
            size = len(codes)
        codes = codes * count + more
        size *= count
    if _is_sorted(codes):
        return None, _starts(codes)
    order = _order(codes, size)
    return order, _starts(codes[order])


def _pick(column: Array, order: Array | None) -> Array:
    return column if order is None else column.take(order)


# --- hashing ------------------------------------------------------------------------------------------------------------


def _mix(words: Array) -> Array:
    """The finalizer of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014). In place."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def hash_keys(values: Array) -> Array:
    """Hash a column: uint64, the same in every process, on every machine and for every width of the dtype.

    Integers and truth values hash by their value; floats by theirs as float64, where -0.0 is 0.0 and all NaN are one; texts by
    their code points (bytes like the ASCII text that they spell), times by their count of units.

    Raises
    ------
    TypeError
        A dtype that is none of those.
    """
    kind = values.dtype.kind
    if kind in "iub":
        words = values.astype(np.int64 if kind == "i" else np.uint64).view(np.uint64)
    elif kind == "f":
        doubles = values.astype(np.float64) + 0.0
        doubles[np.isnan(doubles)] = np.nan
        words = doubles.view(np.uint64)
    elif kind in "mM":
        words = values.astype(values.dtype.newbyteorder("="), copy=True).view(np.uint64)
    elif kind in "SU":
        return _hash_texts(values)
    else:
        raise TypeError(f"a key is {values.dtype}, must be integers, truth values, floats, times or texts")
    return _mix(words + np.uint64(0x9E3779B97F4A7C15))


def _hash_texts(values: Array) -> Array:
    item, width = (np.uint8, values.dtype.itemsize) if values.dtype.kind == "S" else (np.uint32, values.dtype.itemsize // 4)
    hashes = np.full(len(values), 0x9E3779B97F4A7C15, np.uint64)
    if width == 0 or len(values) == 0:
        return hashes
    native = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=False))
    table = native.view(item).reshape(len(values), width)
    for position in range(width):
        letters = table[:, position].astype(np.uint64)
        # Nothing follows the end of a text, whatever room the dtype has.
        mixed = (hashes ^ letters) * np.uint64(0x100000001B3)
        np.copyto(hashes, mixed, where=letters != 0)
    return _mix(hashes)


# --- the layout: a window on columns that are known ---------------------------------------------------------------------


class _Layout:
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
            self.clock = _Clock(spec.time, self._need(spec.time, known, "time column"), spec.unit)
        for name in window.key:
            kind = self._need(name, known, "key column").kind
            if kind not in "biufmMSU":
                raise PipelineBuildError(f"key column {name!r} is {known[name]}, must be numbers, times or texts")
        self.size, self.every, self.lateness, self.keep = self._lengths(spec)
        self.bounds = {name: self._bind(aggregate, known) for name, aggregate in window.aggregates.items()}
        self.accumulators: list[Accumulator] = list(
            dict.fromkeys([ROW_COUNT, *(need for bound in self.bounds.values() for need in bound.needs)])
        )
        self.kept = list(
            dict.fromkeys(text for bound in self.bounds.values() if bound.keeps for text in bound.aggregate.columns)
        )
        edge = self.clock.out if self.clock is not None else _INT64
        self.fields: dict[str, DType] = {"window_start": edge, "window_end": edge}
        self.fields |= {name: self.dtypes[name].newbyteorder("=") for name in window.key}
        self.fields |= {name: bound.result for name, bound in self.bounds.items()}
        if spec.late == "update":
            self.fields["revision"] = _INT64
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
            numbers = {name: dtype for name, dtype in known.items() if dtype.kind in "biuf" and name.isidentifier()}
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


def _dtypes_of_schema(schema: Schema) -> tuple[str, dict[str, DType]]:
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


# --- the operator -------------------------------------------------------------------------------------------------------

_OPTIONS: Final = ("key", "max_open", "flag_partial")


class Window(Operator):
    """Aggregates over windows of rows.

    Parameters
    ----------
    spec : WindowSpec
        `tumbling`, `sliding` or `session`.
    key : str or sequence of str
        Columns: there is one set of windows for each of their values.
    max_open : int
        Most panes of open windows times keys (and keys, where rows are counted) that are held; OperatorError beyond.
    flag_partial : bool
        Adds the column `partial`: true for windows that may lack rows, since the state was lost (`WindowStep.state_lost`).
    **aggregates : Aggregate
        Result columns by name.

    Notes
    -----
    An item is records, columns or a dict of numbers, and what comes out is the same kind of thing: all windows that an item has
    closed are one item (dicts come one by one), sorted by end and key. Copies what it keeps; nothing refers to the input afterwards.

    Times with NaN or NaT, and missing keys, are errors. The result does not depend on how the rows are split into items, but
    for the last bits of sums of floats.
    """

    kind: ClassVar[str] = "window"
    stateful: ClassVar[bool] = True

    def __init__(
        self,
        spec: WindowSpec,
        /,
        *,
        key: Any = (),
        max_open: int = 100_000,
        flag_partial: bool = False,
        **aggregates: Aggregate,
    ) -> None:
        if not isinstance(spec, WindowSpec):
            raise PipelineBuildError(f"window takes tumbling(…), sliding(…) or session(…), not {spec!r}")
        for name, value in zip(_OPTIONS, (key, max_open, flag_partial), strict=True):
            if isinstance(value, Aggregate):
                raise PipelineBuildError(f"window: {name!r} is an option, so no result can have that name")
        self.spec = spec
        self.key: tuple[str, ...] = (key,) if isinstance(key, str) else tuple(key or ())
        self.max_open = max_open
        self.flag_partial = flag_partial
        self.aggregates = aggregates
        if not all(isinstance(name, str) for name in self.key) or len(set(self.key)) < len(self.key):
            raise PipelineBuildError(f"window: key is {key!r}, must be the name of a column, or several names")
        if isinstance(max_open, bool) or not isinstance(max_open, int) or max_open < 1:
            raise PipelineBuildError(f"window: max_open is {max_open!r}, must be an int of 1 or more")
        if not aggregates:
            raise PipelineBuildError("window: nothing to compute; name results, like n=agg.count()")
        taken = {"window_start", "window_end", *self.key}
        taken |= {"revision"} if spec.late == "update" else set()
        taken |= {"partial"} if flag_partial else set()
        for name, aggregate in aggregates.items():
            if not isinstance(aggregate, Aggregate):
                raise PipelineBuildError(
                    f"window: {name} is {aggregate!r}, must be an aggregate like agg.mean('column')"
                )
            if name in taken:
                raise PipelineBuildError(f"window: the result has a column {name!r} already; use another name")

    def start(self, context: Context) -> WindowStep:
        if self.spec.kind == "session":
            return _SessionStep(self, context)
        return _CountStep(self, context) if self.spec.time is None else _TimeStep(self, context)

    def check(self, schema: Schema) -> Schema:
        if schema is None:
            return None
        form, dtypes = _dtypes_of_schema(schema)
        layout = _Layout(self, form, dict, dtypes)
        if form == "records":
            return ArraySpec((None,), np.dtype(list(layout.fields.items())))
        return {name: ArraySpec((None,), dtype) for name, dtype in layout.fields.items()}

    def describe(self) -> str:
        results = ", ".join(f"{name}={aggregate.describe()}" for name, aggregate in self.aggregates.items())
        by = f" by {', '.join(self.key)}" if self.key else ""
        return f"window {self.spec.describe()}{by}: {results}"

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"op": self.kind, "spec": self.spec.to_json()}
        data["aggregates"] = {name: aggregate.to_json() for name, aggregate in self.aggregates.items()}
        if self.key:
            data["key"] = list(self.key)
        if self.max_open != 100_000:
            data["max_open"] = self.max_open
        if self.flag_partial:
            data["flag_partial"] = True
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Window:
        """Return the operator that `to_json` wrote."""
        return cls(
            WindowSpec.from_json(data["spec"]),
            key=tuple(data.get("key", ())),
            max_open=data.get("max_open", 100_000),
            flag_partial=data.get("flag_partial", False),
            **{name: Aggregate.from_json(value) for name, value in data["aggregates"].items()},
        )


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
        Gets late rows as an item of the input's kind, where `late` is a destination.
    """

    def __init__(self, window: Window, context: Context) -> None:
        self._window = window
        self._context = context
        self._layout: _Layout | None = None
        self._entries = _Log()  # place (pane, or start and last row), keys, accumulated numbers
        self._kept = _Log()  # pane, keys, time, values
        self._compact_at = _FEWEST_COMPACTED
        self._lost: bool | int = False  # or: windows that start up to this tick may lack rows
        late = window.spec.late
        self.on_late: Callable[[Any], None] | None = late if callable(late) else None

    # --- what the runtime calls ---

    def process(self, item: Any, emit: Emit) -> None:
        columns, rows = self._columns_of(item)
        if rows == 0:
            return
        layout = self._layout
        assert layout is not None
        for name in self._window.key:
            column = columns[name]
            if column.dtype.kind in "fmM" and agg.missing_in(column) is not None:
                raise OperatorError(f"an item has missing values in key column {name!r}; filter such rows before the window")
        self._add(item, columns, rows, emit)
        if self._entries.rows > self._compact_at:
            self._compact()
        if self._entries.rows > self._window.max_open:
            self._compact()
            self._check_open(self._entries.rows)

    def finish(self, emit: Emit) -> None:
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
        self._layout = _Layout(self._window, *state["layout"]) if "layout" in state else None
        self._entries.replace(list(state["entries"]))
        self._kept.replace(list(state["kept"]))

    _scalars: ClassVar[tuple[str, ...]] = ()

    def _signature(self) -> str:
        return self._window.describe()

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
                form, make, rows = "row", dict, 1
            else:
                form, make, rows = "columns", type(item), -1 if first is None else len(first)
            if rows >= 0:
                if self._layout is None:
                    self._set_layout(
                        form, make, {name: column.dtype for name, column in item.items() if np.ndim(column) == 1}
                    )
                return self._checked(item, rows)
        raise OperatorError(
            f"a window takes records (structured arrays), columns or dicts of numbers, not {_text(item)}"
        )

    def _set_layout(self, form: str, make: Any, dtypes: Mapping[str, DType]) -> None:
        try:
            self._layout = _Layout(self._window, form, make, dtypes)
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
                raise OperatorError(f"there is no column {name!r} in {_text(item)}, and the first item had it") from None
            if not isinstance(column, np.ndarray) or column.ndim != 1 or len(column) != rows:
                raise OperatorError(f"column {name!r} is {_text(column)}, must be an array of one dimension and {rows} rows")
            if column.dtype != dtype and not (column.dtype.kind in "SU" and column.dtype.kind == dtype.kind):
                column = self._as_before(name, column, dtype, layout.form)
            columns[name] = column
        return columns, rows

    @staticmethod
    def _as_before(name: str, column: Array, dtype: DType, form: str) -> Array:
        # Python's numbers have no dtype: 20 may follow 20.5.
        if form == "row" and column.dtype.kind in "iu" and dtype.kind == "f":
            return column.astype(dtype)
        raise OperatorError(f"column {name!r} is {column.dtype}, and was {dtype} in the first item")

    def _add(self, item: Any, columns: dict[str, Array], rows: int, emit: Emit) -> None:
        raise NotImplementedError

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
            self.on_late(type(item)({name: column.take(index) for name, column in item.items()}))

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
            lambda text: _pick(layout.values(columns, text), order),
            _pick(batch.ticks, order),
            in_order,
        )
        heads = starts if order is None else order[starts]
        keys = [columns[name] for name in self._window.key]
        parts = [part for accumulator in layout.accumulators for part in accumulator.reduce(rows)]
        self._entries.append([*lead, *(key[heads] for key in keys), *parts])
        if layout.kept:
            assert place is not None
            # Copies: the input may be views of a slot.
            kept = [layout.values(columns, text).copy() for text in layout.kept]
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
        order, starts = _group(arrays[: self._leading])
        if len(starts) < self._entries.rows:
            arrays = [_pick(array, order) for array in arrays]
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
        self, emit: Emit, start: Array, end: Array, keys: list[Array], parts: list[Array], values: Values | None, **more: Array
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
        for name, bound in layout.bounds.items():
            found[name] = bound.finish(accumulated, values)
        found |= more
        if self._window.flag_partial:
            until = -1 if self._lost is False else self._lost
            found["partial"] = start <= until if self._lost is not False else np.zeros(len(start), bool)
        if layout.form == "records":
            records = np.empty(
                len(start), [(name, found[name].dtype if name in self._window.key else dtype) for name, dtype in layout.fields.items()]
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


def _text(item: Any) -> str:
    if isinstance(item, np.ndarray):
        return f"an array of {item.dtype} with shape {item.shape}"
    if isinstance(item, Mapping):
        return f"a {type(item).__name__} with {', '.join(map(str, item)) or 'nothing in it'}"
    return f"a {type(item).__name__}"


class _PaneStep(WindowStep):
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
        each = np.maximum(last - first + 1, 0)
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
        self, emit: Emit, after: Any, until: Any, kept_after: Any = None, kept_until: Any = None, only: Any = None
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
            kept_index, kept_numbers, kept_total = self._expand(self._kept.arrays()[0], kept_after, kept_until)
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
        permutation, starts = _group(columns)
        order = _pick(index, permutation)
        groups = Groups(starts, len(order))
        parts = self._merge([array.take(order) for array in arrays[1 + lead :]], groups)
        heads = order[starts]
        number = _pick(numbers, permutation)[starts]
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
        order, starts = _group([numbers, *(array.take(index) for array in arrays[1 : 1 + lead])])
        order = index if order is None else index[order]
        times = arrays[1 + lead].take(order)
        groups = Groups(starts, len(order))
        if not _is_sorted(times):
            order = order[np.lexsort((times, groups.ids))]
        columns = {text: array.take(order) for text, array in zip(layout.kept, arrays[2 + lead :], strict=True)}
        return Values(starts, len(order), columns)

    def _give_numbered(
        self, emit: Emit, number: Array, keys: list[Array], parts: list[Array], values: Values | None, only: Any
    ) -> None:
        start = number * self._every
        self._give(emit, start, start + self._size, keys, parts, values)


class _TimeStep(_PaneStep):
    """Windows over time. Numbers of windows: those up to `_closed` have been emitted, those up to `_dead` are forgotten."""

    _scalars = ("_top", "_closed", "_dead", "_revisions")

    def __init__(self, window: Window, context: Context) -> None:
        super().__init__(window, context)
        self._top: int | None = None  # newest time
        self._closed = _LOWEST
        self._dead = _LOWEST
        self._revisions: dict[tuple[Any, ...], int] = {}  # how often windows that are not dead were emitted; for updates

    def _closing(self, top: Any, keep: int = 0) -> Any:
        """Number of the last window that is closed (and not to be updated any more) when `top` is the newest time."""
        layout = self._layout
        assert layout is not None
        return (top - (layout.lateness + keep + self._size)) // self._every

    def _add(self, item: Any, columns: dict[str, Array], rows: int, emit: Emit) -> None:
        layout = self._layout
        assert layout is not None and layout.clock is not None and self._window.spec.time is not None
        ticks = layout.clock.ticks(columns[self._window.spec.time])
        lowest, highest = int(ticks.min()), int(ticks.max())
        room = 2 * self._size + layout.lateness + layout.keep
        if lowest < _LOWEST + room or highest > _HIGHEST - room:
            raise OperatorError(
                f"the times {lowest} to {highest} of column {self._window.spec.time!r} leave no room for a window of "
                f"{self._size} in 64 bits"
            )
        if self._lost is True:
            self._lost = int(ticks[0]) + layout.lateness
        batch = _Batch(item, columns, ticks)
        in_order = _is_sorted(ticks)
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
            self._take(part, _is_sorted(part.ticks), emit)

    def _take(self, batch: _Batch, in_order: bool, emit: Emit) -> None:
        """Aggregate rows into panes; emit again what was emitted before (of updates only)."""
        ticks = batch.ticks
        keys = [batch.columns[name] for name in self._window.key]
        if in_order and not keys and not self._window.spec.late == "update" and self._cut(batch):
            return
        panes = ticks // self._pane
        order, starts = _group([panes, *keys])
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
        panes = np.arange(first, last + 1, dtype=np.int64)
        starts = np.searchsorted(ticks, panes * self._pane)
        counts = np.diff(starts, append=len(ticks))
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
        self, emit: Emit, number: Array, keys: list[Array], parts: list[Array], values: Values | None, only: Any
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
            start, keys, parts = start[wanted], [key[wanted] for key in keys], [part[wanted] for part in parts]
            self._context.count("updated", len(wanted))
        revisions = [self._revisions.get(place, 0) for place in places]
        self._revisions.update((place, revision + 1) for place, revision in zip(places, revisions, strict=True))
        self._give(
            emit, start, start + self._size, keys, parts, values, revision=np.array(revisions, np.int64)
        )

    def finish(self, emit: Emit) -> None:
        if self._layout is None:
            return
        self._give_windows(emit, self._closed, _HIGHEST)
        self._entries.replace([])
        self._kept.replace([])


def _some_values(values: Values, wanted: list[int]) -> Values:
    """The kept rows of some of the groups."""
    counts = values.counts[wanted]
    starts = np.cumsum(counts) - counts
    index = np.repeat(values.starts[wanted] - starts, counts) + np.arange(int(counts.sum()))
    return Values(starts, len(index), {text: column[index] for text, column in values.columns.items()})


class _CountStep(_PaneStep):
    """Windows of rows. The time of a row is its number among those of its key."""

    _scalars = ("_seen",)

    def __init__(self, window: Window, context: Context) -> None:
        super().__init__(window, context)
        self._seen: dict[tuple[Any, ...], int] = {}  # rows of each key

    def state_lost(self) -> None:
        self._lost = 0  # the first window of each key

    def _add(self, item: Any, columns: dict[str, Array], rows: int, emit: Emit) -> None:
        keys = [columns[name] for name in self._window.key]
        order, starts = _group(keys) if keys else (None, np.zeros(1, np.int64))
        groups = Groups(starts, rows)
        heads = starts if order is None else order[starts]
        places = _places(keys, heads)
        before = np.array([self._seen.get(place, 0) for place in places], np.int64)
        after = before + groups.counts
        self._seen.update(zip(places, after.tolist(), strict=True))
        self._check_open(len(self._seen))
        numbers = np.arange(rows) + np.repeat(before - starts, groups.counts)
        panes = numbers // self._pane
        starts = _starts(groups.ids, panes)
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
        return np.maximum((seen - self._size) // self._every, -1)

    def _close(self, keys: list[Array], closed: Array, closing: Array, emit: Emit) -> None:
        """Emit the windows closed < number <= closing of some keys."""
        lead = len(keys)
        limits = [
            _limits(keys, (closed, closing), log.arrays()[1 : 1 + lead], log.rows) for log in (self._entries, self._kept)
        ]
        (after, until), (kept_after, kept_until) = limits
        self._give_windows(emit, after, until, kept_after, kept_until)
        for log, (_, gone) in zip((self._entries, self._kept), limits, strict=True):
            if log.rows:
                log.keep(log.arrays()[0] // self._step > gone)

    def finish(self, emit: Emit) -> None:
        if self._layout is None or self._entries.rows == 0:
            return
        if not self._window.spec.drop_last:
            keys = self._entries.arrays()[1 : self._leading]
            order, starts = _group(keys) if keys else (None, np.zeros(1, np.int64))
            heads = starts if order is None else order[starts]
            seen = np.array([self._seen[place] for place in _places(keys, heads)], np.int64)
            self._close([key[heads] for key in keys], self._closed_by(seen), np.full(len(seen), _HIGHEST), emit)
        self._entries.replace([])
        self._kept.replace([])


def _places(keys: list[Array], rows: Array) -> list[tuple[Any, ...]]:
    """The keys of rows as tuples."""
    return list(zip(*(key[rows].tolist() for key in keys), strict=True)) if keys else [()]


def _limits(
    keys: list[Array], limits: tuple[Array, Array], all_keys: list[Array], rows: int
) -> tuple[Any, Any]:
    """For each of `all_keys` the limits of that key, where it is among `keys`: (_LOWEST, _LOWEST) otherwise."""
    if not keys:
        return int(limits[0][0]), int(limits[1][0])
    if rows == 0:
        return _LOWEST, _LOWEST
    order, starts = _group([np.concatenate(both) for both in zip(keys, all_keys, strict=True)])
    some = len(keys[0])
    groups = Groups(starts, some + rows)
    ids = groups.ids
    if order is not None:
        ids = np.empty_like(groups.ids)
        ids[order] = groups.ids
    found = []
    for limit in limits:
        table = np.full(len(starts), _LOWEST)
        table[ids[:some]] = limit
        found.append(table[ids[some:]])
    return found[0], found[1]


class _SessionStep(WindowStep):
    """Sessions. An entry has the times of its first and last row; entries that overlap are one session."""

    _scalars = ("_top", "_earliest")

    def __init__(self, window: Window, context: Context) -> None:
        super().__init__(window, context)
        self._top: int | None = None  # newest time
        self._earliest = _HIGHEST  # no open session ends before

    @property
    def _leading(self) -> int:
        return 2 + len(self._window.key)

    def _add(self, item: Any, columns: dict[str, Array], rows: int, emit: Emit) -> None:
        layout = self._layout
        assert layout is not None and layout.clock is not None and self._window.spec.time is not None
        ticks = layout.clock.ticks(columns[self._window.spec.time])
        lowest, highest = int(ticks.min()), int(ticks.max())
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
        done = 0
        # A row older than the watermark may meet sessions that the rows before it have closed: close those first.
        for row in np.flatnonzero(ticks < newest - layout.lateness).tolist():
            if row > done:
                self._take(batch.take(slice(done, row)))
            self._close(int(newest[row]), emit)
            one = batch.take(slice(row, row + 1))
            if int(ticks[row]) + layout.size <= int(newest[row]) - layout.lateness and not self._joins(one):
                self._late(one, np.zeros(1, np.int64))
            else:
                self._take(one)
            done = row + 1
        if done < rows:
            self._take(batch.take(slice(done, rows)) if done else batch)
        self._top = max(highest, int(newest[0]))
        self._close(self._top, emit)

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
        ordered = _pick(ticks, order)
        starts = np.flatnonzero(np.diff(ordered) >= layout.size) + 1
        if keys:
            starts = np.union1d(starts, np.flatnonzero(np.diff(ids)) + 1)
        starts = np.concatenate([np.zeros(1, np.int64), starts])
        lasts = ordered[np.append(starts[1:], len(ticks)) - 1]
        self._aggregate(batch, [ordered[starts], lasts], order, starts, True, ticks)
        self._earliest = min(self._earliest, int(lasts.min()) + layout.size)

    def _compact(self) -> None:
        layout = self._layout
        if self._entries.rows < 2 or layout is None:
            return
        arrays = self._entries.arrays()
        order, ids = _by_key_and(arrays[0], arrays[2 : self._leading])
        start, last = _pick(arrays[0], order), _pick(arrays[1], order)
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
            order, _ = _group([end[index], *keys])
            index = _pick(index, order)
            values = self._values(index, len(end)) if self._kept.rows else None
            chosen = [array[index] for array in arrays]
            self._entries.keep(~closes)
            self._give(
                *(emit, chosen[0], end[index], chosen[2 : self._leading], chosen[self._leading :], values)
            )
        self._earliest = int(end[~closes].min()) if len(index) < len(end) else _HIGHEST

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

    def finish(self, emit: Emit) -> None:
        if self._layout is not None:
            self._close_until(_HIGHEST, emit)


def _by_key_and(ticks: Array, keys: list[Array]) -> tuple[Array | None, Array]:
    """Sort by key, then time, then place: (order or None, number of the key of each in that order)."""
    by_time = None if _is_sorted(ticks) else np.argsort(ticks, kind="stable")
    if not keys:
        return by_time, np.zeros(len(ticks), np.int64)
    by_key, starts = _group([_pick(key, by_time) for key in keys])
    ids = Groups(starts, len(ticks)).ids
    if by_key is None or by_time is None:
        return by_time if by_key is None else by_key, ids
    return by_time[by_key], ids


# --- by key -------------------------------------------------------------------------------------------------------------


class KeyBy(Router):
    """Splits a stream into partitions by a key: all rows of a key go to the same one, in their order.

    Parameters
    ----------
    key : str, sequence of str, or callable
        Columns; or a function that takes an item and returns the key of the whole item, or of records and columns an array with
        a key per row.
    partitions : int, optional
        How many; 1 by default.

    Raises
    ------
    PipelineBuildError
        No key, partitions of less than 1 or more than 4,096.

    Notes
    -----
    The partition is `hash_keys` of the key modulo `partitions`: the same in every process and every run. An item with rows for
    several partitions is split, which copies the rows; one that belongs to one partition passes as it is. Missing keys (NaN,
    NaT) are keys like others.
    """

    kind: ClassVar[str] = "key_by"

    def __init__(self, key: Any, partitions: int | None = None) -> None:
        self.key = key if callable(key) else (key,) if isinstance(key, str) else tuple(key or ())
        count = 1 if partitions is None else partitions
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 4096:
            raise PipelineBuildError(f"key_by: partitions is {partitions!r}, must be an int from 1 to 4096")
        if not callable(key) and (not self.key or not all(isinstance(name, str) for name in self.key)):
            raise PipelineBuildError(
                f"key_by: key is {key!r}, must be the name of a column, several names, or a function"
            )
        self.partitions = count
        self.outputs = tuple(map(str, range(count)))

    def route(self, context: Context) -> Callable[[Any], Iterable[tuple[int, Any]]]:
        if self.partitions == 1:
            return lambda item: ((0, item),)
        return self._route

    def _route(self, item: Any) -> Iterable[tuple[int, Any]]:
        columns = self._columns(item)
        try:
            hashes = hash_keys(columns[0])
            for column in columns[1:]:
                hashes = _mix(hashes * np.uint64(31) + hash_keys(column))
        except TypeError as error:
            raise OperatorError(f"key_by {self._name()}: {error}") from None
        parts = (hashes % np.uint64(self.partitions)).astype(np.uint16)
        if len(parts) == 0:
            return ()
        if (parts == parts[0]).all():
            return ((int(parts[0]), item),)
        order = np.argsort(parts, kind="stable")
        ordered = parts[order]
        starts = _starts(ordered)
        return [
            (int(ordered[start]), _take_rows(item, order[start:end]))
            for start, end in zip(starts, np.append(starts[1:], len(order)), strict=True)
        ]

    def _columns(self, item: Any) -> list[Array]:
        """Return the keys of the rows, or of the item as one row."""
        if callable(self.key):
            key = self.key(item)
            if isinstance(key, np.ndarray) and key.ndim:
                if key.ndim != 1 or len(key) != _rows_of(item):
                    raise OperatorError(
                        f"key_by {self._name()}: the function returned {_text(key)} for {_text(item)}; must be one key, or an "
                        "array with one per row"
                    )
                return [key]
            return [np.asarray([part]) for part in (key if isinstance(key, tuple) else (key,))]
        if not isinstance(item, Mapping) and getattr(getattr(item, "dtype", None), "names", None) is None:
            raise OperatorError(f"key_by {self._name()} takes records, columns or dicts, not {_text(item)}; use a function")
        columns = []
        for name in self.key:
            try:
                columns.append(np.atleast_1d(item[name]))
            except (KeyError, ValueError):
                raise OperatorError(f"key_by: there is no column {name!r} in {_text(item)}") from None
        return columns

    def _name(self) -> str:
        return function_name(self.key) if callable(self.key) else ", ".join(self.key)

    def check(self, schema: Schema) -> Schema:
        if schema is None or callable(self.key):
            return schema
        _, dtypes = _dtypes_of_schema(schema)
        for name in self.key:
            if name not in dtypes:
                raise PipelineBuildError(f"there is no key column {name!r}; there are: {', '.join(dtypes) or 'none'}")
            if dtypes[name].kind not in "biufmMSU":
                raise PipelineBuildError(f"key column {name!r} is {dtypes[name]}, must be numbers, times or texts")
        return schema

    def describe(self) -> str:
        return f"key_by {self._name()} into {self.partitions}"

    def to_json(self) -> dict[str, Any]:
        key: Any = {"function": reference(self.key)} if callable(self.key) else list(self.key)
        return {"op": self.kind, "key": key, "partitions": self.partitions}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KeyBy:
        """Return the router that `to_json` wrote."""
        key = data["key"]
        return cls(resolve(key["function"]) if isinstance(key, Mapping) else tuple(key), data["partitions"])


def _rows_of(item: Any) -> int:
    if isinstance(item, Mapping):
        item = next(iter(item.values()), ())
    return len(item) if np.ndim(item) else -1


def _take_rows(item: Any, rows: Array) -> Any:
    if isinstance(item, np.ndarray):
        return item.take(rows, axis=0)
    return type(item)({name: column.take(rows) for name, column in item.items()})
