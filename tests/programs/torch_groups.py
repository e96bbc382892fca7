"""The four processes of `test_torch_groups`, which compares them with the whole arrays.

Run as ``python -m tests.programs.torch_groups FOLDER``. The ranks are forks, so that PyTorch and
its compiler start only once. Nothing is asserted here, so that no rank stops while others wait.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import pickle
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from groupnorm import (
    GroupNorm,
    bind_axis,
    group_norm,
    group_norm_vjp,
    group_statistics,
    merge_statistics,
    normalize,
)
from groupnorm.backends.torch import sum_gradients
from tests.programs.torch_derivatives import DERIVATIVES
from tests.programs.torch_ranks import error_of, results, shard_of
from tests.programs.torch_training import data_parallel, fully_sharded, mesh_of, sums_of_gradients
from tests.sharding import CHANNELS, NUM_GROUPS, Case, data

# An error on one rank leaves the others waiting. Not less: ranks compile, on a shared machine.
TIMEOUT = datetime.timedelta(seconds=60)
WORLD = 4
SIZES = (5, 2, 3, 1)
# The ranks of one row, and of one column, of a 2 x 2 mesh, as index groups.
PAIRS = {"rows": ((0, 1), (2, 3)), "data": ((0, 2), (1, 3))}
ALL = Case("all ranks", SIZES, "shard 1", offset=3.0)
ROWS = Case("rows", SIZES, "shard 1", index_groups=PAIRS["rows"])
DATA = Case("data", SIZES, "shard 1", index_groups=PAIRS["data"])
EXACT = Case("rows, exact", SIZES, "at random", fast=False, index_groups=PAIRS["rows"])
EMPTY = Case("one shard empty", (4, 0, 3, 2), "at random", offset=1e3)
# Without a mask, because masked programs take much longer to compile.
PLAIN_ALL = Case("all ranks, plain", SIZES)
PLAIN_ROWS = Case("rows, plain", SIZES, index_groups=PAIRS["rows"])
PLAIN_DATA = Case("data, plain", SIZES, index_groups=PAIRS["data"])


def groups_over() -> dict:
    """Return a group over the ranks of each case, by its name; all ways to pass a group occur."""
    mesh = mesh_of("data", "rows")
    everyone = dist.new_group()
    return {
        "all ranks": everyone,
        "one shard empty": everyone,
        "all ranks, plain": everyone,
        "rows": mesh["rows"],
        "rows, plain": mesh["rows"],
        "rows, exact": mesh.get_group("rows"),
        "data": mesh["data"].get_group(),
        "data, plain": mesh["data"].get_group(),
    }


# Names ------------------------------------------------------------------------------------------


def load(layer, case: Case):
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(data(case).scale))
        layer.bias.copy_(torch.from_numpy(data(case).bias))
    layer.zero_grad()
    return layer


def layer_of(case: Case, axis_name, **keywords):
    layer = GroupNorm(CHANNELS, backend="torch", axis_name=axis_name, **case.keywords, **keywords)
    return load(layer, case)


def run(layer, case: Case, before_backward=lambda: None) -> dict:
    x, dy, mask = shard_of(case)
    y = layer(x, mask)
    before_backward()
    y.backward(dy)
    return results(y, x, layer)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def bound_by_a_call() -> dict:
    binding = bind_axis(rows=mesh_of("data", "rows")["rows"])
    try:
        return run(layer_of(ROWS, "rows"), ROWS)
    finally:
        binding.unbind()


def bound(case: Case, change=lambda layer: layer) -> dict:
    with bind_axis(axis=groups_over()[case.name]):
        return run(change(layer_of(case, "axis")), case)


def direct(case: Case, change=lambda layer: layer) -> dict:
    return run(change(layer_of(case, groups_over()[case.name])), case)


def in_mesh(case: Case, axis_name, change=lambda layer: layer, **keywords) -> dict:
    """Name dimensions of a bound mesh."""
    with bind_axis(mesh_of("data", "rows")):
        return run(change(layer_of(case, axis_name, **keywords)), case)


def in_meshes_of_one_dimension() -> dict:
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("all",))
    with bind_axis(mesh, also=mesh_of("data", "rows")["data"]):
        return {"all": run(layer_of(ALL, "all"), ALL), "also": run(layer_of(DATA, "also"), DATA)}


def tuple_of_groups(case: Case) -> dict:
    mesh = mesh_of("data", "rows")
    return run(layer_of(case, (mesh.get_group("data"), mesh["rows"])), case)


def rebound(cases: tuple[Case, ...], change=lambda layer: layer) -> list[dict]:
    """One layer, its name bound to several groups in turn."""
    groups = groups_over()
    layer = layer_of(cases[0], "axis")
    call, out = change(layer), []
    for case in cases:
        load(layer, case)
        with bind_axis(axis=groups[case.name]):
            out.append(copy.deepcopy(run(call, case)))
    return out


def backward_after_the_binding(*, rebind: bool) -> dict:
    """Autograd when the name is no longer bound, or bound to another group."""
    groups = groups_over()
    with contextlib.ExitStack() as stack:
        first = bind_axis(axis=groups["rows"])

        def leave():
            first.unbind()
            if rebind:
                stack.enter_context(bind_axis(axis=groups["data"]))

        return run(layer_of(ROWS, "axis"), ROWS, leave)


def pullback_after_the_binding(case: Case, *, by_function: bool, rebind: bool) -> dict:
    groups = groups_over()
    x, dy, mask = shard_of(case)
    x = x.detach()
    with bind_axis(axis=groups[case.name]):
        layer = layer_of(case, "axis")
        if by_function:
            y, pullback = group_norm_vjp(
                x, layer.scale, layer.bias, mask=mask, axis_name="axis", **case.keywords
            )
        else:
            y, pullback = layer.vjp(x, mask)
    with bind_axis(axis=groups["data"]) if rebind else contextlib.nullcontext():
        grads = pullback(dy)
    arrays = {"y": y, "dx": grads.x, "dscale": grads.scale, "dbias": grads.bias}
    return {name: a.detach().numpy() for name, a in arrays.items()}


def wrong_names() -> dict:
    mesh = mesh_of("data", "rows")
    others = [2, 3] if dist.get_rank() < 2 else [0, 1]
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in ([0, 1], [2, 3])}
    x = torch.ones(2, CHANNELS)

    def call(axis_name):
        return error_of(lambda: group_norm(x, num_groups=NUM_GROUPS, axis_name=axis_name))

    with bind_axis(mesh), bind_axis(number=3):
        return {
            "not bound": call("colums"),
            "not bound, in a tuple": call(("rows", "colums")),
            "bound to a number": call("number"),
            "a mesh of two dimensions": call(mesh),
            "no member of a group": call(groups[tuple(others)]),
            "no member of a mesh": call(DeviceMesh("cpu", others)),
            "no axis": call(()),
            "sum_gradients": error_of(lambda: sum_gradients(x, "colums")),
            "sum_gradients, no axis": error_of(lambda: sum_gradients(x, ())),
        }


# Derivatives ------------------------------------------------------------------------------------


def doubles(case: Case) -> tuple:
    """Return x, scale, bias, dy (and the mask) of this rank in float64, for derivatives."""
    x, dy, mask = shard_of(case)
    scale, bias = (torch.from_numpy(a).double() for a in (data(case).scale, data(case).bias))
    return x.detach().double(), scale, bias, dy.double(), mask


def derivative(case: Case, job) -> dict:
    """Call `job` with the function to differentiate, over a group that was not used before.

    Twice: the first call over a group also checks that its ranks agree.
    """
    group = groups_over()[case.name]
    x, scale, bias, dy, mask = doubles(case)

    def function(x, scale=scale, bias=bias, mask=mask):
        return group_norm(x, scale, bias, mask=mask, axis_name=group, **case.keywords)

    first, again = (job(function, x, scale, bias, dy, mask) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return {"same": same, "values": [a.detach().numpy() for a in first]}


def statistics_by_parts(case: Case) -> dict:
    """Statistics over all ranks, of two tiles each; normalized by them; gradients through them."""
    group = groups_over()[case.name]
    x, scale, bias, dy, mask = doubles(case)
    leaves = [a.requires_grad_() for a in (x, scale, bias)]
    keywords = {"num_groups": NUM_GROUPS}
    cut = 1 + dist.get_rank() % 2
    tiles = [
        group_statistics(part, mask=m, axis_name=group, **keywords)
        for part, m in ((x[:, :cut], mask[:, :cut]), (x[:, cut:], mask[:, cut:]))
    ]
    whole = merge_statistics(*tiles)
    y = normalize(x, whole, scale, bias, mask=mask, **keywords)
    gradients = torch.autograd.grad(y, leaves, dy)
    at_once = group_statistics(x, mask=mask, axis_name=group, **keywords)
    named = dict(zip(("y", "dx", "dscale", "dbias"), (y, *gradients), strict=True))
    named |= {"count": whole.count, "mean": whole.mean + whole.residual / whole.unit}
    named |= {"variance": whole.variance, "variance at once": at_once.variance}
    return {name: a.detach().numpy() for name, a in named.items()}


def statistics_of_index_groups(case: Case) -> dict:
    x, *_, mask = doubles(case)
    statistics = group_statistics(
        x,
        num_groups=NUM_GROUPS,
        mask=mask,
        axis_name=dist.group.WORLD,
        axis_index_groups=case.groups_as_lists,
    )
    return {"mean": statistics.mean.numpy(), "variance": statistics.variance.numpy()}


# Collectives ------------------------------------------------------------------------------------


def collectives(*, tuple_of_names=False, fast=True, index_groups=None) -> dict:
    """Count them in two forward passes and a backward pass, over groups not used before."""
    case = Case("counted", SIZES, "at random", fast=fast, index_groups=index_groups)
    with bind_axis(mesh_of("data", "rows"), everyone=dist.new_group()):
        name = ("data", "rows") if tuple_of_names else "everyone"
        layer = layer_of(case, name, axis_index_groups=case.groups_as_lists)
        x, dy, mask = shard_of(case)
        counts = {}
        for key, call in (
            ("first", lambda: layer(x, mask)),
            ("forward", lambda: layer(x, mask)),
            ("another shape", lambda: layer(x[:1], mask[:1])),
        ):
            with CommDebugMode() as mode:
                y = call()
            counts[key] = mode.get_total_counts()
        with CommDebugMode() as mode:
            y.backward(dy[:1])
        counts["backward"] = mode.get_total_counts()
        pullback = layer.vjp(x, mask)[1]
        with CommDebugMode() as mode:
            pullback(dy)
        return counts | {"pullback": mode.get_total_counts()}


# All jobs ---------------------------------------------------------------------------------------


def jobs() -> dict:
    """Return all jobs by name, in the same order on all ranks."""
    partial = functools.partial
    every = {
        "bound by a call": bound_by_a_call,
        "bound to a group": partial(bound, EXACT),
        "bound to a mesh": partial(bound, ROWS),
        "bound to all ranks, one empty": partial(bound, EMPTY),
        "a group": partial(direct, EXACT),
        "a part of a mesh": partial(direct, ROWS),
        "a bound mesh: rows": partial(in_mesh, ROWS, "rows"),
        "a bound mesh: data": partial(in_mesh, DATA, "data"),
        "a bound mesh: both": partial(in_mesh, ALL, ("data", "rows")),
        "a bound mesh: both, turned": partial(in_mesh, EMPTY, ("rows", "data")),
        "a bound mesh: list of both": partial(in_mesh, ALL, ["data", "rows"]),
        # Ranks are numbered in the order of the names: reversed, adjacent ranks share a column.
        "index groups of both": partial(
            in_mesh, ROWS, ("data", "rows"), axis_index_groups=[[0, 1], [2, 3]]
        ),
        "index groups of both, turned": partial(
            in_mesh, DATA, ("rows", "data"), axis_index_groups=[[0, 1], [2, 3]]
        ),
        "meshes of one dimension": in_meshes_of_one_dimension,
        "groups in a tuple": partial(tuple_of_groups, ALL),
        "copied": partial(bound, ROWS, copy.deepcopy),
        "copied, a group": partial(direct, EXACT, copy.deepcopy),
        "copied, a mesh": partial(direct, ROWS, copy.deepcopy),
        "pickled": partial(bound, EXACT, pickled),
        "compiled, mesh": partial(direct, PLAIN_ROWS, compiled),
        "compiled, group": partial(direct, PLAIN_DATA, compiled),
        "compiled, two names": partial(in_mesh, PLAIN_ALL, ("data", "rows"), compiled),
        "rebound": partial(rebound, (ALL, ROWS, DATA, ALL)),
        "rebound, compiled": partial(rebound, (PLAIN_ALL, PLAIN_ROWS, PLAIN_ALL), compiled),
        "backward, not bound": partial(backward_after_the_binding, rebind=False),
        "backward, rebound": partial(backward_after_the_binding, rebind=True),
        "wrong names": wrong_names,
        "DDP over data": partial(data_parallel, "data"),
        "DDP over all ranks": partial(data_parallel, "all"),
        "FSDP over data": fully_sharded,
        "sums of gradients": sums_of_gradients,
        "statistics": partial(statistics_by_parts, ALL),
        "statistics, one shard empty": partial(statistics_by_parts, EMPTY),
        "statistics of index groups": partial(statistics_of_index_groups, DATA),
        "collectives": collectives,
        "collectives, exact": partial(collectives, fast=False),
        "collectives, index groups": partial(collectives, index_groups=PAIRS["data"]),
        "collectives, two names": partial(collectives, tuple_of_names=True),
    }
    for by_function in (False, True):
        for case, rebind in ((ROWS, True), (EXACT, False)):
            name = f"pullback, {'function' if by_function else 'layer'}, {case.name}"
            every[name] = partial(
                pullback_after_the_binding, case, by_function=by_function, rebind=rebind
            )
    for name, job in DERIVATIVES.items():
        for case in (EXACT, EMPTY):
            every[f"{name}, {case.name}"] = partial(derivative, case, job)
    return every


def rank_main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=TIMEOUT
    )
    out = {}
    for name, job in jobs().items():
        try:
            out[name] = job()
        except Exception:
            out[name] = {"error": traceback.format_exc()}
        # After each job: if a rank is killed, the results so far can still be read.
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(out))
    dist.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # The compiler's first use takes seconds of imports: done once, before the ranks are forked.
    layer = GroupNorm(CHANNELS, num_groups=NUM_GROUPS, backend="torch")
    compiled(layer)(torch.ones(2, CHANNELS, requires_grad=True))
    torch.multiprocessing.start_processes(rank_main, (folder,), WORLD, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
