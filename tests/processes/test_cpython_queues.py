"""CPython's own tests of multiprocessing's queues, against dsline's: see `cpython_queues.py`, with its list of exceptions."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("cpython_queues.py")


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_the_tests_of_cpython_pass(start_method, tmp_path):
    if importlib.util.find_spec("test._test_multiprocessing") is None:
        pytest.skip("this interpreter has no `test` package")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), start_method],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
