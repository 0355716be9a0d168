"""What the messages of a typed channel are: `ArraySpec`, and records as dicts of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np

from dsline import dtypes
from dsline.errors import InvalidArgumentError, SchemaMismatchError

__all__ = ["ArraySpec", "Spec"]

DType: TypeAlias = np.dtype[Any]

MAX_DIMS: Final = 64
_LONGEST_TEXT: Final = 300


class ArraySpec:
    """Shape, dtype and order of an array: what every message of a typed channel has to be.

    Parameters
    ----------
    shape : int or tuple of (int or None)
        None stands for any length of that axis.
    dtype : dtype-like
        A dtype of fixed width, as for `ShmChannel.send`.
    order : str
        "C" or "F": how the array lies in the message. An array in another order is put into this one by the copy that
        `send` makes anyway.

    Raises
    ------
    InvalidArgumentError
        A negative or too large dimension, an unknown order, a dtype without a width.
    TypeError
        A dtype that cannot be sent (Python objects, variable width).

    Notes
    -----
    Immutable and hashable. Two are equal if every array that fits one fits the other and arrives as the same: dtypes are
    compared with field names, offsets, titles and byte order. With fewer than two dimensions the order is always "C".

    Examples
    --------
    >>> import dsline
    >>> frame = dsline.ArraySpec((480, 640, 3), "u1")
    >>> frame
    ArraySpec((480, 640, 3), 'uint8')
    >>> frame.nbytes
    921600
    >>> dsline.ArraySpec((None, 3), "f4").nbytes is None
    True
    """

    __slots__ = ("_code", "_dtype", "_order", "_shape")
    _shape: tuple[int | None, ...]
    _dtype: DType
    _order: str
    _code: bytes

    def __init__(self, shape: Any, dtype: Any, order: str = "C") -> None:
        if order not in ("C", "F"):
            raise InvalidArgumentError(f"order is {order!r}, must be 'C' or 'F'")
        given = np.dtype(dtype)
        dims = _dims(shape)
        if given.subdtype is not None:  # as NumPy does when it makes an array of such a dtype
            dims += given.shape
            given = given.base
        if len(dims) > MAX_DIMS:
            raise InvalidArgumentError(f"shape has {len(dims)} dimensions, at most {MAX_DIMS} are possible")
        if given.itemsize == 0 and given.kind in "SU":
            raise InvalidArgumentError(
                f"dtype {given!r} has no width; say how long its items are, like 'S16'"
            )
        code = dtypes.encode_dtype(given)
        # A dtype's fields can be renamed in place, so the spec has a structure of its own.
        own: DType = dtypes.decode_dtype(code)
        known = max(1, own.itemsize)
        for dim in dims:
            known *= max(1, dim or 1)
        if known > np.iinfo(np.int64).max:
            raise InvalidArgumentError(
                f"an array of shape {shape!r} and dtype {given} is larger than any memory"
            )
        object.__setattr__(self, "_shape", dims)
        object.__setattr__(self, "_dtype", own)
        object.__setattr__(self, "_order", order if len(dims) > 1 else "C")
        object.__setattr__(self, "_code", code)

    @classmethod
    def of(cls, array: Any) -> ArraySpec:
        """Return the spec that `array` fits: its shape, dtype, and order ("C" unless it is in Fortran order)."""
        if not isinstance(array, np.ndarray | np.generic):
            raise TypeError(f"ArraySpec.of takes an array, not a {type(array).__name__}; use numpy.asarray")
        fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        return cls(array.shape, array.dtype, "F" if fortran else "C")

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The dimensions; None where any length will do."""
        return self._shape

    @property
    def dtype(self) -> DType:
        """The dtype."""
        return self._dtype

    @property
    def order(self) -> str:
        """The order in which the elements lie: "C" or "F"."""
        return self._order

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self._shape)

    @property
    def nbytes(self) -> int | None:
        """Bytes of such an array; None where a dimension is open."""
        size = self._dtype.itemsize
        for dim in self._shape:
            if dim is None:
                return None
            size *= dim
        return size

    def matches(self, array: np.ndarray[Any, Any]) -> bool:
        """Whether `send` on a channel with this spec would take `array`."""
        return (
            array.ndim == self.ndim
            and all(want is None or want == has for want, has in zip(self._shape, array.shape, strict=True))
            and bool(array.dtype == self._dtype)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"an ArraySpec cannot be changed; make another one instead of setting {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("an ArraySpec cannot be changed")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ArraySpec):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self._shape, self._code, self._order

    def __repr__(self) -> str:
        order = "" if self._order == "C" else ", order='F'"
        return f"ArraySpec({self._shape}, {dtype_text(self._dtype)}{order})"

    def __reduce__(self) -> Any:
        return ArraySpec, (self._shape, self._dtype, self._order)


Spec: TypeAlias = ArraySpec | Mapping[str, ArraySpec]


def _dims(shape: Any) -> tuple[int | None, ...]:
    try:
        items = tuple(shape)
    except TypeError:
        items = (shape,)
    dims: list[int | None] = []
    for item in items:
        if item is None:
            dims.append(None)
            continue
        try:
            dim = item.__index__()
        except (AttributeError, TypeError):
            raise TypeError(f"shape holds {item!r}, must be ints, or None for any length") from None
        if not 0 <= dim <= np.iinfo(np.int64).max:
            raise InvalidArgumentError(f"shape holds {dim}, must be 0 or more, or None for any length")
        dims.append(int(dim))
    return tuple(dims)


def dtype_text(dtype: DType) -> str:
    """A dtype as one would write it."""
    if dtype.names is None:
        try:
            if np.dtype(dtype.name) == dtype:
                return repr(dtype.name)
        except TypeError:
            pass
        return repr(dtype.str)
    return repr(dtype)


def spec_text(spec: Spec | None) -> str:
    """A spec for error messages."""
    if spec is None:
        return "no spec (messages of any kind)"
    text = repr(spec if isinstance(spec, ArraySpec) else dict(spec))
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."


def array_text(array: np.ndarray[Any, Any]) -> str:
    """What an array is, for error messages."""
    text = f"{dtype_text(array.dtype)} {array.shape}"
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."


def record_dtype(fields: Mapping[Any, Any]) -> DType:
    """The dtype of a record: one aligned structure, with a subarray for each field that has dimensions.

    Raises
    ------
    InvalidArgumentError
        No fields, a name that is no str or empty, an open dimension, Fortran order, more than 2 GiB.
    TypeError
        A value that is no ArraySpec.
    """
    if not fields:
        raise InvalidArgumentError("spec is an empty dict, must have a field at least")
    for name, spec in fields.items():
        if not isinstance(name, str) or not name:
            raise InvalidArgumentError(
                f"spec has the field name {name!r}, must be a str of one character or more"
            )
        if not isinstance(spec, ArraySpec):
            raise TypeError(f"spec[{name!r}] is a {type(spec).__name__}, must be an ArraySpec")
        if None in spec.shape:
            raise InvalidArgumentError(
                f"spec[{name!r}] is {spec}: the fields of a record have places that are the same in every message, so "
                "none may have an open dimension; give its largest length, or send it on a channel of its own"
            )
        if spec.order != "C":
            raise InvalidArgumentError(f"spec[{name!r}] is {spec}: the fields of a record are in C order")
    try:
        dtype = np.dtype([(name, spec.dtype, spec.shape) for name, spec in fields.items()], align=True)
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"NumPy has no structure for spec {spec_text(fields)}: {error}") from error
    return dtype


