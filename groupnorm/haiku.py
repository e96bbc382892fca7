"""A group norm for haiku."""

from typing import Any

from groupnorm.errors import ArgumentValueError, needs
from groupnorm.functional import group_norm

with needs("haiku", "groupnorm.haiku", "dm-haiku"):
    import haiku

__all__ = ["GroupNorm"]


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
