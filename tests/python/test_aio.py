"""dsline.aio under asyncio and uvloop: receiving, sending, order, cancellation, loops."""

import asyncio
import contextlib
import gc
import threading
import weakref

import numpy as np
import pytest
from support import TIMEOUT

import dsline
from dsline import _core
from dsline.aio import AsyncChannel

try:
    import uvloop
except ImportError:
    uvloop = None
else:
    uvloop.new_event_loop().close()  # a pipe for signals stays open from the first loop on


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    """Run a coroutine in a new loop; fail when it takes too long."""
    if request.param == "uvloop":
        if uvloop is None:
            pytest.skip("uvloop is not installed")
        new_loop = uvloop.new_event_loop
    else:
        new_loop = asyncio.new_event_loop

    def start(coroutine):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(asyncio.wait_for(coroutine, TIMEOUT))

    return start


@pytest.fixture
def pair(make_any):
    """A channel, and its asyncio face."""
    channel = make_any(capacity=4, slot_size=64)
    return channel, AsyncChannel(channel)


async def rest():
    """Let everybody who can go on go on, and the watcher's thread as well."""
    for _ in range(20):
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)


async def all_wait(tasks):
    await rest()
    assert not any(task.done() for task in tasks)


def send_later(channel, *messages):
    thread = threading.Timer(0.02, lambda: [channel.send(each) for each in messages])
    thread.start()
    return thread


# --- receiving ----------------------------------------------------------------------------------------------------


def test_what_is_there_and_what_comes(run, pair):
    channel, messages = pair

    async def main():
        channel.send(b"there")
        assert await messages.recv_bytes() == b"there"
        for number in range(20):
            thread = send_later(channel, b"%d" % number) if number % 5 == 0 else None
            if thread is None:
                asyncio.get_running_loop().call_soon(channel.send, b"%d" % number)
            assert await messages.recv_bytes() == b"%d" % number
            if thread:
                thread.join()

    run(main())


def test_every_receiving_call(run, pair):
    channel, messages = pair
    array = np.arange(6).reshape(2, 3)

    async def main():
        for wait in (False, True):

            async def after(send, call, wait=wait):
                if not wait:
                    send()
                    return await call
                task = asyncio.ensure_future(call)
                await all_wait([task])
                send()
                return await task

            view = await after(lambda: channel.send(array), messages.recv())
            assert (np.asarray(view) == array).all()
            del view
            got = await after(lambda: channel.send(array), messages.recv_array())
            assert (got == array).all() and not got.flags.writeable
            got = await after(lambda: channel.send(array), messages.recv_array(copy=True))
            assert (got == array).all() and got.flags.writeable
            message = await after(lambda: channel.send(b"x", meta={"k": 1}), messages.recv_message())
            assert (bytes(message.payload), message.meta) == (b"x", {"k": 1})
            message.release()
            _, view = await after(lambda: channel.send(b"seq"), messages.recv_with_seq())
            assert view == b"seq"
            del view
            buffer = bytearray(8)
            assert await after(lambda: channel.send(b"into"), messages.recv_into(buffer)) == 4
            assert buffer[:4] == b"into"
            views = await after(lambda: channel.send_many([b"1", b"2"]), messages.recv_many(5))
            assert views == [b"1", b"2"]
            del views
            found = await after(lambda: channel.send_object({"a": [1]}), messages.recv_object())
            assert found == {"a": [1]}

    run(main())


def test_async_for_ends_when_the_channel_does(run, pair):
    channel, messages = pair

    async def main():
        async def produce():
            for number in range(50):
                await messages.send(b"%d" % number)
                if number % 7 == 0:
                    await asyncio.sleep(0.001)
            channel.shutdown()

        task = asyncio.create_task(produce())
        got = [bytes(view) async for view in messages]
        await task
        assert got == [b"%d" % number for number in range(50)]
        with pytest.raises(dsline.ChannelClosedError):
            await messages.recv()
        with pytest.raises(dsline.ChannelClosedError):
            await messages.send(b"x")

    run(main())


