"""The normalization in passes over the data that XLA compiles well on a CPU.

The same method as the portable code's, with one pivot a group, and as few numbers a channel as
there can be. Nothing of full size is stored between the passes. What XLA of JAX 0.10 does to other
forms, and how this one avoids it:

* Equal expressions become one, and one that several sums need is stored before it is summed. Each
  pass therefore sees the data in a shape of its own (`Spec.shape`).
* A chain of small operations is computed again for each element that uses it, unless a reduction
  that several others need lies between (`_settle`).
* ``where`` is not computed within a sum, but stored before; a product is computed within.
* A sum of products over one axis may run element by element; over blocks it does not.

Derivatives of all orders come from a rule for the tangent that is linear in the tangents and made
of ordinary operations. Its transpose is the backward pass one would write by hand. It reads the
data again (`_linear`), so nothing of full size but x itself is kept for it.
"""

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from groupnorm.plan import Plan
from groupnorm.portable.activations import activate
from groupnorm.portable.blocked_sums import BLOCK

__all__ = ["Spec", "normalize"]

# Above this epsilon a square that vanishes is nothing beside it.
SAFE_EPSILON = 1e-30
# The passes, each with a shape of its own.
SUM, SQUARES, APPLY, TANGENT_SUMS, TANGENT, PIVOT = range(6)


