"""Groups, dead letters and latest values between processes that stop, die, and start by every method."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_sharer
import multiprocessing.resource_tracker
import os
import random
import signal
import struct
import time
from collections import Counter

import children
import numpy as np
import pytest
from support import TIMEOUT, Child, check_proof, forked, proof, wait_until

import dsline
from dsline import status
from dsline._core import channel_directory, list_names

# pytest's timer is a thread, so that Python 3.12 and later warn about every fork here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def channel(name):
    with dsline.ShmChannel(name, capacity=8, slot_size=256, timeout=TIMEOUT) as channel:
        yield channel
        channel.unlink()


@pytest.fixture
def broadcast(name):
    with dsline.Broadcast(name, capacity=8, slot_size=256, timeout=TIMEOUT) as channel:
        yield channel
        channel.unlink()


@contextlib.contextmanager
def stopped(child):
    """The process is stopped by a signal while the block runs."""
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield
    finally:
        os.kill(child.pid, signal.SIGCONT)


def empty_for_a_slice(receiver):
    with pytest.raises(dsline.BufferEmptyError):
        receiver.recv(timeout=0.06)


def groups_of(channel):
    return {group.name for group in channel.inspect().groups if group.name and not group.retention}


# --- viewers that die --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holds", [0, 2])
def test_the_group_of_a_killed_viewer_goes_and_blocks_nobody(broadcast, holds):
    function = ["subscribe_and_do_nothing"] if not holds else ["subscribe_and_hold"]
    arguments = ["Broadcast", broadcast.name, "viewer", *([holds] if holds else [])]
    with Child(*function, *arguments) as viewer:
        viewer.read()
        broadcast.send_many([b"x"] * 8)
        if holds:
            assert viewer.read() == [0, 1]
        with pytest.raises(dsline.BufferFullError):
            broadcast.send(b"x", timeout=0)
        viewer.kill()
    began = time.monotonic()
    assert broadcast.send(b"goes on")
    assert time.monotonic() - began < 5
    wait_until(lambda: groups_of(broadcast) == set() and broadcast.stats().free_slots == 8)
    assert broadcast.stats().deaths == 1


def test_a_durable_group_outlives_its_members(broadcast):
    with Child("subscribe_and_do_nothing", "Broadcast", broadcast.name, "log", True) as viewer:
        viewer.read()
        broadcast.send(b"1")
        viewer.kill()
    assert broadcast.check_peers() == 1
    broadcast.send(b"2")
    with broadcast.subscribe("log", durable=True) as subscriber:
        assert [subscriber.recv_bytes(timeout=0), subscriber.recv_bytes(timeout=0)] == [b"1", b"2"]
        subscriber.leave()


def test_what_a_killed_member_held_comes_to_another_of_its_group(channel):
    with channel.subscribe("team") as other, channel.subscribe("witness") as witness:
        with Child("subscribe_and_hold", "ShmChannel", channel.name, "team", 2) as member:
            assert member.read() == "ready"
            channel.send(proof(1, 0))
            channel.send(proof(1, 1))
            assert member.read() == [0, 1]
            assert other.lag == 0
            member.kill()
        got = [other.recv_message() for _ in range(2)]
        assert [(m.sequence, m.attempt, m.redelivered) for m in got] == [(0, 2, True), (1, 2, True)]
        assert [check_proof(m.array(copy=True)) for m in got] == [(1, 0), (1, 1)]
        for message in got:
            message.ack()
        assert [witness.recv_message().redelivered for _ in range(2)] == [False, False]
        assert [channel.recv_message().redelivered for _ in range(2)] == [False, False]
    assert channel.stats().free_slots == 8


def test_policy_drop_releases_what_the_dead_held(channel):
    with channel.subscribe("team", on_death="drop") as other:
        with Child("subscribe_and_hold", "ShmChannel", channel.name, "team", 1, "drop") as member:
            assert member.read() == "ready"
            channel.send(b"0")
            assert member.read() == [0]
            channel.send(b"1")
            member.kill()
        assert channel.check_peers() == 1
        message = other.recv_message()
        assert (message.sequence, message.redelivered) == (1, False)
        message.ack()
        empty_for_a_slice(other)
        assert [channel.recv_bytes(), channel.recv_bytes()] == [b"0", b"1"]
        assert channel.stats().free_slots == 8


def test_messages_that_kill_become_dead_letters_and_the_stream_goes_on(channel):
    channel.send(proof(1, 0), meta={"name": "poison"})
    pids = []
    for _ in range(3):
        with Child("hold", channel.name) as consumer:
            assert consumer.read() == [0]
            pids.append(consumer.pid)
            consumer.kill()
    channel.send(proof(1, 1))
    with channel.recv_message() as message:
        assert (message.sequence, message.attempt) == (1, 1)
    (letter,) = channel.dead_letters()
    assert (letter.sequence, letter.attempt, letter.reason, letter.last_pid) == (0, 3, "died", pids[-1])
    assert (letter.meta, letter.group) == ({"name": "poison"}, None)
    assert check_proof(letter.array(copy=True)) == (1, 0)
    letter.revive()
    again = channel.recv_message(timeout=0)
    assert again.sequence == 0
    again.ack()
    assert (channel.stats().dead_letters, channel.stats().free_slots) == (0, 8)


def test_who_dies_with_a_dead_letter_leaves_it_a_dead_letter(channel):
    channel.send(b"x")
    for _ in range(channel.max_deliveries):
        channel.recv_message(timeout=0).nack()
    empty_for_a_slice(channel)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        letters = list(channel.dead_letters())
        os.write(writer, b"%d" % len(letters))
        signal.pause()
    try:
        assert os.read(reader, 10) == b"1"
        assert list(channel.dead_letters()) == []
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
    assert channel.check_peers() == 1
    (letter,) = channel.dead_letters()
    letter.ack()
    assert channel.stats().free_slots == 8


@pytest.mark.parametrize("seed", range(2))
def test_members_of_a_durable_group_killed_at_random(broadcast, tmp_path, seed):
    """Nothing that was sent is lost to the group, and what comes twice is flagged."""
    chance = random.Random(seed)
    log = tmp_path / "log"
    log.touch()
    sent = 0
    with broadcast.subscribe("log", durable=True) as survivor:
        for _ in range(5):
            with Child("view_and_log", broadcast.name, "log", str(log)) as child:
                assert child.read() == "ready"
                for _ in range(chance.randrange(20, 200)):
                    broadcast.send(proof(1, sent))
                    sent += 1
                child.kill()
        logged = list(struct.iter_unpack("<QB", log.read_bytes()))
        rest = []
        while True:
            try:
                with survivor.recv_message(timeout=0.3) as message:
                    rest.append((check_proof(message.array())[1], message.redelivered))
            except dsline.BufferEmptyError:
                break
        seen = Counter(number for number, _ in logged + rest)
        again = Counter(number for number, redelivered in logged + rest if redelivered)
        assert set(seen) == set(range(sent)), "lost"
        assert all(count - 1 <= again[number] for number, count in seen.items()), "doubled without a flag"
        survivor.leave()
    assert broadcast.stats().free_slots == 8


def test_both_sides_of_a_group_die_and_the_next_ones_go_on(name):
    channel = dsline.ShmChannel(name, capacity=8, slot_size=256)
    with (
        Child("subscribe_and_hold", "ShmChannel", name, "team", 1) as member,
        Child("send_proofs", name, 1, 0, 6) as producer,
    ):
        assert member.read() == "ready"
        assert producer.read() == "sent 6"
        assert member.read() == [0]
        channel.close()
        member.kill()
        producer.kill()
    with dsline.ShmChannel(name, timeout=TIMEOUT) as channel:
        assert groups_of(channel) == set()
        assert channel.stats().deaths == 2
        assert [check_proof(channel.recv_array(copy=True)) for _ in range(6)] == [(1, n) for n in range(6)]
        assert channel.stats().free_slots == 8


@pytest.mark.parametrize("seed", range(3))
def test_a_creator_killed_during_creation_leaves_nothing_half_made(name, seed):
    """Whenever it dies, the name is absent or a whole channel."""
    chance = random.Random(seed)
    absent = 0
    for _ in range(15):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, b"go")
            while True:
                with dsline.Broadcast(name, capacity=8, slot_size=65536, history=4) as channel:
                    channel.subscribe("group").close()
                    channel.unlink()
        os.read(reader, 2)
        time.sleep(chance.random() * 0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
        absent += name not in list_names()
        with dsline.Broadcast(name) as channel, channel.subscribe("viewer") as viewer:
            channel.send(b"x")
            assert viewer.recv_bytes(timeout=0) == b"x"
            channel.unlink()
    assert [entry for entry in os.listdir(channel_directory()) if name in entry] == []


# --- viewers that stop -------------------------------------------------------------------------------------------


def test_a_stopped_viewer_never_slows_a_producer_that_drops(name):
    with (
        dsline.Broadcast(name, capacity=8, slot_size=64, backpressure="drop_oldest") as channel,
        channel.subscribe("fast") as fast,
        Child("view_when_told", name, "slow") as slow,
    ):
        assert slow.read() == "ready"
        channel.send(b"x")
        slow.tell()
        assert slow.read() == [[0], 0]
        fast.recv_bytes()
        with stopped(slow):
            for number in range(1, 2001):
                assert channel.send(b"x")
                assert fast.recv_with_seq(timeout=0)[0] == number
            assert (channel.stats().send_waits, channel.stats().dropped_newest, fast.lost) == (0, 0, 0)
            peers = {peer.pid: peer.state for peer in status.inspect(name).participants}
            assert peers[slow.pid] == "stopped"
        slow.tell()
        sequences, lost = slow.read()
        assert sequences == list(range(2001 - len(sequences), 2001))
        assert lost == 2000 - len(sequences), "the gap and the count agree"
        slow.tell("")
        slow.finish()
        channel.unlink()


def test_a_stopped_holder_is_named_and_never_declared_dead(broadcast):
    with Child("subscribe_and_hold", "Broadcast", broadcast.name, "view", 3) as viewer:
        assert viewer.read() == "ready"
        broadcast.send_many([b"x"] * 8)
        assert viewer.read() == [0, 1, 2]
        with stopped(viewer):
            with pytest.raises(dsline.BufferFullError) as caught:
                broadcast.send(b"x", timeout=0.2)
            (blocker,) = caught.value.blockers
            assert (blocker.pid, blocker.state, blocker.holds) == (viewer.pid, "stopped", 3)
            assert blocker.for_seconds >= 0.15
            assert "children.py" in blocker.command
            assert f"pid {viewer.pid} (" in str(caught.value)
            assert "stopped) holds 3 messages of group 'view' for" in str(caught.value)
            assert f"pid {viewer.pid} (" in status.why(broadcast.name)
            assert broadcast.check_peers() == 0
            polled = None
            with pytest.raises(dsline.BufferFullError) as caught:
                broadcast.send(b"x", timeout=0)
            polled = caught.value
            assert polled.blockers[0].state == "stopped"
        viewer.kill()
    assert broadcast.send(b"x")
    with pytest.raises(dsline.BufferEmptyError) as caught, broadcast.subscribe() as subscriber:
        subscriber.recv(timeout=0)
    assert caught.value.blockers == []


def test_a_stopped_viewer_that_holds_nothing_is_named_too(broadcast):
    with Child("subscribe_and_do_nothing", "Broadcast", broadcast.name, "idle") as viewer:
        viewer.read()
        broadcast.send_many([b"x"] * 8)
        with stopped(viewer), pytest.raises(dsline.BufferFullError) as caught:
            broadcast.send(b"x", timeout=0.05)
        assert [(b.pid, b.state, b.holds, b.group) for b in caught.value.blockers] == [
            (viewer.pid, "stopped", 0, "idle")
        ]


def test_a_receiver_learns_that_the_sender_is_stopped(channel):
    with Child("send_proofs", channel.name, 1, 0, 1) as producer:
        producer.read()
        channel.recv_bytes()
        with stopped(producer), pytest.raises(dsline.BufferEmptyError) as caught:
            channel.recv(timeout=0.05)
            pytest.fail("nothing was sent")
        with stopped(producer):
            (blocker,) = caught.value.blockers
            assert (blocker.pid, blocker.state) == (producer.pid, "stopped")
            assert f"pid {producer.pid} (" in status.why(channel.name)


# --- being told of deaths ----------------------------------------------------------------------------------------


def test_a_waiting_call_tells_of_a_death(channel):
    told = []
    channel.on_peer_death(told.append)
    channel.send(proof(1, 0))
    with Child("hold", channel.name) as consumer:
        assert consumer.read() == [0]
        consumer.kill()
    with channel.recv_message() as message:
        assert message.redelivered
    wait_until(lambda: told or channel.check_peers())
    (death,) = told
    assert isinstance(death, dsline.PeerDeath)
    assert (death.pid, death.held, death.writing, death.group, death.number) == (consumer.pid, 1, 0, None, 0)
    assert abs(time.time_ns() - death.noticed_ns) < 60e9
    assert death.start_time > 0
    empty_for_a_slice(channel)
    assert channel.check_peers() == 0
    assert len(told) == 1, "once"


def test_a_callback_names_the_group_and_each_one_is_called(broadcast):
    first, second = [], []
    stop = broadcast.on_peer_death(first.append)
    broadcast.on_peer_death(second.append)
    with Child("subscribe_and_do_nothing", "Broadcast", broadcast.name, "viewer") as viewer:
        viewer.read()
        viewer.kill()
    assert broadcast.check_peers() == 1
    stop()
    with Child("subscribe_and_do_nothing", "Broadcast", broadcast.name, "viewer") as again:
        again.read()
        again.kill()
    assert broadcast.check_peers() == 1
    assert [death.pid for death in first] == [viewer.pid]
    assert [death.pid for death in second] == [viewer.pid, again.pid]


class WorkerDied(Exception):
    pass


@pytest.mark.parametrize("where", ["recv", "send", "subscriber"])
def test_what_a_callback_raises_ends_the_wait_and_loses_nothing(channel, where):
    def raise_it(death):
        raise WorkerDied(death.pid)

    subscriber = channel.subscribe("group", timeout=TIMEOUT)
    waiting = subscriber if where == "subscriber" else channel
    if where == "send":
        channel.send_many([b"x"] * 8)
    waiting.on_peer_death(raise_it)
    with Child("wait_in_send" if where == "send" else "wait_in_recv", channel.name) as peer:
        assert peer.read() == "waiting"
        peer.kill()
    with pytest.raises(WorkerDied, match=str(peer.pid)):
        channel.send(b"y") if where == "send" else waiting.recv()
    if where != "send":
        channel.send(b"x")
        assert waiting.recv_bytes() == b"x"
    subscriber.close()


def test_a_latest_reader_is_told_as_well(name):
    with dsline.Latest(name, timeout=TIMEOUT) as cell:
        told = []
        cell.on_peer_death(told.append)
        with Child("set_for_ever", name, 16) as writer:
            assert writer.read() == "ready"
            cell.wait_newer()
            writer.kill()
        sequence = cell.sequence
        with pytest.raises(dsline.BufferEmptyError):
            cell.wait_newer(sequence, timeout=0.3)
        assert [death.pid for death in told] == [writer.pid]
        assert check_proof(cell.get()) == (1, cell.sequence), "the value of the dead stays, whole"
        cell.unlink()


@pytest.mark.parametrize("seed", range(3))
def test_writers_of_a_cell_killed_at_random(name, seed):
    chance = random.Random(seed)
    with dsline.Latest(name, timeout=TIMEOUT) as cell:
        for _ in range(3):
            before = cell.sequence
            with Child("set_for_ever", name, 5000) as writer:
                assert writer.read() == "ready"
                for _ in range(chance.randrange(1, 50)):
                    value, before = cell.wait_newer(before)
                    check_proof(value)
                writer.kill()
            check_proof(cell.get())
        cell.set(b"mine")
        assert cell.get() == b"mine"
        cell.unlink()


# --- subscribers as arguments of processes -----------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def helpers():
    """The helper processes of multiprocessing live as long as pytest: their pipes are nobody's leak."""
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def sharing_ends():
    """The thread and the socket by which multiprocessing passes descriptors on end with the test."""
    yield
    multiprocessing.resource_sharer.stop(timeout=TIMEOUT)


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def context(request):
    return multiprocessing.get_context(request.param)


