"""SharedBatch between processes, some of which die: every batch is whole, and none is lost."""

import contextlib
import mmap
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_sharer
import multiprocessing.resource_tracker
import os
import random
import signal
import sys
import time
import traceback

import numpy as np
import pytest
from support import TIMEOUT, reap

import dsline
from dsline import shared_batch

# pytest's timer is a thread, so that Python 3.12 and later warn about every fork here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

N, SHAPE = 4, (50, 7)
METHODS = ["fork", "spawn", "forkserver"]


@pytest.fixture(scope="module", autouse=True)
def helpers():
    """The helper processes of multiprocessing live as long as pytest: their pipes are nobody's leak."""
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def sharing_ends():
    """The thread and the socket by which multiprocessing passes descriptors on end with the test."""
    yield
    multiprocessing.resource_sharer.stop(timeout=TIMEOUT)


def produce(batches, count):
    for number in range(count):
        with batches.row(timeout=30) as row:
            row.array[...] = os.getpid() * 1000 + number
    batches.close()


def consume(batches, connection):
    for ready in batches:
        assert (ready.array == ready.array[:, :1, :1]).all()
        connection.send([ready.batch, ready.generation, ready.array[:, 0, 0].tolist()])
    connection.close()
    batches.close()


def carry(connection):
    batches = connection.recv()
    produce(batches, 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("named", [False, True])
def test_producers_and_consumers_in_processes_of_their_own(name, method, named):
    context = multiprocessing.get_context(method)
    with dsline.SharedBatch(N, SHAPE, np.int64, batches=3, name=name if named else None) as batches:
        receiver, sender = context.Pipe(duplex=False)
        consumers = [context.Process(target=consume, args=(batches, sender)) for _ in range(1)]
        producers = [context.Process(target=produce, args=(batches, 40)) for _ in range(2)]
        for process in consumers + producers:
            process.start()
        sender.close()
        for process in producers:
            process.join(TIMEOUT)
        batches.shutdown()
        got = []
        with contextlib.suppress(EOFError):
            while receiver.poll(TIMEOUT):
                got.append(receiver.recv())
        for process in consumers:
            process.join(TIMEOUT)
        receiver.close()
        assert [process.exitcode for process in consumers + producers] == [0, 0, 0]
        assert len({(batch, generation) for batch, generation, _ in got}) == len(got) == 20
        rows = sorted(value for _, _, values in got for value in values)
        assert rows == sorted(each.pid * 1000 + number for each in producers for number in range(40))
        for process in consumers + producers:
            process.close()


def test_over_a_connection(name):
    context = multiprocessing.get_context("spawn")
    with dsline.SharedBatch(N, SHAPE, np.int64) as batches:
        here, there = context.Pipe()
        process = context.Process(target=carry, args=(there,))
        process.start()
        here.send(batches)
        for _ in range(2):
            with batches.recv(timeout=TIMEOUT) as ready:
                assert (ready.array // 1000 == process.pid).all()
        process.join(TIMEOUT)
        assert process.exitcode == 0
        process.close()
        here.close()
        there.close()


# --- deaths at every step -------------------------------------------------------------------------------------------


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def then_die(method):
    def call(*arguments, **options):
        method(*arguments, **options)
        die()

    return call


class DyingWords:
    """Words that kill after a number of changes."""

    def __init__(self, words, changes):
        self._words = words
        self._left = changes

    def __getattr__(self, name):
        return getattr(self._words, name)

    def exchange(self, *arguments):
        if self._left == 0:
            die()
        self._left -= 1
        return self._words.exchange(*arguments)


def die_with_a_row(batches):
    with batches.row() as row:
        row.array[...] = -1
        die()


def die_before_the_row_is_claimed(batches):
    batches._words = DyingWords(batches._words, 0)
    batches.row()


def die_before_the_row_is_done(batches):
    batches._words = DyingWords(batches._words, 1)
    with batches.row() as row:
        row.array[...] = -1


def die_before_telling(batches):
    batches._tell_if_full = die
    with batches.row() as row:
        row.array[...] = 100


def die_after_telling(batches):
    batches._tell_if_full = then_die(batches._tell_if_full)
    with batches.row() as row:
        row.array[...] = 100


def die_with_a_batch(batches):
    held = batches.recv(timeout=TIMEOUT)
    die(held)


def die_before_the_batch_is_claimed(batches):
    batches._words = DyingWords(batches._words, 0)
    batches.recv(timeout=TIMEOUT)


def die_before_the_batch_has_gone_on(batches):
    batches._words = DyingWords(batches._words, 1)
    batches.recv(timeout=TIMEOUT).release()


def die_before_the_tokens(batches):
    batches._send_tokens = die
    batches.recv(timeout=TIMEOUT).release()


def die_between_the_tokens(batches):
    sent = []
    send = batches._todo.send

    class Todo:
        def __getattr__(self, name):
            return getattr(todo, name)

        def send(self, *arguments, **options):
            if len(sent) == 2:
                die()
            sent.append(send(*arguments, **options))

    todo = batches._todo
    batches._todo = Todo()
    batches.recv(timeout=TIMEOUT).release()


def die_after_the_tokens(batches):
    batches._send_tokens = then_die(batches._send_tokens)
    batches.recv(timeout=TIMEOUT).release()


def kill_in_child(batches, what):
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            what(batches)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "it did not get that far"


PRODUCER_DEATHS = [
    die_with_a_row,
    die_before_the_row_is_claimed,
    die_before_the_row_is_done,
    die_before_telling,
    die_after_telling,
]
CONSUMER_DEATHS = [
    die_with_a_batch,
    die_before_the_batch_is_claimed,
    die_before_the_batch_has_gone_on,
    die_before_the_tokens,
    die_between_the_tokens,
    die_after_the_tokens,
]


@pytest.mark.parametrize("death", PRODUCER_DEATHS)
@pytest.mark.parametrize("at", [0, 1, N - 1])
def test_a_producer_dies(death, at):
    with dsline.SharedBatch(N, SHAPE, np.int64, batches=1, timeout=TIMEOUT) as batches:
        for turn in range(2):
            for index in range(N):
                if index == at:
                    kill_in_child(batches, death)
                    if death in (die_before_telling, die_after_telling):
                        continue  # the dead has written it
                with batches.row() as row:
                    row.array[...] = index
            with pytest.raises(dsline.BufferFullError):
                batches.row(timeout=0.15)
            with batches.recv() as ready:
                assert ready.generation == turn
                values = ready.array[:, 0, 0].tolist()
                assert (ready.array == ready.array[:, :1, :1]).all()
                assert len(values) == N
                assert -1 not in values
            with pytest.raises(dsline.BufferEmptyError):
                batches.recv(timeout=0.15)


@pytest.mark.parametrize("death", CONSUMER_DEATHS)
def test_a_consumer_dies(death):
    with dsline.SharedBatch(N, SHAPE, np.int64, batches=2, timeout=TIMEOUT) as batches:
        seen = []
        for turn in range(3):
            for index in range(N):
                with batches.row() as row:
                    row.array[...] = 10 * turn + index
            kill_in_child(batches, death)
            with contextlib.suppress(dsline.BufferEmptyError):
                while True:
                    with batches.recv(timeout=0.25) as ready:
                        assert ready.array[:, 0, 0].tolist() == [10 * turn + index for index in range(N)]
                        seen.append((ready.batch, ready.generation))
        recycled = death in (die_before_the_tokens, die_between_the_tokens, die_after_the_tokens)
        assert len(seen) == (0 if recycled else 3), "seen once more by nobody, or by one"
        for index in range(2 * N):  # all rows are there, each once
            with batches.row() as row:
                row.array[...] = index
        with pytest.raises(dsline.BufferFullError):
            batches.row(timeout=0.15)
        for _ in range(2):
            with batches.recv() as ready:
                assert len(set(ready.array[:, 0, 0].tolist())) == N


def test_all_die_and_the_name_is_opened_again(name):
    """What was written is there, and goes on."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            batches = dsline.SharedBatch(N, SHAPE, np.int64, name=name, timeout=30)
            for index in range(N + 1):
                with batches.row() as row:
                    row.array[...] = index
            held = batches.recv()
            started = batches.row()
            started.array[...] = -1
            die(held)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    with dsline.SharedBatch(N, SHAPE, np.int64, name=name, timeout=30) as batches:
        for index in range(N - 1):
            with batches.row() as row:
                row.array[...] = 10 + index
        values = []
        for _ in range(2):
            with batches.recv() as ready:
                values.append(sorted(ready.array[:, 0, 0].tolist()))
        assert sorted(values) == [[0, 1, 2, 3], [4, 10, 11, 12]]


def test_a_creator_that_dies_is_replaced(name):
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            shared_batch.SharedBatch._start = die
            send = dsline.Broadcast.send
            dsline.Broadcast.send = lambda *a, **k: die() if len(a) else send(*a, **k)
            dsline.SharedBatch(N, SHAPE, np.int64, name=name)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    with pytest.raises(dsline.ChannelNotFoundError):
        dsline.SharedBatch.open(name)
    with dsline.SharedBatch(N, SHAPE, np.int64, name=name, timeout=30) as batches:
        for index in range(N):
            with batches.row() as row:
                row.array[...] = index
        batches.recv().release()


def test_many_create_one_name(name):
    context = multiprocessing.get_context("fork")

    def take_part():
        with dsline.SharedBatch(N, SHAPE, np.int64, name=name, timeout=30) as batches:
            produce_and_wait(batches, started, over)

    started, over = context.Semaphore(0), context.Event()
    processes = [context.Process(target=take_part) for _ in range(6)]
    for process in processes:
        process.start()
    for _ in processes:
        assert started.acquire(timeout=TIMEOUT)
    with dsline.SharedBatch.open(name, timeout=TIMEOUT) as batches:
        rows = []
        for _ in range(3):
            with batches.recv() as ready:
                rows += ready.array[:, 0, 0].tolist()
        over.set()
        for process in processes:
            process.join(TIMEOUT)
            assert process.exitcode == 0
        assert sorted(rows) == sorted(process.pid for process in processes for _ in range(2))
        for process in processes:
            process.close()


def produce_and_wait(batches, started, over):
    started.release()
    for _ in range(2):
        with batches.row() as row:
            row.array[...] = os.getpid()
    assert over.wait(TIMEOUT)


def keep_until_the_end(take, kept):
    kept.append(take())


def test_a_child_that_ends_in_order_gives_back_what_it_has():
    """As a message it would count as done."""
    context = multiprocessing.get_context("fork")
    with dsline.SharedBatch(N, SHAPE, np.int64, batches=1, timeout=TIMEOUT) as batches:
        for take in (batches.row, batches.recv):
            if take == batches.recv:
                for index in range(N):
                    with batches.row() as row:
                        row.array[...] = index
            process = context.Process(target=keep_until_the_end, args=(take, []))
            process.start()
            process.join(TIMEOUT)
            assert process.exitcode == 0
            process.close()
        with batches.recv() as ready:
            assert sorted(ready.array[:, 0, 0].tolist()) == list(range(N))


def test_a_forked_child_has_no_part_in_what_its_parent_holds():
    with dsline.SharedBatch(2, SHAPE, np.int64, batches=1, timeout=0) as batches:
        with batches.row() as row:
            row.array[...] = 0
            pid = os.fork()
            if pid == 0:
                row.__exit__(None, None, None)
                os._exit(0)
            reap(pid)
            with batches.row() as other:
                other.array[...] = 1
            with pytest.raises(dsline.BufferEmptyError):
                batches.recv(timeout=0.15)
        with batches.recv() as ready:
            pid = os.fork()
            if pid == 0:
                ready.release()
                os._exit(0)
            reap(pid)
            with pytest.raises(dsline.BufferFullError):
                batches.row(timeout=0.15)
            assert ready.array[:, 0, 0].tolist() == [0, 1]


# --- kills at random ------------------------------------------------------------------------------------------------

MOST = 1 << 16


class Log:
    """What happened, in plain shared memory."""

    def __init__(self, batches):
        self.seen = np.frombuffer(mmap.mmap(-1, batches * MOST), np.uint8).reshape(batches, MOST)
        self.torn = np.frombuffer(mmap.mmap(-1, 8), np.int64)


def start(function, *arguments):
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    return pid


def produce_for_ever(batches):
    number = 0
    while True:
        with batches.row() as row:
            half = row.array.shape[0] // 2
            row.array[:half] = os.getpid() << 24 | number
            row.array[half:] = os.getpid() << 24 | number
        number += 1


def consume_for_ever(batches, log):
    while True:
        with batches.recv() as ready:
            if not (ready.array == ready.array[:, :1, :1]).all():
                log.torn[0] += 1
            log.seen[ready.batch, ready.generation] = 1


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_random(seed):
    chance = random.Random(seed)
    with dsline.SharedBatch(N, SHAPE, np.int64, batches=3, timeout=TIMEOUT) as batches:
        log = Log(3)
        roles = {}
        for role, count in ((produce_for_ever, 3), (consume_for_ever, 2)):
            for _ in range(count):
                roles[start(role, *((batches,) if role is produce_for_ever else (batches, log)))] = role
        end = time.monotonic() + 3
        kills = 0
        try:
            while time.monotonic() < end:
                time.sleep(chance.uniform(0, 0.04))
                pid = chance.choice(list(roles))
                os.kill(pid, signal.SIGKILL)
                role = roles.pop(pid)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, (
                    "it failed by itself"
                )
                roles[start(role, *((batches,) if role is produce_for_ever else (batches, log)))] = role
                kills += 1
        finally:
            for pid in roles:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        assert kills > 5
        # Whatever was in their hands: from here on, every batch comes, in its next generations, whole.
        for _ in range(3):
            for _ in range(3 * N):
                with contextlib.suppress(dsline.BufferFullError), batches.row(timeout=0.2) as row:
                    row.array[...] = 1
            with contextlib.suppress(dsline.BufferEmptyError):
                while True:
                    with batches.recv(timeout=0.2) as ready:
                        assert (ready.array == ready.array[:, :1, :1]).all()
                        log.seen[ready.batch, ready.generation] = 1
        assert log.torn[0] == 0
        for seen in log.seen:
            last = int(np.flatnonzero(seen)[-1])
            assert last > 10
            missing = np.flatnonzero(seen[: last + 1] == 0)
            assert missing.size <= 0, f"generations {missing} of a batch were lost"
