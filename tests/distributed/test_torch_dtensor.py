"""DTensors on a mesh of four real processes (gloo): all placements equal the whole array.

Processes start slowly, so one run of `programs/torch_dtensor.py` computes everything, and every
case is a subtest here. All results are compared with the oracle on the whole array.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from groupnorm import GroupNorm
from groupnorm.initializers import constant
from groupnorm.testing import oracle
from tests import ROOT
from tests.programs.torch_dtensor import COUNTED, WORLD, Case, cases, data, jobs
from tests.rows import CONTRACT, GRADIENT, GRADIENT_FAR, assert_close, assert_gradient

SECONDS = 400


def run_ranks(folder: Path) -> list[dict]:
    """Run all ranks, for at most `SECONDS`, and return the results of each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    deadline = time.monotonic() + SECONDS
    ranks, late = [], False
    try:
        for rank in range(WORLD):
            command = [sys.executable, "-m", "tests.programs.torch_dtensor", str(rank), str(folder)]
            with (folder / f"{rank}.log").open("w") as log:
                ranks.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
                )
        for process in ranks:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
                process.kill()
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"{rank}.log").read_text()[-4000:] for rank in range(WORLD))
    assert not late, f"not done after {SECONDS} s:\n{logs}"
    assert not any(process.returncode for process in ranks), logs
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]


@pytest.mark.slow
def test_shards_equal_the_whole(tmp_path, subtests):
    ranks = run_ranks(tmp_path)
    for name, (_, *given) in jobs().items():
        with subtests.test(name):
            shards = [rank[name] for rank in ranks]
            for number, shard in enumerate(shards):
                assert "error" not in shard, f"rank {number}: {shard['error']}"
            if name in CHECKS:
                CHECKS[name](shards)
            elif name.startswith("second order"):
                check_second_order(shards)
            else:
                check_case(given[0], shards)
            if name.startswith("layer"):
                check_step(given[0], shards)


# Comparison with the whole array ---------------------------------------------------------------


def of_rank(a: np.ndarray, placements: tuple[str, ...], mesh: tuple[int, ...], rank: int):
    """Return a rank's expected part of the whole, split as by torch.chunk."""
    part = torch.from_numpy(a)
    for text, size, at in zip(placements, mesh, np.unravel_index(rank, mesh), strict=True):
        if text.startswith("S"):
            axis = int(text.strip("S()"))
            parts = torch.chunk(part, size, axis)
            part = parts[at] if at < len(parts) else part.narrow(axis, 0, 0)
    return part.numpy()


def expected(case: Case) -> tuple[np.ndarray, oracle.Gradients]:
    whole = data(case)
    keywords = case.axes | {"mask": whole.mask}
    y = oracle.group_norm(whole.x, whole.scale, whole.bias, **keywords)
    gradients = oracle.group_norm_gradients(whole.x, whole.dy, whole.scale, whole.bias, **keywords)
    return y, gradients


def check_case(case: Case, shards: list[dict]) -> None:
    y, gradients = expected(case)
    rtol = GRADIENT if case.offset == 0 else GRADIENT_FAR
    # Sharded as the input is; a pending sum has been computed.
    placements = tuple(f"S({p[1:]})" if p[0] == "S" else "R" for p in case.placements)
    largest = np.abs(gradients.x).max()
    for rank, shard in enumerate(shards):
        assert shard["kind"] == "DTensor"
        assert shard["like x"]
        assert shard["placements"] == shard["gradient's"] == placements
        assert shard["y"].dtype == shard["dx"].dtype == np.float32
        assert_close(shard["y"], of_rank(y, placements, case.mesh_shape, rank), tolerance=CONTRACT)
        dx = of_rank(gradients.x, placements, case.mesh_shape, rank)
        if case.offset <= 1e3:  # the accuracy contract of gradients does not cover larger offsets
            assert_gradient(shard["dx"], dx, rtol=rtol, at_least=largest)
        if case.parameters in ("none", "numpy"):
            assert shard["parameters'"] == []
            continue
        # The complete gradient on every rank, placed as its parameter is.
        assert all(parameter == gradient for parameter, gradient in shard["parameters'"])
        if case.offset <= 1e3:
            assert_gradient(shard["dscale"], gradients.scale, rtol=rtol)
        assert_gradient(shard["dbias"], gradients.bias, rtol=rtol)


def check_step(case: Case, shards: list[dict]) -> None:
    """The optimizer's step, with a learning rate of 1/2."""
    whole, gradients = data(case), expected(case)[1]
    for shard in shards:
        for name, before, gradient in (
            ("weight", whole.scale, gradients.scale),
            ("bias", whole.bias, gradients.bias),
        ):
            assert_gradient(shard[name], before - 0.5 * gradient, rtol=GRADIENT)


