"""Views that are kept do not stop the stream: past a budget receiving gives copies."""

import inspect
import pickle
import random
import warnings

import numpy as np
import pytest

import dsline

QUIET = "ignore::dsline.PinnedViewsWarning"


def by_recv(channel):
    return np.asarray(channel.recv(timeout=0))


def by_recv_nowait(channel):
    return np.asarray(channel.recv_nowait())


def by_array(channel):
    return channel.recv_array(timeout=0)


def by_sequence(channel):
    return np.asarray(channel.recv_with_seq(timeout=0)[1])


def by_message(channel):
    with channel.recv_message(timeout=0) as message:
        return message.array()


def by_payload(channel):
    with channel.recv_message(timeout=0) as message:
        return np.asarray(message.payload)


def by_many(channel):
    (view,) = channel.recv_many(3, timeout=0)
    return np.asarray(view)


def by_iteration(channel):
    return np.asarray(next(channel))


def by_object(channel):
    return channel.recv_object(timeout=0)


def by_message_object(channel):
    with channel.recv_message(timeout=0) as message:
        return message.object()


WAYS = [
    by_recv,
    by_recv_nowait,
    by_array,
    by_sequence,
    by_message,
    by_payload,
    by_many,
    by_iteration,
    by_object,
    by_message_object,
]
ways = pytest.mark.parametrize("receive", WAYS)


def numbered(number, words=40):
    return np.arange(number, number + words, dtype=np.int64)


def all_whole(kept, words=40):
    return all((array == numbered(i, words)).all() for i, array in enumerate(kept))


# --- the stream goes on ---------------------------------------------------------------------------------------------


@ways
def test_a_reader_that_keeps_a_thousand_arrays(make_any, receive):
    channel = make_any(capacity=4, slot_size=512, timeout=0)
    kept = []
    with pytest.warns(dsline.PinnedViewsWarning) as caught:
        for number in range(1000):
            assert channel.send(numbered(number))
            kept.append(receive(channel))
    assert len(caught) == 1, "one warning per handle"
    assert len(kept) == 1000
    assert all_whole(kept)
    stats = channel.stats()
    assert stats.pinned_views == 3
    assert stats.forced_copies == 997
    assert stats.free_slots == 1
    assert not any(array.flags.writeable for array in kept)
    del kept[0]
    assert channel.stats().free_slots == 2
    channel.send(numbered(1))
    kept.append(receive(channel))
    assert channel.stats().forced_copies == 997, "where there is room again, nothing is copied"


@pytest.mark.parametrize("words", [1, 1000, 100_000])
def test_messages_of_every_size(make_any, words):
    channel = make_any(capacity=2, slot_size=512, max_message_size=1 << 20, max_pinned=1, timeout=0)
    with pytest.warns(dsline.PinnedViewsWarning):
        kept = [channel.send(numbered(i, words)) and channel.recv_array() for i in range(5)]
    assert all_whole(kept, words)
    assert channel.stats().forced_copies == 4


@pytest.mark.filterwarnings(QUIET)
@ways
@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5])
def test_several_receivers_of_several_groups_keep_everything(make_broadcast, receive, capacity):
    """Each within its own budget, they could fill the channel together."""
    channel = make_broadcast(capacity=capacity, slot_size=512, timeout=0)
    groups = [[channel.subscribe(name) for _ in range(3)] for name in ("a", "b")]
    kept = {"a": [], "b": []}
    for number in range(200):
        assert channel.send(numbered(number))
        for members in groups:
            kept[members[0].group].append(receive(members[number % 3]))
    assert all_whole(kept["a"])
    assert all_whole(kept["b"])
    kept.clear()
    assert channel.stats().free_slots == capacity
    for members in groups:
        for member in members:
            member.close()


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("seed", range(20))
def test_a_sender_finds_room_whenever_everything_was_received(seed):
    """Whoever keeps, drops, gives back or lags: with nothing queued in any group there is a slot."""
    chance = random.Random(seed)
    capacity = chance.randint(1, 9)
    history = chance.choice([0, 0, min(1, capacity - 1), capacity - 1])
    with dsline.Broadcast(
        storage="heap", capacity=capacity, slot_size=512, timeout=0, history=history, max_deliveries=15
    ) as channel:
        members = [channel.subscribe(chance.choice("ab")) for _ in range(chance.randint(1, 5))]
        kept = []
        one_at_a_time = [receive for receive in WAYS if receive is not by_many]

        def receive(member):
            if chance.random() < 0.2:
                with pytest.raises(LookupError), member.recv_message() as message:
                    raise LookupError(message.sequence)
            array = chance.choice(one_at_a_time)(member)
            if chance.random() < 0.8:
                kept.append((array, int(array[0])))

        sent = 0
        for _ in range(300):
            for _ in range(chance.randint(1, capacity)):
                try:
                    sent += channel.send(numbered(sent))
                except dsline.BufferFullError:
                    assert any(len(member) for member in members), "the channel is full of what is kept"
            chance.shuffle(members)
            for member in members:
                while len(member) and chance.random() < 0.8:
                    receive(member)
            while kept and chance.random() < 0.3:
                kept.pop(chance.randrange(len(kept)))
        for member in members:
            while len(member):
                receive(member)
        assert channel.send(numbered(sent))
        assert sent > 100
        assert all((array == numbered(first)).all() for array, first in kept)
        kept.clear()
        for member in members:
            member.close()


