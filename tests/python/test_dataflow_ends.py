"""Sources and sinks: what they are described by, what they give and take, how they end, and where they are resumed."""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import pickle
import sys
import threading
import warnings

import numpy as np
import pytest
from support import TIMEOUT, wait_until

import dsline
from dsline.dataflow import media
from dsline.dataflow.items import Batch, same
from dsline.dataflow.operator import Context, Sink, Source
from dsline.dataflow.sinks import SinkOptions, collect, own, parse_sink, send_to, sink_from_json
from dsline.dataflow.sources import (
    SHUT_DOWN_AT_END,
    files,
    parse_source,
    receive_from,
    source_from_json,
)

CONTEXT = Context("stage")
FRAMES = [np.full((4, 6, 3), number, "u1") for number in range(7)]


def take(thing, count=None, **options):
    """The items of a source, or the first `count`, and the position behind them."""
    step = parse_source(thing, **options).start(CONTEXT)
    try:
        items = list(itertools.islice(step, count))
        return items, step.position()
    finally:
        step.close()


def resumed(thing, position, **options):
    step = parse_source(thing, **options).start(CONTEXT)
    try:
        step.seek(pickle.loads(pickle.dumps(position)))
        return list(step)
    finally:
        step.close()


def put(thing, items, finish=True, **options):
    step = parse_sink(thing, **options).start(CONTEXT)
    try:
        for item in items:
            step.write(item)
        if finish:
            step.finish()
        return step
    finally:
        step.close()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- sources ------------------------------------------------------------------------------------------------------------


def numbers():
    yield from range(10)


