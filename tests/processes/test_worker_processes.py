"""Worker processes: how they start, what they inherit, how they end with their parent, and what is told of their death."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import worker_functions
from support import STRICT, TIMEOUT, assert_clean, forked, run_script, wait_until

from dsline.dataflow import processes
from dsline.dataflow.processes import STDERR_TAIL_BYTES, WorkerProcess, choose_cpus
from dsline.errors import PipelineBuildError, PipelineRuntimeError

METHODS = ["spawn", "forkserver"]


@pytest.fixture(scope="module", autouse=True)
def helpers():
    """The helper processes live as long as pytest: their pipes are nobody's leak."""
    multiprocessing.resource_tracker.ensure_running()
    processes._fork_server(os.environ)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def gone(pid):
    """Whether a process has ended, waited for or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return state.rpartition(")")[2].split()[0] == "Z"


def receive(connection):
    assert connection.poll(TIMEOUT)
    return connection.recv()


# --- starting -----------------------------------------------------------------------------------------------------------


def test_anonymous_channels_are_arguments(method):
    with (
        worker_functions.anonymous() as there,
        worker_functions.anonymous() as back,
        WorkerProcess(worker_functions.echo, (there, back), name="echo", start_method=method) as worker,
    ):
        there.send(b"hello")
        assert back.recv_bytes(timeout=TIMEOUT) == b"HELLO"
        assert worker.alive and worker.started and worker.cause_of_death is None and worker.failure is None
        assert f"pid={worker.pid} running" in repr(worker)
        there.shutdown()
        assert worker.join(TIMEOUT)
        assert (worker.exitcode, worker.cause_of_death) == (0, "exit code 0")


def test_nothing_is_left_open(method):
    for _ in range(2):  # the first one starts what stays
        before = worker_functions.descriptors()
        threads = threading.active_count()
        with WorkerProcess(worker_functions.sleep, start_method=method) as worker:
            assert worker.wait_started(TIMEOUT)
            pid = worker.pid
        worker.close()
    assert gone(pid)
    assert worker_functions.descriptors() == before
    assert threading.active_count() == threads


def test_surroundings(method):
    cpu = max(os.sched_getaffinity(0))
    with WorkerProcess(
        worker_functions.surroundings, start_method=method, cpus=[cpu], threads=2, env={"MINE": "yes"}
    ) as worker:
        found = receive(worker.connection)
        assert (found["threads"] <= {1, 2} and 2 in found["threads"]) or len(os.sched_getaffinity(0)) < 2
        assert found == {
            "cpus": [cpu],
            "threads": found["threads"],
            "OMP_NUM_THREADS": "2",
            "MINE": "yes",
            "main": None,
            "sigint": True,
            "blocked": [],
        }
    assert os.environ.get("MINE") is None


def test_one_inner_thread_is_the_default(method):
    with WorkerProcess(worker_functions.surroundings, start_method=method) as worker:
        found = receive(worker.connection)
        assert (found["OMP_NUM_THREADS"], found["threads"]) == ("1", {1})
        assert found["cpus"] == sorted(os.sched_getaffinity(0))


def test_threads_none_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with WorkerProcess(worker_functions.surroundings, threads=None) as worker:
        assert receive(worker.connection)["OMP_NUM_THREADS"] == "3"


def test_the_starting_thread_keeps_its_cpus_and_signals():
    before = os.sched_getaffinity(0), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with WorkerProcess(worker_functions.surroundings, cpus=[max(before[0])]):
        assert (os.sched_getaffinity(0), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == before


def test_choose_cpus():
    usable = sorted(os.sched_getaffinity(0))
    assert choose_cpus(None, 3) is None
    assert [choose_cpus("spread", i) for i in range(len(usable) + 1)] == [[c] for c in [*usable, usable[0]]]
    assert choose_cpus([usable[0], usable[0]], 0) == [usable[0]]
    for wrong in ([], [usable[-1] + 1000], "all"):
        with pytest.raises(PipelineBuildError, match="cpus is"):
            choose_cpus(wrong, 0)


@pytest.mark.parametrize(
    "options", [{"start_method": "fork"}, {"threads": 0}, {"threads": True}, {"cpus": [10**6]}]
)
def test_wrong_options(options):
    before = worker_functions.descriptors()
    with pytest.raises(PipelineBuildError, match=next(iter(options))):
        WorkerProcess(worker_functions.sleep, **options)
    assert worker_functions.descriptors() == before


def test_arguments_that_cannot_be_pickled(method):
    before = worker_functions.descriptors()
    with pytest.raises(PipelineBuildError, match="lock"):
        WorkerProcess(worker_functions.tell, (threading.Lock(),), start_method=method)
    assert worker_functions.descriptors() == before


def test_unpickling_that_fails_in_the_worker(method):
    broken = worker_functions.Unloadable(ImportError("no such thing"))
    with WorkerProcess(worker_functions.tell, (broken,), name="stage 'x'", start_method=method) as worker:
        with pytest.raises(PipelineRuntimeError, match="no such thing") as caught:
            worker.wait_started(TIMEOUT)
        text = str(caught.value)
        assert text.startswith("stage 'x' failed to start: ImportError: no such thing\n")
        assert "Traceback" in text and "in _raise" in text
        assert worker.join(TIMEOUT) and not worker.started
        assert worker.cause_of_death == "ImportError: no such thing"


def test_a_process_that_ends_before_it_has_begun():
    with (
        WorkerProcess(worker_functions.tell, env={"PYTHONHOME": "/nowhere"}) as worker,
        pytest.raises(PipelineRuntimeError, match=r"failed to start: exit code 1\n[\s\S]*encodings"),
    ):
        worker.wait_started(TIMEOUT)


def test_waiting_for_the_start_has_a_limit():
    with WorkerProcess(worker_functions.sleep) as worker:
        worker.send_signal(signal.SIGSTOP)
        assert worker.wait_started(0.05) is False
        worker.send_signal(signal.SIGCONT)
        assert worker.wait_started(TIMEOUT)


# --- ends ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "arguments", "code", "cause"),
    [
        (worker_functions.leave, (3,), 3, "exit code 3"),
        (worker_functions.fail, (MemoryError(),), 1, "MemoryError"),
        (worker_functions.fail, (ValueError("no"),), 1, "ValueError: no"),
        (worker_functions.fail, (SystemExit(4),), 4, "exit code 4"),
    ],
)
def test_cause_of_death(method, target, arguments, code, cause):
    with WorkerProcess(target, arguments, start_method=method) as worker:
        assert worker.join(TIMEOUT)
        assert (worker.exitcode, worker.cause_of_death) == (code, cause)
        assert (worker.failure is not None) == (code == 1)
        if code == 1:
            assert "in fail" in worker.failure
            assert "in fail" in worker.stderr_tail


@pytest.mark.parametrize(
    "function", [worker_functions.compute, worker_functions.sleep, worker_functions.ignore]
)
def test_killed(method, function):
    with WorkerProcess(function, start_method=method) as worker:
        receive(worker.connection)
        worker.kill()
        assert (worker.exitcode, worker.cause_of_death) == (-9, "killed by signal 9 (SIGKILL)")
        worker.kill()  # nothing happens


def test_terminate_escalates(method):
    with WorkerProcess(worker_functions.sleep, start_method=method) as worker:
        receive(worker.connection)
        worker.terminate(patience=TIMEOUT)
        assert worker.cause_of_death == "killed by signal 15 (SIGTERM)"
    with WorkerProcess(worker_functions.ignore, start_method=method) as worker:
        receive(worker.connection)
        worker.terminate(patience=0.05)
        assert worker.cause_of_death == "killed by signal 9 (SIGKILL)"


def test_the_sentinel_does_not_wait_for_the_workers_own_children(method):
    with WorkerProcess(worker_functions.with_child, start_method=method) as worker:
        child = receive(worker.connection)
        try:
            if method == "spawn":  # the server's pipe is held by grandchildren, as multiprocessing made it
                assert worker.join(TIMEOUT)
                assert worker.exitcode == 0
                assert not gone(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_ctrl_c_is_the_parents_business(method):
    with WorkerProcess(worker_functions.interrupt, start_method=method) as worker:
        assert receive(worker.connection) == "still here"


def test_the_end_of_stderr_is_kept_and_all_of_it_passed_on(method, capfd):
    size = 3 * STDERR_TAIL_BYTES
    with WorkerProcess(worker_functions.complain, (size,), start_method=method) as worker:
        assert worker.join(TIMEOUT)
        tail = worker.stderr_tail
    assert len(tail) == STDERR_TAIL_BYTES and tail.endswith("x\nthe end\n")
    assert worker.stderr_tail == tail
    passed = capfd.readouterr().err
    assert passed.endswith(tail)
    assert [int(line[:9]) for line in passed.splitlines()[:-1]] == list(range(0, size, 1000))


# --- the parent's end ---------------------------------------------------------------------------------------------------

PARENT = """
import os, sys, threading, time
sys.path.insert(0, {folder!r})
import worker_functions
from dsline.dataflow.processes import WorkerProcess

