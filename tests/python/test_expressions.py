"""Expressions over columns: the language, its types, and what it refuses."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsline
from dsline import _core
from dsline.expressions import Expression, ExpressionError, check_text

COLUMNS = {
    "b": np.dtype(bool),
    "i1": np.dtype("i1"),
    "i4": np.dtype("i4"),
    "i8": np.dtype("i8"),
    "u1": np.dtype("u1"),
    "u8": np.dtype("u8"),
    "f4": np.dtype("f4"),
    "f8": np.dtype("f8"),
    "big": np.dtype(">f4"),
}


def data(rows=50, seed=0):
    rng = np.random.default_rng(seed)
    columns = {}
    for name, dtype in COLUMNS.items():
        if dtype.kind == "b":
            columns[name] = rng.random(rows) < 0.5
        elif dtype.kind in "iu":
            limits = np.iinfo(dtype)
            columns[name] = rng.integers(limits.min, limits.max, rows, dtype, endpoint=True)
            columns[name][: rows // 2] = rng.integers(0, 100, rows // 2)
        else:
            columns[name] = (rng.standard_normal(rows) * 30).astype(dtype)
            columns[name][::7] = np.nan
            columns[name][3::11] = np.inf
            columns[name][5::13] = 0
    return columns


DATA = data()


def same(got, wanted):
    assert got.dtype == np.asarray(wanted).dtype
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("backend", ["auto", "numpy"])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("f4 > 20 and f8*2 < 90", lambda d: (d["f4"] > 20) & (d["f8"] * 2 < 90)),
        ("f4", lambda d: d["f4"]),
        ("b", lambda d: d["b"]),
        ("not b or f4 != f4", lambda d: ~d["b"] | (d["f4"] != d["f4"])),
        ("10 < i4 <= 50", lambda d: (d["i4"] > 10) & (d["i4"] <= 50)),
        ("i4/2", lambda d: d["i4"] / 2),
        ("i1/i1", lambda d: d["i1"].astype("f8") / d["i1"].astype("f8")),
        ("i1*2", lambda d: d["i1"] * np.int8(2)),
        ("i1 + i4", lambda d: d["i1"] + d["i4"]),
        ("i4 + f4", lambda d: d["i4"] + d["f4"]),
        ("i4 + 0.5", lambda d: d["i4"] + 0.5),
        ("-f8 + +f8", lambda d: -d["f8"] + d["f8"]),
        ("2 * (3 + 4) - f8", lambda d: 14 - d["f8"]),
        ("abs(f4) >= 1e1", lambda d: np.abs(d["f4"]) >= np.float32(10)),
        ("abs(u1)", lambda d: d["u1"]),
        ("sqrt(i4)", lambda d: np.sqrt(d["i4"].astype("f8"))),
        ("sqrt(f4)", lambda d: np.sqrt(d["f4"])),
        ("min(f4, 3, f8)", lambda d: np.minimum(np.minimum(d["f4"].astype("f8"), 3), d["f8"])),
        ("max(i4, -5)", lambda d: np.maximum(d["i4"], np.int32(-5))),
        ("where(b, f4, 0)", lambda d: np.where(d["b"], d["f4"], np.float32(0))),
        ("where(f8 > 0, 1, 2.5)", lambda d: np.where(d["f8"] > 0, 1.0, 2.5)),
        ("isnan(f4) == b", lambda d: np.isnan(d["f4"]) == d["b"]),
        ("isnan(i4)", lambda d: np.zeros(50, bool)),
        ("big * 2 < f4", lambda d: d["big"].astype("f4") * np.float32(2) < d["f4"]),
        ("u8 > 9223372036854775808", lambda d: d["u8"] > np.uint64(1 << 63)),
        ("f8/0", lambda d: d["f8"] / 0),
        ("  ( f4 )  ", lambda d: d["f4"]),
        ("True", lambda d: np.ones(50, bool)),
        ("1.5", lambda d: np.full(50, 1.5)),
        ("b and True", lambda d: d["b"]),
    ],
)
def test_values_and_types(text, wanted, backend):
    with np.errstate(all="ignore"):
        expected = wanted(DATA)
        expression = Expression(text, COLUMNS, backend=backend)
        got = expression(DATA)
        same(got, expected)
        assert expression.dtype == got.dtype
        out = np.empty_like(got)
        assert expression(DATA, out=out) is out
        same(out, expected)
        records = np.zeros(50, list(COLUMNS.items()))
        for name in COLUMNS:
            records[name] = DATA[name]
        same(Expression(text, records.dtype, backend=backend)(records), expected)
        strided = {name: np.repeat(column, 3)[::3] for name, column in DATA.items()}
        same(expression(strided), expected)
        backwards = {name: column[::-1] for name, column in DATA.items()}
        same(expression(backwards)[::-1], expected)


def test_the_result_is_never_the_input():
    column = np.arange(3.0)
    got = Expression("x", {"x": "f8"})({"x": column})
    got[:] = 9
    assert column.tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", ["auto", "numpy"])
@pytest.mark.parametrize("rows", [10, 5000])
def test_a_result_over_its_own_columns(rows, backend):
    total = Expression("a + b", {"a": "f8", "b": "f8"}, backend=backend)
    x = np.arange(float(rows))
    total({"a": x, "b": x[::-1]}, out=x)
    assert (x == rows - 1).all()
    x = np.arange(float(rows))
    total({"a": x, "b": x}, out=x)
    assert (x == 2 * np.arange(rows)).all()
    x = np.arange(float(rows + 1))
    total({"a": x[:-1], "b": x[:-1]}, out=x[1:])
    assert (x[1:] == 2 * np.arange(rows)).all()


def test_a_dict_that_changes_while_it_is_filtered():
    positive = Expression("a >= 0", {"a": "f8"})
    rows = {"a": np.arange(200_000.0), "b": np.arange(200_000)}
    stop = threading.Event()

    def change():
        while not stop.is_set():
            rows["a"] = np.arange(200_000.0)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(50):
            assert positive.filter(rows)["b"][-1] == 199_999
    finally:
        stop.set()
        thread.join()


def test_numbers_instead_of_columns():
    warm = Expression("t > 20 and h*2 < 90", {"t": "f4", "h": "i4"})
    assert warm({"t": 21.5, "h": 3}) is True
    assert warm({"t": 1, "h": 3}) is False
    assert Expression("h/2 + 1", {"h": "i4"})({"h": 5}) == 3.5
    assert Expression("h*2", {"h": "u1"})({"h": np.uint8(7)}) == 14
    assert warm({"t": 21, "h": np.arange(50)[45:46].astype("i4")}).tolist() == [False]
    for bad in (2.5, 1 << 40, "x", True, [[1]]):
        with pytest.raises(ExpressionError):
            warm({"t": 1.0, "h": bad})


def test_attributes_copies_and_equality():
    expression = Expression("f4*2 > i4", COLUMNS)
    assert expression.names == ("f4", "i4")
    assert expression.is_filter
    assert not Expression("f4", COLUMNS).is_filter
    again = pickle.loads(pickle.dumps(expression))
    assert again == expression
    assert hash(again) == hash(expression)
    assert again != Expression("f4*2 > i4", {"f4": "f8", "i4": "i4"})
    same(again(DATA), expression(DATA))
    assert "f4*2" in repr(expression)


def test_equal_parts_are_computed_once():
    expression = Expression("f4*2 > 1 and f4*2 < 9", COLUMNS)
    assert [step.op for step in expression.steps].count("multiply") == 1


@pytest.mark.parametrize(
    ("text", "why", "column"),
    [
        ("", "empty", 1),
        ("   ", "empty", 1),
        ("f4 >", "no expression", 5),
        ("f4 > 20 and nope < 3", "no column 'nope'.*there are: b, i1", 13),
        ("  nope", "no column 'nope'", 3),
        ("é4 + nope", "no column 'é4'", 1),
        ("f4 + 1 > 'x'", "str 'x'", 10),
        ("f4 and b", "'and' needs a truth value", 1),
        ("b and f4", "'and' needs a truth value", 7),
        ("not f4", "'not' needs", 5),
        ("b + 1", r"'\+' needs a number", 1),
        ("-b", "'-' needs a number", 2),
        ("b < b", "cannot compare truth values", 1),
        ("b == 1", "truth value with a number", 1),
        ("1 < 2", "no column is in it", 1),
        ("u1 == 300", "300 does not fit into uint8", 7),
        ("i1 * 1000", "1000 does not fit into int8", 6),
        ("u1 > -1", "-1 does not fit", 6),
        ("-u1", "wrap around", 1),
        ("i8 + u8", "no integer type holds both", 1),
        ("i8 < u8", "no integer type holds both", 1),
        ("i1 + u8", "no integer type holds both", 1),
        ("1/0 > f4", "has no value", 1),
        ("9e999*0 > f4 or 99999999999999999999 > i8", "bits, and 64 are allowed", 17),
        ("f4 ** 2", r"use \+ - \* /", 1),
        ("f4 % 2", r"use \+ - \* /", 1),
        ("i4 // 2", r"use \+ - \* /", 1),
        ("i4 & 2", r"use \+ - \* /", 1),
        ("~i4", "use not", 1),
        ("f4 in f8", "'in' is not part", 1),
        ("f4 is f8", "'is' is not part", 1),
        ("f4 if b else f8", "not part of the language", 1),
        ("abs", "is a function", 1),
        ("abs()", "takes 1 arguments, not 0", 1),
        ("max(f4)", "takes 2 to 16 arguments", 1),
        ("abs(x=f4)", "no named arguments", 1),
        ("abs(*f4)", "not part of the language", 5),
        ("abs(3)", "no column is in it", 1),
        ("where(f4, 1, 2)", "'where' needs a truth value", 7),
        ("where(b, b, 2)", "between a truth value and a number", 1),
        ("sin(f4)", "no function 'sin'; there are: abs, isnan", 1),
        ("f4.real", "'f4.real' is not part", 1),
        ("f4.__class__", "not part of the language", 1),
        ("f4[0]", "not part of the language", 1),
        ("(f4, f8)", "not part of the language", 1),
        ("[f4]", "not part of the language", 1),
        ("{f4}", "not part of the language", 1),
        ("lambda: 1", "not part of the language", 1),
        ("f'{f4}'", "not part of the language", 1),
        ("(x := f4)", "not part of the language", 2),
        ("__import__('os').system('true')", "cannot be called", 1),
        ("__import__('os')", "no function '__import__'", 1),
        ("eval('1')", "no function 'eval'", 1),
        ("None", "None", 1),
        ("...", "not part of the language", 1),
        ("1j * f4", "complex", 1),
        ("f4; f8", "character ';'", 3),
        ("f4 # comment", "character '#'", 4),
        ("f4\n> 2", "not part of the language", 3),
        ("f4 > \\\n2", "not part of the language", 6),
        ("f4\0", "not part of the language", 3),
        ("9**9**9", "not part of the language", 1),
        ("(" * 41 + "f4" + ")" * 41, "nested more than 40", 41),
        ("(" * 5000, "2000 are allowed", 2001),
        ("-" * 1500 + "f4", "nested more than 40", 161),
        ("not " * 60 + "b", "nested more than 40", 161),
        ("f4" + " + f4" * 150, "more than 200 parts|nested more than 40", None),
        ("f4 > " + "9" * 1000, "no expression|64 are allowed", None),
        ("x" * 3000, "2000 are allowed", 2001),
    ],
)
def test_what_is_refused(text, why, column):
    with pytest.raises(ExpressionError, match=why) as caught:
        Expression(text, COLUMNS)
    assert isinstance(caught.value, dsline.PipelineBuildError)
    if column is not None:
        assert caught.value.column == column
        assert f"column {column} of the expression" in str(caught.value)


def test_errors_point_at_the_place():
    with pytest.raises(ExpressionError) as caught:
        Expression("f4 > 1 and nope", COLUMNS)
    assert str(caught.value).splitlines()[1:] == ["    f4 > 1 and nope", "               ^"]


def test_columns_that_cannot_be_computed_with():
    for dtype in ("U3", "M8[s]", "c8", "f2", "O", np.dtype([("a", "i4")])):
        if np.dtype(dtype) == np.dtype("f2"):
            continue
        with pytest.raises(ExpressionError, match="can be computed with"):
            Expression("x == x", {"x": dtype})
    assert Expression("y > 1", {"x": "U3", "y": "i4"}).names == ("y",)
    with pytest.raises(TypeError, match="columns"):
        Expression("x", 5)
    with pytest.raises(TypeError, match="columns"):
        Expression("x", np.dtype("f4"))
    with pytest.raises(TypeError, match="expression is a bytes"):
        Expression(b"x", {"x": "f4"})


def test_data_that_does_not_fit():
    expression = Expression("x + y", {"x": "f4", "y": "f4"})
    good = np.zeros(3, "f4")
    with pytest.raises(ExpressionError, match=r"'y'.*is not in the data, which has x"):
        expression({"x": good})
    with pytest.raises(ExpressionError, match=r"float64.*made for float32"):
        expression({"x": good, "y": np.zeros(3)})
    with pytest.raises(ValueError, match="different lengths: 3, 4"):
        expression({"x": good, "y": np.zeros(4, "f4")})
    with pytest.raises(ValueError, match="2 dimensions"):
        expression({"x": good, "y": np.zeros((3, 2), "f4")})
    with pytest.raises(ExpressionError, match="which has x"):
        expression(np.zeros(3, [("x", "f4")]))


ROWS = [0, 1, 2, 15, 16, 17, 1023, 1024, 1025, 5000, 20_000]


@pytest.mark.parametrize("backend", ["auto", "numpy"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "text", ["f4 > 0", "b", "False", "True", "i4 >= 0 and not b", "f8 != f8 or u1 > 250"]
)
def test_filter_keeps_the_rows(rows, text, backend):
    columns = data(rows, rows)
    columns["name"] = np.arange(rows).astype("U5")
    columns["wide"] = np.zeros(rows, "V24")
    columns["pairs"] = np.arange(2 * rows)[::2]
    expression = Expression(text, COLUMNS, backend=backend)
    mask = Expression(text, COLUMNS, backend="numpy")(columns)
    kept = expression.filter(columns)
    assert list(kept) == list(columns)
    for name, column in columns.items():
        same(kept[name], column[mask])
    out = {name: np.zeros(rows + 3, column.dtype) for name, column in columns.items()}
    kept = expression.filter(columns, out=out)
    for name, column in columns.items():
        same(kept[name], column[mask])
        assert kept[name].base is out[name]
    records = np.zeros(rows, [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        records[name] = column
    got = Expression(text, {n: records.dtype[n] for n in COLUMNS}, backend=backend).filter(records)
    assert got.tobytes() == records[mask].tobytes()


def test_records_of_any_layout():
    text, wanted = Expression("a > 1 and not ok", {"a": "f4", "ok": "?"}), [False, False, True, False]
    values = {"a": np.float32([1, 0, 2, 3]), "ok": np.array([False, False, False, True]), "n": np.arange(4)}
    layouts = [
        [("a", "f4"), ("ok", "?"), ("n", "i8")],
        [("n", "i8"), ("ok", "?"), ("a", "f4")],
        {"names": ["a", "ok", "n"], "formats": ["f4", "?", "i8"], "offsets": [7, 3, 16], "itemsize": 50},
        np.dtype([("ok", "?"), ("a", "f4"), ("n", "i8")], align=True),
    ]
    for layout in [*layouts, *layouts]:
        records = np.zeros(4, layout)
        for name, column in values.items():
            records[name] = column
        spread = np.zeros(12, layout)
        spread[::3] = records
        for each in (records, spread[::3], records[::-1]):
            mask = np.array(wanted)[:: -1 if each.base is records else 1]
            same(text(each), mask)
            kept = text.filter(each)
            assert kept.dtype == records.dtype
            assert [row.tolist() for row in kept] == [records[2].tolist()]
            out = np.zeros(4, layout)
            kept = text.filter(each, out=out)
            assert kept.base is out
            assert len(kept) == 1
        assert text.filter(records[:0]).shape == (0,)


def test_records_whose_fields_are_renamed():
    dtype = np.dtype([("a", "f4"), ("b", "f4")])
    records = np.zeros(3, dtype)
    records["b"] = 1
    positive = Expression("a > 0", {"a": "f4"})
    assert len(positive.filter(records)) == 0
    records.dtype.names = ("b", "a")
    assert len(positive.filter(records)) == 3
    records.dtype.names = ("b", "c")
    with pytest.raises(ExpressionError, match="has b, c"):
        positive.filter(records)


def test_records_that_do_not_fit():
    positive = Expression("a > 0", {"a": "f4"})
    good = np.ones(3, [("a", "f4"), ("n", "i8")])
    assert len(positive.filter(good)) == 3
    with pytest.raises(ExpressionError, match=r"a.*float64.*float32"):
        positive.filter(np.ones(3, [("a", "f8")]))
    with pytest.raises(ExpressionError, match=r"'a'.*which has n"):
        positive.filter(np.ones(3, [("n", "f4")]))
    with pytest.raises(ValueError, match="dimensions"):
        positive.filter(np.ones((3, 2), good.dtype))
    with pytest.raises(ValueError, match="dimensions"):
        positive(np.ones((3, 2), good.dtype))
    for bad in (good, np.ones(2, good.dtype), np.ones(3, [("a", "f4")]), np.ones(6, good.dtype)[::2], {}):
        with pytest.raises((ValueError, TypeError)):
            positive.filter(good, out=bad)
    frozen = np.ones(3, good.dtype)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        positive.filter(good, out=frozen)
    assert len(positive.filter(frozen)) == 3
    with_objects = np.ones(3, [("a", "f4"), ("o", "O")])
    with pytest.raises(ValueError, match="Python objects"):
        positive.filter(with_objects)
    assert Expression("True", good.dtype).filter(good).tolist() == good.tolist()
    assert Expression("2.5", good.dtype)(good).tolist() == [2.5] * 3


def test_filter_refuses():
    numbers = {"f4": np.zeros(3, "f4")}
    with pytest.raises(ExpressionError, match="needs a truth value"):
        Expression("f4", {"f4": "f4"}).filter(numbers)
    warm = Expression("f4 >= 0", {"f4": "f4"})
    with pytest.raises(ValueError, match="shares memory"):
        warm.filter(numbers, out=numbers)
    both = np.zeros(6, "f4")
    with pytest.raises(ValueError, match="or with itself"):
        warm.filter({"f4": np.zeros(3, "f4"), "x": np.zeros(3, "f4")}, out={"f4": both[:3], "x": both[2:5]})
    with pytest.raises(ValueError, match="4 rows, and another one 3"):
        warm.filter({**numbers, "x": np.zeros(4)})
    with pytest.raises(ValueError, match="no rows can be kept"):
        warm.filter({**numbers, "x": 5})
    for bad in (np.zeros(2, "f4"), np.zeros(3, "f8"), np.zeros(6, "f4")[::2]):
        with pytest.raises(ValueError, match="packed array of 3 float32"):
            warm.filter(numbers, out={"f4": bad})
    with pytest.raises(ValueError, match="without Python objects"):
        warm.filter({**numbers, "o": np.array([{}, [], ()], dtype=object)})


def test_backends():
    assert Expression("f4 > 1", COLUMNS).backend == "kernel"
    assert Expression("f4 > 1", COLUMNS, backend="numpy").backend == "numpy"
    assert Expression("big > 1", COLUMNS).backend == "numpy"
    half = Expression("h*2 > 1", {"h": "f2"})
    assert half.backend == "numpy"
    assert half({"h": np.float16([0, 1])}).tolist() == [False, True]
    with pytest.raises(ExpressionError, match="no loops"):
        Expression("big > 1", COLUMNS, backend="kernel")
    with pytest.raises(ValueError, match="'fast'"):
        Expression("f4 > 1", COLUMNS, backend="fast")
    assert _core.expression_backend() in ("avx512", "avx2", "baseline")


def test_the_kernel_refuses_programs_that_do_not_fit_together():
    f4, b = np.dtype("f4"), np.dtype(bool)
    column = (0, 9, (), 0, None)
    for steps, why in [
        ([], "no steps"),
        ([(0, 9, (), 1, None)], "column that is not there"),
        ([(3, 9, (0, 0), 0, None)], "not before it"),
        ([column, (3, 9, (0, 1), 0, None)], "not before it"),
        ([column, (3, 10, (0, 0), 0, None)], "no loop"),
        ([column, (14, 0, (0, 0), 0, None)], "no loop"),
        ([column, (2, 3, (0,), 0, None)], "no loop"),
        ([column, (22, 9, (0, 0, 0), 0, None)], "chooses"),
        ([column, (99, 9, (0,), 0, None)], "unknown"),
        ([column, (3, 99, (0, 0), 0, None)], "unknown"),
        ([column, (1, 10, (), 0, (np.dtype("f8"), 1.0)), (3, 9, (0, 1), 0, None)], "joins two types"),
        ([column] * 3000, "2048 are allowed"),
    ]:
        with pytest.raises(dsline.InvalidArgumentError, match=why):
            _core.ExpressionKernel(steps, (f4,), f4)
    kernel = _core.ExpressionKernel([column, (8, 0, (0, 0), 0, None)], (f4,), b)
    with pytest.raises(ValueError, match="3 rows, not 4"):
        kernel.evaluate((np.zeros(3, f4),), 4)
    with pytest.raises(ValueError, match="float64"):
        kernel.evaluate((np.zeros(3),), 3)
    with pytest.raises(ValueError, match="0 columns"):
        kernel.evaluate((), 3)
    with pytest.raises(TypeError, match="list"):
        kernel.evaluate(([1.0],), 1)
    with pytest.raises(ValueError, match="out must be"):
        kernel.evaluate((np.zeros(3, f4),), 3, np.zeros(2, b))


@pytest.mark.parametrize("backend", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_gives_the_same(backend, tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np, test_expressions as t
from dsline import _core
from dsline.expressions import Expression
if _core.expression_backend() != {backend!r}:
    print("other"); sys.exit()
rows = t.data(3000, 7)
del rows["big"]
columns = {{name: column.dtype for name, column in rows.items()}}
for text in ["where(b, f4*2 + i1, f8/3)", "min(i8, i4) + abs(i1)", "sqrt(abs(f4)) > 2 and not b", "u8*3 + u1 > 7", "max(f4, f8, 0.5)",
             "-i4*i4", "i1/u1", "isnan(f8) or f4 <= 1 or i8 == 3 or u1 != 4", "u8 - u1", "i4 + 0.25"]:
    assert Expression(text, columns, backend="kernel")(rows).tobytes() == Expression(text, columns, backend="numpy")(rows).tobytes(), text
warm = Expression("f4 > 3", columns)
assert warm.filter(rows)["i8"].tolist() == rows["i8"][rows["f4"] > 3].tolist()
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DSLINE_EXPRESSION_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("same", "other")


NUMBERS = st.sampled_from(["f4", "f8", "i4", "i1", "u1", "big", "2", "0.5", "7", "1e3", "0"])


def expressions(depth=3):
    numbers = st.deferred(
        lambda: (
            NUMBERS
            | st.tuples(numbers, st.sampled_from("+-*/"), numbers).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
            | numbers.map(lambda t: f"abs({t})")
            | numbers.map(lambda t: f"sqrt({t})")
            | st.tuples(numbers, numbers).map(lambda t: f"min({t[0]}, {t[1]})")
            | st.tuples(truths, numbers, numbers).map(lambda t: f"where({t[0]}, {t[1]}, {t[2]})")
        )
    )
    truths = st.deferred(
        lambda: (
            st.just("b")
            | st.tuples(numbers, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers).map(
                lambda t: f"({t[0]} {t[1]} {t[2]})"
            )
            | st.tuples(truths, st.sampled_from(["and", "or"]), truths).map(
                lambda t: f"({t[0]} {t[1]} {t[2]})"
            )
            | truths.map(lambda t: f"(not {t})")
        )
    )
    return numbers | truths


class Mirror:
    """The language by Python's own operators on NumPy 2 arrays and numbers."""

    def __init__(self, rows):
        self.names = {
            **rows,
            "big": rows["big"].astype("f4"),
            "abs": np.abs,
            "min": self.least,
            "where": self.choose,
        }
        self.names |= {
            "sqrt": lambda x: np.sqrt(x if np.asarray(x).dtype.kind == "f" else np.asarray(x, "f8"))
        }

    @staticmethod
    def least(one, other):
        return np.minimum(one, other)

    @staticmethod
    def choose(condition, one, other):
        if isinstance(one, (int, float)) and isinstance(other, (int, float)):
            return np.where(condition, type(one + other)(one), type(one + other)(other))
        like = np.result_type(one, other)
        return np.where(condition, np.asarray(one, like), np.asarray(other, like))

    def __call__(self, text):
        text = text.replace(" and ", " & ").replace(" or ", " | ").replace("not ", "~ ")
        with np.errstate(all="ignore"):
            return eval(text, {"__builtins__": {}}, self.names)


