"""Replacing the normalizations of a model in place: what stays, what is equal, what is refused."""

from __future__ import annotations

import concurrent.futures
import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import groupnorm.torch
from groupnorm import GroupNorm
from groupnorm.backends.torch.adapter import torch_adapter
from groupnorm.errors import ArgumentStateError, ArgumentTypeError, ArgumentValueError
from groupnorm.testing import oracle
from groupnorm.torch import Replacement, override, register_replacement, replace, restore
from tests.rows import CONTRACT, assert_close

SHAPE = (2, 8, 6, 5)


@pytest.fixture(autouse=True)
def seeded():
    """The weights of convolutions are drawn by PyTorch."""
    torch.manual_seed(0)


class Affine(nn.GroupNorm):
    """Computes something else than the class it derives from."""

    def forward(self, input):
        return super().forward(input) + 1


class Named(nn.GroupNorm):
    """Computes the same."""

    def __init__(self, channels):
        super().__init__(2, channels, eps=1e-3)


class WithActivation(nn.GroupNorm):
    """As timm's."""

    def __init__(self, channels, act):
        super().__init__(2, channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Block(nn.Module):
    """Calls its modules by name, and shares one of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8, eps=1e-2)
        self.norm3 = self.norm1
        self.act = nn.SiLU()

    def forward(self, x):
        x = self.act(self.norm1(self.conv(x)))
        return self.norm3(self.norm2(x))


def tensor(rng, *shape, offset=0.0):
    return torch.from_numpy((offset + rng.normal(size=shape)).astype(np.float32))


def randomized(module, rng):
    """Give all parameters of normalizations random values."""
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.copy_(tensor(rng, *p.shape))
    return module


def outcome(model, x, dy):
    """Return the result and the gradients of x and all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def assert_same(got, want, tolerance=2e-5):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        largest = max(1.0, float(b.abs().max()))  # sums cancel
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


# What stays ---------------------------------------------------------------------------------------


def test_everything_but_the_class_stays(rng):
    model = randomized(Block(), rng).eval()
    model.norm2.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    modules = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    report = replace(model)
    assert [entry.names for entry in report.replaced] == [("norm1", "norm3"), ("norm2",)]
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(m is modules[name] for name, m in model.named_modules())
    assert model.norm1 is model.norm3
    for norm in (model.norm1, model.norm2):
        assert isinstance(norm, nn.GroupNorm)
        assert isinstance(norm, GroupNorm)
        assert not norm.training
    assert not model.norm2.weight.requires_grad
    assert (model.norm2.num_groups, model.norm2.eps, model.norm2.num_channels) == (4, 1e-2, 8)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    fresh = Block()
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict())


@pytest.mark.parametrize("offset", [0, 1e4])
def test_results_are_this_librarys(offset, rng):
    norm = randomized(nn.GroupNorm(2, 8), rng)
    x = tensor(rng, *SHAPE, offset=offset)
    want = oracle.group_norm(
        x.numpy(), norm.weight.detach().numpy(), norm.bias.detach().numpy(),
        num_groups=2, feature_axis=1, epsilon=1e-5,
    )  # fmt: skip
    replace(norm)
    assert_close(norm(x).detach().numpy(), want, tolerance=2 * CONTRACT)


def test_gradients_are_those_of_the_model(rng):
    model, x, dy = randomized(Block(), rng), tensor(rng, *SHAPE), tensor(rng, *SHAPE)
    want = outcome(model, x, dy)
    replace(model)
    assert_same(outcome(model, x, dy), want)


