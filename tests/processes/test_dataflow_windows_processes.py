"""Windows in pipelines whose processes are killed: a program that resumes gives the windows of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import dsline
from dsline import agg, session, sliding, tumbling

ITEMS, ROWS = 400, 50
SPECS = {
    "sliding": lambda: sliding(400, every=100, time="t", lateness=40),
    "session": lambda: session(7, time="t", lateness=95),
    "rows": lambda: tumbling(333),
}


def items():
    rng = np.random.default_rng(11)
    t = np.cumsum(rng.integers(0, 6, ITEMS * ROWS)) + rng.integers(-50, 50, ITEMS * ROWS)
    k, x = rng.integers(0, 3, ITEMS * ROWS), rng.normal(size=ITEMS * ROWS)
    for at in range(0, ITEMS * ROWS, ROWS):
        yield dsline.Batch(t=t[at : at + ROWS], k=k[at : at + ROWS], x=x[at : at + ROWS])


def slowly(item):
    time.sleep(0.002)  # so that there is something to kill
    return item


def windows(source, kind, workers, pace=slowly):
    return (
        dsline.Pipeline("windows")
        .source(source)
        .map(pace)
        .window(
            SPECS[kind](),
            key="k",
            n=agg.count(),
            mean=agg.mean("x"),
            spread=agg.std("x"),
            last=agg.last("x"),
            median=agg.median("x"),
            workers=workers,
        )
    )


def program(folder, kind, workers):
    pipeline = windows(f"file://{folder}/in", kind, workers).checkpoint(
        f"{folder}/checkpoints", every="100ms"
    )
    pipeline.sink(f"file://{folder}/out").run(resume=True)


def rows_of(batches):
    return [row for batch in batches for row in batch.to_rows()]


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())


@pytest.mark.parametrize(("kind", "workers"), [("sliding", 1), ("session", 0), ("rows", 1)])
def test_a_program_that_is_killed_and_resumes(tmp_path, kind, workers):
    dsline.Pipeline().source(items()).sink(f"file://{tmp_path}/in").run(timeout=60)
    draw, out = random.Random(kind), tmp_path / "out"
    killed = 0
    for kills in (2, 1, 0):
        with subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(tmp_path), kind, str(workers)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        ) as child:
            size, deadline = size_of(out), time.monotonic() + 60
            while kills and child.poll() is None and size_of(out) == size and time.monotonic() < deadline:
                time.sleep(0.01)  # until windows have been written
            if kills:
                time.sleep(draw.uniform(0, 0.2))
                child.send_signal(signal.SIGKILL)
            _, errors = child.communicate(timeout=60)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, errors
        killed += 1
    assert child.returncode == 0 and killed > 0
    found = rows_of(dsline.Pipeline().source(f"file://{out}").collect())
    # Which windows come out together depends on nothing but the items.
    wanted = rows_of(windows(f"file://{tmp_path}/in", kind, 0, pace=lambda item: item).collect())
    assert len(found) == len(wanted)
    differing = [pair for pair in zip(found, wanted, strict=True) if repr(pair[0]) != repr(pair[1])]
    assert differing[:3] == []
    assert len(found) > 50


if __name__ == "__main__":
    program(sys.argv[1], sys.argv[2], int(sys.argv[3]))
