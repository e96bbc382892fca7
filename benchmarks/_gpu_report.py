"""The evaluation of gpu.py's records: floors, ratios, the table, and what is missing or wrong."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from _gpu_cases import (
    COMPILED,
    CUPY,
    EAGER,
    FLAX,
    FORWARD,
    JAX,
    LAYOUTS,
    LIBRARIES,
    OURS,
    PASSES,
    SHAPES,
    TEXTBOOK,
    TORCH,
    UNGRAPHED,
    bandwidth_for,
)
from _gpu_measure import DISAGREEMENT, disagrees

Row = dict[str, Any]
KEYS = ("min_us", "median_us")


def short_name(gpu: str) -> str:
    """A GPU's name for a file: "NVIDIA H200" is h200."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


def sorted_out(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was recorded: about the run, records by kind, rows with floors, and the failures."""
    rows, checks, copied, about = (
        [record for record in records if record["kind"] == kind]
        for kind in ("row", "check", "copy", "about")
    )
    add_floors(rows, next((c["bytes_per_second"] for c in copied if c["bytes_per_second"]), {}))
    others = [record for record in records if record["kind"] in ("probe", "failure", "skipped")]
    gpu = next((record["gpu"] for record in others if record.get("gpu")), None)
    return {
        **(about[0] if about else {}), "gpu": gpu, "copies": copied, "checks": checks,
        "rows": rows, "others": others, "failures": list(failures(records)),
    }  # fmt: skip


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
        row["floors_us"] = {
            kind: 1e6 * row["reads"][kind] * row["bytes"] / speed for kind in ("one_read", "plan")
        }
        row["shares"] = {
            name: {kind: {key: floor / times[key] for key in KEYS}
                   for kind, floor in row["floors_us"].items()}
            for name, times in row["times"].items()
        }  # fmt: skip


def finished(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], Row]:
    return {(r["library"], r["shape"], r["layout"], r["task"]): r for r in rows}


# ---- the table ----------------------------------------------------------------------------------

HEADER = (
    *("shape", "layout", "pass", "1 read", "floor", "torch", "share", "no graph", "/eager"),
    *("/compile", "jax", "share", "/flax", "cupy", "share", "/textbook"),
)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of `HEADER`: microseconds, fractions of the plan's floor, and peers' times / ours."""
    found, lines = finished(rows), []
    for shape, layout, task in itertools.product(SHAPES, LAYOUTS, PASSES):
        here = {lib: found.get((lib, shape, layout, task)) for lib in LIBRARIES}
        if any(here.values()):
            lines.append(line(shape, layout, task, here))
    return lines


def line(shape: str, layout: str, task: str, here: dict[str, Row | None]) -> list[str]:
    floors = next(row for row in here.values() if row).get("floors_us", {})

    def both(library: str) -> list[str]:
        return [micros(here[library]), share(here[library])]

    return [
        shape, layout.removeprefix("channels-"), "fwd" if task == FORWARD else "fwd+bwd",
        number(floors.get("one_read")), number(floors.get("plan")),
        *both(TORCH), micros(here[TORCH], OURS + UNGRAPHED),
        *(ratio(here[TORCH], name) for name in (EAGER, COMPILED)),
        *both(JAX), ratio(here[JAX], FLAX), *both(CUPY), ratio(here[CUPY], TEXTBOOK),
    ]  # fmt: skip


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}"


def micros(row: Row | None, name: str = OURS) -> str:
    return number((row or {}).get("times", {}).get(name, {}).get("median_us"))


def share(row: Row | None) -> str:
    shares = (row or {}).get("shares", {}).get(OURS)
    return f"{100 * shares['plan']['median_us']:.0f}%" if shares else "-"


def ratio(row: Row | None, name: str) -> str:
    found = (row or {}).get("ratios", {}).get(name)
    return f"{found['median_us']:.1f}x" if found else "-"


SUMMARY_HEADER = ("over the rows", "least", "mean", "most", "rows", "the least in")


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """Shares of the floor, and peers' times over ours: least, geometric mean and most."""
    lines = []
    for library, peers in ((TORCH, (EAGER, COMPILED)), (JAX, (FLAX,)), (CUPY, (TEXTBOOK,))):
        mine = [row for row in rows if row["library"] == library]
        values = {"share of the floor": [(r["shares"][OURS]["plan"]["median_us"], r["name"])
                                         for r in mine if OURS in r.get("shares", {})]}  # fmt: skip
        for peer in peers:
            values[f"{peer} / ours"] = [
                (row["ratios"][peer]["median_us"], row["name"])
                for row in mine
                if peer in row["ratios"]
            ]
        for title, found in values.items():
            if found:
                (least, where), (most, _) = min(found), max(found)
                mean = math.exp(sum(math.log(value) for value, _ in found) / len(found))
                figures = [f"{value:.2f}" for value in (least, mean, most)]
                shown = where.partition("/")[2]
                lines.append([f"{library}: {title}", *figures, str(len(found)), shown])
    return lines


# ---- what is missing or wrong -------------------------------------------------------------------


def failures(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The errors and failures of our rows."""
    for record in records:
        kind = record["kind"]
        if kind == "check" and not record["passed"]:
            yield f"{record['library']} {record['name']}: {record['failure']}"
        elif kind == "failure":
            yield f"{record['name']}: {record['why']}"
        elif kind == "row":
            if OURS in record["left_out"]:
                yield f"{record['name']}: {OURS} {record['left_out'][OURS]}"
            if disagrees(record):
                more = f"{json.dumps(record['disagreement'])}, more than {DISAGREEMENT}"
                yield f"{record['name']}: differs from the peer by {more}"


def notes(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Contenders left out and why, each reason once, and rows without time."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record["kind"] == "probe" and record["why"]:
            found.setdefault((record["library"], record["why"]), []).append("everywhere")
        elif record["kind"] == "skipped":
            library = record["name"].partition("/")[0]
            found.setdefault((library, f"SKIPPED, {record['why']}"), []).append(record["name"])
        elif record["kind"] in ("row", "copy"):
            where = record.get("name", f"{record['library']} copies")
            for name, why in record["left_out"].items():
                found.setdefault((f"left out: {name}", why), []).append(where)
            for name, times in record.get("times", {}).items():
                if "no graph could" in times["how"]:
                    found.setdefault((name, times["how"]), []).append(where)
    for (name, why), where in found.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        yield f"{name}: {why} ({where[0]}{more})"
