"""What a channel looks like to people: who is attached, who holds what since when, and who stands in the way.

Plain data, made from what the core reports and from /proc. A report is read without stopping anybody, so its parts may
be of different moments.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

__all__ = [
    "Blocker",
    "ChannelReport",
    "GroupReport",
    "HolderReport",
    "ParticipantReport",
    "PeerDeath",
    "SlotReport",
    "blockers",
    "death_from_core",
    "describe",
    "from_core",
    "in_short",
    "process_of",
]

_STATES = {"R": "running", "T": "stopped", "t": "stopped", "Z": "gone", "X": "gone", "x": "gone"}
_LONGEST_COMMAND = 200
_NO_GROUP = (1 << 32) - 1


@dataclasses.dataclass(frozen=True)
class Blocker:
    """A process that a call waited for in vain.

    Attributes
    ----------
    pid : int
        Its process.
    command : str
        Its command line; empty when it is gone.
    state : str
        "running", "sleeping", "stopped" (by a signal or a debugger), "gone", or "unknown": alive, but not visible from
        here, as in another PID namespace.
    holds : int
        Messages that it has received and not released.
    writing : int
        Slots that it has taken to send and not published.
    for_seconds : float or None
        How long it has held the oldest of its messages; None when it holds none.
    group : str or None
        Group that it receives for; None for the default group.
    keeps : int
        Slots that it has published by a loan and still has an array on.
    """

    pid: int
    command: str
    state: str
    holds: int
    writing: int
    for_seconds: float | None
    group: str | None
    keeps: int = 0

    def __str__(self) -> str:
        parts = []
        if self.holds:
            group = "" if self.group is None else f" of group {self.group!r}"
            parts.append(f"holds {_count(self.holds, 'message')}{group} for {self.for_seconds or 0:.3g} s")
        if self.writing:
            parts.append(f"has not published {_count(self.writing, 'slot')}")
        if self.keeps:
            parts.append(f"has arrays on {_count(self.keeps, 'published loan')}")
        if not parts:
            group = "" if self.group is None else f" for group {self.group!r}"
            parts.append(f"takes no message{group}")
        return f"pid {self.pid} ({describe(self.command, self.state)}) {' and '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class PeerDeath:
    """A handle whose process died with it open.

    Attributes
    ----------
    number : int
        Counts the deaths of the channel, from 0.
    pid : int
        The process that died.
    participant : int
        Number of its handle in the channel.
    group : str or None
        Group that it received for; None for the default group, or for none.
    noticed_ns : int
        When it was found, as `time.time_ns()`.
    start_time : int
        When the process had been started, in clock ticks since boot, as in /proc/PID/stat.
    writing, held : int
        Slots that it had not published, messages that it had not released.
    """

    number: int
    pid: int
    participant: int
    group: str | None
    noticed_ns: int
    start_time: int
    writing: int
    held: int


@dataclasses.dataclass(frozen=True)
class ParticipantReport:
    """One open handle.

    Attributes
    ----------
    number, pid : int
        Its number in the channel, and its process.
    alive : bool
        Whether the process holds the handle's kernel lock. What a dead one held goes back at the next sweep.
    command, state : str
        As for `Blocker`.
    joined_ns : int
        When it was opened, as `time.time_ns()`.
    receives : bool
        False for a handle that can only send.
    group : str or None
        Group that it receives for; None for the default group.
    waiting_for : str or None
        "room" or "message" while it sleeps for one.
    writing, held : int
        Slots that it has not published, messages that it has not released.
    held_seconds : float or None
        How long it has held the oldest of them.
    kept : int
        Slots that it has published by a loan and still has an array on.
    """

    number: int
    pid: int
    alive: bool
    command: str
    state: str
    joined_ns: int
    receives: bool
    group: str | None
    waiting_for: str | None
    writing: int
    held: int
    held_seconds: float | None
    kept: int = 0


@dataclasses.dataclass(frozen=True)
class GroupReport:
    """One subscriber group.

    Attributes
    ----------
    number : int
        Its number in the channel; 0 is the default group.
    name : str or None
        None for the default group.
    active, durable : bool
        Whether messages are delivered to it, and whether it stays while it has no members.
    retention : bool
        True for the history: nobody receives from it.
    on_death : str
        "redeliver" or "drop".
    members, lag, held, dead_letters : int
        Handles, messages that wait, messages that members hold, and dead letters.
    dropped_oldest, redelivered : int
        Since the group was made.
    """

    number: int
    name: str | None
    active: bool
    durable: bool
    retention: bool
    on_death: str
    members: int
    lag: int
    held: int
    dead_letters: int
    dropped_oldest: int
    redelivered: int


@dataclasses.dataclass(frozen=True)
class HolderReport:
    """Who holds the message of a slot, for which group (None: the default one), and for how long."""

    participant: int
    group: str | None
    attempt: int
    for_seconds: float


@dataclasses.dataclass(frozen=True)
class SlotReport:
    """One slot that is not free.

    Attributes
    ----------
    number : int
    state : str
        "WRITING", "COMMITTED", "PINNED" (held), "KEPT" (its sender alone still has an array on it) or "CORRUPTED".
    owner : int or None
        Participant that wrote it.
    sequence : int or None
        Of the message, once it is committed.
    waiting_for : tuple of (str or None)
        Groups that have not finished with it; None for the default group.
    reserved_bytes : int
    holders : tuple of HolderReport
    """

    number: int
    state: str
    owner: int | None
    sequence: int | None
    waiting_for: tuple[str | None, ...]
    reserved_bytes: int
    holders: tuple[HolderReport, ...]


@dataclasses.dataclass(frozen=True)
class ChannelReport:
    """A channel as it stands.

    Attributes
    ----------
    path, storage, uuid : str
    created_ns, creator_pid : int
        When, as `time.time_ns()`, and by whom it was created.
    capacity, slot_size, max_message_size, max_handles, history, max_deliveries : int
        As it was created.
    default_group, sync : bool
        Whether what is sent waits for a receiver, and whether it is written to the disk.
    shut_down : bool
    other_boot : bool
        Its processes ended with an earlier boot of the machine.
    next_sequence, depth : int
        Sequence of the next message, and messages that wait in the default group.
    free_slots, writing_slots, committed_slots, pinned_slots, corrupted_slots : int
        Of `capacity`; the pinned ones are among the committed ones.
    reserved_bytes : int
        Memory that it takes.
    dropped_newest, unheard, corrupted, buried, letters_dropped, dead_letters, deaths : int
        As in `Stats`.
    participants, groups, slots : tuple
        `ParticipantReport`, `GroupReport`, and `SlotReport` of the slots that are not free.
    """

    path: str
    storage: str
    uuid: str
    created_ns: int
    creator_pid: int
    capacity: int
    slot_size: int
    max_message_size: int
    max_handles: int
    history: int
    max_deliveries: int
    default_group: bool
    sync: bool
    shut_down: bool
    other_boot: bool
    next_sequence: int
    depth: int
    free_slots: int
    writing_slots: int
    committed_slots: int
    pinned_slots: int
    corrupted_slots: int
    reserved_bytes: int
    dropped_newest: int
    unheard: int
    corrupted: int
    buried: int
    letters_dropped: int
    dead_letters: int
    deaths: int
    participants: tuple[ParticipantReport, ...]
    groups: tuple[GroupReport, ...]
    slots: tuple[SlotReport, ...]

    @property
    def name(self) -> str:
        """Last part of the path."""
        return os.path.basename(self.path)

    @property
    def alive(self) -> int:
        """Participants that are alive."""
        return sum(peer.alive for peer in self.participants)

    @property
    def dead(self) -> int:
        """Participants that died and have not been recovered."""
        return len(self.participants) - self.alive

    @property
    def waiting(self) -> int:
        """Messages that wait in the group that lags most, the history left out."""
        return max((group.lag for group in self.groups if group.active and not group.retention), default=0)

    def asdict(self) -> dict[str, Any]:
        """Return it as a dict of plain values."""
        return {"name": self.name, "alive": self.alive, "dead": self.dead, **dataclasses.asdict(self)}


def process_of(pid: int, start_time: int, alive: bool) -> tuple[str, str]:
    """Command line and state of a process, from /proc.

    Parameters
    ----------
    pid, start_time : int
        The process, and when it was started, in clock ticks since boot: a PID may be used again.
    alive : bool
        Whether its kernel lock says that it is.

    Returns
    -------
    (str, str)
        State as for `Blocker`.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The command name, field 2, may hold blanks and parentheses.
            fields = file.read().rpartition(")")[2].split()
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read(4 * _LONGEST_COMMAND).replace(b"\0", b" ").decode(errors="replace").strip()
    except (OSError, UnicodeDecodeError):
        return "", "unknown" if alive else "gone"
    if start_time and int(fields[19]) != start_time:
        return "", "unknown" if alive else "gone"
    state = _STATES.get(fields[0], "sleeping")
    if state == "gone":
        return "", state
    return command[:_LONGEST_COMMAND], state


