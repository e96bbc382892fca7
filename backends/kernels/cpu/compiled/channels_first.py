"""Group normalization for CPUs, channels first, compiled by numba: forward and backward.

Arrays are flat, of shape (N, groups, size, P) with P positions, so that a group is one contiguous
stretch. It is normalized right after it was measured, while it is still in the cache. The groups of
all samples are the tasks that threads share, see ``work_sharing.py``.

A stretch is read once for its statistics, in blocks of `BLOCK` elements. A block is measured about
the mean of the previous one, and, only if that turns out to be far from its own mean
(`centre_is_poor`), again about its own. Blocks are merged in float64 by the formula of Chan, Golub
and LeVeque. So no data can mislead a pivot, and the order of operations depends on the shape alone.

`mean`, `rstd` and `inv_count` (1 / count) of each group are kept in float64; elements are
normalized by the pair (mean rounded to float32, the remainder).

Loops over elements are separate functions, which take whole arrays and an offset: for short rows,
slices would cost more than the loop. Offsets are unsigned, or numba would check for every element
whether the index is negative.
"""

import numpy as np

from groupnorm.backends.kernels.cpu.compiled.elements import (
    MAPS,
    SUMS,
    activated,
    activation_vjp,
    invalid_deviation,
    is_float32,
    jit,
    load,
    store,
    store_gradient,
)
from groupnorm.backends.kernels.cpu.compiled.moments import (
    MAX_VARIANCE,
    MIN_VARIANCE,
    centre_is_poor,
    finite_float32,
    in_float64,
    invalid_limit,
    inverse_deviation,
    mask_begins,
    merged,
    samples_of,
    sum_spans,
)
from groupnorm.backends.kernels.cpu.compiled.work_sharing import (
    claim_part,
    claim_task,
    finish,
    wait,
)

__all__ = ["channels_first_backward", "channels_first_forward"]

F, U = np.float32, np.uint64

BLOCK = 2048
# The number of elements whose mean is the centre of the first block.
SAMPLE = 64
# Rows of fewer positions are not a multiple of many vectors.
SHORT_ROW = 128
# The least elements of one claim.
GRAIN = 16384


# Loops over elements ------------------------------------------------------------------------------


@jit(SUMS)
def _sum(x, at, n, base):
    """Sum of x - base."""
    at, total = U(at), F(0)
    for i in range(n):
        total += load(x, at + U(i)) - base
    return total


@jit(SUMS)
def _moments(x, at, n, centre):
    """Sums of x - centre and of its square."""
    at, total, squares = U(at), F(0), F(0)
    for i in range(n):
        d = load(x, at + U(i)) - centre
        total += d
        squares += d * d
    return total, squares


@jit(SUMS)
def _masked_moments(x, at, n, mask, mask_at, centre):
    """As `_moments`, of the elements whose mask is not 0, and their number."""
    at, mask_at = U(at), U(mask_at)
    total, squares, count = F(0), F(0), F(0)
    for i in range(n):
        valid = mask[mask_at + U(i)] != 0
        d = load(x, at + U(i)) - centre if valid else F(0)
        total += d
        squares += d * d
        count += F(1) if valid else F(0)
    return total, squares, count


@jit(MAPS)
def _apply(x, y, at, n, centre, factor, term, activation):
    at = U(at)
    for i in range(n):
        k = at + U(i)
        store(y, k, activated((load(x, k) - centre) * factor + term, activation))


@jit(MAPS)
def _activate(y, at, n, activation):
    at = U(at)
    for i in range(n):
        k = at + U(i)
        store(y, k, activated(load(y, k), activation))


@jit(MAPS)
def _masked_apply(x, y, at, n, mask, mask_at, centre, limit, factor, term, activation):
    at, mask_at = U(at), U(mask_at)
    for i in range(n):
        k = at + U(i)
        value = load(x, k)
        valid = mask[mask_at + U(i)] != 0
        d = value - centre if valid else invalid_deviation(value, centre, limit)
        store(y, k, activated(d * factor + term, activation))


