"""Parameters with a row for each sample, in PyTorch: memory formats, views and transforms."""

import numpy as np
import pytest

from groupnorm import group_norm, group_norm_vjp

pytestmark = pytest.mark.needs("torch")
SHAPE = (3, 8, 5)
KEYWORDS = {"num_groups": 4, "feature_axis": 1}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def draw(torch, rng, **options):
    shapes = (SHAPE, SHAPE[:2], SHAPE[:2])
    return [torch.tensor(rng.normal(size=s), dtype=torch.float32, **options) for s in shapes]


def in_float64(x, scale, bias):
    """The same from operations that PyTorch differentiates."""
    groups = x.double().reshape(3, 4, -1)
    deviations = groups - groups.mean(2, keepdim=True)
    rstd = (deviations.square().mean(2, keepdim=True) + 1e-6).rsqrt()
    y = (deviations * rstd).reshape(SHAPE)
    return y * scale.double()[..., None] + bias.double()[..., None]


def close(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.detach(), b.detach(), rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients(torch, rng):
    given = draw(torch, rng, requires_grad=True)
    weights = torch.tensor(rng.normal(size=SHAPE), dtype=torch.float32)

    def penalty(function):
        first = torch.autograd.grad((function(*given) * weights).sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given[:2])

    found = penalty(lambda *a: group_norm(*a, **KEYWORDS))
    for a, b in zip(found, penalty(in_float64), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_several_cotangents_at_once(torch, rng):
    given = draw(torch, rng, requires_grad=True)
    dy = torch.tensor(rng.normal(size=(2, *SHAPE)), dtype=torch.float32)

    def gradients(function):
        return torch.autograd.grad(function(*given), given, dy, is_grads_batched=True)

    found = gradients(lambda *a: group_norm(*a, **KEYWORDS))
    close(found, gradients(lambda *a: in_float64(*a).float()))


def test_saved_tensors_that_come_back_in_another_dtype(torch, rng):
    given = draw(torch, rng, requires_grad=True)
    dy = torch.tensor(rng.normal(size=SHAPE), dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda a: a.double(), lambda a: a):
        y = group_norm(*given, **KEYWORDS)
    close(torch.autograd.grad(y, given, dy), torch.autograd.grad(in_float64(*given), given, dy))


def test_a_pullback_that_is_differentiated(torch, rng):
    given = draw(torch, rng, requires_grad=True)
    dy = torch.tensor(rng.normal(size=SHAPE), dtype=torch.float32, requires_grad=True)
    found = group_norm_vjp(*given, **KEYWORDS)[1](dy)
    close(found, torch.autograd.grad(in_float64(*given), given, dy))
    assert found.x.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rows", "scale", "bias", "kept axes"])
def test_compiled_programs(torch, rng, case):
    x, scale, bias = draw(torch, rng)
    keywords = dict(KEYWORDS)
    if case == "scale":
        bias = bias[0].contiguous()
    elif case == "bias":
        scale = scale[0].contiguous()
    elif case == "kept axes":
        x, keywords = x.movedim(1, -1).contiguous(), {"num_groups": 4, "reduction_axes": (-1,)}

    def function(x, scale, bias):
        return group_norm(x, scale, bias, **keywords)

    compiled = torch.compile(function, fullgraph=True)
    expected = group_norm(
        *(a.double().numpy() for a in (x, scale, bias)), **keywords, implementation="portable"
    )
    np.testing.assert_allclose(compiled(x, scale, bias), expected, rtol=1e-5, atol=1e-5)
