"""What a library computes on a GPU: calls against float64, and what the tests have not.

Part of gpu_first_run.sh: ``python _gpu_smoke.py torch|cupy|jax``. Every fact is a line of JSON
that is appended to $OUT/facts.jsonl when it is known: a run that hangs or is cut off loses none.
The reference is written from the definition in NumPy and shares no code with the package.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _gpu_cases import CUPY, DRY, EPSILON, JAX, TORCH

BEGUN = time.monotonic()
FACTS = Path(os.environ.get("OUT", ".")) / "facts.jsonl"
LIBRARY = sys.argv[1]
# Rows of groupnorm.testing, which know how arrays get to a device and back.
ROW = {TORCH: "torch:cuda", CUPY: "cupy", JAX: "jax:gpu"}[LIBRARY]
if DRY:
    ROW = {TORCH: "torch", CUPY: "numpy", JAX: "jax"}[LIBRARY]
IMPLEMENTATION = None if DRY and LIBRARY != TORCH else "fused"


def fact(name: str, /, **values: Any) -> None:
    at = round(time.monotonic() - BEGUN, 1)
    with FACTS.open("a") as file:
        record = {"library": LIBRARY, "fact": name, "at": at, **values}
        file.write(json.dumps(record, default=str) + "\n")
    print(f"[{at:6.1f}] {name}: {', '.join(f'{k} {v}' for k, v in values.items())}", flush=True)


def judge(right: bool, name: str, /, **values: Any) -> None:
    fact(("right " if right else "WRONG ") + name, **values)


def attempt(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns; an error is a fact, and what follows is tried all the same."""
    try:
        return function(*arguments)
    except Exception as error:
        fact(f"FAILED {name}", error=f"{type(error).__name__}: {str(error)[:300]}")
        print("\n".join(traceback.format_exc().strip().splitlines()[-14:]), flush=True)
        return None


# ---- against float64 ----------------------------------------------------------------------------


class Check(NamedTuple):
    """One call that is compared."""

    dims: tuple[int, ...]  # (N, C, *spatial), whatever the layout
    groups: int
    layout: str
    dtype: str
    offset: float = 0.0
    masked: bool = False
    activation: str | None = None

    @property
    def name(self) -> str:
        parts = ["x".join(map(str, self.dims)), f"g{self.groups}", self.layout, self.dtype]
        parts += [f"offset {self.offset:g}"] if self.offset else []
        return " ".join([*parts, *(["mask"] if self.masked else []), self.activation or "-"])


# Small groups and large ones, both layouts, odd sizes, many parts of a group (300x300).
CHECKS = [
    Check((4, 64, 16, 16), 8, "first", "float32"),
    Check((4, 64, 16, 16), 8, "last", "float32", activation="silu"),
    Check((2, 64, 96, 80), 4, "first", "float32", activation="silu"),
    Check((2, 64, 96, 80), 4, "last", "float32"),
    Check((1, 32, 300, 300), 2, "first", "float32"),
    Check((1, 32, 300, 300), 2, "last", "float32", activation="silu"),
    Check((3, 30, 7, 9), 3, "first", "float32", 1e3, True),
    Check((3, 30, 7, 9), 3, "last", "float32", 1e3, True, "gelu"),
    Check((2, 64, 96, 80), 4, "first", "float32", 1e5),
    Check((2, 64, 96, 80), 4, "last", "float32", 1e5),
    Check((2, 320, 32, 32), 32, "first", "bfloat16", activation="silu"),
    Check((2, 320, 32, 32), 32, "last", "bfloat16", activation="silu"),
    Check((2, 64, 96, 80), 4, "last", "float16", 0.0, True, "silu"),
]
if DRY:
    CHECKS = [CHECKS[i]._replace(dims=(2, 12, 5, 6), groups=3) for i in (1, 6, 7, 11)]
