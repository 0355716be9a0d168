"""Arrays and tables of other packages: DLPack both ways, masked arrays, Arrow."""

import asyncio
import contextlib
import gc
import sys
import threading
import warnings

import numpy as np
import pytest

import dsline
from dsline import ArraySpec, interop

with contextlib.suppress(ImportError):
    import torch
with contextlib.suppress(ImportError):
    import pyarrow as pa
with contextlib.suppress(ImportError):
    import polars as pl
with contextlib.suppress(ImportError):
    import pandas as pd

needs_torch = pytest.mark.skipif("torch" not in globals(), reason="torch is not installed")
needs_pyarrow = pytest.mark.skipif("pa" not in globals(), reason="pyarrow is not installed")
needs_polars = pytest.mark.skipif("pl" not in globals(), reason="polars is not installed")
needs_pandas = pytest.mark.skipif("pd" not in globals(), reason="pandas is not installed")
NUMPY = tuple(int(part) for part in np.__version__.split(".")[:2])
numpy_reads_read_only = pytest.mark.skipif(NUMPY < (2, 1), reason="NumPy reads read-only tensors from 2.1 on")


@pytest.fixture
def channel(make_channel):
    return make_channel(capacity=2)


def address(array):
    return array.__array_interface__["data"][0]


# --- DLPack: receiving ------------------------------------------------------------------------------------------

DLPACK_DTYPES = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "?"]


@numpy_reads_read_only
@pytest.mark.parametrize("dtype", DLPACK_DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 4), (2, 1, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_reads_a_message(channel, dtype, shape, order):
    sent = np.asarray(np.arange(np.prod(shape)).reshape(shape).astype(dtype), order=order)
    channel.send(sent)
    message = channel.recv_message(timeout=0)
    assert message.__dlpack_device__() == (1, 0)
    got = np.from_dlpack(message)
    assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
    assert not got.flags.writeable
    np.testing.assert_array_equal(got, sent)
    if sent.size:
        assert address(got) == address(message.array())


@numpy_reads_read_only
def test_a_tensor_keeps_the_slot(channel):
    channel.send(np.arange(5))
    message = channel.recv_message(timeout=0)
    tensor = np.from_dlpack(message)
    with pytest.raises(BufferError, match="alive"):
        message.release()
    del message
    gc.collect()
    part = tensor[1:]
    del tensor
    assert channel.stats().pinned_slots == 1
    channel.close()
    np.testing.assert_array_equal(part, [1, 2, 3, 4])


def test_a_capsule_that_nobody_takes_gives_the_slot_back(channel):
    channel.send(np.arange(5))
    message = channel.recv_message(timeout=0)
    capsules = [message.__dlpack__(max_version=(1, 0)) for _ in range(3)]
    copies = [message.__dlpack__(copy=True), message.__dlpack__(copy=True, max_version=(1, 3))]
    assert [repr(each).split('"')[1] for each in [*capsules, *copies]] == [
        *["dltensor_versioned"] * 3,
        "dltensor",
        "dltensor_versioned",
    ]
    del capsules[1:], copies
    with pytest.raises(BufferError):
        message.release()
    del capsules
    message.release()
    assert channel.stats().free_slots == 2


class Legacy:
    """What a consumer from before DLPack 1.0 sees."""

    def __init__(self, message, **arguments):
        self._message, self._arguments = message, arguments

    def __dlpack__(self, **_):
        return self._message.__dlpack__(**self._arguments)

    def __dlpack_device__(self):
        return self._message.__dlpack_device__()


@pytest.mark.parametrize("max_version", [None, (0, 8)])
def test_consumers_that_know_no_read_only_memory_get_copies_only(channel, max_version):
    channel.send(np.arange(5))
    message = channel.recv_message(timeout=0)
    for copy in (None, False):
        with pytest.raises(BufferError, match="copy=True"):
            message.__dlpack__(max_version=max_version, copy=copy)
    got = np.from_dlpack(Legacy(message, max_version=max_version, copy=True))
    message.release()
    np.testing.assert_array_equal(got, np.arange(5))


@numpy_reads_read_only
def test_a_copy_is_writable_and_does_not_keep_the_slot(channel):
    channel.send(np.asfortranarray(np.arange(6).reshape(2, 3)))
    message = channel.recv_message(timeout=0)
    got = np.from_dlpack(message, copy=True)
    message.release()
    got += 1
    np.testing.assert_array_equal(got, np.arange(6).reshape(2, 3) + 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stream": 2}, "stream is 2"),
        ({"dl_device": (2, 0)}, r"\(2, 0\)"),
        ({"dl_device": (1, 1)}, r"\(1, 1\)"),
        ({"dl_device": 1}, "dl_device is 1"),
    ],
)
def test_what_a_message_cannot_do_for_a_consumer(channel, arguments, words):
    channel.send(np.arange(5))
    message = channel.recv_message(timeout=0)
    with pytest.raises(BufferError, match=words):
        message.__dlpack__(max_version=(1, 0), **arguments)
    message.__dlpack__(max_version=(1, 0), stream=-1, dl_device=(1, 0))
    message.release()
    with pytest.raises(ValueError, match="released"):
        message.__dlpack__(max_version=(1, 0))


