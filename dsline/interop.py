"""Arrays and tables of other packages, none of which has to be installed.

What `send` takes beside NumPy arrays, masked arrays, and Arrow tables. Packages are imported at first use only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, Final, TypeAlias

import numpy as np

from dsline.errors import (
    FeatureUnavailableError,
    InvalidArgumentError,
    MessageTooLargeError,
    SerializationError,
)

__all__ = ["ARROW"]

DType: TypeAlias = np.dtype[Any]
Array: TypeAlias = np.ndarray[Any, Any]

ARROW: Final = "arrow"
"""Encoding of a message that holds an Arrow IPC stream."""

# Device types of DLPack whose memory this processor can read: CPU, and what CUDA and ROCm have pinned or manage for both.
_HOST_DEVICES: Final = (1, 3, 11, 13)
_ARRAY_ATTRIBUTES: Final = ("__array_interface__", "__array_struct__", "__array__")
_TABLE_ATTRIBUTES: Final = ("__arrow_c_stream__", "__arrow_c_array__", "__dataframe__")


# --- arrays of other packages -------------------------------------------------------------------------------------------


def as_array(data: Any) -> Array | None:
    """The NumPy array over the memory of another package's array; None where `data` is no array.

    Raises
    ------
    TypeError
        It is one that NumPy cannot look at: on another device, of a dtype that NumPy does not have, sparse, recording
        gradients; or a table.
    """
    cls = type(data)
    has_dlpack = hasattr(cls, "__dlpack__") and hasattr(cls, "__dlpack_device__")
    has_array = any(hasattr(cls, name) for name in _ARRAY_ATTRIBUTES)
    if isinstance(data, type) or not (has_dlpack or has_array):
        return None
    if any(hasattr(cls, name) for name in _TABLE_ATTRIBUTES):
        raise TypeError(
            f"cannot send {_name(data)} as an array: what is in it beside the values would be lost; use send_arrow() for "
            "record batches, tables and data frames, send_object() for anything, or numpy.asarray() for the values alone"
        )
    if has_dlpack:
        _refuse_other_devices(data)
        try:
            return np.from_dlpack(data)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            if not has_array:
                raise _unreadable(data, error) from error
    try:
        array = np.asarray(data)
    except Exception as error:
        raise _unreadable(data, error) from error
    return array


def _refuse_other_devices(data: Any) -> None:
    try:
        device, number = data.__dlpack_device__()
    except Exception as error:
        raise _unreadable(data, error) from error
    if int(device) not in _HOST_DEVICES:
        where = getattr(data, "device", f"DLPack device {int(device)}:{number}")
        raise TypeError(
            f"cannot send {_name(data)}: its memory is on {where}, and a channel is in the memory of the host; copy it "
            "there first (tensor.cpu(), cupy.asnumpy(array), jax.device_get(array))"
        )


def _unreadable(data: Any, error: Exception) -> TypeError:
    dtype = str(getattr(data, "dtype", ""))
    if getattr(data, "requires_grad", False):
        way = "send tensor.detach()"
    elif "bfloat16" in dtype or "float8" in dtype:
        width = "uint16 or int16" if "bfloat16" in dtype else "uint8"
        way = f"NumPy has no {dtype}: send its bits, tensor.view({width}), and view them back, or use send_object()"
    else:
        way = "turn it into a dense array in host memory, or use send_object()"
    return TypeError(f"cannot send {_name(data)} as an array ({error}); {way}")


def _name(data: Any) -> str:
    cls = type(data)
    return f"a {cls.__module__.partition('.')[0]}.{cls.__qualname__}"


# --- masked arrays ------------------------------------------------------------------------------------------------------
#
# A masked array travels as one structure: its data, its mask if it has one, and its fill value. The title of the first
# field says so; it is part of the dtype, so nothing else has to.

_MASKED: Final = "numpy.ma"


def masked_dtype(dtype: DType, shape: tuple[int, ...], has_mask: bool) -> DType:
    """The structure in which a masked array travels."""
    if dtype.names is None:
        return _masked_dtype(dtype, shape, has_mask)
    # Its fields can be renamed in place, so the structure gets a copy, and is not kept.
    return _masked_dtype.__wrapped__(dtype.newbyteorder("|"), shape, has_mask)


@lru_cache(maxsize=64)
def _masked_dtype(dtype: DType, shape: tuple[int, ...], has_mask: bool) -> DType:
    names = ["data", "mask", "fill"] if has_mask else ["data", "fill"]
    formats: list[Any] = [(dtype, shape), dtype]
    titles: list[str | None] = [_MASKED, None]
    if has_mask:
        formats.insert(1, (np.ma.make_mask_descr(dtype), shape))
        titles.insert(1, None)
    size = int(np.prod(shape, dtype=object)) * (dtype.itemsize + has_mask) + dtype.itemsize
    try:
        made: DType = np.dtype({"names": names, "formats": formats, "titles": titles}, align=True)
    except (ValueError, TypeError) as error:
        raise MessageTooLargeError(
            f"a masked array of {size} bytes with {len(shape)} dimensions is more than one message holds (2 GiB, 32 "
            "dimensions); send its data and its mask one after the other"
        ) from error
    return made


def split_masked(array: Any) -> tuple[DType, list[Array]]:
    """The structure of a masked array, and the values of its fields."""
    data, mask = np.ma.getdata(array, subok=False), np.ma.getmask(array)
    has_mask = mask is not np.ma.nomask
    values = [data, np.asarray(array.fill_value, dtype=data.dtype)]
    if has_mask:
        values.insert(1, mask)
    return masked_dtype(data.dtype, data.shape, bool(has_mask)), values


def is_masked(dtype: DType) -> bool:
    """Whether a structure is a masked array."""
    if dtype.names not in (("data", "mask", "fill"), ("data", "fill")):
        return False
    assert dtype.fields is not None
    data, fill = dtype.fields["data"], dtype.fields["fill"]
    if data[2:] != (_MASKED,) or fill[0] != data[0].base:
        return False
    if "mask" not in dtype.names:
        return True
    mask = dtype.fields["mask"][0]
    return bool(mask.shape == data[0].shape and mask.base == np.ma.make_mask_descr(data[0].base))


def join_masked(whole: Array) -> Any:
    """The masked array over a structure, without a copy."""
    assert whole.dtype.names is not None
    mask: Any = whole["mask"] if "mask" in whole.dtype.names else np.ma.nomask
    fill: Any = whole["fill"][()]
    return np.ma.MaskedArray(whole["data"], mask=mask, fill_value=fill, copy=False)


# --- Arrow --------------------------------------------------------------------------------------------------------------


def _installed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def arrow_library(wanted: str | None) -> tuple[str, Any]:
    """The package that reads and writes Arrow: the one that is wanted, else pyarrow, else polars."""
    if wanted not in (None, "pyarrow", "polars"):
        raise InvalidArgumentError(f"library is {wanted!r}, must be 'pyarrow', 'polars' or None")
    for name in (wanted,) if wanted is not None else ("pyarrow", "polars"):
        module = _installed(name)
        if module is not None:
            return name, module
    need = wanted or "pyarrow (or polars)"
    raise FeatureUnavailableError(
        f"Arrow needs {need}, which is not installed: pip install {wanted or 'pyarrow'}"
    )


def arrow_writer(data: Any) -> tuple[int, Callable[[Any], int]]:
    """Bytes of the IPC stream of a record batch, table or data frame, and the function that writes it into a buffer."""
    cls = type(data)
    if isinstance(data, type) or not (
        hasattr(cls, "__arrow_c_stream__") or hasattr(cls, "__arrow_c_array__")
    ):
        raise TypeError(
            f"cannot send {_name(data)} by send_arrow: it has neither __arrow_c_stream__ nor __arrow_c_array__; give a record "
            "batch, a table or a data frame"
        )
    name, module = arrow_library(None)
    return (_pyarrow_writer if name == "pyarrow" else _polars_writer)(module, data)


def _pyarrow_writer(pa: Any, data: Any) -> tuple[int, Callable[[Any], int]]:
    try:
        if hasattr(type(data), "__arrow_c_stream__"):
            table = pa.table(data)  # a stream can be read once, and is needed twice
        else:
            table = pa.Table.from_batches([pa.record_batch(data)])
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise TypeError(
            f"cannot send {_name(data)} by send_arrow: it is no table ({error}); put a single column into one, like "
            "pyarrow.table({'name': column})"
        ) from error

    def write(sink: Any) -> None:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)

    measure = pa.MockOutputStream()
    try:
        write(measure)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SerializationError(f"cannot send {_name(data)} by send_arrow: {error}") from error

    def fill(window: Any) -> int:
        with memoryview(window) as view:
            buffer = pa.py_buffer(view)
            sink = pa.FixedSizeBufferWriter(buffer)
            try:
                write(sink)
                written = int(sink.tell())
            finally:
                sink.close()
                del sink, buffer
        return written

    return int(measure.size()), fill


class _Counter:
    """A file that only counts."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        pass


