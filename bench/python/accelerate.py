"""Pool.map over 6 MiB arrays, with and without ``import dsline.accelerate``.

    M ──▶ {W1, W2} ──▶ M    multiprocessing.Pool(2).map(f, arrays, chunksize=1)

One program, byte for byte, run as ``python program.py`` and as ``python -c "import dsline.accelerate; run program.py"``. Timed:
the call of `map`, inside the program. Not timed: starting the pool, one warm-up call. The rows: f returns a number (arrays go
one way), f returns an array as large (there and back), and one array in a time over a Pipe and back.

Each run is in processes of its own; runs with and without the import take turns, and figures are medians (least to most).
Checked: the CRC of every array of the last call, there and back; the runs must print the same CRCs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import json
import multiprocessing
import sys
import time
import zlib

import numpy as np

size, count, repeats = (int(word) for word in sys.argv[1:4])


def crc(array):
    return zlib.crc32(array)


def first(array):
    return int(array[0])


def same(array):
    return array


def echo(connection):
    while (array := connection.recv()) is not None:
        connection.send(array)


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    numbers = np.random.default_rng(5)
    arrays = [numbers.integers(0, 256, size, np.uint8) for _ in range(count)]
    out = {"one way": [], "there and back": [], "Pipe, there and back": []}
    with context.Pool(2) as pool:
        sums = pool.map(crc, arrays, chunksize=1)
        for _ in range(repeats):
            begin = time.perf_counter()
            pool.map(first, arrays, chunksize=1)
            out["one way"].append((time.perf_counter() - begin) / count)
        pool.map(same, arrays, chunksize=1)
        for _ in range(repeats):
            begin = time.perf_counter()
            back = pool.map(same, arrays, chunksize=1)
            out["there and back"].append((time.perf_counter() - begin) / count)
    ours, theirs = context.Pipe()
    process = context.Process(target=echo, args=(theirs,))
    process.start()
    for _ in range(repeats):
        begin = time.perf_counter()
        for array in arrays:
            ours.send(array)
            got = ours.recv()
        out["Pipe, there and back"].append((time.perf_counter() - begin) / count)
    ours.send(None)
    process.join()
    sums += [crc(array) for array in back] + [crc(got)]
    print(json.dumps({"seconds": out, "sums": sums}))
"""

RUN_WITH_IMPORT = """
import sys, runpy
import dsline.accelerate
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert dsline.accelerate.stats().sent > 0
print(dsline.accelerate.stats(), file=sys.stderr)
"""


def run(program: Path, accelerated: bool, *arguments: int) -> dict[str, object]:
    command = [sys.executable, *(("-c", RUN_WITH_IMPORT) if accelerated else ()), str(program)]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=600
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=6 << 20, help="bytes of an array")
    parser.add_argument("--count", type=int, default=24, help="arrays per call of map")
    parser.add_argument("--repeats", type=int, default=3, help="calls per run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.repeats, options.count = 1, 1, 4
    times: dict[str, dict[bool, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(PROGRAM)
        sums = set()
        for _ in range(options.rounds):
            for accelerated in (False, True):
                found = run(program, accelerated, options.size, options.count, options.repeats)
                sums.add(json.dumps(found["sums"]))
                for row, seconds in found["seconds"].items():  # type: ignore[attr-defined]
                    cell = times.setdefault(row, {}).setdefault(accelerated, [])
                    cell.append(statistics.median(seconds))
        assert len(sums) == 1, "the results differ"
    print(f"ms per array of {options.size} bytes\n")
    print("| | as it is | with the import | ratio |\n|---|---|---|---|")
    for row, cells in times.items():
        shown = [
            f"{statistics.median(cell) * 1e3:.2f} ({min(cell) * 1e3:.2f} to {max(cell) * 1e3:.2f})"
            for cell in (cells[False], cells[True])
        ]
        ratio = statistics.median(cells[False]) / statistics.median(cells[True])
        print(f"| {row} | {shown[0]} | {shown[1]} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
