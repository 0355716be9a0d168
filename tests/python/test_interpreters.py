"""What interpreters dsline works in: the main one, with the GIL."""

import os
import subprocess
import sys
from pathlib import Path

from support import STRICT, assert_clean, run_script

import dsline

SUBINTERPRETER = """
try:
    import _interpreters as interpreters  # since 3.13
except ImportError:
    import _xxsubinterpreters as interpreters

SOURCE = '''
try:
    import dsline
except ImportError as error:
    text = str(error)
else:
    text = "imported"
import os
os.write({}, text.encode())
'''

import os
run = getattr(interpreters, "exec", None) or interpreters.run_string
for isolated in (True, False):
    reader, writer = os.pipe()
    try:
        interpreter = interpreters.create("isolated" if isolated else "legacy")
    except TypeError:  # before 3.13
        interpreter = interpreters.create(isolated=isolated)
    done = run(interpreter, SOURCE.format(writer))
    assert done is None, done
    interpreters.destroy(interpreter)
    os.close(writer)
    print(os.read(reader, 1000).decode())
    os.close(reader)
"""


def test_a_subinterpreter_is_refused_with_the_reason():
    # Without site-packages, and with them the hook of an editable install, which starts processes.
    command = [sys.executable, *STRICT, "-S", "-c", SUBINTERPRETER]
    environment = {**os.environ, "PYTHONPATH": str(Path(dsline.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert_clean(done)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("dsline cannot be imported in a subinterpreter") for line in lines)


def test_the_gil_is_on_where_dsline_is_loaded():
    """The module does not claim to work without it, so an interpreter that can do without turns it on."""
    done = run_script("import sys, dsline; print(getattr(sys, '_is_gil_enabled', lambda: True)())")
    assert done.stdout == "True\n"
