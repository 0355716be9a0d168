"""ack, nack, and what becomes of messages that nobody gets done with."""

import os

import numpy as np
import pytest

import dsline


def bury(receiver, times):
    """Give the next message back until it is a dead letter."""
    for attempt in range(1, times + 1):
        message = receiver.recv_message(timeout=0)
        assert message.attempt == attempt
        message.nack()


def wears_off(receiver):
    """Whether nothing comes any more."""
    with pytest.raises(dsline.BufferEmptyError):
        receiver.recv(timeout=0)
    return True


@pytest.fixture
def channel(make_any):
    return make_any(capacity=8, slot_size=64)


# --- ack and nack ------------------------------------------------------------------------------------------------


def test_ack_is_release(channel):
    channel.send(b"x")
    message = channel.recv_message(timeout=0)
    message.ack()
    message.ack()
    assert channel.stats().free_slots == 8
    with pytest.raises(ValueError, match="released"):
        message.payload  # noqa: B018


def test_nack_gives_it_back(channel):
    channel.send(b"x")
    message = channel.recv_message(timeout=0)
    assert (message.attempt, message.redelivered) == (1, False)
    message.nack()
    message.nack()
    message.ack()
    assert len(channel) == 1
    again = channel.recv_message(timeout=0)
    assert (again.attempt, again.redelivered, bytes(again.payload)) == (2, True, b"x")
    again.ack()
    again.nack()
    assert channel.stats().free_slots == 8


@pytest.mark.parametrize("call", ["ack", "nack", "release"])
def test_a_message_in_view_cannot_be_ended(channel, call):
    channel.send(np.arange(3))
    message = channel.recv_message(timeout=0)
    array = message.array()
    with pytest.raises(BufferError, match="alive"):
        getattr(message, call)()
    np.testing.assert_array_equal(array, [0, 1, 2])
    del array
    getattr(message, call)()
    assert len(channel) == (call == "nack")


def test_a_block_that_was_acknowledged_ends_as_it_likes(channel):
    channel.send(b"x")
    with channel.recv_message(timeout=0) as message:
        message.nack()
    assert channel.recv_message(timeout=0).attempt == 2
    channel.send(b"y")
    with pytest.raises(KeyError), channel.recv_message(timeout=0) as message:
        message.ack()
        raise KeyError
    assert channel.stats().free_slots == 8


# --- becoming one ------------------------------------------------------------------------------------------------


def test_what_is_given_back_too_often_is_a_dead_letter_and_the_stream_goes_on(channel):
    channel.send(np.arange(3), meta={"id": 7})
    channel.send(b"after")
    bury(channel, 3)
    assert channel.recv_bytes(timeout=0) == b"after"
    assert wears_off(channel)
    stats = channel.stats()
    assert (stats.dead_letters, stats.buried, stats.depth, stats.free_slots) == (1, 1, 0, 7)
    (letter,) = channel.dead_letters()
    assert isinstance(letter, dsline.DeadLetter)
    assert isinstance(letter, dsline.Message)
    assert (letter.group, letter.last_pid, letter.reason) == (None, os.getpid(), "given back")
    assert (letter.sequence, letter.attempt, letter.redelivered, letter.meta) == (0, 3, True, {"id": 7})
    np.testing.assert_array_equal(letter.array(copy=True), [0, 1, 2])
    letter.ack()
    assert list(channel.dead_letters()) == []
    assert (channel.stats().dead_letters, channel.stats().free_slots) == (0, 8)


@pytest.mark.parametrize("most", [1, 2, 15])
def test_max_deliveries(make_any, most):
    channel = make_any(capacity=4, slot_size=64, max_deliveries=most)
    assert channel.max_deliveries == most
    channel.send(b"x")
    bury(channel, most)
    assert wears_off(channel)
    assert [letter.attempt for letter in channel.dead_letters()] == [most]


def test_there_are_none(channel):
    channel.send(b"x")
    assert list(channel.dead_letters()) == []
    assert channel.recv_bytes(timeout=0) == b"x"


def test_letters_of_groups(make_broadcast):
    channel = make_broadcast(capacity=8, slot_size=64)
    with channel.subscribe("a") as a, channel.subscribe("b") as b:
        channel.send(b"x")
        bury(a, 3)
        assert wears_off(a)
        assert b.recv_bytes(timeout=0) == b"x", "the other group is not concerned"
        for receiver in (channel, a, b):
            (letter,) = receiver.dead_letters()
            assert letter.group == "a"
            del letter
        (letter,) = b.dead_letters()
        letter.ack()
        assert channel.stats().free_slots == 8


def test_what_could_not_be_used_is_no_delivery(channel):
    channel.send(b"plain bytes")
    for _ in range(10):
        with pytest.raises(dsline.SchemaMismatchError):
            channel.recv_array(timeout=0)
        with pytest.raises(dsline.BufferTooSmallError):
            channel.recv_into(bytearray(3), timeout=0)
    message = channel.recv_message(timeout=0)
    assert (message.attempt, message.redelivered) == (1, False)


def test_the_oldest_letter_goes_when_there_are_too_many(make_any):
    channel = make_any(capacity=8, slot_size=64, max_deliveries=1, dead_letters=2)
    for number in range(4):
        channel.send(b"%d" % number)
        bury(channel, 1)
        assert wears_off(channel)
    stats = channel.stats()
    assert (stats.dead_letters, stats.buried, stats.letters_dropped, stats.free_slots) == (2, 4, 2, 6)
    assert [bytes(letter.payload) for letter in channel.dead_letters()] == [b"2", b"3"]


