"""Every exception that dsline raises.

All derive from `DslineError`. Where people already catch something for the same reason (`queue.Empty`,
`TimeoutError`, `FileNotFoundError`, `ValueError` …), that is a second parent. Messages name the value, the limit and
the way out. `docs/api/errors.md` has the table.
"""

from __future__ import annotations

import builtins
import errno as _errno
import queue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsline.report import Blocker

__all__ = [
    "BufferEmptyError",
    "BufferFullError",
    "BufferTooSmallError",
    "ChannelClosedError",
    "ChannelError",
    "ChannelExistsError",
    "ChannelLayoutError",
    "ChannelMismatchError",
    "ChannelNotFoundError",
    "ChannelPermissionError",
    "ChannelSystemError",
    "CorruptedMessageError",
    "DslineError",
    "ExpressionError",
    "FeatureUnavailableError",
    "InvalidArgumentError",
    "LoanEndedError",
    "LogError",
    "MessageTooLargeError",
    "OperatorError",
    "PeerDiedError",
    "PipelineBuildError",
    "PipelineError",
    "PipelineRuntimeError",
    "RpcError",
    "RpcTimeoutError",
    "SchemaMismatchError",
    "SerializationError",
    "SharedMemoryFullError",
    "TimeoutError",
    "TooManyGroupsError",
    "TooManyHandlesError",
    "TransportError",
]


class DslineError(Exception):
    """Parent of everything that dsline raises on purpose."""


class ChannelError(DslineError):
    """Something is wrong with a channel or a call on it."""


class ChannelClosedError(ChannelError, EOFError):
    """This handle is closed, or the channel is shut down (and drained, for a receiver)."""


class ChannelNotFoundError(ChannelError, FileNotFoundError):
    """No channel has this name or path."""


class ChannelExistsError(ChannelError, FileExistsError):
    """A new channel was asked for, but one with this name or path exists."""


class ChannelMismatchError(ChannelError, ValueError):
    """The channel exists with another geometry than the one asked for."""


class ChannelLayoutError(ChannelError, OSError):
    """The file or segment is not a channel of this layout: foreign, damaged, or from another version."""


class ChannelPermissionError(ChannelError, PermissionError):
    """The channel belongs to somebody else, or its place can be written by others."""


class ChannelSystemError(ChannelError, OSError):
    """A system call failed that should not; `errno` says how."""


class InvalidArgumentError(ChannelError, ValueError):
    """A value that no channel can have: a size, a count, a name, an option."""


class TimeoutError(ChannelError, builtins.TimeoutError):
    """The time was up before it could be done.

    Attributes
    ----------
    blockers : list of Blocker
        The processes that were in the way: what they hold, and for how long. Of a `BufferFullError` after a wait, as it was
        when the error was raised; of others, as it is when this is first read, so that polls with timeout=0 cost nothing.
        Empty when opening timed out.
    """

    _where: Any = None  # (handle, whether room was waited for) while nobody has looked
    _blockers: list[Blocker] | None = None

    @property
    def blockers(self) -> list[Blocker]:
        if self._where is not None:
            (handle, for_room), self._where = self._where, None
            self._blockers = handle.blockers(for_room)
        if self._blockers is None:
            self._blockers = []
        return self._blockers

    def __reduce__(self) -> Any:
        self.blockers  # noqa: B018 - the handle does not travel
        return super().__reduce__()


class BufferEmptyError(TimeoutError, queue.Empty):
    """No message came in time."""


class BufferFullError(TimeoutError, queue.Full):
    """No slot became free in time."""


class BufferTooSmallError(ChannelError, ValueError):
    """The buffer given to `recv_into` is smaller than the message, which stays in the channel."""


class MessageTooLargeError(ChannelError, ValueError):
    """The message is larger than the channel takes."""


class SharedMemoryFullError(ChannelError, OSError):
    """The memory cannot be reserved (`errno` is ENOSPC or like it). Raised before a byte is written."""


class CorruptedMessageError(ChannelError):
    """A message failed its check. It is gone and counted; the next one can be received.

    Attributes
    ----------
    sequence : int or None
        Position of the message.
    """

    sequence: int | None = None


