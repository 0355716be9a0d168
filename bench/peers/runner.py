"""Run every peer over the same messages, in interleaved rounds.

    P1 ──▶ C1         throughput: from P1's first send to the return of C1's last receive
    P1 ──▶ C1 ──▶ P1  round trip: from P1's send to the return of its receive, one message under way

P1 and C1 are two processes, started anew for each run. Not timed: starting them, connecting, and the warm-up
messages. Round 0 finds the number of messages that takes about the wanted time and is thrown away; each later
round runs every peer once, so that a change of the machine's speed meets all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers.message import ARRAYS_FROM, payloads, toucher
from peers.peer import SIZES, Limit, Peer, Spec

from dsline.bench import RoundTrip, environment, two_cpus

RUN_LIMIT_S = 120


def _send_main(peer: Peer, link: Any, spec: Spec, control: Connection) -> None:
    _pin(spec, 0)
    send, close = peer.sender(link, spec)
    stream = payloads(spec.size, copied_at_send=peer.copied_at_send).stream()
    for message in itertools.islice(stream, spec.warmup):
        send(message)
    control.send("sent the warm-up")
    control.recv()
    start = time.monotonic_ns()
    for message in itertools.islice(stream, spec.count):
        send(message)
    control.send(start)
    # Some transports drop what is under way when the sender leaves, so it stays until all has arrived.
    control.recv()
    close()


def _receive_main(peer: Peer, link: Any, spec: Spec, control: Connection) -> None:
    _pin(spec, 1)
    recv, close = peer.receiver(link, spec)
    messages = payloads(spec.size, copied_at_send=peer.copied_at_send)
    touch = toucher(spec.touch)
    for index in range(spec.warmup):
        if not messages.equals(recv(), index):
            raise RuntimeError(f"{peer.name}: warm-up message {index} arrived damaged")
    control.send("warm")
    every = messages.check_every
    last = spec.warmup + spec.count - 1
    for first in range(spec.warmup, last, every):
        message = recv()
        if not messages.has_head(message, first):
            raise RuntimeError(f"{peer.name}: message {first} arrived damaged or out of order")
        rest = itertools.repeat(None, min(every, last - first) - 1)
        if touch is None:
            del message
            for _ in rest:
                recv()
        else:
            touch(message)
            del message
            for _ in rest:
                touch(recv())
    message = recv()
    if touch is not None:
        touch(message)
    ended = time.monotonic_ns()
    if not messages.equals(message, last):
        raise RuntimeError(f"{peer.name}: the last message arrived damaged")
    del message
    control.send(ended)
    close()


def _ping_main(peer: Peer, links: tuple[Any, Any], spec: Spec, control: Connection) -> None:
    _pin(spec, 0)
    send, close_there = peer.sender(links[0], spec)
    recv, close_back = peer.receiver(links[1], spec)
    messages = payloads(spec.size, copied_at_send=peer.copied_at_send)
    samples = []
    for index, message in enumerate(itertools.islice(messages.stream(), spec.warmup + spec.count)):
        start = time.monotonic_ns()
        send(message)
        echo = recv()
        samples.append(time.monotonic_ns() - start)
        if not messages.has_head(echo, index):
            raise RuntimeError(f"{peer.name}: round trip {index} came back damaged")
        del echo
    control.send(samples[spec.warmup :])
    close_there()
    close_back()


def _pong_main(peer: Peer, links: tuple[Any, Any], spec: Spec, control: Connection) -> None:
    _pin(spec, 1)
    recv, close_there = peer.receiver(links[0], spec)
    send, close_back = peer.sender(links[1], spec)
    for _ in range(spec.warmup + spec.count):
        send(recv())
    control.send("done")
    close_back()
    close_there()


def _limit_main(limit: Limit, spec: Spec, control: Connection) -> None:
    _pin(spec, 0)
    control.send(limit.run(spec))


def _pin(spec: Spec, role: int) -> None:
    if spec.cpus is not None:
        os.sched_setaffinity(0, {spec.cpus[role]})


class Crew:
    """The processes of one run; none of them outlives the with block."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._processes: list[Any] = []
        self._deadline = time.monotonic() + RUN_LIMIT_S

    def start(self, target: Callable[..., None], *args: Any) -> Connection:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(*args, theirs), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        return mine

    def hear(self, pipe: Connection) -> Any:
        """Return the next report; a process that died or an overlong run ends the wait."""
        while not pipe.poll(0.1):
            if any(process.exitcode for process in self._processes):
                raise RuntimeError("a process of the run failed")
            if time.monotonic() > self._deadline:
                raise RuntimeError(f"the run took longer than {RUN_LIMIT_S} s")
        try:
            return pipe.recv()
        except EOFError:
            raise RuntimeError("a process of the run failed") from None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        for process in self._processes:
            if kind is None:
                process.join(10)
            process.kill()
            process.join()


