"""Decode a latent in tiles, with the result of the untiled decode, in a fraction of its memory.

The decoder of a latent diffusion model (diffusers' `AutoencoderKL`) needs most of its memory at
the resolution of the image. diffusers' own tiling (`vae.enable_tiling()`) decodes tiles
independently, each with the group-norm statistics of that tile, and blends the seams: the result is
that of another network. Here the statistics are those of the whole image::

    python examples/tiled_vae.py [--out DIR] [--height PIXELS]

Two things make tiles differ from the whole:

convolutions
    read the neighbouring pixels. Each tile is cut with a margin as wide as the receptive field
    (clipped at the image's border, where the convolutions' zero padding is right), and the
    margin of the result is discarded.
group norms
    average over all pixels. Their statistics are computed part by part (`group_statistics`) and
    merged (`merge_statistics`) before any tile is normalized with them (`normalize`).

A tile cannot pass a group norm before all tiles have reached it. Storing all of them there would
need as much memory as the untiled decode. Instead, tiles are recomputed: a pass over them ends each
one at the first norm whose statistics are not known yet, and keeps nothing but the statistics. The
last pass finds all of them known and computes the result. To limit the recomputation, the decoder
is cut into stages of two to five norms, whose results are stored. This costs time: 2.7 times as
many operations in convolutions, including the margins.

Stored    the input and the result of one stage, whole; the statistics (a few KB);
per tile  the activations of one tile with its margin;
untiled   the middle block, because of its attention. It has the resolution of the latent.

The decoder's modules are called unchanged, because `SharedStatistics` intercepts `F.group_norm`:
`in_tiles` also works for other networks of convolutions, group norms and upsampling.

Each method runs in a separate process, which measures its peak memory above that before the call.
The exit status is 1 if the result differs from the untiled one by more than float32 rounding. The
differences are drawn to tiled_vae.png. The weights are random; the latent is that of a photograph.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from groupnorm import GroupStatistics, group_statistics, merge_statistics, normalize

TILE = 128  # pixels of the image, for all methods
TOLERANCE = 1e-5  # relative to the largest result
CHANNELS = (32, 64, 128, 128)  # a quarter of Stable Diffusion's
CHANNELS_PER_GROUP = 4  # in the last block, as in Stable Diffusion
THREADS = 2


def random_vae(channels: Sequence[int] = CHANNELS, tile: int = TILE) -> AutoencoderKL:
    """The architecture of Stable Diffusion's VAE, with random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=2,
        norm_num_groups=channels[0] // CHANNELS_PER_GROUP,
        sample_size=tile,  # the size of the tiles in diffusers' own tiling
    )
    return vae.eval().requires_grad_(False)


# Statistics shared over tiles ---------------------------------------------------------------------


class Tile(NamedTuple):
    """Rows and columns of an image, with and without the margin."""

    outer: tuple[slice, slice]
    inner: tuple[slice, slice]

    def core(self, x: Tensor) -> Tensor:
        """Remove the margin from what was computed of the outer tile, and may be enlarged."""
        scale = x.shape[2] // (self.outer[0].stop - self.outer[0].start)
        rows, columns = (
            slice(scale * (inner.start - outer.start), scale * (inner.stop - outer.start))
            for outer, inner in zip(self.outer, self.inner, strict=True)
        )
        return x[:, :, rows, columns]


def tiles_of(height: int, width: int, size: int, margin: int) -> Iterator[Tile]:
    """The last tile of a row or column may be smaller than the others."""

    def cuts(length: int) -> Iterator[tuple[slice, slice]]:
        for start in range(0, length, size):
            stop = min(start + size, length)
            outer = slice(max(start - margin, 0), min(stop + margin, length))
            yield outer, slice(start, stop)

    for rows, columns in itertools.product(cuts(height), cuts(width)):
        yield Tile(*zip(rows, columns, strict=True))


class StatisticsNeeded(Exception):
    """Raised at a norm whose statistics are not known yet, with those of the current tile."""

    def __init__(self, part: GroupStatistics) -> None:
        self.part = part


