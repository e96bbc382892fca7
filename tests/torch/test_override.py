"""The context in which functions of PyTorch are computed by this library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from groupnorm.errors import ArgumentValueError
from groupnorm.testing import oracle
from groupnorm.torch import override
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient
from tests.torch.test_replacement import SHAPE, Affine, outcome, tensor


def test_override_reaches_every_call(rng):
    x = tensor(rng, *SHAPE, offset=1e4)
    weight, bias = tensor(rng, 8), tensor(rng, 8)
    arrays = (x.numpy(), weight.numpy(), bias.numpy())
    want = oracle.group_norm(*arrays, num_groups=2, feature_axis=1, epsilon=1e-3)
    with override():
        got = [
            nn.functional.group_norm(x, 2, weight, bias, 1e-3),
            nn.functional.group_norm(
                input=x, num_groups=2, weight=weight, bias=bias, eps=1e-3
            ),
        ]  # fmt: skip
        y = Affine(2, 8)(x).detach().numpy()
    plain = oracle.group_norm(x.numpy(), num_groups=2, feature_axis=1, epsilon=1e-5)
    assert_close(y, plain + 1, tolerance=2 * CONTRACT)
    for y in got:
        assert_close(y.numpy(), want, tolerance=2 * CONTRACT)
    after = nn.functional.group_norm(x, 2, weight, bias, 1e-3)
    assert np.abs(after.numpy() - want).max() > 1e-4


def test_override_differentiates_nests_and_compiles(rng):
    model, x, dy = Affine(2, 8), tensor(rng, *SHAPE), tensor(rng, *SHAPE)
    context = override()
    with context, override(implementation="portable"):
        got = outcome(model, x, dy)
    gradient = oracle.group_norm_gradients(
        x.numpy(), dy.numpy(), num_groups=2, feature_axis=1, epsilon=1e-5
    )
    assert_gradient(got[1].numpy(), gradient.x, rtol=GRADIENT)
    far = x + 1e4
    want = oracle.group_norm(far.numpy(), num_groups=2, feature_axis=1, epsilon=1e-5) + 1
    try:
        with context:
            y = torch.compile(model, fullgraph=True)(far)
    finally:
        torch._dynamo.reset()
    assert_close(y.detach().numpy(), want, tolerance=3 * CONTRACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_override_keeps_the_dtype(dtype, rng):
    with override():
        assert nn.functional.group_norm(tensor(rng, *SHAPE).to(dtype), 2).dtype == dtype


def test_the_inner_override_counts(rng):
    x = tensor(rng, *SHAPE, offset=1e5)
    with override():
        with override(implementation="native"):
            assert torch.equal(nn.functional.group_norm(x, 2), torch.group_norm(x, 2))
        assert not torch.equal(nn.functional.group_norm(x, 2), torch.group_norm(x, 2))


def test_override_checks_its_argument():
    with pytest.raises(ArgumentValueError, match="implementation='fast'"):
        override(implementation="fast")
