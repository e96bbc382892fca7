"""The PyTorch layer under compile, export, autograd of any order, torch.func and autocast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from groupnorm import GroupNorm, group_norm
from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient
from tests.torch.test_layer import CHANNELS, GROUPS, assert_equals_oracle, native, tensor

# torch's own inductor and forward-mode formulas still use torch.jit.script, and warn about it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_compiled_code_of_others():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(rng, **keywords) -> tuple[GroupNorm, torch.Tensor]:
    """A float64 layer and input, small enough for numerical gradients."""
    layer = native(rng, **keywords).double()
    return layer, tensor(rng, 2, CHANNELS, 3, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fast", [True, False])
def test_compile_in_one_graph(fast, dynamic, rng):
    layer = native(rng, use_fast_variance=fast)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for batch, offset in ((2, 0.0), (3, 1e4)):
        x = (tensor(rng, batch, CHANNELS, 5, 6) + offset).detach().requires_grad_()
        y = compiled(x)
        assert_equals_oracle(layer, x, 1, y)
        dy = tensor(rng, *x.shape).detach()
        (dx,) = torch.autograd.grad(y, x, dy)
        (eager,) = torch.autograd.grad(layer(x), x, dy)
        assert_gradient(dx.numpy(), eager.numpy(), rtol=1e-3 if offset else 5e-6)


@pytest.mark.slow
def test_compile_with_a_mask(rng):
    layer = native(rng)
    x = tensor(rng, 2, CHANNELS, 6)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])[:, None]
    spoiled = torch.where(mask, x, torch.nan).detach()
    y = torch.compile(layer, fullgraph=True)(spoiled, mask)
    scale, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    want = oracle.group_norm(
        spoiled.numpy(),
        scale,
        bias,
        num_groups=GROUPS,
        feature_axis=1,
        epsilon=1e-5,
        mask=mask.numpy(),
    )
    assert_close(y.detach().numpy(), want, tolerance=2 * CONTRACT)


def test_compile_once_for_a_dynamic_batch(rng):
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return module.forward

    layer = native(rng)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting)
    for batch in (2, 3, 5, 7):
        x = tensor(rng, batch, CHANNELS, 6)
        assert_equals_oracle(layer, x, 1, compiled(x))
    assert len(graphs) == 1


def test_compile_the_function(rng):
    x = tensor(rng, 2, 5, CHANNELS)
    compiled = torch.compile(
        lambda x: group_norm(x, num_groups=GROUPS), fullgraph=True, backend="aot_eager"
    )
    want = oracle.group_norm(x.detach().numpy(), num_groups=GROUPS)
    assert_close(compiled(x).detach().numpy(), want, tolerance=CONTRACT)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_export(dynamic, rng):
    layer = native(rng).eval()
    x = tensor(rng, 4, CHANNELS, 5)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}} if dynamic else None
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    assert_equals_oracle(layer, x, 1, program.module()(x))
    if dynamic:
        other = tensor(rng, 9, CHANNELS, 5)
        assert_equals_oracle(layer, other, 1, program.module()(other))
    assert {"weight", "bias"} == set(program.state_dict)


@pytest.mark.slow
def test_export_with_a_dynamic_length(rng):
    layer = GroupNorm(8, num_groups=2, backend="torch")
    example = torch.tensor(rng.normal(size=(4, 30, 8)), dtype=torch.float32)
    shapes = ({1: torch.export.Dim("t", min=2, max=4096)},)
    program = torch.export.export(layer, (example,), dynamic_shapes=shapes)
    for length in (3, 1000):
        x = torch.tensor(1e4 + rng.normal(size=(4, length, 8)), dtype=torch.float32)
        want = oracle.group_norm(x.numpy(), num_groups=2)
        assert np.abs(program.module()(x).detach().numpy() - want).max() <= 5e-6 * 4


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients(check, masked, fast, rng):
    layer, x = small(rng, use_fast_variance=fast)
    mask = torch.tensor([[True, True, False], [True, False, True]])[:, None] if masked else None

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, mask))

    # epsilon is small: the derivative of 1 / sqrt(var + eps) must be part of the check.
    assert check(function, (x, layer.weight, layer.bias), atol=1e-6, rtol=1e-4)


def test_forward_mode(rng):
    layer, x = small(rng)
    assert torch.autograd.gradcheck(
        lambda x: layer(x), (x,), check_forward_ad=True, check_backward_ad=False
    )
    tangent, dy = (tensor(rng, *x.shape, dtype=torch.float64).detach() for _ in range(2))
    y, dot = torch.func.jvp(layer, (x.detach(),), (tangent,))
    _, pullback = torch.func.vjp(layer, x.detach())
    torch.testing.assert_close((dot * dy).sum(), (pullback(dy)[0] * tangent).sum())
    torch.testing.assert_close(y, layer(x))


def test_vmap_over_x(rng):
    layer, x = small(rng)
    stacked = tensor(rng, 4, *x.shape, dtype=torch.float64)
    got = torch.func.vmap(layer)(stacked)
    for one, y in zip(stacked, got, strict=True):
        assert_equals_oracle(layer, one, 1, y, tolerance=1e-13)


def test_vmap_over_layers(rng):
    layers = [small(rng)[0] for _ in range(3)]
    x = small(rng)[1]
    parameters, _ = torch.func.stack_module_state(layers)

    def call(parameters, x):
        return torch.func.functional_call(layers[0], parameters, (x,))

    got = torch.func.vmap(call, in_dims=(0, None))(parameters, x)
    for layer, y in zip(layers, got, strict=True):
        assert_equals_oracle(layer, x, 1, y, tolerance=1e-13)


def test_func_grad_and_per_sample_gradients(rng):
    layer, x = small(rng)
    dy = tensor(rng, *x.shape, dtype=torch.float64).detach()
    parameters = {k: v.detach() for k, v in layer.named_parameters()}

    def loss(parameters, x, dy):
        return (torch.func.functional_call(layer, parameters, (x,)) * dy).sum()

    grads = torch.func.grad(loss)(parameters, x.detach(), dy)
    scale, bias = (parameters[k].numpy() for k in ("weight", "bias"))
    keywords = {"num_groups": GROUPS, "feature_axis": 1, "epsilon": 1e-5}
    want = oracle.group_norm_gradients(x.detach().numpy(), dy.numpy(), scale, bias, **keywords)
    assert_gradient(grads["weight"].numpy(), want.scale, rtol=1e-12)
    assert_gradient(grads["bias"].numpy(), want.bias, rtol=1e-12)

    one_by_one = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        parameters, x.detach()[:, None], dy[:, None]
    )
    for i, got in enumerate(one_by_one["weight"]):
        sample = slice(i, i + 1)
        want = oracle.group_norm_gradients(
            x.detach().numpy()[sample], dy.numpy()[sample], scale, bias, **keywords
        )
        assert_gradient(got.numpy(), want.scale, rtol=1e-12)


def test_hessian_vector_product_agrees_with_finite_differences(rng):
    layer, x = small(rng)
    dy, v = (tensor(rng, *x.shape, dtype=torch.float64).detach() for _ in range(2))

    def gradient(x):
        return torch.func.grad(lambda x: (layer(x).pow(3) * dy).sum())(x)

    point = x.detach()
    product = torch.func.jvp(gradient, (point,), (v,))[1]
    step = 1e-5
    numerical = (gradient(point + step * v) - gradient(point - step * v)) / (2 * step)
    torch.testing.assert_close(product, numerical, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_statistics_exact(dtype, rng):
    layer = native(rng)
    model = nn.Sequential(nn.Conv1d(3, CHANNELS, 1), layer)
    x = tensor(rng, 4, 3, 50)
    with torch.autocast("cpu", dtype=dtype):
        inner = model[0](x)
        assert inner.dtype == dtype
        y = model(x)
    # The dtype of torch.nn.GroupNorm there; exact for the half-precision input but for rounding.
    assert y.dtype == dtype
    assert_equals_oracle(layer, inner, 1, y, tolerance=torch.finfo(dtype).eps)
    y.square().mean().backward()
    assert torch.isfinite(model[0].weight.grad).all()


def test_gradients_against_the_oracle(rng):
    layer = native(rng)
    x, dy = tensor(rng, 3, CHANNELS, 4, 5), tensor(rng, 3, CHANNELS, 4, 5).detach()
    layer(x).backward(dy)
    scale, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    want = oracle.group_norm_gradients(
        x.detach().numpy(),
        dy.numpy(),
        scale,
        bias,
        num_groups=GROUPS,
        feature_axis=1,
        epsilon=1e-5,
    )
    assert_gradient(x.grad.numpy(), want.x, rtol=GRADIENT)
    assert_gradient(layer.weight.grad.numpy(), want.scale, rtol=GRADIENT)
    assert_gradient(layer.bias.grad.numpy(), want.bias, rtol=GRADIENT)


def test_checkpointing_gives_the_same_bits(rng):
    layer, x = native(rng), tensor(rng, 2, CHANNELS, 6)
    dy = tensor(rng, *x.shape).detach()
    (plain,) = torch.autograd.grad(layer(x), x, dy)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (again,) = torch.autograd.grad(y, x, dy)
    assert np.array_equal(plain.numpy(), again.numpy())


def test_vmap_over_the_bias_alone(rng):
    x = torch.tensor(rng.normal(size=(2, 20, 8)))
    biases = torch.tensor(rng.normal(size=(3, 8)))
    got = torch.vmap(lambda b: group_norm(x, None, b, num_groups=2))(biases)
    want = torch.stack([group_norm(x, None, b, num_groups=2) for b in biases])
    torch.testing.assert_close(got, want)
