"""Bad input to pipelines, wherever it can be: an error that names the stage, no hang, and nothing left behind.

Descriptors, mapped memory, names in shared memory and processes are looked at after every test (conftest.py).
"""

import functools
import inspect
import os
import re
import sys
import threading
import time

import numpy as np
import pytest
from support import wait_until

import dsline
from dsline import (
    ArraySpec,
    Batch,
    Columns,
    DslineError,
    OperatorError,
    Pipeline,
    PipelineBuildError,
    PipelineRuntimeError,
    Restart,
    agg,
)
from dsline.dataflow.processes import WorkerProcess

pytestmark = pytest.mark.timeout(60)

FORK = {"start_method": "forkserver"}


@pytest.fixture(scope="module", autouse=True)
def resident():
    """What multiprocessing keeps for good is there before the first test counts."""
    with WorkerProcess(answer, start_method="forkserver") as process:
        process.join(20)


def answer(connection):
    pass


def stage(function, workers, **more):
    """A pipeline whose stage 'bad' calls the function."""
    options = {**FORK, **more} if workers else more
    return Pipeline().source(range(20)).map(function, workers=workers, name="bad", **options)


def fails(pipeline, *texts, error=OperatorError, **options):
    """Run a pipeline that must fail soon, with an error that says all of this."""
    began = time.monotonic()
    with pytest.raises(DslineError) as caught:
        pipeline.collect(**options) if pipeline._tail is not None else pipeline.run(**options)
    assert time.monotonic() - began < 30
    assert isinstance(caught.value, error), repr(caught.value)
    text = str(caught.value)
    for wanted in ("stage 'bad'", *texts):
        assert re.search(wanted, text), text
    return caught.value


# --- what the plan refuses ----------------------------------------------------------------------------------------------

FRAMES = ArraySpec((4, 4), "f4")
ROWS = Columns(ts="i8", temperature="f4", ok="?")


def source(schema=None):
    return Pipeline().source([], schema=schema)


def identity(item):
    return item


def fill(item, out):
    return out


EXPRESSIONS = [
    "",
    "temperature >",
    "__import__('os').system('true')",
    "temperature.real > 1",
    "temperature[0] > 1",
    "(lambda: 1)()",
    "9**9**9 > ts",
    "f'{ts}' == 'a'",
    "[x for x in ts]",
    "(" * 60 + "ok" + ")" * 60,
    "ok and " * 300 + "ok",
    "temperature > 'warm'",
    "temperature + 1",
    "ok + 1 > 0",
    "temperature and ok",
    "exec(ok)",
    "nothing > 1",
    "ts := 1",
    "ok; ok",
    "ok # comment",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_bad_expressions(text):
    for make in (
        lambda: source(ROWS).filter(text, name="bad").sink(identity).plan(),
        lambda: source(ROWS).pipe(dsline.ops.branch(yes=text, no=None), name="bad"),
    ):
        with pytest.raises(
            PipelineBuildError, match=r"expression|no column|truth|branch|part of the language"
        ):
            make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: source(ROWS).filter("temp > 1", name="bad"), r"no column 'temp'.*ts, temperature, ok"),
        (lambda: source(ROWS).filter("temperature + 1", name="bad"), "truth value"),
        (lambda: source(FRAMES).filter("temperature > 1", name="bad"), "use a function"),
        (lambda: source(ROWS).derive(z="nothing", name="bad"), "no column 'nothing'"),
        (lambda: source(FRAMES).derive(z="x", name="bad"), "records and columns"),
        (lambda: source(ROWS).select("nothing", name="bad"), "no column 'nothing'"),
        (lambda: source(FRAMES).select("a", name="bad"), "records and columns"),
        (lambda: source(ROWS).select("ts").filter("temperature > 1", name="bad"), "no column 'temperature'"),
        (lambda: source(ROWS).derive(z="ts").filter("zz > 1", name="bad"), "no column 'zz'.*z"),
        (lambda: source().map(identity, returns=FRAMES).select("ts", name="bad"), "records and columns"),
        (lambda: source().map(identity, returns=ROWS).filter("warm > 1", name="bad"), "no column 'warm'"),
        (lambda: source(ArraySpec((), "f4")).unbatch(name="bad"), "taken apart"),
        (lambda: source(ROWS).merge(source(ROWS), order="when", name="bad"), "no column 'when'"),
        (
            lambda: source(ROWS).merge(source(Columns(ts="i8")), order="ts", name="bad"),
            "different schemas",
        ),
        (lambda: source(FRAMES).merge(source(FRAMES), order="ts", name="bad"), "use a function"),
        (
            lambda: source(ROWS).window(dsline.tumbling("1s", time="when"), n=agg.count(), name="bad"),
            "when",
        ),
        (
            lambda: source(ROWS).window(dsline.tumbling("1s", time="ts"), m=agg.mean("nothing"), name="bad"),
            "nothing",
        ),
        (lambda: source(ROWS).map(identity, workers=2, name="bad").batch(3, workers=2), None),
        (lambda: source(ROWS).batch(3, workers=2, name="bad"), "workers=2"),
        (lambda: source(ROWS).map(Remembers, workers=2, name="bad"), "workers=2"),
        (lambda: source(ROWS).rate_limit(5, workers=2, name="bad"), "workers=2"),
    ],
)
def test_schemas_and_places(make, text):
    wanted = f"stage 'bad'.*{text}" if text is not None else "workers=2"
    with pytest.raises(PipelineBuildError, match=wanted):
        make().sink(identity).plan()


