"""A group norm for keras, with its backends JAX, PyTorch and NumPy."""

from typing import Any

from groupnorm.errors import ArgumentTypeError, BackendImportError, needs
from groupnorm.functional import group_norm

with needs("keras", "groupnorm.keras"):
    import keras

__all__ = ["GroupNormalization"]


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
    >>> layer(keras.random.normal((8, 28, 28, 64))).shape
    TensorShape([8, 28, 28, 64])
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
        super().__init__(groups, axis, *arguments, **options)

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Normalize the inputs.

        Parameters
        ----------
        inputs : tensor of shape (N, ..., C), or with the channels on `axis`
        mask : tensor of shape (N, ...) or broadcastable to the inputs, optional
            True for valid elements, which mean and variance are computed from. Keras passes it on
            from layers before this one.

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
