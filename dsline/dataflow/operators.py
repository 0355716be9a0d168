"""The operators with one input: what they are, and the steps that run them.

Every description is a frozen dataclass: checked where it is made, compared by its fields, and written to JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import importlib.util
import inspect
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import GeneratorType
from typing import Any, ClassVar, Final, Never, TypeAlias

import numpy as np

from dsline.dataflow import callables, items
from dsline.dataflow.callables import function_name
from dsline.dataflow.items import COLUMNS, FRAME, OBJECT, RECORDS, Batch, Columns
from dsline.dataflow.operator import Context, Emit, MergeStep, Operator, Router, Schema, Step
from dsline.errors import ExpressionError, OperatorError, PipelineBuildError
from dsline.expressions import Expression
from dsline.specs import ArraySpec

__all__ = [
    "BatchRows",
    "Branch",
    "Broadcast",
    "Derive",
    "Filter",
    "FilterBatches",
    "Map",
    "MapBatches",
    "Merge",
    "RateLimit",
    "Select",
    "Unbatch",
    "function_from_json",
    "function_to_json",
    "operator_from_json",
    "parse_seconds",
    "register",
]

Array: TypeAlias = np.ndarray[Any, Any]
DType: TypeAlias = np.dtype[Any]

SAME: Final = "same"
NUMBER: Final = "x"  # what an expression calls an item that is a number

# --- plain values -------------------------------------------------------------------------------------------------------

_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s|min|m|h|d)\s*")


def parse_seconds(value: Any, name: str) -> float:
    """Read a duration: seconds, a text like "10ms", "1.5s", "2min", "1h", or a timedelta.

    Raises
    ------
    PipelineBuildError
        It is none of them, negative or not finite.
    """
    if isinstance(value, datetime.timedelta):
        value = value.total_seconds()
    if isinstance(value, str):
        found = _DURATION.fullmatch(value)
        seconds = float(found.group(1)) * _UNITS[found.group(2)] if found else -1.0
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise PipelineBuildError(
            f"{name} is {value!r}, must be seconds, or a text like '10ms', '1.5s', '2min'"
        )
    return seconds


def _seconds_text(seconds: float) -> str:
    return f"{seconds * 1000:g} ms" if seconds < 1 else f"{seconds:g} s"


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise PipelineBuildError unless the value is a whole number of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PipelineBuildError(f"{name} is {value!r}, must be a whole number, {least} or more")


def function_to_json(fn: Any) -> dict[str, Any]:
    """Return {"function": "module:qualname"}; of a partial with its arguments.

    Raises
    ------
    PipelineBuildError
        No text stands for it: a lambda, a function inside of a function or of the main program, an object.
    """
    if isinstance(fn, functools.partial):
        data = function_to_json(fn.func)
        if "args" in data or "kwargs" in data:
            raise PipelineBuildError(
                f"a partial of a partial ({function_name(fn)}) cannot be written to JSON"
            )
        data["args"] = [to_plain(value) for value in fn.args]
        data["kwargs"] = {key: to_plain(value) for key, value in fn.keywords.items()}
        return data
    return {"function": f"numpy:{fn.__name__}" if isinstance(fn, np.ufunc) else callables.reference(fn)}


def function_from_json(data: Mapping[str, Any]) -> Any:
    """Return the function that `function_to_json` wrote. Imports its module."""
    fn = callables.resolve(data["function"])
    if "args" not in data:
        return fn
    return functools.partial(
        fn,
        *map(from_plain, data["args"]),
        **{key: from_plain(value) for key, value in data["kwargs"].items()},
    )


def to_plain(value: Any) -> Any:
    """Return a value of a description as JSON has it.

    Raises
    ------
    PipelineBuildError
        JSON has nothing for it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, ArraySpec | Columns):
        return {"schema": items.schema_to_json(value)}
    if isinstance(value, tuple | list):
        return [to_plain(one) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: to_plain(one) for key, one in value.items()}}
    if callable(value):
        return function_to_json(value)
    raise PipelineBuildError(f"{value!r} cannot be written to JSON")


def from_plain(value: Any) -> Any:
    """Return the value that `to_plain` wrote. Lists come back as tuples."""
    if isinstance(value, list):
        return tuple(map(from_plain, value))
    if isinstance(value, dict):
        if "function" in value:
            return function_from_json(value)
        if "schema" in value:
            return items.schema_from_json(value["schema"])
        return {key: from_plain(one) for key, one in value["dict"].items()}
    return value