@pytest.mark.parametrize(
    "data",
    [b"bytes", np.zeros(2, ">f4"), np.zeros(2, "M8[s]"), np.zeros(2, "S3"), np.zeros(2, [("a", "i4")])],
)
def test_dtypes_that_dlpack_does_not_have(channel, data):
    channel.send(data)
    with channel.recv_message(timeout=0) as message, pytest.raises(BufferError, match=r"plain bytes|no type"):
        message.__dlpack__(max_version=(1, 0))


@numpy_reads_read_only
def test_a_tensor_may_end_in_any_thread(channel):
    channel.send(np.arange(5))
    held = [np.from_dlpack(channel.recv_message(timeout=0))]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert channel.stats().free_slots == 2


def test_a_message_is_an_array_for_numpy(channel):
    channel.send(np.arange(5, dtype="i2"))
    message = channel.recv_message(timeout=0)
    view = np.asarray(message)
    assert not view.flags.writeable
    assert address(view) == address(message.array())
    del view
    wide = np.asarray(message, dtype="f8")
    own = np.array(message)
    message.release()
    np.testing.assert_array_equal(wide, np.arange(5))
    np.testing.assert_array_equal(own, np.arange(5))
    assert own.flags.writeable


@needs_torch
@pytest.mark.parametrize("dtype", DLPACK_DTYPES)
def test_torch_reads_a_message_without_a_copy(channel, dtype):
    sent = np.arange(6).reshape(2, 3).astype(dtype)
    channel.send(sent)
    message = channel.recv_message(timeout=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = torch.from_dlpack(message)
    assert tensor.data_ptr() == address(message.array())
    del message
    assert channel.stats().pinned_slots == 1
    np.testing.assert_array_equal(tensor.numpy(), sent)
    view = tensor[1]
    del tensor
    gc.collect()
    assert channel.stats().pinned_slots == 1
    del view
    assert channel.stats().free_slots == 2


@needs_torch
def test_torch_takes_a_copy_of_a_message(channel):
    channel.send(np.arange(6.0))
    message = channel.recv_message(timeout=0)
    tensor = torch.from_dlpack(message, copy=True)
    message.release()
    tensor += 1
    assert tensor.tolist() == [1, 2, 3, 4, 5, 6]


@needs_torch
@numpy_reads_read_only
def test_torch_reads_a_received_array_by_dlpack_without_a_warning(channel):
    channel.send(np.arange(6.0))
    array = channel.recv_array(timeout=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = torch.from_dlpack(array)
    assert tensor.data_ptr() == address(array)
    del array
    assert tensor.tolist() == list(range(6))
    assert channel.stats().pinned_slots == 1


@needs_torch
def test_torch_from_numpy(channel):
    channel.send(np.arange(6.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(channel.recv_array(timeout=0))
    gc.collect()
    assert channel.stats().pinned_slots == 1
    assert tensor.tolist() == list(range(6))
    channel.send(np.arange(3.0))
    own = torch.from_numpy(channel.recv_array(timeout=0, copy=True))  # no warning: it may be written
    own += 1
    assert own.tolist() == [1, 2, 3]


@needs_torch
def test_a_tensor_of_torch_is_filled_by_out(channel):
    channel.send(np.arange(6, dtype="f4"))
    tensor = torch.zeros(6)
    channel.recv_array(out=tensor.numpy(), timeout=0)
    assert tensor.tolist() == list(range(6))


# --- arrays of other packages: sending --------------------------------------------------------------------------


class Offers:
    """An object that is an array by one of the protocols only."""

    def __init__(self, array):
        self.array = array


class ByDlpack(Offers):
    def __dlpack__(self, **arguments):
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class ByInterface(Offers):
    @property
    def __array_interface__(self):
        return self.array.__array_interface__


class ByArray(Offers):
    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


@pytest.mark.parametrize("protocol", [ByDlpack, ByInterface, ByArray])
@pytest.mark.parametrize("layout", ["C", "F", "strided", "negative", "0-d", "empty"])
def test_whatever_offers_an_array_is_sent_as_one(channel, protocol, layout):
    base = np.arange(24, dtype="f4").reshape(4, 6)
    array = {
        "C": base,
        "F": np.asfortranarray(base),
        "strided": base[::2, ::3],
        "negative": base[::-1],
        "0-d": np.array(5.0),
        "empty": base[:0],
    }[layout]
    channel.send(protocol(array), meta={"a": 1})
    with channel.recv_message(timeout=0) as message:
        assert message.meta == {"a": 1}
        assert message.array().dtype == array.dtype
        np.testing.assert_array_equal(message.array(), array)


@pytest.mark.parametrize("protocol", [ByDlpack, ByInterface, ByArray])
def test_they_are_checked_on_typed_channels_and_fill_records(make_channel, protocol):
    typed = make_channel(spec=ArraySpec((3,), "f4"))
    typed.send(protocol(np.arange(3, dtype="f4")))
    np.testing.assert_array_equal(typed.recv_array(timeout=0), np.arange(3))
    with pytest.raises(dsline.SchemaMismatchError):
        typed.send(protocol(np.arange(3)))
    records = make_channel(spec={"a": ArraySpec((3,), "f4")})
    records.send({"a": protocol(np.arange(3, dtype="f4"))})
    np.testing.assert_array_equal(records.recv_record(timeout=0)["a"], np.arange(3))


def test_devices_that_the_host_cannot_read_are_refused(channel):
    class Elsewhere(ByDlpack):
        device = "cuda:1"

        def __dlpack_device__(self):
            return (2, 1)

    with pytest.raises(TypeError, match=r"cuda:1.*\.cpu\(\)"):
        channel.send(Elsewhere(np.zeros(3)))
    del Elsewhere.device
    with pytest.raises(TypeError, match="DLPack device 2:1"):
        channel.send(Elsewhere(np.zeros(3)))
    assert channel.stats().free_slots == 2


@pytest.mark.parametrize(
    "data", [[1, 2], (1, 2), "text", 5, 1.5, None, {"a": 1}, range(3), object(), np.ndarray]
)
def test_what_is_no_array_is_still_refused(channel, data):
    with pytest.raises(TypeError, match="cannot send"):
        channel.send(data)


def test_an_array_that_raises_is_refused_with_its_reason(channel):
    class Broken(Offers):
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("the tape is torn")

    with pytest.raises(TypeError, match="the tape is torn"):
        channel.send(Broken(None))
    with pytest.raises(TypeError, match="Python objects"):
        channel.send(ByArray(np.array([None, 1])))


@needs_torch
@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int8", "int64", "uint8", "bool", "complex64"]
)
def test_tensors_of_torch_are_sent_as_arrays(channel, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    for sent in (tensor, tensor.T, tensor[:, ::2], torch.nn.Parameter(tensor, requires_grad=False)):
        channel.send(sent)
        got = channel.recv_array(timeout=0)
        assert str(got.dtype) == dtype
        np.testing.assert_array_equal(got, sent.detach().numpy())
        del got


@needs_torch
def test_tensors_that_cannot_be_arrays_say_why(channel):
    refused = {
        r"\.detach\(\)": torch.zeros(3, requires_grad=True),
        "uint16": torch.zeros(3, dtype=torch.bfloat16),
        "uint8": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "parse": torch.zeros(3).to_sparse(),
        "meta": torch.zeros(3, device="meta"),
    }
    for words, tensor in refused.items():
        with pytest.raises(TypeError, match=words):
            channel.send(tensor)
    assert channel.stats().free_slots == 2


@needs_torch
def test_bfloat16_travels_by_its_bits(channel):
    tensor = torch.tensor([1.5, -2.0, float("inf")], dtype=torch.bfloat16)
    channel.send(tensor.view(torch.int16))
    got = torch.from_dlpack(channel.recv_message(timeout=0)).view(torch.bfloat16)
    assert torch.equal(got, tensor)


@needs_pandas
def test_values_of_pandas_need_a_word(channel):
    frame = pd.DataFrame({"a": [1, 2]})
    for table in (frame, frame["a"]):
        with pytest.raises(TypeError, match="send_arrow"):
            channel.send(table)
    channel.send(np.asarray(frame["a"]))
    channel.send(frame.index[:0].astype("i8"))
    np.testing.assert_array_equal(channel.recv_array(timeout=0), [1, 2])


# --- masked arrays ----------------------------------------------------------------------------------------------


def masked_arrays():
    base = np.arange(12, dtype="f4").reshape(3, 4)
    table = np.zeros(3, [("a", "i4"), ("b", "f8", (2,))])
    table["a"] = [1, 2, 3]
    structured = np.ma.array(table)
    structured.mask["a"][1] = True
    structured.mask["b"][2, 0] = True
    own_fill = np.ma.masked_greater(base, 5)
    own_fill.fill_value = -1
    return {
        "plain": np.ma.masked_greater(base, 5),
        "no mask": np.ma.array(base),
        "all masked": np.ma.masked_all((2, 3), "i8"),
        "fill value": own_fill,
        "0-d": np.ma.array(5.0, mask=True),
        "empty": np.ma.masked_all((0, 3), "f8"),
        "strided": np.ma.masked_greater(base, 5)[::2, ::-1],
        "fortran": np.ma.masked_greater(np.asfortranarray(base), 5),
        "dates": np.ma.array(np.arange(3).astype("M8[D]"), mask=[0, 1, 0]),
        "text": np.ma.array(["a", "bcd"], mask=[1, 0]),
        "byte order": np.ma.array(np.arange(3, dtype=">i4"), mask=[0, 1, 0]),
        "large": np.ma.masked_less(np.arange(200_000).reshape(400, 500), 77_777),
        "structured": structured,
    }


@pytest.mark.parametrize("case", masked_arrays())
@pytest.mark.parametrize("meta", [None, {"a": 1}])
def test_masked_arrays_travel_whole(make_any, case, meta):
    channel = make_any(capacity=2)
    sent = masked_arrays()[case]
    for _ in range(2):
        channel.send(sent, meta=meta)
        with channel.recv_message(timeout=0) as message:
            assert message.meta == (meta or {})
            got = message.array()
        assert isinstance(got, np.ma.MaskedArray)
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert (np.ma.getmask(got) is np.ma.nomask) == (np.ma.getmask(sent) is np.ma.nomask)
        np.testing.assert_array_equal(np.ma.getmaskarray(got), np.ma.getmaskarray(sent))
        np.testing.assert_array_equal(np.ma.getdata(got), np.ma.getdata(sent))
        np.testing.assert_array_equal(got.fill_value, np.asarray(sent.fill_value, sent.dtype))
        assert not got.data.flags.writeable
        assert channel.stats().pinned_slots == 1
        del got


def test_a_received_masked_array_is_read_only_and_keeps_the_slot(channel):
    channel.send(np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]))
    got = channel.recv_array(timeout=0)
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 5.0
    with pytest.raises(ValueError, match="read-only"):
        got[0] = np.ma.masked
    assert got.sum() == 4.0
    mask = got.mask
    del got
    assert channel.stats().pinned_slots == 1
    assert mask.tolist() == [False, True, False]
    del mask
    assert channel.stats().free_slots == 2


def test_a_copy_of_a_masked_array_is_writable(channel):
    channel.send(np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]))
    got = channel.recv_array(timeout=0, copy=True)
    assert channel.stats().free_slots == 2
    got[1] = 7
    got[0] = np.ma.masked
    assert got.tolist() == [None, 7.0, 3.0]


