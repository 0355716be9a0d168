"""Worker processes: how they start, what they inherit, how they end, and what is known of their death.

Never by fork: a worker begins as a new interpreter, or as a child of a server process that has done nothing but import.
The parent's main program is not imported by a worker. Its functions come by value (`callables.pack`), its classes too.

A worker ends when its parent does, however that ended: the kernel sends SIGKILL when the last writer of a pipe is gone.
Unlike PR_SET_PDEATHSIG this neither depends on the thread that started the worker nor on who its parent is.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import fcntl
import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.popen_fork
import multiprocessing.process
import multiprocessing.reduction
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import set_spawning_popen
from typing import Any, Final, Self, TypeAlias

import threadpoolctl

from dsline.closing import Closing
from dsline.dataflow import callables
from dsline.dataflow.restart import Restart, RestartBudget
from dsline.errors import PipelineBuildError, PipelineRuntimeError

__all__ = ["START_METHODS", "Cpus", "Restart", "RestartBudget", "WorkerProcess", "choose_cpus"]

START_METHODS: Final = ("spawn", "forkserver")
STDERR_TAIL_BYTES: Final = 64 << 10
THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)

_F_SETSIG: Final = getattr(fcntl, "F_SETSIG", 10)  # Linux; Python does not name it before 3.14
_TERMINATE_PATIENCE: Final = 2.0  # seconds between SIGTERM and SIGKILL

Cpus: TypeAlias = str | Sequence[int] | None
Target: TypeAlias = Callable[..., None]


def choose_cpus(cpus: Cpus, index: int) -> list[int] | None:
    """Return the CPUs for a worker, or None for those of this process.

    Parameters
    ----------
    cpus : None, "spread" or sequence of int
        "spread": each worker has one CPU of its own, as far as there are enough.
    index : int
        Number of the worker, from 0.

    Raises
    ------
    PipelineBuildError
        A CPU that this process may not use.
    """
    if cpus is None:
        return None
    usable = sorted(os.sched_getaffinity(0))
    if cpus == "spread":
        return [usable[index % len(usable)]]
    if isinstance(cpus, str):
        raise PipelineBuildError(f"cpus is {cpus!r}, must be None, 'spread' or a list of CPU numbers")
    wanted = sorted(set(cpus))
    if not wanted or not set(wanted) <= set(usable):
        raise PipelineBuildError(f"cpus is {list(cpus)}, and this process may use {usable}")
    return wanted


# --- starting -----------------------------------------------------------------------------------------------------------


class _Process(multiprocessing.process.BaseProcess):
    """What multiprocessing unpickles and runs in the new process. Never started by its own `start`: no list of children
    holds it, nothing waits for it at exit, and daemonic processes may have it."""

    _start_method = None  # of the worker's own children: the one that the parent has set

    def __init__(self, name: str, setup: _Setup, payload: _Payload) -> None:
        super().__init__(name=name, daemon=False)
        self._setup = setup
        self._payload = payload

    def run(self) -> None:
        _run_worker(self._setup, self._payload)


class _Setup:
    """Plain values and pipes: unpickling them in the worker cannot fail."""

    def __init__(
        self,
        alive: Connection,
        words: Connection,
        stderr: Connection | None,
        cpus: list[int] | None,
        threads: int | None,
        environment: dict[str, str],
        main_classes: dict[str, bytes],
    ) -> None:
        self.alive = alive
        self.words = words
        self.stderr = stderr
        self.cpus = cpus
        self.threads = threads
        self.environment = environment
        self.main_classes = main_classes


class _Payload:
    """Target and arguments, pickled while the process is being started, and unpickled where errors can be reported."""

    def __init__(self, *values: Any) -> None:
        self._values: Any = values

    def __reduce__(self) -> Any:
        return _Payload._from_pickle, (
            bytes(multiprocessing.reduction.ForkingPickler.dumps(self._values, 5)),
        )

    @classmethod
    def _from_pickle(cls, pickled: bytes) -> Self:
        made = cls()
        made._values = pickled
        return made

    def load(self) -> Any:
        return callables.unpack(self._values)


def _pickled(popen: Any, process: _Process) -> memoryview:
    """What the new interpreter reads: how to prepare itself, without the main program, and the process."""
    preparation = multiprocessing.spawn.get_preparation_data(process.name)
    for key in ("init_main_from_name", "init_main_from_path"):
        preparation.pop(key, None)
    stream = io.BytesIO()
    set_spawning_popen(popen)
    try:
        multiprocessing.reduction.dump(preparation, stream)
        multiprocessing.reduction.dump(process, stream)
    finally:
        set_spawning_popen(None)
    return memoryview(stream.getvalue())


def _write_all(fd: int, data: memoryview) -> None:
    # A process that dies before it has read everything is found by its end.
    with contextlib.suppress(BrokenPipeError), open(fd, "wb", closefd=False) as file:
        file.write(data)


class _Popen(multiprocessing.popen_fork.Popen):
    """One started process. `_fds` are the descriptors that go to it."""

    pid: int
    sentinel: int

    def __init__(
        self, process: _Process, environment: dict[str, str], cpus: list[int] | None, stderr: int
    ) -> None:
        self._fds: list[int] = []
        self._environment = environment
        self._cpus = cpus
        self._stderr = stderr
        self._kept: list[int] = []
        super().__init__(process)

    def release(self) -> None:
        """Close what is left of a process that has ended."""
        for fd in self._kept:
            os.close(fd)
        self._kept.clear()


class _InheritedFd:
    """A descriptor that keeps its number in the new process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> int:
        return self.fd


