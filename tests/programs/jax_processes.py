"""One process of `test_jax_processes`: two devices of four in total, with gloo collectives.

Run as ``python -m tests.programs.jax_processes RANK FOLDER [LOST RANK]``. The parent compares;
nothing is asserted here, so that one process cannot stop while the other waits for it.
"""

from __future__ import annotations

import functools
import os
import pickle
import socket
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from groupnorm import GroupNorm
from tests.sharding import CHANNELS, Case, data

PROCESSES, DEVICES = 2, 2
SHARDS = PROCESSES * DEVICES
# How long a process may be silent before the others give up on it.
PATIENCE = 60
# Less if one is lost on purpose. Its peer detects that at once by the closed connection, but then
# waits for it once more, for the common shutdown.
PATIENCE_WITH_THE_LOST = 10

UNEVEN, EMPTY = (5, 2, 3, 1), (5, 0, 3, 2)  # of one padded shape, so that one compilation is enough
ONE_AND_THREE = ((2,), (0, 3, 1))
# With axis_name; and with one array over all processes, which needs none.
NAMED = [
    Case("even", (3, 3, 3, 3)),
    Case("uneven", UNEVEN),
    Case("one shard empty", EMPTY),
    Case("one shard empty, offset", EMPTY, offset=1e3),
    Case("a shard fully masked", UNEVEN, "shard 1"),
    Case("a shard fully masked, offset", UNEVEN, "shard 1", offset=1e3),
    Case("a sample fully masked", UNEVEN, "sample 0"),
    Case("masked at random, far", UNEVEN, "at random", offset=1e5),
    Case("offset 1e3", UNEVEN, offset=1e3),
    Case("offset 1e5", UNEVEN, offset=1e5),
    Case("exact variance", UNEVEN, "shard 1", offset=1e3, fast=False),
    Case("exact variance, far", UNEVEN, offset=1e5, fast=False),
    Case("index groups", UNEVEN, index_groups=ONE_AND_THREE),
    Case("index groups, masked, offset", UNEVEN, "shard 1", 1e3, index_groups=ONE_AND_THREE),
]
UNNAMED = [
    Case("no name", (4, 4, 4, 4)),
    Case("no name, offset 1e3", (4, 4, 4, 4), offset=1e3),
    Case("no name, offset 1e5", (4, 4, 4, 4), offset=1e5),
    Case("no name, masked, offset", (4, 4, 4, 4), "shard 1", offset=1e3),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the other process never wrote {file}")
        time.sleep(0.02)


def initialize(rank: int, folder: Path, patience: int) -> None:
    """Connect to the other process; the first one chooses the port, as late as possible."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    meeting = folder / "port"
    if rank == 0:
        partial = folder / "port.partial"
        partial.write_text(str(free_port()))
        partial.rename(meeting)
    wait_for(meeting)
    jax.distributed.initialize(
        f"localhost:{meeting.read_text()}",
        PROCESSES,
        rank,
        initialization_timeout=PATIENCE,
        heartbeat_timeout_seconds=patience,
        shutdown_timeout_seconds=patience,
    )
    assert jax.device_count() == SHARDS
    assert jax.local_device_count() == DEVICES


@functools.cache
def mesh():
    return jax.make_mesh((SHARDS,), ("shards",), axis_types=(jax.sharding.AxisType.Auto,))


def globally(a: np.ndarray, *spec: str | None) -> jax.Array:
    """Create an array over all processes, each of which has all of `a`."""
    sharding = NamedSharding(mesh(), P(*spec))
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])


def layer_of(case: Case, **keywords) -> GroupNorm:
    layer = GroupNorm(CHANNELS, backend="jax", **case.keywords, **keywords)
    whole = data(case)
    parameters = [globally(whole.scale), globally(whole.bias)]
    return jax.tree.unflatten(jax.tree.structure(layer), parameters)


def on_shards(layer, x, dy, *mask):
    """Differentiate inside: a shard's own gradients, as in a training step per device."""

    def block(layer, *blocks):
        x, dy, *mask = (b[0] for b in blocks)
        y, pullback = jax.vjp(lambda layer, x: layer(x, *mask), layer, x)
        grads, dx = pullback(dy)
        return jax.tree.map(lambda a: a[None], (y, dx, grads.scale, grads.bias))

    arrays = (x, dy, *mask)
    return jax.shard_map(
        block,
        mesh=mesh(),
        in_specs=(P(), *(P("shards") for _ in arrays)),
        out_specs=P("shards"),
        check_vma=False,
    )(layer, *arrays)


def on_whole(layer, x, dy, *mask):
    y, pullback = jax.vjp(lambda layer, x: layer(x, *mask), layer, x)
    grads, dx = pullback(dy)
    return y, dx, grads.scale, grads.bias


# One cache of compiled programs for all cases of equal layers and shapes.
by_shards, by_whole = jax.jit(on_shards), jax.jit(on_whole)


def addressable(a: jax.Array) -> dict:
    """Return the parts of an array in this process, keyed by their position."""
    return {
        "shape": a.shape,
        "parts": [(shard.index, np.asarray(shard.data)) for shard in a.addressable_shards],
    }


def named(results) -> dict:
    return dict(zip(("y", "dx", "dscale", "dbias"), map(addressable, results), strict=True))


def compute(case: Case) -> dict:
    """Pool over the axis; shards are padded, and the padding masked and NaN."""
    whole = data(case)
    arrays = [case.padded(whole.x, np.nan), case.padded(whole.dy, 0)]
    if whole.mask is not None or len(set(case.sizes)) > 1:
        mask = np.ones((*whole.x.shape[:2], 1), bool) if whole.mask is None else whole.mask
        arrays.append(case.padded(mask, False))
    layer = layer_of(case, axis_name="shards", axis_index_groups=case.groups_as_lists)
    return named(by_shards(layer, *(globally(a, "shards") for a in arrays)))


def compute_without_a_name(case: Case) -> dict:
    """Pool by the compiler: one array over all processes."""
    whole = data(case)
    arrays = [whole.x, whole.dy] + ([] if whole.mask is None else [whole.mask])
    return named(by_whole(layer_of(case), *(globally(a, None, "shards") for a in arrays)))


def jobs() -> dict:
    """Return all jobs by name, in the same order on all processes."""
    every = {case.name: (compute, case) for case in NAMED}
    return every | {case.name: (compute_without_a_name, case) for case in UNNAMED}


def compute_everything(rank: int, folder: Path) -> None:
    out = {}
    for name, (function, *arguments) in jobs().items():
        try:
            out[name] = function(*arguments)
        except Exception:
            out[name] = {"error": traceback.format_exc()}
        # After each job: if a process is killed, the results so far can still be read.
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(out))


def lose_one(rank: int, folder: Path, lost: int) -> None:
    """Compute once, lose a process, and continue computing."""
    case = NAMED[0]
    compute(case)
    (folder / f"{rank}.computed").touch()
    if rank == lost:
        wait_for(folder / f"{1 - rank}.computed")
        os._exit(1)
    while True:  # ended by the engine's error, or by the parent process
        compute(case)


def main(rank: int, folder: Path, lost: int | None) -> None:
    initialize(rank, folder, PATIENCE if lost is None else PATIENCE_WITH_THE_LOST)
    if lost is None:
        compute_everything(rank, folder)
    else:
        lose_one(rank, folder, lost)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else None)
