"""The PyTorch layer as a torch.nn.Module: common operations on modules."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import groupnorm
from groupnorm import GroupNorm, group_norm
from groupnorm.errors import ArgumentStateError, ArgumentTypeError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient

CHANNELS, GROUPS = 8, 4


def randomize(layer: nn.Module, rng) -> nn.Module:
    """Set the parameters to values that differ in all channels."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=tuple(parameter.shape))))
    return layer


def native(rng, **keywords) -> nn.Module:
    """A layer that is also an nn.GroupNorm."""
    layer = GroupNorm(
        (CHANNELS, ...), 0, num_groups=GROUPS, backend="torch", epsilon=1e-5, **keywords
    )
    return randomize(layer, rng)


def channels_last(rng, **keywords) -> nn.Module:
    return randomize(GroupNorm(CHANNELS, num_groups=GROUPS, backend="torch", **keywords), rng)


def tensor(rng, *shape, dtype=torch.float32, **keywords) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape)).to(dtype).requires_grad_(**keywords)


def expected(layer, x: torch.Tensor, axis: int) -> np.ndarray:
    scale, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    x = x.detach().double().numpy()
    return oracle.group_norm(
        x, scale, bias, num_groups=GROUPS, feature_axis=axis, epsilon=layer.epsilon
    )


def assert_equals_oracle(layer, x, axis, y=None, tolerance=CONTRACT) -> None:
    y = layer(x) if y is None else y
    assert isinstance(y, torch.Tensor)
    assert y.shape == x.shape
    assert_close(y.detach().double().numpy(), expected(layer, x, axis), tolerance=2 * tolerance)


NATIVE = {
    "in_size=(8, ...)": ((CHANNELS, ...), 0, {}),
    "without parameters": ((CHANNELS, ...), 0, {"use_scale": False, "use_bias": False}),
    "group_size": ((CHANNELS, ...), 0, {"num_groups": None, "group_size": 2}),
}
NOT_NATIVE = {
    "channels last": ((CHANNELS,), -1, {}),
    "any number of batch axes": ((CHANNELS, 5, 5), 0, {}),
    "given reduction axes": ((CHANNELS, ...), 0, {"reduction_axes": (1, 2, 3)}),
    "channels at the end of any rank": ((..., CHANNELS), -1, {}),
    "reduction over the batch": ((CHANNELS, ...), 0, {"reduction_axes": (0, 1, 2)}),
    "two feature axes": ((2, 4, ...), (0, 1), {}),
}


@pytest.mark.parametrize(("in_size", "axis", "keywords"), NATIVE.values(), ids=NATIVE)
def test_is_a_torch_group_norm(in_size, axis, keywords):
    layer = GroupNorm(in_size, axis, **{"num_groups": GROUPS, **keywords}, backend="torch")
    assert isinstance(layer, nn.GroupNorm)
    assert isinstance(layer, GroupNorm)
    assert (layer.num_groups, layer.num_channels, layer.eps) == (GROUPS, CHANNELS, 1e-6)
    assert layer.affine == bool(keywords.get("use_scale", True))


def test_names_of_arguments(rng):
    """PyTorch's layer calls x input."""
    layer, x = native(rng), tensor(rng, 2, CHANNELS, 5)
    assert torch.equal(layer(input=x), layer(x=x))
    mask = torch.tensor([True, False, True, True, True])
    assert torch.equal(layer(input=x, mask=mask), layer(x, mask))
    with pytest.raises(ArgumentTypeError, match="x=None"):
        layer()


def test_parameters_without_values_cannot_be_converted():
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="torch", device="meta")
    with pytest.raises(ArgumentStateError, match=r"meta device.*reset_parameters"):
        layer.to_backend("numpy")


@pytest.mark.parametrize(("in_size", "axis", "keywords"), NOT_NATIVE.values(), ids=NOT_NATIVE)
def test_is_a_module_but_not_a_torch_group_norm(in_size, axis, keywords):
    layer = GroupNorm(in_size, axis, num_groups=GROUPS, **keywords, backend="torch")
    assert isinstance(layer, nn.Module)
    assert isinstance(layer, GroupNorm)
    assert not isinstance(layer, nn.GroupNorm)


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 4, 5), (2, 8, 2, 3, 4)], ids=str)
def test_computes_what_torch_group_norm_computes(shape, rng):
    layer, x = native(rng), tensor(rng, *shape)
    theirs = nn.GroupNorm(GROUPS, CHANNELS, eps=1e-5)
    theirs.load_state_dict(layer.state_dict(), strict=True)
    assert_equals_oracle(layer, x, axis=1)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [native, channels_last])
