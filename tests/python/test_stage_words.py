"""The words by which the workers of a stage agree whose turn it is. The deaths are in tests/cpp/channel/stage_words_test.cpp."""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_sharer
import multiprocessing.resource_tracker
import os
import pickle
import signal
import threading
import time

import pytest

import dsline
from dsline._core import StageWords


@pytest.fixture(scope="module", autouse=True)
def helpers():
    """The helper processes of multiprocessing live as long as pytest: their pipes are nobody's leak."""
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def sharing_ends():
    """The thread and the socket by which multiprocessing passes descriptors on end with the test."""
    yield
    multiprocessing.resource_sharer.stop(timeout=30)


@pytest.fixture
def inbox(make_channel):
    return make_channel(capacity=8, slot_size=64, timeout=0)


@pytest.fixture
def outbox(make_channel):
    return make_channel(capacity=8, slot_size=64, timeout=0)


def test_a_turn_goes_on_by_commit_and_never_back():
    words = StageWords.create(2, 1)
    assert (words.inputs, words.outputs, words.tickets) == (2, 1, 0)
    assert words.wait_turn(0, 0, 0)
    assert not words.wait_turn(0, 1, 0)
    words.commit(0, 3)
    words.commit(0, 2)
    assert (words.done(0), words.done(1)) == (3, 0)
    assert words.wait_turn(0, 2, None)
    words.set_done(1, 17)
    assert words.done(1) == 17


def test_one_of_those_that_find_a_message_lost_passes_its_turn():
    words = StageWords.create(1, 1)
    assert not words.skip_lost(0, 1)
    assert words.skip_lost(0, 0)
    assert not words.skip_lost(0, 0)
    assert (words.done(0), words.lost(0)) == (1, 1)


def test_an_intent_stays_until_the_position_after_the_next(outbox):
    words = StageWords.create(2, 2)
    assert words.intended(1, 0) is None
    assert words.settle(1, outbox) is None
    for position in range(5):
        assert words.begin(1, outbox, 10 + position, position, 2 * position) == position
        outbox.send(b"x")
        assert words.settle(1, outbox) == (10 + position, (position, 2 * position))
        assert bytes(outbox.recv()) == b"x"
        words.intend(1, position + 1, 99, 99, 99)  # dies before it publishes
        assert words.settle(1, outbox) == (10 + position, (position, 2 * position))
    assert words.intended(1, 3) is None
    assert words.intended(0, 4) is None


def test_a_waiter_is_woken_by_a_commit_and_by_a_skip():
    words = StageWords.create(1, 1)
    reached = []
    waiter = threading.Thread(target=lambda: reached.append(words.wait_turn(0, 2, 30)))
    waiter.start()
    time.sleep(0.02)
    words.commit(0, 1)
    assert words.skip_lost(0, 1)
    waiter.join(30)
    assert reached == [True]


def test_ctrl_c_ends_a_wait():
    words = StageWords.create(1, 1)
    main = threading.get_ident()
    timer = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        words.wait_turn(0, 1, None)
    timer.join()


def test_tickets_are_drawn_in_order_and_found_again(inbox):
    words = StageWords.create(1, 1, tickets=3)
    assert words.tickets == 4
    for _ in range(6):
        inbox.send(b"x")
    held = [inbox.recv_message() for _ in range(6)]
    assert words.find_ticket(0) is None
    assert [words.draw_ticket(inbox, sequence, 0) for sequence in (2, 0, 1)] == [0, 1, 2]
    assert [words.find_ticket(sequence) for sequence in range(4)] == [1, 2, 0, None]
    assert [words.sequence_of(ticket) for ticket in range(4)] == [2, 0, 1, None]
    assert words.draw_ticket(inbox, 3, 0) == 3
    assert words.draw_ticket(inbox, 4, 0) is None, "the ring still needs the ticket of message 2"
    words.commit(0, 4)
    assert words.draw_ticket(inbox, 4, 0) is None
    held[2].release()
    words.acknowledged()
    assert words.draw_ticket(inbox, 4, 0) == 4
    assert [words.find_ticket(sequence) for sequence in range(5)] == [1, 2, None, 3, 4]
    assert words.sequence_of(0) is None


