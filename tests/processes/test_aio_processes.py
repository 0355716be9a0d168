"""dsline.aio, dsline.wait and fileno() between processes: streams, the dead, competing receivers, fork."""

import asyncio
import os
import selectors
import signal
import threading

import pytest
from support import TIMEOUT, Child, check_proof, forked, proof, wait_until

import dsline
from dsline.aio import AsyncChannel

try:
    import uvloop
except ImportError:
    uvloop = None
else:
    uvloop.new_event_loop().close()  # a pipe for signals stays open from the first loop on


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    if request.param == "uvloop" and uvloop is None:
        pytest.skip("uvloop is not installed")
    new_loop = asyncio.new_event_loop if request.param == "asyncio" else uvloop.new_event_loop

    def start(coroutine):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(asyncio.wait_for(coroutine, TIMEOUT))

    return start


@pytest.fixture
def make_broadcast_here(name):
    with dsline.Broadcast(name, capacity=1, slot_size=64) as channel:
        yield channel
        channel.unlink()


def test_a_stream_from_another_process(run, make_channel, name):
    channel = make_channel(name, capacity=8, slot_size=256)
    count = 3000

    async def main():
        got = []
        async for view in AsyncChannel(channel):
            got.append(check_proof(view))
            if len(got) == count:
                return got
        return None

    with Child("send_proofs_and_leave", name, 1, 0, count) as child:
        assert run(main()) == [(1, number) for number in range(count)]
        child.finish()


def test_a_stream_to_another_process(run, make_channel, name):
    channel = make_channel(name, capacity=4, slot_size=256)

    async def main():
        messages = AsyncChannel(channel)
        for number in range(3000):
            assert await messages.send(proof(7, number))
        channel.shutdown()

    with Child("receive_proofs", name) as child:
        assert child.read() == "ready"
        run(main())
        assert child.read() == [[7, number] for number in range(3000)]
        child.finish()


def test_what_a_killed_peer_held_comes_to_the_task_that_waits(run, make_channel, name):
    channel = make_channel(name, capacity=4, slot_size=256)
    channel.send(b"precious")

    async def main(child):
        messages = AsyncChannel(channel)
        task = asyncio.create_task(messages.recv_message())
        await asyncio.sleep(0.02)
        assert not task.done()
        child.kill()
        message = await task
        assert (bytes(message.payload), message.attempt, message.redelivered) == (b"precious", 2, True)
        message.release()

    with Child("take_and_hold", name) as child:
        assert child.read() == "holds"
        run(main(child))


def test_the_room_of_a_killed_peer_comes_to_the_task_that_waits(run, make_broadcast_here, name):
    channel = make_broadcast_here

    async def main(child):
        messages = AsyncChannel(channel)
        channel.send(b"x")
        child.tell()
        assert child.read() == "holds"
        task = asyncio.create_task(messages.send(b"y"))
        await asyncio.sleep(0.02)
        assert not task.done()
        child.kill()  # with it goes its group, and with that the message that fills the channel
        assert await task is True

    with Child("hold_as_subscriber", name) as child:
        assert child.read() == "subscribed"
        run(main(child))


def test_a_callback_for_the_dead_runs_while_a_task_waits(run, make_channel, name):
    channel = make_channel(name, capacity=4, slot_size=64)
    told = []

    async def main(child):
        channel.on_peer_death(told.append)
        task = asyncio.create_task(AsyncChannel(channel).recv())
        await asyncio.sleep(0.02)
        child.kill()
        while not told:
            await asyncio.sleep(0.01)
        task.cancel()

    with Child("idle_with_channel", name) as child:
        assert child.read() == "open"
        run(main(child))
    assert [death.pid for death in told] == [child.pid]


def test_wait_over_channels_of_several_processes(make_channel):
    channels = [make_channel(capacity=4, slot_size=256) for _ in range(3)]
    children = [Child("send_proofs_and_leave", each.name, n, 0, 200) for n, each in enumerate(channels)]
    got = {n: [] for n in range(3)}
    try:
        while sum(map(len, got.values())) < 600:
            ready = dsline.wait(channels, timeout=TIMEOUT)
            assert ready
            for channel in ready:
                producer, number = check_proof(channel.recv_nowait())
                got[producer].append(number)
        for child in children:
            child.finish()
    finally:
        for child in children:
            child.__exit__()
    assert got == {n: list(range(200)) for n in range(3)}


