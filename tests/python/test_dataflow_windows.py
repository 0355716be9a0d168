"""Windows: numbers equal to a model that takes one row at a time, and to pandas; splits, order, state, late rows, bad input."""

import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsline
from dsline.dataflow import aggregates as agg
from dsline.dataflow.aggregates import Aggregate
from dsline.dataflow.dead_letters import failed_items
from dsline.dataflow.descriptions import operator_from_json
from dsline.dataflow.items import Batch
from dsline.dataflow.operator import Context
from dsline.dataflow.policies import dead_letter
from dsline.dataflow.windows import (
    KeyBy,
    Window,
    WindowSpec,
    hash_keys,
    key_by,
    session,
    sliding,
    tumbling,
    window,
)
from dsline.errors import DslineError, ExpressionError, OperatorError, PipelineBuildError
from dsline.specs import ArraySpec

few = settings(max_examples=60, deadline=None)
KNOWN = [13679457532755275413, 17606427253252083309, 16144341313949120298]


class Running:
    """A window that runs, with what it emitted and counted."""

    def __init__(self, operator, on_late=None):
        self.counts = defaultdict(int)
        self.out = []
        self.step = operator.start(Context("window", count=self._count))
        if on_late is not None:
            self.step.on_late = on_late

    def _count(self, what, number):
        self.counts[what] += number

    def feed(self, *items):
        for item in items:
            self.step.process(item, self.out.append)
        return self

    def finish(self):
        self.step.finish(self.out.append)
        return self

    def rows(self):
        return [row for item in self.out for row in rows_of(item)]


def rows_of(item):
    if isinstance(item, Batch):
        return item.to_rows()
    if isinstance(item, np.ndarray):
        return [dict(zip(item.dtype.names, row.tolist(), strict=True)) for row in item]
    if np.ndim(next(iter(item.values()))) == 0:
        return [item]
    return [
        dict(zip(item, row, strict=True)) for row in zip(*(c.tolist() for c in item.values()), strict=True)
    ]


def run(operator, *items):
    return Running(operator).feed(*items).finish()


def columns(rows):
    """Rows of (time, key, value) as columns."""
    time, key, value = zip(*rows, strict=True) if rows else ((), (), ())
    return {"t": np.array(time, np.int64), "k": np.array(key, np.int64), "x": np.array(value, np.float64)}


def split(data, cuts):
    n = len(next(iter(data.values())))
    edges = sorted({0, n, *(cut % (n + 1) for cut in cuts)})
    return [{name: column[a:b] for name, column in data.items()} for a, b in itertools.pairwise(edges)]


def code(*arrays):
    """Something that depends on all rows and their order."""
    result = 0
    for row in zip(*(array.tolist() for array in arrays), strict=True):
        result = (result * 31 + hash(row)) % 1_000_003
    return result


ALL = {
    "n": agg.count(),
    "c": agg.count("x"),
    "s": agg.sum("x"),
    "m": agg.mean("x"),
    "lo": agg.min("x"),
    "hi": agg.max("x"),
    "f": agg.first("x"),
    "l": agg.last("x"),
    "sd": agg.std("x"),
    "v": agg.var("x", ddof=0),
    "md": agg.median("x"),
    "q": agg.quantile("x", 0.8),
    "u": agg.nunique("x"),
    "e": agg.sum("x*2 + t"),
    "code": agg.apply(code, "t", "x", dtype="i8"),
}


def expected(rows):
    """The results of ALL for rows of (time, value) in the order of arrival."""
    rows = sorted(rows, key=lambda row: row[0])  # stable
    x = np.array([value for _, value in rows])
    there = x[~np.isnan(x)]
    some = len(there) > 0
    nan = math.nan
    return {
        "n": len(rows),
        "c": len(there),
        "s": there.sum(),
        "m": there.mean() if some else nan,
        "lo": there.min() if some else nan,
        "hi": there.max() if some else nan,
        "f": there[0] if some else nan,
        "l": there[-1] if some else nan,
        "sd": there.std(ddof=1) if len(there) > 1 else nan,
        "v": there.var() if some else nan,
        "md": np.median(there) if some else nan,
        "q": np.quantile(there, 0.8) if some else nan,
        "u": len(set(there.tolist())),
        "e": np.nansum([2 * value + time for time, value in rows]),
        # Not-a-numbers have no stable hash.
        "code": code(np.array([time for time, _ in rows]), np.nan_to_num(x, nan=-1.5)),
    }


def coded(arrays_t, arrays_x):
    return code(arrays_t, np.nan_to_num(arrays_x, nan=-1.5))


ALL["code"] = agg.apply(coded, "t", "x", dtype="i8")


def check(found, model, start_of, more=()):
    """`found`: rows that were emitted; `model`: (window, key) -> rows."""
    places = [(row["window_start"], row.get("k", 0)) for row in found]
    assert len(set(places)) == len(places)
    assert sorted(places) == sorted((start_of(window), key) for window, key in model)
    by_place = dict(zip(places, found, strict=True))
    for (window_, key), rows in model.items():
        row = by_place[start_of(window_), key]
        for name, value in expected(rows).items():
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), (name, row, rows)


# --- the models: one row at a time -----------------------------------------------------------------------------------------


