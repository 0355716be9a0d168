"""Pipelines as they are built: plans, segments, explain, JSON, drawings."""

import json
import xml.etree.ElementTree

import numpy as np
import plan_functions
import pytest

import dsline
from dsline import ArraySpec, Pipeline, PipelineBuildError
from dsline.dataflow.plan import Plan


def names(plan):
    return [[plan.stages[number].name for number in segment.stages] for segment in plan.segments]


def test_stages_of_the_caller_are_one_segment():
    plan = (
        Pipeline().source([1, 2]).map(plan_functions.double).filter(plan_functions.is_even).sink(print).plan()
    )
    assert names(plan) == [["iterable", "double", "filter", "print"]]
    assert plan.edges == ()
    assert plan.worker_processes == 0


def test_workers_are_segments_of_their_own():
    plan = (
        Pipeline()
        .source(range(3))
        .map(plan_functions.double, workers=2)
        .map(plan_functions.double, workers=3, ordered=False)
        .filter(plan_functions.is_even)
        .sink(print)
        .plan()
    )
    assert [segment.workers for segment in plan.segments] == [0, 2, 3, 0]
    assert [segment.ordered for segment in plan.segments] == [True, True, False, True]
    assert len(plan.edges) == 3
    assert plan.worker_processes == 5
    assert "in the order of completion" in plan.edges[2].guarantee
    for edge, segment in zip(plan.edges, plan.segments[1:], strict=True):
        # What is queued, what every consumer may hold, and one that is being written.
        assert edge.slots > edge.queue + max(1, segment.workers)


def test_partitions_are_processes():
    plan = (
        Pipeline()
        .source([])
        .key_by("sensor", partitions=3)
        .window(dsline.tumbling(2), n=dsline.agg.count())
        .map(plan_functions.double, workers=2)
        .sink(print)
        .plan()
    )
    windows = [segment for segment in plan.segments if segment.instance is not None]
    assert [segment.instance for segment in windows] == [0, 1, 2]
    assert all(segment.workers == 1 and len(segment.inputs) == 1 for segment in windows)
    # Two competing workers take from one channel: what comes from three is brought together before it.
    (mapping,) = [segment for segment in plan.segments if segment.workers == 2]
    assert len(mapping.inputs) == 1
    (relay,) = [segment for segment in plan.segments if not segment.stages]
    assert len(relay.inputs) == 3


def test_a_pipeline_is_not_changed_by_what_is_added():
    first = Pipeline("p").source([1, 2, 3])
    second = first.map(plan_functions.double)
    third = first.filter(plan_functions.is_even)
    assert first.collect() == [1, 2, 3]
    assert second.collect() == [2, 4, 6]
    assert third.collect() == [2]
    with pytest.raises(AttributeError, match="cannot be changed"):
        first.name = "q"


def test_schemas_are_checked_when_the_plan_is_made():
    records = np.zeros(4, [("temperature", "f4"), ("humidity", "f4")])
    good = Pipeline().source(records, rows=2).filter("temperature > 20").derive(dew="temperature - humidity")
    plan = good.sink(print).plan()
    derived = plan.stages[2].schema
    assert isinstance(derived, ArraySpec)
    assert derived.dtype.names == ("temperature", "humidity", "dew")
    with pytest.raises(PipelineBuildError, match=r"stage 'filter'.*'pressure'"):
        Pipeline().source(records, rows=2).filter("pressure > 3").sink(print).plan()


def test_what_is_wrong_names_the_stage_before_there_is_one():
    with pytest.raises(dsline.ExpressionError, match=r"^stage 'warm': .*column 4") as caught:
        Pipeline().source([1]).filter("a >", name="warm")
    assert caught.value.column == 4
    with pytest.raises(PipelineBuildError, match=r"^stage 'batch': "):
        Pipeline().source([1]).batch(0)


def test_explain_says_what_runs_where():
    pipeline = (
        Pipeline("frames", memory="64MiB")
        .source(range(3))
        .map(plan_functions.double, workers=2, queue=4, name="work")
    )
    text = pipeline.explain()
    assert text.startswith("pipeline 'frames': the caller and 2 worker processes, 2 channels")
    assert "4 queued of" in text
    assert "each item once, in order" in text
    assert "2 worker processes, in order" in text


def test_json_round_trip():
    plan = (
        Pipeline("p", memory="10MiB")
        .source(plan_functions.numbers)
        .map(plan_functions.double, workers=2, ordered=False, on_error=dsline.retry(2, then="skip"))
        .filter("value > 2")
        .sink(plan_functions.take)
        .plan()
    )
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    assert again.fingerprint == plan.fingerprint
    assert again.memory == 10 << 20
    assert again.stages[1].options == plan.stages[1].options
    assert names(again) == names(plan)


