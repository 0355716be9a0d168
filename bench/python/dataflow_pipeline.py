"""Frames of 6 MiB through one and two workers: dsline.Pipeline, multiprocessing.Pool.imap, and no second process.

    M ──▶ {W1, W2} ──▶ M    results in the order of the frames

Two functions: the mean of a frame, which sends a number back, and a filter (255 minus the frame), which sends a frame of the same
size back; in the pipeline it writes it into the output slot through ``out=``. The main process has eight frames in memory and
gives them in turn; of every result it reads the number, or the first row of the frame.

Timed: from the 9th result to the last one, wall clock and CPU seconds of the main process and all its children (from /proc).
Not timed: starting the processes, and the frames that touch every page first. Each run is a program of its own; the rows take
turns, and figures are medians (least to most) of the rounds. Checked: every mean, and of every frame the first row; the number and
order of the results.

`dsline bench pipeline` measures empty stages and scaling.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (1024, 2048, 3)
FRAMES = 8
WARM = 8
WAYS = ("dsline.Pipeline", "multiprocessing.Pool", "one process")


def mean(frame: Any) -> float:
    return float(frame.mean(dtype=np.float32))


def invert(frame: Any, out: Any) -> Any:
    return np.subtract(255, frame, out=out)


def inverted(frame: Any) -> Any:
    return np.subtract(255, frame)


def make_frames() -> list[Any]:
    numbers = np.random.default_rng(7)
    return [numbers.integers(0, 256, SHAPE, np.uint8) for _ in range(FRAMES)]


def cpu_seconds() -> float:
    """Of this process and all that descend from it and live."""
    tick = os.sysconf("SC_CLK_TCK")
    todo, total = [os.getpid()], 0
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
    return total / tick


def results(way: str, what: str, workers: int, count: int, frames: list[Any]) -> Iterator[Any]:
    """Yield the results one by one."""
    given = itertools.islice(itertools.cycle(frames), count)
    if way == "one process":
        yield from map(mean if what == "mean" else inverted, given)
    elif way == "multiprocessing.Pool":
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            yield from pool.imap(mean if what == "mean" else inverted, given, chunksize=1)
    else:
        import dsline

        pipeline = dsline.Pipeline("frames").source(given, schema=dsline.ArraySpec(SHAPE, "u1"))
        if what == "mean":
            yield from pipeline.map(mean, workers=workers)
        else:
            yield from pipeline.map(invert, returns="same", workers=workers)


def run(way: str, what: str, workers: int, count: int) -> dict[str, float]:
    frames = make_frames()
    function = mean if what == "mean" else inverted
    expected = [function(frame) if what == "mean" else function(frame)[0] for frame in frames]
    began = cpu = 0.0
    number = 0
    for number, result in enumerate(results(way, what, workers, count + WARM, frames)):
        if number == WARM:
            began, cpu = time.perf_counter(), cpu_seconds()
        right = expected[number % FRAMES]
        if not np.array_equal(result if what == "mean" else result[0], right):
            raise SystemExit(f"result {number} of {way} is wrong")
        if number == count + WARM - 1:
            ended, cpu = time.perf_counter(), cpu_seconds() - cpu
        del result
    if number != count + WARM - 1:
        raise SystemExit(f"{number + 1} results of {count + WARM} came")
    return {"rate": (count - 1) / (ended - began), "cpu": cpu / (count - 1)}


def measured(way: str, what: str, workers: int, count: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--one", way, what, str(workers), str(count)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stdout}{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def measure(rounds: int, count: int, functions: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row for each function, way and number of workers."""
    rows = [
        (what, way, workers)
        for what in functions
        for way in WAYS
        for workers in ((1, 2) if way != "one process" else (0,))
    ]
    found: dict[Any, list[dict[str, float]]] = {row: [] for row in rows}
    for _ in range(rounds):
        for what, way, workers in rows:
            found[what, way, workers].append(measured(way, what, workers, count))
    return [
        {
            "function": what,
            "way": way,
            "workers": workers,
            "frames_per_second": [each["rate"] for each in found[what, way, workers]],
            "cpu_seconds_per_frame": [each["cpu"] for each in found[what, way, workers]],
        }
        for what, way, workers in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Frames of 6 MiB through workers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=300, help="frames of a run (%(default)s)")
    parser.add_argument("--functions", default="mean,filter", help="%(default)s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, what, workers, count = options.one
        print(json.dumps(run(way, what, int(workers), int(count))))
        return
    rows = measure(options.rounds, options.count, options.functions.split(","))
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| function | way | workers | frames/s | CPU ms per frame |\n|---|---|---|---|---|")
    for row in rows:
        cpu = [1e3 * each for each in row["cpu_seconds_per_frame"]]
        print(
            f"| {row['function']} | {row['way']} | {row['workers'] or '-'} | {spread(row['frames_per_second'], 0)} | "
            f"{spread(cpu, 1)} |"
        )


if __name__ == "__main__":
    main()
