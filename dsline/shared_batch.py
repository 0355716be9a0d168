"""SharedBatch: batches in shared memory whose rows are written by many processes, straight into place.

docs/design/shared-batch.md has the argument. In short: a token per row that is to be written goes through one channel
("todo"), the number of each full batch through another ("ready"); who holds such a message is the only one who may write
the row, or read the batch, and what a dead process held is delivered to another. Words beside the batches say how far each row
and batch is, so that a message that comes twice does no harm.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import mmap
import multiprocessing.util
import os
import struct
import sys
import time
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dsline import _core, dtypes
from dsline.broadcast import Broadcast
from dsline.channel import ShmChannel
from dsline.closing import Closing
from dsline.errors import (
    BufferEmptyError,
    BufferFullError,
    ChannelClosedError,
    ChannelExistsError,
    ChannelMismatchError,
    ChannelNotFoundError,
    DslineError,
    InvalidArgumentError,
    TimeoutError,
)

__all__ = ["ReadyBatch", "Row", "SharedBatch"]

# A row's word: generation (24 bits), sequence + 1 of the token that holds it (39), written (1).
# A batch's word: generation (24), sequence + 1 of the ready message by which it was taken (40).
_GENERATION = ((1 << 24) - 1) << 40
_DONE = 1
_TOKEN = struct.Struct("<QQQ")  # batch, row, generation
_READY = struct.Struct("<QQ")  # batch, generation
_MOST_ROWS = 1 << 18
_MAX_DELIVERIES = 15
_SLICE = 0.1  # seconds between two looks after the dead
_PATIENCE = 10.0  # seconds for a creator to get ready
_KEEPING: dict[str, Any] = {"max_pinned": "unlimited"}  # messages in hand are no views
_DEFAULT: Any = _core.DEFAULT_TIMEOUT


def _generation(number: int) -> int:
    return (number & 0xFFFFFF) << 40


def _row_owner(sequence: int) -> int:
    return ((sequence + 1) & ((1 << 39) - 1)) << 1


def _batch_owner(sequence: int) -> int:
    return (sequence + 1) & ((1 << 40) - 1)


class Row:
    """A row that is this process's to write, as a context manager: made by `SharedBatch.row`.

    At the end of the block the row is part of its batch. When the block is left by an exception, another `row()` gets it.

    Attributes
    ----------
    batch, index : int
        Which batch, and which row of it.
    """

    batch: int
    index: int

    def __init__(
        self, owner: SharedBatch, message: _core.Message, batch: int, index: int, generation: int
    ) -> None:
        self.batch = batch
        self.index = index
        self._owner = owner
        self._message = message
        self._generation = generation
        self._process = os.getpid()
        self._flat: NDArray[Any] | None = None
        self._array: NDArray[Any] | None = None
        self._over = False
        _in_hand.add(self)

    @property
    def array(self) -> NDArray[Any]:
        """The row: a writable view on shared memory. Whatever it held before is still in it."""
        if self._over:
            raise ValueError("the row has been given back")
        if self._array is None:
            # Every view on the row refers to this base, so its references count them.
            self._flat = self._owner._flat(self._owner._map, self.batch, self.index, 1)
            self._array = self._flat.reshape(self._owner.shape)
        return self._array

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._over or self._process != os.getpid():
            return  # a forked child has no part in the row
        if kind is not None:
            self._give_back()
            return
        self._publish()

    def _publish(self) -> None:
        # One is self._flat, one the base of self._array, one the argument of the call. Slices have this base; what was made from
        # the array by other means (a memoryview, a tensor) has not, and is not seen.
        if self._flat is not None and (count := sys.getrefcount(self._flat) - 3) > 0:
            self._give_back()
            raise BufferError(
                f"{count} view(s) on the row are alive besides row.array; drop them before the block ends. The row has not been "
                "published"
            )
        if self._array is not None:
            self._array.flags.writeable = False
        self._over = True
        _in_hand.discard(self)
        owner, message = self._owner, self._message
        try:
            owner._row_written(self.batch, self.index, self._generation, message.sequence)
        except BaseException:
            message.nack()
            raise
        message.release()

    def _give_back(self) -> None:
        self._over = True
        _in_hand.discard(self)
        if self._array is not None:
            self._array.flags.writeable = False
        self._message.nack()


class ReadyBatch:
    """A full batch that is this process's to read: made by `SharedBatch.recv`.

    As a context manager it is released at the end of the block, or, while views on it are alive, when the last of them is gone;
    left by an exception, it is given back and comes again.

    Attributes
    ----------
    batch, generation : int
        Which batch, and how often it has been filled before.
    redelivered : bool
        True when a process that had it died, or gave it back, before it was done.
    """

    def __init__(self, owner: SharedBatch, message: _core.Message, batch: int, generation: int) -> None:
        self.batch = batch
        self.generation = generation
        self.redelivered = message.redelivered
        self._held = _HeldBatch(owner, message, batch, generation)
        flat = owner._flat(owner._readable, batch, 0, owner.n)
        # Every view on the batch refers to this base.
        weakref.finalize(flat, self._held.end).atexit = False
        self._array: NDArray[Any] | None = flat.reshape(owner.n, *owner.shape)

    @property
    def array(self) -> NDArray[Any]:
        """The batch, of shape (n, *shape): a read-only view on shared memory, without a copy."""
        if self._array is None:
            raise ValueError("the batch has been released")
        return self._array

    def release(self) -> None:
        """Done with it: its rows can be written again when no view on it is left. A second call does nothing."""
        self._array = None

    def nack(self) -> None:
        """Not done with it: it comes again, to this consumer or another, when no view on it is left."""
        self._held.failed = True
        self._array = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._array is not None and kind is not None:
            self.nack()
        self.release()


class _HeldBatch:
    """What the last view on a batch leaves to be done."""

    def __init__(self, owner: SharedBatch, message: _core.Message, batch: int, generation: int) -> None:
        self.failed = False
        self._owner = owner
        self._message = message
        self._place = batch, generation
        self._process = os.getpid()
        self._over = False
        _in_hand.add(self)

    def end(self) -> None:
        if self._over or self._process != os.getpid():
            return
        self._over = True
        _in_hand.discard(self)
        if self.failed:
            self._message.nack()
            return
        try:
            self._owner._recycle(*self._place, self._message.sequence)
        except ChannelClosedError:
            # Of this handle: whoever receives the message next sends the tokens.
            self._message.nack()
        else:
            self._message.release()

    def _give_back(self) -> None:
        self.failed = True
        self.end()


class SharedBatch(Closing):
    """Batches of `n` arrays in shared memory: producers write rows straight into place, consumers get full batches.

    No copy between the producer's write and the consumer's read. Any number of processes produce and consume. A row that a dead
    producer had in hand is written by another one; a batch that a dead consumer had comes again.

    Parameters
    ----------
    n : int
        Rows of a batch.
    shape : int or tuple of int
        Shape of a row.
    dtype : dtype
        Of the rows: any that `send` takes.
    batches : int
        How many batches there are: one is read while others are filled. At least 1; 2 when not given.
    name : str or None
        As for `ShmChannel`: the live one of that name is opened. Two channels, `name`.todo and `name`.ready, go with it. None makes
        one that reaches other processes as an argument of theirs.
    timeout : float or None
        Seconds that calls of this object wait unless they say otherwise; None for ever.
    max_handles : int
        Open handles at most, up to 256.
    mode : int
        Permission bits, of one with a name.

    Raises
    ------
    ChannelMismatchError
        One of that name exists with another `n`, `shape`, `dtype` or `batches`.

    Notes
    -----
    Rows of a batch are given out in order, to whoever asks first, so the rows of one producer are anywhere. What a row meant must be
    in the row, or in an array of its own by `Row.batch` and `Row.index`.

    Examples
    --------
    >>> import dsline, numpy as np
    >>> with dsline.SharedBatch(2, (3,), np.float32) as batches:
    ...     for number in range(2):
    ...         with batches.row() as row:
    ...             row.array[...] = number
    ...     with batches.recv() as ready:
    ...         ready.array.sum()
    np.float32(3.0)
    """

    def __init__(
        self,
        n: int,
        shape: int | tuple[int, ...],
        dtype: DTypeLike,
        *,
        batches: int = 2,
        name: str | None = None,
        timeout: float | None = None,
        max_handles: int = 64,
        mode: int = 0o600,
    ) -> None:
        wanted = _Geometry.of(n, shape, dtype, batches)
        if name is None:
            self._create(wanted, None, timeout, max_handles, mode)
            return
        deadline = time.monotonic() + _PATIENCE
        while not self._open(name, timeout):
            try:
                self._create(wanted, name, timeout, max_handles, mode)
                return
            except ChannelExistsError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if self._geometry != wanted:
            found = self._geometry
            self.close()
            raise ChannelMismatchError(f"shared batch {name!r} exists with {found}, {wanted} was asked for")

    @classmethod
    def open(cls, name: str, *, timeout: float | None = None) -> Self:
        """Open the one of that name; ChannelNotFoundError when there is none."""
        batches = cls.__new__(cls)
        if not batches._open(name, timeout):
            raise ChannelNotFoundError(2, f"no shared batch has the name {name!r}")
        return batches

    # --- making and opening ---

    def _create(
        self, geometry: _Geometry, name: str | None, timeout: float | None, max_handles: int, mode: int
    ) -> None:
        options: dict[str, Any] = {"max_handles": max_handles, "mode": mode, "on_stale": "reset"}
        tokens = geometry.batches * geometry.n
        with contextlib.ExitStack() as undo:
            # In this order: whoever finds the message in the memory's history finds the rest as well.
            memory = Broadcast.create(
                name, capacity=2, history=1, slot_size=64, max_message_size=geometry.nbytes + 4096, **options
            )
            undo.callback(memory.close)
            # Room for as many tokens again: they come twice when a consumer dies while it sends them.
            small = {
                "slot_size": 64,
                "max_message_size": 64,
                "max_deliveries": _MAX_DELIVERIES,
                **options,
                **_KEEPING,
            }
            todo = ShmChannel.create(name and name + ".todo", capacity=2 * tokens + 64, **small)
            undo.callback(todo.close)
            ready = ShmChannel.create(name and name + ".ready", capacity=4 * geometry.batches + 64, **small)
            undo.callback(ready.close)
            undo.callback(ready.shutdown, immediate=True)
            undo.callback(todo.shutdown, immediate=True)
            for batch in range(geometry.batches):
                for row in range(geometry.n):
                    todo.send(_TOKEN.pack(batch, row, 0))
            memory.send(np.zeros(geometry.nbytes, np.uint8), meta=geometry.as_meta())
            self._start(memory, todo, ready, timeout)
            undo.pop_all()

    def _open(self, name: str, timeout: float | None) -> bool:
        """Open the one of that name: False when there is none, or its creator died before it was ready."""
        deadline = time.monotonic() + _PATIENCE
        try:
            memory = Broadcast.open(name)
        except ChannelNotFoundError:
            return False
        with contextlib.ExitStack() as undo:
            undo.callback(memory.close)
            while (place := memory._core_latest_place()) is None:
                memory.check_peers()
                if memory.stats().participants == 1:
                    return False
                if time.monotonic() > deadline:
                    raise TimeoutError(f"shared batch {name!r} was not ready within {_PATIENCE:g} s")
                time.sleep(0.005)
            _Geometry.from_meta(place[2])  # refuses what is no shared batch
            try:
                todo = undo.enter_context(ShmChannel.open(name + ".todo", **_KEEPING))
                ready = undo.enter_context(ShmChannel.open(name + ".ready", **_KEEPING))
            except ChannelNotFoundError:
                return False  # the last handle is just being closed
            self._start(memory, todo, ready, timeout)
            undo.pop_all()
        return True

    def _start(self, memory: Broadcast, todo: ShmChannel, ready: ShmChannel, timeout: float | None) -> None:
        place = memory._core_latest_place()
        assert place is not None
        offset, nbytes, meta = place
        self._geometry = geometry = _Geometry.from_meta(meta)
        if nbytes != geometry.nbytes:
            raise ChannelMismatchError(
                f"channel {memory.name!r} is no shared batch: {nbytes} bytes for {geometry}"
            )
        self._memory, self._todo, self._ready = memory, todo, ready
        self._timeout = timeout
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        self._map = mmap.mmap(memory.fileno_shared(), offset - start + nbytes, offset=start)
        self._words = _core.SharedWords(self._map, offset - start, geometry.words)
        self._readable = memoryview(self._map).toreadonly()
        self._base = offset - start
        self._looked = time.monotonic()

    def _flat(self, memory: Any, batch: int, index: int, rows: int) -> NDArray[Any]:
        """Rows of a batch from `index` on in one dimension: a new array each time, whose base is no array."""
        geometry = self._geometry
        dtype = geometry.dtype
        if dtype.names is not None:
            dtype = dtype.newbyteorder("|")  # its fields can be renamed in place
        size = math.prod(geometry.shape)
        at = self._base + geometry.rows_at(batch) + index * size * dtype.itemsize
        return np.frombuffer(memory, dtype, rows * size, at)

    # --- attributes ---

    @property
    def name(self) -> str | None:
        """Its name; None for an anonymous one."""
        return self._memory.name

    @property
    def n(self) -> int:
        """Rows of a batch."""
        return self._geometry.n

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return self._geometry.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the rows."""
        return self._geometry.dtype

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return self._geometry.batches

    @property
    def closed(self) -> bool:
        """True when this handle is closed or the batches are shut down."""
        return self._ready.closed

    # --- producing ---

    def row(self, *, timeout: float | None = _DEFAULT) -> Row:
        """Take the next row that is to be written.

        Parameters
        ----------
        timeout : float or None, optional
            Seconds to wait for one: None for ever, 0 not at all. The object's by default.

        Returns
        -------
        Row
            To be used in a ``with`` block.

        Raises
        ------
        BufferFullError
            No row became free in time: consumers have not released the batches.
        ChannelClosedError
            This handle is closed, or the batches are shut down.

        Notes
        -----
        Does not copy. Releases the GIL while it waits.
        """
        if timeout is _DEFAULT:
            timeout = self._timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self._next(self._todo, deadline)
            if message is None:
                raise BufferFullError(
                    f"no row of shared batch {self.name!r} became free within {timeout:g} s: its {self.batches} batches of {self.n} "
                    "rows are full or being written; release them faster, or make it with more batches"
                )
            batch, index, generation = _TOKEN.unpack(message.payload)
            if self._claim_row(batch, index, generation, message.sequence):
                return Row(self, message, batch, index, generation)
            message.release()

    def _claim_row(self, batch: int, index: int, generation: int, sequence: int) -> bool:
        """Whether the token of that sequence number makes its holder the writer of the row."""
        at = self._geometry.row_word(batch, index)
        mine = _generation(generation) | _row_owner(sequence)
        while True:
            seen = self._words.load(at)
            if seen & _GENERATION != _generation(generation):
                return False  # came twice, and the batch has gone on
            if seen & _DONE:
                # Who wrote it may have died before it looked whether the batch is full.
                self._tell_if_full(batch, index, generation)
                return False
            if seen == mine:
                return True  # its holder before died, or gave it back
            if seen != _generation(generation):
                return False  # another token for the row was first
            if self._words.exchange(at, seen, mine):
                return True

    def _row_written(self, batch: int, index: int, generation: int, sequence: int) -> None:
        mine = _generation(generation) | _row_owner(sequence)
        if not self._words.exchange(self._geometry.row_word(batch, index), mine, mine | _DONE):
            raise DslineError(f"row {index} of batch {batch} is no longer this process's to write")
        self._tell_if_full(batch, index, generation)

    def _tell_if_full(self, batch: int, index: int, generation: int) -> None:
        # The last of the rows is the last to be given out, so the look ends soon while any is missing.
        first = self._geometry.row_word(batch, 0)
        if self._words.all_match(first, self.n, index, _GENERATION | _DONE, _generation(generation) | _DONE):
            self._ready.send(_READY.pack(batch, generation), timeout=None)

    # --- consuming ---

    def recv(self, *, timeout: float | None = _DEFAULT) -> ReadyBatch:
        """Take the next full batch.

        Parameters
        ----------
        timeout : float or None, optional
            Seconds to wait for one: None for ever, 0 not at all. The object's by default.

        Returns
        -------
        ReadyBatch
            Of which `array` is the batch. Its rows are written anew when it is released.

        Raises
        ------
        BufferEmptyError
            No batch became full in time.
        ChannelClosedError
            This handle is closed, or the batches are shut down and those that were full have been taken.

        Notes
        -----
        Does not copy. Releases the GIL while it waits.
        """
        if timeout is _DEFAULT:
            timeout = self._timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self._next(self._ready, deadline)
            if message is None:
                raise BufferEmptyError(
                    f"no batch of shared batch {self.name!r} became full within {timeout:g} s"
                )
            batch, generation = _READY.unpack(message.payload)
            if self._claim_batch(batch, generation, message):
                return ReadyBatch(self, message, batch, generation)
            message.release()

    def _claim_batch(self, batch: int, generation: int, message: _core.Message) -> bool:
        """Whether the message makes its holder the reader of the batch."""
        mine = _generation(generation) | _batch_owner(message.sequence)
        while True:
            seen = self._words.load(batch)
            if seen & _GENERATION != _generation(generation):
                if message.redelivered:
                    # Its holder may have died while it sent the tokens of the next generation.
                    self._send_tokens(batch, generation + 1)
                return False
            if seen == mine:
                return True  # its holder before died, or gave it back
            if seen != _generation(generation):
                return False  # two producers have told of it
            if self._words.exchange(batch, seen, mine):
                return True

    def _recycle(self, batch: int, generation: int, sequence: int) -> None:
        """Make the rows of a batch writable again. Can be begun anew by another process at any step."""
        first = self._geometry.row_word(batch, 0)
        now, later = _generation(generation), _generation(generation + 1)
        self._words.replace_where(first, self.n, _GENERATION, now, later)
        self._words.exchange(batch, now | _batch_owner(sequence), later)
        self._send_tokens(batch, generation + 1)

    def _send_tokens(self, batch: int, generation: int) -> None:
        """Of the rows that nobody has begun to write; one that comes twice is dropped by who receives it."""
        for index in range(self.n):
            if self._words.load(self._geometry.row_word(batch, index)) == _generation(generation):
                try:
                    self._todo.send(_TOKEN.pack(batch, index, generation), timeout=None)
                except ChannelClosedError:
                    if self._todo._core_is_shut_down():
                        return  # nobody will write any more
                    raise

    def __iter__(self) -> Iterator[ReadyBatch]:
        """Iterate over the batches until they are shut down; each is released at the next step, unless it was before.

        A batch that is in hand when the loop is left early is given back, unless it was released.
        """
        while True:
            try:
                ready = self.recv()
            except ChannelClosedError:
                return
            try:
                yield ready
            except BaseException:
                ready.nack()
                raise
            ready.release()

    # --- waiting ---

    def _next(self, channel: ShmChannel, deadline: float | None) -> _core.Message | None:
        """The next message; None when the time is up. Looks after the dead now and then."""
        while True:
            left = _SLICE if deadline is None else min(_SLICE, max(0.0, deadline - time.monotonic()))
            try:
                return channel._core_recv_kept(left)
            except BufferEmptyError:
                now = time.monotonic()
            if now - self._looked >= _SLICE * 0.9:
                self._looked = now
                self._look_after_the_dead()
            if deadline is not None and now >= deadline:
                return None

    def _look_after_the_dead(self) -> None:
        """Of both channels: nobody else may wait there. Messages are given back as often as it takes."""
        for channel in (self._todo, self._ready):
            channel.check_peers()
            if channel.stats().dead_letters:
                for letter in channel.dead_letters():
                    letter.revive()

    # --- the end ---

    def shutdown(self) -> None:
        """End it for all: no more rows are given out; batches that are full are received, then ChannelClosedError."""
        self._todo.shutdown(immediate=True)
        self._ready.shutdown()

    def close(self) -> None:
        """End this handle; a second call does nothing. The last one removes the name, and what is in it."""
        if not self._memory.closed and self._memory.name is not None:
            with contextlib.suppress(DslineError):
                self._memory.check_peers()
                if self._memory.stats().participants == 1:
                    self._todo.unlink()
                    self._ready.unlink()
        for channel in (self._ready, self._todo, self._memory):
            channel.close()

    def __repr__(self) -> str:
        return f"<dsline.SharedBatch {self.name or 'anonymous'!r}: {self._geometry}>"

    def __reduce__(self) -> Any:
        return _attach, (type(self), self._memory, self._todo, self._ready, self._timeout)


