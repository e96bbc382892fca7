"""A plugin of pytest for gpu_first_run.sh: each failing test is appended to $OUT/failures.txt.

At once, not at the end: a run that is cut off must not lose it.
"""

from __future__ import annotations

import os
from pathlib import Path


def pytest_runtest_logreport(report):
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(os.environ["OUT"], "failures.txt").open("a") as file:
            text = str(report.longrepr).strip().splitlines()
            file.write(f"==== {report.nodeid} ({report.when})\n" + "\n".join(text[-18:]) + "\n\n")
