"""`save` and `load`: equal bits in every backend, trees of layers, and files that are refused."""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import hashlib
import importlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import groupnorm
from groupnorm import GroupNorm, file_format
from groupnorm.errors import (
    ArgumentStateError,
    ArgumentTypeError,
    ArgumentValueError,
    FileFormatError,
    GroupNormError,
)
from tests.api.test_imports import HIDE, python
from tests.api.test_to_backend import DTYPES, NAMES, PAIRS, host_layer, precision

pytestmark = pytest.mark.needs("safetensors")
BACKENDS = [pytest.param(n, marks=pytest.mark.needs(n)) for n in NAMES]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "norms.safetensors"


def same(first, second) -> bool:
    """Whether two layers have the same configuration and bits; not of the same backend."""
    a, b = (layer.to_backend("numpy") for layer in (first, second))
    return a._config == b._config and all(
        (x is None and y is None)
        or (x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes())
        for x, y in ((a.scale, b.scale), (a.bias, b.bias))
    )


def small(rng, **options):
    return host_layer("float32", rng, in_size=(..., 8), feature_axis=-1, **options)


# Bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_file_of_any_backend_loads_in_any_other_with_equal_bits(
    first, second, dtype, rng, path, request
):
    if dtype == "bfloat16":
        request.getfixturevalue("needs_bfloat16")
    with precision(first, second, dtype):
        start = host_layer(dtype, rng, epsilon=1e-5, activation="silu")
        groupnorm.save(path, start.to_backend(first))
        there = groupnorm.load(path, backend=second)
        assert there.backend == second
        assert str(there.scale.dtype).rpartition(".")[2] == dtype
        assert same(there, start)
        # And into one that is there.
        other = GroupNorm(
            (2, 5, 4), (0, 2), num_groups=4, param_dtype=dtype, epsilon=1e-5, activation="silu",
            backend=second,
        )  # fmt: skip
        assert groupnorm.load(path, into=other) is other
        assert same(other, start)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(dtype, path, request):
    request.getfixturevalue("needs_bfloat16")
    layer = GroupNorm(8, num_groups=2, param_dtype=dtype, scale_init=1.5)
    groupnorm.save(path, layer)
    assert same(groupnorm.load(path), layer)


def test_noncontiguous_and_swapped_parameters(path, rng):
    """safetensors once wrote the wrong values of the former."""
    layer = GroupNorm((4, 6), (0, 1), num_groups=2)
    layer.scale = rng.normal(size=(6, 8)).astype(np.float32).T[::2]
    layer.bias = rng.normal(size=(4, 6)).astype(">f4")
    groupnorm.save(path, layer)
    loaded = groupnorm.load(path)
    np.testing.assert_array_equal(loaded.scale, layer.scale)
    np.testing.assert_array_equal(loaded.bias, layer.bias)


def test_other_tools_read_the_tensors(path, rng):
    layer = small(rng)
    groupnorm.save(path, {"a": layer})
    tensors = importlib.import_module("safetensors.numpy").load_file(path)
    np.testing.assert_array_equal(tensors["a.scale"], layer.scale)
    np.testing.assert_array_equal(tensors["a.bias"], layer.bias)


def test_equal_layers_give_equal_files(path, tmp_path, rng):
    layers = {name: small(rng) for name in "cab"}
    groupnorm.save(path, layers)
    groupnorm.save(tmp_path / "again", groupnorm.load(path))
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


CONFIGURATIONS = [
    {"in_size": (3, 4, 6), "feature_axis": (0, 2), "num_groups": 9},
    {"in_size": (8, ...), "feature_axis": 0, "num_groups": None, "group_size": 4},
    {"in_size": 8, "num_groups": 2, "epsilon": 1e-300, "dtype": "bfloat16"},
    {"in_size": 8, "num_groups": 2, "epsilon": 0.1 + 0.2, "use_scale": False},
    {"in_size": 8, "num_groups": 2, "use_scale": False, "use_bias": False, "trainable": False},
    {"in_size": (2, 8), "num_groups": 2, "reduction_axes": (-1, 1), "use_fast_variance": False},
    {"in_size": 8, "num_groups": 2, "axis_name": "i", "axis_index_groups": [[0, 2], [1, 3]]},
    {"in_size": 8, "num_groups": 2, "axis_name": ("i", "j"), "implementation": "portable"},
    {"in_size": 8, "num_groups": 2, "activation": "gelu", "trainable": False, "epsilon": 0},
]


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("library", BACKENDS)
def test_configurations_survive(library, options, path):
    layer = GroupNorm(**options, backend=library)
    groupnorm.save(path, layer)
    loaded = groupnorm.load(path, backend=library)
    assert repr(loaded) == repr(layer)
    assert loaded._config == layer._config


