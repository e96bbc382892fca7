"""Elements of arrays and activations, compiled by numba: loading, computing and storing.

Elements are float32, or the bits of a half, in integers whose dtype identifies the format: uint16
is float16, int16 is bfloat16. `load` and `store` convert in registers, so no row is ever widened in
memory; everything in between is float32, in code that LLVM vectorizes.
"""

import platform

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable

from groupnorm.backends.kernels.erfc import ERFC_POWERS

__all__ = [
    "MAPS",
    "SUMS",
    "activated",
    "activation_vjp",
    "bounded",
    "clamp_masked",
    "has_float16",
    "invalid_deviation",
    "is_float32",
    "jit",
    "load",
    "store",
    "store_gradient",
]

# Fast-math flags. Loops that sum may be reordered, so that LLVM can vectorize them; the order
# depends on the length alone. No flag assumes the absence of NaN.
SUMS = {"reassoc", "contract", "nsz"}
MAPS = {"contract", "nsz"}

F = np.float32


def jit(flags=MAPS, inline=True):
    """Compile as part of the entry points that use it; only these are cached on disk.

    Inline by default: arrays are structs that calls put on the stack, which takes longer than a
    short loop. Rarely executed code is not inlined, to avoid compiling it repeatedly.
    """
    return numba.njit(
        nogil=True, fastmath=flags, error_model="numpy", boundscheck=False,
        forceinline=inline, no_cpython_wrapper=True, no_cfunc_wrapper=True,
    )  # fmt: skip


# Elements -----------------------------------------------------------------------------------------


def has_float16() -> bool:
    """Whether this CPU converts float16; if not, LLVM would call functions that numba lacks."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(binding.get_host_cpu_features().get("f16c", False))
    return platform.machine().lower() in ("arm64", "aarch64")


def _has_bfloat16():
    """Whether this CPU has instructions that round vectors of every length to bfloat16."""
    features = binding.get_host_cpu_features()
    return features.get("avx512bf16", False) and features.get("avx512vl", False)


@intrinsic
def _from_float16(typing_context, bits):
    def code(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), code


@intrinsic
def _to_float16(typing_context, value):
    def code(context, builder, signature, arguments):
        half = builder.fptrunc(arguments[0], ir.HalfType())
        return builder.bitcast(half, ir.IntType(16))

    return types.uint16(types.float32), code


@intrinsic
def _from_bfloat16(typing_context, bits):
    def code(context, builder, signature, arguments):
        word = ir.IntType(32)
        wide = builder.shl(builder.zext(arguments[0], word), word(16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.int16), code


class _BFloatType(ir.types._BaseFloatType):
    """LLVM's bfloat16 type, which llvmlite does not define."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self):
        return "bfloat"


_BFloatType._create_instance()


@intrinsic
def _to_bfloat16(typing_context, value):
    """Round to nearest, ties to even; a NaN stays one, whatever its payload."""

    def code(context, builder, signature, arguments):
        # Written as LLVM IR, because numba would compute in 64 bits.
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        high = builder.lshr(bits, word(16))
        half = builder.add(builder.and_(high, word(1)), word(0x7FFF))
        rounded = builder.lshr(builder.add(bits, half), word(16))
        nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(
            builder.select(nan, builder.or_(high, word(0x40)), rounded), ir.IntType(16)
        )

    return types.int16(types.float32), code


@intrinsic
def _to_bfloat16_by_instruction(typing_context, value):
    """As `_to_bfloat16`, except that subnormal values (below 1e-38) become 0."""

    def code(context, builder, signature, arguments):
        half = builder.fptrunc(arguments[0], _BFloatType())
        return builder.bitcast(half, ir.IntType(16))

    return types.int16(types.float32), code


def _get(x, i):
    raise NotImplementedError


@overload(_get)
def _get_overload(x, i):
    if x.dtype == types.uint16:
        return lambda x, i: _from_float16(x[i])
    if x.dtype == types.int16:
        return lambda x, i: _from_bfloat16(x[i])
    return lambda x, i: x[i]


@register_jitable
def load(x, i):
    """Load an element as float32."""
    return _get(x, i)


def _put(y, i, value):
    raise NotImplementedError


def _put_gradient(y, i, value):
    raise NotImplementedError


def _putting(to_bfloat16):
    def put_float16(y, i, value):
        y[i] = _to_float16(value)

    def put_bfloat16(y, i, value):
        y[i] = to_bfloat16(value)

    def put_float32(y, i, value):
        y[i] = value

    def choose(y, i, value):
        return {types.uint16: put_float16, types.int16: put_bfloat16}.get(y.dtype, put_float32)

    return choose


overload(_put)(_putting(_to_bfloat16))
overload(_put_gradient)(_putting(_to_bfloat16_by_instruction if _has_bfloat16() else _to_bfloat16))


@register_jitable
def store(y, i, value):
    """Store a float32 value as an element."""
    _put(y, i, value)


