"""What descriptions of operators share: values that JSON has, checks, and the object around a user's function."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Never

import numpy as np

from dsline.dataflow import callables, items
from dsline.dataflow.callables import function_name
from dsline.dataflow.items import Columns
from dsline.dataflow.operator import Context, Operator, Step
from dsline.errors import OperatorError, PipelineBuildError
from dsline.specs import ArraySpec

__all__ = [
    "FunctionStep",
    "PlainOperator",
    "call_of",
    "check_function",
    "check_whole",
    "error_text",
    "fail",
    "from_plain",
    "function_from_json",
    "function_to_json",
    "is_stateful",
    "needs_out",
    "operator_from_json",
    "parse_seconds",
    "seconds_text",
    "takes_out",
    "to_plain",
]

# --- plain values -----------------------------------------------------------------------------------------------------

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


def seconds_text(seconds: float) -> str:
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


# kind: where its class is
_CLASSES: Final = {
    "batch": ("batching", "BatchRows"),
    "branch": ("operators", "Branch"),
    "broadcast": ("operators", "Broadcast"),
    "derive": ("operators", "Derive"),
    "filter": ("operators", "Filter"),
    "filter_batches": ("batching", "FilterBatches"),
    "key_by": ("windows", "KeyBy"),
    "map": ("operators", "Map"),
    "map_batches": ("batching", "MapBatches"),
    "merge": ("operators", "Merge"),
    "rate_limit": ("batching", "RateLimit"),
    "select": ("operators", "Select"),
    "unbatch": ("batching", "Unbatch"),
    "window": ("windows", "Window"),
}


def operator_from_json(data: Mapping[str, Any]) -> Operator:
    """Return the operator that its `to_json` wrote. Imports the modules of its functions.

    Raises
    ------
    PipelineBuildError
        An unknown operator or parameter, a function that is not there.
    """
    kind = data.get("op")
    if kind not in _CLASSES:
        raise PipelineBuildError(f"there is no operator {kind!r}; there are: {', '.join(sorted(_CLASSES))}")
    module, name = _CLASSES[kind]
    cls = getattr(importlib.import_module(f"dsline.dataflow.{module}"), name)
    if hasattr(cls, "from_json"):
        made: Operator = cls.from_json(data)
        return made
    fields = [field for field in dataclasses.fields(cls) if field.init]
    names = {field.name for field in fields}
    given = {name: value for name, value in data.items() if name != "op"}
    unknown = sorted(set(given) - names)
    missing = [
        field.name for field in fields if field.default is dataclasses.MISSING and field.name not in given
    ]
    if unknown or missing:
        what = f"has no {unknown[0]!r}" if unknown else f"needs {missing[0]!r}"
        raise PipelineBuildError(f"operator {kind!r} {what}; it has {', '.join(sorted(names))}")
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


def error_text(error: BaseException) -> str:
    """Return str(error), whatever its own methods do."""
    try:
        return str(error)
    except Exception:
        return "(it has no text that can be made)"


# --- functions --------------------------------------------------------------------------------------------------------


def check_function(fn: Any, what: str) -> None:
    """Raise PipelineBuildError for what cannot be called with an item."""
    callables.check_callable(fn)
    target = call_of(fn)
    if inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target):
        raise PipelineBuildError(
            f"{what} {function_name(fn)} is asynchronous, and stages call plain functions"
        )


def _class_of(fn: Any) -> Any:
    """Return the class that `callables.instantiate` makes an object of; None for a function."""
    if not callables.is_class(fn):
        return None
    return fn.func if isinstance(fn, functools.partial) else fn


def call_of(fn: Any) -> Any:
    """Return the function that gets the items."""
    cls = _class_of(fn)
    return fn if cls is None else cls.__call__


def takes_out(fn: Any) -> bool:
    is_bound = isinstance(fn, functools.partial) and "out" in fn.keywords
    return not is_bound and callables.accepts_out(fn)


def needs_out(fn: Any) -> bool:
    if isinstance(fn, np.ufunc) or not takes_out(fn):
        return False
    parameter = inspect.signature(call_of(fn)).parameters["out"]
    return parameter.default is parameter.empty


class FunctionStep(Step):
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


def is_stateful(fn: Any) -> bool:
    return hasattr(_class_of(fn) or fn, "state_dict")