def test_key_of_a_column_that_is_not_there():
    with pytest.raises(PipelineBuildError, match=r"stage 'bad'.*nothing"):
        source(ROWS).key_by("nothing", partitions=2, name="bad").map(identity).sink(identity).plan()


def test_two_sinks_on_one_queue(name):
    with pytest.raises(PipelineBuildError, match=f"{name}"):
        Pipeline().source([1]).broadcast(f"shm://{name}", f"shm://{name}").plan()


def test_a_channel_that_is_read_and_written(name):
    with pytest.raises(PipelineBuildError, match="cycle"):
        Pipeline().source(f"shm://{name}").map(identity).sink(f"shm://{name}").plan()


class Remembers:
    def __call__(self, item):
        return item

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_functions_that_cannot_be_pickled():
    lock = threading.Lock()
    for function in (
        lambda item: lock and item,
        functools.partial(identity, lock),
        HasLock(),
        functools.partial(Needs, lock),
    ):
        pipeline = stage(function, workers=1).sink(print)
        with pytest.raises(
            PipelineBuildError, match=r"stage 'bad'.*cannot be brought to a worker process.*lock"
        ):
            pipeline.run()


class HasLock:
    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, item):
        return item


class Needs:
    def __init__(self, what):
        self.what = what

    def __call__(self, item):
        return item


@pytest.mark.parametrize("function", [Needs, 3, None, "text", fill])
def test_functions_that_cannot_be_called(function):
    with pytest.raises(PipelineBuildError):
        Pipeline().source([1]).map(function, name="bad").sink(identity).plan()


# --- functions of a stage -----------------------------------------------------------------------------------------------


def raises_value_error(item):
    if item == 7:
        raise ValueError("seven is bad")
    return item


def raises_stop_iteration(item):
    if item == 7:
        raise StopIteration("seven is bad")
    return item


def exits(item):
    if item == 7:
        sys.exit("seven is bad")
    return item


def raises_generator_exit(item):
    if item == 7:
        raise GeneratorExit("seven is bad")
    return item


def interrupts(item):
    if item == 7:
        raise KeyboardInterrupt("seven is bad")
    return item


def recurses(item):
    return item if item != 7 else recurses(item)


def runs_out_of_memory(item):
    if item == 7:
        raise MemoryError("seven is bad")
    return item


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class NeedsTwo(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} is {b}")


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


def raises_unpicklable(item):
    if item == 7:
        raise Unpicklable("seven is bad")
    return item


def raises_what_needs_two(item):
    if item == 7:
        raise NeedsTwo("seven", "bad")
    return item


def raises_mute(item):
    if item == 7:
        raise Mute
    return item


def yields_and_raises(item):
    yield item
    if item == 7:
        raise ValueError("seven is bad")


@pytest.mark.parametrize(
    ("function", "text", "places"),
    [
        (raises_value_error, "ValueError: seven is bad", [0, 2]),
        (raises_stop_iteration, "StopIteration: seven is bad", [0]),
        (exits, "SystemExit: seven is bad", [0, 1, 2]),
        (raises_generator_exit, "GeneratorExit: seven is bad", [0]),
        (interrupts, "KeyboardInterrupt: seven is bad", [1]),
        (recurses, "RecursionError", [0, 1]),
        (runs_out_of_memory, "MemoryError: seven is bad", [0]),
        (raises_unpicklable, "Unpicklable: seven is bad", [0, 1]),
        (raises_what_needs_two, "NeedsTwo: seven is bad", [0, 1]),
        (raises_mute, "Mute: .it has no text", [0, 1]),
        (yields_and_raises, "ValueError: seven is bad", [0]),
    ],
)
def test_exceptions_of_a_function(function, text, places):
    for workers in places:
        fails(stage(function, workers), text)


