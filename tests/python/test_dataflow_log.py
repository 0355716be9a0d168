"""The log behind file://: what is written comes back, and nothing that stands in its files does harm."""

import contextlib
import datetime
import decimal
import errno
import mmap
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import STRICT, TIMEOUT, wait_until

import dsline
from dsline._core import crc32c
from dsline.dataflow.items import Batch, same
from dsline.dataflow.log import LogReader, LogWriter, log_schema
from dsline.dataflow.records import unpack

RECORDS = np.zeros(3, [("a", "i4"), ("b", "f8", (2,))])

ITEMS = [
    np.arange(10),
    np.zeros((3, 4), "f4"),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.arange(20)[::2],
    np.array(3),
    np.zeros((0, 5), "S3"),
    np.zeros(2, "S0"),
    np.array(["2020-02-03"], "M8[D]"),
    np.array(["text"], ">U6"),
    RECORDS,
    Batch(a=[1, 2, 3], b=[1.0, 2.0, np.nan]),
    Batch(b=np.arange(5000)),
    b"bytes",
    b"",
    3,
    None,
    "text",
    {"array": np.arange(2000), "word": "x", "more": [1, (2.5, {3}), None]},
    np.float32(1.5),
    np.datetime64("2021-01-01"),
    datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC),
    decimal.Decimal("1.50"),
    pathlib.Path("somewhere"),
    uuid.UUID(int=5),
    {"batch": Batch(t=np.arange(1000))},
    2**100,
    {1, 2},
    frozenset("ab"),
    1 + 2j,
    {"r" * 300: "p1\n", "bytearray": bytearray(b"x"), "many": [str(n) for n in range(300)]},
]


def write(path, items, **options):
    with LogWriter(path, **options) as writer:
        for item in items:
            writer.append(item)
    return writer


def read(path, **options):
    with LogReader(path, **options) as reader:
        return [record.item() for record in reader]


def segments(path):
    return sorted(each for each in pathlib.Path(path).iterdir() if each.suffix == ".dsl")


def last_segment(path):
    return segments(path)[-1]


def test_every_kind_of_item_comes_back(tmp_path):
    write(tmp_path / "log", ITEMS)
    got = read(tmp_path / "log")
    assert len(got) == len(ITEMS)
    for wanted, item in zip(ITEMS, got, strict=True):
        assert type(item) is type(wanted)
        assert same(item, wanted)
    assert got[2].flags.f_contiguous and not got[2].flags.c_contiguous


def test_records_are_numbered_and_timed(tmp_path):
    before = time.time_ns()
    with LogWriter(tmp_path / "log") as writer:
        assert [writer.append(each) for each in "abc"] == [0, 1, 2]
        writer.append("d", timestamp_ns=17)
    with LogReader(tmp_path / "log") as reader:
        records = list(reader)
    assert [record.sequence for record in records] == [0, 1, 2, 3]
    assert before <= records[0].timestamp_ns <= time.time_ns()
    assert records[3].timestamp_ns == 17


def test_arrays_are_read_only_views_that_outlive_the_reader(tmp_path):
    array = np.arange(1 << 20)
    write(tmp_path / "log", [array, Batch(t=array)])
    frame, batch = read(tmp_path / "log")
    for view in (frame, batch.t):
        base = view
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, mmap.mmap)
        assert view.ctypes.data % 64 == 0
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    assert same(frame, array)
    assert same(batch.t, array)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays=st.lists(
        hnp.arrays(
            dtype=hnp.scalar_dtypes() | hnp.array_dtypes(max_size=3),
            shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
        ),
        max_size=6,
    )
)
def test_any_arrays_come_back(tmp_path, arrays):
    path = tmp_path / str(uuid.uuid4())
    write(path, arrays, segment_bytes=4096)
    got = read(path)
    assert [(a.dtype, a.shape) for a in got] == [(a.dtype, a.shape) for a in arrays]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, arrays, strict=True))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(plain, max_size=8), sizes=st.lists(st.integers(0, 5), max_size=4))
def test_what_is_written_in_several_goes_is_one_log(tmp_path, items, sizes):
    path = tmp_path / str(uuid.uuid4())
    written = 0
    for size in [*sizes, len(items)]:
        write(path, items[written : written + size], segment_bytes=4096)
        written = min(len(items), written + size)
    assert read(path) == items


class Own:
    """An object of a class that a log knows nothing of."""

    def __eq__(self, other):
        return isinstance(other, Own)

    __hash__ = None


def test_objects_of_any_class_take_trust(tmp_path):
    write(tmp_path / "log", [1, Own(), 2])
    with LogReader(tmp_path / "log") as reader:
        one, own, two = reader
        assert (one.item(), two.item()) == (1, 2)
        with pytest.raises(dsline.SerializationError, match=r"test_dataflow_log.Own.*objects=True"):
            own.item()
    assert read(tmp_path / "log", objects=True) == [1, Own(), 2]


class Evil:
    """Its pickle would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_mask_is_not_lost(tmp_path):
    masked = np.ma.masked_equal([1, 2, 3], 2)
    write(tmp_path / "log", [masked])
    (got,) = read(tmp_path / "log", objects=True)
    assert got.mask.tolist() == [False, True, False]


def test_a_hostile_pickle_is_not_run(tmp_path):
    write(tmp_path / "log", [Evil(tmp_path / "made")])
    with pytest.raises(dsline.SerializationError, match=r"posix.system"):
        read(tmp_path / "log")
    assert not (tmp_path / "made").exists()


def test_what_cannot_be_pickled_leaves_the_log_as_it_was(tmp_path):
    with LogWriter(tmp_path / "log") as writer:
        writer.append(1)
        with pytest.raises(dsline.SerializationError, match="lambda"):
            writer.append({"f": lambda: None})
        assert writer.append(2) == 1
    assert read(tmp_path / "log") == [1, 2]


# --- damage -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unsynced(monkeypatch):
    """What reaches the disk when is not what these tests are about."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(os, "fdatasync", lambda file: None)


def small_log(path):
    """A log of 5 small records, and the offset behind each."""
    items = [np.arange(4, dtype="i2"), {"a": 1}, b"xyz", Batch(t=[1.5]), np.array([7, 8], "u1")]
    offsets = [64]
    with LogWriter(path) as writer:
        for item in items:
            writer.append(item)
            offsets.append(last_segment(path).stat().st_size)
    return items, offsets


def readable(path):
    """What of a log can be read before something is wrong with it."""
    got = []
    try:
        with LogReader(path) as reader:
            got.extend(record.item() for record in reader)
    except (dsline.CorruptedMessageError, dsline.LogError) as error:
        return got, error
    return got, None


def is_prefix(got, items):
    return len(got) <= len(items) and all(map(same, got, items))


def test_cut_at_every_byte(tmp_path, unsynced):
    items, offsets = small_log(tmp_path / "log")
    path = last_segment(tmp_path / "log")
    whole = path.read_bytes()
    for size in range(64, len(whole)):
        path.write_bytes(whole[:size])
        left = sum(end <= size for end in offsets[1:])
        got, error = readable(tmp_path / "log")
        assert error is None  # a torn end is no damage: its writer may be at it
        assert len(got) == left
        assert is_prefix(got, items)
        if size % 4 and size not in offsets:
            continue
        with LogWriter(tmp_path / "log") as writer:
            assert writer.next_sequence == left
            torn = size - offsets[left]
            assert [(cut.nbytes, cut.sequence, cut.saved) for cut in writer.cuts] == (
                [(torn, left, None)] if torn else []
            )
            writer.append("more")
        assert [str(item) for item in read(tmp_path / "log")[left:]] == ["more"]
        path.unlink()


