"""Inputs on which functions that are wrong, or lose digits, show it."""

import math
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing.compare import is_float

__all__ = ["hard_inputs", "layouts", "pad_with_nan"]

Array = npt.NDArray[Any]


def hard_inputs(
    shape: int | tuple[int, ...],
    dtype: npt.DTypeLike = "float32",
    *,
    axis: int = -1,
    seed: int = 0,
    names: str | Sequence[str] | None = None,
) -> dict[str, Array]:
    """Return arrays of one shape that are hard to compute with.

    Parameters
    ----------
    shape : int or tuple of int
    dtype : dtype
        float32, float64, float16, or ml_dtypes' bfloat16. What it cannot hold is left out.
    axis : int
        The axis along which "channel means" differ.
    seed : int
    names : str or sequence of str, optional
        Those that are wanted; default is all. "huge", "tiny" and "subnormal" test the range of a
        function; the others its digits.

    Returns
    -------
    dict of str to ndarray
        "normal"; "offset 1e1" to "offset 1e5": with a mean that hides the spread; "spike", "spikes
        at both ends": a few large values; "ramp", "sorted", "lognormal"; "constant"; "channel
        means": each channel's mean is another; "huge" and "tiny": scaled by 1e20 and 1e-20;
        "subnormal"; "large half": near the largest number of float16.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If `dtype` is not a real floating one, a name is unknown, or the dtype cannot hold what it
        names.

    Examples
    --------
    >>> from groupnorm import testing
    >>> sorted(testing.hard_inputs((2, 8), names=("normal", "ramp")))
    ['normal', 'ramp']
    """
    try:
        wanted: np.dtype[Any] = np.dtype(dtype)
    except TypeError as error:
        raise ArgumentTypeError(f"dtype={dtype!r} is not a dtype of NumPy.") from error
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    names = (names,) if isinstance(names, str) else names
    if shape and not -len(shape) <= axis < len(shape):
        raise ArgumentValueError(f"axis={axis!r} is not an axis of the shape {shape}.")
    if not is_float(wanted) or wanted.kind == "c":
        raise ArgumentTypeError(f"dtype={dtype!r} is not a real floating-point dtype.")
    kinds = _kinds(shape, axis, 2.0**-126 if wanted.name == "bfloat16" else np.finfo(wanted).tiny)
    for name in names or ():
        if name not in kinds:
            raise ArgumentValueError(f"names={name!r} is not known: choose from {list(kinds)}.")
    largest = 3e38 if wanted.name == "bfloat16" else float(np.finfo(str(wanted)).max)
    found = {}
    for i, (name, make) in enumerate(kinds.items()):
        if names is not None and name not in names:
            continue
        made = make(np.random.default_rng([seed, i]))
        size = float(np.abs(made).max(initial=0.0))
        smallest = 1e-40 if wanted.itemsize > 2 or wanted.name == "bfloat16" else 6e-8
        if not (size == 0 or name == "subnormal" or smallest < size <= largest):
            if names is not None:
                raise ArgumentValueError(
                    f"names={name!r}: {wanted} cannot hold it; leave it out, or take another dtype."
                )
            continue
        found[name] = made.astype(wanted)
    return found