@pytest.mark.needs("torch")
def test_attributes_of_a_torch_layer_that_were_set(path):
    layer = GroupNorm((8, ...), 0, num_groups=4, backend="torch")
    layer.eps, layer.num_groups = 0.25, 2
    layer.requires_grad_(False)
    groupnorm.save(path, layer)
    loaded = groupnorm.load(path)
    assert (loaded.epsilon, loaded.num_groups, loaded.trainable) == (0.25, 2, False)
    layer.num_groups = 3
    with pytest.raises(ArgumentValueError, match=r"cannot be saved: num_groups=3"):
        groupnorm.save(path, layer)


def test_a_process_group_cannot_be_saved(path):
    for name in (types.SimpleNamespace(), ("i", 3)):
        layer = GroupNorm(8, num_groups=2, axis_name=name)
        with pytest.raises(ArgumentTypeError, match=r"the layer 'a' cannot be saved: axis_name="):
            groupnorm.save(path, {"a": layer})
    assert not path.exists()


def test_dtypes_that_files_do_not_have(path):
    with pytest.raises(ArgumentTypeError, match=r"scale of the layer has dtype complex128, .*conv"):
        groupnorm.save(path, GroupNorm(8, num_groups=2, param_dtype="complex128"))


@pytest.mark.needs("jax")
def test_float64_with_jax_in_32_bit_mode(path, rng):
    layer = host_layer("float64", rng)
    groupnorm.save(path, {"a": small(rng), "b": layer})
    with pytest.raises(GroupNormError, match=r"float64 .*jax_enable_x64"):
        groupnorm.load(path, backend="jax")


@pytest.mark.needs("mlx")
def test_a_dtype_that_a_backend_does_not_have(path, request):
    request.getfixturevalue("needs_bfloat16")
    groupnorm.save(path, GroupNorm(8, num_groups=2, param_dtype="float8_e5m2"))
    with pytest.raises(GroupNormError, match="float8_e5m2"):
        groupnorm.load(path, backend="mlx")


# Trees --------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Block:
    norm: Any
    width: int = 3


@dataclasses.dataclass(slots=True, frozen=True)
class Slotted:
    norm: Any


class Model:
    def __init__(self, norm, child=None):
        self.norm, self.child, self.name = norm, child, "model"


TREES = {
    "dict": (lambda a, b: {"x": {"y": a}, 3: b}, ["x.y", "3"]),
    "list": (lambda a, b: [a, ["text", None, b]], ["0", "1.2"]),
    "tuple": (lambda a, b: ((a,), np.ones(3), b), ["0.0", "2"]),
    "named tuple": (lambda a, b: Pair(a, Pair(1, b)), ["left", "right.right"]),
    "dataclass": (lambda a, b: [Block(a), Slotted(b)], ["0.norm", "1.norm"]),
    "object": (lambda a, b: Model(a, Model(b)), ["norm", "child.norm"]),
    "mapping": (lambda a, b: types.MappingProxyType({"a.b": a, "c": b}), ["a.b", "c"]),
}


@pytest.mark.parametrize("make", TREES, ids=str)
def test_trees(make, path, rng):
    build, names = TREES[make]
    layers = small(rng), small(rng, epsilon=0.5)
    groupnorm.save(path, build(*layers))
    loaded = groupnorm.load(path)
    assert list(loaded) == names
    assert all(map(same, loaded.values(), layers))
    fresh = small(rng), small(rng, epsilon=0.5)
    tree = build(*fresh)
    assert groupnorm.load(path, into=tree) is tree
    assert all(map(same, fresh, layers))
    assert groupnorm.load(path, into=loaded) is loaded  # a dict of names is a tree, too


def test_a_shared_layer_is_saved_once(path, rng):
    layer = small(rng)
    groupnorm.save(path, {"a": layer, "b": [layer]})
    assert list(groupnorm.load(path)) == ["a"]


def test_cycles_end(path, rng):
    parent, child = Model(small(rng)), Model(small(rng))
    parent.child, child.child = child, parent
    again: list[Any] = [parent]
    again.append(again)
    groupnorm.save(path, again)
    assert list(groupnorm.load(path)) == ["0.norm", "0.child.norm"]
    deep: Any = small(rng)
    for _ in range(5000):
        deep = [deep]
    groupnorm.save(path, deep)
    assert list(groupnorm.load(path)) == [".".join(["0"] * 5000)]


def test_layers_in_slots_and_in_a_deque(path, rng):
    class Slotted:
        __slots__ = ("__dict__", "norm")

    class Derived(Slotted):
        __slots__ = ("__hidden", "other")

        def __init__(self):
            self.__hidden = small(rng)

    model = Derived()
    model.norm, model.other, model.third = small(rng), small(rng), small(rng)
    partial = functools.partial(small(rng), mask=None)
    groupnorm.save(path, {"a": model, "b": collections.deque([small(rng)]), "c": partial})
    names = {"a.norm", "a.other", "a.third", "a._Derived__hidden", "b.0", "c.func"}
    assert set(groupnorm.load(path)) == names


