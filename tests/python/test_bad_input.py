"""Bad input gets a clear error and loses nothing."""

import errno
import json
import mmap
import os
import re
import stat
import struct

import numpy as np
import pytest
from support import assert_clean, run_script

import dsline
from dsline._core import channel_directory, list_names
from dsline.testing import unique_name

FRAME_MAGIC = b"DSLF"
FRAME_HEADER_BYTES = 64
LAYOUT_VERSION_OFFSET = 4


# --- names and options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "/a",
        "../a",
        "a b",
        "a\n",
        "a\0b",
        "größe",
        "a*",
        "x" * 101,
        "x" * 100_000,
        "~",
    ],
    ids=lambda wrong: ascii(wrong[:12]),
)
@pytest.mark.parametrize("way", [dsline.ShmChannel, dsline.ShmChannel.create, dsline.ShmChannel.open])
def test_a_wrong_name_is_refused_with_the_rule(way, wrong):
    with pytest.raises(ValueError, match="1 to 100 of A-Z a-z 0-9") as caught:
        way(wrong)
    assert isinstance(caught.value, dsline.ChannelError)
    assert len(str(caught.value)) < 400


def test_a_lone_surrogate_is_no_name():
    with pytest.raises(ValueError, match=r"surrogate|1 to 100"):
        dsline.ShmChannel("a\ud800")


@pytest.mark.parametrize("good", ["a", "A.b_c-9", "-", "_", "0", "x" * 100, "a.", "a..b"])
def test_names_up_to_the_limit_are_good(good):
    name = good if len(good) > 60 else f"{good}{unique_name('n')}"[:100]
    if len(good) == 100:
        name = unique_name().ljust(100, "x")
    with dsline.ShmChannel(name, capacity=1, slot_size=64):
        assert name in list_names()


@pytest.mark.parametrize("wrong", [b"bytes", 5, 1.5, ["a"], object()], ids=repr)
def test_a_name_of_another_type_is_refused(wrong):
    for way in (dsline.ShmChannel, dsline.ShmChannel.create, dsline.ShmChannel.open):
        with pytest.raises(TypeError, match="name"):
            way(wrong)


def test_an_anonymous_channel_cannot_be_opened():
    with pytest.raises(TypeError, match="anonymous"):
        dsline.ShmChannel.open(None)


SIZES = ["capacity", "slot_size", "max_message_size", "max_handles"]


@pytest.mark.parametrize("storage", ["shm", "memfd", "heap"])
@pytest.mark.parametrize("value", [0, -1, -(1 << 70), 1 << 63, 1 << 64, 1 << 200])
@pytest.mark.parametrize("option", SIZES)
def test_absurd_sizes_are_refused_with_value_and_limit(option, value, storage):
    with pytest.raises(ValueError, match=f"{option} is {value}, must be 1 to") as caught:
        dsline.ShmChannel(storage=storage, **{option: value})
    assert isinstance(caught.value, dsline.InvalidArgumentError)


@pytest.mark.parametrize("value", [1.0, "4", b"4", [4], True, np.array([4]), 4j], ids=repr)
@pytest.mark.parametrize("option", SIZES)
def test_sizes_of_another_type_are_refused(option, value):
    with pytest.raises(TypeError, match=option):
        dsline.ShmChannel(storage="heap", **{option: value})


def test_integers_of_numpy_are_sizes():
    with dsline.ShmChannel(storage="heap", capacity=np.int8(3), slot_size=np.uint64(64)) as channel:
        assert (channel.capacity, channel.slot_size) == (3, 64)


def test_more_address_space_than_a_channel_has_is_refused():
    with pytest.raises(
        ValueError, match=r"capacity=1000 .* max_message_size=1099511627776.*lower one"
    ) as caught:
        dsline.ShmChannel(storage="memfd", capacity=1000, max_message_size=1 << 40)
    assert isinstance(caught.value, dsline.InvalidArgumentError)