def _kinds(shape: tuple[int, ...], axis: int, smallest: float) -> dict[str, Callable[[Any], Array]]:
    size = math.prod(shape)

    def normal(rng: Any) -> Array:
        drawn: Array = rng.standard_normal(shape)
        return drawn

    def offset(by: float) -> Callable[[Any], Array]:
        return lambda rng: normal(rng) + by

    def with_spikes(*positions: int) -> Callable[[Any], Array]:
        def make(rng: Any) -> Array:
            x = normal(rng)
            if size:
                x.ravel()[list(positions)] = 1e4
            return x

        return make

    def channel_means(rng: Any) -> Array:
        means = rng.uniform(-1e3, 1e3, size=shape[axis] if shape else 1)
        x = normal(rng)
        return np.moveaxis(np.moveaxis(x, axis, -1) + means, -1, axis) if shape else x

    return {
        "normal": normal,
        **{f"offset 1e{k}": offset(10.0**k) for k in range(1, 6)},
        "spike": with_spikes(size // 2),
        "spikes at both ends": with_spikes(0, -1),
        "ramp": lambda rng: np.linspace(-1.0, 1.0, size).reshape(shape) + 10,
        "sorted": lambda rng: np.sort(rng.standard_normal(size)).reshape(shape),
        "lognormal": lambda rng: rng.lognormal(0.0, 3.0, shape),
        "constant": lambda rng: np.full(shape, 1.1),
        "channel means": channel_means,
        "huge": lambda rng: normal(rng) * 1e20,
        "tiny": lambda rng: normal(rng) * 1e-20,
        "subnormal": lambda rng: normal(rng) * float(smallest) / 16,
        "large half": lambda rng: rng.uniform(3e4, 6.5e4, shape),
    }


def pad_with_nan(x: Array, mask: Array) -> Array:
    """Return x with NaN where the mask is False: what is masked out must not reach a result.

    Parameters
    ----------
    x : ndarray
        Of a floating-point dtype.
    mask : ndarray of bool
        Broadcastable to x's shape.

    Returns
    -------
    ndarray
        Of x's shape and dtype.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If x cannot hold NaN, or the mask does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import testing
    >>> testing.pad_with_nan(np.array([1.0, 2.0]), np.array([True, False]))
    array([ 1., nan])
    """
    x, mask = np.asarray(x), np.asarray(mask)
    if not is_float(x.dtype):
        raise ArgumentTypeError(f"x has dtype {x.dtype}, which has no NaN: pass floats.")
    if mask.dtype != bool:
        raise ArgumentTypeError(f"mask has dtype {mask.dtype}: pass booleans.")
    try:
        where = np.broadcast_to(mask, x.shape)
    except ValueError as error:
        raise ArgumentValueError(
            f"mask has shape {mask.shape}, which does not broadcast to x's, {x.shape}."
        ) from error
    padded = x.copy()
    padded[~where] = np.nan
    return padded


def layouts(x: Array) -> dict[str, Array]:
    """Return arrays of the same values, each in memory in another way.

    Parameters
    ----------
    x : ndarray

    Returns
    -------
    dict of str to ndarray
        "C", "Fortran"; "negative strides", "slice" (every other element of a larger array),
        "channels last" (axis 1 is the fastest; from three axes on), "read-only", "broadcast" (only
        if x is constant along the first axis), "memory-mapped" (a file that is deleted with the
        array), "unaligned", "big-endian".

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import testing
    >>> testing.layouts(np.zeros((2, 3, 4)))["channels last"].strides
    (96, 8, 24)
    """
    return dict(_layouts(np.array(x, order="C")))


def _layouts(x: Array) -> Iterator[tuple[str, Array]]:
    yield "C", x
    yield "Fortran", np.array(x, order="F")
    axes = tuple(range(x.ndim))
    yield "negative strides", np.flip(np.flip(x, axes).copy(), axes)
    spaced = np.zeros(tuple(2 * n for n in x.shape), x.dtype)
    every_other = np.lib.stride_tricks.as_strided(
        spaced, x.shape, tuple(2 * s for s in spaced.strides)
    )
    every_other[...] = x
    yield "slice", every_other
    if x.ndim >= 3:
        yield "channels last", np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)
    fixed = x.copy()
    fixed.flags.writeable = False
    yield "read-only", fixed
    if x.ndim and x.shape[0] > 1 and (x == x[:1]).all():
        yield "broadcast", np.broadcast_to(x[:1], x.shape)
    if x.size:
        yield "memory-mapped", _memory_mapped(x)
    raw = np.zeros(x.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    yield "unaligned", unaligned
    if x.dtype.isbuiltin == 1 and x.dtype.itemsize > 1:
        yield "big-endian", x.astype(x.dtype.newbyteorder(">"))


def _memory_mapped(x: Array) -> Array:
    folder = tempfile.TemporaryDirectory(prefix="groupnorm-")
    mapped: Array = np.memmap(Path(folder.name) / "x", x.dtype, "w+", shape=x.shape)
    mapped[...] = x
    weakref.finalize(mapped, folder.cleanup)
    return mapped
