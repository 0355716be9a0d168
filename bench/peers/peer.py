"""What a file of this folder provides: peers, each a way between two processes, and limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

SIZES = (8, 64, 512, 4096, 64 << 10, 1 << 20, 6 << 20)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One run: everything that the two processes must agree on."""

    size: int
    count: int
    touch: str = "none"
    cpus: tuple[int, int] | None = None

    @property
    def slots(self) -> int:
        """Messages that may wait in the transport: 8 MiB worth, 4 to 64."""
        return max(4, min(64, (8 << 20) // self.size))

    @property
    def warmup(self) -> int:
        return 2 * self.slots + 14


@dataclasses.dataclass(frozen=True)
class Peer:
    """A way to hand messages to another process.

    ``link(context, spec)`` runs in the parent and returns (what both ends need, a call that removes it).
    ``sender(link, spec)`` returns (send, close) and ``receiver(link, spec)`` returns (recv, close), in their
    own processes. ``copied_at_send`` tells that the message may be overwritten once send has returned.
    """

    name: str
    path: str
    link: Callable[[Any, Spec], tuple[Any, Callable[[], None]]]
    sender: Callable[[Any, Spec], tuple[Callable[[Any], Any], Callable[[], None]]]
    receiver: Callable[[Any, Spec], tuple[Callable[[], Any], Callable[[], None]]]
    copied_at_send: bool = True
    sizes: tuple[int, ...] = SIZES


@dataclasses.dataclass(frozen=True)
class Limit:
    """A bound that no transport passes: ``run(spec)`` returns the seconds of one process without a peer."""

    name: str
    path: str
    run: Callable[[Spec], float]
    sizes: tuple[int, ...] = SIZES
