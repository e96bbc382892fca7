"""Derivatives that `torch_groups` computes on shards and `test_torch_groups` on the whole array.

Each takes a function of (x, scale, bias, mask) and the arrays, and returns tensors. Results with
one value per position of x are split over the shards; others are sums over the shards.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


def penalty(function, x, scale, bias, dy, mask):
    """The gradient of a squared gradient, by double backward."""
    leaves = [a.clone().requires_grad_() for a in (x, scale, bias)]
    loss = (function(*leaves).pow(3) * dy).sum()
    (dx,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    return torch.autograd.grad(dx.square().sum(), leaves)


def forward_mode(function, x, scale, bias, dy, mask):
    with forward_ad.dual_level():
        primals, tangents = (x, scale, bias), (dy, scale.flip(0), bias.cos())
        duals = map(forward_ad.make_dual, primals, tangents)
        return tuple(forward_ad.unpack_dual(function(*duals)))


def forward_over_backward(function, x, scale, bias, dy, mask):
    """A Hessian-vector product."""

    def gradient(x, scale):
        return torch.func.grad(lambda *a: (function(*a).pow(3) * dy).sum(), (0, 1))(x, scale)

    return torch.func.jvp(gradient, (x, scale), (dy, scale.flip(0)))[1]


def func_grad(function, x, scale, bias, dy, mask):
    return torch.func.grad(lambda *a: (function(*a) * dy).sum(), (0, 1, 2))(x, scale, bias)


def func_vjp(function, x, scale, bias, dy, mask):
    y, pullback = torch.func.vjp(function, x, scale, bias)
    return y, *pullback(dy)


def func_jvp(function, x, scale, bias, dy, mask):
    return torch.func.jvp(function, (x, scale, bias), (dy, scale.flip(0), bias.cos()))


def func_vmap(function, x, scale, bias, dy, mask):
    """Sample by sample: x has no batch axis inside."""
    one = torch.func.vmap(lambda x, mask: function(x[None], mask=mask[None])[0])
    return (one(x, mask),)


def per_sample_gradients(function, x, scale, bias, dy, mask):
    def loss(x, scale, bias, dy, mask):
        return (function(x[None], scale, bias, mask[None])[0] * dy).sum()

    gradient = torch.func.grad(loss, (0, 1, 2))
    return torch.func.vmap(gradient, (0, None, None, 0, 0))(x, scale, bias, dy, mask)


def several_cotangents(function, x, scale, bias, dy, mask):
    pullback = torch.func.vjp(function, x, scale)[1]
    return torch.func.vmap(pullback)(torch.stack([dy, dy.square(), dy.cos()]))


def several_tangents(function, x, scale, bias, dy, mask):
    def push(*tangents):
        return torch.func.jvp(function, (x, scale), tangents)

    tangents = torch.stack([dy, dy.square(), dy.cos()]), torch.stack([scale, bias, bias.cos()])
    return torch.func.vmap(push)(*tangents)


def checkpointed(function, x, scale, bias, dy, mask):
    """The forward pass with its collectives is repeated in the backward pass."""
    leaves = [a.clone().requires_grad_() for a in (x, scale, bias)]
    return torch.autograd.grad(checkpoint(function, *leaves, use_reentrant=False), leaves, dy)


DERIVATIVES = {
    "double backward": penalty,
    "forward mode": forward_mode,
    "forward over backward": forward_over_backward,
    "func.grad": func_grad,
    "func.vjp": func_vjp,
    "func.jvp": func_jvp,
    "vmap over samples": func_vmap,
    "per-sample gradients": per_sample_gradients,
    "several cotangents": several_cotangents,
    "several tangents": several_tangents,
    "checkpointed": checkpointed,
}
