"""Train a network on images that are split into bands of rows over four processes.

A small convolutional classifier of scikit-learn's digits is trained by four processes, each holding
3, 2, 2 or 1 of the 8 rows of every image. Convolutions fetch the neighbours' nearest rows,
`GroupNorm(axis_name="rows")` pools its statistics over the bands, and `sum_gradients` adds up the
gradients. One process then trains the same network on whole images, and the losses must be
equal up to rounding, or the exit status is 1. For comparison the bands are trained a second time
with separate statistics, as with a plain GroupNorm. The three curves are drawn to
spatial_parallel_training.png::

    python examples/spatial_parallel_training.py [--out DIR] [--steps N]

The script restarts itself as ``torchrun --nproc-per-node 4 examples/spatial_parallel_training.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from groupnorm import GroupNorm, bind_axis
from groupnorm.backends.torch import sum_gradients

WORLD = 4
CHANNELS, GROUPS, CLASSES = 16, 4, 10
ROWS = (3, 2, 2, 1)  # per process; 8 in total
BATCH, LEARNING_RATE, MOMENTUM = 64, 0.02, 0.9
# Relative to the first loss. Training amplifies rounding differences: measured 2e-6.
LOSSES_TOLERANCE = 1e-4


# Communication between bands ----------------------------------------------------------------------


def exchange(upwards: Tensor, downwards: Tensor) -> tuple[Tensor, Tensor]:
    """Send one row to each neighbour; return theirs, zeros at the image's border."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sent = {rank - 1: upwards.contiguous(), rank + 1: downwards.contiguous()}
    received = {neighbour: torch.zeros_like(row) for neighbour, row in sent.items()}
    neighbours = [n for n in sent if 0 <= n < size]
    operations = [dist.P2POp(dist.isend, sent[n], n) for n in neighbours]
    operations += [dist.P2POp(dist.irecv, received[n], n) for n in neighbours]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return received[rank - 1], received[rank + 1]


class Halo(torch.autograd.Function):
    """Append the neighbours' nearest rows; their gradients are sent back to the neighbours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        above, below = exchange(x[:, :, :1], x[:, :, -1:])
        return torch.cat([above, x, below], dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (dy,) = gradients
        from_above, from_below = exchange(dy[:, :, :1], dy[:, :, -1:])
        dx = dy[:, :, 1:-1].clone()
        dx[:, :, :1] += from_above
        dx[:, :, -1:] += from_below
        return dx


class SumOverRanks(torch.autograd.Function):
    """All-reduce sum; each rank's loss depends on all parts, so backward sums too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return SumOverRanks.apply(gradients[0])


# The network, for a whole image and for a band of one ---------------------------------------------


class Net(nn.Module):
    """Two convolutions, each normalized, and a linear layer.

    `rows` are the rows of the image that this process computes. The logits are a sum over all
    rows, each with separate weights, so every band computes a partial sum.
    """

    def __init__(
        self,
        axis_name: str | None,
        rows: slice,
        halo: Callable[[Tensor], Tensor],
        total: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.halo, self.total = rows, halo, total
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, CHANNELS, 3, padding=(0, 1)) for channels in (1, CHANNELS)
        )
        self.norms = nn.ModuleList(
            GroupNorm((CHANNELS, ...), 0, GROUPS, axis_name=axis_name, backend="torch")
            for _ in self.convs
        )
        self.weight = nn.Parameter(0.01 * torch.randn(CLASSES, CHANNELS, sum(ROWS)))
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(self.halo(x))))
        weight = self.weight[:, :, self.rows]
        return self.total(torch.einsum("ncrw,kcr->nk", x, weight)) + self.bias


def pad(x: Tensor) -> Tensor:
    """The halo of a whole image."""
    return F.pad(x, (0, 0, 1, 1))