def test_a_flipped_bit_anywhere(tmp_path):
    items, offsets = small_log(tmp_path / "log")
    path = last_segment(tmp_path / "log")
    whole = path.read_bytes()
    found = 0
    for at in range(64, len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        hit = sum(end <= at for end in offsets[1:])
        got, error = readable(tmp_path / "log")
        assert is_prefix(got, items)
        if error is None:
            assert len(got) == len(items)  # a byte between two pieces, which nobody reads
            continue
        found += 1
        assert len(got) == hit
        assert isinstance(error, dsline.CorruptedMessageError)
        assert error.sequence == hit
        with LogReader(tmp_path / "log", on_damage="skip") as reader:
            rest = [record.item() for record in reader]
        assert reader.damaged == 1
        # One record is missing, or all behind a length that cannot be trusted.
        assert any(same(rest, items[:hit] + behind) for behind in (items[hit + 1 :], []))
    assert found > 0.8 * (len(whole) - 64)


def test_flipped_headers_of_segments(tmp_path, unsynced):
    small_log(tmp_path / "log")
    path = last_segment(tmp_path / "log")
    whole = path.read_bytes()
    for at in range(64):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(dsline.LogError, match="no segment of this version, or damaged"):
            read(tmp_path / "log")
        with pytest.raises(dsline.LogError, match="no segment of this version, or damaged"):
            LogWriter(tmp_path / "log")
    assert path.read_bytes()[:63] == whole[:63]  # nothing was cut


def test_bytes_that_were_chosen_do_no_harm(tmp_path):
    """Headers whose sums are right, and that lie."""
    lies = [
        {"kind": 77},
        {"size": 1 << 60},
        {"size": 65},
        {"size": 0},
        {"payload": 1 << 50},
        {"offset": 8},
        {"described": 1 << 31},
        {"sequence": 9},
        {"sequence": (1 << 64) - 1},
    ]
    for number, lie in enumerate(lies):
        path = tmp_path / f"log{number}"
        write(path, [])
        last_segment(path).write_bytes(last_segment(path).read_bytes() + forged_record(**lie))
        got, error = readable(path)
        assert got == []
        assert isinstance(error, dsline.CorruptedMessageError), lie


def forged_record(description=b"\0\0\0\0", data=b"", *, kind=1, sequence=0, size=None, offset=None, **lies):
    at = 64 + len(description)
    at += -at % 16
    whole = at + len(data) + -(at + len(data)) % 16
    body = crc32c(data, crc32c(description))
    head = struct.pack(
        "<4sBBHQqQIIQQI",
        b"DSLR",
        kind,
        0,
        0,
        sequence,
        0,
        lies.get("payload", len(data)),
        at if offset is None else offset,
        body,
        whole if size is None else size,
        0,
        lies.get("described", len(description)),
    )
    head += struct.pack("<I", crc32c(head))
    return (head + description).ljust(at, b"\0") + data.ljust(whole - at, b"\0")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([0, 1, 2, 3]),
    code=st.sampled_from([b"", b"i\1\0\0\4\0\0\0", b"S\0\0\0\0\0\0\0"]) | st.binary(max_size=24),
    dims=st.lists(st.integers(0, 8) | st.integers(0, 2**64 - 1), max_size=4) | st.just([1] * 65),
    nbytes=st.integers(0, 64) | st.integers(0, 2**64 - 1),
    typed=st.sampled_from([0, 1, 2]),
    payload=st.binary(max_size=64),
    parts=st.sampled_from([0, 1, 2, 2**32 - 1]),
)
def test_descriptions_that_were_chosen_do_no_harm(tmp_path, kind, code, dims, nbytes, typed, payload, parts):
    part = struct.pack("<QBBBBHHI", nbytes, typed, 0, len(dims), 0, 0, len(code), 0)
    description = struct.pack("<I", parts) + part + struct.pack(f"<{len(dims)}Q", *dims) + code
    path = tmp_path / str(uuid.uuid4())
    write(path, [])
    last_segment(path).write_bytes(
        last_segment(path).read_bytes() + forged_record(description, payload, kind=kind)
    )
    try:
        for item in read(path):
            memoryview(item) if isinstance(item, bytes) else repr(item)
    except (dsline.CorruptedMessageError, dsline.SerializationError):
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"Nr\xff\xff\xff\x7f.",  # would take 34 GB
        b"\x80\x05Np2000000000\n.",
        b"\x80\x05\x8c\x01r\x94Nr\0\0\0\x70.",
        b"cbuiltins\nbytearray\n(I99999999999\ntR.",
        b"cbuiltins\nset\n(cbuiltins\nrange\n(I99999999999\ntRtR.",
    ],
)
def test_pickles_that_want_much_memory_are_refused(data):
    with pytest.raises(dsline.SerializationError, match=r"no pickler makes|needs builtins"):
        unpack(data)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_pickles_that_were_chosen_do_no_harm(data):
    with contextlib.suppress(dsline.SerializationError):
        unpack(data)


