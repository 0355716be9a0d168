from __future__ import annotations

import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dsline import dtypes
from dsline.dtypes import buffer_format, decode_dtype, encode_dtype

SCALARS = [
    *"?bhilqpBHILQPefdgFDG",
    *("<i2", ">i2", "<u4", ">u4", "<i8", ">i8", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "<g", ">g"),
    *("<F", ">F", "<D", ">D", "<G", ">G"),
    *("S0", "S1", "S7", "U0", "<U1", ">U1", "<U300", ">U300", "V0", "V1", "V16"),
    *("<M8", ">M8", "<m8", ">m8"),
    *(f"{order}{kind}8[{unit}]" for order in "<>" for kind in "Mm" for unit in dtypes._UNITS[1:]),
    *("M8[25s]", ">m8[7D]", "M8[2147483647ns]", "M8[1000ms]"),
]

STRUCTURES = [
    np.dtype([]),
    np.dtype([("a", "i4")]),
    np.dtype([("a", "i1"), ("b", ">f8"), ("c", "S3"), ("d", "M8[us]")]),
    np.dtype([("a", "i1"), ("b", "f8")], align=True),
    np.dtype([(("the title", "a"), "i4"), ("b", "i4")]),
    np.dtype([(("", "a"), "i4"), ("", "i4")]),
    np.dtype([("größe", "f4"), ("😀", "f4"), ("nul\0", "f4")]),
    np.dtype([("m", "f4", (3, 4)), ("z", "i2", (0,)), ("one", "i2", (1,))]),
    np.dtype([("in", [("x", "f4"), ("y", [("z", ">u2", (2,))])], (5,)), ("s", "S0")]),
    np.dtype({"names": ["b", "a"], "formats": ["i4", "i2"], "offsets": [8, 0], "itemsize": 20}),
    np.dtype({"names": ["whole", "half"], "formats": ["i4", "i2"], "offsets": [0, 2]}),
    np.dtype({"names": [], "formats": [], "itemsize": 8}),
    np.dtype({"names": ["end"], "formats": ["V0"], "offsets": [8], "itemsize": 8}),
    np.dtype((np.record, [("a", "i4"), ("b", (np.record, [("c", "f8")]))])),
    np.dtype((np.record, np.dtype([("a", "i1"), ("b", "i4")], align=True))),
    np.dtype({"names": [""], "formats": ["i4"]}),
    np.dtype([(f"f{i}", "u1") for i in range(1024)]),
]

SUBARRAYS = [
    np.dtype(("i4", (2, 3))),
    np.dtype((np.dtype((">i4", (2,))), (3,))),
    np.dtype(("i4", (0, 5))),
    np.dtype(("u1", (1,) * 32)),
]


def nested(depth: int) -> np.dtype:
    dtype = np.dtype("f8")
    for _ in range(depth - 1):
        dtype = np.dtype([("a", dtype)])
    return dtype


def assert_same(got: np.dtype, expected: np.dtype) -> None:
    """Equal in more than `==`, which neglects units, alignment flags and record types."""
    assert got == expected
    assert got.itemsize == expected.itemsize
    assert got.kind == expected.kind
    assert got.type is expected.type or got.kind in "iu"
    assert got.names == expected.names
    assert got.isalignedstruct == expected.isalignedstruct
    if expected.kind in "Mm":
        assert np.datetime_data(got) == np.datetime_data(expected)
    if expected.itemsize > 0 and expected.kind in "iufcMmU":
        assert (got.byteorder in "=<") == (expected.byteorder in "=<")
    if expected.subdtype is not None:
        assert got.subdtype is not None
        assert got.shape == expected.shape
        assert_same(got.base, expected.base)
    for name in expected.names or ():
        field, offset, *title = expected.fields[name]
        got_field, got_offset, *got_title = got.fields[name]
        assert (got_offset, got_title) == (offset, title)
        assert_same(got_field, field)


@pytest.fixture(autouse=True)
def fresh_caches():
    dtypes._codes.clear()
    dtypes._decode.cache_clear()
    buffer_format.cache_clear()


@pytest.mark.parametrize("name", SCALARS)
def test_scalar_dtypes_come_back(name):
    assert_same(decode_dtype(encode_dtype(np.dtype(name))), np.dtype(name))
    assert len(encode_dtype(np.dtype(name))) == 8


@pytest.mark.parametrize("dtype", STRUCTURES, ids=lambda dtype: str(dtype)[:40])
def test_structures_come_back(dtype):
    assert_same(decode_dtype(encode_dtype(dtype)), dtype)


@pytest.mark.parametrize("dtype", SUBARRAYS, ids=str)
def test_subarrays_come_back(dtype):
    assert_same(decode_dtype(encode_dtype(dtype)), dtype)


