"""The log behind ``file://``: a folder of segment files with checked records, appended by one writer, read by anybody.

``docs/dataflow/log.md`` has the byte tables. A record is one item; it is written by one call of the kernel, with its
length and sums in front, so that whatever ends a writer leaves a prefix of whole records and at most one torn one behind
them. The next writer cuts that one off.
"""

from __future__ import annotations

import contextlib
import copyreg
import dataclasses
import errno
import fcntl
import io
import json
import mmap
import os
import pickle
import re
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias

import numpy as np

from dsline._core import crc32c as _crc32c
from dsline.dataflow.items import Batch, item_text, schema_of
from dsline.dataflow.npy_files import raw_bytes, sync_folder
from dsline.dataflow.operator import Schema
from dsline.dtypes import decode_dtype, encode_dtype
from dsline.errors import (
    CorruptedMessageError,
    LogError,
    PipelineBuildError,
    PipelineRuntimeError,
    SerializationError,
)
from dsline.objects import OUT_OF_BAND_BYTES, extra_reducers
from dsline.specs import ArraySpec

__all__ = [
    "Cut",
    "LogReader",
    "LogRecord",
    "LogWriter",
    "check_reader",
    "check_writer",
    "commit_group",
    "log_schema",
    "pack",
    "parse_interval",
    "unpack",
]

Array: TypeAlias = np.ndarray[Any, Any]

BYTES, ARRAY, OBJECT, COLUMNS, END = 0, 1, 2, 3, 16  # kinds of records

_SEGMENT: Final = struct.Struct(
    "<8sIIQq16s12xI"
)  # magic, version, header bytes, first sequence, created, uuid, CRC
_SEGMENT_MAGIC: Final = b"DSLINLOG"
_VERSION: Final = 1
_RECORD: Final = struct.Struct("<4sBBHQqQIIQQII")
_RECORD_MAGIC: Final = b"DSLR"
_PART: Final = struct.Struct(
    "<QBBBBHHI"
)  # bytes, type, Fortran order, dimensions, 0, lengths of name and code, 0
_COUNT: Final = struct.Struct("<I")
_HEADER_BYTES: Final = 64
_SUFFIX: Final = ".dsl"
_NAME: Final = re.compile(r"([0-9]{20})\.dsl")
_GROUP_NAME: Final = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,100}")
_ALIGNMENT: Final = 16  # of records, and of the payloads of small ones
_WIDE_ALIGNMENT: Final = 64  # of arrays from OUT_OF_BAND_BYTES on
_MOST_BYTES: Final = 1 << 46
_MOST_PARTS: Final = 1 << 20
_WINDOW_BYTES: Final = 64 << 20  # mapped at a time
_COPIED_BYTES: Final = 1 << 20
_MOST_BUFFERS: Final = 512  # per call of writev
_POLLS: Final = (
    0.002,
    0.05,
)  # seconds between two looks at the end of a log that is followed: first, and at most
_INTERVAL: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s|m)")
_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to


# --- items and records --------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A piece of a payload: an array, or bytes."""

    offset: int
    nbytes: int
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...]
    fortran: bool
    name: str


class _Encoded(NamedTuple):
    """An item on its way into a record."""

    kind: int
    description: bytes
    pieces: list[Any]  # buffers of the payload, with the gaps between them
    nbytes: int
    alignment: int


def _describe_array(
    dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool, nbytes: int, name: bytes = b""
) -> bytes:
    return _describe_part(encode_dtype(dtype), shape, fortran, nbytes, name)


@lru_cache(maxsize=512)
def _describe_part(code: bytes, shape: tuple[int, ...], fortran: bool, nbytes: int, name: bytes) -> bytes:
    lead = _PART.pack(nbytes, 1 if code else 0, fortran, len(shape), 0, len(name), len(code), 0)
    return lead + struct.pack(f"<{len(shape)}Q", *shape) + name + code


def _joined(kind: int, described: list[bytes], buffers: list[memoryview]) -> _Encoded:
    alignment = _WIDE_ALIGNMENT if any(each.nbytes >= OUT_OF_BAND_BYTES for each in buffers) else _ALIGNMENT
    pieces: list[Any] = []
    size = 0
    for each in buffers:
        gap = _aligned(size, alignment) - size
        if gap:
            pieces.append(bytes(gap))
        pieces.append(each)
        size += gap + each.nbytes
    return _Encoded(kind, _COUNT.pack(len(described)) + b"".join(described), pieces, size, alignment)


def _encode(item: Any) -> _Encoded:
    if isinstance(item, np.ndarray) and not item.dtype.hasobject:
        fortran = item.flags.f_contiguous and not item.flags.c_contiguous
        data = raw_bytes(item.T if fortran else item)
        return _joined(ARRAY, [_describe_array(item.dtype, item.shape, fortran, data.nbytes)], [data])
    if isinstance(item, Batch):
        columns = [raw_bytes(column) for column in item.values()]
        described = [
            _describe_array(column.dtype, column.shape, False, data.nbytes, name.encode())
            for (name, column), data in zip(item.items(), columns, strict=True)
        ]
        return _joined(COLUMNS, described, columns)
    if isinstance(item, bytes | bytearray | memoryview):
        data = memoryview(item).cast("B") if memoryview(item).c_contiguous else memoryview(bytes(item))
        return _joined(BYTES, [_describe_part(b"", (), False, data.nbytes, b"")], [data])
    return _encode_object(item)


class _Pickler(pickle.Pickler):
    """Arrays and NumPy's scalars in a form that is read back without numpy's own unpickling."""

    def reducer_override(self, item: Any) -> Any:
        if type(item) is np.ndarray and not item.dtype.hasobject:
            fortran = item.flags.f_contiguous and not item.flags.c_contiguous
            data = pickle.PickleBuffer(raw_bytes(item.T if fortran else item))
            return _array, (data, encode_dtype(item.dtype), item.shape, fortran)
        if isinstance(item, np.generic) and not item.dtype.hasobject:
            return _scalar, (encode_dtype(item.dtype), item.tobytes())
        return NotImplemented


def _array(data: Any, code: bytes, shape: tuple[int, ...], fortran: bool) -> Array:
    """Unpickle an array, over `data`."""
    return np.ndarray(shape, decode_dtype(code), memoryview(data).toreadonly(), order="F" if fortran else "C")


def _scalar(code: bytes, data: bytes) -> Any:
    """Unpickle a scalar of NumPy's."""
    return np.ndarray((), decode_dtype(code), data)[()]


