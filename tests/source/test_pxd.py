"""Every C++ function that Cython knows says what it does with exceptions.

An exception that leaves a function declared without ``noexcept`` or ``except +`` ends the process.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DECLARATIONS = sorted((ROOT / "dsline" / "_cpp").glob("*.pxd"))
FUNCTION = re.compile(r"^[\w:,<>\[\]*&. ]*\b[\w]+\s*(\"[^\"]*\"\s*)?\(.*\)")
ENDING = re.compile(r"(\)|\bconst)\s+(noexcept|except \+\w*)(\s+nogil)?$")


def statements(text):
    """The statements of a .pxd about C++ headers, one per line: without comments, and without the blocks of verbatim
    code, whose functions know Python's exceptions."""
    text = re.sub(
        r'^cdef extern from \*.*\n(?:(?:[ \t].*)?\n|    """(?:.|\n)*?"""\n)*', "", text, flags=re.MULTILINE
    )
    text = re.sub(r"#.*", "", text)
    statement = ""
    for line in text.splitlines():
        statement = f"{statement} {line.strip()}".strip()
        if statement.count("(") > statement.count(")") or statement.endswith("\\"):
            statement = statement.removesuffix("\\")
            continue
        if statement:
            yield statement
        statement = ""


def bare_functions(text):
    return [
        statement
        for statement in statements(text)
        if FUNCTION.match(statement) and not statement.endswith(":") and not ENDING.search(statement)
    ]


def test_there_are_declarations():
    assert any(FUNCTION.match(line) for path in DECLARATIONS for line in statements(path.read_text()))


@pytest.mark.parametrize("path", DECLARATIONS, ids=lambda path: path.name)
def test_every_function_ends_in_noexcept_or_except_plus(path):
    assert bare_functions(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "size_t size()",
        "void close() nogil",
        "shared_ptr[CppChannel] open(const string& name,\n        int mode)",
        "int depth() except -1",
        "CppChannel(int fd)",
    ],
)
def test_a_bare_function_is_noticed(line):
    assert len(bare_functions(f"cdef extern from 'x.hpp' nogil:\n    {line}\n")) == 1