@pytest.mark.skipif(int(np.__version__.split(".")[0]) < 2, reason="the mirror has the types of NumPy 2")
@settings(max_examples=80, deadline=None, database=None)
@given(expressions(), st.integers(0, 3))
def test_equal_to_numpy(text, seed):
    rows = data(20, seed)
    try:
        expression = Expression(text, COLUMNS)
    except ExpressionError:
        return
    if not expression.names:
        return
    got = expression(rows)
    same(got, Expression(text, COLUMNS, backend="numpy")(rows))
    wanted = Mirror(rows)(text)
    wanted = np.broadcast_to(wanted, got.shape)
    if any(op in text for op in ("i1 / ", "u1 / ")) or "/ i1" in text or "/ u1" in text:
        np.testing.assert_allclose(got.astype("f8"), wanted.astype("f8"), rtol=1e-2)
        return
    same(got, wanted)


VALUES = st.one_of(
    st.booleans(),
    st.integers(-(1 << 65), 1 << 65),
    st.integers(-300, 300),
    st.floats(),
    st.just("text"),
    st.none(),
    st.floats(width=32).map(np.float32),
)


@settings(max_examples=300, deadline=None)
@given(
    text=st.sampled_from(
        [
            "b",
            "i1",
            "u1 + 1",
            "i4 * 2",
            "i8 - 1",
            "u8",
            "f4 / 3",
            "f8 > i4",
            "not b and f4 < 2",
            "where(b, i8, 7)",
            "u8 > i4",
        ]
    ),
    values=st.lists(VALUES, min_size=8, max_size=8),
)
def test_rows_of_numbers_are_computed_as_numpy_does(text, values):
    columns = {name: COLUMNS[name] for name in COLUMNS if name != "big"}
    row = dict(zip(columns, values, strict=True))

    def result(backend):
        try:
            with np.errstate(all="ignore"):
                return Expression(text, columns, backend=backend)(row)
        except ExpressionError:
            return "refused"

    fast, slow = result("kernel") if "u8 > i4" not in text else result("auto"), result("numpy")
    assert type(fast) is type(slow)
    assert fast == slow or (fast != fast and slow != slow)


def test_rows_of_many_numbers():
    names = {f"c{number}": "f8" for number in range(40)}
    total = Expression(" + ".join(names), names)
    assert total(dict.fromkeys(names, 1.0)) == 40


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("a >", "no expression"),
        ("a.real", "Attribute|attribute|part of the language"),
        ("a[0]", "part of the language"),
        ("lambda: 1", "part of the language"),
        ("open(a)", "no function 'open'"),
        ("(a if b else c) > 1", "part of the language"),
        ("(" * 50 + "a" + ")" * 50, "nested"),
        ("a" * 3000, "2000"),
    ],
)
def test_texts_that_are_no_expressions_whatever_the_columns(text, why):
    with pytest.raises(ExpressionError, match=why):
        check_text(text)


def test_texts_that_may_be_expressions():
    for text in (
        "a",
        "1.5",
        "a > 1 and not b or isnan(c)",
        "where(b, min(a, 2), -c) / 3 != +1e3",
        "0 < a <= 1",
    ):
        check_text(text)