def test_the_last_slot_is_given_up_without_a_warning(make_channel):
    """By a reader that holds nothing itself."""
    channel = make_channel(capacity=1, slot_size=64)
    for number in range(3):
        channel.send(b"%d" % number)
        view = channel.recv()
        assert bytes(view) == b"%d" % number
        assert channel.stats().free_slots == 1
    assert channel.stats().forced_copies == 3


@pytest.mark.parametrize("history", [0, 3])
@ways
def test_nothing_is_copied_while_views_are_dropped(make_any, receive, history):
    channel = make_any(capacity=4, slot_size=512, timeout=0, history=history)
    for number in range(50):
        channel.send(numbered(number))
        assert (receive(channel) == numbered(number)).all()
    assert channel.stats().forced_copies == 0


def test_a_full_queue_is_no_reason_to_copy(make_channel):
    channel = make_channel(capacity=8, slot_size=64, timeout=0)
    for _ in range(5):
        for number in range(8):
            channel.send(b"%d" % number)
        for _ in range(6):
            view = channel.recv()
            del view
        first, second = channel.recv(), None
        del first
        assert channel.stats().forced_copies == 0
        second = channel.recv()
        del second
    assert channel.stats().forced_copies == 0


# --- copies are like views ------------------------------------------------------------------------------------------

ARRAYS = {
    "C": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "F": np.asfortranarray(np.arange(24, dtype=np.int16).reshape(4, 6)),
    "no dimension": np.array(7),
    "empty": np.zeros((0, 5), np.uint8),
    "date": np.array(["2026-11-27"], "datetime64[D]"),
    "structured": np.array([(1, 2.5)], [("a", "<i4"), ("b", "<f8")]),
    "long": np.arange(100_000, dtype=np.uint8),
    "long double": np.ones(3, np.clongdouble),
}


@pytest.mark.parametrize("what", ARRAYS)
@pytest.mark.parametrize("receive", [by_recv, by_array, by_message, by_payload, by_object])
def test_a_copy_cannot_be_told_from_a_view(what, receive):
    with (
        dsline.ShmChannel(capacity=4, max_pinned="unlimited") as viewing,
        dsline.ShmChannel(capacity=4, max_pinned=0) as copying,
    ):
        for channel in (viewing, copying):
            channel.send(ARRAYS[what])
        view, copy = receive(viewing), receive(copying)
        assert copying.stats().forced_copies == 1
        assert (copy.dtype, copy.shape, copy.strides) == (view.dtype, view.shape, view.strides)
        assert copy.tobytes() == view.tobytes()
        assert copy.ctypes.data % 64 == view.ctypes.data % 64 or copy.size == 0
        flags = ("C_CONTIGUOUS", "F_CONTIGUOUS", "OWNDATA", "WRITEABLE", "ALIGNED")
        assert [copy.flags[flag] for flag in flags] == [view.flags[flag] for flag in flags]
        with pytest.raises(ValueError, match="WRITEABLE"):
            copy.flags.writeable = True


@pytest.mark.parametrize("what", ARRAYS)
def test_memoryviews_have_the_same_format(what):
    with (
        dsline.ShmChannel(capacity=4, max_pinned="unlimited") as viewing,
        dsline.ShmChannel(capacity=4, max_pinned=0) as copying,
    ):
        viewing.send(ARRAYS[what])
        copying.send(ARRAYS[what])
        view, copy = viewing.recv(), copying.recv()
        for name in ("format", "shape", "strides", "ndim", "itemsize", "nbytes", "readonly", "c_contiguous"):
            assert getattr(copy, name) == getattr(view, name), name
        assert copy.tobytes() == view.tobytes()


