"""Bring the arguments of one call to the work shape and the dtype of the statistics, and back."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from groupnorm.adapter import library_of, not_an_array
from groupnorm.arguments import CallOptions
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.plan import make_plan, make_plan_uncached, same_shape
from groupnorm.typing import Array

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter
    from groupnorm.plan import Plan

__all__ = [
    "HOST_MASKS",
    "CheckedInputs",
    "WorkInputs",
    "check",
    "check_cotangent",
    "check_same_library",
    "dtypes_of",
    "from_work",
    "host_mask",
    "is_floating",
    "prepare",
    "to_work",
]


# Types of masks that serve every library.
HOST_MASKS = (bool, int, float, list, tuple, np.ndarray, np.generic)


class WorkInputs(NamedTuple):
    """Arguments in the work shape; x, scale and bias in the precision of the statistics."""

    x: Array
    scale: Array
    bias: Array
    mask: Array | None
    counted: Array | None  # where x itself was taken, not 0 in its place
    plan: "Plan"
    result_dtype: Any
    cotangent_dtype: Any


class CheckedInputs(NamedTuple):
    """Arguments that fit each other, and what they are computed in."""

    x: Array
    scale: Array | None  # as given
    bias: Array | None
    mask: Array | None  # boolean, broadcastable to the work shape
    plan: "Plan"
    work_dtype: Any
    parameter_dtype: Any
    result_dtype: Any


def check(
    adapter: "Adapter", x: Array, scale: Array, bias: Array, mask: Any, options: CallOptions
) -> CheckedInputs:
    """Check the arrays against each other and the options.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Naming the argument, its value, the rule and the fix.
    """
    x = adapter.admit(x)
    if not x.shape:
        raise ArgumentValueError(
            "x is a scalar of shape (): no axis holds its channels. Give it one, as in x[None]."
        )
    plan = _plan_of(adapter, tuple(x.shape), mask is not None, options)
    scale = _parameter(adapter, "scale", scale, x, plan)
    bias = _parameter(adapter, "bias", bias, x, plan)
    work_dtype, parameter_dtype, result_dtype = dtypes_of(adapter, x, scale, bias, options)
    if mask is not None:
        mask = _mask_to_work(adapter, mask, x, plan)
    return CheckedInputs(x, scale, bias, mask, plan, work_dtype, parameter_dtype, result_dtype)


def _plan_of(
    adapter: "Adapter", shape: tuple[int, ...], masked: bool, options: CallOptions
) -> "Plan":
    planning = adapter.planning(shape)
    # A compiler that traces Python ignores the cache, with a warning: it must not meet it.
    make = make_plan if planning.static else make_plan_uncached
    # Without epsilon, data that is constant where sampled has no scale to go by.
    sampled = options.fast and not masked and options.epsilon > 0
    return make(
        shape,
        options.feature,
        options.num_groups,
        options.group_size,
        options.reduction,
        options.feature_shape,
        sampled=sampled and planning.static and planning.blocked_sums,
        static=planning.static,
        blocked=planning.blocked_sums,
        merging=planning.merge_axes,
    )


def is_floating(dtype: Any, adapter: "Adapter") -> bool:
    """Whether dtype is real floating or complex, not integer or boolean."""
    return adapter.is_real_floating(dtype) or adapter.is_complex(dtype)


def prepare(
    adapter: "Adapter", x: Array, scale: Array, bias: Array, mask: Any, options: CallOptions
) -> WorkInputs:
    """Check the arrays against each other and the options, and bring them to the work shape."""
    xp = adapter.xp
    x, scale, bias, mask, plan, work_dtype, parameter_dtype, result_dtype = check(
        adapter, x, scale, bias, mask, options
    )
    x_work = to_work(xp.astype(x, work_dtype, copy=False), plan, xp)
    scale = _parameter_to_work(adapter, scale, 1.0, x_work, parameter_dtype, plan)
    bias = _parameter_to_work(adapter, bias, 0.0, x_work, parameter_dtype, plan)
    counted = None
    if mask is not None:
        counted = mask | xp.isfinite(x_work)
        x_work = xp.where(counted, x_work, 0.0)
    return WorkInputs(x_work, scale, bias, mask, counted, plan, result_dtype, parameter_dtype)


def to_work(x: Array, plan: "Plan", xp: Any) -> Array:
    """Bring an array of the plan's shape to the work shape."""
    if plan.permutation is not None:
        x = xp.permute_dims(x, plan.permutation)
    # In two steps: Dask can merge axes, or split one, but not both at once.
    x = xp.reshape(x, plan.merged_shape)
    return x if plan.two_stages else xp.reshape(x, plan.work_shape)


def from_work(y: Array, plan: "Plan", dtype: Any, xp: Any) -> Array:
    """Bring an array of the work shape back, in the dtype it is wanted in."""
    y = xp.reshape(xp.astype(y, dtype, copy=False), plan.merged_shape)
    y = xp.reshape(y, plan.permuted_shape)
    return y if plan.permutation is None else xp.permute_dims(y, plan.inverse_permutation)


def check_same_library(adapter: "Adapter", value: Any, argument: str, x: Array) -> None:
    """Refuse arrays of another library, and arrays on another device than x's.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Naming both sides.
    """
    if not adapter.is_array(value):
        other = library_of(value)
        if other is None:
            raise not_an_array(value, argument)
        raise ArgumentTypeError(
            f"x is of {adapter.array_name} and {argument} of {other} arrays: nothing is moved "
            "between libraries unasked. Convert one of them; for a layer, "
            f"layer.to_backend({adapter.name or 'numpy'!r})."
        )
    adapter.admit(value, argument)
    here, there = adapter.device_of(x), adapter.device_of(value)
    if here is not None and there is not None and here != there:
        raise ArgumentValueError(
            f"{argument} is on device {there} and x on device {here}: nothing is moved between "
            "devices unasked. Move one of them."
        )


