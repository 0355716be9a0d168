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
