"""Sending, receiving, waiting, ending and opening: the same for every storage where that makes sense."""

import contextlib
import itertools
import os
import queue
import threading
import time

import numpy as np
import pytest
from support import TIMEOUT, wait_until

import dsline
from dsline._core import list_names
from dsline.testing import unique_name


class Thread:
    """A thread whose result, or exception, `result()` gives; it must end before the deadline."""

    def __init__(self, function, *arguments, **options):
        self._answer = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(function, arguments, options), daemon=True)
        self._thread.start()

    def _run(self, function, arguments, options):
        try:
            answer = (function(*arguments, **options), None)
        except BaseException as error:
            answer = (None, error)
        self._answer.put(answer)

    def result(self):
        value, error = self._answer.get(timeout=TIMEOUT)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        if error is not None:
            raise error
        return value


def fill(channel):
    for number in range(channel.capacity):
        assert channel.send(b"%d" % number, timeout=0)


# --- sending and receiving --------------------------------------------------------------------------------------


def test_messages_come_in_the_order_of_sending(make_any):
    channel = make_any(capacity=8, slot_size=64)
    for number in range(8):
        channel.send(b"%d" % number)
    assert [channel.recv_bytes(timeout=0) for _ in range(8)] == [b"%d" % number for number in range(8)]


RECEIVE = {
    "recv": lambda channel, **options: bytes(channel.recv(**options)),
    "recv_bytes": lambda channel, **options: channel.recv_bytes(**options),
    "recv_message": lambda channel, **options: bytes(channel.recv_message(**options).payload),
    "recv_with_seq": lambda channel, **options: bytes(channel.recv_with_seq(**options)[1]),
    "recv_many": lambda channel, **options: bytes(channel.recv_many(1, **options)[0]),
}


def recv_into(channel, **options):
    buffer = bytearray(16)
    return bytes(buffer[: channel.recv_into(buffer, **options)])


def recv_array(channel, **options):
    return channel.recv_array(**options).tobytes()


RECEIVE_ANY = {**RECEIVE, "recv_into": recv_into, "recv_array": recv_array}


@pytest.mark.parametrize("how", RECEIVE_ANY)
def test_every_way_to_receive_gives_the_message_and_frees_the_slot(make_any, how):
    channel = make_any(capacity=1, slot_size=64)
    for number in range(5):
        channel.send(np.frombuffer(b"data%d" % number, np.uint8))
        assert RECEIVE_ANY[how](channel, timeout=0) == b"data%d" % number
        assert channel.stats().free_slots == 1
    assert channel.stats().received == 5


@pytest.mark.parametrize("how", RECEIVE_ANY)
def test_nothing_there_raises_empty(make_any, how):
    channel = make_any(capacity=1, slot_size=64)
    with pytest.raises(dsline.BufferEmptyError, match="no message"):
        RECEIVE_ANY[how](channel, timeout=0)


@pytest.mark.parametrize("how", RECEIVE_ANY)
def test_a_waiting_receiver_gets_what_is_sent_later(make_any, how):
    channel = make_any(capacity=1, slot_size=64)
    receiver = Thread(RECEIVE_ANY[how], channel, timeout=None)
    wait_until(lambda: channel.stats().recv_waits > 0)
    channel.send(np.frombuffer(b"late", np.uint8))
    assert receiver.result() == b"late"


def test_nowait_is_a_timeout_of_zero(make_channel):
    channel = make_channel(capacity=1, slot_size=64, timeout=TIMEOUT)
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv_nowait()
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv_message_nowait()
    assert channel.send_nowait(b"one", meta={"a": 1})
    with pytest.raises(dsline.BufferFullError):
        channel.send_nowait(b"two")
    message = channel.recv_message_nowait()
    assert (bytes(message.payload), message.meta) == (b"one", {"a": 1})
    message.release()
    channel.send_nowait(b"three")
    assert bytes(channel.recv_nowait()) == b"three"


