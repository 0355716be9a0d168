"""Subscriber groups: every group gets every message, members of one group share them, and nobody is held up by a group
that has gone."""

import contextlib
import pickle
import threading

import numpy as np
import pytest
from support import TIMEOUT, wait_until

import dsline
from dsline import OnDeath, Start


def receive_all(receiver):
    return [bytes(view) for view in iter_nowait(receiver)]


def iter_nowait(receiver):
    while True:
        try:
            yield receiver.recv_nowait()
        except dsline.BufferEmptyError:
            return


def all_free(channel):
    return channel.stats().free_slots == channel.capacity


# --- who gets what -----------------------------------------------------------------------------------------------


def test_every_group_gets_every_message(make_any):
    channel = make_any(capacity=8, slot_size=64)
    with channel.subscribe("a") as a, channel.subscribe("b") as b:
        sent = [b"%d" % number for number in range(5)]
        channel.send_many(sent)
        assert receive_all(a) == sent
        assert (channel.stats().free_slots, len(channel), a.lag, b.lag) == (3, 5, 0, 5)
        assert receive_all(b) == sent
        assert receive_all(channel) == sent, "the default group is one of them"
        assert all_free(channel)


def test_a_slot_is_free_when_the_last_group_is_done(make_any):
    channel = make_any(capacity=1, slot_size=64, backpressure="raise", max_pinned="unlimited")
    with channel.subscribe("a") as a:
        channel.send(b"x")
        channel.recv_bytes()
        with pytest.raises(dsline.BufferFullError):
            channel.send(b"y")
        view = a.recv()
        with pytest.raises(dsline.BufferFullError):
            channel.send(b"y")
        del view
        assert channel.send(b"y")


def test_members_of_one_group_share_its_messages(make_any):
    channel = make_any(capacity=16, slot_size=64)
    with channel.subscribe("team") as first, channel.subscribe("team") as second:
        assert channel.stats().participants == 3
        for number in range(16):
            channel.send(b"%d" % number)
        got = [
            first.recv_with_seq(timeout=0)[0] if number % 3 else second.recv_with_seq(timeout=0)[0]
            for number in range(16)
        ]
        assert got == list(range(16)), "one order, one cursor"
        assert first.lag == second.lag == 0


def test_a_subscriber_of_another_handle_joins_the_same_group(name):
    with (
        dsline.ShmChannel(name, capacity=4) as one,
        dsline.ShmChannel(name) as other,
        one.subscribe("team") as first,
        other.subscribe("team") as second,
    ):
        one.send_many([b"1", b"2"])
        assert (bytes(first.recv(timeout=0)), bytes(second.recv(timeout=0))) == (b"1", b"2")
        assert receive_all(one) == [b"1", b"2"]


def test_without_a_name_each_subscriber_is_a_group_of_its_own(make_broadcast):
    channel = make_broadcast(capacity=4)
    with channel.subscribe() as a, channel.subscribe() as b:
        assert a.group != b.group
        channel.send(b"x")
        assert receive_all(a) == receive_all(b) == [b"x"]


def test_views_of_two_groups_end_by_themselves(make_any):
    channel = make_any(capacity=2, slot_size=4096)
    with channel.subscribe("a") as a, channel.subscribe("b") as b:
        channel.send(np.arange(100).reshape(4, 25))
        one, other = a.recv_array(), b.recv_array()
        np.testing.assert_array_equal(one, np.arange(100).reshape(4, 25))
        assert not one.flags.writeable
        del one
        np.testing.assert_array_equal(other, np.arange(100).reshape(4, 25))


RECEIVING = {
    "recv": lambda s: bytes(s.recv()),
    "recv_nowait": lambda s: bytes(s.recv_nowait()),
    "recv_array": lambda s: s.recv_array().tobytes(),
    "recv_bytes": lambda s: s.recv_bytes(),
    "recv_with_seq": lambda s: bytes(s.recv_with_seq()[1]),
    "recv_message": lambda s: bytes(s.recv_message().payload),
    "recv_message_nowait": lambda s: bytes(s.recv_message_nowait().payload),
    "recv_many": lambda s: bytes(s.recv_many(3)[0]),
    "next": lambda s: bytes(next(s)),
}


