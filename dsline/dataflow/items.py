"""What flows: frames, records, columns (`Batch`) and any other objects. The one place that tells them apart.

| kind | item | rows |
|---|---|---|
| frame | ndarray, but for those below | 1 |
| records | structured ndarray of one dimension | its length |
| columns | `Batch` | length of its columns |
| object | anything else | 1 |

A dict of numbers is an object that expressions can work on, as one row.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any, Final, TypeAlias, cast

import numpy as np

from dsline.dataflow.operator import Schema
from dsline.errors import FeatureUnavailableError, InvalidArgumentError
from dsline.specs import ArraySpec, dtype_text

__all__ = [
    "COLUMNS",
    "FRAME",
    "OBJECT",
    "RECORDS",
    "Batch",
    "Columns",
    "concatenate",
    "item_text",
    "kind_of",
    "kind_of_schema",
    "matches",
    "nbytes_of",
    "own",
    "rows_of",
    "same",
    "schema_from_json",
    "schema_of",
    "schema_text",
    "schema_to_json",
    "take",
    "take_rows",
]

Array: TypeAlias = np.ndarray[Any, Any]
DType: TypeAlias = np.dtype[Any]

FRAME: Final = "frame"
RECORDS: Final = "records"
COLUMNS: Final = "columns"
OBJECT: Final = "object"


class Batch(Mapping[str, Array]):
    """Rows as named columns: one-dimensional arrays of equal length.

    Parameters
    ----------
    columns : mapping of str to array-like, optional
    **named : array-like
        More columns; for names that are identifiers.

    Attributes
    ----------
    rows : int
        Length of the columns.
    dtypes : dict of str to numpy.dtype
    nbytes : int

    Raises
    ------
    InvalidArgumentError
        No columns; columns of more or fewer dimensions than one, or of different lengths.
    TypeError
        A name that is no str, a column of Python objects.

    Notes
    -----
    A mapping of names to columns, whose ``len()`` is the number of *rows*, as that of an array or a data frame is;
    ``len(batch.keys())`` is the number of columns. ``batch["t"]`` and ``batch.t`` are a column (only the former for
    names of attributes, like "rows"), ``batch[["t", "h"]]`` is a Batch of some columns, ``batch[10:20]`` a Batch of views on some rows,
    ``batch[mask]`` and ``batch[indices]`` one of copied rows, ``batch[3]`` the dict of the Python values of a row.

    Arrays are taken as they are and not copied; their elements may be changed where they are writable, the columns
    themselves cannot be replaced. In a pipeline they are read-only views on a slot, which stays taken as long as any of
    them is referred to: keep a `copy` of what is kept for long.

    Two batches are equal if they have the same names in the same order, dtypes and values; a NaN equals a NaN here.

    Examples
    --------
    >>> import dsline
    >>> batch = dsline.Batch(t=[20.5, 21.0, 19.0], n=[1, 2, 3])
    >>> len(batch), list(batch)
    (3, ['t', 'n'])
    >>> batch.t.mean().item(), batch[1]
    (20.166666666666668, {'t': 21.0, 'n': 2})
    >>> batch[batch.t > 20].n.tolist()
    [1, 2]
    """

    __slots__ = ("_columns", "_rows")
    _columns: dict[str, Array]
    _rows: int

    def __init__(self, columns: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        given = {**columns, **named} if columns is not None else named
        if not given:
            raise InvalidArgumentError("a Batch has one column at least")
        self._columns = {name: _column(name, value) for name, value in given.items()}
        lengths = {name: len(column) for name, column in self._columns.items()}
        self._rows = next(iter(lengths.values()))
        for name, length in lengths.items():
            if length != self._rows:
                raise InvalidArgumentError(
                    f"column {name!r} has {length} rows, and {next(iter(lengths))!r} has {self._rows}: all columns of a "
                    "Batch are of one length"
                )

    @classmethod
    def _of(cls, columns: dict[str, Array], rows: int) -> Batch:
        """Make a batch of columns that are known to be right. Keeps the dict."""
        batch = cls.__new__(cls)
        batch._columns = columns
        batch._rows = rows
        return batch

    @classmethod
    def from_records(cls, records: Array) -> Batch:
        """Return the fields of a structured array as columns: views, which are not contiguous. Does not copy.

        Raises
        ------
        TypeError
            It is no structured array of one dimension, or a field has dimensions of its own.
        """
        if not is_records(records):
            raise TypeError(
                f"from_records takes a structured array of one dimension, not {item_text(records)}"
            )
        return cls({name: records[name] for name in records.dtype.names or ()})

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Batch:
        """Return the columns of dicts with the same keys. Copies.

        Raises
        ------
        InvalidArgumentError
            No rows, or rows with different keys.
        """
        given = list(rows)
        if not given:
            raise InvalidArgumentError("from_rows got no rows, so the columns are not known")
        names = list(given[0])
        for number, row in enumerate(given):
            if row.keys() != given[0].keys():
                raise InvalidArgumentError(
                    f"row {number} has the keys {list(row)}, and the first one has {names}"
                )
        return cls({name: np.array([row[name] for row in given]) for name in names})

    @property
    def rows(self) -> int:
        """Length of the columns."""
        return self._rows

    @property
    def dtypes(self) -> dict[str, DType]:
        """The dtypes of the columns."""
        return {name: column.dtype for name, column in self._columns.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.nbytes for column in self._columns.values())

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return self._columns.keys()

    def values(self) -> ValuesView[Array]:
        """Return the columns."""
        return self._columns.values()

    def items(self) -> ItemsView[str, Array]:
        """Return names and columns."""
        return self._columns.items()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            try:
                return self._columns[key]
            except KeyError:
                raise KeyError(f"no column {key!r}; there are: {', '.join(self._columns)}") from None
        if isinstance(key, slice):
            start, stop, step = key.indices(self._rows)
            return Batch._of(
                {name: column[key] for name, column in self._columns.items()}, len(range(start, stop, step))
            )
        if isinstance(key, int | np.integer) and not isinstance(key, bool):
            return {name: column[key].item() for name, column in self._columns.items()}
        if isinstance(key, list) and key and all(isinstance(name, str) for name in key):
            return Batch._of({name: self[name] for name in key}, self._rows)
        index = np.asarray(key)
        if index.dtype.kind == "b":
            if index.shape != (self._rows,):
                raise IndexError(f"the mask is {index.shape}, and there are {self._rows} rows")
            index = np.flatnonzero(index)
        elif not index.size:
            index = index.astype(np.intp)
        elif index.dtype.kind not in "iu":
            raise TypeError(
                f"rows are chosen by a number, a slice, a mask or an array of numbers, not by {key!r}"
            )
        if index.ndim != 1:
            raise IndexError(f"the numbers of rows have {index.ndim} dimensions, must have one")
        return take(self, index)

    def __getattr__(self, name: str) -> Array:
        try:
            return self._columns[name]
        except KeyError:
            raise AttributeError(
                f"no column or attribute {name!r}; columns: {', '.join(self._columns)}"
            ) from None
        except AttributeError:  # a batch without its columns yet, as copy and pickle make them
            raise AttributeError(name) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._columns]

    def __eq__(self, other: object) -> bool:
        return same(self, other) if isinstance(other, Batch) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        columns = ", ".join(f"{name}: {column.dtype}" for name, column in self._columns.items())
        return f"Batch({self._rows} rows; {columns})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        columns = self._columns
        if protocol < 5:
            return _batch, (tuple(columns), self._rows, None, *columns.values())
        # The memory alone: NumPy's own way of pickling an array costs several times as much, and puts those with gaps, and
        # times, into the stream of the pickle.
        dtypes = [_dtype_word(column.dtype) for column in columns.values()]
        memory = [
            pickle.PickleBuffer(_exportable(column, word))
            for column, word in zip(columns.values(), dtypes, strict=True)
        ]
        return _batch, (tuple(columns), self._rows, tuple(dtypes), *memory)

    def copy(self) -> Batch:
        """Return a batch of writable, contiguous copies."""
        return Batch._of({name: column.copy() for name, column in self._columns.items()}, self._rows)

    def to_records(self) -> Array:
        """Return the rows as a packed structured array. Copies."""
        records = np.empty(self._rows, [(name, column.dtype) for name, column in self._columns.items()])
        for name, column in self._columns.items():
            records[name] = column
        return records

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the rows as dicts of Python values."""
        names = tuple(self._columns)
        values = zip(*(column.tolist() for column in self._columns.values()), strict=True)
        return [dict(zip(names, row, strict=True)) for row in values]

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        """Export as an Arrow record batch (the Arrow PyCapsule interface), by pyarrow.

        Numbers are not copied; truth values and texts are.

        Raises
        ------
        FeatureUnavailableError
            pyarrow is not installed.
        """
        try:
            import pyarrow as pa
        except ImportError:
            raise FeatureUnavailableError(
                "a Batch becomes an Arrow record batch by pyarrow, which is not installed: pip install pyarrow"
            ) from None
        arrays = [pa.array(np.ascontiguousarray(column)) for column in self._columns.values()]
        return pa.record_batch(arrays, names=list(self._columns)).__arrow_c_array__(requested_schema)


