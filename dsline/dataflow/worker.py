"""What a worker process runs, and how it talks to the supervisor."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from dsline import errors
from dsline.dataflow import callables
from dsline.dataflow.control import Job, StageFailed, Stopped
from dsline.dataflow.runtime import SegmentLoop
from dsline.errors import DslineError, OperatorError, PipelineRuntimeError
from dsline.rpc import RemoteTraceback

__all__ = ["WorkerControl", "error_from_plain", "error_to_plain", "main"]


def error_to_plain(error: DslineError) -> dict[str, Any]:
    """Return what crosses the pipe: texts only, so that no class of the user is needed to read it."""
    return {
        "type": type(error).__name__,
        "text": str(error),
        "stage": getattr(error, "stage", None),
        "traceback": getattr(error, "traceback", None),
    }


def error_from_plain(plain: dict[str, Any]) -> DslineError:
    """Return the error of a worker, with its traceback as the cause."""
    kind = getattr(errors, plain["type"], PipelineRuntimeError)
    error: DslineError = kind(plain["text"])
    if isinstance(error, OperatorError):
        error.stage, error.traceback = plain["stage"], plain["traceback"]
    if plain["traceback"]:
        error.__cause__ = RemoteTraceback(plain["traceback"])
    return error


class WorkerControl:
    """The supervisor, as a worker sees it. A thread reads the pipe, so that looking at a flag costs nothing."""

    def __init__(self, connection: Connection) -> None:
        self.aborting = False
        self.ended = False
        self.stopping = False
        self._connection = connection
        self._markers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._loop: SegmentLoop | None = None
        threading.Thread(target=self._read, name="dsline-control", daemon=True).start()

    def serve(self, loop: SegmentLoop) -> None:
        """Say whose source is to be stopped."""
        self._loop = loop

    def _read(self) -> None:
        while True:
            try:
                kind, value = self._connection.recv()
            except (EOFError, OSError):
                self.aborting = True
                self._answers.put(None)
                return
            if kind == "abort":
                self.aborting = True
                self._answers.put(None)  # nobody answers any more
            elif kind == "stop":
                self.stopping = True
                source = getattr(self._loop, "source", None)
                if source is not None:
                    source.stop()
            elif kind == "ended":
                self.ended = True
            elif kind == "marker":
                self._markers.put(value)
            else:
                self._answers.put(value)

    def _send(self, *message: Any) -> None:
        with self._sending, contextlib.suppress(BrokenPipeError, OSError):
            self._connection.send(message)

    def event(self, kind: str, **data: Any) -> None:
        self._send("event", kind, data)

    def ask(self, kind: str, **data: Any) -> Any:
        self._send("ask", kind, data)
        answer = self._answers.get()
        if self.aborting:
            raise Stopped
        return answer

    def marker(self, last: bool = False) -> int | None:
        with contextlib.suppress(queue.Empty):
            return self._markers.get_nowait()
        number: int | None = self.ask("last_marker") if last else None
        return number

    def report_state(self, number: int, segment: int, state: bytes) -> None:
        self._send("state", number, (segment, state))

    def failed(self, error: DslineError) -> None:
        self._send("failed", "", error_to_plain(error))

    def finished(self, sent_end: bool) -> None:
        self._send("finished", "", sent_end)


def main(
    connection: Connection, packed: bytes, inputs: list[Any], outputs: list[Any], words: Any, ticket: Any
) -> None:
    """Run a segment in this process, to its end or to the first error."""
    control = WorkerControl(connection)
    loop = None
    try:
        job: Job = callables.unpack(packed)
        loop = SegmentLoop(job, inputs, outputs, words, ticket.open(), control)
        control.serve(loop)
        loop.run()
        control.finished(loop.sent_end)
        loop.close()
        control.event("stage_stop", segment=job.number, worker=job.worker)
    except BaseException as error:
        # The inputs in hand belong to whoever reads the channel next. As long as the traceback has its frames they are not
        # acknowledged: this process ends before they would be.
        if isinstance(error, StageFailed):
            control.failed(error.error)
        elif not isinstance(error, Stopped):
            traceback.print_exc()
        if loop is not None and isinstance(error, StageFailed | Stopped):
            loop.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if isinstance(error, Stopped) else 1)
