"""What becomes of an item whose stage fails: raise, skip, retry, dead letter; and how many errors are put up with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeAlias

from dsline.errors import PipelineBuildError

__all__ = [
    "DeadLetterPolicy",
    "ErrorBudget",
    "Policy",
    "Raise",
    "Retry",
    "Skip",
    "dead_letter",
    "parse_policy",
    "retry",
]

_LEAST_ITEMS = 20  # before a share of them says anything


@dataclasses.dataclass(frozen=True)
class Raise:
    """The pipeline fails."""

    def to_json(self) -> Any:
        return "raise"


@dataclasses.dataclass(frozen=True)
class Skip:
    """The item is left out, and counted."""

    def to_json(self) -> Any:
        return "skip"


@dataclasses.dataclass(frozen=True)
class DeadLetterPolicy:
    """The item is left out and written to a log, with the error."""

    uri: str

    def to_json(self) -> Any:
        return {"dead_letter": self.uri}


@dataclasses.dataclass(frozen=True)
class Retry:
    """The item is tried again, up to `times` times, after pauses that double."""

    times: int
    backoff: float = 0.1  # seconds before the second try
    then: Any = "raise"

    @property
    def then_policy(self) -> Policy:
        """What happens after the last try."""
        return parse_policy(self.then)

    def pauses(self) -> Iterator[float]:
        """Yield the seconds to wait before each further try."""
        return (self.backoff * 2**number for number in range(self.times))

    def to_json(self) -> Any:
        return {"retry": self.times, "backoff": self.backoff, "then": self.then_policy.to_json()}


Policy: TypeAlias = Raise | Skip | DeadLetterPolicy | Retry

_WORDS: dict[str, Policy] = {"raise": Raise(), "skip": Skip()}


def retry(times: Any, *, backoff: Any = 0.1, then: Any = "raise") -> Retry:
    """Return the policy to try an item again.

    Parameters
    ----------
    times : int
        Further tries, from 1 on.
    backoff : float
        Seconds before the first of them; doubles from one to the next.
    then : str or policy
        What happens after the last: "raise", "skip" or `dead_letter`.
    """
    if isinstance(times, bool) or not isinstance(times, int) or not 1 <= times <= 100:
        raise PipelineBuildError(f"retry takes 1 to 100 tries, not {times!r}")
    if isinstance(backoff, bool) or not isinstance(backoff, int | float) or not 0 <= backoff <= 3600:
        raise PipelineBuildError(f"backoff is {backoff!r}, must be 0 to 3600 seconds")
    if isinstance(parse_policy(then), Retry):
        raise PipelineBuildError("then= cannot be another retry; give a higher number of tries")
    return Retry(times, float(backoff), then)


def dead_letter(uri: Any) -> DeadLetterPolicy:
    """Return the policy to write items that fail to the log at `uri`, ``file://path``.

    See docs/dataflow/dead-letters.md; ``dsline dead`` lists, shows and replays them.
    """
    if not isinstance(uri, str) or not uri.startswith("file://") or len(uri) <= len("file://"):
        raise PipelineBuildError(f"dead letters go to a log, file://path, not to {uri!r}")
    return DeadLetterPolicy(uri)


def parse_policy(given: Any) -> Policy:
    """Return the policy that a text, a policy or its JSON stands for.

    Raises
    ------
    PipelineBuildError
        It is none.
    """
    if isinstance(given, Raise | Skip | DeadLetterPolicy | Retry):
        return given
    if isinstance(given, str) and given in _WORDS:
        return _WORDS[given]
    if isinstance(given, dict) and "retry" in given:
        return retry(given["retry"], backoff=given.get("backoff", 0.1), then=given.get("then", "raise"))
    if isinstance(given, dict) and set(given) == {"dead_letter"}:
        return dead_letter(given["dead_letter"])
    raise PipelineBuildError(
        f"on_error is {given!r}, must be 'raise', 'skip', dsline.retry(...) or dsline.dead_letter('file://...')"
    )


class ErrorBudget:
    """Errors that a stage may have.

    Parameters
    ----------
    limit : int or float
        An int is a number of errors; a float between 0 and 1 is a share of the items, looked at from 20 items on.
    """

    def __init__(self, limit: Any) -> None:
        share = isinstance(limit, float)
        if (
            isinstance(limit, bool)
            or not isinstance(limit, int | float)
            or not limit >= 0
            or (share and limit >= 1)
        ):
            raise PipelineBuildError(
                f"max_errors is {limit!r}, must be a number of errors like 100, or a share of the items like 0.01"
            )
        self._limit: int | float = limit

    def is_exceeded(self, errors: int, items: int) -> bool:
        """Whether `errors` in `items` items are too many."""
        if isinstance(self._limit, float):
            return items >= _LEAST_ITEMS and errors > self._limit * items
        return errors > self._limit
