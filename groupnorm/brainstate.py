"""A group norm for brainstate."""

from collections.abc import Sequence
from typing import Any

from groupnorm.carrying import check_class, parameters_of, shared_arguments
from groupnorm.errors import ArgumentValueError
from groupnorm.functional import group_norm
from groupnorm.imports import needs
from groupnorm.initializers import ones, zeros
from groupnorm.layer import GroupNorm as Layer
from groupnorm.typing import AxisIndexGroups, DTypeLike

with needs("brainstate", "groupnorm.brainstate"):
    import brainstate
    import jax

__all__ = ["GroupNorm", "arguments_of", "module_of"]

_STATE = type(brainstate.nn.GroupNorm((1,), num_groups=1).weight)


class GroupNorm(brainstate.nn.GroupNorm):
    """`brainstate.nn.GroupNorm`, computed by this library.

    The arguments, defaults, parameters (one state ``weight`` with a dict of ``scale`` and ``bias``)
    and dtypes are brainstate's, so that one replaces the other in a model. Results are accurate for
    a large mean; `in_size` with several axes, any `feature_axis` and any `reduction_axes` work.

    References
    ----------
    .. [1] https://github.com/chaobrain/brainstate

    Examples
    --------
    >>> import brainstate
    >>> from groupnorm.brainstate import GroupNorm
    >>> layer = GroupNorm((28, 28, 64), num_groups=32)
    >>> sorted(layer.weight.value)
    ['bias', 'scale']
    """

    def __init__(
        self,
        in_size: Any,
        feature_axis: int | Sequence[int] = -1,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike = None,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Any = zeros,
        scale_init: Any = ones,
        reduction_axes: int | Sequence[int] | None = None,
        axis_name: Any = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        param_type: Any = _STATE,
    ) -> None:
        brainstate.nn.Module.__init__(self)
        # Checks the arguments, and makes the initial values.
        layer = Layer(
            in_size, feature_axis, num_groups, group_size, epsilon=epsilon, dtype=dtype,
            use_bias=use_bias, use_scale=use_scale, bias_init=bias_init, scale_init=scale_init,
            reduction_axes=reduction_axes, axis_name=axis_name,
            axis_index_groups=axis_index_groups, use_fast_variance=use_fast_variance, backend="jax",
            param_dtype=brainstate.environ.dftype(),
        )  # fmt: skip
        values = {name: getattr(layer, name) for name in ("scale", "bias")}
        given = {name: value for name, value in values.items() if value is not None}
        self.weight = param_type(given) if given else None
        self.in_size = self.out_size = in_size
        size, axes = layer.in_size, layer.feature_axis
        axes = axes if isinstance(axes, tuple) else (axes,)
        self.feature_axes = tuple(axis % len(size) for axis in axes)
        self._feature = layer._options.feature
        self.num_groups, self.group_size = layer.num_groups, layer.group_size
        self.epsilon, self.dtype = epsilon, dtype
        self.use_bias, self.use_scale = use_bias, use_scale
        self.bias_init, self.scale_init = bias_init, scale_init
        self.reduction_axes, self.use_fast_variance = reduction_axes, use_fast_variance
        self.axis_name, self.axis_index_groups = axis_name, axis_index_groups

    def update(self, x: Any, *, mask: Any = None) -> Any:
        """Normalize x; the same as calling the layer.

        Parameters
        ----------
        x : array of shape (N, ..., C)
        mask : array broadcastable to x, optional
            True for valid elements, which mean and variance are computed from.

        Returns
        -------
        array of x's shape
        """
        values = {} if self.weight is None else self.weight.value
        # From the attributes, which may have been set.
        return group_norm(
            jax.numpy.asarray(x), values.get("scale"), values.get("bias"), mask=mask,
            num_groups=self.num_groups, feature_axis=self._feature, epsilon=self.epsilon,
            dtype=self.dtype, reduction_axes=self.reduction_axes, axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups, use_fast_variance=self.use_fast_variance,
        )  # fmt: skip


_OPTIONS = ("in_size", "num_groups", "use_bias", "use_scale")


def arguments_of(module: Any) -> dict[str, Any]:
    """Return the arguments of a layer equal to a `brainstate.nn.GroupNorm`, and its parameters."""
    check_class(module, GroupNorm, brainstate.nn.GroupNorm, "update")
    values = {} if module.weight is None else module.weight.value
    own = type(module).update is GroupNorm.update
    if not own and module.reduction_axes is not None:
        raise ArgumentValueError(
            f"layer has reduction_axes={module.reduction_axes!r}, for which brainstate computes "
            "other statistics than those of these axes: use groupnorm.brainstate.GroupNorm."
        )
    return {
        **{name: getattr(module, name) for name in _OPTIONS},
        **shared_arguments(module),
        "feature_axis": tuple(module.feature_axes) if own else -1,
        "trainable": module.weight is None or isinstance(module.weight, brainstate.ParamState),
        "scale": values.get("scale"),
        "bias": values.get("bias"),
        "backend": "jax",
    }


def module_of(layer: Any) -> GroupNorm:
    """Return a module equal to a layer."""
    options = {name: getattr(layer, name) for name in _OPTIONS}
    module = GroupNorm(feature_axis=layer.feature_axis, **options, **shared_arguments(layer))
    if module.weight is not None:
        shape = layer._config.feature_shape
        values = parameters_of(layer, "jax")
        module.weight.value = {name: value.reshape(shape) for name, value in values.items()}
    return module
