"""The calls that run once in every mode of debugging a library has: JAX's, NumPy's, PyTorch's."""

from __future__ import annotations

import numpy as np

from tests.portable.test_activation import reference as activated
from tests.portable.test_activation import reference_gradients
from tests.rows import CONTRACT, CONTRACT_64, GRADIENT, assert_close, assert_gradient, host_dtype

# Shape, keywords, dtype of x.
CALLS = {
    "last": ((2, 5, 6, 8), {}, "float32"),
    "first": ((2, 8, 5, 6), {"feature_axis": 1, "activation": "silu"}, "float32"),
    "few positions": ((3, 2, 8), {"use_fast_variance": False}, "float32"),
    "long": ((1, 700, 8), {"activation": "gelu"}, "float32"),
    "reduced batch": ((2, 30, 8), {"reduction_axes": (0, 1, 2), "activation": "relu"}, "float32"),
    "two axes": ((2, 2, 5, 4), {"feature_axis": (1, 3)}, "float32"),
    "bfloat16": ((2, 20, 8), {}, "bfloat16"),
    "float64": ((2, 20, 8), {}, "float64"),
    "complex": ((2, 20, 8), {}, "complex64"),
}


def draw(rng, call, masked, size=1.0):
    """Return host arrays x, dy, scale, bias in the call's dtype, and the keywords."""
    shape, keywords, dtype = CALLS[call]
    x, dy = rng.normal(size=(2, *shape))
    if dtype == "complex64":
        x, dy = x + 1j * rng.normal(size=shape), dy + 1j * rng.normal(size=shape)
    scale, bias = rng.normal(size=(2, 8))
    if call == "two axes":
        scale, bias = scale.reshape(2, 4), bias.reshape(2, 4)
    keywords = {"num_groups": 2, "epsilon": 1e-6 * size**2, **keywords}
    if masked:
        axes = keywords.get("feature_axis", -1)
        for axis in (axes,) if isinstance(axes, int) else axes:
            shape = (*shape[: axis % len(shape)], 1, *shape[axis % len(shape) + 1 :])
        keywords["mask"] = rng.random(shape) < 0.6
        keywords["mask"][-1] = "reduction_axes" in keywords  # else groups without an element
        x = np.where(keywords["mask"], x, np.nan)
    x, dy = (a.astype(host_dtype(dtype)) for a in (size * x, dy))
    real = host_dtype("float32" if dtype == "complex64" else dtype)
    return x, dy, scale.astype(real), bias.astype(real), keywords


def reference(x, dy, scale, bias, keywords):
    """Return y and the gradients in float64."""
    keywords = {"activation": None, **keywords}
    keywords.pop("use_fast_variance", None)
    y = activated(x, scale, bias, **keywords)
    return y, reference_gradients(x, dy, scale, bias, **keywords)


def check(got, want, dtype):
    """Compare y and the gradients with the reference."""
    y, gradients = got
    want_y, want_gradients = want
    tolerance, rtol = 4 * CONTRACT, 4 * GRADIENT
    if dtype == "bfloat16":
        tolerance = rtol = 2.0**-7
    elif dtype == "float64":
        tolerance, rtol = 4 * CONTRACT_64, 10 * CONTRACT_64
    assert_close(np.asarray(y), want_y, tolerance=tolerance)
    for g, w in zip(gradients, want_gradients, strict=True):
        assert_gradient(np.asarray(g), w, rtol=rtol)
