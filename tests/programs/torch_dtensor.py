"""One process of `test_torch_dtensor`: calls layers with DTensors and writes its shards' results.

Run as ``python -m tests.programs.torch_dtensor RANK FOLDER``, on four ranks. The parent compares;
nothing is asserted here, so that one rank cannot stop while another waits for it.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import pickle
import sys
import traceback
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode

from groupnorm import GroupNorm, group_norm

WORLD = 4
# An error on one rank leaves the others waiting, so time out soon. Compile times differ by rank.
TIMEOUT = datetime.timedelta(seconds=120)


@dataclasses.dataclass(frozen=True)
class Case:
    """One array, its placement on the mesh, and the layer's arguments.

    A placement is "S" and an axis, "R" or "P"; two of them are for a 2 x 2 mesh. Parameters are
    "plain", "numpy", "none", or DTensors: "replicated", "sharded". With `per_sample` they have a
    row for each sample.
    """

    name: str
    placements: tuple[str, ...]
    shape: tuple[int, ...] = (3, 8, 5, 6)
    num_groups: int = 4
    feature: int | tuple[int, ...] = 1
    reduction: tuple[int, ...] | None = None
    mask: str = ""
    offset: float = 0.0
    parameters: str = "plain"
    fast: bool = True
    per_sample: bool = False

    @property
    def mesh_shape(self) -> tuple[int, ...]:
        return (WORLD,) if len(self.placements) == 1 else (2, 2)

    @property
    def features(self) -> tuple[int, ...]:
        given = (self.feature,) if isinstance(self.feature, int) else self.feature
        return tuple(axis % len(self.shape) for axis in given)

    @property
    def axes(self) -> dict[str, Any]:
        """The corresponding keywords of the oracle and the function."""
        return {
            "num_groups": self.num_groups,
            "feature_axis": self.feature,
            "reduction_axes": self.reduction,
        }


@dataclasses.dataclass(frozen=True)
class Data:
    """The whole arrays of one case."""

    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None
    scale: np.ndarray | None
    bias: np.ndarray | None


# Shapes of masks, for x of shape (3, 8, 5, 6).
MASK_SHAPES = {
    "full": (3, 8, 5, 6),
    "positions": (3, 1, 5, 6),
    "rows": (5, 1),
    "samples": (3, 1, 1, 1),
    "channels": (8, 1, 1),
}


@functools.cache
def data(case: Case) -> Data:
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    x = (rng.normal(size=case.shape) + case.offset).astype(np.float32)
    dy = rng.normal(size=case.shape).astype(np.float32)
    mask = scale = bias = None
    if case.parameters != "none":
        channels = int(np.prod([case.shape[axis] for axis in case.features]))
        size = (case.shape[0], channels) if case.per_sample else channels
        scale = rng.uniform(0.5, 1.5, size).astype(np.float32)
        bias = rng.normal(size=size).astype(np.float32)
    if case.mask:
        mask = rng.random(MASK_SHAPES[case.mask.partition(",")[0]]) < 0.7
        if "shard" in case.mask:
            mask[:, :, :2] = False  # all elements of the first rank
        x = np.where(mask, x, np.float32(np.nan))
    return Data(x, dy, mask, scale, bias)


def cases() -> list[Case]:
    last = (3, 5, 6, 8)
    return [
        # One axis: even, uneven, and with empty shards.
        Case("batch", ("S0",), (4, 8, 5, 6)),
        Case("batch, an empty shard", ("S0",)),
        Case("batch, uneven", ("S0",), (5, 8, 3, 2)),
        Case("batch, offset", ("S0",), (4, 8, 5, 6), offset=1e5),
        Case("height", ("S2",), (2, 8, 8, 6)),
        Case("height, uneven", ("S2",), (2, 8, 7, 6)),
        Case("height, an empty shard", ("S2",)),
        Case("height, exact variance", ("S2",), fast=False),
        Case("height, long", ("S2",), (1, 8, 30, 31), offset=3.0),
        *(Case(f"height, offset {o:g}", ("S2",), offset=o) for o in (1e3, 1e5)),
        Case("width", ("S3",)),
        Case("width, one column", ("S3",), (3, 8, 5, 1)),
        Case("replicated", ("R",)),
        Case("a pending sum", ("P",)),
        Case("channels, a group each", ("S1",)),
        Case("channels, two groups each", ("S1",), num_groups=8),
        Case("channels, whole groups, an empty shard", ("S1",), (3, 6, 5, 6), 3),
        Case("channels, whole groups, offset", ("S1",), offset=1e3),
        Case("channels, a group on two shards", ("S1",), num_groups=2),
        Case("channels, a group on two shards, offset", ("S1",), num_groups=2, offset=1e3),
        Case("channels, a group on two shards, offset 1e5", ("S1",), num_groups=2, offset=1e5),
        Case("channels, one group", ("S1",), num_groups=1),
        Case("channels, one group, uneven", ("S1",), (3, 7, 5, 6), 1),
        Case("channels, one group, an empty shard", ("S1",), (3, 6, 5, 6), 1),
        Case("channels, groups cut unevenly", ("S1",), (3, 12, 5, 6), 3),
        Case("channels, groups cut unevenly, offset", ("S1",), (3, 12, 5, 6), 3, offset=1e3),
        # Channels last, and on several axes.
        Case("last: height", ("S1",), last, feature=-1),
        Case("last: a group each", ("S3",), last, feature=-1),
        Case("last: a group on two shards", ("S3",), last, 2, -1, offset=1e3),
        Case("two feature axes, the first", ("S1",), (3, 4, 5, 6), 4, (1, 3)),
        Case("two feature axes, the last, whole groups", ("S3",), (3, 4, 5, 8), 16, (1, 3)),
        Case("two feature axes, the last, in every group", ("S3",), (3, 4, 5, 6), 2, (1, 3)),
        Case("two feature axes, the last, two shards", ("S3",), (3, 4, 5, 8), 8, (1, 3)),
        Case("two feature axes, the last, unevenly", ("S3",), (3, 4, 5, 6), 8, (1, 3)),
        # Reduction axes.
        Case("reduction of the batch", ("S0",), (5, 8, 3, 2), reduction=(0, 1, 2, 3)),
        Case("reduction of the batch, height", ("S2",), reduction=(0, 1, 2, 3)),
        Case("no reduction of the height", ("S2",), reduction=(1, 3)),
        Case("channels on the leading axis", ("S0",), (8, 5, 6), 2, 0),
        # Two mesh dimensions.
        Case("batch x height", ("S0", "S2")),
        Case("height x width", ("S2", "S3"), offset=1e3),
        Case("batch x batch", ("S0", "S0"), (5, 8, 3, 2)),
        Case("height x height", ("S2", "S2")),
        Case("batch x channels", ("S0", "S1")),
        Case("batch x channels, one group", ("S0", "S1"), num_groups=1),
        Case("height x channels", ("S2", "S1")),
        Case("height x channels, one group", ("S2", "S1"), num_groups=1, offset=1e3),
        Case("channels x channels", ("S1", "S1")),
        Case("replicated x channels", ("R", "S1")),
        Case("height x replicated", ("S2", "R")),
        Case("a pending sum x height", ("P", "S2")),
        # Masks: complete on every rank, and as a DTensor.
        Case("full mask", ("S2",), mask="full"),
        Case("full mask, a shard masked out", ("S2",), mask="full, shard"),
        Case("full mask, a shard masked out, offset", ("S2",), mask="full, shard", offset=1e3),
        Case("full mask, batch", ("S0",), mask="full, dtensor S0"),
        Case("full mask, two dimensions", ("S2", "S1"), num_groups=1, mask="full"),
        Case("full mask, nested", ("S2", "S2"), mask="full"),
        Case("full mask, replicated", ("S2",), mask="full, dtensor R"),
        Case("full mask, sharded elsewhere", ("S2",), mask="full, dtensor S3"),
        Case("mask of positions", ("S0", "S2"), mask="positions, numpy"),
        Case("mask of positions, DTensor", ("S1", "S2"), mask="positions, dtensor S1 S2"),
        Case("mask of rows", ("S2",), mask="rows, list"),
        Case("mask of samples", ("S0",), mask="samples"),
        Case("mask of channels", ("S1",), num_groups=2, mask="channels"),
        # Parameters.
        *(
            Case(f"{kind} parameters: {name}", placements, shape, num_groups, parameters=kind)
            for kind in ("none", "numpy", "replicated", "sharded")
            for name, placements, shape, num_groups in (
                ("batch", ("S0",), (5, 8, 3, 2), 4),
                ("height", ("S2",), (3, 8, 5, 6), 4),
                ("channels, whole groups", ("S1",), (3, 6, 5, 6), 3),
                ("channels, two shards", ("S1",), (3, 8, 5, 6), 2),
                ("channels, unevenly", ("S1",), (3, 12, 5, 6), 3),
                ("height x channels", ("S2", "S1"), (3, 8, 5, 6), 1),
            )
        ),
        *(
            Case(
                f"{kind} parameters per sample: {name}",
                placements,
                parameters=kind,
                per_sample=True,
                mask=mask,
            )
            for kind in ("plain", "numpy", "replicated", "sharded")
            for name, placements, mask in (
                ("batch", ("S0",), ""),
                ("channels", ("S1",), ""),
                ("height x channels", ("S2", "S1"), "full"),
                ("a pending sum x batch", ("P", "S0"), ""),
            )
        ),
    ]


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def placement(text: str) -> Any:
    return {"R": Replicate, "P": Partial}[text]() if text in "RP" else Shard(int(text[1:]))


def spread(a: np.ndarray | torch.Tensor, mesh: DeviceMesh, placements) -> DTensor:
    """Distribute an array that is complete on every rank."""
    placements = [placement(p) if isinstance(p, str) else p for p in placements]
    whole = torch.as_tensor(a).clone()
    for d, p in enumerate(placements):
        if isinstance(p, Partial):  # every element comes from one rank
            owner = torch.arange(whole.numel()).reshape(whole.shape) % mesh.size(d)
            whole = torch.where(owner == mesh.get_local_rank(d), whole, 0.0)
    # From here on Partial is treated as Replicate: each rank takes its shards of its own values.
    taken = [Replicate() if isinstance(p, Partial) else p for p in placements]
    local = distribute_tensor(whole, mesh, taken, src_data_rank=None).to_local()
    return DTensor.from_local(local, mesh, placements, shape=whole.shape, stride=whole.stride())


def mask_of(case: Case) -> Any:
    mask = data(case).mask
    if mask is None:
        return None
    kind, *placements = case.mask.partition(", ")[2].split() or [""]
    if kind == "numpy":
        return mask
    if kind == "list":
        return mask.tolist()
    if kind == "dtensor":
        return spread(mask, mesh_of(case.mesh_shape), placements)
    return torch.from_numpy(mask)


def arguments(case: Case) -> tuple[DTensor, Any, Any]:
    """Return x (a leaf), scale and bias in the form the case specifies."""
    whole, mesh = data(case), mesh_of(case.mesh_shape)
    x = spread(whole.x, mesh, case.placements).requires_grad_()
    if whole.scale is None or case.parameters == "numpy":
        return x, whole.scale, whole.bias
    parameters = [torch.from_numpy(a.copy()) for a in (whole.scale, whole.bias)]
    if case.parameters != "plain":
        kind = {"replicated": Replicate(), "sharded": Shard(0)}[case.parameters]
        parameters = [spread(a, mesh, [kind] * mesh.ndim) for a in parameters]
    return x, *(a.requires_grad_() for a in parameters)


def placements_of(a: torch.Tensor) -> tuple[str, ...]:
    return tuple(map(str, a.placements)) if isinstance(a, DTensor) else ()


def whole_of(a: Any) -> Any:
    if a is None or isinstance(a, np.ndarray):
        return None
    a = a.detach()
    return (a.full_tensor() if isinstance(a, DTensor) else a).double().numpy()


def compute(case: Case, replicated_cotangent: bool = False, compiler=lambda f: f) -> dict:
    x, scale, bias = arguments(case)

    def function(x, scale, bias, mask):
        return group_norm(x, scale, bias, mask=mask, use_fast_variance=case.fast, **case.axes)

    y = compiler(function)(x, scale, bias, mask_of(case))
    placements = ["R"] * y.device_mesh.ndim if replicated_cotangent else y.placements
    y.backward(spread(data(case).dy, y.device_mesh, placements))
    return results(x, y, scale, bias)


def results(x: DTensor, y: DTensor, scale: Any, bias: Any) -> dict:
    return {
        "kind": type(y).__name__,
        "like x": (y.shape, y.stride(), y.device_mesh) == (x.shape, x.stride(), x.device_mesh),
        "placements": placements_of(y),
        "gradient's": placements_of(x.grad),
        "y": y.to_local().detach().numpy(),
        "dx": x.grad.to_local().numpy(),
        "dscale": whole_of(getattr(scale, "grad", None)),
        "dbias": whole_of(getattr(bias, "grad", None)),
        "parameters'": [
            (placements_of(a), placements_of(a.grad))
            for a in (scale, bias)
            if isinstance(a, torch.Tensor)
        ],
    }


def layers(case: Case, distributed: bool) -> dict:
    """Take one optimizer step with a layer for channels on axis 1, or on the last axis."""
    whole, mesh = data(case), mesh_of(case.mesh_shape)
    if case.feature == 1:
        layer = GroupNorm((case.shape[1], ...), 0, num_groups=case.num_groups, backend="torch")
    else:
        layer = GroupNorm(case.shape[-1], num_groups=case.num_groups, backend="torch")
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(whole.scale))
        layer.bias.copy_(torch.from_numpy(whole.bias))
    if distributed:
        distribute_module(layer, mesh)
    x = spread(whole.x, mesh, case.placements).requires_grad_()
    y = layer(x)
    y.backward(spread(whole.dy, mesh, case.placements))
    out = results(x, y, layer.weight, layer.bias)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    return out | {"weight": whole_of(layer.weight), "bias": whole_of(layer.bias)}


def numpy_layer(case: Case) -> dict:
    layer = GroupNorm((case.shape[1], ...), 0, num_groups=case.num_groups)
    layer.scale, layer.bias = data(case).scale, data(case).bias
    x = spread(data(case).x, mesh_of(case.mesh_shape), case.placements).requires_grad_()
    y = layer(x)
    y.backward(spread(data(case).dy, y.device_mesh, case.placements))
    return results(x, y, layer.scale, layer.bias)


def flattened() -> dict:
    """Normalize after flattening two axes: the shards are then not ranges of indices."""
    mesh = mesh_of((WORLD,))
    rng = np.random.default_rng(7)
    x, dy = (rng.normal(size=(3, 8, 16)).astype(np.float32) for _ in range(2))
    given = spread(x, mesh, ["S1"]).requires_grad_()
    y = group_norm(given.flatten(0, 1), num_groups=2)
    placements = y.placements
    y.backward(spread(dy.reshape(24, 16), mesh, ["R"]))
    return {
        "x": x,
        "cotangent": dy,
        "placements": tuple(map(str, placements)),
        "strided": type(placements[0]).__name__,
        "y": whole_of(y),
        "dx": whole_of(given.grad),
    }


def second_order(case: Case, replicated_cotangent: bool) -> dict:
    """Differentiate a function of all gradients in float64, distributed and on the whole array."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    mesh = mesh_of(case.mesh_shape)
    whole = [torch.from_numpy(rng.normal(size=case.shape)) for _ in range(3)]
    flat = [torch.from_numpy(rng.normal(size=case.shape[1])) for _ in range(4)]

    def gradients(x, dy, wx, scale, bias, wscale, wbias):
        x, dy, scale, bias = leaves = [a.detach().requires_grad_() for a in (x, dy, scale, bias)]
        y = group_norm(x, scale, bias, **case.axes)
        first = torch.autograd.grad(y, (x, scale, bias), dy, create_graph=True)
        pairs = zip(first, (wx, wscale, wbias), strict=True)
        products = [torch.sin(a * w).sum() for a, w in pairs]
        total = sum(a.full_tensor() if isinstance(a, DTensor) else a for a in products)
        return torch.autograd.grad(total, leaves[:3])

    want = gradients(*whole, *flat)
    placements = [placement(p) for p in case.placements]
    cotangent = [Replicate()] * mesh.ndim if replicated_cotangent else placements
    given = (placements, cotangent, placements)
    arrays = [spread(a, mesh, p) for a, p in zip(whole, given, strict=True)]
    if case.parameters != "plain":
        kind = {"replicated": Replicate(), "sharded": Shard(0)}[case.parameters]
        flat = [spread(a, mesh, [kind] * mesh.ndim) for a in flat]
    got = gradients(*arrays, *flat)
    return {
        name: (whole_of(a), b.numpy())
        for name, a, b in zip(("x", "dy", "scale"), got, want, strict=True)
    }


