"""Request and response between processes: `RpcServer` offers functions under a name, `Rpc` calls them.

Requests go through one named channel that all servers of the name receive from; the answers to a client through an anonymous
channel of its own, which the request tells of and which goes with the client. docs/guide/rpc.md has the rules.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from dsline import _core
from dsline.broadcast import Broadcast
from dsline.channel import ShmChannel
from dsline.errors import (
    BufferEmptyError,
    BufferFullError,
    ChannelClosedError,
    ChannelNotFoundError,
    DslineError,
    InvalidArgumentError,
    PeerDiedError,
    RpcError,
    RpcTimeoutError,
    SerializationError,
    TooManyHandlesError,
)

__all__ = ["Rpc", "RpcServer", "RpcServerStats"]

_GROUP = "servers"
_TICK = 0.1  # seconds between two looks after the other side
_ANSWER_PATIENCE = 10.0  # seconds that a server waits for a client that lives and takes no answers
_LONGEST_TEXT = 16_000  # characters of a traceback that go with an error
_MOST_DELIVERIES = 15  # of the request channel; the server gives up earlier


class _RemoteTraceback(Exception):
    """Shows where on the server an error came from."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


# --- the server ---------------------------------------------------------------------------------------------------------


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
            return int(pid), ShmChannel._again(_Descriptor(descriptor), uuid, timeout=_TICK)
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


class RpcServer:
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
            self._requests = self._channel.subscribe(_GROUP, durable=True)
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
        """Serve until `close` is called by another thread, or by an exception such as KeyboardInterrupt, which closes."""
        self.start()
        try:
            while not self._closing.wait(_TICK):
                pass
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
            alone = _servers_alive(self._channel) <= 1
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
                message = self._requests.recv_message(timeout=_TICK)
            except BufferEmptyError:
                self._tend()
                continue
            except ChannelClosedError:
                return
            except DslineError:  # a damaged request is gone; its caller sees that
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
                replies._send_pickled(stream, buffers, _TICK, {"id": number, **meta})
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


def _servers_alive(channel: Any) -> int:
    return sum(each.alive and each.group == _GROUP for each in channel.inspect().participants)


# --- the client ----------------------------------------------------------------------------------------------------------


class _Call(concurrent.futures.Future[Any]):
    """The answer to come of one request."""

    def __init__(self, client: Rpc, number: int, name: str) -> None:
        super().__init__()
        self._client = client
        self._number = number
        self._name = name
        self._requests = client._requests  # where the request is
        self._place: tuple[int, int] | None = None

    def cancel(self) -> bool:
        """Withdraw the request: True when no server had taken it, so that it is never executed."""
        if not self._client._take_back(self) or not super().cancel():
            return self.cancelled()
        self._client._forget(self)
        self.set_running_or_notify_cancel()
        return True

    def _finish(self, value: Any = None, error: BaseException | None = None) -> None:
        try:
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(value)
        except concurrent.futures.InvalidStateError:
            pass  # cancelled meanwhile


