"""Layers whose initializers are local functions are copied and pickled, in every backend."""

import copy
import pickle

import numpy as np
import pytest

from groupnorm import GroupNorm
from groupnorm.errors import ArgumentValueError
from groupnorm.initializers import constant

BACKENDS = [
    "numpy",
    pytest.param("jax", marks=pytest.mark.needs("jax")),
    pytest.param("torch", marks=pytest.mark.needs("torch")),
]


def layer_with(backend, init):
    return GroupNorm(8, num_groups=4, scale_init=init, epsilon=0.5, backend=backend)


def values(layer):
    return layer.to_backend("numpy").scale


@pytest.mark.parametrize("library", BACKENDS)
@pytest.mark.parametrize(
    "how",
    [lambda a: pickle.loads(pickle.dumps(a)), copy.copy, copy.deepcopy],
    ids=["pickle", "copy", "deepcopy"],
)
def test_local_initializers(library, how):
    value = 3.0
    layer = layer_with(library, lambda shape, dtype: np.full(shape, value, dtype))
    other = how(layer)
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    np.testing.assert_array_equal(values(other), np.full(8, 3.0))


@pytest.mark.needs("torch")
def test_parameters_are_initialized_again_only_by_a_known_initializer():
    known = pickle.loads(pickle.dumps(layer_with("torch", constant(2.0))))
    known.reset_parameters()
    np.testing.assert_array_equal(values(known), np.full(8, 2.0))
    local = pickle.loads(
        pickle.dumps(layer_with("torch", lambda shape, dtype: np.ones(shape, dtype)))
    )
    with pytest.raises(ArgumentValueError, match="initializer was not"):
        local.reset_parameters()
