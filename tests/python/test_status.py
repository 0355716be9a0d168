"""Looking at channels without taking part in them, why one stands still, and cleaning up."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from support import assert_clean, run_script, wait_until
from test_blockers import channel_report, participant

import dsline
from dsline import _core, status
from dsline.status import explain


@pytest.fixture
def only(monkeypatch):
    """Let status see the channels of these names only: others of this user are nobody's business here."""

    def show(*names):
        monkeypatch.setattr(_core, "list_names", lambda: list(names))

    return show


def leave(name, kind="ShmChannel", messages=0, **options):
    """Make a channel in a process that ends without a word."""
    source = f"""
import os, sys
import dsline
channel = dsline.{kind}(sys.argv[1], **{options!r})
for number in range({messages}):
    channel.send(b"%d" % number)
os._exit(0)
"""
    assert_clean(run_script(source, name))


def by_name(found):
    return {each.name: each for each in found}


# --- list and inspect --------------------------------------------------------------------------------------------


def test_list_channels(name, only):
    left, absent = f"{name}-left", f"{name}-absent"
    leave(left, messages=2, capacity=4)
    with dsline.Broadcast(name, capacity=8, slot_size=64) as channel, channel.subscribe("viewer"):
        channel.send_many([b"1", b"2", b"3"])
        assert {name, left} <= set(by_name(status.list_channels()))
        only(name, left, absent)
        found = by_name(status.list_channels())
        assert set(found) == {name, left}
        mine = found[name]
        assert (mine.state, mine.waiting, mine.capacity, mine.alive, mine.dead) == ("in use", 3, 8, 2, 0)
        assert (mine.groups, mine.problem) == (("viewer",), None)
        assert mine.reserved_bytes > 8 * 64
        other = found[left]
        assert (other.state, other.waiting, other.alive, other.dead) == ("no live handle", 2, 0, 1)
        json.dumps([each.asdict() for each in found.values()])
    status.remove(left, force=True)


def test_an_unreadable_file_is_listed_with_the_reason(name, only, segment):
    with dsline.ShmChannel(name):
        pass
    segment(name).write_bytes(b"no channel")
    try:
        only(name)
        (found,) = status.list_channels()
        assert found.state == "unreadable"
        assert name in found.problem
        assert [each.action for each in status.cleanup(dry_run=False)] == ["keep"]
        with pytest.raises(dsline.ChannelLayoutError):
            status.remove(name)
    finally:
        segment(name).unlink()


def test_inspect_tells_all(name):
    with (
        dsline.ShmChannel(
            name, capacity=8, slot_size=64, history=2, max_deliveries=2, max_handles=5
        ) as channel,
        channel.subscribe("team", on_death="drop", durable=True) as team,
    ):
        channel.send_many([b"1", b"2", b"3"])
        message = team.recv_message()
        message.nack()
        message = team.recv_message()
        view = channel.recv()
        report = status.inspect(name)
        assert report == dataclasses.replace(
            channel.inspect(), participants=report.participants, slots=report.slots
        )
        assert (report.name, report.path, report.storage) == (name, channel.path, "shm")
        assert (report.capacity, report.slot_size, report.history, report.max_deliveries) == (8, 64, 2, 2)
        assert (report.max_handles, report.default_group, report.sync) == (5, True, False)
        assert (report.shut_down, report.other_boot, report.creator_pid) == (False, False, os.getpid())
        assert (report.next_sequence, report.depth, report.free_slots, report.pinned_slots) == (3, 2, 5, 1)
        assert (report.alive, report.dead, report.waiting) == (2, 0, 2)
        first, second = report.participants
        assert {first.pid, second.pid} == {os.getpid()}
        assert (first.alive, first.group, first.receives, first.held) == (True, None, True, 1)
        assert (second.group, second.held, second.held_seconds >= 0) == ("team", 1, True)
        assert "python" in first.command
        groups = {group.name: group for group in report.groups}
        assert set(groups) == {None, "team", "(history)"}
        assert (groups["team"].lag, groups["team"].held, groups["team"].members) == (2, 1, 1)
        assert (groups["team"].on_death, groups["team"].durable) == ("drop", True)
        assert groups["team"].redelivered == 1
        assert (groups["(history)"].retention, groups[None].members) == (True, 1)
        assert len(report.slots) == 3
        held = next(slot for slot in report.slots if slot.sequence == 0)
        assert held.state == "PINNED"
        assert sorted((holder.group or "", holder.attempt) for holder in held.holders) == [
            ("", 1),
            ("team", 2),
        ]
        waiting = next(slot for slot in report.slots if slot.sequence == 2)
        assert waiting.state == "COMMITTED"
        assert set(waiting.waiting_for) == {None, "team", "(history)"}
        assert waiting.owner == first.number
        json.dumps(report.asdict())
        del view, message
        channel.unlink()