def throughput(peer: Peer | Limit, spec: Spec) -> float:
    """Run once and return messages per second."""
    context = multiprocessing.get_context("spawn")
    if isinstance(peer, Limit):
        with Crew(context) as crew:
            return spec.count / float(crew.hear(crew.start(_limit_main, peer, spec)))
    link, remove = peer.link(context, spec)
    try:
        with Crew(context) as crew:
            receiver = crew.start(_receive_main, peer, link, spec)
            sender = crew.start(_send_main, peer, link, spec)
            crew.hear(sender)
            crew.hear(receiver)
            sender.send("go")
            start = crew.hear(sender)
            seconds = (crew.hear(receiver) - start) / 1e9
            sender.send("arrived")
            return spec.count / float(seconds)
    finally:
        remove()


def round_trips(peer: Peer, spec: Spec) -> RoundTrip:
    """Run a ping-pong once and return its distribution."""
    context = multiprocessing.get_context("spawn")
    there, remove_there = peer.link(context, spec)
    try:
        back, remove_back = peer.link(context, spec)
        try:
            with Crew(context) as crew:
                pong = crew.start(_pong_main, peer, (there, back), spec)
                ping = crew.start(_ping_main, peer, (there, back), spec)
                samples = crew.hear(ping)
                crew.hear(pong)
                return RoundTrip.from_ns(samples)
        finally:
            remove_back()
    finally:
        remove_there()


def all_peers() -> list[Peer | Limit]:
    """Return the limits, dsline and every peer whose package is installed."""
    from peers import dsline_peer, limits, mp_pipe, mp_queue

    found: list[Peer | Limit] = [*dsline_peer.PEERS, *mp_queue.PEERS, *mp_pipe.PEERS]
    try:
        from peers import pyzmq_peer
    except ImportError:
        print("pyzmq is not installed: its rows are missing (pip install pyzmq)", file=sys.stderr)
    else:
        found += pyzmq_peer.PEERS
    return [*found, *limits.LIMITS]