def test_whole_records_behind_a_damaged_one_are_kept_aside(tmp_path):
    items, offsets = small_log(tmp_path / "log")
    path = last_segment(tmp_path / "log")
    whole = bytearray(path.read_bytes())
    whole[offsets[1] + 70] ^= 1
    path.write_bytes(whole)
    with LogWriter(tmp_path / "log") as writer:
        (cut,) = writer.cuts
        assert (cut.sequence, cut.reason) == (1, "has another sum than was written")
        assert pathlib.Path(cut.saved).read_bytes() == whole[offsets[1] :]
        writer.append("new")
    got = read(tmp_path / "log")
    assert same(got, [items[0], "new"])


def test_zeros_at_the_end_are_a_torn_end(tmp_path):
    items, _ = small_log(tmp_path / "log")
    path = last_segment(tmp_path / "log")
    with path.open("ab") as file:
        file.write(bytes(5000))
    assert same(read(tmp_path / "log"), items)
    with LogWriter(tmp_path / "log") as writer:
        assert [cut.nbytes for cut in writer.cuts] == [5000]
    assert same(read(tmp_path / "log"), items)


# --- segments -----------------------------------------------------------------------------------------------------------


def test_a_log_goes_on_in_a_new_file(tmp_path):
    items = [np.full(300, number) for number in range(50)]
    write(tmp_path / "log", items, segment_bytes=10_000)
    assert len(segments(tmp_path / "log")) > 10
    assert all(each.stat().st_size <= 10_000 for each in segments(tmp_path / "log"))
    assert same(read(tmp_path / "log"), items)
    for start in (0, 1, 17, 49, 50):
        assert same(read(tmp_path / "log", start=start), items[start:])


def test_a_record_may_be_larger_than_a_segment(tmp_path):
    items = [np.arange(10), np.zeros(100_000), np.arange(3)]
    write(tmp_path / "log", items, segment_bytes=4096)
    assert same(read(tmp_path / "log"), items)


def test_a_missing_segment_is_an_error(tmp_path):
    items = [np.full(300, number) for number in range(20)]
    write(tmp_path / "log", items, segment_bytes=10_000)
    gone = segments(tmp_path / "log")[1]
    gone.unlink()
    first, after = int(gone.stem), int(segments(tmp_path / "log")[1].stem)
    got, error = readable(tmp_path / "log")
    assert same(got, items[:first])
    assert f"records {first} to {after - 1} are missing" in str(error)
    with LogReader(tmp_path / "log", on_damage="skip") as reader:
        assert same([record.item() for record in reader], items[:first] + items[after:])