def test_max_message_size_below_slot_size_is_refused():
    with pytest.raises(ValueError, match=r"max_message_size is 63.*slot_size"):
        dsline.ShmChannel(storage="heap", slot_size=64, max_message_size=63)


@pytest.mark.parametrize("option", ["backpressure", "checksum", "storage", "on_stale"])
@pytest.mark.parametrize(
    "value", ["", "other", 3, b"block", object()], ids=lambda value: type(value).__name__
)
def test_unknown_choices_are_refused_with_the_choices(option, value):
    with pytest.raises(ValueError, match=f"{option} is .*, must be one of '"):
        dsline.ShmChannel(**{option: value})


@pytest.mark.parametrize("mode", [0, 0o400, 0o700, 0o777, 0o1600, 0o6600, -1, "600", 0.5, None], ids=repr)
def test_modes_that_make_no_sense_are_refused(mode):
    with pytest.raises(ValueError, match="mode"):
        dsline.ShmChannel(mode=mode)


@pytest.mark.parametrize("storage", ["memfd", "heap"])
def test_a_name_for_storage_without_names_is_refused(name, storage):
    with pytest.raises(ValueError, match=f"storage='{storage}'.*{name}"):
        dsline.ShmChannel(name, storage=storage)
    assert name not in list_names()


def test_options_are_keywords_and_known(name):
    with pytest.raises(TypeError):
        dsline.ShmChannel(name, 64)
    with pytest.raises(TypeError):
        dsline.ShmChannel(name, slots=64)


def test_a_refused_channel_leaves_the_process_whole():
    with dsline.ShmChannel(storage="heap", capacity=2, slot_size=64) as channel:
        for wrong in ({"capacity": 0}, {"storage": "x"}, {"timeout": -1}):
            with pytest.raises(ValueError):
                dsline.ShmChannel(**wrong)
        channel.send(b"fine")
        assert channel.recv_bytes(timeout=0) == b"fine"


@pytest.mark.parametrize(
    "call", [lambda ch: ch.send(b"x"), lambda ch: ch.recv(timeout=0), len, lambda ch: ch.stats()]
)
@pytest.mark.parametrize("cls", [dsline.ShmChannel, dsline.FileChannel])
def test_an_object_that_was_never_opened_says_so(cls, call):
    channel = cls.__new__(cls)
    assert channel.closed
    with pytest.raises(dsline.ChannelClosedError, match="never opened"):
        call(channel)
    channel.close()


NEVER_OPENED = """
import sys
import dsline

channel = dsline.{cls}.__new__(dsline.{cls})
for use in sorted(set(dir(channel)) - set(dir(object))):
    if use in ("_open", "_begin", "_start", "_at", "create", "open"):
        continue
    try:
        value = getattr(channel, use)
        if use.startswith("_core") or use in ("fileno_shared", "unlink", "shutdown", "stats", "__len__", "_label"):
            value()
    except (dsline.DslineError, AttributeError, TypeError):
        pass
for use in (repr, len, str, bool, iter, hash, next):
    try:
        use(channel)
    except (dsline.DslineError, AttributeError, StopIteration):
        pass
"""


@pytest.mark.parametrize("cls", ["ShmChannel", "FileChannel"])
def test_no_attribute_of_an_object_that_was_never_opened_crashes(cls):
    """`__new__` without opening: what a subclass sees before its super().__init__()."""
    assert_clean(run_script(NEVER_OPENED.format(cls=cls)))


