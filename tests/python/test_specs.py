"""Typed channels: specs, what is checked where, records, and receiving into an array of the caller."""

import asyncio
import copy
import pickle
import struct
import threading

import numpy as np
import pytest

import dsline
from dsline import ArraySpec, _core
from dsline._core import channel_directory

RECORD = {
    "obs": ArraySpec((4, 6), "u1"),
    "state": ArraySpec((3,), "f8"),
    "reward": ArraySpec((), "f4"),
    "step": ArraySpec((), "i4"),
    "done": ArraySpec((), "?"),
    "tag": ArraySpec((), "S4"),
}


def record(step=7):
    return {
        "obs": np.arange(24, dtype="u1").reshape(4, 6),
        "state": np.array([1.5, 2.5, 3.5]),
        "reward": 0.25,
        "step": step,
        "done": True,
        "tag": b"abc",
    }


def assert_record(got, step=7):
    assert list(got) == list(RECORD)
    for name, spec in RECORD.items():
        assert (got[name].shape, got[name].dtype) == (spec.shape, spec.dtype)
        np.testing.assert_array_equal(got[name], record(step)[name])


# --- ArraySpec --------------------------------------------------------------------------------------------------

SPECS = {
    "plain": (ArraySpec((480, 640, 3), "u1"), "ArraySpec((480, 640, 3), 'uint8')", 921600),
    "scalar": (ArraySpec((), float), "ArraySpec((), 'float64')", 8),
    "an int is a shape": (ArraySpec(5, "f4"), "ArraySpec((5,), 'float32')", 20),
    "open": (ArraySpec((None, 3), "f4"), "ArraySpec((None, 3), 'float32')", None),
    "fortran": (ArraySpec((2, 3), "f4", order="F"), "ArraySpec((2, 3), 'float32', order='F')", 24),
    "byte order": (ArraySpec((2,), ">i4"), "ArraySpec((2,), '>i4')", 8),
    "dates": (ArraySpec((2,), "M8[ns]"), "ArraySpec((2,), 'datetime64[ns]')", 16),
    "text": (ArraySpec((2,), "U3"), "ArraySpec((2,), '<U3')", 24),
    "empty": (ArraySpec((0, 4), "f4"), "ArraySpec((0, 4), 'float32')", 0),
    "a subarray is dimensions": (ArraySpec((2,), ("f4", (3,))), "ArraySpec((2, 3), 'float32')", 24),
    "structure": (
        ArraySpec((2,), [("a", "f4"), ("b", "i2", (2,))]),
        "ArraySpec((2,), dtype([('a', '<f4'), ('b', '<i2', (2,))]))",
        16,
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_says_what_it_is(name):
    spec, text, nbytes = SPECS[name]
    assert (repr(spec), spec.nbytes, spec.ndim) == (text, nbytes, len(spec.shape))
    assert pickle.loads(pickle.dumps(spec)) == spec == copy.deepcopy(spec)
    assert hash(pickle.loads(pickle.dumps(spec))) == hash(spec)
    again = eval(text, {"ArraySpec": ArraySpec, "dtype": np.dtype})
    assert again == spec


@pytest.mark.parametrize(
    "other",
    [
        ArraySpec((3, 2), "f4"),
        ArraySpec((2, 3, 1), "f4"),
        ArraySpec((2, None), "f4"),
        ArraySpec((2, 3), "f8"),
        ArraySpec((2, 3), ">f4"),
        ArraySpec((2, 3), "f4", "F"),
        ArraySpec((2, 3), [("a", "f4")]),
        "ArraySpec((2, 3), 'float32')",
        None,
    ],
    ids=repr,
)
def test_specs_differ_by_everything_they_say(other):
    assert ArraySpec((2, 3), "f4") != other
    assert len({ArraySpec((2, 3), "f4"), other, ArraySpec((2, 3), np.float32)}) == 2


def test_field_names_and_offsets_are_part_of_a_spec():
    packed = ArraySpec((), [("a", "u1"), ("b", "f8")])
    assert packed != ArraySpec((), np.dtype([("a", "u1"), ("b", "f8")], align=True))
    assert packed != ArraySpec((), [("a", "u1"), ("c", "f8")])


def test_a_spec_cannot_be_changed():
    own = np.dtype([("a", "f4")])
    spec = ArraySpec((2,), own)
    own.names = ("renamed",)
    assert spec.dtype.names == ("a",)
    for name in ("shape", "_shape", "color"):
        with pytest.raises(AttributeError):
            setattr(spec, name, (3,))
    with pytest.raises(AttributeError):
        del spec._shape


def test_the_spec_of_an_array():
    array = np.zeros((2, 3), ">f4")
    assert ArraySpec.of(array) == ArraySpec((2, 3), ">f4")
    assert ArraySpec.of(array.T) == ArraySpec((3, 2), ">f4", "F")
    assert ArraySpec.of(array[:, ::2]) == ArraySpec((2, 2), ">f4")
    assert ArraySpec.of(np.float32(1)) == ArraySpec((), "f4")
    with pytest.raises(TypeError, match=r"numpy\.asarray"):
        ArraySpec.of([1, 2])


def test_what_a_spec_matches():
    spec = ArraySpec((None, 3), "f4")
    assert spec.matches(np.zeros((5, 3), "f4")) and spec.matches(np.zeros((0, 3), "f4"))
    assert not spec.matches(np.zeros((5, 4), "f4"))
    assert not spec.matches(np.zeros((5, 3), "f8"))
    assert not spec.matches(np.zeros(3, "f4"))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ArraySpec((-1,), "f4"), dsline.InvalidArgumentError, "-1"),
        (lambda: ArraySpec((1.5,), "f4"), TypeError, r"1\.5"),
        (lambda: ArraySpec("ab", "f4"), TypeError, "'a'"),
        (lambda: ArraySpec((2,), "f4", "K"), dsline.InvalidArgumentError, "'K'"),
        (lambda: ArraySpec((1,) * 65, "f4"), dsline.InvalidArgumentError, "65"),
        (lambda: ArraySpec((1 << 40, 1 << 40), "f4"), dsline.InvalidArgumentError, "larger"),
        (lambda: ArraySpec((2,), object), TypeError, "Python objects"),
        (lambda: ArraySpec((2,), "S"), dsline.InvalidArgumentError, "width"),
        (lambda: ArraySpec((2,), "nonsense"), TypeError, "nonsense"),
        (lambda: dsline.ShmChannel(spec="f4"), TypeError, "a str"),
        (lambda: dsline.ShmChannel(spec=np.dtype("f4")), TypeError, "ArraySpec"),
        (lambda: dsline.ShmChannel(spec={}), dsline.InvalidArgumentError, "empty dict"),
        (
            lambda: dsline.ShmChannel(spec={"": ArraySpec((), "f4")}),
            dsline.InvalidArgumentError,
            "field name",
        ),
        (lambda: dsline.ShmChannel(spec={1: ArraySpec((), "f4")}), dsline.InvalidArgumentError, "field name"),
        (lambda: dsline.ShmChannel(spec={"a": "f4"}), TypeError, r"spec\['a'\]"),
        (
            lambda: dsline.ShmChannel(spec={"a": ArraySpec((None,), "f4")}),
            dsline.InvalidArgumentError,
            "open dimension",
        ),
        (
            lambda: dsline.ShmChannel(spec={"a": ArraySpec((2, 3), "f4", "F")}),
            dsline.InvalidArgumentError,
            "C order",
        ),
        (
            lambda: dsline.ShmChannel(spec={"a": ArraySpec((1 << 31,), "f4")}),
            dsline.InvalidArgumentError,
            "structure",
        ),
        (
            lambda: dsline.ShmChannel(spec=ArraySpec((100,), "f4"), max_message_size=399),
            dsline.InvalidArgumentError,
            "399.*400 bytes",
        ),
    ],
)
def test_impossible_specs_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


