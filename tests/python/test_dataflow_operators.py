"""Items, operators and merges without processes: what they do, what they refuse, and how they go on after a crash."""

import copy
import dataclasses
import functools
import gc
import inspect
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dsline
from dsline import ArraySpec, OperatorError, PipelineBuildError
from dsline.dataflow import batching, descriptions, items, merging, operators, ops
from dsline.dataflow.descriptions import operator_from_json
from dsline.dataflow.items import Batch, Columns
from dsline.dataflow.operator import Context
from dsline.dataflow.processes import WorkerProcess
from dsline.expressions import Expression

RECORD = np.dtype([("t", "f4"), ("n", "i8"), ("ok", "?")])


def context(**more):
    counts = {}

    def count(what, number):
        counts[what] = counts.get(what, 0) + number

    made = Context("my stage", count=count, **more)
    made.counts = counts
    return made


def run(operator, given, ends=True, where=None):
    """What an operator makes of items."""
    out = []
    step = operator.start(where or context())
    for item in given:
        step.process(item, out.append)
    if ends:
        step.finish(out.append)
    step.close()
    return out


def batch_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(t=rng.normal(20, 5, rows).astype("f4"), n=np.arange(rows), ok=rng.random(rows) < 0.5)


def assert_same(got, wanted):
    assert items.same(got, wanted), f"{got} is not {wanted}"


def pieces(whole, lengths):
    """Records or columns cut into items."""
    at = 0
    for length in lengths:
        yield items.take_rows(whole, at, at + length)
        at += length


