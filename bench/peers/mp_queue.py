"""multiprocessing.Queue, as it is: a feeder thread pickles into a pipe, get() unpickles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers.peer import Peer, Spec


def link(context: Any, spec: Spec) -> tuple[Any, Callable[[], None]]:
    queue = context.Queue(spec.slots)

    def remove() -> None:
        queue.close()
        queue.join_thread()

    return queue, remove


def sender(queue: Any, spec: Spec) -> tuple[Callable[[Any], Any], Callable[[], None]]:
    def close() -> None:
        queue.close()
        queue.join_thread()

    return queue.put, close


def receiver(queue: Any, spec: Spec) -> tuple[Callable[[], Any], Callable[[], None]]:
    return queue.get, queue.close


# The feeder pickles after put() has returned, so the message must not change until then.
PEERS = [
    Peer(
        "mp.Queue",
        "at least 5 copies: pickle, pipe in and out, unpickle",
        link,
        sender,
        receiver,
        copied_at_send=False,
    )
]