def test_an_optimizer_goes_on(rng):
    ours, theirs = randomized(Block(), rng), None
    theirs = copy.deepcopy(ours)
    steps = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (ours, theirs)]
    for i in range(4):
        if i == 2:
            replace(ours)
        x = tensor(rng, *SHAPE)
        for model, optimizer in zip((ours, theirs), steps, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_hooks_are_called(rng):
    model, seen = Block(), []
    model.norm2.register_forward_hook(lambda m, args, y: seen.append("forward"))
    model.norm2.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    model.norm2.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    model.norm2.weight.register_hook(lambda g: seen.append("weight"))
    replace(model)
    model(tensor(rng, *SHAPE)).sum().backward()
    assert sorted(seen) == ["backward", "forward", "pre", "weight"]


def test_restore_gives_back_the_class_and_what_was_set(rng):
    model = randomized(Block(), rng)
    attributes = {name: dict(m.__dict__) for name, m in model.named_modules()}
    x = tensor(rng, *SHAPE)
    y = model(x)
    replace(model)
    report = restore(model)
    assert len(report.restored) == 2
    assert [type(m) for m in (model.norm1, model.norm2)] == [nn.GroupNorm] * 2
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == attributes
    assert torch.equal(model(x), y)
    replace(model)
    model.norm1.eps = 0.5
    model.norm1.num_groups = 8
    restore(model)
    assert (model.norm1.eps, model.norm1.num_groups) == (0.5, 8)
    assert "eps=0.5" in repr(model.norm1)
    assert len(restore(model)) == 0


def test_replacing_twice_changes_nothing():
    model = Block()
    replace(model)
    again = replace(model)
    assert not again.replaced
    assert [entry.note for entry in again] == ["replaced before"] * 2
    assert [entry.kind for entry in again] == ["GroupNorm"] * 2
    assert not again.skipped
    replace(model, on_unknown="raise")
    changed = replace(model, implementation="portable", dtype="float32")
    assert [entry.note for entry in changed.replaced] == ["again"] * 2
    assert (model.norm1.implementation, model.norm1.dtype) == ("portable", "float32")
    assert model.norm1(torch.ones(SHAPE, dtype=torch.bfloat16)).dtype == torch.float32
    restore(model)
    assert type(model.norm1) is nn.GroupNorm


def test_a_layer_of_ours_is_left_alone():
    model = nn.Sequential(GroupNorm((8, ...), 0, num_groups=2, backend="torch"))
    assert len(replace(model, fuse=False)) == 0
    assert len(restore(model)) == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", ["group", "instance", "activation", "fused"])
def test_replaced_models_are_copied(kind, how, rng):
    makers = {
        "group": lambda: nn.GroupNorm(2, 8),
        "instance": lambda: nn.InstanceNorm2d(8, affine=True),
        "activation": lambda: WithActivation(8, nn.SiLU()),
        "fused": lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU()),
    }
    register_replacement(WithActivation, rule_with_activation)
    model = randomized(makers[kind](), rng)
    assert len(replace(model, also=nn.InstanceNorm2d).replaced) == 1
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = tensor(rng, *SHAPE)
    assert torch.equal(model(x), other(x))
    assert type(other) is type(model)
    assert len(restore(other).restored) == len(restore(model).restored) > 0
    assert type(other) is type(makers[kind]())


def rule_with_activation(norm):
    return Replacement(norm.num_groups, norm.eps, (norm.num_channels, ...), then=("drop", "act"))


class Odd(nn.GroupNorm):
    """Takes more than x."""

    def forward(self, input, gain=1.0):
        return super().forward(input) * gain


class Hiding(nn.GroupNorm):
    """Has an attribute with the name of one of ours."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = 5.0


class Own(nn.InstanceNorm2d):
    """Overrides what PyTorch's forward calls."""

    def _apply_instance_norm(self, input):
        return input + 7