# --- opening ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*(row[0] for row in SPECS.values()), RECORD], ids=[*SPECS, "record"])
def test_the_channel_keeps_its_spec(make_any, spec):
    channel = make_any(capacity=2, spec=spec)
    assert channel.spec == spec
    assert type(channel.spec) is type(spec)
    with channel.subscribe("log") as subscriber:
        assert subscriber.spec == spec


def test_slots_have_the_size_of_a_message(make_channel):
    assert make_channel(spec=ArraySpec((100, 100), "f8")).slot_size == 80_000
    assert make_channel(spec=ArraySpec((0,), "f8")).slot_size == 1
    assert make_channel(spec=ArraySpec((None,), "f8")).slot_size == 65536
    assert make_channel(spec=ArraySpec((100,), "f8"), slot_size=4096).slot_size == 4096


def test_an_opener_without_a_spec_takes_that_of_the_channel(make_channel, name):
    channel = make_channel(name, spec=RECORD)
    with dsline.ShmChannel.open(name) as second, dsline.ShmChannel(name) as third:
        assert second.spec == third.spec == RECORD
        second.send(record())
        assert_record(channel.recv_record(timeout=0))
        with pytest.raises(dsline.SchemaMismatchError):
            third.send(b"bytes")


def test_an_opener_with_the_same_spec_is_welcome(make_channel, name):
    make_channel(name, spec=ArraySpec((None, 2), "f4"))
    with (
        dsline.ShmChannel(name, spec=ArraySpec((None, 2), np.float32)) as second,
        dsline.ShmChannel.open(name, spec=ArraySpec((None, 2), "f4")) as third,
    ):
        assert second.spec == third.spec


