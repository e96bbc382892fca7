"""The JAX layer inside brainstate modules, without wrapper classes."""

from __future__ import annotations

import brainstate
import numpy as np
import pytest

from groupnorm import GroupNorm
from groupnorm.testing import oracle
from tests.jax.test_layer import CHANNELS, GROUPS, array, check_conversion
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient


class BrainstateModel(brainstate.nn.Module):
    def __init__(self, rng):
        super().__init__()
        self.norm = GroupNorm(
            CHANNELS, num_groups=GROUPS, backend="jax", param_type=brainstate.ParamState
        )
        for state in self.states().values():
            state.value = array(rng, CHANNELS)

    def __call__(self, x):
        return self.norm(x)


def test_finds_states(rng):
    model = BrainstateModel(rng)
    states = model.states(brainstate.ParamState)
    assert set(states) == {("norm", "scale"), ("norm", "bias")}
    assert all(isinstance(state, brainstate.ParamState) for state in states.values())


@pytest.mark.parametrize("compiler", [lambda f: f, brainstate.transform.jit], ids=["eager", "jit"])
def test_differentiates_with_respect_to_states(compiler, rng):
    model, x, dy = BrainstateModel(rng), array(rng, 2, 5, CHANNELS), array(rng, 2, 5, CHANNELS)
    scale, bias = (np.asarray(a) for a in (model.norm.scale, model.norm.bias))
    want = oracle.group_norm(np.asarray(x), scale, bias, num_groups=GROUPS)
    assert_close(np.asarray(compiler(model)(x)), want, tolerance=2 * CONTRACT)
    gradient = brainstate.transform.grad(
        lambda: (model(x) * dy).sum(), model.states(brainstate.ParamState)
    )
    got = compiler(gradient)()
    x, dy = np.asarray(x), np.asarray(dy)
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=GROUPS)
    assert_gradient(np.asarray(got["norm", "scale"]), want.scale, rtol=GRADIENT)
    assert_gradient(np.asarray(got["norm", "bias"]), want.bias, rtol=GRADIENT)


def test_sees_an_assigned_value(rng):
    model, x = BrainstateModel(rng), array(rng, 2, 5, CHANNELS)
    jitted = brainstate.transform.jit(model)
    before = jitted(x)
    bias = model.states()["norm", "bias"]
    bias.value = bias.value + 1
    np.testing.assert_array_equal(model.norm.bias, bias.value)
    np.testing.assert_allclose(jitted(x), before + 1, rtol=1e-5, atol=1e-5)


def test_converted_to_another_backend_and_back(rng):
    check_conversion(brainstate.ParamState, rng)
