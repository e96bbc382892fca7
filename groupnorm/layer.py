"""`GroupNorm`, and the plain object most backends make of it."""

from typing import TYPE_CHECKING, Any, Literal, Self, overload

from groupnorm.base import Layer
from groupnorm.dispatch import adapter_named
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.settings import Settings
from groupnorm.typing import Array

if TYPE_CHECKING:
    from groupnorm.backends.cupy import CupyGroupNorm
    from groupnorm.backends.jax import JaxGroupNorm
    from groupnorm.backends.numpy import NumpyGroupNorm
    from groupnorm.backends.torch import TorchGroupNorm

__all__ = ["GroupNorm", "PlainGroupNorm"]


class GroupNorm(Layer):
    r"""Group normalization over the channels of an array, in the framework of your choice.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot scale + bias

    The channels are split into groups of neighbours; mean and (biased) variance are those of each
    group of each sample, over all other axes. They do not depend on the rest of the batch.

    Parameters
    ----------
    in_size : int or sequence of int
        The input's shape without the batch, such as ``(28, 28, 64)``; the channels alone, ``64``,
        will do. One ``...`` stands for any number of axes: ``(64, ...)`` with ``feature_axis=0``
        has the channels on axis 1, as PyTorch does. Lengths that are not features are not enforced.
    feature_axis : int or sequence of int
        The indices into `in_size` that hold the channels, by default the last. Of several, the
        channels are the row-major product in `in_size`'s order.
    num_groups, group_size : int, optional
        The number of groups (default 32), or with ``num_groups=None`` the channels in each.
    epsilon : float
        Added to the variance. Default is 1e-6; PyTorch's is 1e-5.
    dtype : str or dtype, optional
        The result's; ``"input"`` keeps x's. Default is what the library promotes x and the
        parameters to: bfloat16 x with float32 parameters gives float32.
    use_bias, use_scale : bool
        Whether there is a bias (beta), and a scale (gamma).
    bias_init, scale_init : callable
        Take ``(shape, dtype)``, or what your framework passes; see `groupnorm.initializers`.
    reduction_axes : int or sequence of int, optional
        The axes of x statistics are taken over, every feature axis among them. Default is all but
        the leading axis (all, if that is a feature axis or the only one).
    axis_name, axis_index_groups : optional
        Replicas that hold parts of the same groups, and how to split them into sets; see
        `groupnorm.group_norm`.
    use_fast_variance : bool
        Read the data once for its statistics (the default), or twice. Both keep all digits.
    param_type : optional
        What holds a parameter, such as `flax.nnx.Param` or `brainstate.ParamState`. Default is a
        plain array, in PyTorch `torch.nn.Parameter`.
    param_dtype : str or dtype, optional
        Default is float32.
    backend : {"numpy", "jax", "torch", "cupy"}
        Where the parameters live, and what kind of object the layer is: a plain object, a pytree
        (jax) or a `torch.nn.Module`. A NumPy layer serves arrays of every library.
    device : optional
        Where the parameters live within the backend.
    activation : {"relu", "silu", "gelu"}, optional
        Applied to the result.
    implementation : {"portable", "fused", "native"}, optional
        Default is the fastest there is for each call; see `groupnorm.group_norm`.

    Attributes
    ----------
    scale, bias : array of shape (C,) or None
        Or of the shape of the feature axes.

    Raises
    ------
    groupnorm.errors.ArgumentValueError, groupnorm.errors.ArgumentTypeError
        Naming the argument, its value, the rule and the fix.
    groupnorm.errors.BackendImportError
        If the backend's library cannot be imported.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import GroupNorm
    >>> layer = GroupNorm((5, 5, 6), num_groups=3)
    >>> x = 1e4 + np.random.default_rng(0).normal(size=(2, 5, 5, 6)).astype(np.float32)
    >>> y = layer(x)
    >>> y.shape, y.dtype
    ((2, 5, 5, 6), dtype('float32'))
    >>> bool(abs(y.mean()) < 1e-6)
    True
    """

    @overload
    def __new__(
        cls, *args: Any, backend: Literal["numpy"] = ..., **kwargs: Any
    ) -> "NumpyGroupNorm": ...
    @overload
    def __new__(cls, *args: Any, backend: Literal["jax"], **kwargs: Any) -> "JaxGroupNorm": ...
    @overload
    def __new__(cls, *args: Any, backend: Literal["torch"], **kwargs: Any) -> "TorchGroupNorm": ...
    @overload
    def __new__(cls, *args: Any, backend: Literal["cupy"], **kwargs: Any) -> "CupyGroupNorm": ...
    @overload
    def __new__(cls, *args: Any, backend: str, **kwargs: Any) -> Self: ...
    def __new__(cls, *args: Any, backend: Any = "numpy", **kwargs: Any) -> Any:
        """Pick the backend's own class, as `pathlib.Path` picks the platform's."""
        if cls is not GroupNorm:  # also how copies and pickles come here, without arguments
            if not hasattr(cls, "_adapter_name"):
                raise ArgumentTypeError(
                    f"{cls.__name__} derives from GroupNorm, which only picks a backend's class: "
                    "derive from that one, such as groupnorm.backends.torch.TorchGroupNorm."
                )
            return object.__new__(cls)
        if not isinstance(backend, str):
            raise ArgumentTypeError(
                f"backend={backend!r} is of type {type(backend).__name__}: give the name of "
                "one, such as 'numpy' or 'torch'."
            )
        return object.__new__(adapter_named(backend).layer_class())


class PlainGroupNorm(GroupNorm):
    """A layer that is a plain object with two arrays."""

    _scale: Any
    _bias: Any

    def _setup(self, settings: Settings, scale: Array | None, bias: Array | None) -> None:
        self._settings = settings
        hold = self._adapter.hold
        self._scale = None if scale is None else hold(scale, settings.param_type)
        self._bias = None if bias is None else hold(bias, settings.param_type)

    @property
    def scale(self) -> Array | None:
        """The factor of every channel; assign an array of the same shape to change it."""
        return self._read(self._scale)

    @scale.setter
    def scale(self, value: Array) -> None:
        self._scale = self._replacement("scale", value, self._settings.use_scale)

    @property
    def bias(self) -> Array | None:
        """What is added to every channel; assign an array of the same shape to change it."""
        return self._read(self._bias)

    @bias.setter
    def bias(self, value: Array) -> None:
        self._bias = self._replacement("bias", value, self._settings.use_bias)

    def _read(self, stored: Any) -> Array | None:
        # Without a param_type what is stored is meant, even a placeholder some tree has put there.
        plain = stored is None or self._settings.param_type is None
        return stored if plain else self._adapter.read(stored)

    def _replacement(self, name: str, value: Array, used: bool) -> Any:
        if not used:
            raise ArgumentValueError(
                f"{name} cannot be set: the layer was made with use_{name}=False. Make one with "
                f"use_{name}=True."
            )
        adapter, shape = self._adapter, self._settings.feature_shape
        if not adapter.is_array(value):
            raise ArgumentTypeError(
                f"{name} is of type {type(value).__name__}: this layer's parameters are of "
                f"{adapter.array_name}. Convert it, or use to_backend."
            )
        if tuple(value.shape) != shape:
            raise ArgumentValueError(
                f"{name} has shape {tuple(value.shape)}: this layer's parameters have "
                f"shape {shape}. Reshape it."
            )
        return adapter.hold(value, self._settings.param_type)
