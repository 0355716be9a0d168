"""Results that workers write into output slots before it is their turn: none is lost, none is torn, nobody waits for ever."""

import os
import random
import signal
import time

import numpy as np
import pytest
from support import wait_until

import dsline
from dsline.dataflow.processes import WorkerProcess

SHAPE = (64, 256)


@pytest.fixture(scope="module", autouse=True)
def resident():
    """What multiprocessing keeps for good is there before the first test counts."""
    with WorkerProcess(os.getpid, start_method="forkserver") as process:
        process.join(20)


def frames(count):
    for number in range(count):
        yield np.full(SHAPE, number, np.int32)


def negate(frame, out):
    """Takes now long, now short, so that workers run ahead of each other; fails on every 13th."""
    number = int(frame[0, 0])
    time.sleep(random.random() * 0.004)
    np.negative(frame, out=out)
    if number % 13 == 12:
        raise ValueError(number)
    return out


class Keeping:
    """Keeps the arrays that it was given to write to."""

    def __init__(self):
        self.kept = []

    def __call__(self, frame, out):
        self.kept.append(out)
        return np.negative(frame, out=out)


def check(results, expected):
    numbers = [-int(result[0, 0]) for result in results]
    assert all((result == -number).all() for result, number in zip(results, numbers, strict=True))
    assert numbers == expected


@pytest.mark.parametrize(("workers", "queue", "ordered"), [(2, 8, True), (3, 1, True), (4, 2, False)])
def test_results_of_several_workers(workers, queue, ordered):
    found = []
    pipeline = (
        dsline.Pipeline()
        .source(frames(120), schema=dsline.ArraySpec(SHAPE, "i4"))
        .map(
            negate,
            returns="same",
            start_method="forkserver",
            workers=workers,
            queue=queue,
            ordered=ordered,
            on_error="skip",
        )
        .sink(lambda result: found.append(np.array(result)), queue=queue)
    )
    report = pipeline.run(timeout=60)
    assert report.state == "finished"
    expected = [number for number in range(120) if number % 13 != 12]
    if not ordered:
        found.sort(key=lambda result: -int(result[0, 0]))
    check(found, expected)
    assert report.stats["negate"].errors == 120 // 13


def test_a_batch_behind_them_may_hold_its_slots():
    """Those that wait leave enough slots to whoever has the turn, although the batch holds most of them."""
    found = []
    pipeline = (
        dsline.Pipeline()
        .source(frames(96), schema=dsline.ArraySpec(SHAPE, "i4"))
        .map(negate, returns="same", start_method="forkserver", workers=3, queue=8, on_error="skip")
        .batch(14, workers=1, queue=8, start_method="forkserver")
        .sink(lambda batch: found.extend(np.array(batch)))
    )
    assert pipeline.run(timeout=60).state == "finished"
    check(found, [number for number in range(96) if number % 13 != 12])


def test_functions_that_keep_what_they_wrote_to():
    found = []
    pipeline = (
        dsline.Pipeline()
        .source(frames(60), schema=dsline.ArraySpec(SHAPE, "i4"))
        .map(Keeping, returns="same", start_method="forkserver", workers=2)
        .sink(lambda result: found.append(np.array(result)))
    )
    assert pipeline.run(timeout=60).state == "finished"
    check(found, list(range(60)))


def test_killed_workers():
    found = []
    pipeline = (
        dsline.Pipeline()
        .source(frames(400), schema=dsline.ArraySpec(SHAPE, "i4"))
        .map(
            negate, returns="same", start_method="forkserver", workers=3, name="negate", queue=4, on_error="skip",
            restart=dsline.Restart(max=100, within=60, delay=0.01), max_deliveries=15,
        )
        .sink(lambda result: found.append(np.array(result)))
    )  # fmt: skip
    with pipeline.start() as run:
        for killed in range(10):  # each time that there are some more results
            wait_until(lambda: len(found) >= 15 * (killed + 1) or run.state != "running", 60)  # noqa: B023
            for pid in run.pids().get("negate", [])[:1]:
                os.kill(pid, signal.SIGKILL)
        assert run.supervise(timeout=60).state == "finished"
    check(found, [number for number in range(400) if number % 13 != 12])