@pytest.mark.parametrize("how", RECEIVING)
def test_a_subscriber_has_every_way_to_receive(make_any, how):
    channel = make_any(capacity=2, slot_size=64)
    with channel.subscribe("group", timeout=TIMEOUT) as subscriber:
        channel.send(np.arange(4, dtype=np.uint8))
        assert RECEIVING[how](subscriber) == bytes(range(4))
        assert channel.recv_bytes() == bytes(range(4))
        assert all_free(channel)
        assert subscriber.stats().received == 1


def test_recv_into_of_a_subscriber(make_any):
    channel = make_any(capacity=2, slot_size=64)
    buffer = bytearray(8)
    with channel.subscribe("group") as subscriber:
        channel.send(b"12345678")
        assert subscriber.recv_into(buffer, timeout=0) == 8
    assert buffer == b"12345678"


def test_a_subscriber_cannot_send(make_any):
    with make_any(capacity=2).subscribe("group") as subscriber:
        for name in ("send", "send_nowait", "send_many", "alloc", "publish", "subscribe"):
            assert not hasattr(subscriber, name)
    with pytest.raises(TypeError, match=r"subscribe\(\)"):
        dsline.Subscriber()


def test_a_waiting_subscriber_is_woken(make_any):
    channel = make_any(capacity=4, slot_size=64)
    got = []
    with channel.subscribe("group", timeout=TIMEOUT) as subscriber:
        thread = threading.Thread(target=lambda: got.append(subscriber.recv_bytes()))
        thread.start()
        wait_until(lambda: subscriber.stats().recv_waits)
        channel.send(b"x")
        thread.join(TIMEOUT)
    assert got == [b"x"]


def test_a_subscriber_frees_a_waiting_sender(make_broadcast):
    channel = make_broadcast(capacity=1, slot_size=64, timeout=TIMEOUT)
    with channel.subscribe("group") as subscriber:
        channel.send(b"1")
        thread = threading.Thread(target=channel.send, args=(b"2",))
        thread.start()
        wait_until(lambda: channel.stats().send_waits)
        assert subscriber.recv_bytes() == b"1"
        thread.join(TIMEOUT)
        assert subscriber.recv_bytes(timeout=0) == b"2"


def test_iteration_ends_with_the_channel(make_any):
    channel = make_any(capacity=4, slot_size=64)
    with channel.subscribe("group") as subscriber:
        channel.send_many([b"a", b"b"])
        channel.shutdown()
        assert [bytes(view) for view in subscriber] == [b"a", b"b"]
        with pytest.raises(dsline.ChannelClosedError):
            subscriber.recv()


def test_many_threads_of_two_groups(make_any):
    """Each group gets each message once, whoever of its members takes it."""
    channel = make_any(capacity=8, slot_size=64, timeout=TIMEOUT)
    groups = {"a": [], "b": []}
    with contextlib.ExitStack() as stack:
        threads = []
        for group, got in groups.items():
            for _ in range(2):
                subscriber = stack.enter_context(channel.subscribe(group))
                threads.append(threading.Thread(target=lambda s=subscriber, g=got: g.extend(map(bytes, s))))
        threads.append(threading.Thread(target=lambda: [channel.recv_bytes() for _ in range(500)]))
        for thread in threads:
            thread.start()
        for number in range(500):
            channel.send(b"%d" % number)
        channel.shutdown()
        for thread in threads:
            thread.join(TIMEOUT)
    for got in groups.values():
        assert sorted(map(int, got)) == list(range(500))


# --- joining -----------------------------------------------------------------------------------------------------


def test_start_next_gets_what_is_sent_after_it_joined(make_any):
    channel = make_any(capacity=8, slot_size=64, history=4)
    channel.send(b"before")
    with channel.subscribe("group") as subscriber:
        channel.send(b"after")
        assert receive_all(subscriber) == [b"after"]


@pytest.mark.parametrize("start", ["oldest", Start.OLDEST])
def test_start_oldest_gets_the_history(make_broadcast, start):
    channel = make_broadcast(capacity=8, slot_size=64, history=3)
    for number in range(6):
        channel.send(b"%d" % number)
    with channel.subscribe("group", start=start) as subscriber:
        assert subscriber.lag == 3
        channel.send(b"new")
        assert receive_all(subscriber) == [b"3", b"4", b"5", b"new"]
    assert channel.stats().unheard == 0, "the history heard them"


def test_start_latest_gets_the_newest(make_broadcast):
    channel = make_broadcast(capacity=8, slot_size=64, history=3)
    for number in range(6):
        channel.send(b"%d" % number)
    with channel.subscribe("group", start="latest") as subscriber:
        channel.send(b"new")
        assert receive_all(subscriber) == [b"5", b"new"]