def _encode_object(item: Any) -> _Encoded:
    stream = io.BytesIO()
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND_BYTES:
            return True  # in the stream
        buffers.append(raw)
        return False

    pickler = _Pickler(stream, 5, buffer_callback=keep)
    pickler.dispatch_table = {**copyreg.dispatch_table, **extra_reducers()}
    try:
        pickler.dump(item)
    except Exception as error:
        raise SerializationError(f"{item_text(item)} cannot be written to a log: {error}") from error
    pieces = [stream.getbuffer(), *buffers]
    return _joined(OBJECT, [_describe_part(b"", (), False, each.nbytes, b"") for each in pieces], pieces)


def pack(item: Any) -> bytes:
    """Pickle an item so that `unpack` reads plain data, and arrays in it, without running code that the bytes choose.

    Raises
    ------
    SerializationError
        It cannot be pickled.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream, 5)
    pickler.dispatch_table = {**copyreg.dispatch_table, **extra_reducers()}
    try:
        pickler.dump(item)
    except Exception as error:
        raise SerializationError(f"{item_text(item)} cannot be pickled: {error}") from error
    return stream.getvalue()


def unpack(data: bytes, objects: bool = False) -> Any:
    """Return what `pack` was given; objects of any class with ``objects=True`` only.

    Raises
    ------
    SerializationError
        It needs ``objects=True``, or cannot be unpickled here.
    """
    try:
        return pickle.loads(data) if objects else _PlainUnpickler(io.BytesIO(data)).load()
    except SerializationError:
        raise
    except Exception as error:
        raise SerializationError(f"an object cannot be unpickled: {type(error).__name__}: {error}") from error


# What unpickling of plain data may call. None of it runs code that a file chose.
_PLAIN: Final = {
    "builtins": ("bytearray", "complex", "frozenset", "range", "set", "slice"),
    "collections": ("OrderedDict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
    "uuid": ("UUID",),
    "dsline.dataflow.log": ("_array", "_scalar"),
    "dsline.dataflow.items": ("_batch",),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        raise SerializationError(
            f"a record holds an object that needs {module}.{name}; reading it runs code that the file chooses, so it takes "
            "objects=True, for logs that are trusted like programs"
        )


@lru_cache(maxsize=512)
def _parts_of(description: bytes) -> tuple[int, tuple[_Part, ...]]:
    """Read a description. Returns alignment and parts; ValueError where it is malformed."""
    (count,) = _COUNT.unpack_from(description)
    if count > _MOST_PARTS:
        raise ValueError(f"{count} parts")
    at = _COUNT.size
    sizes: list[int] = []
    found: list[tuple[np.dtype[Any] | None, tuple[int, ...], bool, str]] = []
    for _ in range(count):
        nbytes, typed, fortran, ndim, zero, name_size, code_size, more = _PART.unpack_from(description, at)
        at += _PART.size
        shape = struct.unpack_from(f"<{ndim}Q", description, at)
        at += 8 * ndim
        name, code = (
            description[at : at + name_size],
            description[at + name_size : at + name_size + code_size],
        )
        at += name_size + code_size
        if (
            zero
            or more
            or typed not in (0, 1)
            or fortran not in (0, 1)
            or at > len(description)
            or nbytes > _MOST_BYTES
        ):
            raise ValueError("a part is malformed")
        dtype = decode_dtype(code) if typed else None
        if dtype is not None:
            elements = 1
            for dim in shape:
                elements *= dim
            if elements * dtype.itemsize != nbytes:
                raise ValueError(f"an array of {dtype} {shape} in {nbytes} bytes")
        sizes.append(nbytes)
        found.append((dtype, shape, bool(fortran), name.decode()))
    if at != len(description):
        raise ValueError("bytes behind the last part")
    alignment = _WIDE_ALIGNMENT if any(size >= OUT_OF_BAND_BYTES for size in sizes) else _ALIGNMENT
    parts, offset = [], 0
    for size, (dtype, shape, in_fortran, text) in zip(sizes, found, strict=True):
        offset = _aligned(offset, alignment)
        parts.append(_Part(offset, size, dtype, shape, in_fortran, text))
        offset += size
    return alignment, tuple(parts)


def _decode(kind: int, parts: Sequence[_Part], buffer: Any, start: int, objects: bool) -> Any:
    """Make the item; ValueError or TypeError where it is malformed."""
    if kind == ARRAY:
        (part,) = parts
        return _array_of(part, buffer, start)
    if kind == COLUMNS:
        return Batch({part.name: _array_of(part, buffer, start) for part in parts})
    view = memoryview(buffer)
    pieces = [view[start + part.offset : start + part.offset + part.nbytes] for part in parts]
    if kind == BYTES:
        (data,) = pieces
        return bytes(data)
    stream, *buffers = pieces
    if objects:
        return pickle.loads(stream, buffers=buffers)
    return _PlainUnpickler(io.BytesIO(stream), buffers=buffers).load()


def _array_of(part: _Part, buffer: Any, start: int) -> Array:
    if part.dtype is None:
        raise ValueError("bytes where an array is said to be")
    # A structure's fields can be renamed in place, so every array has its own.
    dtype = part.dtype if part.dtype.names is None else part.dtype.newbyteorder("|")
    order: Any = "F" if part.fortran else "C"
    if part.nbytes == 0:
        empty = np.zeros(part.shape, dtype, order=order)
        empty.flags.writeable = False
        return empty
    return np.ndarray(part.shape, dtype, buffer, start + part.offset, order=order)


class _Header(NamedTuple):
    """A record's header, checked as far as it can be by itself."""

    kind: int
    sequence: int
    timestamp_ns: int
    payload_bytes: int
    payload_offset: int
    body_crc: int
    record_bytes: int
    description_bytes: int


def _read_header(raw: bytes) -> _Header | None:
    """Return the header in 64 bytes; None where they are none."""
    magic, kind, flags, zero, sequence, moment, payload, offset, body_crc, size, zeros, description, crc = (
        _RECORD.unpack(raw)
    )
    if magic != _RECORD_MAGIC or crc != _crc32c(raw[:60]) or flags or zero or zeros:
        return None
    if (
        size > _MOST_BYTES
        or size % _ALIGNMENT
        or offset + payload > size
        or _HEADER_BYTES + description > offset
    ):
        return None
    return _Header(kind, sequence, moment, payload, offset, body_crc, size, description)