# --- Batch --------------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_mapping_with_rows():
    batch = Batch(t=[1.5, 2.5, 3.5], n=[1, 2, 3])
    assert len(batch) == batch.rows == 3
    assert list(batch) == ["t", "n"] == list(batch.keys())
    assert len(batch.keys()) == len(batch.values()) == len(batch.items()) == 2
    assert dict(batch)["t"] is batch.t is batch["t"]
    assert "t" in batch
    assert "rows" not in batch
    assert batch.nbytes == 48
    assert batch[1] == {"t": 2.5, "n": 2}
    assert batch[-1] == {"t": 3.5, "n": 3}
    assert_same(batch[1:], Batch(t=[2.5, 3.5], n=[2, 3]))
    assert np.shares_memory(batch[1:].t, batch.t)
    assert_same(batch[::-2], Batch(t=[3.5, 1.5], n=[3, 1]))
    assert_same(batch[batch.t > 2], Batch(t=[2.5, 3.5], n=[2, 3]))
    assert_same(batch[np.array([2, 0])], Batch(t=[3.5, 1.5], n=[3, 1]))
    assert batch[[]].rows == 0
    assert list(batch[["n"]]) == ["n"]
    assert not batch[:0]
    assert batch == batch.copy()
    assert batch != Batch(n=[1, 2, 3], t=[1.5, 2.5, 3.5])
    assert batch != 3
    assert repr(batch) == "Batch(3 rows; t: float64, n: int64)"
    assert {"t", "n", "rows"} <= set(dir(batch))
    assert Batch({"a b": [1]}, c=[2])["a b"].tolist() == [1]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Batch(), dsline.InvalidArgumentError, "one column"),
        (lambda: Batch(t=[1], n=[1, 2]), dsline.InvalidArgumentError, "'n' has 2 rows"),
        (lambda: Batch(t=[[1]]), dsline.InvalidArgumentError, "'t' has 2 dimensions"),
        (lambda: Batch(t=3), dsline.InvalidArgumentError, "'t' has 0 dimensions"),
        (lambda: Batch(t=[object()]), TypeError, "Python objects"),
        (lambda: Batch({3: [1]}), TypeError, "named 3"),
        (lambda: Batch(t=[1])["x"], KeyError, "no column 'x'.*t"),
        (lambda: Batch(t=[1]).x, AttributeError, "no column or attribute 'x'"),
        (lambda: Batch(t=[1])[5], IndexError, "out of bounds"),
        (lambda: Batch(t=[1])[np.array([True, False])], IndexError, r"\(2,\)"),
        (lambda: Batch(t=[1])[1.5], TypeError, "1.5"),
        (lambda: Batch(t=[1])[np.array([[0]])], IndexError, "2 dimensions"),
        (lambda: hash(Batch(t=[1])), TypeError, "unhashable"),
        (lambda: setattr(Batch(t=[1]), "t", 3), AttributeError, "no setter|no attribute"),
        (lambda: Batch.from_rows([]), dsline.InvalidArgumentError, "no rows"),
        (lambda: Batch.from_rows([{"a": 1}, {"b": 1}]), dsline.InvalidArgumentError, "row 1"),
        (lambda: Batch.from_records(np.zeros(3)), TypeError, "structured"),
        (lambda: Columns(), dsline.InvalidArgumentError, "one column"),
        (lambda: Columns(a=ArraySpec((3,), "f4")), dsline.InvalidArgumentError, "'a'"),
        (lambda: Columns(a="O"), TypeError, "object"),
        (lambda: Columns(np.dtype("f4")), TypeError, "no fields"),
        (lambda: setattr(Columns(a="f4"), "a", 1), AttributeError, "changed"),
    ],
)
def test_what_batches_and_columns_refuse(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_rows_records_and_columns():
    batch = batch_of(10)
    records = batch.to_records()
    assert records.dtype == RECORD
    again = Batch.from_records(records)
    assert_same(again, batch)
    assert np.shares_memory(again.t, records)
    assert_same(Batch.from_rows(batch.to_rows()).copy()["n"], batch.n)
    assert Batch.from_rows([{"s": "ab"}, {"s": "c"}]).s.dtype == "U2"
    columns = Columns(batch.dtypes)
    assert columns == Columns(RECORD) == pickle.loads(pickle.dumps(columns))
    assert hash(columns) == hash(Columns(RECORD))
    assert columns != Columns(t="f4")
    assert columns == {name: ArraySpec((None,), dtype) for name, dtype in batch.dtypes.items()}
    assert repr(Columns(t="f4", n=">i2")) == "Columns(t='float32', n='>i2')"
    assert repr(Columns({"a b": "f4"})) == "Columns({'a b': '<f4'})"
    for schema in (columns, ArraySpec((None,), RECORD), ArraySpec((2, None), "f4", "F"), None):
        assert items.schema_from_json(json.loads(json.dumps(items.schema_to_json(schema)))) == schema
    nested = np.dtype(
        {"names": ["a", "b"], "formats": [("f4", (2,)), RECORD], "offsets": [4, 16], "itemsize": 40}
    )
    assert items.schema_from_json(items.schema_to_json(ArraySpec((None,), nested))) == ArraySpec(
        (None,), nested
    )


def test_a_batch_travels_beside_the_pickle():
    batch = Batch(t=np.arange(4000.0), when=np.arange(4000).astype("M8[ns]"), every=np.arange(8000)[::2])
    buffers = []
    stream = pickle.dumps(batch, 5, buffer_callback=buffers.append)
    assert len(stream) < 300
    assert len(buffers) == 3
    assert_same(pickle.loads(stream, buffers=buffers), batch)
    odd = Batch(
        {
            "a b": np.arange(3, dtype=">i2"),
            "text": ["x", "yy", ""],
            "raw": np.array([b"1", b"", b"22"]),
            "half": np.float16([1, 2, 3]),
        },
        pairs=np.zeros(3, RECORD),
        void=np.zeros(3, "V5"),
        late=np.array(["2024-01-01", "NaT", "1999-12-31"], "M8[D]"),
        swapped=np.array([1, 2, 3], ">M8[s]"),
        back=np.arange(3)[::-1],
        complex=np.array([1j, 2, 3]),
    )
    for each in (odd, odd[:0], odd[1:2], batch):
        for protocol in range(2, 6):
            again = pickle.loads(pickle.dumps(each, protocol))
            assert again.to_rows() == each.to_rows()
        assert_same(again, each)  # NumPy turns other byte orders into the native one in older protocols
        for again in (copy.copy(each), copy.deepcopy(each)):
            assert_same(again, each)
    with dsline.ShmChannel(storage="memfd", capacity=4, slot_size=1 << 18) as channel:
        channel.send_object(batch)
        with channel.recv_message() as message:
            got = message.object()
            assert_same(got, batch)
            assert not got.t.flags.writeable
            assert got.copy().t.flags.writeable
            del got
        gc.collect()


def test_a_batch_is_an_arrow_record_batch():
    pa = pytest.importorskip("pyarrow")
    batch = batch_of(5)
    table = pa.record_batch(batch)
    assert table.num_rows == 5
    assert table.schema.names == ["t", "n", "ok"]
    assert table["n"].to_pylist() == batch.n.tolist()


def test_kinds_and_schemas():
    frame = np.zeros((2, 3), "u1")
    records = np.zeros(4, RECORD)
    batch = batch_of(4)
    for item, kind, rows, schema in [
        (frame, "frame", 1, ArraySpec((2, 3), "u1")),
        (np.zeros((2, 2), RECORD), "frame", 1, ArraySpec((2, 2), RECORD)),
        (records, "records", 4, ArraySpec((None,), RECORD)),
        (batch, "columns", 4, Columns(RECORD)),
        ({"a": 1}, "object", 1, None),
        ([1, 2], "object", 1, None),
    ]:
        assert items.kind_of(item) == kind
        assert items.rows_of(item) == rows
        assert items.schema_of(item) == schema
        assert items.matches(schema, item)
        assert schema is None or items.kind_of_schema(schema) == kind
    assert not items.matches(Columns(t="f4"), batch)
    assert not items.matches(Columns(t="f4", n="i4", ok="?"), batch)
    assert not items.matches(ArraySpec((2, 3), "u1"), batch)
    assert items.nbytes_of([frame, {"a": b"123"}, 5]) == 9
    assert_same(items.concatenate([batch[:1], batch[1:]]), batch)
    assert_same(items.concatenate([records, records]), np.zeros(8, RECORD))
    for wrong in ([], [frame], [batch, records], [batch, batch[["t"]]]):
        with pytest.raises(dsline.InvalidArgumentError):
            items.concatenate(wrong)


# --- map ----------------------------------------------------------------------------------------------------------------


def double(item):
    return item * 2


def thrice(item):
    yield item
    yield None
    yield item


def halve(frame, out):
    return np.floor_divide(frame, 2, out=out)


class Adder:
    made = 0
    closed = 0

    def __init__(self, number=1):
        Adder.made += 1
        self.number = number

    def __call__(self, item):
        return item + self.number

    def close(self):
        Adder.closed += 1


class Counter:
    def __init__(self):
        self.seen = 0

    def __call__(self, item):
        self.seen += 1
        return self.seen

    def state_dict(self):
        return self.seen

    def load_state_dict(self, state):
        self.seen = state


def test_map():
    assert run(ops.map(double), [1, 2]) == [2, 4]
    assert run(ops.map(lambda item: None if item == 2 else item), [1, 2, 3]) == [1, 3]
    assert run(ops.map(thrice), [1, 2]) == [1, 1, 2, 2]
    before = Adder.made, Adder.closed
    assert run(ops.map(Adder), [1, 2]) == [2, 3]
    assert (Adder.made, Adder.closed) == (before[0] + 1, before[1] + 1)
    assert run(ops.map(functools.partial(Adder, number=10)), [1, 2]) == [11, 12]
    own = Adder(5)
    assert run(ops.map(own), [1]) == [6]
    assert Adder.closed == before[1] + 2  # not the user's own object
    stateful = ops.map(Counter)
    assert stateful.stateful
    assert not ops.map(Adder).stateful
    step = stateful.start(context())
    step.process("a", [].append)
    other = stateful.start(context())
    other.load_state_dict(step.state_dict())
    out = []
    other.process("b", out.append)
    assert out == [2]


def test_map_writes_into_the_output_slot():
    given_out = []

    def allocate(shape, dtype):
        given_out.append(np.empty(shape, dtype))
        return given_out[-1]

    frame = np.arange(12).reshape(3, 4)
    for returns in ("same", ArraySpec((3, 4), "i8"), ArraySpec((None, 4), "i8")):
        (got,) = run(ops.map(halve, returns=returns), [frame], where=context(allocate=allocate))
        assert got is given_out[-1]
        assert_same(got, frame // 2)
        (got,) = run(ops.map(halve, returns=returns), [frame])
        assert_same(got, frame // 2)
    (got,) = run(ops.map(np.sqrt, returns=ArraySpec((None,), "f8")), [np.arange(3.0)])
    assert_same(got, np.sqrt(np.arange(3.0)))
    # Another array than out is what is sent.
    (got,) = run(ops.map(lambda frame, out: frame, returns="same"), [frame], where=context(allocate=allocate))
    assert got is frame
    # Fortran order is not what a slot is lent in.
    wanted = ArraySpec((3, 4), "i8", "F")
    (got,) = run(ops.map(halve, returns=wanted), [frame], where=context(allocate=None))
    assert got.flags.f_contiguous
    # A parameter that nobody asked for is left alone.
    assert_same(run(ops.map(np.negative), [frame])[0], -frame)


@pytest.mark.parametrize(
    ("function", "returns", "item", "text"),
    [
        (
            double,
            ArraySpec((3,), "f4"),
            np.zeros(4, "f4"),
            r"float32' \(4,\).*ArraySpec\(\(3,\), 'float32'\)",
        ),
        (double, ArraySpec((4,), "f8"), np.zeros(4, "f4"), r"float32' \(4,\).*float64"),
        (double, ArraySpec((4,), "f8"), 3, "an int|a int"),
        (double, "same", 3.5, None),
        (thrice, Columns(t="f4"), batch_of(3), "Batch.*Columns"),
        (lambda item: item[:2], "same", np.zeros(4), r"\(2,\)"),
        (lambda item, out: None, "same", np.zeros(4), "returned None"),
        (halve, "same", {"a": 1}, "takes arrays"),
        (halve, ArraySpec((None, None), "f4"), np.zeros(4), "axis 1"),
    ],
)
def test_results_are_checked(function, returns, item, text):
    if text is None:
        assert run(ops.map(function, returns=returns), [item]) == [7.0]
        return
    with pytest.raises(OperatorError, match=f"stage 'my stage'.*({text})"):
        run(ops.map(function, returns=returns), [item])


async def asynchronous(item):
    return item


class Uncallable:
    pass


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ops.map(3), "cannot be called"),
        (lambda: ops.map(Uncallable), "cannot be called"),
        (lambda: ops.map(asynchronous), "asynchronous"),
        (lambda: ops.map(halve), "out=.*returns="),
        (lambda: ops.map(halve, returns=Columns(a="f4")), "Columns"),
        (lambda: ops.map(double, returns="f4"), "returns is 'f4'"),
        (lambda: ops.map_batches(double, batch=0), "batch is 0"),
        (lambda: ops.map_batches(double, linger="soon"), "linger is 'soon'"),
        (lambda: ops.map_batches(thrice), "generator"),
        (lambda: ops.filter(3), "cannot be called"),
        (lambda: ops.filter(" "), "expression"),
        (lambda: ops.filter("a >"), "no expression"),
        (lambda: ops.derive(z="a.b"), "part of the language"),
        (lambda: ops.branch(z="f(a)"), "no function 'f'"),
        (lambda: ops.filter_expr(double), "filter_py"),
        (lambda: ops.filter_py("a > 1"), "filter_expr"),
        (lambda: ops.derive(), "one name"),
        (lambda: ops.derive(a=3), "'a'.*3"),
        (lambda: ops.select(), "one name"),
        (lambda: ops.select("a", a="b"), "'a' twice"),
        (lambda: ops.select("a", b=3), "3 for 'b'"),
        (lambda: ops.batch(0), "size is 0"),
        (lambda: ops.batch(True), "size is True"),
        (lambda: ops.batch(3, linger=-1), "linger is -1"),
        (lambda: ops.batch(3, linger=math.inf), "linger is inf"),
        (lambda: ops.batch(3, drop_last=True, pad=0), "drop_last"),
        (lambda: ops.rate_limit(0), "per_second is 0"),
        (lambda: ops.rate_limit(math.nan), "per_second is nan"),
        (lambda: ops.rate_limit(1, burst=0), "burst is 0"),
        (lambda: ops.rate_limit(1, full="latest"), "full is 'latest'"),
        (lambda: ops.branch(), "one name"),
        (lambda: ops.branch(a=None, b="x > 1"), "None"),
        (lambda: ops.broadcast(0), "outputs is 0"),
        (lambda: ops.broadcast(["a", "a"]), "no name twice"),
        (lambda: ops.broadcast("ab"), "'ab'"),
        (lambda: ops.merge(0), "inputs is 0"),
        (lambda: ops.merge(2, order=""), "order is ''"),
        (lambda: ops.merge(2, order="zip", idle=1), "idle="),
        (lambda: operator_from_json({"op": "explode"}), "no operator 'explode'.*batch"),
        (lambda: operator_from_json({"op": "batch", "length": 3}), "no 'length'.*size"),
        (lambda: operator_from_json({"op": "batch"}), "needs 'size'"),
        (lambda: operator_from_json({"op": "map", "function": {"function": "os:nothing"}}), "nothing"),
        (lambda: ops.map(lambda item: item).to_json(), "lambda"),
        (lambda: ops.map(Adder(3)).to_json(), "Adder"),
        (lambda: ops.batch(3, pad=object()).to_json(), "cannot be written"),
    ],
)
def test_what_is_refused_when_it_is_described(make, text):
    with pytest.raises(PipelineBuildError, match=text):
        make()


