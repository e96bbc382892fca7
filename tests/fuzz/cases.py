"""Random calls: what one varies in, and how they are drawn.

A `Case` is a call in plain values, so that its repr is a program. Its defaults are the simplest
call: a case that fails is shrunk by returning one field after the other to its default.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

HALF = ("float16", "bfloat16")
COMPLEX = ("complex64", "complex128")
REAL_OF = {"complex64": "float32", "complex128": "float64"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `group_norm` and its gradients. See `draw` for the values."""

    library: str = "numpy"
    how: str = "vjp"  # or "autodiff": the library's own differentiation
    implementation: str | None = "portable"
    shape: tuple[int, ...] = (1, 1)
    feature_axis: int | tuple[int, ...] = -1
    reduction_axes: int | tuple[int, ...] | None = None
    num_groups: int | None = 1
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: str = "float32"  # of x
    result: str | None = None  # the argument `dtype`
    use_fast_variance: bool = True
    activation: str | None = None
    scale: str | None = None  # dtypes
    bias: str | None = None
    gain: float = 1.0  # the size of scale and bias
    in_feature_shape: bool = False  # parameters have the shape of the feature axes, not (C,)
    per_sample: bool = False  # parameters have a row for each sample
    parameter_layout: str = "C"
    host_parameters: bool = False
    mask_shape: tuple[int, ...] | None = None
    mask_dtype: str = "bool"
    mask_layout: str = "C"  # "list": a nested list; "host": a NumPy array
    share: float = 0.7  # of valid elements
    valid_value: int = 1  # what stands for True in a mask of another dtype than bool
    padding: str = "ordinary"
    values: str = "normal"
    offset: float = 0.0
    size: float = 1.0  # factor of all values
    layout: str = "C"
    dy_layout: str = "C"
    seed: int = 0

    def __repr__(self) -> str:
        shown = (
            f"{f.name}={value!r}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default
        )
        return f"Case({', '.join(shown)})"

    @property
    def features(self) -> list[int]:
        return axes_of(self.feature_axis, len(self.shape))

    @property
    def channels(self) -> int:
        return math.prod(self.shape[a] for a in self.features)

    @property
    def masked(self) -> bool:
        return self.mask_shape is not None

    @property
    def computed(self) -> str:
        """The dtype to which x and the parameters are promoted."""
        return promote(self.dtype, *(d for d in (self.scale, self.bias) if d))

    @property
    def result_dtype(self) -> str:
        return {None: self.computed, "input": self.dtype}.get(self.result, self.result)

    @property
    def work(self) -> str:
        """The dtype whose precision the result has: at least float32."""
        return promote(self.computed, self.result_dtype, "float32")

    @property
    def keywords(self) -> dict:
        names = (
            "num_groups group_size feature_axis reduction_axes epsilon use_fast_variance activation"
        )
        return {name: getattr(self, name) for name in names.split()} | {"dtype": self.result}


class Known(NamedTuple):
    """A fault that is known and not mended yet: its cases are not drawn."""

    reason: str
    has: Callable[[Case], bool]


KNOWN = [
    Known(
        "the kernels vanish subnormal data where epsilon is tiny",
        lambda case: (
            case.size < 1e-37 and case.epsilon < 1e-20 and case.implementation != "portable"
        ),
    ),
]


# Compiling takes JAX a hundred times as long as a call: so many follow each other for a program.
CALLS_OF_A_PROGRAM = 4


def axes_of(axes, ndim: int) -> list[int]:
    listed = [axes] if isinstance(axes, int) else axes
    return sorted(a % ndim for a in listed)


def promote(*names: str) -> str:
    """Promote dtypes as every library does; the two halves together are not drawn."""
    plain = {n for n in names if n != "bfloat16"}
    if not plain:
        return "bfloat16"
    return str(np.result_type(*plain, *(["float16"] if len(plain) < len(set(names)) else [])))


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def compiled_anyway(case: Case) -> bool:
    """Whether the rest of the suite compiles the kernels for this call, or there are none."""
    if case.work != "float32" or case.dtype in COMPLEX:
        return True
    if case.dtype in HALF:
        return (
            not case.masked
            and case.activation is None
            and case.result_dtype in (case.dtype, "float32")
        )
    return case.result_dtype == "float32" and case.activation in (None, "silu")


