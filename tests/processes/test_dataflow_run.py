"""Runs of pipelines: ends, stops, errors, hooks, full queues, channels from outside, and what is left behind."""

import functools
import os
import signal
import textwrap
import threading
import time

import numpy as np
import plan_functions
import pytest
from support import Child, assert_clean, run_script, wait_until

import dsline
from dsline import OperatorError, Pipeline, PipelineBuildError, PipelineRuntimeError, Restart
from dsline.dataflow.processes import WorkerProcess

OFTEN = {"restart": Restart(max=1000, delay=0.0), "max_deliveries": 15}


@pytest.fixture(scope="module", autouse=True)
def resident():
    """What multiprocessing keeps for good is there before the first test counts."""
    with WorkerProcess(plan_functions.answers, start_method="forkserver") as process:
        process.join(20)


def events_of(run, kind):
    return [event for event in run.events() if event.kind == kind]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_are_in_order(workers):
    assert Pipeline().source(range(50)).map(plan_functions.double, workers=workers).collect() == list(
        range(0, 100, 2)
    )


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_arrays_arrive_as_views_of_the_slot(start_method):
    frames = [np.full((100, 50), n, np.uint16) for n in range(20)]
    seen = (
        Pipeline()
        .source(frames)
        .map(plan_functions.describe_array, workers=2, start_method=start_method)
        .collect()
    )
    assert seen == [((100, 50), "uint16", False, n * 5000) for n in range(20)]


def test_a_large_batch_of_single_items_in_a_worker():
    batches = Pipeline().source(range(600)).batch(256, workers=1).collect()
    assert [len(batch) for batch in batches] == [256, 256, 88]


def test_out_writes_into_the_slot():
    frames = [np.full((64, 64), n, np.float32) for n in range(10)]
    spec = dsline.ArraySpec((64, 64), np.float32)
    for workers in (0, 1, 2):
        found = (
            Pipeline()
            .source(frames)
            .map(plan_functions.add_one, returns=spec, workers=workers)
            .map(plan_functions.total, workers=1)
        )
        assert found.collect() == [4096.0 * (n + 1) for n in range(10)]


def test_unordered_results_leave_as_they_are_completed(tmp_path):
    function = functools.partial(plan_functions.first_waits, str(tmp_path / "others"))
    found = Pipeline().source(range(12)).map(function, workers=2, ordered=False).collect()
    assert sorted(found) == list(range(12))
    assert found[0] != 0


def test_an_error_has_the_traceback_of_the_worker():
    pipeline = (
        Pipeline()
        .source(range(5))
        .map(plan_functions.fails_at_three, workers=2, name="work")
        .sink(plan_functions.take)
    )
    with pytest.raises(
        OperatorError, match=r"stage 'work': fails_at_three\(\) failed: ValueError: three"
    ) as caught:
        pipeline.run()
    assert caught.value.stage == "work"
    assert "plan_functions.py" in str(caught.value.__cause__)


def test_an_error_in_the_caller():
    with pytest.raises(OperatorError, match="stage 'fails_at_three'") as caught:
        Pipeline().source(range(5)).map(plan_functions.fails_at_three).collect()
    assert isinstance(caught.value.__cause__, ValueError)


def test_policies():
    source = Pipeline().source(range(6))
    assert source.map(plan_functions.fails_at_three, workers=2, on_error="skip").collect() == [0, 1, 2, 4, 5]
    tries = source.map(plan_functions.FailsOnce, workers=1, on_error=dsline.retry(2, backoff=0.001)).collect()
    assert tries == [0, 1, 2, 3, 4, 5]


def test_too_many_errors():
    pipeline = (
        Pipeline()
        .source(range(100))
        .map(plan_functions.always_fails, on_error="skip", max_errors=5, name="bad")
    )
    with pytest.raises(PipelineRuntimeError, match="stage 'bad': 6 errors, and max_errors=5"):
        pipeline.collect()


def test_hooks():
    seen = []
    pipeline = (
        Pipeline()
        .source(range(6))
        .map(plan_functions.fails_at_three, workers=1, name="work")
        .sink(plan_functions.take)
    )
    report = pipeline.run(
        on_error=lambda event: seen.append((event.stage, event.data["sequence"])) or "skip",
        on_stage_start=lambda event: seen.append(("start", event.stage)),
    )
    assert ("work", 3) in seen
    assert ("start", "work") in seen
    assert report.state == "finished"
    assert report.stats["work"].items_in == 6


def test_a_hook_that_raises():
    pipeline = Pipeline().source(range(6)).map(plan_functions.double, workers=1).sink(plan_functions.take)

    def hook(event):
        raise KeyError("no")

    with pytest.raises(PipelineRuntimeError, match="hook for 'stage_start' raised KeyError"):
        pipeline.run(on_stage_start=hook)