# --- schemas ------------------------------------------------------------------------------------------------------------

FRAME = ArraySpec((480, 640), "u1")
RECORDS = ArraySpec((None,), RECORD)
COLUMNS = Columns(RECORD)


@pytest.mark.parametrize(
    ("operator", "schema", "wanted"),
    [
        (ops.map(double), FRAME, None),
        (ops.map(double, returns="same"), FRAME, FRAME),
        (ops.map(double, returns=RECORD), FRAME, RECORDS),
        (ops.map(double, returns={"t": "f4"}), None, Columns(t="f4")),
        (ops.map_batches(double, batch=8, returns="same"), FRAME, ArraySpec((None, 480, 640), "u1")),
        (ops.filter("t > 20"), RECORDS, RECORDS),
        (ops.filter("t > 20"), ArraySpec((8,), RECORD), RECORDS),
        (ops.filter("t > 20"), COLUMNS, COLUMNS),
        (ops.filter("t > 20"), None, None),
        (ops.filter(double), FRAME, FRAME),
        (ops.derive(z="t*2", ok="n"), COLUMNS, Columns(t="f4", n="i8", ok="i8", z="f4")),
        (
            ops.derive(z="t*2"),
            RECORDS,
            ArraySpec((None,), [("t", "f4"), ("n", "i8"), ("ok", "?"), ("z", "f4")]),
        ),
        (ops.derive(z="t"), None, None),
        (ops.select("n", temperature="t"), COLUMNS, Columns(n="i8", temperature="f4")),
        (ops.select("n"), RECORDS, ArraySpec((None,), [("n", "i8")])),
        (ops.batch(16), RECORDS, RECORDS),
        (ops.batch(16), COLUMNS, COLUMNS),
        (ops.batch(16), FRAME, ArraySpec((None, 480, 640), "u1")),
        (ops.batch(16, drop_last=True), FRAME, ArraySpec((16, 480, 640), "u1")),
        (ops.batch(16, pad=0, linger=1), FRAME, ArraySpec((16, 480, 640), "u1")),
        (ops.batch(16), None, None),
        (ops.unbatch(), FRAME, ArraySpec((640,), "u1")),
        (ops.unbatch(), COLUMNS, COLUMNS),
        (ops.rate_limit(5), COLUMNS, COLUMNS),
        (ops.branch(a="t > 3", b=None), ArraySpec((4,), RECORD), RECORDS),
        (ops.broadcast(3), FRAME, FRAME),
        (ops.filter_py_batch(double, batch=4), COLUMNS, COLUMNS),
        (ops.merge(1, order="n"), COLUMNS, COLUMNS),
        (ops.merge(1, order="zip"), COLUMNS, None),
    ],
)
def test_schemas(operator, schema, wanted):
    assert operator.check(schema) == wanted


