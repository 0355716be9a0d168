"""The import table of tools/check_layers.py holds, and the check notices what it is there for."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_checker():
    spec = importlib.util.spec_from_file_location("check_layers", ROOT / "tools" / "check_layers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check_layers = load_checker()


def test_the_tree_keeps_to_the_table():
    assert check_layers.violations(ROOT) == []


def test_every_folder_of_the_core_is_in_the_table():
    folders = {path.name for path in (ROOT / "cpp" / "src").iterdir() if path.is_dir()}
    assert folders == set(check_layers.CPP_LAYERS)


def test_the_table_has_no_cycle():
    order = list(check_layers.CPP_LAYERS)
    for number, layer in enumerate(order):
        below = {name.partition("/")[0] for name in check_layers.CPP_LAYERS[layer]} - {"dsline"}
        assert below <= set(order[:number]), layer


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cpp/src/base/clock.hpp", '#include "memory/region.hpp"'),
        ("cpp/src/order/group.hpp", '#include "slots/slot_pool.hpp"'),
        ("cpp/src/channel/channel.cpp", "#include <Python.h>"),
        ("cpp/include/dsline/error.hpp", '#include "base/clock.hpp"'),
        ("cpp/src/liveness/recovery.hpp", '#include "dsline/channel.hpp"'),
        ("dsline/errors.py", "from dsline.channel import ShmChannel"),
        ("dsline/options.py", "from . import channel"),
        ("dsline/channel.py", "import click"),
        ("dsline/errors.py", "import scipy"),
        ("dsline/_core.pyx", "from dsline.channel import ShmChannel"),
        ("dsline/_core.pyx", 'cdef extern from "dsline/error.hpp":\n    pass'),
    ],
)
def test_an_upward_import_is_reported(tmp_path, file, line):
    for folder in ("cpp", "dsline"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    with (tmp_path / file).open("a") as target:
        target.write(f"\n{line}\n")
    new = set(check_layers.violations(tmp_path)) - set(check_layers.violations(ROOT))
    assert [text.partition(":")[0] for text in new] == [file]
