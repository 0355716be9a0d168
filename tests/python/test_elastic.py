"""Slots that grow and shrink; memory that is not there is a clean error before any byte is written."""

import errno
import json
import subprocess

import numpy as np
import pytest
from support import assert_clean, run_script

import dsline

PAGE = 4096


@pytest.mark.parametrize("factor", [2, 16, 1000])
def test_a_message_larger_than_the_slot_just_works(make_any, factor):
    channel = make_any(capacity=2, slot_size=1024)
    for number in range(5):
        array = np.arange(factor * 128) + number
        assert channel.send(array, timeout=0)
        np.testing.assert_array_equal(channel.recv_array(timeout=0), array)


def test_messages_up_to_max_message_size(make_any):
    limit = 300_000
    channel = make_any(capacity=2, slot_size=64, max_message_size=limit)
    for size in (limit - 1, limit):
        payload = np.random.default_rng(size).bytes(size)
        channel.send(payload, meta={"k": "x" * 1000})
        assert channel.recv_bytes(timeout=0) == payload
    with pytest.raises(dsline.MessageTooLargeError, match=f"{limit + 1} bytes.*at most {limit}"):
        channel.send(bytes(limit + 1))


def test_growing_does_not_touch_the_neighbours(make_any):
    channel = make_any(capacity=4, slot_size=100, max_message_size=1 << 20)
    small = [bytes([number]) * 100 for number in (1, 2, 3)]
    channel.send_many(small)
    channel.send(b"L" * 1_000_000)
    views = channel.recv_many(3, timeout=0)
    assert [bytes(view) for view in views] == small
    assert channel.recv_bytes(timeout=0) == b"L" * 1_000_000
    assert [bytes(view) for view in views] == small


def test_a_slot_shrinks_when_its_room_was_long_not_needed(make_any):
    channel = make_any(capacity=1, slot_size=64, max_message_size=16 << 20)
    before = channel.stats().reserved_bytes
    channel.send(bytes(8 << 20))
    channel.recv_bytes(timeout=0)
    assert channel.stats().reserved_bytes >= before + (8 << 20)
    for number in range(1000):
        channel.send(b"%d" % number)
        assert channel.recv_bytes(timeout=0) == b"%d" % number
    assert channel.stats().reserved_bytes <= before + PAGE
    large = np.random.default_rng(0).bytes(8 << 20)
    channel.send(large)
    assert channel.recv_bytes(timeout=0) == large


def test_shrinking_gives_the_pages_back(name, segment):
    with dsline.ShmChannel(name, capacity=1, slot_size=64) as channel:
        before = segment(name).stat().st_blocks
        channel.send(bytes(8 << 20))
        channel.recv_bytes(timeout=0)
        assert segment(name).stat().st_blocks * 512 >= 8 << 20
        for _ in range(1000):
            channel.send(b"x")
            channel.recv_bytes(timeout=0)
        assert segment(name).stat().st_blocks <= before + 2 * PAGE // 512


def test_a_view_of_a_large_message_survives_the_shrinking_of_others(make_any):
    channel = make_any(capacity=2, slot_size=64)
    large = np.random.default_rng(0).integers(0, 255, 1 << 20, np.uint8)
    channel.send(large)
    view = channel.recv_array(timeout=0)
    for _ in range(1000):
        channel.send(b"x", timeout=0)
        channel.recv_bytes(timeout=0)
    np.testing.assert_array_equal(view, large)


def test_reserved_memory_is_what_the_slots_need_not_what_they_may_need(name, segment):
    with dsline.ShmChannel(name, capacity=64, slot_size=4096, max_message_size=1 << 30):
        assert segment(name).stat().st_size >= 64 << 30
        assert segment(name).stat().st_blocks * 512 < 2 << 20


# --- a small /dev/shm -------------------------------------------------------------------------------------------

