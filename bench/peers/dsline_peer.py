"""dsline: one channel, one handle in each process; one row per receiving call."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Callable
from typing import Any

from peers.message import ARRAYS_FROM
from peers.peer import SIZES, Peer, Spec

import dsline
from dsline.bench import DATA_PATHS


def link(context: Any, spec: Spec) -> tuple[str, Callable[[], None]]:
    name = f"bench-{os.getpid()}-{secrets.token_hex(4)}"
    channel = dsline.ShmChannel.create(name, capacity=spec.slots, slot_size=spec.size)

    def remove() -> None:
        channel.unlink()
        channel.close()

    return name, remove


def sender(name: str, spec: Spec) -> tuple[Callable[[Any], Any], Callable[[], None]]:
    channel = dsline.ShmChannel.open(name)
    return channel.send, channel.close


def receiver(call: str, name: str, spec: Spec) -> tuple[Callable[[], Any], Callable[[], None]]:
    channel = dsline.ShmChannel.open(name)
    return getattr(channel, call), channel.close


PEERS = [
    Peer(
        f"dsline {call}",
        DATA_PATHS[call],
        link,
        sender,
        functools.partial(receiver, call),
        sizes=tuple(size for size in SIZES if size >= (ARRAYS_FROM if call == "recv_array" else 0)),
    )
    for call in ("recv", "recv_array", "recv_bytes")
]
