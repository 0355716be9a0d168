"""Programs that use multiprocessing as everybody does, with ``import dsline.accelerate`` at the top.

``python accelerated.py <function> <JSON list of arguments>``; test_accelerate_processes.py runs them. Each ends with 0 when
everything came as it should.
"""

import concurrent.futures
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.managers
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from support import wait_until

import dsline
import dsline.accelerate as accelerate
from dsline.accelerate import stats

LARGE = 300_000


def large(number):
    """An array that says which one it is."""
    return np.arange(number, number + LARGE, dtype=np.int64)


def is_large(array, number):
    return type(array) is np.ndarray and array.flags.writeable and np.array_equal(array, large(number))


def check(condition, *what):
    if not condition:
        raise AssertionError(what)


def nothing_waits():
    wait_until(lambda: stats().waiting == 0)


# --- what runs in the children --------------------------------------------------------------------------------------


def negative(array):
    return -array


def total(array, factor=1):
    return int(array.sum()) * factor, os.getpid()


def make_large(number):
    return large(number)


def child_stats(_):
    time.sleep(0.05)
    return os.getpid(), stats().attached, stats().sent, stats().loaded


def echo(source, target):
    while (array := source.get()) is not None:
        target.put(array)
    check(stats().loaded > 0, stats())
    check(stats().sent > 0, stats())


def put_and_end(queue, number):
    queue.put(large(number))


def send_and_end(connection, number):
    connection.send(large(number))
    connection.close()


def argument(array, number, connection):
    connection.send(is_large(array, number) and stats().loaded > 0)
    connection.close()


def set_global(array):
    global given
    given = array


def sum_of_global(_):
    time.sleep(0.02)
    return int(given.sum()), os.getpid()


def nest(queue, depth, method):
    """Starts a child that starts a child …; the last one answers."""
    if depth == 0:
        queue.put((large(depth), stats().attached))
        return
    process = multiprocessing.get_context(method).Process(target=nest, args=(queue, depth - 1, method))
    process.start()
    process.join()
    check(process.exitcode == 0)


def die_in_the_middle(array):
    if array[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return int(array[0])


# --- programs -------------------------------------------------------------------------------------------------------


def queues(method):
    context = multiprocessing.get_context(method)
    for make in (context.Queue, context.SimpleQueue):
        there, back = make(), make()
        process = context.Process(target=echo, args=(there, back))
        process.start()
        for number in range(20):
            there.put(large(number))
            check(is_large(back.get(), number), number)
        there.put({"a": [large(1), large(2)], "b": np.arange(5)})
        got = back.get()
        check(is_large(got["a"][0], 1) and is_large(got["a"][1], 2) and got["b"].tolist() == [0, 1, 2, 3, 4])
        there.put(None)
        process.join()
        check(process.exitcode == 0, process.exitcode)
    nothing_waits()
    check(stats().sent == stats().loaded == 44, stats())
    check(stats().plain == 0, stats())


def pipes(method):
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=send_and_end, args=(theirs, 5))
    process.start()
    theirs.close()
    process.join()  # it has ended before anything is loaded
    check(is_large(ours.recv(), 5))
    nothing_waits()
    check(stats().loaded == 1, stats())


def process_arguments(method):
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=argument, args=(large(3), 3, theirs))
    process.start()
    check(ours.recv() or method == "fork")
    process.join()
    check(process.exitcode == 0)
    nothing_waits()


