"""What the three benchmarks share: tables with and without rich, versions, timing, JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()
) -> None:
    """Print `rows` under `header`, with rich where it is installed and as plain text elsewhere.

    `styles` holds one rich style a row ("" for none) and is ignored in plain text, so nothing may
    be said by colour alone.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain_table(title, header, rows))
        return
    table = Table()
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for index, row in enumerate(rows):
        style = styles[index] if styles else ""
        table.add_row(*(Text(cell) for cell in row), style=style or None)
    # Figures cut off to fit a narrow terminal, or a pipe's 80 columns, would be worth nothing.
    natural = sum(max(map(len, column)) + 3 for column in zip(header, *rows, strict=True)) + 1
    console = Console(width=max(natural, Console().width))
    console.print(title, style="bold", highlight=False)
    console.print(table)


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in characters only."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])


def versions(*packages: str) -> dict[str, str]:
    """Version of each installed package of `packages`, and of Python."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def usable_cpus() -> int:
    """CPUs this process may use, which in a container is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write `result` to `path`, where one was asked for."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {path}")


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, the contenders taking turns so that all see the same weather."""
    names = list(contenders)
    for name in names:
        for _ in range(3):  # compilation, first-touch memory, thread pools
            contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            contenders[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Least and median of `times`."""
    return {"min_ms": min(times), "median_ms": statistics.median(times)}
