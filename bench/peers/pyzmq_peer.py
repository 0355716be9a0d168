"""pyzmq: PUSH to PULL over ipc, with copy=True, and with copy=False for the large messages it is meant for.

The high-water marks hold the same number of messages as the other peers queue, but never fewer than the
default of 1000 below 64 KiB: smaller ones stall its I/O thread.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import zmq
from peers.peer import SIZES, Peer, Spec


def link(context: Any, spec: Spec) -> tuple[str, Callable[[], None]]:
    folder = tempfile.mkdtemp(prefix="dsline-bench-")
    return f"ipc://{folder}/socket", functools.partial(shutil.rmtree, folder)


def _socket(kind: int, spec: Spec) -> Any:
    socket = zmq.Context.instance().socket(kind)
    waiting = 1000 if spec.size < 64 << 10 else spec.slots
    socket.set_hwm(waiting)
    return socket


def sender(copy: bool, address: str, spec: Spec) -> tuple[Callable[[Any], Any], Callable[[], None]]:
    socket = _socket(zmq.PUSH, spec)
    socket.copy_threshold = 0
    socket.connect(address)

    def close() -> None:
        socket.close()
        zmq.Context.instance().term()

    return (socket.send if copy else functools.partial(socket.send, copy=False)), close


def receiver(copy: bool, address: str, spec: Spec) -> tuple[Callable[[], Any], Callable[[], None]]:
    socket = _socket(zmq.PULL, spec)
    socket.bind(address)
    if copy:
        return socket.recv, socket.close

    def recv() -> Any:
        return socket.recv(copy=False).buffer

    return recv, socket.close


def _peer(copy: bool) -> Peer:
    return Peer(
        f"pyzmq copy={copy}",
        "4 copies: message, socket in and out, bytes" if copy else "2 copies: socket in and out",
        link,
        functools.partial(sender, copy),
        functools.partial(receiver, copy),
        # Without a copy the I/O thread reads the message after send() has returned.
        copied_at_send=copy,
        sizes=SIZES if copy else tuple(size for size in SIZES if size >= 64 << 10),
    )


PEERS = [_peer(True), _peer(False)]