def test_state_dict_is_compatible_with_torch_group_norm(make, rng):
    ours, theirs = make(rng), nn.GroupNorm(GROUPS, CHANNELS)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(theirs.weight, ours.weight, rtol=0, atol=0)
    randomize(theirs, rng)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=0, atol=0)
    np.testing.assert_array_equal(ours.scale.detach(), theirs.weight.detach())
    assert [name for name, _ in ours.named_parameters()] == ["weight", "bias"]


def test_parameters_of_two_feature_axes_are_flat(rng):
    layer = randomize(GroupNorm((2, 5, 4), (0, 2), num_groups=GROUPS, backend="torch"), rng)
    assert layer.weight.shape == (8,)
    assert layer.scale.shape == (2, 4)
    assert layer.bias.shape in [(8,), (2, 4)]
    np.testing.assert_array_equal(layer.scale.detach().reshape(-1), layer.weight.detach())
    nn.GroupNorm(GROUPS, 8).load_state_dict(layer.state_dict(), strict=True)
    x = tensor(rng, 3, 2, 5, 4)
    scale, bias = (p.detach().double().reshape(2, 4).numpy() for p in (layer.weight, layer.bias))
    want = oracle.group_norm(
        x.detach().numpy(), scale, bias, num_groups=GROUPS, feature_axis=(1, 3)
    )
    assert_close(layer(x).detach().numpy(), want, tolerance=2 * CONTRACT)


@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_parameter_switched_off(absent, rng):
    layer = native(rng, **{"use_scale" if absent == "weight" else "use_bias": False})
    assert getattr(layer, absent) is None
    assert len(layer.state_dict()) == 1
    x = tensor(rng, 2, CHANNELS, 5)
    given = {k: p.detach().numpy() for k, p in layer.named_parameters()}
    want = oracle.group_norm(
        x.detach().numpy(),
        given.get("weight"),
        given.get("bias"),
        num_groups=GROUPS,
        feature_axis=1,
        epsilon=1e-5,
    )
    assert_close(layer(x).detach().numpy(), want, tolerance=2 * CONTRACT)


