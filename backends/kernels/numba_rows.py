"""Loops over one contiguous row, compiled by numba: what the kernels in `numba_cpu` are made of.

Each is a function of its own, which LLVM turns into vector code; the same loops nested in one
function ran three times slower. Rows are float32, and sums run over at most `BLOCK` elements;
`reassoc` lets them be vectors, in an order that depends on nothing but the length. No flag assumes
that there is no NaN.

float16 and bfloat16 come as their bits (uint16), and a flag says which of the two; rows of them are
converted to float32 in a buffer that stays in the cache.
"""

import math
import platform

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable

__all__ = [
    "BLOCK",
    "activate",
    "add_moments_row",
    "add_moments_rows",
    "add_products_row",
    "add_row",
    "add_rows",
    "affine",
    "affine_rows",
    "cotangent",
    "has_float16",
    "jit",
    "load",
    "masked_moments",
    "masked_sum",
    "moments",
    "products",
    "pull_back",
    "pull_back_masked",
    "pull_back_rows",
    "store",
    "substitute",
    "substitute_row",
    "sum_from",
    "target",
    "zero_unless_counted",
    "zero_unless_finite",
]

BLOCK = 2048

SUMS = {"reassoc", "contract", "nsz"}
MAPS = {"contract", "nsz"}


def jit(flags=MAPS):
    """Compile once, for all processes; other threads run meanwhile."""
    return numba.njit(
        cache=True, nogil=True, fastmath=flags, error_model="numpy", boundscheck=False
    )


# Half precision -----------------------------------------------------------------------------------


def has_float16() -> bool:
    """Whether this CPU converts float16; without it LLVM calls functions numba does not have."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(binding.get_host_cpu_features().get("f16c", False))
    return platform.machine().lower() in ("arm64", "aarch64")


@intrinsic
def _from_float16(typing_context, bits):
    def code(context, builder, signature, arguments):
        half = builder.bitcast(arguments[0], ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.uint16), code


@intrinsic
def _to_float16(typing_context, value):
    def code(context, builder, signature, arguments):
        half = builder.fptrunc(arguments[0], ir.HalfType())
        return builder.bitcast(half, ir.IntType(16))

    return types.uint16(types.float32), code


@intrinsic
def _float_of_bits(typing_context, bits):
    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), code


@intrinsic
def _bits_of_float(typing_context, value):
    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), code


@jit()
def _widen_float16(bits, row):
    for i in range(bits.size):
        row[i] = _from_float16(bits[i])


@jit()
def _widen_bfloat16(bits, row):
    for i in range(bits.size):
        row[i] = _float_of_bits(np.uint32(bits[i]) << np.uint32(16))


@jit()
def _narrow_float16(row, bits):
    for i in range(bits.size):
        bits[i] = _to_float16(row[i])


@jit()
def _narrow_bfloat16(row, bits):
    """Round to nearest, ties to even; a NaN stays one, whatever its payload."""
    for i in range(bits.size):
        b = _bits_of_float(row[i])
        rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (b >> np.uint32(16)) | np.uint32(0x40)
        nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        bits[i] = np.uint16(quiet if nan else rounded)


def _load(x, start, stop, float16, buffer):
    raise NotImplementedError


@overload(_load)
def _load_overload(x, start, stop, float16, buffer):
    if isinstance(x.dtype, types.Float):
        return lambda x, start, stop, float16, buffer: x[start:stop]

    def widened(x, start, stop, float16, buffer):
        row = buffer[: stop - start]
        if float16:
            _widen_float16(x[start:stop], row)
        else:
            _widen_bfloat16(x[start:stop], row)
        return row

    return widened


@register_jitable
def load(x, start, stop, float16, buffer):
    """Return a row of floats: x's own, or its halves widened into the buffer."""
    return _load(x, start, stop, float16, buffer)


def _target(y, start, stop, buffer):
    raise NotImplementedError


@overload(_target)
def _target_overload(y, start, stop, buffer):
    if isinstance(y.dtype, types.Float):
        return lambda y, start, stop, buffer: y[start:stop]
    return lambda y, start, stop, buffer: buffer[: stop - start]


@register_jitable
def target(y, start, stop, buffer):
    """Return where to write a row of y: itself, or the buffer that `store` narrows."""
    return _target(y, start, stop, buffer)