@pytest.mark.parametrize(
    ("function", "places"), [(raises_mute, [0, 2]), (exits, [0, 1]), (yields_and_raises, [0, 1])]
)
def test_items_that_raise_are_skipped(function, places):
    # Of a generator that raises nothing is sent.
    for workers in places:
        assert stage(function, workers, on_error="skip").collect() == [n for n in range(20) if n != 7]


def returns_wrong_shape(item):
    return np.zeros(item if item == 7 else 3, "f4")


def returns_wrong_dtype(item):
    return np.zeros(3, "f8" if item == 7 else "f4")


def returns_no_array(item):
    return [0, 0, 0] if item == 7 else np.zeros(3, "f4")


def returns_none(item, out):
    return None if item == 7 else out


def returns_other_columns(item):
    return Batch(b=[item]) if item == 7 else Batch(a=[item])


@pytest.mark.parametrize(
    ("function", "returns", "text", "places"),
    [
        (
            returns_wrong_shape,
            ArraySpec((3,), "f4"),
            r"float32' \(7,\).*ArraySpec\(\(3,\), 'float32'\)",
            [0, 2],
        ),
        (returns_wrong_dtype, ArraySpec((3,), "f4"), r"float64' \(3,\).*float32", [0]),
        (returns_no_array, ArraySpec((3,), "f4"), "a list", [0]),
        (returns_none, ArraySpec((3,), "f4"), "returned None", [0, 1]),
        (returns_other_columns, Columns(a="i8"), r"Batch\(1 rows; b: int64\).*Columns\(a='int64'\)", [0]),
    ],
)
def test_results_of_the_wrong_kind(function, returns, text, places):
    for workers in places:
        options = {"workers": workers, "name": "bad", **(FORK if workers else {})}
        fails(Pipeline().source(range(20)).map(function, returns=returns, **options), text)
        kept = (
            Pipeline().source(range(20)).map(function, returns=returns, on_error="skip", **options).collect()
        )
        assert len(kept) == 19


class CannotBePickled:
    def __reduce__(self):
        raise ValueError("not to be pickled")


class CannotBeUnpickled:
    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise ValueError("not to be unpickled")


def returns_what_cannot_be_pickled(item):
    return CannotBePickled() if item == 7 else item


def returns_what_cannot_be_unpickled(item):
    return CannotBeUnpickled() if item == 7 else item


def test_results_that_cannot_travel():
    fails(stage(returns_what_cannot_be_pickled, 2), "cannot be sent", "not to be pickled")


def test_results_that_do_not_arrive():
    with pytest.raises(DslineError, match="not to be unpickled"):
        stage(returns_what_cannot_be_unpickled, 1).collect()


def returns_much(item):
    return np.zeros(64 << 20, "u1") if item == 7 else item


def test_a_result_that_is_larger_than_the_memory(workers=1):
    pipeline = (
        Pipeline("small", memory="16MiB")
        .source(range(20))
        .map(returns_much, workers=workers, name="bad", **FORK)
    )
    fails(pipeline, "cannot be sent|memory", error=DslineError)


# --- classes ------------------------------------------------------------------------------------------------------------


class FailsToBegin:
    def __init__(self):
        raise ValueError("no model")

    def __call__(self, item):
        return item


class ExitsToBegin:
    def __init__(self):
        sys.exit("no model")

    def __call__(self, item):
        return item


class DiesToBegin:
    def __init__(self):
        os._exit(3)

    def __call__(self, item):
        return item


class FailsToEnd:
    def __call__(self, item):
        return item

    def close(self):
        raise ValueError("cannot close")


@pytest.mark.parametrize(("function", "places"), [(FailsToBegin, [0, 1]), (ExitsToBegin, [0, 1])])
def test_constructors_that_fail(function, places):
    for workers in places:
        fails(stage(function, workers), "could not be started", "no model")


def test_workers_that_die_when_they_start():
    restart = Restart(max=2, within=60, delay=0.01)
    fails(stage(DiesToBegin, 1, restart=restart), "2|3", error=PipelineRuntimeError)


def test_functions_that_do_not_arrive():
    restart = Restart(max=2, within=60, delay=0.01)
    fails(stage(DoesNotArrive(), 1, restart=restart), "not to be unpickled", error=DslineError)


class DoesNotArrive:
    def __call__(self, item):
        return item

    def __reduce__(self):
        return _refuse, ()


