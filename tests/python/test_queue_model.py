"""A channel against a queue of plain Python: whatever the calls and their order, both say the same."""

from collections import deque

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

import dsline
from dsline.testing import unique_name

PAYLOADS = st.one_of(
    st.binary(max_size=200),
    st.binary(min_size=5000, max_size=5001),
    st.lists(st.integers(-5, 5), max_size=30).map(lambda numbers: np.array(numbers, np.int32)),
    st.integers(1, 5).map(lambda n: np.asfortranarray(np.arange(2 * n, dtype=np.float32).reshape(2, n))),
)
METAS = st.none() | st.dictionaries(st.sampled_from(["a", "b"]), st.integers(-9, 9) | st.text(max_size=3))


def content(payload):
    return payload if isinstance(payload, bytes) else payload.tobytes("A")


# No message becomes a dead letter here.
MAX_DELIVERIES = 15


class Model:
    """What is queued, held, and has happened."""

    def __init__(self, capacity):
        self.capacity = capacity
        # (sequence, payload, meta, attempt, returned), oldest first; what has returned comes before all.
        self.queue = deque()
        self.held = {}
        self.next_sequence = 0
        self.dropped_newest = self.dropped_oldest = 0
        self.is_shut_down = self.is_over = False

    @property
    def free(self):
        return self.capacity - len(self.queue) - len(self.held)


