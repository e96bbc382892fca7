"""One rank of `test_mpi`: computes every case on its shard and writes the results.

Run as ``mpiexec -n WORLD python -m mpi4py -m tests.programs.mpi_ranks FOLDER``. The parent
compares; nothing is asserted here, so that one rank cannot stop while another waits for it.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import pickle
import sys
import traceback
from pathlib import Path

import numpy as np
from mpi4py import MPI

from groupnorm import GroupNorm, bind_axis, group_norm, group_norm_vjp, group_statistics, normalize
from tests.rows import host_dtype
from tests.sharding import CHANNELS, NUM_GROUPS, Case, cases, data

# An error on one rank leaves the others waiting: end them soon, even if the parent has ended.
SECONDS = 100

WORLD = MPI.COMM_WORLD
DTYPES = ["float16", "bfloat16", "float32", ">f4", "float64", "longdouble", "complex64"]
WIDTH = max(1, WORLD.size // 2)  # of the ranks' grid of two rows


class Counting(MPI.Intracomm):
    """Records the dtype of every sum."""

    def Allreduce(self, sendbuf, recvbuf, op=MPI.SUM):
        self.dtypes = [*self.counted, sendbuf.dtype]
        return super().Allreduce(sendbuf, recvbuf, op)

    @property
    def counted(self) -> list[np.dtype]:
        return getattr(self, "dtypes", [])

    def taken(self) -> list[str]:
        """Return the recorded dtypes and clear the record."""
        names = [dtype.str for dtype in self.counted]
        self.dtypes = []
        return names


def shard_of(case: Case):
    """Return this rank's x, dy and mask."""
    whole = data(case)
    x, dy = (case.split(a)[WORLD.rank].copy() for a in (whole.x, whole.dy))
    return x, dy, None if whole.mask is None else case.split(whole.mask)[WORLD.rank]


def layer_of(case: Case, axis_name) -> GroupNorm:
    layer = GroupNorm(
        CHANNELS, axis_name=axis_name, axis_index_groups=case.groups_as_lists, **case.keywords
    )
    layer.scale, layer.bias = data(case).scale, data(case).bias
    return layer


def results(y, vjp_y, gradients) -> dict:
    return {
        "y": y,
        "vjp_y": vjp_y,
        "dx": gradients.x,
        "dscale": gradients.scale.astype(np.float64),
        "dbias": gradients.bias.astype(np.float64),
    }


def by_layer(case: Case, axis_name="shards") -> dict:
    x, dy, mask = shard_of(case)
    layer = layer_of(case, axis_name)
    y, pullback = layer.vjp(x, mask)
    return results(layer(x, mask), y, pullback(dy))


def by_function(case: Case, axis_name=WORLD) -> dict:
    x, dy, mask = shard_of(case)
    return call(case, x, dy, mask, axis_name)


def call(case: Case, x, dy, mask, axis_name, **keywords) -> dict:
    whole = data(case)
    keywords |= {
        "mask": mask,
        "axis_name": axis_name,
        "axis_index_groups": case.index_groups,
        **case.keywords,
    }
    y, pullback = group_norm_vjp(x, whole.scale, whole.bias, **keywords)
    return results(group_norm(x, whole.scale, whole.bias, **keywords), y, pullback(dy))


def alone(case: Case) -> dict:
    """Pool over this rank only."""
    x, dy, mask = shard_of(case)
    return call(case, x, dy, mask, MPI.COMM_SELF)


# Memory -------------------------------------------------------------------------------------------


def fortran(a):
    return np.asfortranarray(a)


def strided(a):
    """Every other position of an array; the remaining positions are invalid values."""
    wide = np.full((a.shape[0], 2 * a.shape[1], a.shape[2]), np.nan, a.dtype)
    wide[:, ::2] = a
    return wide[:, ::2]


def backwards(a):
    return np.ascontiguousarray(a[..., ::-1])[..., ::-1]


def laid_out(case: Case, layout) -> dict:
    x, dy, mask = shard_of(case)
    x, dy = layout(x), layout(dy)
    out = call(case, x, dy, mask, WORLD)
    return out | {"in order": x.flags.c_contiguous}


def channels_first(case: Case) -> dict:
    x, dy, mask = shard_of(case)
    x, dy, mask = (np.ascontiguousarray(a.transpose(0, 2, 1)) for a in (x, dy, mask))
    out = call(case, x, dy, mask, WORLD, feature_axis=1)
    return {k: a.transpose(0, 2, 1) if a.ndim == 3 else a for k, a in out.items()}


# Dtypes and collectives ---------------------------------------------------------------------------


def with_dtype(case: Case, name: str) -> dict:
    """Return the results for a shard of another dtype, and the dtypes of sums for known shapes."""
    whole, dtype = data(case), host_dtype(name)
    wide = dtype if dtype.itemsize > 2 else np.dtype(np.float32)
    x, dy, scale, bias = whole.x, whole.dy, whole.scale, whole.bias
    if dtype.kind == "c":
        x, dy, scale, bias = (a + 1j * np.roll(a, 1) for a in (x, dy, scale, bias))
    x = case.split(x)[WORLD.rank].astype(dtype)
    dy = case.split(dy)[WORLD.rank].astype(wide)
    scale, bias = scale.astype(wide), bias.astype(wide)
    counting = Counting(WORLD)
    keywords = {"num_groups": NUM_GROUPS, "axis_name": counting}
    y = group_norm(x, **keywords)
    counting.taken()
    _, pullback = group_norm_vjp(x, scale, bias, **keywords)
    gradients = pullback(dy)
    return {
        "x": np.asarray(x, np.result_type(x, np.float64)),
        "dy": dy,
        "scale": scale,
        "bias": bias,
        "y": np.asarray(y, np.result_type(y, np.float64)),
        "gradients": [np.asarray(g, np.result_type(g, np.float64)) for g in gradients],
        "dtypes": [str(y.dtype), str(gradients.x.dtype)],
        "travelled": counting.taken(),
    }


