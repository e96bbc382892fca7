"""``--backends`` selects what it names and nothing else; a name it does not know ends the run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests import ROOT
from tests.conftest import LIBRARIES, PEERS
from tests.rows import Backend

FILE = "tests/portable/test_empty.py"


def collect(*arguments: str, program=("-m", "pytest")) -> subprocess.CompletedProcess:
    """Collect tests in another process, which knows nothing of how this one was started."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV_"))}
    return subprocess.run(
        [sys.executable, *program, "--collect-only", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def rows(collected: subprocess.CompletedProcess) -> set[str]:
    """Return the rows the collected tests' identifiers name, "none" among them."""
    assert collected.returncode == 0, collected.stdout + collected.stderr
    parameters = re.findall(r"^\S+::\w+\[([^]]*)\]", collected.stdout, re.M)
    assert parameters, collected.stdout
    known = {row.value for row in Backend} | {"none"}
    return {part for text in parameters for part in text.split("-") if part in known}


@pytest.mark.parametrize("option", ["nunpy", "numpy,toch", "torch:compiled", ""])
def test_an_unknown_name_ends_the_run(option):
    done = collect("--backends", option, FILE)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    message = done.stdout + done.stderr
    assert "--backends" in message
    assert repr(option.split(",")[-1]) in message
    assert "array_api_strict" in message  # what could have been meant
    assert "::" not in done.stdout


# A library's name selects all its rows; "none" is what a test gets that wants another library's.
SELECTED = {
    "numpy": {"numpy", "numpy:readonly", "none"},
    "numpy:readonly": {"numpy:readonly", "none"},
    "numpy, torch": {"numpy", "numpy:readonly", "torch"},
    "array_api_strict": {"array_api_strict", "array_api_strict:device1", "none"},
}


@pytest.mark.parametrize("option", SELECTED)
def test_only_the_named_rows_are_collected(option):
    assert rows(collect("--backends", option, FILE)) == SELECTED[option]


def test_files_that_import_numpy_are_for_all_libraries():
    """It is always there; without a file's name, none is left out for it."""
    done = collect("--backends", "array_api_strict")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_axes.py" in done.stdout
    assert "test_peers.py" not in done.stdout


def test_numpy_alone_loads_no_other_library():
    """All files are looked at; those that import another library at their top are left out."""
    others = sorted((LIBRARIES | PEERS) - {"numpy"})
    program = f"""
import sys, pytest
code = pytest.main(sys.argv[1:])
print("loaded:", *(name for name in {others} if name in sys.modules))
sys.exit(code)
"""
    done = collect("--backends", "numpy", program=("-c", program))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^loaded:$", done.stdout, re.M), done.stdout[-500:]
    assert "test_axes.py" in done.stdout
    assert "test_peers.py" not in done.stdout
