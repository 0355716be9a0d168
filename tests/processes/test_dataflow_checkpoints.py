"""Checkpoints: a pipeline that is killed goes on where it was, without a row twice in its file."""

import multiprocessing.resource_tracker
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import plan_functions
import pytest
from support import STRICT, wait_until

import dsline
from dsline import OperatorError, Pipeline, PipelineBuildError, PipelineRuntimeError, Restart
from dsline.dataflow.checkpoints import Store
from dsline.dataflow.log import LogReader


@pytest.fixture(scope="module", autouse=True)
def helpers():
    """The helper process of multiprocessing lives as long as pytest: its pipe is nobody's leak."""
    multiprocessing.resource_tracker.ensure_running()


READINGS = np.dtype([("ts", "i8"), ("value", "f8")])


def fill(path, count, rows=5):
    def items():
        for first in range(0, count, rows):
            batch = np.zeros(rows, READINGS)
            batch["ts"] = np.arange(first, first + rows)
            batch["value"] = batch["ts"] * 0.5
            yield batch

    Pipeline().source(items).sink(f"file://{path}").run()


def rows_of(path, field="ts"):
    return [
        row
        for item in Pipeline().source(f"file://{path}", start="earliest").collect()
        for row in item[field].tolist()
    ]


def copying(source, target, folder, workers=2):
    return (
        Pipeline("copy")
        .source(f"file://{source}", start="earliest")
        .map(plan_functions.slowly, workers=workers, restart=Restart(max=1000, delay=0.0))
        .filter("value >= 0")
        .checkpoint(folder, every=0.05)
        .sink(f"file://{target}")
    )


def test_a_whole_run_is_resumed_at_its_end(tmp_path):
    fill(tmp_path / "in", 100)
    pipeline = copying(tmp_path / "in", tmp_path / "out", tmp_path / "ck")
    pipeline.run()
    assert rows_of(tmp_path / "out") == list(range(100))
    pipeline.run(resume=True)
    assert rows_of(tmp_path / "out") == list(range(100))


