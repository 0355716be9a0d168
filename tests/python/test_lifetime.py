"""Views and what they keep: they outlive everything, and what they hold is never overwritten."""

import gc
import weakref

import numpy as np
import pytest
from support import STRICT, Child, assert_clean, run_script, wait_until

import dsline
from dsline._core import list_names
from dsline.testing import leaks


def receive_view(channel):
    return channel.recv(timeout=0)


def receive_array(channel):
    return channel.recv_array(timeout=0)


def receive_payload(channel):
    return channel.recv_message(timeout=0).payload


def receive_message_array(channel):
    return channel.recv_message(timeout=0).array()


def receive_wrapped(channel):
    return np.asarray(channel.recv(timeout=0))


def receive_bare(channel):
    view = channel.recv(timeout=0)
    return np.ndarray((4,), np.int32, buffer=view)


HOLDS = [receive_view, receive_array, receive_payload, receive_message_array, receive_wrapped, receive_bare]
ARRAY = np.array([1, 2, 3, 4], np.int32)


@pytest.mark.parametrize("receive", HOLDS)
def test_a_view_holds_its_slot_until_it_is_gone(make_any, receive):
    channel = make_any(capacity=2, slot_size=64)
    channel.send(ARRAY)
    view = receive(channel)
    assert (channel.stats().pinned_slots, channel.stats().pinned_views) == (1, 1)
    for _ in range(10):
        channel.send(ARRAY * 5, timeout=0)
        channel.recv_bytes(timeout=0)
    np.testing.assert_array_equal(np.asarray(view), ARRAY)
    del view
    assert (channel.stats().pinned_slots, channel.stats().free_slots) == (0, 2)


@pytest.mark.parametrize("receive", HOLDS)
def test_a_view_outlives_close_and_the_channel_object(make_any, receive):
    channel = make_any(capacity=2, slot_size=64)
    channel.send(ARRAY)
    view = receive(channel)
    channel.close()
    np.testing.assert_array_equal(np.asarray(view), ARRAY)
    del channel
    gc.collect()
    np.testing.assert_array_equal(np.asarray(view), ARRAY)


@pytest.mark.parametrize("receive", HOLDS)
def test_a_view_outlives_its_name_and_all_handles(name, receive):
    with leaks():
        channel = dsline.ShmChannel(name, capacity=2, slot_size=64)
        channel.send(ARRAY)
        view = receive(channel)
        channel.unlink()
        del channel
        gc.collect()
        assert name not in list_names()
        np.testing.assert_array_equal(np.asarray(view), ARRAY)
        del view


def test_the_last_view_of_a_closed_channel_removes_its_name(name):
    channel = dsline.ShmChannel(name, capacity=2, slot_size=64)
    channel.send(ARRAY)
    view = channel.recv(timeout=0)
    channel.close()
    assert name in list_names(), "a message in somebody's hands is not done"
    del view
    assert name not in list_names()


def test_a_view_outlives_the_sending_process(name):
    with dsline.ShmChannel(name, capacity=4, slot_size=64, timeout=30) as channel:
        with Child("send_proofs", name, 1, 0, 3) as child:
            assert child.read() == "sent 3"
            view = channel.recv()
            child.kill()
            assert np.asarray(view)[1] == 0
            assert [int(np.asarray(channel.recv())[1]) for _ in range(2)] == [1, 2]
        wait_until(lambda: has_recovered(channel))
        assert np.asarray(view)[1] == 0
        del view


def has_recovered(channel):
    """Wait a little as a receiver, who looks for the dead meanwhile."""
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv(timeout=0.1)
    return channel.stats().participants == 1


