"""The closed binary code in which dtypes travel: both ways without trusting a string of the peer.

The byte table is in ``docs/design/frame-format.md``; ``frames/dtype_code.hpp`` is its C++ half, and its limits are the
same.
"""

from __future__ import annotations

import struct
import sys
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np

__all__ = ["buffer_format", "decode_dtype", "encode_dtype"]

DType: TypeAlias = np.dtype[Any]

MAX_DEPTH: Final = 16
MAX_FIELDS: Final = 1024
MAX_ITEMSIZE: Final = 2**31 - 1
MAX_SUBARRAY_DIMS: Final = 32

_NODE: Final = struct.Struct("<cBBBI")
_FIELD: Final = struct.Struct("<III")
_COUNT: Final = struct.Struct("<I")
_NO_TITLE: Final = 0xFFFFFFFF
_ALIGNED: Final = 1
_RECORD: Final = 2

_ORDERS: Final = ("|", "<", ">")
_NATIVE: Final = "<" if sys.byteorder == "little" else ">"
_SIZES: Final = {
    "b": (1,),
    "i": (1, 2, 4, 8),
    "u": (1, 2, 4, 8),
    "f": (2, 4, 8, 16),
    "c": (8, 16, 32),
}
_FLEXIBLE: Final = ("S", "U", "V")
_UNITS: Final = ("generic", "Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as")
# NumPy's own types of fixed width have numbers from 0 to below this; those of other packages lie outside.
_FIRST_FOREIGN_NUMBER: Final = 24

_WAY_OUT: Final = (
    "dsline carries fixed-width dtypes only: convert with .astype() to one of them, "
    "or serialise the array to bytes yourself (for instance with pickle) and send those"
)


# Keyed by identity, since equal dtypes may differ in what is encoded: np.dtype("M8[1000ms]") == np.dtype("M8[s]"), and
# alignment flag and np.record do not count either. The value keeps its dtype alive, so a key is never reused, and the
# names that were encoded, since NumPy lets callers rename the fields of a dtype in place.
_codes: dict[int, tuple[DType, tuple[str, ...] | None, bytes]] = {}
_CACHED: Final = 256


def encode_dtype(dtype: DType) -> bytes:
    """Encode a dtype.

    Parameters
    ----------
    dtype : numpy.dtype
        What to encode. Its ``metadata`` is dropped.

    Returns
    -------
    bytes
        The code, from which `decode_dtype` makes an equal dtype with the same field names, titles, offsets, item size,
        alignment flag and byte order.

    Raises
    ------
    TypeError
        If the items have no fixed width (object, ``StringDType``, structures that contain them), if another package
        defined the dtype, or if it is deeper or wider than a message may say.
    """
    cached = _codes.get(id(dtype))
    if cached is not None and cached[0] is dtype and cached[1] is dtype.names:
        return cached[2]
    code = _Encoder(dtype).encode()
    if len(_codes) >= _CACHED:
        _codes.clear()
    _codes[id(dtype)] = (dtype, dtype.names, code)
    return code


