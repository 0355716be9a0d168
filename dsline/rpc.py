"""Request and response between processes: `RpcServer` offers functions under a name, `Rpc` calls them.

Requests go through one named channel that all servers of the name receive from; the answers to a client through an anonymous
channel of its own, which the request tells of and which goes with the client. docs/guide/rpc.md has the rules.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from dsline import _core
from dsline.broadcast import Broadcast
from dsline.channel import ShmChannel
from dsline.closing import Closing
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
from dsline.rpc_server import TICK, servers_alive

__all__ = ["RemoteTraceback", "Rpc"]


class RemoteTraceback(Exception):
    """The traceback of an error in another process, as text: the cause of the error that the caller gets."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


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


class Rpc(Closing):
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
        self._options: dict[str, Any] = {
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
                channel = Broadcast.open(self._name, timeout=TICK)
            except (ChannelNotFoundError, TooManyHandlesError) as error:
                if time.monotonic() >= deadline:
                    if isinstance(error, TooManyHandlesError):
                        raise
                    raise self._no_server() from None
            else:
                if not channel.closed and servers_alive(channel) > 0:
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
                left = TICK if deadline is None else min(TICK, max(0.0, deadline - time.monotonic()))
                try:
                    call._place = call._requests._core_send_placed(stream, buffers, left, meta)
                except BufferFullError as error:
                    if servers_alive(call._requests) == 0:
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
            call = self._pending.pop(meta["id"], None) if "id" in meta else None
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
            error.__cause__ = RemoteTraceback(str(meta.get("t")))
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
                is_shut_down, alive = requests.closed, servers_alive(requests)
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
            message = replies.recv_message(timeout=TICK)
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
            if message is None or time.monotonic() - looked > TICK:
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


# --- the end of the process ---------------------------------------------------------------------------------------------

_beginning = threading.Lock()
_open_clients: weakref.WeakSet[Rpc] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    global _beginning
    _beginning = threading.Lock()
    _open_clients.clear()  # their threads are the parent's


os.register_at_fork(after_in_child=_after_fork_in_child)


@atexit.register
def _close_all() -> None:
    for client in list(_open_clients):
        client.close()
