"""The programs of examples/ do what they say, with small pictures in place of those that scikit-image ships."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PICTURES = """
import numpy as np

def __getattr__(name):
    rng = np.random.default_rng(len(name))
    return lambda: rng.integers(0, 256, (120 + 10 * len(name), 160, 3), dtype=np.uint8)
"""

FILTERS = """
import numpy as np

def sobel(picture):
    down, right = np.gradient(picture)
    return np.hypot(down, right)
"""


@pytest.fixture
def environment(tmp_path):
    """Variables with which `from skimage import data, filters` gives pictures and a filter."""
    package = tmp_path / "skimage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "data.py").write_text(PICTURES)
    (package / "filters.py").write_text(FILTERS)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def stations(tmp_path):
    """Variables with which `vega_datasets` has the two tables of the sensors example, of its form, with other numbers."""
    folder = tmp_path / "vega_datasets" / "_data"
    folder.mkdir(parents=True)
    (tmp_path / "vega_datasets" / "__init__.py").write_text("")
    rng = np.random.default_rng(5)
    hours = np.datetime64("2010-01-01T00") + np.arange(24 * 40)
    dates = [str(hour).replace("-", "/").replace("T", " ") + ":00" for hour in hours]
    for name, order, ending in (("seattle-temps", "date,temp", ""), ("sf-temps", "temp,date", ":00")):
        temperatures = 60 + 20 * np.sin(np.arange(len(hours)) / 24 * 2 * np.pi) + rng.normal(0, 4, len(hours))
        rows = [
            (f"{date}{ending}", f"{number:.1f}") for date, number in zip(dates, temperatures, strict=True)
        ]
        lines = [",".join(row if order.startswith("date") else row[::-1]) for row in rows]
        (folder / f"{name}.csv").write_text("\n".join([order, *lines, ""]))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


def run(script, *arguments, environment):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def test_images(environment):
    assert "all results are equal" in run(
        "images/images.py", "--frames", "21", "--rounds", "1", environment=environment
    )


@pytest.mark.parametrize("partitions", [1, 2])
def test_sensors(stations, partitions):
    """The windows of tables that arrive in pieces are those of pandas."""
    out = run("sensors/sensors.py", "--rows", "77", "--partitions", str(partitions), environment=stations)
    assert "1920 readings" in out and "days: 80 windows" in out
    assert int(re.search(r"warm spells: (\d+) windows", out)[1]) >= 20
    assert "all windows are equal to those of pandas" in out


def test_two_terminals(environment):
    """producer.py and consumer.py meet by name."""
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "images/consumer.py")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as consumer:
        try:
            run("images/producer.py", environment=environment)
            out, _ = consumer.communicate(timeout=max(1, start + 60 - time.monotonic()))
        finally:
            consumer.kill()
    assert [line.split()[0] for line in out.splitlines()] == ["astronaut", "coffee", "rocket", "retina"]


@pytest.mark.parametrize("max_deliveries", [1, 15])
def test_workers(environment, max_deliveries):
    """All pictures are processed, whether those of dead workers are revived or only delivered again."""
    out = run(
        *("workers/workers.py", "--seconds", "3", "--max-deliveries", str(max_deliveries)),
        environment=environment,
    )
    sent, processed = map(int, re.match(r"(\d+) pictures sent, (\d+) processed", out).groups())
    assert sent == processed > 20
    assert int(re.search(r"(\d+) workers killed", out)[1]) >= 3
    assert "0 pictures missing, 0 results differ" in out


@pytest.mark.parametrize("stopped", [0, 1], ids=["at once", "with all answers waiting"])
def test_workers_end_with_the_program(environment, stopped):
    """Killed itself, it leaves neither workers nor names."""
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "workers/workers.py"), "--seconds", "60"],
        env={**environment, "DSLINE_TEST_MARK": str(os.getpid())},
        start_new_session=True,
    ) as program:
        try:
            deadline = time.monotonic() + 30
            while len(marked()) < 5 and time.monotonic() < deadline:  # itself, the fork server, three workers
                time.sleep(0.05)
            assert len(marked()) >= 5
            if stopped:
                time.sleep(1)  # there are pictures in the queue
                program.send_signal(signal.SIGSTOP)
                time.sleep(stopped)  # its workers go on until the answers have filled their channel
        finally:
            program.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while marked() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert marked() == []


def test_video(environment, tmp_path):
    """No frame is lost, doubled or moved when a worker is killed, and the viewer slows nobody down."""
    pytest.importorskip("av")
    size = ("--frames", "90", "--height", "120", "--width", "160", "--pause", "0.02")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "video/video.py"), *size, "--keep", str(tmp_path)],
        capture_output=True, text=True, timeout=100, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"90 frames in .*; all equal to those of one process, in order", done.stdout)
    assert "workers killed: 1;" in done.stdout
    seen, missed = map(int, re.search(r"the viewer saw (\d+) frames and missed (\d+)", done.stdout).groups())
    assert 0 < seen <= 90
    assert seen + missed <= 90
    assert all(line.isprintable() for line in done.stderr.splitlines())  # progress in a log
    assert "edges: finished, 90" in done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["edges.npy", "film.mp4"]


def marked():
    """Processes that the program of the last test started."""
    mark = f"DSLINE_TEST_MARK={os.getpid()}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found
