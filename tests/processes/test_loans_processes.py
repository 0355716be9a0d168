"""Loans between processes: what a fork, a death and a stray pointer may do to them."""

import ctypes
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from support import STRICT, TIMEOUT, Child, assert_clean, forked, run_script, wait_until

import dsline

SIZE = 1 << 20


@pytest.mark.parametrize("zero_copy", [True, "strict"])
def test_between_processes(name, zero_copy):
    """Another process fills, this one reads, in any number of messages, with arrays kept on both sides."""
    with (
        dsline.ShmChannel(name, capacity=4, slot_size=SIZE, timeout=TIMEOUT) as channel,
        Child("lend", name, 40, zero_copy) as child,
    ):
        held = []
        for i in range(40):
            array = channel.recv_array()
            assert array.dtype == np.int32
            assert array.size == 1000 * (i + 1)
            assert (array == i).all()
            held = [*held[-1:], array]
        assert child.read() == "sent"
        del array, held
        wait_until(lambda: channel.stats().kept_slots == 1)
        child.tell("drop")
        assert child.read() == "dropped"
        wait_until(lambda: channel.stats().free_slots == 4)
        child.finish()
        assert channel.stats().deaths == 0


@pytest.mark.parametrize("storage", ["shm", "memfd"])
def test_open_loans_are_dead_in_a_forked_child(storage, name):
    """The child can neither write into the parent's slot, by whatever it has of it, nor publish or free it."""
    place = name if storage == "shm" else None
    with dsline.ShmChannel(place, capacity=2, slot_size=SIZE, zero_copy=True, timeout=TIMEOUT) as channel:
        loan = channel.alloc(1000, "i4", fill=1)
        array, parts, memory = loan.array, [loan.array[10:20]], memoryview(loan.array)
        pointer = (ctypes.c_int32 * 1000).from_address(array.ctypes.data)

        def child():
            assert not array.flags.writeable
            assert array.tolist() == [1] * 1000
            for call in (loan.publish, lambda: channel.publish(loan), loan.__enter__):
                with pytest.raises(dsline.LoanEndedError, match="forked child"):
                    call()
            loan.abort()
            parts[0][:] = 7
            memory[30] = 7
            pointer[40] = 7
            # The child's own loans and messages are in its own mapping.
            with channel.alloc(5, "i4", fill=3) as mine:
                pass
            assert mine.published
            parts[0][:] = 8

        forked(child)
        assert channel.recv_array().tolist() == [3] * 5
        assert array.flags.writeable
        assert set(array.tolist()) == {1}
        assert channel.stats().free_slots == 1
        memory.release()
        array[0] = 5
        parts.clear()
        loan.publish()
        got = channel.recv_array()
        assert (got[0], set(got[1:].tolist())) == (5, {1})


def test_kept_arrays_in_a_forked_child_release_nothing(name):
    with dsline.ShmChannel(name, capacity=2, slot_size=64, zero_copy=True, timeout=TIMEOUT) as channel:
        kept = []
        with channel.alloc(4, "i4", fill=6) as loan:
            kept.append(loan.array)
        del loan
        channel.recv_array()

        def child():
            assert kept.pop().tolist() == [6] * 4
            channel.send(b"from the child")

        forked(child)
        assert bytes(channel.recv()) == b"from the child"
        assert channel.stats().kept_slots == 1
        assert kept[0].tolist() == [6] * 4
        kept.clear()
        assert channel.stats().free_slots == 2


@pytest.mark.parametrize("what", ["open", "kept"])
def test_a_killed_publisher(name, what):
    """What it had open was never sent; what it had published is delivered, and its view holds nothing up."""
    with (
        dsline.ShmChannel(name, capacity=2, slot_size=4096, timeout=TIMEOUT) as channel,
        Child("lend_and_wait", name, what) as child,
    ):
        assert child.read() == "ready"
        assert channel.stats().free_slots == 1
        if what == "kept":
            assert channel.recv_array().tolist() == [5] * 4
            assert channel.stats().free_slots == 1
        child.kill()
        wait_until(lambda: channel.check_peers() or channel.stats().deaths == 1)
        assert channel.stats().free_slots == 2
        assert len(channel) == 0
        for i in range(4):
            channel.send(bytes([i]))
            assert bytes(channel.recv()) == bytes([i])


