"""What child processes of the tests run: ``python children.py <function> <JSON list of arguments>``.

Reports are lines of JSON on standard output; `read_word` waits for a line of the parent.
"""

import gc
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from support import check_proof, proof

import dsline


def report(value):
    print(json.dumps(value), flush=True)


def read_word():
    return sys.stdin.readline().strip()


def wait_for_ever():
    sys.stdin.read()


# --- calls ----------------------------------------------------------------------------------------------------------


def _append(path, text):
    """One line, whole, also when several processes write."""
    with open(path, "a") as file:
        file.write(f"{text}\n")


def _executions(path):
    return len(Path(path).read_text().splitlines()) if Path(path).exists() else 0


def _die(path, most):
    """Kills its process, until it has killed `most`."""
    _append(path, os.getpid())
    if _executions(path) <= most:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def _hold(path):
    _append(path, os.getpid())
    time.sleep(60)


def serve_calls(name, options):
    functions = {
        "pid": os.getpid,
        "die": _die,
        "hold": _hold,
        "append": _append,
        "double": lambda array: array * 2,
        "echo": lambda value: value,
    }
    server = dsline.RpcServer(name, functions, **options).start()
    report("ready")
    while read_word() == "stats":
        stats = server.stats()
        clients = len(server._replies._open)
        report({**stats.__dict__, "clients": clients})
    server.close()


def call_and_wait(name, path):
    """A request that a server holds, and many that wait."""
    client = dsline.Rpc(name, timeout=30)
    futures = [client.submit("hold", path)]
    while not _executions(path):
        time.sleep(0.001)
    futures += [client.submit("append", path, "late") for _ in range(10)]
    report(len(futures))
    wait_for_ever()


def call_without_end(name):
    """Calls with arrays, there and back, until it is killed."""
    client = dsline.Rpc(name, timeout=30)
    report("ready")
    number = 0
    while True:
        futures = [client.submit("double", np.full(100_000, number)) for _ in range(8)]
        assert all((future.result(30) == 2 * number).all() for future in futures)
        number += 1


# --- programs ---------------------------------------------------------------------------------------------------


def send_proofs(name, producer, first, count, words=16):
    """Send, then wait to be told, or killed."""
    with dsline.ShmChannel(name, timeout=30) as channel:
        for number in range(first, first + count):
            assert channel.send(proof(producer, number, words))
        report(f"sent {count}")
        read_word()


def send_proofs_and_leave(name, producer, first, count, words=16):
    with dsline.ShmChannel(name, timeout=30) as channel:
        for number in range(first, first + count):
            assert channel.send(proof(producer, number, words))


def receive_proofs(name):
    """Receive until the channel ends; report who sent what."""
    with dsline.ShmChannel(name, timeout=30) as channel:
        report("ready")
        report([check_proof(view) for view in channel])


def keep_all(name, stop_after):
    """Keep every array that comes; then report how they look, and how many are copies."""
    warnings.simplefilter("ignore", dsline.PinnedViewsWarning)
    with dsline.ShmChannel.open(name, timeout=30) as channel:
        report("ready")
        kept = []
        while True:
            try:
                kept.append(channel.recv_array())
            except dsline.ChannelClosedError:
                break
            if len(kept) == stop_after:
                break
        report([[check_proof(array) for array in kept], channel.stats().forced_copies])
        read_word()
        report([check_proof(array) for array in kept])
        del kept


def take_and_hold(name):
    """Take a message and keep it until killed."""
    with dsline.ShmChannel(name, timeout=30) as channel:
        view = channel.recv()
        report("holds")
        wait_for_ever()
        del view


def idle_with_channel(name):
    with dsline.ShmChannel(name, timeout=30):
        report("open")
        wait_for_ever()


def hold_as_subscriber(name):
    """The only member of a group, with a message in its hands, until killed."""
    with (
        dsline.Broadcast(name, timeout=30) as channel,
        channel.subscribe("one", max_pinned="unlimited") as subscriber,
    ):
        report("subscribed")
        read_word()
        view = subscriber.recv()
        report("holds")
        wait_for_ever()
        del view


def watch_and_end(name, how):
    """End with a watch armed, and with the thread asleep on it."""
    channel = dsline.ShmChannel(name, timeout=30)
    channel.fileno()
    report("watches")
    read_word()
    if how == "os._exit":
        os._exit(3)
    if how == "exception":
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        raise RuntimeError
    sys.exit(0)


