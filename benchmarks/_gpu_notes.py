"""The notes of gpu.py to its figures: what is missing, was skipped, or is wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from _gpu_cases import OURS
from _gpu_measure import DISAGREEMENT, disagrees


def failures(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The errors and failures of our rows."""
    for record in records:
        kind, where = (
            record["kind"],
            f"{record.get('library', '')} {record.get('name', '')}".strip(),
        )
        if kind == "check" and not record["passed"]:
            why = record["failure"] or f"errors {json.dumps(record['errors'])}"
            why += "" if record["repeats"] in (None, True) else ", other bits when repeated"
            yield f"{where}: {why}"
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
        elif record["kind"] in ("row", "copy"):
            where = record.get("name", f"{record['library']} copies")
            for name, why in record["left_out"].items():
                found.setdefault((f"left out: {name}", why), []).append(where)
            if record.get("dtype") not in (None, "bfloat16"):
                found.setdefault((record["library"], f"in {record['dtype']}"), []).append(where)
            for name, times in record.get("times", {}).items():
                if "no graph could" in times["how"]:
                    found.setdefault((name, times["how"]), []).append(where)
    for (name, why), where in found.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        yield f"{name}: {why} ({where[0]}{more})"
    skipped = [record for record in records if record["kind"] == "skipped"]
    for (library, why), group in itertools.groupby(skipped, key=library_and_reason):
        names = [record["name"] for record in group]
        yield f"SKIPPED, {why}: {len(names)} items of {library}, from {names[0]} on"


def library_and_reason(record: dict[str, Any]) -> tuple[str, str]:
    return record["name"].partition("/")[0], record["why"]
