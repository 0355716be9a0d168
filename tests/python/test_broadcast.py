"""Broadcast: a channel without the default group."""

import pickle

import numpy as np
import pytest

import dsline


def test_what_nobody_hears_passes_and_is_counted(make_broadcast):
    channel = make_broadcast(capacity=2, slot_size=64, backpressure="raise")
    for _ in range(10):
        assert channel.send(b"x") is True
    stats = channel.stats()
    assert (stats.unheard, stats.free_slots, stats.depth, stats.dropped_newest) == (10, 2, 0, 0)
    with channel.subscribe() as viewer:
        assert channel.send(b"y")
        assert viewer.recv_bytes(timeout=0) == b"y"
        assert channel.stats().unheard == 10


@pytest.mark.parametrize(
    "call",
    [
        lambda ch: ch.recv(),
        lambda ch: ch.recv_nowait(),
        lambda ch: ch.recv_array(),
        lambda ch: ch.recv_bytes(timeout=0),
        lambda ch: ch.recv_into(bytearray(8)),
        lambda ch: ch.recv_with_seq(),
        lambda ch: ch.recv_message(),
        lambda ch: ch.recv_message_nowait(),
        lambda ch: ch.recv_many(2),
        lambda ch: next(ch),
        list,
    ],
)
def test_receiving_names_subscribe(make_broadcast, call):
    channel = make_broadcast(capacity=2)
    channel.send(b"x")
    with pytest.raises(dsline.FeatureUnavailableError, match=r"subscribe\("):
        call(channel)


def test_a_name_is_of_one_kind(name):
    with dsline.Broadcast(name, capacity=2) as channel:
        for wrong in (
            lambda: dsline.ShmChannel(name),
            lambda: dsline.ShmChannel(name, capacity=2),
            lambda: dsline.ShmChannel.open(name),
        ):
            with pytest.raises(dsline.ChannelMismatchError, match=name):
                wrong()
        with dsline.Broadcast(name) as same, dsline.Broadcast.open(name) as opened:
            assert same.capacity == opened.capacity == 2
        assert channel.stats().participants == 1
        channel.unlink()
    with dsline.ShmChannel(name, capacity=2):
        for wrong in (lambda: dsline.Broadcast(name), lambda: dsline.Broadcast.open(name)):
            with pytest.raises(dsline.ChannelMismatchError, match=name):
                wrong()


def test_create_and_open(name):
    with pytest.raises(dsline.ChannelNotFoundError):
        dsline.Broadcast.open(name)
    with dsline.Broadcast.create(name, capacity=2, backpressure="drop_oldest", timeout=3) as channel:
        assert isinstance(channel, dsline.Broadcast)
        assert (channel.backpressure, channel.timeout) == (dsline.Backpressure.DROP_OLDEST, 3)
        with pytest.raises(dsline.ChannelExistsError):
            dsline.Broadcast.create(name)
        with dsline.Broadcast.open(name, timeout=4) as other:
            assert (other.capacity, other.timeout) == (2, 4)
        assert repr(channel).startswith(f"<dsline.Broadcast '{name}'")


def test_a_broadcast_pickles_by_name(name):
    with (
        dsline.Broadcast(name, capacity=2, backpressure="drop_newest") as channel,
        pickle.loads(pickle.dumps(channel)) as again,
        channel.subscribe() as viewer,
    ):
        assert isinstance(again, dsline.Broadcast)
        assert again.backpressure is dsline.Backpressure.DROP_NEWEST
        again.send(np.arange(3))
        np.testing.assert_array_equal(viewer.recv_array(timeout=0), [0, 1, 2])


def test_one_slow_group_holds_up_who_blocks_and_nobody_else(name):
    with (
        dsline.Broadcast(name, capacity=2, slot_size=64, timeout=0) as channel,
        channel.subscribe("slow") as slow,
        channel.subscribe("fast") as fast,
    ):
        channel.send_many([b"1", b"2"])
        assert [fast.recv_bytes(), fast.recv_bytes()] == [b"1", b"2"]
        with pytest.raises(dsline.BufferFullError):
            channel.send(b"3")
        with dsline.Broadcast.open(name, backpressure="drop_oldest") as other:
            assert other.send(b"3")
        assert fast.recv_bytes() == b"3"
        assert (slow.lost, fast.lost) == (1, 0)
        assert [slow.recv_bytes(), slow.recv_bytes()] == [b"2", b"3"]


def test_history_serves_those_that_come_later(make_broadcast):
    channel = make_broadcast(capacity=4, slot_size=64, history=2)
    channel.send_many([b"1", b"2", b"3"])
    assert channel.history == 2
    for _ in range(2):
        with channel.subscribe(start="oldest") as viewer:
            assert [viewer.recv_bytes(timeout=0), viewer.recv_bytes(timeout=0)] == [b"2", b"3"]
            with pytest.raises(dsline.BufferEmptyError):
                viewer.recv(timeout=0)
