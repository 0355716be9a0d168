"""What is computed per window: ``agg.mean("temperature")``, ``agg.quantile("latency", 0.99)``, ``agg.apply(fn, "x", "y")``.

An `Aggregate` is a description. The windows compute it from *accumulators*, which several aggregates of a column share:

* those that can be merged (counts, sums, extremes, first, last, moments) keep some numbers per pane, and each row is
  aggregated once however many windows it is in;
* `median`, `quantile`, `nunique` and `apply` need the values themselves, which are kept until their windows have closed.

Missing values (NaN, NaT) are skipped, as pandas does by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias, cast

import numpy as np

from dsline.dataflow.callables import function_name, reference, resolve
from dsline.dataflow.grouping import counts_of
from dsline.errors import OperatorError, PipelineBuildError

__all__ = [
    "Aggregate",
    "apply",
    "count",
    "first",
    "last",
    "max",
    "mean",
    "median",
    "min",
    "nunique",
    "quantile",
    "std",
    "sum",
    "var",
]

Array: TypeAlias = np.ndarray[Any, Any]
DType: TypeAlias = np.dtype[Any]

_INT64: Final = np.dtype(np.int64)
_UINT64: Final = np.dtype(np.uint64)
_DOUBLE: Final = np.dtype(np.float64)
_LARGE_GROUP: Final = 32  # values from which on sorting groups one by one is faster


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """Description of one result column of a window. Made by the functions of this module.

    Attributes
    ----------
    kind : str
        Name of the function that makes it.
    columns : tuple of str
        Columns, or expressions over columns.
    q : float or None
        Of a quantile.
    ddof : int
        Of std and var: the divisor is n - ddof.
    function : callable or None
        Of apply.
    dtype : numpy.dtype or None
        Of the result of apply.
    """

    kind: str
    columns: tuple[str, ...] = ()
    q: float | None = None
    ddof: int = 1
    function: Callable[..., Any] | None = None
    dtype: DType | None = None

    def describe(self) -> str:
        """One line for explain()."""
        parts = [*self.columns]
        if self.function is not None:
            parts.insert(0, function_name(self.function))
        if self.q is not None:
            parts.append(f"{self.q:g}")
        return f"{self.kind}({', '.join(parts)})"

    def to_json(self) -> dict[str, Any]:
        """Return plain values.

        Raises
        ------
        PipelineBuildError
            The function of `apply` is one that no text stands for.
        """
        data: dict[str, Any] = {"agg": self.kind}
        if self.columns:
            data["of"] = list(self.columns)
        if self.q is not None:
            data["q"] = self.q
        if self.ddof != 1:
            data["ddof"] = self.ddof
        if self.function is not None:
            data["function"] = reference(self.function)
        if self.dtype is not None:
            data["dtype"] = self.dtype.str
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Aggregate:
        """Return the aggregate that `to_json` wrote."""
        columns = tuple(data.get("of", ()))
        kind = data.get("agg")
        if kind == "apply":
            return apply(resolve(data["function"]), *columns, dtype=data.get("dtype", "f8"))
        if kind == "quantile":
            return quantile(columns[0], data["q"])
        if kind in ("std", "var"):
            return _spread(kind, columns[0], data.get("ddof", 1))
        if kind == "count":
            return count(*columns)
        if kind not in RULES:
            raise PipelineBuildError(f"there is no aggregate {kind!r}; there are: {', '.join(RULES)}")
        return _of(kind, columns[0])


def _of(kind: str, column: Any, **more: Any) -> Aggregate:
    if not isinstance(column, str) or not column.strip():
        raise PipelineBuildError(
            f"agg.{kind} takes the name of a column or an expression over columns, not {column!r}"
        )
    return Aggregate(kind, (column.strip(),), **more)


def count(column: str | None = None) -> Aggregate:
    """Number of rows; of a column: of its values that are not missing. int64."""
    return Aggregate("count") if column is None else _of("count", column)


def sum(column: str) -> Aggregate:
    """Sum: int64 or uint64 of integers and truth values (wrapping around, as in NumPy), the column's dtype of floats, which
    are added as float64. 0 without values."""
    return _of("sum", column)


def mean(column: str) -> Aggregate:
    """Arithmetic mean, float64. NaN without values."""
    return _of("mean", column)


def min(column: str) -> Aggregate:
    """Smallest value, of the column's dtype. NaN without values."""
    return _of("min", column)


