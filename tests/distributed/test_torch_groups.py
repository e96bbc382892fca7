"""Names, derivatives and networks over process groups, with four real processes.

Processes start slowly, so one run of `programs/torch_groups.py` computes everything, and every part
is a subtest here. Layers are compared with the oracle; higher-order derivatives with those of the
textbook formula on the whole array, which is itself compared with the oracle; and networks with
`torch.nn.GroupNorm` in one process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import ROOT
from tests.distributed.test_torch_ranks import check_shards
from tests.programs.torch_derivatives import DERIVATIVES
from tests.programs.torch_groups import (
    ALL,
    DATA,
    EMPTY,
    EXACT,
    PLAIN_ALL,
    PLAIN_DATA,
    PLAIN_ROWS,
    ROWS,
    WORLD,
)
from tests.programs.torch_training import HELD, SHAPES, images, network, optimizer_of
from tests.rows import assert_close, assert_gradient
from tests.sharding import CHANNELS, NUM_GROUPS, data

pytestmark = [
    pytest.mark.needs("torch"),
    # torch's own forward-mode formulas still use torch.jit.script, and warn about it.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

SECONDS = 300
EPSILON = 1e-6
# For derivatives in float64, relative to the largest: some hundred roundings of 1e-16 each.
ROUNDING = 1e-13
MEMBERS = {"rows": ((0, 1), (2, 3)), "data": ((0, 2), (1, 3)), "all": ((0, 1, 2, 3),)}


def run_program(folder: Path) -> list[dict]:
    """Run the processes, for at most `SECONDS`, and return the results of each rank."""
    log = folder / "log"
    with log.open("w") as output:
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.programs.torch_groups", str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = program.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = f"not done after {SECONDS} s"
        finally:
            # Its ranks too, which form a session with it alone.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
    assert code == 0, f"{code}:\n{log.read_text()}"
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]


@pytest.mark.slow
def test_ranks_equal_the_whole(tmp_path, subtests):
    ranks = run_program(tmp_path)
    assert set(ranks[0]) == set(CHECKS)
    for name, check in CHECKS.items():
        with subtests.test(name):
            shards = [rank[name] for rank in ranks]
            for number, shard in enumerate(shards):
                assert "error" not in shard, f"rank {number}: {shard['error']}"
            check(shards)


# Derivatives ------------------------------------------------------------------------------------


def textbook(case, x, scale, bias, mask):
    """The formula in PyTorch operations, on the whole array of a case."""
    x = torch.where(mask, x, 0.0)
    parts, positions = [], case.split(np.arange(case.length)[None])
    groups = case.index_groups or (range(len(case.sizes)),)
    at = [np.concatenate([positions[shard][0] for shard in group]) for group in groups]
    for chosen in at:
        part, valid = x[:, chosen], mask[:, chosen].double()
        grouped = part.unflatten(-1, (NUM_GROUPS, -1))
        valid = valid.unflatten(-1, (-1, 1)).expand_as(grouped)
        count = valid.sum((1, 3), keepdim=True)
        deviation = grouped - (grouped * valid).sum((1, 3), keepdim=True) / count
        variance = (deviation.square() * valid).sum((1, 3), keepdim=True) / count
        parts.append((deviation / torch.sqrt(variance + EPSILON)).flatten(-2))
    back = np.argsort(np.concatenate(at))
    return torch.cat(parts, 1)[:, back] * scale + bias


def whole_arrays(case) -> dict[str, torch.Tensor]:
    whole, names = data(case), ("x", "scale", "bias", "dy")
    arrays = {name: torch.from_numpy(getattr(whole, name)).double() for name in names}
    return arrays | {"mask": torch.from_numpy(whole.mask)}


@pytest.mark.parametrize("case", [EXACT, EMPTY], ids=str)
def test_the_textbook_equals_the_oracle(case):
    arrays = whole_arrays(case)
    dy = arrays.pop("dy")
    x = arrays["x"].requires_grad_()
    y = textbook(case, **arrays)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_close(y.detach().numpy(), data(case).y, tolerance=1e-12)
    assert_gradient(dx.numpy(), data(case).gradients.x, rtol=1e-12)


def check_derivative(job, case, shards: list[dict]) -> None:
    arrays = whole_arrays(case)

    def function(x, scale=arrays["scale"], bias=arrays["bias"], mask=arrays["mask"]):
        return textbook(case, x, scale, bias, mask)

    wanted = job(function, **arrays)
    assert all(shard["same"] for shard in shards)
    for number, want in enumerate(wanted):
        values = [shard["values"][number] for shard in shards]
        assert {v.dtype for v in values} == {np.dtype("float64")}
        # One value per position, or a sum over the positions.
        got = np.concatenate(values, axis=-2) if want.ndim >= 3 else sum(values)
        assert np.abs(want.detach().numpy()).max() > 1e-3
        scale_of_x = 1 + case.offset  # the magnitude that the rounding of x is relative to
        assert_gradient(got, want.detach().numpy(), rtol=ROUNDING * scale_of_x)


# Statistics -------------------------------------------------------------------------------------


def statistics_of_whole(case) -> list[dict]:
    """Return count, mean and variance for each shard, each of shape (N, groups)."""
    whole, positions = data(case), case.split(np.arange(case.length)[None])
    out = [{} for _ in case.sizes]
    for group in case.index_groups or (range(len(case.sizes)),):
        at = np.concatenate([positions[shard][0] for shard in group])
        values = np.where(whole.mask, whole.x.astype(np.float64), np.nan)[:, at]
        values = values.reshape(*values.shape[:2], NUM_GROUPS, -1)
        count = np.isfinite(values).sum((1, 3))
        found = {
            "count": count,
            "mean": np.nanmean(values, axis=(1, 3)),
            "variance": np.nanvar(values, axis=(1, 3)),
        }
        for shard in group:
            out[shard] = found
    return out


def check_statistics(case, shards: list[dict]) -> None:
    for got, want in zip(shards, statistics_of_whole(case), strict=True):
        for name, value in got.items():
            key = name.partition(" ")[0]
            if key in want:
                assert_close(value, want[key].astype(np.float64), tolerance=1e-12)
    if "y" not in shards[0]:
        return
    whole = data(case)
    y, dx = (np.concatenate([shard[k] for shard in shards], axis=1) for k in ("y", "dx"))
    assert_close(y, whole.y, tolerance=1e-12)
    assert_gradient(dx, whole.gradients.x, rtol=1e-12)
    for name in ("scale", "bias"):
        total = sum(shard[f"d{name}"] for shard in shards)
        assert_gradient(total, getattr(whole.gradients, name), rtol=1e-12)


# Networks ---------------------------------------------------------------------------------------


@functools.cache
def trained(steps=3) -> dict[str, list[np.ndarray]]:
    """Return the gradients of the first step and the final weights of one process."""
    model = network(torch.nn.GroupNorm(NUM_GROUPS, CHANNELS, eps=EPSILON))
    optimizer, (x, target) = optimizer_of(model), images()
    gradients = None
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        gradients = gradients or [p.grad.numpy().copy() for p in model.parameters()]
        optimizer.step()
    return {"gradients": gradients, "weights": [p.detach().numpy() for p in model.parameters()]}


def check_network(what: str, shards: list[dict], factor=1.0) -> None:
    wanted = trained()[what]
    assert len(wanted) == 6
    for shard in shards:
        for got, want in zip(shard[what], wanted, strict=True):
            assert np.abs(want).max() > 1e-3
            assert_gradient(factor * got, want, rtol=1e-11)


def check_training(shards: list[dict]) -> None:
    check_network("gradients", shards)
    check_network("weights", shards)


AXES = {
    "group": "all",
    "two names": "all",
    "a list of names": "all",
    "a name": "rows",
    "a mesh": "data",
    "a generator": "data",
    "one tensor": "rows",
    "none": "rows",
    "one is frozen": "rows",
}
CHOSEN = {"none": [], "one tensor": ["everywhere"], "one is frozen": ["everywhere"]}


def check_sums(shards: list[dict]) -> None:
    for rank, shard in enumerate(shards):
        assert set(shard) == set(AXES)
        for call, result in shard.items():
            (members,) = (ranks for ranks in MEMBERS[AXES[call]] if rank in ranks)
            chosen, dtypes = CHOSEN.get(call, HELD), set()
            for name, held in HELD.items():
                holders = set(held) & set(members if name in chosen else (rank,))
                check_sum(name, holders, result, f"{name}, {call}, rank {rank}")
                if holders and name in chosen:
                    dtypes.add(result["dtypes"][name])
            # Which parameters have a gradient, and then all gradients of one dtype together.
            calls = 1 + len(dtypes) if chosen else 0
            assert result["collectives"] == calls * (2 if "names" in call else 1), call


def check_sum(name: str, holders: set[int], result: dict, where: str) -> None:
    if not holders:
        assert name not in result["gradients"], where
        return
    value = result["gradients"][name]
    assert value.shape == SHAPES.get(name, (2, 3)), where
    want = sum(rank + 1 for rank in holders)
    np.testing.assert_array_equal(value, want, err_msg=where)
    other = name if name in ("float64", "bfloat16", "complex64") else "float32"
    assert result["dtypes"][name] == other, where


# Names ------------------------------------------------------------------------------------------


def check_each(cases: dict, shards: list[dict]) -> None:
    assert set(shards[0]) == set(cases)
    for name, case in cases.items():
        check_shards(case, [shard[name] for shard in shards])


def check_rebound(cases, shards: list[list[dict]]) -> None:
    for number, case in enumerate(cases):
        check_shards(case, [shard[number] for shard in shards])


WRONG = {
    "not bound": ("axis_name='colums'", "'data', 'rows', 'number'", "bind_axis(colums=group)"),
    "not bound, in a tuple": ("axis_name='colums'", "'data', 'rows'", "bind_axis(colums=group)"),
    "bound to a number": ("axis_name", "3", "ProcessGroup", "DeviceMesh", "bind_axis"),
    "a mesh of two dimensions": ("axis_name", "2 dimensions", "mesh['rows']", "tuple"),
    "no member of a group": ("axis_name", "not a member", "members only"),
    "no member of a mesh": ("axis_name", "not a member", "members only"),
    "no axis": ("axis_name=()", "at least one"),
    "sum_gradients": ("axis_name='colums'", "bind_axis(colums=group)"),
    "sum_gradients, no axis": ("axis_name=()", "at least one"),
}


def check_wrong_names(shards: list[dict]) -> None:
    for shard in shards:
        assert set(shard) == set(WRONG)
        for name, words in WRONG.items():
            assert "AxisNameError" in shard[name]["types"], (name, shard[name])
            for word in words:
                assert word in shard[name]["message"], (name, shard[name]["message"])


def check_collectives(names: int, shards: list[dict]) -> None:
    for shard in shards:
        assert shard == {
            "first": 2 * names,  # one more: the check that all ranks agree
            "forward": names,
            "another shape": 2 * names,
            "backward": names,
            "pullback": names,
        }


CHECKS = {
    "wrong names": check_wrong_names,
    "rebound": functools.partial(check_rebound, (ALL, ROWS, DATA, ALL)),
    "rebound, compiled": functools.partial(check_rebound, (PLAIN_ALL, PLAIN_ROWS, PLAIN_ALL)),
    "DDP over data": check_training,
    # An average over ranks that share samples is too small by a factor of their number.
    "DDP over all ranks": functools.partial(check_network, "gradients", factor=2),
    "FSDP over data": check_training,
    "sums of gradients": check_sums,
    "collectives": functools.partial(check_collectives, 1),
    "collectives, exact": functools.partial(check_collectives, 1),
    "collectives, index groups": functools.partial(check_collectives, 1),
    "collectives, two names": functools.partial(check_collectives, 2),
    "meshes of one dimension": functools.partial(check_each, {"all": ALL, "also": DATA}),
    "statistics": functools.partial(check_statistics, ALL),
    "statistics, one shard empty": functools.partial(check_statistics, EMPTY),
    "statistics of index groups": functools.partial(check_statistics, DATA),
}
CHECKS |= {
    name: functools.partial(check_shards, case)
    for name, case in {
        "bound by a call": ROWS,
        "bound to a group": EXACT,
        "bound to a mesh": ROWS,
        "bound to all ranks, one empty": EMPTY,
        "a group": EXACT,
        "a part of a mesh": ROWS,
        "a bound mesh: rows": ROWS,
        "a bound mesh: data": DATA,
        "a bound mesh: both": ALL,
        "a bound mesh: both, turned": EMPTY,
        "a bound mesh: list of both": ALL,
        "index groups of both": ROWS,
        "index groups of both, turned": DATA,
        "groups in a tuple": ALL,
        "copied": ROWS,
        "copied, a group": EXACT,
        "copied, a mesh": ROWS,
        "pickled": EXACT,
        "compiled, mesh": PLAIN_ROWS,
        "compiled, group": PLAIN_DATA,
        "compiled, two names": PLAIN_ALL,
        "backward, not bound": ROWS,
        "backward, rebound": ROWS,
        "pullback, layer, rows": ROWS,
        "pullback, layer, rows, exact": EXACT,
        "pullback, function, rows": ROWS,
        "pullback, function, rows, exact": EXACT,
    }.items()
}
CHECKS |= {
    f"{name}, {case.name}": functools.partial(check_derivative, job, case)
    for name, job in DERIVATIVES.items()
    for case in (EXACT, EMPTY)
}
