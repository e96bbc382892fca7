"""NumPy arrays pooled over two and four real MPI processes, started by mpiexec.

Processes start slowly, so one run of `programs/mpi_ranks.py` computes all cases of a world size,
and every case is a subtest here. All results are compared with the oracle on the whole array.
pytest's own processes do not initialize MPI.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from groupnorm.testing import oracle
from tests import ROOT
from tests.portable.test_dtypes import STEPS, assert_rounded
from tests.rows import CONTRACT, CONTRACT_64, GRADIENT, assert_close, assert_gradient
from tests.sharding import NUM_GROUPS, Case, cases, check, data

pytestmark = pytest.mark.needs("numpy")

# From the package mpich, in the same environment as mpi4py.
MPIEXEC = Path(sys.executable).with_name("mpiexec")
SECONDS = 120

# Tolerance of gradients for each dtype, relative to the largest: dx, and the parameters'.
ERRORS = {
    "float16": (2.0 ** -STEPS["float16"][0], GRADIENT),
    "bfloat16": (2.0 ** -STEPS["bfloat16"][0], GRADIENT),
    "float32": (GRADIENT, GRADIENT),
    ">f4": (GRADIENT, GRADIENT),
    "float64": (1e-14, 1e-14),
    "longdouble": (1e-14, 1e-14),
    "complex64": (1e-5, 1e-5),
}


def skip_without_mpi(config) -> None:
    """Skip if only some backends are selected and MPI is not installed."""
    if config.getoption("--backends") == "all":
        return
    if importlib.util.find_spec("mpi4py") is None or not MPIEXEC.exists():
        pytest.skip("--backends excludes mpi4py or mpich, and they are not installed")


def run_mpi(world: int, folder: Path, program: str, *arguments, seconds: float = SECONDS):
    """Run a program on `world` ranks; return mpiexec's exit status and the output of all ranks."""
    assert MPIEXEC.exists(), f"{MPIEXEC} is missing: pip install mpi4py mpich"
    # With mpi4py as the runner, an exception on one rank ends all ranks.
    python = [sys.executable, "-m", "mpi4py", "-m", program]
    log = folder / "mpi.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(MPIEXEC), "-n", str(world), *python, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done after {seconds} s:\n{log.read_text()}")
    finally:
        process.kill()  # and all ranks with it
        process.wait()
    return process.returncode, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_the_whole(world, tmp_path, subtests, pytestconfig):
    skip_without_mpi(pytestconfig)
    status, log = run_mpi(world, tmp_path, "tests.programs.mpi_ranks", tmp_path)
    assert status == 0, log
    ranks = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(world)]
    checks = checks_of(world)
    left_out = set() if importlib.util.find_spec("ml_dtypes") else {"dtype bfloat16"}
    assert set(ranks[0]) == set(checks) - left_out
    for name in ranks[0]:
        with subtests.test(name):
            shards = [rank[name] for rank in ranks]
            for number, shard in enumerate(shards):
                assert "failed" not in shard, f"rank {number}: {shard['failed']}"
            checks[name](shards)


def checks_of(world: int) -> dict:
    """Return the function that checks the shards of each job."""
    uneven = {2: (5, 2), 4: (5, 2, 3, 1)}[world]
    alone = tuple((rank,) for rank in range(world))
    crossed = {2: ((1, 0),), 4: ((0, 3), (2, 1))}[world]
    masked = Case("masked job", uneven, "shard 1")
    exact = Case("masked job, exact variance", uneven, "shard 1", fast=False)
    split = Case("split job", uneven, "at random", index_groups=crossed)
    plain = Case("plain job", uneven, offset=1e3)

    def whole(case):
        return lambda shards: check_shards(case, shards)

    checks = {}
    for case in cases(world):
        checks[case.name] = checks[f"{case.name}, function"] = whole(case)
    checks |= {
        "layer holds the communicator": whole(masked),
        "function is given a name": whole(masked),
        "alone": whole(Case("alone job", uneven, index_groups=alone)),
        "channels first": whole(masked),
        "grid": whole(masked),
        "grid, exact": whole(exact),
        "grid, index groups": whole(split),
        "pullback of an unbound name": lambda shards: check_unbound(masked, shards),
        "statistics": lambda shards: check_statistics(masked, shards),
        "statistics, offset": lambda shards: check_statistics(plain, shards),
        "statistics, index groups": lambda shards: check_statistics(split, shards),
        "same bits twice": check_same_bits,
        "no samples": check_no_samples,
    }
    for name in ("Fortran order", "strided", "backwards"):
        checks[name] = lambda shards: check_layout(plain, shards)
    for name in ("collectives", "collectives, exact", "collectives, index groups"):
        checks[name] = check_collectives
    for name in ERRORS:
        checks[f"dtype {name}"] = lambda shards, name=name: check_dtype(name, shards)
    return checks


