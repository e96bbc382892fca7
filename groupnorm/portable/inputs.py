"""Convert the arguments of a call to the work shape and the dtype of the statistics, and back."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from groupnorm.adapter import library_of, not_an_array
from groupnorm.arguments import CallOptions
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.plan import make_plan, make_plan_uncached, product, same_shape
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
    "from_numpy",
    "from_work",
    "host_mask",
    "is_floating",
    "parameter_gradient",
    "plan_of",
    "prepare",
    "to_work",
]


# Types of masks that are accepted with every library.
HOST_MASKS = (bool, int, float, list, tuple, np.ndarray, np.generic)


class WorkInputs(NamedTuple):
    """Arguments in the work shape; x, scale and bias in the precision of the statistics."""

    x: Array
    scale: Array
    bias: Array
    mask: Array | None
    counted: Array | None  # False where a masked, non-finite element was replaced by 0
    plan: "Plan"
    result_dtype: Any
    cotangent_dtype: Any


class CheckedInputs(NamedTuple):
    """Validated arguments, and the dtypes of the computation."""

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
    """Check that the arrays are consistent with each other and with the options.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Naming the argument, its value, the rule and the fix.
    """
    x = adapter.admit(x)
    if not x.shape:
        raise ArgumentValueError(
            "x is a scalar of shape (): it has no axis for the channels. Add one, as in x[None]."
        )
    plan = plan_of(adapter, tuple(x.shape), mask is not None, options)
    scale = _parameter(adapter, "scale", scale, x, plan)
    bias = _parameter(adapter, "bias", bias, x, plan)
    work_dtype, parameter_dtype, result_dtype = dtypes_of(adapter, x, scale, bias, options)
    if mask is not None:
        mask = _mask_to_work(adapter, mask, x, plan)
    return CheckedInputs(x, scale, bias, mask, plan, work_dtype, parameter_dtype, result_dtype)


def plan_of(
    adapter: "Adapter", shape: tuple[int, ...], masked: bool, options: CallOptions
) -> "Plan":
    """Return the plan for arrays of this shape."""
    planning = adapter.planning(shape)
    # A compiler that traces Python ignores the cache, with a warning, so it bypasses the cache.
    make = make_plan if planning.static else make_plan_uncached
    # Without epsilon, a constant sample gives no scale.
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
    adapter: "Adapter", x: Array, scale: Array, bias: Array, mask: Any, options: CallOptions,
    *, keep: bool = False,
) -> WorkInputs:  # fmt: skip
    """Check the arguments, and bring the arrays to the work shape.

    Parameters
    ----------
    keep : bool
        Whether the parameters and the mask are needed after the call, so that they are copied: the
        caller may change his in place.
    """
    xp = adapter.xp
    x, scale, bias, mask, plan, work_dtype, parameter_dtype, result_dtype = check(
        adapter, x, scale, bias, mask, options
    )
    x_work = to_work(xp.astype(x, work_dtype, copy=False), plan, xp)
    scale = _parameter_to_work(adapter, scale, 1.0, x_work, parameter_dtype, plan, keep)
    bias = _parameter_to_work(adapter, bias, 0.0, x_work, parameter_dtype, plan, keep)
    counted = None
    if mask is not None:
        if keep:
            mask = xp.astype(mask, xp.bool, copy=True)
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
    """Bring an array of the work shape back to the plan's shape, in the given dtype."""
    y = xp.reshape(xp.astype(y, dtype, copy=False), plan.merged_shape)
    y = xp.reshape(y, plan.permuted_shape)
    return y if plan.permutation is None else xp.permute_dims(y, plan.inverse_permutation)


def check_same_library(adapter: "Adapter", value: Any, argument: str, x: Array) -> Array:
    """Return an array as x itself is admitted; reject other libraries and devices than x's.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Naming both sides.
    """
    if not adapter.is_array(value):
        other = library_of(value)
        if other is None:
            raise not_an_array(value, argument)
        if getattr(value.dtype, "names", None):  # float0, which JAX takes for its own arrays
            raise ArgumentTypeError(
                f"{argument} has dtype {value.dtype}: it holds no numbers. Pass an array of "
                f"numbers, such as zeros in the dtype of x."
            )
        raise ArgumentTypeError(
            f"x is of {adapter.array_name} and {argument} of {other} arrays: arrays are not "
            "converted between libraries implicitly. Convert one of them; for a layer, "
            f"layer.to_backend({adapter.name or 'numpy'!r})."
        )
    value = adapter.admit(value, argument)
    adapter.check_together(x, value, argument)
    return value


def check_cotangent(
    adapter: "Adapter", dy: Any, x: Array, *, complex_result: bool = False
) -> Array:
    """Return a cotangent as x is admitted; reject other libraries, devices and shapes than x's.

    Also a complex one of a real result, whose imaginary part would be lost.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Naming both sides.
    """
    dy = check_same_library(adapter, dy, "dy", x)
    if tuple(dy.shape) != tuple(x.shape):
        raise ArgumentValueError(
            f"dy has shape {tuple(dy.shape)}: a cotangent must have the shape of y, which is "
            f"{tuple(x.shape)}."
        )
    if not complex_result and adapter.is_complex(dy.dtype):
        raise ArgumentTypeError(
            f"dy has dtype {dy.dtype} and y is real: the imaginary part has no meaning and would "
            "be lost. Pass the real part of dy."
        )
    return dy


