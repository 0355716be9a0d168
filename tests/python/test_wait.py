"""dsline.wait and fileno(): several channels, sockets and connections at once."""

import multiprocessing
import os
import selectors
import signal
import socket
import threading
import time

import pytest
from support import TIMEOUT, wait_until

import dsline
from dsline import _core


@pytest.fixture(params=["futex_waitv", "old kernel"], autouse=True)
def kernel(request):
    _core.pretend_no_futex_waitv(request.param == "old kernel")
    yield request.param
    _core.pretend_no_futex_waitv(False)


@pytest.fixture
def two(make_any):
    return make_any(capacity=4, slot_size=64), make_any(capacity=4, slot_size=64)


def later(call):
    """Run `call` once somebody sleeps, probably; the test holds in any case."""
    thread = threading.Timer(0.02, call)
    thread.start()
    return thread


# --- dsline.wait --------------------------------------------------------------------------------------------------


def test_it_says_which_have_something_in_the_order_given(two):
    a, b = two
    assert dsline.wait([a, b], timeout=0) == []
    b.send(b"1")
    assert dsline.wait([a, b]) == [b]
    a.send(b"2")
    assert dsline.wait([b, a]) == [b, a]
    assert b.recv_bytes(timeout=0) == b"1"
    assert dsline.wait([b, a], timeout=5) == [a]


@pytest.mark.parametrize("number", [0, 1])
def test_a_message_ends_the_wait(two, number):
    thread = later(lambda: two[number].send(b"x"))
    assert dsline.wait(two, timeout=TIMEOUT) == [two[number]]
    thread.join()


def test_the_time_is_up(two):
    assert dsline.wait(two, timeout=0.06) == []


def test_nothing_to_wait_for_is_nothing_ready():
    assert dsline.wait([]) == []
    assert dsline.wait(iter(())) == []


def test_closed_and_shut_down_count_as_ready(two):
    a, b = two
    a.shutdown()
    assert dsline.wait([a, b]) == [a]
    b.close()
    assert dsline.wait([a, b]) == [a, b]
    with pytest.raises(dsline.ChannelClosedError):
        b.recv_nowait()


def test_a_drained_channel_is_ready_only_when_it_is_drained(two):
    a, b = two
    b.send(b"left")
    b.shutdown()
    assert dsline.wait([a, b]) == [b]
    assert b.recv_bytes(timeout=0) == b"left"
    assert dsline.wait([a, b]) == [b]
    with pytest.raises(dsline.ChannelClosedError):
        b.recv_nowait()


@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_an_end_wakes_who_waits(two, end):
    thread = later(getattr(two[1], end))
    assert dsline.wait(two, timeout=TIMEOUT) == [two[1]]
    thread.join()


def test_room_to_send(two):
    a, b = two
    assert dsline.wait([a, b], for_send=True) == [a, b]
    for channel in two:
        while not channel.full:
            channel.send(b"x")
    assert dsline.wait([a, b], 0, for_send=True) == []
    thread = later(b.recv_bytes)
    assert dsline.wait([a, b], TIMEOUT, for_send=True) == [b]
    thread.join()


def test_subscribers_and_channels_together(make_broadcast, make_channel):
    broadcast = make_broadcast(capacity=4, slot_size=64)
    channel = make_channel(capacity=4, slot_size=64)
    with broadcast.subscribe("a") as first, broadcast.subscribe("b") as second:
        broadcast.send(b"for both")
        assert dsline.wait([channel, first, second]) == [first, second]
        first.recv_bytes()
        assert dsline.wait([channel, first, second]) == [second]


def test_sockets_connections_and_numbers_among_them(two):
    a, b = two
    near, far = socket.socketpair()
    one, other = multiprocessing.Pipe()
    reading, writing = os.pipe()
    try:
        everything = [a, near, one, reading, b]
        assert dsline.wait(everything, timeout=0) == []
        thread = later(lambda: far.send(b"x"))
        assert dsline.wait(everything, timeout=TIMEOUT) == [near]
        thread.join()
        other.send("x")
        os.write(writing, b"x")
        b.send(b"x")
        assert dsline.wait(everything) == [near, one, reading, b]
        near.recv(1)
        one.recv()
        os.read(reading, 1)
        b.recv_bytes()
        thread = later(lambda: a.send(b"x"))
        assert dsline.wait(everything, timeout=TIMEOUT) == [a]
        thread.join()
        assert dsline.wait([near, a], for_send=True) == [near, a]
    finally:
        for each in (near, far, one, other):
            each.close()
        os.close(reading)
        os.close(writing)


