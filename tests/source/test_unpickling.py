"""Nothing that a peer sends is unpickled, evaluated or looked up as a type."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for end in ("py", "pyx", "pxi") for path in (ROOT / "dsline").rglob(f"*.{end}"))

RUNS_WHAT_IT_READS = {
    "unpickling": r"\b(?:c?[pP]ickle|dill|cloudpickle|shelve)\.(?:loads?|Unpickler|open)\b|\bUnpickler\s*\(",
    "pickle imported": r"^\s*(?:import|cimport|from)\s+(?:c?[pP]ickle|dill|cloudpickle|shelve|marshal)\b",
    "marshal": r"\bmarshal\.loads?\b",
    "code from text": r"(?<![.\w])(?:eval|exec|compile)\s*\(",
    "NumPy's own pickles": r"allow_pickle\s*=\s*True|\bnp\.load\s*\(|\bnumpy\.load\s*\(",
}
# file -> how often, with the reason: what the user asked for by name.
ALLOWED: dict[tuple[str, str], int] = {
    (
        "objects.py",
        "pickle imported",
    ): 1,  # recv_object() and Message.object() unpickle, and nothing else does
    ("objects.py", "unpickling"): 1,
    ("callables.py", "pickle imported"): 2,  # functions for workers, from the process that started them
    ("callables.py", "unpickling"): 1,
    ("accelerate.py", "pickle imported"): 1,  # for the number of its default protocol
    ("items.py", "pickle imported"): 1,  # a Batch pickles; PickleBuffer for its columns
    ("records.py", "pickle imported"): 1,  # items of a file:// log, which is trusted where objects=True
    ("records.py", "unpickling"): 3,  # without it by an unpickler that knows arrays and plain values only
    ("runtime.py", "pickle imported"): 1,  # states of a checkpoint, in a folder of the user's own
    ("runtime.py", "unpickling"): 1,
    ("run.py", "pickle imported"): 1,
    ("run.py", "unpickling"): 1,
    ("queues.pxi", "pickle imported"): 1,  # put() of a queue pickles, and get() unpickles by objects.py
}


def code_of(path):
    """The lines without comments."""
    return [re.sub(r"(^|\s)#.*", "", line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", RUNS_WHAT_IT_READS)
def test_nothing_runs_what_it_reads(kind):
    assert len(SOURCES) > 5
    pattern = re.compile(RUNS_WHAT_IT_READS[kind])
    found = {}
    for path in SOURCES:
        hits = [line.strip() for line in code_of(path) if pattern.search(line)]
        if len(hits) > ALLOWED.get((path.name, kind), 0):
            found[path.name] = hits
    assert found == {}


def test_the_check_notices():
    probes = {
        "unpickling": "x = pickle.loads(data)",
        "pickle imported": "import pickle",
        "marshal": "marshal.loads(data)",
        "code from text": "eval(text)",
        "NumPy's own pickles": "np.load(file, allow_pickle=True)",
    }
    for kind, line in probes.items():
        assert re.search(RUNS_WHAT_IT_READS[kind], line), kind
