"""What worker processes of the tests run."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import threadpoolctl
from support import check_proof, proof

import dsline


def tell(connection, *values):
    connection.send(values)
    connection.recv()


def compute(connection):
    """One call that keeps the GIL for minutes."""
    connection.send(os.getpid())
    10 ** (10**9)


def sleep(connection):
    connection.send(os.getpid())
    while True:
        time.sleep(100)


def stop(connection):
    connection.send(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)


def receive(connection, channel):
    connection.send(os.getpid())
    channel.recv()


def ignore(connection):
    """Takes no SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection.send(os.getpid())
    threading.Event().wait()


def surroundings(connection):
    connection.send(
        {
            "cpus": sorted(os.sched_getaffinity(0)),
            "threads": {one["num_threads"] for one in threadpoolctl.threadpool_info()},
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "MINE": os.environ.get("MINE"),
            "main": sys.modules["__main__"].__file__
            if hasattr(sys.modules["__main__"], "__file__")
            else None,
            "sigint": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
            "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        }
    )


def complain(connection, size):
    for at in range(0, size, 1000):
        sys.stderr.write(f"{at:09d} " + "x" * 989 + "\n")
    sys.stderr.write("the end\n")


def fail(connection, error):
    raise error


def leave(connection, code):
    os._exit(code)


def echo(connection, channel, answers):
    for message in channel:
        answers.send(bytes(message).upper())


def interrupt(connection):
    """Ctrl-C goes to the whole foreground group; the parent decides what it means."""
    os.kill(os.getpid(), signal.SIGINT)
    connection.send("still here")


def with_child(connection):
    """Ends while a process that it started, and that inherits everything, lives on."""
    child = os.fork()
    if child == 0:
        time.sleep(1000)
        os._exit(0)
    connection.send(child)


def with_pool(connection):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        connection.send(pool.map(square, [1, 2, 3]))


def square(x):
    return x * x


class Unloadable:
    """Unpickling it fails."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        return _raise, (self.error,)


def _raise(error):
    raise error


def descriptors():
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))


def anonymous(**options):
    return dsline.ShmChannel(capacity=4, slot_size=256, **options)


# --- tasks of pools -----------------------------------------------------------------------------------------------------


class ExitsWhenPickled:
    def __reduce__(self):
        sys.exit(3)


class ExitsInTheParent:
    def __reduce__(self):
        return sys.exit, (4,)


def make(kind):
    return kind()


def pid_of(_=None):
    return os.getpid()


def slowly(seconds, value=None):
    time.sleep(seconds)
    return value


def describe(array):
    return array.sum().item(), array.flags.writeable, array.shape, array.dtype.str


def twice(thing):
    """Doubles every array in dicts, lists and tuples."""
    if isinstance(thing, dict):
        return {key: twice(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)(map(twice, thing))
    return thing * 2


def add_in_place(array):
    array += 1
    return array


def ones(size):
    return np.ones(size, np.uint8)


def same(thing):
    return thing


def divide(a, b):
    return a / b


def lock():
    return threading.Lock()


class LockedError(Exception):
    """Cannot be pickled."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


def fail_with(kind, text):
    raise kind(text)


_kept = []


def keep(array):
    """The views stay in the worker."""
    _kept.append(array)
    return len(_kept), int(_kept[0][0])


def count_calls(path):
    """How often it has been called, in all processes: one byte each."""
    with open(path, "ab") as file:
        file.write(b".")
    return os.path.getsize(path)


def die_at_first(path, value, number=signal.SIGKILL):
    if count_calls(path) == 1:
        os.kill(os.getpid(), number)
    return value


def die(_=None):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_file(path):
    while not os.path.exists(path):
        time.sleep(0.001)


def prove(payload, producer):
    """Check what came, and answer with something that proves itself."""
    number = check_proof(payload)[1]
    return proof(producer, number, len(payload))


_greeting = None


def greet(text):
    global _greeting
    _greeting = text


def greeting():
    return _greeting


def inner_threads():
    return {one["num_threads"] for one in threadpoolctl.threadpool_info()}, sorted(os.sched_getaffinity(0))
