"""WorkerPool: results, order, laziness, errors, dead workers, and ends."""

import concurrent.futures
import contextlib
import functools
import gc
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import worker_functions as wf
from support import STRICT, TIMEOUT, assert_clean, check_proof, forked, proof, wait_until

import dsline
from dsline.dataflow import processes
from dsline.dataflow.restart import Restart
from dsline.errors import (
    MessageTooLargeError,
    OperatorError,
    PeerDiedError,
    PipelineBuildError,
    SerializationError,
)

FOLDER = str(Path(__file__).parent)


@pytest.fixture(scope="module", autouse=True)
def helpers():
    """The helper processes live as long as pytest: their pipes are nobody's leak."""
    multiprocessing.resource_tracker.ensure_running()
    processes._fork_server(os.environ)


@pytest.fixture(scope="module")
def pool():
    """For tests in which no worker dies."""
    with dsline.WorkerPool(2) as pool:
        pool.submit(abs, 1).result(TIMEOUT)  # from here on it maps nothing more
        yield pool


def quick(workers=1, **options):
    return dsline.WorkerPool(workers, start_method="forkserver", **options)


def result(future):
    return future.result(TIMEOUT)


# --- results ------------------------------------------------------------------------------------------------------------


def test_it_is_an_executor(pool):
    assert isinstance(pool, concurrent.futures.Executor)
    future = pool.submit(pow, 2, 5)
    assert result(future) == 32 and future.done() and not future.cancelled()
    assert result(pool.submit(int, "ff", base=16)) == 255
    futures = [pool.submit(wf.slowly, 0, i) for i in range(20)]
    done = {f.result() for f in concurrent.futures.as_completed(futures, TIMEOUT)}
    assert done == set(range(20))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10),
        np.arange(3_000_000, dtype=np.float32).reshape(1000, 3000),
        np.asfortranarray(np.arange(20_000).reshape(100, 200)),
        np.arange(20_000)[::2],
        np.zeros((0, 5)),
        np.array(3.5),
        np.zeros(2000, [("a", "i4"), ("b", "f8")]),
        np.array(["a", None], dtype=object),
        np.arange(2000).astype("M8[s]"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_there_and_back(pool, array):
    back = result(pool.submit(wf.same, array))
    assert back.dtype == array.dtype and back.shape == array.shape
    assert (back == array).all()
    assert (back.flags.c_contiguous, back.flags.f_contiguous) == (
        array.flags.c_contiguous,
        array.flags.f_contiguous,
    ) or (not array.flags.forc and back.flags.c_contiguous)


def test_arrays_inside_of_other_things(pool):
    big, small = np.arange(100_000), np.arange(3)
    back = result(pool.submit(wf.twice, {"a": [big, small], "b": (big, {"c": big}), "d": 4}))
    assert (back["a"][0] == 2 * big).all() and (back["a"][1] == 2 * small).all()
    assert (back["b"][1]["c"] == 2 * big).all() and back["d"] == 8
    back["a"][0][0] = 7  # writable, and nobody else's
    assert back["b"][0][0] == 0


def test_arguments_are_read_only_views_unless_asked_otherwise(pool):
    array = np.ones(10_000)
    assert result(pool.submit(wf.describe, array)) == (10_000, False, (10_000,), "<f8")
    with pytest.raises(ValueError, match="read-only"):
        result(pool.submit(wf.add_in_place, array))
    with quick(copy=True) as other:
        assert (result(other.submit(wf.add_in_place, array)) == 2).all()
    assert (array == 1).all()


def test_results_as_views():
    with quick(copy=False, queue=2) as pool:
        kept = [result(pool.submit(wf.ones, 100_000)) for _ in range(20)]  # more than there are slots
        assert not kept[0].flags.writeable
        assert all((each == 1).all() for each in kept)


def test_views_that_a_function_keeps_stop_nothing():
    with quick(queue=2) as pool:
        for i in range(20):
            count, first = result(pool.submit(wf.keep, np.full(10_000, i)))
            assert (count, first) == (i + 1, 0)


def test_functions_of_all_kinds(pool):
    factor = 3

    class Scale:
        def __init__(self, by):
            self.by = by
            self.calls = 0

        def __call__(self, x):
            self.calls += 1
            return x * self.by, self.calls

    assert result(pool.submit(lambda x: x * factor, 5)) == 15
    assert result(pool.submit(functools.partial(pow, 2), 3)) == 8
    assert [result(pool.submit(Scale(4), 2)) for _ in range(3)] == [(8, 1)] * 3  # each task has its own
    assert result(pool.submit(np.add, 1, 2)) == 3
    assert result(pool.submit([1, 2, 3].index, 2)) == 1
    assert result(pool.submit(Scale, 2)).by == 2  # of a class that only this function knows


def test_what_functions_refer_to_is_taken_when_they_are_submitted(pool):
    table = {"x": 1}

    def look(_):
        return table["x"]

    assert result(pool.submit(look, 0)) == 1
    table["x"] = 2
    assert result(pool.submit(look, 0)) == 2


# --- map ----------------------------------------------------------------------------------------------------------------


def test_map_is_ordered(pool):
    seconds = [0.02 * (i % 3) for i in range(12)]
    assert list(pool.map(wf.slowly, seconds, range(12))) == list(range(12))
    assert list(pool.map(pow, [2, 3, 4], itertools.repeat(2))) == [4, 9, 16]
    assert list(pool.map(pow, [], [])) == []


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_map_in_chunks_and_in_any_order(pool, chunksize):
    assert list(pool.map(abs, range(-20, 0), chunksize=chunksize)) == list(range(20, 0, -1))
    found = list(pool.map(abs, range(-20, 0), chunksize=chunksize, ordered=False))
    assert sorted(found) == list(range(1, 21))


def test_results_in_any_order_do_not_wait_for_the_first(pool, tmp_path):
    gate = tmp_path / "gate"

    def wait(i):
        if i == 0:
            wf.wait_for_file(gate)
        return i

    results = pool.map(wait, range(6), ordered=False)
    assert sorted(next(results) for _ in range(5)) == [1, 2, 3, 4, 5]
    gate.touch()
    assert list(results) == [0]


@pytest.mark.parametrize("ordered", [True, False])
def test_map_takes_from_an_endless_generator_as_results_are_consumed(pool, ordered):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield np.full(2000, taken)

    results = pool.map(np.max, endless(), buffersize=5, ordered=ordered)
    assert taken == 5
    for consumed in range(1, 50):
        next(results)
        assert taken == consumed + 5
    results.close()
    window = pool._window
    taken = 0
    results = pool.map(np.max, endless(), ordered=ordered)
    assert taken == window
    results.close()


def test_an_iterable_that_fails_after_some_items(pool):
    def items():
        yield from range(3)
        raise OSError("the source broke")

    results = pool.map(abs, items())
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the source broke"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_an_exception_in_map_comes_in_its_place_and_ends_it(pool):
    results = pool.map(wf.divide, [4, 4, 4], [2, 0, 1])
    assert next(results) == 2
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


@pytest.mark.parametrize("ordered", [True, False])
def test_map_has_a_timeout(pool, tmp_path, ordered):
    gate = tmp_path / "gate"
    results = pool.map(wf.wait_for_file, [gate], timeout=0.05, ordered=ordered)
    with pytest.raises(TimeoutError, match="timeout"):
        next(results)
    gate.touch()


def test_map_after_the_end_of_the_pool_says_what_to_do():
    with quick() as pool:
        results = pool.map(abs, itertools.count(), buffersize=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match="after shutdown"):
        next(results)


# --- errors -------------------------------------------------------------------------------------------------------------


def test_exceptions_come_with_the_workers_traceback(pool):
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        result(pool.submit(wf.divide, 1, 0))
    assert "in divide" in str(caught.value.__cause__)
    with pytest.raises(KeyError) as caught:
        result(pool.submit(wf.fail_with, KeyError, "x"))
    assert caught.value.args == ("x",)
    with pytest.raises(SystemExit):
        result(pool.submit(sys.exit, 3))


def test_an_exception_that_cannot_be_pickled(pool):
    with pytest.raises(OperatorError, match="LockedError: what it says") as caught:
        result(pool.submit(wf.fail_with, wf.LockedError, "what it says"))
    assert "in fail_with" in str(caught.value.__cause__)


def test_what_cannot_be_pickled_fails_alone(pool):
    good = [pool.submit(abs, -1)]
    bad = pool.submit(abs, threading.Lock())
    good.append(pool.submit(abs, -1))
    worse = pool.submit(wf.lock)
    wrong = pool.submit(wf.same, wf.Unloadable(KeyError("nothing there")))
    leaving = [pool.submit(wf.make, kind) for kind in (wf.ExitsWhenPickled, wf.ExitsInTheParent)]
    good.append(pool.submit(abs, -1))
    for future in leaving:
        with pytest.raises(SerializationError, match="SystemExit"):
            result(future)
    with pytest.raises(SerializationError, match=r"arguments of abs .*lock"):
        result(bad)
    with pytest.raises(SerializationError, match=r"the result, a lock"):
        result(worse)
    with pytest.raises(SerializationError, match="nothing there"):
        result(wrong)
    assert [result(each) for each in good] == [1, 1, 1]
    gate = threading.Lock()
    with pytest.raises(PipelineBuildError, match="'gate'"):
        pool.submit(lambda: gate)
    with pytest.raises(TypeError, match="cannot be called"):
        pool.submit(3)


def test_many_that_cannot_be_pickled_behind_each_other(pool, tmp_path):
    gate = tmp_path / "gate"
    held = [pool.submit(wf.wait_for_file, gate) for _ in range(pool._engine.limit)]
    bad = [pool.submit(abs, threading.Lock()) for _ in range(3000)]
    last = pool.submit(abs, -3)
    gate.touch()
    for future in bad:
        assert isinstance(future.exception(TIMEOUT), SerializationError)
    assert result(last) == 3
    concurrent.futures.wait(held, TIMEOUT)


def test_too_large():
    with quick(max_message_size=100_000) as pool:
        with pytest.raises(MessageTooLargeError):
            result(pool.submit(len, bytes(200_000)))
        with pytest.raises(MessageTooLargeError):
            result(pool.submit(wf.ones, 200_000))
        assert len(result(pool.submit(wf.ones, 90_000))) == 90_000


def test_larger_than_the_slots():
    with quick(slot_size=1000) as pool:
        for size in (10, 10_000, 10_000_000, 10):
            assert result(pool.submit(wf.ones, size)).sum() == size
            assert result(pool.submit(np.sum, np.ones(size, np.uint8))) == size


@pytest.mark.parametrize(
    "options",
    [
        {"max_workers": 0},
        {"max_workers": 101},
        {"max_workers": 1.5},
        {"queue": 0},
        {"copy": "all"},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"max_deliveries": 15},
        {"max_tasks_per_child": 0},
        {"start_method": "fork"},
        {"mp_context": multiprocessing.get_context("fork")},
        {"threads": 0},
        {"cpus": [10**6]},
        {"slot_size": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_wrong_options(options):
    with pytest.raises(
        ValueError, match=next(iter(options)).replace("mp_context", "start method").replace("_", ".")
    ):
        dsline.WorkerPool(**{"max_workers": 1, **options})


def test_wrong_arguments_of_map(pool):
    for options in ({"chunksize": 0}, {"buffersize": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            pool.map(abs, [1], **options)


# --- settings of workers ------------------------------------------------------------------------------------------------


def test_initializer_threads_and_cpus():
    cpu = max(os.sched_getaffinity(0))
    with quick(initializer=wf.greet, initargs=("hello",), threads=2, cpus=[cpu], env={"A": "b"}) as pool:
        assert result(pool.submit(wf.greeting)) == "hello"
        threads, cpus = result(pool.submit(wf.inner_threads))
        assert cpus == [cpu] and max(threads) == 2
        assert result(pool.submit(os.getenv, "A")) == "b"


def test_locks_and_channels_as_initargs():
    context = multiprocessing.get_context("spawn")
    with (
        wf.anonymous() as channel,
        quick(initializer=wf.greet, initargs=((context.Lock(), channel),)) as pool,
    ):
        assert result(pool.submit(lambda: type(wf.greeting()[1]).__name__)) == "ShmChannel"


def test_an_initializer_that_fails_breaks_the_pool():
    with quick(initializer=wf.fail_with, initargs=(KeyError, "no model")) as pool:
        for _ in range(2):
            with pytest.raises(
                PeerDiedError, match=r"failed to start: KeyError: 'no model'\n[\s\S]*in fail_with"
            ):
                result(pool.submit(abs, 1))


def test_max_tasks_per_child():
    with quick(max_tasks_per_child=2, restart=Restart(max=0)) as pool:
        pids = [result(pool.submit(wf.pid_of)) for _ in range(5)]
        assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]
        assert pool.restarts == 0


# --- dead workers -------------------------------------------------------------------------------------------------------


def test_a_task_whose_worker_dies_is_done_by_another(tmp_path):
    with quick(2) as pool:
        assert result(pool.submit(wf.die_at_first, tmp_path / "calls", "done")) == "done"
        assert (tmp_path / "calls").stat().st_size == 2
        assert pool.restarts == 1
        assert len(wait_until(lambda: len(pool.pids) == 2 and pool.pids)) == 2


def test_a_task_that_kills_every_worker_fails_and_the_pool_goes_on():
    with quick(2, max_deliveries=2) as pool:
        others = [pool.submit(wf.slowly, 0.01, i) for i in range(10)]
        poison = pool.submit(wf.die)
        others += [pool.submit(wf.slowly, 0.01, i) for i in range(10)]
        with pytest.raises(
            PeerDiedError, match=r"2 workers died over this task, die, .*SIGKILL.*max_deliveries=2"
        ):
            result(poison)
        assert [result(each) for each in others] == [*range(10), *range(10)]
        assert pool.restarts == 2


def test_never_again_with_one_delivery(tmp_path):
    with quick(max_deliveries=1) as pool:
        with pytest.raises(PeerDiedError, match="the worker died over this task"):
            result(pool.submit(wf.die_at_first, tmp_path / "calls", 1))
        assert (tmp_path / "calls").stat().st_size == 1


def test_too_many_deaths_break_the_pool():
    with quick(restart=Restart(max=1, delay=0), max_deliveries=14) as pool:
        futures = [pool.submit(wf.die) for _ in range(20)]
        for future in futures:
            with pytest.raises(PeerDiedError, match="die too often: 2 deaths within 60 s"):
                result(future)
        with pytest.raises(concurrent.futures.BrokenExecutor, match="die too often"):
            pool.submit(abs, 1)
        with pytest.raises(PeerDiedError, match="die too often"):
            list(pool.map(abs, [1]))
    assert pool.pids == []


def test_workers_killed_from_outside_lose_nothing_and_double_nothing():
    number = 200
    chance = random.Random(7)
    with quick(2, restart=Restart(max=1000, delay=0.001, max_delay=0.01), max_deliveries=14) as pool:
        payloads = (proof(1, n, chance.choice([16, 500, 50_000])) for n in range(number))
        found = []
        for result in pool.map(wf.prove, payloads, itertools.repeat(2)):
            found.append(check_proof(result))
            if chance.random() < 0.15:
                time.sleep(chance.uniform(0, 0.002))  # to hit the workers in all that they do
                for pid in pool.pids[: chance.choice([1, 1, 1, 2])]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        assert found == [(2, n) for n in range(number)]
        assert pool.restarts > 10


def test_a_task_that_takes_too_long():
    with quick(2, timeout=0.3, restart=Restart(max=0)) as pool:
        late = pool.submit(wf.slowly, 1000)
        stopped = pool.submit(os.kill, 0, 0) and pool.submit(lambda: os.kill(os.getpid(), signal.SIGSTOP))
        for future in (late, stopped):
            with pytest.raises(TimeoutError, match=r"was not done after 0.3 s; its worker was killed"):
                result(future)
        assert result(pool.submit(abs, -2)) == 2
        assert pool.restarts == 0


def test_more_late_tasks_than_there_are_slots():
    """Each leaves a message behind that the next worker has to ask about; the places of all of them are needed."""
    with quick(1, timeout=0.02, queue=1, restart=Restart(max=0)) as pool:
        number = 2 * pool._engine.tasks.capacity
        late = [pool.submit(wf.slowly, 1000) for _ in range(number)]
        for future in late:
            with pytest.raises(TimeoutError, match="was not done after"):
                result(future)
        assert pool.restarts == 0


# --- from several sides -------------------------------------------------------------------------------------------------


def test_many_more_tasks_than_places(pool):
    futures = [pool.submit(abs, -i) for i in range(2000)]
    assert [result(each) for each in futures] == list(range(2000))


def test_several_threads(pool):
    def use(number):
        array = np.full(5000, number)
        return [int(m) for m in pool.map(np.max, [array] * 50)] == [number] * 50

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        assert all(threads.map(use, range(12), timeout=TIMEOUT))


def test_callbacks_may_submit_and_fail(pool, caplog):
    done = threading.Event()
    found = []

    def again(future):
        if future.result() < 5:
            pool.submit(wf.slowly, 0, future.result() + 1).add_done_callback(again)
        else:
            found.append(future.result())
            done.set()
        raise KeyError("a callback's own trouble")

    pool.submit(wf.slowly, 0, 0).add_done_callback(again)
    assert done.wait(TIMEOUT)
    assert found == [5]
    assert result(pool.submit(abs, -1)) == 1


def test_cancel(tmp_path):
    with quick(queue=1) as pool:
        gate = tmp_path / "gate"
        first = pool.submit(wf.wait_for_file, gate)
        waiting = [pool.submit(wf.count_calls, tmp_path / "calls") for _ in range(3)]
        assert not first.cancel() and first.running()
        assert waiting[1].cancel() and waiting[1].cancelled()
        gate.touch()
        assert [result(waiting[0]), result(waiting[2])] == [1, 2]
        with pytest.raises(concurrent.futures.CancelledError):
            waiting[1].result(0)


# --- ends ---------------------------------------------------------------------------------------------------------------


def test_shutdown_waits_for_everything():
    pool = quick(2)
    futures = [pool.submit(wf.slowly, 0.01, i) for i in range(30)]
    pids = pool.pids
    pool.shutdown()
    assert all(future.done() for future in futures)
    assert [future.result(0) for future in futures] == list(range(30))
    assert len(pids) == 2 and pool.pids == []
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(abs, 1)
    pool.shutdown()  # nothing happens


def test_shutdown_without_waiting():
    pool = quick()
    futures = [pool.submit(wf.slowly, 0.01, i) for i in range(10)]
    pool.shutdown(wait=False)
    assert [result(each) for each in futures] == list(range(10))
    pool.shutdown()


def test_shutdown_cancels_what_was_not_sent(tmp_path):
    pool = quick(queue=2)
    gate = tmp_path / "gate"
    futures = [pool.submit(wf.wait_for_file, gate) for _ in range(2)]
    futures += [pool.submit(wf.count_calls, tmp_path / "calls") for _ in range(8)]
    pool.shutdown(wait=False, cancel_futures=True)
    gate.touch()
    _, pending = concurrent.futures.wait(futures, TIMEOUT)
    assert not pending and [future.cancelled() for future in futures] == [False] * 2 + [True] * 8
    pool.shutdown()
    assert not (tmp_path / "calls").exists()


def test_shutdown_in_a_callback():
    pool = quick()
    ended = threading.Event()

    def end(_):
        pool.shutdown(wait=True)
        ended.set()

    pool.submit(abs, 1).add_done_callback(end)
    assert ended.wait(TIMEOUT)
    pool.shutdown()


def test_a_pool_that_nobody_has_ends():
    pool = quick()
    engine = pool._engine
    future = pool.submit(wf.slowly, 0.05, 7)
    there = weakref.ref(pool)
    del pool
    gc.collect()
    assert there() is None
    assert result(future) == 7
    engine._supervisor.join(TIMEOUT)
    assert not engine._supervisor.is_alive()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_no_pool(pool):
    def child():
        with pytest.raises(RuntimeError, match="parent"):
            pool.submit(abs, 1)
        pool.shutdown()

    forked(child)
    assert result(pool.submit(abs, -1)) == 1


SCRIPT = """
import dataclasses, sys, time
import numpy as np
import dsline

@dataclasses.dataclass
class Frame:
    number: int
    pixels: np.ndarray

def blur(frame):
    return Frame(frame.number, frame.pixels // 2)

pool = dsline.WorkerPool(2)
frames = (Frame(n, np.full((100, 100), n)) for n in range(10))
for n, frame in enumerate(pool.map(blur, frames)):
    assert isinstance(frame, Frame) and frame.number == n and (frame.pixels == n // 2).all()

@dataclasses.dataclass
class Later:
    x: int

later = pool.submit(lambda one: Later(one.x + 1), Later(1))
assert later.result() == Later(2) and type(later.result()) is Later
last = pool.submit(lambda: time.sleep(0.2) or 5)
last.add_done_callback(lambda future: print("done", future.result(), flush=True))
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise SystemExit(0)", "del pool"])
def test_a_script_without_guard_and_without_shutdown(tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{end}", end))
    done = subprocess.run(
        [sys.executable, *STRICT, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert_clean(done)
    assert done.stdout == "done 5\n"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_no_orphans(method):
    source = f"""
import sys, time
sys.path[:0] = [{FOLDER!r}, {str(Path(FOLDER).parent)!r}]
import dsline, worker_functions
pool = dsline.WorkerPool(2, start_method={method!r})
print(*[pool.submit(worker_functions.pid_of).result()] and pool.pids, flush=True)
busy = [pool.submit(pow, 10, 10**9), pool.submit(time.sleep, 1000)]
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, *STRICT, "-c", source], stdout=subprocess.PIPE) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
        parent.wait(TIMEOUT)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_ctrl_c_ends_it_in_order():
    """The whole foreground group gets the signal; tasks that were being executed are done."""
    source = """
import itertools, time
import dsline
with dsline.WorkerPool(2) as pool:
    for n, same in enumerate(pool.map(lambda n: time.sleep(0.01) or n, itertools.count())):
        assert n == same
        if n == 5:
            print(*pool.pids, flush=True)
"""
    parent = subprocess.Popen(
        [sys.executable, *STRICT, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with parent:
        pids = parent.stdout.readline().split()
        assert len(pids) == 2
        os.killpg(parent.pid, signal.SIGINT)
        _, errors = parent.communicate(timeout=TIMEOUT)
        assert parent.returncode == -signal.SIGINT
        assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