@pytest.mark.parametrize(
    ("operator", "schema", "text"),
    [
        (ops.filter("temperature > 20"), RECORDS, "no column 'temperature'.*t, n, ok"),
        (ops.filter("t + 1"), COLUMNS, "truth value"),
        (ops.filter("t > 20"), FRAME, "use a function"),
        (ops.derive(z="ok + 1"), COLUMNS, "truth|number"),
        (ops.derive(z="t"), FRAME, "records and columns"),
        (ops.select("temperature"), RECORDS, "no column 'temperature'.*t, n, ok"),
        (ops.branch(a="x > 1"), COLUMNS, "no column 'x'"),
        (ops.unbatch(), ArraySpec((), "f4"), "taken apart"),
        (ops.merge(1, order="ts"), COLUMNS, "no column 'ts'"),
        (ops.merge(1, order="ok"), COLUMNS, "number or a time"),
        (ops.merge(1, order="t"), FRAME, "use a function"),
    ],
)
def test_schemas_that_do_not_fit(operator, schema, text):
    with pytest.raises(PipelineBuildError, match=text):
        operator.check(schema)


def test_schemas_of_several_inputs():
    merge = ops.merge(2, order="n")
    assert merge.check_inputs([COLUMNS, COLUMNS]) == COLUMNS
    assert merge.check_inputs([COLUMNS, None]) is None
    with pytest.raises(PipelineBuildError, match="different schemas"):
        merge.check_inputs([COLUMNS, Columns(n="i8")])
    assert ops.merge(2).check_inputs([COLUMNS, FRAME]) is None
    assert ops.merge(2).check_inputs([RECORDS, RECORDS]) == RECORDS


def test_what_a_schema_promises_is_what_comes():
    batch = batch_of(20)
    for operator in (
        ops.filter("t > 20"),
        ops.derive(z="t*2", ok="n", y="z + 1"),
        ops.select("n", temperature="t"),
        ops.batch(7),
        ops.unbatch(),
    ):
        for item in (batch, batch.to_records()):
            promised = operator.check(items.schema_of(item))
            for got in run(operator, [item]):
                assert items.matches(promised, got), operator


# --- JSON and pickles ---------------------------------------------------------------------------------------------------

EVERY = [
    ops.map(double),
    ops.map(np.sqrt, returns=ArraySpec((None, 3), "f8")),
    ops.map(functools.partial(Adder, number=4)),
    ops.map(double, returns="same"),
    ops.map(double, returns=Columns(t="f4", n="i8")),
    ops.map_batches(double, batch=8, linger=None),
    ops.filter("t > 20 and not ok"),
    ops.filter(double),
    ops.derive(z="t*2", y="z+1"),
    ops.select("n", temperature="t"),
    ops.batch(7, linger="5ms", pad={"t": 0, "n": -1, "ok": False}),
    ops.batch(7, drop_last=True),
    ops.unbatch(),
    ops.rate_limit(12.5, burst=3, full="drop_oldest"),
    ops.branch(hot="t > 30", cold=double, rest=None),
    ops.broadcast(["a", "b"]),
    ops.merge(3, order="ts", idle="2s"),
    ops.merge(2, order=double),
    ops.filter_py_batch(double, batch=3),
    ops.filter_py_batch(double, batch=None),
]


def test_every_operator_is_written_and_read():
    kinds = {operator.kind for operator in EVERY}
    mine = {
        cls.kind
        for module in (operators, batching)
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if dataclasses.is_dataclass(cls) and hasattr(cls, "kind")
    }
    assert kinds == mine
    for operator in EVERY:
        text = json.dumps(operator.to_json())
        again = operator_from_json(json.loads(text))
        assert again.to_json() == operator.to_json()
        if "args" not in text:  # partials are never equal
            assert again == operator == pickle.loads(pickle.dumps(operator))
        assert operator.describe().split()[0] in (operator.kind, "filter", "map_batches", "filter_batches")
        with pytest.raises(dataclasses.FrozenInstanceError):
            operator.kind = 3


def test_windows_and_keys_are_written_and_read():
    for operator in (
        ops.key_by("sensor", partitions=3),
        ops.window(dsline.tumbling("10s", time="ts"), n=dsline.agg.count()),
    ):
        again = operator_from_json(json.loads(json.dumps(operator.to_json())))
        assert again.describe() == operator.describe()
        assert again.to_json() == operator.to_json()


def test_the_public_names():
    assert set(ops.__all__) <= set(dir(ops))
    for name in ops.__all__:
        assert getattr(ops, name).__doc__


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (2, 2.0),
        (0.5, 0.5),
        ("10ms", 0.01),
        ("1.5 s", 1.5),
        ("2min", 120),
        ("1h", 3600),
        ("250us", 0.00025),
        ("1d", 86400),
    ],
)
def test_durations(given, seconds):
    assert descriptions.parse_seconds(given, "it") == pytest.approx(seconds)


# --- expressions --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 60),
    seed=st.integers(0, 1000),
    text=st.sampled_from(["t > 20", "ok", "n < 10 or t*2 < 30", "not ok and n > 3", "isnan(t)", "True"]),
)
def test_filters_equal_numpy(rows, seed, text):
    batch = batch_of(rows, seed)
    with np.errstate(all="ignore"):
        mask = {
            "t > 20": lambda b: b.t > 20,
            "ok": lambda b: b.ok,
            "n < 10 or t*2 < 30": lambda b: (b.n < 10) | (b.t * 2 < 30),
            "not ok and n > 3": lambda b: ~b.ok & (b.n > 3),
            "isnan(t)": lambda b: np.isnan(b.t),
            "True": lambda b: np.ones(b.rows, bool),
        }[text](batch)
    wanted = [batch[mask]] if mask.any() else []
    records = batch.to_records()
    got = run(ops.filter(text), [batch])
    assert_same(got, wanted)
    assert_same(run(ops.filter(text), [records]), [records[mask]] if mask.any() else [])
    assert_same(run(ops.filter(text), batch.to_rows()), batch[mask].to_rows())
    # A function that returns a mask does the same.
    assert_same(run(ops.filter(lambda b: mask), [batch] if rows else []), wanted)
    # And so does a branch, with the rest elsewhere.
    routed = dict(ops.branch(yes=text, no=None).route(context())(batch)) if rows else {}
    assert_same(routed.get(0), batch[mask] if mask.any() else None)
    assert_same(routed.get(1), batch[~mask] if rows and not mask.all() else None)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), seed=st.integers(0, 1000))
def test_derived_columns_equal_numpy(rows, seed):
    batch = batch_of(rows, seed)
    operator = ops.derive(z="t*2 + n", ok="z > 50", t="n/2")
    z = batch.t * np.float32(2) + batch.n
    wanted = Batch(t=batch.n / 2, n=batch.n, ok=z > 50, z=z)
    assert_same(run(operator, [batch]), [wanted])
    assert_same(run(operator, [batch.to_records()]), [wanted.to_records()])
    assert run(ops.derive(y="n*2 + 1"), [{"n": 3, "name": "a"}]) == [{"n": 3, "name": "a", "y": 7}]
    chosen = ops.select("ok", number="n")
    assert_same(run(chosen, [batch]), [Batch(ok=batch.ok, number=batch.n)])
    assert_same(run(chosen, [batch.to_records()]), [Batch(ok=batch.ok, number=batch.n).to_records()])
    assert run(chosen, [{"n": 3, "ok": True, "t": 1}]) == [{"ok": True, "number": 3}]


