"""Runs the fuzz targets with libFuzzer: builds them with clang, makes their seeds, and bounds each by time.

``python3 tests/verification/robust/fuzz.py [--seconds 15] [--target attach] [--corpus FOLDER] [--json FILE]``

Exits with 1 when a target found something, 77 (skipped, for Meson) where there is no clang++ with libFuzzer. Without
clang the same targets run through their own driver: ``meson test fuzz_frame``.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TARGETS = ("frame", "metadata", "dtype", "attach")
FLAGS = ("-std=c++20", "-O1", "-g", "-pthread", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
SKIPPED = 77
LONGEST_INPUT_SECONDS = 10


def compiler():
    for name in ("clang++", *(f"clang++-{version}" for version in range(21, 13, -1))):
        if shutil.which(name):
            return name
    return None


def build(clang, folder):
    """Compile the core once and every target; return the programs by name, or None without libFuzzer."""
    includes = [f"-I{ROOT / part}" for part in ("cpp/include", "cpp/src", "tests/verification/robust")]
    core = []
    for source in sorted((ROOT / "cpp/src").rglob("*.cpp")):
        core.append(str(folder / f"{source.parent.name}-{source.stem}.o"))
        command = [clang, *FLAGS, "-fsanitize=fuzzer-no-link", *includes, "-c", str(source), "-o", core[-1]]
        subprocess.run(command, check=True)
    programs = {}
    for target in TARGETS:
        programs[target] = folder / target
        sources = [HERE / "fuzz" / f"{target}.cpp", HERE / "fuzz" / "initialize.cpp"]
        command = [clang, *FLAGS, "-fsanitize=fuzzer", *includes, *map(str, sources), *core, "-o", str(programs[target])]
        if subprocess.run(command, check=False).returncode != 0:
            return None
    return programs


def fuzz(program, corpus, seconds, seed):
    corpus.mkdir(parents=True, exist_ok=True)
    # Leaks are for the other programs to find: this one ends in the middle.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    subprocess.run([program], env={**environment, "DSLINE_WRITE_SEEDS": str(corpus)}, check=True)
    done = subprocess.run(
        [
            program,
            f"-max_total_time={seconds}",
            f"-timeout={LONGEST_INPUT_SECONDS}",
            f"-seed={seed}",
            "-max_len=8192",
            "-print_final_stats=1",
            f"-artifact_prefix={corpus.parent}/{program.name}-",
            str(corpus),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        check=False,
    )
    runs = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    coverage = re.findall(r"cov: (\d+)", done.stderr)
    return {
        "passed": done.returncode == 0,
        "inputs": int(runs[1]) if runs else 0,
        "coverage": int(coverage[-1]) if coverage else 0,
        "corpus": len(list(corpus.iterdir())),
        "said": "" if done.returncode == 0 else done.stderr[-4000:],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=15, help="per target")
    parser.add_argument("--long", action="store_true", help="an hour per target")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--corpus", type=Path, help="keep inputs here")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds = max(options.seconds, 3600) if options.long else options.seconds
    clang = compiler()
    if clang is None:
        print("no clang++: the targets run through their own driver")
        return SKIPPED
    with tempfile.TemporaryDirectory(prefix="dsline-fuzz-") as temporary:
        folder = Path(temporary)
        programs = build(clang, folder)
        if programs is None:
            print(f"{clang} has no libFuzzer (libclang-rt): the targets run through their own driver")
            return SKIPPED
        corpus = options.corpus or folder / "corpus"
        results = {}
        for target in options.target or TARGETS:
            results[target] = fuzz(programs[target], corpus / target, seconds, options.seed)
            print(target, {key: value for key, value in results[target].items() if key != "said"}, flush=True)
            if not results[target]["passed"]:
                print(results[target]["said"], file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps({"program": "fuzz", "compiler": clang, "seconds": seconds, "targets": results}))
    return 0 if all(result["passed"] and result["inputs"] > 0 for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
