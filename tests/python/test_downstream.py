"""An extension of someone else's, built by setuptools against the installed package, sends from nogil code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "downstream"

PROGRAM = """
import queue, struct, sys
import dsline, sender

with dsline.ShmChannel(storage="heap", capacity=8, slot_size=64) as channel:
    assert sender.send_counters(channel, 8) == 8
    assert [struct.unpack("<Q", channel.recv_bytes(timeout=0))[0] for _ in range(8)] == list(range(8))
    assert sender.send_counters(channel, 8) == 8
    try:
        sender.send_counters(channel, 1, 1_000_000)
    except queue.Full as error:
        print(type(error).__name__, error)
    else:
        sys.exit("a full channel took one more")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downstream")
    for name in ("setup.py", "sender.pyx"):
        shutil.copy2(SOURCE / name, folder / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_sends_without_the_gil(built):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        cwd=built,
        env={**os.environ, "PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BufferFullError")


def test_it_links_nothing_of_dsline(built):
    """The module works with whatever dsline is installed when it runs: it holds no copy of the core."""
    (module,) = built.glob("sender*.so")
    assert b"/dev/shm" not in module.read_bytes()
