"""Windows over time, over rows and over sessions, and the router that splits a stream by key.

spec = sliding("10s", every="1s", time="ts", lateness="200ms")
Window(spec, key="sensor", mean=agg.mean("temperature"), n=agg.count())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np

from dsline.dataflow.aggregates import Aggregate
from dsline.dataflow.callables import function_name, reference, resolve
from dsline.dataflow.grouping import hash_keys, mix, starts_of
from dsline.dataflow.operator import Context, Operator, Router, Schema
from dsline.dataflow.window_specs import WindowSpec, session, sliding, tumbling
from dsline.dataflow.window_steps import (
    CountStep,
    Layout,
    SessionStep,
    TimeStep,
    WindowStep,
    dtypes_of_schema,
    text_of,
)
from dsline.errors import OperatorError, PipelineBuildError
from dsline.specs import ArraySpec

__all__ = [
    "KeyBy",
    "Window",
    "WindowSpec",
    "WindowStep",
    "hash_keys",
    "key_by",
    "session",
    "sliding",
    "tumbling",
    "window",
]

Array: TypeAlias = np.ndarray[Any, Any]

_FEW_PARTITIONS: Final = 8  # so many comparisons are faster than a sort
_OPTIONS: Final = ("key", "max_open", "flag_partial")


def names_of(key: Any, what: str) -> tuple[str, ...]:
    """The names of key columns."""
    names = (key,) if isinstance(key, str) else key
    if (
        isinstance(names, list | tuple)
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names)
    ):
        return tuple(names)
    raise PipelineBuildError(f"{what} is {key!r}, must be the name of a column, or several names")


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
    An item is records, columns or a dict of numbers, and what comes out is the same kind of thing: the windows that an item has
    closed are one item (dicts come one by one), sorted by end and key; docs/dataflow/operators/window.md has all of it. Copies what it keeps; nothing refers to the input afterwards.

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
        max_open: Any = 100_000,
        flag_partial: bool = False,
        **aggregates: Aggregate,
    ) -> None:
        if not isinstance(spec, WindowSpec):
            raise PipelineBuildError(f"window takes tumbling(…), sliding(…) or session(…), not {spec!r}")
        for name, value in zip(_OPTIONS, (key, max_open, flag_partial), strict=True):
            if isinstance(value, Aggregate):
                raise PipelineBuildError(f"window: {name!r} is an option, so no result can have that name")
        self.spec = spec
        self.key = names_of(key, "window: key")
        self.max_open = max_open
        self.flag_partial = flag_partial
        self.aggregates = aggregates
        if isinstance(max_open, bool) or not isinstance(max_open, int) or max_open < 1:
            raise PipelineBuildError(f"window: max_open is {max_open!r}, must be an int of 1 or more")
        if not aggregates:
            raise PipelineBuildError("window: nothing to compute; name results, like n=agg.count()")
        if {"window_start", "window_end"} & set(self.key):
            raise PipelineBuildError(
                f"window: the result has columns window_start and window_end, and the key is {', '.join(self.key)}; rename "
                "it by derive before the window"
            )
        taken = {"window_start", "window_end", *self.key}
        taken |= {"revision"} if spec.late == "update" else set()
        taken |= {"partial"} if flag_partial else set()
        for name, aggregate in aggregates.items():
            if not isinstance(aggregate, Aggregate):
                raise PipelineBuildError(
                    f"window: {name} is {aggregate!r}, must be an aggregate like agg.mean('column')"
                )
            if name in taken:
                raise PipelineBuildError(
                    f"window: the result has a column {name!r} already; use another name"
                )

    def start(self, context: Context) -> WindowStep:
        if self.spec.kind == "session":
            return SessionStep(self, context)
        return CountStep(self, context) if self.spec.time is None else TimeStep(self, context)

    def check(self, schema: Schema) -> Schema:
        if schema is None:
            return None
        form, dtypes = dtypes_of_schema(schema)
        layout = Layout(self, form, dict, dtypes)
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
    The partition follows from `hash_keys` of the key and `partitions`: the same in every process and every run. An item with rows for
    several partitions is split, which copies the rows; one that belongs to one partition passes as it is. Missing keys (NaN,
    NaT) are keys like others.
    """

    kind: ClassVar[str] = "key_by"

    def __init__(self, key: Any, partitions: int | None = None) -> None:
        self.key = key if callable(key) else names_of(key, "key_by: key")
        count: Any = 1 if partitions is None else partitions
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 4096:
            raise PipelineBuildError(f"key_by: partitions is {partitions!r}, must be an int from 1 to 4096")
        if not self.key:
            raise PipelineBuildError(
                f"key_by: key is {key!r}, must be a column, several columns, or a function"
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
                hashes = mix(hashes * np.uint64(31) + hash_keys(column))
        except TypeError as error:
            raise OperatorError(f"key_by {self._name()}: {error}") from None
        # The upper half of the hash times the number of partitions; the upper half of that is even over all of them.
        parts = ((hashes >> np.uint64(32)) * np.uint64(self.partitions) >> np.uint64(32)).astype(np.uint16)
        if len(parts) == 0:
            return ()
        if (parts == parts[0]).all():
            return ((int(parts[0]), item),)
        if self.partitions <= _FEW_PARTITIONS:
            rows = [(number, np.flatnonzero(parts == number)) for number in range(self.partitions)]
            return [(number, _take_rows(item, found)) for number, found in rows if len(found)]
        order = np.argsort(parts, kind="stable")
        starts = starts_of(parts[order])
        return [
            (int(parts[order[start]]), _take_rows(item, order[start:end]))
            for start, end in zip(starts, np.append(starts[1:], len(order)), strict=True)
        ]

    def _columns(self, item: Any) -> list[Array]:
        """Return the keys of the rows, or of the item as one row."""
        if callable(self.key):
            key = self.key(item)
            if isinstance(key, np.ndarray) and key.ndim:
                if key.ndim != 1 or len(key) != _rows_of(item):
                    raise OperatorError(
                        f"key_by {self._name()}: the function returned {text_of(key)} for {text_of(item)}; must be one key, or an "
                        "array with one per row"
                    )
                return [key]
            return [np.asarray([part]) for part in (key if isinstance(key, tuple) else (key,))]
        if not isinstance(item, Mapping) and getattr(getattr(item, "dtype", None), "names", None) is None:
            raise OperatorError(
                f"key_by {self._name()} takes records, columns or dicts, not {text_of(item)}; use a function"
            )
        columns = []
        for name in self.key:
            try:
                columns.append(np.atleast_1d(item[name]))
            except (KeyError, ValueError):
                raise OperatorError(f"key_by: there is no column {name!r} in {text_of(item)}") from None
        return columns

    def _name(self) -> str:
        return function_name(self.key) if callable(self.key) else ", ".join(self.key)

    def check(self, schema: Schema) -> Schema:
        if schema is None or callable(self.key):
            return schema
        _, dtypes = dtypes_of_schema(schema)
        for name in self.key:
            if name not in dtypes:
                raise PipelineBuildError(
                    f"there is no key column {name!r}; there are: {', '.join(dtypes) or 'none'}"
                )
            if dtypes[name].kind not in "biufmMSU":
                raise PipelineBuildError(
                    f"key column {name!r} is {dtypes[name]}, must be numbers, times or texts"
                )
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
    return type(item)({name: column.take(rows, axis=0) for name, column in item.items()})


def window(spec: WindowSpec, **aggregates: Any) -> Window:
    """Make a `Window`; `key`, `max_open` and `flag_partial` are its options, all others are results."""
    return Window(spec, **aggregates)


def key_by(key: Any, *, partitions: int | None = None) -> KeyBy:
    """Make a `KeyBy`."""
    return KeyBy(key, partitions)
