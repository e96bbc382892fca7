"""The layer: its arguments, what it stores, and how it turns into another framework's layer."""

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, overload

import numpy as np

from groupnorm.core import apply, apply_with_pullback
from groupnorm.dispatch import adapter_named, adapter_of
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.initializers import initial_value, ones, zeros
from groupnorm.options import Options, check_in_size, dtype_name, flag, make_options
from groupnorm.plan import resolve_groups
from groupnorm.typing import (
    Array,
    ArrayT,
    AxisIndexGroups,
    BackendName,
    DTypeLike,
    Gradients,
    Initializer,
    MaskLike,
)

if TYPE_CHECKING:
    from groupnorm.backends import Adapter
    from groupnorm.backends.cupy import CupyGroupNorm
    from groupnorm.backends.jax import JaxGroupNorm
    from groupnorm.backends.numpy import NumpyGroupNorm
    from groupnorm.backends.torch import TorchGroupNorm

__all__ = ["GroupNorm", "Layer", "PlainGroupNorm", "Settings"]


class Settings(NamedTuple):
    """All a layer is but its parameters: hashable, so that equal layers share compiled programs."""

    in_size: "tuple[int | EllipsisType, ...]"
    feature_axis: int | tuple[int, ...]
    num_groups: int
    group_size: int
    options: Options
    use_bias: bool
    use_scale: bool
    bias_init: Initializer
    scale_init: Initializer
    param_type: Any
    param_dtype: str

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The lengths of the feature axes."""
        return self.options.feature_shape or ()

    @property
    def as_torch_native(self) -> bool:
        """Whether this is just what `torch.nn.GroupNorm` computes, for inputs of any rank."""
        options = self.options
        return (
            len(self.in_size) == 2
            and options.feature == (1,)
            and options.reduction is None
            and options.axis_name is None
            and options.dtype in (None, "input")
            and (self.use_scale or not self.use_bias)
        )


class Layer:
    """What layers of every backend have in common; use `GroupNorm`."""

    _adapter_name: ClassVar[BackendName]
    _settings: Settings
    scale: Any
    bias: Any

    def __init__(
        self,
        in_size: "int | Sequence[int | EllipsisType]",
        feature_axis: int | Sequence[int] = -1,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike = None,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: int | Sequence[int] | None = None,
        axis_name: Any = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        param_type: Any = None,
        param_dtype: DTypeLike = None,
        backend: str = "numpy",
        device: Any = None,
    ) -> None:
        size = check_in_size(in_size, feature_axis)
        options = make_options(
            feature_axis=size.feature,
            num_groups=num_groups,
            group_size=group_size,
            reduction_axes=reduction_axes,
            epsilon=epsilon,
            dtype=dtype,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            feature_shape=size.feature_shape,
        )
        channels = int(np.prod(size.feature_shape))
        groups = resolve_groups(channels, options.num_groups, options.group_size)
        axes = tuple(int(a) for a in np.atleast_1d(np.asarray(feature_axis)))
        settings = Settings(
            in_size=size.in_size,
            feature_axis=axes[0] if len(axes) == 1 else axes,
            num_groups=groups,
            group_size=channels // groups,
            options=options,
            use_bias=flag("use_bias", use_bias),
            use_scale=flag("use_scale", use_scale),
            bias_init=bias_init,
            scale_init=scale_init,
            param_type=param_type,
            param_dtype=dtype_name(
                "param_dtype", "float32" if param_dtype is None else param_dtype
            ),
        )
        self._setup(settings, *self._initial(settings, device))

    # What a backend's layer provides -----------------------------------------------------------

    def _setup(self, settings: Settings, scale: Array | None, bias: Array | None) -> None:
        """Store what the layer is; every layer, however it comes about, goes through here."""
        raise NotImplementedError

    @property
    def _adapter(self) -> "Adapter":
        return adapter_named(self._adapter_name)

    # Calls -------------------------------------------------------------------------------------

    def __call__(self, x: ArrayT, mask: MaskLike = None) -> ArrayT:
        """Normalize x; see `update`."""
        y: ArrayT = self._normalize(x, mask)
        return y

    def update(self, x: ArrayT, mask: MaskLike = None) -> ArrayT:
        """Normalize x; the same as calling the layer.

        Parameters
        ----------
        x : array of shape (N, ..., C)
            With any number of leading axes.
        mask : array broadcastable to x, optional
            True (or 1) where elements count for mean and variance.

        Returns
        -------
        array of x's shape
            Of x's library, on x's device.

        Raises
        ------
        groupnorm.errors.ArgumentTypeError
            If x is of another library than the layer's parameters (any is fine for a NumPy layer).
        groupnorm.errors.ArgumentValueError
            If x or the mask has a shape that does not fit.
        """
        y: ArrayT = self(x, mask)
        return y

    def _normalize(self, x: Any, mask: Any) -> Any:
        return apply(self._serving(x), x, self.scale, self.bias, mask, self._settings.options)

    def vjp(self, x: ArrayT, mask: MaskLike = None) -> tuple[ArrayT, Callable[[ArrayT], Gradients]]:
        """Normalize x, and return what pulls a cotangent back; see `groupnorm.group_norm_vjp`.

        Returns
        -------
        y : array of x's shape
        pullback : callable
            Takes a cotangent of y's shape, returns gradients with fields `x`, `scale` and `bias`.

        Examples
        --------
        >>> import numpy as np
        >>> from groupnorm import GroupNorm
        >>> y, pullback = GroupNorm(4, num_groups=2).vjp(np.ones((3, 4), np.float32))
        >>> pullback(np.ones((3, 4), np.float32)).bias
        array([3., 3., 3., 3.], dtype=float32)
        """
        return apply_with_pullback(
            self._serving(x), x, self.scale, self.bias, mask, self._settings.options
        )

    def _serving(self, x: Any) -> "Adapter":
        """Find who computes x: the array decides, and only a NumPy layer serves them all."""
        own, found = self._adapter, adapter_of(x)
        if found is not own and self._adapter_name != "numpy":
            target = f"layer.to_backend({found.backend or 'numpy'!r})"
            raise ArgumentTypeError(
                f"x is of {found.array_name} and this layer's parameters are of {own.array_name}: "
                f"nothing is moved between libraries unasked. Use {target}, or convert x."
            )
        return found

    # Moving ------------------------------------------------------------------------------------

    def to_backend(
        self, backend: BackendName, *, device: Any = None, param_type: Any = None
    ) -> "GroupNorm":
        """Return the same layer in another framework, its parameters with exactly equal values.

        Parameters
        ----------
        backend : {"numpy", "jax", "torch", "cupy"}
            Where the parameters live from then on.
        device : optional
            As that framework names devices. Default is its own default.
        param_type : optional
            What holds a parameter, such as `flax.nnx.Param`. Default is the framework's plainest.

        Returns
        -------
        GroupNorm
            Independent of this one.

        Raises
        ------
        groupnorm.errors.BackendImportError
            If the framework cannot be imported.

        Examples
        --------
        >>> from groupnorm import GroupNorm
        >>> GroupNorm(8, num_groups=2).to_backend("numpy").num_groups
        2
        """
        target = adapter_named(backend)
        settings = self._settings._replace(param_type=param_type)
        values: list[Array | None] = []
        for stored in (self.scale, self.bias):
            if stored is None:
                values.append(None)
                continue
            host = np.array(self._adapter.to_host(stored)).reshape(settings.feature_shape)
            values.append(target.place(target.from_host(host), device))
        layer: GroupNorm = target.layer_class()._of(settings, *values)
        return layer

    @classmethod
    def _of(cls, settings: Settings, scale: Array | None, bias: Array | None) -> Self:
        layer = cls.__new__(cls)
        layer._setup(settings, scale, bias)
        return layer

    def _initial(self, settings: Settings, device: Any) -> tuple[Array | None, Array | None]:
        return (
            self._initial_parameter("scale", settings, device) if settings.use_scale else None,
            self._initial_parameter("bias", settings, device) if settings.use_bias else None,
        )

    def _initial_parameter(self, name: str, settings: Settings, device: Any) -> Array:
        adapter = self._adapter
        init = settings.scale_init if name == "scale" else settings.bias_init
        dtype = settings.param_dtype
        # Small floats are not NumPy's own: start from float32.
        host_dtype = np.dtype("float32" if dtype.startswith(("bfloat", "float8")) else dtype)
        value = initial_value(f"{name}_init", init, settings.feature_shape, host_dtype)
        if not adapter.is_array(value):
            value = adapter.from_host(np.asarray(value, dtype=host_dtype))
        return adapter.place(adapter.xp.astype(value, adapter.dtype(dtype), copy=False), device)

    # Reading -----------------------------------------------------------------------------------

    @property
    def in_size(self) -> "tuple[int | EllipsisType, ...]":
        """The input's shape without the batch, as given."""
        return self._settings.in_size

    @property
    def out_size(self) -> "tuple[int | EllipsisType, ...]":
        """The result's shape without the batch: the input's."""
        return self._settings.in_size

    @property
    def feature_axis(self) -> int | tuple[int, ...]:
        """The feature axes, as indices into `in_size`."""
        return self._settings.feature_axis

    @property
    def num_groups(self) -> int:
        """The number of groups."""
        return self._settings.num_groups

    @property
    def group_size(self) -> int:
        """The number of channels in a group."""
        return self._settings.group_size

    @property
    def epsilon(self) -> float:
        """The number added to the variance."""
        return self._settings.options.epsilon

    @property
    def dtype(self) -> str | None:
        """The name of the result's dtype; None infers it."""
        return self._settings.options.dtype

    @property
    def param_dtype(self) -> str:
        """The name of the dtype the parameters were made in."""
        return self._settings.param_dtype

    @property
    def param_type(self) -> Any:
        """What holds a parameter; None is the backend's plainest."""
        return self._settings.param_type

    @property
    def use_bias(self) -> bool:
        """Whether there is a bias."""
        return self._settings.use_bias

    @property
    def use_scale(self) -> bool:
        """Whether there is a scale."""
        return self._settings.use_scale

    @property
    def reduction_axes(self) -> tuple[int, ...] | None:
        """The axes statistics are taken over; None is all but the batch."""
        return self._settings.options.reduction

    @property
    def axis_name(self) -> Any:
        """The replicas statistics are pooled over."""
        return self._settings.options.axis_name

    @property
    def axis_index_groups(self) -> tuple[tuple[int, ...], ...] | None:
        """The sets of replicas that share statistics."""
        return self._settings.options.axis_index_groups

    @property
    def use_fast_variance(self) -> bool:
        """Whether the data is read once for its statistics."""
        return self._settings.options.fast

    @property
    def backend(self) -> BackendName:
        """The name of the backend the parameters live in."""
        return self._adapter_name

    def __repr__(self) -> str:
        """Show the call that makes such a layer."""
        return f"GroupNorm({self._describe()}, backend={self._adapter_name!r})"

    def _describe(self) -> str:
        settings, options = self._settings, self._settings.options
        size = ", ".join("..." if n is ... else str(n) for n in settings.in_size)
        parts = [f"({size},)" if len(settings.in_size) == 1 else f"({size})"]
        grouping = (
            {"num_groups": options.num_groups}
            if options.group_size is None
            else {"num_groups": None, "group_size": options.group_size}
        )
        shown = {
            "feature_axis": (settings.feature_axis, -1),
            "epsilon": (options.epsilon, 1e-6),
            "dtype": (options.dtype, None),
            "use_bias": (settings.use_bias, True),
            "use_scale": (settings.use_scale, True),
            "reduction_axes": (options.reduction, None),
            "axis_name": (options.axis_name, None),
            "axis_index_groups": (options.axis_index_groups, None),
            "use_fast_variance": (options.fast, True),
            "param_dtype": (settings.param_dtype, "float32"),
        }
        parts += [f"{name}={value!r}" for name, value in grouping.items()]
        parts += [f"{name}={v!r}" for name, (v, default) in shown.items() if v != default]
        return ", ".join(parts)


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
        The indices into `in_size` that hold the channels. Of several, the channels are the
        row-major product in `in_size`'s order.
    num_groups, group_size : int, optional
        The number of groups, or (with ``num_groups=None``) the number of channels in each.
    epsilon : float
        Added to the variance. PyTorch's default is 1e-5.
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
        Read the data once for its statistics, or (False) twice. Both keep all digits.
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
            return super().__new__(cls)
        if not isinstance(backend, str):
            raise ArgumentTypeError(
                f"backend={backend!r} is a {type(backend).__name__}: give the name of one, such as "
                "'numpy' or 'torch'."
            )
        return super().__new__(adapter_named(backend).layer_class())


