"""The cache of compiled kernels on disk only saves time: no state of it can fail a call."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba", reason="the kernels need numba, which is not installed here")

PROGRAM = """
import logging, os, sys
logging.basicConfig(level=logging.WARNING)
import numpy as np
from groupnorm import group_norm
if "full" in sys.argv:
    from numba.core import caching
    def save(*_):
        raise OSError(28, "No space left on device")
    caching.IndexDataCacheFile._save_data = save
x = np.arange(24, dtype=np.float32).reshape(2, 3, 4) % 5
for _ in range(2):
    y = group_norm(x, num_groups=1, implementation=None if "home" in sys.argv else "fused")
for kind in ("relu",) if "full" in sys.argv else ():
    group_norm(x, num_groups=1, activation=kind)
print(float(np.abs(y).sum().round(3)))
"""


def start(cache, *arguments, **environment):
    known = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=known, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    return float(out), log


def test_damaged_files(tmp_path):
    """Files cut short, empty, foreign or with damaged machine code are replaced."""
    want, _ = finish(start(tmp_path))
    for pattern, damage in (
        ("*.nbi", lambda content: content[:300]),
        ("*.nbi", lambda content: b""),
        ("*.nbc", lambda content: b"\x80\x05not a kernel"),
        # As a power failure leaves it. LLVM would end the process.
        ("*.nbc", lambda content: content.replace(b"\x7fELF", bytes(4))),
    ):
        for path in tmp_path.rglob(pattern):
            content = path.read_bytes()
            assert damage(content) != content
            path.write_bytes(damage(content))
        got, log = finish(start(tmp_path))
        assert got == want
        assert log.count("cannot be read from") == 1
        assert log.count("compiled the CPU kernel") == 1
        got, log = finish(start(tmp_path))
        assert (got, log) == (want, "")


def test_a_full_disk(tmp_path):
    """Two kernels cannot be stored; the log says so once."""
    _, log = finish(start(tmp_path, "full"))
    assert log.count("cannot be stored in") == 1
    assert "No space left on device" in log


def test_two_processes_at_once(tmp_path):
    results = [finish(process)[0] for process in [start(tmp_path) for _ in range(2)]]
    assert results[0] == results[1]
    assert finish(start(tmp_path)) == (results[0], "")


def test_no_folder_can_be_written(tmp_path):
    """Neither the folder of the variable nor one in a home directory."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    _, log = finish(
        start(blocked / "cache", "home", HOME=str(blocked), XDG_CACHE_HOME=str(blocked))
    )
    assert "Error" not in log