@pytest.mark.needs("jax")
def test_a_part_of_a_layer_does_not_replace_a_file(path):
    """As `equinox.partition` makes."""
    import jax

    layer = GroupNorm(8, num_groups=2, backend="jax", scale_init=3.0)
    groupnorm.save(path, layer)
    part = jax.tree.map(lambda a: None, layer)
    half = jax.tree_util.tree_map_with_path(lambda p, a: a if "scale" in str(p) else None, layer)
    stack = jax.tree.map(lambda a: jax.numpy.stack([a, a]), layer)
    for wrong, match in ((part, "scale .* is None"), (half, "bias .* is None"), (stack, "a stack")):
        with pytest.raises(GroupNormError, match=match):
            groupnorm.save(path, wrong)
    assert same(groupnorm.load(path), layer)


def test_a_folder_that_is_missing(tmp_path):
    path = tmp_path / "none" / "norms.safetensors"
    with pytest.raises(FileNotFoundError) as info:
        groupnorm.save(path, GroupNorm(8, num_groups=2))
    assert info.value.filename == str(path)


@pytest.mark.needs("keras", "torch")
def test_models_of_keras_are_for_keras(path, rng):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    model = keras.Sequential([groupnorm.keras.GroupNormalization(2)])
    for tree in (model, {"model": model, "norm": small(rng)}):
        with pytest.raises(ArgumentTypeError, match="of keras: its own save and load"):
            groupnorm.save(path, tree)
    assert not path.exists()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda a, b: {"a.b": a, "a": {"b": b}}, r"two layers of the name 'a\.b'"),
        (lambda a, b: {1: a, "1": b}, "two layers of the name '1'"),
        (lambda a, b: {"": a}, "below an empty key"),
        (lambda a, b: {(1, 2): a}, "neither str nor int"),
        (lambda a, b: [{True: a}], "neither str nor int"),
        (lambda a, b: {b"a": a}, "neither str nor int"),
        (lambda a, b: [{a}], "in a set"),
        (lambda a, b: {"\ud800": a}, "no valid Unicode"),
        (lambda a, b: {"a": [1, "b", None, np.ones(3)]}, "has no layers"),
        (lambda a, b: 3, "of type int and has no layers"),
        (lambda a, b: None, "has no layers"),
        (lambda a, b: GroupNorm, "has no layers"),
        (lambda a, b: groupnorm, "has no layers"),
    ],
)
def test_trees_without_layers_or_with_ambiguous_names(build, message, path, rng):
    with pytest.raises(ArgumentValueError, match=rf"^layers .*{message}|{message}"):
        groupnorm.save(path, build(small(rng), small(rng)))
    assert not path.exists()


@pytest.mark.parametrize("name", ["__metadata__", "a\0b", 'q"uo\\te', "ü.\u2028", "sha256", " "])
def test_surprising_names(name, path, rng):
    layers = {name: small(rng), "groupnorm": small(rng), '{"sha256":"' + "0" * 64: small(rng)}
    groupnorm.save(path, layers)
    loaded = groupnorm.load(path)
    assert loaded.keys() == layers.keys()
    assert all(same(loaded[k], layers[k]) for k in layers)


def torch_model(rng):
    torch = importlib.import_module("torch")
    layers = [
        small(rng).to_backend("torch"),
        GroupNorm((8, ...), 0, num_groups=2, backend="torch", scale_init=rng.normal(size=8)),
    ]
    return torch.nn.ModuleDict(
        {"encoder": torch.nn.Sequential(torch.nn.Linear(8, 8), layers[0]), "norm": layers[1]}
    )


@pytest.mark.needs("torch")
def test_a_torch_model(path, rng):
    torch = importlib.import_module("torch")
    model, other = torch_model(rng), torch_model(rng)
    model.hidden = [GroupNorm(8, num_groups=2)]  # no part of the module, as in its state dict
    groupnorm.save(path, model)
    names = [n for n, m in model.named_modules() if isinstance(m, GroupNorm)]
    assert list(groupnorm.load(path)) == names == ["encoder.1", "norm"]
    kept = dict(other.named_parameters())
    linear = other["encoder"][0].weight.clone()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    groupnorm.load(path, into=other)
    for name, parameter in other.named_parameters():
        assert parameter is kept[name]
        assert parameter.requires_grad
    assert torch.equal(other["encoder"][0].weight, linear)
    assert any(p is other["norm"].weight for p in optimizer.param_groups[0]["params"])
    for name in names:
        assert same(other.get_submodule(name), model.get_submodule(name))