def _attach(cls: type[SharedBatch], memory: Any, todo: Any, ready: Any, timeout: float | None) -> SharedBatch:
    """Unpickle a handle."""
    batches = cls.__new__(cls)
    batches._start(memory, todo, ready, timeout)
    return batches


class _Geometry:
    """What all handles of one agree on, and where its words and rows lie in its memory."""

    def __init__(self, n: int, shape: tuple[int, ...], dtype: np.dtype[Any], batches: int) -> None:
        self.n, self.shape, self.dtype, self.batches = n, shape, dtype, batches
        self.words = batches * (1 + n)
        self._first = (8 * self.words + 63) // 64 * 64
        self._step = (n * math.prod(shape) * dtype.itemsize + 63) // 64 * 64
        self.nbytes = self._first + batches * self._step

    @classmethod
    def of(cls, n: Any, shape: Any, dtype: Any, batches: Any) -> _Geometry:
        for what, value in (("n", n), ("batches", batches)):
            if type(value) is not int:
                raise TypeError(f"{what} is a {type(value).__name__}, must be an int")
            if value < 1:
                raise InvalidArgumentError(f"{what} is {value}, must be 1 or more")
        if n * batches > _MOST_ROWS:
            raise InvalidArgumentError(
                f"{batches} batches of {n} rows are {n * batches} rows, must be {_MOST_ROWS} at most"
            )
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        dtypes.encode_dtype(kind)  # refuses objects
        if not all(type(size) is int and size >= 1 for size in sizes) or kind.itemsize == 0:
            raise InvalidArgumentError(f"a row of shape {shape!r} and dtype {kind} holds nothing")
        return cls(n, sizes, kind, batches)

    def as_meta(self) -> dict[str, Any]:
        shape = struct.pack(f"<{len(self.shape)}Q", *self.shape)
        return {
            "n": self.n,
            "batches": self.batches,
            "shape": shape,
            "dtype": dtypes.encode_dtype(self.dtype),
        }

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> _Geometry:
        try:
            shape = struct.unpack(f"<{len(meta['shape']) // 8}Q", meta["shape"])
            return cls(meta["n"], shape, dtypes.decode_dtype(meta["dtype"]), meta["batches"])
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise ChannelMismatchError(f"the channel is no shared batch: {error!r}") from None

    def row_word(self, batch: int, index: int) -> int:
        if not (0 <= batch < self.batches and 0 <= index < self.n):
            raise DslineError(f"row {index} of batch {batch} does not exist in {self}")
        return self.batches + batch * self.n + index

    def rows_at(self, batch: int) -> int:
        return self._first + batch * self._step

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Geometry) and (self.n, self.shape, self.dtype, self.batches) == (
            other.n,
            other.shape,
            other.dtype,
            other.batches,
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"{self.batches} batches of {self.n} rows of {self.dtype} {self.shape}"


# --- the end of the process -----------------------------------------------------------------------------------------
# What a process holds when it ends in order counts as done for a channel. A token in its hand must not: nobody would write
# the row. So rows and batches are given back before the channels are left.

_in_hand: weakref.WeakSet[Any] = weakref.WeakSet()


def _give_back_all() -> None:
    for held in list(_in_hand):
        if held._process == os.getpid():
            with contextlib.suppress(DslineError, BufferError):
                held._give_back()


class _Anchor:
    """register_after_fork() keeps only a weak reference to its object."""


def _at_exit_of_child(_: object) -> None:
    # Before dsline.endpoint leaves the channels, which it does at -100.
    multiprocessing.util.Finalize(None, _give_back_all, exitpriority=-90)


_anchor = _Anchor()
atexit.register(_give_back_all)
multiprocessing.util.register_after_fork(_anchor, _at_exit_of_child)
if multiprocessing.parent_process() is not None:
    _at_exit_of_child(None)
