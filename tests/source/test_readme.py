"""What README and the docs tell people to type works.

A ```` ```python ```` block runs here when the line above it is ``<!-- run -->``; each in a process of its own.
Every ``dsline`` and ``tools/dev.py`` command of a ```` ```sh ```` or ```` ```console ```` block must exist.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(
    r"^(?P<mark><!-- run -->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMANDS = re.compile(r"^(?:python3? -m dsline|dsline|python3? (?:tools|examples|bench)/\S+\.py)(?:\s|$)")


def blocks():
    for page in PAGES:
        for number, match in enumerate(FENCE.finditer(page.read_text()), 1):
            yield page.relative_to(ROOT), number, match


def runnable():
    for page, number, match in blocks():
        if match["mark"] and match["language"] == "python":
            yield pytest.param(match["body"], id=f"{page}-{number}")


def commands():
    seen = set()
    for page, _, match in blocks():
        if match["language"] not in ("sh", "console", "bash"):
            continue
        for line in match["body"].splitlines():
            line = line.strip().removeprefix("$ ").partition(" #")[0].strip()
            if COMMANDS.match(line) and line not in seen:
                seen.add(line)
                yield pytest.param(line, id=f"{page}: {line}")


def run(*command, cwd):
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, check=False
    )


def test_the_readme_has_an_example_that_runs():
    assert [block for block in runnable() if block.id.startswith("README.md")]


@pytest.mark.parametrize("code", list(runnable()))
def test_an_example_runs(tmp_path, code):
    script = tmp_path / "example.py"
    script.write_text(code)
    done = run(sys.executable, str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_exists(tmp_path, line):
    words = shlex.split(line)
    if words[0] == "dsline":
        words = ["python", "-m", "dsline", *words[1:]]
    if words[1] == "-m":
        names = []
        for word in words[3:]:
            if not re.fullmatch(r"[a-z]+", word) or len(names) == 2:
                break
            names.append(word)
        options = [word.partition("=")[0] for word in words[3:] if word.startswith("--")]
        shown = run(sys.executable, "-m", "dsline", *names, "--help", cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        assert [option for option in options if option not in shown.stdout] == []
    else:
        script = ROOT / words[1]
        assert script.is_file()
        if script.name == "dev.py" and len(words) > 2:
            assert run(sys.executable, str(script), words[2], "--help", cwd=tmp_path).returncode == 0