class PlainGroupNorm(GroupNorm):
    """A layer that is a plain object with two arrays."""

    _scale: Any
    _bias: Any

    def _setup(self, settings: Settings, scale: Array | None, bias: Array | None) -> None:
        self._settings = settings
        hold = self._adapter.hold
        self._scale = None if scale is None else hold(scale, settings.param_type, "scale")
        self._bias = None if bias is None else hold(bias, settings.param_type, "bias")

    @property
    def scale(self) -> Array | None:
        """The factor of every channel; assign an array of the same shape to change it."""
        return None if self._scale is None else self._adapter.read(self._scale)

    @scale.setter
    def scale(self, value: Array) -> None:
        self._scale = self._replacement("scale", value, self._settings.use_scale)

    @property
    def bias(self) -> Array | None:
        """What is added to every channel; assign an array of the same shape to change it."""
        return None if self._bias is None else self._adapter.read(self._bias)

    @bias.setter
    def bias(self, value: Array) -> None:
        self._bias = self._replacement("bias", value, self._settings.use_bias)

    def _replacement(self, name: str, value: Array, used: bool) -> Any:
        if not used:
            raise ArgumentValueError(
                f"{name} cannot be set: the layer was made with use_{name}=False. Make one with "
                f"use_{name}=True."
            )
        adapter, shape = self._adapter, self._settings.feature_shape
        if not adapter.is_array(value):
            raise ArgumentTypeError(
                f"{name} is a {type(value).__name__}: this layer's parameters are of "
                f"{adapter.array_name}. Convert it, or use to_backend."
            )
        if tuple(value.shape) != shape:
            raise ArgumentValueError(
                f"{name} has shape {tuple(value.shape)}: this layer's parameters have "
                f"shape {shape}. Reshape it."
            )
        return adapter.hold(value, self._settings.param_type, name)
