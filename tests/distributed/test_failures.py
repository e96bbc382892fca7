"""Failures between processes: a clear error on all ranks, or the engine's error; never a result.

Two real ranks of gloo (PyTorch) or MPI (NumPy) run `programs/failing_ranks.py`. Errors that are
detected before or by the first exchange are checked in one run per engine. Failures that no rank
survives take two processes each. All processes have a time limit, and are killed at the end of the
test.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from groupnorm.testing import oracle
from tests import ROOT
from tests.distributed.test_mpi import run_mpi, skip_without_mpi
from tests.rows import CONTRACT

PROGRAM = "tests.programs.failing_ranks"
RANKS = 2
SECONDS = 100
PATIENCE = 3  # gloo's timeout for a rank that never arrives

needs_torch = pytest.mark.needs("torch")
needs_numpy = pytest.mark.needs("numpy")
ENGINES = [pytest.param("torch", marks=needs_torch), pytest.param("mpi", marks=needs_numpy)]


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    if request.param == "mpi":
        skip_without_mpi(request.config)
    return request.param


@pytest.fixture
def mpi(request) -> str:
    skip_without_mpi(request.config)
    return "mpi"


class Rank(NamedTuple):
    """A process's exit status and output, which is empty if the engine aborted it."""

    status: int
    out: dict[str, Any]
    came_so_far: bool
    log: str


def run(engine: str, scenario: str, folder: Path, ranks: int = RANKS) -> list[Rank]:
    """Run all ranks through one scenario."""
    if engine == "torch":
        return run_gloo([scenario], folder)[scenario]
    arguments = ("mpi", folder, scenario)
    status, log = run_mpi(ranks, folder, PROGRAM, *arguments, seconds=SECONDS)
    return [read(folder / scenario, rank, status, log) for rank in range(ranks)]


def run_gloo(scenarios: Sequence[str], folder: Path) -> dict[str, list[Rank]]:
    """Run both ranks through several scenarios in turn."""
    log = folder / "gloo.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, "torch", str(folder), *scenarios],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            start_new_session=True,
            stdout=output,
            stderr=output,
        )
    try:
        process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done after {SECONDS} s: {log.read_text()}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and both ranks with it
        process.wait()
    assert process.returncode == 0, log.read_text()
    ranks = {}
    for scenario in scenarios:
        inside = folder / scenario
        statuses = json.loads((inside / "statuses.json").read_text())
        ranks[scenario] = [
            read(inside, rank, status, (inside / f"{rank}.log").read_text())
            for rank, status in enumerate(statuses)
        ]
    return ranks


def read(folder: Path, rank: int, status: int, log: str) -> Rank:
    file = folder / f"{rank}.json"
    out = json.loads(file.read_text()) if file.exists() else {}
    return Rank(status, out, (folder / f"{rank}.well").exists(), log)


# Errors raised on all ranks -----------------------------------------------------------------------

DIFFER = ("axis_index_groups=", "rank 0", "rank 1", "same groups")
NOT_ALL = ("axis_index_groups=", "axis of size 2", "exactly once", "Split 0 ... 1")
SHAPES = ("x has", "axis_name", "rank 0", "rank 1", "(2, 4)", "Give all ranks the same batch")
DTYPES = ("dtype", "rank 0", "rank 1", "float32", "float64")
UNBOUND = ("axis_name='rows' is not bound", "bound names: ", "bind_axis(rows=")

