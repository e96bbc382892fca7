"""The command ``groupnorm``, also ``python -m groupnorm``.

``groupnorm info`` lists the backends and their devices. The column "implementation" is the default
for ordinary float32 calls: "fused" are compiled kernels, "portable" is the implementation for
everything else. ``groupnorm check``, the default, also compares each backend with a float64
reference.

The exit status of a check is 0 if every backend that is installed and has a device agrees, else 1.
A backend that is not installed, or has no usable device, is listed and is not a failure. What the
command is doing goes to the standard error.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from groupnorm.backends.kernels.cpu.availability import instructions
from groupnorm.discovery import BackendInfo, backend_info
from groupnorm.dispatch import backend_names
from groupnorm.selfcheck import check_backends, rows_of_backend
from groupnorm.testing.report import Report
from groupnorm.text_tables import print_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command-line arguments; default is those of the process.

    Returns
    -------
    int
        The exit status: 0, or 1 if a usable backend does not agree with the reference.
    """
    parser = argparse.ArgumentParser(
        prog="groupnorm",
        description="List the backends of groupnorm on this machine, and check their results.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("info", "check"),
        default="check",
        help="info: versions, devices and implementations; check (the default): also compare each "
        "backend with float64, with exit status 1 if one is wrong",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--version", action="version", version=f"groupnorm {_version()}")
    options = parser.parse_args(arguments)

    found = []
    for name in backend_names():
        _say(f"importing {name}, if it is installed, to list its devices")
        found.append(backend_info(name))
    report = None
    if options.command == "check":
        rows = [row for info in found for row in rows_of_backend(info)]
        report = check_backends(rows, lambda row: _say(f"checking {row.name}{_wait(row.name)}"))
    if options.json:
        print(json.dumps(_as_dict(found, report), indent=2))
    else:
        _print(found, report)
    return 0 if report is None or _agree(report) else 1


def _say(what: str) -> None:
    print(f"groupnorm: {what}", file=sys.stderr, flush=True)


def _wait(row: str) -> str:
    """Return what the check of a row, such as "torch:cuda:0", spends most of its time on."""
    on_cpu = row.partition(":")[2].startswith("cpu")
    return "" if on_cpu else "; the first call compiles kernels"


def _version() -> str:
    try:
        return importlib.metadata.version("groupnorm")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return "not installed"


def _agree(report: Report) -> bool:
    """Whether all that was checked agrees, and NumPy, which is always installed, was checked."""
    return bool(report) and any(row.startswith("numpy:") for row in report.rows)


def _status(info: BackendInfo, report: Report | None) -> str:
    if not info.installed:
        return "not installed"
    if info.error is not None or not info.devices:
        return "not usable"
    if report is None:
        return "usable"
    wrong = any(finding.row.partition(":")[0] == info.name for finding in report.wrong)
    return "WRONG" if wrong else "agrees"


def _as_dict(found: list[BackendInfo], report: Report | None) -> dict[str, Any]:
    """Return the whole result in the types of JSON."""
    made: dict[str, Any] = {
        "groupnorm": _version(),
        "python": platform.python_version(),
        "instructions": instructions(),
        "backends": [
            {
                "name": info.name,
                "version": info.version,
                "devices": list(info.devices),
                "implementations": {d: list(n) for d, n in info.implementations.items()},
                "why_not_fused": dict(info.why_not_fused),
                "status": _status(info, report),
                "error": info.error,
            }
            for info in found
        ],
    }
    if report is not None:
        made |= {"agree": _agree(report), "check": report.as_dict()}
    return made


def _print(found: list[BackendInfo], report: Report | None) -> None:
    """Print the backends, what they lack, the errors and the verdict."""
    print(f"groupnorm {_version()}, Python {platform.python_version()}")
    header = ("backend", "version", "devices", "implementation", "status")
    print_table(
        header,
        [
            (
                info.name,
                info.version or "-",
                ", ".join(info.devices) or "-",
                _implementation(info),
                _status(info, report),
            )
            for info in found
        ],
    )
    if instructions() is not None:
        print(f"instructions of the kernels for CPUs: {instructions()}")
    whys = {f"{i.name} on {d}": why for i in found for d, why in i.why_not_fused.items()}
    for reason, devices in _by_value(whys).items():
        print(f"{', '.join(devices)}: not fused, {reason}")
    for info in found:
        if info.installed and not info.devices:
            print(f"{info.name} is not usable: {info.error or 'no device'}")
    # CuPy says so itself, since it has nothing but GPUs.
    blind = [
        info.name
        for info in found
        if info.name in ("jax", "torch")
        and info.devices
        and all(device.partition(":")[0] == "cpu" for device in info.devices)
    ]
    if blind:
        print(
            f"{', '.join(blind)}: no GPU, because there is none or the installed build is one for "
            "CPUs"
        )
    if report is None:
        return
    print()
    report.print()
    checked = [info.name for info in found if _status(info, report) in ("agrees", "WRONG")]
    wrong = [info.name for info in found if _status(info, report) == "WRONG"]
    if _agree(report):
        print(f"In agreement with float64: {', '.join(checked)}")
    else:
        print(f"Not in agreement with float64: {', '.join(wrong) or 'NumPy could not be checked'}")


def _implementation(info: BackendInfo) -> str:
    """Return the default implementation, listed for each device if it differs."""
    taken = _by_value({device: names[0] for device, names in info.implementations.items()})
    if len(taken) < 2:
        return next(iter(taken), "-")
    return ", ".join(f"{name} ({', '.join(devices)})" for name, devices in taken.items())


def _by_value(of_devices: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the devices of each value, so that eight equal GPUs are listed together."""
    devices: dict[str, list[str]] = {}
    for device, value in of_devices.items():
        devices.setdefault(value, []).append(device)
    return devices


def run() -> None:
    """Run the command as a program, whose output may be closed early, as by ``head``."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    run()