def test_start_oldest_without_history_gets_what_others_have_not_taken(make_any):
    channel = make_any(capacity=8, slot_size=64)
    channel.send_many([b"1", b"2", b"3"])
    assert channel.recv_bytes() == b"1"
    with channel.subscribe("group", start="oldest") as subscriber:
        assert receive_all(subscriber) == [b"2", b"3"]
        assert receive_all(channel) == [b"2", b"3"]
        assert all_free(channel)


def test_start_is_of_the_group_not_of_the_member(make_broadcast):
    channel = make_broadcast(capacity=8, slot_size=64, history=3)
    channel.send_many([b"1", b"2"])
    with (
        channel.subscribe("group") as first,
        channel.subscribe("group", start="oldest") as second,
    ):
        channel.send(b"3")
        assert receive_all(second) == [b"3"]
        assert first.lag == 0


def test_history_never_stands_in_a_senders_way(make_any):
    channel = make_any(capacity=4, slot_size=64, history=3, backpressure="raise")
    with channel.subscribe("group") as subscriber:
        for number in range(40):
            assert channel.send(b"%d" % number)
            assert subscriber.recv_bytes(timeout=0) == channel.recv_bytes(timeout=0) == b"%d" % number


def test_a_group_keeps_its_place_while_it_has_members(make_broadcast):
    channel = make_broadcast(capacity=8, slot_size=64)
    with channel.subscribe("group") as first:
        channel.send_many([b"1", b"2"])
        assert first.recv_bytes() == b"1"
        with channel.subscribe("group") as second:
            first.close()
            assert receive_all(second) == [b"2"]


# --- leaving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["close", "leave", "with", "del"])
def test_a_group_goes_with_its_last_member(make_broadcast, way):
    channel = make_broadcast(capacity=4, slot_size=64, backpressure="raise")
    subscriber = channel.subscribe("group")
    for _ in range(4):
        channel.send(b"x")
    with pytest.raises(dsline.BufferFullError):
        channel.send(b"x")
    if way == "with":
        with subscriber:
            pass
    elif way == "del":
        del subscriber
    else:
        getattr(subscriber, way)()
    assert channel.send(b"nobody listens"), "what waited for the group is free"
    assert (channel.stats().unheard, all_free(channel)) == (1, True)
    with channel.subscribe("group") as again:
        assert again.lag == 0, "a new group of the same name"


def test_a_group_does_not_go_with_any_member(make_broadcast):
    channel = make_broadcast(capacity=4, slot_size=64)
    first, second = channel.subscribe("group"), channel.subscribe("group")
    channel.send(b"x")
    first.close()
    assert receive_all(second) == [b"x"]
    second.close()


def test_a_view_of_a_group_that_has_gone_stays_valid(make_broadcast):
    channel = make_broadcast(capacity=2, slot_size=64)
    subscriber = channel.subscribe("group")
    channel.send_many([b"held", b"waits"])
    view = subscriber.recv()
    subscriber.close()
    channel.send_many([b"x", b"y"])
    assert bytes(view) == b"held"
    assert channel.stats().free_slots == 1
    del view
    assert all_free(channel)


def test_a_durable_group_collects_while_it_has_no_members(make_any):
    channel = make_any(capacity=8, slot_size=64)
    with channel.subscribe("log", durable=True) as first:
        channel.send(b"1")
        assert first.durable
    channel.send(b"2")
    with channel.subscribe("log", durable=True) as second:
        assert receive_all(second) == [b"1", b"2"]
        second.leave()
    channel.send(b"3")
    assert receive_all(channel) == [b"1", b"2", b"3"]
    assert all_free(channel)


def test_leave_does_not_end_a_durable_group_of_others(make_any):
    channel = make_any(capacity=8, slot_size=64)
    with channel.subscribe("log", durable=True) as first, channel.subscribe("log", durable=True) as second:
        channel.send(b"1")
        first.leave()
        assert first.closed
        assert receive_all(second) == [b"1"]
        channel.send(b"2")
        assert receive_all(second) == [b"2"]


def test_remove_group_ends_a_durable_group(make_broadcast):
    channel = make_broadcast(capacity=4, slot_size=64)
    channel.subscribe("log", durable=True).close()
    channel.send(b"1")
    assert channel.stats().free_slots == 3
    channel.remove_group("log")
    assert all_free(channel)
    channel.send(b"2")
    assert channel.stats().unheard == 1
    with pytest.raises(dsline.ChannelNotFoundError, match="log"):
        channel.remove_group("log")


