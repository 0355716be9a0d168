"""dsline's queues between real processes: start methods, deaths, what a process leaves behind, two hundred users."""

import contextlib
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import queue
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import numpy as np
import pytest
from support import TIMEOUT, run_script, wait_until

import dsline
import dsline.multiprocessing as mp

# pytest's timer is a thread, so that Python 3.12 and later warn about every fork here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

METHODS = ("fork", "spawn", "forkserver")


@pytest.fixture(scope="module", autouse=True)
def helpers():
    """The helper processes of multiprocessing live as long as pytest: their pipes are nobody's leak."""
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def started(context, *calls):
    """Processes that run `calls`, (function, *arguments) each; killed at the end where they still run."""
    processes = [context.Process(target=call[0], args=call[1:]) for call in calls]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


def joined(processes):
    for process in processes:
        process.join(TIMEOUT)
    return [process.exitcode for process in processes]


def _echo(there, back):
    while (obj := there.get()) is not None:
        back.put(obj)
    there.put("behind")


@pytest.mark.parametrize("method", METHODS)
def test_objects_there_and_back(method):
    context = mp.get_context(method)
    there, back = context.Queue(), context.JoinableQueue(3)
    with started(context, (_echo, there, back)) as processes:
        array = np.arange(200_000)
        for obj in [1, "text", b"bytes", {"a": [1, 2]}, array]:
            there.put(obj)
            got = back.get(timeout=TIMEOUT)
            assert type(got) is type(obj)
            np.testing.assert_array_equal(got, obj)
            back.task_done()
        got[:] = 0
        back.join()
        there.put(None)
        assert joined(processes) == [0]
        assert there.get(timeout=TIMEOUT) == "behind"


@pytest.mark.parametrize("method", METHODS)
def test_a_simple_queue_in_another_process(method):
    context = mp.get_context(method)
    there, back = context.SimpleQueue(), context.SimpleQueue()
    with started(context, (_echo, there, back)) as processes:
        for obj in (1, np.arange(100_000), None):
            there.put(obj)
            if obj is not None:
                np.testing.assert_array_equal(back.get(), obj)
        assert joined(processes) == [0]
        assert there.get() == "behind"


def _put_many(q, who, count):
    for number in range(count):
        q.put((who, number, np.full(300, number)))


def test_a_process_ends_only_when_what_it_put_is_in_shared_memory():
    context = get_context("fork")
    q = dsline.Queue()
    with started(context, (_put_many, q, 0, 2000)) as processes:
        assert q.get(timeout=TIMEOUT)[1] == 0
        assert processes[0].is_alive()  # 2000 objects do not fit
        for number in range(1, 2000):
            who, got, array = q.get(timeout=TIMEOUT)
            assert (who, got, array[299]) == (0, number, number)
        assert joined(processes) == [0]
    with pytest.raises(queue.Empty):
        q.get_nowait()


def _put_and_cancel(q):
    for number in range(2000):
        q.put(number)
    q.cancel_join_thread()


def test_cancel_join_thread_ends_the_process_without_waiting():
    context = get_context("fork")
    q = dsline.Queue()
    with started(context, (_put_and_cancel, q)) as processes:
        assert joined(processes) == [0]
        got = []
        with contextlib.suppress(queue.Empty):
            while True:
                got.append(q.get(timeout=0.2))
    # What was in shared memory already is not lost with the process.
    assert len(got) >= 256
    assert got == list(range(len(got)))


def _put_and_wait(q, told):
    for number in range(100):
        q.put(number)
    told.send("put")
    time.sleep(TIMEOUT)


def test_what_a_killed_process_has_put_is_there():
    context = get_context("fork")
    q = dsline.Queue()
    hears, tells = context.Pipe(False)
    with started(context, (_put_and_wait, q, tells)) as processes:
        assert hears.recv() == "put"
        processes[0].kill()
        assert joined(processes) == [-signal.SIGKILL]
    assert [q.get(timeout=TIMEOUT) for _ in range(100)] == list(range(100))
    hears.close()
    tells.close()


