"""Fixtures of all suites, and the check after every test that nothing is left behind."""

import contextlib
import gc
import os
from pathlib import Path

import pytest

import dsline
from dsline._core import channel_directory
from dsline.testing import LeakCheck, unique_name

# Helpers of multiprocessing that stay until this process ends.
_RESIDENT = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def _children():
    """Live child processes of this one, by command line."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    command = (
                        Path(f"/proc/{pid}/cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                    if not any(helper in command for helper in _RESIDENT):
                        found[int(pid)] = command or "(ended, but nobody waited for it)"
    return found


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "call":
        item.stash[_failed] = outcome.get_result().failed


_failed = pytest.StashKey[bool]()


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """Descriptors, mapped segments, names of channels and child processes are as they were before the test."""
    gc.freeze()  # what is there now stays; collecting garbage after every test need not look at it
    children = _children()
    check = LeakCheck()
    yield
    request.node.funcargs.clear()  # a channel that a fixture returned keeps its memory until it is gone
    found = check.find()
    left = {pid: command for pid, command in _children().items() if pid not in children}
    for name in found.names:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(channel_directory(), name))
    if not request.node.stash.get(_failed, True):
        assert not found, f"left behind: {found}"
        assert not left, f"child processes are alive: {left}"


@pytest.fixture
def name():
    """A name that no channel has."""
    return unique_name()


@pytest.fixture
def make_channel():
    """Make a named channel; at the end of the test its name is removed and it is closed."""
    made = []

    def make(name=None, **options):
        channel = dsline.ShmChannel(name or unique_name(), **options)
        made.append(channel)
        return channel

    yield make
    _close(made)


@pytest.fixture(params=["shm", "memfd", "heap", "file"])
def make_any(request, tmp_path):
    """The same for every storage."""
    made = []

    def make(**options):
        if request.param == "shm":
            channel = dsline.ShmChannel(unique_name(), **options)
        elif request.param == "file":
            channel = dsline.FileChannel.create(tmp_path / f"{len(made)}.dsline", **options)
        else:
            channel = dsline.ShmChannel(storage=request.param, **options)
        made.append(channel)
        return channel

    make.storage = request.param
    yield make
    _close(made)


@pytest.fixture(params=["shm", "memfd", "heap"])
def make_broadcast(request):
    """Make a Broadcast, for every storage that it can have."""
    made = []

    def make(**options):
        if request.param == "shm":
            channel = dsline.Broadcast(unique_name(), **options)
        else:
            channel = dsline.Broadcast(storage=request.param, **options)
        made.append(channel)
        return channel

    yield make
    _close(made)


def _close(channels):
    for channel in channels:
        if channel.path is not None:
            with contextlib.suppress(dsline.ChannelClosedError):
                channel.unlink()
        channel.close()
    channels.clear()  # what is still referred to keeps its memory


@pytest.fixture
def segment():
    """Return the path of a named channel's segment."""
    return lambda name: Path(channel_directory(), name)
