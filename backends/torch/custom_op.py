"""The kernels as custom operators, `torch.ops.groupnorm`, for torch.compile.

The compiler inlines portable code; a custom operator is opaque to it, so compiled programs run the
kernels. `traced` decides while the program is traced, by what is known then. If tensors turn out to
have an unsupported memory layout at run time, the operators use the portable implementation
themselves: they are correct for every input.

Besides y, forward returns one tensor with the statistics for backward (`Call.packed`). Only the
same kernels on the same memory layout can use it; otherwise backward measures again.
"""

from typing import Any

import torch

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.layout import ROLES, kernel_dtypes, memory_order
from groupnorm.backends.torch import kernels
from groupnorm.backends.torch.differentiation import portable_gradients
from groupnorm.backends.torch.internals import (
    assume_constant,
    in_forward_mode,
    is_exporting,
    is_transformed,
)
from groupnorm.backends.torch.kernels import as_parameter
from groupnorm.backends.torch.memory import PLAIN, check_memory
from groupnorm.dispatch import adapter_named
from groupnorm.plan import make_plan_uncached, product
from groupnorm.portable.group_norm import group_norm
from groupnorm.portable.inputs import check, dtypes_of
from groupnorm.portable.per_sample import has_rows, is_per_sample

__all__ = ["SETTINGS", "options_of", "settings_of", "traced"]

# The fields of CallOptions that a program compiled without replicas can have.
SETTINGS = (
    "int[] feature, SymInt? num_groups, SymInt? group_size, int[]? reduction, float epsilon, "
    "str? dtype, bool fast, str? activation"
)
_ARRAYS = "Tensor x, Tensor? scale, Tensor? bias, Tensor? mask"


# While a program is traced -----------------------------------------------------------------------