def test_the_latest_masked_array():
    with dsline.Latest() as cell:
        cell.set(np.ma.array([1, 2, 3], mask=[0, 1, 0]))
        got = cell.get()
        got[0] = np.ma.masked
        assert got.tolist() == [None, None, 3]


def test_masked_arrays_and_others_take_turns(channel):
    masked = np.ma.array([1, 2], mask=[0, 1])
    for data in (masked, np.array([5, 6]), masked[:1], masked, b"x"):
        channel.send(data)
        if isinstance(data, bytes):
            assert channel.recv_bytes(timeout=0) == data
        else:
            got = channel.recv_array(timeout=0)
            assert type(got) is type(data)
            assert got.tolist() == data.tolist()
            del got


def test_a_structure_that_only_looks_like_a_masked_array_is_one(channel):
    plain = np.zeros((), [("data", "f4", (2,)), ("mask", "?", (2,)), ("fill", "f4")])
    channel.send(plain)
    assert type(channel.recv_array(timeout=0)) is np.ndarray


def test_a_masked_array_that_no_structure_holds(channel):
    huge = np.ma.array(np.broadcast_to(np.float64(0), (1 << 28,)), mask=np.broadcast_to(False, (1 << 28,)))
    with pytest.raises(dsline.MessageTooLargeError, match="2 GiB"):
        channel.send(huge)
    with pytest.raises(TypeError, match="Python objects"):
        channel.send(np.ma.array([None, 1], mask=[0, 1]))
    assert channel.stats().free_slots == 2


