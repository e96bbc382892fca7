"""No layer is silently frozen: every kind of layer in every foreign kind of module.

A layer is trained, or its first call raises an error with the fix, or its arrays are of another
library than the module's, which raises as well. The keras of this process computes with PyTorch.
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import importlib

import numpy as np
import pytest

import groupnorm
from groupnorm import GroupNorm
from groupnorm.errors import ArgumentStateError

pytestmark = pytest.mark.needs(
    "jax", "torch", "mlx", "flax", "haiku", "equinox", "brainstate", "keras"
)
CHANNELS, GROUPS = 8, 4
VALUES = np.random.default_rng(0).normal(size=(2, 5, CHANNELS)).astype(np.float32)


def make(kind: str, **options) -> GroupNorm:
    if kind == "nnx.Param":
        kind, options["param_type"] = "jax", importlib.import_module("flax.nnx").Param
    elif kind == "ParamState":
        kind, options["param_type"] = "jax", importlib.import_module("brainstate").ParamState
    return GroupNorm(CHANNELS, num_groups=GROUPS, backend=kind, **options)


def jax_array():
    return importlib.import_module("jax.numpy").asarray(VALUES)


def in_nnx(layer):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.norm = nnx.data(layer)  # as nnx's own error advises

        def __call__(self, x):
            return self.norm(x)

    model = Model()
    gradient = nnx.grad(lambda model, x: (model(x) ** 3).sum())
    return {path[-1] for path, _ in nnx.to_flat_state(gradient(model, jax_array()))}


def in_linen(layer):
    import jax
    from flax import linen

    class Model(linen.Module):
        norm: object

        @linen.compact
        def __call__(self, x):
            return self.norm(x)

    return Model(layer).init(jax.random.key(0), jax_array()).get("params", {})


def in_linen_made_inside(layer):
    import jax
    from flax import linen

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return layer.to_backend(layer.backend)(x)

    return Model().init(jax.random.key(0), jax_array()).get("params", {})


def in_haiku(layer):
    import haiku

    class Model(haiku.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def __call__(self, x):
            return self.norm(x)

    return haiku.transform(lambda x: Model()(x)).init(None, jax_array())


def in_haiku_without_module(layer):
    import haiku

    return haiku.transform(lambda x: layer(x)).init(None, jax_array())


def in_equinox(layer):
    import equinox

    class Model(equinox.Module):
        norm: object

        def __call__(self, x):
            return self.norm(x)

    gradient = equinox.filter_grad(lambda model, x: (model(x) ** 3).sum())
    found = gradient(Model(layer), jax_array()).norm
    return {name for name in ("scale", "bias") if getattr(found, name) is not None}


def in_brainstate(layer):
    import brainstate

    class Model(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def __call__(self, x):
            return self.norm(x)

    model = Model()
    model(jax_array())
    return {path[-1] for path in model.states(brainstate.ParamState)}


def in_torch(layer):
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.ModuleDict() if isinstance(layer, torch.nn.Module) else {}
            self.norms["first"] = layer

        def forward(self, x):
            return self.norms["first"](x)

    model = Model()
    model(torch.from_numpy(VALUES))
    return {name.rpartition(".")[2] for name, _ in model.named_parameters()}


def in_keras(layer):
    import keras

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def call(self, x):
            return self.norm(x)

    model = Model()
    model(keras.ops.convert_to_tensor(VALUES))
    return {w.path.rpartition("/")[2] for w in model.trainable_variables}


def in_mlx(layer):
    import mlx.core as mx
    import mlx.nn as nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def __call__(self, x):
            return self.norm(x)

    model = Model()
    model(mx.array(VALUES))
    return model.trainable_parameters().get("norm", {})


MODULES = {
    "flax nnx": in_nnx,
    "flax linen": in_linen,
    "flax linen, made in a call": in_linen_made_inside,
    "haiku": in_haiku,
    "haiku, without a module": in_haiku_without_module,
    "equinox": in_equinox,
    "brainstate": in_brainstate,
    "PyTorch": in_torch,
    "keras": in_keras,
    "MLX": in_mlx,
}
#: Those that are trained, of all pairs.
TRAINED = {
    ("nnx.Param", "flax nnx"),
    ("jax", "equinox"),
    ("nnx.Param", "equinox"),
    ("ParamState", "brainstate"),
    ("torch", "PyTorch"),
    ("torch", "keras"),
    ("mlx", "MLX"),
}
KINDS = ("numpy", "jax", "nnx.Param", "ParamState", "torch", "mlx")
#: The library of the arrays of each module's call here.
LIBRARIES = {"PyTorch": "torch", "keras": "torch", "MLX": "mlx"}


def library_of(kind: str) -> str:
    return "jax" if kind in ("nnx.Param", "ParamState") else kind


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", KINDS)
def test_trained_or_refused(kind, module):
    call = MODULES[module]
    if (kind, module) in TRAINED:
        found = call(make(kind))
        assert len(set(found)) == 2, found
        return
    accepted = kind == "numpy" or library_of(kind) == LIBRARIES.get(module, "jax")
    # Arrays of another library, and modules that replace what is a dict, fail in their own ways.
    with pytest.raises(ArgumentStateError if accepted else Exception) as raised:
        call(make(kind))
    if accepted:
        message = str(raised.value)
        assert module.partition(",")[0] in message
        assert "trainable=False" in message
        assert "groupnorm." in message or "backend=" in message


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_constants_are_accepted(kind, module):
    if kind == "numpy" or LIBRARIES.get(module, "jax") == "jax":
        layer = make(kind, trainable=False)
        if module == "equinox":
            import equinox

            equinox.filter_jit(lambda layer, x: layer(x))(layer, jax_array())
        else:
            assert not MODULES[module](layer)


def test_parameters_that_are_trained_elsewhere():
    """Layers that are arguments, or parameters, of modules of flax linen and haiku."""
    import equinox
    import haiku
    import jax
    from flax import linen

    x, layer = jax_array(), make("jax")

    class Given(linen.Module):
        @linen.compact
        def __call__(self, x, norm):
            return norm(x)

    class Held(linen.Module):
        @linen.compact
        def __call__(this, x):  # another name than self
            return this.param("norm", lambda key: layer)(x)

    def loss(layer):
        return (Given().apply({}, x, layer) ** 3).sum()

    assert jax.grad(loss)(layer).scale.any()
    variables = Held().init(jax.random.key(0), x)
    gradient = jax.grad(lambda v: (Held().apply(v, x) ** 3).sum())(variables)
    assert gradient["params"]["norm"].scale.any()
    f = haiku.transform(lambda x, layer: layer(x))
    assert jax.grad(lambda layer: (f.apply({}, None, x, layer) ** 3).sum())(layer).scale.any()
    equinox.filter_jit(make("numpy"))(x)


def test_the_first_argument_may_have_any_name():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(this):
            this.blocks = nnx.List([nnx.data(make("jax"))])

        def __call__(this, x):
            return this.blocks[0](x)

    with pytest.raises(ArgumentStateError, match="nnx"):
        Model()(jax_array())


def test_a_subclass_of_a_parameter_type():
    from flax import nnx

    class Own(nnx.Param):
        """A user's."""

    class Model(nnx.Module):
        def __init__(self, kind):
            self.norm = GroupNorm(CHANNELS, num_groups=GROUPS, backend="jax", param_type=kind)

        def __call__(self, x):
            return self.norm(x)

    Model(Own)(jax_array())
    with pytest.raises(ArgumentStateError, match="nnx"):
        Model(nnx.BatchStat)(jax_array())