def test_async_with_closes(run, pair):
    channel, messages = pair

    async def main():
        async with messages as same:
            assert same is messages
            await messages.send(b"x")
        assert channel.closed and messages.closed
        with pytest.raises(dsline.ChannelClosedError):
            await messages.recv()

    run(main())


@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_an_end_wakes_all_who_wait(run, pair, end):
    channel, messages = pair

    async def main():
        for _ in range(4):
            await messages.send(b"x")
        senders = [asyncio.create_task(messages.send(b"y")) for _ in range(3)]
        await all_wait(senders)
        # Another thread ends it.
        await asyncio.to_thread(getattr(channel, end))
        for task in senders:
            with pytest.raises(dsline.ChannelClosedError):
                await task

    run(main())


@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_an_end_wakes_all_receivers(run, pair, end):
    channel, messages = pair

    async def main():
        receivers = [asyncio.create_task(messages.recv()) for _ in range(3)]
        await all_wait(receivers)
        await asyncio.to_thread(getattr(channel, end))
        for task in receivers:
            with pytest.raises(dsline.ChannelClosedError):
                await task

    run(main())


def test_subscribers(run, make_broadcast):
    channel = make_broadcast(capacity=8, slot_size=64)

    async def collect(subscriber):
        return [bytes(view) async for view in AsyncChannel(subscriber)]

    async def main():
        with channel.subscribe("a") as a, channel.subscribe("b") as b:
            tasks = [asyncio.create_task(collect(each)) for each in (a, b)]
            sender = AsyncChannel(channel)
            sent = [b"%d" % number for number in range(30)]
            for each in sent:
                await sender.send(each)
            channel.shutdown()
            assert await asyncio.gather(*tasks) == [sent, sent]
            with pytest.raises(TypeError, match="cannot send"):
                await AsyncChannel(a).send(b"x")
        with pytest.raises(dsline.FeatureUnavailableError, match="subscribe"):
            await sender.recv()

    run(main())


# --- sending ------------------------------------------------------------------------------------------------------


def test_a_sender_waits_for_room(run, pair):
    channel, messages = pair

    async def main():
        for number in range(4):
            assert await messages.send(b"%d" % number) is True
        task = asyncio.create_task(messages.send(np.arange(3), meta={"last": True}))
        other = asyncio.create_task(messages.send_object({"k": 5}))
        await all_wait([task, other])
        assert channel.recv_bytes() == b"0"
        assert await task is True
        await all_wait([other])
        for number in range(1, 4):
            assert channel.recv_bytes() == b"%d" % number
        message = channel.recv_message()
        assert message.meta == {"last": True} and (message.array() == np.arange(3)).all()
        assert await other is True
        assert channel.recv_object() == {"k": 5}

    run(main())


@pytest.mark.parametrize(("policy", "dropped"), [("drop_newest", b"4"), ("drop_oldest", b"0")])
def test_drop_policies_do_not_wait(run, make_channel, policy, dropped):
    messages = AsyncChannel(make_channel(capacity=4, slot_size=64, backpressure=policy))

    async def main():
        entered = [await messages.send(b"%d" % number) for number in range(5)]
        assert entered == [True] * 4 + [policy == "drop_oldest"]
        got = [await messages.recv_bytes() for _ in range(4)]
        assert dropped not in got

    run(main())


def test_the_raise_policy_raises(run, make_channel):
    messages = AsyncChannel(make_channel(capacity=1, slot_size=64, backpressure="raise"))

    async def main():
        await messages.send(b"x")
        with pytest.raises(dsline.BufferFullError, match="is full"):
            await messages.send(b"x")

    run(main())


