"""A year of two weather stations: filter, derive and windows over a real table, with the numbers that pandas gives.

    python examples/sensors/sensors.py [--rows N] [--partitions N]

The hourly temperatures of Seattle and San Francisco, 17,518 rows, are those inside the vega_datasets package
(``pip install "dsline[examples]"``, which brings pandas, too). They come in items of N rows, and three questions are asked:

* how warm was it on each day, and how much did the temperature vary? (tumbling windows of a day)
* what was the mean of the last 24 hours, every six hours? (sliding windows)
* when was it warm for hours on end, and how warm did it get? (sessions of hours above 20 °C)

Each answer is computed by a dsline pipeline and by pandas from the whole table. The program fails unless they are equal.
"""

import argparse
import importlib.resources
import sys

import pandas as pd

import dsline
from dsline import agg, session, sliding, tumbling

STATIONS = {"Seattle": "seattle-temps.csv", "San Francisco": "sf-temps.csv"}


def read_table():
    """Return the readings of both stations in the order of time: columns time, station and fahrenheit."""
    folder = importlib.resources.files("vega_datasets") / "_data"
    tables = []
    for station, name in STATIONS.items():
        with (folder / name).open() as file:
            table = pd.read_csv(file, parse_dates=["date"])
        tables.append(pd.DataFrame({"time": table["date"], "station": station, "fahrenheit": table["temp"]}))
    return pd.concat(tables).sort_values("time", kind="stable", ignore_index=True)


def items(table, rows):
    """Yield the table in pieces, as a device would send them."""
    columns = {
        "time": table["time"].to_numpy("M8[s]"),
        "station": table["station"].to_numpy("U16"),
        "fahrenheit": table["fahrenheit"].to_numpy(),
    }
    for start in range(0, len(table), rows):
        yield dsline.Batch({name: column[start : start + rows] for name, column in columns.items()})


# The questions, to dsline.


def readings(table, options):
    """The beginning of all three pipelines."""
    return (
        dsline.Pipeline("sensors")
        .source(items(table, options.rows))
        .derive(celsius="(fahrenheit - 32) * 5 / 9")
        .select("time", "station", "celsius")
    )


def by_station(pipeline, options):
    partitions = options.partitions if options.partitions > 1 else None
    return pipeline.key_by("station", partitions=partitions)


def days(table, options):
    return by_station(readings(table, options), options).window(
        tumbling("1d", time="time"),
        hours=agg.count(),
        lowest=agg.min("celsius"),
        mean=agg.mean("celsius"),
        highest=agg.max("celsius"),
        deviation=agg.std("celsius"),
        median=agg.median("celsius"),
    )


def last_24_hours(table, options):
    return by_station(readings(table, options), options).window(
        sliding("24h", every="6h", time="time"), hours=agg.count(), mean=agg.mean("celsius")
    )


def warm_spells(table, options):
    warm = readings(table, options).filter("celsius > 20")
    return by_station(warm, options).window(
        session("3h", time="time"),
        hours=agg.count(),
        highest=agg.max("celsius"),
        degree_hours=agg.sum("celsius - 20"),
    )


# The same to pandas.


def pandas_days(table):
    grouped = table.groupby([table["time"].dt.floor("D").rename("window_start"), "station"])["celsius"]
    return grouped.agg(
        hours="count", lowest="min", mean="mean", highest="max", deviation="std", median="median"
    )


def pandas_last_24_hours(table):
    found = []
    for shift in range(4):  # sliding windows are four rows of windows side by side
        start = (table["time"] - pd.Timedelta(hours=6 * shift)).dt.floor("D") + pd.Timedelta(hours=6 * shift)
        grouped = table.groupby([start.rename("window_start"), "station"])["celsius"]
        found.append(grouped.agg(hours="count", mean="mean"))
    return pd.concat(found).sort_index()


def pandas_warm_spells(table):
    warm = table[table["celsius"] > 20]
    is_new = warm.groupby("station")["time"].diff() >= pd.Timedelta(hours=3)
    spell = is_new.groupby(warm["station"]).cumsum()
    grouped = warm.assign(above=warm["celsius"] - 20).groupby(["station", spell.rename("spell")])
    found = grouped.agg(
        window_start=("time", "min"),
        hours=("celsius", "count"),
        highest=("celsius", "max"),
        degree_hours=("above", "sum"),
    )
    return found.reset_index().set_index(["window_start", "station"]).drop(columns="spell").sort_index()


QUESTIONS = {
    "days": (days, pandas_days),
    "last 24 hours, every 6": (last_24_hours, pandas_last_24_hours),
    "warm spells": (warm_spells, pandas_warm_spells),
}


def answer(pipeline):
    """Run a pipeline, and return its windows as a table."""
    found = pd.concat([pd.DataFrame(dict(item)) for item in pipeline.collect()])
    # Partitions come in any order.
    return found.drop(columns="window_end").set_index(["window_start", "station"]).sort_index()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=500, help="rows of an item (500)")
    parser.add_argument(
        "--partitions", type=int, default=2, help="processes for the windows; 1: in this process (2)"
    )
    options = parser.parse_args()
    table = read_table()
    with_celsius = table.assign(celsius=(table["fahrenheit"] - 32) * 5 / 9)
    print(f"{len(table)} readings of {', '.join(STATIONS)}, in items of {options.rows}")
    for name, (question, by_pandas) in QUESTIONS.items():
        found, wanted = answer(question(table, options)), by_pandas(with_celsius)
        pd.testing.assert_frame_equal(found, wanted, check_index_type=False, check_dtype=False, rtol=1e-9)
        warmest = found.nlargest(3, "mean" if "mean" in found else "degree_hours")
        print(f"\n{name}: {len(found)} windows; the warmest:")
        print(warmest.round(2).to_string())
    print("\nall windows are equal to those of pandas")


if __name__ == "__main__":
    sys.exit(main())
