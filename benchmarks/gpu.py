"""Correctness and speed on an NVIDIA GPU, next to a plain copy and to every peer.

First, results and gradients of the kernels are compared with float64, and repeated calls must give
the same bits. Then copies measure the memory bandwidth, and with it the minimum time for reading
and writing (the floor). Then follow rows in bfloat16 with SiLU, forward and forward+backward, in
PyTorch, JAX and CuPy, as far as installed: the contenders of a row take turns. Each library runs in
a separate process. Rows without time are listed and left out; errors and wrong results are printed
and recorded, and make the exit status 1. It is 2 if there is no GPU::

    python benchmarks/gpu.py [--quick] [--seconds N] [--only torch,cupy,jax] [--into DIR]
    python benchmarks/gpu.py --from-json FILE

Each record is appended to DIR/records-<time>.jsonl when it is made, so that a run that is killed
loses none. The figures go to DIR/<gpu>-<date>.json and, with matplotlib, a PNG next to it;
``--from-json`` shows either kind of file.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

try:
    import groupnorm  # noqa: F401 - before what needs it
except ImportError as error:
    print(f"gpu.py: {error}. Install this package first: python3 -m pip install -e '.[gpu]'.")
    sys.exit(2)

from _gpu_cases import LIBRARIES
from _gpu_notes import failures, notes
from _gpu_report import AIM_HEADER, HEADER, add_floors, aim_line, judge, short_name, table
from _gpu_work import PROBE, child, run_all, run_child
from _report import machine, print_table, versions, write_json

PACKAGES = (
    *("groupnorm", "numpy", "torch", "jax", "jaxlib", "jax-cuda13-plugin", "jax-triton"),
    *("cupy-cuda13x", "cupy-cuda12x", "triton", "flax", "apex", "ml_dtypes", "matplotlib"),
)
RESULTS = Path(__file__).with_name("results")


def commit() -> tuple[str, bool | None]:
    """The checkout's commit, and whether it was edited; unknown without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
            check=True,
        ).stdout.strip()  # fmt: skip

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def driver() -> str | None:
    """The driver's version, clocks and power limit, as reported by its own tool."""
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def measure(options: argparse.Namespace) -> dict[str, Any] | str:
    """Everything in JSON types, or why there is nothing to measure."""
    begun = time.monotonic()
    # Each library's process may end with a row that takes longer than expected.
    end = begun + options.seconds
    options.into.mkdir(parents=True, exist_ok=True)
    raw = options.into / f"records-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl"
    status, records = run_child({"library": PROBE, "libraries": options.only}, 90, raw)
    records = [record for record in records if record["kind"] != "begun"]
    probes = {record["library"]: record for record in records if record["kind"] == "probe"}
    for name in options.only:
        if name not in probes:
            why = f"its probe ended with status {status}"
            records.append({"kind": "probe", "library": name, "why": why, "gpu": None})
            probes[name] = records[-1]
    usable = [name for name in options.only if probes[name]["why"] is None]
    if not usable:
        reasons = "; ".join(f"{name}: {probes[name]['why']}" for name in options.only)
        raw.unlink(missing_ok=True)
        return f"there is no GPU here for any of the libraries: nothing is measured ({reasons})"
    if status:
        why = f"the process ended with status {status}"
        records.append({"kind": "failure", "name": "selfcheck", "why": why})
    gpu = probes[usable[0]]["gpu"]
    print(f"{gpu}: {', '.join(usable)}; at most about {options.seconds} s", flush=True)
    records += run_all(usable, options.quick, end, raw)
    revision, dirty = commit()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": gpu, "driver": driver(), "commit": revision, "dirty": dirty,
        "versions": versions(*PACKAGES), "machine": machine(), "quick": options.quick,
        "only": options.only, "seconds": round(time.monotonic() - begun, 1), **sorted_out(records),
    }  # fmt: skip


def read(file: Path) -> dict[str, Any]:
    """A finished result, or what a run that was killed had recorded."""
    if file.suffix != ".jsonl":
        return json.loads(file.read_text())
    records = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):  # truncated when the process was killed
            records.append(json.loads(line))
    gpu = next((r["gpu"] for r in records if r["kind"] == "probe" and r["gpu"]), "unknown GPU")
    return {
        "gpu": gpu, "driver": None, "commit": "unknown", "dirty": False, "quick": False,
        **sorted_out([record for record in records if record["kind"] != "begun"]),
    }  # fmt: skip


def sorted_out(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Records by kind, rows with floors, and the aims."""
    rows, checks, copied = (
        [record for record in records if record["kind"] == kind]
        for kind in ("row", "check", "copy")
    )
    speeds = next((c["bytes_per_second"] for c in copied if c["bytes_per_second"]), {})
    add_floors(rows, speeds)
    others = [record for record in records if record["kind"] in ("probe", "failure", "skipped")]
    return {
        "copies": copied, "checks": checks, "rows": rows, "others": others,
        "aims": judge(rows, checks), "failures": list(failures(records)),
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print what is missing and what is wrong, then the table and the aims."""
    rows, checks = result["rows"], result["checks"]
    for note in notes([*result["copies"], *rows, *result["others"]]):
        print(note)
    print(f"{sum(check['passed'] for check in checks)} of {len(checks)} checks passed")
    for failure in result["failures"]:
        print(f"FAILED: {failure}")
    for copy in result["copies"]:
        speeds = copy["bytes_per_second"].items()
        found = ", ".join(f"{int(size) / 1e6:.0f} MB {speed / 1e12:.2f}" for size, speed in speeds)
        print(f"copies in {copy['library']}, TB/s read and written ({copy['how']}): {found}")
    edited = " (edited)" if result["dirty"] else ""
    print(f"{result['gpu']}, driver {result['driver']}, commit {result['commit'][:9]}{edited}")
    title = (
        "medians in microseconds (p: portable, no kernels), shares of the floor of the plan, and "
        "peers' times over ours; torch and cupy by CUDA graphs, jax by a dispatch loop; launches "
        "of ours/eager/compile"
    )
    print_table(title, HEADER, table(rows))
    print_table("aims: least values of any row", AIM_HEADER, list(map(aim_line, result["aims"])))


def draw(result: dict[str, Any], path: Path) -> None:
    try:
        from _gpu_figure import draw as draw_figure
    except ImportError as error:
        print(f"no PNG: not installed: {error.name or error}")
        return
    draw_figure(result, path)
    print(f"written: {path}")


def libraries(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in LIBRARIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(LIBRARIES)}")
    return [name for name in LIBRARIES if name in names]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three shapes")
    parser.add_argument("--seconds", type=int, default=450, metavar="N", help="default 450")
    parser.add_argument(
        "--only", type=libraries, default=list(LIBRARIES), metavar="NAMES",
        help="libraries to measure, such as torch,jax",
    )  # fmt: skip
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="DIR", help="for the files")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="show and draw these, measure nothing"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def file_name(result: dict[str, Any]) -> str:
    """Partial runs do not overwrite complete ones."""
    part = ["quick"] if result["quick"] else []
    part += result["only"] if len(result["only"]) < len(LIBRARIES) else []
    return "-".join([short_name(result["gpu"]), result["date"][:10], *part]) + ".json"


def main() -> int:
    options = parse()
    if options.child:
        return child(json.loads(options.child))
    if options.from_json:
        result, path = read(options.from_json), options.from_json
    else:
        result = measure(options)
        if isinstance(result, str):
            print(f"gpu.py: {result}.", file=sys.stderr)
            return 2
        path = options.into / file_name(result)
        write_json(path, result)
    draw(result, path.with_suffix(".png"))
    show(result)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