def traced(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
    """Return y, computed by the operator, or `Unsupported`; the compiler traces this function."""
    if is_exporting():
        return Unsupported(
            "exported programs use portable code, so that they run without this package"
        )
    for name, a in (("x", x), ("scale", scale), ("bias", bias), ("mask", mask)):
        if a is None:
            continue
        if type(a) not in PLAIN or a.device != x.device or a.layout is not torch.strided:
            return Unsupported(f"{name} is not a plain tensor on x's device")
    dtypes = [None if a is None else a.dtype for a in (scale, bias)]
    why = _why_unavailable(x.device, x.dtype, dtypes[0], dtypes[1], options.dtype)
    # Read again so that the compiler guards on it; it is False here.
    if why or in_forward_mode():
        return Unsupported(why or _SEEN_THROUGH)
    plan = check(adapter, x, scale, bias, mask, options).plan
    if is_per_sample(x, scale, bias, options) and not (
        plan.kept_axes == {0} and all(p is None or has_rows(p, plan) for p in (scale, bias))
    ):
        return Unsupported(
            "the kernels for this call have no parameters with a row for each sample"
        )
    if plan.permutation is not None or plan.roles not in ROLES:
        return Unsupported(f"the order of the axes is {plan.roles}, not one of {', '.join(ROLES)}")
    if mask is not None:
        before = x.ndim - mask.ndim
        if any(a % x.ndim >= before and mask.shape[a % x.ndim - before] != 1
               for a in options.feature):  # fmt: skip
            return Unsupported("the mask varies along the feature axes")
        if mask.dtype != torch.bool:
            mask = mask != 0
    y, _ = torch.ops.groupnorm.group_norm.default(x, scale, bias, mask, *settings_of(options))
    return y


_SEEN_THROUGH = "forward mode and torch.func's transforms must see the individual operations"


# The compiler calls this and keeps the result, so it traces no import of the core. It guards by
# itself on what the result depends on besides the arguments: transforms and forward mode.
@assume_constant
def _why_unavailable(device: Any, x: Any, scale: Any, bias: Any, dtype: str | None) -> str:
    """Return why kernels cannot compute tensors of these dtypes now; "" if they can."""
    if in_forward_mode() or is_transformed():
        return _SEEN_THROUGH
    options = options_of((), None, 1, None, 0.0, dtype, True, None)
    found = kernel_dtypes(adapter_named("torch"), x, scale, bias, options)
    if isinstance(found, Unsupported):
        return found.reason
    why = kernels.engine_for(device).why_unavailable(device)
    return "" if why is None else why.reason


# The operators ------------------------------------------------------------------------------------


@torch.library.custom_op(
    "groupnorm::group_norm",
    mutates_args=(),
    schema=f"({_ARRAYS}, {SETTINGS}) -> (Tensor y, Tensor saved)",
    device_types=("cpu", "cuda"),
)
def _forward(x: Any, scale: Any, bias: Any, mask: Any, *settings: Any) -> Any:
    x, read, call = _dense_call(x, scale, bias, mask, settings)
    if isinstance(call, Unsupported):
        y, saved = _portable_forward(x, scale, bias, mask, *settings)
    else:
        y, found = call.forward(read)
        saved = call.packed(found)
    return _laid_out_as(x, y), saved


@torch.library.custom_op(
    "groupnorm::group_norm_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_ARRAYS}, Tensor saved, {SETTINGS}) "
    "-> (Tensor dx, Tensor dscale, Tensor dbias)",
    device_types=("cpu", "cuda"),
)
def _backward(dy: Any, x: Any, scale: Any, bias: Any, mask: Any, saved: Any, *settings: Any) -> Any:
    check_memory(dy, "dy")
    x, read, call = _dense_call(x, scale, bias, mask, settings)
    if not isinstance(call, Unsupported):
        call = kernels.bind_again(call, read, scale, bias, dy)
    if isinstance(call, Unsupported):
        dx, *gradients = _portable_backward(dy, x, scale, bias, mask, saved, *settings)
        return _laid_out_as(x, dx), *gradients
    found = call.unpacked(saved)
    dx, dscale, dbias = call.backward(call.forward(read)[1] if found is None else found, read, dy)
    gradients = [
        x.new_empty(0) if p is None else as_parameter(gradient, p)
        for gradient, p in ((dscale, scale), (dbias, bias))
    ]
    return _laid_out_as(x, dx), *gradients


@_forward.register_fake
def _(x: Any, scale: Any, bias: Any, mask: Any, *settings: Any) -> Any:
    result = dtypes_of(adapter_named("torch"), x, scale, bias, options_of(*settings))[2]
    return torch.empty_like(x, dtype=result), _nothing_saved(x, settings)


@_backward.register_fake
def _(dy: Any, x: Any, scale: Any, bias: Any, mask: Any, saved: Any, *settings: Any) -> Any:
    gradients = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (scale, bias))
    return torch.empty_like(x), *gradients


def settings_of(options: CallOptions) -> tuple[Any, ...]:
    """Return the options as an operator's arguments."""
    return (
        options.feature, options.num_groups, options.group_size, options.reduction,
        options.epsilon, options.dtype, options.fast, options.activation,
    )  # fmt: skip


def options_of(*settings: Any) -> CallOptions:
    """Return the options of an operator's arguments."""
    feature, num_groups, group_size, reduction, epsilon, dtype, fast, activation = settings
    return CallOptions(
        feature=tuple(feature), num_groups=num_groups, group_size=group_size,
        reduction=None if reduction is None else tuple(reduction), epsilon=epsilon, dtype=dtype,
        axis_name=None, axis_index_groups=None, fast=fast, activation=activation,
        implementation=None, feature_shape=None,
    )  # fmt: skip


def _dense_call(x: Any, scale: Any, bias: Any, mask: Any, settings: Any) -> tuple[Any, Any, Any]:
    """Return x without gaps, x as the kernels read it, and the bound call or `Unsupported`."""
    for name, a in (("x", x), ("scale", scale), ("bias", bias), ("mask", mask)):
        if a is not None:
            check_memory(a, name)
    if x.numel() and memory_order(x.shape, x.stride()) is None:
        x = x.clone()  # keeps the order of the axes, which the result has too
    adapter, options = adapter_named("torch"), options_of(*settings)
    call = kernels.bind_call(adapter, x, scale, bias, mask, options)
    if not isinstance(call, Unsupported) or x.is_contiguous():
        return x, x, call
    # `traced` accepted only calls that are supported in the order of x's axes. So on a GPU, where
    # the saved tensor cannot be inspected without waiting, it always comes from kernels, or never.
    read = x.contiguous()
    return x, read, kernels.bind_call(adapter, read, scale, bias, mask, options)


