"""The oracle itself, checked against finite differences, torch's autograd and flax linen."""

import functools

import numpy as np
import pytest

from groupnorm.testing import oracle

CASES = {
    "plain": {"shape": (3, 4, 5, 6), "num_groups": 3},
    "no batch": {"shape": (6, 4), "feature_axis": 0, "num_groups": 3},
    "batch reduced": {"shape": (3, 4, 6), "num_groups": 2, "reduction_axes": (0, -1)},
    "two feature axes": {"shape": (3, 4, 5, 6), "feature_axis": (1, 3), "group_size": 8},
    "mask": {"shape": (3, 4, 6), "num_groups": 3, "mask": "positions"},
    "empty group": {"shape": (3, 4, 6), "num_groups": 3, "mask": "sample"},
    "complex": {"shape": (3, 4, 6), "num_groups": 2, "complex": True},
}


def make(case, rng):
    keywords = dict(CASES[case])
    shape = keywords.pop("shape")
    features = oracle.as_axes(keywords.get("feature_axis", -1), len(shape))

    def draw(size):
        a = rng.normal(size=size)
        return a + 1j * rng.normal(size=size) if is_complex else a

    is_complex = keywords.pop("complex", False)
    parameters = [draw([shape[a] for a in features]) for _ in range(2)]
    x, dy = draw(shape), draw(shape)
    match keywords.get("mask"):
        case "positions":
            keywords["mask"] = rng.random((shape[0], shape[1], 1)) < 0.6
        case "sample":
            keywords["mask"] = np.arange(shape[0]).reshape(-1, 1, 1) != 1
    return x, dy, *parameters, keywords


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_finite_differences(case, rng):
    x, dy, scale, bias, keywords = make(case, rng)
    grads = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    step = 1e-6
    for which, grad in enumerate(grads):
        units = (1, 1j) if np.iscomplexobj(x) else (1,)
        for unit in units:
            direction = rng.normal(size=grad.shape) * unit
            ends = []
            for sign in (1, -1):
                arguments = [x, scale, bias]
                arguments[which] = arguments[which] + sign * step * direction
                y = oracle.group_norm(*arguments, **keywords)
                ends.append(np.sum((dy.conj() * y).real))
            slope = (ends[0] - ends[1]) / (2 * step)
            expected = np.sum((grad.conj() * direction).real)
            assert slope == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torch_autograd(case, rng):
    import torch

    x, dy, scale, bias, keywords = make(case, rng)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, scale, bias)]
    y = textbook(torch, *leaves, **keywords)
    grads = torch.autograd.grad(y, leaves, torch.from_numpy(dy))
    np.testing.assert_allclose(
        oracle.group_norm(x, scale, bias, **keywords), y.detach().numpy(), rtol=1e-12, atol=1e-12
    )
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    for got, expected in zip(want, grads, strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-11, atol=1e-11)


def textbook(
    torch,
    x,
    scale,
    bias,
    *,
    num_groups=None,
    group_size=None,
    feature_axis=-1,
    reduction_axes=None,
    mask=None,
    epsilon=1e-6,
):
    """Group norm with one mask per group and channel: slow, and unlike the oracle in every step."""
    ndim = x.ndim
    features = sorted(a % ndim for a in np.atleast_1d(feature_axis))
    rest = [a for a in range(ndim) if a not in features]
    if reduction_axes is None:
        reduction_axes = range(0 if 0 in features else 1, ndim)
    reduced = {a % ndim for a in reduction_axes}
    moved = x.permute(*rest, *features).flatten(len(rest))
    valid = torch.ones(x.shape, dtype=torch.bool)
    if mask is not None:
        valid = torch.from_numpy(np.broadcast_to(mask, x.shape).copy())
    valid = valid.permute(*rest, *features).flatten(len(rest))
    channels = moved.shape[-1]
    size = group_size or channels // num_groups
    over = [i for i, a in enumerate(rest) if a in reduced] + [len(rest)]
    out = []
    for channel in range(channels):
        group = torch.arange(channels) // size == channel // size
        use = valid & group
        n = use.sum(over, keepdim=True)
        some = n.clamp(min=1)
        mean = torch.where(use, moved, 0).sum(over, keepdim=True) / some
        var = torch.where(use, (moved - mean).abs() ** 2, 0).sum(over, keepdim=True) / some
        mean, var = torch.where(n > 0, mean, 0), torch.where(n > 0, var, 1)
        out.append(((moved - mean) / torch.sqrt(var + epsilon))[..., channel])
    y = torch.stack(out, -1) * scale.flatten() + bias.flatten()
    y = y.unflatten(-1, [x.shape[a] for a in features])
    return y.permute(*np.argsort([*rest, *features]).tolist())


@pytest.mark.needs("flax")
@pytest.mark.parametrize("reduction_axes", [None, (-1,), (1, -1), (2, -1), (0, 1, 2, 3)])
def test_agrees_with_flax_linen(reduction_axes, rng):
    import flax.linen
    import jax

    x = rng.normal(size=(3, 4, 5, 6))
    with jax.enable_x64(True):
        module = flax.linen.GroupNorm(
            num_groups=3, reduction_axes=reduction_axes, use_fast_variance=False, dtype="float64"
        )
        variables = jax.jit(module.init)(jax.random.key(0), x)
        y = np.asarray(module.apply(variables, x))
    reference = oracle.group_norm(x, num_groups=3, reduction_axes=reduction_axes)
    np.testing.assert_allclose(y, reference, rtol=1e-10, atol=1e-12)


def test_masked_out_non_finite_values_count_as_zero(rng):
    x, mask = rng.normal(size=(2, 5, 4)), np.arange(5)[:, None] < 3
    zeroed, poisoned = x.copy(), x.copy()
    zeroed[:, 3:], poisoned[:, 3:] = 0, np.nan
    call = functools.partial(oracle.group_norm, num_groups=2, mask=mask)
    np.testing.assert_array_equal(call(poisoned), call(zeroed))
    grads = oracle.group_norm_gradients(poisoned, x, num_groups=2, mask=mask)
    assert (grads.x[:, 3:] == 0).all()


def test_large_groups_are_as_accurate_as_small_ones(monkeypatch, rng):
    x = 1e5 + rng.normal(size=(2, 1000, 4))
    exact = oracle.group_norm(x, num_groups=2)
    monkeypatch.setattr(oracle, "FSUM_LIMIT", 1)
    np.testing.assert_allclose(oracle.group_norm(x, num_groups=2), exact, rtol=1e-14, atol=1e-14)


def test_a_constant_group_gives_the_bias_at_epsilon_zero():
    x, bias = np.full((2, 3, 4), 7.3), np.arange(4.0)
    y = oracle.group_norm(x, bias=bias, num_groups=2, epsilon=0)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
