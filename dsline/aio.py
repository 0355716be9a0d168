"""Channels in asyncio: the calls that wait are awaited, and the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import collections
import functools
import os
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from dsline import _core
from dsline.endpoint import Endpoint
from dsline.errors import ChannelClosedError
from dsline.waiting import check_timeout

__all__ = ["AsyncChannel"]

_DEFAULT = _core.DEFAULT_TIMEOUT
_TRY = _core.TRY
_now = time.monotonic

# A task that finds a message whenever it asks lets others run after so many seconds.
_TURN_SECONDS = 0.001
# A line that nobody stands in any more gives up its place in the event loop after so many seconds.
_LINGER_SECONDS = 1.0
# Before it sleeps a task lets the others run, and looks again, so often at most. A look that paid doubles the number for
# the next time, looks in vain halve it: sleeping costs two threads a wake-up.
_MOST_LOOKS = 8
# Who is told again and again of something that he does not get tries so often at once, then pauses between tries.
_HASTY_TRIES = 8
_PAUSE_SECONDS = 0.001


class _Place:
    """Where a task stands in a line."""

    __slots__ = ("call", "expired")

    call: asyncio.Future[None]
    expired: bool

    def expire(self) -> None:
        self.expired = True
        if not self.call.done():
            self.call.set_result(None)


class _Line:
    """The tasks that wait on one side of a handle, first come, first served. Belongs to one event loop.

    Only the first in line tries. While there is a line, the first one has been called, or the watch is armed or
    readable and the loop looks at it. Whoever leaves the first place, by whatever way, calls the next one.
    """

    def __init__(self, channel: Endpoint, for_room: bool, loop: asyncio.AbstractEventLoop) -> None:
        self._channel = channel
        self._loop = loop
        self._watch = _core.Watch(channel, for_room)
        self._is_looked_at = False
        self._timer: asyncio.TimerHandle | None = None
        self.places: collections.deque[_Place] = collections.deque()
        self.turn_ends = 0.0
        self._looks = 1

    async def stand(self, attempt: Callable[[], Any], seconds: float | None, tried: bool) -> Any:
        """Return what `attempt` returns when it is this task's turn; WouldBlock when the time is up.

        Lets others run first, in any case. `tried`: it has just been in vain.
        """
        place = _Place()
        place.call = self._loop.create_future()
        place.expired = seconds == 0
        timer = None if not seconds else self._loop.call_later(seconds, place.expire)
        self.places.append(place)
        looks = self._looks if len(self.places) == 1 else 0
        pauses = 0
        try:
            while True:
                is_look = False
                if self.places[0] is not place:
                    await place.call
                    place.call = self._loop.create_future()
                elif looks > 0:
                    looks -= 1
                    is_look = tried
                    await asyncio.sleep(0)
                elif self._arm():
                    self._watch.clear()
                    pauses += 1
                    if pauses > 1:  # what was there at the last look, others took
                        await asyncio.sleep(0 if pauses < _HASTY_TRIES else _PAUSE_SECONDS)
                else:
                    pauses = 0
                    await place.call
                    place.call = self._loop.create_future()
                if self.places[0] is place:
                    try:
                        result = attempt()
                    except _core.WouldBlock:
                        tried = True
                        if is_look and looks == 0:
                            self._looks = max(1, self._looks // 2)
                    else:
                        if is_look:
                            self._looks = min(_MOST_LOOKS, self._looks * 2)
                        return result
                if place.expired:
                    raise _core.WouldBlock
        finally:
            if timer is not None:
                timer.cancel()
            self.turn_ends = _now() + _TURN_SECONDS
            self._leave(place)

    def _arm(self) -> bool:
        if not self._is_looked_at:
            self._loop.add_reader(self._watch.fileno(), self._on_readable)
            self._is_looked_at = True
        return self._watch.arm()

    def _on_readable(self) -> None:
        self._watch.clear()
        self._call_first()

    def _call_first(self) -> None:
        if self.places:
            call = self.places[0].call
            if not call.done():
                call.set_result(None)

    def _leave(self, place: _Place) -> None:
        was_first = self.places[0] is place
        self.places.remove(place)
        if self._loop.is_closed():
            return
        if self.places:
            if was_first:
                self._call_first()
        elif self._channel.closed:
            self.end()
        elif self._timer is None:
            self._timer = self._loop.call_later(_LINGER_SECONDS, self._linger_over)

    def _linger_over(self) -> None:
        self._timer = None
        if not self.places:
            self.end()

    def end(self) -> None:
        """The loop need not look any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_looked_at and not self._loop.is_closed():
            self._loop.remove_reader(self._watch.fileno())
        self._is_looked_at = False


