"""Elements and activations in Triton; all values are float32.

Exponentials and reciprocals are the GPU's own instructions. Their errors are at most 2**-22 and
2**-23 (PTX ISA, ``ex2.approx`` and ``rcp.approx``), as those of what Triton makes of ``tl.exp``
and of divisions, which take several instructions more for subnormal numbers. In activations a
subnormal number is as good as 0.
"""

import os

import triton
import triton.language as tl

from groupnorm.backends.kernels.erfc import ERFC_POWERS

__all__ = [
    "GELU",
    "RELU",
    "SILU",
    "activated",
    "activation_vjp",
    "clamp_masked",
    "clamp_normalized",
    "finite",
    "gradient_of_x",
    "normalized",
    "pulled_back",
    "unit_for",
]

# The interpreter knows no instructions of GPUs.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# The numbers in `variants.ACTIVATIONS`; 0 is no activation.
RELU = tl.constexpr(1)
SILU = tl.constexpr(2)
GELU = tl.constexpr(3)

_LOG2_E = tl.constexpr(1.4426950408889634)
(_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7, _P8, _P9, _P10, _P11) = map(tl.constexpr, ERFC_POWERS)


@triton.jit
def finite(value):
    """Whether a value is neither infinite nor NaN."""
    return tl.abs(value) < float("inf")


@triton.jit
def clamp_masked(value):
    """Clamp a masked-out value so that products stay finite; map NaN and inf to 0."""
    bounded = tl.minimum(tl.maximum(value, -5e33), 5e33)
    return tl.where(finite(value), bounded, 0.0)


@triton.jit
def clamp_normalized(value, factor=1.0):
    """Clamp a masked-out value after normalization: its product with a factor >= 1 stays finite."""
    limit = 3e37 / factor
    return tl.minimum(tl.maximum(value, -limit), limit)


@triton.jit
def _exp2(t):
    if _INTERPRETED:
        power = tl.exp2(t)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
        )
    return power


@triton.jit
def _reciprocal(value):
    if _INTERPRETED:
        found = 1.0 / value
    else:
        found = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    return found


@triton.jit
def _sigmoid(z):
    return _reciprocal(1.0 + _exp2(z * -_LOG2_E))


@triton.jit
def _normal_cdf(z, near):
    """The standard normal CDF; `near` is z clamped to where exp(-z**2 / 2) is not 0."""
    t = 2.0 * _reciprocal(2.0 + tl.abs(z) * 0.70710678118654752)
    u = 2.0 * t - 1.0
    p = u * _P11 + _P10
    p = p * u + _P9
    p = p * u + _P8
    p = p * u + _P7
    p = p * u + _P6
    p = p * u + _P5
    p = p * u + _P4
    p = p * u + _P3
    p = p * u + _P2
    p = p * u + _P1
    p = p * u + _P0
    tail = 0.5 * t * _exp2((p - 0.5 * near * near) * _LOG2_E)
    return tl.where(z > 0, 1.0 - tail, tail)


@triton.jit
def _nearby(z):
    return tl.minimum(tl.maximum(z, -40.0), 40.0)  # beyond 40 the bell is 0; avoids inf * 0


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """Apply an activation."""
    if ACTIVATION == RELU:
        z = tl.where(z < 0, 0.0, z)  # NaN stays NaN
    if ACTIVATION == SILU:
        z = z * _sigmoid(z)
    if ACTIVATION == GELU:
        z = z * _normal_cdf(z, _nearby(z))
    return z


@triton.jit
def activation_vjp(z, dy, ACTIVATION: tl.constexpr):
    """Multiply dy by the derivative of the activation at z."""
    if ACTIVATION == RELU:
        dy = tl.where(z > 0, dy, 0.0)
    if ACTIVATION == SILU:
        s = _sigmoid(z)
        dy = dy * (z * (s - s * s) + s)
    if ACTIVATION == GELU:
        near = _nearby(z)
        bell = 0.39894228040143268 * _exp2(near * near * (-0.5 * _LOG2_E))
        dy = dy * (_normal_cdf(z, near) + near * bell)
    return dy


@triton.jit
def unit_for(reach, LARGEST_UNIT: tl.constexpr):
    """Return the power of two, at most LARGEST_UNIT, that scales deviations to about 1.

    Without it, squares could overflow or underflow.
    """
    exponent = reach.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 1 << 23), 253 << 23)
    return tl.minimum(((254 << 23) - exponent).to(tl.float32, bitcast=True), LARGEST_UNIT)


@triton.jit
def normalized(
    value, counted, high, factor, shift, MASK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Return ``activation((value - high) * factor + shift)``."""
    if MASK != 0:
        value = tl.where(counted, value, clamp_masked(value))
    z = (value - high) * factor + shift
    if MASK != 0:  # an activation of inf may be NaN
        z = tl.where(counted, z, clamp_normalized(z))
    return activated(z, ACTIVATION)


@triton.jit
def pulled_back(
    given, gradient, exists, counted, high, rstd, shift, factor, bias, PADDED: tl.constexpr,
    MASK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Return xhat, ``(given - high) * rstd + shift``, and the gradient before the activation.

    And which elements are constant: masked out and not finite, so replaced by 0. PADDED is whether
    there may be elements that do not exist.
    """
    constant = tl.zeros_like(exists)
    if MASK != 0:
        constant = (counted == 0) & (finite(given) == 0)
        given = tl.where(counted, given, clamp_masked(given))
    xhat = (given - high) * rstd + shift
    if PADDED:
        xhat = tl.where(exists, xhat, 0.0)  # padding could overflow, and 0 * inf be summed
    if MASK != 0:  # so could what is masked out, or its product with the scale
        largest = tl.maximum(tl.abs(factor), 1.0)
        xhat = tl.where(counted, xhat, clamp_normalized(xhat, largest))
    if ACTIVATION != 0:
        gradient = activation_vjp(xhat * factor + bias, gradient, ACTIVATION)
    return xhat, gradient, constant


@triton.jit
def gradient_of_x(
    xhat, gradient, constant, counted, factor, mean, mean_product, MASK: tl.constexpr,
):  # fmt: skip
    """Return dx, where scale, and p and q of ``backward``, have been multiplied by 1 / std."""
    through = xhat * mean_product + mean
    if MASK != 0:
        through = tl.where(counted, through, 0.0)
    found = gradient * factor - through
    if MASK != 0:
        found = tl.where(constant, 0.0, found)
    return found