# --- Arrow ------------------------------------------------------------------------------------------------------


def columns():
    return {
        "i": [1, None, 3],
        "f": [0.5, 1.5, None],
        "s": ["a", None, "ccc"],
        "l": [[1, 2], [], None],
    }


def tables():
    """Functions that make what send_arrow takes, by the package that they need."""
    return {
        "pyarrow table": ("pa", lambda: pa.table(columns())),
        "pyarrow batch": ("pa", lambda: pa.record_batch(columns())),
        "pyarrow chunks": (
            "pa",
            lambda: pa.concat_tables([pa.table(columns())[:1], pa.table(columns())[1:]]),
        ),
        "pyarrow slice": ("pa", lambda: pa.concat_tables([pa.table(columns())] * 2)[3:]),
        "pyarrow reader": ("pa", lambda: pa.table(columns()).to_reader()),
        "polars": ("pl", lambda: pl.DataFrame(columns())),
        "only the array interface": ("pa", lambda: OnlyArray(pa.record_batch(columns()))),
    }


class OnlyArray:
    def __init__(self, batch):
        self._batch = batch

    def __arrow_c_array__(self, requested_schema=None):
        return self._batch.__arrow_c_array__(requested_schema)


@needs_pyarrow
@pytest.mark.parametrize("case", tables())
def test_tables_travel(make_any, case):
    package, make = tables()[case]
    if package not in globals():
        pytest.skip("polars is not installed")
    channel = make_any(capacity=2)
    for _ in range(2):
        assert channel.send_arrow(make(), meta={"day": 5})
        assert channel.stats().depth == 1
        got = channel.recv_arrow(timeout=0)
        assert got.to_pydict() == columns()
        assert channel.stats().pinned_slots == 1
        del got
        assert channel.stats().free_slots == 2