class AsyncChannel:
    """The asyncio face of a channel or subscriber: `recv`, `send` and the like, to be awaited.

    Parameters
    ----------
    channel : ShmChannel, FileChannel, Broadcast or Subscriber
        The handle to use. It can be used otherwise meanwhile, also by other threads.

    Notes
    -----
    Works with every event loop that has ``add_reader`` (asyncio's own on Linux, uvloop). An object belongs to the loop that
    first awaits one of its calls; another loop needs one of its own. `asyncio.run` can be called again and again.

    A message is taken in the step of the task in which the call returns it, never before. So a call that is cancelled, or
    runs into ``asyncio.timeout``, has taken nothing and sent nothing.

    Tasks that wait for the same are served in the order in which they came. A task that finds something whenever it asks
    lets other tasks run once in a millisecond.

    The calls copy, and hold the event loop, as those of the channel do with timeout=0; they raise the same errors.

    Examples
    --------
    >>> import asyncio, dsline
    >>> from dsline.aio import AsyncChannel
    >>> async def main():
    ...     with dsline.ShmChannel(capacity=4, slot_size=64) as channel:
    ...         messages = AsyncChannel(channel)
    ...         await messages.send(b"hello")
    ...         return await messages.recv_bytes()
    >>> asyncio.run(main())
    b'hello'
    """

    def __init__(self, channel: Endpoint) -> None:
        if not isinstance(channel, Endpoint):
            raise TypeError(
                f"AsyncChannel takes a channel or a subscriber, not a {type(channel).__name__}; open one first"
            )
        self._channel = channel
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._lines: dict[bool, _Line] = {}
        self._try_recv = functools.partial(channel.recv, timeout=_TRY)

    @property
    def channel(self) -> Any:
        """The channel or subscriber."""
        return self._channel

    @property
    def closed(self) -> bool:
        """True when the handle is closed or the channel is shut down."""
        return self._channel.closed

    def __len__(self) -> int:
        return len(self._channel)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<dsline.aio.AsyncChannel of {self._channel!r}>"

    # --- receiving ---

    def recv(self, *, timeout: float | None = _DEFAULT) -> Coroutine[Any, Any, memoryview]:
        """Receive the next message without a copy, as `recv` of the channel."""
        return self._run(False, self._try_recv, timeout)

    def recv_array(
        self, *, timeout: float | None = _DEFAULT, **options: Any
    ) -> Coroutine[Any, Any, NDArray[Any]]:
        """Receive the next message as the array that was sent; options as for `recv_array` of the channel."""
        return self._run(False, functools.partial(self._channel.recv_array, timeout=_TRY, **options), timeout)

    def recv_bytes(self, *, timeout: float | None = _DEFAULT) -> Coroutine[Any, Any, bytes]:
        """Receive the next message as bytes of its own (one copy)."""
        return self._run(False, functools.partial(self._channel.recv_bytes, timeout=_TRY), timeout)

    def recv_object(
        self, *, timeout: float | None = _DEFAULT, copy: bool = False
    ) -> Coroutine[Any, Any, Any]:
        """Receive the next message as the object that was sent. Unpickles it, which runs code that the sender chose."""
        return self._run(
            False, functools.partial(self._channel.recv_object, timeout=_TRY, copy=copy), timeout
        )

    def recv_record(
        self, *, timeout: float | None = _DEFAULT
    ) -> Coroutine[Any, Any, dict[str, NDArray[Any]]]:
        """Receive the next message as the record that was sent: a dict with a read-only view per field."""
        return self._run(False, functools.partial(self._channel.recv_record, timeout=_TRY), timeout)

    def recv_arrow(
        self, *, timeout: float | None = _DEFAULT, library: str | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Receive the next message as the table that was sent by `send_arrow`."""
        return self._run(
            False, functools.partial(self._channel.recv_arrow, timeout=_TRY, library=library), timeout
        )

    def recv_into(self, buffer: Any, *, timeout: float | None = _DEFAULT) -> Coroutine[Any, Any, int]:
        """Receive the next message into a buffer (one copy): the number of bytes. Nothing is written before."""
        return self._run(False, functools.partial(self._channel.recv_into, buffer, timeout=_TRY), timeout)

    def recv_with_seq(
        self, *, timeout: float | None = _DEFAULT
    ) -> Coroutine[Any, Any, tuple[int, memoryview]]:
        """Receive the next message with its sequence number."""
        return self._run(False, functools.partial(self._channel.recv_with_seq, timeout=_TRY), timeout)

    def recv_message(self, *, timeout: float | None = _DEFAULT) -> Coroutine[Any, Any, _core.Message]:
        """Receive the next message with all that came with it: a `Message`."""
        return self._run(False, functools.partial(self._channel.recv_message, timeout=_TRY), timeout)

    def recv_many(self, n: int, *, timeout: float | None = _DEFAULT) -> Coroutine[Any, Any, list[memoryview]]:
        """Receive up to `n` messages: waits for the first, then takes what is there."""
        return self._run(False, functools.partial(self._channel.recv_many, n, timeout=_TRY), timeout)

    def __aiter__(self) -> AsyncChannel:
        """Iterate over the messages, as `recv` gives them, until the channel is closed or shut down.

        The loop variable holds the last view while the loop waits for the next message, as in a plain ``for``.
        """
        return self

    async def __anext__(self) -> memoryview:
        view: memoryview
        try:
            # As _run() begins, for a message that is there.
            if self._loop is asyncio.get_running_loop():
                line = self._lines.get(False)
                if line is not None and not line.places and _now() < line.turn_ends:
                    try:
                        view = self._try_recv()
                    except _core.WouldBlock:
                        pass
                    else:
                        return view
            view = await self._run(False, self._try_recv, _DEFAULT)
        except ChannelClosedError:
            raise StopAsyncIteration from None
        return view

    # --- sending ---

    def send(
        self, data: Any, *, timeout: float | None = _DEFAULT, meta: dict[str, Any] | None = None
    ) -> Coroutine[Any, Any, bool]:
        """Copy `data` into a slot and make it visible to receivers, as `send` of the channel.

        `data` is copied when there is room: leave it as it is until the call is over.
        """
        return self._run(
            True, functools.partial(self._sender("send"), data, timeout=_TRY, meta=meta), timeout
        )

    def send_object(
        self, obj: Any, *, timeout: float | None = _DEFAULT, meta: dict[str, Any] | None = None
    ) -> Coroutine[Any, Any, bool]:
        """Pickle any object (protocol 5) into a slot, as `send_object` of the channel; at every try for room again."""
        return self._run(
            True, functools.partial(self._sender("send_object"), obj, timeout=_TRY, meta=meta), timeout
        )

    def send_arrow(
        self, data: Any, *, timeout: float | None = _DEFAULT, meta: dict[str, Any] | None = None
    ) -> Coroutine[Any, Any, bool]:
        """Send a table as an Arrow IPC stream, as `send_arrow` of the channel; measured at every try for room again."""
        return self._run(
            True, functools.partial(self._sender("send_arrow"), data, timeout=_TRY, meta=meta), timeout
        )

    def _sender(self, name: str) -> Any:
        call = getattr(self._channel, name, None)
        if call is None:
            raise TypeError(f"a {type(self._channel).__name__} cannot {name}; send by the channel itself")
        return call

    # --- the rest ---

    def close(self) -> None:
        """Close the channel's handle; tasks that wait get ChannelClosedError. Does not wait for them."""
        self._channel.close()
        if self._loop is not None and not self._loop.is_closed():
            for line in self._lines.values():
                if not line.places and _running_loop() is self._loop:
                    line.end()

    async def __aenter__(self) -> AsyncChannel:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def _run(self, for_room: bool, attempt: Callable[[], Any], timeout: float | None) -> Any:
        line = self._line(for_room)
        if timeout is _DEFAULT:
            timeout = self._channel.timeout
        else:
            check_timeout(timeout)
        tried = False
        try:
            if line.places:
                if timeout == 0:
                    raise _core.WouldBlock
            elif _now() < line.turn_ends:
                try:
                    return attempt()
                except _core.WouldBlock:
                    if timeout == 0:
                        raise
                tried = True
            return await line.stand(attempt, timeout, tried)
        except _core.WouldBlock:
            pass
        channel: Any = self._channel
        raise channel._full_error(timeout) if for_room else channel._empty_error(timeout)

    def _line(self, for_room: bool) -> _Line:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._bind(loop)
        line = self._lines.get(for_room)
        if line is None:
            line = self._lines[for_room] = _Line(self._channel, for_room, loop)
        return line

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None and not self._loop.is_closed() and self._pid == os.getpid():
            raise RuntimeError(
                f"this AsyncChannel belongs to another event loop ({self._loop!r}); make one for each loop: "
                "AsyncChannel(channel)"
            )
        self._lines = {}
        self._loop = loop
        self._pid = os.getpid()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
