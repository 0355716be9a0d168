"""Round trip of 8 B: both sides awake, and both asleep.

    P1 ──▶ C1 ──▶ P1

Awake: from P1's send to the return of its receive, as fast as the two can answer (dsline.bench.shm), pinned
to two CPUs and not pinned. Asleep: each side waits until the other has long gone to sleep before it sends;
the message carries the time of its send, and the round trip is the way there plus the way back, without the
pauses. The bare futex wake-ups beside it are measured the same way by a C++ program, where it is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import secrets
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dsline
import dsline.bench

WAIT_S = 10.0
STAMP = struct.Struct("=q")


def answer(name: str, count: int, pause: float, ways: Any, cpu: int | None) -> None:
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    with (
        dsline.ShmChannel.open(name, timeout=WAIT_S) as there,
        dsline.ShmChannel.open(f"{name}-back", timeout=WAIT_S) as back,
    ):
        there_ns = []
        for _ in range(count):
            message = there.recv()
            arrived = time.monotonic_ns()
            there_ns.append(arrived - STAMP.unpack(message)[0])
            del message
            time.sleep(pause)
            back.send(STAMP.pack(time.monotonic_ns()))
        ways.send(there_ns)


def asleep(count: int, pause: float, cpus: tuple[int, int] | None = None) -> dsline.bench.RoundTrip:
    """Ping-pong in which every send meets a sleeping receiver; `cpus` pins the two sides."""
    name = f"bench-{os.getpid()}-{secrets.token_hex(4)}"
    context = multiprocessing.get_context("spawn")
    with (
        dsline.ShmChannel.create(name, capacity=4, slot_size=64, timeout=WAIT_S) as there,
        dsline.ShmChannel.create(f"{name}-back", capacity=4, slot_size=64, timeout=WAIT_S) as back,
    ):
        ways, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=answer, args=(name, count, pause, theirs, cpus and cpus[1]), daemon=True
        )
        process.start()
        theirs.close()
        before = os.sched_getaffinity(0)
        if cpus is not None:
            os.sched_setaffinity(0, {cpus[0]})
        try:
            back_ns = []
            for _ in range(count):
                time.sleep(pause)
                there.send(STAMP.pack(time.monotonic_ns()))
                message = back.recv()
                arrived = time.monotonic_ns()
                back_ns.append(arrived - STAMP.unpack(message)[0])
                del message
            if not ways.poll(WAIT_S):
                raise RuntimeError("the answering process did not report")
            there_ns = ways.recv()
            process.join(WAIT_S)
        finally:
            os.sched_setaffinity(0, before)
            process.kill()
            process.join()
            there.unlink()
            back.unlink()
    # The first two messages also pay for starting the process and for mapping.
    return dsline.bench.RoundTrip.from_ns(a + b for a, b in zip(there_ns[2:], back_ns[2:], strict=True))


def bare_futex(
    program: Path, count: int, pause: float, cpus: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return what the program prints for two bare futex wake-ups, both sides asleep: one JSON object."""
    command = [str(program), "--count", str(count), "--pause-us", str(round(pause * 1e6))]
    if cpus is not None:
        command += ["--cpus", f"{cpus[0]},{cpus[1]}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(
    *,
    count: int = 20_000,
    asleep_count: int = 500,
    pause: float = 0.003,
    rounds: int = 3,
    futex: Path | None = None,
) -> list[dict[str, Any]]:
    """Return one row per way and round."""
    rows = []

    def keep(way: str, trips: dict[str, Any]) -> None:
        rows.append({"way": way, **trips})
        print(f"{way:<28} p50 {trips['p50_us']:8.2f} us  p99 {trips['p99_us']:8.2f} us", file=sys.stderr)

    pins = (True, False) if len(os.sched_getaffinity(0)) > 1 else (False,)
    for _ in range(rounds):
        for pin in pins:
            result = dsline.bench.shm(8, 1000, latency_count=count, pin=pin)
            assert result.round_trip is not None
            keep(f"awake, {'pinned' if pin else 'not pinned'}", dataclasses.asdict(result.round_trip))
        for pin in pins:
            first, second = sorted(os.sched_getaffinity(0))[:2] if pin else (0, 0)
            cpus = (first, second) if pin else None
            how = "pinned" if pin else "not pinned"
            keep(f"asleep, {how}", dataclasses.asdict(asleep(asleep_count, pause, cpus)))
            if futex is not None:
                keep(f"asleep, {how}, bare futex", bare_futex(futex, asleep_count, pause, cpus))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: of each way the round with the median p50."""
    lines = ["| round trip of 8 B | p50 us | p99 us | p99.9 us | max us |", "|---|---|---|---|---|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        ordered = sorted((row for row in rows if row["way"] == way), key=lambda row: row["p50_us"])
        middle = ordered[len(ordered) // 2]
        figures = [
            f"{middle[key]:.2f}" if key in middle else "-"
            for key in ("p50_us", "p99_us", "p999_us", "max_us")
        ]
        lines.append("| " + " | ".join([way, *figures]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Round trip of 8 B, awake and asleep.")
    parser.add_argument("--count", type=int, default=20_000, help="round trips awake (%(default)s)")
    parser.add_argument("--asleep-count", type=int, default=500, help="round trips asleep (%(default)s)")
    parser.add_argument(
        "--pause", type=float, default=0.003, help="seconds until the peer sleeps (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--futex", type=Path, help="program that measures two bare futex wake-ups")
    options = parser.parse_args()
    rows = measure(
        count=options.count,
        asleep_count=options.asleep_count,
        pause=options.pause,
        rounds=options.rounds,
        futex=options.futex,
    )
    print("\n".join(f"{key}: {value}" for key, value in dsline.bench.environment().items()))
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
