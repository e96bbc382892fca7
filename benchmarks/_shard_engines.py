"""The engines of `distributed.py`: each computes a case on four shards and returns the whole.

Those that need processes of their own are started as
``python benchmarks/_shard_engines.py ENGINE RANK FOLDER``; each process writes its shards, and the
parent puts them together. The cases, and float64's answers, are those of the test suite.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from groupnorm import (  # noqa: E402, the tests are no package of the environment
    group_norm,
    group_norm_vjp,
    group_statistics,
    merge_statistics,
    normalize,
)
from tests.sharding import NUM_GROUPS, Case, cases, data  # noqa: E402

RANKS = 4
SECONDS = 300
CASES = [
    case
    for case in cases(RANKS)
    if case.name
    in (
        "uneven",
        "uneven, exact variance",
        "one shard empty",
        "a shard fully masked",
        "masked at random",
        "offset 100",
        "offset 1000",
        "offset 10000",
        "offset 100000",
        "offset 1e+05",
        "offset 1e+04",
        "index groups: two pairs",
    )
]

Arrays = dict[str, np.ndarray]


def shards_of(case: Case, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return one rank's x, dy and mask, C-contiguous."""
    whole = data(case)
    mask = None if whole.mask is None else case.split(whole.mask)[rank].copy()
    return case.split(whole.x)[rank].copy(), case.split(whole.dy)[rank].copy(), mask


def joined(shards: list[Arrays]) -> Arrays:
    """Concatenate shards of y and dx, and sum the parameter gradients."""
    out = {k: np.concatenate([shard[k] for shard in shards], axis=1) for k in ("y", "dx")}
    return out | {k: sum(shard[k] for shard in shards) for k in ("dscale", "dbias")}


# In one process -----------------------------------------------------------------------------------


def naive(case: Case) -> Arrays:
    """Average local means and mean squares unweighted, as frameworks do over an axis."""
    import jax
    import jax.numpy as jnp

    whole = data(case)
    mask = np.ones((*whole.x.shape[:2], 1), bool) if whole.mask is None else whole.mask
    x = np.where(mask, whole.x, 0)

    def forward(x, scale, bias):
        grouped = x.reshape(*x.shape[:2], NUM_GROUPS, -1)
        y = []
        starts = list(zip(case.starts[:-1], case.starts[1:], strict=True))
        for group in case.index_groups or (range(RANKS),):
            means, squares = [], []
            for rank in group:
                part = slice(*starts[rank])
                count = mask[:, part].sum((1, 2)) * grouped.shape[-1]
                kept = jnp.where(mask[:, part, None], grouped[:, part], 0)
                means.append(kept.sum((1, 3)) / count[:, None])
                squares.append((kept**2).sum((1, 3)) / count[:, None])
            mean = sum(means) / len(group)
            variance = sum(squares) / len(group) - mean**2
            for rank in group:
                part = grouped[:, slice(*starts[rank])]
                normal = (part - mean[:, None, :, None]) / jnp.sqrt(variance + 1e-6)[
                    :, None, :, None
                ]
                y.append((rank, normal.reshape(part.shape[:2] + x.shape[2:])))
        y = jnp.concatenate([part for _, part in sorted(y, key=lambda pair: pair[0])], axis=1)
        return y * scale + bias

    with np.errstate(all="ignore"):
        y, pullback = jax.vjp(forward, x, whole.scale, whole.bias)
        dx, dscale, dbias = pullback(whole.dy)
    return {k: np.asarray(v) for k, v in zip(KEYS, (y, dx, dscale, dbias), strict=True)}


KEYS = ("y", "dx", "dscale", "dbias")


