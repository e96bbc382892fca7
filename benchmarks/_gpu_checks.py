"""The checks of gpu.py before it measures: fused results and gradients against float64, twice.

The reference is written from the definition in NumPy and shares no code with the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from _gpu_cases import ACTIVATION, FIRST, LAYOUTS, SEED
from _gpu_measure import reason

EPSILON = 1e-6
VALID = 0.7  # the fraction of valid positions in the mask
OFFSET = 1e4
# float32: of values and sums; bfloat16: its rounding; both with a small margin.
BOUNDS = {"float32": {"y": 1e-5, "gradient": 1e-5}, "bfloat16": {"y": 4.2e-3, "gradient": 4.2e-3}}
# (N, C, *spatial) and groups: one for each plan of the kernels, and odd sizes.
SHAPES = {
    "whole groups": ((4, 64, 16, 16), 8),
    "tiles": ((2, 64, 96, 80), 4),
    "odd sizes": ((3, 30, 7, 9), 3),
}
FORMS = {
    "float32": {"masked": True, "offset": OFFSET, "activation": None},
    "bfloat16": {"masked": False, "offset": 0.0, "activation": ACTIVATION},
    # Both of them at once, and the activation after an offset.
    "float32, silu": {"masked": False, "offset": OFFSET, "activation": ACTIVATION},
    "bfloat16, mask": {"masked": True, "offset": OFFSET, "activation": None},
}


@dataclass(frozen=True)
class Check:
    """One call that is compared."""

    shape: str
    layout: str
    form: str

    @property
    def dtype(self) -> str:
        return self.form.partition(",")[0]

    @property
    def name(self) -> str:
        form = FORMS[self.form]
        parts = [self.shape, self.layout, self.dtype]
        parts += ["mask"] if form["masked"] else []
        parts += [f"mean {form['offset']:g}"] if form["offset"] else []
        return ", ".join([*parts, form["activation"] or "no activation"])


def plan() -> list[Check]:
    """Two forms of each shape and layout, the others for odd sizes."""
    names = list(FORMS)
    return [
        Check(shape, layout, form)
        for shape, layout in itertools.product(SHAPES, LAYOUTS)
        for form in (names[2:] if shape == "odd sizes" else names[:2])
    ]


def make_arrays(check: Check) -> dict[str, Any]:
    """Inputs in float32, exact in the row's dtype; `mask` has 1 for the channels."""
    rng, form = np.random.default_rng(SEED), FORMS[check.form]
    dims, _ = SHAPES[check.shape]
    samples, channels, *space = dims
    arrays = {
        "x": rng.standard_normal(dims, np.float32) + np.float32(form["offset"]),
        "dy": rng.standard_normal(dims, np.float32),
        "scale": rng.standard_normal(channels, np.float32),
        "bias": rng.standard_normal(channels, np.float32),
    }
    if check.dtype == "bfloat16":
        if form["offset"]:  # with a spacing of 64
            arrays["x"] += 200 * rng.standard_normal(dims, np.float32)
        arrays = {name: rounded(a) for name, a in arrays.items()}
    mask = rng.random((samples, 1, *space)) < VALID if form["masked"] else None
    return {**arrays, "mask": mask}


def rounded(a: np.ndarray) -> np.ndarray:
    """Nearest values of bfloat16, ties to even, in float32."""
    bits = a.view(np.uint32)
    even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (even & np.uint32(0xFFFF0000)).view(np.float32)


def reference(check: Check, arrays: dict[str, Any]) -> list[np.ndarray]:
    """Y and the gradients of x, scale and bias in float64."""
    dims, groups = SHAPES[check.shape]
    samples, channels = dims[:2]
    apart = (samples, groups, channels // groups, -1)
    each = (1, groups, channels // groups, 1)
    x, dy = (arrays[name].astype(np.float64).reshape(apart) for name in ("x", "dy"))
    scale, bias = (arrays[name].astype(np.float64).reshape(each) for name in ("scale", "bias"))
    mask = arrays["mask"]
    weight = np.ones(dims) if mask is None else np.broadcast_to(mask, dims).astype(np.float64)
    weight = weight.reshape(apart)

    def total(a: np.ndarray) -> np.ndarray:
        return a.sum((2, 3), keepdims=True)

    count = total(weight)
    centred = x - total(x * weight) / count
    std = np.sqrt(total(centred**2 * weight) / count + EPSILON)
    hat = centred / std
    y = hat * scale + bias
    if FORMS[check.form]["activation"]:
        sigmoid = 1 / (1 + np.exp(-y))
        dy = dy * sigmoid * (1 + y * (1 - sigmoid))
        y = y * sigmoid
    dhat = dy * scale
    # All positions are normalized; only the valid ones contribute to the statistics.
    dx = (dhat - weight * (total(dhat) + hat * total(dhat * hat)) / count) / std
    dscale, dbias = ((a.sum((0, 3))).reshape(-1) for a in (dy * hat, dy))
    return [y.reshape(dims), dx.reshape(dims), dscale, dbias]


def run(
    check: Check, library: str, vjp: Callable[..., list[np.ndarray]],
    implementation: str | None = "fused",
) -> dict[str, Any]:  # fmt: skip
    """Compare one call, and check that a repetition gives the same bits; in JSON types."""
    found: dict[str, Any] = {"kind": "check", "library": library, "name": check.name,
                             "errors": {}, "repeats": None, "failure": None}  # fmt: skip
    try:
        arrays = make_arrays(check)
        expected = reference(check, arrays)
        options = {
            "num_groups": SHAPES[check.shape][1], "epsilon": EPSILON, "dtype": "input",
            "activation": FORMS[check.form]["activation"], "implementation": implementation,
        }  # fmt: skip
        first = check.layout == FIRST
        results, again = (vjp(arrays, check.dtype, first, options) for _ in range(2))
    except Exception as error:
        return found | {"failure": reason(error), "passed": False}
    found["repeats"] = all(a.tobytes() == b.tobytes() for a, b in zip(results, again, strict=True))
    names = ("y", "dx", "dscale", "dbias")
    for name, ours, true in zip(names, results, expected, strict=True):
        size = np.maximum(1, abs(true)) if name == "y" else np.max(abs(true))
        found["errors"][name] = float(np.max(abs(ours - true) / size))
    bounds = BOUNDS[check.dtype]
    right = all(e <= bounds["y" if n == "y" else "gradient"] for n, e in found["errors"].items())
    return found | {"passed": right and found["repeats"]}


def package_checks() -> list[dict[str, Any]]:
    """The results of `groupnorm.selfcheck` on devices other than the CPU."""
    from groupnorm import available_backends
    from groupnorm.selfcheck import check_backends, rows_of_backend

    rows = [row for info in available_backends() for row in rows_of_backend(info)]
    report = check_backends([row for row in rows if not row.tag.startswith("cpu")])
    return [
        {
            "kind": "check", "library": f.row.partition(":")[0],
            "name": f"selfcheck: {f.input}, {f.where} ({f.row})", "errors": {"largest": f.error},
            "repeats": None, "failure": None if f.right else f.message, "passed": f.right,
        }
        for f in report.findings
    ]  # fmt: skip
