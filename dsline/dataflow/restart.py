"""How often, and after what delay, a worker that died is started again."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from dsline.errors import PipelineBuildError

__all__ = ["Restart", "RestartBudget"]


@dataclasses.dataclass(frozen=True)
class Restart:
    """When a worker that died is started again.

    Attributes
    ----------
    max : int
        Restarts of a stage's workers together within `within` seconds; one more death fails the pipeline. 0: never.
    within : float
        Seconds.
    delay : float
        Seconds before the first restart; doubled with each one that follows within `within` seconds of the one before.
    max_delay : float
        Seconds at most.

    Raises
    ------
    PipelineBuildError
        A value is out of its range.
    """

    max: int = 5
    within: float = 60.0
    delay: float = 0.1
    max_delay: float = 10.0

    def __post_init__(self) -> None:
        if type(self.max) is not int or self.max < 0:
            raise PipelineBuildError(f"Restart(max={self.max!r}): must be a number of restarts, from 0 on")
        for name in ("within", "delay", "max_delay"):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise PipelineBuildError(f"Restart({name}={value!r}): must be seconds, from 0 on")


class RestartBudget:
    """What is left of a `Restart`. Not thread-safe.

    Parameters
    ----------
    restart : Restart
    clock : callable
        Seconds, as time.monotonic.
    """

    def __init__(self, restart: Restart, clock: Callable[[], float] = time.monotonic) -> None:
        self.restart = restart
        self._clock = clock
        self._deaths: deque[float] = deque()

    def died(self) -> float | None:
        """Note a death now. Return the seconds after which to start again; None: the budget is used up."""
        now = self._clock()
        while self._deaths and now - self._deaths[0] >= self.restart.within:
            self._deaths.popleft()
        if len(self._deaths) >= self.restart.max:
            return None
        doublings = len(self._deaths)
        self._deaths.append(now)
        return min(self.restart.max_delay, math.ldexp(self.restart.delay, min(doublings, 64)))

    @property
    def used(self) -> int:
        """Restarts within the window that ends now."""
        now = self._clock()
        return sum(now - when < self.restart.within for when in self._deaths)

    def describe(self) -> str:
        """For the error: "6 deaths within 60 s (restart=Restart(max=5, ...))"."""
        return f"{len(self._deaths) + 1} deaths within {self.restart.within:g} s, and Restart allows {self.restart.max} restarts"
