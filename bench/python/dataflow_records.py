"""Tables in one process: expressions alone, and filter + derive + window over batches, against the usual libraries.

    expressions   "temperature > 20 and humidity*2 < 90" keeps about a third of the rows; all three columns of them:
                  Expression.filter, NumPy by hand, pandas, polars, numexpr (the mask; rows by NumPy), pyarrow. Each gets the
                  columns in a form of its own that was made before.
    pipeline      batches of records of 16 sensors: filter, a derived column, then count, mean and maximum of every second
                  and sensor, given out as soon as the second is over. dsline.Pipeline, and loops over the same batches with
                  pandas and polars, which combine the partial results of the batches when a second is over. Timed is
                  all of it, from columns (or structured arrays) of NumPy to the windows; the results have to be equal.

    windows       one window operator alone, by kind of window, key and aggregate, and key_by into four partitions.

All libraries with one thread. Rows per second of processor time, so that other programs on the machine matter less; rounds
interleaved; median, and the range of the rounds.

``python bench/python/dataflow_records.py [--rounds 5] [--seconds 0.2] [--json FILE] [--only expressions|pipeline|windows]``
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", "1")  # before it is imported

import numexpr
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

import dsline
from dsline import agg, session, sliding, tumbling
from dsline.dataflow.operator import Context
from dsline.dataflow.windows import KeyBy, Window
from dsline.expressions import Expression

PARTS = ("expressions", "pipeline", "windows")
SIZES = (256, 4096, 65536)
ROWS = 1 << 21  # of the stream
SENSORS = 16
FILTER = "temperature > 20 and humidity*2 < 90"
SECOND = 10**9


def make_table(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "ts": np.cumsum(rng.integers(0, 40_000, rows)),  # about 50,000 rows per second
        "sensor": rng.integers(0, SENSORS, rows, dtype=np.int32),
        "temperature": rng.normal(22, 4, rows).astype(np.float32),
        "humidity": rng.normal(45, 10, rows).astype(np.float32),
    }


def batches_of(table: dict[str, np.ndarray], rows: int) -> list[dict[str, np.ndarray]]:
    total = len(table["ts"])
    return [{name: column[at : at + rows] for name, column in table.items()} for at in range(0, total, rows)]


# --- expressions --------------------------------------------------------------------------------------------------------


def expression_ways(batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Calls that return the rows that are kept."""
    temperature, humidity = batch["temperature"], batch["humidity"]
    expression = Expression(FILTER, {name: column.dtype for name, column in batch.items()})
    frame, table = pd.DataFrame(batch), pa.table(batch)
    polars = pl.DataFrame(batch)
    condition = (pl.col("temperature") > 20) & (pl.col("humidity") * 2 < 90)
    twenty, two, ninety = (np.float32(number) for number in (20, 2, 90))
    # In float32, which numexpr calls float, as all others compute.
    compiled = numexpr.NumExpr("(t > a) & (h*b < c)", [(name, float) for name in ("t", "a", "h", "b", "c")])

    def by_numpy() -> Any:
        found = np.flatnonzero((temperature > 20) & (humidity * 2 < 90))
        return {name: column.take(found) for name, column in batch.items()}

    def by_numexpr() -> Any:
        found = np.flatnonzero(compiled(temperature, twenty, humidity, two, ninety))
        return {name: column.take(found) for name, column in batch.items()}

    def by_arrow() -> Any:
        mask = pc.and_(
            pc.greater(table["temperature"], pa.scalar(20, pa.float32())),
            pc.less(pc.multiply(table["humidity"], pa.scalar(2, pa.float32())), pa.scalar(90, pa.float32())),
        )
        return table.filter(mask)

    return {
        "dsline Expression.filter": lambda: expression.filter(batch),
        "NumPy by hand": by_numpy,
        "numexpr, compiled": by_numexpr,
        "pandas": lambda: frame[(frame["temperature"] > 20) & (frame["humidity"] * 2 < 90)],
        "polars": lambda: polars.filter(condition),
        "pyarrow": by_arrow,
    }


def kept_by(result: Any) -> np.ndarray:
    return np.asarray(result["ts"])


# --- filter, derive, window ---------------------------------------------------------------------------------------------


def windows_of(batches: list[Any]) -> list[Any]:
    return (
        dsline.Pipeline()
        .source(batches)
        .filter(FILTER)
        .derive(dew="temperature - (100 - humidity) / 5")
        .window(
            tumbling("1s", time="ts"), key="sensor", n=agg.count(), mean=agg.mean("dew"), peak=agg.max("dew")
        )
        .collect()
    )


def by_dsline(batches: list[Any]) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(dict(item)) for item in windows_of(batches)])