def test_many_laps_of_tickets(inbox):
    words = StageWords.create(1, 1, tickets=4)
    for number in range(1000):
        inbox.send(b"x")
        with inbox.recv_message() as message:
            assert words.draw_ticket(inbox, message.sequence, 0) == number
            assert words.find_ticket(message.sequence) == number
            words.commit(0, number + 1)
        words.acknowledged()


def test_a_control_frame_stays_between_its_neighbours(inbox):
    words = StageWords.create(1, 1, tickets=8)
    inbox.send(b"0")
    inbox._core_send_control(17, b"", 0)
    inbox.send(b"2")
    before, marker, behind = (inbox.recv_message() for _ in range(3))
    assert words.draw_ticket(inbox, 2, 0) is None
    assert words.draw_ticket(inbox, 1, 0.01, control=True) is None
    assert words.draw_ticket(inbox, 0, 0) == 0
    assert words.draw_ticket(inbox, 1, 0, control=True) is None
    before.release()
    assert words.draw_ticket(inbox, 2, 0) is None
    assert words.draw_ticket(inbox, 1, 0, control=True) == 1
    assert words.draw_ticket(inbox, 2, 0) is None
    marker.release()
    assert words.draw_ticket(inbox, 2, 0) == 2
    behind.release()


def test_the_message_of_a_turn_can_be_taken_by_its_sequence(inbox):
    for text in (b"0", b"1", b"2"):
        inbox.send(text)
    with inbox._core_take_between(1, 2) as message:
        assert (message.sequence, bytes(message.payload)) == (1, b"1")
        assert inbox._core_take_between(1, 2) is None, "it is held"
        message.nack()
    with inbox._core_take_between(1, 3) as message:
        assert (message.sequence, message.attempt) == (1, 2)
    assert inbox._core_take_between(1, 2) is None, "it is released"
    message = inbox._core_take_between(0, 9)
    assert message.sequence == 0
    del message  # let go of: it comes again
    assert [(m.sequence, m.attempt) for m in (inbox.recv_message(), inbox.recv_message())] == [(0, 2), (2, 1)]


def _commit_in_child(words, inbox):
    assert words.done(0) == 5
    words.commit(0, 6)
    assert words.draw_ticket(inbox, inbox.recv_message(timeout=30).sequence, 30) == 0


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_words_go_to_a_process_that_is_being_started(method):
    words = StageWords.create(1, 1, tickets=8)
    words.set_done(0, 5)
    with dsline.ShmChannel.create(None, capacity=4) as inbox:
        inbox.send(b"x")
        child = multiprocessing.get_context(method).Process(target=_commit_in_child, args=(words, inbox))
        child.start()
        child.join(60)
        assert child.exitcode == 0
    assert words.done(0) == 6
    assert words.sequence_of(0) == 0


def test_the_words_cross_a_connection_but_no_plain_pickle():
    words = StageWords.create(3, 2)
    here, there = multiprocessing.Pipe()
    with here, there:
        here.send(words)
        there.recv().commit(2, 9)
    assert words.done(2) == 9
    with pytest.raises(dsline.FeatureUnavailableError, match="being started"):
        pickle.dumps(words)


def test_bad_words_are_refused():
    with pytest.raises(TypeError, match="create"):
        StageWords()
    for inputs, outputs, tickets in ((0, 1, 0), (257, 1, 0), (1, 257, 0), (1, 1, 1 << 21), (2, 1, 8)):
        with pytest.raises(dsline.InvalidArgumentError):
            StageWords.create(inputs, outputs, tickets=tickets)
    words = StageWords.create(1, 1)
    for call in (
        lambda: words.done(1),
        lambda: words.commit(1, 0),
        lambda: words.intend(1, 0, 0, 0),
        lambda: words.intended(1, 0),
    ):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(ValueError, match="2 values"):
        words.intend(0, 0, 0, 1, 2)
    with pytest.raises(dsline.InvalidArgumentError, match="no tickets"):
        words.find_ticket(0)
    memory = os.memfd_create("other")  # taken over
    with pytest.raises(dsline.ChannelLayoutError):
        StageWords.adopt(memory)