def test_in_sequential_with_hooks_and_optimizer(rng):
    torch.manual_seed(0)
    norm = native(rng)
    model = nn.Sequential(
        nn.Conv1d(3, CHANNELS, 3), norm, nn.SiLU(), nn.Flatten(), nn.Linear(48, 2)
    )
    seen = []
    handle = norm.register_forward_hook(lambda module, args, out: seen.append(out))
    x, target = tensor(rng, 16, 3, 8), tensor(rng, 16, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = norm.weight.detach().clone()
    losses = []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert (norm.weight.detach() != before).all()
    assert len(seen) == 40
    handle.remove()


@pytest.mark.parametrize("make", [native, channels_last])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(make, how, rng):
    layer, x = make(rng), tensor(rng, 2, CHANNELS, CHANNELS)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.weight.mul_(2)
    assert not torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(dtype, rng):
    layer = native(rng).to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    x = tensor(rng, 2, CHANNELS, 6, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    # One rounding to the output's dtype, and one additional ulp.
    tolerance = 1e-14 if dtype == torch.float64 else 1.5 * torch.finfo(dtype).eps
    assert_close(y.detach().double().numpy(), expected(layer, x, 1), tolerance=tolerance)


def test_half(rng):
    layer = native(rng).half()
    assert layer.weight.dtype == torch.float16
    assert layer(tensor(rng, 2, CHANNELS, 6, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asked", [None, "input"])
def test_a_torch_group_norm_keeps_the_dtype(asked, dtype, rng):
    layer, x = native(rng, dtype=asked), tensor(rng, 2, CHANNELS, 6, dtype=dtype)
    assert layer.dtype == asked
    y = layer(x)
    assert y.dtype == layer.vjp(x)[0].dtype == dtype
    assert_equals_oracle(layer, x, 1, y, tolerance=max(CONTRACT, torch.finfo(dtype).eps))
    y.float().square().sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_layers_promote(dtype, rng):
    layer, x = channels_last(rng), tensor(rng, 2, 6, CHANNELS, dtype=dtype)
    assert layer(x).dtype == torch.promote_types(dtype, torch.float32)
    assert_equals_oracle(layer, x, axis=-1)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_default_dtype_survives_a_conversion(library, rng):
    layer = native(rng)
    assert layer.to_backend(library).dtype is None
    assert (
        layer.to_backend(library)
        .to_backend("torch")(torch.ones(1, CHANNELS, 2, dtype=torch.float16))
        .dtype
        == torch.float16
    )


def test_norms_kept_in_float32(rng):
    """A model in half precision whose norms are float32, as transformers and diffusers do."""
    model = nn.Sequential(nn.Conv1d(3, CHANNELS, 1), native(rng), nn.Conv1d(CHANNELS, 4, 1))
    model.bfloat16()
    model[1].float()
    assert model(tensor(rng, 2, 3, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


# What other tools do to a torch.nn.GroupNorm -----------------------------------------------------


def pair(rng) -> tuple[nn.Module, nn.Module]:
    """Our layer and PyTorch's with equal parameters."""
    ours, theirs = native(rng), nn.GroupNorm(GROUPS, CHANNELS, eps=1e-5)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def set_epsilon(layer):
    layer.eps = 0.25


def set_groups(layer):
    layer.num_groups = 2


def prune_channels(layer):
    """As pruning tools do, in their order: the counts, then the parameters."""
    layer.num_channels, layer.num_groups = 6, 3
    layer.weight = nn.Parameter(layer.weight.detach()[2:].clone())
    layer.bias = nn.Parameter(layer.bias.detach()[2:].clone())


def prune_data(layer):
    layer.weight.data, layer.bias.data = layer.weight.data[:4], layer.bias.data[:4]
    layer.num_groups, layer.num_channels = 2, 4


def prune_by_a_mask(layer):
    nn.utils.prune.l1_unstructured(layer, "weight", amount=3)
    nn.utils.prune.random_unstructured(layer, "bias", amount=0.5)


def prune_for_good(layer):
    torch.manual_seed(0)
    prune_by_a_mask(layer)
    nn.utils.prune.remove(layer, "weight")


def prune_a_model(layer):
    nn.utils.prune.global_unstructured(
        [(layer, "weight"), (layer, "bias")], nn.utils.prune.L1Unstructured, amount=5
    )


def drop_the_bias(layer):
    layer.bias = None


def drop_all_parameters(layer):
    layer.affine = False
    layer.weight = layer.bias = None


def switch_affine_off(layer):
    """PyTorch's layer still applies its weights, and no longer resets them."""
    layer.affine = False
    layer.reset_parameters()


def share_the_weight(layer):
    layer.weight = nn.Parameter(torch.arange(8.0))
    layer.bias = layer.weight


CHANGES = [
    set_epsilon, set_groups, prune_channels, prune_data, prune_by_a_mask, prune_for_good,
    prune_a_model, drop_the_bias, drop_all_parameters, switch_affine_off, share_the_weight,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
# The compiler reads it of a pruned weight, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_changes_from_outside_take_effect(change, compiled, rng):
    ours, theirs = pair(rng)
    run = torch.compile(ours, backend="eager") if compiled else ours
    if compiled:
        run(tensor(rng, 2, CHANNELS, 5))
    for layer in (ours, theirs):
        torch.manual_seed(0)
        change(layer)
    for name in ("eps", "num_groups", "num_channels", "affine"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    # Of a small spread, so that epsilon shows.
    x = (tensor(rng, 2, theirs.num_channels, 5).detach() / 4).requires_grad_()
    want = theirs.double()(x.double())
    dy = tensor(rng, *x.shape)
    y = run(x)
    assert_close(y.detach().double().numpy(), want.detach().numpy(), tolerance=2 * CONTRACT)
    (got,) = torch.autograd.grad(y, x, dy)
    (expected,) = torch.autograd.grad(want, x, dy.double())
    assert_gradient(got.double().numpy(), expected.double().numpy(), rtol=GRADIENT)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_layers_are_copied_and_converted(change, rng):
    layer = native(rng)
    change(layer)
    if all(a is None or a.is_leaf for a in (layer.weight, layer.bias)):
        # PyTorch copies no pruned layer, whose weight is a product.
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert repr(other) == repr(layer)
    other = layer.to_backend("numpy")
    x = tensor(rng, 2, layer.num_channels, 5)
    assert_close(other(x).detach().numpy(), layer(x).detach().double().numpy(), tolerance=CONTRACT)
    assert f"num_groups={layer.num_groups}" in repr(layer)
    assert f"epsilon={layer.eps}" in repr(layer)
    assert f"({layer.num_channels}, ...)" in repr(layer)
    assert ("use_bias=False" in repr(layer)) == (layer.bias is None)
    assert layer.group_size * layer.num_groups == layer.num_channels


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eps", -1.0, "eps=-1.0"),
        ("eps", "small", "eps='small'"),
        ("num_groups", 0, "num_groups=0"),
        ("num_groups", 2.0, "num_groups=2.0"),
        ("num_channels", -8, "num_channels=-8"),
        ("num_channels", True, "num_channels=True"),
    ],
)
def test_wrong_values_from_outside(name, value, message, rng):
    layer = native(rng)
    before = repr(layer)
    with pytest.raises(groupnorm.errors.GroupNormError, match=message):
        setattr(layer, name, value)
    assert repr(layer) == before


def test_half_of_a_change_raises_in_the_call(rng):
    layer, x = native(rng), tensor(rng, 2, 6, 5)
    layer.weight = nn.Parameter(layer.weight.detach()[:6])
    with pytest.raises(groupnorm.errors.ArgumentValueError, match=r"\(6,\).*\(8,\)"):
        layer(x)
    layer.num_channels = 6
    with pytest.raises(groupnorm.errors.ArgumentValueError, match="num_groups=4 does not divide"):
        layer(x)
    layer.num_groups = 3
    with pytest.raises(groupnorm.errors.ArgumentValueError, match=r"bias has shape \(8,\)"):
        layer(x)
    with pytest.raises(groupnorm.errors.ArgumentValueError, match="bias has shape"):
        layer.to_backend("numpy")


def test_the_channels_of_several_axes_cannot_be_set():
    layer = GroupNorm((2, 5, 4), (0, 2), num_groups=GROUPS, backend="torch")
    layer.num_channels = 8
    with pytest.raises(groupnorm.errors.ArgumentValueError, match="num_channels=6"):
        layer.num_channels = 6


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 1e-3])
def test_repr_shows_epsilon_whatever_it_is(epsilon):
    """Neither the default here nor PyTorch's goes without saying."""
    layer = GroupNorm((CHANNELS, ...), 0, num_groups=GROUPS, epsilon=epsilon, backend="torch")
    assert f"epsilon={epsilon}" in repr(layer)
    assert "param_dtype" not in repr(layer)
    assert "param_dtype='float64'" in repr(
        GroupNorm(CHANNELS, num_groups=GROUPS, param_dtype="float64", backend="torch")
    )


# Initialization ----------------------------------------------------------------------------------


def test_meta_device_then_reset(rng):
    layer = GroupNorm((CHANNELS, ...), 0, num_groups=GROUPS, backend="torch", device="meta")
    assert layer.weight.is_meta
    y = layer(torch.empty(2, CHANNELS, 4, device="meta"))
    assert y.is_meta
    assert y.shape == (2, CHANNELS, 4)
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.fill_(7)
        layer.bias.fill_(7)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(CHANNELS))
    assert torch.equal(layer.bias, torch.zeros(CHANNELS))
    assert_equals_oracle(layer, tensor(rng, 2, CHANNELS, 4), axis=1)


def test_reset_parameters_calls_the_initializers():
    constant = groupnorm.initializers.constant
    layer = GroupNorm(
        CHANNELS,
        num_groups=GROUPS,
        backend="torch",
        scale_init=constant(3.0),
        bias_init=constant(-1.0),
    )
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.full((CHANNELS,), 3.0))
    assert torch.equal(layer.bias, torch.full((CHANNELS,), -1.0))


INITIALIZERS = {
    "default": {},
    "constant": {"scale_init": groupnorm.initializers.constant(3.0)},
    "torch": {"scale_init": nn.init.normal_, "bias_init": nn.init.ones_},
}


@pytest.mark.parametrize("keywords", INITIALIZERS.values(), ids=INITIALIZERS)
def test_meta_device_context(keywords):
    with torch.device("meta"):
        layer = GroupNorm((CHANNELS, ...), 0, num_groups=GROUPS, backend="torch", **keywords)
        here = GroupNorm(
            (CHANNELS, ...), 0, num_groups=GROUPS, backend="torch", device="cpu", **keywords
        )
    assert layer.weight.is_meta
    assert layer.bias.is_meta
    torch.manual_seed(0)
    expected = GroupNorm((CHANNELS, ...), 0, num_groups=GROUPS, backend="torch", **keywords)
    layer.to_empty(device="cpu")
    layer.affine = True
    for other in (layer, here):
        torch.manual_seed(0)
        with torch.device("meta"):  # the parameters' own device counts
            other.reset_parameters()
        for name in ("weight", "bias"):
            assert torch.equal(getattr(other, name), getattr(expected, name))


def test_the_default_device():
    torch.set_default_device("meta")
    try:
        layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="torch")
        assert layer.weight.is_meta
        assert GroupNorm(CHANNELS, num_groups=GROUPS, device="cpu", backend="torch").bias.is_cpu
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("name", ["float64", "bfloat16", "float16"])
def test_the_default_dtype(name):
    """As PyTorch's own layers; the other backends always create float32."""
    torch.set_default_dtype(getattr(torch, name))
    try:
        layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="torch")
        theirs = nn.GroupNorm(GROUPS, CHANNELS)
        assert GroupNorm(CHANNELS, num_groups=GROUPS).param_dtype == "float32"
        given = GroupNorm(CHANNELS, num_groups=GROUPS, backend="torch", param_dtype="float32")
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype == layer.bias.dtype == theirs.weight.dtype
    assert layer.param_dtype == name
    assert f"param_dtype={name!r}" in repr(layer)
    assert given.weight.dtype == torch.float32
    layer.reset_parameters()
    assert layer.weight.dtype == theirs.weight.dtype


