"""NumPy's .npy and .npz files: mapped for reading, and written row by row so that they can be cut back to a checkpoint."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final, TypeAlias

import numpy as np

from dsline.errors import PipelineBuildError, PipelineRuntimeError

__all__ = ["NpyAppender", "open_npy", "open_npz", "raw_bytes", "zip_parts"]

Array: TypeAlias = np.ndarray[Any, Any]

_LOCAL_HEADER: Final = struct.Struct(
    "<4s22xHH"
)  # of a zip member: magic, then the lengths of its name and extra field
_MOST_ROWS: Final = 10**18
_BUFFER_BYTES: Final = 1 << 20


def raw_bytes(array: Array) -> memoryview:
    """The bytes of an array in C order; a copy only where it lies otherwise."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.itemsize == 0 or flat.size == 0:
        return memoryview(b"")
    # By way of bytes: the buffer protocol has no format for dates and for some structures.
    data: Any = flat.view(np.uint8)
    return memoryview(data)


def open_npy(path: str | os.PathLike[str]) -> Array:
    """Map a .npy file, read-only and without reading it.

    Raises
    ------
    PipelineBuildError
        It is not there, cannot be read, is damaged, or holds Python objects.
    """
    array: Array = _opened(path, _map_npy)
    return array


def open_npz(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Return the arrays of a .npz file by name: mapped where they are stored, read where they are compressed.

    Raises
    ------
    PipelineBuildError
        As for `open_npy`.
    """
    arrays: dict[str, Array] = _opened(path, _map_npz)
    return arrays


def _opened(path: str | os.PathLike[str], read: Callable[[str], Any]) -> Any:
    text = os.fspath(path)
    try:
        return read(text)
    except FileNotFoundError:
        raise PipelineBuildError(f"there is no file {text!r}") from None
    except OSError as error:
        raise PipelineBuildError(f"file {text!r} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise PipelineBuildError(f"file {text!r} says that it holds more than fits into memory") from error
    except Exception as error:  # NumPy parses headers as Python, and raises whatever comes of it
        raise PipelineBuildError(
            f"file {text!r} cannot be read: {error}. It must be one that numpy.save or numpy.savez wrote, without "
            "Python objects"
        ) from error


def _map_npy(path: str) -> Array:
    with open(path, "rb") as file:
        return _mapped(path, file)


def _mapped(path: str, file: IO[bytes]) -> Array:
    """Map the array whose header `file` stands before."""
    version = np.lib.format.read_magic(file)
    reader = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
        (3, 0): np.lib.format.read_array_header_2_0,  # the same but for the encoding of names
    }.get(version)
    if reader is None:
        raise ValueError(f"format {version[0]}.{version[1]} is not known")
    shape, fortran, dtype = _header_utf8(file) if version == (3, 0) else reader(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    count = 1
    for dim in shape:
        if dim < 0:
            raise ValueError(f"shape {shape} is none")
        count *= dim
    offset = file.tell()
    if count * dtype.itemsize > os.fstat(file.fileno()).st_size - offset:
        raise ValueError("it is shorter than its header says")
    order: Any = "F" if fortran else "C"
    if count * dtype.itemsize == 0:
        empty = np.zeros(shape, dtype, order=order)
        empty.flags.writeable = False
        return empty
    return np.asarray(np.memmap(path, dtype, "r", offset, shape, order))


def _header_utf8(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    import ast

    (size,) = struct.unpack("<I", file.read(4))
    if size > 1 << 20:
        raise ValueError("its header is longer than a MiB")
    fields = ast.literal_eval(file.read(size).decode("utf-8"))
    return fields["shape"], bool(fields["fortran_order"]), np.lib.format.descr_to_dtype(fields["descr"])


def _map_npz(path: str) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            name = info.filename.removesuffix(".npy")
            if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
                arrays[name] = _map_member(path, file, info)
            else:
                with archive.open(info) as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                arrays[name].flags.writeable = False
    return arrays


def _map_member(path: str, file: IO[bytes], info: zipfile.ZipInfo) -> Array:
    file.seek(info.header_offset)
    magic, name_size, extra_size = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != b"PK\x03\x04":
        raise ValueError(f"member {info.filename!r} has no header")
    start = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    file.seek(start)
    array = _mapped(path, file)
    if file.tell() - start + array.nbytes > info.file_size:
        raise ValueError(f"member {info.filename!r} is shorter than its header says")
    return array


class NpyAppender:
    """A .npy file that grows by rows.

    Parameters
    ----------
    path : str
        Replaced at the first row, unless `restore` was called before.

    Notes
    -----
    The header says how many rows there are as of the last `flush`; what a killed process wrote behind them is not seen by
    readers and goes with `restore`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._dtype: np.dtype[Any] | None = None
        self._row: tuple[int, ...] = ()
        self._header_bytes = 0
        self.rows = 0

    def append(self, rows: Array) -> None:
        """Write an array whose first axis counts rows."""
        if self._file is None:
            self._create(rows.dtype, rows.shape[1:])
        if rows.dtype != self._dtype or rows.shape[1:] != self._row:
            raise PipelineRuntimeError(
                f"file {self._path!r} holds rows of {self._dtype} {self._row}, and {rows.dtype} {rows.shape[1:]} came; "
                "a .npy file has one dtype and one shape: append='rows' puts arrays one behind the other, a log (file://) takes any"
            )
        assert self._file is not None
        self._file.write(raw_bytes(rows))
        self.rows += len(rows)

    def flush(self) -> None:
        """Write through to the disk, with a header that counts all rows."""
        if self._file is None:
            return
        self._file.flush()
        os.fdatasync(self._file.fileno())  # the rows before the header that counts them
        os.pwrite(self._file.fileno(), self._header(self.rows), 0)
        os.fdatasync(self._file.fileno())

    def restore(self, rows: int) -> None:
        """Go on behind the first `rows` rows of the file that is there."""
        if rows == 0:
            return  # replaced at the first row
        array = open_npy(self._path)
        self._dtype, self._row = array.dtype, array.shape[1:]
        size = os.path.getsize(self._path)
        row_bytes = self._dtype.itemsize * int(np.prod(self._row, dtype=np.int64))
        self._header_bytes = len(self._header(0))
        if not self._matches(array) or size < self._header_bytes + rows * row_bytes:
            raise PipelineRuntimeError(
                f"file {self._path!r} is not the one of the checkpoint: it has {len(array)} rows of {self._dtype} "
                f"{self._row}, the checkpoint counts {rows}"
            )
        self._file = open(self._path, "r+b", _BUFFER_BYTES)  # noqa: SIM115
        self._file.truncate(self._header_bytes + rows * row_bytes)
        self._file.seek(0, os.SEEK_END)
        self.rows = rows
        self.flush()

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _matches(self, array: Array) -> bool:
        """Whether the file has a header as this class writes it, which can be written anew in place."""
        with open(self._path, "rb") as file:
            return file.read(self._header_bytes) == self._header(len(array))

    def _create(self, dtype: np.dtype[Any], row: tuple[int, ...]) -> None:
        if dtype.hasobject:
            raise PipelineRuntimeError(
                f"{dtype} holds Python objects, which a .npy file cannot without pickle"
            )
        self._dtype, self._row, self.rows = dtype, row, 0
        header = self._header(0)
        self._header_bytes = len(header)
        self._file = open(self._path, "w+b", _BUFFER_BYTES)  # noqa: SIM115
        self._file.write(header)

    def _header(self, rows: int) -> bytes:
        """The header of NumPy's format, as long for any number of rows."""
        assert self._dtype is not None
        descr = np.lib.format.dtype_to_descr(self._dtype)
        text, longest = (
            f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {(count, *self._row)!r}, }}"
            for count in (rows, _MOST_ROWS)
        )
        encoding = "latin1" if text.isascii() else "utf-8"
        body = text.encode(encoding)
        room = len(longest.encode(encoding)) + 1
        small = room < 1 << 15 and encoding == "latin1"
        version = b"\1\0" if small else b"\2\0" if encoding == "latin1" else b"\3\0"
        lead = 8 + (2 if small else 4)
        size = -(-(lead + room) // 64) * 64 - lead
        return (
            b"\x93NUMPY" + version + struct.pack("<H" if small else "<I", size) + body.ljust(size - 1) + b"\n"
        )


def zip_parts(target: str, parts: Mapping[str, str]) -> None:
    """Put .npy files into a .npz file, uncompressed; the file is replaced at once when all is in it."""
    temporary = f"{target}.tmp"
    with open(temporary, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, part in parts.items():
                archive.write(part, f"{name}.npy")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    sync_folder(Path(target).parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
