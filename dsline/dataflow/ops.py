"""The operators of pipelines, as functions that describe them: ``Pipeline().pipe(ops.map(f), workers=2)``.

`Pipeline` has a method for each. Descriptions are immutable, compare by what they say, can be pickled, and become JSON where
their functions can be imported. The exact semantics and costs are in docs/dataflow/operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dsline.dataflow import batching, operators
from dsline.dataflow.operator import Operator, Router
from dsline.errors import PipelineBuildError

__all__ = [
    "batch",
    "branch",
    "broadcast",
    "collect",
    "derive",
    "filter",
    "filter_expr",
    "filter_py",
    "filter_py_batch",
    "key_by",
    "map",
    "map_batches",
    "map_expr",
    "map_py",
    "map_py_batch",
    "merge",
    "rate_limit",
    "receive_from",
    "select",
    "send_to",
    "split",
    "unbatch",
    "window",
]

Function = Callable[..., Any]


def map(function: Function, *, returns: Any = None) -> operators.Map:
    """Call a function with each item.

    Parameters
    ----------
    function : callable
        Gets the item: an ndarray, a `Batch`, or any object; arrays may be read-only views of a slot. What it returns is the
        next item. None drops the item; a generator gives any number of items. A class is constructed once in each worker, and its
        object is called; a ``functools.partial`` of it brings arguments for the constructor. Where it has a parameter ``out``
        and `returns` is given, it also gets ``out=``: an array to write the result to.
    returns : ArraySpec, Columns, dtype, "same" or None
        What the function returns, checked with every result: an array of this shape and dtype (open dimensions are as long as
        those of the item), columns, records of this structured dtype, or items like those that come. None: anything.

    Returns
    -------
    Operator

    Raises
    ------
    PipelineBuildError
        `function` cannot be called, is asynchronous, has to be given ``out=`` and `returns` is missing; `returns` is none of the above.

    Notes
    -----
    With ``out=``, what the function writes is in the output slot when it returns `out`: nothing is copied. If it returns another
    array, that is taken, by one copy. It must return something: a filter is what drops items.

    An object with ``state_dict()`` makes the stage stateful: it runs in one worker at the most, and checkpoints keep what
    the method returns, for ``load_state_dict()``. An object that was constructed here has its ``close()`` called at the end.

    A result that is not what `returns` says is an `OperatorError` that names the stage, what came and what was declared.

    Examples
    --------
    >>> import numpy as np
    >>> from dsline import ArraySpec, ops
    >>> def halve(frame, out):
    ...     return np.floor_divide(frame, 2, out=out)
    >>> ops.map(halve, returns=ArraySpec((480, 640), "u1")).describe()
    "map halve -> ArraySpec((480, 640), 'uint8')"
    """
    return operators.Map(function, returns)


def map_batches(
    function: Function, *, batch: int | None = 256, linger: Any = "10ms", returns: Any = None
) -> batching.MapBatches:
    """Gather rows into batches and call a function with each.

    Parameters
    ----------
    function : callable
        As for `map`. Gets records, a `Batch`, an array of frames along a new first axis, or a list of objects: see `batch`.
    batch : int or None
        Rows of a batch. None: the items are batches already.
    linger : float or str or None
        How long a batch waits for more rows: seconds, or a text like "10ms". None: until it is full, or the input ends.
    returns
        As for `map`.

    Raises
    ------
    PipelineBuildError
        As for `map`; `batch` is below 1, `linger` is no duration.
    """
    return batching.MapBatches(function, batch, linger, returns)


def filter(predicate: str | Function) -> operators.Filter:
    """Keep items, or rows of items, for which something is true.

    Parameters
    ----------
    predicate : str or callable
        An expression over the columns of records and of a `Batch`, over a dict of numbers, or over a number, which is
        called ``x``: see docs/guide/expressions.md. Or a function of the item that returns a truth value; for records and
        columns, it may return a boolean array with one for each row.

    Raises
    ------
    PipelineBuildError
        The expression is none, or does not fit the schema: an unknown column, a number instead of a truth value.

    Notes
    -----
    Of records and columns, the rows are kept for which the predicate is true, in one pass without the GIL; an item without any such row
    is dropped. Of frames and objects, the item is kept or dropped whole.
    """
    return operators.Filter(predicate)


def derive(**expressions: str) -> operators.Derive:
    """Add columns that are computed from the others.

    Parameters
    ----------
    **expressions : str
        New column: an expression over the columns that are there, and over those before it in the call. The name of a column that is there
        replaces it, at its place.

    Raises
    ------
    PipelineBuildError
        No expressions; one that is none or does not fit the schema.

    Notes
    -----
    Columns are not copied, only the new ones are made. Records are copied into a structure with the new fields, in the output slot
    where this is the last operator before it. Dicts of numbers get new keys in a new dict.
    """
    return operators.Derive(expressions)


def select(*columns: str, **renamed: str) -> operators.Select:
    """Keep some columns, in the order that is given.

    Parameters
    ----------
    *columns : str
        Columns to keep.
    **renamed : str
        New name: old name; after the others.

    Raises
    ------
    PipelineBuildError
        No columns, one twice, or one that the schema does not have.

    Notes
    -----
    Columns are not copied. Records are packed anew, which copies the fields that are kept.
    """
    return operators.Select([*((name, name) for name in columns), *renamed.items()])


def batch(size: int, *, linger: Any = None, drop_last: bool = False, pad: Any = None) -> batching.BatchRows:
    """Gather rows into items of `size` rows.

    Parameters
    ----------
    size : int
        Rows of a batch.
    linger : float or str or None
        How long a batch waits for more rows after the first one: seconds, or a text like "10ms". None: until it is full, or
        the input ends.
    drop_last : bool
        Drop the rows that are left at the end and do not fill a batch; they are counted as "dropped".
    pad : object or None
        Fill a batch that is closed early to its size: with this number in each field or element, a dict of one for each column, or
        this object. The rows that were added are counted as "padded".

    Raises
    ------
    PipelineBuildError
        `size` is below 1, `linger` is no duration, both `drop_last` and `pad` are given.

    Notes
    -----
    Records give records, a `Batch` gives one, frames are stacked along a new first axis, and other objects give a list. Rows are
    copied once, straight into the output slot where this is the last operator before it. An item with more rows is split. All rows
    of a batch are alike: other dtypes or shapes than it has begun with are an `OperatorError`.

    The items whose rows wait are not acknowledged until the batch is out, so a process that is killed loses none of them.
    """
    return batching.BatchRows(size, linger, drop_last, pad)


def unbatch() -> batching.Unbatch:
    """Make one item of each row.

    Notes
    -----
    Records give records of one row and a `Batch` gives batches of one row, frames are taken apart along their first axis, lists and
    tuples give their elements. Nothing is copied: the items are views. Other objects are an `OperatorError`.
    """
    return batching.Unbatch()


def rate_limit(per_second: float, *, burst: int = 1, full: str = "block") -> batching.RateLimit:
    """Let at most so many items pass in a second.

    Parameters
    ----------
    per_second : float
        Items, not rows. The long-run average.
    burst : int
        Items that may pass at once after a pause.
    full : str
        What happens to an item that comes too early. "block": it waits, and so do those behind it. "drop_newest": it is
        dropped. "drop_oldest": it waits, and is dropped if another one comes meanwhile. Those that are dropped are counted as
        "dropped".

    Raises
    ------
    PipelineBuildError
        A rate that is not above 0, a burst below 1, another word for `full`.
    """
    return batching.RateLimit(per_second, burst, full)


def branch(**predicates: str | Function | None) -> operators.Branch:
    """Send each item, or each row of it, to one of several outputs.

    Parameters
    ----------
    **predicates : str, callable or None
        Output: a predicate as for `filter`. The first one that is true takes the item or row. None, for the last one only: whatever
        no other one takes.

    Raises
    ------
    PipelineBuildError
        As for `filter`; None that is not the last.

    Notes
    -----
    Records and columns are split by rows, in order; an output gets nothing where no row is for it. What no predicate takes is dropped
    and counted as "unmatched".
    """
    return operators.Branch(predicates)


def broadcast(outputs: int | Sequence[str] = 2) -> operators.Broadcast:
    """Send every item to every output.

    Parameters
    ----------
    outputs : int or sequence of str
        How many, or their names.
    """
    return operators.Broadcast(outputs)


def merge(inputs: int, *, order: str | Function = "arrival", idle: Any = None) -> operators.Merge:
    """Bring several inputs together.

    Parameters
    ----------
    inputs : int
        How many.
    order : str or callable
        "arrival": items as they come. "zip": a tuple of one item of each; ends with the shortest input, what is left of the
        others is counted as "surplus". "sequence": all of the first input, then all of the next. The name of a column, such as "ts",
        or a function of an item: rows in ascending order of this number or time, for inputs that are in that order
        themselves; equal ones by the number of their input.
    idle : float or str or None
        How long an input without items holds back the others, with an order by a column or a function. None: until it ends.

    Raises
    ------
    PipelineBuildError
        Another kind of order, `idle` where nothing waits, a column that is not there, inputs of different schemas that are to be put in
        one order.

    Notes
    -----
    One item of each input waits at the most, so an input that is ahead blocks until the others have come after. Rows that
    come too late after an idle time go out at once, and are counted as "late".
    """
    return operators.Merge(inputs, order, idle)


def key_by(key: Any, *, partitions: int | None = None) -> Router:
    """Send the rows of a key to the same one of several partitions.

    Parameters
    ----------
    key : str or callable
        A column, or a function of the item.
    partitions : int
        How many.

    See Also
    --------
    window
    """
    from dsline.dataflow import windows

    made: Router = windows.key_by(key, partitions=partitions)
    return made


def window(spec: Any, **aggregates: Any) -> Operator:
    """Aggregate the rows of windows of time or of rows.

    Parameters
    ----------
    spec : WindowSpec
        `tumbling`, `sliding` or `session`.
    **aggregates
        Column of the result: an aggregate of `dsline.agg`.
    """
    from dsline.dataflow import windows

    made: Operator = windows.window(spec, **aggregates)
    return made


# --- names of the original API ------------------------------------------------------------------------------------------


def filter_expr(expression: str) -> operators.Filter:
    """Keep the rows for which an expression is true: `filter` of a text."""
    if not isinstance(expression, str):
        raise PipelineBuildError(
            f"filter_expr takes an expression, not {expression!r}; use filter_py for functions"
        )
    return filter(expression)


def map_expr(**expressions: str) -> operators.Derive:
    """Add columns that expressions give: the same as `derive`."""
    return derive(**expressions)


def filter_py(function: Function) -> operators.Filter:
    """Keep the items for which a function is true: `filter` of a function."""
    if isinstance(function, str):
        raise PipelineBuildError(
            f"filter_py takes a function, not {function!r}; use filter_expr for expressions"
        )
    return filter(function)


def map_py(function: Function) -> operators.Map:
    """Call a function with each item: the same as `map`."""
    return map(function)


def map_py_batch(function: Function, *, batch: int = 256, linger: Any = "10ms") -> batching.MapBatches:
    """Call a function with each batch: the same as `map_batches`."""
    return map_batches(function, batch=batch, linger=linger)


def filter_py_batch(
    function: Function, *, batch: int | None = 256, linger: Any = "10ms"
) -> batching.FilterBatches:
    """Gather rows, and keep those for which a function of the batch is true.

    Parameters
    ----------
    function : callable
        Gets what `map_batches` gives, and returns one truth value for each row, as a boolean array or a list.
    batch, linger
        As for `map_batches`; `batch` None: the items are batches already.

    Raises
    ------
    PipelineBuildError
        As for `map_batches`.
    """
    return batching.FilterBatches(function, batch, linger)


split = branch


def collect(iterable: Iterable[Any]) -> list[Any]:
    """Return the items of an iterable, a channel or a pipeline as a list."""
    from dsline.dataflow import sinks

    collected: list[Any] = sinks.collect(iterable)
    return collected


def send_to(iterable: Iterable[Any], channel: Any, **options: Any) -> Any:
    """Send the items of an iterable to a channel."""
    from dsline.dataflow import sinks

    return sinks.send_to(iterable, channel, **options)


def receive_from(channel: Any, **options: Any) -> Any:
    """Iterate over the items of a channel."""
    from dsline.dataflow import sources

    return sources.receive_from(channel, **options)
