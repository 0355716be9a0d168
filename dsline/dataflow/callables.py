"""A user's functions on their way to other processes and into texts, and callable classes in a worker."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import cloudpickle

from dsline.errors import PipelineBuildError

__all__ = [
    "PICKLING_ERRORS",
    "ByValuePickler",
    "Function",
    "accepts_out",
    "check_callable",
    "close",
    "function_name",
    "instantiate",
    "is_class",
    "is_plain_function",
    "main_classes",
    "pack",
    "reference",
    "resolve",
    "serve_main_classes",
    "unpack",
]

Function: TypeAlias = Callable[..., Any]

PICKLING_ERRORS = (pickle.PicklingError, TypeError, AttributeError)
"""What pickling raises for things that cannot be pickled."""

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_DEEPEST = 4  # how far the search for what cannot be pickled goes
_LARGEST_CLASS = 256 << 10  # bytes: a class of the main program that refers to more is not sent along


def function_name(function: Any) -> str:
    """Return what errors call a function or class: its qualified name, or its type's."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


# --- to other processes -------------------------------------------------------------------------------------------------


def pack(function: Any) -> bytes:
    """Pickle a function, class or object for another process.

    By reference where another process can import it; by value where it cannot: what the main program, a cell or another
    function defines. The main program itself is never imported by a worker.

    Raises
    ------
    PipelineBuildError
        It cannot be pickled; the message names what in it cannot.
    """
    try:
        with _unimportable_by_value(function):
            packed: bytes = cloudpickle.dumps(function, protocol=5)
        return packed
    except Exception as error:
        found = _culprit(function, _DEEPEST)
        where = f": {found}" if found else f" ({type(error).__name__}: {error})"
        raise PipelineBuildError(
            f"{function_name(function)} cannot be brought to a worker process{where}; make what cannot be pickled inside "
            "of the worker (a callable class is constructed there), or run the stage with workers=0"
        ) from error


def unpack(packed: bytes) -> Any:
    """Return what `pack` was given. Raises whatever importing and unpickling raise."""
    return pickle.loads(packed)


class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """For data: what the main program defines is pickled with its definition. Called as pickle's own class is."""

    def __init__(
        self, file: Any, protocol: int, fix_imports: bool, buffer_callback: Callable[[Any], Any]
    ) -> None:
        super().__init__(file, protocol=protocol, buffer_callback=buffer_callback)


def is_plain_function(function: Any) -> bool:
    """Whether a function has no state of its own that a call could change."""
    return inspect.isbuiltin(function) or (inspect.isfunction(function) and function.__closure__ is None)


@contextlib.contextmanager
def _unimportable_by_value(function: Any) -> Iterator[None]:
    """Treat the module of a function as part of it where only this process has that module: it was loaded from a path, say."""
    name = getattr(function, "__module__", None)
    module = sys.modules.get(name) if isinstance(name, str) else None
    if module is None or name == "__main__" or _can_be_imported(module.__name__):
        yield
        return
    known = module.__name__ in cloudpickle.list_registry_pickle_by_value()
    if not known:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        if not known:
            cloudpickle.unregister_pickle_by_value(module)


def _can_be_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is not None and spec.origin in ("built-in", "frozen"):
        return True
    path = None
    parent, _, _ = name.rpartition(".")
    if parent:
        if not _can_be_imported(parent):
            return False
        path = getattr(sys.modules.get(parent), "__path__", None)
        if path is None:
            return spec is not None
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        with contextlib.suppress(Exception):
            if find is not None and find(name, path) is not None:
                return True
    return False


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    """What a function, class or object brings along when it is pickled by value, by name."""
    if isinstance(thing, functools.partial):
        yield from (("its function", thing.func), *((f"argument {i}", v) for i, v in enumerate(thing.args)))
        yield from thing.keywords.items()
        return
    if inspect.ismethod(thing):
        yield "its object", thing.__self__
        thing = thing.__func__
    if inspect.isfunction(thing):
        with contextlib.suppress(ValueError, TypeError):
            found = inspect.getclosurevars(thing)
            yield from found.nonlocals.items()
            yield from ((name, value) for name, value in found.globals.items() if not inspect.ismodule(value))
        yield from (thing.__kwdefaults__ or {}).items()
        yield from ((f"default {i}", v) for i, v in enumerate(thing.__defaults__ or ()))
    elif isinstance(thing, dict):
        yield from ((repr(key), value) for key, value in thing.items())
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from ((f"item {i}", value) for i, value in enumerate(thing))
    elif hasattr(thing, "__dict__"):
        yield from vars(thing).items()


def _culprit(thing: Any, depth: int) -> str | None:
    """Name what in a thing cannot be pickled: "'log' (a _io.TextIOWrapper)"."""
    for name, part in _parts(thing):
        try:
            cloudpickle.dumps(part, protocol=5)
        except Exception:
            cls = type(part)
            inner = _culprit(part, depth - 1) if depth > 1 else None
            kind = (
                cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
            )
            what = f"'{name}' (a {kind})"
            return f"{what}, in it {inner}" if inner else what
    return None