# Expected in the message on both ranks, and in addition on rank 0 and on rank 1.
VALUE_ERRORS = {
    "index groups differ": (DIFFER, "((0, 1),)", "((0,), (1,))"),
    "index groups on one rank": (DIFFER, "None", "((0, 1),)"),
    "a rank left out": (NOT_ALL, "((0,),)", "((0,),)"),
    "a rank left out by one": (DIFFER, "((0, 1),)", "((0,),)"),
    "too many": (NOT_ALL, "((0, 1), (2,))", "((0, 1), (2,))"),
    "too many on one": (DIFFER, "((0, 1),)", "((0, 1, 2),)"),
    "other batch": ((*SHAPES, "(1, 4)"), "", ""),
    "other num_groups": ((*SHAPES, "(2, 2)"), "", ""),
    "other rank": ((*SHAPES, "(2, 5, 4)"), "", ""),
    "group_norm_vjp": ((*SHAPES, "(1, 4)"), "", ""),
    "group_statistics": ((*SHAPES, "(1, 4)"), "", ""),
    "other dtype": (DTYPES, "", ""),
    "other dtype of scale": (DTYPES, "", ""),
}
NAME_ERRORS = {
    "unbound": (*UNBOUND, "none"),
    "unbound, another bound": (*UNBOUND, "'columns'"),
    "unbound in a tuple": (*UNBOUND, "'columns'"),
    "unbound again": (*UNBOUND, "none"),
    "no communicator": ("axis_name=<object object", "bind_axis"),
    "nothing": ("axis_name=()", "at least one name"),
    "the same twice": ("axis_name", "more than once"),
    "all of them twice": ("axis_name", "more than once"),
}
# Each of these is also bound to a name, and used in a tuple with a correct one.
FOREIGN = {
    "torch": {
        "not a member": ("axis_name=", "new_group()", "not a member", "members only"),
        "not in the mesh": ("axis_name=DeviceMesh(", "not a member", "members only"),
        "mesh of two dimensions": ("axis_name=DeviceMesh(", "2 dimensions", "mesh['rows']"),
    },
    "mpi": {
        "not a member": ("axis_name", "MPI.COMM_NULL", "not a member", "members only"),
        "COMM_NULL": ("axis_name", "MPI.COMM_NULL", "not a member", "members only"),
        "intercommunicator": ("axis_name=<mpi4py.MPI.Intercomm", "Intracomm", "bind_axis"),
    },
}


def name_errors(engine: str) -> dict[str, tuple[str, ...]]:
    own = {"torch": "ProcessGroup", "mpi": "Intracomm"}[engine]
    expected = NAME_ERRORS | {"no communicator": (*NAME_ERRORS["no communicator"], own)}
    for name, words in FOREIGN[engine].items():
        expected |= dict.fromkeys((name, f"{name}, by name", f"{name}, in a tuple"), words)
    return expected


@pytest.mark.slow
def test_every_rank_raises_the_error(engine, tmp_path, subtests):
    ranks = run(engine, "orderly", tmp_path)
    for rank in ranks:
        assert rank.status == 0, rank.log
    names = name_errors(engine)
    afterwards = {f"{name}, afterwards" for name in VALUE_ERRORS} | {"afterwards"}
    assert set(ranks[0].out) == set(ranks[1].out) == set(VALUE_ERRORS) | set(names) | afterwards
    for name in ranks[0].out:
        for number, rank in enumerate(ranks):
            with subtests.test(name, rank=number):
                out = rank.out[name]
                if name in afterwards:
                    check_number(out)
                elif name in names:
                    check_error(out, "AxisNameError", names[name])
                else:
                    words, *own = VALUE_ERRORS[name]
                    check_error(out, "ArgumentValueError", (*words, own[number]))


def check_error(out: dict, kind: str, words: tuple[str, ...]) -> None:
    assert "returned" not in out, out
    assert kind in out["types"], out
    for word in words:
        assert word in out["message"], f"{word!r} is not in: {out['message']}"


def check_number(out: dict) -> None:
    """Both ranks have the same values, so the pooled statistics equal those of either."""
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    want = np.abs(oracle.group_norm(x, num_groups=4)).max()
    assert "returned" in out, out
    assert abs(out["returned"] - want) <= CONTRACT * max(1, want)


@pytest.mark.slow
@needs_numpy
def test_every_rank_of_a_grid_raises_the_error(mpi, tmp_path, subtests):
    """Including a rank that shares no communicator with the one that differs."""
    ranks = run(mpi, "in a grid", tmp_path, ranks=4)
    for rank in ranks:
        assert rank.status == 0, rank.log
    shapes = ("(1, 4)", "(2, 4)", "Give all ranks the same batch")
    expected = {
        "other batch": ("ArgumentValueError", shapes),
        "other dtype": ("ArgumentValueError", ("dtype", "float32", "float64")),
        "index groups": ("ArgumentValueError", ("axis_index_groups=", "same groups")),
        "one is known": ("ArgumentValueError", shapes),
        "no grid": ("AxisNameError", ("axis_name", "more than once")),
    }
    for name, (kind, words) in expected.items():
        for number, rank in enumerate(ranks):
            with subtests.test(name, rank=number):
                check_error(rank.out[name], kind, words)
                if f"{name}, afterwards" in rank.out:
                    check_number(rank.out[f"{name}, afterwards"])


