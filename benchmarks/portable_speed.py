"""Speed of the portable implementation, without any fused kernel, next to its peers in one run.

Float32, channels last, (8, 56, 56, 64) in 32 groups, forward pass of a layer with scale and bias.
The contenders of a library alternate call by call, so that both see the same machine load. Aims:
JAX (jit) at least 3x faster than flax nnx, NumPy at least 8x faster than the textbook version.
PyTorch is shown for information. Times never cause a failure: a busy machine is not a bug::

    python benchmarks/portable_speed.py [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _report import interleaved, print_table, summary, usable_cpus, versions, write_json

SHAPE = (8, 56, 56, 64)
GROUPS = 32
CHANNELS = SHAPE[-1]
EPSILON = 1e-6
SEED = 20240607

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contest:
    """The library's layer against the peers that run in the same framework."""

    title: str
    threads: str
    peer: str
    calls: dict[str, Call]
    aim: float | None = None


def our_layer(backend: str):
    from groupnorm import GroupNorm

    return GroupNorm(
        SHAPE[1:], num_groups=GROUPS, epsilon=EPSILON, backend=backend, implementation="portable"
    )


def textbook(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Textbook group normalization."""
    n, h, w, c = x.shape
    grouped = x.reshape(n, h, w, GROUPS, c // GROUPS)
    mean = grouped.mean(axis=(1, 2, 4), keepdims=True)
    variance = grouped.var(axis=(1, 2, 4), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + EPSILON)).reshape(x.shape) * scale + bias


def numpy_contest(x: np.ndarray) -> Contest:
    layer = our_layer("numpy")
    scale, bias = np.ones(CHANNELS, np.float32), np.zeros(CHANNELS, np.float32)
    calls = {"ours": lambda: layer(x), "textbook mean/var": lambda: textbook(x, scale, bias)}
    return Contest("NumPy", "1 thread", "textbook mean/var", calls, aim=8.0)


def jax_contest(x: np.ndarray) -> Contest:
    import jax
    from flax import nnx

    inputs = jax.block_until_ready(jax.numpy.asarray(x))
    ours = our_layer("jax")
    graph, state = nnx.split(
        nnx.GroupNorm(CHANNELS, num_groups=GROUPS, epsilon=EPSILON, rngs=nnx.Rngs(0))
    )
    # For both the parameters are arguments: as constants XLA could fold them away.
    call_ours = jax.jit(lambda layer, x: layer(x))
    call_flax = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    calls = {
        "ours": lambda: call_ours(ours, inputs).block_until_ready(),
        "flax nnx.GroupNorm": lambda: call_flax(state, inputs).block_until_ready(),
    }
    threads = f"XLA's pool, {usable_cpus()} CPUs"
    return Contest("JAX, jit", threads, "flax nnx.GroupNorm", calls, aim=3.0)


def torch_contest(x: np.ndarray) -> Contest:
    import torch

    inputs = torch.from_numpy(x)
    channels_last = inputs.permute(0, 3, 1, 2)  # torch's channels_last memory format, no copy
    channels_first = channels_last.contiguous()
    ours = our_layer("torch")
    weight, bias = torch.ones(CHANNELS), torch.zeros(CHANNELS)

    def functional(tensor):
        return torch.nn.functional.group_norm(tensor, GROUPS, weight, bias, EPSILON)

    peers = {
        "F.group_norm, channels_last": lambda: functional(channels_last),
        "F.group_norm, contiguous NCHW": lambda: functional(channels_first),
    }
    calls = {"ours": lambda: ours(inputs), **peers}
    calls = {name: torch.inference_mode()(call) for name, call in calls.items()}
    threads = f"{torch.get_num_threads()} threads"
    return Contest("PyTorch, eager", threads, "F.group_norm, channels_last", calls)


def run(contest: Contest, rounds: int) -> dict[str, Any]:
    """Time one contest, print its table, and return its figures."""
    times = interleaved(contest.calls, rounds)
    figures = {name: summary(values) for name, values in times.items()}
    ours, peer = figures["ours"], figures[contest.peer]
    ratios = {key: peer[f"{key}_ms"] / ours[f"{key}_ms"] for key in ("min", "median")}
    rows = [
        [
            name,
            *(f"{figure[key]:.2f}" for key in ("min_ms", "median_ms")),
            *(f"{figure[key] / ours[key]:.2f}x" for key in ("min_ms", "median_ms")),
        ]
        for name, figure in figures.items()
    ]
    print_table(
        f"{contest.title} ({contest.threads})",
        ["forward", "min ms", "median ms", "min / ours", "median / ours"],
        rows,
    )
    print(verdict(contest, ratios), end="\n\n")
    return {"threads": contest.threads, "times": figures, "peer": contest.peer,
            "peer_over_ours": ratios, "aim": contest.aim}  # fmt: skip


def verdict(contest: Contest, ratios: dict[str, float]) -> str:
    """One line: the speedup, and whether the aim is met."""
    line = (
        f"{contest.title}: {ratios['median']:.1f}x faster than {contest.peer} by medians, "
        f"{ratios['min']:.1f}x by minima"
    )
    if contest.aim is None:
        return f"{line} (for information)"
    met = min(ratios.values()) >= contest.aim
    return f"{line}; aim >= {contest.aim:g}x: {'met' if met else 'NOT MET'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50, help="turns per contest (default 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()

    found = versions("groupnorm", "numpy", "jax", "flax", "torch")
    print(", ".join(f"{name} {version}" for name, version in found.items()))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"float32 {SHAPE}, {GROUPS} groups; {options.rounds} interleaved rounds; "
        f"{usable_cpus()} usable CPUs, load {load:.1f} before the start\n"
    )
    x = np.random.default_rng(SEED).standard_normal(SHAPE, dtype=np.float32)
    results = {}
    for make in (jax_contest, numpy_contest, torch_contest):
        try:
            contest = make(x)
        except ImportError as error:
            print(f"skipped: {make.__name__}: not installed: {error.name or error}\n")
            continue
        results[contest.title] = run(contest, options.rounds)
    write_json(options.json, {
        "shape": SHAPE, "groups": GROUPS, "rounds": options.rounds, "cpus": usable_cpus(),
        "versions": found, "contests": results,
    })  # fmt: skip


if __name__ == "__main__":
    main()
