"""The command line: ``dsline`` and ``python -m dsline``.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 it failed, 2 the command was wrong,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import platform
import re
import signal
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from traceback import format_exception
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class

import dsline
from dsline import bench as _bench
from dsline import status as _status
from dsline.dead_cli import dead_group
from dsline.errors import DslineError

SHM_ROOT = Path("/dev/shm")

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd])?", re.IGNORECASE)
_SIZE = re.compile(r"([0-9]+)\s*(?:b|([kmg]i?)b?)?", re.IGNORECASE)


class _Size(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number of bytes: 4096, 4KiB, 1MiB, 64kB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            self.fail(
                f"{value!r} is not a size; give bytes or a number with kB, MB, GB, KiB, MiB or GiB",
                param,
                ctx,
            )
        size = int(match[1]) * _UNITS[(match[2] or "").lower()]
        if not 1 <= size <= _bench.MAX_MESSAGE_SIZE:
            self.fail(
                f"{value!r} is {size} bytes; it must be from 1 to {_bench.MAX_MESSAGE_SIZE}", param, ctx
            )
        return size


class _Age(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A time span in seconds: 90, 90s, 15m, 1h, 2d."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = _AGE.fullmatch(value.strip())
        if match is None:
            self.fail(f"{value!r} is not a time span; give seconds or a number with s, m, h or d", param, ctx)
        return float(match[1]) * _SECONDS[(match[2] or "s").lower()]


class _Group(click.Group):
    """A command group that reports every failure as one line and one exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(
                args=args,
                prog_name=prog_name or "dsline",
                complete_var=complete_var,
                standalone_mode=False,
                **extra,
            )
            sys.stdout.flush()
        except click.UsageError as error:
            if error.ctx is not None:
                click.echo(error.ctx.get_usage(), err=True)
            _fail(error.format_message(), 2)
        except click.ClickException as error:
            _fail(error.format_message(), 1)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted", 130)
        except BrokenPipeError:
            # The reader of stdout has left; the interpreter must not try to flush into it again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (DslineError, OSError, RuntimeError, ValueError, MemoryError) as error:
            _fail(str(error) or type(error).__name__, 1)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"dsline: error: {message}", err=True)
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dsline.__version__, prog_name="dsline", message="%(prog)s %(version)s")
def cli() -> None:
    """Shared-memory channels between the processes of one machine."""


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Show version, build, shared memory and this user's channels."""
    report = _info()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    shared = report["shared_memory"]
    rows = [
        ("dsline", report["version"]),
        ("build", ", ".join(f"{key} {value}" for key, value in report["build"].items())),
        ("platform", f"{report['platform']}, {report['cpus']} CPUs"),
        ("Python", f"{report['python']}, NumPy {report['numpy']}"),
        ("storage", ", ".join(report["storage"])),
        ("CRC-32C", report["crc32c"]),
        (
            "shared memory",
            f"{shared['path']}: {_human(shared['free_bytes'])} free of {_human(shared['size_bytes'])}"
            if shared["available"]
            else f"{shared['path']}: {shared['reason']}",
        ),
        ("limits", ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in report["limits"].items())),
        ("channels", f"{len(report['channels'])} in {report['channel_directory']}"),
    ]
    for label, value in rows:
        click.echo(f"{label + ':':<15}{value}")
    for channel in report["channels"]:
        click.echo(f"  {channel['name']}: {channel['state']}, {_human(channel['reserved_bytes'])} reserved")


@cli.group(name="shm")
def shm_group() -> None:
    """Look at the channels of this machine, and clean up after the dead."""


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@shm_group.command(name="list")
@_as_json
def shm_list(as_json: bool) -> None:
    """List this user's channels."""
    found = _status.list_channels()
    if as_json:
        click.echo(json.dumps([channel.asdict() for channel in found], indent=2))
        return
    rows = [("NAME", "STATE", "WAITING", "HANDLES", "GROUPS", "MEMORY")]
    for channel in found:
        if channel.problem is not None:
            rows.append((channel.name, channel.state, "", "", "", channel.problem))
            continue
        handles = f"{channel.alive} alive" + (f", {channel.dead} dead" if channel.dead else "")
        rows.append(
            (
                channel.name,
                channel.state,
                f"{channel.waiting} of {channel.capacity}",
                handles,
                ", ".join(map(_printable, channel.groups)) or "-",
                _human(channel.reserved_bytes),
            )
        )
    _table(rows)


