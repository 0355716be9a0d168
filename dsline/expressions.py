"""Expressions over named columns: ``"temperature > 20 and humidity*2 < 90"``.

A text is parsed by Python's own parser, every node of the tree is compared with a short list of what is allowed, and the
result is a program of typed steps. Nothing is ever evaluated as Python, so a text may come from a file or from a network.

The language: numbers, ``True`` and ``False``, column names, ``+ - * /``, ``< <= > >= == !=`` (also chained), ``and``, ``or``,
``not``, parentheses, and the functions ``abs``, ``min``, ``max``, ``sqrt``, ``where`` and ``isnan``.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Never

import numpy as np

from dsline import _core
from dsline.errors import ExpressionError

__all__ = ["BACKENDS", "FUNCTIONS", "Expression", "ExpressionError", "Step", "check_text"]

BACKENDS = ("auto", "kernel", "numpy")

MAX_CHARACTERS = 2000
MAX_DEPTH = 40
MAX_NODES = 200

# name -> (fewest, most arguments)
FUNCTIONS = {"abs": (1, 1), "isnan": (1, 1), "max": (2, 16), "min": (2, 16), "sqrt": (1, 1), "where": (3, 3)}

_ARITHMETIC = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_COMPARISONS = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}
_OTHER_COMPARISONS = {ast.In: "in", ast.Is: "is", ast.IsNot: "is not"}
_SYMBOLS = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "divide": "/",
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
    "equal": "==",
    "not_equal": "!=",
}
_ON_NUMBERS: dict[str, Callable[[float, float], float]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
}
_UFUNCS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.true_divide,
    "negative": np.negative,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "abs": np.absolute,
    "min": np.minimum,
    "max": np.maximum,
    "sqrt": np.sqrt,
    "isnan": np.isnan,
}
# Numbers of dsline::ExpressionOp and dsline::ElementType.
_OP_CODES = {
    name: code
    for code, name in enumerate(
        (
            *("column", "constant", "cast", "add", "subtract", "multiply", "divide", "negative"),
            *("less", "less_equal", "greater", "greater_equal", "equal", "not_equal", "and", "or", "not"),
            *("abs", "min", "max", "sqrt", "isnan", "where"),
        )
    )
}
_TYPE_CODES = {
    np.dtype(name): code
    for code, name in enumerate(("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"))
}
_BOOL = np.dtype(bool)
_DOUBLE = np.dtype(np.float64)


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a program. Steps are in the order of execution; each may use the results of those before it.

    Attributes
    ----------
    op : str
        "column", "constant", "cast", "where", or the name of an arithmetic, comparison or logical operation.
    dtype : numpy.dtype
        Of the result. The operands have the dtypes that the operation needs: casts are steps of their own.
    args : tuple of int
        Numbers of the steps that it uses.
    value : object
        Name of the column, or the constant.
    """

    op: str
    dtype: np.dtype[Any]
    args: tuple[int, ...] = ()
    value: Any = None


@dataclasses.dataclass(frozen=True)
class _Operand:
    """What a part of the text stands for: a step, or a number that takes the type of what it meets (NEP 50)."""

    step: int = -1
    dtype: np.dtype[Any] | None = None
    number: int | float | None = None
    column: int = 0  # of the text, for errors

    @property
    def is_number(self) -> bool:
        return self.number is not None

    @property
    def is_bool(self) -> bool:
        return self.dtype == _BOOL