def test_group_numbers_are_used_again(make_broadcast):
    channel = make_broadcast(capacity=2, slot_size=64, max_groups=2)
    for number in range(40):
        with channel.subscribe(f"g{number}") as subscriber:
            channel.send(b"x")
            if number % 2:
                assert receive_all(subscriber) == [b"x"]
    assert all_free(channel)


def test_a_subscriber_does_not_need_the_handle_it_came_from(name):
    other = dsline.ShmChannel(name, capacity=4)
    channel = dsline.ShmChannel(name)
    subscriber = channel.subscribe("group")
    channel.close()
    del channel
    other.send(b"x")
    assert subscriber.recv_bytes(timeout=0) == b"x"
    subscriber.close()
    assert other.recv_bytes(timeout=0) == b"x"
    other.close()


def test_a_closed_subscriber_refuses(make_any):
    channel = make_any(capacity=4, slot_size=64)
    subscriber = channel.subscribe("group")
    subscriber.close()
    subscriber.close()
    assert subscriber.closed
    with pytest.raises(dsline.ChannelClosedError):
        subscriber.recv(timeout=0)
    assert channel.send(b"x")
    assert channel.recv_bytes(timeout=0) == b"x"


def test_closing_wakes_a_waiting_subscriber(make_any):
    channel = make_any(capacity=4, slot_size=64)
    subscriber = channel.subscribe("group")
    seen = []

    def wait():
        try:
            subscriber.recv(timeout=None)
        except dsline.ChannelClosedError as error:
            seen.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: subscriber.stats().recv_waits)
    subscriber.close()
    thread.join(TIMEOUT)
    assert seen == [dsline.ChannelClosedError]


# --- losing ------------------------------------------------------------------------------------------------------


def test_drop_oldest_takes_from_the_slowest_group_only(make_broadcast):
    channel = make_broadcast(capacity=4, slot_size=64, backpressure="drop_oldest")
    with channel.subscribe("fast") as fast, channel.subscribe("slow") as slow:
        for number in range(20):
            assert channel.send(b"%d" % number)
            assert fast.recv_bytes(timeout=0) == b"%d" % number
        assert (fast.lost, slow.lost, slow.lag) == (0, 16, 4)
        sequences = [slow.recv_with_seq(timeout=0)[0] for _ in range(4)]
        assert sequences == [16, 17, 18, 19], "the gap is what was lost"
        assert slow.stats().dropped_oldest == slow.stats().lost == 16
        assert channel.stats().dropped_newest == 0


def test_lost_counts_since_the_handle_joined(make_broadcast):
    channel = make_broadcast(capacity=2, slot_size=64, backpressure="drop_oldest")
    with channel.subscribe("group") as first:
        channel.send_many([b"1", b"2", b"3"])
        with channel.subscribe("group") as second:
            channel.send(b"4")
            assert (first.lost, second.lost) == (2, 1)
            assert second.stats().dropped_oldest == 2


def test_gaps_in_the_sequence_agree_with_lost(make_broadcast):
    channel = make_broadcast(capacity=4, slot_size=64, backpressure="drop_oldest")
    with channel.subscribe("group") as subscriber:
        expected, gaps = 0, 0
        for number in range(200):
            channel.send(b"x")
            if number % 7 == 0:
                sequence, _ = subscriber.recv_with_seq(timeout=0)
                gaps += sequence - expected
                expected = sequence + 1
        for _ in range(subscriber.lag):
            sequence, _ = subscriber.recv_with_seq(timeout=0)
            gaps += sequence - expected
            expected = sequence + 1
        assert gaps == subscriber.lost > 0


def test_drop_oldest_takes_nothing_that_is_held(make_broadcast):
    channel = make_broadcast(capacity=2, slot_size=64, backpressure="drop_oldest", max_pinned="unlimited")
    with channel.subscribe("group") as subscriber:
        channel.send_many([b"1", b"2"])
        views = [subscriber.recv(), subscriber.recv()]
        assert channel.send(b"3") is False
        assert [bytes(view) for view in views] == [b"1", b"2"]
        assert channel.stats().dropped_newest == 1