@needs_pyarrow
def test_a_received_table_is_a_view_that_keeps_the_slot(channel):
    values = np.arange(100_000, dtype="f8")
    channel.send_arrow(pa.table({"x": values}))
    raw_size = len(channel.inspect().slots)
    assert raw_size == 1
    table = channel.recv_arrow(timeout=0)
    column = table["x"].chunk(0)
    view = column.to_numpy(zero_copy_only=True)
    assert not view.flags.writeable
    del table, column
    gc.collect()
    assert channel.stats().pinned_slots == 1
    channel.close()
    np.testing.assert_array_equal(view, values)


@needs_pyarrow
def test_the_stream_is_marked_and_any_arrow_reads_it(channel):
    channel.send_arrow(pa.table(columns()), meta={"day": 5})
    with channel.recv_message(timeout=0) as message:
        assert message.meta == {"day": 5, "encoding": "arrow"}
        assert pa.ipc.open_stream(message.payload).read_all().to_pydict() == columns()
        assert message.nbytes == len(pa.py_buffer(message.payload))


@needs_pyarrow
@pytest.mark.parametrize("rows", [0, 1, 500_000])
def test_tables_of_any_size(channel, rows):
    table = pa.table({"x": np.arange(rows), "y": np.arange(rows) % 7 == 0})
    channel.send_arrow(table)
    assert channel.recv_arrow(timeout=0).equals(table)


