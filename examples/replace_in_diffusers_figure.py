"""The picture of `replace_in_diffusers.py`: errors for data with an offset, and times."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"PyTorch": "#e0672f", "groupnorm": "#3b6fb6"}
KINDS = {"contiguous": "#3b6fb6", "channels_last": "#1b9e77", "compiled": "#7570b3"}

Offsets = tuple[tuple[float, ...], dict[str, list[float]]]


def draw(folder: Path, times: dict[str, dict[str, float]], offsets: Offsets | None) -> Path:
    """Write replace_in_diffusers.png into `folder`."""
    figure, axes = plt.subplots(
        1, 2 if offsets else 1, figsize=(11, 4.5), layout="constrained", squeeze=False
    )
    figure.suptitle("Models before and after groupnorm.torch.replace")
    draw_times(axes[0, -1], times)
    if offsets:
        draw_errors(axes[0, 0], *offsets)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "replace_in_diffusers.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_errors(axes: Axes, offsets: tuple[float, ...], errors: dict[str, list[float]]) -> None:
    for name, values in errors.items():
        axes.plot(offsets, values, "o-", color=COLOURS[name], label=name)
    axes.set_xscale("symlog", linthresh=1)
    axes.set(
        yscale="log", xlabel="offset of the first convolution's results",
        ylabel="error of the output, relative", title="UNet in channels_last, against float64",
    )  # fmt: skip
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)


def draw_times(axes: Axes, times: dict[str, dict[str, float]]) -> None:
    """One bar for each memory format and model; a line where the time is that of before."""
    places = np.arange(len(times))
    for i, (kind, colour) in enumerate(KINDS.items()):
        values = [found.get(kind, np.nan) for found in times.values()]
        if not np.all(np.isnan(values)):
            axes.barh(places + 0.27 * (i - 1), values, 0.25, color=colour, label=kind)
    axes.axvline(1, color="0.4", linewidth=1)
    slowest = max(ratio for found in times.values() for ratio in found.values())
    axes.set(
        xlabel="time of an inference step, after / before", title="Time",
        xlim=(0.5, max(1.25, 1.05 * slowest)),
    )  # fmt: skip
    axes.set_yticks(places, times)
    axes.invert_yaxis()
    axes.grid(alpha=0.2, axis="x")
    axes.legend(frameon=False, loc="upper right", fontsize=8.5)
