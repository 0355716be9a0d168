"""Broadcast: a channel whose messages go to subscribers only."""

from __future__ import annotations

from dsline.channel import SharedMemoryChannel

__all__ = ["Broadcast"]


class Broadcast(SharedMemoryChannel):
    """A channel without the default group: every group of subscribers gets every message, and nobody else does.

    Messages that are sent while there is no group are gone, and counted in ``stats().unheard``. Made by the class, by
    `Broadcast.create` or by `Broadcast.open`, with the parameters of `ShmChannel`. It cannot receive: its receiving
    calls raise FeatureUnavailableError, and `subscribe` makes who can.

    Notes
    -----
    A group that lags keeps the slots of what it has not received: then senders do as their `backpressure` says. With
    "drop_oldest" the slowest group loses its oldest messages, counted in its `lost`, and a sender never waits.

    A name is that of a Broadcast or of a ShmChannel: opening it as the other raises ChannelMismatchError.

    Examples
    --------
    >>> import dsline
    >>> with dsline.Broadcast(capacity=4, slot_size=64) as ch, ch.subscribe() as viewer:
    ...     ch.send(b"hello")
    ...     bytes(viewer.recv())
    True
    b'hello'
    """

    _default_group = False