@shm_group.command(name="inspect")
@click.argument("name")
@_as_json
def shm_inspect(name: str, as_json: bool) -> None:
    """Show who is attached to a channel, its groups, and who holds what since when."""
    report = _status.inspect(name)
    if as_json:
        click.echo(json.dumps(report.asdict(), indent=2))
        return
    counts = ("dropped_newest", "unheard", "corrupted", "buried", "letters_dropped", "deaths")
    kind = "" if report.default_group else ", a Broadcast"
    rows = [
        ("channel", f"{report.path} ({report.storage}{kind}{', shut down' if report.shut_down else ''})"),
        ("created", f"{_when(report.created_ns)} by pid {report.creator_pid}, uuid {report.uuid}"),
        (
            "slots",
            f"{report.capacity}: {report.free_slots} free, {report.writing_slots} being written, "
            f"{report.committed_slots} with a message ({report.pinned_slots} held), {report.corrupted_slots} damaged",
        ),
        (
            "messages",
            f"{report.depth} wait in the default group, {report.dead_letters} dead letters, next is "
            f"{report.next_sequence}",
        ),
        (
            "memory",
            f"{_human(report.reserved_bytes)}; slots of {_human(report.slot_size)}, messages up to "
            f"{_human(report.max_message_size)}",
        ),
        (
            "rules",
            f"{report.max_handles} handles, history {report.history}, {report.max_deliveries} deliveries"
            f"{', written to the disk' if report.sync else ''}",
        ),
        ("counters", ", ".join(f"{name} {getattr(report, name)}" for name in counts)),
    ]
    for label, value in rows:
        click.echo(f"{label + ':':<10}{value}")
    click.echo("handles:")
    for peer in report.participants:
        life = peer.state if peer.alive else "died"
        what = ["default group" if peer.receives else "sends"]
        if peer.group:
            what = [f"group {_printable(peer.group)!r}"]
        if peer.waiting_for:
            what.append(f"waits for {'room' if peer.waiting_for == 'room' else 'a message'}")
        if peer.held:
            what.append(f"holds {peer.held} for {peer.held_seconds or 0:.3g} s")
        if peer.writing:
            what.append(f"writes {peer.writing}")
        command = f" ({_printable(peer.command)})" if peer.command else ""
        click.echo(f"  {peer.number}: pid {peer.pid}{command}, {life}, {', '.join(what)}")
    click.echo("groups:")
    for group in report.groups:
        marks = [mark for mark, on in (("durable", group.durable), ("history", group.retention)) if on]
        if not group.active:
            marks.append("inactive")
        click.echo(
            f"  {group.number}: {_printable(group.name or '(default)')}{''.join(f', {mark}' for mark in marks)}, "
            f"{group.members} members, lag {group.lag}, {group.held} held, {group.dead_letters} dead letters, "
            f"{group.dropped_oldest} dropped, {group.redelivered} redelivered, on death {group.on_death}"
        )
    click.echo("slots:")
    for slot in report.slots:
        line = f"  {slot.number}: {slot.state}"
        if slot.sequence is not None:
            line += f" {slot.sequence}"
        if slot.owner is not None:
            line += f", written by {slot.owner}"
        for holder in slot.holders:
            of = f" for {_printable(holder.group)!r}" if holder.group else ""
            line += f", held by {holder.participant}{of} for {holder.for_seconds:.3g} s"
            line += f" (attempt {holder.attempt})" if holder.attempt > 1 else ""
        click.echo(line)


