"""Functions on their way to other processes and into texts; callable classes; the budget of restarts."""

import functools
import importlib.util
import json
import math
import operator
import os
import sys
import threading
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_clean, run_script

from dsline.dataflow import callables
from dsline.dataflow.restart import Restart, RestartBudget
from dsline.errors import PipelineBuildError

LOCK = threading.Lock()


def double(x):
    return 2 * x


class Scale:
    def __init__(self, factor=2):
        self.factor = factor
        self.closed = 0

    def __call__(self, x, out=None):
        return np.multiply(x, self.factor, out=out)

    def close(self):
        self.closed += 1

    def method(self, x):
        return x

    @classmethod
    def made(cls, x):
        return x

    @staticmethod
    def static(x):
        return x


class Plain:
    pass


class Wanting:
    def __init__(self, path):
        self.path = path

    def __call__(self, x):
        return self.path, x


# --- pickling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [double, np.mean, np.add, len, math.sqrt, Scale, Scale.static, json.dumps, operator.add],
)
def test_what_can_be_imported_goes_by_reference(function):
    packed = callables.pack(function)
    assert len(packed) < 200
    assert callables.unpack(packed) == function


def test_by_value():
    number = 3

    def triple(x):
        return number * x

    for function in (triple, lambda x: x * number, functools.partial(operator.mul, 3)):
        assert callables.unpack(callables.pack(function))(5) == 15
    assert callables.unpack(callables.pack(Scale(7)))(2) == 14
    assert callables.unpack(callables.pack(Scale(7).method))(2) == 2
    assert callables.unpack(callables.pack(Scale.made))(2) == 2


def test_a_module_that_only_this_process_has(tmp_path):
    (tmp_path / "only_here.py").write_text("STEP = 5\ndef step(x):\n    return x + STEP\n")
    spec = importlib.util.spec_from_file_location("only_here", tmp_path / "only_here.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["only_here"] = module
    try:
        packed = callables.pack(module.step)
    finally:
        del sys.modules["only_here"]
    assert callables.unpack(packed)(1) == 6


def _with_lock():
    log = threading.Lock()
    return lambda x: log and x


def _with_file():  # cloudpickle brings over what can be read from a file that is open for reading
    file = open(os.devnull, "w")  # noqa: SIM115
    return (lambda x: file.write(x)), file


class Holder:
    def __init__(self, part):
        self.part = part

    def __call__(self, x):
        return x


def test_what_cannot_be_pickled_is_named():
    with pytest.raises(PipelineBuildError, match=r"'log' \(a _thread.lock\).*workers=0"):
        callables.pack(_with_lock())
    function, file = _with_file()
    with file, pytest.raises(PipelineBuildError, match=r"'file' \(a _io.TextIOWrapper\)"):
        callables.pack(function)
    with pytest.raises(PipelineBuildError, match=r"^Holder cannot .*'part' \(a generator\)"):
        callables.pack(Holder(x for x in ()))
    with pytest.raises(PipelineBuildError, match=r"argument 0' \(a _thread.lock\)"):
        callables.pack(functools.partial(double, LOCK))
    with pytest.raises(PipelineBuildError, match=r"'part' \(a dict\), in it ''inner'' \(a _thread.lock\)"):
        callables.pack(Holder({"inner": LOCK}))
    with pytest.raises(PipelineBuildError, match=r"'its object' .*Holder\), in it 'part' \(a generator\)"):
        callables.pack(Holder(x for x in ()).__call__)
    with pytest.raises(PipelineBuildError, match=r"<genexpr> cannot be brought .*TypeError"):
        callables.pack(x for x in ())


def test_a_global_of_the_main_program_is_named():
    source = """
import threading
from dsline.dataflow import callables
from dsline.errors import PipelineBuildError
GATE = threading.Lock()
def guarded(x):
    with GATE:
        return x
try:
    callables.pack(guarded)
except PipelineBuildError as error:
    print(error)
"""
    done = run_script(source)
    assert_clean(done)
    assert "guarded cannot be brought to a worker process: 'GATE' (a _thread.lock)" in done.stdout


def test_classes_of_the_main_program():
    source = """
import dataclasses, enum, pickle, resource, threading
import numpy as np
from dsline.dataflow import callables
@dataclasses.dataclass
class Point:
    x: int
class Colour(enum.Enum):
    RED = 1
class Locked:
    lock = threading.Lock()
class Huge:
    data = bytes(1 << 20)
table = np.zeros(1 << 30, np.uint8)  # would take a second to copy, and memory that may not be there
class Looking:
    def look(self):
        return table
Alias = Point
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(*sorted(callables.main_classes()))
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
items = pickle.dumps([Point(3), Colour.RED])
packed = callables.main_classes()
other = callables.pack(lambda: Point)
del Point, Alias, Colour
callables.serve_main_classes(packed)
point, colour = pickle.loads(items)
print(point, colour, type(point) is callables.unpack(other)())
assert pickle.loads(pickle.dumps(point)) == point
try:
    pickle.loads(b"c__main__\\nmissing\\n.")
except AttributeError as error:
    print(error)
"""
    done = run_script(source)
    assert_clean(done)
    lines = done.stdout.splitlines()
    assert lines[0] == "Colour Point"
    assert lines[1] == "Point(x=3) Colour.RED True"
    assert "'missing'" in lines[2] and "__main__" in lines[2]


# --- texts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [double, Scale, Scale.made, Scale.static, np.mean, math.sqrt, json.JSONDecoder.decode, len]
)
def test_reference_and_back(function):
    text = callables.reference(function)
    assert callables.resolve(text) == function