def max(column: str) -> Aggregate:
    """Largest value, of the column's dtype. NaN without values."""
    return _of("max", column)


def first(column: str) -> Aggregate:
    """Earliest value that is not missing; of several with the same time the first that came. Of the column's dtype."""
    return _of("first", column)


def last(column: str) -> Aggregate:
    """Latest value that is not missing; of several with the same time the last that came. Of the column's dtype."""
    return _of("last", column)


def std(column: str, ddof: int = 1) -> Aggregate:
    """Standard deviation with divisor n - ddof. NaN with ddof values or fewer. float64; float32 of float32."""
    return _spread("std", column, ddof)


def var(column: str, ddof: int = 1) -> Aggregate:
    """Variance with divisor n - ddof. NaN with ddof values or fewer. float64; float32 of float32.

    Notes
    -----
    Panes are merged by the formula of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances" (1979): no sum of squares that cancels.
    """
    return _spread("var", column, ddof)


def _spread(kind: str, column: str, ddof: Any) -> Aggregate:
    if isinstance(ddof, bool) or not isinstance(ddof, int) or ddof < 0:
        raise PipelineBuildError(f"agg.{kind}: ddof is {ddof!r}, must be an int of 0 or more")
    return _of(kind, column, ddof=ddof)


def median(column: str) -> Aggregate:
    """Median, exact: the values are kept until the window closes. float64; float32 of float32."""
    return _of("median", column)


def quantile(column: str, q: float) -> Aggregate:
    """Quantile with linear interpolation, exact: the values are kept until the window closes. float64."""
    given: Any = q
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
        raise PipelineBuildError(f"agg.quantile: q is {q!r}, must be from 0 to 1")
    return _of("quantile", column, q=float(q))


def nunique(column: str) -> Aggregate:
    """Number of different values, missing ones not counted: the values are kept until the window closes. int64."""
    return _of("nunique", column)


def apply(function: Callable[..., Any], *columns: str, dtype: Any = "f8") -> Aggregate:
    """Whatever a function makes of the columns of a window.

    Parameters
    ----------
    function : callable
        Gets one 1-D array per column, rows in the order of time (those of equal time in the order of arrival), missing values
        included; returns a number. Called once per window and key. The arrays are its own.
    *columns : str
        One at least.
    dtype : dtype-like
        Of the result column.
    """
    if not callable(function):
        raise PipelineBuildError(f"agg.apply takes a function, not {function!r}; the columns follow it")
    if not columns:
        raise PipelineBuildError(f"agg.apply({function_name(function)}) needs the names of columns")
    texts = tuple(_of("apply", column).columns[0] for column in columns)
    try:
        result = np.dtype(dtype)
    except TypeError as error:
        raise PipelineBuildError(f"agg.apply: dtype is {dtype!r}: {error}") from None
    if result.hasobject or result.names is not None or result.itemsize == 0:
        raise PipelineBuildError(f"agg.apply: dtype is {dtype!r}, must be a plain one of fixed width")
    return Aggregate("apply", texts, function=function, dtype=result)


# --- rows and panes in groups -------------------------------------------------------------------------------------------


class Groups:
    """Neighbouring elements that belong together: group i has those from starts[i] to starts[i + 1]."""

    def __init__(self, starts: Array, size: int) -> None:
        self.starts = starts
        self.size = size
        self._counts: Array | None = None
        self._ids: Array | None = None

    @property
    def counts(self) -> Array:
        """Elements per group, int64."""
        if self._counts is None:
            self._counts = counts_of(self.starts, self.size)
        return self._counts

    @property
    def ids(self) -> Array:
        """Number of the group of each element."""
        if self._ids is None:
            self._ids = np.repeat(np.arange(len(self.starts)), self.counts)
        return self._ids


