"""Functions of the workers in test_dataflow_kills.py."""

import os
import signal
import time

import numpy as np

import dsline
from dsline.dataflow import control, edges, runtime, turns


def slow_double(value):
    time.sleep(0.001)
    return value * 2


def slow_same(value):
    time.sleep(0.001)
    return value


def slow_even(value):
    time.sleep(0.001)
    return value % 2 == 0


def is_even(value):
    return value % 2 == 0


def uneven_double(value):
    """Results are ready in another order than the items came in."""
    time.sleep(0.004 if value % 5 == 0 else 0.0005)
    return value * 2


def thrice(value):
    for number in range(3):
        time.sleep(0.0005)
        yield value * 10 + number


def record(value):
    """One row, with a key and a number."""
    return np.array([(value % 7, value)], dtype=[("key", "i8"), ("value", "i8")])


def frame(value):
    return np.full(3000, value, np.int64)


def value_of(rows):
    return [int(value) for value in rows["value"]]


def mean_of(array):
    time.sleep(0.001)
    return int(array.mean())


class DiesAt:
    """Gives items back as they are; its process dies, once, when the runtime comes to a point for the n-th time.

    Points: "intent" and "publish", before a result's intent and its publication; "sent", behind the publication; "release",
    behind the commit and before the release of the input; "released". The same of the end: "end sent", "end release", "end
    released".
    """

    def __init__(self, flag, point, number):
        self.flag, self.point, self.left, self.armed = flag, point, number, False

    def __call__(self, value):
        if not self.armed:
            self.armed = True
            self._arm()
        return value

    def _reached(self, point):
        if point != self.point:
            return
        self.left -= 1
        if self.left > 0:
            return
        try:
            os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:  # it has died before
            self.point = None
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def _arm(self):
        intend, send, done = edges.Output._intend, edges.Output.send, runtime.acknowledge
        send_control = edges.Output.control

        def intending(output, *arguments):
            self._reached("intent")
            intend(output, *arguments)
            self._reached("publish")

        def sending(output, *arguments):
            send(output, *arguments)
            self._reached("sent")

        def controlling(output, kind, *arguments):
            send_control(output, kind, *arguments)
            if kind == control.END:
                self._reached("end sent")

        def releasing(message):
            of = "end " if message._core_kind == control.END else ""
            self._reached(f"{of}release")
            done(message)
            self._reached(f"{of}released")

        edges.Output._intend, edges.Output.send = intending, sending
        runtime.acknowledge = turns.acknowledge = releasing
        edges.Output.control = controlling


class Numbers:
    """A source: the same numbers every time it is started."""

    def __init__(self, count):
        self.count = count

    def __call__(self):
        for number in range(self.count):
            time.sleep(0.001)
            yield number


class Appends:
    """A sink that writes each item to a file at once."""

    def __init__(self, path):
        self.path = path

    def __call__(self, item):
        time.sleep(0.001)
        with open(self.path, "a") as file:
            file.write(f"{item}\n")


def some_rows(value):
    """0 to 8 rows of columns, by the number."""
    return dsline.Batch(n=np.arange(value % 9) + 10 * value)


def some_records(value):
    time.sleep(0.001)
    return some_rows(value).to_records()


def count_rows(batch):
    time.sleep(0.001)
    return batch.n.copy()
