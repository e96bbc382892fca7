"""Accuracy of every backend and of its peers, as one table.

Every implementation normalizes the same float32 arrays; a float64 computation of those same
float32 values is the reference. A cell is max |error| / max(1, |reference|). The library's contract
is 5e-6 in every cell; the exit status is 1 if one of its own rows exceeds that.

Run in an environment with the library and the peers installed; missing ones are listed and left
out::

    python benchmarks/accuracy.py [--json FILE]

The figures of the documentation are drawn from a committed FILE, see _doc_figures.py.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _report import machine, print_table, versions, write_json

BOUND = 5e-6
SHAPE = (2, 16, 16, 64)
GROUPS = 8
CHANNELS = SHAPE[-1]
EPSILON = 1e-6
FIRST, LAST, MEMORY = "channels first", "channels last", "channels_last memory"
SEED = 20240607
PACKAGES = (
    *("groupnorm", "numpy", "jax", "torch", "array-api-strict"),
    *("flax", "equinox", "brainstate", "dm-haiku", "keras"),
)
KERAS_BACKENDS = ("torch", "jax", "numpy")

Array = np.ndarray
Norm = Callable[[Array], Array]
"""From a float32 array (N, H, W, C) to its normalized values in the same layout."""


@dataclass
class Row:
    """One implementation: its error per case, or why there are none.

    `skipped` names what is not installed; `raised` is the exception of a working installation.
    """

    name: str
    ours: bool
    errors: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None
    raised: str | None = None

    @property
    def meets(self) -> bool:
        return bool(self.errors) and all(error <= BOUND for error in self.errors.values())


def make_cases() -> dict[str, Array]:
    """The inputs, float32 (N, H, W, C), by name."""
    rng = np.random.default_rng(SEED)
    noise = rng.standard_normal(SHAPE)
    positions = SHAPE[1] * SHAPE[2]
    cases = {
        label: noise + offset
        for label, offset in {
            "0": 0.0, "1": 1.0, "100": 1e2, "1e3": 1e3, "1e4": 1e4, "1e5": 1e5
        }.items()
    }  # fmt: skip
    spike = noise.copy()
    spike[:, 0, 0, :] = 1e3  # where a pivot from one element or one position would be
    cases["spike"] = spike
    cases["ramp"] = noise + np.linspace(0.0, 1e4, positions).reshape(1, *SHAPE[1:3], 1)
    cases["sorted"] = np.sort(noise.reshape(SHAPE[0], positions, CHANNELS), axis=1).reshape(SHAPE)
    cases["lognormal"] = np.exp(2.0 * noise)
    cases["±1e5"] = noise + np.where(np.arange(CHANNELS) % 2, 1e5, -1e5)
    return {name: case.astype(np.float32) for name, case in cases.items()}


def truth(x: Array) -> Array:
    """Group normalization of `x` in float64, one group of one sample at a time."""
    y = np.empty(x.shape, np.float64)
    width = CHANNELS // GROUPS
    for sample in range(x.shape[0]):
        for first in range(0, CHANNELS, width):
            group = x[sample, :, :, first : first + width].astype(np.float64)
            centred = group - group.mean()
            y[sample, :, :, first : first + width] = centred / np.sqrt(
                np.mean(centred**2) + EPSILON
            )
    return y


def largest_error(norm: Norm, x: Array, expected: Array) -> float:
    """Max |error| / max(1, |expected|); infinity if the result has a NaN."""
    error = np.abs(norm(x).astype(np.float64) - expected) / np.maximum(1.0, np.abs(expected))
    return float(np.max(np.where(np.isnan(error), np.inf, error)))


# ---- ours ---------------------------------------------------------------------------------------


def our_layer(backend: str, layout: str, fast: bool):
    """The library's layer for one backend, layout and variance mode."""
    from groupnorm import GroupNorm

    height, width = SHAPE[1:3]
    last = layout == LAST
    return GroupNorm(
        (height, width, CHANNELS) if last else (CHANNELS, height, width),
        feature_axis=-1 if last else 0,
        num_groups=GROUPS,
        epsilon=EPSILON,
        use_fast_variance=fast,
        backend=backend,
    )


def in_layout(layout: str, norm: Norm) -> Norm:
    """`norm` written for one layout, as a function of channels-last arrays."""
    if layout == LAST:
        return norm
    return lambda x: norm(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).transpose(0, 2, 3, 1)


def ours_numpy(layout: str, fast: bool) -> Norm:
    return in_layout(layout, our_layer("numpy", layout, fast))


def ours_strict(layout: str, fast: bool) -> Norm:
    import array_api_strict

    layer = our_layer("numpy", layout, fast)
    return in_layout(layout, lambda x: np.asarray(layer(array_api_strict.asarray(x))))


