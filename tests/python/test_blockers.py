"""Timeout errors say who was in the way, and /proc says how he is."""

import dataclasses
import os
import pickle
import subprocess
import sys
import threading

import pytest
from support import TIMEOUT

import dsline
from dsline import errors
from dsline.report import Blocker, ParticipantReport, blockers, in_short, process_of


def full_error(channel, timeout):
    with pytest.raises(dsline.BufferFullError) as caught:
        channel.send(b"x", timeout=timeout)
    return caught.value


def empty_error(channel, timeout=0):
    with pytest.raises(dsline.BufferEmptyError) as caught:
        channel.recv(timeout=timeout)
    return caught.value


# --- full --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_own_views_are_named(make_any, timeout):
    channel = make_any(capacity=3, slot_size=64, max_pinned="unlimited")
    channel.send_many([b"1", b"2", b"3"])
    views = [channel.recv(), channel.recv(), channel.recv()]
    error = full_error(channel, timeout)
    (blocker,) = error.blockers
    assert (blocker.pid, blocker.holds, blocker.writing, blocker.group) == (os.getpid(), 3, 0, None)
    assert blocker.state in ("running", "sleeping")
    assert "python" in blocker.command
    assert 0 <= blocker.for_seconds < 60
    assert len(views) == 3


def test_the_text_of_a_wait_names_them(make_broadcast):
    channel = make_broadcast(capacity=2, slot_size=64, max_pinned="unlimited")
    with channel.subscribe("view") as subscriber:
        channel.send_many([b"1", b"2"])
        views = subscriber.recv_many(2)
        error = full_error(channel, 0.02)
        assert f"pid {os.getpid()} (" in str(error)
        assert "holds 2 messages of group 'view' for" in str(error)
        assert "within 0.02 s" in str(error)
        assert [blocker.group for blocker in error.blockers] == ["view"]
        del views


def test_a_wait_remembers_and_a_poll_looks_when_asked(make_channel):
    channel = make_channel(capacity=1, slot_size=64, max_pinned="unlimited")
    channel.send(b"x")
    view = channel.recv()
    waited, polled, looked = full_error(channel, 0.01), full_error(channel, 0), full_error(channel, 0)
    assert len(looked.blockers) == 1
    del view
    assert len(waited.blockers) == 1, "as it was when it was raised"
    assert len(looked.blockers) == 1, "as it was when it was first read"
    assert polled.blockers == [], "nobody holds anything now"


def test_a_poll_takes_no_report(make_channel, monkeypatch):
    channel = make_channel(capacity=1, slot_size=64)

    def refuse(*args, **kwargs):
        raise AssertionError("a poll looked at the channel")

    monkeypatch.setattr("dsline.report.from_core", refuse)
    empty_error(channel)
    channel.send(b"x")
    full_error(channel, 0)
    with pytest.raises(AssertionError, match="looked"):
        full_error(channel, 0.01)


def test_queued_messages_of_the_default_group_have_no_blocker_in_this_process(make_channel):
    channel = make_channel(capacity=1, slot_size=64)
    channel.send(b"x")
    assert full_error(channel, 0.01).blockers == []


def test_the_longest_holder_comes_first(name):
    with (
        dsline.Broadcast(name, capacity=2, slot_size=64) as channel,
        channel.subscribe("b") as b,
        channel.subscribe("a") as a,
    ):
        channel.send(b"1")
        first = b.recv()
        channel.send(b"2")
        second = [a.recv(), a.recv()]
        held = full_error(channel, 0.02).blockers
        assert sorted(each.group for each in held) == ["a", "b"]
        assert held[0].for_seconds >= held[1].for_seconds
        del first, second


def test_a_sender_that_has_not_published_is_named():
    report = channel_report(
        participants=(
            participant(number=0, pid=1, writing=1),
            participant(number=1, pid=2, waiting_for="room"),
        )
    )
    (blocker,) = blockers(report, for_room=True, group=None)
    assert (blocker.pid, blocker.writing, blocker.holds, blocker.for_seconds) == (1, 1, 0, None)
    assert "has not published 1 slot" in str(blocker)


# --- empty -------------------------------------------------------------------------------------------------------


def test_empty_names_who_holds_the_groups_messages(make_channel):
    channel = make_channel(capacity=4, slot_size=64)
    assert empty_error(channel).blockers == []
    channel.send(b"x")
    view = channel.recv()
    (blocker,) = empty_error(channel, 0.01).blockers
    assert (blocker.pid, blocker.holds) == (os.getpid(), 1)
    with channel.subscribe("other") as other:
        assert empty_error(other).blockers == [], "another group's holder is not in the way"
    del view


