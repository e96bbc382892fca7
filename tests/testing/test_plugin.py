"""The pytest plugin, in a project of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("array_api_strict")

ROOT = Path(__file__).parents[2]
SOFTMAX = """
import numpy as np, pytest
from groupnorm import testing

def softmax(x):
    xp = testing.row_of(x).xp
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)

@pytest.mark.rows("numpy:*", "array_api_strict", without={"numpy:readonly": "it is a test"})
def test_softmax(row):
    x = testing.hard_inputs((3, 5), names=("normal", "ramp"))
    testing.check(softmax, inputs=x, rows=[row]).raise_if_wrong()

def test_cubes(row):
    x = testing.hard_inputs((3,), names=("normal",))
    cubes = lambda x: x * x * x * FACTOR
    testing.check(cubes, inputs=x, reference=lambda x: x**3, rows=[row]).raise_if_wrong()
"""


def run(
    folder: Path, source: str, *options: str, others: bool = True
) -> subprocess.CompletedProcess[str]:
    (folder / "test_of_a_user.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_groupnorm", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *options, str(folder)], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "",
             "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "" if others else "1", "PYTEST_PLUGINS": ""},
    )  # fmt: skip


@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["", "xdist"])
def test_rows_and_the_closing_table(processes, tmp_path):
    source = SOFTMAX.replace("FACTOR", "1")
    done = run(tmp_path, source, "-rs", "--rows", "numpy:*,array_api_strict", *processes)
    assert "5 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "it is a test" in done.stdout
    table = done.stdout.split("the largest error of each row")[1]
    assert {"numpy", "array_api_strict"} <= set(table.split())


def test_a_wrong_row_is_shown(tmp_path):
    done = run(tmp_path, SOFTMAX.replace("FACTOR", "1.01"), "--rows", "numpy")
    assert done.returncode == 1
    assert "test_cubes[numpy]" in done.stdout
    assert "numpy, input 'normal': result:" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--rows", "nunpy"), "is not known"), (("--rows", "cupy"), "cannot be used here")],
)
def test_rows_that_do_not_exist(options, message, tmp_path):
    done = run(tmp_path, SOFTMAX, *options)
    assert done.returncode != 0
    assert message in done.stdout


def test_a_typing_error_in_a_mark_is_an_error(tmp_path):
    done = run(tmp_path, SOFTMAX.replace("array_api_strict", "array_api_strikt"))
    assert done.returncode != 0
    assert "'array_api_strikt' is not known" in done.stdout


def test_rows_that_exclude_a_test_skip_it(tmp_path):
    done = run(tmp_path, SOFTMAX.replace('"numpy:*", ', ""), "-rs", "--rows", "numpy")
    assert "--rows selects none of its rows" in done.stdout


OWN = {
    "fixture": "@pytest.fixture\ndef row(): return 3\ndef test(row): assert row == 3\n",
    "parameter": "@pytest.mark.parametrize('row', [3])\ndef test(row): assert row == 3\n",
    "hook": "def pytest_generate_tests(metafunc): metafunc.parametrize('row', [3])\n"
    "def test(row): assert row == 3\n",
}


@pytest.mark.parametrize("kind", OWN)
def test_a_row_of_the_projects_own_stays_so(kind, tmp_path):
    done = run(tmp_path, "import pytest\n" + OWN[kind])
    assert "1 passed" in done.stdout, done.stdout
    assert "error" not in done.stdout


def test_projects_that_do_not_use_it_import_nothing(tmp_path):
    """Neither this package, nor any library of arrays, when the plugin is loaded."""
    source = (
        "import sys\n"
        "def test(): assert not {'groupnorm', 'numpy', 'torch', 'jax'} & set(sys.modules)\n"
    )
    done = run(tmp_path, source, others=False)
    assert "1 passed" in done.stdout, done.stdout
    assert "largest error" not in done.stdout
