"""A group norm for flax nnx."""

from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from groupnorm.carrying import (
    channels_of,
    check_class,
    parameters_of,
    shared_arguments,
    trained_as_one,
)
from groupnorm.errors import ArgumentValueError
from groupnorm.functional import group_norm

__all__ = ["GroupNorm", "arguments_of", "module_of"]


class GroupNorm(nnx.GroupNorm):
    """`flax.nnx.GroupNorm`, computed by this library.

    The arguments, defaults, parameters (``scale`` and ``bias``), names and dtypes are flax's, so
    that one replaces the other in a model and in a checkpoint. Results are accurate for a large
    mean, any `reduction_axes` are right, and padding may hold NaN.

    References
    ----------
    .. [1] https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/normalization.html

    Examples
    --------
    >>> from flax import nnx
    >>> from groupnorm.flax.nnx import GroupNorm
    >>> layer = GroupNorm(64, num_groups=32, rngs=nnx.Rngs(0))
    >>> sorted(nnx.state(layer, nnx.Param))
    ['bias', 'scale']
    """

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
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        if self.promote_dtype is not dtypes.promote_dtype:
            x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        return group_norm(
            x, scale, bias, mask=mask, num_groups=self.num_groups, epsilon=self.epsilon,
            dtype=self.dtype, reduction_axes=self.reduction_axes, axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups, use_fast_variance=self.use_fast_variance,
        )  # fmt: skip


def arguments_of(module: Any) -> dict[str, Any]:
    """Return the arguments of a layer equal to a `flax.nnx.GroupNorm`, and its parameters."""
    check_class(module, GroupNorm, nnx.GroupNorm, "__call__")
    if module.promote_dtype is not dtypes.promote_dtype:
        raise ArgumentValueError(
            f"layer has promote_dtype={module.promote_dtype!r}: only flax's own can be carried."
        )
    if type(module).__call__ is nnx.GroupNorm.__call__ and module.reduction_axes is not None:
        raise ArgumentValueError(
            f"layer has reduction_axes={module.reduction_axes!r}, for which flax computes "
            "statistics of other axes: use groupnorm.flax.nnx.GroupNorm."
        )
    stored = [p for p in (module.scale, module.bias) if p is not None]
    trained = [isinstance(p, nnx.Param) for p in stored]
    scale, bias = (None if p is None else p.get_value() for p in (module.scale, module.bias))
    return {
        "trainable": trained_as_one(trained, True, "scale and bias"),
        "in_size": (..., module.num_groups * module.group_size),
        "num_groups": module.num_groups,
        "scale": scale,
        "bias": bias,
        "backend": "jax",
        **shared_arguments(module),
    }


def options_of(layer: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module of flax for a layer with parameters of these values."""
    return {
        "param_dtype": next((value.dtype for value in values.values()), jax.numpy.float32),
        "num_groups": layer.num_groups,
        "use_scale": layer.use_scale,
        "use_bias": layer.use_bias,
        **shared_arguments(layer),
    }


def module_of(layer: Any) -> GroupNorm:
    """Return a module equal to a layer."""
    values = parameters_of(layer, "jax")
    options = options_of(layer, values)
    module = GroupNorm(channels_of(layer), rngs=nnx.Rngs(0), **options)
    for name, value in values.items():
        getattr(module, name).set_value(value)
    return module
