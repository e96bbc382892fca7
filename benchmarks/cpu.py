"""Speed, call overhead and memory on a CPU, next to a plain copy and to every peer.

A row is a shape, a layout, a dtype and a task; its contenders run in one process and take turns,
so that all see the same machine load. Every result is first checked against float64. A cell gives
the minimum and the median in milliseconds, and the median as a multiple of ours. At the end, the
aims and whether they are met; the exit status is 1 only if one of our own calls raised or was
wrong, never because of time. Missing features and libraries are listed and left out::

    python benchmarks/cpu.py [--quick] [--rounds N] [--only REGEX] [--json FILE] [--plots DIR]
    nox -s bench -- benchmarks/cpu.py

REGEX selects rows by name, such as "PyTorch/forward/.*/channels-last", "overhead", "memory" or
"keras"; `--list` prints the names.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from _cpu_cases import EPSILON, LIMIT, OURS, plan
from _cpu_measure import Effort, failures, measure
from _cpu_probes import answer, keras, memory, overhead
from _cpu_summary import KEYS, summarize, summary_row
from _report import machine, print_table, settle_allocator, usable_cpus, versions, write_json

PACKAGES = (
    *("groupnorm", "numpy", "torch", "jax", "jaxlib", "ml_dtypes"),
    *("flax", "equinox", "brainstate", "keras"),
)
PROBES = ("keras", "overhead", "memory")


def three_digits(value: float) -> str:
    """Three digits, without an exponent."""
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2 if value >= 0.995 else 3
    return f"{value:.{digits}f}"


# ---- tables -------------------------------------------------------------------------------------


def show_rows(rows: list[dict[str, Any]]) -> None:
    """One table of the rows of a framework and task."""
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    names.sort(key=lambda name: (name != LIMIT, name.startswith(OURS), name == OURS))
    if names:
        print_table(
            f"{rows[0]['framework']}, {rows[0]['task']}: min ms, median ms, median / ours",
            ["shape", "layout", *names, "ours / copy"],
            [
                [row["label"], row["layout"], *(cell(row, n) for n in names), ratio(row, LIMIT)]
                for row in rows
            ],
        )
    else:
        print(f"{rows[0]['framework']}, {rows[0]['task']}: nothing could be measured")
    print()


def cell(row: dict[str, Any], name: str) -> str:
    times, ours = row["times"].get(name), row["times"].get(OURS)
    if times is None:
        return "-"
    text = f"{three_digits(times['min_ms'])}  {three_digits(times['median_ms'])}"
    if ours is None or name == OURS:
        return text
    return f"{text} {times['median_ms'] / ours['median_ms']:5.1f}x"


def ratio(row: dict[str, Any], name: str) -> str:
    times = row["times"]
    if OURS not in times or name not in times:
        return "-"
    return three_digits(times[OURS]["median_ms"] / times[name]["median_ms"]) + "x"


def show_overhead(rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        for name, times in row["times"].items():
            above = row["above_us"].get(name)
            lines.append([
                f"{row['framework']} {row['task']}", name,
                *(f"{1e3 * times[key]:.1f}" for key in KEYS),
                *(f"{above[key]:+.1f}" if above else "" for key in KEYS),
            ])  # fmt: skip
    print_table(
        "Overhead: eager calls on float32 (2, 32, 4, 4), PyTorch with one thread",
        ["task", "contender", "min us", "median us", "above by min", "by median"],
        lines,
    )
    print()


def show_memory(rows: list[dict[str, Any]]) -> None:
    print_table(
        "Peak memory beyond input and output (268 MB), forward, float32 (1, 128, 512, 512)",
        ["framework", "contender", "layout", "extra MB", "in percent"],
        [
            [row["framework"], row["contender"], row["layout"], f"{row['extra_mb']:.1f}",
             f"{row['extra_percent']:.1f} %"]
            for row in rows if "layout" in row
        ],
    )  # fmt: skip
    print()


def show_notes(rows: Iterable[dict[str, Any]]) -> None:
    """Contenders left out and why, each reason once, with the number of rows it applies to."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        left_out = row.get("left_out", {})
        if isinstance(left_out, str):
            left_out = {row.get("contender", "everyone"): left_out}
        for name, why in left_out.items():
            where = row.get("name", f"{row['framework']} {row.get('task', '')}".strip())
            found.setdefault((name, why), []).append(where)
    for (name, why), where in found.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        print(f"left out: {name}: {why} ({where[0]}{more})")


def show_failures(rows: Iterable[dict[str, Any]]) -> bool:
    """Print errors and wrong results; return whether one of ours failed, or none was run."""
    rows = list(rows)
    found = bool(rows) and not any(OURS in row.get("times", {}) for row in rows)
    for row in rows:
        for name, what in failures(row).items() if "times" in row else ():
            print(f"WRONG: {row['name']}: {name} {what}")
            found = found or name.startswith(OURS)
    return found


# ---- running ------------------------------------------------------------------------------------


def threads() -> dict[str, Any]:
    """The number of threads that each kind of contender may use."""
    found: dict[str, Any] = {"NumPy peers": 1, "ours in NumPy, at most": usable_cpus()}
    try:
        import torch

        found["PyTorch"] = torch.get_num_threads()
    except ImportError:
        pass
    found["XLA's pool"] = usable_cpus()
    return found