ANY_DTYPE = npst.nested_dtypes(
    st.one_of(npst.scalar_dtypes(), npst.byte_string_dtypes(), npst.unicode_string_dtypes()), max_leaves=12
)


@hypothesis.given(ANY_DTYPE)
@hypothesis.settings(deadline=None, max_examples=300, suppress_health_check=[hypothesis.HealthCheck.too_slow])
def test_any_dtype_comes_back(dtype):
    assert_same(decode_dtype(encode_dtype(dtype)), dtype)


def test_the_code_is_the_one_of_the_byte_table():
    assert encode_dtype(np.dtype("<f4")).hex(" ", 4) == "66010000 04000000"
    assert encode_dtype(np.dtype(">M8[25s]")).hex(" ", 4) == "4d020700 19000000"
    assert encode_dtype(np.dtype(("<i2", (3,)))).hex(" ", 4) == "61000100 00000000 03000000 69010000 02000000"
    structure = np.dtype([(("t", "ab"), "?")], align=True)
    assert encode_dtype(structure) == (
        bytes.fromhex("72000100 01000000 01000000 00000000 02000000 01000000")
        + b"abt"
        + bytes.fromhex("6200000001000000")
    )


def test_native_order_is_written_as_what_it_is():
    assert encode_dtype(np.dtype("=i4")) == encode_dtype(np.dtype(f"{dtypes._NATIVE}i4"))


def test_metadata_is_dropped():
    dtype = np.dtype("i4", metadata={"unit": "m"})
    assert decode_dtype(encode_dtype(dtype)).metadata is None
    assert encode_dtype(dtype) == encode_dtype(np.dtype("i4"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.dtype("M8[1000ms]"), np.dtype("M8[s]")),
        (np.dtype([("a", "i4")]), np.dtype((np.record, [("a", "i4")]))),
        (
            np.dtype("i1,i4", align=True),
            np.dtype({"names": ["f0", "f1"], "formats": ["i1", "i4"], "offsets": [0, 4]}),
        ),
    ],
    ids=["unit", "record", "align"],
)
def test_the_cache_keeps_equal_dtypes_apart(first, second):
    assert first == second
    for dtype in (first, second, first):
        assert_same(decode_dtype(encode_dtype(dtype)), dtype)


def test_the_cache_sees_fields_renamed_in_place():
    dtype = np.dtype([("a", "i4"), ("b", "i4")])
    encode_dtype(dtype)
    dtype.names = ("x", "y")
    assert decode_dtype(encode_dtype(dtype)).names == ("x", "y")


def test_the_cache_does_not_hand_out_a_dtype_that_a_caller_renamed():
    code = encode_dtype(np.dtype([("a", "i4"), ("b", "i4")]))
    decode_dtype(code).names = ("x", "y")
    assert decode_dtype(code).names == ("a", "b")


def test_the_cache_is_bounded():
    kept = [np.dtype(f"V{size}") for size in range(1, 2000)]
    for dtype in kept:
        encode_dtype(dtype)
    assert len(dtypes._codes) <= dtypes._CACHED


class Scalar(np.void):
    pass


REFUSED = {
    "object": (np.dtype(object), "Python objects"),
    "structure with object": (np.dtype([("a", "i4"), ("b", object)]), "Python objects"),
    "subarray of object": (np.dtype((object, (2,))), "Python objects"),
    "deep object": (np.dtype([("a", [("b", object, (2,))])]), "Python objects"),
    "own scalar": (np.dtype((Scalar, [("a", "i4")])), "Scalar"),
    "own scalar without fields": (np.dtype((Scalar, 4)), "Scalar"),
    "integer with fields": (np.dtype((np.int32, {"lo": (np.int16, 0), "hi": (np.int16, 2)})), "int32"),
    "title": (np.dtype({"names": ["a"], "formats": ["i4"], "titles": [5]}), "title of field 'a' is a int"),
    "surrogate": (np.dtype([("a\ud800", "i4")]), "not valid Unicode"),
    "depth": (nested(17), "deeper than 16"),
    "fields": (np.dtype([(f"f{i}", "u1") for i in range(1025)]), "more than 1024 fields"),
    "fields of all levels": (
        np.dtype(
            [("a", [(f"f{i}", "u1") for i in range(600)]), ("b", [(f"f{i}", "u1") for i in range(600)])]
        ),
        "more than 1024 fields",
    ),
}

if hasattr(np, "dtypes") and hasattr(np.dtypes, "StringDType"):  # from NumPy 2.0 on
    REFUSED["StringDType"] = (np.dtypes.StringDType(), r"StringDType\(\) is not a fixed-width dtype")


