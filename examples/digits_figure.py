"""The picture of the digits example: the loss, and the activations around the second GroupNorm."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from digits_model import GROUPS, Parameters, numpy_conv, numpy_pool, numpy_silu

from groupnorm import group_norm

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

JAX_COLOUR, TORCH_COLOUR = "#3b6fb6", "#e0672f"
GROUP_COLOURS = ("#1b9e77", "#7570b3", "#d95f02", "#e7298a")
SMOOTHING = 9


def draw(
    folder: Path,
    parameters: Parameters,
    images: np.ndarray,
    jax_losses: list[float],
    torch_losses: list[float],
) -> Path:
    """Write digits.png into `folder`; `parameters` are NumPy arrays."""
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    figure.suptitle("The same GroupNorm layers trained in JAX, then PyTorch, evaluated in NumPy")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    draw_loss(top.subplots(), jax_losses, torch_losses)
    before = second_convolution(parameters, images)
    after = group_norm(before, num_groups=GROUPS)  # no scale, no bias: normalization only
    left, right = bottom.subplots(1, 2, sharex=True, sharey=True)
    limits = np.quantile(np.stack([before, after]), (0.0005, 0.9995))
    draw_activations(left, before, limits, "Test images before the second GroupNorm")
    draw_activations(right, after, limits, "Normalized, before scale and bias")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "digits.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_loss(axes: Axes, jax_losses: list[float], torch_losses: list[float]) -> None:
    """Every batch's loss, faint, and its running mean across the change of framework."""
    losses = np.array(jax_losses + torch_losses)
    change = len(jax_losses)
    steps = np.arange(1, len(losses) + 1)
    smooth = np.convolve(np.pad(losses, SMOOTHING // 2, mode="edge"), np.ones(SMOOTHING), "valid")
    smooth /= SMOOTHING
    for part, colour, name in (
        (slice(0, change), JAX_COLOUR, "JAX (optax)"),
        (slice(max(change - 1, 0), None), TORCH_COLOUR, "PyTorch"),
    ):
        axes.plot(steps[part], losses[part], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps[part], smooth[part], color=colour, linewidth=2, label=name)
    axes.axvline(change, color="0.5", linestyle=":", linewidth=1)
    axes.annotate(
        'to_backend("torch")', (change, 1), xycoords=("data", "axes fraction"),
        xytext=(-6, -14), textcoords="offset points", ha="right", color="0.35",
    )  # fmt: skip
    axes.set(yscale="log", xlabel="batch", ylabel="cross-entropy", title="Training loss")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="lower left")


def second_convolution(parameters: Parameters, images: np.ndarray) -> np.ndarray:
    """The activations that go into the second layer."""
    first, second = parameters.convs
    return numpy_conv(
        numpy_pool(numpy_silu(parameters.norms[0](numpy_conv(images, first)))), second
    )


def draw_activations(axes: Axes, activations: np.ndarray, limits: np.ndarray, title: str) -> None:
    """Distribution of the values of each group of channels over all images."""
    bins = np.linspace(*limits, 80)
    groups = np.split(activations, GROUPS, axis=-1)
    for index, (values, colour) in enumerate(zip(groups, GROUP_COLOURS, strict=True), 1):
        mean = round(float(values.mean()), 2) + 0.0  # + 0.0 turns a rounded -0.0 into 0.0
        label = f"group {index}: mean {mean:.2f}, std {values.std():.2f}"
        style = {"bins": bins, "density": True, "color": colour}
        axes.hist(values.ravel(), histtype="stepfilled", alpha=0.12, **style)
        axes.hist(values.ravel(), histtype="step", linewidth=1.6, label=label, **style)
    axes.set(title=title, xlabel="activation", ylabel="density")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8.5)
    axes.label_outer()
