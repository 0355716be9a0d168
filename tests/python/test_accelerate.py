"""What `import dsline.accelerate` does to a pickle of multiprocessing, and what it leaves alone."""

import copyreg
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from support import STRICT, assert_clean, forked, run_script

import dsline

LARGE = 100_000


@pytest.fixture(scope="module")
def module():
    import dsline.accelerate

    return dsline.accelerate


@pytest.fixture
def accelerate(module):
    """The module, as after its import, with a store of its own that goes with the test."""
    forget(module)
    module._state.reset_counters()
    module.enable(threshold=64 * 1024)
    yield module
    forget(module)


def forget(module):
    module.disable()
    for store in module._state.stores.values():
        store.close()
    module._state.stores.clear()
    module._state.own = None
    gc.collect()


def through(value):
    return ForkingPickler.loads(ForkingPickler.dumps(value))


def array_of(dtype, shape=(300, 400)):
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    data = np.random.default_rng(3).integers(0, 2, count * max(dtype.itemsize, 1), np.uint8)
    return np.frombuffer(data.tobytes(), dtype, count).reshape(shape)


DTYPES = [
    "u1",
    "<i2",
    ">i4",
    "<f8",
    ">f4",
    "f2",
    "c16",
    "?",
    "S7",
    "<U3",
    ">U2",
    "V5",
    "M8[us]",
    "m8[3D]",
    np.dtype([("a", "<i4"), ("b", ">f8", (2,))]),
    np.dtype([("a", "u1"), ("b", "f8")], align=True),
    np.dtype({"names": ["x", "y"], "formats": ["i4", "i2"], "offsets": [8, 0], "itemsize": 20}),
    np.dtype([(("title", "name"), "i4")]),
    np.dtype("f8", metadata={"unit": "m"}),
    np.longdouble,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_as_it_was(accelerate, dtype):
    array = array_of(dtype)
    got = through(array)
    # NumPy unpickles plain numbers of the other byte order into the machine's own, so these go as before.
    assert accelerate.stats().loaded == int(array.dtype.byteorder != ">")
    before = pickle.loads(pickle.dumps(array))
    assert type(got) is np.ndarray
    assert got.dtype == before.dtype
    assert got.dtype.isalignedstruct == before.dtype.isalignedstruct
    assert got.dtype.metadata == before.dtype.metadata
    assert got.dtype.fields == before.dtype.fields
    assert got.shape == array.shape
    assert got.tobytes() == before.tobytes()
    assert got.flags.writeable


@pytest.mark.parametrize(
    "make",
    [
        lambda base: base,
        np.asfortranarray,
        lambda base: base[::2],
        lambda base: base[:, ::-1],
        lambda base: base.T,
        lambda base: base.reshape(4, 25, 2, 1000).transpose(2, 0, 3, 1),
        lambda base: np.broadcast_to(base[:1], (500, 2000)),
        lambda base: base.reshape(-1),
        lambda base: base[np.newaxis, :, np.newaxis],
    ],
    ids=["C", "F", "rows", "backward", "transposed", "permuted", "broadcast", "1-d", "ones"],
)
def test_order_and_strides_come_as_pickle_gives_them(accelerate, make):
    array = make(np.arange(200_000.0).reshape(100, 2000))
    array.flags.writeable = False
    got, before = through(array), pickle.loads(pickle.dumps(array))
    assert accelerate.stats().loaded == 1
    np.testing.assert_array_equal(got, array)
    assert got.strides == before.strides
    assert got.flags.f_contiguous == before.flags.f_contiguous
    assert got.flags.writeable
    assert not np.shares_memory(got, array)


class Sub(np.ndarray):
    pass


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(10),
        np.zeros(64 * 1024 - 1, np.uint8),
        np.zeros(0),
        np.array(5.0),
        np.array([{"a": 1}] * LARGE, dtype=object),
        np.array([(1, "x")] * LARGE, dtype=[("a", "i4"), ("b", object)]),
        np.ma.masked_equal(np.arange(LARGE), 3),
        np.zeros(LARGE).view(Sub),
        b"x" * LARGE,
    ],
    ids=["small", "just below", "empty", "0-d", "objects", "fields", "masked", "subclass", "bytes"],
)
def test_everything_else_goes_as_before(accelerate, value):
    pickled = ForkingPickler.dumps(value)
    assert accelerate.stats().sent == 0
    assert accelerate.stats().plain == 0
    assert bytes(pickled).find(b"dsline") == -1
    got = ForkingPickler.loads(pickled)
    assert type(got) is type(value)
    if isinstance(value, np.ndarray):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(value))


def test_the_threshold_counts_bytes(accelerate):
    through(np.zeros(64 * 1024, np.uint8))
    assert accelerate.stats().sent == 1
    accelerate.enable(threshold=1000)
    through(np.zeros(1000, np.uint8))
    through(np.zeros(999, np.uint8))
    assert accelerate.stats().sent == 2
    assert accelerate.stats().threshold == 1000


