"""The network of the digits example, written in six frameworks with their own modules.

Every framework has its own convolutions, dense layer, pooling and activation, in its own layout,
and group norms of this library that are modules of the framework. Each has one class below, whose
methods build its model from `Weights`, read `Weights` off a model, and compute the class scores of
images of shape (N, 8, 8, 1).

`Weights` have convolutions of shape (H, W, in, out) and a dense kernel whose rows are pixels in the
order (H, W, C), as models with channels last need them. Where channels come first, an image is
flattened in the order (C, H, W), and the rows of the dense kernel are brought into that order:
that, unlike a product with other activations, only moves numbers.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when keras is imported

import equinox
import haiku
import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch
from digits_model import CHANNELS, CLASSES, GROUPS
from flax import linen, nnx

import groupnorm.flax.nnx
from groupnorm import GroupNorm

FIRST, SECOND = CHANNELS
FLAT = (2, 2, SECOND)  # (H, W, C) before the dense layer


class Weights(NamedTuple):
    """The parameters of a model as NumPy arrays, and its group norms as layers."""

    convs: tuple[np.ndarray, ...]  # (H, W, in, out) each
    norms: tuple[GroupNorm, ...]
    dense: np.ndarray  # (H * W * C, classes)
    bias: np.ndarray  # (classes,)

    def arrays(self) -> list[np.ndarray]:
        """All parameters, in one order."""
        norms = [host(array) for norm in self.norms for array in (norm.scale, norm.bias)]
        return [*self.convs, *norms, self.dense, self.bias]


class Layout(NamedTuple):
    """How a framework stores parameters."""

    conv: str
    dense: str  # with the order of the pixels
    norm: str  # the names of the parameters


def host(array: Any) -> np.ndarray:
    """Copy an array of JAX or PyTorch; the models of two frameworks never share memory."""
    if isinstance(array, torch.Tensor):
        array = array.detach()
    return np.array(array)


def channels_first_conv(kernel: np.ndarray) -> np.ndarray:
    """From (H, W, in, out) to (out, in, H, W)."""
    return kernel.transpose(3, 2, 0, 1)


def channels_last_conv(kernel: np.ndarray) -> np.ndarray:
    """From (out, in, H, W) to (H, W, in, out)."""
    return kernel.transpose(2, 3, 1, 0)


def channels_first_dense(dense: np.ndarray) -> np.ndarray:
    """From (H * W * C, classes) to (classes, C * H * W)."""
    return dense.reshape(*FLAT, CLASSES).transpose(3, 2, 0, 1).reshape(CLASSES, -1)


def channels_last_dense(dense: np.ndarray) -> np.ndarray:
    """From (classes, C * H * W) to (H * W * C, classes)."""
    height, width, channels = FLAT
    images = dense.reshape(CLASSES, channels, height, width)
    return images.transpose(2, 3, 1, 0).reshape(-1, CLASSES)


# ---- flax nnx: modules that hold their parameters -----------------------------------------------


class NnxNet(nnx.Module):
    """With group norms of its own, or those of `norms`."""

    def __init__(self, seed: int, norms: Any = None) -> None:
        rngs = nnx.Rngs(seed)
        self.conv1 = nnx.Conv(1, FIRST, (3, 3), use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(FIRST, SECOND, (3, 3), use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = norms or (
            groupnorm.flax.nnx.GroupNorm(channels, num_groups=GROUPS, rngs=rngs)
            for channels in CHANNELS
        )
        self.dense = nnx.Linear(int(np.prod(FLAT)), CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.silu(self.norm1(self.conv1(x)))
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        x = nnx.silu(self.norm2(self.conv2(x)))
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        return self.dense(x.reshape(len(x), -1))


class Nnx:
    name = "flax nnx"
    layout = Layout("HWIO", "HWC,out", "scale,bias")

    @staticmethod
    def build(weights: Weights) -> NnxNet:
        norms = [norm.to_("flax.nnx", feature_axis=-1, dtype=None) for norm in weights.norms]
        net = NnxNet(0, norms)
        for layer, kernel in (
            (net.conv1, weights.convs[0]),
            (net.conv2, weights.convs[1]),
            (net.dense, weights.dense),
        ):
            layer.kernel.set_value(jnp.asarray(kernel))
        net.dense.bias.set_value(jnp.asarray(weights.bias))
        return net

    @staticmethod
    def read(net: NnxNet) -> Weights:
        return Weights(
            tuple(host(conv.kernel[...]) for conv in (net.conv1, net.conv2)),
            tuple(GroupNorm.from_(norm) for norm in (net.norm1, net.norm2)),
            host(net.dense.kernel[...]),
            host(net.dense.bias[...]),
        )

    @staticmethod
    def logits(net: NnxNet, images: np.ndarray) -> np.ndarray:
        return host(nnx.jit(lambda net, x: net(x))(net, jnp.asarray(images)))


# ---- flax linen: modules, and variables apart from them -----------------------------------------


class LinenNet(linen.Module):
    norm1: linen.Module
    norm2: linen.Module

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(FIRST, (3, 3), use_bias=False, name="conv1")(x)
        x = linen.avg_pool(linen.silu(self.norm1(x)), (2, 2), strides=(2, 2))
        x = linen.Conv(SECOND, (3, 3), use_bias=False, name="conv2")(x)
        x = linen.avg_pool(linen.silu(self.norm2(x)), (2, 2), strides=(2, 2))
        return linen.Dense(CLASSES, name="dense")(x.reshape(len(x), -1))


class Linen:
    name = "flax linen"
    layout = Nnx.layout

    @staticmethod
    def build(weights: Weights) -> tuple[LinenNet, Any]:
        (norm1, of_norm1), (norm2, of_norm2) = (
            norm.to_("flax.linen", feature_axis=-1, dtype=None) for norm in weights.norms
        )
        conv1, conv2 = map(jnp.asarray, weights.convs)
        parameters = {
            "conv1": {"kernel": conv1},
            "norm1": of_norm1["params"],
            "conv2": {"kernel": conv2},
            "norm2": of_norm2["params"],
            "dense": {"kernel": jnp.asarray(weights.dense), "bias": jnp.asarray(weights.bias)},
        }
        return LinenNet(norm1, norm2), {"params": parameters}

    @staticmethod
    def read(model: tuple[LinenNet, Any]) -> Weights:
        net, variables = model
        parameters = variables["params"]
        return Weights(
            tuple(host(parameters[name]["kernel"]) for name in ("conv1", "conv2")),
            tuple(GroupNorm.from_(getattr(net, n), parameters[n]) for n in ("norm1", "norm2")),
            host(parameters["dense"]["kernel"]),
            host(parameters["dense"]["bias"]),
        )

    @staticmethod
    def logits(model: tuple[LinenNet, Any], images: np.ndarray) -> np.ndarray:
        net, variables = model
        return host(jax.jit(net.apply)(variables, jnp.asarray(images)))


# ---- equinox: modules for one sample, with channels first ---------------------------------------


class EquinoxNet(equinox.Module):
    conv1: equinox.nn.Conv2d
    norm1: Any
    conv2: equinox.nn.Conv2d
    norm2: Any
    pool: equinox.nn.AvgPool2d
    dense: equinox.nn.Linear

    def __init__(self, norms: Any) -> None:
        keys = jax.random.split(jax.random.key(0), 3)
        self.conv1 = equinox.nn.Conv2d(1, FIRST, 3, padding=1, use_bias=False, key=keys[0])
        self.conv2 = equinox.nn.Conv2d(FIRST, SECOND, 3, padding=1, use_bias=False, key=keys[1])
        self.norm1, self.norm2 = norms
        self.pool = equinox.nn.AvgPool2d(2, 2)
        self.dense = equinox.nn.Linear(int(np.prod(FLAT)), CLASSES, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Class scores (10,) of one image (1, 8, 8)."""
        x = self.pool(jax.nn.silu(self.norm1(self.conv1(x))))
        x = self.pool(jax.nn.silu(self.norm2(self.conv2(x))))
        return self.dense(x.reshape(-1))