def _put_for_ever(q, who):
    number = 0
    while True:
        q.put((who, number, b"x" * (number % 5000)))
        number += 1


def _get_for_ever(q):
    while True:
        q.get()


@pytest.mark.parametrize("maxsize", [0, 1, 8])
def test_killed_putters_and_getters_stop_nobody(maxsize):
    """Processes are killed at random moments, most likely in the middle of put or get; the queue goes on."""
    context = get_context("fork")
    q = dsline.Queue(maxsize)
    rng = np.random.default_rng(maxsize)
    for turn in range(12):
        calls = [(_put_for_ever, q, turn), (_put_for_ever, q, turn), (_get_for_ever, q), (_get_for_ever, q)]
        with started(context, *calls) as processes:
            time.sleep(float(rng.uniform(0.005, 0.06)))
            for process in rng.permutation(processes):
                process.kill()
    # Nothing is whole but what was put whole, and this process puts and gets as before.
    left = 0
    with contextlib.suppress(queue.Empty):
        while True:
            _, number, text = q.get(timeout=0.3)
            assert text == b"x" * (number % 5000)
            left += 1
    assert left <= 256
    for number in range(50):
        q.put(number, timeout=TIMEOUT)
        assert q.get(timeout=TIMEOUT) == number
    assert q.empty()


def _stop_in_get(q, told):
    # Takes the message as get() does, and stays in the middle.
    message = q._core_link().channel.recv_message()
    told.send("taken")
    time.sleep(TIMEOUT)
    del message


def test_an_object_whose_getter_died_in_the_middle_comes_to_another():
    context = get_context("fork")
    q = dsline.Queue(1)
    hears, tells = context.Pipe(False)
    q.put("precious")
    with started(context, (_stop_in_get, q, tells)) as processes:
        assert hears.recv() == "taken"
        with pytest.raises(queue.Empty):
            q.get_nowait()
        processes[0].kill()
        assert q.get(timeout=TIMEOUT) == "precious"
    q.put_nowait("room again")
    assert q.get() == "room again"
    hears.close()
    tells.close()


def _work(q):
    while True:
        q.get()
        q.task_done()


def _get_and_stop(q, told):
    q.get()
    told.send("got")
    time.sleep(TIMEOUT)


def test_join_counts_over_processes():
    context = get_context("fork")
    q = dsline.JoinableQueue()
    with started(context, (_work, q), (_work, q)):
        for number in range(1000):
            q.put(number)
        q.join()
        assert q.empty()
    with pytest.raises(ValueError):
        q.task_done()
    q.close()
    q.join_thread()


def _fill_and_stop(q, told):
    for number in range(500):
        q.put(number)
    told.send("put")
    time.sleep(TIMEOUT)


def test_join_does_not_wait_for_what_died_with_its_putter():
    context = get_context("fork")
    q = dsline.JoinableQueue()
    hears, tells = context.Pipe(False)
    with started(context, (_fill_and_stop, q, tells)) as processes:
        assert hears.recv() == "put"
        assert q.qsize() == 500
        processes[0].kill()
        processes[0].join()
    got = 0
    with contextlib.suppress(queue.Empty):
        while True:
            assert q.get(timeout=0.3) == got
            q.task_done()
            got += 1
    assert 256 <= got < 500
    q.join()
    assert q.qsize() == 0
    hears.close()
    tells.close()


def test_shutdown_reaches_all_processes_when_the_last_object_is_taken():
    context = get_context("fork")
    q, done = dsline.Queue(), dsline.Queue()
    hears, tells = context.Pipe(False)
    with started(
        context, (_fill_and_stop, q, tells), *[(_get_until_shut_down, q, done) for _ in range(2)]
    ) as processes:
        assert hears.recv() == "put"
        q.shutdown()
        with pytest.raises(dsline.ShutDown):
            q.put(1)
        assert joined(processes[1:]) == [0, 0]
        assert sorted(done.get(timeout=TIMEOUT) + done.get(timeout=TIMEOUT)) == list(range(500))
    hears.close()
    tells.close()


def _get_until_shut_down(q, done):
    got = []
    try:
        while True:
            got.append(q.get())
    except dsline.ShutDown:
        done.put(got)