def test_errors_of_the_channel_come_through(run, pair):
    channel, messages = pair

    async def main():
        with pytest.raises(dsline.SerializationError):
            await messages.send_object(lambda: None)
        with pytest.raises(TypeError, match="cannot send a str"):
            await messages.send("text")
        channel.send(b"plain")
        with pytest.raises(dsline.SchemaMismatchError):
            await messages.recv_array()
        with pytest.raises(dsline.BufferTooSmallError):
            await messages.recv_into(bytearray(1))
        # It stays, also for whoever comes behind the one who could not use it.
        tasks = [asyncio.create_task(messages.recv_array()), asyncio.create_task(messages.recv_bytes())]
        assert isinstance(
            (await asyncio.gather(*tasks, return_exceptions=True))[0], dsline.SchemaMismatchError
        )
        assert tasks[1].result() == b"plain"

    run(main())


# --- time ---------------------------------------------------------------------------------------------------------


def test_timeouts(run, pair):
    _, messages = pair

    async def main():
        with pytest.raises(dsline.BufferEmptyError, match=r"within 0 s"):
            await messages.recv(timeout=0)
        with pytest.raises(dsline.BufferEmptyError, match=r"within 0.02 s"):
            await messages.recv(timeout=0.02)
        for _ in range(4):
            await messages.send(b"x", timeout=0)
        with pytest.raises(dsline.BufferFullError, match="is full"):
            await messages.send(b"x", timeout=0)
        with pytest.raises(dsline.BufferFullError, match=r"within 0.02 s"):
            await messages.send(b"x", timeout=0.02)
        assert len(messages) == 4
        for timeout, error in ((-1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
            with pytest.raises(error, match="timeout is"):
                await messages.recv(timeout=timeout)

    run(main())


def test_the_timeout_of_the_handle_is_the_default(run, make_channel):
    messages = AsyncChannel(make_channel(capacity=1, slot_size=64, timeout=0.02))

    async def main():
        with pytest.raises(dsline.BufferEmptyError, match=r"within 0.02 s"):
            await messages.recv()
        with pytest.raises(dsline.BufferEmptyError):
            async for _ in messages:
                raise AssertionError("there is nothing")

    run(main())


def test_one_who_runs_out_of_time_leaves_the_line(run, pair):
    channel, messages = pair

    async def main():
        first = asyncio.create_task(messages.recv_bytes(timeout=0.03))
        second = asyncio.create_task(messages.recv_bytes())
        third = asyncio.create_task(messages.recv_bytes(timeout=0.03))
        for task in (first, third):
            with pytest.raises(dsline.BufferEmptyError):
                await task
        channel.send(b"x")
        assert await second == b"x"

    run(main())


def test_asyncio_timeout_takes_nothing(run, pair):
    channel, messages = pair

    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await messages.recv()
        channel.send(b"x")
        assert await messages.recv_bytes() == b"x"

    run(main())


# --- order and cancellation ---------------------------------------------------------------------------------------


def test_first_come_first_served(run, pair):
    channel, messages = pair
    served = []

    async def one(number):
        served.append((number, await messages.recv_bytes()))

    async def main():
        tasks = []
        for number in range(10):
            tasks.append(asyncio.create_task(one(number)))
            await asyncio.sleep(0)
        for number in range(10):
            if number % 4 == 0:
                await rest()
            channel.send(b"%d" % number)
            late = asyncio.create_task(messages.recv_bytes(timeout=0))  # comes behind those who stand in line
            if number < 9:
                with pytest.raises(dsline.BufferEmptyError):
                    await late
            else:
                late.cancel()
        await asyncio.gather(*tasks)
        assert served == [(number, b"%d" % number) for number in range(10)]

    run(main())


def test_senders_are_served_in_order_too(run, pair):
    _, messages = pair

    async def main():
        for _ in range(4):
            await messages.send(b"full")
        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(messages.send(b"%d" % number)))
            await asyncio.sleep(0)
        got = []
        while len(got) < 10:
            got.append(await messages.recv_bytes())
        await asyncio.gather(*tasks)
        assert got == [b"full"] * 4 + [b"%d" % number for number in range(6)]

    run(main())


@pytest.mark.parametrize("when", ["waiting", "called", "fast"])
def test_who_is_cancelled_has_taken_nothing_and_the_next_one_gets_it(run, pair, when):
    channel, messages = pair

    async def main():
        if when == "fast":
            channel.send(b"x")
            task = asyncio.create_task(messages.recv_bytes())
            task.cancel()  # before its first step
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await messages.recv_bytes() == b"x"
            return
        first = asyncio.create_task(messages.recv_bytes())
        second = asyncio.create_task(messages.recv_bytes())
        await all_wait([first, second])
        if when == "called":
            channel.send(b"x")
            # The loop has told the first one, who has not run yet: then it is cancelled.
            place = messages._lines[False].places[0]
            while not place.call.done():
                await asyncio.sleep(0)
                if first.done():
                    break
            if first.done():  # it was faster
                assert first.result() == b"x"
                channel.send(b"y")
                assert await second == b"y"
                return
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        if when == "waiting":
            channel.send(b"x")
        assert await second == b"x"

    run(main())


def test_cancelled_in_the_very_step_in_which_it_is_called(run, pair):
    """The callback of the loop and the cancellation in one turn of the loop, deterministically."""
    channel, messages = pair

    async def main():
        first = asyncio.create_task(messages.recv_bytes())
        second = asyncio.create_task(messages.recv_bytes())
        await all_wait([first, second])
        channel.send(b"x")
        messages._lines[False]._on_readable()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second == b"x"

    run(main())


def test_random_cancellations_lose_nothing(run, make_channel):
    channel = make_channel(capacity=8, slot_size=64)
    messages = AsyncChannel(channel)
    random = np.random.default_rng(1)
    total = 400
    got = []

    async def receive():
        # Nothing that can be cancelled lies between the call and the note of what it gave.
        got.append(int(await messages.recv_bytes()))

    async def churn():
        while len(got) < total:
            tasks = [asyncio.create_task(receive()) for _ in range(random.integers(1, 5))]
            for _ in range(random.integers(0, 4)):
                await asyncio.sleep(0)
            for task in tasks:
                if random.random() < 0.5:
                    task.cancel()
            await asyncio.wait(tasks, timeout=0.005)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def main():
        sending = threading.Thread(target=lambda: [channel.send(b"%d" % n) for n in range(total)])
        sending.start()
        await churn()
        sending.join()
        assert got == list(range(total))

    run(main())


def test_cancelled_senders_have_sent_nothing(run, pair):
    channel, messages = pair

    async def main():
        for _ in range(4):
            await messages.send(b"full")
        tasks = [asyncio.create_task(messages.send(b"%d" % number)) for number in range(3)]
        await all_wait(tasks)
        tasks[0].cancel()
        tasks[2].cancel()
        await rest()
        for _ in range(4):
            assert await messages.recv_bytes() == b"full"
        assert await messages.recv_bytes() == b"1"
        assert tasks[1].result() is True
        assert channel.empty

    run(main())


def test_others_run_while_messages_flow(run, make_channel):
    """A task that always finds a message lets others run: counted in messages, not in time."""
    channel = make_channel(capacity=2, slot_size=64)
    messages = AsyncChannel(channel)
    other_turns = 0

    async def main():
        nonlocal other_turns
        done = False

        async def other():
            nonlocal other_turns
            while not done:
                other_turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        # One task sends and receives without ever having to wait.
        while other_turns < 10:
            await messages.send(b"x")
            await messages.recv_bytes()
        done = True
        await task

    run(main())


def test_a_blocking_receiver_beside_tasks_that_are_slow(run, make_channel, name):
    """The loop is told of a message and busy: the receiver in the other thread gets it."""
    channel = make_channel(name, capacity=4, slot_size=64)
    messages = AsyncChannel(channel)
    got = []

    async def main():
        with dsline.ShmChannel.open(name) as other:
            for number in range(5):
                task = asyncio.create_task(messages.recv_bytes())
                await all_wait([task])
                thread = threading.Thread(target=lambda: got.append(other.recv_bytes(timeout=TIMEOUT)))
                thread.start()
                channel.send(b"%d" % number)
                thread.join()  # holds the loop
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    run(main())
    assert got == [b"%d" % number for number in range(5)]


# --- loops --------------------------------------------------------------------------------------------------------


def test_one_object_in_one_loop_after_the_other(run, pair):
    channel, messages = pair

    async def main():
        task = asyncio.create_task(messages.recv_bytes())
        await all_wait([task])
        channel.send(b"x")
        return await task

    for _ in range(3):
        assert run(main()) == b"x"


def test_a_loop_that_ends_with_tasks_waiting(run, pair):
    channel, messages = pair

    async def main():
        for _ in range(3):
            asyncio.get_running_loop().create_task(messages.recv_bytes())
        await rest()

    run(main())
    channel.send(b"x")
    assert run(messages.recv_bytes()) == b"x"


def test_another_loop_is_refused(run, pair):
    _, messages = pair
    errors = []

    async def use():
        try:
            await messages.recv_bytes()
        except RuntimeError as error:
            errors.append(str(error))

    async def main():
        await messages.send(b"x")
        await asyncio.to_thread(lambda: asyncio.run(use()))
        assert await messages.recv_bytes() == b"x"

    run(main())
    assert len(errors) == 1 and "belongs to another event loop" in errors[0]


def test_outside_of_a_loop(pair):
    with pytest.raises(RuntimeError, match="no running event loop"):
        pair[1].recv().send(None)


def test_several_loops_in_several_threads(run, make_channel):
    channel = make_channel(capacity=8, slot_size=64)
    got = []

    async def collect():
        async for view in AsyncChannel(channel):
            got.append(bytes(view))
            await asyncio.sleep(0)

    threads = [threading.Thread(target=run, args=(collect(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    sent = [b"%d" % number for number in range(300)]

    async def produce():
        sender = AsyncChannel(channel)
        for each in sent:
            await sender.send(each)

    run(produce())
    channel.shutdown()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(sent)


@pytest.mark.parametrize("side", ["recv", "send"])
def test_two_objects_of_one_handle_do_not_take_each_others_signals(run, make_channel, side):
    channel = make_channel(capacity=4, slot_size=64)
    first, second = AsyncChannel(channel), AsyncChannel(channel)

    async def main():
        if side == "recv":
            tasks = [asyncio.create_task(each.recv_bytes()) for each in (first, second)]
            await all_wait(tasks)
            channel.send_many([b"1", b"2"])
            assert sorted(await asyncio.gather(*tasks)) == [b"1", b"2"]
        else:
            channel.send_many([b"x"] * 4)
            tasks = [asyncio.create_task(each.send(b"y")) for each in (first, second)]
            await all_wait(tasks)
            for _ in range(2):
                channel.recv_bytes()
            assert await asyncio.gather(*tasks) == [True, True]

    run(main())


def test_a_channel_that_nobody_uses_any_more_goes_while_the_loop_runs(run, name):
    async def main():
        channel = dsline.ShmChannel.create(name, capacity=4, slot_size=64)
        messages = AsyncChannel(channel)
        with pytest.raises(dsline.BufferEmptyError):
            await messages.recv(timeout=0.01)
        channel.unlink()
        channel.close()
        messages.close()
        gone = weakref.ref(channel)
        del channel, messages
        await rest()
        gc.collect()
        assert gone() is None

    run(main())


def test_without_futex_waitv(run, make_channel):
    _core.pretend_no_futex_waitv(True)
    try:
        channel = make_channel(capacity=2, slot_size=64)
        messages = AsyncChannel(channel)

        async def main():
            async def produce():
                for number in range(100):
                    await messages.send(b"%d" % number)
                channel.shutdown()

            task = asyncio.create_task(produce())
            assert [int(bytes(view)) async for view in messages] == list(range(100))
            await task

        run(main())
    finally:
        _core.pretend_no_futex_waitv(False)


def test_only_channels_have_an_asyncio_face():
    with pytest.raises(TypeError, match="not a bytes"):
        AsyncChannel(b"x")


def test_an_empty_channel_is_true_and_says_what_it_is(pair):
    _, messages = pair
    assert messages and len(messages) == 0
    assert "AsyncChannel of <dsline." in repr(messages)
