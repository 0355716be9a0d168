"""WorkerPool: a `concurrent.futures.Executor` whose arguments and results travel through slots.

All workers receive tasks from one channel and send results to another. A worker keeps its claim on a task until the result
is in the channel of results, so that a task whose worker dies comes again, to another worker; a second result of the same
task is dropped. docs/dataflow/worker-pool.md has the rules.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import multiprocessing.connection
import os
import queue as _queue
import threading
import time
import traceback
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeAlias, TypeVar

from dsline import _core
from dsline.channel import ShmChannel
from dsline.dataflow import callables
from dsline.dataflow.processes import START_METHODS, Cpus, WorkerProcess, choose_cpus
from dsline.dataflow.restart import Restart, RestartBudget
from dsline.errors import (
    BufferFullError,
    ChannelClosedError,
    DslineError,
    InvalidArgumentError,
    OperatorError,
    PeerDiedError,
    PipelineBuildError,
    SerializationError,
    TimeoutError,
)
from dsline.rpc import RemoteTraceback

__all__ = ["WorkerDiedError", "WorkerPool"]

T = TypeVar("T")
Copy: TypeAlias = bool | Literal["arguments", "results"]

_MOST_WORKERS = 100
_MOST_DELIVERIES = 14  # one less than a channel allows: a worker that lives says that it is enough
_KEPT_FUNCTIONS = 32
_KEPT_ARGUMENTS = 2  # tasks whose slots a worker may hold, the current one among them; then it gets copies
_LONGEST_TEXT = 16_000  # characters of a traceback that go with an error
_PATIENCE = 5.0  # seconds that a worker without work has to end


def _check_number(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise InvalidArgumentError(f"{name} is {value!r}, must be {least} to {most}")
    return value


def _check_seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidArgumentError(f"{name} is {value!r}, must be seconds above 0, or None")
    return float(value)


def _start_method(start_method: str | None, mp_context: Any) -> str:
    wanted = start_method or (mp_context.get_start_method() if mp_context is not None else "spawn")
    if wanted not in START_METHODS:
        raise InvalidArgumentError(
            f"the start method is {wanted!r}, must be 'spawn' or 'forkserver': the threads of this process do not survive fork"
        )
    return str(wanted)


def _held(channel: ShmChannel) -> int:
    """How many received messages this process has, this one among them, as views of them are alive."""
    handle = channel._core_handle()
    return 0 if handle is None else handle.views


def _pickled(thing: Any, *, by_value: bool) -> tuple[Any, list[Any] | None]:
    """Pickle for the other side: (stream, large buffers that are not in it).

    With `by_value`, what the main program defines travels with its definition: a worker does not import that program.
    """
    try:
        stream, buffers = _core.pickle_object(thing)
        if not by_value or b"__main__" not in (stream if isinstance(stream, bytes) else bytes(stream)):
            return stream, buffers
    except Exception:  # a lambda, a class that is no module's: the other pickler may know what to do
        pass
    return _core.pickle_object(thing, callables.ByValuePickler)


# --- in a worker --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Orders:
    """What a worker is told when it starts."""

    copy: bool
    announce: bool  # say when a task begins: somebody looks at the clock
    most_tasks: int | None


def _serve(
    connection: Connection,
    tasks: ShmChannel,
    results: ShmChannel,
    orders: _Orders,
    initializer: bytes | None,
    initargs: tuple[Any, ...],
) -> None:
    """Run a worker until the channel of tasks ends."""
    if initializer is not None:
        callables.unpack(initializer)(*initargs)
    connection.send(("begun", 0, 0))
    functions: OrderedDict[bytes, Callable[..., Any]] = OrderedDict()
    done = 0
    while orders.most_tasks is None or done < orders.most_tasks:
        try:
            message = tasks.recv_message(timeout=None)
        except ChannelClosedError:
            return
        number = message.meta["id"]
        if message.attempt > 1:
            connection.send(("again", number, message.attempt))
            wanted = connection.recv()
        else:
            wanted = True
            if orders.announce:
                connection.send(("begun", number, 1))
        if wanted:
            try:
                _execute(message, number, tasks, results, orders, functions)
            except BaseException:
                # A message that an orderly end lets go of is acknowledged; that of a dead process comes again.
                traceback.print_exc()
                os._exit(1)
            done += 1
        # The result is out: from here on the task does not come again.
        with contextlib.suppress(
            BufferError
        ):  # views that the function has kept: the last one releases the slot
            message.release()
        del message
    connection.send(("retired", 0, 0))


def _execute(
    message: _core.Message,
    number: int,
    tasks: ShmChannel,
    results: ShmChannel,
    orders: _Orders,
    functions: OrderedDict[bytes, Callable[..., Any]],
) -> None:
    try:
        copy = orders.copy or _held(tasks) > _KEPT_ARGUMENTS
        packed, arguments, keywords = message.object(copy=copy)
        function = _function(bytes(packed), functions)
    except BaseException as error:
        cause = error.__cause__ or error
        text = f"a task cannot be unpickled by the worker: {type(cause).__name__}: {cause}"
        _send_error(results, number, SerializationError(text), "")
        return
    try:
        if keywords is None:  # a chunk of map
            value = [function(*each) for each in arguments]
        else:
            value = function(*arguments, **keywords)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))[-_LONGEST_TEXT:]
        _forget_frames(error)
        _send_error(results, number, error, text)
        return
    del arguments, keywords
    problem = _send(results, number, "ok", value)
    if problem is not None:
        _send_error(results, number, problem, "")


def _function(packed: bytes, functions: OrderedDict[bytes, Callable[..., Any]]) -> Callable[..., Any]:
    known = functions.get(packed)
    if known is not None:
        return known
    function: Callable[..., Any] = callables.unpack(packed)
    # Objects may change with a call: each task gets its own.
    if callables.is_plain_function(function):
        functions[packed] = function
        if len(functions) > _KEPT_FUNCTIONS:
            functions.popitem(last=False)
    return function


def _forget_frames(error: BaseException | None) -> None:
    """Frames refer to the arguments, which look at the slot."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            waiting += [one.__cause__, one.__context__]


