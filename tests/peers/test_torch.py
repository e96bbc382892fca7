"""The cases of PyTorch's tests of `torch.nn.GroupNorm` and `torch.nn.functional.group_norm`.

They are the module's inputs and errors, the operator's samples, references and errors, the tests
of test_nn.py (general, numeric, empty, memory formats), and what every module and every
differentiable operator must do. Compilation, export and tracing have files of their own in
tests/torch, with more cases than PyTorch has.
"""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional

from groupnorm import GroupNorm, group_norm, group_statistics
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import oracle
from tests.peers.compare import (
    HALF,
    Case,
    Difference,
    assert_all_agree,
    assert_differs,
    assert_listed,
    assert_same_error,
    host,
)
from tests.rows import CONTRACT, CONTRACT_64, assert_close

DIFFERENT_ON_PURPOSE = {
    "channels_last_and_large_mean": Difference(
        "mean 1e4 times the spread, in channels_last memory",
        "errors above 100, but not in contiguous memory",
        "errors below 5e-6 in every memory format",
        100.0,
    ),
    "large_mean": Difference(
        "mean 1e5 times the spread, in contiguous memory",
        "errors above 1e-3: the mean is rounded to float32",
        "errors below 5e-6",
        1e-3,
    ),
    "constant_group": Difference(
        "a constant group in channels_last memory",
        "rounding errors divided by sqrt(epsilon)",
        "the bias, exactly",
        0.1,
    ),
    "huge_values": Difference("values of 1e20", "NaN: their squares overflow", "normalized", "NaN"),
    "wide_input": Difference(
        "float64 input of a float32 layer",
        "raises in eager mode (compiled programs accept it)",
        "any mix of dtypes",
        "raises",
    ),
    "narrow_parameters": Difference(
        "float32 input and float16 parameters", "raises, likewise", "any mix of dtypes", "raises"
    ),
    "integers": Difference("integer input", "raises", "a float result", "raises"),
    "complex_values": Difference(
        "complex input", "raises", "the variance is E|x − m|²", "raises"
    ),
    "one_value_per_group": Difference(
        "a group of one value, `GroupNorm(6, 6)` of (1, 6)",
        'raises "when training", in evaluation too',
        "the bias",
        "raises",
    ),
    "samples_without_positions": Difference(
        "the gradient of samples without positions, (2, 6, 0)",
        "`weight.grad` is NaN",
        "0",
        "NaN",
    ),
    "float_for_an_integer": Difference("`num_groups=2.0`", "accepts it", "raises", "accepts"),
    "negative_groups": Difference("`num_groups=-3`", "accepts it", "raises", "accepts"),
    "negative_epsilon": Difference(
        "`eps=-0.5`, a sample of PyTorch's own tests",
        "accepts it; NaN where the variance is smaller",
        "raises",
        "accepts",
    ),
}  # fmt: skip

DTYPES = ["float32", "float64", "float16", "bfloat16"]
CHANNELS_FIRST = {"feature_axis": 1}


def draw(rng, *shape, dtype="float32"):
    return torch.from_numpy(rng.normal(size=shape)).to(getattr(torch, dtype))


def wide(a) -> np.ndarray | None:
    return None if a is None else a.detach().double().numpy()