def sender_ends_first(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    processes = [context.Process(target=put_and_end, args=(queue, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    got = sorted((queue.get() for _ in processes), key=lambda array: array[0])
    check(all(is_large(array, number) for number, array in enumerate(got)))
    check(stats().loaded == 4, stats())
    nothing_waits()


def pools(method):
    context = multiprocessing.get_context(method)
    arrays = [large(number) for number in range(12)]
    with context.Pool(2, set_global, (large(7),)) as pool:
        for got in (
            pool.map(negative, arrays),
            pool.map(negative, arrays, chunksize=5),
            list(pool.imap(negative, arrays)),
            list(pool.imap(negative, arrays, chunksize=3)),
        ):
            check(all(is_large(-array, number) for number, array in enumerate(got)))
        unordered = sorted(-array[0] for array in pool.imap_unordered(negative, arrays))
        check(unordered == list(range(12)), unordered)
        sums = [one for one, _ in pool.starmap(total, [(array, 2) for array in arrays])]
        check(sums == [int(array.sum()) * 2 for array in arrays])
        check(is_large(-pool.apply(negative, (large(3),)), 3))
        check({one for one, _ in pool.map(sum_of_global, range(8))} == {int(large(7).sum())})
        results = pool.map(child_stats, range(8), chunksize=1)
        check(all(attached for _, attached, _, _ in results), results)
        check(any(sent > 0 and loaded > 0 for _, _, sent, loaded in results), results)
        pool.close()
        pool.join()
    nothing_waits()


def executors(method):
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, context, set_global, (large(7),)) as executor:
        got = list(executor.map(negative, [large(number) for number in range(8)]))
        check(all(is_large(-array, number) for number, array in enumerate(got)))
        got = list(executor.map(negative, [large(number) for number in range(8)], chunksize=3))
        check(all(is_large(-array, number) for number, array in enumerate(got)))
        check(is_large(executor.submit(make_large, 9).result(), 9))
        check(executor.submit(sum_of_global, 0).result()[0] == int(large(7).sum()))
        try:
            executor.submit(negative, None).result()
        except TypeError:
            pass
        else:
            check(False)
    check(stats().sent >= 16, stats())
    check(stats().loaded >= 17, stats())
    nothing_waits()


def generations(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=nest, args=(queue, 3, method))
    process.start()
    process.join()
    check(process.exitcode == 0)
    array, attached = queue.get()
    check(is_large(array, 0))
    check(attached)
    check(stats().loaded == 1, stats())
    nothing_waits()


def a_worker_is_killed(method):
    context = multiprocessing.get_context(method)
    arrays = [large(number) for number in range(6)]
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        futures = [executor.submit(die_in_the_middle, array) for array in arrays]
        for future in futures:
            try:
                future.result()
            except concurrent.futures.process.BrokenProcessPool:
                break
        else:
            check(False, "nobody died")
    # Those that come after go on, and what the dead have left can be dropped.
    with concurrent.futures.ProcessPoolExecutor(2, context) as executor:
        got = list(executor.map(negative, arrays))
        check(all(is_large(-array, number) for number, array in enumerate(got)))
    accelerate.reclaim(0)
    check(stats().waiting == 0, stats())


def slow(array):
    time.sleep(0.1)
    return array


def a_pool_is_terminated(method):
    context = multiprocessing.get_context(method)
    for _ in range(2):
        pool = context.Pool(2)
        result = pool.map_async(slow, [large(number) for number in range(60)], chunksize=1)
        wait_until(lambda: stats().sent >= 4)
        pool.terminate()
        pool.join()
        check(not result.ready())
    accelerate.reclaim(0)
    check(stats().waiting == 0, stats())
    before = stats().sent
    connection, other = context.Pipe()
    sender = threading.Thread(target=connection.send, args=(large(1),))
    sender.start()
    check(is_large(other.recv(), 1))
    sender.join()
    check(stats().sent == before + 1, stats())


def the_store_is_full():
    accelerate.enable(limit=16 << 20)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    for number in range(40):
        queue.put(large(number))
    for number in range(40):
        check(is_large(queue.get(), number))
    queue.close()
    queue.join_thread()
    check(stats().plain >= 1, stats())
    check(stats().sent >= 5, stats())
    check(stats().sent + stats().plain == 40, stats())
    nothing_waits()


def threads_and_forks():
    """Threads send all the time while the process forks children that send as well."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    stop = threading.Event()
    counts = [0, 0]

    def send(which):
        while not stop.is_set():
            queue.put(large(which))
            counts[which] += 1

    got = []

    def receive():
        while (array := queue.get()) is not None:
            check(is_large(array, int(array[0])))
            got.append(int(array[0]))

    receiver = threading.Thread(target=receive)
    receiver.start()
    senders = [threading.Thread(target=send, args=(which,)) for which in range(2)]
    for each in senders:
        each.start()
    connections = []
    for number in range(2, 12):
        ours, theirs = context.Pipe()
        process = context.Process(target=send_and_end, args=(theirs, number))
        process.start()
        theirs.close()
        connections.append((ours, process, number))
    for ours, process, number in connections:
        check(is_large(ours.recv(), number), number)
        process.join()
        check(process.exitcode == 0)
    stop.set()
    for each in senders:
        each.join()
    queue.put(None)
    receiver.join()
    check([got.count(0), got.count(1)] == counts, counts)
    nothing_waits()


def outside_connections():
    """A Listener's peers may be anywhere: they get whole pickles."""
    with multiprocessing.connection.Listener(family="AF_INET", address=("127.0.0.1", 0)) as listener:
        client = []
        thread = threading.Thread(
            target=lambda: client.append(multiprocessing.connection.Client(listener.address))
        )
        thread.start()
        server = listener.accept()
        thread.join()
        sender = threading.Thread(target=server.send, args=(large(1),))
        sender.start()
        check(is_large(client[0].recv(), 1))
        sender.join()
        sender = threading.Thread(target=client[0].send, args=(large(2),))
        sender.start()
        check(is_large(server.recv(), 2))
        sender.join()
        server.close()
        client[0].close()
    check(stats().sent == 0, stats())


def managers():
    """What a manager keeps it may give out as often as it likes."""
    with multiprocessing.Manager() as manager:
        kept = manager.dict()
        kept["a"] = large(4)
        for _ in range(3):
            check(is_large(kept["a"], 4))
        queue = manager.Queue()
        queue.put(large(5))
        check(is_large(queue.get(), 5))
        namespace = manager.Namespace(array=large(6))
        check(is_large(namespace.array, 6) and is_large(namespace.array, 6))
    nothing_waits()


def torch_tensors(method):
    """torch.multiprocessing has reducers of its own, for tensors; arrays beside them go through the store."""
    import torch

    context = torch.multiprocessing.get_context(method)
    there, back = context.Queue(), context.Queue()
    process = context.Process(target=echo_tensors, args=(there, back))
    process.start()
    for number in range(5):
        tensor = torch.from_numpy(large(number))
        there.put((tensor, large(number)))
        got, array = back.get()
        check(isinstance(got, torch.Tensor) and torch.equal(got, torch.from_numpy(large(number)) * 2))
        check(is_large(array, number))
        del got
    there.put(None)
    process.join()
    check(process.exitcode == 0)
    check(stats().sent == stats().loaded == 5, stats())


def echo_tensors(source, target):
    last = []
    while (pair := source.get()) is not None:
        tensor, array = pair
        tensor *= 2  # the same memory in both processes
        last.append(tensor)  # the other process opens its memory later
        target.put((tensor, array))
    target.close()
    target.join_thread()


def joblib_parallel(backend):
    """joblib has picklers of its own: nothing of it goes through the store, and nothing is lost."""
    import joblib

    for options in ({}, {"max_nbytes": None}):
        got = joblib.Parallel(n_jobs=2, backend=backend, **options)(
            joblib.delayed(negative)(large(number)) for number in range(8)
        )
        check(all(is_large(-array, number) for number, array in enumerate(got)))
    check(stats().plain == 0, stats())
    nothing_waits()


def loaded_twice():
    from multiprocessing.reduction import ForkingPickler

    pickled = bytes(ForkingPickler.dumps(large(1)))
    check(len(pickled) < 1000, len(pickled))
    check(is_large(ForkingPickler.loads(pickled), 1))
    try:
        ForkingPickler.loads(pickled)
    except dsline.SerializationError as error:
        check("loaded once" in str(error), error)
    else:
        check(False)
    dropped = ForkingPickler.dumps(large(2))
    check(accelerate.reclaim(3600) == 0)
    check(accelerate.reclaim(0) == 1)
    try:
        ForkingPickler.loads(dropped)
    except dsline.SerializationError:
        pass
    else:
        check(False)


def print_pickle():
    """Says where an array is, and waits."""
    from multiprocessing.reduction import ForkingPickler

    print(json.dumps(bytes(ForkingPickler.dumps(large(1))).hex()), flush=True)
    sys.stdin.read()


def wait_to_be_killed(method):
    """Children that keep sending, and one that does not load."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    pool = context.Pool(2)
    pool.map(negative, [large(number) for number in range(4)])
    for number in range(4):
        queue.put(large(number))
    workers = [process.pid for process in pool._pool]
    pool.map_async(slow, [large(number) for number in range(40)], chunksize=1)
    wait_until(lambda: stats().waiting >= 4)
    extra = [pid for pid in (_forkserver_pid(),) if pid]
    print(json.dumps([os.getpid(), *workers, *extra]), flush=True)
    sys.stdin.read()


def _forkserver_pid():
    from multiprocessing.forkserver import _forkserver

    return _forkserver._forkserver_pid


def a_daemon(path):
    """The process that imported it ends, its forked child goes on and starts processes of its own."""
    if os.fork() != 0:
        os._exit(0)
    wait_until(lambda: os.getppid() == 1 or not Path(f"/proc/{os.getppid()}").exists() or _is_reaped())
    try:
        queues("spawn")
        Path(path).write_text("good")
    except BaseException as error:
        Path(path).write_text(repr(error))
    os._exit(0)


_first_parent = os.getpid()


def _is_reaped():
    return os.getppid() != _first_parent


if __name__ == "__main__":
    globals()[sys.argv[1]](*json.loads(sys.argv[2]))
