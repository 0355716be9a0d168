"""Pipeline: the immutable builder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dsline.dataflow import ops
from dsline.dataflow.descriptions import parse_seconds
from dsline.dataflow.items import own
from dsline.dataflow.operator import Operator, Router, Sink, Source
from dsline.dataflow.operators import Merge
from dsline.dataflow.options import StageOptions, parse_bytes
from dsline.dataflow.plan import CheckpointOptions, Part, Plan, Stage, in_stage
from dsline.dataflow.sinks import ChannelSink, CollectSink, SinkOptions, parse_sink
from dsline.dataflow.sources import parse_source
from dsline.errors import PipelineBuildError, PipelineError

if TYPE_CHECKING:
    from dsline.dataflow.counters import PipelineStats
    from dsline.dataflow.run import Report, Run

__all__ = ["Pipeline"]

_POLICIES = ("drop_oldest", "drop_newest", "latest")
_STAGE_OPTIONS = frozenset(field.name for field in dataclasses.fields(StageOptions))


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """A stage in the making. Branches share the nodes that they have in common."""

    part: Part
    options: StageOptions
    inputs: tuple[tuple[_Node, int], ...]


def _split(options: dict[str, Any]) -> tuple[StageOptions, dict[str, Any]]:
    """Take the stage options out of keyword arguments; the rest is the operator's."""
    stage = {name: value for name, value in options.items() if name in _STAGE_OPTIONS}
    return StageOptions.parse(stage), {name: value for name, value in options.items() if name not in stage}


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _names_stage(method: _Method) -> _Method:
    """Let what is wrong with an operator name the stage that it would have been."""

    @functools.wraps(method)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except PipelineBuildError as error:
            raise in_stage(str(kwargs.get("name") or method.__name__), error) from error.__cause__

    return cast(_Method, named)


