"""What a message costs that is filled in place (alloc and publish), beside one that is copied by send().

    P ──▶ C     one sender, one receiver, each in a process of its own, on one channel of 8 slots

For each size, in rounds that take turns: `send` of an array, `alloc`/`publish`, the same with the array kept until the next
one, and with zero_copy="strict". The sender of a loan writes the message's number to both ends of the array and leaves the
rest as it is, so that what is left is the cost of the calls; a real producer fills all of it, which it would have to do
somewhere in any case. Timed: N messages from the first call to the receiver's word that it has the last one, per message;
and, as medians over all messages, the calls alloc() and publish() themselves. Not timed: starting processes, opening, and
twice as many messages as there are slots before, which touch every page. Checked: the number at both ends of every message.

    python bench/python/loans.py [--rounds 5] [--sizes 4096,65536,…] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import dsline

SLOTS = 8
SIZES = (4 << 10, 64 << 10, 1 << 20, 6 << 20, 16 << 20, 64 << 20)
WAYS = ("send", "alloc", "alloc, kept", "alloc, strict")


def receive(channel: dsline.ShmChannel, count: int, reply: Connection) -> None:
    """Take `count` messages and look at both ends of each."""
    with channel:
        reply.send("ready")
        for number in range(-2 * SLOTS, count):
            array = channel.recv_array()
            if array[0] != number or array[-1] != number:
                raise ValueError(f"message {number} holds {array[0]} … {array[-1]}")
            del array
            if number in (-1, count - 1):
                reply.send(number)


def lend(channel: Any, size: int, number: int, keep: bool) -> tuple[int, int, Any]:
    """One message by alloc and publish: the nanoseconds of both calls, and what is kept of it."""
    before = time.perf_counter_ns()
    loan = channel.alloc(size // 8, np.int64)
    between = time.perf_counter_ns()
    array = loan.array
    array[0] = array[-1] = number
    if not keep:
        del array
    filled = time.perf_counter_ns()
    loan.publish()
    return between - before, time.perf_counter_ns() - filled, array if keep else None


def run(way: str, size: int, count: int) -> dict[str, float]:
    """One round of `count` messages."""
    flag: Any = "strict" if way.endswith("strict") else True
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    with dsline.ShmChannel(
        capacity=SLOTS, slot_size=size, max_message_size=size, zero_copy=flag, timeout=60
    ) as channel:
        receiver = context.Process(target=receive, args=(channel, count, theirs))
        receiver.start()
        theirs.close()
        mine.recv()
        array = np.zeros(size // 8, np.int64)
        calls = np.zeros((2, count), np.int64)
        kept = None
        for first, last in ((-2 * SLOTS, 0), (0, count)):
            start = time.perf_counter_ns()
            for number in range(first, last):
                if way == "send":
                    array[0] = array[-1] = number
                    before = time.perf_counter_ns()
                    channel.send(array)
                    if number >= 0:
                        calls[0, number] = time.perf_counter_ns() - before
                else:
                    alloc, publish, kept = lend(channel, size, number, way.endswith("kept"))
                    if number >= 0:
                        calls[:, number] = alloc, publish
            mine.recv()
            taken = time.perf_counter_ns() - start
        del kept
        receiver.join()
        if receiver.exitcode != 0:
            raise RuntimeError(f"the receiver ended with {receiver.exitcode}")
    return {
        "message_us": taken / count / 1e3,
        "first_call_us": float(np.median(calls[0])) / 1e3,
        "publish_us": float(np.median(calls[1])) / 1e3,
    }


def text(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=lambda words: [int(word) for word in words.split(",")], default=SIZES)
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--json")
    options = parser.parse_args()
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for size in options.sizes:
        count = max(100, min(options.messages, (2 << 30) // size))
        rows = results[text(size)] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                rows[way].append(run(way, size, count))
        for way in WAYS:
            each = {key: [one[key] for one in rows[way]] for key in rows[way][0]}
            middle = {key: statistics.median(values) for key, values in each.items()}
            low, high = min(each["message_us"]), max(each["message_us"])
            calls = (
                f"send {middle['first_call_us']:.2f}"
                if way == "send"
                else (f"alloc {middle['first_call_us']:.2f}, publish {middle['publish_us']:.2f}")
            )
            print(
                f"{text(size):>8}  {way:<14} {middle['message_us']:9.2f} µs a message ({low:.2f} to {high:.2f}); {calls} µs",
                flush=True,
            )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
