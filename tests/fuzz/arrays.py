"""The arrays of a case: their values, and where they lie in memory."""

from __future__ import annotations

import dataclasses
import importlib
import zlib
from typing import Any, NamedTuple

import numpy as np

from groupnorm.testing.registry import Row
from tests.fuzz.cases import COMPLEX, REAL_OF, Case
from tests.rows import host_dtype


class Values(NamedTuple):
    """The arrays of a call, on the host and contiguous."""

    x: np.ndarray
    dy: np.ndarray
    scale: np.ndarray | None
    bias: np.ndarray | None
    mask: np.ndarray | None
    valid: np.ndarray  # the mask, in x's shape
    huge: np.ndarray  # padding whose own result may leave the dtype's range


class Laid(NamedTuple):
    """An array of a library, and the memory it is a view of."""

    array: Any
    base: Any


def values_of(case: Case) -> Values:
    """Make the arrays of a case from its seed."""

    def generator(name):  # one each, so that shrinking one leaves the others as they are
        return np.random.default_rng([case.seed, zlib.crc32(name.encode())])

    with np.errstate(over="ignore"):
        x = (case.size * (case.offset + _data(case, generator("x")))).astype(host_dtype(case.dtype))
    x = _constant_if_broadcast(x, case.layout, case.seed)
    mask, valid = None, np.ones(case.shape, bool)
    if case.mask_shape is not None:
        mask = generator("mask").random(case.mask_shape) < case.share
        valid = np.broadcast_to(mask, case.shape)
        mask = (case.valid_value * mask).astype(case.mask_dtype)
    huge = ~valid & (case.padding in ("lowest", "large"))
    if case.padding != "ordinary" and not valid.all() and case.layout != "broadcast":
        low = -float(np.finfo(x.real.dtype).max) if case.dtype != "bfloat16" else -3.3895314e38
        paddings = {
            "nan": [np.nan],
            "inf": [np.inf],
            "mixed": [np.nan, np.inf, -np.inf],
            "lowest": [low],
            "large": [3e4 * case.size, -1e4 * case.size],
        }[case.padding]
        filling = generator("padding").choice(paddings, case.shape)
        with np.errstate(over="ignore"):
            filling = filling.astype(x.real.dtype)
            if case.dtype in COMPLEX:
                both = np.empty(case.shape, x.dtype)  # a product with 1j would make inf NaN
                both.real, both.imag = filling, np.flip(filling)
                filling = both
            x = np.where(valid, x, filling)
    else:
        huge = np.zeros(case.shape, bool)
    dy = _normal(generator("dy"), case.shape, case.result_dtype)
    dy = np.where(huge, dy.dtype.type(0), dy)
    if not huge.any():
        dy = _constant_if_broadcast(dy, case.dy_layout, case.seed)
    shape = [case.shape[a] for a in case.features] if case.in_feature_shape else [case.channels]
    if case.per_sample:
        shape = [case.shape[0], *shape]
    scale = bias = None
    if case.scale:
        random = generator("scale")
        scale = random.uniform(0.5, 1.5, shape) * random.choice([-1, 1], shape)
        if case.scale in COMPLEX:
            scale = scale + 1j * random.normal(size=shape)
        scale = (case.gain * scale).astype(host_dtype(case.scale))
    if case.bias:
        bias = case.gain * _normal(generator("bias"), shape, case.bias)
        bias = bias.astype(host_dtype(case.bias))
    return Values(x, dy, scale, bias, mask, valid, huge)


def _normal(rng, shape, dtype: str) -> np.ndarray:
    a = rng.normal(size=shape)
    if dtype in COMPLEX:
        a = a + 1j * rng.normal(size=shape)
    return a.astype(host_dtype(dtype))


def _data(case: Case, rng) -> np.ndarray:
    if case.dtype in COMPLEX:
        real = dataclasses.replace(case, dtype=REAL_OF[case.dtype])
        return _data(real, rng) + 1j * _data(real, rng)
    shape = case.shape
    match case.values:
        case "normal":
            return rng.normal(size=shape)
        case "ties":
            return rng.integers(-1, 2, size=shape) * 1.0
        case "heavy tails":
            return np.clip(rng.standard_t(1.5, size=shape), -60, 60)
        case "spike":
            x = rng.normal(size=shape)
            if x.size:
                x.flat[rng.integers(x.size)] = 60
            return x
        case "ramp":
            return np.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
        case "lognormal":
            return np.minimum(np.exp(rng.normal(size=shape)), 60)
        case "constant":
            return np.full(shape, rng.normal())
        case "channel means":
            means = rng.choice([-1.0, 1.0], [n if a in case.features else 1 for a, n in
                                             enumerate(shape)])  # fmt: skip
            return rng.normal(size=shape) + means * (30 if case.dtype == "float16" else 1e5)
    raise AssertionError(case.values)