def test_wait_sees_what_a_killed_peer_held(make_channel, name):
    channel = make_channel(name, capacity=4, slot_size=256)
    other = make_channel(capacity=4, slot_size=256)
    channel.send(b"precious")
    with Child("take_and_hold", name) as child:
        assert child.read() == "holds"
        assert dsline.wait([channel, other], timeout=0) == []
        threading.Timer(0.02, child.process.kill).start()
        assert dsline.wait([channel, other], timeout=TIMEOUT) == [channel]
        assert channel.recv_message(timeout=0).attempt == 2


def test_blocking_receivers_beside_an_async_one_get_everything(run, make_channel, name):
    """Tasks that are told of messages and cancelled again and again, beside receivers that block."""
    channel = make_channel(name, capacity=8, slot_size=256)
    count = 1500

    async def main():
        messages = AsyncChannel(channel)
        got = []

        async def receive():
            got.append(check_proof(await messages.recv()))

        while True:
            task = asyncio.create_task(receive())
            await asyncio.sleep(0)
            await asyncio.wait([task], timeout=0.002)
            task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(result, dsline.ChannelClosedError):
                return got
            if isinstance(result, Exception):
                raise result

    with Child("receive_proofs", name) as one, Child("receive_proofs", name) as two:
        assert one.read() == two.read() == "ready"

        def produce():
            with Child("send_proofs_and_leave", name, 3, 0, count) as sender:
                sender.finish()
            channel.shutdown()

        thread = threading.Thread(target=produce)
        thread.start()
        mine = run(main())
        thread.join()
        theirs = [tuple(each) for child in (one, two) for each in child.read()]
        one.finish()
        two.finish()
    assert sorted(mine + theirs) == [(3, number) for number in range(count)]


# --- fork ---------------------------------------------------------------------------------------------------------


def test_a_forked_child_watches_by_itself(make_channel, name):
    channel = make_channel(name, capacity=4, slot_size=64)
    answers = make_channel(capacity=4, slot_size=64)
    number = channel.fileno()

    def child():
        with pytest.raises(OSError):
            os.fstat(number)
        with selectors.DefaultSelector() as selector:
            selector.register(channel, selectors.EVENT_READ)
            answers.send(b"ready")
            assert selector.select(TIMEOUT)
        answers.send(channel.recv_bytes(timeout=0))

    thread = threading.Thread(
        target=lambda: (answers.recv_bytes(timeout=TIMEOUT), channel.send(b"for the child"))
    )
    thread.start()
    forked(child)
    thread.join()
    assert answers.recv_bytes(timeout=0) == b"for the child"
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        channel.send(b"for the parent")
        assert selector.select(TIMEOUT)


def test_a_forked_child_runs_a_loop_of_its_own(run, make_channel):
    channel = make_channel(capacity=4, slot_size=64)
    messages = AsyncChannel(channel)

    async def main():
        task = asyncio.create_task(messages.recv_bytes())
        await asyncio.sleep(0.01)
        channel.send(b"x")
        return await task

    assert run(main()) == b"x"

    def child():
        assert run(main()) == b"x"

    forked(child)
    assert run(main()) == b"x"


def test_a_fork_while_the_watcher_works(make_channel):
    """Its lock may be held at that very moment."""
    channel = make_channel(capacity=4, slot_size=64)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            channel.fileno()
            channel.send(b"x")
            channel.recv_bytes()

    def child():
        with dsline.ShmChannel(capacity=4, slot_size=64) as mine, selectors.DefaultSelector() as selector:
            selector.register(mine, selectors.EVENT_READ)
            mine.send(b"x")
            assert selector.select(TIMEOUT)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            forked(child)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("how", ["exit", "exception", "os._exit"])
def test_a_process_that_ends_while_it_watches(make_channel, name, how):
    channel = make_channel(name, capacity=4, slot_size=64)
    with Child("watch_and_end", name, how) as child:
        assert child.read() == "watches"
        child.tell()
        wait_until(lambda: child.process.poll() is not None)
        assert child.process.returncode == {"exit": 0, "exception": 1, "os._exit": 3}[how]
    # In order: nobody died. By os._exit it is a death like any other.
    channel.check_peers()
    assert channel.stats().deaths == (how == "os._exit")
    assert channel.stats().participants == 1


def test_a_killed_watcher_is_no_sleeper_any_more(make_channel, name):
    channel = make_channel(name, capacity=4, slot_size=64)
    with Child("watch_and_end", name, "exit") as child:
        assert child.read() == "watches"
        os.kill(child.pid, signal.SIGKILL)
        child.process.wait(TIMEOUT)
    assert channel.check_peers() == 1
    channel.send(b"x")
    assert channel.recv_bytes(timeout=0) == b"x"
