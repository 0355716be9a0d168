"""Latest: a value that is overwritten, with readers that see the newest one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

from dsline import _core
from dsline.broadcast import Broadcast
from dsline.channel import Stats
from dsline.closing import Closing
from dsline.errors import BufferEmptyError, ChannelMismatchError
from dsline.options import Backpressure, Checksum, OnStale, Storage
from dsline.report import PeerDeath
from dsline.specs import Spec

__all__ = ["Latest", "Reading"]

# Four values can be written before the one that a reader is copying is overwritten, while four others are being written.
_CAPACITY = 8
_HISTORY = 4
_NOTHING = object()


@dataclasses.dataclass(frozen=True)
class Reading:
    """A value of a `Latest` with what came with it.

    Attributes
    ----------
    value : numpy.ndarray or bytes
        A copy of its own, writable if it is an array.
    sequence : int
        Counts the values that were set.
    timestamp_ns : int
        When it was set, as `time.time_ns()`.
    meta : dict
        As it was set with.
    """

    value: Any
    sequence: int
    timestamp_ns: int
    meta: dict[str, Any]


class Latest(Closing):
    """A cell in shared memory that holds one value: the one that was set last.

    For state that is overwritten: a pose, a set of weights, the newest frame. Any number of processes set and get. Nobody
    waits for anybody: `set` never waits for readers, and a reader copies the value and looks whether it was whole.

    Parameters
    ----------
    name : str or None
        As for `ShmChannel`; None makes an anonymous cell, which is passed to processes as an argument.
    slot_size : int, optional
        Bytes that are reserved for a value, eight times. 65536 when created. Larger values just work.
    max_message_size : int, optional
        Bytes of a value at most.
    checksum, storage, mode, on_stale, max_handles, spec : optional
        As for `ShmChannel`. With a dict as `spec`, values are dicts, of what `ShmChannel.send` takes for a record.
    timeout : float or None
        Seconds that `wait_newer` of this handle waits unless it says otherwise; None for ever.

    Notes
    -----
    Setting copies once, getting copies once. From 64 KiB on the GIL is released while a value is copied. A reader that is
    overtaken by four values while it copies begins anew.

    The value stays while any handle is open; the last one of a named cell takes the name and the value along.

    Examples
    --------
    >>> import dsline, numpy as np
    >>> with dsline.Latest() as cell:
    ...     _ = cell.set(np.arange(3))
    ...     cell.get()
    array([0, 1, 2])
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        slot_size: int | None = None,
        max_message_size: int | None = None,
        checksum: Checksum | str | None = None,
        storage: Storage | str = Storage.SHM,
        mode: int = 0o600,
        on_stale: OnStale | str = OnStale.RECOVER,
        max_handles: int | None = None,
        timeout: float | None = None,
        spec: Spec | None = None,
    ) -> None:
        self._channel = Broadcast(
            name,
            capacity=_CAPACITY,
            history=_HISTORY,
            slot_size=slot_size,
            max_message_size=max_message_size,
            backpressure=Backpressure.DROP_OLDEST,
            checksum=checksum,
            storage=storage,
            mode=mode,
            on_stale=on_stale,
            max_handles=max_handles,
            timeout=timeout,
            spec=spec,
        )

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        slot_size: int | None = None,
        max_message_size: int | None = None,
        checksum: Checksum | str | None = None,
        storage: Storage | str = Storage.SHM,
        mode: int = 0o600,
        on_stale: OnStale | str = OnStale.RECOVER,
        max_handles: int | None = None,
        timeout: float | None = None,
        spec: Spec | None = None,
    ) -> Self:
        """Create a cell; ChannelExistsError when one of that name is in use. Parameters as for the class."""
        return cls._over(
            Broadcast.create(
                name,
                capacity=_CAPACITY,
                history=_HISTORY,
                slot_size=slot_size,
                max_message_size=max_message_size,
                backpressure=Backpressure.DROP_OLDEST,
                checksum=checksum,
                storage=storage,
                mode=mode,
                on_stale=on_stale,
                max_handles=max_handles,
                timeout=timeout,
                spec=spec,
            )
        )

    @classmethod
    def open(cls, name: str, *, timeout: float | None = None, spec: Spec | None = None) -> Self:
        """Open the cell of that name; ChannelNotFoundError when there is none, SchemaMismatchError with another spec."""
        channel = Broadcast.open(name, backpressure=Backpressure.DROP_OLDEST, timeout=timeout, spec=spec)
        if channel.history == 0:
            channel.close()
            raise ChannelMismatchError(f"channel {name!r} is a Broadcast without a history, not a Latest")
        return cls._over(channel)

    @classmethod
    def _over(cls, channel: Broadcast) -> Self:
        cell = cls.__new__(cls)
        cell._channel = channel
        return cell

    def set(self, value: Any, meta: dict[str, Any] | None = None) -> bool:
        """Set the value.

        Parameters
        ----------
        value : bytes, bytearray, memoryview, numpy.ndarray or any buffer exporter
            As for `ShmChannel.send`.
        meta : dict, optional
            Metadata that comes with it, see `read`.

        Returns
        -------
        bool
            True. False when eight others are being set at this moment: one of them is the newest then.

        Notes
        -----
        Never waits, neither for readers nor for others that set.
        """
        return self._channel.send(value, timeout=0, meta=meta)

    def get(self, default: Any = _NOTHING) -> Any:
        """Return a copy of the value.

        Parameters
        ----------
        default : optional
            What to return when nothing has been set.

        Returns
        -------
        numpy.ndarray, bytes or dict
            As it was set. An array is writable and the caller's own; a record is a dict of such arrays (a field without
            dimensions is a NumPy scalar).

        Raises
        ------
        BufferEmptyError
            Nothing has been set and no default is given.
        """
        found = self._channel._core_latest(None, False)
        if found is not None:
            return self._value(found[0])
        if default is _NOTHING:
            raise self._empty()
        return default

    def get_with_sequence(self) -> tuple[Any, int]:
        """Return a copy of the value, and its sequence number; BufferEmptyError when nothing has been set."""
        found = self._channel._core_latest(None, False)
        if found is None:
            raise self._empty()
        return self._value(found[0]), found[1]

    def read(self) -> Reading:
        """Return a copy of the value with everything that came with it; BufferEmptyError when nothing has been set."""
        found = self._channel._core_latest(None, True)
        if found is None:
            raise self._empty()
        value, sequence, timestamp_ns, meta = found
        return Reading(self._value(value), sequence, timestamp_ns, meta or {})

    def wait_newer(
        self, sequence: int | None = None, timeout: float | None = _core.DEFAULT_TIMEOUT
    ) -> tuple[Any, int]:
        """Wait until there is a value behind a sequence number.

        Parameters
        ----------
        sequence : int or None
            Of a value that is known already; None for any value.
        timeout : float or None, optional
            Seconds to wait: None for ever, 0 not at all. The handle's by default.

        Returns
        -------
        (numpy.ndarray or bytes, int)
            A copy of the newest value, and its sequence number. Values between are skipped.

        Raises
        ------
        BufferEmptyError
            None was set in time.
        ChannelClosedError
            The cell is closed or shut down.
        """
        found = self._channel._core_wait_newer(sequence, timeout)
        return self._value(found[0]), found[1]

    def on_peer_death(self, callback: Callable[[PeerDeath], object]) -> Callable[[], None]:
        """Call back when a process has died with this cell open: as `ShmChannel.on_peer_death`, from `wait_newer`."""
        return self._channel.on_peer_death(callback)

    @property
    def sequence(self) -> int | None:
        """Sequence number of the value; None when nothing has been set."""
        return self._channel._core_latest_sequence()

    def _value(self, value: Any) -> Any:
        """What the user set: of a record, its fields."""
        return {name: value[name] for name in value.dtype.names} if isinstance(self.spec, dict) else value

    @property
    def spec(self) -> Spec | None:
        """What every value is: an `ArraySpec`, or a dict of them for records. None: values of any kind."""
        return self._channel.spec

    def _empty(self) -> BufferEmptyError:
        return BufferEmptyError(
            f"nothing has been set in {self._channel.name or self._channel.storage!r}; get(default) or wait_newer() do not "
            "raise for that"
        )

    # --- the rest ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """Name of the cell; None for an anonymous one."""
        return self._channel.name

    @property
    def path(self) -> str | None:
        """Path of the file that carries it; None for an anonymous one."""
        return self._channel.path

    @property
    def storage(self) -> str:
        """Where its memory lives: "shm", "memfd" or "heap"."""
        return self._channel.storage

    @property
    def closed(self) -> bool:
        """True when this handle is closed or the cell is shut down."""
        return self._channel.closed

    @property
    def timeout(self) -> float | None:
        """Seconds that `wait_newer` waits unless it says otherwise; None for ever."""
        return self._channel.timeout

    def stats(self) -> Stats:
        """Return the counters of the channel that carries it."""
        return self._channel.stats()

    def close(self) -> None:
        """End this handle; a second call does nothing. The last handle of a named cell takes the name along."""
        self._channel.close()

    def shutdown(self) -> None:
        """End the cell for all its handles: setting and waiting raise ChannelClosedError."""
        self._channel.shutdown()

    def unlink(self) -> None:
        """Remove the name now. Open handles go on."""
        self._channel.unlink()

    def __reduce__(self) -> Any:
        return _over_again, (type(self), self._channel)

    def __repr__(self) -> str:
        if self._channel.closed:
            state = "closed"
        else:
            state = "nothing set" if self.sequence is None else f"value {self.sequence}"
        return f"<dsline.Latest {self._channel.name or self._channel.storage!r}: {state}>"


def _over_again(cls: type[Latest], channel: Broadcast) -> Latest:
    """Unpickle a handle."""
    return cls._over(channel)