def test_a_worker_that_dies_again_and_again_over_one_item():
    pipeline = (
        Pipeline()
        .source(range(9))
        .map(plan_functions.KillsItself, workers=2, name="work", restart=OFTEN["restart"])
    )
    with pytest.raises(PipelineRuntimeError, match=r"item 4 ended 3 worker processes \(killed by signal 9"):
        pipeline.collect()
    skipping = (
        Pipeline()
        .source(range(9))
        .map(plan_functions.KillsItself, workers=2, on_error="skip", restart=OFTEN["restart"])
    )
    assert skipping.collect() == [0, 1, 2, 3, 5, 6, 7, 8]
    dropping = (
        Pipeline()
        .source(range(9))
        .map(plan_functions.KillsItself, workers=1, on_crash="skip", restart=OFTEN["restart"])
    )
    assert dropping.collect() == [0, 1, 2, 3, 5, 6, 7, 8]


def test_no_more_restarts():
    pipeline = (
        Pipeline()
        .source(range(9))
        .map(plan_functions.KillsItself, workers=1, name="work", restart=Restart(max=1, delay=0.0))
    )
    with pytest.raises(
        PipelineRuntimeError, match=r"stage 'work': worker 0 died \(killed by signal 9.*2 deaths"
    ):
        pipeline.collect()


def test_an_item_that_hangs():
    pipeline = (
        Pipeline()
        .source(range(5))
        .map(
            plan_functions.HangsAtTwo,
            workers=1,
            timeout=0.5,
            max_deliveries=1,
            on_error="skip",
            restart=OFTEN["restart"],
        )
    )
    assert pipeline.collect() == [0, 1, 3, 4]


def test_stopping_drains():
    taken = []
    endless = iter(int, 1)
    pipeline = Pipeline().source(endless).map(plan_functions.double, workers=2).sink(taken.append)
    with pipeline.start() as run:
        wait_until(lambda: len(taken) > 20)
        assert not run.wait(0.01)
        report = run.stop()
    assert report.state == "stopped"
    assert report.undrained == {}
    # What the source gave has reached the sink.
    assert report.stats.stages[0].items_in == len(taken) == report.stats["double"].items_in
    assert pipeline.stop().state == "stopped"


def test_stopping_with_a_deadline():
    pipeline = (
        Pipeline()
        .source(range(100))
        .map(plan_functions.sleeps, workers=1, name="slow")
        .sink(plan_functions.take)
    )
    with pipeline.start() as run:
        wait_until(lambda: run.stats()["slow"].items_in >= 1, 20)
        report = run.stop(timeout=0.2)
    assert report.state == "aborted"
    assert any("slow" in edge for edge in report.undrained)


def test_a_run_with_a_time_limit():
    report = Pipeline().source(iter(int, 1)).sink(plan_functions.take).run(timeout=0.3)
    assert report.state == "stopped"


@pytest.mark.parametrize(
    ("full", "lost"), [("drop_oldest", True), ("drop_newest", True), ("latest", True), ("block", False)]
)
def test_full_queues(full, lost):
    taken = []

    def slow(item):
        time.sleep(0.002)
        taken.append(item)

    report = (
        Pipeline()
        .source(range(300))
        .map(plan_functions.double)
        .sink(slow, full=full, queue=4, name="viewer")
        .run()
    )
    assert taken == sorted(taken)
    if not lost:
        assert taken == list(range(0, 600, 2))
        return
    assert len(taken) < 300
    viewer = report.stats["viewer"]
    # Every loss is counted, at the sender or where the gap is seen.
    assert len(taken) + viewer.lost == 300
    if full != "drop_newest":
        assert taken[-1] == 598


@pytest.mark.parametrize("ordered", [True, False])
def test_losses_before_competing_workers(ordered):
    pipeline = (
        Pipeline()
        .source(range(400))
        .map(
            plan_functions.sleeps_a_little,
            workers=2,
            full="drop_oldest",
            queue=3,
            ordered=ordered,
            name="work",
        )
    )
    found = pipeline.collect()
    stats = pipeline.stats()["work"]
    assert 0 < len(found) < 400
    if ordered:
        assert found == sorted(found)
        assert len(found) + stats.lost == 400
    assert len(set(found)) == len(found)


def test_full_error():
    pipeline = (
        Pipeline()
        .source(range(400))
        .map(plan_functions.sleeps_a_little, workers=1, full="error", queue=3, name="work")
    )
    with pytest.raises(PipelineRuntimeError, match=r"is full \(3 items\) and full='error'"):
        pipeline.collect()


