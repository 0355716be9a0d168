"""What can be sent, and that it arrives as it was: exporters × dtypes × shapes × orders."""

import array
import ctypes
import mmap
import warnings

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import dsline

SHAPES = [(), (0,), (1,), (7,), (2, 3), (3, 0, 2), (2, 1, 4), (1, 1, 1, 2)]

DTYPES = [
    *("?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d", "g", "F", "D", "G"),
    *(">i2", ">u4", ">i8", ">f2", ">f4", ">f8", ">c8", ">c16", ">U3", "<U3"),
    *("S1", "S5", "U1", "U7", "V3", "V16"),
    *("M8[ns]", "M8[D]", ">M8[us]", "M8[25s]", "m8[ms]", ">m8[h]"),
    [("a", "i1"), ("b", "f8")],
    [("a", "<i2"), ("nested", [("x", ">f4"), ("y", "S3", (2,))]), ("t", "M8[s]")],
    np.dtype([("a", "i1"), ("b", "f8")], align=True),
    np.dtype({"names": ["a", "b"], "formats": ["i4", "u1"], "offsets": [4, 0], "itemsize": 12}),
    np.dtype([("matrix", "f4", (2, 2)), ("größe", "u2")]),
    np.dtype((np.record, [("a", "i4")])),
]


def name_of(dtype):
    return str(np.dtype(dtype)).replace(" ", "")[:40]