@pytest.fixture(params=["named", "anonymous", "file", "broadcast", "anonymous broadcast"])
def any_channel(request, name, tmp_path):
    options = {"capacity": 8, "slot_size": 256, "timeout": TIMEOUT}
    if request.param == "file":
        channel = dsline.FileChannel.create(tmp_path / "queue", **options)
    else:
        kind = dsline.Broadcast if "broadcast" in request.param else dsline.ShmChannel
        channel = kind(None if "anonymous" in request.param else name, **options)
    yield channel
    if channel.path is not None:
        channel.unlink()
    channel.close()


@contextlib.contextmanager
def started(context, target, *arguments):
    process = context.Process(target=target, args=arguments)
    process.start()
    try:
        yield process
        process.join(TIMEOUT)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join(TIMEOUT)
        process.close()


def test_a_subscriber_passed_to_a_process_is_one_more_member(context, any_channel):
    mine = any_channel.subscribe("team")
    with contextlib.ExitStack() as stack:
        readers = []
        for _ in range(2):
            reader, writer = context.Pipe(duplex=False)
            stack.enter_context(reader)
            stack.enter_context(writer)
            stack.enter_context(started(context, children.receive_of_group, mine, writer))
            readers.append(reader)
        for reader in readers:
            assert reader.poll(TIMEOUT)
            assert reader.recv() == "ready"
        mine.close()
        with any_channel.subscribe("all") as everything:
            sent = [(1, number) for number in range(100)]
            seen = []
            for producer, number in sent:
                any_channel.send(proof(producer, number))
                seen.append(check_proof(everything.recv_array()))
                if any_channel.path is None or not isinstance(any_channel, dsline.Broadcast):
                    with contextlib.suppress(dsline.FeatureUnavailableError):
                        any_channel.recv_bytes()
            any_channel.shutdown()
            got = []
            for reader in readers:
                assert reader.poll(TIMEOUT)
                got += reader.recv()
    assert seen == sent
    assert sorted(got) == sent, "the two share them"


