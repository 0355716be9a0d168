"""Explores the model's configurations and shows that it catches every seeded mistake.

    python tests/verification/model/run.py                 # short: the large ones with one preemption, and all mutants
    python tests/verification/model/run.py --long          # everything, up to hours
    python tests/verification/model/run.py --only NAME     # one configuration, with the trace of a violation

`--json FILE` writes the counts. The exit status is 0 when every configuration that was to be complete is, without a
violation, and every mutant was caught.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

import mutants

HERE = pathlib.Path(__file__).resolve().parent
CORE = HERE.parents[2] / "cpp"
SOURCES = ["engine.cpp", "fiber.cpp", "simulation.cpp", "setups.cpp", "core.cpp", "futex.cpp", "main.cpp"]
# -Og leaves the fewest values behind that nobody reads any more: each would make one state several.
FLAGS = ["-std=c++20", "-Og", "-Wall", "-Wextra", "-fno-stack-protector", "-DDSLINE_SCHEDULED_ATOMICS"]


def compile_model(build: pathlib.Path, core: pathlib.Path, extra: list[str], jobs: int) -> pathlib.Path:
    """Compiles what is older than its sources."""
    build.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    includes = [f"-I{HERE}", f"-I{HERE / 'override'}", f"-I{CORE / 'include'}", f"-I{core}"]

    def one(source: str) -> pathlib.Path:
        target = build / (source + ".o")
        deps = target.with_suffix(".d")
        if target.exists() and deps.exists():
            files = deps.read_text().replace("\\\n", " ").split()[1:]
            made = target.stat().st_mtime
            if all(os.path.exists(f) and os.path.getmtime(f) <= made for f in files):
                return target
        command = [*compiler, *FLAGS, *extra, *includes, "-MMD", "-MF", str(deps)]
        subprocess.run([*command, "-c", str(HERE / source), "-o", str(target)], check=True)
        return target

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(one, SOURCES))
    program = build / "model"
    subprocess.run([*compiler, *map(str, objects), "-o", str(program)], check=True)
    return program


def explore(program: pathlib.Path, setup: str, *options: str) -> dict:
    command = [str(program), "--setup", setup, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode not in (0, 1) or not lines:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    result = json.loads(lines[0])
    result["trace"] = [line.strip() for line in lines[1:]]
    return result


def list_setups(program: pathlib.Path) -> list[dict]:
    lines = subprocess.run(
        [str(program), "--list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    keys = ("name", "kills", "mode", "what")
    return [dict(zip(keys, line.split("\t"), strict=True)) for line in lines]


def check_setups(program: pathlib.Path, arguments: argparse.Namespace) -> tuple[list[dict], bool]:
    results, good = [], True
    print(
        f"{'configuration':<22}{'kills':>6}{'states':>13}{'steps':>14}{'deaths':>10}{'seconds':>9}  outcome"
    )
    for setup in list_setups(program):
        if arguments.only and setup["name"] not in arguments.only:
            continue
        options = ["--trace"]
        bounded = not arguments.only and not arguments.long and setup["mode"] == "long"
        if bounded:
            options += ["--preemptions", "1"]
        if arguments.max_seconds:
            options += ["--max-seconds", str(arguments.max_seconds)]
        result = explore(program, setup["name"], *options)
        fine = not result["violation"] and (result["complete"] or arguments.max_seconds > 0)
        good = good and fine
        complete = "every schedule with 1 preemption" if bounded else "every schedule"
        outcome = result["violation"] or (complete if result["complete"] else "cut off")
        print(
            f"{setup['name']:<22}{setup['kills']:>6}{result['states']:>13,}{result['steps']:>14,}"
            f"{result['kills']:>10,}{result['seconds']:>9.1f}  {outcome}",
            flush=True,
        )
        if result["violation"]:
            print(f"    {setup['what']}")
            for line in result["trace"]:
                print("    " + line)
        del result["trace"]
        results.append(
            {**result, "kills_allowed": int(setup["kills"]), "what": setup["what"], "outcome": outcome}
        )
    return results, good


def check_mutants(program: pathlib.Path, arguments: argparse.Namespace) -> tuple[list[dict], bool]:
    results = []
    print(f"\n{'mutant':<70}{'caught in':<20}{'states':>11}{'seconds':>9}  promise")
    for mutant in mutants.MUTANTS:
        caught = None
        seconds = 0.0
        for setup in mutant.setups:
            result = explore(program, setup, "--mutant", str(mutant.number), "--max-seconds", "20")
            seconds += result["seconds"]
            if result["violation"]:
                caught = result
                break
        label = f"{mutant.number:>3} {mutant.name}"
        if caught:
            where, states, promise = caught["setup"], caught["states"], caught["violation"]
        else:
            where, states, promise = "NOT CAUGHT", 0, ""
        print(f"{label:<70}{where:<20}{states:>11,}{seconds:>9.1f}  {promise}", flush=True)
        results.append(
            {"number": mutant.number, "name": mutant.name, "caught": caught is not None, "setup": where,
             "states": states, "seconds": round(seconds, 2), "promise": promise}
        )  # fmt: skip
    caught_count = sum(r["caught"] for r in results)
    print(f"{caught_count} of {len(results)} mutants caught")
    return results, caught_count == len(results)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="the large configurations too")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this configuration, without the mutants"
    )
    parser.add_argument("--no-mutants", action="store_true")
    parser.add_argument("--only-mutants", action="store_true")
    parser.add_argument(
        "--max-seconds", type=float, default=0, help="per configuration; 0: until it is complete"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument(
        "--build-dir", type=pathlib.Path, help="kept between runs; by default a temporary one"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="dsline-model-") as temporary:
        build = arguments.build_dir or pathlib.Path(temporary)
        started = time.monotonic()
        report: dict = {}
        good = True
        if not arguments.only_mutants:
            program = compile_model(build / "core", CORE / "src", [], arguments.jobs)
            setups, good = check_setups(program, arguments)
            report["configurations"] = len(setups)
            report["states"] = sum(result["states"] for result in setups)
            report["steps"] = sum(result["steps"] for result in setups)
            report["deaths"] = sum(result["kills"] for result in setups)
            report["everybody_died"] = sum(result["ends"] for result in setups)
            report["violations"] = sum(bool(result["violation"]) for result in setups)
            report["setups"] = setups
        if not arguments.only and not arguments.no_mutants:
            sources = build / "mutated-src"
            mistakes = mutants.applied(CORE / "src", sources)
            for mistake in mistakes:
                print(mistake, file=sys.stderr)
            extra = ["-DDSLINE_MUTANTS", "-include", str(HERE / "mutant.hpp")]
            program = compile_model(build / "mutants", sources, extra, arguments.jobs)
            tried, caught = check_mutants(program, arguments)
            report["mutants"] = len(tried)
            report["mutants_caught"] = sum(result["caught"] for result in tried)
            report["mutant_results"] = tried
            good = good and caught and not mistakes
        report["seconds"] = round(time.monotonic() - started, 1)
        print(f"{report.get('states', 0):,} states, {report['seconds']} s: {'good' if good else 'BAD'}")
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
