"""Gradients of whole networks, computed by `torch_groups`: DDP, FSDP2, `sum_gradients`."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from groupnorm import GroupNorm, bind_axis
from groupnorm.backends.torch import sum_gradients
from tests.sharding import CHANNELS, NUM_GROUPS

# Networks ---------------------------------------------------------------------------------------

SAMPLES, HEIGHT, WIDTH, COLOURS = 4, 6, 3, 3
CUT = 4  # image rows of the first rank along "space"; the other rank has the rest


def mesh_of(*names: str) -> DeviceMesh:
    """Create a mesh of 2 x 2 ranks with groups that no call has used before."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def network(norm: nn.Module) -> nn.Module:
    """A network that needs no halo, with the same parameters on every rank."""
    layers = (nn.Conv2d(COLOURS, CHANNELS, 1), norm, nn.SiLU(), nn.Conv2d(CHANNELS, COLOURS, 1))
    model = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def images() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(4)
    shape = (SAMPLES, COLOURS, HEIGHT, WIDTH)
    return torch.from_numpy(rng.normal(size=shape) + 3), torch.from_numpy(rng.normal(size=shape))


def optimizer_of(model):
    return torch.optim.Adam(model.parameters(), lr=0.1)


def train(mesh, wrap, finish, steps=3) -> dict:
    """Train on this rank's part of the images; return the first gradient and the final weights."""
    norm = GroupNorm(
        (CHANNELS, ...), 0, NUM_GROUPS, axis_name=mesh["space"].get_group(), backend="torch"
    )
    model = network(norm)
    wrapped = wrap(model)
    optimizer = optimizer_of(model)
    at_data, at_space = mesh.get_coordinate()
    rows = slice(0, CUT) if at_space == 0 else slice(CUT, None)
    x, target = (a.chunk(2)[at_data][:, :, rows] for a in images())
    gradients = None
    for _ in range(steps):
        optimizer.zero_grad()
        # The mean over the samples that these two ranks share: half of it comes from the other one.
        loss = (wrapped(x) - target).square().sum() / (images()[1].numel() / 2)
        loss.backward()
        finish(model)
        gradients = gradients or [whole_array(p.grad) for p in model.parameters()]
        optimizer.step()
    return {"gradients": gradients, "weights": [whole_array(p) for p in model.parameters()]}


def whole_array(x: torch.Tensor) -> np.ndarray:
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    return whole.detach().numpy().copy()


def data_parallel(over: str) -> dict:
    mesh = mesh_of("data", "space")
    group = mesh["data"].get_group() if over == "data" else dist.group.WORLD

    def finish(model):
        if over == "data":
            sum_gradients(model.parameters(), mesh["space"])

    return train(mesh, lambda model: DistributedDataParallel(model, process_group=group), finish)


def fully_sharded() -> dict:
    mesh = mesh_of("data", "space")

    def wrap(model):
        fully_shard(model[0], mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])

    return train(mesh, wrap, lambda model: sum_gradients(model.parameters(), mesh["space"]))


# The ranks that have a gradient; its value is the rank plus one.
HELD = {
    "everywhere": (0, 1, 2, 3),
    "on rank 2": (2,),
    "nowhere": (),
    "float64": (0, 1, 2, 3),
    "bfloat16": (0, 1, 2, 3),
    "complex64": (1, 2, 3),
    "one number": (0, 1, 2, 3),
    "nothing": (0, 1, 2, 3),
    "not in order": (0, 1, 2, 3),
}
SHAPES = {"one number": (), "nothing": (0, 3)}


def parameters_with_gradients() -> dict[str, nn.Parameter]:
    made = {}
    for name, ranks in HELD.items():
        dtype = getattr(torch, name, torch.float32)
        p = nn.Parameter(torch.zeros(SHAPES.get(name, (2, 3)), dtype=dtype))
        if name == "not in order":
            p = nn.Parameter(torch.zeros(3, 2).T)
        if dist.get_rank() in ranks:
            p.grad = torch.full_like(p, dist.get_rank() + 1)
        made[name] = p
    return made


def summed(axis_name, choose=lambda parameters: list(parameters.values())) -> dict:
    parameters = parameters_with_gradients()
    with CommDebugMode() as mode:
        sum_gradients(choose(parameters), axis_name)
    held = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return {
        "gradients": {name: grad.to(torch.complex64).numpy() for name, grad in held.items()},
        "dtypes": {name: str(grad.dtype).removeprefix("torch.") for name, grad in held.items()},
        "collectives": mode.get_total_counts(),
    }


def sums_of_gradients() -> dict:
    mesh = mesh_of("data", "rows")
    frozen = torch.ones(2)
    with bind_axis(mesh):
        return {
            "group": summed(dist.group.WORLD),
            "two names": summed(("data", "rows")),
            "a list of names": summed(["data", "rows"]),
            "a name": summed("rows"),
            "a mesh": summed(mesh["data"]),
            "a generator": summed("data", lambda named: (p for p in named.values())),
            "one tensor": summed("rows", lambda named: named["everywhere"]),
            "none": summed("rows", lambda named: []),
            "one is frozen": summed("rows", lambda named: [frozen, named["everywhere"]]),
        }
