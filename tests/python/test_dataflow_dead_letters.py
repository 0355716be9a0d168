"""Dead letters: kept with error and item, listed, shown and sent again, from logs and from channels."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from support import STRICT, TIMEOUT

import dsline
from dsline.cli import cli
from dsline.dataflow.dead_letters import failed_items, replay, write_dead_letter
from dsline.dataflow.items import Batch, same
from dsline.dataflow.log import LogReader, LogWriter
from dsline.dataflow.sources import receive_from


def fail(value):
    raise ValueError(f"bad {value}")


class Own:
    """A class that a log knows nothing of."""

    def __eq__(self, other):
        return isinstance(other, Own)

    __hash__ = None

    def __repr__(self):
        raise RuntimeError("no words for it")


def bury(path, item, stage="detect", sequence=0):
    try:
        fail(sequence)
    except ValueError as error:
        write_dead_letter(
            f"file://{path}", stage=stage, worker=1, sequence=sequence, deliveries=2, error=error, item=item
        )


ITEMS = [np.arange(5000), Batch(t=[1.5, 2.5]), {"a": 1, "b": np.arange(3)}, "text", b"bytes", None]


@pytest.fixture
def log(tmp_path):
    for number, item in enumerate(ITEMS):
        bury(tmp_path / "dead", item, sequence=10 + number)
    return f"file://{tmp_path}/dead"


def run(*arguments):
    done = CliRunner().invoke(cli, ["dead", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_letters_tell_what_happened(log):
    letters = list(failed_items(log))
    assert [letter.number for letter in letters] == list(range(6))
    first = letters[0]
    assert (first.stage, first.worker, first.sequence, first.deliveries) == ("detect", 1, 10, 2)
    assert (first.error_type, first.error) == ("builtins.ValueError", "bad 10")
    assert "in fail" in first.traceback
    assert first.traceback.endswith("ValueError: bad 10\n")
    assert first.description == "an array of 'int64' (5000,)"
    assert all(same(letter.item(), item) for letter, item in zip(letters, ITEMS, strict=True))


def test_an_item_of_any_class_takes_trust(tmp_path):
    bury(tmp_path / "dead", Own())
    bury(tmp_path / "dead", lambda: None)
    own, function = failed_items(f"file://{tmp_path}/dead")
    with pytest.raises(dsline.SerializationError, match=r"Own.*objects=True"):
        own.item()
    assert own.item(objects=True) == Own()
    with pytest.raises(dsline.SerializationError, match=r"was not kept: .*lambda"):
        function.item(objects=True)
    assert function.description.startswith("a function")


def test_what_is_replayed_is_marked(log, name, tmp_path):
    done = replay(log, f"shm://{name}", numbers=[1, 3])
    assert (done.sent, done.skipped) == ([1, 3], {})
    assert [letter.replayed for letter in failed_items(log)] == [
        None,
        f"shm://{name}",
        None,
        f"shm://{name}",
        None,
        None,
    ]
    done = replay(log, f"shm://{name}")
    assert done.sent == [0, 2, 4, 5]
    assert set(done.skipped) == {1, 3}
    assert replay(log, f"file://{tmp_path}/again", again=True).sent == list(range(6))
    with dsline.ShmChannel.open(name, timeout=5) as channel:
        got = [channel.recv_object() for _ in range(6)]
        assert same(got, [ITEMS[number] for number in (1, 3, 0, 2, 4, 5)])
        assert len(channel) == 0
    with LogReader(tmp_path / "again") as reader:
        assert same([record.item() for record in reader], ITEMS)


def test_what_cannot_be_replayed(log, tmp_path):
    for call, why in (
        (lambda: replay(log, None), "give to="),
        (lambda: replay(log, log), "give another log"),
        (lambda: replay(log, "a.npy"), "neither a channel nor a log"),
        (lambda: replay(log, f"file://{tmp_path}/x", numbers=[1, 99]), "has no dead letter 99"),
        (lambda: list(failed_items(f"file://{tmp_path}/none")), "no log"),
        (lambda: list(failed_items("tcp://x")), "no log of dead letters"),
    ):
        with pytest.raises(dsline.PipelineBuildError, match=why):
            call()
    with LogWriter(tmp_path / "other") as writer:
        writer.append({"a": 1})
    with pytest.raises(dsline.PipelineBuildError, match="is none of dead letters: record 0 is a dict"):
        list(failed_items(f"file://{tmp_path}/other"))
    bury(tmp_path / "dead", Own())
    assert "objects=True" in replay(log, f"file://{tmp_path}/x", numbers=[6]).skipped[6]
    assert replay(log, f"file://{tmp_path}/x", numbers=[6], objects=True).sent == [6]


WORKER = """
import sys
import numpy as np
from dsline.dataflow.dead_letters import write_dead_letter
for number in range(40):
    write_dead_letter(
        sys.argv[1], stage=sys.argv[2], worker=0, sequence=number, deliveries=1, error=ValueError("x"), item=np.full(30, number)
    )