class _Encoder:
    """One walk over a dtype; remembers the outermost one for the error messages."""

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype
        self._fields = 0

    def encode(self) -> bytes:
        return self._node(self._dtype, 1)

    def _refuse(self, what: str) -> TypeError:
        text = repr(self._dtype)
        if len(text) > 200:
            text = text[:200] + "..."
        return TypeError(f"cannot send {text}: {what}. {_WAY_OUT}")

    def _node(self, dtype: DType, depth: int) -> bytes:
        if depth > MAX_DEPTH:
            raise self._refuse(f"it is nested deeper than {MAX_DEPTH} levels")
        if dtype.kind == "O":
            raise self._refuse("it holds Python objects")
        if not 0 <= dtype.num < _FIRST_FOREIGN_NUMBER or dtype.kind not in "biufcSUVMm":
            raise self._refuse(f"{dtype} is not a fixed-width dtype of NumPy itself")
        if dtype.itemsize > MAX_ITEMSIZE:
            raise self._refuse(f"its items have {dtype.itemsize} bytes, at most {MAX_ITEMSIZE} are possible")
        if dtype.subdtype is not None:
            return self._subarray(*dtype.subdtype, depth)
        if dtype.names is not None:
            return self._structure(dtype, dtype.names, depth)
        kind = dtype.kind
        order = _ORDERS.index(_NATIVE if dtype.byteorder == "=" else dtype.byteorder)
        if kind in "Mm":
            unit, multiple = np.datetime_data(dtype)[:2]
            return _NODE.pack(kind.encode(), order, _UNITS.index(unit), 0, multiple)
        if kind not in _FLEXIBLE and dtype.itemsize not in _SIZES[kind]:
            raise self._refuse(f"{dtype} has {dtype.itemsize} bytes on this machine")
        if kind == "V" and dtype.type is not np.void:
            raise self._refuse(f"its scalars are {dtype.type.__module__}.{dtype.type.__qualname__}")
        return _NODE.pack(kind.encode(), order, 0, 0, dtype.itemsize)

    def _subarray(self, base: DType, shape: tuple[int, ...], depth: int) -> bytes:
        if len(shape) > MAX_SUBARRAY_DIMS:
            raise self._refuse(
                f"a subarray has {len(shape)} dimensions, at most {MAX_SUBARRAY_DIMS} are possible"
            )
        node = _NODE.pack(b"a", 0, len(shape), 0, 0)
        return node + struct.pack(f"<{len(shape)}I", *shape) + self._node(base, depth + 1)

    def _structure(self, dtype: DType, names: tuple[str, ...], depth: int) -> bytes:
        if dtype.type is not np.void and dtype.type is not np.record:
            raise self._refuse(f"its scalars are {dtype.type.__module__}.{dtype.type.__qualname__}")
        self._fields += len(names)
        if self._fields > MAX_FIELDS:
            raise self._refuse(f"it has more than {MAX_FIELDS} fields")
        detail = (_ALIGNED if dtype.isalignedstruct else 0) | (_RECORD if dtype.type is np.record else 0)
        parts = [_NODE.pack(b"r", 0, detail, 0, dtype.itemsize), _COUNT.pack(len(names))]
        assert dtype.fields is not None
        for name in names:
            base, offset, *rest = dtype.fields[name]
            title = rest[0] if rest else None
            if title is not None and not isinstance(title, str):
                raise self._refuse(f"the title of field {name!r} is a {type(title).__name__}, must be a str")
            try:
                name_bytes = name.encode()
                title_bytes = None if title is None else title.encode()
            except UnicodeEncodeError as error:
                raise self._refuse(f"the name or title of field {name!r} is not valid Unicode") from error
            parts.append(
                _FIELD.pack(offset, len(name_bytes), _NO_TITLE if title_bytes is None else len(title_bytes))
                + name_bytes
                + (title_bytes or b"")
            )
            parts.append(self._node(base, depth + 1))
        return b"".join(parts)


def decode_dtype(code: bytes) -> DType:
    """Decode what `encode_dtype` made.

    Parameters
    ----------
    code : bytes
        The code. It may come from a peer: nothing of it but field names and titles becomes a string.

    Returns
    -------
    numpy.dtype
        The dtype. A structure is the caller's own, whose fields may be renamed in place.

    Raises
    ------
    ValueError
        If `code` is not exactly one dtype.
    """
    dtype = _decode(code)
    # newbyteorder("|") changes no byte order: it is NumPy's way to copy a dtype with all that is in it.
    return dtype if dtype.names is None else dtype.newbyteorder("|")