SPACING = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def dtype_of(name: str) -> Any:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def reference(check: Check, x: Any, dy: Any, scale: Any, bias: Any, mask: Any) -> list[np.ndarray]:
    """Y and the gradients of x, scale and bias in float64; arrays are (N, C, *spatial)."""
    apart = (check.dims[0], check.groups, check.dims[1] // check.groups, -1)
    x, dy = (a.astype(np.float64).reshape(apart) for a in (x, dy))
    scale, bias = (a.astype(np.float64).reshape(1, *apart[1:3], 1) for a in (scale, bias))
    weight = np.broadcast_to(1.0 if mask is None else mask, check.dims).reshape(apart)

    def total(a: np.ndarray) -> np.ndarray:
        return a.sum((2, 3), keepdims=True)

    count = total(weight)
    centred = x - total(x * weight) / count
    std = np.sqrt(total(centred**2 * weight) / count + EPSILON)
    hat = centred / std
    y = hat * scale + bias
    if check.activation == "silu":
        sigmoid = 1 / (1 + np.exp(-y))
        dy, y = dy * sigmoid * (1 + y * (1 - sigmoid)), y * sigmoid
    elif check.activation == "gelu":
        normal = 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        dy = dy * (normal + y * np.exp(-y * y / 2) / math.sqrt(2 * math.pi))
        y = y * normal
    dhat = dy * scale
    # All positions are normalized; only the valid ones contribute to the statistics.
    dx = (dhat - weight * (total(dhat) + hat * total(dhat * hat)) / count) / std
    dscale, dbias = (a.sum((0, 3)).reshape(-1) for a in (dy * hat, dy))
    return [y.reshape(check.dims), dx.reshape(check.dims), dscale, dbias]


def compare(check: Check) -> None:
    """Record the largest errors of one call, and whether its bits repeat."""
    from groupnorm import group_norm_vjp
    from groupnorm.testing import rows

    [row], last = rows(ROW), check.layout == "last"
    rng, dims = np.random.default_rng(), check.dims  # fresh numbers in every run
    mask = rng.random((dims[0], 1, *dims[2:])) < 0.7 if check.masked else None
    x = rng.standard_normal(dims) + check.offset
    others = (rng.standard_normal(shape) for shape in (dims, dims[1:2], dims[1:2]))
    arrays = [a.astype(dtype_of(check.dtype)) for a in (x, *others)]

    def put(a: Any) -> Any:
        a = np.moveaxis(a, 1, -1) if last and a.ndim > 1 else a
        return row.asarray(np.ascontiguousarray(a))

    def back(a: Any) -> np.ndarray:
        a = row.to_numpy(a).astype(np.float32)
        return np.moveaxis(a, -1, 1) if last and a.ndim > 1 else a

    def both(x: Any, dy: Any, scale: Any, bias: Any, mask: Any) -> tuple[Any, ...]:
        y, pullback = group_norm_vjp(
            x, scale, bias, mask=mask, num_groups=check.groups, feature_axis=-1 if last else 1,
            epsilon=EPSILON, activation=check.activation, dtype="input",
            implementation=IMPLEMENTATION,
        )  # fmt: skip
        return (y, *pullback(dy))

    if LIBRARY == JAX:  # which would compile each operation
        both = importlib.import_module("jax").jit(both)
    given = [*map(put, arrays), None if mask is None else put(mask)]
    runs = [[back(a) for a in both(*given)] for _ in range(2)]
    slope = {0.0: 2e-6, 1e3: 1e-4}.get(check.offset, 1e-2)
    errors, right = {}, True
    names = ("y", "dx", "dscale", "dbias")
    for name, ours, true in zip(names, runs[0], reference(check, *arrays, mask), strict=True):
        size = np.maximum(1, abs(true)) if name == "y" else abs(true).max()
        error = float(np.max(abs(ours - true) / size))
        right &= error <= max(5e-6 if name == "y" else slope, SPACING[check.dtype])
        errors[name] = f"{error:.1e}"
    repeats = all(a.tobytes() == b.tobytes() for a, b in zip(*runs, strict=True))
    judge(right and repeats, check.name, **errors, repeats=repeats)


def checks(number: int | None = None) -> None:
    for check in CHECKS[:number]:
        attempt(check.name, compare, check)


# ---- by library ---------------------------------------------------------------------------------


def smoke_torch(engine: Any) -> None:
    import torch

    torch.use_deterministic_algorithms(True)  # then what is not written shows as NaN
    checks()
    torch.use_deterministic_algorithms(False)
    speed = importlib.import_module("_gpu_smoke_torch")
    copied = attempt("copies", speed.copies)
    attempt("host time", speed.host_time)
    for case in speed.CASES:
        attempt(case.name, speed.kernels, case, copied)


def smoke_cupy(engine: Any) -> None:
    from groupnorm import GroupNorm

    cupy = engine.cupy
    if "sanitize" in sys.argv:
        cupy.cuda.set_allocator(None)  # so that whatever is read beyond an array's end is seen
        return checks(6)
    checks()

    def streams() -> None:
        layer = GroupNorm(16, num_groups=8, backend=engine.BACKEND, implementation=IMPLEMENTATION)
        x = cupy.random.standard_normal((4, 30, 30, 16)).astype("float32")
        want = layer(x)
        other = cupy.cuda.Stream(non_blocking=True)
        engine.wait()
        with other:
            y = layer(x)
        other.synchronize()
        judge(bool((y == want).all()), "other stream")
        (_, y), graph, stream = engine.captured(lambda i: layer(x), 1)
        if not DRY:  # where a graph only keeps its first results
            x[...] = x * 3 + 7
        engine.wait()
        graph.launch(stream)
        stream.synchronize()
        judge(bool((y == layer(x)).all()), "CUDA graph")

    return attempt("streams", streams)


def smoke_jax(engine: Any) -> None:
    import jax
    import jax.numpy as jnp

    from groupnorm import group_norm
    from groupnorm.backends.jax import gpu as jax_gpu

    chosen = getattr(jax_gpu.chosen_launcher(), "__name__", None)
    fact("launchers", unavailable=jax_gpu.why_unavailable(), chosen=chosen)

    def tried(name: str) -> None:
        launcher = getattr(jax_gpu, name)
        if not DRY:
            jax_gpu._try(launcher)
        judge(True, f"launcher {name}")

    for name in ("_by_ptx", "_by_jax_triton"):
        attempt(name, tried, name)
    checks()
    x = jax.random.normal(jax.random.key(0), (3, 4, 30, 64))

    def transformed(name: str, transform: Callable[..., Any]) -> None:
        options = {"num_groups": 8, "activation": "silu"}
        ours = transform(lambda x: group_norm(x, implementation=IMPLEMENTATION, **options))(x)
        portable = transform(lambda x: group_norm(x, implementation="portable", **options))
        worst = float(jnp.abs(ours - jax.jit(portable)(x)).max())
        judge(worst < 2e-5, name, worst=f"{worst:.1e}")

    for name, transform in {
        "eager": lambda f: f,
        "vmap": jax.vmap,
        "grad": lambda f: jax.grad(lambda x: (f(x) ** 2).sum()),
        "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    }.items():
        attempt(name, transformed, name, transform)


def main() -> int:
    engine = importlib.import_module(f"_gpu_{LIBRARY}")
    version = importlib.import_module(LIBRARY).__version__
    fact("imported", version=version, missing=engine.missing())
    if engine.missing():
        return 2
    from groupnorm.discovery import backend_info

    fact("device", name=engine.gpu_name(), not_fused=backend_info(engine.BACKEND).why_not_fused)
    {TORCH: smoke_torch, CUPY: smoke_cupy, JAX: smoke_jax}[LIBRARY](engine)
    return 0


if __name__ == "__main__":
    sys.modules["_gpu_smoke"] = sys.modules["__main__"]  # one clock and one list of facts
    sys.exit(main())