def _store(row, y, start, stop, float16):
    raise NotImplementedError


@overload(_store)
def _store_overload(row, y, start, stop, float16):
    if isinstance(y.dtype, types.Float):
        return lambda row, y, start, stop, float16: None

    def narrowed(row, y, start, stop, float16):
        if float16:
            _narrow_float16(row, y[start:stop])
        else:
            _narrow_bfloat16(row, y[start:stop])

    return narrowed


@register_jitable
def store(row, y, start, stop, float16):
    """Bring what was written to `target` to y, where it is not there yet."""
    _store(row, y, start, stop, float16)


# Sums ---------------------------------------------------------------------------------------------


@jit(SUMS)
def sum_from(x, base):
    """Sum of x - base."""
    total = x.dtype.type(0)
    for i in range(x.size):
        total += x[i] - base
    return total


@jit(SUMS)
def moments(x, centre):
    """Sums of x - centre and of its square."""
    total = x.dtype.type(0)
    squares = x.dtype.type(0)
    for i in range(x.size):
        d = x[i] - centre
        total += d
        squares += d * d
    return total, squares


@jit(SUMS)
def masked_sum(x, mask, base):
    """Sum of x - base, and the number of elements, where the mask is not 0."""
    total = x.dtype.type(0)
    count = 0
    for i in range(x.size):
        total += x[i] - base if mask[i] else x.dtype.type(0)
        count += mask[i]
    return total, count


@jit(SUMS)
def masked_moments(x, mask, centre):
    """As `moments`, where the mask is not 0."""
    total = x.dtype.type(0)
    squares = x.dtype.type(0)
    for i in range(x.size):
        d = x[i] - centre if mask[i] else x.dtype.type(0)
        total += d
        squares += d * d
    return total, squares


@jit(SUMS)
def products(dy, x, centre):
    """Sums of dy and of dy * (x - centre)."""
    total = x.dtype.type(0)
    weighted = x.dtype.type(0)
    for i in range(x.size):
        total += dy[i]
        weighted += dy[i] * (x[i] - centre)
    return total, weighted


# Sums for each channel, over rows of all channels -------------------------------------------------


@jit()
def add_row(a, base, total):
    """Add a - base to the total."""
    for i in range(a.size):
        total[i] += a[i] - base[i]


@jit()
def add_rows(a, b, c, d, base, total):
    """Add four rows at once: the totals are read and written once."""
    for i in range(a.size):
        k = base[i]
        total[i] += ((a[i] - k) + (b[i] - k)) + ((c[i] - k) + (d[i] - k))


@jit()
def add_moments_row(a, centre, total, squares):
    """Add a - centre and its square to the totals."""
    for i in range(a.size):
        e = a[i] - centre[i]
        total[i] += e
        squares[i] += e * e


@jit()
def add_moments_rows(a, b, c, d, centre, total, squares):
    """As `add_moments_row`, four rows at once."""
    for i in range(a.size):
        k = centre[i]
        e, f, g, h = a[i] - k, b[i] - k, c[i] - k, d[i] - k
        total[i] += (e + f) + (g + h)
        squares[i] += (e * e + f * f) + (g * g + h * h)


@jit()
def add_products_row(dy, x, centre, total, weighted):
    """Add dy and dy * (x - centre) to the totals."""
    for i in range(x.size):
        total[i] += dy[i]
        weighted[i] += dy[i] * (x[i] - centre[i])


@jit()
def substitute_row(x, out):
    """As `substitute`, of a row that is masked out as a whole."""
    limit = x.dtype.type(5e33)
    for i in range(x.size):
        v = x[i]
        out[i] = min(max(v, -limit), limit) if v - v == 0 else x.dtype.type(0)


@jit()
def zero_unless_finite(x, dx):
    """As `zero_unless_counted`, of such a row."""
    for i in range(x.size):
        dx[i] = dx[i] if x[i] - x[i] == 0 else x.dtype.type(0)


# Maps ---------------------------------------------------------------------------------------------


@jit()
def substitute(x, mask, out):
    """Copy x, but what is masked out is brought to a finite number, which no product spoils."""
    limit = x.dtype.type(5e33)
    for i in range(x.size):
        v = x[i]
        # Of a NaN no comparison holds; inf - inf is one.
        finite = v - v == 0
        bounded = min(max(v, -limit), limit) if finite else x.dtype.type(0)
        out[i] = v if mask[i] else bounded


