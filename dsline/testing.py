"""Help for tests that use channels: fresh names, and a check that nothing is left behind.

Examples
--------
>>> import dsline
>>> from dsline.testing import leaks, unique_name
>>> with leaks(), dsline.ShmChannel(unique_name()) as ch:
...     ch.send(b"hello")
...     ch.recv_bytes()
True
b'hello'
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import pathlib
import secrets
from collections import Counter
from collections.abc import Iterator

from dsline._core import channel_directory

__all__ = ["LeakCheck", "Leaks", "leaks", "unique_name"]


def unique_name(prefix: str = "test") -> str:
    """Return a channel name that no other test, and no other process, has.

    Parameters
    ----------
    prefix : str
        Start of the name, of the characters that names may have.

    Returns
    -------
    str
        ``<prefix>-<pid>-<8 random hex digits>``.
    """
    return f"{prefix}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclasses.dataclass(frozen=True)
class Leaks:
    """What is there and was not there before.

    Attributes
    ----------
    descriptors : tuple of str
        Targets of open file descriptors of this process.
    mappings : tuple of str
        Files, or memfds, that this process maps writable and shared, as channels do.
    names : tuple of str
        Channels in this user's directory, without those of processes that do not descend from this one: that such a
        process has open, or that have its PID in their name.
    memory_bytes : int
        Growth of the anonymous memory of this process, where a limit was given and passed; else 0.
    """

    descriptors: tuple[str, ...] = ()
    mappings: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    memory_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.descriptors or self.mappings or self.names or self.memory_bytes)

    def __str__(self) -> str:
        parts = []
        if self.descriptors:
            parts.append(f"open descriptors: {', '.join(self.descriptors)}")
        if self.mappings:
            parts.append(f"mapped segments: {', '.join(self.mappings)}")
        if self.names:
            parts.append(f"channels in {channel_directory()}: {', '.join(self.names)}")
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes} more bytes of anonymous memory")
        return "; ".join(parts) or "nothing"


class LeakCheck:
    """Compares what this process has open, mapped and named now with what it had when the check was made.

    Parameters
    ----------
    memory_bytes : int, optional
        Anonymous memory may grow by so many bytes; None does not look at it.

    Notes
    -----
    Views keep their channel's memory mapped and its descriptors open; drop them before the check. Linux only.
    """

    def __init__(self, *, memory_bytes: int | None = None) -> None:
        gc.collect()
        self._limit = memory_bytes
        self._descriptors = _open_descriptors()
        self._mappings = _shared_mappings()
        self._names = _names()
        self._memory = _anonymous_bytes() if memory_bytes is not None else 0

    def find(self) -> Leaks:
        """Collect garbage, then return what was added since."""
        gc.collect()
        names = _names() - self._names
        grown = _anonymous_bytes() - self._memory if self._limit is not None else 0
        return Leaks(
            descriptors=tuple((_open_descriptors() - self._descriptors).elements()),
            mappings=tuple((_shared_mappings() - self._mappings).elements()),
            names=tuple(sorted(names - _of_others(names))),
            memory_bytes=grown if self._limit is not None and grown > self._limit else 0,
        )

    def check(self) -> None:
        """Raise AssertionError that names what was added since."""
        found = self.find()
        if found:
            raise AssertionError(f"left behind: {found}")


@contextlib.contextmanager
def leaks(*, memory_bytes: int | None = None) -> Iterator[LeakCheck]:
    """Check that the block leaves nothing behind.

    Parameters
    ----------
    memory_bytes : int, optional
        As for `LeakCheck`.

    Yields
    ------
    LeakCheck

    Raises
    ------
    AssertionError
        The block ended without an exception and left something behind.
    """
    check = LeakCheck(memory_bytes=memory_bytes)
    yield check
    check.check()


def _open_descriptors(process: str = "self") -> Counter[str]:
    targets: Counter[str] = Counter()
    folder = f"/proc/{process}/fd"
    for number in os.listdir(folder):
        with contextlib.suppress(OSError):  # closed since, as is the one that listed the folder
            targets[os.readlink(f"{folder}/{number}")] += 1
    return targets


def _shared_mappings() -> Counter[str]:
    found: Counter[str] = Counter()
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].startswith("rw") and fields[1].endswith("s"):
            found[f"{fields[5]} (inode {fields[4]})"] += 1
    return found


def _names() -> set[str]:
    try:
        return set(os.listdir(channel_directory()))
    except FileNotFoundError:
        return set()


def _anonymous_bytes() -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _of_others(names: set[str]) -> set[str]:
    """Those of `names` that belong to a process which is neither this one nor one of its descendants.

    It has them open, or its PID is in them, as `unique_name` writes it.
    """
    if not names:
        return set()
    paths = {f"{channel_directory()}/{name}": name for name in names}
    parents: dict[str, str] = {}
    held: dict[str, set[str]] = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            # The command name, field 2, may hold blanks and parentheses.
            parents[process] = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
            held[process] = {name for name in names if process in name.split("-")}
            held[process] |= {paths[target] for target in _open_descriptors(process) if target in paths}
    found: set[str] = set()
    for process, names_of_it in held.items():
        ancestor = process
        while ancestor in parents and ancestor != str(os.getpid()):
            ancestor = parents[ancestor]
        if ancestor != str(os.getpid()):
            found |= names_of_it
    return found