def test_derive_and_select_leave_the_item_alone_and_use_the_slot():
    records = batch_of(5).to_records()
    before = records.copy()
    lent = []

    def allocate(shape, dtype):
        lent.append(np.empty(shape, dtype))
        return lent[-1]

    for operator in (ops.derive(t="t*2"), ops.select("n")):
        (got,) = run(operator, [records], where=context(allocate=allocate))
        assert got is lent[-1]
        assert_same(records, before)
    batch = batch_of(5)
    (got,) = run(ops.derive(z="t"), [batch])
    assert got.t is batch.t  # not copied
    aligned = np.zeros(3, np.dtype([("a", "u1"), ("b", "f8")], align=True))
    (got,) = run(ops.derive(c="b"), [aligned])
    assert got.dtype.isalignedstruct


def test_numbers_are_rows_too():
    assert run(ops.filter("x > 3"), [1, 5, 2.5, 7.5]) == [5, 7.5]
    assert run(ops.filter("x"), [True, False]) == [True]
    assert run(ops.filter("x > 3"), [np.float32(5), np.int8(2)]) == [np.float32(5)]


def test_dtypes_may_change_between_items():
    kept = run(
        ops.filter("a > 1"),
        [
            Batch(a=[1.5, 0.5]),
            Batch(a=[1, 2]),
            {"a": 3},
            {"a": 1.5},
            Batch(a=[2.5]),
            np.array([(9,)], [("a", "u1")]),
        ],
    )
    assert [items.rows_of(item) for item in kept] == [1] * 6


@pytest.mark.parametrize(
    ("operator", "item", "text"),
    [
        (ops.filter("a > 1"), Batch(b=[1]), "no column 'a'.*b"),
        (ops.filter("a > 1"), Batch(a=["x"]), "U1"),
        (ops.filter("a + 1"), Batch(a=[1]), "truth value"),
        (ops.filter("a + 1"), {"a": 1}, "truth value"),
        (ops.filter("a > 1"), {"a": "x"}, "object"),
        (ops.filter("a > 1"), {}, "no column 'a'"),
        (ops.filter("a > 1"), np.zeros(3), "float64.*use a function"),
        (ops.filter("a > 1"), "text", "a str.*use a function"),
        (ops.filter(lambda item: item > 1), np.zeros((2, 2)), "truth value"),
        (ops.filter(lambda item: np.ones(2, bool)), Batch(a=[1]), "one for each row"),
        (ops.filter(lambda item: item["a"]), Batch(a=[1]), "one for each row"),
        (ops.derive(b="a > 1"), 5, "use a function"),
        (ops.derive(b="c"), Batch(a=[1]), "no column 'c'"),
        (ops.select("c"), Batch(a=[1]), "no column 'c'.*a"),
        (ops.select("c"), [1], "a list"),
        (ops.unbatch(), 5, "taken apart"),
        (ops.unbatch(), np.zeros(()), "taken apart"),
        (ops.filter_py_batch(lambda item: True), 5, "each row"),
        (ops.map_batches(lambda item: (one for one in item)), 5, "generator"),
    ],
)
def test_errors_name_the_stage(operator, item, text):
    with pytest.raises(OperatorError, match=f"stage 'my stage'.*{text}"):
        run(operator, [item])


def test_a_step_goes_on_after_an_error():
    step = ops.filter("a > 1").start(context())
    out = []
    for item in (Batch(a=[1, 2]), Batch(b=[1]), {"a": "x"}, Batch(a=[3, 4])):
        try:
            step.process(item, out.append)
        except OperatorError:
            out.append("error")
    assert_same(out, [Batch(a=[2]), "error", "error", Batch(a=[3, 4])])


# --- batches ------------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(0, 9), max_size=12)


def as_kind(kind, rows):
    """`rows` rows as one thing that can be cut, and how to cut it."""
    batch = batch_of(rows)
    return batch if kind == "columns" else batch.to_records()


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(["columns", "records"]), lengths=LENGTHS, size=st.integers(1, 10))
def test_how_rows_are_cut_does_not_matter(kind, lengths, size):
    whole = as_kind(kind, sum(lengths))
    got = run(ops.batch(size), pieces(whole, lengths))
    wanted = [items.take_rows(whole, at, at + size) for at in range(0, sum(lengths), size)]
    wanted = [each if items.rows_of(each) else None for each in wanted]
    assert_same(got, [items.take_rows(each, 0, size) for each in wanted])
    # Row by row and back again.
    again = run(ops.batch(size), run(ops.unbatch(), got))
    assert_same(again, got)
    dropped = run(ops.batch(size, drop_last=True), pieces(whole, lengths))
    assert_same(dropped, got[: sum(lengths) // size])


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 12), size=st.integers(1, 5))
def test_frames_and_objects(count, size):
    frames = [np.full((2, 3), number, "i2") for number in range(count)]
    got = run(ops.batch(size), frames)
    assert_same(got, [np.stack(frames[at : at + size]) for at in range(0, count, size)])
    assert_same(run(ops.unbatch(), got), frames)
    numbers = list(range(count))
    got = run(ops.batch(size), numbers)
    assert got == [numbers[at : at + size] for at in range(0, count, size)]
    assert run(ops.unbatch(), got) == numbers
    scalars = run(ops.unbatch(), [np.arange(4.0)])
    assert [item.shape for item in scalars] == [()] * 4
    assert_same(run(ops.batch(4), scalars), [np.arange(4.0)])


def test_the_end_of_a_batch():
    where = context()
    assert run(ops.batch(3, drop_last=True), [1, 2, 3, 4], where=where) == [[1, 2, 3]]
    assert where.counts == {"dropped": 1}
    where = context()
    assert run(ops.batch(3, pad=0), [1, 2, 3, 4], where=where) == [[1, 2, 3], [4, 0, 0]]
    assert where.counts == {"padded": 2}
    batch = batch_of(2)
    (got,) = run(ops.batch(3, pad={"t": math.nan, "n": -1, "ok": True}), [batch])
    assert_same(got[:2], batch)
    assert math.isnan(got.t[2])
    assert got.n[2] == -1
    (got,) = run(ops.batch(3, pad=7), [batch.to_records()])
    assert got[2].tolist() == (7.0, 7, True)
    (got,) = run(ops.batch(3, pad=9), [np.zeros(2, "u1")])
    assert got.tolist() == [[0, 0], [9, 9], [9, 9]]


def test_a_batch_is_gathered_in_the_slot():
    lent = []

    def allocate(shape, dtype):
        lent.append(np.empty(shape, dtype))
        return lent[-1]

    records = batch_of(10).to_records()
    got = run(ops.batch(4), pieces(records, [3, 3, 3, 1]), where=context(allocate=allocate))
    assert got[0] is lent[0]
    assert got[1] is lent[1]
    assert got[2].base is lent[2]
    assert len(lent) == 3
    frames = run(ops.batch(2), [np.zeros((2, 2))] * 2, where=context(allocate=allocate))
    assert frames[0] is lent[3]
    # What waits is not changed by who gets the batch before.
    got = run(ops.batch(2), [np.full(1, number) for number in range(6)])
    assert np.concatenate(got).ravel().tolist() == list(range(6))


