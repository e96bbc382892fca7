"""One row for each framework: its group norm of this library inside a module of its own.

Every row trains, compiles, saves and reads its model by the framework's usual means.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
from typing import Any

import numpy as np

from groupnorm import GroupNorm

STEPS = 40
RATE = 0.05


class Row:
    """The framework's module that holds a normalization, and what its users do with it."""

    name: str
    #: Packages that it needs.
    packages: tuple[str, ...]
    #: What `layer.to_` is told, as the framework has no such option.
    changes: dict[str, Any] = {}
    #: Whether channels are on axis 1.
    first = False
    #: The framework's names of scale and bias.
    names = ("scale", "bias")
    trains = True

    def asarray(self, x: np.ndarray) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(x)

    def model(self, layer: GroupNorm) -> Any:
        """Return a model that holds the framework's module of a layer."""
        raise NotImplementedError

    def call(self, model: Any, x: Any) -> Any:
        return model(x)

    def compiled(self, model: Any, x: Any) -> Any:
        raise NotImplementedError

    def layer(self, model: Any) -> GroupNorm:
        """Return the layer that `GroupNorm.from_` reads off the model."""
        return GroupNorm.from_(model.norm)

    def gradient(self, model: Any, x: Any, dy: Any) -> tuple[Any, Any]:
        """Return the gradients of ``(model(x) * dy).sum()``."""
        raise NotImplementedError

    def train(self, model: Any, x: Any, target: Any) -> tuple[Any, list[float]]:
        """Train by the mean squared error; return the model and the losses."""
        raise NotImplementedError

    def round_trip(self, model: Any, other: Any) -> Any:
        """Save the model by the framework's means, and read it into another one."""
        raise NotImplementedError

    def listed(self, model: Any) -> list[str]:
        """Return the names of what the framework would train."""
        raise NotImplementedError


def mean_square(y: Any, target: Any) -> Any:
    return ((y - target) ** 2).mean()


class FlaxNnx(Row):
    name, packages = "flax.nnx", ("jax", "flax", "optax")

    def model(self, layer):
        from flax import nnx

        class Model(nnx.Module):
            def __init__(self):
                self.norm = layer.to_("flax.nnx", **FlaxNnx.changes)

            def __call__(self, x):
                return self.norm(x)

        return Model()

    def compiled(self, model, x):
        from flax import nnx

        return nnx.jit(lambda model, x: model(x))(model, x)

    def gradient(self, model, x, dy):
        from flax import nnx

        found = nnx.grad(lambda model: (model(x) * dy).sum())(model)["norm"]
        return found["scale"][...], found["bias"][...]

    def train(self, model, x, target):
        import optax
        from flax import nnx

        optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, gradient = nnx.value_and_grad(lambda m: mean_square(m(x), target))(model)
            optimizer.update(model, gradient)
            return loss

        return model, [float(step(model, optimizer)) for _ in range(STEPS)]

    def round_trip(self, model, other):
        from flax import nnx

        state = pickle.loads(pickle.dumps(nnx.to_pure_dict(nnx.state(model))))
        nnx.replace_by_pure_dict(read := nnx.state(other), state)
        nnx.update(other, read)
        return other

    def listed(self, model):
        from flax import nnx

        return [
            ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))
        ]


class Functional(Row):
    """Models of flax linen and haiku: a pair of a pure function and its parameters."""

    def call(self, model, x):
        apply, parameters = model
        return apply(parameters, x)

    def compiled(self, model, x):
        import jax

        apply, parameters = model
        return jax.jit(apply)(parameters, x)

    def of_norm(self, parameters) -> dict[str, Any]:
        raise NotImplementedError

    def gradient(self, model, x, dy):
        import jax

        apply, parameters = model
        found = jax.grad(lambda parameters: (apply(parameters, x) * dy).sum())(parameters)
        return tuple(self.of_norm(found)[name] for name in self.names)

    def train(self, model, x, target):
        import jax
        import optax

        apply, parameters = model
        optimizer = optax.adam(RATE)
        state, losses = optimizer.init(parameters), []

        @jax.jit
        def step(parameters, state):
            loss, gradient = jax.value_and_grad(lambda p: mean_square(apply(p, x), target))(
                parameters
            )
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(parameters, updates), state, loss

        for _ in range(STEPS):
            parameters, state, loss = step(parameters, state)
            losses.append(float(loss))
        return (apply, parameters), losses

    def listed(self, model):
        import jax

        return [jax.tree_util.keystr(p, simple=True, separator=".")
                for p, _ in jax.tree_util.tree_leaves_with_path(model[1])]  # fmt: skip