def test_an_opener_with_another_spec_is_told_both(make_channel, name):
    channel = make_channel(name, spec=ArraySpec((3,), "f4"))
    for way in (dsline.ShmChannel, dsline.ShmChannel.open):
        for other in (ArraySpec((3,), "f8"), ArraySpec((None,), "f4"), {"a": ArraySpec((3,), "f4")}):
            with pytest.raises(dsline.SchemaMismatchError) as caught:
                way(name, spec=other)
            assert str(other) in str(caught.value)
            assert "ArraySpec((3,), 'float32')" in str(caught.value)
            assert name in str(caught.value)
    with dsline.ShmChannel(name, spec=ArraySpec((3,), "f4")):
        assert channel.stats().participants == 2


def test_a_channel_of_any_kind_does_not_become_typed(make_channel, name):
    make_channel(name)
    with pytest.raises(dsline.SchemaMismatchError, match="messages of any kind"):
        dsline.ShmChannel.open(name, spec=ArraySpec((3,), "f4"))


def test_the_order_of_fields_counts_and_the_error_says_so(make_channel, name):
    fields = {"a": ArraySpec((), "f4"), "b": ArraySpec((), "f8")}
    make_channel(name, spec=fields)
    with pytest.raises(dsline.SchemaMismatchError, match="another order"):
        dsline.ShmChannel(name, spec=dict(reversed(fields.items())))


def test_what_the_dead_left_keeps_its_spec_while_it_holds_messages(name):
    spec, other = ArraySpec((3,), "f4"), ArraySpec((4,), "f4")
    with dsline.ShmChannel(name, spec=spec) as channel:
        channel.send(np.zeros(3, "f4"))
    with pytest.raises(dsline.SchemaMismatchError):
        dsline.ShmChannel(name, spec=other)
    with dsline.ShmChannel(name) as channel:
        assert channel.spec == spec
        channel.recv_bytes(timeout=0)
        channel.send(np.zeros(3, "f4"))
    with dsline.ShmChannel(name, spec=other, on_stale="reset") as channel:
        assert (channel.spec, len(channel)) == (other, 0)


def test_files_keep_their_spec(tmp_path):
    path = tmp_path / "typed"
    with dsline.FileChannel.create(path, capacity=2, spec=RECORD) as channel:
        channel.send(record())
    with pytest.raises(dsline.SchemaMismatchError, match="reward"):
        dsline.FileChannel.open(path, spec=ArraySpec((1,), "f4"))
    with dsline.FileChannel.open(path, spec=RECORD) as channel:
        assert_record(channel.recv_record(timeout=0))


def test_a_pickled_handle_has_the_spec(make_channel):
    channel = make_channel(spec=RECORD)
    with pickle.loads(pickle.dumps(channel)) as again:
        assert again.spec == RECORD


@pytest.mark.parametrize("offset", [0, 5, 40, -1])
def test_a_damaged_spec_is_noticed(name, offset):
    spec = ArraySpec((3, None), [("first", "f4"), ("second", "u2")])
    with dsline.ShmChannel(name, capacity=2, spec=spec) as channel:
        channel.send(np.zeros((3, 1), spec.dtype))
        path = channel.path
    with open(path, "r+b") as file:
        file.seek(60 + 4 - 4)
        size = struct.unpack_from("<I", file.read(8), 4)[0]
        at = 4096 + (offset if offset >= 0 else size + offset)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(dsline.ChannelLayoutError, match="checksum of its spec"):
        dsline.ShmChannel.open(name)
    with dsline.ShmChannel(
        name, capacity=3
    ) as channel:  # replaced, as any damaged channel that nobody has open
        assert (channel.spec, channel.capacity) == (None, 3)


