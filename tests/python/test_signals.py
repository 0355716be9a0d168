"""Signals and waiting: Ctrl-C ends a wait, other handlers run and it goes on, and idle waiting costs nothing."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from support import TIMEOUT, wait_until

import dsline


@pytest.fixture(params=["recv", "send", "send array", "recv_many", "next", "send_many"])
def waiting(request, make_channel):
    """A channel and a call that waits for ever."""
    channel = make_channel(capacity=1, slot_size=64)
    if "send" in request.param:
        channel.send(b"full")
    call = {
        "recv": channel.recv,
        "send": lambda: channel.send(b"x"),
        "send array": lambda: channel.send(np.arange(8)[::2]),
        "recv_many": lambda: channel.recv_many(2),
        "next": lambda: next(channel),
        "send_many": lambda: channel.send_many([b"x"]),
    }[request.param]
    return channel, call


def waits(channel):
    stats = channel.stats()
    return stats.recv_waits + stats.send_waits


def interrupt_when_waiting(channel, number, after=2):
    """Send this process a signal once a call waits."""

    def run():
        wait_until(lambda: waits(channel) >= after)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_ctrl_c_ends_a_wait_and_the_channel_works_on(waiting):
    channel, call = waiting
    thread = interrupt_when_waiting(channel, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        call()
    thread.join(TIMEOUT)
    if channel.empty:
        channel.send(b"later", timeout=0)
    else:
        assert channel.recv_bytes(timeout=0) == b"full"
        channel.send(b"later", timeout=0)
    assert channel.recv_bytes(timeout=0) == b"later"
    assert channel.stats().free_slots == 1


class HandlerError(Exception):
    pass


@pytest.fixture
def handler():
    """Install a handler for SIGUSR1 for the time of the test."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda function: signal.signal(signal.SIGUSR1, lambda *_: function())
    signal.signal(signal.SIGUSR1, before)


def test_an_exception_of_a_handler_ends_a_wait(waiting, handler):
    channel, call = waiting

    def fail():
        raise HandlerError

    handler(fail)
    thread = interrupt_when_waiting(channel, signal.SIGUSR1)
    with pytest.raises(HandlerError):
        call()
    thread.join(TIMEOUT)


def test_a_handler_may_end_the_wait_by_using_the_channel(waiting, handler):
    channel, call = waiting
    handler(
        lambda: (
            channel.send(b"from the handler", timeout=0) if channel.empty else channel.recv_bytes(timeout=0)
        )
    )
    thread = interrupt_when_waiting(channel, signal.SIGUSR1)
    assert call()
    thread.join(TIMEOUT)


def test_handlers_run_and_the_deadline_stays(make_channel, handler):
    channel = make_channel(capacity=1, slot_size=64)
    calls = []
    handler(lambda: calls.append(waits(channel)))
    stop = threading.Event()

    def bombard():
        while not stop.wait(0.01):
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=bombard, daemon=True)
    thread.start()
    start = time.monotonic()
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv(timeout=0.5)
    waited = time.monotonic() - start
    stop.set()
    thread.join(TIMEOUT)
    assert waited >= 0.5
    assert len(calls) >= 5


def test_a_wait_in_another_thread_is_not_disturbed(make_channel, handler):
    channel = make_channel(capacity=1, slot_size=64)
    handler(lambda: None)
    got = []
    thread = threading.Thread(target=lambda: got.append(channel.recv_bytes(timeout=TIMEOUT)), daemon=True)
    thread.start()
    wait_until(lambda: waits(channel) >= 1)
    for _ in range(50):
        os.kill(os.getpid(), signal.SIGUSR1)
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
    channel.send(b"x")
    thread.join(TIMEOUT)
    assert got == [b"x"]


@pytest.mark.parametrize("side", ["recv", "send"])
def test_idle_waiting_costs_no_processor_time(make_channel, side):
    channel = make_channel(capacity=1, slot_size=64)
    if side == "send":
        channel.send(b"full")
    start = time.process_time()
    with pytest.raises(TimeoutError):
        channel.recv(timeout=2) if side == "recv" else channel.send(b"x", timeout=2)
    assert time.process_time() - start < 0.02, "more than 1 % of a core"


def test_waiting_lets_other_threads_run(make_channel):
    channel = make_channel(capacity=1, slot_size=64)
    counted = 0
    thread = threading.Thread(target=channel.recv, daemon=True)
    thread.start()
    wait_until(lambda: waits(channel) >= 1)
    end = waits(channel) + 3
    while waits(channel) < end:  # would not end if the waiter kept the GIL
        counted += 1
    channel.send(b"x")
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert counted > 0
