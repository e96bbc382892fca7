"""The contenders of cpu.py in NumPy and PyTorch: a copy, the peers, and this library's layer.

Every contender has scale and bias of the input's dtype and returns a new array. NumPy's own
operations use one thread, PyTorch's `torch.get_num_threads()`, ours up to all usable CPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from _cpu_cases import (
    BOTH,
    COMPILED,
    EPSILON,
    FIRST,
    LIMIT,
    NATIVE,
    OURS,
    PORTABLE,
    SILU,
    TEXTBOOK,
    Array,
    Call,
    Case,
    Contest,
    Data,
    LeftOut,
    Maker,
    first_group,
    numpy_dtype,
)

if TYPE_CHECKING:
    import torch


def our_layer(backend: str, case: Case, **options: Any) -> Any:
    """The library's layer for a row; left out if this version lacks one of the options."""
    from groupnorm import GroupNorm

    first = backend == "torch" or case.layout == FIRST
    if case.task == SILU:
        options["activation"] = "silu"
    given = {} if case.dtype == "float32" else {"dtype": "input", "param_dtype": case.dtype}
    try:
        return GroupNorm(
            (case.channels, ...) if first else case.channels,
            feature_axis=0 if first else -1,
            num_groups=case.groups,
            epsilon=EPSILON,
            backend=backend,
            **given,
            **options,
        )
    except TypeError as error:
        unknown = [name for name in options if f"'{name}'" in str(error)]
        if not unknown or "unexpected keyword" not in str(error):
            raise
        raise LeftOut(f"this groupnorm has no {unknown[0]}= yet") from error


def ours(make: Callable[..., Call]) -> dict[str, Maker]:
    """The library's two contenders."""
    return {OURS: make, PORTABLE: functools.partial(make, implementation="portable")}


# ---- NumPy --------------------------------------------------------------------------------------


def numpy_contest(case: Case, data: Data) -> Contest:
    dtype = numpy_dtype(case.dtype)
    x, scale, bias, dy = (
        None if a is None else a.astype(dtype, copy=False)
        for a in (data.x, data.scale, data.bias, data.dy)
    )

    def make_ours(**options: Any) -> Call:
        layer = our_layer("numpy", case, **options)
        layer.scale, layer.bias = scale, bias
        if dy is None:
            return lambda: layer(x) if data.mask is None else layer(x, data.mask)
        return functools.partial(numpy_vjp, layer, x, dy)

    def make_textbook() -> Call:
        if dy is None:
            return lambda: textbook(case, x, scale, bias, data.mask)
        return lambda: textbook_vjp(case, x, scale, bias, dy)

    def read(result: Any) -> list[Array]:
        axis = 1 if case.layout == FIRST else -1
        arrays = [result] if dy is None else result[:2]
        return [first_group(array, case, axis) for array in arrays]

    return Contest({LIMIT: lambda: x.copy, TEXTBOOK: make_textbook, **ours(make_ours)}, read)


def numpy_vjp(layer: Any, x: Array, dy: Array) -> tuple[Array, ...]:
    y, pullback = layer.vjp(x)
    gradients = pullback(dy)
    return y, gradients.x, gradients.scale, gradients.bias


def grouped_axes(case: Case) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shape with a group axis, the reduced axes in it, and the shape of a parameter."""
    samples, channels, *space = case.dims
    apart = (case.groups, channels // case.groups)
    if case.layout == FIRST:
        shape = (samples, *apart, *space)
        return shape, tuple(range(2, len(shape))), (channels, *(1 for _ in space))
    shape = (samples, *space, *apart)
    return shape, (*range(1, len(shape) - 2), len(shape) - 1), (channels,)


def textbook_parts(case: Case, x: Array, mask: Array | None) -> tuple[Array, Array]:
    """Normalized values and 1 / standard deviation, with a group axis."""
    shape, axes, _ = grouped_axes(case)
    grouped = x.reshape(shape)
    where = True if mask is None else np.expand_dims(mask, 1 if case.layout == FIRST else -1)
    mean = grouped.mean(axes, keepdims=True, where=where)
    variance = grouped.var(axes, keepdims=True, where=where)
    rstd = 1 / np.sqrt(variance + np.float32(EPSILON))
    return (grouped - mean) * rstd, rstd


def in_float32(*arrays: Array) -> list[Array]:
    """16-bit arrays converted to float32: NumPy's bfloat16 sums lose all accuracy."""
    return [array.astype(np.float32, copy=False) for array in arrays]


def textbook(case: Case, x: Array, scale: Array, bias: Array, mask: Array | None) -> Array:
    """Textbook group normalization."""
    each = grouped_axes(case)[2]
    wide, wide_scale, wide_bias = in_float32(x, scale, bias)
    normalized, _ = textbook_parts(case, wide, mask)
    y = normalized.reshape(x.shape) * wide_scale.reshape(each) + wide_bias.reshape(each)
    if case.task == SILU:
        y = y / (1 + np.exp(-y))
    return y.astype(x.dtype, copy=False)


