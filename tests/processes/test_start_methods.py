"""Handles as arguments of processes that multiprocessing starts, by every method."""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_sharer
import multiprocessing.resource_tracker
import pickle

import children
import numpy as np
import pytest
from support import TIMEOUT, check_proof, proof, wait_until

import dsline
from dsline.testing import unique_name

# pytest's timer is a thread, so that Python 3.12 and later warn about every fork here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

METHODS = ["fork", "spawn", "forkserver"]
STORAGES = ["named", "anonymous", "memfd", "file"]


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


@pytest.fixture(params=METHODS)
def context(request):
    return multiprocessing.get_context(request.param)


@pytest.fixture(params=STORAGES)
def make(request, tmp_path):
    made = []

    def make(**options):
        options = {"capacity": 4, "slot_size": 256, "timeout": TIMEOUT, **options}
        if request.param == "file":
            made.append(dsline.FileChannel.create(tmp_path / str(len(made)), **options))
        elif request.param == "named":
            made.append(dsline.ShmChannel(unique_name(), **options))
        else:
            storage = "shm" if request.param == "anonymous" else "memfd"
            made.append(dsline.ShmChannel(storage=storage, **options))
        return made[-1]

    yield make
    for channel in made:
        if channel.path is not None:
            channel.unlink()
        channel.close()
    made.clear()


class Started:
    """A process that is ended, by its own handle, when the block is left."""

    def __init__(self, context, target, *arguments):
        self.process = context.Process(target=target, args=arguments)

    def __enter__(self):
        self.process.start()
        return self

    def end(self):
        self.process.join(TIMEOUT)
        assert self.process.exitcode == 0

    def __exit__(self, *exception):
        self.process.kill()
        self.process.join(TIMEOUT)
        self.process.close()


def test_both_directions(context, make):
    there, back = make(), make()
    with Started(context, children.double_what_comes, there, back) as child:
        for number in range(30):
            array = np.full((number, 3), number, np.int16)
            there.send(array)
            np.testing.assert_array_equal(back.recv_array(), array * 2)
        large = np.arange(500_000)
        there.send(large)
        np.testing.assert_array_equal(back.recv_array(), large * 2)
        there.shutdown()
        child.end()
    assert (there.stats().free_slots, back.stats().free_slots) == (4, 4)
    assert (there.stats().participants, back.stats().participants) == (1, 1)


def test_the_handles_settings_travel_along(context, make):
    channel = make(backpressure="drop_newest", timeout=0.5)
    reader, writer = context.Pipe(duplex=False)
    with reader, writer, Started(context, children.tell_settings, channel, writer) as child:
        assert reader.poll(TIMEOUT)
        assert reader.recv() == ("drop_newest", 0.5, 4, 256)
        child.end()


def test_several_children_compete(context, make):
    channel = make(capacity=16)
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    crew = [Started(context, children.receive_and_report, channel, writer) for _, writer in pipes]
    with crew[0], crew[1]:
        for number in range(200):
            channel.send(proof(1, number))
        channel.shutdown()
        got = []
        for reader, _ in pipes:
            assert reader.poll(TIMEOUT)
            got += reader.recv()
        for child in crew:
            child.end()
    for pipe in pipes:
        for end in pipe:
            end.close()
    assert sorted(got) == [(1, number) for number in range(200)]


def test_a_child_leaves_its_messages_behind(context, make):
    channel = make(capacity=8)
    with Started(context, children.send_numbers, channel, 10, 5) as child:
        child.end()
    assert [check_proof(channel.recv_array(timeout=0))[1] for _ in range(5)] == list(range(10, 15))
    wait_until(lambda: channel.stats().participants == 1)


def test_a_child_that_ends_with_views_has_not_died(context, make):
    channel = make()
    channel.send(b"seen by the child")
    reader, writer = context.Pipe(duplex=False)
    with reader, writer, Started(context, children.hold_and_end, channel, writer) as child:
        assert reader.poll(TIMEOUT)
        assert reader.recv() == b"seen by the child"
        child.end()
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv(timeout=0.2)
    assert (channel.stats().free_slots, channel.stats().redelivered) == (4, 0)


def test_handles_go_over_a_connection(context, make):
    channel = make()
    ours, theirs = context.Pipe()
    with ours, theirs, Started(context, children.receive_handle, theirs) as child:
        ours.send(channel)
        assert channel.recv_bytes() == b"from the child"
        child.end()


# --- what cannot travel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["shm", "memfd"])
def test_plain_pickle_of_an_anonymous_channel_is_refused(storage):
    with dsline.ShmChannel(storage=storage, capacity=1, slot_size=64) as channel:
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(dsline.FeatureUnavailableError, match=r"anonymous.*give it a name"):
                pickle.dumps(channel, protocol)
        channel.send(b"fine")
        assert channel.recv_bytes(timeout=0) == b"fine"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_heap_channel_is_refused(method):
    context = multiprocessing.get_context(method)
    with dsline.ShmChannel(storage="heap", capacity=1, slot_size=64) as channel:
        with pytest.raises(dsline.FeatureUnavailableError, match=r"heap.*own"):
            pickle.dumps(channel)
        process = context.Process(target=children.double_what_comes, args=(channel, channel))
        with pytest.raises(dsline.FeatureUnavailableError, match=r"heap.*own"):
            process.start()


def test_a_named_handle_pickles_anywhere(name):
    with dsline.ShmChannel(name, capacity=3, slot_size=64, backpressure="raise", timeout=2) as channel:
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            with pickle.loads(pickle.dumps(channel, protocol)) as again:
                assert type(again) is dsline.ShmChannel
                assert (again.name, again.capacity, again.timeout) == (name, 3, 2)
                assert again.backpressure is dsline.Backpressure.RAISE
                channel.send(b"x")
                assert again.recv_bytes(timeout=0) == b"x"
        pickled = pickle.dumps(channel)
    with pytest.raises(dsline.ChannelNotFoundError):
        pickle.loads(pickled)
    with (
        dsline.ShmChannel(name, capacity=3, slot_size=64),
        pytest.raises(dsline.ChannelNotFoundError, match="another"),
    ):
        pickle.loads(pickled)


def test_a_closed_handle_is_not_pickled_into_a_live_one(name):
    channel = dsline.ShmChannel(name, capacity=1, slot_size=64)
    channel.close()
    with pytest.raises(dsline.DslineError):
        pickle.loads(pickle.dumps(channel))


def test_views_and_messages_are_not_pickled(make_channel):
    channel = make_channel(capacity=2, slot_size=64)
    channel.send_many([b"1", b"2"])
    view, message = channel.recv(timeout=0), channel.recv_message(timeout=0)
    for thing in (view, message):
        with pytest.raises(TypeError):
            pickle.dumps(thing)
    message.release()
    view.release()
