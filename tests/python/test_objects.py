"""send_object and recv_object: any object, its large buffers beside the pickle."""

import dataclasses
import gc
import mmap
import pickle
import struct
import warnings

import numpy as np
import pytest

import dsline
from dsline import _core

EMPTY = dsline.BufferEmptyError


@pytest.fixture
def channel():
    with dsline.ShmChannel(capacity=4, slot_size=4096) as made:
        yield made


@dataclasses.dataclass
class Sample:
    name: str
    frame: np.ndarray


class Exploding:
    """Its unpickling fails."""

    def __reduce__(self):
        return explode, ("bang",)


def explode(word):
    raise LookupError(word)


def equal(one, other):
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return one == other


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    "sent",
    [
        None,
        {"a": [1, 2.5, "x"], "b": (None, True)},
        b"",
        "text" * 100_000,
        bytearray(b"x" * 5000),
        np.arange(5),
        np.arange(100_000.0).reshape(100, 1000),
        np.asfortranarray(np.arange(6000).reshape(60, 100)),
        np.arange(10_000)[::3],
        np.zeros((0, 7)),
        np.array("2026-11-27", "datetime64[s]"),
        np.zeros(300, [("x", "f8"), ("y", "i4", (3,))]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_round_trip(channel, sent, copy):
    assert channel.send_object(sent) is True
    got = channel.recv_object(copy=copy)
    assert type(got) is type(sent)
    assert equal(got, sent)


def test_large_arrays_are_views_on_the_slot(channel):
    sent = {
        "frame": np.arange(60_000, dtype=np.float32),
        "mask": np.ones(4000, np.uint8),
        "small": np.arange(10),
    }
    channel.send_object(sent)
    got = channel.recv_object()
    assert all(equal(got[key], sent[key]) for key in sent)
    assert not got["frame"].flags.writeable
    assert not got["mask"].flags.writeable
    assert got["small"].flags.writeable  # it came in the stream
    assert got["frame"].ctypes.data % 64 == 0
    assert channel.stats().pinned_views == 1
    del got["frame"]
    gc.collect()
    assert channel.stats().pinned_views == 1
    del got
    assert channel.stats().pinned_views == 0
    assert channel.stats().free_slots == 4


def test_copies_are_writable_and_free_the_slot(channel):
    channel.send_object([np.arange(60_000), Sample("a", np.zeros((40, 40)))])
    first, sample = channel.recv_object(copy=True)
    assert channel.stats().free_slots == 4
    first[:] = 7
    sample.frame += 1
    assert sample.name == "a"
    assert sample.frame.sum() == 1600


def test_what_has_no_large_buffers_keeps_no_slot(channel):
    channel.send_object({"a": np.arange(10)})
    got = channel.recv_object()
    assert channel.stats().free_slots == 4
    assert got["a"].tolist() == list(range(10))


def test_the_array_is_copied_once_before_send_returns(channel):
    array = np.zeros(100_000)
    channel.send_object({"a": array})
    array[:] = 1
    assert channel.recv_object()["a"].sum() == 0


def test_one_array_twice_is_one_array(channel):
    array = np.zeros(5000)
    channel.send_object([array, array])
    got = channel.recv_object()
    assert got[0] is got[1]
    assert channel.stats().bytes_sent < 2 * array.nbytes


def test_meta_and_messages(channel):
    channel.send_object({"a": 1}, meta={"step": 5})
    message = channel.recv_message()
    assert message.meta == {"step": 5}
    assert message.object() == {"a": 1}
    assert message.object() == {"a": 1}
    message.release()
    with pytest.raises(ValueError, match="released"):
        message.object()


def test_arrays_and_bytes_arrive_as_what_they_are(channel):
    channel.send(b"raw")
    channel.send(np.arange(3.0))
    assert channel.recv_object() == b"raw"
    got = channel.recv_object()
    assert got.tolist() == [0, 1, 2]
    assert not got.flags.writeable


def test_an_object_is_no_array(channel):
    channel.send_object([1])
    with pytest.raises(dsline.SchemaMismatchError, match=r"pickled object.*recv_object\(\)"):
        channel.recv_array()
    assert channel.recv_object() == [1]


def test_nothing_is_unpickled_unless_asked_for(channel):
    channel.send_object(Exploding())
    raw = channel.recv_bytes()
    assert b"explode" in raw
    channel.send_object(Exploding())
    assert b"explode" in bytes(channel.recv())


def test_what_cannot_be_pickled_is_not_sent(channel):
    with pytest.raises(dsline.SerializationError, match="function"):
        channel.send_object(lambda: None)
    with pytest.raises(dsline.SerializationError, match="nothing was sent") as caught:
        channel.send_object({"lock": __import__("threading").Lock()})
    assert isinstance(caught.value.__cause__, TypeError)
    assert len(channel) == 0
    assert channel.stats().free_slots == 4


def test_failed_unpickling_loses_nothing(channel):
    channel.send_object(Exploding())
    channel.send_object("next")
    with pytest.raises(dsline.SerializationError, match="LookupError: bang") as caught:
        channel.recv_object()
    assert isinstance(caught.value.__cause__, LookupError)
    with channel.recv_message() as message:
        assert message.attempt == 2
        assert b"explode" in bytes(message.payload)
    assert channel.recv_object() == "next"
    assert channel.stats().free_slots == 4


def test_what_can_never_be_unpickled_becomes_a_dead_letter(channel):
    channel.send_object([Exploding(), np.zeros(1000)])
    channel.send_object("next")
    got = []
    failures = 0
    while not got:
        try:
            got.append(channel.recv_object(timeout=1))
        except dsline.SerializationError:
            failures += 1
    assert got == ["next"]
    assert failures == channel.max_deliveries
    (letter,) = channel.dead_letters()
    assert b"explode" in bytes(letter.payload)
    letter.release()
    assert channel.stats().free_slots == 4


def test_an_interrupt_while_unpickling_loses_nothing(channel):
    channel.send_object(Interrupting())
    with pytest.raises(KeyboardInterrupt):
        channel.recv_object()
    assert channel.recv_message(timeout=1).attempt == 2


class Interrupting:
    def __reduce__(self):
        return interrupt, ()


def interrupt():
    raise KeyboardInterrupt


def test_too_large(channel):
    with dsline.ShmChannel(capacity=2, slot_size=4096, max_message_size=8192) as small:
        with pytest.raises(dsline.MessageTooLargeError):
            small.send_object(np.zeros(10_000))
        small.send_object("fits")
        assert small.recv_object() == "fits"


def test_full_and_dropping():
    with dsline.ShmChannel(capacity=1, backpressure="raise") as one:
        one.send_object(1)
        with pytest.raises(dsline.BufferFullError):
            one.send_object(2)
    with dsline.ShmChannel(capacity=1, backpressure="drop_newest") as one:
        assert one.send_object(1) is True
        assert one.send_object(2) is False
        assert one.recv_object() == 1


def test_subscribers_and_files(tmp_path):
    with dsline.Broadcast() as ch, ch.subscribe("a") as a, ch.subscribe("b") as b:
        ch.send_object({"x": np.arange(2000)})
        assert a.recv_object()["x"].sum() == b.recv_object()["x"].sum() == 1999 * 1000
    with dsline.FileChannel.create(tmp_path / "f") as file:
        file.send_object(["kept"])
    with dsline.FileChannel.open(tmp_path / "f") as file:
        assert file.recv_object() == ["kept"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, 0),
        (0, 2),
        (0, 1 << 60),
        (0, (1 << 64) - 1),
        (8, 1 << 40),
        (8, (1 << 64) - 1),
        (16, 1 << 62),
        (24, 1 << 63),
        (24, 70_000),
    ],
)
@pytest.mark.parametrize("copy", [False, True])
def test_damaged_numbers_are_refused(field, value, copy):
    with dsline.ShmChannel(f"objects-{field}", capacity=2, slot_size=65536, checksum="none") as channel:
        mark = b"\x5a\xc3" * 2000
        channel.send_object(np.frombuffer(mark, np.uint8))
        with open(channel.path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            buffer = memory.find(mark)
            # The payload starts at a page or at a multiple of 64; its first number is the one buffer that it has.
            start = memory.rfind(struct.pack("<Q", 1), 0, buffer - 24)
            while struct.unpack_from("<Q", memory, start + 24)[0] != len(mark):
                start = memory.rfind(struct.pack("<Q", 1), 0, start)
            struct.pack_into("<Q", memory, start + field, value)
        with pytest.raises(dsline.SerializationError, match=r"no pickled object|cannot be unpickled"):
            channel.recv_object(copy=copy)
        channel.recv_message(timeout=1).release()
        assert channel.stats().free_slots == 2


def test_dump_gives_protocol_5_and_the_buffers():
    stream, buffers = _core.pickle_object({"a": np.arange(1000)})
    assert stream[1] == 5
    assert [len(buffer.raw()) for buffer in buffers] == [8000]
    assert pickle.loads(stream, buffers=buffers)["a"].sum() == 499_500


@pytest.mark.parametrize("copy", [False, True])
def test_pandas(channel, copy):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(5000.0), "b": np.arange(5000) % 7, "c": ["x"] * 5000})
    channel.send_object(frame)
    got = channel.recv_object(copy=copy)
    pandas.testing.assert_frame_equal(got, frame)
    assert (channel.stats().pinned_views == 1) is not copy
    _, buffers = _core.pickle_object(frame)
    assert sum(len(buffer.raw()) for buffer in buffers) >= 80_000


