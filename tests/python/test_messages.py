"""What travels with a message, and what becomes of one that is given back."""

import time

import numpy as np
import pytest

import dsline


@pytest.fixture
def channel(make_channel):
    return make_channel(capacity=4, slot_size=1024, timeout=0)


META = [
    {},
    {"text": "grüße \U0001f600", "empty": ""},
    {"data": bytes(range(256)), "none": b""},
    {"n": 0, "small": -(1 << 63), "large": (1 << 63) - 1},
    {"f": 0.1, "inf": float("inf"), "tiny": 5e-324, "zero": -0.0},
    {"yes": True, "no": False, "nothing": None},
    {"columns": ["a", "b", "größe"], "encoding": "rgb8"},
    {"columns": []},
    {"k" * 64: 1, "ü" * 32: 2, "with space": 3, "dots.and-dashes": 4},
    {f"key{number}": number for number in range(64)},
]


@pytest.mark.parametrize(
    "payload", [b"bytes", b"", np.arange(3), np.asfortranarray(np.ones((2, 3)))], ids=repr
)
@pytest.mark.parametrize("meta", META, ids=lambda meta: ",".join(meta)[:20] or "empty")
def test_metadata_comes_back(channel, meta, payload):
    if isinstance(payload, np.ndarray) and len(meta) == 64:
        meta = dict(list(meta.items())[:61])  # dtype, shape and strides are entries too
    channel.send(payload, meta=meta)
    with channel.recv_message() as message:
        assert message.meta == meta
        assert {key: type(value) for key, value in message.meta.items()} == {
            key: type(value) for key, value in meta.items()
        }
        assert list(message.meta) == list(meta) or "columns" in meta
        if isinstance(payload, np.ndarray):
            np.testing.assert_array_equal(message.array(), payload)
        else:
            assert bytes(message.payload) == payload


def test_numpy_scalars_are_taken_as_numbers(channel):
    channel.send(
        b"", meta={"i": np.int16(-3), "f": np.float32(0.5), "b": np.bool_(True), "a": bytearray(b"x")}
    )
    assert channel.recv_message().meta == {"i": -3, "f": 0.5, "b": True, "a": b"x"}


def test_metadata_of_a_strided_array_and_of_a_strided_view(channel):
    channel.send(np.arange(10)[::3], meta={"k": "array"})
    channel.send(memoryview(b"0123456789")[::3], meta={"k": "view"})
    with channel.recv_message() as first, channel.recv_message() as second:
        assert (first.meta, second.meta) == ({"k": "array"}, {"k": "view"})
        np.testing.assert_array_equal(first.array(), [0, 3, 6, 9])
        assert bytes(second.payload) == b"0369"


def test_metadata_larger_than_the_slot_grows_it(channel):
    meta = {"large": "x" * 60_000}
    channel.send(b"y" * 100, meta=meta)
    with channel.recv_message() as message:
        assert message.meta == meta
        assert bytes(message.payload) == b"y" * 100


WRONG_META = {
    "no dict": ([("a", 1)], TypeError, "list"),
    "a str": ("abc", TypeError, "str"),
    "int key": ({1: 2}, TypeError, "1"),
    "bytes key": ({b"a": 2}, TypeError, "a"),
    "empty key": ({"": 2}, ValueError, "64"),
    "long key": ({"k" * 65: 2}, ValueError, "64"),
    "long key in bytes": ({"ü" * 33: 2}, ValueError, "64"),
    "list value": ({"a": [1]}, TypeError, "list"),
    "dict value": ({"a": {}}, TypeError, "dict"),
    "array value": ({"a": np.arange(2)}, TypeError, "ndarray"),
    "complex value": ({"a": 1j}, TypeError, "complex"),
    "large int": ({"a": 1 << 63}, ValueError, "64-bit"),
    "small int": ({"a": -(1 << 63) - 1}, ValueError, "64-bit"),
    "one string of columns": ({"columns": "abc"}, TypeError, "columns"),
    "number in columns": ({"columns": ["a", 1]}, TypeError, "columns"),
    "encoding in bytes": ({"encoding": b"rgb"}, TypeError, "encoding"),
    "too many": ({f"key{number}": number for number in range(65)}, ValueError, "64"),
    "too large": ({"a": "x" * 65536}, ValueError, "65536"),
    "too large together": ({f"key{number}": "x" * 2000 for number in range(40)}, ValueError, "65536"),
}


