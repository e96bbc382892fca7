"""What both layouts share: merging measured blocks, wide numbers, what is made of a variance."""

import math

import numpy as np

from groupnorm.backends.kernels.cpu.compiled.elements import jit, load

__all__ = [
    "LEAST",
    "MOST",
    "centre_is_poor",
    "finite_float32",
    "in_float64",
    "inverse_deviation",
    "mask_begins",
    "merged",
    "sum_samples",
]

# A variance outside of these may have come of squares that left float32's range.
LEAST, MOST = 1e-30, 1e30


@jit()
def mask_begins(mask, sample, positions):
    """Return where a sample's mask begins in all that are given; it may be one for all samples."""
    return 0 if mask is None or mask.size == positions else sample * positions


@jit()
def centre_is_poor(total, mean, squares):
    """Whether the centre of moments lies more than two deviations from the mean.

    Of the deviations from that centre these are the sum, the mean, and the sum of squares.

    Then what is left of `squares` when the centre's distance is taken out has lost digits, and they
    are to be taken again around the mean.
    """
    return total * mean > 0.8 * squares


@jit()
def merged(count, mean, m2, n, centre, total, squares):
    """Merge a block into count, mean and M2: n elements, and their moments about a centre."""
    shift = total / n
    block_m2 = squares - total * shift
    if block_m2 < 0:  # this way round NaN stays NaN
        block_m2 = 0.0
    delta = (centre + shift) - mean
    weight = n / (count + n)
    return count + n, mean + delta * weight, m2 + block_m2 + delta * delta * (count * weight)


@jit(apart=True)
def in_float64(x, start, rows, stride, length, mask, mask_at, mask_is_of_rows):
    """Return count, mean and variance, in float64: for squares that leave float32's range.

    Of `rows` rows of `length` elements, the first of which lie `stride` apart; the mask is of the
    rows, or of the elements of each.
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
    return count, mean, 0.0 if variance < 0 else variance  # NaN stays NaN


@jit()
def inverse_deviation(variance, epsilon):
    """1 / sqrt(variance + epsilon), in float64, where no square of a float32 leaves the range."""
    total = variance + epsilon
    return 1.0 / math.sqrt(total) if total != 0 else 1.0  # a constant, and no epsilon: any number


@jit()
def finite_float32(value):
    """Round to float32 a factor that shall stay finite: inf * 0 would make a NaN of a constant."""
    if abs(value) > 3e38:
        return np.float32(math.copysign(3e38, value))
    return np.float32(value)


@jit(apart=True)
def sum_samples(sums, samples, batches, channels, dscale, dbias):
    """Sum those of dy, and then of dy * xhat, over the samples of each batch, into gradients."""
    each = samples // batches
    for batch in range(batches):
        for c in range(channels):
            bias, scale = 0.0, 0.0
            for sample in range(batch * each, (batch + 1) * each):
                bias += sums[sample * channels + c]
                scale += sums[(samples + sample) * channels + c]
            dbias[batch * channels + c] = np.float32(bias)
            dscale[batch * channels + c] = np.float32(scale)