_KINDS: dict[str, Any] = {}


def register(cls: Any) -> Any:
    """Let `operator_from_json` make this class: a dataclass, or one with a classmethod from_json(data)."""
    _KINDS[cls.kind] = cls
    return cls


def operator_from_json(data: Mapping[str, Any]) -> Operator:
    """Return the operator that its `to_json` wrote. Imports the modules of its functions.

    Raises
    ------
    PipelineBuildError
        An unknown operator or parameter, a function that is not there.
    """
    kind = data.get("op")
    if kind not in _KINDS:
        # Those of other modules are registered when these are imported.
        for module in ("merging", "windows"):
            name = f"dsline.dataflow.{module}"
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
    cls = _KINDS.get(str(kind))
    if cls is None:
        raise PipelineBuildError(f"there is no operator {kind!r}; there are: {', '.join(sorted(_KINDS))}")
    if hasattr(cls, "from_json"):
        made: Operator = cls.from_json(data)
        return made
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    given = {name: value for name, value in data.items() if name != "op"}
    unknown = sorted(set(given) - names)
    if unknown:
        raise PipelineBuildError(
            f"operator {kind!r} has no {unknown[0]!r}; it has {', '.join(sorted(names))}"
        )
    operator: Operator = cls(**{name: from_plain(value) for name, value in given.items()})
    return operator


class PlainOperator(Operator):
    """A dataclass whose fields say everything."""

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"op": self.kind}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.init and not (value is field.default or (value == field.default and value is not None)):
                data[field.name] = to_plain(value)
        return data


def fail(context: Context, why: str) -> Never:
    """Raise an OperatorError that names the stage."""
    raise OperatorError(f"stage {context.stage!r}: {why}")


# --- functions ----------------------------------------------------------------------------------------------------------


def check_function(fn: Any, what: str) -> None:
    """Raise PipelineBuildError for what cannot be called with an item."""
    callables.check_callable(fn)
    target = _call_of(fn)
    if inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target):
        raise PipelineBuildError(
            f"{what} {function_name(fn)} is asynchronous, and stages call plain functions"
        )


def _class_of(fn: Any) -> Any:
    """Return the class that `callables.instantiate` makes an object of; None for a function."""
    if not callables.is_class(fn):
        return None
    return fn.func if isinstance(fn, functools.partial) else fn


def _call_of(fn: Any) -> Any:
    """Return the function that gets the items."""
    cls = _class_of(fn)
    return fn if cls is None else cls.__call__


def _takes_out(fn: Any) -> bool:
    is_bound = isinstance(fn, functools.partial) and "out" in fn.keywords
    return not is_bound and callables.accepts_out(fn)


def _needs_out(fn: Any) -> bool:
    if isinstance(fn, np.ufunc) or not _takes_out(fn):
        return False
    parameter = inspect.signature(_call_of(fn)).parameters["out"]
    return parameter.default is parameter.empty


class _FunctionStep(Step):
    """A step around a user's function, or an object of a user's class that is constructed here."""

    def __init__(self, fn: Any, context: Context) -> None:
        self.context = context
        self._is_own = callables.is_class(fn)
        self.function: Callable[..., Any] = callables.instantiate(fn)

    def state_dict(self) -> Any:
        method = getattr(self.function, "state_dict", None)
        return None if method is None else method()

    def load_state_dict(self, state: Any) -> None:
        method = getattr(self.function, "load_state_dict", None)
        if method is not None and state is not None:
            method(state)

    def close(self) -> None:
        if self._is_own:
            callables.close(self.function)


def _is_stateful(fn: Any) -> bool:
    return hasattr(_class_of(fn) or fn, "state_dict")


# --- map ----------------------------------------------------------------------------------------------------------------