# --- the budget -----------------------------------------------------------------------------------------------------


def test_zero_always_copies_and_never_warns(make_any):
    channel = make_any(capacity=4, slot_size=512, max_pinned=0)
    kept = []
    for number in range(20):
        channel.send(numbered(number))
        kept.append(channel.recv_array())
        assert channel.stats().free_slots == 4
    assert all_whole(kept)
    assert (channel.stats().forced_copies, channel.stats().pinned_views) == (20, 0)


def test_a_number_is_taken_as_it_is(make_any):
    channel = make_any(capacity=4, slot_size=64, max_pinned=2)
    with pytest.warns(dsline.PinnedViewsWarning, match="as many as max_pinned=2 allows: "):
        kept = [channel.send(b"%d" % number) and channel.recv() for number in range(5)]
    assert [bytes(view) for view in kept] == [b"0", b"1", b"2", b"3", b"4"]
    assert channel.stats().free_slots == 2


@pytest.mark.parametrize("most", [4, 1000, "unlimited"])
def test_without_a_limit_the_error_names_the_views(make_any, most):
    channel = make_any(capacity=4, slot_size=64, max_pinned=most, timeout=0)
    kept = [channel.send(b"%d" % number) and channel.recv() for number in range(4)]
    with pytest.raises(dsline.BufferFullError, match=r"\(4 by views of this handle\)"):
        channel.send(b"4")
    assert channel.stats().forced_copies == 0
    del kept


def test_messages_are_not_held_back(make_channel):
    """Who has a message says when he is done with it, so it keeps its slot and does not count."""
    channel = make_channel(capacity=4, slot_size=64, timeout=0)
    messages = []
    for number in range(4):
        channel.send(b"%d" % number)
        messages.append(channel.recv_message())
    with pytest.raises(dsline.BufferFullError):
        channel.send(b"4")
    assert [bytes(message.payload) for message in messages] == [b"0", b"1", b"2", b"3"]
    for message in messages:
        message.release()
    assert channel.stats().free_slots == 4
    kept = [channel.send(b"%d" % number) and channel.recv() for number in range(3)]
    assert channel.stats().forced_copies == 1, "of the last message, which nobody could have sent past"
    del kept


def test_a_message_that_is_let_go_of_leaves_its_views_to_the_budget(make_channel):
    channel = make_channel(capacity=8, slot_size=512, max_pinned=2)
    with pytest.warns(dsline.PinnedViewsWarning):
        kept = [channel.send(numbered(i)) and channel.recv_message().array() for i in range(6)]
    assert all_whole(kept)
    assert channel.stats().pinned_views == 2


# --- messages past the budget ---------------------------------------------------------------------------------------


def test_a_message_past_the_budget_can_be_given_back(make_any):
    channel = make_any(capacity=4, slot_size=512, max_pinned=0, timeout=0)
    channel.send(numbered(5))
    message = channel.recv_message()
    array = message.array()
    assert channel.stats().free_slots == 3, "it is still held"
    message.nack()
    again = channel.recv_message()
    assert (again.sequence, again.attempt) == (message.sequence, 2)
    again.release()
    assert channel.stats().free_slots == 4
    assert (array == numbered(5)).all()


def test_its_views_do_not_keep_the_slot(make_any):
    channel = make_any(capacity=1, slot_size=512, max_pinned=0, timeout=0)
    for number in range(3):
        channel.send(numbered(number))
        with channel.recv_message() as message:
            array, payload = message.array(), message.payload
        assert channel.stats().free_slots == 1
        assert (array == numbered(number)).all()
        assert payload.tobytes() == array.tobytes()
        with pytest.raises(ValueError, match="has been released"):
            message.array()
    channel.send(numbered(9))
    with pytest.raises(LookupError), channel.recv_message() as message:
        array = message.array()
        raise LookupError
    assert channel.recv_message().attempt == 2, "a view of a copy does not delay it"
    assert (array == numbered(9)).all()


# --- the warning ----------------------------------------------------------------------------------------------------


