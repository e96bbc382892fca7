"""The backend of CONTRIBUTING.md's walk-through: found by name and by array type, and correct."""

import numpy as np
import pytest

from groupnorm import GroupNorm, available_backends, group_norm
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import oracle
from tests import ROOT, toy_backend
from tests.rows import CONTRACT, GRADIENT, Differentiated, assert_close, assert_gradients


def drawn(rng):
    x, dy = rng.normal(size=(2, 3, 5, 4, 12)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 12)).astype(np.float32)
    return x, dy, scale, bias


def test_layer_and_gradients(rng):
    x, dy, scale, bias = drawn(rng)
    layer = GroupNorm(12, num_groups=4, backend="toy")
    assert type(layer) is toy_backend.ToyGroupNorm
    layer.scale, layer.bias = scale.view(toy_backend.ToyArray), bias.view(toy_backend.ToyArray)
    y, pullback = layer.vjp(x.view(toy_backend.ToyArray))
    found = (y, *pullback(dy.view(toy_backend.ToyArray)))
    assert all(type(a) is toy_backend.ToyArray for a in found)
    assert all(a.dtype == np.float32 for a in found)
    host = [np.asarray(a) for a in found]
    assert_close(host[0], oracle.group_norm(x, scale, bias, num_groups=4), tolerance=CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=4)
    assert_gradients(Differentiated(*host), want, rtol=GRADIENT)


def test_layers_convert_to_toy_and_back(rng):
    _, _, scale, _ = drawn(rng)
    layer = GroupNorm(12, num_groups=4)
    layer.scale = scale
    there = layer.to_backend("toy")
    assert type(there.scale) is toy_backend.ToyArray
    back = there.to_backend("numpy")
    assert type(back.scale) is np.ndarray
    np.testing.assert_array_equal(back.scale, scale)


def test_messages_name_the_backend(rng):
    x, *_ = drawn(rng)
    with pytest.raises(ArgumentTypeError, match=r"x is of NumPy arrays .* parameters are of Toy"):
        GroupNorm(12, num_groups=4, backend="toy")(x)
    with pytest.raises(ArgumentTypeError, match=r"scale=\[1.0\] is of type list, not an array"):
        group_norm(x.view(toy_backend.ToyArray), [1.0], num_groups=4)
    with pytest.raises(ArgumentValueError, match="there are no kernels for Toy arrays"):
        group_norm(x.view(toy_backend.ToyArray), num_groups=4, implementation="fused")


def test_the_backend_is_listed():
    [info] = [b for b in available_backends() if b.name == "toy"]
    assert info.devices == ("cpu",)
    assert info.implementations == {"cpu": ("portable",)}


def test_contributing_quotes_the_whole_file():
    """The walk-through quotes the tested file, so it cannot go out of date."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    code = (ROOT / "tests" / "toy_backend.py").read_text("utf-8")
    assert code[code.index("import types") :].strip() in text
