"""Throughput of send() to each receiving call.

    P1 ──▶ C1   from P1's first send to the return of C1's last receive (dsline.bench.shm)

Beside it, in the same rounds: a copy into warm shared memory (numpy.copyto in one process), a method call
that does nothing, and the C++ loop over the same slots where its program is given. Not timed: starting
processes, creating channels, warm-up. Message 0 to 63 KiB are sent from seven prepared objects, larger ones
from one buffer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers.limits import LIMITS
from peers.message import ARRAYS_FROM
from peers.peer import SIZES, Spec
from peers.runner import paths, table, throughput

import dsline.bench

CALLS = ("recv", "recv_array", "recv_bytes")


def cpp_loop(program: Path, spec: Spec) -> float:
    """Return messages/s of the C++ loop: it prints one JSON object with messages_per_second."""
    command = [program, "--message-size", spec.size, "--count", spec.count, "--slots", spec.slots]
    if spec.cpus is not None:
        command += ["--cpus", ",".join(map(str, spec.cpus))]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120, check=True
    )
    return float(json.loads(done.stdout)["messages_per_second"])


def measure(
    *,
    sizes: tuple[int, ...] = SIZES,
    rounds: int = 5,
    seconds: float = 0.4,
    pin: bool = False,
    program: Path | None = None,
) -> list[dict[str, Any]]:
    """Return one row per size and path, in the form of `peers.runner.compare`."""
    cpus = dsline.bench.two_cpus() if pin else None

    def rate(name: str, size: int, count: int) -> float:
        for limit in LIMITS:
            if limit.name == name:
                return throughput(limit, Spec(size, count, cpus=cpus))
        if name == "C++ loop":
            assert program is not None
            return cpp_loop(program, Spec(size, count, cpus=cpus))
        kind = "array" if size >= ARRAYS_FROM else "bytes"
        result = dsline.bench.shm(
            size, count, path=name.removeprefix("dsline "), payload=kind, latency_count=0, pin=pin
        )
        return result.messages_per_second

    rows = []
    for size in sizes:
        calls = [call for call in CALLS if call != "recv_array" or size >= ARRAYS_FROM]
        described = {f"dsline {call}": dsline.bench.DATA_PATHS[call] for call in calls}
        if program is not None:
            described["C++ loop"] = "limit: the same slots without Python"
        described |= {limit.name: limit.path for limit in LIMITS if size in limit.sizes}
        counts: dict[str, int] = {}
        runs: dict[str, list[float]] = {name: [] for name in described}
        for turn in range(rounds + 1):
            for name in described:
                first = 20_000 if size < 64 << 10 else 100
                measured = rate(name, size, counts.get(name, first))
                if turn == 0:
                    counts[name] = max(first, min(int(measured * seconds), 4_000_000))
                else:
                    runs[name].append(measured)
                print(f"{size:>8} B  round {turn}  {name:<22} {measured:>12,.0f} messages/s", file=sys.stderr)
        for name, values in runs.items():
            median = statistics.median(values)
            rows.append(
                {
                    "peer": name,
                    "path": described[name],
                    "size": size,
                    "touch": "none",
                    "pinned": pin,
                    "limit": not name.startswith("dsline "),
                    "runs": values,
                    "failures": [],
                    "messages_per_second": median,
                    "gigabytes_per_second": median * size / 1e9,
                }
            )
    return rows


def ratios(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of recv against each limit: time of the limit / time of recv."""
    rate = {(row["peer"], row["size"]): row["messages_per_second"] for row in rows}
    limits = list(dict.fromkeys(row["peer"] for row in rows if row["limit"]))
    lines = ["| size | call | " + " | ".join(f"of {limit}" for limit in limits) + " |"]
    lines.append("|---" * (len(limits) + 2) + "|")
    for size in sorted({row["size"] for row in rows}):
        for call in CALLS:
            if (f"dsline {call}", size) not in rate:
                continue
            cells = [
                f"{rate[f'dsline {call}', size] / rate[limit, size]:.3f}" if (limit, size) in rate else "-"
                for limit in limits
            ]
            lines.append(f"| {size} | {call} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of send() to each receiving call.")
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="wanted duration of a run (%(default)s)")
    parser.add_argument("--pin", action="store_true", help="one CPU for each process")
    parser.add_argument("--cpp-loop", type=Path, help="program of the C++ loop over the same slots")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = measure(
        sizes=options.sizes,
        rounds=options.rounds,
        seconds=options.seconds,
        pin=options.pin,
        program=options.cpp_loop,
    )
    machine = dsline.bench.environment()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    print(f"\nMessages/s\n\n{table(rows)}\n\nGB/s\n\n{table(rows, gigabytes=True)}\n\n{paths(rows)}")
    print(f"\nShare of the limits\n\n{ratios(rows)}")
    if options.json:
        report = {"command": sys.argv, "environment": machine, "throughput": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
