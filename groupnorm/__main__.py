"""``python -m groupnorm``: list the backends, and compare each with a float64 reference.

The column "implementation" is the default for ordinary float32 calls: "fused" are compiled
kernels, "portable" is the implementation for everything else.

The exit status is 0 if every backend that is installed and has a device agrees, else 1. A backend
that is not installed, or has no usable device, is listed and is not a failure.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from groupnorm.selfcheck import NOT_INSTALLED, BackendReport, Check, agree, check_backends

Row = tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command-line arguments; default is those of the process.

    Returns
    -------
    int
        The exit status: 0 if every usable backend agrees with the reference, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m groupnorm", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    reports = check_backends()
    if options.json:
        print(json.dumps(_as_dict(reports), indent=2))
    else:
        _print_report(reports)
    return 0 if agree(reports) else 1


def _version() -> str:
    try:
        return importlib.metadata.version("groupnorm")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return "not installed"


def _as_dict(reports: list[BackendReport]) -> dict[str, Any]:
    """The whole result in JSON types."""
    return {
        "groupnorm": _version(),
        "python": platform.python_version(),
        "agree": agree(reports),
        "backends": [
            {
                "name": report.name,
                "version": report.version,
                "devices": list(report.devices),
                "implementations": {d: list(n) for d, n in report.implementations.items()},
                "why_not_fused": dict(report.why_not_fused),
                "status": report.status,
                "checks": [_check_as_dict(check) for check in report.checks],
            }
            for report in reports
        ],
    }


def _check_as_dict(check: Check) -> dict[str, Any]:
    finite = check.error is not None and math.isfinite(check.error)
    return {
        "name": check.name,
        "device": check.device,
        "error": check.error if finite else None,  # JSON has no NaN
        "bound": check.bound,
        "agrees": check.agrees,
        "failure": check.failure if finite or check.failure else "the result is not finite",
    }


def _print_report(reports: list[BackendReport]) -> None:
    """Print the backends, the checks, the errors and the verdict."""
    title = f"groupnorm {_version()}, Python {platform.python_version()}"
    header: Row = ("backend", "version", "devices", "implementation", "status")
    _print_table(title, header, _backend_rows(reports))
    for report in reports:
        for reason, devices in _by_value(report.why_not_fused).items():
            print(f"{report.name}, {', '.join(devices)}: not fused, {reason}")
    checked = [report for report in reports if report.checks]
    if checked:
        columns = [(report, device) for report in checked for device in _devices(report)]
        header = ("check", "bound", *(f"{report.name} {device}" for report, device in columns))
        print()
        _print_table("Error against float64", header, _check_rows(columns))
    for report in reports:
        if report.reason not in {None, NOT_INSTALLED}:
            print(f"{report.name} is {report.reason}")
        for check in report.checks:
            if check.failure is not None:
                print(f"{report.name}, {check.device}, {check.name}: {check.failure}")
    print(_verdict(reports))


def _backend_rows(reports: list[BackendReport]) -> list[Row]:
    # A reason may be long, such as a driver's message: it is printed below the tables.
    return [
        (
            report.name,
            report.version or "-",
            ", ".join(report.devices) or "-",
            _implementation(report),
            report.status.partition(":")[0],
        )
        for report in reports
    ]


def _implementation(report: BackendReport) -> str:
    """The default implementation, listed per device if it differs."""
    taken = _by_value({device: names[0] for device, names in report.implementations.items()})
    if len(taken) < 2:
        return next(iter(taken), "-")
    return ", ".join(f"{name} ({', '.join(devices)})" for name, devices in taken.items())


def _by_value(of_devices: Mapping[str, str]) -> dict[str, list[str]]:
    """The devices of each value, so that eight equal GPUs are listed together."""
    devices: dict[str, list[str]] = {}
    for device, value in of_devices.items():
        devices.setdefault(value, []).append(device)
    return devices


def _devices(report: BackendReport) -> list[str]:
    """The devices that were checked, each once."""
    return list(dict.fromkeys(check.device for check in report.checks))


def _check_rows(columns: list[tuple[BackendReport, str]]) -> list[Row]:
    """One row per check, one column per device."""
    by_column = [
        {check.name: check for check in report.checks if check.device == device}
        for report, device in columns
    ]
    return [
        (name, f"{check.bound:.0e}", *(_cell(checks[name]) for checks in by_column))
        for name, check in by_column[0].items()
    ]


def _cell(check: Check) -> str:
    if check.error is None:
        return "RAISED"
    return f"{check.error:.1e}" if check.agrees else f"{check.error:.1e} WRONG"


def _verdict(reports: list[BackendReport]) -> str:
    checked = [report for report in reports if report.reason is None]
    if agree(reports):
        return f"In agreement with float64: {', '.join(report.name for report in checked)}"
    wrong = [report.name for report in checked if report.status == "disagrees"]
    return f"Not in agreement with float64: {', '.join(wrong) or 'NumPy could not be checked'}"


def _print_table(title: str, header: Row, rows: list[Row]) -> None:
    """Print with rich if it is installed, else as plain text."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain_table(title, header, rows)
        return
    table = Table()
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    console = Console()
    console.print(title, style="bold", highlight=False)
    console.print(table)


def _style(cell: str) -> str:
    if cell == "agrees":
        return "green"
    return "bold red" if cell.endswith(("disagrees", "RAISED", "WRONG")) else ""


def _print_plain_table(title: str, header: Row, rows: list[Row]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in (header, tuple("-" * width for width in widths), *rows):
        print("  ".join(map(str.ljust, row, widths)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