class Pipeline:
    """Description of a dataflow. Immutable: every method returns a new pipeline, and what was built so far can be used again.

    Parameters
    ----------
    name : str, optional
        For messages, drawings and checkpoints.
    memory : int or str
        Bytes that all channels of a run together may take, as ``"2GiB"``.

    Notes
    -----
    Every operator takes the stage options of `dsline.dataflow.options.StageOptions` as keyword arguments: ``name``, ``workers``,
    ``ordered``, ``queue``, ``queue_bytes``, ``full``, ``on_error``, ``max_errors``, ``restart``, ``on_crash``,
    ``max_deliveries``, ``timeout``, ``cpus``, ``threads``, ``start_method``.

    Examples
    --------
    >>> import dsline
    >>> dsline.Pipeline().source([1, 2, 3]).map(lambda x: x * x).collect()
    [1, 4, 9]
    """

    __slots__ = (
        "__weakref__",
        "_checkpoint",
        "_latest",
        "_memory",
        "_name",
        "_sinks",
        "_tail",
        "_windows_key",
    )

    _name: str
    _memory: int
    _tail: tuple[_Node, int] | None
    _sinks: tuple[_Node, ...]
    _checkpoint: CheckpointOptions | None
    _windows_key: Any
    _latest: list[Run]

    def __init__(self, name: str | None = None, *, memory: int | str = "1GiB") -> None:
        if name is not None and not isinstance(name, str):
            raise PipelineBuildError(f"name is a {type(name).__name__}, must be a text")
        self._set(name or "pipeline", parse_bytes(memory), None, (), None)

    def _set(
        self,
        name: str,
        memory: int,
        tail: tuple[_Node, int] | None,
        sinks: tuple[_Node, ...],
        checkpoint: CheckpointOptions | None,
        windows_key: Any = None,
    ) -> Pipeline:
        for attribute, value in (
            ("_name", name),
            ("_memory", memory),
            ("_tail", tail),
            ("_sinks", sinks),
            ("_checkpoint", checkpoint),
            ("_windows_key", windows_key),
            ("_latest", []),
        ):
            object.__setattr__(self, attribute, value)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Pipeline cannot be changed; {name!r} belongs to its constructor")

    def _with(
        self,
        tail: tuple[_Node, int] | None,
        sinks: tuple[_Node, ...] | None = None,
        windows_key: Any = None,
    ) -> Pipeline:
        made = object.__new__(Pipeline)
        return made._set(
            self._name,
            self._memory,
            tail,
            self._sinks if sinks is None else sinks,
            self._checkpoint,
            windows_key,
        )

    def _end(self, what: str) -> tuple[_Node, int]:
        if self._tail is None:
            why = (
                "it ends with a sink already"
                if self._sinks
                else "it has no source yet; begin with .source(...)"
            )
            raise PipelineBuildError(f"{what} cannot be added to pipeline {self._name!r}: {why}")
        return self._tail

    def _add(self, part: Part, options: StageOptions) -> Pipeline:
        return self._with((_Node(part, options, (self._end(part.kind),)), 0))

    # --- sources ---

    @classmethod
    def from_transport(cls, uri: Any, **options: Any) -> Pipeline:
        """Return a pipeline that reads `uri`; the same as ``Pipeline().source(uri)``."""
        return cls().source(uri, **options)

    def source(self, source: Any, **options: Any) -> Pipeline:
        """Begin with what items come from.

        Parameters
        ----------
        source : str, path, iterable, callable, channel or Source
            ``shm://name``, ``bus://name``, ``file://path``, the path of a .npy or .npz file, an iterable, a callable that
            returns one, or an open channel. See docs/dataflow/sources-and-sinks.md.
        **options
            Options of the source and stage options.

        Raises
        ------
        PipelineBuildError
            The pipeline has a source, or there is no such source.
        """
        if self._tail is not None or self._sinks:
            raise PipelineBuildError(
                f"pipeline {self._name!r} has a source; use .merge() to bring several together"
            )
        stage, own = _split(options)
        part = source if isinstance(source, Source) and not own else parse_source(source, **own)
        return self._with((_Node(part, stage, ()), 0))

    # --- operators ---

    def pipe(self, operator: Operator, **options: Any) -> Pipeline:
        """Add an operator of `dsline.ops`.

        Parameters
        ----------
        operator : Operator
            As ``ops.map(function)``.
        **options
            Stage options.
        """
        if not isinstance(operator, Operator):
            raise PipelineBuildError(
                f"pipe takes an operator of dsline.ops, not a {type(operator).__name__}; "
                "for a function use .map(function)"
            )
        if isinstance(operator, Router | Merge):
            raise PipelineBuildError(
                f"{operator.kind} has several outputs or inputs; use the method of that name"
            )
        return self._add(operator, StageOptions.parse(options))

    @_names_stage
    def map(self, function: Callable[..., Any], *, returns: Any = None, **stage: Any) -> Pipeline:
        """Call `function` with every item. None drops the item; a generator gives several. See `ops.map`."""
        return self._add(ops.map(function, returns=returns), StageOptions.parse(stage))

    @_names_stage
    def map_batches(
        self, function: Callable[..., Any], *, batch: int = 256, linger: Any = "10ms", **options: Any
    ) -> Pipeline:
        """Gather rows, and call `function` with every batch. See `ops.map_batches`.

        With ``workers=N`` the rows are gathered in a stage of their own before it, and N processes share the batches.
        """
        stage, own = _split(options)
        if stage.workers:
            return self.batch(batch, linger=linger)._add(ops.map(function, **own), stage)
        return self._add(ops.map_batches(function, batch=batch, linger=linger, **own), stage)

    @_names_stage
    def filter(self, condition: str | Callable[..., Any], **stage: Any) -> Pipeline:
        """Keep the items or rows for which an expression or a function is true. See `ops.filter`."""
        return self._add(ops.filter(condition), StageOptions.parse(stage))

    @_names_stage
    def derive(self, **options: Any) -> Pipeline:
        """Add columns that are computed by expressions. See `ops.derive`.

        A column cannot have the name of a stage option; use ``.pipe(ops.derive(...))`` for that.
        """
        stage, own = _split(options)
        return self._add(ops.derive(**own), stage)

    @_names_stage
    def select(self, *columns: str, **options: Any) -> Pipeline:
        """Keep some columns. See `ops.select`."""
        stage, own = _split(options)
        return self._add(ops.select(*columns, **own), stage)

    @_names_stage
    def batch(
        self, size: int, *, linger: Any = None, drop_last: bool = False, pad: Any = None, **stage: Any
    ) -> Pipeline:
        """Gather rows or items into batches of `size`. See `ops.batch`."""
        return self._add(
            ops.batch(size, linger=linger, drop_last=drop_last, pad=pad), StageOptions.parse(stage)
        )

    @_names_stage
    def unbatch(self, **stage: Any) -> Pipeline:
        """Give the rows of every item one by one. See `ops.unbatch`."""
        return self._add(ops.unbatch(), StageOptions.parse(stage))

    @_names_stage
    def key_by(self, key: Any, *, partitions: int | None = None, **stage: Any) -> Pipeline:
        """Make `key` the key of the windows that follow, and spread the keys over `partitions` processes.

        With ``partitions=N`` the next stage runs N times, in one worker process each, and each sees the rows of its keys, in
        their order. See `ops.key_by`.
        """
        if partitions is None:
            return self._with(self._end("key_by"), windows_key=key)
        router = ops.key_by(key, partitions=partitions)
        return self._with(
            (_Node(router, StageOptions.parse(stage), (self._end("key_by"),)), 0), windows_key=key
        )

    @_names_stage
    def window(self, spec: Any, **options: Any) -> Pipeline:
        """Aggregate rows over windows of rows or of time. See `ops.window`.

        An aggregate cannot have the name of a stage option; use ``.pipe(ops.window(...))`` for that.
        """
        stage, own = _split(options)
        if self._windows_key is not None and not callable(self._windows_key):
            own.setdefault("key", self._windows_key)
        return self._add(ops.window(spec, **own), stage)

    @_names_stage
    def rate_limit(self, per_second: float, *, burst: int = 1, **options: Any) -> Pipeline:
        """Let at most `per_second` items through. See `ops.rate_limit`."""
        stage, own = _split({name: value for name, value in options.items() if name != "full"})
        if "full" in options:
            own["full"] = options["full"]
        return self._add(ops.rate_limit(per_second, burst=burst, **own), stage)

    # --- several ways ---

    def branch(self, **predicates: Any) -> dict[str, Pipeline]:
        """Split by content: every item or row goes to the first branch whose predicate is true. See `ops.branch`.

        Returns
        -------
        dict of str to Pipeline
            Give each a sink and join them by `Pipeline.together`, or bring them back together by `merge`.
        """
        return self._route(ops.branch(**predicates))

    split = branch

    def broadcast(self, *ways: Any) -> Any:
        """Give every item to several sinks or branches.

        Parameters
        ----------
        *ways
            Sinks (URIs, callables, `dsline.Sink`), which makes a complete pipeline of it; or one number or several names,
            which returns so many branches.

        Returns
        -------
        Pipeline, or list of Pipeline for a number, or dict of str to Pipeline for ``names=``
        """
        if len(ways) == 1 and isinstance(ways[0], int) and not isinstance(ways[0], bool):
            return list(self._route(ops.broadcast(ways[0])).values())
        if not ways:
            raise PipelineBuildError("broadcast needs sinks, or a number of branches")
        branches = self._route(ops.broadcast(len(ways)))
        return Pipeline.together(*(each.sink(way) for each, way in zip(branches.values(), ways, strict=True)))

    def _route(self, router: Router) -> dict[str, Pipeline]:
        node = _Node(router, StageOptions(), (self._end(router.kind),))
        return {name: self._with((node, number)) for number, name in enumerate(router.outputs)}

    def merge(self, *others: Pipeline, order: str = "arrival", **options: Any) -> Pipeline:
        """Bring several pipelines together. See `ops.merge`.

        Parameters
        ----------
        *others : Pipeline
            They may come from the same source, or have their own.
        order : str
            "arrival", "ts" (by time stamp) or "zip" (one of each).
        """
        stage, own = _split(options)
        inputs = (self._end("merge"), *(other._end("merge") for other in others))
        node = _Node(ops.merge(len(inputs), order=order, **own), stage, inputs)
        return self._with((node, 0), _united([self, *others]))

    @staticmethod
    def together(*pipelines: Pipeline) -> Pipeline:
        """Join pipelines that each end in a sink into one that runs them all."""
        if not pipelines:
            raise PipelineBuildError("together needs pipelines")
        for each in pipelines:
            if each._tail is not None:
                raise PipelineBuildError(
                    f"a branch of pipeline {each._name!r} ends without a sink in {each._tail[0].part.kind!r}; add .sink(...)"
                )
        return pipelines[0]._with(None, _united(pipelines))

    # --- ends ---

    def sink(self, target: Any, **options: Any) -> Pipeline:
        """End with where items go.

        Parameters
        ----------
        target : str, path, callable, channel, list or Sink
            ``shm://name``, ``bus://name``, ``file://path``, a path of a .npy file, a function that is called with every item.
            See docs/dataflow/sources-and-sinks.md.
        **options
            Options of the sink and stage options.
        """
        if isinstance(target, SinkOptions):
            options = {**target.options, **options}
            target = target.target
        stage, own = _split(options)
        part = target if isinstance(target, Sink) and not own else parse_sink(target, **own)
        if (
            isinstance(part, ChannelSink)
            and stage.full in _POLICIES
            and part.channel is None
            and part is not target
        ):
            part = parse_sink(target, **own, full=stage.full)  # its receivers may be slow as well
        node = _Node(part, stage, (self._end("a sink"),))
        return self._with(None, (*self._sinks, node))

    def checkpoint(self, directory: Any, *, every: Any = "5s") -> Pipeline:
        """Save the state of the whole pipeline into `directory` every so often, and at the end.

        Parameters
        ----------
        directory : str or path
            Belongs to this pipeline alone.
        every : float or str
            Seconds, or a text like "500ms".
        """
        seconds = parse_seconds(every, "every")
        made = self._with(self._tail)
        object.__setattr__(made, "_checkpoint", CheckpointOptions(str(directory), seconds))
        return made

    # --- the original API ---

    def filter_expr(self, expression: str, **stage: Any) -> Pipeline:
        """Keep the rows for which `expression` is true; the same as `filter`."""
        return self.filter(expression, **stage)

    def map_expr(self, **expressions: Any) -> Pipeline:
        """Add columns; the same as `derive`."""
        return self.derive(**expressions)

    def filter_py(self, function: Callable[..., Any], **stage: Any) -> Pipeline:
        """Keep the items for which `function` is true; the same as `filter`."""
        return self.filter(function, **stage)

    def map_py(self, function: Callable[..., Any], **stage: Any) -> Pipeline:
        """Call `function` with every item; the same as `map`."""
        return self.map(function, **stage)

    def map_py_batch(self, function: Callable[..., Any], **options: Any) -> Pipeline:
        """Call `function` with every batch; the same as `map_batches`."""
        return self.map_batches(function, **options)

    @_names_stage
    def filter_py_batch(
        self, function: Callable[..., Any], *, batch: int | None = 256, linger: Any = "10ms", **stage: Any
    ) -> Pipeline:
        """Keep the rows of every batch for which `function` returns true. See `ops.filter_py_batch`.

        With ``workers=N`` the rows are gathered in a stage of their own before it, and N processes share the batches.
        """
        options = StageOptions.parse(stage)
        if options.workers and batch is not None:
            return self.batch(batch, linger=linger)._add(ops.filter_py_batch(function, batch=None), options)
        return self._add(ops.filter_py_batch(function, batch=batch, linger=linger), options)

    # --- running ---

    def plan(self) -> Plan:
        """Check the pipeline and return its plan.

        Raises
        ------
        PipelineBuildError
            Something cannot run; the message names the stage.
        """
        return self._plan(collect=False)

    def _plan(self, collect: bool) -> Plan:
        sinks = self._sinks
        if self._tail is not None:
            if not collect:
                raise PipelineBuildError(
                    f"pipeline {self._name!r} ends without a sink; add .sink(...), or use .collect() or iterate over it"
                )
            sinks = (*sinks, _Node(CollectSink(None), StageOptions(), (self._tail,)))
        elif collect and not any(isinstance(node.part, CollectSink) for node in sinks):
            raise PipelineBuildError(
                f"pipeline {self._name!r} ends with a sink: there is nothing to collect; use .run()"
            )
        nodes: dict[_Node, int] = {}
        for sink in sinks:
            _number(sink, nodes)
        stages = [
            Stage(
                node.options.name or _name_of(node.part),
                node.part,
                node.options,
                tuple((nodes[origin], output) for origin, output in node.inputs),
            )
            for node in nodes
        ]
        return Plan(self._name, stages, self._memory, self._checkpoint)

    def explain(self) -> str:
        """Describe how the pipeline would run; the same as ``plan().explain()``."""
        return self._plan(collect=self._tail is not None).explain()

    def start(self, **options: Any) -> Run:
        """Start all processes and return at once. See `dsline.dataflow.run.Run`.

        Parameters
        ----------
        resume : bool
            Go on from the newest checkpoint.
        hooks : keyword arguments
            ``on_error``, ``on_backpressure``, ``on_stage_start``, ``on_stage_stop``, ``on_restart``, ``on_event``.
        """
        return self._remember(_run_module().Run(self.plan(), **options))

    def _remember(self, run: Run) -> Run:
        self._latest[:] = [run]
        return run

    def run(self, *, progress: Any = False, timeout: float | None = None, **options: Any) -> Report:
        """Run to the end.

        Parameters
        ----------
        progress : bool or callable
            Show a progress bar, or call with a `PipelineStats` several times a second.
        timeout : float or None
            Seconds after which the sources stop and the pipeline drains.
        **options
            As for `start`.

        Returns
        -------
        Report

        Raises
        ------
        OperatorError
            A function of a stage raised, and its policy is to raise.
        PipelineRuntimeError
            Something else failed: a worker that cannot be started, too many restarts, a full queue with full="error".

        Notes
        -----
        Ctrl-C once stops the sources and drains; twice aborts and raises KeyboardInterrupt.
        """
        with self.start(**options) as run:
            return run.supervise(progress=progress, timeout=timeout)

    def collect(self, **options: Any) -> list[Any]:
        """Run to the end and return what comes out, as a list. Arrays are copies."""
        found: list[Any] = []
        run = self._remember(_run_module().Run(self._plan(collect=True), collect=True, **options))
        with run:
            for item in run.items():
                found.append(own(item))
        return found

    def __iter__(self) -> Iterator[Any]:
        """Start, and yield what comes out; arrays are views that hold their slot as long as they live."""
        run = self._remember(_run_module().Run(self._plan(collect=True), collect=True))
        with run:
            yield from run.items()

    def stop(self, **options: Any) -> Any:
        """Stop the run that was started last. See `Run.stop`."""
        return self._running().stop(**options)

    def stats(self) -> PipelineStats:
        """Return the statistics of the run that was started last."""
        return self._running().stats()

    def _running(self) -> Run:
        if not self._latest:
            raise PipelineError(f"pipeline {self._name!r} was not started; call start() first")
        return self._latest[0]

    def __repr__(self) -> str:
        tail = "" if self._tail is None else f", ends with {self._tail[0].part.kind}"
        return f"<dsline.Pipeline {self._name!r}: {len(self._sinks)} sinks{tail}>"


def _run_module() -> Any:
    from dsline.dataflow import run  # starts no process, but loads multiprocessing

    return run


def _united(pipelines: Any) -> tuple[_Node, ...]:
    sinks: dict[_Node, None] = {}
    for each in pipelines:
        sinks.update(dict.fromkeys(each._sinks))
    return tuple(sinks)


def _number(node: _Node, numbers: dict[_Node, int]) -> None:
    for origin, _ in node.inputs:
        _number(origin, numbers)
    numbers.setdefault(node, len(numbers))


def _name_of(part: Part) -> str:
    function = getattr(part, "function", None)
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) and name.isidentifier() else part.kind