def jax_shard_map(case: Case, check_vma: bool = True) -> Arrays:
    """`jax.shard_map` over four host devices; padding and masks make the shards uneven."""
    import jax
    from jax.sharding import PartitionSpec as P

    whole = data(case)
    mask = np.ones((*whole.x.shape[:2], 1), bool) if whole.mask is None else whole.mask
    x, dy, mask = (
        case.padded(a, filling) for a, filling in ((whole.x, np.nan), (whole.dy, 0), (mask, False))
    )
    auto = (jax.sharding.AxisType.Auto,)
    devices = jax.devices()[:RANKS]
    mesh = jax.make_mesh((RANKS,), ("shards",), axis_types=auto, devices=devices)

    def on_block(x, scale, bias, mask):
        keywords = {"axis_name": "shards", "axis_index_groups": case.groups_as_lists}
        return group_norm(x[0], scale, bias, mask=mask[0], **keywords, **case.keywords)[None]

    def forward(x, scale, bias):
        return jax.shard_map(
            on_block,
            mesh=mesh,
            in_specs=(P("shards"), P(), P(), P("shards")),
            out_specs=P("shards"),
            check_vma=check_vma,
        )(x, scale, bias, mask)

    def both(x, scale, bias, dy):
        y, pullback = jax.vjp(forward, x, scale, bias)
        return (y, *pullback(dy))

    y, dx, dscale, dbias = (np.asarray(a) for a in jax.jit(both)(x, whole.scale, whole.bias, dy))
    return dict(zip(KEYS, (case.unpadded(y), case.unpadded(dx), dscale, dbias), strict=True))


def jax_unchecked(case: Case) -> Arrays:
    """The same with ``check_vma=False``."""
    return jax_shard_map(case, check_vma=False)


def by_parts(case: Case, parts: list, masks: list, scale, bias) -> list:
    """Normalize shards with `GroupStatistics` that are merged between the two passes."""
    out: list = [None] * RANKS
    for group in case.index_groups or (range(RANKS),):
        merged = merge_statistics(
            *(group_statistics(parts[i], num_groups=NUM_GROUPS, mask=masks[i]) for i in group)
        )
        for i in group:
            out[i] = normalize(parts[i], merged, scale, bias, num_groups=NUM_GROUPS, mask=masks[i])
    return out


def jax_by_parts(case: Case) -> Arrays:
    """Tiles in JAX, differentiated through the statistics."""
    import jax

    whole = data(case)
    rows = [shards_of(case, rank) for rank in range(RANKS)]
    parts, dys, masks = (list(column) for column in zip(*rows, strict=True))

    def both(parts, scale, bias, dys):
        y, pullback = jax.vjp(lambda *a: by_parts(case, a[0], masks, *a[1:]), parts, scale, bias)
        return y, pullback(dys)

    y, (dx, dscale, dbias) = jax.jit(both)(parts, whole.scale, whole.bias, dys)
    y, dx = (np.concatenate([np.asarray(part) for part in a], axis=1) for a in (y, dx))
    return dict(zip(KEYS, (y, dx, np.asarray(dscale), np.asarray(dbias)), strict=True))


def torch_by_parts(case: Case) -> Arrays:
    """Tiles in PyTorch, differentiated through the statistics."""
    import torch

    whole = data(case)
    rows = [shards_of(case, rank) for rank in range(RANKS)]
    parts = [torch.from_numpy(x).requires_grad_() for x, _, _ in rows]
    masks = [None if m is None else torch.from_numpy(m) for _, _, m in rows]
    scale, bias = (torch.from_numpy(a.copy()).requires_grad_() for a in (whole.scale, whole.bias))
    y = torch.cat(by_parts(case, parts, masks, scale, bias), dim=1)
    y.backward(torch.from_numpy(whole.dy))
    dx = torch.cat([part.grad for part in parts], dim=1)
    found = (y.detach(), dx, scale.grad, bias.grad)
    return {k: v.numpy() for k, v in zip(KEYS, found, strict=True)}


def numpy_by_parts(case: Case) -> Arrays:
    """Tiles in NumPy, which has no autograd: forward only."""
    rows = [shards_of(case, rank) for rank in range(RANKS)]
    whole = data(case)
    y = by_parts(case, [r[0] for r in rows], [r[2] for r in rows], whole.scale, whole.bias)
    return {"y": np.concatenate(y, axis=1)}


def dask_chunks(case: Case) -> Arrays:
    """A Dask array whose chunks are the shards; it has no index groups."""
    if case.index_groups:
        return {}
    import dask.array as da

    whole = data(case)
    x, dy = (da.from_array(a, chunks=(-1, case.sizes, -1)) for a in (whole.x, whole.dy))
    y, pullback = group_norm_vjp(x, whole.scale, whole.bias, mask=whole.mask, **case.keywords)
    found = (y, *pullback(dy))
    return {k: np.asarray(v) for k, v in zip(KEYS, found, strict=True)}