def _body_sum(window: memoryview, at: int, header: _Header) -> int:
    first = at + _HEADER_BYTES
    crc = _crc32c(window[first : first + header.description_bytes])
    first = at + header.payload_offset
    return int(_crc32c(window[first : first + header.payload_bytes], crc))


class LogRecord:
    """A record of a log.

    Attributes
    ----------
    sequence : int
        Position in the log, from 0.
    timestamp_ns : int
        Time of writing, as `time.time_ns`.
    nbytes : int
        Bytes of the payload.
    """

    __slots__ = ("_buffer", "_kind", "_objects", "_parts", "_start", "nbytes", "sequence", "timestamp_ns")

    def __init__(
        self, header: _Header, parts: Sequence[_Part], buffer: Any, start: int, objects: bool
    ) -> None:
        self.sequence = header.sequence
        self.timestamp_ns = header.timestamp_ns
        self.nbytes = header.payload_bytes
        self._kind = header.kind
        self._parts = parts
        self._buffer = buffer
        self._start = start
        self._objects = objects

    def item(self) -> Any:
        """Return the item that was written.

        Arrays and the columns of a `Batch` are read-only views of the mapped file, without a copy; they stay valid after the
        reader is closed. bytes are copied; other objects are unpickled.

        Raises
        ------
        SerializationError
            An object that needs ``objects=True``, or that cannot be unpickled here.
        """
        try:
            return _decode(self._kind, self._parts, self._buffer, self._start, self._objects)
        except SerializationError:
            raise
        except Exception as error:
            raise SerializationError(
                f"record {self.sequence} cannot be turned into an item: {type(error).__name__}: {error}"
            ) from error

    @property
    def schema(self) -> Schema:
        """What the item is; None for bytes and objects."""
        if self._kind not in (ARRAY, COLUMNS):
            return None
        return schema_of(self.item())

    def __repr__(self) -> str:
        return f"<LogRecord {self.sequence}: {self.nbytes} bytes>"


# --- segments -----------------------------------------------------------------------------------------------------------


def _segment_path(folder: str, first: int) -> str:
    return os.path.join(folder, f"{first:020}{_SUFFIX}")