class SchemaMismatchError(ChannelError, TypeError):
    """What is sent, received or opened is not of the kind that the channel carries, or that was asked for."""

    _schema: bytes | None = None  # the channel's, encoded, until it is put into words


class LoanEndedError(ChannelError, ValueError):
    """The loan was published or aborted before, or belongs to the parent of this process."""


class TooManyHandlesError(ChannelError):
    """The channel has as many open handles as it was created for."""


class TooManyGroupsError(ChannelError):
    """The channel has as many named groups as it was created for."""


class PeerDiedError(DslineError):
    """A process that was needed for the answer is gone."""


class SerializationError(DslineError):
    """An object cannot be turned into a message, or a message into an object."""


class RpcError(DslineError):
    """A call was answered by something else than a result: no such function, or an error that cannot be brought over."""


class RpcTimeoutError(RpcError, builtins.TimeoutError):
    """A call had no answer in time."""


class FeatureUnavailableError(DslineError):
    """Not available: not built yet, not asked for, or not on this platform; the message says which."""


class PipelineError(DslineError):
    """Parent of the errors of the dataflow layer."""


class PipelineBuildError(PipelineError, ValueError):
    """The description of a pipeline is wrong."""


class ExpressionError(PipelineBuildError):
    """A text that is no expression over the columns it was given, or data that do not fit it.

    Attributes
    ----------
    column : int or None
        Where in the text, from 1; None where it is the data.
    """

    column: int | None = None


class PipelineRuntimeError(PipelineError):
    """A pipeline failed while it ran."""


class OperatorError(PipelineError):
    """A user's function failed, or gave something that its stage cannot give.

    Attributes
    ----------
    stage : str or None
        Name of the stage.
    traceback : str or None
        Where it failed, as text; of a worker's error this is also the cause.
    """

    stage: str | None = None
    traceback: str | None = None


class LogError(DslineError, OSError):
    """A log (``file://``) cannot be written or read: another writer, no space, foreign or damaged files; `errno` says how."""


class TransportError(DslineError):
    """A transport between machines failed."""


# By dsline::ErrorCode (cpp/include/dsline/error.hpp).
CORE_ERRORS: tuple[type[DslineError], ...] = (
    ChannelError,
    InvalidArgumentError,
    ChannelExistsError,
    ChannelNotFoundError,
    ChannelMismatchError,
    ChannelLayoutError,
    ChannelPermissionError,
    ChannelClosedError,
    MessageTooLargeError,
    SharedMemoryFullError,
    CorruptedMessageError,
    TooManyHandlesError,
    FeatureUnavailableError,
    ChannelSystemError,
    BufferTooSmallError,
    TimeoutError,
    TooManyGroupsError,
    SchemaMismatchError,
)

_DEFAULT_ERRNO: dict[type[DslineError], int] = {
    ChannelExistsError: _errno.EEXIST,
    ChannelNotFoundError: _errno.ENOENT,
    ChannelPermissionError: _errno.EACCES,
    ChannelLayoutError: _errno.EINVAL,
    SharedMemoryFullError: _errno.ENOSPC,
    ChannelSystemError: _errno.EIO,
    TimeoutError: _errno.ETIMEDOUT,
}


def from_core(code: int, os_errno: int, message: str, detail: bytes = b"") -> DslineError:
    """Make the exception for an error of the C++ core.

    Parameters
    ----------
    code : int
        Value of dsline::ErrorCode.
    os_errno : int
        The errno of the failed system call, 0 where none failed.
    message : str
        What went wrong, for people.
    detail : bytes
        Of a SchemaMismatchError: the schema that the channel has.

    Returns
    -------
    DslineError
        Not raised yet. Children of OSError have `errno` set.
    """
    cls = CORE_ERRORS[code] if 0 <= code < len(CORE_ERRORS) else ChannelError
    if issubclass(cls, OSError):
        return cls(os_errno or _DEFAULT_ERRNO[cls], message)
    error = cls(message)
    if isinstance(error, SchemaMismatchError):
        error._schema = detail
    return error