def test_looking_changes_nothing(name):
    with dsline.ShmChannel(name, capacity=4, max_handles=1) as channel:
        channel.send(b"x")
        for _ in range(3):
            assert status.inspect(name).alive == 1
        assert channel.stats().participants == 1
        assert channel.recv_bytes(timeout=0) == b"x"
    assert name not in _core.list_names(), "the last handle takes the name, looked at or not"


def test_channels_in_files_have_paths(tmp_path):
    path = tmp_path / "queue"
    with dsline.FileChannel.create(path, capacity=4, sync="data") as channel:
        channel.send(b"x")
        for place in (path, str(path), os.path.relpath(path)):
            report = status.inspect(place)
            assert (report.path, report.storage, report.depth, report.sync) == (str(path), "file", 1, True)
        assert "goes on" in status.why(path)


def test_an_anonymous_channel_shows_itself():
    with dsline.ShmChannel(capacity=2) as channel, channel.subscribe("g") as subscriber:
        channel.send(b"x")
        assert channel.inspect().depth == subscriber.inspect().depth == 1
        assert explain(channel.inspect()).startswith("the channel goes on: 1 message waits")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("absent-channel", dsline.ChannelNotFoundError),
        ("/nowhere/at/all", dsline.ChannelNotFoundError),
        ("", dsline.InvalidArgumentError),
        ("a\0b", dsline.InvalidArgumentError),
        (b"bytes", TypeError),
        (7, TypeError),
    ],
)
@pytest.mark.parametrize("call", [status.inspect, status.why, status.remove])
def test_wrong_names(call, name, error):
    with pytest.raises(error):
        call(name)


# --- cleanup and remove ------------------------------------------------------------------------------------------


def test_cleanup_removes_what_nobody_has_open(name, only):
    left, full, used = f"{name}-left", f"{name}-full", f"{name}-used"
    leave(left)
    leave(full, messages=2)
    with dsline.ShmChannel(used):
        only(left, full, used)
        for dry_run in (True, False):
            found = by_name(status.cleanup(dry_run=dry_run))
            assert {each: found[each].action for each in found} == {
                left: "remove",
                full: "keep",
                used: "keep",
            }
            assert "2 messages wait" in found[full].reason
            assert "in use" in found[used].reason
            assert found[left].reserved_bytes > 0
            there = {
                each for each in (left, full, used) if os.path.exists(f"{_core.channel_directory()}/{each}")
            }
            assert there == ({left, full, used} if dry_run else {full, used})
    assert {each.name for each in status.cleanup(dry_run=True)} == {full}
    assert [each.action for each in status.cleanup(older_than=3600, dry_run=False)] == ["keep"]
    assert "less than 3600 s ago" in status.cleanup(older_than=3600)[0].reason
    assert [each.action for each in status.cleanup(older_than=0, dry_run=False)] == ["remove"]
    assert status.cleanup() == []


def test_cleanup_recovers_the_dead_of_a_channel_in_use(name, only):
    only(name)
    with dsline.ShmChannel(name, capacity=4) as channel:
        leave(name, messages=1)
        found = status.cleanup()
        assert [each.action for each in found] == ["recover"]
        assert "died" in found[0].reason
        assert channel.inspect().dead == 1, "a dry run"
        assert [each.action for each in status.cleanup(dry_run=False)] == ["recover"]
        assert (channel.inspect().dead, channel.stats().deaths) == (0, 1)
        assert [each.action for each in status.cleanup(dry_run=False)] == ["keep"]
        assert channel.recv_bytes(timeout=0) == b"0"


def test_cleanup_recovers_a_broadcast_too(name, only):
    only(name)
    with dsline.Broadcast(name, capacity=4) as channel:
        leave(name, kind="Broadcast")
        assert [each.action for each in status.cleanup(dry_run=False)] == ["recover"]
        assert channel.stats().deaths == 1


@pytest.mark.parametrize("age", [-1, float("nan")])
def test_cleanup_refuses_a_wrong_age(age):
    with pytest.raises(ValueError, match="older_than"):
        status.cleanup(older_than=age)


def test_remove(name):
    leave(name, messages=1)
    with pytest.raises(dsline.ChannelError, match=r"1 message waits .*force=True"):
        status.remove(name)
    with dsline.ShmChannel.open(name):
        for force in (False, True):
            with pytest.raises(dsline.ChannelError, match=f"in use by pid {os.getpid()}"):
                status.remove(name, force)
    status.remove(name, force=True)
    assert name not in _core.list_names()
    with pytest.raises(dsline.ChannelNotFoundError):
        status.remove(name)