channel = worker_functions.anonymous()
arguments = {{"receive": (channel,)}}
targets = [worker_functions.compute, worker_functions.sleep, worker_functions.stop, worker_functions.receive]

def start():  # in a thread that ends long before the workers
    global workers
    workers = [WorkerProcess(t, arguments.get(t.__name__, ()), start_method={method!r}) for t in targets]

thread = threading.Thread(target=start)
thread.start()
thread.join()
print(*(worker.connection.recv() for worker in workers), flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["time.sleep(1000)", "os._exit(0)", "sys.exit(0)", "raise KeyError(1)"])
def test_no_orphans(method, end):
    source = PARENT.format(folder=str(Path(__file__).parent), method=method, end=end)
    parent = subprocess.Popen(
        [sys.executable, *STRICT, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 4
        if "sleep" in end:
            assert not any(gone(pid) for pid in pids)
            parent.kill()
        parent.wait(TIMEOUT)
        wait_until(lambda: all(gone(pid) for pid in pids))


def test_a_forked_child_of_the_parent_does_not_keep_workers_alive():
    source = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import worker_functions
from dsline.dataflow.processes import WorkerProcess
worker = WorkerProcess(worker_functions.sleep)
pid = worker.connection.recv()
child = os.fork()
if child == 0:
    time.sleep(1000)
print(pid, child, flush=True)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", source, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        pid, child = map(int, parent.stdout.readline().split())
        parent.wait(TIMEOUT)
    try:
        wait_until(lambda: gone(pid))
        assert not gone(child)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_leaves_the_workers_alone():
    with WorkerProcess(worker_functions.sleep) as worker:
        receive(worker.connection)
        forked(worker.close)
        assert worker.alive


# --- the main program ---------------------------------------------------------------------------------------------------

SCRIPT = """
import dataclasses
import dsline, worker_functions_of_main
from dsline.dataflow import callables
from dsline.dataflow.processes import WorkerProcess

@dataclasses.dataclass
class Point:
    x: int

def shift(point, by=1):
    assert isinstance(point, Point)
    return Point(point.x + by)

there, back = dsline.ShmChannel(capacity=4), dsline.ShmChannel(capacity=4)
with WorkerProcess(
    worker_functions_of_main.apply, (there, back, callables.pack(shift)), start_method="METHOD"
) as worker:
    there.send_object(Point(1))
    assert back.recv_object(timeout=30) == Point(2)
    there.shutdown()
    assert worker.join(30) and worker.exitcode == 0
print("done")
"""

APPLY = """
from dsline.dataflow import callables
from dsline.errors import ChannelClosedError

def apply(connection, there, back, packed):
    function = callables.unpack(packed)
    try:
        while True:
            back.send_object(function(there.recv_object()))
    except ChannelClosedError:
        pass
"""


def test_a_script_without_guard(tmp_path, method):
    (tmp_path / "worker_functions_of_main.py").write_text(APPLY)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("METHOD", method))
    done = subprocess.run(
        [sys.executable, *STRICT, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert_clean(done)
    assert done.stdout == "done\n"


def test_multiprocessings_own_start_without_guard(tmp_path):
    """The main program is imported by a child of multiprocessing and starts a worker there: one clear error."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import multiprocessing, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import worker_functions
            from dsline.dataflow.processes import WorkerProcess
            with WorkerProcess(worker_functions.surroundings):
                pass
            if __name__ == "__main__":
                process = multiprocessing.get_context("spawn").Process(target=print)
                process.start()
                process.join()
                sys.exit(process.exitcode)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "PipelineRuntimeError: worker cannot be started" in done.stderr
    assert 'if __name__ == "__main__":' in done.stderr


def test_daemonic_processes_may_have_workers(tmp_path):
    source = f"""
import multiprocessing, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import worker_functions
multiprocessing.current_process()._config["daemon"] = True
from dsline.dataflow.processes import WorkerProcess
with WorkerProcess(worker_functions.surroundings) as worker:
    print(worker.connection.recv()["sigint"])
"""
    done = run_script(source)
    assert_clean(done)
    assert done.stdout == "True\n"


def test_workers_may_have_processes_of_multiprocessing(method):
    with WorkerProcess(worker_functions.with_pool, start_method=method) as worker:
        assert receive(worker.connection) == [1, 4, 9]
        assert worker.join(TIMEOUT) and worker.exitcode == 0


def test_no_thread_to_be_had(method, monkeypatch):
    """As at the end of an interpreter: nothing is left of the worker."""

    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    before = worker_functions.descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            WorkerProcess(worker_functions.sleep, start_method=method)
    assert worker_functions.descriptors() == before
