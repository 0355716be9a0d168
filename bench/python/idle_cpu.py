"""CPU that a blocked receiver burns.

    (nobody) ──▶ C1   processor time of the process during one recv(timeout=...) on an empty channel

The time of all threads in user and kernel mode counts, divided by the time on the wall.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import time
from typing import Any

import dsline
import dsline.bench


def measure(seconds: float = 2.0) -> dict[str, Any]:
    """Block for `seconds` and return the share of one CPU that it took."""
    name = f"bench-{os.getpid()}-{secrets.token_hex(4)}"
    with dsline.ShmChannel.create(name, capacity=4, slot_size=64) as channel:
        try:
            wall, cpu = time.monotonic_ns(), time.process_time_ns()
            with contextlib.suppress(dsline.BufferEmptyError):
                channel.recv(timeout=seconds)
            cpu, wall = time.process_time_ns() - cpu, time.monotonic_ns() - wall
        finally:
            channel.unlink()
    return {"blocked_s": wall / 1e9, "cpu_us": cpu / 1e3, "share_of_a_cpu": cpu / wall}


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU that a blocked receiver burns.")
    parser.add_argument("--seconds", type=float, default=2.0)
    result = measure(parser.parse_args().seconds)
    print("\n".join(f"{key}: {value}" for key, value in dsline.bench.environment().items()))
    print(f"\n{result['blocked_s']:.2f} s blocked: {result['cpu_us']:.0f} us of CPU, ", end="")
    print(f"{result['share_of_a_cpu']:.4%} of one")


if __name__ == "__main__":
    main()