def test_a_stopped_publisher_that_keeps_a_view(name):
    """Its one slot is not used again, and everything else goes on."""
    with (
        dsline.ShmChannel(name, capacity=3, slot_size=4096, timeout=TIMEOUT) as channel,
        Child("lend_and_wait", name, "kept") as child,
    ):
        assert child.read() == "ready"
        os.kill(child.pid, signal.SIGSTOP)
        try:
            assert channel.recv_array().tolist() == [5] * 4
            for i in range(2000):
                channel.send(i.to_bytes(4, "little"))
                assert channel.recv_bytes() == i.to_bytes(4, "little")
            assert channel.stats().free_slots == 2
            with channel.subscribe("late", start="oldest") as late:
                channel.send(b"x")
                assert late.recv_bytes() == b"x"
            channel.recv_bytes()
        finally:
            os.kill(child.pid, signal.SIGCONT)
        child.tell("go")
        child.finish()


def test_handles_with_the_flag_are_passed_on(name):
    with dsline.ShmChannel(name, capacity=4, slot_size=64, zero_copy=True, timeout=TIMEOUT) as channel:
        done = run_script(
            "import pickle, sys\n"
            "with pickle.loads(bytes.fromhex(sys.argv[1])) as channel:\n"
            "    with channel.alloc(3, 'i4', fill=4):\n"
            "        pass\n",
            pickle.dumps(channel).hex(),
        )
        assert_clean(done)
        assert channel.recv_array().tolist() == [4] * 3


STRAY = """
import ctypes, faulthandler, sys, dsline
name, zero_copy, size = sys.argv[1], {"True": True, "strict": "strict"}[sys.argv[2]], int(sys.argv[3])
channel = dsline.ShmChannel(name, zero_copy=zero_copy)
with channel.alloc(size, "u1", fill=1) as loan:
    address = loan.array.ctypes.data
    # Both ends of the array, and what lies between.
    stray = [(ctypes.c_ubyte * 1).from_address(address + at) for at in (0, size // 2, size - 1)]
print("published", flush=True)
sys.stdin.readline()
for pointer in stray[int(sys.argv[4]):]:
    pointer[0] = 66
print("written", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("size", [100, 4096, SIZE, 3 * SIZE])
def test_strict_stops_a_stray_pointer(name, size, at):
    """A pointer that was taken before the publication dies by SIGSEGV, and the message is what it was."""
    with dsline.ShmChannel(name, capacity=2, slot_size=SIZE, timeout=TIMEOUT) as channel:
        command = [sys.executable, *STRICT, "-c", STRAY, name, "strict", str(size), str(at)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as child:
            assert child.stdout.readline() == b"published\n"
            array = channel.recv_array()
            child.stdin.write(b"\n")
            child.stdin.flush()
            assert child.wait(TIMEOUT) == -signal.SIGSEGV
            assert child.stdout.read() == b""
        assert (array == 1).all()
        assert array.size == size


def test_without_strict_a_stray_pointer_writes(name):
    """What strict is for: this is not stopped without it."""
    with dsline.ShmChannel(name, capacity=2, slot_size=SIZE, timeout=TIMEOUT) as channel:
        command = [sys.executable, *STRICT, "-c", STRAY, name, "True", "100", "0"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as child:
            assert child.stdout.readline() == b"published\n"
            array = channel.recv_array()
            child.stdin.write(b"\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"written\n"
            assert array.max() == 66
            child.communicate(b"\n", timeout=TIMEOUT)


def test_a_process_that_ends_with_a_thread_that_writes(name):
    """Its slot is left to recovery, since nobody can stop the thread; nothing is torn and nothing hangs."""
    with dsline.ShmChannel(name, capacity=2, slot_size=4096, timeout=TIMEOUT) as channel:
        done = run_script(
            "import dsline, threading, sys, time\n"
            "channel = dsline.ShmChannel(sys.argv[1], zero_copy=True)\n"
            "loan = channel.alloc(4096, 'u1', fill=1)\n"
            "array = loan.array\n"
            "def write():\n"
            "    while True:\n"
            "        array[:] = 2\n"
            "threading.Thread(target=write, daemon=True).start()\n"
            "time.sleep(0.05)\n",
            name,
        )
        assert done.returncode == 0, done.stderr
        wait_until(lambda: channel.check_peers() or channel.stats().free_slots == 2)
        assert len(channel) == 0
        for i in range(4):
            channel.send(bytes([i]))
            assert channel.recv_bytes() == bytes([i])