def second_order_cases() -> list[Case]:
    return [
        Case(f"{name}, {parameters}", placements, shape, num_groups, parameters=parameters)
        for parameters in ("plain", "replicated", "sharded")
        for name, placements, shape, num_groups in (
            ("batch", ("S0",), (3, 8, 5), 4),
            ("height", ("S2",), (3, 8, 5), 4),
            ("channels, whole groups", ("S1",), (3, 8, 5), 4),
            ("channels, two shards", ("S1",), (3, 8, 5), 2),
            ("channels, unevenly", ("S1",), (3, 12, 5), 3),
            ("batch x channels", ("S0", "S1"), (3, 8, 5), 1),
        )
    ]


def count_collectives() -> dict:
    """Return the number of collectives of a forward and a backward pass, after a first call."""
    out = {}
    for case in cases():
        if case.name in COUNTED:
            x, scale, bias = arguments(case)
            group_norm(x, scale, bias, **case.axes)
            with CommDebugMode() as forward:
                y = group_norm(x, scale, bias, **case.axes)
            dy = spread(data(case).dy, y.device_mesh, case.placements)
            with CommDebugMode() as backward:
                y.backward(dy)
            out[case.name] = (forward.get_total_counts(), backward.get_total_counts())
    return out


# Forward: one for each mesh dimension that statistics are pooled over. Backward: the same, plus one
# for each dimension that shards x, for the parameters' gradients.
COUNTED = {
    "batch": (0, 1),
    "height": (1, 2),
    "channels, a group each": (0, 1),
    "channels, a group on two shards": (1, 2),
    "batch x channels": (0, 2),
    "height x width": (2, 4),
    "replicated": (0, 0),
    "none parameters: batch": (0, 0),
    "numpy parameters: height": (1, 1),
    "sharded parameters: channels, whole groups": (0, 0),
}