class SharedStatistics(TorchFunctionMode):
    """Within this context every group norm of a tile uses the statistics of the whole image.

    `known` are the statistics of the first group norms, in the order in which they are called.
    """

    def __init__(self, tile: Tile, known: Sequence[GroupStatistics]) -> None:
        super().__init__()
        self.tile = tile
        self.known = iter(known)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return (self.group_norm if func is F.group_norm else func)(*args, **(kwargs or {}))

    def group_norm(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        layout = {"num_groups": num_groups, "feature_axis": 1}
        statistics = next(self.known, None)
        if statistics is None:  # the pixels of the margin are counted by the neighbours
            raise StatisticsNeeded(group_statistics(self.tile.core(x), **layout))
        return normalize(x, statistics, weight, bias, epsilon=eps, **layout)


def in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, size: int, margin: int) -> Tensor:
    """Compute network(x) for one tile of x at a time.

    `size` and `margin` are in pixels of x, (N, C, height, width). The network may enlarge it.
    """
    known: list[GroupStatistics] = []
    result = None
    while True:  # once for each group norm, and once for the result
        parts = []
        for tile in tiles_of(*x.shape[2:], size, margin):
            rows, columns = tile.outer
            try:
                with SharedStatistics(tile, known):
                    y = tile.core(network(x[:, :, rows, columns]))
            except StatisticsNeeded as needed:
                parts.append(needed.part)
                continue
            scale = y.shape[2] // (tile.inner[0].stop - tile.inner[0].start)
            if result is None:
                result = y.new_empty(*y.shape[:2], *(scale * length for length in x.shape[2:]))
            rows, columns = (slice(scale * s.start, scale * s.stop) for s in tile.inner)
            result[:, :, rows, columns] = y
        if not parts:
            return result
        known.append(merge_statistics(*parts))


# The decoder --------------------------------------------------------------------------------------


class Stage:
    """Modules that are called one after the other. Upsampling can only be the first."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.scale = 2 if isinstance(modules[0], Upsample2D) else 1
        kernels = [
            m.kernel_size[0] for module in modules for m in module.modules() if type(m) is nn.Conv2d
        ]
        # The receptive field, in pixels of the input. All convolutions follow the upsampling.
        self.margin = -(-sum(kernel // 2 for kernel in kernels) // self.scale)

    def __call__(self, x: Tensor) -> Tensor:
        for module in self.modules:
            x = module(x, None) if isinstance(module, ResnetBlock2D) else module(x)
        return x


def stages_of(decoder: nn.Module) -> Iterator[Stage]:
    """Cut what follows the middle block where the activations are small.

    That is before each upsampling, and after the first residual block of each resolution, which
    reduces the number of channels.
    """
    modules: list[nn.Module] = []
    for block in decoder.up_blocks:
        first, *others = block.resnets
        yield Stage([*modules, first])
        modules = others
        if block.upsamplers:
            yield Stage(modules)
            modules = [*block.upsamplers]
    yield Stage([*modules, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out])


def decode_in_tiles(vae: AutoencoderKL, z: Tensor, tile: int = TILE) -> Tensor:
    """The same as `vae.decode(z).sample`, with tiles of `tile` pixels of each stage's result."""
    if vae.post_quant_conv is not None:
        z = vae.post_quant_conv(z)
    x = vae.decoder.mid_block(vae.decoder.conv_in(z))
    for stage in stages_of(vae.decoder):
        x = in_tiles(stage, x, tile // stage.scale, stage.margin)
    return x


def decode_untiled(vae: AutoencoderKL, z: Tensor) -> Tensor:
    vae.disable_tiling()
    return vae.decode(z).sample


def decode_in_diffusers_tiles(vae: AutoencoderKL, z: Tensor) -> Tensor:
    vae.enable_tiling()
    return vae.decode(z).sample


def decode_in_float64(vae: AutoencoderKL, z: Tensor) -> Tensor:
    return decode_untiled(vae.double(), z.double())


METHODS = {
    "untiled": decode_untiled,
    "tiles, shared statistics": decode_in_tiles,
    "tiles, diffusers' own": decode_in_diffusers_tiles,
    "untiled, float64": decode_in_float64,
}


# Measuring ----------------------------------------------------------------------------------------


def photograph_latent(vae: AutoencoderKL, height: int) -> Tensor:
    """The latent of an enlarged photograph (from scikit-learn), with a standard deviation of 1."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("china.jpg").copy())
    image = pixels.permute(2, 0, 1)[None] / 127.5 - 1
    image = F.interpolate(image, (height, height * 3 // 2), mode="bilinear")
    z = vae.encode(image).latent_dist.mode()
    return z / z.std()


def peak_memory() -> float:
    """The largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss includes the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS: bytes


def measure(method: str, folder: Path) -> None:
    """Decode folder/latent.npy, in a process that does nothing else."""
    torch.set_num_threads(THREADS)
    vae = random_vae()
    del vae.encoder
    decode = METHODS[method]
    z = torch.from_numpy(np.load(folder / "latent.npy"))
    decode(vae, z[:, :, :4, :4])  # imports what is imported lazily
    before, start = peak_memory(), time.perf_counter()
    y = decode(vae, z)
    seconds, after = time.perf_counter() - start, peak_memory()
    np.save(folder / f"{method}.npy", y.numpy())
    print(json.dumps({"megabytes": after - before, "seconds": seconds}))


class Result(NamedTuple):
    image: np.ndarray
    megabytes: float
    seconds: float


def measure_all(height: int) -> dict[str, Result]:
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "latent.npy", photograph_latent(random_vae(), height).numpy())
        for method in METHODS:
            command = [sys.executable, __file__, "--method", method, "--out", name]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[method] = Result(
                np.load(folder / f"{method}.npy"), **json.loads(printed.splitlines()[-1])
            )
    return results


