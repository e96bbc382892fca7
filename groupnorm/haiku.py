"""A group norm for haiku."""

import functools
from collections.abc import Callable
from typing import Any

from groupnorm.carrying import channels_of, check_class, check_parameters, parameters_of, place_of
from groupnorm.errors import ArgumentValueError
from groupnorm.functional import group_norm
from groupnorm.imports import needs

with needs("haiku", "groupnorm.haiku", "dm-haiku"):
    import haiku
    import jax

__all__ = ["GroupNorm", "arguments_of", "module_of"]


class GroupNorm(haiku.GroupNorm):
    """`haiku.GroupNorm`, computed by this library.

    The arguments, defaults, parameters (``scale`` and ``offset``), names and dtypes are haiku's, so
    that one replaces the other in a model and in a checkpoint. Results are accurate for a large
    mean and in float16, and negative axes are counted from the end.

    References
    ----------
    .. [1] https://dm-haiku.readthedocs.io/en/latest/api.html#groupnorm

    Examples
    --------
    >>> import haiku, jax
    >>> from groupnorm.haiku import GroupNorm
    >>> model = haiku.without_apply_rng(haiku.transform(lambda x: GroupNorm(32)(x)))
    >>> parameters = model.init(jax.random.key(0), jax.numpy.ones((2, 5, 64)))
    >>> sorted(parameters["group_norm"])
    ['offset', 'scale']
    """

    def __call__(self, x: Any, scale: Any = None, offset: Any = None, *, mask: Any = None) -> Any:
        """Normalize x.

        Parameters
        ----------
        x : array of shape (N, ..., C), or (N, C, ...) by `data_format`
        scale, offset : array broadcastable to x, optional
            Only if the module does not create them.
        mask : array broadcastable to x, optional
            True for valid elements, which mean and variance are computed from.

        Returns
        -------
        array of x's shape
        """
        for name, value in (("scale", scale), ("offset", offset)):
            if value is not None and getattr(self, f"create_{name}"):
                raise ArgumentValueError(
                    f"{name} is passed in the call, and the module creates its own: construct it "
                    f"with create_{name}=False."
                )
        x = jax.numpy.asarray(x)
        feature = self.channel_index % x.ndim
        channels = x.shape[feature]
        shape = (channels,) if feature == x.ndim - 1 else (channels,) + (1,) * (x.ndim - 2)
        own_scale = own_offset = None
        if self.create_scale:
            own_scale = haiku.get_parameter("scale", shape, x.dtype, self.scale_init).ravel()
        if self.create_offset:
            own_offset = haiku.get_parameter("offset", shape, x.dtype, self.offset_init).ravel()
        axes = self.axis
        axes = tuple(range(x.ndim))[axes] if isinstance(axes, slice) else tuple(axes)
        axes = tuple(axis % x.ndim if -x.ndim <= axis < x.ndim else axis for axis in axes)
        # Without the channels' axis, nothing is shared between channels.
        groups = self.groups if feature in axes else channels
        y = group_norm(
            x, own_scale, own_offset, mask=mask, num_groups=groups, epsilon=self.eps,
            feature_axis=feature, reduction_axes=tuple({*axes, feature}),
        )  # fmt: skip
        y = y if scale is None else y * scale
        return y if offset is None else y + offset


def arguments_of(module: Any, params: Any = None) -> dict[str, Any]:
    """Return the arguments of a layer equal to a `haiku.GroupNorm`, and its parameters.

    `params` are those of the module, or of a model with this module alone.
    """
    if isinstance(module, functools.partial):
        made: list[Any] = []
        haiku.transform(lambda: made.append(module())).init(None)
        [module] = made
    check_class(module, GroupNorm, haiku.GroupNorm, "__call__")
    values = dict({} if params is None else params)
    values = dict(values.get(module.module_name, values))
    used = {name for name in ("scale", "offset") if getattr(module, f"create_{name}")}
    check_parameters(values, used, '{"scale": ..., "offset": ...}')
    last = module.channel_index == -1
    channels = next(iter(values.values())).size
    axes = module.axis
    if axes != slice(1, None) and not (module.rank and sorted(axes) == list(_all_axes(module))):
        raise ArgumentValueError(
            f"layer has axis={axes!r}: only slice(1, None), all but the batch, can be carried."
        )
    scale, offset = (None if v is None else v.ravel() for v in map(values.get, ("scale", "offset")))
    return {
        "in_size": (..., channels) if last else (channels, ...),
        "feature_axis": -1 if last else 0,
        "num_groups": module.groups,
        "epsilon": module.eps,
        "scale": scale,
        "bias": offset,
        "backend": "jax",
    }


def _all_axes(module: Any) -> "range | tuple[int, ...]":
    """Return the axes of grouped arrays that haiku has made of slice(1, None) in a call."""
    if module.channel_index == -1:
        return (*range(1, module.rank - 1), module.rank)
    return range(2, module.rank + 1)


def module_of(layer: Any) -> tuple[Callable[..., GroupNorm], dict[str, Any]]:
    """Return what makes a module equal to a layer, in a transformed function, and its parameters.

    In a model, the parameters are those of the name that the module has there.
    """
    first = place_of(layer) == 0
    make = functools.partial(
        GroupNorm, layer.num_groups, create_scale=layer.use_scale, create_offset=layer.use_bias,
        eps=layer.epsilon, data_format="channels_first" if first else "channels_last",
    )  # fmt: skip
    shape: tuple[int, ...] = (channels_of(layer),)
    if first:
        if ... in layer.in_size:
            raise ArgumentValueError(
                f"in_size={layer.in_size}: with channels first, the shape of haiku's parameters "
                "depends on the number of axes. Pass in_size with all of them, such as (C, H, W)."
            )
        shape += (1,) * (len(layer.in_size) - 1)
    names = {"scale": "scale", "bias": "offset"}
    values = parameters_of(layer, "jax").items()
    return make, {names[name]: value.reshape(shape) for name, value in values}