def test_a_segment_that_has_no_header_yet_is_nothing(tmp_path):
    write(tmp_path / "log", [1, 2])
    (tmp_path / "log" / f"{2:020}.dsl").write_bytes(b"")
    with LogWriter(tmp_path / "log") as writer:
        assert writer.append(3) == 2
    assert read(tmp_path / "log") == [1, 2, 3]


def test_a_folder_with_something_else_is_no_log(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(dsline.LogError, match=r"is no log: it holds 'thesis.txt'"):
        LogWriter(tmp_path)
    with pytest.raises(dsline.PipelineBuildError, match="is no log"):
        LogReader(tmp_path)


# --- writers ------------------------------------------------------------------------------------------------------------


def test_a_log_has_one_writer(tmp_path):
    with LogWriter(tmp_path / "log"), pytest.raises(dsline.LogError, match=f"process {os.getpid()}"):
        LogWriter(tmp_path / "log")
    LogWriter(tmp_path / "log").close()


def test_restore_forgets_what_came_later(tmp_path):
    items = [np.full(300, number) for number in range(30)]
    for kept in (0, 1, 12, 29, 30):
        path = tmp_path / f"log{kept}"
        with LogWriter(path, segment_bytes=10_000) as writer:
            for number, item in enumerate(items):
                if number == kept:
                    position = writer.position()
                writer.append(item)
            if kept == 30:
                position = writer.position()
            writer.end()
        with LogWriter(path, segment_bytes=10_000) as writer:
            writer.restore(position)
            assert writer.next_sequence == kept
            writer.append("new")
        assert same(read(path), [*items[:kept], "new"])


def test_views_survive_a_restore(tmp_path):
    with LogWriter(tmp_path / "log") as writer:
        position = writer.position()
        writer.append(np.arange(100_000))
        (view,) = read(tmp_path / "log")
        writer.restore(position)
        assert last_segment(tmp_path / "log").stat().st_size == 64
        assert view.sum() == 4999950000  # would end the process if the file had been cut short


def test_a_log_is_cut_also_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with LogWriter(tmp_path / "log") as writer:
        writer.append(1)
        position = writer.position()
        writer.append(np.zeros(1000))
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)  # there is no room for another file
            writer.restore(position)
        writer.append(2)
    assert read(tmp_path / "log") == [1, 2]
    assert sorted(os.listdir(tmp_path / "log")) == [f"{0:020}.dsl", "writer.lock"]


def test_restore_refuses_a_position_behind_the_end(tmp_path):
    with LogWriter(tmp_path / "log") as writer:
        writer.append(1)
        with pytest.raises(dsline.PipelineRuntimeError, match="ends at record 1, and the checkpoint at 5"):
            writer.restore({"sequence": 5})


def test_a_full_disk_leaves_a_whole_log(tmp_path):
    """RLIMIT_FSIZE stands for it: the call writes a part, and the next one fails."""
    program = """
import resource, signal, sys
import numpy as np
import dsline
from dsline.dataflow.log import LogReader, LogWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with LogWriter(sys.argv[1]) as writer:
    writer.append(np.arange(1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:
        writer.append(np.zeros(100_000))
    except dsline.LogError as error:
        print(error.errno, error)
    else:
        print("no error")
    writer.append("small")
with LogReader(sys.argv[1]) as reader:
    print([str(record.item())[:5] for record in reader])
"""
    done = subprocess.run(
        [sys.executable, *STRICT, "-c", program, tmp_path / "log"],
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{errno.EFBIG} ")
    assert "writing record 1 of" in first
    assert second == "['[  0 ', 'small']"


def test_no_space_is_said_in_words(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with LogWriter(tmp_path / "log") as writer:
        writer.append(1)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwritev", full)
            with pytest.raises(dsline.LogError, match=r"no space is left on the disk.*make room") as caught:
                writer.append(2)
        assert caught.value.errno == errno.ENOSPC
        writer.append(3)
    assert read(tmp_path / "log") == [1, 3]


@pytest.mark.parametrize("sync", ["always", "20ms", 0.02])
def test_records_are_written_through(tmp_path, monkeypatch, sync):
    synced = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (real(file), synced.append(os.fstat(file).st_size)))
    with LogWriter(tmp_path / "log", sync=sync) as writer:
        writer.append(np.arange(100))
        size = last_segment(tmp_path / "log").stat().st_size
        if sync == "always":
            assert synced == [size]
        wait_until(lambda: size in synced)
        writer.append(np.arange(100))
    assert synced[-1] == last_segment(tmp_path / "log").stat().st_size


def test_a_flush_is_for_all_files(tmp_path, monkeypatch):
    synced = set()
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (real(file), synced.add(os.fstat(file).st_ino)))
    with LogWriter(tmp_path / "log", segment_bytes=4096) as writer:
        for _ in range(10):
            writer.append(np.arange(400))
        assert not synced
        writer.flush()
        assert synced == {each.stat().st_ino for each in segments(tmp_path / "log")}
        writer.append(np.arange(400))
    synced.clear()
    with LogWriter(tmp_path / "log", segment_bytes=4096) as writer:  # somebody else's records, as well
        writer.flush()
    assert synced == {each.stat().st_ino for each in segments(tmp_path / "log")}
    assert len(synced) > 5