def blockers(report: ChannelReport, *, for_room: bool, group: str | None) -> list[Blocker]:
    """Those that a call waited for, the longest holders first.

    Parameters
    ----------
    report : ChannelReport
    for_room : bool
        True: a sender waited for a free slot, and gets whoever holds or writes messages, and members of groups that have
        messages waiting. False: a receiver waited for a message, and gets whoever writes one, holds one of its group, or is
        stopped.
    group : str or None
        The receiver's group.
    """
    lagging = {each.name for each in report.groups if each.active and each.lag and not each.retention}
    own = os.getpid()
    found = []
    for peer in report.participants:
        if for_room:
            idle = peer.pid != own and peer.receives and peer.waiting_for != "room" and peer.group in lagging
            wanted = bool(peer.held or peer.writing or peer.kept) or idle
        else:
            holds = peer.held and peer.receives and peer.group == group
            wanted = bool(holds or peer.writing) or (peer.pid != own and peer.state == "stopped")
        if wanted:
            found.append(
                Blocker(
                    pid=peer.pid,
                    command=peer.command,
                    state=peer.state,
                    holds=peer.held,
                    writing=peer.writing,
                    for_seconds=peer.held_seconds,
                    group=peer.group,
                    keeps=peer.kept if for_room else 0,
                )
            )
    return sorted(found, key=lambda blocker: (-(blocker.for_seconds or 0), -blocker.writing, blocker.pid))