def dtypes() -> dict:
    """Compare dtypes, and gradients of bfloat16 parameters, with a single device's."""
    rng, mesh, out = np.random.default_rng(3), mesh_of((WORLD,)), {}
    for name in ("bfloat16", "float16", "float64", "int32", "complex64"):
        x = torch.from_numpy(8 * rng.normal(size=(2, 8, 40))).to(getattr(torch, name))
        for parameter in ("float32", "bfloat16"):
            for dtype in (None, "input", "float64"):
                if name == "complex64" and dtype == "float64":
                    continue  # raises, on a single device too
                scale = torch.from_numpy(rng.normal(size=8)).to(getattr(torch, parameter))
                keywords = {"num_groups": 4, "feature_axis": 1}
                want = group_norm(x, scale, dtype=dtype, **keywords)
                dy = torch.from_numpy(rng.normal(size=x.shape)).to(want.dtype)
                # The gradient before rounding to the parameter's dtype.
                exact = scale.to(torch.float32).requires_grad_()
                group_norm(x, exact, dtype=want.dtype, **keywords).backward(dy)
                scale.requires_grad_()
                y = group_norm(spread(x, mesh, ["S2"]), scale, dtype=dtype, **keywords)
                y.backward(spread(dy, mesh, ["S2"]))
                out[f"{name}, {parameter}, {dtype}"] = {
                    "dtypes": [str(a.dtype) for a in (y, want, scale.grad, scale)],
                    "y": y.full_tensor().detach().to(torch.complex128).numpy(),
                    "want": want.detach().to(torch.complex128).numpy(),
                    "dscale": whole_of(scale.grad),
                    "exact": whole_of(exact.grad),
                }
    return out