class FlaxLinen(Functional):
    name, packages = "flax.linen", ("jax", "flax", "optax")

    def model(self, layer):
        import jax
        from flax import linen

        module, variables = layer.to_("flax.linen")

        class Model(linen.Module):
            norm: linen.Module

            def __call__(self, x):
                return self.norm(x)

        outer = Model(module)
        self.module = module
        fresh = outer.init(jax.random.key(0), self.asarray(np.zeros((1, 1, 8), np.float32)))
        assert set(fresh["params"]["norm"]) == set(variables["params"])
        return outer.apply, {"params": {"norm": variables["params"]}}

    def of_norm(self, parameters):
        return parameters["params"]["norm"]

    def layer(self, model):
        return GroupNorm.from_(self.module, {"params": model[1]["params"]["norm"]})

    def round_trip(self, model, other):
        from flax import serialization

        return other[0], serialization.from_bytes(other[1], serialization.to_bytes(model[1]))


class Haiku(Functional):
    name, packages = "haiku", ("jax", "haiku", "optax")
    names = ("scale", "offset")

    def model(self, layer):
        import haiku

        make, parameters = layer.to_("haiku")

        class Model(haiku.Module):
            def __init__(self):
                super().__init__(name="model")

            def __call__(self, x):
                return make(name="norm")(x)

        transformed = haiku.without_apply_rng(haiku.transform(lambda x: Model()(x)))
        fresh = transformed.init(None, self.asarray(np.zeros((1, 1, 8), np.float32)))
        assert {k: set(v) for k, v in fresh.items()} == {"model/norm": set(parameters)}
        self.make = make
        return transformed.apply, {"model/norm": parameters}

    def of_norm(self, parameters):
        return parameters["model/norm"]

    def layer(self, model):
        return GroupNorm.from_(self.make, self.of_norm(model[1]))

    def round_trip(self, model, other):
        return other[0], pickle.loads(pickle.dumps(model[1]))


class Equinox(Row):
    name, packages = "equinox", ("jax", "equinox", "optax")
    changes = {"feature_axis": 0, "dtype": "input"}
    first = True
    names = ("weight", "bias")

    def model(self, layer):
        import equinox

        class Model(equinox.Module):
            norm: Any

            def __call__(self, x):
                return self.norm(x)

        return Model(layer.to_("equinox", **self.changes))

    def call(self, model, x):
        import jax

        return jax.vmap(model)(x)

    def compiled(self, model, x):
        import equinox

        return equinox.filter_jit(self.call)(model, x)

    def gradient(self, model, x, dy):
        import equinox

        found = equinox.filter_grad(lambda model: (self.call(model, x) * dy).sum())(model).norm
        return found.weight, found.bias

    def train(self, model, x, target):
        import equinox
        import optax

        optimizer = optax.adam(RATE)
        state, losses = optimizer.init(equinox.filter(model, equinox.is_inexact_array)), []

        @equinox.filter_jit
        def step(model, state):
            loss, gradient = equinox.filter_value_and_grad(
                lambda m: mean_square(self.call(m, x), target)
            )(model)
            updates, state = optimizer.update(gradient, state)
            return equinox.apply_updates(model, updates), state, loss

        for _ in range(STEPS):
            model, state, loss = step(model, state)
            losses.append(float(loss))
        return model, losses

    def round_trip(self, model, other):
        import equinox

        file = io.BytesIO()
        equinox.tree_serialise_leaves(file, model)
        file.seek(0)
        return equinox.tree_deserialise_leaves(file, other)

    def listed(self, model):
        import equinox
        import jax

        arrays = equinox.filter(model, equinox.is_inexact_array)
        return [jax.tree_util.keystr(p, simple=True, separator=".")
                for p, _ in jax.tree_util.tree_leaves_with_path(arrays)]  # fmt: skip


