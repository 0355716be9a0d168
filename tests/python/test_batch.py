"""recv_batch: messages of one layout in the rows of one array."""

import signal
import threading

import numpy as np
import pytest

import dsline


def row(number, shape=(3, 5), dtype=np.int32):
    return (np.arange(np.prod(shape, dtype=int)) + number).astype(dtype).reshape(shape)


def stacked(numbers, shape=(3, 5), dtype=np.int32):
    return np.stack([row(number, shape, dtype) for number in numbers]).astype(dtype)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (0, 2), (300, 300)])
@pytest.mark.parametrize("dtype", ["u1", "<i4", ">f8", "c16", "M8[s]", "S3"])
def test_the_rows_are_the_messages(make_any, shape, dtype):
    channel = make_any(capacity=4, slot_size=512, timeout=0)
    for number in range(4):
        channel.send(row(number, shape, dtype))
    batch = channel.recv_batch(4)
    assert (batch.shape, batch.dtype) == ((4, *shape), np.dtype(dtype))
    assert batch.tobytes() == stacked(range(4), shape, dtype).tobytes()
    assert batch.flags.writeable
    assert batch.flags.owndata
    assert batch.flags.c_contiguous
    stats = channel.stats()
    assert (stats.free_slots, stats.received, stats.pinned_views) == (4, 4, 0)
    assert stats.bytes_received == batch.nbytes


def test_structures_get_a_dtype_of_their_own(make_any):
    channel = make_any(capacity=4, slot_size=512)
    sent = np.array([(1, 2.5), (3, 4.5)], [("a", "<i4"), ("b", "<f8")])
    channel.send(sent)
    channel.send(sent)
    batch = channel.recv_batch(2)
    assert (batch == np.stack([sent, sent])).all()
    batch.dtype.names = ("x", "y")
    channel.send(sent)
    assert channel.recv_batch(1).dtype.names == ("a", "b")


def test_a_batch_may_be_larger_than_the_channel(make_any):
    channel = make_any(capacity=2, slot_size=512, timeout=30)
    sender = threading.Thread(target=lambda: [channel.send(row(number)) for number in range(50)])
    sender.start()
    batch = channel.recv_batch(50)
    sender.join()
    assert (batch == stacked(range(50))).all()


def test_what_came_in_time(make_any):
    channel = make_any(capacity=8, slot_size=512, timeout=0)
    for number in range(3):
        channel.send(row(number))
    batch = channel.recv_batch(8)
    assert (batch == stacked(range(3))).all()
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv_batch(8)
    for number in range(3):
        channel.send(row(number))
    assert len(channel.recv_batch(2)) == 2
    assert len(channel.recv_batch(5, timeout=0.05)) == 1
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv_batch(2, timeout=0.02)


def test_it_waits_for_all_of_them_with_no_time_limit(make_any):
    channel = make_any(capacity=8, slot_size=512)
    late = threading.Timer(0.2, lambda: [channel.send(row(number)) for number in (1, 2)])
    channel.send(row(0))
    late.start()
    assert (channel.recv_batch(3, timeout=None) == stacked(range(3))).all()
    late.join()


def test_the_end_of_the_channel_ends_the_batch(make_any):
    channel = make_any(capacity=8, slot_size=512, timeout=30)
    for number in range(3):
        channel.send(row(number))
    channel.shutdown()
    assert (channel.recv_batch(8) == stacked(range(3))).all()
    with pytest.raises(dsline.ChannelClosedError):
        channel.recv_batch(8)


@pytest.mark.parametrize(
    "other", [np.arange(5), row(1, (5, 3)), row(1, dtype=np.int64), row(1, (15,)), b"bytes"]
)
def test_another_kind_of_message_ends_it_and_stays(make_any, other):
    channel = make_any(capacity=8, slot_size=512, timeout=30)
    channel.send(row(0))
    channel.send(other)
    channel.send(row(2))
    assert (channel.recv_batch(3) == stacked([0])).all()
    message = channel.recv_message()
    assert (message.sequence, message.attempt) == (1, 1)
    assert bytes(message.payload) == (other if isinstance(other, bytes) else other.tobytes())
    message.release()
    assert (channel.recv_batch(1) == stacked([2])).all()


@pytest.mark.parametrize("put", ["send", "send_object"])
def test_what_is_no_array_stays(make_any, put):
    channel = make_any(capacity=4, slot_size=512, timeout=0)
    getattr(channel, put)(b"bytes")
    for _ in range(2):
        with pytest.raises(dsline.SchemaMismatchError, match="stays in the channel"):
            channel.recv_batch(3)
    assert channel.recv_object() == b"bytes"