def _put_from_child(q):
    try:
        q.put("from the child")
    except ValueError:
        os._exit(7)


def test_a_forked_child_has_a_queue_of_its_own_state():
    context = get_context("fork")
    q = dsline.Queue()
    for number in range(400):  # a feeding thread, with objects that are the parent's to send
        q.put(number)
    q.close()
    # The child's queue is open again, as multiprocessing does it.
    with started(context, (_put_from_child, q)) as processes:
        channel = q._core_link().channel
        texts = []
        for _ in range(401):
            texts.append(channel.recv_bytes(timeout=TIMEOUT))
        assert joined(processes) == [0]
    assert sum(b"from the child" in text for text in texts) == 1
    assert len(set(texts)) == 401
    q.join_thread()


class Counted(dsline.Queue):
    """The usual way to extend multiprocessing's queue."""

    def __init__(self, *args, **options):
        super().__init__(*args, ctx=get_context("spawn"), **options)
        self.counter = dsline.ShmChannel()

    def __getstate__(self):
        return (super().__getstate__(), self.counter)

    def __setstate__(self, state):
        super().__setstate__(state[0])
        self.counter = state[1]

    def put(self, *args, **options):
        super().put(*args, **options)
        self.counter.send(b"")


def _put_twice(q):
    q.put(1)
    q.put(2)


def test_a_subclass_with_state_of_its_own_travels():
    q = Counted()
    with started(get_context("spawn"), (_put_twice, q)) as processes:
        assert joined(processes) == [0]
    assert (q.get(), q.get(), len(q.counter)) == (1, 2, 2)


def _use(q, back):
    back.put(q.get(timeout=TIMEOUT))


def test_two_hundred_processes_use_one_queue():
    context = get_context("fork")
    q, back = dsline.Queue(), dsline.Queue()
    count = 200
    with started(context, *[(_use, q, back) for _ in range(count)]) as processes:
        wait_until(lambda: q._core_link().channel.stats().participants > count)
        for number in range(count):
            q.put(number)
        assert sorted(back.get(timeout=TIMEOUT) for _ in range(count)) == list(range(count))
        assert joined(processes) == [0] * count


MODULE_SCRIPT = """
import sys
import dsline.multiprocessing as mp
import numpy as np

def square(x):
    return x * x

def work(q, done):
    for item in iter(q.get, None):
        done.put(item["array"].sum())

if __name__ == "__main__":
    mp.set_start_method(sys.argv[1])
    q, done = mp.Queue(), mp.SimpleQueue()
    process = mp.Process(target=work, args=(q, done))
    process.start()
    q.put({"array": np.ones((100, 100))})
    q.put(None)
    assert done.get() == 10_000
    process.join()
    assert process.exitcode == 0
    with mp.Pool(2) as pool, mp.get_context(sys.argv[1]).Pool(1) as other:
        assert pool.map(square, range(10)) == [x * x for x in range(10)]
        assert other.apply(square, (3,)) == 9
    with mp.Manager() as manager:
        assert list(manager.list([1])) == [1]
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(2, mp_context=mp.get_context(sys.argv[1])) as executor:
        assert list(executor.map(square, range(20))) == [x * x for x in range(20)]
    print(type(q).__module__, mp.get_start_method())
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_program_with_the_other_import(method, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(MODULE_SCRIPT)
    done = subprocess.run(
        [sys.executable, script, method], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.split() == ["dsline.queues", method]


INTERRUPTED_SCRIPT = """
import _thread, dsline, threading, time
q = dsline.Queue(1)
q.put(0)
for call in (lambda: q.put(1), lambda: (q.get(), q.get())):
    threading.Timer(0.2, _thread.interrupt_main).start()
    try:
        call()
    except KeyboardInterrupt:
        print("interrupted")
q.put(2)
print(q.get())
"""


def test_ctrl_c_ends_waiting():
    done = run_script(INTERRUPTED_SCRIPT)
    assert (done.stdout.split(), done.stderr) == (["interrupted", "interrupted", "2"], "")