def _send(results: ShmChannel, number: int, kind: str, value: Any, text: str = "") -> Exception | None:
    """Send a result; the error to send instead, if it cannot be sent as it is."""
    try:
        stream, buffers = _pickled((value,), by_value=False)
    except BaseException as error:
        return SerializationError(
            f"the result, a {type(value).__qualname__}, cannot be pickled: {type(error).__name__}: {error}"
        )
    meta = {"id": number, "k": kind, "t": text} if text else {"id": number, "k": kind}
    try:
        results._send_pickled(stream, buffers, None, meta)
    except (DslineError, MemoryError) as error:  # too large, or no memory
        return error
    return None


def _send_error(results: ShmChannel, number: int, error: BaseException, text: str) -> None:
    if _send(results, number, "error", error, text) is not None:
        summary = OperatorError(f"{type(error).__name__}: {error}"[:_LONGEST_TEXT])
        _send(results, number, "error", summary, text)


# --- in the parent ------------------------------------------------------------------------------------------------------


class WorkerDiedError(PeerDiedError, concurrent.futures.BrokenExecutor):
    """Workers died over this task, or too often for the pool to go on."""


class _Work:
    """A task of which the future has not been settled."""

    __slots__ = ("arguments", "function", "future", "keywords", "name", "number")

    def __init__(
        self, number: int, function: bytes, name: str, arguments: Any, keywords: dict[str, Any] | None
    ) -> None:
        self.number = number
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.function = function
        self.name = name
        self.arguments = arguments
        self.keywords = keywords


@dataclasses.dataclass
class _Worker:
    index: int
    process: WorkerProcess | None = None
    start_at: float = 0.0
    begun: bool = False  # its initializer has returned
    retired: bool = False
    expected: bool = False  # we killed it
    task: int = 0  # with a timeout: what it executes, until when
    deadline: float = math.inf


