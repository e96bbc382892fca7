"""`GroupNorm`: the constructor, calls, conversion between backends, and the plain layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np

from groupnorm.adapter import library_of
from groupnorm.arguments import check_in_size, flag, validate
from groupnorm.dispatch import (
    adapter_named,
    adapter_of,
    compute,
    compute_with_pullback,
    layer_class_named,
)
from groupnorm.dtypes import dtype_name
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.initializers import Initializers, ones, zeros
from groupnorm.layer_config import ConfigProperties, LayerConfig
from groupnorm.module_guard import check_is_trained
from groupnorm.parameters import ParamStore, check_param_type, metadata_of
from groupnorm.plan import resolve_groups
from groupnorm.typing import (
    Array,
    ArrayT,
    AxisIndexGroups,
    DTypeLike,
    Gradients,
    Initializer,
    MaskLike,
)

if TYPE_CHECKING:
    import os

    import onnx

    from groupnorm.adapter import Adapter
    from groupnorm.backends.cupy import CupyGroupNorm
    from groupnorm.backends.jax import JaxGroupNorm
    from groupnorm.backends.mlx import MlxGroupNorm
    from groupnorm.backends.numpy import NumpyGroupNorm
    from groupnorm.backends.torch import TorchGroupNorm

__all__ = ["GroupNorm", "PlainGroupNorm"]


class Layer(ConfigProperties):
    """Common base class of the layers of all backends; use `GroupNorm`."""

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
        bias_init: Initializer | Any = zeros,
        scale_init: Initializer | Any = ones,
        reduction_axes: int | Sequence[int] | None = None,
        axis_name: Any = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        param_type: Any = None,
        param_dtype: DTypeLike = None,
        backend: str = "numpy",
        device: Any = None,
        activation: str | None = None,
        implementation: str | None = None,
        trainable: bool = True,
        key: Any = None,
        rngs: Any = None,
    ) -> None:
        size = check_in_size(in_size, feature_axis)
        options = validate(
            feature_axis=size.feature,
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
            feature_shape=size.feature_shape,
        )
        # Written in one way, so that equal layers are equal.
        channels = math.prod(size.feature_shape)
        options = options._replace(
            num_groups=resolve_groups(channels, options.num_groups, options.group_size),
            group_size=None,
            reduction=None if options.reduction is None else tuple(sorted(options.reduction)),
        )
        config = LayerConfig(
            in_size=size.in_size,
            feature_axis=size.feature_axis,
            options=options,
            use_bias=flag("use_bias", use_bias),
            use_scale=flag("use_scale", use_scale),
            param_type=check_param_type(param_type),
            param_dtype=dtype_name(
                "param_dtype",
                self._adapter.default_param_dtype() if param_dtype is None else param_dtype,
            ),
            trainable=flag("trainable", trainable),
        )
        self._initialize(config, Initializers(scale_init, bias_init, key, rngs).check(), device)

    # Implemented by each backend's layer -------------------------------------------------------

    def _setup(
        self,
        config: LayerConfig,
        values: Mapping[str, Array | None],
        metadata: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Initialize the instance; the constructor and `to_backend` both end here."""
        raise NotImplementedError

    @property
    def _adapter(self) -> "Adapter":
        return adapter_named(self._adapter_name)

    # Calls -------------------------------------------------------------------------------------

    if TYPE_CHECKING:
        # Defined by `PlainGroupNorm` and by `torch.nn.Module`, whose own one must stay visible.
        def __call__(self, x: ArrayT, mask: MaskLike = None) -> ArrayT:
            """Normalize x; see `update`."""
            return x

    def update(self, x: ArrayT, mask: MaskLike = None) -> ArrayT:
        """Normalize x; the same as calling the layer.

        Parameters
        ----------
        x : array of shape (N, ..., C)
            With any number of leading axes.
        mask : array broadcastable to x, optional
            True (or 1) for valid elements, which mean and variance are computed from.

        Returns
        -------
        array of x's shape
            In x's library, on x's device.

        Raises
        ------
        groupnorm.errors.ArgumentTypeError
            If x and the parameters are of different libraries (a NumPy layer accepts all of them).
        groupnorm.errors.ArgumentValueError
            If the shape of x or of the mask is invalid.
        """
        y: ArrayT = self(x, mask)
        return y

    def _normalize(self, x: Any, mask: Any) -> Any:
        adapter, scale, bias = self._adapter_for(x), self.scale, self.bias
        if self.trainable:
            self._check_is_trained(adapter)
        else:
            detach = self._adapter.detach
            scale, bias = (None if p is None else detach(p) for p in (scale, bias))
        return compute(adapter, x, scale, bias, mask, self._options)

    def _check_is_trained(self, adapter: "Adapter") -> None:
        """Raise an error if a module calls this layer and does not train it."""

    def vjp(self, x: ArrayT, mask: MaskLike = None) -> tuple[ArrayT, Callable[[ArrayT], Gradients]]:
        """Normalize x and return the vector-Jacobian product; see `groupnorm.group_norm_vjp`.

        Returns
        -------
        y : array of x's shape
        pullback : callable
            Takes a cotangent of y's shape and returns gradients: `x`, `scale` and `bias`.

        Examples
        --------
        >>> import numpy as np
        >>> from groupnorm import GroupNorm
        >>> y, pullback = GroupNorm(4, num_groups=2).vjp(np.ones((3, 4), np.float32))
        >>> pullback(np.ones((3, 4), np.float32)).bias
        array([3., 3., 3., 3.], dtype=float32)
        """
        y, pullback = compute_with_pullback(
            self._adapter_for(x), x, self.scale, self.bias, mask, self._options
        )
        if self.trainable:
            return y, pullback
        return y, lambda dy: pullback(dy)._replace(scale=None, bias=None)

    def _adapter_for(self, x: Any) -> "Adapter":
        """Return the adapter for x. Only NumPy layers accept arrays of other libraries."""
        own, adapter = self._adapter, adapter_of(x)
        if adapter is not own and self._adapter_name != "numpy":
            target = f"layer.to_backend({adapter.name or 'numpy'!r})"
            raise ArgumentTypeError(
                f"x is of {adapter.array_name} and this layer's parameters are of "
                f"{own.array_name}: arrays are not converted between libraries implicitly. Use "
                f"{target}, or convert x."
            )
        return adapter

    # Conversion --------------------------------------------------------------------------------

    @overload
    def to_backend(
        self, backend: Literal["numpy"], *, device: Any = ..., param_type: Any = ...
    ) -> "NumpyGroupNorm": ...
    @overload
    def to_backend(
        self, backend: Literal["jax"], *, device: Any = ..., param_type: Any = ...
    ) -> "JaxGroupNorm": ...
    @overload
    def to_backend(
        self, backend: Literal["torch"], *, device: Any = ..., param_type: Any = ...
    ) -> "TorchGroupNorm": ...
    @overload
    def to_backend(
        self, backend: Literal["cupy"], *, device: Any = ..., param_type: Any = ...
    ) -> "CupyGroupNorm": ...
    @overload
    def to_backend(
        self, backend: Literal["mlx"], *, device: Any = ..., param_type: Any = ...
    ) -> "MlxGroupNorm": ...
    @overload
    def to_backend(
        self, backend: str, *, device: Any = ..., param_type: Any = ...
    ) -> "GroupNorm": ...
    def to_backend(self, backend: str, *, device: Any = None, param_type: Any = ...) -> Any:
        """Return the same layer in another framework, with exactly equal parameter values.

        Parameters
        ----------
        backend : {"numpy", "jax", "torch", "cupy", "mlx"}
            The backend of the new layer.
        device : optional
            A device as that framework names it. Default is its default device.
        param_type : optional
            The parameter type, such as `flax.nnx.Param`; None is the framework's plain type.
            Default is that of this layer in its own backend, and plain in another.

        Returns
        -------
        GroupNorm
            A layer that shares no memory with this one.

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
        self._check_own_call("to_backend")
        target = adapter_named(backend)
        if param_type is ...:
            param_type = self.param_type if backend == self._adapter_name else None
        config = self._config._replace(
            param_type=check_param_type(param_type),
            use_scale=self.use_scale,
            use_bias=self.use_bias,
            trainable=self.trainable,
        )
        values = {
            name: None if host is None else target.place(target.from_host(host), device)
            for name, host in zip(("scale", "bias"), self._host_parameters(), strict=True)
        }
        same = backend == self._adapter_name and config.param_type == self.param_type
        layer = layer_class_named(backend)._of(config, values, self._metadata() if same else {})
        self._carry_state(layer)
        return layer

    @classmethod
    def from_(cls, layer: Any, params: Any = None) -> "GroupNorm":
        """Return a layer that computes what a framework's group norm computes.

        The groups, epsilon, the place of the channels, the dtype of results and the parameters are
        all read off it, and copied.

        Parameters
        ----------
        layer : module
            A group norm of PyTorch (or what `groupnorm.torch.replace` knows), flax nnx, flax linen,
            equinox, haiku, keras, brainstate or MLX, or the class of the same name in
            ``groupnorm.<framework>``. Of haiku also a `functools.partial` of the class, which is
            known outside of transformed functions, too.
        params : dict, optional
            Its parameters, where the module does not hold them: the variables of flax linen,
            ``{"params": {"scale": ..., "bias": ...}}``, or ``{"scale": ..., "offset": ...}`` of
            haiku.

        Returns
        -------
        GroupNorm
            In the module's array library; a copy, if it is a layer already. Its inputs have a batch
            axis, which those of equinox have not. That of an `mlx.nn.GroupNorm` without
            ``pytorch_compatible=True``, whose groups are interleaved, is for inputs of shape
            (N, ..., G, C // G): ``x.reshape(..., C // G, G).swapaxes(-1, -2)``.

        Raises
        ------
        groupnorm.errors.ArgumentTypeError, groupnorm.errors.ArgumentValueError
            If it is no group norm, or one that no layer is equal to.

        Examples
        --------
        >>> import torch  # doctest: +SKIP
        >>> from groupnorm import GroupNorm
        >>> GroupNorm.from_(torch.nn.GroupNorm(2, 8)).epsilon  # doctest: +SKIP
        1e-05
        """
        from groupnorm.carrying import carried_from

        return carried_from(GroupNorm, layer, params)  # type: ignore[no-any-return]

    def to_(
        self, name: str, *, in_size: Any = ..., feature_axis: Any = ..., dtype: Any = ...
    ) -> Any:
        """Return the layer as a module of another framework, with exactly equal parameters.

        Nothing is assumed: where a framework's group norm has no such option, this raises an error
        with the argument that changes it.

        Parameters
        ----------
        name : {"torch", "flax.nnx", "flax.linen", "equinox", "haiku", "keras", "brainstate", "mlx"}
            The framework.
        in_size : int or sequence of int, optional
            The shape of the module's inputs without the batch, as for `GroupNorm`. Default is this
            layer's; haiku needs the number of axes where channels are first.
        feature_axis : {0, -1}, optional
            Where the module's inputs have their channels: on axis 1, or on the last. Default is
            where this layer's have them.
        dtype : str or dtype, optional
            The dtype of its results, as for `GroupNorm`. Default is this layer's.

        Returns
        -------
        module
            Of the class ``groupnorm.<name>.GroupNorm``, which is one of the framework's, or of
            keras' ``GroupNormalization``. For flax linen a pair of a module and its variables; for
            haiku, whose modules exist in transformed functions only, a pair of a function that
            makes the module and its parameters.

        Raises
        ------
        groupnorm.errors.ArgumentValueError
            If the framework has no such group norm.
        groupnorm.errors.BackendImportError
            If the framework cannot be imported.

        Examples
        --------
        >>> from groupnorm import GroupNorm
        >>> layer = GroupNorm(8, num_groups=2)
        >>> layer.to_("torch", feature_axis=0, dtype="input").eps  # doctest: +SKIP
        1e-06
        """
        from groupnorm.carrying import carried_to

        return carried_to(self, name, in_size, feature_axis, dtype)  # type: ignore[arg-type]

    def _with(self, *, in_size: Any, feature_axis: Any, dtype: Any) -> Any:
        """Return a NumPy layer with other inputs and results."""
        config = self._config
        shape = check_in_size(in_size, feature_axis)
        if math.prod(shape.feature_shape) != math.prod(config.feature_shape):
            raise ArgumentValueError(
                f"in_size={in_size!r} has {math.prod(shape.feature_shape)} channels at "
                f"feature_axis={feature_axis!r}, and this layer {math.prod(config.feature_shape)}: "
                "give a size with as many."
            )
        options = config.options._replace(
            feature=shape.feature,
            feature_shape=shape.feature_shape,
            dtype=None if dtype is None else dtype_name("dtype", dtype, ("input",)),
        )
        config = config._replace(
            in_size=shape.in_size, feature_axis=shape.feature_axis, options=options
        )
        return layer_class_named("numpy")._of(
            config,
            {
                name: None if value is None else value.reshape(shape.feature_shape)
                for name, value in zip(("scale", "bias"), self._host_parameters(), strict=True)
            },
        )

    def _metadata(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the metadata of the parameters, such as a sharding."""
        return {}

    def _carry_state(self, layer: "GroupNorm") -> None:
        """Give a converted layer what is no part of the configuration, if it has that."""

    def _check_own_call(self, method: str) -> None:
        """Raise an error if a subclass computes something else, which would be lost."""
        for name in ("__call__", "forward", "update"):
            call = getattr(type(self), name, None)
            place = getattr(call, "__module__", None) or "groupnorm."
            if not place.startswith(("groupnorm.", "torch.")):
                raise ArgumentTypeError(
                    f"{method} was called for a {type(self).__name__}, whose class has a {name} of "
                    "its own: only what the classes of this library compute can be carried."
                )

    def _check_hooks(self) -> None:
        """Raise an error if a call does more than the class, which a new layer would not do."""

    def _trained(self) -> list[bool]:
        """Return for each parameter whether it is trained."""
        return [self.trainable]

    def _host_parameters(self) -> "list[np.ndarray[Any, Any] | None]":
        """Return scale and bias as NumPy arrays of the shape of the feature axes."""
        values: list[np.ndarray[Any, Any] | None] = []
        shape = self._config.feature_shape
        for name, stored in (("scale", self.scale), ("bias", self.bias)):
            if stored is None:
                if getattr(self, f"use_{name}"):
                    raise ArgumentTypeError(
                        f"the {name} of a layer with use_{name}=True is None, as in a part of a "
                        "tree: use the whole layer, or create one without it."
                    )
                values.append(None)
                continue
            host = np.array(self._adapter.to_host(self._check_held(name, stored)))
            if host.size != math.prod(shape):
                fix = "set num_channels to the number of channels first."
                if host.shape[-len(shape) :] == shape:
                    fix = (
                        "it is a stack of layers, as jax.vmap makes. Take each by itself, such as "
                        "jax.tree.map(lambda a: a[0], layer)."
                    )
                raise ArgumentValueError(
                    f"{name} has shape {host.shape}, and the layer's feature axes are {shape}: "
                    f"{fix}"
                )
            values.append(host.reshape(shape))
        return values

    def _check_held(self, name: str, held: Any) -> Array:
        """Return a parameter; raise if there is something else, as transformations of trees do."""
        if not self._adapter.is_array(held):
            raise ArgumentTypeError(
                f"the {name} of a layer is of type {type(held).__name__}, and not among "
                f"{self._adapter.array_name}: use a layer that holds arrays."
            )
        return held

    def _converted(self, name: str, value: "np.ndarray[Any, Any]") -> Array:
        """Return the value of a parameter as this layer holds it, on the same device.

        Nothing is changed yet; what can go wrong does so here.
        """
        held = self._check_held(name, getattr(self, name))
        return self._adapter.from_host(value, held)

    def _assign(self, name: str, value: Array) -> Callable[[], None]:
        """Set a parameter, and return what undoes that."""
        held = getattr(self, name)
        setattr(self, name, value)
        return lambda: setattr(self, name, held)

    def to_onnx(
        self,
        path: "str | os.PathLike[str] | None",
        shape: "Sequence[int | str | None]",
        *,
        dtype: DTypeLike = "float32",
        opset: int = 18,
    ) -> "onnx.ModelProto":
        """Return the layer as an ONNX model of basic operators, and save it.

        The model has the input x and the output y, and computes in float32, or in float64 if x or
        a parameter is of it. Where onnxruntime computes it, results are within 1e-6 of float64 for
        data of spread 1 and offsets up to 1e5 (see `docs/onnx.md`).

        Parameters
        ----------
        path : str or path-like or None
            The file to write; None writes none.
        shape : sequence
            The shape of x: for each axis a number, or a name or None for any length, such as
            ``("N", 64, "H", "W")``. Channels are numbers, and ONNX requires the number of axes.
        dtype : {"float16", "bfloat16", "float32", "float64"}
            The dtype of x. That of y is the one that the layer returns for it.
        opset : int
            The version of ONNX's operator set, at least 18.

        Returns
        -------
        onnx.ModelProto

        Raises
        ------
        groupnorm.errors.BackendImportError
            If the package onnx cannot be imported.
        groupnorm.errors.ArgumentValueError
            If `shape` does not fit the layer, the opset is unknown, or the layer has an
            `axis_name`.
        groupnorm.errors.ArgumentTypeError
            If x or a parameter has another dtype than those above.

        References
        ----------
        .. [1] https://onnx.ai/onnx/operators

        Examples
        --------
        >>> from groupnorm import GroupNorm
        >>> layer = GroupNorm((64, ...), feature_axis=0, num_groups=32)
        >>> model = layer.to_onnx(None, ("N", 64, "H", "W"))  # doctest: +SKIP
        >>> len(model.graph.node)  # doctest: +SKIP
        18
        """
        from groupnorm.onnx.model import layer_model, save

        scale, bias = self._host_parameters()
        model = layer_model(shape, scale, bias, self._options, dtype, opset)
        if path is not None:
            save(model, path)
        return model

    @classmethod
    def _of(
        cls,
        config: LayerConfig,
        values: Mapping[str, Array | None],
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Self:
        layer = cls.__new__(cls)
        layer._setup(config, values, metadata or {})
        return layer

    def _initialize(self, config: LayerConfig, initializers: Initializers, device: Any) -> None:
        """Set up the layer with initial values."""
        values: dict[str, Array | None] = {"scale": None, "bias": None}
        metadata: dict[str, Mapping[str, Any]] = {}
        for name, used in (("scale", config.use_scale), ("bias", config.use_bias)):
            if used:
                value, metadata[name] = self._initial(name, config, initializers, device)
                values[name] = value
        self._setup(config, values, metadata)

    def _initial(
        self, name: str, config: LayerConfig, initializers: Initializers, device: Any
    ) -> tuple[Array, Mapping[str, Any]]:
        """Return the initial value of a parameter, and its metadata."""
        adapter, dtype = self._adapter, config.param_dtype
        # NumPy itself has no bfloat16 or float8: start from float32.
        host_dtype = np.dtype("float32" if dtype.startswith(("bfloat", "float8")) else dtype)
        value, metadata = initializers.value(name, config.feature_shape, host_dtype)
        if not adapter.is_array(value):
            if library_of(value) is not None:
                source = adapter_of(value)
                value = source.to_host(source.admit(value, f"{name}_init"))
            value = adapter.from_host(np.asarray(value, dtype=host_dtype))
        value = adapter.xp.astype(value, adapter.dtype(dtype), copy=True)
        return adapter.place(value, device), metadata


# The name shown in Python's own TypeErrors about arguments.
Layer.__init__.__qualname__ = "GroupNorm"


# Names of arguments in PyTorch, Equinox and haiku.
_ELSEWHERE = {
    "eps": "this argument is called epsilon here. Pass epsilon={!r}.",
    "affine": "scale and bias are chosen one by one here. Pass use_scale={0!r}, use_bias={0!r}.",
    "num_channels": "the number of channels is the first argument, in_size. With channels on axis "
    "1 pass in_size=({!r}, ...) and feature_axis=0.",
}


class GroupNorm(Layer):
    r"""Group normalization over the channels of an array, for every array library.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot scale + bias

    The channels are split into contiguous groups; mean and (biased) variance are computed per
    sample and group, over all other axes, independently of the rest of the batch.

    Parameters
    ----------
    in_size : int or sequence of int
        The input's shape without the batch axis, such as ``(28, 28, 64)``, or only the number of
        channels, ``64``. One ``...`` stands for any number of axes: ``(64, ...)`` with
        ``feature_axis=0`` has the channels on axis 1, as in PyTorch. Only the lengths of the
        feature axes are enforced.
    feature_axis : int or sequence of int
        The indices into `in_size` of the feature axes, by default the last. Several axes are
        flattened in row-major order, in `in_size`'s order of axes.
    num_groups, group_size : int, optional
        The number of groups (default 32), or with ``num_groups=None`` the channels per group.
    epsilon : float
        Added to the variance. Default is 1e-6; PyTorch's is 1e-5.
    dtype : str or dtype, optional
        The result's dtype; ``"input"`` keeps x's. Default is the dtype to which the library
        promotes x and the parameters: bfloat16 x with float32 parameters gives float32. A layer
        that is a `torch.nn.GroupNorm` keeps x's dtype by default, as that does.
    use_bias, use_scale : bool
        Whether to add a bias (beta), and to multiply by a scale (gamma).
    bias_init, scale_init : number, array or callable
        A callable takes ``(shape, dtype)`` or follows the framework's convention; see
        `groupnorm.initializers`.
    reduction_axes : int or sequence of int, optional
        The axes of x to reduce over; must include every feature axis. Default is all but the
        leading axis (all, if that is a feature axis or the only one).
    axis_name, axis_index_groups : optional
        The replicas to pool statistics over, and how to split them into sets; see
        `groupnorm.group_norm`.
    use_fast_variance : bool
        Compute the statistics in one pass (the default) or in two. Both are equally accurate.
    param_type : callable, optional
        The parameter type, such as `flax.nnx.Param` or `brainstate.ParamState`. Default is a
        plain array, in PyTorch `torch.nn.Parameter`. Others are registered by
        `groupnorm.parameters.register_param_type`.
    param_dtype : str or dtype, optional
        Default is float32; in PyTorch the dtype set by `torch.set_default_dtype`.
    backend : {"numpy", "jax", "torch", "cupy", "mlx"}
        The library of the parameters. It also determines the type of the layer: a plain object, a
        pytree (jax), a `torch.nn.Module` or an `mlx.nn.Module`. A NumPy layer accepts arrays of
        every library.
    device : optional
        The device of the parameters, as the backend names it.
    activation : {"relu", "silu", "gelu"}, optional
        Applied to the result.
    implementation : {"portable", "fused", "native"}, optional
        Default is the fastest available for each call; see `groupnorm.group_norm`.
    trainable : bool
        Whether the parameters are trained. If not, gradients do not reach them: a JAX layer's are
        zero, those of `vjp` None, and PyTorch's parameters do not require any.
    key, rngs : optional
        A key of JAX, or a stream of them such as `flax.nnx.Rngs`, for initializers that take keys;
        each parameter gets its own.

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
    def __new__(cls, *args: Any, backend: Literal["mlx"], **kwargs: Any) -> "MlxGroupNorm": ...
    @overload
    def __new__(cls, *args: Any, backend: str, **kwargs: Any) -> Self: ...
    def __new__(cls, *args: Any, backend: Any = "numpy", **kwargs: Any) -> Any:
        """Select the backend's class, as `pathlib.Path` selects the platform's."""
        if cls is not GroupNorm:  # copying and unpickling also call this, without arguments
            if not hasattr(cls, "_adapter_name"):
                raise ArgumentTypeError(
                    f"{cls.__name__} derives from GroupNorm, which only selects a backend's "
                    "class: derive from that class, such as "
                    "groupnorm.backends.torch.TorchGroupNorm."
                )
            return super().__new__(cls)  # modules of MLX are dicts
        for name in _ELSEWHERE.keys() & kwargs.keys():
            value = kwargs[name]
            raise ArgumentTypeError(f"{name}={value!r}: {_ELSEWHERE[name].format(value)}")
        if not isinstance(backend, str):
            raise ArgumentTypeError(
                f"backend={backend!r} is of type {type(backend).__name__}: it must be the "
                "name of a backend, such as 'numpy' or 'torch'."
            )
        chosen = layer_class_named(backend)
        return chosen.__new__(chosen)


class PlainGroupNorm(GroupNorm):
    """A layer that is a plain Python object holding two arrays."""

    #: The parameters, as the store of `param_type` holds them.
    _held: dict[str, Any]

    if not TYPE_CHECKING:

        def __call__(self, x: ArrayT, mask: MaskLike = None) -> ArrayT:
            """Normalize x; see `update`."""
            return self._normalize(x, mask)

    def _setup(
        self,
        config: LayerConfig,
        values: Mapping[str, Array | None],
        metadata: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._config = config
        self._held = self._store.create(values, metadata, config.trainable)

    def _check_is_trained(self, adapter: "Adapter") -> None:
        # Libraries without automatic differentiation train nothing.
        if adapter.has_autograd and adapter.sees_callers:
            check_is_trained(self)

    def _metadata(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: metadata_of(stored) for name, stored in self._held.items()}

    @property
    def _store(self) -> ParamStore:
        return self._adapter.param_store(self._config.param_type)

    @property
    def scale(self) -> Array | None:
        """The factor per channel; assign an array of the same shape to change it."""
        return self._read("scale")

    @scale.setter
    def scale(self, value: Array) -> None:
        self._write("scale", value, self._config.use_scale)

    @property
    def bias(self) -> Array | None:
        """The offset per channel; assign an array of the same shape to change it."""
        return self._read("bias")

    @bias.setter
    def bias(self, value: Array) -> None:
        self._write("bias", value, self._config.use_bias)

    def _read(self, name: str) -> Array | None:
        if self._config.param_type is None:
            return self._held[name]
        return self._store.read(self._held, name)

    def _write(self, name: str, value: Array, used: bool) -> None:
        if not used:
            raise ArgumentValueError(
                f"{name} cannot be set: the layer was created with use_{name}=False. "
                f"Create one with use_{name}=True."
            )
        adapter, shape = self._adapter, self._config.feature_shape
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
        self._held = self._store.write(self._held, name, value)