@needs_pyarrow
def test_dictionaries_and_nested_types(channel):
    table = pa.table(
        {
            "d": pa.array(["a", "b", "a"]).dictionary_encode(),
            "s": pa.array([{"x": 1, "y": "a"}, None, {"x": 3, "y": None}]),
            "t": pa.array([1, 2, 3], pa.timestamp("ns", "UTC")),
            "n": pa.nulls(3),
        }
    )
    channel.send_arrow(table)
    assert channel.recv_arrow(timeout=0).equals(table)


@needs_pyarrow
@needs_pandas
def test_frames_of_pandas_travel_by_arrow(channel):
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    channel.send_arrow(frame)
    pd.testing.assert_frame_equal(channel.recv_arrow(timeout=0).to_pandas(), frame, check_dtype=False)


@needs_polars
def test_polars_alone_is_enough(channel, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    frame = pl.DataFrame(columns())
    for _ in range(2):
        channel.send_arrow(frame)
        got = channel.recv_arrow(timeout=0)
        assert isinstance(got, pl.DataFrame)
        assert got.equals(frame)
    assert channel.stats().free_slots == 2
    with pytest.raises(dsline.FeatureUnavailableError, match="pyarrow"):
        channel.recv_arrow(library="pyarrow", timeout=0)


@needs_polars
@needs_pyarrow
def test_one_may_write_what_the_other_reads(channel):
    channel.send_arrow(pa.table(columns()))
    assert channel.recv_arrow(library="polars", timeout=0).to_dict(as_series=False) == columns()
    assert channel.stats().free_slots == 2


def test_without_a_package_it_says_what_to_install(channel, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "polars", None)

    class Table:
        def __arrow_c_stream__(self, requested_schema=None):
            raise AssertionError

    with pytest.raises(dsline.FeatureUnavailableError, match="pip install pyarrow"):
        channel.send_arrow(Table())
    channel.send(b"x")
    with pytest.raises(dsline.FeatureUnavailableError, match="pip install pyarrow"):
        channel.recv_arrow(timeout=0)
    with pytest.raises(dsline.FeatureUnavailableError, match="pip install polars"):
        channel.recv_arrow(timeout=0, library="polars")
    with pytest.raises(dsline.InvalidArgumentError, match="arrow2"):
        channel.recv_arrow(timeout=0, library="arrow2")
    assert channel.recv_bytes(timeout=0) == b"x"


@pytest.mark.parametrize("data", [b"bytes", np.zeros(3), [1, 2], None, {"a": [1]}])
def test_what_is_no_table_is_refused(channel, data):
    with pytest.raises(TypeError, match="send_arrow"):
        channel.send_arrow(data)
    assert channel.stats().free_slots == 2


@needs_pyarrow
def test_a_single_column_is_no_table(channel):
    with pytest.raises(TypeError, match="column"):
        channel.send_arrow(pa.array([1, 2]))
    with pytest.raises(dsline.InvalidArgumentError, match="encoding"):
        channel.send_arrow(pa.table({"a": [1]}), meta={"encoding": "mine"})
    with pytest.raises(TypeError, match="send_arrow"):
        channel.send(pa.table({"a": [1]}))


@needs_pyarrow
def test_other_messages_stay_for_others(channel):
    for data in (b"bytes", np.arange(3)):
        channel.send(data)
        with pytest.raises(dsline.SchemaMismatchError, match="'arrow'"):
            channel.recv_arrow(timeout=0)
        with channel.recv_message(timeout=0) as message:
            assert message.attempt == 1
    channel.send_arrow(pa.table({"a": [1]}))
    with pytest.raises(dsline.SchemaMismatchError):
        channel.recv_array(timeout=0)
    assert channel.recv_arrow(timeout=0).num_rows == 1


@needs_pyarrow
@pytest.mark.parametrize("damage", ["garbage", "cut", "empty"])
def test_a_stream_that_cannot_be_read_comes_back(channel, damage):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.table(columns()).schema) as writer:
        writer.write_table(pa.table(columns()))
    good = sink.getvalue().to_pybytes()
    data = {"garbage": b"\xffgarbage", "cut": good[: len(good) // 2], "empty": b""}[damage]
    channel.send(data, meta={"encoding": "arrow"})
    with pytest.raises(dsline.SerializationError, match="recv"):
        channel.recv_arrow(timeout=0)
    gc.collect()
    with channel.recv_message(timeout=0) as message:
        assert message.attempt == 2
        assert bytes(message.payload) == data


@needs_pyarrow
def test_a_typed_channel_takes_no_tables(make_channel):
    typed = make_channel(spec=ArraySpec((3,), "f4"))
    with pytest.raises(dsline.SchemaMismatchError):
        typed.send_arrow(pa.table({"a": [1]}))
    assert typed.stats().free_slots == 64


@needs_pyarrow
def test_a_full_channel_says_so(make_channel):
    channel = make_channel(capacity=1, slot_size=64, max_message_size=100_000)
    table = pa.table({"a": [1]})
    channel.send_arrow(table)
    with pytest.raises(dsline.BufferFullError):
        channel.send_arrow(table, timeout=0)
    assert channel.recv_arrow(timeout=0).equals(table)
    with pytest.raises(dsline.MessageTooLargeError):
        channel.send_arrow(pa.table({"a": np.arange(100_000)}))
    assert channel.send_arrow(table, timeout=0)


@needs_pyarrow
def test_tables_under_asyncio(make_channel):
    channel = make_channel(capacity=1)
    table = pa.table(columns())

    async def main():
        messages = dsline.aio.AsyncChannel(channel)
        sender = asyncio.create_task(send_all(messages))
        for _ in range(3):
            got = await messages.recv_arrow(timeout=30)
            assert got.to_pydict() == columns()
            del got
        await sender

    async def send_all(messages):
        for _ in range(3):
            assert await messages.send_arrow(table, timeout=30)

    asyncio.run(main())


# --- a message that is written in place -------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_writer_that_fails_gives_the_slot_back(channel, when):
    def fill(window):
        with memoryview(window) as view:
            if when == "after":
                view[:3] = b"abc"
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        channel._core_send_filled(10, fill, {}, 0)
    assert (len(channel), channel.stats().free_slots) == (0, 2)


def test_a_writer_that_keeps_its_window_is_refused(channel):
    kept = []

    def fill(window):
        kept.append(memoryview(window))
        return 10

    with pytest.raises(BufferError, match="written to"):
        channel._core_send_filled(10, fill, {}, 0)
    assert (len(channel), channel.stats().free_slots) == (0, 2)
    window = kept[0].obj
    kept.clear()
    with pytest.raises(BufferError, match="has been sent"):
        memoryview(window)


@pytest.mark.parametrize("reported", [-1, 11])
def test_a_writer_that_reports_nonsense_is_refused(channel, reported):
    with pytest.raises(ValueError, match=str(reported)):
        channel._core_send_filled(10, lambda window: reported, {}, 0)
    assert channel.stats().free_slots == 2


def test_a_writer_may_write_less_than_there_is_room_for(channel):
    def fill(window):
        with memoryview(window) as view:
            view[:3] = b"abc"
        return 3

    assert channel._core_send_filled(10, fill, {"a": 1}, 0)
    assert channel.recv_bytes(timeout=0) == b"abc"


def test_the_encoding_has_a_name():
    assert interop.ARROW == "arrow"