def proven_record(step):
    """A record whose fields prove each other."""
    return {"frame": np.full((64, 96), step % 251, "u1"), "step": step, "half": step / 2}


def send_records(name, first):
    """Send records without an end, to be killed; first show that another spec is refused."""
    try:
        dsline.ShmChannel(name, spec=dsline.ArraySpec((3,), "f4"))
    except dsline.SchemaMismatchError as error:
        report(str(error))
    with dsline.ShmChannel(name, timeout=30) as channel:
        report(sorted(channel.spec))
        step = first
        while True:
            channel.send(proven_record(step))
            step += 1


def echo(there, back):
    """Send back twice of what comes, until the channel ends."""
    with dsline.ShmChannel(there, timeout=30) as inbox, dsline.ShmChannel(back) as outbox:
        for view in inbox:
            outbox.send(np.asarray(view) * 2)


def hold(name, count=1):
    """Take messages and keep them."""
    channel = dsline.ShmChannel.open(name, timeout=30)
    messages = [channel.recv_message() for _ in range(count)]
    report([message.sequence for message in messages])
    wait_for_ever()


def take_and_wait(name):
    channel = dsline.ShmChannel.open(name, timeout=30)
    channel.recv_bytes()
    report("taken")
    wait_for_ever()


def hold_file(path, count):
    channel = dsline.FileChannel.open(path, timeout=30)
    messages = [channel.recv_message() for _ in range(count)]
    report([message.sequence for message in messages])
    wait_for_ever()


def echo_file(there, back):
    with dsline.FileChannel.open(there, timeout=30) as inbox, dsline.FileChannel.open(back) as outbox:
        for view in inbox:
            outbox.send(np.asarray(view) * 2)


def wait_in_recv(name):
    channel = dsline.ShmChannel.open(name)
    report("waiting")
    channel.recv(timeout=None)


def wait_in_send(name):
    channel = dsline.ShmChannel.open(name)
    report("waiting")
    channel.send(b"never", timeout=None)


def send_and_log(name, log, producer, words):
    """Send until killed; the log's first 8 bytes say how many sends have returned."""
    with (
        open(log, "r+b") as file,
        mmap.mmap(file.fileno(), 8) as returned,
        dsline.ShmChannel.open(name) as channel,
    ):
        report("ready")
        number = 0
        while True:
            channel.send(proof(producer, number, words))
            number += 1
            struct.pack_into("<Q", returned, 0, number)


def receive_and_log(name, log):
    """Receive until killed; append what was received before giving it back."""
    with open(log, "ab", buffering=0) as file, dsline.ShmChannel.open(name) as channel:
        report("ready")
        while True:
            message = channel.recv_message()
            _, number = check_proof(message.array())
            file.write(struct.pack("<QB", number, message.redelivered))
            message.release()


def receive_and_log_all(name, log):
    with open(log, "ab", buffering=0) as file, dsline.ShmChannel.open(name) as channel:
        report("ready")
        while True:
            message = channel.recv_message()
            file.write(struct.pack("<QQ", *check_proof(message.array())))
            message.release()


def open_when_told(name):
    report("ready")
    read_word()
    with dsline.ShmChannel(name, capacity=8, slot_size=64) as channel:
        channel.send(b"%d" % os.getpid())
        report(channel._core_uuid())
        read_word()


def fork_and_hold(name):
    """Hold a message and have a forked child that lives on with what it inherited."""
    channel = dsline.ShmChannel.open(name, timeout=30)
    message = channel.recv_message()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)  # until the parent's end is closed, by its death or by the test's
        os._exit(0)
    report([message.sequence, child])
    wait_for_ever()


def queue_and_end(path, count, how):
    """Leave `count` messages in a file channel."""
    channel = dsline.FileChannel.open(path)
    for number in range(count):
        channel.send(proof(7, number), meta={"number": number})
    report("sent")
    if how == "close":
        channel.close()
    elif how == "exit":
        os._exit(0)
    else:
        wait_for_ever()


def subscribe_and_do_nothing(kind, name, group, durable=False):
    subscriber = getattr(dsline, kind).open(name).subscribe(group, durable=durable)
    report(subscriber.group)
    wait_for_ever()