def check_cotangent(adapter: "Adapter", dy: Any, x: Array) -> None:
    """Refuse a cotangent that does not belong to x: of another library, device or shape.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Naming both sides.
    """
    check_same_library(adapter, dy, "dy", x)
    if tuple(dy.shape) != tuple(x.shape):
        raise ArgumentValueError(
            f"dy has shape {tuple(dy.shape)}: a cotangent has the shape of y, which is "
            f"{tuple(x.shape)}."
        )


def _parameter(
    adapter: "Adapter", argument: str, value: Any, x: Array, plan: "Plan"
) -> Array | None:
    if value is None:
        return None
    # Values on the host are constants that serve every library.
    if isinstance(value, np.ndarray) and not adapter.is_array(value):
        value = adapter.from_host(value, x)
    check_same_library(adapter, value, argument, x)
    shape = tuple(value.shape)
    if not (same_shape(shape, plan.feature_shape) or same_shape(shape, (plan.channels,))):
        raise ArgumentValueError(
            f"{argument} has shape {shape}: it holds one number a channel, so its shape is that of "
            f"the feature axes, {plan.feature_shape}. Reshape it, or check feature_axis."
        )
    return value


def dtypes_of(
    adapter: "Adapter", x: Array, scale: Array | None, bias: Array | None, options: CallOptions
) -> tuple[Any, Any, Any]:
    """Return the dtypes of the statistics, of parameters among them, and of the result."""
    xp, wanted = adapter.xp, options.dtype
    x_dtype = x.dtype if is_floating(x.dtype, adapter) else adapter.default_float()
    result = x_dtype
    for parameter in (scale, bias):
        if parameter is not None:
            floating = is_floating(parameter.dtype, adapter)
            result = adapter.result_type(
                result, parameter.dtype if floating else adapter.default_float()
            )
    computed = result
    if wanted == "input":
        result = x_dtype
    elif wanted is not None:
        result = adapter.dtype(wanted)
    if adapter.is_complex(computed) and not adapter.is_complex(result):
        raise ArgumentTypeError(
            f"dtype={wanted!r} is real and the result complex: its imaginary part would be lost. "
            "Choose a complex dtype, or leave dtype out."
        )
    if options.activation is not None and adapter.is_complex(computed):
        raise ArgumentTypeError(
            f"activation={options.activation!r} is given and the values are complex: it is defined "
            "for real numbers. Leave activation out."
        )
    # In the precision of all that takes part, and of the result.
    parameters = adapter.result_type(computed, result, xp.float32)
    return (
        parameters if adapter.is_complex(x_dtype) else adapter.real_dtype(parameters),
        parameters,
        result,
    )


def _parameter_to_work(
    adapter: "Adapter",
    value: Array | None,
    neutral: float,
    x: Array,
    dtype: Any,
    plan: "Plan",
) -> Array:
    xp = adapter.xp
    if value is None:
        # Of full shape all the same: then every operand of the last pass runs along whole rows.
        return xp.full(plan.parameter_shape, neutral, dtype=dtype, device=adapter.device_of(x))
    flat = xp.reshape(xp.astype(value, dtype, copy=False), (plan.channels,))
    return xp.reshape(flat, plan.parameter_shape)


def _mask_to_work(adapter: "Adapter", mask: Any, x: Array, plan: "Plan") -> Array:
    xp = adapter.xp
    if isinstance(mask, HOST_MASKS):
        mask = adapter.from_host(host_mask(mask), x)
    check_same_library(adapter, mask, "mask", x)
    if adapter.is_complex(mask.dtype):
        raise ArgumentTypeError(
            f"mask has dtype {mask.dtype}: a mask is boolean, or holds zeros and ones. "
            "Pass mask != 0."
        )
    if mask.dtype != xp.bool:
        mask = mask != 0
    full, broadcast, work = plan.mask_shapes(tuple(mask.shape))
    mask = xp.reshape(mask, full)
    if plan.permutation is not None:
        mask = xp.permute_dims(mask, plan.permutation)
    return xp.reshape(xp.broadcast_to(mask, broadcast), work)


def host_mask(mask: Any) -> "np.ndarray[Any, Any]":
    """Check a mask that lies on the host, and make it boolean.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If it is no mask.
    """
    if isinstance(mask, np.ma.MaskedArray):
        raise ArgumentTypeError(
            "mask is a numpy.ma.MaskedArray: what it masks would be ignored. Pass a plain boolean "
            "array, such as numpy.ma.getmaskarray(...)."
        )
    try:
        values = np.asarray(mask)
    except ValueError:
        values = np.asarray(None)
    if values.dtype.kind not in "biuf" and values.dtype.kind != "V":
        raise ArgumentTypeError(
            f"mask={mask!r} is no array of booleans or of zeros and ones: give one that broadcasts "
            "to x, True where elements count."
        )
    boolean = values.astype(bool)
    if values.dtype.kind != "b" and not np.array_equal(values, boolean):
        odd = values[values != boolean].flat[0]
        raise ArgumentValueError(
            f"mask holds {odd}: a mask says which elements count, so it is boolean or holds zeros "
            "and ones; it cannot weigh them. Pass mask != 0 if that is meant."
        )
    return boolean