def revision() -> str:
    """The commit of the checkout that the library is imported from, and whether it was edited."""
    import groupnorm

    folder = Path(groupnorm.__file__).parent
    try:
        child = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return str(folder)
    return child.stdout.strip() or str(folder)


def load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def show_conditions(conditions: dict[str, Any], effort: Effort) -> None:
    computer = conditions["machine"]
    caches = ", ".join(f"{name} {size}" for name, size in computer["caches"].items())
    counts = ", ".join(f"{who} {count}" for who, count in conditions["threads"].items())
    print(", ".join(f"{name} {version}" for name, version in conditions["versions"].items()))
    print(f"groupnorm at {conditions['revision']}")
    print(f"{computer['cpu']}, {computer['usable_cpus']} of {computer['cpus']} CPUs; {caches}")
    print(f"threads: {counts}; load {conditions['load_before']} before the start")
    if (conditions["load_before"] or 0) > 0.5 * computer["usable_cpus"]:
        print("other jobs are running: waits of PyTorch's and XLA's threads show in the medians")
    print(
        f"32 groups where nothing else is said, epsilon {EPSILON:g}; {effort.fewest} to "
        f"{effort.rounds} turns in about {effort.seconds:g} s a row\n"
    )


def measure_rows(options: argparse.Namespace, effort: Effort) -> Iterator[dict[str, Any]]:
    """Measure every selected row; a table is printed as soon as it is complete."""
    cases = [case for case in plan(options.quick) if re.search(options.only, case.name)]
    for _, group in itertools.groupby(cases, key=lambda case: (case.framework, case.task)):
        rows = []
        for case in group:
            if sys.stderr.isatty():
                print(f"\r{case.name:<78}\r", end="", file=sys.stderr, flush=True)
            rows.append(measure(case, effort))
            yield rows[-1]
        show_rows(rows)


def measure_keras(options: argparse.Namespace, effort: Effort) -> list[dict[str, Any]]:
    rows = list(keras(options.quick, effort))
    whole = [row for row in rows if "times" in row]
    for _, group in itertools.groupby(whole, key=lambda row: row["framework"]):
        show_rows(list(group))
    return rows


def run(options: argparse.Namespace, effort: Effort) -> dict[str, Any]:
    """Measure and print everything; return it in JSON types."""
    start = time.monotonic()
    conditions = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "revision": revision(),
        "threads": threads(),
        "load_before": load(),
        "quick": options.quick,
        "effort": vars(effort),
    }
    show_conditions(conditions, effort)
    settle_allocator()
    rows = list(measure_rows(options, effort))
    wanted = {name: re.search(options.only, name) for name in PROBES}
    keras_rows = measure_keras(options, effort) if wanted["keras"] else []
    calls = list(overhead(options.quick)) if wanted["overhead"] else []
    if calls:
        show_overhead(calls)
    peaks = list(memory(options.quick)) if wanted["memory"] else []
    if peaks:
        show_memory(peaks)
    lines = summarize(rows, calls, peaks)
    show_summary(lines)
    show_notes([*rows, *keras_rows, *calls, *peaks])
    found = {"rows": rows, "keras": keras_rows, "overhead": calls, "memory": peaks}
    conditions.update(load_after=load(), seconds=round(time.monotonic() - start, 1))
    print(f"{conditions['seconds']:.0f} s; load {conditions['load_after']} at the end")
    return {**conditions, **found, "summary": lines}


def show_summary(lines: list[dict[str, Any]]) -> None:
    if not lines:
        return
    print_table(
        "Aims: geometric means over the rows (float32, 32 groups) where nothing else is said",
        ["ratio of times", "by minima", "by medians", "aim", "rows", "verdict"],
        [summary_row(line) for line in lines],
        ["green" if line["met"] else "yellow" if line["met"] is False else "dim" for line in lines],
    )
    met = sum(line["met"] is True for line in lines)
    print(f"{met} of {len(lines)} aims met, each by minima and by medians\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few shapes and turns, two minutes")
    parser.add_argument("--rounds", type=int, metavar="N", help="most turns a row (default 50)")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows to measure, by name")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw the figures as PNG")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="draw these, measure nothing"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def draw(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if options.plots is None:
        return
    try:
        from _cpu_figures import draw_all
    except ImportError as error:
        print(f"no plots: not installed: {error.name or error}")
        return
    for path in draw_all(result, options.plots):
        print(f"written: {path}")


def main() -> int:
    options = parse()
    if options.child:
        answer(json.loads(options.child))
        return 0
    if options.list:
        print("\n".join([*(case.name for case in plan(options.quick)), *PROBES]))
        return 0
    if options.from_json:
        draw(options, json.loads(options.from_json.read_text()))
        return 0
    effort = Effort(seconds=0.3, rounds=15, fewest=3, compiles=False) if options.quick else Effort()
    if options.rounds:
        effort = replace(effort, rounds=options.rounds, fewest=min(effort.fewest, options.rounds))
    result = run(options, effort)
    write_json(options.json, result)
    draw(options, result)
    return 1 if show_failures([*result["rows"], *result["keras"]]) else 0


if __name__ == "__main__":
    sys.exit(main())
