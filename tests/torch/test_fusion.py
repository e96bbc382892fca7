"""Activations computed together with replaced normalizations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import groupnorm.torch
from groupnorm.errors import ArgumentStateError
from groupnorm.torch import fused, replace, restore
from tests.torch.test_replacement import SHAPE, assert_same, outcome, randomized, seeded, tensor

__all__ = ["seeded"]  # a fixture

ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.GELU()]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_fused_sequential(act, rng):
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), act, nn.Sequential(nn.GroupNorm(4, 8), act)
    )
    randomized(model, rng)
    x, dy = tensor(rng, *SHAPE), tensor(rng, *SHAPE)
    want = outcome(model, x, dy)
    report = replace(model)
    assert [entry.name for entry in report.fused] == ["(model)", "3"]
    assert [m is act for m in (model[2], model[3][1])] == [True, True]
    assert_same(outcome(model, x, dy), want)
    assert isinstance(model[:2], nn.Sequential)
    assert repr(model).startswith("Sequential(")
    restore(model)
    assert type(model) is type(model[3]) is nn.Sequential
    assert_same(outcome(model, x, dy), want, tolerance=0)


@pytest.mark.parametrize("at", [0, 1], ids=["on the normalization", "on the activation"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_between_fused_modules_see_what_they_saw(kind, at, rng):
    model = randomized(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()), rng)
    seen = []
    getattr(model[at], kind)(lambda m, args, y=None: seen.append(args[0].clone()))
    x = tensor(rng, *SHAPE)
    model(x)
    replace(model)
    model(x)
    before, after = seen
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at", [0, 1], ids=["of the normalization", "of the activation"])
def test_a_forward_that_is_replaced_on_the_object_is_called(at, rng):
    """As by accelerate, which loads the parameters in it."""
    model, seen = randomized(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()), rng), []
    x = tensor(rng, *SHAPE)
    want = model(x)
    replace(model)
    forward = model[at].forward
    model[at].forward = lambda x: forward(seen.append(x) or x)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


def test_a_sequential_whose_forward_is_replaced_on_the_object_is_not_fused(rng):
    model, x = randomized(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()), rng), tensor(rng, *SHAPE)
    want = model(x) + 1
    forward = model.forward
    model.forward = lambda x: forward(x) + 1
    report = replace(model)
    assert (len(report.replaced), len(report.fused)) == (1, 0)
    [entry] = [entry for entry in report if entry.result == "not fused"]
    assert "forward was replaced on the object" in entry.note
    assert type(model) is nn.Sequential
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_global_hooks_see_every_module(rng):
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    replace(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, y: seen.append(type(m).__name__)
    )
    try:
        model(tensor(rng, *SHAPE))
    finally:
        handle.remove()
    assert len(seen) == 3


@pytest.mark.parametrize("after", [nn.Tanh(), nn.GELU(approximate="tanh"), nn.Identity()], ids=str)
def test_what_is_not_fused(after, rng):
    model = nn.Sequential(nn.GroupNorm(2, 8), after)
    x = tensor(rng, *SHAPE)
    want = model(x)
    assert not replace(model).fused
    assert type(model) is nn.Sequential
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU())
    assert not replace(model, fuse=False).fused


@pytest.mark.parametrize("given", ["scale and shift", "scale", "shift", "neither"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.Tanh()], ids=str)
@pytest.mark.parametrize("size", [(6, 5), (64, 128)], ids=["small", "large"])
def test_fused_with_scale_and_shift(size, act, affine, given, rng):
    norm = randomized(nn.GroupNorm(2, 8, affine=affine), rng)
    x = tensor(rng, 2, 8, *size)
    scale, shift = (tensor(rng, 2, 8, 1, 1).requires_grad_() for _ in range(2))
    arguments = {
        name: value for name, value in (("scale", scale), ("shift", shift)) if name in given
    }
    y = norm(x)
    y = y * (1 + scale) if "scale" in given else y
    want = act(y + shift if "shift" in given else y)
    separate = fused(norm, act, x, **arguments)
    torch.testing.assert_close(separate, want, rtol=1e-6, atol=1e-6)
    replace(norm)
    got = fused(norm, act, x, **arguments)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if arguments:
        dy = tensor(rng, *x.shape)
        wanted = list(arguments.values())
        for a, b in zip(
            torch.autograd.grad(got, wanted, dy), torch.autograd.grad(want, wanted, dy), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("kind", ["(1, C)", "(C, 1, 1)", "a number", "(N, C, H, W)", "float64"])
def test_other_scales_and_shifts(kind, rng):
    shapes = {"(1, C)": (1, 8), "(C, 1, 1)": (8, 1, 1), "(N, C, H, W)": (2, 8, 64, 128)}
    scale = 0.5 if kind == "a number" else tensor(rng, *shapes.get(kind, (2, 8)))
    if kind == "float64":
        scale = scale.double()
    norm, act, x = nn.GroupNorm(2, 8), nn.SiLU(), tensor(rng, 2, 8, 64, 128)
    want = fused(norm, act, x, scale=scale, shift=scale)
    replace(norm)
    got = fused(norm, act, x, scale=scale, shift=scale)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_slices_of_fused_sequentials_are_restored():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU(), nn.ReLU())
    replace(model)
    part = model[:2]
    restore(part)
    assert type(part) is nn.Sequential


class PreActivation(nn.Module):
    """A module whose class is registered for fusing."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 8), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(x))


def test_registered_fusion(rng, monkeypatch):
    calls = []

    def forward(self, x):
        calls.append(x)
        return fused(self.norm, self.act, x)

    groupnorm.torch.register_fusion(PreActivation, forward)
    model = randomized(PreActivation(), rng)
    x, dy = tensor(rng, *SHAPE), tensor(rng, *SHAPE)
    want = outcome(model, x, dy)
    assert [entry.kind for entry in replace(model).fused] == ["PreActivation"]
    assert_same(outcome(model, x, dy), want)
    assert len(calls) == 1
    assert isinstance(copy.deepcopy(model), PreActivation)
    restore(model)
    assert type(model) is PreActivation
    groupnorm.torch.register_fusion(PreActivation, lambda self, x: "another")
    replace(model)
    assert model(x) == "another"
    assert replace(model)[0].result == "unchanged"
    pickled = pickle.dumps(model)
    monkeypatch.setattr("groupnorm.backends.torch.fusion._forwards", {})
    with pytest.raises(ArgumentStateError, match="register_fusion before the model is loaded"):
        pickle.loads(pickled)