def model_of_time(rows, size, every, lateness, keep=0):
    """(window, key) -> rows, rows that were in no window, rows that missed some."""
    windows, top, late, partly = defaultdict(list), None, [], 0
    for row in rows:
        time, key, value = row
        dead = -math.inf if top is None else (top - lateness - keep - size) // every
        mine = range((time - size) // every + 1, time // every + 1)
        open_ = [number for number in mine if number > dead]
        if not open_:
            late.append(row)
        elif len(open_) < len(mine):
            partly += 1
        for number in open_:
            windows[number, key].append((time, value))
        top = time if top is None else max(top, time)
    return windows, late, partly


def model_of_rows(rows, size, every, drop_last=False):
    windows, seen = defaultdict(list), defaultdict(int)
    for _, key, value in rows:
        number = seen[key]
        seen[key] += 1
        for window_ in range(max(0, (number - size) // every + 1), number // every + 1):
            windows[window_, key].append((number, value))
    if drop_last:
        return {place: rows for place, rows in windows.items() if len(rows) == size}
    return windows


def model_of_sessions(rows, gap, lateness):
    open_, closed, top, late = [], {}, -math.inf, []
    for row in rows:
        time, key, value = row
        mark = top - lateness
        for session_ in [s for s in open_ if s[2] + gap <= mark]:
            open_.remove(session_)
            closed[session_[1], session_[0]] = session_[3]
        mine = [s for s in open_ if s[0] == key and s[1] < time + gap and time < s[2] + gap]
        if not mine and time + gap <= mark:
            late.append(row)
        else:
            merged = sorted((place, row_) for s in mine for place, row_ in s[4])
            merged.append((len(closed) + 10**9 + len(merged), (time, value)))
            for s in mine:
                open_.remove(s)
            start = min([time, *(s[1] for s in mine)])
            last = max([time, *(s[2] for s in mine)])
            arrived = sorted([*(pair for s in mine for pair in s[4]), (next_number(), (time, value))])
            open_.append((key, start, last, [row_ for _, row_ in arrived], arrived))
        top = max(top, time)
    closed.update({(s[1], s[0]): s[3] for s in open_})
    return closed, late


def next_number(_count=[0]):  # noqa: B006
    _count[0] += 1
    return _count[0]


values = st.one_of(st.integers(-5, 5).map(float), st.floats(-100, 100, width=32), st.just(math.nan))
streams = st.lists(st.tuples(st.integers(-60, 60), st.integers(0, 2), values), max_size=60)
cuts = st.lists(st.integers(0, 60), max_size=8)


@few
@given(streams, cuts, st.integers(1, 20), st.integers(1, 20), st.integers(0, 30), st.booleans())
def test_windows_over_time(rows, cuts, size, every, lateness, ordered):
    every = min(size, every)
    if ordered:
        rows = sorted(rows, key=lambda row: row[0])
    for key in ("k", ()):
        if not key:
            rows = [(time, 0, value) for time, _, value in rows]
        operator = Window(sliding(size, every, time="t", lateness=lateness), key=key, **ALL)
        late_rows = []
        running = Running(operator, on_late=late_rows.append).feed(*split(columns(rows), cuts)).finish()
        windows, late, partly = model_of_time(rows, size, every, lateness)
        check(running.rows(), windows, lambda number: number * every)
        assert all(row["window_end"] - row["window_start"] == size for row in running.rows())
        assert (running.counts["late"], running.counts["late_partly"]) == (len(late), partly)
        passed = [tuple(row.values()) for item in late_rows for row in rows_of(item)]
        assert repr(passed) == repr(late)


@few
@given(streams, cuts, st.integers(1, 20), st.integers(0, 10), st.integers(0, 30))
def test_tumbling_is_sliding_by_its_size(rows, cuts, size, lateness, seed):
    data = split(columns(rows), cuts)
    results = [
        run(Window(spec, key="k", **ALL), *data).rows()
        for spec in (
            tumbling(size, time="t", lateness=lateness),
            sliding(size, size, time="t", lateness=lateness),
        )
    ]
    assert repr(results[0]) == repr(results[1])


@few
@given(streams, cuts, st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_windows_of_rows(rows, cuts, size, every, drop_last):
    every = min(size, every)
    for key in ("k", ()):
        if not key:
            rows = [(time, 0, value) for time, _, value in rows]
        aggregates = {**ALL, "e": agg.sum("x*2")}
        del aggregates["code"]
        aggregates["o"] = agg.apply(lambda x: code(np.nan_to_num(x, nan=-1.5)), "x", dtype="i8")
        operator = Window(sliding(size, every, drop_last=drop_last), key=key, **aggregates)
        found = run(operator, *split(columns(rows), cuts)).rows()
        windows = model_of_rows(rows, size, every, drop_last)
        for row in found:
            mine = windows[row["window_start"] // every, row.get("k", 0)]
            assert row["o"] == code(np.nan_to_num(np.array([value for _, value in mine]), nan=-1.5))
            row["e"] += sum(number for number, value in mine if not math.isnan(value))
            row["code"] = expected(mine)["code"]
        check(found, windows, lambda number: number * every)


@few
@given(streams, cuts, st.integers(1, 20), st.integers(0, 30), st.booleans())
def test_sessions(rows, cuts, gap, lateness, ordered):
    if ordered:
        rows = sorted(rows, key=lambda row: row[0])
    for key in ("k", ()):
        if not key:
            rows = [(time, 0, value) for time, _, value in rows]
        late_rows = []
        operator = Window(session(gap, time="t", lateness=lateness), key=key, **ALL)
        running = Running(operator, on_late=late_rows.append).feed(*split(columns(rows), cuts)).finish()
        sessions, late = model_of_sessions(rows, gap, lateness)
        check(running.rows(), sessions, lambda start: start)
        assert running.counts["late"] == len(late) == sum(len(item["t"]) for item in late_rows)
        for row in running.rows():
            last = max(time for time, _ in sessions[row["window_start"], row.get("k", 0)])
            assert row["window_end"] == last + gap


@few
@given(streams, cuts, cuts, st.integers(1, 20), st.integers(1, 20), st.integers(0, 20), st.integers(0, 20))
def test_late_rows_update(rows, cuts, others, size, every, lateness, keep):
    every = min(size, every)
    operator = Window(
        sliding(size, every, time="t", lateness=lateness, late="update", keep=keep), key="k", **ALL
    )
    windows, late, _ = model_of_time(rows, size, every, lateness, keep)
    for split_at in (cuts, others):
        running = run(operator, *split(columns(rows), split_at))
        newest, revisions = {}, defaultdict(list)
        for row in running.rows():
            place = row["window_start"], row["k"]
            revisions[place].append(row["revision"])
            newest[place] = row
        assert all(numbers == list(range(len(numbers))) for numbers in revisions.values())
        check(list(newest.values()), windows, lambda number: number * every)
        assert running.counts["late"] == len(late)
        assert running.counts["updated"] == sum(len(numbers) - 1 for numbers in revisions.values())


specs = st.one_of(
    st.builds(
        lambda s, e, lt: sliding(s, min(s, e), time="t", lateness=lt),
        *[st.integers(1, 20)] * 2,
        st.integers(0, 20),
    ),
    st.builds(
        lambda s, lt: tumbling(s, time="t", lateness=lt, late="update"), st.integers(1, 20), st.integers(0, 9)
    ),
    st.builds(lambda s, e: sliding(s, min(s, e)), *[st.integers(1, 9)] * 2),
    st.builds(lambda g, lt: session(g, time="t", lateness=lt), st.integers(1, 20), st.integers(0, 20)),
)


@few
@given(streams, cuts, specs, st.integers(0, 8), st.booleans())
def test_state_round_trip(rows, cuts, spec, at, keyed):
    """A step that goes on from a saved state gives the same bits."""
    operator = Window(spec, key="k" if keyed else (), **ALL)
    items = split(columns(rows), cuts)
    whole = run(operator, *items)
    before = Running(operator).feed(*items[:at])
    state = pickle.loads(pickle.dumps(before.step.state_dict()))
    after = Running(operator)
    after.step.load_state_dict(state)
    after.feed(*items[at:]).finish()
    assert repr(before.rows() + after.rows()) == repr(whole.rows())


@few
@given(streams, cuts, specs)
def test_a_saved_state_is_not_touched_by_what_follows(rows, cuts, spec):
    operator = Window(spec, key="k", **ALL)
    items = split(columns(rows), cuts)
    running = Running(operator).feed(*items[:2])
    state = running.step.state_dict()
    frozen = pickle.dumps(state)
    running.feed(*items[2:]).finish()
    one, two = Running(operator), Running(operator)
    one.step.load_state_dict(state)
    two.step.load_state_dict(pickle.loads(frozen))
    assert repr(one.finish().rows()) == repr(two.finish().rows())


@few
@given(streams, cuts, st.integers(1, 20), st.integers(1, 20), st.integers(0, 15))
def test_disorder_within_the_lateness_does_not_matter(rows, cuts, size, every, lateness):
    every = min(size, every)
    newest = np.maximum.accumulate([-math.inf, *(time for time, *_ in rows)])
    rows = [row for row, before in zip(rows, newest, strict=False) if row[0] >= before - lateness]
    data = columns(rows)
    order = np.argsort(data["t"], kind="stable")
    for spec in (
        sliding(size, every, time="t", lateness=lateness),
        session(size, time="t", lateness=lateness),
    ):
        operator = Window(spec, key="k", **ALL)
        shuffled = run(operator, *split(data, cuts))
        in_order = run(operator, {name: column[order] for name, column in data.items()})
        assert shuffled.counts == {}
        exact = [
            sorted(
                (row["window_start"], row["k"], row["n"], row["code"], repr((row["f"], row["l"], row["lo"])))
                for row in r.rows()
            )
            for r in (shuffled, in_order)
        ]
        assert exact[0] == exact[1]


# --- pandas ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pd():
    return pytest.importorskip("pandas")


def sensor_table(n=4000, seed=1, dtype="f8"):
    rng = np.random.default_rng(seed)
    start = np.datetime64("2024-02-28T23:00:00", "ns")
    time = start + np.sort(rng.integers(0, 3 * 3600 * 10**9, n)).astype("m8[ns]")
    x = rng.normal(20, 5, n).astype(dtype)
    x[rng.random(n) < 0.1] = np.nan
    return {
        "time": time,
        "sensor": rng.integers(0, 7, n).astype("u1"),
        "x": x,
        "i": rng.integers(-9, 9, n, dtype="i4"),
    }


NAMES = ("count", "sum", "mean", "min", "max", "first", "last", "std", "var", "median", "nunique")


@pytest.mark.parametrize("batch", [1000, 4000])
@pytest.mark.parametrize("column", ["x", "i"])
def test_pandas_resample(pd, batch, column):
    data = sensor_table()
    operator = Window(tumbling("5m", time="time"), **{name: getattr(agg, name)(column) for name in NAMES})
    found = pd.concat(
        pd.DataFrame(item) for item in run(operator, *split(data, range(0, 4000, batch))).out
    ).set_index("window_start")
    resampled = pd.DataFrame(data).set_index("time")[column].resample("5min")
    wanted = resampled.agg(list(NAMES))
    assert found.index.equals(wanted.index)
    for name in NAMES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-12, err_msg=name)
    assert (found.window_end - found.index == pd.Timedelta("5min")).all()


def test_pandas_groupby_of_keys(pd):
    data = sensor_table(dtype="f4")
    operator = Window(
        tumbling("1h", time="time"),
        key="sensor",
        q=agg.quantile("x", 0.95),
        **{name: getattr(agg, name)("x") for name in NAMES},
    )
    found = pd.concat(pd.DataFrame(item) for item in run(operator, *split(data, range(0, 4000, 300))).out)
    table = pd.DataFrame(data)
    grouped = table.groupby([table.time.dt.floor("h"), "sensor"]).x
    wanted = grouped.agg(list(NAMES))
    assert list(zip(found.window_start, found.sensor, strict=True)) == wanted.index.tolist()
    for name in NAMES:
        # pandas adds float32 up as float32.
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(found.q, grouped.quantile(0.95), rtol=1e-6)
    assert found.dtypes.astype(str).to_dict() == {
        "window_start": "datetime64[ns]",
        "window_end": "datetime64[ns]",
        "sensor": "uint8",
        "q": "float64",
        "count": "int64",
        "sum": "float32",
        "mean": "float64",
        "min": "float32",
        "max": "float32",
        "first": "float32",
        "last": "float32",
        "std": "float32",
        "var": "float32",
        "median": "float32",
        "nunique": "int64",
    }


def test_pandas_rolling(pd):
    """Sliding windows of rows are those of `rolling`, where they are full."""
    x = sensor_table(500)["x"]
    operator = Window(
        sliding(20, 1, drop_last=True), **{name: getattr(agg, name)("x") for name in ("mean", "std", "max")}
    )
    found = pd.concat(pd.DataFrame(item) for item in run(operator, *split({"x": x}, range(0, 500, 64))).out)
    rolling = pd.Series(x).rolling(20, min_periods=2)
    for name in ("mean", "std", "max"):
        np.testing.assert_allclose(found[name], getattr(rolling, name)()[19:], rtol=1e-9)


def test_pandas_rolling_over_time(pd):
    """Each sliding window over time ends where `rolling` of its size, closed on the left, stands."""
    data = sensor_table(600)
    operator = Window(sliding("10m", "1m", time="time"), n=agg.count("x"), mean=agg.mean("x"))
    found = pd.concat(pd.DataFrame(item) for item in run(operator, *split(data, range(0, 600, 100))).out)
    ends = found.window_end.to_numpy()
    series = pd.Series(data["x"], index=pd.DatetimeIndex(data["time"]))
    marked = pd.concat([pd.Series(np.nan, index=pd.DatetimeIndex(ends)), series]).sort_index(kind="stable")
    rolled = marked.rolling("10min", closed="left", min_periods=1)
    np.testing.assert_allclose(found.n, rolled.count()[ends].to_numpy())
    np.testing.assert_allclose(found["mean"], rolled.mean()[ends].to_numpy(), rtol=1e-9)


# --- aggregates ------------------------------------------------------------------------------------------------------------


def test_sums_of_integers_are_exact_and_variances_do_not_cancel():
    big = 2**62
    data = {"i": np.array([big, -big, 3] * 4), "x": 1e9 + np.array([4.0, 7.0, 13.0, 16.0] * 3)}
    operator = Window(tumbling(12), i=agg.sum("i"), v=agg.var("x"), v0=agg.var("x", ddof=0))
    for items in ([data], split(data, range(12))):
        (row,) = run(operator, *items).rows()
        assert row["i"] == 12
        assert row["v0"] == 22.5
        assert row["v"] == pytest.approx(22.5 * 12 / 11, rel=1e-14)


@pytest.mark.parametrize(
    "dtype", ["?", "i1", "u1", "u8", "i8", "f2", "f4", ">f8", ">i4", "M8[s]", "m8[ms]", "S3", "<U2", ">U2"]
)
def test_every_dtype_that_an_aggregate_takes(dtype):
    values = (
        np.array([1, 0, 1, 1]).astype(dtype)
        if np.dtype(dtype).kind in "SU"
        else np.array([1, 0, 1, 1], "i8").astype(dtype)
    )
    kinds = ["count", "first", "last", "nunique"]
    if values.dtype.kind not in "SU":
        kinds += ["min", "max"]
    if values.dtype.kind in "biuf":
        kinds += ["sum", "mean", "std", "var", "median"]
    operator = Window(tumbling(3), **{kind: getattr(agg, kind)("x") for kind in kinds})
    schema = operator.check({"x": ArraySpec((None,), dtype)})
    first, _ = run(operator, {"x": values[:2]}, {"x": values[2:]}).out
    assert {name: column.dtype for name, column in first.items()} == {
        name: spec.dtype for name, spec in schema.items()
    }
    assert first["first"][0] == values[0] and first["last"][0] == values[2] and first["nunique"][0] == 2
    if "min" in first:
        assert (first["min"][0], first["max"][0]) == (values[1], values[0])
    if "sum" in first:
        assert first["sum"][0] == 2 and first["mean"][0] == pytest.approx(2 / 3) and first["median"][0] == 1


@pytest.mark.parametrize("dtype", ["f4", "M8[ns]", "m8[s]"])
def test_missing_values_are_skipped(dtype):
    missing = np.array(["NaT"], dtype) if "8" in dtype else np.array([np.nan], dtype)
    values = np.concatenate([missing, np.array([5, 3], "i8").astype(dtype), missing, missing, missing])
    names = ("count", "first", "last", "min", "max", "nunique")
    operator = Window(tumbling(4), **{name: getattr(agg, name)("x") for name in names})
    full, empty = run(operator, *({"x": values[i : i + 2]} for i in (0, 2, 4))).out
    assert [full[name][0] for name in names] == [2, values[1], values[2], values[2], values[1], 2]
    assert (empty["count"][0], empty["nunique"][0]) == (0, 0)
    assert all(agg.missing_in(empty[name]) is not None for name in ("first", "last", "min", "max"))


def test_infinities():
    x = np.array([np.inf, 1.0, np.inf, 2.0])
    (row,) = run(
        Window(tumbling(4), md=agg.quantile("x", 0.9), hi=agg.max("x"), m=agg.mean("x")), {"x": x}
    ).rows()
    assert row["md"] == row["hi"] == row["m"] == math.inf


def test_expressions_and_several_keys():
    data = {
        "t": np.arange(6),
        "room": np.array(["a", "b", "a", "a", "b", "b"]),
        "up": np.array([True, True, False, True, True, True]),
        "x": np.arange(6.0),
    }
    operator = Window(
        tumbling(10, time="t"), key=("room", "up"), twice=agg.sum("x*2"), warm=agg.sum("where(x > 2, 1, 0)")
    )
    assert run(operator, *split(data, [2, 4])).rows() == [
        {"window_start": 0, "window_end": 10, "room": "a", "up": False, "twice": 4.0, "warm": 0},
        {"window_start": 0, "window_end": 10, "room": "a", "up": True, "twice": 6.0, "warm": 1},
        {"window_start": 0, "window_end": 10, "room": "b", "up": True, "twice": 20.0, "warm": 2},
    ]


def test_apply_says_what_went_wrong():
    def broken(x):
        raise KeyError("oh")

    for function, text in (
        (broken, "KeyError"),
        (lambda x: "text", "'text'"),
        (lambda x: x, "dtype|float64"),
    ):
        with pytest.raises(OperatorError, match=text):
            run(Window(tumbling(2), a=agg.apply(function, "x")), {"x": np.zeros(2)})


@pytest.mark.parametrize(
    "spec", [tumbling(10, time="t"), sliding(10, 5, time="t"), tumbling(2), session(3, time="t")]
)
def test_an_item_that_is_tried_again_is_counted_once(spec):
    """Functions fail, now and then: the second try computes the windows, and does not add the rows again."""
    items = split({"t": np.arange(0, 60, 4), "x": np.arange(15.0)}, range(0, 15, 2))
    fails = []

    def flaky(x):
        if fails and fails.pop():
            raise ConnectionError("not now")
        return len(x)

    operator = Window(spec, n=agg.count(), a=agg.apply(flaky, "x", dtype="i8"), md=agg.median("x"))
    wanted = run(operator, *items).rows()
    running = Running(operator)
    for item in items:
        fails[:] = [True, True]
        for attempt in range(3):
            try:
                running.feed(item)
                break
            except OperatorError as error:
                assert isinstance(error.__cause__, ConnectionError) and attempt < 2
    fails.clear()
    assert running.finish().rows() == wanted
    assert running.counts == {}


def test_windows_of_an_item_that_is_skipped_are_lost_and_counted():
    def picky(x):
        if x[0] == 4:
            raise ValueError("four")
        return x[0]

    operator = Window(tumbling(4), a=agg.apply(picky, "x"))
    running = Running(operator)
    x = np.arange(14.0)
    for at in range(0, 14, 2):
        try:
            running.feed({"x": x[at : at + 2]})
        except OperatorError:
            assert at == 6
    assert [row["a"] for row in running.finish().rows()] == [0, 8, 12]
    assert running.counts == {"windows_lost": 1}


@pytest.mark.parametrize(
    "spec",
    [
        tumbling(10, time="t", lateness=99),
        sliding(10, 5, time="t", lateness=99),
        session(5, time="t", lateness=99),
        tumbling(2),
    ],
)
def test_an_item_that_is_refused_leaves_no_trace(spec):
    rng = np.random.default_rng(9)
    data = {"t": rng.integers(0, 40, 300), "k": rng.integers(0, 9, 300), "x": rng.normal(size=300)}
    operator = Window(spec, key="k", max_open=90, n=agg.count(), md=agg.median("x"))
    items = split(data, range(0, 300, 20))
    running = Running(operator)
    for item in items:
        running.feed(item)
        many = {name: np.repeat(column, 5) for name, column in item.items()} | {"k": np.arange(100) + 100}
        bad = [{**item, "k": item["k"].astype("f8")}, {**item, "t": item["t"].astype("f8")}, many]
        for refused in bad if spec.time is not None else [bad[0], bad[2]]:
            before = len(running.out)
            with pytest.raises(OperatorError):
                running.feed(refused)
            assert len(running.out) == before
    assert running.finish().rows() == run(operator, *items).rows()


# --- kinds of items --------------------------------------------------------------------------------------------------------


def test_records_columns_and_rows_give_the_same():
    data = {"t": np.arange(0, 5, 0.25), "k": np.arange(20) % 2, "x": np.arange(20) * 1.5}
    records = np.empty(20, [("k", "i8"), ("t", "f8"), ("x", "f8"), ("frame", "u1", (3,))])
    for name, column in data.items():
        records[name] = column
    records.flags.writeable = False
    operator = Window(tumbling("1s", time="t"), key="k", n=agg.count(), s=agg.sum("x"), md=agg.median("x"))
    by_columns = run(operator, data)
    by_records = run(operator, records[:7], records[7:7], records[7:])
    by_batches = run(operator, *(Batch(part) for part in split(data, [3, 8])))
    assert by_batches.rows() == by_columns.rows() and {type(item) for item in by_batches.out} == {Batch}
    by_rows = run(operator, *({name: column[i].item() for name, column in data.items()} for i in range(20)))
    assert by_columns.rows() == by_records.rows() == by_rows.rows()
    assert by_columns.rows()[0] == {
        "window_start": 0.0,
        "window_end": 1.0,
        "k": 0,
        "n": 2,
        "s": 3.0,
        "md": 1.5,
    }
    assert all(type(item) is dict for item in (*by_columns.out, *by_rows.out))
    assert all(isinstance(item, np.ndarray) and item.dtype.names for item in by_records.out)
    assert by_records.out[0].dtype == operator.check(ArraySpec((None,), records.dtype)).dtype


def test_a_row_may_have_an_int_where_the_first_had_a_float():
    found = run(Window(tumbling(2), s=agg.sum("x")), {"x": 1.5}, {"x": 2}).rows()
    assert found == [{"window_start": 0, "window_end": 2, "s": 3.5}]


def test_the_first_row_says_which_numbers_are_integers():
    with pytest.raises(OperatorError, match="give floats from the first row on"):
        run(Window(tumbling(2), s=agg.sum("x")), {"x": 1}, {"x": 1.5})


def test_nothing_refers_to_the_input_afterwards():
    data = {"t": np.arange(10), "x": np.arange(10.0), "k": np.array(list("abcabcabca"))}
    operator = Window(tumbling(100, time="t"), key="k", **{n: ALL[n] for n in ("s", "f", "md", "code", "lo")})
    running = Running(operator).feed(data)
    expected_rows = run(operator, {name: column.copy() for name, column in data.items()}).rows()
    for column in data.values():
        column.fill(0)
    assert running.finish().rows() == expected_rows


def test_floats_of_seconds_have_no_rounding_at_the_edges():
    t = np.array([0.1, 0.2, 0.3, 0.30000000000000004, 0.7])
    found = run(Window(tumbling("100ms", time="t"), n=agg.count()), {"t": t}).rows()
    assert [(row["window_start"], row["n"]) for row in found] == [(0.1, 1), (0.2, 1), (0.3, 2), (0.7, 1)]


@pytest.mark.parametrize(
    ("size", "unit", "dtype", "ticks"),
    [
        ("1s", None, "i8", 10**9),
        ("1s", "ms", "i4", 1000),
        (7, "ms", "u2", 7),
        (np.timedelta64(2, "m"), "s", "u8", 120),
        (0.5, "us", "i8", 500_000),
        ("1d", None, "M8[h]", 24),
        ("50s", None, "M8[25s]", 2),
        (2, None, "M8[D]", 2),
    ],
)
def test_units(size, unit, dtype, ticks):
    time = np.array([3 * ticks - 1, 3 * ticks]).astype(dtype)
    (row, last) = (
        item for item in run(Window(tumbling(size, time="t", unit=unit), n=agg.count()), {"t": time}).out
    )
    starts = np.array([row["window_start"][0], last["window_start"][0]])
    assert starts.astype("i8").tolist() == [2 * ticks, 3 * ticks]
    assert (row["window_end"] == starts[1:]).all()
    assert row["window_start"].dtype == (dtype if dtype[0] == "M" else "i8")


def test_windows_close_as_soon_as_the_watermark_reaches_their_end():
    running = Running(Window(tumbling(10, time="t", lateness=3), n=agg.count()))
    running.feed({"t": np.array([1, 12])})
    assert running.out == []
    running.feed({"t": np.array([13, 9])})
    assert [row["n"] for row in running.rows()] == [1]
    assert running.counts == {"late": 1}


def test_late_rows_become_dead_letters(tmp_path):
    log = f"file://{tmp_path}/late"
    late_rows = np.array([(1, 5.0), (2, 6.0)], [("t", "i8"), ("x", "f8")])
    on_time = np.array([(100, 1.0)], late_rows.dtype)
    operator = Window(tumbling(10, time="t", late=dead_letter(log)), n=agg.count())
    running = run(operator, on_time, np.concatenate([on_time, late_rows]))
    assert [row["n"] for row in running.rows()] == [2]
    assert running.counts == {"late": 2}
    (letter,) = failed_items(log)
    assert letter.stage == "window" and "closed" in letter.error
    np.testing.assert_array_equal(letter.item(), late_rows)


# --- large -----------------------------------------------------------------------------------------------------------------


def test_many_keys_and_panes_are_merged_in_pieces(monkeypatch):
    from dsline.dataflow import window_steps

    rng = np.random.default_rng(3)
    n = 20_000
    data = {
        "t": rng.integers(0, 500, n),
        "k": rng.integers(0, 5000, n) * 10**9,
        "x": rng.integers(0, 100, n).astype("f8"),
    }
    operator = Window(
        sliding(50, 7, time="t", lateness=500), key="k", n=agg.count(), s=agg.sum("x"), md=agg.median("x")
    )
    whole = run(operator, data).rows()
    monkeypatch.setattr(window_steps, "_MOST_EXPANDED", 1000)
    monkeypatch.setattr(window_steps, "_FEWEST_COMPACTED", 16)
    assert run(operator, *split(data, range(0, n, 1999))).rows() == whole
    sums = defaultdict(float)
    for time, key, value in zip(*(column.tolist() for column in data.values()), strict=True):
        for number in range((time - 50) // 7 + 1, time // 7 + 1):
            sums[number * 7, key] += value
    assert {(row["window_start"], row["k"]): row["s"] for row in whole} == sums


@pytest.mark.parametrize(
    "keys",
    [
        np.array(["b", "a", "c"] * 60),
        np.array([b"long" * 9, b"x", b""] * 60),
        np.array([2**63, 1, 0] * 60, "u8"),
        np.array([-0.0, 0.5, 0.0] * 60),
    ],
)
def test_keys_of_every_kind(keys):
    operator = Window(tumbling(1000, time="t"), key="k", n=agg.count())
    found = run(operator, {"t": np.arange(180), "k": keys}, {"t": np.arange(180), "k": keys[:180]}).rows()
    names, counts = np.unique(keys, return_counts=True)
    assert [(row["k"], row["n"]) for row in found] == list(
        zip(names.tolist(), (2 * counts).tolist(), strict=True)
    )


def test_too_many_open_windows():
    with pytest.raises(OperatorError, match="max_open is 50") as error:
        run(Window(tumbling(1, time="t", lateness=1000), max_open=50, n=agg.count()), {"t": np.arange(60)})
    assert "60 windows" in str(error.value)
    with pytest.raises(OperatorError, match="max_open"):
        run(Window(tumbling(2), key="k", max_open=50, n=agg.count()), {"k": np.arange(60)})


def test_open_windows_within_the_limit_are_not_refused():
    operator = Window(tumbling(1000, time="t", lateness=1), max_open=50, n=agg.count())
    assert len(run(operator, *({"t": np.arange(i, i + 10)} for i in range(0, 3000, 10))).rows()) == 3


# --- loss of state ---------------------------------------------------------------------------------------------------------


def test_windows_after_a_loss_of_state_are_marked():
    operator = Window(tumbling(10, time="t", lateness=5), flag_partial=True, n=agg.count())
    running = Running(operator)
    running.step.state_lost()
    running.feed({"t": np.array([17, 22, 31, 45])}).finish()
    assert [(row["window_start"], row["partial"]) for row in running.rows()] == [
        (10, True),
        (20, True),
        (30, False),
        (40, False),
    ]
    assert [row["partial"] for row in run(operator, {"t": np.array([17, 22])}).rows()] == [False, False]


def test_the_first_window_of_rows_and_of_sessions_after_a_loss_is_marked():
    running = Running(Window(tumbling(2), key="k", flag_partial=True, n=agg.count()))
    running.step.state_lost()
    running.feed({"k": np.array([1, 1, 1, 1, 2])}).finish()
    assert [(row["k"], row["partial"]) for row in running.rows()] == [(1, True), (1, False), (2, True)]
    running = Running(Window(session(10, time="t"), flag_partial=True, n=agg.count()))
    running.step.state_lost()
    running.feed({"t": np.array([5, 16, 40])}).finish()
    assert [(row["window_start"], row["partial"]) for row in running.rows()] == [
        (5, True),
        (16, False),
        (40, False),
    ]


def test_a_state_of_another_window_is_refused():
    def window_of(**options):
        return Running(Window(tumbling(2, time="t", **options), n=agg.count()))

    for one, other in (({}, {"unit": "ms"}), ({}, {"late": "update"}), ({}, {"lateness": 1})):
        state = window_of(**one).step.state_dict()
        with pytest.raises(OperatorError, match="the state is of"):
            window_of(**other).step.load_state_dict(state)


# --- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: tumbling(0),
        lambda: tumbling(-5),
        lambda: tumbling(True),
        lambda: tumbling(1.5),
        lambda: tumbling("10s"),
        lambda: tumbling("10 parsecs", time="t"),
        lambda: tumbling("s", time="t"),
        lambda: tumbling("0s", time="t"),
        lambda: tumbling("0.1ns", time="t"),
        lambda: tumbling(float("nan"), time="t"),
        lambda: tumbling(np.timedelta64("NaT"), time="t"),
        lambda: tumbling(np.timedelta64(1, "M"), time="t"),
        lambda: tumbling(None, time="t"),
        lambda: tumbling(2**70, time="t"),
        lambda: tumbling("1s", time=3),
        lambda: tumbling("1s", time="t", unit="parsec"),
        lambda: tumbling("1s", time="t", late="perhaps"),
        lambda: tumbling("1s", time="t", late=3),
        lambda: tumbling("1s", time="t", late=dead_letter("shm://x")),
        lambda: tumbling("1s", time="t", lateness=-1),
        lambda: tumbling("1s", time="t", keep="1s"),
        lambda: tumbling("1s", time="t", drop_last=True),
        lambda: tumbling(3, lateness=1),
        lambda: tumbling(3, late="update"),
        lambda: sliding(3, 4),
        lambda: sliding("1s", 0, time="t"),
        lambda: session("1s", time="t", late="update"),
        lambda: session(3, time=None),
        lambda: WindowSpec.from_json({"window": "hopping", "size": 3}),
        lambda: Window("10s", n=agg.count()),
        lambda: Window(tumbling(3)),
        lambda: Window(tumbling(3), n="count"),
        lambda: Window(tumbling(3), key=agg.count()),
        lambda: Window(tumbling(3), key=3, n=agg.count()),
        lambda: Window(tumbling(3), key=("a", "a"), n=agg.count()),
        lambda: Window(tumbling(3), key="n", n=agg.count()),
        lambda: Window(tumbling(3), key="window_end", n=agg.count()),
        lambda: Window(tumbling(3), window_start=agg.count()),
        lambda: Window(tumbling(3), max_open=0, n=agg.count()),
        lambda: Window(tumbling(3), flag_partial=True, partial=agg.count()),
        lambda: Window(tumbling(3, time="t", late="update"), revision=agg.count()),
        lambda: agg.mean(3),
        lambda: agg.mean(""),
        lambda: agg.quantile("x", 1.1),
        lambda: agg.quantile("x", "0.5"),
        lambda: agg.std("x", ddof=-1),
        lambda: agg.apply("x"),
        lambda: agg.apply(len),
        lambda: agg.apply(len, "x", dtype="O"),
        lambda: agg.apply(len, "x", dtype="nonsense"),
        lambda: Aggregate.from_json({"agg": "mode", "of": ["x"]}),
        lambda: KeyBy(()),
        lambda: KeyBy(3.5),
        lambda: KeyBy("k", 0),
        lambda: KeyBy("k", True),
        lambda: KeyBy("k", 5000),
    ],
)
def test_bad_descriptions(make):
    with pytest.raises(PipelineBuildError):
        make()


TYPES = {
    "t": "i8",
    "f": "f4",
    "k": "i4",
    "name": "U3",
    "when": "M8[s]",
    "month": "M8[M]",
    "c": "c16",
    "x": "f8",
}
SCHEMA = {name: ArraySpec((None,), dtype) for name, dtype in TYPES.items()}


@pytest.mark.parametrize(
    ("operator", "text"),
    [
        (Window(tumbling(3, time="nope"), n=agg.count()), "time column 'nope'"),
        (Window(tumbling("1s", time="name"), n=agg.count()), "must be datetime64, integers or floats"),
        (Window(tumbling("1s", time="month"), n=agg.count()), "unit"),
        (Window(tumbling("100ms", time="when"), n=agg.count()), "no whole number of the units"),
        (Window(tumbling("1s", time="when", unit="s"), n=agg.count()), "leave unit"),
        (Window(sliding("1s", 2, time="when"), n=agg.count()), "every"),
        (Window(tumbling(3), key="nope", n=agg.count()), "key column 'nope'"),
        (Window(tumbling(3), key="c", n=agg.count()), "key column 'c'"),
        (Window(tumbling(3), n=agg.mean("nope")), "'nope'"),
        (Window(tumbling(3), n=agg.mean("x +")), "x +"),
        (Window(tumbling(3), n=agg.mean("name")), "mean takes integers"),
        (Window(tumbling(3), n=agg.max("name")), "max takes numbers"),
        (Window(tumbling(3), n=agg.sum("when")), "sum takes integers"),
        (Window(tumbling(3), n=agg.first("c")), "first takes numbers"),
        (Window(tumbling("1000w", time="t", lateness=2**60), n=agg.count(), late=agg.count()), None),
        (Window(sliding("1000w", "1w", time="t", keep=2**60, late="update"), n=agg.count()), None),
        (KeyBy("nope"), "'nope'"),
        (KeyBy("c", 2), "'c'"),
    ],
)
def test_schemas(operator, text):
    if text is None:
        operator.check(SCHEMA)
        return
    with pytest.raises(PipelineBuildError) as error:
        operator.check(SCHEMA)
    assert text in str(error.value)
    assert operator.check(None) is None
    with pytest.raises(PipelineBuildError):
        operator.check(ArraySpec((3, 4), "u1"))


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (np.zeros((3, 4)), "float64 with shape"),
        ("text", "a str"),
        ({}, "nothing in it"),
        ({"t": np.zeros(3)}, "'k'"),
        ({"t": np.array([1.0, np.nan]), "k": np.zeros(2)}, "row 1"),
        ({"t": np.array([1.0, np.inf]), "k": np.zeros(2)}, "row 1"),
        ({"t": np.array([1.0, 1e10]), "k": np.zeros(2)}, "row 1"),
        ({"t": np.array([1, "NaT"], "M8[s]"), "k": np.zeros(2)}, "row 1"),
        ({"t": np.array([1, 2**63], "u8"), "k": np.zeros(2)}, "row 1"),
        ({"t": np.array([1, 2**63 - 1]), "k": np.zeros(2)}, "leave no room"),
        ({"t": np.array([1, -(2**63)]), "k": np.zeros(2)}, "leave no room"),
        ({"t": np.array([1.0, 2.0]), "k": np.array([np.nan, 1])}, "key column 'k'"),
        ({"t": np.array([1.0, 2.0]), "k": np.zeros(3)}, "must be an array of one dimension"),
        ({"t": np.array([1.0, 2.0]), "k": np.zeros((2, 2))}, "'k'"),
        ({"t": np.array([True, False]), "k": np.zeros(2)}, "must be datetime64"),
        ({"t": np.zeros(0), "k": np.zeros(3)}, "must be an array of one dimension"),
    ],
)
@pytest.mark.parametrize("spec", [tumbling("1s", time="t"), session("1s", time="t")])
def test_bad_items(item, text, spec):
    running = Running(Window(spec, key="k", n=agg.count()))
    if "leave no room" in text and spec.kind == "session":
        text = "more than 62 bits"
    with pytest.raises(OperatorError) as error:
        running.feed(item)
    assert text in str(error.value)


def test_columns_may_not_change():
    good = {"t": np.zeros(2), "k": np.array(["a", "b"])}
    for bad in (
        {"t": np.zeros(2)},
        {"t": np.zeros(2, "f4"), "k": good["k"]},
        {"t": np.zeros(2), "k": np.zeros(2)},
    ):
        running = Running(Window(tumbling("1s", time="t"), key="k", n=agg.count())).feed(good)
        running.feed({"t": np.zeros(1), "k": np.array(["longer"])})
        with pytest.raises(OperatorError, match="first item"):
            running.feed(bad)


def test_empty_batches_and_no_input():
    operator = Window(tumbling("1s", time="t"), n=agg.count(), md=agg.median("t"))
    assert run(operator).out == []
    assert run(operator, {"t": np.zeros(0)}, {"t": np.zeros(0)}).out == []
    empty, one = {"t": np.zeros(0)}, {"t": np.zeros(1)}
    assert run(operator, empty, one, empty).rows() == [
        {"window_start": 0.0, "window_end": 1.0, "n": 1, "md": 0.0}
    ]


# --- texts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator",
    [
        Window(
            sliding("10s", "1s", time="t", lateness="200ms", late="update", keep="1m"),
            key=("k", "room"),
            **{**ALL, "code": agg.apply(math.fsum, "x")},
        ),
        Window(tumbling(100, drop_last=True), max_open=5, flag_partial=True, v=agg.var("x", ddof=0)),
        Window(session(0.5, time="t", unit="s", late=math.fsum), n=agg.count()),
        Window(tumbling(3, time="t", late=dead_letter("file://late")), n=agg.count()),
        KeyBy("sensor", 3),
        KeyBy(("a", "b")),
        KeyBy(len, 2),
    ],
)
def test_json(operator):
    data = json.loads(json.dumps(operator.to_json()))
    again = operator_from_json(data)
    assert type(again) is type(operator)
    assert (again.to_json(), again.describe()) == (data, operator.describe())
    assert vars(again) == vars(operator)
    assert vars(pickle.loads(pickle.dumps(operator))) == vars(operator)


