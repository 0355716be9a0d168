"""dsline.Queue, JoinableQueue and SimpleQueue within one process: what multiprocessing's promise, and what is better."""

import collections
import datetime
import multiprocessing
import os
import pickle
import queue
import threading
import types

import numpy as np
import pytest
from support import wait_until

import dsline
import dsline.multiprocessing
import dsline.queues

OBJECTS = [
    b"",
    b"x" * 64,
    b"y" * 300_000,
    "text",
    7,
    2**100,
    None,
    True,
    3.5,
    (1, "a", [2, {"b": {3}}]),
    bytearray(b"z" * 100_000),
    [b"w" * 100_000] * 3,
    "é" * 100_000,
    collections.OrderedDict(a=1),
    datetime.datetime(2026, 1, 2),
    collections.Counter("abc"),
    len,
    dsline.Queue,
    list(range(50_000)),
]

ARRAYS = [
    np.arange(3),
    np.arange(100_000.0),
    np.arange(10_000).reshape(100, 100).T,
    np.arange(20_000)[::2],
    np.zeros((0, 3)),
    np.array(5.0),
    np.arange(5).astype("M8[s]"),
    np.arange(5000).astype("M8[s]"),
    np.array(["a", "bb"]),
    np.array([f"{n}" for n in range(5000)]),
    np.array([1, None, "x"], object),
    np.arange(3000, dtype=">i4"),
    np.zeros(1000, [("a", "i4"), ("b", "f8")]),
    np.ones((3, 5, 7), bool),
    np.arange(2000, dtype=np.complex64),
    np.float64(3.25),
]


def end(q):
    """Wait for the feeding thread, which holds the memory of the queue."""
    q.close()
    q.join_thread()


@pytest.fixture(params=["Queue", "bounded Queue", "JoinableQueue", "SimpleQueue", "views"])
def any_queue(request):
    make = {
        "Queue": dsline.Queue,
        "bounded Queue": lambda: dsline.Queue(4),
        "JoinableQueue": dsline.JoinableQueue,
        "SimpleQueue": dsline.SimpleQueue,
        "views": lambda: dsline.Queue(copy=False),
    }[request.param]
    return make()


@pytest.mark.parametrize("obj", OBJECTS, ids=lambda obj: f"{type(obj).__name__}")
def test_objects_come_as_they_were_put(any_queue, obj):
    any_queue.put(obj)
    got = any_queue.get()
    assert got == obj
    assert type(got) is type(obj)
    assert any_queue.empty()


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_come_as_they_were_put(any_queue, array):
    any_queue.put({"array": array, "again": array})
    got = any_queue.get()
    assert got["array"] is got["again"]
    assert got["array"].dtype == array.dtype
    assert got["array"].shape == array.shape
    np.testing.assert_array_equal(got["array"], array)
    if array.ndim > 1:
        assert got["array"].flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize("size", [10, 1000, 1_000_000])
@pytest.mark.parametrize("writeable", [True, False])
def test_arrays_that_are_got_can_be_written(size, writeable):
    q = dsline.Queue()
    array = np.arange(size)
    array.flags.writeable = writeable
    q.put(array)
    q.put(array)
    got = q.get()
    got[:] = -1
    np.testing.assert_array_equal(q.get(), array)
    np.testing.assert_array_equal(array, np.arange(size))


def test_what_happens_to_an_object_after_put_does_not_reach_the_receiver():
    q = dsline.Queue()
    objects = [np.arange(1000.0), [1, 2], bytearray(100_000)]
    for _ in range(300):  # more than there are slots: some wait in private memory
        q.put(objects)
    objects[0][:] = -1
    objects[1].append(3)
    objects[2][0] = 9
    for _ in range(300):
        got = q.get()
        assert got[0][7] == 7 and got[1] == [1, 2] and got[2][0] == 0
    end(q)