@register
@dataclasses.dataclass(frozen=True)
class Map(PlainOperator):
    """Call a function with each item; see `dsline.ops.map`."""

    kind: ClassVar[str] = "map"
    function: Any
    returns: Any = None

    def __post_init__(self) -> None:
        check_function(self.function, "function")
        object.__setattr__(self, "returns", _returns(self.returns))
        if self.returns is None and _needs_out(self.function):
            raise PipelineBuildError(
                f"{function_name(self.function)} has to be given out=, so returns= must say what it is: an ArraySpec, or 'same'"
            )
        if isinstance(self.returns, Columns) and _needs_out(self.function):
            raise PipelineBuildError("out= is one array, and returns= are Columns; give an ArraySpec")
        object.__setattr__(self, "stateful", _is_stateful(self.function))

    def start(self, context: Context) -> Step:
        return _MapStep(self.function, self.returns, context)

    def check(self, schema: Schema) -> Schema:
        if self.returns == SAME:
            return schema
        returns: Schema = self.returns
        return returns

    def describe(self) -> str:
        returns = "" if self.returns is None else f" -> {self.returns}"
        return f"{self.kind} {function_name(self.function)}{returns}"


def _returns(given: Any) -> Any:
    if given is None or given == SAME or isinstance(given, ArraySpec | Columns):
        return given
    if isinstance(given, np.dtype) and given.names is not None:
        return ArraySpec((None,), given)
    if isinstance(given, Mapping):
        return Columns(given)
    raise PipelineBuildError(
        f"returns is {given!r}, must be an ArraySpec, Columns, a structured dtype, 'same' or None"
    )


class _MapStep(_FunctionStep):
    def __init__(self, fn: Any, returns: Any, context: Context) -> None:
        super().__init__(fn, context)
        self._returns = returns
        self._gives_out = returns is not None and not isinstance(returns, Columns) and _takes_out(fn)

    def process(self, item: Any, emit: Emit) -> None:
        if self._returns is None:
            result = self.function(item)
            if result is None:
                return
            if type(result) is not GeneratorType:
                emit(result)
                return
        elif self._gives_out:
            result = self.function(item, out=self._out_for(item))
            if result is None:
                fail(
                    self.context,
                    "the function was given out= and returned None; return out, or what is to be sent instead (items are "
                    "dropped by a filter)",
                )
        else:
            result = self.function(item)
        if type(result) is GeneratorType:
            for one in result:
                if one is not None:
                    self._check(one, item)
                    emit(one)
        elif result is not None:
            self._check(result, item)
            emit(result)

    def _out_for(self, item: Any) -> Array:
        if self._returns == SAME:
            if not isinstance(item, np.ndarray):
                fail(self.context, f"returns='same' with out= takes arrays, and {items.item_text(item)} came")
            shape: tuple[Any, ...] = item.shape
            dtype = item.dtype
            order = "C"
        else:
            shape, dtype, order = self._returns.shape, self._returns.dtype, self._returns.order
            if None in shape:
                shape = self._closed(shape, item)
        if self.context.allocate is not None and order == "C":
            out: Array = self.context.allocate(shape, dtype)
            return out
        return np.empty(shape, dtype, order)  # type: ignore[call-overload, no-any-return]

    def _closed(self, shape: tuple[Any, ...], item: Any) -> tuple[int, ...]:
        """Open dimensions are as long as those of the item."""
        given = item.shape if isinstance(item, np.ndarray) else (items.rows_of(item),)
        for axis, length in enumerate(shape):
            if length is None and axis >= len(given):
                fail(
                    self.context,
                    f"axis {axis} of returns={self._returns} is open, and {items.item_text(item)} has no such axis",
                )
        return tuple(given[axis] if length is None else length for axis, length in enumerate(shape))

    def _check(self, result: Any, item: Any) -> None:
        if self._returns is None:
            return
        declared = items.schema_of(item) if self._returns == SAME else self._returns
        if not items.matches(declared, result):
            fail(
                self.context,
                f"the function returned {items.item_text(result)}, and returns= declares {items.schema_text(declared)}",
            )


# --- expressions --------------------------------------------------------------------------------------------------------


def expression_columns(item: Any) -> dict[str, Any] | None:
    """Return what expressions may use of an item, by name; None where it has nothing with names."""
    if isinstance(item, Batch):
        return item._columns
    if items.is_records(item):
        return {name: item[name] for name in item.dtype.names}
    if isinstance(item, dict):
        return item
    if isinstance(item, bool | int | float | np.number | np.bool_):
        return {NUMBER: item}
    return None


_TYPES: Final[dict[type, DType]] = {
    bool: np.dtype(bool),
    int: np.dtype(np.int64),
    float: np.dtype(np.float64),
}


