"""The public functions: check the arguments, find the adapter, delegate."""

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

    Mean and (biased) variance are those of each group of each sample. They keep their digits
    whatever the mean: float32 results are within 5e-6 for offsets up to 1e5.

    Parameters
    ----------
    x : array of shape (N, ..., C)
        Of NumPy, JAX, PyTorch, CuPy or any array API library, which also computes it, on the
        array's device. Integers and booleans are computed in the library's default float.
    scale, bias : array of shape (C,), optional
        Or of the shape of the feature axes. NumPy arrays serve every library.
    num_groups, group_size : int, optional
        The number of groups (default 32), or with ``num_groups=None`` the channels in each.
    feature_axis : int or sequence of int
        The axes of x that hold the channels. Of several, the channels are the row-major product in
        x's order; a group is a contiguous block of them.
    reduction_axes : int or sequence of int, optional
        The axes of x that share statistics, every feature axis among them. Default is all but the
        leading axis; all of them if the leading axis is a feature axis or the only one.
    epsilon : float
        Added to the variance.
    dtype : str or dtype, optional
        The result's; ``"input"`` keeps x's. Default is what the library promotes x, scale and bias
        to.
    mask : array broadcastable to x, optional
        True (or 1) where elements count for mean and variance. All are normalized; non-finite
        values that do not count are taken as 0. A group without any that counts has mean 0 and
        variance 1. Of lists and NumPy arrays other values than 0 and 1 are refused; looking would
        make other libraries wait, so there anything but 0 counts.
    axis_name : optional
        Replicas that hold parts of the same groups; every part gets the slice of the whole's
        result. In JAX the name of a mapped axis. Else a name given to a communicator by
        `groupnorm.bind_axis`, or the communicator itself: in PyTorch a
        `torch.distributed.ProcessGroup` or a `DeviceMesh` of one dimension, in NumPy an
        `mpi4py.MPI.Intracomm`, in CuPy a communicator of NCCL. A tuple of them pools over all. A
        PyTorch `DTensor` needs none: it says itself how it is split.
    axis_index_groups : sequence of sequences of int, optional
        Splits the replicas into sets that share statistics, such as ``[[0, 1], [2, 3]]``.
    use_fast_variance : bool
        Read the data once for its statistics, around the mean of a sample, or (False) twice, around
        the mean of all. Both keep all digits; False also survives data that a sample misleads, such
        as a single value 1e15 times the others.
    activation : {"relu", "silu", "gelu"}, optional
        Applied to the result, before it is rounded to its dtype. ``"gelu"`` is the exact one.
    implementation : {"portable", "fused", "native"}, optional
        Default is the fastest there is for each call: ``"fused"`` are compiled kernels, which keep
        the accuracy, on CPUs for NumPy, PyTorch and JAX (the extra ``cpu``), on NVIDIA's GPUs for
        PyTorch, CuPy and JAX (the extra ``gpu``); else the portable one. ``"native"`` is the
        library's own, of its accuracy (PyTorch alone has one). One that was asked for and cannot
        compute the call raises; programs that `jax.export` makes are of portable operations all
        the same. `groupnorm.available_backends` says which are here.

    Returns
    -------
    array of x's shape
        Of the same library, on the same device.

    Raises
    ------
    groupnorm.errors.ArgumentValueError, groupnorm.errors.ArgumentTypeError
        Naming the argument, its value, the rule and the fix.
    groupnorm.errors.AxisNameError
        If `axis_name` is not bound where this is called.

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
    """Normalize, and return what pulls a cotangent back, for libraries with and without autograd.

    Parameters
    ----------
    x, scale, bias, num_groups, group_size, feature_axis, reduction_axes, epsilon, dtype, mask
        As of `group_norm`.
    axis_name, axis_index_groups, use_fast_variance, activation, implementation
        As of `group_norm`.

    Returns
    -------
    y : array of x's shape
        What `group_norm` returns.
    pullback : callable
        Takes a cotangent of y's shape, returns `groupnorm.typing.Gradients` with fields `x`,
        `scale` and `bias` (None where there is no parameter), each in its argument's shape and
        dtype. With `axis_name` the parameters' gradients are this replica's share: their sum is the
        gradient. Complex gradients are dL/dRe + i dL/dIm, in every library.

    Raises
    ------
    groupnorm.errors.ArgumentValueError, groupnorm.errors.ArgumentTypeError
        As `group_norm`; the pullback also if the cotangent's shape is not y's.

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