class Brainstate(Row):
    name, packages = "brainstate", ("jax", "brainstate")

    def model(self, layer):
        import brainstate

        class Model(brainstate.nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = layer.to_("brainstate")

            def __call__(self, x):
                return self.norm(x)

        return Model()

    def compiled(self, model, x):
        import brainstate

        return brainstate.transform.jit(model)(x)

    def _gradient(self, model, loss):
        import brainstate

        states = model.states(brainstate.ParamState)
        found = brainstate.transform.grad(loss, states, return_value=True)()
        return found[0]["norm", "weight"], found[1]

    def gradient(self, model, x, dy):
        found, _ = self._gradient(model, lambda: (model(x) * dy).sum())
        return found["scale"], found["bias"]

    def train(self, model, x, target):
        import brainstate
        import jax

        [state] = model.states(brainstate.ParamState).values()

        @brainstate.transform.jit
        def step():
            gradient, loss = self._gradient(model, lambda: mean_square(model(x), target))
            state.value = jax.tree.map(lambda p, g: p - 5 * RATE * g, state.value, gradient)
            return loss

        return model, [float(step()) for _ in range(STEPS)]

    def round_trip(self, model, other):
        values = {key: state.value for key, state in model.states().items()}
        values = pickle.loads(pickle.dumps(values))
        for key, state in other.states().items():
            state.value = values[key]
        return other

    def listed(self, model):
        import brainstate

        return [f"{'.'.join(path)}.{name}" for path, state in
                model.states(brainstate.ParamState).items() for name in state.value]  # fmt: skip


class Torch(Row):
    name, packages = "torch", ("torch",)
    changes = {"feature_axis": 0, "dtype": "input"}
    first = True
    names = ("weight", "bias")

    def asarray(self, x):
        import torch

        return torch.from_numpy(np.array(x))

    def model(self, layer):
        import torch

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = layer.to_("torch", **Torch.changes)

            def forward(self, x):
                return self.norm(x)

        return Model()

    def compiled(self, model, x):
        import torch

        return torch.compile(model, fullgraph=True)(x)

    def gradient(self, model, x, dy):
        model.zero_grad()
        (model(x) * dy).sum().backward()
        return model.norm.weight.grad, model.norm.bias.grad

    def train(self, model, x, target):
        import torch

        optimizer, losses = torch.optim.Adam(model.parameters(), lr=RATE), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = mean_square(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return model, losses

    def round_trip(self, model, other):
        import torch

        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        return other

    def listed(self, model):
        return [name for name, _ in model.named_parameters()]


class Mlx(Row):
    name, packages = "mlx", ("mlx",)
    names = ("weight", "bias")

    def asarray(self, x):
        import mlx.core as mx

        return mx.array(x)

    def model(self, layer):
        import mlx.nn as nn

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = layer.to_("mlx")

            def __call__(self, x):
                return self.norm(x)

        return Model()

    def layer(self, model):
        return model.norm

    def compiled(self, model, x):
        import mlx.core as mx

        return mx.compile(lambda x: model(x))(x)

    def gradient(self, model, x, dy):
        import mlx.nn as nn

        found = nn.value_and_grad(model, lambda x: (model(x) * dy).sum())(x)[1]["norm"]
        return found["weight"], found["bias"]

    def train(self, model, x, target):
        import mlx.core as mx
        import mlx.nn as nn
        import mlx.optimizers as optimizers

        optimizer, losses = optimizers.Adam(learning_rate=RATE), []
        step = nn.value_and_grad(model, lambda x: mean_square(model(x), target))
        for _ in range(STEPS):
            loss, gradient = step(x)
            optimizer.update(model, gradient)
            mx.eval(model.parameters(), optimizer.state)
            losses.append(loss.item())
        return model, losses

    def round_trip(self, model, other):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "weights.safetensors")
            model.save_weights(path)
            other.load_weights(path)
        return other

    def listed(self, model):
        from mlx.utils import tree_flatten

        return [name for name, _ in tree_flatten(model.trainable_parameters())]


class Keras(Row):
    """With the backend that keras was imported with."""

    changes = {"dtype": "float32"}
    names = ("gamma", "beta")

    @property
    def backend(self) -> str:
        import keras

        return keras.backend.backend()

    @property
    def trains(self):
        return self.backend != "numpy"

    name = property(lambda self: f"keras ({self.backend})")
    packages = ("keras",)

    def asarray(self, x):
        import keras

        return keras.ops.convert_to_tensor(np.array(x))

    def model(self, layer):
        import keras

        norm = layer.to_("keras", **self.changes)
        inputs = keras.Input((None, 8))  # a symbolic call
        model = keras.Model(inputs, norm(inputs))
        model.norm = norm
        return model

    def compiled(self, model, x):
        return model.predict(x, verbose=0)

    def gradient(self, model, x, dy):
        import keras

        if self.backend == "torch":
            model.zero_grad()
            (model(x) * dy).sum().backward()
            return tuple(w.value.grad for w in (model.norm.gamma, model.norm.beta))
        import jax

        def loss(values):
            y, _ = model.stateless_call(values, [], x)
            return (y * dy).sum()

        assert keras.backend.backend() == "jax"
        return tuple(jax.grad(loss)([w.value for w in model.trainable_variables]))

    def train(self, model, x, target):
        import keras

        # In eager mode PyTorch computes as in a step of any of its users.
        model.compile(keras.optimizers.Adam(RATE), "mse")
        history = model.fit(x, target, epochs=STEPS, batch_size=len(x), verbose=0, shuffle=False)
        return model, history.history["loss"]

    def round_trip(self, model, other):
        import tempfile

        import keras

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            model.save(path)
            read = keras.saving.load_model(path)
        [norm] = [part for part in read.layers if type(part) is type(model.norm)]
        read.norm = norm
        return read

    def listed(self, model):
        return [w.path for w in model.trainable_variables]


FRAMEWORKS = (FlaxNnx(), FlaxLinen(), Haiku(), Equinox(), Brainstate(), Torch(), Mlx())
KERAS_BACKENDS = ("jax", "torch", "numpy")


@functools.cache
def keras_row() -> Keras:
    return Keras()