def _sync_file(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _segments(folder: str) -> list[int]:
    """First sequences of the segments, sorted."""
    matches = (_NAME.fullmatch(name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in matches if match)


def _segment_header(first: int, uuid: bytes) -> bytes:
    head = _SEGMENT.pack(_SEGMENT_MAGIC, _VERSION, _HEADER_BYTES, first, time.time_ns(), uuid, 0)
    return head[:60] + struct.pack("<I", _crc32c(head[:60]))


def _segment_uuid(raw: bytes, first: int) -> bytes | None:
    """The log's uuid in the header of a segment; None where it is none."""
    if len(raw) < _HEADER_BYTES:
        return None
    magic, version, size, begins, _, uuid, crc = _SEGMENT.unpack(raw[:_HEADER_BYTES])
    right = magic == _SEGMENT_MAGIC and version == _VERSION and size == _HEADER_BYTES and begins == first
    return uuid if right and crc == _crc32c(raw[:60]) else None


def _failed(path: str, doing: str, error: OSError) -> LogError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "no space is left on the disk; what was written before is whole, make room and go on"
    return LogError(error.errno or errno.EIO, f"log {path!r}: {doing}: {reason}")


@dataclasses.dataclass(frozen=True)
class Cut:
    """What a writer cut off when it opened a log, or before it appended to a shared one.

    Attributes
    ----------
    sequence : int
        Of the record that was not whole: it is given to the next one that is written.
    nbytes : int
        That were cut off.
    reason : str
        What was wrong.
    saved : str or None
        File with the bytes, where whole records stood behind the bad one.
    """

    sequence: int
    nbytes: int
    reason: str
    saved: str | None


class LogWriter:
    """Appends items to a log.

    Parameters
    ----------
    path : str or path
        Folder of the log, made where it is not there.
    sync : None, str or float
        When records are written through to the disk. None: when `flush` is called; they survive the death of every process
        at once, but not a loss of power. An interval ("100ms", "2s", seconds): that long after they were written, by a
        thread. "always": before `append` returns.
    segment_bytes : int
        A new file is begun when a record would make the last one larger.
    shared : bool
        False: the log is locked until `close`. True: other shared writers, in this and other processes, append in turns; it
        is locked for each record.

    Attributes
    ----------
    next_sequence : int
        Of the next record.
    cuts : list of Cut
        Torn records that were found and cut off.

    Raises
    ------
    LogError
        Another writer has the log; the folder holds something else; the disk refuses.

    Notes
    -----
    Safe to share between threads. Not to be used by a forked child.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sync: str | float | None = None,
        segment_bytes: int = 256 << 20,
        shared: bool = False,
    ) -> None:
        self._path = os.path.abspath(os.fspath(path))
        check_writer(self._path, sync, segment_bytes)
        self._always = sync == "always"
        self._interval = None if sync is None or self._always else parse_interval(sync)
        self._segment_bytes = segment_bytes
        self._shared = shared
        self._mutex = threading.RLock()
        self._segment: int | None = None  # first sequence of the open one
        self._file = -1
        self._inode = -1
        self._at = 0
        self._uuid = bytes(16)
        self._unsynced: list[int] = []  # segments before the open one that may not be on the disk
        self._folder_unsynced = False
        self._failure: OSError | None = None
        self._syncer: _Syncer | None = None
        self.next_sequence = 0
        self.cuts: list[Cut] = []
        os.makedirs(self._path, exist_ok=True)
        self._lock = os.open(
            os.path.join(self._path, "writer.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        try:
            self._take_lock()
            try:
                self._catch_up()
            finally:
                if shared:
                    fcntl.flock(self._lock, fcntl.LOCK_UN)
        except BaseException:
            self._close_files()
            raise

    # --- the lock ---

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX if self._shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            raise LogError(
                errno.EAGAIN,
                f"log {self._path!r} has a writer already{f', process {holder}' if holder else ''}; a log has one at a time",
            ) from None
        if not self._shared:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the log; of a shared one, see what the others have appended."""
        with self._mutex:
            if self._lock < 0:
                raise LogError(errno.EBADF, f"the writer of log {self._path!r} is closed")
            if self._failure is not None:
                raise self._failure
            if not self._shared:
                yield
                return
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                self._catch_up()
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    # --- the end of the log ---

    def _catch_up(self) -> None:
        """Find the end; cut off what is torn behind it."""
        try:
            segments = _segments(self._path)
            if self._segment is None:
                self._unsynced = segments[:-1]  # whoever wrote them may not have done it
            elif segments and segments[-1] != self._segment:
                self._unsynced += [first for first in segments[:-1] if first >= self._segment]
            while segments and not self._follow(segments[-1]):
                # Made shortly before a loss of power: its name came to the disk, its header did not.
                os.unlink(_segment_path(self._path, segments.pop()))
                self._segment = None
            if not segments:
                self._sweep()
                self._uuid = secrets.token_bytes(16)
                self._begin_segment(0)
        except OSError as error:
            raise (
                error if isinstance(error, LogError) else _failed(self._path, "opening it", error)
            ) from error

    def _sweep(self) -> None:
        """Refuse a folder with something else in it."""
        foreign = [
            name
            for name in os.listdir(self._path)
            if name not in ("writer.lock", "groups") and ".dsl" not in name
        ]
        if foreign:
            raise LogError(
                errno.EEXIST,
                f"folder {self._path!r} is no log: it holds {foreign[0]!r}; give a folder of its own, or one that is not there",
            )

    def _follow(self, first: int) -> bool:
        """Go to the end of the last segment. False where it has no header and nothing in it."""
        path = _segment_path(self._path, first)
        status = os.stat(path)
        if self._segment != first or status.st_ino != self._inode:
            if not self._open_segment(first, path):
                return False
            status = os.fstat(self._file)
        if status.st_size > self._at:
            self._scan(first, path, status.st_size)
        return True

    def _open_segment(self, first: int, path: str) -> bool:
        self._close_segment()
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        head = os.pread(file, _HEADER_BYTES, 0)
        uuid = _segment_uuid(head, first)
        if uuid is None:
            os.close(file)
            if not head.strip(b"\0") and os.path.getsize(path) <= _HEADER_BYTES:
                return False
            raise LogError(
                errno.EINVAL,
                f"log {self._path!r}: {os.path.basename(path)} is no segment of this version, or damaged",
            )
        self._file, self._segment, self._uuid = file, first, uuid
        self._inode = os.fstat(file).st_ino
        self._at, self.next_sequence = _HEADER_BYTES, first
        return True

    def _scan(self, first: int, path: str, size: int) -> None:
        """Take in whole records from here on; cut off the rest."""
        with mmap.mmap(self._file, size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            at, reason = self._at, ""
            while at < size:
                reason, header = _check_record(view, at, size, self.next_sequence)
                if header is None:
                    break
                at += header.record_bytes
                self.next_sequence += header.kind != END
            self._at = at
            if at == size:
                return
            saved = self._save_tail(view, at, path)
        self._cut(size, reason, saved)

    def _save_tail(self, view: memoryview, at: int, path: str) -> str | None:
        """Keep what is to be cut off where there are whole records in it: it is more than a torn end."""
        tail = bytes(view[at:])
        found = tail.find(_RECORD_MAGIC, 1)
        while found >= 0:
            raw = tail[found : found + _HEADER_BYTES]
            if len(raw) == _HEADER_BYTES and _read_header(raw) is not None:
                saved = f"{path}.cut-{time.time_ns()}"
                with open(saved, "xb") as file:
                    file.write(tail)
                return saved
            found = tail.find(_RECORD_MAGIC, found + 1)
        return None

    def _cut(self, size: int, reason: str, saved: str | None) -> None:
        """End the last segment where its whole records end."""
        self.cuts.append(Cut(self.next_sequence, size - self._at, reason, saved))
        self._replace_segment()

    def _replace_segment(self) -> None:
        """End the open segment at `_at`, in a file of its own: readers may have mapped the rest of the old one."""
        assert self._segment is not None
        path = _segment_path(self._path, self._segment)
        temporary = f"{path}.tmp"
        try:
            copy = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                done = 0
                while done < self._at:
                    piece = os.pread(self._file, min(_COPIED_BYTES, self._at - done), done)
                    if not piece:
                        raise OSError(errno.EIO, "the file is shorter than it was")
                    done += os.pwrite(copy, piece, done)
                os.fsync(copy)
                os.replace(temporary, path)
            except BaseException:
                os.close(copy)
                raise
            os.close(self._file)
            self._file, self._inode = copy, os.fstat(copy).st_ino
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            os.ftruncate(self._file, self._at)
        os.fsync(self._file)
        sync_folder(self._path)

    def _begin_segment(self, first: int) -> None:
        path = _segment_path(self._path, first)
        temporary = f"{path}.tmp"
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(file, _segment_header(first, self._uuid), 0)
            if self._syncs:
                os.fsync(file)
            os.replace(temporary, path)  # never a name without a header, but after a loss of power
            if self._syncs:
                sync_folder(self._path)
            else:
                self._folder_unsynced = True
        except BaseException:
            os.close(file)
            raise
        self._close_segment()
        self._file, self._segment, self._at = file, first, _HEADER_BYTES
        self._inode = os.fstat(file).st_ino

    @property
    def _syncs(self) -> bool:
        return self._always or self._interval is not None

    def _close_segment(self) -> None:
        if self._file >= 0:
            file, self._file, self._segment = self._file, -1, None
            os.close(file)

    # --- appending ---

    def append(self, item: Any, *, timestamp_ns: int | None = None) -> int:
        """Write an item behind the last one.

        Parameters
        ----------
        item : object
            Arrays and a `Batch` of columns are written as they lie, without pickle; bytes too; anything else by pickle
            (protocol 5, arrays in it beside it).
        timestamp_ns : int, optional
            By default the time of day.

        Returns
        -------
        int
            The sequence of the record.

        Raises
        ------
        SerializationError
            The item cannot be pickled.
        LogError
            The disk refuses; the log is as it was before the call.
        """
        encoded = _encode(item)
        with self._turn():
            sequence = self.next_sequence
            self._write(encoded, time.time_ns() if timestamp_ns is None else timestamp_ns)
            self.next_sequence += 1
            self._written()
        return sequence

    def end(self) -> None:
        """Write an END, at which readers that follow the log stop, and write all through to the disk."""
        with self._turn():
            self._write(_joined(END, [], []), time.time_ns())
            self._sync()

    def _write(self, encoded: _Encoded, timestamp_ns: int) -> None:
        if self._at > _HEADER_BYTES and self._at + self._record_size(encoded)[1] > self._segment_bytes:
            self._rotate()
        offset, size = self._record_size(encoded)
        crc = _crc32c(encoded.description)
        for piece in encoded.pieces:
            crc = _crc32c(piece, crc)
        head = _RECORD.pack(
            _RECORD_MAGIC, encoded.kind, 0, 0, self.next_sequence, timestamp_ns, encoded.nbytes, offset, crc, size, 0,
            len(encoded.description), 0,
        )  # fmt: skip
        lead = b"".join(
            (
                head[:60],
                struct.pack("<I", _crc32c(head[:60])),
                encoded.description,
                bytes(offset - _HEADER_BYTES - len(encoded.description)),
            )
        )
        tail = bytes(size - offset - encoded.nbytes)
        self._write_all([lead, *encoded.pieces, tail], size)
        self._at += size

    def _record_size(self, encoded: _Encoded) -> tuple[int, int]:
        """Offset of the payload in a record that begins here, and the length of the record."""
        lead = self._at + _HEADER_BYTES + len(encoded.description)
        offset = _aligned(lead, encoded.alignment) - self._at
        return offset, _aligned(offset + encoded.nbytes, _ALIGNMENT)

    def _write_all(self, pieces: list[Any], size: int) -> None:
        done = 0
        try:
            while done < size:
                count = os.pwritev(self._file, pieces[:_MOST_BUFFERS], self._at + done)
                done += count
                pieces = _behind(pieces, count)
        except BaseException as error:
            # What is there of the record goes; nobody has taken it for one.
            try:
                os.ftruncate(self._file, self._at)
            except OSError as failure:
                self._failure = _failed(
                    self._path, "cutting off a record that was not written whole", failure
                )
            if isinstance(error, OSError):
                raise _failed(
                    self._path, f"writing record {self.next_sequence} of {size} bytes", error
                ) from error
            raise

    def _rotate(self) -> None:
        try:
            if self._syncs:
                self._sync()
            elif self._segment is not None:
                self._unsynced.append(self._segment)
            self._begin_segment(self.next_sequence)
        except OSError as error:
            raise (
                error if isinstance(error, LogError) else _failed(self._path, "beginning a segment", error)
            ) from error

    def _written(self) -> None:
        if self._always:
            self._sync()
        elif self._interval is not None:
            if self._syncer is None:
                self._syncer = _Syncer(self._interval, self._sync_from_thread)
            self._syncer.wake()

    def _sync(self) -> None:
        try:
            while self._unsynced:
                with contextlib.suppress(FileNotFoundError):  # cut off meanwhile
                    _sync_file(_segment_path(self._path, self._unsynced[-1]))
                self._unsynced.pop()
            os.fdatasync(self._file)
            if self._folder_unsynced:
                sync_folder(self._path)
                self._folder_unsynced = False
        except OSError as error:
            # The kernel has dropped the pages that it could not write: nothing can be promised any more.
            self._failure = _failed(self._path, "writing through to the disk", error)
            raise self._failure from error

    def _sync_from_thread(self) -> None:
        with self._mutex:
            if self._file < 0:
                return
            file = os.dup(self._file)
        try:
            os.fdatasync(file)
        except OSError as error:
            self._failure = _failed(self._path, "writing through to the disk", error)
        finally:
            os.close(file)

    def flush(self) -> None:
        """Write all records through to the disk. Blocks until they are there."""
        with self._turn():
            self._sync()

    # --- checkpoints ---

    def position(self) -> dict[str, int]:
        """Return what `restore` needs to come back here."""
        with self._turn():
            return {"sequence": self.next_sequence}

    def restore(self, position: Mapping[str, int]) -> None:
        """Remove every record that was written after `position` was taken.

        Readers that have mapped them keep them; readers that follow the log wait until the log is longer again.

        Raises
        ------
        PipelineRuntimeError
            The log is shorter, so it is not the one of the checkpoint, or lost records when the power went.
        LogError
            The disk refuses.
        """
        wanted = int(position["sequence"])
        with self._turn():
            if wanted > self.next_sequence or wanted < min(_segments(self._path), default=0):
                raise PipelineRuntimeError(
                    f"log {self._path!r} ends at record {self.next_sequence}, and the checkpoint at {wanted}: it is another log, "
                    "or lost records with the power; start anew without resume"
                )
            try:
                self._cut_to(wanted)
            except OSError as error:
                raise (
                    error if isinstance(error, LogError) else _failed(self._path, "cutting it", error)
                ) from error

    def _cut_to(self, wanted: int) -> None:
        segments = _segments(self._path)
        while len(segments) > 1 and segments[-1] > wanted:
            os.unlink(
                _segment_path(self._path, segments.pop())
            )  # the last one first: what is left is always a log
        first = segments[-1]
        if self._segment != first and not self._open_segment(first, _segment_path(self._path, first)):
            raise LogError(errno.EINVAL, f"log {self._path!r}: its last segment is damaged")
        size = os.fstat(self._file).st_size
        with mmap.mmap(self._file, size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            at, sequence = _HEADER_BYTES, first
            while sequence < wanted:
                reason, header = _check_record(view, at, size, sequence)
                if header is None:
                    raise LogError(errno.EINVAL, f"log {self._path!r}: record {sequence} {reason}")
                at += header.record_bytes
                sequence += header.kind != END
        self._at, self.next_sequence = at, wanted
        if at < size:
            self._replace_segment()

    # --- the end ---

    def close(self) -> None:
        """End the writer; with an interval, write all through to the disk."""
        syncer, self._syncer = self._syncer, None
        if syncer is not None:
            syncer.stop()
        with self._mutex:
            try:
                if self._file >= 0 and self._interval is not None and self._failure is None:
                    self._sync()
            finally:
                self._close_files()

    def _close_files(self) -> None:
        self._close_segment()
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_lock", -1) >= 0:
            self.close()


def _behind(pieces: list[Any], count: int) -> list[Any]:
    """What of the buffers comes behind the first `count` bytes."""
    for number, piece in enumerate(pieces):
        size = memoryview(piece).nbytes
        if count < size:
            return [memoryview(piece).cast("B")[count:], *pieces[number + 1 :]]
        count -= size
    return []


def _check_record(view: memoryview, at: int, size: int, sequence: int) -> tuple[str, _Header | None]:
    """Check the whole record at an offset. Returns what is wrong with it, or its header."""
    if size - at < _HEADER_BYTES:
        return "is cut off in its header", None
    header = _read_header(bytes(view[at : at + _HEADER_BYTES]))
    if header is None:
        return "has no header", None
    if header.sequence != sequence:
        return f"says that it is {header.sequence}", None
    if header.record_bytes > size - at:
        return "is cut off", None
    if _body_sum(view, at, header) != header.body_crc:
        return "has another sum than was written", None
    return "", header


class _Syncer:
    """A thread that calls `sync` an interval after the first record that it has not been called for."""

    def __init__(self, interval: float, sync: Callable[[], None]) -> None:
        self._interval = interval
        self._sync = sync
        self._dirty = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dsline-log-sync", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._dirty.set()

    def stop(self) -> None:
        self._stopping.set()
        self._dirty.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._dirty.wait()
            if self._stopping.wait(self._interval):
                return
            self._dirty.clear()
            self._sync()


# --- reading ------------------------------------------------------------------------------------------------------------


class LogReader:
    """Reads the records of a log, also while somebody writes it.

    Parameters
    ----------
    path : str or path
        Folder of the log.
    start : str or int
        "earliest": the first record that is there; "latest": only what is written from now on; a number: the record of
        that sequence.
    group : str, optional
        A name under which `commit` keeps a position in the log's folder; where there is one, the reader begins there and
        `start` does not count. One reader at a time may have a group.
    follow : bool
        At the end of the log, wait for more until its writer says END; False: stop.
    replay_rate : str or float
        "max"; "original" or 1.0: at the pace at which the records were written; 2.0: twice as fast, and so on.
    objects : bool
        Whether records may hold objects of any class. Unpickling them runs code that the file chooses: for logs that are
        trusted like programs. False: plain data only (numbers, texts, bytes, lists, tuples, dicts, sets, dates, arrays).
    on_damage : str
        What a damaged record does: "raise" CorruptedMessageError, or "skip" it, counted in `damaged`.
    stopped : threading.Event, optional
        Ends a wait.

    Attributes
    ----------
    sequence : int
        Of the next record.
    damaged : int
        Records or, where not even a length was to be had, ends of segments that were passed over.

    Raises
    ------
    LogError
        There is no log, or the group is in use.

    Notes
    -----
    Iterate over it for `LogRecord`s. For one thread. Nobody may cut the files of a log short but its writer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        start: str | int = "earliest",
        group: str | None = None,
        follow: bool = False,
        replay_rate: str | float = "max",
        objects: bool = False,
        on_damage: str = "raise",
        stopped: threading.Event | None = None,
    ) -> None:
        self._path = os.path.abspath(os.fspath(path))
        rate = check_reader(self._path, start, group, follow, replay_rate)
        if on_damage not in ("raise", "skip"):
            raise PipelineBuildError(f"on_damage is {on_damage!r}, must be 'raise' or 'skip'")
        self._follow, self._objects, self._skips = bool(follow), bool(objects), on_damage == "skip"
        self._stopped = stopped or threading.Event()
        self._pace = None if rate is None else _Pace(rate, self._stopped)
        self._file = -1
        self._inode = -1
        self._segment = -1
        self._size = 0
        self._window: mmap.mmap | None = None
        self._window_start = 0
        self._at = 0
        self._start = start
        self._placed = False
        self.sequence = 0
        self.damaged = 0
        self._group = None if group is None else _Group(self._path, group)
        committed = None if self._group is None else self._group.committed
        if committed is not None:
            self.seek(committed)

    # --- where it stands ---

    def position(self) -> dict[str, int]:
        """Return where the next record stands."""
        self._place()
        return {"sequence": self.sequence, "segment": self._segment, "offset": self._at}

    def seek(self, position: Mapping[str, int] | int) -> None:
        """Go to a position, or to the record of a sequence.

        Raises
        ------
        LogError
            The log does not have that record, and will not: it begins later.
        CorruptedMessageError
            A record on the way there is damaged.
        """
        hint = position if isinstance(position, Mapping) else {}
        self._go_to(int(hint["sequence"] if isinstance(position, Mapping) else position), hint)
        self._placed = True

    def _place(self) -> None:
        """Go to where reading starts, when that is first asked for."""
        if self._placed:
            return
        start = self._start
        if start == "latest":
            self._go_to_end()
        else:
            first = min(self._there(), default=0)
            self._go_to(first if start == "earliest" else int(start), {})
        self._placed = True

    def _there(self) -> list[int]:
        try:
            return _segments(self._path)
        except FileNotFoundError:
            return []

    def _go_to(self, wanted: int, hint: Mapping[str, int]) -> None:
        segments = self._there()
        before = [first for first in segments if first <= wanted]
        self._leave()
        self.sequence = wanted
        if not before:
            if segments:
                raise LogError(
                    errno.ENOENT,
                    f"log {self._path!r} begins with record {segments[0]}, and {wanted} was asked for",
                )
            return  # opened when it is there
        self._open(before[-1])
        at, sequence = _HEADER_BYTES, before[-1]
        offset = hint.get("offset", 0)
        if (
            hint.get("segment") == before[-1]
            and _HEADER_BYTES <= offset <= self._size
            and offset % _ALIGNMENT == 0
        ):
            header = self._header(offset)
            if header is not None and header.sequence == wanted:
                at, sequence = offset, wanted
        while sequence < wanted:
            header = self._header(at)
            if header is None or header.record_bytes > self._size - at:
                # The log was cut back, or is being written: this is where `wanted` will be.
                self._check_end(at, sequence)
                self._at, self.sequence = at, sequence
                self._pass_until(wanted)
                return
            at += header.record_bytes
            sequence += header.kind != END
        self._at = at

    def _pass_until(self, wanted: int) -> None:
        if not self._follow:
            raise LogError(
                errno.ENOENT,
                f"log {self._path!r} ends before record {self.sequence}, and {wanted} was asked for",
            )
        self._wanted = wanted

    _wanted = 0  # records before it are passed over: they were read before the log was cut back

    def _check_end(self, at: int, sequence: int) -> None:
        """Raise where what stands at an offset is no end of the written part, but damage."""
        if self._size - at >= _HEADER_BYTES and self._header(at) is None and not self._zeros(at):
            raise self._damage(sequence, "has no header")

    def _go_to_end(self) -> None:
        segments = self._there()
        if not segments:
            return
        self._go_to(segments[-1], {})
        while (header := self._header(self._at)) is not None and header.record_bytes <= self._size - self._at:
            self._at += header.record_bytes
            self.sequence += header.kind != END

    # --- files ---

    def _open(self, first: int) -> None:
        path = _segment_path(self._path, first)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _failed(self._path, "opening a segment", error) from error
        self._leave()
        self._file, self._segment, self._at = file, first, _HEADER_BYTES
        status = os.fstat(file)
        self._inode, self._size = status.st_ino, status.st_size
        if _segment_uuid(os.pread(file, _HEADER_BYTES, 0), first) is None:
            self._leave()
            raise LogError(
                errno.EINVAL,
                f"log {self._path!r}: {os.path.basename(path)} is no segment of this version, or damaged",
            )

    def _leave(self) -> None:
        self._window = None  # views of it live on
        if self._file >= 0:
            file, self._file, self._segment = self._file, -1, -1
            os.close(file)

    def _map(self, start: int, end: int) -> mmap.mmap:
        """Return a mapping of bytes start to end of the segment, which has them; `_window_start` is where it begins."""
        window = self._window
        if window is None or start < self._window_start or end > self._window_start + len(window):
            self._window_start = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            last = min(self._size, max(end, self._window_start + _WINDOW_BYTES))
            window = self._window = mmap.mmap(
                self._file, last - self._window_start, access=mmap.ACCESS_READ, offset=self._window_start
            )
        return window

    def _raw(self, at: int) -> bytes:
        window = self._map(at, at + _HEADER_BYTES)
        first = at - self._window_start
        return window[first : first + _HEADER_BYTES]

    def _header(self, at: int) -> _Header | None:
        if self._size - at < _HEADER_BYTES:
            self._size = os.fstat(self._file).st_size
            if self._size - at < _HEADER_BYTES:
                return None
        return _read_header(self._raw(at))

    def _zeros(self, at: int) -> bool:
        """Whether nothing but zeros follow: a file whose length came to the disk before its contents."""
        return not os.pread(self._file, min(self._size - at, 1 << 20), at).strip(b"\0")

    # --- records ---

    def __iter__(self) -> Iterator[LogRecord]:
        pause = _POLLS[0]
        while not self._stopped.is_set():
            record = self.read()
            if record is None:
                if not self._follow or self._ended:
                    return
                self._stopped.wait(pause)
                pause = min(_POLLS[1], pause * 2)
                continue
            pause = _POLLS[0]
            if self._pace is not None and not self._pace.wait_for(record.timestamp_ns):
                self.seek(record.sequence)
                return
            yield record
            del record

    _ended = False  # an END was the last record

    def read(self) -> LogRecord | None:
        """Return the next record, or None at the end of what is written. Does not block.

        Raises
        ------
        CorruptedMessageError
            The record is damaged, and `on_damage` is "raise"; the reader stands before it.
        LogError
            A segment is missing or damaged.
        """
        self._place()
        while True:
            if self._file < 0 and not self._enter():
                return None
            record = self._read_here()
            if record is None and self._next_segment():
                continue
            if record is None or record.sequence >= self._wanted:
                return record

    def _enter(self) -> bool:
        """Open the segment that has the next record, where there is one."""
        before = [first for first in self._there() if first <= self.sequence]
        if not before:
            return False
        self._go_to(self.sequence, {})
        return True

    def _read_here(self) -> LogRecord | None:
        while True:
            header = self._header(self._at)
            if header is None:
                if self._size - self._at < _HEADER_BYTES or self._zeros(self._at):
                    return None
                self._pass_over("has no header", self._size - self._at, 0)
                continue
            if header.record_bytes > self._size - self._at:
                self._size = os.fstat(self._file).st_size
                if header.record_bytes > self._size - self._at:
                    return None  # being written, or torn
            problem = "" if header.sequence == self.sequence else f"says that it is {header.sequence}"
            record = None if problem else self._record(header)
            if record is None and header.kind == END and not problem:
                self._at += header.record_bytes
                self._ended = True
                continue
            if record is None:
                self._pass_over(problem or "has another sum than was written", header.record_bytes, 1)
                continue
            self._ended = False
            self._at += header.record_bytes
            self.sequence += 1
            return record

    def _record(self, header: _Header) -> LogRecord | None:
        """The record here; None where it is an END, or damaged."""
        window = self._map(self._at, self._at + header.record_bytes)
        at = self._at - self._window_start
        view = memoryview(window)
        if (
            header.kind not in (BYTES, ARRAY, OBJECT, COLUMNS)
            or _body_sum(view, at, header) != header.body_crc
        ):
            return None
        first = at + _HEADER_BYTES
        try:
            _, parts = _parts_of(bytes(view[first : first + header.description_bytes]))
        except (ValueError, struct.error, UnicodeDecodeError):
            return None
        if parts and parts[-1].offset + parts[-1].nbytes != header.payload_bytes:
            return None
        return LogRecord(header, parts, window, at + header.payload_offset, self._objects)

    def _pass_over(self, reason: str, nbytes: int, records: int) -> None:
        if not self._skips:
            raise self._damage(self.sequence, reason)
        self.damaged += 1
        self._at += nbytes
        self.sequence += records

    def _damage(self, sequence: int, reason: str) -> CorruptedMessageError:
        error = CorruptedMessageError(
            f"log {self._path!r}: record {sequence} in {os.path.basename(_segment_path(self._path, self._segment))} {reason}; "
            "on_damage='skip' passes it over"
        )
        error.sequence = sequence
        return error

    def _next_segment(self) -> bool:
        """Go on with the next segment, where there is one and this one has been read to its end."""
        if self._replaced():
            self._go_to(self.sequence, {})
            return True
        following = [first for first in self._there() if first > self._segment]
        if not following:
            return False
        # The next segment is made when nothing more comes into this one: what has come meanwhile is read first.
        header = self._header(self._at)
        if header is not None and header.record_bytes <= os.fstat(self._file).st_size - self._at:
            self._size = os.fstat(self._file).st_size
            return True
        if following[0] != self.sequence:
            if not self._skips:
                raise LogError(
                    errno.EINVAL,
                    f"log {self._path!r}: records {self.sequence} to {following[0] - 1} are missing; on_damage='skip' goes on",
                )
            self.damaged += 1
        self.sequence = following[0]
        self._open(following[0])
        return True

    def _replaced(self) -> bool:
        """Whether the writer has cut the segment, which is another file now."""
        try:
            return os.stat(_segment_path(self._path, self._segment)).st_ino != self._inode
        except FileNotFoundError:
            return True  # with all that was in it: the log is shorter than what has been read

    # --- the group ---

    def commit(self, position: Mapping[str, int] | None = None) -> None:
        """Keep a position for the group, by default that of the next record; nothing without a group.

        Replaces the group's file at once, and writes it through to the disk.
        """
        if self._group is not None:
            self._group.commit(dict(position) if position is not None else self.position())

    def close(self) -> None:
        """End the reader. Items that it has given stay valid."""
        self._leave()
        if self._group is not None:
            self._group.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_group"):
            self.close()


class _Group:
    """The committed position of a group: a file in the log's folder, and a lock as long as a reader has it."""

    def __init__(self, path: str, name: str) -> None:
        folder = os.path.join(path, "groups")
        self._lock = -1
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = os.path.join(folder, name)
            self._lock = os.open(f"{self._file}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise LogError(
                errno.EAGAIN,
                f"group {name!r} of log {path!r} has a reader already; a group has one at a time",
            ) from None
        except OSError as error:
            self.close()
            raise _failed(path, f"group {name!r}", error) from error
        self.committed = self._read(path, name)

    def _read(self, path: str, name: str) -> dict[str, int] | None:
        try:
            with open(self._file, encoding="utf-8") as file:
                data = json.load(file)
            return {key: int(data[key]) for key in ("sequence", "segment", "offset")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.close()
            raise LogError(
                errno.EINVAL,
                f"group {name!r} of log {path!r}: its file {self._file!r} cannot be read: {error}; remove it",
            ) from error

    def commit(self, position: dict[str, int]) -> None:
        _write_position(self._file, position)

    def close(self) -> None:
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            os.close(lock)


def _write_position(path: str, position: Mapping[str, int]) -> None:
    """Replace the file of a group, at once and on the disk."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(dict(position), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(os.path.dirname(path))


def commit_group(path: str | os.PathLike[str], group: str, position: Mapping[str, int]) -> None:
    """Keep a position for a group: for whoever knows that its reader's items are done, in the reader's process or another.

    Raises
    ------
    LogError
        The disk refuses.
    """
    folder = os.path.join(os.path.abspath(os.fspath(path)), "groups")
    try:
        os.makedirs(folder, exist_ok=True)
        _write_position(os.path.join(folder, group), position)
    except OSError as error:
        raise _failed(os.fspath(path), f"keeping the position of group {group!r}", error) from error


class _Pace:
    """Waits so that records come as far apart as they were written, divided by a factor."""

    def __init__(self, factor: float, stopped: threading.Event) -> None:
        self._factor = factor
        self._stopped = stopped
        self._first: tuple[float, int] | None = (
            None  # when the first record came, and when it had been written
        )

    def wait_for(self, timestamp_ns: int) -> bool:
        """Wait for a record's time. False when stopped meanwhile."""
        if self._first is None:
            self._first = time.monotonic(), timestamp_ns
        began, written = self._first
        delay = began + (timestamp_ns - written) / 1e9 / self._factor - time.monotonic()
        return not (delay > 0 and self._stopped.wait(min(delay, threading.TIMEOUT_MAX)))


# --- checks -------------------------------------------------------------------------------------------------------------


def parse_interval(value: Any) -> float:
    """Return seconds from "100ms", "2s" or a number of seconds; PipelineBuildError otherwise."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6:
        return float(value)
    match = _INTERVAL.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or float(match[1]) <= 0:
        raise PipelineBuildError(
            f"{value!r} is no span of time; give seconds above 0, or a text like '100ms' or '2s'"
        )
    return float(match[1]) * _UNITS[match[2]]


def check_writer(path: str, sync: Any, segment_bytes: Any) -> None:
    """Raise PipelineBuildError where a log cannot be written like that."""
    if sync is not None and sync != "always":
        parse_interval(sync)
    if (
        not isinstance(segment_bytes, int)
        or isinstance(segment_bytes, bool)
        or not 4096 <= segment_bytes <= _MOST_BYTES
    ):
        raise PipelineBuildError(
            f"segment_bytes is {segment_bytes!r}, must be an int from 4096 to {_MOST_BYTES}"
        )
    if "\0" in path:
        raise PipelineBuildError(f"path {path!r} holds a null character, which no file name can")
    if os.path.exists(path) and not os.path.isdir(path):
        raise PipelineBuildError(f"{path!r} is a file, and a log is a folder; give another path")
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(path) and not os.path.isdir(parent):
        raise PipelineBuildError(f"there is no folder {parent!r} for log {path!r}; make it first")


def check_reader(path: str, start: Any, group: Any, follow: Any, replay_rate: Any) -> float | None:
    """Return the factor of the rate, None for "max"; PipelineBuildError where a log cannot be read like that."""
    number = isinstance(start, int) and not isinstance(start, bool) and start >= 0
    if not number and start not in ("earliest", "latest"):
        raise PipelineBuildError(
            f"start is {start!r}, must be 'earliest', 'latest' or the sequence of a record"
        )
    if group is not None and (
        not isinstance(group, str)
        or _GROUP_NAME.fullmatch(group) is None
        or group.endswith((".lock", ".tmp"))
    ):
        raise PipelineBuildError(
            f"group is {group!r}, must be 1 to 100 of A-Z a-z 0-9 . _ - without a leading dot, and not end with .lock or .tmp"
        )
    if "\0" in path:
        raise PipelineBuildError(f"path {path!r} holds a null character, which no file name can")
    if not follow and not os.path.isdir(path):
        raise PipelineBuildError(f"there is no log {path!r}; follow=True waits for one")
    if os.path.isdir(path) and not _segments(path) and not follow:
        raise PipelineBuildError(f"folder {path!r} is no log: there is no segment in it")
    if replay_rate == "max":
        return None
    factor = 1.0 if replay_rate == "original" else replay_rate
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise PipelineBuildError(
            f"replay_rate is {replay_rate!r}, must be 'max', 'original' or a factor above 0"
        )
    return float(factor)


def log_schema(path: str | os.PathLike[str]) -> Schema:
    """Return what the items of a log are, judging by the first: dtypes, with any number of rows; None if there is none."""
    try:
        with LogReader(path) as reader:
            record = reader.read()
            schema = None if record is None else record.schema
    except (LogError, PipelineBuildError, CorruptedMessageError, SerializationError):
        return None
    if isinstance(schema, ArraySpec):
        return ArraySpec((None,) * schema.ndim, schema.dtype)
    return schema