def count_collectives(case: Case) -> dict:
    counting = Counting(WORLD.Dup())
    x, dy, mask = shard_of(case)
    layer = layer_of(case, counting)
    out = {}

    def count(name, function):
        result = function()
        out[name] = len(counting.taken())
        return result

    count("first", lambda: layer(x, mask))
    count("forward", lambda: layer(x, mask))
    _, pullback = count("vjp forward", lambda: layer.vjp(x, mask))
    count("backward", lambda: pullback(dy))
    count("statistics", lambda: measure(case, counting))
    # Another handle of a known communicator, which a program may create at every call.
    other = Counting(counting)
    layer_of(case, other)(x, mask)
    out["other handle"] = len(other.taken())
    count("new shape", lambda: layer(x[:1], None if mask is None else mask[:1]))
    return out


# Names --------------------------------------------------------------------------------------------


def grid(case: Case, names: tuple[str, ...]) -> dict:
    """Pool over two communicators, each of which contains a part of the ranks."""
    along_rows = WORLD.Split(WORLD.rank % WIDTH, WORLD.rank)
    along_columns = WORLD.Split(WORLD.rank // WIDTH, WORLD.rank)
    with bind_axis(rows=along_rows, columns=along_columns):
        return by_layer(case, names)


def call_pullback_unbound(case: Case) -> dict:
    """Call a pullback when its layer's name is unbound, and when it is bound to something else."""
    x, dy, mask = shard_of(case)
    layer = layer_of(case, "late")
    with bind_axis(late=WORLD):
        y, pullback = layer.vjp(x, mask)
        out = results(layer(x, mask), y, pullback(dy))
    unbound = pullback(dy)
    with bind_axis(late=MPI.COMM_SELF):
        bound_anew = pullback(dy)
    equal = [
        all(np.array_equal(a, b) for a, b in zip(one, unbound, strict=True))
        for one in (bound_anew, pullback(dy))
    ]
    return out | {"dx": unbound.x, "equal": equal, "error": error_of(lambda: layer(x, mask))}


def error_of(function) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# Statistics ---------------------------------------------------------------------------------------


def measure(case: Case, axis_name):
    x, _, mask = shard_of(case)
    return group_statistics(
        x,
        num_groups=NUM_GROUPS,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=case.index_groups,
    )


def by_statistics(case: Case) -> dict:
    x, _, mask = shard_of(case)
    statistics = measure(case, "shards")
    whole = data(case)
    y = normalize(x, statistics, whole.scale, whole.bias, num_groups=NUM_GROUPS, mask=mask)
    return {"y": y, "statistics": statistics._asdict()}


def same_bits_twice(case: Case) -> dict:
    first, second = by_layer(case), by_layer(case)
    return {k: first[k].tobytes() == second[k].tobytes() for k in first}


def without_samples(case: Case) -> dict:
    x, dy, _ = shard_of(case)
    y, pullback = layer_of(case, WORLD).vjp(x[:0])
    return {"y": y, "x": x, "gradients": pullback(dy[:0])}


def jobs(world: int) -> dict:
    """Return all jobs by name, in the same order on all ranks."""
    uneven = {2: (5, 2), 4: (5, 2, 3, 1)}[world]
    crossed = {2: ((1, 0),), 4: ((0, 3), (2, 1))}[world]
    masked = Case("masked job", uneven, "shard 1")
    exact = Case("masked job, exact variance", uneven, "shard 1", fast=False)
    split = Case("split job", uneven, "at random", index_groups=crossed)
    plain = Case("plain job", uneven, offset=1e3)
    every = {}
    for case in cases(world):
        every[case.name] = (by_layer, case)
        every[f"{case.name}, function"] = (by_function, case)
    every |= {
        "layer holds the communicator": (by_layer, masked, WORLD),
        "function is given a name": (by_function, masked, "shards"),
        "alone": (alone, Case("alone job", uneven)),
        "Fortran order": (laid_out, plain, fortran),
        "strided": (laid_out, plain, strided),
        "backwards": (laid_out, plain, backwards),
        "channels first": (channels_first, masked),
        "grid": (grid, masked, ("rows", "columns")),
        "grid, exact": (grid, exact, ("columns", "rows")),
        "grid, index groups": (grid, split, ("rows", "columns")),
        "collectives": (count_collectives, masked),
        "collectives, exact": (count_collectives, exact),
        "collectives, index groups": (count_collectives, split),
        "pullback of an unbound name": (call_pullback_unbound, masked),
        "statistics": (by_statistics, masked),
        "statistics, offset": (by_statistics, plain),
        "statistics, index groups": (by_statistics, split),
        "same bits twice": (same_bits_twice, masked),
        "no samples": (without_samples, plain),
    }
    names = [n for n in DTYPES if n != "bfloat16" or importlib.util.find_spec("ml_dtypes")]
    every |= {f"dtype {name}": (with_dtype, Case("dtype job", uneven), name) for name in names}
    return every


def main(folder: Path) -> None:
    out = {}
    with bind_axis(shards=WORLD):
        for name, (function, *arguments) in jobs(WORLD.size).items():
            try:
                out[name] = function(*arguments)
            except Exception:
                out[name] = {"failed": traceback.format_exc()}
            # After each job: if a rank is killed, the results so far can still be read.
            (folder / f"{WORLD.rank}.pickle").write_bytes(pickle.dumps(out))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    main(Path(sys.argv[1]))
