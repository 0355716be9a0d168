"""Checkpoints: the newest one that is complete is there, whatever ended the process that wrote them."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from support import STRICT, TIMEOUT

import dsline
from dsline.dataflow.checkpoints import Store

STATES = {"0": b"state of the first", "1": b"", "2": bytes(100_000)}


def folders(path):
    return sorted(each.name for each in pathlib.Path(path).iterdir() if each.name.startswith("checkpoint-"))


def test_what_is_saved_is_the_newest(tmp_path):
    store = Store(tmp_path / "ckpt")
    assert store.newest("plan") is None
    for number in (3, 4, 9):
        store.save(number, "plan", {**STATES, "0": b"%d" % number})
        found = store.newest("plan")
        assert (found.number, found.fingerprint) == (number, "plan")
        assert found.states == {**STATES, "0": b"%d" % number}
    assert len(folders(tmp_path / "ckpt")) == 2
    again = Store(str(tmp_path / "ckpt"))
    assert again.newest() == found
    again.save(0, "plan", {})  # the numbers of another run begin anew
    assert again.newest().number == 0
    assert store.newest().number == 0
    store.clear()
    assert store.newest() is None
    assert os.listdir(tmp_path / "ckpt") == ["lock"]


def test_another_plan(tmp_path):
    store = Store(tmp_path)
    store.save(1, "one plan", STATES)
    with pytest.raises(dsline.PipelineBuildError, match=r"one of another pipeline.*without resume=True"):
        store.newest("another plan")


def test_a_damaged_one_does_not_count(tmp_path):
    store = Store(tmp_path)
    store.save(1, "plan", STATES)
    store.save(2, "plan", STATES)
    newest = tmp_path / folders(tmp_path)[-1]
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for at in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            if not whole:
                continue
            flipped = bytearray(whole)
            flipped[at] ^= 4
            path.write_bytes(flipped)
            assert store.newest("plan").number == 1
        path.write_bytes(whole[:-1] if whole else b"more")
        assert store.newest("plan").number == 1
        path.unlink()
        assert store.newest("plan").number == 1
        path.write_bytes(whole)
        assert store.newest("plan").number == 2


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save(1, "plan", STATES)
    for call in ("mkdir", "fsync", "rename"):

        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, call, full)
            with pytest.raises(
                dsline.PipelineRuntimeError,
                match=r"checkpoint 2 cannot be written.*no space.*before it stays",
            ):
                store.save(2, "plan", STATES)
        assert store.newest("plan").number == 1
        assert sorted(os.listdir(tmp_path)) == [*folders(tmp_path), "lock"]
    store.save(3, "plan", STATES)
    assert store.newest("plan").number == 3


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(dsline.PipelineBuildError, match="cannot be kept in"):
        Store(tmp_path / "file")
    with pytest.raises(dsline.PipelineBuildError, match="it holds 'file'"):
        Store(tmp_path)


OTHER = """
import sys
import dsline
from dsline.dataflow.checkpoints import Store
try:
    Store(sys.argv[1])
except dsline.PipelineBuildError as error:
    print(error)
else:
    print("opened")
"""


def other_process(path):
    command = [sys.executable, *STRICT, "-c", OTHER, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert done.stderr == ""
    return done.stdout


def test_one_process_at_a_time(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    assert f"process {os.getpid()} keeps its checkpoints in" in other_process(tmp_path)
    del first
    assert "keeps its checkpoints in" in other_process(tmp_path)
    del second
    assert other_process(tmp_path) == "opened\n"


SAVER = """
import os, shutil, signal, sys
import builtins
from dsline.dataflow.checkpoints import Store

def save(path, step):
    store = Store(path)
    store.save(1, "plan", {"0": b"one", "1": b"more"})
    store.save(2, "plan", {"0": b"two", "1": b"more"})
    calls = 0

    def dying(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call

    for where, names in ((os, ("mkdir", "fsync", "rename", "unlink", "rmdir")), (builtins, ("open",))):
        for name in names:
            setattr(where, name, dying(getattr(where, name)))
    store.save(3, "plan", {"0": b"three", "1": b"more"})

for step in range(1, 60):
    child = os.fork()
    if not child:
        save(os.path.join(sys.argv[1], str(step)), step)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code)
    if code == 0:
        break
"""


def test_killed_at_any_step(tmp_path):
    """Before each call that changes the disk, one after the other."""
    command = [sys.executable, "-c", SAVER, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    codes = [int(line) for line in done.stdout.split()]
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0]
    numbers = []
    for step, code in enumerate(codes, 1):
        path = tmp_path / str(step)
        store = Store(path)
        found = store.newest("plan")
        assert found.states == {"0": {2: b"two", 3: b"three"}[found.number], "1": b"more"}
        assert not any(name.startswith("begun-") for name in os.listdir(path))
        numbers.append(found.number)
        if code == 0:
            assert found.number == 3
            store.save(9, "plan", {})
            assert store.newest("plan").number == 9
            break
    assert numbers == sorted(numbers)
    assert numbers.count(2) > 5