def textbook_vjp(
    case: Case, x: Array, scale: Array, bias: Array, dy: Array
) -> tuple[Array, Array, Array, Array]:
    """The same and its gradients, from the formula."""
    shape, axes, each = grouped_axes(case)
    others = tuple(a for a in range(x.ndim) if a != (1 if case.layout == FIRST else x.ndim - 1))
    wide, wide_scale, wide_bias, wide_dy = in_float32(x, scale, bias, dy)
    normalized, rstd = textbook_parts(case, wide, None)
    y = normalized.reshape(x.shape) * wide_scale.reshape(each) + wide_bias.reshape(each)
    dscale = (wide_dy * normalized.reshape(x.shape)).sum(others)
    dbias = wide_dy.sum(others)
    d = (wide_dy * wide_scale.reshape(each)).reshape(shape)
    dx = rstd * (
        d - d.mean(axes, keepdims=True) - normalized * (d * normalized).mean(axes, keepdims=True)
    )
    found = (y, dx.reshape(x.shape), dscale, dbias)
    y, dx, dscale, dbias = (array.astype(x.dtype, copy=False) for array in found)
    return y, dx, dscale, dbias


# ---- PyTorch ------------------------------------------------------------------------------------


def torch_contest(case: Case, data: Data, compiles: bool = True) -> Contest:
    """The row's contenders; `compiles=False` avoids compilation, several seconds per row."""
    import torch

    # Dynamo gives up on a function after 8 shapes and silently runs it uncompiled.
    torch.compiler.reset()
    dtype = getattr(torch, case.dtype)
    x, dy, mask = (torch_input(array, case) for array in (data.x, data.dy, data.mask))
    x = x.to(dtype)
    weight, bias = (torch.tensor(p, dtype=dtype) for p in (data.scale, data.bias))
    if case.task == BOTH:
        dy = dy.to(dtype)
        for tensor in (x, weight, bias):
            tensor.requires_grad_()
    silu = torch.nn.functional.silu if case.task == SILU else lambda y: y

    def calling(norm: Callable[..., Any], *parameters: Any) -> Call:
        """A call of `norm` on x, with the gradients of x and `parameters` if requested."""
        if case.task == BOTH:
            return functools.partial(torch_vjp, norm, x, parameters, dy)
        return lambda: norm(x)

    def native(x: torch.Tensor) -> torch.Tensor:
        return silu(torch.nn.functional.group_norm(x, case.groups, weight, bias, EPSILON))

    def simple(x: torch.Tensor) -> torch.Tensor:
        return silu(torch_textbook(x, weight, bias, case.groups, mask))

    def make_compiled() -> Call:
        return calling(torch.compile(simple, fullgraph=True, dynamic=False), weight, bias)

    def make_ours(**options: Any) -> Call:
        layer = our_layer("torch", case, **options)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        norm = layer if mask is None else lambda x: layer(x, mask)
        return calling(norm, layer.weight, layer.bias)

    makers: dict[str, Maker] = {LIMIT: lambda: x.detach().clone}
    if mask is None:
        makers[NATIVE] = lambda: calling(native, weight, bias)
    else:
        makers[TEXTBOOK] = lambda: calling(simple, weight, bias)
    if case.is_main and (compiles or case.shape == "ResNet"):
        makers[COMPILED] = make_compiled
    context = nullcontext if case.task == BOTH else torch.no_grad
    return Contest({**makers, **ours(make_ours)}, functools.partial(torch_read, case), context)


def torch_input(array: Array | None, case: Case) -> Any:
    """A tensor (N, C, *spatial) over the array's memory, in which channels may come last.

    For images and volumes that is exactly `torch.channels_last` and `torch.channels_last_3d`.
    """
    import torch

    if array is None:
        return None
    tensor = torch.from_numpy(array)
    return tensor if case.layout == FIRST else tensor.movedim(-1, 1)


def torch_textbook(x: Any, weight: Any, bias: Any, groups: int, mask: Any = None) -> Any:
    """Textbook group normalization, with a mask (N, 1, *spatial) if given."""
    import torch

    grouped = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    axes = tuple(range(2, grouped.ndim))
    if mask is None:
        variance, mean = torch.var_mean(grouped, axes, correction=0, keepdim=True)
    else:
        weights = mask.unsqueeze(1).to(x.dtype)
        count = weights.sum(axes, keepdim=True) * grouped.shape[2]
        mean = (grouped * weights).sum(axes, keepdim=True) / count
        variance = ((grouped - mean).square() * weights).sum(axes, keepdim=True) / count
    y = ((grouped - mean) * torch.rsqrt(variance + EPSILON)).reshape(x.shape)
    each = (-1, *(1 for _ in x.shape[2:]))
    return y * weight.view(each) + bias.view(each)


def torch_vjp(norm: Callable[..., Any], x: Any, parameters: tuple[Any, ...], dy: Any) -> Any:
    import torch

    y = norm(x)
    return (y, *torch.autograd.grad(y, (x, *parameters), dy))


def torch_read(case: Case, result: Any) -> list[Array]:
    tensors = result[:2] if case.task == BOTH else [result]
    return [first_group(t[:1].detach().float().numpy(), case, 1) for t in tensors]