def test_rows_of_a_batch_are_alike():
    batch = batch_of(3)
    for other in (batch.to_records(), batch[["t"]], np.zeros(3), 5):
        step = ops.batch(5).start(context())
        out = []
        step.process(batch, out.append)
        with pytest.raises(OperatorError, match=r"my stage.*alike"):
            step.process(other, out.append)
        step.process(batch, out.append)  # the others go on
        step.finish(out.append)
        assert_same(out, [items.concatenate([batch, batch[:2]]), batch[2:]])
    # A new batch may be of something else.
    assert len(run(ops.batch(3), [batch, batch.to_records(), 1, 2, 3])) == 3


class Clock:
    def __init__(self):
        self.now = 100.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


def test_linger():
    clock = Clock()
    step = batching.GatherStep(ops.batch(3, linger=0.5), context(), clock)
    out = []
    assert step.deadline() is None
    step.process(1, out.append)
    assert step.deadline() == 100.5
    clock.now = 100.4
    step.process(2, out.append)
    assert step.deadline() == 100.5
    step.tick(out.append)
    assert out == []  # too early
    clock.now = 100.5
    step.tick(out.append)
    assert out == [[1, 2]]
    assert step.deadline() is None
    assert not step.holding
    for number in (3, 4, 5, 6):
        step.process(number, out.append)
    assert out[1:] == [[3, 4, 5]]
    assert step.deadline() == 101.0


def test_map_batches():
    batch = batch_of(10)
    got = run(ops.map_batches(lambda b: Batch(s=[b.n.sum()]), batch=4), pieces(batch, [5, 5]))
    assert [item.s.tolist() for item in got] == [[6], [22], [17]]
    assert run(ops.map_batches(sum, batch=2), [1, 2, 3]) == [3, 3]
    assert run(ops.map_batches(lambda rows: None, batch=2), [1, 2, 3]) == []
    assert run(ops.filter_py_batch(lambda rows: [row > 2 for row in rows], batch=2), [1, 2, 3, 4, 5]) == [
        [3, 4],
        [5],
    ]
    (got,) = run(ops.filter_py_batch(lambda b: b.n > 7), [batch])
    assert_same(got, batch[8:])
    (got,) = run(
        ops.filter_py_batch(lambda f: f.sum(axis=(1, 2)) > 0, batch=2), [np.zeros((2, 2)), np.ones((2, 2))]
    )
    assert_same(got, np.ones((1, 2, 2)))
    lent = []

    def allocate(shape, dtype):
        lent.append(np.empty(shape, dtype))
        return lent[-1]

    where = context(allocate=allocate)
    got = run(
        ops.map_batches(halve, batch=2, returns=ArraySpec((None, 3), "i8")), [np.arange(3)] * 3, where=where
    )
    assert [item.shape for item in got] == [(2, 3), (1, 3)]
    assert got[0] is lent[0]
    step = ops.map_batches(Counter, batch=2).start(context())
    out = []
    for number in (1, 2, 3):
        step.process(number, out.append)
    other = ops.map_batches(Counter, batch=2).start(context())
    other.load_state_dict(pickle.loads(pickle.dumps(step.state_dict())))
    other.process(4, out.append)
    assert out == [1, 2]


# --- after a crash ------------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


def run_with_crash(operator, given, crash_at, loses):
    """What comes out if the process dies at the `crash_at`-th output, just before it is published (`loses`) or just after.

    As the runtime does it: (item, offset) is written down before each output; the next process begins with the oldest item
    that is not acknowledged, and passes over the rows that are out.
    """
    published, written = [], (0, 0)
    at = 0

    def emit(item):
        nonlocal written
        if len(published) == crash_at and loses:
            raise Crash
        written = (at, step.offset) if at < len(given) else (at, 0)
        published.append(
            items.take_rows(item, 0, items.rows_of(item)) if not isinstance(item, list) else list(item)
        )
        if len(published) == crash_at + 1 and not loses:
            raise Crash

    step = operator.start(context())
    first = 0
    crashed = False
    while True:
        try:
            for number in range(first, len(given)):
                at = number
                emitted = len(published)
                step.process(given[number], emit)
                if not step.holding:
                    first = number + 1
                elif len(published) > emitted:
                    first = number
            at = len(given)
            step.finish(emit)
            return published, crashed
        except Crash:
            assert not crashed
            crashed = True
            crash_at = -2
            step = operator.start(context())
            done, offset = written
            first = max(first, done)
            if offset and first == done:
                step.resume(offset)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["columns", "records", "objects"]),
    lengths=LENGTHS,
    size=st.integers(1, 10),
    crash_at=st.integers(0, 12),
    loses=st.booleans(),
)
@example(kind="columns", lengths=[9, 9], size=4, crash_at=1, loses=False)
@example(kind="columns", lengths=[4, 4], size=4, crash_at=1, loses=False)
def test_each_row_is_out_once_wherever_the_process_dies(kind, lengths, size, crash_at, loses):
    if kind == "objects":
        given_items = list(range(sum(lengths)))
        wanted = given_items
    else:
        whole = as_kind(kind, sum(lengths))
        given_items = list(pieces(whole, lengths))
        wanted = whole
    published, _ = run_with_crash(ops.batch(size), given_items, crash_at, loses)
    if kind == "objects":
        assert [row for batch in published for row in batch] == wanted
    elif published:
        assert_same(items.concatenate(published), wanted)
    else:
        assert not sum(lengths)
    sizes = [len(batch) for batch in published]
    assert all(length == size for length in sizes[:-1])


@pytest.mark.parametrize("crash_at", range(8))
@pytest.mark.parametrize("loses", [False, True])
def test_a_rate_limit_after_a_crash(crash_at, loses):
    published, crashed = run_with_crash(ops.rate_limit(100_000, burst=2), list(range(7)), crash_at, loses)
    assert published == list(range(7))
    assert crashed == (crash_at < 7)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["columns", "records", "frames", "objects"]),
    lengths=LENGTHS,
    size=st.integers(1, 10),
    at=st.integers(0, 12),
)
def test_a_checkpoint_keeps_the_rows_that_wait(kind, lengths, size, at):
    if kind == "objects":
        given_items = list(range(sum(lengths)))
    elif kind == "frames":
        given_items = [np.full((2, 2), number) for number in range(sum(lengths))]
    else:
        given_items = list(pieces(as_kind(kind, sum(lengths)), lengths))
    operator = ops.batch(size)
    wanted = run(operator, given_items)
    out = []
    step = operator.start(context())
    for item in given_items[:at]:
        step.process(item, out.append)
    state = pickle.loads(pickle.dumps(step.state_dict()))
    step = operator.start(context())
    step.load_state_dict(state)
    for item in given_items[at:]:
        step.process(item, out.append)
    step.finish(out.append)
    assert_same(out, wanted)