class Expression:
    """A checked program over named columns.

    Parameters
    ----------
    text : str
        At most 2,000 characters, 40 levels and 200 parts.
    columns : mapping of str to dtype, or structured dtype
        The names that the text may use, with the dtype of their elements: bool, integers and floats.
    backend : str
        "kernel": the loops of the core, block by block in the cache, without the GIL from 8,192 rows on. "numpy": NumPy's own.
        "auto": the kernel where it has the dtypes (all but float16 and foreign byte orders). Both give the same results.

    Attributes
    ----------
    text : str
    dtype : numpy.dtype
        Of the result; bool for a filter.
    names : tuple of str
        The columns that it reads, in the order of their first use.
    backend : str
        What arrays are computed by: "kernel" or "numpy".
    steps : tuple of Step
        The program; the last one is the result.

    Raises
    ------
    ExpressionError
        The text is no expression of the language, names an unknown column, or mixes what cannot be mixed. Says where.

    Notes
    -----
    Types are those of NumPy 2 (NEP 50) whatever version is installed: ``/`` of integers gives float64, a number in the text takes
    the type of the column that it meets, integers wrap around. Division by zero gives infinity, a comparison with NaN is
    false but for ``!=``, ``min`` and ``max`` of NaN are NaN. ``and``, ``or`` and ``not`` take truth values only. Mixing int64
    with uint64 is refused, since no integer type holds both. `where` evaluates all of its arguments.

    Immutable; may be shared between threads and pickled.

    Examples
    --------
    >>> import numpy as np
    >>> from dsline.expressions import Expression
    >>> warm = Expression("temperature > 20 and humidity*2 < 90", {"temperature": "f4", "humidity": "f4"})
    >>> warm({"temperature": np.float32([19, 25, 30]), "humidity": np.float32([10, 20, 60])})
    array([False,  True, False])
    """

    def __init__(
        self, text: str, columns: Mapping[str, Any] | np.dtype[Any], *, backend: str = "auto"
    ) -> None:
        if not isinstance(text, str):
            raise TypeError(f"the expression is a {type(text).__name__}, must be a str")
        self.text = text
        self._columns = _column_types(columns)
        compiler = _Compiler(text, self._columns)
        self.steps = tuple(compiler.program())
        self.dtype = self.steps[-1].dtype
        self.names = tuple(compiler.names)
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, must be one of {', '.join(BACKENDS)}")
        self._asked = backend
        self._kernel = None if backend == "numpy" else self._make_kernel()
        if backend == "kernel" and self._kernel is None:
            raise ExpressionError(
                f"the kernel has no loops for a dtype of {text!r}; use backend='numpy', or columns of native byte order"
            )
        self.backend = "numpy" if self._kernel is None else "kernel"

    def _make_kernel(self) -> _core.ExpressionKernel | None:
        steps = []
        for step in self.steps:
            kind = _TYPE_CODES.get(step.dtype)
            if kind is None:
                return None
            column = self.names.index(step.value) if step.op == "column" else 0
            constant = (step.dtype, step.value) if step.op == "constant" else None
            steps.append((_OP_CODES[step.op], kind, step.args, column, constant))
        return _core.ExpressionKernel(steps, tuple(self._columns[name] for name in self.names), self.dtype)

    def __repr__(self) -> str:
        return f"Expression({self.text!r}, { ({name: dtype.str for name, dtype in self._columns.items()})!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Expression):
            return NotImplemented
        return (self.text, self._columns, self._asked) == (other.text, other._columns, other._asked)

    def __hash__(self) -> int:
        return hash((self.text, tuple(self._columns.items())))

    def __reduce__(self) -> Any:
        return _again, (self.text, self._columns, self._asked)

    @property
    def is_filter(self) -> bool:
        """Whether the result is a truth value."""
        return bool(self.dtype == _BOOL)

    def __call__(self, data: Any, out: Any = None) -> Any:
        """Evaluate.

        Parameters
        ----------
        data : mapping of names to arrays or numbers, or structured array
            All of one length, or numbers. Arrays of other dtypes than those declared are refused.
        out : numpy.ndarray, optional
            Where to write the result.

        Returns
        -------
        numpy.ndarray, or a Python number or bool when every column is a number

        Raises
        ------
        ExpressionError
            A column is missing or has another dtype.
        ValueError
            Columns of different lengths.
        """
        if self._kernel is not None and out is None:
            results = self._kernel.evaluate_data(data, self.names)
            if results is not None:
                return results
        arrays, rows = self._arrays(data)
        if rows >= 0 and self._kernel is not None and (out is None or _is_plain(out, self.dtype)):
            columns = self._columns_read(arrays, rows)
            if out is not None and any(
                np.may_share_memory(out, column)
                and not (
                    out.ctypes.data == column.ctypes.data
                    and out.strides == column.strides
                    and out.itemsize == column.itemsize
                )
                for column in columns
            ):
                # Later blocks would read what earlier ones have written.
                return _into(out, self._kernel.evaluate(columns, rows, None))
            return self._kernel.evaluate(columns, rows, out)
        return self._by_numpy(arrays, rows, out)

    def _by_numpy(self, arrays: Mapping[str, Any], rows: int, out: Any) -> Any:
        results: list[Any] = []
        last = len(self.steps) - 1
        with np.errstate(all="ignore"):
            for number, step in enumerate(self.steps):
                results.append(self._run(step, results, arrays, out if number == last else None))
        result = results[-1]
        if out is not None:
            return out
        if rows < 0:
            return result.item()
        if np.ndim(result) == 0:  # no column of more than one element is in it
            return np.broadcast_to(result, rows).copy()
        return result.copy() if step.op == "column" else result

    def filter(self, data: Any, out: Any = None) -> Any:
        """Keep the rows for which the expression is true.

        Parameters
        ----------
        data : mapping of names to arrays, or structured array
            All columns are kept, also those that the expression does not read.
        out : the same kind of thing, optional
            Where the rows go: arrays with room for all of them, that share no memory with `data`.

        Returns
        -------
        dict of arrays, or structured array
            The rows, in order: views on the start of `out` where that is given.

        Raises
        ------
        ExpressionError
            The expression gives numbers; a column is missing or has another dtype.
        ValueError
            Columns of different lengths; an `out` that does not fit.
        """
        if not self.is_filter:
            raise ExpressionError(
                f"a filter needs a truth value, and {self.text!r} gives {self.dtype}; compare it with something"
            )
        if self._kernel is not None and type(data) is dict and (out is None or type(out) is dict):
            kept_columns = self._kernel.filter_columns(data, self.names, out)
            if kept_columns is not None:
                return kept_columns
        elif self._kernel is not None and type(data) is np.ndarray:
            kept_records = self._kernel.filter_records(data, self.names, out)
            if kept_records is not None:
                return kept_records
        arrays, rows = self._arrays(data)
        is_records = isinstance(data, np.ndarray)
        sources = {"": data} if is_records else dict(data)
        for name, source in sources.items():
            if not isinstance(source, np.ndarray) or source.ndim != 1:
                raise ValueError(
                    f"column {name!r} is no array of one dimension, so no rows can be kept of it"
                )
            if rows not in (-1, len(source)):
                raise ValueError(f"column {name!r} has {len(source)} rows, and another one {rows}")
            rows = len(source)
        if out is None:
            targets = {name: np.empty(rows, source.dtype) for name, source in sources.items()}
        else:
            targets = {"": out} if is_records else {name: out[name] for name in sources}
            for name, target in targets.items():
                others = [*sources.values(), *(other for key, other in targets.items() if key != name)]
                if any(np.may_share_memory(target, other) for other in others):
                    raise ValueError(f"out shares memory with the data, or with itself (column {name!r})")
        if self._kernel is not None:
            columns = self._columns_read(arrays, rows)
            kept = self._kernel.filter(columns, rows, tuple(sources.values()), tuple(targets.values()))
        else:
            found = np.flatnonzero(self._by_numpy(arrays, rows, None))
            kept = len(found)
            for name, source in sources.items():
                targets[name][:kept] = source.take(found)
        rows_kept = {name: target[:kept] for name, target in targets.items()}
        return rows_kept[""] if is_records else rows_kept

    def _arrays(self, data: Any) -> tuple[dict[str, Any], int]:
        """Return the columns that are read, and how many rows they have; -1 where they are numbers."""
        arrays: dict[str, Any] = {}
        fields = getattr(getattr(data, "dtype", None), "names", None)
        for name in self.names or tuple(self._columns)[:1]:
            try:
                value = data[name]
            except (KeyError, ValueError, IndexError):
                have = fields if fields is not None else list(data)
                raise ExpressionError(
                    f"column {name!r} of {self.text!r} is not in the data, which has {', '.join(map(str, have))}"
                ) from None
            if isinstance(value, np.ndarray) and value.ndim > 0:
                if value.dtype != self._columns[name]:
                    raise ExpressionError(
                        f"column {name!r} is {value.dtype}, and the expression was made for {self._columns[name]}"
                    )
                if value.ndim != 1:
                    raise ValueError(f"column {name!r} has {value.ndim} dimensions, must have one")
                arrays[name] = value
            else:
                arrays[name] = _checked_scalar(name, value, self._columns[name])
        lengths = {len(value) for value in arrays.values() if value.ndim}
        if len(lengths) > 1:
            raise ValueError(f"columns have different lengths: {', '.join(map(str, sorted(lengths)))}")
        return arrays, lengths.pop() if lengths else -1

    def _columns_read(self, arrays: Mapping[str, Any], rows: int) -> tuple[Any, ...]:
        """Return what the kernel reads: numbers stand for columns of `rows` equal elements."""
        return tuple(
            array if array.ndim else np.broadcast_to(array, rows)
            for array in (arrays[name] for name in self.names)
        )

    @staticmethod
    def _run(step: Step, results: Sequence[Any], arrays: Mapping[str, Any], out: Any) -> Any:
        if step.op == "column":
            return arrays[step.value] if out is None else _into(out, arrays[step.value])
        if step.op == "constant":
            value = step.dtype.type(step.value)
            return value if out is None else _into(out, value)
        args = [results[number] for number in step.args]
        if step.op == "cast":
            value = args[0].astype(step.dtype)
            return value if out is None else _into(out, value)
        if step.op == "where":
            value = np.where(*args)
            return value if out is None else _into(out, value)
        return _UFUNCS[step.op](*args, out=out) if out is not None else _UFUNCS[step.op](*args)