@pytest.mark.parametrize("device", ["gpu0", "cuda:99", object()])
def test_an_unknown_device(device):
    with pytest.raises(groupnorm.errors.ArgumentValueError, match="device="):
        GroupNorm(CHANNELS, num_groups=GROUPS, backend="torch", device=device)


def test_channels_last_memory_format_is_kept(rng):
    layer = native(rng)
    x = tensor(rng, 2, CHANNELS, 5, 6).detach().contiguous(memory_format=torch.channels_last)
    y = layer(x + 1e4)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()
    assert_equals_oracle(layer, x + 1e4, 1, y)
    assert layer(x.contiguous()).is_contiguous()


@pytest.mark.parametrize("make", [native, channels_last])
def test_weight_is_swapped_by_functional_call(make, rng):
    layer, x = make(rng), tensor(rng, 2, CHANNELS, CHANNELS)
    other = make(rng)
    y = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert torch.equal(y, other(x))
    assert not torch.equal(y, layer(x))


def test_parametrize(rng):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, x = native(rng), tensor(rng, 2, CHANNELS, 6)
    plain = layer(x)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    assert isinstance(layer, GroupNorm)
    bias = layer.bias[:, None]
    torch.testing.assert_close(layer(x) - bias, 2 * (plain - bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.scale, layer.weight)


def test_repr(rng):
    text = repr(native(rng))
    assert "GroupNorm" in text
    for part in ("num_groups=4", "8", "epsilon=1e-05"):
        assert part in text
    assert text in repr(nn.Sequential(native(rng)))


@pytest.mark.parametrize(
    ("library", "name"),
    [("numpy", "NumPy"), pytest.param("jax", "JAX", marks=pytest.mark.needs("jax"))],
)
def test_foreign_array(library, name, rng):
    x = np.ones((2, CHANNELS, 3), np.float32)
    if library == "jax":
        x = importlib.import_module("jax.numpy").asarray(x)
    with pytest.raises(ArgumentTypeError) as caught:
        native(rng)(x)
    for word in (name, "PyTorch", "to_backend"):
        assert word in str(caught.value)


@pytest.mark.parametrize("x", [[[1.0, 2.0]], 1.0, None], ids=str)
def test_not_an_array(x):
    with pytest.raises(ArgumentTypeError, match="x"):
        GroupNorm(2, num_groups=1, backend="torch")(x)


def test_two_devices_raise(rng):
    layer = native(rng)
    with pytest.raises((ArgumentTypeError, groupnorm.errors.ArgumentValueError)) as caught:
        layer(torch.ones(2, CHANNELS, 3, device="meta"))
    assert "meta" in str(caught.value)
    assert "cpu" in str(caught.value)


def test_mask_through_the_module(rng):
    layer, x = native(rng), tensor(rng, 2, CHANNELS, 6)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])[:, None]
    spoiled = torch.where(mask, x, torch.nan).detach().requires_grad_()
    y = layer(spoiled, mask)
    dy = tensor(rng, *x.shape).detach()
    y.backward(dy)
    scale, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    keywords = {"num_groups": GROUPS, "feature_axis": 1, "epsilon": 1e-5, "mask": mask.numpy()}
    want = oracle.group_norm(spoiled.detach().numpy(), scale, bias, **keywords)
    assert_close(y.detach().numpy(), want, tolerance=2 * CONTRACT)
    grads = oracle.group_norm_gradients(
        spoiled.detach().numpy(), dy.numpy(), scale, bias, **keywords
    )
    assert_gradient(spoiled.grad.numpy(), grads.x, rtol=GRADIENT)
    assert_gradient(layer.weight.grad.numpy(), grads.scale, rtol=GRADIENT)
    assert_gradient(layer.bias.grad.numpy(), grads.bias, rtol=GRADIENT)
    assert torch.equal(layer(spoiled, mask=mask), layer.update(spoiled, mask=mask))