def _batch(names: tuple[str, ...], rows: int, dtypes: tuple[Any, ...] | None, *columns: Any) -> Batch:
    """Unpickle a batch: of arrays, or of their memory and dtypes."""
    if dtypes is not None:
        columns = tuple(
            [
                np.frombuffer(memory, _dtype_of(word)) if rows else np.empty(0, _dtype_of(word))
                for word, memory in zip(dtypes, columns, strict=True)
            ]
        )
    return Batch._of(dict(zip(names, columns, strict=True)), rows)


@functools.lru_cache(maxsize=1024)
def _dtype_word(dtype: DType) -> Any:
    """What stands for a dtype in a pickle: its short text, unless that does not say all."""
    return dtype if dtype.kind == "V" else dtype.str


@functools.lru_cache(maxsize=1024)
def _dtype_of(word: Any) -> DType:
    dtype: DType = np.dtype(word)
    return dtype


def _exportable(column: Array, word: Any) -> Any:
    """The column as one that exports its memory as it lies: without gaps, and no times."""
    if not column.flags.c_contiguous:
        column = np.ascontiguousarray(column)
    return column.view("i8") if isinstance(word, str) and word[1] in "mM" else column


def _column(name: Any, value: Any) -> Array:
    if not isinstance(name, str) or not name:
        raise TypeError(f"a column is named {name!r}, names are texts of one character or more")
    column = value if type(value) is np.ndarray else np.asarray(value)
    if column.ndim != 1:
        raise InvalidArgumentError(
            f"column {name!r} has {column.ndim} dimensions, must have one; give frames of their own for the others"
        )
    if column.dtype.hasobject:
        raise TypeError(
            f"column {name!r} holds Python objects ({item_text(column)}): give values of one type, or a dtype"
        )
    return column


