"""The processes of gpu.py: one for each library, so that a fault of one spares the others.

A child does a library's work item by item, and writes a line of JSON for each to a file: copies,
checks, then rows in order of importance. Where it dies, its parent starts another one behind the
item that it died of. What there is no time for is named.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _gpu_checks
from _gpu_cases import LIBRARIES, Case, plan
from _gpu_measure import SECONDS, DeviceLost, copies, measure, reason

LOST = 3  # exit status of a child whose device does not answer
GRACE = 30.0  # seconds beyond its limit after which a child is killed
MOST_CHILDREN = 25
# Shares of the time, for those that are still to come; what one leaves is the others'.
SHARES = {"torch": 0.45, "jax": 0.35, "cupy": 0.2}
PROBE = "probe"

Item = tuple[str, Callable[[], list[dict[str, Any]]]]
Record = dict[str, Any]


def engine_of(library: str) -> Any:
    return importlib.import_module(f"_gpu_{library}")


def names_of(library: str, quick: bool) -> list[str]:
    """The items of a library, listed without importing it."""
    checks = [f"{library}/check/{check.name}" for check in _gpu_checks.plan()]
    return [f"{library}/copies", *checks, *(case.name for case in plan(library, quick))]


def items_of(library: str, quick: bool) -> list[Item]:
    """The work of a child, with the same item names."""
    engine = engine_of(library)

    def copied() -> list[Record]:
        return [{**copies(engine.copy_timer), "library": library}]

    def checked(check: _gpu_checks.Check) -> list[Record]:
        return [_gpu_checks.run(check, library, engine.vjp)]

    def measured(case: Case) -> list[Record]:
        engine.release()
        return [measure(case, lambda: engine.Contest(case), SECONDS)]

    work = [
        copied,
        *(partial(checked, check) for check in _gpu_checks.plan()),
        *(partial(measured, case) for case in plan(library, quick)),
    ]
    return list(zip(names_of(library, quick), work, strict=True))


# ---- in the child -------------------------------------------------------------------------------


def child(request: dict[str, Any]) -> int:
    """Process a request's items from `begin` on while time is left."""
    end = time.monotonic() + request["seconds"]
    with Path(request["file"]).open("a") as file:

        def write(record: Record) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        if request["library"] == PROBE:
            probe(request["libraries"], write)
            return 0
        items = items_of(request["library"], request["quick"])
        longest = 0.0
        for name, work in items[request["begin"] :]:
            begun = time.monotonic()
            if begun + longest > end:
                return 0
            write({"kind": "begun", "name": name})
            try:
                for record in work():
                    write(record)
                    print(line_of(name, record), flush=True)
                    if record.get("failure") and not answers(request["library"]):
                        return LOST
            except DeviceLost as error:
                write({"kind": "failure", "name": name, "why": f"the device was lost: {error}"})
                return LOST
            except Exception as error:
                write({"kind": "failure", "name": name, "why": reason(error)})
            # Assume that the next row takes as long as recent ones: stop if it would not finish.
            longest = max(0.7 * longest, time.monotonic() - begun)
    return 0


def answers(library: str) -> bool:
    """Whether the device still works after a failure."""
    try:
        engine_of(library).wait()
    except Exception:
        return False
    return True


def probe(libraries: Sequence[str], write: Callable[[Record], None]) -> None:
    """Report which libraries have a GPU, and if any does, the package's self-check."""
    any_gpu = False
    for library in libraries:
        record: Record = {"kind": "probe", "library": library, "why": None, "gpu": None}
        try:
            engine = engine_of(library)
            record["why"] = engine.missing()
            if record["why"] is None:
                record["gpu"], any_gpu = engine.gpu_name(), True
        except Exception as error:
            record["why"] = reason(error).removeprefix("RAISED ")
        write(record)
    if not any_gpu:
        return
    write({"kind": "begun", "name": "selfcheck"})
    try:
        for record in _gpu_checks.package_checks():
            write(record)
    except Exception as error:
        write({"kind": "failure", "name": "selfcheck", "why": reason(error)})


def line_of(name: str, record: Record) -> str:
    """The line printed for a finished item."""
    if record["kind"] == "check":
        return f"{name}: {'right' if record['passed'] else 'WRONG'}"
    if record["kind"] == "row":
        times = record["times"].items()
        found = ", ".join(f"{who} {time['median_us']:.1f}" for who, time in times)
        return f"{name}: {found or 'nothing'} us  ({record['seconds']:.0f} s)"
    return f"{name}: done"


# ---- in the parent ------------------------------------------------------------------------------


def run_child(
    request: dict[str, Any], seconds: float, into: Path | None = None
) -> tuple[int, list[Record]]:
    """Run a child with a time limit and some grace; return its exit status and records.

    The records are also appended to `into` as they are made, so that none are lost if this process
    is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = into or Path(folder) / "records"
        before = file.stat().st_size if file.exists() else 0
        request = {**request, "seconds": seconds, "file": str(file)}
        command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--child"]
        # JAX would reserve most of the memory, but other libraries run in the same process.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        process = subprocess.Popen([*command, json.dumps(request)], env=environment)
        try:
            status = process.wait(timeout=max(seconds, 0) + GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
        written = file.read_bytes()[before:] if file.exists() else b""
        lines = written.decode(errors="replace").splitlines()
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # truncated when the child died
            continue
    return status, records


def run_library(
    library: str, quick: bool, seconds: float, into: Path | None = None
) -> list[Record]:
    """All records of a library, with its failures and the items without time."""
    end = time.monotonic() + seconds
    names = names_of(library, quick)
    found: list[Record] = []
    begin = 0
    for _ in range(MOST_CHILDREN):
        left = end - time.monotonic()
        if left <= 0 or begin >= len(names):
            break
        request = {"library": library, "quick": quick, "begin": begin}
        status, records = run_child(request, left, into)
        found += [record for record in records if record["kind"] != "begun"]
        begun = [record["name"] for record in records if record["kind"] == "begun"]
        begin = names.index(begun[-1]) + 1 if begun else begin
        if status == 0:
            break
        if status != LOST:
            where = begun[-1] if begun else f"{library}: before its first item"
            why = f"the process ended with status {status}"
            found.append({"kind": "failure", "name": where, "why": why})
        if not begun:
            break
    why = "its processes ended too often" if end > time.monotonic() + GRACE else "no time was left"
    return found + [{"kind": "skipped", "name": name, "why": why} for name in names[begin:]]


def run_all(
    libraries: Sequence[str], quick: bool, end: float, into: Path | None = None
) -> list[Record]:
    """The records of several libraries, which share the time until `end`."""
    found: list[Record] = []
    waiting = [library for library in LIBRARIES if library in libraries]
    while waiting:
        shares = [SHARES[library] for library in waiting]
        left = max(end - time.monotonic(), 0)
        found += run_library(waiting.pop(0), quick, left * shares[0] / sum(shares), into)
    return found