class _Filler(_Counter):
    """A file in a buffer."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view

    def write(self, data: Any) -> int:
        with memoryview(data).cast("B") as given:
            self._view[self.size : self.size + given.nbytes] = given
            self.size += given.nbytes
            return given.nbytes


def _polars_writer(pl: Any, data: Any) -> tuple[int, Callable[[Any], int]]:
    try:
        frame = data if isinstance(data, pl.DataFrame) else pl.DataFrame(data)
    except Exception as error:
        raise TypeError(f"cannot send {_name(data)} by send_arrow: polars cannot read it: {error}") from error
    measure = _Counter()
    frame.write_ipc_stream(measure)

    def fill(window: Any) -> int:
        with memoryview(window) as view:
            sink = _Filler(view)
            frame.write_ipc_stream(sink)
            sink._view = memoryview(b"")
        return sink.size

    return measure.size, fill


def read_arrow(payload: memoryview, name: str, module: Any) -> Any:
    """The table in an IPC stream: a pyarrow.Table over `payload`, which it keeps alive, or a polars.DataFrame.

    Raises
    ------
    SerializationError
        It is no IPC stream.
    """
    try:
        if name == "polars":
            return module.read_ipc_stream(bytes(payload))
        # One thread: others would have nothing to do, and might let go of the slot a little later.
        options = module.ipc.IpcReadOptions(use_threads=False)
        table = module.ipc.open_stream(module.py_buffer(payload), options=options).read_all()
        table.validate()
    except Exception as error:
        raise SerializationError(
            f"the message is marked as Arrow, and {name} cannot read it: {error}; it is given back: receive it raw with recv()"
        ) from error
    return table