class Equinox:
    name = "equinox"
    layout = Layout("OIHW", "out,CHW", "weight,bias")

    @staticmethod
    def build(weights: Weights) -> EquinoxNet:
        norms = [norm.to_("equinox", feature_axis=0, dtype="input") for norm in weights.norms]
        conv1, conv2 = map(channels_first_conv, weights.convs)
        values = (conv1, conv2, channels_first_dense(weights.dense), weights.bias)
        return equinox.tree_at(
            lambda net: (net.conv1.weight, net.conv2.weight, net.dense.weight, net.dense.bias),
            EquinoxNet(norms),
            tuple(map(jnp.asarray, values)),
        )

    @staticmethod
    def read(net: EquinoxNet) -> Weights:
        return Weights(
            tuple(channels_last_conv(host(conv.weight)) for conv in (net.conv1, net.conv2)),
            tuple(GroupNorm.from_(norm) for norm in (net.norm1, net.norm2)),
            channels_last_dense(host(net.dense.weight)),
            host(net.dense.bias),
        )

    @staticmethod
    def logits(net: EquinoxNet, images: np.ndarray) -> np.ndarray:
        x = jnp.asarray(images.transpose(0, 3, 1, 2))
        return host(equinox.filter_jit(lambda net, x: jax.vmap(net)(x))(net, x))