MADE_BY_HAND = """
import dsline

message = dsline.Message.__new__(dsline.Message)
for use in (lambda: message.payload, message.array, message.__enter__, lambda: message.nbytes, message.release,
            lambda: message.meta, lambda: repr(message), lambda: message.__exit__(None, None, None)):
    try:
        use()
    except (ValueError, AttributeError, TypeError):
        pass

loan = dsline.Loan.__new__(dsline.Loan)
store = dsline._core.ArrayStore.__new__(dsline._core.ArrayStore)
calls = [loan.publish, loan.abort, loan.__enter__, lambda: loan.array, lambda: repr(loan), lambda: loan.published,
         lambda: loan.__exit__(None, None, None), store.use, store.trim, store.close, lambda: store.uuid, lambda: store.limit]
for cls in (dsline.Queue, dsline.JoinableQueue, dsline.SimpleQueue):
    made = cls.__new__(cls)
    for name in ("get", "empty", "full", "qsize", "task_done", "join", "close", "get_nowait", "shutdown", "__repr__"):
        if hasattr(made, name):
            calls.append(getattr(made, name))
    calls.append(lambda made=made: made.put(1))
for use in calls:
    try:
        use()
    except (ValueError, AttributeError, TypeError, RuntimeError, dsline.DslineError):
        pass
"""


def test_no_use_of_a_message_made_by_hand_crashes():
    assert_clean(run_script(MADE_BY_HAND))


# --- messages that are too large --------------------------------------------------------------------------------


@pytest.mark.parametrize("send", ["bytes", "array", "strided", "view"])
def test_an_oversize_message_is_refused_and_nothing_is_lost(make_any, send):
    channel = make_any(capacity=2, slot_size=64, max_message_size=1000)
    data = {
        "bytes": bytes(1001),
        "array": np.zeros(1001, np.uint8),
        "strided": np.zeros(2002, np.uint8)[::2],
        "view": memoryview(bytes(2002))[::2],
    }[send]
    channel.send(b"before")
    with pytest.raises(dsline.MessageTooLargeError, match=r"1001 bytes.*at most 1000") as caught:
        channel.send(data)
    assert isinstance(caught.value, ValueError)
    way_out = int(re.search(r"max_message_size>=(\d+)", str(caught.value)).group(1))
    assert 1001 <= way_out < 1100
    with dsline.ShmChannel(storage="heap", capacity=1, slot_size=64, max_message_size=way_out) as larger:
        assert larger.send(data)
    assert channel.stats().free_slots == 1
    assert channel.send(data[:1000] if send in ("bytes", "array") else bytes(1000), timeout=0)
    assert channel.recv_bytes(timeout=0) == b"before"
    assert len(channel.recv(timeout=0)) == 1000


def test_an_oversize_message_is_refused_before_waiting_and_dropping(make_channel):
    channel = make_channel(capacity=1, slot_size=64, max_message_size=64)
    channel.send(b"x")
    for policy in ("block", "raise", "drop_newest", "drop_oldest"):
        handle = dsline.ShmChannel.open(channel.name, backpressure=policy)
        with handle, pytest.raises(dsline.MessageTooLargeError):
            handle.send(bytes(65))
    assert len(channel) == 1


def test_a_message_with_large_metadata_is_refused_by_a_channel_of_small_slots(make_channel):
    channel = make_channel(capacity=2, slot_size=64, max_message_size=64)
    with pytest.raises(dsline.MessageTooLargeError, match="metadata"):
        channel.send(b"x" * 64, meta={"k": "x" * 60_000})
    assert channel.stats().free_slots == 2


# --- what is in the way of a name -------------------------------------------------------------------------------


@pytest.fixture
def place(name):
    """The path of a name, in the directory that the first channel makes; removed afterwards."""
    with dsline.ShmChannel(unique_name(), capacity=1, slot_size=64):
        pass
    path = os.path.join(channel_directory(), name)
    yield path
    if os.path.islink(path) or os.path.isfile(path) or os.path.exists(path):
        os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


FOREIGN = {
    "empty": b"",
    "short": b"abc",
    "text": b"this is somebody's file\n" * 500,
    "zeros": bytes(100_000),
    "other magic": b"ELF\x7f" + bytes(8000),
}


@pytest.mark.parametrize("way", [dsline.ShmChannel, dsline.ShmChannel.open, dsline.ShmChannel.create])
@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_is_refused_and_left_alone(name, place, content, way):
    with open(place, "wb") as file:
        file.write(FOREIGN[content])
    with pytest.raises(dsline.ChannelLayoutError, match=name) as caught:
        way(name)
    assert isinstance(caught.value, OSError)
    assert "remove it, or choose another name" in str(caught.value)
    with open(place, "rb") as file:
        assert file.read() == FOREIGN[content]


