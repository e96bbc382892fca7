"""Statistics pooled over two real JAX processes of two devices each, connected by gloo.

Processes start slowly, so one run of `programs/jax_processes.py` computes all cases, and every case
is a subtest here. All results are compared with the oracle on the whole array.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import jax  # noqa: F401  (without JAX, conftest leaves this file out)
import numpy as np
import pytest

from tests import ROOT
from tests.programs.jax_processes import NAMED, PROCESSES, SHARDS, UNNAMED
from tests.sharding import Case, check, data

pytestmark = [pytest.mark.needs("jax"), pytest.mark.slow]

SECONDS = 300
# For a process whose peer is lost: it starts, compiles once, and gives up on the peer after ten.
SECONDS_TO_GIVE_UP = 120


@contextlib.contextmanager
def processes(folder: Path, *arguments: str):
    """Start all processes, and kill the remaining ones at the end in any case."""
    # Do not inherit the flags that give pytest's own process four devices.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen] = []
    try:
        for rank in range(PROCESSES):
            command = [sys.executable, "-m", "tests.programs.jax_processes"]
            with (folder / f"{rank}.log").open("w") as log:
                started.append(
                    subprocess.Popen(
                        [*command, str(rank), str(folder), *arguments],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=log,
                    )
                )
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def ended_by(deadline: float, process: subprocess.Popen) -> bool:
    try:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def logs(folder: Path) -> str:
    return "\n".join((folder / f"{rank}.log").read_text() for rank in range(PROCESSES))


def assembled(parts: list[dict], *, equal: bool = False) -> np.ndarray:
    """Assemble the parts of all processes; parts that several processes have must be equal."""
    shape = parts[0]["shape"]
    out, times = np.full(shape, np.nan, np.float32), np.zeros(shape, int)
    for part in parts:
        assert part["shape"] == shape
        for index, values in part["parts"]:
            assert values.dtype == np.float32
            if equal and times[index].any():
                np.testing.assert_array_equal(out[index], values)
            out[index] = values
            times[index] += 1
    assert (times == (SHARDS if equal else 1)).all(), "each device has its shard, or everything"
    return out


def check_named(case: Case, results: list[dict]) -> None:
    y, dx, dscale, dbias = (
        assembled([result[k] for result in results]) for k in ("y", "dx", "dscale", "dbias")
    )
    assert np.isfinite(y).all()
    # A shard's parameter gradients are its contribution to the sum.
    shares = (a.sum(axis=0, dtype=np.float64) for a in (dscale, dbias))
    check(case, case.unpadded(y), case.unpadded(dx), *shares)


def check_unnamed(case: Case, results: list[dict]) -> None:
    y, dx = (assembled([result[k] for result in results]) for k in ("y", "dx"))
    # Parameter gradients are complete, and the same on every device.
    whole = [assembled([result[k] for result in results], equal=True) for k in ("dscale", "dbias")]
    check(case, y, dx, *whole)


CHECKS = {case.name: (check_named, case) for case in NAMED}
CHECKS |= {case.name: (check_unnamed, case) for case in UNNAMED}


def test_processes_equal_the_whole(tmp_path, subtests):
    deadline = time.monotonic() + SECONDS
    with processes(tmp_path) as started:
        late = [not ended_by(deadline, process) for process in started]
    assert not any(late), f"not done after {SECONDS} s:\n{logs(tmp_path)}"
    assert [process.returncode for process in started] == [0] * PROCESSES, logs(tmp_path)
    everyone = [
        pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(PROCESSES)
    ]
    assert all(set(one) == set(CHECKS) for one in everyone)
    for name, (checker, case) in CHECKS.items():
        with subtests.test(name):
            results = [one[name] for one in everyone]
            for rank, result in enumerate(results):
                assert "error" not in result, f"process {rank}: {result['error']}"
            checker(case, results)


@pytest.mark.parametrize("lost", range(PROCESSES), ids=["the coordinator", "another"])
def test_a_lost_process_ends_the_other_with_an_error(lost, tmp_path):
    deadline = time.monotonic() + SECONDS_TO_GIVE_UP
    survivor = 1 - lost
    with processes(tmp_path, str(lost)) as started:
        late = [not ended_by(deadline, process) for process in started]
    assert not late[lost], f"it did not finish:\n{logs(tmp_path)}"
    assert started[lost].returncode == 1, logs(tmp_path)
    log = (tmp_path / f"{survivor}.log").read_text()
    assert not late[survivor], f"hung without the other process:\n{log}"
    assert started[survivor].returncode != 0
    # The engine's message: of the collective, or of the service that monitors the processes.
    assert re.search("Gloo .* failed|JAX distributed service detected fatal errors", log), log


def test_missing_or_wrong_parts_are_detected():
    """The control: the results of a single process must fail the comparison."""
    case = NAMED[1]
    whole = data(case)
    every = {
        "y": case.padded(whole.y.astype(np.float32), 0),
        "dx": case.padded(whole.gradients.x.astype(np.float32), 0),
        "dscale": np.tile(np.float32(whole.gradients.scale / SHARDS), (SHARDS, 1)),
        "dbias": np.tile(np.float32(whole.gradients.bias / SHARDS), (SHARDS, 1)),
    }

    def held_by(rank: int, error: float = 0.0) -> dict:
        mine = range(2 * rank, 2 * rank + 2)
        return {
            k: {
                "shape": a.shape,
                "parts": [((slice(i, i + 1),), a[i : i + 1] + error) for i in mine],
            }
            for k, a in (every.items())
        }

    check_named(case, [held_by(0), held_by(1)])
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        check_named(case, [held_by(0), held_by(1, np.float32(1e-4))])
    with pytest.raises(AssertionError, match="each device"):
        check_named(case, [held_by(0)])