# ---- haiku: modules that exist in transformed functions only ------------------------------------


class HaikuNet(haiku.Module):
    """`norms` are what makes the group norms, as `GroupNorm.to_` returns it."""

    def __init__(self, norms: Any) -> None:
        super().__init__(name="net")
        self.conv1 = haiku.Conv2D(FIRST, 3, with_bias=False, name="conv1")
        self.conv2 = haiku.Conv2D(SECOND, 3, with_bias=False, name="conv2")
        make1, make2 = norms
        self.norm1, self.norm2 = make1(name="norm1"), make2(name="norm2")
        self.dense = haiku.Linear(CLASSES, name="dense")

    def __call__(self, x: jax.Array) -> jax.Array:
        window = (2, 2, 1)  # without the batch axis
        x = haiku.avg_pool(jax.nn.silu(self.norm1(self.conv1(x))), window, window, "VALID")
        x = haiku.avg_pool(jax.nn.silu(self.norm2(self.conv2(x))), window, window, "VALID")
        return self.dense(haiku.Flatten()(x))


class Haiku:
    name = "haiku"
    layout = Layout("HWIO", "HWC,out", "scale,offset")

    @staticmethod
    def build(weights: Weights) -> tuple[Any, Any]:
        """What makes the group norms, and the parameters."""
        (make1, of_norm1), (make2, of_norm2) = (
            norm.to_("haiku", feature_axis=-1, dtype=None) for norm in weights.norms
        )
        conv1, conv2 = map(jnp.asarray, weights.convs)
        parameters = {
            "net/~/conv1": {"w": conv1},
            "net/~/norm1": of_norm1,
            "net/~/conv2": {"w": conv2},
            "net/~/norm2": of_norm2,
            "net/~/dense": {"w": jnp.asarray(weights.dense), "b": jnp.asarray(weights.bias)},
        }
        return (make1, make2), parameters

    @staticmethod
    def read(model: tuple[Any, Any]) -> Weights:
        makes, parameters = model

        def norms() -> tuple[GroupNorm, ...]:
            net = HaikuNet(makes)
            return tuple(
                GroupNorm.from_(norm, parameters[norm.module_name])
                for norm in (net.norm1, net.norm2)
            )

        return Weights(
            tuple(host(parameters[f"net/~/{name}"]["w"]) for name in ("conv1", "conv2")),
            haiku.transform(norms).apply({}, None),
            host(parameters["net/~/dense"]["w"]),
            host(parameters["net/~/dense"]["b"]),
        )

    @staticmethod
    def logits(model: tuple[Any, Any], images: np.ndarray) -> np.ndarray:
        makes, parameters = model
        net = haiku.without_apply_rng(haiku.transform(lambda x: HaikuNet(makes)(x)))
        return host(jax.jit(net.apply)(parameters, jnp.asarray(images)))