# Other checks -----------------------------------------------------------------------------------


def check_second_order(shards: list[dict]) -> None:
    for shard in shards:
        for got, want in shard.values():
            assert_gradient(got, want, rtol=1e-12)


def check_numpy_layer(shards: list[dict]) -> None:
    (case,) = (c for c in cases() if c.name == "numpy parameters: channels, two shards")
    check_case(case, shards)


def check_flattened(shards: list[dict]) -> None:
    for shard in shards:
        assert shard["strided"] == "_StridedShard"  # otherwise nothing is tested
        x, dy = shard["x"].reshape(24, 16), shard["cotangent"].reshape(24, 16)
        want = oracle.group_norm_gradients(x, dy, num_groups=2)
        assert_close(shard["y"], oracle.group_norm(x, num_groups=2), tolerance=CONTRACT)
        assert_gradient(shard["dx"].reshape(24, 16), want.x, rtol=GRADIENT)


def check_collectives(shards: list[dict]) -> None:
    for shard in shards:
        assert shard == COUNTED


def check_dtypes(shards: list[dict]) -> None:
    bits = {"torch.bfloat16": 8, "torch.float16": 11, "torch.float32": 24}
    for shard in shards:
        assert len(shard) == 28
        for name, got in shard.items():
            of_y, of_want, of_gradient, of_scale = got["dtypes"]
            assert (of_y, of_gradient) == (of_want, of_scale), name
            # Both results are rounded, possibly to adjacent values.
            assert_close(
                got["y"], got["want"], tolerance=CONTRACT + 2.0 ** (1 - bits.get(of_y, 53))
            )
            # Rounded to nearest once, after the sum over the shards.
            exact = np.abs(got["exact"])
            half_ulp = 2.0 ** (np.floor(np.log2(exact)) - bits[of_scale])
            error = np.abs(got["dscale"] - got["exact"])
            assert (error <= half_ulp + GRADIENT * exact.max()).all(), name


def check_without_gradients(shards: list[dict]) -> None:
    (case,) = (c for c in cases() if c.name == "height")
    y, gradients = expected(case)
    for shard in shards:
        assert shard["wants"] == [True, False, False]
        for mode in ("y", "no_grad", "inference_mode"):
            assert_close(shard[mode], y, tolerance=CONTRACT)
        assert_gradient(shard["dscale"], gradients.scale, rtol=GRADIENT)


def check_errors(shards: list[dict]) -> None:
    wanted = {
        "axis_name": ("axis_name='rows'", "DTensor", "device mesh", "Leave axis_name out"),
        "num_groups": ("num_groups=3", "8 channels", "divisor"),
        "scale": ("scale has shape (2,)", "(8,)", "Reshape"),
        "mask's shape": ("mask has shape (2, 5)", "(4, 8, 5)", "x's length or 1"),
        "mask's values": ("mask contains 2", "zeros and ones", "mask != 0"),
        "in_size": ("x of shape (4, 8, 5)", "created for (4,)", "in_size"),
    }
    for shard in shards:  # on all ranks, or some would wait for others
        assert set(shard) == set(wanted)
        for name, (kind, message) in shard.items():
            assert kind == "ArgumentValueError", (name, kind, message)
            for words in wanted[name]:
                assert words in message


def check_outside_the_mesh(shards: list[dict]) -> None:
    y = oracle.group_norm(shards[0]["x"], num_groups=4)
    for rank, shard in enumerate(shards):
        assert shard["whole"] == ((3, 8), "torch.float64", ("S(0)",))
        if rank < 2:
            assert_close(shard["y"], np.array_split(y, 2)[rank], tolerance=CONTRACT)
        else:
            assert shard["y"].size == 0


def check_torchs_own(shards: list[tuple[str, str]]) -> None:
    """nn.GroupNorm of torch 2.13 has no backward even if every rank has whole samples."""
    for kind, message in shards:
        assert kind == "RuntimeError"
        assert "dY.numel() == N * C * HxW" in message


CHECKS = {
    "numpy layer": check_numpy_layer,
    "flattened": check_flattened,
    "collectives": check_collectives,
    "dtypes": check_dtypes,
    "without gradients": check_without_gradients,
    "errors": check_errors,
    "outside the mesh": check_outside_the_mesh,
    "torch.nn.GroupNorm": check_torchs_own,
}