@lru_cache(maxsize=_CACHED)
def _decode(code: bytes) -> DType:
    decoder = _Decoder(code)
    try:
        dtype = decoder.node(1)
    except (struct.error, UnicodeDecodeError, IndexError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(f"malformed dtype code: {error}") from error
    if decoder.at != len(code):
        raise ValueError(f"malformed dtype code: {len(code) - decoder.at} bytes too many")
    return dtype


class _Decoder:
    """Reads nodes from the front of a code; `at` is where the next one starts."""

    def __init__(self, code: bytes) -> None:
        self._code = code
        self._fields = 0
        self.at = 0

    def _take(self, layout: struct.Struct) -> tuple[Any, ...]:
        values = layout.unpack_from(self._code, self.at)
        self.at += layout.size
        return values

    def _take_text(self, size: int) -> str:
        if size > len(self._code) - self.at:
            raise ValueError("malformed dtype code: a name is longer than the code")
        text = self._code[self.at : self.at + size].decode()
        self.at += size
        return text

    def node(self, depth: int) -> DType:
        letter, order, detail, zero, size = self._take(_NODE)
        kind = letter.decode("latin-1")
        if depth > MAX_DEPTH or zero != 0 or size > MAX_ITEMSIZE:
            raise ValueError(f"malformed dtype code: node {kind!r} is past a limit")
        if kind == "a" and order == 0 and size == 0:
            return self._subarray(detail, depth)
        if kind == "r" and order == 0:
            return self._structure(detail, size, depth)
        if kind in ("M", "m") and order in (1, 2) and size >= 1 and (detail > 0 or size == 1):
            span = f"[{size}{_UNITS[detail]}]" if detail > 0 else ""
            return np.dtype(f"{_ORDERS[order]}{kind}8{span}")
        swaps = kind == "U" or (kind in _SIZES and size > 1)
        if detail == 0 and (order in (1, 2) if swaps else order == 0):
            if size in _SIZES.get(kind, ()) or kind in ("S", "V"):
                return np.dtype(f"{_ORDERS[order]}{kind}{size}")
            if kind == "U" and size % 4 == 0:
                return np.dtype(f"{_ORDERS[order]}U{size // 4}")
        raise ValueError(f"malformed dtype code: node {kind!r} with size {size}")

    def _subarray(self, ndim: int, depth: int) -> DType:
        if not 1 <= ndim <= MAX_SUBARRAY_DIMS:
            raise ValueError(f"malformed dtype code: a subarray with {ndim} dimensions")
        shape = self._take(struct.Struct(f"<{ndim}I"))
        base = self.node(depth + 1)
        nonzero = max(base.itemsize, 1)
        for dim in shape:
            nonzero *= max(dim, 1)
        if nonzero > MAX_ITEMSIZE:
            raise ValueError("malformed dtype code: a subarray that is too big")
        return np.dtype((base, shape))

    def _structure(self, detail: int, itemsize: int, depth: int) -> DType:
        (count,) = self._take(_COUNT)
        self._fields += count
        if detail & ~(_ALIGNED | _RECORD) or self._fields > MAX_FIELDS:
            raise ValueError("malformed dtype code: a structure that is past a limit")
        names: list[str] = []
        titles: list[str | None] = []
        offsets: list[int] = []
        formats: list[DType] = []
        for _ in range(count):
            offset, name_size, title_size = self._take(_FIELD)
            names.append(self._take_text(name_size))
            titles.append(None if title_size == _NO_TITLE else self._take_text(title_size))
            formats.append(self.node(depth + 1))
            offsets.append(offset)
            if offset + formats[-1].itemsize > itemsize:
                raise ValueError(f"malformed dtype code: field {names[-1]!r} reaches out of its structure")
        spec = {
            "names": names,
            "formats": formats,
            "offsets": offsets,
            "titles": titles,
            "itemsize": itemsize,
        }
        dtype: DType = np.dtype(spec, align=bool(detail & _ALIGNED))  # type: ignore[call-overload]
        return np.dtype((np.record, dtype)) if detail & _RECORD else dtype


@lru_cache(maxsize=_CACHED)
def buffer_format(dtype: DType) -> bytes | None:
    """Return the format under which NumPy exports arrays of a dtype through the buffer protocol.

    Parameters
    ----------
    dtype : numpy.dtype
        Any dtype of an array.

    Returns
    -------
    bytes or None
        The format, in the syntax of PEP 3118. None where the buffer protocol has none for `dtype` (dates, a long double
        of the other byte order, structures with overlapping fields), or one that NumPy cannot read back.
    """
    if dtype.subdtype is not None:
        return None
    try:
        # np.empty() would make S1 of S0, and of an array without items NumPy gives another format.
        sample: Any = np.ndarray((2,), dtype)
        view = memoryview(sample)
        np.asarray(view)
        return view.format.encode()
    except (ValueError, TypeError, RuntimeError, BufferError):
        return None
