"""Latest: a value that is overwritten."""

import pickle
import threading
import zlib

import numpy as np
import pytest
from support import TIMEOUT, wait_until

import dsline


@pytest.fixture(params=["shm", "memfd", "heap"])
def cell(request, name):
    if request.param == "shm":
        cell = dsline.Latest(name, slot_size=256)
    else:
        cell = dsline.Latest(storage=request.param, slot_size=256)
    yield cell
    if cell.path is not None:
        cell.unlink()
    cell.close()


def test_nothing_has_been_set(cell):
    for call in (cell.get, cell.get_with_sequence, cell.read):
        with pytest.raises(dsline.BufferEmptyError):
            call()
    assert cell.get(None) is None
    assert cell.get(default="start") == "start"
    assert cell.sequence is None
    with pytest.raises(dsline.BufferEmptyError):
        cell.wait_newer(timeout=0)
    assert "nothing set" in repr(cell)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(12, dtype=np.int16).reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(20)[::3],
        np.array(3 + 4j),
        np.empty((0, 5), np.float16),
        np.array(["2020-01-01", "NaT"], "M8[D]"),
        np.array([(1, b"x")], [("a", "<i4"), ("b", "S3")]),
        np.array([b""], "S"),
        np.arange(100_000),
    ],
    ids=lambda array: f"{array.dtype.str}-{array.shape}",
)
def test_arrays_come_back_as_copies(cell, value):
    assert cell.set(value) is True
    got = cell.get()
    assert (got.dtype, got.shape) == (value.dtype, value.shape)
    assert got.flags.f_contiguous == value.flags.f_contiguous or not value.flags.contiguous
    assert got.flags.writeable
    assert got.flags.owndata
    np.testing.assert_array_equal(got, value)
    got.fill(0)
    np.testing.assert_array_equal(cell.get(), value)


@pytest.mark.parametrize("value", [b"", b"bytes", bytes(100_000)])
def test_bytes_come_back(cell, value):
    cell.set(value)
    assert cell.get() == value
    assert type(cell.get()) is bytes
    cell.set(memoryview(bytearray(value)))
    assert cell.get() == value


def test_only_the_last_value_is_there(cell):
    for number in range(100):
        assert cell.set(b"%d" % number)
    assert cell.get_with_sequence() == (b"99", 99)
    assert cell.sequence == 99
    assert cell.get() == b"99", "reading takes nothing"
    assert "value 99" in repr(cell)
    assert cell.stats().unheard == 0


def test_read_gives_what_came_with_it(cell):
    cell.set(b"x", {"pose": "left", "n": 3})
    reading = cell.read()
    assert (reading.value, reading.sequence, reading.meta) == (b"x", 0, {"pose": "left", "n": 3})
    assert reading.timestamp_ns > 1_600_000_000_000_000_000
    cell.set(b"y")
    assert cell.read().meta == {}


def test_wait_newer_skips_what_lies_between(cell):
    cell.set(b"0")
    assert cell.wait_newer() == (b"0", 0)
    assert cell.wait_newer(None, timeout=0) == (b"0", 0)
    cell.set(b"1")
    cell.set(b"2")
    assert cell.wait_newer(0, timeout=0) == (b"2", 2)
    with pytest.raises(dsline.BufferEmptyError):
        cell.wait_newer(2, timeout=0.01)


@pytest.mark.parametrize("known", [None, 0])
def test_wait_newer_waits(cell, known):
    if known is not None:
        cell.set(b"0")
    got = []
    thread = threading.Thread(target=lambda: got.append(cell.wait_newer(known, timeout=TIMEOUT)))
    thread.start()
    wait_until(lambda: cell.stats().recv_waits)
    cell.set(np.arange(3))
    thread.join(TIMEOUT)
    np.testing.assert_array_equal(got[0][0], [0, 1, 2])


def test_the_handles_timeout(name):
    with dsline.Latest(name, timeout=0) as cell:
        assert cell.timeout == 0
        with pytest.raises(dsline.BufferEmptyError):
            cell.wait_newer()
        with pytest.raises(ValueError, match="timeout"):
            cell.wait_newer(timeout=-1)
        with pytest.raises(TypeError):
            cell.wait_newer("first")


def test_handles_of_one_name_share_the_cell(name):
    with dsline.Latest(name) as one, dsline.Latest(name) as other, dsline.Latest.open(name) as third:
        one.set(b"1")
        assert other.get() == third.get() == b"1"
        third.set(b"2")
        assert one.get_with_sequence() == (b"2", 1)
        with pytest.raises(dsline.ChannelExistsError):
            dsline.Latest.create(name)
        one.unlink()
    with dsline.Latest.create(name) as anew:
        assert anew.get(None) is None


def test_a_cell_pickles_by_name(name):
    with dsline.Latest(name, timeout=3) as cell:
        cell.set(b"x")
        with pickle.loads(pickle.dumps(cell)) as again:
            assert (again.get(), again.timeout) == (b"x", 3)
            again.set(b"y")
        assert cell.get() == b"y"
        cell.unlink()
    with dsline.Latest() as anonymous, pytest.raises(dsline.FeatureUnavailableError):
        pickle.dumps(anonymous)


def test_other_channels_are_no_cells(name):
    with dsline.Broadcast(name, capacity=8), pytest.raises(dsline.ChannelMismatchError):
        dsline.Latest.open(name)
    with dsline.ShmChannel(name, capacity=8, history=4):
        for wrong in (dsline.Latest, dsline.Latest.open):
            with pytest.raises(dsline.ChannelMismatchError):
                wrong(name)


def test_a_closed_cell_refuses(cell):
    cell.set(b"x")
    cell.close()
    cell.close()
    assert cell.closed
    for call in (lambda: cell.set(b"y"), cell.get, cell.read, lambda: cell.wait_newer(timeout=0)):
        with pytest.raises(dsline.ChannelClosedError):
            call()
    assert "closed" in repr(cell)


def test_shutdown_wakes_who_waits(cell):
    cell.set(b"x")
    seen = []

    def wait():
        try:
            cell.wait_newer(0, timeout=None)
        except dsline.ChannelClosedError as error:
            seen.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: cell.stats().recv_waits)
    cell.shutdown()
    thread.join(TIMEOUT)
    assert seen == [dsline.ChannelClosedError]
    with pytest.raises(dsline.ChannelClosedError):
        cell.set(b"y")


@pytest.mark.parametrize("words", [16, 20_000])
def test_no_reader_sees_half_a_value(name, words):
    """Two writers overwrite as fast as they can; every value that is read proves itself, and sequences only grow."""
    stop = threading.Event()

    def write(cell, seed):
        value = np.full(words, seed, np.uint32)
        while not stop.is_set():
            value += np.uint32(2)
            value[-1] = zlib.crc32(value[:-1])
            cell.set(value)
            value[-1] = value[0]

    with dsline.Latest(name, slot_size=4 * words) as cell, dsline.Latest(name) as second:
        writers = [
            threading.Thread(target=write, args=(each, number)) for number, each in enumerate((cell, second))
        ]
        for writer in writers:
            writer.start()
        try:
            last = -1
            for _ in range(200):
                value, sequence = cell.wait_newer(None if last < 0 else last, timeout=TIMEOUT)
                assert sequence > last
                last = sequence
                assert value[-1] == zlib.crc32(value[:-1]), "torn"
                assert (value[:-1] == value[0]).all()
        finally:
            stop.set()
            for writer in writers:
                writer.join(TIMEOUT)
        assert cell.sequence >= last
        cell.unlink()
