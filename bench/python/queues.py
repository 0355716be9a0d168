"""Queues of Python objects between two processes: dsline.Queue, multiprocessing.Queue, faster-fifo.

    P1 put() ──▶ get() C1    from the first put to the return of the last get

Objects: 64 bytes, a tuple of 64 bytes of content, a dict with one array of 1 MiB and of 6 MiB. The receiver's arrays are its
own and can be written, for every queue. Bounds are the same for all: room for 64 small objects, or 8 with arrays; faster-fifo
bounds bytes, so it gets as many bytes as that takes. "any number" rows are the default constructors (maxsize=0). faster-fifo
is also run by get_many(), its documented way to more throughput, with room for 10,000 small objects.

Every process is started anew for each run; starting it and the warm-up are not timed. Checked: every 16th object's number,
and every byte of the first 64 and of the last objects.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers.runner import Crew, human_rate

import dsline
from dsline.bench import environment

KINDS = ("bytes 64 B", "tuple 64 B", "dict of 1 MiB", "dict of 6 MiB")
DIFFERENT = 16
WHOLE = 64
LEAST = {"bytes 64 B": 20_000, "tuple 64 B": 20_000, "dict of 1 MiB": 200, "dict of 6 MiB": 60}


def _array_bytes(kind: str) -> int:
    return 0 if "64 B" in kind else int(kind.split()[2]) << 20


def _bound(kind: str) -> int:
    return 8 if _array_bytes(kind) else 64


def objects(kind: str) -> list[Any]:
    """The objects that are put in turn; number i is the i-th."""
    made: list[Any] = []
    for number in range(DIFFERENT):
        filler = bytes((number * 31 + at) % 251 for at in range(63))
        if kind == "bytes 64 B":
            made.append(bytes([number]) + filler)
        elif kind == "tuple 64 B":
            made.append((number, 1.5 * number, f"name {number:04d}", filler[:39]))
        else:
            array = np.arange(number, number + _array_bytes(kind) // 4, dtype=np.float32)
            made.append({"number": number, "array": array})
    return made


def number_of(got: Any) -> int:
    return int(got["number"] if type(got) is dict else got[0])


def is_whole(got: Any, wanted: Any) -> bool:
    if type(got) is not dict:
        return bool(got == wanted)
    return (
        got.keys() == wanted.keys()
        and got["array"].dtype == wanted["array"].dtype
        and got["array"].flags.writeable
        and np.array_equal(got["array"], wanted["array"])
    )


@dataclasses.dataclass(frozen=True)
class Peer:
    """A queue: how it is made, and how a stream of objects is got from it."""

    name: str
    make: Callable[[Any, str], Any]
    many: bool = False
    kinds: tuple[str, ...] = KINDS


def _dsline(context: Any, kind: str) -> Any:
    return dsline.Queue(_bound(kind), ctx=context)


def _dsline_any(context: Any, kind: str) -> Any:
    return dsline.Queue(ctx=context)


def _theirs(context: Any, kind: str) -> Any:
    return context.Queue(_bound(kind))


def _theirs_any(context: Any, kind: str) -> Any:
    return context.Queue()


def _fifo(context: Any, kind: str) -> Any:
    import faster_fifo
    import faster_fifo_reduction  # noqa: F401  (its queues travel to other processes)

    each = _array_bytes(kind) + 1024 if _array_bytes(kind) else 128
    return faster_fifo.Queue(max_size_bytes=_bound(kind) * each)


def _fifo_many(context: Any, kind: str) -> Any:
    import faster_fifo
    import faster_fifo_reduction  # noqa: F401

    each = _array_bytes(kind) + 1024 if _array_bytes(kind) else 128
    return faster_fifo.Queue(max_size_bytes=(_bound(kind) if _array_bytes(kind) else 10_000) * each)


PEERS = [
    Peer("dsline.Queue", _dsline),
    Peer("mp.Queue", _theirs),
    Peer("faster-fifo", _fifo),
    Peer("faster-fifo get_many", _fifo_many, many=True),
    Peer("dsline.Queue, any number", _dsline_any, kinds=KINDS[:2]),
    Peer("mp.Queue, any number", _theirs_any, kinds=KINDS[:2]),
]


def _put_main(peer: Peer, queue: Any, kind: str, count: int, control: Connection) -> None:
    made = objects(kind)
    put = queue.put
    for number in range(WHOLE):
        put(made[number % DIFFERENT])
    control.send("warm")
    control.recv()
    start = time.monotonic_ns()
    for _ in range(count // DIFFERENT):
        for one in made:
            put(one)
    control.send(start)
    control.recv()  # the receiver has everything
    if "mp." in peer.name:
        queue.close()
        queue.join_thread()


def _get_main(peer: Peer, queue: Any, kind: str, count: int, control: Connection) -> None:
    made = objects(kind)
    seen = 0

    def stream(wanted: int) -> Any:
        if not peer.many:
            get = queue.get
            for _ in range(wanted):
                yield get(timeout=60)
            return
        got = 0
        while got < wanted:
            found = queue.get_many(timeout=60, max_messages_to_get=min(1000, wanted - got))
            got += len(found)
            yield from found

    for number, got in enumerate(stream(WHOLE)):
        if not is_whole(got, made[number % DIFFERENT]):
            raise RuntimeError(f"{peer.name}: object {number} arrived damaged")
    control.send("warm")
    if peer.many:
        for got in stream(count):
            if seen % DIFFERENT == 0 and number_of(got) != 0:
                raise RuntimeError(f"{peer.name}: object {seen} arrived out of order")
            seen += 1
    else:
        get = queue.get
        for _ in range(count // DIFFERENT):
            if number_of(get()) != 0:
                raise RuntimeError(f"{peer.name}: object {seen} arrived out of order")
            for _ in range(DIFFERENT - 1):
                got = get()
    end = time.monotonic_ns()
    if not is_whole(got, made[DIFFERENT - 1]):
        raise RuntimeError(f"{peer.name}: the last object arrived damaged")
    control.send(end)


def throughput(peer: Peer, kind: str, count: int) -> float:
    """Run once and return objects per second."""
    context = multiprocessing.get_context("spawn")
    queue = peer.make(context, kind)
    with Crew(context) as crew:
        getter = crew.start(_get_main, peer, queue, kind, count)
        putter = crew.start(_put_main, peer, queue, kind, count)
        crew.hear(putter)
        crew.hear(getter)
        putter.send("go")
        start = crew.hear(putter)
        seconds = (crew.hear(getter) - start) / 1e9
        putter.send("arrived")
    return count / float(seconds)


def compare(rounds: int, seconds: float, kinds: tuple[str, ...], peers: list[Peer]) -> list[dict[str, Any]]:
    """Interleaved rounds; round 0 finds the number of objects and is thrown away."""
    rows = {}
    counts: dict[tuple[str, str], int] = {}
    for kind in kinds:
        for turn in range(rounds + 1):
            for peer in peers:
                if kind not in peer.kinds:
                    continue
                key = (peer.name, kind)
                row = rows.setdefault(key, {"peer": peer.name, "kind": kind, "runs": []})
                rate = throughput(peer, kind, counts.get(key, LEAST[kind]) // DIFFERENT * DIFFERENT)
                if turn == 0:
                    counts[key] = max(LEAST[kind], min(int(rate * seconds), 2_000_000))
                else:
                    row["runs"].append(rate)
                print(f"{kind:<14} round {turn}  {peer.name:<26} {rate:>12,.0f} objects/s", file=sys.stderr)
    return list(rows.values())


def tables(rows: list[dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    names = list(dict.fromkeys(row["peer"] for row in rows))
    cells = {(row["peer"], row["kind"]): row["runs"] for row in rows if row["runs"]}
    lines = ["| objects/s | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in names:
        texts = []
        for kind in kinds:
            runs = cells.get((name, kind))
            texts.append(
                f"{human_rate(statistics.median(runs))} ({human_rate(min(runs))} to {human_rate(max(runs))})"
                if runs
                else "-"
            )
        lines.append("| " + " | ".join([name, *texts]) + " |")
    lines += ["", "| dsline.Queue to | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in names:
        if name.startswith("dsline"):
            continue
        mine = "dsline.Queue, any number" if name.endswith("any number") else "dsline.Queue"
        texts = []
        for kind in kinds:
            ours, theirs = cells.get((mine, kind)), cells.get((name, kind))
            texts.append(
                f"{statistics.median(ours) / statistics.median(theirs):.1f}" if ours and theirs else "-"
            )
        lines.append("| " + " | ".join([name, *texts]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare dsline.Queue with other queues of objects.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="wanted duration of a run (%(default)s)")
    parser.add_argument("--kinds", help="only kinds that contain one of these, separated by commas")
    parser.add_argument("--peers", help="only peers that contain one of these, separated by commas")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()

    def wanted(text: str | None, name: str) -> bool:
        return text is None or any(word in name for word in text.split(","))

    peers = [peer for peer in PEERS if wanted(options.peers, peer.name)]
    try:
        import faster_fifo  # noqa: F401
    except ImportError:
        print("faster-fifo is not installed: its rows are missing (pip install faster-fifo)", file=sys.stderr)
        peers = [peer for peer in peers if "fifo" not in peer.name]
    kinds = tuple(kind for kind in KINDS if wanted(options.kinds, kind))
    rows = compare(options.rounds, options.seconds, kinds, peers)
    machine = environment()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    print(f"\n{tables(rows)}")
    if options.json:
        report = {"command": sys.argv, "environment": machine, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