@jit(SUMS)
def _products(x, dy, at, n, centre, factor, term, activation):
    """Sums of g = `activation_vjp` of dy, and of g * (x - centre)."""
    at, total, weighted = U(at), F(0), F(0)
    for i in range(n):
        d = load(x, at + U(i)) - centre
        g = activation_vjp(d * factor + term, load(dy, at + U(i)), activation)
        total += g
        weighted += g * d
    return total, weighted


@jit(SUMS)
def _masked_products(x, dy, at, n, mask, mask_at, centre, limit, factor, term, activation):
    at, mask_at, total, weighted = U(at), U(mask_at), F(0), F(0)
    for i in range(n):
        value, valid = load(x, at + U(i)), mask[mask_at + U(i)] != 0
        d = value - centre if valid else invalid_deviation(value, centre, limit)
        g = activation_vjp(d * factor + term, load(dy, at + U(i)), activation)
        total += g
        weighted += g * d
    return total, weighted


@jit(MAPS)
def _input_gradient(x, dy, dx, at, n, centre, factor, term, rstd, slope, offset, activation):
    """Store g * factor - ((x - centre) * rstd * slope + offset), g = `activation_vjp` of dy."""
    at = U(at)
    for i in range(n):
        k = at + U(i)
        d = load(x, k) - centre
        g = activation_vjp(d * factor + term, load(dy, k), activation)
        store_gradient(dx, k, g * factor - (d * rstd * slope + offset))


@jit(MAPS)
def _masked_input_gradient(
    x, dy, dx, at, n, mask, mask_at, centre, limit, factor, term, rstd, slope, offset, activation
):  # fmt: skip
    """As `_input_gradient`; the statistics depend only on elements whose mask is not 0."""
    at, mask_at = U(at), U(mask_at)
    for i in range(n):
        k = at + U(i)
        value = load(x, k)
        valid = mask[mask_at + U(i)] != 0
        d = value - centre if valid else invalid_deviation(value, centre, limit)
        g = activation_vjp(d * factor + term, load(dy, k), activation)
        through = d * rstd * slope + offset if valid else F(0)
        # A non-finite element was replaced by 0, and has no gradient.
        store_gradient(dx, k, g * factor - through if valid or value - value == 0 else F(0))


# Statistics ---------------------------------------------------------------------------------------


@jit()
def _block(x, at, n, pivot):
    """Return a centre near the mean of a block, and the block's moments about it."""
    total, squares = _moments(x, at, n, pivot)
    if centre_is_poor(total, total / F(n), squares):
        # Relative to the pivot, so that the mean of equal values is exactly that value.
        pivot += _sum(x, at, n, pivot) / F(n)
        total, squares = _moments(x, at, n, pivot)
    return pivot, total, squares


@jit()
def _measure(x, start, stop):
    """Return count, mean and variance of a contiguous stretch."""
    count, mean, m2 = 0.0, 0.0, 0.0
    first = load(x, U(start))
    pivot = first + _sum(x, start, min(SAMPLE, stop - start), first) / F(min(SAMPLE, stop - start))
    for at in range(start, stop, BLOCK):
        n = min(BLOCK, stop - at)
        pivot, total, squares = _block(x, at, n, pivot)
        count, mean, m2 = merged(
            count, mean, m2, float(n), np.float64(pivot), np.float64(total), np.float64(squares)
        )
        pivot += total / F(n)
    variance = m2 / count
    if not MIN_VARIANCE <= variance <= MAX_VARIANCE:
        return in_float64(x, start, 1, 0, stop - start, None, 0, False)
    return count, mean, variance