class _Engine:
    """The processes, threads and channels of a pool. Its threads do not refer to the pool, which may be forgotten."""

    def __init__(
        self,
        workers: int,
        queue: int,
        start: Callable[[int, _Engine], WorkerProcess],
        channel_options: Mapping[str, Any],
        restart: Restart,
        max_deliveries: int,
        timeout: float | None,
        copy_results: bool,
    ) -> None:
        self.pid = os.getpid()
        self.limit = queue
        self._start = start
        self._budget = RestartBudget(restart)
        self._max_deliveries = max_deliveries
        self._timeout = timeout
        self._copy_results = copy_results
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._works: dict[int, _Work] = {}
        self._backlog: deque[_Work] = deque()
        self._in_flight = 0
        self._closing = False
        self._broken: str | None = None
        self._last_death = "killed"
        self.restarts = 0
        handles = min(256, 2 * workers + 16)
        # A slot for each task on its way, two that each worker may keep, and one more: sending a task never has to wait.
        self.tasks = ShmChannel(
            capacity=queue + 2 * workers + 1,
            max_handles=handles,
            max_deliveries=_MOST_DELIVERIES + 1,
            max_pinned="unlimited",
            **channel_options,
        )
        self.results = ShmChannel(
            capacity=max(4, queue + workers), max_handles=handles, max_pinned="unlimited", **channel_options
        )
        self._kept_results = self.results.capacity // 2
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self.workers = [_Worker(index) for index in range(workers)]
        try:
            for worker in self.workers:
                worker.process = start(worker.index, self)
        except BaseException:
            self._close_all(patience=0)
            raise
        self._collector = threading.Thread(target=self._collect, name="dsline-pool-results", daemon=True)
        self._supervisor = threading.Thread(target=self._supervise, name="dsline-pool", daemon=True)
        _engines.add(self)
        self._collector.start()
        self._supervisor.start()

    # --- tasks ---

    def submit(
        self, function: bytes, name: str, arguments: Any, keywords: dict[str, Any] | None
    ) -> concurrent.futures.Future[Any]:
        work = _Work(next(self._numbers), function, name, arguments, keywords)
        with self._lock:
            self._check_open()
            self._works[work.number] = work
            if self._backlog or self._in_flight >= self.limit:
                self._backlog.append(work)
                return work.future
            self._in_flight += 1
        self._send(work)
        self._refill()  # others may have queued up behind one that could not be sent
        return work.future

    def _check_open(self) -> None:
        if self.pid != os.getpid():
            raise RuntimeError("this pool belongs to the parent of this process; make another one here")
        if self._broken is not None:
            raise WorkerDiedError(self._broken)
        if self._closing:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _send(self, work: _Work) -> None:
        """Send a task, which has its place among those on their way."""
        try:
            if not work.future.set_running_or_notify_cancel():
                self._leave(work)
                return
            try:
                stream, buffers = _pickled((work.function, work.arguments, work.keywords), by_value=True)
            except Exception as error:
                text = f"the arguments of {work.name} cannot be pickled: {type(error).__name__}: {error}"
                self._fail(work, _caused(SerializationError(text), error))
                return
            work.arguments = work.keywords = None
            self._send_stream(stream, buffers, work.number)
        except ChannelClosedError:  # broken meanwhile: whoever broke it settles the task
            pass
        except Exception as error:  # too large, or no memory
            self._fail(work, error)
        except BaseException as error:
            self._fail(work, error)
            raise

    def _send_stream(self, stream: Any, buffers: list[Any] | None, number: int) -> None:
        while True:
            try:
                self.tasks._send_pickled(stream, buffers, 1.0, {"id": number})
                return
            except BufferFullError:  # slots of the dead, which are free once somebody has looked
                self.tasks.check_peers()

    def _leave(self, work: _Work) -> bool:
        """A task is on its way no more: True for the one who settles its future."""
        with self._lock:
            if self._works.pop(work.number, None) is None:
                return False
            self._in_flight -= 1
            idle = self._closing and not self._works
        if idle:
            self._wake()
        return True

    def _fail(self, work: _Work, error: BaseException) -> None:
        if self._leave(work):
            work.future.set_exception(error)

    def _refill(self) -> None:
        while True:
            with self._lock:
                if not self._backlog or self._in_flight >= self.limit:
                    return
                work = self._backlog.popleft()
                self._in_flight += 1
            self._send(work)

    def _nudge(self) -> None:
        """Have the other thread refill: sending may wait for a slot, and this one must be there for the workers."""
        with contextlib.suppress(BufferFullError):  # it has something to do, and refills after it
            self.results.send(b"", timeout=0, meta={"id": 0})

    # --- results: in a thread of their own ---

    def _collect(self) -> None:
        try:
            while True:
                message = self.results.recv_message(timeout=None)
                self._take(message)
                del message
        except ChannelClosedError:
            return
        except BaseException as error:
            self._break(f"the results of the pool cannot be read: {type(error).__name__}: {error}")

    def _take(self, message: _core.Message) -> None:
        meta = message.meta
        work = self._works.get(meta["id"])
        if work is None:  # a second result of a task whose worker died, one that came too late, or a nudge
            message.release()
            self._refill()
            return
        value, error = None, None
        copy = self._copy_results or _held(self.results) > self._kept_results
        try:
            (value,) = message.object(copy=copy)
        except BaseException as problem:
            cause = problem.__cause__ or problem
            text = f"the result of {work.name} cannot be unpickled: {type(cause).__name__}: {cause}"
            error = _caused(SerializationError(text), problem)
        else:
            if meta["k"] == "error":
                error, value = value, None
                if meta.get("t"):
                    error.__cause__ = RemoteTraceback(meta["t"])
        if copy or error is not None:
            message.release()
        if not self._leave(work):
            return
        self._refill()  # before anybody hears of this result: the workers have something to do meanwhile
        if error is not None:
            work.future.set_exception(error)
        else:
            work.future.set_result(value)

    # --- processes: in a thread of their own ---

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # it is full, or closed: -1
            os.write(self._wake_write, b"x")

    def _supervise(self) -> None:
        try:
            while self._tend():
                pass
        except BaseException as error:
            self._break(f"the pool cannot go on: {type(error).__name__}: {error}")
        self._end()

    def _tend(self) -> bool:
        """Wait for something to do, and do it; False when the pool has ended."""
        with self._lock:
            if self._broken is not None or (self._closing and not self._works):
                return False
        now = time.monotonic()
        running = [(worker, worker.process) for worker in self.workers if worker.process is not None]
        until = min(
            [worker.deadline for worker, _ in running]
            + [worker.start_at for worker in self.workers if worker.process is None]
        )
        things: list[Any] = [self._wake_read]
        for _, process in running:
            things += [process.sentinel, process.connection]
        ready = multiprocessing.connection.wait(things, None if until == math.inf else max(0.0, until - now))
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        for worker, process in running:
            if process.sentinel in ready or process.connection in ready:
                self._listen(worker, process)
        self._reap()
        self._kill_late()
        self._start_again()
        return True

    def _listen(self, worker: _Worker, process: WorkerProcess) -> None:
        with contextlib.suppress(EOFError, OSError):
            while process.connection.poll():
                word, number, attempt = process.connection.recv()
                if word == "retired":
                    worker.retired = True
                    continue
                worker.begun = True
                wanted = word != "again" or self._is_wanted(number, attempt)
                if number and wanted and self._timeout is not None:
                    worker.task, worker.deadline = number, time.monotonic() + self._timeout
                if word == "again":
                    process.connection.send(wanted)

    def _is_wanted(self, number: int, attempt: int) -> bool:
        """Whether a task is to be executed again: its worker has died, but the result may be there."""
        self._reap()
        work = self._works.get(number)
        if work is None:
            return False
        if attempt <= self._max_deliveries:
            return True
        died = f"{attempt - 1} workers" if attempt > 2 else "the worker"
        error = WorkerDiedError(
            f"{died} died over this task, {work.name}, the last one: {self._last_death}; max_deliveries="
            f"{self._max_deliveries} allows no more"
        )
        self._fail(work, error)
        self._nudge()
        return False

    def _reap(self) -> None:
        for worker in self.workers:
            process = worker.process
            if process is None or process.alive:
                continue
            worker.process = None
            self._listen(worker, process)
            cause, failure = str(process.cause_of_death), process.failure
            pid, tail = process.pid, process.stderr_tail
            process.close(patience=0)
            self.tasks.check_peers()  # what it held comes again now
            self._after_death(worker, pid, cause, failure, tail)
            worker.begun = worker.retired = worker.expected = False
            worker.task, worker.deadline = 0, math.inf

    def _after_death(self, worker: _Worker, pid: int, cause: str, failure: str | None, tail: str) -> None:
        if worker.retired or worker.expected:
            worker.start_at = 0.0
            return
        self._last_death = f"process {pid}, {cause}"
        if (
            failure is not None
        ):  # what a task raises is caught: this is the initializer, or a task that cannot be received
            how = "failed" if worker.begun else "failed to start"
            self._break(f"a worker of the pool {how}: {cause}\n{failure}")
            return
        delay = self._budget.died()
        if delay is None:
            text = f"the workers of the pool die too often: {self._budget.describe()}; the last one: {self._last_death}"
            self._break(f"{text}\n{tail}" if tail.strip() else text)
            return
        self.restarts += 1
        worker.start_at = time.monotonic() + delay

    def _kill_late(self) -> None:
        now = time.monotonic()
        for worker in self.workers:
            if worker.process is None or now < worker.deadline:
                continue
            work = self._works.get(worker.task)
            worker.deadline = math.inf
            if work is None:  # done in time
                continue
            worker.expected = True
            worker.process.kill()
            error = TimeoutError(f"{work.name} was not done after {self._timeout:g} s; its worker was killed")
            self._fail(work, error)
            self._nudge()

    def _start_again(self) -> None:
        now = time.monotonic()
        for worker in self.workers:
            if worker.process is None and now >= worker.start_at and self._broken is None:
                worker.process = self._start(worker.index, self)

    # --- the end ---

    def _break(self, why: str) -> None:
        """Fail everything that waits."""
        with self._lock:
            if self._broken is not None:
                return
            self._broken = why
            works = list(self._works.values())
            self._works.clear()
            self._backlog.clear()
        self._wake()
        for work in works:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                if work.future.running() or work.future.set_running_or_notify_cancel():
                    work.future.set_exception(WorkerDiedError(why))

    def shut_down(self, wait: bool, cancel: bool) -> None:
        if self.pid != os.getpid():
            return
        cancelled = []
        with self._lock:
            self._closing = True
            if cancel:
                cancelled = list(self._backlog)
                self._backlog.clear()
                for work in cancelled:
                    self._works.pop(work.number, None)
        for work in cancelled:
            work.future.cancel()
            work.future.set_running_or_notify_cancel()
        self._wake()
        if wait and threading.current_thread() not in (self._collector, self._supervisor):
            self._supervisor.join()

    def _end(self) -> None:
        broken = self._broken is not None
        self.tasks.shutdown(immediate=broken)
        self._close_all(patience=0 if broken else _PATIENCE)
        _engines.discard(self)

    def _close_all(self, patience: float) -> None:
        for worker in self.workers:
            if worker.process is not None:
                if patience > 0:
                    worker.process.join(patience)
                worker.process.close(patience=min(patience, 1.0))
                worker.process = None
        self.results.shutdown()
        collector = getattr(self, "_collector", None)
        if collector is not None:
            collector.join()
        self.tasks.close()
        self.results.close()
        with self._lock:
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_write = -1


