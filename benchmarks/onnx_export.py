"""Group norms in onnxruntime beside PyTorch's export: errors at offsets, nodes and times.

Each model normalizes the same float32 arrays N(offset, 1), with scale 1 and bias 0; a float64
computation of these float32 values is the reference, and an error is |error| / max(1, |reference|).
The exit status is 1 if one of this library is above 1e-6. Times are those of interleaved calls; the
last two columns are ratios to the official operator, GroupNormalization of opset 21. By default
onnxruntime uses one thread, since its threads wait for each other on a busy machine::

    python benchmarks/onnx_export.py [--seconds S] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from _report import in_turns, machine, print_table, summary, versions, write_json

from groupnorm import GroupNorm
from groupnorm.onnx import translation_table
from groupnorm.testing import oracle

BOUND = 1e-6
OFFSETS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e5)
SHAPES = {
    (1, 32, 8, 8): 8,
    (2, 64, 32, 32): 32,
    (8, 256, 32, 32): 32,
    (1, 320, 64, 64): 32,
    (1, 512, 128, 128): 32,
}
EPSILON = 1e-5
OFFICIAL = "PyTorch, opset 21"
OURS = ("groupnorm: to_onnx", "groupnorm: table, opset 18", "groupnorm: table, opset 21")
SEED = 20261127


def exported(module: torch.nn.Module, channels: int, opset: int, table: Any = None) -> Any:
    """PyTorch's export of a module, for any batch, height and width."""
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return torch.onnx.export(
        module.eval(), (torch.zeros(2, channels, 5, 6),), dynamo=True, verbose=False,
        opset_version=opset, input_names=["x"], dynamic_shapes=(sizes,),
        custom_translation_table=table,
    ).model_proto  # fmt: skip


def models(channels: int, groups: int) -> dict[str, Any]:
    """The models to compare, by the names of their rows."""
    theirs = torch.nn.GroupNorm(groups, channels, eps=EPSILON)
    options = {"feature_axis": 0, "num_groups": groups, "epsilon": EPSILON}
    layer = GroupNorm((channels, ...), **options)
    table = translation_table()
    names = iter(OURS)
    return {
        next(names): layer.to_onnx(None, ("N", channels, "H", "W")),
        next(names): exported(theirs, channels, 18, table),
        next(names): exported(theirs, channels, 21, table),
        "groupnorm: without the table": exported(layer.to_backend("torch"), channels, 18),
        "PyTorch, opset 18": exported(theirs, channels, 18),
        OFFICIAL: exported(theirs, channels, 21),
    }


def runner(model: Any, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The model as a function, computed by onnxruntime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})[0]


def measure(
    shape: tuple[int, ...], groups: int, seconds: float, threads: int
) -> dict[str, dict[str, Any]]:
    """The figures of every model for one shape."""
    made = models(shape[1], groups)
    calls = {name: runner(model, threads) for name, model in made.items()}
    base = np.random.default_rng(SEED).normal(size=shape)
    errors: dict[str, list[float]] = {name: [] for name in made}
    for offset in OFFSETS:
        x = (base + offset).astype(np.float32)
        want = oracle.group_norm(x, num_groups=groups, feature_axis=1, epsilon=EPSILON)
        for name, call in calls.items():
            error = np.abs(call(x) - want) / np.maximum(1, np.abs(want))
            errors[name].append(float(error.max()))
    x = base.astype(np.float32)
    bound = {name: lambda call=call: call(x) for name, call in calls.items()}
    times = in_turns(bound, seconds, rounds=2000)
    return {
        name: {
            "nodes": sum(node.op_type != "Constant" for node in model.graph.node),
            "errors": errors[name],
            **summary(times[name]),
        }
        for name, model in made.items()
    }


def show(shape: tuple[int, ...], groups: int, figures: dict[str, dict[str, Any]]) -> None:
    official = figures[OFFICIAL]
    print_table(
        f"{'x'.join(map(str, shape))}, {groups} groups: largest error by offset, and time",
        ["model", "nodes", *(f"{o:g}" for o in OFFSETS), "min us", "median us", "/", "/"],
        [
            [
                name, str(f["nodes"]), *(f"{e:.1e}" for e in f["errors"]),
                f"{1e3 * f['min_ms']:.0f}", f"{1e3 * f['median_ms']:.0f}",
                *(f"{f[kind] / official[kind]:.2f}" for kind in ("min_ms", "median_ms")),
            ]
            for name, f in figures.items()
        ],
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=20, help="of times, per shape (default 20)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # of PyTorch's exporter, about packages that are not installed
    warnings.simplefilter("ignore")

    packages = ("groupnorm", "numpy", "torch", "onnx", "onnxscript", "onnxruntime")
    found = versions(*packages)
    print(", ".join(f"{name} {version}" for name, version in found.items()))
    results = {}
    for shape, groups in SHAPES.items():
        figures = measure(shape, groups, options.seconds, options.threads)
        show(shape, groups, figures)
        results["x".join(map(str, shape))] = {"groups": groups, "models": figures}
    accurate = all(
        error <= BOUND
        for result in results.values() for name in OURS
        for error in result["models"][name]["errors"]
    )  # fmt: skip
    print(f"errors at most {BOUND:g}: {'met' if accurate else 'NOT MET'}")
    write_json(options.json, {
        "offsets": OFFSETS, "threads": options.threads, "shapes": results, "versions": found,
        "machine": machine(),
    })  # fmt: skip
    return 0 if accurate else 1


if __name__ == "__main__":
    sys.exit(main())