@jit(inline=False)
def _measure_masked(x, start, size, positions, mask, mask_at):
    """As `_measure`, of `size` channels, at the positions whose mask is not 0."""
    count, mean, m2 = 0.0, 0.0, 0.0
    pivot = F(0)
    for channel in range(size):
        for begin in range(0, positions, BLOCK):
            n = min(BLOCK, positions - begin)
            at, valid_at = start + channel * positions + begin, mask_at + begin
            total, squares, valid = _masked_moments(x, at, n, mask, valid_at, pivot)
            if valid == 0:
                continue
            if centre_is_poor(total, total / valid, squares) or count == 0 or total - total != 0:
                # Again about a valid element, then about the mean.
                pivot = _first_valid(x, at, n, mask, valid_at)
                pivot += _masked_moments(x, at, n, mask, valid_at, pivot)[0] / valid
                total, squares, valid = _masked_moments(x, at, n, mask, valid_at, pivot)
            count, mean, m2 = merged(
                count, mean, m2, np.float64(valid), np.float64(pivot), np.float64(total),
                np.float64(squares),
            )  # fmt: skip
            pivot += total / valid
    if count == 0:
        return 0.0, 0.0, 1.0
    variance = m2 / count
    if not MIN_VARIANCE <= variance <= MAX_VARIANCE:
        return in_float64(x, start, size, positions, positions, mask, mask_at, False)
    return count, mean, variance


@jit()
def _first_valid(x, at, n, mask, mask_at):
    for i in range(n):
        if mask[mask_at + i]:
            return load(x, U(at + i))
    return F(0)


# Kernels ------------------------------------------------------------------------------------------


@jit()
def _statistics(x, start, size, positions, mask, mask_at):
    if mask is None:
        return _measure(x, start, start + size * positions)
    if positions == 1:  # all of the group or nothing
        if mask[mask_at]:
            return _measure(x, start, start + size)
        return 0.0, 0.0, 1.0
    return _measure_masked(x, start, size, positions, mask, mask_at)


