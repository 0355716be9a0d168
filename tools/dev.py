#!/usr/bin/env python3
"""One command for every chore: ``python3 tools/dev.py test | verify | example | bench | lint | format``.

Needs Python 3.11 or newer and a C++20 compiler; everything else is installed into virtual environments under
``build/`` (GoogleTest through apt where this runs as root on Debian, otherwise from ``subprojects/gtest.wrap``).

The tests run against the package as a user gets it: an sdist is made from the files that git knows, a wheel is
built from the sdist, and pytest imports the installed wheel from a folder outside the tree.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import verification

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LOGS = BUILD / "logs"
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
JOBS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
PYTHONS = ("3.11", "3.12", "3.13")
MAIN_PYTHON = PYTHONS[0]
OLDEST_NUMPY = "1.23.5"
# The first Python runs all tests, the others those that look into the interpreter or hang on how it starts processes.
PYTHON_TESTS = tuple(
    f"tests/python/test_{name}.py"
    for name in (
        *(
            "accelerate",
            "aio",
            "buffers",
            "callables",
            "downstream",
            "dtypes",
            "errors",
            "interpreters",
            "lifetime",
            "loans",
        ),
        *("messages", "objects", "pinned", "queues", "rpc", "signals", "smoke", "threads"),
    )
)
PROCESS_TESTS = tuple(
    f"tests/processes/test_{name}.py"
    for name in (
        *("cpython_queues", "dataflow_out", "fork", "loans_processes", "queues_processes", "start_methods"),
        *("worker_pool", "worker_processes"),
    )
)
STEP_SECONDS = 900
TEST_SECONDS = 120
SANITIZERS = {"cpp": "none", "asan": "address,undefined", "tsan": "thread"}
GROUPS = (*SANITIZERS, "verify", "python", "processes", "source", "lint", "sdist", "downstream")
PIP = ("-m", "pip", "--disable-pip-version-check")
INSTALLING: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
EXAMPLES = {name: f"examples/{name}/{name}.py" for name in ("images", "sensors", "video", "workers")}
IN_EVERY_WHEEL = ("py.typed", "_core.pyi", "_core.pxd", "include/dsline/error.hpp")


class StepFailed(Exception):
    """The step did not succeed; the text says why."""


class StepSkipped(Exception):
    """The step cannot run on this machine; the text says why."""


def unavailable(reason: str) -> Exception:
    """A missing tool is a failure in CI and a loud skip elsewhere."""
    return StepFailed(reason) if IN_CI else StepSkipped(reason)


# --- running commands ---------------------------------------------------------------------------------------


class Shell:
    """Runs the commands of one step, into the step's log (or straight to the terminal when verbose)."""

    live: ClassVar[set[subprocess.Popen[bytes]]] = set()

    def __init__(self, step: str, verbose: bool, seconds: float = STEP_SECONDS) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{step}.log"
        self.log.write_bytes(b"")
        self.verbose = verbose
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    def __call__(
        self,
        *command: str | Path,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        check: bool = True,
    ) -> tuple[int, str]:
        """Runs `command`; returns its exit code and what it wrote."""
        words = [str(word) for word in command]
        start = self.log.stat().st_size
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    words,
                    cwd=cwd,
                    env={**os.environ, **(env or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except FileNotFoundError:
                raise StepFailed(f"{words[0]} is not installed") from None
            self.live.add(process)
            try:
                code = process.wait(timeout=max(1.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                kill_group(process)
                raise StepFailed(f"took more than {self.seconds:.0f} s: {' '.join(words)}") from None
            finally:
                self.live.discard(process)
        with self.log.open("rb") as log:
            log.seek(start)
            output = log.read().decode(errors="replace")
        if self.verbose:
            print(output, end="", flush=True)
        if check and code != 0:
            raise StepFailed(f"exit code {code} from {' '.join([Path(words[0]).name, *words[1:3]])}")
        return code, output


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- what a machine may lack --------------------------------------------------------------------------------


def find_python(version: str) -> Path | None:
    """An interpreter of that version that starts: this one, one on PATH, or one of pyenv's."""
    candidates = [sys.executable] if sys.version_info[:2] == tuple(map(int, version.split("."))) else []
    candidates += [found for found in [shutil.which(f"python{version}")] if found]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python{version}"), reverse=True)]
    for candidate in candidates:
        probe = subprocess.run(
            [candidate, "-c", "import sys, venv; print(sys.executable)"],
            capture_output=True,
            text=True,
            check=False,
        )
        if probe.returncode == 0:
            return Path(probe.stdout.strip())
    return None


def apt_install(run: Shell, *packages: str) -> bool:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    install = ("apt-get", "install", "-y", "--no-install-recommends", *packages)
    with INSTALLING["apt"]:
        if run(*install, env=env, check=False)[0] == 0:
            return True
        run("apt-get", "update", env=env, check=False)
        return run(*install, env=env, check=False)[0] == 0


def compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name.split()[0]
    raise StepFailed("no C++ compiler found; install g++ 12 or newer, or name one in CXX")


def has_gtest(run: Shell) -> bool:
    words = ["-E", "-x", "c++", "-include", "gtest/gtest.h", "/dev/null", "-o", "/dev/null"]
    return run(compiler(), *words, check=False)[0] == 0


def make_venv(run: Shell, name: str, python: Path, *requirements: str) -> Path:
    """The virtual environment build/venv/`name`, made anew when its interpreter or requirements changed."""
    folder = BUILD / "venv" / name
    stamp = folder / "requirements.txt"
    wanted = "\n".join([str(python), *requirements])
    with INSTALLING[name]:
        if stamp.is_file() and stamp.read_text() == wanted:
            return folder / "bin" / "python"
        shutil.rmtree(folder, ignore_errors=True)
        if run(python, "-m", "venv", folder, check=False)[0] != 0:
            if not apt_install(run, "python3-venv", "python3-dev"):
                raise StepFailed(f"{python} has no venv module (on Debian: apt install python3-venv)")
            run(python, "-m", "venv", folder)
        run(folder / "bin" / "python", *PIP, "install", *requirements)
        stamp.write_text(wanted)
    return folder / "bin" / "python"


def requirements(*extras: str) -> list[str]:
    """What pyproject.toml says that dsline needs to run, and for the extras."""
    import tomllib  # not at the top: main() has a better word for an interpreter without it

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        *project["dependencies"],
        *(line for extra in extras for line in project["optional-dependencies"][extra]),
    ]


def install_wheel(run: Shell, python: Path, wheel: Path) -> Path:
    """Puts the wheel into the environment of `python`, in place of the one before."""
    stamp = python.parent.parent / "wheel.txt"
    if not stamp.is_file() or stamp.read_text() != str(wheel):
        run(python, *PIP, "install", "--no-deps", "--force-reinstall", wheel)
        run(python, *PIP, "check")
        stamp.write_text(str(wheel))
    return python


def base_python() -> Path:
    for version in PYTHONS:
        if found := find_python(version):
            return found
    return Path(sys.executable)


# --- building -----------------------------------------------------------------------------------------------


def project_files() -> list[Path]:
    """What a commit of the present tree would hold."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listing = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        names = [Path(os.fsdecode(name)) for name in listing.stdout.split(b"\0") if name]
    else:
        ignored = {"build", "dist", "__pycache__", ".venv"}
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [name for name in names if not ignored & set(name.parts)]
    return sorted({name for name in names if (ROOT / name).is_file()})


def source_key() -> str:
    """Changes when anything that a wheel is made of changes."""
    digest = hashlib.sha256()
    for name in project_files():
        if name.parts[0] in ("cpp", "dsline") or len(name.parts) == 1:
            digest.update(str(name).encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def copy_tree(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for name in project_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def build_sdist(run: Shell) -> str:
    """An sdist of the present tree in build/sdist (a folder with the sources where there is no git)."""
    out = BUILD / "sdist"
    shutil.rmtree(out, ignore_errors=True)
    tree = BUILD / "tree"
    copy_tree(tree)
    if shutil.which("git") is None:
        raise unavailable("git is missing, and meson makes an sdist from a git tree only")
    git = ("git", "-c", "user.name=dsline", "-c", "user.email=dsline@localhost", "-c", "commit.gpgsign=false")
    run(*git, "init", "-q", cwd=tree)
    run(*git, "add", "-A", cwd=tree)
    run(*git, "commit", "-q", "-m", "snapshot", cwd=tree)
    python = make_venv(run, "tools", base_python(), *TOOL_REQUIREMENTS)
    run(python, "-m", "build", "--sdist", "--outdir", out, tree)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    missing = [
        str(name) for name in project_files() if str(name) not in names and not str(name).startswith(".")
    ]
    if missing:
        raise StepFailed(f"the sdist lacks {', '.join(missing)}")
    return f"{archive.name}, {archive.stat().st_size // 1024} KiB"


def build_wheel(run: Shell, version: str) -> Path:
    """The wheel for one Python, built from the sdist (from the plain sources where no sdist could be made)."""
    python = find_python(version)
    if python is None:
        raise StepSkipped(f"Python {version} is neither on PATH nor among pyenv's versions")
    out = BUILD / "wheels" / f"{source_key()}-{version}"
    if not list(out.glob("*.whl")):
        shutil.rmtree(out, ignore_errors=True)
        source = next((BUILD / "sdist").glob("*.tar.gz"), BUILD / "tree")
        pip = make_venv(run, f"pip-{version}", python, "pip")
        run(pip, *PIP, "wheel", "--no-deps", "-w", out, source)
    (wheel,) = out.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = [name for name in IN_EVERY_WHEEL if f"dsline/{name}" not in names]
    if missing:
        raise StepFailed(f"{wheel.name} lacks {', '.join(missing)}; list them in dsline/meson.build")
    strangers = sorted(name for name in names if not name.startswith(("dsline/", "dsline-")))
    if strangers:
        raise StepFailed(f"{wheel.name} would install {', '.join(strangers[:5])} outside dsline/")
    return wheel


def wheel_for(version: str) -> Path:
    (wheel,) = (BUILD / "wheels" / f"{source_key()}-{version}").glob("*.whl")
    return wheel


TOOL_REQUIREMENTS = ("meson>=1.4", "ninja", "build")


def build_cpp(run: Shell, kind: str) -> str:
    """The C++ library and its tests in build/cpp-`kind`, warnings being errors."""
    sanitize = SANITIZERS[kind]
    if not has_gtest(run):
        apt_install(run, "libgtest-dev")
    if sanitize != "none":
        empty = LOGS / "empty.cpp"
        empty.write_text("int main() { return 0; }\n")
        code, _ = run(compiler(), f"-fsanitize={sanitize}", empty, "-o", LOGS / f"empty-{kind}", check=False)
        if code != 0:
            raise unavailable(f"{compiler()} cannot link with -fsanitize={sanitize}")
    python = make_venv(run, "tools", base_python(), *TOOL_REQUIREMENTS)
    env = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    folder = BUILD / f"cpp-{kind}"
    options = [
        "--werror",
        "-Dbuildtype=debugoptimized",
        f"-Doptimization={2 if sanitize == 'none' else 1}",
        "-Dcpp_args=-g1",
        "-Dpython=disabled",
        "-Dtests=enabled",
        f"-Dbench={'enabled' if kind == 'cpp' else 'disabled'}",
        f"-Db_sanitize={sanitize}",
        f"-Db_lundef={'true' if sanitize == 'none' else 'false'}",
    ]
    again = ["--reconfigure"] if (folder / "build.ninja").is_file() else []
    code, output = run("meson", "setup", *again, folder, *options, env=env, check=False)
    if code != 0:
        if not has_gtest(run) and "gtest" in output:
            raise unavailable(
                "GoogleTest is not installed (Debian: libgtest-dev) and could not be downloaded"
            )
        raise StepFailed("meson setup failed")
    run("ninja", "-C", folder, "-j", str(JOBS), "-k", "0", env=env)
    return ""


def test_cpp(run: Shell, kind: str) -> str:
    python = make_venv(run, "tools", base_python(), *TOOL_REQUIREMENTS)
    env = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:abort_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:die_after_fork=0",
        "MESON_TESTTHREADS": str(JOBS),
    }
    # An address space laid out at random may collide with the shadow memory of older ThreadSanitizer run times.
    plain_layout = ["setarch", os.uname().machine, "-R"] if kind == "tsan" and shutil.which("setarch") else []
    _, output = run(
        *plain_layout,
        "meson",
        "test",
        "-C",
        BUILD / f"cpp-{kind}",
        "--no-rebuild",
        "--print-errorlogs",
        "--timeout-multiplier",
        "1" if kind == "cpp" else "4",
        env=env,
    )
    passed = re.search(r"^Ok:\s+(\d+)", output, re.MULTILINE)
    if passed is None or passed[1] == "0":
        raise StepFailed("no C++ test ran")
    return f"{passed[1]} executables"


# --- the proof ----------------------------------------------------------------------------------------------

VERIFY_BUILD = BUILD / "cpp-verify"
VERIFY_SECONDS = {False: STEP_SECONDS, True: 6 * 3600}


def build_verification(run: Shell) -> str:
    """The programs of tests/verification, optimised as a wheel is."""
    if not any(shutil.which(name) for name in ("clang++", "clang++-14")):
        apt_install(
            run, "clang", "libclang-rt-14-dev"
        )  # libFuzzer; without it the fuzz targets have a driver of their own
    python = make_venv(run, "tools", base_python(), *TOOL_REQUIREMENTS)
    env = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    options = [
        "--werror",
        "-Dbuildtype=debugoptimized",
        "-Dcpp_args=-g1",
        "-Dpython=disabled",
        "-Dverification=enabled",
    ]
    again = ["--reconfigure"] if (VERIFY_BUILD / "build.ninja").is_file() else []
    run("meson", "setup", *again, VERIFY_BUILD, *options, env=env)
    run("ninja", "-C", VERIFY_BUILD, "-j", str(JOBS), "-k", "0", env=env)
    return ""


def verify(run: Shell, proof: verification.Proof, long: bool = False) -> str:
    """One program of the proof: its counts."""
    python = installed(run, MAIN_PYTHON) if proof.needs_wheel else base_python()
    where = BUILD / "verification"
    where.mkdir(parents=True, exist_ok=True)
    results = where / f"{proof.name}.json"
    results.unlink(missing_ok=True)
    run(*proof.command(python, VERIFY_BUILD, results, long), cwd=where, env={"PYTHONDONTWRITEBYTECODE": "1"})
    return verification.summary(verification.read(results))


# --- testing the installed package --------------------------------------------------------------------------

TEST_PACKAGES = ("mypy", "build")
TORCH = "torch==2.13.0+cpu"  # the others of that version come with gigabytes that no test needs


def pytest(run: Shell, python: Path, paths: Sequence[str]) -> str:
    """Runs pytest on `paths` of the tree, against what is installed beside `python`."""
    present = [path for path in paths if (ROOT / path.split("::")[0]).exists()]
    if not present:
        raise StepFailed(f"there is no {', '.join(paths)}")
    where = BUILD / "run" / run.log.stem
    where.mkdir(parents=True, exist_ok=True)
    code, output = run(
        python,
        "-X",
        "dev",
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "--rootdir",
        ROOT,
        "-p",
        "skip_policy",
        "-p",
        "no:cacheprovider",
        f"--timeout={TEST_SECONDS}",
        *(ROOT / path for path in present),
        cwd=where,
        check=False,
        env={"PYTHONPATH": str(ROOT / "tests"), "PYTHONDONTWRITEBYTECODE": "1", "DSLINE_SOURCE": str(ROOT)},
    )
    summary = output.rstrip().rpartition("\n")[2].strip("= ")
    if code != 0:
        raise StepFailed(summary or f"pytest ended with exit code {code}")
    return summary


def installed(run: Shell, version: str, *pins: str) -> Path:
    """An environment with the wheel of one Python and what the tests need."""
    python = find_python(version)
    if python is None:
        raise StepSkipped(f"Python {version} is neither on PATH nor among pyenv's versions")
    name = f"test-{version}" + ("-oldest" if pins else "")
    extras = (
        ("test",) if pins else ("test", "interop", "images", "video")
    )  # what is pinned has to work without the others
    python = make_venv(run, name, python, *requirements(*extras), *TEST_PACKAGES, *pins)
    asked_for_torch = python.parent.parent / "torch.txt"
    if version == MAIN_PYTHON and not pins and not asked_for_torch.is_file():
        run(python, *PIP, "install", TORCH, check=False)  # where there is none, its tests are skipped
        asked_for_torch.write_text(TORCH)
    return install_wheel(run, python, wheel_for(version))


def test_package(run: Shell, version: str, *paths: str, pins: Sequence[str] = ()) -> str:
    return pytest(run, installed(run, version, *pins), paths)


def check_queue_tests(run: Shell) -> str:
    """CPython's own queue tests are skipped by a Python without its `test` package; one of them has to have it."""
    logs = {log.stem.removeprefix("processes-"): log.read_text() for log in LOGS.glob("processes-3.*.log")}
    ran = sorted(
        name
        for name, text in logs.items()
        if "test_cpython_queues" in text and "no `test` package" not in text
    )
    if not ran:
        raise unavailable("no Python here has the `test` package, whose queue tests dsline.Queue has to pass")
    return f"by Python {', '.join(ran)}"


def check_stub(run: Shell, version: str) -> str:
    """Compares dsline/_core.pyi with the compiled module."""
    python = installed(run, version)
    where = BUILD / "run" / run.log.stem
    where.mkdir(parents=True, exist_ok=True)
    allowlist = ROOT / "tools" / "stubtest-allowlist.txt"
    extra = ["--allowlist", str(allowlist)] if allowlist.is_file() else []
    run(
        python,
        "-m",
        "mypy.stubtest",
        "dsline._core",
        "--ignore-unused-allowlist",
        "--ignore-disjoint-bases",
        *extra,
        cwd=where,
    )
    return ""


# --- lint ---------------------------------------------------------------------------------------------------


def lint_python(run: Shell) -> Path:
    requirements = (ROOT / "tools" / "lint-requirements.txt").read_text().splitlines()
    return make_venv(
        run, "lint", base_python(), *(line for line in requirements if line and not line.startswith("#"))
    )


def files_ending(*suffixes: str) -> list[str]:
    return [
        str(name) for name in project_files() if name.suffix in suffixes and name.parts[0] != "subprojects"
    ]


def lint_commands(binaries: Path, fix: bool) -> list[list[str]]:
    cpp = files_ending(".hpp", ".cpp")
    cython = files_ending(".pyx", ".pxi", ".pxd")
    texts = files_ending(
        ".py", ".pyi", ".pyx", ".pxi", ".pxd", ".hpp", ".cpp", ".md", ".toml", ".build", ".txt", ".yaml"
    )
    ruff = str(binaries / "ruff")
    commands = [
        [ruff, "check", *(["--fix"] if fix else []), "."],
        [ruff, "format", *([] if fix else ["--check"]), "."],
    ]
    if cpp:
        commands.append(
            [str(binaries / "clang-format"), *(["-i"] if fix else ["--dry-run", "--Werror"]), *cpp]
        )
    if fix:
        return commands
    commands.append([str(binaries / "codespell"), "--toml", "pyproject.toml", *texts])
    if cython:
        commands.append([str(binaries / "cython-lint"), *cython])
    commands.append([str(binaries / "mypy"), "--strict", "--config-file", "pyproject.toml", "dsline"])
    commands.append([str(binaries / "python"), "tools/check_layers.py"])
    return commands


def lint(run: Shell) -> str:
    failures = []
    binaries = lint_python(run).parent
    env = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "MYPY_CACHE_DIR": str(BUILD / "mypy"),
        "RUFF_CACHE_DIR": str(BUILD / "ruff"),
    }
    for command in lint_commands(binaries, fix=False):
        code, _ = run(*command, env=env, check=False)
        if code != 0:
            failures.append(" ".join([Path(command[0]).name, *command[1:2]]))
    if failures:
        raise StepFailed("; ".join(failures))
    return ""


# --- steps --------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One row of the summary. Builds and tests run in two lanes beside each other; tests never overlap one another."""

    name: str
    group: str
    work: Callable[[Shell], object]
    lane: str = "test"
    needs: tuple[str, ...] = ()
    state: str = "waiting"
    detail: str = ""
    seconds: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)


def all_steps() -> list[Step]:
    steps = [Step("lint", "lint", lint)]

    def build(name: str, work: Callable[[Shell], object], *needs: str) -> None:
        steps.append(Step(name, "build", work, "build", needs))

    def test(name: str, group: str, work: Callable[[Shell], object], *needs: str) -> None:
        steps.append(Step(name, group, work, "test", needs))

    def add_cpp(kind: str) -> None:
        build(f"build-{kind}", lambda run: build_cpp(run, kind))
        test(kind, kind, lambda run: test_cpp(run, kind), f"build-{kind}")

    def add_package(version: str) -> None:
        build(f"wheel-{version}", lambda run: build_wheel(run, version).name, "sdist")
        need = f"wheel-{version}"
        first = version == MAIN_PYTHON
        if first:
            test("source", "source", lambda run: test_package(run, version, "tests/source"), need)
            test("stub", "source", lambda run: check_stub(run, version), need)
            test(
                "downstream",
                "downstream",
                lambda run: test_package(run, version, "tests/python/test_downstream.py"),
                need,
            )
        test(
            f"python-{version}",
            "python",
            lambda run: test_package(run, version, *(("tests/python",) if first else PYTHON_TESTS)),
            need,
        )
        test(
            f"processes-{version}",
            "processes",
            lambda run: test_package(run, version, *(("tests/processes",) if first else PROCESS_TESTS)),
            need,
        )

    add_cpp("cpp")
    build("build-verify", build_verification)
    for proof in verification.PROOFS:
        needs = (f"wheel-{MAIN_PYTHON}",) if proof.needs_wheel else ()
        test(
            f"verify-{proof.name}",
            "verify",
            lambda run, proof=proof: verify(run, proof),
            "build-verify",
            *needs,
        )
    steps.append(Step("sdist", "sdist", build_sdist, "build"))
    add_package(MAIN_PYTHON)
    add_cpp("asan")
    add_cpp("tsan")
    for version in PYTHONS[1:]:
        add_package(version)
    test("queue-tests", "processes", check_queue_tests, *(f"processes-{version}" for version in PYTHONS))
    test(
        "oldest-numpy",
        "python",
        lambda run: test_package(
            run, MAIN_PYTHON, "tests/python/test_smoke.py", pins=(f"numpy=={OLDEST_NUMPY}",)
        ),
        f"wheel-{MAIN_PYTHON}",
    )
    return steps


def choose(groups: Sequence[str] | None, versions: Sequence[str]) -> list[Step]:
    """The steps of the named groups with all they need; every step where no group is named."""
    steps = {step.name: step for step in all_steps()}
    if groups is None:
        wanted = [step.name for step in steps.values() if step.group != "downstream"]  # part of python-3.11
    else:
        wanted = [step.name for step in steps.values() if step.group in groups]
    wanted = [
        name for name in wanted if not re.search(r"3\.\d+$", name) or name.rpartition("-")[2] in versions
    ]
    chosen: set[str] = set()
    # It looks at what the Pythons of this run have said.
    steps["queue-tests"].needs = tuple(f"processes-{version}" for version in PYTHONS if version in versions)

    def add(name: str) -> None:
        chosen.add(name)
        for need in steps[name].needs:
            add(need)

    for name in wanted:
        add(name)
    return [step for step in steps.values() if step.name in chosen]


def run_step(step: Step, by_name: dict[str, Step], verbose: bool) -> None:
    for need in step.needs:
        by_name[need].done.wait()
    missing = [need for need in step.needs if by_name[need].state != "passed"]
    start = time.monotonic()
    # A wheel can be built from the plain sources where there is no git to make the sdist with.
    if missing and not (missing == ["sdist"] and by_name["sdist"].state == "skipped"):
        step.state, step.detail = "skipped", f"{missing[0]} {by_name[missing[0]].state}"
    else:
        print(f"  ... {step.name}", flush=True)
        run = Shell(step.name, verbose)
        try:
            step.detail = str(step.work(run) or "")
            step.state = "passed"
        except StepSkipped as reason:
            step.state, step.detail = "skipped", str(reason)
        except StepFailed as reason:
            step.state, step.detail = "failed", str(reason)
        except Exception as error:
            step.state, step.detail = "failed", f"{type(error).__name__}: {error}"
        if step.state == "failed" and not verbose:
            lines = run.log.read_text(errors="replace").splitlines()
            print(f"--- {step.name}: the last lines of {run.log.relative_to(ROOT)}")
            print("\n".join(lines[-120:]))
            print(f"--- {step.name}: {step.detail}", flush=True)
    step.seconds = time.monotonic() - start
    print(f"{step.state.upper():>7} {step.name} ({step.seconds:.0f} s) {step.detail}", flush=True)
    step.done.set()


def shared_memory_names() -> set[str]:
    folder = Path(f"/dev/shm/dsline-{os.getuid()}")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def verify_now(names: Sequence[str] | None, long: bool, record: bool) -> int:
    """Builds and runs the programs of the proof one after the other."""
    known = {proof.name: proof for proof in verification.PROOFS}
    if unknown := sorted(set(names or ()) - set(known)):
        raise SystemExit(f"--only does not know {', '.join(unknown)}; it takes {', '.join(known)}")
    proofs = [proof for proof in verification.PROOFS if names is None or proof.name in names]
    steps = [Step("build-verify", "build", build_verification, "build")]
    if any(proof.needs_wheel for proof in proofs):
        steps.append(Step("sdist", "sdist", build_sdist, "build"))
        wheel = f"wheel-{MAIN_PYTHON}"
        steps.append(
            Step(wheel, "build", lambda run: build_wheel(run, MAIN_PYTHON).name, "build", ("sdist",))
        )
    for proof in proofs:
        needs = ("build-verify", *((f"wheel-{MAIN_PYTHON}",) if proof.needs_wheel else ()))

        def work(run: Shell, proof: verification.Proof = proof) -> str:
            run.seconds = VERIFY_SECONDS[long]
            run.deadline = time.monotonic() + run.seconds
            return verify(run, proof, long)

        steps.append(Step(f"verify-{proof.name}", "verify", work, "test", needs))
    code = run_steps(steps, verbose=False)
    if record:
        passed = {
            step.name.removeprefix("verify-"): (
                step.seconds,
                verification.read(BUILD / "verification" / f"{step.name.removeprefix('verify-')}.json"),
            )
            for step in steps
            if step.group == "verify" and step.state == "passed"
        }
        verification.record(passed, long)
    return code


def run_steps(steps: list[Step], verbose: bool) -> int:
    by_name = {step.name: step for step in steps}
    before = shared_memory_names()
    begun = time.monotonic()
    lanes: list[threading.Thread] = []
    for lane in ("build", "test"):
        todo: queue.SimpleQueue[Step] = queue.SimpleQueue()
        members = [step for step in steps if step.lane == lane]
        for step in members:
            todo.put(step)

        def work(todo: queue.SimpleQueue[Step] = todo, count: int = len(members)) -> None:
            for _ in range(count):
                run_step(todo.get(), by_name, verbose)

        lanes.append(threading.Thread(target=work, daemon=True))
    for thread in lanes:
        thread.start()
    try:
        for thread in lanes:
            while thread.is_alive():
                thread.join(0.5)
    except KeyboardInterrupt:
        for process in list(Shell.live):
            kill_group(process)
        return 130
    left = sorted(shared_memory_names() - before)
    total = time.monotonic() - begun
    width = max(len(step.name) for step in steps)
    print(f"\n{'step':<{width}}  state    seconds")
    for step in steps:
        print(f"{step.name:<{width}}  {step.state:<7}  {step.seconds:7.1f}  {step.detail}".rstrip())
    print(f"{'all':<{width}}  {'':<7}  {total:7.1f}")
    if left:
        print(f"left behind in shared memory: {', '.join(left)}")
    count = {state: sum(step.state == state for step in steps) for state in ("passed", "failed", "skipped")}
    count["failed"] += bool(left) and IN_CI  # elsewhere another program of this user may have made them
    print(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped", flush=True)
    return 1 if count["failed"] else 0


# --- commands -----------------------------------------------------------------------------------------------


def with_package(name: str, extra: str) -> Path:
    """An environment with this tree's wheel and one of its extras."""
    run = Shell(name, verbose=False)
    version = next((version for version in PYTHONS if find_python(version)), None)
    if version is None:
        raise SystemExit(f"dev.py needs one of Python {', '.join(PYTHONS)}")
    try:
        copy_tree(BUILD / "tree")
        shutil.rmtree(BUILD / "sdist", ignore_errors=True)
        wheel = build_wheel(run, version)
        python = find_python(version)
        assert python is not None
        python = make_venv(run, f"{extra}-{version}", python, *requirements(extra))
        return install_wheel(run, python, wheel)
    except StepFailed as reason:
        raise SystemExit(f"{run.log.read_text(errors='replace')[-4000:]}\n{reason}") from None


def run_script(name: str, extra: str, script: str, arguments: Sequence[str]) -> int:
    print(f"building dsline and its environment (log: build/logs/{name}.log)", flush=True)
    python = with_package(name, extra)
    return subprocess.run([str(python), str(ROOT / script), *arguments], cwd=BUILD, check=False).returncode


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("``", ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    test = commands.add_parser("test", help="everything that CI runs")
    test.add_argument("--only", metavar="GROUP,...", help=f"only these of {', '.join(GROUPS)}")
    test.add_argument(
        "--python", metavar="VERSION,...", default=",".join(PYTHONS), help="default: %(default)s"
    )
    test.add_argument("-v", "--verbose", action="store_true", help="show what the steps print")
    proof = commands.add_parser("verify", help="the programs that prove the core (docs/verification)")
    proof.add_argument("--only", metavar="NAME,...", help="only these programs")
    proof.add_argument("--long", action="store_true", help="the long form: hours")
    proof.add_argument("--record", action="store_true", help="write the counts to docs/verification")
    for name, text in (("example", f"an example: {', '.join(EXAMPLES)}"), ("bench", "the benchmarks")):
        commands.add_parser(name, help=f"{text}; further arguments are passed on")
    commands.add_parser("lint", help="format, spelling, types, layers")
    commands.add_parser("format", help="rewrite Python and C++ sources in the project's format")
    return parser


def main() -> int:
    # A shell starts background jobs with SIGINT ignored, and what they start inherits that: no test of Ctrl-C could pass.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = command_line()
    options, passed_on = parser.parse_known_args()
    if passed_on and options.command not in ("example", "bench"):
        parser.error(f"unrecognized arguments: {' '.join(passed_on)}")
    if sys.version_info < (3, 11):  # noqa: UP036 - this file may be started by any python3
        parser.error(f"needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    if options.command == "example":
        which = passed_on.pop(0) if passed_on and not passed_on[0].startswith("-") else "images"
        if which not in EXAMPLES:
            parser.error(f"there is no example {which!r}; there are {', '.join(EXAMPLES)}")
        return run_script("example", "examples", EXAMPLES[which], passed_on)
    if options.command == "bench":
        return run_script("bench", "bench", "bench/run.py", passed_on)
    if options.command == "format":
        run = Shell("format", verbose=True)
        return max(
            run(*command, check=False)[0] for command in lint_commands(lint_python(run).parent, fix=True)
        )
    if options.command == "lint":
        return run_steps(choose(["lint"], PYTHONS), verbose=True)
    if options.command == "verify":
        return verify_now(options.only.split(",") if options.only else None, options.long, options.record)
    groups = options.only.split(",") if options.only else None
    if unknown := sorted(set(groups or ()) - set(GROUPS)):
        parser.error(f"--only does not know {', '.join(unknown)}; it takes {', '.join(GROUPS)}")
    return run_steps(choose(groups, options.python.split(",")), options.verbose)


if __name__ == "__main__":
    sys.exit(main())