def test_it_says_who_keeps_what(name):
    with dsline.ShmChannel(name, capacity=4, slot_size=64) as channel:
        channel.send_many([b"x"] * 4)
        line = inspect.currentframe().f_lineno + 1
        kept = [channel.recv(), channel.recv(), channel.recv()]
        with pytest.warns(dsline.PinnedViewsWarning) as caught:
            kept.append(channel.recv())
        (one,) = caught
        text = str(one.message)
        assert f"3 received message(s) of channel '{name}'" in text
        assert "max_pinned=3 allows (the default for its capacity)" in text
        assert f"received at {__file__}:{line}" in text
        assert (one.filename, one.lineno) == (__file__, line + 2)


@ways
def test_as_an_error_it_loses_nothing(make_any, receive):
    channel = make_any(capacity=4, slot_size=512, max_pinned=1, timeout=0)
    channel.send(numbered(0))
    kept = [receive(channel)]
    channel.send(numbered(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(dsline.PinnedViewsWarning):
            receive(channel)
    assert (channel.stats().depth, channel.stats().received, channel.stats().pinned_views) == (1, 1, 1)
    assert channel.stats().forced_copies == 0
    channel.send(numbered(2))
    with channel.recv_message() as message:
        assert (message.sequence, message.attempt) == (1, 1)
        kept.append(message.array())
    kept.append(receive(channel))
    assert all_whole(kept)


def test_what_one_list_holds_is_no_reason(make_any):
    channel = make_any(capacity=4, slot_size=64, timeout=0)
    for _ in range(3):
        channel.send_many([b"0", b"1", b"2", b"3"])
        views = channel.recv_many(4)
        assert [bytes(view) for view in views] == [b"0", b"1", b"2", b"3"]
        assert channel.stats().free_slots == 1
        del views
    assert channel.stats().forced_copies == 3
    channel.send_many([b"0", b"1", b"2", b"3"])
    views = channel.recv_many(4)
    channel.send(b"4")
    with pytest.warns(dsline.PinnedViewsWarning):
        channel.recv_many(4)
    assert len(views) == 4


# --- how it travels -------------------------------------------------------------------------------------------------


def test_it_belongs_to_the_handle(name):
    with dsline.ShmChannel(name, capacity=4, max_pinned=3) as channel:
        assert channel.max_pinned == 3
        with dsline.ShmChannel.open(name, max_pinned="unlimited") as other, dsline.ShmChannel(name) as third:
            assert (other.max_pinned, third.max_pinned) == ("unlimited", "auto")
        with pickle.loads(pickle.dumps(channel)) as again:
            assert again.max_pinned == 3
        with channel.subscribe("g") as one, channel.subscribe("g", max_pinned=0) as two:
            assert (one.max_pinned, two.max_pinned) == (3, 0)
            with pickle.loads(pickle.dumps(two)) as again:
                assert again.max_pinned == 0
                channel.send(b"x")
                assert bytes(again.recv()) == b"x"
                assert again.stats().forced_copies == 1
        assert channel.recv_bytes() == b"x"


def test_every_kind_of_channel_takes_it(tmp_path, name):
    path = tmp_path / "a"
    with dsline.FileChannel.create(path, capacity=4, max_pinned=2) as channel:
        assert channel.max_pinned == 2
        with dsline.FileChannel.open(path, max_pinned=1) as other, pickle.loads(pickle.dumps(other)) as again:
            assert again.max_pinned == 1
    with dsline.Broadcast.create(name, max_pinned=5) as channel, channel.subscribe() as subscriber:
        assert subscriber.max_pinned == 5


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-1, dsline.InvalidArgumentError, "is -1, must be 0"),
        (1 << 21, dsline.InvalidArgumentError, "'unlimited'"),
        ("many", ValueError, "'many'"),
        (2.5, TypeError, "a float"),
        (True, TypeError, "a bool"),
        ([], TypeError, "a list"),
    ],
)
def test_bad_values(tmp_path, name, value, error, text):
    for make in (
        lambda: dsline.ShmChannel(name, max_pinned=value),
        lambda: dsline.ShmChannel.create(name, max_pinned=value),
        lambda: dsline.FileChannel.create(tmp_path / "x", max_pinned=value),
    ):
        with pytest.raises(error, match=text):
            make()
    with pytest.raises(dsline.ChannelNotFoundError):
        dsline.ShmChannel.open(name)
    assert not (tmp_path / "x").exists()
    with dsline.ShmChannel() as channel, pytest.raises(error, match=text):
        channel.subscribe("g", max_pinned=value)
