"""The exceptions: one table of classes and parents, and what they carry."""

import builtins
import errno
import pickle
import queue

import pytest

import dsline
from dsline import _core, errors

PARENTS = {
    "DslineError": (Exception,),
    "ChannelError": (errors.DslineError,),
    "ChannelClosedError": (errors.ChannelError, EOFError),
    "ChannelNotFoundError": (errors.ChannelError, FileNotFoundError),
    "ChannelExistsError": (errors.ChannelError, FileExistsError),
    "ChannelMismatchError": (errors.ChannelError, ValueError),
    "ChannelLayoutError": (errors.ChannelError, OSError),
    "ChannelPermissionError": (errors.ChannelError, PermissionError),
    "ChannelSystemError": (errors.ChannelError, OSError),
    "InvalidArgumentError": (errors.ChannelError, ValueError),
    "TimeoutError": (errors.ChannelError, builtins.TimeoutError),
    "BufferEmptyError": (errors.TimeoutError, builtins.TimeoutError, queue.Empty),
    "BufferFullError": (errors.TimeoutError, builtins.TimeoutError, queue.Full),
    "BufferTooSmallError": (errors.ChannelError, ValueError),
    "MessageTooLargeError": (errors.ChannelError, ValueError),
    "SharedMemoryFullError": (errors.ChannelError, OSError),
    "CorruptedMessageError": (errors.ChannelError,),
    "SchemaMismatchError": (errors.ChannelError, TypeError),
    "LoanEndedError": (errors.ChannelError, ValueError),
    "TooManyHandlesError": (errors.ChannelError,),
    "TooManyGroupsError": (errors.ChannelError,),
    "PeerDiedError": (errors.DslineError,),
    "SerializationError": (errors.DslineError,),
    "FeatureUnavailableError": (errors.DslineError,),
    "RpcError": (errors.DslineError,),
    "RpcTimeoutError": (errors.RpcError, builtins.TimeoutError),
    "PipelineError": (errors.DslineError,),
    "PipelineBuildError": (errors.PipelineError, ValueError),
    "ExpressionError": (errors.PipelineBuildError, ValueError),
    "PipelineRuntimeError": (errors.PipelineError,),
    "OperatorError": (errors.PipelineError,),
    "LogError": (errors.DslineError, OSError),
    "TransportError": (errors.DslineError,),
}


def test_the_table_is_complete():
    assert set(PARENTS) == set(errors.__all__)
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == set(errors.__all__)


@pytest.mark.parametrize("name", PARENTS)
def test_parents(name):
    cls = getattr(errors, name)
    assert all(issubclass(cls, parent) for parent in PARENTS[name])
    assert issubclass(cls, errors.DslineError)
    assert cls.__doc__


@pytest.mark.parametrize("name", sorted(set(PARENTS) - {"TimeoutError"}))
def test_all_are_public(name):
    assert getattr(dsline, name) is getattr(errors, name)
    assert name in dsline.__all__


def test_the_name_of_a_builtin_is_not_taken_by_a_star_import():
    namespace = {}
    exec("from dsline import *", namespace)
    assert "TimeoutError" not in namespace
    assert set(dsline.__all__) <= set(namespace)


def test_every_code_of_the_core_has_its_class():
    assert len(errors.CORE_ERRORS) == _core.ERROR_CODE_COUNT
    for code, cls in enumerate(errors.CORE_ERRORS):
        error = errors.from_core(code, 0, "why")
        assert type(error) is cls
        assert "why" in str(error)
        if isinstance(error, OSError):
            assert error.errno


def test_the_errno_of_the_system_is_kept():
    code = errors.CORE_ERRORS.index(errors.SharedMemoryFullError)
    assert errors.from_core(code, errno.ENOMEM, "why").errno == errno.ENOMEM
    assert errors.from_core(code, 0, "why").errno == errno.ENOSPC
    assert type(errors.from_core(10_000, 0, "why")) is errors.ChannelError


@pytest.mark.parametrize("name", PARENTS)
def test_errors_survive_pickling(name):
    cls = getattr(errors, name)
    error = cls(5, "why") if issubclass(cls, OSError) else cls("why")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert again.args == error.args


def test_people_who_use_queues_catch_what_they_know(make_channel):
    channel = make_channel(capacity=1, slot_size=64)
    with pytest.raises(queue.Empty):
        channel.recv(timeout=0)
    with pytest.raises(TimeoutError):
        channel.recv(timeout=0)
    channel.send(b"x")
    with pytest.raises(queue.Full):
        channel.send(b"y", timeout=0)
    with pytest.raises(TimeoutError):
        channel.send(b"y", timeout=0)
    channel.close()
    with pytest.raises(EOFError):
        channel.recv(timeout=0)


def test_messages_name_the_channel(make_channel):
    channel = make_channel(capacity=1, slot_size=64)
    with pytest.raises(dsline.BufferEmptyError, match=channel.name):
        channel.recv(timeout=0)
    channel.send(b"x")
    with pytest.raises(dsline.BufferFullError, match=channel.name):
        channel.send(b"x", timeout=0)
    channel.shutdown()
    with pytest.raises(dsline.ChannelClosedError, match=channel.name):
        channel.send(b"x")


@pytest.mark.parametrize(
    ("enum", "values"),
    [
        (dsline.Backpressure, ["block", "raise", "drop_newest", "drop_oldest"]),
        (dsline.Checksum, ["none", "header", "full"]),
        (dsline.Storage, ["shm", "memfd", "heap"]),
        (dsline.OnStale, ["recover", "reset", "raise"]),
        (dsline.Start, ["next", "oldest", "latest"]),
        (dsline.OnDeath, ["redeliver", "drop"]),
        (dsline.Sync, ["none", "data"]),
    ],
)
def test_options_are_enums_with_the_strings_as_values(enum, values):
    assert [member.value for member in enum] == values