@pytest.mark.parametrize("payload", [b"bytes", np.arange(3)], ids=["bytes", "array"])
@pytest.mark.parametrize("wrong", WRONG_META)
def test_wrong_metadata_is_refused_and_nothing_is_sent(channel, wrong, payload):
    meta, error, words = WRONG_META[wrong]
    with pytest.raises(error, match=words):
        channel.send(payload, meta=meta)
    assert (len(channel), channel.stats().free_slots) == (0, 4)


def test_a_surrogate_in_metadata_is_refused(channel):
    for meta in ({"a": "\ud800"}, {"\ud800": 1}, {"encoding": "\ud800"}, {"columns": ["\ud800"]}):
        with pytest.raises(ValueError, match=r"surrogate|UTF-8"):
            channel.send(b"", meta=meta)
    assert len(channel) == 0


def test_the_time_of_sending(channel):
    before = time.time_ns()
    channel.send(b"x")
    after = time.time_ns()
    assert before <= channel.recv_message().timestamp_ns <= after


def test_a_message_tells_its_sequence_and_delivery(channel):
    for number in range(3):
        channel.send(b"x")
        with channel.recv_message() as message:
            assert (message.sequence, message.attempt, message.redelivered) == (number, 1, False)
            assert message.nbytes == 1
            assert f"sequence={number}" in repr(message)


# --- releasing --------------------------------------------------------------------------------------------------


def test_release_frees_the_slot_once(channel):
    channel.send(b"x")
    message = channel.recv_message()
    assert channel.stats().pinned_slots == 1
    message.release()
    assert (channel.stats().pinned_slots, channel.stats().pinned_views, channel.stats().free_slots) == (
        0,
        0,
        4,
    )
    channel.send(b"y")
    message.release()
    assert channel.recv_bytes() == b"y", "a second release must not free what the slot holds now"


def test_a_released_message_is_of_no_use(channel):
    channel.send(np.arange(3), meta={"k": 1})
    message = channel.recv_message()
    message.release()
    for use in (lambda: message.payload, message.array, lambda: message.nbytes, message.__enter__):
        with pytest.raises(ValueError, match="released"):
            use()
    assert message.meta == {"k": 1}


def test_release_with_live_views_is_refused(channel):
    channel.send(np.arange(3))
    message = channel.recv_message()
    for use in (lambda: message.payload, message.array, lambda: np.asarray(message.payload)[1:]):
        view = use()
        with pytest.raises(BufferError, match="alive"):
            message.release()
        assert channel.stats().pinned_slots == 1
        del view
    message.release()
    assert channel.stats().free_slots == 4


def test_a_dropped_message_is_acknowledged(channel):
    channel.send(b"x")
    message = channel.recv_message()
    del message
    assert channel.stats().free_slots == 4
    assert channel.stats().redelivered == 0


def test_views_outlive_their_message(channel):
    channel.send(np.arange(3))
    with channel.recv_message() as message:
        array = message.array()
    del message
    assert channel.stats().pinned_slots == 1
    np.testing.assert_array_equal(array, [0, 1, 2])
    del array
    assert channel.stats().free_slots == 4


def test_an_array_of_a_message(channel):
    channel.send(np.arange(6.0).reshape(2, 3))
    with channel.recv_message() as message:
        view = message.array()
        assert not view.flags.writeable
        with pytest.raises(ValueError, match=r"WRITEABLE|writeable"):
            view.flags.writeable = True
        copy = message.array(copy=True)
        copy[0, 0] = 9
        assert view[0, 0] == 0
        del view
    assert channel.stats().free_slots == 4
    channel.send(b"bytes")
    with channel.recv_message() as message, pytest.raises(dsline.SchemaMismatchError, match="5 plain bytes"):
        message.array()