def test_sequences_are_the_positions_in_the_order(make_any):
    channel = make_any(capacity=3, slot_size=64)
    for number in range(10):
        channel.send(b"x")
        sequence, view = channel.recv_with_seq(timeout=0)
        assert sequence == number
        assert channel.stats().next_sequence == number + 1
        assert channel.stats().head_sequence == number + 1
        del view


def test_an_empty_message_is_a_message(make_any):
    channel = make_any(capacity=2, slot_size=64)
    channel.send(b"")
    assert len(channel) == 1
    view = channel.recv(timeout=0)
    assert (len(view), view.nbytes, bytes(view)) == (0, 0, b"")


@pytest.mark.parametrize(
    "size", [1, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097, 65535, 65536, 65537, 300_000]
)
def test_sizes_around_the_edges_of_slots_lines_and_pages(make_any, size):
    channel = make_any(capacity=3, slot_size=256)
    payloads = [bytes([number]) * size for number in range(3)]
    for payload in payloads:
        channel.send(payload)
    assert [channel.recv_bytes(timeout=0) for _ in payloads] == payloads


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 64])
def test_the_ring_wraps_without_loss(make_any, capacity):
    channel = make_any(capacity=capacity, slot_size=64)
    sent = received = 0
    while received < 2000:
        for _ in range(min(capacity, 1 + sent % capacity)):
            channel.send(b"%d" % sent, timeout=0)
            sent += 1
        while received < sent:
            sequence, view = channel.recv_with_seq(timeout=0)
            assert (sequence, bytes(view)) == (received, b"%d" % received)
            del view
            received += 1
    assert channel.stats().free_slots == capacity


def test_sequences_go_on_past_the_44_bits_of_a_cell(name):
    """Only an internal option starts a channel near the wrap; sending there takes 28 years."""
    channel = dsline.ShmChannel.__new__(dsline.ShmChannel)
    first = (1 << 44) - 20
    channel._begin(name, {"capacity": 3, "slot_size": 64, "first_position": first}, 1, "block", 0, "shm")
    with channel:
        sequences = []
        for number in range(60):
            channel.send(b"%d" % number)
            sequence, view = channel.recv_with_seq()
            assert bytes(view) == b"%d" % number
            sequences.append(sequence)
            del view
    assert sequences[0] == first
    steps = {after - before for before, after in itertools.pairwise(sequences)}
    assert steps <= {1, 2}, "positions go up by one, or skip the reserved value"
    assert sequences[-1] > 1 << 44


def test_two_handles_of_one_name_share_the_channel(name):
    with dsline.ShmChannel(name, capacity=4, slot_size=64) as one, dsline.ShmChannel(name) as two:
        one.send(b"from one")
        two.send(b"from two")
        assert two.recv_bytes(timeout=0) == b"from one"
        assert one.recv_bytes(timeout=0) == b"from two"
        assert one.stats().participants == 2
        assert (one.stats().sent, two.stats().sent) == (1, 1)


# --- timeouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.05, np.float32(0.05), 1e-9])
def test_a_timeout_waits_so_long_and_says_so(make_any, timeout):
    channel = make_any(capacity=1, slot_size=64)
    start = time.monotonic()
    with pytest.raises(dsline.BufferEmptyError, match=r"within .* s"):
        channel.recv(timeout=timeout)
    assert time.monotonic() - start >= timeout
    channel.send(b"x")
    start = time.monotonic()
    with pytest.raises(dsline.BufferFullError, match="capacity"):
        channel.send(b"y", timeout=timeout)
    assert time.monotonic() - start >= timeout


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (-1, ValueError),
        (-0.001, ValueError),
        (float("nan"), ValueError),
        ("1", TypeError),
        ([], TypeError),
        (float("-inf"), ValueError),
    ],
)
def test_a_wrong_timeout_is_refused(make_channel, timeout, error):
    with pytest.raises(error, match="timeout"):
        dsline.ShmChannel(timeout=timeout)
    channel = make_channel(capacity=1, slot_size=64)
    with pytest.raises(error, match="timeout"):
        channel.recv(timeout=timeout)
    channel.send(b"x")
    with pytest.raises(error, match="timeout"):
        channel.send(b"y", timeout=timeout)
    with pytest.raises(error, match="timeout"):
        channel.send_many([b"y"], timeout=timeout)
    assert len(channel) == 1