class Plain(nn.Module):
    """A module of no class of PyTorch, without methods of its own."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return nn.functional.group_norm(x, 2, self.weight, self.bias)


# Which classes ------------------------------------------------------------------------------------


def test_a_subclass_that_inherits_forward_is_replaced(rng):
    norm = randomized(Named(8), rng)
    x = tensor(rng, *SHAPE)
    want = norm(x)
    assert len(replace(norm).replaced) == 1
    assert isinstance(norm, Named)
    torch.testing.assert_close(norm(x), want, rtol=1e-5, atol=1e-5)
    restore(norm)
    assert type(norm) is Named


def parametrized():
    return parametrizations.weight_norm(nn.GroupNorm(2, 8), dim=0)


def scripted():
    return torch.jit.script(nn.GroupNorm(2, 8))


def quantized():
    weight = nn.Parameter(torch.ones(8))
    return torch.ao.nn.quantized.GroupNorm(2, 8, weight, weight, 1.0, 0)


def patched():
    norm = nn.GroupNorm(2, 8)
    norm.forward = lambda x: x
    return norm


class Property(nn.GroupNorm):
    """Computes its epsilon."""

    eps = property(lambda self: 1.0, lambda self, value: None)


UNKNOWN = {
    "a subclass": (lambda: Affine(2, 8), r"unknown subclass, .*Affine: .*register_replacement"),
    "a property": (lambda: Property(2, 8), "unknown subclass"),
    "parametrized": (parametrized, "parametrized: replace before"),
    "scripted": (scripted, "torch.jit.script"),
    "quantized": (quantized, "quantized"),
    "more arguments": (lambda: Odd(2, 8), "its forward takes more than x: gain"),
    "a hidden attribute": (lambda: Hiding(2, 8), "it defines scale, which"),
    "no channels": (lambda: nn.GroupNorm(1, 0), "no channels"),
    "a negative epsilon": (lambda: nn.GroupNorm(2, 8, eps=-1.0), "epsilon=-1.0"),
    "a forward of its own": (patched, "forward was replaced on the object"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_classes_are_reported_and_left_alone(kind):
    make, reason = UNKNOWN[kind]
    register_replacement(Odd, lambda norm: Replacement(2, norm.eps, (8, ...)))
    model = nn.Sequential(nn.GroupNorm(2, 8), make())
    cls = type(model[1])
    with pytest.raises(ArgumentValueError, match=rf"(?s)on_unknown='raise'.*1 \(.*{reason}"):
        replace(model, on_unknown="raise")
    assert type(model[0]) is nn.GroupNorm  # nothing was changed
    report = replace(model)
    assert type(model[1]) is cls
    [entry] = report.skipped
    assert entry.names == ("1",)
    assert re.search(reason, entry.note)
    assert entry.note in str(report)
    assert [entry.names for entry in report.replaced] == [("0",)]


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.Identity(), nn.Tanh(),
            nn.GELU(approximate="tanh")], ids=str,
)  # fmt: skip
def test_a_registered_class_with_an_activation(act, rng):
    register_replacement(WithActivation, rule_with_activation)
    model = randomized(WithActivation(8, act), rng)
    x, dy = tensor(rng, *SHAPE), tensor(rng, *SHAPE)
    want = outcome(model, x, dy)
    assert len(replace(model).replaced) == 1
    assert_same(outcome(model, x, dy), want)
    seen = []
    handle = model.act.register_forward_hook(lambda m, args, y: seen.append(y))
    assert_same(outcome(model, x, dy), want)
    assert len(seen) == 1
    handle.remove()
    model.drop = nn.Dropout(1.0).train()
    assert model(x).abs().max() == act(torch.zeros(1)).abs()


INSTANCE = {
    1: (nn.InstanceNorm1d, (3, 8, 40)),
    2: (nn.InstanceNorm2d, SHAPE),
    3: (nn.InstanceNorm3d, (2, 8, 3, 4, 5)),
}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dimensions", INSTANCE)
def test_instance_norm(dimensions, affine, rng):
    cls, shape = INSTANCE[dimensions]
    model = randomized(cls(8, affine=affine, eps=1e-3), rng)
    x, dy = tensor(rng, *shape), tensor(rng, *shape)
    want = outcome(model, x, dy)
    alone = model(x[0])
    assert len(replace(model)) == 0  # only if asked for
    assert len(replace(model, also=cls).replaced) == 1
    assert_same(outcome(model, x, dy), want)
    torch.testing.assert_close(model(x[0]), alone, rtol=1e-5, atol=1e-5)
    assert isinstance(model, cls)
    assert model.num_features == 8
    restore(model)
    assert type(model) is cls
    assert_same(outcome(model, x, dy), want, tolerance=0)


def test_instance_norm_with_running_statistics_is_skipped():
    model = nn.InstanceNorm2d(8, track_running_stats=True)
    [entry] = replace(model, also=[nn.InstanceNorm2d])
    assert (entry.result, entry.note) == ("skipped", "it uses running statistics")


@pytest.mark.parametrize("keywords", [{}, {"elementwise_affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("normalized", [(5,), (6, 5)])
def test_layer_norm(normalized, keywords, rng):
    model = randomized(nn.LayerNorm(normalized, eps=1e-3, **keywords), rng)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(tensor(rng, *p.shape))
    x, dy = tensor(rng, *SHAPE), tensor(rng, *SHAPE)
    want = outcome(model, x, dy)
    state = model.state_dict()
    assert len(replace(model, also=nn.LayerNorm).replaced) == 1
    assert_same(outcome(model, x, dy), want)
    assert model.state_dict().keys() == state.keys()
    model.reset_parameters()
    assert all((p == (name == "weight")).all() for name, p in model.named_parameters())
    torch.testing.assert_close(model(x[0, 0]), nn.LayerNorm(normalized, 1e-3)(x[0, 0]))


def test_an_instance_norm_that_computes_something_else_is_left_alone():
    model = Own(8)
    [entry] = replace(model, also=nn.InstanceNorm2d)
    assert entry.result == "skipped"
    assert type(model) is Own


def test_inputs_that_pytorch_refuses_are_refused():
    model = nn.InstanceNorm2d(8)
    replace(model, also=nn.InstanceNorm2d)
    with pytest.raises(ValueError, match="expected 3D or 4D input"):
        model(torch.ones(2, 8, 3, 3, 3))


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(5), lambda: nn.InstanceNorm2d(8),
                                  lambda: Named(8), lambda: nn.GroupNorm(2, 8)])  # fmt: skip
def test_the_input_by_its_name(make, rng):
    model, x = make(), tensor(rng, *SHAPE)
    want = model(input=x)
    replace(model, also=(nn.LayerNorm, nn.InstanceNorm2d))
    torch.testing.assert_close(model(input=x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError):
        model(x, other=x)
    with pytest.raises(TypeError):
        model()


def test_a_registered_module_of_no_class_of_pytorch(rng):
    register_replacement(Plain, lambda module: Replacement(2, 1e-5, (8, ...)))
    model, x = nn.Sequential(nn.GroupNorm(2, 8), Plain()), tensor(rng, *SHAPE)
    want = model(x)
    assert len(replace(model, also=Plain).replaced) == 2
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (Replacement(2, 1e-5, (4, ...)), r"its weight has shape \(8,\), and there are 4 channels"),
        (Replacement(3, 1e-5, (8, ...)), "num_groups=3 does not divide"),
        (Replacement(2, 1e-5, (8, ...), then=("nope",)), "no submodule nope"),
        (Replacement(2, 1e-5, 8), r"in_size=8: it must be a tuple, such as \(C, \.\.\.\)"),
    ],
)
def test_rules_are_checked_before_anything_is_changed(how, reason):
    register_replacement(Plain, lambda module: how)
    model = Plain()
    [entry] = replace(model, also=Plain)
    assert re.search(reason, entry.note)
    assert type(model) is Plain
    register_replacement(Plain, lambda module: Replacement(2, 1e-5, (8, ...), then="act"))
    with pytest.raises(ArgumentTypeError, match="then='act'"):
        replace(model, also=Plain)


def test_a_module_with_more_than_a_normalization_refuses_what_would_drop_it(rng):
    register_replacement(WithActivation, rule_with_activation)
    model = WithActivation(8, nn.SiLU())
    replace(model)
    for call in (lambda: model.vjp(tensor(rng, *SHAPE)), lambda: model.to_backend("numpy")):
        with pytest.raises(ArgumentStateError, match="this module calls drop, act"):
            call()
    other = Named(8)
    replace(other)
    assert other.to_backend("numpy").num_groups == 2


def test_threads_that_replace_at_once_get_the_same_class():
    class Fresh(nn.GroupNorm):
        pass

    models = [Fresh(2, 8) for _ in range(16)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(replace, models))
    assert len({type(m) for m in models}) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.GroupNorm(2, 8),
        lambda: Named(8),
        lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()),
    ],
)
def test_results_are_laid_out_as_pytorchs(make, rng):
    model = make()
    inputs = [
        tensor(rng, 2, 30, 8).transpose(1, 2), tensor(rng, *SHAPE).mT,
        tensor(rng, *SHAPE).contiguous(memory_format=torch.channels_last),
    ]  # fmt: skip
    want = [model(x) for x in inputs]
    with override():
        got = [model(x) for x in inputs]
    replace(model)
    for x, y, a in zip(inputs, want, got, strict=True):
        assert model(x).stride() == a.stride() == y.stride()


def test_other_results_are_laid_out_as_pytorchs(rng):
    x = tensor(rng, 2, 30, 8).transpose(1, 2)
    for model in (nn.InstanceNorm1d(8), nn.LayerNorm(30)):
        want = model(x)
        replace(model, also=(nn.InstanceNorm1d, nn.LayerNorm))
        assert model(x).stride() == want.stride()


def test_results_under_vmap(rng):
    norm, x = nn.GroupNorm(2, 8), tensor(rng, 3, *SHAPE).mT
    want = torch.stack([norm(a) for a in x])
    replace(norm)
    torch.testing.assert_close(torch.func.vmap(norm)(x), want, rtol=1e-5, atol=1e-5)


def test_a_forward_set_after_replacing_is_not_lost():
    model = nn.Sequential(nn.GroupNorm(2, 8))
    replace(model)
    model[0].forward = model[0].forward
    [entry] = restore(model)
    assert entry.result == "skipped"
    assert "its forward was replaced on the object since" in entry.note
    del model[0].forward
    assert restore(model)[0].result == "restored"


def test_a_model_that_contains_itself():
    model = nn.Sequential(nn.GroupNorm(2, 8))
    model._modules["me"] = model
    assert len(replace(model).replaced) == 1


# Options, dtypes, autocast ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype, rng):
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()).to(dtype)
    x = tensor(rng, *SHAPE).to(dtype)
    want = model(x)
    replace(model)
    got = model(x)
    assert got.dtype == want.dtype == dtype
    torch.testing.assert_close(got, want)
    replaced = nn.GroupNorm(2, 8).to(dtype)
    replace(replaced, dtype="float32")
    assert replaced(x).dtype == torch.float32


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use"),
]
MAKERS = {
    "norm": lambda: nn.GroupNorm(2, 8),
    "fused": lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()),
    "activation": lambda: WithActivation(8, nn.SiLU()),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", MAKERS)
def test_autocast_as_pytorchs_own(make, dtype, device):
    register_replacement(WithActivation, rule_with_activation)
    model = MAKERS[make]().to(device)
    x = torch.ones(SHAPE, device=device, dtype=dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        want = model.double()(x) if dtype is torch.float64 else model.float()(x)
        with override():
            assert model(x).dtype == want.dtype
        replace(model)
        assert model(x).dtype == want.dtype


def test_autocast_to_float32(monkeypatch, rng):
    """On a CUDA device, autocast makes the results of group normalizations float32."""
    x = tensor(rng, *SHAPE).bfloat16()
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    replace(model)
    for module in ("layer", "override"):
        name = f"groupnorm.backends.torch.{module}.is_autocast_to_float32"
        monkeypatch.setattr(name, lambda x: x.dtype == torch.bfloat16)
    want = nn.functional.silu(nn.functional.group_norm(x.float(), 2))
    y = model(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    with override():
        assert nn.functional.group_norm(x, 2).dtype == torch.float32


@pytest.mark.parametrize("implementation", ["portable", "native"])
def test_implementation(implementation, rng):
    model = nn.GroupNorm(2, 8)
    replace(model, implementation=implementation)
    assert model.implementation == implementation
    x = tensor(rng, *SHAPE, offset=1e5)
    error = (model(x) - nn.functional.group_norm(x.double(), 2)).abs().max()
    assert (error < CONTRACT) == (implementation == "portable")


def test_a_replaced_layer_accepts_a_mask(rng):
    model = nn.GroupNorm(8, 8)  # as in the feature encoder of Wav2Vec2
    x = tensor(rng, 2, 8, 30)
    alone = model(x[1:, :, :20])
    replace(model)
    mask = torch.arange(30) < torch.tensor([30, 20])[:, None]
    x[1, :, 20:] = torch.nan
    torch.testing.assert_close(model(x, mask[:, None])[1:, :, :20], alone, rtol=1e-5, atol=1e-5)


# PyTorch's tools on replaced models ---------------------------------------------------------------


def a_model(rng):
    register_replacement(WithActivation, rule_with_activation)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), WithActivation(8, nn.ReLU()),
        nn.InstanceNorm2d(8), Named(8), nn.Conv2d(8, 4, 1), nn.LayerNorm(6),
    )  # fmt: skip
    randomized(model, rng)
    x = tensor(rng, 2, 3, 8, 8)
    want = model(x)
    replace(model, also=(nn.InstanceNorm2d, nn.LayerNorm))
    return model, x, want


TOOLS = {
    "compile": lambda model, x: torch.compile(model, fullgraph=True),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "jit.trace": lambda model, x: torch.jit.trace(model, x),
    "functional_call": lambda model, x: (
        lambda x: torch.func.functional_call(model, dict(model.named_parameters()), x)
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("tool", TOOLS)
def test_tools(tool, rng):
    model, x, want = a_model(rng)
    try:
        made = TOOLS[tool](model, x)
        torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-5)
    finally:
        torch._dynamo.reset()


def test_the_first_call_of_a_process_is_not_compiled_twice(rng, monkeypatch):
    """What the first call imports would change what a compiled program depends on."""
    monkeypatch.delitem(torch_adapter.__dict__, "kernels", raising=False)
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    replace(model)
    compiled = []

    def compiler(graph, inputs):
        compiled.append(graph)
        return graph

    try:
        program = torch.compile(model, backend=compiler, dynamic=True, fullgraph=True)
        for shape in ((2, 8, 6, 5), (3, 8, 4, 7)):
            program(tensor(rng, *shape))
    finally:
        torch._dynamo.reset()
    assert len(compiled) == 1


def test_fx_keeps_replaced_modules_as_nodes(rng):
    model, _, _ = a_model(rng)
    graph = torch.fx.symbolic_trace(model)
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert called == {str(i) for i in range(8)}


# The report, and wrong arguments ------------------------------------------------------------------


def test_the_report(rng):
    model = nn.ModuleList([nn.GroupNorm(2, 8) for _ in range(12)])
    model.append(Affine(2, 8))
    report = replace(model)
    assert [entry.name for entry in report] == [str(i) for i in range(13)]
    assert report[-1].result == "skipped"
    assert len(report.replaced) == 12
    lines = str(report).splitlines()
    assert len(lines) == 2 + 13
    assert lines[0].split() == ["module", "class", "result", "note"]
    assert repr(report) == "<Report: 12 replaced, 1 skipped>"
    assert str(replace(nn.Linear(2, 2))) == "no group normalization was found"
    assert "norm1 (and 1 other name)" in str(replace(Block()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: replace(torch.ones(2)), ArgumentTypeError, "model is of type Tensor"),
        (lambda: restore("model"), ArgumentTypeError, "model is of type str"),
        (lambda: replace(Block(), on_unknown="fail"), ArgumentValueError, "on_unknown='fail'"),
        (lambda: replace(Block(), also="InstanceNorm"), ArgumentTypeError, "also='InstanceNorm'"),
        (lambda: replace(Block(), also=3), ArgumentTypeError, "also=3"),
        (lambda: replace(Block(), fuse=1), ArgumentTypeError, "fuse=1"),
        (lambda: replace(Block(), dtype="int8"), ArgumentTypeError, "dtype='int8'"),
        (lambda: replace(Block(), implementation="x"), ArgumentValueError, "implementation='x'"),
        (lambda: register_replacement(3, len), ArgumentTypeError, "cls=3"),
        (lambda: register_replacement(nn.GroupNorm, 3), ArgumentTypeError, "rule=3"),
        (lambda: groupnorm.torch.register_fusion(3, len), ArgumentTypeError, "cls=3"),
        (lambda: groupnorm.torch.register_fusion(Block, 3), ArgumentTypeError, "forward=3"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_rule_that_returns_something_else():
    class Wrong(nn.GroupNorm):
        def forward(self, input):
            return input

    register_replacement(Wrong, lambda norm: None)
    model = nn.Sequential(nn.GroupNorm(2, 8), Wrong(2, 8))
    with pytest.raises(ArgumentTypeError, match=r"the rule of .*Wrong returned None"):
        replace(model)
    assert type(model[0]) is nn.GroupNorm


def test_a_wrong_argument_changes_nothing():
    model = Block()
    with pytest.raises(ArgumentTypeError):
        replace(model, dtype="int8")
    assert type(model.norm1) is nn.GroupNorm