@pytest.mark.needs("torch")
def test_a_model_of_pytorch_whose_norms_were_replaced(path, rng):
    torch = importlib.import_module("torch")

    def model():
        norms = torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm((3, 4)), torch.nn.Conv2d(8, 8, 1)
        made = torch.nn.Sequential(*norms)
        groupnorm.torch.replace(made, also=torch.nn.LayerNorm)
        return made

    first, second = model(), model()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_()
    groupnorm.save(path, first)
    groupnorm.load(path, into=second)
    for index in (0, 1):
        assert torch.equal(first[index].weight, second[index].weight)
        assert torch.equal(first[index].bias, second[index].bias)
    x = rng.normal(size=(2, 8, 3, 4)).astype(np.float32)
    want = first[0](torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(groupnorm.load(path)["0"](x), want, rtol=1e-5, atol=1e-6)
    first[1].eps = 0.25
    groupnorm.save(path, first)
    with pytest.raises(
        ArgumentValueError, match=r"layer '1' in into has epsilon=1e-05, and in .*0\.25"
    ):
        groupnorm.load(path, into=second)


@pytest.mark.needs("torch")
def test_torch_layers_whose_parameters_cannot_be_set(path, rng):
    torch = importlib.import_module("torch")
    groupnorm.save(path, small(rng))
    options = {"in_size": (..., 8), "num_groups": 4, "backend": "torch"}
    pruned = GroupNorm(**options)
    importlib.import_module("torch.nn.utils.prune").l1_unstructured(pruned, "weight", amount=0.5)
    with pytest.raises(ArgumentStateError, match="weight of a layer is computed"):
        groupnorm.load(path, into=pruned)
    meta = GroupNorm(**options, device="meta")
    with pytest.raises(ArgumentStateError, match="to_empty"):
        groupnorm.load(path, into=meta)
    with pytest.raises(ArgumentStateError, match="meta device"):
        groupnorm.save(path, meta)
    meta.to_empty(device="cpu")
    assert same(groupnorm.load(path, into=meta), groupnorm.load(path))
    with torch.inference_mode():
        other = GroupNorm(**options)
    layers = {"a": GroupNorm(**options), "b": other}
    groupnorm.save(path, {"a": small(rng), "b": small(rng)})
    before = layers["a"].to_backend("numpy")
    with pytest.raises(RuntimeError, match="nference"):
        groupnorm.load(path, into=layers)
    assert same(layers["a"], before)  # set before the other one, and undone


@pytest.mark.needs("mlx")
def test_a_model_of_mlx(path, rng):
    nn = importlib.import_module("mlx.nn")

    def model():
        made = nn.Sequential(nn.Linear(8, 8), small(rng).to_backend("mlx"))
        made.extra = {"last": small(rng).to_backend("mlx")}
        return made

    first, second = model(), model()
    groupnorm.save(path, first)
    assert set(groupnorm.load(path)) == {"layers.1", "extra.last"}
    groupnorm.load(path, into=second)
    assert same(first.layers[1], second.layers[1])
    assert same(first.extra["last"], second.extra["last"])


@pytest.mark.needs("jax", "flax")
def test_a_model_of_nnx(path, rng):
    nnx = importlib.import_module("flax.nnx")

    class Net(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.norm = small(rng).to_backend("jax", param_type=nnx.Param)
            self.blocks = nnx.List([small(rng, trainable=False).to_backend("jax")])

    first, second = Net(), Net()
    groupnorm.save(path, first)
    loaded = groupnorm.load(path, backend="jax", param_type=nnx.Param)
    assert set(loaded) == {"norm", "blocks.0"}
    assert type(loaded["norm"]._held["scale"]) is nnx.Param
    held = second.norm._held["scale"]
    groupnorm.load(path, into=second)
    assert second.norm._held["scale"] is held
    assert same(first.norm, second.norm)
    assert same(first.blocks[0], second.blocks[0])
    assert type(loaded["blocks.0"]._held["scale"]) is nnx.Variable  # not trainable
    groupnorm.load(path, into=loaded)
    norm = groupnorm.flax.nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentTypeError, match=r"'a' of the class groupnorm\.flax\.nnx\.GroupN"):
        groupnorm.save(path, {"a": norm, "b": small(rng)})


@pytest.mark.needs("jax", "brainstate")
def test_states_of_brainstate(path, rng):
    brainstate = importlib.import_module("brainstate")
    layer = small(rng)
    for kind in (brainstate.ParamState, type(brainstate.nn.GroupNorm((1,), num_groups=1).weight)):
        first = layer.to_backend("jax", param_type=kind)
        groupnorm.save(path, [first])
        second = GroupNorm((..., 8), num_groups=4, backend="jax", param_type=kind)
        groupnorm.load(path, into=[second])
        assert same(second, layer)


@pytest.mark.needs("jax", "brainstate")
def test_a_module_of_brainstate(path, rng):
    """Its `named_children` leaves out layers that are no modules of it."""
    nn = importlib.import_module("brainstate").nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = small(rng).to_backend("jax")

    first, second = (nn.Sequential(Net(), nn.ReLU()) for _ in range(2))
    groupnorm.save(path, first)
    assert list(groupnorm.load(path)) == ["layers.0.norm"]
    groupnorm.load(path, into=second)
    assert same(first.layers[0].norm, second.layers[0].norm)


@pytest.mark.needs("jax", "equinox")
def test_a_module_of_equinox(path, rng):
    equinox = importlib.import_module("equinox")

    class Net(equinox.Module):
        norm: Any
        rest: list
        width: int = equinox.field(static=True)

    made = Net(small(rng).to_backend("jax"), [1, small(rng).to_backend("jax")], 3)
    groupnorm.save(path, made)
    assert list(groupnorm.load(path)) == ["norm", "rest.1"]


@pytest.mark.needs("jax")
@pytest.mark.several_jax_devices
def test_a_jax_layer_keeps_its_sharding(path, rng):
    jax = importlib.import_module("jax")
    groupnorm.save(path, small(rng))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("c",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("c"))
    layer = GroupNorm((..., 8), num_groups=4, backend="jax", device=sharding)
    groupnorm.load(path, into=layer)
    assert layer.scale.sharding == layer.bias.sharding == sharding
    assert same(layer, groupnorm.load(path))
    plain = groupnorm.load(path, into=GroupNorm((..., 8), num_groups=4, backend="jax"))
    assert not plain.scale.committed
    placed = groupnorm.load(path, backend="jax", device=jax.devices()[1])
    assert placed.scale.devices() == {jax.devices()[1]}


@pytest.mark.needs("jax", "orbax")
def test_orbax_saves_a_tree_with_layers(tmp_path, rng):
    """For sharded trees of JAX, as docs/saving.md says."""
    jax = importlib.import_module("jax")
    ocp = importlib.import_module("orbax.checkpoint")
    tree = {"norm": small(rng).to_backend("jax"), "w": jax.numpy.arange(3.0)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        restored = checkpointer.restore(tmp_path / "checkpoint", abstract)
    assert same(restored["norm"], tree["norm"])


# into ---------------------------------------------------------------------------------------------


OWN = {"in_size": (..., 8), "feature_axis": -1, "num_groups": 4}
MISMATCHES = {
    "feature shape": {"in_size": (..., 16)},
    "feature axes": {"in_size": (8, ...), "feature_axis": 0},
    "num_groups": {"num_groups": 2},
    "epsilon": {"epsilon": 1e-5},
    "reduction_axes": {"reduction_axes": (-1,)},
    "activation": {"activation": "relu"},
    "use_scale": {"use_scale": False},
    "use_bias": {"use_bias": False},
    "dtype": {"param_dtype": "float16"},
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
@pytest.mark.parametrize("library", BACKENDS)
def test_into_another_layer_fails_and_changes_nothing(library, mismatch, path, rng):
    groupnorm.save(path, {"a": small(rng), "b": small(rng)})
    options = OWN | MISMATCHES[mismatch]
    tree = {"a": GroupNorm(**OWN, backend=library), "b": GroupNorm(**options, backend=library)}
    before = {name: layer.to_backend("numpy") for name, layer in tree.items()}
    for strict in (True, False):
        with pytest.raises(
            GroupNormError, match=rf"the layer 'b' in into has .*{mismatch}"
        ) as info:
            groupnorm.load(path, into=tree, strict=strict)
        assert "in the file" in str(info.value)
        assert "reate it" in str(info.value)
    assert all(same(tree[name], before[name]) for name in tree)


def test_strict(path, rng):
    saved = {"a": small(rng), "b": small(rng)}
    groupnorm.save(path, saved)
    for tree in ({"a": small(rng)}, {"a": small(rng), "b": small(rng), "c": small(rng)}):
        before = {name: layer.to_backend("numpy") for name, layer in tree.items()}
        with pytest.raises(
            ArgumentValueError, match=r"only (the file|into) .*'[bc]'.*strict=False"
        ):
            groupnorm.load(path, into=tree)
        assert all(same(tree[name], before[name]) for name in tree)
        groupnorm.load(path, into=tree, strict=False)
        assert all(same(tree[name], saved.get(name, before[name])) for name in tree)
    for strict in (True, False):
        with pytest.raises(ArgumentValueError, match=r"only the file has 'a', 'b', only .*'x'"):
            groupnorm.load(path, into={"x": small(rng)}, strict=strict)
        with pytest.raises(ArgumentValueError, match="a layer without a name"):
            groupnorm.load(path, into=small(rng), strict=strict)
    with pytest.raises(ArgumentTypeError, match="strict=1"):
        groupnorm.load(path, into=saved, strict=1)
    for option in ({"backend": "jax"}, {"device": "cpu"}, {"param_type": list}):
        with pytest.raises(ArgumentValueError, match="and into are both given"):
            groupnorm.load(path, into=saved, **option)


# Files that are refused ---------------------------------------------------------------------------


@pytest.fixture
def good(path, rng) -> bytes:
    """A file with layers of several kinds, with values that are no zeros."""
    layers = {
        "encoder.norm": small(rng, epsilon=1e-5, activation="silu"),
        "ü": host_layer("float64", rng, trainable=False),
        "none": GroupNorm((3, ...), 0, num_groups=3, use_scale=False, use_bias=False),
        "half": host_layer("float16", rng, in_size=(8,), feature_axis=0, axis_name="i"),
    }
    groupnorm.save(path, layers)
    return path.read_bytes()


def parts(content: bytes) -> tuple[dict, dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["groupnorm"]), content[8 + length :]


def compact(document: Any) -> str:
    return json.dumps(document, separators=(",", ":"))


def joined(header: Any, document: Any, data: bytes, dump=json.dumps) -> bytes:
    """Return a file with a checksum that is right, if there is a place for one."""
    if document is not None:
        document = {"sha256": "0" * 64} | {k: v for k, v in document.items() if k != "sha256"}
        text = compact(document)
        header = {"__metadata__": {**header["__metadata__"], "groupnorm": text}} | {
            k: v for k, v in header.items() if k != "__metadata__"
        }
    text = dump(header) if isinstance(header, dict) else header
    return sealed(text.replace('"groupnorm": "', '"groupnorm":"').encode(), data)


def sealed(header: bytes, data: bytes) -> bytes:
    content = bytearray(len(header).to_bytes(8, "little") + header + data)
    at = content.find(file_format._MARK)
    if at >= 0:
        at += len(file_format._MARK)
        content[at : at + 64] = b"0" * 64
        content[at : at + 64] = hashlib.sha256(content).hexdigest().encode()
    return bytes(content)


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as info:
        groupnorm.load(path)
    message = str(info.value)
    assert message.startswith(repr(str(path)))
    assert len(message) < 1500
    return message


def test_a_sealed_copy_loads(path, good):
    """So that the edits below are what is refused."""
    path.write_bytes(joined(*parts(good)))
    assert list(groupnorm.load(path)) == ["encoder.norm", "ü", "none", "half"]


def test_every_changed_bit_is_found(path, rng):
    groupnorm.save(path, GroupNorm(2, num_groups=1))
    content = path.read_bytes()
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        refused(path, bytes(changed))


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return the file with one accident."""
    kind, at = draw.randrange(6), draw.randrange(len(content))
    length = draw.choice((1, 2, 8, 64, 500))
    if kind == 0:
        out = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 30))):
            out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
        return bytes(out)
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + draw.randbytes(length) + content[at:]
    if kind == 3:
        return content[:at] + content[at + length :]
    if kind == 4:
        other = draw.randrange(len(content))
        out = bytearray(content)
        a, b = content[at : at + length], content[other : other + length]
        out[at : at + len(b)], out[other : other + len(a)] = b, a
        return bytes(out)
    return content + draw.choice((b"\0", draw.randbytes(length), content))


VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        7,
        2**31,
        2**63,
        2**64,
        10**30,
        10**400,
        0.0,
        -0.5,
        1.5,
        1e308,
    ),
    *("", "...", "x", "32", "float32", "F32", "1e-5", "\ud800", "\0", "x" * 3000),
    *(
        [],
        {},
        [[]],
        [0],
        [-1],
        [8],
        [1.0],
        [True],
        ["..."],
        ["...", "..."],
        [2**40, 2**40],
        [0, 2**62],
    ),
    *([None], {"a": 1}, [[0, 1]], [8] * 2000),
)


def places(value: Any, found=()):
    yield found
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*found, key))


def edited(tree: Any, draw: random.Random) -> Any:
    """Return JSON with one entry replaced, removed, renamed or added."""
    *_, tree = json.loads(json.dumps([tree]))
    way = draw.choice([p for p in places(tree) if p and p[0] != "sha256"])
    node = tree
    for key in way[:-1]:
        node = node[key]
    how = draw.randrange(4)
    if how == 0 or (how == 1 and isinstance(node, list)):
        node[way[-1]] = draw.choice(VALUES)
    elif how == 1:
        node[draw.choice(("", "x", "scale", "a" * 300, "\ud800"))] = node.pop(way[-1])
    elif how == 2:
        del node[way[-1]]
    elif isinstance(node, dict):
        node[draw.choice(("x", "pickle", "__metadata__", "scale"))] = draw.choice(VALUES)
    else:
        node.append(draw.choice(VALUES))
    return tree


def hostile(content: bytes, draw: random.Random) -> bytes:
    """Return a file whose checksum is right, with something in it that is not."""
    header, document, data = parts(content)
    kind = draw.randrange(10)
    if kind < 5:
        return joined(header, {**document, "layers": edited(document["layers"], draw)}, data)
    if kind == 5:
        return joined(header, edited(document, draw), data)
    if kind == 6:  # shapes, offsets and dtypes of tensors
        name = draw.choice([n for n in header if n != "__metadata__"])
        return joined({**header, name: edited(header[name], draw)}, document, data)
    if kind == 7:
        return joined(header, document, damaged(data, draw) if draw.randrange(2) else data + b"\0")
    if kind == 8:  # overlapping tensors, and holes
        first, second = draw.sample([n for n in header if n != "__metadata__"], 2)
        header[first] = {**header[first], "data_offsets": header[second]["data_offsets"]}
        return joined(header, document, data)
    text = json.dumps(header).replace('"groupnorm": "', '"groupnorm":"')
    number = draw.choice(("NaN", "Infinity", "-Infinity", "1e309", "-1e-5", "1" * 5000))
    broken = draw.choice((
        "[" * 200000, "{}", "[]", "null", "3", '{"__metadata__":{"groupnorm":"{}"}}',
        '{"__metadata__":' * 5000, text[:-1] + "," + text[1:], text.replace("F32", "F64", 1),
        text.replace('"shape"', '"shape": [8], "shape"', 1), text[:-1], text + "x", "\ufeff" + text,
        text.replace("1e-05", number), text.replace(r"\"num_groups\":4", r"\"num_groups\":0"),
    ))  # fmt: skip
    return sealed(broken.encode("utf-8"), data)


def test_a_thousand_damaged_files_are_refused(path, good):
    draw, found = random.Random(20240607), collections.Counter()
    while found.total() < 1000:
        content = damaged(good, draw)
        if content != good:
            found[refused(path, content).partition("cannot be loaded: ")[2][:18]] += 1
    assert len(found) > 2


def test_a_thousand_hostile_files_with_right_checksums_are_refused(path, good):
    draw, found, valid = random.Random(20240607), collections.Counter(), 0
    while found.total() < 1000:
        content = hostile(good, draw)
        path.write_bytes(content)
        try:
            loaded = groupnorm.load(path)
        except FileFormatError:
            found[refused(path, content).partition("cannot be loaded: ")[2][:18]] += 1
            continue
        # An edit may give another good file: exactly what is written for the layers in it.
        groupnorm.save(path, loaded)
        assert without_checksum(path.read_bytes()) == without_checksum(content)
        valid += 1
    assert len(found) > 8
    assert valid < 200, valid


def without_checksum(content: bytes) -> Any:
    header, document, data = parts(content)
    document.pop("sha256")
    metadata = header.pop("__metadata__").keys()
    return header, json.dumps(document, sort_keys=True), metadata, data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 0}, "num_groups=0 is not positive"),
        ({"num_groups": 5}, "num_groups=5"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"epsilon": True}, "epsilon=True"),
        ({"epsilon": 10**400}, "too large"),
        ({"epsilon": "1e-5"}, "epsilon='1e-5'"),
        ({"in_size": [2**62]}, "shape"),
        ({"in_size": [2**40, 2**40]}, "more elements than any array"),
        ({"activation": "os.system"}, "activation='os.system'"),
        ({"param_dtype": "object"}, "param_dtype='object'"),
        ({"param_dtype": "float"}, "not as they are written"),
        ({"param_dtype": "float8_x"}, "'float8_x' is unknown"),
        ({"dtype": "float8_x"}, "'float8_x' is unknown"),
        ({"use_scale": 1}, "use_scale=1"),
        ({"use_scale": False}, "belongs to no layer"),
        ({"axis_name": {"a": 1}}, "axis_name="),
        ({"pickle": "x"}, "arguments are not those"),
        ({"feature_axis": [1, 1]}, "feature_axis"),
        ({"feature_axis": [1.0]}, "feature_axis"),
        ({"feature_axis": [-1]}, "not as they are written"),
    ],
    ids=str,
)
def test_hostile_configurations(change, message, path, good):
    header, document, data = parts(good)
    document["layers"]["encoder.norm"] |= change
    assert message in refused(path, joined(header, document, data))


def test_nesting_of_any_depth(path, good):
    header, document, data = parts(good)
    arguments = document["layers"]["encoder.norm"]
    for depth in (10, 100, 900, *range(910, 1000, 3), 1500, 5000):
        nested = "[" * depth + "]" * depth
        for name in arguments:
            text = compact({**document, "layers": {"a": {**arguments, name: "HERE"}}})
            whole = {**header, "__metadata__": {"groupnorm": text.replace('"HERE"', nested)}}
            refused(path, joined(whole, None, data))
        text = compact({**document, "format": "HERE"}).replace('"HERE"', nested)
        message = refused(path, joined({**header, "__metadata__": {"groupnorm": text}}, None, data))
        assert "newer" not in message
        assert "another program" not in message or "JSON" in message


def test_what_a_refused_file_is(path, good, tmp_path):
    header, document, data = parts(good)
    save_file = importlib.import_module("safetensors.numpy").save_file
    save_file({"scale": np.ones(8, np.float32)}, path)
    assert "wrote no configuration into it: it is of another program" in refused(
        path, path.read_bytes()
    )
    save_file({"scale": np.ones(8, np.float32)}, path, {"format": "pt"})
    assert "of another program" in refused(path, path.read_bytes())
    assert "truncated" in refused(path, b"")
    assert "truncated" in refused(path, good[:100])
    assert "checksum" in refused(path, good[:-1])
    assert "checksum" in refused(path, good + b"\0")
    assert "truncated" in refused(path, b"PK\x03\x04" + b"\0" * 100)
    assert "newer groupnorm" in refused(path, joined(header, {**document, "format": 2}, data))
    assert "format=True" in refused(path, joined(header, {**document, "format": True}, data))
    assert "unknown or missing" in refused(path, joined(header, {**document, "x": 2}, data))
    assert "without a name" in refused(
        path, joined(header, {**document, "layers": document["layers"] | {"": 3}}, data)
    )
    header["__metadata__"] = {"groupnorm": "[]"}
    header["x"] = {"groupnorm": '{"sha256":"' + "0" * 64}
    assert "not what groupnorm.save writes" in refused(path, joined(header, None, data))
    assert "no valid JSON" in refused(path, sealed(b"\xff" * 20, data))
    assert "no valid JSON" in refused(path, sealed(b"[" * 10**6, data))
    with pytest.raises(FileFormatError, match="no regular file"):
        groupnorm.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        groupnorm.load(tmp_path / "missing")
    for wrong in (3, None, b"bytes"):
        with pytest.raises(ArgumentTypeError, match="path="):
            groupnorm.load(wrong)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_do_not_hang(tmp_path, rng):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero", "/dev/null"):
        with pytest.raises(FileFormatError, match="no regular file"):
            groupnorm.load(path)
        with pytest.raises(ArgumentValueError, match="no regular file"):
            groupnorm.save(path, small(rng))


def test_huge_files_are_refused_before_they_are_read(path, good):
    """Sparse: they have no blocks on the disk."""
    header, document, _ = parts(good)
    path.write_bytes(joined(header, document, b""))
    os.truncate(path, 2**41)
    with pytest.raises(FileFormatError, match="at most"):
        groupnorm.load(path)
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    os.truncate(path, 2**41)
    with pytest.raises(FileFormatError, match="no header of at most"):
        groupnorm.load(path)


def test_files_that_would_be_refused_are_not_written(path, rng, monkeypatch):
    monkeypatch.setattr(file_format, "FILE_LIMIT", 100)
    with pytest.raises(ArgumentValueError, match="several files"):
        groupnorm.save(path, small(rng))
    assert not path.exists()


# Writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=repr)
def test_an_error_while_writing_leaves_the_old_file(failing, error, path, good, rng, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        groupnorm.save(path, small(rng))
    assert path.read_bytes() == good
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk_leaves_the_old_file(path, good, rng, monkeypatch):
    real = os.open

    def full(name, *arguments, **keywords):
        os.close(real(name, *arguments, **keywords))
        return real("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="No space"):
        groupnorm.save(path, small(rng))
    monkeypatch.undo()
    assert path.read_bytes() == good
    assert os.listdir(path.parent) == [path.name]


KILLED = """
import os, signal, sys, groupnorm
def die(*a): os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], die)
groupnorm.save(sys.argv[1], groupnorm.GroupNorm(8, num_groups=2))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_killed_process_leaves_the_old_file(at, path, good):
    done = subprocess.run([sys.executable, "-c", KILLED, path, at], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == good
    assert list(groupnorm.load(path))


def test_permissions_are_those_of_an_ordinary_file(tmp_path, path, rng):
    layer = small(rng)
    (tmp_path / "plain").touch()
    groupnorm.save(path, layer)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(0o604)
    groupnorm.save(path, layer)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    if os.geteuid():
        path.chmod(0o400)
        with pytest.raises(PermissionError):
            groupnorm.save(path, layer)


def test_a_link_stays_one(tmp_path, path, rng):
    layer = small(rng)
    (tmp_path / "sub").mkdir()
    link = tmp_path / "link"
    link.symlink_to(Path("sub") / "file")
    for _ in range(2):
        groupnorm.save(str(link), layer)
        assert link.is_symlink()
        assert same(groupnorm.load(tmp_path / "sub" / "file"), layer)
    assert os.listdir(tmp_path / "sub") == ["file"]


def test_errors_of_the_system_pass_through(tmp_path, rng):
    with pytest.raises(FileNotFoundError):
        groupnorm.save(tmp_path / "missing" / "file", small(rng))
    with pytest.raises(ArgumentValueError, match="no regular file"):
        groupnorm.save(tmp_path, small(rng))
    with pytest.raises(ArgumentTypeError, match="path=3"):
        groupnorm.save(3, small(rng))
    long = tmp_path / ("n" * 250)
    groupnorm.save(long, small(rng))
    assert os.listdir(tmp_path) == [long.name]


def test_a_missing_package_is_named(tmp_path):
    program = HIDE.format(library="safetensors") + (
        "import groupnorm\n"
        "for call in (lambda: groupnorm.save('x', groupnorm.GroupNorm(2, num_groups=1)),\n"
        "             lambda: groupnorm.load(__import__('sys').argv[1])):\n"
        "    try: call()\n"
        "    except groupnorm.errors.BackendImportError as error: print(error)\n"
    )
    (tmp_path / "file").write_bytes(b"0" * 100)
    said = python("-W", "error", "-c", program, str(tmp_path / "file")).stdout.splitlines()
    assert len(said) == 2
    assert all('pip install "groupnorm[files]"' in line for line in said)


@pytest.mark.parametrize("name", ["groupnorm.files"])
def test_examples_in_docstrings(name):
    doctest = importlib.import_module("doctest")
    failed, run = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert run > 5