# --- giving back ------------------------------------------------------------------------------------------------


def nack(message):
    with pytest.raises(ZeroDivisionError), message:
        1 / 0  # noqa: B018


def test_a_block_left_by_an_exception_gives_the_message_back(channel):
    channel.send(np.arange(3), meta={"k": 1})
    channel.send(b"second")
    nack(channel.recv_message())
    assert len(channel) == 2
    with channel.recv_message() as message:
        assert (message.sequence, message.attempt, message.redelivered) == (0, 2, True)
        assert message.meta == {"k": 1}
        np.testing.assert_array_equal(message.array(), [0, 1, 2])
    with channel.recv_message() as message:
        assert (message.sequence, message.attempt, message.redelivered) == (1, 1, False)
    assert (len(channel), channel.stats().redelivered, channel.stats().free_slots) == (0, 1, 4)


def test_attempts_are_counted(channel):
    channel.send(b"x")
    for attempt in range(1, channel.max_deliveries):
        message = channel.recv_message()
        assert (message.attempt, message.redelivered) == (attempt, attempt > 1)
        nack(message)
    assert channel.recv_bytes() == b"x"


def test_what_was_given_back_wakes_who_waits(make_channel):
    channel = make_channel(capacity=2, slot_size=64)
    channel.send(b"x")
    message = channel.recv_message(timeout=0)
    with dsline.ShmChannel.open(channel.name) as other:
        nack(message)
        assert other.recv_message(timeout=30).attempt == 2


def test_several_given_back_come_in_the_order_of_sending(channel):
    for number in range(4):
        channel.send(b"%d" % number)
    messages = [channel.recv_message() for _ in range(4)]
    for index in (2, 0, 3):
        nack(messages[index])
    messages[1].release()
    got = []
    for _ in range(3):
        with channel.recv_message() as message:
            got.append((message.sequence, bytes(message.payload), message.redelivered))
    assert got == [(0, b"0", True), (2, b"2", True), (3, b"3", True)]
    assert channel.empty


def test_giving_back_with_live_views_does_no_harm(channel):
    channel.send(np.arange(3))
    message = channel.recv_message()
    view = message.array()
    nack(message)
    assert channel.stats().pinned_views == 1, "the slot was given away under a view"
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv(timeout=0)
    np.testing.assert_array_equal(view, [0, 1, 2])
    del view
    with channel.recv_message(timeout=0) as again:
        assert again.redelivered
        np.testing.assert_array_equal(again.array(), [0, 1, 2])
    del again, message
    assert channel.stats().free_slots == 4
    channel.send(b"next")
    assert channel.recv_bytes() == b"next"


def test_what_is_given_back_after_an_immediate_end_is_discarded(channel):
    channel.send(b"x")
    message = channel.recv_message()
    channel.shutdown(immediate=True)
    nack(message)
    assert (len(channel), channel.stats().free_slots) == (0, 4)
    with pytest.raises(dsline.ChannelClosedError):
        channel.recv()


def test_releasing_inside_the_block_is_final(channel):
    channel.send(b"x")
    message = channel.recv_message()
    with pytest.raises(ZeroDivisionError), message:
        message.release()
        1 / 0  # noqa: B018
    assert channel.empty
    assert channel.stats().free_slots == 4


@pytest.mark.parametrize("size", [0, 1, 4])
def test_a_buffer_that_is_too_small_keeps_the_message(channel, size):
    channel.send(b"12345", meta={"k": 1})
    channel.send(b"second")
    buffer = bytearray(size)
    with pytest.raises(dsline.BufferTooSmallError, match=f"5 bytes.* {size}") as caught:
        channel.recv_into(buffer)
    assert isinstance(caught.value, ValueError)
    assert buffer == bytearray(size), "nothing was written"
    assert len(channel) == 2
    with channel.recv_message() as message:
        assert (message.sequence, bytes(message.payload), message.meta) == (0, b"12345", {"k": 1})
    assert channel.recv_into(bytearray(6)) == 6
    assert channel.stats().received == 2