# In four processes --------------------------------------------------------------------------------


def mpi_rank(rank: int, folder: Path) -> Callable[[Case], Arrays]:
    """NumPy over an mpi4py communicator."""
    from mpi4py import MPI

    from groupnorm import bind_axis

    bind_axis(shards=MPI.COMM_WORLD)

    def compute(case: Case) -> Arrays:
        whole = data(case)
        x, dy, mask = shards_of(case, rank)
        keywords = {"axis_name": "shards", "axis_index_groups": case.index_groups}
        y, pullback = group_norm_vjp(
            x, whole.scale, whole.bias, mask=mask, **keywords, **case.keywords
        )
        return dict(zip(KEYS, (y, *pullback(dy)), strict=True))

    return compute


def start_gloo(rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )


def torch_rank(rank: int, folder: Path) -> Callable[[Case], Arrays]:
    """PyTorch over a gloo process group."""
    import torch
    import torch.distributed as dist

    from groupnorm import bind_axis

    start_gloo(rank, folder)
    bind_axis(shards=dist.group.WORLD)

    def compute(case: Case) -> Arrays:
        whole = data(case)
        x, dy, mask = (None if a is None else torch.from_numpy(a) for a in shards_of(case, rank))
        leaves = (x, torch.from_numpy(whole.scale.copy()), torch.from_numpy(whole.bias.copy()))
        for leaf in leaves:
            leaf.requires_grad_()
        keywords = {"axis_name": "shards", "axis_index_groups": case.index_groups}
        y = group_norm(*leaves, mask=mask, **keywords, **case.keywords)
        y.backward(dy)
        found = (y.detach(), *(leaf.grad for leaf in leaves))
        return {k: v.numpy() for k, v in zip(KEYS, found, strict=True)}

    return compute


def dtensor_rank(rank: int, folder: Path) -> Callable[[Case], Arrays]:
    """PyTorch DTensors, which PyTorch splits itself (into 3, 3, 3, 2 for a length of 11)."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    start_gloo(rank, folder)
    mesh = init_device_mesh("cpu", (RANKS,))

    def compute(case: Case) -> Arrays:
        if case.index_groups:
            return {}
        whole = data(case)
        x, dy = (
            distribute_tensor(torch.from_numpy(a.copy()), mesh, [Shard(1)])
            for a in (whole.x, whole.dy)
        )
        leaves = (x, torch.from_numpy(whole.scale.copy()), torch.from_numpy(whole.bias.copy()))
        for leaf in leaves:
            leaf.requires_grad_()
        y = group_norm(*leaves, mask=whole.mask, **case.keywords)
        y.backward(dy)
        share = 1 / RANKS  # each rank has the full gradient, and the parent sums them
        return {
            "y": y.detach().to_local().numpy(),
            "dx": x.grad.to_local().numpy(),
            "dscale": share * leaves[1].grad.numpy(),
            "dbias": share * leaves[2].grad.numpy(),
        }

    return compute


PROCESSES = {"mpi": mpi_rank, "torch": torch_rank, "dtensor": dtensor_rank}


def run_processes(engine: str, folder: Path) -> dict[str, Arrays]:
    """Start four processes, wait, and return the whole arrays of every case."""
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, engine]
    if engine == "mpi":
        mpiexec = Path(sys.executable).with_name("mpiexec")
        commands = [[str(mpiexec), "-n", str(RANKS), *command, "-", str(folder)]]
    else:
        commands = [[*command, str(rank), str(folder)] for rank in range(RANKS)]
    running = [subprocess.Popen(command, cwd=ROOT, env=environment) for command in commands]
    try:
        failed = [process.wait(SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(failed):
        raise RuntimeError(f"{engine}: a process ended with status {max(failed, key=abs)}")
    ranks = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(RANKS)]
    return {
        case.name: joined([rank[case.name] for rank in ranks])
        for case in CASES
        if ranks[0][case.name]
    }


def work(engine: str, rank: str, folder: Path) -> None:
    """Run one process of an engine."""
    if engine == "mpi":
        from mpi4py import MPI

        rank = MPI.COMM_WORLD.Get_rank()
    compute = PROCESSES[engine](int(rank), folder)
    out = {case.name: compute(case) for case in CASES}
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(out))


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