class Rows(Groups):
    """The rows of a batch in groups. `values(text)` gives a column in that order, `by_time` sorts groups by time."""

    def __init__(
        self,
        starts: Array,
        size: int,
        values: Callable[[str], Array],
        times: Callable[[], Array],
        in_order: bool,
    ) -> None:
        super().__init__(starts, size)
        self._values = values
        self._get_times = times
        self._all_times: Array | None = None
        self._in_order = in_order
        self._order: Array | None = None
        self._columns: dict[str, Array] = {}
        self._missing: dict[str, Array | None] = {}

    def values(self, text: str) -> Array:
        found = self._columns.get(text)
        if found is None:
            found = self._columns[text] = self._values(text)
        return found

    def missing(self, text: str) -> Array | None:
        """Which values are NaN or NaT; None: there are none."""
        if text not in self._missing:
            self._missing[text] = missing_in(self.values(text))
        return self._missing[text]

    @property
    def times(self) -> Array:
        """By time within each group."""
        return self.by_time(self._times)

    @property
    def _times(self) -> Array:
        if self._all_times is None:
            self._all_times = self._get_times()
        return self._all_times

    def by_time(self, column: Array) -> Array:
        """Sort a column by time within each group; those of equal time stay in the order of arrival."""
        if self._in_order:
            return column
        if self._order is None:
            self._order = np.lexsort((self._times, self.ids))
        return column[self._order]


def missing_in(values: Array) -> Array | None:
    if values.dtype.kind == "f":
        nan = np.isnan(values)
    elif values.dtype.kind in "mM":
        nan = np.isnat(values)
    else:
        return None
    return nan if nan.any() else None