def test_an_item_larger_than_the_memory():
    pipeline = (
        Pipeline(memory="4MiB").source([np.zeros(8 << 20, np.uint8)]).map(plan_functions.total, workers=1)
    )
    with pytest.raises(OperatorError, match=r"memory=|8388608"):
        pipeline.collect()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_channel_from_outside(name, make_channel, workers):
    with make_channel(name, capacity=64, slot_size=4096) as channel:
        for n in range(20):
            channel.send(np.full(100, n))
        pipeline = Pipeline().source(f"shm://{name}").map(plan_functions.total, workers=workers)
        run = pipeline.sink(plan_functions.take).start()
        try:
            wait_until(lambda: run.stats()["total"].items_in == 20, 20)
            channel.shutdown()
            assert run.wait(20)
        finally:
            run.stop(drain=False)


def test_stopping_a_pipeline_on_a_channel_from_outside(name, make_channel):
    with make_channel(name, capacity=64, slot_size=4096) as channel:
        run = (
            Pipeline()
            .source(f"shm://{name}")
            .map(plan_functions.double, workers=2, name="work")
            .sink(plan_functions.take)
            .start()
        )
        channel.send_object(3)
        wait_until(lambda: run.stats()["work"].items_in == 1, 20)
        report = run.stop(timeout=20)
        assert report.state == "stopped"
        assert channel.send_object(4)  # it is still the user's


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_item_that_fails_stays_in_the_channel_of_the_caller(name, make_channel, workers):
    with make_channel(name, capacity=64, slot_size=4096) as channel:
        for number in range(8):
            channel.send_object(number)
        pipeline = (
            Pipeline().source(f"shm://{name}").map(plan_functions.fails_at_three, workers=workers).sink(print)
        )
        with pytest.raises(OperatorError, match="three"):
            pipeline.run()
        channel.check_peers()
        left = sorted(channel.recv_object(timeout=5) for _ in range(len(channel)))
        # What came before it is done; what was under way is there again.
        assert left[-5:] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_dead_receiver_held_is_not_taken_for_done(name, make_channel, workers):
    with make_channel(name, capacity=64, slot_size=4096) as channel:
        for number in range(6):
            channel.send_object(number)
        with Child("hold", name, 3) as holder:
            holder.read()
            holder.process.kill()
            holder.process.wait()
        found = []
        run = (
            Pipeline()
            .source(f"shm://{name}")
            .map(plan_functions.same, workers=workers)
            .sink(found.append)
            .start()
        )
        wait_until(lambda: len(found) == 6, 20)
        assert run.stop(timeout=20).state == "stopped"
        assert sorted(found) == list(range(6))


@pytest.mark.parametrize("moment", [0.0, 0.05])
def test_stopping_before_the_workers_have_begun(name, make_channel, moment):
    with make_channel(name, capacity=64, slot_size=4096):
        run = (
            Pipeline()
            .source(f"shm://{name}")
            .map(plan_functions.same, workers=2)
            .sink(plan_functions.take)
            .start()
        )
        time.sleep(moment)
        assert run.stop(timeout=30).state == "stopped"


def test_unordered_functions_that_keep_their_arguments():
    frames = [np.full((64, 64), n % 256, np.uint8) for n in range(300)]
    found = Pipeline().source(frames).map(plan_functions.Keeps, workers=2, ordered=False, queue=4).collect()
    assert sorted(found) == sorted(n % 256 for n in range(300))


def test_a_hook_that_waits_for_its_own_pipeline():
    runs = []

    def hook(event):
        runs[0].stop()

    pipeline = (
        Pipeline().source(range(50)).map(plan_functions.always_fails, workers=1, on_error="skip").sink(print)
    )
    with (
        pytest.raises(PipelineRuntimeError, match=r"stop\(\) in a hook"),
        pipeline.start(on_error=hook) as run,
    ):
        runs.append(run)
        run.wait(30)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_queue_behind_results_in_slots(workers):
    frames = [np.full((64, 64), n, np.float32) for n in range(200)]
    spec = dsline.ArraySpec((64, 64), np.float32)
    pipeline = (
        Pipeline().source(frames).map(plan_functions.add_one, returns=spec, workers=workers, name="add")
    )
    with pytest.raises(PipelineRuntimeError, match=r"stage 'add': the queue .* is full"):
        pipeline.map(plan_functions.slow_total, workers=1, full="error", queue=3).collect()
    dropping = pipeline.map(plan_functions.slow_total, workers=1, full="drop_newest", queue=3, name="slow")
    found = dropping.collect()
    assert 0 < len(found) < 200
    assert len(found) + dropping.stats()["slow"].lost == 200


def test_deaths_count_for_the_whole_stage():
    pipeline = (
        Pipeline()
        .source(range(40))
        .map(
            plan_functions.DiesAtTens,
            workers=2,
            name="work",
            restart=Restart(max=2, delay=0.0),
            on_error="skip",
            max_deliveries=1,
        )
    )
    with pytest.raises(PipelineRuntimeError, match="3 deaths within 60 s, and Restart allows 2"):
        pipeline.collect()


