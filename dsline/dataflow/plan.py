"""The plan of a pipeline: its stages and what leads from one to the next, checked; and the segments that run them.

A segment is a chain of stages that one thread runs without a channel between them: a thread of the caller's process, a
worker process, or each of several competing worker processes. An edge is the channel between two segments.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

from dsline.dataflow.descriptions import operator_from_json
from dsline.dataflow.drawing import mermaid, svg
from dsline.dataflow.operator import Operator, Router, Schema, Sink, Source
from dsline.dataflow.operators import Merge
from dsline.dataflow.options import StageOptions, parse_bytes
from dsline.dataflow.sinks import sink_from_json
from dsline.dataflow.sources import ChannelSource, source_from_json
from dsline.dataflow.windows import KeyBy
from dsline.errors import DslineError, PipelineBuildError
from dsline.specs import ArraySpec

__all__ = ["CheckpointOptions", "Edge", "Plan", "Segment", "Stage"]

Part: TypeAlias = Source | Operator | Sink

_FORMAT = 1
_SLOT_OF_OBJECTS = 1 << 16  # bytes; slots grow with what is sent
_SLOT_OF_ROWS = 1 << 12  # the same where there are many
_MOST_SLOTS = 4096
MAX_HELD = 0.75  # of the slots of an edge, for an operator that keeps inputs
AHEAD = 4  # finished results that a worker keeps while it waits for its turn


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """Where and how often the state of a pipeline is saved."""

    directory: str
    every: float = 5.0  # seconds


@dataclasses.dataclass(frozen=True)
class Stage:
    """One node of the graph.

    Attributes
    ----------
    name : str
        Unique in the plan.
    part : Source, Operator or Sink
        What it does.
    options : StageOptions
        How it runs.
    inputs : tuple of (int, int)
        Number of the stage that each input comes from, and which of its outputs.
    schema : Schema
        Of what it puts out; None: not known.
    """

    name: str
    part: Part
    options: StageOptions
    inputs: tuple[tuple[int, int], ...]
    schema: Schema = None

    @property
    def outputs(self) -> int:
        if isinstance(self.part, Sink):
            return 0
        # The partitions of keys go to one stage, which runs once for each.
        return (
            len(self.part.outputs)
            if isinstance(self.part, Router) and not isinstance(self.part, KeyBy)
            else 1
        )


@dataclasses.dataclass(frozen=True)
class Edge:
    """The channel between two segments, or from outside into one.

    Attributes
    ----------
    name : str
        "stage → stage".
    target : int
        Number of the segment that receives.
    slots, slot_size, max_message_size : int
        Geometry of the channel.
    full : str
        What happens when it is full.
    ahead : int
        Slots that each of several workers before it may write results into that wait for their turn.
    external : ChannelSource or None
        The channel that the caller named, for an edge that is not the pipeline's own.
    """

    name: str
    target: int
    slots: int
    queue: int
    slot_size: int
    max_message_size: int
    full: str
    guarantee: str
    external: ChannelSource | None = None
    ahead: int = 0


@dataclasses.dataclass(frozen=True)
class Segment:
    """A chain of stages that runs in one place.

    Attributes
    ----------
    name : str
        Of its most telling stage.
    stages : tuple of int
        Numbers of the stages, first to last.
    workers : int
        Worker processes; 0: a thread of the caller.
    inputs, outputs : tuple of int
        Numbers of edges.
    instance : int or None
        Which partition it is.
    """

    name: str
    stages: tuple[int, ...]
    workers: int
    ordered: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    instance: int | None = None


class Plan:
    """A checked pipeline. `Pipeline.plan` makes it; it can be printed, drawn, written as JSON and read again.

    Parameters
    ----------
    name : str
        Name of the pipeline.
    stages : sequence of Stage
        In an order in which every stage comes after its inputs.
    memory : int
        Bytes that all channels of the pipeline together may take.
    checkpoint : CheckpointOptions or None
        Where the state is saved.

    Raises
    ------
    PipelineBuildError
        A cycle, an output without a taker, an unknown column, two sinks on one channel, …: the message names the stage.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[Stage],
        memory: int,
        checkpoint: CheckpointOptions | None = None,
    ) -> None:
        self.name = name
        self.memory = memory
        self.checkpoint = checkpoint
        self.stages = _with_schemas(_sorted(_with_names(stages)))
        _check_ends(self.stages)
        _check_merges(self.stages)
        _check_places(self.stages, checkpoint)
        self.segments, self.edges = _Compiler(self).result()

    @property
    def worker_processes(self) -> int:
        """Number of processes besides the caller's."""
        return sum(segment.workers for segment in self.segments)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digits that change with the stages, not with how they run; a checkpoint belongs to one."""
        text = json.dumps(
            [[stage.name, stage.part.kind, stage.part.describe(), stage.inputs] for stage in self.stages]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    # --- for people ---

    def explain(self) -> str:
        """Describe processes, channels, memory, what is fused, and what each edge guarantees."""
        edges = [edge for edge in self.edges if edge.external is None]
        total = sum(edge.slots * edge.slot_size for edge in edges)
        lines = [
            f"pipeline {self.name!r}: the caller and {self.worker_processes} worker process"
            f"{'' if self.worker_processes == 1 else 'es'}, {len(edges)} channel{'' if len(edges) == 1 else 's'}, "
            f"{_size(total)} to begin with, at most {_size(self.memory)}"
        ]
        if self.checkpoint is not None:
            lines.append(f"checkpoint every {self.checkpoint.every:g} s into {self.checkpoint.directory}")
        for number, segment in enumerate(self.segments):
            for edge in (self.edges[each] for each in segment.inputs):
                geometry = (
                    f"{edge.queue} queued of {edge.slots} slots × {_size(edge.slot_size)}, full={edge.full}"
                    if edge.external is None
                    else "a channel from outside"
                )
                lines.append(f"   ↓ {edge.name}: {geometry}; {edge.guarantee}")
            lines.append(f"  [{number}] {self._place(segment)}")
            for each in segment.stages:
                stage = self.stages[each]
                schema = "" if stage.schema is None else f"   → {_schema_text(stage.schema)}"
                lines.append(f"        {stage.name}: {stage.part.describe()}{schema}")
            if len(segment.stages) > 1:
                lines.append("        (fused: no channel between these)")
        return "\n".join(lines)

    def _place(self, segment: Segment) -> str:
        if segment.workers == 0:
            return "in the caller's process"
        which = "" if segment.instance is None else f", partition {segment.instance}"
        if segment.workers == 1:
            return f"1 worker process{which}"
        return f"{segment.workers} worker processes, {'in order' if segment.ordered else 'as completed'}"

    def graph(self) -> dict[str, Any]:
        """Return nodes, edges and groups (segments) as plain values, for drawings."""
        seen: dict[int, list[str]] = {}
        for number, segment in enumerate(self.segments):
            for stage in segment.stages:
                seen.setdefault(stage, []).append(f"p{number}")
        nodes = [
            {
                "id": f"s{number}",
                "label": f"{stage.name}\n{stage.part.describe()}",
                "kind": "source" if isinstance(stage.part, Source) else "sink" if isinstance(stage.part, Sink) else "operator",
                "workers": stage.options.workers,
            }
            for number, stage in enumerate(self.stages)
        ]  # fmt: skip
        edges = [
            {"from": f"s{origin}", "to": f"s{number}", "label": self._label(origin, output, number)}
            for number, stage in enumerate(self.stages)
            for origin, output in stage.inputs
        ]
        groups = [
            {
                "id": f"p{number}",
                "label": self._place(segment),
                "nodes": [f"s{stage}" for stage in segment.stages if seen[stage][0] == f"p{number}"],
            }
            for number, segment in enumerate(self.segments)
        ]
        return {
            "name": self.name,
            "nodes": nodes,
            "edges": edges,
            "groups": [group for group in groups if group["nodes"]],
        }

    def _label(self, origin: int, output: int, target: int) -> str:
        part = self.stages[origin].part
        name = part.outputs[output] if isinstance(part, Router) else ""
        for segment in self.segments:
            if target in segment.stages and origin not in segment.stages and segment.inputs:
                edge = self.edges[segment.inputs[0]]
                return f"{name} {edge.queue} × {_size(edge.slot_size)} {edge.full}".strip()
        return name

    def to_mermaid(self) -> str:
        """Draw the graph as Mermaid text."""
        return mermaid(self.graph())

    def to_svg(self) -> str:
        """Draw the graph as SVG text."""
        return svg(self.graph())

    def __str__(self) -> str:
        return self.explain()

    def __repr__(self) -> str:
        return f"<dsline.Plan {self.name!r}: {len(self.stages)} stages, {len(self.segments)} segments>"

    # --- JSON ---

    def to_json(self, *, indent: int | None = 2) -> str:
        """Write the plan as JSON. Functions are named as "module:name".

        Raises
        ------
        PipelineBuildError
            A stage has something that no text stands for: a lambda, a function of the main program, an iterable.
        """
        plain = {
            "dsline_plan": _FORMAT,
            "name": self.name,
            "memory": self.memory,
            "checkpoint": None if self.checkpoint is None else dataclasses.asdict(self.checkpoint),
            "stages": [
                {
                    "name": stage.name,
                    "inputs": [
                        [self.stages[origin].name, output] if output else self.stages[origin].name
                        for origin, output in stage.inputs
                    ],
                    "part": _of(stage, stage.part.to_json),
                    "options": stage.options.to_json(),
                }
                for stage in self.stages
            ],
        }
        return json.dumps(plain, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan. Functions that it names are imported, so the text must be trusted as a program is.

        Raises
        ------
        PipelineBuildError
            The text is not a plan, or the plan is wrong.
        """
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise PipelineBuildError(f"a plan must be JSON: {error}") from None
        if not isinstance(plain, dict) or plain.get("dsline_plan") != _FORMAT:
            raise PipelineBuildError(f'a plan is a JSON object with "dsline_plan": {_FORMAT}')
        try:
            return cls(
                str(plain["name"]),
                _stages_from_json(plain["stages"]),
                parse_bytes(plain["memory"]),
                None if plain.get("checkpoint") is None else CheckpointOptions(**plain["checkpoint"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PipelineBuildError(
                f"the plan is incomplete or has a value of a wrong type: {error!r}"
            ) from error


def _stages_from_json(entries: list[dict[str, Any]]) -> list[Stage]:
    numbers: dict[str, int] = {}
    for number, entry in enumerate(entries):
        if entry["name"] in numbers:
            raise PipelineBuildError(f"two stages have the name {entry['name']!r}; give one another")
        numbers[entry["name"]] = number
    stages = []
    for entry in entries:
        name = entry["name"]
        inputs = []
        for link in entry.get("inputs", []):
            origin, output = (link, 0) if isinstance(link, str) else (link[0], int(link[1]))
            if origin not in numbers:
                raise PipelineBuildError(f"stage {name!r}: its input {origin!r} is no stage of the plan")
            inputs.append((numbers[origin], output))
        try:
            part = _part_from_json(entry["part"])
            options = StageOptions.parse({**entry.get("options", {}), "name": name})
        except PipelineBuildError as error:
            raise in_stage(name, error) from error
        stages.append(Stage(name, part, options, tuple(inputs)))
    return stages


def _part_from_json(entry: dict[str, Any]) -> Part:
    if "source" in entry:
        return source_from_json(entry)
    if "sink" in entry:
        return sink_from_json(entry)
    return operator_from_json(entry)


def in_stage(name: str, error: DslineError) -> PipelineBuildError:
    """Return the error with the stage in its text."""
    text = str(error)
    kind = type(error) if isinstance(error, PipelineBuildError) else PipelineBuildError
    made = kind(text if text.startswith("stage ") else f"stage {name!r}: {text}")
    made.__dict__.update(error.__dict__)  # the column of an expression
    return made


def _of(stage: Stage, call: Any, *args: Any) -> Any:
    """Call, and name the stage in what it raises."""
    try:
        return call(*args)
    except DslineError as error:
        raise in_stage(stage.name, error) from error


def _with_names(stages: Sequence[Stage]) -> list[Stage]:
    if not stages:
        raise PipelineBuildError("the pipeline has no stages; begin with .source(...)")
    taken = {stage.name for stage in stages if stage.options.name is not None}
    given = [stage.name for stage in stages if stage.options.name is not None]
    for name in given:
        if given.count(name) > 1:
            raise PipelineBuildError(f"two stages have the name {name!r}; give one another name")
    named = []
    for stage in stages:
        if stage.options.name is None:
            name, number = stage.name, 1
            while name in taken:
                number += 1
                name = f"{stage.name}-{number}"
            taken.add(name)
            stage = dataclasses.replace(
                stage, name=name, options=dataclasses.replace(stage.options, name=name)
            )
        named.append(stage)
    return named


def _sorted(stages: list[Stage]) -> list[Stage]:
    """Put every stage behind its inputs; refuse cycles."""
    order: list[int] = []
    state = [0] * len(stages)  # 1: its inputs are being looked at

    def visit(number: int, way: list[int]) -> None:
        if state[number] == 2:
            return
        if state[number] == 1:
            names = " → ".join(stages[each].name for each in reversed([*way[way.index(number) :], number]))
            raise PipelineBuildError(f"the stages form a cycle: {names}; a pipeline must have none")
        state[number] = 1
        for origin, _ in stages[number].inputs:
            visit(origin, [*way, number])
        state[number] = 2
        order.append(number)

    for number in range(len(stages)):
        visit(number, [])
    place = {old: new for new, old in enumerate(order)}
    return [
        dataclasses.replace(
            stages[old], inputs=tuple((place[origin], output) for origin, output in stages[old].inputs)
        )
        for old in order
    ]


def _with_schemas(stages: list[Stage]) -> tuple[Stage, ...]:
    checked: list[Stage] = []
    for stage in stages:
        part = stage.part
        for origin, output in stage.inputs:
            if output >= checked[origin].outputs:
                raise PipelineBuildError(
                    f"stage {stage.name!r}: stage {checked[origin].name!r} has no output {output}"
                )
        schemas = [checked[origin].schema for origin, _ in stage.inputs]
        if isinstance(part, Source):
            schema = _of_rows(part.schema)
        elif isinstance(part, Sink):
            _of(stage, part.check, schemas[0])
            schema = None
        elif isinstance(part, Merge):
            schema = _of(stage, part.check_inputs, schemas)
        else:
            schema = _of(stage, part.check, schemas[0])
        checked.append(dataclasses.replace(stage, schema=schema))
    return tuple(checked)


def _of_rows(schema: Schema) -> Schema:
    """A record alone comes as records of one row."""
    if isinstance(schema, ArraySpec) and schema.shape == () and schema.dtype.names:
        return ArraySpec((1,), schema.dtype)
    return schema


def _check_ends(stages: tuple[Stage, ...]) -> None:
    takers: dict[tuple[int, int], list[str]] = {}
    for stage in stages:
        wanted = (
            "none"
            if isinstance(stage.part, Source)
            else "1 or more"
            if isinstance(stage.part, Merge)
            else "1"
        )
        has = len(stage.inputs)
        if (wanted == "none") != (has == 0) or (wanted == "1" and has != 1):
            raise PipelineBuildError(f"stage {stage.name!r} has {has} inputs, needs {wanted}")
        for link in stage.inputs:
            takers.setdefault(link, []).append(stage.name)
    for number, stage in enumerate(stages):
        for output in range(stage.outputs):
            found = takers.get((number, output), [])
            if len(found) > 1:
                raise PipelineBuildError(
                    f"stage {stage.name!r}: its output goes to {' and '.join(map(repr, found))}; use .broadcast() to give "
                    "every item to several stages"
                )
            if not found:
                which = (
                    f"output {stage.part.outputs[output]!r}"
                    if isinstance(stage.part, Router)
                    else "what it puts out"
                )
                raise PipelineBuildError(
                    f"stage {stage.name!r}: {which} goes nowhere; give it a sink, and join branches with .merge() or "
                    "Pipeline.together()"
                )
    targets: dict[str, str] = {}
    for stage in stages:
        if isinstance(stage.part, Sink) and stage.part.target is not None:
            other = targets.setdefault(stage.part.target, stage.name)
            if other != stage.name:
                raise PipelineBuildError(
                    f"stages {other!r} and {stage.name!r} are two sinks on {stage.part.target}; merge them before one sink"
                )
    for stage in stages:
        if isinstance(stage.part, Source) and stage.part.target is not None and stage.part.target in targets:
            raise PipelineBuildError(
                f"stages {stage.name!r} and {targets[stage.part.target]!r} read from and write to {stage.part.target}: a cycle"
            )


def _check_places(stages: tuple[Stage, ...], checkpoint: CheckpointOptions | None) -> None:
    for stage in stages:
        part, options = stage.part, stage.options
        why = None
        if options.workers > 1:
            if isinstance(part, Source | Sink):
                why = f"a {'source' if isinstance(part, Source) else 'sink'} runs in one place"
            elif part.stateful or part.holds:
                why = "it keeps something from item to item; use key_by(partitions=N) before a window for several processes"
        if options.workers > 0 and isinstance(part, Merge | KeyBy):
            why = "it only hands items on, in the caller's process; leave workers= away"
        if why is not None:
            raise PipelineBuildError(
                f"stage {stage.name!r}: workers={options.workers} is not possible: {why}"
            )
        if checkpoint is None:
            continue
        if isinstance(part, Source) and not part.replayable:
            raise PipelineBuildError(
                f"stage {stage.name!r}: a checkpoint needs a source that can be replayed, such as file://path or .npy files; "
                f"{part.describe()} cannot"
            )
        if options.workers > 1 and not options.ordered:
            raise PipelineBuildError(f"stage {stage.name!r}: ordered=False is not possible with a checkpoint")
        if options.full != "block":
            raise PipelineBuildError(
                f"stage {stage.name!r}: full={options.full!r} is not possible with a checkpoint"
            )


_ONE_FOR_ONE: Final = frozenset({"map", "derive", "select", "broadcast"})


def _check_merges(stages: tuple[Stage, ...]) -> None:
    """Refuse merges that would wait for one branch while the other one keeps the common source from going on."""
    for stage in stages:
        part = stage.part
        if not isinstance(part, Merge) or part.order == "arrival" or (part.by_key and part.idle is not None):
            continue
        ways = [dict(_way(stages, origin)) for origin, _ in stage.inputs]
        for place, way in enumerate(ways):
            for other in ways[place + 1 :]:
                common = [
                    number for number in way if number in other and isinstance(stages[number].part, Router)
                ]
                if not common:
                    continue
                router = stages[max(common)]
                kinds = way[max(common)] | other[max(common)]
                if part.order == "zip" and router.part.kind == "broadcast" and kinds <= _ONE_FOR_ONE:
                    continue
                raise PipelineBuildError(
                    f"stage {stage.name!r}: an order of {part.order!r} waits for every input, and its inputs are branches of "
                    f"{router.name!r}, which waits for room in each of them: it can stand still for ever; use order='arrival', "
                    f"{'idle= for an order by a column, ' if part.by_key else ''}or sources of their own"
                )


def _way(stages: tuple[Stage, ...], number: int) -> Iterator[tuple[int, frozenset[str]]]:
    """Yield every stage upstream of one, with the kinds of the stages between."""
    todo: list[tuple[int, frozenset[str]]] = [(number, frozenset())]
    while todo:
        here, kinds = todo.pop()
        yield here, kinds
        todo += [(origin, kinds | {stages[here].part.kind}) for origin, _ in stages[here].inputs]


def _size(count: int) -> str:
    for unit, bound in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= bound:
            return f"{count / bound:.4g} {unit}"
    return f"{count} B"


def _schema_text(schema: Schema) -> str:
    if isinstance(schema, ArraySpec):
        return repr(schema)
    assert schema is not None
    return "columns(" + ", ".join(f"{name}={spec.dtype}" for name, spec in schema.items()) + ")"


def _bytes_of(schema: Schema) -> int | None:
    """Bytes of one item, where they are always the same."""
    return schema.nbytes if isinstance(schema, ArraySpec) else None


class _Compiler:
    """Cuts the graph of a plan into segments and edges."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._stages = plan.stages
        self._chains: list[list[int]] = []
        self._partitions: dict[int, int] = {}  # chain -> number of instances
        self._chain_of: dict[int, int] = {}

    def result(self) -> tuple[tuple[Segment, ...], tuple[Edge, ...]]:
        for number, stage in enumerate(self._stages):
            self._place(number, stage)
        return self._connect()

    def _place(self, number: int, stage: Stage) -> None:
        before = [self._chain_of[origin] for origin, _ in stage.inputs]
        fused = before[0] if len(before) == 1 and self._fuses(number, stage, before[0]) else None
        if fused is None:
            fused = len(self._chains)
            self._chains.append([])
            if before and self._is_partitioned(stage):
                self._partitions[fused] = len(self._stages[stage.inputs[0][0]].part.outputs)  # type: ignore[union-attr]
        self._chains[fused].append(number)
        self._chain_of[number] = fused

    def _is_partitioned(self, stage: Stage) -> bool:
        return isinstance(self._stages[stage.inputs[0][0]].part, KeyBy)

    def _fuses(self, number: int, stage: Stage, chain: int) -> bool:
        last = self._stages[self._chains[chain][-1]]
        if self._chains[chain][-1] != stage.inputs[0][0] or isinstance(last.part, Router):
            return False
        if chain in self._partitions or stage.options.workers or isinstance(stage.part, Merge):
            return False
        if isinstance(last.part, ChannelSource) and last.options.workers == 0:
            return stage.options.full == "block"
        return self._workers(chain) == 0 and stage.options.full == "block"

    def _workers(self, chain: int) -> int:
        return max(self._stages[number].options.workers for number in self._chains[chain])

    def _connect(self) -> tuple[tuple[Segment, ...], tuple[Edge, ...]]:
        drafts: list[dict[str, Any]] = []
        first: dict[int, int] = {}  # chain -> number of its first segment
        edges: list[dict[str, Any]] = []
        for chain, numbers in enumerate(self._chains):
            first[chain] = len(drafts)
            count = self._partitions.get(chain, 0)
            for instance in range(count) if count else [None]:
                drafts.append(
                    {
                        "chain": chain,
                        "numbers": numbers,
                        "workers": 1 if count else self._workers(chain),
                        "instance": instance,
                        "inputs": [],
                        "outputs": {},
                    }
                )
        for draft_number, draft in enumerate(list(drafts)):
            head = self._stages[draft["numbers"][0]]
            for origin, output in head.inputs:
                before = self._chain_of[origin]
                instances = self._partitions.get(before, 0)
                for instance in range(instances or 1):
                    source = drafts[first[before] + instance]
                    which = draft["instance"] if draft["instance"] is not None else output
                    edges.append({"origin": origin, "head": draft["numbers"][0], "target": draft_number})
                    source["outputs"].setdefault(which, len(edges) - 1)
                    draft["inputs"].append(len(edges) - 1)
        self._relay_many_inputs(drafts, edges)
        self._adopt_channels(drafts, edges)
        return self._finish(drafts, edges)

    def _relay_many_inputs(self, drafts: list[dict[str, Any]], edges: list[dict[str, Any]]) -> None:
        """Workers have one input: what comes from several partitions is brought together before them."""
        for number in range(len(drafts)):
            draft = drafts[number]
            if len(draft["inputs"]) > 1 and draft["workers"]:
                for edge in draft["inputs"]:
                    edges[edge]["target"] = len(drafts)
                edges.append(
                    {
                        "origin": edges[draft["inputs"][0]]["origin"],
                        "head": draft["numbers"][0],
                        "target": number,
                    }
                )
                drafts.append(
                    {
                        "chain": -1,
                        "numbers": [],
                        "workers": 0,
                        "instance": None,
                        "inputs": draft["inputs"],
                        "outputs": {0: len(edges) - 1},
                    }
                )
                draft["inputs"] = [len(edges) - 1]

    def _adopt_channels(self, drafts: list[dict[str, Any]], edges: list[dict[str, Any]]) -> None:
        """A channel that the caller named is the input of the stage behind it, without a process between."""
        for number, draft in enumerate(drafts):
            numbers = draft["numbers"]
            if not numbers or not isinstance(self._stages[numbers[0]].part, ChannelSource) or draft["inputs"]:
                continue
            source = self._stages[numbers[0]].part
            if len(numbers) == 1 and len(draft["outputs"]) == 1:
                edge = edges[next(iter(draft["outputs"].values()))]
                if self._stages[edge["head"]].options.full == "block":
                    edge["external"] = source
                    draft["gone"] = True
                    continue
            edges.append({"origin": numbers[0], "head": numbers[0], "target": number, "external": source})
            draft["inputs"] = [len(edges) - 1]

    def _finish(
        self, drafts: list[dict[str, Any]], edges: list[dict[str, Any]]
    ) -> tuple[tuple[Segment, ...], tuple[Edge, ...]]:
        kept = [number for number, draft in enumerate(drafts) if not draft.get("gone")]
        place = {old: new for new, old in enumerate(kept)}
        own = sum(1 for edge in edges if "external" not in edge)
        producers = {
            edge: number for number, draft in enumerate(drafts) for edge in draft["outputs"].values()
        }
        made = tuple(
            self._edge(edge, drafts, producers.get(number), place[edge["target"]], own)
            for number, edge in enumerate(edges)
        )
        segments = []
        for number in kept:
            draft = drafts[number]
            numbers = draft["numbers"]
            main = self._stages[self._main(numbers)] if numbers else None
            segments.append(
                Segment(
                    name="merge" if main is None else main.name,
                    stages=tuple(numbers),
                    workers=draft["workers"],
                    ordered=main is None or main.options.ordered,
                    inputs=tuple(draft["inputs"]),
                    outputs=tuple(edge for _, edge in sorted(draft["outputs"].items())),
                    instance=draft["instance"],
                )
            )
        return tuple(segments), made

    def _main(self, numbers: list[int]) -> int:
        for number in numbers:
            if self._stages[number].options.workers:
                return number
        return numbers[0]

    def _edge(
        self, edge: dict[str, Any], drafts: list[dict[str, Any]], producer: int | None, target: int, own: int
    ) -> Edge:
        head = self._stages[edge["head"]]
        origin = self._stages[edge["origin"]]
        options = head.options
        consumers = max(1, drafts[edge["target"]]["workers"])
        makers = max(1, drafts[producer]["workers"]) if producer is not None else 1
        size = _bytes_of(origin.schema)
        queue = 1 if options.full == "latest" else options.queue
        if options.queue_bytes is not None:
            queue = max(1, min(queue, parse_bytes(options.queue_bytes) // max(1, size or _SLOT_OF_OBJECTS)))
        # Each consumer holds the item it works on and what it keeps until its turn; each producer writes into one.
        slots = queue + consumers * (1 + (AHEAD if consumers > 1 else 1)) + makers
        share = self._plan.memory // max(1, own)
        slot_size = max(64, size or _SLOT_OF_OBJECTS)
        rows = getattr(head.part, "size", None) or getattr(head.part, "batch", None)
        if drafts[edge["target"]]["workers"] and getattr(head.part, "holds", False) and isinstance(rows, int):
            # It keeps its items until the batch is out, and these may be of one row each.
            if size is None:
                slot_size = _SLOT_OF_ROWS
            wanted = slots + int(rows / MAX_HELD) + 1
            slots = max(slots + queue, min(wanted, _MOST_SLOTS, share // (2 * slot_size)))
        if slots * slot_size > share and "external" not in edge:
            raise PipelineBuildError(
                f"stage {head.name!r}: {slots} slots of {_size(slot_size)} before it need {_size(slots * slot_size)}, and its "
                f"share of memory= is {_size(share)}; give the pipeline more memory= or the stage a smaller queue="
            )
        return Edge(
            name=f"{origin.name} → {head.name}",
            target=target,
            slots=min(slots, _MOST_SLOTS),
            queue=queue,
            slot_size=slot_size,
            max_message_size=max(slot_size, share // slots),
            full=options.full,
            guarantee=self._guarantee(head, drafts[producer] if producer is not None else None),
            external=edge.get("external"),
            ahead=self._ahead(
                slots, consumers, makers, [self._stages[n] for n in drafts[edge["target"]]["numbers"]]
            )
            if options.full == "block"
            else 0,
        )

    @staticmethod
    def _ahead(slots: int, consumers: int, makers: int, takers: list[Stage]) -> int:
        """Whoever has the turn must find a slot: those behind hold some, and the others before it what they wrote ahead."""
        if any(isinstance(stage.part, Operator) and stage.part.holds for stage in takers):
            held = int(MAX_HELD * slots)
        else:
            held = max(consumers * (1 + AHEAD), slots // 2)  # or views that a user keeps
        return max(0, slots - held - 1) // makers

    def _guarantee(self, head: Stage, producer: dict[str, Any] | None) -> str:
        full = head.options.full
        order = "in order"
        if producer is not None and producer["workers"] > 1:
            main = self._stages[self._main(producer["numbers"])]
            order = "in order" if main.options.ordered else "in the order of completion"
        if full == "block":
            text = f"each item once, {order}"
        elif full == "error":
            text = f"each item once, {order}; the pipeline fails when it is full"
        else:
            which = "newest" if full == "drop_newest" else "oldest"
            text = f"at most once, {order}: the {which} is dropped and counted when it is full"
        if isinstance(head.part, Operator) and head.part.stateful and head.options.workers:
            text += (
                "; the state is saved by checkpoints"
                if self._plan.checkpoint is not None
                else "; the state is lost if the process dies"
            )
        return text
