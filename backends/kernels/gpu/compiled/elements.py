"""Elements and activations in Triton; all values are float32."""

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
]

# The numbers in `variants.ACTIVATIONS`; 0 is no activation.
RELU = tl.constexpr(1)
SILU = tl.constexpr(2)
GELU = tl.constexpr(3)

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
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-tl.maximum(z, -87.0)))


@triton.jit
def _normal_cdf(z, bell):
    """The standard normal CDF; `bell` is exp(-z**2 / 2)."""
    t = 2.0 / (2.0 + tl.abs(z) * 0.70710678118654752)
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
    tail = 0.5 * t * tl.exp(p) * bell
    return tl.where(z > 0, 1.0 - tail, tail)


@triton.jit
def _bell(z):
    near = tl.minimum(tl.maximum(z, -40.0), 40.0)  # beyond 40 the bell is 0; avoids inf * 0
    return near, tl.exp(-0.5 * near * near)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """Apply an activation."""
    if ACTIVATION == RELU:
        z = tl.where(z < 0, 0.0, z)  # NaN stays NaN
    if ACTIVATION == SILU:
        z = z * _sigmoid(z)
    if ACTIVATION == GELU:
        _, bell = _bell(z)
        z = z * _normal_cdf(z, bell)
    return z


@triton.jit
def activation_vjp(z, dy, ACTIVATION: tl.constexpr):
    """Multiply dy by the derivative of the activation at z."""
    if ACTIVATION == RELU:
        dy = tl.where(z > 0, dy, 0.0)
    if ACTIVATION == SILU:
        s = _sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    if ACTIVATION == GELU:
        near, bell = _bell(z)
        dy = dy * (_normal_cdf(z, bell) + near * bell * 0.39894228040143268)
    return dy