def tag(key, kind, value):
    """A metadata entry of docs/design/frame-format.md."""
    entry = bytes([len(key), kind]) + key + value
    return struct.pack("<HHI", 6, 0, len(entry)) + entry + bytes(-len(entry) % 8)


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"nonsense",
        tag(b"record", 1, b"\1"),
        _core.make_schema(RECORD).encoded + tag(b"open", 2, struct.pack("<q", 1)),
        _core.make_schema(RECORD).encoded + tag(b"open", 2, struct.pack("<q", -1)),
        _core.make_schema(ArraySpec((3,), "f4")).encoded + tag(b"open", 2, struct.pack("<q", 2)),
        _core.make_schema(ArraySpec((3,), "f4")).encoded + tag(b"record", 1, b"\1"),
        _core.make_schema(ArraySpec((), "f4")).encoded + tag(b"record", 1, b"\1"),
        _core.make_schema(ArraySpec((), "f4")).encoded[:-8],
    ],
)
def test_what_is_no_schema_is_refused(encoded):
    with pytest.raises(ValueError):
        _core.read_schema(encoded)


def test_unknown_tags_of_a_schema_are_passed_over():
    encoded = _core.make_schema(ArraySpec((3,), "f4")).encoded + tag(b"color", 4, b"red")
    assert _core.read_schema(encoded).spec == ArraySpec((3,), "f4")


# --- sending ----------------------------------------------------------------------------------------------------


def wrong_for_an_array():
    return {
        "bytes": (b"abcdefghabcd", "12 plain bytes"),
        "bytearray": (bytearray(12), "12 plain bytes"),
        "plain memoryview": (memoryview(b"abcdefghabcd"), "memoryview"),
        "dtype": (np.zeros(3, "f8"), "'float64' (3,)"),
        "byte order": (np.zeros(3, ">f4"), "'>f4' (3,)"),
        "shape": (np.zeros(4, "f4"), "'float32' (4,)"),
        "dimensions": (np.zeros((3, 1), "f4"), "'float32' (3, 1)"),
        "memoryview of another type": (memoryview(np.zeros(3, "i4")), "'int32' (3,)"),
        "a record": ({"a": np.zeros(3, "f4")}, "a dict"),
        "a list": ([1.0, 2.0, 3.0], "a list"),
        "masked": (np.ma.zeros(3, "f4"), "mask"),
        "objects": (np.array([1, "a", None], dtype=object), "object"),
    }


@pytest.mark.parametrize("case", wrong_for_an_array())
@pytest.mark.parametrize("meta", [None, {"a": 1}])
def test_what_does_not_fit_is_refused_and_nothing_is_sent(make_any, case, meta):
    channel = make_any(capacity=2, spec=ArraySpec((3,), "f4"))
    data, words = wrong_for_an_array()[case]
    for _ in range(3):  # nor after a refusal has been remembered
        with pytest.raises(dsline.SchemaMismatchError) as caught:
            channel.send(data, meta=meta)
        assert words in str(caught.value)
        assert "ArraySpec((3,), 'float32')" in str(caught.value)
    assert len(channel) == 0
    assert channel.stats().free_slots == 2
    channel.send(np.ones(3, "f4"), meta=meta)
    np.testing.assert_array_equal(channel.recv_array(timeout=0), np.ones(3, "f4"))


def test_a_wrong_one_among_many_is_refused(make_channel):
    channel = make_channel(spec=ArraySpec((3,), "f4"))
    good = np.ones(3, "f4")
    with pytest.raises(dsline.SchemaMismatchError):
        channel.send_many([good, good, np.ones(4, "f4"), good])
    assert len(channel) == 2


@pytest.mark.parametrize("shape", [(0, 2), (1, 2), (7, 2), (1000, 2)])
def test_an_open_axis_takes_any_length(make_any, shape):
    channel = make_any(capacity=2, spec=ArraySpec((None, 2), "i4"))
    sent = np.arange(np.prod(shape), dtype="i4").reshape(shape)
    for _ in range(3):
        channel.send(sent)
        got = channel.recv_array(timeout=0)
        assert got.shape == shape
        np.testing.assert_array_equal(got, sent)
        del got
    for wrong in (np.zeros((2, 3), "i4"), np.zeros(2, "i4"), np.zeros(shape, "u4")):
        with pytest.raises(dsline.SchemaMismatchError):
            channel.send(wrong)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("given", ["C", "F", "strided", "negative"])
def test_the_spec_says_the_order_in_which_arrays_arrive(make_channel, order, given):
    channel = make_channel(spec=ArraySpec((4, 6), "i4", order=order))
    source = np.arange(24, dtype="i4").reshape(4, 6)
    data = {
        "C": source,
        "F": np.asfortranarray(source),
        "strided": np.repeat(source, 2, axis=1)[:, ::2],
        "negative": np.ascontiguousarray(source[::-1])[::-1],
    }[given]
    for _ in range(2):
        channel.send(data)
        got = channel.recv_array(timeout=0)
        np.testing.assert_array_equal(got, source)
        assert got.flags["C_CONTIGUOUS" if order == "C" else "F_CONTIGUOUS"]
        del got