def test_an_inner_module_that_is_trained_alone():
    """One of equinox that a module of linen holds, which trains neither."""
    import equinox
    import jax
    from flax import linen

    class Inner(equinox.Module):
        norm: object

        def __call__(self, x):
            return self.norm(x)

    class Outer(linen.Module):
        inner: object

        def __call__(self, x):
            return self.inner(x)

    with pytest.raises(ArgumentStateError, match="linen"):
        Outer(Inner(make("jax"))).init(jax.random.key(0), jax_array())


def test_callers_keep_nothing_alive():
    """The guard reads the variables of functions that run, which Python 3.11 would keep."""
    import weakref

    class Big:
        pass

    class Trainer:
        def run(self, layer, x):
            big = Big()
            found = weakref.ref(big)
            layer(x)
            del big
            return found() is None

    assert Trainer().run(make("jax"), jax_array())


def test_calls_outside_of_modules(rng):
    """Functions, transformations and a caller that is no module are no concern of the guard."""
    import jax

    class Trainer:
        def __init__(self, layer):
            self.layer = layer

        def step(self, x):
            return jax.grad(lambda layer: (layer(x) ** 3).sum())(self.layer)

    assert Trainer(make("jax")).step(jax_array()).scale.any()
    jax.jit(make("jax"))(jax_array())
    make("numpy")(jax_array())


def test_the_modules_named_in_errors_exist():
    for name in ("flax.nnx", "flax.linen", "haiku", "equinox", "brainstate"):
        assert importlib.import_module(f"groupnorm.{name}").GroupNorm
    assert groupnorm.keras.GroupNormalization


def test_parameters_of_linen_are_trained_wherever_they_are_called():
    import jax
    import jax.numpy as jnp
    from flax import linen

    def parameter(module):
        return module.param("norm", lambda key: make("jax"))

    class InSetup(linen.Module):
        def setup(self):
            self.norm = parameter(self)

        def __call__(self, x):
            return self.norm(x)

    class Inner(linen.Module):
        norm: object

        def __call__(self, x):
            return self.norm(x)

    class Outer(linen.Module):
        @linen.compact
        def __call__(self, x):
            return Inner(parameter(self))(x)

    for model in (InSetup(), Outer()):
        variables = model.init(jax.random.key(0), jax_array())
        loss = lambda v, model=model: (model.apply(v, jax_array()) ** 3).sum()  # noqa: E731
        assert jnp.any(jax.grad(loss)(variables)["params"]["norm"].scale)
    with pytest.raises(ArgumentStateError):
        Inner(make("jax")).init(jax.random.key(0), jax_array())


def test_layers_in_a_dataclass_are_given():
    import jax
    from flax import struct

    @struct.dataclass
    class State:
        norm: GroupNorm

    import haiku

    function = haiku.transform(lambda state, x: state.norm(x))
    grads = jax.grad(lambda s: (function.apply({}, None, s, jax_array()) ** 3).sum())(
        State(make("jax"))
    )
    assert grads.norm.scale.any()


def test_variables_of_a_method_that_a_debugger_holds():
    """It writes back what it read, which would be gone if the guard had emptied it."""
    import sys

    import torch

    layer, x = make("numpy"), torch.from_numpy(VALUES)

    class Net(torch.nn.Module):
        def forward(self, value):
            y = value + 1
            z = y + 1
            return y + z

    def trace(frame, event, argument):
        if frame.f_code is Net.forward.__code__ and event == "line":
            layer(x)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = Net().forward(1)
    finally:
        sys.settrace(before)
    assert found == 5
