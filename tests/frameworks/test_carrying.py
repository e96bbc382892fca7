"""`GroupNorm.from_` and `layer.to_`: what is read off a framework's group norm, and refused."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import importlib
from typing import Any

import numpy as np
import pytest

import groupnorm
from groupnorm import GroupNorm
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, GroupNormError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, assert_close

CHANNELS, GROUPS = 8, 2


def module(name: str) -> Any:
    return importlib.import_module(name)


def needs(*packages: str):
    return pytest.mark.needs(*packages)


@pytest.fixture
def values(rng):
    return rng.normal(size=(2, CHANNELS)).astype(np.float32)


@pytest.fixture
def x(rng):
    return rng.normal(size=(3, 4, 4, CHANNELS)).astype(np.float32)


def to_host(y: Any) -> np.ndarray:
    return np.asarray(y.detach() if hasattr(y, "detach") else y)


def check(layer, peer, x, values, epsilon, **options) -> None:
    """Check that a layer computes what its peer computes, and the formula, to its own accuracy."""
    given = {"feature_axis": -1, **options}
    want = oracle.group_norm(x, *values, num_groups=GROUPS, epsilon=epsilon, **given)
    np.testing.assert_allclose(to_host(peer), want, rtol=1e-4, atol=1e-4)
    host = layer.to_backend("numpy")
    assert_close(host(x), want, tolerance=2 * CONTRACT)
    assert host.epsilon == epsilon
    for got, wanted in zip((host.scale, host.bias), values, strict=True):
        assert got.tobytes() == wanted.tobytes()


# From the frameworks' own classes, with the epsilon that each has by default ---------------------


@needs("torch")
def test_from_torch(x, values):
    torch = module("torch")
    x = np.moveaxis(x, -1, 1)
    peer = torch.nn.GroupNorm(GROUPS, CHANNELS)
    with torch.no_grad():
        for parameter, value in zip(peer.parameters(), values, strict=True):
            parameter.copy_(torch.from_numpy(value))
    peer.bias.requires_grad_(False)
    layer = GroupNorm.from_(peer)
    assert (layer.backend, layer.dtype, layer.trainable) == ("torch", "input", True)
    other = layer.eval().to_("torch")
    for one in (layer, other):
        assert [p.requires_grad for p in one.parameters()] == [True, False]
    assert not other.training
    hooked = torch.nn.GroupNorm(GROUPS, CHANNELS)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ArgumentValueError, match="hooks"):
        GroupNorm.from_(hooked)
    check(layer, peer(torch.from_numpy(x)), x, values, 1e-5, feature_axis=1)
    assert type(peer) is torch.nn.GroupNorm  # as it was
    with torch.no_grad():
        peer.weight.zero_()
    assert layer.weight.all()  # a copy
    assert GroupNorm.from_(torch.nn.GroupNorm(2, 8, affine=False)).scale is None
    frozen = torch.nn.GroupNorm(2, 8).requires_grad_(False)
    assert not GroupNorm.from_(frozen).trainable


@needs("torch")
def test_from_torch_layer_norm_and_refusals():
    torch = module("torch")
    layer = GroupNorm.from_(torch.nn.LayerNorm((4, 6), eps=0.5))
    assert (layer.num_groups, layer.epsilon, layer.in_size[-2:]) == (1, 0.5, (4, 6))

    class Other(torch.nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) + 1

    for refused in (Other(2, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8)):
        with pytest.raises(GroupNormError, match=f"of type {type(refused).__name__}"):
            GroupNorm.from_(refused)


@needs("jax", "flax")
@pytest.mark.parametrize("own", [False, True], ids=["flax", "groupnorm"])
def test_from_flax_nnx(own, x, values):
    nnx = module("flax.nnx")
    cls = module("groupnorm.flax.nnx").GroupNorm if own else nnx.GroupNorm
    peer = cls(CHANNELS, GROUPS, rngs=nnx.Rngs(0))
    peer.scale.set_value(values[0])
    peer.bias.set_value(values[1])
    layer = GroupNorm.from_(peer)
    assert (layer.backend, layer.dtype) == ("jax", None)
    check(layer, peer(x), x, values, 1e-6)
    options = {"dtype": "bfloat16", "use_fast_variance": False, "axis_name": "batch"}
    other = GroupNorm.from_(cls(8, 2, epsilon=0.5, use_bias=False, rngs=nnx.Rngs(0), **options))
    assert (other.epsilon, other.bias, other.dtype) == (0.5, None, "bfloat16")
    assert (other.use_fast_variance, other.axis_name) == (False, "batch")
    back = other.to_("flax.nnx")
    for name in ("epsilon", "use_bias", "num_groups", "axis_name", "use_fast_variance"):
        assert getattr(back, name) == getattr(other, name)


@needs("jax", "flax")
@pytest.mark.parametrize("own", [False, True], ids=["flax", "groupnorm"])
def test_from_flax_linen(own, x, values):
    linen = module("flax.linen")
    cls = module("groupnorm.flax.linen").GroupNorm if own else linen.GroupNorm
    peer = cls(num_groups=None, group_size=CHANNELS // GROUPS)
    variables = {"params": dict(zip(("scale", "bias"), values, strict=True))}
    for given in (variables, variables["params"]):
        check(GroupNorm.from_(peer, given), peer.apply(variables, x), x, values, 1e-6)
    for wrong in (None, {}, {"params": {"scale": values[0]}}):
        with pytest.raises(ArgumentTypeError, match="params"):
            GroupNorm.from_(peer, wrong)


@needs("jax", "equinox")
@pytest.mark.parametrize("own", [False, True], ids=["equinox", "groupnorm"])
def test_from_equinox(own, x, values):
    jax, equinox = module("jax"), module("equinox")
    cls = module("groupnorm.equinox").GroupNorm if own else equinox.nn.GroupNorm
    peer = equinox.tree_at(
        lambda norm: [norm.weight, norm.bias],
        cls(GROUPS, CHANNELS),
        [jax.numpy.asarray(v) for v in values],
    )
    x = np.moveaxis(x, -1, 1)
    layer = GroupNorm.from_(peer)
    check(layer, jax.vmap(peer)(x), x, values, 1e-5, feature_axis=1)
    assert layer.dtype == "input"
    with pytest.raises(ArgumentValueError, match="channels=None"):
        GroupNorm.from_(cls(2, channelwise_affine=False))


@needs("jax", "haiku")
@pytest.mark.parametrize("own", [False, True], ids=["haiku", "groupnorm"])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_from_haiku(first, own, x, values):
    haiku = module("haiku")
    cls = module("groupnorm.haiku").GroupNorm if own else haiku.GroupNorm
    x = np.moveaxis(x, -1, 1) if first else x
    shape = (CHANNELS, 1, 1) if first else (CHANNELS,)
    parameters = dict(zip(("scale", "offset"), values.reshape(2, *shape), strict=True))
    found = []

    def model(x):
        peer = cls(GROUPS, data_format="channels_first" if first else "channels_last")
        found.append(GroupNorm.from_(peer, parameters))
        y = peer(x)
        found.append(GroupNorm.from_(peer, {"group_norm": parameters}))  # after a call, too
        return y

    transformed = haiku.without_apply_rng(haiku.transform(model))
    y = transformed.apply({"group_norm": parameters}, x)
    for layer in found:
        check(layer, y, x, values, 1e-5, feature_axis=1 if first else -1)
    size = (CHANNELS, 4, 4) if first else (4, 4, CHANNELS)
    layer = GroupNorm(size, 0 if first else -1, num_groups=GROUPS, scale_init=values[0])
    assert layer.to_("haiku")[1]["scale"].shape == shape

    layer = GroupNorm((CHANNELS, ...), 0, num_groups=GROUPS, scale_init=values[0])
    if first:
        make, found_parameters = layer.to_("haiku", in_size=(CHANNELS, 4, 4))
        assert found_parameters["scale"].shape == shape
        again = GroupNorm.from_(make, found_parameters)  # outside of transformed functions
        assert to_host(again.scale).tobytes() == values[0].tobytes()
    with pytest.raises(ArgumentValueError, match=r"in_size=\(6, 4\) has 6 channels"):
        layer.to_("haiku", in_size=(6, 4))

    def sparse(x):
        return GroupNorm.from_(cls(GROUPS, axis=[1, 2]), parameters)

    with pytest.raises(ArgumentValueError, match="axis="):
        haiku.transform(sparse).init(None, x)


@needs("keras", "torch")
@pytest.mark.parametrize("own", [False, True], ids=["keras", "groupnorm"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_from_keras(axis, own, x, values):
    keras = module("keras")
    cls = groupnorm.keras.GroupNormalization if own else keras.layers.GroupNormalization
    x = np.moveaxis(x, -1, axis)
    peer = cls(GROUPS, axis=axis)
    with pytest.raises(ArgumentValueError, match="not built"):
        GroupNorm.from_(peer)
    peer.build(x.shape)
    peer.set_weights(list(values))
    layer = GroupNorm.from_(peer)
    assert (layer.backend, layer.dtype) == (keras.backend.backend(), "float32")
    check(layer, peer(x), x, values, 1e-3, feature_axis=axis)
    mixed = cls(GROUPS, dtype="mixed_bfloat16")
    mixed.build((None, CHANNELS))
    layer = GroupNorm.from_(mixed)
    assert (layer.dtype, layer.param_dtype) == ("bfloat16", "float32")
    back = layer.to_("keras")
    assert back.dtype_policy.name == "mixed_bfloat16"
    assert back(keras.ops.zeros((2, 3, CHANNELS))).dtype == module("torch").bfloat16
    mixed.trainable = False
    assert not GroupNorm.from_(mixed).to_("keras").trainable


@needs("jax", "brainstate")
@pytest.mark.parametrize("own", [False, True], ids=["brainstate", "groupnorm"])
def test_from_brainstate(own, x, values):
    brainstate = module("brainstate")
    cls = module("groupnorm.brainstate").GroupNorm if own else brainstate.nn.GroupNorm
    peer = cls((CHANNELS,), num_groups=GROUPS)
    scale, bias = map(module("jax").numpy.asarray, values)
    peer.weight.value = {"scale": scale, "bias": bias}
    check(GroupNorm.from_(peer), peer(module("jax").numpy.asarray(x)), x, values, 1e-6)
    without = cls((CHANNELS,), num_groups=GROUPS, use_scale=False, use_bias=False)
    assert GroupNorm.from_(without).scale is GroupNorm.from_(without).bias is None


@needs("mlx")
@pytest.mark.parametrize("compatible", [False, True], ids=["interleaved", "compatible"])
def test_from_mlx(compatible, x, values):
    mx, nn = module("mlx.core"), module("mlx.nn")
    peer = nn.GroupNorm(GROUPS, CHANNELS, pytorch_compatible=compatible)
    peer.weight, peer.bias = map(mx.array, values)
    layer = GroupNorm.from_(peer)
    assert (layer.backend, layer.epsilon) == ("mlx", 1e-5)
    y = np.asarray(peer(mx.array(x)))
    if compatible:
        check(layer, y, x, values, 1e-5)
        return
    view = mx.array(x).reshape(3, 4, 4, CHANNELS // GROUPS, GROUPS).swapaxes(-1, -2)
    got = np.asarray(layer(view).swapaxes(-1, -2).reshape(x.shape))
    order = np.arange(CHANNELS).reshape(-1, GROUPS).T.ravel()  # the channels of each group
    want = oracle.group_norm(x[..., order], *values[:, order], num_groups=GROUPS, epsilon=1e-5)
    assert_close(got[..., order], want, tolerance=2 * CONTRACT)
    np.testing.assert_allclose(y[..., order], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [None, 3, np.ones(3), dict, GroupNorm])
def test_from_what_is_no_module(wrong):
    with pytest.raises(ArgumentTypeError, match="layer is of type"):
        GroupNorm.from_(wrong)


@pytest.mark.parametrize(
    "library", ["numpy", *(pytest.param(n, marks=needs(n)) for n in ("jax", "torch", "mlx"))]
)
def test_from_a_layer_of_this_library(library, values):
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, scale_init=values[0], backend=library)
    other = GroupNorm.from_(layer)
    assert type(other) is type(layer)
    assert other is not layer
    assert repr(other) == repr(layer)
    assert to_host(other.scale).tobytes() == values[0].tobytes()


@needs("torch")
def test_from_a_replaced_module_and_one_that_computes_more():
    torch = module("torch")

    class WithActivation(torch.nn.GroupNorm):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.act = torch.nn.SiLU()

        def forward(self, x):
            return self.act(super().forward(x))

    def rule(norm):
        return groupnorm.torch.Replacement(
            norm.num_groups, norm.eps, (norm.num_channels, ...), then=("act",)
        )

    groupnorm.torch.register_replacement(WithActivation, rule)
    for replaced in (False, True):
        plain, more = torch.nn.GroupNorm(GROUPS, CHANNELS), WithActivation(GROUPS, CHANNELS)
        if replaced:
            groupnorm.torch.replace(torch.nn.ModuleList([plain, more]))
        layer = GroupNorm.from_(plain)
        assert (layer.num_groups, layer.epsilon, layer.dtype) == (GROUPS, 1e-5, "input")
        with pytest.raises(GroupNormError, match=r"act|what follows"):
            GroupNorm.from_(more)


@needs("jax", "flax")
def test_parameters_of_two_dtypes(values):
    linen = module("flax.linen")
    params = {"scale": values[0], "bias": values[1].astype(np.float16)}
    with pytest.raises(ArgumentValueError, match=r"float32 and a bias of float16"):
        GroupNorm.from_(linen.GroupNorm(GROUPS), params)


# What a framework's group norm cannot be ---------------------------------------------------------

REFUSED = [
    ("torch", {}, {}, "feature_axis=0"),
    ("torch", {}, {"feature_axis": 0}, "pass that as dtype"),
    ("torch", {"in_size": (8, ...), "feature_axis": 0}, {}, "dtype='input'"),
    ("flax.nnx", {"dtype": "input"}, {}, "dtype=None"),
    ("flax.linen", {"in_size": (8, ...), "feature_axis": 0}, {}, "feature_axis=-1"),
    ("flax.nnx", {"activation": "silu"}, {}, "activation='silu'"),
    ("flax.nnx", {"trainable": False}, {}, "trainable=False"),
    ("equinox", {"use_bias": False}, {"feature_axis": 0, "dtype": "input"}, "use_bias=False"),
    ("mlx", {"use_scale": False}, {}, "use_scale=False"),
    ("haiku", {"reduction_axes": (-1,)}, {}, r"reduction_axes=\(-1,\)"),
    ("haiku", {"in_size": (4, 8, 4), "feature_axis": 1}, {}, "on other axes"),
    ("haiku", {"in_size": (8, ...), "feature_axis": 0}, {}, "Pass in_size with all"),
    (
        "keras",
        {"in_size": (2, 4), "feature_axis": (0, 1)},
        {"dtype": "float32"},
        "=0 or feature_axis=-1",
    ),
    ("keras", {"axis_name": "i"}, {"dtype": "float32"}, "axis_name='i'"),
    ("keras", {"param_dtype": "bfloat16"}, {"dtype": "float32"}, "mixed_float16"),
    ("paddle", {}, {}, "name='paddle'"),
    (None, {}, {}, "name=None"),
    ("torch", {}, {"feature_axis": 1}, "feature_axis=1"),
    ("flax.nnx", {"reduction_axes": (-1,)}, {"feature_axis": -1}, "reduction_axes="),
    ("flax.nnx", {}, {"dtype": "int32"}, "dtype='int32'"),
]


@needs("jax", "flax", "haiku", "keras", "torch", "equinox", "mlx")
@pytest.mark.parametrize(("name", "options", "changes", "match"), REFUSED)
def test_refused(name, options, changes, match):
    layer = GroupNorm(**{"in_size": CHANNELS, "num_groups": GROUPS, **options})
    with pytest.raises(GroupNormError, match=match):
        layer.to_(name, **changes)


@needs("jax", "flax", "equinox", "haiku", "brainstate", "keras", "torch")
@pytest.mark.parametrize("name", ["flax.nnx", "flax.linen", "equinox", "haiku", "brainstate"])
def test_float64_is_not_rounded(name):
    layer = GroupNorm((CHANNELS, 4), 0, num_groups=GROUPS, param_dtype="float64", scale_init=1 / 3)
    changes = {"feature_axis": 0, "dtype": "input"} if name == "equinox" else {"feature_axis": -1}
    with pytest.raises(GroupNormError, match="float64"):
        layer.to_(name, **changes)
    module_ = layer.to_("keras", dtype="float64")
    assert module_.gamma.value.detach().numpy().tobytes() == layer.scale.tobytes()


@needs("jax", "flax", "brainstate", "keras", "torch")
def test_options_that_no_layer_has():
    nnx, linen, keras = module("flax.nnx"), module("flax.linen"), module("keras")
    values = {"scale": np.ones(8, np.float32), "bias": np.ones(8, np.float32)}
    regular = keras.layers.GroupNormalization(2, gamma_regularizer="l2")
    regular.build((None, 8))
    half = keras.layers.GroupNormalization(2)
    half.build((None, 8))
    half.gamma.trainable = False
    active = keras.layers.GroupNormalization(2, activity_regularizer="l2")
    active.build((None, 8))
    cases = {
        "promote_dtype": (nnx.GroupNorm(8, 2, rngs=nnx.Rngs(0), promote_dtype=lambda a, **_: a),),
        "reduction_axes": (nnx.GroupNorm(8, 2, rngs=nnx.Rngs(0), reduction_axes=(-1,)),),
        "force_float32": (linen.GroupNorm(2, force_float32_reductions=False), values),
        "gamma_regularizer|regularizer": (regular,),
        "gamma and beta alone": (half,),
        "activity_regularizer": (active,),
        "brainstate": (
            module("brainstate").nn.GroupNorm((8,), num_groups=2, reduction_axes=(-1,)),
        ),
        "is of type list": (linen.GroupNorm(2), [1, 2]),
    }
    for match, arguments in cases.items():
        with pytest.raises(GroupNormError, match=match):
            GroupNorm.from_(*arguments)


@needs("torch")
def test_moving_the_channels_keeps_the_parameters(values):
    layer = GroupNorm((4, 4, CHANNELS), num_groups=GROUPS, scale_init=values[0])
    other = layer.to_("torch", feature_axis=0, dtype="input")
    assert other.in_size == (CHANNELS, ...)
    assert to_host(other.weight).tobytes() == values[0].tobytes()
    assert layer.in_size == (4, 4, CHANNELS)  # as it was


# Layers of this library -------------------------------------------------------------------------


@needs("torch")
@pytest.mark.parametrize("axis", [0, -1])
def test_a_subclass_keeps_its_call_and_is_not_carried(axis, x):
    torch = module("torch")
    base = module("groupnorm.backends.torch").TorchGroupNorm

    class Gated(base):
        def __init__(self):
            size = (CHANNELS, ...) if axis == 0 else CHANNELS
            super().__init__(size, axis, num_groups=GROUPS)
            self.gate = torch.nn.Parameter(torch.full((1,), 5.0))

        def forward(self, x, mask=None):
            return super().forward(x, mask) * self.gate

    layer, given = Gated(), torch.from_numpy(x if axis == -1 else np.moveaxis(x, -1, 1))
    want = oracle.group_norm(given.numpy(), num_groups=GROUPS, feature_axis=-1 if axis else 1)
    assert_close(to_host(layer(given)), 5 * want, tolerance=10 * CONTRACT)
    for carry in (
        lambda: layer.to_backend("torch"),
        lambda: GroupNorm.from_(layer),
        lambda: layer.to_("flax.nnx", feature_axis=-1),
    ):
        with pytest.raises(ArgumentTypeError, match="Gated, whose class has a forward of its own"):
            carry()


@needs("torch")
def test_hooks_of_a_layer_are_not_lost():
    layer = GroupNorm((CHANNELS, ...), 0, num_groups=GROUPS, backend="torch")
    layer.register_forward_hook(lambda module, given, y: 100 * y)
    for carry in (lambda: GroupNorm.from_(layer), lambda: layer.to_("torch")):
        with pytest.raises(ArgumentValueError, match="has hooks"):
            carry()


@needs("torch")
def test_parameters_of_a_layer_that_are_computed():
    prune = module("torch.nn.utils.prune")
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="torch")
    prune.l1_unstructured(layer, "weight", 0.5)
    assert layer.to_backend("torch").weight.sum() == CHANNELS / 2


@needs("torch", "jax")
def test_the_dtype_that_a_layer_of_pytorch_has_by_default():
    """Without `dtype`, a `torch.nn.GroupNorm` keeps x's, which flax's cannot."""
    torch = module("torch")
    layer = GroupNorm((CHANNELS, ...), 0, num_groups=GROUPS, backend="torch")
    x = torch.ones(2, CHANNELS, 3, dtype=torch.bfloat16)
    assert layer.to_("torch")(x).dtype == torch.bfloat16
    with pytest.raises(ArgumentValueError, match="dtype='input'"):
        layer.to_("flax.nnx", feature_axis=-1)


@needs("torch")
def test_to_torch_is_a_group_norm_of_pytorch():
    layer = GroupNorm((CHANNELS, 4), 0, num_groups=GROUPS, dtype="input")
    assert isinstance(layer.to_("torch"), module("torch").nn.GroupNorm)


@needs("torch", "mlx", "jax", "flax", "equinox")
def test_a_parameter_that_is_frozen_alone():
    layers = {
        "torch": GroupNorm((CHANNELS, ...), 0, num_groups=GROUPS, backend="torch", dtype="input"),
        "mlx": GroupNorm(CHANNELS, num_groups=GROUPS, backend="mlx"),
    }
    layers["torch"].weight.requires_grad_(False)
    layers["mlx"].freeze(keys="weight")
    for name, layer in layers.items():
        for same in (layer.to_backend(name), GroupNorm.from_(layer), layer.to_(name)):
            assert same._trained() == layer._trained() == [False, True]
        for other in {*layers, "flax.nnx", "equinox"} - {name}:
            place, dtype = (0, "input") if other in ("torch", "equinox") else (-1, None)
            with pytest.raises(ArgumentValueError, match="trains one of scale and bias alone"):
                layer.to_(other, feature_axis=place, dtype=dtype)


@needs("torch")
def test_a_copy_keeps_the_initializers():
    copy = GroupNorm(CHANNELS, num_groups=GROUPS, backend="torch", scale_init=0.5).to_backend(
        "torch"
    )
    copy.weight.data.zero_()
    copy.reset_parameters()
    np.testing.assert_array_equal(to_host(copy.weight), np.full(CHANNELS, 0.5))


@needs("brainstate", "jax")
def test_states_of_brainstate():
    brainstate, own = module("brainstate"), module("groupnorm.brainstate").GroupNorm
    for cls, size in ((brainstate.nn.GroupNorm, (CHANNELS,)), (own, CHANNELS)):
        frozen = cls(size, num_groups=GROUPS, param_type=brainstate.LongTermState)
        assert not GroupNorm.from_(frozen).trainable
        assert GroupNorm.from_(cls(size, num_groups=GROUPS)).trainable
    layer = GroupNorm((4, CHANNELS, 2), feature_axis=(0, 1), num_groups=GROUPS)
    made = layer.to_("brainstate")
    assert made.weight.value["scale"].shape == (4, CHANNELS)
    assert GroupNorm.from_(made).in_size == layer.in_size
    assert own((4, 4, 8), feature_axis=np.int64(-1), num_groups=2).feature_axes == (2,)


@needs("jax")
def test_a_layer_that_is_not_whole():
    import jax

    layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="jax")
    part = jax.tree.map(lambda a: None, layer)
    stack = jax.vmap(lambda a: jax.tree.map(lambda p: p + a, layer))(jax.numpy.ones(3))
    for wrong, match in ((part, "is None"), (stack, "a stack of layers")):
        for carry in (
            lambda w: w.to_backend("numpy"),
            lambda w: w.to_("flax.nnx"),
            GroupNorm.from_,
        ):
            with pytest.raises(GroupNormError, match=match):
                carry(wrong)
    with pytest.raises(ArgumentTypeError, match="params is given"):
        GroupNorm.from_(layer, params={})