# --- accumulators -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """Numbers per group of rows (a pane) that can be merged."""

    column: str
    dtype: DType

    def reduce(self, rows: Rows) -> tuple[Array, ...]:
        """Return one array per number: its value for each group."""
        raise NotImplementedError

    def merge(self, parts: tuple[Array, ...], groups: Groups) -> tuple[Array, ...]:
        """Merge the neighbours that belong together."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RowCount(Accumulator):
    """Rows, missing values or not."""

    def reduce(self, rows: Rows) -> tuple[Array, ...]:
        return (rows.counts,)

    def merge(self, parts: tuple[Array, ...], groups: Groups) -> tuple[Array, ...]:
        return (np.add.reduceat(parts[0], groups.starts),)


@dataclasses.dataclass(frozen=True)
class ValueCount(RowCount):
    """Values that are not missing."""

    def reduce(self, rows: Rows) -> tuple[Array, ...]:
        nan = rows.missing(self.column)
        if nan is None:
            return (rows.counts,)
        return (rows.counts - np.add.reduceat(nan, rows.starts, dtype=np.int64),)


@dataclasses.dataclass(frozen=True)
class Total(Accumulator):
    """Sum, as `dtype`."""

    def reduce(self, rows: Rows) -> tuple[Array, ...]:
        values, nan = rows.values(self.column), rows.missing(self.column)
        if nan is not None:
            values = np.where(nan, values.dtype.type(0), values)
        return (np.add.reduceat(values, rows.starts, dtype=self.dtype),)

    def merge(self, parts: tuple[Array, ...], groups: Groups) -> tuple[Array, ...]:
        return (np.add.reduceat(parts[0], groups.starts),)


@dataclasses.dataclass(frozen=True)
class Extreme(Accumulator):
    """Smallest or largest value."""

    largest: bool

    def reduce(self, rows: Rows) -> tuple[Array, ...]:
        plain = np.maximum if self.largest else np.minimum
        ufunc = plain if rows.missing(self.column) is None else self._skipping
        return (ufunc.reduceat(rows.values(self.column), rows.starts),)

    def merge(self, parts: tuple[Array, ...], groups: Groups) -> tuple[Array, ...]:
        return (self._skipping.reduceat(parts[0], groups.starts),)

    @property
    def _skipping(self) -> np.ufunc:
        return np.fmax if self.largest else np.fmin


@dataclasses.dataclass(frozen=True)
class End(Accumulator):
    """First or last value: (value, time, whether there is one)."""

    latest: bool

    def reduce(self, rows: Rows) -> tuple[Array, ...]:
        values = rows.by_time(rows.values(self.column))
        nan = missing_in(values)
        starts, ends = rows.starts, rows.starts + rows.counts
        if nan is None:
            at = ends - 1 if self.latest else starts
            return values[at], rows.times[at], np.ones(len(starts), bool)
        there = np.flatnonzero(~nan)
        if len(there) == 0:
            return values[starts], rows.times[starts], np.zeros(len(starts), bool)
        found = np.searchsorted(there, ends) - 1 if self.latest else np.searchsorted(there, starts)
        at = there[np.clip(found, 0, len(there) - 1)]
        has = (at >= starts) & (at < ends)
        at = np.where(has, at, starts)
        return values[at], rows.times[at], has

    def merge(self, parts: tuple[Array, ...], groups: Groups) -> tuple[Array, ...]:
        _, times, has = parts
        # Those without a value go to the end that is not looked at.
        order = np.lexsort((times, has if self.latest else ~has, groups.ids))
        at = order[groups.starts + groups.counts - 1 if self.latest else groups.starts]
        return tuple(part[at] for part in parts)


@dataclasses.dataclass(frozen=True)
class Moments(Accumulator):
    """(number of values, mean, sum of squared differences from the mean)."""

    def reduce(self, rows: Rows) -> tuple[Array, ...]:
        values, nan = rows.values(self.column).astype(np.float64), rows.missing(self.column)
        numbers = rows.counts
        if nan is not None:
            values[nan] = 0
            numbers = numbers - np.add.reduceat(nan, rows.starts, dtype=np.int64)
        means = np.add.reduceat(values, rows.starts) / np.maximum(numbers, 1)
        values -= means[rows.ids]
        if nan is not None:
            values[nan] = 0
        return numbers, means, np.add.reduceat(values * values, rows.starts)

    def merge(self, parts: tuple[Array, ...], groups: Groups) -> tuple[Array, ...]:
        numbers, means, squares = parts
        total = np.add.reduceat(numbers, groups.starts)
        # Around the mean of the first pane, so that nothing large cancels.
        base = means[groups.starts]
        apart = means - base[groups.ids]
        shift = np.add.reduceat(numbers * apart, groups.starts) / np.maximum(total, 1)
        apart -= shift[groups.ids]
        return total, base + shift, np.add.reduceat(squares + numbers * apart * apart, groups.starts)


# --- from accumulators and values to results ----------------------------------------------------------------------------


class Values(Groups):
    """The kept rows of windows that close, in groups, by time."""

    def __init__(self, starts: Array, size: int, columns: Mapping[str, Array]) -> None:
        super().__init__(starts, size)
        self.columns = columns
        self._sorted: dict[str, tuple[Array, Array]] = {}

    def sorted(self, text: str) -> tuple[Array, Array]:
        """Return a column sorted within each group, missing values last, and how many are there."""
        found = self._sorted.get(text)
        if found is None:
            values = self.columns[text]
            # NumPy sorts NaN and NaT to the end.
            if len(values) > _LARGE_GROUP * len(self.starts):
                ordered = values.copy()
                for start, count in zip(self.starts.tolist(), self.counts.tolist(), strict=True):
                    ordered[start : start + count].sort()
            else:
                ordered = values[np.lexsort((values, self.ids))]
            nan = missing_in(ordered)
            there = self.counts
            if nan is not None:
                there = there - np.add.reduceat(nan, self.starts, dtype=np.int64)
            found = self._sorted[text] = ordered, there
        return found


Parts: TypeAlias = Mapping[Accumulator, tuple[Array, ...]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How an aggregate is computed.

    Attributes
    ----------
    takes : str
        Kinds of dtypes that its column may have.
    result : callable
        (dtype of the column) -> dtype of the result.
    needs : callable
        (aggregate, dtypes of its columns) -> accumulators.
    finish : callable
        (aggregate, dtypes, what was accumulated, kept values or None) -> results per window.
    keeps : bool
        Whether it needs the values.
    """

    takes: str
    result: Callable[[DType], DType]
    needs: Callable[[str, DType], tuple[Accumulator, ...]]
    finish: Callable[[Aggregate, tuple[Accumulator, ...], Parts, Values | None], Array]
    keeps: bool = False