# Failures that no rank survives -------------------------------------------------------------------

# Shapes (dtypes, groups) are known, and one rank changes to new ones, or to other known ones.
CHANGES = ("other batch", "other dtype", "other index groups", "both batches known")
MISMATCH = {"torch": "Received data size doesn't match expected size", "mpi": "Message truncated"}


def check_none_survived(ranks: list[Rank]) -> None:
    for rank in ranks:
        assert rank.came_so_far, rank.log
        assert "returned" not in rank.out, rank.out
        assert rank.status != 0, rank.log
        assert "GroupNormError" not in rank.out.get("types", ()), rank.out


def check_change(engine: str, ranks: list[Rank]) -> None:
    """The engine detects that the sizes differ; no rank waits forever or gets a result."""
    check_none_survived(ranks)
    assert any(MISMATCH[engine] in rank.log for rank in ranks), [rank.log for rank in ranks]


def check_lost_rank_of_gloo(ranks: list[Rank]) -> None:
    check_none_survived(ranks)
    left = ranks[0].out
    assert "RuntimeError" in left["types"]
    assert "gloo" in left["message"]
    assert "peer" in left["message"]  # ... closed or reset the connection


def check_rank_of_gloo_that_raises(ranks: list[Rank]) -> None:
    check_lost_rank_of_gloo(ranks)
    assert ranks[1].out["message"] == "only on rank 1"


def check_rank_of_gloo_that_never_comes(ranks: list[Rank]) -> None:
    check_none_survived(ranks)
    left = ranks[0].out
    assert "RuntimeError" in left["types"]
    assert f"imed out waiting {1000 * PATIENCE}ms" in left["message"]


@pytest.mark.slow
@needs_torch
def test_ranks_of_gloo_that_fail(tmp_path, subtests):
    checks = dict.fromkeys(CHANGES, lambda ranks: check_change("torch", ranks)) | {
        "dies": check_lost_rank_of_gloo,
        "dies before backward": check_lost_rank_of_gloo,
        "raises": check_rank_of_gloo_that_raises,
        "never comes": check_rank_of_gloo_that_never_comes,
    }
    ranks = run_gloo(list(checks), tmp_path)
    for name, check in checks.items():
        with subtests.test(name):
            check(ranks[name])


@pytest.mark.slow
@needs_numpy
@pytest.mark.parametrize("change", CHANGES)
def test_a_rank_of_mpi_changes(mpi, change, tmp_path):
    check_change(mpi, run(mpi, change, tmp_path))


@pytest.mark.slow
@needs_numpy
@pytest.mark.parametrize("scenario", ["dies", "raises"])
def test_a_rank_of_mpi_is_lost(mpi, scenario, tmp_path):
    """An exception ends the other ranks because mpi4py runs the program: python -m mpi4py."""
    ranks = run(mpi, scenario, tmp_path)
    check_none_survived(ranks)
    assert not ranks[0].out
    if scenario == "raises":
        assert ranks[1].out["message"] == "only on rank 1"
        assert "LookupError: only on rank 1" in ranks[1].log
        assert "MPI_Abort" in ranks[1].log


@pytest.mark.slow
def test_one_rank_changes_to_other_statistics_of_equal_size(engine, tmp_path):
    """Shapes (2, 4) and (4, 2), both known: no engine can distinguish them."""
    ranks = run(engine, "statistics of equal size", tmp_path)
    for number, rank in enumerate(ranks):
        assert rank.came_so_far, rank.log
        assert "ArgumentValueError" in rank.out["types"], rank.out
        assert f"on rank {number}, and rank {1 - number} exchanges others" in rank.out["message"]