def test_recv_array_of_bytes_keeps_the_message(channel):
    channel.send(b"bytes")
    channel.send(np.arange(3))
    with pytest.raises(dsline.SchemaMismatchError, match="recv_bytes") as caught:
        channel.recv_array()
    assert isinstance(caught.value, TypeError)
    assert (channel.stats().received, channel.stats().pinned_views) == (0, 0)
    sequence, view = channel.recv_with_seq()
    assert (sequence, bytes(view)) == (0, b"bytes")
    np.testing.assert_array_equal(channel.recv_array(), [0, 1, 2])


# --- control frames, and how far the channel is ---------------------------------------------------------------------------


def test_recv_message_gives_out_control_frames(channel):
    assert channel._core_send_control(17, b"3", 1)
    channel.send(b"plain")
    channel.send_object({"a": 1})
    with channel.recv_message(timeout=1) as marker:
        assert (marker._core_kind, bytes(marker.payload), marker.object()) == (17, b"3", b"3")
        assert marker.sequence == 0
    with channel.recv_message(timeout=1) as message:
        assert message._core_kind == 0
    with channel.recv_message(timeout=1) as message:
        assert message._core_kind == 2


@pytest.mark.parametrize("receive", ["recv", "recv_bytes", "recv_object", "recv_with_seq", "recv_many"])
def test_other_calls_skip_control_frames(channel, receive):
    for kind in (17, 18, 19):
        channel._core_send_control(kind, b"not for you", 1)
    channel.send(b"data")
    arguments = (4,) if receive == "recv_many" else ()
    received = getattr(channel, receive)(*arguments, timeout=1)
    if receive == "recv_with_seq":
        assert received[0] == 3
    received = received[-1] if receive in ("recv_many", "recv_with_seq") else received
    assert bytes(received) == b"data"
    del received
    with pytest.raises(dsline.BufferEmptyError):
        channel.recv_nowait()
    assert channel.stats().pinned_slots == 0


def test_the_end_of_a_stream_ends_an_iteration_once(channel):
    channel.send(b"1")
    channel._core_send_control(16, b"", 1)
    channel.send(b"2")
    assert [bytes(view) for view in channel] == [b"1"]
    assert bytes(channel.recv(timeout=0)) == b"2"
    channel._core_send_control(16, b"", 1)
    with pytest.raises(dsline.ChannelClosedError, match="has ended"):
        channel.recv(timeout=0)


def test_recv_many_and_recv_batch_leave_a_control_frame_for_the_next_call(channel):
    channel.send(np.arange(3))
    channel._core_send_control(16, b"", 1)
    assert len(channel.recv_many(4, timeout=0)) == 1
    with pytest.raises(dsline.ChannelClosedError, match="has ended"):
        channel.recv_many(4, timeout=0)
    channel.send(np.arange(3))
    channel._core_send_control(16, b"", 1)
    assert len(channel.recv_batch(4, timeout=0)) == 1
    with pytest.raises(dsline.ChannelClosedError, match="has ended"):
        channel.recv_batch(4, timeout=0)


def test_a_control_frame_passes_a_channel_with_a_spec(make_channel):
    with make_channel(spec=dsline.ArraySpec((3,), "f4")) as channel:
        channel._core_send_control(17, b"7", 1)
        channel.send(np.ones(3, "f4"))
        assert channel.recv_message(timeout=0)._core_kind == 17
        assert channel.recv_array(timeout=0).sum() == 3


@pytest.mark.parametrize("kind", [-1, 0, 2, 15, 20, 256 + 16])
def test_other_kinds_are_no_control_frames(channel, kind):
    with pytest.raises(ValueError, match="kind of a control frame"):
        channel._core_send_control(kind, b"", 1)


def test_how_far_a_channel_is(channel):
    assert (channel._core_end_of_order(), channel._core_anyone_entering()) == (0, False)
    channel.send(b"1")
    assert channel._core_end_of_order() == 1
    assert channel._core_is_outstanding(0)
    message = channel.recv_message()
    assert channel._core_is_outstanding(0)
    message.release()
    assert not channel._core_is_outstanding(0)
    assert channel._core_is_outstanding(1), "not sent yet"