def _laid_out_as(x: Any, y: Any) -> Any:
    if y.stride() == x.stride():
        return y
    return torch.empty_like(x, dtype=y.dtype).copy_(y)


# What backward needs of forward -------------------------------------------------------------------


def _nothing_saved(x: Any, settings: Any) -> Any:
    """Return a tensor of the size of `Call.packed` that stands for no saved statistics."""
    options = options_of(*settings)
    plan = make_plan_uncached(
        tuple(x.shape), options.feature, options.num_groups, options.group_size, options.reduction,
        sampled=False, static=False,
    )  # fmt: skip
    groups = product(plan.statistics_shape)
    return kernels.engine_for(x.device).nothing_saved(x, groups)


# Derivatives, and torch.func's vmap ---------------------------------------------------------------


def _portable_forward(x: Any, scale: Any, bias: Any, mask: Any, *settings: Any) -> Any:
    y = group_norm(adapter_named("torch"), x, scale, bias, mask, options_of(*settings))
    return y, _nothing_saved(x, settings)


def _portable_backward(
    dy: Any, x: Any, scale: Any, bias: Any, mask: Any, saved: Any, *settings: Any
) -> Any:
    given = (x, scale, bias, mask, options_of(*settings), dy)
    found = portable_gradients(adapter_named("torch"), *given)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


def _set_up(ctx: Any, inputs: Any, output: Any) -> None:
    x, scale, bias, mask, *ctx.settings = inputs
    ctx.save_for_backward(x, scale, bias, mask, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _pull_back(ctx: Any, dy: Any, _: Any) -> Any:
    none = (None,) * (1 + len(ctx.settings))
    if dy is None:
        return None, None, None, *none
    x, scale, bias, mask, saved = ctx.saved_tensors
    found = torch.ops.groupnorm.group_norm_backward.default(
        dy, x, scale, bias, mask, saved, *ctx.settings
    )
    wanted = ctx.needs_input_grad[:3]
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), *none


def _set_up_again(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.settings = inputs[6:]
    ctx.save_for_backward(*inputs[:5])


def _pull_back_again(ctx: Any, *cotangents: Any) -> Any:
    """Differentiate the gradient with respect to dy, x, scale and bias, in portable code."""
    *tensors, mask = ctx.saved_tensors
    given = [a is not None for a in tensors]

    def function(x: Any, *parameters: Any) -> Any:
        rest = iter(parameters)
        scale, bias = (next(rest) if g else None for g in given[2:])
        return _portable_forward(x, scale, bias, mask, *ctx.settings)[0]

    def gradients(dy: Any, *arguments: Any) -> Any:
        return torch.func.vjp(function, *arguments)[1](dy)

    arguments = [a for a in tensors if a is not None]
    wanted = [c for c, g in zip(cotangents, given[1:], strict=True) if g]
    found = iter(torch.func.vjp(gradients, *arguments)[1](tuple(wanted)))
    return *(next(found) if g else None for g in given), *(None,) * (2 + len(ctx.settings))


_forward.register_autograd(_pull_back, setup_context=_set_up)
_backward.register_autograd(_pull_back_again, setup_context=_set_up_again)


@_forward.register_vmap
def _(info: Any, in_dims: Any, *arguments: Any) -> Any:
    return _mapped(torch.ops.groupnorm.group_norm.default, info, in_dims, arguments)


@_backward.register_vmap
def _(info: Any, in_dims: Any, *arguments: Any) -> Any:
    return _mapped(torch.ops.groupnorm.group_norm_backward.default, info, in_dims, arguments)


def _mapped(operator: Any, info: Any, in_dims: Any, arguments: Any) -> Any:
    """Call the operator once per batch element: one element may fill the cache."""
    found = [
        operator(
            *(
                a.select(dim, i) if isinstance(a, torch.Tensor) and dim is not None else a
                for a, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    stacked = tuple(map(torch.stack, zip(*found, strict=True)))
    return stacked, (0,) * len(stacked)