def compare(
    peers: list[Peer | Limit],
    *,
    sizes: tuple[int, ...] = SIZES,
    rounds: int = 5,
    seconds: float = 0.4,
    touch: str = "none",
    cpus: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Measure the throughput of all peers and return one row per peer and size.

    A run that fails is kept in its row as text and does not end the comparison.
    """
    rows = []
    for size in sizes:
        if touch != "none" and size < ARRAYS_FROM:
            continue
        row_of: dict[str, dict[str, Any]] = {}
        counts: dict[str, int] = {}
        for turn in range(rounds + 1):
            for peer in peers:
                if size not in peer.sizes or (touch != "none" and isinstance(peer, Limit)):
                    continue
                row = row_of.setdefault(
                    peer.name,
                    {
                        "peer": peer.name,
                        "path": peer.path,
                        "size": size,
                        "touch": touch,
                        "pinned": cpus is not None,
                        "limit": isinstance(peer, Limit),
                        "runs": [],
                        "failures": [],
                    },
                )
                first = 5000 if size < ARRAYS_FROM else 500 if size < 1 << 20 else 40
                count = counts.get(peer.name, first)
                try:
                    rate = throughput(peer, Spec(size, count, touch, cpus))
                except RuntimeError as error:
                    row["failures"].append(str(error))
                    continue
                if turn == 0:
                    counts[peer.name] = max(first, min(int(rate * seconds), 2_000_000))
                else:
                    row["runs"].append(rate)
                print(
                    f"{size:>8} B  round {turn}  {peer.name:<28} {rate:>12,.0f} messages/s", file=sys.stderr
                )
        for row in row_of.values():
            if row["runs"]:
                row["messages_per_second"] = statistics.median(row["runs"])
                row["gigabytes_per_second"] = row["messages_per_second"] * size / 1e9
            rows.append(row)
    return rows


def compare_round_trips(
    peers: list[Peer | Limit],
    *,
    size: int = 8,
    rounds: int = 5,
    count: int = 2000,
    cpus: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Measure the ping-pong of all peers; each figure is the median of its rounds."""
    rows = {}
    for turn in range(rounds):
        for peer in peers:
            if isinstance(peer, Limit) or size not in peer.sizes:
                continue
            row = rows.setdefault(
                peer.name,
                {"peer": peer.name, "size": size, "pinned": cpus is not None, "rounds": [], "failures": []},
            )
            try:
                trips = round_trips(peer, Spec(size, count, cpus=cpus))
            except RuntimeError as error:
                row["failures"].append(str(error))
                continue
            row["rounds"].append(dataclasses.asdict(trips))
            print(f"round trip  round {turn}  {peer.name:<28} p50 {trips.p50_us:8.1f} us", file=sys.stderr)
    for row in rows.values():
        for key in ("p50_us", "p99_us", "p999_us", "max_us"):
            if row["rounds"]:
                row[key] = statistics.median(trips[key] for trips in row["rounds"])
    return list(rows.values())


def human_size(size: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def human_rate(rate: float) -> str:
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if rate >= unit:
            return f"{rate / unit:.3g}{name}"
    return f"{rate:.3g}"


def table(rows: list[dict[str, Any]], *, gigabytes: bool = False) -> str:
    """Return a Markdown table, peers down, sizes across: median (min to max) of the rounds.

    GB/s (10**9 bytes) are shown from 4 KiB on.
    """
    rows = [row for row in rows if not gigabytes or row["size"] >= ARRAYS_FROM]
    sizes = sorted({row["size"] for row in rows})
    # dsline first, limits last, else in the order of the run.
    ranked = sorted(rows, key=lambda row: (row["limit"], not row["peer"].startswith("dsline")))
    names = list(dict.fromkeys(row["peer"] for row in ranked))
    cells = {}
    for row in rows:
        if not row["runs"]:
            cells[row["peer"], row["size"]] = "failed"
            continue
        values = [rate * row["size"] / 1e9 if gigabytes else rate for rate in row["runs"]]
        show = (lambda value: f"{value:.3g}") if gigabytes else human_rate
        text = f"{show(statistics.median(values))} ({show(min(values))} to {show(max(values))})"
        cells[row["peer"], row["size"]] = text + (
            f", {len(row['failures'])} failed" if row["failures"] else ""
        )
    lines = ["| | " + " | ".join(map(human_size, sizes)) + " |", "|---" * (len(sizes) + 1) + "|"]
    lines += [
        "| " + " | ".join([name, *(cells.get((name, size), "-") for size in sizes)]) + " |" for name in names
    ]
    return "\n".join(lines)


def round_trip_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | p50 us | p99 us | p99.9 us | max us |", "|---|---|---|---|---|"]
    for row in rows:
        figures = [
            f"{row[key]:.1f}" if key in row else "failed" for key in ("p50_us", "p99_us", "p999_us", "max_us")
        ]
        lines.append("| " + " | ".join([row["peer"], *figures]) + " |")
    return "\n".join(lines)


def paths(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown list that says what each row of the tables does."""
    return "\n".join(
        f"* {name}: {path}" for name, path in dict.fromkeys((row["peer"], row["path"]) for row in rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare dsline with other ways between two processes.")
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    parser.add_argument("--peers", help="only peers whose name contains one of these, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="wanted duration of a run (%(default)s)")
    parser.add_argument(
        "--touch", choices=("none", "read"), default="none", help="the receiver reads every byte"
    )
    parser.add_argument("--pin", action="store_true", help="one CPU for each process")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    peers = all_peers()
    if options.peers:
        wanted = options.peers.split(",")
        peers = [peer for peer in peers if any(word in peer.name for word in wanted)]
    cpus = two_cpus() if options.pin else None
    rows = compare(
        peers,
        sizes=options.sizes,
        rounds=options.rounds,
        seconds=options.seconds,
        touch=options.touch,
        cpus=cpus,
    )
    machine = environment()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    print(f"\nMessages/s\n\n{table(rows)}\n\nGB/s\n\n{table(rows, gigabytes=True)}\n\n{paths(rows)}")
    if options.json:
        report = {"command": sys.argv, "environment": machine, "throughput": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