def test_a_channel_that_is_not_there(name):
    with pytest.raises(PipelineBuildError, match=f"there is no channel '{name}'"):
        Pipeline().source(f"shm://{name}", wait=0.01).sink(plan_functions.take).run()


def test_a_log_is_read_on_by_its_group(tmp_path):
    Pipeline().source(range(5)).sink(f"file://{tmp_path}/log").run()
    reading = Pipeline().source(f"file://{tmp_path}/log", group="model")
    assert reading.map(int).collect() == [0, 1, 2, 3, 4]
    assert reading.collect() == []


def test_functions_of_the_main_program_and_no_guard():
    done = run_script(
        textwrap.dedent("""
        import dsline
        def triple(x):
            return 3 * x
        print(dsline.Pipeline().source(range(4)).map(triple, workers=2).collect())
        """)
    )
    assert_clean(done)
    assert done.stdout.strip().endswith("[0, 3, 6, 9]")


def test_control_c_drains():
    script = """
    import signal, threading, os, sys, time, dsline
    def numbers():
        n = 0
        while True:
            yield n
            n += 1
    def slow(x):
        time.sleep(0.01)
        return x
    taken = []
    def presses():
        while len(taken) < 5:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=presses, daemon=True).start()
    report = dsline.Pipeline().source(numbers).map(slow, workers=2).sink(taken.append).run()
    print(report.state, taken == list(range(len(taken))), report.stats.stages[0].items_in == len(taken))
    """
    done = run_script(textwrap.dedent(script))
    assert_clean(done)
    assert done.stdout.split() == ["stopped", "True", "True"]


def test_control_c_twice_aborts():
    script = """
    import os, signal, threading, time, dsline
    def slow(x):
        time.sleep(60)
    def presses():
        while not run_has_begun.wait(0.01):
            pass
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)
    run_has_begun = threading.Event()
    threading.Thread(target=presses, daemon=True).start()
    try:
        dsline.Pipeline().source(range(9)).map(slow, workers=2).sink(print).run(
            on_stage_start=lambda event: run_has_begun.set()
        )
    except KeyboardInterrupt:
        print("aborted")
    """
    done = run_script(textwrap.dedent(script))
    assert_clean(done)
    assert done.stdout.split() == ["aborted"]


def test_no_orphans_when_the_caller_is_killed():
    done = run_script(
        textwrap.dedent("""
        import os, signal, time, dsline
        def slow(x):
            time.sleep(60)
        run = dsline.Pipeline().source(range(100)).map(slow, workers=2, name="slow").sink(print).start()
        while len(run.pids().get("slow", ())) < 2:
            time.sleep(0.01)
        time.sleep(0.5)
        print(*run.pids()["slow"], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    assert done.returncode == -signal.SIGKILL
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 10)


def test_iterating_and_leaving_early():
    found = []
    for item in Pipeline().source(iter(int, 1)).map(plan_functions.double, workers=1):
        found.append(item)
        if len(found) == 5:
            break
    assert found == [0] * 5
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "dsline-supervisor"], 20)


def test_two_inputs_in_the_order_of_time():
    def stream(offset):
        records = np.zeros(1, [("ts", "i8"), ("source", "i4")])
        for n in range(20):
            records = records.copy()
            records["ts"], records["source"] = 2 * n + offset, offset
            yield records

    first = Pipeline().source(lambda: stream(0)).map(plan_functions.same, workers=1)
    second = Pipeline().source(lambda: stream(1)).map(plan_functions.same, workers=1)
    found = first.merge(second, order="ts").collect()
    assert [int(each["ts"]) for items in found for each in np.atleast_1d(items)] == list(range(40))


def test_stats_of_edges_and_stages():
    pipeline = (
        Pipeline("named")
        .source(range(30))
        .map(plan_functions.double, workers=2, name="work")
        .sink(plan_functions.take)
    )
    report = pipeline.run()
    assert report.stats["work"].items_in == 30
    assert {edge.policy for edge in report.stats.edges} == {"block"}
    assert "work" in str(report)
    plain = report.stats.to_json()
    assert [stage["items_in"] for stage in plain["stages"] if stage["name"] == "work"] == [30]
    assert len(plain["edges"]) == 2


def test_the_state_is_known_without_waiting():
    with Pipeline().source([1]).sink(lambda item: None).start() as run:
        wait_until(lambda: run.state == "finished")
    run = Pipeline().source([0]).map(lambda item: 1 / item).sink(lambda item: None).start()
    wait_until(lambda: run.state == "failed")
    with pytest.raises(OperatorError, match="ZeroDivisionError"):
        run.wait()
