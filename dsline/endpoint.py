"""What channels and their subscribers share: attributes, counters, ends, and how handles travel to other processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.context
import multiprocessing.reduction
import multiprocessing.util
import threading
from collections.abc import Iterator
from typing import Any

from dsline import _core, interop
from dsline.closing import Closing
from dsline.errors import FeatureUnavailableError
from dsline.options import CHECKSUM_CODES, Checksum
from dsline.report import ChannelReport

__all__ = ["Endpoint", "Stats"]


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counters of a channel and of this handle, read one after the other without stopping anybody.

    Attributes
    ----------
    depth : int
        Messages that wait to be received, in the handle's group.
    capacity, free_slots, pinned_slots, corrupted_slots : int
        Slots in all, free, held by receivers, and out of use after a damaged message.
    next_sequence, head_sequence : int
        Sequence of the next message to be sent, and of the next to be received by the handle's group.
    sent, received, bytes_sent, bytes_received : int
        By this handle.
    pinned_views : int
        Received messages that views of this handle still hold in their slots.
    forced_copies : int
        Messages that this handle gave out as copies since it, or all receivers together, held too many. See `max_pinned`.
    send_waits, recv_waits : int
        How often this handle had to wait.
    dropped_oldest, redelivered : int
        Messages of the handle's group that a sender dropped, and that came again.
    lost : int
        Those of `dropped_oldest` that were dropped since this handle was opened.
    dropped_newest, unheard, corrupted : int
        Messages of the channel that a sender did not send, that no group was there for, and that were damaged.
    dead_letters, buried, letters_dropped : int
        Dead letters that are there, that ever came to be, and that had to go for newer ones.
    deaths : int
        Handles that were found dead.
    reserved_bytes : int
        Memory that the channel takes.
    participants : int
        Open handles.
    loans : int
        Loans of this handle that are neither published nor gone.
    kept_slots : int
        Published messages whose sender still has an array on them.
    """

    depth: int
    capacity: int
    next_sequence: int
    head_sequence: int
    sent: int
    received: int
    dropped_newest: int
    dropped_oldest: int
    lost: int
    unheard: int
    redelivered: int
    dead_letters: int
    buried: int
    letters_dropped: int
    deaths: int
    send_waits: int
    recv_waits: int
    pinned_views: int
    forced_copies: int
    pinned_slots: int
    free_slots: int
    corrupted_slots: int
    bytes_sent: int
    bytes_received: int
    corrupted: int
    reserved_bytes: int
    participants: int
    loans: int
    kept_slots: int

    def asdict(self) -> dict[str, int]:
        """Return the counters as a dict."""
        return dataclasses.asdict(self)


