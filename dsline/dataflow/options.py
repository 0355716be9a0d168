"""Options of a stage, checked where they are given."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final

from dsline.dataflow.policies import Policy, parse_policy
from dsline.dataflow.restart import Restart
from dsline.errors import PipelineBuildError

__all__ = ["FULL", "StageOptions", "parse_bytes"]

FULL: Final = ("block", "drop_oldest", "drop_newest", "latest", "error")
ON_CRASH: Final = ("redeliver", "skip", "stop")
START_METHODS: Final = ("spawn", "forkserver")
MOST_WORKERS: Final = 64

_UNITS: Final = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30
}  # fmt: skip


def parse_bytes(value: int | str, name: str = "memory") -> int:
    """Read a size like ``512 MiB`` or a number of bytes."""
    if type(value) is int:
        size = value
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        unit = _UNITS.get(found.group(2).upper()) if found else None
        if found is None or unit is None:
            raise PipelineBuildError(
                f"{name} is {value!r}, must be a number of bytes or a text like '512MiB'"
            )
        size = int(float(found.group(1)) * unit)
    if size <= 0:
        raise PipelineBuildError(f"{name} is {value!r}, must be more than 0 bytes")
    return size


@dataclasses.dataclass(frozen=True)
class StageOptions:
    """How a stage runs. The same for every operator.

    Attributes
    ----------
    name : str or None
        Name of the stage in errors, statistics and drawings; by default made from the operator.
    workers : int
        0: in the caller's process, without a channel to the stage before it where that runs there too. N: in N worker
        processes.
    ordered : bool
        With several workers: results leave in the order of the items (default), or as they are completed.
    queue : int
        Items that may wait before the stage.
    queue_bytes : int, str or None
        Bytes that may wait before the stage, as ``"64MiB"``.
    full : str
        What the stage before does when the queue is full: "block", "drop_oldest", "drop_newest", "latest" (the newest item
        replaces the one that waits) or "error".
    on_error : Policy or str
        What becomes of an item whose function raises: "raise", "skip", `retry`, or `dead_letter`.
    max_errors : int, float or None
        Errors that are put up with before the pipeline fails: a number, or a share of the items.
    restart : Restart
        Delay and budget for restarting workers.
    on_crash : str
        What becomes of the item of a worker that dies: "redeliver", "skip", or "stop" the pipeline.
    max_deliveries : int
        How many workers an item may cost before it is treated as an error.
    timeout : float or None
        Seconds that one item may take before its worker is killed and the item counts as one that killed it.
    cpus : sequence of int, "spread" or None
        CPUs that the workers are bound to.
    threads : int
        Threads that numerical libraries may use in a worker.
    start_method : str
        "spawn" or "forkserver".
    """

    name: str | None = None
    workers: int = 0
    ordered: bool = True
    queue: int = 8
    queue_bytes: int | str | None = None
    full: str = "block"
    on_error: Policy | str = "raise"
    max_errors: int | float | None = None
    restart: Restart = Restart()  # noqa: RUF009 - frozen
    on_crash: str = "redeliver"
    max_deliveries: int = 3
    timeout: float | None = None
    cpus: Any = None
    threads: int = 1
    start_method: str = "spawn"

    def __post_init__(self) -> None:
        _whole("workers", self.workers, 0, MOST_WORKERS)
        _whole("queue", self.queue, 1, 1 << 16)
        _whole("max_deliveries", self.max_deliveries, 1, 15)
        _whole("threads", self.threads, 1, 1024)
        _one_of("full", self.full, FULL)
        _one_of("on_crash", self.on_crash, ON_CRASH)
        _one_of("start_method", self.start_method, START_METHODS)
        name: Any = self.name
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= 100):
            raise PipelineBuildError(f"name is {self.name!r}, must be a text of 1 to 100 characters")
        if self.queue_bytes is not None:
            parse_bytes(self.queue_bytes, "queue_bytes")
        if self.timeout is not None and not self.timeout > 0:
            raise PipelineBuildError(f"timeout is {self.timeout!r}, must be more than 0 seconds or None")
        if self.cpus is not None and self.cpus != "spread":
            if isinstance(self.cpus, str):
                raise PipelineBuildError(
                    f"cpus is {self.cpus!r}, must be None, 'spread' or a list of numbers"
                )
            object.__setattr__(self, "cpus", tuple(int(cpu) for cpu in self.cpus))
        if self.workers == 0 and (self.timeout is not None or self.cpus is not None):
            raise PipelineBuildError("timeout= and cpus= are for worker processes; give workers=1 or more")
        object.__setattr__(self, "on_error", parse_policy(self.on_error))

    @property
    def policy(self) -> Policy:
        """The checked `on_error`."""
        return parse_policy(self.on_error)

    @classmethod
    def parse(cls, given: dict[str, Any]) -> StageOptions:
        """Check keyword arguments of a stage."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(given) - names)
        if unknown:
            raise PipelineBuildError(
                f"unknown stage option {unknown[0]!r}; there are: {', '.join(sorted(names))}"
            )
        if isinstance(given.get("restart"), dict):
            given = {**given, "restart": Restart(**given["restart"])}
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Return what differs from the defaults, with plain values."""
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "on_error":
                if self.policy != parse_policy("raise"):
                    plain["on_error"] = self.policy.to_json()
            elif value != field.default and field.name != "name":
                plain[field.name] = dataclasses.asdict(value) if field.name == "restart" else value
        return plain


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PipelineBuildError(f"{name} is {value!r}, must be a whole number from {least} to {most}")


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PipelineBuildError(f"{name} is {value!r}, must be one of {', '.join(choices)}")