def pair(num_groups, channels, epsilon=1e-5, *, affine=True, bias=True, dtype="float32", rng):
    """Return PyTorch's module and ours, with the same random parameters."""
    of = getattr(torch, dtype)
    peer = torch.nn.GroupNorm(num_groups, channels, epsilon, affine, dtype=of, bias=bias)
    layer = GroupNorm(
        (channels, ...), 0, num_groups, epsilon=epsilon, use_scale=affine, use_bias=affine and bias,
        param_dtype=dtype, backend="torch",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(draw(rng, channels))
    layer.load_state_dict(peer.state_dict())
    assert isinstance(layer, torch.nn.GroupNorm)
    return peer, layer


def tolerances(dtype):
    """Return the bounds of results, and of gradients relative to the largest (at least 1)."""
    if dtype in HALF:
        return HALF[dtype], 2 * HALF[dtype]
    return (2 * CONTRACT_64, 1e-13) if dtype == "float64" else (2 * CONTRACT, 1e-5)


def check_modules(peer, layer, x, rng) -> None:
    """Compare results, their dtype and memory format, and all gradients, with the oracle's."""
    options = {"num_groups": peer.num_groups, "epsilon": peer.eps, **CHANNELS_FIRST}
    dy = torch.empty_like(x).copy_(draw(rng, *x.shape))
    dtype = str(x.dtype).rpartition(".")[2]
    bound, gradient_bound = tolerances(dtype)
    parameters = (wide(peer.weight), wide(peer.bias))
    want = oracle.group_norm(wide(x), *parameters, **options)
    gradients = oracle.group_norm_gradients(wide(x), wide(dy), *parameters, **options)
    for module, slack in ((peer, 20), (layer, 1)):
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        assert y.dtype == x.dtype
        assert_close(host(y), want, tolerance=slack * bound)
        y.backward(dy)
        got = (leaf.grad, *(None if p is None else p.grad for p in (module.weight, module.bias)))
        for value, reference in zip(got, gradients, strict=True):
            if reference is None:
                assert value is None
            elif reference.size:
                error = np.abs(wide(value) - reference).max()
                assert error <= slack * gradient_bound * max(1, np.abs(reference).max())
        module.zero_grad()


# The module ------------------------------------------------------------------------------------

MODULES = {
    "1d": (3, 6, {}, (4, 6, 5)),
    "1d without bias": (3, 6, {"bias": False}, (4, 6, 5)),
    "no positions": (3, 12, {}, (4, 12)),
    "large batch": (1, 6, {}, (150, 6)),
    "1d instance norm": (5, 5, {"affine": False}, (4, 5, 5)),
    "1d layer norm": (1, 10, {"affine": False}, (4, 10)),
    "2d": (3, 6, {}, (4, 6, 2, 3)),
    "2d without bias": (3, 9, {"bias": False}, (4, 9, 2, 3)),
    "2d instance norm": (3, 3, {"affine": False}, (4, 3, 2, 3)),
    "2d layer norm": (1, 3, {"affine": False}, (4, 3, 2, 3)),
    "3d": (3, 6, {}, (2, 6, 3, 2, 4)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MODULES)
def test_module(case, dtype, rng):
    num_groups, channels, options, shape = MODULES[case]
    modules = pair(num_groups, channels, 1e-3, dtype=dtype, rng=rng, **options)
    check_modules(*modules, draw(rng, *shape, dtype=dtype), rng)


@pytest.mark.parametrize(("num_groups", "channels"), [(3, 10), (5, 13), (3, 2), (2, 3), (4, 6)])
def test_groups_must_divide_channels(num_groups, channels):
    assert_same_error(
        lambda: torch.nn.GroupNorm(num_groups, channels),
        lambda: GroupNorm((channels, ...), 0, num_groups, backend="torch"),
        match=f"num_groups={num_groups}.*{channels}",
    )


@pytest.mark.parametrize("case", ["2d", "2d without bias", "2d layer norm"])
def test_what_every_module_does(case, rng):
    """Evaluation equals training; copies, pickles and saved states equal the original."""
    num_groups, channels, options, shape = MODULES[case]
    peer, layer = pair(num_groups, channels, 1e-3, rng=rng, **options)
    x = draw(rng, *shape)
    y = layer(x)
    assert torch.equal(layer.eval()(x), y)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    peer.load_state_dict(torch.load(file))
    torch.testing.assert_close(peer(x), y)
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in peer.named_parameters()]
    assert (layer.num_groups, layer.num_channels, layer.eps) == (num_groups, channels, 1e-3)
    assert layer.double()(x.double()).dtype == torch.float64


def test_device_and_dtype_of_new_parameters():
    peer = torch.nn.GroupNorm(3, 6, device="meta", dtype=torch.float16)
    layer = GroupNorm((6, ...), 0, 3, device="meta", param_dtype="float16", backend="torch")
    for theirs, ours in zip(peer.parameters(), layer.parameters(), strict=True):
        assert (ours.device, ours.dtype, ours.shape) == (theirs.device, theirs.dtype, theirs.shape)


# The function ----------------------------------------------------------------------------------

SAMPLES = [
    ((1, 6, 3), 2, 0.5),
    ((2, 6, 3), 2, 0.5),  # PyTorch's epsilon is -0.5: see the differences
    ((1, 3), 1, 1e-5),
    ((0, 2), 1, 1e-5),
    ((5, 5, 5), 1, 0.5),
    ((1, 2), 1, 1e-5),
    ((4, 6, 10, 10), 3, 1e-5),
    ((4, 6, 10, 10), 6, 1e-5),
    ((4, 6, 10, 10), 1, 1e-5),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "num_groups", "epsilon"), SAMPLES, ids=str)