"""


def test_processes_append_in_turns(tmp_path):
    uri = f"file://{tmp_path}/dead"
    children = [subprocess.Popen([sys.executable, *STRICT, "-c", WORKER, uri, stage]) for stage in "abc"]
    assert [child.wait(TIMEOUT) for child in children] == [0, 0, 0]
    letters = list(failed_items(uri))
    assert len(letters) == 120
    for stage in "abc":
        own = [letter for letter in letters if letter.stage == stage]
        assert [letter.sequence for letter in own] == list(range(40))
        assert all((letter.item() == letter.sequence).all() for letter in own)


# --- channels -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def channel(name):
    """A channel with two dead letters, an array and an object, and one message."""
    with dsline.ShmChannel(name, max_deliveries=1, timeout=5) as channel:
        channel.send(np.arange(4))
        channel.send_object({"a": 1})
        for _ in range(2):
            channel.recv_message().nack()
        channel.send(b"good")
        assert bytes(channel.recv()) == b"good"
        yield channel
        channel.unlink()


def test_letters_of_a_channel(channel, name):
    letters = []
    for letter in failed_items(f"shm://{name}"):
        letters.append(letter.asdict())
        if letter.number == 0:
            assert letter.item().tolist() == [0, 1, 2, 3]
        else:
            with pytest.raises(dsline.SerializationError, match="objects=True"):
                letter.item()
            assert letter.item(objects=True) == {"a": 1}
    assert [letter["number"] for letter in letters] == [0, 1]
    assert letters[0]["description"] == "an array of 'int64' (4,) (32 bytes)"
    assert letters[0]["error"] == f"given back; process {os.getpid()} had it last"
    assert len(list(failed_items(f"shm://{name}"))) == 2  # they stay


def test_letters_of_a_channel_go_back(channel, name):
    done = replay(f"shm://{name}", None, numbers=[1])
    assert done.sent == [1]
    assert channel.recv_object() == {"a": 1}
    assert [letter.number for letter in failed_items(f"shm://{name}")] == [0]
    with pytest.raises(dsline.PipelineBuildError, match="has no dead letter 7"):
        replay(f"shm://{name}", None, numbers=[7])


def test_letters_of_a_channel_go_elsewhere(channel, name, tmp_path):
    done = replay(f"shm://{name}", f"file://{tmp_path}/log")
    assert done.sent == [0]
    assert "objects=True" in done.skipped[1]
    assert replay(f"shm://{name}", f"file://{tmp_path}/log", objects=True).sent == [1]
    assert list(failed_items(f"shm://{name}")) == []
    with LogReader(tmp_path / "log") as reader:
        assert same([record.item() for record in reader], [np.arange(4), {"a": 1}])


def test_a_channel_that_is_not_there(name):
    with pytest.raises(dsline.ChannelNotFoundError):
        list(failed_items(f"shm://{name}"))


# --- the commands -------------------------------------------------------------------------------------------------------


def test_list(log):
    code, out, err = run("list", log)
    lines = out.splitlines()
    assert (code, err) == (0, "6 dead letters\n")
    assert lines[0].split() == ["NUMBER", "WHEN", "STAGE", "TRIES", "ERROR", "ITEM", "SENT", "AGAIN"]
    assert len(lines) == 7
    assert "ValueError: bad 10" in lines[1]
    assert "an array of 'int64' (5000,)" in lines[1]
    code, out, _ = run("list", log, "--json")
    listed = json.loads(out)
    assert [each["number"] for each in listed] == list(range(6))
    assert listed[2]["description"].startswith("a dict: {'a': 1")
    assert code == 0


def test_terminals_are_not_obeyed(tmp_path):
    bury(tmp_path / "dead", "\x1b[2J", stage="\x1b[31mred")
    for arguments in (["list"], ["show"]):
        _, out, _ = run(*arguments, tmp_path / "dead", *(["0"] if arguments == ["show"] else []))
        assert "red" in out
        assert "\x1b" not in out


def test_show(log):
    code, out, _ = run("show", log, 0)
    assert code == 0
    for part in (
        "detect, worker 1",
        "sequence 10, tried 2 times",
        "ValueError: bad 10",
        "in fail",
        "array([",
        "4999]",
    ):
        assert part in out
    assert len(out) < 3000
    code, out, _ = run("show", log, 1, "--json")
    shown = json.loads(out)
    assert "'t': array([1.5, 2.5])" in shown["item"]
    code, _, err = run("show", log, 17)
    assert code == 1
    assert "has no dead letter 17" in err


def test_replay(log, name):
    code, out, _ = run("replay", log, 1, 3, "--to", f"shm://{name}")
    assert (code, out) == (0, f"2 of 2 dead letters sent to shm://{name}\n")
    code, out, _ = run("replay", log, "--to", f"shm://{name}", "--json")
    assert json.loads(out)["sent"] == [0, 2, 4, 5]
    code, out, err = run("replay", log, 1, "--to", f"shm://{name}")
    assert code == 1
    assert "not sent 1: was sent to" in out
    assert "nothing was sent" in err
    assert run("list", log)[1].count(f"shm://{name}") == 6
    code, _, err = run("replay", log)
    assert code == 1
    assert "give to=" in err
    with dsline.ShmChannel.open(name) as channel:
        channel._core_send_control(16, b"", 1)
        assert len(list(receive_from(channel))) == 6


def test_commands_on_a_channel(channel, name):
    code, out, err = run("list", f"shm://{name}")
    assert (code, err) == (0, "2 dead letters\n")
    assert "given back" in out
    assert "array([0, 1, 2, 3])" in run("show", f"shm://{name}", 0)[1]
    assert run("replay", f"shm://{name}")[1] == "2 of 2 dead letters sent to their group\n"
    assert channel.recv_array().tolist() == [0, 1, 2, 3]
    assert run("list", f"shm://{name}")[2] == "1 dead letter\n" or channel.recv_object() == {"a": 1}
