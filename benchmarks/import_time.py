"""Time of `import groupnorm` next to that of importing its two dependencies alone.

Fresh processes in turns, timed inside the process from before to after the import, so that the
interpreter's startup does not dilute the ratio. The exit status is 1 if the ratio of medians is
1.3 or more, or if `import groupnorm` loads one of the heavy libraries::

    python benchmarks/import_time.py [--pairs N] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path

from _report import print_table, processes_in_turns, summary, usable_cpus, versions, write_json

BOUND = 1.3
HEAVY = ("jax", "jaxlib", "torch", "cupy", "flax", "triton", "rich", "scipy")
STATEMENTS = {
    "import numpy, array_api_compat": "import numpy, array_api_compat",
    "import groupnorm": "import groupnorm",
}
CHILD = """
import time
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
import json, sys
print(json.dumps([1e3 * seconds, [name for name in {heavy!r} if name in sys.modules]]))
"""


def import_once(statement: str) -> tuple[float, list[str]]:
    """Milliseconds of `statement` in a fresh process, and the heavy modules it loaded."""
    code = CHILD.format(statement=statement, heavy=HEAVY)
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    milliseconds, loaded = json.loads(child.stdout)
    return milliseconds, loaded


def measure(pairs: int) -> tuple[dict[str, list[float]], list[str]]:
    """Times of each statement over `pairs` turns, and the heavy modules of the library."""
    loaded: set[str] = set()

    def measure_import(name: str) -> float:
        milliseconds, heavy = import_once(STATEMENTS[name])
        if name == "import groupnorm":
            loaded.update(heavy)
        return milliseconds

    processes = {name: functools.partial(measure_import, name) for name in STATEMENTS}
    times = processes_in_turns(processes, pairs)
    return times, sorted(loaded)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="pairs of processes (default 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()

    times, heavy = measure(options.pairs)
    figures = {name: summary(values) for name, values in times.items()}
    base, ours = figures.values()
    ratios = {key: ours[f"{key}_ms"] / base[f"{key}_ms"] for key in ("min", "median")}
    found = versions("groupnorm", "numpy", "array-api-compat")
    print(", ".join(f"{name} {version}" for name, version in found.items()))
    print_table(
        f"Import in {options.pairs} interleaved pairs of processes, {usable_cpus()} usable CPUs",
        ["statement", "min ms", "median ms"],
        [[name, f"{f['min_ms']:.1f}", f"{f['median_ms']:.1f}"] for name, f in figures.items()],
    )
    fast = ratios["median"] < BOUND
    print(
        f"ratio: {ratios['median']:.2f}x by medians, {ratios['min']:.2f}x by minima; "
        f"bound < {BOUND}x: {'met' if fast else 'NOT MET'}"
    )
    print(f"heavy modules loaded by import groupnorm: {', '.join(heavy) or 'none'}")
    write_json(options.json, {
        "pairs": options.pairs, "times": figures, "ratios": ratios, "bound": BOUND,
        "heavy": heavy, "versions": found,
    })  # fmt: skip
    return 0 if fast and not heavy else 1


if __name__ == "__main__":
    sys.exit(main())
