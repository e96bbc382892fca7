"""Scale and bias with a row for each sample, (N, C): adaptive group norm, FiLM, scale-shift.

The statistics do not depend on the parameters, so x is normalized without any, in the precision of
the statistics, and then scaled and shifted. Kernels do both at once.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from groupnorm.arguments import CallOptions
from groupnorm.dtypes import dtype_name
from groupnorm.plan import same_shape
from groupnorm.portable.activations import activate, slope
from groupnorm.portable.blocked_sums import total, total_of_products
from groupnorm.portable.complex_parts import conj, real_part
from groupnorm.portable.inputs import (
    CheckedInputs,
    check,
    check_cotangent,
    parameter_gradient,
    plan_of,
    to_work,
)
from groupnorm.typing import Array, Gradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from groupnorm.adapter import Adapter
    from groupnorm.plan import Plan

__all__ = ["PerSample", "has_rows", "is_per_sample", "scale_and_shift"]


def is_per_sample(x: Array, scale: Any, bias: Any, options: CallOptions) -> bool:
    """Whether a parameter has an axis more than the features, and may so have one for the batch."""
    return (getattr(scale, "ndim", 1) > 1 and _has_batch_axis(scale, x, options)) or (
        getattr(bias, "ndim", 1) > 1 and _has_batch_axis(bias, x, options)
    )


def _has_batch_axis(parameter: Array, x: Array, options: CallOptions) -> bool:
    ndim, features = parameter.ndim, len(options.feature)
    if ndim != 2 or features == 1:
        return bool(ndim == 1 + features)
    if features > 2:
        return True  # (N, C)
    axes = {a % max(x.ndim, 1) for a in options.feature}
    of_features = tuple(n for a, n in enumerate(x.shape) if a in axes)
    return not same_shape(tuple(parameter.shape), of_features)


class PerSample(NamedTuple):
    """A call with parameters for each sample, checked."""

    adapter: "Adapter"
    x: Array  # as given
    checked: CheckedInputs
    options: CallOptions

    @classmethod
    def of(
        cls, adapter: "Adapter", x: Array, scale: Any, bias: Any, mask: Any, options: CallOptions
    ) -> "PerSample":
        """Check the arguments.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            Naming the argument, its value, the rule and the fix.
        """
        checked = check(adapter, x, scale, bias, mask, options)
        return cls(adapter, x, checked, options)

    @property
    def without_parameters(self) -> CallOptions:
        """The options with which x is normalized first."""
        dtype = None
        if self.options.implementation != "native":  # which keeps x's dtype
            dtype = dtype_name("dtype", self.checked.work_dtype)
        return self.options._replace(dtype=dtype, activation=None)

    def apply(self, normalized: Array) -> Array:
        """Return the result for the normalized x."""
        checked = self.checked
        return scale_and_shift(
            self.adapter, normalized, checked.scale, checked.bias, checked, self.options
        )

    def pullback(
        self, normalized: Array, of_normalization: "Callable[[Array], Gradients]"
    ) -> "Callable[[Array], Gradients]":
        """Return the pullback of `apply` and of the normalization before it."""
        adapter, checked, x = self.adapter, self.checked, self.x
        xp, activation = adapter.xp, self.options.activation
        # Copies: the caller may change his in place.
        scale, bias = (
            _along(p, checked, xp, copy=True) for p in (checked.scale, checked.bias)
        )  # fmt: skip
        # For each sample and channel, a sum over all else.
        sums = plan_of(
            adapter, tuple(x.shape), True,
            self.options._replace(num_groups=None, group_size=1, reduction=None),
        )  # fmt: skip

        def pull(dy: Array) -> Gradients:
            dy = check_cotangent(
                adapter, dy, x, complex_result=adapter.is_complex(checked.result_dtype)
            )
            dz = xp.astype(dy, checked.parameter_dtype, copy=False)
            if activation is not None:
                dz = dz * slope(_scaled(normalized, scale, bias), activation, adapter)
            through = dz if scale is None else dz * conj(scale, adapter)
            if not adapter.is_complex(normalized.dtype):
                through = real_part(through, adapter)
            dx = of_normalization(through).x
            work = to_work(dz, sums, xp)
            dscale = dbias = None
            if scale is not None:
                values = to_work(conj(normalized, adapter), sums, xp)
                dscale = self._gradient(
                    total_of_products(work, values, sums.positions, sums, adapter), checked.scale
                )
            if bias is not None:
                dbias = self._gradient(total(work, sums.positions, sums, adapter), checked.bias)
            return Gradients(dx, dscale, dbias)

        return pull

    def _gradient(self, of_samples: Array, parameter: Array) -> Array:
        """Return a gradient for a parameter that may be the same for all samples."""
        plan = self.checked.plan
        flat = self.adapter.xp.reshape(of_samples, (plan.shape[0], plan.channels))
        if not has_rows(parameter, plan):
            flat = self.adapter.xp.sum(flat, axis=0)
        return parameter_gradient(self.adapter, flat, parameter)


def scale_and_shift(
    adapter: "Adapter",
    normalized: Array,
    scale: Array,
    bias: Array,
    checked: CheckedInputs,
    options: CallOptions,
) -> Array:
    """Apply the parameters, and the activation, to the normalized x."""
    scale, bias = (_along(p, checked, adapter.xp) for p in (scale, bias))
    y = activate(_scaled(normalized, scale, bias), options.activation, adapter)
    return adapter.xp.astype(y, checked.result_dtype, copy=False)


def _scaled(normalized: Array, scale: Array, bias: Array) -> Array:
    y = normalized if scale is None else normalized * scale
    return y if bias is None else y + bias


def has_rows(parameter: Array, plan: "Plan") -> bool:
    """Whether a checked parameter has a row for each sample."""
    shape = tuple(parameter.shape)
    return len(shape) > 1 and not same_shape(shape, plan.feature_shape)


def _along(parameter: Array, checked: CheckedInputs, xp: Any, *, copy: bool = False) -> Array:
    """Return a parameter in a shape that broadcasts to x, in the precision of the result."""
    if parameter is None:
        return None
    plan = checked.plan
    varies = plan.feature_axes | ({0} if has_rows(parameter, plan) else set())
    shape = (n if a in varies else 1 for a, n in enumerate(plan.shape))
    parameter = xp.astype(parameter, checked.parameter_dtype, copy=copy)
    return xp.reshape(parameter, tuple(shape))