class ChannelMachine(RuleBasedStateMachine):
    held = Bundle("held")

    @initialize(
        capacity=st.integers(1, 5),
        storage=st.sampled_from(["heap", "memfd", "named"]),
        policy=st.sampled_from(["raise", "drop_newest", "drop_oldest"]),
        handles=st.integers(1, 3),
    )
    def start(self, capacity, storage, policy, handles):
        self.model = Model(capacity)
        self.policy = policy
        self.number = 0
        options = {"capacity": capacity, "slot_size": 64, "backpressure": policy, "timeout": 0}
        options |= {"max_deliveries": MAX_DELIVERIES, "max_pinned": "unlimited"}
        if storage == "named":
            name = unique_name()
            self.handles = [dsline.ShmChannel(name, **options) for _ in range(handles)]
        else:
            self.handles = [dsline.ShmChannel(storage=storage, **options)]

    def handle(self, index):
        return self.handles[index % len(self.handles)]

    @rule(index=st.integers(0, 2), payload=PAYLOADS, meta=METAS)
    def send(self, index, payload, meta):
        channel, model = self.handle(index), self.model
        if model.is_shut_down:
            with pytest.raises(dsline.ChannelClosedError):
                channel.send(payload, meta=meta)
            return
        if model.free == 0:
            if self.policy == "raise":
                with pytest.raises(dsline.BufferFullError):
                    channel.send(payload, meta=meta)
                return
            if self.policy == "drop_newest" or not model.queue:
                assert channel.send(payload, meta=meta) is False
                model.dropped_newest += 1
                return
            # The oldest that nobody has had yet; what has returned is the last to go.
            del model.queue[next((i for i, one in enumerate(model.queue) if not one[4]), 0)]
            model.dropped_oldest += 1
        assert channel.send(payload, meta=meta) is True
        model.queue.append((model.next_sequence, payload, meta or {}, 1, False))
        model.next_sequence += 1

    @rule(index=st.integers(0, 2), target=held)
    def recv_message(self, index):
        channel, model = self.handle(index), self.model
        if not model.queue:
            with pytest.raises(dsline.ChannelClosedError if model.is_shut_down else dsline.BufferEmptyError):
                channel.recv_message()
            return multiple()
        expected = model.queue.popleft()
        sequence, _, meta, attempt, _ = expected
        message = channel.recv_message()
        assert (message.sequence, message.meta, message.attempt) == (sequence, meta, attempt)
        assert message.redelivered == (attempt > 1)
        model.held[sequence] = (message, expected)
        self.look_at(sequence)
        return sequence

    def look_at(self, sequence):
        message, (_, payload, *_) = self.model.held[sequence]
        if isinstance(payload, bytes):
            assert bytes(message.payload) == payload
        else:
            got = message.array()
            assert (got.dtype, got.shape, got.flags.f_contiguous) == (
                payload.dtype,
                payload.shape,
                payload.flags.f_contiguous,
            )
            np.testing.assert_array_equal(got, payload)

    @rule(sequence=consumes(held))
    def release(self, sequence):
        self.look_at(sequence)
        message, _ = self.model.held.pop(sequence)
        message.release()

    @rule(sequence=consumes(held))
    def drop(self, sequence):
        self.look_at(sequence)
        del self.model.held[sequence]

    @precondition(lambda self: all(one[3] < MAX_DELIVERIES for _, one in self.model.held.values()))
    @rule(sequence=consumes(held))
    def give_back(self, sequence):
        message, (_, payload, meta, attempt, _) = self.model.held.pop(sequence)
        with pytest.raises(ZeroDivisionError), message:
            1 / 0  # noqa: B018
        if self.model.is_over:
            return  # nobody will ever receive it: it is discarded as what was queued
        assert attempt < MAX_DELIVERIES, "more steps than deliveries"
        returned = [one for one in self.model.queue if one[4]]
        fresh = [one for one in self.model.queue if not one[4]]
        returned.append((sequence, payload, meta, attempt + 1, True))
        self.model.queue = deque(sorted(returned, key=lambda one: one[0]) + fresh)

    @rule(index=st.integers(0, 2))
    def recv_bytes(self, index):
        channel, model = self.handle(index), self.model
        if not model.queue:
            with pytest.raises(dsline.ChannelClosedError if model.is_shut_down else dsline.BufferEmptyError):
                channel.recv_bytes()
        else:
            assert channel.recv_bytes() == content(model.queue.popleft()[1])

    @rule(index=st.integers(0, 2), size=st.integers(0, 300))
    def recv_into(self, index, size):
        channel, model = self.handle(index), self.model
        if not model.queue:
            return
        sequence, payload, meta, attempt, _ = model.queue[0]
        expected = content(payload)
        buffer = bytearray(size)
        if len(expected) > size:
            with pytest.raises(dsline.BufferTooSmallError):
                channel.recv_into(buffer)
            model.queue[0] = (sequence, payload, meta, attempt, True)
        else:
            assert channel.recv_into(buffer) == len(expected)
            assert buffer[: len(expected)] == expected
            model.queue.popleft()

    @rule(index=st.integers(0, 2), count=st.integers(1, 4))
    def recv_many(self, index, count):
        model = self.model
        if model.queue:
            views = self.handle(index).recv_many(count)
            expected = [content(model.queue.popleft()[1]) for _ in range(min(count, len(model.queue)))]
            assert [view.tobytes("A") for view in views] == expected

    @precondition(lambda self: self.number > 8)
    @rule(index=st.integers(0, 2), immediate=st.booleans())
    def shut_down(self, index, immediate):
        self.handle(index).shutdown(immediate)
        self.model.is_shut_down = True
        if immediate:
            self.model.queue.clear()
            self.model.is_over = True

    @invariant()
    def both_agree(self):
        if not hasattr(self, "model"):
            return
        self.number += 1
        model = self.model
        for channel in self.handles:
            stats = channel.stats()
            assert len(channel) == stats.depth == len(model.queue)
            assert channel.empty == (not model.queue)
            assert (stats.free_slots, stats.pinned_slots) == (model.free, len(model.held))
            assert stats.next_sequence == model.next_sequence
            assert (stats.dropped_newest, stats.dropped_oldest) == (
                model.dropped_newest,
                model.dropped_oldest,
            )
            assert channel.closed == model.is_shut_down
        assert sum(channel.stats().pinned_views for channel in self.handles) == len(model.held)

    def teardown(self):
        if not hasattr(self, "model"):
            return
        self.model.held.clear()
        if self.handles[0].name is not None:
            self.handles[0].unlink()
        for channel in self.handles:
            channel.close()
        self.handles.clear()


ChannelMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, database=None
)
TestChannelAgainstModel = ChannelMachine.TestCase
