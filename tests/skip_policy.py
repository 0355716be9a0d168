"""A pytest plugin: a skip that ``tests/allowed_skips.txt`` does not list with its reason fails the run.

Loaded with ``-p skip_policy`` (``tools/dev.py`` does, with ``tests`` on PYTHONPATH). A line of the list is

    <node id, * standing for anything> | <text that the reason contains>
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("allowed_skips.txt")


def parse(text: str) -> list[tuple[re.Pattern[str], str]]:
    """The entries of the list; a line without a reason is an error."""
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        pattern, bar, reason = (part.strip() for part in line.partition(" | "))
        if not (pattern and bar and reason):
            raise pytest.UsageError(f"{LIST.name}:{number}: expected '<node id> | <reason>', got {line!r}")
        entries.append((re.compile(".*".join(map(re.escape, pattern.split("*")))), reason))
    return entries


def is_allowed(entries: list[tuple[re.Pattern[str], str]], nodeid: str, reason: str) -> bool:
    return any(pattern.fullmatch(nodeid) and text in reason for pattern, text in entries)


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


class SkipPolicy:
    def __init__(self, config: pytest.Config) -> None:
        self.entries = parse(LIST.read_text()) if LIST.is_file() else []
        self.refused: list[str] = []

    def look_at(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = skip_reason(report)
        if not is_allowed(self.entries, report.nodeid, reason):
            self.refused.append(f"{report.nodeid} | {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.look_at(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.look_at(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.refused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.refused:
            terminalreporter.section("skips that tests/allowed_skips.txt does not list", red=True)
            for line in self.refused:
                terminalreporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipPolicy(config), "dsline-skip-policy")
