"""SharedBatch in one process: rows, batches, views, names, bad input."""

import gc
import pickle
import threading

import numpy as np
import pytest

import dsline


@pytest.fixture
def batches():
    with dsline.SharedBatch(3, (2, 4), np.int32, timeout=0) as made:
        yield made


def fill(batches, count, first=0):
    for number in range(first, first + count):
        with batches.row() as row:
            row.array[...] = number


def first_of(array):
    assert (array == array[:, :1, :1]).all(), "a row is not whole"
    return array[:, 0, 0].tolist()


@pytest.mark.parametrize("shape", [(), 5, (5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["u1", ">f8", "M8[ns]", "S3", [("a", "<i4"), ("b", "<f8")]])
def test_what_is_written_is_read(shape, dtype):
    with dsline.SharedBatch(2, shape, dtype, timeout=0) as batches:
        rows = [np.frombuffer(np.random.default_rng(i).bytes(4000), np.uint8) for i in range(2)]
        sizes = (shape,) if isinstance(shape, int) else shape
        kind = np.dtype(dtype)
        for data in rows:
            with batches.row() as row:
                assert (row.array.shape, row.array.dtype) == (sizes, kind)
                length = row.array.nbytes
                row.array[...] = np.frombuffer(data[:length].tobytes(), kind).reshape(sizes)
        with batches.recv() as ready:
            assert (ready.array.shape, ready.array.dtype) == ((2, *sizes), kind)
            assert ready.array.tobytes() == b"".join(data[:length].tobytes() for data in rows)
        assert (batches.n, batches.shape, batches.dtype, batches.batches) == (2, sizes, kind, 2)


def test_batches_go_round(batches):
    for turn in range(20):
        fill(batches, 6, 10 * turn)
        with pytest.raises(dsline.BufferFullError, match="2 batches of 3 rows"):
            batches.row()
        for half in range(2):
            with batches.recv() as ready:
                assert first_of(ready.array) == [10 * turn + 3 * half + i for i in range(3)]
                assert (ready.batch, ready.generation, ready.redelivered) == (half, turn, False)
        with pytest.raises(dsline.BufferEmptyError):
            batches.recv()


def test_rows_are_told_by_batch_and_index(batches):
    places = []
    for _ in range(6):
        with batches.row() as row:
            places.append((row.batch, row.index))
    assert places == [(batch, index) for batch in range(2) for index in range(3)]


def test_a_batch_is_full_when_its_last_row_is(batches):
    rows = [batches.row() for _ in range(3)]
    for number in (2, 0, 1):
        with pytest.raises(dsline.BufferEmptyError):
            batches.recv()
        with rows[number] as row:
            row.array[...] = number
    with batches.recv() as ready:
        assert first_of(ready.array) == [0, 1, 2]


def test_a_block_that_fails_gives_the_row_back(batches):
    for _ in range(40):  # more often than the channel delivers
        with pytest.raises(LookupError), batches.row() as row:
            row.array[...] = -1
            raise LookupError
    places = set()
    for number in range(6):
        with batches.row(timeout=10) as row:
            places.add((row.batch, row.index))
            row.array[...] = number
    assert len(places) == 6
    for _ in range(2):
        with batches.recv() as ready:
            assert len(first_of(ready.array)) == 3


def test_a_row_that_is_forgotten_comes_back(batches):
    batches.row()
    gc.collect()
    fill(batches, 3)
    with batches.recv() as ready:
        assert sorted(first_of(ready.array)) == [0, 1, 2]


def test_a_row_cannot_be_written_when_it_is_over(batches):
    with batches.row() as row:
        mine = row.array
        mine[...] = 7
    with pytest.raises(ValueError, match="read-only"):
        mine[...] = 8
    with pytest.raises(ValueError, match="has been given back"):
        row.array  # noqa: B018
    with pytest.raises(LookupError), batches.row() as row:
        mine = row.array
        raise LookupError
    with pytest.raises(ValueError, match="read-only"):
        mine[...] = 8


def test_other_views_on_a_row_are_refused(batches):
    part = None
    with pytest.raises(BufferError, match=r"1 view\(s\) on the row are alive"), batches.row() as row:
        row.array[...] = 1
        part = row.array[1:]
    del part
    fill(batches, 3)
    with batches.recv() as ready:
        assert sorted(first_of(ready.array)) == [0, 1, 2]


def test_a_batch_is_read_only(batches):
    fill(batches, 3)
    with batches.recv() as ready:
        with pytest.raises(ValueError, match="read-only"):
            ready.array[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            ready.array[1:].flags.writeable = True


@pytest.mark.parametrize(
    "derive",
    [lambda a: a, lambda a: a[1:], lambda a: memoryview(a), lambda a: a.reshape(-1)[3:], lambda a: [a.T]],
)
def test_views_keep_a_batch(batches, derive):
    fill(batches, 6)
    with batches.recv() as ready:
        kept = derive(ready.array)
    with pytest.raises(ValueError, match="has been released"):
        ready.array  # noqa: B018
    with pytest.raises(dsline.BufferFullError):
        batches.row()
    del kept
    fill(batches, 3)


def test_a_batch_that_fails_comes_again(batches):
    fill(batches, 3)
    for attempt in range(40):  # more often than the channel delivers
        with pytest.raises(LookupError), batches.recv(timeout=10) as ready:
            assert first_of(ready.array) == [0, 1, 2]
            assert ready.redelivered == (attempt not in (0,)) or attempt > 10
            raise LookupError
    batches.recv(timeout=10).nack()
    batches.recv(timeout=10).release()
    with pytest.raises(dsline.BufferEmptyError):
        batches.recv()
    fill(batches, 6)


def test_iteration(batches):
    got = []

    def produce():
        for number in range(15):
            with batches.row(timeout=30) as row:
                row.array[...] = number
        batches.shutdown()

    producer = threading.Thread(target=produce)
    producer.start()
    batches._timeout = 30
    for ready in batches:
        got += first_of(ready.array)
    producer.join()
    assert got == list(range(15))


def test_a_loop_that_is_left_gives_its_batch_back(batches):
    fill(batches, 6)
    for ready in batches:
        assert first_of(ready.array) == [0, 1, 2]
        break
    del ready
    gc.collect()
    assert [first_of(batches.recv().array) for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_the_end(batches):
    fill(batches, 4)
    started = batches.row()
    batches.shutdown()
    assert batches.closed
    with pytest.raises(dsline.ChannelClosedError):
        batches.row()
    with pytest.raises(dsline.ChannelClosedError), started as row:
        row.array[...] = 4
        fill(batches, 1)
    with batches.recv() as ready:
        assert first_of(ready.array) == [0, 1, 2]
    with pytest.raises(dsline.ChannelClosedError):
        batches.recv()


def test_views_outlive_the_handle():
    batches = dsline.SharedBatch(3, (2, 4), np.int32, timeout=0)
    fill(batches, 3)
    kept = batches.recv().array
    batches.close()
    batches.close()
    assert first_of(kept) == [0, 1, 2]
    with pytest.raises(dsline.ChannelClosedError):
        batches.row()
    with pytest.raises(dsline.ChannelClosedError):
        batches.recv()


def test_tokens_and_messages_that_come_twice_do_no_harm(batches):
    """As after a death in the middle of sending them."""
    for turn in range(5):
        for batch in range(2):
            batches._send_tokens(batch, turn)
        fill(batches, 3)
        batches._tell_if_full(0, 0, turn)
        fill(batches, 3)
        batches._tell_if_full(0, 1, turn)
        batches._tell_if_full(1, 2, turn)
        with pytest.raises(dsline.BufferFullError):
            batches.row()
        for batch in range(2):
            with batches.recv() as ready:
                assert (ready.batch, ready.generation) == (batch, turn)
        with pytest.raises(dsline.BufferEmptyError):
            batches.recv()


def test_two_tokens_for_one_row_have_one_writer(batches):
    batches._send_tokens(0, 0)
    rows = [batches.row() for _ in range(6)]
    assert len({(row.batch, row.index) for row in rows}) == 6
    with pytest.raises(dsline.BufferFullError):
        batches.row()
    for row in rows:
        row._give_back()


def test_generations_wrap():
    with dsline.SharedBatch(2, 3, np.int64, timeout=0, batches=1) as batches:
        last = (1 << 24) - 1
        for _ in range(2):
            batches._todo.recv_message().release()
        words = batches._words
        assert words.exchange(0, 0, last << 40)
        for index in range(2):
            assert words.exchange(1 + index, 0, last << 40)
        batches._send_tokens(0, last)
        for turn in range(3):
            for number in range(2):
                with batches.row() as row:
                    row.array[...] = number
            with batches.recv() as ready:
                assert ready.generation == last + turn
                assert ready.array.tolist() == [[0] * 3, [1] * 3]


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_name_is_opened_or_created(name):
    with dsline.SharedBatch(3, (2, 4), np.int32, name=name, timeout=0) as batches:
        with dsline.SharedBatch(3, (2, 4), "i4", name=name, timeout=0) as other:
            fill(other, 2)
            with (
                dsline.SharedBatch.open(name, timeout=0) as third,
                pickle.loads(pickle.dumps(third)) as again,
            ):
                fill(again, 1, 2)
        with batches.recv() as ready:
            assert first_of(ready.array) == [0, 1, 2]
        assert repr(batches) == f"<dsline.SharedBatch {name!r}: 2 batches of 3 rows of int32 (2, 4)>"
    with pytest.raises(dsline.ChannelNotFoundError):
        dsline.SharedBatch.open(name)
    with dsline.SharedBatch(2, 7, np.int8, name=name) as batches:
        assert batches.n == 2


@pytest.mark.parametrize(
    "other", [(4, (2, 4), "i4", 2), (3, (4, 2), "i4", 2), (3, (2, 4), "u4", 2), (3, (2, 4), "i4", 3)]
)
def test_another_geometry_is_refused(name, other):
    n, shape, dtype, batches = other
    with dsline.SharedBatch(3, (2, 4), np.int32, name=name):
        with pytest.raises(dsline.ChannelMismatchError, match="2 batches of 3 rows of int32"):
            dsline.SharedBatch(n, shape, dtype, batches=batches, name=name)
        with dsline.SharedBatch.open(name) as same:
            assert same.n == 3


def test_what_is_none_is_refused(name):
    with dsline.Latest(name) as cell:
        cell.set(np.arange(3))
        with pytest.raises(dsline.ChannelMismatchError, match="no shared batch"):
            dsline.SharedBatch.open(name)
    with dsline.ShmChannel(name), pytest.raises(dsline.ChannelMismatchError):
        dsline.SharedBatch.open(name)


def test_an_anonymous_one_pickles_only_where_it_can_travel(batches):
    with pytest.raises(dsline.FeatureUnavailableError):
        pickle.dumps(batches)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, 3, "f4"), dsline.InvalidArgumentError),
        ((-1, 3, "f4"), dsline.InvalidArgumentError),
        ((1.5, 3, "f4"), TypeError),
        ((True, 3, "f4"), TypeError),
        ((1 << 20, 3, "f4"), dsline.InvalidArgumentError),
        ((2, (3, -1), "f4"), dsline.InvalidArgumentError),
        ((2, (3, 0), "f4"), dsline.InvalidArgumentError),
        ((2, 3, object), TypeError),
        ((2, 3, "V0"), dsline.InvalidArgumentError),
    ],
)
def test_bad_geometry(arguments, error):
    with pytest.raises(error):
        dsline.SharedBatch(*arguments)


def test_words_are_within_their_memory():
    words = dsline._core.SharedWords(bytearray(32), 8, 3)
    assert words.exchange(2, 0, 5)
    assert not words.exchange(2, 0, 6)
    assert words.load(2) == 5
    for call in (lambda: words.load(3), lambda: words.load(-1), lambda: words.all_match(1, 3, 0, 0, 0)):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(ValueError, match="read-only"):
        dsline._core.SharedWords(bytes(32), 0, 3)