def subscribe_and_hold(kind, name, group, count, on_death="redeliver"):
    """Take messages of a group and keep them."""
    subscriber = (
        getattr(dsline, kind).open(name).subscribe(group, start="oldest", on_death=on_death, timeout=30)
    )
    report("ready")
    messages = [subscriber.recv_message() for _ in range(count)]
    report([message.sequence for message in messages])
    wait_for_ever()


def view_when_told(name, group):
    """At each word, report the sequences of what is there, and what was lost so far."""
    with dsline.Broadcast.open(name) as channel, channel.subscribe(group) as subscriber:
        report("ready")
        while read_word():
            sequences = []
            while True:
                try:
                    sequences.append(subscriber.recv_with_seq(timeout=0)[0])
                except dsline.BufferEmptyError:
                    break
            report([sequences, subscriber.lost])


def view_all(name, group):
    """Receive until the channel ends; report the proofs and whether any came again."""
    with (
        dsline.Broadcast.open(name, timeout=30) as channel,
        channel.subscribe(group, start="oldest") as viewer,
    ):
        report("ready")
        got = []
        while True:
            try:
                message = viewer.recv_message()
            except dsline.ChannelClosedError:
                break
            with message:
                got.append([*check_proof(message.array()), message.redelivered])
        report(got)


def view_and_log(name, group, log):
    """Receive until killed; append what was received before giving it back."""
    with open(log, "ab", buffering=0) as file, dsline.Broadcast.open(name) as channel:
        subscriber = channel.subscribe(group, start="oldest", durable=True)
        report("ready")
        while True:
            message = subscriber.recv_message()
            _, number = check_proof(message.array())
            file.write(struct.pack("<QB", number, message.redelivered))
            message.release()


def set_for_ever(name, words):
    """Overwrite a cell until killed."""
    with dsline.Latest(name) as cell:
        report("ready")
        number = 0
        while True:
            cell.set(proof(1, number, words))
            number += 1


# --- targets of multiprocessing ---------------------------------------------------------------------------------


def double_what_comes(inbox, outbox):
    for view in inbox:
        outbox.send(np.asarray(view) * 2, timeout=30)
    del view
    inbox.close()
    outbox.close()


def receive_of_group(subscriber, connection):
    connection.send("ready")
    connection.send([check_proof(view) for view in subscriber])
    connection.close()
    subscriber.close()


def set_and_wait(cell, connection):
    """Answer each value of a cell by one more."""
    value, sequence = cell.wait_newer(timeout=30)
    cell.set(np.asarray(value) + 1)
    connection.send(sequence)
    connection.close()


def send_numbers(channel, first, count):
    for number in range(first, first + count):
        channel.send(proof(1, number), timeout=30)


def tell_settings(channel, connection):
    connection.send((channel.backpressure.value, channel.timeout, channel.capacity, channel.slot_size))
    connection.close()


def receive_and_report(channel, connection):
    connection.send([check_proof(view) for view in channel])
    connection.close()


def receive_handle(connection):
    channel = connection.recv()
    channel.send(b"from the child")
    channel.close()


def hold_and_end(channel, connection):
    """End in order with a view in hand, as children of multiprocessing do: by os._exit."""
    view = channel.recv(timeout=30)
    connection.send(bytes(view))


def threads_in_child(channel, count):
    threads = [threading.Thread(target=channel.send, args=(b"%d" % number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def lend(name, count, zero_copy):
    """Publish arrays that grow, the last of which stays in view until the parent says so."""
    with dsline.ShmChannel(name, zero_copy=zero_copy, timeout=30) as channel:
        for number in range(count):
            with channel.alloc(1000 * (number + 1), np.int32) as loan:
                kept = loan.array
                kept[:] = number
        del loan
        report("sent")
        read_word()
        assert set(kept.tolist()) == {count - 1}
        del kept
        report("dropped")


def lend_and_wait(name, what):
    """Keep an open loan, or the array of a published one."""
    with dsline.ShmChannel(name, zero_copy=True, timeout=30) as channel:
        loan = channel.alloc(4, np.int32, fill=5)
        array = loan.array
        if what == "kept":
            loan.publish()
        report("ready")
        read_word()
        assert array.tolist() == [5] * 4


if __name__ == "__main__":
    function = globals()[sys.argv[1]]
    function(*json.loads(sys.argv[2]))
    gc.collect()