def test_more_than_the_kernel_waits_for_at_once(kernel):
    count = 300 if kernel == "futex_waitv" else 20
    channels = [dsline.ShmChannel(storage="heap", capacity=1, slot_size=64) for _ in range(count)]
    try:
        assert dsline.wait(channels, timeout=0.01) == []
        thread = later(lambda: channels[-1].send(b"x"))
        assert dsline.wait(channels, timeout=TIMEOUT) == [channels[-1]]
        thread.join()
    finally:
        for channel in channels:
            channel.close()


def test_ctrl_c_ends_it_and_other_handlers_let_it_go_on(two):
    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        thread = later(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(Interrupted):
            dsline.wait(two)
        thread.join()
        signal.signal(signal.SIGUSR1, lambda *_: two[0].send(b"by the handler"))
        thread = later(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert dsline.wait(two, timeout=TIMEOUT) == [two[0]]
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_receiver_beside_a_waiter_gets_the_message(make_channel, name):
    channel = make_channel(name, capacity=4, slot_size=64)
    got = []
    with dsline.ShmChannel.open(name) as other:
        for number in range(20):
            waiter = threading.Thread(target=dsline.wait, args=([channel, other],))
            receiver = threading.Thread(target=lambda: got.append(other.recv_bytes(timeout=TIMEOUT)))
            waiter.start()
            receiver.start()
            channel.send(b"%d" % number)
            receiver.join()
            channel.send(b"for the waiter, if it came late")
            waiter.join()
            channel.recv_bytes(timeout=0)
    assert got == [b"%d" % number for number in range(20)]


@pytest.mark.parametrize(
    ("objects", "timeout", "error", "text"),
    [
        ([object()], 0, TypeError, "cannot wait for a object"),
        ([True], 0, TypeError, "must be an int"),
        ([-1], 0, ValueError, "is it closed"),
        ([0], -1, ValueError, "timeout is -1"),
        ([0], float("nan"), ValueError, "timeout is nan"),
        ([0], "1", TypeError, "timeout is a str"),
        (5, 0, TypeError, "not iterable"),
    ],
)
def test_bad_arguments(objects, timeout, error, text):
    with pytest.raises(error, match=text):
        dsline.wait(objects, timeout=timeout)


def test_a_bad_timeout_with_channels_only(two):
    with pytest.raises(ValueError, match="timeout is -1"):
        dsline.wait(two, timeout=-1)


def test_a_file_number_that_is_not_open(two):
    with pytest.raises(ValueError, match="987654 is not open"):
        dsline.wait([two[0], 987654], timeout=1)


def test_a_broadcast_has_nothing_to_receive(make_broadcast):
    channel = make_broadcast(capacity=4, slot_size=64)
    with pytest.raises(dsline.FeatureUnavailableError, match="subscribe"):
        dsline.wait([channel])
    with pytest.raises(dsline.FeatureUnavailableError, match="subscribe"):
        channel.fileno()
    assert dsline.wait([channel], for_send=True) == [channel]


# --- fileno() -----------------------------------------------------------------------------------------------------


@pytest.fixture
def selector():
    with selectors.DefaultSelector() as made:
        yield made


def ready(selector, timeout=TIMEOUT):
    return [key.fileobj for key, _ in selector.select(timeout)]


def test_the_descriptor_is_readable_while_there_is_something(two, selector):
    a, _ = two
    a.send(b"before")
    for channel in two:
        selector.register(channel, selectors.EVENT_READ)
    assert ready(selector) == [a]
    assert a.recv_bytes(timeout=0) == b"before"
    with pytest.raises(dsline.BufferEmptyError):
        a.recv_nowait()
    assert ready(selector, 0) == []
    for number in range(50):
        one = two[number % 2]
        one.send(b"m")
        assert ready(selector) == [one]
        assert ready(selector) == [one]  # as long as nobody has found it empty
        assert bytes(one.recv_nowait()) == b"m"
        with pytest.raises(dsline.BufferEmptyError):
            one.recv_nowait()


def test_it_stays_readable_for_who_takes_one_message_each_time(two, selector):
    a, _ = two
    selector.register(a, selectors.EVENT_READ)
    for number in range(4):
        a.send(b"%d" % number)
    for number in range(4):
        assert ready(selector) == [a]
        assert a.recv_bytes(timeout=0) == b"%d" % number


@pytest.mark.parametrize(
    "receive",
    [
        lambda channel: channel.recv_nowait(),
        lambda channel: channel.recv_array(timeout=0),
        lambda channel: channel.recv_message_nowait(),
        lambda channel: channel.recv_many(5, timeout=0),
        lambda channel: channel.recv_bytes(timeout=0.01),
        lambda channel: channel.recv_into(bytearray(64), timeout=0),
    ],
)
def test_every_receiving_call_that_finds_nothing_watches_again(two, selector, receive):
    a, _ = two
    selector.register(a, selectors.EVENT_READ)
    for _ in range(3):
        a.send(b"x")
        assert ready(selector) == [a]
        a.recv_bytes(timeout=0)
        with pytest.raises(dsline.BufferEmptyError):
            receive(a)
        assert ready(selector, 0) == []


def test_messages_that_others_take_make_it_readable_for_nothing(make_channel, name, selector):
    channel = make_channel(name, capacity=4, slot_size=64)
    with dsline.ShmChannel.open(name) as other:
        selector.register(channel, selectors.EVENT_READ)
        other.send(b"x")
        assert ready(selector) == [channel]
        other.recv_bytes(timeout=0)
        with pytest.raises(dsline.BufferEmptyError):
            channel.recv_nowait()
        assert ready(selector, 0) == []
        other.send(b"y")
        assert ready(selector) == [channel]


def test_the_descriptor_is_the_same_and_goes_with_the_object():
    channel = dsline.ShmChannel(capacity=4, slot_size=64)
    number = channel.fileno()
    assert channel.fileno() == number
    assert channel.fileno_shared() != number
    channel.close()
    assert channel.fileno() == number
    os.fstat(number)
    del channel
    with pytest.raises(OSError):
        os.fstat(number)


@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_an_end_makes_it_readable(two, selector, end):
    a, _ = two
    selector.register(a, selectors.EVENT_READ)
    thread = later(getattr(a, end))
    assert ready(selector) == [a]
    thread.join()
    with pytest.raises(dsline.ChannelClosedError):
        a.recv_nowait()
    selector.unregister(a)


def test_an_object_that_was_never_opened():
    with pytest.raises(dsline.ChannelClosedError):
        dsline.ShmChannel.__new__(dsline.ShmChannel).fileno()


def test_a_channel_that_is_collected_while_it_is_watched_and_registered(selector):
    channel = dsline.ShmChannel(capacity=4, slot_size=64)
    selector.register(channel.fileno(), selectors.EVENT_READ)
    del channel
    assert ready(selector, 0) == []


def test_callbacks_for_the_dead_run_in_wait(make_channel, name):
    channel = make_channel(name, capacity=4, slot_size=64)
    told = []
    channel.on_peer_death(told.append)
    pid = os.fork()
    if pid == 0:
        mine = dsline.ShmChannel.open(name)
        mine.send(b"last words")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    channel.recv_bytes(timeout=TIMEOUT)
    wait_until(lambda: dsline.wait([channel], timeout=0.06) == [] and told)
    assert [death.pid for death in told] == [pid]


def test_the_thread_idles_with_nothing_watched():
    """Not timed: it must not wake up at all, so the kernel's count of its sleeps stands still."""
    channel = dsline.ShmChannel(capacity=4, slot_size=64)
    channel.fileno()
    del channel

    def sleeps():
        counts = {}
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/comm") as file:
                if file.read().strip() != "dsline-watcher":
                    continue
            with open(f"/proc/self/task/{task}/status") as file:
                counts[task] = [line for line in file if line.startswith("voluntary_ctxt")]
        return counts

    def is_still():
        before = sleeps()
        time.sleep(0.15)  # three slices
        return before and sleeps() == before

    wait_until(is_still)