def test_equal_dtypes_of_other_objects_fit(make_channel):
    spec = ArraySpec((2,), [("a", "f4"), ("b", "i4")])
    channel = make_channel(spec=spec)
    for dtype in (np.dtype([("a", "f4"), ("b", "i4")]), np.dtype([("a", "<f4"), ("b", "<i4")])):
        channel.send(np.ones(2, dtype))
        assert channel.recv_array(timeout=0).dtype == spec.dtype
    with pytest.raises(dsline.SchemaMismatchError):
        channel.send(np.ones(2, [("a", "f4"), ("c", "i4")]))


def test_metadata_travels_with_typed_messages(make_any):
    channel = make_any(spec=ArraySpec((2,), "f4"))
    for number in range(3):
        channel.send(np.full(2, number, "f4"), meta={"number": number})
    for number in range(3):
        with channel.recv_message(timeout=0) as message:
            assert message.meta == {"number": number}
            np.testing.assert_array_equal(message.array(), np.full(2, number, "f4"))


def test_every_way_to_receive_works_on_a_typed_channel(make_any):
    channel = make_any(spec=ArraySpec((2,), "i2"))
    sent = np.array([1, 2], "i2")
    channel.send_many([sent] * 6)
    assert channel.recv(timeout=0).tolist() == [1, 2]
    assert channel.recv_bytes(timeout=0) == sent.tobytes()
    buffer = bytearray(4)
    assert channel.recv_into(buffer, timeout=0) == 4
    assert buffer == sent.tobytes()
    assert [view.tolist() for view in channel.recv_many(2, timeout=0)] == [[1, 2], [1, 2]]
    assert next(channel).tolist() == [1, 2]


def test_the_interface_of_compiled_code_is_refused_too(make_channel):
    """What a foreign sender puts in shows in `a_message_of_another_spec`; the calls of this process are checked."""
    channel = make_channel(spec=ArraySpec((2,), "i2"))
    with pytest.raises(dsline.SchemaMismatchError):
        channel.send_nowait(b"1234")
    assert len(channel) == 0


# --- records ----------------------------------------------------------------------------------------------------


def test_a_record_arrives_field_by_field(make_any):
    channel = make_any(capacity=3, spec=RECORD)
    for step in range(5):
        assert channel.send(record(step))
        got = channel.recv_record(timeout=0)
        assert_record(got, step)
        assert not any(field.flags.writeable for field in got.values())
        with pytest.raises(ValueError, match="read-only"):
            got["obs"][0, 0] = 1
        del got


def test_one_field_keeps_the_slot(make_channel):
    channel = make_channel(capacity=1, spec=RECORD, max_pinned="unlimited")
    channel.send(record())
    state = channel.recv_record(timeout=0)["state"]
    assert channel.stats().pinned_slots == 1
    with pytest.raises(dsline.BufferFullError):
        channel.send(record(), timeout=0)
    np.testing.assert_array_equal(state, record()["state"])
    del state
    assert channel.send(record(), timeout=0)


def test_a_record_is_one_structure(make_channel):
    channel = make_channel(spec=RECORD)
    channel.send(record(), meta={"a": 1})
    with channel.recv_message(timeout=0) as message:
        assert message.meta == {"a": 1}
        whole = message.array()
        assert whole.shape == ()
        assert whole.dtype.isalignedstruct
        assert whole["reward"] == 0.25
        assert_record(message.record())
        del whole
    channel.send(record())
    got = channel.recv_array(timeout=0)
    channel.send(got)  # the structure itself is a record, too
    assert_record(channel.recv_record(timeout=0))


def test_fields_of_any_strides_are_copied_once(make_channel):
    channel = make_channel(spec={"a": ArraySpec((50, 40, 3), "u1"), "b": ArraySpec((300, 400), "f8")})
    a = np.arange(6000, dtype="u1").reshape(3, 40, 50).T
    b = np.arange(480000, dtype="f8").reshape(300, 800 * 2)[:, ::4]
    channel.send({"b": b, "a": a})
    got = channel.recv_record(timeout=0)
    assert list(got) == ["a", "b"]
    np.testing.assert_array_equal(got["a"], a)
    np.testing.assert_array_equal(got["b"], b)


