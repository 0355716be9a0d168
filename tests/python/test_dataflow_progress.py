"""What run(progress=...) shows, on a terminal, in a log file and to a function, and that nothing of it stops the run."""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import pty
import re
import select
import struct
import termios
import threading

import pytest

from dsline.dataflow import progress
from dsline.dataflow.counters import EdgeStats, PipelineStats, StageStats
from dsline.dataflow.progress import Progress, summary
from dsline.errors import InvalidArgumentError


class Fake:
    """A pipeline that gets on by ten items at each look."""

    def __init__(self, total=100, name="detect"):
        self.looks = 0
        self.total = total
        self.name = name
        self.looked = threading.Condition()

    def __call__(self):
        with self.looked:
            self.looks += 1
            self.looked.notify_all()
        done = min(10 * self.looks, self.total or 10**9)
        stages = (
            StageStats("read", "source", items_out=done, rate_out=50.0, busy=0.1),
            StageStats("canny", "map", 1, 2, 2, busy=0.97, errors=3, restarts=1, dead_letters=2),
            StageStats("write", "sink", 2, items_in=done - 5, busy=0.2),
        )
        edges = (EdgeStats("read", "canny", 6, 8, done, 4), EdgeStats("canny", "write", 1, 8, done))
        return PipelineStats(self.name, "running", 2.0, 0.2, stages, edges, self.total)

    def wait(self, looks):
        with self.looked:
            assert self.looked.wait_for(lambda: self.looks >= looks, 30)


NOTES = "slowest canny 97%, queues up to 75%, errors 3, dropped 4, dead letters 2, restarts 1"


def test_one_line():
    fake = Fake()
    assert summary(fake()) == f"detect: running, 10 of 100 items in 2.0 s (5/s); {NOTES}"
    empty = PipelineStats("x", "done", 0.0, 0.0, ())
    assert summary(empty) == "x: done, 0 items in 0.0 s (0/s)"


def test_a_function_gets_the_figures_and_the_last_ones():
    fake, seen = Fake(), []
    with Progress(fake, seen.append, every=0.001):
        fake.wait(5)
    assert len(seen) == fake.looks >= 5
    assert [stats.items_in for stats in seen] == [min(10 * look, 100) for look in range(1, len(seen) + 1)]
    assert all(isinstance(stats, PipelineStats) for stats in seen)


def test_a_log_gets_few_lines_without_control_characters(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    fake, log = Fake(), io.StringIO()
    with Progress(fake, True, every=0.0001, file=log):
        fake.wait(200)
    lines = log.getvalue().splitlines()
    assert 2 <= len(lines) <= fake.looks
    assert all(line.isprintable() for line in lines)
    assert lines[0] == f"detect: running, 10 of 100 items in 2.0 s (5/s); {NOTES}"
    assert lines[-1].startswith("detect: running, 100 of 100 items")


def test_a_log_of_a_short_run_has_one_line():
    fake, log = Fake(), io.StringIO()
    with Progress(fake, True, every=0.001, file=log):
        fake.wait(20)
    assert len(log.getvalue().splitlines()) == 1


def test_names_cannot_write_control_characters():
    fake = Fake(name="a\x1b[31m\nb\r")
    assert summary(fake()).startswith("a?[31m?b?: running")


def test_lines_become_rarer(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    log = io.StringIO()
    lines, fake, times = progress._Lines(log), Fake(total=None), []
    for tick in range(5 * 86400):  # a day in looks of 0.2 s
        clock[0] = tick * 0.2
        before = lines._next
        if clock[0] >= before:
            times.append(clock[0])
            lines.update(fake())
    assert times[0] == 5.0
    gaps = [late - early for early, late in itertools.pairwise(times)]
    assert all(late >= early - 0.3 for early, late in itertools.pairwise(gaps))
    assert 100 < len(times) < 250
    assert len(log.getvalue().splitlines()) == len(times)


def drawn_on_terminal(fake, looks):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 40, 160, 0, 0))
    try:
        with open(slave, "w") as terminal:
            with Progress(fake, True, every=0.001, file=terminal):
                fake.wait(looks)
            text = b""
            while select.select([master], [], [], 0.1)[0]:
                text += os.read(master, 65536)
    finally:
        os.close(master)
    return re.sub(r"\x1b\[\w", "", text.decode()).replace("\r\n", "\r").split("\r")


def test_a_terminal_gets_a_bar_with_the_slowest_stage():
    frames = drawn_on_terminal(Fake(), 12)
    last = [frame for frame in frames if frame.strip()][-1]
    assert last.startswith("detect: 100%|")
    assert "100/100" in last
    assert "slowest canny 97%" in "".join(frames)


def test_a_bar_without_a_total():
    frames = drawn_on_terminal(Fake(total=None), 5)
    last = [frame for frame in frames if frame.strip()][-1]
    assert re.match(r"detect: [\d.]+k? items \[", last)


def test_what_goes_wrong_is_said_once_and_stops_nothing():
    log = io.StringIO()

    def fails(stats):
        raise RuntimeError("no screen")

    fake = Fake()
    with Progress(fake, fails, every=0.001, file=log):
        fake.wait(1)
    text = log.getvalue()
    assert text.count("RuntimeError: no screen") == 1
    assert text.startswith("dsline: progress is not shown any more")

    closed = io.StringIO()
    closed.close()
    for show in (True, fails):
        with Progress(fake, show, every=0.001, file=closed):
            pass


def test_nothing_is_shown_without_progress():
    threads = threading.active_count()
    fake = Fake()
    with Progress(fake, False) as shown:
        assert threading.active_count() == threads
        shown.close()
    assert fake.looks == 0
    for wrong in (None, 1, "yes"):
        with pytest.raises(InvalidArgumentError, match="progress="):
            Progress(fake, wrong)
    with Progress(fake, print, file=io.StringIO()) as shown:
        shown.close()
        shown.close()
    assert threading.active_count() == threads
