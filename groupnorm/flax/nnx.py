"""A group norm for flax nnx."""

from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes

from groupnorm.functional import group_norm

__all__ = ["GroupNorm"]


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
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        if self.promote_dtype is not dtypes.promote_dtype:
            x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        return group_norm(
            x, scale, bias, mask=mask, num_groups=self.num_groups, epsilon=self.epsilon,
            dtype=self.dtype, reduction_axes=self.reduction_axes, axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups, use_fast_variance=self.use_fast_variance,
        )  # fmt: skip