def test_batches_that_come_as_batches():
    keep = ops.filter_py_batch(lambda rows: [row > 2 for row in rows], batch=None)
    assert not keep.holds
    assert ops.filter_py_batch(double).holds
    assert run(keep, [[1, 2, 3], [4], []]) == [[3], [4]]
    assert keep.check(COLUMNS) == COLUMNS
    for wrong in (5, np.zeros(())):
        with pytest.raises(OperatorError, match=r"my stage.*no batch"):
            run(keep, [wrong])
    assert run(ops.map_batches(sum, batch=None), [[1, 2, 3], [4]]) == [6, 4]


# --- rate ---------------------------------------------------------------------------------------------------------------


def limited(clock, **more):
    where = context(pause=clock.sleep)
    step = batching.RateLimitStep(ops.rate_limit(**more), where, clock)
    return step, where


def test_rate_limit_blocks_in_order():
    clock = Clock()
    step, _ = limited(clock, per_second=10, burst=3)
    out = []

    def emit(item):
        out.append((item, round(clock.now - 100, 6)))

    for number in range(3):
        step.process(number, emit)
    assert out == [(0, 0), (1, 0), (2, 0)]
    step.process(3, emit)
    assert step.holding
    assert step.is_full
    assert step.deadline() == pytest.approx(100.1)
    step.tick(emit)
    assert len(out) == 3
    clock.now = 100.1
    step.tick(emit)
    assert out[3:] == [(3, 0.1)]
    assert not step.holding
    assert step.deadline() is None
    step.process(4, emit)
    step.process(5, emit)  # waits for the one before it
    assert out[4:] == [(4, 0.2)]
    step.finish(emit)
    assert out[5:] == [(5, 0.3)]
    clock.now = 200  # a pause fills the bucket, and no more
    out.clear()
    for number in range(5):
        step.process(number, emit)
    assert out[:3] == [(0, 100), (1, 100), (2, 100)]
    assert out[3] == (3, 100.1)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0.5, 1000),
    burst=st.integers(1, 5),
    pauses=st.lists(st.floats(0, 2), min_size=1, max_size=30),
)
def test_no_more_than_the_rate(rate, burst, pauses):
    clock = Clock()
    step, _ = limited(clock, per_second=rate, burst=burst)
    times = []
    for pause in pauses:
        clock.now += pause / rate
        step.process(len(times), lambda item: times.append(clock.now))
    step.finish(lambda item: times.append(clock.now))
    assert len(times) == len(pauses)
    for i in range(len(times)):
        for k in range(i, len(times)):
            assert k - i + 1 <= burst + (times[k] - times[i]) * rate + 1e-4


def test_rate_limits_that_drop():
    clock = Clock()
    step, where = limited(clock, per_second=10, full="drop_newest")
    out = []
    for number in range(3):
        step.process(number, out.append)
    assert out == [0]
    assert where.counts == {"dropped": 2}
    assert step.deadline() is None
    step, where = limited(clock, per_second=10, full="drop_oldest")
    out = []
    for number in range(4):
        step.process(number, out.append)
    assert out == [0]
    assert where.counts == {"dropped": 2}
    assert not step.holding  # so that what is dropped is acknowledged
    clock.now += 0.1
    step.tick(out.append)
    assert out == [0, 3]
    step.process(4, out.append)
    other, _ = limited(clock, per_second=10, full="drop_oldest")
    other.load_state_dict(step.state_dict())
    other.finish(out.append)
    assert out == [0, 3, 4]


# --- several outputs ----------------------------------------------------------------------------------------------------


def routed(operator, item, where=None):
    return dict(operator.route(where or context())(item))


def test_branch():
    batch = batch_of(50)
    operator = ops.branch(hot="t > 25", even=lambda b: b["n"] % 2 == 0, rest=None)
    assert operator.outputs == ("hot", "even", "rest")
    hot = batch.t > 25
    even = ~hot & (batch.n % 2 == 0)
    for item in (batch, batch.to_records()):
        got = routed(operator, item)
        for number, mask in enumerate((hot, even, ~hot & ~even)):
            assert_same(got[number], items.take(item, np.flatnonzero(mask)))
    assert routed(operator, {"t": 26.0, "n": 3}) == {0: {"t": 26.0, "n": 3}}
    assert routed(operator, {"t": 6.0, "n": 3}) == {2: {"t": 6.0, "n": 3}}
    whole = routed(operator, batch[hot])
    assert list(whole) == [0]
    where = context()
    assert routed(ops.branch(hot="t > 100"), batch, where) == {}
    assert where.counts == {"unmatched": 50}
    frames = ops.branch(bright=lambda frame: frame.mean() > 5, dark=None)
    assert list(routed(frames, np.zeros(3))) == [1]
    assert list(routed(ops.branch(a=Even, b=None), 4)) == [0]
    for wrong, text in (({"n": 1}, "no column 't'"), (np.zeros(3), "use a function")):
        with pytest.raises(OperatorError, match=f"my stage.*{text}"):
            routed(ops.branch(hot="t > 25"), wrong)
    with pytest.raises(OperatorError, match=r"my stage.*truth value"):
        routed(ops.branch(hot="t + 25"), batch)


class Even:
    def __call__(self, item):
        return item % 2 == 0


def test_broadcast():
    operator = ops.broadcast(3)
    assert operator.outputs == ("0", "1", "2")
    item = object()
    assert [(number, each is item) for number, each in operator.route(context())(item)] == [
        (0, True),
        (1, True),
        (2, True),
    ]


# --- merges -------------------------------------------------------------------------------------------------------------


class Feeder:
    """Gives a merge the items of several inputs, only when it wants them, in an order of choice."""

    def __init__(self, operator, inputs, choose, where=None):
        self.step = operator.start(where or context())
        self.inputs = [list(each) for each in inputs]
        self.ended = [False] * len(inputs)
        self.out = []
        self._choose = choose

    def run(self):
        while not all(self.ended):
            can = [
                index
                for index, left in enumerate(self.inputs)
                if not self.ended[index] and (not left or self.step.wants(index))
            ]
            assert can, "nobody can go on"
            index = can[self._choose(len(can))]
            if self.inputs[index]:
                self.step.process_from(index, self.inputs[index].pop(0), self.out.append)
            else:
                self.ended[index] = True
                self.step.end_of(index, self.out.append)
        self.step.finish(self.out.append)
        assert not self.step.holding
        return self.out


