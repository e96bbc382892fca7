"""Compare every engine's results on four shards with the whole array's and naive pooling.

A float32 array (2, 11, 8) in 4 groups is split along axis 1 into 5, 2, 3 and 1 (or 4, 0, 3 and 2),
masked or not, with an offset or not. Every engine computes forward and backward on its shards; a
float64 computation on the whole array is the reference. The naive scheme averages local means and
local mean squares, unweighted, as is usual. The exit status is 1 when one of our rows misses the
contract: forward max |error| / max(1, |value|) <= 5e-6; gradients relative to their largest value
<= 2e-6 (dx and dscale 1e-4 with an offset up to 1000; nothing is promised beyond).

    python benchmarks/distributed.py [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Four devices of one CPU, for JAX; read once, when it starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import _shard_engines as engines
import numpy as np
from _report import print_table, versions, write_json

from tests.sharding import Case, data

FORWARD = 5e-6
GRADIENT, GRADIENT_FAR = 2e-6, 1e-4
NAIVE = "naive: unweighted local means"
PACKAGES = ("groupnorm", "numpy", "jax", "torch", "dask", "mpi4py", "mpich")


def in_processes(engine: str) -> Callable[[], dict[str, engines.Arrays]]:
    def run():
        with tempfile.TemporaryDirectory() as folder:
            return engines.run_processes(engine, Path(folder) / engine)

    return run


def in_one_process(compute: Callable[[Case], engines.Arrays]):
    def run():
        return {case.name: found for case in engines.CASES if (found := compute(case))}

    return run


ROWS = {
    "JAX, shard_map on 4 devices": in_one_process(engines.jax_shard_map),
    "JAX, shard_map, check_vma=False": in_one_process(engines.jax_unchecked),
    "PyTorch, 4 gloo processes": in_processes("torch"),
    "PyTorch DTensor, 4 gloo processes": in_processes("dtensor"),
    "NumPy, mpiexec -n 4": in_processes("mpi"),
    "Dask, 4 chunks": in_one_process(engines.dask_chunks),
    "NumPy, tiles by values": in_one_process(engines.numpy_by_parts),
    "JAX, tiles by values": in_one_process(engines.jax_by_parts),
    "PyTorch, tiles by values": in_one_process(engines.torch_by_parts),
    NAIVE: in_one_process(engines.naive),
}


def forward_error(got: np.ndarray, want: np.ndarray) -> float:
    return worst(np.abs(got - want) / np.maximum(1, np.abs(want)))


def gradient_error(got: np.ndarray, want: np.ndarray) -> float:
    return worst(np.abs(got - want)) / np.abs(want).max()


def worst(errors: np.ndarray) -> float:
    """The largest; inf if there is a NaN."""
    return float(np.nan_to_num(errors, nan=np.inf).max())


def errors_of(case: Case, found: engines.Arrays) -> dict[str, float]:
    truth = data(case)
    wanted = {
        "y": truth.y,
        "dx": truth.gradients.x,
        "dscale": truth.gradients.scale,
        "dbias": truth.gradients.bias,
    }
    return {
        k: (forward_error if k == "y" else gradient_error)(v.astype(float), wanted[k])
        for k, v in found.items()
    }


def bound_of(case: Case, quantity: str) -> float:
    if quantity == "y":
        return FORWARD
    if quantity == "dbias" or case.offset == 0:
        return GRADIENT
    return GRADIENT_FAR if case.offset <= 1e3 else np.inf


def cell(error: float | None, bound: float) -> str:
    if error is None:
        return "-"
    text = "NaN" if np.isinf(error) else f"{error:.1e}"
    return text + ("!" if error > bound else "")


def report(quantity: str, table: dict[str, dict[str, dict[str, float]]]) -> None:
    measure = "max |error| / max(1, |value|)" if quantity == "y" else "relative error"
    rows = []
    for name, row in table.items():
        errors = [row.get(case.name, {}).get(quantity) for case in engines.CASES]
        if any(error is not None for error in errors):
            bounds = [bound_of(case, quantity) for case in engines.CASES]
            rows.append([name, *map(cell, errors, bounds)])
    print_table(f"{quantity}: {measure}", ["engine", *(c.name for c in engines.CASES)], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, run in ROWS.items():
        found = run()
        cases = [case for case in engines.CASES if case.name in found]
        table[name] = {case.name: errors_of(case, found[case.name]) for case in cases}
    installed = versions(*PACKAGES)
    print(", ".join(f"{name} {version}" for name, version in installed.items()))
    print("! is above the contract's bound; - is not computed by that engine")
    for quantity in engines.KEYS:
        report(quantity, table)
    cells = [
        (error, bound_of(case, quantity))
        for name, row in table.items()
        if name != NAIVE
        for case in engines.CASES
        for quantity, error in row.get(case.name, {}).items()
    ]
    missed = sum(error > bound for error, bound in cells)
    print(f"ours: {len(cells) - missed} of {len(cells)} cells within the contract")
    write_json(
        options.json, {"versions": installed, "bound": FORWARD, "errors": _without_infinity(table)}
    )
    return 1 if missed or not cells else 0


def _without_infinity(value):
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {k: _without_infinity(v) for k, v in value.items()}
    return None if np.isinf(value) else value


if __name__ == "__main__":
    sys.exit(main())
