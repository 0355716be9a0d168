"""Records of a log: items as checked bytes, and back, without trusting the bytes. ``docs/dataflow/log.md`` has the tables."""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from dsline._core import crc32c
from dsline.dataflow.items import Batch, item_text, schema_of
from dsline.dataflow.npy_files import raw_bytes
from dsline.dataflow.operator import Schema
from dsline.dtypes import decode_dtype, encode_dtype
from dsline.errors import SerializationError
from dsline.objects import OUT_OF_BAND_BYTES, extra_reducers

__all__ = [
    "ALIGNMENT",
    "ARRAY",
    "BYTES",
    "COLUMNS",
    "END",
    "HEADER_BYTES",
    "MOST_BYTES",
    "OBJECT",
    "RECORD_MAGIC",
    "Encoded",
    "Header",
    "LogRecord",
    "body_sum",
    "encode",
    "joined",
    "pack",
    "pack_header",
    "parts_of",
    "read_header",
    "record_size",
    "unpack",
]

Array: TypeAlias = np.ndarray[Any, Any]

BYTES, ARRAY, OBJECT, COLUMNS, END = 0, 1, 2, 3, 16  # kinds of records
HEADER_BYTES: Final = 64
ALIGNMENT: Final = 16  # of records, and of the payloads of small ones
MOST_BYTES: Final = 1 << 46
RECORD_MAGIC: Final = b"DSLR"
_WIDE_ALIGNMENT: Final = 64  # of arrays from OUT_OF_BAND_BYTES on
_MOST_PARTS: Final = 1 << 20
_RECORD: Final = struct.Struct("<4sBBHQqQIIQQII")
# Bytes, type, Fortran order, dimensions, 0, lengths of name and code, 0.
_PART: Final = struct.Struct("<QBBBBHHI")
_WORD: Final = struct.Struct("<I")


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to


class _Part(NamedTuple):
    """A piece of a payload: an array, or bytes."""

    offset: int
    nbytes: int
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...]
    fortran: bool
    name: str


class Encoded(NamedTuple):
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


@lru_cache(maxsize=512)
def _describe_alone(code: bytes, shape: tuple[int, ...], fortran: bool, nbytes: int) -> bytes:
    """The description of an item of one part."""
    return _WORD.pack(1) + _describe_part(code, shape, fortran, nbytes, b"")


def _alone(kind: int, description: bytes, data: memoryview) -> Encoded:
    size = data.nbytes
    return Encoded(
        kind, description, [data], size, _WIDE_ALIGNMENT if size >= OUT_OF_BAND_BYTES else ALIGNMENT
    )


def joined(kind: int, described: list[bytes], buffers: list[memoryview]) -> Encoded:
    alignment = _WIDE_ALIGNMENT if any(each.nbytes >= OUT_OF_BAND_BYTES for each in buffers) else ALIGNMENT
    pieces: list[Any] = []
    size = 0
    for each in buffers:
        gap = _aligned(size, alignment) - size
        if gap:
            pieces.append(bytes(gap))
        pieces.append(each)
        size += gap + each.nbytes
    return Encoded(kind, _WORD.pack(len(described)) + b"".join(described), pieces, size, alignment)


def encode(item: Any) -> Encoded:
    if isinstance(item, np.ndarray) and not item.dtype.hasobject and not isinstance(item, np.ma.MaskedArray):
        fortran = item.flags.f_contiguous and not item.flags.c_contiguous
        data = raw_bytes(item.T if fortran else item)
        return _alone(
            ARRAY, _describe_alone(encode_dtype(item.dtype), item.shape, fortran, data.nbytes), data
        )
    if isinstance(item, Batch):
        columns = [raw_bytes(column) for column in item.values()]
        described = [
            _describe_array(column.dtype, column.shape, False, data.nbytes, name.encode())
            for (name, column), data in zip(item.items(), columns, strict=True)
        ]
        return joined(COLUMNS, described, columns)
    if isinstance(item, bytes | bytearray | memoryview):
        data = memoryview(item).cast("B") if memoryview(item).c_contiguous else memoryview(bytes(item))
        return _alone(BYTES, _describe_alone(b"", (), False, data.nbytes), data)
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


def _encode_object(item: Any) -> Encoded:
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
    pieces = [memoryview(stream.getvalue()), *buffers]
    return joined(OBJECT, [_describe_part(b"", (), False, each.nbytes, b"") for each in pieces], pieces)


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
        return pickle.loads(data) if objects else _load_plain(data)
    except SerializationError:
        raise
    except Exception as error:
        raise SerializationError(f"an object cannot be unpickled: {type(error).__name__}: {error}") from error


