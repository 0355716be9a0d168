"""Run all benchmarks and write their figures as JSON and as Markdown tables beside it.

python bench/run.py [--quick] [--out docs/benchmarks/results.json]
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from peers import runner
from python import asyncio_messages, idle_cpu, one_to_one_latency, one_to_one_send_throughput, topologies

from dsline.bench import environment


def measure(quick: bool, cpp_loop: Path | None, futex: Path | None) -> dict[str, Any]:
    """Run everything; `quick` shows only that it runs."""
    sizes = (8, 4096, 1 << 20) if quick else runner.SIZES
    rounds, seconds = (1, 0.02) if quick else (5, 0.4)
    peers = runner.all_peers()
    return {
        "send_throughput": one_to_one_send_throughput.measure(
            sizes=sizes, rounds=rounds, seconds=seconds, program=cpp_loop
        ),
        "peers": runner.compare(peers, sizes=sizes, rounds=rounds, seconds=seconds),
        "peers_read": runner.compare(
            peers,
            sizes=tuple(size for size in sizes if size >= 1 << 20),
            rounds=rounds,
            seconds=seconds,
            touch="read",
        ),
        "topologies": topologies.measure(
            sizes=(64, 1 << 20) if quick else topologies.SIZES, rounds=rounds, seconds=seconds
        ),
        "latency": one_to_one_latency.measure(
            count=500 if quick else 20_000,
            asleep_count=20 if quick else 500,
            rounds=1 if quick else 3,
            futex=futex,
        ),
        "peers_round_trip": runner.compare_round_trips(peers, rounds=rounds, count=200 if quick else 2000),
        "idle": idle_cpu.measure(0.5 if quick else 2.0),
        "asyncio": asyncio_messages.measure(
            sizes=(64,) if quick else asyncio_messages.SIZES,
            rounds=rounds,
            seconds=seconds,
            idle_seconds=0.5 if quick else 5.0,
            trips=50 if quick else 3000,
        ),
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the figures of a report as Markdown."""
    idle = report["idle"]
    own, peers, read = report["send_throughput"], report["peers"], report["peers_read"]
    sections = [
        "# Measured",
        f"`{report['command']}`, {report['date']}",
        "\n".join(f"* {key}: {value}" for key, value in report["environment"].items()),
        "Throughput is the median (min to max) of interleaved rounds, two processes, not pinned. "
        "GB are 10**9 bytes of payload.",
        "## send() to each receiving call, messages/s",
        runner.table(own),
        "In GB/s:",
        runner.table(own, gigabytes=True),
        runner.paths(own),
        "Share of the limits of the same run:",
        one_to_one_send_throughput.ratios(own),
        "## Beside other ways between two processes, messages/s",
        runner.table(peers),
        "In GB/s:",
        runner.table(peers, gigabytes=True),
        "In GB/s, where the receiver reads every byte once:",
        runner.table(read, gigabytes=True),
        runner.paths(peers),
        "## One channel between several processes",
        topologies.sections(report["topologies"]),
        "## Round trip",
        one_to_one_latency.table(report["latency"]),
        "8 B, both sides as they come, the median of each figure over the rounds:",
        runner.round_trip_table(report["peers_round_trip"]),
        "## Idle",
        f"A receiver blocked for {idle['blocked_s']:.1f} s took {idle['cpu_us']:.0f} us of CPU, "
        f"{idle['share_of_a_cpu']:.3%} of one.",
        "## asyncio",
        asyncio_messages.tables(report["asyncio"]),
    ]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run all benchmarks.")
    parser.add_argument("--quick", action="store_true", help="one short round of each: shows that they run")
    parser.add_argument(
        "--out", type=Path, help="JSON file; the tables go beside it as .md (default: only print them)"
    )
    parser.add_argument("--cpp-loop", type=Path, help="program of the C++ loop over the same slots")
    parser.add_argument("--futex", type=Path, help="program that measures two bare futex wake-ups")
    options = parser.parse_args()
    report = {
        "command": shlex.join(["python", "bench/run.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        **measure(options.quick, options.cpp_loop, options.futex),
    }
    text = markdown(report)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