def test_fortran_order_is_gathered(make_any):
    channel = make_any(capacity=4, slot_size=512, timeout=0)
    channel.send(np.asfortranarray(row(0)))
    channel.send(row(1))
    channel.send(np.asfortranarray(row(2)))
    batch = channel.recv_batch(4)
    assert batch.flags.c_contiguous
    assert (batch == stacked(range(3))).all()


# --- out ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "every other row", "fortran", "part of the columns"])
def test_out_is_filled(make_any, how):
    channel = make_any(capacity=4, slot_size=512, timeout=0)
    whole = {
        "plain": np.zeros((4, 3, 5), np.int32),
        "every other row": np.zeros((8, 3, 5), np.int32)[::2],
        "fortran": np.zeros((4, 3, 5), np.int32, order="F"),
        "part of the columns": np.zeros((4, 3, 9), np.int32)[:, :, 2:7],
    }[how]
    for number in range(3):
        channel.send(row(number))
    batch = channel.recv_batch(4, out=whole)
    assert batch.base is whole or batch.base is whole.base
    assert (whole[:3] == stacked(range(3))).all()
    assert (whole[3] == 0).all()
    for number in range(4):
        channel.send(row(number))
    assert channel.recv_batch(4, out=whole) is whole


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (np.zeros((2, 3, 5), np.int64), dsline.SchemaMismatchError),
        (np.zeros((2, 5, 3), np.int32), dsline.SchemaMismatchError),
        (np.zeros((2, 15), np.int32), dsline.SchemaMismatchError),
        (np.zeros((3, 3, 5), np.int32), dsline.InvalidArgumentError),
        (np.zeros((), np.int32), dsline.InvalidArgumentError),
        (np.broadcast_to(np.int32(0), (2, 3, 5)), dsline.InvalidArgumentError),
        (bytearray(120), TypeError),
    ],
)
def test_an_out_that_does_not_fit_takes_nothing(make_any, out, error):
    channel = make_any(capacity=4, slot_size=512, timeout=0)
    channel.send(row(0))
    channel.send(row(1))
    with pytest.raises(error):
        channel.recv_batch(2, out=out)
    assert (channel.recv_batch(2) == stacked(range(2))).all()


@pytest.mark.parametrize("n", [0, -1])
def test_a_batch_has_rows(make_any, n):
    channel = make_any(capacity=4, slot_size=512, timeout=0)
    with pytest.raises(ValueError, match=f"asked for {n} messages"):
        channel.recv_batch(n)


def test_a_batch_that_memory_cannot_hold_takes_nothing(make_any):
    channel = make_any(capacity=4, slot_size=512, timeout=0)
    channel.send(row(0))
    with pytest.raises((MemoryError, ValueError)):
        channel.recv_batch(1 << 58)
    assert (channel.recv_array() == row(0)).all()


# --- interrupted ----------------------------------------------------------------------------------------------------


class Alarm(Exception):
    pass


@pytest.mark.parametrize("use_out", [False, True])
def test_an_interrupt_loses_no_row(make_any, use_out):
    channel = make_any(capacity=4, slot_size=512, timeout=30)

    def ring(*_):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for number in range(3):
            channel.send(row(number))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Alarm):
            channel.recv_batch(4, out=np.zeros((4, 3, 5), np.int32) if use_out else None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert channel.stats().free_slots == 4
    with pytest.raises(dsline.SchemaMismatchError):
        channel.recv_batch(4, out=np.zeros((4, 2), np.int32))
    assert (channel.recv_batch(2, timeout=0) == stacked([0, 1])).all()
    channel.send(row(3))
    channel.send(row(4))
    assert (channel.recv_batch(3, timeout=0) == stacked([2, 3, 4])).all()
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv_batch(3, timeout=0)


def test_a_subscriber_has_it_too(make_broadcast):
    channel = make_broadcast(capacity=4, slot_size=512, timeout=0)
    with pytest.raises(dsline.FeatureUnavailableError):
        channel.recv_batch(2)
    with channel.subscribe("g") as subscriber:
        for number in range(4):
            channel.send(row(number))
        assert (subscriber.recv_batch(4) == stacked(range(4))).all()


def test_threads_share_a_handle(make_any):
    """Every message is in one batch of one thread, whole."""
    channel = make_any(capacity=8, slot_size=1 << 18, timeout=30)
    got = []

    def receive():
        try:
            while True:
                got.append(channel.recv_batch(7))
        except dsline.ChannelClosedError:
            pass

    threads = [threading.Thread(target=receive) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(100):
        channel.send(np.full(20_000, number))
    channel.shutdown()
    for thread in threads:
        thread.join()
    rows = np.concatenate(got)
    assert sorted(rows[:, 0]) == list(range(100))
    assert (rows == rows[:, :1]).all()