class Rpc:
    """Calls the functions that servers offer under a name.

    Parameters
    ----------
    name : str
        As given to `RpcServer`.
    timeout : float or None
        Seconds that `call` waits for an answer unless it says otherwise; None for ever.
    wait : float
        Seconds to wait here for a server to be there.
    capacity, slot_size, max_message_size
        Of the channel for answers, as for `ShmChannel`.

    Raises
    ------
    PeerDiedError
        No server was there within `wait` seconds.

    Notes
    -----
    Safe to share between threads; any number of requests may be under way. A forked child gets a channel for answers of its own
    at its first call; what the parent waits for stays the parent's. ``client.name(...)`` is ``client.call("name", ...)``.

    Examples
    --------
    >>> import dsline
    >>> with dsline.RpcServer("doc-rpc2", {"add": lambda a, b: a + b}) as server, dsline.Rpc("doc-rpc2") as client:
    ...     client.add(1, b=2), client.submit("add", 3, 4).result()
    (3, 7)
    """

    def __init__(
        self,
        name: str,
        *,
        timeout: float | None = None,
        wait: float = 5.0,
        capacity: int | None = None,
        slot_size: int | None = None,
        max_message_size: int | None = None,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name is a {type(name).__name__}, must be str")
        self._name = name
        self._timeout = _checked(timeout)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._pending: dict[int, _Call] = {}
        self._late = 0
        self._closed = False
        self._pid = 0
        self._options = {
            "capacity": capacity,
            "slot_size": slot_size,
            "max_message_size": max_message_size,
        }
        self._requests = self._connect(wait)
        try:
            self._begin()
        except BaseException:
            self._requests.close()
            raise

    def _connect(self, wait: float) -> Broadcast:
        deadline = time.monotonic() + wait
        while True:
            try:
                channel = Broadcast.open(self._name, timeout=_TICK)
            except (ChannelNotFoundError, TooManyHandlesError) as error:
                if time.monotonic() >= deadline:
                    if isinstance(error, TooManyHandlesError):
                        raise
                    raise self._no_server() from None
            else:
                if not channel.closed and _servers_alive(channel) > 0:
                    return channel
                channel.close()
                if time.monotonic() >= deadline:
                    raise self._no_server()
            time.sleep(0.01)

    def _connect_again(self) -> None:
        """Go on with the next servers, when the last of those before have closed."""
        with self._lock:
            if self._requests.closed and not self._closed:
                try:
                    self._requests = self._connect(0)
                except PeerDiedError:
                    raise ChannelClosedError(
                        f"the last server of {self._name!r} has closed, and no other one is there"
                    ) from None

    def _no_server(self) -> PeerDiedError:
        return PeerDiedError(f"no server of {self._name!r} is alive; start one with dsline.RpcServer")

    def _begin(self) -> None:
        """Make a channel for answers, and the thread that takes them: at first, and in a forked child."""
        with _beginning:
            if self._pid == os.getpid():
                return
            self._lock = threading.Lock()
            self._pending = {}
            self._replies = ShmChannel(None, max_handles=256, **self._options)
            self._address = f"{os.getpid()}:{self._replies.fileno_shared()}:{self._replies._core_uuid()}"
            thread = threading.Thread(
                target=_take_answers,
                args=(weakref.ref(self), self._replies),
                name=f"dsline-rpc-client-{self._name}",
                daemon=True,
            )
            self._thread = thread
            self._pid = os.getpid()
            _open_clients.add(self)
            thread.start()

    # --- calls ---

    def submit(self, function: str, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Send a request.

        Parameters
        ----------
        function : str
            Name of the function.
        *args, **kwargs
            For it. Whatever pickle takes; large arrays are copied once, into the slot of the request.

        Returns
        -------
        concurrent.futures.Future
            Of the answer. Its `cancel` withdraws the request, which works until a server takes it. Arrays in the result have
            memory of their own; they can be written to if those that the function returned could.

        Raises
        ------
        SerializationError
            The arguments cannot be pickled. Nothing was sent.
        PeerDiedError
            No server is alive.
        ChannelClosedError
            This client is closed, or the last server has closed.
        RpcTimeoutError
            The servers take no requests, and no slot became free within the client's timeout.
        """
        return self._submit(function, args, kwargs, self._deadline(self._timeout))

    def call(self, function: str, /, *args: Any, timeout: Any = _core.DEFAULT_TIMEOUT, **kwargs: Any) -> Any:
        """Send a request and wait for the answer.

        Parameters
        ----------
        function, *args, **kwargs
            As for `submit`.
        timeout : float or None, optional
            Seconds for all of it, None for ever. The client's by default.

        Returns
        -------
        object
            What the function returned.

        Raises
        ------
        RpcTimeoutError
            No answer in time. A request that no server had taken is withdrawn; else its answer is dropped when it comes.
        PeerDiedError
            The server died, and no other one may or can execute the request.
        RpcError
            There is no such function, or its error cannot be brought over.
        Exception
            What the function raised, with the traceback of the server as its cause.
        SerializationError, ChannelClosedError
            As for `submit`.
        """
        seconds = self._timeout if timeout is _core.DEFAULT_TIMEOUT else _checked(timeout)
        deadline = self._deadline(seconds)
        future = self._submit(function, args, kwargs, deadline)
        try:
            concurrent.futures.wait(
                [future], None if deadline is None else max(0.0, deadline - time.monotonic())
            )
            if future.done():
                return future.result()
        except BaseException:
            self._withdraw(future)
            raise
        taken = not self._withdraw(future)
        if future.done() and not future.cancelled():  # just now
            return future.result()
        how = "a server has it" if taken else "no server had taken it, and none will"
        raise RpcTimeoutError(f"no answer from {function!r} of {self._name!r} within {seconds:g} s; {how}")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return functools.partial(self.call, name)

    @property
    def late(self) -> int:
        """Answers that came after their caller had given up."""
        return self._late

    def close(self) -> None:
        """End the client: requests that nobody has taken are withdrawn, and who waits for an answer gets
        ChannelClosedError. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._pid == os.getpid():
            if self._thread is not threading.current_thread():
                self._thread.join()
            for call in self._waiting():
                if self._withdraw(call):
                    call._finish(error=ChannelClosedError("the client was closed; the request was withdrawn"))
                else:
                    call._finish(error=ChannelClosedError("the client was closed before the answer came"))
            self._replies.close()
        self._requests.close()
        _open_clients.discard(self)

    def __reduce__(self) -> Any:
        return _client_again, (self._name, self._timeout, self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._pending)} under way"
        return f"<dsline.Rpc {self._name!r}: {state}>"

    @staticmethod
    def _deadline(seconds: float | None) -> float | None:
        return None if seconds is None else time.monotonic() + seconds

    def _submit(
        self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None
    ) -> _Call:
        if not isinstance(function, str):
            raise TypeError(
                f"function is a {type(function).__name__}, must be str: the name that it has on the server"
            )
        if self._pid != os.getpid():
            self._begin()
        if self._closed:
            raise ChannelClosedError(f"this client of {self._name!r} is closed; open another one")
        try:
            stream, buffers = _core.pickle_object((args, kwargs))
        except Exception as error:
            raise SerializationError(
                f"the arguments of {function!r} cannot be pickled: {type(error).__name__}: {error}; nothing was sent"
            ) from error
        self._connect_again()
        call = _Call(self, next(self._numbers), function)
        with self._lock:
            self._pending[call._number] = call
        meta = {"id": call._number, "to": self._address, "f": function}
        try:
            while True:
                left = _TICK if deadline is None else min(_TICK, max(0.0, deadline - time.monotonic()))
                try:
                    call._place = call._requests._core_send_placed(stream, buffers, left, meta)
                except BufferFullError as error:
                    if _servers_alive(call._requests) == 0:
                        raise self._no_server() from None
                    if deadline is not None and time.monotonic() >= deadline:
                        raise RpcTimeoutError(
                            f"the servers of {self._name!r} take no requests: {error}"
                        ) from None
                    continue
                if call._place is None:  # there was never a server
                    raise self._no_server()
                return call
        except BaseException:
            self._forget(call)
            raise

    def _forget(self, call: _Call) -> bool:
        with self._lock:
            return self._pending.pop(call._number, None) is not None

    def _waiting(self) -> list[_Call]:
        with self._lock:
            return list(self._pending.values())

    def _withdraw(self, call: _Call) -> bool:
        """Stop waiting for an answer: True when no server had taken the request."""
        return self._forget(call) and self._take_back(call)

    @staticmethod
    def _take_back(call: _Call) -> bool:
        if call._place is None or call._requests._core_handle() is None:
            return False
        return call._requests._core_withdraw(*call._place)

    # --- answers: in the thread of `_take_answers` ---

    def _take(self, message: _core.Message) -> None:
        meta = message.meta
        with self._lock:
            call = self._pending.pop(meta.get("id"), None)
            self._late += call is None
        if call is None:
            message.release()
            return
        try:
            (value,) = message.object(copy=True)
            error: BaseException | None = None
        except Exception as problem:
            value, error = (
                None,
                SerializationError(
                    f"the answer of {call._name!r} cannot be unpickled: {type(problem).__name__}: {problem}"
                ),
            )
        message.release()
        if meta.get("k") == "error":
            # One that cannot be pickled, or not unpickled here, comes as its text.
            error = value if isinstance(value, BaseException) else RpcError(str(meta.get("s")))
            error.__cause__ = _RemoteTraceback(str(meta.get("t")))
        call._finish(value, error)

    def _look_after(self) -> list[tuple[_Call, BaseException]]:
        """Calls that have no answer unless it is there already, with what to tell them; made before a look for answers."""
        lost: list[tuple[_Call, BaseException]] = []
        states: dict[Any, tuple[bool, int]] = {}
        for call in self._waiting():
            place, requests = call._place, call._requests
            if place is None:
                continue
            if requests not in states:
                is_shut_down, alive = requests.closed, _servers_alive(requests)
                if alive == 0:
                    requests.check_peers()  # what the dead held is given back, and can be withdrawn
                states[requests] = (is_shut_down, alive)
            is_shut_down, alive = states[requests]
            if not requests._core_is_there(*place):
                why = f"the server of {self._name!r} that had it died, or could not answer"
                lost.append((call, PeerDiedError(f"the call of {call._name!r} has no answer: {why}")))
            elif (is_shut_down or alive == 0) and self._take_back(call):
                if is_shut_down:
                    why = f"the last server of {self._name!r} has closed; the call of {call._name!r} was not executed"
                    lost.append((call, ChannelClosedError(why)))
                else:
                    why = f"no server of {self._name!r} is alive any more"
                    lost.append((call, PeerDiedError(f"the call of {call._name!r} has no answer: {why}")))
        return lost

    def _give_up(self, lost: list[tuple[_Call, BaseException]]) -> None:
        for call, error in lost:
            if self._forget(call):
                call._finish(error=error)


def _client_again(name: str, timeout: float | None, options: dict[str, Any]) -> Rpc:
    """Unpickle: another client of the same servers."""
    return Rpc(name, timeout=timeout, **options)


def _take_answers(client_ref: weakref.ref[Rpc], replies: ShmChannel) -> None:
    """Take the answers of a client as long as it is there. A client that nobody has any more ends it."""
    looked = time.monotonic()
    while True:
        try:
            message = replies.recv_message(timeout=_TICK)
        except BufferEmptyError:
            message = None
        except ChannelClosedError:
            return
        except DslineError:  # a damaged answer: its caller sees that it is missing
            continue
        client = client_ref()
        if client is None or client._closed:
            replies.close()
            return
        try:
            if message is not None:
                client._take(message)
            if message is None or time.monotonic() - looked > _TICK:
                looked = time.monotonic()
                lost = client._look_after()
                # A server answers before it lets go of a request, so an answer that is not there now never comes.
                while lost:
                    try:
                        message = replies.recv_message(timeout=0)
                    except (BufferEmptyError, ChannelClosedError):
                        break
                    except DslineError:
                        continue
                    client._take(message)
                client._give_up(lost)
        except DslineError:
            pass  # closed meanwhile by another thread, or damaged: its caller sees that it is missing
        message = None
        del client


def _checked(timeout: Any) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout is a {type(timeout).__name__}, must be a number of seconds or None")
    if not timeout >= 0:
        raise InvalidArgumentError(
            f"timeout is {timeout!r}, must be 0 or more seconds, or None to wait for ever"
        )
    return float(timeout)


# --- the end of the process -----------------------------------------------------------------------------------------------

_beginning = threading.Lock()
_open_servers: weakref.WeakSet[RpcServer] = weakref.WeakSet()
_open_clients: weakref.WeakSet[Rpc] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    global _beginning
    _beginning = threading.Lock()
    _open_servers.clear()  # their threads are the parent's
    _open_clients.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


@atexit.register
def _close_all() -> None:
    for client in list(_open_clients):
        client.close()
    for server in list(_open_servers):
        server._stop(1.0)  # a request that takes longer is given to another server
