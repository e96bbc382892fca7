"""Loops over bands of rows, channels last, and their tables, compiled by numba.

A band is several rows of all channels, enough for long loops. Tables of the same length repeat each
per-channel value for every row. See ``channels_last.py``.

Sums take four bands at once, so that the totals are read and written once for all four; maps take
two. The bands processed together are a quarter, or half, of a chunk apart: memory is fast when it
is read in a few long streams. With neighbouring bands the streams were so short that it took four
times as long.
"""

import numpy as np

from groupnorm.backends.kernels.cpu.compiled.elements import (
    MAPS,
    activated,
    activation_vjp,
    bounded,
    clamp_masked,
    jit,
    load,
    store,
    store_gradient,
)

__all__ = [
    "add",
    "add_moments",
    "add_moments_of_four",
    "add_products",
    "add_products_of_four",
    "add_products_of_invalid",
    "add_rows",
    "apply",
    "apply_to_invalid",
    "apply_to_two",
    "input_gradient",
    "input_gradient_of_invalid",
    "input_gradient_of_two",
    "repeat_rows",
]

F, U = np.float32, np.uint64
# Masked-out results saturate here: an inf would make the gradients NaN, though its cotangent is 0.
LARGEST = F(3e38)


@jit(MAPS)
def add(x, a, n, base, total):
    """Add x - base to the total."""
    a = U(a)
    for i in range(n):
        total[i] += load(x, a + U(i)) - base[i]


@jit(MAPS)
def add_moments(x, a, n, centre, total, squares):
    """Add x - centre and its square to the totals."""
    a = U(a)
    for i in range(n):
        e = load(x, a + U(i)) - centre[i]
        total[i] += e
        squares[i] += e * e


@jit(MAPS)
def add_moments_of_four(x, a, b, c, d, centre, total, squares):
    """As `add_moments`, of four bands."""
    a, b, c, d = U(a), U(b), U(c), U(d)
    for i in range(total.size):
        k, j = centre[i], U(i)
        e, f, g, h = load(x, a + j) - k, load(x, b + j) - k, load(x, c + j) - k, load(x, d + j) - k
        total[i] += (e + f) + (g + h)
        squares[i] += (e * e + f * f) + (g * g + h * h)


@jit(MAPS)
def add_products(x, dy, a, n, centre, factor, term, activation, total, weighted):
    """Add g = `activation_vjp` of dy, and g * (x - centre), to the totals."""
    a = U(a)
    for i in range(n):
        d = load(x, a + U(i)) - centre[i]
        g = activation_vjp(d * factor[i] + term[i], load(dy, a + U(i)), activation)
        total[i] += g
        weighted[i] += g * d


@jit(MAPS)
def add_products_of_invalid(x, dy, a, n, centre, factor, term, activation, total, weighted):
    """As `add_products`, for a masked-out row."""
    a = U(a)
    for i in range(n):
        d = clamp_masked(load(x, a + U(i))) - centre[i]
        z = bounded(d * factor[i] + term[i], LARGEST)
        g = activation_vjp(z, load(dy, a + U(i)), activation)
        total[i] += g
        weighted[i] += g * d


@jit(MAPS)
def add_products_of_four(
    x, dy, a, b, c, d, centre, factor, term, activation, total, weighted
):  # fmt: skip
    """As `add_products`, of four bands."""
    a, b, c, d = U(a), U(b), U(c), U(d)
    for i in range(total.size):
        mean, f, t, j = centre[i], factor[i], term[i], U(i)
        p, q = load(x, a + j) - mean, load(x, b + j) - mean
        r, s = load(x, c + j) - mean, load(x, d + j) - mean
        k = activation_vjp(p * f + t, load(dy, a + j), activation)
        m = activation_vjp(q * f + t, load(dy, b + j), activation)
        n = activation_vjp(r * f + t, load(dy, c + j), activation)
        o = activation_vjp(s * f + t, load(dy, d + j), activation)
        total[i] += (k + m) + (n + o)
        weighted[i] += (k * p + m * q) + (n * r + o * s)


@jit(MAPS)
def apply(x, y, a, n, centre, factor, term, activation):
    """Apply y = activation((x - centre) * factor + term)."""
    a = U(a)
    for i in range(n):
        k = a + U(i)
        store(y, k, activated((load(x, k) - centre[i]) * factor[i] + term[i], activation))


@jit(MAPS)
def apply_to_invalid(x, y, a, n, centre, factor, term, activation):
    """As `apply`, to a masked-out row, whose values and results saturate."""
    a = U(a)
    for i in range(n):
        k = a + U(i)
        z = (clamp_masked(load(x, k)) - centre[i]) * factor[i] + term[i]
        store(y, k, activated(bounded(z, LARGEST), activation))


@jit(MAPS)
def apply_to_two(x, y, a, b, centre, factor, term, activation):
    """As `apply`, to two bands."""
    a, b = U(a), U(b)
    for i in range(centre.size):
        m, f, t, j, k = centre[i], factor[i], term[i], a + U(i), b + U(i)
        store(y, j, activated((load(x, j) - m) * f + t, activation))
        store(y, k, activated((load(x, k) - m) * f + t, activation))


@jit(MAPS)
def input_gradient(x, dy, dx, a, n, centre, factor, term, rstd, slope, offset, activation):
    """Store g * factor - ((x - centre) * rstd * slope + offset), g = `activation_vjp` of dy."""
    a = U(a)
    for i in range(n):
        k = a + U(i)
        d = load(x, k) - centre[i]
        g = activation_vjp(d * factor[i] + term[i], load(dy, k), activation)
        store_gradient(dx, k, g * factor[i] - (d * rstd[i] * slope[i] + offset[i]))


@jit(MAPS)
def input_gradient_of_two(x, dy, dx, a, b, centre, factor, term, rstd, slope, offset, activation):
    """As `input_gradient`, of two bands."""
    a, b = U(a), U(b)
    for i in range(centre.size):
        m, f, t, j, k = centre[i], factor[i], term[i], a + U(i), b + U(i)
        r, s, o = rstd[i], slope[i], offset[i]
        d, e = load(x, j) - m, load(x, k) - m
        g = activation_vjp(d * f + t, load(dy, j), activation)
        h = activation_vjp(e * f + t, load(dy, k), activation)
        store_gradient(dx, j, g * f - (d * r * s + o))
        store_gradient(dx, k, h * f - (e * r * s + o))


@jit(MAPS)
def input_gradient_of_invalid(x, dy, dx, a, n, centre, factor, term, activation):
    """As `input_gradient`, for a masked-out row: the statistics do not depend on it."""
    a = U(a)
    for i in range(n):
        k = a + U(i)
        value = load(x, k)
        z = (clamp_masked(value) - centre[i]) * factor[i] + term[i]
        g = activation_vjp(bounded(z, LARGEST), load(dy, k), activation) * factor[i]
        # A non-finite element was replaced by 0, and has no gradient.
        store_gradient(dx, k, g if value - value == 0 else F(0))


# Tables -------------------------------------------------------------------------------------------


@jit()
def add_rows(sums, channels, out):
    """Add a band's sums over its rows to `out`, in float64: one value per channel; clear them."""
    for at in range(0, sums.size, channels):
        for c in range(channels):
            k = U(at) + U(c)
            out[U(c)] += np.float64(sums[k])
            sums[k] = F(0)


@jit()
def repeat_rows(values, channels):
    """Copy the first row of a band to its other rows."""
    for at in range(channels, values.size, channels):
        for c in range(channels):
            values[at + c] = values[c]
