"""The aims of cpu.py, and the table that says which of them are met."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from _cpu_cases import (
    BOTH,
    FIRST,
    FORWARD,
    JAX,
    LAST,
    LAYOUTS,
    LIMIT,
    MASKED,
    NATIVE,
    NNX,
    NUMPY,
    OURS,
    PORTABLE,
    TEXTBOOK,
    TORCH,
)

KEYS = ("min_ms", "median_ms")
MEAN, LEAST, MOST = "mean", "least", "most"


@dataclass(frozen=True)
class Aim:
    """A bound on the ratio of two contenders' times over some rows.

    Several rows are reduced to their geometric mean, minimum or maximum; `bound` is a lower bound
    if `at_least`, else an upper bound. Small is judged separately: its calls are mostly overhead.
    """

    framework: str
    tasks: tuple[str, ...]
    over: str
    under: str
    bound: float
    layouts: tuple[str, ...] = LAYOUTS
    at_least: bool = False
    of: str = MEAN
    rows: str = "float32"
    """"float32", the same "without small", "small" or "many groups" alone, or "16 bit"."""

    @property
    def title(self) -> str:
        where = self.layouts[0] if len(self.layouts) == 1 else "both layouts"
        what = "" if self.rows == "float32" else f", {self.rows}"
        of = "" if self.of == MEAN else f", {self.of} of any row"
        tasks = " and ".join(self.tasks)
        return f"{self.framework} {tasks}, {where}{what}{of}: {self.over} / {self.under}"

    def takes(self, row: dict[str, Any]) -> bool:
        mine = (row["framework"], row["task"]) in {(self.framework, task) for task in self.tasks}
        if not mine or row["layout"] not in self.layouts:
            return False
        if self.rows == "16 bit":
            return row["dtype"] != "float32"
        if self.rows == "small":
            return row["main"] and row["shape"] == "small"
        if self.rows == "many groups":
            return row["shape"] == "many groups"
        return row["main"] and not (self.rows == "without small" and row["shape"] == "small")

    def ratios(self, rows: Sequence[dict[str, Any]], key: str) -> list[float]:
        return [
            row["times"][self.over][key] / row["times"][self.under][key]
            for row in rows
            if self.takes(row) and {self.over, self.under} <= row["times"].keys()
        ]

    def judge(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        reduce = {MEAN: statistics.geometric_mean, LEAST: min, MOST: max}[self.of]
        ratios = {key: self.ratios(rows, key) for key in KEYS}
        values = {key: reduce(found) if found else None for key, found in ratios.items()}
        return judged(self.title, values, self.bound, self.at_least, len(ratios[KEYS[0]]))


def judged(
    title: str,
    values: dict[str, float | None],
    bound: float,
    at_least: bool,
    rows: int,
    unit: str = "x",
) -> dict[str, Any]:
    """One line of the summary; an aim is met when it is both by minima and by medians."""
    known = [value for value in values.values() if value is not None]
    met = None
    if known:
        met = all(value >= bound if at_least else value <= bound for value in known)
    return {"title": title, **values, "bound": bound, "at_least": at_least, "rows": rows,
            "unit": unit, "met": met}  # fmt: skip


def aims() -> list[Aim]:
    both, each = (FORWARD, BOTH), [(layout,) for layout in LAYOUTS]
    bare = "without small"
    return [
        Aim(NUMPY, (FORWARD,), OURS, LIMIT, 1.1, (FIRST,), rows=bare),
        Aim(NUMPY, (FORWARD,), OURS, LIMIT, 1.2, (LAST,), rows=bare),
        Aim(NUMPY, (FORWARD,), TEXTBOOK, OURS, 15, (LAST,), at_least=True),
        Aim(NUMPY, (FORWARD,), TEXTBOOK, OURS, 5, (FIRST,), at_least=True),
        Aim(NUMPY, (FORWARD,), TEXTBOOK, PORTABLE, 6, (LAST,), at_least=True),
        Aim(NUMPY, (FORWARD,), TEXTBOOK, PORTABLE, 1.6, (FIRST,), at_least=True),
        *(
            Aim(TORCH, (task,), OURS, NATIVE, 0.7, layout, rows=bare)
            for task in both
            for layout in each
        ),
        Aim(TORCH, both, OURS, NATIVE, 0.95, of=MOST, rows=bare),
        Aim(TORCH, both, OURS, NATIVE, 1.2, of=MOST, rows="small"),
        Aim(TORCH, both, OURS, NATIVE, 1, of=MOST, rows="many groups"),
        *(Aim(TORCH, (MASKED,), TEXTBOOK, OURS, 4, layout, at_least=True) for layout in each),
        Aim(JAX, (FORWARD,), NNX, OURS, 4.5, (LAST,), at_least=True),
        Aim(JAX, (BOTH,), NNX, OURS, 3, (LAST,), at_least=True),
        Aim(JAX, both, NNX, OURS, 1, at_least=True, of=LEAST),
        Aim(TORCH, both, OURS, NATIVE, 0.9, of=MOST, rows="16 bit"),
        Aim(NUMPY, (FORWARD,), OURS, TEXTBOOK, 1, of=MOST, rows="16 bit"),
    ]


def overhead_aims(overhead: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in overhead:
        times = row.get("above_us", {}).get(OURS)
        if row["task"] == FORWARD and times:
            peer = NATIVE if row["framework"] == TORCH else TEXTBOOK
            title = f"{row['framework']} overhead of a call: ours - {peer}"
            found.append(judged(title, times, 25, at_least=False, rows=1, unit=" us"))
    return found


def memory_aims(memory: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for framework in (NUMPY, TORCH):
        extras = [
            row["extra_percent"]
            for row in memory
            if row["framework"] == framework and row["contender"] == OURS and "layout" in row
        ]
        if extras:
            title = f"{framework} peak memory of ours beyond input and output, most of any row"
            values = {KEYS[0]: max(extras), KEYS[1]: None}
            found.append(judged(title, values, 5, at_least=False, rows=len(extras), unit=" %"))
    return found


def summarize(
    rows: Sequence[dict[str, Any]],
    overhead: Sequence[dict[str, Any]],
    memory: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Every aim with the value reached; aims without a selected row are left out."""
    asked = [aim for aim in aims() if any(aim.takes(row) for row in rows)]
    return [
        *(aim.judge(rows) for aim in asked),
        *overhead_aims(overhead),
        *memory_aims(memory),
    ]


def summary_row(line: dict[str, Any]) -> list[str]:
    verdict = {True: "met", False: "NOT MET", None: "not measured"}[line["met"]]
    sign = ">=" if line["at_least"] else "<="
    values = ["-" if line[key] is None else f"{line[key]:.2f}{line['unit']}" for key in KEYS]
    aim = f"{sign} {line['bound']:g}{line['unit']}"
    return [line["title"], *values, aim, str(line["rows"]), verdict]