class Counting:
    """An iterator that can say where it is."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == 10:
            raise StopIteration
        self.at += 1
        return self.at - 1

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: list(range(10)),
        lambda: range(10),
        lambda: numbers,
        lambda: dict.fromkeys(range(10)).keys(),
        Counting,
    ],
    ids=["list", "range", "function", "iterable", "with a state"],
)
def test_sources_of_python(make):
    items, _ = take(make())
    assert items == list(range(10))
    for count in (0, 1, 4, 10):
        _, position = take(make(), count)
        assert resumed(make(), position) == list(range(count, 10))


def test_what_can_be_replayed():
    assert parse_source([1]).replayable
    assert parse_source(Counting()).replayable
    assert parse_source(numbers).replayable
    assert not parse_source(iter([1])).replayable
    assert not parse_source({1}).replayable  # another process may have another order


def test_an_iterator_is_not_resumed():
    items, position = take(iter(range(10)), 4)
    assert items == [0, 1, 2, 3]
    assert position is None


def test_a_source_that_is_stopped_takes_nothing_more():
    taken = []
    step = parse_source(taken.append(n) or n for n in range(10)).start(CONTEXT)
    items = iter(step)
    assert [next(items), next(items)] == [0, 1]
    step.stop()
    assert list(items) == []
    assert len(taken) == 2


def test_a_function_that_returns_no_iterable():
    step = parse_source(functools.partial(int, 5)).start(CONTEXT)
    with pytest.raises(
        dsline.PipelineRuntimeError, match=r"returned a int, must return an iterable; .*iter\(function"
    ):
        list(step)


@pytest.mark.parametrize("rows", [None, 1, 3, 1000])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(6, 4),
        np.asfortranarray(np.arange(24).reshape(6, 2, 2)),
        np.zeros(4100, [("t", "f8"), ("n", "i4")]),
        np.arange(7),
        np.zeros((0, 3)),
        np.array(["2020-01-01"], "M8[D]"),
    ],
    ids=["2d", "fortran", "records", "1d", "empty", "dates"],
)
def test_arrays_and_their_files(here, array, rows):
    np.save("a.npy", array)
    for thing in (array, "a.npy", pathlib.Path("a.npy")):
        items, _ = take(thing, rows=rows)
        whole = (
            np.stack(items) if rows is None and array.ndim > 1 and items else np.concatenate(items or [array])
        )
        assert same(whole, array) or array.size == 0
        if rows is not None:
            assert all(len(item) == rows for item in items[:-1])
        schema = parse_source(thing, rows=rows).schema
        assert schema is None or all(map(schema.matches, items))
        for count in (0, 1, 2):
            _, position = take(thing, count, rows=rows)
            assert same(resumed(thing, position, rows=rows), items[count:])
    items, _ = take("a.npy", rows=rows)
    assert not any(item.flags.writeable for item in items)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_columns_of_npz_files(here, save):
    save("c.npz", t=np.arange(10_000), h=np.linspace(0, 1, 10_000))
    items, position = take("c.npz", 2)
    assert [type(item) for item in items] == [Batch, Batch]
    assert [len(item) for item in items] == [4096, 4096]
    assert position == 8192
    (last,) = resumed("c.npz", position)
    assert same(np.concatenate([*(each.t for each in items), last.t]), np.arange(10_000))
    assert dict(parse_source("c.npz").schema) == {
        "t": dsline.ArraySpec((None,), "i8"),
        "h": dsline.ArraySpec((None,), "f8"),
    }


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_npy(here, version):
    array = np.zeros(5, [("wörter" if version == (3, 0) else "word", "f4")])
    with open("a.npy", "wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about versions that old readers do not know
        np.lib.format.write_array(file, array, version)
    (item,), _ = take("a.npy")
    assert item.dtype == array.dtype


def test_bad_files_are_told_when_the_pipeline_is_built(here):
    np.save("objects.npy", np.array([object()]), allow_pickle=True)
    np.savez("ragged.npz", a=np.zeros(3), b=np.zeros(4))
    np.save("cut.npy", np.zeros(100))
    with open("cut.npy", "r+b") as file:
        file.truncate(300)
    pathlib.Path("no.npy").write_bytes(b"text")
    pathlib.Path("no.npz").write_bytes(b"text")
    pathlib.Path("no.mp4").write_bytes(b"text")
    for path, why in {
        "objects.npy": "Python objects",
        "ragged.npz": "no columns",
        "cut.npy": "shorter than its header says",
        "no.npy": "cannot be read",
        "no.npz": "cannot be read",
        "no.mp4": "cannot be read",
        "nothing.npy": "no file",
        "nothing.mp4": "no file",
        "file://nothing": "no log",
        "images://nothing": "no picture fits",
        "images": "is no source",
        "words.txt": "is no source",
        "tcp://host": "unknown scheme tcp://",
        "shm://": "names nothing",
        "shm://a/b": "is no channel",
        "bus://.x": "is no channel",
    }.items():
        with pytest.raises(dsline.PipelineBuildError, match=why):
            parse_source(path)
    for thing in (3, {"a": 1}, b"x", None, np.float32(1)):
        with pytest.raises(dsline.PipelineBuildError, match="source"):
            parse_source(thing)
    with pytest.raises(dsline.PipelineBuildError, match=r"no option 'speed'; it has .*replay_rate"):
        parse_source("file://x", speed=1)


def test_any_byte_of_a_npy_header_may_be_wrong(here):
    np.save("a.npy", np.zeros((3, 4), "f4"))
    whole = pathlib.Path("a.npy").read_bytes()
    refused = 0
    for at in range(80):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        pathlib.Path("a.npy").write_bytes(flipped)
        try:
            take("a.npy")
        except dsline.PipelineBuildError:
            refused += 1
    assert refused > 50


# --- files --------------------------------------------------------------------------------------------------------------


def test_files_in_order_and_shuffled(here):
    for number in range(6):
        np.savez(f"{number}.npz", n=np.full(3, number))
    items, _ = take(files("*.npz"))
    assert [int(item.n[0]) for item in items] == list(range(6))
    first, _ = take(files("*.npz", shuffle=1234, repeat=3))
    order = [int(item.n[0]) for item in first]
    assert order == [int(item.n[0]) for item in take(files(["*.npz"], shuffle=1234, repeat=3))[0]]
    passes = [order[:6], order[6:12], order[12:]]
    assert all(sorted(each) == list(range(6)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3
    for count in (0, 1, 5, 6, 7, 12, 18):
        _, position = take(files("*.npz", shuffle=1234, repeat=3), count)
        rest = resumed(files("*.npz", shuffle=1234, repeat=3), position)
        assert [int(item.n[0]) for item in rest] == order[count:]
    endless, _ = take(files(".", repeat=None), 20)
    assert [int(item.n[0]) for item in endless] == [0, 1, 2, 3, 4, 5] * 3 + [0, 1]


def test_files_by_rows(here):
    for number in range(3):
        np.save(f"{number}.npy", np.arange(10) + 10 * number)
    source = files("*.npy", rows=4, repeat=2)
    items, _ = take(source)
    assert [len(item) for item in items] == [4, 4, 2] * 6
    for count in range(len(items) + 1):
        _, position = take(source, count)
        assert same(resumed(source, position), items[count:])


def test_files_that_are_not_those_of_the_checkpoint(here):
    for number in range(3):
        np.save(f"{number}.npy", np.zeros(1))
    _, position = take(files("*.npy"), 1)
    np.save("9.npy", np.zeros(1))
    with pytest.raises(dsline.PipelineRuntimeError, match="some were added or removed"):
        resumed(files("*.npy"), position)


def test_other_files(here):
    pathlib.Path("a.txt").write_text("one")
    pathlib.Path("b.txt").write_text("two")
    assert take(files("*.txt"))[0] == [pathlib.Path("a.txt"), pathlib.Path("b.txt")]
    assert take(files("*.txt", load=pathlib.Path.read_text))[0] == ["one", "two"]
    np.savez("c.npz", image=np.zeros((2, 3, 3)), label=np.zeros(2))
    (item,), _ = take(files("c.npz"))
    assert isinstance(item, dict)
    assert item["image"].shape == (2, 3, 3)
    with pytest.raises(dsline.PipelineBuildError, match=r"no file fits '\*.csv'"):
        files("*.csv")
    for options in ({"shuffle": "yes"}, {"shuffle": True}, {"repeat": 0}, {"rows": -1}):
        with pytest.raises(dsline.PipelineBuildError, match=next(iter(options))):
            files("*.txt", **options)


# --- pictures and films -------------------------------------------------------------------------------------------------


def test_pictures(here):
    pytest.importorskip("PIL")
    step = put("images://out", FRAMES)
    assert step.position() == 7
    items, position = take("images://out")
    assert same(items, FRAMES)
    _, position = take("out", 3)
    assert same(resumed("out", position), FRAMES[3:])
    assert same(take("out/*2.png")[0], [FRAMES[2]])
    grey = [np.arange(12, dtype="u1").reshape(3, 4)]
    put("images://grey", grey)
    assert same(take("images://grey")[0], grey)
    with pytest.raises(dsline.PipelineRuntimeError, match="is no picture"):
        put("images://bad", [np.zeros((2, 3, 3), "f8")])
    pathlib.Path("out/00000003.png").write_bytes(b"no")
    with pytest.raises(dsline.PipelineRuntimeError, match=r"00000003.png' cannot be read"):
        take("images://out")


def test_films(here):
    pytest.importorskip("av")
    y, x = np.mgrid[:48, :64]
    frames = [
        np.stack([x * 3 % 256, y * 4 % 256, np.full_like(x, 8 * n)], -1).astype("u1") for n in range(30)
    ]
    put("film.mp4", frames, fps=10)
    source = parse_source("film.mp4")
    assert source.schema == dsline.ArraySpec((48, 64, 3), "u1")
    items, _ = take("film.mp4")
    assert len(items) == 30
    assert all(item.dtype == np.uint8 and item.shape == (48, 64, 3) for item in items)
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(items, frames, strict=True)) < 12
    for count in (0, 1, 7, 29, 30):
        _, position = take("film.mp4", count)
        assert same(resumed("film.mp4", position), items[count:])
    put("never.mp4", frames[:3], finish=False)
    assert os.listdir() == ["film.mp4"]
    for frame in (np.zeros((3, 4), "f4"), np.zeros((3, 4, 3), "u1"), np.zeros((4, 4, 4), "u1")):
        with pytest.raises(dsline.PipelineRuntimeError, match="frame"):
            put("bad.mp4", [frame])
    with pytest.raises(dsline.PipelineRuntimeError, match="cannot be written with codec 'none'"):
        put("bad.mp4", frames, codec="none")


@pytest.mark.parametrize(
    ("module", "extra", "parse"),
    [
        ("PIL", "images", lambda: parse_source("images://out")),
        ("PIL", "images", lambda: parse_sink("images://out")),
        ("av", "video", lambda: parse_sink("film.mp4")),
        ("av", "video", lambda: parse_source("film.mp4")),
    ],
)
def test_a_package_that_is_not_there(here, monkeypatch, module, extra, parse):
    os.mkdir("out")
    for name in [*sys.modules]:
        if name.partition(".")[0] == module:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(dsline.FeatureUnavailableError, match=rf"needs {module}, .*dsline\[{extra}\]"):
        parse()


# --- sinks --------------------------------------------------------------------------------------------------------------


def test_npy_files_grow_and_are_cut_back(here):
    for items in (FRAMES, [np.arange(3), np.arange(3)], [1.5, 2.5], [np.float32(1)] * 3):
        put("a.npy", items)
        assert same(np.load("a.npy"), np.stack(items))
    records = [np.zeros(n, [("t", "f8")]) for n in (3, 0, 5)]
    put("a.npy", records)
    assert len(np.load("a.npy")) == 8
    put("a.npy", [np.arange(n) for n in (3, 5)], append="rows")
    assert np.load("a.npy").tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    put("a.npy", FRAMES, append="rows")
    assert np.load("a.npy").shape == (28, 6, 3)

    step = parse_sink("a.npy").start(CONTEXT)
    step.write(FRAMES[0])
    step.write(FRAMES[1])
    step.flush()
    position = step.position()
    step.write(FRAMES[2])
    assert len(np.load("a.npy")) == 2  # as of the flush; the process may die now
    step.close()
    step = parse_sink("a.npy").start(CONTEXT)
    step.restore(position)
    step.write(FRAMES[6])
    step.finish()
    step.close()
    assert same(np.load("a.npy"), np.stack([FRAMES[0], FRAMES[1], FRAMES[6]]))


def test_what_a_npy_file_does_not_take(here):
    for items, why in (
        ([FRAMES[0], np.zeros((2, 2))], "holds rows of uint8"),
        ([Batch(a=[1])], "holds one array"),
        ([{"a": 1}], "holds one array"),
        (["text", 1], "holds rows of <U4"),
        ([object()], "holds one array"),
    ):
        with pytest.raises(dsline.PipelineRuntimeError, match=why):
            put("a.npy", items)
    with pytest.raises(dsline.PipelineRuntimeError, match="has no rows"):
        put("a.npy", [1], append="rows")
    put("a.npy", [np.zeros(3)])
    step = parse_sink("a.npy").start(CONTEXT)
    with pytest.raises(dsline.PipelineRuntimeError, match="is not the one of the checkpoint"):
        step.restore(5)
    np.save("other.npy", np.zeros((3, 3)))
    step = parse_sink("other.npy").start(CONTEXT)
    with pytest.raises(dsline.PipelineRuntimeError, match="is not the one of the checkpoint"):
        step.restore(9)
    with pytest.raises(dsline.PipelineBuildError, match="columns cannot go into"):
        parse_sink("a.npy").check({"t": dsline.ArraySpec((None,), "f8")})


def test_npz_files_grow_and_are_cut_back(here):
    batches = [Batch(t=np.arange(n), word=np.full(n, "x")) for n in (3, 1, 4)]
    put("a.npz", batches)
    with np.load("a.npz") as made:
        assert made["t"].tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
        assert made["word"].shape == (8,)
    assert os.listdir() == ["a.npz"]
    put("b.npz", [{"x": 1, "y/z": 2.0}, {"x": 3, "y/z": 4.0}])
    with np.load("b.npz") as made:
        assert made["x"].tolist() == [1, 3]
        assert made["y/z"].tolist() == [2.0, 4.0]
    with pytest.raises(
        dsline.PipelineRuntimeError, match=r"has the columns \['t', 'word'\], and \['t'\] came"
    ):
        put("c.npz", [batches[0], Batch(t=[1])])

    for finished in (False, True):
        step = parse_sink("d.npz").start(CONTEXT)
        step.write(batches[0])
        step.flush()
        position = step.position()
        step.write(batches[1])
        if finished:
            step.finish()
        step.close()
        step = parse_sink("d.npz").start(CONTEXT)
        step.restore(json.loads(json.dumps(position)))
        step.write(batches[2])
        step.finish()
        step.close()
        with np.load("d.npz") as made:
            assert made["t"].tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_pictures_are_cut_back(here):
    pytest.importorskip("PIL")
    put("images://out", FRAMES)
    step = parse_sink("images://out", suffix=".png").start(CONTEXT)
    step.restore(3)
    step.write(FRAMES[6])
    step.finish()
    assert same(take("images://out")[0], [*FRAMES[:3], FRAMES[6]])


def test_the_log_as_source_and_sink(here):
    put("file://log", FRAMES, segment_bytes=4096)
    _, position = take("file://log", 4)
    assert same(resumed("file://log", position), FRAMES[4:])
    step = parse_sink("file://log").start(CONTEXT)
    assert step.position() == {"sequence": 7}
    step.restore({"sequence": 2})
    step.write(FRAMES[0])
    step.flush()
    step.close()
    assert same(take("file://log")[0], [*FRAMES[:2], FRAMES[0]])
    assert parse_source("file://log").schema == dsline.ArraySpec((None, None, None), "u1")


def test_a_group_of_a_log_begins_where_it_was_committed(here):
    put("file://log", range(10))
    source = parse_source("file://log", group="g")
    step = source.start(CONTEXT)
    assert list(itertools.islice(step, 4)) == [0, 1, 2, 3]
    source.commit(step.position())  # by whoever knows that they are done; the step has the group's lock
    step.close()
    assert take("file://log", group="g")[0] == [4, 5, 6, 7, 8, 9]
    parse_source("file://log").commit({"sequence": 9})
    assert take("file://log")[0] == list(range(10))


class Recorder:
    made = 0

    def __init__(self):
        self.calls = []
        type(self).made += 1

    def __call__(self, item):
        self.calls.append(item)

    def finish(self):
        self.calls.append("finish")

    def close(self):
        self.calls.append("close")


def test_functions_and_lists_as_sinks():
    got = []
    put(got.append, [1, 2])
    put(got, [3])
    assert got == [1, 2, 3]
    assert put(None, [4, 5]).items == [4, 5]
    put(lambda item: got.append(-item), [6])
    assert got[-1] == -6
    sink = parse_sink(Recorder)
    assert Recorder.made == 0
    step = sink.start(CONTEXT)
    step.write(1)
    step.finish()
    step.close()
    assert step._function.calls == [1, "finish", "close"]
    assert step.position() is None
    for thing in (3, "words.txt", "tcp://x", "shm://a b", "no/folder/a.npy", "file://no/folder/log"):
        with pytest.raises(dsline.PipelineBuildError, match=r"sink|scheme|channel|folder"):
            parse_sink(thing)
    with pytest.raises(dsline.PipelineBuildError, match="no option 'speed'"):
        parse_sink("a.npy", speed=1)


def test_what_is_collected_is_kept():
    base = np.arange(10)
    view = base[2:4]
    kept = collect([view, Batch(t=view), [view], {"v": view}, 5, memoryview(b"x")])
    base[:] = 0
    assert kept[0].tolist() == [2, 3]
    assert kept[1].t.tolist() == [2, 3]
    assert kept[2][0].tolist() == [2, 3]
    assert kept[3]["v"].tolist() == [2, 3]
    assert kept[4:] == [5, b"x"]
    assert own(base) is base


def test_sink_options():
    made = SinkOptions("shm://x", full="latest", queue=3, name="view", timeout=1)
    assert made.target == "shm://x"
    assert made.options == {"full": "latest", "queue": 3, "name": "view", "timeout": 1}
    assert SinkOptions([]).options == {"full": "block"}
    with pytest.raises(dsline.PipelineBuildError, match="full is 'newest', must be one of 'block'"):
        SinkOptions("shm://x", full="newest")


# --- channels -----------------------------------------------------------------------------------------------------------


def receiver(thing, got, **options):
    def run():
        step = parse_source(thing, **options).start(CONTEXT)
        for item in step:
            got.append(own(item))
            del item
        step.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def left():
    return [each.name for each in dsline.status.list_channels()]


def test_a_channel_between_two_pipelines(name):
    got = []
    thread = receiver(f"shm://{name}", got)  # waits until the sink makes it
    put(f"shm://{name}", [*FRAMES, {"a": 1}, b"x", Batch(t=[1])], capacity=4)
    thread.join(TIMEOUT)
    assert same(got[:7], FRAMES)
    assert got[7:9] == [{"a": 1}, b"x"]
    assert same(got[9], Batch(t=[1]))
    assert name not in left()


def test_a_receiver_that_comes_after_the_end(name):
    put(f"shm://{name}", FRAMES)
    assert name in left()
    assert same(collect(receive_from(f"shm://{name}")), FRAMES)
    assert name not in left()


@pytest.mark.parametrize("early", [True, False])
def test_all_receivers_see_the_end(name, early):
    got = [[], [], []]
    uri = f"shm://{name}"
    with contextlib.ExitStack() as stack:
        if early:
            threads = [receiver(uri, each) for each in got]
            step = parse_sink(uri).start(CONTEXT)
            wait_until(lambda: dsline.status.inspect(name).alive == 4)
            for number in range(50):
                step.write(number)
            step.finish()
            step.close()
        else:
            put(uri, range(50))
            stack.enter_context(dsline.ShmChannel.open(name))  # it is there until all have seen it
            threads = [receiver(uri, each) for each in got]
        for thread in threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
    assert sorted(itertools.chain(*got)) == list(range(50))


@pytest.mark.parametrize("on_end", ["keep", "end", "shutdown", None])
def test_the_end_of_a_channel_of_somebody_else(name, on_end):
    with dsline.ShmChannel(name, timeout=5) as channel:
        put(f"shm://{name}", [1, 2], on_end=on_end)
        assert [channel.recv_object(), channel.recv_object()] == [1, 2]
        if on_end in ("keep", None):
            channel.send_object(3)
            assert channel.recv_object() == 3
        else:
            with pytest.raises(dsline.ChannelClosedError):
                channel.recv()
            if on_end == "end":
                channel.send_object(3)  # the channel goes on
                assert channel.recv_object() == 3


def test_an_open_channel_as_source_and_sink():
    with dsline.ShmChannel(capacity=8, timeout=5) as channel:
        put(channel, [1, 2, 3], on_end="end")
        step = parse_source(channel).start(CONTEXT)
        assert list(step) == [1, 2, 3]
        step.close()
        assert not channel.closed
        assert parse_source(channel).is_open_channel
        with pytest.raises(dsline.PipelineBuildError, match="cannot be written as text"):
            parse_source(channel).to_json()
        with pytest.raises(dsline.PipelineBuildError, match="an open channel has its policy, 'block'"):
            parse_sink(channel, full="drop_oldest")
    with pytest.raises(dsline.PipelineBuildError, match="is closed"):
        parse_source(channel)


def test_policies_of_a_channel_sink(name):
    uri = f"shm://{name}"
    for full, left_over in (("drop_oldest", [3, 4]), ("drop_newest", [0, 1]), ("latest", [4])):
        options = {} if full == "latest" else {"capacity": 2}
        with parse_sink(uri, full=full, on_end="keep", **options).open()[0] as channel:
            put(uri, range(5), full=full, on_end="keep", **options)
            assert [channel.recv_object() for _ in range(len(channel))] == left_over
    with parse_sink(uri, full="error", capacity=2).open()[0], pytest.raises(dsline.BufferFullError):
        put(uri, range(5), full="error", capacity=2)
    dsline.status.remove(name, force=True)
    with pytest.raises(dsline.PipelineBuildError, match="leave capacity out"):
        parse_sink(uri, full="latest", capacity=2)
    with pytest.raises(dsline.PipelineBuildError, match="on_end is 'stop'"):
        parse_sink(uri, on_end="stop")


@pytest.mark.parametrize("policy", ["drop_newest", "raise"])
def test_an_end_is_not_dropped(name, policy):
    with dsline.ShmChannel(name, capacity=2, backpressure=policy, timeout=5) as channel:
        step = parse_sink(channel, on_end="end").start(CONTEXT)
        step.write(1)
        step.write(2)
        got = []
        finishing = threading.Thread(target=step.finish)
        finishing.start()
        got += [channel.recv_object(), channel.recv_object()]
        finishing.join(TIMEOUT)
        assert list(receive_from(channel, timeout=5)) == []
        assert got == [1, 2]


def test_a_sink_that_waits_is_stopped(name):
    with dsline.ShmChannel(name, capacity=2) as channel:
        step = parse_sink(channel).start(CONTEXT)
        step.write(1)
        step.write(2)
        raised = []

        def write():
            try:
                step.write(3)
            except dsline.PipelineRuntimeError as error:
                raised.append(str(error))

        thread = threading.Thread(target=write)
        thread.start()
        wait_until(lambda: dsline.status.inspect(name).participants[0].waiting_for == "room")
        step.stop()
        thread.join(TIMEOUT)
        assert "has no room, and the sink was told to stop" in raised[0]
        assert [channel.recv_object(), channel.recv_object()] == [1, 2]
    with dsline.ShmChannel(name, capacity=1) as channel:
        channel.send(b"x")
        with pytest.raises(dsline.BufferFullError):
            put(channel, [1], timeout=0.01)
        channel.recv()


def test_a_channel_that_nobody_makes(name):
    step = parse_source(f"shm://{name}", wait=0.02).start(CONTEXT)
    with pytest.raises(dsline.ChannelNotFoundError, match="nobody made one within"):
        list(step)
    got = []
    step = parse_source(f"shm://{name}", wait=None).start(CONTEXT)
    thread = threading.Thread(target=lambda: got.extend(step))
    thread.start()
    step.stop()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    step = parse_source(f"shm://{name}", capacity=4).start(CONTEXT)  # makes it
    thread = threading.Thread(target=lambda: got.extend(step))
    thread.start()
    wait_until(lambda: name in left())
    with dsline.ShmChannel.open(name) as channel:
        assert channel.capacity == 4
    step.stop()
    thread.join(TIMEOUT)
    step.close()
    assert name not in left()


def test_a_message_stays_with_its_receiver_until_the_next():
    with dsline.ShmChannel(timeout=5) as channel:
        for number in range(3):
            channel.send(np.full(10, number))
        items = iter(parse_source(channel).start(CONTEXT))
        first = next(items)
        assert channel.stats().pinned_slots == 1
        del first
        assert channel.stats().pinned_slots == 1  # the process may die while it works on it
        second = next(items)
        assert channel.stats().pinned_slots == 1
        assert second[0] == 1
        items.close()


def test_a_bus(name):
    uri = f"bus://{name}"
    with dsline.Broadcast(name, capacity=32):
        got = [[], [], []]
        source = parse_source(uri)
        assert source.open().group == source.open().group  # workers of one stage share the messages
        threads = [
            receiver(uri, got[0]),
            receiver(uri, got[1]),
            receiver(uri, got[2], group="g", start="oldest"),
        ]
        wait_until(lambda: len([g for g in dsline.status.inspect(name).groups if g.members]) == 3)
        put(uri, range(10), on_end="shutdown")
        for thread in threads:
            thread.join(TIMEOUT)
        assert got == [list(range(10))] * 3
    with pytest.raises(dsline.PipelineBuildError, match="start is 'first'"):
        parse_source(uri, start="first")


def test_typed_channels(name):
    spec = dsline.ArraySpec((None, 3), "f4")
    with dsline.ShmChannel(name, spec=spec):
        assert parse_source(f"shm://{name}").schema == spec
    sink = parse_sink(f"shm://{name}", spec=spec)
    sink.check(dsline.ArraySpec((5, 3), "f4"))
    sink.check(None)
    for wrong in (
        dsline.ArraySpec((5, 4), "f4"),
        dsline.ArraySpec((5, 3), "f8"),
        {"t": dsline.ArraySpec((None,), "f4")},
    ):
        with pytest.raises(dsline.PipelineBuildError, match="carries"):
            sink.check(wrong)
    record = {"t": dsline.ArraySpec((), "f8"), "n": dsline.ArraySpec((2,), "i4")}
    with dsline.ShmChannel(spec=record, timeout=5) as channel:
        put(channel, [{"t": 1.5, "n": np.array([1, 2], "i4")}], on_end="end")
        assert channel.recv_record()["n"].tolist() == [1, 2]
        assert list(receive_from(channel)) == []
        channel.send({"t": 2.5, "n": np.array([3, 4], "i4")})
        (item,), _ = take(channel, 1)
        parse_sink(channel).check(parse_source(channel).schema)
        with pytest.raises(dsline.PipelineBuildError, match="carries"):
            parse_sink(channel).check(spec)
        assert parse_source(channel).schema.matches(item)
        assert item["t"] == 2.5


def test_send_to_and_receive_from(name):
    uri = f"shm://{name}"
    assert send_to([1, "two", np.arange(3)], uri) == 3
    got = collect(receive_from(uri))
    assert got[:2] == [1, "two"]
    assert got[2].tolist() == [0, 1, 2]
    with dsline.ShmChannel(capacity=8, timeout=5) as channel:
        for _ in range(2):  # the channel goes on behind an END
            assert send_to(range(3), channel) == 3
            assert list(receive_from(channel)) == [0, 1, 2]
        with pytest.raises(dsline.BufferEmptyError):
            list(receive_from(channel, timeout=0.01))
    for call in (lambda: send_to([1], "file://x"), lambda: list(receive_from([1]))):
        with pytest.raises(dsline.PipelineBuildError, match="is no channel"):
            call()


def test_an_end_that_shuts_the_channel_down():
    with dsline.ShmChannel(timeout=5) as channel:
        channel.send_object(1)
        channel._core_send_control(16, SHUT_DOWN_AT_END, 1)
        assert list(receive_from(channel)) == [1]
        with pytest.raises(dsline.ChannelClosedError):
            channel.send_object(2)


# --- texts --------------------------------------------------------------------------------------------------------------


def a_sink(item):
    raise AssertionError


def test_descriptions_go_to_json_and_back(here, name):
    np.save("a.npy", np.zeros((3, 4)))
    np.save("b.npy", np.zeros(3))
    put("file://log", FRAMES)
    sources = [
        parse_source(
            "shm://camera", group="g", start="oldest", capacity=4, spec=dsline.ArraySpec((3,), "f4")
        ),
        parse_source("bus://camera"),
        parse_source("file://log", replay_rate=2.0, follow=True),
        parse_source("a.npy", rows=2),
        files("*.npy", shuffle=3, load=np.load),
        parse_source(numbers),
    ]
    sinks = [
        parse_sink("shm://camera", full="drop_oldest", capacity=4),
        parse_sink("bus://camera", full="latest", on_end="end"),
        parse_sink("file://log", sync="100ms"),
        parse_sink("a.npy", append="rows"),
        parse_sink("a.npz"),
        parse_sink(),
        parse_sink(a_sink),
    ]
    for each, back in [*((s, source_from_json) for s in sources), *((s, sink_from_json) for s in sinks)]:
        data = each.to_json()
        again = back(json.loads(json.dumps(data)))
        assert type(again) is type(each)
        assert again.to_json() == data
        assert again.describe() == each.describe()
        travelled = pickle.loads(pickle.dumps(each))
        assert travelled.to_json() == data
    for thing in ([1], np.zeros(3), (n for n in [1])):
        with pytest.raises(dsline.PipelineBuildError, match="cannot be written as text"):
            parse_source(thing).to_json()
    with pytest.raises(dsline.PipelineBuildError, match="lambda"):
        parse_sink(lambda item: None).to_json()
    for data in (
        {},
        {"source": "x"},
        {"source": "array"},
        {"sink": "shm"},
        {"sink": "log", "path": "a", "x": 1},
    ):
        with pytest.raises(dsline.PipelineBuildError):
            (sink_from_json if "sink" in data else source_from_json)(data)


def test_places(here):
    np.save("a.npy", np.zeros(3))
    assert parse_source("a.npy").target == parse_sink(here / "a.npy").target == f"file://{here}/a.npy"
    assert parse_source("shm://x").target == parse_sink("shm://x").target == "shm://x"
    assert parse_source([1]).target is parse_sink().target is None
    assert isinstance(parse_source("shm://x"), Source)
    assert isinstance(parse_sink("shm://x"), Sink)


def test_known_suffixes_are_lower_case():
    assert all(
        suffix == suffix.lower() and suffix[0] == "."
        for suffix in media.IMAGE_SUFFIXES + media.VIDEO_SUFFIXES
    )
