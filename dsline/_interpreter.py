"""Refuses to be imported where the compiled module cannot work: in a subinterpreter.

NumPy does not work there either. The compiled module keeps objects of the interpreter that loaded it, so a second one would
use them without the lock that guards them.
"""

import importlib


def _is_subinterpreter() -> bool:
    for name in ("_interpreters", "_xxsubinterpreters"):  # since 3.13; before
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        return bool(interpreters.get_current() != interpreters.get_main())
    return False


if _is_subinterpreter():
    raise ImportError(
        "dsline cannot be imported in a subinterpreter: its compiled module and NumPy work in the main interpreter of a "
        "process only; use threads, or processes and a channel between them"
    )
