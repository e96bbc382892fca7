"""A plugin of pytest for gpu_first_run.sh: each failing test is appended to $OUT/failures.txt.

At once, not at the end: a run that is cut off must not lose it. A run of which every test was
skipped ends with the status of one without tests, except in a dry run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

finished: set[str] = set()


def pytest_runtest_logreport(report):
    if not report.skipped:
        finished.add(report.when)
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(os.environ["OUT"], "failures.txt").open("a") as file:
            text = str(report.longrepr).strip().splitlines()
            file.write(f"==== {report.nodeid} ({report.when})\n" + "\n".join(text[-18:]) + "\n\n")


def pytest_sessionfinish(session, exitstatus):
    if not exitstatus and "call" not in finished and not os.environ.get("DRY"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