@settings(max_examples=100, deadline=None)
@given(
    keys=st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 4), min_size=60, max_size=60),
    choices=st.lists(st.integers(0, 100), min_size=100, max_size=100),
    kind=st.sampled_from(["columns", "records", "dicts"]),
)
def test_rows_in_the_order_of_a_column(keys, cuts, choices, kind):
    keys = [sorted(each) for each in keys]
    inputs, cuts, choices = [], iter(cuts), iter(choices)
    for number, each in enumerate(keys):
        whole = Batch(ts=np.array(each, "i8"), source=np.full(len(each), number), place=np.arange(len(each)))
        if kind == "dicts":
            inputs.append(whole.to_rows())
            continue
        whole = whole if kind == "columns" else whole.to_records()
        at, cut = 0, []
        while at < len(each):
            step = next(cuts)
            cut.append(items.take_rows(whole, at, at + step))
            at += step
        inputs.append(cut)
    got = Feeder(ops.merge(len(keys), order="ts"), inputs, lambda n: next(choices, 0) % n).run()
    rows = []
    for item in got:
        if kind == "dicts":
            rows.append((item["ts"], item["source"], item["place"]))
        else:
            rows.extend(
                zip(item["ts"].tolist(), item["source"].tolist(), item["place"].tolist(), strict=True)
            )
    # Whatever came first, the result is the same: by key, then by input.
    assert rows == sorted(
        (key, number, place) for number, each in enumerate(keys) for place, key in enumerate(each)
    )


def test_an_idle_input_holds_nobody_back_for_ever():
    clock = Clock()
    where = context()
    step = merging.OrderStep(ops.merge(2, order="ts", idle=5), where, clock)
    out = []
    step.process_from(0, {"ts": 3}, out.append)
    assert out == []
    assert step.holding
    assert not step.wants(0)
    assert step.wants(1)
    assert step.deadline() == 105
    clock.now = 104
    step.tick(out.append)
    assert out == []
    clock.now = 105
    step.tick(out.append)
    assert out == [{"ts": 3}]
    assert step.deadline() is None
    step.process_from(1, {"ts": 1}, out.append)  # too late, but not lost
    assert out[1:] == [{"ts": 1}]
    assert where.counts == {"late": 1}
    step.process_from(1, {"ts": 9}, out.append)
    assert step.deadline() == 110
    step.end_of(0, out.append)
    assert out[2:] == [{"ts": 9}]


def test_order_by_a_function_and_by_times():
    merge = ops.merge(2, order=lambda frame: frame[0, 0])
    frames = [[np.full((2, 2), number) for number in row] for row in ([1, 4, 5], [2, 3, 9])]
    got = Feeder(merge, frames, lambda n: 0).run()
    assert [int(frame[0, 0]) for frame in got] == [1, 2, 3, 4, 5, 9]
    times = [Batch(ts=np.array(row, "M8[s]")) for row in ([1, 4, 5], [2, 3, 9])]
    got = items.concatenate(Feeder(ops.merge(2, order="ts"), [[times[0]], [times[1]]], lambda n: n - 1).run())
    assert got.ts.astype(int).tolist() == [1, 2, 3, 4, 5, 9]
    # Rows that are not in order are put in order as far as they wait together.
    got = Feeder(ops.merge(1, order="ts"), [[Batch(ts=[3, 1, 2])]], lambda n: 0).run()
    assert got[0].ts.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"t": 1}, "no column 'ts'"),
        (5, "no column 'ts'"),
        (Batch(ts=[1.0, np.nan]), "missing"),
        (Batch(ts=np.array(["NaT"], "M8[s]")), "missing"),
        (Batch(ts=["a"]), "number or time"),
        ({"ts": [1, 2]}, "number or time"),
    ],
)
def test_keys_that_cannot_be_ordered(item, text):
    step = ops.merge(2, order="ts").start(context())
    with pytest.raises(OperatorError, match=f"my stage.*{text}"):
        step.process_from(0, item, [].append)
    step.process_from(0, {"ts": 1}, [].append)
    assert step.holding


def test_rows_in_one_order_are_alike():
    step = ops.merge(2, order="ts").start(context())
    step.process_from(0, Batch(ts=[1, 5]), [].append)
    with pytest.raises(OperatorError, match=r"my stage.*alike"):
        step.process_from(1, Batch(ts=[2, 6], more=[1, 2]), [].append)


@pytest.mark.parametrize("last", [False, True])
def test_zip(last):
    where = context()
    choose = (lambda n: n - 1) if last else (lambda n: 0)
    feeder = Feeder(ops.merge(3, order="zip"), [[1, 2, 3, 4], "ab", [7, 8, 9]], choose, where)
    assert feeder.run() == [(1, "a", 7), (2, "b", 8)]
    assert where.counts == {"surplus": 3}


def test_sequence_and_arrival():
    assert Feeder(ops.merge(3, order="sequence"), ["ab", "", "cd"], lambda n: n - 1).run() == list("abcd")
    step = ops.merge(2, order="sequence").start(context())
    out = []
    step.process_from(1, "x", out.append)
    step.process_from(0, "a", out.append)
    assert step.holding
    step.end_of(0, out.append)
    assert out == ["a", "x"]
    assert sorted(Feeder(ops.merge(2), ["ab", "cd"], lambda n: n - 1).run()) == list("abcd")


@pytest.mark.parametrize("order", ["ts", "zip", "sequence"])
@pytest.mark.parametrize("at", range(5))
def test_a_checkpoint_of_a_merge(order, at):
    inputs = [(0, {"ts": 1}), (1, {"ts": 2}), (0, {"ts": 4}), (1, {"ts": 3}), (0, {"ts": 6})]

    def feed(step, given, out):
        for index, item in given:
            step.process_from(index, item, out.append)

    operator = ops.merge(2, order=order)
    wanted, out = [], []
    step = operator.start(context())
    feed(step, inputs, wanted)
    for index in (0, 1):
        step.end_of(index, wanted.append)
    step.finish(wanted.append)
    first = operator.start(context())
    feed(first, inputs[:at], out)
    second = operator.start(context())
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    feed(second, inputs[at:], out)
    for index in (0, 1):
        second.end_of(index, out.append)
    second.finish(out.append)
    assert out == wanted


def test_expressions_are_compiled_once(monkeypatch):
    compiled = []
    real = Expression.__init__

    def counting(self, *args, **more):
        compiled.append(args)
        real(self, *args, **more)

    monkeypatch.setattr(Expression, "__init__", counting)
    batches = [batch_of(10, seed) for seed in range(10)]
    run(ops.filter("t > 20"), [*batches, *(batch.to_records() for batch in batches), *batches])
    assert len(compiled) == 1


@pytest.fixture(scope="module")
def resident():
    """What multiprocessing keeps for good is there before the test counts."""
    with WorkerProcess(answer, start_method="forkserver") as process:
        process.join(20)


def answer(connection):
    pass


def count_rows(rows):
    return len(rows)


def keep_even(rows):
    return [row % 2 == 0 for row in rows]


def test_batches_are_shared_by_workers(resident):
    source = dsline.Pipeline().source(range(20))
    plan = source.map_batches(count_rows, batch=8, workers=2, linger=None).sink(print).plan()
    assert [stage.part.kind for stage in plan.stages] == ["iterable", "batch", "map", "callable"]
    kept = source.filter_py_batch(keep_even, batch=8, workers=2, start_method="forkserver", linger=None)
    assert kept.collect() == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]
    assert source.map_batches(count_rows, batch=8, linger=None).collect() == [8, 8, 4]
