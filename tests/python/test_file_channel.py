"""Channels in files: what was queued is there after the next open, however the last process ended."""

import os
import pickle

import numpy as np
import pytest
from support import Child, check_proof, wait_until

import dsline
from dsline._core import list_names


def create(path, **options):
    return dsline.FileChannel.create(path, **{"capacity": 8, "slot_size": 256, **options})


def test_what_is_queued_at_close_is_there_after_open(tmp_path):
    path = tmp_path / "queue"
    with create(path) as channel:
        channel.send(b"first")
        channel.send(np.arange(6.0).reshape(2, 3), meta={"k": "v"})
        channel.send(np.array(["2020-01-01"], "M8[D]"))
    with dsline.FileChannel.open(path) as channel:
        assert (len(channel), channel.capacity, channel.slot_size) == (3, 8, 256)
        assert channel.recv_bytes(timeout=0) == b"first"
        with channel.recv_message(timeout=0) as message:
            assert (message.sequence, message.meta, message.redelivered) == (1, {"k": "v"}, False)
            np.testing.assert_array_equal(message.array(), [[0, 1, 2], [3, 4, 5]])
        assert channel.recv_array(timeout=0)[0] == np.datetime64("2020-01-01")
        channel.send(b"more")
    with dsline.FileChannel.open(path) as channel:
        sequence, view = channel.recv_with_seq(timeout=0)
        assert (sequence, bytes(view)) == (3, b"more")
        del view
    with dsline.FileChannel.open(path) as channel:
        assert channel.empty


@pytest.mark.parametrize("how", ["close", "exit", "kill"])
def test_what_another_process_queued_survives_its_end(tmp_path, how):
    path = tmp_path / "queue"
    create(path).close()
    with Child("queue_and_end", str(path), 5, how) as child:
        assert child.read() == "sent"
        if how == "kill":
            child.kill()
        else:
            child.finish()
    with dsline.FileChannel.open(path, timeout=0) as channel:
        assert len(channel) == 5
        for number in range(5):
            with channel.recv_message() as message:
                assert message.sequence == number
                assert message.meta == {"number": number}
                assert check_proof(message.array()) == (7, number)
        channel.send(b"goes on")
        assert channel.recv_bytes() == b"goes on"
        assert channel.stats().free_slots == 8


def test_what_a_killed_process_held_comes_back(tmp_path):
    path = tmp_path / "queue"
    with create(path) as channel:
        channel.send_many([b"0", b"1", b"2"])
    with Child("hold_file", str(path), 2) as child:
        assert child.read() == [0, 1]
        child.kill()
    with dsline.FileChannel.open(path, timeout=0) as channel:
        got = []
        for _ in range(3):
            with channel.recv_message() as message:
                got.append((message.sequence, bytes(message.payload), message.redelivered))
        assert got == [(0, b"0", True), (1, b"1", True), (2, b"2", False)]
        assert channel.stats().free_slots == 8


def test_many_generations_of_one_file(tmp_path):
    path = tmp_path / "queue"
    create(path).close()
    sent = received = 0
    for generation in range(30):
        with dsline.FileChannel.open(path, timeout=0) as channel:
            for _ in range(min(1 + generation % 5, 8 - len(channel))):
                channel.send(b"%d" % sent)
                sent += 1
            for _ in range(min(generation % 4, len(channel))):
                assert channel.recv_bytes() == b"%d" % received
                received += 1
    assert sent > 40
    with dsline.FileChannel.open(path, timeout=0) as channel:
        assert [channel.recv_bytes() for _ in range(sent - received)] == [
            b"%d" % n for n in range(received, sent)
        ]