@shm_group.command(name="cleanup")
@click.option(
    "--older-than",
    type=_Age(),
    metavar="AGE",
    help="Only channels that did not change for so long (90s, 15m, 1h, 2d), and those with messages as well.",
)
@click.option("--yes", is_flag=True, help="Do it; without this, only say what would be done.")
@_as_json
def shm_cleanup(older_than: float | None, yes: bool, as_json: bool) -> None:
    """Remove channels that nobody has open, and recover the dead of those in use.

    Channels in which messages wait are kept, unless --older-than says that they are old enough.
    """
    found = _status.cleanup(older_than, dry_run=not yes)
    if as_json:
        click.echo(json.dumps({"dry_run": not yes, "channels": [each.asdict() for each in found]}, indent=2))
        return
    verbs = {
        "remove": "removed" if yes else "would remove",
        "recover": "recovered" if yes else "would recover",
        "keep": "keep",
    }
    for each in found:
        click.echo(f"{verbs[each.action]} {each.name}: {each.reason}")
    gone = [each for each in found if each.action == "remove"]
    freed = _human(sum(each.reserved_bytes for each in gone))
    done = "removed" if yes else "would be removed"
    click.echo(f"{len(gone)} of {len(found)} channels {done}, {freed}", err=True)
    if not yes and any(each.action != "keep" for each in found):
        click.echo("nothing was changed; --yes does it", err=True)


@shm_group.command(name="remove")
@click.argument("name")
@click.option("--force", is_flag=True, help="Also when messages wait in it.")
@_as_json
def shm_remove(name: str, force: bool, as_json: bool) -> None:
    """Remove a channel that nobody has open."""
    _status.remove(name, force)
    click.echo(json.dumps({"removed": name}) if as_json else f"removed {name}")


@cli.command()
@click.argument("name")
@_as_json
def why(name: str, as_json: bool) -> None:
    """Say in one sentence why a channel stands still."""
    reason = _printable(_status.why(name))
    click.echo(json.dumps({"name": name, "why": reason}) if as_json else reason)