def _caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class WorkerPool(concurrent.futures.Executor):
    """Executes functions in worker processes; arrays go to them and back through shared memory, without a pipe.

    Parameters
    ----------
    max_workers : int, optional
        Processes; as many as this process may use CPUs by default. They start at once.
    initializer, initargs
        Called in every worker before its first task. When it raises, the pool is broken.
    start_method : str, optional
        "spawn" (default) or "forkserver". `mp_context`, a context of multiprocessing, says the same.
    max_tasks_per_child : int, optional
        A worker ends after so many tasks, and another one takes its place.
    queue : int, optional
        Tasks on their way at a time, those being executed among them; three per worker by default. Others wait in this
        process, unpickled.
    copy : bool, "arguments" or "results"
        Which arrays are writable and have memory of their own: those that functions get, and those in results. The others
        are read-only views, which keep a slot as long as they live. "results" by default.
    timeout : float, optional
        Seconds for a task; then its worker is killed, and its future fails with TimeoutError.
    max_deliveries : int
        How often a task is given to a worker at most, 1 to 14. When the last one dies over it, its future fails with
        WorkerDiedError, and the pool goes on.
    restart : Restart
        How often workers that died are started again. Past it the pool is broken.
    threads : int or None
        How many threads BLAS, OpenMP and the like may use inside of a worker.
    cpus : None, "spread" or list of int
        Where workers may run; "spread" gives each a CPU of its own.
    slot_size, max_message_size : int, optional
        Of the channels, as for `ShmChannel`. Larger tasks and results make a slot grow.
    env : mapping, optional
        Environment variables for the workers.

    Raises
    ------
    InvalidArgumentError
        A value out of its range.
    PipelineBuildError
        The initializer or its arguments cannot be pickled.
    PipelineRuntimeError
        Workers cannot be started here.

    Notes
    -----
    Functions may be of any kind, those of the main program and lambdas included; the main program is not imported by workers.
    Safe to use from several threads. A pool that nobody refers to any more ends when its tasks are done.

    Examples
    --------
    >>> import numpy as np
    >>> from dsline.worker_pool import WorkerPool
    >>> with WorkerPool(1) as pool:
    ...     int(pool.submit(np.sum, np.arange(4)).result())
    6
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        start_method: str | None = None,
        mp_context: Any = None,
        max_tasks_per_child: int | None = None,
        queue: int | None = None,
        copy: Copy = "results",
        timeout: float | None = None,
        max_deliveries: int = 3,
        restart: Restart | None = None,
        threads: int | None = 1,
        cpus: Cpus = None,
        slot_size: int | None = None,
        max_message_size: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        usable = min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
        workers = _check_number(
            "max_workers", usable if max_workers is None else max_workers, 1, _MOST_WORKERS
        )
        limit = _check_number("queue", 3 * workers if queue is None else queue, 1, 10_000)
        if max_tasks_per_child is not None:
            _check_number("max_tasks_per_child", max_tasks_per_child, 1, 1 << 62)
        if copy not in (True, False, "arguments", "results"):
            raise InvalidArgumentError(f"copy is {copy!r}, must be True, False, 'arguments' or 'results'")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        method = _start_method(start_method, mp_context)
        packed = None if initializer is None else callables.pack(initializer)
        limit_seconds = _check_seconds("timeout", timeout)
        orders = _Orders(copy in (True, "arguments"), limit_seconds is not None, max_tasks_per_child)
        arguments = tuple(initargs)

        def start(index: int, engine: _Engine) -> WorkerProcess:
            return WorkerProcess(
                _serve,
                (engine.tasks, engine.results, orders, packed, arguments),
                name=f"dsline-pool-{index}",
                start_method=method,
                cpus=choose_cpus(cpus, index),
                threads=threads,
                env=env,
            )

        self._window = limit + workers
        self._packed: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
        self._engine = _Engine(
            workers,
            limit,
            start,
            {"slot_size": slot_size, "max_message_size": max_message_size},
            restart or Restart(),
            _check_number("max_deliveries", max_deliveries, 1, _MOST_DELIVERIES),
            limit_seconds,
            copy in (True, "results"),
        )
        self._finalizer = weakref.finalize(self, _Engine.shut_down, self._engine, False, False)
        self._finalizer.atexit = False

    def _pack(self, function: Any) -> bytes:
        """By reference once; by value each time, as what the function refers to may have changed."""
        if not callables.is_plain_function(function) or function.__module__ == "__main__":
            return callables.pack(function)
        packed = self._packed.get(function)
        if packed is None:
            packed = callables.pack(function)
            with contextlib.suppress(PipelineBuildError):
                callables.reference(function)
                self._packed[function] = packed
        return packed

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        """Have a function executed: a future of its result.

        Parameters
        ----------
        fn : callable
            Called as ``fn(*args, **kwargs)`` in a worker. Large arrays in the arguments are copied once, into a slot.

        Returns
        -------
        concurrent.futures.Future
            Its `cancel` works as long as the task has not been sent to the workers. What the function raised comes with the
            traceback of the worker as its cause. SerializationError when arguments or result cannot be pickled,
            MessageTooLargeError and SharedMemoryFullError when there is no room for them, WorkerDiedError
            (a PeerDiedError and a BrokenExecutor) when workers died over it.

        Raises
        ------
        RuntimeError
            The pool was shut down.
        WorkerDiedError
            The pool is broken.
        PipelineBuildError
            The function cannot be pickled.

        Notes
        -----
        Does not block: when `queue` tasks are on their way the next ones wait in this process, and their arguments are pickled
        when it is their turn.
        """
        if not callable(fn):
            raise TypeError(f"fn is a {type(fn).__qualname__}, which cannot be called")
        return self._engine.submit(self._pack(fn), callables.function_name(fn), args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        ordered: bool = True,
    ) -> Iterator[T]:
        """Yield ``fn(a, b, ...)`` for the items of the iterables, which may be endless.

        Parameters
        ----------
        fn : callable
        *iterables
            As for the built-in `map`. Items are taken as results are consumed.
        timeout : float or None
            Seconds from now on, for all results; then TimeoutError.
        chunksize : int
            Items that go to a worker together: more for small ones.
        buffersize : int, optional
            Chunks that are taken ahead of the result that is being consumed; by default enough to keep the workers busy.
        ordered : bool
            False: results come as they are done.

        Yields
        ------
        object
            The results; an exception of a task is raised in its place, and the tasks that have not begun are cancelled.

        Raises
        ------
        As `submit`. What an iterable raises comes after the results of the items before.

        Notes
        -----
        The first `buffersize` chunks are taken at once. Consume the results before the pool is shut down.
        """
        _check_number("chunksize", chunksize, 1, 1 << 62)
        window = self._window if buffersize is None else _check_number("buffersize", buffersize, 1, 1 << 62)
        end = None if timeout is None else time.monotonic() + timeout
        packed, name = self._pack(fn), callables.function_name(fn)
        arguments: Iterator[Any] = zip(*iterables)  # noqa: B905 - as the built-in map: the shortest counts
        items = arguments if chunksize == 1 else _chunks(arguments, chunksize)

        def submit(each: Any) -> concurrent.futures.Future[Any]:
            if chunksize == 1:
                return self._engine.submit(packed, name, each, {})
            return self._engine.submit(packed, name, each, None)

        results = _Results(items, submit, window, end, ordered)
        results.fill()
        return _flat(results.take()) if chunksize > 1 else results.take()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the pool when its tasks are done.

        Parameters
        ----------
        wait : bool
            Return when the workers are gone. Otherwise at once; the tasks are done all the same.
        cancel_futures : bool
            Cancel the tasks that have not been sent to the workers.
        """
        self._engine.shut_down(wait, cancel_futures)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        processes: Sequence[Any] = [worker.process for worker in self._engine.workers]
        return [process.pid for process in processes if process is not None]

    @property
    def restarts(self) -> int:
        """How many workers took the place of one that died."""
        return self._engine.restarts


