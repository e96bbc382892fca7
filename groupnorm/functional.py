"""The public functions: validate the arguments, find the adapter, dispatch the call."""

from collections.abc import Callable, Sequence
from typing import Any

from groupnorm.arguments import validate
from groupnorm.dispatch import adapter_of, compute, compute_with_pullback
from groupnorm.typing import ArrayT, AxisIndexGroups, DTypeLike, Gradients, MaskLike

__all__ = ["group_norm", "group_norm_vjp"]


def group_norm(
    x: ArrayT,
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
    axis_name: Any = None,
    axis_index_groups: AxisIndexGroups | None = None,
    use_fast_variance: bool = True,
    activation: str | None = None,
    implementation: str | None = None,
) -> ArrayT:
    r"""Normalize groups of channels to mean 0 and variance 1, then scale and shift every channel.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot scale + bias

    Mean and (biased) variance are computed per sample and group, without loss of accuracy for a
    large mean: float32 results are within 5e-6 for offsets up to 1e5.

    Parameters
    ----------
    x : array of shape (N, ..., C)
        An array of NumPy, JAX, PyTorch, CuPy, MLX or any other array API library. That library
        computes the result, on the array's device. Integers and booleans are converted to its
        default float.
    scale, bias : array of shape (C,) or (N, C), optional
        One value per channel, or a row for each sample, as in adaptive group norm, FiLM and the
        scale-shift of diffusion models. In place of C they may have the shape of the feature axes.
        NumPy arrays are accepted with every library.
    num_groups, group_size : int, optional
        The number of groups (default 32), or with ``num_groups=None`` the channels per group.
    feature_axis : int or sequence of int
        The axes of x that hold the channels. Several axes are flattened in row-major order, in
        x's order of axes; a group is a contiguous block of channels.
    reduction_axes : int or sequence of int, optional
        The axes of x to reduce over; must include every feature axis. Default is all but the
        leading axis; all of them if the leading axis is a feature axis or the only one.
    epsilon : float
        Added to the variance.
    dtype : str or dtype, optional
        The result's dtype; ``"input"`` keeps x's. Default is the dtype to which the library
        promotes x, scale and bias.
    mask : array broadcastable to x, optional
        True (or 1) for valid elements, which mean and variance are computed from. All elements are
        normalized; masked-out non-finite values are replaced by 0. A group without a valid element
        has mean 0 and variance 1. Lists and NumPy arrays must hold only 0 and 1; for arrays of
        other libraries a check would force a synchronization, so any nonzero value is valid.
    axis_name : optional
        The replicas to pool statistics over, if each holds a part of the same groups; each returns
        its slice of the result. In JAX the name of a mapped axis; elsewhere a name bound to a
        communicator by `groupnorm.bind_axis`, or the communicator itself: in PyTorch a
        `torch.distributed.ProcessGroup` or a one-dimensional `DeviceMesh`, in NumPy an
        `mpi4py.MPI.Intracomm`, in CuPy an NCCL communicator. A tuple pools over all its entries.
        A PyTorch `DTensor` needs no `axis_name`: its type describes its sharding.
    axis_index_groups : sequence of sequences of int, optional
        Splits the replicas into sets that share statistics, such as ``[[0, 1], [2, 3]]``.
    use_fast_variance : bool
        Compute the statistics in one pass, with deviations from the mean of a sample, or (False) in
        two passes, with deviations from the full mean. Both are equally accurate; False also
        handles data whose sample is not representative, such as one value 1e15 times the others.
    activation : {"relu", "silu", "gelu"}, optional
        Applied before the result is rounded to its dtype. ``"gelu"`` is the exact one.
    implementation : {"portable", "fused", "native"}, optional
        Default is the fastest available for each call: ``"fused"`` compiled kernels of the same
        accuracy, on CPUs for NumPy, PyTorch and JAX, on NVIDIA GPUs for PyTorch, CuPy and JAX
        (extra ``gpu``); otherwise the portable implementation. ``"native"`` is the
        library's own group normalization, with its accuracy (PyTorch only). An explicitly requested
        implementation that cannot compute the call raises; programs exported with `jax.export`
        always consist of portable operations. `groupnorm.available_backends` lists what is
        available.

    Returns
    -------
    array of x's shape
        Of the same library, on the same device.

    Raises
    ------
    groupnorm.errors.ArgumentValueError, groupnorm.errors.ArgumentTypeError
        Naming the argument, its value, the rule and the fix.
    groupnorm.errors.AxisNameError
        If `axis_name` is not bound at the call.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import group_norm
    >>> x = np.array([[1e5, 1e5 + 1, 5.0, 5.0]], dtype=np.float32)
    >>> group_norm(x, num_groups=2).round(3)
    array([[-1.,  1.,  0.,  0.]], dtype=float32)

    Scale and shift each sample by its own values:

    >>> x = np.array([[1.0, 3.0], [1.0, 3.0]])
    >>> shift = np.array([[0.0, 0.0], [5.0, 6.0]])
    >>> group_norm(x, bias=shift, num_groups=1).round(3)
    array([[-1.,  1.],
           [ 4.,  7.]])
    """
    options = validate(
        feature_axis=feature_axis,
        num_groups=num_groups,
        group_size=group_size,
        reduction_axes=reduction_axes,
        epsilon=epsilon,
        dtype=dtype,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=use_fast_variance,
        activation=activation,
        implementation=implementation,
    )
    y: ArrayT = compute(adapter_of(x), x, scale, bias, mask, options)
    return y


def group_norm_vjp(
    x: ArrayT,
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
    axis_name: Any = None,
    axis_index_groups: AxisIndexGroups | None = None,
    use_fast_variance: bool = True,
    activation: str | None = None,
    implementation: str | None = None,
) -> tuple[ArrayT, Callable[[ArrayT], Gradients]]:
    """Normalize and return the vector-Jacobian product, for libraries with and without autograd.

    The pullback uses the values of this call: `scale`, `bias` and `mask` may be changed in place
    afterwards, x may not, since no copy of it is kept. If x was changed, PyTorch's pullback raises;
    with NumPy and CuPy dx may be that of the new values. JAX's arrays cannot be changed.

    Parameters
    ----------
    x, scale, bias, num_groups, group_size, feature_axis, reduction_axes, epsilon, dtype, mask
        As in `group_norm`.
    axis_name, axis_index_groups, use_fast_variance, activation, implementation
        As in `group_norm`.

    Returns
    -------
    y : array of x's shape
        The result of `group_norm`.
    pullback : callable
        Takes a cotangent of y's shape and returns `groupnorm.typing.Gradients` with fields `x`,
        `scale` and `bias` (None if there is no such parameter), each in its argument's shape and
        dtype. With `axis_name` the parameter gradients are this replica's contribution; sum them
        over the replicas. Complex gradients are dL/dRe + i dL/dIm in every library.

    Raises
    ------
    groupnorm.errors.ArgumentValueError, groupnorm.errors.ArgumentTypeError
        As in `group_norm`; also by the pullback, if the cotangent does not have y's shape.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import group_norm_vjp
    >>> x = np.array([[1.0, 3.0]])
    >>> y, pullback = group_norm_vjp(x, num_groups=1, epsilon=3.0)
    >>> y
    array([[-0.5,  0.5]])
    >>> pullback(np.array([[0.0, 1.0]])).x
    array([[-0.1875,  0.1875]])
    """
    options = validate(
        feature_axis=feature_axis,
        num_groups=num_groups,
        group_size=group_size,
        reduction_axes=reduction_axes,
        epsilon=epsilon,
        dtype=dtype,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=use_fast_variance,
        activation=activation,
        implementation=implementation,
    )
    return compute_with_pullback(adapter_of(x), x, scale, bias, mask, options)
