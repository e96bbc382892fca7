"""The complementary error function in float32: the coefficients that all kernels use."""

import numpy as np

from groupnorm.portable.activations import ERFC_SERIES

__all__ = ["ERFC_POWERS"]

#: Coefficients of log(erfc(z) / t) + z**2 in powers of u = 2 t - 1, with t = 2 / (2 + z). Twelve
#: terms of the series are enough for float32; powers take a third of the operations.
ERFC_POWERS = tuple(
    float(np.float32(c))
    for c in np.polynomial.chebyshev.cheb2poly([0.5 * ERFC_SERIES[0], *ERFC_SERIES[1:12]])
)
