"""Shared-memory channels that hand NumPy arrays from process to process on one machine."""

import importlib
from types import ModuleType

from dsline import _interpreter as _interpreter  # first: it refuses subinterpreters
from dsline._core import VERSION as __version__
from dsline._core import DeadLetter, Message, build_config
from dsline.broadcast import Broadcast
from dsline.channel import FileChannel, ShmChannel, Stats, get_include
from dsline.errors import *  # noqa: F403
from dsline.errors import __all__ as _error_names
from dsline.groups import Subscriber
from dsline.latest import Latest
from dsline.options import Backpressure, Checksum, OnDeath, OnStale, Start, Storage, Sync
from dsline.pinned import PinnedViewsWarning
from dsline.report import Blocker, ChannelReport, PeerDeath
from dsline.shared_batch import ReadyBatch, Row, SharedBatch

__all__ = [
    "Backpressure",
    "Blocker",
    "Broadcast",
    "ChannelReport",
    "Checksum",
    "DeadLetter",
    "FileChannel",
    "Latest",
    "Message",
    "OnDeath",
    "OnStale",
    "PeerDeath",
    "PinnedViewsWarning",
    "ReadyBatch",
    "Row",
    "SharedBatch",
    "ShmChannel",
    "Start",
    "Stats",
    "Storage",
    "Subscriber",
    "Sync",
    "__version__",
    "build_config",
    "get_include",
    *(name for name in _error_names if name != "TimeoutError"),
]


def __getattr__(name: str) -> ModuleType:
    # Loaded at first use: nobody who only sends and receives pays for them.
    if name in ("bench", "status", "testing"):
        return importlib.import_module(f"dsline.{name}")
    raise AttributeError(f"module 'dsline' has no attribute {name!r}")
