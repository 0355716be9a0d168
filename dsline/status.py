"""What channels there are on this machine, why one stands still, and what the dead have left.

Channels are looked at without taking part in them. A channel is named as `ShmChannel` names it, or by the path of its file
(anything with a slash in it, or a path object).
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from dsline import _core
from dsline.errors import ChannelError, ChannelNotFoundError, DslineError, InvalidArgumentError
from dsline.report import ChannelReport, GroupReport, ParticipantReport, blockers, describe, in_short

__all__ = ["ChannelSummary", "Cleaned", "cleanup", "explain", "inspect", "list_channels", "remove", "why"]

_REMOVED, _MISSING, _IN_USE, _HAS_MESSAGES, _TOO_YOUNG = range(5)


@dataclasses.dataclass(frozen=True)
class ChannelSummary:
    """A channel of this user's directory in one line.

    Attributes
    ----------
    name : str
    state : str
        "in use", "no live handle" (its processes are gone), or "unreadable".
    waiting, capacity : int
        Messages that wait in the group that lags most, and slots.
    alive, dead : int
        Open handles, and handles of processes that died and that nobody has recovered.
    groups : tuple of str
        Named groups.
    reserved_bytes : int
        Memory that it takes.
    problem : str or None
        Why it is unreadable.
    """

    name: str
    state: str
    waiting: int = 0
    capacity: int = 0
    alive: int = 0
    dead: int = 0
    groups: tuple[str, ...] = ()
    reserved_bytes: int = 0
    problem: str | None = None

    def asdict(self) -> dict[str, Any]:
        """Return it as a dict."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """What `cleanup` did, or would do, with one channel.

    Attributes
    ----------
    name : str
    action : str
        "remove" (nobody has it open), "recover" (the dead among its handles), or "keep".
    reason : str
        Why, for people.
    reserved_bytes : int
        Memory that removing it gives back.
    """

    name: str
    action: str
    reason: str
    reserved_bytes: int = 0

    def asdict(self) -> dict[str, Any]:
        """Return it as a dict."""
        return dataclasses.asdict(self)


def list_channels() -> list[ChannelSummary]:
    """Return the channels in this user's directory, by name.

    Returns
    -------
    list of ChannelSummary
    """
    found = []
    for name in _core.list_names():
        try:
            report = inspect(name)
        except ChannelNotFoundError:
            continue  # gone since
        except DslineError as error:
            found.append(ChannelSummary(name, "unreadable", problem=str(error)))
            continue
        found.append(
            ChannelSummary(
                name=name,
                state="in use" if report.alive else "no live handle",
                waiting=report.waiting,
                capacity=report.capacity,
                alive=report.alive,
                dead=report.dead,
                groups=tuple(
                    group.name
                    for group in report.groups
                    if group.active and group.name is not None and not group.retention
                ),
                reserved_bytes=report.reserved_bytes,
            )
        )
    return found


def inspect(name: str | os.PathLike[str]) -> ChannelReport:
    """Return a channel as it stands: participants, groups, and who holds what since when.

    Parameters
    ----------
    name : str or path
        Of a channel in this user's directory, or the path of a channel's file.

    Returns
    -------
    ChannelReport

    Raises
    ------
    ChannelNotFoundError
        There is none.
    ChannelLayoutError, ChannelPermissionError
        It is damaged, of another version, or somebody else's.
    """
    return _core.report_of(_path_of(name))


def cleanup(older_than: float | None = None, dry_run: bool = True) -> list[Cleaned]:
    """Remove the channels of this user's directory that processes have left, and recover the dead of those in use.

    Parameters
    ----------
    older_than : float, optional
        Seconds. Only channels that have not changed for so long are removed, and then also those in which messages wait.
        Without it, channels with messages are kept: somebody may come to receive them.
    dry_run : bool
        True only says what would be done.

    Returns
    -------
    list of Cleaned
        One for each channel.

    Notes
    -----
    A channel is removed only if the kernel locks of all its handles are free, which proves that nobody has it open.
    """
    if older_than is not None and not older_than >= 0:
        raise ValueError(f"older_than is {older_than!r}, must be 0 or more seconds, or None")
    found = []
    for name in _core.list_names():
        path = _path_of(name)
        try:
            report = _core.report_of(path)
            if report.alive:
                found.append(_recover(name, report, dry_run))
            else:
                found.append(_remove_if_left(name, report, older_than, dry_run))
        except ChannelNotFoundError:
            continue  # gone since
        except DslineError as error:
            found.append(Cleaned(name, "keep", str(error)))
    return found


def _recover(name: str, report: ChannelReport, dry_run: bool) -> Cleaned:
    if not report.dead:
        return Cleaned(name, "keep", f"in use by {_handles(report.alive)}")
    dead = ", ".join(f"pid {peer.pid}" for peer in report.participants if not peer.alive)
    if not dry_run:
        visitor = _core.Channel()
        # Whatever kind of channel it is: nothing is sent or received.
        visitor._open("file", os.fsencode(report.path), {}, 2, 0, None)
        try:
            visitor.check_peers()
        finally:
            visitor.close()
    return Cleaned(name, "recover", f"in use by {_handles(report.alive)}; {dead} died")


def _remove_if_left(name: str, report: ChannelReport, older_than: float | None, dry_run: bool) -> Cleaned:
    age_ns = 0 if older_than is None else int(older_than * 1e9)
    removal = _core.remove_channel(report.path, age_ns, older_than is not None, dry_run)
    if removal == _REMOVED:
        return Cleaned(name, "remove", f"{_left(report)}, and nobody has it open", report.reserved_bytes)
    if removal == _MISSING:
        raise ChannelNotFoundError(2, name)
    reasons = {
        _IN_USE: "somebody opens it",
        _HAS_MESSAGES: f"{_left(report)}; older_than removes it when it is old enough",
        _TOO_YOUNG: f"it changed less than {older_than:g} s ago" if older_than is not None else "it changes",
    }
    return Cleaned(name, "keep", reasons[removal])


def _left(report: ChannelReport) -> str:
    return f"{_messages(report.waiting)} in it" if report.waiting else "nothing waits in it"


def remove(name: str | os.PathLike[str], force: bool = False) -> None:
    """Remove a channel that nobody has open.

    Parameters
    ----------
    name : str or path
        As for `inspect`.
    force : bool
        True removes it also while messages wait in it, or when it is damaged.

    Raises
    ------
    ChannelNotFoundError
        There is none.
    ChannelError
        Somebody has it open, or messages wait in it and `force` is not given.
    """
    path = _path_of(name)
    if not force:
        _core.report_of(path)  # raises where it is damaged
    removal = _core.remove_channel(path, 0, force, False)
    if removal == _MISSING:
        raise ChannelNotFoundError(2, f"there is no channel {os.fspath(name)!r} to remove")
    if removal == _IN_USE:
        users = ", ".join(
            f"pid {peer.pid} ({describe(peer.command, peer.state)})"
            for peer in _core.report_of(path).participants
            if peer.alive
        )
        raise ChannelError(
            f"channel {os.fspath(name)!r} is in use by {users or 'somebody who opens it'}; it stays. Its name alone is "
            "removed by unlink() of an open handle"
        )
    if removal == _HAS_MESSAGES:
        waiting = _messages(_core.report_of(path).waiting)
        raise ChannelError(f"{waiting} in channel {os.fspath(name)!r}; force=True removes it with them")


def why(name: str | os.PathLike[str]) -> str:
    """Return one sentence that says why a channel stands still, or that it does not.

    Parameters
    ----------
    name : str or path
        As for `inspect`.

    Returns
    -------
    str
    """
    return explain(inspect(name))


def explain(report: ChannelReport) -> str:
    """As `why`, of a report: of `ch.inspect()`, for instance, where the channel has no name."""
    channel = f"channel {report.name!r}" if report.path else "the channel"
    reason = _nobody(report) or _ended(report) or _full(report) or _waiting(report) or _empty(report)
    return f"{channel} {reason}"


def _nobody(report: ChannelReport) -> str | None:
    if report.alive:
        return None
    end = "an earlier boot of the machine" if report.other_boot else "its processes"
    if report.waiting:
        return f"is open nowhere since the end of {end}: {_messages(report.waiting)} until somebody opens it"
    return f"is open nowhere since the end of {end}, and nothing waits in it"


def _ended(report: ChannelReport) -> str | None:
    if not report.shut_down:
        return None
    return f"is shut down: nothing more can be sent, {_messages(report.waiting)} to be received"


def _full(report: ChannelReport) -> str | None:
    if report.free_slots:
        return None
    dead = [peer for peer in report.participants if not peer.alive and (peer.held or peer.writing)]
    if dead:
        return (
            f"is full: pid {dead[0].pid} died with {dead[0].held + dead[0].writing} of its {report.capacity} slots; the next "
            "call that waits, or dsline shm cleanup, frees them"
        )
    found = blockers(report, for_room=True, group=None)
    if found:
        return f"is full: of its {report.capacity} slots none is free, {in_short(found)}"
    lagging = [group for group in _receiving(report) if group.lag]
    if lagging:
        return f"is full: {_messages(lagging[0].lag)} {_for(lagging[0])}, and nobody takes them"
    if report.corrupted_slots == report.capacity:
        return f"is full: all of its {report.capacity} slots are out of use after damaged messages"
    return f"is full: its {report.capacity} slots hold its history and dead letters, which the next sender takes back"


def _waiting(report: ChannelReport) -> str | None:
    for group in sorted(_receiving(report), key=lambda group: -group.lag):
        if not group.lag:
            continue
        members = _members(report, group)
        if group.number == 0:  # of whose members some may only send
            members = [peer for peer in members if peer.waiting_for != "room"]
        stopped = [peer for peer in members if peer.state == "stopped"]
        if not members:
            return f"waits for a receiver: {_messages(group.lag)} {_for(group)}, which has no member"
        if len(stopped) == len(members):
            return f"waits for pid {stopped[0].pid}, which is stopped: {_messages(group.lag)} {_for(group)}"
        return f"goes on: {_messages(group.lag)} {_for(group)}, {report.free_slots} of {report.capacity} slots are free"
    return None


def _empty(report: ChannelReport) -> str:
    living = [peer for peer in report.participants if peer.alive]
    groups = _receiving(report)
    if not groups:
        return f"has no subscribers: what its {_handles(len(living))} send passes unheard"
    writers = [peer for peer in living if peer.writing]
    stopped = [peer for peer in living if peer.state == "stopped"]
    if stopped:
        doing = "while it writes a message" if stopped[0] in writers else "and may be who is to send"
        return (
            f"is empty: pid {stopped[0].pid} ({describe(stopped[0].command, 'stopped')}) is stopped {doing}"
        )
    if writers:
        return f"is empty: pid {writers[0].pid} has taken a slot and not published its message"
    receivers = [peer for peer in living if peer.waiting_for == "message"]
    if len(receivers) == len(living):
        return f"is empty: no sender is attached, all its {_handles(len(living))} wait for a message"
    held = sum(group.held for group in groups)
    if held:
        return f"is empty: nothing waits, and its receivers hold {held} message{'s' if held != 1 else ''}"
    return f"is empty: {_handles(len(living))} attached, and nobody sends"


def _receiving(report: ChannelReport) -> list[GroupReport]:
    return [group for group in report.groups if group.active and not group.retention]


def _members(report: ChannelReport, group: GroupReport) -> list[ParticipantReport]:
    return [peer for peer in report.participants if peer.alive and peer.receives and peer.group == group.name]


def _messages(count: int) -> str:
    return "1 message waits" if count == 1 else f"{count} messages wait"


def _handles(count: int) -> str:
    return "1 handle" if count == 1 else f"{count} handles"


def _for(group: GroupReport) -> str:
    return "for the default group" if group.name is None else f"for group {group.name!r}"


def _path_of(name: str | os.PathLike[str]) -> str:
    text = os.fspath(name)
    if not isinstance(text, str):
        raise TypeError(f"name is a {type(name).__name__}, must be str or a path")
    if not text or "\0" in text:
        raise InvalidArgumentError(f"name is {text!r}, must be the name or the path of a channel")
    if "/" in text or not isinstance(name, str):
        return os.path.abspath(text)
    return os.path.join(_core.channel_directory(), text)