def test_a_failure_on_one_rank_is_detected():
    """The control: wrong results of a single rank must fail the comparison."""
    (case,) = (c for c in cases() if c.name == "height, uneven")
    y, gradients = expected(case)
    shards = [
        {
            "kind": "DTensor",
            "like x": True,
            "placements": ("S(2)",),
            "gradient's": ("S(2)",),
            "y": of_rank(y, ("S(2)",), (WORLD,), rank).astype(np.float32),
            "dx": of_rank(gradients.x, ("S(2)",), (WORLD,), rank).astype(np.float32),
            "dscale": gradients.scale,
            "dbias": gradients.bias,
            "parameters'": [((), ()), ((), ())],
        }
        for rank in range(WORLD)
    ]
    check_case(case, shards)
    shards[3]["y"] = shards[3]["y"] + np.float32(1e-4)
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        check_case(case, shards)


# Initialization, in one process ------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def distributed(placement):
    def apply(model: nn.Module, mesh: DeviceMesh) -> None:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                shared = distribute_tensor(parameter.detach(), mesh, [placement])
                module.register_parameter(name, nn.Parameter(shared))

    return apply


SHARDED = {
    "FSDP2": lambda model, mesh: fully_shard(model, mesh=mesh),
    "sharded": distributed(Shard(0)),
    "replicated": distributed(Replicate()),
}
INITIALIZERS = {
    "default": {},
    "constants": {"scale_init": constant(3.0), "bias_init": constant(-1.0)},
    "random": {"scale_init": nn.init.normal_, "bias_init": nn.init.uniform_},
    "scale alone": {"use_bias": False, "scale_init": constant(3.0)},
    "another dtype": {"param_dtype": "bfloat16", "scale_init": constant(3.0)},
}
LAYERS = {
    "channels first": {"in_size": (8, ...), "feature_axis": 0},  # an nn.GroupNorm
    "channels last": {"in_size": 8},
    "two feature axes": {"in_size": (2, 5, 4), "feature_axis": (0, 2)},
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("initializers", INITIALIZERS.values(), ids=INITIALIZERS)
@pytest.mark.parametrize("how", SHARDED.values(), ids=SHARDED)
def test_sharded_parameters_are_initialized_where_they_are(how, initializers, layer, mesh):
    """The way to large models: built on the meta device, sharded, allocated, initialized."""

    def make() -> nn.Module:
        return GroupNorm(**layer, num_groups=4, backend="torch", **initializers)

    torch.manual_seed(0)
    want = dict(make().named_parameters())
    with torch.device("meta"):
        model = nn.Sequential(make())
    how(model, mesh)
    model.to_empty(device="cpu")
    before = dict(model[0].named_parameters())
    memory = {name: a.to_local().data_ptr() for name, a in before.items()}
    with torch.no_grad():
        for parameter in before.values():
            parameter.fill_(7)
    for _ in range(2):
        torch.manual_seed(0)
        model[0].reset_parameters()
    assert before.keys() == want.keys()
    for name, parameter in model[0].named_parameters():
        assert parameter is before[name]
        assert isinstance(parameter, nn.Parameter)
        assert isinstance(parameter.data, DTensor)
        assert parameter.device_mesh == mesh
        assert parameter.to_local().data_ptr() == memory[name]
        assert parameter.dtype == want[name].dtype
        torch.testing.assert_close(parameter.full_tensor(), want[name], rtol=0, atol=0)


@pytest.mark.parametrize("how", SHARDED.values(), ids=SHARDED)
def test_a_sharded_layer_that_was_reset_is_trained(how, mesh, rng):
    x, dy = rng.normal(size=(2, 3, 8, 5)).astype(np.float32)
    with torch.device("meta"):
        model = nn.Sequential(GroupNorm((8, ...), 0, 4, epsilon=1e-5, backend="torch"))
    how(model, mesh)
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    given = torch.tensor(x, requires_grad=True)
    # FSDP2 gathers the parameters itself; otherwise x must be a DTensor too.
    wrapped = given if how is SHARDED["FSDP2"] else distribute_tensor(given, mesh, [Replicate()])
    y = model(wrapped)
    local = y.full_tensor() if isinstance(y, DTensor) else y
    options = {"num_groups": 4, "feature_axis": 1, "epsilon": 1e-5}
    assert_close(local.detach().numpy(), oracle.group_norm(x, **options), tolerance=CONTRACT)
    (local * torch.tensor(dy)).sum().backward()
    want = oracle.group_norm_gradients(x, dy, np.ones(8), np.zeros(8), **options)
    for name, expected_gradient in (("weight", want.scale), ("bias", want.bias)):
        gradient = getattr(model[0], name).grad
        assert isinstance(gradient, DTensor)
        assert_gradient(gradient.full_tensor().numpy(), expected_gradient, rtol=GRADIENT)