def train(net: Net, images: Tensor, labels: Tensor, steps: int, ranks: int) -> list[float]:
    """Minimize the loss of the digits, with the same batches in every process.

    `images` are this process's parts of the images. All ranks compute the same loss, so each
    divides it by the number of ranks: their gradients are summed.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        batch = torch.from_numpy(rng.choice(len(images), BATCH, replace=False))
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        (loss / ranks).backward()
        if ranks > 1:
            sum_gradients(net.parameters(), "rows")
        optimizer.step()
        losses.append(loss.item())
    return losses


class Curves(NamedTuple):
    """The loss of every step."""

    whole: list[float]
    pooled: list[float]
    alone: list[float]

    def difference(self, which: str) -> float:
        """The largest difference to whole images, relative to the first loss."""
        apart = np.abs(np.subtract(getattr(self, which), self.whole))
        return float(np.max(apart) / self.whole[0])  # np.max keeps a NaN


def train_all(steps: int) -> Curves:
    """Train in bands with pooled and with separate statistics, and on whole images."""
    digits = load_digits()
    images = torch.from_numpy((digits.images[:, None] / 16).astype(np.float32))
    labels = torch.from_numpy(digits.target.astype(np.int64))
    start = sum(ROWS[: dist.get_rank()])
    rows = slice(start, start + ROWS[dist.get_rank()])
    with bind_axis(rows=dist.group.WORLD):
        pooled, alone = (
            train(
                Net(axis_name, rows, Halo.apply, SumOverRanks.apply),
                images[:, :, rows],
                labels,
                steps,
                WORLD,
            )
            for axis_name in ("rows", None)
        )
    # One process would suffice; running it in all keeps them synchronized.
    whole = train(Net(None, slice(None), pad, lambda x: x), images, labels, steps, 1)
    return Curves(whole, pooled, alone)


# Reporting ----------------------------------------------------------------------------------------


def draw(folder: Path, curves: Curves) -> Path:
    """Write spatial_parallel_training.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, layout="constrained", height_ratios=(2, 1)
    )
    steps = np.arange(1, len(curves.whole) + 1)
    top.plot(
        steps, curves.alone, color="#999999", linewidth=1, label="4 bands, their own statistics"
    )
    top.plot(steps, curves.whole, color="#3b6fb6", linewidth=4, alpha=0.5, label="whole images")
    top.plot(
        steps, curves.pooled, color="#e0672f", linewidth=1.2, label='4 bands, axis_name="rows"'
    )
    top.set(
        ylabel="cross-entropy",
        yscale="log",
        title="Digits, trained with their height over 4 processes",
    )
    for name, colour in (("alone", "#999999"), ("pooled", "#e0672f")):
        apart = np.abs(np.subtract(getattr(curves, name), curves.whole)) / curves.whole[0]
        bottom.plot(steps, np.maximum(apart, 1e-9), color=colour)
    bottom.axhline(LOSSES_TOLERANCE, color="0.3", linestyle=":", label="tolerance")
    bottom.set(xlabel="step", ylabel="difference to whole images", yscale="log")
    for axes in (top, bottom):
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spatial_parallel_training.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def report(curves: Curves, folder: Path) -> int:
    print(
        f"loss of the first and the last of {len(curves.whole)} steps, and the largest difference"
    )
    for name, title in (
        ("whole", "whole images, 1 process"),
        ("pooled", "4 bands, pooled statistics"),
        ("alone", "4 bands, their own statistics"),
    ):
        losses = getattr(curves, name)
        print(f"  {title:30} {losses[0]:.6f}  {losses[-1]:.6f}  {curves.difference(name):.1e}")
    print(f"picture: {draw(folder, curves)}")
    if not curves.difference("pooled") <= LOSSES_TOLERANCE:  # a NaN is not
        print(f"The pooled losses DIFFER by more than {LOSSES_TOLERANCE:g}.", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", metavar="DIR")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    if not dist.is_torchelastic_launched():
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(WORLD))
        return subprocess.call(
            [sys.executable, *launcher, *sys.argv], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    dist.init_process_group("gloo")
    try:
        if dist.get_world_size() != WORLD:
            parser.error(f"the images are cut for {WORLD} processes: --nproc-per-node {WORLD}")
        curves = train_all(options.steps)
        return report(curves, options.out) if dist.get_rank() == 0 else 0
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
