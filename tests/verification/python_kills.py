#!/usr/bin/env python3
"""Kills Python processes at random while they pass arrays to each other, and checks what arrived.

``python tests/verification/python_kills.py [--seconds 15] [--seed N] [--json FILE]``

Senders, competing receivers and the members of a second, durable group run in processes of their own. One of them is
killed every few milliseconds (SIGKILL, sometimes SIGSTOP for longer than a wait slice, now and then all at once) and
replaced. What was meant to be sent, what `send` returned for and what arrived is written to plain shared memory outside
the channel. Checked: every message whose `send` returned arrives in both groups, whole; a second time only with
`redelivered`; at the end every slot is free again and nothing is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np

import dsline

SENDERS = 2
MOST = 200_000  # messages of one sender at most
MAX_DELIVERIES = 15
GROUP = "archive"
DTYPES = (np.uint8, np.int16, np.float32, np.float64)
PR_SET_PDEATHSIG = 1


def shared(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that children of this process share with it."""
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)


class Log:
    """What happened, outside the channel. Every cell has one writer at a time."""

    def __init__(self) -> None:
        self.meant = shared((SENDERS,), np.int64)  # sends that were begun
        self.sent = shared((SENDERS, MOST), np.uint8)  # 1: send returned
        self.got = shared((2, SENDERS, MOST), np.uint8)  # deliveries, by group
        self.unflagged = shared((2, SENDERS, MOST), np.uint8)  # of them without `redelivered`
        self.torn = shared((1,), np.int64)
        self.failed = shared((1,), np.int64)
        self.stop = shared((1,), np.int64)


def payload(sender: int, number: int) -> np.ndarray:
    """The array of a message: every element depends on sender and number."""
    mixed = np.random.SeedSequence([sender, number]).generate_state(2)
    dtype = np.dtype(DTYPES[int(mixed[0]) % len(DTYPES)])
    size = int(mixed[1]) % 3000 + 1 if number % 50 else 200_000
    return (np.arange(size, dtype=np.uint32) * np.uint32(2654435761) + mixed[0]).astype(dtype)


def send(log: Log, channel: dsline.ShmChannel, sender: int) -> None:
    while not log.stop[0] and log.meant[sender] < MOST:
        number = int(log.meant[sender])
        array = payload(sender, number)
        log.meant[sender] = number + 1
        with contextlib.suppress(dsline.BufferFullError):
            channel.send(array, meta={"sender": sender, "number": number}, timeout=1.0)
            log.sent[sender, number] = 1


def receive(log: Log, source: dsline.ShmChannel, group: int) -> None:
    while True:
        try:
            message = source.recv_message(timeout=0.2)
        except dsline.BufferEmptyError:
            if log.stop[0]:
                return
            continue
        array = message.array()
        sender, number = message.meta["sender"], message.meta["number"]
        if not np.array_equal(array, payload(sender, number)):
            log.torn[0] += 1
        log.got[group, sender, number] += 1
        log.unflagged[group, sender, number] += not message.redelivered
        del array
        message.release()


@dataclasses.dataclass
class Role:
    work: Callable[[], None]
    pid: int = 0

    def start(self, log: Log) -> None:
        self.pid = os.fork()
        if self.pid != 0:
            return
        code = 0
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            self.work()
        except BaseException:
            traceback.print_exc()
            log.failed[0] += 1
            code = 1
        dsline._core.leave_all()
        os._exit(code)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def run(seconds: float, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    log = Log()
    name = f"kills-{os.getpid()}"
    channel = dsline.ShmChannel.create(name, capacity=32, slot_size=16384, max_deliveries=MAX_DELIVERIES)
    archive = channel.subscribe(GROUP, durable=True)
    roles = [
        Role(lambda sender=sender: send(log, dsline.ShmChannel.open(name), sender))
        for sender in range(SENDERS)
    ]
    roles += [Role(lambda: receive(log, dsline.ShmChannel.open(name), 0)) for _ in range(2)]
    roles += [
        Role(lambda: receive(log, dsline.ShmChannel.open(name).subscribe(GROUP, durable=True), 1))
        for _ in range(2)
    ]
    kills = stops = everybody = 0
    try:
        for role in roles:
            role.start(log)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.002, 0.03))
            dice = rng.random()
            if dice < 0.02:
                for role in roles:
                    role.kill()
                for role in roles:
                    role.start(log)
                kills += len(roles)
                everybody += 1
                continue
            role = rng.choice(roles)
            if dice < 0.1:
                os.kill(role.pid, signal.SIGSTOP)
                time.sleep(rng.uniform(0.01, 0.15))
                os.kill(role.pid, signal.SIGCONT)
                stops += 1
                continue
            role.kill()
            role.start(log)
            kills += 1
        log.stop[0] = 1
        deadline = time.monotonic() + 60
        for role in roles:
            while os.waitpid(role.pid, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"process {role.pid} stands still; {channel.stats()}")
                time.sleep(0.01)
            role.pid = 0
        channel.check_peers()
        receive(log, channel, 0)
        receive(log, archive, 1)
        for letter in channel.dead_letters():
            group = 1 if letter.group == GROUP else 0
            log.got[group, letter.meta["sender"], letter.meta["number"]] += 1
            letter.release()
        stats = channel.stats()
    finally:
        for role in roles:
            if role.pid > 0:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(role.pid, signal.SIGCONT)
                    role.kill()
        archive.close()
        channel.unlink()
        channel.close()
    sent = log.sent == 1
    return {
        "seed": seed,
        "kills": kills,
        "stops": stops,
        "everybody": everybody,
        "sent": int(sent.sum()),
        "lost": int(sum((log.got[group] == 0)[sent].sum() for group in range(2))),
        "torn": int(log.torn[0]),
        "redelivered": int(log.got.sum() - log.unflagged.sum()),
        "unflagged_duplicates": int((log.unflagged > 1).sum()),
        "failed_processes": int(log.failed[0]),
        "leaked_slots": stats.capacity - stats.free_slots,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--json")
    options = parser.parse_args()
    result = run(options.seconds, options.seed)
    print(" ".join(f"{key}={value}" for key, value in result.items()), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"program": "python_kills", **result}, file)
    bad = ("lost", "torn", "unflagged_duplicates", "failed_processes", "leaked_slots")
    return int(any(result[key] for key in bad) or not result["kills"] or not result["sent"])


if __name__ == "__main__":
    sys.exit(main())