VALUES = {
    "int for float": ("f4", 3, 3.0),
    "bool for int": ("i4", True, 1),
    "float for complex": ("c8", 1.5, 1.5),
    "double for single": ("f4", np.float64(0.1), np.float32(0.1)),
    "limit": ("u1", 255, 255),
    "signed limit": ("i1", -128, -128),
    "wide unsigned for signed": ("i4", np.uint64(5), 5),
    "infinity": ("f4", float("inf"), np.inf),
    "largest float": ("f4", float(np.finfo("f4").max), np.finfo("f4").max),
    "large int for double": ("f8", 10**30, 1e30),
    "bytes": ("S4", b"abcd", b"abcd"),
    "text": ("U4", "äöü", "äöü"),
    "numpy text": ("U4", np.str_("ab"), "ab"),
    "date": ("M8[s]", np.datetime64("2020-01-01", "s"), np.datetime64("2020-01-01", "s")),
    "0-d array": ("f4", np.array(2.0, "f4"), 2.0),
}


@pytest.mark.parametrize("case", VALUES)
def test_scalars_are_converted_where_nothing_but_precision_is_lost(make_channel, case):
    dtype, value, wanted = VALUES[case]
    channel = make_channel(spec={"x": ArraySpec((), dtype)})
    channel.send({"x": value})
    assert channel.recv_record(timeout=0)["x"] == np.asarray(wanted, dtype)


WRONG_VALUES = {
    "float for int": ("i4", 0.5),
    "int for bool": ("?", 1),
    "complex for float": ("f4", 1j),
    "too large": ("u1", 256),
    "negative for unsigned": ("u1", -1),
    "far too large": ("i8", 10**30),
    "overflow": ("f4", 1e300),
    "an int beyond all floats": ("f8", 10**400),
    "an int beyond the floats of the field": ("f4", 10**40),
    "long bytes": ("S4", b"abcde"),
    "text for bytes": ("S4", "abc"),
    "bytes for text": ("U4", b"abc"),
    "unit of a date": ("M8[s]", np.datetime64("2020-01-01", "ns")),
    "None": ("f4", None),
    "a list": ("f4", [1.0]),
    "array of another dtype": ("f4", np.array(2.0)),
    "array of another shape": ("f4", np.zeros(1, "f4")),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_other_values_of_a_field_are_refused(make_channel, case):
    dtype, value = WRONG_VALUES[case]
    channel = make_channel(spec={"first": ArraySpec((), "f4"), "x": ArraySpec((), dtype)})
    with pytest.raises(dsline.SchemaMismatchError, match="'x'") as caught:
        channel.send({"first": 1.0, "x": value})
    assert "nothing was sent" in str(caught.value)
    assert (len(channel), channel.stats().free_slots) == (0, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.pop("state"), "without 'state'"),
        (lambda value: value.update(extra=1), "'extra'"),
        (lambda value: value.update(obs=np.zeros((4, 6), "i1")), "'obs'"),
        (lambda value: value.update(obs=np.zeros((6, 4), "u1")), r"\(6, 4\)"),
        (lambda value: value.update(state=1.0), "'state'"),
    ],
)
def test_records_that_do_not_fit_are_refused(make_any, change, words):
    channel = make_any(capacity=1, spec=RECORD)
    value = record()
    change(value)
    with pytest.raises(dsline.SchemaMismatchError, match=words):
        channel.send(value)
    assert len(channel) == 0
    assert channel.send(record(), timeout=0)


def test_bytes_and_arrays_are_no_records(make_channel):
    channel = make_channel(spec=RECORD)
    for wrong in (b"x" * 80, np.zeros((4, 6), "u1"), [1], 5):
        with pytest.raises(dsline.SchemaMismatchError, match="reward"):
            channel.send(wrong)


def test_a_dict_needs_a_channel_of_records(make_channel):
    with pytest.raises(TypeError, match="dict"):
        make_channel().send(record())


def test_recv_record_leaves_what_is_no_record(make_channel):
    channel = make_channel()
    channel.send(b"bytes")
    with pytest.raises(dsline.SchemaMismatchError, match="plain bytes"):
        channel.recv_record(timeout=0)
    assert channel.recv_bytes(timeout=0) == b"bytes"
    channel.send(np.zeros(3))
    with pytest.raises(dsline.SchemaMismatchError, match="no record"):
        channel.recv_record(timeout=0)
    with channel.recv_message(timeout=0) as message:
        assert message.attempt == 1
        with pytest.raises(dsline.SchemaMismatchError):
            message.record()
    assert channel.stats().redelivered == 0


def test_structured_arrays_of_any_channel_are_records(make_channel):
    channel = make_channel()
    channel.send(np.array((1, 2.5), [("a", "i4"), ("b", "f8")]))
    assert {name: value.item() for name, value in channel.recv_record(timeout=0).items()} == {
        "a": 1,
        "b": 2.5,
    }