def test_what_json_cannot_say():
    with pytest.raises(PipelineBuildError, match="stage 'map'"):
        Pipeline().source(plan_functions.numbers).map(lambda x: x).sink(plan_functions.take).plan().to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.pop("dsline_plan"), "dsline_plan"),
        (lambda plain: plain.pop("stages"), "stages"),
        (lambda plain: plain["stages"][1].update(inputs=["nobody"]), "'nobody' is no stage"),
        (
            lambda plain: plain["stages"][1].update(inputs=["take"]),
            "cycle: double → take → double",
        ),
        (lambda plain: plain["stages"][1].update(inputs=["double"]), "cycle: double → double"),
        (lambda plain: plain["stages"][1]["options"].update(workers=-1), "stage 'double'.*workers is -1"),
        (lambda plain: plain["stages"][1]["options"].update(colour=1), "unknown stage option 'colour'"),
        (lambda plain: plain["stages"][1].update(part={"op": "no_such"}), "no operator 'no_such'"),
        (lambda plain: plain["stages"].append(plain["stages"][1]), "two stages have the name 'double'"),
    ],
)
def test_wrong_json(change, message):
    plain = json.loads(
        Pipeline()
        .source(plan_functions.numbers)
        .map(plan_functions.double)
        .sink(plan_functions.take)
        .plan()
        .to_json()
    )
    change(plain)
    with pytest.raises(PipelineBuildError, match=message):
        Plan.from_json(json.dumps(plain))


def test_a_cycle_over_two_stages():
    plain = json.loads(
        Pipeline()
        .source(plan_functions.numbers)
        .map(plan_functions.double, name="a")
        .map(plan_functions.double, name="b")
        .sink(plan_functions.take)
        .plan()
        .to_json()
    )
    plain["stages"][1]["inputs"] = ["b"]
    with pytest.raises(PipelineBuildError, match="cycle: a → b → a"):
        Plan.from_json(json.dumps(plain))


def test_drawings_name_every_stage():
    pipeline = (
        Pipeline("p")
        .source(range(3), name="in")
        .map(plan_functions.double, workers=2, name="<work>")
        .sink(print, name="out")
    )
    plan = pipeline.plan()
    assert plan.to_mermaid().startswith("flowchart")
    text = plan.to_svg()
    xml.etree.ElementTree.fromstring(text)
    for name in ("in", "&lt;work&gt;", "out"):
        assert name in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pipeline().map(len), "has? no source|no source yet"),
        (lambda: Pipeline().source([1]).source([2]), "has a source"),
        (lambda: Pipeline().source([1]).sink(print).map(len), "ends with a sink"),
        (lambda: Pipeline().source([1]).plan(), "without a sink"),
        (lambda: Pipeline().source([1]).sink(print).collect(), "ends with a sink"),
        (lambda: Pipeline(memory="lots"), "memory is 'lots'"),
        (lambda: Pipeline().source([1]).map(len, workers=65).sink(print), "workers is 65"),
        (lambda: Pipeline().source([1]).map(len, full="drop"), "full is 'drop'"),
        (lambda: Pipeline().source([1]).map(len, colours=2), "unknown stage option 'colours'"),
        (lambda: Pipeline().source([1]).map(len, timeout=1.0), "workers=1"),
        (lambda: Pipeline().source([1]).batch(2, workers=2).sink(print).plan(), "stage 'batch': workers=2"),
        (lambda: Pipeline().source([1]).map(len, name="a").map(len, name="a").sink(print).plan(), "name 'a'"),
        (lambda: Pipeline().source([1]).pipe(len), "takes an operator"),
        (lambda: Pipeline().source([1]).broadcast(), "needs sinks"),
        (lambda: Pipeline.together(Pipeline().source([1])), "without a sink"),
        (
            lambda: (
                Pipeline("m", memory="1MiB").source([1]).map(len, workers=2, queue=100).sink(print).plan()
            ),
            "more memory=",
        ),
    ],
)
def test_what_cannot_be_built(make, message):
    with pytest.raises(PipelineBuildError, match=message):
        make()


@pytest.mark.parametrize("order", ["zip", "sequence", "ts"])
def test_merges_that_could_stand_still(order):
    branches = Pipeline().source([1, 2]).branch(even=plan_functions.is_even, odd=plan_functions.is_odd)
    with pytest.raises(PipelineBuildError, match="can stand still for ever"):
        branches["even"].merge(branches["odd"], order=order).sink(print).plan()
    first, second = Pipeline().source([1, 2]).broadcast(2)
    with pytest.raises(PipelineBuildError, match="can stand still for ever"):
        first.filter(plan_functions.is_even).merge(second, order="zip").sink(print).plan()
    assert first.map(plan_functions.double).merge(second, order="zip").collect() == [(2, 1), (4, 2)]


def test_a_branch_that_goes_nowhere():
    branches = Pipeline().source([1, 2]).branch(even=plan_functions.is_even, odd=plan_functions.is_odd)
    with pytest.raises(PipelineBuildError, match="output 'odd' goes nowhere"):
        branches["even"].sink(print).plan()


def test_an_output_that_is_taken_twice():
    shared = Pipeline().source([1, 2])
    with pytest.raises(PipelineBuildError, match=r"goes to .*use \.broadcast"):
        Pipeline.together(shared.sink(print), shared.sink(print)).plan()
