"""Each instruction set of the compiled core gives accurate results, not only the one in use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.kernels.core import needs_core

core = needs_core()


def run(name, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600,
        check=False, env={**os.environ, "GROUPNORM_INSTRUCTIONS": name},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(name):
    if name == core.instructions:
        pytest.skip(f"{name} is in use: the same tests have run with it in this process")
    done = run(name, "-c", f"import {core.__name__} as core; print(core.instructions)")
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != name:
        pytest.skip(f"this processor has no {name}: {done.stdout.strip()} is used instead")
    done = run(
        name, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backends", "numpy",
        "tests/kernels/test_core_accuracy.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


LOADED = "from groupnorm.backends.kernels.cpu.availability import core; print(core().instructions)"


@pytest.mark.parametrize("unknown", ["", "sse9", "AVX2"])
def test_an_unknown_instruction_set_changes_nothing_and_is_logged(unknown):
    best = run("avx512", "-c", LOADED).stdout
    done = run(unknown, "-c", LOADED)
    assert done.stdout == best
    logged = f"groupnorm ignores GROUPNORM_INSTRUCTIONS={unknown!r} and uses '{best.strip()}'"
    assert done.stderr.startswith(logged if unknown else "")
    assert bool(done.stderr) == bool(unknown)


def test_an_instruction_set_in_use_is_not_logged():
    assert run(core.instructions, "-c", LOADED).stderr == ""
