"""multiprocessing.Pipe: send/recv with pickle, and send_bytes/recv_bytes without.

Below 1 MiB Pipe(duplex=False), a pipe; from there on the default duplex one, a socket pair, which is the
faster of the two at those sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers.peer import Peer, Spec


def link(context: Any, spec: Spec) -> tuple[Any, Callable[[], None]]:
    ends = context.Pipe(duplex=spec.size >= 1 << 20)

    def remove() -> None:
        for end in ends:
            end.close()

    return ends, remove


def pickle_sender(ends: Any, spec: Spec) -> tuple[Callable[[Any], Any], Callable[[], None]]:
    ends[0].close()
    return ends[1].send, ends[1].close


def pickle_receiver(ends: Any, spec: Spec) -> tuple[Callable[[], Any], Callable[[], None]]:
    ends[1].close()
    return ends[0].recv, ends[0].close


def bytes_sender(ends: Any, spec: Spec) -> tuple[Callable[[Any], Any], Callable[[], None]]:
    ends[0].close()
    return ends[1].send_bytes, ends[1].close


def bytes_receiver(ends: Any, spec: Spec) -> tuple[Callable[[], Any], Callable[[], None]]:
    ends[1].close()
    return ends[0].recv_bytes, ends[0].close


PEERS = [
    Peer(
        "mp.Pipe send",
        "at least 5 copies: pickle, pipe in and out, unpickle",
        link,
        pickle_sender,
        pickle_receiver,
    ),
    Peer(
        "mp.Pipe send_bytes", "4 copies: pipe in and out, BytesIO, bytes", link, bytes_sender, bytes_receiver
    ),
]
