"""Calls between a client and a server of one process; deaths are in processes/test_rpc_processes.py."""

import concurrent.futures
import pickle
import threading
import time

import numpy as np
import pytest
from support import TIMEOUT, forked, wait_until

import dsline


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class NeedsTwo(Exception):
    """Pickles, and cannot be unpickled: its class takes two arguments, its args hold one."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


class Arithmetic:
    """Offered as an object."""

    factor = 3

    def times(self, number):
        return number * self.factor

    def _hidden(self):
        raise AssertionError


def raise_it(error):
    raise error


def raise_unpicklable():
    raise Unpicklable("with a lock")


def raise_needs_two():
    raise NeedsTwo("a", "b")


def leave():
    raise SystemExit(3)


class Gate:
    """A function that waits until it is told."""

    def __init__(self):
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()
        self.calls = []

    def __call__(self, number=0):
        self.calls.append(number)
        self.entered.release()
        assert self.opened.wait(TIMEOUT)
        return number


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


FUNCTIONS = {
    "add": lambda a, b=1: a + b,
    "total": lambda array: float(array.sum()),
    "double": lambda array: array * 2,
    "same": lambda value: value,
    "writable": lambda array: array.flags.writeable,
    "raise_it": raise_it,
    "raise_unpicklable": raise_unpicklable,
    "raise_needs_two": raise_needs_two,
    "leave": leave,
    "lambda": lambda: lambda: None,
}


@pytest.fixture
def serve(name):
    opened = []

    def serve(functions=FUNCTIONS, **options):
        server = dsline.RpcServer(name, functions, **options)
        opened.append(server)
        return server.start()

    yield serve
    for server in opened:
        server.close()


@pytest.fixture
def connect(name):
    opened = []

    def connect(**options):
        client = dsline.Rpc(name, **{"timeout": TIMEOUT, **options})
        opened.append(client)
        return client

    yield connect
    for client in opened:
        client.close()


# --- calls ----------------------------------------------------------------------------------------------------------


def test_a_call_brings_the_result(serve, connect):
    serve()
    client = connect()
    assert client.call("add", 1, 2) == 3
    assert client.call("add", 1) == 2
    assert client.call("add", a=1, b=5) == 6
    assert client.add(2, b=2) == 4
    assert client.call("same", None) is None


def test_arrays_go_both_ways(serve, connect):
    serve()
    client = connect()
    array = np.arange(300_000.0)
    assert client.total(array) == array.sum()
    got = client.double(array)
    np.testing.assert_array_equal(got, array * 2)
    assert got.flags.writeable
    got = client.call("same", {"frame": array, "more": [array[:5], "x"]})
    np.testing.assert_array_equal(got["frame"], array)
    np.testing.assert_array_equal(got["more"][0], array[:5])
    assert not got["frame"].flags.writeable, "as the array was that the function returned"


def test_arguments_are_views_or_copies(serve, connect, name):
    server = serve()
    client = connect()
    assert client.writable(np.zeros(100_000)) is False
    server.close()
    serve(copy=True)
    assert client.writable(np.zeros(100_000)) is True


def test_a_function_may_keep_its_arguments(serve, connect):
    kept = []
    serve({"keep": kept.append}, capacity=4)
    client = connect()
    for number in range(3):
        client.keep(np.full(100_000, number))
    assert [int(array[0]) for array in kept] == [0, 1, 2]
    client.keep(None)
    kept.clear()
    for _ in range(10):
        client.keep(None)


def test_many_requests_under_way_and_many_clients(serve, connect):
    serve(workers=3)
    clients = [connect() for _ in range(3)]
    futures = [
        (client.submit("add", number, which * 1000), number + which * 1000)
        for number in range(200)
        for which, client in enumerate(clients)
    ]
    for future, wanted in futures:
        assert future.result(TIMEOUT) == wanted
    assert all(client.late == 0 for client in clients)


def test_threads_share_a_client(serve, connect):
    serve(workers=2)
    client = connect()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: client.add(number, 1), range(400))) == list(range(1, 401))


def test_futures_are_those_of_the_standard_library(serve, connect):
    serve()
    client = connect()
    futures = [client.submit("add", number, 0) for number in range(5)]
    done, _ = concurrent.futures.wait(futures, TIMEOUT)
    assert sorted(future.result() for future in done) == list(range(5))
    told = []
    future = client.submit("add", 1, 1)
    future.add_done_callback(lambda each: told.append(each.result()))
    wait_until(lambda: told == [2])


def test_an_object_and_register_and_a_decorator(serve, connect):
    server = serve(Arithmetic())
    client = connect()
    assert client.times(4) == 12
    server.register(len, "length")

    @server.register
    def shout(text):
        return text.upper()

    assert client.length([1, 2]) == 2
    assert client.shout("a") == "A"
    assert shout("b") == "B"
    with pytest.raises(dsline.RpcError, match=r"no function '_hidden'; it has length, shout, times"):
        client.call("_hidden")


def test_two_servers_share_the_requests(serve, connect, gate):
    serve({"wait": gate})
    serve({"wait": gate})
    client = connect()
    futures = [client.submit("wait", number) for number in range(2)]
    for _ in range(2):
        assert gate.entered.acquire(timeout=TIMEOUT)
    gate.opened.set()
    assert [future.result(TIMEOUT) for future in futures] == [0, 1]


def test_a_call_of_a_function_that_calls(name, serve, connect):
    serve({"outer": lambda: 0, "inner": lambda: 7}, workers=2)
    client = connect()
    server = serve({"inner": lambda: 7, "outer": lambda: client.call("inner") + 1}, workers=2)
    assert server is not None
    assert {client.outer() for _ in range(20)} <= {0, 8}


# --- errors ---------------------------------------------------------------------------------------------------------


def test_an_error_comes_with_the_traceback_of_the_server(serve, connect):
    server = serve()
    client = connect()
    with pytest.raises(KeyError, match="nothing") as caught:
        client.raise_it(KeyError("nothing"))
    assert "in raise_it" in str(caught.value.__cause__)
    assert "raise error" in str(caught.value.__cause__)
    with pytest.raises(TimeoutError) as caught:
        client.raise_it(TimeoutError("the function's own"))
    assert not isinstance(caught.value, dsline.RpcTimeoutError)
    wait_until(lambda: server.stats().failed == 2)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("raise_unpicklable", "Unpicklable: with a lock"),
        ("raise_needs_two", "NeedsTwo: a b"),
        ("leave", "SystemExit: 3"),
    ],
)
def test_an_error_that_cannot_be_brought_over_comes_as_text(serve, connect, function, text):
    serve()
    client = connect()
    with pytest.raises(dsline.RpcError, match=text) as caught:
        client.call(function)
    if function != "leave":
        assert f"in {function}" in str(caught.value.__cause__)
    assert client.add(1) == 2


def test_a_result_that_cannot_be_pickled(serve, connect):
    serve()
    with pytest.raises(dsline.SerializationError, match="the result, a function, cannot be pickled"):
        connect().call("lambda")


def test_arguments_that_cannot_be_pickled_send_nothing(serve, connect, name):
    server = serve()
    client = connect()
    with pytest.raises(dsline.SerializationError, match="nothing was sent"):
        client.submit("add", lambda: None)
    assert client.add(1) == 2
    wait_until(lambda: server.stats().answered == 1)


def test_a_result_that_is_too_large(serve, connect):
    serve()
    client = connect(slot_size=1000, max_message_size=100_000)
    with pytest.raises(dsline.MessageTooLargeError, match="100000"):
        client.double(np.zeros(50_000))
    assert client.double(np.zeros(500)).sum() == 0


def test_arguments_that_are_too_large(serve, connect):
    serve(slot_size=1000, max_message_size=100_000)
    client = connect()
    with pytest.raises(dsline.MessageTooLargeError, match="100000"):
        client.double(np.zeros(50_000))
    assert client.add(1) == 2


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda name: dsline.Rpc(3), TypeError, "name"),
        (lambda name: dsline.Rpc(name, timeout=-1), ValueError, "timeout"),
        (lambda name: dsline.Rpc(name, timeout="1"), TypeError, "timeout"),
        (lambda name: dsline.RpcServer(name, workers=0), ValueError, "workers"),
        (lambda name: dsline.RpcServer(name, max_deliveries=15), ValueError, "max_deliveries"),
        (lambda name: dsline.RpcServer(name, {"a": 3}), TypeError, "callable"),
        (lambda name: dsline.RpcServer("../x"), ValueError, "name"),
    ],
)
def test_bad_arguments(name, call, error, match):
    with pytest.raises(error, match=match):
        call(name)


def test_bad_arguments_of_calls(serve, connect):
    serve()
    client = connect()
    with pytest.raises(TypeError, match="function is a int"):
        client.submit(3)
    with pytest.raises(ValueError, match="timeout"):
        client.call("add", 1, timeout=-1)
    with pytest.raises(AttributeError):
        client._private  # noqa: B018


# --- time, cancelling ------------------------------------------------------------------------------------------------


def test_no_answer_in_time(serve, connect, gate):
    serve({"wait": gate})
    client = connect()
    with pytest.raises(dsline.RpcTimeoutError, match=r"within 0\.05 s; a server has it"):
        client.call("wait", 1, timeout=0.05)
    with pytest.raises(TimeoutError, match="no server had taken it"):
        client.call("wait", 2, timeout=0.05)
    gate.opened.set()
    wait_until(lambda: client.late == 1)  # the answer of the first one
    assert client.call("wait", 3) == 3
    assert gate.calls == [1, 3]


def test_cancel_works_until_a_server_takes_the_request(serve, connect, gate):
    serve({"wait": gate})
    client = connect()
    first, second = client.submit("wait", 1), client.submit("wait", 2)
    assert gate.entered.acquire(timeout=TIMEOUT)
    assert not first.cancel()
    assert second.cancel()
    assert second.cancel()
    assert second.cancelled()
    done, _ = concurrent.futures.wait([second], TIMEOUT)
    assert done
    with pytest.raises(concurrent.futures.CancelledError):
        second.result()
    gate.opened.set()
    assert first.result(TIMEOUT) == 1
    assert not first.cancel()
    assert client.call("wait", 3) == 3
    assert gate.calls == [1, 3]


def test_servers_that_take_no_requests(name, connect, gate):
    with dsline.RpcServer(name, {"wait": gate}, capacity=2):
        client = connect(timeout=0.3)
        futures = [client.submit("wait")]
        assert gate.entered.acquire(timeout=TIMEOUT)
        futures.append(client.submit("wait"))
        with pytest.raises(dsline.RpcTimeoutError, match="take no requests"):
            client.submit("wait")
        gate.opened.set()
        for future in futures:
            assert future.result(TIMEOUT) == 0


# --- ends -----------------------------------------------------------------------------------------------------------


def test_without_a_server(name):
    begin = time.monotonic()
    with pytest.raises(dsline.PeerDiedError, match=f"no server of '{name}' is alive"):
        dsline.Rpc(name, wait=0)
    assert time.monotonic() - begin < TIMEOUT


def test_a_client_waits_for_a_server(name, serve):
    clients = []
    thread = threading.Thread(target=lambda: clients.append(dsline.Rpc(name, wait=TIMEOUT)))
    thread.start()
    serve()
    thread.join()
    with clients[0] as client:
        assert client.add(1) == 2


def test_requests_that_nobody_took_end_with_the_last_server(serve, connect, gate):
    server = serve({"wait": gate})
    client = connect()
    first, second = client.submit("wait", 1), client.submit("wait", 2)
    assert gate.entered.acquire(timeout=TIMEOUT)
    closing = threading.Thread(target=server.close)
    closing.start()
    wait_until(lambda: server._closing.is_set())
    gate.opened.set()
    closing.join()
    assert first.result(TIMEOUT) == 1, "what was begun is finished"
    with pytest.raises(dsline.ChannelClosedError, match="was not executed"):
        second.result(TIMEOUT)
    assert gate.calls == [1]
    with pytest.raises(dsline.ChannelClosedError, match="the last server"):
        client.call("wait", 3)


def test_the_next_server_is_found_by_the_same_client(serve, connect):
    server = serve()
    client = connect()
    assert client.add(1) == 2
    server.close()
    serve({"add": lambda a: a + 100})
    assert client.add(1) == 101


def test_one_of_two_servers_closes(serve, connect):
    first, second = serve(), serve()
    client = connect()
    first.close()
    assert [client.add(number) for number in range(20)] == list(range(1, 21))
    wait_until(lambda: second.stats().answered >= 1)


def test_closing_a_client_ends_what_it_waits_for(serve, connect, gate):
    server = serve({"wait": gate})
    client = connect()
    first, second = client.submit("wait", 1), client.submit("wait", 2)
    assert gate.entered.acquire(timeout=TIMEOUT)
    client.close()
    client.close()
    for future in (first, second):
        with pytest.raises(dsline.ChannelClosedError, match="client was closed"):
            future.result(TIMEOUT)
    with pytest.raises(dsline.ChannelClosedError, match=r"client of .* is closed"):
        client.call("wait")
    gate.opened.set()
    wait_until(lambda: server.stats().undelivered + server.stats().answered == 1)
    assert gate.calls == [1]


def test_a_client_that_nobody_has_ends(serve, connect, name):
    serve()
    client = dsline.Rpc(name)
    assert client.add(1) == 2
    thread = client._thread
    del client
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_closing_twice_and_calling_after(serve, name):
    server = serve()
    server.close()
    server.close()
    with pytest.raises(dsline.ChannelClosedError, match="make another one"):
        server.start()
    assert name not in [each.name for each in dsline.status.list_channels()]


def test_serve_forever_ends_by_close(name, connect):
    server = dsline.RpcServer(name, FUNCTIONS)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    client = connect()
    assert client.add(1) == 2
    server.close()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_a_forked_child_calls_by_itself(serve, connect):
    serve()
    client = connect()
    assert client.add(1) == 2

    def child():
        assert client.add(2) == 3
        assert client.submit("total", np.ones(100_000)).result(TIMEOUT) == 100_000
        client.close()

    forked(child)
    assert client.add(3) == 4


def test_representations(serve, connect, name):
    server = serve()
    client = connect()
    assert repr(server) == f"<dsline.RpcServer '{name}': 10 functions>"
    assert repr(client) == f"<dsline.Rpc '{name}': 0 under way>"
    client.close()
    server.close()
    assert "closed" in repr(client)
    assert "closed" in repr(server)


def test_a_client_can_be_pickled(serve, connect):
    serve()
    client = connect(timeout=7.5, capacity=8)
    with pickle.loads(pickle.dumps(client)) as other:
        assert other.add(1) == 2
        assert other._timeout == 7.5
        assert other._replies.capacity == 8
