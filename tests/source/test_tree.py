"""Rules of the tree that no compiler knows."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
THIS = Path(__file__).resolve()
BUILD_FILES = sorted(
    [*ROOT.glob("*.toml"), *ROOT.glob("meson.*"), *ROOT.glob("[cdtb]*/**/meson.build"), ROOT / "tools/dev.py"]
)
CORE = sorted(path for folder in ("cpp", "dsline") for path in (ROOT / folder).rglob("*") if path.is_file())
WRITTEN = sorted(
    path
    for folder in ("cpp", "dsline", "tests", "bench", "examples", "docs", "tools")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".pyi", ".pyx", ".pxd", ".hpp", ".cpp", ".md", ".build", ".txt"}
    and path != THIS
)


def relative(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def text_of(path):
    return path.read_text() if path.suffix not in {".pyc", ".so"} else ""


def test_nothing_is_compiled_for_the_building_machine_only():
    native = [path for path in (*BUILD_FILES, *CORE) if re.search(r"-m(arch|tune|cpu)=native", text_of(path))]
    assert relative(native) == []


def test_no_file_names_a_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(work|root)/")
    assert relative(path for path in WRITTEN if pattern.search(path.read_text())) == []


def prints(path):
    if path.suffix == ".pyx":
        return re.findall(r"^\s*print\(.*", path.read_text(), re.MULTILINE)
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_the_package_prints_only_on_the_command_line():
    modules = [*(ROOT / "dsline").rglob("*.py"), *(ROOT / "dsline").rglob("*.pyx")]
    assert modules
    assert (
        relative(path for path in modules if path.name not in ("cli.py", "__main__.py") and prints(path))
        == []
    )


def test_the_core_writes_to_no_stream():
    sources = [path for path in (ROOT / "cpp").rglob("*") if path.suffix in (".hpp", ".cpp")]
    assert sources
    pattern = re.compile(r"std::(cout|cerr|clog)\b|\b(printf|puts|perror)\s*\(|<iostream>")
    assert relative(path for path in sources if pattern.search(path.read_text())) == []


@pytest.mark.parametrize(
    ("build_file", "pattern"),
    [
        ("cpp/meson.build", "src/*/*.cpp"),
        ("cpp/meson.build", "include/dsline/*.hpp"),
        ("dsline/meson.build", "*.py"),
        ("dsline/meson.build", "*.pyi"),
        ("dsline/meson.build", "*.pxd"),
        ("dsline/meson.build", "*.pyx"),
        ("dsline/meson.build", "_cpp/*.pxd"),
        ("tests/cpp/meson.build", "*/*_test.cpp"),
    ],
)
def test_the_build_lists_every_file(build_file, pattern):
    folder = (ROOT / build_file).parent
    there = {str(path.relative_to(folder)) for path in folder.glob(pattern)}
    assert there, f"no {pattern} in {folder}"
    listed = set(re.findall(r"'([^']+)'", (ROOT / build_file).read_text()))
    assert there - listed == set()


def test_every_skip_that_ci_accepts_has_a_test():
    for line in (ROOT / "tests" / "allowed_skips.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            nodeid = line.partition(" | ")[0].strip()
            file, _, name = nodeid.partition("::")
            assert (ROOT / file).is_file(), line
            function = re.match(r"\w*", name.rpartition("::")[2])[0]
            assert function in (ROOT / file).read_text(), line