@pytest.mark.parametrize("forever", [None, float("inf"), 1e300])
def test_waiting_for_ever_ends_when_a_message_comes(make_channel, forever):
    channel = make_channel(capacity=1, slot_size=64)
    receiver = Thread(channel.recv_bytes, timeout=forever)
    wait_until(lambda: channel.stats().recv_waits > 1)
    channel.send(b"x")
    assert receiver.result() == b"x"


def test_the_handles_timeout_is_the_default_of_its_calls(make_channel):
    channel = make_channel(capacity=1, slot_size=64, timeout=0)
    assert channel.timeout == 0
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv()
    channel.send(b"x")
    with pytest.raises(dsline.BufferFullError):
        channel.send(b"y")


# --- backpressure -----------------------------------------------------------------------------------------------


def test_block_waits_for_room(make_any):
    channel = make_any(capacity=2, slot_size=64)
    fill(channel)
    sender = Thread(channel.send, b"later", timeout=None)
    wait_until(lambda: channel.stats().send_waits > 0)
    assert channel.recv_bytes(timeout=0) == b"0"
    assert sender.result() is True
    assert [channel.recv_bytes(timeout=0) for _ in range(2)] == [b"1", b"later"]


def test_block_waits_for_a_view_to_be_dropped(make_any):
    channel = make_any(capacity=1, slot_size=64, max_pinned="unlimited")
    channel.send(b"held")
    view = channel.recv(timeout=0)
    sender = Thread(channel.send, b"later", timeout=None)
    wait_until(lambda: channel.stats().send_waits > 0)
    del view
    assert sender.result() is True
    assert channel.recv_bytes(timeout=0) == b"later"


def test_raise_does_not_wait(make_any):
    channel = make_any(capacity=2, slot_size=64, backpressure="raise")
    fill(channel)
    with pytest.raises(dsline.BufferFullError, match="capacity of 2"):
        channel.send(b"x", timeout=None)
    assert len(channel) == 2
    assert channel.stats().send_waits == 0


def test_drop_newest_discards_what_is_sent(make_any):
    channel = make_any(capacity=2, slot_size=64, backpressure="drop_newest")
    fill(channel)
    assert channel.send(b"x", timeout=None) is False
    assert channel.send(np.arange(4)[::2]) is False
    assert (channel.stats().dropped_newest, channel.stats().sent) == (2, 2)
    assert [channel.recv_bytes(timeout=0) for _ in range(2)] == [b"0", b"1"]
    assert channel.send(b"y") is True
    sequence, view = channel.recv_with_seq(timeout=0)
    assert (sequence, bytes(view)) == (2, b"y"), "a message that never entered is no gap"


def test_drop_oldest_discards_what_waits_longest(make_any):
    channel = make_any(capacity=3, slot_size=64, backpressure="drop_oldest")
    for number in range(10):
        assert channel.send(b"%d" % number, timeout=None) is True
    assert channel.stats().dropped_oldest == 7
    got = []
    for _ in range(3):
        sequence, view = channel.recv_with_seq(timeout=0)
        got.append((sequence, bytes(view)))
        del view
    assert got == [(7, b"7"), (8, b"8"), (9, b"9")]


def test_drop_oldest_never_touches_what_a_view_holds(make_any):
    channel = make_any(capacity=2, slot_size=64, backpressure="drop_oldest", max_pinned="unlimited")
    fill(channel)
    views = [channel.recv(timeout=0), channel.recv(timeout=0)]
    assert channel.send(b"x", timeout=None) is False, "everything is held, so the newest goes"
    assert (channel.stats().dropped_newest, channel.stats().dropped_oldest) == (1, 0)
    assert [bytes(view) for view in views] == [b"0", b"1"]


