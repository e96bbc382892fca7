"""A large image in tiles and in bands of rows: the results are those of the whole image.

A photograph (from scikit-learn) is enlarged and expanded to 16 features per pixel by a 1x1
convolution. Its group normalization, with the gradients of a random cotangent, is then computed

tiles   in NumPy, one tile in memory at a time: one pass over the tiles computes statistics, a
        second one normalizes them with the merged statistics;
torch   in four processes, each holding a band of rows of different height;
jax     on four devices of one CPU, each holding the same number of rows, the last ones padding;

and compared with that of the whole image on one device. The exit status is 1 if they differ by
more than float32 rounding::

    python examples/tiled_image.py                               # all three
    python examples/tiled_image.py tiles [--enlarge N]
    torchrun --nproc-per-node 4 examples/tiled_image.py torch
    python examples/tiled_image.py jax
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_sample_image

from groupnorm import group_norm, group_statistics, merge_statistics, normalize

WORLD = 4
FEATURES, GROUPS = 16, 4
TILE = 256
FORWARD, GRADIENT = 5e-6, 1e-5
OPTIONS = {"num_groups": GROUPS}


class Image:
    """The features of the enlarged photograph, (1, rows, columns, FEATURES), computed on demand.

    `part` computes them; a real program would read tiles from disk, or from the previous layer.
    """

    def __init__(self, enlarge: int) -> None:
        self.pixels = load_sample_image("china.jpg")
        self.enlarge = enlarge
        self.height, self.width = (n * enlarge for n in self.pixels.shape[:2])
        rng = np.random.default_rng(0)
        self.kernel = rng.normal(size=(3, FEATURES)).astype(np.float32)
        self.scale = rng.uniform(0.5, 1.5, FEATURES).astype(np.float32)
        self.bias = rng.normal(size=FEATURES).astype(np.float32)

    def part(self, rows: slice, columns: slice = slice(None)) -> np.ndarray:
        """Compute the features of some rows and columns."""
        row, column = (
            np.arange(n)[s] // self.enlarge for n, s in ((self.height, rows), (self.width, columns))
        )
        return (self.pixels[np.ix_(row, column)].astype(np.float32) @ self.kernel)[None]

    def whole(self) -> np.ndarray:
        return self.part(slice(None))

    def cotangent(self) -> np.ndarray:
        """A random cotangent, the same in every process."""
        shape = (1, self.height, self.width, FEATURES)
        return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest |a - b|, relative where values are above 1."""
    return float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b))))  # np.max keeps a NaN


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def say(what: str, differences: dict[str, float]) -> bool:
    """Print one line, and return whether all differences are within rounding."""
    print(what, *(f"{k} {v:.1e}" for k, v in differences.items()), sep="   ", flush=True)
    return all(
        difference <= (FORWARD if name == "y" else GRADIENT)  # a NaN is not
        for name, difference in differences.items()
    )


# NumPy: one tile in memory at a time --------------------------------------------------------------


def tiles_of(image: Image) -> Iterator[tuple[slice, slice]]:
    """The last tile of a row or column is smaller than the others."""
    for row, column in itertools.product(range(0, image.height, TILE), range(0, image.width, TILE)):
        yield slice(row, row + TILE), slice(column, column + TILE)


def in_tiles(image: Image) -> bool:
    statistics = merge_statistics(
        *(group_statistics(image.part(*tile), **OPTIONS) for tile in tiles_of(image))
    )
    whole = group_norm(image.whole(), image.scale, image.bias, **OPTIONS)
    difference = alone = 0.0
    for tile in tiles_of(image):
        x, want = image.part(*tile), whole[:, *tile]
        y = normalize(x, statistics, image.scale, image.bias, **OPTIONS)
        difference = max(difference, largest_difference(y, want))
        naive = group_norm(x, image.scale, image.bias, **OPTIONS)
        alone = max(alone, largest_difference(naive, want))
    megabytes = TILE * TILE * FEATURES * 4 / 2**20
    print(
        f"image: {image.height} x {image.width} x {FEATURES}, {whole.nbytes / 2**20:.0f} MiB; "
        f"{len(list(tiles_of(image)))} tiles of at most {megabytes:.0f} MiB"
    )
    print(f"each tile with its own statistics, as is common: wrong by {alone:.1f}")
    return say("NumPy, tile by tile:         ", {"y": difference})


# PyTorch: a band of rows in each process ----------------------------------------------------------


