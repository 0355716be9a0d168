"""Run one C++ benchmark built from two commits in turn, and print how they compare.

    python bench/before_and_after.py BEFORE AFTER [--sizes 64,4096,1048576] [--rounds 9] [--pin]

BEFORE and AFTER are two builds of bench/cpp/one_to_one_send_throughput (bench/README.md says how to make them). In every
round each runs once per size, which of them first changes from round to round. A ratio is that of one round, so that a
change of the machine's speed meets both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.peer import Spec
from peers.runner import human_rate, human_size
from python.one_to_one_send_throughput import cpp_loop

from dsline.bench import environment, two_cpus


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two builds of the C++ throughput benchmark.")
    parser.add_argument("before", type=Path, help="program built from the commit before")
    parser.add_argument("after", type=Path, help="program built from the commit after")
    parser.add_argument(
        "--sizes", type=lambda text: tuple(map(int, text.split(","))), default=(64, 4096, 1 << 20)
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="wanted duration of a run (%(default)s)")
    parser.add_argument("--pin", action="store_true", help="one CPU for each process")
    options = parser.parse_args()
    cpus = two_cpus() if options.pin else None
    programs = (options.before, options.after)
    print("\n".join(f"* {key}: {value}" for key, value in environment().items()))
    print(f"\n| messages/s, {'pinned' if options.pin else 'not pinned'} | before | after | after / before |")
    print("|---|---|---|---|")
    for size in options.sizes:
        first = cpp_loop(options.before, Spec(size, 2000, cpus=cpus))
        count = max(2000, min(int(first * options.seconds), 10_000_000))
        rates: tuple[list[float], list[float]] = ([], [])
        for turn in range(options.rounds):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                rates[which].append(cpp_loop(programs[which], Spec(size, count, cpus=cpus)))
        ratios = [after / before for before, after in zip(*rates, strict=True)]
        cells = [
            f"{human_rate(statistics.median(values))} ({human_rate(min(values))} to {human_rate(max(values))})"
            for values in rates
        ]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {human_size(size)} | {' | '.join(cells)} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