@register_jitable
def store_gradient(y, i, value):
    """As `store`, for loops with longer bodies.

    There LLVM vectorizes the bfloat16 instruction well, which saves a quarter of the time; in short
    loops it makes vectors of four, which save nothing.
    """
    _put_gradient(y, i, value)


def _is_float32(y):
    return y.dtype == np.float32  # in Python, without compilation


@overload(_is_float32)
def _is_float32_overload(y):
    same = y.dtype == types.float32
    return lambda y: same


@register_jitable
def is_float32(y):
    """Whether an array's elements are float32, not the bits of a half."""
    return _is_float32(y)


@jit()
def clamp_masked(value):
    """Clamp a masked-out value so that products stay finite; map NaN and inf to 0."""
    # value - value is NaN for NaN and inf, and comparisons with NaN are false.
    bounded = min(max(value, F(-5e33)), F(5e33))
    return bounded if value - value == 0 else F(0)


@jit()
def invalid_deviation(value, centre, limit):
    """Return value - centre of a masked-out value within limits; NaN and inf count as 0."""
    d = (value if value - value == 0 else F(0)) - centre
    return min(max(d, -limit), limit)


@jit()
def bounded(value, limit):
    """Clamp a value to [-limit, limit]; NaN stays NaN."""
    value = limit if value > limit else value
    return -limit if value < -limit else value


# Activations --------------------------------------------------------------------------------------
#
# The activation must be known when a loop is compiled, or LLVM does not vectorize the loop. A tuple
# passes it, since its length is part of its type: () none, (0,) relu, (0, 0) silu, (0, 0, 0) gelu.


@intrinsic
def _times_power_of_two(typing_context, value, shifted):
    """Value * 2**n, by adding n, the lowest bits of `shifted`, to the exponent."""

    def code(context, builder, signature, arguments):
        word = ir.IntType(32)
        value, shifted = (builder.bitcast(a, word) for a in arguments)
        return builder.bitcast(builder.add(value, builder.shl(shifted, word(23))), ir.FloatType())

    return types.float32(types.float32, types.float32), code


@jit()
def _exp(x):
    """Exp of x clamped to [-87, 87], with a relative error of at most 1e-7 + |x| * 3e-8.

    The polynomial of Cephes, after one step of Cody-Waite reduction.
    """
    x = min(max(x, F(-87)), F(87))
    # Adding 1.5 * 2**23 rounds to an integer, which is then in the lowest bits.
    shifted = x * F(1.44269504088896341) + F(12582912)
    r = x - (shifted - F(12582912)) * F(0.69314718056)
    p = F(1.9875691500e-4)
    p = p * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    p = p * (r * r) + (r + F(1))
    return _times_power_of_two(p, shifted)


@jit()
def _sigmoid(x):
    return F(1) / (F(1) + _exp(-x))


_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7, _P8, _P9, _P10, _P11 = map(np.float32, ERFC_POWERS)


@jit()
def _normal_cdf(z, bell):
    """The standard normal CDF; `bell` is exp(-z**2 / 2)."""
    t = F(2) / (F(2) + abs(z) * F(0.70710678118654752))
    u = F(2) * t - F(1)
    p = _P11
    p = p * u + _P10
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
    tail = F(0.5) * t * _exp(p) * bell
    return F(1) - tail if z > 0 else tail


def _activated(z, activation):
    raise NotImplementedError


@overload(_activated)
def _activated_overload(z, activation):
    def relu(z, activation):
        return F(0) if z < 0 else z  # NaN stays NaN

    def silu(z, activation):
        return (F(-87) if z < F(-87) else z) * _sigmoid(z)  # beyond, _exp is clamped

    def gelu(z, activation):
        z = F(-40) if z < F(-40) else z  # avoids inf * 0
        return z * _normal_cdf(z, _exp(F(-0.5) * z * z))

    return (lambda z, activation: z, relu, silu, gelu)[len(activation)]


@register_jitable
def activated(z, activation):
    """Apply an activation."""
    return _activated(z, activation)


def _activation_vjp(z, dy, activation):
    raise NotImplementedError


@overload(_activation_vjp)
def _activation_vjp_overload(z, dy, activation):
    def relu(z, dy, activation):
        return dy if z > 0 else F(0)

    def silu(z, dy, activation):
        s = _sigmoid(z)
        return dy * (s * (F(1) + bounded(z, F(87)) * (F(1) - s)))  # avoids inf * 0

    def gelu(z, dy, activation):
        bell = _exp(F(-0.5) * z * z)
        near = min(max(z, F(-40)), F(40))  # avoids inf * 0; beyond 40 the product is 0
        return dy * (_normal_cdf(z, bell) + near * bell * F(0.39894228040143268))

    return (lambda z, dy, activation: dy, relu, silu, gelu)[len(activation)]


@register_jitable
def activation_vjp(z, dy, activation):
    """Multiply dy by the derivative of the activation at z."""
    return _activation_vjp(z, dy, activation)
