"""One small convolutional network for 8x8 digits, written for JAX, PyTorch and NumPy.

The GroupNorm layers of all three are the library's, converted by ``to_backend``; everything else
is written with each framework's own functions. Images are (N, 8, 8, 1) and
every activation keeps its channels last::

    conv 3x3, 16 -> GroupNorm(4) -> silu -> mean pool 2x2
    conv 3x3, 32 -> GroupNorm(4) -> silu -> mean pool 2x2 -> dense, 10

The activation is smooth on purpose. With relu, a value that rounds to just above zero in one
framework and just below in another changes its gradient from 1 to 0, and gradients could not be
compared between frameworks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from groupnorm import GroupNorm

CHANNELS = (16, 32)
GROUPS = 4
CLASSES = 10


class Parameters(NamedTuple):
    """All parameters of the network; in JAX this is a pytree, norms included."""

    convs: tuple[Any, ...]  # (3, 3, in, out) each
    norms: tuple[GroupNorm, ...]
    dense: Any  # (features, classes)
    bias: Any  # (classes,)


class Gradients(NamedTuple):
    """Gradients of the loss that all three frameworks are compared on, as NumPy arrays."""

    images: np.ndarray
    scales: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]


def init(seed: int) -> Parameters:
    """Fresh parameters, in JAX."""
    rng = np.random.default_rng(seed)

    def he_normal(*shape: int) -> jax.Array:
        fan_in = np.prod(shape[:-1])
        return jnp.asarray(rng.normal(0.0, np.sqrt(2.0 / fan_in), shape), jnp.float32)

    first, second = CHANNELS
    norms = (
        GroupNorm((8, 8, first), num_groups=GROUPS, backend="jax"),
        GroupNorm((4, 4, second), num_groups=GROUPS, backend="jax"),
    )
    convs = (he_normal(3, 3, 1, first), he_normal(3, 3, first, second))
    return Parameters(convs, norms, he_normal(2 * 2 * second, CLASSES), jnp.zeros(CLASSES))


# ---- JAX ----------------------------------------------------------------------------------------


def jax_logits(parameters: Parameters, images: jax.Array) -> jax.Array:
    """Class scores (N, 10)."""
    x = images
    for kernel, norm in zip(parameters.convs, parameters.norms, strict=True):
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.silu(norm(x))
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return x.reshape(x.shape[0], -1) @ parameters.dense + parameters.bias


def jax_loss(parameters: Parameters, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    scores = jax.nn.log_softmax(jax_logits(parameters, images))
    return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=1))


def jax_gradients(parameters: Parameters, images: np.ndarray, labels: np.ndarray) -> Gradients:
    """By `jax.grad`; the gradient with respect to a layer is a layer."""
    gradient = jax.jit(jax.grad(jax_loss, argnums=(0, 1)))
    d_parameters, d_images = gradient(parameters, jnp.asarray(images), jnp.asarray(labels))
    return Gradients(
        np.asarray(d_images),
        tuple(np.asarray(norm.scale) for norm in d_parameters.norms),
        tuple(np.asarray(norm.bias) for norm in d_parameters.norms),
    )


# ---- PyTorch ------------------------------------------------------------------------------------


class TorchNet(torch.nn.Module):
    """The same network as a module."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()

        def parameter(a: jax.Array) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.tensor(np.asarray(a)))

        self.convs = torch.nn.ParameterList(map(parameter, parameters.convs))
        self.norms = torch.nn.ModuleList(norm.to_backend("torch") for norm in parameters.norms)
        self.dense = parameter(parameters.dense)
        self.bias = parameter(parameters.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for kernel, norm in zip(self.convs, self.norms, strict=True):
            # conv2d and avg_pool2d expect channels first; these permutations do not copy.
            x = F.conv2d(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), padding=1)
            x = F.silu(norm(x.permute(0, 2, 3, 1)))
            x = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return x.flatten(1) @ self.dense + self.bias

    def carried_to(self, backend: str) -> Parameters:
        """The parameters for another backend: "numpy" or "jax"."""
        asarray = {"numpy": np.asarray, "jax": jnp.asarray}[backend]

        def carried(parameter: torch.nn.Parameter) -> Any:
            return asarray(parameter.detach().numpy().copy())

        return Parameters(
            tuple(map(carried, self.convs)),
            tuple(norm.to_backend(backend) for norm in self.norms),
            carried(self.dense),
            carried(self.bias),
        )


