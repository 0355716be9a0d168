"""A forked child registers anew; nothing that it does or does not do releases what its parent holds."""

import gc
import os
import threading

import children
import numpy as np
import pytest
from support import TIMEOUT, Child, forked, reap, wait_until

import dsline
from dsline._core import list_names

# pytest's timer is a thread, so that Python 3.12 and later warn about every fork here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(params=["named", "memfd", "file"])
def channel(request, name, tmp_path):
    options = {"capacity": 4, "slot_size": 64, "timeout": TIMEOUT}
    if request.param == "named":
        channel = dsline.ShmChannel(name, **options)
    elif request.param == "memfd":
        channel = dsline.ShmChannel(storage="memfd", **options)
    else:
        channel = dsline.FileChannel.create(tmp_path / "queue", **options)
    yield channel
    if channel.path is not None:
        channel.unlink()
    channel.close()


def test_an_inherited_handle_sends_and_receives(channel):
    channel.send(b"to the child")

    def child():
        assert channel.recv_bytes() == b"to the child"
        assert channel.stats().participants == 2, "registered anew"
        channel.send(np.arange(3))
        channel.close()

    forked(child)
    np.testing.assert_array_equal(channel.recv_array(), [0, 1, 2])
    assert channel.stats().participants == 1
    assert channel.stats().free_slots == 4


def test_what_the_parent_holds_stays_held(channel):
    channel.send(np.arange(4))
    channel.send(b"message")
    view = channel.recv()
    message = channel.recv_message()

    def child():
        nonlocal view, message
        np.testing.assert_array_equal(np.asarray(view), [0, 1, 2, 3])
        assert bytes(message.payload) == b"message"
        message.release()
        del view, message
        gc.collect()
        assert channel.stats().pinned_slots == 2
        for number in range(20):
            channel.send(b"%d" % number)
            assert channel.recv_bytes() == b"%d" % number

    forked(child)
    assert (channel.stats().pinned_slots, channel.stats().pinned_views) == (2, 2)
    channel.send_many([b"fill", b"fill"], timeout=0)
    np.testing.assert_array_equal(np.asarray(view), [0, 1, 2, 3])
    assert bytes(message.payload) == b"message"
    del view
    message.release()
    assert channel.stats().free_slots == 2


def test_leaving_a_block_in_the_child_gives_nothing_back(channel):
    channel.send(b"held by the parent")
    message = channel.recv_message()

    def child():
        with pytest.raises(ZeroDivisionError), message:
            1 / 0  # noqa: B018

    forked(child)
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv(timeout=0.1)
    assert bytes(message.payload) == b"held by the parent"
    message.release()
    assert channel.stats().free_slots == 4


@pytest.mark.parametrize(
    "use", ["nothing", "close", "delete", "use", "use and delete", "shutdown of interpreter"]
)
def test_a_childs_end_leaves_the_parent_alone(channel, use):
    channel.send(b"queued")
    path = channel.path

    def child():
        nonlocal channel
        if use.startswith("use"):
            channel.stats()
            channel.send(b"from the child")
            assert channel.recv_bytes() == b"queued"
            channel.send(b"queued")
            assert channel.recv_bytes() == b"from the child"
        if use == "close":
            channel.close()
            with pytest.raises(dsline.ChannelClosedError):
                channel.send(b"x")
        if use.endswith("delete"):
            del channel
            gc.collect()
        if use == "shutdown of interpreter":
            dsline._core.leave_all()

    forked(child)
    assert not channel.closed
    assert path is None or os.path.exists(path)
    assert channel.recv_bytes(timeout=0) == b"queued"
    wait_until(lambda: channel.stats().participants == 1 or sweep(channel))
    channel.send_many([b"x"] * 4, timeout=0)
    assert [bytes(view) for view in channel.recv_many(4)] == [b"x"] * 4
    assert channel.stats().free_slots == 4


def sweep(channel):
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv(timeout=0.1)
    return channel.stats().participants == 1


def test_a_child_that_does_not_use_a_handle_takes_no_place(name):
    with dsline.ShmChannel(name, capacity=1, slot_size=64, max_handles=1) as channel:
        forked(lambda: None)

        def child():
            with pytest.raises(dsline.TooManyHandlesError, match="max_handles=1"):
                channel.send(b"x")

        forked(child)
        channel.send(b"x", timeout=0)
        assert channel.recv_bytes(timeout=0) == b"x"


def test_a_child_may_exit_like_a_program_with_inherited_views(channel):
    """Not by os._exit: finalizers and atexit handlers of the parent's objects run in the child."""
    channel.send(np.arange(4))
    view = channel.recv_array()
    pid = os.fork()
    if pid == 0:
        try:
            channel.send(b"from the child")
            dsline._core.leave_all()
        finally:
            os._exit(0)
    reap(pid)
    np.testing.assert_array_equal(view, [0, 1, 2, 3])
    assert channel.recv_bytes() == b"from the child"
    assert channel.stats().pinned_slots == 1


def test_forking_while_another_thread_waits(channel):
    got = []
    thread = threading.Thread(target=lambda: got.append(channel.recv_bytes()), daemon=True)
    thread.start()
    wait_until(lambda: channel.stats().recv_waits > 0)

    def child():
        channel.send(b"for the waiting thread")

    for _ in range(5):
        forked(lambda: None)
    forked(child)
    thread.join(TIMEOUT)
    assert got == [b"for the waiting thread"]


def test_children_of_children(channel):
    def grandchild():
        channel.send(b"grandchild")

    def child():
        channel.send(b"child")
        forked(grandchild)
        channel.send(b"child again")

    forked(child)
    assert [channel.recv_bytes(timeout=0) for _ in range(3)] == [b"child", b"grandchild", b"child again"]


def test_threads_of_a_child_register_it_once(channel):
    forked(lambda: children.threads_in_child(channel, 4))
    assert sorted(bytes(view) for view in channel.recv_many(4, timeout=0)) == [b"0", b"1", b"2", b"3"]
    assert channel.stats().free_slots == 4


def test_many_forks_leak_no_place(name):
    with dsline.ShmChannel(name, capacity=4, slot_size=64, max_handles=4, timeout=TIMEOUT) as channel:
        for number in range(30):
            forked(lambda number=number: channel.send(b"%d" % number))
            assert channel.recv_bytes() == b"%d" % number
    assert name not in list_names()


def test_a_dead_parent_is_seen_although_a_child_lives_on(name):
    """A lock belongs to an open file, which a fork shares: the child must have given it up."""
    with dsline.ShmChannel(name, capacity=4, slot_size=64, timeout=TIMEOUT) as channel:
        channel.send(b"held")
        with Child("fork_and_hold", name) as parent:
            sequence, grandchild = parent.read()
            parent.kill()
            with channel.recv_message() as message:
                assert (message.sequence, message.redelivered) == (sequence, True)
            wait_until(lambda: not os.path.exists(f"/proc/{grandchild}"))
        assert channel.stats().free_slots == 4