def record_spec(dtype: DType) -> dict[str, ArraySpec]:
    """The fields of a record's dtype."""
    assert dtype.names is not None and dtype.fields is not None
    return {name: ArraySpec((), dtype.fields[name][0]) for name in dtype.names}


_KINDS: Final = "biufc"
_SCALARS: Final = (bool, int, float, complex, np.generic)


def value_of_field(name: str, value: Any, dtype: DType, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The array that `value` gives for a field of a record.

    Arrays have to fit exactly. A Python or NumPy scalar for a field without dimensions is converted where nothing but
    precision is lost: no float becomes an int, and no int wraps around.
    """
    if isinstance(value, bytes | str) and shape == () and dtype.kind in "SU":
        return _text_of_field(name, value, dtype)
    if isinstance(value, _SCALARS) and shape == ():
        return scalar_of_field(name, value, dtype)
    if not isinstance(value, np.ndarray):
        raise SchemaMismatchError(
            f"field {name!r} takes {dtype_text(dtype)} {shape}, a {type(value).__name__} was given; "
            f"turn it into an array with numpy.asarray(value, dtype={dtype_text(dtype)}); nothing was sent"
        )
    if value.shape != shape or value.dtype != dtype:
        way = f".astype({dtype_text(dtype)})" if value.shape == shape else ".reshape or another spec"
        raise SchemaMismatchError(
            f"field {name!r} takes {dtype_text(dtype)} {shape}, {array_text(value)} was given; "
            f"use {way}; nothing was sent"
        )
    return value


_FITS: Final = {bool: "biufc", int: "iufc", float: "fc"}  # kinds that hold every such value, but for its size


@lru_cache(maxsize=256)
def _most(dtype: DType) -> tuple[Any, Any]:
    """The smallest and the largest number of a dtype."""
    if dtype.kind in "iu":
        return np.iinfo(dtype).min, np.iinfo(dtype).max
    # As Python's numbers, which can be compared with any int.
    return float(np.finfo(dtype).min), float(np.finfo(dtype).max)


def scalar_of_field(name: str, value: Any, dtype: DType) -> np.ndarray[Any, Any]:
    # The usual ones first: this is done for each field of each record.
    kinds = _FITS.get(type(value))
    if kinds is not None and dtype.kind in kinds:
        if dtype.kind == "b":
            return np.array(value, dtype)
        least, most = _most(dtype)
        if least <= value <= most or value - value != 0:  # infinite, or not a number
            return np.array(value, dtype)
    given = value.dtype if isinstance(value, np.generic) else np.min_scalar_type(value)
    if given == dtype:
        return np.asarray(value, dtype=dtype)
    if given.kind in _KINDS and dtype.kind in _KINDS and _KINDS.index(given.kind) <= _KINDS.index(dtype.kind):
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            if not limits.min <= int(value) <= limits.max:
                raise SchemaMismatchError(
                    f"field {name!r} takes {dtype_text(dtype)}, which goes from {limits.min} to {limits.max}; {value} was "
                    "given; nothing was sent"
                )
        with np.errstate(over="ignore"):
            converted = np.asarray(np.asarray(value).astype(dtype))
        if bool(np.isfinite(converted)) or not bool(np.isfinite(value)):
            return converted
    elif given.kind == "u" and dtype.kind == "i" and int(value) <= np.iinfo(dtype).max:
        return np.asarray(int(value), dtype=dtype)
    raise SchemaMismatchError(
        f"field {name!r} takes {dtype_text(dtype)}, {value!r} was given, which it cannot hold; convert it first; "
        "nothing was sent"
    )


def _text_of_field(name: str, value: bytes | str, dtype: DType) -> np.ndarray[Any, Any]:
    room = dtype.itemsize if dtype.kind == "S" else dtype.itemsize // 4
    if isinstance(value, bytes) != (dtype.kind == "S") or len(value) > room:
        raise SchemaMismatchError(
            f"field {name!r} takes {dtype_text(dtype)}, a {type(value).__name__} of {len(value)} was given; nothing was sent"
        )
    return np.asarray(value, dtype=dtype)