class Columns(Mapping[str, ArraySpec]):
    """The schema of columns: names and dtypes.

    Parameters
    ----------
    columns : mapping of str to dtype-like, or structured dtype, optional
    **named : dtype-like

    Raises
    ------
    InvalidArgumentError, TypeError
        No columns, a dtype that cannot be sent.

    Notes
    -----
    Immutable and hashable. A mapping of names to ``ArraySpec((None,), dtype)``.

    Examples
    --------
    >>> import dsline
    >>> dsline.Columns(ts="i8", temperature="f4")
    Columns(ts='int64', temperature='float32')
    """

    __slots__ = ("_specs",)
    _specs: dict[str, ArraySpec]

    def __init__(self, columns: Any = None, /, **named: Any) -> None:
        given: dict[Any, Any] = {}
        if isinstance(columns, np.dtype):
            if columns.names is None or columns.fields is None:
                raise TypeError(f"columns is the dtype {columns}, which has no fields")
            given.update({name: columns.fields[name][0] for name in columns.names})
        elif columns is not None:
            given.update(columns)
        given.update(named)
        if not given:
            raise InvalidArgumentError("Columns has one column at least")
        specs = {}
        for name, dtype in given.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"a column is named {name!r}, names are texts of one character or more")
            spec = dtype if isinstance(dtype, ArraySpec) else ArraySpec((None,), dtype)
            if spec.shape != (None,):
                raise InvalidArgumentError(
                    f"column {name!r} is {spec}, and columns are of one dimension and any length"
                )
            specs[name] = spec
        object.__setattr__(self, "_specs", specs)

    def __getitem__(self, name: str) -> ArraySpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("Columns cannot be changed")

    @property
    def dtypes(self) -> dict[str, DType]:
        """The dtypes of the columns."""
        return {name: spec.dtype for name, spec in self._specs.items()}

    def __eq__(self, other: object) -> bool:
        # Of the same names in the same order.
        return list(self.items()) == list(other.items()) if isinstance(other, Mapping) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._specs.items()))

    def __repr__(self) -> str:
        if all(name.isidentifier() for name in self._specs):
            return (
                f"Columns({', '.join(f'{name}={dtype_text(dtype)}' for name, dtype in self.dtypes.items())})"
            )
        return f"Columns({ ({name: dtype.str for name, dtype in self.dtypes.items()})!r})"

    def __reduce__(self) -> Any:
        return Columns, (self.dtypes,)


