"""Cost of one operator in the thread that runs it: `step.process(item, emit)` with an `emit` that does nothing.

Not timed: sources, channels, and the runtime around a stage. Best of nine repetitions, so that what the neighbours of a
shared machine take is left out. Columns and records: ts int64, sensor int32, temperature and humidity float32.
"""

import argparse
import time

import numpy as np

from dsline import Batch, ops
from dsline.dataflow.operator import Context

ROWS = (256, 4096, 65536)
ONE = {"ts": 1, "sensor": 3, "temperature": 22.5, "humidity": 40.0}
WARM = "temperature > 20 and humidity*2 < 90"


def nothing(item):
    pass


def same(item):
    return item


class Same:
    def __call__(self, item):
        return item


def readings(rows, first=0):
    rng = np.random.default_rng(0)
    return Batch(
        ts=np.arange(first, first + rows),
        sensor=rng.integers(0, 8, rows, "i4"),
        temperature=rng.normal(20, 5, rows).astype("f4"),
        humidity=rng.uniform(0, 100, rows).astype("f4"),
    )


def best(call, number):
    call()
    times = []
    for _ in range(9):
        began = time.perf_counter()
        for _ in range(number):
            call()
        times.append((time.perf_counter() - began) / number)
    return min(times) * 1e6


def step_of(operator):
    if hasattr(operator, "outputs"):
        route = operator.route(Context("bench"))
        return lambda item: [nothing(part) for part in route(item)]
    process = operator.start(Context("bench")).process
    return lambda item: process(item, nothing)


def rows_of(name, operator, one=True):
    step = step_of(operator)
    cells = [f"{best(lambda: step(ONE), 2000):.2g} µs" if one else ""]
    for rows in ROWS:
        for item in (readings(rows), readings(rows).to_records()):
            step = step_of(operator)
            micros = best(lambda item=item, step=step: step(item), max(2, 20_000 // rows))
            cells.append(f"{micros:.3g} µs, {rows / micros:.3g} M/s")
    print(f"| {name} | {' | '.join(cells)} |")


def merge_of(operator, pieces, number):
    """Microseconds for each of 2 × `number` items."""
    step = operator.start(Context("bench"))
    began = time.perf_counter()
    for piece in pieces:
        step.process_from(0, piece, nothing)
        step.process_from(1, piece, nothing)
    return (time.perf_counter() - began) / (2 * number) * 1e6


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    titles = ["operator", "a dict"] + [
        f"{kind} of {rows}" for rows in ROWS for kind in ("columns", "records")
    ]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    rows_of(f"filter `{WARM}`", ops.filter(WARM))
    rows_of("filter of a function", ops.filter(lambda rows: rows["temperature"] > 20))
    rows_of("derive one column", ops.derive(dew="temperature - (100 - humidity)/5"))
    rows_of("select two of four", ops.select("ts", "temperature"))
    rows_of("batch 256", ops.batch(256))
    rows_of("map_batches 256", ops.map_batches(same, batch=256))
    rows_of("unbatch", ops.unbatch(), one=False)
    rows_of("branch in three", ops.branch(hot="temperature > 25", cold="temperature < 15", rest=None))
    print("\n| | each item |\n|---|---|")
    frame = np.zeros((1080, 1920, 3), "u1")
    small = np.zeros((64, 64), "u1")
    for name, operator, item in (
        ("map of a function", ops.map(same), ONE),
        ("map of an object", ops.map(Same), ONE),
        ("map, result checked", ops.map(same, returns="same"), frame),
        ("rate_limit", ops.rate_limit(1e9, burst=1000), ONE),
        ("broadcast to three", ops.broadcast(3), ONE),
        ("batch of 4 KiB frames", ops.batch(32), small),
        ("batch 256 of columns of 16 rows", ops.batch(256), readings(16)),
    ):
        step = step_of(operator)
        print(f"| {name} | {best(lambda item=item, step=step: step(item), 5000):.2g} µs |")
    for rows in (256, 4096):
        pieces = [readings(rows, number * rows) for number in range(200)]
        micros = min(merge_of(ops.merge(2, order="ts"), pieces, 200) for _ in range(5))
        print(f"| merge by a column, {rows} rows | {micros:.3g} µs, {rows / micros:.3g} M rows/s |")
    pieces = [{**ONE, "ts": number} for number in range(2000)]
    for order in ("ts", "zip", "arrival"):
        micros = min(merge_of(ops.merge(2, order=order), pieces, 2000) for _ in range(5))
        print(f"| merge of dicts, order {order} | {micros:.2g} µs |")


if __name__ == "__main__":
    main()
