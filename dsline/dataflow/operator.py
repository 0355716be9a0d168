"""What operators, routers, sources and sinks are to the runtime: descriptions that a plan checks, and steps that run.

A description (`Operator`, `Source`, `Sink`) is immutable, small and picklable: it travels to the process that runs it, and
to JSON. `start()` makes the step, which belongs to one thread of one process and keeps whatever state there is.

An item is a plain Python object: an ndarray (a frame, or a structured array of records), a `Batch` of columns, or any
other object. A step gets items that may be views of a slot; they stay valid as long as something refers to them.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeAlias

from dsline.specs import ArraySpec

__all__ = [
    "Context",
    "Emit",
    "MergeStep",
    "Operator",
    "Router",
    "Schema",
    "Sink",
    "SinkStep",
    "Source",
    "SourceStep",
    "Step",
]

# Frames and records are an ArraySpec; columns map a name to a 1-D ArraySpec; None: not known before it runs.
Schema: TypeAlias = ArraySpec | Mapping[str, ArraySpec] | None
Emit: TypeAlias = Callable[[Any], None]


@dataclasses.dataclass
class Context:
    """What a step may know about where it runs.

    Attributes
    ----------
    stage : str
        Name of the stage, for errors.
    worker : int
        Number of the worker process, from 0; -1 in the caller's process.
    workers : int
        How many share the stage; 0 in the caller's process.
    attempt : int
        Deliveries of the current item before this one; kept up to date by the runtime.
    allocate : callable or None
        ``allocate(shape, dtype)`` returns a writable array in the output slot, for the last operator before an edge; None
        elsewhere. Emitting that very array publishes the slot without a copy.
    count : callable
        ``count("late", 3)`` adds to a named counter of the stage.
    pause : callable
        Sleeps for so many seconds; does not return where the pipeline is being aborted meanwhile.
    """

    stage: str
    worker: int = -1
    workers: int = 0
    attempt: int = 0
    allocate: Callable[[Any, Any], Any] | None = None
    count: Callable[[str, int], None] = lambda what, number: None
    pause: Callable[[float], None] = time.sleep


class Step:
    """A running operator. Not thread-safe; one thread calls it."""

    def process(self, item: Any, emit: Emit) -> None:
        """Take one item and emit any number of results."""
        raise NotImplementedError

    def finish(self, emit: Emit) -> None:
        """The input has ended in order: emit what is left."""

    def deadline(self) -> float | None:
        """Say when `tick` wants to be called, on time.monotonic(); None: not at all."""
        return None

    def tick(self, emit: Emit) -> None:
        """The deadline has passed."""

    @property
    def holding(self) -> bool:
        """Whether rows of items that were processed have not been emitted yet, so that those items must not be
        acknowledged."""
        return False

    @property
    def is_full(self) -> bool:
        """Whether `process` would block until the deadline: no item should come before."""
        return False

    @property
    def offset(self) -> int:
        """Of a step that holds: rows of the last item that have been emitted. A step that resumes skips them."""
        return 0

    def resume(self, offset: int) -> None:
        """Skip the first `offset` rows of the next item: they were emitted before the process died."""

    def state_dict(self) -> Any:
        """Return what `load_state_dict` needs to go on from here; None: nothing. Must be picklable."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Go on from a state that `state_dict` returned."""

    def close(self) -> None:
        """End: called once, also after an error."""


class MergeStep(Step):
    """A running operator with several inputs, numbered from 0."""

    def wants(self, index: int) -> bool:
        """Whether an item of input `index` can be taken now."""
        return True

    def process_from(self, index: int, item: Any, emit: Emit) -> None:
        raise NotImplementedError

    def end_of(self, index: int, emit: Emit) -> None:
        """Input `index` has ended."""

    def process(self, item: Any, emit: Emit) -> None:
        self.process_from(0, item, emit)


class Operator(abc.ABC):
    """Description of an operator with one input and one output."""

    kind: ClassVar[str]
    stateful: ClassVar[bool] = False  # keeps state from item to item that dies with its process
    holds: ClassVar[bool] = False  # may keep rows until a later item or a deadline; see Step.holding

    @abc.abstractmethod
    def start(self, context: Context) -> Step:
        """Make the running operator."""

    def check(self, schema: Schema) -> Schema:
        """Return the schema of the output for a given input; None: not known.

        Raises
        ------
        PipelineBuildError
            The input cannot be processed: a column that is not there, a wrong kind or dtype. The plan adds the stage.
        """
        return None

    def describe(self) -> str:
        """One line for explain() and drawings."""
        return self.kind

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return {"op": kind, ...} with plain values; functions as "module:qualname".

        Raises
        ------
        PipelineBuildError
            It has something that no text stands for: a lambda, a function of the main program.
        """


class Router(Operator):
    """Description of an operator that distributes over several outputs; the last one of its segment."""

    outputs: tuple[str, ...]  # names of the outputs

    def route(self, context: Context) -> Callable[[Any], Iterable[tuple[int, Any]]]:
        """Return the function that takes an item and yields (number of the output, item for it)."""
        raise NotImplementedError

    def start(self, context: Context) -> Step:
        raise NotImplementedError("a router has no step")


class SourceStep:
    """A running source."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the items. May block; `stop` from another thread makes it end soon."""
        raise NotImplementedError

    def position(self) -> Any:
        """Return where the next item stands, for a checkpoint; None: it cannot be resumed."""
        return None

    def seek(self, position: Any) -> None:
        """Go on from what `position` returned."""
        raise NotImplementedError

    def stop(self) -> None:
        """Yield nothing more. May be called from another thread."""

    def close(self) -> None:
        """Called once, by the thread that iterates."""


class Source(abc.ABC):
    """Description of where items come from."""

    kind: ClassVar[str]
    schema: Schema = None
    target: str | None = (
        None  # the place it reads, as a URI, so that a plan sees who reads and writes the same one
    )
    replayable: ClassVar[bool] = False  # position() and seek() work across processes

    @abc.abstractmethod
    def start(self, context: Context) -> SourceStep: ...

    def describe(self) -> str:
        return self.kind

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]: ...


class SinkStep:
    """A running sink."""

    def write(self, item: Any) -> None:
        """Take one item; it must not be kept beyond the call without a copy or a reference of its own."""
        raise NotImplementedError

    def flush(self) -> None:
        """What was written survives the process, as far as the sink promises it."""

    def position(self) -> Any:
        """After flush(): what `restore` needs to forget everything later; None: it cannot."""
        return None

    def restore(self, position: Any) -> None:
        """Forget what was written after `position`."""

    def finish(self) -> None:
        """The input has ended in order."""

    def close(self) -> None:
        """Called once, also after an error."""


class Sink(abc.ABC):
    """Description of where items go."""

    kind: ClassVar[str]
    target: str | None = None  # the place it writes, as a URI; None: no two sinks can be in each other's way

    @abc.abstractmethod
    def start(self, context: Context) -> SinkStep: ...

    def check(self, schema: Schema) -> None:  # noqa: B027 - most sinks take anything
        """Raise PipelineBuildError where items of this schema cannot be written."""

    def describe(self) -> str:
        return self.kind

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]: ...