def test_json_of_a_lambda_is_refused():
    for operator in (Window(tumbling(2), a=agg.apply(lambda x: 1, "x")), KeyBy(lambda item: 1)):
        with pytest.raises(PipelineBuildError, match="lambda"):
            operator.to_json()


def test_describe():
    operator = window(
        sliding("10s", "1s", time="ts", lateness="200ms"),
        key="sensor",
        mean=agg.mean("t*2"),
        q=agg.quantile("t", 0.95),
    )
    assert operator.describe() == (
        "window sliding(10s, every 1s, of ts, lateness 200ms) by sensor: mean=mean(t*2), q=quantile(t, 0.95)"
    )
    assert Window(tumbling(100), n=agg.count()).describe() == "window tumbling(100 rows): n=count()"
    assert key_by("sensor", partitions=4).describe() == "key_by sensor into 4"


# --- by key ----------------------------------------------------------------------------------------------------------------


def part_of(key, partitions):
    return (int(hash_keys(key)[0]) >> 32) * partitions >> 32


def routed(router, *items):
    route = router.route(Context("key_by"))
    parts = defaultdict(list)
    for item in items:
        for number, part in route(item):
            parts[number].append(part)
    return parts


@few
@given(streams, cuts, st.sampled_from([1, 2, 5, 20]))
def test_key_by_keeps_the_order_of_each_key(rows, cuts, partitions):
    data = columns(rows)
    data["seq"] = np.arange(len(rows))
    parts = routed(KeyBy("k", partitions), *split(data, cuts))
    assert set(parts) <= set(range(partitions))
    by_key = defaultdict(set)
    seen = []
    for number, items in parts.items():
        found = np.concatenate([item["seq"] for item in items])
        assert (np.diff(found) > 0).all()
        seen += found.tolist()
        for key in data["k"][found].tolist():
            by_key[key].add(number)
    assert sorted(seen) == list(range(len(rows)))
    assert all(len(numbers) == 1 for numbers in by_key.values())