def _dtype_of_value(value: Any) -> DType:
    found = _TYPES.get(type(value))
    if found is not None:
        return found
    dtype = getattr(value, "dtype", None)
    return dtype if isinstance(dtype, np.dtype) else np.dtype(object)


class CompiledText:
    """The text of an expression, compiled for the dtypes that come. Compiles anew only where they change."""

    def __init__(self, text: str, context: Context) -> None:
        self._text = text
        self._context = context
        self._current: Expression | None = None
        self._known: dict[tuple[DType, ...], Expression] = {}

    def run(self, columns: Any, method: Callable[[Expression, Any], Any]) -> Any:
        """Return method(expression, columns) for the expression of these columns: a mapping, or records."""
        try:
            if self._current is not None:
                try:
                    return method(self._current, columns)
                except ExpressionError:
                    pass  # of other dtypes, or wrong: that is found out below
            self._current = self._compile(columns)
            return method(self._current, columns)
        except ValueError as error:
            fail(self._context, str(error))

    def _compile(self, columns: Any) -> Expression:
        dtypes = _dtypes_of(columns)
        if self._current is not None and all(name in dtypes for name in self._current.names):
            known = self._known.get(tuple(dtypes[name] for name in self._current.names))
            if known is not None:
                return known
        made = Expression(self._text, dtypes)
        if len(self._known) >= 64:
            self._known.clear()
        self._known[tuple(dtypes[name] for name in made.names)] = made
        return made


def _dtypes_of(columns: Any) -> dict[str, DType]:
    if isinstance(columns, np.ndarray):
        fields = columns.dtype.fields
        assert fields is not None
        return {name: field[0] for name, field in fields.items()}
    return {name: _dtype_of_value(value) for name, value in columns.items() if isinstance(name, str)}


def _check_text(text: Any, what: str) -> None:
    """Refuse what is no expression whatever the columns are."""
    if not isinstance(text, str) or not text.strip():
        raise PipelineBuildError(f"{what} is {text!r}, must be an expression")


def _no_columns(item: Any) -> str:
    return (
        f"an expression works on records, columns, dicts of numbers and numbers (called {NUMBER!r}), and "
        f"{items.item_text(item)} came; use a function"
    )


def _schema_columns(schema: Schema, what: str) -> dict[str, DType] | None:
    """Return the columns of a schema; None where it is not known. Raises PipelineBuildError for frames."""
    columns = items.columns_of_schema(schema)
    if schema is not None and columns is None:
        raise PipelineBuildError(
            f"{what} works on records and columns, and the items are {items.schema_text(schema)}; use a function"
        )
    return columns


@register
@dataclasses.dataclass(frozen=True)
class Filter(PlainOperator):
    """Keep items, or the rows of items, for which a predicate is true; see `dsline.ops.filter`."""

    kind: ClassVar[str] = "filter"
    predicate: Any

    def __post_init__(self) -> None:
        _check_predicate(self.predicate, "the predicate")
        object.__setattr__(
            self, "stateful", not isinstance(self.predicate, str) and _is_stateful(self.predicate)
        )

    def start(self, context: Context) -> Step:
        if isinstance(self.predicate, str):
            return _ExpressionFilterStep(self.predicate, context)
        return _FunctionFilterStep(self.predicate, context)

    def check(self, schema: Schema) -> Schema:
        check_predicate_columns(self.predicate, schema)
        return schema if items.kind_of_schema(schema) != RECORDS else _open(schema)

    def describe(self) -> str:
        return f"filter {predicate_text(self.predicate)}"


def _open(schema: Schema) -> Schema:
    """The schema of any number of such records."""
    assert isinstance(schema, ArraySpec)
    return ArraySpec((None,), schema.dtype)


def _check_predicate(predicate: Any, what: str) -> None:
    if isinstance(predicate, str):
        _check_text(predicate, what)
    else:
        check_function(predicate, what)


def check_predicate_columns(predicate: Any, schema: Schema) -> None:
    """Raise PipelineBuildError for an expression that items of this schema cannot be filtered by."""
    if not isinstance(predicate, str):
        return
    columns = _schema_columns(schema, f"the expression {predicate!r}")
    if columns is not None and not Expression(predicate, columns).is_filter:
        raise PipelineBuildError(f"a filter needs a truth value, and {predicate!r} gives a number")