@pytest.mark.parametrize("workers", [0, 1])
def test_close_that_fails(workers):
    # What came out is right, so the run is; the failure is told as an event.
    pipeline = stage(FailsToEnd, workers).sink(identity)
    seen = []
    report = pipeline.run(on_event=lambda event: seen.append(event))
    assert report.state == "finished"
    assert any("cannot close" in str(event) for event in seen)


# --- every kind of stage ------------------------------------------------------------------------------------------------

BATCHES = [Batch(ts=np.arange(4) + 4 * n, a=np.arange(4.0)) for n in range(5)]


def bad_rows(rows):
    if np.any(rows["ts"] == 9):
        raise ValueError("nine is bad")
    return rows


def bad_mask(rows):
    if np.any(rows["ts"] == 9):
        raise ValueError("nine is bad")
    return rows["ts"] >= 0


def bad_aggregate(column):
    if (column == 9).any():
        raise ValueError("nine is bad")
    return column.sum()


def batches(workers=0):
    options = {"name": "bad", "workers": workers, **(FORK if workers else {})}
    return Pipeline().source(BATCHES), options


@pytest.mark.parametrize(
    ("add", "text"),
    [
        (lambda p, o: p.filter(bad_mask, **o), "nine is bad"),
        (lambda p, o: p.filter("nothing > 1", **o), "no column 'nothing'"),
        (lambda p, o: p.derive(z="ts + nothing", **o), "no column 'nothing'"),
        (lambda p, o: p.select("nothing", **o), "no column 'nothing'"),
        (lambda p, o: p.map_batches(bad_rows, batch=3, **o), "nine is bad"),
        (lambda p, o: p.map_batches(bad_rows, batch=100, linger=None, **o), "nine is bad"),
        (lambda p, o: p.map_batches(bad_rows, batch=100, linger="1ms", **o), "nine is bad"),
        (lambda p, o: p.filter_py_batch(lambda rows: True, batch=3, **o), "each row"),
        (lambda p, o: p.filter_py_batch(bad_mask, batch=3, **o), "nine is bad"),
        (
            lambda p, o: p.window(dsline.tumbling(4), s=agg.apply(bad_aggregate, "ts"), **o),
            "nine is bad",
        ),
        (lambda p, o: p.window(dsline.tumbling("1s", time="when"), n=agg.count(), **o), "when"),
        (lambda p, o: p.window(dsline.tumbling(4), n=agg.mean("nothing"), **o), "nothing"),
    ],
)
def test_exceptions_of_every_stage(add, text):
    # In a worker where it is not an item that fails, but a deadline or the end.
    for workers in [0, 1] if "100" in inspect.getsource(add) or text == "when" else [0]:
        pipeline, options = batches(workers)
        fails(add(pipeline, options), text)


def test_rows_that_are_not_alike(workers=0):
    options = {}
    mixed = [BATCHES[0], BATCHES[1].to_records(), BATCHES[2]]
    fails(Pipeline().source(mixed).batch(100, workers=workers, name="bad", **options), "alike")
    fails(Pipeline().source([1, object]).unbatch(name="bad", workers=workers, **options), "taken apart")
    (kept,) = (
        Pipeline().source(mixed).batch(100, workers=workers, name="bad", on_error="skip", **options).collect()
    )
    assert kept.ts.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def bad_key(row):
    raise ValueError("no key")


def test_exceptions_of_routers_and_merges():
    yes, no = Pipeline().source(range(9)).branch(yes=raises_value_error, no=None).values()
    with pytest.raises(OperatorError, match=r"stage 'branch'.*seven is bad"):
        Pipeline.together(yes.sink(identity), no.sink(identity)).run()
    yes, no = Pipeline().source([{"a": 1}]).branch(yes="b > 1", no=None).values()
    with pytest.raises(OperatorError, match=r"stage 'branch'.*no column 'b'"):
        Pipeline.together(yes.sink(identity), no.sink(identity)).run()
    first, second = Pipeline().source([{"a": 1}]), Pipeline().source([{"a": 2}])
    fails(first.merge(second, order="ts", name="bad"), "no column 'ts'")
    fails(first.merge(second, order=bad_key, name="bad"), "no key")
    keyed = Pipeline().source([{"a": 1}] * 3).key_by(bad_key, partitions=2, name="bad")
    fails(keyed.window(dsline.tumbling(1), n=agg.count(), **FORK), "no key")


# --- ends ---------------------------------------------------------------------------------------------------------------


def bad_items():
    yield 1
    yield 2
    raise ValueError("the camera is gone")


class BadIterable:
    def __iter__(self):
        raise ValueError("no camera")


def no_items():
    raise ValueError("no camera at all")


