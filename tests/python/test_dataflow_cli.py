"""dsline run: which pipeline it finds in a file, what it prints, and its exit codes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner

from dsline.cli import cli

PROGRAM = """
import dsline
from helpers import double

pipeline = dsline.Pipeline("doubles").source([1, 2, 3]).map(double).sink(print)
other = dsline.Pipeline("other").source(["other"]).sink(print)
number = 7


def scaled(by=2, text="x"):
    return dsline.Pipeline("scaled").source([1, 2]).map(lambda x: (x * by, text)).sink(print)


def wrong():
    return 7


def fails():
    return dsline.Pipeline("fails").source([1, 0]).map(lambda x: 1 / x, name="divide").sink(print)


def unfinished():
    return dsline.Pipeline("unfinished").source([1])


def raises():
    return dsline.nothing


def stuck(x):
    import time

    print("tick", flush=True)
    time.sleep(60)


def hangs():
    return dsline.Pipeline("hangs").source([1]).map(stuck).sink(print)


def ticks():
    import time

    while True:
        yield time.sleep(0.01) or "tick"


def endless():
    return dsline.Pipeline("endless").source(ticks).sink(lambda tick: print(tick, flush=True))


if __name__ == "__main__":
    print("this is not the main program")
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "flow.py").write_text(PROGRAM)
    (tmp_path / "helpers.py").write_text("def double(x):\n    return 2 * x\n")
    return tmp_path


def command(*arguments):
    return [sys.executable, "-m", "dsline", "run", *map(str, arguments)]


class Done:
    def __init__(self, returncode, stdout, stderr):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


