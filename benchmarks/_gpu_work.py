"""The processes of gpu.py: one for each library, so that a fault of one spares the others.

A child does a library's work item by item and appends a line of JSON for each record to a file, so
that a run that is killed loses none. Where a child dies, its parent starts another one behind the
item that it died of. What there is no time for is named.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _gpu_cases import JAX, Case, plan
from _gpu_measure import copies, measure, reason

LOST = 3  # exit status of a child whose device does not answer
GRACE = 30.0  # seconds beyond its limit after which a child is killed
# Shares of the time, for those that are still to come; what one leaves is the others'.
SHARES = {"torch": 0.45, "jax": 0.35, "cupy": 0.2}

Record = dict[str, Any]


def items(library: str, without: Sequence[str]) -> dict[str, Callable[[], list[Record]]]:
    """The work of a library by name; the library is imported when the work is done."""

    def engine() -> Any:
        return importlib.import_module(f"_gpu_{library}")

    def measured(case: Case) -> list[Record]:
        engine().release()
        return [measure(case, engine(), without)]

    work = {"selfcheck": lambda: package_checks(library, engine().BACKEND)}
    if library != JAX:  # where a copy is dispatched too slowly, or not done at all
        work["copies"] = lambda: [copies(library, engine().copy_timer)]
    found = {f"{library}/{name}": function for name, function in work.items()}
    return found | {case.name: lambda case=case: measured(case) for case in plan(library)}


def package_checks(library: str, backend: str) -> list[Record]:
    """The results of `groupnorm.selfcheck` on the library's GPU."""
    from groupnorm.discovery import backend_info
    from groupnorm.selfcheck import check_backends, rows_of_backend

    rows = rows_of_backend(backend_info(backend))
    on_gpu = [row for row in rows if not row.tag.startswith("cpu")]
    return [
        {
            "kind": "check", "library": library, "name": f"selfcheck: {f.input}, {f.where}",
            "error": f.error, "failure": None if f.right else f.message, "passed": f.right,
        }
        for f in check_backends(on_gpu or rows).findings
    ]  # fmt: skip


def append(file: Path, record: Record) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


# ---- in the child -------------------------------------------------------------------------------


def child(request: Record) -> int:
    """Process a request's items from `begin` on while time is left."""
    end = time.monotonic() + request["seconds"]
    library, file = request["library"], Path(request["file"])
    probed: Record = {"kind": "probe", "library": library, "why": None, "gpu": None}
    try:
        engine = importlib.import_module(f"_gpu_{library}")
        probed["why"] = engine.missing()
        probed["gpu"] = None if probed["why"] else engine.gpu_name()
    except Exception as error:
        probed["why"] = reason(error).removeprefix("RAISED ")
    append(file, probed)
    if probed["why"]:
        return 0
    longest = 0.0
    for name, work in list(items(library, request["without"]).items())[request["begin"] :]:
        begun = time.monotonic()
        if begun + longest > end:
            return 0
        append(file, {"kind": "begun", "name": name})
        try:
            records = work()
            for record in records:
                append(file, record)
            print(line_of(name, records), flush=True)
        except Exception as error:
            append(file, {"kind": "failure", "name": name, "why": reason(error)})
            if not answers(engine):
                return LOST
        # Assume that the next row takes as long as recent ones: stop if it would not finish.
        longest = max(0.7 * longest, time.monotonic() - begun)
    return 0


def answers(engine: Any) -> bool:
    """Whether the device still works after a failure."""
    try:
        engine.wait()
    except Exception:
        return False
    return True


def line_of(name: str, records: Sequence[Record]) -> str:
    """The line printed for an item."""
    record = records[-1]
    if record["kind"] == "check":
        return f"{name}: {sum(r['passed'] for r in records)} of {len(records)} right"
    if record["kind"] == "row":
        times = record["times"].items()
        found = ", ".join(f"{who} {time['median_us']:.1f}" for who, time in times)
        return f"{name}: {found or 'nothing'} us  ({record['seconds']:.0f} s)"
    return f"{name}: done"


# ---- in the parent ------------------------------------------------------------------------------


def read(file: Path) -> list[Record]:
    """The records of a file; the last line may be incomplete, if its process was killed."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run_child(request: Record, seconds: float, file: Path) -> tuple[int, list[Record]]:
    """Run a child with a time limit and some grace; return its exit status and its records."""
    before = len(read(file))
    request = {**request, "seconds": seconds, "file": str(file)}
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--child"]
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
    return status, read(file)[before:]


def run_library(library: str, without: Sequence[str], seconds: float, file: Path) -> None:
    """Append all records of a library, with its failures and the items without time."""
    end = time.monotonic() + seconds
    names = list(items(library, without))
    begin = 0
    while begin < len(names) and (left := end - time.monotonic()) > 0:
        request = {"library": library, "without": without, "begin": begin}
        status, records = run_child(request, left, file)
        begun = [record["name"] for record in records if record["kind"] == "begun"]
        begin = names.index(begun[-1]) + 1 if begun else begin
        if status not in (0, LOST):
            where = begun[-1] if begun else f"{library}: before its first item"
            why = f"the process ended with status {status}"
            append(file, {"kind": "failure", "name": where, "why": why})
        if status == 0 and not begun and any(r["kind"] == "probe" and r["why"] for r in records):
            return  # which the probe says
        if status == 0 or not begun:
            break
    for name in names[begin:]:
        append(file, {"kind": "skipped", "name": name, "why": "no time was left"})
