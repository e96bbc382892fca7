"""``--backends`` selects exactly the named rows; an unknown name ends the run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests import ROOT
from tests.conftest import LIBRARIES, PEERS
from tests.rows import ROWS

FILE = "tests/portable/test_empty.py"


def collect(*arguments: str, program=("-m", "pytest")) -> subprocess.CompletedProcess:
    """Collect tests in another process that does not inherit this run's options."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV_"))}
    return subprocess.run(
        [sys.executable, *program, "--collect-only", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def rows(output: str) -> set[str]:
    """Return the rows in the collected tests' ids, including "none"."""
    parameters = re.findall(r"^\S+::\w+\[([^]]*)\]", output, re.M)
    assert parameters, output
    known = set(ROWS) | {"none"}
    return {part for text in parameters for part in text.split("-") if part in known}


UNKNOWN = ["nunpy", "numpy,toch", "torch:compiled", ""]
# A library's name selects all its rows; "none" is the row of a test that needs another library.
SELECTED = {
    "numpy": {"numpy", "numpy:readonly", "none"},
    "numpy:readonly": {"numpy:readonly", "none"},
    "numpy, torch": {"numpy", "numpy:readonly", "torch"},
    "array_api_strict": {"array_api_strict", "array_api_strict:device1", "none"},
    "numpy:readonly,flax": {"numpy:readonly", "none"},  # a package without rows
}
EVERY_OPTION = f"""
import sys, pytest
for option in {[*UNKNOWN, *SELECTED]}:
    code = pytest.main([*sys.argv[1:], "--backends", option])
    print("\\nended:", repr(option), int(code), flush=True)
"""


@pytest.fixture(scope="module")
def collected() -> dict[str, tuple[int, str]]:
    """Return the exit status and the output for every option: one process runs them all."""
    done = collect(FILE, program=("-c", EVERY_OPTION))
    assert done.returncode == 0, done.stdout
    parts = re.split(r"^ended: '(.*)' (\d+)\n", done.stdout, flags=re.M)
    return {
        option: (int(code), output)
        for output, option, code in zip(parts[:-1:3], parts[1::3], parts[2::3], strict=True)
    }


@pytest.mark.parametrize("option", UNKNOWN)
def test_an_unknown_name_ends_the_run(option, collected):
    code, output = collected[option]
    assert code == pytest.ExitCode.USAGE_ERROR, output
    assert "--backends" in output
    assert repr(option.split(",")[-1]) in output
    assert "array_api_strict" in output  # what could have been meant
    assert "::" not in output


@pytest.mark.parametrize("option", SELECTED)
def test_only_the_named_rows_are_collected(option, collected):
    code, output = collected[option]
    assert code == 0, output
    assert rows(output) == SELECTED[option]


def test_files_that_import_numpy_are_collected_for_every_library():
    """NumPy is always installed, so importing it never excludes a file."""
    done = collect("--backends", "array_api_strict")
    assert done.returncode == 0, done.stdout
    assert "test_axes.py" in done.stdout
    assert "test_flax_linen.py" not in done.stdout


@pytest.mark.needs("jax", "flax")
def test_files_that_import_a_named_package_without_rows_are_collected():
    done = collect("--backends", "jax,flax", "tests/peers")
    assert done.returncode == 0, done.stdout
    assert "test_flax_linen.py" in done.stdout
    assert "test_equinox.py" not in done.stdout


def test_numpy_alone_loads_no_other_library():
    """All files are considered; those with a top-level import of another library are excluded."""
    others = sorted((LIBRARIES | PEERS) - {"numpy"})
    program = f"""
import sys, pytest
code = pytest.main(sys.argv[1:])
print("loaded:", *(name for name in {others} if name in sys.modules))
sys.exit(code)
"""
    done = collect("--backends", "numpy", program=("-c", program))
    assert done.returncode == 0, done.stdout
    assert re.search(r"^loaded:$", done.stdout, re.M), done.stdout[-500:]
    assert "test_axes.py" in done.stdout
    assert "test_flax_linen.py" not in done.stdout
