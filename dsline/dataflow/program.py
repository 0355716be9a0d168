"""Finds the pipeline that a command line means: in a Python file, or a plan in JSON."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dsline.dataflow.pipeline import Pipeline
from dsline.dataflow.plan import Plan
from dsline.errors import DslineError, InvalidArgumentError, PipelineBuildError

__all__ = ["WrongCommandError", "failure_text", "load_plan", "parse_setting"]


class WrongCommandError(InvalidArgumentError):
    """The file is there, but not what is asked for in it."""


def parse_setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``. The value is a Python literal where it reads as one (4, 0.5, None, [1, 2]), else the text.

    Raises
    ------
    WrongCommandError
        There is no name or no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise WrongCommandError(f"{text!r} is no setting; write NAME=VALUE")
    try:
        return name.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return name.strip(), value


def load_plan(path: Path, name: str | None = None, settings: Mapping[str, Any] | None = None) -> Plan:
    """Return the plan of the pipeline that a file describes.

    Parameters
    ----------
    path : Path
        A .json file with a plan, or a Python file. That is imported under its own name from its folder, as its neighbours
        and the worker processes import it; what is under ``if __name__ == "__main__"`` does not run.
    name : str, optional
        Of a Python file: the variable that is a Pipeline, or the function that returns one. By default "pipeline".
    settings : mapping, optional
        Arguments of the function. Of a plan: "memory", or options of stages as "stage.option".

    Raises
    ------
    WrongCommandError
        There is no such pipeline in the file, or no such setting.
    PipelineBuildError
        The pipeline cannot run.

    Notes
    -----
    Runs code of the file, or imports what the plan names: both must be trusted. What the code raises goes through.
    """
    settings = settings or {}
    if path.suffix == ".json":
        if name is not None:
            raise WrongCommandError(
                f"{path} is a plan, which has one pipeline only; a name belongs to a Python file"
            )
        return _plan_of_json(path, settings)
    return _pipeline_of(path, _imported(path), name or "pipeline", settings).plan()


def _plan_of_json(path: Path, settings: Mapping[str, Any]) -> Plan:
    text = path.read_text(encoding="utf-8")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # the functions that it names may be beside it
    if settings:
        text = json.dumps(_changed(path, text, settings))
    return Plan.from_json(text)


def _changed(path: Path, text: str, settings: Mapping[str, Any]) -> Any:
    try:
        plain = json.loads(text)
        stages = {stage["name"]: stage for stage in plain["stages"]}
    except (ValueError, TypeError, KeyError):
        raise PipelineBuildError(f"{path} is no plan in JSON") from None
    for setting, value in settings.items():
        stage, dot, option = setting.rpartition(".")
        if not dot and setting == "memory":
            plain["memory"] = value
        elif stage in stages:
            stages[stage].setdefault("options", {})[option] = value
        else:
            raise WrongCommandError(
                f"{setting!r} is nothing that can be set in a plan; there are memory, and the options of the stages "
                f"{', '.join(stages)} as {next(iter(stages), 'stage')}.workers"
            )
    return plain


def _imported(path: Path) -> ModuleType:
    """Import a file under its own name, so that worker processes find its functions under it."""
    if path.suffix != ".py":
        raise WrongCommandError(f"{path} is neither a Python file (.py) nor a plan (.json)")
    name = path.stem
    folder = str(path.resolve().parent)
    if "." in name or name in sys.builtin_module_names:
        raise WrongCommandError(f"{path} cannot be imported under its name; give the file another one")
    there = sys.modules.get(name)
    if there is not None:
        raise WrongCommandError(
            f"{path} has the name of a module that is in use ({getattr(there, '__file__', None) or 'built in'}); give the "
            "file another one"
        )
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)  # before all others, as the folder of a program is
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _pipeline_of(path: Path, module: ModuleType, name: str, settings: Mapping[str, Any]) -> Pipeline:
    found = getattr(module, name, None)
    if found is None:
        others = [each for each, value in vars(module).items() if isinstance(value, Pipeline)]
        there = f"; there are {', '.join(sorted(others))}" if others else ""
        raise WrongCommandError(
            f"{path} has no {name!r}, neither a Pipeline nor a function that returns one{there}"
        )
    if isinstance(found, Pipeline):
        if settings:
            raise WrongCommandError(
                f"{name!r} of {path} is a Pipeline, in which nothing can be set; write a function that takes "
                f"{', '.join(settings)} and returns a Pipeline"
            )
        return found
    if not callable(found):
        raise WrongCommandError(
            f"{name!r} of {path} is of type {type(found).__name__}; it must be a Pipeline or a function"
        )
    try:
        inspect.signature(found).bind(**settings)
    except TypeError as error:
        raise WrongCommandError(f"{name}() of {path} does not take these settings: {error}") from None
    made = found(**settings)
    if not isinstance(made, Pipeline):
        raise WrongCommandError(
            f"{name}() of {path} returned {type(made).__name__}; it must return a Pipeline"
        )
    return made


def failure_text(error: BaseException, path: Path) -> str:
    """Say in one line what a file raised, and in which of its lines."""
    if isinstance(error, DslineError):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path.resolve()):
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f"{path}, line {line}: " if line is not None else f"{path}: "
    return f"{where}{type(error).__name__}: {error}"