def test_key_by_of_every_kind_of_item():
    records = np.zeros(10, [("k", "S4"), ("x", "f8")])
    records["k"] = [b"ab", b"cd"] * 5
    records["x"] = np.arange(10)
    parts = routed(KeyBy("k", 11), records)
    assert {number: [part["x"].tolist() for part in items] for number, items in parts.items()} == {
        part_of(records["k"][:1], 11): [[0, 2, 4, 6, 8]],
        part_of(records["k"][1:2], 11): [[1, 3, 5, 7, 9]],
    }
    # A row goes where the same key goes in columns; one key's item passes as it is.
    row = {"k": b"ab", "x": 1.0}
    ((number, item),) = KeyBy("k", 11).route(Context("key_by"))(row)
    assert item is row and number == part_of(records["k"][:1], 11)
    frame = np.arange(12).reshape(3, 4)
    ((number, item),) = KeyBy(lambda f: ("cam", int(f[0, 0])), 11).route(Context("key_by"))(frame)
    assert item is frame
    parts = routed(KeyBy(lambda f: f[:, 0] // 4 % 2, 4), frame, frame[:0])
    assert sorted(part.tolist() for items in parts.values() for part in items) == [
        [[0, 1, 2, 3], [8, 9, 10, 11]],
        [[4, 5, 6, 7]],
    ]
    assert routed(KeyBy("k"), "anything") == {0: ["anything"]}


def test_key_by_says_what_is_wrong():
    for router, item, text in (
        (KeyBy("k", 2), np.zeros(3), "use a function"),
        (KeyBy("k", 2), {"x": np.zeros(3)}, "no column 'k'"),
        (KeyBy(lambda item: None, 2), np.zeros(3), "object"),
        (KeyBy(lambda item: np.zeros(5), 2), np.zeros(3), "one per row"),
    ):
        with pytest.raises(OperatorError, match=text):
            routed(router, item)


def test_hashes_are_the_same_everywhere():
    """Written down: checkpoints and partitions of other processes depend on them."""
    assert hash_keys(np.array([0, 1, -1])).tolist() == hash_keys(np.array([0, 1, -1], "i1")).tolist()
    assert (
        hash_keys(np.array([0, 1])).tolist()
        == hash_keys(np.array([0, 1], "u2")).tolist()
        == hash_keys(np.array([False, True])).tolist()
    )
    assert hash_keys(np.array(["ab", ""], "U2")).tolist() == hash_keys(np.array(["ab", ""], "U9")).tolist()
    assert (
        hash_keys(np.array([b"ab", b""], "S2")).tolist() == hash_keys(np.array([b"ab", b""], "S17")).tolist()
    )
    assert hash_keys(np.array(["ab"], ">U7")).tolist() == hash_keys(np.array(["ab"])).tolist()
    assert hash_keys(np.array([0.0, 0.5], "f4")).tolist() == hash_keys(np.array([-0.0, 0.5])).tolist()
    assert hash_keys(np.array([np.nan])) == hash_keys(-np.array([np.nan]))
    known = [*hash_keys(np.array([42])), *hash_keys(np.array([0.5])), *hash_keys(np.array(["sensor-1"]))]
    assert list(map(int, known)) == KNOWN
    program = (
        "import numpy as np; from dsline.dataflow.windows import hash_keys as h;"
        "print([int(h(np.array([v]))[0]) for v in (42, 0.5, 'sensor-1')])"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert json.loads(other.stdout) == KNOWN


def test_hashes_spread():
    for keys in (
        np.arange(10_000),
        np.arange(10_000) * 4096,
        np.arange(10_000) / 8,
        np.arange(10_000).astype("U6"),
    ):
        hashes = hash_keys(keys)
        assert len(np.unique(hashes)) == 10_000
        for partitions in (2, 3, 8, 100):
            parts = routed(KeyBy("k", partitions), {"k": keys})
            counts = np.array([len(parts[number][0]["k"]) for number in range(partitions)])
            assert abs(counts - 10_000 / partitions).max() < 5 * (10_000 / partitions) ** 0.5


def test_windows_after_key_by_are_those_of_the_whole_stream():
    data = {name: column for name, column in sensor_table(3000).items() if name != "i"}
    operator = Window(tumbling("10m", time="time"), key="sensor", n=agg.count(), m=agg.mean("x"))
    parts = routed(KeyBy("sensor", 3), *split(data, range(0, 3000, 200)))
    found = [row for items in parts.values() for row in run(operator, *items).rows()]
    whole = run(operator, *split(data, range(0, 3000, 200))).rows()
    order = lambda row: (row["window_start"], row["sensor"])  # noqa: E731
    assert repr(sorted(found, key=order)) == repr(sorted(whole, key=order))


# --- in a pipeline ---------------------------------------------------------------------------------------------------------


def batches():
    k = np.arange(50) % 3
    return [Batch(t=np.arange(at, at + 50), k=k, x=np.arange(50.0)) for at in range(0, 500, 50)]


def test_windows_of_windows():
    found = (
        dsline.Pipeline()
        .source(batches())
        .filter("x < 49")
        .key_by("k")
        .window(tumbling(50, time="t"), m=agg.mean("x"))
        .window(tumbling(250, time="window_start"), n=agg.count(), m=agg.max("m"))
        .collect()
    )
    rows = [row for item in found for row in item.to_rows()]
    assert [(row["window_start"], row["n"], row["m"]) for row in rows] == [(0, 15, 24.5), (250, 15, 24.5)]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda p: p.window(tumbling(10, time="nope"), n=agg.count(), name="mine"),
            "stage 'mine': there is no time column",
        ),
        (
            lambda p: p.window(tumbling(10), n=agg.mean("y"), name="mine"),
            "stage 'mine': there is no column 'y'",
        ),
        (
            lambda p: p.key_by("z").window(tumbling(10), n=agg.count(), name="mine"),
            "stage 'mine': there is no key",
        ),
        (
            lambda p: p.key_by("z", partitions=2).window(tumbling(10), n=agg.count()),
            "stage 'key_by': there is no key",
        ),
        (
            lambda p: p.window(tumbling(10), n=agg.count(), name="mine").filter("x > 1"),
            "there is no column 'x'",
        ),
        (lambda p: p.window(tumbling(10), n=agg.count(), workers=2, name="mine"), "mine"),
    ],
)
def test_the_plan_is_checked(build, text):
    pipeline = dsline.Pipeline().source(batches(), schema=dsline.Columns(t="i8", k="i8", x="f8"))
    with pytest.raises(PipelineBuildError) as error:
        build(pipeline).sink(print).plan()
    assert text in str(error.value)