def test_backpressure_belongs_to_the_handle(name):
    with (
        dsline.ShmChannel(name, capacity=1, slot_size=64, backpressure=dsline.Backpressure.RAISE) as strict,
        dsline.ShmChannel.open(name, backpressure="drop_newest") as loose,
    ):
        assert (strict.backpressure, loose.backpressure) == (
            dsline.Backpressure.RAISE,
            dsline.Backpressure.DROP_NEWEST,
        )
        assert loose.send(b"1")
        assert loose.send(b"2") is False
        with pytest.raises(dsline.BufferFullError):
            strict.send(b"3")
        loose.recv_bytes(timeout=0)


def test_a_full_channel_names_the_views_that_hold_it(make_any):
    channel = make_any(capacity=4, slot_size=64)
    fill(channel)
    views = [channel.recv(timeout=0) for _ in range(3)]
    with pytest.raises(dsline.BufferFullError) as caught:
        channel.send(b"x", timeout=0)
    text = str(caught.value)
    assert "capacity of 4" in text
    assert "3 are held" in text
    assert "3 by views of this handle" in text
    assert "copy=True" in text
    stats = channel.stats()
    assert (stats.pinned_views, stats.pinned_slots, stats.depth) == (3, 3, 1)
    del views


# --- several at a time ------------------------------------------------------------------------------------------


def test_send_many_and_recv_many_keep_the_order(make_any):
    channel = make_any(capacity=8, slot_size=64)
    assert channel.send_many(b"%d" % number for number in range(6)) == 6
    first = channel.recv_many(4, timeout=0)
    assert [bytes(view) for view in first] == [b"0", b"1", b"2", b"3"]
    rest = channel.recv_many(100, timeout=0)
    assert [bytes(view) for view in rest] == [b"4", b"5"]


def test_send_many_of_nothing_sends_nothing(make_channel):
    channel = make_channel(capacity=1, slot_size=64)
    assert channel.send_many([]) == 0
    assert channel.send_many(iter(())) == 0
    assert len(channel) == 0


def test_send_many_says_how_many_entered(make_channel):
    channel = make_channel(capacity=3, slot_size=64)
    assert channel.send_many([b"0", b"1", b"2", b"3", b"4"], timeout=0) == 3
    with pytest.raises(dsline.BufferFullError):
        channel.send_many([b"5"], timeout=0)
    dropping = dsline.ShmChannel.open(channel.name, backpressure="drop_newest")
    assert dropping.send_many([b"6", b"7"]) == 0
    assert channel.recv_bytes(timeout=0) == b"0"
    assert dropping.send_many([b"8", b"9"]) == 1
    dropping.close()
    assert [channel.recv_bytes(timeout=0) for _ in range(3)] == [b"1", b"2", b"8"]


def test_send_many_takes_arrays_and_stops_at_what_it_cannot_send(make_channel):
    channel = make_channel(capacity=4, slot_size=64)
    with pytest.raises(TypeError, match="str"):
        channel.send_many([np.arange(3), b"x", "no", b"never"])
    assert len(channel) == 2


def test_recv_many_waits_for_the_first_only(make_channel):
    channel = make_channel(capacity=4, slot_size=64)
    receiver = Thread(lambda: [bytes(view) for view in channel.recv_many(4, timeout=None)])
    wait_until(lambda: channel.stats().recv_waits > 0)
    channel.send(b"0")
    assert receiver.result() == [b"0"]
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv_many(4, timeout=0)


@pytest.mark.parametrize("count", [0, -1])
def test_recv_many_refuses_to_receive_nothing(make_channel, count):
    channel = make_channel(capacity=4, slot_size=64)
    channel.send(b"kept")
    with pytest.raises(ValueError, match=str(count)):
        channel.recv_many(count)
    assert len(channel) == 1


def test_iteration_ends_when_the_channel_is_shut_down_and_drained(make_any):
    channel = make_any(capacity=4, slot_size=64)
    receiver = Thread(lambda: [bytes(view) for view in channel])
    sent = [b"%d" % number for number in range(20)]
    assert channel.send_many(sent, timeout=TIMEOUT) == len(sent)
    channel.shutdown()
    assert receiver.result() == sent