def test_a_cell_passed_to_a_process(context, name):
    for cell in (dsline.Latest(name), dsline.Latest()):
        with cell:
            cell.set(np.arange(3))
            reader, writer = context.Pipe(duplex=False)
            with reader, writer, started(context, children.set_and_wait, cell, writer):
                value, sequence = cell.wait_newer(0, timeout=TIMEOUT)
                np.testing.assert_array_equal(value, [1, 2, 3])
                assert sequence == 1
                assert reader.recv() == 0


@pytest.mark.parametrize("kind", ["named", "anonymous"])
def test_an_inherited_subscriber_registers_anew(name, kind):
    with (
        dsline.Broadcast(name if kind == "named" else None, capacity=4, timeout=TIMEOUT) as channel,
        channel.subscribe("team", timeout=TIMEOUT) as subscriber,
    ):
        channel.send_many([b"1", b"2", b"3"])
        views = [subscriber.recv()]

        def child():
            assert subscriber.recv_bytes() == b"2"
            assert subscriber.stats().participants == 3, "registered anew"
            assert bytes(views[0]) == b"1", "the parent's, readable here"
            subscriber.close()
            channel.close()

        forked(child)
        assert subscriber.recv_bytes(timeout=0) == b"3"
        assert channel.stats().participants == 2
        assert channel.stats().free_slots == 3, "the parent's view is the parent's"
        views.clear()
        assert channel.stats().free_slots == 4


def test_a_child_that_ends_leaves_the_parents_group_alone(broadcast):
    with broadcast.subscribe("team") as subscriber:
        forked(lambda: None)
        forked(subscriber.close)
        broadcast.send(b"x")
        assert subscriber.recv_bytes(timeout=0) == b"x"


def test_two_processes_view_all(broadcast):
    """Groups of other processes see every message, once."""
    with (
        Child("view_all", broadcast.name, "a") as first,
        Child("view_all", broadcast.name, "b") as second,
    ):
        assert (first.read(), second.read()) == ("ready", "ready")
        for number in range(300):
            broadcast.send(proof(1, number))
        broadcast.shutdown()
        expected = [[1, number, False] for number in range(300)]
        assert first.read() == expected
        assert second.read() == expected
        first.finish()
        second.finish()
