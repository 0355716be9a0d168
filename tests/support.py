"""What several test modules need: deadlines, child programs, payloads that prove themselves."""

import json
import os
import select
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import numpy as np

TIMEOUT = 30.0
"""Seconds after which a wait has failed."""

STRICT = ("-X", "dev", "-W", "error")
"""Interpreter flags of child programs whose standard error must stay empty."""

CHILDREN = Path(__file__).parent / "processes" / "children.py"


def wait_until(condition, timeout=TIMEOUT):
    """Poll until `condition()` is true; return its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"still not so after {timeout} s: {condition}"
        time.sleep(0.002)


def run_script(source, *arguments, prefix=(), timeout=60, **options):
    """Run a program in an interpreter of its own, with warnings as errors."""
    command = [*prefix, sys.executable, *STRICT, "-c", source, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


def assert_clean(done):
    """The program ended well and had nothing to complain about."""
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


class Child:
    """A function of processes/children.py in an unrelated process; it reports by lines of JSON.

    As a context manager it kills the process that it started, if that still runs.
    """

    def __init__(self, function, *arguments):
        command = [sys.executable, *STRICT, str(CHILDREN), function, json.dumps(arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        self._pending = b""

    @property
    def pid(self):
        return self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()

    def read(self, timeout=TIMEOUT):
        """Return the next report."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._pending:
            readable, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            chunk = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            if not chunk:
                state = "has ended" if readable else f"said nothing for {timeout} s"
                self.kill()
                raise AssertionError(f"the child {state}: {self.process.stderr.read().decode()}")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def tell(self, word="go"):
        """Let a child that waits for a line go on."""
        self.process.stdin.write(word.encode() + b"\n")

    def finish(self, timeout=TIMEOUT):
        """Wait for a good end without complaints."""
        self.process.stdin.close()
        code = self.process.wait(timeout)
        assert (code, self.process.stderr.read().decode()) == (0, "")

    def kill(self):
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(TIMEOUT)


def forked(function, timeout=TIMEOUT):
    """Run `function` in a forked child; fail unless it returns."""
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    reap(pid, timeout)


def reap(pid, timeout=TIMEOUT):
    """Wait for a forked child; fail unless it ended well. Kills it when it takes too long."""
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise AssertionError(f"the forked child did not end within {timeout} s")
        time.sleep(0.002)


def proof(producer, number, words=16):
    """An array that says who sent it as which message, and proves that it arrived whole."""
    array = np.arange(number, number + words, dtype=np.uint32)
    array[0] = producer
    array[1] = number
    array[-1] = zlib.crc32(array[:-1].tobytes())
    return array


def check_proof(data):
    """Return producer and number of a `proof`; fail if it is damaged."""
    array = np.asarray(data)
    assert array.dtype == np.uint32
    assert array[-1] == zlib.crc32(array[:-1].tobytes()), "a torn message"
    assert (array[2:-1] == np.arange(array[1] + 2, array[1] + len(array) - 1, dtype=np.uint32)).all()
    return int(array[0]), int(array[1])
