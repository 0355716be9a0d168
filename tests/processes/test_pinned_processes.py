"""Readers in processes of their own that keep everything, and a stream that goes on."""

import contextlib

import numpy as np
import pytest
from support import Child, forked, proof

import dsline


@pytest.mark.parametrize("words", [16, 40_000])
@pytest.mark.parametrize("readers", [1, 2, 5])
def test_readers_that_keep_everything(name, readers, words):
    """More readers than slots, too: whoever gets the last one gives it back."""
    producers, count = 2, 500 if words == 16 else 50
    with contextlib.ExitStack() as stack:
        channel = stack.enter_context(dsline.ShmChannel(name, capacity=4, slot_size=4 * words))
        keepers = [stack.enter_context(Child("keep_all", name, -1)) for _ in range(readers)]
        for keeper in keepers:
            assert keeper.read() == "ready"
        senders = [
            stack.enter_context(Child("send_proofs_and_leave", name, producer, 0, count, words))
            for producer in range(producers)
        ]
        for sender in senders:
            sender.finish()
        channel.shutdown()
        reports = [keeper.read() for keeper in keepers]
        got = [tuple(pair) for kept, _ in reports for pair in kept]
        assert sorted(got) == [(producer, number) for producer in range(producers) for number in range(count)]
        assert sum(copies for _, copies in reports) >= producers * count - 4
        for keeper, (kept, _) in zip(keepers, reports, strict=True):
            keeper.tell()
            assert keeper.read() == kept, "what is kept does not change"
            keeper.finish()


def test_what_a_dead_reader_kept_is_delivered_again(name):
    """Only what it held: copies were done with when they were made."""
    with dsline.ShmChannel(name, capacity=4, slot_size=64, timeout=30) as channel:
        with Child("keep_all", name, 10) as keeper:
            assert keeper.read() == "ready"
            for number in range(10):
                channel.send(proof(1, number))
            kept, copies = keeper.read()
            assert [number for _, number in kept] == list(range(10))
        left = channel.stats().pinned_slots
        assert (left, copies) == (10 - copies, copies)
        assert copies >= 7
        channel.check_peers()
        again = [channel.recv_message() for _ in range(left)]
        assert all(message.redelivered for message in again)
        with pytest.raises(dsline.BufferEmptyError):
            channel.recv(timeout=0)
        for message in again:
            message.release()


def test_a_forked_child_has_a_budget_of_its_own(name):
    """What the parent holds pins nothing in the child's name."""
    with dsline.ShmChannel(name, capacity=8, slot_size=512, max_pinned=2, timeout=0) as channel:
        held = [channel.send(b"%d" % number) and channel.recv() for number in range(2)]

        def child():
            kept = [channel.send(np.arange(9)) and channel.recv_array(timeout=30) for _ in range(2)]
            assert (channel.stats().forced_copies, channel.stats().pinned_views) == (0, 2)
            with pytest.warns(dsline.PinnedViewsWarning):
                kept.append(channel.send(np.arange(9)) and channel.recv_array(timeout=30))
            assert channel.stats().forced_copies == 1
            held.clear()
            assert channel.stats().pinned_views == 2
            channel.close()

        forked(child)
        assert (channel.stats().pinned_views, channel.stats().pinned_slots) == (2, 2)
        assert [bytes(view) for view in held] == [b"0", b"1"]
        held.clear()
