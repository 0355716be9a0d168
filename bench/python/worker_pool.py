"""Frames of 6 MiB through two worker processes, by dsline.WorkerPool and by other pools.

    M ──▶ {W1, W2} ──▶ M    for result in pool.map(function, frames)

Three functions: `first` returns one byte (what is measured is the way of the frame), `mean` its mean, `blur` a frame of the same
size (three taps along the rows, by slices). Results are taken in order; at most eight frames are under way where that can be said.

Timed: from the first frame that is made (a copy of one of five) to the last result, in one process per peer and round; peers
take turns. Not timed: starting the pool and twelve frames before. Also taken: the CPU seconds of that process and of all below it in that time.
All peers start workers by spawn, or in their own way (loky, Ray). Figures are medians over the rounds (least to most).
Checked: every result of the first frames entirely, every later one by the bytes at every 97th row and 89th column.

``--ray PYTHON`` adds Ray's tasks, in that interpreter (which needs ray and numpy, not dsline).
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SHAPE = (1024, 2048, 3)  # 6 MiB
WORKERS = 2
WINDOW = 8
WARM_UP = 12
FUNCTIONS = ("first", "mean", "blur")


def first(frame):
    return int(frame[0, 0, 0])


def mean(frame):
    return float(frame.mean())


def blur(frame):
    out = frame >> 1
    quarter = frame >> 2
    out[:, 1:] += quarter[:, :-1]
    out[:, :-1] += quarter[:, 1:]
    return out


def windowed(submit, result, frames):
    """Results in order, with a bounded number under way."""
    pending = collections.deque()
    for frame in frames:
        pending.append(submit(frame))
        if len(pending) >= WINDOW:
            yield result(pending.popleft())
    while pending:
        yield result(pending.popleft())


# --- peers: each yields the function that maps -------------------------------------------------------------------------


def no_pool(function):
    yield lambda frames: map(function, frames)


def dsline_pool(function):
    import dsline

    with dsline.WorkerPool(WORKERS) as pool:
        yield lambda frames: pool.map(function, frames, buffersize=WINDOW)


def dsline_views(function):
    import dsline

    with dsline.WorkerPool(WORKERS, copy=False) as pool:
        yield lambda frames: pool.map(function, frames, buffersize=WINDOW)


def multiprocessing_pool(function):
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        yield lambda frames: pool.imap(function, frames)


def process_pool_executor(function):
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda frames: windowed(
            lambda frame: pool.submit(function, frame), lambda f: f.result(), frames
        )


def loky(function):
    from joblib.externals.loky import get_reusable_executor

    pool = get_reusable_executor(WORKERS)
    yield lambda frames: windowed(lambda frame: pool.submit(function, frame), lambda f: f.result(), frames)
    pool.shutdown()


def joblib(function):
    from joblib import Parallel, delayed

    with Parallel(WORKERS, return_as="generator", pre_dispatch=WINDOW, batch_size=1) as pool:
        yield lambda frames: pool(delayed(function)(frame) for frame in frames)


def ray(function):
    import ray

    ray.init(num_cpus=WORKERS, object_store_memory=512 << 20, include_dashboard=False, logging_level="ERROR")
    remote = ray.remote(num_cpus=1)(function)
    yield lambda frames: windowed(lambda frame: remote.remote(ray.put(frame)), ray.get, frames)
    ray.shutdown()


PEERS = {
    "no pool: in this process": no_pool,
    "dsline.WorkerPool": dsline_pool,
    "dsline.WorkerPool(copy=False)": dsline_views,
    "multiprocessing.Pool.imap": multiprocessing_pool,
    "concurrent.futures": process_pool_executor,
    "loky": loky,
    "joblib": joblib,
    "Ray tasks": ray,
}


# --- one run, in a process of its own ----------------------------------------------------------------------------------


def cpu_seconds(root):
    """CPU time of a process and of all below it that live."""
    tick = os.sysconf("SC_CLK_TCK")
    times, parents = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            times[int(entry.name)] = (int(fields[11]) + int(fields[12])) / tick

    def below(pid):
        while pid not in (0, root):
            pid = parents.get(pid, 0)
        return pid == root

    return sum(seconds for pid, seconds in times.items() if below(pid))


def samples(result):
    return result[::97, ::89].tobytes() if isinstance(result, np.ndarray) else result


def run(peer, name, count):
    """Print what one run took, as JSON."""
    function = globals()[name]
    numbers = np.random.default_rng(6)
    frames = [numbers.integers(0, 256, SHAPE, np.uint8) for _ in range(5)]
    wanted = [function(frame) for frame in frames]
    short = [samples(each) for each in wanted]

    def stream(length):
        # A new array each, as a decoder would give them: joblib brings over an array only once.
        return (frames[i % 5].copy() for i in range(length))

    for mapped in PEERS[peer](function):
        done = 0
        for i, result in enumerate(mapped(stream(WARM_UP))):
            assert np.array_equal(result, wanted[i % 5])
            done += 1
        assert done == WARM_UP
        done = 0
        cpu = cpu_seconds(os.getpid())
        begin = time.perf_counter()
        for i, result in enumerate(mapped(stream(count))):
            assert samples(result) == short[i % 5]
            done += 1
        seconds = time.perf_counter() - begin
        cpu = cpu_seconds(os.getpid()) - cpu
        assert done == count
        print(json.dumps({"rate": count / seconds, "cpu": 1000 * cpu / count}), flush=True)


def spread(values, digits):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--ray", metavar="PYTHON")
    parser.add_argument("--only", metavar="PEER", action="append")
    parser.add_argument("--run", nargs=2, metavar=("PEER", "FUNCTION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(*options.run, options.frames)
        return
    wanted = {"dsline.WorkerPool", *(options.only or PEERS)} - (set() if options.ray else {"Ray tasks"})
    peers = [peer for peer in PEERS if peer in wanted]
    found = collections.defaultdict(list)
    for number in range(options.rounds):
        for name in FUNCTIONS:
            for peer in peers:
                python = options.ray if peer == "Ray tasks" else sys.executable
                command = [python, __file__, "--frames", str(options.frames), "--run", peer, name]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
                found[name, peer].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"\nafter {number + 1} of {options.rounds} rounds", flush=True)
        report(peers, found)


def report(peers, found):
    for name in FUNCTIONS:
        print(f"\n| {name} | frames/s | CPU ms a frame | times dsline's CPU |\n|---|---|---|---|")
        ours = statistics.median(each["cpu"] for each in found[name, "dsline.WorkerPool"])
        for peer in peers:
            rates = spread([each["rate"] for each in found[name, peer]], 0)
            cpus = [each["cpu"] for each in found[name, peer]]
            print(
                f"| {peer} | {rates} | {spread(cpus, 2)} | {statistics.median(cpus) / ours:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
