"""Time of the first forward and backward pass in a fresh process, by library and layout.

The process first imports the library and computes something else with it, so that only what this
package adds is timed: importing it, planning, loading the kernels, and one pass of each direction.
Under JAX, which compiles every function when it is first called, the textbook formula, in a process
of its own, is the measure of what JAX itself takes. There is no bound to meet; the exit status is 1
only if a process fails::

    python benchmarks/first_call.py [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from _report import print_table, processes_in_turns, summary, usable_cpus, versions, write_json

LAYOUTS = {"channels-first": ((8, 64, 28, 28), 1), "channels-last": ((8, 28, 28, 64), -1)}

# Programs that JAX has stored would not be compiled.
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}
ENVIRONMENT.pop("JAX_COMPILATION_CACHE_DIR", None)

# What a process runs before the clock starts, and while it runs: {shape} and {axis} are filled in.
SETUP = """
import time
import numpy as np
x = np.random.default_rng(0).random({shape}, np.float32)
"""
NUMPY = (
    "x * x",
    """
import groupnorm
y, pullback = groupnorm.group_norm_vjp(x, num_groups=32, feature_axis={axis})
pullback(x)
""",
)
TORCH = (
    """
import torch
x = torch.from_numpy(x).requires_grad_()
torch.nn.functional.silu(x).backward(x.detach())
""",
    """
import groupnorm
y = groupnorm.group_norm(x, num_groups=32, feature_axis={axis})
y.backward(x.detach())
""",
)
JAX = """
import jax, jax.numpy as jnp
x = jnp.asarray(x)
jax.jit(jax.grad(lambda x: jax.nn.silu(x).sum()))(x).block_until_ready()
"""
OURS_IN_JAX = """
import groupnorm
jax.jit(jax.grad(lambda x: (
    groupnorm.group_norm(x, num_groups=32, feature_axis={axis}) * x).sum()
))(x).block_until_ready()
"""
TEXTBOOK_IN_JAX = """
def textbook(x):
    axis = {axis} % x.ndim
    grouped = x.reshape(*x.shape[:axis], 32, -1, *x.shape[axis + 1:])
    axes = tuple(a for a in range(1, grouped.ndim) if a != axis)
    mean, variance = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
    return ((grouped - mean) * jax.lax.rsqrt(variance + 1e-6)).reshape(x.shape)
jax.jit(jax.grad(lambda x: (textbook(x) * x).sum()))(x).block_until_ready()
"""
CONTENDERS = {
    "NumPy": ("numpy", *NUMPY),
    "PyTorch": ("torch", *TORCH),
    "JAX": ("jax", JAX, OURS_IN_JAX),
    "JAX, textbook formula": ("jax", JAX, TEXTBOOK_IN_JAX),
}


def first_call(before: str, timed: str, layout: str) -> float:
    """Milliseconds of `timed` in a fresh process that has run `before`."""
    shape, axis = LAYOUTS[layout]
    code = (
        SETUP.format(shape=shape) + before + "\nstart = time.perf_counter()"
        + timed.format(axis=axis) + "\nprint(1e3 * (time.perf_counter() - start))"
    )  # fmt: skip
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    return float(child.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="processes of each kind (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()

    processes = {
        f"{name}, {layout}": functools.partial(first_call, before, timed, layout)
        for name, (library, before, timed) in CONTENDERS.items()
        if importlib.util.find_spec(library)
        for layout in LAYOUTS
    }
    times = processes_in_turns(processes, options.rounds)
    figures = {name: summary(values) for name, values in times.items()}
    found = versions("groupnorm", "numpy", "torch", "jax")
    print(", ".join(f"{name} {version}" for name, version in found.items()))
    print_table(
        f"First forward and backward pass, ours with the import, {options.rounds} processes each, "
        f"{usable_cpus()} usable CPUs",
        ["library and layout", "min ms", "median ms"],
        [[name, f"{f['min_ms']:.1f}", f"{f['median_ms']:.1f}"] for name, f in figures.items()],
    )
    write_json(options.json, {"rounds": options.rounds, "times": figures, "versions": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