# Reporting ----------------------------------------------------------------------------------------


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest |a - b|, relative to the largest |b|: images of trained models are in [-1, 1]."""
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))  # np.max keeps a NaN


def draw(folder: Path, results: dict[str, Result]) -> Path:
    """Write tiled_vae.png: the decoded image, and the differences of both tilings to it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    whole = results["untiled"].image
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    low, high = np.percentile(whole, (1, 99))
    axes[0].imshow(np.clip((whole[0].transpose(1, 2, 0) - low) / (high - low), 0, 1))
    axes[0].set_title("untiled (random weights)")
    methods = ("tiles, diffusers' own", "tiles, shared statistics")
    for axis, method in zip(axes[1:], methods, strict=True):
        difference = np.abs(results[method].image - whole)[0].max(axis=0) / np.abs(whole).max()
        shown = axis.imshow(np.maximum(difference, 1e-8), norm=LogNorm(1e-8, 1), cmap="magma")
        axis.set_title(f"{method}: at most {difference.max():.0e}")
    figure.colorbar(shown, ax=axes[1:], label="difference to untiled")
    for axis in axes:
        axis.set_axis_off()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiled_vae.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def report(results: dict[str, Result], folder: Path) -> int:
    whole, exact = results["untiled"].image, results["untiled, float64"].image
    print(
        f"{whole.shape[2]} x {whole.shape[3]} pixels, tiles of {TILE} x {TILE}; differences are "
        f"relative to the largest value, {np.abs(whole).max():.1f}"
    )
    print(f"{'largest difference to':25}  untiled  float64  peak memory    time")
    for method, (image, megabytes, seconds) in results.items():
        if image is exact:  # only a reference
            continue
        print(
            f"{method:25}  {largest_difference(image, whole):7.1e}  "
            f"{largest_difference(image, exact):7.1e}  {megabytes:8.0f} MB  {seconds:5.1f} s"
        )
    print(f"picture: {draw(folder, results)}")
    difference = largest_difference(results["tiles, shared statistics"].image, whole)
    if not difference <= TOLERANCE:  # a NaN is not
        print(f"The tiles DIFFER from the whole by more than {TOLERANCE:g}.", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", metavar="DIR")
    parser.add_argument("--height", type=int, default=512, help="in pixels (default 512)")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)  # see measure_all
    options = parser.parse_args()
    if options.method:
        measure(options.method, options.out)
        return 0
    return report(measure_all(options.height), options.out)


if __name__ == "__main__":
    sys.exit(main())
