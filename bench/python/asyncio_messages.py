"""Messages through asyncio between two processes, round trips, and what waiting costs.

    P1 ──▶ C1            messages: P1 sends as fast as it can by blocking calls, C1 receives in `async for`
    P1 ◀──▶ P2           round trips: an asyncio program asks, a blocking one answers
    (nobody) ──▶ C1      idle: processor time while tasks wait at 0, 1 and 20 empty channels

Peers, in the same run and with the same payloads: asyncio's own streams over a Unix socket (length before each message,
as a program would write it; the sender is a blocking socket), and multiprocessing.Queue with
``await loop.run_in_executor(None, queue.get)``, which is what packages that give queues an asyncio face do.

Messages: from the first received to the last; every message's number and length are checked. Round trips: each by itself,
the median and the 99th percentile of all rounds. Idle: time of all threads in user and kernel mode, divided by the time on
the wall. Every process is started anew for each run; runs of the peers alternate.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import dsline
import dsline.bench
from dsline.aio import AsyncChannel

SIZES = (64, 4096, 65536)
IDLE = (0, 1, 20)
_HEAD = struct.Struct("<Q")
_context = multiprocessing.get_context("spawn")

Recv = Callable[[], Awaitable[Any]]


def _message(number: int, size: int) -> bytes:
    return _HEAD.pack(number) + bytes(size - _HEAD.size)


def _check(data: Any, number: int, size: int) -> None:
    if len(data) != size or _HEAD.unpack_from(data)[0] != number:
        raise RuntimeError(f"message {number} arrived damaged")


def _name() -> str:
    return f"bench-{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def _process(target: Callable[..., None], *arguments: Any) -> Iterator[None]:
    process = _context.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield
        process.join(60)
        if process.exitcode != 0:
            raise RuntimeError(f"the other process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        process.close()


# --- the other process: blocking calls ---


def _send_channel(name: str, count: int, size: int) -> None:
    with dsline.ShmChannel.open(name) as channel:
        for number in range(count):
            channel.send(_message(number, size))


def _echo_channel(there: str, back: str, count: int) -> None:
    with dsline.ShmChannel.open(there) as requests, dsline.ShmChannel.open(back) as answers:
        for _ in range(count):
            answers.send(requests.recv_bytes())


def _exactly(stream: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += stream.recv(size - len(data))
    return bytes(data)


def _send_socket(path: str, count: int, size: int) -> None:
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(path)
        for number in range(count):
            stream.sendall(_HEAD.pack(size) + _message(number, size))


def _echo_socket(path: str, count: int) -> None:
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(path)
        for _ in range(count):
            (size,) = _HEAD.unpack(_exactly(stream, _HEAD.size))
            stream.sendall(_HEAD.pack(size) + _exactly(stream, size))


def _send_queue(queue: Any, count: int, size: int) -> None:
    for number in range(count):
        queue.put(_message(number, size))


def _echo_queue(there: Any, back: Any, count: int) -> None:
    for _ in range(count):
        back.put(there.get())


# --- this process: asyncio ---


async def _drain(recv: Recv, count: int, size: int) -> float:
    """Messages per second from the first to the last."""
    _check(await recv(), 0, size)
    start = time.perf_counter()
    for number in range(1, count):
        _check(await recv(), number, size)
    return (count - 1) / (time.perf_counter() - start)


async def _ask(send: Callable[[bytes], Awaitable[Any]], recv: Recv, count: int, size: int) -> list[float]:
    """Seconds of each round trip."""
    times = []
    for number in range(count):
        message = _message(number, size)
        start = time.perf_counter()
        await send(message)
        answer = await recv()
        times.append(time.perf_counter() - start)
        _check(answer, number, size)
    return times[count // 10 :]  # the first ones are for warming up


@contextlib.contextmanager
def _channel(size: int) -> Iterator[dsline.ShmChannel]:
    with dsline.ShmChannel.create(_name(), capacity=64, slot_size=size) as channel:
        try:
            yield channel
        finally:
            channel.unlink()


async def channel_messages(count: int, size: int) -> float:
    with _channel(size) as channel, _process(_send_channel, channel.name, count, size):
        messages = AsyncChannel(channel)
        number, start = 0, 0.0
        async for view in messages:
            if number == 0:
                start = time.perf_counter()
            _check(view, number, size)
            number += 1
            if number == count:
                break
        return (count - 1) / (time.perf_counter() - start)


async def channel_round_trips(count: int, size: int) -> list[float]:
    with (
        _channel(size) as there,
        _channel(size) as back,
        _process(_echo_channel, there.name, back.name, count),
    ):
        return await _ask(AsyncChannel(there).send, AsyncChannel(back).recv_bytes, count, size)


async def _accept(path: str) -> tuple[Any, asyncio.Future[Any]]:
    connected: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_unix_server(
        lambda reader, writer: connected.set_result((reader, writer)), path, limit=1 << 22
    )
    return server, connected


async def socket_messages(count: int, size: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        server, connected = await _accept(f"{folder}/s")
        with _process(_send_socket, f"{folder}/s", count, size):
            reader, writer = await connected

            async def recv() -> bytes:
                (length,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                return bytes(await reader.readexactly(length))

            rate = await _drain(recv, count, size)
            writer.close()
        server.close()
        return rate


async def socket_round_trips(count: int, size: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        server, connected = await _accept(f"{folder}/s")
        with _process(_echo_socket, f"{folder}/s", count):
            reader, writer = await connected

            async def send(data: bytes) -> None:
                writer.write(_HEAD.pack(len(data)) + data)
                await writer.drain()

            async def recv() -> bytes:
                (length,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                return bytes(await reader.readexactly(length))

            times = await _ask(send, recv, count, size)
            writer.close()
        server.close()
        return times


async def queue_messages(count: int, size: int) -> float:
    loop, queue = asyncio.get_running_loop(), _context.Queue(64)
    with _process(_send_queue, queue, count, size):
        return await _drain(lambda: loop.run_in_executor(None, queue.get), count, size)


async def queue_round_trips(count: int, size: int) -> list[float]:
    loop, there, back = asyncio.get_running_loop(), _context.Queue(64), _context.Queue(64)
    with _process(_echo_queue, there, back, count):

        async def send(data: bytes) -> None:
            there.put(data)

        return await _ask(send, lambda: loop.run_in_executor(None, back.get), count, size)


async def idle(channels: int, seconds: float) -> float:
    """Share of one CPU that the process takes while a task waits at each of so many channels."""
    opened = [dsline.ShmChannel(capacity=4, slot_size=64) for _ in range(channels)]
    tasks = [asyncio.create_task(AsyncChannel(each).recv()) for each in opened]
    await asyncio.sleep(0.2)
    wall, cpu = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    share = (time.process_time() - cpu) / (time.monotonic() - wall)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for each in opened:
        each.close()
    return share


PEERS = {
    "dsline.aio": (channel_messages, channel_round_trips),
    "asyncio streams, Unix socket": (socket_messages, socket_round_trips),
    "multiprocessing.Queue in an executor": (queue_messages, queue_round_trips),
}


def loops() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    found: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    with contextlib.suppress(ImportError):
        import uvloop

        found["uvloop"] = uvloop.new_event_loop
    return found


def _run(loop: Callable[[], asyncio.AbstractEventLoop], coroutine: Any) -> Any:
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(coroutine)


def measure(
    *,
    sizes: tuple[int, ...] = SIZES,
    rounds: int = 5,
    seconds: float = 0.5,
    idle_seconds: float = 5.0,
    trips: int = 3000,
) -> list[dict[str, Any]]:
    """Return one row per loop, peer and size, and the idle shares."""
    rows: list[dict[str, Any]] = []
    for loop_name, loop in loops().items():
        for size in sizes:
            rates: dict[str, list[float]] = {peer: [] for peer in PEERS}
            times: dict[str, list[float]] = {peer: [] for peer in PEERS}
            for turn in range(rounds + 1):
                for peer, (messages, round_trips) in PEERS.items():
                    # The first turn finds out how many messages take the wanted time.
                    count = 500 if turn == 0 else max(500, min(int(rates[peer][0] * seconds), 1_000_000))
                    rates[peer].append(_run(loop, messages(count, size)))
                    if turn > 0:
                        times[peer] += _run(loop, round_trips(max(20, trips // rounds), size))
                    print(
                        f"{loop_name} {size} B round {turn} {peer}: {rates[peer][-1]:,.0f}/s", file=sys.stderr
                    )
            for peer in PEERS:
                trip = sorted(times[peer])
                rows.append(
                    {
                        "loop": loop_name,
                        "peer": peer,
                        "size": size,
                        "messages_per_second": statistics.median(rates[peer][1:]),
                        "runs": rates[peer][1:],
                        "round_trip_us": statistics.median(trip) * 1e6,
                        "round_trip_p99_us": trip[len(trip) * 99 // 100] * 1e6,
                    }
                )
        for count in IDLE:
            share = _run(loop, idle(count, idle_seconds))
            rows.append({"loop": loop_name, "idle_channels": count, "share_of_a_cpu": share})
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """Return Markdown tables."""
    flows = [row for row in rows if "peer" in row]
    sizes = sorted({row["size"] for row in flows})
    cells = {(row["loop"], row["peer"], row["size"]): row for row in flows}
    names = list(dict.fromkeys((row["loop"], row["peer"]) for row in flows))
    parts = []
    for title, cell in (
        (
            "messages per second",
            lambda row: (
                f"{row['messages_per_second']:,.0f} ({min(row['runs']):,.0f} to {max(row['runs']):,.0f})"
            ),
        ),
        (
            "round trip, median (p99)",
            lambda row: f"{row['round_trip_us']:.0f} ({row['round_trip_p99_us']:.0f}) µs",
        ),
    ):
        lines = [
            f"| {title} | " + " | ".join(f"{size} B" for size in sizes) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for name in names:
            lines.append(
                f"| {name[1]}, {name[0]} | " + " | ".join(cell(cells[*name, size]) for size in sizes) + " |"
            )
        parts.append("\n".join(lines))
    lines = ["| waiting at | share of one CPU |", "|---|---|"]
    for row in rows:
        if "idle_channels" in row:
            lines.append(f"| {row['idle_channels']} channels, {row['loop']} | {row['share_of_a_cpu']:.3%} |")
    return "\n\n".join([*parts, "\n".join(lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Messages through asyncio, round trips, idle CPU.")
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="wanted duration of a run (%(default)s)")
    parser.add_argument("--idle-seconds", type=float, default=5.0)
    parser.add_argument("--trips", type=int, default=3000, help="round trips in all (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if min(options.sizes) < 8 or options.rounds < 1:
        parser.error("--sizes takes 8 bytes and more, --rounds 1 and more")
    rows = measure(
        sizes=options.sizes,
        rounds=options.rounds,
        seconds=options.seconds,
        idle_seconds=options.idle_seconds,
        trips=options.trips,
    )
    machine = dsline.bench.environment()
    print("\n".join(f"* {key}: {value}" for key, value in machine.items()))
    print(f"\n{tables(rows)}")
    if options.json:
        report = {"command": sys.argv, "environment": machine, "asyncio": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