def torch_gradients(net: TorchNet, images: np.ndarray, labels: np.ndarray) -> Gradients:
    """By autograd."""
    inputs = torch.tensor(images, requires_grad=True)
    net.zero_grad()
    F.cross_entropy(net(inputs), torch.from_numpy(labels)).backward()
    return Gradients(
        inputs.grad.numpy(),
        tuple(norm.weight.grad.numpy().copy() for norm in net.norms),
        tuple(norm.bias.grad.numpy().copy() for norm in net.norms),
    )


# ---- NumPy --------------------------------------------------------------------------------------


def numpy_conv(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """3x3 convolution with zero padding: every pixel's neighbourhood times the kernel."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.tensordot(patches, kernel.transpose(2, 0, 1, 3), axes=3)  # (N,H,W,C,3,3), (C,3,3,D)


def numpy_conv_pullback(dy: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Gradient of `numpy_conv` with respect to x: a convolution with the flipped kernel."""
    return numpy_conv(dy, kernel[::-1, ::-1].swapaxes(2, 3))


def numpy_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * (np.float32(1) + np.tanh(np.float32(0.5) * x))  # cannot overflow


def numpy_silu(x: np.ndarray) -> np.ndarray:
    return x * numpy_sigmoid(x)


def numpy_silu_pullback(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    sigmoid = numpy_sigmoid(x)
    return dy * sigmoid * (1 + x * (1 - sigmoid))


def numpy_pool(x: np.ndarray) -> np.ndarray:
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def numpy_pool_pullback(dy: np.ndarray) -> np.ndarray:
    return dy.repeat(2, axis=1).repeat(2, axis=2) / np.float32(4)


def numpy_logits(parameters: Parameters, images: np.ndarray) -> np.ndarray:
    """Class scores (N, 10), with nothing but NumPy."""
    x = images
    for kernel, norm in zip(parameters.convs, parameters.norms, strict=True):
        x = numpy_pool(numpy_silu(norm(numpy_conv(x, kernel))))
    return x.reshape(len(x), -1) @ parameters.dense + parameters.bias


def numpy_gradients(parameters: Parameters, images: np.ndarray, labels: np.ndarray) -> Gradients:
    """Explicit backward pass; through GroupNorm with the layer's `vjp`."""
    x, tape = images, []
    for kernel, norm in zip(parameters.convs, parameters.norms, strict=True):
        y, norm_pullback = norm.vjp(numpy_conv(x, kernel))
        tape.append((kernel, y, norm_pullback))
        x = numpy_pool(numpy_silu(y))

    scores = x.reshape(len(x), -1) @ parameters.dense + parameters.bias
    likelihood = np.exp(scores - scores.max(axis=1, keepdims=True))
    likelihood /= likelihood.sum(axis=1, keepdims=True)
    d_scores = (likelihood - np.eye(CLASSES, dtype=np.float32)[labels]) / np.float32(len(x))
    dx = (d_scores @ parameters.dense.T).reshape(x.shape)

    scales, biases = [], []
    for kernel, y, norm_pullback in reversed(tape):
        gradients = norm_pullback(numpy_silu_pullback(numpy_pool_pullback(dx), y))
        scales.insert(0, gradients.scale)
        biases.insert(0, gradients.bias)
        dx = numpy_conv_pullback(gradients.x, kernel)
    return Gradients(dx, tuple(scales), tuple(biases))