def _constant_if_broadcast(a: np.ndarray, layout: str, seed: int) -> np.ndarray:
    """Make an array equal along the axis in which it will be a broadcast view."""
    axis = seed % a.ndim
    if layout != "broadcast" or a.shape[axis] == 0:
        return a
    return np.broadcast_to(a.take([0], axis), a.shape).copy()


def lay_out(row: Row, a: np.ndarray, layout: str, seed: int) -> Laid:
    """Put values into a library's memory in the given way; views are not contiguous."""
    if row.library == "numpy":
        return _numpy_layout(a, layout, seed)
    if row.library == "torch":
        return _torch_layout(row, a, layout, seed)
    x = row.asarray(a)
    return Laid(x, x)


def _spread(a: np.ndarray) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Return an array with gaps, which hold NaN or ones, and the slices that select `a` in it."""
    filler = np.nan if a.dtype.kind in "fcV" else 1
    wide = np.full([2 * n + 1 for n in a.shape], filler, a.dtype)
    at = tuple(slice(1, None, 2) for _ in a.shape)
    wide[at] = a
    return wide, at


def _order(ndim: int, layout: str, seed: int) -> tuple[int, ...]:
    """Return the axes in memory order, the slowest first."""
    if layout == "F":
        return tuple(range(ndim))[::-1]
    if layout == "channels_last" and ndim > 1:
        return (0, *range(2, ndim), 1)
    return tuple(int(a) for a in np.random.default_rng(seed).permutation(ndim))


def _numpy_layout(a: np.ndarray, layout: str, seed: int) -> Laid:
    match layout:
        case "F" | "permuted" | "channels_last":
            order = _order(a.ndim, layout, seed)
            base = np.array(a.transpose(order), order="C")
            return Laid(base.transpose(np.argsort(order)), base)
        case "strided":
            base, at = _spread(a)
            return Laid(base[at], base)
        case "reversed":
            back = (slice(None, None, -1),) * a.ndim
            base = np.array(a[back], order="C")
            return Laid(base[back], base)
        case "broadcast" if a.ndim and a.size:
            base = np.array(a.take([0], seed % a.ndim), order="C")
            return Laid(np.broadcast_to(base, a.shape), base)
        case "offset" | "unaligned":
            skip = a.itemsize if layout == "offset" else 1
            base = np.zeros(a.nbytes + skip, np.uint8)
            view = base[skip:].view(a.dtype).reshape(a.shape)
            view[...] = a
            return Laid(view, base)
        case "swapped" if a.dtype.kind != "V" and a.itemsize > 1:
            base = a.astype(a.dtype.newbyteorder())
            return Laid(base, base)
    base = np.array(a, order="C")
    base.flags.writeable = layout != "read-only"
    return Laid(base, base)


def _torch_layout(row: Row, a: np.ndarray, layout: str, seed: int) -> Laid:
    torch = importlib.import_module("torch")
    match layout:
        case "F" | "permuted" | "channels_last":
            order = _order(a.ndim, layout, seed)
            base = row.asarray(a.transpose(order))
            return Laid(base.permute(*(int(i) for i in np.argsort(order))), base)
        case "strided":
            wide, at = _spread(a)
            base = row.asarray(wide)
            return Laid(base[at], base)
        case "broadcast" if a.ndim and a.size:
            base = row.asarray(a.take([0], seed % a.ndim))
            return Laid(base.expand(a.shape), base)
        case "offset":
            base = row.asarray(np.concatenate([np.ones(1, a.dtype), a.ravel()]))
            return Laid(base[1:].view(a.shape), base)
        case "conj" if a.dtype.kind == "c":
            base = row.asarray(a.conj())
            return Laid(base.conj(), base)
        case "neg" if a.dtype.name in ("float32", "float64"):
            base = torch.complex(row.asarray(np.ones_like(a)), row.asarray(-a))
            return Laid(base.conj().imag, base)
    base = row.asarray(a)
    return Laid(base, base)
