"""Sources, sinks and dead letters of pipelines with several processes, some of which are killed."""

import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import plan_functions
import pytest
from support import STRICT, TIMEOUT, wait_until

import dsline
from dsline import Pipeline, Restart
from dsline.dataflow.dead_letters import failed_items, replay
from dsline.dataflow.log import LogReader
from dsline.dataflow.processes import WorkerProcess


@pytest.fixture(scope="module", autouse=True)
def resident():
    """What multiprocessing keeps for good is there before the first test counts."""
    with WorkerProcess(plan_functions.answers, start_method="forkserver") as process:
        process.join(20)


def read(path):
    with LogReader(path) as reader:
        return [record.item() for record in reader]


def test_items_that_fail_in_workers_become_dead_letters(tmp_path):
    dead = dsline.dead_letter(f"file://{tmp_path}/dead")
    pipeline = (
        Pipeline()
        .source(range(40))
        .map(plan_functions.fails_at_three, workers=2, name="fails", on_error=dead)
    )
    assert pipeline.collect() == [n for n in range(40) if n != 3]
    (letter,) = failed_items(dead.uri)
    assert (letter.stage, letter.sequence, letter.error) == ("fails", 3, "three")
    assert letter.worker in (0, 1)
    assert letter.item() == 3
    assert "in fails_at_three" in letter.traceback

    everything = Pipeline().source(range(40)).map(plan_functions.always_fails, workers=2, on_error=dead)
    assert everything.collect() == []
    letters = list(failed_items(dead.uri))
    assert sorted(each.item() for each in letters[1:]) == list(range(40))


def test_an_item_that_kills_its_workers_becomes_a_dead_letter(tmp_path):
    dead = dsline.dead_letter(f"file://{tmp_path}/dead")
    pipeline = (
        Pipeline()
        .source(range(9))
        .map(
            plan_functions.KillsItself,
            workers=2,
            name="dies",
            on_error=dead,
            restart=Restart(max=100, delay=0.0),
        )
    )
    assert pipeline.collect() == [0, 1, 2, 3, 5, 6, 7, 8]
    (letter,) = failed_items(dead.uri)
    assert (letter.stage, letter.item()) == ("dies", 4)
    assert letter.deliveries >= 3
    assert "killed by signal 9" in letter.error
    assert replay(dead.uri, f"file://{tmp_path}/again").sent == [0]
    assert read(tmp_path / "again") == [4]


COPIER = """
import sys
from dsline import Pipeline
Pipeline().source("shm://" + sys.argv[1], wait=30).sink("file://" + sys.argv[2]).run()
print("done")
"""


def test_a_pipeline_that_is_killed_loses_no_message(tmp_path, name):
    """shm:// to file://, without checkpoints: every message once, or again when the process died before it was done."""
    count = 400
    log = tmp_path / "log"
    with dsline.ShmChannel(name, capacity=8, slot_size=16384) as channel:

        def produce():
            for number in range(count):
                channel.send(np.full(1000, number))
            channel.shutdown()

        producer = threading.Thread(target=produce)
        producer.start()
        out = ""
        for attempt in range(6):
            command = [sys.executable, *STRICT, "-c", textwrap.dedent(COPIER), name, str(log)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            if attempt < 3:
                some = 60 * (attempt + 1)
                wait_until(lambda some=some: log.exists() and channel.stats().head_sequence > some)
                child.send_signal(signal.SIGKILL)
            out, _ = child.communicate(timeout=TIMEOUT)
            if "done" in out:
                break
        producer.join(TIMEOUT)
    assert out == "done\n"
    got = read(log)
    assert all((item == item[0]).all() for item in got)
    numbers = [int(item[0]) for item in got]
    assert sorted(set(numbers)) == list(range(count))
    assert len(numbers) <= count + 3 * 8  # what was held when it was killed