def by_dsline_records(batches: list[Any]) -> pd.DataFrame:
    return pd.DataFrame(np.concatenate(windows_of(batches)))


def by_pandas(batches: list[Any]) -> pd.DataFrame:
    """Sums, counts and maxima of each batch; those of a second are combined when it is over."""
    open_: list[pd.DataFrame] = []
    closed: list[pd.DataFrame] = []

    def close(until: int) -> None:
        table = pd.concat(open_)
        over = table.index.get_level_values("window_start") < until
        if over.any():
            closed.append(table[over].groupby(level=[0, 1]).agg({"n": "sum", "total": "sum", "peak": "max"}))
            open_[:] = [table[~over]]

    newest = 0
    for batch in batches:
        frame = pd.DataFrame(batch)
        last = int(frame["ts"].iloc[-1]) // SECOND * SECOND
        frame = frame[(frame["temperature"] > 20) & (frame["humidity"] * 2 < 90)]
        frame = frame.assign(dew=frame["temperature"] - (100 - frame["humidity"]) / 5)
        start = (frame["ts"] // SECOND * SECOND).rename("window_start")
        grouped = frame.groupby([start, "sensor"])["dew"]
        open_.append(grouped.agg(n="count", total="sum", peak="max"))
        if last > newest:
            close(last)
            newest = last
    close(newest + SECOND)
    found = pd.concat(closed).reset_index()
    return found.assign(mean=found["total"] / found["n"])


def by_polars(batches: list[Any]) -> pd.DataFrame:
    open_: list[pl.DataFrame] = []
    closed: list[pl.DataFrame] = []
    total = pl.col("total").sum()

    def close(until: int) -> None:
        table = pl.concat(open_)
        over = table.filter(pl.col("window_start") < until)
        if len(over):
            closed.append(
                over.group_by("window_start", "sensor")
                .agg(pl.col("n").sum(), total, pl.col("peak").max())
                .sort("window_start", "sensor")
            )
            open_[:] = [table.filter(pl.col("window_start") >= until)]

    newest = 0
    dew = pl.col("dew")
    for batch in batches:
        frame = pl.DataFrame(batch)
        last = frame["ts"][-1] // SECOND * SECOND
        open_.append(
            frame.lazy()
            .filter((pl.col("temperature") > 20) & (pl.col("humidity") * 2 < 90))
            .with_columns(
                dew=pl.col("temperature") - (100 - pl.col("humidity")) / 5,
                window_start=pl.col("ts") // SECOND * SECOND,
            )
            .group_by("window_start", "sensor")
            .agg(n=pl.len(), total=dew.cast(pl.Float64).sum(), peak=dew.max())
            .collect()
        )
        if last > newest:
            close(last)
            newest = last
    close(newest + SECOND)
    found = pl.concat(closed)
    return pd.DataFrame(
        {name: found[name].to_numpy() for name in ("window_start", "sensor", "n", "peak")}
        | {"mean": (found["total"] / found["n"]).to_numpy()}
    )


def as_records(batches: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    found = []
    for batch in batches:
        records = np.empty(len(batch["ts"]), [(name, column.dtype) for name, column in batch.items()])
        for name, column in batch.items():
            records[name] = column
        found.append(records)
    return found


def pipeline_ways(batches: list[dict[str, np.ndarray]]) -> dict[str, Callable[[], Any]]:
    records, items = as_records(batches), [dsline.Batch(batch) for batch in batches]
    return {
        "dsline, columns": lambda: by_dsline(items),
        "pandas, columns": lambda: by_pandas(batches),
        "polars, columns": lambda: by_polars(batches),
        "dsline, records": lambda: by_dsline_records(records),
        "pandas, records": lambda: by_pandas(records),
        "polars, records": lambda: by_polars(records),
    }


def check_windows(found: pd.DataFrame, wanted: pd.DataFrame, way: str) -> None:
    for name in ("window_start", "sensor", "n", "peak", "mean"):
        if not np.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-3):
            raise RuntimeError(f"{way} computes another {name}")


# --- windows alone ------------------------------------------------------------------------------------------------------


def window_ways(batches: list[dict[str, np.ndarray]]) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(2)
    for batch in batches:
        batch["many"] = rng.integers(0, 3000, len(batch["ts"]))
        batch["name"] = np.char.add("sensor-", batch["sensor"].astype("U2"))
        batch["shuffled"] = batch["ts"] + rng.integers(-50_000_000, 50_000_000, len(batch["ts"]))
    usual = {"n": agg.count(), "mean": agg.mean("temperature"), "peak": agg.max("temperature")}
    of_second = tumbling("1s", time="ts")
    shuffled = tumbling("1s", time="shuffled", lateness="200ms")
    made = {
        "tumbling: count, mean, max": Window(of_second, **usual),
        "tumbling, rows out of order": Window(shuffled, **usual),
        "tumbling, 16 keys": Window(of_second, key="sensor", **usual),
        "tumbling, 16 keys as texts": Window(of_second, key="name", **usual),
        "tumbling, 3,000 keys": Window(of_second, key="many", **usual),
        "sliding, 10 panes, 16 keys": Window(sliding("1s", every="100ms", time="ts"), key="sensor", **usual),
        "session": Window(session("39us", time="ts"), **usual),
        "1,000 rows": Window(tumbling(1000), **usual),
        "1,000 rows, 16 keys": Window(tumbling(1000), key="sensor", **usual),
        "tumbling: first, last": Window(of_second, a=agg.first("temperature"), b=agg.last("temperature")),
        "tumbling: std": Window(of_second, a=agg.std("temperature")),
        "tumbling: median": Window(of_second, a=agg.median("temperature")),
        "tumbling: sum of an expression": Window(of_second, a=agg.sum("temperature*2 - humidity")),
    }
    ways: dict[str, Callable[[], Any]] = {
        name: functools.partial(run_window, window, batches) for name, window in made.items()
    }
    route = KeyBy("sensor", 4).route(Context("key_by"))
    ways["key_by, 4 partitions"] = lambda: [list(route(batch)) for batch in batches]
    return ways


def run_window(window: Window, batches: list[dict[str, np.ndarray]]) -> None:
    found: list[Any] = []
    step = window.start(Context("window"))
    for batch in batches:
        step.process(batch, found.append)
    step.finish(found.append)
    if not found:
        raise RuntimeError("no windows came out")


# --- measuring ----------------------------------------------------------------------------------------------------------


def rounds_of(
    ways: dict[str, Callable[[], Any]], rows: int, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Rows per second of processor time, for each way and round."""
    counts = {}
    for way, call in ways.items():
        start = time.process_time()
        call()
        counts[way] = max(1, int(seconds / max(1e-6, time.process_time() - start)))
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            start = time.process_time()
            for _ in range(counts[way]):
                call()
            rates[way].append(rows * counts[way] / (time.process_time() - start))
    return rates


def measure(only: str | None, rounds: int, seconds: float) -> list[dict[str, Any]]:
    results = []
    table = make_table(ROWS)
    for size in SIZES:
        rows = min(ROWS, size * 512)
        batches = batches_of({name: column[:rows] for name, column in table.items()}, size)
        if only in (None, "expressions"):
            ways = expression_ways({name: batches[0][name] for name in ("ts", "temperature", "humidity")})
            wanted = kept_by(ways["NumPy by hand"]())
            for way, call in ways.items():
                if not np.array_equal(kept_by(call()), wanted):
                    raise RuntimeError(f"{way} keeps other rows")
            results += _rows("expressions", size, rounds_of(ways, size, rounds, seconds))
        if only in (None, "pipeline"):
            ways = pipeline_ways(batches)
            windows = ways["pandas, columns"]()
            for way, call in ways.items():
                check_windows(call(), windows, way)
            results += _rows("pipeline", size, rounds_of(ways, rows, rounds, seconds))
        if only in (None, "windows"):
            ways = window_ways(batches)
            results += _rows("windows", size, rounds_of(ways, rows, rounds, seconds))
    return results


def _rows(part: str, size: int, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"part": part, "size": size, "way": way, "rate": statistics.median(found), "rates": found}
        for way, found in rates.items()
    ]


def short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def show(results: list[dict[str, Any]]) -> None:
    for part in dict.fromkeys(result["part"] for result in results):
        print(f"\n{part}: million rows per second of processor time, median (lowest to highest round)\n")
        print("| batch | " + " | ".join(f"{size:,} rows" for size in SIZES) + " |")
        print("|---|" + "---|" * len(SIZES))
        for way in dict.fromkeys(result["way"] for result in results if result["part"] == part):
            cells = []
            for size in SIZES:
                (found,) = (r for r in results if (r["part"], r["way"], r["size"]) == (part, way, size))
                low, middle, high = (
                    v / 1e6 for v in (min(found["rates"]), found["rate"], max(found["rates"]))
                )
                cells.append(f"{short(middle)} ({short(low)} to {short(high)})")
            print(f"| {way} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="per round and way")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PARTS)
    options = parser.parse_args()
    numexpr.set_num_threads(1)
    pa.set_cpu_count(1)
    results = measure(options.only, options.rounds, options.seconds)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