class _SpawnPopen(_Popen):
    method = "spawn"
    DupFd = _InheritedFd

    def duplicate_for_child(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _launch(self, process: _Process) -> None:
        tracker = multiprocessing.resource_tracker.getfd()
        data = _pickled(self, process)
        readable, writable = os.pipe()
        try:
            command = multiprocessing.spawn.get_command_line(tracker_fd=tracker, pipe_handle=readable)
            with _calling_thread(self._cpus):
                self._child = subprocess.Popen(
                    command,
                    executable=multiprocessing.spawn.get_executable(),
                    env=self._environment,
                    pass_fds=[*self._fds, *([] if tracker is None else [tracker]), readable],
                    stderr=self._stderr,
                )
        except BaseException:
            os.close(writable)
            raise
        finally:
            os.close(readable)
        self.pid = self._child.pid
        # Not the other end of a pipe, which the worker's own children would hold.
        self.sentinel = os.pidfd_open(self.pid)
        self._kept = [writable, self.sentinel]
        _write_all(writable, data)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            self.returncode = self._child.poll() if flag == os.WNOHANG else self._child.wait()
        return self.returncode

    def _send_signal(self, number: int) -> None:
        self._child.send_signal(number)


class _ForkServerFd:
    """A descriptor that the server hands on, by its place in the list."""

    def __init__(self, index: int) -> None:
        self.index = index

    def detach(self) -> int:
        inherited: Any = multiprocessing.forkserver.get_inherited_fds()
        fd: int = inherited[self.index]
        return fd


class _ForkServerPopen(_Popen):
    method = "forkserver"
    DupFd = _ForkServerFd

    def duplicate_for_child(self, fd: int) -> int:
        self._fds.append(fd)
        return len(self._fds) - 1

    def _launch(self, process: _Process) -> None:
        server = _fork_server(self._environment)
        data = _pickled(self, process)
        self.sentinel, writable = server.connect_to_new_process(self._fds)
        self._kept = [writable, self.sentinel]
        _write_all(writable, data)
        try:
            self.pid = multiprocessing.forkserver.read_signed(self.sentinel)
        except BaseException:
            self.release()
            raise

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            timeout = 0 if flag == os.WNOHANG else None
            if not multiprocessing.connection.wait([self.sentinel], timeout):
                return None
            try:
                self.returncode = multiprocessing.forkserver.read_signed(self.sentinel)
            except (OSError, EOFError):
                self.returncode = 255  # the server is gone, and nobody knows
        return self.returncode

    def _send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


_server_lock = threading.Lock()
_server: Any = None


def _fork_server(environment: Mapping[str, str]) -> Any:
    """The server of this module: others of this process may have been started with other modules preloaded."""
    global _server
    with _server_lock:
        if _server is None:
            made = multiprocessing.forkserver.ForkServer()
            made.set_forkserver_preload(["numpy", "dsline.dataflow.worker"])
            _server = made
        # The server loads NumPy: libraries read the number of threads then.
        before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
        try:
            os.environ.update({name: environment[name] for name in THREAD_VARIABLES if name in environment})
            _server.ensure_running()
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        return _server


@contextlib.contextmanager
def _calling_thread(cpus: list[int] | None) -> Any:
    """What this thread starts runs on these CPUs from its first instruction on, and does not take Ctrl-C before it can
    say what to do about it."""
    before = os.sched_getaffinity(0)
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        if cpus is not None:
            os.sched_setaffinity(0, cpus)
        yield
    finally:
        if cpus is not None:
            os.sched_setaffinity(0, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


# --- in the worker ------------------------------------------------------------------------------------------------------


def _run_worker(setup: _Setup, payload: _Payload) -> None:
    _end_with_parent(setup.alive)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if setup.stderr is not None:  # the server's child: it has the server's surroundings
        os.dup2(setup.stderr.fileno(), 2)
        setup.stderr.close()
        os.environ.clear()
        os.environ.update(setup.environment)
        if setup.cpus is not None:
            os.sched_setaffinity(0, setup.cpus)
    with contextlib.suppress(ValueError, OSError, AttributeError, io.UnsupportedOperation):
        faulthandler.enable()
    started = False
    try:
        callables.serve_main_classes(setup.main_classes)
        target, args = payload.load()
        if (
            setup.threads is not None
        ):  # for libraries that the environment does not reach, or that were loaded before
            threadpoolctl.threadpool_limits(setup.threads)
        setup.words.send(("ready", "", ""))
        started = True
        target(*args)
    except SystemExit:
        raise
    except BaseException as error:
        # Its first line says why this process is gone; the traceback also goes where it always does.
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        trace = traceback.format_exc()
        with contextlib.suppress(OSError):
            setup.words.send(("died" if started else "failed", text, trace))
        if started:
            sys.stderr.write(trace)
        raise SystemExit(1) from None


def _end_with_parent(alive: Connection) -> None:
    """Let the kernel kill this process when no writer of the pipe is left, whatever the process is doing then."""
    fd = alive.fileno()
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    # The parent may have died before, and kernels that send no such signal are watched by hand.
    threading.Thread(target=_watch_parent, args=(alive,), name="dsline-parent", daemon=True).start()


def _watch_parent(alive: Connection) -> None:
    poll = select.poll()
    poll.register(alive.fileno(), select.POLLIN | select.POLLHUP)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


# --- in the parent ------------------------------------------------------------------------------------------------------


class _StderrTail:
    """Passes a worker's standard error on to this process's, and keeps the end of it."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._chunks: deque[bytes] = deque()
        self._kept = 0
        self._ended = False
        self._stop_read, self._stop_write = os.pipe()
        os.set_blocking(fd, False)
        self._thread = threading.Thread(target=self._pump, name=f"{name}-stderr", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._close_descriptors()
            raise

    def _close_descriptors(self) -> None:
        with self._lock:
            self._ended = True
            for fd in (self._fd, self._stop_read, self._stop_write):
                os.close(fd)
            self._fd = -1

    def _pump(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        while not self._ended:
            if any(fd == self._stop_read for fd, _ in poll.poll()):
                return
            self._drain()

    def _drain(self) -> None:
        with self._lock:
            while not self._ended:
                try:
                    data = os.read(self._fd, 1 << 16)
                except BlockingIOError:
                    return
                if not data:
                    self._ended = True
                    return
                with contextlib.suppress(OSError):
                    os.write(2, data)
                self._chunks.append(data)
                self._kept += len(data)
                while self._kept - len(self._chunks[0]) >= STDERR_TAIL_BYTES:
                    self._kept -= len(self._chunks.popleft())

    def text(self) -> str:
        """Return what it wrote last, up to now."""
        if self._fd >= 0:
            self._drain()
        with self._lock:
            return b"".join(self._chunks)[-STDERR_TAIL_BYTES:].decode(errors="replace")

    def close(self) -> None:
        self._drain()
        os.write(self._stop_write, b"x")
        self._thread.join()
        self._close_descriptors()


_open_processes: set[WorkerProcess] = set()


class WorkerProcess(Closing):
    """One worker process, started by the constructor.

    Parameters
    ----------
    target : callable
        A function of a module that can be imported. Called with a connection to this process and `args`.
    args : sequence
        Whatever can be pickled while a process is being started: anonymous channels, too. Functions of the user come
        packed (`callables.pack`).
    name : str
        For errors, and of the process.
    start_method : str
        "spawn", a new interpreter (0.2 s), or "forkserver", a child of a server that has imported NumPy and dsline.
    cpus : list of int, optional
        Where it may run, see `choose_cpus`.
    threads : int or None
        How many threads BLAS, OpenMP, numexpr and numba use inside of the worker; None: as they like.
    env : mapping, optional
        Environment variables besides those of this process.

    Attributes
    ----------
    connection : Connection
        The other end of what `target` got. For small messages: neither end may rely on the other one reading.
    pid : int
    sentinel : int
        A descriptor that is readable when the process has ended (`multiprocessing.connection.wait`).

    Raises
    ------
    PipelineBuildError
        An argument cannot be pickled, or a value is out of its range.
    PipelineRuntimeError
        The process cannot be started here: this process is itself being started by multiprocessing, and imports the main
        program.

    Notes
    -----
    The constructor returns before the worker has begun. `wait_started` waits for it; a worker that fails to start is also
    found by its end, with `failure` saying why.

    Safe to use from several threads, but for `close`.
    """

    def __init__(
        self,
        target: Target,
        args: Sequence[Any] = (),
        *,
        name: str = "worker",
        start_method: str = "spawn",
        cpus: Iterable[int] | None = None,
        threads: int | None = 1,
        env: Mapping[str, str] | None = None,
    ) -> None:
        if start_method not in START_METHODS:
            raise PipelineBuildError(
                f"start_method is {start_method!r}, must be 'spawn' or 'forkserver' (never fork: threads and locks do not "
                "survive it)"
            )
        if threads is not None and (type(threads) is not int or threads < 1):
            raise PipelineBuildError(f"threads is {threads!r}, must be a number from 1 on, or None")
        self.name = name
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._closed = False
        self._words: list[tuple[str, str, str]] = []
        chosen = None if cpus is None else choose_cpus(list(cpus), 0)
        environment = dict(os.environ)
        if threads is not None:
            environment.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
        environment.update(env or {})
        self._start(target, args, start_method, chosen, threads, environment)
        _open_processes.add(self)

    def _start(
        self,
        target: Target,
        args: Sequence[Any],
        start_method: str,
        cpus: list[int] | None,
        threads: int | None,
        environment: dict[str, str],
    ) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        alive_read, self._alive = multiprocessing.Pipe(duplex=False)
        self._words_read, words = multiprocessing.Pipe(duplex=False)
        stderr_read, stderr = multiprocessing.Pipe(duplex=False)
        forked = start_method == "forkserver"
        try:
            setup = _Setup(
                alive_read,
                words,
                stderr if forked else None,
                cpus,
                threads,
                environment,
                callables.main_classes(),
            )
            process = _Process(self.name, setup, _Payload(target, (theirs, *args)))
            launch = _ForkServerPopen if forked else _SpawnPopen
            self._popen = launch(process, environment, cpus, stderr.fileno())
        except BaseException as error:
            for one in (self.connection, self._alive, self._words_read, stderr_read):
                one.close()
            raise self._not_started(error) from error
        finally:
            for one in (theirs, alive_read, words, stderr):
                one.close()
        try:
            self._stderr = _StderrTail(os.dup(stderr_read.fileno()), self.name)
        except BaseException:  # no more threads, as at the end of the interpreter
            self._popen._send_signal(signal.SIGKILL)
            self._popen.poll(0)
            self._popen.release()
            for one in (self.connection, self._alive, self._words_read):
                one.close()
            raise
        finally:
            stderr_read.close()

    def _not_started(self, error: BaseException) -> BaseException:
        if isinstance(error, RuntimeError) and "bootstrapping" in str(error):
            return PipelineRuntimeError(
                f"{self.name} cannot be started: this process was itself started by multiprocessing and is importing the main "
                'program, which starts workers; put that under `if __name__ == "__main__":`'
            )
        if isinstance(error, callables.PICKLING_ERRORS):
            return PipelineBuildError(
                f"{self.name} cannot be started: an argument cannot be pickled ({error})"
            )
        return error

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def sentinel(self) -> int:
        return self._popen.sentinel

    @property
    def exitcode(self) -> int | None:
        """None while it runs; otherwise as of subprocess: negative for a signal."""
        with self._lock:
            return self._popen.poll()

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return self.exitcode is None

    def _word(self, *kinds: str) -> tuple[str, str, str] | None:
        with self._lock, contextlib.suppress(EOFError, OSError):
            while not self._words_read.closed and self._words_read.poll():
                self._words.append(self._words_read.recv())
        return next((word for word in self._words if word[0] in kinds), None)

    @property
    def started(self) -> bool:
        """Whether it has got its arguments and has called `target`."""
        return self._word("ready") is not None

    @property
    def failure(self) -> str | None:
        """Traceback of the exception that ended it; None: there was none, or it had no time to say so."""
        word = self._word("failed", "died")
        return word and word[2]

    def wait_started(self, timeout: float | None = None) -> bool:
        """Wait until `target` has been called; False when the time is up.

        Raises
        ------
        PipelineRuntimeError
            It ended before, with the traceback or the last lines of its standard error.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.started:
            if not self.alive and not self.started:
                raise self.start_error()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            multiprocessing.connection.wait([self._words_read, self.sentinel], left)
        return True

    def start_error(self) -> PipelineRuntimeError:
        """Return the error for a worker that ended before it had started."""
        details = self.failure or self.stderr_tail
        text = f"{self.name} failed to start: {self.cause_of_death}"
        return PipelineRuntimeError(f"{text}\n{details.rstrip()}" if details.strip() else text)

    @property
    def stderr_tail(self) -> str:
        """The last 64 KiB that it wrote to its standard error, all of which also went to this process's."""
        return self._stderr.text()

    @property
    def cause_of_death(self) -> str | None:
        """In words: "killed by signal 9 (SIGKILL)", "MemoryError", "exit code 3"; None while it runs."""
        code = self.exitcode
        if code is None:
            return None
        word = self._word("failed", "died")
        if word is not None:
            return word[1]
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by signal {-code} ({signal.Signals(-code).name})"
            return f"killed by signal {-code}"
        return f"exit code {code}"

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; False when the time is up."""
        multiprocessing.connection.wait([self.sentinel], timeout)
        return not self.alive

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with self._lock:
            if self._popen.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    self._popen._send_signal(number)

    def terminate(self, patience: float = _TERMINATE_PATIENCE) -> None:
        """SIGTERM, and SIGKILL when it has not ended `patience` seconds later; waits for the end."""
        if patience > 0:
            self.send_signal(signal.SIGTERM)
            self.send_signal(signal.SIGCONT)  # a stopped process takes no SIGTERM
            if self.join(patience):
                return
        self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.send_signal(signal.SIGKILL)
        self.join()

    def close(self, patience: float = _TERMINATE_PATIENCE) -> None:
        """End it, if it still runs, and close what belongs to it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._owner != os.getpid():
            return
        self.terminate(patience)
        self._word()  # what it said last
        self._stderr.close()
        for one in (self.connection, self._alive, self._words_read):
            one.close()
        self._popen.release()
        _open_processes.discard(self)

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.name} pid={self.pid} {self.cause_of_death or 'running'}>"


def _close_all() -> None:
    for process in tuple(_open_processes):
        process.close(patience=0)


def _forget_all() -> None:
    # A forked child is not the parent of the workers, and must not keep them alive.
    for process in tuple(_open_processes):
        with contextlib.suppress(OSError):
            process._alive.close()
    _open_processes.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
