"""Runs the fuzz targets: with libFuzzer where there is a clang++ that has it, else with GCC and fuzz/driver.cpp.

``python3 tests/verification/robust/fuzz.py [--seconds 15] [--target attach] [--corpus FOLDER] [--json FILE]``

Seeds are made by code; nothing is downloaded. Both builds have the address and undefined-behaviour sanitizers. Exits with 1
when a target found something or ran nothing.
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
FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-pthread", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
LONGEST_INPUT_SECONDS = 10


def compiler():
    for name in ("clang++", *(f"clang++-{version}" for version in range(21, 13, -1))):
        if shutil.which(name):
            return name
    return None


def has_libfuzzer(clang, folder):
    """Tell whether `clang` links programs with libFuzzer."""
    source = folder / "probe.cpp"
    source.write_text(
        'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n'
    )
    command = [clang, "-fsanitize=fuzzer,address", str(source), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def build(compile_with, folder, libfuzzer):
    """Compile the core once and every target; return the programs by name."""
    includes = [f"-I{ROOT / part}" for part in ("cpp/include", "cpp/src", "tests/verification/robust")]
    core = []
    watch = ("-fsanitize=fuzzer-no-link",) if libfuzzer else ()
    for source in sorted((ROOT / "cpp/src").rglob("*.cpp")):
        if (
            source.parent.name == "expressions"
        ):  # compiled once for each instruction set, and no target reads them
            continue
        core.append(str(folder / f"{source.parent.name}-{source.stem}.o"))
        command = [compile_with, *FLAGS, *watch, *includes, "-c", str(source), "-o", core[-1]]
        subprocess.run(command, check=True)
    main_program = "initialize.cpp" if libfuzzer else "driver.cpp"
    link = ("-fsanitize=fuzzer",) if libfuzzer else ()
    programs = {}
    for target in TARGETS:
        programs[target] = folder / f"fuzz_{target}"
        sources = [HERE / "fuzz" / f"{target}.cpp", HERE / "fuzz" / main_program]
        command = [
            compile_with,
            *FLAGS,
            *link,
            *includes,
            *map(str, sources),
            *core,
            "-o",
            str(programs[target]),
        ]
        subprocess.run(command, check=True)
    return programs


# Leaks are for the other programs to find: these end in the middle.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}


def fuzz(program, corpus, seconds, seed):
    corpus.mkdir(parents=True, exist_ok=True)
    subprocess.run([program], env={**ENVIRONMENT, "DSLINE_WRITE_SEEDS": str(corpus)}, check=True)
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
        env=ENVIRONMENT,
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


def drive(program, corpus, seconds, seed):
    corpus.mkdir(parents=True, exist_ok=True)
    result = corpus.parent / f"{program.name}.json"
    command = [program, "--seconds", str(seconds), "--seed", str(seed), "--json", str(result)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds + 120, check=False
    )
    counts = json.loads(result.read_text())
    said = "" if done.returncode == 0 else done.stderr[-4000:]
    return {
        "passed": done.returncode == 0,
        "inputs": counts["inputs"],
        "corpus": counts["seeds"],
        "said": said,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=15, help="per target")
    parser.add_argument("--long", action="store_true", help="an hour per target")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--corpus", type=Path, help="keep inputs here")
    parser.add_argument("--build-dir", type=Path, help="build here; otherwise in a temporary folder")
    parser.add_argument("--driver", action="store_true", help="GCC and the driver, whatever there is")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds = max(options.seconds, 3600) if options.long else options.seconds
    with tempfile.TemporaryDirectory(prefix="dsline-fuzz-") as temporary:
        folder = options.build_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        clang = None if options.driver else compiler()
        libfuzzer = clang is not None and has_libfuzzer(clang, folder)
        compile_with = clang if libfuzzer else "g++"
        print(f"{compile_with} with {'libFuzzer' if libfuzzer else 'fuzz/driver.cpp'}", flush=True)
        programs = build(compile_with, folder, libfuzzer)
        corpus = options.corpus or folder / "corpus"
        record = {
            "program": "fuzz",
            "compiler": compile_with,
            "seed": options.seed,
            "inputs": 0,
            "failures": 0,
        }
        for target in options.target or TARGETS:
            run = fuzz if libfuzzer else drive
            result = run(programs[target], corpus / target, seconds, options.seed)
            print(target, {key: value for key, value in result.items() if key != "said"}, flush=True)
            record["inputs"] += result["inputs"]
            record[f"inputs of {target}"] = result["inputs"]
            record["failures"] += not result["passed"] or result["inputs"] == 0
            if result["said"]:
                print(result["said"], file=sys.stderr)
                record[f"{target} said"] = result["said"]
    if options.json:
        options.json.write_text(json.dumps(record))
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
