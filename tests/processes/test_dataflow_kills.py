"""Workers of every kind of stage are killed, at random moments and at chosen points: no item is lost, none comes twice.

Every step of the commit itself is in tests/cpp/channel/stage_words_test.cpp.
"""

import contextlib
import os
import random
import signal
import threading
import time

import kill_functions as functions
import numpy as np
import plan_functions
import pytest

import dsline
from dsline import Pipeline, Restart
from dsline.dataflow.processes import WorkerProcess

OFTEN = {"restart": Restart(max=100_000, delay=0.0), "max_deliveries": 15, "start_method": "forkserver"}
END_POINTS = ["end sent", "end release", "end released"]
POINTS = ["intent", "publish", "sent", "release", "released"]


@pytest.fixture(scope="module", autouse=True)
def resident():
    """What multiprocessing keeps for good is there before the first test counts."""
    with WorkerProcess(plan_functions.answers, start_method="forkserver") as process:
        process.join(20)


def kept(results):
    """A sink in this process, which copies what it gets."""
    return lambda item: results.append(item.copy() if isinstance(item, np.ndarray) else item)


def run_killing(pipeline, kills=4, seed=0, stages=None):
    """Run a pipeline to its end while workers of it are killed at random; its Run."""
    choice = random.Random(seed)
    run = pipeline.start()
    ended = threading.Event()
    killed = []

    def killer():
        while len(killed) < kills and not ended.wait(choice.uniform(0.02, 0.08)):
            # Who has not begun has taken nothing yet.
            begun = sum(event.kind == "stage_start" and event.data["worker"] >= 0 for event in run.events())
            pids = [
                pid for stage, pids in run.pids().items() for pid in pids if stages is None or stage in stages
            ]
            if pids and begun > len(killed):
                pid = choice.choice(pids)
                killed.append(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        assert run.wait(60), "the pipeline stands still"
    finally:
        ended.set()
        thread.join()
        run.stop(drain=False)
    assert any(event.kind == "crashed" for event in run.events()), "nobody was killed at work"
    return run


def source(count):
    return Pipeline().source(range(count))


@pytest.mark.parametrize("workers", [1, 2])
def test_map(workers):
    results = []
    run = run_killing(
        source(400).map(functions.slow_double, workers=workers, name="work", **OFTEN).sink(kept(results))
    )
    assert results == [2 * number for number in range(400)]
    assert run.stats()["work"].lost == 0


@pytest.mark.parametrize("seed", range(2))
def test_map_unordered(seed):
    results = []
    run_killing(
        source(400).map(functions.uneven_double, workers=2, ordered=False, **OFTEN).sink(kept(results)),
        seed=seed,
    )
    assert sorted(results) == [2 * number for number in range(400)]


def test_map_of_frames_through_two_stages():
    results = []
    run_killing(
        source(300)
        .map(functions.frame)
        .map(functions.slow_same, workers=2, **OFTEN)
        .map(functions.mean_of, workers=2, **OFTEN)
        .sink(kept(results)),
        kills=6,
    )
    assert results == list(range(300))


@pytest.mark.parametrize("ordered", [True, False])
def test_filter(ordered):
    results = []
    run_killing(
        source(400).filter(functions.slow_even, workers=2, ordered=ordered, **OFTEN).sink(kept(results))
    )
    assert (results if ordered else sorted(results)) == list(range(0, 400, 2))


@pytest.mark.parametrize(("workers", "ordered"), [(1, True), (2, True), (2, False)])
def test_fan_out(workers, ordered):
    results = []
    run_killing(
        source(150).map(functions.thrice, workers=workers, ordered=ordered, **OFTEN).sink(kept(results))
    )
    wanted = [value * 10 + number for value in range(150) for number in range(3)]
    assert (results if ordered else sorted(results)) == wanted


@pytest.mark.parametrize("size", [4, 7])
def test_batch(size):
    results = []
    run_killing(
        source(400)
        .map(functions.slow_same)
        .map(functions.record)
        .batch(size, workers=1, queue=32, **OFTEN)
        .sink(kept(results)),
    )
    assert [len(batch) for batch in results] == [size] * (400 // size) + [400 % size] * (400 % size > 0)
    assert [value for batch in results for value in functions.value_of(batch)] == list(range(400))


@pytest.mark.parametrize("make", [functions.some_rows, functions.some_records])
def test_batches_of_items_with_many_rows(make):
    # An item may be split between two batches, and a worker may die between them.
    results = []
    run_killing(
        source(400)
        .map(functions.slow_same)
        .map(make)
        .batch(5, workers=1, queue=32, **OFTEN)
        .sink(lambda item: results.append(item["n"].tolist())),
    )
    wanted = [10 * value + row for value in range(400) for row in range(value % 9)]
    assert [row for rows in results for row in rows] == wanted
    assert all(len(rows) == 5 for rows in results[:-1])


def test_batches_that_workers_share():
    results = []
    run_killing(
        source(400)
        .map(functions.some_rows)
        .map_batches(functions.count_rows, batch=5, workers=2, linger=None, **OFTEN)
        .sink(lambda rows: results.append(rows.tolist())),
    )
    wanted = [10 * value + row for value in range(400) for row in range(value % 9)]
    assert results == [wanted[at : at + 5] for at in range(0, len(wanted), 5)]


def test_rate_limit():
    results = []
    run_killing(source(400).rate_limit(1000, burst=3, workers=1, **OFTEN).sink(kept(results)))
    assert results == list(range(400))


def test_branch_and_merge():
    results = []
    ways = source(400).map(functions.slow_same, workers=2, **OFTEN).branch(even=functions.is_even, odd=None)
    even = ways["even"].map(functions.slow_double, workers=1, **OFTEN)
    odd = ways["odd"].map(functions.slow_double, workers=2, **OFTEN)
    run_killing(even.merge(odd).sink(kept(results)), kills=6)
    assert sorted(results) == [2 * number for number in range(400)]
    assert [value for value in results if value % 4 == 0] == list(range(0, 800, 4))
    assert [value for value in results if value % 4 != 0] == list(range(2, 800, 4))


def test_merge_zip():
    results = []
    one, two = source(300).broadcast(2)
    pipeline = one.map(functions.slow_double, workers=2, **OFTEN).merge(
        two.map(functions.slow_same, workers=1, **OFTEN), order="zip"
    )
    run_killing(pipeline.sink(kept(results)), kills=6)
    assert [tuple(result) for result in results] == [(2 * number, number) for number in range(300)]


def finish(pipeline, results):
    run = pipeline.sink(kept(results)).start()
    try:
        assert run.wait(60), "the pipeline stands still"
    finally:
        run.stop(drain=False)
    return run


@pytest.mark.parametrize("ordered", [True, False])
def test_a_death_at_every_point_of_the_runtime(ordered, tmp_path):
    pipeline = source(60)
    for stage, point in enumerate(POINTS):
        dies = functions.DiesAt(str(tmp_path / point), point, 1 + 3 * stage)
        pipeline = pipeline.map(dies, workers=2 - stage % 2, ordered=ordered or stage % 2 == 1, **OFTEN)
    results = []
    finish(pipeline, results)
    assert (results if ordered else sorted(results)) == list(range(60))
    assert sorted(os.listdir(tmp_path)) == sorted(POINTS), "a point was not reached"


@pytest.mark.parametrize(("workers", "ordered"), [(1, True), (2, True), (2, False)])
def test_a_death_around_the_end(workers, ordered, tmp_path):
    pipeline = source(20)
    for point in END_POINTS:
        dies = functions.DiesAt(str(tmp_path / point), point, 1)
        pipeline = pipeline.map(dies, workers=workers, ordered=ordered, **OFTEN)
    results = []
    finish(pipeline, results)
    assert (results if ordered else sorted(results)) == list(range(20))
    assert len(os.listdir(tmp_path)) >= 2, "the end was not reached by who dies there"


# A recoverer that is slow gives an item back when later ones have long been taken.
@pytest.mark.parametrize(("workers", "ordered"), [(1, True), (2, True), (2, False)])
def test_an_item_that_is_given_back_late(workers, ordered):
    results = []
    run = (
        source(200)
        .map(functions.slow_double, workers=workers, ordered=ordered, **OFTEN)
        .sink(kept(results))
        .start()
    )
    try:
        channel = run._execution.channels[0]
        for item in (0, 50, 51, 120):
            while (message := channel._core_take_between(item, 200)) is None:
                time.sleep(0)
            time.sleep(0.02)
            message.nack()
        assert run.wait(60), "the pipeline stands still"
    finally:
        run.stop(drain=False)
    assert (results if ordered else sorted(results)) == [2 * number for number in range(200)]


def test_a_source_in_a_worker():
    results = []
    pipeline = Pipeline().source(functions.Numbers(400), workers=1, name="numbers", **OFTEN)
    run_killing(
        pipeline.map(functions.slow_double, workers=1, **OFTEN).sink(kept(results)), stages=["numbers"]
    )
    assert results == [2 * number for number in range(400)]


def test_a_sink_in_a_worker(tmp_path):
    # What a sink has done to the outside may come again after a death; nothing is missing.
    run_killing(source(300).sink(functions.Appends(str(tmp_path / "out")), workers=1, **OFTEN))
    lines = [int(line) for line in (tmp_path / "out").read_text().split()]
    assert sorted(set(lines)) == list(range(300))
    assert len(lines) <= 300 + 4


def test_windows_of_partitions():
    results = []
    keyed = source(400).map(functions.slow_same, workers=2, name="work", **OFTEN).map(functions.record)
    windows = keyed.key_by("key", partitions=2).window(dsline.tumbling(10), total=dsline.agg.sum("value"))
    run_killing(windows.sink(kept(results)), stages=["work"])
    totals = {}
    for rows in results:
        for key, total in zip(rows["key"].tolist(), rows["total"].tolist(), strict=True):
            totals.setdefault(key, []).append(total)
    values = {key: [value for value in range(400) if value % 7 == key] for key in range(7)}
    assert totals == {
        key: [sum(of[first : first + 10]) for first in range(0, len(of), 10)] for key, of in values.items()
    }