def without_gradients(case: Case) -> dict:
    """Call with gradients of all arguments, of the scale alone, and of none."""
    x, scale, bias = arguments(case)
    dy = spread(data(case).dy, x.device_mesh, case.placements)
    x, bias = x.detach(), bias.detach()
    y = group_norm(x, scale, bias, **case.axes)
    y.backward(dy)
    out = {"y": whole_of(y), "dscale": whole_of(scale.grad), "wants": [y.requires_grad]}
    x.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = group_norm(x, scale, bias, **case.axes)
        out["wants"].append(y.requires_grad)
        out[mode.__name__] = whole_of(y)
    return out


def error_of(function) -> tuple[str, str]:
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", "was raised"


def errors() -> dict:
    mesh = mesh_of((WORLD,))
    x = spread(np.ones((4, 8, 5), np.float32), mesh, ["S1"])
    layer = GroupNorm((4, ...), 0, num_groups=2, backend="torch")
    calls = {
        "axis_name": {"num_groups": 4, "axis_name": "rows"},
        "num_groups": {"num_groups": 3},
        "scale": {"num_groups": 4, "scale": torch.ones(2)},
        "mask's shape": {"num_groups": 4, "mask": torch.ones(2, 5)},
        # Checked on its own part alone, the mask would be valid on the first rank.
        "mask's values": {"num_groups": 4, "mask": np.arange(8)[:, None]},
    }
    out = {
        name: error_of(lambda keywords=keywords: group_norm(x, feature_axis=1, **keywords))
        for name, keywords in calls.items()
    }
    return out | {"in_size": error_of(lambda: layer(x))}