def test_two_processes_share_a_file(tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    with create(there) as outbox, create(back) as inbox, Child("echo_file", str(there), str(back)) as child:
        for number in range(10):
            outbox.send(np.full(3, number))
            np.testing.assert_array_equal(inbox.recv_array(timeout=30), [2 * number] * 3)
        outbox.shutdown()
        child.finish()


def test_properties(tmp_path):
    with create(
        tmp_path / "queue", checksum="full", backpressure="raise", timeout=1.5, mode=0o640
    ) as channel:
        assert channel.name == "queue"
        assert channel.path == str(tmp_path / "queue")
        assert channel.storage == "file"
        assert channel.checksum is dsline.Checksum.FULL
        assert channel.backpressure is dsline.Backpressure.RAISE
        assert channel.timeout == 1.5
        assert os.stat(channel.path).st_mode & 0o777 == 0o640
    assert "queue" not in list_names()


@pytest.mark.parametrize("as_type", [str, os.fsencode, lambda path: path], ids=["str", "bytes", "Path"])
def test_paths_of_every_kind(tmp_path, as_type):
    path = as_type(tmp_path / "große Datei 😀.dsline")
    with create(path) as channel:
        channel.send(b"x")
    with dsline.FileChannel.open(path) as channel:
        assert channel.recv_bytes(timeout=0) == b"x"


def test_a_relative_path_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with create("queue") as channel:
        assert channel.path == str(tmp_path / "queue")
        channel.send(b"x")
        monkeypatch.chdir(tmp_path / "elsewhere")
        with pytest.raises(dsline.ChannelNotFoundError):
            dsline.FileChannel.open("queue")
        with dsline.FileChannel.open("../queue") as same:
            assert same.recv_bytes(timeout=0) == b"x"
        with pickle.loads(pickle.dumps(channel)) as again:
            assert again.path == channel.path
        channel.unlink()
    assert not (tmp_path / "queue").exists()


def test_a_pickled_handle_opens_the_same_file(tmp_path):
    with create(tmp_path / "queue", backpressure="drop_newest", timeout=0) as channel:
        pickled = pickle.dumps(channel)
        with pickle.loads(pickled) as again:
            assert type(again) is dsline.FileChannel
            assert (again.path, again.backpressure, again.timeout) == (channel.path, channel.backpressure, 0)
            channel.send(b"x")
            assert again.recv_bytes() == b"x"
        channel.unlink()
    create(tmp_path / "queue").close()
    with pytest.raises(dsline.ChannelNotFoundError, match="not the one that was pickled"):
        pickle.loads(pickled)


def test_unlink_removes_the_file(tmp_path):
    with create(tmp_path / "queue") as channel:
        channel.unlink()
        assert list(tmp_path.iterdir()) == []
        channel.send(b"x")
        assert channel.recv_bytes(timeout=0) == b"x"
        with create(tmp_path / "queue") as other:
            channel.unlink()
            assert (tmp_path / "queue").exists(), "the name is another file's now"
            assert other.empty


# --- refused ----------------------------------------------------------------------------------------------------


def test_open_creates_nothing(tmp_path):
    with pytest.raises(dsline.ChannelNotFoundError, match=r"FileChannel\.create") as caught:
        dsline.FileChannel.open(tmp_path / "queue")
    assert isinstance(caught.value, FileNotFoundError)
    assert list(tmp_path.iterdir()) == []


def test_create_replaces_nothing(tmp_path):
    path = tmp_path / "queue"
    with create(path) as channel:
        channel.send(b"kept")
        with pytest.raises(dsline.ChannelExistsError) as caught:
            create(path)
        assert isinstance(caught.value, FileExistsError)
        with pytest.raises(dsline.ChannelExistsError):
            create(path, on_stale="reset")
    with pytest.raises(dsline.ChannelExistsError, match="open"):
        create(path)
    with dsline.FileChannel.open(path) as channel:
        assert channel.recv_bytes(timeout=0) == b"kept"


def test_create_with_reset_replaces_a_channel_that_nobody_uses(tmp_path):
    path = tmp_path / "queue"
    with create(path) as channel:
        channel.send(b"dropped")
    with create(path, capacity=3, on_stale="reset") as channel:
        assert (len(channel), channel.capacity) == (0, 3)


@pytest.mark.parametrize("content", [b"", b"x", b"somebody's notes\n" * 1000, bytes(8192)], ids=len)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    for way in (dsline.FileChannel.open, create, lambda path: create(path, on_stale="reset")):
        with pytest.raises(dsline.ChannelLayoutError, match="notes"):
            way(path)
        assert path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 4, 100, 4096, 10_000])
def test_a_truncated_file_is_refused_and_left_alone(tmp_path, size):
    path = tmp_path / "queue"
    with create(path) as channel:
        channel.send(b"x")
    os.truncate(path, size)
    before = path.read_bytes()
    for way in (dsline.FileChannel.open, create):
        with pytest.raises(dsline.ChannelLayoutError, match="queue"):
            way(path)
    assert path.read_bytes() == before
    if size >= 8:
        with create(path, on_stale="reset") as channel:
            assert channel.empty


def test_places_where_no_file_can_be(tmp_path):
    with pytest.raises(dsline.ChannelNotFoundError, match="does not exist"):
        create(tmp_path / "missing" / "queue")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        create(tmp_path / "file" / "queue")
    with pytest.raises((dsline.ChannelLayoutError, dsline.ChannelExistsError)):
        create(tmp_path)
    with pytest.raises(dsline.DslineError):
        create(tmp_path / ("x" * 300))
    with pytest.raises((OSError, dsline.DslineError)):
        create("/proc/queue")


def test_a_path_with_a_nul_is_refused(tmp_path):
    for way in (create, dsline.FileChannel.open):
        with pytest.raises(ValueError, match=r"null|NUL"):
            way(f"{tmp_path}/a\0b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [None, 5, 1.5, ["a"]], ids=repr)
def test_a_path_of_another_type_is_refused(wrong):
    for way in (create, dsline.FileChannel.open):
        with pytest.raises(TypeError):
            way(wrong)


def test_a_file_channel_is_made_by_create_or_open():
    with pytest.raises(TypeError, match=r"FileChannel\.create"):
        dsline.FileChannel("path")


def test_a_waiting_reader_of_a_file_sees_what_another_process_sends(tmp_path):
    path = tmp_path / "queue"
    with create(path) as channel, Child("queue_and_end", str(path), 5, "close") as child:
        assert [check_proof(channel.recv_array(timeout=30))[1] for _ in range(5)] == list(range(5))
        assert child.read() == "sent"
        child.finish()
        wait_until(lambda: channel.stats().participants == 1)
