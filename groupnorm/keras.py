"""A group norm for keras, with its backends JAX, PyTorch and NumPy."""

from typing import Any

from groupnorm.carrying import (
    channels_of,
    check_class,
    parameters_of,
    place_of,
    trained_as_one,
)
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, BackendImportError
from groupnorm.functional import group_norm
from groupnorm.imports import needs

with needs("keras", "groupnorm.keras"):
    import keras

__all__ = ["GroupNormalization", "arguments_of", "module_of"]


@keras.saving.register_keras_serializable(package="groupnorm")
class GroupNormalization(keras.layers.GroupNormalization):
    """`keras.layers.GroupNormalization`, computed by this library.

    The arguments, defaults (epsilon is 1e-3), weights (``gamma`` and ``beta``), names and dtypes
    are keras', so that one replaces the other in a model and in a file. Results are accurate for a
    large mean on every backend, and the mask of an `Embedding` or `Masking` layer is respected.

    Raises
    ------
    groupnorm.errors.BackendImportError
        If keras computes with another library than JAX, PyTorch or NumPy.

    References
    ----------
    .. [1] https://keras.io/api/layers/normalization_layers/group_normalization

    Examples
    --------
    >>> import keras
    >>> from groupnorm.keras import GroupNormalization
    >>> layer = GroupNormalization(groups=32)
    >>> tuple(layer(keras.random.normal((8, 28, 28, 64))).shape)
    (8, 28, 28, 64)
    """

    def __init__(self, groups: int = 32, axis: int = -1, *arguments: Any, **options: Any) -> None:
        if keras.backend.backend() not in ("jax", "torch", "numpy"):
            raise BackendImportError(
                f"keras computes with {keras.backend.backend()} here, which this library does not "
                "know: set KERAS_BACKEND to jax, torch or numpy before keras is imported."
            )
        if not isinstance(axis, int):
            raise ArgumentTypeError(
                f"axis={axis!r} must be an int: the axis of the channels, such as -1 or 1."
            )
        if axis == 0:
            raise ArgumentValueError("axis=0 is the batch, and must be the axis of the channels.")
        super().__init__(groups, axis, *arguments, **options)

    def build(self, input_shape: Any) -> None:
        """Create the weights; later inputs may have another number of axes."""
        super().build(input_shape)
        axes = {self.axis: input_shape[self.axis]}
        self.input_spec = keras.InputSpec(min_ndim=2, axes=axes)

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Normalize the inputs.

        Parameters
        ----------
        inputs : tensor of shape (N, ..., C), or with the channels on `axis`
        mask : tensor of shape (N,), (N, T) or so, or with as many axes as the inputs, optional
            True for valid elements, which mean and variance are computed from. One with fewer axes
            has the first ones of the inputs, as the masks that keras passes on from layers before
            this one.

        Returns
        -------
        tensor of the inputs' shape
            In the compute dtype.
        """
        if mask is not None:
            shape = tuple(mask.shape)
            mask = keras.ops.reshape(mask, shape + (1,) * (len(inputs.shape) - len(shape)))
        gamma, beta = (
            None if w is None else keras.ops.convert_to_tensor(w) for w in (self.gamma, self.beta)
        )
        y = group_norm(
            inputs, gamma, beta, mask=mask, num_groups=self.groups, feature_axis=self.axis,
            epsilon=self.epsilon,
        )  # fmt: skip
        return keras.ops.cast(y, self.compute_dtype)


def arguments_of(module: Any) -> dict[str, Any]:
    """Return the arguments of a layer equal to a `keras.layers.GroupNormalization`."""
    check_class(module, GroupNormalization, keras.layers.GroupNormalization, "call")
    if not module.built:
        raise ArgumentValueError(
            "layer is not built, so that its number of channels is unknown: call it once, or its "
            "build(shape)."
        )
    if module.axis not in (-1, 1):
        raise ArgumentValueError(f"layer has axis={module.axis!r}: only 1 and -1 can be carried.")
    given = {
        name: getattr(module, f"{weight}_{name}")
        for weight in ("gamma", "beta")
        for name in ("regularizer", "constraint")
        if getattr(module, f"{weight}_{name}") is not None
    }
    if module.activity_regularizer is not None:
        given["activity_regularizer"] = module.activity_regularizer
    if given:
        raise ArgumentValueError(
            f"layer has a {min(given)}, which a layer of this library has not: use "
            "groupnorm.keras.GroupNormalization, or remove it."
        )
    trained = [bool(w.trainable) for w in (module.gamma, module.beta) if w is not None]
    [channels] = module.input_spec.axes.values()
    gamma, beta = (None if w is None else w.value for w in (module.gamma, module.beta))
    return {
        "in_size": (..., channels) if module.axis == -1 else (channels, ...),
        "feature_axis": -1 if module.axis == -1 else 0,
        "num_groups": module.groups,
        "epsilon": module.epsilon,
        "dtype": module.compute_dtype,
        "scale": gamma,
        "bias": beta,
        "trainable": trained_as_one(trained, module.trainable, "gamma and beta"),
        "backend": keras.backend.backend(),
    }


def module_of(layer: Any) -> GroupNormalization:
    """Return a built layer of keras equal to a layer."""
    first = place_of(layer) == 0
    policy: Any = layer.dtype
    if layer.param_dtype != layer.dtype:
        if (layer.param_dtype, layer.dtype) not in _MIXED:
            raise ArgumentValueError(
                f"dtype={layer.dtype!r} with parameters of {layer.param_dtype}: keras has "
                "mixed_float16 and mixed_bfloat16, with parameters of float32, only."
            )
        policy = f"mixed_{layer.dtype}"
    module = GroupNormalization(
        layer.num_groups, 1 if first else -1, layer.epsilon, center=layer.use_bias,
        scale=layer.use_scale, dtype=policy, trainable=layer.trainable,
    )  # fmt: skip
    channels = channels_of(layer)
    module.build((None, channels, None) if first else (None, channels))
    weights = {"scale": module.gamma, "bias": module.beta}
    for name, value in parameters_of(layer, keras.backend.backend()).items():
        weights[name].assign(value)
    return module


_MIXED = {("float32", "float16"), ("float32", "bfloat16")}
