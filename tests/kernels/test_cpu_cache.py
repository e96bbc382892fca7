"""The cache of compiled kernels on disk only saves time: no state of it can fail a call."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import numpy as np
import pytest

from groupnorm import group_norm
from groupnorm.backends.kernels.cpu import availability
from groupnorm.backends.kernels.gpu import build

pytest.importorskip("numba", reason="the kernels need numba, which is not installed here")

PROGRAM = """
import logging, os, sys
logging.basicConfig(level=logging.WARNING)
import numpy as np
from groupnorm import group_norm
from groupnorm.backends.kernels.cpu import availability
if "full" in sys.argv:
    from numba.core import caching
    def save(*_):
        raise OSError(28, "No space left on device")
    caching.IndexDataCacheFile._save_data = save
if "read-only" in sys.argv:  # all folders, whoever runs the tests
    from numba.core import caching
    def ensure_cache_path(locator):
        raise OSError(30, "Read-only file system")
    caching._CacheLocator.ensure_cache_path = ensure_cache_path
x = np.arange(24, dtype=np.float32).reshape(2, 3, 4) % 5
for _ in range(2):
    y = group_norm(x, num_groups=1, implementation="fused")
for kind in ("relu",) if {"full", "two"} & set(sys.argv) else ():
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
    """Files cut short, foreign or with damaged machine code are replaced."""
    want, _ = finish(start(tmp_path))
    for pattern, damage in (
        ("*.nbi", lambda content: content[:300]),
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
    assert "cached on disk" not in log
    assert "No space left on device" in log


def test_two_processes_at_once(tmp_path):
    results = [finish(process)[0] for process in [start(tmp_path) for _ in range(2)]]
    assert results[0] == results[1]
    assert finish(start(tmp_path)) == (results[0], "")


def test_a_home_that_is_no_folder(tmp_path):
    """Neither the folder of the variable nor one in a home directory can be written."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    _, log = finish(start(blocked / "cache", HOME=str(blocked), XDG_CACHE_HOME=str(blocked)))
    assert "Error" not in log


def test_no_folder_can_be_written(monkeypatch):
    """Two kernels are compiled in memory; the log says why once, and does not say they are kept."""
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4) % 5
    y = group_norm(x, num_groups=1, implementation="portable")
    got, log = finish(start("", "read-only", "two"))
    assert got == float(np.abs(y).sum().round(3))
    assert log.count("no folder that can be written; NUMBA_CACHE_DIR") == 1
    assert log.count("compiled the CPU kernel") == 2
    assert "cached on disk" not in log


BROKEN = [AttributeError, RuntimeError, OSError, SystemError, ValueError, ImportError]


@pytest.mark.parametrize("library", ["numba", "triton"])
@pytest.mark.parametrize("error", [*BROKEN, ModuleNotFoundError])
def test_a_broken_library_is_logged_once(error, library, monkeypatch, caplog):
    """Whatever its import raises; one that is not installed needs no warning."""

    def refuse(name):
        raise error("for a reason")

    if library == "numba":
        monkeypatch.setattr(availability, "kernels", refuse)
        why_none = functools.lru_cache(availability._why_none.__wrapped__)
        monkeypatch.setattr(availability, "_why_none", why_none)
        whys = [availability.why_unavailable.__wrapped__(float16) for float16 in (False, True)]
    else:
        monkeypatch.setattr(build.importlib, "import_module", refuse)
        why_unavailable = functools.lru_cache(build.why_unavailable.__wrapped__)
        whys = [why_unavailable(), why_unavailable()]
    assert all("for a reason" in why.reason for why in whys)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (error is not ModuleNotFoundError)
    assert all("for a reason" in message for message in said)


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        ("raise OSError('libllvmlite.so cannot be loaded')", {}),
        ("raise ValueError('numpy.dtype size changed')", {}),
        (None, {"NUMBA_NUM_THREADS": "0"}),
    ],
)
def test_a_call_with_a_broken_numba(code, environment, tmp_path):
    """Values are right; `available_backends` and the log say why there are no kernels."""
    if code is not None:
        (tmp_path / "numba.py").write_text(code)
        environment = {"PYTHONPATH": str(tmp_path)}
    program = (
        "import logging, numpy as np, groupnorm\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "x = np.array([[1, 3], [5, 5]], np.float32)\n"
        "for _ in range(2): y = groupnorm.group_norm(x, num_groups=1, epsilon=3.0)\n"
        "info = next(b for b in groupnorm.available_backends() if b.name == 'numpy')\n"
        "print(y.tolist(), info.error, info.implementations['cpu'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split("\n")[0] == "[[-0.5, 0.5], [0.0, 0.0]] None ('portable',)", done.stderr
    assert done.stderr.count("the kernels for CPUs cannot be loaded") == 1


@pytest.mark.parametrize("library", ["numpy", pytest.param("jax", marks=pytest.mark.needs("jax"))])
def test_a_numba_that_compiles_nothing(library, tmp_path):
    """NUMBA_DISABLE_JIT=1, for coverage and debuggers; also without kernels compiled earlier."""
    program = (
        "import numpy as np, groupnorm\n"
        f"import {'jax.numpy' if library == 'jax' else 'numpy'} as xp\n"
        "x = xp.asarray(np.array([[1, 3], [5, 5]], np.float32))\n"
        "y, pullback = groupnorm.group_norm_vjp(x, num_groups=1, epsilon=3.0)\n"
        "print(y.tolist(), pullback(x).x.shape)\n"
        "for info in groupnorm.available_backends():\n"
        f"    if info.name == {library!r}: print(info.error, info.why_not_fused)\n"
    )
    # Without the flags that give this process several JAX devices.
    environment = {"NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": str(tmp_path), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("[[-0.5, 0.5], [0.0, 0.0]] (2, 2)\nNone "), done.stderr
    assert "NUMBA_DISABLE_JIT is set" in done.stdout