def predicate_text(predicate: Any) -> str:
    """Return an expression, or the name of a function."""
    return predicate if isinstance(predicate, str) else function_name(predicate)


class _ExpressionFilterStep(Step):
    def __init__(self, text: str, context: Context) -> None:
        self._context = context
        self._compiled = CompiledText(text, context)

    def process(self, item: Any, emit: Emit) -> None:
        if type(item) is Batch:
            columns = self._compiled.run(item._columns, Expression.filter)
            rows = len(next(iter(columns.values())))
            if rows:
                emit(Batch._of(columns, rows))
            return
        if items.is_records(item):
            kept = self._compiled.run(item, _filter_records)
            if len(kept):
                emit(kept)
            return
        columns = expression_columns(item)
        if columns is None:
            fail(self._context, _no_columns(item))
        if self._compiled.run(columns, _truth):
            emit(item)


def _filter_records(expression: Expression, records: Array) -> Any:
    return expression.filter(records)


def _truth(expression: Expression, row: Any) -> bool:
    if not expression.is_filter:
        raise ExpressionError(
            f"a filter needs a truth value, and {expression.text!r} gives {expression.dtype}"
        )
    return bool(expression(row))


class _FunctionFilterStep(_FunctionStep):
    def process(self, item: Any, emit: Emit) -> None:
        kept = split_by(item, self.function(item), self.context)[0]
        if kept is not None:
            emit(kept)


def split_by(item: Any, answer: Any, context: Context) -> tuple[Any, Any]:
    """Return what a predicate's answer keeps of an item, and the rest; None for nothing."""
    if not isinstance(answer, np.ndarray) or answer.ndim == 0:
        return (item, None) if answer else (None, item)
    if (
        items.kind_of(item) in (FRAME, OBJECT)
        or answer.shape != (items.rows_of(item),)
        or answer.dtype != bool
    ):
        fail(
            context,
            f"the predicate returned {items.item_text(answer)} for {items.item_text(item)}: it must return one truth value, "
            "or for records and columns one for each row",
        )
    chosen = np.flatnonzero(answer)
    if len(chosen) == len(answer):
        return item, None
    if not len(chosen):
        return None, item
    return items.take(item, chosen), items.take(item, np.flatnonzero(~answer))


def pairs_of(given: Any, what: str) -> tuple[tuple[str, Any], ...]:
    """Return names and values of a mapping or of pairs, checked."""
    pairs = tuple(given.items()) if isinstance(given, Mapping) else tuple(tuple(pair) for pair in given)
    if not pairs:
        raise PipelineBuildError(f"{what} needs one name at least")
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str) or not pair[0]:
            raise PipelineBuildError(f"{what} got {pair!r}, must be a name and a value")
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise PipelineBuildError(f"{what} got {name!r} twice")
    return pairs


@register
@dataclasses.dataclass(frozen=True)
class Derive(PlainOperator):
    """Add columns that expressions give; see `dsline.ops.derive`."""

    kind: ClassVar[str] = "derive"
    expressions: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "expressions", pairs_of(self.expressions, "derive"))
        for name, text in self.expressions:
            _check_text(text, f"the expression of {name!r}")

    def start(self, context: Context) -> Step:
        return _DeriveStep(self.expressions, context)

    def check(self, schema: Schema) -> Schema:
        columns = _schema_columns(schema, "derive")
        if columns is None:
            return None
        for name, text in self.expressions:
            columns[name] = Expression(text, columns).dtype
        if isinstance(schema, ArraySpec):
            return ArraySpec(schema.shape, _structure(columns, schema.dtype))
        return Columns(columns)

    def describe(self) -> str:
        return "derive " + ", ".join(f"{name} = {text}" for name, text in self.expressions)


def _structure(columns: Mapping[str, DType], like: DType) -> DType:
    return np.dtype([(name, dtype) for name, dtype in columns.items()], align=like.isalignedstruct)