def test_without_room_for_letters_they_are_released(make_any):
    channel = make_any(capacity=4, slot_size=64, max_deliveries=1, dead_letters=0)
    channel.send(b"x")
    bury(channel, 1)
    assert wears_off(channel)
    assert channel.stats().free_slots == 4
    assert channel.stats().letters_dropped == 1


def test_letters_never_fill_the_channel(make_any):
    channel = make_any(capacity=4, slot_size=64, max_deliveries=1, dead_letters=100, timeout=0)
    for number in range(20):
        channel.send(b"%d" % number)
        bury(channel, 1)
        assert wears_off(channel)
    assert channel.stats().free_slots >= 2


# --- what one does with them -------------------------------------------------------------------------------------


@pytest.fixture
def letters(make_any):
    """A channel with three dead letters: 0, 1, 2."""
    channel = make_any(capacity=8, slot_size=64, max_deliveries=1)
    for number in range(3):
        channel.send(b"%d" % number)
        bury(channel, 1)
    assert wears_off(channel)
    assert channel.stats().dead_letters == 3
    return channel


def payloads(channel):
    return [bytes(letter.payload) for letter in channel.dead_letters()]


def test_looking_removes_nothing(letters):
    for _ in range(3):
        assert payloads(letters) == [b"0", b"1", b"2"]
    assert letters.stats().dead_letters == 3


@pytest.mark.parametrize("how", ["ack", "release", "with"])
def test_ending_removes_them(letters, how):
    for letter in letters.dead_letters():
        if how == "with":
            with letter:
                assert letter.nbytes == 1
        else:
            getattr(letter, how)()
    assert payloads(letters) == []
    assert letters.stats().free_slots == 8


def test_nack_keeps_it_and_those_behind_it_still_come(letters):
    seen = []
    for letter in letters.dead_letters():
        seen.append(bytes(letter.payload))
        letter.nack()
    assert seen == [b"0", b"1", b"2"]
    assert payloads(letters) == [b"0", b"1", b"2"]


def test_an_exception_keeps_it(letters):
    with pytest.raises(KeyError):
        for letter in letters.dead_letters():
            with letter:
                raise KeyError
    del letter
    assert payloads(letters) == [b"0", b"1", b"2"]


def test_who_holds_letters_keeps_them_from_others(letters):
    held = list(letters.dead_letters())
    assert len(held) == 3
    assert payloads(letters) == []
    held[1].ack()
    del held
    assert payloads(letters) == [b"0", b"2"]


def test_leaving_the_loop_early_gives_the_rest_back(letters):
    for letter in letters.dead_letters():
        letter.ack()
        break
    assert payloads(letters) == [b"1", b"2"]


def test_revive_sends_it_to_its_group_again(letters):
    for letter in letters.dead_letters():
        if letter.sequence != 1:
            letter.revive()
            letter.revive()
            letter.ack()
    assert payloads(letters) == [b"1"]
    assert len(letters) == 2
    got = [letters.recv_message(timeout=0) for _ in range(2)]
    assert [(message.sequence, bytes(message.payload)) for message in got] == [(0, b"0"), (2, b"2")]
    for message in got:
        message.ack()
    assert letters.stats().free_slots == 7


def test_a_revived_letter_is_delivered_as_often_again(make_any):
    channel = make_any(capacity=4, slot_size=64, max_deliveries=3)
    channel.send(b"x")
    bury(channel, 3)
    assert wears_off(channel)
    next(channel.dead_letters()).revive()
    attempts = []
    while channel.stats().depth:
        message = channel.recv_message(timeout=0)
        attempts.append(message.attempt)
        message.nack()
        if len(attempts) > 10:
            break
        if message.attempt == 3:
            assert wears_off(channel)
    assert attempts == [2, 3], "that it was delivered before is not forgotten"
    assert channel.stats().dead_letters == 1


@pytest.mark.parametrize("call", ["revive", "ack", "nack"])
def test_a_letter_in_view_stays(letters, call):
    letter = next(letters.dead_letters())
    view = letter.payload
    with pytest.raises(BufferError, match="alive"):
        getattr(letter, call)()
    assert bytes(view) == b"0"
    del view
    getattr(letter, call)()


def test_a_view_keeps_a_letter_that_was_let_go_of(letters):
    view = next(letters.dead_letters()).payload
    assert payloads(letters) == [b"1", b"2"]
    assert bytes(view) == b"0"
    del view
    assert payloads(letters) == [b"0", b"1", b"2"]


def test_a_closed_handle_has_no_letters_to_give(letters):
    letter = next(letters.dead_letters())
    letters.close()
    with pytest.raises(dsline.ChannelClosedError):
        next(letters.dead_letters())
    letter.nack()


def test_letters_survive_their_processes(tmp_path):
    with dsline.FileChannel.create(tmp_path / "queue", capacity=4, max_deliveries=1) as channel:
        channel.send(b"x", meta={"k": 1})
        bury(channel, 1)
        assert wears_off(channel)
    with dsline.FileChannel.open(tmp_path / "queue") as channel:
        (letter,) = channel.dead_letters()
        assert (bytes(letter.payload), letter.meta, letter.reason) == (b"x", {"k": 1}, "given back")
        letter.ack()