def test_reference_text():
    assert callables.reference(double) == f"{__name__}:double"
    assert callables.reference(Scale.static) == f"{__name__}:Scale.static"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x, "lambda"),
        (_with_lock(), "lambda"),
        (functools.partial(double, 1), "an object of partial"),
        (Scale(), "an object of Scale"),
        (Scale().method, "bound to an object"),
    ],
)
def test_no_text_stands_for_it(function, why):
    with pytest.raises(PipelineBuildError, match=why):
        callables.reference(function)


def test_no_text_stands_for_what_is_elsewhere():
    def inner(x):
        return x

    with pytest.raises(PipelineBuildError, match="inside of a function"):
        callables.reference(inner)
    main = types.FunctionType(double.__code__, {}, "f")
    main.__module__, main.__qualname__ = "__main__", "f"
    with pytest.raises(PipelineBuildError, match="main program"):
        callables.reference(main)
    replaced = functools.wraps(double)(lambda x: x)
    with pytest.raises(PipelineBuildError, match="another double"):
        callables.reference(replaced)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("json", "names no function"),
        ("json:", "names no function"),
        (":dumps", "names no function"),
        ("json:dumps:x", "names no function"),
        ("../evil:f", "names no function"),
        ("json:dumps()", "names no function"),
        (3, "names no function"),
        ("no_such_module_at_all:f", "cannot be imported"),
        ("json:no_such", "is not there"),
        ("json:JSONDecoder.no", "is not there"),
        ("math:pi", "is a float"),
    ],
)
def test_texts_that_resolve_to_nothing(text, why):
    with pytest.raises(PipelineBuildError, match=why):
        callables.resolve(text)


# --- callable classes ---------------------------------------------------------------------------------------------------


def test_instantiate():
    assert callables.instantiate(double) is double
    made = callables.instantiate(Scale)
    assert made(4) == 8
    assert callables.instantiate(functools.partial(Scale, 5))(4) == 20
    assert callables.instantiate(functools.partial(Wanting, "p"))(1) == ("p", 1)
    scale = Scale(3)
    assert callables.instantiate(scale) is scale
    partial = functools.partial(int, base=2)  # objects of int cannot be called: it is the function
    assert callables.instantiate(partial) is partial


def test_close():
    scale = Scale()
    callables.close(scale)
    assert scale.closed == 1
    for other in (double, Plain(), np.add, Scale.made):
        callables.close(other)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (3, "a int cannot be called"),
        (Plain, "objects of Plain cannot be called"),
        (Wanting, "functools.partial"),
        (functools.partial(Wanting, 1, 2), "too many"),
    ],
)
def test_not_to_be_called(function, why):
    with pytest.raises(PipelineBuildError, match=why):
        callables.instantiate(function)


def test_accepts_out():
    def with_keyword(x, *, out):
        return out

    def positional(out, /):
        return out

    accepting = [Scale, Scale(), functools.partial(Scale, 3), with_keyword, np.add, np.mean, np.cumsum]
    assert all(callables.accepts_out(function) for function in accepting)
    refusing = [double, positional, len, Plain, Wanting, lambda **rest: rest, functools.partial(double)]
    assert not any(callables.accepts_out(function) for function in refusing)


# --- restarts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"max": -1},
        {"max": 1.5},
        {"max": True},
        {"within": -1},
        {"delay": math.nan},
        {"max_delay": math.inf},
        {"delay": "1"},
    ],
)
def test_restart_refuses(wrong):
    with pytest.raises(PipelineBuildError, match=next(iter(wrong))):
        Restart(**wrong)


def test_delay_doubles_up_to_its_limit():
    budget = RestartBudget(Restart(max=6, within=60, delay=0.5, max_delay=5), lambda: 0.0)
    assert [budget.died() for _ in range(7)] == [0.5, 1, 2, 4, 5, 5, None]
    assert budget.used == 6
    assert budget.describe() == "7 deaths within 60 s, and Restart allows 6 restarts"


def test_the_window_slides():
    now = 0.0
    budget = RestartBudget(Restart(max=2, within=10, delay=1), lambda: now)
    assert budget.died() == 1
    now = 6.0
    assert budget.died() == 2
    assert budget.died() is None
    now = 10.0  # the first death is ten seconds old
    assert budget.used == 1
    assert budget.died() == 2
    assert budget.died() is None
    now = 100.0
    assert budget.died() == 1


def test_never():
    assert RestartBudget(Restart(max=0)).died() is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 20), max_size=40),
    st.integers(0, 5),
    st.floats(0.1, 30),
)
def test_never_more_restarts_than_allowed_in_any_window(gaps, most, within):
    now = 0.0
    budget = RestartBudget(Restart(max=most, within=within, delay=0.1, max_delay=1), lambda: now)
    granted = []
    for gap in gaps:
        now += gap
        recent = [when for when in granted if now - when < within]
        delay = budget.died()
        assert (delay is not None) == (len(recent) < most)
        if delay is not None:
            assert 0.1 <= delay <= 1
            granted.append(now)
