"""Statistics pooled over two and four real processes, connected by gloo.

Processes start slowly, so one run of `programs/torch_ranks.py` computes all cases of a world size,
and every case is a subtest here. All results are compared with the oracle on the whole array.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from groupnorm.testing import oracle
from tests import ROOT
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient
from tests.sharding import NUM_GROUPS, Case, cases, check, data

pytestmark = pytest.mark.needs("torch")

SECONDS = 150


def run_ranks(world: int, folder: Path) -> list[dict]:
    """Run all ranks, for at most `SECONDS`, and return the results of each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    deadline = time.monotonic() + SECONDS
    ranks, late = [], False
    for rank in range(world):
        command = [sys.executable, "-m", "tests.programs.torch_ranks"]
        log = (folder / f"{rank}.log").open("w")
        ranks.append(
            subprocess.Popen(
                [*command, str(rank), str(world), str(folder)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )
        )
        log.close()
    for process in ranks:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"{rank}.log").read_text() for rank in range(world))
    assert not late, f"not done after {SECONDS} s:\n{logs}"
    assert not any(process.returncode for process in ranks), logs
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_the_whole(world, tmp_path, subtests):
    ranks = run_ranks(world, tmp_path)
    checks = {
        case.name: lambda shards, case=case: check_shards(case, shards) for case in cases(world)
    }
    checks |= CHECKS
    left_out = set() if world == 2 else {"DDP, no axis_name", "compiled", "compiled, exact"}
    assert set(ranks[0]) == set(checks) - left_out
    for name in ranks[0]:
        with subtests.test(name):
            shards = [rank[name] for rank in ranks]
            for number, shard in enumerate(shards):
                assert "error" not in shard, f"rank {number}: {shard['error']}"
            checks[name](shards)


def uneven(world: int) -> tuple[int, ...]:
    return {2: (5, 2), 4: (5, 2, 3, 1)}[world]


def check_shards(case: Case, shards: list[dict]) -> None:
    y, dx = (np.concatenate([shard[k] for shard in shards], axis=1) for k in ("y", "dx"))
    check(case, y, dx, *(sum(shard[k] for shard in shards) for k in ("dscale", "dbias")))


def check_masked(shards: list[dict]) -> None:
    check_shards(Case("masked job", uneven(len(shards)), "shard 1"), shards)


def check_masked_exact(shards: list[dict]) -> None:
    case = Case("masked job, exact variance", uneven(len(shards)), "shard 1", fast=False)
    check_shards(case, shards)


def check_ddp(shards: list[dict]) -> None:
    """DDP averages, but a pooled layer needs the sum: too small by the number of ranks, on all."""
    world = len(shards)
    for shard in shards[1:]:
        np.testing.assert_array_equal(shard["dscale"], shards[0]["dscale"])
        np.testing.assert_array_equal(shard["dbias"], shards[0]["dbias"])
    # Every rank has the average; its sum over the ranks is the complete gradient.
    check_shards(Case("plain job", uneven(world)), shards)


def check_ddp_alone(shards: list[dict]) -> None:
    whole = data(Case("plain job", uneven(len(shards))))
    ones, zeros = np.ones_like(whole.scale), np.zeros_like(whole.bias)
    y = np.concatenate([shard["y"] for shard in shards])
    assert_close(y, oracle.group_norm(whole.x, num_groups=NUM_GROUPS), tolerance=CONTRACT)
    want = oracle.group_norm_gradients(whole.x, whole.dy, ones, zeros, num_groups=NUM_GROUPS)
    for shard in shards:
        assert_gradient(len(shards) * shard["dscale"], want.scale, rtol=GRADIENT)
        assert_gradient(len(shards) * shard["dbias"], want.bias, rtol=GRADIENT)


def check_collectives(forward: int, shards: list[dict]) -> None:
    for shard in shards:
        assert 1 <= shard["forward"] <= forward
        assert shard["backward"] == 1


def check_bfloat16(shards: list[dict]) -> None:
    assert {shard["dtype"] for shard in shards} == {"torch.bfloat16"}
    x, y = (np.concatenate([shard[k] for shard in shards], axis=1) for k in ("x", "y"))
    want = oracle.group_norm(x, num_groups=NUM_GROUPS)
    # Rounded to bfloat16, to within one additional ulp.
    assert (np.abs(y - want) <= 1.5 * 2.0**-7 * np.maximum(np.abs(want), 1e-2)).all()


def check_same_bits(shards: list[dict]) -> None:
    assert all(all(shard.values()) for shard in shards), shards


def check_text(shards: list[dict]) -> None:
    for shard in shards:
        assert "GroupNormError" in shard["types"], shard
        for word in ("axis_name", "'shards'", "bind_axis"):
            assert word in shard["message"]


def check_index_groups(shards: list[dict]) -> None:
    for shard in shards:
        for name, error in shard.items():
            assert "ArgumentValueError" in error["types"], (name, error)
            assert "axis_index_groups" in error["message"]


CHECKS = {
    "function": check_masked,
    "compiled": check_masked,
    "compiled, exact": check_masked_exact,
    "collectives, fast": lambda shards: check_collectives(1, shards),
    "collectives, exact": lambda shards: check_collectives(2, shards),
    "bfloat16": check_bfloat16,
    "same bits twice": check_same_bits,
    "DDP": check_ddp,
    "DDP, no axis_name": check_ddp_alone,
    "axis_name is text": check_text,
    "wrong index groups": check_index_groups,
}


def test_a_failure_on_one_rank_is_detected(tmp_path):
    """The control: wrong results of a single rank must fail the comparison."""
    case = cases(2)[2]
    whole = data(case)
    shards = [
        {"y": y, "dx": dx, "dscale": whole.gradients.scale / 2, "dbias": whole.gradients.bias / 2}
        for y, dx in zip(
            case.split(whole.y.astype(np.float32)),
            case.split(whole.gradients.x.astype(np.float32)),
            strict=True,
        )
    ]
    check_shards(case, shards)
    shards[1]["y"] = shards[1]["y"] + np.float32(1e-4)
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        check_shards(case, shards)
