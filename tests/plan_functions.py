"""Functions for pipelines in tests: of a module, so that plans can name them and workers can import them."""

import os
import signal
import time

import numpy as np


def double(value):
    return value * 2


def is_even(value):
    return value % 2 == 0


def is_odd(value):
    return value % 2 == 1


def numbers():
    return range(5)


def take(item):
    pass


def same(item):
    return item


def describe_array(array):
    return array.shape, str(array.dtype), array.flags.writeable, int(array.sum())


def add_one(frame, out):
    np.add(frame, 1, out=out)
    return out


def total(array):
    return float(array.sum())


def first_waits(path, value):
    """Item 0 takes until another one has been processed."""
    if value:
        open(path, "w").close()
    while not os.path.exists(path):
        time.sleep(0.001)
    return value


def sleeps(value):
    time.sleep(1)
    return value


def sleeps_a_little(value):
    time.sleep(0.003)
    return value


def fails_at_three(value):
    if value == 3:
        raise ValueError("three")
    return value


def always_fails(value):
    raise ValueError(value)


class FailsOnce:
    """Fails at the first try of every even item."""

    def __init__(self):
        self.seen = set()

    def __call__(self, value):
        if value % 2 == 0 and value not in self.seen:
            self.seen.add(value)
            raise ValueError(value)
        return value


class KillsItself:
    def __call__(self, value):
        if value == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return value


class HangsAtTwo:
    def __call__(self, value):
        while value == 2:
            time.sleep(1)
        return value


def answers(connection):
    """Of a worker process that ends at once."""


def slowly(item):
    time.sleep(0.005)
    return item


class Keeps:
    """Keeps the first argument and the last one."""

    def __call__(self, frame):
        self.first = getattr(self, "first", frame)
        self.last = frame
        return int(frame[0, 0])


class DiesAtTens:
    def __call__(self, value):
        if value % 10 == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return value


def slow_total(array):
    time.sleep(0.005)
    return float(array.sum())


class UnpicklableState:
    def __call__(self, item):
        time.sleep(0.005)
        return item

    def state_dict(self):
        return lambda: None

    def load_state_dict(self, state):
        pass


class DiesOfItem:
    """Has a state, and dies over the row 200, always."""

    def __call__(self, item):
        if 200 in item["ts"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    def state_dict(self):
        return 1

    def load_state_dict(self, state):
        pass


def place(value):
    """Where this process may run, and how many threads it was told to use."""
    return sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"]


def slept(seconds, item):
    time.sleep(seconds)


def a_is_even(batch):
    return batch["a"] % 2 == 0


def a_is_large(batch):
    return bool(batch["a"][0] >= 4)


def b_of(batch):
    return int(batch["b"][0])