def check_shards(case: Case, shards: list[dict]) -> None:
    y, vjp_y, dx = (joined(shards, k) for k in ("y", "vjp_y", "dx"))
    dscale, dbias = (sum(shard[k] for shard in shards) for k in ("dscale", "dbias"))
    check(case, y, dx, dscale, dbias)
    check(case, vjp_y, dx, dscale, dbias)


def joined(shards: list[dict], name: str) -> np.ndarray:
    return np.concatenate([shard[name] for shard in shards], axis=1)


def check_layout(case: Case, shards: list[dict]) -> None:
    assert not any(shard["in order"] for shard in shards)
    check_shards(case, shards)


def check_unbound(case: Case, shards: list[dict]) -> None:
    check_shards(case, shards)
    for shard in shards:
        assert shard["equal"] == [True, True]
        assert shard["error"].startswith("AxisNameError: axis_name='late' is not bound")
        assert "bind_axis(late=" in shard["error"]


def check_collectives(shards: list[dict]) -> None:
    """One more for a new shape: the check that all ranks have the same."""
    once = ("forward", "vjp forward", "backward", "statistics", "other handle")
    for shard in shards:
        assert shard == {"first": 2, "new shape": 2} | dict.fromkeys(once, 1)


def check_dtype(name: str, shards: list[dict]) -> None:
    x, dy, y = (joined(shards, k) for k in ("x", "dy", "y"))
    scale, bias = shards[0]["scale"], shards[0]["bias"]
    for shard in shards:
        assert shard["dtypes"] == [str(np.dtype(name)) if name != "bfloat16" else name] * 2
        # One sum forward, one backward. Complex values are exchanged as pairs of real ones.
        wide = {"float64": "<f8", "longdouble": np.dtype("longdouble").str}
        assert shard["travelled"] == [wide.get(name, "<f4")] * 2
    want = oracle.group_norm(x, num_groups=NUM_GROUPS)
    if name in STEPS:
        assert_rounded(y, want, name)
    else:
        wide = name in ("float64", "longdouble")
        assert_close(y, want, tolerance=CONTRACT_64 if wide else CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=NUM_GROUPS)
    of_x, of_parameters = ERRORS[name]
    dx = np.concatenate([shard["gradients"][0] for shard in shards], axis=1)
    assert_gradient(dx, want.x, rtol=of_x)
    for i, reference in ((1, want.scale), (2, want.bias)):
        assert_gradient(sum(s["gradients"][i] for s in shards), reference, rtol=of_parameters)


def check_statistics(case: Case, shards: list[dict]) -> None:
    whole = data(case)
    assert_close(joined(shards, "y"), whole.y, tolerance=CONTRACT)
    positions = case.split(np.arange(case.length)[None])
    for group in case.index_groups or (range(len(shards)),):
        at = np.concatenate([positions[shard][0] for shard in group])
        count, mean, m2 = measured(
            whole.x[:, at], None if whole.mask is None else whole.mask[:, at]
        )
        for rank in group:
            got = {k: a.astype(np.float64) for k, a in shards[rank]["statistics"].items()}
            assert all(a.shape == count.shape for a in got.values())
            np.testing.assert_array_equal(got["count"], count)
            exact_mean = got["mean"] + got["residual"] / got["unit"]
            np.testing.assert_allclose(exact_mean, mean, rtol=0, atol=CONTRACT)
            np.testing.assert_allclose(got["m2"] / got["unit"] ** 2, m2, rtol=CONTRACT)
            # All ranks merge the same values in the same order.
            for k, a in shards[rank]["statistics"].items():
                assert a.tobytes() == shards[group[0]]["statistics"][k].tobytes()


def measured(x: np.ndarray, mask: np.ndarray | None) -> list[np.ndarray]:
    """Return count, mean and sum of squared deviations of shape (N, groups), in float64."""
    valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    grouped, valid = (a.reshape(*a.shape[:2], NUM_GROUPS, -1) for a in (x.astype(float), valid))
    out = np.zeros((3, x.shape[0], NUM_GROUPS))
    for n in range(x.shape[0]):
        for g in range(NUM_GROUPS):
            values = grouped[n, :, g][valid[n, :, g]]
            out[:, n, g] = values.size, values.mean(), ((values - values.mean()) ** 2).sum()
    return list(out)


def check_same_bits(shards: list[dict]) -> None:
    assert all(len(shard) == 5 and all(shard.values()) for shard in shards), shards


def check_no_samples(shards: list[dict]) -> None:
    for shard in shards:
        assert shard["y"].shape == shard["gradients"].x.shape == (0, *shard["x"].shape[1:])
        for gradient in shard["gradients"][1:]:
            np.testing.assert_array_equal(gradient, np.zeros(8, np.float32))
