"""The budget of held views: how many received messages the views of one handle may keep in their slots."""

from __future__ import annotations

import os
import warnings
from types import FrameType
from typing import Any

from dsline.errors import InvalidArgumentError

__all__ = ["PinnedViewsWarning"]

# As `_core` takes them.
AUTO = -1
UNLIMITED = 1 << 62
_MOST = 1 << 20
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class PinnedViewsWarning(UserWarning):
    """A handle keeps as many received messages as its `max_pinned` allows, so it gives out copies from now on."""


def parse(value: Any) -> int:
    """Turn `max_pinned` of a user into the number that `_core` takes."""
    if value is None or value == "auto":
        return AUTO
    if value == "unlimited":
        return UNLIMITED
    if isinstance(value, str):
        raise ValueError(
            f"max_pinned is {value!r}, must be a number of messages, 'auto' (or None) or 'unlimited'"
        )
    try:
        number = value.__index__()
    except (AttributeError, TypeError):
        raise TypeError(f"max_pinned is a {type(value).__name__}, must be an int, a str or None") from None
    if isinstance(value, bool):
        raise TypeError("max_pinned is a bool, must be an int, a str or None")
    if not 0 <= number <= _MOST:
        raise InvalidArgumentError(
            f"max_pinned is {number}, must be 0 (always a copy) to {_MOST}, or 'unlimited'"
        )
    return int(number)


def caller(frame: FrameType | None) -> tuple[int, FrameType | None]:
    """Return the first frame outside this package, and how many there are before it."""
    inside = 0
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
        inside += 1
    return inside, frame


def site(frame: FrameType | None) -> str:
    """Return file and line of the user's code in a frame or its callers."""
    _, frame = caller(frame)
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def warn(label: str, held: int, budget: int, auto: bool, where: str, frame: FrameType | None) -> None:
    """Issue the one warning of a handle; raises it where warnings are errors."""
    inside, _ = caller(frame)
    if held >= budget:
        limit = f"as many as max_pinned={budget} allows" + (" (the default for its capacity)" if auto else "")
    else:
        limit = "and nothing but this message's slot is left to send into"
    text = (
        f"views on {held} received message(s) of channel {label!r} are kept by this handle, {limit}: what comes is copied "
        "now (stats().forced_copies)"
    )
    if where:
        text += f". Kept views were received at {where}"
    text += ". Drop views or take copies (recv_array(copy=True)), raise the capacity, or set max_pinned"
    warnings.warn(text, PinnedViewsWarning, stacklevel=inside + 2)
