"""Speed on an NVIDIA GPU, next to a plain copy and to every peer, in three minutes.

For each of PyTorch, JAX and CuPy that is installed: the package's self-check on its GPU; copies,
which measure the memory bandwidth, and with it the minimum time for reading and writing (the
floor); then rows with SiLU, forward and forward+backward, whose contenders take turns, and whose
results are compared with a peer's. Each library runs in a separate process. Rows without time are
listed and left out, the least important ones; errors and wrong results are printed and recorded,
and make the exit status 1. It is 2 if there is no GPU::

    python benchmarks/gpu.py [--seconds N] [--only torch,cupy,jax] [--without compile] [--into DIR]
    python benchmarks/gpu.py --from-json FILE [--into DIR]

Each record is appended to DIR/records-<time>.jsonl when it is made, so that a run that is killed
loses none. After each library the figures go to DIR/<gpu>-<date>.json, and at the end, with
matplotlib, to a PNG next to it; ``--from-json`` shows either kind of file, and draws to DIR if one
is given.
"""

from __future__ import annotations

import argparse
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
from _gpu_report import HEADER, SUMMARY_HEADER, notes, short_name, sorted_out, summary, table
from _gpu_work import SHARES, append, child, read, run_library
from _report import machine, print_table, versions, write_json

PACKAGES = (
    *("groupnorm", "numpy", "torch", "jax", "jaxlib", "jax-cuda13-plugin", "jax-triton"),
    *("cupy-cuda13x", "cupy-cuda12x", "triton", "flax", "ml_dtypes", "matplotlib"),
)
RESULTS = Path(__file__).with_name("results")
DRIVER = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"


def said(*command: str) -> str | None:
    """What a command prints; None without it."""
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
            timeout=20,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, besides the GPU."""
    return {
        "kind": "about", "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "driver": said("nvidia-smi", f"--query-gpu={DRIVER}", "--format=csv,noheader"),
        "commit": said("git", "rev-parse", "HEAD") or "unknown",
        "dirty": bool(said("git", "status", "--porcelain", "-uno")),
        "versions": versions(*PACKAGES), "machine": machine(), "seconds": options.seconds,
        "only": options.only, "without": options.without,
    }  # fmt: skip


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], Path] | str:
    """The figures and their file, or why there is nothing to measure."""
    # Each library's process may end with a row that takes longer than expected.
    end = time.monotonic() + options.seconds
    options.into.mkdir(parents=True, exist_ok=True)
    file = options.into / f"records-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl"
    append(file, about(options))
    result, path = {}, file
    for number, library in enumerate(options.only):
        shares = [SHARES[name] for name in options.only[number:]]
        left = max(end - time.monotonic(), 0)
        run_library(library, options.without, left * shares[0] / sum(shares), file)
        result = sorted_out(read(file))
        if result["gpu"]:
            # Partial runs do not overwrite complete ones.
            part = options.only if len(options.only) < len(LIBRARIES) else []
            name = "-".join([short_name(result["gpu"]), result["date"][:10], *part])
            path = options.into / f"{name}.json"
            write_json(path, result)
    if result["gpu"] is None:
        file.unlink()
        reasons = "; ".join([*notes(result["others"]), *result["failures"]])
        return f"there is no GPU here for any of the libraries: nothing is measured ({reasons})"
    return result, path


FIGURES = {
    "rows", "copies", "checks", "others", "failures", "gpu", "driver", "commit", "dirty", "date",
    "versions",
}  # fmt: skip


def recorded(path: Path) -> dict[str, Any]:
    """The figures in a file; a ValueError says why there are none."""
    try:
        if path.suffix == ".jsonl":
            result = sorted_out(read(path))
        else:
            result = json.loads(path.read_text())
        missing = FIGURES - set(result)
    except OSError as error:
        raise ValueError(error.strerror) from error
    except (ValueError, LookupError, TypeError):
        missing = FIGURES
    if missing:
        raise ValueError("the file has neither figures nor records of gpu.py")
    return result


def show(result: dict[str, Any]) -> None:
    """Print what is missing and what is wrong, then the table and its summary."""
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
        "medians in microseconds; floors: the time to copy as many bytes as one read of x and our "
        "launches move; shares of the latter, and peers' times over ours; torch and cupy by CUDA "
        "graphs, jax by a dispatch loop"
    )
    print_table(title, HEADER, table(rows))
    print_table("in short", SUMMARY_HEADER, summary(rows))


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
    parser.add_argument("--seconds", type=int, default=180, metavar="N", help="default 180")
    parser.add_argument(
        "--only", type=libraries, default=list(LIBRARIES), metavar="NAMES",
        help="libraries to measure, such as torch,jax",
    )  # fmt: skip
    parser.add_argument(
        "--without", type=lambda text: text.split(","), default=[], metavar="NAMES",
        help="contenders to leave out, such as compile, which is half of torch's time",
    )  # fmt: skip
    parser.add_argument(
        "--into", type=Path, metavar="DIR",
        help=f"for the files; default {RESULTS}, with --from-json none: nothing is written",
    )  # fmt: skip
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE",
        help="show these figures, draw them to --into DIR if it is given, and measure nothing",
    )  # fmt: skip
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.child:
        return child(json.loads(options.child))
    if path := options.from_json:
        try:
            result = recorded(path)
        except ValueError as error:
            print(f"gpu.py: --from-json {path}: {error}", file=sys.stderr)
            return 2
        if options.into:
            options.into.mkdir(parents=True, exist_ok=True)
            draw(result, options.into / f"{path.stem}.png")
    else:
        options.into = options.into or RESULTS
        found = measure(options)
        if isinstance(found, str):
            print(f"gpu.py: {found}.", file=sys.stderr)
            return 2
        result, path = found
        draw(result, path.with_suffix(".png"))
    show(result)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