def test_without_copy_arrays_are_views_until_too_many_are_held():
    q = dsline.Queue(copy=False)
    array = np.arange(1000)
    link = q._core_link()
    held = []
    for number in range(200):
        q.put(array + number)
        held.append(q.get())
        assert not held[-1].flags.writeable
    capacity = link.channel.capacity
    assert link.channel.stats().pinned_views == capacity // 4
    for number, got in enumerate(held):
        np.testing.assert_array_equal(got, array + number)
    del got
    held.clear()
    assert link.channel.stats().pinned_views == 0


def test_a_bounded_queue_of_views_is_bounded_by_number():
    q = dsline.Queue(3, copy=False)
    for number in range(3):
        q.put(np.full(2000, number))
    with pytest.raises(queue.Full):
        q.put_nowait(4)
    first = q.get()
    q.put_nowait(4)  # a view that is held takes no room
    with pytest.raises(queue.Full):
        q.put(5, timeout=0.01)
    assert first[0] == 0


@pytest.mark.parametrize("maxsize", [1, 2, 7, 1024, 1025, 3000])
def test_maxsize_counts_objects(maxsize):
    q = dsline.Queue(maxsize)
    assert not q.full()
    for number in range(maxsize):
        q.put_nowait(number)
    assert q.full()
    assert q.qsize() == maxsize
    for options in ({"block": False}, {"timeout": 0.01}, {"timeout": 0}, {"timeout": -1}):
        with pytest.raises(queue.Full):
            q.put("more", **options)
    assert q.get() == 0
    assert not q.full()
    q.put_nowait(maxsize)
    assert [q.get(timeout=5) for _ in range(maxsize)] == list(range(1, maxsize + 1))
    assert q.empty() and q.qsize() == 0
    end(q)


