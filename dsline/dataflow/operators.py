"""The operators that keep no rows: what they are, and the steps that run them. Those that do are in `batching`.

Every description is a frozen dataclass: checked where it is made, compared by its fields, and written to JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import GeneratorType
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np

from dsline.dataflow import callables, items
from dsline.dataflow.callables import function_name
from dsline.dataflow.descriptions import (
    FunctionStep,
    PlainOperator,
    check_function,
    check_whole,
    fail,
    is_stateful,
    needs_out,
    parse_seconds,
    takes_out,
)
from dsline.dataflow.items import FRAME, OBJECT, RECORDS, Batch, Columns
from dsline.dataflow.operator import Context, Emit, MergeStep, Router, Schema, Step
from dsline.errors import ExpressionError, PipelineBuildError
from dsline.expressions import Expression, check_text
from dsline.specs import ArraySpec

__all__ = [
    "Branch",
    "Broadcast",
    "Derive",
    "Filter",
    "Map",
    "MapStep",
    "Merge",
    "Select",
    "open_rows",
]

Array: TypeAlias = np.ndarray[Any, Any]
DType: TypeAlias = np.dtype[Any]

SAME: Final = "same"
NUMBER: Final = "x"  # what an expression calls an item that is a number

# --- map --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Map(PlainOperator):
    """Call a function with each item; see `dsline.ops.map`."""

    kind: ClassVar[str] = "map"
    function: Any
    returns: Any = None

    def __post_init__(self) -> None:
        check_function(self.function, "function")
        object.__setattr__(self, "returns", _returns(self.returns))
        if self.returns is None and needs_out(self.function):
            raise PipelineBuildError(
                f"{function_name(self.function)} has to be given out=, so returns= must say what it is: an ArraySpec, or 'same'"
            )
        if isinstance(self.returns, Columns) and needs_out(self.function):
            raise PipelineBuildError("out= is one array, and returns= are Columns; give an ArraySpec")
        object.__setattr__(self, "stateful", is_stateful(self.function))

    def start(self, context: Context) -> Step:
        return MapStep(self.function, self.returns, context)

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


class MapStep(FunctionStep):
    def __init__(self, fn: Any, returns: Any, context: Context) -> None:
        super().__init__(fn, context)
        self._returns = returns
        self._gives_out = returns is not None and not isinstance(returns, Columns) and takes_out(fn)

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
            self._several(result, item, emit)
        elif result is not None:
            self._check(result, item)
            emit(result)

    def _several(self, results: GeneratorType[Any, Any, Any], item: Any, emit: Emit) -> None:
        for one in results:
            if one is not None:
                self._check(one, item)
                emit(one)

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
        if not (_is_like(result, item) if self._returns == SAME else items.matches(self._returns, result)):
            declared = items.schema_of(item) if self._returns == SAME else self._returns
            fail(
                self.context,
                f"the function returned {items.item_text(result)}, and returns= declares {items.schema_text(declared)}",
            )


def _is_like(result: Any, item: Any) -> bool:
    """Whether two items have the same schema."""
    if isinstance(item, np.ndarray):
        return (
            isinstance(result, np.ndarray)
            and bool(result.dtype == item.dtype)
            and (result.shape == item.shape or (items.is_records(item) and result.ndim == 1))
        )
    return not isinstance(item, Batch) or items.matches(items.schema_of(item), result)


# --- expressions ------------------------------------------------------------------------------------------------------


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
    check_text(text)


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


@dataclasses.dataclass(frozen=True)
class Filter(PlainOperator):
    """Keep items, or the rows of items, for which a predicate is true; see `dsline.ops.filter`."""

    kind: ClassVar[str] = "filter"
    predicate: Any

    def __post_init__(self) -> None:
        _check_predicate(self.predicate, "the predicate")
        object.__setattr__(
            self, "stateful", not isinstance(self.predicate, str) and is_stateful(self.predicate)
        )

    def start(self, context: Context) -> Step:
        if isinstance(self.predicate, str):
            return _ExpressionFilterStep(self.predicate, context)
        return _FunctionFilterStep(self.predicate, context)

    def check(self, schema: Schema) -> Schema:
        check_predicate_columns(self.predicate, schema)
        return schema if items.kind_of_schema(schema) != RECORDS else open_rows(schema)

    def describe(self) -> str:
        return f"filter {predicate_text(self.predicate)}"


def open_rows(schema: Schema) -> Schema:
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


class _FunctionFilterStep(FunctionStep):
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


# --- several outputs --------------------------------------------------------------------------------------------------


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
        return open_rows(schema) if items.kind_of_schema(schema) == RECORDS else schema

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


# --- several inputs ---------------------------------------------------------------------------------------------------


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
        return open_rows(first) if items.kind_of_schema(first) == RECORDS else first

    def describe(self) -> str:
        order = self.order if isinstance(self.order, str) else function_name(self.order)
        return f"merge {self.inputs}, order {order}"
