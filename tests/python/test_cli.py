"""The command line: output, exit codes, and nothing on stdout but the result."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import dsline
from dsline.cli import cli

SEGMENTS = Path(f"/dev/shm/dsline-{os.geteuid()}")


def run(*arguments, **options):
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dsline", *arguments], capture_output=True, text=True, timeout=60, **options
    )


def invoke(*arguments):
    """Run the command line in this process."""
    return CliRunner().invoke(cli, arguments)


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dsline {dsline.__version__}\n", "")


def test_info_json_is_json_alone():
    done = run("info", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["version"] == dsline.__version__
    assert {"shm", "memfd", "heap"} <= set(report["storage"])
    assert report["shared_memory"]["size_bytes"] >= report["shared_memory"]["free_bytes"] > 0
    assert report["limits"]["slots"] == 1 << 20
    assert report["crc32c"] != "unknown"


def test_info_text_tells_the_same():
    done = invoke("info")
    assert done.exit_code == 0
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if not line.startswith(" "))
    assert lines["dsline"].strip() == dsline.__version__
    assert "/dev/shm" in lines["shared memory"]


def test_info_lists_a_live_channel_and_leaves_it_alone():
    name = f"cli-{os.getpid()}-{secrets.token_hex(4)}"
    with dsline.ShmChannel.create(name, capacity=4, slot_size=64) as channel:
        channel.send(b"kept")
        listed = {entry["name"]: entry for entry in json.loads(run("info", "--json").stdout)["channels"]}
        assert listed[name]["state"] == "in use"
        assert listed[name]["size_bytes"] >= listed[name]["reserved_bytes"] > 0
        assert f"  {name}: in use" in invoke("info").stdout
        assert channel.recv_bytes(timeout=0) == b"kept"
        channel.unlink()
    assert name not in run("info").stdout


def test_info_leaves_out_what_is_no_channel():
    SEGMENTS.mkdir(mode=0o700, exist_ok=True)
    foreign = SEGMENTS / f"cli-{os.getpid()}-folder"
    pipe = SEGMENTS / f"cli-{os.getpid()}-pipe"
    foreign.mkdir()
    os.mkfifo(pipe)
    try:
        listed = {entry["name"] for entry in json.loads(run("info", "--json").stdout)["channels"]}
        assert listed.isdisjoint({foreign.name, pipe.name})
    finally:
        foreign.rmdir()
        pipe.unlink()


def test_bench_json_is_json_alone():
    done = run("bench", "shm", "--message-size", "64", "--count", "500", "--latency-count", "10", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["message_size"], report["count"], report["round_trip"]["count"]) == (64, 500, 10)
    assert report["messages_per_second"] > 0


@pytest.mark.parametrize("path", ["recv", "recv_bytes", "recv_into", "recv_array"])
def test_bench_text_says_which_path_it_measured(path):
    done = invoke(
        "bench", "shm", "--message-size", "64", "--count", "200", "--latency-count", "5", "--path", path
    )
    assert done.exit_code == 0
    assert dsline.bench.DATA_PATHS[path] in done.stdout
    assert "messages/s" in done.stdout
    assert "p99.9" in done.stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [("300", 300), ("1KiB", 1024), ("1kB", 1000), ("2 k", 2000), ("1Mi", 1 << 20), ("12B", 12)],
)
def test_sizes_take_suffixes(text, size):
    done = invoke("bench", "shm", "--message-size", text, "--count", "20", "--latency-count", "0", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["message_size"] == size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "shm", "--message-size", "12XB"], "'12XB' is not a size"),
        (["bench", "shm", "--message-size", "0"], "must be from 1 to 1073741824"),
        (["bench", "shm", "--message-size", "2GiB"], "2147483648 bytes"),
        (["bench", "shm", "--message-size", "-5"], "'-5' is not a size"),
        (["bench", "shm", "--count", "0"], "0 is not in the range"),
        (["bench", "shm", "--count", "many"], "'many'"),
        (["bench", "shm", "--path", "recv_all"], "recv_all"),
        (["bench", "shm", "--slots", "0"], "0 is not in the range"),
        (["bench", "nothing"], "nothing"),
        (["completion", "tcsh"], "tcsh"),
        (["--wrong"], "--wrong"),
    ],
)
def test_a_wrong_command_exits_with_2(arguments, words):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dsline: error: ")
    assert words in last


def test_a_failure_exits_with_1_and_one_line():
    one_cpu = {min(os.sched_getaffinity(0))}
    command = [sys.executable, "-c"]
    command += [f"import os; os.sched_setaffinity(0, {one_cpu}); from dsline.cli import cli; cli()"]
    done = subprocess.run([*command, "bench", "shm", "--pin"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "dsline: error: pinning needs 2 CPUs, this process may run on 1 only; run without pinning"
    ]


def consumer_of(process):
    """Return the PID of a benchmark's consumer, once it has mapped the channel."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                # Until it has started its program, the child shows the maps of the parent.
                started = b"_consumer_main" in Path(f"/proc/{child}/cmdline").read_bytes()
                if started and f"{SEGMENTS}/bench-{process.pid}-" in Path(f"/proc/{child}/maps").read_text():
                    return int(child)
    raise AssertionError("the benchmark did not start its consumer")


