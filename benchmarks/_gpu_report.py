"""The evaluation of gpu.py's records: floors, ratios, the table and the aims."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from _gpu_cases import (
    APEX,
    BOTH,
    COMPILED,
    CUPY,
    EAGER,
    FLAX,
    FLAX_TWO_PASSES,
    FORWARD,
    GROUPS,
    JAX,
    LAST,
    LAYOUTS,
    LIBRARIES,
    OURS,
    PASSES,
    PORTABLE,
    SHAPES,
    TEXTBOOK,
    TORCH,
    UNGRAPHED,
    bandwidth_for,
    floors,
)

Row = dict[str, Any]
KEYS = ("min_us", "median_us")
LARGE = 50_000_000  # bytes above which two reads are bound by the memory
MANY_GROUPS = 1000  # that fill the device, one block of threads for each


def short_name(gpu: str) -> str:
    """A GPU's name for a file: "NVIDIA H100 80GB HBM3" is h100."""
    words = re.sub(r"\b(NVIDIA|Tesla|Quadro|GeForce)\b", " ", gpu).lower()
    words = re.sub(r"\b\d+ ?gb\b.*", "", words)
    found = re.findall(r"\brtx [a-z]*\d+\w*|\b[a-z]{1,3}\d+[a-z]*\b", words)
    return re.sub(r"[^a-z0-9]+", "-", found[0] if found else words).strip("-") or "gpu"


def add_floors(rows: Sequence[Row], copies: dict[str, float]) -> None:
    """Add floors, fractions of them and ratios to ours to the rows, by the copies' bandwidth."""
    for row in rows:
        ours = row["times"].get(OURS)
        row["ratios"] = {
            name: {key: times[key] / ours[key] for key in KEYS}
            for name, times in row["times"].items()
            if ours and name != OURS
        }
        if not copies:
            continue
        speed = bandwidth_for(row["bytes"], copies)
        row["copy_bytes_per_second"] = speed
        row["floors_us"] = floors(row["bytes"], row["task"], row["plan"], speed)
        row["shares"] = {
            name: {kind: {key: floor / times[key] for key in KEYS}
                   for kind, floor in row["floors_us"].items()}
            for name, times in row["times"].items()
        }  # fmt: skip


def finished(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], Row]:
    return {(r["library"], r["shape"], r["layout"], r["task"]): r for r in rows}


# ---- the table ----------------------------------------------------------------------------------