def test_a_disk_that_does_not_write_through_is_an_error(tmp_path, monkeypatch):
    def broken(file):
        raise OSError(errno.EIO, "Input/output error")

    with LogWriter(tmp_path / "log") as writer:
        writer.append(1)
        monkeypatch.setattr(os, "fdatasync", broken)
        with pytest.raises(dsline.LogError, match="writing through to the disk"):
            writer.flush()
        with pytest.raises(dsline.LogError, match="writing through to the disk"):
            writer.append(2)  # nothing can be promised any more
    assert read(tmp_path / "log") == [1]


def test_threads_share_a_writer(tmp_path):
    with LogWriter(tmp_path / "log", segment_bytes=10_000) as writer:
        threads = [
            threading.Thread(target=lambda own=own: [writer.append((own, number)) for number in range(200)])
            for own in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    got = read(tmp_path / "log")
    for own in range(4):
        assert [number for thread, number in got if thread == own] == list(range(200))


APPENDER = """
import sys
import numpy as np
from dsline.dataflow.log import LogWriter
with LogWriter(sys.argv[1], shared=True, segment_bytes=20_000) as writer:
    for number in range(int(sys.argv[3])):
        writer.append({"who": sys.argv[2], "number": number, "array": np.full(40, number)})
"""


def test_processes_append_in_turns(tmp_path):
    children = [
        subprocess.Popen([sys.executable, *STRICT, "-c", APPENDER, tmp_path / "log", str(who), "150"])
        for who in range(3)
    ]
    assert [child.wait(TIMEOUT) for child in children] == [0, 0, 0]
    got = read(tmp_path / "log")
    assert len(got) == 450
    for who in "012":
        assert [item["number"] for item in got if item["who"] == who] == list(range(150))
    assert all((item["array"] == item["number"]).all() for item in got)


KILLED = """
import sys
import numpy as np
from dsline.dataflow.log import LogWriter
writer = LogWriter(sys.argv[1], segment_bytes=1 << 20, shared=sys.argv[2] == "shared")
print("open", flush=True)
number = writer.next_sequence
while True:
    writer.append(np.full(30_000, number))
    number += 1
    print(number, flush=True)
"""


@pytest.mark.parametrize("how", ["alone", "shared"])
def test_what_was_appended_survives_a_kill(tmp_path, how):
    path = tmp_path / "log"
    told = 0
    for round_number in range(4):
        child = subprocess.Popen([sys.executable, "-c", KILLED, path, how], stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout.readline() == "open\n"
            for _ in range(3 + 7 * round_number):
                told = int(child.stdout.readline())
        finally:
            child.send_signal(signal.SIGKILL)
            rest, _ = child.communicate(timeout=TIMEOUT)
        # All that was said, but for a line that was torn itself.
        told = max([told, *(int(line) for line in rest.split("\n")[:-1])])
        got = read(path)
        assert len(got) >= told
        assert all((item == number).all() for number, item in enumerate(got))
    with LogWriter(path) as writer:
        writer.append("end")
    assert len(read(path)) == len(got) + 1


# --- readers ------------------------------------------------------------------------------------------------------------


def test_where_a_reader_starts(tmp_path):
    write(tmp_path / "log", range(10))
    assert read(tmp_path / "log", start="earliest") == list(range(10))
    assert read(tmp_path / "log", start=7) == [7, 8, 9]
    assert read(tmp_path / "log", start=10) == []
    with pytest.raises(dsline.LogError, match="ends before record 10, and 11 was asked for"):
        read(tmp_path / "log", start=11)
    reader = LogReader(tmp_path / "log", start="latest")
    assert reader.read() is None
    write(tmp_path / "log", [10])
    assert reader.read().item() == 10
    reader.close()


def test_a_position_is_resumed(tmp_path):
    write(tmp_path / "log", [np.full(300, number) for number in range(30)], segment_bytes=10_000)
    for taken in (0, 1, 13, 30):
        with LogReader(tmp_path / "log") as reader:
            for _ in range(taken):
                reader.read()
            position = reader.position()
        for hint in (
            position,
            {"sequence": taken},
            {**position, "offset": 17},
            {**position, "offset": 1 << 40},
        ):
            with LogReader(tmp_path / "log") as reader:
                reader.seek(hint)
                assert [int(record.item()[0]) for record in reader] == list(range(taken, 30))


def follow(path, got, **options):
    with LogReader(path, follow=True, **options) as reader:
        for record in reader:
            got.append(record.item())


def test_a_log_is_followed_from_before_it_is_there_until_its_end(tmp_path):
    got = []
    thread = threading.Thread(target=follow, args=(tmp_path / "log", got))
    thread.start()
    with LogWriter(tmp_path / "log", segment_bytes=10_000) as writer:
        for number in range(60):
            writer.append(np.full(300, number))
            if number % 20 == 0:
                wait_until(lambda number=number: len(got) > number)
        assert thread.is_alive()
        writer.end()
    thread.join(TIMEOUT)
    assert [int(item[0]) for item in got] == list(range(60))
    assert all((item == item[0]).all() for item in got)


def test_an_end_in_the_middle_does_not_count(tmp_path):
    for item in (1, 2, 3):
        with LogWriter(tmp_path / "log") as writer:
            writer.append(item)
            writer.end()
    assert read(tmp_path / "log") == [1, 2, 3]
    assert read(tmp_path / "log", follow=True) == [1, 2, 3]
    assert read(tmp_path / "log", start=1) == [2, 3]


def test_a_follower_stops_when_told(tmp_path):
    write(tmp_path / "log", [1])
    stopped = threading.Event()
    got = []
    thread = threading.Thread(target=follow, args=(tmp_path / "log", got), kwargs={"stopped": stopped})
    thread.start()
    wait_until(lambda: got == [1])
    stopped.set()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


@pytest.mark.parametrize("kept", [2, 5])
def test_a_follower_passes_over_what_is_written_again(tmp_path, kept):
    """Segments hold four records: the cut is in the reader's segment, or before it."""
    with LogWriter(tmp_path / "log", segment_bytes=10_000) as writer:
        for number in range(6):
            writer.append(np.full(300, number))
        reader = LogReader(tmp_path / "log", follow=True)
        assert [int(reader.read().item()[0]) for _ in range(6)] == list(range(6))
        writer.restore({"sequence": kept})
        assert reader.read() is None
        for number in range(kept, 9):
            writer.append(np.full(300, number))
            assert reader.read() is None or number >= 6
        reader.seek(reader.sequence)
        writer.end()
        assert [int(record.item()[0]) for record in reader] == []
        assert reader.sequence == 9
        reader.close()


def test_a_group_goes_on_where_it_committed(tmp_path):
    write(tmp_path / "log", range(10))
    with LogReader(tmp_path / "log", group="a") as reader:
        assert [reader.read().item() for _ in range(4)] == [0, 1, 2, 3]
        reader.commit()
        reader.read()
    assert read(tmp_path / "log", group="a", start=9) == [4, 5, 6, 7, 8, 9]
    assert read(tmp_path / "log", group="b", start=8) == [8, 9]
    with (
        LogReader(tmp_path / "log", group="a") as reader,
        pytest.raises(dsline.LogError, match="has a reader already"),
    ):
        LogReader(tmp_path / "log", group="a")
    reader.close()
    write(tmp_path / "log", [10])  # the groups are in its folder
    (tmp_path / "log" / "groups" / "a").write_text("{")
    with pytest.raises(dsline.LogError, match=r"cannot be read.*remove it"):
        LogReader(tmp_path / "log", group="a")


def test_the_pace_of_the_records(tmp_path):
    with LogWriter(tmp_path / "log") as writer:
        for number in range(4):
            writer.append(number, timestamp_ns=number * 100_000_000)
    for rate, least in (("original", 0.3), (1.0, 0.3), (3, 0.1), ("max", 0.0)):
        began = time.monotonic()
        assert read(tmp_path / "log", replay_rate=rate) == [0, 1, 2, 3]
        assert time.monotonic() - began >= least


def test_stopped_between_two_records(tmp_path):
    with LogWriter(tmp_path / "log") as writer:
        writer.append(0, timestamp_ns=0)
        writer.append(1, timestamp_ns=10**15)
    stopped = threading.Event()
    reader = LogReader(tmp_path / "log", replay_rate="original", stopped=stopped)
    records = iter(reader)
    assert next(records).item() == 0
    threading.Timer(0.05, stopped.set).start()
    assert list(records) == []
    assert reader.position()["sequence"] == 1  # not taken
    reader.close()


@pytest.mark.parametrize(
    ("items", "schema"),
    [
        ([np.zeros((4, 3), "f4")], dsline.ArraySpec((None, None), "f4")),
        ([RECORDS], dsline.ArraySpec((None,), RECORDS.dtype)),
        (
            [Batch(t=[1.0], n=[2])],
            {"t": dsline.ArraySpec((None,), "f8"), "n": dsline.ArraySpec((None,), "i8")},
        ),
        ([{"a": 1}], None),
        ([], None),
    ],
)
def test_the_schema_of_a_log(tmp_path, items, schema):
    write(tmp_path / "log", items)
    assert log_schema(tmp_path / "log") == schema


def test_bad_options(tmp_path):
    for options in (
        {"sync": "soon"},
        {"sync": 0},
        {"sync": True},
        {"segment_bytes": 10},
        {"segment_bytes": "1 GB"},
    ):
        with pytest.raises(
            dsline.PipelineBuildError, match=next(iter(options)) if "sync" not in options else "span of time"
        ):
            LogWriter(tmp_path / "log", **options)
    write(tmp_path / "log", [])
    for options in (
        {"start": "first"},
        {"start": -1},
        {"group": "a/b"},
        {"group": "x.lock"},
        {"replay_rate": 0},
        {"replay_rate": "fast"},
        {"on_damage": "ignore"},
    ):
        with pytest.raises(dsline.PipelineBuildError, match=next(iter(options))):
            LogReader(tmp_path / "log", **options)
    with pytest.raises(dsline.PipelineBuildError, match=r"no log .*nowhere.*follow=True"):
        LogReader(tmp_path / "nowhere")
    with pytest.raises(dsline.PipelineBuildError, match="make it first"):
        LogWriter(tmp_path / "no" / "where")
