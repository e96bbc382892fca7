"""Draw the two figures of the documentation, docs/accuracy.png and docs/speed.png.

The data are the newest committed results of accuracy.py and cpu.py, so that anyone can reproduce
the figures without measuring::

    python benchmarks/_doc_figures.py [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # to files only: works without a display

import matplotlib.pyplot as plt
from _cpu_cases import BOTH, COMPILED, FORWARD, FRAMEWORKS, LAYOUTS, NATIVE, NNX, OURS, TEXTBOOK
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"

# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
BLUE, ORANGE, RED, GREEN, PINK, SKY, BLACK, GREY = (
    *("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#5a5a5a"),
)
DARKER = {ORANGE: "#a86f00", SKY: "#1f7fb0"}  # darker, for thin text
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
}

# ---- accuracy -----------------------------------------------------------------------------------

OFFSETS = ("0", "1", "100", "1e3", "1e4", "1e5")
# Label, colour, marker, and the rows of accuracy.py whose largest error is drawn.
CURVES = (
    ("flax, brainstate (default)", RED, "s", ("flax linen, jit, fast (default)",
     "flax nnx, jit, fast (default)", "brainstate, fast (default)")),
    ("keras on PyTorch, NumPy", PINK, "v", ("keras, torch backend", "keras, numpy backend")),
    ("PyTorch, channels_last memory", ORANGE, "D", ("torch F.group_norm, channels_last memory",)),
    ("flax, brainstate (two-pass),\nkeras on JAX, haiku", GREEN, "^", ("flax linen, jit, two-pass",
     "flax nnx, jit, two-pass", "brainstate, two-pass", "keras, jax backend", "haiku, jit")),
    ("PyTorch, contiguous", SKY, "o", ("torch F.group_norm, channels first",)),
    ("equinox", GREY, "P", ("equinox, jit",)),
)  # fmt: skip
# Where the labels go (in powers of ten, at the right end), so that they do not overlap.
HEIGHTS = (2.75, 4.7, 3.45, -1.05, -2.05, -2.75)
NAN = 4.7


def draw_accuracy(result: dict[str, Any]) -> Figure:
    """One curve for each kind of peer, and one for the worst of all our rows."""
    rows = {row["name"]: row["errors"] for row in result["rows"]}
    ours = [row["errors"] for row in result["rows"] if row["ours"]]
    end = len(OFFSETS) - 1
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.9), layout="constrained")
        for (label, color, marker, names), height in zip(CURVES, HEIGHTS, strict=True):
            worst = largest(rows[name] for name in names)
            known = [place for place, error in enumerate(worst) if error is not None]
            axes.plot(known, [worst[place] for place in known], color=color, marker=marker,
                      markersize=6, linewidth=1.6, markeredgecolor="white", zorder=3)  # fmt: skip
            if known[-1] < end:  # NaN from here on
                places, top = [known[-1], known[-1] + 1, end], 10**NAN
                axes.plot(places, [worst[known[-1]], top, top], color=color, linestyle=":")
                axes.plot(places[1:], [top, top], "x", color=color, markersize=8, mew=2)
                axes.annotate("NaN", (places[1], top), xytext=(-8, 3), color=color,
                              textcoords="offset points", ha="right", weight="bold")  # fmt: skip
            axes.annotate(label, (end + 0.2, 10**height), color=DARKER.get(color, color),
                          va="center", annotation_clip=False, size=10)  # fmt: skip
        best = largest(ours)
        axes.plot(range(end + 1), best, color=BLUE, marker="o", markersize=8, linewidth=4,
                  zorder=4)  # fmt: skip
        axes.annotate(f"groupnorm, worst of\n{len(ours)} configurations", (end + 0.2, best[-1]),
                      color=BLUE, va="center", annotation_clip=False, size=12,
                      weight="bold")  # fmt: skip
        axes.axhline(result["bound"], color=BLUE, linewidth=1, linestyle="--", zorder=1)
        bound = f"bound of groupnorm's tests, {result['bound']:g}".replace("e-0", "e-")
        axes.text(end, result["bound"] * 1.3, bound, color=BLUE, size=9.5, ha="right")
        axes.axhline(1, color="#bbbbbb", linewidth=1, zorder=0)
        axes.text(0, 1.3, "no correct digit above this line", color=GREY, size=9.5)
        axes.set_yscale("log")
        axes.set_ylim(3e-8, 10 ** (NAN + 0.8))
        axes.yaxis.set_major_locator(LogLocator(base=100, numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlim(-0.25, end + 0.13)
        axes.set_xticks(range(end + 1), ["0", "1", "100", "1,000", "10,000", "100,000"])
        axes.set_xlabel("offset: the mean of the data (its standard deviation is 1)")
        axes.set_ylabel("largest error, relative to max(1, |value|)")
        axes.grid(axis="y", color="#eeeeee", zorder=0)
        axes.set_title("Float32 group normalization of data with an offset")
        found = result["versions"]
        packages = ("torch", "flax", "equinox", "brainstate", "dm-haiku", "keras")
        names = ", ".join(f"{name} {found[name]}" for name in packages if name in found)
        figure.supxlabel(f"{names}; {result['date'][:10]}", size=8, color=GREY)
    return figure


def largest(rows: Iterable[dict[str, float | None]]) -> list[float | None]:
    """The largest error of several rows at each offset; None if one of them is NaN."""
    rows = list(rows)
    columns = [[row[offset] for row in rows] for offset in OFFSETS]
    return [None if None in column else max(column) for column in columns]


# ---- speed --------------------------------------------------------------------------------------

PEERS = {
    "NumPy": {TEXTBOOK: ("mean and variance in NumPy", RED, "s")},
    "PyTorch": {
        NATIVE: ("F.group_norm", ORANGE, "D"),
        COMPILED: ("torch.compile of mean and variance", PINK, "^"),
    },
    "JAX": {
        NNX: ("flax nnx", ORANGE, "D"),
        "flax linen": ("flax linen", RED, "s"),
        "brainstate": ("brainstate", PINK, "v"),
        "equinox": ("equinox", GREEN, "^"),
    },
}
TASKS = {FORWARD: "forward", BOTH: "forward + backward"}


def draw_speed(result: dict[str, Any]) -> Figure:
    """A panel for each framework; a line for each task and layout."""
    with plt.rc_context(STYLE | {"axes.spines.left": False, "ytick.major.size": 0}):
        figure, panels = plt.subplots(
            3, 1, figsize=(8, 6.9), sharex=True, layout="constrained", height_ratios=(1, 1, 1.3)
        )
        for axes, framework in zip(panels, FRAMEWORKS, strict=True):
            draw_panel(axes, [row for row in result["rows"] if row["framework"] == framework])
            axes.set_title(f"{framework}{', jit' if framework == 'JAX' else ''}", x=-0.545)
        figure.suptitle(
            "Time of group normalization on a CPU, relative to groupnorm's", size=13,
            weight="bold",
        )  # fmt: skip
        panels[-1].set_xlabel("right of the blue line: slower than groupnorm")
        found, computer = result["versions"], result["machine"]
        names = ", ".join(f"{name} {found[name]}" for name in ("numpy", "torch", "jax", "flax"))
        figure.supxlabel(
            f"geometric means of medians over 7 shapes, float32, 32 groups; {computer['cpu']}, "
            f"{computer['usable_cpus']} CPUs\n{names}; {result['date'][:10]}",
            size=8.5, color=GREY,
        )  # fmt: skip
    return figure


def draw_panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
    lines = [(task, layout) for task in TASKS for layout in LAYOUTS]
    peers = PEERS[rows[0]["framework"]]
    axes.axvline(1, color=BLUE, linewidth=4, zorder=2, label="groupnorm")
    for height, (task, layout) in enumerate(lines):
        here = [row for row in rows if (row["task"], row["layout"]) == (task, layout)]
        mine = [row for row in here if row["main"]]
        means = {name: slowdown(mine, name) for name in peers}
        axes.plot([1, *means.values()], [height] * (1 + len(means)), color="#d9d9d9", linewidth=3,
                  solid_capstyle="round", zorder=1)  # fmt: skip
        for number, (name, mean) in enumerate(means.items()):
            label, color, marker = peers[name]
            # Side by side, or equal ones would hide each other.
            aside = 0.17 * (number - (len(means) - 1) / 2)
            axes.scatter(mean, height + aside, s=70, color=color, marker=marker, zorder=3,
                         edgecolors="white", linewidths=0.6,
                         label=label if height == 0 else None)  # fmt: skip
        slowest = max(means.values())
        axes.annotate(f"{slowest:.0f}×" if slowest >= 10 else f"{slowest:.1f}×", (slowest, height),
                      xytext=(9, 0), textcoords="offset points", va="center", size=9.5,
                      color=GREY)  # fmt: skip
    names = [f"{TASKS[task]}, {layout.replace('-', ' ')}" for task, layout in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.7, 40)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.tick_params(labelbottom=True)
    axes.grid(axis="x", color="#ececec", zorder=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.97), frameon=False, fontsize=10.5,
                ncols=5, handletextpad=0.35, columnspacing=0.9, handlelength=1.2)  # fmt: skip


def slowdown(rows: list[dict[str, Any]], name: str) -> float:
    """The geometric mean of a peer's median times relative to ours."""
    return statistics.geometric_mean(
        row["times"][name]["median_ms"] / row["times"][OURS]["median_ms"] for row in rows
    )


# ---- both ---------------------------------------------------------------------------------------


def newest(pattern: str) -> dict[str, Any]:
    return json.loads(max(RESULTS.glob(pattern)).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="default: docs/")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "accuracy.png": draw_accuracy(newest("accuracy-*.json")),
        "speed.png": draw_speed(newest("cpu-*.json")),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=200, facecolor="white", metadata={"Software": None})
        print(f"written: {out / name}")


if __name__ == "__main__":
    main()
