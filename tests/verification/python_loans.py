#!/usr/bin/env python3
"""Fills, publishes and keeps arrays at random in several processes, and checks that no array ever changes.

``python tests/verification/python_loans.py [--seconds 20] [--processes 4] [--seed N] [--json FILE]``

Every process sends and receives on one channel, from two threads. Loans are filled in place, published by a block, by hand
or by the other thread, aborted, or dropped; slices, reshapes, memoryviews and DLPack consumers of them are kept and dropped
in random order, before and after the publication; arrays of published loans, and slices of received ones, are kept and
looked at again later. The garbage collector runs at random, with references in cycles. Processes end, fork with open loans,
and are killed, and are replaced. Every element of an array follows from a number that its first elements hold with a check,
so a slot that is used again under anybody shows. Checked as well: publish never succeeds while a view that could write is
alive, what was aborted or dropped never arrives, and at the end every slot is free.

The long form runs this under AddressSanitizer, see docs/verification/index.md.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import gc
import json
import mmap
import os
import random
import signal
import sys
import threading
import time
import traceback
from typing import Any

import numpy as np

import dsline

CAPACITY = 24
LARGEST = 3000  # elements
PR_SET_PDEATHSIG = 1
COUNTS = (
    "published",
    "refused",
    "aborted",
    "dropped",
    "sent",
    "received",
    "kept",
    "looks",
    "forks",
    "collections",
    "failed",
)
UNPUBLISHED = 1 << 40  # numbers from here on must never arrive

libc = ctypes.CDLL(None)


def write(array: np.ndarray, number: int) -> None:
    """Fill it with what follows from `number`, through views that are gone afterwards."""
    flat = array.reshape(-1)
    flat[:] = np.arange(flat.size, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(number)


def number_in(array: np.ndarray) -> int:
    """The number that an array was written with; ValueError where it is not whole."""
    flat = np.asarray(array).reshape(-1)
    first = int(flat[0])
    expected = np.arange(flat.size, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(first)
    if not np.array_equal(flat, expected):
        at = int(np.argmin(flat == expected))
        raise ValueError(
            f"array of {first}: element {at} of {flat.size} is {int(flat[at])}, not {int(expected[at])}"
        )
    return first


class Cycle:
    """Keeps something until the garbage collector comes."""

    def __init__(self, held: object) -> None:
        self.held = held
        self.me = self


class Worker:
    """One thread of one process."""

    def __init__(self, channel: Any, counts: np.ndarray, seed: int, others: collections.deque[Any]) -> None:
        self.channel = channel
        self.counts = counts
        self.random = random.Random(seed)
        self.kept: list[tuple[Any, int, int]] = []  # array, the number it shows, its first element's index
        self.others = others  # loans for the other thread to publish
        self.number = self.random.randrange(1 << 38)

    def count(self, what: str) -> None:
        self.counts[COUNTS.index(what)] += 1

    def keep(self, array: Any, number: int, start: int = 0) -> None:
        self.kept.append((array, number, start))
        self.count("kept")

    def look(self) -> None:
        """At everything that is kept: it still is what it was."""
        for array, number, start in self.kept:
            flat = np.asarray(array).reshape(-1)
            expected = np.arange(start, start + flat.size, dtype=np.uint64) * np.uint64(
                2654435761
            ) + np.uint64(number)
            if not np.array_equal(flat, expected):
                raise ValueError(f"a kept array of {number} has changed: {flat[:4]} …")
            self.count("looks")

    def forget(self, some: int) -> None:
        while len(self.kept) > some:
            held = self.kept.pop(self.random.randrange(len(self.kept)))
            if self.random.random() < 0.2:
                Cycle(held[0])

    def views_of(self, array: np.ndarray) -> list[Any]:
        """Some that could write, and others that only name it."""
        rng = self.random
        makers = [
            lambda: array[rng.randrange(array.shape[0]) :],
            lambda: array.reshape(-1)[::3],
            lambda: array.T,
            lambda: memoryview(array),
            lambda: memoryview(array[1:]),
            lambda: array.__dlpack__(),
            lambda: np.from_dlpack(array),
            lambda: np.lib.stride_tricks.as_strided(array),
            lambda: array.view(np.uint8),
            lambda: array.flat,
        ]
        return [rng.choice(makers)() for _ in range(rng.randrange(1, 4))]

    def lend(self) -> None:
        rng = self.random
        shape = (
            (rng.randrange(2, LARGEST),)
            if rng.random() < 0.6
            else (rng.randrange(2, 50), rng.randrange(1, 60))
        )
        try:
            loan = self.channel.alloc(shape, np.uint64, timeout=0.02)
        except dsline.BufferFullError:
            self.forget(0)
            gc.collect()
            self.count("collections")
            return
        self.number += 1
        fate = rng.random()
        number = self.number if fate < 0.7 else UNPUBLISHED + self.number
        if rng.random() < 0.5:
            loan.meta["number"] = number
        write(loan.array, number)
        if fate < 0.7:
            self.publish(loan, number)
        elif fate < 0.8:
            with_views = self.views_of(loan.array) if rng.random() < 0.5 else []
            loan.abort()
            rng.shuffle(with_views)
            self.count("aborted")
        elif fate < 0.9:
            part = loan.array[1:] if rng.random() < 0.5 else None
            if part is not None and rng.random() < 0.5:
                Cycle(part)
            del loan
            self.count("dropped")
        else:
            try:
                with loan:
                    array = loan.array
                    if rng.random() < 0.5:
                        Cycle((loan, array))
                    raise KeyError
            except KeyError:
                self.count("aborted")

    def publish(self, loan: Any, number: int) -> None:
        rng = self.random
        views: list[Any] = []
        if rng.random() < 0.5:
            views = self.views_of(loan.array)
        while views:
            try:
                loan.publish()
            except BufferError:
                self.count("refused")
            else:
                raise AssertionError(f"published under {[type(view) for view in views]}")
            view = views.pop(rng.randrange(len(views)))
            if isinstance(view, memoryview) and rng.random() < 0.5:
                view.release()
            del view
        mine = loan.array if rng.random() < 0.5 else None
        how = rng.random()
        if how < 0.2 and mine is None:
            self.others.append(loan)
            return
        if how < 0.6:
            with loan:
                pass
        else:
            self.channel.publish(loan)
        self.count("published")
        if mine is not None:
            if mine.flags.writeable:
                raise AssertionError("a published array is writable")
            if rng.random() < 0.5:
                self.keep(mine, number)
            else:
                self.keep(mine[1:], number, 1) if mine.ndim == 1 else self.keep(memoryview(mine), number)
        if rng.random() < 0.3:
            Cycle((loan, mine))

    def publish_for_the_other(self) -> None:
        try:
            loan = self.others.popleft()
        except IndexError:
            return
        loan.publish()
        self.count("published")

    def send(self) -> None:
        self.number += 1
        array = np.empty(self.random.randrange(2, LARGEST), np.uint64)
        write(array, self.number)
        try:
            self.channel.send(array, timeout=0.02)
        except dsline.BufferFullError:
            self.forget(0)
            return
        self.count("sent")

    def receive(self) -> None:
        try:
            array = self.channel.recv_array(timeout=0.002)
        except dsline.BufferEmptyError:
            return
        number = number_in(array)
        if number >= UNPUBLISHED:
            raise ValueError(f"{number - UNPUBLISHED} arrived, which was never published")
        self.count("received")
        how = self.random.random()
        if how < 0.2:
            self.keep(array, number)
        elif how < 0.4 and array.ndim == 1:
            at = self.random.randrange(array.size)
            self.keep(array[at:], number, at)
        elif how < 0.5:
            Cycle(array)

    def fork(self) -> None:
        """A child has open loans and kept arrays of its parent, and writes through what it can."""
        loan = None
        try:
            loan = self.channel.alloc(500, np.uint64, timeout=0.02)
        except dsline.BufferFullError:
            return
        self.number += 1
        write(loan.array, self.number)
        part = loan.array[100:200]
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self.look()
                part[:] = 0
                try:
                    loan.publish()
                except dsline.LoanEndedError:
                    self.kept.clear()
                    code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        self.count("forks")
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            raise AssertionError("a forked child failed")
        del part
        loan.publish()
        self.count("published")

    def run(self, until: float, forks: bool) -> None:
        rng = self.random
        while time.monotonic() < until:
            what = rng.random()
            if what < 0.35:
                self.lend()
            elif what < 0.45:
                self.send()
            elif what < 0.85:
                self.receive()
            elif what < 0.9:
                self.publish_for_the_other()
            elif what < 0.905 and forks:
                self.fork()
            elif what < 0.97:
                self.look()
                self.forget(rng.randrange(4))
            else:
                gc.collect(rng.randrange(3))
                self.count("collections")
        self.look()
        self.kept.clear()


def live(channel: Any, counts: np.ndarray, seed: int, seconds: float) -> None:
    """What a process does: two threads, or one that forks."""
    parent = os.getppid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    failures: list[BaseException] = []
    others: collections.deque[Any] = collections.deque()
    until = time.monotonic() + seconds
    alone = seed % 3 == 0
    workers = [Worker(channel, counts[i], seed * 2 + i, others) for i in range(1 if alone else 2)]

    def work(worker: Worker) -> None:
        try:
            worker.run(until, alone)
        except BaseException as error:
            traceback.print_exc()
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers[1:]]
    for thread in threads:
        thread.start()
    work(workers[0])
    for thread in threads:
        thread.join()
    if failures:
        counts[0][COUNTS.index("failed")] += 1
    others.clear()
    workers.clear()
    gc.collect()
    if channel.stats().loans != 0 and not failures:
        print(f"{channel.stats().loans} loans are left", file=sys.stderr)
        counts[0][COUNTS.index("failed")] += 1
    channel.close()


def run(arguments: argparse.Namespace) -> dict[str, int]:
    rng = random.Random(arguments.seed)
    memory = mmap.mmap(-1, arguments.processes * 2 * len(COUNTS) * 8)
    counts = np.frombuffer(memory, np.int64).reshape(arguments.processes, 2, len(COUNTS))
    totals = {"lives": 0, "kills": 0}
    levels = (True, "strict")
    end = time.monotonic() + arguments.seconds
    channels = [
        dsline.ShmChannel(capacity=CAPACITY, slot_size=8192, checksum="full", zero_copy=level)
        for level in levels
    ]
    channel = channels[0]
    pids: dict[int, tuple[int, float]] = {}
    failed = 0
    while True:
        now = time.monotonic()
        while len(pids) < arguments.processes and now < end:
            place = next(i for i in range(arguments.processes) if i not in {p for p, _ in pids.values()})
            channel = rng.choice(channels)
            seed = rng.randrange(1 << 30)
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    live(channel, counts[place], seed, rng.uniform(0.2, 3))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            totals["lives"] += 1
            pids[pid] = (place, now)
        if rng.random() < 0.02 and pids:
            os.kill(rng.choice(list(pids)), signal.SIGKILL)
            totals["kills"] += 1
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del pids[pid]
                failed += os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL)
            elif now > end + 60:
                print(f"process {pid} does not come to its end", file=sys.stderr)
                os.kill(pid, signal.SIGKILL)
                failed += 1
        if not pids and now >= end:
            break
        time.sleep(0.01)
    leaked = 0
    for channel in channels:
        channel.check_peers()
        while True:
            try:
                number_in(channel.recv_array(timeout=0))
            except dsline.BufferEmptyError:
                break
        for letter in channel.dead_letters():
            letter.release()
            del letter
        stats = channel.stats()
        if stats.free_slots != CAPACITY or stats.corrupted:
            print(
                f"slots are missing at the end, or damaged: {stats}\n{channel.inspect().slots}",
                file=sys.stderr,
            )
            leaked += 1
        channel.close()
    for i, name in enumerate(COUNTS):
        totals[name] = int(counts[:, :, i].sum())
    totals["violations"] = totals.pop("failed") + failed + leaked
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {arguments.seed}, {dsline.build_config()['sanitize']} sanitizer", flush=True)
    totals = run(arguments)
    totals["sanitized"] = int(dsline.build_config()["sanitize"] != "none")
    print(", ".join(f"{value:,} {name}" for name, value in totals.items()))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(totals, file, indent=2)
    enough = all(
        totals[name] > 0 for name in ("published", "refused", "received", "looks", "aborted", "dropped")
    )
    if totals["violations"] or not enough:
        print("BAD" if totals["violations"] else "BAD: it has hardly done anything")
        return 1
    print("good")
    return 0


if __name__ == "__main__":
    sys.exit(main())
