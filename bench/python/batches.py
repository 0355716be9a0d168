"""Batches of n rows, from a producer in a process of its own to one consumer.

    P1 ──▶ C1     stack:       np.stack([ch.recv_array() for _ in range(n)]), the views released by the end of the call
                  recv_batch:  ch.recv_batch(n)
                  out=:        ch.recv_batch(n, out=the same array each time)
                  SharedBatch: the producer copies each row into place, the consumer gets the full batch without a copy

From the consumer's call for its first batch to the return of its last; the producer sends as fast as it can from one array that
is numbered anew for each row. Not timed: starting processes, opening, the warm-up batches. Checked: first and last
element of every row of every batch, and all of every 64th batch.

``python bench/python/batches.py [--rounds 5] [--seconds 0.5] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

import dsline

CASES = {"84x84x4 uint8 x 32": ((84, 84, 4), 32), "4 KiB x 256": ((4096,), 256), "64 B x 256": ((64,), 256)}
WARM_UP = 8
CHECK_ALL_EVERY = 64


def _produce(target: Any, shape: tuple[int, ...], rows: int) -> None:
    array = np.zeros(shape, np.uint8)
    if isinstance(target, dsline.SharedBatch):
        for number in range(rows):
            array.fill(number % 251)
            with target.row() as row:
                row.array[...] = array
    else:
        for number in range(rows):
            array.fill(number % 251)
            target.send(array)
    target.close()


def _check(batch: Any, number: int, n: int, whole: bool) -> None:
    flat = batch.reshape(n, -1)
    want = (np.arange(number * n, (number + 1) * n) % 251).astype(np.uint8)
    good = (flat[:, 0] == want).all() and (flat[:, -1] == want).all()
    if whole:
        good = good and (flat == want[:, None]).all()
    if not good:
        raise RuntimeError(f"batch {number} arrived damaged")


def _consume(how: str, target: Any, shape: tuple[int, ...], n: int, count: int, control: Connection) -> None:
    control.send("ready")
    out = np.empty((n, *shape), np.uint8)
    take = {
        "stack": lambda: np.stack([target.recv_array() for _ in range(n)]),
        "recv_batch": lambda: target.recv_batch(n),
        "out=": lambda: target.recv_batch(n, out=out),
        "SharedBatch": lambda: target.recv(),
    }[how]
    start = 0.0
    for number in range(WARM_UP + count):
        if number == WARM_UP:
            start = time.perf_counter()
        got = take()
        whole = number % CHECK_ALL_EVERY == 0
        if how == "SharedBatch":
            with got:
                _check(got.array, number, n, whole)
        else:
            _check(got, number, n, whole)
        del got
    control.send(time.perf_counter() - start)
    target.close()


HOWS = ("stack", "recv_batch", "out=", "SharedBatch")


def run(how: str, shape: tuple[int, ...], n: int, count: int) -> float:
    """Seconds for `count` batches."""
    context = multiprocessing.get_context("spawn")
    size = math.prod(shape)
    target: Any
    if how == "SharedBatch":
        target = dsline.SharedBatch(n, shape, np.uint8, batches=4)
    else:
        # "stack" holds n views at a time; all have the same number of slots.
        target = dsline.ShmChannel(capacity=4 * n, slot_size=size, max_pinned="unlimited")
    here, there = context.Pipe()
    consumer = context.Process(target=_consume, args=(how, target, shape, n, count, there))
    consumer.start()
    here.recv()
    producer = context.Process(target=_produce, args=(target, shape, (WARM_UP + count) * n))
    producer.start()
    if not here.poll(120):
        raise RuntimeError(f"{how}: no result within 120 s")
    seconds = here.recv()
    for process in (producer, consumer):
        process.join(30)
        if process.exitcode != 0:
            raise RuntimeError(f"{how}: a process ended with {process.exitcode}")
    target.close()
    return float(seconds)


def measure(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """All cases, rounds interleaved."""
    results = []
    for case, (shape, n) in CASES.items():
        counts = {}
        for how in HOWS:
            first = run(how, shape, n, 20) / 20
            counts[how] = max(20, int(seconds / first))
        times: dict[str, list[float]] = {how: [] for how in HOWS}
        for _ in range(rounds):
            for how in HOWS:
                times[how].append(counts[how] * n / run(how, shape, n, counts[how]))
        base = statistics.median(times["stack"])
        for how in HOWS:
            rates = times[how]
            results.append(
                {
                    "case": case,
                    "how": how,
                    "rows_per_s": statistics.median(rates),
                    "least": min(rates),
                    "most": max(rates),
                    "against_stack": statistics.median(rates) / base,
                }
            )
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = measure(options.rounds, options.seconds)
    print("| batch | how | rows/s, median (min to max) | against stack |\n|---|---|---|---|")
    for row in results:
        spread = f"{row['rows_per_s']:,.0f} ({row['least']:,.0f} to {row['most']:,.0f})"
        print(f"| {row['case']} | {row['how']} | {spread} | {row['against_stack']:.2f} |")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
