"""What `run(progress=...)` shows: a bar on a terminal, a few lines in a log, or the figures for a function of the user's.

The figures come from a function that returns a `PipelineStats`; who shows them runs in a thread of its own and never stops
the pipeline. What goes wrong while showing is said once and does not stop it either.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from dsline.closing import Closing
from dsline.dataflow.stats import PipelineStats
from dsline.errors import InvalidArgumentError

__all__ = ["Progress", "summary"]

#: Seconds between two looks, and between the first lines in a log, which become rarer (up to ten minutes).
EVERY = 0.2
FIRST_LINE = 5.0
RAREST_LINE = 600.0


class Progress(Closing):
    """Shows how a pipeline gets on, between `__enter__` and `__exit__`.

    Parameters
    ----------
    stats : callable
        Returns a `PipelineStats`; called in another thread. Its `interval` is the time since its last call.
    show : bool or callable
        True: a bar where `file` is a terminal, else a few lines without control characters. A callable gets every
        `PipelineStats`, and the last one after the end. False: nothing at all.
    every : float
        Seconds between two looks.
    file : file, optional
        By default sys.stderr.

    Raises
    ------
    InvalidArgumentError
        `show` is neither.

    Notes
    -----
    `__exit__` waits for the thread: for a callable of the user's at most as long as its last call takes.
    """

    def __init__(
        self,
        stats: Callable[[], PipelineStats],
        show: bool | Callable[[PipelineStats], Any],
        *,
        every: float = EVERY,
        file: TextIO | None = None,
    ) -> None:
        if not isinstance(show, bool) and not callable(show):
            raise InvalidArgumentError(
                f"progress={show!r}: give True, False, or a function that takes a PipelineStats"
            )
        self._stats = stats
        self._show = show
        self._every = every
        self._file = file
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self._show is not False:
            self._thread = threading.Thread(target=self._run, name="dsline-progress", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Show the last figures and end. A second call does nothing."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        file = self._file if self._file is not None else sys.stderr
        try:
            shown = self._shown(file)
            try:
                while not self._over.wait(self._every):
                    shown.update(self._stats())
                shown.update(self._stats(), last=True)
            finally:
                shown.close()
        except Exception as error:  # a closed file, a function of the user's
            report = "".join(traceback.format_exception(error))
            with contextlib.suppress(OSError, ValueError):  # nowhere to say it
                file.write(f"dsline: progress is not shown any more, the pipeline goes on:\n{report}")

    def _shown(self, file: TextIO) -> _Shown:
        if callable(self._show):
            return _Told(self._show)
        try:
            terminal = file.isatty()
        except ValueError:
            terminal = False
        return _Bar(file) if terminal else _Lines(file)


class _Shown:
    def update(self, stats: PipelineStats, last: bool = False) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class _Told(_Shown):
    def __init__(self, function: Callable[[PipelineStats], Any]) -> None:
        self._function = function

    def update(self, stats: PipelineStats, last: bool = False) -> None:
        self._function(stats)


class _Bar(_Shown):
    def __init__(self, file: TextIO) -> None:
        from tqdm import tqdm

        class Bar(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
            monitor_interval = 0  # its thread would outlive the run

        Bar.set_lock(threading.RLock())  # by default it has a semaphore among processes
        self._bar = Bar(
            file=file, unit=" items", unit_scale=True, dynamic_ncols=True, mininterval=0, miniters=0
        )

    def update(self, stats: PipelineStats, last: bool = False) -> None:
        bar = self._bar
        bar.total = stats.total
        bar.set_description_str(_printable(stats.name), refresh=False)
        bar.set_postfix_str(notes(stats), refresh=False)
        bar.n = stats.items_in
        bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _Lines(_Shown):
    """Lines come at 5 s, then at growing intervals, and at the end: a log of a day has some hundred."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._wait = FIRST_LINE
        self._next = time.monotonic() + FIRST_LINE

    def update(self, stats: PipelineStats, last: bool = False) -> None:
        if not last and time.monotonic() < self._next:
            return
        self._wait = min(self._wait * 1.5, RAREST_LINE)
        self._next = time.monotonic() + self._wait
        self._file.write(summary(stats) + "\n")
        self._file.flush()


def summary(stats: PipelineStats) -> str:
    """Say in one line how a pipeline stands."""
    of = "" if stats.total is None else f" of {stats.total:,}"
    rate = stats.items_in / stats.seconds if stats.seconds > 0 else 0.0
    parts = [
        f"{stats.name}: {stats.state}, {stats.items_in:,}{of} items in {stats.seconds:.1f} s ({rate:,.4g}/s)"
    ]
    return _printable("; ".join([*parts, *filter(None, [notes(stats)])]))


def notes(stats: PipelineStats) -> str:
    """Say what holds the pipeline up and what went wrong: the slowest stage, the fullest queue, errors, losses, restarts."""
    parts = []
    if (slowest := stats.slowest) is not None:
        parts.append(f"slowest {slowest.name} {slowest.busy:.0%}")
    fullest = max(stats.edges, key=lambda edge: edge.fill, default=None)
    if fullest is not None:
        parts.append(f"queues up to {fullest.fill:.0%}")
    restarts = {
        stage.segment: stage.restarts for stage in stats.stages
    }  # of a segment, whichever of its stages
    counted = (
        ("errors", stats.errors),
        ("dropped", stats.dropped),
        ("dead letters", sum(stage.dead_letters for stage in stats.stages)),
        ("restarts", sum(restarts.values())),
    )
    parts += [f"{what} {number:,}" for what, number in counted if number]
    return _printable(", ".join(parts))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
