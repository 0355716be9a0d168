"""The one file to run: that the package is whole and does its job. Also the check of a wheel, and of the oldest NumPy."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dsline
from dsline import _core
from dsline.testing import unique_name

RECEIVER = """
import sys
import dsline
import numpy as np

with dsline.ShmChannel.open(sys.argv[1], timeout=30) as inbox, dsline.ShmChannel.open(sys.argv[2]) as outbox:
    for view in inbox:
        outbox.send(np.asarray(view) * 2)
"""


def test_the_public_names_are_there():
    assert all(hasattr(dsline, name) for name in dsline.__all__)
    assert {"ShmChannel", "FileChannel", "Message", "Backpressure", "Checksum", "Storage"} <= set(
        dsline.__all__
    )


def test_version_and_build():
    assert dsline.__version__.count(".") == 2
    build = dsline.build_config()
    assert build["version"] == dsline.__version__
    assert build["crc32c"] in ("sse4.2", "armv8", "table")


def test_headers_and_declarations_are_installed():
    assert (Path(dsline.get_include()) / "dsline" / "channel.hpp").is_file()
    package = Path(dsline.__file__).parent
    assert (package / "_core.pxd").is_file()
    assert (package / "_cpp" / "channel.pxd").is_file()
    assert (package / "py.typed").is_file()


def test_bytes_come_back(make_any):
    channel = make_any(capacity=2, slot_size=64)
    assert channel.send(b"hello") is True
    view = channel.recv(timeout=0)
    assert (view.tobytes(), view.readonly, view.format, view.ndim) == (b"hello", True, "B", 1)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int16).reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(20)[::3],
        np.array(3 + 4j),
        np.empty((0, 5), np.float16),
        np.array([True, False]),
        np.array(["2020-01-01", "NaT"], "M8[D]"),
        np.array([(1, b"x")], [("a", "<i4"), ("b", "S3")]),
    ],
    ids=lambda array: f"{array.dtype.str}-{array.shape}",
)
def test_arrays_come_back(make_any, array):
    channel = make_any(capacity=2, slot_size=256)
    channel.send(array)
    got = channel.recv_array(timeout=0)
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    assert not got.flags.writeable
    np.testing.assert_array_equal(got, array)


def test_a_received_view_is_the_array(make_any):
    channel = make_any(capacity=2, slot_size=64)
    channel.send(np.arange(6, dtype=np.float32).reshape(2, 3))
    got = np.asarray(channel.recv(timeout=0))
    assert (got.dtype, got.shape) == (np.dtype(np.float32), (2, 3))
    np.testing.assert_array_equal(got, [[0, 1, 2], [3, 4, 5]])


def test_a_message_larger_than_its_slot_just_works(make_any):
    channel = make_any(capacity=2, slot_size=64)
    array = np.arange(100_000)
    channel.send(array)
    np.testing.assert_array_equal(channel.recv_array(timeout=0), array)


def test_two_processes_exchange_arrays():
    there, back = unique_name(), unique_name()
    with dsline.ShmChannel(there, capacity=4) as outbox, dsline.ShmChannel(back, capacity=4) as inbox:
        command = [sys.executable, "-c", RECEIVER, there, back]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                for number in range(20):
                    array = np.full((4, number), number)
                    outbox.send(array, timeout=30)
                    np.testing.assert_array_equal(inbox.recv_array(timeout=30), array * 2)
                outbox.shutdown()
                assert process.wait(30) == 0
            finally:
                process.kill()
                error = process.stderr.read()
            assert error == ""
    assert not {there, back} & set(dsline._core.list_names())


def test_crc32c_continues_and_takes_any_contiguous_buffer():
    assert _core.crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert _core.crc32c(b"6789", _core.crc32c(b"12345")) == 0xE3069283
    large = np.arange(100_000, dtype=np.int64)
    assert _core.crc32c(large) == _core.crc32c(large[1:], _core.crc32c(large[:1]))
    assert _core.crc32c(b"", 7) == 7
    with pytest.raises(ValueError, match="contiguous"):
        _core.crc32c(large[::2])