def test_who_is_in_a_receivers_way():
    report = channel_report(
        participants=(
            participant(number=0, pid=1, held=1, held_seconds=2.0),
            participant(number=1, pid=2, held=1, held_seconds=3.0, group="other"),
            participant(number=2, pid=3, writing=1),
            participant(number=3, pid=4, state="stopped"),
            participant(number=4, pid=5),
            participant(number=5, pid=6, waiting_for="message"),
        )
    )
    assert [each.pid for each in blockers(report, for_room=False, group=None)] == [1, 3, 4]
    assert [each.pid for each in blockers(report, for_room=False, group="other")] == [2, 3, 4]


def test_who_is_in_a_senders_way():
    report = channel_report(
        participants=(
            participant(number=0, pid=1, group="slow"),
            participant(number=1, pid=2, group="fast"),
            participant(number=2, pid=3, group="fast", held=1, held_seconds=0.5),
            participant(number=3, pid=4, receives=False),
            participant(number=4, pid=5, group="slow", waiting_for="room"),
            participant(number=5, pid=os.getpid(), group="slow"),
        ),
        lags={"slow": 3, "fast": 0},
    )
    found = blockers(report, for_room=True, group=None)
    assert [each.pid for each in found] == [3, 1]
    assert str(found[1]) == "pid 1 (cmd, sleeping) takes no message for group 'slow'"


# --- the errors themselves ---------------------------------------------------------------------------------------


def test_blockers_travel_with_the_error(make_channel):
    channel = make_channel(capacity=1, slot_size=64, max_pinned="unlimited")
    channel.send(b"x")
    view = channel.recv()
    for error in (full_error(channel, 0), full_error(channel, 0.01), empty_error(channel)):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert again.blockers == error.blockers
        assert again.args == error.args
        assert [each.pid for each in again.blockers] == [os.getpid()]
    del view


def test_an_error_outlives_its_channel():
    channel = dsline.ShmChannel(capacity=1)
    error = empty_error(channel)
    channel.close()
    del channel
    assert error.blockers == []


def test_other_timeouts_have_none():
    assert errors.TimeoutError("control lock").blockers == []
    assert dsline.BufferFullError("x").blockers == []


def test_in_short_leaves_out_the_many():
    found = [Blocker(pid, "c" * 100, "stopped", 1, 0, 1.5, None) for pid in range(5)]
    text = in_short(found)
    assert text.endswith(" and 2 more")
    assert "pid 0 (" + "c" * 57 + "..., stopped) holds 1 message for 1.5 s" in text


# --- processes ---------------------------------------------------------------------------------------------------


def start_time(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def test_states_of_processes():
    command = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"up\n"
            started = start_time(process.pid)
            words, state = process_of(process.pid, started, True)
            assert state in ("sleeping", "running")
            assert words.startswith(sys.executable)
            assert process_of(process.pid, started + 1, True) == ("", "unknown"), (
                "another process has its PID"
            )
            assert process_of(process.pid, started + 1, False) == ("", "gone")
            os.kill(process.pid, 19)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            assert process_of(process.pid, started, True) == (words, "stopped")
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            assert process_of(process.pid, started, False) == ("", "gone"), "a zombie"
        finally:
            process.kill()
    assert process_of(process.pid, started, False) == ("", "gone")
    assert process_of(process.pid, started, True) == ("", "unknown"), "its lock says that it lives"


# --- peers that die: the rest is in tests/processes --------------------------------------------------------------


def test_callbacks_are_checked_and_end(make_channel):
    channel = make_channel(capacity=2)
    with pytest.raises(TypeError, match="callable"):
        channel.on_peer_death("call me")
    stop = channel.on_peer_death(lambda death: None)
    assert channel.check_peers() == 0
    stop()
    stop()
    assert channel.check_peers() == 0
    channel.close()
    with pytest.raises(dsline.ChannelClosedError):
        channel.check_peers()


def test_waiting_with_a_callback_costs_nothing_and_delivers(make_channel):
    channel = make_channel(capacity=2, timeout=TIMEOUT)
    seen = []
    channel.on_peer_death(seen.append)
    thread = threading.Thread(target=channel.send, args=(b"x",))
    thread.start()
    assert channel.recv_bytes() == b"x"
    thread.join(TIMEOUT)
    assert seen == []


# --- made-up reports ---------------------------------------------------------------------------------------------


def participant(**changes):
    plain = ParticipantReport(
        number=0,
        pid=1,
        alive=True,
        command="cmd",
        state="sleeping",
        joined_ns=0,
        receives=True,
        group=None,
        waiting_for=None,
        writing=0,
        held=0,
        held_seconds=None,
    )
    return dataclasses.replace(plain, **changes)


def channel_report(participants, lags=None, **changes):
    """A report of a channel of this process, with other participants and groups."""
    with dsline.ShmChannel(capacity=4) as channel:
        plain = channel.inspect()
    group = plain.groups[0]
    groups = tuple(
        dataclasses.replace(group, number=number, name=name, lag=lag)
        for number, (name, lag) in enumerate((lags or {}).items(), 1)
    )
    return dataclasses.replace(plain, participants=participants, groups=(group, *groups), **changes)