# ---- keras, with any of its backends ------------------------------------------------------------


class Keras:
    name = f"keras ({keras.backend.backend()})"
    layout = Layout("HWIO", "HWC,out", "gamma,beta")

    @staticmethod
    def build(weights: Weights) -> keras.Model:
        norm1, norm2 = (
            norm.to_("keras", feature_axis=-1, dtype="float32") for norm in weights.norms
        )
        last = {"data_format": "channels_last"}  # whatever the user's keras.json says
        same = {"padding": "same", "use_bias": False, **last}
        net = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Conv2D(FIRST, 3, name="conv1", **same),
                norm1,
                keras.layers.Activation("silu"),
                keras.layers.AveragePooling2D(2, **last),
                keras.layers.Conv2D(SECOND, 3, name="conv2", **same),
                norm2,
                keras.layers.Activation("silu"),
                keras.layers.AveragePooling2D(2, **last),
                keras.layers.Flatten(**last),
                keras.layers.Dense(CLASSES, name="dense"),
            ]
        )
        for name, values in (
            ("conv1", [weights.convs[0]]),
            ("conv2", [weights.convs[1]]),
            ("dense", [weights.dense, weights.bias]),
        ):
            net.get_layer(name).set_weights(values)
        return net

    @staticmethod
    def read(net: keras.Model) -> Weights:
        norms = [one for one in net.layers if isinstance(one, keras.layers.GroupNormalization)]
        dense, bias = net.get_layer("dense").get_weights()
        return Weights(
            tuple(np.array(*net.get_layer(name).get_weights()) for name in ("conv1", "conv2")),
            tuple(map(GroupNorm.from_, norms)),
            np.array(dense),
            np.array(bias),
        )

    @staticmethod
    def logits(net: keras.Model, images: np.ndarray) -> np.ndarray:
        return np.array(net.predict(images, batch_size=len(images), verbose=0))


# ---- PyTorch: channels first --------------------------------------------------------------------


class Torch:
    name = "PyTorch"
    layout = Equinox.layout

    @staticmethod
    def build(weights: Weights) -> torch.nn.Sequential:
        norm1, norm2 = (norm.to_("torch", feature_axis=0, dtype="input") for norm in weights.norms)
        net = torch.nn.Sequential()
        net.conv1 = torch.nn.Conv2d(1, FIRST, 3, padding=1, bias=False)
        net.norm1 = norm1
        net.silu1 = torch.nn.SiLU()
        net.pool1 = torch.nn.AvgPool2d(2)
        net.conv2 = torch.nn.Conv2d(FIRST, SECOND, 3, padding=1, bias=False)
        net.norm2 = norm2
        net.silu2 = torch.nn.SiLU()
        net.pool2 = torch.nn.AvgPool2d(2)
        net.flatten = torch.nn.Flatten()
        net.dense = torch.nn.Linear(int(np.prod(FLAT)), CLASSES)
        values = (
            (net.conv1.weight, channels_first_conv(weights.convs[0])),
            (net.conv2.weight, channels_first_conv(weights.convs[1])),
            (net.dense.weight, channels_first_dense(weights.dense)),
            (net.dense.bias, weights.bias),
        )
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(torch.tensor(value))
        return net

    @staticmethod
    def read(net: torch.nn.Sequential) -> Weights:
        return Weights(
            tuple(channels_last_conv(host(conv.weight)) for conv in (net.conv1, net.conv2)),
            tuple(GroupNorm.from_(norm) for norm in (net.norm1, net.norm2)),
            channels_last_dense(host(net.dense.weight)),
            host(net.dense.bias),
        )

    @staticmethod
    @torch.no_grad()
    def logits(net: torch.nn.Sequential, images: np.ndarray) -> np.ndarray:
        return host(net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))


RING = (Linen, Equinox, Haiku, Keras, Torch, Nnx)