@pytest.mark.parametrize("copy", [False, True])
def test_polars(channel, copy):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"a": np.arange(5000.0), "c": ["x"] * 5000})
    channel.send_object({"frame": frame})
    got = channel.recv_object(copy=copy)["frame"]
    assert got.equals(frame)
    stream, buffers = _core.pickle_object(frame)
    assert len(stream) < 1000
    assert sum(len(buffer.raw()) for buffer in buffers) >= 40_000
    strange = polars.DataFrame({"o": polars.Series([object()], dtype=polars.Object)})
    with pytest.raises(dsline.SerializationError):
        channel.send_object(strange)


@pytest.mark.parametrize("copy", [False, True])
def test_torch(channel, copy):
    torch = pytest.importorskip("torch")
    sent = {
        "float": torch.arange(6000.0).reshape(60, 100),
        "turned": torch.arange(6000).reshape(60, 100).T,
        "half": torch.ones(5000, dtype=torch.bfloat16),
        "small": torch.arange(3),
        "empty": torch.zeros(0, 4),
        "leaf": torch.ones(2000, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.ones(2000)),
    }
    channel.send_object(sent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = channel.recv_object(copy=copy)
    for name, tensor in sent.items():
        assert type(got[name]) is type(tensor)
        assert got[name].dtype == tensor.dtype
        assert got[name].requires_grad == tensor.requires_grad
        assert torch.equal(got[name], tensor)
    got["float"] += 1  # memory of its own, always
    got["half"].zero_()
    stream, buffers = _core.pickle_object(sent["float"])
    assert len(stream) < 500
    assert [len(buffer.raw()) for buffer in buffers] == [24_000]