def outside_the_mesh() -> dict:
    """Call on all ranks with an array that is on only two of them."""
    mesh = DeviceMesh("cpu", [0, 1])
    whole = np.random.default_rng(5).normal(size=(3, 8)).astype(np.float32)
    x = distribute_tensor(torch.from_numpy(whole), mesh, [Shard(0)], src_data_rank=None)
    scale = torch.ones(8, dtype=torch.float64, requires_grad=True)
    y = group_norm(x, scale, num_groups=4)
    return {
        "x": whole,
        "y": y.to_local().detach().numpy(),
        "whole": (tuple(y.shape), str(y.dtype), placements_of(y)),
    }


def torchs_own() -> tuple[str, str]:
    """Differentiate `torch.nn.GroupNorm` on shards of the batch, which it does not support."""
    mesh = mesh_of((WORLD,))
    layer = torch.nn.GroupNorm(4, 8)
    distribute_module(layer, mesh)
    x = spread(np.ones((4, 8, 5), np.float32), mesh, ["S0"]).requires_grad_()
    y = layer(x)
    return error_of(lambda: y.backward(spread(np.ones((4, 8, 5), np.float32), mesh, ["S0"])))


def compile_in_one_graph(f):
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def jobs() -> dict:
    """Return all jobs by name, in the same order on all ranks."""
    every = {case.name: (compute, case) for case in cases()}
    by_name = {case.name: case for case in cases()}
    every |= {f"replicated cotangent: {n}": (compute, by_name[n], True) for n in COTANGENTS}
    every |= {
        f"layer{', distributed' * distributed}: {name}": (layers, by_name[name], distributed)
        for name in LAYERS
        for distributed in (False, True)
    }
    every |= {
        f"second order{', replicated cotangent' * replicated}: {case.name}": (
            second_order,
            case,
            replicated,
        )
        for case in second_order_cases()
        for replicated in (False, True)
    }
    every |= {
        f"compiled: {name}": (compute, by_name[name], False, compile_in_one_graph)
        for name in COMPILED
    }
    return every | {
        "numpy layer": (numpy_layer, by_name["numpy parameters: channels, two shards"]),
        "flattened": (flattened,),
        "collectives": (count_collectives,),
        "dtypes": (dtypes,),
        "without gradients": (without_gradients, by_name["height"]),
        "errors": (errors,),
        "outside the mesh": (outside_the_mesh,),
        "torch.nn.GroupNorm": (torchs_own,),
    }


COTANGENTS = ("height", "channels, a group on two shards", "channels, groups cut unevenly")
LAYERS = ("batch", "height", "channels, a group on two shards", "last: height")
# Compiling takes most of the time: one case with all features.
COMPILED = ("replicated parameters: height x channels",)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=TIMEOUT
    )
    out: dict[str, Any] = {}
    for name, (function, *given) in jobs().items():
        try:
            out[name] = function(*given)
        except Exception:
            out[name] = {"error": traceback.format_exc()}
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