ROW_COUNT: Final = RowCount("", _INT64)
_NUMBERS: Final = "biuf"
_ORDERED: Final = "biufmM"
_ANY: Final = "biufmMSU"


def _same(dtype: DType) -> DType:
    return dtype


def _always(dtype: Any) -> Callable[[DType], DType]:
    fixed = np.dtype(dtype)
    return lambda given: fixed


def _small_float(dtype: DType) -> DType:
    return dtype if dtype == np.float32 else _DOUBLE


def _sum_dtype(dtype: DType) -> DType:
    if dtype.kind == "f":
        return dtype
    return _UINT64 if dtype.kind == "u" else _INT64


def _valid(column: str, dtype: DType) -> Accumulator:
    return ValueCount(column, _INT64) if dtype.kind in "fmM" else ROW_COUNT


def _first_part(
    aggregate: Aggregate, needs: tuple[Accumulator, ...], parts: Parts, values: Values | None
) -> Array:
    return parts[needs[0]][0]


def _end(aggregate: Aggregate, needs: tuple[Accumulator, ...], parts: Parts, values: Values | None) -> Array:
    found, _, has = parts[needs[0]]
    if has.all():
        return found
    found = found.copy()
    found[~has] = np.nan if found.dtype.kind == "f" else "NaT"
    return found


def _mean(aggregate: Aggregate, needs: tuple[Accumulator, ...], parts: Parts, values: Values | None) -> Array:
    total, number = parts[needs[0]][0], parts[needs[1]][0]
    with np.errstate(all="ignore"):
        return cast(Array, total / number)


def _variance(
    aggregate: Aggregate, needs: tuple[Accumulator, ...], parts: Parts, values: Values | None
) -> Array:
    numbers, _, squares = parts[needs[0]]
    free = numbers - aggregate.ddof
    with np.errstate(all="ignore"):
        result = np.where(free > 0, squares / np.where(free > 0, free, 1), np.nan)
        return np.sqrt(result) if aggregate.kind == "std" else result


def _quantile(
    aggregate: Aggregate, needs: tuple[Accumulator, ...], parts: Parts, values: Values | None
) -> Array:
    assert values is not None
    q = 0.5 if aggregate.q is None else aggregate.q
    ordered, there = values.sorted(aggregate.columns[0])
    place = np.maximum(there - 1, 0) * q
    below = np.floor(place).astype(np.int64)
    part = place - below
    low = ordered[values.starts + below].astype(np.float64)
    high = ordered[values.starts + below + (part > 0)].astype(np.float64)
    with np.errstate(all="ignore"):
        result = np.where(part > 0, low + (high - low) * part, low)
        result = np.where((part > 0) & (low == high), low, result)  # of infinities
    result[there == 0] = np.nan
    return cast(Array, result)


def _nunique(
    aggregate: Aggregate, needs: tuple[Accumulator, ...], parts: Parts, values: Values | None
) -> Array:
    assert values is not None
    ordered, _ = values.sorted(aggregate.columns[0])
    is_new = np.ones(len(ordered), np.int64)
    is_new[1:] = ordered[1:] != ordered[:-1]
    is_new[values.starts] = 1
    nan = missing_in(ordered)
    if nan is not None:
        is_new[nan] = 0
    return cast(Array, np.add.reduceat(is_new, values.starts))


