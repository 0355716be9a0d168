"""Counters of a pipeline: what writers count, what readers make of it, and what is left when a writer is killed."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import mmap
import multiprocessing
import multiprocessing.resource_tracker
import os
import pickle
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsline import _core
from dsline.dataflow.counters import (
    COUNTERS,
    EdgeStats,
    PipelineCounters,
    PipelineStats,
    SegmentPages,
    StageStats,
    percentiles,
)
from dsline.errors import FeatureUnavailableError, InvalidArgumentError


def chain(*names, workers=0, kinds=()):
    return PipelineCounters([SegmentPages(names, kinds, workers)])


def test_items_rows_bytes_and_named_counters():
    counters = chain("detect", workers=2)
    first, second = (counters.ticket(0, worker).open() for worker in range(2))
    for sequence in range(10):
        first.begin(sequence, 4, 100)
        first.end(2, 3, 50)
    second.begin(10)
    second.end(0)
    first.add("late", 3)
    second.add("late")
    second.add("colour unknown", 5)
    stage = counters.look()["detect"]
    assert (stage.items_in, stage.items_out) == (11, 20)
    assert (stage.rows_in, stage.rows_out, stage.bytes_in, stage.bytes_out) == (40, 30, 1000, 500)
    assert stage.late == 4
    assert stage.counters == {"colour unknown": 5}
    assert stage.troubles == {"late": 4}
    assert (first.get("late"), second.get("colour unknown"), first.get("nothing")) == (3, 5, 0)


def test_every_counter_of_the_list_is_a_figure():
    counters = chain("a")
    writer = counters.ticket(0).open()
    for number, name in enumerate(COUNTERS, 1):
        writer.add(name, number)
    stage = counters.look()["a"]
    shown = {"in": "items_in", "out": "items_out"}
    for number, name in enumerate(COUNTERS, 1):
        value = getattr(stage, shown.get(name, name))
        assert value == number or (name in ("busy_ns", "starved_ns") and value >= number), name
    assert stage.counters == {}


def test_names_that_do_not_fit_are_counted_together():
    counters = chain("a")
    writer = counters.ticket(0).open()
    names = [f"counter {number}" for number in range(40)]
    for name in [*names, *names, "x" * 40, "", "with\0zero", "ü" * 15]:
        writer.add(name)
    own = counters.look()["a"].counters
    assert own == {**dict.fromkeys(names[:23], 2), "other": 2 * 17 + 4}
    again = counters.ticket(0).open()
    again.add("counter 5")
    again.add("other")
    assert counters.look()["a"].counters == {**own, "counter 5": 3, "other": own["other"] + 1}


def test_blocked_and_starved_time_is_not_the_items():
    hour = 3600 * 10**9
    counters = chain("a")
    writer = counters.ticket(0).open()
    writer.begin(0)
    writer.blocked(hour)
    writer.starved(2 * hour)
    assert counters.current(0).busy_seconds() == 0
    writer.end()
    stage = counters.look()["a"]
    assert stage.blocked_ns == hour
    assert stage.starved_ns >= 2 * hour
    assert stage.busy_ns == 0  # not negative, not the hours
    assert stage.max_ns == 0


def test_the_inner_items_time_is_not_the_outers():
    hour = 3600 * 10**9
    counters = chain("outer", "inner")
    outer = counters.ticket(0).open()
    assert outer.stages[0] is outer
    inner = outer.stages[1]
    started = time.monotonic_ns()
    for sequence in range(3):
        outer.begin(sequence)
        for _ in range(2):
            inner.begin(0)
            time.sleep(0.002)
            inner.end()
        outer.end(2)
    took = time.monotonic_ns() - started
    stats = counters.look()
    assert (stats["outer"].items_in, stats["outer"].items_out, stats["inner"].items_in) == (3, 6, 6)
    assert stats["inner"].busy_ns >= 6 * 2_000_000
    assert stats["outer"].busy_ns <= took - 6 * 2_000_000
    assert stats["inner"].starved_ns == 0
    inner.blocked(hour)  # between items: nobody's
    outer.begin(3)
    inner.begin(0)
    inner.blocked(hour)
    assert counters.current(0).busy_seconds() == 0
    inner.end()
    outer.end()
    assert counters.look()["outer"].busy_ns <= time.monotonic_ns() - started


@pytest.mark.parametrize("caller", [0, 1, 2])
def test_waiting_belongs_to_the_innermost_item_whoever_says_it(caller):
    hour = 3600 * 10**9
    counters = chain("a", "b", "c")
    stages = counters.ticket(0).open().stages
    for page in stages[:2]:
        page.begin(4)
    stages[caller].blocked(hour)
    stages[caller].starved(hour)
    stages[caller].blocking()
    assert counters.current(0).blocked
    time.sleep(0.002)
    stages[2 - caller].unblocked()
    assert not counters.current(0).blocked
    assert counters.current(0).busy_seconds() == 0
    for page in reversed(stages[:2]):
        page.end()
    stats = counters.look()
    assert stats["b"].blocked_ns >= hour + 2_000_000
    assert stats["b"].starved_ns == hour
    assert [stage.blocked_ns for stage in stats.stages] == [0, stats["b"].blocked_ns, 0]
    assert max(stage.busy_ns for stage in stats.stages) < hour
    assert max(stage.max_ns for stage in stats.stages) < hour
    stages[caller].blocked(hour)  # between items: the first stage's
    assert counters.look()["a"].blocked_ns == hour


def test_what_is_going_on_is_part_of_the_figures():
    counters = chain("outer", "inner")
    begun = time.monotonic_ns()
    outer = counters.ticket(0).open()
    time.sleep(0.003)
    waiting = counters.look()["outer"]
    assert waiting.starved_ns >= 3_000_000
    assert waiting.busy_ns == waiting.items_in == 0
    outer.begin(7)
    outer.stages[1].begin(0)
    time.sleep(0.003)
    stats = counters.look()
    assert stats["inner"].busy_ns >= 3_000_000
    assert stats["outer"].busy_ns + stats["inner"].busy_ns <= time.monotonic_ns() - begun
    assert counters.current(0).sequence == 7
    assert counters.current(0).busy_seconds() >= 0.003
    outer.stages[1].blocking()
    outer.stages[1].blocking()  # it already does
    time.sleep(0.003)
    now = counters.current(0)
    assert now.blocked
    assert now.busy_seconds() == 0
    blocked = counters.look()["inner"].blocked_ns
    assert blocked >= 3_000_000
    outer.stages[1].unblocked()
    outer.stages[1].unblocked()
    stats = counters.look()
    assert stats["inner"].blocked_ns >= blocked
    assert (
        sum(stage.busy_ns + stage.blocked_ns + stage.starved_ns for stage in stats.stages)
        <= time.monotonic_ns() - begun
    )
    assert not counters.current(0).blocked
    outer.stages[1].end()
    outer.end()
    assert counters.current(0).sequence is None


def test_an_item_that_is_abandoned_is_not_counted():
    counters = chain("a", "b")
    writer = counters.ticket(0).open()
    writer.abandon()  # there is none
    writer.begin(3)
    writer.stages[1].begin(0)
    writer.stages[1].abandon()
    writer.abandon()
    assert counters.current(0).sequence is None
    stats = counters.look()
    assert stats["a"].items_in == stats["b"].items_in == 0
    with pytest.raises(ValueError, match="without begin"):
        writer.end()


def test_wrong_calls_are_refused():
    with pytest.raises(InvalidArgumentError, match="needs a stage"):
        PipelineCounters([SegmentPages(())])
    with pytest.raises(InvalidArgumentError, match="kind for each"):
        PipelineCounters([SegmentPages(("a",), ("source", "sink"))])
    counters = chain("a", workers=2)
    for segment, worker in ((1, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(InvalidArgumentError, match="of"):
            counters.ticket(segment, worker)
    writer = counters.ticket(0).open()
    for bad in (-1, 2**64, "x"):
        with pytest.raises((OverflowError, TypeError)):
            writer.add("late", bad)
    with pytest.raises(TypeError):
        writer.add(None)
    with pytest.raises(ValueError):
        _core.CounterPage(bytearray(100), 0)
    with pytest.raises(ValueError):
        _core.CounterPage(bytes(_core.COUNTER_PAGE_BYTES), 0)
    with pytest.raises(ValueError, match="never opened"):
        _core.CounterPage.__new__(_core.CounterPage).begin(0)


def test_readers_cannot_write_and_nobody_can_take_the_memory_away():
    counters = chain("a", "b", workers=3)
    with pytest.raises(TypeError):
        counters._memory[0] = 1
    with pytest.raises(ValueError):
        _core.CounterPage(counters._memory, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(counters._descriptor, 0)


def test_pages_of_workers_do_not_touch_each_other():
    segments = [SegmentPages(("a",), (), 3), SegmentPages(("b", "c", "d"), (), 2), SegmentPages(("e",))]
    counters = PipelineCounters(segments)
    for number, segment in enumerate(segments):
        for worker in range(max(1, segment.workers)):
            writer = counters.ticket(number, worker).open()
            for place, page in enumerate(writer.stages):
                page.add("late", 10**place * (worker + 1))
    late = {stage.name: stage.late for stage in counters.look().stages}
    assert late == {"a": 6, "b": 3, "c": 30, "d": 300, "e": 1}
    offsets = [counters._offset(n, w) for n, s in enumerate(segments) for w in range(max(1, s.workers))]
    assert all(offset % mmap.PAGESIZE == 0 for offset in offsets)
    assert len(set(offsets)) == len(offsets)


def test_rates_and_shares_start_from_the_earlier_look():
    counters = chain("a", workers=2)
    writer = counters.ticket(0).open()
    for sequence in range(1000):
        writer.begin(sequence)
        writer.end(2)
    first = counters.look()
    stage = first["a"]
    assert stage.rate_out == pytest.approx(2000 / first.seconds, rel=0.01)
    assert first.interval == pytest.approx(first.seconds, rel=0.01)
    time.sleep(0.002)
    second = counters.look(first)
    assert second["a"].rate_in == second["a"].rate_out == second["a"].busy == 0
    assert second["a"].items_in == 1000
    assert 0 < second["a"].starved <= 0.5  # of two workers one was never there
    assert second.slowest is None
    assert second.interval < second.seconds


def test_the_slowest_stage_is_the_busiest_per_worker():
    stages = (
        StageStats("read", "source", busy=0.2, items_out=7, blocked=0.8),
        StageStats("detect", "map", workers=4, busy=0.9, errors=2, dropped=1),
        StageStats("write", "sink", busy=0.3, items_in=5),
    )
    stats = PipelineStats("p", "running", 2.0, 1.0, stages, (EdgeStats("read", "detect", 3, 4, 9, 2),), 100)
    assert stats.slowest is stages[1]
    assert (stats.items_in, stats.items_out, stats.errors, stats.dropped) == (7, 5, 2, 3)
    assert stats["write"] is stages[2]
    with pytest.raises(KeyError, match="read, detect, write"):
        stats["wrong"]
    assert stats.edges[0].fill == 0.75
    assert EdgeStats("a", "b").fill == 0
    plain = json.loads(json.dumps(stats.to_json()))
    assert plain["slowest"] == "detect"
    assert plain["stages"][1]["errors"] == 2
    assert plain["edges"][0]["capacity"] == 4
    assert plain["total"] == 100
    text = str(stats).splitlines()
    assert text[0] == "pipeline 'p': running, 2.0 s; slowest: detect, busy 90% of the time"
    assert text[3].startswith("detect  0 of 4") and text[3].endswith("errors 2, dropped 1")
    assert any(line.split()[:3] == ["read", "->", "detect"] for line in text)
    assert all(line == line.rstrip() for line in text)


def test_an_edge_is_read_from_its_channel():
    import dsline

    with dsline.ShmChannel.create(capacity=4, slot_size=64) as channel:
        for _ in range(3):
            channel.send(b"x")
        channel.recv().release()
        edge = EdgeStats.of(channel, "a", "b", "block")
    assert (edge.depth, edge.capacity, edge.sent, edge.dropped, edge.policy) == (2, 4, 3, 0, "block")
    assert edge.reserved_bytes > 0


@given(st.lists(st.integers(0, 2**45), min_size=1, max_size=200), st.floats(0.001, 1))
@settings(max_examples=150, deadline=None)
def test_a_percentile_is_at_most_23_percent_off(times, share):
    histogram = np.bincount([_core.bucket_of_latency(ns) for ns in times], minlength=64)
    assert len(histogram) == 64
    true = sorted(times)[max(0, math.ceil(share * len(times)) - 1)]
    (found,) = percentiles(histogram, max(times), [share])
    assert found <= max(times)
    if 32 <= true < 2**37:
        assert true / 1.23 <= found <= true * 1.23


def test_a_bucket_has_the_items_of_its_span():
    for bucket in range(1, 63):
        low = (2 if bucket % 2 == 0 else 3) * 2 ** (4 + bucket // 2)
        assert (_core.bucket_of_latency(low - 1), _core.bucket_of_latency(low)) == (bucket - 1, bucket)
    assert _core.bucket_of_latency(0) == 0
    assert _core.bucket_of_latency(2**64 - 1) == 63


def test_tickets_travel_only_to_processes_that_are_being_started():
    counters = chain("a")
    with pytest.raises(FeatureUnavailableError, match="being started"):
        pickle.dumps(counters.ticket(0))
    counters.close()
    counters.close()
    with pytest.raises(InvalidArgumentError, match="closed"):
        counters.ticket(0)
    assert counters.look()["a"].items_in == 0


def open_descriptors():
    gc.collect()
    links = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
    return sum("dsline-counters" in link for link in links)


def count_until_killed(ticket, ready):
    writer = ticket.open()
    for sequence in range(1_000_000_000):
        writer.begin(sequence, 2)
        writer.add("seen")
        if sequence == 1000:
            ready.send(os.getpid())
        writer.end(1, 1)


@pytest.fixture(scope="module")
def tracker():
    multiprocessing.resource_tracker.ensure_running()  # it stays, with its pipe


@pytest.mark.usefixtures("tracker")
def test_a_killed_writer_leaves_whole_words_and_its_successor_goes_on():
    context = multiprocessing.get_context("spawn")
    counters = chain("a", workers=1)
    ours, theirs = context.Pipe(False)
    process = context.Process(target=count_until_killed, args=(counters.ticket(0), theirs))
    process.start()
    theirs.close()
    pid = ours.recv()
    seen = counters.look()
    for _ in range(200):  # of a page that is being written: nothing goes back
        now = counters.look(seen)
        for field in ("items_in", "rows_in", "rows_out", "max_ns"):
            assert getattr(now["a"], field) >= getattr(seen["a"], field)
        assert now["a"].counters["seen"] >= seen["a"].counters["seen"]
        state = counters.current(0)
        assert state.pid == pid
        assert state.sequence is None or state.sequence >= 1000
        assert -1e9 < time.monotonic_ns() - state.started_ns < 60e9
        seen = now
    os.kill(pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    dead = counters.look()["a"]
    # Killed between two of the words: they differ by that one item at most.
    assert dead.items_in - dead.items_out in (0, 1)
    assert dead.items_in * 2 - dead.rows_in in (0, 2)
    assert dead.counters["seen"] - dead.items_in in (0, 1)
    assert dead.restarts == 0
    again = counters.ticket(0).open()
    assert counters.current(0).sequence is None
    assert counters.current(0).pid == os.getpid()
    again.begin(5)
    again.add("seen")
    again.end()
    after = counters.look()["a"]
    assert after.restarts == 1
    assert after.items_in == dead.items_in + 1
    assert after.counters["seen"] == dead.counters["seen"] + 1
    ours.close()
    process.close()
    del again
    counters.close()
    del counters
    assert open_descriptors() == 0