class _DeriveStep(Step):
    def __init__(self, expressions: tuple[tuple[str, str], ...], context: Context) -> None:
        self._context = context
        self._compiled = [(name, CompiledText(text, context)) for name, text in expressions]
        self._structures: dict[tuple[DType, ...], DType] = {}

    def process(self, item: Any, emit: Emit) -> None:
        given = expression_columns(item)
        if given is None or not isinstance(item, np.ndarray | Batch | dict):
            fail(self._context, _no_columns(item))
        columns = dict(given)
        for name, compiled in self._compiled:
            columns[name] = compiled.run(columns, Expression.__call__)
        if isinstance(item, Batch):
            emit(Batch._of(columns, item._rows))
        elif isinstance(item, dict):
            emit(columns)
        else:
            emit(self._packed(item, columns))

    def _packed(self, item: Array, columns: dict[str, Array]) -> Array:
        key = (item.dtype, *(columns[name].dtype for name, _ in self._compiled))
        dtype = self._structures.get(key)
        if dtype is None:
            fields = item.dtype.fields
            assert fields is not None
            changed = {name for name, _ in self._compiled}
            dtype = _structure(
                {
                    name: column.dtype if name in changed else fields[name][0]
                    for name, column in columns.items()
                },
                item.dtype,
            )
            self._structures[key] = dtype
        return packed(columns, dtype, len(item), self._context)


def packed(columns: Mapping[str, Array], dtype: DType, rows: int, context: Context) -> Array:
    """Return the columns as records, in the output slot where there is one."""
    allocate = context.allocate
    records: Array = np.empty(rows, dtype) if allocate is None else allocate((rows,), dtype)
    for name, column in columns.items():
        records[name] = column
    return records


@register
@dataclasses.dataclass(frozen=True)
class Select(PlainOperator):
    """Keep some columns, under the same or other names; see `dsline.ops.select`."""

    kind: ClassVar[str] = "select"
    columns: Any  # (new name, old name) each

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", pairs_of(self.columns, "select"))
        for new, old in self.columns:
            if not isinstance(old, str) or not old:
                raise PipelineBuildError(f"select got {old!r} for {new!r}, must be the name of a column")

    def start(self, context: Context) -> Step:
        return _SelectStep(self.columns, context)

    def check(self, schema: Schema) -> Schema:
        columns = _schema_columns(schema, "select")
        if columns is None:
            return None
        for _, old in self.columns:
            if old not in columns:
                raise PipelineBuildError(f"there is no column {old!r}; there are: {', '.join(columns)}")
        chosen = {new: columns[old] for new, old in self.columns}
        if isinstance(schema, ArraySpec):
            return ArraySpec(schema.shape, _structure(chosen, schema.dtype))
        return Columns(chosen)

    def describe(self) -> str:
        return "select " + ", ".join(new if new == old else f"{new} = {old}" for new, old in self.columns)


class _SelectStep(Step):
    def __init__(self, columns: tuple[tuple[str, str], ...], context: Context) -> None:
        self._context = context
        self._columns = columns
        self._structures: dict[DType, DType] = {}

    def process(self, item: Any, emit: Emit) -> None:
        given = expression_columns(item)
        if given is None or not isinstance(item, np.ndarray | Batch | dict):
            fail(
                self._context, f"select works on records, columns and dicts, and {items.item_text(item)} came"
            )
        try:
            chosen = {new: given[old] for new, old in self._columns}
        except KeyError as error:
            fail(
                self._context,
                f"there is no column {error.args[0]!r}; there are: {', '.join(map(str, given))}",
            )
        if isinstance(item, Batch):
            emit(Batch._of(chosen, item._rows))
        elif isinstance(item, dict):
            emit(chosen)
        else:
            emit(packed(chosen, self._structure(item.dtype), len(item), self._context))

    def _structure(self, dtype: DType) -> DType:
        known = self._structures.get(dtype)
        if known is None:
            assert dtype.fields is not None
            known = _structure({new: dtype.fields[old][0] for new, old in self._columns}, dtype)
            self._structures[dtype] = known
        return known


# --- batches ------------------------------------------------------------------------------------------------------------


@register
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
        return _open(schema) if isinstance(schema, ArraySpec) else Columns(schema)

    def describe(self) -> str:
        linger = "" if self.linger is None else f" or {_seconds_text(self.linger)}"
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


@register
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
    batch: int = 256
    linger: Any = "10ms"

    def __post_init__(self) -> None:
        check_function(self.function, "function")
        check_whole("batch", self.batch, 1)
        if self.linger is not None:
            object.__setattr__(self, "linger", parse_seconds(self.linger, "linger"))
        object.__setattr__(self, "stateful", _is_stateful(self.function))

    def _inner(self, context: Context) -> Step:
        raise NotImplementedError

    @property
    def _gather(self) -> BatchRows:
        return BatchRows(self.batch, self.linger)

    def start(self, context: Context) -> Step:
        return _OnBatchesStep(self._gather, self._inner(context), context)

    def describe(self) -> str:
        linger = "" if self.linger is None else f" or {_seconds_text(self.linger)}"
        return f"{self.kind} {function_name(self.function)}, {self.batch} rows{linger}"


