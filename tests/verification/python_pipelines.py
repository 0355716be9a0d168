#!/usr/bin/env python3
"""Kills the workers of made-up pipelines at random, and checks what comes out.

``python tests/verification/python_pipelines.py [--seconds 20] [--seed N] [--json FILE]``

One pipeline after the other: stages of every kind with one to three workers, ordered or not, short and long queues, arrays
and objects. Meanwhile any of its workers is killed (SIGKILL, sometimes SIGSTOP for a while) every few milliseconds, also
while it starts. Checked: every item is there once, in order where the stages keep it; the run ends; nothing is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from typing import Any

import numpy as np

import dsline
from dsline import Pipeline
from dsline.testing import LeakCheck

ITEMS = 250
OPTIONS: dict[str, Any] = {
    "restart": dsline.Restart(max=100_000, delay=0.0),
    "max_deliveries": 15,
    "start_method": "forkserver",
}


def work(value: Any) -> Any:
    time.sleep(0.001)
    return value


def frame(value: int) -> np.ndarray:
    return np.full((50, 60), value, np.int32)


def first_element(array: np.ndarray) -> int:
    assert (array == array.flat[0]).all()
    return int(array.flat[0])


def several(value: int) -> Any:
    for part in range(value % 4):
        time.sleep(0.0005)
        yield value * 10 + part


def is_even(value: int) -> bool:
    time.sleep(0.001)
    return value % 2 == 0


def made(rng: random.Random) -> tuple[Pipeline, list[Any], bool]:
    """A pipeline, what comes out of it, and whether in this order."""
    workers, ordered = rng.randint(1, 3), rng.random() < 0.6

    def stage(**more: Any) -> dict[str, Any]:
        return {**OPTIONS, "workers": workers, "ordered": ordered, "queue": rng.choice((1, 2, 8)), **more}

    source = Pipeline().source(range(ITEMS))
    numbers = list(range(ITEMS))
    keeps_order = ordered or workers == 1
    kind = rng.randrange(7)
    if kind == 0:
        return source.map(work, **stage()), numbers, keeps_order
    if kind == 1:
        return (
            source.map(several, **stage()),
            [n * 10 + k for n in numbers for k in range(n % 4)],
            keeps_order,
        )
    if kind == 2:
        return source.filter(is_even, **stage()), numbers[::2], keeps_order
    if kind == 3:
        # One worker gathers; the batches that it was at when it died are gathered again.
        gathered = (
            source.map(work, **stage()).batch(rng.choice((3, 5, 8)), workers=1, queue=32, **OPTIONS).unbatch()
        )
        return gathered, numbers, keeps_order
    if kind == 4:
        frames = source.map(frame).map(work, returns="same", **stage())
        return frames.map(first_element, **{**OPTIONS, "workers": 2}), numbers, keeps_order
    if kind == 5:
        left, right = source.broadcast(2)
        pairs = left.map(work, **stage(ordered=True)).merge(
            right.map(work, **stage(ordered=True)), order="zip"
        )
        return pairs, [(n, n) for n in numbers], True
    return source.map(work, **stage()).map(work, **stage()), numbers, keeps_order


def one(rng: random.Random, count: Counter[str]) -> None:
    pipeline, expected, keeps_order = made(rng)
    found: list[Any] = []
    over = threading.Event()
    with pipeline.sink(found.append).start() as run:

        def kill() -> None:
            while not over.wait(rng.uniform(0.005, 0.15)):
                pids = [pid for each in run.pids().values() for pid in each]
                if not pids:
                    continue
                pid = rng.choice(pids)
                with contextlib.suppress(ProcessLookupError):
                    if rng.random() < 0.1:
                        os.kill(pid, signal.SIGSTOP)
                        over.wait(rng.uniform(0.01, 0.15))
                        os.kill(pid, signal.SIGCONT)
                        count["stops"] += 1
                    else:
                        os.kill(pid, signal.SIGKILL)
                        count["kills"] += 1

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            if not run.wait(1.0):
                over.set()
            ended = run.wait(60)
        finally:
            over.set()
            killer.join()
        if not ended:
            print(f"stands still:\n{run.stats()}", file=sys.stderr)
            count["hung"] += 1
            run.abort()
            return
    have, want = Counter(map(str, found)), Counter(map(str, expected))
    count["lost"] += sum((want - have).values())
    count["twice"] += sum((have - want).values())
    count["disordered"] += int(
        keeps_order and have == want and [str(each) for each in found] != [*map(str, expected)]
    )
    count["items"] += len(expected)
    count["pipelines"] += 1


def run(seconds: float, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    count: Counter[str] = Counter(
        dict.fromkeys(
            ("pipelines", "items", "kills", "stops", "lost", "twice", "disordered", "hung", "leaks"), 0
        )
    )
    one(rng, count)  # what multiprocessing keeps for good is there now
    leaks = LeakCheck()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        one(rng, count)
    left = leaks.find()
    if left:
        print(f"left behind: {left}", file=sys.stderr)
    count["leaks"] = int(bool(left))
    return {"seed": seed, **count}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--json")
    options = parser.parse_args()
    result = run(options.seconds, options.seed)
    print(" ".join(f"{key}={value}" for key, value in result.items()), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"program": "python_pipelines", **result}, file)
    bad = ("lost", "twice", "disordered", "hung", "leaks")
    return int(any(result[key] for key in bad) or not result["kills"] or not result["pipelines"])


if __name__ == "__main__":
    sys.exit(main())