def test_function_on_tensors(rng):
    x = tensor(rng, 2, 5, CHANNELS)
    y = group_norm(x, num_groups=GROUPS)
    want = oracle.group_norm(x.detach().numpy(), num_groups=GROUPS)
    assert_close(y.detach().numpy(), want, tolerance=CONTRACT)


def test_another_default_device_changes_nothing(rng):
    x = torch.from_numpy(rng.normal(size=(2, 50, 8)).astype(np.float32)).requires_grad_()
    with torch.device("meta"):
        y = groupnorm.group_norm(x, num_groups=2)
        y.backward(torch.ones_like(y))
    assert y.device == x.grad.device == torch.device("cpu")
    want = oracle.group_norm(x.detach().numpy(), num_groups=2)
    assert_close(y.detach().numpy(), want, tolerance=CONTRACT)


def test_a_cotangent_with_a_negative_bit(rng):
    """A tensor with the negative bit is stored in memory with the opposite sign."""
    x = torch.from_numpy(rng.normal(size=(2, 8, 6)).astype(np.float32)).requires_grad_()
    dy = torch.from_numpy(rng.normal(size=(2, 8, 6)).astype(np.float32))
    y = group_norm(x, num_groups=2, feature_axis=1)
    (plain,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    negative = torch._neg_view(dy)
    assert negative.is_neg()
    (found,) = torch.autograd.grad(y, x, negative)
    torch.testing.assert_close(found, -plain, rtol=0, atol=0)


def test_a_subclass_that_computes_its_scale(rng):
    class OnePlus(type(native(rng))):
        @property
        def scale(self):
            return 1 + self.weight

    layer = native(rng)
    layer.__class__ = OnePlus
    x = torch.from_numpy(rng.normal(size=(2, CHANNELS, 5))).float()
    want = torch.nn.functional.group_norm(x, GROUPS, 1 + layer.weight, layer.bias, layer.eps)
    for given in (x, torch.nn.Parameter(x)):
        torch.testing.assert_close(layer(given), want, rtol=1e-5, atol=1e-5)
