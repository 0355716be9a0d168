"""RpcServer: offers functions under a name to `Rpc` clients (`dsline/rpc.py`) of other processes."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

from dsline import _core
from dsline.broadcast import Broadcast
from dsline.channel import ShmChannel
from dsline.closing import Closing
from dsline.errors import (
    BufferEmptyError,
    BufferFullError,
    ChannelClosedError,
    DslineError,
    InvalidArgumentError,
    PeerDiedError,
    RpcError,
    SerializationError,
)

__all__ = ["TICK", "RpcServer", "RpcServerStats", "servers_alive"]

GROUP = "servers"
TICK = 0.1
"""Seconds between two looks after the other side."""

_ANSWER_PATIENCE = 10.0  # seconds that a server waits for a client that lives and takes no answers
_LONGEST_TEXT = 16_000  # characters of a traceback that go with an error
_MOST_DELIVERIES = 15  # of the request channel; the server gives up earlier


@dataclasses.dataclass(frozen=True)
class RpcServerStats:
    """What a server did.

    Attributes
    ----------
    answered : int
        Requests that were answered, with a result or an error.
    failed : int
        Those of them that were answered with an error.
    undelivered : int
        Answers that could not be given: the client was gone, or did not take them.
    orphaned : int
        Requests that were not executed, since their client was gone.
    refused : int
        Requests that another server had died over, and that were not executed again.
    """

    answered: int
    failed: int
    undelivered: int
    orphaned: int
    refused: int


@dataclasses.dataclass(frozen=True)
class _Function:
    call: Callable[..., Any]
    idempotent: bool


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def detach(self) -> int:
        return self._fd


class _ReplyChannels:
    """The clients' channels for answers that a server has open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[int, ShmChannel]] = {}

    def of(self, address: str) -> ShmChannel | None:
        """Return the channel of a client; None when it is gone."""
        with self._lock:
            found = self._open.get(address)
            if found is None:
                found = self._open_at(address)
                if found is None:
                    return None
                self._open[address] = found
            return found[1]

    def _open_at(self, address: str) -> tuple[int, ShmChannel] | None:
        pid, fd, uuid = address.split(":")
        path = f"/proc/{int(pid)}/fd/{int(fd)}"
        try:
            # Nothing else is opened: that could wait, or do something.
            if not os.readlink(path).startswith("/memfd:dsline"):
                return None
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return int(pid), ShmChannel._again(_Descriptor(descriptor), uuid, timeout=TICK)
        except DslineError:
            return None

    def is_alive(self, address: str) -> bool:
        """Whether the client is there: its own handle of its channel."""
        with self._lock:
            found = self._open.get(address)
            if found is None:
                return False
            pid, channel = found
            return any(each.alive and each.pid == pid for each in channel.inspect().participants)

    def forget_the_dead(self) -> None:
        for address in list(self._open):
            if not self.is_alive(address):
                with self._lock:
                    _, channel = self._open.pop(address, (0, None))
                if channel is not None:
                    channel.close()

    def close(self) -> None:
        with self._lock:
            for _, channel in self._open.values():
                channel.close()
            self._open.clear()