def draw(seed: int, index: int, libraries=("numpy", "torch", "jax"), every_kernel=False) -> Case:
    """Draw case number `index`; with `every_kernel`, also those that need kernels of their own."""
    attempt = 0
    while True:
        rng = np.random.default_rng([seed, index, attempt])
        if libraries == ("jax",):
            program = np.random.default_rng([seed, index // CALLS_OF_A_PROGRAM, attempt])
            case = _draw(program, libraries)
            if index % CALLS_OF_A_PROGRAM:
                case = _with_other_data(case, rng)
        else:
            case = _draw(rng, libraries)
        if not every_kernel and case.implementation != "portable" and not compiled_anyway(case):
            case = dataclasses.replace(case, implementation="portable")
        if not any(known.has(case) for known in KNOWN):
            return case
        attempt += 1


def _with_other_data(case: Case, rng: np.random.Generator) -> Case:
    """Draw the values again, for the same compiled program, which constants would not share."""
    while True:
        other = _draw(rng, (case.library,))
        if (other.dtype, other.masked) == (case.dtype, case.masked):
            names = ("values", "size", "offset", "share", "padding", "seed")
            data = {name: getattr(other, name) for name in names}
            return dataclasses.replace(case, **data, mask_layout="C", host_parameters=False)


def _draw(rng: np.random.Generator, libraries) -> Case:
    def pick(*options, p=None):
        chosen = rng.choice(len(options), p=p)
        return options[chosen]

    def often(value, *others, share=0.7):
        return value if rng.random() < share else pick(*others)

    weights = np.array([{"numpy": 0.5, "torch": 0.5, "jax": 0.01}[name] for name in libraries])
    library = pick(*libraries, p=weights / weights.sum())
    shape, features = _shape(rng, library)
    ndim, channels = len(shape), math.prod(shape[a] for a in features)
    dtype = pick(
        "float32", "float16", "bfloat16", "float64", "complex64", "complex128",
        p=[0.4, 0.12, 0.12, 0.14, 0.12, 0.1],
    )  # fmt: skip
    real = REAL_OF.get(dtype, dtype)
    groups = pick(*divisors(channels))
    fields: dict = {
        "library": library,
        "shape": shape,
        "feature_axis": _written(rng, features, ndim),
        "dtype": dtype,
        "use_fast_variance": often(True, False),
        "values": often("normal", "ties", "heavy tails", "spike", "ramp", "lognormal", "constant",
                        "channel means", share=0.5),
        "layout": often("C", *LAYOUTS[library], share=0.4),
        "dy_layout": often("C", *LAYOUTS[library], share=0.5),
        "parameter_layout": often("C", *LAYOUTS[library], share=0.8),
        "seed": int(rng.integers(1 << 31)),
    }  # fmt: skip
    fields |= (
        {"num_groups": groups}
        if rng.random() < 0.7
        else {"num_groups": None, "group_size": channels // groups}
    )
    if rng.random() < 0.3:
        rest = [a for a in range(ndim) if a not in features and rng.random() < 0.5]
        fields["reduction_axes"] = _written(rng, [*features, *rest], ndim)

    # Parameters: of x's dtype, or wider.
    wider = {"float16": ("float32", "float64"), "bfloat16": ("float32", "float64")}
    others = (*wider.get(dtype, ("float32", "float64")), *(() if rng.random() < 0.8 else COMPLEX))
    for name in ("scale", "bias"):
        fields[name] = None if rng.random() < 0.3 else often(real, *others, share=0.6)
    fields["gain"] = often(1.0, 1e-3, 1e3, share=0.9)
    fields["in_feature_shape"] = bool(rng.random() < 0.5)
    fields["host_parameters"] = bool(library != "numpy" and rng.random() < 0.1)
    complex_parameters = any(fields[name] in COMPLEX for name in ("scale", "bias"))
    results = (dtype, "input") if complex_parameters or dtype in COMPLEX else (
        "input", "float16", "bfloat16", "float32", "float64")  # fmt: skip
    if complex_parameters and dtype not in COMPLEX:
        results = COMPLEX
    fields["result"] = often(None, *results)
    if not complex_parameters and dtype not in COMPLEX:
        fields["activation"] = often(None, "relu", "silu", "gelu", share=0.6)

    if rng.random() < 0.5:
        mask_shape = tuple(n if rng.random() < 0.5 else 1 for n in shape)
        fields["mask_shape"] = mask_shape[int(rng.integers(0, ndim + 1)) :]
        fields["mask_dtype"] = often(
            "bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64", share=0.5
        )
        fields["mask_layout"] = often("C", "list", "host", "strided", "broadcast")
        if library != "numpy" and fields["mask_layout"] not in ("list", "host"):
            fields["valid_value"] = often(1, 2)  # not checked, as that would synchronize a device
        fields["share"] = pick(0.0, 0.3, 0.7, 0.9, 1.0)
        fields["padding"] = pick("ordinary", "nan", "inf", "mixed", "lowest", "large")
        if fields["padding"] in ("lowest", "large"):  # then dy is 0 there, and not constant
            fields["dy_layout"] = "C" if fields["dy_layout"] == "broadcast" else fields["dy_layout"]

    # XLA takes subnormal numbers for 0.
    sizes = [s for s in SIZES[real] if s > 1e-37 or library != "jax"]
    fields["size"] = often(1.0, *sizes)
    if dtype == "float16":  # up to 65504
        fields["offset"] = often(0.0, 1.0, 1e3) if fields["size"] == 1 else 0.0
    elif fields["size"] in LARGEST:
        # Masked-out values are bounded, at 5e33 in float32: see `statistics._saturate`.
        if fields.get("padding") == "lowest":
            fields["padding"] = "inf"
        fields["offset"] = often(0.0, 1.0, 1e3)
        if fields["values"] == "channel means":
            fields["values"] = "normal"
    else:
        fields["offset"] = often(0.0, 1.0, 1e3, 1e5, share=0.4)
    fields["epsilon"] = often(1e-6, 0.0, 1e-30, 1e-12, 1e-5, 1e-3, 1.0, share=0.6)
    if rng.random() < 0.5:  # in proportion to the variance, as far as that is an ordinary number
        fields["epsilon"] = float(np.clip(1e-3 * fields["size"], 1e-15, 1e15)) ** 2

    reduced = fields.get("reduction_axes")
    batch = ndim > 1 and 0 not in features
    if reduced is not None:
        batch = 0 not in axes_of(reduced, ndim)
    fields["per_sample"] = bool(batch and rng.random() < 0.2)

    if library == "jax":  # compiled for every new call: portable, and differentiated by JAX
        return Case(**fields, how=pick("vjp", "autodiff"))
    autodiff = library == "torch" and not fields["host_parameters"] and rng.random() < 0.7
    return Case(
        **fields,
        how="autodiff" if autodiff else "vjp",
        implementation=pick("portable", "fused", None),
    )


# Orders and gaps in memory; see `arrays.lay_out`.
LAYOUTS = {
    "numpy": ("F", "permuted", "strided", "reversed", "broadcast", "offset", "unaligned",
              "read-only", "swapped"),
    "torch": ("F", "permuted", "strided", "broadcast", "offset", "conj", "neg", "channels_last"),
    "jax": ("C",),
}  # fmt: skip
LARGEST = (1e30, 1e290)  # in float32 and float64
# Squares of some leave the dtype's range.
SIZES = {
    "float16": (1e-2, 1e2, 1e3),
    "bfloat16": (1e-3, 1e3, 1e15, 1e-15),
    "float32": (1e-3, 1e3, 1e20, 1e-20, LARGEST[0], 1e-30, 1e-40),
    "float64": (1e-3, 1e3, 1e150, 1e-150, LARGEST[1], 1e-310),
}


def _shape(rng: np.random.Generator, library: str) -> tuple[tuple[int, ...], list[int]]:
    """Return a shape of 1 to 5 axes, and its one or two feature axes; a few are large or empty."""
    ndim = int(rng.choice([1, 2, 3, 4, 5], p=[0.05, 0.2, 0.3, 0.35, 0.1]))
    features = [-1, 1, *range(ndim)][int(rng.integers(0, ndim + 2))] if ndim > 1 else 0
    listed = {features % ndim}
    if ndim > 2 and rng.random() < 0.15:
        listed.add(int(rng.integers(ndim)))
    if library == "jax":
        size = rng.integers(1, 7, ndim)
    else:
        largest = {1: 300, 2: 60, 3: 14, 4: 9, 5: 5}[ndim]
        size = rng.integers(1, largest + 1, ndim)
        if rng.random() < 0.03:  # longer than the kernels' bands, and the portable sums' blocks
            size[rng.integers(ndim)] *= int(rng.integers(2, 40))
        if rng.random() < 0.02:
            size[rng.integers(ndim)] = 0
    for axis in listed:
        size[axis] = max(1, size[axis])
    return tuple(int(n) for n in size), sorted(listed)


def _written(rng: np.random.Generator, axes, ndim: int):
    """Return axes as a user may write them: in any order, negative or not, a single one as int."""
    signed = [int(a) - ndim if rng.random() < 0.5 else int(a) for a in rng.permutation(axes)]
    return signed[0] if len(signed) == 1 and rng.random() < 0.7 else tuple(signed)