def test_function(shape, num_groups, epsilon, dtype, rng):
    x = draw(rng, *shape, dtype=dtype) * 4
    weight, bias = draw(rng, 2, shape[1], dtype=dtype)
    bound, _ = tolerances(dtype)
    for scale, shift in ((weight, bias), (weight, None), (None, bias), (None, None)):
        options = {"num_groups": num_groups, "epsilon": epsilon, **CHANNELS_FIRST}
        ours = group_norm(x, scale, shift, **options)
        want = oracle.group_norm(wide(x), wide(scale), wide(shift), **options)
        theirs = functional.group_norm(x, num_groups, scale, shift, epsilon)
        assert_all_agree(theirs, ours, want, tolerance=bound, peer=20 * bound)


@pytest.mark.parametrize(("shape", "num_groups", "epsilon"), SAMPLES, ids=str)
def test_statistics_of_the_native_operator(shape, num_groups, epsilon, rng):
    """`torch.native_group_norm` returns mean and 1 / standard deviation as well."""
    x = draw(rng, *shape) * 4
    size = (shape[0], shape[1], int(np.prod(shape[2:])))
    theirs = torch.native_group_norm(x, None, None, *size, num_groups, epsilon)
    ours = group_statistics(x, num_groups=num_groups, **CHANNELS_FIRST)
    variance = ours.m2 * ours.unit**2 / ours.count
    parts = wide(x).reshape(shape[0], num_groups, size[1] // num_groups * size[2])
    pairs = (
        (theirs[1], ours.mean, parts.mean(-1)),
        (theirs[2], (variance + epsilon) ** -0.5, (parts.var(-1) + epsilon) ** -0.5),
    )
    for peers, got, want in pairs:
        assert_close(host(peers), want, tolerance=1e-5)
        assert_close(host(got), want, tolerance=2 * CONTRACT)


@pytest.mark.parametrize(
    ("num_groups", "peer"),
    [
        (6, lambda x: functional.instance_norm(x)),
        (1, lambda x: functional.layer_norm(x, x.shape[1:])),
    ],
    ids=["instance norm", "layer norm"],
)
def test_functions_that_are_group_norms(num_groups, peer, rng):
    x, options = draw(rng, 4, 6, 5, 5), {"num_groups": num_groups, "epsilon": 1e-5}
    ours = group_norm(x, **options, **CHANNELS_FIRST)
    assert_all_agree(peer(x), ours, oracle.group_norm(wide(x), **options, **CHANNELS_FIRST))


def test_too_few_axes():
    assert_same_error(
        lambda: functional.group_norm(torch.ones(1), 1),
        lambda: GroupNorm((1, ...), 0, 1, backend="torch")(torch.ones(1)),
        match="x has shape|axes",
        peer=RuntimeError,
    )


@pytest.mark.parametrize(("shape", "groups"), [((2, 7, 4), 2), ((3, 1, 1, 1, 2), 10)], ids=str)
def test_channels_of_the_input_that_groups_do_not_divide(shape, groups):
    x = torch.ones(shape)
    assert_same_error(
        lambda: functional.group_norm(x, groups),
        lambda: group_norm(x, num_groups=groups, **CHANNELS_FIRST),
        match=f"num_groups={groups}",
        peer=(RuntimeError, ValueError),
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_derivatives_of_every_kind(rng):
    """Reverse, forward and second order, as PyTorch checks every operator."""
    x, (weight, bias) = draw(rng, 2, 6, 3, dtype="float64"), draw(rng, 2, 6, dtype="float64")
    leaves = [a.requires_grad_() for a in (x, weight.clone(), bias.clone())]

    def function(x, weight, bias):
        return group_norm(x, weight, bias, num_groups=2, epsilon=0.5, **CHANNELS_FIRST)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradients_of_parameters_for_each_sample(rng):
    """PyTorch's "expanded weights", here by `torch.func`."""
    peer, layer = pair(2, 6, rng=rng)
    x, dy = draw(rng, 3, 6, 5), draw(rng, 3, 6, 5)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x, dy):
        return (torch.func.functional_call(layer, parameters, (x[None],))[0] * dy).sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, dy)
    for sample in range(3):
        peer.zero_grad()
        peer(x[sample : sample + 1]).backward(dy[sample : sample + 1])
        torch.testing.assert_close(got["weight"][sample], peer.weight.grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["bias"][sample], peer.bias.grad, atol=1e-5, rtol=1e-5)


