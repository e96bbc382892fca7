"""Print what holds in each framework: ``python -m tests.frameworks [NAME ...]``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np

from groupnorm.text_tables import print_table
from tests.frameworks.examine import Findings, examine
from tests.frameworks.rows import FRAMEWORKS, KERAS_BACKENDS, keras_row

TITLE = """Each framework's module, computed by this library, in a model of the framework: largest
errors against float64 of results, compiled ones and gradients; the loss in a training; whether
parameters have equal bits after they are carried in and out, after the framework's own file, and
after groupnorm.save; and the names of what is trained."""
HEADER = (
    *("framework", "result", "compiled", "gradient", "loss"),
    *("carried", "own file", "saved", "trained"),
)


def keras_findings(backend: str) -> Findings:
    """Return what a new process finds, as keras reads its backend once."""
    environment = os.environ | {"KERAS_BACKEND": backend}
    command = [sys.executable, "-m", "tests.frameworks", "--keras"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return Findings(*json.loads(done.stdout.splitlines()[-1]))


def row_of(found: Findings) -> tuple[str, ...]:
    """Return a line of the table."""
    said = {True: "equal bits", False: "DIFFERS"}
    return (
        found.framework,
        f"{found.result:.1e}",
        f"{found.compiled:.1e}",
        "" if found.gradient is None else f"{found.gradient:.1e}",
        "" if found.losses is None else "{:.2f} to {:.2f}".format(*found.losses),
        *(said[ok] for ok in (found.carried, found.round_trip, found.saved)),
        ", ".join(found.listed),
    )


def main() -> int:
    names = sys.argv[1:]
    if names == ["--keras"]:
        print(json.dumps(examine(keras_row(), np.random.default_rng(0))))
        return 0
    findings = [
        examine(row, np.random.default_rng(0))
        for row in FRAMEWORKS
        if not names or row.name in names
    ]
    findings += [keras_findings(b) for b in KERAS_BACKENDS if not names or "keras" in names]
    print(TITLE)
    print_table(HEADER, [row_of(found) for found in findings])
    return int(not all(f.carried and f.round_trip and f.saved for f in findings))


if __name__ == "__main__":
    sys.exit(main())