def sample(dtype, shape):
    """An array of that dtype, filled with bytes that differ, and are valid items."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=int))
    if dtype.names is not None:
        result = np.zeros(shape, dtype)
        for field in dtype.names:
            base = dtype[field]
            part = base.shape
            result[field] = sample(base.base, shape + part)
        return result
    numbers = np.arange(1, size + 1)
    if dtype.kind == "U":
        values = np.array([f"é{number}"[: dtype.itemsize // 4] for number in numbers], dtype)
    elif dtype.kind == "S":
        values = np.array([b"%d" % number for number in numbers], dtype)
    elif dtype.kind == "V":
        values = np.frombuffer(np.random.default_rng(1).bytes(size * dtype.itemsize), dtype)
    elif dtype.kind in "Mm":
        values = numbers.astype("i8").astype(dtype)
        if size:
            values[-1] = "NaT"
    elif dtype.kind == "b":
        values = numbers % 2 == 0
    elif dtype.kind == "c":
        values = (numbers - 1j * numbers).astype(dtype)
    else:
        values = (numbers % 120).astype(dtype)
        if size > 1 and dtype.kind == "f":
            values[:2] = np.nan, np.inf
    return values.astype(dtype, copy=False).reshape(shape)


def assert_same(got, sent):
    assert got.dtype == sent.dtype
    assert got.dtype.names == sent.dtype.names
    assert got.shape == sent.shape
    assert_same_values(got, sent)


def assert_same_values(got, sent):
    if sent.dtype.names is not None:  # field by field: NaN equals NaN, and padding is nobody's
        for field in sent.dtype.names:
            assert_same_values(got[field], sent[field])
    elif sent.dtype.kind == "V":
        assert got.tobytes() == sent.tobytes()
    else:
        np.testing.assert_array_equal(got, sent)


def buffer_of(sent):
    """What NumPy itself exports for the array; None for a dtype that the buffer protocol has no format for."""
    try:
        return memoryview(sent)
    except (ValueError, TypeError, BufferError):
        return None


def is_readable(buffer, sent):
    """True when NumPy reads its own export back as it was."""
    try:
        back = np.asarray(buffer)
    except (ValueError, TypeError, RuntimeError):
        return False
    return back.dtype == sent.dtype and back.shape == sent.shape


@pytest.fixture
def channel(make_channel):
    return make_channel(capacity=4, slot_size=4096, timeout=0)


def exchange(channel, sent):
    """Send an array twice; compare what recv and recv_array give."""
    channel.send(sent)
    channel.send(sent)
    got = channel.recv_array()
    assert_same(got, sent)
    assert not got.flags.writeable
    assert got.flags.f_contiguous or got.flags.c_contiguous
    assert got.flags.c_contiguous or sent.flags.f_contiguous, (
        "only Fortran order is kept, the rest comes in C order"
    )
    view = channel.recv()
    assert view.readonly
    assert view.nbytes == sent.nbytes
    buffer = buffer_of(sent)
    if buffer is None:
        assert (view.format, view.ndim) == ("B", 1)
    elif is_readable(buffer, sent):
        assert_same(np.asarray(view), sent)
        assert (view.shape, view.ndim, view.itemsize) == (sent.shape, sent.ndim, sent.dtype.itemsize)
    if view.ndim == 1 and sent.dtype.names is None:
        assert bytes(view) == sent.tobytes("A" if got.flags.f_contiguous else "C")
    return got


# --- arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_dtype_and_shape_in_both_orders(channel, dtype, shape):
    sent = sample(dtype, shape)
    exchange(channel, sent)
    fortran = exchange(channel, np.asfortranarray(sent))
    if len(shape) > 1:
        assert fortran.flags.f_contiguous


LAYOUTS = {
    "reversed": lambda base: base[::-1],
    "reversed both": lambda base: base[::-1, ::-1],
    "every second row": lambda base: base[::2],
    "every second column": lambda base: base[:, ::2],
    "a window": lambda base: base[1:3, 1:3],
    "transposed": lambda base: base.T,
    "transposed and cut": lambda base: base.T[1:],
    "axes swapped": lambda base: base.reshape(2, 2, 4).swapaxes(0, 2),
    "a column": lambda base: base[:, 1],
    "one item": lambda base: base[2, 2],
    "broadcast": lambda base: np.broadcast_to(base[0], (3, 4)),
    "broadcast scalar": lambda base: np.broadcast_to(base[0, 0], (3, 4)),
    "read-only": lambda base: read_only(base),
    "no rows": lambda base: base[:0, ::-1],
    "new axis": lambda base: base[:, None, ::2],
}


def read_only(base):
    base = base.copy()
    base.flags.writeable = False
    return base


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", ["u1", ">f8", "M8[s]", "U3", "V3", [("a", "u1"), ("b", "<f4")]], ids=name_of
)
def test_every_layout(channel, dtype, layout):
    exchange(channel, np.asarray(LAYOUTS[layout](sample(dtype, (4, 4)))))


@pytest.mark.parametrize("order", ["C", "F"])
def test_unaligned_arrays(channel, order):
    raw = np.arange(1 + 6 * 8, dtype=np.uint8)
    sent = np.ndarray((2, 3), "<f8", raw, offset=1, order=order)
    assert not sent.flags.aligned
    exchange(channel, sent)
    exchange(channel, sent[:, ::-1])
    field = np.zeros(5, [("pad", "u1"), ("value", "<i4")])["value"]
    assert not field.flags.aligned
    exchange(channel, field)


@pytest.mark.parametrize("items", [8192, 32768, 200_000])
@pytest.mark.parametrize("layout", ["plain", "fortran", "strided", "reversed"])
def test_arrays_above_the_thresholds_of_copying(channel, items, layout):
    base = np.arange(2 * items, dtype=np.int64).reshape(2, items)
    sent = {
        "plain": base,
        "fortran": np.asfortranarray(base),
        "strided": base[:, ::2],
        "reversed": base[::-1, ::-1],
    }[layout]
    exchange(channel, sent)


class Sub(np.ndarray):
    pass


def test_subclasses_arrive_as_plain_arrays(channel, tmp_path):
    base = np.arange(6.0).reshape(2, 3)
    record = np.rec.array([(1, 2.0), (3, 4.0)], dtype=[("a", "i4"), ("b", "f8")])
    mapped = np.memmap(tmp_path / "data", np.int16, "w+", shape=(4,))
    mapped[:] = range(4)
    for sent in (base.view(Sub), record, mapped):
        channel.send(sent)
        got = channel.recv_array()
        assert type(got) is np.ndarray
        assert_same(got, np.asarray(sent))


def test_more_dimensions_than_fit_on_a_hand(channel):
    deepest = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32
    for ndim in (8, 16, deepest):
        sent = np.arange(2).reshape((1,) * (ndim - 1) + (2,))
        channel.send(sent)
        assert_same(channel.recv_array(), sent)


def test_an_array_may_change_between_two_sends(channel):
    """What a handle remembers about the last array must not be taken for the next one."""
    sent = np.arange(6, dtype=np.int16)
    pieces = [sent, sent.view(np.uint16), sent.view("<f2"), sent.reshape(2, 3), sent.reshape(3, 2)]
    pieces += [
        np.asfortranarray(sent.reshape(2, 3)),
        sent[:3],
        sent[::2],
        np.int16(4) + sent,
        sent.astype(">i2"),
    ]
    for piece in pieces * 2:
        exchange(channel, piece)


def test_renamed_fields_arrive_renamed(channel):
    sent = np.zeros(2, [("a", "i4"), ("b", "f4")])
    exchange(channel, sent)
    sent.dtype.names = ("x", "y")
    assert exchange(channel, sent).dtype.names == ("x", "y")


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(
    st.one_of(
        npst.scalar_dtypes(), npst.byte_string_dtypes(), npst.unicode_string_dtypes(), npst.array_dtypes()
    ).flatmap(
        lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    ),
    st.data(),
)
def test_any_array_any_view_of_it(sent, data):
    if sent.ndim and sent.dtype.subdtype is None:
        sent = np.asarray(sent[data.draw(npst.basic_indices(sent.shape, allow_newaxis=True))])
    with dsline.ShmChannel(storage="heap", capacity=1, slot_size=4096, timeout=0) as channel:
        channel.send(sent)
        got = channel.recv_array()
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        if sent.dtype.names is None:
            # Bytes, not values: a NaN's payload and a zero's sign are data too.
            assert got.tobytes() == sent.tobytes()
        else:
            assert_same_values(got, sent)
        del got


# --- other exporters --------------------------------------------------------------------------------------------


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int64), ("y", ctypes.c_double))


def anonymous_map(data):
    mapped = mmap.mmap(-1, len(data))
    mapped[:] = data
    return mapped


DATA = bytes(range(64))

BYTES_LIKE = {
    "bytes": lambda: DATA,
    "empty bytes": lambda: b"",
    "subclass of bytes": lambda: type("Bytes", (bytes,), {})(DATA),
    "bytearray": lambda: bytearray(DATA),
    "empty bytearray": bytearray,
    "memoryview": lambda: memoryview(DATA),
    "writable memoryview": lambda: memoryview(bytearray(DATA)),
    "slice": lambda: memoryview(DATA)[3:11],
    "empty slice": lambda: memoryview(DATA)[3:3],
    "every third byte": lambda: memoryview(DATA)[1::3],
    "backwards": lambda: memoryview(DATA)[::-1],
    "backwards in steps": lambda: memoryview(DATA)[60:2:-7],
    "signed bytes": lambda: memoryview(DATA).cast("b"),
    "characters": lambda: memoryview(DATA).cast("c"),
    "mmap": lambda: anonymous_map(DATA),
}


@pytest.mark.parametrize("exporter", BYTES_LIKE)
def test_bytes_like_objects_arrive_as_bytes(channel, exporter):
    data = BYTES_LIKE[exporter]()
    expected = bytes(memoryview(data).tobytes())
    channel.send(data)
    channel.send(data, meta={"k": 1})
    view = channel.recv()
    assert (bytes(view), view.format, view.ndim, view.nbytes) == (expected, "B", 1, len(expected))
    assert view.readonly
    with channel.recv_message() as message:
        assert bytes(message.payload) == expected
        assert message.meta == {"k": 1}
    channel.send(data)
    with pytest.raises(dsline.SchemaMismatchError, match="plain bytes"):
        channel.recv_array()
    assert channel.recv_bytes() == expected, "a message of the wrong kind stays"


ARRAY_LIKE = {
    **{f"array.array {code}": (lambda code=code: array.array(code, [1, 2, 3])) for code in "hHiIlLqQfd"},
    "2-d memoryview": lambda: memoryview(DATA).cast("B", (8, 8)),
    "3-d memoryview": lambda: memoryview(DATA).cast("B").cast("i", (2, 2, 4)),
    "memoryview of floats": lambda: memoryview(array.array("d", [1.5, 2.5])),
    "every second float": lambda: memoryview(array.array("d", [1.5, 2.5, 3.5]))[::2],
    "ctypes array": lambda: (ctypes.c_int * 4)(1, 2, 3, 4),
    "ctypes matrix": lambda: ((ctypes.c_uint16 * 3) * 2)((1, 2, 3), (4, 5, 6)),
    "ctypes chars": lambda: (ctypes.c_char * 5)(*b"12345"),
    "ctypes structure": lambda: Point(1, 2.5),
    "ctypes structures": lambda: (Point * 2)(Point(1, 2.5), Point(3, 4.5)),
    "NumPy scalar": lambda: np.float64(1.5),
    "NumPy complex scalar": lambda: np.complex64(1 + 2j),
    "memoryview of an array": lambda: memoryview(np.arange(6, dtype=">u2").reshape(2, 3)),
    "memoryview of a Fortran array": lambda: memoryview(np.asfortranarray(np.ones((2, 3)))),
    "memoryview of booleans": lambda: memoryview(np.array([True, False])),
}


@pytest.mark.parametrize("exporter", ARRAY_LIKE)
def test_other_exporters_arrive_as_arrays(channel, exporter):
    data = ARRAY_LIKE[exporter]()
    expected = np.asarray(data)
    channel.send(data)
    channel.send(data)
    assert_same(channel.recv_array(), expected)
    assert_same(np.asarray(channel.recv()), expected)


def test_a_format_that_numpy_does_not_know_arrives_as_bytes(channel):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # array.array("u")
        data = array.array("u", "abc")
    channel.send(data)
    assert channel.recv_bytes() == data.tobytes()


@pytest.mark.parametrize("source", ["memoryview", "array", "fortran", "strided"])
def test_what_was_received_can_be_sent_on(channel, source):
    array_sent = {
        "memoryview": np.arange(12, dtype=np.int16).reshape(3, 4),
        "array": np.array(["2020-01-01"], "M8[D]"),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "strided": np.arange(20)[::3],
    }[source]
    channel.send(array_sent)
    received = channel.recv() if source == "memoryview" else channel.recv_array()
    channel.send(received)
    assert_same(channel.recv_array(), array_sent)
    channel.send(b"some bytes")
    channel.send(channel.recv()[5:])
    assert channel.recv_bytes() == b"bytes"


def test_sending_leaves_the_exporter_free(channel):
    data = bytearray(b"12345")
    channel.send(data)
    data.append(6)  # BufferError while somebody holds an export
    sent = np.arange(4)
    channel.send(sent)
    sent[0] = 99
    assert channel.recv_bytes() == b"12345"
    np.testing.assert_array_equal(channel.recv_array(), [0, 1, 2, 3])


# --- refused ----------------------------------------------------------------------------------------------------

REFUSED = {
    "object array": (lambda: np.array([1, "two"], object), "object"),
    "empty object array": (lambda: np.empty(0, object), "object"),
    "object field": (lambda: np.zeros(1, [("a", "i4"), ("o", "O")]), "object"),
    "nested object field": (lambda: np.zeros(1, [("a", [("o", "O")])]), "object"),
    "memoryview of objects": (lambda: memoryview(np.array([1, "two"], object)), "object"),
    "memoryview with an object field": (lambda: memoryview(np.zeros(1, [("a", "i8"), ("o", "O")])), "object"),
    "ctypes objects": (lambda: (ctypes.py_object * 2)(1, 2), "object"),
    "masked array of objects": (lambda: np.ma.masked_array([1, None], [True, False]), "object"),
    "str": (lambda: "text", "str"),
    "int": (lambda: 5, "int"),
    "float": (lambda: 1.5, "float"),
    "None": (lambda: None, "NoneType"),
    "list": (lambda: [1, 2], "list"),
    "dict": (lambda: {"a": 1}, "dict"),
    "a type": (lambda: bytes, "type"),
    "datetime scalar in a list": (lambda: [np.datetime64("2020-01-01")], "list"),
}
if hasattr(getattr(np, "dtypes", None), "StringDType"):
    REFUSED["StringDType"] = (lambda: np.array(["a"], np.dtypes.StringDType()), "String")


@pytest.mark.parametrize("value", REFUSED)
def test_what_cannot_be_sent_is_refused_by_name(channel, value):
    make, words = REFUSED[value]
    channel.send(b"before")
    with pytest.raises(TypeError, match=words):
        channel.send(make())
    with pytest.raises(TypeError, match=words):
        channel.send(make(), meta={"k": 1})
    assert (len(channel), channel.stats().free_slots) == (1, 3)
    channel.send(b"after")
    assert [channel.recv_bytes(), channel.recv_bytes()] == [b"before", b"after"]


def test_a_released_memoryview_is_refused(channel):
    view = memoryview(b"x")
    view.release()
    with pytest.raises(ValueError, match="released"):
        channel.send(view)
    assert channel.stats().free_slots == 4


def test_the_way_out_of_an_object_array_is_named(channel):
    with pytest.raises(TypeError, match="astype"):
        channel.send(np.array([1, 2], object))


# --- receiving into buffers -------------------------------------------------------------------------------------

TARGETS = {
    "bytearray": lambda size: bytearray(size),
    "memoryview": lambda size: memoryview(bytearray(size)),
    "ndarray": lambda size: np.zeros(size, np.uint8),
    "wider ndarray": lambda size: np.zeros(-(-size // 8), np.int64),
    "2-d ndarray": lambda size: np.zeros((2, -(-size // 2)), np.uint8),
    "array.array": lambda size: array.array("B", bytes(size)),
    "ctypes": lambda size: (ctypes.c_char * size)(),
    "mmap": lambda size: mmap.mmap(-1, size),
}


@pytest.mark.parametrize("size", [1, 1000, 100_000])
@pytest.mark.parametrize("target", TARGETS)
def test_recv_into_fills_any_writable_buffer(channel, target, size):
    payload = np.random.default_rng(size).bytes(size)
    channel.send(payload)
    buffer = TARGETS[target](size)
    assert channel.recv_into(buffer) == size
    assert memoryview(buffer).cast("B")[:size] == payload


def test_recv_into_leaves_the_rest_of_a_larger_buffer_alone(channel):
    channel.send(b"123")
    buffer = bytearray(b"xxxxxx")
    assert channel.recv_into(buffer) == 3
    assert buffer == b"123xxx"


@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (bytes(8), BufferError),
        (memoryview(b"12345678"), BufferError),
        (np.zeros(16, np.uint8)[::2], (BufferError, ValueError)),
        (read_only(np.zeros(8, np.uint8)), (BufferError, ValueError)),
        ("text", TypeError),
        (None, TypeError),
        (8, TypeError),
    ],
    ids=["bytes", "read-only view", "strided", "read-only array", "str", "None", "int"],
)
def test_recv_into_refuses_what_it_cannot_fill_and_keeps_the_message(channel, buffer, error):
    channel.send(b"kept")
    with pytest.raises(error):
        channel.recv_into(buffer)
    assert channel.recv_bytes() == b"kept"


# --- copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_copy_is_writable_and_holds_no_slot(channel, order):
    sent = np.array([[1, 2, 3], [4, 5, 6]], "i4", order=order)
    channel.send(sent)
    got = channel.recv_array(copy=True)
    assert channel.stats().free_slots == 4
    assert got.flags.f_contiguous == sent.flags.f_contiguous
    got[0, 0] = 99
    np.testing.assert_array_equal(got, [[99, 2, 3], [4, 5, 6]])
