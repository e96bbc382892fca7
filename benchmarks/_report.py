"""Shared by the benchmarks: tables with and without rich, versions, machine, timing, JSON."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
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
    """Print `rows` under `header`, with rich if it is installed and as plain text otherwise.

    `styles` holds one rich style per row ("" for none) and is ignored in plain text, so no
    information may be in the colour alone.
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
    # Figures truncated to a narrow terminal, or a pipe's 80 columns, would be useless.
    natural = sum(max(map(len, column)) + 3 for column in zip(header, *rows, strict=True)) + 1
    console = Console(width=max(natural, len(title), Console().width))
    console.print(title, style="bold", highlight=False)
    console.print(table)


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table as plain text."""
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


def machine() -> dict[str, Any]:
    """The hardware that the figures depend on, as far as the system reports it."""
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpus(),
        "caches": cpu_caches(),
        "system": platform.platform(),
    }


def cpu_model() -> str:
    """The processor's name; Linux has it in a file, other systems give at least the family."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_caches() -> dict[str, str]:
    """Size of each cache that the first CPU sees, such as {"L1d": "32K"}; Linux only."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        found["L" + level + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write `result` to `path`, if one is given."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {path}")


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call; contenders take turns, so that all see the same machine load."""
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


def processes_in_turns(
    processes: dict[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """What each function returns, in turns; each starts a process and returns its milliseconds.

    The first turn writes the .pyc files, and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in processes}
    for turn in range(-1, rounds):
        for name in processes if turn % 2 else reversed(processes):
            milliseconds = processes[name]()
            if turn >= 0:
                times[name].append(milliseconds)
    return times


def in_turns(
    contenders: dict[str, Callable[[], Any]],
    seconds: float,
    rounds: int,
    fewest: int = 3,
    shortest: float = 2e-4,
) -> dict[str, list[float]]:
    """Milliseconds per call; contenders take turns, in about `seconds` for all of them.

    Every contender gets the same time: up to `rounds` turns, at least `fewest`. If a slow one gets
    fewer, its turns are spread evenly between the others', so that all see the same machine load.
    A turn begins with a call that is not timed, because another contender may have replaced the
    caches and returned memory to the system: figures are those of a repeated call.
    A call shorter than `shortest` seconds is repeated until a turn lasts that long, and their mean
    is one figure: the overhead of clock and loop must be negligible.
    """
    costs = {name: warm_up(call) for name, call in contenders.items()}
    repeats = {name: max(1, math.ceil(shortest / cost)) for name, cost in costs.items()}
    share = seconds / max(1, len(contenders))
    turns = {
        name: min(rounds, max(fewest, int(share / (cost * (repeats[name] + 1)))))
        for name, cost in costs.items()
    }
    most = max(turns.values(), default=0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for turn in range(most):
            for name in contenders if turn % 2 else reversed(contenders):
                if (turn + 1) * turns[name] // most > turn * turns[name] // most:
                    contenders[name]()
                    times[name].append(1e3 * mean_time(contenders[name], repeats[name]))
    finally:
        gc.enable()
    return times


def settle_allocator() -> None:
    """Let glibc allocate arrays of up to 32 MB on its heap, as in any long-running program.

    At first it maps and unmaps each array above 128 kB; freeing a large one raises that limit
    permanently. Without this the first contenders pay for page faults that later ones avoid.
    """
    large = bytearray(31 * 2**20)
    del large


def warm_up(call: Callable[[], Any], calls: int = 3, seconds: float = 0.3) -> float:
    """Least seconds of a few calls after the first, which compiles and starts thread pools."""
    call()
    least, spent = math.inf, 0.0
    for _ in range(calls):
        took = mean_time(call, 1)
        least, spent = min(least, took), spent + took
        if spent > seconds:
            break
    return least


def mean_time(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call, the mean of `repeats`; without the time to free the last result."""
    kept = None
    start = time.perf_counter()
    for _ in range(repeats):
        kept = call()
    took = time.perf_counter() - start
    del kept  # until here the result was alive, so it had to be computed
    return took / repeats


def summary(times: Sequence[float]) -> dict[str, float]:
    """Minimum and median of `times`."""
    return {"min_ms": min(times), "median_ms": statistics.median(times)}