def describe(command: str, state: str) -> str:
    """Return a command, cut short, and a state."""
    if len(command) > 60:
        command = f"{command[:57]}..."
    return f"{command}, {state}" if command else state


def in_short(found: Sequence[Blocker], most: int = 3) -> str:
    """Return who stands in the way, for the text of an error."""
    text = ", ".join(str(blocker) for blocker in found[:most])
    return f"{text} and {len(found) - most} more" if len(found) > most else text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- what the core says -------------------------------------------------------------------------------------------------


def _text(name: bytes) -> str:
    # A peer has written it.
    return name.decode(errors="replace")


def death_from_core(death: dict[str, Any]) -> PeerDeath:
    """Return a death as the core has it on record."""
    return PeerDeath(
        number=death["number"],
        pid=death["pid"],
        participant=death["participant"],
        group=_text(death["group"]) or None,
        noticed_ns=death["noticed_ns"],
        start_time=death["start_time"],
        writing=death["writing"],
        held=death["held"],
    )


def from_core(report: dict[str, Any]) -> ChannelReport:
    """Return a report of the core, with what /proc knows of the processes."""
    names = {
        group["number"]: "(history)" if group["retention"] else _text(group["name"]) or None
        for group in report["groups"]
    }
    counts = report["stats"]
    slots = ("free_slots", "writing_slots", "committed_slots", "corrupted_slots")
    counters = (
        *("pinned_slots", "reserved_bytes", "dropped_newest", "unheard", "corrupted", "buried"),
        *("letters_dropped", "dead_letters", "deaths", *slots),
    )
    same = (
        *("created_ns", "creator_pid", "slot_size", "max_message_size", "max_handles", "history"),
        *("max_deliveries", "default_group", "sync", "shut_down", "other_boot", "next_sequence"),
    )
    return ChannelReport(
        path=os.fsdecode(report["path"]),
        storage=_text(report["storage"]),
        uuid=_text(report["uuid"]),
        capacity=sum(counts[state] for state in slots),
        participants=tuple(_participant(peer, names) for peer in report["participants"]),
        groups=tuple(_group(group, names) for group in report["groups"]),
        slots=tuple(_slot(slot, names) for slot in report["slots"]),
        **{name: report[name] for name in same},
        depth=counts["depth"] if report["default_group"] else 0,
        **{name: counts[name] for name in counters},
    )


def _participant(peer: dict[str, Any], names: dict[int, str | None]) -> ParticipantReport:
    command, state = process_of(peer["pid"], peer["start_time"], peer["alive"])
    return ParticipantReport(
        number=peer["number"],
        pid=peer["pid"],
        alive=peer["alive"],
        command=command,
        state=state,
        joined_ns=peer["joined_ns"],
        receives=peer["group"] != _NO_GROUP,
        group=names.get(peer["group"]),
        waiting_for={1: "room", 2: "message"}.get(peer["waiting_on"]),
        writing=peer["writing"],
        held=peer["held"],
        held_seconds=peer["held_for_ns"] / 1e9 if peer["held"] else None,
        kept=peer["kept"],
    )


def _group(group: dict[str, Any], names: dict[int, str | None]) -> GroupReport:
    same = ("number", "active", "durable", "retention", "members", "lag", "held", "dead_letters")
    return GroupReport(
        name=names[group["number"]],
        on_death="drop" if group["on_death"] else "redeliver",
        dropped_oldest=group["dropped_oldest"],
        redelivered=group["redelivered"],
        **{name: group[name] for name in same},
    )


def _slot(slot: dict[str, Any], names: dict[int, str | None]) -> SlotReport:
    state = _text(slot["state"])
    return SlotReport(
        number=slot["number"],
        state=state,
        owner=None if slot["owner"] == _NO_GROUP else slot["owner"],
        sequence=slot["sequence"] if state in ("COMMITTED", "PINNED", "KEPT") else None,
        waiting_for=tuple(name for number, name in names.items() if slot["pending"] >> number & 1),
        reserved_bytes=slot["reserved_bytes"],
        holders=tuple(
            HolderReport(
                participant=holder["participant"],
                group=names.get(holder["group"]),
                attempt=holder["attempts"] + 1,
                for_seconds=holder["for_ns"] / 1e9,
            )
            for holder in slot["holders"]
        ),
    )