# --- what a channel says about itself ---------------------------------------------------------------------------


def test_len_empty_full_and_stats_agree(make_any):
    channel = make_any(capacity=3, slot_size=64)

    def state():
        stats = channel.stats()
        assert stats.depth == len(channel)
        assert channel.empty == (len(channel) == 0)
        assert channel.full == (stats.free_slots == 0)
        assert stats.capacity == channel.capacity == 3
        assert stats.depth + stats.pinned_slots + stats.free_slots == 3
        assert stats.next_sequence - stats.head_sequence == stats.depth
        return stats.depth, stats.pinned_slots, stats.free_slots

    assert state() == (0, 0, 3)
    channel.send(b"0")
    assert state() == (1, 0, 2)
    channel.send(b"1")
    channel.send(b"2")
    assert state() == (3, 0, 0)
    view = channel.recv(timeout=0)
    assert state() == (2, 1, 0)
    del view
    assert state() == (2, 0, 1)
    channel.recv_bytes(timeout=0)
    channel.recv_bytes(timeout=0)
    assert state() == (0, 0, 3)


def test_stats_count_messages_bytes_and_memory(make_any):
    channel = make_any(capacity=3, slot_size=64)
    before = channel.stats().reserved_bytes
    channel.send(b"12345")
    channel.send(np.zeros(3, np.int16))
    channel.recv_bytes(timeout=0)
    stats = channel.stats()
    assert (stats.sent, stats.bytes_sent, stats.received, stats.bytes_received) == (2, 11, 1, 5)
    assert (stats.dropped_newest, stats.dropped_oldest, stats.corrupted, stats.redelivered) == (0, 0, 0, 0)
    assert stats.participants == 1
    channel.send(bytes(500_000))
    assert channel.stats().reserved_bytes >= before + 400_000
    assert channel.stats().asdict()["bytes_sent"] == 500_011
    assert set(stats.asdict()) >= {"depth", "send_waits", "recv_waits", "pinned_views", "pinned_slots"}


def test_properties(name, segment):
    with dsline.ShmChannel(
        name, capacity=5, slot_size=100, max_message_size=1000, checksum="full"
    ) as channel:
        assert channel.name == name
        assert channel.path == str(segment(name))
        assert (channel.capacity, channel.slot_size, channel.max_message_size) == (5, 100, 1000)
        assert channel.storage == "shm"
        assert channel.backpressure is dsline.Backpressure.BLOCK
        assert channel.checksum is dsline.Checksum.FULL
        assert channel.timeout is None
        assert channel.closed is False
        assert name in repr(channel)
    assert channel.closed is True
    assert "closed" in repr(channel)


def test_defaults():
    with dsline.ShmChannel() as channel:
        assert (channel.capacity, channel.slot_size) == (64, 65536)
        assert channel.max_message_size == 1 << 30
        assert channel.name is None
        assert channel.checksum is dsline.Checksum.HEADER


def test_the_segment_is_its_users_alone_unless_a_mode_says_otherwise(segment):
    for mode in (0o600, 0o660, 0o666):
        name = unique_name()
        with dsline.ShmChannel(name, capacity=1, slot_size=64, mode=mode):
            assert segment(name).stat().st_mode & 0o777 == mode


def test_many_handles_up_to_the_limit(name):
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(dsline.ShmChannel(name, capacity=1, slot_size=64, max_handles=3))
        others = [stack.enter_context(dsline.ShmChannel.open(name)) for _ in range(2)]
        assert first.stats().participants == 3
        with pytest.raises(dsline.TooManyHandlesError, match=r"3 open handles.*max_handles=3"):
            dsline.ShmChannel.open(name)
        others[0].close()
        again = stack.enter_context(dsline.ShmChannel.open(name))
        again.send(b"works")
        assert first.recv_bytes(timeout=0) == b"works"


# --- ending -----------------------------------------------------------------------------------------------------

