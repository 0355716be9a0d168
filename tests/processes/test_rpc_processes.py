"""Calls between processes, and who dies in the middle of them."""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import time

import numpy as np
import pytest
from support import TIMEOUT, Child, wait_until

import dsline

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def helpers():
    """The helper processes of multiprocessing live as long as pytest: their pipes are nobody's leak."""
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()


@pytest.fixture
def serve(name):
    started = []

    def serve(**options):
        server = Child("serve_calls", name, options)
        started.append(server)
        assert server.read() == "ready"
        return server

    yield serve
    for server in started:
        with server:
            pass
    if any(each.name == name for each in dsline.status.list_channels()):
        dsline.status.remove(name, force=True)


def stats(server):
    server.tell("stats")
    return server.read()


def executions(path):
    return path.read_text().splitlines() if path.exists() else []


def test_calls_between_processes(serve, name):
    server = serve()
    with dsline.Rpc(name, timeout=TIMEOUT) as client:
        assert client.pid() == server.pid
        array = np.arange(500_000)
        np.testing.assert_array_equal(client.double(array), array * 2)
    server.tell()
    server.finish()
    assert name not in [each.name for each in dsline.status.list_channels()]


def test_another_server_gets_the_request_of_a_dead_one(serve, name, tmp_path):
    pids = {serve().pid, serve().pid}
    with dsline.Rpc(name, timeout=TIMEOUT) as client:
        answer = client.die(str(tmp_path / "log"), 1)
    killed, survivor = map(int, executions(tmp_path / "log"))
    assert {killed, survivor} == pids
    assert answer == survivor


def test_what_is_not_idempotent_is_not_executed_twice(serve, name, tmp_path):
    servers = [serve(idempotent=False) for _ in range(2)]
    with dsline.Rpc(name, timeout=TIMEOUT) as client:
        with pytest.raises(dsline.PeerDiedError, match="not to be executed twice"):
            client.die(str(tmp_path / "log"), 1)
        (killed,) = map(int, executions(tmp_path / "log"))
        (survivor,) = [server for server in servers if server.pid != killed]
        assert client.pid() == survivor.pid
        wait_until(lambda: stats(survivor)["refused"] == 1)


def test_a_request_that_kills_every_server_stops_at_max_deliveries(serve, name, tmp_path):
    servers = [serve(max_deliveries=2) for _ in range(3)]
    with dsline.Rpc(name, timeout=TIMEOUT) as client:
        with pytest.raises(dsline.PeerDiedError, match=r"2 servers of .* died over it"):
            client.die(str(tmp_path / "log"), 100)
        killed = {int(each) for each in executions(tmp_path / "log")}
        assert len(killed) == 2
        (survivor,) = {server.pid for server in servers} - killed
        assert client.pid() == survivor


def test_the_caller_hears_that_the_only_server_has_died(serve, name, tmp_path):
    server = serve()
    log = tmp_path / "log"
    with dsline.Rpc(name) as client:  # without a timeout: it is not by time that it is noticed
        held = client.submit("hold", str(log))
        wait_until(lambda: executions(log))
        waiting = [client.submit("append", str(log), "late") for _ in range(5)]
        server.kill()
        begin = time.monotonic()
        for future in (held, *waiting):
            with pytest.raises(dsline.PeerDiedError):
                future.result(TIMEOUT)
        with pytest.raises(dsline.PeerDiedError):
            client.pid()
        assert time.monotonic() - begin < TIMEOUT
        # What the caller was told to have failed is not done by the next server. The same client goes on with it.
        other = serve()
        assert client.pid() == other.pid
        assert executions(log) == [str(server.pid)]
        wait_until(lambda: stats(other)["answered"] == 1)


def test_a_client_that_is_killed_leaves_nothing(serve, name, tmp_path):
    server = serve(workers=2)
    log = tmp_path / "log"
    with dsline.Rpc(name, timeout=TIMEOUT) as client:
        with Child("call_without_end", name) as other:
            assert other.read() == "ready"
            wait_until(lambda: stats(server)["answered"] > 20)
            other.kill()
        client.append(str(log), "one")
        wait_until(lambda: stats(server)["clients"] == 1)
        for number in range(50):
            np.testing.assert_array_equal(client.double(np.full(100_000, number)), number * 2)
        assert executions(log) == ["one"]


def test_requests_of_a_dead_client_are_not_executed(serve, name, tmp_path):
    server = serve()
    log = tmp_path / "log"
    with Child("call_and_wait", name, str(log)) as other:
        assert other.read() == 11
        other.kill()
    # The request that its server holds keeps the others waiting; the next server gets them all.
    server.kill()
    following = serve()
    wait_until(lambda: stats(following)["orphaned"] == 11)
    assert executions(log) == [str(server.pid)]
    with dsline.Rpc(name, timeout=TIMEOUT) as client:
        assert client.pid() == following.pid


def call_from_child(client, connection):
    connection.send((client.echo([1, 2]), client.double(np.ones(50_000)).sum()))
    client.close()
    connection.close()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_client_goes_to_other_processes(serve, name, method):
    serve()
    context = multiprocessing.get_context(method)
    with dsline.Rpc(name, timeout=TIMEOUT) as client:
        ours, theirs = context.Pipe()
        process = context.Process(target=call_from_child, args=(client, theirs))
        process.start()
        theirs.close()
        assert ours.recv() == ([1, 2], 100_000.0)
        ours.close()
        process.join(TIMEOUT)
        assert process.exitcode == 0
        process.close()
        assert client.echo(3) == 3


def test_servers_are_killed_one_after_the_other_under_load(serve, name):
    """Every call has one answer, the right one, while servers die and others take their place."""
    servers = [serve(workers=2, max_deliveries=14) for _ in range(2)]
    with dsline.Rpc(name, timeout=TIMEOUT) as client:
        number = 0
        for _ in range(5):
            futures = []
            for _ in range(40):
                futures.append((number, client.submit("echo", np.full(20_000, number))))
                number += 1
            servers.append(serve(workers=2, max_deliveries=14))
            servers.pop(0).kill()
            for wanted, future in futures:
                assert (future.result() == wanted).all()
        assert number == 200
