"""What the parts of a running segment share: its job, the supervisor as it sees it, and how it fails."""

from __future__ import annotations

import dataclasses
import traceback
from typing import Any, Final, Protocol

from dsline.dataflow.descriptions import error_text
from dsline.dataflow.plan import Edge, Stage
from dsline.errors import DslineError, OperatorError

__all__ = [
    "ANNOUNCED",
    "END",
    "FAILURES",
    "FAILURES_OF_WORKERS",
    "GAP",
    "LAST_DELIVERY",
    "MARKER",
    "NAP",
    "NOTHING",
    "OVER",
    "SHORT",
    "SLICE",
    "TURN",
    "WHOLE",
    "Control",
    "Job",
    "StageFailed",
    "Stopped",
    "failures_of",
    "operator_error",
    "said",
    "shown",
]


# Kinds of frames (cpp/src/frames/frame_header.hpp).
END: Final = 16
MARKER: Final = 17
GAP: Final = 19
ANNOUNCED: Final = "announced"  # counter: dropped items that gap frames have told of
SLICE: Final = 1.0  # seconds; a shut down channel wakes whoever waits for it
TURN: Final = 0.05  # seconds to wait for a turn before looking why it does not come
NAP: Final = 0.05  # seconds that a pause lasts between looks at whether the pipeline is being aborted
SHORT: Final = 0.002  # seconds between looks at two things that cannot be waited for together
NOTHING: Final = 50_000  # ns that sending a control frame may take without having waited
WHOLE: Final = 1 << 40  # offset of an input whose results are all out, and its control frame
LAST_DELIVERY: Final = 15  # max_deliveries of the channels of a pipeline
OVER: Final = 1 << 62  # `done` of a segment whose end is out: a worker that starts again has nothing to do


class Stopped(BaseException):
    """The pipeline is being aborted, or a channel is gone with it. Not an Exception, so that no operator takes it for one."""


class StageFailed(BaseException):
    """A stage failed and its policy is to fail the pipeline. Not an Exception, so that no stage before it handles it."""

    def __init__(self, error: DslineError) -> None:
        super().__init__(str(error))
        self.error = error


class Control(Protocol):
    """What a segment asks of the supervisor."""

    def event(self, kind: str, **data: Any) -> None: ...
    def ask(self, kind: str, **data: Any) -> Any: ...
    def marker(self, last: bool = False) -> int | None:
        """Number of a checkpoint that a source shall begin now; `last`: it is at its end."""

    def report_state(self, number: int, segment: int, state: bytes) -> None: ...
    @property
    def aborting(self) -> bool: ...
    @property
    def stopping(self) -> bool:
        """Whether sources shall give nothing more."""

    @property
    def ended(self) -> bool:
        """Whether another worker of the segment has found the end of the input."""


@dataclasses.dataclass
class Job:
    """What a segment needs to run; travels to a worker by cloudpickle, without its channels."""

    number: int  # of the segment
    name: str
    stages: tuple[Stage, ...]
    workers: int
    ordered: bool
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    worker: int = -1
    incarnation: int = 0
    begin_at: int = 0  # first sequence of its input
    state: bytes | None = None  # of a checkpoint
    first_marker: int | None = (
        None  # of the checkpoint before the first item, where the run does not go on from one
    )
    asks_on_error: bool = False  # there is a hook that decides


# What a user's function may raise. Not KeyboardInterrupt in the caller's process: there it may be Ctrl-C. SystemExit would
# otherwise end a worker, or a thread of the caller, in good order.
FAILURES: Final = (Exception, SystemExit, GeneratorExit)
FAILURES_OF_WORKERS: Final = (*FAILURES, KeyboardInterrupt)


def failures_of(worker: int) -> tuple[type[BaseException], ...]:
    return FAILURES if worker < 0 else FAILURES_OF_WORKERS


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error_text(error)}".rstrip(": ")


def shown(error: BaseException) -> str:
    """The repr of an error, whatever its own methods do."""
    try:
        return repr(error)
    except Exception:
        return said(error)


def operator_error(stage: str, error: BaseException, what: str) -> OperatorError:
    made = OperatorError(f"stage {stage!r}: {what}: {said(error)}")
    made.stage = stage
    made.traceback = "".join(traceback.format_exception(error))
    return made
