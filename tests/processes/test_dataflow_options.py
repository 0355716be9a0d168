"""Stage options, hooks and names of the first version, through whole pipelines."""

import functools
import multiprocessing.resource_tracker
import os
import time

import numpy as np
import plan_functions
import pytest

import dsline
from dsline import Pipeline, PipelineRuntimeError, Restart


@pytest.fixture(scope="module", autouse=True)
def helpers():
    """The helper process of multiprocessing lives as long as pytest: its pipe is nobody's leak."""
    multiprocessing.resource_tracker.ensure_running()


def test_workers_run_where_and_with_as_many_threads_as_they_are_told():
    (allowed, *_) = sorted(os.sched_getaffinity(0))
    seen = Pipeline().source([1]).map(plan_functions.place, workers=1, cpus=[allowed], threads=3).collect()
    assert seen == [([allowed], "3")]
    spread = Pipeline().source(range(8)).map(plan_functions.place, workers=2, cpus="spread").collect()
    assert {threads for _, threads in spread} == {"1"}
    assert {len(cpus) for cpus, _ in spread} == {1}


def test_a_crash_may_stop_the_pipeline():
    pipeline = (
        Pipeline().source(range(9)).map(plan_functions.KillsItself, workers=1, name="work", on_crash="stop")
    )
    with pytest.raises(PipelineRuntimeError, match=r"stage 'work': worker 0 died .* and on_crash='stop'"):
        pipeline.collect()


def test_a_queue_is_bounded_in_bytes():
    frames = Pipeline(memory="64MiB").source(
        [np.zeros((1024, 1024), np.uint8)] * 3, schema=dsline.ArraySpec((1024, 1024), "u1")
    )
    plan = frames.map(plan_functions.total, workers=1, queue=8, queue_bytes="2MiB").sink(print).plan()
    assert plan.edges[0].queue == 2
    assert frames.map(plan_functions.total, workers=1, queue_bytes="2MiB").collect() == [0.0] * 3
    few = frames.map(plan_functions.total, workers=1, queue=1, queue_bytes="2MiB").sink(print).plan()
    assert few.edges[0].queue == 1


def test_hooks_of_restarts_and_full_queues():
    restarts, full = [], []
    pipeline = (
        Pipeline()
        .source(range(60))
        .map(
            plan_functions.DiesAtTens,
            workers=1,
            name="work",
            on_crash="skip",
            queue=2,
            restart=Restart(max=100, delay=0.0),
        )
    )
    slow = pipeline.sink(functools.partial(plan_functions.slept, 0.002), name="slow", queue=1)
    slow.run(on_restart=restarts.append, on_backpressure=full.append)
    assert [event.stage for event in restarts] == ["work"] * 6
    assert all("SIGKILL" in event.data["cause"] for event in restarts)
    assert {event.data["edge"] for event in full} <= {"iterable → work", "work → slow"}
    assert full


def test_progress_is_told_to_a_function():
    seen = []
    Pipeline().source(range(40)).map(plan_functions.sleeps_a_little, workers=1, name="work").sink(
        plan_functions.take
    ).run(progress=seen.append)
    assert seen[-1]["work"].items_in == 40
    assert seen[-1].total == 40
    assert seen[-1].slowest is not None


def test_the_names_of_the_first_version(name, make_channel):
    with make_channel(name, capacity=64, slot_size=4096) as channel:
        dsline.ops.send_to([dsline.Batch(a=[n, n + 1, n + 2]) for n in range(0, 9, 3)], channel)
        found = (
            Pipeline.from_transport(f"shm://{name}")
            .filter_expr("a > 1")
            .map_expr(b="a * 2")
            .map_py_batch(plan_functions.same, batch=4)
            .filter_py_batch(plan_functions.a_is_even, batch=4)
            .unbatch()
            .filter_py(plan_functions.a_is_large)
            .map_py(plan_functions.b_of)
            .collect()
        )
    assert found == [8, 12, 16]


def test_ends_of_the_first_version(name, make_channel):
    parts = Pipeline().source(range(6)).split(even=plan_functions.is_even, odd=plan_functions.is_odd)
    assert sorted(parts["even"].merge(parts["odd"]).collect()) == list(range(6))
    with make_channel(name, capacity=64, slot_size=4096) as channel:
        assert dsline.ops.send_to([1, 2, 3], channel) == 3
        assert list(dsline.ops.receive_from(channel)) == [1, 2, 3]
    assert dsline.ops.collect(iter([1, 2])) == [1, 2]


def test_files_are_shuffled_the_same_way_every_time(tmp_path):
    for number in range(6):
        np.savez(tmp_path / f"{number}.npz", x=np.full(2, number))

    def order(seed):
        source = dsline.files(str(tmp_path / "*.npz"), shuffle=seed, repeat=2)
        return [int(item["x"][0]) for item in Pipeline().source(source).collect()]

    assert order(7) == order(7)
    assert sorted(order(7)) == sorted([*range(6)] * 2)
    assert order(7) != sorted(order(7))


def test_a_pipeline_answers_for_the_run_that_it_started_last():
    pipeline = (
        Pipeline().source(iter(int, 1)).map(plan_functions.double, name="work").sink(plan_functions.take)
    )
    with pytest.raises(dsline.PipelineError, match="was not started"):
        pipeline.stats()
    pipeline.start()
    time.sleep(0.05)
    assert pipeline.stop().state == "stopped"
    assert pipeline.stats()["work"].items_in > 0
