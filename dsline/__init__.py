"""Shared-memory channels that hand NumPy arrays from process to process on one machine."""

import importlib
from typing import TYPE_CHECKING, Any

from dsline import _interpreter as _interpreter  # first: it refuses subinterpreters
from dsline._core import VERSION as __version__
from dsline._core import DeadLetter, Loan, Message, build_config
from dsline.broadcast import Broadcast
from dsline.channel import FileChannel, ShmChannel, Stats, get_include
from dsline.errors import *  # noqa: F403
from dsline.errors import __all__ as _error_names
from dsline.groups import Subscriber
from dsline.latest import Latest
from dsline.options import Backpressure, Checksum, OnDeath, OnStale, Start, Storage, Sync
from dsline.pinned import PinnedViewsWarning
from dsline.queues import JoinableQueue, Queue, ShutDown, SimpleQueue
from dsline.report import Blocker, ChannelReport, PeerDeath
from dsline.rpc import Rpc
from dsline.rpc_server import RpcServer, RpcServerStats
from dsline.shared_batch import ReadyBatch, Row, SharedBatch
from dsline.specs import ArraySpec
from dsline.waiting import wait

if TYPE_CHECKING:
    from dsline.dataflow import aggregates as agg
    from dsline.dataflow import ops
    from dsline.dataflow.items import Batch, Columns
    from dsline.dataflow.pipeline import Pipeline
    from dsline.dataflow.plan import Plan
    from dsline.dataflow.policies import dead_letter, retry
    from dsline.dataflow.restart import Restart
    from dsline.dataflow.run import Run
    from dsline.dataflow.sinks import SinkOptions as Sink
    from dsline.dataflow.sources import files
    from dsline.dataflow.windows import session, sliding, tumbling
    from dsline.worker_pool import WorkerPool

__all__ = [
    "ArraySpec",
    "Backpressure",
    "Batch",
    "Blocker",
    "Broadcast",
    "ChannelReport",
    "Checksum",
    "Columns",
    "DeadLetter",
    "FileChannel",
    "JoinableQueue",
    "Latest",
    "Loan",
    "Message",
    "OnDeath",
    "OnStale",
    "PeerDeath",
    "PinnedViewsWarning",
    "Pipeline",
    "Plan",
    "Queue",
    "ReadyBatch",
    "Restart",
    "Row",
    "Rpc",
    "RpcServer",
    "RpcServerStats",
    "Run",
    "SharedBatch",
    "ShmChannel",
    "ShutDown",
    "SimpleQueue",
    "Sink",
    "Start",
    "Stats",
    "Storage",
    "Subscriber",
    "Sync",
    "WorkerPool",
    "__version__",
    "agg",
    "build_config",
    "dead_letter",
    "files",
    "get_include",
    "ops",
    "retry",
    "session",
    "sliding",
    "tumbling",
    "wait",
    *(name for name in _error_names if name != "TimeoutError"),
]


# Loaded at first use: nobody who only sends and receives pays for them.
_MODULES = frozenset({"aio", "bench", "expressions", "multiprocessing", "status", "testing"})
_DATAFLOW = {
    "Batch": "items",
    "Columns": "items",
    "Pipeline": "pipeline",
    "Plan": "plan",
    "Restart": "restart",
    "Run": "run",
    "Sink": "sinks",
    "agg": "aggregates",
    "dead_letter": "policies",
    "files": "sources",
    "ops": "ops",
    "retry": "policies",
    "session": "windows",
    "sliding": "windows",
    "tumbling": "windows",
}
_RENAMED = {"Sink": "SinkOptions"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"dsline.{name}")
    if name == "WorkerPool":
        return importlib.import_module("dsline.worker_pool").WorkerPool
    if name in _DATAFLOW:
        module = importlib.import_module(f"dsline.dataflow.{_DATAFLOW[name]}")
        found = module if name in ("agg", "ops") else getattr(module, _RENAMED.get(name, name))
        globals()[name] = found
        return found
    raise AttributeError(f"module 'dsline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