# test_nn.py ------------------------------------------------------------------------------------

GENERAL = [
    ((1, 2, 3, 4), 2),
    ((2, 3, 10), 3),
    ((3, 1, 1, 1, 2), 1),
    ((2, 6, 4, 2, 2), 3),
    ((1, 256, 1, 1), 32),
]


@pytest.mark.parametrize(("shape", "num_groups"), GENERAL, ids=str)
def test_mean_0_and_variance_1_without_epsilon(shape, num_groups, rng):
    """The parameters are applied to that. PyTorch's bounds are 1e-3 (its issue 44863)."""
    peer, layer = pair(num_groups, shape[1], 0.0, rng=rng)
    x = torch.from_numpy(rng.uniform(0, 10, size=shape).astype(np.float32))
    check_modules(peer, layer, x, rng)
    column = (1, -1) + (1,) * (x.ndim - 2)
    y = (layer(x).double() - layer.bias.view(column)) / layer.weight.view(column)
    parts = y.reshape(shape[0], num_groups, -1)
    torch.testing.assert_close(parts.mean(-1), torch.zeros_like(parts[..., 0]), atol=1e-5, rtol=0)
    ones = torch.ones_like(parts[..., 0])
    torch.testing.assert_close(parts.var(-1, unbiased=False), ones, atol=1e-5, rtol=0)


def test_an_empty_batch(rng):
    peer, layer = pair(2, 4, rng=rng)
    for module in (peer, layer):
        x = torch.zeros(0, 4, 2, 2, requires_grad=True)
        y = module(x)
        y.backward(torch.zeros_like(y))
        assert y.shape == x.grad.shape == x.shape
        assert not module.weight.grad.any()
        assert not module.bias.grad.any()


def test_a_large_group(rng):
    """PyTorch's has 18 million elements, and a bound of 1e-5."""
    peer, layer = pair(2, 8, rng=rng)
    x = torch.from_numpy(rng.uniform(size=(1, 8, 48, 48, 12)).astype(np.float32))
    want = oracle.group_norm(
        wide(x), wide(peer.weight), wide(peer.bias), num_groups=2, epsilon=1e-5, **CHANNELS_FIRST
    )
    assert_all_agree(peer(x), layer(x), want)


FORMATS = [
    ((4, 8, 10, 10), 4, torch.channels_last),
    ((2, 30, 9, 9), 3, torch.channels_last),
    ((2, 9, 7, 11, 15), 3, torch.channels_last_3d),
]


