"""dsline.bench: figures, checks, bad arguments, and a consumer that dies."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from dsline import bench

SEGMENTS = Path(f"/dev/shm/dsline-{os.geteuid()}")


def benchmark_segments():
    """Return the segments that benchmarks of this process have left."""
    return [path.name for path in SEGMENTS.glob(f"bench-{os.getpid()}-*")]


@pytest.fixture(autouse=True)
def no_segment_is_left():
    yield
    assert benchmark_segments() == []


def test_figures_of_a_result_agree_with_each_other():
    result = bench.shm(1000, 3000, latency_count=200)
    assert (result.message_size, result.count) == (1000, 3000)
    assert result.seconds > 0
    assert result.messages_per_second == pytest.approx(3000 / result.seconds)
    assert result.gigabytes_per_second == pytest.approx(3000 * 1000 / result.seconds / 1e9)
    assert result.ns_per_message == pytest.approx(result.seconds * 1e9 / 3000)
    trip = result.round_trip
    assert trip.count == 200
    assert 0 < trip.p50_us <= trip.p99_us <= trip.p999_us <= trip.max_us


@pytest.mark.parametrize("path", ["recv", "recv_array", "recv_bytes", "recv_into"])
@pytest.mark.parametrize("size", [1, 7, 8, 4096, 65536, 100_001])
def test_every_path_and_size_passes_its_own_check(path, size):
    result = bench.shm(size, 300, path=path, latency_count=10)
    assert result.data_path == bench.DATA_PATHS[path]
    assert result.payload == ("array" if path == "recv_array" else "bytes")


@pytest.mark.parametrize("path", ["recv", "recv_bytes", "recv_into"])
@pytest.mark.parametrize("size", [64, 65536])
def test_arrays_travel_every_path(path, size):
    assert bench.shm(size, 300, path=path, payload="array", latency_count=10).payload == "array"


@pytest.mark.parametrize("count", [1, 2, 256, 257, 258])
def test_counts_around_the_check_interval_all_arrive(count):
    assert bench.shm(16, count, latency_count=0).count == count


def test_one_slot_is_enough():
    assert bench.shm(64, 500, slots=1, latency_count=20).slots == 1


def test_to_dict_is_json_with_all_the_figures():
    result = bench.shm(64, 100, latency_count=5)
    again = json.loads(json.dumps(result.to_dict()))
    assert again["count"] == 100
    assert again["round_trip"]["count"] == 5
    assert again["environment"]["numpy"] == np.__version__


def test_no_latency_pass_means_no_round_trip():
    assert bench.shm(64, 100, latency_count=0).round_trip is None


def test_the_consumer_is_another_interpreter(monkeypatch):
    started = []
    popen = bench.subprocess.Popen

    def record(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(bench.subprocess, "Popen", record)
    bench.shm(64, 100, latency_count=0)
    (process,) = started
    assert process.args[0] == sys.executable
    assert process.pid != os.getpid()
    assert process.returncode == 0


def test_progress_rises_to_the_total():
    calls = []
    bench.shm(64, 2000, latency_count=100, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (2100, 2100)
    assert {total for _, total in calls} == {2100}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"message_size": 0}, ValueError, "message_size is 0"),
        ({"message_size": -1}, ValueError, "message_size is -1"),
        ({"message_size": (1 << 30) + 1}, ValueError, "message_size is 1073741825"),
        ({"message_size": 1.5}, TypeError, "message_size must be an integer, not float"),
        ({"message_size": True}, TypeError, "message_size must be an integer, not bool"),
        ({"count": 0}, ValueError, "count is 0"),
        ({"count": "9"}, TypeError, "count must be an integer, not str"),
        ({"slots": 0}, ValueError, "slots is 0"),
        ({"slots": (1 << 20) + 1}, ValueError, "slots is 1048577"),
        ({"latency_count": -1}, ValueError, "latency_count is -1"),
        ({"path": "recv_all"}, ValueError, "'recv_all'.*recv_bytes"),
        ({"path": "recv_array", "payload": "bytes"}, ValueError, "payload='array'"),
        ({"payload": "str"}, ValueError, "'str'.*array"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, error, words):
    with pytest.raises(error, match=words):
        bench.shm(**arguments)


def test_slots_that_fit_nowhere_are_a_clean_error():
    with pytest.raises((OSError, ValueError)):
        bench.shm(1 << 30, 1, slots=1 << 20)


def test_a_killed_consumer_is_reported_and_does_not_hang(monkeypatch):
    class Killed(bench._Consumer):
        def expect(self, event):
            report = super().expect(event)
            if event == "warm":
                self._process.kill()
            return report

    monkeypatch.setattr(bench, "_Consumer", Killed)
    with pytest.raises(RuntimeError, match="killed by SIGKILL"):
        bench.shm(64, 1_000_000)


def test_a_stopped_consumer_is_given_up(monkeypatch):
    class Stopped(bench._Consumer):
        def expect(self, event):
            report = super().expect(event)
            if event == "warm":
                self._process.send_signal(signal.SIGSTOP)
            return report

    monkeypatch.setattr(bench, "_Consumer", Stopped)
    monkeypatch.setattr(bench, "_STALL_S", 0.5)
    with pytest.raises(RuntimeError, match="no progress"):
        bench.shm(64, 1_000_000)


def test_an_error_in_the_consumer_reaches_the_caller(monkeypatch):
    class Misled(bench._Consumer):
        def __init__(self, spec):
            super().__init__({**spec, "there": "bench-there-is-no-such-channel"})

    monkeypatch.setattr(bench, "_Consumer", Misled)
    with pytest.raises(RuntimeError, match="ChannelNotFoundError"):
        bench.shm(64, 100)


def test_a_damaged_message_is_noticed(monkeypatch):
    # Only this process is patched: the consumer still expects the right numbers.
    monkeypatch.setattr(bench.Payloads, "head", lambda self, index: b"\xff" * min(8, self.size))
    with pytest.raises(RuntimeError, match="warm-up message 0 arrived damaged"):
        bench.shm(64, 100)


def test_a_message_that_was_left_out_is_noticed(monkeypatch):
    send_all = bench._send_all

    def leave_one_out(channel, messages, count, consumer, report):
        if report is not None:
            next(messages)
        send_all(channel, messages, count, consumer, report)

    monkeypatch.setattr(bench, "_send_all", leave_one_out)
    with pytest.raises(RuntimeError, match="damaged or out of order"):
        bench.shm(64, 1000)


def test_pinning_names_two_cpus_and_is_undone():
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        with pytest.raises(ValueError, match="pinning needs 2 CPUs"):
            bench.shm(64, 100, pin=True)
    else:
        result = bench.shm(64, 100, latency_count=0, pin=True)
        assert result.pinned_cpus == tuple(sorted(before)[:2])
    assert os.sched_getaffinity(0) == before


def test_pinning_on_one_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    with pytest.raises(ValueError, match="this process may run on 1 only"):
        bench.shm(64, 100, pin=True)


def test_percentiles_are_nearest_rank():
    trip = bench.RoundTrip.from_ns(range(1000, 1_001_000, 1000))
    assert (trip.count, trip.p50_us, trip.p99_us, trip.p999_us, trip.max_us) == (1000, 500, 990, 999, 1000)
    assert bench.RoundTrip.from_ns([7000]) == bench.RoundTrip(1, 7, 7, 7, 7)


@pytest.mark.parametrize("kind", ["bytes", "array"])
@pytest.mark.parametrize("size", [1, 5, 8, 9, 4096, 65536, 65537])
def test_payloads_prove_themselves(kind, size):
    messages = bench.Payloads(size, kind)
    stream = messages.stream()
    for index in range(20):
        message = next(stream)
        assert messages.has_head(message, index)
        assert messages.equals(message, index)
        assert not messages.has_head(message, index + 1)
        assert not messages.equals(message, index + 1)
        assert not messages.has_head(memoryview(message)[:-1], index)
    damaged = np.array(np.frombuffer(message, np.uint8))
    damaged[-1] ^= 1
    assert not messages.equals(damaged, 19)