def test_remove_a_file(tmp_path):
    path = tmp_path / "queue"
    dsline.FileChannel.create(path, capacity=2).close()
    status.remove(path)
    assert not path.exists()
    path.write_text("precious")
    for force in (False, True):
        with pytest.raises(dsline.ChannelLayoutError):
            status.remove(path, force)
    assert path.read_text() == "precious"


# --- why ---------------------------------------------------------------------------------------------------------


def test_why_of_live_channels(name):
    with dsline.ShmChannel(name, capacity=2, slot_size=64, max_pinned="unlimited") as channel:
        assert status.why(name) == f"channel {name!r} is empty: 1 handle attached, and nobody sends"
        channel.send(b"1")
        assert "1 message waits for the default group, 1 of 2 slots are free" in status.why(name)
        channel.send(b"2")
        assert status.why(name).endswith(
            "is full: 2 messages wait for the default group, and nobody takes them"
        )
        views = channel.recv_many(2)
        assert f"none is free, pid {os.getpid()} (" in status.why(name)
        assert "holds 2 messages for" in status.why(name)
        del views[:]
        channel.send(b"3")
        channel.shutdown()
        assert "is shut down: nothing more can be sent, 1 message waits to be received" in status.why(name)


def test_why_of_a_broadcast(name):
    with dsline.Broadcast(name, capacity=2, slot_size=64, max_pinned="unlimited") as channel:
        assert "has no subscribers" in status.why(name)
        with channel.subscribe("slow") as slow:
            channel.send_many([b"1", b"2"])
            assert "2 messages wait for group 'slow', and nobody takes them" in status.why(name)
            held = [slow.recv(), slow.recv()]
            assert "holds 2 messages of group 'slow' for" in status.why(name)
            del held


def test_why_of_what_was_left(name, only):
    leave(name, messages=2)
    assert "is open nowhere since the end of its processes: 2 messages wait" in status.why(name)
    status.remove(name, force=True)


def test_why_names_the_dead_that_fill_a_channel(name):
    source = """
import os, sys
import dsline
channel = dsline.ShmChannel.open(sys.argv[1], max_pinned="unlimited")
held = channel.recv_many(2)
os._exit(0)
"""
    with dsline.ShmChannel(name, capacity=2, slot_size=64) as channel:
        channel.send_many([b"1", b"2"])
        assert_clean(run_script(source, name))
        assert "died with 2 of its 2 slots" in status.why(name)
        assert channel.check_peers() == 1
        assert "died" not in status.why(name)
        channel.unlink()


@pytest.mark.parametrize(
    ("participants", "words"),
    [
        ((participant(waiting_for="message"), participant(waiting_for="message")), "no sender is attached"),
        ((participant(), participant(state="stopped", pid=9)), "pid 9 (cmd, stopped) is stopped"),
        ((participant(), participant(writing=1, pid=9)), "pid 9 has taken a slot"),
        ((participant(writing=1, state="stopped"),), "is stopped while it writes"),
        ((participant(alive=False),), "is open nowhere"),
    ],
)
def test_why_is_it_empty(participants, words):
    assert words in explain(channel_report(participants))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([], "waits for a receiver: 3 messages wait for group 'g', which has no member"),
        ([participant(group="g", state="stopped", pid=9)], "waits for pid 9, which is stopped"),
        ([participant(group="g", state="stopped"), participant(group="g")], "goes on: 3 messages wait"),
    ],
)
def test_why_does_a_group_lag(members, words):
    assert words in explain(channel_report((participant(), *members), lags={"g": 3}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"free_slots": 0, "corrupted_slots": 4}, "out of use after damaged messages"),
        ({"free_slots": 0}, "hold its history and dead letters"),
        ({"other_boot": True, "participants": ()}, "since the end of an earlier boot"),
    ],
)
def test_why_in_rare_cases(changes, words):
    assert words in explain(dataclasses.replace(channel_report((participant(),)), **changes))


def test_a_waiting_receiver_is_seen(name):
    source = """
import sys
import dsline
channel = dsline.ShmChannel.open(sys.argv[1])
channel.recv(timeout=None)
"""
    with (
        dsline.ShmChannel(name, capacity=2) as channel,
        subprocess.Popen([sys.executable, "-c", source, name]) as child,
    ):
        try:
            wait_until(lambda: any(peer.waiting_for == "message" for peer in channel.inspect().participants))
            channel.send(b"x")
            assert child.wait(30) == 0
        finally:
            child.kill()
