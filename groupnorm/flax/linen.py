"""A group norm for flax linen."""

from typing import Any

import jax
from flax import linen

from groupnorm.carrying import check_class, check_parameters, parameters_of, shared_arguments
from groupnorm.errors import ArgumentValueError
from groupnorm.flax.nnx import options_of
from groupnorm.functional import group_norm

__all__ = ["GroupNorm", "arguments_of", "module_of"]


class GroupNorm(linen.GroupNorm):
    """`flax.linen.GroupNorm`, computed by this library.

    The arguments, defaults, parameters (``scale`` and ``bias``), names and dtypes are flax's, so
    that one replaces the other in a model and in a checkpoint. Results are accurate for a large
    mean, and padding may hold NaN. Statistics are in float32 at least, whatever
    `force_float32_reductions` says.

    References
    ----------
    .. [1] https://flax.readthedocs.io/en/latest/api_reference/flax.linen/layers.html

    Examples
    --------
    >>> import jax
    >>> from groupnorm.flax.linen import GroupNorm
    >>> variables = GroupNorm(num_groups=32).init(jax.random.key(0), jax.numpy.ones((2, 5, 64)))
    >>> sorted(variables["params"])
    ['bias', 'scale']
    """

    @linen.compact
    def __call__(self, x: Any, *, mask: Any = None) -> Any:
        """Normalize x.

        Parameters
        ----------
        x : array of shape (N, ..., C)
        mask : array broadcastable to x, optional
            True for valid elements, which mean and variance are computed from.

        Returns
        -------
        array of x's shape
        """
        x = jax.numpy.asarray(x)
        shape, dtype = (x.shape[-1],), self.param_dtype
        scale = self.param("scale", self.scale_init, shape, dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, dtype) if self.use_bias else None
        # Parameters are initialized outside of the maps that have the axis.
        initializing = self.is_initializing()
        axis_name = None if initializing else self.axis_name
        index_groups = None if initializing else self.axis_index_groups
        return group_norm(
            x, scale, bias, mask=mask, num_groups=self.num_groups, group_size=self.group_size,
            epsilon=self.epsilon, dtype=self.dtype, reduction_axes=self.reduction_axes,
            axis_name=axis_name, axis_index_groups=index_groups,
            use_fast_variance=self.use_fast_variance,
        )  # fmt: skip


def arguments_of(module: Any, params: Any = None) -> dict[str, Any]:
    """Return the arguments of a layer equal to a `flax.linen.GroupNorm`, and its parameters.

    `params` are its variables, or the collection ``"params"`` of them.
    """
    check_class(module, GroupNorm, linen.GroupNorm, "__call__")
    if not isinstance(module, GroupNorm) and not module.force_float32_reductions:
        raise ArgumentValueError(
            "layer has force_float32_reductions=False, and every layer here sums in float32 at "
            "least: use groupnorm.flax.linen.GroupNorm."
        )
    values = dict({} if params is None else params)
    values = {name: linen.unbox(v) for name, v in dict(values.get("params", values)).items()}
    used = {name for name in ("scale", "bias") if getattr(module, f"use_{name}")}
    check_parameters(values, used, '{"params": {"scale": ..., "bias": ...}}')
    channels = next(iter(values.values())).shape[0]
    return {
        "in_size": (..., channels),
        "num_groups": module.num_groups,
        "group_size": module.group_size,
        "scale": values.get("scale"),
        "bias": values.get("bias"),
        "backend": "jax",
        **shared_arguments(module),
    }


def module_of(layer: Any) -> tuple[GroupNorm, dict[str, Any]]:
    """Return a module equal to a layer, and its variables."""
    values = parameters_of(layer, "jax")
    module: GroupNorm = GroupNorm(**options_of(layer, values))
    return module, {"params": values} if values else {}