CALLS = {
    "send": lambda channel: channel.send(b"x", timeout=0),
    "send array": lambda channel: channel.send(np.arange(6)[::2], timeout=0),
    "send_nowait": lambda channel: channel.send_nowait(b"x"),
    "send_many": lambda channel: channel.send_many([b"x"], timeout=0),
    "recv": lambda channel: channel.recv(timeout=0),
    "recv_nowait": lambda channel: channel.recv_nowait(),
    "recv_array": lambda channel: channel.recv_array(timeout=0),
    "recv_bytes": lambda channel: channel.recv_bytes(timeout=0),
    "recv_into": lambda channel: channel.recv_into(bytearray(8), timeout=0),
    "recv_with_seq": lambda channel: channel.recv_with_seq(timeout=0),
    "recv_message": lambda channel: channel.recv_message(timeout=0),
    "recv_many": lambda channel: channel.recv_many(1, timeout=0),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_closed_handle_refuses(make_any, call):
    channel = make_any(capacity=2, slot_size=64)
    channel.send(b"queued")
    channel.close()
    channel.close()
    assert channel.closed
    with pytest.raises(dsline.ChannelClosedError, match="closed"):
        CALLS[call](channel)


def test_closing_one_handle_leaves_the_others(name):
    one, two = dsline.ShmChannel(name, capacity=2, slot_size=64), dsline.ShmChannel(name)
    one.send(b"stays")
    one.close()
    assert not two.closed
    assert two.stats().participants == 1
    assert two.recv_bytes(timeout=0) == b"stays"
    two.close()


@pytest.mark.parametrize("ending", ["close", "shutdown", "immediate"])
def test_ending_wakes_who_waits(make_any, ending):
    channel, full = make_any(capacity=1, slot_size=64), make_any(capacity=1, slot_size=64)
    full.send(b"x")
    receivers = [Thread(channel.recv, timeout=None) for _ in range(3)]
    sender = Thread(full.send, b"y", timeout=None)
    wait_until(lambda: channel.stats().recv_waits >= 3 and full.stats().send_waits >= 1)
    for ended in (channel, full):
        if ending == "close":
            ended.close()
        else:
            ended.shutdown(immediate=ending == "immediate")
    for thread in (*receivers, sender):
        with pytest.raises(dsline.ChannelClosedError):
            thread.result()


def test_shutdown_drains(make_any):
    channel = make_any(capacity=3, slot_size=64)
    fill(channel)
    channel.shutdown()
    assert channel.closed
    for call in ("send", "send array", "send_nowait", "send_many"):
        with pytest.raises(dsline.ChannelClosedError, match="shut down"):
            CALLS[call](channel)
    assert len(channel) == 3
    assert [channel.recv_bytes(timeout=0) for _ in range(3)] == [b"0", b"1", b"2"]
    for call in CALLS:
        with pytest.raises(dsline.ChannelClosedError, match="shut down"):
            CALLS[call](channel)


def test_shutdown_at_once_discards(make_any):
    channel = make_any(capacity=3, slot_size=64)
    fill(channel)
    view = channel.recv(timeout=0)
    channel.shutdown(immediate=True)
    for call in CALLS:
        with pytest.raises(dsline.ChannelClosedError, match="shut down"):
            CALLS[call](channel)
    assert len(channel) == 0
    assert bytes(view) == b"0"
    del view
    assert channel.stats().free_slots == 3


def test_shutdown_reaches_all_handles_and_all_consumers(name):
    with contextlib.ExitStack() as stack:
        # More slots than consumers: the variable of each loop holds a view while it waits for the next.
        handles = [stack.enter_context(dsline.ShmChannel(name, capacity=8, slot_size=64)) for _ in range(4)]
        consumers = [Thread(lambda handle=handle: [bytes(view) for view in handle]) for handle in handles]
        sent = [b"%d" % number for number in range(50)]
        assert handles[0].send_many(sent, timeout=TIMEOUT) == len(sent)
        handles[3].shutdown()
        got = [message for consumer in consumers for message in consumer.result()]
        assert sorted(got) == sorted(sent)
        assert all(handle.closed for handle in handles)


def test_a_message_held_at_shutdown_counts_as_delivered(make_any):
    channel = make_any(capacity=2, slot_size=64)
    channel.send(b"held")
    message = channel.recv_message(timeout=0)
    channel.shutdown()
    with pytest.raises(dsline.ChannelClosedError):
        channel.recv(timeout=0)
    assert bytes(message.payload) == b"held"


def test_a_context_manager_closes(name):
    with dsline.ShmChannel(name, capacity=1, slot_size=64) as channel:
        assert not channel.closed
    assert channel.closed
    with pytest.raises(ZeroDivisionError), dsline.ShmChannel(name, capacity=1, slot_size=64) as channel:
        1 / 0  # noqa: B018
    assert channel.closed
    assert name not in list_names()


# --- names ------------------------------------------------------------------------------------------------------


def test_the_last_close_removes_an_empty_channels_name(name):
    one, two = dsline.ShmChannel(name, capacity=2, slot_size=64), dsline.ShmChannel(name)
    one.send(b"x")
    one.recv_bytes()
    one.close()
    assert name in list_names()
    two.close()
    assert name not in list_names()


def test_what_is_queued_stays_after_the_last_close(name):
    with dsline.ShmChannel(name, capacity=2, slot_size=64) as channel:
        channel.send(np.arange(5), meta={"kept": True})
        channel.send(b"second")
    assert name in list_names()
    with dsline.ShmChannel(name) as channel:
        assert (channel.capacity, channel.slot_size, len(channel)) == (2, 64, 2)
        with channel.recv_message(timeout=0) as message:
            assert message.meta == {"kept": True}
            assert message.redelivered is False
            np.testing.assert_array_equal(message.array(), np.arange(5))
        sequence, view = channel.recv_with_seq(timeout=0)
        assert (sequence, bytes(view)) == (1, b"second")
        del view
    assert name not in list_names()


def test_the_last_close_removes_the_name_of_a_channel_that_is_shut_down(name):
    with dsline.ShmChannel(name, capacity=2, slot_size=64) as channel:
        channel.send(b"never received")
        channel.shutdown()
    assert name not in list_names()


def test_open_does_both_create_and_open_do_one(name):
    with pytest.raises(dsline.ChannelNotFoundError, match=name) as missing:
        dsline.ShmChannel.open(name)
    assert isinstance(missing.value, FileNotFoundError)
    with dsline.ShmChannel.create(name, capacity=2, slot_size=64) as channel:
        with pytest.raises(dsline.ChannelExistsError, match=name) as existing:
            dsline.ShmChannel.create(name)
        assert isinstance(existing.value, FileExistsError)
        with dsline.ShmChannel.open(name) as other, dsline.ShmChannel(name) as third:
            other.send(b"1")
            third.send(b"2")
            assert len(channel) == 2
            assert (other.capacity, other.slot_size) == (2, 64)
            third.recv_many(2)
    with pytest.raises(dsline.ChannelNotFoundError):
        dsline.ShmChannel.open(name)


GEOMETRY = {"capacity": 4, "slot_size": 128, "max_message_size": 4096, "max_handles": 8, "checksum": "header"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("capacity", 5),
        ("slot_size", 127),
        ("max_message_size", 4097),
        ("max_handles", 9),
        ("checksum", "full"),
    ],
)
def test_another_geometry_is_refused_and_named(name, option, value):
    with dsline.ShmChannel(name, **GEOMETRY) as channel:
        with pytest.raises(dsline.ChannelMismatchError) as caught:
            dsline.ShmChannel(name, **{option: value})
        assert f"{option}={value}" in str(caught.value)
        assert str(GEOMETRY[option]) in str(caught.value)
        assert name in str(caught.value)
        with dsline.ShmChannel(name, **GEOMETRY) as same:
            same.send(b"x")
            assert channel.recv_bytes(timeout=0) == b"x"


