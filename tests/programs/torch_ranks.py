"""One process of `test_torch_ranks`: computes every case on its shard and writes the results.

Run as ``python -m tests.programs.torch_ranks RANK WORLD FOLDER``. The parent compares; nothing is
asserted here, so that one rank cannot stop while another waits for it.
"""

from __future__ import annotations

import datetime
import pickle
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from groupnorm import GroupNorm, group_norm
from tests.sharding import CHANNELS, NUM_GROUPS, Case, cases, data

# An error on one rank leaves the others waiting, so time out soon.
TIMEOUT = datetime.timedelta(seconds=20)


def layer_of(case: Case) -> torch.nn.Module:
    layer = GroupNorm(
        CHANNELS,
        backend="torch",
        axis_name=dist.group.WORLD,
        axis_index_groups=case.groups_as_lists,
        **case.keywords,
    )
    whole = data(case)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(whole.scale))
        layer.bias.copy_(torch.from_numpy(whole.bias))
    return layer


def shard_of(case: Case):
    """Return this rank's x (a leaf), dy and mask."""
    whole, rank = data(case), dist.get_rank()
    x, dy = (torch.from_numpy(case.split(a)[rank].copy()) for a in (whole.x, whole.dy))
    mask = None if whole.mask is None else torch.from_numpy(case.split(whole.mask)[rank].copy())
    return x.requires_grad_(), dy, mask


def results(y, x, layer) -> dict:
    return {
        "y": y.detach().numpy(),
        "dx": x.grad.numpy(),
        "dscale": layer.weight.grad.double().numpy(),
        "dbias": layer.bias.grad.double().numpy(),
    }


def compute(case: Case, compiler=lambda f: f) -> dict:
    layer = layer_of(case)
    x, dy, mask = shard_of(case)
    y = compiler(layer)(x, mask)
    y.backward(dy)
    return results(y, x, layer)


def compute_compiled(case: Case) -> dict:
    return compute(case, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))


def compute_by_function(case: Case) -> dict:
    """As `compute`, through group_norm."""
    x, dy, mask = shard_of(case)
    scale, bias = (torch.from_numpy(a).clone() for a in (data(case).scale, data(case).bias))
    scale.requires_grad_()
    bias.requires_grad_()
    y = group_norm(x, scale, bias, mask=mask, axis_name=dist.group.WORLD, **case.keywords)
    y.backward(dy)
    return {
        "y": y.detach().numpy(),
        "dx": x.grad.numpy(),
        "dscale": scale.grad.double().numpy(),
        "dbias": bias.grad.double().numpy(),
    }


def count_collectives(case: Case) -> dict:
    """Return the number of collectives of one forward and one backward pass."""
    layer = layer_of(case)
    x, dy, mask = shard_of(case)
    with CommDebugMode() as forward:
        y = layer(x, mask)
    with CommDebugMode() as backward:
        y.backward(dy)
    return {"forward": forward.get_total_counts(), "backward": backward.get_total_counts()}


def bfloat16(case: Case) -> dict:
    x = shard_of(case)[0].detach().bfloat16()
    y = group_norm(x, num_groups=NUM_GROUPS, axis_name=dist.group.WORLD, dtype="input")
    return {"x": x.double().numpy(), "y": y.double().numpy(), "dtype": str(y.dtype)}


def same_bits_twice(case: Case) -> dict:
    first, second = compute(case), compute(case)
    return {k: first[k].tobytes() == second[k].tobytes() for k in first}


def data_parallel(case: Case) -> dict:
    """DDP around a layer that pools: its hooks average the partial sums over the ranks."""
    layer = layer_of(case)
    x, dy, mask = shard_of(case)
    wrapped = torch.nn.parallel.DistributedDataParallel(layer)
    y = wrapped(x, mask)
    y.backward(dy)
    return results(y, x, layer)


def data_parallel_alone(case: Case) -> dict:
    """DDP around a layer that does not pool, each rank on its own samples."""
    whole, rank = data(case), dist.get_rank()
    layer = GroupNorm(CHANNELS, num_groups=NUM_GROUPS, backend="torch")
    wrapped = torch.nn.parallel.DistributedDataParallel(layer)
    x = torch.from_numpy(whole.x[rank : rank + 1].copy()).requires_grad_()
    y = wrapped(x)
    y.backward(torch.from_numpy(whole.dy[rank : rank + 1].copy()))
    return results(y, x, layer)


def error_of(function) -> dict:
    try:
        function()
    except Exception as error:
        return {
            "types": [kind.__name__ for kind in type(error).__mro__],
            "message": str(error),
        }
    return {"types": [], "message": "nothing was raised"}


def axis_name_as_text() -> dict:
    def call():
        layer = GroupNorm(CHANNELS, num_groups=NUM_GROUPS, backend="torch", axis_name="shards")
        layer(torch.ones(2, CHANNELS))

    return error_of(call)


def wrong_index_groups() -> dict:
    def call(groups):
        layer = GroupNorm(
            CHANNELS,
            num_groups=NUM_GROUPS,
            backend="torch",
            axis_name=dist.group.WORLD,
            axis_index_groups=groups,
        )
        layer(torch.ones(2, CHANNELS))

    last = dist.get_world_size() - 1
    wrong = {
        "twice": [list(range(last + 1)), [0]],
        "too large": [list(range(last + 2))],
        "negative": [[-1, *range(last)]],
        "left out": [list(range(last))],
    }
    return {name: error_of(lambda groups=groups: call(groups)) for name, groups in wrong.items()}


def jobs(world: int) -> dict:
    """Return all jobs by name, in the same order on all ranks."""
    uneven = {2: (5, 2), 4: (5, 2, 3, 1)}[world]
    masked = Case("masked job", uneven, "shard 1")
    exact = Case("masked job, exact variance", uneven, "shard 1", fast=False)
    plain = Case("plain job", uneven)
    long = Case("long job", tuple(40 * n for n in uneven), offset=3.0)
    every = {case.name: (compute, case) for case in cases(world)}
    every |= {
        "function": (compute_by_function, masked),
        "collectives, fast": (count_collectives, masked),
        "collectives, exact": (count_collectives, exact),
        "bfloat16": (bfloat16, long),
        "same bits twice": (same_bits_twice, masked),
        "DDP": (data_parallel, plain),
        "axis_name is text": (axis_name_as_text,),
        "wrong index groups": (wrong_index_groups,),
    }
    if world == 2:
        every["DDP, no axis_name"] = (data_parallel_alone, plain)
        every["compiled"] = (compute_compiled, masked)
        every["compiled, exact"] = (compute_compiled, exact)
    return every


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=TIMEOUT
    )
    out = {}
    for name, (function, *arguments) in jobs(world).items():
        try:
            out[name] = function(*arguments)
        except Exception:
            out[name] = {"error": traceback.format_exc()}
        # After each job: if a rank is killed, the results so far can still be read.
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
