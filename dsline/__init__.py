"""Shared-memory channels that hand NumPy arrays from process to process on one machine."""

import importlib
from typing import Any

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

__all__ = [
    "ArraySpec",
    "Backpressure",
    "Blocker",
    "Broadcast",
    "ChannelReport",
    "Checksum",
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
    "Queue",
    "ReadyBatch",
    "Row",
    "Rpc",
    "RpcServer",
    "RpcServerStats",
    "SharedBatch",
    "ShmChannel",
    "ShutDown",
    "SimpleQueue",
    "Start",
    "Stats",
    "Storage",
    "Subscriber",
    "Sync",
    "__version__",
    "build_config",
    "get_include",
    "wait",
    *(name for name in _error_names if name != "TimeoutError"),
]


def __getattr__(name: str) -> Any:
    # Loaded at first use: nobody who only sends and receives pays for them.
    if name in ("aio", "bench", "expressions", "multiprocessing", "status", "testing"):
        return importlib.import_module(f"dsline.{name}")
    if name == "WorkerPool":
        from dsline.worker_pool import WorkerPool

        return WorkerPool
    raise AttributeError(f"module 'dsline' has no attribute {name!r}")
