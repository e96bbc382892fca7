"""One call from arguments to result: forward, forward and pullback, or statistics only."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from groupnorm.arguments import CallOptions
from groupnorm.distributed.replicas import Replicas
from groupnorm.errors import ArgumentTypeError
from groupnorm.portable.activations import activate, slope
from groupnorm.portable.agreement import agree
from groupnorm.portable.backward import pull_back
from groupnorm.portable.inputs import (
    WorkInputs,
    check_cotangent,
    from_work,
    is_floating,
    parameter_gradient,
    prepare,
    to_work,
)
from groupnorm.portable.merge import GroupStatistics, merge_replicas
from groupnorm.portable.per_sample import PerSample, is_per_sample
from groupnorm.portable.public_statistics import from_value, to_value
from groupnorm.portable.statistics import (
    Coefficients,
    Deviations,
    centre,
    centre_at,
    finish,
    measure,
    normalize,
    recentre,
    saturate,
)
from groupnorm.typing import Array, Gradients

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter

__all__ = [
    "Measured",
    "gradients",
    "group_norm",
    "group_norm_measured",
    "group_norm_vjp",
    "group_statistics",
    "normalize_by",
]


class Measured(NamedTuple):
    """What a backward pass needs of the forward pass besides its arguments: one value a channel."""

    pivot: Array
    unit: Array
    coefficients: Coefficients
    replicas: Replicas | None  # the name may no longer be bound in the backward pass


def group_norm(
    adapter: "Adapter", x: Array, scale: Array, bias: Array, mask: Any, options: CallOptions
) -> Array:
    """Return the normalized x. Arrays are of the adapter's library; parameters also of NumPy.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, AxisNameError
        If the arrays are inconsistent with each other or with the options.
    """
    if is_per_sample(x, scale, bias, options):
        call = PerSample.of(adapter, x, scale, bias, mask, options)
        return call.apply(group_norm(adapter, x, None, None, mask, call.without_parameters))
    inputs = prepare(adapter, x, scale, bias, mask, options)
    replicas = _replicas(adapter, inputs, options)
    y, _, _ = _forward(adapter, inputs, options, replicas, keep_deviations=False)
    y = activate(y, options.activation, adapter)
    return from_work(y, inputs.plan, inputs.result_dtype, adapter.xp)


def group_norm_measured(
    adapter: "Adapter", x: Array, scale: Array, bias: Array, mask: Any, options: CallOptions
) -> tuple[Array, Measured]:
    """Return the normalized x, and what `gradients` takes."""
    inputs = prepare(adapter, x, scale, bias, mask, options)
    replicas = _replicas(adapter, inputs, options)
    y, deviations, coefficients = _forward(
        adapter, inputs, options, replicas, keep_deviations=False
    )  # fmt: skip
    y = activate(y, options.activation, adapter)
    y = from_work(y, inputs.plan, inputs.result_dtype, adapter.xp)
    return y, Measured(deviations.pivot, deviations.unit, coefficients, replicas)


def gradients(
    adapter: "Adapter", x: Array, scale: Array, bias: Array, mask: Any, options: CallOptions,
    dy: Array, measured: Measured,
) -> Gradients:  # fmt: skip
    """Return the gradients of a call that was measured before."""
    inputs = prepare(adapter, x, scale, bias, mask, options)
    plan, coefficients = inputs.plan, measured.coefficients
    deviations = centre_at(
        inputs.x, inputs.mask, measured.pivot, measured.unit, plan, adapter
    )  # fmt: skip
    if inputs.mask is not None:
        deviations = saturate(deviations, inputs.mask, coefficients, inputs.scale, plan, adapter)
    z = None
    if options.activation is not None:
        z = normalize(
            deviations, coefficients, inputs.scale, inputs.bias, plan, adapter,
            keep_deviations=True,
        )  # fmt: skip
    return _gradients(
        adapter, x, scale, bias, inputs, options, measured.replicas, dy, z, deviations,
        coefficients, overwrite=True,
    )  # fmt: skip


def group_norm_vjp(
    adapter: "Adapter", x: Array, scale: Array, bias: Array, mask: Any, options: CallOptions,
    replicas: Replicas | None = None,
) -> tuple[Array, Callable[[Array], Gradients]]:  # fmt: skip
    """Return the normalized x and its pullback; raises as `group_norm`.

    The replicas are those of `options.axis_name`, if none are given.
    """
    xp = adapter.xp
    _check_local(adapter, x)
    if is_per_sample(x, scale, bias, options):
        call = PerSample.of(adapter, x, scale, bias, mask, options)
        normalized, pull = group_norm_vjp(
            adapter, x, None, None, mask, call.without_parameters, replicas
        )  # fmt: skip
        return call.apply(normalized), call.pullback(normalized, pull)
    inputs = prepare(adapter, x, scale, bias, mask, options, keep=True)
    plan = inputs.plan
    # Resolved now: the name may no longer be bound when the pullback runs.
    replicas = replicas or _replicas(adapter, inputs, options)
    z, deviations, coefficients = _forward(adapter, inputs, options, replicas, keep_deviations=True)
    if deviations.values is inputs.x:  # the caller may change it in place
        deviations = deviations._replace(values=xp.astype(inputs.x, inputs.x.dtype, copy=True))
    activation = options.activation
    y = from_work(activate(z, activation, adapter), plan, inputs.result_dtype, xp)

    def pullback(dy: Array) -> Gradients:
        return adapter.run(
            _gradients, x, scale, bias, inputs, options, replicas, dy, z, deviations, coefficients
        )

    return y, pullback


def _gradients(
    adapter: "Adapter", x: Array, scale: Array, bias: Array, inputs: WorkInputs,
    options: CallOptions, replicas: Replicas | None, dy: Array, z: Array, deviations: Deviations,
    coefficients: Coefficients, *, overwrite: bool = False,
) -> Gradients:  # fmt: skip
    xp, plan = adapter.xp, inputs.plan
    dy = check_cotangent(
        adapter, dy, x, complex_result=adapter.is_complex(inputs.result_dtype)
    )  # fmt: skip
    dz = to_work(xp.astype(dy, inputs.cotangent_dtype, copy=False), plan, xp)
    if options.activation is not None:
        dz = dz * slope(z, options.activation, adapter)
    work = pull_back(
        dz,
        inputs.mask,
        inputs.scale,
        deviations,
        coefficients,
        plan,
        adapter,
        replicas,
        options.axis_index_groups,
        overwrite=overwrite,
    )
    dx = work.x
    if inputs.counted is not None:
        dx = xp.where(inputs.counted, dx, 0.0)
    floating = is_floating(x.dtype, adapter)
    return Gradients(
        from_work(dx, plan, x.dtype if floating else dx.dtype, xp),
        parameter_gradient(adapter, work.scale, scale),
        parameter_gradient(adapter, work.bias, bias),
    )


def group_statistics(
    adapter: "Adapter", x: Array, mask: Any, options: CallOptions
) -> GroupStatistics:
    """Return the statistics of the groups of x, in their public shape."""
    _check_local(adapter, x)
    inputs = prepare(adapter, x, None, None, mask, options)
    statistics, _, _ = _measure(adapter, inputs, options, _replicas(adapter, inputs, options))
    return to_value(statistics, inputs.plan, adapter)


def normalize_by(
    adapter: "Adapter",
    x: Array,
    statistics: GroupStatistics,
    scale: Array,
    bias: Array,
    mask: Any,
    options: CallOptions,
) -> Array:
    """Normalize x with given statistics."""
    _check_local(adapter, x)
    if is_per_sample(x, scale, bias, options):
        call = PerSample.of(adapter, x, scale, bias, mask, options)
        return call.apply(
            normalize_by(adapter, x, statistics, None, None, mask, call.without_parameters)
        )
    inputs = prepare(adapter, x, scale, bias, mask, options)
    plan = inputs.plan
    grouped = from_value(statistics, inputs.x, plan, adapter, options.epsilon)
    deviations = centre(inputs.x, inputs.mask, grouped, plan, adapter)
    coefficients = finish(grouped, deviations, adapter, options.epsilon, may_be_empty=True)
    if inputs.mask is not None:
        deviations = saturate(deviations, inputs.mask, coefficients, inputs.scale, plan, adapter)
    y = normalize(
        deviations,
        coefficients,
        inputs.scale,
        inputs.bias,
        plan,
        adapter,
        keep_deviations=adapter.has_autograd,
    )
    return from_work(y, plan, inputs.result_dtype, adapter.xp)


def _check_local(adapter: "Adapter", x: Array) -> None:
    if adapter.is_sharded(x):
        raise ArgumentTypeError(
            f"x is a {type(x).__name__} that is sharded over several devices by its type: only "
            "group_norm, layers and the library's own differentiation accept it. Pass one device's "
            "part and axis_name: x.to_local() of a DTensor, or what jax.shard_map passes."
        )


def _replicas(adapter: "Adapter", inputs: WorkInputs, options: CallOptions) -> Replicas | None:
    """Return the replicas to pool over, if any, and check that they can be pooled."""
    if options.axis_name is None:
        return None
    replicas = adapter.replicas(options.axis_name)
    return agree(inputs.plan.statistics_shape, inputs.x, replicas, options.axis_index_groups)


def _forward(
    adapter: "Adapter",
    inputs: WorkInputs,
    options: CallOptions,
    replicas: Replicas | None,
    *,
    keep_deviations: bool,
) -> tuple[Array, Deviations, Coefficients]:
    statistics, local, deviations = _measure(adapter, inputs, options, replicas)
    if replicas is not None and inputs.mask is not None:
        deviations = recentre(inputs.x, deviations, local, statistics, inputs.plan, adapter)
    coefficients = finish(
        statistics,
        deviations,
        adapter,
        options.epsilon,
        may_be_empty=inputs.mask is not None or inputs.plan.empty or replicas is not None,
    )
    if inputs.mask is not None:
        deviations = saturate(
            deviations, inputs.mask, coefficients, inputs.scale, inputs.plan, adapter
        )
    y = normalize(
        deviations,
        coefficients,
        inputs.scale,
        inputs.bias,
        inputs.plan,
        adapter,
        keep_deviations=keep_deviations or adapter.has_autograd or deviations.values is inputs.x,
    )
    return y, deviations, coefficients


def _measure(
    adapter: "Adapter", inputs: WorkInputs, options: CallOptions, replicas: Replicas | None
) -> tuple[GroupStatistics, GroupStatistics, Deviations]:
    """Return the statistics of all replicas, and of this one alone."""
    local, deviations = measure(inputs.x, inputs.mask, inputs.plan, adapter, options.epsilon)
    if replicas is None:
        return local, local, deviations
    merged = merge_replicas(local, adapter, options.epsilon, replicas, options.axis_index_groups)
    return merged, local, deviations
