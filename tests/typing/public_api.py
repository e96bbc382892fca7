"""The public API as type checkers see it: `nox -s types` checks this file; nothing runs it."""

from typing import Any, assert_type

import jax
import numpy as np
import torch
from numpy.typing import NDArray

import groupnorm
from groupnorm import (
    GroupNorm,
    GroupStatistics,
    available_backends,
    bind_axis,
    errors,
    get_num_threads,
    group_norm,
    group_norm_vjp,
    group_statistics,
    initializers,
    load,
    merge_statistics,
    normalize,
    save,
    set_num_threads,
)
from groupnorm.backends.cupy import CupyGroupNorm
from groupnorm.backends.jax import JaxGroupNorm
from groupnorm.backends.mlx import MlxGroupNorm
from groupnorm.backends.numpy import NumpyGroupNorm
from groupnorm.backends.torch import TorchGroupNorm

Host = NDArray[np.float32]


def the_backend_decides_the_class(name: str) -> None:
    assert_type(GroupNorm(8, num_groups=2), NumpyGroupNorm)
    assert_type(GroupNorm(8, num_groups=2, backend="numpy"), NumpyGroupNorm)
    assert_type(GroupNorm(8, num_groups=2, backend="jax"), JaxGroupNorm)
    assert_type(GroupNorm(8, num_groups=2, backend="torch"), TorchGroupNorm)
    assert_type(GroupNorm(8, num_groups=2, backend="cupy"), CupyGroupNorm)
    assert_type(GroupNorm(8, num_groups=2, backend="mlx"), MlxGroupNorm)


def every_layer_is_a_group_norm(layers: list[GroupNorm]) -> None:
    layers.append(GroupNorm(8, num_groups=2, backend="numpy"))
    layers.append(GroupNorm(8, num_groups=2, backend="jax"))
    layers.append(GroupNorm(8, num_groups=2, backend="torch"))
    layers.append(GroupNorm(8, num_groups=2, backend="cupy"))
    layers.append(GroupNorm(8, num_groups=2, backend="mlx"))


def a_torch_layer_is_a_module(x: torch.Tensor) -> torch.Tensor:
    layer = GroupNorm((8, ...), 0, 2, backend="torch", device="cpu")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), layer)
    torch.optim.SGD(layer.parameters(), lr=0.1)
    through_model: torch.Tensor = model(x)
    return assert_type(layer(x), torch.Tensor) + through_model


def to_backend_names_the_class_too(layer: GroupNorm) -> None:
    assert_type(layer.to_backend("numpy"), NumpyGroupNorm)
    assert_type(layer.to_backend("jax"), JaxGroupNorm)
    assert_type(layer.to_backend("torch", device="cpu"), TorchGroupNorm)
    assert_type(layer.to_backend("cupy"), CupyGroupNorm)
    assert_type(layer.to_backend("mlx"), MlxGroupNorm)


def carried(module: torch.nn.Module, layer: GroupNorm) -> None:
    assert_type(GroupNorm.from_(module), GroupNorm)
    assert_type(GroupNorm.from_(module, params={"scale": 1}), GroupNorm)
    layer.to_("flax.nnx", feature_axis=-1, dtype=None)


def array_in_array_out(x: Host, t: torch.Tensor, j: jax.Array) -> None:
    layer = GroupNorm((4, 4, 8), num_groups=None, group_size=4)
    assert_type(layer(x), Host)
    assert_type(layer.update(x, mask=[[True], [False]]), Host)
    assert_type(layer(j), jax.Array)
    assert_type(GroupNorm(8, num_groups=2, backend="torch")(t), torch.Tensor)
    assert_type(GroupNorm(8, num_groups=2, backend="jax")(j), jax.Array)
    assert_type(group_norm(x, num_groups=2), Host)
    assert_type(group_norm(t, num_groups=2, mask=t > 0), torch.Tensor)
    assert_type(group_norm(j, num_groups=2, dtype="bfloat16"), jax.Array)


def pullbacks(x: Host, t: torch.Tensor) -> None:
    y, pullback = GroupNorm(8, num_groups=2).vjp(x)
    assert_type(y, Host)
    gradients = pullback(y)
    np.sum(gradients.x)
    if gradients.scale is not None and gradients.bias is not None:
        np.sum(gradients.scale + gradients.bias)
    out, pull = group_norm_vjp(t, torch.ones(8), torch.zeros(8), num_groups=2)
    assert_type(out, torch.Tensor)
    pull(out)


def attributes(layer: GroupNorm) -> None:
    assert_type(layer.num_groups, int)
    assert_type(layer.group_size, int)
    assert_type(layer.epsilon, float)


def options() -> None:
    GroupNorm(
        in_size=(4, 4, 8),
        feature_axis=(-2, -1),
        num_groups=4,
        epsilon=1e-5,
        dtype="input",
        use_bias=False,
        use_scale=True,
        scale_init=initializers.constant(2.0),
        bias_init=initializers.zeros,
        reduction_axes=(1, 2, 3),
        axis_name="devices",
        axis_index_groups=[[0, 1], [2, 3]],
        use_fast_variance=False,
        param_dtype=np.float64,
    )


def what_is_here() -> None:
    for backend in available_backends():
        assert_type(backend.name, str)
        assert_type(backend.installed, bool)
        assert_type(backend.version, str | None)
        assert_type(backend.devices, tuple[str, ...])
        assert_type(backend.error, str | None)
        assert_type(backend.implementations["cpu"], tuple[str, ...])
        assert_type(backend.why_not_fused["cpu"], str)


def errors_are_also_the_usual_ones(x: Any) -> None:
    try:
        group_norm(x, num_groups=3)
    except errors.ArgumentValueError as error:
        value: ValueError = error
        own: groupnorm.errors.GroupNormError = error
        print(value, own)


def statistics_are_values(x: Host, tensor: torch.Tensor) -> None:
    whole = merge_statistics(group_statistics(x), group_statistics(x, mask=[True]))
    assert_type(whole, GroupStatistics)
    assert_type(normalize(x, whole), Host)
    assert_type(normalize(tensor, GroupStatistics(count=4, mean=tensor, m2=tensor)), torch.Tensor)


def names_are_bound(communicator: object) -> None:
    with bind_axis(rows=communicator) as binding:
        binding.unbind()


def threads_are_counted() -> None:
    assert_type(get_num_threads(), int)
    set_num_threads(2)


def files(model: torch.nn.Module, layer: NumpyGroupNorm) -> None:
    save("norms.safetensors", model)
    assert_type(load("norms.safetensors", into=model), torch.nn.Module)
    assert_type(load("norms.safetensors", into=layer, strict=False), NumpyGroupNorm)
    load("norms.safetensors", backend="jax", device="cpu")
