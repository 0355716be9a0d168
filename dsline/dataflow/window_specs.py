"""What belongs into one window: `tumbling`, `sliding`, `session`, and the clocks that read columns of times."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final, TypeAlias

import numpy as np

from dsline.dataflow.callables import reference, resolve
from dsline.dataflow.policies import DeadLetterPolicy, parse_policy
from dsline.errors import OperatorError, PipelineBuildError

__all__ = [
    "HIGHEST",
    "INT64",
    "LOWEST",
    "Clock",
    "Length",
    "WindowSpec",
    "session",
    "sliding",
    "tumbling",
]

Array: TypeAlias = np.ndarray[Any, Any]
DType: TypeAlias = np.dtype[Any]
Length: TypeAlias = int | str  # rows or units of the time column, or a duration

LOWEST: Final = int(np.iinfo(np.int64).min)
HIGHEST: Final = int(np.iinfo(np.int64).max)
INT64: Final = np.dtype(np.int64)
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
    late : str, DeadLetterPolicy or callable
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
        if isinstance(self.late, DeadLetterPolicy):
            data["late"] = self.late.to_json()
        elif callable(self.late):
            data["late"] = {"function": reference(self.late)}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WindowSpec:
        """Return the spec that `to_json` wrote."""
        given = {name: value for name, value in data.items() if name != "window"}
        late = given.get("late")
        if isinstance(late, Mapping):
            given["late"] = resolve(late["function"]) if "function" in late else parse_policy(dict(late))
        return make_spec(data.get("window"), **given)


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
    late : "drop", "update", dead_letter(...) or callable
        What is done with rows whose windows have closed: "drop" leaves them out; "update" gives the corrected window out again,
        with the number of the correction in the column `revision`; dead letters, or a function, get them as an item of the input's
        kind. All are counted, as "late".
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
    return make_spec(
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
    return make_spec(
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


def session(
    gap: Any, *, time: str, lateness: Any = 0, late: Any = "drop", unit: str | None = None
) -> WindowSpec:
    """Windows without a silence of `gap` in them: [first row, last row + gap).

    A row joins the sessions that [its time, its time + gap) overlaps, and may make one of two. Parameters are those of
    `tumbling`; late rows cannot update, since they could join two sessions that are out.
    """
    return make_spec("session", size=gap, every=gap, time=time, lateness=lateness, late=late, unit=unit)


def make_spec(kind: Any, **given: Any) -> WindowSpec:
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
    size, every = given["size"], given["every"]
    if isinstance(size, int) and isinstance(every, int) and every > size:
        raise PipelineBuildError(
            f"{kind}: every {every} is larger than size {size}: rows between would be in no window; drop them by a filter before"
        )
    if time is None and (given["lateness"] != 0 or late != "drop"):
        raise PipelineBuildError(
            f"{kind}: rows that are counted are never late; lateness and late need time="
        )
    if time is not None and given.get("drop_last"):
        raise PipelineBuildError(f"{kind}: drop_last is for windows of rows, and this one is over {time!r}")
    if late == "update" and kind == "session":
        raise PipelineBuildError(
            "session: late='update' is not possible: a late row may join two sessions that are out"
        )
    if late not in ("drop", "update") and not isinstance(late, DeadLetterPolicy) and not callable(late):
        raise PipelineBuildError(
            f"{kind}: late is {late!r}, must be 'drop', 'update', dsline.dead_letter('file://...') or a function"
        )
    return WindowSpec(kind, **given)


def _length(kind: str, what: str, value: Any, time: str | None, zero: bool = False) -> Length:
    """Check a length and bring it into a form that JSON can hold: an int, or a text with a unit."""
    result: Length
    if isinstance(value, int | np.integer) and not isinstance(value, bool | np.timedelta64):
        result, number = int(value), int(value)
    else:
        number = nanoseconds(f"{kind}: {what}", value)
        result = value.strip() if isinstance(value, str) else f"{number}ns"
        if time is None:
            raise PipelineBuildError(
                f"{kind}: {what} is {value!r}, and time= does not say which column has the times"
            )
    if number < 0 or (number == 0 and not zero):
        raise PipelineBuildError(f"{kind}: {what} is {value!r}, must be larger than 0")
    if number > HIGHEST // 4:
        raise PipelineBuildError(f"{kind}: {what} is {value!r}, which does not fit into the range of times")
    return result


def nanoseconds(what: str, value: Any) -> int:
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


class Clock:
    """Between a column of times and int64 ticks: its own units; nanoseconds for floats."""

    def __init__(self, name: str, dtype: DType, unit: str | None) -> None:
        self.name = name
        self.dtype = dtype
        self.kind = dtype.kind
        self._one = 1  # ticks of an int
        if dtype.kind == "M":
            letters, count = np.datetime_data(dtype)
            if unit is not None:
                raise PipelineBuildError(
                    f"time column {name!r} is {dtype}, which has its unit; leave unit={unit!r} out"
                )
            if letters not in _DATETIME_NS:
                raise PipelineBuildError(
                    f"time column {name!r} is {dtype}, must have a unit from weeks to ns"
                )
            self.tick_ns = _DATETIME_NS[letters] * count
            self.out = dtype.newbyteorder("=")
        elif dtype.kind in "iu":
            self.tick_ns = _NS[unit or "ns"]
            self.out = INT64
        elif dtype.kind == "f":
            self.tick_ns = 1
            self._one = _NS[unit or "s"]
            self.out = np.dtype(np.float64)
        else:
            raise PipelineBuildError(
                f"time column {name!r} is {dtype}, must be datetime64, integers or floats"
            )

    def length(self, what: str, value: Length) -> int:
        """Ticks of a length."""
        if isinstance(value, int):
            ticks = value * self._one
        else:
            ticks, rest = divmod(nanoseconds(what, value), self.tick_ns)
            if rest:
                raise PipelineBuildError(
                    f"{what} is {value!r}, which is no whole number of the units of column {self.name!r} "
                    f"({self.dtype}, {self.tick_ns} ns)"
                )
        if ticks > HIGHEST // 4:
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
            if ticks.min() == LOWEST:  # NaT
                self._fail(column, ticks == LOWEST)
            return ticks
        if self.dtype.itemsize == 8 and self.kind == "u" and column.max() > HIGHEST:
            self._fail(column, column > HIGHEST)
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