def ours_jax(layout: str, fast: bool) -> Norm:
    import jax.numpy as jnp

    layer = our_layer("jax", layout, fast)
    return in_layout(layout, lambda x: np.asarray(layer(jnp.asarray(x))))


def ours_jax_jit(layout: str, fast: bool) -> Norm:
    import jax

    layer = our_layer("jax", layout, fast)
    call = jax.jit(lambda layer, x: layer(x))
    return in_layout(layout, lambda x: np.asarray(call(layer, x)))


def ours_torch(layout: str, fast: bool) -> Norm:
    return through_torch(layout, our_layer("torch", layout, fast))


def ours_torch_compiled(layout: str, fast: bool) -> Norm:
    import torch

    torch.compiler.reset()  # one layer's graphs must not fill the cache of the next one
    return through_torch(layout, torch.compile(our_layer("torch", layout, fast), fullgraph=True))


def through_torch(layout: str, layer: Callable) -> Norm:
    """A torch layer of one layout as a function of NumPy arrays."""
    import torch

    if layout == MEMORY:
        # A transposed view of a contiguous (N, H, W, C) array is exactly that format.
        return lambda x: (
            layer(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().permute(0, 2, 3, 1).numpy()
        )
    return in_layout(layout, lambda x: layer(torch.from_numpy(x)).detach().numpy())


def our_rows() -> Iterator[tuple[str, Callable[[], Norm]]]:
    """Label and maker of each of the library's rows."""
    makers = {
        "numpy": (ours_numpy, (FIRST, LAST)),
        "jax eager": (ours_jax, (FIRST, LAST)),
        "jax jit": (ours_jax_jit, (FIRST, LAST)),
        "torch eager": (ours_torch, (FIRST, LAST, MEMORY)),
        "torch.compile": (ours_torch_compiled, (FIRST, LAST, MEMORY)),
        "array-api-strict": (ours_strict, (FIRST, LAST)),
    }
    for name, (maker, layouts) in makers.items():
        for layout, fast in itertools.product(layouts, (True, False)):
            label = f"ours, {name}, {layout}, {'fast' if fast else 'two-pass'}"
            yield label, functools.partial(maker, layout, fast)


# ---- peers --------------------------------------------------------------------------------------


def torch_functional(layout: str) -> Norm:
    import torch

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.group_norm(x, GROUPS, eps=EPSILON)

    return through_torch(layout, norm)


def flax_linen(fast: bool) -> Norm:
    import jax
    from flax import linen

    layer = linen.GroupNorm(num_groups=GROUPS, epsilon=EPSILON, use_fast_variance=fast)
    parameters = layer.init(jax.random.key(0), np.zeros(SHAPE, np.float32))
    call = jax.jit(layer.apply)
    return lambda x: np.asarray(call(parameters, x))


def flax_nnx(fast: bool) -> Norm:
    import jax
    from flax import nnx

    layer = nnx.GroupNorm(
        CHANNELS, num_groups=GROUPS, epsilon=EPSILON, use_fast_variance=fast, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(layer)
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return lambda x: np.asarray(call(state, x))


def equinox() -> Norm:
    import equinox as eqx
    import jax

    layer = eqx.nn.GroupNorm(GROUPS, CHANNELS, eps=EPSILON)
    call = jax.jit(jax.vmap(layer))  # equinox layers take one sample
    return in_layout(FIRST, lambda x: np.asarray(call(x)))


def brainstate(fast: bool) -> Norm:
    import brainstate as bst

    # A complete in_size, (H, W, C), raises: "only supports 1D feature axis".
    layer = bst.nn.GroupNorm(CHANNELS, num_groups=GROUPS, epsilon=EPSILON, use_fast_variance=fast)
    return lambda x: np.asarray(layer(x))


def haiku() -> Norm:
    import haiku as hk
    import jax

    network = hk.without_apply_rng(hk.transform(lambda x: hk.GroupNorm(GROUPS, eps=EPSILON)(x)))
    parameters = network.init(jax.random.key(0), np.zeros(SHAPE, np.float32))
    call = jax.jit(network.apply)
    return lambda x: np.asarray(call(parameters, x))


def keras_layer() -> Norm:
    import keras

    layer = keras.layers.GroupNormalization(GROUPS, axis=-1, epsilon=EPSILON)
    return lambda x: keras.ops.convert_to_numpy(layer(x))


def peer_rows() -> Iterator[tuple[str, Callable[[], Norm]]]:
    """Label and maker of each peer's row, all with the same epsilon."""
    for layout in (FIRST, MEMORY):
        yield f"torch F.group_norm, {layout}", functools.partial(torch_functional, layout)
    for name, maker in {"flax linen": flax_linen, "flax nnx": flax_nnx}.items():
        yield f"{name}, jit, fast (default)", functools.partial(maker, True)
        yield f"{name}, jit, two-pass", functools.partial(maker, False)
    yield "equinox, jit", equinox
    yield "brainstate, fast (default)", functools.partial(brainstate, True)
    yield "brainstate, two-pass", functools.partial(brainstate, False)
    yield "haiku, jit", haiku


# ---- running ------------------------------------------------------------------------------------


def measure(name: str, ours: bool, make: Callable[[], Norm]) -> Row:
    """Run all cases with one implementation; without its library the row is skipped."""
    try:
        return Row(name, ours, errors_of(make()))
    except ImportError as error:
        return Row(name, ours, skipped=f"not installed: {error.name or error}")
    except Exception as error:  # one broken row must not hide the others
        return Row(name, ours, raised=f"{type(error).__name__}: {error}".partition("\n")[0])


def errors_of(norm: Norm) -> dict[str, float]:
    """The error of each case."""
    return {case: largest_error(norm, x, truth(x)) for case, x in make_cases().items()}


def measure_keras(backend: str) -> Row:
    """Keras fixes its backend at import, so each one gets a separate process."""
    name = f"keras, {backend} backend"
    child = subprocess.run(
        [sys.executable, __file__, "--keras-child"],
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        return Row(name, False, raised=lines[-1] if lines else f"exit {child.returncode}")
    return Row(name, False, json.loads(child.stdout.splitlines()[-1]))


def keras_child() -> None:
    """Run in the Keras process: print its errors as the last line of its output."""
    with redirect_stderr(io.StringIO()):
        norm = keras_layer()
    print(json.dumps(errors_of(norm)))


def measure_all() -> Iterator[Row]:
    for name, make in our_rows():
        yield measure(name, True, make)
    for name, make in peer_rows():
        yield measure(name, False, make)
    for backend in KERAS_BACKENDS:
        yield measure_keras(backend)


# ---- reporting ----------------------------------------------------------------------------------


def show_cell(error: float) -> str:
    """Two digits, and a mark if the contract is violated."""
    text = "NaN" if np.isinf(error) else f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return text + ("!" if error > BOUND else " ")


def show_row(row: Row, cases: list[str]) -> list[str]:
    if not row.errors:
        return [row.name, *["-"] * len(cases), "skipped" if row.skipped else "RAISED"]
    verdict = "yes" if row.meets else ("NO: BUG" if row.ours else "no")
    return [row.name, *(show_cell(row.errors[case]) for case in cases), verdict]


def row_style(row: Row) -> str:
    if row.skipped:
        return "dim"
    if row.ours:
        return "green" if row.meets else "bold red"
    return "" if row.meets else "yellow"


def as_dict(row: Row) -> dict[str, Any]:
    """The row in JSON types, with null for NaN."""
    errors = {case: None if np.isinf(error) else error for case, error in row.errors.items()}
    return {"name": row.name, "ours": row.ours, "errors": errors, "meets": row.meets,
            "skipped": row.skipped, "raised": row.raised}  # fmt: skip


def report(rows: list[Row], found: dict[str, str]) -> None:
    cases = list(make_cases())
    print(", ".join(f"{name} {version}" for name, version in found.items()))
    print(
        f"float32 {SHAPE} in {GROUPS} groups, epsilon {EPSILON:g}; columns 0 ... 1e5: N(0,1) plus "
        f"that offset\nmax |error| / max(1, |float64 value|); ! is above the contract's {BOUND:g}"
    )
    print_table(
        "Accuracy of group normalization",
        ["implementation", *cases, "meets 5e-6"],
        [show_row(row, cases) for row in rows],
        [row_style(row) for row in rows],
    )
    for row in rows:
        if not row.errors:
            print(f"{row.name}: {row.skipped or row.raised}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--keras-child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.keras_child:
        keras_child()
        return 0

    rows = []
    for row in measure_all():
        rows.append(row)
        if sys.stderr.isatty():
            print(f"\r{len(rows)}: {row.name:<60}\r", end="", file=sys.stderr, flush=True)
    found = versions(*PACKAGES)
    report(rows, found)
    write_json(options.json, {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "bound": BOUND, "shape": SHAPE, "groups": GROUPS, "epsilon": EPSILON, "versions": found,
        "rows": [as_dict(row) for row in rows],
    })  # fmt: skip

    ours = [row for row in rows if row.ours and not row.skipped]
    failed = [row.name for row in ours if not row.meets]
    worst = max((error for row in ours for error in row.errors.values()), default=float("nan"))
    print(
        f"ours: {len(ours) - len(failed)} of {len(ours)} rows within {BOUND:g}, worst {worst:.1e}"
    )
    return 1 if failed or not ours else 0


if __name__ == "__main__":
    sys.exit(main())