class _Setting(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """NAME=VALUE."""

    name = "setting"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from dsline.dataflow.program import parse_setting

        if isinstance(value, tuple):
            return value
        try:
            return parse_setting(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@cli.command(name="run")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Variable or function of FILE that is the pipeline.  [default: pipeline]")
@click.option(
    "--set",
    "settings",
    type=_Setting(),
    multiple=True,
    metavar="NAME=VALUE",
    help="Argument of the function that makes the pipeline; of a plan: memory=SIZE or STAGE.OPTION=VALUE.",
)
@click.option("--progress/--no-progress", default=None, help="Show progress.  [default: on a terminal]")
@click.option("--timeout", type=_Age(), metavar="SECONDS", help="Stop the sources after so long, and drain.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
@click.option(
    "--explain", is_flag=True, help="Only say what would run: processes, channels, memory, guarantees."
)
@click.option(
    "--draw",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OUT",
    help="Only draw it: .svg or .mmd.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--traceback", is_flag=True, help="Of a failure, show the traceback.")
def run_command(
    file: Path,
    name: str | None,
    settings: tuple[tuple[str, Any], ...],
    progress: bool | None,
    timeout: float | None,
    resume: bool,
    explain: bool,
    draw: Path | None,
    as_json: bool,
    traceback: bool,
) -> int:
    """Run a pipeline to its end.

    FILE is a Python file with a variable or a function "pipeline", or a plan in JSON. Ctrl-C once stops the sources and
    drains, twice ends at once.
    """
    from dsline.dataflow import program

    try:
        try:
            plan = program.load_plan(file, name, dict(settings))
        except program.WrongCommandError as error:
            raise click.UsageError(str(error)) from error
        if explain:
            click.echo(plan.explain())
        if draw is not None:
            _draw(plan, draw)
        if explain or draw is not None:
            return 0
        return _run_plan(
            plan, sys.stderr.isatty() if progress is None else progress, timeout, resume, as_json
        )
    except click.ClickException:
        raise
    except Exception as error:
        if traceback:
            click.echo(
                getattr(error, "traceback", None) or "".join(format_exception(error)), err=True, nl=False
            )
        _fail(program.failure_text(error, file), 1)


def _draw(plan: Any, path: Path) -> None:
    drawings = {".svg": plan.to_svg, ".mmd": plan.to_mermaid, ".mermaid": plan.to_mermaid}
    if path.suffix not in drawings:
        raise click.UsageError(f"--draw writes {', '.join(drawings)} files, not {path.name!r}")
    path.write_text(drawings[path.suffix](), encoding="utf-8")


def _run_plan(plan: Any, progress: bool, timeout: float | None, resume: bool, as_json: bool) -> int:
    from dsline.dataflow.run import Run

    interrupts = []

    def interrupted(number: int, frame: Any) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        with Run(plan, resume=resume) as run:
            report = run.supervise(progress=progress, timeout=timeout)
    finally:
        signal.signal(signal.SIGINT, before)
    if as_json:
        plain = {
            "name": report.name,
            "state": report.state,
            "seconds": report.seconds,
            "undrained": report.undrained,
        }
        click.echo(json.dumps({**plain, "stats": report.stats.to_json()}, indent=2))
    else:
        click.echo(str(report))
    return 130 if interrupts else 0


@cli.group(name="bench")
def bench_group() -> None:
    """Measure on this machine."""


@bench_group.command(name="shm")
@click.option(
    "--message-size", type=_Size(), default=4096, show_default=True, metavar="SIZE", help="Bytes, or 4KiB."
)
@click.option(
    "--count",
    type=click.IntRange(1, _bench.MAX_COUNT),
    default=100_000,
    show_default=True,
    help="Messages of the throughput pass.",
)
@click.option(
    "--path",
    type=click.Choice(list(_bench.DATA_PATHS)),
    default="recv",
    show_default=True,
    help="Receiving call.",
)
@click.option("--payload", type=click.Choice(_bench.PAYLOADS), help="What is sent.  [default: fits the path]")
@click.option(
    "--slots",
    type=click.IntRange(1, _bench.MAX_SLOTS),
    help="Capacity of the channel.  [default: 8 MiB worth, 4 to 64]",
)
@click.option(
    "--latency-count",
    type=click.IntRange(0, _bench.MAX_LATENCY_COUNT),
    help="Round trips, 0 for none.  [default: as --count, at most 10000]",
)
@click.option("--pin/--no-pin", default=False, show_default=True, help="Pin the two processes to two CPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench_shm(
    message_size: int,
    count: int,
    path: str,
    payload: str | None,
    slots: int | None,
    latency_count: int | None,
    pin: bool,
    as_json: bool,
) -> None:
    """Send messages to a second process; then measure round trips."""
    with _progress_bar() as progress:
        result = _bench.shm(
            message_size,
            count,
            path=path,
            payload=payload,
            slots=slots,
            latency_count=latency_count,
            pin=pin,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    pinned = (
        "not pinned" if result.pinned_cpus is None else "pinned to CPUs {} and {}".format(*result.pinned_cpus)
    )
    sent = "uint8 arrays" if result.payload == "array" else "bytes"
    machine = result.environment
    rows = [
        (
            "messages",
            f"{result.count:,} of {result.message_size:,} B, {sent}; {result.slots} slots, {pinned}",
        ),
        ("data path", result.data_path),
        (
            "throughput",
            f"{result.messages_per_second:,.0f} messages/s, {result.gigabytes_per_second:.3g} GB/s, "
            f"{result.ns_per_message:,.0f} ns per message",
        ),
    ]
    if (trip := result.round_trip) is not None:
        rows.append(
            (
                "round trip",
                f"p50 {trip.p50_us:.1f} us, p99 {trip.p99_us:.1f} us, p99.9 {trip.p999_us:.1f} us, "
                f"max {trip.max_us:.1f} us ({trip.count:,} of them)",
            )
        )
    rows += [
        ("checked", result.check),
        ("machine", f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['kernel']}"),
        ("software", f"dsline {machine['dsline']}, {machine['python']}, NumPy {machine['numpy']}"),
    ]
    for label, value in rows:
        click.echo(f"{label + ':':<12}{value}")


cli.add_command(dead_group)


@bench_group.command(name="pipeline")
@click.option(
    "--count", type=click.IntRange(10, 10**8), default=50_000, show_default=True, help="Items of each run."
)
@click.option(
    "--batch", type=click.IntRange(1, 10**6), default=256, show_default=True, help="Rows of a batch."
)
@click.option(
    "--work",
    type=click.FloatRange(1, 1e6),
    default=200.0,
    show_default=True,
    metavar="MICROSECONDS",
    help="How long the workers of the scaling part work on an item.",
)
@click.option(
    "--repeats", type=click.IntRange(1, 1000), default=3, show_default=True, help="The best of so many runs."
)
@_as_json
def bench_pipeline(count: int, batch: int, work: float, repeats: int, as_json: bool) -> None:
    """Measure empty stages of a pipeline, and two workers against one."""
    from dsline.dataflow import bench

    with _progress_bar() as progress:
        result = bench.pipeline(count, batch=batch, work_us=work, repeats=repeats, progress=progress)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    machine = result.environment
    rows = [
        (
            "in process",
            f"{result.pipeline_ns_per_item:,.0f} ns of CPU per item for source, one empty stage and sink",
        ),
        (
            "one stage",
            f"{result.stage_ns_per_item:,.0f} ns of CPU per item, {result.stage_ns_per_batch:,.0f} ns per batch of "
            f"{result.batch:,} rows",
        ),
        (
            "in a worker",
            f"{result.process_ns_per_item:,.0f} ns per item, {result.process_ns_per_batch:,.0f} ns per batch: two channels",
        ),
        (
            "scaling",
            f"{result.items_per_second[1]:,.0f} items/s with 1 worker, {result.items_per_second[2]:,.0f} with 2 "
            f"({result.scaling:.2f} times), {result.work_us:,.0f} us of work per item",
        ),
        ("checked", result.check),
        ("machine", f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['kernel']}"),
        ("software", f"dsline {machine['dsline']}, {machine['python']}, NumPy {machine['numpy']}"),
    ]
    for label, value in rows:
        click.echo(f"{label + ':':<13}{value}")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    For bash: eval "$(dsline completion bash)"
    """
    completer = get_completion_class(shell)
    assert completer is not None
    click.echo(completer(cli, {}, "dsline", "_DSLINE_COMPLETE").source())


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a progress callback that draws on stderr, or None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit=" messages", unit_scale=True, leave=False, file=sys.stderr) as bar:

        def draw(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield draw


def _info() -> dict[str, Any]:
    import numpy

    build = dict(dsline.build_config())
    directory = SHM_ROOT / f"dsline-{os.geteuid()}"
    return {
        "version": dsline.__version__,
        "build": build,
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": numpy.__version__,
        "storage": [storage.value for storage in dsline.Storage],
        "crc32c": str(build.get("crc32c", "unknown")),
        "shared_memory": _shared_memory(),
        "limits": {"slots": 1 << 20, "handles_per_channel": 256},
        "channel_directory": str(directory),
        "channels": _channels(directory),
    }


def _shared_memory() -> dict[str, Any]:
    try:
        status = os.statvfs(SHM_ROOT)
    except OSError as error:
        return {"path": str(SHM_ROOT), "available": False, "reason": error.strerror}
    return {
        "path": str(SHM_ROOT),
        "available": True,
        "size_bytes": status.f_blocks * status.f_frsize,
        "free_bytes": status.f_bavail * status.f_frsize,
    }


def _channels(directory: Path) -> list[dict[str, Any]]:
    """List the segments of this user without opening a handle, which could recover or remove them."""
    found = []
    try:
        entries = sorted(directory.iterdir())
    except OSError:
        return []
    for entry in entries:
        if entry.name.startswith("."):
            continue  # a channel that is being created
        with contextlib.suppress(OSError):
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    continue
                found.append(
                    {
                        "name": entry.name,
                        "state": "in use" if _is_locked(descriptor) else "no live handle",
                        "size_bytes": status.st_size,
                        "reserved_bytes": status.st_blocks * 512,
                    }
                )
            finally:
                os.close(descriptor)
    return found


def _is_locked(descriptor: int) -> bool:
    """Tell whether any open handle holds its lock byte in the segment (a query; takes no lock)."""
    layout = "hhqqi4x"  # struct flock: type, whence, start, length (0: to the end), pid
    query = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, query)
    return bool(struct.unpack(layout, answer)[0] != fcntl.F_UNLCK)


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _printable(text: str) -> str:
    """What a peer has written may hold anything; a terminal obeys control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _when(time_ns: int) -> str:
    return datetime.datetime.fromtimestamp(time_ns / 1e9).astimezone().isoformat(timespec="seconds")


def _human(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def main() -> NoReturn:
    """Run the command line (the ``dsline`` console script)."""
    cli()
    raise AssertionError("cli() ends by SystemExit")


if __name__ == "__main__":
    main()