@pytest.fixture(autouse=True)
def forgotten():
    """What a command has imported from a folder is not there for the next one."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name in ("flow", "helpers", "broken"):
            del sys.modules[name]


def run(folder, *arguments):
    """Run the command in this process, as if nothing had been imported for it."""
    for name in ("flow", "helpers", "broken"):
        sys.modules.pop(name, None)
    with contextlib.chdir(folder):
        result = CliRunner().invoke(cli, ["run", *map(str, arguments)])
    return Done(result.exit_code, result.stdout, result.stderr)


def run_apart(folder, *arguments):
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def failure(done):
    """The last line of stderr, of a command that failed without a traceback."""
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_variable_and_a_function_of_a_file(folder):
    done = run_apart(folder, "flow.py")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:3] == ["2", "4", "6"]
    assert lines[3].startswith("doubles: finished")
    assert any(line.split()[:4] == ["double", "-", "3", "3"] for line in lines)
    other = run(folder.parent, folder / "flow.py", "--name", "other")
    assert other.stdout.startswith("other\n")
    scaled = run(folder, "flow.py", "--name", "scaled", "--set", "by=3", "--set", "text=1 and 2")
    assert scaled.stdout.splitlines()[:2] == ["(3, '1 and 2')", "(6, '1 and 2')"]


def test_the_report_as_json(folder):
    done = run(folder, "flow.py", "--json", "--name", "scaled")
    text = done.stdout.partition("\n{")
    report = json.loads("{" + text[2])
    assert (report["name"], report["state"], report["undrained"]) == ("scaled", "finished", {})
    assert report["stats"]["stages"][1]["items_in"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--name", "missing"],
            "has no 'missing', neither a Pipeline nor a function that returns one; there are other, pipeline",
        ),
        (["--name", "number"], "'number' of flow.py is of type int"),
        (["--name", "wrong"], "wrong() of flow.py returned int"),
        (["--set", "by=3"], "'pipeline' of flow.py is a Pipeline, in which nothing can be set"),
        (["--name", "scaled", "--set", "speed=3"], "scaled() of flow.py does not take these settings"),
        (["--set", "by"], "'by' is no setting; write NAME=VALUE"),
        (["--draw", "x.png"], "--draw writes .svg, .mmd, .mermaid files"),
        (["--timeout", "soon"], "'soon' is not a time span"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command(folder, arguments, says):
    done = run(folder, "flow.py", *arguments)
    assert done.returncode == 2
    assert says in failure(done)
    assert done.stdout == ""


def test_wrong_files(folder):
    assert run(folder, "nothing.py").returncode == 2
    (folder / "notes.txt").write_text("")
    assert "neither a Python file (.py) nor a plan (.json)" in failure(run(folder, "notes.txt"))
    for name in ("json.py", "sys.py", "flow.2.py"):
        (folder / name).write_text(PROGRAM)
        done = run(folder, name)
        assert done.returncode == 2
        assert "give the file another" in failure(done)
    for text in ("[]", "{", '{"dsline_plan": 99}', '{"dsline_plan": 1, "stages": 3}'):
        (folder / "plan.json").write_text(text)
        done = run(folder, "plan.json")
        assert (done.returncode, done.stdout) == (1, "")
        assert "plan" in failure(done)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fails", r"stage 'divide': .*ZeroDivisionError: division by zero"),
        ("unfinished", r"'unfinished' ends without a sink"),
        ("raises", r"flow.py, line \d+: AttributeError: .*'nothing'"),
    ],
)
def test_a_pipeline_that_fails(folder, name, says):
    done = run(folder, "flow.py", "--name", name)
    assert done.returncode == 1
    assert re.search(says, failure(done))
    told = run(folder, "flow.py", "--name", name, "--traceback")
    assert told.returncode == 1
    assert "Traceback (most recent call last)" in told.stderr
    assert re.search(says, told.stderr.splitlines()[-1])
    assert name == "unfinished" or "flow.py" in told.stderr.partition("dsline: error")[0]


def test_a_file_that_is_no_python(folder):
    (folder / "broken.py").write_text("x = 1\ny = = 2\n")
    done = run(folder, "broken.py")
    assert done.returncode == 1
    assert re.search(r"broken.py, line 2: invalid syntax", failure(done))


def test_explain_and_draw_run_nothing(folder):
    done = run(folder, "flow.py", "--explain", "--draw", "flow.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pipeline 'doubles':")
    assert "\n2\n" not in done.stdout
    assert ET.parse(folder / "flow.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    done = run(folder, "flow.py", "--draw", "flow.mmd")
    assert (done.returncode, done.stdout) == (0, "")
    assert (folder / "flow.mmd").read_text().startswith("flowchart TD\n")


def test_a_plan(folder):
    (folder / "data.txt").write_text("")
    code = (
        "import dsline, helpers; "
        "print(dsline.Pipeline('saved').source(helpers.numbers).map(helpers.double, name='twice').sink(helpers.show).plan()"
        ".to_json())"
    )
    (folder / "helpers.py").write_text(
        "def double(x):\n    return 2 * x\n\ndef numbers():\n    return [1, 2]\n\ndef show(x):\n    print(x)\n"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["", os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    (folder / "plan.json").write_text(made.stdout)
    done = run_apart(folder.parent, folder / "plan.json")  # finds the functions beside the plan
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:2] == ["2", "4"]
    done = run(folder, "plan.json", "--set", "twice.workers=2", "--set", "memory=64MiB", "--explain")
    assert "2 worker processes" in done.stdout
    assert "at most 64 MiB" in done.stdout
    done = run(folder, "plan.json", "--set", "thrice.workers=2")
    assert done.returncode == 2
    assert "'thrice.workers' is nothing that can be set in a plan" in failure(done)
    assert run(folder, "plan.json", "--name", "saved").returncode == 2
    done = run(folder, "plan.json", "--set", "twice.workers=-1")
    assert done.returncode == 1
    assert "stage 'twice': workers is -1" in failure(done)


def test_progress_in_a_log(folder):
    done = run(folder, "flow.py", "--progress")
    assert done.returncode == 0
    assert re.fullmatch(r"doubles: \w+, 3 of 3 items in [\d.]+ s \(.*/s\)[^\r\x1b]*\n", done.stderr)
    assert run(folder, "flow.py", "--no-progress").stderr == ""


def test_a_time_limit_drains(folder):
    done = run(folder, "flow.py", "--name", "endless", "--timeout", "0.3")
    assert (done.returncode, done.stderr) == (0, "")
    ticks, _, report = done.stdout.partition("endless: ")
    assert report.startswith("stopped after")
    count = len(ticks.splitlines())
    assert count > 0
    assert ticks == "tick\n" * count
    assert re.search(rf"^ticks +- +{count} ", report, re.MULTILINE) or re.search(
        rf" {count} +{count} ", report
    )


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_once_drains_and_twice_ends(folder, presses):
    name = "endless" if presses == 1 else "hangs"
    with subprocess.Popen(
        command("flow.py", "--name", name, "--progress"),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "tick\n"
            for _ in range(presses):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    if presses == 1:
        assert "endless: stopped after" in out
    else:
        assert err.splitlines()[-1] == "dsline: error: interrupted"


def test_bench_pipeline():
    arguments = ["--count", "10", "--batch", "3", "--work", "1000", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "dsline", "bench", "pipeline", *arguments, "--json"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert (figures["count"], figures["batch"], figures["work_us"]) == (10, 3, 1000)
    assert figures["items_per_second"].keys() == {"1", "2"}
    assert all(rate > 0 for rate in figures["items_per_second"].values())
    assert figures["scaling"] == pytest.approx(
        figures["items_per_second"]["2"] / figures["items_per_second"]["1"]
    )
    assert figures["process_ns_per_item"] > 0 < figures["process_ns_per_batch"]


def test_functions_of_a_file_in_worker_processes(folder):
    """The workers import the file by its name, and not what is under __main__."""
    with (folder / "flow.py").open("a") as file:
        file.write(
            "\n\nclass Add:\n    def __init__(self, much): self.much = much\n    def __call__(self, x): return x + self.much\n\n"
            "import functools\n\n"
            "def apart():\n"
            "    made = dsline.Pipeline('apart').source([1, 2, 3]).map(functools.partial(Add, 10), workers=1)\n"
            "    return made.map(double, workers=1).sink(print)\n"
        )
    done = run_apart(folder, "flow.py", "--name", "apart")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:3] == ["22", "24", "26"]
    assert "1 of 1" in done.stdout