# --- kinds --------------------------------------------------------------------------------------------------------------


def is_records(item: Any) -> bool:
    """Whether it is a structured array of one dimension."""
    return isinstance(item, np.ndarray) and item.dtype.names is not None and item.ndim == 1


def kind_of(item: Any) -> str:
    """Return the kind of an item: `FRAME`, `RECORDS`, `COLUMNS` or `OBJECT`."""
    if isinstance(item, Batch):
        return COLUMNS
    if isinstance(item, np.ndarray):
        return RECORDS if item.dtype.names is not None and item.ndim == 1 else FRAME
    return OBJECT


def kind_of_schema(schema: Schema) -> str | None:
    """Return the kind of the items of a schema; None where it is not known."""
    if schema is None:
        return None
    if isinstance(schema, ArraySpec):
        return RECORDS if schema.dtype.names is not None and schema.ndim == 1 else FRAME
    return COLUMNS


def columns_of_schema(schema: Schema) -> dict[str, DType] | None:
    """Return the names and dtypes that expressions may use; None where there are none, or it is not known."""
    if schema is None:
        return None
    if isinstance(schema, ArraySpec):
        if schema.dtype.names is None or schema.dtype.fields is None or schema.ndim != 1:
            return None
        return {name: schema.dtype.fields[name][0] for name in schema.dtype.names}
    return {name: spec.dtype for name, spec in schema.items()}


def schema_of(item: Any) -> Schema:
    """Return the schema that fits the item; None for an object. Rows are of any number."""
    kind = kind_of(item)
    if kind == COLUMNS:
        return Columns(item.dtypes)
    if kind == RECORDS:
        return ArraySpec((None,), item.dtype)
    if kind == FRAME:
        return None if item.dtype.hasobject else ArraySpec.of(item)
    return None


def matches(schema: Schema, item: Any) -> bool:
    """Whether the item is one of this schema. Columns have the same names in the same order, and the same dtypes."""
    if schema is None:
        return True
    if isinstance(schema, ArraySpec):
        return isinstance(item, np.ndarray) and schema.matches(item)
    if not isinstance(item, Batch) or len(schema) != len(item._columns):
        return False
    return all(
        name == given and spec.dtype == column.dtype
        for (name, spec), (given, column) in zip(schema.items(), item._columns.items(), strict=True)
    )


def rows_of(item: Any) -> int:
    """Return how many rows the item has: 1 unless it is records or columns."""
    if isinstance(item, Batch):
        return item._rows
    return len(item) if is_records(item) else 1


def nbytes_of(item: Any) -> int:
    """Return the bytes of arrays in the item; of tuples, lists and dicts those in them, without those of the objects."""
    if isinstance(item, np.ndarray | Batch):
        return item.nbytes
    if isinstance(item, bytes | bytearray | memoryview):
        return memoryview(item).nbytes
    if isinstance(item, dict):
        return sum(map(nbytes_of, item.values()))
    if isinstance(item, tuple | list):
        return sum(map(nbytes_of, item))
    return 0


def item_text(item: Any) -> str:
    """Say what an item is, for errors."""
    if isinstance(item, Batch):
        return repr(item)
    if isinstance(item, np.ndarray):
        return f"an array of {dtype_text(item.dtype)} {item.shape}"
    return f"a {type(item).__name__}"


def schema_text(schema: Schema) -> str:
    """Say what a schema is, for errors and drawings."""
    if schema is None:
        return "anything"
    return repr(schema if isinstance(schema, ArraySpec | Columns) else Columns(schema))


# --- rows ---------------------------------------------------------------------------------------------------------------