def test_redelivery_stays_in_the_group(make_broadcast):
    channel = make_broadcast(capacity=2, slot_size=64)
    with channel.subscribe("a") as a, channel.subscribe("b") as b:
        channel.send(b"x")
        a.recv_message().nack()
        again = a.recv_message(timeout=0)
        assert (again.attempt, again.redelivered) == (2, True)
        assert b.recv_message(timeout=0).attempt == 1
        assert (a.stats().redelivered, b.stats().redelivered) == (1, 0)


# --- limits and mistakes -----------------------------------------------------------------------------------------


def test_max_groups(name):
    with dsline.Broadcast(name, capacity=2, max_groups=2) as channel, contextlib.ExitStack() as stack:
        first = stack.enter_context(channel.subscribe("a"))
        stack.enter_context(channel.subscribe("b"))
        stack.enter_context(channel.subscribe("a"))
        with pytest.raises(dsline.TooManyGroupsError, match="max_groups"):
            channel.subscribe("c")
        assert channel.stats().participants == 4, "the handle that it made is gone"
        stack.close()
        assert first.closed
        channel.subscribe("c").close()


def test_the_default_is_seven_groups(name):
    with dsline.Broadcast(name, capacity=2) as channel, contextlib.ExitStack() as stack:
        for number in range(7):
            stack.enter_context(channel.subscribe(str(number)))
        with pytest.raises(dsline.TooManyGroupsError):
            channel.subscribe("8th")


def test_subscribers_are_handles(name):
    with (
        dsline.Broadcast(name, capacity=2, max_handles=2) as channel,
        channel.subscribe("a"),
        pytest.raises(dsline.TooManyHandlesError, match="max_handles"),
    ):
        channel.subscribe("b")


@pytest.mark.parametrize("other", [{"on_death": "drop"}, {"durable": True}])
def test_members_must_agree(make_broadcast, other):
    channel = make_broadcast(capacity=2)
    with channel.subscribe("group"), pytest.raises(dsline.ChannelMismatchError, match="group"):
        channel.subscribe("group", **other)
    channel.subscribe("group", **other).leave()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"group": ""}, dsline.InvalidArgumentError),
        ({"group": "g" * 101}, dsline.InvalidArgumentError),
        ({"group": b"bytes"}, TypeError),
        ({"group": "g", "start": "middle"}, ValueError),
        ({"group": "g", "on_death": "cry"}, ValueError),
        ({"group": "g", "durable": 1}, TypeError),
        ({"group": "g", "timeout": -1}, ValueError),
        ({"group": "g", "timeout": "soon"}, TypeError),
        ({"durable": True}, dsline.InvalidArgumentError),
    ],
)
def test_wrong_subscriptions_are_refused(make_broadcast, options, error):
    channel = make_broadcast(capacity=2)
    with pytest.raises(error):
        channel.subscribe(**options)
    assert channel.stats().participants == 1


def test_names_of_groups(make_broadcast):
    channel = make_broadcast(capacity=2)
    for group in ("g" * 100, "Größe / 1", "a b"):
        with channel.subscribe(group) as subscriber:
            assert subscriber.group == group
            found = [each.name for each in channel.inspect().groups if each.active and not each.retention]
            assert group in found


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_groups", 0),
        ("max_groups", 23),
        ("history", -1),
        ("max_deliveries", 0),
        ("max_deliveries", 16),
        ("dead_letters", -1),
    ],
)
def test_options_have_limits_that_the_error_names(option, value):
    with pytest.raises(dsline.InvalidArgumentError, match=f"{option} is {value}"):
        dsline.ShmChannel(capacity=4, **{option: value})
    with pytest.raises(TypeError, match=option):
        dsline.ShmChannel(capacity=4, **{option: "many"})


def test_history_takes_no_more_than_the_slots():
    with pytest.raises(dsline.InvalidArgumentError, match="history"):
        dsline.ShmChannel(capacity=4, history=4)


@pytest.mark.parametrize(
    ("option", "value", "other"),
    [("max_groups", 3, 4), ("history", 2, 3), ("max_deliveries", 5, 6), ("dead_letters", 1, 2)],
)
def test_options_belong_to_the_channel(name, option, value, other):
    with dsline.ShmChannel(name, capacity=4, **{option: value}) as channel:
        with dsline.ShmChannel(name) as same:
            assert same.capacity == 4
        with dsline.ShmChannel(name, **{option: value}):
            pass
        with pytest.raises(dsline.ChannelMismatchError, match=option):
            dsline.ShmChannel(name, **{option: other})
        assert {"history": channel.history, "max_deliveries": channel.max_deliveries}.get(
            option, value
        ) == value