@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32")],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize(("shape", "num_groups", "memory_format"), FORMATS, ids=str)
def test_memory_format(shape, num_groups, memory_format, dtypes, rng):
    """It is kept, values and gradients are those of contiguous tensors; parameters may be wider."""
    dtype, param_dtype = dtypes
    peer, layer = pair(num_groups, shape[1], dtype=param_dtype, rng=rng)
    x = draw(rng, *shape, dtype=dtype).contiguous(memory_format=memory_format)
    check_modules(peer, layer, x, rng)
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(torch.ones_like(y))
    assert y.is_contiguous(memory_format=memory_format)
    assert leaf.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(1, 2), lambda x: x[..., ::2], lambda x: x[:, :, 3:], lambda x: x[:1]],
    ids=["transposed", "steps", "slice", "one sample"],
)
def test_tensors_that_are_not_contiguous(view, dtype, rng):
    x = view(draw(rng, 4, 20, 20, dtype=dtype))
    check_modules(*pair(4, 20, dtype=dtype, rng=rng), x, rng)


# Differences ---------------------------------------------------------------------------------


def values(x, tolerance=2 * CONTRACT) -> Case:
    """Return the case of a plain call of the functions with 3 groups."""
    return Case(
        lambda: functional.group_norm(x, 3),
        lambda: group_norm(x, num_groups=3, epsilon=1e-5, **CHANNELS_FIRST),
        oracle.group_norm(x.numpy(), num_groups=3, epsilon=1e-5, **CHANNELS_FIRST),
        tolerance,
    )


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def channels_last_and_large_mean(rng):
    return values(channels_last(draw(rng, 2, 6, 8, 8) + 1e4))


def large_mean(rng):
    return values(draw(rng, 2, 6, 8, 8) + 1e5)


def constant_group(rng):
    return values(channels_last(torch.full((2, 6, 8, 8), 10000.1)))


def huge_values(rng):
    return values(draw(rng, 2, 6, 8, 8) * 1e20)


def mixed(rng, dtype, param_dtype) -> Case:
    x = draw(rng, 2, 6, 5, dtype=dtype)
    weight, bias = draw(rng, 2, 6, dtype=param_dtype)
    options = {"num_groups": 3, "epsilon": 1e-5, **CHANNELS_FIRST}
    return Case(
        lambda: functional.group_norm(x, 3, weight, bias),
        lambda: group_norm(x, weight, bias, **options),
        oracle.group_norm(wide(x), wide(weight), wide(bias), **options),
        tolerances(dtype)[0],
    )


def wide_input(rng):
    return mixed(rng, "float64", "float32")


def narrow_parameters(rng):
    return mixed(rng, "float32", "float16")


def integers(rng):
    return values(torch.from_numpy(rng.integers(-9, 9, size=(2, 6, 5))))


def complex_values(rng):
    return values(torch.complex(draw(rng, 2, 6, 5), draw(rng, 2, 6, 5)))


def one_value_per_group(rng):
    peer, layer = pair(6, 6, rng=rng)
    x, want = draw(rng, 1, 6), wide(peer.bias)[None]
    return Case(lambda: peer.eval()(x), lambda: layer.eval()(x), want)


def samples_without_positions(rng):
    peer, layer = pair(3, 6, rng=rng)

    def gradient(module):
        module(torch.zeros(2, 6, 0)).sum().backward()
        return module.weight.grad

    return Case(lambda: gradient(peer), lambda: gradient(layer), np.zeros(6))


def construction(error, num_groups, **options) -> Case:
    epsilon = options.get("eps", 1e-5)
    return Case(
        lambda: torch.nn.GroupNorm(num_groups, 6, **options).weight,
        lambda: GroupNorm((6, ...), 0, num_groups, epsilon=epsilon, backend="torch").weight,
        error,
    )


def float_for_an_integer(rng):
    return construction(ArgumentTypeError, 2.0)


def negative_groups(rng):
    return construction(ArgumentValueError, -3)


def negative_epsilon(rng):
    return construction(ArgumentValueError, 3, eps=-0.5)


@pytest.mark.parametrize("name", DIFFERENT_ON_PURPOSE)
def test_different_on_purpose(name, rng):
    assert_differs(DIFFERENT_ON_PURPOSE[name], globals()[name](rng))


def test_the_page_lists_these_differences():
    assert_listed("PyTorch", DIFFERENT_ON_PURPOSE)