def from_numpy(adapter: "Adapter", value: "np.ndarray[Any, Any]", argument: str, x: Array) -> Array:
    """Copy a NumPy array to x's library and device.

    Raises
    ------
    ArgumentTypeError
        If it is no array of numbers, or the library lacks its dtype.
    """
    adapter.admit_host(value, argument)
    try:
        return adapter.from_host(value, x)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{argument} has dtype {value.dtype}: {error}") from error


def _parameter(
    adapter: "Adapter", argument: str, value: Any, x: Array, plan: "Plan"
) -> Array | None:
    if value is None:
        return None
    # NumPy arrays are accepted with every library, as constants.
    if isinstance(value, np.ndarray) and not adapter.is_array(value):
        value = from_numpy(adapter, value, argument, x)
    value = check_same_library(adapter, value, argument, x)
    shape = tuple(value.shape)
    for_all = (plan.feature_shape, (plan.channels,))
    of_samples: list[tuple[int, ...]] = []
    if len(shape) > 1 and 0 in plan.kept_axes:
        of_samples = [(plan.shape[0], *channels) for channels in for_all]
    if not any(same_shape(shape, allowed) for allowed in (*for_all, *of_samples)):
        or_rows = f", or {of_samples[0]} with a row for each sample" if of_samples else ""
        raise ArgumentValueError(
            f"{argument} has shape {shape}: it holds one value per channel, so its shape must be "
            f"that of the feature axes, {plan.feature_shape}{or_rows}. Reshape it, or check "
            "feature_axis."
        )
    return value


def dtypes_of(
    adapter: "Adapter", x: Array, scale: Array | None, bias: Array | None, options: CallOptions
) -> tuple[Any, Any, Any]:
    """Return the dtypes of the statistics, of the parameters in the computation, and of y."""
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
            "for real values. Leave activation out."
        )
    # The highest precision among the arguments and the result.
    parameters = adapter.result_type(computed, result, xp.float32)
    return (
        parameters if adapter.is_complex(x_dtype) else adapter.real_dtype(parameters),
        parameters,
        result,
    )


def parameter_gradient(adapter: "Adapter", gradient: Array, parameter: Array) -> Array:
    """Return a gradient in the shape and dtype of its parameter; None for None."""
    if parameter is None:
        return None
    xp = adapter.xp
    # A NumPy parameter gets its gradient in the library of x.
    dtype = parameter.dtype if adapter.is_array(parameter) else adapter.dtype(parameter.dtype.name)
    if adapter.is_complex(gradient.dtype) and not adapter.is_complex(dtype):
        gradient = xp.real(gradient)
    if not is_floating(dtype, adapter):
        dtype = gradient.dtype  # gradients of integers are floating
    # A copy: if no axis was summed over, this is still the caller's dy.
    flat = xp.reshape(xp.astype(gradient, dtype, copy=True), (-1,))
    return xp.reshape(flat, tuple(parameter.shape))


def _parameter_to_work(
    adapter: "Adapter",
    value: Array | None,
    neutral: float,
    x: Array,
    dtype: Any,
    plan: "Plan",
    copy: bool,
) -> Array:
    xp = adapter.xp
    if value is None:
        # Of full shape, so that every operand of the last pass runs along whole rows.
        return xp.full(plan.parameter_shape, neutral, dtype=dtype, device=adapter.device_of(x))
    flat = xp.reshape(xp.astype(value, dtype, copy=copy), (plan.channels,))
    return xp.reshape(flat, plan.parameter_shape)


def _mask_to_work(adapter: "Adapter", mask: Any, x: Array, plan: "Plan") -> Array:
    xp = adapter.xp
    if isinstance(mask, HOST_MASKS):
        mask = adapter.mask_from_host(mask, host_mask, x)
    mask = check_same_library(adapter, mask, "mask", x)
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
    mask = xp.broadcast_to(mask, broadcast)
    if not plan.two_stages:  # Dask can merge axes, or split one, but not both at once
        before, split, after = (
            work[: plan.channel],
            work[plan.channel :][:2],
            work[plan.channel + 2 :],
        )
        mask = xp.reshape(mask, (*before, product(split), *after))
    return xp.reshape(mask, work)


def host_mask(mask: Any) -> "np.ndarray[Any, Any]":
    """Check a mask on the host, and convert it to boolean.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If it is not a mask.
    """
    if isinstance(mask, np.ma.MaskedArray):
        raise ArgumentTypeError(
            "mask is a numpy.ma.MaskedArray: its own mask would be ignored. Pass a plain boolean "
            "array, such as numpy.ma.getmaskarray(...)."
        )
    try:
        values = np.asarray(mask)
    except ValueError:
        values = np.asarray(None)
    # The small dtypes of ml_dtypes are of kind "V", as structured dtypes are.
    numbers = values.dtype.kind in "biuf" or (
        values.dtype.kind == "V" and not issubclass(values.dtype.type, np.void)
    )
    if not numbers:
        raise ArgumentTypeError(
            f"mask={mask!r} is not an array of booleans or of zeros and ones: give one that "
            "broadcasts to x, True for valid elements."
        )
    boolean = values.astype(bool)
    if values.dtype.kind != "b" and not np.array_equal(values, boolean):
        odd = values[values != boolean].flat[0]
        raise ArgumentValueError(
            f"mask contains {odd}: a mask selects the valid elements, so it must be boolean or "
            "contain only zeros and ones; it is not a weight. Pass mask != 0 if that is intended."
        )
    return boolean
