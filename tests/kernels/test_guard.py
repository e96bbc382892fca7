"""Kernels that cannot be loaded cost speed, never the library."""

import importlib
import logging

import numpy as np
import pytest

from groupnorm import arguments, group_norm, group_norm_vjp
from groupnorm.adapter import Kernels, Unsupported
from groupnorm.arguments import validate
from groupnorm.backends.numpy.adapter import numpy_adapter
from groupnorm.dispatch import adapter_named, compute, compute_with_pullback, implementations_on
from groupnorm.errors import ArgumentValueError, BackendImportError
from groupnorm.portable import activations
from groupnorm.testing import oracle
from tests.rows import CONTRACT, assert_close

OPTIONS = {
    "feature_axis": -1, "num_groups": 2, "group_size": None, "reduction_axes": None,
    "epsilon": 1e-6, "dtype": None, "axis_name": None, "axis_index_groups": None,
    "use_fast_variance": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("module 'library' has no attribute '_renamed'"),
        ImportError("cannot import name '_renamed'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_kernels_that_cannot_be_loaded(error, rng, caplog):
    class Adapter(type(numpy_adapter)):
        loads = 0

        def load_kernels(self):
            self.loads += 1
            raise error

    adapter = Adapter(numpy_adapter.xp)
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    options = validate(**OPTIONS)
    with caplog.at_level(logging.WARNING, logger="groupnorm"):
        y = compute(adapter, x, None, None, None, options)
        z, _ = compute_with_pullback(adapter, x, None, None, None, options)
    for found in (y, z):
        assert_close(found, oracle.group_norm(x, num_groups=2), tolerance=CONTRACT)
    # Once, with the reason.
    assert adapter.loads == 1
    [record] = caplog.records
    assert "_renamed" in record.getMessage()
    assert "portable" in record.getMessage()
    assert implementations_on(adapter, "cpu") == ("portable",)
    with pytest.raises(ArgumentValueError, match=r"cannot compute this call: .*_renamed"):
        compute(adapter, x, None, None, None, validate(**OPTIONS, implementation="fused"))


def test_no_kernels():
    kernels = Kernels("none here")
    assert kernels.forward(None, None, None, None, None) == Unsupported("none here")
    assert kernels.vjp(None, None, None, None, None) == Unsupported("none here")
    assert kernels.why_unavailable("cpu") == Unsupported("none here")


@pytest.mark.parametrize("library", ["numpy", "jax", "torch"])
def test_an_activation_that_only_the_portable_implementation_has(library, rng, monkeypatch):
    """Adding one must not break the calls that kernels would compute."""
    try:
        adapter = adapter_named(library)
    except BackendImportError as error:
        pytest.skip(str(error))
    if library == "jax":
        monkeypatch.setattr(importlib.import_module("jax"), "device_count", lambda: 1)
    tanh = activations._Activation(
        lambda z, adapter: adapter.xp.tanh(z), lambda z, adapter: 1 - adapter.xp.tanh(z) ** 2
    )
    monkeypatch.setattr(arguments, "ACTIVATIONS", (*arguments.ACTIVATIONS, "tanh"))
    monkeypatch.setitem(activations.ACTIVATIONS, "tanh", tanh)
    host = rng.normal(size=(2, 5, 8)).astype(np.float32)
    want = np.tanh(oracle.group_norm(host, num_groups=2))
    x = adapter.from_host(host)
    y = group_norm(x, num_groups=2, activation="tanh")
    assert_close(adapter.to_host(y), want, tolerance=CONTRACT)
    y, _ = group_norm_vjp(x, num_groups=2, activation="tanh")
    assert_close(adapter.to_host(y), want, tolerance=CONTRACT)
    with pytest.raises(
        ArgumentValueError, match=r"the kernels have no activation 'tanh'|the compiled core"
    ):
        group_norm(x, num_groups=2, activation="tanh", implementation="fused")