class _LimitedFile:
    """Takes a pickle up to a size, so that nothing large is copied only to be thrown away."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._chunks: list[bytes] = []

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._left -= size
        if self._left < 0:
            raise pickle.PicklingError("larger than the limit")
        self._chunks.append(bytes(data))
        return size

    def contents(self) -> bytes:
        return b"".join(self._chunks)


def main_classes() -> dict[str, bytes]:
    """Return the classes that the main program defines, each pickled by value.

    Items may be objects of them, and plain pickle knows only their names. Classes that cannot be pickled, or that refer to
    much, are left out.
    """
    found = {}
    for name, value in tuple(vars(sys.modules["__main__"]).items()):
        if isinstance(value, type) and value.__module__ == "__main__" and value.__qualname__ == name:
            file = _LimitedFile(_LARGEST_CLASS)
            with contextlib.suppress(Exception):
                cloudpickle.Pickler(file, protocol=5).dump(value)
                found[name] = file.contents()
    return found


def serve_main_classes(packed: dict[str, bytes]) -> None:
    """In a worker: let pickles find the classes of the parent's main program, made when first asked for."""
    main = sys.modules["__main__"]

    def find(name: str) -> Any:
        if name not in packed:
            raise AttributeError(
                f"a worker process does not have {name!r} of the main program; move it into a module that can be imported"
            )
        # The same class as any that came with a function: cloudpickle knows a class again.
        made = unpack(packed[name])
        setattr(main, name, made)
        return made

    main.__getattr__ = find  # type: ignore[method-assign]


# --- texts that stand for functions -------------------------------------------------------------------------------------


def reference(function: Any) -> str:
    """Return "module:qualname", from which `resolve` gets the function again.

    Raises
    ------
    PipelineBuildError
        No text stands for it: a lambda, a function inside of another, of the main program, or bound to an object.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        why = f"it is an object of {type(function).__qualname__}, not a function or class"
    elif inspect.ismethod(function) and not inspect.isclass(function.__self__):
        why = "it is bound to an object"
    elif name.rpartition(".")[2] == "<lambda>":
        why = "it is a lambda"
    elif "<locals>" in name:
        why = "it is defined inside of a function"
    elif module == "__main__":
        why = "it is defined in the main program"
    elif not _is_there(module, name, function):
        why = f"{module} has another {name}, or none"
    else:
        return f"{module}:{name}"
    raise PipelineBuildError(
        f"{function_name(function)} cannot be written as text: {why}; define it at the top of a module that can be imported"
    )


def _is_there(module: str, name: str, function: Any) -> bool:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return bool(found == function)


def resolve(text: str) -> Any:
    """Import what `reference` named. Runs the module's code: only for texts that are trusted like programs.

    Raises
    ------
    PipelineBuildError
        The text is no reference, or what it names is not there or cannot be called.
    """
    module, colon, name = str(text).partition(":")
    parts = [*module.split("."), *name.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise PipelineBuildError(
            f"{text!r} names no function: must be 'module:name', as 'package.module:function'"
        )
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise PipelineBuildError(
            f"{text!r} cannot be imported ({type(error).__name__}: {error}); the module must be on the path of this process"
        ) from error
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise PipelineBuildError(f"{text!r} is not there: {module} has no {name}") from None
    if not callable(found):
        raise PipelineBuildError(f"{text!r} is a {type(found).__qualname__}, which cannot be called")
    return found


# --- in a worker --------------------------------------------------------------------------------------------------------


def instantiate(function: Any) -> Function:
    """Return what is called per item: an object of a callable class, made now, or the function itself.

    A callable class comes as the class, or as a ``functools.partial`` of it with arguments for the constructor.

    Raises
    ------
    PipelineBuildError
        It cannot be called, or the constructor wants other arguments. What the constructor raises passes.
    """
    check_callable(function)
    if is_class(function):
        made: Function = function()
        return made
    return function  # type: ignore[no-any-return]


def is_class(function: Any) -> bool:
    """Whether objects are made of it, once per worker: a class, or a partial of a class whose objects can be called."""
    if isinstance(function, functools.partial):
        return isinstance(function.func, type) and _defines_call(function.func)
    return isinstance(function, type) and (_defines_call(function) or _is_python_class(function))


def _is_python_class(cls: type) -> bool:
    """False for int, float32 and other types of C, which are functions that convert."""
    return bool(cls.__flags__ & _HEAP_TYPE)


def check_callable(function: Any) -> None:
    """Raise PipelineBuildError unless it can be called, or objects of it can be made and be called."""
    if not callable(function):
        raise PipelineBuildError(f"a {type(function).__qualname__} cannot be called: {function!r}")
    if not is_class(function):
        return
    given = function if isinstance(function, functools.partial) else functools.partial(function)
    cls: Any = given.func
    if not _defines_call(cls):
        raise PipelineBuildError(
            f"objects of {cls.__qualname__} cannot be called; a callable class has a method __call__(self, item)"
        )
    try:
        inspect.signature(cls).bind(*given.args, **given.keywords)
    except TypeError as error:
        raise PipelineBuildError(
            f"{cls.__qualname__} is constructed once in every worker, and its constructor wants other arguments ({error}); "
            f"give its parameters defaults, or pass functools.partial({cls.__qualname__}, ...)"
        ) from None
    except ValueError:  # a builtin without a signature: the call will tell
        pass


def _defines_call(cls: type) -> bool:
    return any("__call__" in vars(base) for base in cls.__mro__)


def close(function: Any) -> None:
    """Call the `close()` of an object that `instantiate` made, where it has one."""
    end = (
        None
        if inspect.isroutine(function) or isinstance(function, type)
        else getattr(function, "close", None)
    )
    if callable(end):
        end()


def accepts_out(function: Any) -> bool:
    """Whether a function, or the objects of a callable class, take a parameter `out` by keyword."""
    if is_class(function):
        cls: Any = function.func if isinstance(function, functools.partial) else function
        function = next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)
    if type(function).__name__ == "ufunc":  # has no signature in older NumPy
        return True
    try:
        found = inspect.signature(function).parameters.get("out")
    except (TypeError, ValueError):
        return False
    return found is not None and found.kind in (found.KEYWORD_ONLY, found.POSITIONAL_OR_KEYWORD)
