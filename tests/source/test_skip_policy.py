"""The list of skips that CI accepts."""

import pytest
import skip_policy

LIST = """
# comment
tests/python/test_a.py::test_mount[*] | mounting is refused
tests/python/test_b.py | no second user
"""


@pytest.mark.parametrize(
    ("nodeid", "reason", "allowed"),
    [
        ("tests/python/test_a.py::test_mount[8m]", "mounting is refused here: EPERM", True),
        ("tests/python/test_a.py::test_mount[8m]", "no idea", False),
        ("tests/python/test_a.py::test_mounted", "mounting is refused", False),
        ("tests/python/test_b.py", "no second user", True),
        ("tests/python/test_b.py::test_x", "no second user", False),
    ],
)
def test_a_skip_needs_its_node_and_its_reason(nodeid, reason, allowed):
    assert skip_policy.is_allowed(skip_policy.parse(LIST), nodeid, reason) is allowed


@pytest.mark.parametrize(
    "line", ["tests/python/test_a.py::test_x", "tests/python/test_a.py::test_x | ", " | reason"]
)
def test_an_entry_without_a_reason_or_a_node_is_refused(line):
    with pytest.raises(pytest.UsageError, match="expected"):
        skip_policy.parse(line)


def test_an_unlisted_skip_fails_the_run(tmp_path):
    import os
    import subprocess
    import sys
    from pathlib import Path

    (tmp_path / "test_it.py").write_text("import pytest\ndef test_it():\n    pytest.skip('felt like it')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "skip_policy", "-p", "no:cacheprovider", "-q", "test_it.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(skip_policy.__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "test_it.py::test_it | felt like it" in done.stdout