class RpcServer(Closing):
    """Offers functions under a name. Servers of the same name share the requests.

    Parameters
    ----------
    name : str
        As of a channel.
    functions : mapping or object, optional
        Names and callables, or an object whose public methods are offered.
    workers : int
        Threads that execute requests.
    idempotent : bool
        Whether a request may be executed again when the server that had it died before it had answered. False: the caller
        gets PeerDiedError then. `register` can say otherwise for a function.
    max_deliveries : int
        How often a request is given to a server at most, 1 to 14; then the caller gets PeerDiedError.
    copy : bool
        False: arrays in arguments are read-only views of the request, without a copy, and keep its slot as long as they
        live. True: writable arrays of their own.
    capacity, slot_size, max_message_size, max_handles, mode
        Of the channel for requests, as for `ShmChannel`, when this server is the first.

    Examples
    --------
    >>> import dsline
    >>> with dsline.RpcServer("doc-rpc", {"add": lambda a, b: a + b}) as server, dsline.Rpc("doc-rpc") as client:
    ...     client.call("add", 1, 2)
    3
    """

    def __init__(
        self,
        name: str,
        functions: Mapping[str, Callable[..., Any]] | object | None = None,
        *,
        workers: int = 1,
        idempotent: bool = True,
        max_deliveries: int = 3,
        copy: bool = False,
        capacity: int | None = None,
        slot_size: int | None = None,
        max_message_size: int | None = None,
        max_handles: int | None = 256,
        mode: int = 0o600,
    ) -> None:
        if type(workers) is not int or not 1 <= workers <= 1000:
            raise InvalidArgumentError(f"workers is {workers!r}, must be 1 to 1000")
        if type(max_deliveries) is not int or not 1 <= max_deliveries < _MOST_DELIVERIES:
            raise InvalidArgumentError(
                f"max_deliveries is {max_deliveries!r}, must be 1 to {_MOST_DELIVERIES - 1}"
            )
        self._functions: dict[str, _Function] = {}
        self._idempotent = idempotent
        self._max_deliveries = max_deliveries
        self._copy = copy
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._lost = threading.Event()  # somebody else has shut the channel down
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("answered", "failed", "undelivered", "orphaned", "refused"), 0)
        if isinstance(functions, Mapping):
            for key, function in functions.items():
                self.register(function, key)
        elif functions is not None:
            for key in dir(functions):
                if not key.startswith("_") and callable(getattr(functions, key)):
                    self.register(getattr(functions, key), key)
        self._channel = Broadcast(
            name,
            capacity=capacity,
            slot_size=slot_size,
            max_message_size=max_message_size,
            max_handles=max_handles,
            max_deliveries=_MOST_DELIVERIES,
            mode=mode,
        )
        try:
            self._requests = self._channel.subscribe(GROUP, durable=True)
        except BaseException:
            self._channel.close()
            raise
        self._replies = _ReplyChannels()
        self._tended = 0.0

    @property
    def name(self) -> str:
        """Name under which the functions are offered."""
        assert self._channel.name is not None
        return self._channel.name

    def register(
        self, function: Callable[..., Any], name: str | None = None, *, idempotent: bool | None = None
    ) -> Callable[..., Any]:
        """Offer a function; the function itself is returned, so this is a decorator as well.

        Parameters
        ----------
        function : callable
        name : str, optional
            Its own name by default.
        idempotent : bool, optional
            The server's by default.
        """
        if not callable(function):
            raise TypeError(f"function is a {type(function).__name__}, must be callable")
        name = name if name is not None else getattr(function, "__name__", None)
        if not isinstance(name, str):
            raise TypeError("the function has no name of its own; give one")
        self._functions[name] = _Function(function, self._idempotent if idempotent is None else idempotent)
        return function

    def start(self) -> Self:
        """Begin to serve, in threads of its own; a second call does nothing."""
        if self._closing.is_set():
            raise ChannelClosedError(f"the server of {self.name!r} is closed; make another one")
        if not self._threads:
            _open_servers.add(self)
            for number in range(self._workers):
                thread = threading.Thread(
                    target=self._work, name=f"dsline-rpc-{self.name}-{number}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
        return self

    def serve_forever(self) -> None:
        """Serve until `close` is called by another thread, or by an exception such as KeyboardInterrupt, which closes.

        ChannelClosedError when somebody else has shut the channel down.
        """
        self.start()
        try:
            while not self._closing.wait(TICK):
                if self._lost.is_set():
                    raise ChannelClosedError(
                        f"the channel of server {self.name!r} was shut down, by another server that closed at the same moment "
                        "or by hand; start another server"
                    )
        finally:
            self.close()

    def close(self) -> None:
        """Stop serving. Requests in execution are finished and answered; when no other server is there, the name goes, and
        callers whose requests nobody has taken get ChannelClosedError. A second call does nothing.
        """
        self._stop(None)

    def _stop(self, patience: float | None) -> None:
        self._closing.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(patience)
        with self._lock:
            if self._requests.closed and self._channel.closed:
                return
            alone = servers_alive(self._channel) <= 1
            if alone and not self._channel.closed:
                self._channel.shutdown()
            self._requests.close()
            if alone:
                self._channel.unlink()
            self._channel.close()
            self._replies.close()
        _open_servers.discard(self)

    def stats(self) -> RpcServerStats:
        """Return what this server did."""
        return RpcServerStats(**self._counts)

    def __enter__(self) -> Self:
        return self.start()

    def __repr__(self) -> str:
        state = "closed" if self._closing.is_set() else f"{len(self._functions)} functions"
        return f"<dsline.RpcServer {self._channel.name!r}: {state}>"

    # --- one request ---

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                message = self._requests.recv_message(timeout=TICK)
            except BufferEmptyError:
                self._tend()
                continue
            except ChannelClosedError:
                if not self._closing.is_set():
                    self._lost.set()
                return
            except DslineError:  # a damaged request is gone; its caller sees that
                continue
            except Warning:  # of arguments that are kept, where warnings are errors; the request comes again
                continue
            try:
                self._serve(message)
            except Exception:  # no memory: the caller sees that no answer comes
                self._count("undelivered")
            del message

    def _tend(self) -> None:
        now = time.monotonic()
        if now - self._tended > 1:
            self._tended = now
            self._replies.forget_the_dead()

    def _serve(self, message: _core.Message) -> None:
        try:
            meta = message.meta
            number, address, name = meta["id"], meta["to"], meta["f"]
            replies = self._replies.of(address)
        except (DslineError, KeyError, ValueError):  # not a request
            message.release()
            return
        if replies is None:
            self._count("orphaned")
            message.release()
            return
        value, error = self._execute(message, name)
        if error is None:
            error = self._answer(replies, address, number, value, {"k": "ok"})
        if error is not None:
            self._count("failed")
            self._answer_error(replies, address, number, error)
        del value, error
        with contextlib.suppress(BufferError):  # views that the function has kept: the last one releases it
            message.release()

    def _execute(self, message: _core.Message, name: str) -> tuple[Any, BaseException | None]:
        function = self._functions.get(name)
        if function is None:
            known = ", ".join(sorted(self._functions)) or "none"
            return None, RpcError(f"the server of {self.name!r} has no function {name!r}; it has {known}")
        if message.attempt > 1 and not (function.idempotent and message.attempt <= self._max_deliveries):
            self._count("refused")
            how = (
                f"{message.attempt - 1} servers of {self.name!r} died over it, the most that max_deliveries allows"
                if function.idempotent
                else f"the server of {self.name!r} that had it died, and {name!r} is not to be executed twice"
            )
            return None, PeerDiedError(f"the call of {name!r} has no answer: {how}")
        try:
            arguments, keywords = message.object(copy=self._copy)
        except Exception as error:
            return None, SerializationError(
                f"the arguments of {name!r} cannot be unpickled on the server: {type(error).__name__}: {error}"
            )
        try:
            return function.call(*arguments, **keywords), None
        except Exception as error:
            return None, error
        except BaseException as error:  # SystemExit ends neither this server nor the caller
            return None, RpcError(f"{name!r} raised {type(error).__name__}: {error}")

    def _answer(
        self, replies: ShmChannel, address: str, number: int, value: Any, meta: dict[str, Any]
    ) -> BaseException | None:
        """Send an answer; the error to send instead, if it cannot be sent as it is."""
        try:
            stream, buffers = _core.pickle_object((value,))
        except Exception as error:
            return SerializationError(
                f"the result, a {type(value).__name__}, cannot be pickled: {type(error).__name__}: {error}"
            )
        deadline = time.monotonic() + _ANSWER_PATIENCE
        while True:
            try:
                replies._send_pickled(stream, buffers, TICK, {"id": number, **meta})
            except BufferFullError:
                if time.monotonic() < deadline and self._replies.is_alive(address):
                    continue
                self._count("undelivered")
                return None
            except ChannelClosedError:
                self._count("undelivered")
                return None
            except (DslineError, MemoryError) as error:  # too large, or no memory
                return error
            self._count("answered")
            return None

    def _answer_error(self, replies: ShmChannel, address: str, number: int, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))[-_LONGEST_TEXT:]
        error.__traceback__ = None  # it refers to the arguments
        summary = f"{type(error).__name__}: {error}"[:_LONGEST_TEXT]
        meta = {"k": "error", "t": text, "s": summary}
        if self._answer(replies, address, number, error, meta) is not None:
            # It cannot be pickled: the text says what it was.
            self._answer(replies, address, number, None, meta)


def servers_alive(channel: Any) -> int:
    """Return how many servers have the channel of requests open."""
    return sum(each.alive and each.group == GROUP for each in channel.inspect().participants)


_open_servers: weakref.WeakSet[RpcServer] = weakref.WeakSet()
# Their threads are the parent's.
os.register_at_fork(after_in_child=_open_servers.clear)


@atexit.register
def _close_all() -> None:
    for server in list(_open_servers):
        server._stop(1.0)  # a request that takes longer is given to another server