def take_rows(item: Any, start: int, stop: int) -> Any:
    """Return rows start to stop of records or columns: views. Any other item is one row and comes back as it is."""
    if isinstance(item, Batch):
        columns = {name: column[start:stop] for name, column in item._columns.items()}
        return Batch._of(columns, max(0, min(stop, item._rows) - start))
    return item[start:stop] if is_records(item) else item


def take(item: Any, index: Array) -> Any:
    """Return copies of the rows of records or columns that have the numbers in `index`."""
    if isinstance(item, Batch):
        # take() is several times faster than [] for structures, and not slower for numbers.
        return Batch._of({name: column.take(index) for name, column in item._columns.items()}, len(index))
    return item.take(index)


def own(item: Any) -> Any:
    """Return the item with copies of its arrays, to be kept for long: it lies in no slot."""
    if isinstance(item, np.ndarray | Batch):
        return item.copy()
    if isinstance(item, dict):
        return {name: own(value) for name, value in item.items()}
    if type(item) in (list, tuple):
        return type(item)(own(value) for value in item)
    return item


def concatenate(items: Sequence[Any]) -> Any:
    """Return the rows of several records or columns of the same dtypes, in one. Copies.

    Raises
    ------
    InvalidArgumentError
        Nothing was given, or items of different dtypes or kinds.
    """
    if not items:
        raise InvalidArgumentError("nothing to concatenate")
    first = items[0]
    schema = schema_of(first)
    if kind_of(first) not in (RECORDS, COLUMNS):
        raise InvalidArgumentError(f"{item_text(first)} has no rows to concatenate; give records or a Batch")
    for item in items[1:]:
        if not matches(schema, item):
            raise InvalidArgumentError(
                f"{item_text(item)} cannot be put behind {item_text(first)}: the dtypes or names differ"
            )
    if isinstance(first, Batch):
        columns = {name: np.concatenate([item._columns[name] for item in items]) for name in first._columns}
        return Batch._of(columns, sum(item._rows for item in items))
    return np.concatenate(items)


def same(a: Any, b: Any) -> bool:
    """Whether two items are of the same type, dtype, shape and values. A NaN equals a NaN."""
    if isinstance(a, Batch) or isinstance(b, Batch):
        if not (isinstance(a, Batch) and isinstance(b, Batch)) or list(a) != list(b):
            return False
        return all(same(one, other) for one, other in zip(a.values(), b.values(), strict=True))
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
            return False
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.dtype.names is not None:
            return all(same(a[name], b[name]) for name in a.dtype.names)
        return bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fcmM"))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    return bool(a == b) or (a != a and b != b)


# --- text ---------------------------------------------------------------------------------------------------------------


def _dtype_to_json(dtype: DType) -> Any:
    if dtype.names is None:
        return dtype.str
    assert dtype.fields is not None
    return {
        "names": list(dtype.names),
        "formats": [_dtype_to_json(dtype.fields[name][0].base) for name in dtype.names],
        "shapes": [list(dtype.fields[name][0].shape) for name in dtype.names],
        "offsets": [dtype.fields[name][1] for name in dtype.names],
        "itemsize": dtype.itemsize,
    }


def _dtype_from_json(data: Any) -> DType:
    if isinstance(data, str):
        return np.dtype(data)
    formats = [
        np.dtype((_dtype_from_json(form), tuple(shape)))
        for form, shape in zip(data["formats"], data["shapes"], strict=True)
    ]
    layout = {
        "names": data["names"],
        "formats": formats,
        "offsets": data["offsets"],
        "itemsize": data["itemsize"],
    }
    made: DType = np.dtype(cast(Any, layout))
    return made


def schema_to_json(schema: Schema) -> Any:
    """Return a schema as plain values."""
    if schema is None:
        return None
    if isinstance(schema, ArraySpec):
        data: dict[str, Any] = {"shape": list(schema.shape), "dtype": _dtype_to_json(schema.dtype)}
        return data if schema.order == "C" else {**data, "order": schema.order}
    return {"columns": {name: _dtype_to_json(spec.dtype) for name, spec in schema.items()}}


def schema_from_json(data: Any) -> Schema:
    """Return the schema that `schema_to_json` wrote."""
    if data is None:
        return None
    if "columns" in data:
        return Columns({name: _dtype_from_json(dtype) for name, dtype in data["columns"].items()})
    return ArraySpec(tuple(data["shape"]), _dtype_from_json(data["dtype"]), data.get("order", "C"))
