"""Draw the figure of gpu.py: the fraction of memory bandwidth that each contender reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # to files only: works without a display

import matplotlib.pyplot as plt
from _gpu_cases import (
    COMPILED,
    CUPY,
    EAGER,
    FLAX,
    JAX,
    LAYOUTS,
    OURS,
    PASSES,
    SHAPES,
    TEXTBOOK,
    TORCH,
)
from _gpu_report import finished
from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart; ours have no hatch.
LOOKS = {
    (TORCH, OURS): ("#0072B2", ""),
    (JAX, OURS): ("#56B4E9", ""),
    (CUPY, OURS): ("#009E73", ""),
    (TORCH, EAGER): ("#D55E00", "///"),
    (TORCH, COMPILED): ("#E69F00", "///"),
    (JAX, FLAX): ("#CC79A7", "..."),
    (CUPY, TEXTBOOK): ("#999999", "xxx"),
}
PACKAGES = ("torch", "jax", "flax", "cupy-cuda13x", "cupy-cuda12x", "triton")


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: a panel for each pass, a cluster of bars for each shape and layout."""
    rows = [row for row in result["rows"] if row.get("shares")]
    figure, panels = plt.subplots(len(PASSES), 1, figsize=(17, 10), layout="constrained")
    for axes, task in zip(panels, PASSES, strict=True):
        draw_panel(axes, [row for row in rows if row["task"] == task], task)
        axes.set_title(task, loc="left", weight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.suptitle(
        "Group normalization with SiLU: share of the floor, which is the time to copy what the "
        "kernels read and write", x=0.01, ha="left", size=14, weight="bold",
    )  # fmt: skip
    found = result["versions"]
    names = [f"{name} {found[name]}" for name in PACKAGES if name in found]
    where = " · ".join([result["gpu"], *names, result["date"][:10], result["commit"][:9]])
    figure.supxlabel(where, x=0.99, ha="right", color="#5a5a5a", size=8)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def draw_panel(axes: Axes, rows: Sequence[dict[str, Any]], task: str) -> None:
    found = finished(rows)
    there = {(row["shape"], row["layout"]) for row in rows}
    clusters = [(s, layout) for s in SHAPES for layout in LAYOUTS if (s, layout) in there]
    looks = {
        (library, name): look
        for (library, name), look in LOOKS.items()
        if any(row["library"] == library and name in row["shares"] for row in rows)
    }
    width = 0.86 / max(len(looks), 1)
    for number, ((library, name), (color, hatch)) in enumerate(looks.items()):
        shares = [
            found.get((library, shape, layout, task), {}).get("shares", {}).get(name)
            for shape, layout in clusters
        ]
        heights = [100 * share["plan"]["median_us"] if share else 0 for share in shares]
        places = [place + (number - (len(looks) - 1) / 2) * width for place in range(len(clusters))]
        axes.bar(places, heights, width, color=color, hatch=hatch, edgecolor="white",
                 linewidth=0.4, label=f"{library}: {name}")  # fmt: skip
    axes.axhline(100, color="black", linewidth=1)
    labels = [
        "\n".join([*shape.replace("@", " @").rsplit(" ", 2), layout.removeprefix("channels-")])
        for shape, layout in clusters
    ]
    axes.set_xticks(range(len(clusters)), labels, size=7)
    axes.set_ylabel("% of the floor")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#ececec")
    axes.set_axisbelow(True)