def test_a_record_waits_for_room_like_anything_else(make_channel):
    channel = make_channel(capacity=1, spec=RECORD)
    channel.send(record(1))
    sender = threading.Thread(target=channel.send, args=(record(2),))
    sender.start()
    for step in (1, 2):
        assert_record(channel.recv_record(timeout=30), step)
    sender.join()


def test_records_and_arrays_are_written_in_place(make_channel):
    channel = make_channel(spec=RECORD, zero_copy=True)
    structure = np.empty((), ArraySpec.of(_structure(channel)).dtype).dtype
    for step in range(3):
        with channel.alloc((), structure) as loan:
            for field, value in record(step).items():
                loan.array[field] = value
        assert_record(channel.recv_record(timeout=0), step)
    for shape, dtype in (((1,), structure), ((), "f4"), ((4, 6), "u1")):
        with pytest.raises(dsline.SchemaMismatchError):
            channel.alloc(shape, dtype)
    arrays = make_channel(spec=ArraySpec((None, 3), "f4"), zero_copy=True)
    with arrays.alloc((5, 3), "f4", fill=2) as loan:
        loan.meta["a"] = 1
    with arrays.recv_message(timeout=0) as message:
        assert message.meta == {"a": 1}
        assert message.array().sum() == 30
    with pytest.raises(dsline.SchemaMismatchError):
        arrays.alloc((5, 4), "f4")
    assert arrays.stats().free_slots == 64


def _structure(channel):
    channel.send(record())
    return channel.recv_array(timeout=0)


def test_records_under_asyncio(make_channel):
    channel = make_channel(capacity=1, spec=RECORD)

    async def main():
        messages = dsline.aio.AsyncChannel(channel)
        sender = asyncio.create_task(send_all(messages))
        for step in range(3):
            assert_record(await messages.recv_record(timeout=30), step)
        await sender
        with pytest.raises(dsline.SchemaMismatchError):
            await messages.send(b"x")
        await messages.send(record())
        out = np.empty((), np.dtype(channel.recv_array(timeout=0).dtype))
        await messages.send(record())
        assert await messages.recv_array(out=out) is out
        assert out["step"] == 7

    async def send_all(messages):
        for step in range(3):
            await messages.send(record(step), timeout=30)

    asyncio.run(main())


# --- other kinds of channels ------------------------------------------------------------------------------------


def test_broadcasts_and_their_subscribers(make_broadcast):
    channel = make_broadcast(spec=RECORD)
    with channel.subscribe("a") as first, channel.subscribe("b") as second:
        channel.send(record())
        assert_record(first.recv_record(timeout=0))
        assert_record(second.recv_record(timeout=0))
        with pytest.raises(dsline.SchemaMismatchError):
            channel.send(b"x")


def test_the_latest_record(name):
    with dsline.Latest(name, spec=RECORD) as cell, dsline.Latest.open(name, spec=RECORD) as reader:
        assert reader.spec == RECORD
        for step in range(12):
            assert cell.set(record(step), meta={"step": step})
            assert_record(reader.get(), step)
        assert_record(reader.read().value, 11)
        assert_record(reader.wait_newer(None, timeout=0)[0], 11)
        assert_record(reader.get_with_sequence()[0], 11)
        assert reader.get()["obs"].flags.writeable
        with pytest.raises(dsline.SchemaMismatchError):
            cell.set(b"x")
        with pytest.raises(dsline.SchemaMismatchError):
            dsline.Latest(name, spec=ArraySpec((), "f4"))


# --- a peer that ignores the spec -------------------------------------------------------------------------------


class Frame:
    """The first frame of a channel without checksums, to be changed from outside."""

    def __init__(self, channel):
        assert channel.path.startswith(channel_directory())
        self.path = channel.path
        with open(self.path, "rb") as file:
            self.at = struct.unpack_from("<Q", file.read(256), 128)[0]
            file.seek(self.at)
            assert file.read(4) == b"DSLF"

    def poke(self, offset, data):
        with open(self.path, "r+b") as file:
            file.seek(self.at + offset)
            file.write(data)


FOREIGN = {
    "bytes": lambda frame: frame.poke(5, b"\0"),
    "another hash": lambda frame: frame.poke(24, b"\1\2\3\4\5\6\7\1"),
    # the entry of the dtype comes first: head of 8, then letter, order, detail, 0, size
    "another dtype": lambda frame: frame.poke(64 + 8, b"i"),
    "another shape": lambda frame: frame.poke(64 + 16 + 8, struct.pack("<2q", 3, 2)),
}