def test_slices_casts_and_arrays_of_views_keep_the_slot(make_channel):
    channel = make_channel(capacity=1, slot_size=256, max_pinned="unlimited")
    derivations = {
        "slice": lambda view: view[1:3],
        "cast": lambda view: view.cast("i"),
        "toreadonly": lambda view: view.toreadonly(),
        "memoryview": memoryview,
        "asarray": np.asarray,
        "frombuffer": lambda view: np.frombuffer(view, np.uint8),
        "row": lambda view: np.asarray(view)[2:],
        "dtype view": lambda view: np.asarray(view).view(np.int16),
        "reshape": lambda view: np.asarray(view).reshape(4, 4).T,
        "in a list": lambda view: [view],
        "flat": lambda view: np.asarray(view).flat,
    }
    for what, derive in derivations.items():
        channel.send(bytes(range(16)))
        view = channel.recv(timeout=0)
        derived = derive(view)
        del view
        gc.collect()
        assert channel.stats().pinned_slots == 1, what
        del derived
        assert channel.stats().pinned_slots == 0, what


@pytest.mark.parametrize("receive", HOLDS)
def test_writing_raises(make_any, receive):
    channel = make_any(capacity=1, slot_size=64)
    channel.send(ARRAY)
    view = receive(channel)
    if isinstance(view, memoryview):
        with pytest.raises(TypeError, match="read-only"):
            view[0] = 1
    array = np.asarray(view)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.setflags(write=True)
    np.testing.assert_array_equal(array, ARRAY)


def test_the_error_for_writing_names_the_way_out(make_channel):
    channel = make_channel(capacity=1, slot_size=64)
    channel.send(b"12345678")
    view = channel.recv(timeout=0)
    with pytest.raises(BufferError, match=r"copy=True"):
        channel.recv_into(view.obj)


def test_many_views_fill_the_channel_and_its_error_says_so(make_any):
    channel = make_any(capacity=64, slot_size=64, max_pinned="unlimited")
    views = []
    for number in range(64):
        channel.send(b"%d" % number, timeout=0)
        views.append(channel.recv(timeout=0))
    with pytest.raises(
        dsline.BufferFullError, match=r"64 are held by receivers \(64 by views of this handle\)"
    ):
        channel.send(b"one more", timeout=0)
    assert [bytes(view) for view in views] == [b"%d" % number for number in range(64)]
    del views[10]
    assert channel.send(b"one more", timeout=0)
    assert channel.stats().pinned_views == 63


def test_views_of_another_handle_are_told_apart(name):
    with (
        dsline.ShmChannel(name, capacity=2, slot_size=64) as mine,
        dsline.ShmChannel(name, max_pinned=1) as theirs,
    ):
        mine.send_many([b"0", b"1"])
        held = [mine.recv(timeout=0), theirs.recv(timeout=0)]
        with pytest.raises(
            dsline.BufferFullError, match=r"2 are held by receivers \(1 by views of this handle\)"
        ):
            mine.send(b"2", timeout=0)
        del held


class Node:
    def __init__(self, view):
        self.view = view
        self.self = self


def test_views_in_cycles_are_released_by_the_collector(make_channel):
    channel = make_channel(capacity=2, slot_size=64)
    channel.send(ARRAY)
    node = Node(np.asarray(channel.recv(timeout=0)))
    watched = weakref.ref(node)
    del node
    gc.collect()
    assert watched() is None
    assert channel.stats().free_slots == 2


def test_a_channel_in_a_cycle_with_its_views_goes_away(name):
    with leaks():
        channel = dsline.ShmChannel(name, capacity=2, slot_size=64)
        channel.send(ARRAY)
        node = Node(channel.recv(timeout=0))
        node.channel = channel
        node.bound = channel.recv
        del channel, node
        gc.collect()
    assert name not in list_names()


def test_release_of_a_memoryview_frees_the_slot(make_channel):
    channel = make_channel(capacity=1, slot_size=64, max_pinned="unlimited")
    channel.send(b"12345678")
    view = channel.recv(timeout=0)
    view.release()
    assert channel.stats().free_slots == 1
    channel.send(b"12345678")
    with channel.recv(timeout=0) as view:
        array = np.asarray(view)
    assert channel.stats().free_slots == 0
    assert array.tobytes() == b"12345678"
    del array
    assert channel.stats().free_slots == 1