SMALL_TMPFS = """
import errno, json, os, sys
import numpy as np
import dsline

report = {}
free = os.statvfs("/dev/shm")
assert free.f_blocks * free.f_frsize == 8 << 20

# Growing arrays, kept queued.
with dsline.ShmChannel("small", capacity=16, slot_size=4096) as channel:
    channel.send(b"first")
    sent = []
    try:
        for size in (1 << shift for shift in range(12, 30)):
            array = np.arange(size, dtype=np.uint8)
            channel.send(array, timeout=0)
            sent.append(size)
    except dsline.SharedMemoryFullError as error:
        assert isinstance(error, OSError)
        report["growing"] = [error.errno, str(error), size]
    report["sent"] = sent
    before = channel.stats()
    assert before.depth == 1 + len(sent)
    assert before.free_slots == 16 - before.depth, "the slot that could not grow is free again"
    assert channel.send(b"small still works", timeout=0)
    assert channel.recv_bytes(timeout=0) == b"first"
    for size in sent:
        got = channel.recv_array(timeout=0)
        assert got.shape == (size,) and (got == np.arange(size, dtype=np.uint8)).all()
        del got
    assert channel.recv_bytes(timeout=0) == b"small still works"

    # What received messages took is taken back for the next large one.
    for _ in range(20):
        assert channel.send(np.ones(4 << 20, np.uint8), timeout=0)
        assert channel.recv_array(timeout=0).sum() == 4 << 20

    # A strided array and metadata take the same way.
    try:
        channel.send(np.ones(32 << 20, np.uint8)[::2], meta={"k": 1}, timeout=0)
    except dsline.SharedMemoryFullError as error:
        report["strided"] = [error.errno, str(error), 11 << 20]  # the slot kept 4 MiB
    assert len(channel) == 0 and channel.stats().free_slots == 16

del channel  # it keeps its memory until it is gone

# Creating what cannot fit.
try:
    dsline.ShmChannel("huge", capacity=64, slot_size=1 << 20)
except dsline.SharedMemoryFullError as error:
    report["creating"] = [error.errno, str(error), 64 << 20]
assert os.listdir(f"/dev/shm/dsline-{os.geteuid()}") == []
used = os.statvfs("/dev/shm")
assert (used.f_blocks - used.f_bfree) * used.f_frsize <= 64 << 10, "a refused channel keeps nothing"

# Somebody else fills the file system: send says so, and goes on once there is room.
with dsline.ShmChannel("other", capacity=4, slot_size=4096) as channel:
    with open("/dev/shm/filler", "wb") as filler:
        try:
            while True:
                filler.write(bytes(65536))
                filler.flush()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            os.truncate("/dev/shm/filler", os.path.getsize("/dev/shm/filler") - 16384)
    assert channel.send(bytes(4096), timeout=0), "the room of the slots is reserved"
    try:
        channel.send(bytes(1 << 20), timeout=0)
    except dsline.SharedMemoryFullError as error:
        report["filled"] = [error.errno, str(error), 1 << 20]
    os.unlink("/dev/shm/filler")
    assert channel.send(bytes(1 << 20), timeout=0)
    assert [len(channel.recv_bytes(timeout=0)) for _ in range(2)] == [4096, 1 << 20]
print(json.dumps(report))
"""


def in_small_tmpfs(tmp_path):
    """Command prefix for a program that has 8 MiB of /dev/shm to itself, in a mount namespace of its own."""
    mounting = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"'
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mounting, "sh"]
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        pytest.skip("mounting is refused: no unshare command")
    if tried.returncode != 0:
        pytest.skip(f"mounting is refused: {tried.stderr.strip()}")
    return prefix


def test_a_full_dev_shm_is_a_clean_error(tmp_path):
    done = run_script(SMALL_TMPFS, prefix=in_small_tmpfs(tmp_path))
    assert_clean(done)
    report = json.loads(done.stdout)
    assert len(report["sent"]) >= 8
    assert sum(report["sent"]) < 8 << 20
    for case in ("growing", "strided", "creating", "filled"):
        number, text, size = report[case]
        assert number == errno.ENOSPC, case
        needed, free = (int(part.split(" bytes")[0].split()[-1]) for part in (text, text.split("only ")[1]))
        assert needed >= size * 0.9, text
        assert free < needed, text
        assert "--shm-size" in text, text
        assert "remount,size=" in text, text
        assert "8388608" in text, text


# --- the memory of the machine ----------------------------------------------------------------------------------

TOO_MUCH = """
import errno, mmap, os, sys
import numpy as np
import dsline

# Should a reservation succeed by mistake, the kernel ends this process first.
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
kind = sys.argv[1]
with open("/proc/meminfo") as file:
    available = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
size = available + (1 << 30)


def memory():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Rss:"))


def refused(call):
    before = memory()
    try:
        call()
    except dsline.SharedMemoryFullError as error:
        assert error.errno in (errno.ENOSPC, errno.ENOMEM), error.errno
        assert memory() - before < 16 << 20
        text = str(error)
        assert "needs" in text and "free" in text and ("fewer or smaller" in text), text
        print(text)
    else:
        sys.exit("it was not refused")


# 64 KiB of memory, seen many times.
source = np.broadcast_to(np.zeros(1, np.uint8), (size,))
options = {} if kind == "named" else {"storage": kind}
with dsline.ShmChannel(sys.argv[2] if kind == "named" else None, capacity=2, slot_size=4096,
                       max_message_size=1 << 42, **options) as channel:
    channel.send(b"before")
    reserved = channel.stats().reserved_bytes
    refused(lambda: channel.send(source, timeout=0))
    fd = os.memfd_create("sparse")
    os.truncate(fd, size)
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as sparse:
        refused(lambda: channel.send(sparse, timeout=0))
    os.close(fd)
    assert channel.stats().reserved_bytes == reserved
    channel.send(b"after")
    assert [channel.recv_bytes(timeout=0), channel.recv_bytes(timeout=0)] == [b"before", b"after"]

refused(lambda: dsline.ShmChannel(capacity=1, slot_size=size, **options or {"storage": "memfd"}))
refused(lambda: dsline.ShmChannel(capacity=1 << 10, slot_size=size >> 10, **options or {"storage": "memfd"}))
"""


@pytest.mark.parametrize("kind", ["memfd", "heap", "named"])
def test_more_than_the_machine_has_is_refused_before_a_byte_is_written(name, kind):
    done = run_script(TOO_MUCH, kind, name)
    assert_clean(done)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all("MemAvailable" in line or "cgroup" in line or "file system" in line for line in lines)


def test_a_huge_max_message_size_costs_nothing():
    with dsline.ShmChannel(storage="memfd", capacity=2, slot_size=64, max_message_size=1 << 42) as channel:
        assert channel.stats().reserved_bytes < 1 << 20
        channel.send(bytes(100_000))
        assert len(channel.recv(timeout=0)) == 100_000