def test_resume_after_kill_9(tmp_path):
    fill(tmp_path / "in", 600)
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {os.path.dirname(plan_functions.__file__)!r})
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_dataflow_checkpoints as t
        t.copying({str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}, {str(tmp_path / "ck")!r}).run(resume=True)
        print("done")
        """
    )
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, *STRICT, "-c", script], stdout=subprocess.PIPE, text=True)
        if attempt < 4:
            wait_until(lambda: len(checkpoints(tmp_path / "ck")) > 0, 30)
            time.sleep(0.15 + 0.13 * attempt)
            process.send_signal(signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
        if "done" in out:
            break
    assert "done" in out
    assert rows_of(tmp_path / "out") == list(range(600))


def checkpoints(folder):
    return [name for name in os.listdir(folder) if name.startswith("checkpoint-")] if folder.exists() else []


def checkpoints_seen(run):
    return sum(event.kind == "checkpoint" for event in run.events())


def test_a_stage_with_state_goes_back_to_the_last_checkpoint(tmp_path):
    fill(tmp_path / "in", 400)
    pipeline = (
        Pipeline("sums")
        .source(f"file://{tmp_path / 'in'}", start="earliest")
        .map(plan_functions.slowly, workers=1, restart=Restart(max=1000, delay=0.0))
        .window(
            dsline.tumbling(40, time="ts"),
            total=dsline.agg.sum("value"),
            workers=1,
            name="sums",
            restart=Restart(max=1000, delay=0.0),
        )
        .checkpoint(tmp_path / "ck", every=0.05)
        .sink(f"file://{tmp_path / 'out'}")
    )
    with pipeline.start() as run:
        for _ in range(3):
            wanted = checkpoints_seen(run) + 1
            wait_until(lambda wanted=wanted: checkpoints_seen(run) >= wanted or run._over.is_set(), 30)
            for pid in run.pids().get("sums", []):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
            run.wait(0.0)
        assert run.wait(60)
        kinds = [event.kind for event in run.events()]
    assert "rolled_back" in kinds
    found = rows_of(tmp_path / "out", "total")
    assert found == [sum(n * 0.5 for n in range(first, first + 40)) for first in range(0, 400, 40)]


def test_a_poisonous_item_does_not_roll_back_for_ever(tmp_path):
    fill(tmp_path / "in", 300)
    pipeline = (
        Pipeline("poison")
        .source(f"file://{tmp_path / 'in'}", start="earliest")
        .map(plan_functions.slowly)
        .map(plan_functions.DiesOfItem, workers=1, name="counts", restart=Restart(max=2, delay=0.0))
        .checkpoint(tmp_path / "ck", every=0.05)
        .sink(f"file://{tmp_path / 'out'}")
    )
    with pytest.raises(PipelineRuntimeError, match=r"stage 'counts': .*3 deaths"):
        pipeline.run()


def test_a_state_that_cannot_be_saved(tmp_path):
    fill(tmp_path / "in", 100)
    for workers in (0, 1):
        pipeline = (
            Pipeline("bad")
            .source(f"file://{tmp_path / 'in'}", start="earliest")
            .map(plan_functions.UnpicklableState, workers=workers, name="keeper")
            .checkpoint(tmp_path / "ck", every=0.05)
            .sink(f"file://{tmp_path / f'out{workers}'}")
        )
        with pytest.raises(OperatorError, match="its state cannot be pickled"):
            pipeline.run()


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    fill(tmp_path / "in", 100)

    def refuse(self, number, fingerprint, states):
        raise PipelineRuntimeError("no space is left on the disk")

    monkeypatch.setattr("dsline.dataflow.checkpoints.Store.save", refuse)
    with pytest.raises(PipelineRuntimeError, match="no space"):
        copying(tmp_path / "in", tmp_path / "out", tmp_path / "ck").run()


def test_nothing_is_written_before_the_first_checkpoint(tmp_path, monkeypatch):
    """A program that is killed before it would begin anew behind the rows that it had written."""
    fill(tmp_path / "in", 50)
    order, save = [], Store.save

    def slowly(self, *arguments):
        time.sleep(0.2)
        save(self, *arguments)
        order.append("saved")

    monkeypatch.setattr(Store, "save", slowly)
    pipeline = (
        Pipeline().source(f"file://{tmp_path / 'in'}", start="earliest").map(plan_functions.same, workers=2)
    )
    pipeline.checkpoint(tmp_path / "ck", every="1h").sink(lambda item: order.append("written")).run()
    assert order[0] == "saved"
    assert order.count("written") == 10


def test_state_is_lost_without_a_checkpoint():
    batches = [np.array([(n, 1.0)], READINGS) for n in range(200)]
    pipeline = (
        Pipeline()
        .source(batches)
        .map(plan_functions.slowly)
        .window(
            dsline.tumbling(1000, time="ts"),
            n=dsline.agg.count(),
            workers=1,
            name="counts",
            restart=Restart(max=9, delay=0.0),
        )
    )
    out = []
    pipeline = pipeline.sink(out.append)
    with pipeline.start() as run:
        wait_until(lambda: run.stats()["counts"].items_in > 20, 30)
        os.kill(run.pids()["counts"][0], signal.SIGKILL)
        assert run.wait(60)
        events = [event.kind for event in run.events()]
    assert "state_lost" in events
    assert 0 < sum(int(each["n"].sum()) for each in out) < 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.map(plan_functions.same, workers=2, ordered=False),
            "ordered=False is not possible with a checkpoint",
        ),
        (
            lambda p: p.map(plan_functions.same, workers=1, full="drop_oldest"),
            "full='drop_oldest' is not possible",
        ),
    ],
)
def test_what_goes_with_no_checkpoint(tmp_path, change, message):
    fill(tmp_path / "in", 10)
    with pytest.raises(PipelineBuildError, match=message):
        change(Pipeline().source(f"file://{tmp_path / 'in'}")).checkpoint(tmp_path / "ck").sink(print).plan()
    with pytest.raises(PipelineBuildError, match="source that can be replayed"):
        Pipeline().source(iter([1])).checkpoint(tmp_path / "ck").sink(print).plan()


def test_a_checkpoint_of_another_pipeline(tmp_path):
    fill(tmp_path / "in", 10)
    copying(tmp_path / "in", tmp_path / "out", tmp_path / "ck").run()
    other = (
        Pipeline("copy")
        .source(f"file://{tmp_path / 'in'}")
        .checkpoint(tmp_path / "ck")
        .sink(f"file://{tmp_path / 'o2'}")
    )
    with pytest.raises(PipelineBuildError, match="another pipeline"):
        other.run(resume=True)
    with pytest.raises(PipelineBuildError, match=r"needs \.checkpoint"):
        Pipeline().source([1]).sink(print).run(resume=True)


def test_a_log_says_where_it_ends(tmp_path):
    fill(tmp_path / "in", 20)
    with LogReader(str(tmp_path / "in"), start="earliest") as reader:
        assert sum(1 for _ in reader) >= 4
