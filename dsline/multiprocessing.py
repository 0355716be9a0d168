"""The multiprocessing package with dsline's queues in the place of its own.

>>> import dsline.multiprocessing as mp
>>> q = mp.Queue()
>>> type(q).__module__
'dsline.queues'

Everything else is multiprocessing's own: processes, locks, pipes, pools, managers, the start method. What is under
`multiprocessing` by another name (`mp.connection`, `mp.shared_memory`, ...) is found here, too; `mp.queues` is
`dsline.queues`.
"""

from __future__ import annotations

import importlib
import multiprocessing as _original
import multiprocessing.context as _context
import sys
from typing import Any

from dsline import queues

_get_context = _original.get_context  # bound: programs replace attributes of the module

_SUBMODULES = (
    "connection",
    "context",
    "dummy",
    "heap",
    "managers",
    "pool",
    "process",
    "reduction",
    "shared_memory",
    "sharedctypes",
    "synchronize",
    "util",
)


class _Queues:
    """The methods of a context that make queues. What else a context makes goes by the original one: a pool, for
    example, reads the pipes inside its queues."""

    _method: str | None = None

    def _theirs(self) -> Any:
        return _get_context(self._method)

    def Queue(self, maxsize: int = 0) -> queues.Queue:
        """Return a `dsline.Queue`."""
        return queues.Queue(maxsize, ctx=self._theirs())

    def JoinableQueue(self, maxsize: int = 0) -> queues.JoinableQueue:
        """Return a `dsline.JoinableQueue`."""
        return queues.JoinableQueue(maxsize, ctx=self._theirs())

    def SimpleQueue(self) -> queues.SimpleQueue:
        """Return a `dsline.SimpleQueue`."""
        return queues.SimpleQueue(ctx=self._theirs())

    def Pool(self, *args: Any, **options: Any) -> Any:
        """Return a pool of multiprocessing."""
        return self._theirs().Pool(*args, **options)

    def Manager(self) -> Any:
        """Return a manager of multiprocessing."""
        return self._theirs().Manager()

    def get_context(self, method: str | None = None) -> Any:
        """Return the context of a start method; without one, this one."""
        return self if method is None else get_context(method)


def _with_queues(kind: type[Any], method: str) -> Any:
    return type(kind.__name__, (_Queues, kind), {"_method": method, "__module__": __name__})()


_contexts: dict[str, Any] = {
    "fork": _with_queues(_context.ForkContext, "fork"),
    "spawn": _with_queues(_context.SpawnContext, "spawn"),
    "forkserver": _with_queues(_context.ForkServerContext, "forkserver"),
}


def get_context(method: str | None = None) -> Any:
    """Return a context of multiprocessing with dsline's queues.

    Parameters
    ----------
    method : str or None
        "fork", "spawn" or "forkserver"; None for the one that is set.
    """
    theirs = _get_context(method)  # refuses what it does not know
    return _contexts[theirs.get_start_method()]


def Queue(maxsize: int = 0) -> queues.Queue:
    """Return a `dsline.Queue`."""
    return queues.Queue(maxsize, ctx=get_context())


def JoinableQueue(maxsize: int = 0) -> queues.JoinableQueue:
    """Return a `dsline.JoinableQueue`."""
    return queues.JoinableQueue(maxsize, ctx=get_context())


def SimpleQueue() -> queues.SimpleQueue:
    """Return a `dsline.SimpleQueue`."""
    return queues.SimpleQueue(ctx=get_context())


_OWN = ("JoinableQueue", "Queue", "SimpleQueue", "get_context")
__all__ = sorted({*_original.__all__, *_OWN})
globals().update({name: getattr(_original, name) for name in __all__ if name not in _OWN})

# `import dsline.multiprocessing.pool` finds the modules here.
for _name in _SUBMODULES:
    globals()[_name] = sys.modules[f"{__name__}.{_name}"] = importlib.import_module(
        f"multiprocessing.{_name}"
    )
sys.modules[f"{__name__}.queues"] = queues


def __getattr__(name: str) -> Any:
    return getattr(_original, name)