@register
@dataclasses.dataclass(frozen=True)
class MapBatches(_OnBatches):
    """Call a function with batches of rows; see `dsline.ops.map_batches`."""

    kind: ClassVar[str] = "map_batches"
    returns: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "returns", Map(self.function, self.returns).returns)

    def _inner(self, context: Context) -> Step:
        return Map(self.function, self.returns).start(context)

    def check(self, schema: Schema) -> Schema:
        return Map(self.function, self.returns).check(self._gather.check(schema))


@register
@dataclasses.dataclass(frozen=True)
class FilterBatches(_OnBatches):
    """Keep the rows of batches for which a function is true; see `dsline.ops.filter_py_batch`."""

    kind: ClassVar[str] = "filter_batches"

    def _inner(self, context: Context) -> Step:
        return _RowsFilterStep(self.function, context)

    def check(self, schema: Schema) -> Schema:
        return self._gather.check(schema)


class _RowsFilterStep(_FunctionStep):
    def process(self, item: Any, emit: Emit) -> None:
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


# --- rate ---------------------------------------------------------------------------------------------------------------


@register
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
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._interval = 1.0 / operator.per_second
        self._ahead = (operator.burst - 1) * self._interval
        self._full = operator.full
        self._context = context
        self._clock = clock
        self._sleep = sleep
        self._full_at = -math.inf  # theoretical arrival time
        self._waiting: list[Any] = []

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
        self.tick(emit)
        if self._waiting and self._full == "block":
            self._wait(emit)
        if not self._waiting and self._take_token():
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
                self._sleep(max(1e-6, self._full_at - self._ahead - self._clock()))

    def finish(self, emit: Emit) -> None:
        self._wait(emit)

    def state_dict(self) -> Any:
        return [_kept(item) for item in self._waiting] or None

    def load_state_dict(self, state: Any) -> None:
        self._waiting = list(state or ())


def _kept(item: Any) -> Any:
    return item.copy() if isinstance(item, np.ndarray | Batch) else item


# --- several outputs ----------------------------------------------------------------------------------------------------


@register
@dataclasses.dataclass(frozen=True)
class Branch(Router, PlainOperator):
    """Send each item, or each row, to the first output whose predicate is true; see `dsline.ops.branch`."""

    kind: ClassVar[str] = "branch"
    cases: Any  # (name, predicate) each; a last predicate of None takes what no other one does
    outputs: tuple[str, ...] = dataclasses.field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", pairs_of(self.cases, "branch"))
        for name, predicate in self.cases[:-1]:
            _check_predicate(predicate, f"the predicate of {name!r}")
        name, predicate = self.cases[-1]
        if predicate is not None:
            _check_predicate(predicate, f"the predicate of {name!r}")
        object.__setattr__(self, "outputs", tuple(name for name, _ in self.cases))

    def check(self, schema: Schema) -> Schema:
        for _, predicate in self.cases:
            check_predicate_columns(predicate, schema)
        return _open(schema) if items.kind_of_schema(schema) == RECORDS else schema

    def describe(self) -> str:
        return "branch " + ", ".join(
            f"{name}: {'all others' if case is None else predicate_text(case)}" for name, case in self.cases
        )

    def route(self, context: Context) -> Callable[[Any], Iterable[tuple[int, Any]]]:
        tests = [_test_of(predicate, context) for _, predicate in self.cases]

        def route(item: Any) -> Iterator[tuple[int, Any]]:
            rest = item
            for number, test in enumerate(tests):
                chosen, rest = split_by(rest, test(rest), context)
                if chosen is not None:
                    yield number, chosen
                if rest is None:
                    return
            context.count("unmatched", items.rows_of(rest))

        return route


def _test_of(predicate: Any, context: Context) -> Callable[[Any], Any]:
    if predicate is None:
        return lambda item: True
    if not isinstance(predicate, str):
        return callables.instantiate(predicate)
    compiled = CompiledText(predicate, context)

    def test(item: Any) -> Any:
        columns = expression_columns(item)
        if columns is None:
            fail(context, _no_columns(item))
        return compiled.run(columns, _truths)

    return test


