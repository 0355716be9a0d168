"""Throughput of one channel between several processes.

    P1 ──▶ {C1 … Cn}     work queue: n = 1, 2, 4 members of one group compete; each message goes to one of them
    P1 ──▶ C1, …, Cn     broadcast: n = 1, 2, 4 groups with one member each; each message goes to all of them
    {P1 … P4} ──▶ C1     four senders, one receiver

From the first send of the producers to the moment when the last consumer has been told that the channel is drained.
Figures count messages sent: a broadcast to 4 groups delivers each of them four times. Not timed: starting processes,
opening, and warm-up messages that touch every page. More processes than CPUs share them, so the tables show what
sharing costs, not how it scales.

Every process is started anew for each run. Checked: that each group received every message exactly once (counts), every
byte of each consumer's first messages, and length and number of every 256th (every 16th from 64 KiB on).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers.message import ARRAYS_FROM
from peers.runner import Crew, table

import dsline
import dsline.bench
from dsline.bench import Payloads

SIZES = (64, 4096, 1 << 20)
CHECKED_WHOLE = 16
MOST_BYTES = 4 << 30  # of payload in one run
LEAST = 200


@dataclasses.dataclass(frozen=True)
class Shape:
    """Who sends and who receives."""

    name: str
    producers: int
    consumers: int
    groups: bool = False

    @property
    def deliveries(self) -> int:
        """Of one message."""
        return self.consumers if self.groups else 1


SHAPES = (
    *(Shape(f"1 sender, {n} competing", 1, n) for n in (1, 2, 4)),
    *(Shape(f"1 sender, {n} group{'s' if n > 1 else ''}", 1, n, groups=True) for n in (1, 2, 4)),
    Shape("4 senders, 1 receiver", 4, 1),
)


def _messages(size: int) -> Payloads:
    return Payloads(size, "array" if size >= ARRAYS_FROM else "bytes")


def _slots(size: int) -> int:
    """As for the peers: 8 MiB worth, but enough for what every consumer holds."""
    return max(8, min(64, (8 << 20) // size))


def _number(message: Any) -> int:
    return int.from_bytes(bytes(memoryview(message)[:8]), sys.byteorder)


def _produce(channel: Any, size: int, warmup: int, count: int, control: Connection) -> None:
    stream = _messages(size).stream()
    for message in itertools.islice(stream, warmup):
        channel.send(message)
    control.send("warm")
    control.recv()
    start = time.monotonic_ns()
    for message in itertools.islice(stream, count):
        channel.send(message)
    control.send(start)
    control.recv()
    channel.close()


def _consume(channel: Any, size: int, group: str | None, control: Connection) -> None:
    receiver = channel if group is None else channel.subscribe(group)
    messages = _messages(size)
    recv, every = receiver.recv, messages.check_every
    control.send("ready")
    with contextlib.suppress(dsline.ChannelClosedError):
        for _ in range(CHECKED_WHOLE):
            message = recv()
            if not messages.equals(message, _number(message)):
                raise RuntimeError("a message arrived damaged")
            del message
        while True:
            message = recv()
            if not messages.has_head(message, _number(message)):
                raise RuntimeError("a message arrived damaged")
            del message
            for _ in range(every - 1):
                recv()
    control.send((time.monotonic_ns(), receiver.stats().received))
    receiver.close()


def throughput(shape: Shape, size: int, count: int) -> float:
    """Run once and return messages per second."""
    context = multiprocessing.get_context("spawn")
    kind = dsline.Broadcast if shape.groups else dsline.ShmChannel
    share = -(-count // shape.producers)
    warmup = -(-(2 * _slots(size) + CHECKED_WHOLE * shape.consumers) // shape.producers)
    with kind(capacity=_slots(size), slot_size=size) as channel, Crew(context) as crew:
        consumers = [
            crew.start(_consume, channel, size, f"group {number}" if shape.groups else None)
            for number in range(shape.consumers)
        ]
        for pipe in consumers:
            crew.hear(pipe)
        producers = [crew.start(_produce, channel, size, warmup, share) for _ in range(shape.producers)]
        for pipe in producers:
            crew.hear(pipe)
        while channel.inspect().waiting:
            time.sleep(0.001)
        for pipe in producers:
            pipe.send("go")
        start = min(crew.hear(pipe) for pipe in producers)
        channel.shutdown()
        ends, received = zip(*(crew.hear(pipe) for pipe in consumers), strict=True)
        for pipe in producers:
            pipe.send("all arrived")
    sent = (warmup + share) * shape.producers
    if sum(received) != sent * shape.deliveries or (shape.groups and set(received) != {sent}):
        raise RuntimeError(f"{sent} messages were sent, received were {received}")
    return share * shape.producers / ((max(ends) - start) / 1e9)


def measure(
    *,
    shapes: tuple[Shape, ...] = SHAPES,
    sizes: tuple[int, ...] = SIZES,
    rounds: int = 5,
    seconds: float = 0.4,
) -> list[dict[str, Any]]:
    """Return one row per shape and size, in the form of `peers.runner.compare`."""
    rows = []
    for size in sizes:
        counts: dict[str, int] = {}
        runs: dict[str, list[float]] = {shape.name: [] for shape in shapes}
        for turn in range(rounds + 1):
            for shape in shapes:
                rate = throughput(shape, size, counts.get(shape.name, 2000 if size < 1 << 20 else LEAST))
                if turn == 0:
                    counts[shape.name] = max(LEAST, min(int(rate * seconds), MOST_BYTES // size, 2_000_000))
                else:
                    runs[shape.name].append(rate)
                print(
                    f"{size:>8} B  round {turn}  {shape.name:<24} {rate:>12,.0f} messages/s", file=sys.stderr
                )
        for shape in shapes:
            median = statistics.median(runs[shape.name])
            rows.append(
                {
                    "peer": shape.name,
                    "path": f"{shape.producers} sending, {shape.consumers} receiving processes; "
                    f"each message is delivered {shape.deliveries}x",
                    "size": size,
                    "touch": "none",
                    "pinned": False,
                    "limit": False,
                    "runs": runs[shape.name],
                    "failures": [],
                    "messages_per_second": median,
                    "gigabytes_per_second": median * size / 1e9,
                    "deliveries": shape.deliveries,
                }
            )
    return rows


def shares(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: each shape's deliveries against one sender with one receiver."""
    rate = {(row["peer"], row["size"]): row["messages_per_second"] * row["deliveries"] for row in rows}
    sizes = sorted({row["size"] for row in rows})
    names = list(dict.fromkeys(row["peer"] for row in rows))
    base = SHAPES[0].name
    if any((base, size) not in rate for size in sizes):
        return ""
    lines = ["| deliveries, as a share of one to one | " + " | ".join(f"{size} B" for size in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for name in names:
        cells = [f"{rate[name, size] / rate[base, size]:.2f}" for size in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sections(rows: list[dict[str, Any]]) -> str:
    """Return the tables as they stand in docs/benchmarks."""
    return "\n\n".join(
        [
            "Messages sent per second:",
            table(rows),
            "GB (10**9 bytes of payload) sent per second:",
            table(rows, gigabytes=True),
            "Deliveries against those of one sender and one receiver:",
            shares(rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of one channel between several processes.")
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="wanted duration of a run (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if min(options.sizes) < 8 or options.rounds < 1:
        parser.error("--sizes takes 8 bytes and more, --rounds 1 and more")
    rows = measure(sizes=options.sizes, rounds=options.rounds, seconds=options.seconds)
    machine = dsline.bench.environment()
    print("\n".join(f"* {key}: {value}" for key, value in machine.items()))
    print(f"\n{sections(rows)}")
    if options.json:
        report = {"command": sys.argv, "environment": machine, "throughput": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
