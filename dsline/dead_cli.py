"""``dsline dead``: look at dead letters, and send them again."""

from __future__ import annotations

import json
from typing import Any

import click

_PLACE = click.argument("place", metavar="PLACE")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_objects = click.option(
    "--objects",
    is_flag=True,
    help="Unpickle objects of any class, which runs code that the letters choose: for logs and channels that are trusted.",
)


@click.group(name="dead")
def dead_group() -> None:
    """Look at items that failed, and send them again.

    PLACE is file://path, the log of a pipeline with on_error=dead_letter(...), or shm://name or bus://name, a channel.
    """


@dead_group.command(name="list")
@_PLACE
@_as_json
def dead_list(place: str, as_json: bool) -> None:
    """List the dead letters."""
    from dsline.cli import _printable, _table, _when
    from dsline.dataflow.dead_letters import failed_items

    if as_json:
        click.echo(json.dumps([letter.asdict() for letter in failed_items(place)], indent=2))
        return
    rows = [("NUMBER", "WHEN", "STAGE", "TRIES", "ERROR", "ITEM", "SENT AGAIN")]
    for letter in failed_items(place):
        error = (
            f"{letter.error_type.rpartition('.')[2]}: {letter.error}" if letter.error_type else letter.error
        )
        row = (
            str(letter.number),
            _when(letter.timestamp_ns),
            letter.stage,
            str(letter.deliveries),
            _short(error, 60),
            _short(letter.description, 60),
            letter.replayed or "-",
        )
        rows.append(tuple(map(_printable, row)))  # type: ignore[arg-type]
    _table(rows)
    click.echo(f"{len(rows) - 1} dead letter{'' if len(rows) == 2 else 's'}", err=True)


def _short(text: str, size: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= size else f"{line[: size - 3]}..."


@dead_group.command(name="show")
@_PLACE
@click.argument("number", type=click.IntRange(0))
@_objects
@_as_json
def dead_show(place: str, number: int, objects: bool, as_json: bool) -> None:
    """Show one dead letter: where it failed, the traceback, and what the item is."""
    from dsline.cli import _printable, _when
    from dsline.dataflow.dead_letters import failed_items

    for letter in failed_items(place):
        if letter.number == number:
            break
    else:
        raise click.ClickException(f"{place} has no dead letter {number}")
    payload = _payload(letter, objects)
    if as_json:
        click.echo(json.dumps({**letter.asdict(), "item": payload}, indent=2))
        return
    where = letter.stage if letter.worker < 0 else f"{letter.stage}, worker {letter.worker}"
    lines = [
        ("letter", f"{letter.number}, {_when(letter.timestamp_ns)}"),
        ("stage", where),
        ("input", f"sequence {letter.sequence}, tried {letter.deliveries} times"),
        ("error", f"{letter.error_type}: {letter.error}" if letter.error_type else letter.error),
        ("item", letter.description),
        ("values", payload),
        ("sent again", letter.replayed or "no"),
    ]
    for label, value in lines:
        click.echo(f"{label + ':':<12}{_printable_lines(value)}")
    for line in letter.traceback.splitlines():
        click.echo(f"    {_printable(line)}")


def _printable_lines(text: str) -> str:
    from dsline.cli import _printable

    return "\n            ".join(map(_printable, text.splitlines())) or "-"


def _payload(letter: Any, objects: bool) -> str:
    """The item in a few lines."""
    import numpy as np

    from dsline.errors import SerializationError

    try:
        item = letter.item(objects=objects)
    except SerializationError as error:
        return str(error)
    if hasattr(item, "to_rows"):
        item = dict(item.items())
    with np.printoptions(threshold=20, edgeitems=3, linewidth=100):
        text = repr(item)
    return text if len(text) <= 2000 else f"{text[:2000]}..."


@dead_group.command(name="replay")
@_PLACE
@click.argument("numbers", nargs=-1, type=click.IntRange(0))
@click.option(
    "--to",
    metavar="URI",
    help="shm://name, bus://name or file://path.  [default: letters of a channel go back to their group]",
)
@click.option("--again", is_flag=True, help="Also letters that were sent before.")
@_objects
@_as_json
def dead_replay(
    place: str, numbers: tuple[int, ...], to: str | None, again: bool, objects: bool, as_json: bool
) -> None:
    """Send the items of all dead letters, or of those of the given NUMBERS, once more.

    In a log they are marked as sent; from a channel they go.
    """
    from dsline.dataflow.dead_letters import replay

    done = replay(place, to, numbers=numbers or None, again=again, objects=objects)
    if as_json:
        click.echo(json.dumps({"sent": done.sent, "skipped": done.skipped}, indent=2))
    else:
        for number, reason in done.skipped.items():
            click.echo(f"not sent {number}: {reason}")
        click.echo(
            f"{len(done.sent)} of {len(done.sent) + len(done.skipped)} dead letters sent to {to or 'their group'}"
        )
    if done.skipped and not done.sent:
        raise click.ClickException("nothing was sent")