@jit()
def zero_unless_counted(x, mask, dx):
    """Clear the gradients of the numbers `substitute` took as 0."""
    for i in range(x.size):
        counted = mask[i] != 0 or x[i] - x[i] == 0
        dx[i] = dx[i] if counted else x.dtype.type(0)


@jit()
def affine(x, centre, factor, term, y):
    """(x - centre) * factor + term, for one channel."""
    for i in range(x.size):
        y[i] = (x[i] - centre) * factor + term


@jit()
def affine_rows(x, centre, factor, term, y):
    """(x - centre) * factor + term, each element of a channel of its own."""
    for i in range(x.size):
        y[i] = (x[i] - centre[i]) * factor[i] + term[i]


@jit()
def pull_back(x, dy, centre, rstd, shift, factor, slope, offset, dx):
    """Dy * factor - (xhat * slope + offset) with xhat = (x - centre) * rstd - shift."""
    for i in range(x.size):
        xhat = (x[i] - centre) * rstd - shift
        dx[i] = dy[i] * factor - (xhat * slope + offset)


@jit()
def pull_back_masked(x, dy, mask, centre, rstd, shift, factor, slope, offset, dx):
    """As `pull_back`, but only where the mask is not 0 does x act through the statistics."""
    for i in range(x.size):
        xhat = (x[i] - centre) * rstd - shift
        through = xhat * slope + offset
        dx[i] = dy[i] * factor - (through if mask[i] else x.dtype.type(0))


@jit()
def pull_back_rows(x, dy, valid, centre, rstd, shift, factor, slope, offset, dx):
    """As `pull_back`, each element of a channel of its own; `valid` is 1 or 0 for all of them."""
    for i in range(x.size):
        xhat = (x[i] - centre[i]) * rstd[i] - shift[i]
        dx[i] = dy[i] * factor[i] - valid * (xhat * slope[i] + offset[i])


@jit()
def _exp(x):
    """Exp in float32, of numbers up to 0, within about an ulp, in code that LLVM vectorises.

    Cody and Waite's reduction, and the polynomial of Cephes' expf.
    """
    x = max(x, np.float32(-87.0))
    n = np.float32(math.floor(x * np.float32(1.44269504088896341) + np.float32(0.5)))
    r = x - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * _float_of_bits(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@jit()
def _sigmoid(x):
    e = _exp(-abs(x))  # never overflows; NaN stays NaN below
    s = np.float32(1) / (np.float32(1) + e)
    return s if x >= 0 else (e * s if x < 0 else x)


@jit()
def _silu(y):
    for i in range(y.size):
        y[i] = y[i] * _sigmoid(y[i])


@jit()
def _relu(y):
    for i in range(y.size):
        y[i] = y.dtype.type(0) if y[i] < 0 else y[i]  # NaN stays NaN


@jit()
def _gelu(y):
    for i in range(y.size):
        # erfc, which does not cancel for negative numbers.
        y[i] = 0.5 * y[i] * math.erfc(-0.7071067811865476 * y[i])


@register_jitable
def activate(y, activation):
    """Apply an activation to a row, in place: 1 is relu, 2 silu, 3 gelu."""
    if activation == 1:
        _relu(y)
    elif activation == 2:
        _silu(y)
    elif activation == 3:
        _gelu(y)


@jit()
def _silu_slope(z, dy, out):
    for i in range(z.size):
        s = _sigmoid(z[i])
        out[i] = dy[i] * (s * (1 + z[i] * (1 - s)))


@jit()
def _relu_slope(z, dy, out):
    for i in range(z.size):
        out[i] = dy[i] if z[i] > 0 else z.dtype.type(0)


@jit()
def _gelu_slope(z, dy, out):
    for i in range(z.size):
        cdf = 0.5 * math.erfc(-0.7071067811865476 * z[i])
        out[i] = dy[i] * (cdf + z[i] * 0.3989422804014327 * math.exp(-0.5 * z[i] * z[i]))


@register_jitable
def cotangent(z, dy, activation, out):
    """Pull dy back through the activation at z, into `out`."""
    if activation == 1:
        _relu_slope(z, dy, out)
    elif activation == 2:
        _silu_slope(z, dy, out)
    else:
        _gelu_slope(z, dy, out)
