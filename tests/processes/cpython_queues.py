"""CPython's own tests of multiprocessing's queues, run against dsline's.

    python cpython_queues.py fork|spawn|forkserver [unittest arguments]

A program of its own, and not a test module: it gives those tests dsline.multiprocessing for multiprocessing, and the
children of spawn and forkserver import it again. `test_cpython_queues.py` runs it.
"""

import multiprocessing
import sys
import traceback
import unittest

from test import _test_multiprocessing as theirs

import dsline
import dsline.multiprocessing

theirs.multiprocessing = dsline.multiprocessing
theirs.ProcessesMixin.Queue = staticmethod(dsline.multiprocessing.Queue)
theirs.ProcessesMixin.JoinableQueue = staticmethod(dsline.multiprocessing.JoinableQueue)

# The classes about queues, and tests of others that use them: {class: methods, or None for all}.
TESTS = {
    "WithProcessesTestQueue": None,
    "TestSimpleQueue": None,
    "WithProcessesTestProcess": ("test_process", "test_process_mainthread_native_id", "test_lose_target_ref"),
    "TestStartMethod": ("test_context", "test_set_get", "test_get_all", "test_mixed_startmethod"),
    "TestStdinBadfiledescriptor": ("test_queue_in_process",),
}
LEAST = 15

# What cannot apply: {method: why}. Every other method of these classes must pass.
NOT_OURS = {
    "TestStartMethod.test_mixed_startmethod": (
        "demands that a queue made for fork is refused by a spawned process; dsline's has no lock that forces this, and works"
    ),
}

# What applies once multiprocessing's way with objects that cannot be pickled is asked for: it prints the traceback later and
# loses the object, where dsline's put raises at once.
WITH_HOOK = ("WithProcessesTestQueue.test_queue_feeder_donot_stop_onexc",)


class PrintingQueue(dsline.Queue):
    @staticmethod
    def _on_queue_feeder_error(error, obj):
        traceback.print_exception(error)


def chosen(names):
    """The tests, and those that are left out with the reason."""
    suite, left_out = unittest.TestSuite(), []
    for name, methods in TESTS.items():
        kind = names[name]
        for method in methods or unittest.defaultTestLoader.getTestCaseNames(kind):
            label = f"{name}.{method}"
            if label in NOT_OURS:
                left_out.append((label, NOT_OURS[label]))
                continue
            case = kind(method)
            if label in WITH_HOOK:
                case.Queue = PrintingQueue
            suite.addTest(case)
    return suite, left_out


def main(start_method):
    theirs.install_tests_in_module_dict(globals(), start_method)
    suite, left_out = chosen(globals())
    setUpModule()  # noqa: F821
    try:
        result = unittest.TextTestRunner(verbosity=2, stream=sys.stdout).run(suite)
    finally:
        tearDownModule()  # noqa: F821
    for label, why in left_out:
        print(f"left out: {label}: {why}")
    for case, why in result.skipped:
        print(f"skipped: {case.id()}: {why}")
    print(f"ran {result.testsRun} tests, {len(result.failures) + len(result.errors)} failed")
    return 0 if result.wasSuccessful() and result.testsRun >= LEAST else 1


if __name__ != "__main__":
    # In a child: its tests are found by the names of their classes here.
    theirs.install_tests_in_module_dict(globals(), multiprocessing.get_start_method())
else:
    sys.exit(main(sys.argv[1]))
