"""What docs/design/security.md promises, seen from Python. Most checks are in tests/verification/robust/security.cpp."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

import dsline

OTHER_USER = 61234

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="no second user: only root can become another one")


def as_other_user(work):
    """Run `work` in a forked child as another user; its exit code."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setgid(OTHER_USER)
            os.setuid(OTHER_USER)
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_root
@pytest.mark.parametrize(("mode", "expected"), [(0o600, 1), (0o644, 1), (0o666, 0)])
def test_another_user_is_refused_unless_the_mode_says_otherwise(tmp_path, mode, expected):
    path = tmp_path / "mine"
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(os.stat(folder).st_mode & 0o7777 | 0o001)

    def work():
        try:
            dsline.FileChannel.open(path).close()
        except dsline.ChannelPermissionError:
            return 1
        return 0

    with dsline.FileChannel.create(path, capacity=2, mode=mode) as channel:
        channel.send(b"for me")
        assert as_other_user(work) == expected
        assert channel.recv_bytes(timeout=1) == b"for me"


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_the_mode_does_not_depend_on_the_umask(name, mask):
    before = os.umask(mask)
    try:
        channel = dsline.ShmChannel(name, capacity=2)
    finally:
        os.umask(before)
    with channel:
        path = f"/dev/shm/dsline-{os.geteuid()}/{name}"
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert os.stat(os.path.dirname(path)).st_mode & 0o066 == 0


def test_a_link_is_not_followed(name, tmp_path):
    with dsline.FileChannel.create(tmp_path / "real", capacity=2) as real, dsline.ShmChannel(name + "-keep"):
        link = f"/dev/shm/dsline-{os.geteuid()}/{name}"
        os.symlink(tmp_path / "real", link)
        try:
            with pytest.raises(dsline.ChannelPermissionError):
                dsline.ShmChannel(name)
        finally:
            os.unlink(link)
        assert real.stats().participants == 1


def test_what_is_received_cannot_be_written(name):
    with dsline.ShmChannel(name, capacity=2) as channel:
        channel.send(np.arange(4))
        channel.send(b"bytes")
        array = channel.recv_array(timeout=1)
        assert not array.flags.writeable
        with pytest.raises(ValueError, match=r"read-only|WRITEABLE"):
            array.flags.writeable = True
        view = channel.recv(timeout=1)
        assert memoryview(view).readonly
        del array, view


def test_payloads_are_left_out_of_core_dumps(tmp_path):
    path = tmp_path / "region"
    with (
        dsline.FileChannel.create(path, capacity=2) as channel,
        dsline.FileChannel.open(path) as other,
    ):
        channel.send(b"secret")
        assert other.recv_bytes(timeout=1) == b"secret"
        found = 0
        ours = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                ours = str(path) in line
            elif ours and line.startswith("VmFlags:"):
                found += 1
                assert " dd" in line, line
        assert found >= 2