def test_ctrl_c_exits_with_130_and_leaves_nothing():
    command = [sys.executable, "-m", "dsline", "bench", "shm", "--count", "1000000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            consumer = consumer_of(process)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", "\ndsline: error: interrupted\n")
    assert not Path(f"/proc/{consumer}").exists()
    assert list(SEGMENTS.glob(f"bench-{process.pid}-*")) == []


def test_a_reader_that_leaves_is_no_traceback():
    command = [sys.executable, "-m", "dsline", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert (process.wait(30), err) == (1, "")


def test_progress_is_drawn_on_a_terminal_only():
    primary, secondary = os.openpty()
    termios.tcsetwinsize(secondary, (24, 80))
    command = [
        sys.executable,
        "-m",
        "dsline",
        "bench",
        "shm",
        "--message-size",
        "64",
        "--count",
        "500",
        "--json",
    ]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=secondary, text=True, timeout=60)
        drawn = os.read(primary, 65536).decode()
    finally:
        os.close(primary)
        os.close(secondary)
    assert done.returncode == 0
    assert json.loads(done.stdout)["count"] == 500
    assert "messages" in drawn


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell):
    done = run("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_DSLINE_COMPLETE={shell}_complete" in done.stdout


def test_completion_completes():
    environment = {
        **os.environ,
        "_DSLINE_COMPLETE": "bash_complete",
        "COMP_WORDS": "dsline bench shm --path recv_",
        "COMP_CWORD": "4",
    }
    done = run(env=environment)
    assert [line.split(",")[1] for line in done.stdout.split()] == ["recv_array", "recv_bytes", "recv_into"]


# --- channels ----------------------------------------------------------------------------------------------------


@pytest.fixture
def channel():
    """A channel with a group whose name has a control character, which no terminal may get to see."""
    name = f"cli-{os.getpid()}-{secrets.token_hex(4)}"
    with (
        dsline.ShmChannel.create(name, capacity=4, slot_size=64) as channel,
        channel.subscribe("red\x1b[31m", start="oldest") as subscriber,
    ):
        channel.send_many([b"1", b"2"])
        held = subscriber.recv()
        yield channel
        del held
        channel.unlink()


@pytest.fixture
def only(monkeypatch):
    """Let the commands see the channels of these names only."""
    return lambda *names: monkeypatch.setattr(dsline._core, "list_names", lambda: list(names))


def leave(name, messages=1):
    """A channel whose process has ended without a word."""
    source = f"""
import os
import dsline
channel = dsline.ShmChannel({name!r})
for _ in range({messages}):
    channel.send(b"x")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60)


def test_shm_list(channel, only):
    done = run("shm", "list", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = {each["name"]: each for each in json.loads(done.stdout)}[channel.name]
    assert (found["state"], found["waiting"], found["alive"], found["dead"]) == ("in use", 2, 2, 0)
    only(channel.name)
    heading, line = invoke("shm", "list").stdout.splitlines()
    assert heading.split() == ["NAME", "STATE", "WAITING", "HANDLES", "GROUPS", "MEMORY"]
    assert line.startswith(f"{channel.name}  in use  2 of 4")
    assert "2 alive" in line
    assert "red?[31m" in line
    only()
    assert len(invoke("shm", "list").stdout.splitlines()) == 1


def test_shm_list_shows_what_is_unreadable(channel, only):
    broken = SEGMENTS / f"{channel.name}-broken"
    broken.write_bytes(b"no channel")
    try:
        only(broken.name)
        assert "unreadable" in invoke("shm", "list").stdout
    finally:
        broken.unlink()


def test_shm_inspect(channel):
    done = run("shm", "inspect", channel.name, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["name"], report["capacity"], report["free_slots"]) == (channel.name, 4, 2)
    assert [peer["held"] for peer in report["participants"]] == [0, 1]
    assert report["slots"][0]["holders"][0]["group"] == "red\x1b[31m"
    text = invoke("shm", "inspect", channel.name).stdout
    assert "\x1b" not in text
    for words in (
        f"channel:  {channel.path} (shm)",
        "slots:    4: 2 free, 0 being written, 2 with a message (1 held), 0 damaged",
        f"pid {os.getpid()} (",
        "group 'red?[31m', holds 1 for",
        "1: red?[31m, 1 members, lag 1, 1 held",
        "PINNED 0, written by 0, held by 1 for 'red?[31m' for",
        "COMMITTED 1",
    ):
        assert words in text


def test_shm_inspect_takes_a_path(tmp_path):
    with dsline.FileChannel.create(tmp_path / "queue", capacity=2, sync="data"):
        text = invoke("shm", "inspect", str(tmp_path / "queue")).stdout
    assert "(file)" in text
    assert "written to the disk" in text


def test_why(channel):
    done = run("why", channel.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"channel '{channel.name}' goes on: 2 messages wait")
    assert json.loads(invoke("why", channel.name, "--json").stdout)["name"] == channel.name


def test_shm_cleanup_is_a_dry_run_without_yes(channel, only):
    left, full = f"{channel.name}-left", f"{channel.name}-full"
    leave(left, messages=0)
    leave(full)
    only(channel.name, left, full)
    done = invoke("shm", "cleanup")
    assert done.exit_code == 0
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(lines) == {f"keep {channel.name}", f"would remove {left}", f"keep {full}"}
    assert "--yes" in done.stderr
    assert (SEGMENTS / left).exists()
    report = json.loads(invoke("shm", "cleanup", "--json").stdout)
    assert report["dry_run"] is True
    assert {each["name"]: each["action"] for each in report["channels"]}[left] == "remove"
    assert (SEGMENTS / left).exists()

    assert f"removed {left}:" in invoke("shm", "cleanup", "--yes").stdout
    assert not (SEGMENTS / left).exists()
    only(channel.name, full)
    assert f"keep {full}" in invoke("shm", "cleanup", "--older-than", "1h", "--yes").stdout
    assert f"removed {full}" in invoke("shm", "cleanup", "--older-than", "0s", "--yes").stdout
    assert not (SEGMENTS / full).exists()
    assert channel.recv_bytes(timeout=0) == b"1", "what is in use is left alone"


def test_shm_cleanup_recovers_the_dead_of_what_is_in_use(channel, only):
    only(channel.name)
    leave(channel.name, messages=0)
    assert f"would recover {channel.name}" in invoke("shm", "cleanup").stdout
    assert channel.inspect().dead == 1
    assert f"recovered {channel.name}" in invoke("shm", "cleanup", "--yes").stdout
    assert channel.inspect().dead == 0


def test_shm_remove(channel):
    left = f"{channel.name}-left"
    leave(left)
    done = run("shm", "remove", left)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dsline: error: 1 message waits in channel")
    assert len(done.stderr.splitlines()) == 1
    assert invoke("shm", "remove", left, "--force").stdout == f"removed {left}\n"
    done = run("shm", "remove", channel.name, "--force")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"in use by pid {os.getpid()}" in done.stderr
    assert (SEGMENTS / channel.name).exists()
    leave(left)
    assert json.loads(invoke("shm", "remove", left, "--force", "--json").stdout) == {"removed": left}


@pytest.mark.parametrize(
    "arguments",
    [("shm", "inspect"), ("shm", "remove"), ("why",)],
)
def test_an_absent_channel_is_one_line(arguments):
    done = run(*arguments, "absent-channel")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("dsline: error: ")
    assert "absent-channel" in done.stderr


@pytest.mark.parametrize("age", ["soon", "-1", "1w"])
def test_a_wrong_age_is_wrong_usage(age):
    done = invoke("shm", "cleanup", "--older-than", age)
    assert done.exit_code == 2
    assert "is not a time span" in done.stderr