def test_properties(make_broadcast):
    channel = make_broadcast(capacity=4, slot_size=128, timeout=1.5)
    with channel.subscribe("group", on_death="drop") as subscriber:
        assert (subscriber.group, subscriber.on_death, subscriber.durable) == ("group", OnDeath.DROP, False)
        assert (subscriber.name, subscriber.path, subscriber.storage) == (
            channel.name,
            channel.path,
            channel.storage,
        )
        assert (subscriber.capacity, subscriber.slot_size, subscriber.timeout) == (4, 128, 1.5)
        assert "'group'" in repr(subscriber)
        with channel.subscribe("group", on_death=OnDeath.DROP, timeout=None) as other:
            assert other.timeout is None
    assert "closed" in repr(subscriber)


def test_a_subscriber_pickles_by_name(name, tmp_path):
    for channel in (
        dsline.ShmChannel(name, capacity=4),
        dsline.FileChannel.create(tmp_path / "queue", capacity=4),
    ):
        with channel:
            with channel.subscribe("group", on_death="drop", timeout=2) as subscriber:
                with pickle.loads(pickle.dumps(subscriber)) as again:
                    assert (again.group, again.on_death, again.timeout) == ("group", OnDeath.DROP, 2)
                    channel.send(b"shared")
                    assert again.recv_bytes(timeout=0) == b"shared"
                    assert subscriber.lag == 0
                    assert channel.stats().participants == 3
                data = pickle.dumps(subscriber)
            channel.unlink()
        with pytest.raises(dsline.ChannelNotFoundError):
            pickle.loads(data)


@pytest.mark.parametrize("storage", ["memfd", "heap"])
def test_a_subscriber_of_an_anonymous_channel_does_not_pickle_by_itself(storage):
    with (
        dsline.ShmChannel(capacity=2, storage=storage) as channel,
        channel.subscribe("g") as subscriber,
        pytest.raises(dsline.FeatureUnavailableError),
    ):
        pickle.dumps(subscriber)


# --- files on the disk -------------------------------------------------------------------------------------------


def test_sync_data(tmp_path):
    path = tmp_path / "queue"
    with dsline.FileChannel.create(path, capacity=4, slot_size=64, sync="data", checksum="full") as channel:
        assert channel.sync is dsline.Sync.DATA
        channel.send(b"bytes")
        channel.send(np.arange(20)[::3])
        channel.send(np.zeros(100_000, np.uint8))
        with channel.subscribe("group", start="oldest") as subscriber:
            assert subscriber.recv_bytes(timeout=0) == b"bytes"
    with dsline.FileChannel.open(path) as channel:
        assert channel.sync is dsline.Sync.DATA
        assert channel.recv_bytes(timeout=0) == b"bytes"
        np.testing.assert_array_equal(channel.recv_array(timeout=0), np.arange(20)[::3])
        assert len(channel.recv_bytes(timeout=0)) == 100_000


def test_sync_is_none_unless_asked_for(tmp_path):
    with dsline.FileChannel.create(tmp_path / "queue", capacity=2) as channel:
        assert channel.sync is dsline.Sync.NONE
    with pytest.raises(ValueError, match="sync is 'all'"):
        dsline.FileChannel.create(tmp_path / "other", sync="all")
    with pytest.raises(TypeError):
        dsline.ShmChannel(sync="data")


def test_threads_share_a_handle_that_syncs(tmp_path):
    """Short sends run without the GIL there; closing while they run loses nothing that entered."""
    path = tmp_path / "queue"
    channel = dsline.FileChannel.create(path, capacity=256, slot_size=64, sync="data", backpressure="raise")
    entered = []

    def send(who):
        with contextlib.suppress(dsline.ChannelClosedError, dsline.BufferFullError):
            for number in range(1000):
                channel.send(b"%d %d" % (who, number))
                entered.append((who, number))

    threads = [threading.Thread(target=send, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(entered) > 20)
    channel.close()
    for thread in threads:
        thread.join(TIMEOUT)
    del channel
    with dsline.FileChannel.open(path) as channel:
        got = [tuple(map(int, bytes(view).split())) for view in iter_nowait(channel)]
    assert set(entered) <= set(got)
    assert len(got) == len(set(got))