def test_the_token_is_small_and_the_pickler_of_pickle_is_left_alone(accelerate):
    array = np.zeros(LARGE)
    assert len(ForkingPickler.dumps(array)) < 500
    assert len(pickle.dumps(array)) > array.nbytes
    assert accelerate.reclaim(0) == 1


def test_one_array_twice_in_an_object_stays_one(accelerate):
    array = np.zeros(LARGE)
    one, other = through([array, array])
    assert one is other
    assert accelerate.stats().sent == 1


def test_a_view_and_its_base_are_independent_as_after_pickle(accelerate):
    array = np.zeros(LARGE)
    one, other = through([array, array[1:]])
    other[:] = 1
    assert one.sum() == 0


def test_protocols(accelerate):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        array = np.arange(LARGE)
        got = pickle.loads(ForkingPickler.dumps(array, protocol))
        np.testing.assert_array_equal(got, array)
        np.testing.assert_array_equal(through(np.arange(5)), np.arange(5))


def test_what_was_sent_is_as_it_was_then(accelerate):
    array = np.arange(LARGE)
    pickled = ForkingPickler.dumps(array)
    array[:] = 0
    np.testing.assert_array_equal(ForkingPickler.loads(pickled), np.arange(LARGE))


def test_disable_restores_and_what_is_under_way_arrives(accelerate):
    pickled = ForkingPickler.dumps(np.arange(LARGE))
    accelerate.disable()
    assert not accelerate.is_enabled()
    assert np.ndarray not in ForkingPickler._extra_reducers
    assert multiprocessing.connection.SocketClient is accelerate._original_client
    assert "DSLINE_ACCELERATE_STORE" not in os.environ
    assert len(ForkingPickler.dumps(np.arange(LARGE))) > LARGE
    np.testing.assert_array_equal(ForkingPickler.loads(pickled), np.arange(LARGE))
    accelerate.disable()
    accelerate.enable()
    assert len(ForkingPickler.dumps(np.arange(LARGE))) < 500


def test_a_reducer_that_was_there_before_is_kept(accelerate):
    accelerate.disable()
    seen = []

    def reducer(array):
        seen.append(array)
        return array.__reduce_ex__(4)

    ForkingPickler.register(np.ndarray, reducer)
    try:
        accelerate.enable()
        through(np.zeros(5))
        assert len(seen) == 1
        through(np.zeros(LARGE))
        assert len(seen) == 1
        accelerate.disable()
        assert ForkingPickler._extra_reducers[np.ndarray] is reducer
    finally:
        del ForkingPickler._extra_reducers[np.ndarray]


def test_reducers_of_copyreg_are_kept_for_small_arrays(accelerate):
    seen = []

    def reducer(array):
        seen.append(array)
        return array.__reduce_ex__(4)

    copyreg.pickle(np.ndarray, reducer)
    try:
        through(np.zeros(5))
        assert len(seen) == 1
    finally:
        del copyreg.dispatch_table[np.ndarray]


def test_a_second_load_says_why_it_fails(accelerate):
    pickled = bytes(ForkingPickler.dumps(np.zeros(LARGE)))
    pickle.loads(pickled)
    with pytest.raises(dsline.SerializationError, match=r"loaded once.*pickle\.dumps"):
        pickle.loads(pickled)


def test_no_room_is_no_error(accelerate):
    accelerate.enable(limit=16 << 20)
    arrays = [np.full(1 << 20, number) for number in range(4)]
    pickles = [ForkingPickler.dumps(array) for array in arrays]
    stats = accelerate.stats()
    assert (stats.sent, stats.plain) == (1, 3)
    assert 8 << 20 <= stats.waiting_bytes <= stats.limit == 16 << 20
    for array, pickled in zip(arrays, pickles, strict=True):
        np.testing.assert_array_equal(ForkingPickler.loads(pickled), array)
    through(arrays[0])
    assert accelerate.stats().sent == 2