class Spec(NamedTuple):
    """Everything static of a call."""

    adapter: Any
    plan: Plan
    samples: int
    channels: int
    positions: int
    groups: int
    channels_first: bool
    stride: int  # of the positions the pivot is taken from
    epsilon: float
    activation: str | None
    dtype: Any  # of the statistics
    result: Any
    kernels: bool  # whether those for CPUs compute it

    @property
    def members(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups

    @property
    def elements(self) -> int:
        """Elements of a group."""
        return self.members * self.positions

    @property
    def inner(self) -> tuple[int, int]:
        """The axes of positions in `shape`."""
        return (2, 3) if self.channels_first else (1, 2)

    def shape(self, turn: int) -> Any:
        """Return (samples, channels and positions), the positions split in two differently."""
        splits = _splits(self.positions)
        blocks, block = splits[turn % len(splits)]
        return self.around(blocks, block)

    def around(self, *positions: int) -> Any:
        """Put the axes of positions where they lie."""
        if self.channels_first:
            return (self.samples, self.channels, *positions)
        return (self.samples, *positions, self.channels)


@lru_cache(maxsize=1024)
def _splits(length: int) -> list[tuple[int, int]]:
    """Return the ways to split a length in (blocks, block), block sizes near `BLOCK` first."""
    sizes = [d for d in range(1, math.isqrt(length) + 1) if length % d == 0]
    sizes = sorted({*sizes, *(length // d for d in sizes)}, key=lambda d: abs(math.log(d / BLOCK)))
    return [(length // size, size) for size in sizes]


# ---- the call -----------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any) -> Any:
    """Normalize x, of the shape `Spec.around` says; a mask is (samples, positions)."""
    numbers = _measure(spec, x, mask)
    factor, term, rstd = _settled(spec, numbers, scale, bias)
    return _apply(spec, factor, term, rstd, x, mask, numbers.pivot)


@normalize.defjvp
def _tangent_rule(spec: Spec, primals: Any, tangents: Any) -> Any:
    """With ``xhat = (x - mean) rstd``, the tangent of xhat.

    It is ``rstd (dx - mean(dx) - xhat mean(xhat dx))``, with means over a group's valid elements.
    """
    x, scale, bias, mask = primals
    dx, dscale, dbias, _ = tangents
    numbers = _measure(spec, x, mask)
    pivot, offset, rstd, share = numbers
    factor, term, rstds = _settled(spec, numbers, scale, bias)
    sums = _tangent_sums(spec, dx, x, mask, pivot, rstds)
    mean, mean_product = (_groups(spec, a) * share for a in _settle(*sums))
    mean_product = mean_product - offset * rstd * mean
    mean, mean_product, offset, rstd = (
        _channels(spec, a) for a in (mean, mean_product, offset, rstd)
    )
    gain = scale * rstd
    slope = (dscale - gain * mean_product) * rstd
    constant = dbias - gain * mean - offset * slope
    settled = _settle(slope, constant)
    y = _apply(spec, factor, term, rstds, x, mask, pivot)
    return y, _tangent(spec, dx, *settled, x, mask, pivot, factor, term, rstds)


class _Numbers(NamedTuple):
    """What was measured: (samples, channels), and the rest (samples, groups)."""

    pivot: Any
    offset: Any  # of the mean from the pivot
    rstd: Any
    share: Any  # of one valid element in the mean; 0 where there is none


def _settled(spec: Spec, numbers: _Numbers, scale: Any, bias: Any) -> tuple[Any, ...]:
    """Return what deviations are multiplied by, what is added then, and rstd, by channel."""
    rstd = _channels(spec, numbers.rstd)
    factor = rstd * scale
    return _settle(factor, bias - _channels(spec, numbers.offset) * factor, rstd)


def _linear(function: Any) -> Any:
    """Keep nothing for the transpose but the arguments: the data is read again anyway."""
    return partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))(function)


# ---- passes over the data -----------------------------------------------------------------------


def _spread(spec: Spec, value: Any, turn: int) -> Any:
    """Broadcast (samples, channels), in two steps: the transpose is a sum by blocks."""
    blocks, _ = spec.shape(turn)[spec.inner[0] : spec.inner[1] + 1]
    value = value.reshape(spec.around(1, 1))
    return jnp.broadcast_to(jnp.broadcast_to(value, spec.around(blocks, 1)), spec.shape(turn))


def _total(spec: Spec, x: Any) -> Any:
    """Sum over the positions by blocks, to (samples, channels)."""
    outer, inner = spec.inner
    return x.sum(inner).sum(outer)


def _deviations(spec: Spec, x: Any, pivot: Any, turn: int) -> Any:
    return x.astype(spec.dtype).reshape(spec.shape(turn)) - _spread(spec, pivot, turn)


def _mask_of(spec: Spec, mask: Any, turn: int) -> Any:
    blocks, block = spec.shape(turn)[spec.inner[0] : spec.inner[1] + 1]
    if spec.channels_first:
        return mask.reshape(spec.samples, 1, blocks, block)
    return mask.reshape(spec.samples, blocks, block, 1)


def _weighted(spec: Spec, x: Any, mask: Any, turn: int) -> Any:
    """Multiply by 0 what is masked out: it is finite here."""
    return x if mask is None else x * _mask_of(spec, mask.astype(spec.dtype), turn)


def _clean(spec: Spec, x: Any, mask: Any, turn: int) -> Any:
    """Replace what is masked out and not finite by 0."""
    if mask is None:
        return x
    blocked = x.reshape(spec.shape(turn))
    keep = _mask_of(spec, mask, turn) | jnp.isfinite(blocked)
    return jnp.where(keep, blocked, 0).reshape(x.shape)


def _bounded(spec: Spec, x: Any, mask: Any, pivot: Any, rstd: Any, turn: int) -> Any:
    """Return deviations; of what is masked out none that overflows when it is scaled.

    Such as a padding of the dtype's lowest number: inf times a cotangent of 0 would be NaN for a
    channel.
    """
    deviations = _deviations(spec, _clean(spec, x, mask, turn), pivot, turn)
    if mask is None:
        return deviations
    rstd = lax.stop_gradient(jnp.maximum(rstd, 1))
    limit = _spread(spec, 2.0**-16 * float(jnp.finfo(spec.dtype).max) / rstd, turn)
    bounded = jnp.clip(deviations, -limit, limit)
    return jnp.where(_mask_of(spec, mask, turn), deviations, bounded)


def _affine(spec: Spec, factor: Any, term: Any, deviations: Any, turn: int) -> Any:
    return deviations * _spread(spec, factor, turn) + _spread(spec, term, turn)


def _apply(spec: Spec, factor: Any, term: Any, rstd: Any, x: Any, mask: Any, pivot: Any) -> Any:
    z = _affine(spec, factor, term, _bounded(spec, x, mask, pivot, rstd, APPLY), APPLY)
    return activate(z, spec.activation, spec.adapter).reshape(x.shape).astype(spec.result)


@_linear
def _tangent_sums(spec: Spec, dx: Any, x: Any, mask: Any, pivot: Any, rstd: Any) -> tuple[Any, Any]:
    """Sum dx, and dx times the scaled deviations, over the valid positions."""
    turn = TANGENT_SUMS
    dx = _weighted(spec, _counted(spec, dx, x, mask, turn), mask, turn)
    deviations = _bounded(spec, x, mask, pivot, rstd, turn)
    return _total(spec, dx), _total(spec, dx * (deviations * _spread(spec, rstd, turn)))


@_linear
def _tangent(
    spec: Spec, dx: Any, slope: Any, constant: Any,
    x: Any, mask: Any, pivot: Any, factor: Any, term: Any, rstd: Any,
) -> Any:  # fmt: skip
    """Put the tangent of y together, from the tangents of x and of the numbers a channel."""
    turn = TANGENT
    dz = _counted(spec, dx, x, mask, turn) * _spread(spec, factor, turn)
    deviations = _bounded(spec, x, mask, pivot, rstd, turn)
    dz = dz + _affine(spec, slope, constant, deviations, turn)
    if spec.activation is not None:
        z = _affine(spec, factor, term, deviations, turn)
        _, dz = jax.jvp(lambda z: activate(z, spec.activation, spec.adapter), (z,), (dz,))
    return dz.reshape(x.shape).astype(spec.result)


def _counted(spec: Spec, dx: Any, x: Any, mask: Any, turn: int) -> Any:
    """Return dx, and 0 where x was replaced."""
    dx = dx.astype(spec.dtype).reshape(spec.shape(turn))
    if mask is None:
        return dx
    finite = jnp.isfinite(x).reshape(spec.shape(turn))
    return jnp.where(_mask_of(spec, mask, turn) | finite, dx, 0)


# ---- statistics ---------------------------------------------------------------------------------


def _settle(*values: Any) -> tuple[Any, ...]:
    """End the operations before in a reduction that several passes need; so does the transpose."""
    stacked = jnp.stack(values)
    first = lax.broadcasted_iota(jnp.int32, (2, *stacked.shape), 0) == 0
    settled = jnp.where(first, stacked[None], 0).sum(0)
    return tuple(settled[i] for i in range(len(values)))


def _channels(spec: Spec, value: Any) -> Any:
    """Repeat a group's number for its channels."""
    repeated = jnp.broadcast_to(value[..., None], (*value.shape, spec.members))
    return repeated.reshape(-1, spec.channels)


def _groups(spec: Spec, value: Any) -> Any:
    """Sum the channels of each group."""
    return value.reshape(spec.samples, spec.groups, spec.members).sum(-1)


def _measure(spec: Spec, x: Any, mask: Any) -> _Numbers:
    if mask is None:
        count: Any = float(spec.elements)
        pivot = _pivot(spec, lax.stop_gradient(x), None, None)
        offset, variance, unit = _moments(spec, x, None, pivot, count)
        return _finish(spec, pivot, offset, variance, unit, 1.0 / count)
    valid = jnp.sum(mask, axis=1, dtype=spec.dtype)[:, None] * spec.members
    count = jnp.maximum(valid, 1)

    def replaced() -> Any:
        clean = _clean(spec, x, mask, APPLY)
        pivot = _pivot(spec, lax.stop_gradient(clean), mask, count)
        return pivot, *_moments(spec, clean, mask, pivot, count)

    # Nearly always all is finite; then what is masked out need not be replaced, but multiplied.
    pivot = _pivot(spec, lax.stop_gradient(x), mask, count)
    pivot, offset, variance, unit = lax.cond(
        jnp.isfinite(pivot).all(),
        lambda: (pivot, *_moments(spec, x, mask, pivot, count)),
        replaced,
    )
    _, offset, rstd, share = _finish(spec, pivot, offset, variance, unit, 1.0 / count)
    # The mean of nothing is 0, and its variance 1.
    none = valid == 0
    rstd = jnp.where(none, 1.0 / math.sqrt(1.0 + spec.epsilon), rstd)
    return _Numbers(jnp.where(none, 0, pivot), offset, rstd, jnp.where(none, 0, share))


def _finish(spec: Spec, pivot: Any, offset: Any, variance: Any, unit: Any, share: Any) -> _Numbers:
    root = math.sqrt(spec.epsilon) * unit
    # Rounding may leave a tiny negative; this way round, NaN stays NaN.
    variance = jnp.where(variance < 0, 0, variance) + root * root
    # Without an epsilon a constant group has nothing to divide by: any finite number will do.
    variance = jnp.where(variance == 0, 1, variance)
    return _Numbers(pivot, offset, unit / jnp.sqrt(variance), share)


def _pivot(spec: Spec, x: Any, mask: Any, count: Any) -> Any:
    """Return a number near the mean of each group, which is exact where all elements are equal.

    It is the first element, plus the mean deviation from it of a sample, or under a mask of all.
    """
    axis = spec.inner[0]
    if mask is None:
        sample = lax.slice_in_dim(x, 0, None, spec.stride, axis).astype(spec.dtype)
        (base,) = _settle(_first(spec, lax.index_in_dim(sample, 0, axis)))
        sums = (sample - jnp.expand_dims(base, axis)).sum(axis)
        count = spec.members * sample.shape[axis]
    else:
        first_valid = jnp.argmax(mask, axis=1).reshape(-1, 1, 1)
        first = jnp.take_along_axis(x, first_valid, axis=axis).astype(spec.dtype)
        (base,) = _settle(_first(spec, first))
        sums = _total(spec, _weighted(spec, _deviations(spec, x, base, PIVOT), mask, PIVOT))
    (pivot,) = _settle(base + _channels(spec, _groups(spec, sums) / count))
    return pivot


def _first(spec: Spec, position: Any) -> Any:
    """Return the first channel of each group, for all its channels."""
    return _channels(spec, position.reshape(spec.samples, spec.groups, spec.members)[..., 0])


def _moments(spec: Spec, x: Any, mask: Any, pivot: Any, count: Any) -> Any:
    """Return the mean from the pivot, and the variance in units of ``unit**-2``, and unit."""
    sums = _total(spec, _weighted(spec, _deviations(spec, x, pivot, SUM), mask, SUM))
    offset = _groups(spec, sums) / count

    def squares(unit: Any) -> Any:
        d = _weighted(spec, _deviations(spec, x, pivot, SQUARES), mask, SQUARES)
        if unit is not None:
            d = d * _spread(spec, _settle(_channels(spec, unit))[0], SQUARES)
        return _groups(spec, _total(spec, jnp.square(d)))

    def scaled() -> Any:
        d = _weighted(spec, _deviations(spec, x, pivot, SQUARES), mask, SQUARES)
        reach = lax.stop_gradient(jnp.abs(d)).max(spec.inner)
        reach = reach.reshape(spec.samples, spec.groups, spec.members).max(-1)
        least = max(math.sqrt(spec.epsilon), 4 * float(jnp.finfo(spec.dtype).smallest_normal))
        unit = 1 / jnp.where(reach > least, reach, least if spec.epsilon else 1)
        return squares(unit), unit

    if spec.epsilon < SAFE_EPSILON:
        m2, unit = scaled()
    else:
        plain = squares(None)
        # Squares overflow only in data of 1e18 and more (or with an inf or NaN in it).
        m2, unit = lax.cond(
            jnp.isfinite(plain).all(), lambda: (plain, jnp.ones_like(plain)), scaled
        )
    return offset, m2 / count - jnp.square(offset * unit), unit