@pytest.mark.parametrize(("dtype", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_travel_is_refused_with_its_name_and_the_way_out(dtype, reason):
    with pytest.raises(TypeError, match=reason) as caught:
        encode_dtype(dtype)
    assert repr(dtype)[:100] in str(caught.value)
    assert "astype" in str(caught.value)
    assert "bytes" in str(caught.value)


def test_the_deepest_dtype_comes_back():
    assert_same(decode_dtype(encode_dtype(nested(16))), nested(16))


@pytest.mark.parametrize(
    "code",
    [
        "",
        "66",
        "66010000040000",
        "660100000400000000",
        "66000000 04000000",
        "66030000 04000000",
        "66010100 04000000",
        "66010001 04000000",
        "66010000 05000000",
        "4f000000 08000000",
        "69010000 01000000",
        "62010000 01000000",
        "55010000 05000000",
        "53010000 05000000",
        "53000000 00000080",
        "4d010700 00000000",
        "4d010000 02000000",
        "4d010e00 01000000",
        "61000000 00000000 66010000 04000000",
        "61000100 01000000 02000000 66010000 04000000",
        "61000100 00000000 ffffffff 66010000 04000000",
        "61000200 00000000 00000000 ffffff7f 66010000 04000000",
        "72000000 04000000 ffffffff",
        "72000400 04000000 00000000",
        "72000000 03000000 01000000 00000000 01000000 ffffffff 61 66010000 04000000",
        "72000000 04000000 01000000 01000000 01000000 ffffffff 61 66010000 04000000",
        "72000000 04000000 01000000 00000000 01000000 ffffffff ff 66010000 04000000",
        "72000000 04000000 01000000 00000000 ff000000 ffffffff 61 66010000 04000000",
        "72000000 04000000 01000000 00000000 01000000 01000000 6161 66010000 04000000",
        "72000100 06000000 01000000 01000000 01000000 ffffffff 61 66010000 04000000",
    ],
)
def test_malformed_codes_are_refused(code):
    with pytest.raises(ValueError, match=r"."):
        decode_dtype(bytes.fromhex(code))


def test_codes_past_the_limits_are_refused():
    code = encode_dtype(nested(16))
    head = bytes.fromhex("72000000 08000000 01000000 00000000 01000000 ffffffff 61")
    with pytest.raises(ValueError, match="limit"):
        decode_dtype(head + code)
    wide = encode_dtype(np.dtype([(f"f{i}", "V0") for i in range(1024)]))
    assert len(decode_dtype(wide).names) == 1024
    with pytest.raises(ValueError, match="limit"):
        decode_dtype(head.replace(b"\x08", b"\x00", 1) + wide)


def test_mutated_codes_raise_valueerror_or_are_dtypes_that_encode_to_themselves():
    draw = random.Random(20240711)
    seeds = [encode_dtype(dtype) for dtype in [*STRUCTURES[:-1], *SUBARRAYS, *map(np.dtype, SCALARS)]]
    outcomes = {"refused": 0, "accepted": 0}
    for _ in range(20_000):
        code = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 3)):
            code[draw.randrange(len(code))] = draw.choice((0, 1, 2, 8, 0x61, 0x7F, 0xFF, draw.randrange(256)))
        try:
            dtype = decode_dtype(bytes(code))
        except ValueError:
            outcomes["refused"] += 1
        else:
            outcomes["accepted"] += 1
            assert encode_dtype(dtype) == bytes(code)
    assert min(outcomes.values()) > 500


@pytest.mark.parametrize(
    "dtype",
    [
        *(np.dtype(c) for c in "?bhilqBHILQefdgFDG"),
        *(np.dtype(c) for c in (">f4", ">i8", ">D", "S3", "U4", ">U4", "V3", "S0", "U0", "V0")),
        np.dtype([("a", "i1"), ("b", ">f8"), ("m", "f4", (2, 3))]),
        np.dtype([("a", "i1"), ("b", "f8")], align=True),
        np.dtype([]),
    ],
    ids=str,
)
def test_buffer_format_is_the_one_of_numpy(dtype):
    array = np.ndarray((2,), dtype, bytes(2 * dtype.itemsize))
    assert buffer_format(dtype) == memoryview(array).format.encode()


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype("M8[s]"),
        np.dtype("m8"),
        np.dtype("g").newbyteorder(),
        np.dtype("G").newbyteorder(),
        np.dtype([("a", "M8[s]")]),
        np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 2]}),
        np.dtype([("a:b", "i4")]),
        np.dtype([("nul\0", "i4")]),
        np.dtype({"names": [], "formats": [], "itemsize": 8}),
        np.dtype(("i4", (2,))),
    ],
    ids=repr,
)
def test_buffer_format_is_none_where_numpy_cannot_export_or_read_it_back(dtype):
    assert buffer_format(dtype) is None
