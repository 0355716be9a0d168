#!/usr/bin/env python3
"""Checks that every include, cimport and import goes downward, by the tables below.

``python3 tools/check_layers.py [ROOT]`` prints one line per violation and exits with 1 when there is any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# C++: what a folder of cpp/src may include beside itself: whole folders, or single headers. The words of a slot are
# numbers that the order compares and exchanges; the pool, which knows what a slot holds, is out of its reach.
VOCABULARY = frozenset({"dsline/error.hpp", "dsline/metadata.hpp"})
SUPPLIED = frozenset({"scheduled_atomic.hpp"})  # by the model checker, in its own build of the core only
CPP_LAYERS: dict[str, frozenset[str]] = {
    "base": frozenset(),
    "expressions": frozenset({"dsline/expression.hpp"}),
    "frames": frozenset({"base"}),
    "waiting": frozenset({"base"}),
    "memory": frozenset({"base", "waiting"}),
    "slots": frozenset({"base", "memory", "waiting"}),
    "order": frozenset(
        {"base", "memory", "waiting", "slots/position.hpp", "slots/claim.hpp", "slots/slot_word.hpp"}
    ),
    "delivery": frozenset({"base", "memory", "waiting", "slots", "order"}),
    "liveness": frozenset({"base", "memory", "waiting", "slots", "order", "delivery"}),
    "channel": frozenset(
        {
            "base",
            "frames",
            "memory",
            "waiting",
            "slots",
            "order",
            "delivery",
            "liveness",
            "dsline/channel.hpp",
            "dsline/build.hpp",
            "dsline/crc32c.hpp",
            "dsline/stage_words.hpp",
            "dsline/tally.hpp",
            "dsline/watch.hpp",
        }
    ),
}
NEVER_IN_CPP = re.compile(r"^(Python\.h|numpy/|pybind11/|structmember\.h)")

# Python: what a module of dsline/ may import from dsline, and which installed packages it may use. "dsline" is the
# public API, by its top-level names.
PYTHON_LAYERS: dict[str, frozenset[str]] = {
    "_interpreter": frozenset(),
    "closing": frozenset(),
    "report": frozenset(),
    "errors": frozenset({"report"}),
    "options": frozenset({"errors"}),
    "dtypes": frozenset({"errors"}),
    "specs": frozenset({"errors", "dtypes"}),
    "interop": frozenset({"errors"}),
    "objects": frozenset(),
    "pinned": frozenset({"errors"}),
    "_core": frozenset({"errors", "dtypes", "interop", "objects", "pinned", "report", "specs"}),
    "expressions": frozenset({"_core", "errors"}),
    "endpoint": frozenset({"_core", "closing", "errors", "interop", "options", "report"}),
    "groups": frozenset({"endpoint", "errors", "options", "pinned"}),
    "channel": frozenset({"_core", "endpoint", "errors", "groups", "interop", "options", "pinned", "specs"}),
    "broadcast": frozenset({"channel"}),
    "accelerate": frozenset({"_core", "errors"}),
    "rpc_server": frozenset({"_core", "closing", "broadcast", "channel", "errors"}),
    "rpc": frozenset({"_core", "closing", "broadcast", "channel", "errors", "rpc_server"}),
    "queues": frozenset({"_core", "channel", "errors"}),
    "multiprocessing": frozenset({"queues"}),
    "shared_batch": frozenset({"_core", "closing", "broadcast", "channel", "dtypes", "errors"}),
    "waiting": frozenset({"_core", "endpoint", "errors"}),
    "latest": frozenset({"_core", "closing", "broadcast", "channel", "errors", "options", "report", "specs"}),
    "__init__": frozenset(
        {
            "_interpreter",
            "_core",
            "broadcast",
            "channel",
            "dataflow",
            "errors",
            "groups",
            "latest",
            "options",
            "pinned",
            "queues",
            "report",
            "rpc",
            "rpc_server",
            "shared_batch",
            "specs",
            "waiting",
            "worker_pool",
        }
    ),
    "worker_pool": frozenset(
        {"_core", "channel", "dataflow.callables", "dataflow.processes", "dataflow.restart", "errors", "rpc"}
    ),
    "aio": frozenset({"_core", "endpoint", "errors", "waiting"}),
    "status": frozenset({"_core", "errors", "report"}),
    "testing": frozenset({"dsline", "_core", "errors"}),
    "bench": frozenset({"dsline", "errors"}),
    "dead_cli": frozenset({"cli", "dataflow", "errors"}),
    "cli": frozenset({"dsline", "bench", "dataflow", "dead_cli", "errors", "status"}),
    "__main__": frozenset({"cli"}),
}
# Modules of dsline/dataflow, from the bottom up; names without "dataflow." are modules of dsline.
# dataflow/
DATAFLOW_LAYERS: dict[str, str] = {
    "dataflow.__init__": "",
    "dataflow.callables": "errors",
    "dataflow.drawing": "errors",
    "dataflow.grouping": "",
    "dataflow.media": "errors",
    "dataflow.npy_files": "errors",
    "dataflow.operator": "specs",
    "dataflow.policies": "errors",
    "dataflow.restart": "errors",
    "dataflow.stats": "",
    "dataflow.aggregates": "dataflow.callables dataflow.grouping errors",
    "dataflow.checkpoints": "_core dataflow.npy_files errors",
    "dataflow.counters": "_core dataflow.stats errors",
    "dataflow.items": "dataflow.operator errors specs",
    "dataflow.options": "dataflow.policies dataflow.restart errors",
    "dataflow.processes": "closing dataflow.callables dataflow.restart errors",
    "dataflow.progress": "closing dataflow.stats errors",
    "dataflow.window_specs": "dataflow.callables dataflow.policies errors",
    "dataflow.descriptions": "dataflow.callables dataflow.items dataflow.operator errors specs",
    "dataflow.records": "_core dataflow.items dataflow.npy_files dataflow.operator dtypes errors objects",
    "dataflow.log": "_core closing dataflow.npy_files dataflow.operator dataflow.records errors specs",
    "dataflow.sources": "broadcast channel dataflow.callables dataflow.items dataflow.log dataflow.media dataflow.npy_files dataflow.operator endpoint errors groups options report specs status",
    "dataflow.sinks": "broadcast channel dataflow.callables dataflow.items dataflow.log dataflow.media dataflow.npy_files dataflow.operator dataflow.sources errors groups options specs",
    "dataflow.dead_letters": "_core broadcast channel dataflow.descriptions dataflow.items dataflow.log dataflow.records dataflow.sinks dataflow.sources errors status",
    "dataflow.batching": "dataflow.callables dataflow.descriptions dataflow.items dataflow.operator dataflow.operators errors specs",
    "dataflow.bench": "bench dataflow.items dataflow.pipeline errors",
    "dataflow.control": "dataflow.descriptions dataflow.plan errors",
    "dataflow.edges": "dataflow.control dataflow.counters dataflow.plan errors",
    "dataflow.merging": "dataflow.descriptions dataflow.items dataflow.operator dataflow.operators",
    "dataflow.operators": "dataflow.callables dataflow.descriptions dataflow.items dataflow.merging dataflow.operator errors expressions specs",
    "dataflow.ops": "dataflow.batching dataflow.operator dataflow.operators dataflow.sinks dataflow.sources dataflow.windows errors",
    "dataflow.plan": "dataflow.descriptions dataflow.drawing dataflow.operator dataflow.operators dataflow.options dataflow.sinks dataflow.sources dataflow.windows errors specs",
    "dataflow.chain": "dataflow.control dataflow.operator dataflow.plan dataflow.policies dataflow.runtime dataflow.sinks",
    "dataflow.pipeline": "dataflow.counters dataflow.descriptions dataflow.items dataflow.operator dataflow.operators dataflow.ops dataflow.options dataflow.plan dataflow.run dataflow.sinks dataflow.sources errors",
    "dataflow.program": "dataflow.pipeline dataflow.plan errors",
    "dataflow.runtime": "_core dataflow.chain dataflow.control dataflow.counters dataflow.dead_letters dataflow.edges dataflow.items dataflow.operator dataflow.plan dataflow.policies dataflow.sources dataflow.turns errors waiting",
    "dataflow.turns": "dataflow.control dataflow.edges dataflow.plan dataflow.runtime errors",
    "dataflow.worker": "dataflow.callables dataflow.control dataflow.runtime errors rpc",
    "dataflow.run": "_core channel dataflow.callables dataflow.checkpoints dataflow.control dataflow.counters dataflow.operator dataflow.plan dataflow.policies dataflow.processes dataflow.progress dataflow.restart dataflow.runtime dataflow.sinks dataflow.worker errors",
    "dataflow.window_steps": "dataflow.aggregates dataflow.dead_letters dataflow.grouping dataflow.operator dataflow.policies dataflow.window_specs dataflow.windows errors expressions specs",
    "dataflow.windows": "dataflow.aggregates dataflow.callables dataflow.grouping dataflow.operator dataflow.window_specs dataflow.window_steps errors specs",
}
# end of dataflow/
PYTHON_LAYERS |= {name: frozenset(known.split()) for name, known in DATAFLOW_LAYERS.items()}
PACKAGES: dict[str, frozenset[str]] = {
    "numpy": frozenset(
        {
            "accelerate",
            "_core",
            "aio",
            "dtypes",
            "expressions",
            "interop",
            "specs",
            "channel",
            "shared_batch",
            "bench",
            "testing",
            "cli",
            "dataflow",
            "dead_cli",
        }
    ),
    "click": frozenset({"cli", "dead_cli"}),
    "cloudpickle": frozenset({"dataflow.callables"}),
    "threadpoolctl": frozenset({"dataflow.processes"}),
    "tqdm": frozenset({"cli", "bench", "dataflow.progress"}),
    # Never needed: only looked for, or loaded by the user already.
    "torch": frozenset({"objects"}),
    "polars": frozenset({"objects"}),
    "pyarrow": frozenset({"dataflow.items"}),
}
# Cython declarations come from these, and from dsline._cpp.
CIMPORTS = frozenset({"libc", "libcpp", "cpython", "cython", "posix", "numpy"})

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
EXTERN = re.compile(r'^\s*cdef\s+extern\s+from\s+"([^"]+)"', re.MULTILINE)
CIMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+cimport\b|cimport\s+([\w.]+))", re.MULTILINE)
IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+import\s+([^#\n]+)|import\s+([\w.]+))", re.MULTILINE)


def cpp_violations(root: Path) -> Iterator[str]:
    source, public = root / "cpp" / "src", root / "cpp" / "include"
    for path in sorted([*source.rglob("*.?pp"), *public.rglob("*.?pp")]):
        where = path.relative_to(root)
        layer = path.relative_to(source).parts[0] if path.is_relative_to(source) else None
        if layer is not None and layer not in CPP_LAYERS:
            yield f"{where}: the folder {layer} is not in the table of tools/check_layers.py"
            continue
        for bracket, header in INCLUDE.findall(path.read_text()):
            if NEVER_IN_CPP.match(header):
                yield f"{where}: includes {header}; the core knows no Python"
            if bracket == "<":
                continue
            folder = header.partition("/")[0]
            if layer is None:
                allowed = folder == "dsline"
            else:
                allowed = (
                    folder == layer
                    or bool({folder, header} & CPP_LAYERS[layer])
                    or header in VOCABULARY | SUPPLIED
                )
            if not allowed:
                yield f'{where}: includes "{header}", which {layer or "a public header"} may not know'


def imported(text: str) -> Iterator[tuple[str, str]]:
    """(package, module of dsline or "") of every import statement of Cython or Python text."""
    for from_module, names, module in IMPORT.findall(text):
        parts = (from_module or module).split(".")
        if parts[0] != "dsline":
            yield parts[0], ""
        elif parts[1:] == ["dataflow"] and from_module:
            for name in re.findall(r"(\w+)(?:\s+as\s+\w+)?", names):
                yield "dsline", f"dataflow.{name}"
        elif len(parts) > 1:
            yield "dsline", ".".join(parts[1:3]) if parts[1] == "dataflow" else parts[1]
        elif from_module:
            for name in re.findall(r"(\w+)(?:\s+as\s+\w+)?", names):
                yield "dsline", name if name in PYTHON_LAYERS else "dsline"
        else:
            yield "dsline", "dsline"


def python_imports(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix in (".pyx", ".pxi"):
        yield from imported(re.sub(r'"""(?:.|\n)*?"""', "", path.read_text()))
        return
    package = ["dsline", *path.parent.parts[path.parent.parts.index("dsline") + 1 :]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from imported(f"import {alias.name}")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from imported(f"from {module} import {', '.join(alias.name for alias in node.names)}")


def python_violations(root: Path) -> Iterator[str]:
    package = root / "dsline"
    for path in sorted([*package.glob("*.py"), *package.glob("*.pyx"), *package.glob("dataflow/*.py")]):
        where = path.relative_to(root)
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        if module not in PYTHON_LAYERS:
            yield f"{where}: the module {module} is not in the table of tools/check_layers.py"
            continue
        for name, inner in python_imports(path):
            if name == "dsline":
                whole = inner.partition(".")[0]  # "dataflow" stands for all of its modules
                if inner != module and not {inner, whole} & PYTHON_LAYERS[module]:
                    yield f"{where}: imports {inner if inner == 'dsline' else f'dsline.{inner}'}, which {module} may not know"
            elif name in PACKAGES:
                if not {module, module.partition(".")[0]} & PACKAGES[name]:
                    yield f"{where}: imports {name}, which only {', '.join(sorted(PACKAGES[name]))} may"
            elif name not in sys.stdlib_module_names and name != "cython":
                yield f"{where}: imports {name}, which is not a dependency of dsline"


def cython_violations(root: Path) -> Iterator[str]:
    package = root / "dsline"
    headers = {path.stem for path in (root / "cpp" / "include" / "dsline").glob("*.hpp")}
    for path in sorted(package.rglob("*.p?[xd]")):
        where, text = path.relative_to(root), path.read_text()
        declares = path.parent.name == "_cpp"
        if declares and path.stem not in headers | {"__init__"}:
            yield f"{where}: no public header has this name (cpp/include/dsline/{path.stem}.hpp)"
        for header in EXTERN.findall(text):
            if not declares and header.startswith("dsline/"):
                yield f"{where}: declares {header}; that belongs in dsline/_cpp"
            if declares and not header.startswith("dsline/"):
                yield f"{where}: declares {header}, which is no public header of dsline"
        for from_module, module in CIMPORT.findall(text):
            name = from_module or module
            if (
                name.startswith("dsline._cpp")
                or name.split(".")[0] in CIMPORTS
                or (name == "" and not declares)
            ):
                continue
            yield f"{where}: cimports {name}; only dsline._cpp and {', '.join(sorted(CIMPORTS))} are open to it"


def violations(root: Path) -> list[str]:
    return [*cpp_violations(root), *python_violations(root), *cython_violations(root)]


def main() -> int:
    found = violations(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
