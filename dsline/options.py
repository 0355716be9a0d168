"""Enums, defaults and their units."""

import enum
from typing import TypeVar

__all__ = ["Backpressure", "Checksum", "OnDeath", "OnStale", "Start", "Storage", "Sync"]

E = TypeVar("E", bound=enum.Enum)


class Backpressure(enum.Enum):
    """What `send` does when no slot is free."""

    BLOCK = "block"
    """Wait for one, until the timeout (then BufferFullError)."""
    RAISE = "raise"
    """Raise BufferFullError at once."""
    DROP_NEWEST = "drop_newest"
    """Discard the message that was to be sent, and count it."""
    DROP_OLDEST = "drop_oldest"
    """Discard the oldest message that nobody has taken yet, and count it."""


class Checksum(enum.Enum):
    """What a message's CRC32C covers; a property of the channel."""

    NONE = "none"
    """Nothing; lengths and formats are still validated."""
    HEADER = "header"
    """Frame header and metadata."""
    FULL = "full"
    """Frame header, metadata and payload."""


class Storage(enum.Enum):
    """Where a channel's memory lives."""

    SHM = "shm"
    """POSIX shared memory: named, or (name=None) a sealed memfd."""
    MEMFD = "memfd"
    """An anonymous, sealed memfd; passed to other processes by multiprocessing."""
    HEAP = "heap"
    """Memory of this process, for its threads."""


class OnStale(enum.Enum):
    """What an opener does with a channel whose processes are all gone."""

    RECOVER = "recover"
    """Take it over with the messages that are in it."""
    RESET = "reset"
    """Drop it and start anew."""
    RAISE = "raise"
    """Raise ChannelExistsError."""


class Start(enum.Enum):
    """Where a subscriber group begins that does not exist yet."""

    NEXT = "next"
    """With the first message sent after it joined."""
    OLDEST = "oldest"
    """With the oldest message still in the channel: of the history, or what other groups have not taken."""
    LATEST = "latest"
    """With the newest message still in the channel."""


class OnDeath(enum.Enum):
    """What becomes of a message whose receiver died before it was done; a property of the group."""

    REDELIVER = "redeliver"
    """Another member gets it, marked as redelivered: at least once."""
    DROP = "drop"
    """It is released: at most once."""


class Sync(enum.Enum):
    """What `send` of a channel in a file waits for; a property of the channel."""

    NONE = "none"
    """Nothing: messages survive every death of processes, not a loss of power."""
    DATA = "data"
    """The disk: a message whose `send` returned survives a loss of power."""


BACKPRESSURE_CODES = {
    Backpressure.BLOCK: 0,
    Backpressure.RAISE: 1,
    Backpressure.DROP_NEWEST: 2,
    Backpressure.DROP_OLDEST: 3,
}
CHECKSUM_CODES = {Checksum.NONE: 0, Checksum.HEADER: 1, Checksum.FULL: 2}
START_CODES = {Start.NEXT: 0, Start.OLDEST: 1, Start.LATEST: 2}
ON_DEATH_CODES = {OnDeath.REDELIVER: 0, OnDeath.DROP: 1}
SYNC_CODES = {Sync.NONE: 0, Sync.DATA: 1}
ON_STALE_CODES = {OnStale.RECOVER: 0, OnStale.RESET: 1, OnStale.RAISE: 2}


def parse_enum(cls: type[E], value: E | str, what: str) -> E:
    """Return the member of `cls` that `value` is or names; ValueError lists the choices."""
    if isinstance(value, cls):
        return value
    try:
        return cls(value.lower() if isinstance(value, str) else value)
    except ValueError:
        choices = ", ".join(repr(member.value) for member in cls)
        raise ValueError(f"{what} is {value!r}, must be one of {choices}") from None
