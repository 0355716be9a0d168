"""Unmodified programs on multiprocessing with ``import dsline.accelerate``: every start method, deaths, what stays."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import TIMEOUT, wait_until

PROGRAMS = Path(__file__).with_name("accelerated.py")
METHODS = ["fork", "spawn", "forkserver"]
STRICT = ["-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning"]


def start(function, *arguments):
    command = [sys.executable, *STRICT, str(PROGRAMS), function, json.dumps(arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)


def run(function, *arguments):
    program = start(function, *arguments)
    try:
        out, err = program.communicate(timeout=45)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)  # its children have its pipes
        out, err = program.communicate()
        raise AssertionError(f"it hangs: {err.decode()}") from None
    assert (program.returncode, err.decode()) == (0, ""), err.decode()
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "program",
    [
        "queues",
        "pipes",
        "process_arguments",
        "sender_ends_first",
        "pools",
        "executors",
        "generations",
        "a_worker_is_killed",
        "a_pool_is_terminated",
    ],
)
def test_programs_by_every_start_method(program, method):
    run(program, method)


@pytest.mark.parametrize(
    "program",
    [
        "the_store_is_full",
        "threads_and_forks",
        "outside_connections",
        "managers",
        "loaded_twice",
    ],
)
def test_programs(program):
    run(program)


def test_tensors_go_by_torchs_own_reducers():
    pytest.importorskip("torch")
    run("torch_tensors", "fork")


@pytest.mark.parametrize("backend", ["loky", "multiprocessing"])
def test_joblib_goes_by_its_own_picklers(backend):
    pytest.importorskip("joblib")
    run("joblib_parallel", backend)


def test_a_daemon_whose_first_process_has_ended(tmp_path):
    run("a_daemon", str(tmp_path / "result"))
    result = tmp_path / "result"
    wait_until(lambda: result.exists() and result.read_text())
    assert result.read_text() == "good"


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stores():
    """Processes that have a store of arrays open, by any name."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link).startswith("/memfd:dsline"):
                found.add((int(link.parts[2]), os.stat(link).st_ino))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("method", METHODS)
def test_nothing_stays_when_all_are_killed(method):
    """The memory is a memfd: it has no name, and goes with the last process that has it open."""
    names = sorted(os.listdir("/dev/shm"))
    program = start("wait_to_be_killed", method)
    try:
        line = program.stdout.readline()
        assert line, program.stderr.read().decode()
        pids = json.loads(line)
        inodes = {inode for pid, inode in stores() if pid in pids}
        assert inodes, "no process has a store"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(is_running(pid) for pid in pids))
        wait_until(lambda: not inodes & {inode for _, inode in stores()}, TIMEOUT)
    finally:
        program.kill()
        program.communicate()
    left = [name for name in os.listdir("/dev/shm") if name not in names and name.startswith("dsline")]
    assert left == []


def test_a_pickle_whose_processes_are_gone_says_so():
    program = start("print_pickle")
    try:
        pickled = bytes.fromhex(json.loads(program.stdout.readline()))
    finally:
        program.kill()
        program.communicate()
    script = (
        "import sys, dsline\n"
        "from multiprocessing.reduction import ForkingPickler\n"
        "try:\n    ForkingPickler.loads(bytes.fromhex(sys.argv[1]))\n"
        "except dsline.SerializationError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, *STRICT, "-c", script, pickled.hex()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "cannot be opened from here" in done.stdout
    assert f"process {program.pid}" in done.stdout
