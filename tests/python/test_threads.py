"""One handle shared by threads: every message exactly once, whole, in the order of its sender.

With payloads that prove themselves these show torn, lost and doubled messages; not a data race that has no effect here.
"""

import contextlib
import sys
import threading
from collections import Counter

import pytest
from support import TIMEOUT, check_proof, proof

import dsline


@pytest.fixture(autouse=True)
def eager_switching():
    """Threads change places far more often than by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Crew:
    """Threads that must all end well before the deadline."""

    def __init__(self):
        self.errors = []
        self._threads = []

    def start(self, function, *arguments):
        thread = threading.Thread(target=self._run, args=(function, *arguments), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, function, *arguments):
        try:
            function(*arguments)
        except BaseException as error:
            self.errors.append(error)

    def join(self):
        for thread in self._threads:
            thread.join(TIMEOUT)
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        if self.errors:
            raise self.errors[0]
        assert not stuck, "threads did not end"


def produce(channel, producer, count, words):
    for number in range(count):
        assert channel.send(proof(producer, number, words), timeout=TIMEOUT)


def consume(channel, got, receive):
    with contextlib.suppress(dsline.ChannelClosedError):
        while True:
            receive(channel, got)


def by_view(channel, got):
    got.append(check_proof(channel.recv(timeout=TIMEOUT)))


def by_copy(channel, got):
    got.append(check_proof(channel.recv_array(timeout=TIMEOUT, copy=True)))


def by_message(channel, got):
    with channel.recv_message(timeout=TIMEOUT) as message:
        got.append(check_proof(message.array()))


def by_many(channel, got):
    got += [check_proof(view) for view in channel.recv_many(5, timeout=TIMEOUT)]


def exactly_once(got, producers, count):
    counted = Counter(pair for one in got for pair in one)
    assert counted == Counter((producer, number) for producer in range(producers) for number in range(count))
    for one in got:  # of one sender a receiver sees later messages later
        for producer in range(producers):
            numbers = [number for who, number in one if who == producer]
            assert numbers == sorted(numbers)


@pytest.mark.filterwarnings(
    "ignore::dsline.PinnedViewsWarning"
)  # three lists of five are more than 8 slots allow
@pytest.mark.parametrize("receive", [by_view, by_copy, by_message, by_many])
@pytest.mark.parametrize(("capacity", "words"), [(8, 16), (16, 3000), (64, 16)])
def test_producers_and_consumers_share_one_handle(make_any, capacity, words, receive):
    producers, consumers, count = 3, 3, 150
    channel = make_any(capacity=capacity, slot_size=4 * words)
    sending, receiving = Crew(), Crew()
    got = [[] for _ in range(consumers)]
    for one in got:
        receiving.start(consume, channel, one, receive)
    for producer in range(producers):
        sending.start(produce, channel, producer, count, words)
    sending.join()
    channel.shutdown()
    receiving.join()
    exactly_once(got, producers, count)
    stats = channel.stats()
    assert (stats.free_slots, stats.pinned_slots, stats.depth) == (capacity, 0, 0)
    assert (stats.next_sequence, stats.head_sequence) == (producers * count, producers * count)


def test_one_slot_is_enough(make_any):
    channel = make_any(capacity=1, slot_size=64)
    sending, receiving = Crew(), Crew()
    got = [[], []]
    for one in got:
        receiving.start(consume, channel, one, by_copy)
    for producer in range(2):
        sending.start(produce, channel, producer, 200, 16)
    sending.join()
    channel.shutdown()
    receiving.join()
    exactly_once(got, 2, 200)


def test_handles_of_one_channel_in_different_threads(name):
    producers, consumers, count = 2, 2, 500
    with contextlib.ExitStack() as stack:
        handles = [
            stack.enter_context(dsline.ShmChannel(name, capacity=16, slot_size=64))
            for _ in range(producers + consumers)
        ]
        sending, receiving = Crew(), Crew()
        got = [[] for _ in range(consumers)]
        for handle, one in zip(handles[producers:], got, strict=True):
            receiving.start(consume, handle, one, by_view)
        for producer in range(producers):
            sending.start(produce, handles[producer], producer, count, 16)
        sending.join()
        handles[0].shutdown()
        receiving.join()
        exactly_once(got, producers, count)


def test_growing_and_shrinking_by_several_threads(make_any):
    channel = make_any(capacity=8, slot_size=64, max_message_size=1 << 20)
    sending, receiving = Crew(), Crew()
    got = [[], []]

    def produce_growing(producer):
        for number in range(60):
            channel.send(proof(producer, number, 16 if number % 7 else 50_000 + number), timeout=TIMEOUT)

    for one in got:
        receiving.start(consume, channel, one, by_view)
    for producer in range(3):
        sending.start(produce_growing, producer)
    sending.join()
    channel.shutdown()
    receiving.join()
    exactly_once(got, 3, 60)


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
def test_dropping_accounts_for_every_message(make_channel, policy):
    channel = make_channel(capacity=4, slot_size=64, backpressure=policy)
    entered, got = [0, 0, 0], []

    def produce_and_count(producer):
        for number in range(500):
            entered[producer] += channel.send(proof(producer, number))

    sending, receiving = Crew(), Crew()
    receiving.start(consume, channel, got, by_copy)
    for producer in range(3):
        sending.start(produce_and_count, producer)
    sending.join()
    channel.shutdown()
    receiving.join()
    stats = channel.stats()
    assert len(got) == len(set(got))
    assert sum(entered) + stats.dropped_newest == 1500
    assert len(got) + stats.dropped_oldest == sum(entered)
    assert stats.next_sequence == sum(entered)


def test_views_are_dropped_in_other_threads(make_channel):
    channel = make_channel(capacity=4, slot_size=64, max_pinned="unlimited")
    handed_over = []
    ready, done = threading.Semaphore(0), Crew()

    def drop(count):
        for _ in range(count):
            assert ready.acquire(timeout=TIMEOUT)
            check_proof(handed_over.pop())

    done.start(drop, 300)
    for number in range(300):
        channel.send(proof(1, number), timeout=TIMEOUT)
        handed_over.append(channel.recv(timeout=TIMEOUT))
        ready.release()
    done.join()
    assert channel.stats().free_slots == 4


def test_closing_while_threads_are_at_work(make_any):
    for _ in range(20):
        channel = make_any(capacity=4, slot_size=64, max_pinned="unlimited")
        crew = Crew()

        def send(channel=channel):
            with contextlib.suppress(dsline.ChannelClosedError):
                while True:
                    channel.send(proof(1, 1), timeout=TIMEOUT)

        for _ in range(2):
            crew.start(send)
            crew.start(consume, channel, [], by_view)
        channel.recv_many(3, timeout=TIMEOUT)
        channel.close()
        crew.join()


def test_opening_and_closing_one_name_in_many_threads(name):
    """The first open creates, the last close removes: nobody may fall between."""
    crew = Crew()

    def cycle():
        for _ in range(60):
            with dsline.ShmChannel(name, capacity=4, slot_size=64, timeout=TIMEOUT) as channel:
                channel.send(b"x")
                assert channel.recv_bytes() == b"x"

    for _ in range(4):
        crew.start(cycle)
    crew.join()
