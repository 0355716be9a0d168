"""The proof of the core: which programs there are, how they are run, and the page their counts are written to.

`tools/dev.py verify` runs them; CI runs their short form. Every program ends with another code than 0 when a promise was
broken or when it could not show anything, and writes its counts as one JSON object.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "verification" / "index.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


@dataclass(frozen=True)
class Proof:
    """One program. `program` is relative to the build folder (C++), or to the tree where it ends in .py."""

    name: str
    program: str
    short: tuple[str, ...] = ()
    long: tuple[str, ...] = ()
    needs_wheel: bool = False
    needs_build: bool = False  # a Python program that wants the path of a build folder of its own

    def command(self, python: Path, build: Path, json_file: Path, long: bool) -> list[str]:
        """The words to run it with."""
        words = [str(build / "tests" / "verification" / self.program)]
        if self.program.endswith(".py"):
            words = [str(python), str(ROOT / "tests" / "verification" / self.program)]
        if self.needs_build:
            words += ["--build-dir", str(build / self.name)]
        return [*words, *(self.long if long else self.short), "--json", str(json_file)]


PROOFS = (
    Proof("model", "model/run.py", ("--jobs", "1"), ("--long",), needs_build=True),
    Proof(
        "kill",
        "kill/kill_harness",
        ("--kills", "10000", "--lanes", "8"),
        ("--kills", "1000000", "--lanes", "16"),
    ),
    Proof("steps", "steps/steps_checker", (), ("--long",)),
    Proof("corruption", "robust/robust_corruption", (), ("--long",)),
    Proof("scribbler", "robust/robust_scribbler", (), ("--long",)),
    Proof("syscalls", "robust/robust_syscalls"),
    Proof("security", "robust/robust_security"),
    Proof("fuzz", "robust/fuzz.py", (), ("--long",), needs_build=True),
    Proof("soak", "robust/robust_soak", (), ("--seconds", "600")),
    Proof("python", "python_kills.py", ("--seconds", "15"), ("--seconds", "60"), needs_wheel=True),
    Proof("loans", "python_loans.py", ("--seconds", "20"), ("--seconds", "300"), needs_wheel=True),
    Proof("pipelines", "python_pipelines.py", ("--seconds", "15"), ("--seconds", "600"), needs_wheel=True),
)


def summary(result: Mapping[str, object]) -> str:
    """The counts of one program on one line."""
    words = []
    for key, value in result.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if key in ("seed", "seconds") or ":" in key:
            continue
        number = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
        words.append(f"{number} {key.replace('_', ' ')}")
    return ", ".join(words)


def record(results: Mapping[str, tuple[float, Mapping[str, object]]], long: bool) -> None:
    """Writes the counts into the page of the documentation; rows of programs that were not run stay."""
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    old, _, tail = rest.partition(END)
    rows = {
        cells[1].strip(): line
        for line in old.splitlines()
        if line.startswith("| ") and not line.startswith(("| program", "|---"))
        for cells in [line.split("|")]
    }
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    when = time.strftime("%Y-%m-%d")
    mode = "long" if long else "short"
    for name, (seconds, result) in results.items():
        rows[name] = f"| {name} | {when}, {mode}, {seconds:.0f} s, {commit} | {summary(result)} |"
    order = [proof.name for proof in PROOFS if proof.name in rows]
    table = ["| program | run | counts |", "|---|---|---|", *(rows[name] for name in order)]
    kernel = ".".join(platform.release().split(".")[:2])
    machine = f"Linux {kernel}, {platform.machine()}, Python {platform.python_version()}."
    PAGE.write_text(f"{head}{BEGIN}\n{machine}\n\n" + "\n".join(table) + f"\n{END}{tail}")


def read(json_file: Path) -> dict[str, object]:
    """The counts that a program wrote; of several records the numbers are added up."""
    text = json_file.read_text()
    loaded = json.loads(text)
    if isinstance(loaded, dict):
        return loaded
    raise ValueError(f"{json_file} does not hold one JSON object")