def check_text(text: str) -> None:
    """Raise ExpressionError for a text that is no expression whatever the columns are."""
    _Compiler(text, {}).check()


def _is_plain(out: Any, dtype: np.dtype[Any]) -> bool:
    return isinstance(out, np.ndarray) and out.ndim == 1 and out.dtype == dtype and out.flags.carray


def _into(out: Any, value: Any) -> Any:
    out[...] = value
    return out


def _checked_scalar(name: str, value: Any, dtype: np.dtype[Any]) -> Any:
    """Turn a number into an array of no dimensions of the column's dtype, without losing any of it."""
    given = np.asarray(value)
    if given.ndim or given.dtype.kind not in "biuf":
        raise ExpressionError(f"column {name!r} is {value!r}, must be a number or an array of one dimension")
    if (given.dtype.kind == "b") != (dtype.kind == "b") or (given.dtype.kind == "f" and dtype.kind in "iu"):
        raise ExpressionError(f"column {name!r} is {value!r}, and the expression was made for {dtype}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not limits.min <= int(given) <= limits.max:
            raise ExpressionError(f"column {name!r} is {value!r}, which does not fit into {dtype}")
    return given.astype(dtype)


def _column_types(columns: Any) -> dict[str, np.dtype[Any]]:
    if isinstance(columns, np.dtype):
        if columns.names is None:
            raise TypeError(
                f"columns is the dtype {columns}, must be a structured dtype or a mapping of names to dtypes"
            )
        columns = {name: columns.fields[name][0] for name in columns.names}  # type: ignore[index]
    if not isinstance(columns, Mapping):
        raise TypeError(f"columns is a {type(columns).__name__}, must be a mapping of names to dtypes")
    types = {}
    for name, given in columns.items():
        if not isinstance(name, str):
            raise TypeError(f"columns has the name {name!r}, names must be str")
        types[name] = np.dtype(given)
    return types


def _again(text: str, columns: dict[str, np.dtype[Any]], backend: str) -> Expression:
    """Unpickle an expression."""
    return Expression(text, columns, backend=backend)


class _Compiler:
    """One pass over the tree. Equal steps are made once."""

    def __init__(self, text: str, columns: Mapping[str, np.dtype[Any]]) -> None:
        self._text = text
        self._columns = columns
        self._steps: list[Step] = []
        self._known: dict[Any, int] = {}
        self._nodes = 0
        self.names: list[str] = []

    # --- errors ---

    def _fail(self, why: str, column: int) -> Never:
        shown = self._text.expandtabs(1)
        marked = f"\n    {shown}\n    {' ' * column}^" if "\n" not in shown and len(shown) <= 200 else ""
        error = ExpressionError(f"{why}, at column {column + 1} of the expression{marked}")
        error.column = column + 1
        raise error

    # --- parsing ---

    def program(self) -> list[Step]:
        result = self._any(self.parse(), 0)
        if result.is_number:
            result = self._constant(result, np.dtype(type(result.number)))
        if result.step != len(self._steps) - 1:  # the last step is the result
            self._steps.append(self._steps[result.step])
        return self._steps

    def parse(self) -> ast.expr:
        text = self._text
        if not text.strip():
            self._fail("the expression is empty", 0)
        if len(text) > MAX_CHARACTERS:
            self._fail(
                f"the expression has {len(text)} characters, and {MAX_CHARACTERS} are allowed", MAX_CHARACTERS
            )
        self._check_depth()
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            at = getattr(error, "offset", None) or len(text.rstrip()) + 1
            what = getattr(error, "msg", None) or str(error)
            self._fail(f"this is no expression: {what}", self._shift(min(at - 1, len(text))))
        return tree.body

    def check(self) -> None:
        """Refuse what is no expression whatever the columns are."""
        for node in ast.walk(self.parse()):
            if isinstance(node, ast.expr) and type(node) not in _HANDLERS:
                self._fail(f"{_describe(node)} is not part of the language", self._at(node))
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id not in FUNCTIONS
            ):
                names = ", ".join(sorted(FUNCTIONS))
                self._fail(f"there is no function {node.func.id!r}; there are: {names}", self._at(node))

    def _shift(self, column: int) -> int:
        return column + len(self._text) - len(self._text.lstrip())

    def _at(self, node: ast.AST) -> int:
        # Offsets are in UTF-8 bytes.
        line = self._text.strip()
        return self._shift(len(line.encode()[: getattr(node, "col_offset", 0)].decode(errors="ignore")))

    def _check_depth(self) -> None:
        """Refuse deep nesting before the parser sees it: its own limits end in a crash or an exception of any kind."""
        depth = run = 0
        for column, character in enumerate(self._text):
            if character in "([{":
                depth += 1
            elif character in ")]}":
                depth -= 1
            # Signs and "not" nest without brackets.
            run = run + 1 if character in "+-~ \tnot" else 0
            if depth > MAX_DEPTH or run > 4 * MAX_DEPTH:
                self._fail(f"the expression is nested more than {MAX_DEPTH} deep", column)
            if character in "\n\r\f;#\\\0" or (ord(character) < 32 and character != "\t"):
                self._fail(f"the character {character!r} is not part of the language", column)

    # --- the tree ---

    def _any(self, node: ast.AST, depth: int) -> _Operand:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._fail(f"the expression has more than {MAX_NODES} parts", self._at(node))
        if depth > MAX_DEPTH:
            self._fail(f"the expression is nested more than {MAX_DEPTH} deep", self._at(node))
        handler = _HANDLERS.get(type(node))
        if handler is None:
            self._fail(f"{_describe(node)} is not part of the language", self._at(node))
        return handler(self, node, depth + 1)

    def _name(self, node: ast.Name, depth: int) -> _Operand:
        at = self._at(node)
        dtype = self._columns.get(node.id)
        if dtype is None:
            if node.id in FUNCTIONS:
                self._fail(f"{node.id} is a function, and needs its arguments in parentheses", at)
            known = ", ".join(self._columns) or "none"
            self._fail(f"there is no column {node.id!r}; there are: {known}", at)
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            self._fail(
                f"column {node.id!r} is {dtype}, and only bool, integers and floats can be computed with", at
            )
        if node.id not in self.names:
            self.names.append(node.id)
        return self._emit("column", dtype, (), node.id, at)

    def _number(self, node: ast.Constant, depth: int) -> _Operand:
        at = self._at(node)
        value = node.value
        if isinstance(value, bool):
            return self._emit("constant", _BOOL, (), value, at)
        if isinstance(value, int):
            if not -(1 << 63) <= value < 1 << 64:
                self._fail(f"the number has {value.bit_length()} bits, and 64 are allowed", at)
            return _Operand(number=value, column=at)
        if isinstance(value, float):
            return _Operand(number=value, column=at)
        return self._fail(f"{_describe(node)} is not part of the language", at)

    def _unary(self, node: ast.UnaryOp, depth: int) -> _Operand:
        at = self._at(node)
        operand = self._any(node.operand, depth)
        if isinstance(node.op, ast.Not):
            self._need_bool(operand, "not")
            return self._emit("not", _BOOL, (operand.step,), None, at)
        if isinstance(node.op, ast.Invert):
            self._fail("~ is not part of the language; use not", at)
        sign = "-" if isinstance(node.op, ast.USub) else "+"
        self._need_number(operand, sign)
        if sign == "+":
            return operand
        if operand.number is not None:
            return _Operand(number=-operand.number, column=at)
        assert operand.dtype is not None
        if operand.dtype.kind == "u":
            self._fail(f"- of {operand.dtype} would wrap around; subtract it from 0.0", at)
        return self._emit("negative", operand.dtype, (operand.step,), None, at)

    def _binary(self, node: ast.BinOp, depth: int) -> _Operand:
        op = _ARITHMETIC.get(type(node.op))
        at = self._at(node)
        if op is None:
            self._fail(f"the operator of {_describe(node)} is not part of the language: use + - * /", at)
        left, right = self._any(node.left, depth), self._any(node.right, depth)
        for operand in (left, right):
            self._need_number(operand, _SYMBOLS[op])
        if left.number is not None and right.number is not None:
            return self._fold(op, left.number, right.number, at)
        common = self._common(left, right, _SYMBOLS[op], at)
        if op == "divide" and common.kind in "iu":
            common = _DOUBLE
        return self._emit(op, common, (self._as(left, common), self._as(right, common)), None, at)

    def _fold(self, op: str, left: float, right: float, at: int) -> _Operand:
        try:
            result = _ON_NUMBERS[op](left, right)
        except (ZeroDivisionError, OverflowError):
            self._fail(f"{left!r} {_SYMBOLS[op]} {right!r} has no value", at)
        if isinstance(result, int) and not -(1 << 63) <= result < 1 << 64:
            self._fail(f"{left!r} {_SYMBOLS[op]} {right!r} does not fit into 64 bits", at)
        return _Operand(number=result, column=at)

    def _boolean(self, node: ast.BoolOp, depth: int) -> _Operand:
        op = "and" if isinstance(node.op, ast.And) else "or"
        operands = [self._any(value, depth) for value in node.values]
        for operand in operands:
            self._need_bool(operand, op)
        result = operands[0]
        for operand in operands[1:]:
            result = self._emit(op, _BOOL, (result.step, operand.step), None, operand.column)
        return result

    def _compare(self, node: ast.Compare, depth: int) -> _Operand:
        operands = [self._any(value, depth) for value in (node.left, *node.comparators)]
        result: _Operand | None = None
        for comparison, left, right in zip(node.ops, operands, operands[1:], strict=False):
            op = _COMPARISONS.get(type(comparison))
            if op is None:
                word = _OTHER_COMPARISONS.get(type(comparison), "not in")
                self._fail(f"{word!r} is not part of the language", left.column)
            one = self._comparison(op, left, right)
            result = (
                one if result is None else self._emit("and", _BOOL, (result.step, one.step), None, one.column)
            )
        assert result is not None
        return result

    def _comparison(self, op: str, left: _Operand, right: _Operand) -> _Operand:
        symbol = _SYMBOLS[op]
        if left.is_number and right.is_number:
            self._fail(
                f"{left.number!r} {symbol} {right.number!r} compares two numbers: no column is in it",
                left.column,
            )
        if left.is_bool != right.is_bool:
            self._fail(f"{symbol} compares a truth value with a number", left.column)
        if left.is_bool and op not in ("equal", "not_equal"):
            self._fail(f"{symbol} cannot compare truth values: use == or !=", left.column)
        common = _BOOL if left.is_bool else self._common(left, right, symbol, left.column)
        return self._emit(op, _BOOL, (self._as(left, common), self._as(right, common)), None, left.column)

    def _call(self, node: ast.Call, depth: int) -> _Operand:
        at = self._at(node)
        if not isinstance(node.func, ast.Name):
            self._fail(f"{_describe(node.func)} cannot be called", at)
        name = node.func.id
        if name not in FUNCTIONS:
            self._fail(f"there is no function {name!r}; there are: {', '.join(sorted(FUNCTIONS))}", at)
        if node.keywords:
            self._fail(f"{name} takes no named arguments", at)
        fewest, most = FUNCTIONS[name]
        if not fewest <= len(node.args) <= most:
            wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
            self._fail(f"{name} takes {wanted} arguments, not {len(node.args)}", at)
        args = [self._any(argument, depth) for argument in node.args]
        if name == "where":
            return self._where(args, at)
        for argument in args:
            self._need_number(argument, name)
        if name in ("min", "max"):
            return self._extreme(name, args, at)
        (operand,) = args
        if operand.is_number:
            self._fail(f"{name} of a number: no column is in it", at)
        assert operand.dtype is not None
        if name == "abs" and operand.dtype.kind == "u":
            return operand
        if name == "isnan":
            if operand.dtype.kind != "f":
                return self._emit("constant", _BOOL, (), False, at)
            return self._emit("isnan", _BOOL, (operand.step,), None, at)
        dtype = _DOUBLE if name == "sqrt" and operand.dtype.kind != "f" else operand.dtype
        return self._emit(name, dtype, (self._as(operand, dtype),), None, at)

    def _extreme(self, name: str, args: list[_Operand], at: int) -> _Operand:
        if all(argument.is_number for argument in args):
            self._fail(f"{name} of numbers: no column is in it", at)
        typed = [argument for argument in args if not argument.is_number]
        common = typed[0].dtype
        assert common is not None
        for argument in args:
            common = self._common(_Operand(dtype=common, column=at), argument, name, argument.column)
        steps = [self._as(argument, common) for argument in args]
        result = steps[0]
        for step in steps[1:]:
            result = self._emit(name, common, (result, step), None, at).step
        return _Operand(step=result, dtype=common, column=at)

    def _where(self, args: list[_Operand], at: int) -> _Operand:
        condition, left, right = args
        self._need_bool(condition, "where")
        if left.is_bool != right.is_bool:
            self._fail("where chooses between a truth value and a number", at)
        if left.number is not None and right.number is not None:
            common = np.dtype(type(left.number + right.number))
        elif left.is_bool:
            common = _BOOL
        else:
            common = self._common(left, right, "where", at)
        return self._emit(
            "where", common, (condition.step, self._as(left, common), self._as(right, common)), None, at
        )

    # --- types ---

    def _need_bool(self, operand: _Operand, what: str) -> None:
        if not operand.is_bool:
            self._fail(
                f"{what!r} needs a truth value here, not a number: compare it with something", operand.column
            )

    def _need_number(self, operand: _Operand, what: str) -> None:
        if operand.is_bool:
            self._fail(f"{what!r} needs a number here, not a truth value", operand.column)

    def _common(self, left: _Operand, right: _Operand, what: str, at: int) -> np.dtype[Any]:
        """Return the dtype in which two operands meet."""
        if left.number is not None or right.number is not None:
            number, dtype = (
                (left.number, right.dtype) if right.dtype is not None else (right.number, left.dtype)
            )
            assert dtype is not None
            if isinstance(number, float) and dtype.kind in "iu":
                return _DOUBLE
            return dtype
        assert left.dtype is not None and right.dtype is not None
        if {left.dtype.str[1:], right.dtype.str[1:]} == {"i8", "u8"} or (
            {left.dtype.kind, right.dtype.kind} == {"i", "u"}
            and np.promote_types(left.dtype, right.dtype).kind == "f"
        ):
            self._fail(f"{what!r} mixes {left.dtype} with {right.dtype}, and no integer type holds both", at)
        return np.promote_types(left.dtype, right.dtype)

    def _as(self, operand: _Operand, dtype: np.dtype[Any]) -> int:
        if operand.is_number:
            return self._constant(operand, dtype).step
        if operand.dtype == dtype:
            return operand.step
        return self._emit("cast", dtype, (operand.step,), None, operand.column).step

    def _constant(self, operand: _Operand, dtype: np.dtype[Any]) -> _Operand:
        value: Any = operand.number
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            if not limits.min <= value <= limits.max:
                self._fail(
                    f"{value} does not fit into {dtype} ({limits.min} to {limits.max}), the type of the column that it meets",
                    operand.column,
                )
            value = int(value)
        else:
            value = float(value)
        return self._emit("constant", dtype, (), value, operand.column)

    def _emit(self, op: str, dtype: np.dtype[Any], args: tuple[int, ...], value: Any, at: int) -> _Operand:
        dtype = dtype.newbyteorder("=") if op != "column" else dtype
        key = (op, dtype.str, args, type(value), repr(value))
        step = self._known.get(key)
        if step is None:
            step = self._known[key] = len(self._steps)
            self._steps.append(Step(op, dtype, args, value))
        operand = _Operand(step=step, dtype=dtype, column=at)
        if op == "column" and not dtype.isnative:
            native = dtype.newbyteorder("=")
            return self._emit("cast", native, (step,), None, at)
        return operand


_HANDLERS: dict[type[ast.AST], Callable[[_Compiler, Any, int], _Operand]] = {
    ast.Name: _Compiler._name,
    ast.Constant: _Compiler._number,
    ast.UnaryOp: _Compiler._unary,
    ast.BinOp: _Compiler._binary,
    ast.BoolOp: _Compiler._boolean,
    ast.Compare: _Compiler._compare,
    ast.Call: _Compiler._call,
}


def _describe(node: ast.AST) -> str:
    """Name a piece of Python for an error."""
    if isinstance(node, ast.Constant):
        return f"the {type(node.value).__name__} {node.value!r:.40}"
    try:
        text = ast.unparse(node)
    except (RecursionError, ValueError):
        text = type(node).__name__
    return repr(text if len(text) <= 40 else text[:37] + "...")