def _apply(
    aggregate: Aggregate, needs: tuple[Accumulator, ...], parts: Parts, values: Values | None
) -> Array:
    assert values is not None and aggregate.function is not None and aggregate.dtype is not None
    columns = [values.columns[text] for text in aggregate.columns]
    results = np.empty(len(values.starts), aggregate.dtype)
    for number, (start, length) in enumerate(
        zip(values.starts.tolist(), values.counts.tolist(), strict=True)
    ):
        result: Any = None
        try:
            result = aggregate.function(*(column[start : start + length] for column in columns))
            results[number] = result
        except Exception as error:
            name = function_name(aggregate.function)
            did = (
                "raised"
                if result is None
                else f"returned {str(result)[:100]!r}, which is no {aggregate.dtype}:"
            )
            raise OperatorError(f"agg.apply: {name} {did} {type(error).__name__}: {error}") from error
    return results


def _nothing(column: str, dtype: DType) -> tuple[Accumulator, ...]:
    return ()


def _total(column: str, dtype: DType) -> tuple[Accumulator, ...]:
    return (Total(column, _DOUBLE if dtype.kind == "f" else _sum_dtype(dtype)),)


RULES: Final[dict[str, Rule]] = {
    "count": Rule(_ANY, _always("i8"), lambda c, d: (_valid(c, d),), _first_part),
    "sum": Rule(_NUMBERS, _sum_dtype, _total, _first_part),
    "mean": Rule(_NUMBERS, _always("f8"), lambda c, d: (Total(c, _DOUBLE), _valid(c, d)), _mean),
    "min": Rule(_ORDERED, _same, lambda c, d: (Extreme(c, d, False),), _first_part),
    "max": Rule(_ORDERED, _same, lambda c, d: (Extreme(c, d, True),), _first_part),
    "first": Rule(_ANY, _same, lambda c, d: (End(c, d, False),), _end),
    "last": Rule(_ANY, _same, lambda c, d: (End(c, d, True),), _end),
    "std": Rule(_NUMBERS, _small_float, lambda c, d: (Moments(c, _DOUBLE),), _variance),
    "var": Rule(_NUMBERS, _small_float, lambda c, d: (Moments(c, _DOUBLE),), _variance),
    "median": Rule(_NUMBERS, _small_float, _nothing, _quantile, keeps=True),
    "quantile": Rule(_NUMBERS, _always("f8"), _nothing, _quantile, keeps=True),
    "nunique": Rule(_ANY, _always("i8"), _nothing, _nunique, keeps=True),
    "apply": Rule(_ANY, _same, _nothing, _apply, keeps=True),
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """An aggregate on columns whose dtypes are known.

    Raises
    ------
    PipelineBuildError
        It cannot be computed of such a column.
    """

    aggregate: Aggregate
    dtypes: tuple[DType, ...]
    needs: tuple[Accumulator, ...] = dataclasses.field(init=False)
    result: DType = dataclasses.field(init=False)
    keeps: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        rule = RULES[self.aggregate.kind]
        for text, dtype in zip(self.aggregate.columns, self.dtypes, strict=True):
            if dtype.kind not in rule.takes:
                raise PipelineBuildError(
                    f"agg.{self.aggregate.describe()}: column {text!r} is {dtype}, and {self.aggregate.kind} takes "
                    f"{_KIND_TEXTS[rule.takes]}"
                )
        column = self.aggregate.columns[0] if self.aggregate.columns else ""
        dtype = self.dtypes[0] if self.dtypes else _INT64
        given = self.aggregate.dtype if self.aggregate.dtype is not None else dtype.newbyteorder("=")
        needs = rule.needs(column, dtype) if self.aggregate.columns or not rule.keeps else ()
        object.__setattr__(self, "needs", needs)
        object.__setattr__(self, "result", rule.result(given))
        object.__setattr__(self, "keeps", rule.keeps)

    def finish(self, parts: Parts, values: Values | None) -> Array:
        """Return the results of windows from what was accumulated and kept."""
        rule = RULES[self.aggregate.kind]
        return rule.finish(self.aggregate, self.needs, parts, values).astype(self.result, copy=False)


_KIND_TEXTS: Final = {
    _NUMBERS: "integers, floats and truth values",
    _ORDERED: "numbers, truth values and times",
    _ANY: "numbers, truth values, times and texts",
}