def test_repeated_exchange_does_not_grow_memory():
    def exchange(channel):
        for number in range(3000):
            channel.send(np.arange(number % 50), meta={"n": number})
            with channel.recv_message(timeout=0) as message:
                assert message.array().shape == (number % 50,)
            channel.send(b"x")
            channel.recv(timeout=0)

    with dsline.ShmChannel(storage="heap", capacity=4, slot_size=1024) as channel:
        exchange(channel)
        with leaks(memory_bytes=1 << 20):
            exchange(channel)
            exchange(channel)


def test_opening_and_closing_does_not_grow_memory(name):
    def cycle():
        for _ in range(50):
            with dsline.ShmChannel(name, capacity=4, slot_size=64) as channel:
                channel.send(ARRAY)
                channel.recv(timeout=0)

    cycle()
    with leaks(memory_bytes=1 << 20):
        cycle()


# --- the end of the interpreter ---------------------------------------------------------------------------------

PREAMBLE = """
import sys
import numpy as np
import dsline

channel = dsline.ShmChannel(sys.argv[1] or None, capacity=8, slot_size=64)
for number in range(4):
    channel.send(np.arange(4))
"""

ENDINGS = {
    "views alive": "view = channel.recv(); array = channel.recv_array(); message = channel.recv_message()",
    "views of a closed channel": "view = channel.recv(); array = np.asarray(channel.recv()); channel.close()",
    "views without a channel": "view = channel.recv(); array = np.asarray(view)[1:]; del channel",
    "views in a module": "import json; json.kept = channel.recv_array(); json.channel = channel",
    "views in a cycle": "loop = [channel.recv(), channel]; loop.append(loop)",
    "an array whose memoryview is hidden": "array = np.ndarray((4,), np.int64, buffer=channel.recv())",
    "a thread that waits": (
        "import threading; view = channel.recv(); channel.recv_many(3); "
        "threading.Thread(target=channel.recv, daemon=True).start()"
    ),
    "an exception": "view = channel.recv(); sys.excepthook = lambda *error: None; 1 / 0",
    "sys.exit inside a block": "\nwith channel.recv_message() as message:\n    kept = message.array()\n    sys.exit(0)",
    "views in an atexit handler": (
        "import atexit; view = channel.recv(); atexit.register(lambda: (bytes(view), len(channel)))"
    ),
    "a finalizer that uses the channel": (
        "\nclass Late:\n    def __del__(self, channel=channel):\n"
        "        try:\n            channel.send(b'late')\n        except dsline.DslineError:\n            pass\n"
        "late = Late()"
    ),
}


@pytest.mark.parametrize("storage", ["named", "anonymous"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_in_silence(name, ending, storage):
    done = run_script(PREAMBLE + ENDINGS[ending], name if storage == "named" else "")
    expected = 1 if ending == "an exception" else 0
    assert (done.returncode, done.stderr, done.stdout) == (expected, "", "")
    if storage == "named" and name in list_names():
        # Messages may be left; none of them was redelivered, for a process that ends in order has not died.
        with dsline.ShmChannel(name, timeout=0) as channel:
            assert len(channel) <= 5  # one of them from the finalizer
            while not channel.empty:
                with channel.recv_message() as message:
                    assert message.redelivered is (
                        ending == "sys.exit inside a block" and message.sequence == 0
                    )


def test_importing_is_silent_and_starts_nothing():
    done = run_script(
        "import threading, os, sys, dsline; "
        "assert threading.active_count() == 1; assert len(os.listdir('/proc/self/task')) == 1 or 'numpy' in sys.modules"
    )
    assert_clean(done)


def test_what_is_held_at_an_orderly_end_is_not_redelivered(name):
    with dsline.ShmChannel(name, capacity=4, slot_size=64) as channel:
        channel.send_many([b"0", b"1"])
        done = run_script(
            "import sys, dsline; ch = dsline.ShmChannel.open(sys.argv[1]); view = ch.recv()", name
        )
        assert_clean(done)
        assert channel.recv_message(timeout=0).sequence == 1
        with pytest.raises(dsline.BufferEmptyError):
            channel.recv(timeout=0.2)
        assert channel.stats().free_slots == 4


def test_the_flags_of_these_programs_are_strict():
    assert STRICT == ("-X", "dev", "-W", "error")
    assert run_script("import warnings; warnings.warn('x')").returncode == 1
