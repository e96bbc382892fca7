"""A short run of `tests/programs/soak.py`; run it alone, with more seconds, for a real one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ROOT


@pytest.mark.slow
@pytest.mark.needs("torch")
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_results_are_right_and_memory_is_flat_under_changing_calls_from_several_threads():
    """In so short a run caches are still being filled: only a leak of buffers is that large."""
    done = subprocess.run(
        [sys.executable, "tests/programs/soak.py", "9", "--slack", "64"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout
