"""Normalize data in parts: compute the statistics of each, merge them, normalize each part."""

from collections.abc import Sequence
from typing import Any

from groupnorm.arguments import validate
from groupnorm.dispatch import adapter_of
from groupnorm.errors import ArgumentValueError
from groupnorm.portable import group_norm as portable
from groupnorm.portable.merge import GroupStatistics
from groupnorm.portable.public_statistics import check_statistics, merge_values
from groupnorm.typing import ArrayT, AxisIndexGroups, DTypeLike, MaskLike

__all__ = ["group_statistics", "merge_statistics", "normalize"]


def group_statistics(
    x: Any,
    *,
    num_groups: int | None = 32,
    group_size: int | None = None,
    feature_axis: int | Sequence[int] = -1,
    reduction_axes: int | Sequence[int] | None = None,
    mask: MaskLike = None,
    axis_name: Any = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> GroupStatistics:
    """Compute count, mean and variance of every group, to be merged with those of other parts.

    Together with `merge_statistics` and `normalize` it normalizes data that does not fit into
    memory: process the tiles of an image once to compute statistics and once to normalize, and the
    result is that of the whole image. `group_norm` uses the same steps, with the same accuracy.

    Parameters
    ----------
    x : array of shape (N, ..., C)
        One part of the data. It may be empty.
    num_groups, group_size, feature_axis, reduction_axes, mask
        As in `group_norm`.
    axis_name, axis_index_groups
        As in `group_norm`: the statistics are pooled over all replicas.

    Returns
    -------
    GroupStatistics
        Arrays with the axes of x that are not reduced, followed by the groups: by default
        (N, num_groups), for every layout. Their dtype is at least float32.

    Raises
    ------
    groupnorm.errors.ArgumentValueError, groupnorm.errors.ArgumentTypeError
        Naming the argument, its value, the rule and the fix.
    groupnorm.errors.AxisNameError
        If `axis_name` is not bound at the call.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for computing the sample
       variance", The American Statistician 37 (1983), 242-247.

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import group_norm, group_statistics, merge_statistics, normalize
    >>> image = np.random.default_rng(0).normal(1e4, 1, size=(1, 50, 40, 8)).astype(np.float32)
    >>> tiles = [image[:, :30], image[:, 30:]]
    >>> whole = merge_statistics(*(group_statistics(tile, num_groups=2) for tile in tiles))
    >>> whole.count
    array([[8000., 8000.]], dtype=float32)
    >>> y = np.concatenate([normalize(tile, whole, num_groups=2) for tile in tiles], axis=1)
    >>> bool(abs(y - group_norm(image, num_groups=2)).max() < 5e-6)
    True
    """
    options = validate(
        feature_axis=feature_axis,
        num_groups=num_groups,
        group_size=group_size,
        reduction_axes=reduction_axes,
        # epsilon is not known yet: use 0.
        epsilon=0.0,
        dtype=None,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=False,
    )
    return adapter_of(x).run(portable.group_statistics, x, mask, options)


def merge_statistics(*statistics: GroupStatistics) -> GroupStatistics:
    """Merge the statistics of several parts into those of all the data.

    Parameters
    ----------
    *statistics : GroupStatistics
        At least one, all of the same groups. Their order only affects rounding. Statistics of an
        empty part have no effect.

    Returns
    -------
    GroupStatistics

    Raises
    ------
    groupnorm.errors.ArgumentValueError, groupnorm.errors.ArgumentTypeError
        If there are none, or if their groups or libraries differ.

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import group_statistics, merge_statistics
    >>> a = group_statistics(np.array([[1.0, 1.0]]), num_groups=1)
    >>> b = group_statistics(np.array([[4.0, 4.0]]), num_groups=1)
    >>> merge_statistics(a, b).mean, merge_statistics(a, b).variance
    (array([[2.5]]), array([[2.25]]))
    """
    if not statistics:
        raise ArgumentValueError(
            "merge_statistics() received nothing to merge: pass at least one GroupStatistics, as "
            "in merge_statistics(*parts)."
        )
    for i, part in enumerate(statistics):
        check_statistics(f"statistics[{i}]", part)
    return adapter_of(statistics[0].mean, "statistics[0].mean").run(merge_values, statistics)


def normalize(
    x: ArrayT,
    statistics: GroupStatistics,
    scale: Any = None,
    bias: Any = None,
    *,
    num_groups: int | None = 32,
    group_size: int | None = None,
    feature_axis: int | Sequence[int] = -1,
    reduction_axes: int | Sequence[int] | None = None,
    epsilon: float = 1e-6,
    dtype: DTypeLike = None,
    mask: MaskLike = None,
) -> ArrayT:
    r"""Normalize an array with given statistics, computed from it and other parts.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot scale + bias

    Parameters
    ----------
    x : array of shape (N, ..., C)
        One part of the data.
    statistics : GroupStatistics
        Of all parts, from `merge_statistics`; or constructed from count, mean and m2.
    scale, bias, num_groups, group_size, feature_axis, reduction_axes, epsilon, dtype
        As in `group_norm`; scale and bias may have a row for each sample.
    mask : array broadcastable to x, optional
        As passed to `group_statistics`: masked-out non-finite values are replaced by 0.

    Returns
    -------
    array of x's shape
        In the same library, on the same device. In JAX and PyTorch it is differentiable, also
        with respect to the statistics.

    Raises
    ------
    groupnorm.errors.ArgumentValueError, groupnorm.errors.ArgumentTypeError
        If the groups of the statistics are not x's, and as in `group_norm`.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import GroupStatistics, normalize
    >>> known = GroupStatistics(count=4, mean=np.array([[10.0]]), m2=np.array([[16.0]]))
    >>> normalize(np.array([[10.0, 14.0]]), known, num_groups=1, epsilon=0)
    array([[0., 2.]])
    """
    options = validate(
        feature_axis=feature_axis,
        num_groups=num_groups,
        group_size=group_size,
        reduction_axes=reduction_axes,
        epsilon=epsilon,
        dtype=dtype,
        axis_name=None,
        axis_index_groups=None,
        use_fast_variance=False,
    )
    y: ArrayT = adapter_of(x).run(portable.normalize_by, x, statistics, scale, bias, mask, options)
    return y
