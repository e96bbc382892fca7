"""The native modules inside models of their frameworks: results, gradients, training, files."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frameworks.__main__ import keras_findings
from tests.frameworks.examine import Findings, examine
from tests.frameworks.rows import FRAMEWORKS, KERAS_BACKENDS, Row
from tests.rows import CONTRACT, GRADIENT

#: What each framework trains, by its own names.
LISTED = {
    "flax.nnx": ("norm.bias", "norm.scale"),
    "flax.linen": ("params.norm.bias", "params.norm.scale"),
    "haiku": ("model/norm.offset", "model/norm.scale"),
    "equinox": ("norm.weight", "norm.bias"),
    "brainstate": ("norm.weight.bias", "norm.weight.scale"),
    "torch": ("norm.weight", "norm.bias"),
    "mlx": ("norm.weight", "norm.bias"),
    **dict.fromkeys(
        (f"keras ({backend})" for backend in KERAS_BACKENDS),
        ("group_normalization/gamma", "group_normalization/beta"),
    ),
}


def check(found: Findings) -> None:
    assert found.result <= 2 * CONTRACT
    assert found.compiled <= 2 * CONTRACT
    if found.framework != "keras (numpy)":  # which computes no gradients
        assert found.gradient <= GRADIENT
        before, after = found.losses
        assert after < 0.5 * before
    assert found.carried
    assert found.round_trip
    assert found.saved
    assert found.listed == LISTED[found.framework]


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.name, marks=pytest.mark.needs(*r.packages)) for r in FRAMEWORKS]
)
def test_a_model(row: Row, rng: np.random.Generator):
    check(examine(row, rng))


@pytest.mark.parametrize(
    "library",
    [pytest.param(b, marks=pytest.mark.needs(*{"keras", b} - {"numpy"})) for b in KERAS_BACKENDS],
)
def test_a_model_of_keras(library):
    found = keras_findings(library)
    check(found._replace(listed=tuple(found.listed)))
