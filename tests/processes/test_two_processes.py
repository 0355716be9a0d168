"""Processes that know nothing of each other but a name."""

import contextlib
from collections import Counter

import numpy as np
import pytest
from support import TIMEOUT, Child, check_proof, proof

import dsline
from dsline._core import list_names


@pytest.mark.parametrize("words", [8, 5_000, 300_000])
@pytest.mark.parametrize(("producers", "consumers"), [(1, 1), (3, 1), (1, 3), (2, 2)])
def test_every_message_exactly_once_and_whole(name, producers, consumers, words):
    count = 40 if words > 100_000 else 150
    with contextlib.ExitStack() as stack:
        channel = stack.enter_context(dsline.ShmChannel(name, capacity=8, slot_size=4096, timeout=TIMEOUT))
        receiving = [stack.enter_context(Child("receive_proofs", name)) for _ in range(consumers)]
        for child in receiving:
            assert child.read() == "ready"
        sending = [
            stack.enter_context(Child("send_proofs_and_leave", name, producer, 0, count, words))
            for producer in range(producers)
        ]
        for child in sending:
            child.finish()
        channel.shutdown()
        got = []
        for child in receiving:
            one = [tuple(pair) for pair in child.read()]
            for producer in range(producers):
                numbers = [number for who, number in one if who == producer]
                assert numbers == sorted(numbers)
            got += one
            child.finish()
        assert Counter(got) == Counter((who, number) for who in range(producers) for number in range(count))
        stats = channel.stats()
        assert (stats.free_slots, stats.depth, stats.redelivered, stats.corrupted) == (8, 0, 0, 0)
        assert stats.participants == 1


def test_records_of_a_killed_sender_are_whole(name):
    spec = {
        "frame": dsline.ArraySpec((64, 96), "u1"),
        "step": dsline.ArraySpec((), "i8"),
        "half": dsline.ArraySpec((), "f8"),
    }
    with dsline.ShmChannel(name, capacity=4, timeout=TIMEOUT, spec=spec) as channel:
        for life in range(3):
            first = life * 1_000_000
            with Child("send_records", name, first) as child:
                refused = child.read()
                assert "'half': ArraySpec((), 'float64')" in refused
                assert "ArraySpec((3,), 'float32')" in refused
                assert child.read() == sorted(spec)
                for step in range(first, first + 100):
                    check_record(channel.recv_record(), step)
                child.kill()
            step = first + 100
            channel.check_peers()
            while len(channel):
                check_record(channel.recv_record(timeout=0), step)
                step += 1
        stats = channel.stats()
        assert (stats.free_slots, stats.corrupted, stats.deaths) == (4, 0, 3)


def check_record(got, step):
    assert (got["step"], got["half"]) == (step, step / 2)
    assert (got["frame"] == step % 251).all()


def test_a_conversation(name):
    back = f"{name}-back"
    with (
        dsline.ShmChannel(name, capacity=2, slot_size=64) as outbox,
        dsline.ShmChannel(back, capacity=2, slot_size=64, timeout=TIMEOUT) as inbox,
        Child("echo", name, back) as child,
    ):
        for number in range(200):
            array = np.arange(number, dtype=np.float32)
            outbox.send(array, timeout=TIMEOUT)
            np.testing.assert_array_equal(inbox.recv_array(), array * 2)
        outbox.shutdown()
        child.finish()


def test_the_receiver_starts_first(name):
    with Child("receive_proofs", name) as receiver:
        assert receiver.read() == "ready"
        with dsline.ShmChannel.open(name) as channel:
            for number in range(5):
                channel.send(proof(1, number), timeout=TIMEOUT)
            channel.shutdown()
            assert receiver.read() == [[1, number] for number in range(5)]
            receiver.finish()
    assert name not in list_names()


def test_the_sender_is_gone_before_the_receiver_opens(name):
    with Child("send_proofs_and_leave", name, 1, 0, 20) as sender:
        sender.finish()
    assert name in list_names()
    with dsline.ShmChannel(name, timeout=0) as channel:
        assert [check_proof(channel.recv_array())[1] for _ in range(20)] == list(range(20))
        assert channel.stats().participants == 1
    assert name not in list_names()


def test_senders_one_after_the_other_and_nobody_between(name):
    for first in range(0, 30, 10):
        with Child("send_proofs_and_leave", name, 1, first, 10) as sender:
            sender.finish()
    with dsline.ShmChannel(name, timeout=0) as channel:
        got = []
        for _ in range(30):
            sequence, view = channel.recv_with_seq()
            got.append((sequence, check_proof(view)[1]))
            del view
    assert got == [(number, number) for number in range(30)]


def test_many_processes_open_one_name_at_once(name):
    """One of them creates it, the others find it finished."""
    with contextlib.ExitStack() as stack:
        crew = [stack.enter_context(Child("open_when_told", name)) for _ in range(6)]
        for child in crew:
            assert child.read() == "ready"
        for child in crew:
            child.tell()
        uuids = {child.read() for child in crew}
        assert len(uuids) == 1
        with dsline.ShmChannel.open(name, timeout=TIMEOUT) as channel:
            assert sorted(channel.recv_bytes() for _ in crew) == sorted(b"%d" % child.pid for child in crew)
        for child in crew:
            child.tell()
            child.finish()
    assert name not in list_names()


def test_geometry_of_another_process_is_respected(name):
    with Child("send_proofs", name, 1, 0, 1) as child:
        assert child.read() == "sent 1"
        with pytest.raises(dsline.ChannelMismatchError, match=r"capacity=3.*64"):
            dsline.ShmChannel(name, capacity=3)
        with pytest.raises(dsline.ChannelExistsError):
            dsline.ShmChannel.create(name)
        with dsline.ShmChannel(name, capacity=64) as channel:
            assert check_proof(channel.recv_array(timeout=0)) == (1, 0)
        child.tell()
        child.finish()


def test_unlink_does_not_disturb_the_others(name):
    with (
        dsline.ShmChannel(name, capacity=4, slot_size=64, timeout=TIMEOUT) as channel,
        Child("receive_proofs", name) as receiver,
    ):
        assert receiver.read() == "ready"
        channel.unlink()
        channel.send(proof(1, 0))
        channel.shutdown()
        assert receiver.read() == [[1, 0]]
        receiver.finish()
