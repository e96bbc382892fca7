"""Activations that may follow a normalization, and their derivatives, in array API terms.

They consist of differentiable array API functions, so that libraries can differentiate them; NaN
stays NaN. ``gelu`` is the exact one, with the normal cumulative distribution function.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter
    from groupnorm.typing import Array

__all__ = ["ACTIVATIONS", "ERFC_SERIES", "activate", "erfc", "slope"]


def activate(z: "Array", name: str | None, adapter: "Adapter") -> "Array":
    """Apply the activation with the given name; None applies none."""
    return z if name is None else ACTIVATIONS[name].apply(z, adapter)


def slope(z: "Array", name: str, adapter: "Adapter") -> "Array":
    """Return the derivative at z, for libraries without automatic differentiation."""
    return ACTIVATIONS[name].slope(z, adapter)


def _sigmoid(z: "Array", adapter: "Adapter") -> "Array":
    # Never overflows, and unlike exp(-abs(z)) has a derivative at 0.
    return 0.5 + 0.5 * adapter.xp.tanh(0.5 * z)


def _relu(z: "Array", adapter: "Adapter") -> "Array":
    return adapter.xp.where(z <= 0, adapter.xp.zeros_like(z), z)


def _relu_slope(z: "Array", adapter: "Adapter") -> "Array":
    xp = adapter.xp
    return xp.where(z <= 0, xp.zeros_like(z), xp.ones_like(z))


def _silu(z: "Array", adapter: "Adapter") -> "Array":
    return z * _sigmoid(z, adapter)


def _silu_slope(z: "Array", adapter: "Adapter") -> "Array":
    s = _sigmoid(z, adapter)
    return s * (1.0 + z * (1.0 - s))


def _gelu(z: "Array", adapter: "Adapter") -> "Array":
    return 0.5 * z * erfc(z * -math.sqrt(0.5), adapter)


def _gelu_slope(z: "Array", adapter: "Adapter") -> "Array":
    xp = adapter.xp
    near = xp.where(
        xp.abs(z) > 40.0, xp.full_like(z, 40.0), z
    )  # larger squares overflow; the density is 0
    density = xp.exp(-0.5 * near * near) / math.sqrt(2.0 * math.pi)
    return 0.5 * erfc(z * -math.sqrt(0.5), adapter) + z * density


class _Activation(NamedTuple):
    apply: "Callable[[Array, Adapter], Array]"
    slope: "Callable[[Array, Adapter], Array]"


ACTIVATIONS = {
    "relu": _Activation(_relu, _relu_slope),
    "silu": _Activation(_silu, _silu_slope),
    "gelu": _Activation(_gelu, _gelu_slope),
}

# log(erfc(z) / t) + z**2 with t = 2 / (2 + z), as a series of Chebyshev polynomials in 2 t - 1.
# Fitted at 60 nodes with 40 digits; the first coefficient must be halved.
ERFC_SERIES = (
    -1.302653719781709434, 0.64196979235649026, 0.0194764732041858363, -0.00956151478680863164,
    -0.000946595344482036866, 0.000366839497852761452, 4.25233248069077716e-5,
    -2.02785781125342432e-5, -1.62429000464702551e-6, 1.3036558355805232e-6,
    1.56264417220661432e-8, -8.52380959149265425e-8, 6.5290544390988515e-9,
    5.05934349555146894e-9, -9.91364156493033087e-10, -2.27365122293183586e-10,
    9.6467911020155268e-11, 2.39403808303911474e-12, -6.8860275264975534e-12,
    8.94487927309072572e-13, 3.13092139934295808e-13, -1.12708223613672524e-13,
    3.81090525518923206e-16, 7.10609761360923699e-15, -1.5230282014571043e-15,
)  # fmt: skip


def erfc(x: "Array", adapter: "Adapter") -> "Array":
    """1 - erf(x): the library's own function, or accurate to the dtype's rounding of x**2."""
    own = adapter.erfc(x)
    return _erfc_series(x, adapter.xp) if own is None else own


def _erfc_series(x: "Array", xp: Any) -> "Array":
    z = xp.abs(x)
    z = xp.where(z > 40.0, xp.full_like(z, 40.0), z)  # erfc is 0 beyond; avoids NaN from inf - inf
    t = 2.0 / (2.0 + z)
    u = 2.0 * t - 1.0
    later, sum_ = xp.zeros_like(u), xp.zeros_like(u)
    for coefficient in reversed(ERFC_SERIES[1:]):
        sum_, later = 2.0 * u * sum_ - later + coefficient, sum_
    tail = t * xp.exp(0.5 * ERFC_SERIES[0] + u * sum_ - later - z * z)
    return xp.where(x < 0, 2.0 - tail, tail)