def test_a_foreign_file_is_refused_even_with_reset(name, place):
    with open(place, "wb") as file:
        file.write(b"precious")
    with pytest.raises(dsline.ChannelLayoutError):
        dsline.ShmChannel(name, on_stale="reset")
    assert os.path.getsize(place) == 8


def stale(name, place, payload=b"x"):
    """Leave a channel with a message under the name, and return its size."""
    with dsline.ShmChannel(name, capacity=4, slot_size=64, max_message_size=64) as channel:
        channel.send(payload)
    return os.path.getsize(place)


def damage_truncate(place, size):
    os.truncate(place, size // 2)


def damage_header_cut(place, size):
    os.truncate(place, 100)


def damage_older(place, size):
    poke(place, LAYOUT_VERSION_OFFSET, struct.pack("<I", 0))


def damage_newer(place, size):
    poke(place, LAYOUT_VERSION_OFFSET, struct.pack("<I", 1_000_000))


def damage_geometry(place, size):
    with open(place, "rb") as file:
        file.seek(60)
        byte = file.read(1)[0]
    poke(place, 60, bytes([byte ^ 1]))


def poke(place, offset, data):
    with open(place, "r+b") as file:
        file.seek(offset)
        file.write(data)


DAMAGE = {
    "truncated": (damage_truncate, "header says"),
    "cut inside the header": (damage_header_cut, "header"),
    "older layout": (damage_older, "layout version 0"),
    "newer layout": (damage_newer, "layout version 1000000"),
    "changed geometry": (damage_geometry, "checksum of its header"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_segment_is_refused_by_open(name, place, damage):
    apply, words = DAMAGE[damage]
    apply(place, stale(name, place))
    for way in (dsline.ShmChannel.open, dsline.ShmChannel.create):
        with pytest.raises(dsline.ChannelLayoutError, match=words):
            way(name)
    assert name in list_names()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_segment_of_the_same_user_is_replaced(name, place, damage):
    apply, _ = DAMAGE[damage]
    apply(place, stale(name, place))
    with dsline.ShmChannel(name, capacity=3, slot_size=64) as channel:
        assert (len(channel), channel.capacity) == (0, 3)
        channel.send(b"new")
        assert channel.recv_bytes(timeout=0) == b"new"


def test_a_damaged_segment_in_use_is_not_replaced(name, place):
    with dsline.ShmChannel(name, capacity=4, slot_size=64) as channel:
        with open(place, "rb") as file:
            good = file.read(8)
        damage_older(place, 0)
        with pytest.raises(dsline.ChannelLayoutError, match="still attached"):
            dsline.ShmChannel(name)
        channel.send(b"goes on")
        assert channel.recv_bytes(timeout=0) == b"goes on"
        poke(place, 0, good)


def test_any_flipped_byte_of_the_description_is_noticed(name, place):
    """The first page up to its checksum, less what may differ: the identity of the boot."""
    stale(name, place)
    with open(place, "rb") as file:
        good = file.read(256)
    for offset in [*range(152), *range(168, 224)]:
        poke(place, offset, bytes([good[offset] ^ 0x10]))
        with pytest.raises(dsline.ChannelLayoutError):
            dsline.ShmChannel.open(name)
        poke(place, offset, good[offset : offset + 1])
    with dsline.ShmChannel.open(name) as channel:
        assert channel.recv_bytes(timeout=0) == b"x"


def test_a_symbolic_link_is_never_followed(name, place, tmp_path):
    with dsline.FileChannel.create(tmp_path / "real", capacity=1, slot_size=64):
        os.symlink(tmp_path / "real", place)
        with pytest.raises(dsline.ChannelPermissionError, match="symbolic link") as caught:
            dsline.ShmChannel(name)
        assert isinstance(caught.value, PermissionError)
    assert os.path.islink(place)


def test_a_directory_and_a_pipe_are_no_channels(name, place):
    os.mkdir(place)
    with pytest.raises(dsline.ChannelLayoutError, match="not a regular file"):
        dsline.ShmChannel(name)
    os.rmdir(place)
    os.mkfifo(place)
    with pytest.raises(dsline.ChannelLayoutError, match="not a regular file"):
        dsline.ShmChannel(name)
    assert stat.S_ISFIFO(os.stat(place).st_mode)


# --- other users ------------------------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys, json
import dsline
from dsline._core import channel_directory
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="no second user: only root can become another one")


@needs_root
def test_users_do_not_see_each_others_names(name):
    with dsline.ShmChannel(name, capacity=1, slot_size=64):
        done = run_script(
            AS_NOBODY
            + """
assert channel_directory() == "/dev/shm/dsline-65534"
try:
    dsline.ShmChannel.open(sys.argv[1])
except dsline.ChannelNotFoundError as error:
    print("65534" in str(error))
with dsline.ShmChannel(sys.argv[1], capacity=2, slot_size=64) as mine:
    mine.send(b"mine")
    mine.recv_bytes()
os.rmdir(channel_directory())
""",
            name,
        )
    assert_clean(done)
    assert done.stdout == "True\n"


@needs_root
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_a_file_of_another_user_is_refused(tmp_path_factory, mode):
    folder = tmp_path_factory.mktemp("other")
    path = folder / "channel"
    for parent in (folder, folder.parent, folder.parent.parent):
        os.chmod(parent, 0o755)
    with dsline.FileChannel.create(path, capacity=1, slot_size=64) as channel:
        os.chmod(path, mode)
        done = run_script(
            AS_NOBODY
            + """
try:
    dsline.FileChannel.open(sys.argv[1])
except dsline.ChannelPermissionError as error:
    assert isinstance(error, PermissionError)
    print(error)
""",
            path,
        )
        channel.send(b"x")
        assert channel.recv_bytes(timeout=0) == b"x"
    for parent in (folder.parent, folder.parent.parent):
        os.chmod(parent, 0o700)
    assert_clean(done)
    assert str(path) in done.stdout
    assert "65534" in done.stdout


@needs_root
def test_a_segment_that_another_user_put_under_the_name_is_refused(name, place):
    stale(name, place)
    os.chown(place, 65534, 65534)
    for way in (dsline.ShmChannel, dsline.ShmChannel.open, dsline.ShmChannel.create):
        with pytest.raises(dsline.ChannelPermissionError, match="65534"):
            way(name)
    assert os.stat(place).st_uid == 65534


@needs_root
def test_a_directory_of_another_user_is_refused():
    script = """
import os, sys
import dsline
from dsline._core import channel_directory
os.setgroups([])
directory = "/dev/shm/dsline-65533"
os.mkdir(directory)
try:
    for owner, mode, words in ((65534, 0o700, "65534"), (65533, 0o777, "lets others write")):
        os.chown(directory, owner, owner)
        os.chmod(directory, mode)
        child = os.fork()
        if child == 0:
            os.setresgid(65533, 65533, 65533)
            os.setresuid(65533, 65533, 65533)
            try:
                dsline.ShmChannel("x")
            except dsline.ChannelPermissionError as error:
                os._exit(0 if directory in str(error) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
finally:
    os.rmdir(directory)
"""
    assert_clean(run_script(script))


# --- corrupted messages -----------------------------------------------------------------------------------------


class Frames:
    """Reaches into the file of a channel as a broken peer might."""

    def __init__(self, path):
        with open(path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.map.close()

    def frame_of(self, payload):
        """Offset of the frame whose payload is `payload`."""
        at = self.map.rfind(FRAME_MAGIC, 0, self.map.find(payload))
        assert at > 0
        return at


@pytest.fixture
def fragile(name, segment):
    """A channel without sparse room, so that its file can be searched."""
    with dsline.ShmChannel(name, capacity=64, slot_size=128, max_message_size=128, timeout=0) as channel:
        with Frames(segment(name)) as frames:
            yield channel, frames
        channel.unlink()


def test_a_flipped_byte_anywhere_in_the_header_is_noticed_and_the_next_message_arrives(fragile):
    channel, frames = fragile
    for offset in range(FRAME_HEADER_BYTES):
        payload = b"payload %d " % offset
        channel.send(payload)
        channel.send(b"next %d" % offset)
        frames.map[frames.frame_of(payload) + offset] ^= 0x01
        with pytest.raises(dsline.CorruptedMessageError, match=f"message {2 * offset} .*damaged") as caught:
            channel.recv()
        assert caught.value.sequence == 2 * offset
        assert channel.recv_bytes() == b"next %d" % offset
        assert channel.stats().corrupted == offset + 1


@pytest.mark.parametrize("bit", range(8))
def test_flipped_metadata_is_noticed(fragile, bit):
    channel, frames = fragile
    channel.send(b"the payload", meta={"key": "the value"})
    at = frames.map.find(b"the value")
    assert at > 0
    frames.map[at + 3] ^= 1 << bit
    with pytest.raises(dsline.CorruptedMessageError):
        channel.recv_message()
    channel.send(b"next")
    assert channel.recv_bytes() == b"next"


RECEIVE = {
    "recv": lambda channel: channel.recv(),
    "recv_array": lambda channel: channel.recv_array(),
    "recv_bytes": lambda channel: channel.recv_bytes(),
    "recv_into": lambda channel: channel.recv_into(bytearray(128)),
    "recv_with_seq": lambda channel: channel.recv_with_seq(),
    "recv_message": lambda channel: channel.recv_message(),
    "recv_many": lambda channel: channel.recv_many(3),
    "recv_batch": lambda channel: channel.recv_batch(3),
    "next": next,
}


@pytest.mark.parametrize("how", RECEIVE)
def test_every_way_to_receive_reports_a_damaged_message(fragile, how):
    channel, frames = fragile
    channel.send(np.arange(4))
    channel.send(b"next")
    at = frames.map.find(FRAME_MAGIC)
    frames.map[at + 8] ^= 0xFF
    with pytest.raises(dsline.CorruptedMessageError):
        RECEIVE[how](channel)
    assert channel.recv_bytes() == b"next"
    stats = channel.stats()
    assert (stats.corrupted, stats.received, stats.pinned_views) == (1, 1, 0)


def test_recv_many_hides_no_damage(fragile):
    channel, frames = fragile
    payloads = [b"first message", b"second message", b"third message"]
    channel.send_many(payloads)
    frames.map[frames.frame_of(payloads[1]) + 8] ^= 0xFF
    got, damaged = [], 0
    while len(channel):
        try:
            got += [bytes(view) for view in channel.recv_many(3)]
        except dsline.CorruptedMessageError:
            damaged += 1
    assert got == [payloads[0], payloads[2]]
    assert damaged == 1, "a message was lost without an error"


def test_recv_batch_hides_no_damage(fragile):
    channel, frames = fragile
    rows = [np.full(12, number + 1) for number in range(3)]
    channel.send_many(rows)
    frames.map[frames.frame_of(rows[1].tobytes()) + 8] ^= 0xFF
    assert (channel.recv_batch(3) == rows[0]).all()
    with pytest.raises(dsline.CorruptedMessageError):
        channel.recv_batch(3)
    assert (channel.recv_batch(3, timeout=0) == rows[2]).all()
    assert channel.stats().corrupted == 1


def test_a_quarantined_slot_is_out_of_use_while_others_are_free(fragile):
    channel, frames = fragile
    channel.send(b"the payload")
    frames.map[frames.frame_of(b"the payload")] ^= 0xFF
    with pytest.raises(dsline.CorruptedMessageError):
        channel.recv()
    assert (channel.stats().corrupted_slots, channel.stats().free_slots) == (1, 63)
    for number in range(63):
        assert channel.send(b"%d" % number)
    assert [channel.recv_bytes() for _ in range(63)] == [b"%d" % number for number in range(63)]


def test_corruption_of_every_slot_does_not_stop_the_channel(name, segment):
    with (
        dsline.ShmChannel(name, capacity=2, slot_size=128, max_message_size=128, timeout=5) as channel,
        Frames(segment(name)) as frames,
    ):
        for number in range(10):
            payload = b"payload %d." % number
            assert channel.send(payload)
            frames.map[frames.frame_of(payload) + 4] ^= 0xFF
            with pytest.raises(dsline.CorruptedMessageError):
                channel.recv()
        channel.send(b"fine")
        assert channel.recv_bytes() == b"fine"
        assert channel.stats().corrupted == 10


@pytest.mark.parametrize("checksum", ["none", "header", "full"])
def test_payload_corruption_is_noticed_where_it_was_asked_for(name, segment, checksum):
    with (
        dsline.ShmChannel(
            name, capacity=4, slot_size=128, max_message_size=128, checksum=checksum, timeout=0
        ) as channel,
        Frames(segment(name)) as frames,
    ):
        for send in (b"a payload of bytes", np.frombuffer(b"a payload of array", np.uint8)):
            payload = bytes(send)
            channel.send(send)
            channel.send(b"next")
            at = frames.map.find(payload)
            frames.map[at + 5] ^= 0x20
            if checksum == "full":
                with pytest.raises(dsline.CorruptedMessageError, match="payload"):
                    channel.recv()
            else:
                assert channel.recv_bytes() == payload[:5] + bytes([payload[5] ^ 0x20]) + payload[6:]
            assert channel.recv_bytes() == b"next"


FUZZ = """
import json, mmap, sys
import numpy as np
import dsline

name, path, checksum = sys.argv[1:]
outcomes = {}
with dsline.ShmChannel(name, capacity=4, slot_size=128, max_message_size=256, checksum=checksum, timeout=0) as channel:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for value in (0x00, 0x01, 0x7F, 0x80, 0xFF):
            for offset in range(64 + 96):
                array = np.arange(12, dtype=np.int16).reshape(3, 4)
                channel.send(array, meta={"a key": "a value", "number": 7})
                at = memory.find(b"DSLF")
                while memory[at + 5] != 1 or memory.find(array.tobytes(), at, at + 400) < 0:
                    at = memory.find(b"DSLF", at + 1)
                    assert at > 0
                memory[at + offset] ^= value
                try:
                    with channel.recv_message() as message:
                        assert message.nbytes <= 256
                        message.meta
                        bytes(message.payload)
                        message.array()
                    outcome = "received"
                except dsline.CorruptedMessageError:
                    outcome = "corrupted"
                except dsline.SchemaMismatchError:
                    outcome = "no array"
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
                while not channel.empty:
                    channel.recv_bytes()
                memory[at : at + 4] = bytes(4)
                channel.send(b"fine")
                assert channel.recv_bytes() == b"fine"
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("checksum", ["none", "header"])
def test_no_corruption_of_header_or_metadata_ends_in_a_crash(name, segment, checksum):
    done = run_script(FUZZ, name, segment(name), checksum, timeout=100)
    assert_clean(done)
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == 5 * 160
    if checksum == "header":
        # ^ 0x00 changes nothing, nor does what lies between the metadata and the payload.
        assert set(outcomes) == {"corrupted", "received"}
        assert 160 <= outcomes["received"] <= 160 + 4 * 32


def test_errors_carry_their_errno(name, place):
    with pytest.raises(dsline.ChannelNotFoundError) as missing:
        dsline.ShmChannel.open(name)
    assert missing.value.errno == errno.ENOENT
    with (
        dsline.ShmChannel(name, capacity=1, slot_size=64),
        pytest.raises(dsline.ChannelExistsError) as existing,
    ):
        dsline.ShmChannel.create(name)
    assert existing.value.errno == errno.EEXIST