class _Results:
    """The results of a map: those that are under way, and the items to come."""

    def __init__(
        self,
        items: Iterator[Any],
        submit: Callable[[Any], concurrent.futures.Future[Any]],
        window: int,
        end: float | None,
        ordered: bool,
    ) -> None:
        self._items = items
        self._submit = submit
        self._window = window
        self._end = end
        self._ordered = ordered
        self._pending: dict[concurrent.futures.Future[Any], None] = {}  # in the order of their items
        self._done: _queue.SimpleQueue[concurrent.futures.Future[Any]] = _queue.SimpleQueue()
        self._error: BaseException | None = None  # of the iterables, or the pool
        self._exhausted = False

    def fill(self) -> None:
        while len(self._pending) < self._window and not self._exhausted:
            try:
                item = next(self._items)
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:
                self._error, self._exhausted = error, True
                return
            self._add(item)

    def _add(self, item: Any) -> None:
        try:
            future = self._submit(item)
        except (RuntimeError, DslineError) as error:
            self._error, self._exhausted = error, True
            return
        self._pending[future] = None
        if not self._ordered:
            future.add_done_callback(self._done.put)

    def _left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def _next(self) -> concurrent.futures.Future[Any]:
        if self._ordered:
            return next(iter(self._pending))
        try:
            return self._done.get(timeout=self._left())
        except _queue.Empty:
            raise TimeoutError("map's timeout is over, and results are missing") from None

    def take(self) -> Iterator[Any]:
        try:
            while self._pending:
                future = self._next()
                if self._ordered:
                    concurrent.futures.wait([future], self._left())
                    if not future.done():
                        raise TimeoutError("map's timeout is over, and results are missing")
                del self._pending[future]
                self.fill()
                result = [future.result()]
                del future
                yield result.pop()
            if self._error is not None:
                raise self._error
        finally:
            for future in self._pending:
                future.cancel()


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _flat(chunks: Iterator[list[Any]]) -> Iterator[Any]:
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


# --- the end of the process ---------------------------------------------------------------------------------------------

_engines: set[_Engine] = set()
os.register_at_fork(after_in_child=_engines.clear)


@atexit.register
def _finish_all() -> None:
    """Do what was submitted, as other executors do."""
    for engine in tuple(_engines):
        engine.shut_down(wait=True, cancel=False)