def test_all_differences_are_named(name):
    with dsline.ShmChannel(name, **GEOMETRY), pytest.raises(dsline.ChannelMismatchError) as caught:
        dsline.ShmChannel(name, capacity=40, slot_size=1280)
    assert "capacity=40" in str(caught.value)
    assert "slot_size=1280" in str(caught.value)


def leave(name, *messages, **options):
    with dsline.ShmChannel(name, capacity=4, slot_size=64, **options) as channel:
        channel.send_many(messages)


@pytest.mark.parametrize("way", [dsline.ShmChannel, dsline.ShmChannel.open, dsline.ShmChannel.create])
def test_a_stale_name_keeps_its_messages_by_default(name, way):
    leave(name, b"0", b"1")
    with way(name) as channel:
        assert [channel.recv_bytes(timeout=0) for _ in range(2)] == [b"0", b"1"]
        channel.send(b"2")
        assert channel.recv_bytes(timeout=0) == b"2"


def test_a_stale_name_with_messages_keeps_its_geometry(name):
    leave(name, b"0")
    with pytest.raises(dsline.ChannelMismatchError, match="capacity=5"):
        dsline.ShmChannel(name, capacity=5)
    with dsline.ShmChannel(name) as channel:
        assert channel.recv_bytes(timeout=0) == b"0"


