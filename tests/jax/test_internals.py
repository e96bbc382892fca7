"""JAX without one of the private names that kernels use: the portable implementation is left."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient

pytestmark = pytest.mark.needs("jax")

# For each name in turn: hide it, import groupnorm afresh, and compute. A name within a class is
# hidden with the class, whose instances JAX itself needs.
WITHOUT = """
import importlib
import logging
import sys
import jax
import numpy as np
from groupnorm.backends.jax.internals import PRIVATE_NAMES
logging.disable()
x = np.load(sys.argv[1])
found = {}
for names in PRIVATE_NAMES:
    hidden = []
    for name in names.split("|"):
        module, _, attribute = name.rpartition(".")
        if module.rpartition(".")[2][0].isupper():
            module, _, attribute = module.rpartition(".")
            instead = type("Empty", (), {})
        else:
            instead = None
        module = importlib.import_module(module)
        hidden.append((module, attribute, getattr(module, attribute)))
        delattr(module, attribute)
        if instead is not None:
            setattr(module, attribute, instead)
    for name in [name for name in sys.modules if name.split(".")[0] == "groupnorm"]:
        del sys.modules[name]
    from groupnorm import GroupNorm, group_norm
    from groupnorm.dispatch import adapter_named
    def call(x):
        return group_norm(x, num_groups=2)
    found[names] = [
        call(jax.numpy.asarray(x)),
        jax.jit(call)(x),
        jax.grad(lambda x: (call(x) * x).sum())(jax.numpy.asarray(x)),
        GroupNorm(x.shape[1:], num_groups=2, backend="jax")(jax.numpy.asarray(x)),
    ]
    reason = adapter_named("jax").kernels.why_unavailable("cpu").reason
    assert "ImportError: JAX" in reason and names in reason, (names, reason)
    for module, attribute, value in reversed(hidden):
        setattr(module, attribute, value)
np.savez(sys.argv[2], **{name: np.stack(arrays) for name, arrays in found.items()})
"""


def test_none_is_missing():
    internals = importlib.import_module("groupnorm.backends.jax.internals")
    assert internals.missing == ()


def test_without_one_of_them(tmp_path, rng):
    x = rng.normal(size=(2, 20, 8)).astype(np.float32)
    given, results = tmp_path / "x.npy", tmp_path / "results.npz"
    np.save(given, x)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, given, results], capture_output=True, text=True,
        timeout=300, check=False, env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    internals = importlib.import_module("groupnorm.backends.jax.internals")
    y = oracle.group_norm(x, num_groups=2)
    gradient = y + oracle.group_norm_gradients(x, x, num_groups=2).x
    found = np.load(results)
    assert set(found) == set(internals.PRIVATE_NAMES)
    for name in found:
        called, jitted, derivative, layer = found[name]
        for got in (called, jitted, layer):
            assert_close(got, y, tolerance=CONTRACT)
        assert_gradient(derivative, gradient, rtol=GRADIENT)


def test_unknown_objects_are_left_to_the_portable_implementation(monkeypatch):
    """Such as types of arrays that do not state what varies, which under shard_map is too late."""
    internals = importlib.import_module("groupnorm.backends.jax.internals")
    mesh = SimpleNamespace()
    assert internals.in_shard_map(mesh)
    assert internals.is_exporting(SimpleNamespace(module_context=SimpleNamespace()))
    assert internals.is_exporting(SimpleNamespace())
    for kind, plain in (
        (SimpleNamespace(), False),
        (SimpleNamespace(manual_axis_type=SimpleNamespace()), False),
        (SimpleNamespace(vma=frozenset({"rows"})), False),
        (SimpleNamespace(vma=frozenset()), True),
        (SimpleNamespace(manual_axis_type=SimpleNamespace(varying=frozenset())), True),
    ):
        monkeypatch.setattr(internals.jax, "typeof", lambda _, kind=kind: kind)
        assert internals.is_plain(None) is plain
    kind = SimpleNamespace(sharding=SimpleNamespace(mesh=mesh))
    monkeypatch.setattr(internals.jax, "typeof", lambda _: kind)
    assert internals.explicit_axes(None) == ()