@pytest.mark.parametrize("policy", ["skip", "retry"])
def test_error_policies(policy):
    calls = []

    def fails_at_100(x):
        calls.append(x[0])
        if x[0] == 100 and (policy == "skip" or calls.count(100) == 1):
            raise ValueError("no")
        return x[0]

    pipeline = (
        dsline.Pipeline()
        .source(batches())
        .window(
            tumbling(50, time="t"),
            first=agg.apply(fails_at_100, "t"),
            n=agg.count(),
            on_error="skip" if policy == "skip" else dsline.retry(2, backoff=0),
            name="mine",
        )
    )
    found = [row for item in pipeline.collect() for row in item.to_rows()]
    assert [row["first"] for row in found] == [
        at for at in range(0, 500, 50) if policy == "retry" or at != 100
    ]
    assert all(row["n"] == 50 for row in found)


def test_an_error_names_the_stage_and_the_function():
    def broken(x):
        raise KeyError("oh")

    pipeline = dsline.Pipeline().source(batches()).window(tumbling(9), a=agg.apply(broken, "x"), name="mine")
    with pytest.raises(OperatorError, match=r"stage 'mine'.*broken raised KeyError"):
        pipeline.collect()


def test_errors_are_dsline_errors():
    assert issubclass(ExpressionError, PipelineBuildError) and issubclass(OperatorError, DslineError)
