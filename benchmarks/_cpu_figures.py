"""Draws the figures of cpu.py: the time of every contender as a multiple of ours.

One dot is the median time of one contender over that of ours, on a logarithmic axis, so that twice
as fast and twice as slow are equally far from the blue line, which is ours. A bar marks the plain
copy, the lower bound of every implementation::

    python benchmarks/cpu.py --from-json FILE --plots DIR
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # to files only: works without a display

import matplotlib.pyplot as plt
from _cpu_cases import (
    BOTH,
    COMPILED,
    FORWARD,
    FRAMEWORKS,
    GROUPS,
    LAYOUTS,
    LIMIT,
    MASKED,
    MEASURED,
    NATIVE,
    NNX,
    OURS,
    PORTABLE,
    SILU,
    TEXTBOOK,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Rows = Sequence[dict[str, Any]]

# Okabe and Ito's colours, which colour-blind readers tell apart; the shapes differ as well.
BLUE, GREY = "#0072B2", "#5a5a5a"
LOOKS = {
    LIMIT: ("black", "|"),
    PORTABLE: ("#56B4E9", "o"),
    TEXTBOOK: ("#D55E00", "s"),
    NATIVE: ("#E69F00", "D"),
    COMPILED: ("#CC79A7", "^"),
    NNX: ("#E69F00", "D"),
    "flax linen": ("#D55E00", "s"),
    "equinox": ("#009E73", "^"),
    "brainstate": ("#CC79A7", "v"),
}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "ytick.major.size": 0,
}


def draw_all(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the PNG files into `folder`, created if necessary, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result["rows"] if OURS in row["times"]]
    figures = {
        "cpu_forward.png": draw_shapes(rows, FORWARD),
        "cpu_forward_backward.png": draw_shapes(rows, BOTH),
        "cpu_other_cases.png": draw_others(rows),
    }
    paths = []
    for name, figure in figures.items():
        if figure is None:  # no row of it was measured
            continue
        figure.text(0.99, 0.005, conditions(result), ha="right", va="bottom", color=GREY, size=8)
        figure.savefig(folder / name, dpi=150, facecolor="white")
        plt.close(figure)
        paths.append(folder / name)
    return paths


def conditions(result: dict[str, Any]) -> str:
    """One line that states the origin of the figures."""
    found, computer = result["versions"], result["machine"]
    packages = ("numpy", "torch", "jax", "flax")
    names = [f"{name} {found[name]}" for name in packages if name in found]
    where = f"{computer['cpu']}, {computer['usable_cpus']} CPUs, load {result['load_before']}"
    return " · ".join([where, *names, result["date"][:10]])


# ---- one figure ---------------------------------------------------------------------------------


def draw_shapes(rows: Rows, task: str) -> Figure | None:
    """A panel for each framework and layout, a line for each shape; float32 in 32 groups."""
    rows = [row for row in rows if row["main"] and row["task"] == task]
    frameworks = [name for name in FRAMEWORKS if any(row["framework"] == name for row in rows)]
    if not rows:
        return None
    shapes = [name for name in MEASURED if any(row["shape"] == name for row in rows)]
    height = 1.2 + len(frameworks) * (1.15 + 0.34 * len(shapes))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(frameworks), 2, figsize=(11.5, height), squeeze=False, sharex="row",
            layout="constrained",
        )  # fmt: skip
        for axes_row, framework in zip(grid, frameworks, strict=True):
            mine = [row for row in rows if row["framework"] == framework]
            for axes, layout in zip(axes_row, LAYOUTS, strict=True):
                here = {row["shape"]: row for row in mine if row["layout"] == layout}
                lines = [here[shape] for shape in shapes if shape in here]
                draw_panel(axes, lines, [row["shape"] for row in lines])
                axes.set_title(f"{framework}, {layout}")
            add_legend(axes_row[1], mine)
        finish(figure, f"Group normalization, {task}, float32")
    return figure


def draw_others(rows: Rows) -> Figure | None:
    """A panel for each framework: masks, silu, 16 bit, one group and as many as channels."""
    rows = [row for row in rows if not (row["main"] and row["task"] in (FORWARD, BOTH))]
    frameworks = [name for name in FRAMEWORKS if any(row["framework"] == name for row in rows)]
    if not rows:
        return None
    counts = [sum(row["framework"] == name for row in rows) for name in frameworks]
    with plt.rc_context(STYLE):
        height = 2.2 + 0.27 * sum(counts) + 0.6 * len(counts)
        figure, grid = plt.subplots(
            len(frameworks), 1, figsize=(9.5, height), squeeze=False, sharex=True,
            layout="constrained", height_ratios=[count + 2 for count in counts],
        )  # fmt: skip
        for axes, framework in zip(grid[:, 0], frameworks, strict=True):
            lines = [row for row in rows if row["framework"] == framework]
            draw_panel(axes, lines, list(map(other_label, lines)))
            axes.set_title(framework)
            add_legend(axes, lines)
        finish(figure, "Group normalization: masks, silu, 16-bit dtypes, numbers of groups")
    return figure


def other_label(row: dict[str, Any]) -> str:
    task = {MASKED: "masked", SILU: "silu", BOTH: "fwd+bwd"}.get(row["task"], "forward")
    count = row["groups"]
    groups = "" if count == GROUPS else f", {count} group{'s' if count > 1 else ''}"
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"{task}, {row['shape']}{dtype}{groups}, {row['layout'].removeprefix('channels-')}"


def finish(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", size=14, weight="bold")
    figure.supxlabel(
        "median time as a multiple of ours, logarithmic: right of the line is slower\n "
    )


# ---- one panel ----------------------------------------------------------------------------------


def draw_panel(axes: Axes, rows: Rows, labels: Sequence[str]) -> None:
    """A line of dots for each row, and our own time next to its name."""
    axes.axvline(1, color=BLUE, linewidth=2, zorder=2)
    for height, row in enumerate(rows):
        ours = row["times"][OURS]["median_ms"]
        ratios = {name: time["median_ms"] / ours for name, time in row["times"].items()}
        axes.plot([min(ratios.values()), max(ratios.values())], [height, height],
                  color="#d9d9d9", linewidth=2.5, solid_capstyle="round", zorder=1)  # fmt: skip
        for number, name in enumerate(names := draw_order(ratios)):
            color, marker = LOOKS[name]
            # Side by side, or equal ones would hide each other; the copy comes last.
            aside = 0 if name == LIMIT else 0.09 * (number - (len(names) - 2) / 2)
            size = 130 if name == LIMIT else 42
            axes.scatter(ratios[name], height + aside, s=size, color=color, marker=marker, zorder=3,
                         linewidths=2.2 if name == LIMIT else 0.6,
                         edgecolors=None if name == LIMIT else "white")  # fmt: skip
    named = [f"{label}  ({row['times'][OURS]['median_ms']:.3g} ms)"
             for label, row in zip(labels, rows, strict=True)]  # fmt: skip
    axes.set_yticks(range(len(rows)), named)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1.0, 2.0, 5.0) if high / low < 60 else (1.0, 3.0) if high / low < 900 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(axis="x", color="#ececec", zorder=0)


def draw_order(names: Iterable[str]) -> list[str]:
    """Contenders with their own markers, the copy on top; ours is the line."""
    return sorted((name for name in names if name in LOOKS), key=lambda name: name == LIMIT)


def add_legend(axes: Axes, rows: Rows) -> None:
    names = draw_order(dict.fromkeys(name for row in rows for name in row["times"]))
    handles = [Line2D([], [], color=BLUE, linewidth=2, label=OURS)]
    for name in names:
        color, marker = LOOKS[name]
        limit = name == LIMIT
        handles.append(
            Line2D([], [], color=color, marker=marker, linestyle="none",
                   markersize=11 if limit else 6.5, markeredgewidth=2.2 if limit else 0.6,
                   markeredgecolor=color if limit else "white",
                   label="plain copy, the limit" if limit else name)
        )  # fmt: skip
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
