"""What both layouts share: merging measured blocks, and what is made of a variance."""

import math

import numpy as np

from groupnorm.backends.kernels.numba_numbers import jit

__all__ = ["LEAST", "MOST", "bounded", "inverse_deviation", "is_off", "merged"]

# A variance outside of these may have come of squares that left float32's range.
LEAST, MOST = 1e-30, 1e30


@jit()
def is_off(total, mean, squares):
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


@jit()
def inverse_deviation(variance, epsilon):
    """1 / sqrt(variance + epsilon), in float64, where no square of a float32 leaves the range."""
    total = variance + epsilon
    return 1.0 / math.sqrt(total) if total != 0 else 1.0  # a constant, and no epsilon: any number


@jit()
def bounded(value):
    """Round to float32 a factor that shall stay finite: inf * 0 would make a NaN of a constant."""
    if abs(value) > 3e38:
        return np.float32(math.copysign(3e38, value))
    return np.float32(value)