# What unpickling of plain data may call. None of it runs code that a file chose, or takes more memory than its arguments:
# so no set(range(n)) and no bytearray(n). Pickle has opcodes of its own for sets and bytearrays.
_PLAIN: Final = {
    "builtins": ("complex",),
    "collections": ("OrderedDict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
    "uuid": ("UUID",),
    "dsline.dataflow.records": ("_array", "_scalar"),
    "dsline.dataflow.items": ("_batch",),
}
_LONG_BINPUT, _PUT, _STOP = b"rp."
_TWO_LINES: Final = b"ci"


@lru_cache(maxsize=1)
def _widths() -> tuple[int | None, ...]:
    """By opcode: bytes of its argument, or a negative number as pickletools has it; None for no opcode."""
    import pickletools

    found: list[int | None] = [None] * 256
    for opcode in pickletools.opcodes:
        found[ord(opcode.code)] = 0 if opcode.arg is None else opcode.arg.n
    return tuple(found)


def _check_memo(stream: bytes) -> None:
    """Refuse numbers of the memo that no pickle of this length has: the unpickler makes a table that large.

    Raises
    ------
    SerializationError
        There is one.
    """
    if b"r" not in stream and b"p" not in stream:
        return
    widths, size, at = _widths(), len(stream), 0
    counted = {-2: 1, -3: 4, -4: 4, -5: 8}
    while at < size:
        code = stream[at]
        width = widths[code]
        at += 1
        if width is None or code == _STOP:
            return  # here the unpickler ends, one way or the other
        if width >= 0:
            number = int.from_bytes(stream[at : at + 4], "little") if code == _LONG_BINPUT else 0
            at += width
        elif width == -1:
            end = stream.find(b"\n", at)
            text = stream[at:end]
            number = int(text) if code == _PUT and text.isdigit() and len(text) < 20 else 0
            if code in _TWO_LINES:
                end = stream.find(b"\n", end + 1)
            if end < 0:
                return
            at = end + 1
        else:
            number, lead = 0, counted[width]
            at += lead + int.from_bytes(stream[at : at + lead], "little")
        if number > size:
            raise SerializationError("an object is a pickle with a memo that no pickler makes")


def _load_plain(stream: Any, buffers: Sequence[Any] = ()) -> Any:
    data = bytes(stream)
    _check_memo(data)
    return _PlainUnpickler(io.BytesIO(data), buffers=buffers).load()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        raise SerializationError(
            f"a record holds an object that needs {module}.{name}; reading it runs code that the file chooses, so it takes "
            "objects=True, for logs that are trusted like programs"
        )


@lru_cache(maxsize=512)
def parts_of(description: bytes) -> tuple[int, tuple[_Part, ...]]:
    """Read a description. Returns alignment and parts; ValueError where it is malformed."""
    (count,) = _WORD.unpack_from(description)
    if count > _MOST_PARTS:
        raise ValueError(f"{count} parts")
    at = _WORD.size
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
            or nbytes > MOST_BYTES
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
    alignment = _WIDE_ALIGNMENT if any(size >= OUT_OF_BAND_BYTES for size in sizes) else ALIGNMENT
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
    return _load_plain(stream, buffers)


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


class Header(NamedTuple):
    """A record's header, checked as far as it can be by itself."""

    kind: int
    sequence: int
    timestamp_ns: int
    payload_bytes: int
    payload_offset: int
    body_crc: int
    record_bytes: int
    description_bytes: int


def pack_header(header: Header) -> bytes:
    """Return the 64 bytes of a header."""
    kind, sequence, moment, payload, offset, body_crc, size, description = header
    head = _RECORD.pack(
        RECORD_MAGIC, kind, 0, 0, sequence, moment, payload, offset, body_crc, size, 0, description, 0
    )[:60]
    return head + _WORD.pack(crc32c(head))


def read_header(raw: bytes) -> Header | None:
    """Return the header in 64 bytes; None where they are none."""
    magic, kind, flags, zero, sequence, moment, payload, offset, body_crc, size, zeros, description, crc = (
        _RECORD.unpack(raw)
    )
    if magic != RECORD_MAGIC or crc != crc32c(raw[:60]) or flags or zero or zeros:
        return None
    if (
        size > MOST_BYTES
        or size % ALIGNMENT
        or offset + payload > size
        or HEADER_BYTES + description > offset
    ):
        return None
    return Header(kind, sequence, moment, payload, offset, body_crc, size, description)


def record_size(at: int, described: int, nbytes: int, alignment: int) -> tuple[int, int]:
    """Offset of the payload in a record that begins at `at`, and the length of the record."""
    offset = -(-(at + HEADER_BYTES + described) // alignment) * alignment - at
    return offset, -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT


def body_sum(window: memoryview, at: int, header: Header) -> int:
    first = at + HEADER_BYTES
    crc = crc32c(window[first : first + header.description_bytes])
    first = at + header.payload_offset
    return int(crc32c(window[first : first + header.payload_bytes], crc))


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
        self, header: Header, parts: Sequence[_Part], buffer: Any, start: int, objects: bool
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