def _truths(expression: Expression, columns: Any) -> Any:
    if not expression.is_filter:
        raise ExpressionError(
            f"a branch needs a truth value, and {expression.text!r} gives {expression.dtype}"
        )
    return expression(columns)


@register
@dataclasses.dataclass(frozen=True)
class Broadcast(Router, PlainOperator):
    """Send every item to every output; see `dsline.ops.broadcast`."""

    kind: ClassVar[str] = "broadcast"
    outputs: Any = 2  # names, or how many

    def __post_init__(self) -> None:
        names: Any = self.outputs
        if isinstance(names, int) and not isinstance(names, bool):
            check_whole("outputs", names, 1)
            names = tuple(str(number) for number in range(names))
        if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
            raise PipelineBuildError(f"outputs is {names!r}, must be names, or how many there are")
        if not names or len(set(names)) != len(tuple(names)):
            raise PipelineBuildError(f"outputs is {names!r}, must be one name at least, and no name twice")
        object.__setattr__(self, "outputs", tuple(names))

    def check(self, schema: Schema) -> Schema:
        return schema

    def describe(self) -> str:
        return f"broadcast to {len(self.outputs)}"

    def route(self, context: Context) -> Callable[[Any], Iterable[tuple[int, Any]]]:
        numbers = range(len(self.outputs))
        return lambda item: [(number, item) for number in numbers]


# --- several inputs -----------------------------------------------------------------------------------------------------


@register
@dataclasses.dataclass(frozen=True)
class Merge(PlainOperator):
    """Bring several inputs together; see `dsline.ops.merge`. Its steps are in `dsline.dataflow.merging`."""

    kind: ClassVar[str] = "merge"
    inputs: int
    order: Any = "arrival"
    idle: Any = None

    def __post_init__(self) -> None:
        check_whole("inputs", self.inputs, 1)
        if not callable(self.order) and (not isinstance(self.order, str) or not self.order):
            raise PipelineBuildError(
                f"order is {self.order!r}, must be 'arrival', 'zip', 'sequence', the name of a column, or a function"
            )
        if self.idle is not None:
            object.__setattr__(self, "idle", parse_seconds(self.idle, "idle"))
            if not self.by_key:
                raise PipelineBuildError(
                    f"idle= belongs to an order by a column or a function, not to {self.order!r}"
                )
        object.__setattr__(self, "holds", self.order != "arrival")

    @property
    def by_key(self) -> bool:
        """Whether rows are put in the order of a column or a function."""
        return self.order not in ("arrival", "zip", "sequence")

    def start(self, context: Context) -> MergeStep:
        from dsline.dataflow import merging

        return merging.start(self, context)

    def check(self, schema: Schema) -> Schema:
        return self.check_inputs((schema,))

    def check_inputs(self, schemas: Sequence[Schema]) -> Schema:
        """Return the schema of the output for those of the inputs.

        Raises
        ------
        PipelineBuildError
            A column to order by that is not there; rows of different dtypes, which cannot be put in one order.
        """
        if self.order == "zip":
            return None
        first = schemas[0]
        alike = all(schema == first for schema in schemas)
        if isinstance(self.order, str) and self.by_key:
            for number, schema in enumerate(schemas):
                columns = _schema_columns(schema, f"an order by the column {self.order!r}")
                if columns is None:
                    continue
                if self.order not in columns:
                    raise PipelineBuildError(
                        f"input {number} has no column {self.order!r} to order by; it has {', '.join(columns)}"
                    )
                if columns[self.order].kind not in "iufM":
                    raise PipelineBuildError(
                        f"input {number} cannot be ordered by {self.order!r}, which is {columns[self.order]}: it must be "
                        "a number or a time"
                    )
            if not alike and None not in schemas:
                raise PipelineBuildError(
                    "the inputs are of different schemas, and rows in one order must be alike: "
                    + ", ".join(map(items.schema_text, schemas))
                )
        if not alike or first is None:
            return None
        return _open(first) if items.kind_of_schema(first) == RECORDS else first

    def describe(self) -> str:
        order = self.order if isinstance(self.order, str) else function_name(self.order)
        return f"merge {self.inputs}, order {order}"
