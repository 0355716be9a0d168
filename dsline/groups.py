"""Subscriber: a member of a named group of a channel."""

from __future__ import annotations

import os
import secrets
from typing import Any

from dsline import pinned
from dsline.endpoint import Endpoint, teach_multiprocessing
from dsline.errors import InvalidArgumentError
from dsline.options import ON_DEATH_CODES, START_CODES, OnDeath, Start, parse_enum

__all__ = ["Subscriber"]


class Subscriber(Endpoint):
    """A member of a group that gets every message of a channel, shared among the group's members.

    Made by `subscribe` of a channel, of which it is independent: it is a handle of its own, and receives by the same calls.
    It cannot send.

    Notes
    -----
    Passed to another process, it is one more member of the same group there. When the last member of a group closes or
    dies, the group goes with what waits for it, unless it is durable.

    Examples
    --------
    >>> import dsline
    >>> with dsline.Broadcast() as ch, ch.subscribe("log") as first, ch.subscribe("view") as second:
    ...     ch.send(b"seen by both")
    ...     bytes(first.recv()), bytes(second.recv())
    True
    (b'seen by both', b'seen by both')
    """

    _home: Any  # class of the channel
    _group: str
    _start_at: Start
    _on_death: OnDeath
    _durable: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a Subscriber is made by subscribe() of a channel")

    @classmethod
    def _of(
        cls,
        channel: Any,
        group: str | None,
        start: Start | str,
        on_death: OnDeath | str,
        durable: bool,
        timeout: float | None,
        max_pinned: int | str | None,
    ) -> Subscriber:
        budget = pinned.parse(max_pinned)
        if group is not None and not isinstance(group, str):
            raise TypeError(f"group is a {type(group).__name__}, must be str or None")
        if type(durable) is not bool:
            raise TypeError(f"durable is a {type(durable).__name__}, must be a bool")
        if group is None and durable:
            raise InvalidArgumentError("durable=True needs a group name, by which others can find the group")
        subscriber = cls.__new__(cls)
        subscriber._home = type(channel)
        subscriber._name = channel._name
        subscriber._group = f"{os.getpid()}-{secrets.token_hex(6)}" if group is None else group
        subscriber._start_at = parse_enum(Start, start, "start")
        subscriber._on_death = parse_enum(OnDeath, on_death, "on_death")
        subscriber._durable = durable
        subscriber._default_timeout = timeout
        subscriber._join(
            channel,
            subscriber._group,
            START_CODES[subscriber._start_at],
            ON_DEATH_CODES[subscriber._on_death],
            durable,
            timeout,
        )
        subscriber._set_max_pinned(max_pinned, budget)
        if channel.path is None and channel.storage != "heap":
            teach_multiprocessing(cls)
        return subscriber

    @property
    def group(self) -> str:
        """Name of the group."""
        return self._group

    @property
    def on_death(self) -> OnDeath:
        """What becomes of messages whose receiver dies."""
        return self._on_death

    @property
    def durable(self) -> bool:
        """Whether the group stays, and collects messages, while it has no members."""
        return self._durable

    @property
    def lag(self) -> int:
        """Messages that wait for the group; the same as ``len()``."""
        return len(self)

    @property
    def lost(self) -> int:
        """Messages that the group has lost to "drop_oldest" since this handle joined: gaps in `sequence`."""
        return self._core_lost()

    def leave(self) -> None:
        """End this handle as `close` does, and the group with it, also a durable one, if nobody else is a member."""
        if self._durable and not self.closed:
            members = next(
                (each.members for each in self.inspect().groups if each.active and each.name == self._group),
                0,
            )
            if members == 1:
                self.remove_group(self._group)
        self.close()

    def __repr__(self) -> str:
        if self._core_handle() is None:
            return "<dsline.Subscriber: never opened>"
        state = "closed" if self.closed else f"{len(self)} waiting"
        return f"<dsline.Subscriber {self._group!r} of {self._name or self.storage!r}: {state}>"

    def __reduce__(self) -> Any:
        return self._recipe(self._home._place_of(self))

    def _recipe(self, place: Any) -> Any:
        settings = (
            self._group,
            self._start_at,
            self._on_death,
            self._durable,
            self._default_timeout,
            self._max_pinned,
        )
        return _join_again, (self._home, place, self._core_uuid(), settings)


def _join_again(home: Any, place: Any, uuid: str, settings: Any) -> Subscriber:
    """Unpickle: one more member of the group."""
    with home._again(place, uuid) as channel:
        return Subscriber._of(channel, *settings)