@pytest.mark.parametrize("way", ["recv", "recv_array", "recv_bytes", "recv_message", "recv_record"])
@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("spec", [ArraySpec((2, 3), "f4"), ArraySpec((2, None), "f4")], ids=["fixed", "open"])
def test_a_message_of_another_spec_is_dropped_and_the_stream_goes_on(make_channel, spec, what, way):
    channel = make_channel(capacity=1, checksum="none", spec=spec)
    good = np.arange(6, dtype="f4").reshape(2, 3)
    for remembered in (False, True):
        if remembered:
            channel.send(good)
            np.testing.assert_array_equal(channel.recv_array(timeout=0), good)
        channel.send(good)
        FOREIGN[what](Frame(channel))
        with pytest.raises(dsline.CorruptedMessageError, match="spec of the channel") as caught:
            getattr(channel, way)(timeout=0)
        assert caught.value.sequence is not None
        assert len(channel) == 0
    channel.send(good, timeout=0)
    np.testing.assert_array_equal(channel.recv_array(timeout=0), good)


# --- into an array of the caller --------------------------------------------------------------------------------


def outs(shape, dtype):
    wide = np.zeros((*shape[:-1], shape[-1] * 2), dtype)
    return {
        "C": np.zeros(shape, dtype),
        "F": np.zeros(shape, dtype, order="F"),
        "strided": wide[..., ::2],
        "negative": np.zeros(shape, dtype)[::-1],
    }


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("which", ["C", "F", "strided", "negative"])
@pytest.mark.parametrize("shape", [(3, 5), (300, 500)])
@pytest.mark.parametrize("dtype", ["f4", "M8[ms]", "V5", [("a", "i4"), ("b", "f8", (2,))]])
def test_out_is_filled(make_channel, order, which, shape, dtype):
    channel = make_channel(capacity=1)
    size = np.prod(shape) * np.dtype(dtype).itemsize
    source = np.frombuffer(np.random.default_rng(0).bytes(size), dtype).reshape(shape)
    out = outs(shape, dtype)[which]
    for _ in range(2):
        channel.send(np.asarray(source, order=order), timeout=0)
        assert channel.recv_array(out=out, timeout=0) is out
        assert out.tobytes() == source.tobytes()
        out[...] = np.zeros((), dtype)
    assert channel.stats().pinned_slots == 0
    assert channel.stats().received == 2


def test_out_of_no_dimensions_and_of_no_elements(make_channel):
    channel = make_channel()
    channel.send(np.array(5.0))
    assert channel.recv_array(out=np.zeros(()), timeout=0) == 5.0
    channel.send(np.zeros((0, 3)))
    assert channel.recv_array(out=np.ones((0, 3)), timeout=0).shape == (0, 3)


@pytest.mark.parametrize(
    "out",
    [np.zeros(4, "f4"), np.zeros((3, 1), "f4"), np.zeros(3, "i4"), np.zeros(3, ">f4"), np.zeros((), "f4")],
)
def test_out_that_does_not_fit_leaves_the_message(make_any, out):
    channel = make_any()
    channel.send(np.arange(3, dtype="f4"))
    with pytest.raises(dsline.SchemaMismatchError, match=r"'float32' \(3,\)"):
        channel.recv_array(out=out, timeout=0)
    assert (len(channel), channel.stats().pinned_views) == (1, 0)
    assert not out.any()
    with channel.recv_message(timeout=0) as message:
        assert message.attempt == 1


def test_out_that_cannot_be_written_takes_nothing(make_channel):
    channel = make_channel()
    channel.send(np.arange(3, dtype="f4"))
    frozen = np.zeros(3, "f4")
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        channel.recv_array(out=frozen, timeout=0)
    with pytest.raises(TypeError, match="bytearray"):
        channel.recv_array(out=bytearray(12), timeout=0)
    assert channel.stats().received == 0
    channel.recv_bytes(timeout=0)
    channel.send(b"plain bytes!")
    with pytest.raises(dsline.SchemaMismatchError, match="plain bytes"):
        channel.recv_array(out=np.zeros(3, "f4"), timeout=0)
    assert channel.recv_bytes(timeout=0) == b"plain bytes!"


def test_other_threads_run_while_a_large_message_is_copied_out(make_channel):
    """The GIL is free during the copy: a thread that counts gets on."""
    channel = make_channel(capacity=1)
    source = np.ones((64 << 20) // 8)
    out = np.empty_like(source)
    counted = [0]
    stop = threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    gained = []
    for _ in range(5):
        channel.send(source)
        before = counted[0]
        channel.recv_array(out=out, timeout=0)
        gained.append(counted[0] - before)
    stop.set()
    thread.join()
    assert max(gained) > 0
    assert out.all()