@pytest.mark.parametrize("maxsize", [0, -1])
def test_without_maxsize_put_never_waits_and_the_order_is_kept(maxsize):
    q = dsline.Queue(maxsize)
    count = 5000
    for number in range(count):
        q.put_nowait(number)
    assert q.qsize() == count
    assert not q.full()
    taken = [q.get(timeout=5) for _ in range(count // 2)]
    for number in range(count, count + 300):
        q.put(number)
    taken += [q.get(timeout=5) for _ in range(count // 2 + 300)]
    assert taken == list(range(count + 300))
    with pytest.raises(queue.Empty):
        q.get_nowait()
    q.close()
    q.join_thread()


def test_the_feeding_thread_ends_when_it_has_nothing_to_do():
    q = dsline.Queue()
    for number in range(400):
        q.put(number)
    assert q._core_link().feeding
    for _ in range(400):
        q.get(timeout=5)
    wait_until(lambda: not q._core_link().feeding)
    q.put("direct")
    assert not q._core_link().feeding
    assert q.get() == "direct"
    end(q)


@pytest.mark.parametrize("options", [{"block": False}, {"timeout": 0.01}, {"timeout": 0}, {"timeout": -1}])
def test_an_empty_queue_raises_empty(options):
    with pytest.raises(queue.Empty):
        dsline.Queue().get(**options)
    with pytest.raises(dsline.queues.Empty):
        dsline.Queue(2).get_nowait()


def test_a_bad_timeout_or_maxsize_is_refused():
    q = dsline.Queue()
    with pytest.raises(TypeError, match="timeout is a str"):
        q.put(1, timeout="1")
    with pytest.raises(TypeError, match="timeout is a str"):
        q.get(timeout="1")
    with pytest.raises(TypeError, match="maxsize is a str"):
        dsline.Queue("1")
    with pytest.raises(ValueError, match="maxsize"):
        dsline.Queue(1 << 63)


def test_put_waits_for_room_and_get_for_an_object():
    q = dsline.Queue(1)
    got = []
    thread = threading.Thread(target=lambda: got.extend(q.get() for _ in range(50)))
    thread.start()
    for number in range(50):
        q.put(number)
    thread.join(30)
    assert got == list(range(50))


@pytest.mark.parametrize("maxsize", [0, 3, 2000])
def test_many_threads_lose_nothing(maxsize):
    q = dsline.Queue(maxsize)
    count = 2000
    got = []

    def get():
        while (value := q.get()) is not None:
            got.append(value)

    def put(who):
        for number in range(count):
            q.put((who, number))

    getters = [threading.Thread(target=get) for _ in range(3)]
    putters = [threading.Thread(target=put, args=(who,)) for who in range(3)]
    for thread in getters + putters:
        thread.start()
    for thread in putters:
        thread.join(60)
    for _ in getters:
        q.put(None)
    for thread in getters:
        thread.join(60)
    assert sorted(got) == [(who, number) for who in range(3) for number in range(count)]
    end(q)


def test_one_getter_sees_the_order_of_each_putter():
    q = dsline.Queue()

    def put(who):
        for number in range(1500):
            q.put((who, number))

    putters = [threading.Thread(target=put, args=(who,)) for who in range(3)]
    for thread in putters:
        thread.start()
    last = [-1, -1, -1]
    for _ in range(4500):
        who, number = q.get(timeout=30)
        assert number == last[who] + 1
        last[who] = number
    for thread in putters:
        thread.join()
    end(q)


# --- what cannot be pickled ---------------------------------------------------------------------------------------------


class Unpicklable:
    def __reduce__(self):
        raise AttributeError("not today")


class BreaksWhenRead:
    def __reduce__(self):
        return int, ("not a number",)


@pytest.mark.parametrize(
    "make", [dsline.Queue, dsline.JoinableQueue, dsline.SimpleQueue, lambda: dsline.Queue(1)]
)
def test_put_raises_what_pickling_raises_and_puts_nothing(make):
    q = make()
    with pytest.raises(AttributeError, match="not today") as caught:
        q.put([1, Unpicklable()])
    assert "was not put into the queue" in caught.value.__notes__[0]
    with pytest.raises(Exception, match="lambda"):
        q.put(lambda: 0)
    assert q.empty()
    q.put("fine")
    assert q.get() == "fine"
    if isinstance(q, dsline.JoinableQueue):
        q.task_done()
        q.join()


def test_a_subclass_may_take_what_cannot_be_pickled():
    seen = []

    class Lenient(dsline.Queue):
        @staticmethod
        def _on_queue_feeder_error(error, obj):
            seen.append((type(error), type(obj)))

    q = Lenient(1)
    q.put(Unpicklable())
    q.put("fine")
    assert q.get() == "fine"
    assert seen == [(AttributeError, Unpicklable)]


def test_an_object_that_cannot_be_rebuilt_is_taken_as_from_the_original():
    q = dsline.Queue(1)
    q.put(BreaksWhenRead())
    with pytest.raises(ValueError, match="not a number"):
        q.get()
    q.put("next")
    assert q.get() == "next"


def test_pickling_may_put_into_the_same_queue():
    q = dsline.Queue()

    class Nested:
        def __reduce__(self):
            q.put("inner")
            return str, ("outer",)

    q.put(Nested())
    assert [q.get(), q.get()] == ["inner", "outer"]


def test_a_large_object_is_refused_by_name():
    q = dsline.Queue(max_message_size=10_000)
    with pytest.raises(dsline.MessageTooLargeError, match="max_message_size"):
        q.put(bytes(20_000))
    with pytest.raises(ValueError):
        q.put(np.zeros(20_000))
    for number in range(300):
        q.put(number)
    with pytest.raises(dsline.MessageTooLargeError):  # also where it would have to wait for room
        q.put(bytes(20_000))
    assert [q.get(timeout=5) for _ in range(300)] == list(range(300))
    end(q)


def test_reducers_of_multiprocessing_are_used_and_may_come_later():
    class Odd:
        def __init__(self, number):
            self.number = number

        def __reduce__(self):
            raise TypeError("only for multiprocessing")

    q = dsline.Queue()
    with pytest.raises(TypeError, match="only for multiprocessing"):
        q.put(Odd(3))
    pickler = multiprocessing.reduction.ForkingPickler
    pickler.register(Odd, lambda odd: (int, (odd.number,)))
    try:
        q.put([Odd(3)])
        assert q.get() == [3]
    finally:
        del pickler._extra_reducers[Odd]


def test_connections_go_through_a_queue():
    q = dsline.Queue()
    one, other = multiprocessing.Pipe()
    q.put(other)
    got = q.get()
    one.send("hello")
    assert got.recv() == "hello"
    for end in (one, other, got):
        end.close()
    multiprocessing.resource_sharer.stop()


# --- the end ------------------------------------------------------------------------------------------------------------


def test_a_closed_queue_refuses():
    for q in dsline.Queue(), dsline.JoinableQueue(), dsline.Queue(2):
        with pytest.raises(AssertionError, match="not closed"):
            q.join_thread()
        q.close()
        q.close()
        q.join_thread()
        with pytest.raises(ValueError, match="is closed"):
            q.put(1)
        with pytest.raises(ValueError, match="is closed"):
            q.get()
        assert q.empty() and q.qsize() == 0


def test_a_closed_simple_queue_refuses():
    q = dsline.SimpleQueue()
    q.put(1)
    q.close()
    q.close()
    for call in (lambda: q.put(1), q.get, q.empty):
        with pytest.raises(OSError, match="is closed"):
            call()


def test_join_thread_waits_for_what_was_put():
    q = dsline.Queue()
    for number in range(1000):
        q.put(number)
    q.close()
    thread = threading.Thread(target=q.join_thread)
    thread.start()
    channel = q._core_link().channel
    assert thread.is_alive()  # nobody has made room
    for _ in range(1000):
        with channel.recv_message(timeout=10):
            pass
    thread.join(30)
    assert not thread.is_alive()
    assert q._core_link().waiting_here() == 0


def test_shutdown_lets_what_was_put_be_got():
    q = dsline.Queue()
    for number in range(600):
        q.put(number)
    q.shutdown()
    with pytest.raises(dsline.ShutDown):
        q.put(1)
    assert [q.get() for _ in range(600)] == list(range(600))
    for options in ({}, {"block": False}, {"timeout": 1}):
        with pytest.raises(dsline.ShutDown):
            q.get(**options)
    q.shutdown()
    end(q)


def test_an_immediate_shutdown_discards_and_counts_as_done():
    q = dsline.JoinableQueue()
    for number in range(600):
        q.put(number)
    assert q.get() == 0
    q.shutdown(immediate=True)
    with pytest.raises(dsline.ShutDown):
        q.get()
    with pytest.raises(dsline.ShutDown):
        q.put(1)
    joiner = threading.Thread(target=q.join)
    joiner.start()
    q.task_done()  # the one that was got
    joiner.join(30)
    assert not joiner.is_alive()
    end(q)


@pytest.mark.parametrize("immediate", [False, True])
def test_shutdown_ends_those_that_wait(immediate):
    empty, full = dsline.Queue(), dsline.Queue(1)
    full.put(1)
    ended = []

    def wait(call):
        try:
            call()
        except dsline.ShutDown:
            ended.append(call)

    threads = [threading.Thread(target=wait, args=(call,)) for call in (empty.get, lambda: full.put(2))]
    for thread in threads:
        thread.start()
    empty.shutdown(immediate)
    full.shutdown(immediate)
    for thread in threads:
        thread.join(30)
    assert len(ended) == 2


def test_shut_down_is_the_exception_of_the_queue_module_where_it_has_one():
    assert getattr(queue, "ShutDown", dsline.ShutDown) is dsline.ShutDown
    assert issubclass(dsline.ShutDown, Exception)


# --- unfinished objects -------------------------------------------------------------------------------------------------


def test_task_done_more_often_than_put_is_an_error():
    q = dsline.JoinableQueue()
    with pytest.raises(ValueError, match=r"task_done\(\) called too many times"):
        q.task_done()
    for number in range(700):
        q.put(number)
    for _ in range(700):
        q.get(timeout=5)
        q.task_done()
    q.join()
    with pytest.raises(ValueError):
        q.task_done()
    end(q)


def test_join_waits_until_all_is_done():
    q = dsline.JoinableQueue(10)
    done = []

    def work():
        while (number := q.get()) is not None:
            done.append(number)
            q.task_done()
        q.task_done()

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for number in range(500):
        q.put(number)
    q.join()
    assert sorted(done) == list(range(500))
    for _ in workers:
        q.put(None)
    q.join()
    for worker in workers:
        worker.join(30)


# --- drop-in ------------------------------------------------------------------------------------------------------------


def test_queues_are_those_of_multiprocessing_for_isinstance():
    import multiprocessing.queues as theirs

    assert isinstance(dsline.Queue(), theirs.Queue)
    assert isinstance(dsline.JoinableQueue(), theirs.JoinableQueue)
    assert isinstance(dsline.JoinableQueue(), dsline.Queue)
    assert isinstance(dsline.SimpleQueue(), theirs.SimpleQueue)
    assert isinstance(dsline.Queue[int], types.GenericAlias)
    assert isinstance(dsline.SimpleQueue[int], types.GenericAlias)
    dsline.Queue(3, ctx=multiprocessing.get_context("spawn"))


@pytest.mark.parametrize("make", [dsline.Queue, dsline.JoinableQueue, dsline.SimpleQueue])
def test_a_queue_is_not_pickled_outside_of_starting_a_process(make):
    q = make()
    with pytest.raises(RuntimeError, match="should only be shared between processes through inheritance"):
        pickle.dumps(q)
    other = dsline.Queue()
    with pytest.raises(RuntimeError, match="through inheritance"):
        other.put(q)
    assert other.empty()


def test_dsline_multiprocessing_is_multiprocessing_with_these_queues():
    mp = dsline.multiprocessing
    for name in multiprocessing.__all__:
        assert hasattr(mp, name), name
        assert name in mp.__all__
    assert mp.Process is multiprocessing.Process
    assert mp.shared_memory is __import__("multiprocessing.shared_memory").shared_memory
    from dsline.multiprocessing.connection import wait

    assert wait is multiprocessing.connection.wait
    for method in multiprocessing.get_all_start_methods():
        context = mp.get_context(method)
        assert context.get_start_method() == method
        assert isinstance(context, type(multiprocessing.get_context(method)))
        assert context.Process is multiprocessing.get_context(method).Process
        for maker in (context, context.get_context(), mp):
            assert type(maker.Queue(3)) is dsline.Queue
            assert type(maker.JoinableQueue()) is dsline.JoinableQueue
            assert type(maker.SimpleQueue()) is dsline.SimpleQueue
    assert mp.get_context().Queue(7).full() is False
    with pytest.raises(ValueError, match="cannot find context"):
        mp.get_context("nothing")
    with pytest.raises(AttributeError):
        mp.nothing  # noqa: B018


def test_a_queue_that_is_dropped_leaves_no_descriptor(tmp_path):
    import gc

    def count():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    dsline.Queue().put(1)
    before = count()
    for _ in range(5):
        for make in (dsline.Queue, dsline.JoinableQueue, dsline.SimpleQueue):
            q = make()
            q.put(np.arange(1000))
            q.get()
    del q
    assert count() == before


def test_a_queue_is_not_made_of_other_descriptors():
    q = dsline.Queue()
    link = q._core_link()
    for descriptor in (link.channel.fileno_shared(), os.open("/dev/null", os.O_RDWR)):
        copy = os.dup(descriptor)
        if descriptor != link.channel.fileno_shared():
            os.close(descriptor)
        with pytest.raises(dsline.ChannelLayoutError):
            dsline.Queue.__new__(dsline.Queue)._build(link.channel, copy, 0, False, True)