class Endpoint(Closing, _core.Receiver):
    """A handle of a channel."""

    _name: str | None
    _default_timeout: float | None
    _max_pinned: int | str = "auto"

    def _set_max_pinned(self, wanted: int | str | None, number: int) -> None:
        self._max_pinned = "auto" if wanted is None else wanted
        self._core_set_budget(number)

    @property
    def max_pinned(self) -> int | str:
        """How many received messages views of this handle may keep in their slots: a number, "auto" or "unlimited"."""
        return self._max_pinned

    @property
    def name(self) -> str | None:
        """Name of the channel; None for an anonymous one."""
        return self._name

    @property
    def path(self) -> str | None:
        """Path of the file that carries the channel; None for an anonymous one."""
        return self._core_path() or None

    @property
    def storage(self) -> str:
        """Where its memory lives: "shm", "memfd", "heap" or "file"."""
        return self._core_storage()

    @property
    def checksum(self) -> Checksum:
        """What the CRC32C of a message covers."""
        return list(CHECKSUM_CODES)[self._core_checksum()]

    @property
    def timeout(self) -> float | None:
        """Seconds that calls of this handle wait unless they say otherwise; None for ever."""
        return self._default_timeout

    def recv_arrow(self, *, timeout: float | None = _core.DEFAULT_TIMEOUT, library: str | None = None) -> Any:
        """Receive the next message as the table that was sent by `send_arrow`.

        Parameters
        ----------
        timeout : float or None, optional
            As for `recv`.
        library : str, optional
            "pyarrow" or "polars". By default pyarrow, or polars where that is not installed.

        Returns
        -------
        pyarrow.Table or polars.DataFrame
            The table's columns are views on the slot, which is taken until the last of them is gone. The frame is a copy.

        Raises
        ------
        FeatureUnavailableError
            The package is not installed. Nothing was taken.
        SchemaMismatchError
            Something else was sent. It stays in the channel.
        SerializationError
            The message is marked as Arrow, but cannot be read. It is given back, and comes again with the next `attempt`.

        Notes
        -----
        Releases the GIL while it waits.
        """
        name, module = interop.arrow_library(library)
        message = self._core_recv_encoded(interop.ARROW, timeout)
        with message:
            return interop.read_arrow(message.payload, name, module)

    def stats(self) -> Stats:
        """Return the counters of the channel and of this handle."""
        return Stats(**self._core_stats())

    def inspect(self) -> ChannelReport:
        """Return the channel as it stands: participants, groups, and who holds what since when."""
        self._core_path()  # refuses an object that was never opened
        handle = self._core_handle()
        assert handle is not None
        return handle.report()

    def dead_letters(self) -> Iterator[_core.DeadLetter]:
        """Take the dead letters of all groups of the channel, the oldest first, one at each step.

        Yields
        ------
        DeadLetter
            Held by this handle until it is released (and gone), revived, or let go of (and a dead letter again).

        Notes
        -----
        Looks after the dead first, as `check_peers` does. Never waits. Each letter comes once per call, also when it has been
        given back meanwhile.
        """
        self.check_peers()
        seen: set[tuple[str | None, int]] = set()
        while True:
            # A letter that was given back is the oldest again: it is held while those behind it are looked at.
            passed = []
            while (letter := self._core_dead_letter()) is not None:
                if (letter.group, letter.sequence) not in seen:
                    break
                passed.append(letter)
            for other in passed:
                other.nack()
            if letter is None:
                return
            seen.add((letter.group, letter.sequence))
            yield letter
            del letter  # an exception must not find it here


# --- the end of the process ---------------------------------------------------------------------------------------------


def _leave_child() -> None:
    # The threads of a child are joined only after its finalizers: they may still send.
    for thread in threading.enumerate():
        if (
            not thread.daemon
            and thread is not threading.current_thread()
            and thread is not threading.main_thread()
        ):
            thread.join()
    _core.leave_all()


def _leave_at_exit_of_child(_: object) -> None:
    # Children of multiprocessing end by os._exit; what ends by exit() needs no help.
    multiprocessing.util.Finalize(None, _leave_child, exitpriority=-100)


class _Anchor:
    """register_after_fork() keeps only a weak reference to its object."""


_anchor = _Anchor()
multiprocessing.util.register_after_fork(_anchor, _leave_at_exit_of_child)
if multiprocessing.parent_process() is not None:
    _leave_at_exit_of_child(None)


# --- handles of anonymous channels travel as descriptors ----------------------------------------------------------------


def descriptor_for_child(endpoint: Endpoint) -> Any:
    """Return a copy of the channel's descriptor, in the form that multiprocessing passes on.

    Raises
    ------
    FeatureUnavailableError
        The memory is this process's own, or nothing that could pass a descriptor on is at work.
    """
    if endpoint.storage == "heap":
        raise FeatureUnavailableError(
            "a heap channel cannot go to another process: its memory is this process's own; use a named or anonymous "
            "channel"
        )
    if multiprocessing.context.get_spawning_popen() is None:
        raise FeatureUnavailableError(
            "an anonymous channel can be pickled only while a process is being started, or over a connection of "
            "multiprocessing; give it a name to pickle it anywhere"
        )
    return multiprocessing.reduction.DupFd(endpoint.fileno_shared())


def teach_multiprocessing(cls: type[Endpoint]) -> None:
    """Let connections of multiprocessing carry handles of anonymous channels; plain pickle does not."""
    multiprocessing.reduction.ForkingPickler.register(cls, _reduce_for_connection)


def _reduce_for_connection(endpoint: Any) -> Any:
    if endpoint._name is not None or endpoint.storage == "heap":
        return endpoint.__reduce__()
    return endpoint._recipe(multiprocessing.reduction.DupFd(endpoint.fileno_shared()))