HEADER = (
    *("shape", "layout", "pass", "plan", "floor", "torch", "share", "no graph"),
    *(
        "launches",
        "/eager",
        "/compile",
        "/apex",
        "jax",
        "share",
        "/flax",
        "/flax 2",
        "cupy",
        "share",
        "/textbook",
    ),
)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of `HEADER`: microseconds, fractions of the plan's floor, and peers' times / ours."""
    found, lines = finished(rows), []
    for shape in SHAPES:
        for layout in LAYOUTS:
            for task in PASSES:
                here = {lib: found.get((lib, shape, layout, task)) for lib in LIBRARIES}
                if any(here.values()):
                    lines.append(line(shape, layout, task, here))
    return lines


def line(shape: str, layout: str, task: str, here: dict[str, Row | None]) -> list[str]:
    row = next(row for row in here.values() if row)
    passes = ("forward", "backward") if task == BOTH else ("forward",)
    floor = row.get("floors_us", {}).get("plan")

    def both(library: str) -> list[str]:
        return [micros(here[library]), share(here[library])]

    return [
        shape, layout.removeprefix("channels-"), "fwd" if task == FORWARD else "fwd+bwd",
        "".join(row["plan"].get(name) or "?" for name in passes), number(floor),
        *both(TORCH), micros(here[TORCH], OURS + UNGRAPHED), launches(here[TORCH]),
        *(ratio(here[TORCH], name) for name in (EAGER, COMPILED, APEX)),
        *both(JAX), *(ratio(here[JAX], name) for name in (FLAX, FLAX_TWO_PASSES)),
        *both(CUPY), ratio(here[CUPY], TEXTBOOK),
    ]  # fmt: skip


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}"


def micros(row: Row | None, name: str = OURS) -> str:
    times = (row or {}).get("times", {})
    if name == OURS and name not in times and PORTABLE in times:
        return number(times[PORTABLE]["median_us"]) + "p"
    return number(times[name]["median_us"]) if name in times else "-"


def launches(row: Row | None) -> str:
    """Launches of ours, eager and compiled, as counted in their graphs."""
    found = (row or {}).get("launches", {})
    names = (OURS, EAGER, COMPILED)
    return "/".join(f"{found[n]:.0f}" if n in found else "-" for n in names) if found else "-"


def share(row: Row | None) -> str:
    shares = (row or {}).get("shares", {}).get(OURS)
    return f"{100 * shares['plan']['median_us']:.0f}%" if shares else "-"


def ratio(row: Row | None, name: str) -> str:
    found = (row or {}).get("ratios", {}).get(name)
    return f"{found['median_us']:.1f}x" if found else "-"


# ---- aims ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """A lower bound on fractions or ratios over some rows."""

    title: str
    library: str
    bound: float
    takes: Callable[[Row], bool]
    value: Callable[[Row, str], float | None]
    percent: bool = False

    def judge(self, rows: Sequence[Row]) -> dict[str, Any]:
        mine = [row for row in rows if row["library"] == self.library and self.takes(row)]
        values = {key: [(v, r["name"]) for r in mine if (v := self.value(r, key)) is not None]
                  for key in KEYS}  # fmt: skip
        least = {key: min(found, default=(None, None)) for key, found in values.items()}
        known = [value for value, _ in least.values() if value is not None]
        means = [math.log(value) for value, _ in values["median_us"]]
        return {
            "title": self.title, "bound": self.bound, "percent": self.percent,
            **{key: value for key, (value, _) in least.items()},
            "mean": math.exp(sum(means) / len(means)) if means else None,
            "where": least["median_us"][1], "rows": len(values["median_us"]), "of": len(mine),
            "met": all(value >= self.bound for value in known) if known else None,
        }  # fmt: skip


def of_floor(kind: str) -> Callable[[Row, str], float | None]:
    def value(row: Row, key: str) -> float | None:
        found = row.get("shares", {}).get(OURS)
        return None if found is None else found[kind][key]

    return value


def over(peer: str) -> Callable[[Row, str], float | None]:
    def value(row: Row, key: str) -> float | None:
        found = row.get("ratios", {}).get(peer)
        return None if found is None else found[key]

    return value


def plans(row: Row) -> set[str | None]:
    passes = ("forward", "backward") if row["task"] == BOTH else ("forward",)
    return {row["plan"].get(name) for name in passes}


def aims() -> list[Aim]:
    def tiles(row: Row) -> bool:
        return row["bytes"] > LARGE and plans(row) <= {"B", "C"}

    def whole(row: Row) -> bool:
        return row["dims"][0] * GROUPS >= MANY_GROUPS and plans(row) == {"A"}

    def anywhere(row: Row) -> bool:
        return True

    by_floor = [
        aim
        for lib in (TORCH, CUPY)
        for aim in (
            Aim(f"{lib}: share of the two-read floor, plan B or C above 50 MB", lib, 0.85, tiles,
                of_floor("two_read"), True),
            Aim(f"{lib}: share of the one-read floor, plan A with 1000+ groups", lib, 0.8, whole,
                of_floor("one_read"), True),
        )
    ]  # fmt: skip
    return [
        *by_floor,
        *(Aim(f"torch: {peer} / ours", TORCH, 1, anywhere, over(peer))
          for peer in (EAGER, COMPILED)),
        Aim("torch: eager / ours, channels-last", TORCH, 3, lambda row: row["layout"] == LAST,
            over(EAGER)),
        Aim("torch: eager / ours, one sample", TORCH, 3, lambda row: row["dims"][0] == 1,
            over(EAGER)),
        Aim("jax: flax / ours, forward+backward", JAX, 2, lambda row: row["task"] == BOTH,
            over(FLAX)),
        Aim("cupy: textbook / ours", CUPY, 5, anywhere, over(TEXTBOOK)),
    ]  # fmt: skip


def judge(rows: Sequence[Row], checks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every aim with the least value reached; the last one is that calls give the same bits."""
    repeats = [check["repeats"] for check in checks if check["repeats"] is not None]
    same = sum(repeats) / len(repeats) if repeats else None
    return [
        *(aim.judge(rows) for aim in aims()),
        {
            "title": "checked calls that give the same bits again", "bound": 1.0, "percent": True,
            "min_us": same, "median_us": same, "mean": same, "where": None, "rows": len(repeats),
            "of": len(checks), "met": None if same is None else same == 1,
        },
    ]  # fmt: skip


AIM_HEADER = ("aim, over the rows", "at least", "by minima", "by medians", "mean", "rows",
              "verdict", "the least in")  # fmt: skip


def aim_line(judged: dict[str, Any]) -> list[str]:
    def shown(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{100 * value:.0f}%" if judged["percent"] else f"{value:.2f}x"

    verdict = {True: "met", False: "NOT MET", None: "not measured"}[judged["met"]]
    values = [shown(judged[key]) for key in ("bound", *KEYS, "mean")]
    where = (judged["where"] or "").partition("/")[2]
    return [judged["title"], *values, f"{judged['rows']}/{judged['of']}", verdict, where]