def exiting_items():
    yield 1
    sys.exit("the camera is gone")


@pytest.mark.parametrize(
    ("items", "text", "workers"),
    [
        (bad_items, "the camera is gone", 0),
        (bad_items, "the camera is gone", 1),
        (BadIterable(), "no camera", 0),
        (no_items, "no camera at all", 0),
        (exiting_items, "the camera is gone", 1),
    ],
)
def test_exceptions_of_a_source(items, text, workers):
    options = FORK if workers else {}
    fails(Pipeline().source(items, name="bad").map(identity, workers=workers, **options), text)


def test_sources_that_are_not_there(tmp_path, name):
    for uri in (f"shm://{name}", str(tmp_path / "nothing.npy"), f"file://{tmp_path}/nothing"):
        with pytest.raises(DslineError):
            Pipeline().source(uri, **({"timeout": 0.1} if uri.startswith("shm") else {})).sink(identity).run()
    for uri in ("tcp://host:1", "shm://", "nothing", 3, None):
        with pytest.raises(PipelineBuildError):
            Pipeline().source(uri).sink(identity).plan()
        if uri is not None:  # which collects
            with pytest.raises(PipelineBuildError):
                Pipeline().source([1]).sink(uri).plan()


@pytest.mark.parametrize(("function", "workers"), [(raises_value_error, 0), (exits, 0), (exits, 1)])
def test_exceptions_of_a_sink(function, workers):
    options = FORK if workers else {}
    fails(Pipeline().source(range(20)).sink(function, name="bad", workers=workers, **options), "seven is bad")


@pytest.mark.parametrize("hook", ["on_stage_start", "on_stage_stop", "on_event", "on_error"])
def test_exceptions_of_hooks(hook):
    def bad(event):
        raise ValueError("the hook is bad")

    workers = 1 if hook in ("on_error", "on_stage_start") else 0
    function = raises_value_error if hook == "on_error" else identity
    with pytest.raises(DslineError, match=r"hook.*the hook is bad"):
        stage(function, workers).sink(identity).run(**{hook: bad})


class BadState(Remembers):
    def state_dict(self):
        raise ValueError("no state")


class BadLoad(Remembers):
    def load_state_dict(self, state):
        raise ValueError("bad state")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("function", "text"), [(BadState, "no state"), (BadLoad, "bad state")])
def test_exceptions_of_states(function, text, workers, tmp_path):
    np.save(tmp_path / "in.npy", np.arange(50))
    pipeline = (
        Pipeline("states")
        .source(str(tmp_path / "in.npy"))
        .map(function, workers=workers, name="bad", **(FORK if workers else {}))
        .checkpoint(tmp_path / "states", every=0.001)
        .sink(f"file://{tmp_path}/out")
    )
    if function is BadLoad:
        pipeline.run()
        fails(pipeline, text, resume=True)
    else:
        fails(pipeline, text)


def test_what_is_left_when_the_caller_raises():
    with pytest.raises(ZeroDivisionError), stage(identity, 2).sink(identity).start():
        raise ZeroDivisionError
    for item in stage(identity, 2):
        if item == 3:
            break


def test_many_failures_at_once():
    options = {"on_error": "skip", "max_errors": 3}
    fails(stage(bad_key, 2, **options), "max_errors=3", error=PipelineRuntimeError)
    both = (
        Pipeline()
        .source(range(50))
        .map(bad_key, workers=1, name="bad", **FORK)
        .map(bad_key, workers=1, **FORK)
    )
    fails(both, "no key")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_rate_does_not_keep_a_pipeline_from_stopping(workers):
    options = FORK if workers else {}
    pipeline = Pipeline().source(range(1000)).rate_limit(0.01, workers=workers, **options).sink(identity)
    began = time.monotonic()
    with pipeline.start() as run:
        wait_until(lambda: run.stats()["rate_limit"].items_in >= 1)
        run.stop(drain=False)
    assert time.monotonic() - began < 20


def test_a_rate_does_not_delay_what_comes_after():
    # The batch behind the limit is closed by its linger, although the next item has no token for a long time.
    seen = []
    pipeline = Pipeline().source(range(3)).rate_limit(0.01).batch(10, linger="10ms").sink(seen.append)
    with pipeline.start() as run:
        wait_until(lambda: seen)
        run.stop(drain=False)
    assert seen == [[0]]


def test_what_no_branch_takes_is_counted():
    ways = Pipeline().source(range(10)).branch(small="x < 3", large="x > 7")
    report = Pipeline.together(*(way.sink(identity) for way in ways.values())).run()
    assert report.stats["branch"].counters["unmatched"] == 5