def in_torch(image: Image) -> bool:
    import torch
    import torch.distributed as dist

    from groupnorm.backends.torch import sum_gradients

    dist.init_process_group("gloo")
    try:
        rank, size = dist.get_rank(), dist.get_world_size()

        def run(rows: slice, **options) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
            x = torch.from_numpy(image.part(rows)).requires_grad_()
            parameters = [torch.tensor(p, requires_grad=True) for p in (image.scale, image.bias)]
            y = group_norm(x, *parameters, **OPTIONS, **options)
            y.backward(torch.from_numpy(image.cotangent()[:, rows]))
            return y.detach(), x.grad, parameters

        # Different heights, in proportion 1 : 2 : 3 : ..., to show that they need not be equal.
        cuts = [image.height * n * (n + 1) // (size * (size + 1)) for n in range(size + 1)]
        rows = slice(cuts[rank], cuts[rank + 1])
        y, dx, parameters = run(rows, axis_name=dist.group.WORLD)
        # Each rank has its band's contribution to the parameter gradients.
        sum_gradients(parameters, dist.group.WORLD)

        whole_y, whole_dx, whole_parameters = run(slice(None))
        mine = {
            "y": largest_difference(y.numpy(), whole_y[:, rows].numpy()),
            "dx": relative_difference(dx.numpy(), whole_dx[:, rows].numpy()),
            **{
                name: relative_difference(p.grad.numpy(), q.grad.numpy())
                for name, p, q in zip(
                    ("dscale", "dbias"), parameters, whole_parameters, strict=True
                )
            },
        }
        worst = torch.tensor(list(mine.values()))
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        differences = dict(zip(mine, worst.tolist(), strict=True))
        if rank == 0:
            return say(f"PyTorch, {size} processes (gloo):", differences)
        return True  # rank 0 reports for all
    finally:
        dist.destroy_process_group()


# JAX: the same number of rows on each device, by padding ------------------------------------------


def in_jax(image: Image) -> bool:
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={WORLD}"
    )  # read once, when JAX starts
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((WORLD,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    bands = P(None, "rows")
    padding = ((0, 0), (0, -image.height % WORLD), (0, 0), (0, 0))
    # The content of the padding is irrelevant.
    x = np.pad(image.whole(), padding, constant_values=np.nan)
    dy = np.pad(image.cotangent(), padding)
    counts = (np.arange(x.shape[1]) < image.height)[None, :, None, None]

    @jax.shard_map(mesh=mesh, in_specs=(bands, P(), P(), bands), out_specs=bands)
    def on_bands(x, scale, bias, counts):
        return group_norm(x, scale, bias, mask=counts, axis_name="rows", **OPTIONS)

    def on_one_device(x, scale, bias):
        return group_norm(x, scale, bias, **OPTIONS)

    @jax.jit
    def sharded(x, scale, bias, counts, dy):
        y, pullback = jax.vjp(lambda *a: on_bands(*a, counts), x, scale, bias)
        return y, *pullback(dy)

    @jax.jit
    def alone(x, scale, bias, dy):
        y, pullback = jax.vjp(on_one_device, x, scale, bias)
        return y, *pullback(dy)

    place = jax.NamedSharding(mesh, bands)
    parameters = jnp.asarray(image.scale), jnp.asarray(image.bias)
    x, counts, dy = (jax.device_put(a, place) for a in (x, counts, dy))
    results = [np.asarray(a) for a in sharded(x, *parameters, counts, dy)]
    results[:2] = [a[:, : image.height] for a in results[:2]]
    whole = alone(jnp.asarray(image.whole()), *parameters, jnp.asarray(image.cotangent()))
    names = ("y", "dx", "dscale", "dbias")
    differences = {
        name: (largest_difference if name == "y" else relative_difference)(got, np.asarray(want))
        for name, got, want in zip(names, results, whole, strict=True)
    }
    return say(f"JAX, {WORLD} devices, padded:     ", differences)


def everything(enlarge: int) -> bool:
    """Run every engine as a user would start it, in separate processes."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(WORLD))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    fine = True
    for launcher, engine in (((), "tiles"), (torchrun, "torch"), ((), "jax")):
        command = [sys.executable, *launcher, __file__, engine, "--enlarge", str(enlarge)]
        fine = subprocess.call(command, env=environment) == 0 and fine
    return fine


ENGINES = {"tiles": in_tiles, "torch": in_torch, "jax": in_jax}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", nargs="?", choices=ENGINES, help="default: all of them")
    parser.add_argument("--enlarge", type=int, default=3, help="of 427 x 640 pixels (default 3)")
    options = parser.parse_args()
    if options.engine is None:
        fine = everything(options.enlarge)
    else:
        fine = ENGINES[options.engine](Image(options.enlarge))
    if not fine:
        print("The parts DIFFER from the whole, see above.", file=sys.stderr)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