@jit(inline=False)
def channels_first_forward(
    x, y, scale, bias, mask, groups, size, positions, samples, epsilon, activation, mean, rstd,
    inv_count, parts, counters,
):  # fmt: skip
    """Measure and normalize the groups of all samples.

    The statistics have one row of groups per sample, or one per thread that it uses again.
    """
    stretch, tasks, keep = size * positions, samples * groups, mean.size == samples * groups
    grain = max(1, GRAIN // stretch)
    claims, own_part = (tasks + grain - 1) // grain, claim_part(counters, 0, parts)
    while True:
        claim = claim_task(counters, 2, parts, claims, own_part)
        if claim < 0:
            break
        for task in range(claim * grain, min((claim + 1) * grain, tasks)):
            start, mask_at = task * stretch, mask_begins(mask, task // groups, positions)
            count, m, variance = _statistics(x, start, size, positions, mask, mask_at)
            r = inverse_deviation(variance, epsilon)
            k = task if keep else own_part * groups + task % groups
            mean[k], rstd[k], inv_count[k] = m, r, 1.0 / count if count > 0 else 0.0
            centre = F(m)
            rest = m - np.float64(centre)
            # An activation takes as long for the rest of a short row as for a vector: then it is
            # computed for the whole group at once, which is still in the cache.
            apart = is_float32(y) and len(activation) > 0 and mask is None and positions < SHORT_ROW
            for channel in range(size):
                c = task % groups * size + channel
                factor = finite_float32(r * scale[c])
                term = F(bias[c] - rest * r * scale[c])
                at = start + channel * positions
                if apart:
                    _apply(x, y, at, positions, centre, factor, term, ())
                elif mask is None:
                    _apply(x, y, at, positions, centre, factor, term, activation)
                else:
                    _masked_apply(
                        x, y, at, positions, mask, mask_at, centre, invalid_limit(factor), factor,
                        term, activation,
                    )  # fmt: skip
            if apart:
                _activate(y, start, stretch, activation)
        finish(counters, 1, 1)
    wait(counters, 1, claims)


@jit()
def _sums(
    x, dy, at, positions, mask, mask_at, centre, factor, term, activation
):  # fmt: skip
    """Sum g and g * (x - centre) over a channel's positions; blocks are added in float64."""
    total, weighted = 0.0, 0.0
    for begin in range(0, positions, BLOCK):
        n = min(BLOCK, positions - begin)
        if mask is None:
            s, w = _products(x, dy, at + begin, n, centre, factor, term, activation)
        else:
            s, w = _masked_products(
                x, dy, at + begin, n, mask, mask_at + begin, centre, invalid_limit(factor), factor,
                term, activation,
            )  # fmt: skip
        total += np.float64(s)
        weighted += np.float64(w)
    return total, weighted


@jit(inline=False)
def channels_first_backward(
    x, dx, scale, bias, mask, groups, size, positions, samples, span, activation, mean, rstd,
    inv_count, dy, sums, batches, dscale, dbias, parts, counters,
):  # fmt: skip
    """Compute dx, dscale and dbias.

    sums (2, spans, channels) receives the sums of dy and of dy * xhat over the positions of a span
    of samples, in float64; dscale and dbias (batches, channels) receive their sums over the spans
    of each batch. A task is a group of all samples of a span.
    """
    stretch, channels = size * positions, groups * size
    tasks = sums.size // (2 * size)
    sum_dy, sum_dy_xhat = sums[: tasks * size], sums[tasks * size :]
    grain = max(1, GRAIN // (stretch * span))
    claims, own_part = (tasks + grain - 1) // grain, claim_part(counters, 0, parts)
    while True:
        claim = claim_task(counters, 2, parts, claims, own_part)
        if claim < 0:
            break
        for task in range(claim * grain, min((claim + 1) * grain, tasks)):
            group = task % groups
            begin, end = samples_of(task // groups, span, samples, batches)
            sum_dy[task * size : (task + 1) * size] = 0.0
            sum_dy_xhat[task * size : (task + 1) * size] = 0.0
            for sample in range(begin, end):
                row = sample * groups + group
                start, mask_at = row * stretch, mask_begins(mask, sample, positions)
                m, r, share = mean[row], rstd[row], inv_count[row]
                centre = F(m)
                rest = m - np.float64(centre)
                p, q = 0.0, 0.0
                for channel in range(size):
                    c, k = group * size + channel, task * size + channel
                    total, weighted = _sums(
                        x, dy, start + channel * positions, positions, mask, mask_at, centre,
                        finite_float32(r * scale[c]), F(bias[c] - rest * r * scale[c]), activation,
                    )  # fmt: skip
                    weighted = (weighted - rest * total) * r
                    sum_dy[k] += total
                    sum_dy_xhat[k] += weighted
                    p += scale[c] * total * share
                    q += scale[c] * weighted * share
                # (p + xhat * q) * rstd with xhat = (x - centre - rest) * rstd
                rounded, slope, offset = (
                    finite_float32(r),
                    finite_float32(r * q),
                    finite_float32(r * (p - rest * r * q)),
                )
                for channel in range(size):
                    c, at = group * size + channel, start + channel * positions
                    factor, term = finite_float32(r * scale[c]), F(bias[c] - rest * r * scale[c])
                    if mask is None:
                        _input_gradient(
                            x, dy, dx, at, positions, centre, factor, term, rounded, slope, offset,
                            activation,
                        )  # fmt: skip
                    else:
                        _masked_input_gradient(
                            x, dy, dx, at, positions, mask, mask_at, centre,
                            invalid_limit(factor), factor, term, rounded, slope, offset, activation,
                        )  # fmt: skip
        if finish(counters, 1, 1) == claims:
            sum_spans(sums, batches, channels, dscale, dbias)
            finish(counters, 1, 1)
    wait(counters, 1, claims + 1)
