"""Statistics for both layouts: merging blocks, the float64 fallback, 1 / standard deviation."""

import math

import numpy as np

from groupnorm.backends.kernels.cpu.compiled.elements import jit, load

__all__ = [
    "MAX_VARIANCE",
    "MIN_VARIANCE",
    "centre_is_poor",
    "finite_float32",
    "in_float64",
    "invalid_limit",
    "inverse_deviation",
    "mask_begins",
    "merged",
    "samples_of",
    "sum_spans",
]

# A variance outside this range may come from squares that over- or underflowed in float32.
MIN_VARIANCE, MAX_VARIANCE = 1e-30, 1e30
# The square of the smallest normal float32. The factors of smaller deviations overflow float32.
NO_VARIANCE = 2.0**-252


@jit()
def mask_begins(mask, sample, positions):
    """Return the offset of a sample's mask; all samples may have the same one."""
    return 0 if mask is None or mask.size == positions else sample * positions


@jit()
def centre_is_poor(total, mean, squares):
    """Whether moments were taken about a centre more than two standard deviations from the mean.

    The arguments are the sum, the mean and the sum of squares of the deviations from that centre.
    Then subtracting the centre's distance from `squares` cancels digits, and the moments must be
    taken again about the mean.
    """
    return total * mean > 0.8 * squares


@jit()
def merged(count, mean, m2, n, centre, total, squares):
    """Merge a block of n elements, given their moments about a centre, into count, mean and M2."""
    shift = total / n
    block_m2 = squares - total * shift
    if block_m2 < 0:  # this comparison keeps NaN
        block_m2 = 0.0
    delta = (centre + shift) - mean
    weight = n / (count + n)
    return count + n, mean + delta * weight, m2 + block_m2 + delta * delta * (count * weight)


@jit(inline=False)
def in_float64(x, start, rows, stride, length, mask, mask_at, mask_is_of_rows):
    """Return count, mean and variance, computed in float64, for squares outside float32's range.

    The elements are `rows` rows of `length` elements, `stride` apart; the mask has one value for
    each row, or for each element of a row.
    """
    count, total, squares, base, mean = 0.0, 0.0, 0.0, 0.0, 0.0
    for round_ in range(2):
        count, total = 0.0, 0.0
        for row in range(rows):
            for i in range(length):
                if mask is None or mask[mask_at + (row if mask_is_of_rows else i)]:
                    value = np.float64(load(x, np.uint64(start + row * stride + i)))
                    if round_ == 0 and count == 0:
                        base = value
                    d = value - (base if round_ == 0 else mean)
                    count += 1.0
                    total += d
                    squares += d * d if round_ == 1 else 0.0
        if round_ == 0:
            mean = base + total / count
    variance = (squares - total * (total / count)) / count
    return count, mean, 0.0 if variance < 0 else variance  # keeps NaN


@jit()
def inverse_deviation(variance, epsilon):
    """1 / sqrt(variance + epsilon), in float64, where squares of float32 values stay in range."""
    total = variance + epsilon
    # Constant data without an epsilon: any value. This comparison keeps NaN.
    return 1.0 if total < NO_VARIANCE else 1.0 / math.sqrt(total)


@jit()
def finite_float32(value):
    """Round a factor to finite float32: inf * 0 would make constant data NaN."""
    if abs(value) > 3e38:
        return np.float32(math.copysign(3e38, value))
    return np.float32(value)


@jit()
def samples_of(number, span, samples, batches):
    """Return the first sample of a span, and the one after its last; no span has two batches."""
    each = samples // batches
    spans = (each + span - 1) // span
    begin = number // spans * each
    return begin + number % spans * span, begin + min(each, (number % spans + 1) * span)


@jit()
def invalid_limit(factor):
    """Return the limit of a masked-out deviation, whose product with the factor stays finite.

    An inf would make gradients NaN, though its cotangent is 0.
    """
    return np.float32(min(5e33, 1e38 / max(abs(np.float64(factor)), 1.0)))


@jit(inline=False)
def sum_spans(sums, batches, channels, dscale, dbias):
    """Sum `sums`, of dy and of dy * xhat, over the spans of each batch, into the gradients."""
    spans = sums.size // (2 * channels)
    each = spans // batches
    for batch in range(batches):
        for c in range(channels):
            bias, scale = 0.0, 0.0
            for span in range(batch * each, (batch + 1) * each):
                bias += sums[span * channels + c]
                scale += sums[(spans + span) * channels + c]
            dbias[batch * channels + c] = np.float32(bias)
            dscale[batch * channels + c] = np.float32(scale)