def test_an_array_larger_than_the_store_is_pickled(accelerate):
    accelerate.enable(limit=16 << 20)
    array = np.zeros((17 << 20) // 8)
    np.testing.assert_array_equal(through(array), array)
    assert accelerate.stats().plain == 1


def test_all_slots_taken_is_no_error(accelerate):
    accelerate.enable(threshold=1)
    kept = [ForkingPickler.dumps(np.array([number])) for number in range(300)]
    stats = accelerate.stats()
    assert (stats.sent, stats.plain, stats.waiting) == (256, 44, 256)
    assert [int(ForkingPickler.loads(each)[0]) for each in kept] == list(range(300))
    assert accelerate.stats().waiting == 0


def test_reclaim_drops_what_is_old_enough(accelerate):
    lost = ForkingPickler.dumps(np.zeros(LARGE))
    assert accelerate.reclaim() == 0
    assert accelerate.reclaim(older_than=0) == 1
    assert accelerate.stats().waiting == 0
    with pytest.raises(dsline.SerializationError, match="reclaim"):
        ForkingPickler.loads(lost)
    for bad in (-1, float("nan")):
        with pytest.raises(dsline.InvalidArgumentError, match="older_than"):
            accelerate.reclaim(bad)


def test_trim_gives_memory_back(accelerate):
    through(np.zeros(1 << 20))
    assert accelerate.stats().idle_bytes >= 8 << 20
    accelerate.trim()
    assert accelerate.stats().idle_bytes < 4 << 20


def test_a_store_that_is_replaced_is_still_read_from(accelerate):
    pickled = ForkingPickler.dumps(np.arange(LARGE))
    accelerate.enable(limit=32 << 20)
    assert accelerate.stats().limit == 32 << 20
    np.testing.assert_array_equal(ForkingPickler.loads(pickled), np.arange(LARGE))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threshold": 0}, dsline.InvalidArgumentError),
        ({"threshold": 1.5}, TypeError),
        ({"limit": 1000}, dsline.InvalidArgumentError),
        ({"limit": True}, TypeError),
    ],
)
def test_bad_sizes(accelerate, options, error):
    with pytest.raises(error, match=next(iter(options))):
        accelerate.enable(**options)


def test_without_memory_for_the_result_the_array_stays(accelerate, monkeypatch):
    pickled = ForkingPickler.dumps(np.arange(LARGE))

    def empty(*args):
        raise MemoryError

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(MemoryError):
        ForkingPickler.loads(pickled)
    monkeypatch.undo()
    np.testing.assert_array_equal(ForkingPickler.loads(pickled), np.arange(LARGE))


def test_a_forked_child_sends_and_loads(accelerate):
    pickled = ForkingPickler.dumps(np.arange(LARGE))
    read, write = os.pipe()

    def child():
        np.testing.assert_array_equal(ForkingPickler.loads(pickled), np.arange(LARGE))
        assert accelerate.stats().loaded == 1
        os.write(write, bytes(ForkingPickler.dumps(np.arange(7, LARGE))))
        assert accelerate.stats().sent == 1

    forked(child)
    np.testing.assert_array_equal(pickle.loads(os.read(read, 1000)), np.arange(7, LARGE))
    os.close(read)
    os.close(write)


def test_a_child_whose_parent_has_not_imported_it_waits_for_a_token():
    # It must not make a store that would go with it.
    assert_clean(
        run_script(
            "import multiprocessing as mp, numpy as np\n"
            "def child(c):\n"
            "    import dsline.accelerate as a\n"
            "    assert not a.is_enabled() and a.stats().enabled\n"
            "    c.send(np.zeros(100000))\n"
            "    assert a.stats().plain == 1\n"
            "    try:\n        a.enable(limit=1 << 25)\n"
            "    except ValueError as error:\n        assert 'starts the others' in str(error)\n"
            "    else:\n        raise AssertionError\n"
            "    c.send(1)\n"
            "    assert c.recv().sum() == 100000 and a.is_enabled()\n"
            "    c.send(np.ones(100000))\n"
            "    assert a.stats().sent == 1\n"
            "ours, theirs = mp.Pipe()\n"
            "import warnings; warnings.simplefilter('ignore')\n"
            "p = mp.get_context('fork').Process(target=child, args=(theirs,)); p.start()\n"
            "assert ours.recv().sum() == 0 and ours.recv() == 1\n"
            "import dsline.accelerate\n"
            "ours.send(np.ones(100000))\n"
            "assert ours.recv().sum() == 100000\n"
            "p.join(); assert p.exitcode == 0\n"
        )
    )


def test_little_address_space_is_a_smaller_store_or_none():
    script = (
        "import resource, warnings\n"
        "import dsline\n"
        "import dsline._core\n"
        "with open('/proc/self/statm') as file:\n    used = int(file.read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + {room},) * 2)\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    import dsline.accelerate as a\n"
        "import numpy as np\n"
        "from multiprocessing.reduction import ForkingPickler as F\n"
        "assert F.loads(F.dumps(np.ones(100000))).sum() == 100000\n"
        "print(a.stats().attached, len(told), a.stats().limit)\n"
    )
    done = run_script(script.format(room=64 << 20))
    assert (done.returncode, done.stdout, done.stderr) == (0, "False 1 0\n", "")
    done = run_script(script.format(room=40 << 30))
    assert (done.returncode, done.stderr) == (0, "")
    attached, told, limit = done.stdout.split()
    assert (attached, told) == ("True", "0")
    assert 16 << 20 <= int(limit) < 40 << 30


def test_a_stale_or_malformed_address_in_the_environment_is_ignored():
    for value in ("zz", "00", "00" * 16, "00" * 24, "ab" * 16 + "ffffff7f05000000"):
        done = subprocess.run(
            [
                sys.executable,
                *STRICT,
                "-c",
                "import dsline.accelerate as a; print(a.is_enabled(), a.stats().limit > 0)",
            ],
            env={**os.environ, "DSLINE_ACCELERATE_STORE": value},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", ""), value