@pytest.mark.parametrize("way", [dsline.ShmChannel, dsline.ShmChannel.create])
def test_reset_drops_what_is_stale(name, way):
    leave(name, b"0", b"1")
    with way(name, on_stale="reset", capacity=7) as channel:
        assert (len(channel), channel.capacity) == (0, 7)
        channel.send(b"new")
        sequence, view = channel.recv_with_seq(timeout=0)
        assert (sequence, bytes(view)) == (0, b"new")
        del view


def test_reset_leaves_a_live_channel_alone(name):
    with dsline.ShmChannel(name, capacity=2, slot_size=64) as channel:
        channel.send(b"kept")
        with dsline.ShmChannel(name, on_stale=dsline.OnStale.RESET) as other:
            assert other.recv_bytes(timeout=0) == b"kept"


def test_raise_refuses_what_is_stale_and_keeps_it(name):
    leave(name, b"0")
    with pytest.raises(dsline.ChannelExistsError, match="on_stale"):
        dsline.ShmChannel(name, on_stale="raise")
    with dsline.ShmChannel(name) as channel:
        assert channel.recv_bytes(timeout=0) == b"0"


def test_unlink_removes_the_name_and_nothing_else(name):
    with dsline.ShmChannel(name, capacity=2, slot_size=64) as old:
        old.send(b"old")
        old.unlink()
        assert name not in list_names()
        with dsline.ShmChannel(name, capacity=3, slot_size=64) as new:
            assert (len(new), new.capacity) == (0, 3)
            new.send(b"new")
            old.unlink()
            assert name in list_names(), "the name is another channel's now"
            assert old.recv_bytes(timeout=0) == b"old"
            old.send(b"goes on")
            assert old.recv_bytes(timeout=0) == b"goes on"
            assert new.recv_bytes(timeout=0) == b"new"


def test_an_anonymous_channel_has_no_name_to_unlink():
    for storage in ("memfd", "heap"):
        with dsline.ShmChannel(storage=storage, capacity=1, slot_size=64) as channel:
            assert (channel.name, channel.path) == (None, None)
            with pytest.raises(ValueError, match="no name"):
                channel.unlink()


def test_anonymous_channels_leave_nothing_behind():
    before = set(list_names())
    channel = dsline.ShmChannel(capacity=2, slot_size=64)
    channel.send(b"gone with the last handle")
    assert {name for name in set(list_names()) - before if f"-{os.getpid()}-" in name} == set()
    channel.close()


def test_names_are_removed_by_garbage_collection_too(name):
    channel = dsline.ShmChannel(name, capacity=1, slot_size=64)
    assert channel.stats().participants == 1
    del channel
    assert name not in list_names()


def test_many_channels_open_at_once(tmp_path):
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(dsline.ShmChannel(capacity=1, slot_size=64)) for _ in range(50)]
        for number, channel in enumerate(channels):
            channel.send(b"%d" % number)
        assert [channel.recv_bytes(timeout=0) for channel in channels] == [
            b"%d" % number for number in range(50)
        ]
